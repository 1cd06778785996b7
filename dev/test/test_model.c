// test_model.c: llmc/model.h: sizes from the flags, the table of parameters, both initialisations.
#include "dev/test/test.h"
#include "llmc/model.h"

// The flags at their defaults, with this depth.
static Flags flags_of_depth(int depth) {
    Flags f;
    Arg table[FLAGS_COUNT];
    char *argv[] = {"test"};
    flags_parse(&f, table, 1, argv);
    f.depth = depth;
    return f;
}

static Config config_of_depth(int depth) {
    Flags f = flags_of_depth(depth);
    return config_from_flags(&f, -1, -1);
}

// A model of L layers that is small in every other way. 300 is no multiple of 128.
static Config small(int L) {
    Flags f = flags_of_depth(L);
    f.channels = 64, f.heads = 2, f.vocab = 300, f.seq_len = 64;
    return config_from_flags(&f, -1, -1);
}

// ---------------------------------------------------------------------------------------------
// Shape.

TEST(depth_sets_every_size) {
    const int expected[][3] = {{1, 128, 1},  {2, 128, 1},  {3, 256, 2},  {4, 256, 2},
                               {11, 768, 6}, {12, 768, 6}, {13, 896, 7}, {32, 2048, 16}};
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        Config c = config_of_depth(expected[i][0]);
        CHECK_INT(c.L, expected[i][0]);
        CHECK_INT(c.C, expected[i][1]);
        CHECK_INT(c.H, expected[i][2]);
        CHECK_INT(c.D, 128);
        CHECK_INT(c.F, 4 * c.C);
        CHECK_INT(c.T, 2048);
        CHECK_INT(c.V, 50257);
        CHECK_INT(c.Vp, 50304);
        CHECK(!c.doc_mask);
    }
}

TEST(flags_override_sizes) {
    Flags f = flags_of_depth(5);
    f.channels = 96, f.vocab = 256, f.seq_len = 100, f.doc_mask = true;
    Config c = config_from_flags(&f, 200, -1);
    CHECK_INT(c.C, 96);
    CHECK_INT(c.H, 1);  // at least one
    CHECK_INT(c.D, 96);
    CHECK_INT(c.V, 256);
    CHECK_INT(c.Vp, 256);
    CHECK_INT(c.T, 100);
    CHECK(c.doc_mask);
    f.heads = 4;
    CHECK_INT(config_from_flags(&f, -1, -1).D, 24);
}

TEST(vocabulary_and_bos_come_from_flag_tokenizer_or_default) {
    Flags f = flags_of_depth(1);
    Config c = config_from_flags(&f, -1, -1);
    CHECK_INT(c.V, 50257);
    CHECK_INT(c.bos, 50256);
    c = config_from_flags(&f, 257, 256);
    CHECK_INT(c.V, 257);
    CHECK_INT(c.Vp, 384);
    CHECK_INT(c.bos, 256);
    f.vocab = 300;
    CHECK_INT(config_from_flags(&f, 257, 256).V, 300);
    CHECK_INT(config_from_flags(&f, 257, 256).bos, 256);
    CHECK_INT(config_from_flags(&f, -1, -1).bos, 299);
    f.bos = 7;
    CHECK_INT(config_from_flags(&f, 257, 256).bos, 7);
    f.bos = 0;
    CHECK_INT(config_from_flags(&f, 257, 256).bos, 0);
    f.bos = -1, f.vocab = 60000;
    CHECK_INT(config_from_flags(&f, -1, -1).bos, 50256);
    f.vocab = 256;
    DIES(EXIT_USAGE, "--vocab: found 256, expected at least 257, the tokenizer's")
    config_from_flags(&f, 257, 256);
}

// The windows of a model as text: "128 128 128 512".
static const char *windows(int depth, int T, const char *pattern, int window_short) {
    static char text[400];
    Flags f = flags_of_depth(depth);
    f.seq_len = T, f.window_pattern = pattern, f.window_short = window_short;
    Config c = config_from_flags(&f, -1, -1);
    int n = 0;
    for (int i = 0; i < c.L; i++)
        n += snprintf(text + n, sizeof text - (size_t)n, i ? " %d" : "%d", c.window[i]);
    return text;
}

TEST(windows_follow_the_pattern) {
    CHECK_STR(windows(4, 512, "SSSL", 0), "128 128 128 512");
    CHECK_STR(windows(7, 512, "SSSL", 0), "128 128 128 512 128 128 512");  // the last is long
    CHECK_STR(windows(1, 512, "SSSL", 0), "512");
    CHECK_STR(windows(3, 512, "S", 0), "128 128 512");
    CHECK_STR(windows(3, 512, "L", 0), "512 512 512");
    CHECK_STR(windows(4, 512, "LS", 7), "512 7 512 512");
}

TEST(short_window_is_a_quarter_rounded_up) {
    CHECK_STR(windows(2, 2048, "S", 0), "512 2048");
    CHECK_STR(windows(2, 513, "S", 0), "256 513");
    CHECK_STR(windows(2, 512, "S", 0), "128 512");
    CHECK_STR(windows(2, 384, "S", 0), "128 384");
    CHECK_STR(windows(2, 64, "S", 0), "64 64");  // never longer than the row
    CHECK_STR(windows(2, 64, "S", 65), "64 64");
    CHECK_STR(windows(2, 64, "S", 63), "63 64");
}

TEST(value_embeddings_sit_on_every_second_layer_and_the_last) {
    const char *expected[] = {"", "1", "01", "101", "0101", "10101", "010101"};
    for (int L = 1; L <= 6; L++) {
        Config c = small(L);
        for (int i = 0; i < L; i++) CHECK_INT(config_has_value_embed(&c, i), expected[L][i] == '1');
    }
}

TEST(backout_needs_three_layers) {
    for (int L = 1; L <= 4; L++) {
        Config c = small(L);
        CHECK_INT(config_has_backout(&c), L >= 3);
    }
}

TEST(matrix_parameters_by_hand) {
    Config c = config_of_depth(12);
    CHECK(config_matrix_params(&c) == 123532032);  // 12 * 12 * 768^2 + 50257 * 768
    c = small(1);
    CHECK(config_matrix_params(&c) == 12 * 4096 + 300 * 64);
}

TEST(flops_per_token_by_hand) {
    Flags f = flags_of_depth(2);
    f.channels = 64, f.heads = 1, f.vocab = 257, f.seq_len = 384, f.window_pattern = "S",
    f.window_short = 128;
    Config c = config_from_flags(&f, -1, -1);
    double matrices = 6 * (2 * 12 * 4096.0 + 257 * 64);
    CHECK_NEAR(config_flops_per_token(&c, false), matrices + 12 * 64 * (128 + 384.0), 1e-6);
    double seen = 0;  // keys that the average query sees, counted one by one
    for (int i = 0; i < 384; i++)
        for (int j = 0; j <= i; j++) seen += (1 + (i - j <= 128)) / 384.0;
    CHECK_NEAR(config_flops_per_token(&c, true), matrices + 12 * 64 * seen, 1e-6);
}

TEST(bad_shapes_exit_2) {
    struct {
        int channels, heads, vocab, bos;
        const char *pattern, *message;
    } cases[] = {
        {100, 0, 0, -1, "L", "--channels: found 100, expected a multiple of 8, at least 24"},
        {16, 0, 0, -1, "L", "--channels: found 16, expected a multiple of 8, at least 24"},
        {64, 3, 0, -1, "L",
         "--channels 64 and --heads 3: found C/H = 21.3333, expected an even whole number"},
        {24, 8, 0, -1, "L",
         "--channels 24 and --heads 8: found C/H = 3, expected an even whole number"},
        {64, 128, 0, -1, "L", "expected an even whole number"},
        {64, 1, 1, -1, "L", "--vocab 1: expected at least 2"},
        {64, 1, 257, 257, "L", "--vocab 257: expected at least 2, and more than --bos 257"},
        {64, 1, 0, -1, "", "--window-pattern: found '', expected letters S (short) and L (long)"},
        {64, 1, 0, -1, "SXL", "--window-pattern: found 'SXL'"},
        {64, 1, 0, -1, "ssl", "--window-pattern: found 'ssl'"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Flags f = flags_of_depth(2);
        f.channels = cases[i].channels, f.heads = cases[i].heads, f.vocab = cases[i].vocab,
        f.bos = cases[i].bos;
        f.window_pattern = cases[i].pattern;
        DIES(EXIT_USAGE, cases[i].message) config_from_flags(&f, -1, -1);
    }
}

// ---------------------------------------------------------------------------------------------
// The table.

// Names and shapes of a small model, one "name rows,cols" after the other.
static const char *listing(int L) {
    static char text[4000];
    Config c = small(L);
    Table t;
    table_init(&t, &c);
    int n = 0;
    for (int i = 0; i < t.count; i++) {
        const Tensor *x = &t.tensor[i];
        n += snprintf(text + n, sizeof text - (size_t)n, i ? " %s" : "%s", x->name);
        if (x->ndim == 2)
            n += snprintf(text + n, sizeof text - (size_t)n, " %d,%d", x->rows, x->cols);
        else
            n += snprintf(text + n, sizeof text - (size_t)n, " %d", x->cols);
    }
    table_free(&t);
    return text;
}

#define LAYER(i)                                                                                   \
    " layers." i ".wq 64,64 layers." i ".wk 64,64 layers." i ".wv 64,64 layers." i                 \
    ".wo 64,64 layers." i ".wfc 256,64 layers." i ".wproj 64,256"
#define EMBED(i) " layers." i ".ve_gate 2,12 layers." i ".value_embed 384,64"

TEST(names_order_and_shapes) {  // files and random numbers depend on all three
    CHECK_STR(listing(1), "wte 384,64 smear_gate 24 smear_lambda 1" LAYER("0") EMBED(
                              "0") " resid_lambda 1 x0_lambda 1 backout_lambda 1 lm_head 384,64");
    CHECK_STR(listing(3),
              "wte 384,64 smear_gate 24 smear_lambda 1" LAYER("0") EMBED("0") LAYER("1") LAYER("2")
                  EMBED("2") " resid_lambda 3 x0_lambda 3 backout_lambda 1 lm_head 384,64");
}

TEST(groups_and_optimizer_state) {
    const struct {
        Role role;
        int layer;
        Group group;
        size_t state;
    } expected[] = {
        {WTE, -1, GROUP_WTE, 384 * 64},
        {SMEAR_GATE, -1, GROUP_SMEAR, 24},
        {SMEAR_LAMBDA, -1, GROUP_SMEAR, 1},
        {WQ, 2, GROUP_MATRIX, 64},
        {WK, 2, GROUP_MATRIX, 64},
        {WV, 2, GROUP_MATRIX, 64},
        {WO, 2, GROUP_MATRIX, 64},
        {WFC, 2, GROUP_MATRIX, 256},
        {WPROJ, 2, GROUP_MATRIX, 256},
        {VE_GATE, 2, GROUP_MATRIX, 12},
        {VALUE_EMBED, 2, GROUP_VALUE_EMBED, 384 * 64},
        {RESID_LAMBDA, -1, GROUP_RESID, 3},
        {X0_LAMBDA, -1, GROUP_X0, 3},
        {BACKOUT_LAMBDA, -1, GROUP_SMEAR, 1},
        {LM_HEAD, -1, GROUP_LM_HEAD, 384 * 64},
    };
    Config c = small(3);
    Table t;
    table_init(&t, &c);
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        const Tensor *x = table_find(&t, expected[i].role, expected[i].layer);
        CHECK(x != NULL);
        if (!x) continue;
        CHECK_INT(x->group, expected[i].group);
        CHECK_INT(x->state_count, expected[i].state);
        CHECK(!x->frozen);
    }
    table_free(&t);
}

TEST(find_gives_null_where_there_is_none) {
    Config c = small(3);
    Table t;
    table_init(&t, &c);
    CHECK(table_find(&t, VE_GATE, 1) == NULL);
    CHECK(table_find(&t, VALUE_EMBED, 1) == NULL);
    CHECK(table_find(&t, WQ, 3) == NULL);
    CHECK(table_find(&t, WQ, -1) == NULL);
    const Tensor *wq = table_find(&t, WQ, 1), *head = table_find(&t, LM_HEAD, -1);
    CHECK(wq && !strcmp(wq->name, "layers.1.wq"));
    CHECK(head && !strcmp(head->name, "lm_head"));
    table_free(&t);
}

// Offsets: aligned, in order, without overlap, inside the arena; numel and params are the sums.
// Every block begins where 8 ranks can split it, and holds its tensors and nothing else.
static void check_layout(const Table *t, int L) {
    size_t end = 0, state_end = 0, params = 0;
    int block = 0;
    CHECK_INT(t->blocks, L + 2);
    CHECK_INT(t->block_offset[0], 0);
    for (int b = 0; b <= t->blocks; b++) CHECK_INT(t->block_offset[b] % (8 * TABLE_ALIGN), 0);
    for (int i = 0; i < t->count; i++) {
        const Tensor *x = &t->tensor[i];
        CHECK_INT(x->block, x->layer >= 0 ? x->layer + 1 : x->role <= SMEAR_LAMBDA ? 0 : L + 1);
        if (x->block != block) {
            CHECK_INT(x->offset, t->block_offset[++block]);
            CHECK(x->offset >= end && x->offset < end + 8 * TABLE_ALIGN);
            end = x->offset;
        }
        CHECK(x->offset % TABLE_ALIGN == 0 && x->state % TABLE_ALIGN == 0);
        CHECK(x->offset >= end && x->offset < end + TABLE_ALIGN);
        CHECK(x->state >= state_end && x->state < state_end + TABLE_ALIGN);
        end = x->offset + tensor_numel(x), state_end = x->state + x->state_count;
        params += (size_t)x->rows * (size_t)x->cols;
    }
    CHECK_INT(block, L + 1);
    CHECK_INT(t->numel, t->block_offset[L + 2]);
    CHECK(t->numel >= end && t->numel < end + 8 * TABLE_ALIGN);
    CHECK(t->state_numel >= state_end && t->state_numel < state_end + TABLE_ALIGN);
    CHECK_INT(t->params, params);
}

TEST(layout_is_aligned_and_dense) {
    for (int L = 1; L <= 6; L++) {
        Config c = small(L);
        Table t;
        table_init(&t, &c);
        check_layout(&t, L);
        table_free(&t);
    }
}

TEST(wq_wk_wv_touch) {
    for (int channels = 24; channels <= 136; channels += 8) {
        Flags f = flags_of_depth(2);
        f.channels = channels, f.heads = 1;
        Config c = config_from_flags(&f, -1, -1);
        Table t;
        table_init(&t, &c);
        size_t n = (size_t)channels * (size_t)channels;
        for (int i = 0; i < 2; i++) {
            CHECK_INT(table_find(&t, WK, i)->offset, table_find(&t, WQ, i)->offset + n);
            CHECK_INT(table_find(&t, WV, i)->offset, table_find(&t, WK, i)->offset + n);
        }
        table_free(&t);
    }
}

TEST(large_models_do_not_overflow) {
    Flags f = flags_of_depth(128);
    f.vocab = 65536;
    Config c = config_from_flags(&f, -1, -1);
    Table t;
    table_init(&t, &c);
    check_layout(&t, 128);
    CHECK_INT(t.count, 3 + 128 * 6 + 64 * 2 + 4);
    CHECK_INT(c.C, 8192);
    // 12 C^2 a layer, 66 tables of V x C, 64 gates of (64, 12), smear 25, lambdas 257
    CHECK_INT(t.params, 128LL * 12 * 8192 * 8192 + 66LL * 65536 * 8192 + 64LL * 64 * 12 + 25 + 257);
    table_free(&t);
}

// ---------------------------------------------------------------------------------------------
// Initial values.

typedef struct {
    Config config;
    Table table;
    float *params;
} Filled;

static Filled fill(int L, uint32_t seed, bool test) {
    Filled m;
    m.config = small(L);
    table_init(&m.table, &m.config);
    m.params = (float *)malloc(m.table.numel * sizeof *m.params);
    memset(m.params, 0xff, m.table.numel * sizeof *m.params);  // NaN: what is not filled shows
    table_fill(&m.table, m.params, seed, test);
    return m;
}

static void filled_free(Filled *m) {
    free(m->params);
    table_free(&m->table);
}

static const float *values(const Filled *m, Role role, int layer, const Tensor **x) {
    *x = table_find(&m->table, role, layer);
    return m->params + (*x)->offset;
}

// All live elements lie in low..high, the outermost within 5% of the range from its ends, the mean
// within 5 standard errors of the middle.
static void check_uniform(const Filled *m, Role role, int layer, double low, double high) {
    const Tensor *x;
    const float *p = values(m, role, layer, &x);
    double least = 1e30, most = -1e30, sum = 0;
    int n = x->live_rows * x->cols;
    for (int e = 0; e < n; e++) least = fmin(least, p[e]), most = fmax(most, p[e]), sum += p[e];
    const char *name = x->name;
    test_check(least >= (float)low && most <= (float)high, __FILE__, __LINE__,
               "%s: %g .. %g, expected %g .. %g", name, least, most, low, high);
    CHECK_NEAR(sum / n, (low + high) / 2, 5 * (high - low) / sqrt(12.0 * n));
    if (n < 1000) return;
    CHECK_NEAR(least, low, 0.05 * (high - low));
    CHECK_NEAR(most, high, 0.05 * (high - low));
}

static void check_normal(const Filled *m, Role role, double std) {
    const Tensor *x;
    const float *p = values(m, role, -1, &x);
    double sum = 0, squares = 0;
    int n = x->live_rows * x->cols;
    for (int e = 0; e < n; e++) sum += p[e], squares += (double)p[e] * p[e];
    CHECK_NEAR(sum / n, 0, 5 * std / sqrt(n));
    CHECK_NEAR(sqrt(squares / n), std, 5 * std / sqrt(2.0 * n));
}

static void check_constant(const Filled *m, Role role, int layer, float value) {
    const Tensor *x;
    const float *p = values(m, role, layer, &x);
    for (int e = 0; e < x->rows * x->cols; e++)
        if (p[e] != value)
            return test_check(false, __FILE__, __LINE__, "%s: found %g, expected %g", x->name, p[e],
                              value);
}

TEST(default_init) {
    Filled m = fill(3, 1337, false);
    double b = sqrt(3.0 / 64);
    check_normal(&m, WTE, 0.8);
    check_normal(&m, LM_HEAD, 0.001);
    for (int i = 0; i < 3; i++) {
        for (int role = WQ; role <= WV; role++) check_uniform(&m, (Role)role, i, -b, b);
        check_uniform(&m, WFC, i, -0.4 * b, 0.4 * b);
        check_constant(&m, WO, i, 0);
        check_constant(&m, WPROJ, i, 0);
        if (i == 1) continue;
        check_uniform(&m, VE_GATE, i, 0, 0.02);
        check_uniform(&m, VALUE_EMBED, i, -b, b);
    }
    check_uniform(&m, SMEAR_GATE, -1, 0, 0.02);
    check_constant(&m, SMEAR_LAMBDA, -1, 0);
    check_constant(&m, BACKOUT_LAMBDA, -1, 0.2f);
    filled_free(&m);
}

TEST(test_init_is_nowhere_silent) {
    Filled m = fill(3, 1337, true);
    double b = sqrt(3.0 / 64), bf = sqrt(3.0 / 256);
    check_normal(&m, WTE, 0.8);
    check_normal(&m, LM_HEAD, 3.0 / 8);
    for (int i = 0; i < 3; i++) {
        for (int role = WQ; role <= WFC; role++) check_uniform(&m, (Role)role, i, -b, b);
        check_uniform(&m, WPROJ, i, -bf, bf);
        if (i == 1) continue;
        check_uniform(&m, VE_GATE, i, -0.5, 0.5);
        check_uniform(&m, VALUE_EMBED, i, -b, b);
    }
    check_uniform(&m, SMEAR_GATE, -1, -0.5, 0.5);
    check_uniform(&m, SMEAR_LAMBDA, -1, 0.3, 0.6);
    check_uniform(&m, RESID_LAMBDA, -1, 0.8, 1.2);
    check_uniform(&m, X0_LAMBDA, -1, 0.1, 0.4);
    check_uniform(&m, BACKOUT_LAMBDA, -1, 0.2, 0.4);
    for (int i = 0; i < m.table.count; i++) {
        const Tensor *x = &m.table.tensor[i];
        int zeros = 0, live = x->live_rows * x->cols;
        for (int e = 0; e < live; e++) zeros += m.params[x->offset + (size_t)e] == 0;
        test_check(zeros <= live / 1000, __FILE__, __LINE__, "%s: %d zeros in %d", x->name, zeros,
                   live);
    }
    filled_free(&m);
}

TEST(ramps_run_from_end_to_end) {
    Filled m = fill(5, 1, false);
    const Tensor *x;
    const float *resid = values(&m, RESID_LAMBDA, -1, &x), *x0 = values(&m, X0_LAMBDA, -1, &x);
    for (int i = 0; i < 5; i++) {
        CHECK_NEAR(resid[i], 1.15 - 0.10 * i / 4, 1e-7);
        CHECK_NEAR(x0[i], 0.20 - 0.15 * i / 4, 1e-8);
    }
    filled_free(&m);
}

TEST(one_layer_takes_the_ramps_start) {
    Filled m = fill(1, 1, false);
    check_constant(&m, RESID_LAMBDA, -1, 1.15f);
    check_constant(&m, X0_LAMBDA, -1, 0.20f);
    filled_free(&m);
}

TEST(backout_is_frozen_at_0_below_three_layers) {
    for (int L = 1; L <= 3; L++) {
        for (int test = 0; test < 2; test++) {
            Filled m = fill(L, 1, test);
            if (L < 3) check_constant(&m, BACKOUT_LAMBDA, -1, 0);
            for (int i = 0; i < m.table.count; i++)
                CHECK_INT(m.table.tensor[i].frozen,
                          L < 3 && m.table.tensor[i].role == BACKOUT_LAMBDA);
            filled_free(&m);
        }
    }
}

TEST(padding_is_zero) {
    for (int test = 0; test < 2; test++) {
        Filled m = fill(2, 1, test);
        int padded = 0;
        for (int i = 0; i < m.table.count; i++) {
            const Tensor *x = &m.table.tensor[i];
            bool vocabulary = x->role == WTE || x->role == VALUE_EMBED || x->role == LM_HEAD;
            CHECK_INT(x->live_rows, vocabulary ? 300 : x->rows);
            padded += vocabulary;
            size_t begin = x->offset + (size_t)x->live_rows * (size_t)x->cols;
            size_t end = i + 1 < m.table.count ? m.table.tensor[i + 1].offset : m.table.numel;
            for (size_t e = begin; e < end; e++)
                if (m.params[e] != 0) {
                    CHECK(!"padding is zero");
                    break;
                }
        }
        CHECK_INT(padded, 3);
        filled_free(&m);
    }
}

static const char *first_bad(const Filled *m, bool backward) {
    const Tensor *x = table_find_nonfinite(&m->table, m->params, backward);
    return x ? x->name : "none";
}

// Of two tensors that are not finite, the one that comes first.
TEST(what_is_not_finite_is_found) {
    Filled m = fill(3, 1, true);
    const Tensor *x;
    size_t at = (size_t)(values(&m, WFC, 1, &x) - m.params) + tensor_numel(x);
    for (int backward = 0; backward < 2; backward++) CHECK_STR(first_bad(&m, backward), "none");
    m.params[at] = INFINITY;  // the first of the next one
    CHECK_STR(first_bad(&m, false), "layers.1.wproj");
    CHECK_STR(first_bad(&m, true), "layers.1.wproj");
    m.params[at - 1] = NAN;
    CHECK_STR(first_bad(&m, false), "layers.1.wfc");
    CHECK_STR(first_bad(&m, true), "layers.1.wproj");
    filled_free(&m);
}

// In forward's order: of all that is spoiled, backward comes first to what was spoiled last.
TEST(what_is_not_finite_is_found_in_backwards_order) {
    static const struct {
        const char *name;
        size_t element;
    } order[] = {
        {"wte", 5},
        {"smear_gate", 23},
        {"smear_lambda", 0},
        {"x0_lambda", 0},
        {"resid_lambda", 0},
        {"layers.0.ve_gate", 3},
        {"layers.0.value_embed", 0},
        {"layers.0.wq", 1},
        {"layers.0.wk", 1},
        {"layers.0.wv", 1},
        {"layers.0.wo", 1},
        {"layers.0.wfc", 1},
        {"layers.0.wproj", 1},
        {"x0_lambda", 1},
        {"resid_lambda", 1},
        {"layers.1.wq", 1},
        {"layers.1.wproj", 1},
        {"x0_lambda", 2},
        {"resid_lambda", 2},
        {"layers.2.ve_gate", 0},
        {"layers.2.wproj", 0},
        {"backout_lambda", 0},
        {"lm_head", 77},
    };
    Filled m = fill(3, 1, true);
    for (size_t i = 0; i < sizeof order / sizeof *order; i++) {
        const Tensor *x = m.table.tensor;
        while (strcmp(x->name, order[i].name)) x++;
        m.params[x->offset + order[i].element] = i % 2 ? NAN : -INFINITY;
        CHECK_STR(first_bad(&m, true), order[i].name);
        CHECK_STR(first_bad(&m, false), "wte");
    }
    filled_free(&m);
}

TEST(matrices_with_as_many_rows_as_the_vocabulary_are_whole) {
    Flags f = flags_of_depth(1);
    f.channels = 128, f.heads = 1, f.vocab = 100;  // Vp = C = 128
    Config c = config_from_flags(&f, -1, -1);
    Table t;
    table_init(&t, &c);
    CHECK_INT(table_find(&t, WQ, 0)->live_rows, 128);
    CHECK_INT(table_find(&t, WTE, -1)->live_rows, 100);
    table_free(&t);
}

TEST(values_are_a_function_of_seed_tensor_and_element) {
    Filled m = fill(3, 7, true);
    for (int i = 0; i < m.table.count; i++) {
        const Tensor *x = &m.table.tensor[i];
        RandKey key = {7, (uint32_t)i, RAND_PARAMETER};
        double a = x->test_init.a, b = x->test_init.b;
        int last = x->live_rows * x->cols - 1;
        for (int e = 0; e <= last; e += last / 7 + 1) {
            bool normal = x->test_init.kind == INIT_NORMAL;
            double z = normal ? a * rand_normal(key, (uint64_t)e)
                              : a + (b - a) * rand_uniform(key, (uint64_t)e);
            CHECK(m.params[x->offset + (size_t)e] == (float)z);
        }
    }
    Filled other = fill(3, 8, true);
    const Tensor *x;
    CHECK(values(&m, WQ, 0, &x)[5] != values(&other, WQ, 0, &x)[5]);
    CHECK(values(&m, WQ, 0, &x)[5] != values(&m, WQ, 1, &x)[5]);
    filled_free(&m);
    filled_free(&other);
}

int main(void) {
    RUN(depth_sets_every_size);
    RUN(flags_override_sizes);
    RUN(vocabulary_and_bos_come_from_flag_tokenizer_or_default);
    RUN(windows_follow_the_pattern);
    RUN(short_window_is_a_quarter_rounded_up);
    RUN(value_embeddings_sit_on_every_second_layer_and_the_last);
    RUN(backout_needs_three_layers);
    RUN(matrix_parameters_by_hand);
    RUN(flops_per_token_by_hand);
    RUN(bad_shapes_exit_2);
    RUN(names_order_and_shapes);
    RUN(groups_and_optimizer_state);
    RUN(find_gives_null_where_there_is_none);
    RUN(layout_is_aligned_and_dense);
    RUN(wq_wk_wv_touch);
    RUN(large_models_do_not_overflow);
    RUN(default_init);
    RUN(test_init_is_nowhere_silent);
    RUN(ramps_run_from_end_to_end);
    RUN(one_layer_takes_the_ramps_start);
    RUN(backout_is_frozen_at_0_below_three_layers);
    RUN(padding_is_zero);
    RUN(what_is_not_finite_is_found);
    RUN(what_is_not_finite_is_found_in_backwards_order);
    RUN(matrices_with_as_many_rows_as_the_vocabulary_are_whole);
    RUN(values_are_a_function_of_seed_tensor_and_element);
    return test_end();
}
