// test_step.cu: a step's numbers, the gradient's norm and the check (llmc/step.cuh).
#include "dev/test/gpu/test_gpu.cuh"
#include "llmc/step.cuh"  // step_numbers, grad_norm_add, step_check

// Sums of squares of one tensor, from chunks that grad_norm_add leaves.
static double norm_squares(const float *g, size_t count) {
    GpuArray<float> x = gpu_copy<float>("g", g, count);
    int chunks = grad_norm_chunks(count);
    double *partial = (double *)gpu_bytes("partial", sizeof(double) * chunks), sum = 0;
    double *host = gpu_expected<double>(chunks);
    grad_norm_add(partial, x.device, count, 0);
    CUDA_CHECK(cudaMemcpy(host, partial, sizeof(double) * chunks, cudaMemcpyDeviceToHost));
    for (int i = 0; i < chunks; i++) sum += host[i];
    return sum;
}

TEST(squares_of_a_tensor) {
    for (size_t count : {1, 2, 3, 4, 24, 65535, 65536, 65537, 200003}) {
        float *g = gpu_normal<float>("g", count, 1e-3).host;
        double expected = cpu::sum_squares(g, count);
        CHECK_NEAR(norm_squares(g, count), expected, 1e-12 * expected);
        gpu_end_case();
    }
}

TEST(squares_neither_overflow_nor_vanish) {
    float g[5] = {3e38f, -3e38f, 1e-40f, 0, 1};
    CHECK_NEAR(norm_squares(g, 5) / cpu::sum_squares(g, 5), 1, 1e-12);
    CHECK(norm_squares(g + 2, 1) > 0);
    g[3] = INFINITY;
    CHECK(isinf(norm_squares(g, 5)));
    g[3] = NAN;
    CHECK(isnan(norm_squares(g, 5)));
    gpu_end_case();
}

// What step_check makes of `tensors` tensors of 1, 2, 3, ... chunks. The squares of each sum to 1,
// but for bad0 and bad1, in which one is `value`.
typedef struct {
    StepState step;
    double sums;  // of what is told
} Checked;

static Checked check(int tensors, float clip, double loss, double value, int bad0, int bad1) {
    Checked result;
    int chunks = 0, *first = gpu_expected<int>(tensors + 1);
    double *partial = gpu_expected<double>((size_t)tensors * (tensors + 1) / 2);
    for (int t = 0; t < tensors; t++) {
        first[t] = chunks;
        for (int i = 0; i <= t; i++) partial[chunks++] = 1.0 / (t + 1);
        if (t == bad0 || t == bad1) partial[chunks - 1] = value;
    }
    first[tensors] = chunks;
    memset(&result.step, 0, sizeof result.step);
    result.step.clip = clip, result.step.loss_sum = loss;
    int *device_first = gpu_ints("first", first, tensors + 1);
    double *device_partial = (double *)gpu_bytes("partial", sizeof(double) * chunks);
    double *told = (double *)gpu_bytes("told", sizeof(double) * (TOLD_SQUARES + tensors));
    StepState *step = (StepState *)gpu_bytes("step", sizeof *step);
    CUDA_CHECK(
        cudaMemcpy(device_partial, partial, sizeof(double) * chunks, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(step, &result.step, sizeof *step, cudaMemcpyHostToDevice));
    step_tell(told, step, device_partial, device_first, tensors, 0);
    step_check(step, told, 1, tensors, 0);
    CUDA_CHECK(cudaMemcpy(&result.step, step, sizeof *step, cudaMemcpyDeviceToHost));
    double *host = gpu_expected<double>(tensors);
    CUDA_CHECK(
        cudaMemcpy(host, told + TOLD_SQUARES, sizeof(double) * tensors, cudaMemcpyDeviceToHost));
    result.sums = 0;
    for (int t = 0; t < tensors; t++) result.sums += host[t];
    gpu_end_case();
    return result;
}

TEST(norm_and_clip) {
    for (int tensors : {1, 2, 31, 32, 33, 110}) {
        double norm = sqrt(tensors);
        Checked c = check(tensors, 0, 5, 0, -1, -1);
        CHECK_NEAR(c.step.grad_norm, norm, 1e-12 * norm);
        CHECK_NEAR(c.sums, tensors, 1e-12 * tensors);
        CHECK_NEAR(c.step.grad_scale, 1, 0);  // off
        CHECK_INT(c.step.skip, 0);
        CHECK_NEAR(check(tensors, 0.25, 5, 0, -1, -1).step.grad_scale, 0.25 / (norm + 1e-6), 1e-7);
        CHECK_NEAR(check(tensors, 1000, 5, 0, -1, -1).step.grad_scale, 1, 0);
    }
}

TEST(not_finite) {
    for (double value : {(double)INFINITY, (double)NAN}) {
        Checked c = check(110, 0, 5, value, 70, 3);
        CHECK_INT(c.step.skip, 1);
        CHECK(!isfinite(c.step.grad_norm));
        CHECK_INT(check(110, 1, 5, value, 109, -1).step.skip, 1);
        CHECK_INT(check(1, 1, 5, value, 0, -1).step.skip, 1);
        CHECK_INT(check(110, 0, value, 0, -1, -1).step.skip, 1);  // the loss alone
    }
}

TEST(numbers_of_a_step) {
    Flags f;
    Arg table[FLAGS_COUNT];
    char arg0[] = "test", arg1[] = "--grad-clip", arg2[] = "0.5", *argv[] = {arg0, arg1, arg2};
    flags_parse(&f, table, 3, argv);
    Config c = config_from_flags(&f, -1, -1);
    Plan plan = plan_from_flags(&f, &c, 1, 8192);
    for (int64_t it : {(int64_t)0, (int64_t)17, plan.steps - 1}) {
        StepState s;
        memset(&s, 0xff, sizeof s);
        step_numbers(&s, &plan, &f, &c, it);
        Schedule now = schedule_at(it, plan.steps, f.warmup);
        GroupNumbers wte = plan_group(&plan, &f, &c, GROUP_WTE);
        GroupNumbers matrix = plan_group(&plan, &f, &c, GROUP_MATRIX);
        AdamwNumbers a = s.adamw[GROUP_WTE];
        double lr = wte.lr * now.lr, t = (double)it + 1;
        CHECK_NEAR(a.rate, (float)(lr / (1 - pow(0.8, t))), 0);
        CHECK_NEAR(a.shrink, (float)(1 - lr * 0.001), 0);
        CHECK_NEAR(a.v_unbias, (float)(1 / (1 - pow(0.995, t))), 0);
        CHECK(a.beta1 == 0.8f && a.beta2 == 0.995f && a.eps == 1e-10f);
        CHECK(s.adamw[GROUP_X0].beta1 == 0.96f && s.adamw[GROUP_SMEAR].eps == 1e-8f);
        CHECK((s.adamw[GROUP_X0].rate == 0) == (it == 0));
        CHECK(s.momentum == (float)now.momentum && s.beta2 == 0.9f);
        CHECK(s.lr == (float)(matrix.lr * now.lr) && s.wd == (float)(matrix.wd * now.wd));
        CHECK(s.clip == 0.5f && s.loss_sum == 0 && s.skip == 0);
        CHECK_INT(s.bad_row, INT_MAX);
    }
}

int main(void) {
    gpu_test_begin();
    RUN(squares_of_a_tensor);
    RUN(squares_neither_overflow_nor_vanish);
    RUN(norm_and_clip);
    RUN(not_finite);
    RUN(numbers_of_a_step);
    return test_end();
}
