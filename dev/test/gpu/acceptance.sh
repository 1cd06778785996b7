#!/bin/sh
# dev/test/gpu/acceptance.sh PART...: what docs/measurements.md says of the CUDA trainer, found again on
# this machine's GPU, with the programs in build/ (make; make PRECISION=FP32). Parts:
#
#     fp32    the FP32 build against the CPU, depth 4 and 12: 20 losses, a step from --init test, three
#             updates, a step from the save after 20 (50 at depth 4)
#     bf16    BF16 against FP32: the losses of 100 steps of 32,768 tokens, depth 12
#     bits    the same bits from the same command, from a run resumed half way, from --recompute 1
#             and 2; in FP32 micro-batches of 1 and 4 rows within 1e-5
#     run     380 steps of 131,072 tokens, depth 12: validation losses of two seeds, and with
#             --doc-mask 1. Needs TRAIN and VAL, shards of GPT-2 tokens
#
# TRAIN: training shards; without it the text of this repository as bytes. OUT: where runs go
# (build/acceptance). Exits 1 when a part fails; what failed is printed.
set -u
cd "$(dirname "$0")/../../.."
build=${BUILD:-build} out=${OUT:-${BUILD:-build}/acceptance} failed=0
depth=${DEPTH:-12} gpu=$build/train_gpt2cu gpu32=$build/train_gpt2cu_fp32
mkdir -p "$out"
if [ -z "${TRAIN:-}" ]; then
    "$build/tokenize" --tokenizer bytes --out "$out/text" README.md train_gpt2.c train_gpt2.cu llmc dev >/dev/null
    TRAIN="$out/text_train_*.bin" vocab="--tokenizer bytes --vocab 257"
fi
data="--train $TRAIN ${vocab:-} --sample-tokens 0"

# check WORDS COMMAND...: says whether the command succeeded.
check() {
    words=$1
    shift
    if "$@"; then echo "ok     $words"; else echo "FAILED $words"; failed=1; fi
}

# The steps of run A that B has, too, and the parameters at the end: bit for bit.
same() {
    for run; do
        cut -d, -f1,14,15 "$run/log.csv" | grep ',0x' | sort >"$run/bits"
        cksum "$run"/ckpt/step_*"$(tail -n 1 "$run/log.csv" | cut -d, -f1)"/*.safetensors |
            cut -d' ' -f1,2 >"$run/sum"
    done
    [ -s "$2/bits" ] && [ -s "$1/sum" ] && [ -z "$(comm -13 "$1/bits" "$2/bits")" ] && cmp -s "$1/sum" "$2/sum"
}

fp32() {
    text="--train $out/diff_train_*.bin --tokenizer bytes --sample-tokens 0"
    "$build/tokenize" --tokenizer bytes --out "$out/diff" llmc dev >/dev/null
    # shellcheck disable=SC2086
    check "FP32 against the CPU, depth 4" "$build/diff" "$build/train_gpt2" "$gpu32" --steps 50 --top 2 -- \
        $text --depth 4 --channels 256 --heads 2 --seq-len 256 --window-short 64 --doc-mask 1 \
        --batch-tokens 2048 --micro-batch 4 --warmup 5 --steps 200
    check "FP32 against the CPU, depth $depth" "$build/diff" "$build/train_gpt2" "$gpu32" --steps 20 --top 2 -- \
        $text --depth $depth --seq-len 512 --batch-tokens 4096 --micro-batch 4 --warmup 5 --steps 200
}

bf16() {
    check "BF16 against FP32, depth $depth" "$build/diff" "$gpu32" "$gpu" --steps 100 --dumps 0 --updates 0 -- \
        $data --depth $depth --batch-tokens 32768 --micro-batch 8 --steps 1000
}

bits() {
    for name in first again resumed level1 level2; do rm -rf "$out/$name"; done
    flags="$data --depth $depth --batch-tokens ${BATCH:-131072} --micro-batch ${ROWS:-16} --steps 20 --warmup 5 --save-every 10 --keep 9"
    $gpu $flags --out "$out/first" >"$out/first.txt" || failed=1
    $gpu $flags --out "$out/again" >"$out/again.txt" || failed=1
    $gpu $flags --out "$out/resumed" --resume "$(echo "$out"/first/ckpt/step_*10)" >"$out/resumed.txt" || failed=1
    for level in 1 2; do
        $gpu $flags --out "$out/level$level" --recompute $level >"$out/level$level.txt" || failed=1
    done
    check "the same command: the same bits" same "$out/first" "$out/again"
    check "resumed at step 10: the same bits" same "$out/first" "$out/resumed"
    check "--recompute 1: the same bits" same "$out/first" "$out/level1"
    check "--recompute 2: the same bits" same "$out/first" "$out/level2"
    for rows in 1 4; do
        rm -rf "$out/micro$rows"
        $gpu32 $data --depth $depth --init test --batch-tokens "${SMALL_BATCH:-8192}" --micro-batch $rows --steps 20 \
            --warmup 5 --out "$out/micro$rows" >"$out/micro$rows.txt" || failed=1
    done
    check "micro-batches of 1 and 4 rows, FP32: within 1e-5" "$build/diff" "$out/micro1" "$out/micro4" \
        --loss-tol 5e-5 --mean-tol 5e-5 --steps 20
}

run() {
    [ -n "${VAL:-}" ] || { echo "run: needs TRAIN and VAL" >&2; exit 2; }
    for flags in "--seed 1337" "--seed 1338" "--seed 1337 --doc-mask 1"; do
        name=$(echo "run$flags" | tr -d ' -')
        rm -rf "${out:?}/$name"
        echo "== $flags"
        $gpu --train "$TRAIN" --val "$VAL" --depth $depth --vocab 50257 --batch-tokens 131072 --steps 380 \
            --eval-every 100 --val-tokens 2097152 --sample-tokens 0 --out "$out/$name" $flags >"$out/$name.txt" || failed=1
        grep -e "val loss" -e "first step" "$out/$name.txt"
        tail -n 3 "$out/$name.txt"
    done
}

[ $# -gt 0 ] || set -- fp32 bf16 bits
for part; do
    case $part in
    fp32 | bf16 | bits | run) echo "==== $part"; $part ;;
    *) echo "acceptance.sh: found '$part', expected fp32, bf16, bits or run" >&2; exit 2 ;;
    esac
done
[ $failed -eq 0 ] && echo "all passed"
exit $failed
