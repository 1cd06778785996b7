// test_rows.c: the sequence of rows equals a plain, slow making of it; any place in it is found.
#include "dev/test/corpus.h"  // corpus_make, plain_rows
#include "llmc/rows.h"        // rows_open, rows_seek, rows_next, rows_copy

static const bool go_on;  // what rows_seek watches

static void open_rows(Rows *s, const RowsConfig *config) {
    if (rows_open(s, config) || rows_seek(s, 0, 0, &go_on))
        printf("  %s\n", io_error), test_ok = false;
}

// How many rows of `epochs` epochs differ from the plain ones, in tokens, epoch or number.
static int differences(const RowsConfig *config, const Corpus *c, int epochs) {
    int ends[8], wrong = 0;
    uint16_t *rows = plain_rows(c, config, epochs, ends), *found = calloc((size_t)config->T + 1, 2);
    Rows s;
    Row row = {0};
    open_rows(&s, config);
    for (int e = 0, i = 0; e < epochs; e++) {
        for (int first = i; i < ends[e]; i++) {
            wrong += rows_next(&s, &row) || rows_copy(&s, &row, found);
            wrong += memcmp(found, rows + (size_t)i * (size_t)(config->T + 1),
                            2 * (size_t)(config->T + 1)) != 0;
            wrong += row.epoch != (uint64_t)e || row.number != (uint64_t)(i - first);
        }
    }
    rows_free(&s);
    free(row.piece), free(rows), free(found);
    return wrong;
}

// Random shapes: some with one-token documents, some with documents of many rows and many shards.
static Corpus random_corpus(int i) {
    int count[CORPUS_SHARDS], shards = 1 + below(i % 8 == 0 ? 20 : 4);
    int longest = i % 5 == 0 ? 1 : 1 + below(i % 3 == 0 ? 900 : 40);
    for (int s = 0; s < shards; s++) count[s] = 1 + below(i % 12 == 0 ? 3000 : 400);
    count[0] += 200;
    return corpus_make(shards, count, longest, i % 2);
}

TEST(bestfit_equals_a_plain_packer) {
    for (int i = 0; i < 60; i++) {
        Corpus c = random_corpus(i);
        for (int keep = 0; keep < 2; keep++) {
            RowsConfig config = corpus_config(&c, i % 7 == 0 ? 1 : 2 + below(150), true, keep);
            config.seed = (uint64_t)i;
            CHECK_INT(differences(&config, &c, 2), 0);
        }
        corpus_free(&c);
    }
}

TEST(stream_equals_the_formula) {
    for (int i = 0; i < 20; i++) {
        Corpus c = random_corpus(i);
        RowsConfig config = corpus_config(&c, 1 + below(150), false, true);
        CHECK_INT(differences(&config, &c, 3), 0);
        corpus_free(&c);
    }
}

// Runs one epoch and counts how often each token of each shard was used.
static void count_uses(Rows *s, int *used[], long long *rows, long long *put) {
    Row row = {0};
    for (*rows = *put = 0; !rows_next(s, &row) && row.epoch == 0; ++*rows) {
        for (PackPiece *p = row.piece; p < row.piece + row.pieces; p++) {
            *put += p->bos;
            for (uint32_t t = p->start; t < p->start + p->tokens; t++) used[p->shard][t]++;
        }
    }
    free(row.piece);
}

TEST(every_token_is_used_once_in_an_epoch) {
    for (int i = 0; i < 20; i++) {
        Corpus c = random_corpus(i);
        RowsConfig config = corpus_config(&c, 2 + below(100), true, true);
        Rows s;
        int *used[CORPUS_SHARDS];
        long long rows, put, once = 0, other = 0, all = 0;
        for (int k = 0; k < c.shards; k++)
            used[k] = calloc((size_t)c.count[k], sizeof(int)), all += c.count[k];
        open_rows(&s, &config);
        count_uses(&s, used, &rows, &put);
        for (int k = 0; k < c.shards; k++)
            for (int t = 0; t < c.count[k]; t++) once += used[k][t] == 1, other += used[k][t] > 1;
        CHECK_INT(other, 0);
        CHECK_INT(once + put, rows * (config.T + 1));
        CHECK(all - once <= config.T);  // the last partial row
        for (int k = 0; k < c.shards; k++) free(used[k]);
        rows_free(&s);
        corpus_free(&c);
    }
}

TEST(bestfit_rows_start_with_a_bos) {
    Corpus c = random_corpus(3);
    RowsConfig config = corpus_config(&c, 31, true, true);
    Rows s;
    Row row = {0};
    uint16_t tokens[32];
    int wrong = 0;
    open_rows(&s, &config);
    for (int i = 0; i < 500; i++) {
        wrong += rows_next(&s, &row) || rows_copy(&s, &row, tokens);
        wrong += tokens[0] != CORPUS_BOS;
    }
    CHECK_INT(wrong, 0);
    free(row.piece);
    rows_free(&s);
    corpus_free(&c);
}

TEST(order_of_shards_changes_with_epoch_and_seed) {
    int count[12], order[4][12];
    for (int s = 0; s < 12; s++) count[s] = 40;
    Corpus c = corpus_make(12, count, 9, false);
    RowsConfig config = corpus_config(&c, 39, false, true);  // one row a shard
    for (int i = 0; i < 4; i++) {
        config.seed = (uint64_t)(i / 2);
        Rows s;
        Row row = {0};
        int seen = 0;
        CHECK_INT(rows_open(&s, &config) || rows_seek(&s, (uint64_t)(i % 2), 0, &go_on), 0);
        for (int k = 0; k < 12; k++) {
            rows_next(&s, &row);
            order[i][k] = (int)row.piece[0].shard;
            seen |= 1 << order[i][k];
        }
        CHECK_INT(seen, 4095);
        for (int j = 0; j < i; j++) CHECK(memcmp(order[i], order[j], sizeof order[i]));
        free(row.piece);
        rows_free(&s);
    }
    corpus_free(&c);
}

// From row 0 of epoch 1 to one behind the last, and then on into epoch 2.
static void seek_everywhere(bool bestfit) {
    int count[] = {300, 90, 511}, ends[3], T = 16, wrong = 0;
    Corpus c = corpus_make(3, count, 60, true);
    RowsConfig config = corpus_config(&c, T, bestfit, true);
    uint16_t *rows = plain_rows(&c, &config, 3, ends), found[17];
    Rows s;
    Row row = {0};
    open_rows(&s, &config);
    for (int i = ends[0]; i <= ends[1]; i++) {
        wrong += rows_seek(&s, 1, (uint64_t)(i - ends[0]), &go_on) != 0;
        for (int k = i; k < i + 12; k++) {
            wrong += rows_next(&s, &row) || rows_copy(&s, &row, found);
            wrong += memcmp(found, rows + k * (T + 1), sizeof found) != 0;
        }
    }
    CHECK_INT(wrong, 0);
    CHECK(rows_seek(&s, 1, (uint64_t)(ends[1] - ends[0]) + 1, &go_on) == -1);
    CHECK(strstr(io_error, " of epoch 1: found "));
    free(row.piece), free(rows);
    rows_free(&s);
    corpus_free(&c);
}

TEST(bestfit_goes_to_every_row) { seek_everywhere(true); }
TEST(stream_goes_to_every_row) { seek_everywhere(false); }

TEST(stream_goes_ahead_without_scanning) {
    int count[] = {400, 400, 400, 400};
    Corpus c = corpus_make(4, count, 60, true);
    RowsConfig config = corpus_config(&c, 10, false, true);
    Rows s;
    open_rows(&s, &config);
    c.token[s.order[0]][5] = 65535;  // would stop a scan
    corpus_write(&c);
    CHECK_INT(rows_seek(&s, 0, 3 * 39 + 1, &go_on), 0);
    CHECK_INT(rows_seek(&s, 0, 38, &go_on), -1);
    rows_free(&s);
    corpus_free(&c);
}

TEST(description_names_packing_and_shards) {
    int count[] = {300, 90};
    Corpus c = corpus_make(2, count, 60, true);
    uint64_t seen[6];
    const char *starts[] = {"T 16 bestfit keep bos 59999; s00.bin 300 ",
                            "T 16 bestfit drop bos 59999; s00.bin 300 ",
                            "T 16 stream; s00.bin 300 ",
                            "T 16 stream; s00.bin 300 ",
                            "T 15 bestfit keep bos 59999; ",
                            "T 16 bestfit keep bos 59998; "};
    for (int i = 0; i < 6; i++) {
        RowsConfig config = corpus_config(&c, i == 4 ? 15 : 16, i != 2 && i != 3, i != 1 && i != 3);
        if (i == 5) config.bos = c.token[0][1] = CORPUS_BOS - 1, corpus_write(&c);
        Rows s;
        open_rows(&s, &config);
        CHECK(!strncmp(s.description, starts[i], strlen(starts[i])));
        CHECK(strstr(s.description, "; s01.bin 90 "));
        seen[i] = s.fingerprint;
        for (int j = 0; j < i; j++) CHECK((seen[i] == seen[j]) == (i == 3 && j == 2));
        rows_free(&s);
    }
    corpus_free(&c);
}

TEST(the_smallest_epoch_is_one_row) {
    for (int headless = 0; headless < 2; headless++) {
        Corpus c = corpus_make(1, (int[]){10}, 4, false);
        if (headless) c.token[0][0] = 5, c.token[0][9] = CORPUS_BOS, corpus_write(&c);
        RowsConfig config = corpus_config(&c, 9 + headless, true, true);
        Rows s;
        CHECK_INT(differences(&config, &c, 3), 0);
        config.T++;
        CHECK_INT(rows_open(&s, &config), -1);
        CHECK(strstr(io_error, "expected at least"));
        config = corpus_config(&c, 9, false, true);
        CHECK_INT(differences(&config, &c, 3), 0);
        config.T++;
        CHECK_INT(rows_open(&s, &config), -1);
        corpus_free(&c);
    }
}

int main(void) {
    RUN(bestfit_equals_a_plain_packer);
    RUN(stream_equals_the_formula);
    RUN(every_token_is_used_once_in_an_epoch);
    RUN(bestfit_rows_start_with_a_bos);
    RUN(order_of_shards_changes_with_epoch_and_seed);
    RUN(bestfit_goes_to_every_row);
    RUN(stream_goes_to_every_row);
    RUN(stream_goes_ahead_without_scanning);
    RUN(description_names_packing_and_shards);
    RUN(the_smallest_epoch_is_one_row);
    return test_end();
}
