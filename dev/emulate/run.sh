#!/bin/sh
# Runs the emulated GPU tests named on the command line, small: all that is asynchronous late; and,
# beside them, those of BF16, which have copies that are, once more with copies at once and the
# threads of a block in the opposite order. Then one trainer against the other on a small model:
# losses, gradients and updates of the FP32 build, losses of the BF16 build. And two ranks, under
# mpirun where there is one, against one: the losses of FP32 within 1e-5, the bits of two runs in BF16.
set -eu
out=$BUILD/emulate
export GRID=small OMP_NUM_THREADS=1

trainer() {
    export OMP_NUM_THREADS=2
    program=$1
    shift
    "$BUILD/diff" "$BUILD/train_gpt2" "$out/$program" "$@" -- --train "$out/text_train_*.bin" \
        --tokenizer bytes --depth 3 --channels 128 --heads 1 --seq-len 192 --window-short 64 \
        --batch-tokens 384 --micro-batch 1 --warmup 5 --steps 100 --sample-tokens 0
}

# shellcheck disable=SC2046
EMULATE=early,backward dev/test/run.sh $(printf '%s\n' "$@" | grep -v /fp32/) >"$out/early.txt" 2>&1 &
early=$! failed=0
echo "==== late"
dev/test/run.sh "$@" || failed=1
echo "==== early, backward"
wait $early || failed=1
cat "$out/early.txt"
[ $failed -eq 0 ] || exit 1
echo "==== trainers"
"$BUILD/tokenize" --tokenizer bytes --out "$out/text" llmc >/dev/null
trainer train_gpt2cu_fp32 --steps 3 --top 3
trainer train_gpt2cu --steps 7 --dumps 0 --updates 0

command -v mpirun >/dev/null || { echo "no mpirun here (openmpi-bin): ranks are skipped"; exit 0; }
echo "==== ranks"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_mpi_yield_when_idle=1 OMP_NUM_THREADS=1
export OMPI_MCA_btl_vader_single_copy_mechanism=none

# ranks N PROGRAM NAME FLAGS...: a run of N ranks in $out/NAME.
ranks() {
    n=$1 program=$2 name=$3
    shift 3
    rm -rf "${out:?}/$name"
    timeout 300 mpirun -np "$n" "$out/$program" --train "$out/text_train_*.bin" --tokenizer bytes --depth 3 \
        --channels 128 --heads 1 --seq-len 128 --window-short 64 --batch-tokens 512 --micro-batch 1 --warmup 2 \
        --init test --grad-clip 0.5 --sample-tokens 0 --out "$out/$name" "$@" >"$out/$name.txt" 2>&1 ||
        { cat "$out/$name.txt"; exit 1; }
}

bits() { tail -n +2 "$out/$1/log.csv" | cut -d, -f1,14,15; }

ranks 1 train_gpt2cu_fp32 one --steps 4
ranks 2 train_gpt2cu_fp32 two --steps 4
"$BUILD/diff" "$out/one" "$out/two" --loss-tol 5e-5 --mean-tol 5e-5 --steps 4
ranks 2 train_gpt2cu first --steps 4 --save-every 2 --keep 9
ranks 2 train_gpt2cu resumed --steps 4 --resume "$out/first/ckpt/step_00000002"
ranks 4 train_gpt2cu others --steps 4 --resume "$out/first/ckpt/step_00000002"
bits first | tail -n 3 >"$out/bits"
bits resumed | cmp - "$out/bits"
cmp "$out/first/ckpt/step_00000004/model.safetensors" "$out/resumed/ckpt/step_00000004/model.safetensors"
echo "ok     two ranks resumed: the same bits"
