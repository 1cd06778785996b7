// test_muon.cu: Muon (llmc/muon.cuh, llmc/muon_gate.cuh) against muon_update of train_gpt2.c.
//
// Whole updates are held against the twin; and in three parts, so that BF16 is tested closely, too:
// X before Polar Express, Polar Express, and what follows it, each from what the GPU had before it.
// What counts is the change of the parameters, not they themselves.
// `test_muon bench` measures updates of depth 12 and 24, and AdamW.
#include "dev/test/gpu/test_gpu.cuh"
#include "llmc/adamw.cuh"  // adamw_update
#include "llmc/muon.cuh"   // muon_update; muon_begin, muon_polar_express, muon_end

// Of what is computed in FP32 in both builds, or rounded to floatX once.
constexpr double TOLERANCE_CHANGE = 1e-4;

// Of Polar Express. Two BF16 runs of it whose sums differ by 1e-6 end 0.8% apart, and either is 1
// to 2% from FP32 (measured on normal matrices of 48 to 1536 rows): the first steps multiply the
// small singular values, and what was rounded away of them, by up to 989.
constexpr double TOLERANCE_POLAR = sizeof(floatX) == 2 ? 4e-2 : 1e-4;

// Of one number rounded to floatX: where it lies between two of BF16, either will do.
constexpr double TOLERANCE_ROUNDED = sizeof(floatX) == 2 ? 1e-3 : TOLERANCE_FP32;

static Matmul matmul_context;

// ---------------------------------------------------------------------------------------------
// A table of matrices and its arenas.

typedef struct {
    int R, K;
    bool gate;
} Shape;

typedef struct {
    Table table;
    ShardPlan plan;  // of one rank
    Muon muon;
    StepState host, *step;
    GpuArray<float> params, first, second, grads;
    GpuArray<floatX> weights;
    MuonArenas arena;  // the same
} Case;

// `count` matrices of each shape, mixed, a tensor of AdamW's between them. scratch: muon_init's,
// which is poisoned.
static void case_init(Case *c, const Shape *shapes, int shape_count, int count, size_t scratch) {
    Table *t = &c->table;
    Init zero = init_ramp(0, 0);
    memset(c, 0, sizeof *c);
    t->tensor = (Tensor *)die_alloc((size_t)((shape_count + 1) * count), sizeof *t->tensor, "test");
    for (int i = 0; i < count; i++) {
        for (int j = 0; j < shape_count; j++)
            table_add(t, "matrix", shapes[j].gate ? VE_GATE : WQ, i, shapes[j].R, shapes[j].K,
                      GROUP_MATRIX, zero, zero);
        table_add(t, "lambda", RESID_LAMBDA, i, 0, 5, GROUP_RESID, zero, zero);
    }
    shard_init(&c->plan, t, 0, 1);
    muon_init(&c->muon, &test_gpu, &c->plan, scratch);
    for (int i = 0; i < c->muon.shapes; i++) {
        char *from = (char *)c->muon.shape[i].x, *memory = (char *)c->muon.memory;
        size_t bytes = muon_bytes(&c->plan, scratch) - (size_t)(from - memory);
        if (from) CUDA_CHECK(cudaMemset(from, 0xff, bytes));
    }
    c->host.momentum = 0.95f, c->host.beta2 = 0.9f, c->host.grad_scale = 0.75f;
    c->host.lr = 0.02f, c->host.wd = 0.28f;
    c->step = (StepState *)gpu_bytes("step", sizeof *c->step);
    CUDA_CHECK(cudaMemcpy(c->step, &c->host, sizeof c->host, cudaMemcpyHostToDevice));
    c->params = gpu_random<float>("params", t->numel, -0.06, 0.06);
    c->first = gpu_normal<float>("first", t->numel, 1e-4);
    c->second = gpu_random<float>("second", t->state_numel, 0, 1e-3);
    c->grads = gpu_poisoned<float>("grads", t->numel);
    c->weights = gpu_copy<floatX>("weights", c->params.host, t->numel);
    c->arena = {c->params.device, sizeof(floatX) == 2 ? c->weights.device : NULL, c->grads.device,
                c->first.device, c->second.device};
}

static void case_free(Case *c) {
    muon_free(&c->muon);
    shard_free(&c->plan), table_free(&c->table);
    gpu_end_case();
}

// Fresh gradients of a given size; rows of unlike size, the second of each matrix 0.
static void fresh_gradients(Case *c, double size) {
    RandKey key = gpu_fresh_key();
    float *g = c->grads.host;
    for (int i = 0; i < c->table.count; i++) {
        const Tensor *x = &c->table.tensor[i];
        for (size_t e = 0; e < tensor_numel(x); e++) {
            size_t row = e / (size_t)x->cols;
            g[x->offset + e] =
                row == 1 ? 0 : (float)(size * (1 + row % 7) * rand_normal(key, x->offset + e));
        }
    }
    CUDA_CHECK(
        cudaMemcpy(c->grads.device, g, c->table.numel * sizeof(float), cudaMemcpyHostToDevice));
}

static void update(Muon *m, MuonArenas a, const StepState *step) {
    muon_update(m, &matmul_context, a.params, a.weights, a.grads, a.first, a.second, step, 0);
}

// ---------------------------------------------------------------------------------------------
// Comparing.

// Host numbers by the rule of test_gpu.cuh; 0 must be 0.
static void check_near(const char *name, const Shape *s, const float *found, const float *expected,
                       size_t count, double tolerance) {
    double error = 0, norm = 0;
    char shape[80], what[80];
    snprintf(shape, sizeof shape, "R %d, K %d", s->R, s->K);
    for (size_t i = 0; i < count; i++) {
        double e = expected[i], d = found[i] - e;
        error += d * d, norm += e * e;
    }
    double rms = sqrt(norm / (double)count);
    for (size_t i = 0; i < count; i++) {
        double allowed = expected[i] == 0 ? 0 : 8 * tolerance * fmax(fabs(expected[i]), rms);
        if (fabs((double)found[i] - expected[i]) <= allowed) continue;
        snprintf(what, sizeof what, "allowed: %.3g apart", allowed);
        gpu_differs(__FILE__, __LINE__, name, shape, i, s->K, found[i], expected[i], what);
        return;
    }
    if (sqrt(error) > tolerance * sqrt(norm))
        test_check(false, __FILE__, __LINE__, "%s of %s: found an error of %.3g, allowed %.3g",
                   name, shape, sqrt(error), tolerance * sqrt(norm));
}

// The change of w by lr X + decay w [X w >= 0]. Decay hangs on the sign of X: where X is 0 within
// the tolerance, but not exactly, both are right.
static void check_change(const Shape *s, const float *before, const float *after, const float *x,
                         float lr, float decay, double tolerance) {
    size_t count = (size_t)s->R * s->K;
    float *found = gpu_expected(count), *expected = gpu_expected(count);
    double norm = 0;
    for (size_t i = 0; i < count; i++) norm += (double)x[i] * x[i];
    double close = 8 * tolerance * sqrt(norm / (double)count);
    for (size_t i = 0; i < count; i++) {
        float w = before[i], kept = -lr * x[i], decayed = kept - decay * w;
        found[i] = after[i] - w;
        expected[i] = x[i] * w >= 0 ? decayed : kept;
        if (x[i] != 0 && fabs(x[i]) <= close)
            expected[i] = fabsf(found[i] - kept) < fabsf(found[i] - decayed) ? kept : decayed;
    }
    check_near("change of w", s, found, expected, count, tolerance);
}

// Working copies are the parameters, rounded.
static void check_weights(Case *c) {
    gpu_read(c->params), gpu_read(c->weights);
    if (!c->arena.weights) return;
    for (int i = 0; i < c->table.count; i++)
        for (size_t e = 0, at = c->table.tensor[i].offset; e < tensor_numel(&c->table.tensor[i]);
             e++, at++)
            if (c->weights.host[at] != __bfloat162float(__float2bfloat16_rn(c->params.host[at]))) {
                test_check(false, __FILE__, __LINE__, "weights[%zu] of %s: not rounded", at,
                           c->table.tensor[i].name);
                return;
            }
}

// ---------------------------------------------------------------------------------------------
// Whole updates.

static float lr_of(const Case *c, const Shape *s) {
    return (float)(c->host.lr * sqrt(fmax(1, (double)s->R / s->K)));
}

static void check_updates(const Shape *shapes, int shape_count, int count, size_t scratch,
                          int updates) {
    Case c;
    case_init(&c, shapes, shape_count, count, scratch);
    size_t numel = c.table.numel, states = c.table.state_numel;
    float *w = gpu_expected(numel), *before = gpu_expected(numel);
    float *momentum = gpu_expected(numel), *second = gpu_expected(states);
    memcpy(momentum, c.first.host, numel * sizeof(float));
    memcpy(second, c.second.host, states * sizeof(float));
    for (int left = grid_small ? 1 : updates; left > 0; left--) {
        fresh_gradients(&c, 1e-3);
        memcpy(before, gpu_read(c.params), numel * sizeof(float));
        memcpy(w, before, numel * sizeof(float));
        update(&c.muon, c.arena, c.step);
        gpu_read(c.params), gpu_read(c.first), gpu_read(c.second);
        for (int i = 0; i < c.table.count; i++) {
            const Tensor *t = &c.table.tensor[i];
            size_t n = tensor_numel(t), side = t->rows < t->cols ? t->rows : t->cols;
            size_t at = t->offset, lines = t->state_count;
            Shape s = {t->rows, t->cols, t->role == VE_GATE};
            if (t->group != GROUP_MATRIX) {
                CHECK(!memcmp(before + at, c.params.host + at, n * sizeof(float)));
                continue;
            }
            double tolerance = s.gate ? TOLERANCE_CHANGE : TOLERANCE_POLAR;
            float lr = lr_of(&c, &s), *scratch = gpu_expected(2 * (n + side * side));
            cpu::MuonScratch m = {scratch, scratch + n, scratch + 2 * n,
                                  scratch + 2 * n + side * side};
            cpu::muon_update(w + at, momentum + at, second + t->state, c.grads.host + at,
                             c.host.grad_scale, c.host.momentum, c.host.beta2, c.host.lr, c.host.wd,
                             t->rows, t->cols, &m);
            check_near("first", &s, c.first.host + at, momentum + at, n, TOLERANCE_FP32);
            check_near("second", &s, c.second.host + t->state, second + t->state, lines,
                       2 * tolerance);
            check_change(&s, before + at, c.params.host + at, m.x, lr, lr * c.host.wd, tolerance);
        }
        check_weights(&c);
    }
    case_free(&c);
}

TEST(gates) {
    for (int H : {1, 2, 6, 11, 12, 13, 24}) {
        Shape gate = {H, 12, true};
        check_updates(&gate, 1, 3, MUON_SCRATCH, 3);
    }
    Shape many = {1024, 12, true};  // more shared memory than a kernel has unasked
    check_updates(&many, 1, 1, MUON_SCRATCH, 1);
}

static const Shape shapes[] = {{128, 128, false}, {256, 128, false},  {128, 256, false},
#ifdef PRECISION_FP32
                               {48, 48, false},   {192, 48, false},   {48, 192, false},
                               {8, 8, false},     {24, 96, false},
#endif
                               {768, 768, false}, {3072, 768, false}, {768, 3072, false}};
static const int shape_count = sizeof shapes / sizeof *shapes;

static int last_shape(void) { return grid_small ? shape_count - 3 : shape_count; }

TEST(single_shapes) {
    for (int i = 0; i < last_shape(); i++) check_updates(&shapes[i], 1, 1, MUON_SCRATCH, 3);
}

static const Shape model[] = {
    {128, 128, false}, {512, 128, false}, {128, 512, false}, {4, 12, true}};

// All at once: chunks of all matrices, of 2 of 5, of single ones.
TEST(batches_and_chunks) {
    Case c;
    case_init(&c, model, 1, 1, 1);
    size_t one = muon_bytes(&c.plan, 1);
    case_free(&c);
    check_updates(model, 4, 5, MUON_SCRATCH, 3);
    check_updates(model, 1, 5, 2 * one, 2);
    check_updates(model, 4, 5, 1, 2);
}

// ---------------------------------------------------------------------------------------------
// In parts. Steps 1, 2 and the division of step 3 on the host, X not yet rounded.
static void expect_begin(const Case *c, const float *g, const float *buf, float *x, int R, int K) {
    double mu = c->host.momentum;
    for (int i = 0; i < R * K; i++) {
        double gi = (double)c->host.grad_scale * g[i];
        x[i] = (float)((1 - mu) * gi + mu * (mu * buf[i] + (1 - mu) * gi));
    }
    double rms = sqrt(cpu::sum_squares(x, (size_t)R * K) / R);
    for (int r = 0; r < R; r++) {
        double even = rms / fmax(sqrt(cpu::sum_squares(x + (size_t)r * K, K)), 1e-6);
        for (int k = 0; k < K; k++) x[(size_t)r * K + k] *= even;
    }
    double norm = 1.01 * sqrt(cpu::sum_squares(x, (size_t)R * K)) + 1e-6;
    for (int i = 0; i < R * K; i++) x[i] = (float)(x[i] / norm);
}

// Steps 4 and 5 on the host.
static void expect_end(const Case *c, float *x, float *second, int R, int K) {
    bool by_row = R >= K;
    int lines = by_row ? R : K, n = by_row ? K : R;
    double beta2 = c->host.beta2, before = 0, after = 0;
    double restore = sqrt(n) / fmax(sqrt(cpu::sum_squares(x, (size_t)R * K)), 1e-6);
    double *r = gpu_expected<double>(lines);
    for (int i = 0; i < lines; i++) {
        double v = 0;
        for (int j = 0; j < n; j++) {
            double e = restore * x[by_row ? (size_t)i * K + j : (size_t)j * K + i];
            v += e * e / n;
        }
        second[i] = (float)(beta2 * second[i] + (1 - beta2) * v);
        r[i] = 1 / sqrt(fmax(second[i], 1e-10));
        before += n * v, after += n * v * r[i] * r[i];
    }
    double keep = restore * sqrt(before) / fmax(sqrt(after), 1e-10);
    for (int i = 0; i < R * K; i++) x[i] = (float)(keep * r[by_row ? i / K : i % K] * x[i]);
}

static void check_parts(Shape s) {
    Case c;
    case_init(&c, &s, 1, 1, MUON_SCRATCH);
    const MuonShape *m = &c.muon.shape[0];
    size_t n = (size_t)s.R * s.K, side = s.R < s.K ? s.R : s.K, bytes = n * sizeof(float);
    float *expected = gpu_expected(n), *scratch = gpu_expected(n + 2 * side * side);
    float *before = gpu_expected(n), lr = lr_of(&c, &s);
    cpu::MuonScratch twin = {expected, scratch, scratch + n, scratch + n + side * side};
    fresh_gradients(&c, 1);
    memcpy(before, c.params.host, bytes);
    expect_begin(&c, c.grads.host, c.first.host, expected, s.R, s.K);
    muon_begin(m, c.arena, c.step, 0, 1, 0);
    GpuArray<floatX> x = {m->x, gpu_expected(n), n, "X", 0};
    check_near("X", &s, gpu_read(x), gpu_copy<floatX>("expected", expected, n).host, n,
               TOLERANCE_ROUNDED);

    memcpy(expected, x.host, bytes);
    cpu::muon_polar_express(&twin, s.R, s.K);  // its division is by 1 here: gradients are large
    x.device = (floatX *)muon_polar_express(m, &matmul_context, 1, 0);
    check_near("polar X", &s, gpu_read(x), expected, n, TOLERANCE_POLAR);

    memcpy(expected, x.host, bytes);
    expect_end(&c, expected, c.second.host, s.R, s.K);
    float *second = gpu_expected(m->lines);
    memcpy(second, c.second.host, m->lines * sizeof(float));
    muon_end(m, x.device, c.arena, c.step, 0, 1, 0);
    check_near("second", &s, gpu_read(c.second), second, m->lines, TOLERANCE_FP32);
    check_change(&s, before, gpu_read(c.params), expected, lr, lr * c.host.wd, TOLERANCE_CHANGE);
    case_free(&c);
}

TEST(parts) {
    for (int i = 0; i < last_shape(); i++) check_parts(shapes[i]);
}

// ---------------------------------------------------------------------------------------------
// What must hold exactly.

// With no gradient yet X is exactly 0: only decay moves w, s only falls.
TEST(zero_gradient) {
    Case c;
    case_init(&c, model, 4, 2, MUON_SCRATCH);
    CUDA_CHECK(cudaMemset(c.grads.device, 0, c.table.numel * sizeof(float)));
    CUDA_CHECK(cudaMemset(c.first.device, 0, c.table.numel * sizeof(float)));
    float *before = gpu_expected(c.table.numel), *second = gpu_expected(c.table.state_numel);
    float *zero = gpu_expected(c.table.numel);
    memcpy(before, c.params.host, c.table.numel * sizeof(float));
    memcpy(second, c.second.host, c.table.state_numel * sizeof(float));
    for (size_t i = 0; i < c.table.state_numel; i++) second[i] *= c.host.beta2;
    update(&c.muon, c.arena, c.step);
    gpu_compare(c.first, zero, 1, (int)c.table.numel, "zero gradient");
    gpu_read(c.params), gpu_read(c.second);
    for (int i = 0; i < c.table.count; i++) {
        const Tensor *t = &c.table.tensor[i];
        Shape s = {t->rows, t->cols, false};
        if (t->group != GROUP_MATRIX) continue;
        float lr = lr_of(&c, &s);
        check_change(&s, before + t->offset, c.params.host + t->offset, zero, lr, lr * c.host.wd,
                     TOLERANCE_CHANGE);
        check_near("second", &s, c.second.host + t->state, second + t->state, t->state_count,
                   TOLERANCE_FP32);
    }
    case_free(&c);
}

// All that an update may change: parameters, momentum, second states, working copies.
static float *snapshot(Case *c) {
    size_t numel = c->table.numel, bytes = numel * sizeof(float);
    float *all = gpu_expected(3 * numel + c->table.state_numel);
    memcpy(all, gpu_read(c->params), bytes), memcpy(all + numel, gpu_read(c->first), bytes);
    memcpy(all + 2 * numel, gpu_read(c->weights), bytes);
    memcpy(all + 3 * numel, gpu_read(c->second), c->table.state_numel * sizeof(float));
    return all;
}

static void upload(GpuArray<float> &x, const float *from) {
    CUDA_CHECK(cudaMemcpy(x.device, from, x.count * sizeof(float), cudaMemcpyHostToDevice));
}

// Twice from the same state: the same bits. And with skip set: the bits that were there.
TEST(same_bits_and_skip) {
    Case c;
    case_init(&c, model, 4, 3, MUON_SCRATCH);
    size_t numel = c.table.numel, bytes = (3 * numel + c.table.state_numel) * sizeof(float);
    fresh_gradients(&c, 1e-3);
    float *start = snapshot(&c);
    update(&c.muon, c.arena, c.step);
    float *once = snapshot(&c);
    CHECK(memcmp(start, once, bytes));
    upload(c.params, start), upload(c.first, start + numel), upload(c.second, start + 3 * numel);
    update(&c.muon, c.arena, c.step);
    CHECK(!memcmp(once, snapshot(&c), bytes));
    c.host.skip = 1;
    CUDA_CHECK(cudaMemcpy(c.step, &c.host, sizeof c.host, cudaMemcpyHostToDevice));
    fresh_gradients(&c, 1e-3);
    update(&c.muon, c.arena, c.step);
    CHECK(!memcmp(once, snapshot(&c), bytes));
    case_free(&c);
}

// The tensors of a model of an even depth, its vocabulary small: tables are AdamW's.
static void model_table(Table *t, ShardPlan *plan, int depth) {
    Config c;
    memset(&c, 0, sizeof c);
    c.L = depth, c.C = 64 * depth, c.F = 4 * c.C, c.H = c.C / 128, c.V = c.Vp = 128;
    table_init(t, &c);
    shard_init(plan, t, 0, 1);
}

TEST(memory_is_bounded) {
    Table t;
    ShardPlan plan;
    model_table(&t, &plan, 48);
    CHECK(muon_bytes(&plan, MUON_SCRATCH) <= (size_t)MUON_SCRATCH + (1 << 16));
    CHECK(muon_bytes(&plan, 1) >= sizeof(floatX) * 2 * 3072 * 12288);  // one matrix at least
    CHECK(muon_bytes(&plan, 1) < muon_bytes(&plan, MUON_SCRATCH));
    shard_free(&plan), table_free(&t);
}

// ---------------------------------------------------------------------------------------------
// Speed. What is taken here the process' end gives back.

static __global__ void fill(float *x, size_t count, float scale) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    unsigned h = (unsigned)i * 2654435761u;
    h = (h ^ h >> 15) * 2246822519u, h ^= h >> 13;
    x[i] = scale * ((float)h * 0x1p-31f - 1);
}

static float *filled(size_t count, float scale) {
    float *x;
    CUDA_CHECK(cudaMalloc((void **)&x, count * sizeof(float)));
    fill<<<(unsigned)ceil_div(count, (size_t)256), 256>>>(x, count, scale);
    CUDA_LAUNCHED();
    return x;
}

// Milliseconds of a run of `body`, after one that warms up.
template <class Body> static double bench_ms(Body body) {
    const int runs = 10;
    body();
    CUDA_CHECK(cudaDeviceSynchronize());
    double start = test_seconds();
    for (int i = 0; i < runs; i++) body();
    CUDA_CHECK(cudaDeviceSynchronize());
    return 1e3 * (test_seconds() - start) / runs;
}

static StepState *bench_step(void) {
    StepState host, *step;
    memset(&host, 0, sizeof host);
    host.momentum = 0.95f, host.beta2 = 0.9f, host.lr = 1e-4f, host.grad_scale = 1;
    host.adamw[GROUP_WTE] = {1e-4f, 1, 1, 0.8f, 0.95f, 1e-10f};
    CUDA_CHECK(cudaMalloc((void **)&step, sizeof *step));
    CUDA_CHECK(cudaMemcpy(step, &host, sizeof host, cudaMemcpyHostToDevice));
    return step;
}

// An update of all matrices of a model, and what of it is not products.
static void bench_muon(int depth) {
    Table t;
    ShardPlan plan;
    Muon m;
    model_table(&t, &plan, depth);
    muon_init(&m, &test_gpu, &plan, MUON_SCRATCH);
    double matrices = 0;
    for (int i = 0; i < t.count; i++)
        if (t.tensor[i].group == GROUP_MATRIX) matrices += (double)tensor_numel(&t.tensor[i]);
    MuonArenas a = {filled(t.numel, 0.05f), NULL, filled(t.numel, 1e-3f), filled(t.numel, 1e-3f),
                    filled(t.state_numel, 1e-3f)};
    if (sizeof(floatX) == 2) a.weights = (floatX *)filled(t.numel / 2 + 1, 0);
    StepState *step = bench_step();
    double ms = bench_ms([&] { update(&m, a, step); });
    double rest = bench_ms([&] {
        for (const MuonShape *s = m.shape; s < m.shape + m.shapes; s++)
            for (int from = 0; !s->gate && from < s->count; from += s->batch) {
                int batch = s->count - from < s->batch ? s->count - from : s->batch;
                muon_begin(s, a, step, from, batch, 0);
                muon_end(s, s->x, a, step, from, batch, 0);
            }
    });
    printf("Muon d%d, %.0fM: %.3f ms; products %.3f ms, %.0f TFLOP/s; the rest %.3f ms, %.0f GB/s; "
           "%.0f MB of scratch\n",
           depth, 1e-6 * matrices, ms, ms - rest, 1e-9 * muon_flops(&m) / (ms - rest), rest,
           1e-6 * (sizeof(floatX) == 2 ? 36 : 40) * matrices / rest,
           1e-6 * (double)muon_bytes(&plan, MUON_SCRATCH));
    shard_free(&plan), table_free(&t);
}

static void bench_adamw(size_t count) {
    float *p = filled(count, 1), *m = filled(count, 1e-3f), *v = filled(count, 0);
    float *g = filled(count, 1e-3f);
    floatX *w = sizeof(floatX) == 2 ? (floatX *)filled(count / 2 + 1, 0) : NULL;
    StepState *step = bench_step();
    double ms = bench_ms([&] { adamw_update(p, w, m, v, g, step, GROUP_WTE, count, 0); });
    printf("AdamW, %.0fM: %.3f ms, %.0f GB/s\n", 1e-6 * (double)count, ms,
           1e-6 * (w ? 30 : 28) * (double)count / ms);
    double *partial;
    CUDA_CHECK(cudaMalloc((void **)&partial, sizeof *partial * (size_t)grad_norm_chunks(count)));
    ms = bench_ms([&] { grad_norm_add(partial, g, count, 0); });
    printf("sum of squares: %.3f ms, %.0f GB/s\n", ms, 4e-6 * (double)count / ms);
}

int main(int argc, char **argv) {
    gpu_test_begin();
    matmul_init(&matmul_context, &test_gpu);
    if (argc > 1 && !strcmp(argv[1], "bench")) {
        printf("%s, %s\n", test_gpu.name, PRECISION_NAME);
        bench_adamw(309000000), bench_muon(12), bench_muon(24);
        return 0;
    }
    RUN(gates);
    RUN(single_shapes);
    RUN(batches_and_chunks);
    RUN(parts);
    RUN(zero_gradient);
    RUN(same_bits_and_skip);
    RUN(memory_is_bounded);
    matmul_free(&matmul_context);
    return test_end();
}
