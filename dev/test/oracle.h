// oracle.h: a whole trainer against an independent PyTorch model and optimizer in FP64, and against
// itself. test_train_gpt2.c includes it after train_gpt2.c, gpu/test_model.cu after
// train_gpt2.cu.
//
// dev/oracle/ wrote the fixtures; PyTorch is not needed here. Each names the trainer's flags and
// holds tokens of three steps, and of the first step logits, loss and every gradient, after the
// third every parameter: whole where small, as sketches (llmc/sketch.h) where large. Every tensor
// is compared, none skipped:
//     ||a - b|| <= tolerance ||b|| + 1e-8 sqrt(numel);   what is exactly 0 there is exactly 0 here;
//     a lambda's gradient, per element: |a - b| <= tolerance * sum of |terms|, since terms cancel.
// The optimizer is compared once more on given gradients.
#ifndef DEV_TEST_ORACLE_H
#define DEV_TEST_ORACLE_H

#include <glob.h>

#include "dev/test/test.h"
#include "llmc/safetensors.h"  // st_open, st_find, st_read, st_metadata

// Of FP32. The includer may put others in their place.
static struct {
    double loss, logits, gradient;             // of the first step
    double later_loss, later_norm, parameter;  // after updates
} tolerance = {1e-6, 1e-5, 1e-4, 1e-4, 1e-3, 1e-4};

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
    double part = allowed > 0 ? error / allowed : error == 0 ? 0 : INFINITY;
    x->compared++;
    if (!(part <= x->worst))
        x->worst = part, snprintf(x->worst_name, sizeof x->worst_name, "%s", name);
    test_check(part <= 1, __FILE__, __LINE__, "%s: found an error of %.3g, allowed %.3g", name,
               error, allowed);
}

static void compare_whole(Fixture *x, const char *name, const StTensor *t, const float *found,
                          size_t n, double allowed) {
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
    judge(x, name, sqrt(error), allowed * sqrt(norm) + 1e-8 * sqrt((double)n));
    free(expected);
}

static void compare_sketch(Fixture *x, const char *name, const StTensor *t, const float *found,
                           size_t n, double allowed) {
    double *expected = (double *)read_tensor(&x->file, t), mine[SKETCH_SIZE];
    sketch_compute(mine, found, n);
    judge(x, name, sketch_distance(mine, expected),
          allowed * expected[SKETCH_NORM] + 1e-8 * sqrt((double)n));
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
              tolerance.gradient * element(terms, sizes, i));
    free(expected), free(sizes);
}

// found (n) against the fixture's tensor `kind.name`, whole or sketch.
static void compare(Fixture *x, const char *kind, const char *name, const float *found, size_t n,
                    double allowed) {
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
        compare_whole(x, full, whole, found, n, allowed);
    else if (sketch_of)
        compare_sketch(x, full, sketch_of, found, n, allowed);
}

static void compare_all(Fixture *x, const char *kind, const Model *m, const float *arena,
                        double allowed) {
    for (int i = 0; i < m->table.count; i++) {
        const Tensor *t = &m->table.tensor[i];
        compare(x, kind, t->name, arena + t->offset, tensor_numel(t), allowed);
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

// What the includer brings. A whole step on rows (batch / T, T + 1) of tokens; where keep is given,
// logits (batch, V) and grads (numel), whichever is not NULL, are kept there.
static StepResult trainer_step(Trainer *t, const int *rows, int64_t it, StepTrace *keep);

// An update with given gradients (numel).
static void trainer_update(Trainer *t, const float *grads, int64_t it);

static void trainer_configure(Trainer *t, const char *flags) {
    char *argv[128];
    int argc = 0;
    Arg table[FLAGS_COUNT];
    snprintf(t->text, sizeof t->text, "train_gpt2 %s", flags);
    for (char *word = strtok(t->text, " "); word; word = strtok(NULL, " ")) argv[argc++] = word;
    flags_parse(&t->flags, table, argc, argv);
    t->cfg = config_from_flags(&t->flags, -1, -1);
    t->plan = plan_from_flags(&t->flags, &t->cfg, 1, model_micro_tokens(&t->cfg, 0));
    t->phase = phase_at(&t->plan, &t->cfg, 0);
}

static void trainer_init(Trainer *t, const char *flags) {
    trainer_configure(t, flags);
    static const Dist alone = {0, 1, 0, NULL};
    model_init(&t->model, &t->cfg, &t->plan, &alone, (uint32_t)t->flags.seed,
               t->flags.init[0] == 't');
}

// Micro-batch `micro` of a step's rows.
static void trainer_micro_batch(const Trainer *t, const int *rows, int64_t micro,
                                int *inputs,     // (micro_rows, T)
                                int *targets) {  // (micro_rows, T)
    int B = t->phase.micro_rows, T = t->phase.T;
    for (int i = 0; i < B * T; i++) {
        const int *at = rows + (micro * B + i / T) * (T + 1) + i % T;
        inputs[i] = at[0], targets[i] = at[1];
    }
}

// The parameters, a copy for the caller to free.
static float *trainer_params(Trainer *t) {
    size_t bytes = t->model.table.numel * sizeof(float);
    float *params = (float *)die_alloc(1, bytes, "parameters");
    ModelState state = model_download(&t->model);
    memcpy(params, state.params, bytes);
    model_state_free(&t->model, state);
    return params;
}

// ---------------------------------------------------------------------------------------------
// Tests of a fixture each.

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
    static Trainer t;
    char flags[1024];
    fixture_open(&x, flags, sizeof flags);
    trainer_init(&t, flags);
    int *tokens = (int *)read_tensor(&x.file, st_find(&x.file, "tokens"));
    double *losses = (double *)read_tensor(&x.file, st_find(&x.file, "loss")),
           *norms = (double *)read_tensor(&x.file, st_find(&x.file, "grad_norm"));
    size_t logits_count = (size_t)t.plan.batch * (size_t)t.cfg.V;
    StepTrace keep = {NULL, NULL, NULL, NULL};
    keep.logits = (float *)die_alloc(logits_count, sizeof(float), "logits");
    keep.grads = (float *)die_alloc(t.model.table.numel, sizeof(float), "gradients");
    for (int step = 0; step < 3; step++) {
        const int *rows = tokens + step * (t.plan.batch / t.cfg.T) * (t.cfg.T + 1);
        StepResult s = trainer_step(&t, rows, step, step ? NULL : &keep);
        judge(&x, "loss", fabs(s.loss - losses[step]),
              (step ? tolerance.later_loss : tolerance.loss) * losses[step]);
        judge(&x, "grad_norm", fabs(s.grad_norm - norms[step]),
              (step ? tolerance.later_norm : tolerance.gradient) * norms[step]);
        if (step) continue;
        compare(&x, "logits", "", keep.logits, logits_count, tolerance.logits);
        compare_all(&x, "grad", &t.model, keep.grads, tolerance.gradient);
    }
    float *params = trainer_params(&t);
    compare_all(&x, "updated", &t.model, params, tolerance.parameter);
    free(tokens), free(losses), free(norms), free(keep.logits), free(keep.grads), free(params);
    model_free(&t.model);
    fixture_report(&x);
}

// Three updates on given gradients: normal numbers of the scale that the fixture names, and 0 for
// one of the tensors.
TEST(optimizer) {
    Fixture x;
    static Trainer t;
    char flags[1024], zero[64] = "", scale[32] = "";
    fixture_open(&x, flags, sizeof flags);
    trainer_init(&t, flags);
    CHECK(st_metadata(&x.file, "zero_gradient", zero, sizeof zero));
    CHECK(st_metadata(&x.file, "gradient_scale", scale, sizeof scale));
    const Table *table = &t.model.table;
    float *grads = (float *)die_alloc(table->numel, sizeof *grads, "gradients");
    for (int step = 0; step < 3; step++) {
        memset(grads, 0, table->numel * sizeof *grads);
        for (int i = 0; i < table->count; i++) {
            const Tensor *p = &table->tensor[i];
            RandKey key = {1001 + (uint32_t)step, (uint32_t)i, 5};
            if (p->frozen || !strcmp(zero, p->name)) continue;
            for (size_t e = 0; e < (size_t)p->live_rows * (size_t)p->cols; e++)
                grads[p->offset + e] = (float)(atof(scale) * rand_normal(key, e));
        }
        trainer_update(&t, grads, step);
    }
    float *params = trainer_params(&t);
    compare_all(&x, "updated", &t.model, params, tolerance.parameter);
    free(grads), free(params);
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
// A trainer against itself.

static const char *const SMALL =
    "--depth 3 --channels 128 --heads 2 --vocab 130 --seq-len 48 --window-short 16 --doc-mask 1 "
    "--batch-tokens 384 --steps 4 --init test --bos 3 --micro-batch";

// The rows of step `it` of SMALL; token 77 is in none of them.
enum { SMALL_ROWS = 8, SMALL_TOKENS = 8 * 49 };
static void small_rows(int *rows /* (SMALL_TOKENS) */, int it) {
    RandKey key = {5, (uint32_t)it, 99};
    for (int i = 0; i < SMALL_TOKENS; i++) {
        rows[i] = (int)(rand_u32(key, (uint64_t)i) >> 8) % (i % 3 ? 130 : 8);
        if (rows[i] == 77) rows[i] = 78;
    }
}

// Two steps of SMALL. Keeps the gradients of the second and the parameters after it.
typedef struct {
    double loss;
    size_t numel;
    float *grads, *params;  // (numel)
} Small;

static Small small_train(Trainer *t, int micro_batch) {
    char flags[512];
    Small out = {0, 0, NULL, NULL};
    snprintf(flags, sizeof flags, "%s %d", SMALL, micro_batch);
    trainer_init(t, flags);
    out.numel = t->model.table.numel;
    out.grads = (float *)die_alloc(out.numel, sizeof(float), "gradients");
    for (int it = 0; it < 2; it++) {
        int rows[SMALL_TOKENS];
        StepTrace keep = {NULL, NULL, NULL, out.grads};
        small_rows(rows, it);
        out.loss = trainer_step(t, rows, it, &keep).loss;
    }
    out.params = trainer_params(t);
    return out;
}

static void small_free(Trainer *t, Small *s) {
    free(s->grads), free(s->params);
    model_free(&t->model);
}

static bool small_equal(const Small *a, const Small *b) {
    size_t bytes = a->numel * sizeof(float);
    return a->loss == b->loss && !memcmp(a->params, b->params, bytes) &&
           !memcmp(a->grads, b->grads, bytes);
}

TEST(micro_batches_change_nothing_but_rounding) {
    static Trainer whole, split;
    Small a = small_train(&whole, 8), b = small_train(&split, 2);
    double error = 0, norm = 0;
    CHECK_NEAR(a.loss, b.loss, 1e-5 * fabs(a.loss));
    for (size_t i = 0; i < a.numel; i++) {
        double d = (double)a.params[i] - b.params[i];
        error += d * d, norm += (double)a.params[i] * a.params[i];
    }
    test_check(sqrt(error) <= 1e-5 * sqrt(norm), __FILE__, __LINE__,
               "parameters: found %.3g apart, allowed 1e-5", sqrt(error / norm));
    small_free(&whole, &a), small_free(&split, &b);
}

TEST(padding_stays_zero) {
    static Trainer t;
    Small s = small_train(&t, 8);
    for (int i = 0; i < t.model.table.count; i++) {
        const Tensor *x = &t.model.table.tensor[i];
        bool zero = true;
        for (size_t e = (size_t)x->live_rows * (size_t)x->cols; e < tensor_numel(x); e++)
            zero = zero && s.params[x->offset + e] == 0 && s.grads[x->offset + e] == 0;
        test_check(zero, __FILE__, __LINE__, "%s: its padding rows moved", x->name);
    }
    small_free(&t, &s);
}

#endif
