// test_tokenizer.c: llmc/tokenizer.h against tiktoken, against a naive encoder, on damaged files.
//
// The ids come from dev/oracle/make_tokenizer_fixture.py, which describes the two fixture files. A
// subset of GPT-2's vocabulary is in the tree; with the whole file at hand, in the folder
// $SPEEDRUN_DATA, the same strings are encoded with that, too.
#include "dev/test/test.h"
#include "llmc/rand.h"
#include "llmc/tokenizer.h"

#define SUBSET "dev/test/fixtures/tokenizer_subset.bin"
#define CASES  "dev/test/fixtures/tokenizer_cases.txt"

typedef struct {
    char name[64];
    uint8_t *text;
    size_t size;
    TokenList ids;
} Case;

static Case *cases;  // (case_count) the strings with tiktoken's ids
static int case_count;
static TokenList map;  // GPT-2's id of each id of the subset
static Tokenizer subset;

// ---------------------------------------------------------------------------------------------
// The fixture.

static void parse_hex(Case *c, const char *hex) {
    c->size = *hex == '-' ? 0 : strlen(hex) / 2;
    c->text = (uint8_t *)die_alloc(c->size, 1, "a test case");
    for (size_t i = 0; i < c->size; i++) {
        char digits[3] = {hex[2 * i], hex[2 * i + 1], 0};
        c->text[i] = (uint8_t)strtoul(digits, NULL, 16);
    }
}

static TokenList parse_ids(char *text) {
    TokenList list = {NULL, 0, 0};
    for (char *p = text; *text != '-' && *p;) {
        tokenizer_append(&list, (uint32_t)strtoul(p, &p, 10));
        p += *p == ',';
    }
    return list;
}

static void load_cases(void) {
    char *text, *rest;
    size_t size;
    if (io_read_file(CASES, &text, &size)) die(EXIT_DATA, "%s", io_error);
    cases = (Case *)die_alloc(1000, sizeof *cases, "test cases");
    for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        char *words;
        const char *name = strtok_r(line, " ", &words), *hex = strtok_r(NULL, " ", &words);
        TokenList ids = parse_ids(strtok_r(NULL, " ", &words));
        if (!strcmp(name, "map")) {
            map = ids;
            continue;
        }
        Case *c = &cases[case_count++];
        snprintf(c->name, sizeof c->name, "%s", name);
        parse_hex(c, hex);
        c->ids = ids;
    }
    free(text);
}

static void free_cases(void) {
    for (int i = 0; i < case_count; i++) free(cases[i].text), free(cases[i].ids.ids);
    free(cases);
    free(map.ids);
}

static bool same_ids(const TokenList *a, const TokenList *b) {
    size_t size = a->count * sizeof *a->ids;
    return a->count == b->count && (!size || !memcmp(a->ids, b->ids, size));
}

// True when decoding the list gives back the text.
static bool decodes_to(const Tokenizer *t, const TokenList *list, const uint8_t *text,
                       size_t size) {
    size_t at = 0;
    for (size_t i = 0; i < list->count; i++) {
        size_t n;
        const uint8_t *bytes = tokenizer_decode(t, list->ids[i], &n);
        if (n > size - at || memcmp(text + at, bytes, n)) return false;
        at += n;
    }
    return at == size;
}

// ---------------------------------------------------------------------------------------------
// Bytes.

TEST(bytes_are_their_own_ids) {
    Tokenizer t;
    TokenList list = {NULL, 0, 0};
    uint8_t text[256];
    for (int i = 0; i < 256; i++) text[i] = (uint8_t)(255 - i);
    tokenizer_init(&t, "bytes");
    CHECK_INT(t.vocab, 257);
    CHECK_INT(t.bos, 256);
    tokenizer_encode(&t, text, sizeof text, &list);
    CHECK_INT(list.count, 256);
    for (int i = 0; i < 256; i++) CHECK_INT(list.ids[i], 255 - i);
    CHECK(decodes_to(&t, &list, text, sizeof text));
    free(list.ids);
    tokenizer_free(&t);
}

TEST(byte_count_is_0_for_bos_and_for_ids_beyond_the_vocabulary) {
    Tokenizer t;
    size_t n;
    tokenizer_init(&t, "bytes");
    CHECK_INT(tokenizer_byte_count(&t, 'x'), 1);
    CHECK_INT(tokenizer_byte_count(&t, 256), 0);
    CHECK_INT(tokenizer_byte_count(&t, 257), 0);
    CHECK_INT(tokenizer_byte_count(&t, -1), 0);
    CHECK(!memcmp(tokenizer_decode(&t, 256, &n), "<|endoftext|>", 13) && n == 13);
    tokenizer_free(&t);
    CHECK_INT(tokenizer_byte_count(&subset, subset.bos), 0);
    CHECK_INT(tokenizer_byte_count(&subset, (int)subset.byte_id['e']), 1);
}

// ---------------------------------------------------------------------------------------------
// Against tiktoken.

#ifdef USE_PCRE2
// The whole vocabulary of GPT-2, or NULL when it is not there.
static const char *gpt2_path(void) {
    static char path[600];
    const char *data = getenv("SPEEDRUN_DATA");
    if (!data) return NULL;
    snprintf(path, sizeof path, "%s/gpt2_tokenizer.bin", data);
    return io_exists(path) ? path : NULL;
}

// Encodes every case; the tokenizer's ids, taken through `to` if there is one, must be tiktoken's.
static void check_cases(const Tokenizer *t, const uint16_t *to) {
    for (int i = 0; i < case_count; i++) {
        const Case *c = &cases[i];
        TokenList list = {NULL, 0, 0};
        tokenizer_encode(t, c->text, c->size, &list);
        if (to)
            for (size_t k = 0; k < list.count; k++) list.ids[k] = to[list.ids[k]];
        bool equal = same_ids(&list, &c->ids);
        test_check(equal, __FILE__, __LINE__, "%s: the ids differ; found %zu, expected %zu of them",
                   c->name, list.count, c->ids.count);
        list.count = 0;
        tokenizer_encode(t, c->text, c->size, &list);
        CHECK(decodes_to(t, &list, c->text, c->size));
        free(list.ids);
    }
}

TEST(at_least_200_strings_equal_tiktoken_with_the_subset) {
    CHECK(case_count >= 200);
    CHECK_INT(map.count, subset.vocab);
    check_cases(&subset, map.ids);
}

TEST(the_same_strings_equal_tiktoken_with_the_whole_vocabulary) {
    Tokenizer t;
    if (!gpt2_path()) SKIP("SPEEDRUN_DATA names no folder with gpt2_tokenizer.bin");
    tokenizer_init(&t, gpt2_path());
    CHECK_INT(t.vocab, 50257);
    CHECK_INT(t.bos, 50256);
    check_cases(&t, NULL);
    tokenizer_free(&t);
}

TEST(random_bytes_come_back) {
    RandKey key = {7, 0, 0};
    for (uint64_t round = 0; round < 300; round++) {
        uint8_t text[512];
        size_t n = rand_u32(key, 1000000 + round) % sizeof text;
        for (size_t i = 0; i < n; i++) {
            uint32_t word = rand_u32(key, 1000 * round + i);
            text[i] = (uint8_t)word;
            if (round % 3) text[i] = (uint8_t) " \n\xC3\xA9\xE2\x82\xAC's1ab"[word % 12];
        }
        TokenList list = {NULL, 0, 0};
        tokenizer_encode(&subset, text, n, &list);
        CHECK(decodes_to(&subset, &list, text, n));
        free(list.ids);
    }
}

TEST(encoding_appends_and_knows_no_separator) {
    TokenList list = {NULL, 0, 0};
    tokenizer_encode(&subset, "\xFF", 1, &list);
    tokenizer_encode(&subset, " \xFF", 2, &list);  // must not reach back into the first text
    tokenizer_encode(&subset, "<|endoftext|>\xFF", 14, &list);
    CHECK(decodes_to(&subset, &list, (const uint8_t *)"\xFF \xFF<|endoftext|>\xFF", 17));
    for (size_t i = 0; i < list.count; i++) CHECK(list.ids[i] != subset.bos);
    free(list.ids);
}

#else
TEST(without_pcre2_encoding_says_what_to_install) {
    TokenList list = {NULL, 0, 0};
    DIES(EXIT_USAGE, "install libpcre2-dev") tokenizer_encode(&subset, "a", 1, &list);
    DIES(EXIT_USAGE, "install libpcre2-dev") tokenizer_require_encode(&subset);
    tokenizer_encode(&subset, "", 0, &list);  // a sample's prompt, when none is given
    CHECK_INT(list.count, 0);
}
#endif

TEST(every_fixture_id_decodes_to_its_text) {
    uint16_t back[65536] = {0};
    for (size_t i = 0; i < map.count; i++) back[map.ids[i]] = (uint16_t)i;
    for (int i = 0; i < case_count; i++) {
        TokenList small = {NULL, 0, 0};
        const Case *c = &cases[i];
        for (size_t k = 0; k < c->ids.count; k++) tokenizer_append(&small, back[c->ids.ids[k]]);
        CHECK(decodes_to(&subset, &small, c->text, c->size));
        free(small.ids);
    }
}

TEST(utf8_is_what_the_standard_says) {
    // Unicode, table 3-7: 1,920 characters of two bytes, 61,440 of three, 2^20 of four.
    int two = 0, three = 0, four = 0;
    for (uint32_t i = 0; i < 1 << 24; i++) {
        uint8_t s[3] = {(uint8_t)(i >> 16), (uint8_t)(i >> 8), (uint8_t)i};
        if (s[2] == 'x') two += tokenizer_utf8(s, 3) == 2;
        three += tokenizer_utf8(s, 3) == 3;
    }
    for (uint32_t i = 0; i < 1 << 24; i++) {  // the last byte: 'A' or a good one
        uint8_t s[4] = {(uint8_t)(i >> 16), (uint8_t)(i >> 8), (uint8_t)i, i % 2 ? 'A' : 0x80};
        four += tokenizer_utf8(s, 4) == 4;
        if (tokenizer_utf8(s, 4) == 4) CHECK_INT(tokenizer_utf8(s, 3), 0);
    }
    CHECK_INT(two, 1920);
    CHECK_INT(three, 61440);
    CHECK_INT(four, (1 << 20) / 64 / 2);
    CHECK_INT(tokenizer_utf8((const uint8_t *)"\xED\x9F\xBF", 3), 3);
    CHECK_INT(tokenizer_utf8((const uint8_t *)"\xED\xA0\x80", 3), 0);
    CHECK_INT(tokenizer_utf8((const uint8_t *)"\xF4\x90\x80\x80", 4), 0);
    CHECK_INT(tokenizer_utf8_prefix((const uint8_t *)"abc\xC3\xA9\xC3(", 7), 5);
}

// ---------------------------------------------------------------------------------------------
// Joining, without the splitting pattern.

// The definition, in the plainest way: as long as two neighbours make a token, join the pair with
// the lowest id, the leftmost if equal. Quadratic.
static void naive_merge(const Tokenizer *t, const uint8_t *s, size_t n, TokenList *out) {
    size_t end[512], count = n;  // part k is s[end[k - 1]] .. s[end[k] - 1]
    for (size_t i = 0; i < n; i++) end[i] = i + 1;
    for (;;) {
        uint32_t best = TOKENIZER_NONE;
        size_t at = 0;
        for (size_t k = 0; k + 1 < count; k++) {
            size_t begin = k ? end[k - 1] : 0;
            uint32_t id = tokenizer_find(t, s + begin, end[k + 1] - begin);
            if (id < best) best = id, at = k;
        }
        if (best == TOKENIZER_NONE) break;
        memmove(end + at, end + at + 1, (--count - at) * sizeof *end);
    }
    for (size_t k = 0, begin = 0; k < count; begin = end[k++])
        tokenizer_append(out, tokenizer_find(t, s + begin, end[k] - begin));
}

TEST(joining_equals_the_naive_definition) {
    static const char *const alphabets[] = {"a", "ab", "the ", "=-.", "aeinorst", "\xE3\x81\x82"};
    TokenizerHeap heap = {NULL, NULL, 0, 0};
    RandKey key = {11, 0, 0};
    for (uint64_t round = 0; round < 600; round++) {
        uint8_t s[256];
        const char *letters = alphabets[round % 6];
        size_t n = 1 + rand_u32(key, 1000000 + round) % sizeof s;
        for (size_t i = 0; i < n; i++)
            s[i] = (uint8_t)letters[rand_u32(key, 1000 * round + i) % strlen(letters)];
        TokenList found = {NULL, 0, 0}, expected = {NULL, 0, 0};
        tokenizer_merge(&subset, &heap, s, n, &found);
        naive_merge(&subset, s, n, &expected);
        CHECK(same_ids(&found, &expected));
        found.count = 0;
        if (tokenizer_find(&subset, s, n) == TOKENIZER_NONE) {  // in parts: the same
            tokenizer_piece(&subset, &heap, s, n, &found);
            CHECK(same_ids(&found, &expected));
        }
        free(found.ids), free(expected.ids);
    }
    free(heap.parts), free(heap.heap);
}

TEST(one_letter_300000_times_is_not_quadratic) {
    size_t n = 300000;
    uint8_t *s = (uint8_t *)die_alloc(n, 1, "a long piece");
    TokenizerHeap heap = {NULL, NULL, 0, 0};
    TokenList list = {NULL, 0, 0};
    memset(s, 'a', n);
    double start = test_seconds();
    tokenizer_piece(&subset, &heap, s, n, &list);
    CHECK(test_seconds() - start < 4);
    CHECK(decodes_to(&subset, &list, s, n));
    CHECK(list.count < n / 3);
    free(s), free(list.ids), free(heap.parts), free(heap.heap);
}

// ---------------------------------------------------------------------------------------------
// Files.

// A tokenizer file in memory: the 256 bytes, the extra tokens in their order, then BOS.
static size_t make_file(uint8_t *file, const char *const *extra, int count) {
    uint32_t bos = 256 + (uint32_t)count;
    uint32_t header[4] = {TOKENIZER_MAGIC, TOKENIZER_VERSION, bos + 1, bos};
    size_t n = TOKENIZER_HEADER;
    memset(file, 0, TOKENIZER_HEADER);
    memcpy(file, header, sizeof header);
    for (int b = 0; b < 256; b++) file[n++] = 1, file[n++] = (uint8_t)b;
    for (int i = 0; i <= count; i++) {
        const char *token = i < count ? extra[i] : "<|eot|>";
        file[n++] = (uint8_t)strlen(token);
        memcpy(file + n, token, strlen(token));
        n += strlen(token);
    }
    return n;
}

TEST(a_hand_worked_vocabulary) {
    // "abcab": bc (256) first: a bc a b; then ab (257): a bc ab; then abc (258) = a + bc: abc ab.
    const char *const extra[] = {"bc", "ab", "abc"};
    uint8_t file[4096];
    Tokenizer t;
    TokenizerHeap heap = {NULL, NULL, 0, 0};
    TokenList list = {NULL, 0, 0};
    CHECK_INT(tokenizer_parse(&t, "memory", file, make_file(file, extra, 3)), 0);
    CHECK_INT(t.bos, 259);
    tokenizer_merge(&t, &heap, (const uint8_t *)"abcab", 5, &list);
    CHECK_INT(list.count, 2);
    CHECK(list.ids[0] == 258 && list.ids[1] == 257);
    list.count = 0;
    tokenizer_piece(&t, &heap, (const uint8_t *)"<|eot|>", 7, &list);  // BOS is no text
    CHECK_INT(list.count, 7);
    tokenizer_free(&t);
    free(list.ids), free(heap.parts), free(heap.heap);
}

static void check_refused(const uint8_t *file, size_t size, const char *message) {
    Tokenizer t;
    bool refused = tokenizer_parse(&t, "vocab.bin", file, size) != 0;
    CHECK(refused);
    if (!refused)
        tokenizer_free(&t);
    else
        test_check(strstr(tokenizer_error, message), __FILE__, __LINE__,
                   "found '%s', expected '%s' in it", tokenizer_error, message);
}

// Parses a good file with one byte changed.
static void check_refused_change(size_t at, uint8_t value, const char *message) {
    const char *const extra[] = {"ab", "cd"};
    uint8_t file[4096];
    size_t n = make_file(file, extra, 2);
    file[at] = value;
    check_refused(file, n, message);
}

TEST(a_damaged_file_is_refused_with_offset_found_and_expected) {
    check_refused_change(0, 0, "vocab.bin, byte 0: found magic number 20240128, expected 20240328");
    check_refused_change(4, 1, "byte 4: found version 1, expected 2");
    check_refused_change(9, 0, "byte 8: found 3 tokens, expected 257 to 65536");
    check_refused_change(10, 1, "byte 8: found 65795 tokens, expected 257 to 65536");
    check_refused_change(13, 2, "byte 12: found separator id 514, expected less than 259");
    check_refused_change(500, 9, "byte 500: found 9, expected 0");
    check_refused_change(1024, 0, "byte 1024: found length 0, expected 1 to 255");
    check_refused_change(1536, 200, "byte 1536: found 13 bytes to the end, expected 200");
    check_refused_change(1025, 'x', "byte 1264: found token 0 again as token 120");
    check_refused_change(8, 5, "found the end, expected token 259 of 261");
}

TEST(a_missing_byte_is_named) {
    const char *const extra[] = {"ab"};
    uint8_t file[4096];
    size_t n = make_file(file, extra, 1);
    memmove(file + 1029, file + 1028, n - 1028);
    memcpy(file + 1026, "\2zz", 3);  // in place of the byte 1
    check_refused(file, n + 1, "found no token for the single byte 0x01, expected all 256");
}

TEST(every_truncation_and_an_extra_byte_are_refused) {
    char *data;
    size_t size;
    CHECK_INT(io_read_file(SUBSET, &data, &size), 0);
    for (size_t n = 0; n < size; n += n < 1100 || n + 40 > size ? 1 : 7)
        check_refused((uint8_t *)data, n, "found");
    data[size] = 1;  // io_read_file leaves room for one
    check_refused((uint8_t *)data, size + 1, "found 1 more bytes, expected the end");
    free(data);
}

TEST(any_flipped_bit_is_refused_or_harmless) {
    char *data;
    size_t size;
    CHECK_INT(io_read_file(SUBSET, &data, &size), 0);
    TokenizerHeap heap = {NULL, NULL, 0, 0};
    for (uint64_t round = 0; round < 1000; round++) {
        RandKey key = {13, 0, 0};
        size_t bit = rand_u32(key, round) % (8 * (round % 2 ? size : TOKENIZER_HEADER));
        data[bit / 8] ^= (char)(1 << bit % 8);
        Tokenizer t;
        if (!tokenizer_parse(&t, SUBSET, (uint8_t *)data, size)) {
            TokenList list = {NULL, 0, 0};
            tokenizer_piece(&t, &heap, cases[3].text, cases[3].size, &list);
            CHECK(decodes_to(&t, &list, cases[3].text, cases[3].size));
            free(list.ids);
            tokenizer_free(&t);
        }
        data[bit / 8] ^= (char)(1 << bit % 8);
    }
    free(data), free(heap.parts), free(heap.heap);
}

TEST(a_missing_file_and_a_folder_exit_3) {
    Tokenizer t;
    DIES(EXIT_DATA, "no/such/file") tokenizer_init(&t, "no/such/file");
    DIES(EXIT_DATA, "it is a folder") tokenizer_init(&t, "dev/test");
    DIES(EXIT_DATA, "found magic number") tokenizer_init(&t, CASES);
}

TEST(a_text_that_is_too_long_is_refused) {
    Tokenizer t;
    TokenList list = {NULL, 0, 0};
    tokenizer_init(&t, "bytes");
    DIES(EXIT_DATA, "at most 2^31") tokenizer_encode(&t, "", TOKENIZER_MAX_TEXT + 1, &list);
    tokenizer_free(&t);
}

int main(void) {
    load_cases();
    tokenizer_init(&subset, SUBSET);
    RUN(bytes_are_their_own_ids);
    RUN(byte_count_is_0_for_bos_and_for_ids_beyond_the_vocabulary);
#ifdef USE_PCRE2
    RUN(at_least_200_strings_equal_tiktoken_with_the_subset);
    RUN(the_same_strings_equal_tiktoken_with_the_whole_vocabulary);
    RUN(random_bytes_come_back);
    RUN(encoding_appends_and_knows_no_separator);
#else
    RUN(without_pcre2_encoding_says_what_to_install);
#endif
    RUN(every_fixture_id_decodes_to_its_text);
    RUN(utf8_is_what_the_standard_says);
    RUN(joining_equals_the_naive_definition);
    RUN(one_letter_300000_times_is_not_quadratic);
    RUN(a_hand_worked_vocabulary);
    RUN(a_damaged_file_is_refused_with_offset_found_and_expected);
    RUN(a_missing_byte_is_named);
    RUN(every_truncation_and_an_extra_byte_are_refused);
    RUN(any_flipped_bit_is_refused_or_harmless);
    RUN(a_missing_file_and_a_folder_exit_3);
    RUN(a_text_that_is_too_long_is_refused);
    tokenizer_free(&subset);
    free_cases();
    return test_end();
}
