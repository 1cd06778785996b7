#!/bin/sh
# Runs the test programs named on the command line, prints what they print, and sums up. Its last
# line is "N passed, N failed"; it exits 1 when a test failed or a program ended in any other way.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"  # idle threads sleep: others may use this machine
passed=0 failed=0 skipped=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for program; do
    echo "== $(basename "$program")"
    "$program" >"$log" 2>&1
    code=$?
    sed '$d' "$log"
    last=$(tail -n 1 "$log")
    case $last in
    *" passed, "*" failed"*)
        set -- $last
        passed=$((passed + $1)) failed=$((failed + $3)) skipped=$((skipped + ${5:-0}))
        [ "$code" -eq 0 ] || [ "$3" -gt 0 ] || failed=$((failed + 1)) ;;
    *)
        echo "$last"
        echo "FAILED $program ended with exit code $code before its last line"
        failed=$((failed + 1)) ;;
    esac
done
if [ "$skipped" -gt 0 ]; then
    echo "$skipped skipped (the reasons stand above)"
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
