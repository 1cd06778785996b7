#!/bin/sh
# make readme: puts the trainer's --help, and with QUICKSTART=FILE and TEST=FILE the output of those two
# commands, between their marks in README.md.
set -eu
build=${BUILD:-build}

# replace MARK FILE: what stands between the marks becomes FILE, as code.
replace() {
    awk -v mark="$1" -v file="$2" '
        $0 == "<!-- end of " mark " -->" { skip = 0 }
        !skip { print }
        $0 == "<!-- " mark " -->" {
            print "```"
            while ((getline line < file) > 0) print line
            print "```"
            skip = 1
        }' README.md >README.md.tmp
    mv README.md.tmp README.md
}

help=$(mktemp)
trap 'rm -f "$help"' EXIT
"$build/train_gpt2" --help >"$help"
replace flags "$help"
[ -z "${QUICKSTART:-}" ] || replace quickstart "$QUICKSTART"
[ -z "${TEST:-}" ] || replace test "$TEST"
