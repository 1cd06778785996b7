#!/bin/sh
# Runs the emulated GPU tests named on the command line, small: all that is asynchronous late; and,
# beside them, those of BF16, which have copies that are, once more with copies at once and the
# threads of a block in the opposite order. Then one trainer against the other on a small model:
# losses, gradients and updates of the FP32 build, losses of the BF16 build.
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
