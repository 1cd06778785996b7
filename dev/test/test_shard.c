// test_shard.c: llmc/shard.h, the plan of who owns what, at the sizes that are trained; and a save's
// parts of any number of ranks, loaded by any other (llmc/restore.h).
#include "dev/test/test.h"
#include "llmc/restore.h"
#include "llmc/shard.h"

static Config config_of(int depth, int vocab) {
    Config c;
    memset(&c, 0, sizeof c);
    c.L = depth, c.C = round_up(64 * depth, 128), c.F = 4 * c.C, c.H = c.C / 128, c.D = 128;
    c.V = vocab, c.Vp = round_up(vocab, 128), c.T = 2048;
    return c;
}

static const int depths[] = {1, 2, 3, 12, 24, 26};
static const int worlds[] = {1, 2, 3, 4, 7, 8, 16, 64};
enum { DEPTHS = 6, WORLDS = 8 };

// Every element of every tensor belongs to one piece; what is small is everybody's, a matrix of
// Muon's one rank's.
TEST(every_element_is_owned_once) {
    for (int d = 0; d < DEPTHS; d++)
        for (int w = 0; w < WORLDS; w++) {
            Config c = config_of(depths[d], 32768);
            Table t;
            ShardPlan s;
            table_init(&t, &c);
            shard_init(&s, &t, 0, worlds[w]);
            int at = 0;
            for (int i = 0; i < t.count; i++) {
                const Tensor *x = &t.tensor[i];
                int row = 0, first = at;
                for (; at < s.count && s.piece[at].tensor == x; at++) {
                    const Piece *p = &s.piece[at];
                    CHECK_INT(p->row, row);
                    CHECK(p->rows > 0 && p->offset == x->offset + (size_t)row * (size_t)x->cols);
                    CHECK(p->count == (size_t)p->rows * (size_t)x->cols);
                    CHECK(p->owner >= SHARD_ALL && p->owner < worlds[w]);
                    row += p->rows;
                }
                CHECK_INT(row, x->rows);
                bool small = x->ndim == 1 || x->role == VE_GATE;
                if (small) CHECK_INT(s.piece[first].owner, SHARD_ALL);
                if (small || x->group == GROUP_MATRIX) CHECK_INT(at, first + 1);
            }
            CHECK_INT(at, s.count);
            CHECK_INT(s.first[t.blocks], s.count);
            for (int b = 0; b < t.blocks; b++)
                for (int i = s.first[b]; i < s.first[b + 1]; i++)
                    CHECK_INT(s.piece[i].tensor->block, b);
            shard_free(&s), table_free(&t);
        }
}

// All ranks make the same plan, and each lays its own arenas out without overlaps, as large as the
// others think they are.
TEST(ranks_agree) {
    for (int w = 0; w < WORLDS; w++) {
        Config c = config_of(12, 50257);
        Table t;
        ShardPlan zero, s;
        table_init(&t, &c);
        shard_init(&zero, &t, 0, worlds[w]);
        for (int r = 0; r < worlds[w]; r++) {
            shard_init(&s, &t, r, worlds[w]);
            size_t end = 0, state_end = 0;
            for (int i = 0; i < s.count; i++) {
                const Piece *p = &s.piece[i], *q = &zero.piece[i];
                CHECK(p->tensor == q->tensor && p->row == q->row && p->owner == q->owner);
                if (!shard_owns(p, r)) continue;
                CHECK(p->at >= end && p->at % TABLE_ALIGN == 0 && p->state >= state_end);
                end = p->at + p->count, state_end = p->state + p->state_count;
            }
            CHECK(end <= s.share[r].numel && state_end <= s.share[r].state_numel);
            CHECK(s.share[r].numel == zero.share[r].numel);
            CHECK(s.share[r].state_numel == zero.share[r].state_numel);
            shard_free(&s);
        }
        shard_free(&zero), table_free(&t);
    }
}

TEST(one_rank_has_the_table) {
    for (int d = 0; d < DEPTHS; d++) {
        Config c = config_of(depths[d], 50257);
        Table t;
        ShardPlan s;
        table_init(&t, &c);
        shard_init(&s, &t, 0, 1);
        CHECK_INT(s.count, t.count);
        for (int i = 0; i < t.count; i++) {
            CHECK(s.piece[i].at == t.tensor[i].offset && s.piece[i].state == t.tensor[i].state);
            CHECK(s.piece[i].state_count == t.tensor[i].state_count);
        }
        CHECK(s.share[0].numel == t.numel && s.share[0].state_numel == t.state_numel);
        shard_free(&s), table_free(&t);
    }
}

// At the depths that are trained on 8 GPUs nobody has much more to do, or to keep, than the mean.
TEST(work_is_balanced) {
    static const struct {
        int depth, world;
        double work, memory;  // at most so much above the mean
    } cases[] = {{12, 8, 0.001, 0.10}, {24, 8, 0.001, 0.10}, {26, 8, 0.02, 0.10},
                 {12, 2, 0.001, 0.02}, {24, 2, 0.001, 0.02}, {26, 4, 0.02, 0.05}};
    for (int i = 0; i < 6; i++) {
        Config c = config_of(cases[i].depth, 32768);
        Table t;
        ShardPlan s;
        double flops = 0, most = 0, bytes = 0, most_bytes = 0;
        int world = cases[i].world;
        table_init(&t, &c);
        shard_init(&s, &t, 0, world);
        for (int r = 0; r < world; r++) {
            double has = (double)(s.share[r].numel + s.share[r].state_numel);
            flops += s.share[r].flops, most = fmax(most, s.share[r].flops);
            bytes += has, most_bytes = fmax(most_bytes, has);
        }
        test_check(most * world <= (1 + cases[i].work) * flops, __FILE__, __LINE__,
                   "depth %d, %d ranks: found %.1f%% above the mean", cases[i].depth, world,
                   100 * (most * world / flops - 1));
        test_check(most_bytes * world <= (1 + cases[i].memory) * bytes, __FILE__, __LINE__,
                   "depth %d, %d ranks: found %.1f%% of memory above the mean", cases[i].depth,
                   world, 100 * (most_bytes * world / bytes - 1));
        shard_free(&s), table_free(&t);
    }
}

// The same numbers of a bad gradient, whoever finds it.
TEST(the_first_bad_gradient_is_found_by_its_owner) {
    Config c = config_of(3, 257);
    Table t;
    table_init(&t, &c);
    for (int world = 1; world <= 4; world++) {
        const Tensor *first = NULL;
        int best = INT_MIN;
        for (int r = 0; r < world; r++) {
            ShardPlan s;
            int place;
            shard_init(&s, &t, r, world);
            float *sums = (float *)die_alloc(s.share[r].numel, sizeof *sums, "gradients");
            for (int i = shard_next(&s, 0); i < s.count; i = shard_next(&s, i + 1)) {
                const Piece *p = &s.piece[i];
                if (p->tensor->role == WTE || (p->tensor->role == WV && p->tensor->layer == 1))
                    sums[p->at + p->count - 1] = NAN;
            }
            const Tensor *found = shard_find_nonfinite(&s, sums, &place);
            if (found && place > best) first = found, best = place;
            free(sums);
            shard_free(&s);
        }
        CHECK(first && !strcmp(first->name, "layers.1.wv"));
    }
    table_free(&t);
}

// ---------------------------------------------------------------------------------------------
// Saves.

enum { ROWS = 29, COLS = 3 };
static char folder[] = "/tmp/test_shard_XXXXXX";

static float value(int row, int column) { return (float)(100 * row + column); }

// Rows from .. to - 1 of the table's two states, as a rank would save or want them.
static void parts_of(StTensor out[2], float *first, float *second, int from, int to) {
    uint64_t shape[2] = {(uint64_t)(to - from), COLS}, count = shape[0] * COLS;
    char name[40];
    bool whole = to - from == ROWS;
    snprintf(name, sizeof name, whole ? "wte.first" : "wte.first@%d", from);
    out[0] = st_tensor(name, ST_F32, 2, shape, first);
    snprintf(name, sizeof name, whole ? "wte.second" : "wte.second@%d", from * COLS);
    out[1] = st_tensor(name, ST_F32, 1, &count, second);
}

static float param[ROWS * COLS];
static StTensor model_tensor(void) {
    uint64_t shape[2] = {ROWS, COLS};
    return st_tensor("wte", ST_F32, 2, shape, param);
}

// Saves as `world` ranks do; skip: a rank that has no part.
static void save_as(int world, int skip) {
    char temporary[IO_PATH_MAX];
    CkptMeta meta;
    memset(&meta, 0, sizeof meta);
    meta.step = 7;
    CHECK_INT(ckpt_begin(folder, 7, temporary), 0);
    for (int r = 0; r < world; r++) {
        float first[ROWS * COLS], second[ROWS * COLS];
        int from = ROWS * r / world, to = ROWS * (r + 1) / world;
        for (int i = from; i < to; i++)
            for (int k = 0; k < COLS; k++) {
                first[(i - from) * COLS + k] = value(i, k);
                second[(i - from) * COLS + k] = -value(i, k);
            }
        StTensor parts[2];
        parts_of(parts, first, second, from, to);
        CHECK_INT(ckpt_write_rank(temporary, r, parts, r == skip ? 0 : 2), 0);
    }
    StTensor model = model_tensor();
    CHECK_INT(ckpt_finish(&meta, temporary, &model, 1), 0);
}

static void load_as(int world) {
    char path[IO_PATH_MAX];
    snprintf(path, sizeof path, "%s/ckpt/step_00000007", folder);
    for (int r = 0; r < world; r++) {
        float first[ROWS * COLS], second[ROWS * COLS];
        int from = ROWS * r / world, to = ROWS * (r + 1) / world;
        StTensor parts[2], model = model_tensor();
        CkptMeta meta;
        parts_of(parts, first, second, from, to);
        restore_save(path, &meta, &model, 1, parts, 2);
        CHECK_INT(meta.step, 7);
        ckpt_meta_free(&meta);
        int wrong = 0;
        for (int i = from; i < to; i++)
            for (int k = 0; k < COLS; k++)
                wrong += first[(i - from) * COLS + k] != value(i, k) ||
                         second[(i - from) * COLS + k] != -value(i, k);
        test_check(wrong == 0, __FILE__, __LINE__, "rank %d of %d: %d numbers are wrong", r, world,
                   wrong);
    }
}

TEST(a_save_of_any_ranks_is_loaded_by_any) {
    for (int saved = 1; saved <= 8; saved++) {
        save_as(saved, -1);
        for (int loaded = 1; loaded <= 8; loaded++) load_as(loaded);
    }
}

TEST(a_part_that_is_missing_is_named) {
    save_as(4, 2);
    DIES(EXIT_CHECKPOINT, "optim_rank*.safetensors: tensor wte.first is missing") load_as(1);
    DIES(EXIT_CHECKPOINT, "optim_rank*.safetensors: tensor wte.first@14 is missing") load_as(2);
}

int main(void) {
    RUN(every_element_is_owned_once);
    RUN(ranks_agree);
    RUN(one_rank_has_the_table);
    RUN(work_is_balanced);
    RUN(the_first_bad_gradient_is_found_by_its_owner);
    if (!mkdtemp(folder)) return 1;
    RUN(a_save_of_any_ranks_is_loaded_by_any);
    RUN(a_part_that_is_missing_is_named);
    io_remove(folder);
    return test_end();
}
