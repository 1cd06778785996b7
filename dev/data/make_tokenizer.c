// make_tokenizer: GPT-2's published vocabulary -> gpt2_tokenizer.bin (format: llmc/tokenizer.h).
//
//     make_tokenizer --encoder encoder.json --merges vocab.bpe --out gpt2_tokenizer.bin
//
// encoder.json: {"token": id, ...}. vocab.bpe: a line of comment, then a line "left right" for each
// merge, the first having id 256. Both spell a byte as one character: the printable bytes 33..126,
// 161..172, 174..255 stand for themselves as U+0021..U+00FF, the 68 others, in their order, are
// U+0100, U+0101, ... The two files say the same twice; this program insists that they agree, then
// reads its own output back before it writes it. get_tokenizer.sh fetches the files and calls it.
#include "llmc/args.h"       // args_parse
#include "llmc/json.h"       // json_enter, json_more, json_string, json_u64
#include "llmc/tokenizer.h"  // tokenizer_parse, TOKENIZER_MAGIC

#define CHARACTERS 324  // U+0000 .. U+0143
#define TOKENS_MAX 65536

typedef struct {
    uint8_t bytes[255];
    int size;  // 0: not seen yet
} Token;

static int byte_of[CHARACTERS];  // the byte a character stands for, or -1
static Token *tokens;            // (TOKENS_MAX) by id
static int token_count;

static void fill_alphabet(void) {
    int next = 256;
    for (int c = 0; c < CHARACTERS; c++) byte_of[c] = -1;
    for (int b = 0; b < 256; b++) {
        bool printable = (b > 32 && b < 127) || (b > 160 && b != 173);
        byte_of[printable ? b : next++] = b;
    }
}

// Adds what (n) bytes of UTF-8 in that alphabet spell to `token`. False when it cannot be.
static bool append_spelled(Token *token, const char *s, size_t n) {
    for (size_t i = 0; i < n;) {
        size_t step = tokenizer_utf8((const uint8_t *)s + i, n - i);
        unsigned c = (unsigned char)s[i];
        if (step == 2) c = (c & 0x1F) << 6 | ((unsigned char)s[i + 1] & 0x3F);
        if (step < 1 || step > 2 || c >= CHARACTERS || byte_of[c] < 0 || token->size == 255)
            return false;
        token->bytes[token->size++] = (uint8_t)byte_of[c];
        i += step;
    }
    return token->size > 0;
}

// name: what messages call the file.
static void read_encoder(const char *path, const char *name) {
    char *text, spelled[2048];
    size_t size, length;
    uint64_t id;
    Json j;
    if (io_read_file(path, &text, &size)) die(EXIT_DATA, "%s", io_error);
    json_init(&j, text, size);
    for (json_enter(&j, '{'); json_more(&j, '}');) {
        Token token = {{0}, 0};
        if (!json_string(&j, spelled, sizeof spelled, &length) ||
            !json_expect(&j, ':', "expected :"))
            break;
        if (!json_u64(&j, &id)) break;
        if (!append_spelled(&token, spelled, length))
            die(EXIT_DATA,
                "%s, before byte %zu: found the token '%s', expected 1 to 255 characters that "
                "stand for bytes",
                name, j.at, spelled);
        if (id >= TOKENS_MAX || tokens[id].size)
            die(EXIT_DATA, "%s, before byte %zu: found id %llu, expected a new one below %d", name,
                j.at, (unsigned long long)id, TOKENS_MAX);
        tokens[id] = token;
        token_count++;
    }
    if (!json_end(&j)) die(EXIT_DATA, "%s, byte %zu: %s", name, j.error_at, j.error);
    for (int i = 0; i < token_count; i++)
        if (!tokens[i].size)
            die(EXIT_DATA, "%s: found %d tokens but none with id %d", name, token_count, i);
    if (token_count <= 257)
        die(EXIT_DATA,
            "%s: found %d tokens, expected more than 257: one for each byte, one for each merge, "
            "and the separator",
            name, token_count);
    free(text);
}

// Checks that merge i, "left right", spells token 256 + i.
static void check_merge(const char *name, int i, const char *line, size_t n) {
    Token joined = {{0}, 0};
    const char *space = (const char *)memchr(line, ' ', n);
    size_t left = space ? (size_t)(space - line) : 0;
    bool good = space && append_spelled(&joined, line, left) &&
                append_spelled(&joined, space + 1, n - left - 1);
    const Token *token = 256 + i < token_count ? &tokens[256 + i] : NULL;
    if (!good || !token || joined.size != token->size ||
        memcmp(joined.bytes, token->bytes, (size_t)joined.size))
        die(EXIT_DATA,
            "%s, line %d: found '%.*s', expected the two parts of token %d of the encoder", name,
            i + 2, (int)n, line, 256 + i);
}

static void check_merges(const char *path, const char *name) {
    char *text;
    size_t size;
    int merges = 0;
    if (io_read_file(path, &text, &size)) die(EXIT_DATA, "%s", io_error);
    if (strncmp(text, "#version", 8))
        die(EXIT_DATA, "%s, line 1: found '%.20s', expected #version", name, text);
    for (const char *line = text + strcspn(text, "\n"); *line; line += strcspn(line, "\n")) {
        size_t n = strcspn(++line, "\r\n");
        if (n) check_merge(name, merges++, line, n);
    }
    if (token_count != 256 + merges + 1)
        die(EXIT_DATA,
            "%s: found %d merges, expected %d: %d tokens less 256 bytes and the separator", name,
            merges, token_count - 257, token_count);
    free(text);
}

static void write_tokenizer(const char *path) {
    uint32_t header[TOKENIZER_HEADER / 4] = {TOKENIZER_MAGIC, TOKENIZER_VERSION,
                                             (uint32_t)token_count, (uint32_t)token_count - 1};
    uint8_t *file =
        (uint8_t *)die_alloc(TOKENIZER_HEADER + 256 * (size_t)token_count, 1, "the file");
    size_t size = TOKENIZER_HEADER;
    memcpy(file, header, sizeof header);
    for (int id = 0; id < token_count; id++) {
        file[size++] = (uint8_t)tokens[id].size;
        memcpy(file + size, tokens[id].bytes, (size_t)tokens[id].size);
        size += (size_t)tokens[id].size;
    }
    Tokenizer check;
    if (tokenizer_parse(&check, path, file, size)) die(EXIT_DATA, "%s", tokenizer_error);
    tokenizer_free(&check);
    if (io_write_file(path, file, size)) die(EXIT_DATA, "%s", io_error);
    printf("%s  %d tokens, %zu bytes\n", path, token_count, size);
    free(file);
}

int main(int argc, char **argv) {
    const char *encoder, *encoder_name, *merges, *merges_name, *out;
    Arg table[] = {
        {"encoder", ARG_STRING, &encoder, "encoder.json", "GPT-2's tokens and their ids", 0, 0, 0},
        {"encoder-name", ARG_STRING, &encoder_name, "", "what messages call it; none: its path", 0,
         0, 0},
        {"merges", ARG_STRING, &merges, "vocab.bpe", "GPT-2's merges", 0, 0, 0},
        {"merges-name", ARG_STRING, &merges_name, "", "what messages call them; none: their path",
         0, 0, 0},
        {"out", ARG_STRING, &out, "gpt2_tokenizer.bin", "the file to write", 0, 0, 0},
    };
    args_parse(table, (int)(sizeof table / sizeof *table),
               "make_tokenizer --encoder FILE --merges FILE --out FILE", argc, argv);
    tokens = (Token *)die_alloc(TOKENS_MAX, sizeof *tokens, "the tokens");
    fill_alphabet();
    read_encoder(encoder, *encoder_name ? encoder_name : encoder);
    check_merges(merges, *merges_name ? merges_name : merges);
    write_tokenizer(out);
    free(tokens);
    args_free();
    return EXIT_OK;
}
