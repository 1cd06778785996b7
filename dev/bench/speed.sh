#!/bin/sh
# dev/bench/speed.sh [runs]: builds the trainer from clean and times it on the four models of
# docs/measurements.md, `runs` times each (3): model, batch, tok/s (the median of steps 10 to 30,
# optimizer included), MFU, peak memory, GPU. About 4 minutes a run on one H200.
set -eu
cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
make -s -j"$(nproc)" BUILD="$build" "$build/bench/bench_gpu"
for run in $(seq "${1:-3}"); do
    echo "run $run"
    "$build/bench/bench_gpu" --speed
done
