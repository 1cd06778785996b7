#!/bin/sh
# Lines of the core, which is what one reads to know the trainers: train_gpt2.c, train_gpt2.cu and
# llmc/. For each file all lines, and those that are neither blank nor a comment alone.
set -eu
cd "$(dirname "$0")/.."
awk '
    FNR == 1 && NR > 1 { row() }
    FNR == 1 { name = FILENAME; lines = code = 0 }
    { lines++; code += $0 !~ /^[ \t]*(\/\/.*)?$/ }
    function row() {
        limit = name ~ /^train/ ? 1600 : name ~ /attention/ ? 700 : 500
        printf "%6d %6d  %s%s\n", lines, code, name, (lines > limit ? "  (more than " limit ")" : "")
        all += lines; all_code += code
    }
    BEGIN { printf "%6s %6s\n", "lines", "code" }
    END { row(); printf "%6d %6d  in all\n", all, all_code }' train_gpt2.c train_gpt2.cu llmc/*
