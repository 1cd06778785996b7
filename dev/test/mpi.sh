#!/bin/sh
# Several ranks under mpirun, on CPUs: the same run whatever their number. Runs build/train_gpt2; the
# text of this repository, as bytes, is the data. Its last line is "N passed, N failed". Without
# mpirun, or with a trainer that has no MPI in it, everything is skipped, and that is said.
set -u
cd "$(dirname "$0")/../.."
build=${BUILD:-build} passed=0 failed=0
why=
command -v mpirun >/dev/null || why="no mpirun here (openmpi-bin)"
ldd "$build/train_gpt2" | grep -q libmpi || why="$build/train_gpt2 is built without MPI (libopenmpi-dev)"
if [ "$why" ]; then
    echo "$why: skipped"
    echo "0 passed, 0 failed"
    exit 0
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
# As root, more ranks than cores, and none bound to a core or spinning while it waits.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_mpi_yield_when_idle=1
export OMPI_MCA_btl_vader_single_copy_mechanism=none OMP_NUM_THREADS=1
"$build/tokenize" --tokenizer bytes --out "$out/text" train_gpt2.c llmc >/dev/null || exit 1
text="--train $out/text_train_*.bin --tokenizer bytes --sample-tokens 8 --eval-every 5 --val-tokens 4096"
text="$text --val $out/text_train_*.bin"
flags="$text --depth 3 --channels 128 --heads 2 --seq-len 64 --batch-tokens 2048 --micro-batch 2"
flags="$flags --warmup 2 --init test --grad-clip 0.5"

# check WORDS COMMAND...: counts whether the command succeeded.
check() {
    words=$1
    shift
    if "$@"; then
        echo "ok     $words"
        passed=$((passed + 1))
    else
        echo "FAILED $words"
        failed=$((failed + 1))
    fi
}

# ranks N NAME FLAGS...: a run of N ranks in $out/NAME, what it prints in $out/NAME.txt.
ranks() {
    n=$1 name=$2
    shift 2
    # shellcheck disable=SC2086
    timeout 120 mpirun -np "$n" "$build/train_gpt2" $flags --out "$out/$name" "$@" >"$out/$name.txt" 2>&1
}

# Columns of the steps of a run's log: loss, gradient norm, validation loss.
column() { tail -n +2 "$out/$1/log.csv" | cut -d, -f"$2"; }

# near A B COLUMN: as many numbers, each within 1e-5 of A's, relative.
near() {
    column "$1" "$3" >"$out/a" && column "$2" "$3" >"$out/b" && paste "$out/a" "$out/b" |
        awk 'NF == 0 { next } NF != 2 { bad = 1 } { d = $1 - $2; n++; if (d * d > 1e-10 * $1 * $1) bad = 1 }
             END { exit bad || !n }'
}

# The same bits in the log and in the parameters at the end.
same() {
    for run in "$1" "$2"; do
        cut -d, -f1,14,15 "$out/$run/log.csv" >"$out/$run.bits"
        cksum <"$(echo "$out/$run"/ckpt/step_*10/model.safetensors)" >>"$out/$run.bits"
    done
    cmp -s "$out/$1.bits" "$out/$2.bits"
}

# One error line, of that rank, with those words.
one_error() { [ "$(grep -c 'error: ' "$out/$1.txt")" -eq 1 ] && grep -q "^\[rank $2\] error: .*$3" "$out/$1.txt"; }

for n in 1 2 4 8; do
    check "$n ranks train" ranks $n "w$n" --steps 10 --save-every 5 --keep 5
done
for n in 2 4 8; do
    check "$n ranks have the losses of one" near w1 "w$n" 4
    check "$n ranks have the validation losses of one" near w1 "w$n" 12
done
check "the clip bites" awk -F, 'NR > 1 && NR < 12 && $5 < 1 { bad = 1 } END { exit bad }' "$out/w1/log.csv"

check "4 ranks again" ranks 4 again --steps 10
check "the same bits again" same w4 again

for n in 2 4 1; do
    check "a save of 2 ranks goes on on $n" \
        ranks $n "on$n" --steps 10 --resume "$out/w2/ckpt/step_00000005"
    # The steps before the save are not in the log of what goes on.
    sed -n '1p;/^[5-9],/p;/^10,/p' "$out/w2/log.csv" >"$out/tail.csv"
    mkdir -p "$out/from2" && cp "$out/tail.csv" "$out/from2/log.csv"
    check "... with the losses that 2 ranks had" near from2 "on$n" 4
done
cp -r "$out/w2/ckpt" "$out/from2/"
check "... on 2 with the same bits" same from2 on2

# A signal to any one rank: all save the same step. The run is long; the signal ends it.
rm -f "$out/signal.code"
(ranks 4 signal --steps 100000; echo $? >"$out/signal.code") &
until grep -q "^step .*3/" "$out/signal.txt" 2>/dev/null || [ -e "$out/signal.code" ]; do sleep 0.1; done
for dir in /proc/[0-9]*; do
    {
        tr '\0' ' ' <"$dir/cmdline" | grep -q "train_gpt2 .*--out $out/signal" &&
            tr '\0' '\n' <"$dir/environ" | grep -qx "OMPI_COMM_WORLD_RANK=2" && kill -USR1 "${dir#/proc/}"
    } 2>/dev/null
done
wait
check "a signal to rank 2 alone: exit 75" [ "$(cat "$out/signal.code")" -eq 75 ]
check "... one save, of a step" [ "$(ls "$out/signal/ckpt" | grep -c '^step_[0-9]*$')" -eq 1 ]
check "... with the part of every rank" [ "$(ls "$out"/signal/ckpt/step_*/optim_rank00[0-3].safetensors | wc -l)" -eq 4 ]

# What goes wrong is said once, by a rank that knows.
ranks 3 odd --steps 2
check "3 ranks for 32 rows: exit 2" [ $? -eq 2 ]
check "... in one line" one_error odd 0 "expected a multiple of the 3 ranks"
ranks 4 dump --steps 2 --dump "$out/dump.safetensors"
check "a dump of 4 ranks: exit 2" [ $? -eq 2 ]
check "... in one line" one_error dump 0 "--dump: found 4 ranks, expected 1"
ranks 4 nan --steps 30 --lr-matrix 1000 --wd-matrix 1000
check "a loss that is not finite: exit 5" [ $? -eq 5 ]
check "... in one line" one_error nan '[0-3]' "step [0-9]*: found loss"
timeout 120 mpirun -np 8 "$build/train_gpt2" --depth 26 --batch-tokens 524288 --dry-run 1 >"$out/dry.txt" 2>&1
check "what 8 ranks would do" grep -q "^most of Muon's work: [0-9.]*% above the mean" "$out/dry.txt"

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
