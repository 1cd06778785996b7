#!/bin/sh
# make bench-cpu: matmul beside OpenBLAS, packing, and the trainer's speed and memory on the
# quickstart's model and on depth 12 at T = 1024 (drawn tokens: speed does not depend on the text).
set -eu
build=${BUILD:-build}
"$build/bench/bench_matmul"
"$build/bench/bench_packing"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
head -c 400000 /dev/urandom | od -An -v -tx1 >"$work/drawn.txt"
"$build/tokenize" --tokenizer bytes --out "$work/" "$work/drawn.txt" >/dev/null

# Speed: the median of the steps after the first. Memory: what the progress line says.
measure() {
    name=$1
    shift
    "$build/train_gpt2" --train "$work/train_000000.bin" --sample-tokens 0 --eval-every 0 "$@" >"$work/log"
    awk -v name="$name" '/tok\/s/ && !/^step +0\// {
            for (i = 1; i <= NF; i++) { if ($i == "tok/s") t[++n] = $(i - 1); if ($i == "GB") gb = $(i - 1) } }
        END { for (i = 1; i <= n; i++) for (j = i + 1; j <= n; j++) if (t[j] < t[i]) { x = t[i]; t[i] = t[j]; t[j] = x }
            printf "%-40s %8.0f tok/s   peak memory %s GB\n", name, t[int((n + 1) / 2)], gb }' "$work/log"
}
echo
measure "quickstart: depth 3, C 128, T 256, V 257" --tokenizer bytes --depth 3 --channels 128 --heads 2 \
    --seq-len 256 --batch-tokens 2048 --steps 30
measure "depth 12, C 768, T 1024, V 50257" --depth 12 --seq-len 1024 --bos 256 --batch-tokens 4096 --steps 3
