#!/bin/sh
# Makes gpt2_tokenizer.bin from GPT-2's published vocabulary: 1.5 MB to download, or local files.
#
#     dev/data/get_tokenizer.sh [OUT [VOCAB_BPE ENCODER_JSON]]
#
# OUT: the file to write [gpt2_tokenizer.bin]. VOCAB_BPE, ENCODER_JSON: URLs or files [OpenAI's].
# Needs a C compiler (CC, or cc), and curl or wget for URLs. What comes from OpenAI's URLs must have
# the SHA-256 that tiktoken expects. Exit codes: 2 usage, or OUT cannot be written, 3 other files
# than expected, 8 a download failed.
set -eu

usage="usage: $0 [OUT [VOCAB_BPE ENCODER_JSON]]"
for argument; do
    case $argument in
    -h | --help)
        echo "$usage"
        echo "writes OUT [gpt2_tokenizer.bin] from two files or URLs [OpenAI's, 1.5 MB]"
        exit 0 ;;
    -*)
        echo "error: $argument: found a flag, expected a file; $usage" >&2
        exit 2 ;;
    esac
done
if [ $# -eq 2 ] || [ $# -gt 3 ]; then
    echo "$usage" >&2
    exit 2
fi
url=https://openaipublic.blob.core.windows.net/gpt-2/encodings/main
out=${1:-gpt2_tokenizer.bin}
merges=${2:-$url/vocab.bpe}
encoder=${3:-$url/encoder.json}
folder=$(dirname "$out")
if [ -d "$out" ] || [ ! -d "$folder" ] || [ ! -w "$folder" ]; then
    echo "error: $out: cannot be written; give a file in a folder that can" >&2
    exit 2
fi
root=$(dirname "$0")/../..
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# fetch URL_OR_FILE TO: downloads or copies.
fetch() {
    case $1 in
    http://* | https://* | file://*)
        if command -v curl >/dev/null; then
            curl -fsSL --retry 3 -o "$2" "$1"
        elif command -v wget >/dev/null; then
            wget -q -O "$2" "$1"
        else
            echo "error: found neither curl nor wget; install one, or give two local files" >&2
            exit 8
        fi || {
            echo "error: cannot download $1; check the network, or give two local files" >&2
            exit 8
        } ;;
    *)
        cp "$1" "$2" 2>/dev/null || {
            echo "error: $1: cannot read it; give a file or a URL" >&2
            exit 3
        } ;;
    esac
}

# check FILE URL SHA256: exits 3 when the file that came from there is another one.
check() {
    if command -v sha256sum >/dev/null; then
        found=$(sha256sum "$1")
    elif command -v shasum >/dev/null; then
        found=$(shasum -a 256 "$1")
    else
        return 0
    fi
    if [ "${found%% *}" != "$3" ]; then
        echo "error: $2: found SHA-256 ${found%% *}, expected $3; download it again" >&2
        exit 3
    fi
}

fetch "$merges" "$work/vocab.bpe"
fetch "$encoder" "$work/encoder.json"
if [ "$merges" = "$url/vocab.bpe" ]; then
    check "$work/vocab.bpe" "$merges" 1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5
fi
if [ "$encoder" = "$url/encoder.json" ]; then
    check "$work/encoder.json" "$encoder" 196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783
fi
${CC:-cc} -std=gnu11 -I"$root" "$root/dev/data/make_tokenizer.c" -o "$work/make_tokenizer" -lm
"$work/make_tokenizer" --encoder "$work/encoder.json" --encoder-name "$encoder" \
    --merges "$work/vocab.bpe" --merges-name "$merges" --out "$out"
