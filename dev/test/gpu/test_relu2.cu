// test_relu2.cu: ReLU^2 (llmc/relu2.cuh).
#include "dev/test/gpu/test_tokens.cuh"
#include "llmc/relu2.cuh"  // relu2_forward, relu2_backward

static const int all_counts[] = {
    8, 16, FLAT_BLOCK - 8, FLAT_BLOCK, FLAT_BLOCK + 8, 5 * FLAT_BLOCK + 128, 1 << 20};

// Normal numbers, and every fifth of them 0.
static GpuArray<floatX> some_zeros(const char *name, int count) {
    GpuArray<floatX> x = gpu_normal<floatX>(name, count, 2);
    for (int i = 0; i < count; i += 5) x.host[i] = 0;
    return gpu_copy<floatX>(name, x.host, count);
}

TEST(forward) {
    for (int count : all_counts) {
        if (grid_small && count > 2 * FLAT_BLOCK) continue;
        GpuArray<floatX> x = some_zeros("x", count), y = gpu_copy<floatX>("y", x.host, count);
        float *expected = gpu_expected(count);
        relu2_forward(y.device, count, 0);
        cpu::relu2_forward(expected, x.host, count);
        gpu_compare(y, expected, 1, count, "count %d", count);
        for (int i = 0; i < count; i++)
            if ((x.host[i] <= 0) != (y.host[i] == 0)) {
                CHECK_INT(i, -1);  // 0 where x is not positive, and there only
                break;
            }
        gpu_end_case();
    }
}

// y as backward gets it, made from x by the twin.
static GpuArray<floatX> relu2_of(const GpuArray<floatX> &x) {
    float *y = gpu_expected(x.count);
    cpu::relu2_forward(y, x.host, (int64_t)x.count);
    return gpu_copy<floatX>("y", y, x.count);
}

TEST(backward) {
    for (int count : all_counts) {
        if (grid_small && count > 2 * FLAT_BLOCK) continue;
        GpuArray<floatX> x = some_zeros("x", count);
        GpuArray<floatX> dx = gpu_normal<floatX>("dx", count, 1);
        float *expected = gpu_expected(count);
        cpu::relu2_backward(expected, dx.host, x.host, count);
        relu2_backward(dx.device, relu2_of(x).device, count, 0);
        gpu_compare(dx, expected, 1, count, "count %d", count);
        for (int i = 0; i < count; i++)
            if (x.host[i] <= 0 && dx.host[i] != 0) {
                CHECK_INT(i, -1);  // 0 where x is not positive
                break;
            }
        gpu_end_case();
    }
}

// NaN stays NaN, wherever it is in a piece, and spoils nothing beside it.
TEST(not_finite) {
    int count = FLAT_BLOCK + 8;
    GpuArray<floatX> x = some_zeros("x", count), dx = gpu_normal<floatX>("dx", count, 1);
    for (int i = 3; i < count; i += 83) x.host[i] = i % 2 ? NAN : INFINITY;
    GpuArray<floatX> y = gpu_copy<floatX>("y", x.host, count);
    relu2_forward(y.device, count, 0);
    relu2_backward(dx.device, y.device, count, 0);
    gpu_read(y), gpu_read(dx);
    for (int i = 0; i < count; i++) {
        bool nan = isnan(x.host[i]), finite = isfinite(x.host[i]);
        if (isnan(y.host[i]) == nan && isnan(dx.host[i]) == nan && isfinite(y.host[i]) == finite &&
            isfinite(dx.host[i]) == finite)
            continue;
        CHECK_INT(i, -1);
        break;
    }
    gpu_end_case();
}

TEST(beyond_2_31_elements) {
    Large m = large_matrix(8192);
    if (grid_small) SKIP("GRID=small");
    if (!gpu_has_room(2 * m.count * sizeof(floatX))) SKIP("too little GPU memory");
    floatX *x = filled_array<floatX>(m.count), *dx = filled_array<floatX>(m.count);
    GpuArray<floatX> in[WINDOWS], dy[WINDOWS];
    for (int i = 0; i < WINDOWS; i++) {
        in[i] = large_window("x", x, &m, i, m.cols);
        dy[i] = large_window("dx", dx, &m, i, m.cols);
    }
    relu2_forward(x, m.count, 0);
    relu2_backward(dx, x, m.count, 0);
    for (int i = 0; i < WINDOWS; i++) {
        GpuArray<floatX> y = large_window("y", x, &m, i, m.cols),
                         d = large_window("dx", dx, &m, i, m.cols);
        float *expected = gpu_expected(y.count);
        cpu::relu2_forward(expected, in[i].host, (int64_t)y.count);
        gpu_compare(y, expected, WINDOW_ROWS, m.cols, "rows from %d", m.window[i]);
        cpu::relu2_backward(expected, dy[i].host, in[i].host, (int64_t)y.count);
        gpu_compare(d, expected, WINDOW_ROWS, m.cols, "rows from %d", m.window[i]);
    }
    gpu_end_case();
}

static void lines(int n, int C) {
    size_t count = (size_t)n * 4 * C;
    floatX *y = filled_array<floatX>(count), *dx = filled_array<floatX>(count);
    bench("relu2_forward", n, C, 2 * 4, [=] { relu2_forward(y, count, 0); });
    bench("relu2_backward", n, C, 3 * 4, [=] { relu2_backward(dx, y, count, 0); });
}

int main(int argc, char **argv) {
    gpu_test_begin();
    bench_if_asked(argc, argv, lines);
    RUN(forward);
    RUN(backward);
    RUN(not_finite);
    RUN(beyond_2_31_elements);
    return test_end();
}
