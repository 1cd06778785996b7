#!/bin/sh
# Runs GPU test programs as dev/test/run.sh does; where there is no GPU it says so, once, and ends
# with 0 tests and exit code 0. A GPU that is there but cannot be used fails every program.
#
# --sanitize before the programs: each one with GRID=small under each tool of compute-sanitizer,
# several at a time. Only kernels of ours are looked at (the global namespace: _Z and a digit), not
# those of NVIDIA's libraries. What they printed stands in $BUILD/sanitize/. Under racecheck a program
# runs in its own build for that, PROGRAM_racecheck, where there is one. cuBLAS's kernels for Hopper do
# not launch there (CUDA 13.0): BF16 programs that cannot do without are left out; the same kernels of
# ours, but for two ladders', run in FP32 builds and in test_matmul_racecheck.
sanitize=
[ "$1" = --sanitize ] && { sanitize=1; shift; }
no_gpu=$([ $# -eq 0 ] && echo "no GPU here: skipped" || GPU_PROBE=1 "$1")
if [ "$no_gpu" ]; then
    echo "$no_gpu"
    echo "0 passed, 0 failed"
    exit 0
fi
here=$(dirname "$0")
[ "$sanitize" ] || exec "$here/../run.sh" "$@"

command -v compute-sanitizer >/dev/null || PATH=$PATH:/usr/local/cuda/bin
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer: not found on the PATH" >&2; exit 1; }
export logs="$BUILD/sanitize" GRID=small OMP_NUM_THREADS=2
rm -rf "$logs"
mkdir -p "$logs"
start=$(date +%s)
for tool in racecheck memcheck initcheck synccheck; do
    for program; do
        case "$tool $program" in
        racecheck*/bf16/test_muon | racecheck*/bf16/test_model) ;;
        racecheck*/cuda/gemm_relu2 | racecheck*/cuda/muon) ;;
        racecheck*) [ -x "${program}_racecheck" ] && program=${program}_racecheck; echo "$tool $program" ;;
        *) echo "$tool $program" ;;
        esac
    done
done >"$logs/list"
xargs -P "${JOBS:-12}" -L 1 <"$logs/list" sh -c '
    log="$logs/$0.$(basename "$(dirname "$1")").$(basename "$1")"
    timeout 400 compute-sanitizer --tool $0 --kernel-name regex="^_Z[0-9]" --error-exitcode 99 \
        --print-limit 10 --max-connections 100 "$1" >"$log" 2>&1 && touch "$log.ok"'
failed=0 count=0
for log in "$logs"/*check.*; do
    case $log in *.ok) continue ;; esac
    count=$((count + 1))
    [ -e "$log.ok" ] && continue
    failed=$((failed + 1))
    echo "== FAILED $(basename "$log")"
    tail -n 40 "$log"
done
echo "$# programs under memcheck, racecheck, initcheck, synccheck: $(($(date +%s) - start)) s"
echo "$((count - failed)) passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$count" -eq "$(wc -l <"$logs/list")" ]
