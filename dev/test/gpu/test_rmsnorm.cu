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

TEST(beyond_2_31_elements) {
    Large m = large_matrix(CHANNELS_MAX);
    if (grid_small) SKIP("GRID=small");
    if (!gpu_has_room(3 * m.count * sizeof(floatX))) SKIP("too little GPU memory");
    floatX *dx = filled_array<floatX>(m.count), *dy = filled_array<floatX>(m.count),
           *y = filled_array<floatX>(m.count);
    float *r = filled_array<float>((size_t)m.rows);
    norm_backward(dx, dy, y, r, m.rows, m.cols, 0);
    for (int i = 0; i < WINDOWS; i++) {
        GpuArray<floatX> out = large_window("dx", dx, &m, i, m.cols),
                         in = large_window("dy", dy, &m, i, m.cols),
                         of_y = large_window("y", y, &m, i, m.cols);
        GpuArray<float> of_r = large_window("r", r, &m, i, 1);
        float *expected = gpu_expected(in.count);
        cpu::norm_backward(expected, in.host, of_y.host, of_r.host, WINDOW_ROWS, m.cols, false);
        gpu_compare(out, expected, WINDOW_ROWS, m.cols, "rows from %d", m.window[i]);
    }
    gpu_end_case();
}

static void lines(int n, int C) {
    size_t nC = (size_t)n * C;
    floatX *x = filled_array<floatX>(nC), *y = filled_array<floatX>(nC),
           *dx = filled_array<floatX>(nC);
    float *r = filled_array<float>(n);
    bench("norm_backward", n, C, 3, [=] { norm_backward(dx, x, y, r, n, C, 0); });
}

int main(int argc, char **argv) {
    gpu_test_begin();
    bench_if_asked(argc, argv, lines);
    RUN(backward);
    RUN(beyond_2_31_elements);
    return test_end();
}
