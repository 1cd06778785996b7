// test_train_gpt2.c: the trainer against the oracle (dev/test/oracle.h) and against itself, its
// operations against cases small enough for a pencil.
#define main train_gpt2_main
#include "train_gpt2.c"
#undef main

#ifdef _OPENMP
#include <omp.h>
#endif

#include "dev/test/oracle.h"  // test_oracle, test_optimizer, small_train

// ---------------------------------------------------------------------------------------------
// What oracle.h asks for.

static StepResult trainer_step(Trainer *t, const int *rows, int64_t it, StepTrace *keep) {
    Model *m = &t->model;
    int64_t n = (int64_t)t->phase.micro_rows * t->phase.T;
    int *inputs = die_alloc((size_t)(2 * n), sizeof *inputs, "tokens"), *targets = inputs + n;
    StepResult s = {0};
    memset(m->grads, 0, m->table.numel * sizeof(float));
    for (int64_t micro = 0; micro < t->phase.micro_steps; micro++) {
        float *logits = keep && keep->logits ? keep->logits + micro * n * t->cfg.V : NULL;
        trainer_micro_batch(t, rows, micro, inputs, targets);
        s.loss += model_accumulate(m, inputs, targets, &t->phase, logits) / (double)t->phase.batch;
    }
    s.grad_norm = model_grad_norm(m);
    if (keep && keep->grads) memcpy(keep->grads, m->grads, m->table.numel * sizeof(float));
    model_update(m, &t->flags, &t->plan, it, s.grad_norm);
    free(inputs);
    return s;
}

static void trainer_update(Trainer *t, const float *grads, int64_t it) {
    memcpy(t->model.grads, grads, t->model.table.numel * sizeof(float));
    model_update(&t->model, &t->flags, &t->plan, it, model_grad_norm(&t->model));
}

// ---------------------------------------------------------------------------------------------
// The operations.

TEST(exp_inline_equals_libm) {
    for (double x = -700; x < 700; x += 0.0371) CHECK_NEAR(exp_inline(x) / exp(x), 1, 1e-14);
    CHECK(exp_inline(0) == 1);
}

TEST(relu2_by_hand) {
    const float x[6] = {-INFINITY, -2, -0.0f, 3, INFINITY, NAN}, dy[6] = {5, 5, 5, 5, 5, 5};
    float y[6], dx[6];
    relu2_forward(y, x, 6), relu2_backward(dx, dy, x, 6);
    for (int i = 0; i < 3; i++) CHECK(y[i] == 0 && dx[i] == 0);
    CHECK(y[3] == 9 && dx[3] == 30 && isinf(y[4]) && isinf(dx[4]));
    CHECK(isnan(y[5]) && isnan(dx[5]));  // not hidden behind a 0
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
        double decay = schedule_lr(now, k, x->group) * shape * k.wd * (matrix ? now.wd : 1);
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

TEST(threads_change_no_bit) {
#ifdef _OPENMP
    static Trainer one, two;
    int before = omp_get_max_threads();
    omp_set_num_threads(1);
    Small a = small_train(&one, 4);
    omp_set_num_threads(2);
    Small b = small_train(&two, 4);
    omp_set_num_threads(before);
    CHECK(small_equal(&a, &b));
    small_free(&one, &a), small_free(&two, &b);
#else
    SKIP("built without OpenMP");
#endif
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
    RUN(relu2_by_hand);
    RUN(adamw_by_hand);
    RUN(muon_by_hand);
    RUN(zero_gradient_leaves_only_decay);
    RUN(micro_batches_change_nothing_but_rounding);
    RUN(threads_change_no_bit);
    RUN(padding_stays_zero);
    return test_end();
}
