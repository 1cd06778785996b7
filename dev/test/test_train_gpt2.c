// test_train_gpt2.c: the trainer against an independent PyTorch model and optimizer in FP64.
//
// dev/oracle/ wrote the fixtures; PyTorch is not needed here. Each names the trainer's flags and
// holds tokens of three steps, and of the first step logits, loss and every gradient, after the
// third every parameter: whole where small, as sketches (llmc/sketch.h) where large. Every tensor
// is compared, none skipped:
//     ||a - b|| <= tolerance ||b|| + 1e-8 sqrt(numel);   what is exactly 0 there is exactly 0 here;
//     a lambda's gradient, per element: |a - b| <= tolerance * sum of |terms|, since terms cancel.
// The optimizer is compared once more on given gradients, and on cases small enough for a pencil.
#define main train_gpt2_main
#include "train_gpt2.c"
#undef main

#include <glob.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "dev/test/test.h"
#include "llmc/safetensors.h"  // st_open, st_find, st_read, st_metadata

static const double LOGITS_TOLERANCE = 1e-5, GRADIENT_TOLERANCE = 1e-4, PARAMETER_TOLERANCE = 1e-4,
                    LOSS_TOLERANCE = 1e-6;

// ---------------------------------------------------------------------------------------------
// Comparing with a fixture.

typedef struct {
    StFile file;
    int compared;
    double worst;  // largest error as a part of what is allowed
    char worst_name[96];
} Fixture;

static void *read_tensor(const StFile *f, const StTensor *t) {
    uint64_t bytes = 0;
    st_bytes(t, &bytes);
    void *data = die_alloc(1, bytes, "a tensor of a fixture");
    if (st_read((StFile *)f, t, data)) die(EXIT_DATA, "%s", io_error);
    return data;
}

static uint64_t count_elements(const StTensor *t) {
    uint64_t n = 1;
    for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
    return n;
}

static double element(const StTensor *t, const void *data, uint64_t i) {
    return t->dtype == ST_F64 ? ((const double *)data)[i] : ((const float *)data)[i];
}

// Notes an error and what would have been allowed.
static void judge(Fixture *x, const char *name, double error, double allowed) {
    double part = allowed > 0 ? error / allowed : error > 0 ? INFINITY : 0;
    x->compared++;
    if (!(part <= x->worst))
        x->worst = part, snprintf(x->worst_name, sizeof x->worst_name, "%s", name);
    test_check(part <= 1, __FILE__, __LINE__, "%s: found an error of %.3g, allowed %.3g", name,
               error, allowed);
}

static void compare_whole(Fixture *x, const char *name, const StTensor *t, const float *found,
                          size_t n, double tolerance) {
    void *expected = read_tensor(&x->file, t);
    double error = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        double e = element(t, expected, i), d = found[i] - e;
        error += d * d, norm += e * e;
        if (e == 0 && found[i] != 0) {
            test_check(false, __FILE__, __LINE__, "%s[%zu]: found %g, expected exactly 0", name, i,
                       found[i]);
            break;
        }
    }
    judge(x, name, sqrt(error), tolerance * sqrt(norm) + 1e-8 * sqrt((double)n));
    free(expected);
}

static void compare_sketch(Fixture *x, const char *name, const StTensor *t, const float *found,
                           size_t n, double tolerance) {
    double *expected = read_tensor(&x->file, t), mine[SKETCH_SIZE];
    sketch_compute(mine, found, n);
    judge(x, name, sketch_distance(mine, expected),
          tolerance * expected[SKETCH_NORM] + 1e-8 * sqrt((double)n));
    test_check(mine[SKETCH_NONZERO] <= expected[SKETCH_NONZERO], __FILE__, __LINE__,
               "%s: found %.0f elements that are not 0, expected %.0f", name, mine[SKETCH_NONZERO],
               expected[SKETCH_NONZERO]);
    free(expected);
}

// Each element of a lambda's gradient against the sum of its terms' sizes.
static void compare_terms(Fixture *x, const char *name, const StTensor *t, const StTensor *terms,
                          const float *found) {
    void *expected = read_tensor(&x->file, t), *sizes = read_tensor(&x->file, terms);
    for (uint64_t i = 0; i < count_elements(t); i++)
        judge(x, name, fabs(found[i] - element(t, expected, i)),
              GRADIENT_TOLERANCE * element(terms, sizes, i));
    free(expected), free(sizes);
}

// found (n) against the fixture's tensor `kind.name`, whole or sketch.
static void compare(Fixture *x, const char *kind, const char *name, const float *found, size_t n,
                    double tolerance) {
    char full[80], sketched[96], terms_name[80];
    snprintf(full, sizeof full, "%s%s%s", kind, *name ? "." : "", name);
    snprintf(sketched, sizeof sketched, "sketch.%s", full);
    snprintf(terms_name, sizeof terms_name, "terms.%s", name);
    const StTensor *whole = st_find(&x->file, full), *sketch_of = st_find(&x->file, sketched);
    const StTensor *terms = strcmp(kind, "grad") ? NULL : st_find(&x->file, terms_name);
    test_check(whole || sketch_of, __FILE__, __LINE__, "%s: not in the fixture", full);
    if (whole && count_elements(whole) != n)
        test_check(false, __FILE__, __LINE__, "%s: found %zu elements, expected %llu", full, n,
                   (unsigned long long)count_elements(whole));
    else if (whole && terms)
        compare_terms(x, full, whole, terms, found);
    else if (whole)
        compare_whole(x, full, whole, found, n, tolerance);
    else if (sketch_of)
        compare_sketch(x, full, sketch_of, found, n, tolerance);
}

static void compare_all(Fixture *x, const char *kind, const Model *m, const float *arena,
                        double tolerance) {
    for (int i = 0; i < m->table.count; i++) {
        const Tensor *t = &m->table.tensor[i];
        compare(x, kind, t->name, arena + t->offset, tensor_numel(t), tolerance);
    }
}

// ---------------------------------------------------------------------------------------------
// A trainer made from a line of flags.

typedef struct {
    Flags flags;
    Config cfg;
    Plan plan;
    Phase phase;
    Model model;
    char text[1024];
} Trainer;

static void trainer_init(Trainer *t, const char *flags) {
    char *argv[128];
    int argc = 0;
    Arg table[FLAGS_COUNT];
    snprintf(t->text, sizeof t->text, "train_gpt2 %s", flags);
    for (char *word = strtok(t->text, " "); word; word = strtok(NULL, " ")) argv[argc++] = word;
    flags_parse(&t->flags, table, argc, argv);
    t->cfg = config_from_flags(&t->flags, -1, -1);
    t->plan = plan_from_flags(&t->flags, &t->cfg, 1, model_micro_tokens(&t->cfg));
    t->phase = phase_at(&t->plan, &t->cfg, 0);
    model_init(&t->model, &t->cfg, &t->plan, (uint32_t)t->flags.seed, t->flags.init[0] == 't');
}

// Forward and backward over the rows of one step, (rows, T+1) tokens. Returns the mean loss.
// logits: (rows*T, V), or NULL.
static double trainer_gradients(Trainer *t, const int *rows, float *logits) {
    int B = t->plan.micro_rows, T = t->cfg.T;
    int *inputs = die_alloc((size_t)(2 * B * T), sizeof *inputs, "tokens"),
        *targets = inputs + B * T;
    double sum = 0;
    memset(t->model.grads, 0, t->model.table.numel * sizeof(float));
    for (int micro = 0; micro < t->plan.micro_steps; micro++) {
        for (int i = 0; i < B * T; i++) {
            const int *at = rows + (micro * B + i / T) * (T + 1) + i % T;
            inputs[i] = at[0], targets[i] = at[1];
        }
        float *keep = logits ? logits + (int64_t)micro * B * T * t->cfg.V : NULL;
        sum += model_accumulate(&t->model, inputs, targets, &t->phase, keep);
    }
    free(inputs);
    return sum / (double)t->plan.batch;
}

static const char *fixture_path;

static void fixture_open(Fixture *x, char *flags, size_t room) {
    memset(x, 0, sizeof *x);
    if (st_open(&x->file, fixture_path)) die(EXIT_DATA, "%s", io_error);
    if (!st_metadata(&x->file, "flags", flags, room))
        die(EXIT_DATA, "%s: no flags in its metadata", fixture_path);
}

static void fixture_report(Fixture *x) {
    printf("  compared %d tensors; worst %s: %.3f of what is allowed\n", x->compared, x->worst_name,
           x->worst);
    st_close(&x->file);
}

// Three steps of training from --init test.
TEST(oracle) {
    Fixture x;
    Trainer t;
    char flags[1024];
    fixture_open(&x, flags, sizeof flags);
    trainer_init(&t, flags);
    int *tokens = read_tensor(&x.file, st_find(&x.file, "tokens"));
    double *losses = read_tensor(&x.file, st_find(&x.file, "loss")),
           *norms = read_tensor(&x.file, st_find(&x.file, "grad_norm"));
    size_t logits_count = (size_t)t.plan.batch * (size_t)t.cfg.V;
    float *logits = die_alloc(logits_count, sizeof *logits, "logits");
    for (int step = 0; step < 3; step++) {
        double loss = trainer_gradients(
            &t, tokens + step * (t.plan.batch / t.cfg.T) * (t.cfg.T + 1), step ? NULL : logits);
        double norm = model_grad_norm(&t.model);
        judge(&x, "loss", fabs(loss - losses[step]),
              (step ? PARAMETER_TOLERANCE : LOSS_TOLERANCE) * losses[step]);
        judge(&x, "grad_norm", fabs(norm - norms[step]),
              (step ? 10 : 1) * GRADIENT_TOLERANCE * norms[step]);
        if (step == 0) {
            compare(&x, "logits", "", logits, logits_count, LOGITS_TOLERANCE);
            compare_all(&x, "grad", &t.model, t.model.grads, GRADIENT_TOLERANCE);
        }
        model_update(&t.model, &t.flags, &t.plan, step, norm);
    }
    compare_all(&x, "updated", &t.model, t.model.params, PARAMETER_TOLERANCE);
    free(tokens), free(losses), free(norms), free(logits);
    model_free(&t.model);
    fixture_report(&x);
}

// Three updates on given gradients: normal numbers of the scale that the fixture names, and 0 for
// one of the tensors.
TEST(optimizer) {
    Fixture x;
    Trainer t;
    char flags[1024], zero[64] = "", scale[32] = "";
    fixture_open(&x, flags, sizeof flags);
    trainer_init(&t, flags);
    CHECK(st_metadata(&x.file, "zero_gradient", zero, sizeof zero));
    CHECK(st_metadata(&x.file, "gradient_scale", scale, sizeof scale));
    for (int step = 0; step < 3; step++) {
        memset(t.model.grads, 0, t.model.table.numel * sizeof(float));
        for (int i = 0; i < t.model.table.count; i++) {
            const Tensor *p = &t.model.table.tensor[i];
            RandKey key = {1001 + (uint32_t)step, (uint32_t)i, 5};
            if (p->frozen || !strcmp(zero, p->name)) continue;
            for (size_t e = 0; e < (size_t)p->live_rows * (size_t)p->cols; e++)
                t.model.grads[p->offset + e] = (float)(atof(scale) * rand_normal(key, e));
        }
        model_update(&t.model, &t.flags, &t.plan, step, model_grad_norm(&t.model));
    }
    compare_all(&x, "updated", &t.model, t.model.params, PARAMETER_TOLERANCE);
    model_free(&t.model);
    fixture_report(&x);
}

// Runs `body` once for each fixture of a pattern, as a test named after the file. Returns how many.
static int run_fixtures(const char *pattern, void (*body)(void)) {
    glob_t g;
    int count = 0;
    if (!glob(pattern, 0, NULL, &g))
        for (; count < (int)g.gl_pathc; count++) {
            char name[128];
            fixture_path = g.gl_pathv[count];
            snprintf(name, sizeof name, "%.*s", (int)strcspn(strrchr(fixture_path, '/') + 1, "."),
                     strrchr(fixture_path, '/') + 1);
            test_run(name, body);
        }
    globfree(&g);
    return count;
}

// ---------------------------------------------------------------------------------------------
// Without fixtures.

TEST(exp_inline_equals_libm) {
    for (double x = -700; x < 700; x += 0.0371) CHECK_NEAR(exp_inline(x) / exp(x), 1, 1e-14);
    CHECK(exp_inline(0) == 1);
}

// p = 2, g = 4, t = 1: m/(1-b1) = 4, sqrt(v/(1-b2)) = 4, so p = 2 (1 - 0.1 * 0.5) - 0.1 * 1 = 1.8.
// t = 2, g = 0: m = 0.8*0.8, /(1-0.64) = 1.7778; v = 0.9*1.6, /(1-0.81) = 7.5789, root 2.75299.
TEST(adamw_by_hand) {
    float p = 2, m = 0, v = 0, g = 4;
    GroupNumbers k = {"", 0, 0.8, 0.9, 0, 0.5};
    adamw_update(&p, &m, &v, &g, 1, k, 0.1, 1, 1);
    CHECK_NEAR(p, 1.8, 1e-6);
    CHECK_NEAR(m, 0.8, 1e-6);
    CHECK_NEAR(v, 1.6, 1e-6);
    g = 0;
    adamw_update(&p, &m, &v, &g, 1, k, 0.1, 2, 1);
    CHECK_NEAR(p, 1.8 * 0.95 - 0.1 * (0.64 / 0.36) / sqrt(1.44 / 0.19), 1e-6);
}

// A gradient diag(3, -4) scaled by anything: rows are made even, so X is diag(1, -1) up to a factor
// c that Muon+ sets to 1 (norm sqrt(2)); NorMuon's rows are equal, so it stays; w = 1: the decay
// applies where X w >= 0.
TEST(muon_by_hand) {
    float w[4] = {1, 1, 1, 1}, momentum[4] = {0}, second[2] = {0}, g[4] = {3, 0, 0, -4};
    float memory[16];
    MuonScratch s = {memory, memory + 4, memory + 8, memory + 12};
    muon_update(w, momentum, second, g, 1, 0.9, 0.8, 0.1, 0.5, 2, 2, &s);
    CHECK_NEAR(momentum[0], 0.3, 1e-7);
    CHECK_NEAR(momentum[3], -0.4, 1e-7);
    CHECK_NEAR(w[0], 1 - 0.1 - 0.05, 1e-6);  // X = 1
    CHECK_NEAR(w[1], 1 - 0.05, 1e-6);        // X = 0: 0 * w >= 0, decay
    CHECK_NEAR(w[3], 1 + 0.1, 1e-6);         // X = -1: no decay
    CHECK_NEAR(second[0], 0.2 * 0.5, 1e-7);  // mean of (1, 0) squared
}

TEST(zero_gradient_leaves_only_decay) {
    Trainer t;
    trainer_init(&t, "--depth 3 --channels 64 --heads 2 --vocab 130 --seq-len 16 --batch-tokens 64 "
                     "--steps 9 --init test");
    Model *m = &t.model;
    float *before = die_alloc(m->table.numel, sizeof *before, "a copy");
    memcpy(before, m->params, m->table.numel * sizeof *before);
    model_update(m, &t.flags, &t.plan, 0, 0);
    Schedule now = schedule_at(0, t.plan.steps, t.flags.warmup);
    for (int i = 0; i < m->table.count; i++) {
        const Tensor *x = &m->table.tensor[i];
        GroupNumbers k = plan_group(&t.plan, &t.flags, &t.cfg, x->group);
        bool matrix = x->group == GROUP_MATRIX;
        double shape = matrix ? sqrt(fmax(1, (double)x->rows / x->cols)) : 1;
        double decay = k.lr * now.lr * shape * k.wd * (matrix ? now.wd : 1);
        bool equal = true;
        for (size_t e = 0; e < tensor_numel(x); e++) {
            float old = before[x->offset + e], new = m->params[x->offset + e];
            if (!(fabs(new - old *(1 - (x->frozen ? 0 : decay))) <= 1e-7 * fabs(old)))
                equal = false;
            if (decay == 0 && new != old) equal = false;
        }
        test_check(equal, __FILE__, __LINE__, "%s: moved by more than its decay of %g", x->name,
                   decay);
    }
    free(before);
    model_free(m);
}

static const char *const SMALL =
    "--depth 3 --channels 64 --heads 2 --vocab 130 --seq-len 48 --window-short 16 --doc-mask 1 "
    "--batch-tokens 384 --steps 4 --init test --bos 3 --micro-batch";

// Trains two steps on drawn tokens; the parameters are then in t->model, the loss is returned.
static double train_small(Trainer *t, int micro_batch) {
    char flags[512];
    snprintf(flags, sizeof flags, "%s %d", SMALL, micro_batch);
    trainer_init(t, flags);
    double loss = 0;
    for (int step = 0; step < 2; step++) {
        int rows[8 * 49];
        RandKey key = {5, (uint32_t)step, 99};
        for (int i = 0; i < 8 * 49; i++)
            rows[i] = (int)(rand_u32(key, (uint64_t)i) >> 8) % (i % 3 ? 130 : 8);
        loss = trainer_gradients(t, rows, NULL);
        model_update(&t->model, &t->flags, &t->plan, step, model_grad_norm(&t->model));
    }
    return loss;
}

TEST(micro_batches_change_nothing_but_rounding) {
    Trainer whole, split;
    double a = train_small(&whole, 8), b = train_small(&split, 1), error = 0, norm = 0;
    CHECK_NEAR(a, b, 1e-5 * fabs(a));
    for (size_t i = 0; i < whole.model.table.numel; i++) {
        double d = (double)whole.model.params[i] - split.model.params[i];
        error += d * d, norm += (double)whole.model.params[i] * whole.model.params[i];
    }
    CHECK(sqrt(error) <= 1e-5 * sqrt(norm));
    model_free(&whole.model), model_free(&split.model);
}

TEST(threads_change_no_bit) {
#ifdef _OPENMP
    Trainer one, two;
    int before = omp_get_max_threads();
    omp_set_num_threads(1);
    double a = train_small(&one, 4);
    omp_set_num_threads(2);
    double b = train_small(&two, 4);
    omp_set_num_threads(before);
    CHECK(a == b);
    CHECK(!memcmp(one.model.params, two.model.params, one.model.table.numel * sizeof(float)));
    CHECK(!memcmp(one.model.grads, two.model.grads, one.model.table.numel * sizeof(float)));
    model_free(&one.model), model_free(&two.model);
#else
    SKIP("built without OpenMP");
#endif
}

TEST(padding_stays_zero) {
    Trainer t;
    train_small(&t, 8);
    for (int i = 0; i < t.model.table.count; i++) {
        const Tensor *x = &t.model.table.tensor[i];
        bool zero = true;
        for (size_t e = (size_t)x->live_rows * (size_t)x->cols; e < tensor_numel(x); e++)
            zero = zero && t.model.params[x->offset + e] == 0 && t.model.grads[x->offset + e] == 0;
        test_check(zero, __FILE__, __LINE__, "%s: its padding rows moved", x->name);
    }
    model_free(&t.model);
}

static int oracle_fixtures, optimizer_fixtures;

TEST(fixtures_are_there) {
    CHECK(oracle_fixtures >= 5);
    CHECK(optimizer_fixtures >= 2);
}

int main(void) {
    oracle_fixtures = run_fixtures("dev/test/fixtures/oracle_*.safetensors", test_oracle);
    optimizer_fixtures = run_fixtures("dev/test/fixtures/optim_*.safetensors", test_optimizer);
    RUN(fixtures_are_there);
    RUN(exp_inline_equals_libm);
    RUN(adamw_by_hand);
    RUN(muon_by_hand);
    RUN(zero_gradient_leaves_only_decay);
    RUN(micro_batches_change_nothing_but_rounding);
    RUN(threads_change_no_bit);
    RUN(padding_stays_zero);
    return test_end();
}
