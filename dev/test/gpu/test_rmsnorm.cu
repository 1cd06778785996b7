// test_rmsnorm.cu: the norm's backward (llmc/rmsnorm.cuh); forward is in test_residual.cu.
#include "dev/test/gpu/test_tokens.cuh"
#include "llmc/rmsnorm.cuh"  // norm_backward

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

TEST(backward) { each_shape(check_backward); }

static void lines(int n, int C) {
    size_t nC = (size_t)n * C;
    floatX *x = bench_array<floatX>(nC), *y = bench_array<floatX>(nC),
           *dx = bench_array<floatX>(nC);
    float *r = bench_array<float>(n);
    bench("norm_backward", n, C, 3, [=] { norm_backward(dx, x, y, r, n, C, 0); });
}

int main(int argc, char **argv) {
    gpu_test_begin();
    bench_if_asked(argc, argv, lines);
    RUN(backward);
    return test_end();
}
