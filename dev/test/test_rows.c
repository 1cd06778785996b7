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
        for (; i < ends[e]; i++) {
            wrong += rows_next(&s, &row) || rows_copy(&s, &row, found);
            wrong += memcmp(found, rows + (size_t)i * (size_t)(config->T + 1),
                            2 * (size_t)(config->T + 1)) != 0;
            wrong += row.epoch != (uint64_t)e || row.number != (uint64_t)i;
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
            CHECK_INT(differences(&config, &c, 5), 0);
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

// How often each token was used, in even and in odd epochs.
typedef struct {
    int *used[CORPUS_SHARDS][2];  // (tokens of the shard)
} Uses;

static void count_uses(const Row *row, Uses *u) {
    for (const PackPiece *p = row->piece; p < row->piece + row->pieces; p++)
        for (uint32_t t = p->start; t < p->start + p->tokens; t++) u->used[p->shard][p->odd][t]++;
}

// Tokens that were not used once in each epoch before epoch - 1, and once or never in `epoch` and
// the one before it; of dropped tails, those used too often, and a document's first ones.
static int wrong_uses(const Corpus *c, const Uses *u, int epoch, bool keep) {
    int wrong = 0;
    for (int s = 0; s < c->shards; s++) {
        for (int odd = 0; odd < 2; odd++) {
            int done = epoch % 2 == odd ? epoch / 2 : (epoch - 1) / 2;  // epochs of this kind
            int more = epoch || !odd;
            for (int t = 0; t < c->count[s]; t++) {
                int n = u->used[s][odd][t];
                bool first = t == 0 || c->token[s][t] == CORPUS_BOS;
                wrong += n > done + more || (n < done && (keep || first));
            }
        }
    }
    return wrong;
}

// Few documents, many of them longer than a row, and shards full of short ones.
TEST(every_document_is_used_once_in_an_epoch) {
    for (int i = 0; i < 40; i++) {
        Corpus c = random_corpus(i / 2);
        RowsConfig config = corpus_config(&c, 2 + below(100), true, i % 2);
        Rows s;
        Row row = {0};
        Uses u;
        uint64_t epoch = 0;
        for (int k = 0; k < c.shards; k++)
            for (int odd = 0; odd < 2; odd++)
                u.used[k][odd] = calloc((size_t)c.count[k], sizeof(int));
        open_rows(&s, &config);
        for (int rows = 0; !rows_next(&s, &row) && row.epoch < 8; rows++) {
            CHECK(row.epoch >= epoch && (int)row.number == rows);
            count_uses(&row, &u);
            if (row.epoch > epoch || rows % 64 == 0)
                CHECK_INT(wrong_uses(&c, &u, (int)row.epoch, config.keep_tails), 0);
            epoch = row.epoch;
        }
        CHECK(epoch >= 5);  // a row may be of documents of several epochs
        for (int k = 0; k < c.shards; k++) free(u.used[k][0]), free(u.used[k][1]);
        free(row.piece);
        rows_free(&s);
        corpus_free(&c);
    }
}

// 20,000 documents, a fifth of their tokens in some much longer than a row: after the end of epoch
// 0 the rows hold as many documents as before it. (Later ends: rows.h.)
TEST(the_buffer_stays_full_across_an_epochs_end) {
    enum { TOKENS = 400000, T = 40 };
    int count[] = {TOKENS};
    Corpus c = corpus_make(1, count, 30, false);
    for (int i = 0; i < TOKENS - 400; i += 1 + below(3000))  // 200 to 400 without a BOS
        for (int t = i + 1, end = i + 200 + below(200); t < end; t++) c.token[0][t] = 7;
    corpus_write(&c);
    RowsConfig config = corpus_config(&c, T, true, true);
    Rows s;
    Row row = {0};
    int rows[2] = {0}, pieces[2] = {0}, low = 0;
    open_rows(&s, &config);
    while (!rows_next(&s, &row) && row.number < TOKENS / T * 5 / 4) {
        bool late = row.number > TOKENS / T * 3 / 4;
        low += s.packer.count < PACK_BUFFER - 1;
        if (row.number > TOKENS / T / 2) rows[late]++, pieces[late] += row.pieces;
    }
    CHECK_INT(row.epoch, 1);
    CHECK_INT(low, 0);
    double before = (double)pieces[0] / rows[0], after = (double)pieces[1] / rows[1];
    CHECK(after > 0.9 * before && after < 1.1 * before);
    free(row.piece);
    rows_free(&s);
    corpus_free(&c);
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
        CHECK_INT(rows_open(&s, &config) || rows_seek(&s, 0, i % 2 ? 12 : 0, &go_on), 0);
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

// The epoch of the last of so many rows.
static uint64_t epoch_of(const int *ends, int rows) {
    int e = 0;
    while (rows > ends[e]) e++;
    return (uint64_t)e;
}

// From the start to past the end of epoch 3.
static void seek_everywhere(bool bestfit, bool keep) {
    int count[] = {300, 90, 511}, ends[6], T = 16, wrong = 0;
    Corpus c = corpus_make(3, count, 60, true);
    RowsConfig config = corpus_config(&c, T, bestfit, keep);
    uint16_t *rows = plain_rows(&c, &config, 6, ends), found[17];
    Rows s;
    Row row = {0};
    open_rows(&s, &config);
    for (int i = 0; i <= ends[3] + 1; i++) {
        wrong += rows_seek(&s, epoch_of(ends, i), (uint64_t)i, &go_on) != 0;
        for (int k = i; k < i + 12; k++) {
            wrong += rows_next(&s, &row) || rows_copy(&s, &row, found);
            wrong += memcmp(found, rows + k * (T + 1), sizeof found) != 0;
            wrong += row.number != (uint64_t)k || row.epoch != epoch_of(ends, k + 1);
        }
    }
    CHECK_INT(wrong, 0);
    free(row.piece), free(rows);
    rows_free(&s);
    corpus_free(&c);
}

TEST(bestfit_goes_to_every_row) { seek_everywhere(true, true); }
TEST(bestfit_with_dropped_tails_goes_to_every_row) { seek_everywhere(true, false); }
TEST(stream_goes_to_every_row) { seek_everywhere(false, true); }

// Every row but those of the epoch, and numbers that would take years to get to.
TEST(a_damaged_place_is_refused) {
    uint64_t bad[][2] = {{0, 1ull << 40},          {0, UINT64_MAX},          {1, 1ull << 63},
                         {1ull << 32, 5},          {UINT64_MAX, 5},          {UINT64_MAX, 0},
                         {UINT64_MAX, UINT64_MAX}, {UINT32_MAX, UINT64_MAX}, {1, 0}};
    Corpus c = corpus_make(3, (int[]){300, 90, 511}, 60, true);
    for (int bestfit = 0; bestfit < 2; bestfit++) {
        RowsConfig config = corpus_config(&c, 16, bestfit, true);
        int ends[6];
        Rows s;
        free(plain_rows(&c, &config, 6, ends));
        open_rows(&s, &config);
        for (int i = 0; i < 9; i++) {
            CHECK_INT(rows_seek(&s, bad[i][0], bad[i][1], &go_on), -1);
            CHECK(strstr(io_error, "the checkpoint's place in the data is damaged"));
        }
        for (uint64_t e = 0; e < 5; e++)
            for (int row = 0; row <= ends[4]; row++)
                CHECK_INT(rows_seek(&s, e, (uint64_t)row, &go_on),
                          e == epoch_of(ends, row) ? 0 : -1);
        CHECK_INT(rows_seek(&s, 0, 0, &go_on), 0);
        rows_free(&s);
    }
    corpus_free(&c);
}

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
    const char *starts[] = {"T 16 endless bestfit keep bos 59999; s00.bin 300 ",
                            "T 16 endless bestfit drop bos 59999; s00.bin 300 ",
                            "T 16 endless stream; s00.bin 300 ",
                            "T 16 endless stream; s00.bin 300 ",
                            "T 15 endless bestfit keep bos 59999; ",
                            "T 16 endless bestfit keep bos 59998; "};
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
    RUN(every_document_is_used_once_in_an_epoch);
    RUN(the_buffer_stays_full_across_an_epochs_end);
    RUN(bestfit_rows_start_with_a_bos);
    RUN(order_of_shards_changes_with_epoch_and_seed);
    RUN(bestfit_goes_to_every_row);
    RUN(bestfit_with_dropped_tails_goes_to_every_row);
    RUN(stream_goes_to_every_row);
    RUN(a_damaged_place_is_refused);
    RUN(stream_goes_ahead_without_scanning);
    RUN(description_names_packing_and_shards);
    RUN(the_smallest_epoch_is_one_row);
    return test_end();
}
