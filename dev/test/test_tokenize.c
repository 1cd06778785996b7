// test_tokenize.c: what is in dev/data/ as a user runs it: tokenize, bigram, get_tokenizer.sh.
//
// They are taken from $BUILD, or build/, where `make test` puts them. Every test works in a fresh
// folder and looks at the exit code, at what was printed and at the shards, token by token.
#include "dev/test/test.h"
#include "llmc/rand.h"
#include "llmc/shards.h"
#include "llmc/tokenizer.h"

#define SUBSET "dev/test/fixtures/tokenizer_subset.bin"

static const char *dir;      // of the test that runs
static char printed[65536];  // by the last command, both streams

// ---------------------------------------------------------------------------------------------
// Files and commands.

static const char *in_dir(const char *name) {
    static char path[8][512];
    static int next;
    next = (next + 1) % 8;
    snprintf(path[next], sizeof path[next], "%s/%s", dir, name);
    return path[next];
}

static void put(const char *name, const void *data, size_t size) {
    char folder[512];
    snprintf(folder, sizeof folder, "%s", in_dir(name));
    *strrchr(folder, '/') = 0;
    if (io_make_dir(folder) || io_write_file(in_dir(name), data, size)) die(1, "%s", io_error);
}

static void put_text(const char *name, const char *text) { put(name, text, strlen(text)); }

// Runs a shell command and keeps what it prints. Returns its exit code.
__attribute__((format(printf, 1, 2))) static int run(const char *format, ...) {
    char command[4096], redirected[4608];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    snprintf(redirected, sizeof redirected, "{ %s ; } >%s 2>&1", command, in_dir("printed"));
    int status = system(redirected);
    char *text;
    size_t size;
    if (io_read_file(in_dir("printed"), &text, &size)) die(1, "%s", io_error);
    snprintf(printed, sizeof printed, "%s", text);
    free(text);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000;
}

static const char *program(const char *name) {
    static char path[2][512];
    static int next;
    const char *build = getenv("BUILD");
    next = !next;
    snprintf(path[next], sizeof path[next], "%s/%s", build ? build : "build", name);
    if (!io_exists(path[next])) die(1, "%s is not there; run make first", path[next]);
    return path[next];
}

// Runs tokenize with --out DIR/out and these flags.
__attribute__((format(printf, 1, 2))) static int tokenize(const char *format, ...) {
    char flags[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(flags, sizeof flags, format, args);
    va_end(args);
    return run("%s --out %s %s", program("tokenize"), in_dir("out"), flags);
}

#define CHECK_SAID(part)                                                                           \
    test_check(strstr(printed, part), __FILE__, __LINE__, "printed: %s expected in it: %s",        \
               printed, part)

// The tokens of a shard, whose header is checked.
static TokenList shard(const char *name) {
    TokenList list = {NULL, 0, 0};
    char *data;
    size_t size;
    if (io_read_file(in_dir(name), &data, &size)) {
        test_check(false, __FILE__, __LINE__, "%s", io_error);
        return list;
    }
    int32_t header[256];
    memcpy(header, data, sizeof header);
    CHECK_INT(header[0], 20240520);
    CHECK_INT(header[1], 1);
    CHECK_INT((size_t)header[2] * 2 + 1024, size);
    for (int i = 3; i < 256; i++) CHECK_INT(header[i], 0);
    list.count = list.room = (size_t)header[2];
    list.ids = (uint16_t *)die_alloc(list.count, 2, "tokens");
    memcpy(list.ids, data + 1024, 2 * list.count);
    free(data);
    return list;
}

// Checks a shard of byte tokens against text in which '|' stands for BOS.
static void check_shard(const char *name, const char *expected) {
    TokenList list = shard(name);
    char *text = (char *)die_alloc(list.count + 1, 1, "text");
    for (size_t i = 0; i < list.count; i++) text[i] = list.ids[i] == 256 ? '|' : (char)list.ids[i];
    CHECK_STR(text, expected);
    free(text), free(list.ids);
}

static void put_shard(const char *name, const uint16_t *tokens, int count) {
    struct {
        int32_t header[256];
        uint16_t tokens[64];
    } file;
    memset(&file, 0, sizeof file);
    file.header[0] = 20240520, file.header[1] = 1, file.header[2] = count;
    memcpy(file.tokens, tokens, 2 * (size_t)count);
    put(name, &file, 1024 + 2 * (size_t)count);
}

// ---------------------------------------------------------------------------------------------
// Documents.

TEST(each_file_is_a_document_after_a_bos) {
    put_text("a.txt", "first");
    put_text("b.txt", "second\n");
    CHECK_INT(tokenize("%s %s", in_dir("b.txt"), in_dir("a.txt")), 0);
    check_shard("out_train_000000.bin", "|second\n|first");
    CHECK_SAID("2 documents");
    CHECK_SAID("14 tokens");
    CHECK(!io_exists(in_dir("out_val_000000.bin")));
}

TEST(a_folder_is_read_by_name_with_its_folders) {
    put_text("in/b.txt", "b");
    put_text("in/a/z.md", "z");
    put_text("in/a/y.txt", "y");
    put_text("in/c.bin", "c");
    put_text("in/.hidden/x.txt", "x");
    CHECK_INT(tokenize("%s", in_dir("in")), 0);
    check_shard("out_train_000000.bin", "|y|z|b|c");
    CHECK_INT(tokenize("--endings 'md, txt' %s %s", in_dir("in"), in_dir("in/c.bin")), 0);
    check_shard("out_train_000000.bin", "|y|z|b|c");  // c.bin is named
    CHECK_INT(tokenize("--endings '.md *.txt' %s %s", in_dir("in"), in_dir("in/c.bin")), 0);
    check_shard("out_train_000000.bin", "|y|z|b|c");  // c.bin is named
    CHECK_INT(tokenize("--endings md %s", in_dir("in")), 0);
    check_shard("out_train_000000.bin", "|z");
}

TEST(empty_documents_are_left_out) {
    put_text("empty.txt", "");
    put_text("full.txt", "x");
    CHECK_INT(tokenize("%s %s %s", in_dir("empty.txt"), in_dir("full.txt"), in_dir("empty.txt")),
              0);
    check_shard("out_train_000000.bin", "|x");
    CHECK_SAID("2 empty left out");
    CHECK_INT(tokenize("%s", in_dir("empty.txt")), EXIT_DATA);
    CHECK_SAID("found no text in 1 file, expected");
}

TEST(a_line_separates_documents) {
    put_text("a.txt",
             "<|endoftext|>\none\ntwo <|endoftext|>\n<|endoftext|>\r\n<|endoftext|>\nthree");
    CHECK_INT(tokenize("--split-on '<|endoftext|>' %s", in_dir("a.txt")), 0);
    check_shard("out_train_000000.bin", "|one\ntwo <|endoftext|>\n|three");
}

TEST(jsonl_gives_one_field_of_each_line) {
    put_text("a.jsonl", "{\"id\": 1, \"text\": \"a\\nb\\u00e9\", \"meta\": {\"text\": [1, 2]}}\n"
                        "\n  \n{\"text\": \"\"}\n{\"text\":\"\\ud83d\\ude00|\", \"body\": \"B\"}");
    CHECK_INT(tokenize("%s", in_dir("a.jsonl")), 0);
    check_shard("out_train_000000.bin", "|a\nb\xC3\xA9|\xF0\x9F\x98\x80|");
    put_text("b.JSONL", "{\"text\": \"a\", \"body\": \"B\"}\n");
    CHECK_INT(tokenize("--field body %s", in_dir("b.JSONL")), 0);
    check_shard("out_train_000000.bin", "|B");
}

TEST(a_bad_line_of_jsonl_is_named) {
    put_text("a.jsonl", "{\"text\": \"a\"}\n\n{\"text\": \"a\n");
    CHECK_INT(tokenize("%s", in_dir("a.jsonl")), EXIT_DATA);
    CHECK_SAID("a.jsonl: line 3, byte 11: found a control character");
    put_text("a.jsonl", "{\"text\": \"a\"}\n{\"body\": \"a\"}\n");
    CHECK_INT(tokenize("%s", in_dir("a.jsonl")), EXIT_DATA);
    CHECK_SAID("line 2: found no member \"text\"");
    put_text("a.jsonl", "{\"text\": 7}\n");
    CHECK_INT(tokenize("%s", in_dir("a.jsonl")), EXIT_DATA);
    CHECK_SAID("line 1, byte 9: expected a string");
    put_text("a.jsonl", "[\"text\"]\n");
    CHECK_INT(tokenize("%s", in_dir("a.jsonl")), EXIT_DATA);
    CHECK_SAID("expected {");
}

TEST(lines_longer_than_a_block_are_whole) {
    size_t n = 3000000;
    char *text = (char *)die_alloc(n + 40, 1, "text");
    memset(text, 'x', n);
    memcpy(text, "{\"text\": \"", 10);
    memcpy(text + n, "\"}\n{\"text\": \"y\"}\n", 18);
    put_text("a.jsonl", text);
    CHECK_INT(tokenize("%s", in_dir("a.jsonl")), 0);
    TokenList list = shard("out_train_000000.bin");
    CHECK_INT(list.count, n - 10 + 3);
    CHECK(list.ids[0] == 256 && list.ids[n - 10] == 'x' && list.ids[n - 9] == 256 &&
          list.ids[n - 8] == 'y');
    free(list.ids);
    // 3 MB of lines; the newlines before two separators begin one block and end another.
    for (size_t i = 0; i < n; i += 1000) text[i] = '\n';
    memcpy(text + (1 << 20), "\n--\n", 4);
    memcpy(text + (1 << 21) - 1, "\n--\n", 4);
    put("b.txt", text, n);
    CHECK_INT(tokenize("--split-on=-- %s", in_dir("b.txt")), 0);
    list = shard("out_train_000000.bin");
    CHECK_INT(list.count, n - 2 * 3 + 3);
    CHECK_INT(list.ids[(1 << 20) + 2], 256);
    CHECK_INT(list.ids[(1 << 21) - 1], 256);
    free(list.ids), free(text);
}

// ---------------------------------------------------------------------------------------------
// Splits and shards.

// 300 documents "0;", "1;", ... as JSONL.
static void put_300(void) {
    char text[300 * 20], *p = text;
    for (int i = 0; i < 300; i++) p += sprintf(p, "{\"text\": \"%d;\"}\n", i);
    put_text("300.jsonl", text);
}

TEST(the_split_is_drawn_by_document_number) {
    char train[4096] = "", val[4096] = "", *t = train, *v = val;
    RandKey key = {42, 0, RAND_SPLIT};
    for (int i = 0; i < 300; i++) {
        if (rand_uniform(key, (uint64_t)i) < 0.25)
            v += sprintf(v, "|%d;", i);
        else
            t += sprintf(t, "|%d;", i);
    }
    put_300();
    CHECK_INT(tokenize("--seed 42 --val-fraction 0.25 %s", in_dir("300.jsonl")), 0);
    check_shard("out_train_000000.bin", train);
    check_shard("out_val_000000.bin", val);
    CHECK_INT(tokenize("--seed 43 --val-fraction 1 %s", in_dir("300.jsonl")), 0);
    CHECK_SAID("val    300 documents");
    CHECK_SAID("train  0 documents");
}

TEST(shards_end_with_the_document_that_fills_them) {
    char all[4096] = "", *p = all;
    put_300();
    CHECK_INT(tokenize("--shard-tokens 100 %s", in_dir("300.jsonl")), 0);
    int files = 0;
    for (char name[64]; snprintf(name, 64, "out_train_%06d.bin", files), io_exists(in_dir(name));
         files++) {
        TokenList list = shard(name);
        CHECK_INT(list.ids[0], 256);
        CHECK_INT(list.ids[list.count - 1], ';');
        CHECK(list.count < 105);
        for (size_t i = 0; i < list.count; i++) *p++ = list.ids[i] == 256 ? '|' : (char)list.ids[i];
        free(list.ids);
    }
    CHECK_INT(files, 14);  // 1390 tokens in documents of 3 to 5, so 100 to 104 a shard
    p = all;
    for (int i = 0; i < 300; i++) {
        char expected[16];
        int n = sprintf(expected, "|%d;", i);
        CHECK(!strncmp(p, expected, (size_t)n));
        p += n;
    }
    CHECK_INT(*p, 0);
}

TEST(an_older_shard_after_the_new_ones_is_pointed_out) {
    put_300();
    CHECK_INT(tokenize("--shard-tokens 700 %s", in_dir("300.jsonl")), 0);
    CHECK(!strstr(printed, "earlier run"));
    CHECK_INT(tokenize("%s", in_dir("300.jsonl")), 0);
    CHECK_SAID("out_train_000001.bin is left from an earlier run");
}

TEST(out_may_be_a_folder) {
    put_text("a.txt", "a");
    CHECK_INT(run("%s %s --out %s", program("tokenize"), in_dir("a.txt"), in_dir("new/deep/")), 0);
    check_shard("new/deep/train_000000.bin", "|a");
    CHECK_INT(run("%s %s --out %s", program("tokenize"), in_dir("a.txt"), in_dir("new")), 0);
    check_shard("new/train_000000.bin", "|a");
}

TEST(what_cannot_be_used_is_refused) {
    put_text("a.txt", "a");
    CHECK_INT(tokenize("%s", in_dir("missing.txt")), EXIT_DATA);
    CHECK_SAID("missing.txt");
    CHECK_INT(tokenize("--val-fraction 1.5 %s", in_dir("a.txt")), EXIT_USAGE);
    CHECK_INT(tokenize("--tokeniser bytes %s", in_dir("a.txt")), EXIT_USAGE);
    CHECK_SAID("did you mean --tokenizer");
    CHECK_INT(tokenize("--val-fraction 0"), EXIT_USAGE);
    CHECK_SAID("found no input");
    CHECK_INT(run("%s %s", program("tokenize"), in_dir("a.txt")), EXIT_USAGE);
    CHECK_SAID("--out");
    CHECK_INT(tokenize("--tokenizer %s %s", in_dir("a.txt"), in_dir("a.txt")), EXIT_DATA);
    CHECK_SAID("expected a header");
    CHECK_INT(run("%s %s --out %s", program("tokenize"), in_dir("a.txt"), in_dir("a.txt/b/c")),
              EXIT_USAGE);
    // a file too large for a document, seen before it is read
    put_text("large.txt", "a");
    CHECK_INT(truncate(in_dir("large.txt"), (off_t)1 << 34), 0);
    double start = test_seconds();
    CHECK_INT(tokenize("%s", in_dir("large.txt")), EXIT_DATA);
    CHECK_SAID("large.txt: found a document of 17179869184 bytes, expected at most 1073741824;");
    CHECK(test_seconds() - start < 1);
    // a place that cannot be written to
    CHECK_INT(io_make_dir(in_dir("out_train_000000.bin.tmp")), 0);
    CHECK_INT(tokenize("%s", in_dir("a.txt")), EXIT_USAGE);
    CHECK_SAID("--out: cannot create ");
    CHECK_SAID("; choose another --out");
    CHECK(!io_exists(in_dir("out_train_000000.bin")));
}

// ---------------------------------------------------------------------------------------------
// GPT-2's tokens, and threads.

TEST(gpt2_tokens_are_those_of_the_tokenizer) {
    static const char text[] =
        "We've never been here before; it's all we'd said, they'll say.\n\n  1984!";
    put_text("a.txt", text);
    int code = tokenize("--tokenizer %s %s", SUBSET, in_dir("a.txt"));
#ifdef USE_PCRE2
    Tokenizer t;
    TokenList expected = {NULL, 0, 0};
    CHECK_INT(code, 0);
    tokenizer_init(&t, SUBSET);
    tokenizer_append(&expected, (uint32_t)t.bos);
    tokenizer_encode(&t, text, strlen(text), &expected);
    TokenList found = shard("out_train_000000.bin");
    CHECK_INT(found.count, expected.count);
    CHECK(!memcmp(found.ids, expected.ids, 2 * expected.count));
    free(found.ids), free(expected.ids);
    tokenizer_free(&t);
#else
    CHECK_INT(code, EXIT_USAGE);
    CHECK_SAID("libpcre2-dev");
    CHECK(strstr(printed, "error: ") && !strstr(strstr(printed, "error: ") + 1, "error: "));
#endif
}

TEST(the_shards_do_not_depend_on_the_threads) {
#ifndef USE_PCRE2
    SKIP("built without PCRE2");
#endif
    put_300();
    for (int threads = 1; threads <= 3; threads += 2)
        CHECK_INT(run("OMP_NUM_THREADS=%d %s --tokenizer %s --val-fraction 0.3 --out %s%d %s "
                      "llmc dev",
                      threads, program("tokenize"), SUBSET, in_dir("out"), threads,
                      in_dir("300.jsonl")),
                  0);
    CHECK_INT(run("cmp %s %s", in_dir("out1_train_000000.bin"), in_dir("out3_train_000000.bin")),
              0);
    CHECK_INT(run("cmp %s %s", in_dir("out1_val_000000.bin"), in_dir("out3_val_000000.bin")), 0);
}

// ---------------------------------------------------------------------------------------------
// bigram.

static double printed_number(const char *after) {
    const char *at = strstr(printed, after);
    return at ? atof(at + strlen(after)) : NAN;
}

TEST(bigram_equals_a_hand_worked_case) {
    // V = 4. Pairs 01 01 10 12: c(0) = c(1) = 2, N(0.) = 1, N(1.) = 2, N(.w) = 1 1 1 0, N(..) = 3.
    // Twice n1 = 2 pairs once, n2 = 1 twice: D = 3/6. Of N(.w): 3 once, 0 twice: E = 4/5.
    // q = 0.2/3 + 0.8 * 3/3 * 1/4 = 4/15 for 0, 1, 2; q(3) = 0.2.
    double p10 = 1.5 / 2 + 0.5 * 1 / 2 * 4 / 15;  // p(1|0)
    double p31 = 0.5 * 2 / 2 * 0.2;               // p(3|1)
    double p03 = 4.0 / 15;                        // p(0|3): 3 was never seen
    put_shard("train.bin", (const uint16_t[]){0, 1, 0, 1, 2}, 5);
    put_shard("val.bin", (const uint16_t[]){0, 1, 3, 0}, 4);
    const char *b = program("bigram"), *train = in_dir("train.bin"), *val = in_dir("val.bin");
    CHECK_INT(run("%s --train %s --val %s --vocab 4 --seq-len 3", b, train, val), 0);
    CHECK_NEAR(printed_number("validation loss "), -(log(p10) + log(p31) + log(p03)) / 3, 1e-6);
    CHECK_SAID("3 different pairs");
    CHECK_SAID("(3 targets)");
    CHECK_INT(run("%s --train %s --val %s --vocab 4 --seq-len 1 --val-tokens 2", b, train, val), 0);
    CHECK_NEAR(printed_number("validation loss "), -(log(p10) + log(p31)) / 2, 1e-6);
    CHECK_INT(run("%s --train %s --val %s --vocab 4 --seq-len 2", b, train, val), 0);
    CHECK_SAID("(2 targets)");  // the partial row is dropped
    CHECK_INT(run("%s --train %s --val %s --vocab 3 --seq-len 2", b, train, val), EXIT_DATA);
    CHECK_SAID("found token 3, expected less than 3");
}

TEST(bigram_counts_inside_shards_only) {
    put_shard("t0.bin", (const uint16_t[]){0, 1}, 2);
    put_shard("t1.bin", (const uint16_t[]){0, 1}, 2);
    put_shard("val.bin", (const uint16_t[]){1, 0}, 2);
    CHECK_INT(run("%s --train '%s' --val %s --vocab 2 --seq-len 1", program("bigram"),
                  in_dir("t*.bin"), in_dir("val.bin")),
              0);
    CHECK_SAID("of 4 tokens, 1 different pairs");
}

TEST(bigram_bits_per_byte_leave_bos_out) {
    // Trained on one token: no pairs, every token has 1/257.
    put_shard("train.bin", (const uint16_t[]){256}, 1);
    put_shard("val.bin", (const uint16_t[]){256, 'a', 'b', 256, 'c'}, 5);
    CHECK_INT(run("%s --train %s --val %s --tokenizer bytes --seq-len 4", program("bigram"),
                  in_dir("train.bin"), in_dir("val.bin")),
              0);
    CHECK_NEAR(printed_number("validation loss "), log(257), 1e-6);
    CHECK_NEAR(printed_number("nats per target, "), log2(257), 1e-6);
}

TEST(bigram_on_a_large_alphabet_grows_its_table) {
    static uint16_t tokens[40000];
    static struct {
        int32_t header[256];
        uint16_t tokens[40000];
    } file;
    for (int i = 0; i < 40000; i++) tokens[i] = (uint16_t)(i * 40503u % 65536);
    file.header[0] = 20240520, file.header[1] = 1, file.header[2] = 40000;
    memcpy(file.tokens, tokens, sizeof tokens);
    put("train.bin", &file, sizeof file);
    CHECK_INT(run("%s --train %s --val %s --vocab 65536 --seq-len 1", program("bigram"),
                  in_dir("train.bin"), in_dir("train.bin")),
              0);
    CHECK_SAID("39999 different pairs");
    CHECK_SAID("(39999 targets)");
    // All pairs once: D = 40000 / 40001; every N(.w) is 1 but for the first token's: E the same.
    double d = 40000.0 / 40001, q = (1 - d) / 39999 + d / 65536;
    CHECK_NEAR(printed_number("validation loss "), -log(1 - d + d * q), 1e-5);
}

// ---------------------------------------------------------------------------------------------
// get_tokenizer.sh, on files spelled from the subset.

// Appends bytes as the public files spell them.
static char *spell(char *to, const uint8_t *s, size_t n) {
    for (size_t i = 0; i < n; i++) {
        int c = s[i], next = 256;
        for (int b = 0; b < 256; b++) {
            bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b != 0xAD);
            if (b == s[i] && !printable) c = next;
            next += !printable;
        }
        if (c < 0x80)
            *to++ = (char)c;
        else
            *to++ = (char)(0xC0 | c >> 6), *to++ = (char)(0x80 | (c & 0x3F));
    }
    *to = 0;
    return to;
}

// Writes encoder.json and vocab.bpe of the subset. Any two tokens that make a token will do as a
// merge's parts. `skip`: a merge to leave out, or -1.
static void put_public_files(int skip) {
    static char json[1 << 20], merges[1 << 20];
    Tokenizer t;
    tokenizer_init(&t, SUBSET);
    char *j = json, *m = merges + sprintf(merges, "#version: 0.2\n");
    for (int id = 0; id < t.vocab; id++) {
        size_t n, left = 1;
        char name[1024];
        const uint8_t *s = tokenizer_decode(&t, id, &n);
        spell(name, s, n);
        j += sprintf(j, "%s\"", id ? ", " : "{");
        for (const char *p = name; *p; p++)
            j += sprintf(j, *p == '"' || *p == '\\' ? "\\%c" : "%c", *p);
        j += sprintf(j, "\": %d", id);
        if (id < 256 || id == t.bos || id == skip) continue;
        while (tokenizer_find(&t, s, left) == TOKENIZER_NONE ||
               tokenizer_find(&t, s + left, n - left) == TOKENIZER_NONE)
            left++;
        m = spell(m, s, left);
        *m++ = ' ';
        m = spell(m, s + left, n - left);
        *m++ = '\n';
    }
    strcpy(j, "}");
    *m = 0;
    put_text("encoder.json", json);
    put_text("vocab.bpe", merges);
    tokenizer_free(&t);
}

static int get_tokenizer(void) {
    return run("dev/data/get_tokenizer.sh %s %s %s", in_dir("new.bin"), in_dir("vocab.bpe"),
               in_dir("encoder.json"));
}

TEST(get_tokenizer_makes_the_same_file) {
    put_public_files(-1);
    CHECK_INT(get_tokenizer(), 0);
    CHECK_SAID("tokens");
    CHECK_INT(run("cmp %s %s", in_dir("new.bin"), SUBSET), 0);
}

TEST(get_tokenizer_refuses_files_that_do_not_agree) {
    put_public_files(300);
    CHECK_INT(get_tokenizer(), EXIT_DATA);
    // The merge of token 301 stands where 300's should. Named is the user's file, not a copy of it.
    char expected[600];
    snprintf(expected, sizeof expected, "error: %s, line 46: found", in_dir("vocab.bpe"));
    CHECK_SAID(expected);
    put_public_files(-1);
    put_text("encoder.json", "{\"a\": 0, \"b\": 0}");
    CHECK_INT(get_tokenizer(), EXIT_DATA);
    CHECK_SAID("found id 0, expected a new one");
    put_text("encoder.json", "{\"a\": 0, \"b\": 2}");
    CHECK_INT(get_tokenizer(), EXIT_DATA);
    CHECK_SAID("none with id 1");
    put_text("encoder.json", "{\"a\": 0, \"b\": 1}");
    CHECK_INT(get_tokenizer(), EXIT_DATA);
    CHECK_SAID("found 2 tokens, expected more than 257");
    CHECK(!io_exists(in_dir("new.bin")));
}

TEST(get_tokenizer_takes_no_flag_for_a_file) {
    put_public_files(-1);
    CHECK_INT(run("dev/data/get_tokenizer.sh --help"), 0);
    CHECK_SAID("usage: ");
    CHECK_INT(run("dev/data/get_tokenizer.sh --out %s", in_dir("new.bin")), EXIT_USAGE);
    CHECK_SAID("error: --out: ");
    CHECK_INT(run("dev/data/get_tokenizer.sh %s %s file://%s", in_dir("no/new.bin"),
                  in_dir("vocab.bpe"), in_dir("missing")),
              EXIT_USAGE);  // before anything is downloaded
    CHECK_SAID("no/new.bin: cannot be written");
    CHECK_INT(run("dev/data/get_tokenizer.sh %s %s %s", in_dir("new.bin"), in_dir("vocab.bpe"),
                  in_dir("missing")),
              EXIT_DATA);
    CHECK_SAID("missing: cannot read it; give a file or a URL");
    CHECK(!io_exists(in_dir("new.bin")));
}

TEST(get_tokenizer_exits_8_when_a_download_fails) {
    put_public_files(-1);
    CHECK_INT(run("dev/data/get_tokenizer.sh %s file://%s %s", in_dir("new.bin"), in_dir("missing"),
                  in_dir("encoder.json")),
              EXIT_DOWNLOAD);
    CHECK_INT(run("dev/data/get_tokenizer.sh a b"), EXIT_USAGE);
    CHECK(!io_exists(in_dir("new.bin")));
}

#define RUN_IN_DIR(name) (dir = test_make_dir(), RUN(name), test_remove_dir(dir))

int main(void) {
    RUN_IN_DIR(each_file_is_a_document_after_a_bos);
    RUN_IN_DIR(a_folder_is_read_by_name_with_its_folders);
    RUN_IN_DIR(empty_documents_are_left_out);
    RUN_IN_DIR(a_line_separates_documents);
    RUN_IN_DIR(jsonl_gives_one_field_of_each_line);
    RUN_IN_DIR(a_bad_line_of_jsonl_is_named);
    RUN_IN_DIR(lines_longer_than_a_block_are_whole);
    RUN_IN_DIR(the_split_is_drawn_by_document_number);
    RUN_IN_DIR(shards_end_with_the_document_that_fills_them);
    RUN_IN_DIR(an_older_shard_after_the_new_ones_is_pointed_out);
    RUN_IN_DIR(out_may_be_a_folder);
    RUN_IN_DIR(what_cannot_be_used_is_refused);
    RUN_IN_DIR(gpt2_tokens_are_those_of_the_tokenizer);
    RUN_IN_DIR(the_shards_do_not_depend_on_the_threads);
    RUN_IN_DIR(bigram_equals_a_hand_worked_case);
    RUN_IN_DIR(bigram_counts_inside_shards_only);
    RUN_IN_DIR(bigram_bits_per_byte_leave_bos_out);
    RUN_IN_DIR(bigram_on_a_large_alphabet_grows_its_table);
    RUN_IN_DIR(get_tokenizer_makes_the_same_file);
    RUN_IN_DIR(get_tokenizer_refuses_files_that_do_not_agree);
    RUN_IN_DIR(get_tokenizer_takes_no_flag_for_a_file);
    RUN_IN_DIR(get_tokenizer_exits_8_when_a_download_fails);
    return test_end();
}
