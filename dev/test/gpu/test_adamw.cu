// test_adamw.cu: AdamW (llmc/adamw.cuh) against adamw_update of train_gpt2.c, and working copies.
#include "dev/test/gpu/test_tokens.cuh"
#include "llmc/adamw.cuh"  // adamw_update, weights_round

// Rounding a parameter may cost 1e-5 of what the step changes it by, and more where it is large
// beside its rate; the terms of the formula agree to 1e-6.
constexpr double TOLERANCE_CHANGE = 1e-4;

static Flags flags;
static Config config;
static Plan plan;

static StepState *upload(const StepState *host) {
    StepState *step = (StepState *)gpu_bytes("step", sizeof *step);
    CUDA_CHECK(cudaMemcpy(step, host, sizeof *step, cudaMemcpyHostToDevice));
    return step;
}

// What is held against what the twin has: the step's change of every parameter, and m, v.
static void check_change(const float *before, GpuArray<float> &p, const float *expected,
                         size_t count, const char *shape) {
    double error = 0, norm = 0, size = 0;
    const float *after = gpu_read(p);
    for (size_t i = 0; i < count; i++) {
        double change = (double)expected[i] - before[i], found = (double)after[i] - before[i];
        error += (found - change) * (found - change), norm += change * change;
        size += (double)before[i] * before[i];
    }
    double allowed = TOLERANCE_CHANGE * sqrt(norm) + 6e-8 * sqrt(size);
    test_check(sqrt(error) <= allowed, __FILE__, __LINE__,
               "change of p, %s: found an error of %.3g, allowed %.3g", shape, sqrt(error),
               allowed);
}

static void check_adamw(Group group, size_t count, float scale, int64_t it) {
    char shape[80];
    snprintf(shape, sizeof shape, "group %d, count %zu, step %d", group, count, (int)it);
    GpuArray<float> p = gpu_normal<float>("p", count, 0.1);
    GpuArray<float> m = gpu_normal<float>("m", count, 1e-3);
    GpuArray<float> v = gpu_random<float>("v", count, 0, 2e-6);
    GpuArray<floatX> w = gpu_poisoned<floatX>("w", count);
    float *before = gpu_expected(count), *p_expected = gpu_expected(count);
    float *m_expected = gpu_expected(count), *v_expected = gpu_expected(count);
    memcpy(m_expected, m.host, count * sizeof(float));
    memcpy(v_expected, v.host, count * sizeof(float));
    for (int64_t last = it + 3; it < last; it++) {
        GpuArray<float> g = gpu_normal<float>("g", count, 1e-3);
        memcpy(before, gpu_read(p), count * sizeof(float));
        memcpy(p_expected, before, count * sizeof(float));
        GroupNumbers k = plan_group(&plan, &flags, &config, group);
        double lr = schedule_lr(schedule_at(it, plan.steps, flags.warmup), k, group);
        cpu::adamw_update(p_expected, m_expected, v_expected, g.host, scale, k, lr, it + 1, count);
        StepState host;
        step_numbers(&host, &plan, &flags, &config, it);
        host.grad_scale = scale;
        adamw_update(p.device, sizeof(floatX) == 2 ? w.device : NULL, m.device, v.device, g.device,
                     upload(&host), group, count, 0);
        check_change(before, p, p_expected, count, shape);
        gpu_compare(m, m_expected, 1, (int)count, "%s", shape);
        gpu_compare(v, v_expected, 1, (int)count, "%s", shape);
    }
    gpu_read(p), gpu_read(w);
    for (size_t i = 0; sizeof(floatX) == 2 && i < count; i++)
        if (w.host[i] != __bfloat162float(__float2bfloat16_rn(p.host[i]))) {
            test_check(false, __FILE__, __LINE__, "w[%zu], %s: not p rounded", i, shape);
            break;
        }
    gpu_end_case();
}

TEST(against_the_twin) {
    for (size_t count : {1, 2, 3, 4, 7, 8, 9, 12, 24, 2047, 2048, 2049, 100003})
        check_adamw(GROUP_WTE, count, 1, 0);
    for (int group = 0; group < GROUP_COUNT; group++)
        if (group != GROUP_MATRIX) check_adamw((Group)group, 1000, 0.5, 30 * group);
}

// Rows of a table that no token has had, and its padding: p, m, v and g are 0, and p stays so.
TEST(padding_stays_zero) {
    StepState host;
    step_numbers(&host, &plan, &flags, &config, 0);
    float *zero = gpu_expected(1000);
    GpuArray<float> p = gpu_copy<float>("p", zero, 1000), m = gpu_copy<float>("m", zero, 1000);
    GpuArray<float> v = gpu_copy<float>("v", zero, 1000), g = gpu_copy<float>("g", zero, 1000);
    for (int group = 0; group < GROUP_COUNT; group++)
        if (group != GROUP_MATRIX)
            adamw_update(p.device, NULL, m.device, v.device, g.device, upload(&host), (Group)group,
                         1000, 0);
    gpu_compare(p, zero, 1, 1000, "zeros");
    gpu_compare(v, zero, 1, 1000, "zeros");
    gpu_end_case();
}

TEST(skip_changes_nothing) {
    const size_t count = 1003;
    StepState host;
    step_numbers(&host, &plan, &flags, &config, 5);
    host.skip = 1;
    GpuArray<float> p = gpu_normal<float>("p", count, 1), m = gpu_normal<float>("m", count, 1);
    GpuArray<float> v = gpu_random<float>("v", count, 0, 1), g = gpu_normal<float>("g", count, 1);
    GpuArray<floatX> w = gpu_normal<floatX>("w", count, 1);
    size_t bytes = count * sizeof(float);
    float *old = gpu_expected(4 * count);
    memcpy(old, p.host, bytes), memcpy(old + count, m.host, bytes);
    memcpy(old + 2 * count, v.host, bytes), memcpy(old + 3 * count, w.host, bytes);
    adamw_update(p.device, w.device, m.device, v.device, g.device, upload(&host), GROUP_WTE, count,
                 0);
    CHECK(!memcmp(old, gpu_read(p), bytes) && !memcmp(old + count, gpu_read(m), bytes));
    CHECK(!memcmp(old + 2 * count, gpu_read(v), bytes));
    CHECK(!memcmp(old + 3 * count, gpu_read(w), bytes));
    gpu_end_case();
}

TEST(rounding) {
    for (size_t count : {1, 7, 8, 9, 4096, 10001}) {
        GpuArray<float> p = gpu_normal<float>("p", count, 1);
        GpuArray<floatX> w = gpu_poisoned<floatX>("w", count);
        GpuArray<floatX> expected = gpu_copy<floatX>("expected", p.host, count);
        weights_round(w.device, p.device, count, 0);
        CHECK(!memcmp(gpu_read(w), expected.host, count * sizeof(float)));
        gpu_end_case();
    }
}

// The update of a table, and working copies made of it. Windows: p, m, v, g.
TEST(beyond_2_31_elements) {
    Large l = large_matrix(8192);
    if (grid_small) SKIP("GRID=small");
    if (!gpu_has_room(l.count * (4 * sizeof(float) + sizeof(floatX))))
        SKIP("too little GPU memory");
    float *array[4];
    for (float *&x : array) x = filled_array<float>(l.count);
    floatX *w = filled_array<floatX>(l.count);
    CUDA_CHECK(cudaMemset(array[2], 0, l.count * sizeof(float)));  // squares: not below 0
    GroupNumbers k = plan_group(&plan, &flags, &config, GROUP_WTE);
    double lr = k.lr * schedule_at(0, plan.steps, flags.warmup).lr;
    StepState host;
    step_numbers(&host, &plan, &flags, &config, 0);
    GpuArray<float> x[WINDOWS][4];
    for (int i = 0; i < WINDOWS; i++)
        for (int j = 0; j < 4; j++) x[i][j] = large_window("p, m, v, g", array[j], &l, i, l.cols);
    adamw_update(array[0], NULL, array[1], array[2], array[3], upload(&host), GROUP_WTE, l.count,
                 0);
    weights_round(w, array[0], l.count, 0);
    for (int i = 0; i < WINDOWS; i++) {
        cpu::adamw_update(x[i][0].host, x[i][1].host, x[i][2].host, x[i][3].host, 1, k, lr, 1,
                          x[i][0].count);
        for (int j = 0; j < 3; j++) {
            GpuArray<float> found = large_window("p, m, v", array[j], &l, i, l.cols);
            gpu_compare(found, x[i][j].host, WINDOW_ROWS, l.cols, "array %d, rows from %d", j,
                        l.window[i]);
        }
        GpuArray<floatX> copy = large_window("w", w, &l, i, l.cols);
        gpu_compare(copy, x[i][0].host, WINDOW_ROWS, l.cols, "rows from %d", l.window[i]);
    }
    gpu_end_case();
}

int main(void) {
    gpu_test_begin();
    Arg table[FLAGS_COUNT];
    char arg0[] = "test", *argv[] = {arg0};
    flags_parse(&flags, table, 1, argv);
    config = config_from_flags(&flags, -1, -1);
    plan = plan_from_flags(&flags, &config, 1, 8192);
    RUN(against_the_twin);
    RUN(padding_stays_zero);
    RUN(skip_changes_nothing);
    RUN(rounding);
    RUN(beyond_2_31_elements);
    return test_end();
}
