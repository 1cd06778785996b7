#!/bin/sh
# make quickstart: this repository's text -> byte shards -> a small model (0.8M parameters) trained
# for about a minute on 2 idle cores -> its validation loss beside a bigram model's, and a sample.
# Nothing is downloaded. Files of the run: build/quickstart/. Expected: 2.0 to 2.2 nats against 2.6
# to 2.7.
set -eu
build=${1:-build}
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"  # idle threads sleep: others may use this machine
out=$build/quickstart
rm -rf "$out"
mkdir -p "$out"

echo "--- text: one file, one document; every tenth or so is held out for validation"
"$build/tokenize" --tokenizer bytes --out "$out/" --val-fraction 0.1 --seed 3 --endings "c h md sh py" \
    README.md train_gpt2.c Makefile llmc dev scripts

# Learning rates are for batches of 2^19 tokens and fall with the root of the batch; a run this
# short learns more with eight times as much.
echo "--- training"
"$build/train_gpt2" --train "$out/train_*.bin" --val "$out/val_*.bin" --tokenizer bytes --out "$out" \
    --depth 3 --channels 128 --heads 2 --seq-len 256 --batch-tokens 2048 --steps 320 --warmup 10 \
    --lr-matrix 0.16 --lr-lm-head 0.064 --lr-wte 2.4 --lr-value-embed 1.2 \
    --eval-every 80 --sample-tokens 300 --prompt "static "

echo "--- the same targets, by a bigram model counted on the same text"
"$build/bigram" --train "$out/train_*.bin" --val "$out/val_*.bin" --tokenizer bytes --seq-len 256

model=$(awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == "val_loss") c = i } $c != "" { v = $c } END { print v }' "$out/log.csv")
echo "--- validation loss of the model trained above: $model nats per byte"
