"""Writes the fixtures of dev/test/test_tokenizer.c: strings with the ids that tiktoken gives them.

    python dev/oracle/make_tokenizer_fixture.py GPT2_TOKENIZER.bin

dev/test/fixtures/tokenizer_cases.txt: lines of three words
    map    -           id,id,...    the true id of each token of the subset, by its id there
    NAME   hex bytes   id,id,...    one case; "-" stands for no bytes or no ids
dev/test/fixtures/tokenizer_subset.bin: a tokenizer file (llmc/tokenizer.h) with the few tokens that
    can arise in these strings: every token that is a substring of one. Its ids are renumbered in
    the same order, so it encodes as the whole does; this script checks that with tiktoken, too.

Needs tiktoken, and no network: the encoding is built from the ranks in the tokenizer file.
"""
import random
import struct
import sys

import tiktoken

PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
FIXTURES = "dev/test/fixtures/"

PROSE = """
The lighthouse keeper wrote one line a day, and on most days the line was about the weather.
It wasn't that he'd nothing to say; he'd simply found that the sea said it better, and louder.
"You'll have noticed," she began, "that we've never once been on time."
They're certain it's theirs, but there's no telling whose it'll be once they've gone.
IT'S ALL IN CAPITALS, ISN'T IT? YOU'RE SHOUTING. WE'LL STOP. I'D RATHER; I'M TIRED. THEY'VE LEFT.
A semi-detached, twenty-first-century, well-to-do (if slightly run-down) neighbourhood.
Gradient descent follows the slope; momentum remembers where it has been.
Mr. Smith's 3 dogs ate 12 of Mrs. Jones' pies -- all by 10:45 a.m. on 04/07/1998!
Supercalifragilisticexpialidocious antidisestablishmentarianism floccinaucinihilipilification
He said 'tis so, and 'twas: rock 'n' roll in the '60s, dogs' dinners, o'clock, y'all'd've known.
"""
CODE = """
int main(int argc, char **argv) { return argc > 1 ? atoi(argv[1]) : -1; }
for (size_t i = 0; i < n; i++) {\\n\\tsum += x[i] * y[i];  // dot product\\n}
def f(x, *args, **kwargs):\\n    if x is None:\\n        return {}\\n    return [y ** 2 for y in x]
#include <stdio.h>\\n#define MAX(a, b) ((a) > (b) ? (a) : (b))\\n
{"name": "value", "list": [1, 2.5, -3e-7, null, true], "nested": {"a": {}}}
<p class="note">1 &lt; 2 &amp;&amp; 3 &gt; 2</p><br/><!-- comment -->
SELECT COUNT(*) FROM t WHERE a <= 10 AND b LIKE '%x_y%' ORDER BY c DESC;
if [ "$x" = "y" ]; then echo $((1+2)) | sed 's/a/b/g' >> /dev/null 2>&1; fi
\\\\begin{equation} \\\\frac{\\\\partial L}{\\\\partial w_{ij}} = \\\\sum_k x_k \\\\end{equation}
x+=1;y-=2;z*=3;!a&&b||c;p->q.r::s;@decorator;$var;#tag;~/path/to/file.txt;C:\\\\dir\\\\f.exe
0x7fffffff 0b1010 1_000_000 1e-10f 3.14159265358979 NaN INT_MAX __attribute__((noreturn))
"""
WORLD = """
Voilà le garçon naïf, déjà à l'hôtel où l'on fête Noël.
Der größte Fußgänger übt Öffnungszeiten; ẞ ist ein Großbuchstabe.
El niño preguntó: ¿dónde está el pingüino? ¡Aquí!
e\u0301a\u0300n\u0303o\u0308 cafe\u0301 re\u0301sume\u0301 Z\u0351\u036b\u0343a\u0322\u0321lgo
съешь ещё этих мягких булок
ξεσκεπάζω τὴν ψυχοφθόρα
日本語の文章とカタカナ、漢字。ＡＢＣ１２３
中文句子，没有空格。繁體字也行！ \U00020000\U0002a6d6
한국어 문장은 띄어쓰기가 있다. \u1112\u1161\u11ab
مرحبا بالعالم ١٢٣ ــ\u0651\u064e
ש\u05c1\u05b8לו\u05b9ם עולם \u200f(1)\u200e \u202eabc\u202c
नमस\u094dत\u0947 द\u0941न\u093fय\u093e १२३ สว\u0e31สด\u0e35ชาวโลก
አማርኛ ქართული Հայերէն ᎠᎵᏉ Ꜥꭰ
😀👍\U0001f3fd 👨\u200d👩\u200d👧\u200d👦 🇫🇷🇩🇪 ❤\ufe0f\u200d🔥 1\ufe0f\u20e3
½ ² Ⅷ ① 〇 ௰ 𝟘𝐀𝕬 ∑∫∞≠ €£¥ ™© …—–“”‘’
don’t it’s we’ve ʼn ªº ǅ ʰʱ \u0345 ﬁ ﷺ \ufffd \ufeffBOM
"""
# Where splitting is subtle: each kind of Unicode white space, and what only looks like it.
SPACES = ([chr(c) for c in range(0x09, 0x0e)] + [chr(c) for c in range(0x1c, 0x21)] +
          ["\x00", "\x7f"] + [chr(c) for c in range(0x2000, 0x200b)] +
          ["\u0085", "\u00a0", "\u1680", "\u180e", "\u2028", "\u2029", "\u202f", "\u205f"] +
          ["\u3000", "\u200b", "\u200c", "\u200d", "\u2060", "\ufeff"])


def read_tokens(path):
    data = open(path, "rb").read()
    magic, version, vocab, bos = struct.unpack_from("<4I", data)
    assert (magic, version) == (20240328, 2), "not a tokenizer file"
    tokens, at = [], 1024
    for _ in range(vocab):
        tokens.append(data[at + 1:at + 1 + data[at]])
        at += 1 + data[at]
    assert at == len(data)
    return tokens, bos


def write_tokens(path, tokens, bos):
    with open(path, "wb") as f:
        f.write(struct.pack("<4I", 20240328, 2, len(tokens), bos).ljust(1024, b"\0"))
        for token in tokens:
            f.write(bytes([len(token)]) + token)


def encoding(tokens, bos):
    ranks = {token: i for i, token in enumerate(tokens) if i != bos}
    return tiktoken.Encoding("subset", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": bos})


def unescape(line):
    line = line.replace("\\\\", "\0").replace("\\n", "\n").replace("\\t", "\t")
    return line.replace("\0", "\\")


def lines(name, text):
    for i, line in enumerate(text.strip("\n").split("\n")):
        yield f"{name}_{i}", unescape(line).encode()


def invalid():
    """Bytes that are not UTF-8, alone, inside words and after white space."""
    bad = ("80 bf c080 c1bf c3 c328 e09fbf e282 eda080 edbfbf efbf f08fbfbf f09f98 f4908080 f5808080 "
           "f888808080 fe ff fffe0000 e697a5e69c")
    for i, b in enumerate(map(bytes.fromhex, bad.split())):
        yield f"invalid_alone_{i}", b
        yield f"invalid_word_{i}", b"Hello wor" + b + b"ld, they've said."
        yield f"invalid_space_{i}", b"one  \n \t " + b + b"  two  \n\n three"
    yield "invalid_nbsp", b"a \xc2\xa0\xc2"
    yield "invalid_two", b"first\xffsecond third\xfefourth fifth"
    yield "invalid_digits", b"12345\x80678 90 abc123 it's"
    yield "invalid_all_spaces", b" \n \t \xff"
    yield "invalid_whole_token", b"\xe2\x80"
    yield "invalid_separator", b"<|endoftext|>\xff<|endoftext|>"


def cases():
    yield "empty", b""
    yield "separator_is_text", b"<|endoftext|>a <|endoftext|>"
    yield from lines("prose", PROSE)
    yield from lines("code", CODE)
    yield from lines("world", WORLD)
    yield "prose_all", PROSE.encode()
    for n in (1, 2, 3, 4, 7, 8, 15, 16, 31, 100):
        yield f"spaces_{n}", b" " * n
        yield f"spaces_{n}_word", b" " * n + b"word"
        yield f"newlines_{n}", b"x" + b"\n" * n + b"y"
        yield f"tabs_{n}", b"\t" * n + b"if" + b" " * n + b"\n" + b" " * n
        yield f"digits_{n}", (b"1234567890" * 10)[:n]
        yield f"dashes_{n}", b"-" * n + b"=" * n + b"." * n
    for i, c in enumerate(SPACES):
        yield f"space_kind_{i}", f"a{c}b {c}c{c} d{c}{c}e{c}1{c}!{c}".encode()
    for i, c in enumerate("s d m t ll ve re S LL sd l v x é".split()):
        yield f"apostrophe_{i}", f"I'{c} you'{c}x '{c} ''{c} 9'{c}".encode()
    yield from invalid()
    yield "letters_3000", b"a" * 3000
    yield "letters_alternating", b"ab" * 700 + b"ba" * 300
    yield "word_repeated", b"thethethe" * 200
    yield "signs_long", b"!?" * 500 + b"/" * 700
    yield "no_spaces", PROSE.replace(" ", "").replace("\n", "").encode()
    yield "all_bytes", bytes(range(256))
    yield "all_ascii", bytes(range(128))
    rng = random.Random(20240328)
    parts = [p for text in (PROSE, CODE, WORLD) for p in text.split()]
    parts += SPACES + [" ", "  ", "\n", "'", "7"] * 9
    for i in range(60):
        mixed = "".join(rng.choice(parts) + rng.choice(["", " "]) for _ in range(30))
        yield f"mixed_{i}", mixed.encode()
    for i in range(20):
        broken = bytearray("".join(rng.choice(parts) + " " for _ in range(20)).encode())
        broken[rng.randrange(len(broken))] = rng.randrange(256)
        yield f"mixed_one_byte_changed_{i}", bytes(broken)
    for i in range(20):
        yield f"random_bytes_{i}", rng.randbytes(5 * i + 1)


def row(name, data, ids):
    return f"{name} {data.hex() or '-'} {','.join(map(str, ids)) or '-'}\n"


def main():
    tokens, bos = read_tokens(sys.argv[1])
    full, found = encoding(tokens, bos), list(cases())
    assert len({name for name, _ in found}) == len(found)
    inside = {b[i:i + n] for _, b in found for n in range(1, 129) for i in range(len(b) - n + 1)}
    kept = [i for i, token in enumerate(tokens) if token in inside or len(token) == 1 or i == bos]
    subset = [tokens[i] for i in kept]
    small = encoding(subset, len(subset) - 1)
    with open(FIXTURES + "tokenizer_cases.txt", "w") as f:
        f.write(row("map", b"", kept))
        for name, data in found:
            ids = full._encode_bytes(data)
            assert b"".join(tokens[i] for i in ids) == data, name
            assert [kept[i] for i in small._encode_bytes(data)] == ids, name
            f.write(row(name, data, ids))
    write_tokens(FIXTURES + "tokenizer_subset.bin", subset, len(subset) - 1)
    size = sum(len(data) for _, data in found)
    print(f"{len(found)} cases, {size} bytes, {len(kept)} of {len(tokens)} tokens")


main()
