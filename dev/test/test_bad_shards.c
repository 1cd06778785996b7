// test_bad_shards.c: what is wrong with a shard ends the program with exit code 3 and one line that
// names the file, the byte, what was found and what was expected, in less than a second.
#include "dev/test/corpus.h"  // corpus_make, write_bytes
#include "llmc/dataloader.h"  // loader_init, loader_next, loader_val_init

enum { T = 12 };

static int32_t inputs[T], targets[T];

// Opens the shards and asks for a call.
static void use(const RowsConfig *config) {
    Loader loader;
    loader_init(&loader, config, 0, 1);
    loader_next(&loader, inputs, targets, 1);
    loader_free(&loader);
}

// Replaces the middle one of three shards by these bytes, and expects the message.
static void refuse(const int32_t *bytes, size_t size, const char *message) {
    char line[600];
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, true, true);
    write_bytes(corpus_path(&c, 1), bytes, size);
    snprintf(line, sizeof line, "error: %s: %s", corpus_path(&c, 1), message);
    double start = test_seconds();
    DIES(EXIT_DATA, line) use(&config);
    CHECK(test_seconds() - start < 1);
    corpus_free(&c);
}

static void refuse_header(int32_t magic, int32_t version, int32_t count, size_t size,
                          const char *message) {
    int32_t bytes[512] = {magic, version, count};
    refuse(bytes, size, message);
}

TEST(wrong_magic) {
    refuse_header(0x46554747, 1, 90, 1204,
                  "byte 0: found magic number 1179993927, expected 20240520");
}
TEST(wrong_version) { refuse_header(20240520, 7, 90, 1204, "byte 4: found version 7, expected 1"); }
TEST(count_one_too_many) {
    refuse_header(20240520, 1, 91, 1204,
                  "byte 8: found a count of 91 tokens, which makes 1206 bytes, expected 1204");
}
TEST(count_one_too_few) {
    refuse_header(20240520, 1, 89, 1204,
                  "byte 8: found a count of 89 tokens, which makes 1202 bytes, expected 1204");
}
TEST(count_negative) {
    refuse_header(20240520, 1, -90, 1204,
                  "byte 8: found a count of -90 tokens, expected at least 1");
}
TEST(count_zero) {
    refuse_header(20240520, 1, 0, 1024, "byte 8: found a count of 0 tokens, expected at least 1");
}
TEST(count_huge) {
    refuse_header(20240520, 1, INT32_MAX, 1204,
                  "byte 8: found a count of 2147483647 tokens, which makes 4294968318 bytes");
}
TEST(truncated_tokens) {
    refuse_header(20240520, 1, 90, 1203,
                  "byte 8: found a count of 90 tokens, which makes 1204 bytes, expected 1203");
}
TEST(extra_bytes) {
    refuse_header(20240520, 1, 90, 1205,
                  "byte 8: found a count of 90 tokens, which makes 1204 bytes, expected 1205");
}
TEST(truncated_header) {
    refuse_header(20240520, 1, 90, 1023,
                  "byte 1023: found the end of the file, expected a header of 1024 bytes");
}
TEST(empty_file) {
    refuse_header(0, 0, 0, 0, "byte 0: found the end of the file (it is empty), expected a header");
}

TEST(a_folder) {
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, true, true);
    unlink(corpus_path(&c, 1));
    io_make_dir(corpus_path(&c, 1));
    DIES(EXIT_DATA, "s01.bin: it is a folder, expected a file") use(&config);
    corpus_free(&c);
}

TEST(no_such_file) {
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, true, true);
    snprintf(c.pattern, sizeof c.pattern, "%s/*.bim", c.dir);
    config.pattern = c.pattern;
    DIES(EXIT_DATA, "*.bim: found no such file, expected token shards") use(&config);
    corpus_free(&c);
}

TEST(unreadable) {
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, true, true);
    chmod(c.dir, 0755), chmod(corpus_path(&c, 1), 0);
    DIES(EXIT_DATA, "s01.bin: Permission denied") {
        if (getuid() == 0 && setuid(65534))
            die(EXIT_DATA, "s01.bin: Permission denied (not tried)");
        use(&config);
    }
    corpus_free(&c);
}

TEST(no_bos_anywhere) {
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, true, true);
    config.bos = 59998;
    DIES(EXIT_DATA,
         "s00.bin: byte 1024 to the end, and in the other shards: found no BOS (token 59998)")
    use(&config);
    for (int s = 0; s < 2; s++)
        for (int i = 0; i < c.count[s]; i++) c.token[s][i] = 1;  // the third still has some
    corpus_write(&c);
    config.bos = CORPUS_BOS;
    use(&config);
    config.bos = CORPUS_V;
    DIES(EXIT_USAGE, "--bos: found 60000, expected a token from 0 to 59999") use(&config);
    corpus_free(&c);
}

TEST(too_few_tokens_for_a_row) {
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, 1000, true, true);
    DIES(EXIT_DATA,
         "s00.bin: byte 8: found 903 tokens in all of 3 shards, expected at least 1001 for one row")
    use(&config);
    unlink(corpus_path(&c, 1)), unlink(corpus_path(&c, 2));
    DIES(EXIT_DATA, "s00.bin: byte 8: found 300 tokens in all of 1 shard, expected at least 1001")
    use(&config);
    corpus_write(&c);
    config = corpus_config(&c, 511, false, true);
    DIES(EXIT_DATA,
         "s00.bin: byte 8: found 511 tokens in the longest of 3 shards, expected at least 512")
    use(&config);
    corpus_free(&c);
}

// All rows of the shards before the bad one come, and none of the bad one's.
TEST(a_token_too_large_is_found_before_its_shard_is_used) {
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, false, true);
    int order[3], good = 0;
    plain_order(order, 3, config.seed, 0);
    for (int i = 0; i < 2; i++) good += (c.count[order[i]] - 1) / T;
    int bad = order[2], last = c.count[bad] - 1;
    c.token[bad][last] = CORPUS_V;
    corpus_write(&c);
    char message[200];
    snprintf(message, sizeof message,
             "s%02d.bin: byte %d: found token 60000, expected less than 60000", bad,
             1024 + 2 * last);
    for (int slow = 0; slow < 2; slow++) {
        Loader loader;
        DIES(EXIT_OK, "") {
            loader_init(&loader, &config, 0, 1);
            if (slow) usleep(20000);
            for (int i = 0; i < good; i++) loader_next(&loader, inputs, targets, 1);
        }
        DIES(EXIT_DATA, message) {
            loader_init(&loader, &config, 0, 1);
            if (slow) usleep(20000);
            for (int i = 0; i < good + 1; i++) loader_next(&loader, inputs, targets, 1);
        }
        config.bestfit = true;
        DIES(EXIT_DATA, message) {
            loader_init(&loader, &config, 0, 1);
            for (int i = 0; i < 1000; i++) loader_next(&loader, inputs, targets, 1);
        }
        config.bestfit = false;
    }
    corpus_free(&c);
}

TEST(a_shard_cut_short_during_the_run) {
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, true, true);
    DIES(EXIT_DATA, "s02.bin ends at byte 1500, expected ") {
        Loader loader;
        loader_init(&loader, &config, 0, 1);
        if (truncate(corpus_path(&c, 2), 1500)) perror("truncate");
        for (int i = 0; i < 1000; i++) loader_next(&loader, inputs, targets, 1);
    }
    corpus_free(&c);
}

#ifdef IO_FAULTS
TEST(a_failing_read_ends_with_its_reason) {
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, true, true);
    for (int at = 1; at < 40; at += 3) {
        DIES(EXIT_DATA, ".bin: Input/output error") {
            Loader loader;
            io_fault.kind = IO_FAULT_EIO, io_fault.at = at, io_fault.calls = 0,
            io_fault.sticky = true;
            loader_init(&loader, &config, 0, 1);
            for (int i = 0; i < 100; i++) loader_next(&loader, inputs, targets, 1);
        }
    }
    corpus_free(&c);
}
#endif

TEST(validation_refuses_bad_shards) {
    Corpus c = corpus_make(2, (int[]){500, 500}, 30, false);
    LoaderVal v;
    DIES(EXIT_USAGE, "--val-tokens: found 11, expected at least 12")
    loader_val_init(&v, c.pattern, T, CORPUS_V, 11, 0, 1);
    DIES(EXIT_DATA, "s00.bin: byte 8: found 500 tokens, expected at least 501")
    loader_val_init(&v, c.pattern, 500, CORPUS_V, 10000, 0, 1);
    c.token[0][480] = CORPUS_V;
    corpus_write(&c);
    DIES(EXIT_DATA, "s00.bin: byte 1984: found token 60000")
    loader_val_init(&v, c.pattern, T, CORPUS_V, 10000, 0, 1);
    corpus_free(&c);
    DIES(EXIT_DATA, "s00.bin: found no such file")
    loader_val_init(&v, corpus_path(&c, 0), T, CORPUS_V, 10000, 0, 1);
}

int main(void) {
    RUN(wrong_magic);
    RUN(wrong_version);
    RUN(count_one_too_many);
    RUN(count_one_too_few);
    RUN(count_negative);
    RUN(count_zero);
    RUN(count_huge);
    RUN(truncated_tokens);
    RUN(extra_bytes);
    RUN(truncated_header);
    RUN(empty_file);
    RUN(a_folder);
    RUN(no_such_file);
    RUN(unreadable);
    RUN(no_bos_anywhere);
    RUN(too_few_tokens_for_a_row);
    RUN(a_token_too_large_is_found_before_its_shard_is_used);
    RUN(a_shard_cut_short_during_the_run);
#ifdef IO_FAULTS
    RUN(a_failing_read_ends_with_its_reason);
#endif
    RUN(validation_refuses_bad_shards);
    return test_end();
}
