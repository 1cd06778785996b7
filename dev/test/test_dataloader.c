// test_dataloader.c: the same rows for any ranks, micro-batches, interruptions and timing; data
// other than the checkpoint's is named and refused. Broken shards: test_bad_shards.c.
#include "dev/test/corpus.h"  // corpus_make, plain_rows
#include "llmc/dataloader.h"  // loader_init, loader_next, loader_restore, loader_val_

enum { T = 12, ROWS_MAX = 64 };

static int32_t inputs[ROWS_MAX * T], targets[ROWS_MAX * T];

// How many of B rows in inputs and targets are not expected[i * step + 0..T].
static int wrong_rows(const uint16_t *expected, int step, int B) {
    int wrong = 0;
    for (int b = 0; b < B; b++)
        for (int t = 0, bad = 0; t < T && !bad; t++) {
            bad = inputs[b * T + t] != expected[b * step + t] ||
                  targets[b * T + t] != expected[b * step + t + 1];
            wrong += bad;
        }
    return wrong;
}

// Runs `steps` steps of `batch` rows on `ranks` ranks with B rows a call, and compares every row.
static int wrong_in_steps(const RowsConfig *config, const uint16_t *rows, int batch, int ranks,
                          int B, int steps) {
    Loader *loader = calloc((size_t)ranks, sizeof *loader);
    int wrong = 0;
    for (int r = 0; r < ranks; r++) loader_init(&loader[r], config, r, ranks);
    for (int row = 0; row < steps * batch; row += ranks * B) {
        for (int r = 0; r < ranks; r++) {
            loader_next(&loader[r], inputs, targets, B);
            wrong += wrong_rows(rows + (row + r * B) * (T + 1), T + 1, B);
        }
    }
    for (int r = 1; r < ranks; r++) {
        LoaderState a = loader_state(&loader[0]), b = loader_state(&loader[r]);
        wrong += memcmp(&a, &b, sizeof a) != 0;
    }
    for (int r = 0; r < ranks; r++) loader_free(&loader[r]);
    free(loader);
    return wrong;
}

static void same_rows_for_any_ranks(bool bestfit) {
    int count[] = {3000, 900, 5111}, ends[30],
        splits[][2] = {{1, 16}, {1, 4}, {1, 1}, {2, 8}, {2, 1}, {4, 4}, {4, 2}, {8, 2}, {8, 1}};
    Corpus c = corpus_make(3, count, 30, true);
    RowsConfig config = corpus_config(&c, T, bestfit, true);
    uint16_t *rows = plain_rows(&c, &config, 30, ends);
    CHECK(ends[29] > 1000 * 16);
    for (int i = 0; i < 9; i++)
        CHECK_INT(wrong_in_steps(&config, rows, 16, splits[i][0], splits[i][1], 1000), 0);
    free(rows);
    corpus_free(&c);
}

TEST(bestfit_rows_are_the_same_for_any_ranks) { same_rows_for_any_ranks(true); }
TEST(stream_rows_are_the_same_for_any_ranks) { same_rows_for_any_ranks(false); }

TEST(batch_may_change_at_any_call) {
    int ends[60];
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, true, true);
    uint16_t *rows = plain_rows(&c, &config, 60, ends);
    Loader loader[3];
    for (int r = 0; r < 3; r++) loader_init(&loader[r], &config, r, 3);
    for (int row = 0, B; row < ends[59] - 3 * 20; row += 3 * B) {
        B = 1 + below(20);
        for (int r = 0; r < 3; r++) {
            loader_next(&loader[r], inputs, targets, B);
            CHECK_INT(wrong_rows(rows + (row + r * B) * (T + 1), T + 1, B), 0);
        }
    }
    for (int r = 0; r < 3; r++) loader_free(&loader[r]);
    free(rows);
    corpus_free(&c);
}

TEST(timing_does_not_change_rows) {
    int ends[20];
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, true, true);
    uint16_t *rows = plain_rows(&c, &config, 20, ends);
    Loader loader;
    loader_init(&loader, &config, 1, 2);
    for (int row = 0; row < 900; row += 10) {
        if (below(3) == 0) usleep((useconds_t)below(2000));
        loader_next(&loader, inputs, targets, 5);
        CHECK_INT(wrong_rows(rows + (row + 5) * (T + 1), T + 1, 5), 0);
    }
    loader_free(&loader);
    free(rows);
    corpus_free(&c);
}

TEST(rows_keep_one_length) {
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, true, true);
    DIES(EXIT_USAGE, "found rows of 13 tokens, expected 12, --seq-len, throughout") {
        Loader loader;
        loader_init(&loader, &config, 0, 1);
        loader_require_length(&loader, T);
        loader_require_length(&loader, T + 1);
    }
    corpus_free(&c);
}

// Resumes after every call of a run over three epochs, in a new loader, with other ranks.
static void resume_everywhere(bool bestfit, bool keep) {
    int ends[6];
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, bestfit, keep);
    uint16_t *rows = plain_rows(&c, &config, 6, ends);
    Loader loader, resumed;
    loader_init(&loader, &config, 0, 1);
    for (int row = 3; row < ends[2] + 9; row += 3) {
        loader_next(&loader, inputs, targets, 3);
        LoaderState state = loader_state(&loader);
        CHECK(sizeof state <= 64);
        config.seed = 1234;  // the state knows better
        int ranks = 1 + row / 3 % 4, rank = below(ranks), B = 12 / ranks;
        loader_init(&resumed, &config, rank, ranks);
        loader_restore(&resumed, state, row % 2 ? loader_describe(&loader) : NULL);
        for (int i = 0; i < 3; i++) {
            loader_next(&resumed, inputs, targets, B);
            CHECK_INT(wrong_rows(rows + (row + i * 12 + rank * B) * (T + 1), T + 1, B), 0);
        }
        loader_free(&resumed);
        config.seed = 7;
    }
    loader_free(&loader);
    free(rows);
    corpus_free(&c);
}

TEST(bestfit_resumes_after_every_call) { resume_everywhere(true, true); }
TEST(bestfit_with_dropped_tails_resumes_after_every_call) { resume_everywhere(true, false); }
TEST(stream_resumes_after_every_call) { resume_everywhere(false, true); }

TEST(restore_works_in_a_running_loader) {
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, true, true);
    Loader loader;
    int32_t first[5 * T];
    loader_init(&loader, &config, 0, 1);
    loader_next(&loader, inputs, targets, 7);
    LoaderState state = loader_state(&loader);
    loader_next(&loader, first, targets, 5);
    for (int i = 0; i < 20; i++) {
        for (int k = 0; k < i; k++) loader_next(&loader, inputs, targets, 1 + i);
        loader_restore(&loader, state, loader_describe(&loader));
        loader_next(&loader, inputs, targets, 5);
        CHECK(!memcmp(first, inputs, sizeof first));
    }
    loader_free(&loader);
    corpus_free(&c);
}

TEST(a_loader_may_end_at_any_time) {
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, true, true);
    for (int i = 0; i < 200; i++) {
        Loader loader;
        loader_init(&loader, &config, 0, 1 + i % 3);
        if (i % 4) loader_next(&loader, inputs, targets, i % 4);
        if (i % 7 == 0) loader_restore(&loader, loader_state(&loader), NULL);
        loader_free(&loader);
    }
    corpus_free(&c);
}

TEST(origin_says_where_a_row_came_from) {
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, false, true);
    Loader loader;
    loader_init(&loader, &config, 1, 2);
    for (int i = 0; i < 10; i++) {
        loader_next(&loader, inputs, targets, 4);
        for (int b = 0; b < 4; b++) {
            LoaderOrigin from = loader_origin(&loader, b);
            int s = atoi(strrchr(from.path, '/') + 2);
            CHECK_STR(from.path, corpus_path(&c, s));
            CHECK_INT(c.token[s][from.token], inputs[b * T]);
            CHECK_INT(from.row, i * 8 + 4 + b);
            CHECK_INT(from.epoch, from.row / 73);  // 24 + 7 + 42 rows an epoch
        }
    }
    loader_free(&loader);
    corpus_free(&c);
}

// ---------------------------------------------------------------------------------------------
// Data that turn out bad.

// Asks for B rows a call until that fails: the `good` rows before the bad place come, by either
// function, and the call that fails takes none.
static void try_until_bad(const RowsConfig *config, const uint16_t *rows, int good, int rank,
                          int ranks, int B, const char *message) {
    Loader l;
    int calls = good / (ranks * B);
    loader_init(&l, config, rank, ranks);
    for (int i = 0; i < calls; i++) {
        if (i % 3 == 2)
            loader_next(&l, inputs, targets, B);
        else
            CHECK(loader_try_next(&l, inputs, targets, B));
        CHECK_INT(wrong_rows(rows + (i * ranks * B + rank * B) * (T + 1), T + 1, B), 0);
    }
    LoaderState before = loader_state(&l);
    CHECK_INT(before.row, calls * ranks * B);
    for (int again = 0; again < 2; again++) {
        inputs[0] = targets[0] = -7;
        CHECK(!loader_try_next(&l, inputs, targets, B));
        CHECK(inputs[0] == -7 && targets[0] == -7);
        LoaderState after = loader_state(&l);
        CHECK(!memcmp(&before, &after, sizeof after));
    }
    // the rows before the bad place are still there, in smaller calls
    for (int row = calls * B * ranks; row + ranks <= good; row += ranks) {
        CHECK(loader_try_next(&l, inputs, targets, 1));
        CHECK_INT(wrong_rows(rows + (row + rank) * (T + 1), T + 1, 1), 0);
    }
    loader_free(&l);
    DIES(EXIT_DATA, message) {
        loader_init(&l, config, rank, ranks);
        while (loader_try_next(&l, inputs, targets, B)) {}
        fprintf(stderr, "tried in vain\n");
        loader_next(&l, inputs, targets, B);
    }
}

TEST(trying_takes_no_row_where_the_data_are_bad) {
    int ends[6], order[3], good = 0;
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, false, true);
    uint16_t *rows = plain_rows(&c, &config, 6, ends);
    char message[400];
    plain_order(order, 3, config.seed, 0);
    for (int i = 0; i < 2; i++) good += (c.count[order[i]] - 1) / T;
    int bad = order[2], last = c.count[bad] - 1;
    c.token[bad][last] = CORPUS_V;  // planning its first row finds it
    corpus_write(&c);
    snprintf(message, sizeof message,
             "tried in vain\nerror: %s: byte %d: found token 60000, expected less than 60000",
             corpus_path(&c, bad), 1024 + 2 * last);
    for (int ranks = 1; ranks <= 3; ranks++)
        for (int B = 1; B <= 20; B = 2 * B + 1)
            try_until_bad(&config, rows, good, ranks - 1, ranks, B, message);
    free(rows);
    corpus_free(&c);
}

// The files are cut after the loader has opened them: copying a row finds it.
TEST(trying_takes_no_row_where_a_shard_is_cut_short) {
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, true, true);
    DIES(EXIT_DATA, "tried in vain\nerror: ") {
        Loader l;
        loader_init(&l, &config, 0, 1);
        CHECK(loader_try_next(&l, inputs, targets, 3));
        for (int s = 0; s < 3; s++)
            if (truncate(corpus_path(&c, s), 1024)) perror("truncate");
        while (loader_try_next(&l, inputs, targets, 3)) {}
        LoaderState state = loader_state(&l);
        for (int i = 0; i < 3; i++)
            if (loader_try_next(&l, inputs, targets, 3)) exit(0);
        if (state.row != loader_state(&l).row || state.row % 3) exit(0);
        fprintf(stderr, "tried in vain\n");
        loader_next(&l, inputs, targets, 3);
    }
    corpus_free(&c);
}

// ---------------------------------------------------------------------------------------------
// Other data than the checkpoint's.

TEST(restore_names_what_is_not_the_same) {
    const char *expected[] = {"expected 's01.bin 90 ",       "found 's01.bin 91 ",
                              "found 's00.bin 511 ",         "found 's02.bin 511 ",
                              "found 's01.bin 90 ",          "found 'none', expected 's02.bin 511 ",
                              "found 's03.bin 50 ",          "packing: found 'T 11 endless bestfit",
                              "found 'T 12 endless stream'", "found 'T 12 endless bestfit drop"};
    for (int i = 0; i < 10; i++) {
        char from[300], to[300];
        Corpus c = corpus_three();
        RowsConfig config = corpus_config(&c, T, true, true);
        Loader loader, other;
        loader_init(&loader, &config, 0, 1);
        LoaderState state = loader_state(&loader);
        char *description = strdup(loader_describe(&loader));
        loader_free(&loader);
        snprintf(from, sizeof from, "%s", corpus_path(&c, i == 2 || i == 5 ? 2 : 1));
        snprintf(to, sizeof to, "%s", corpus_path(&c, i == 0 ? 9 : 0));
        if (i == 0) rename(from, to);                    // renamed
        if (i == 1) write_shard(from, c.token[2], 91);   // resized
        if (i == 2) rename(from, to);                    // replaced by another, which is gone then
        if (i == 3) unlink(from);                        // missing
        if (i == 4) c.token[1][50]++, corpus_write(&c);  // new inside
        if (i == 5) unlink(from);                        // the last is missing
        if (i == 6) write_shard(corpus_path(&c, 3), c.token[0], 50);  // one more
        if (i == 7) config.T = 11;
        if (i == 8) config.bestfit = false;
        if (i == 9) config.keep_tails = false;
        DIES(EXIT_DATA, expected[i]) {
            loader_init(&other, &config, 0, 1);
            loader_restore(&other, state, description);
        }
        DIES(EXIT_DATA, "the data is not the checkpoint's: found fingerprint ") {
            loader_init(&other, &config, 0, 1);
            loader_restore(&other, state, NULL);
        }
        free(description);
        corpus_free(&c);
    }
}

// A save from when rows were numbered in each epoch.
TEST(a_save_without_endless_rows_is_refused) {
    Corpus c = corpus_three();
    RowsConfig config = corpus_config(&c, T, true, true);
    DIES(EXIT_DATA, "packing: found 'T 12 endless bestfit keep bos 59999', expected 'T 12 bestfit "
                    "keep bos 59999'; give the same, or start without the checkpoint") {
        Loader loader;
        loader_init(&loader, &config, 0, 1);
        char *old = strdup(loader_describe(&loader)), *word = strstr(old, "endless ");
        memmove(word, word + 8, strlen(word + 8) + 1);
        loader_restore(&loader, loader_state(&loader), old);
    }
    corpus_free(&c);
}

TEST(shards_may_move_to_another_folder) {
    Corpus c = corpus_three(), d = c;
    RowsConfig config = corpus_config(&c, T, true, true);
    Loader loader;
    loader_init(&loader, &config, 0, 1);
    LoaderState state = loader_state(&loader);
    snprintf(d.dir, sizeof d.dir, "%s", test_make_dir());
    corpus_write(&d);
    char pattern[1000];
    snprintf(pattern, sizeof pattern, "%s/s02.bin,%s/s01.bin,%s/s00.bin", d.dir, c.dir, d.dir);
    config.pattern = pattern;
    Loader moved;
    loader_init(&moved, &config, 0, 1);
    loader_restore(&moved, state, loader_describe(&loader));
    loader_free(&moved), loader_free(&loader);
    test_remove_dir(d.dir);
    corpus_free(&c);
}

TEST(a_place_after_the_data_is_refused) {
    Corpus c = corpus_three();
    for (int bestfit = 0; bestfit < 2; bestfit++) {
        RowsConfig config = corpus_config(&c, T, bestfit, true);
        DIES(EXIT_DATA, "row 1000 of epoch 1: found 903 tokens an epoch ") {
            Loader loader;
            loader_init(&loader, &config, 0, 1);
            LoaderState state = loader_state(&loader);
            state.epoch = 1, state.row = 1000;
            loader_restore(&loader, state, NULL);
            loader_next(&loader, inputs, targets, 1);
        }
    }
    corpus_free(&c);
}

// ---------------------------------------------------------------------------------------------
// Validation.

// Reads all rows with these ranks and B and compares them with the shard; the number found.
static int64_t val_rows(const Corpus *c, int64_t target_limit, int ranks, int B) {
    int64_t found = 0;
    for (int r = 0; r < ranks; r++) {
        LoaderVal v;
        loader_val_init(&v, c->pattern, T, CORPUS_V, target_limit, r, ranks);
        for (int again = 0; again < 2; again++) {
            loader_val_rewind(&v);
            for (int64_t first = r * B; loader_val_more(&v); first += ranks * B) {
                int rows = loader_val_next(&v, inputs, targets, B);
                CHECK_INT(wrong_rows(c->token[0] + first * T, T, rows), 0);
                for (int i = rows * T; i < B * T; i++) CHECK(inputs[i] == 0 && targets[i] == -1);
                found += rows;
            }
        }
        loader_val_free(&v);
    }
    return found / 2;
}

TEST(validation_rows_are_the_same_for_any_ranks) {
    int count[] = {12 * 37 + 1 + 5, 100}, sizes[] = {1, 2, 3, 5, 7, 16, 40};
    Corpus c = corpus_make(2, count, 30, false);
    for (int ranks = 1; ranks <= 8; ranks++) {
        for (int i = 0; i < 7; i++) {
            CHECK_INT(val_rows(&c, 10485760, ranks, sizes[i]), 37);
            CHECK_INT(val_rows(&c, 20 * T + 11, ranks, sizes[i]), 20);
            CHECK_INT(val_rows(&c, T, ranks, sizes[i]), 1);
        }
    }
    corpus_free(&c);
}

TEST(validation_drops_a_row_without_its_last_target) {
    Corpus c = corpus_make(1, (int[]){2 * T}, 30, false);
    CHECK_INT(val_rows(&c, 1000, 1, 1), 1);
    corpus_free(&c);
}

int main(void) {
    RUN(bestfit_rows_are_the_same_for_any_ranks);
    RUN(stream_rows_are_the_same_for_any_ranks);
    RUN(batch_may_change_at_any_call);
    RUN(timing_does_not_change_rows);
    RUN(rows_keep_one_length);
    RUN(bestfit_resumes_after_every_call);
    RUN(bestfit_with_dropped_tails_resumes_after_every_call);
    RUN(stream_resumes_after_every_call);
    RUN(restore_works_in_a_running_loader);
    RUN(a_loader_may_end_at_any_time);
    RUN(origin_says_where_a_row_came_from);
    RUN(trying_takes_no_row_where_the_data_are_bad);
    RUN(trying_takes_no_row_where_a_shard_is_cut_short);
    RUN(restore_names_what_is_not_the_same);
    RUN(a_save_without_endless_rows_is_refused);
    RUN(shards_may_move_to_another_folder);
    RUN(a_place_after_the_data_is_refused);
    RUN(validation_rows_are_the_same_for_any_ranks);
    RUN(validation_drops_a_row_without_its_last_target);
    return test_end();
}
