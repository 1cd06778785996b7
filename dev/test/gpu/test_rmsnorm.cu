// test_rmsnorm.cu: norms (llmc/rmsnorm.cuh).
#include "dev/test/gpu/test_tokens.cuh"
#include "llmc/rmsnorm.cuh"  // norm_forward, norm_backward

static void check_forward(int n, int C) {
    size_t nC = (size_t)n * C;
    GpuArray<floatX> x = gpu_normal<floatX>("x", nC, 3);
    GpuArray<floatX> y = gpu_poisoned<floatX>("y", nC);
    GpuArray<float> r = gpu_poisoned<float>("r", n);
    float *y_expected = gpu_expected(nC), *r_expected = gpu_expected(n);
    norm_forward(y.device, r.device, x.device, n, C, 0);
    cpu::norm_forward(y_expected, r_expected, x.host, n, C);
    gpu_compare(y, y_expected, n, C, "n %d, C %d", n, C);
    gpu_compare(r, r_expected, n, 1, "n %d, C %d", n, C);
    gpu_end_case();
}

// Written, and written over dy.
static void check_backward(int n, int C) {
    size_t nC = (size_t)n * C;
    GpuArray<floatX> dy = gpu_normal<floatX>("dy", nC, 1), y = gpu_normal<floatX>("y", nC, 1);
    GpuArray<float> r = gpu_random<float>("r", n, 0.1, 2);
    GpuArray<floatX> dx = gpu_poisoned<floatX>("dx", nC);
    float *expected = gpu_expected(nC);
    norm_backward(dx.device, dy.device, y.device, r.device, n, C, 0);
    cpu::norm_backward(expected, dy.host, y.host, r.host, n, C, false);
    gpu_compare(dx, expected, n, C, "n %d, C %d", n, C);
    norm_backward(dy.device, dy.device, y.device, r.device, n, C, 0);
    cpu::norm_backward(expected, dy.host, y.host, r.host, n, C, false);
    gpu_compare(dy, expected, n, C, "n %d, C %d, in place", n, C);
    gpu_end_case();
}

TEST(forward) { each_shape(check_forward); }
TEST(backward) { each_shape(check_backward); }

// A row of zeros has norm 0 and a factor that is finite; so do rows too small for a square of FP32.
TEST(zeros_and_tiny_numbers) {
    for (double size : {0.0, 1e-25}) {
        int n = 3, C = 768;
        GpuArray<floatX> x = gpu_normal<floatX>("x", n * C, size);
        GpuArray<floatX> y = gpu_poisoned<floatX>("y", n * C);
        GpuArray<float> r = gpu_poisoned<float>("r", n);
        float *y_expected = gpu_expected(n * C), *r_expected = gpu_expected(n);
        norm_forward(y.device, r.device, x.device, n, C, 0);
        cpu::norm_forward(y_expected, r_expected, x.host, n, C);
        gpu_compare(y, y_expected, n, C, "numbers of size %g", size);
        gpu_compare(r, r_expected, n, 1, "numbers of size %g", size);
        gpu_end_case();
    }
}

static void lines(int n, int C) {
    size_t nC = (size_t)n * C;
    floatX *x = bench_array<floatX>(nC), *y = bench_array<floatX>(nC),
           *dx = bench_array<floatX>(nC);
    float *r = bench_array<float>(n);
    bench("norm_forward", n, C, 2, [=] { norm_forward(y, r, x, n, C, 0); });
    bench("norm_backward", n, C, 3, [=] { norm_backward(dx, x, y, r, n, C, 0); });
}

int main(int argc, char **argv) {
    gpu_test_begin();
    bench_if_asked(argc, argv, lines);
    RUN(forward);
    RUN(backward);
    RUN(zeros_and_tiny_numbers);
    return test_end();
}
