// test_residual.cu: the sums of the residual stream and their norms (llmc/residual.cuh).
#include "dev/test/gpu/test_tokens.cuh"
#include "llmc/residual.cuh"  // Residual, mix_norm_*, residual_norm_*, add_forward

static const float lambda = 1.125f, lambda0 = -0.3f, before = 3;  // before: what gradients hold

// sum |a_i b_i|: what <a, b> is held against.
static float sum_of_sizes(const float *a, const float *b, size_t count) {
    double sum = 0;
    for (size_t i = 0; i < count; i++) sum += fabs((double)a[i] * b[i]);
    return (float)sum;
}

// A residual stream, and its sum as the CPU makes it.
typedef struct {
    GpuArray<floatX> x;
    Residual sum;
    float *expected;  // (count)
} Stream;

// parts: how many of x, a and b are there.
static Stream stream_normal(size_t count, int parts) {
    GpuArray<floatX> x = gpu_normal<floatX>("x", count, 3);
    GpuArray<floatX> a = gpu_normal<floatX>("a", count, 1), b = gpu_normal<floatX>("b", count, 1);
    float *expected = gpu_expected(count);
    memcpy(expected, x.host, count * sizeof *expected);
    if (parts > 1) cpu::add_forward(expected, a.host, (int64_t)count);
    if (parts > 2) cpu::add_forward(expected, b.host, (int64_t)count);
    return {x, {x.device, parts > 1 ? a.device : NULL, parts > 2 ? b.device : NULL}, expected};
}

// An x_in as mix_norm keeps it: on the device X_IN_SCALE times what the host has.
static GpuArray<floatX> x_in_normal(const char *name, size_t count, double std) {
    GpuArray<floatX> x = gpu_normal<floatX>(name, count, X_IN_SCALE * std);
    for (size_t i = 0; i < count; i++) x.host[i] /= X_IN_SCALE;
    return x;
}

// parts 1: a first layer, whose stream is x0 and whose x_in is not kept. Else x is made in place.
static void check_mix_forward(int n, int C, int parts) {
    size_t nC = (size_t)n * C;
    Stream in = stream_normal(nC, parts);
    GpuArray<floatX> x0 = parts == 1 ? in.x : gpu_normal<floatX>("x0", nC, 1);
    GpuArray<float> l = gpu_copy<float>("lambda", &lambda, 1);
    GpuArray<float> l0 = gpu_copy<float>("lambda0", &lambda0, 1);
    GpuArray<floatX> x = parts == 1 ? gpu_poisoned<floatX>("x", nC) : in.x;
    GpuArray<floatX> x_in = gpu_poisoned<floatX>("x_in", nC), h = gpu_poisoned<floatX>("h", nC);
    GpuArray<float> r = gpu_poisoned<float>("r", n);
    float *x_expected = gpu_expected(nC), *h_expected = gpu_expected(nC);
    float *r_expected = gpu_expected(n);
    mix_norm_forward(x.device, parts == 1 ? NULL : x_in.device, h.device, r.device, in.sum,
                     x0.device, l.device, l0.device, n, C, 0);
    cpu::mix_forward(x_expected, in.expected, x0.host, lambda, lambda0, (int64_t)nC);
    cpu::norm_forward(h_expected, r_expected, x_expected, n, C);
    gpu_compare(x, x_expected, n, C, "n %d, C %d, parts %d", n, C, parts);
    for (size_t i = 0; i < nC; i++) in.expected[i] *= X_IN_SCALE;
    if (parts > 1) gpu_compare(x_in, in.expected, n, C, "n %d, C %d, parts %d", n, C, parts);
    gpu_compare(h, h_expected, n, C, "n %d, C %d, parts %d", n, C, parts);
    gpu_compare(r, r_expected, n, 1, "n %d, C %d, parts %d", n, C, parts);
    gpu_end_case();
}

enum { LAYER_FIRST = 1, LAYER_LAST = 2 };

// In the first layer x_in is x0, and no dx_in is left; the last writes dx0, which is poisoned.
static void check_mix_backward(int n, int C, int layer) {
    size_t nC = (size_t)n * C;
    GpuArray<floatX> x0 = gpu_normal<floatX>("x0", nC, 1);
    bool first = layer & LAYER_FIRST, last = layer & LAYER_LAST;
    GpuArray<floatX> x_in = first ? x0 : x_in_normal("x_in", nC, 1);
    GpuArray<floatX> dh = gpu_normal<floatX>("dh", nC, 1), h = gpu_normal<floatX>("h", nC, 1);
    GpuArray<floatX> dx = gpu_normal<floatX>("dx", nC, 1);
    GpuArray<floatX> dx0 =
        last ? gpu_poisoned<floatX>("dx0", nC) : gpu_normal<floatX>("dx0", nC, 1);
    GpuArray<floatX> dx_mlp = gpu_normal<floatX>("dx_mlp", nC, 1);
    GpuArray<float> r = gpu_random<float>("r", n, 0.5, 2);
    GpuArray<float> l = gpu_copy<float>("lambda", &lambda, 1);
    GpuArray<float> l0 = gpu_copy<float>("lambda0", &lambda0, 1);
    GpuArray<float> dl = gpu_copy<float>("dlambda", &before, 1);
    GpuArray<float> dl0 = gpu_copy<float>("dlambda0", &before, 1);
    void *scratch = gpu_bytes("scratch", residual_scratch_bytes(n, C));

    float *d = gpu_expected(nC), *d0 = gpu_expected(nC), dlambda = before, dlambda0 = before;
    memcpy(d, dx.host, nC * sizeof *d);
    if (!last) memcpy(d0, dx0.host, nC * sizeof *d0);
    cpu::add_forward(d, dx_mlp.host, (int64_t)nC);
    cpu::norm_backward(d, dh.host, h.host, r.host, n, C, true);
    float size = sum_of_sizes(d, x_in.host, nC), size0 = sum_of_sizes(d, x0.host, nC);
    cpu::mix_backward(d, d0, &dlambda, &dlambda0, d, x_in.host, x0.host, lambda, lambda0,
                      gpu_expected<double>(n), n, C);
    if (first) cpu::add_forward(d0, d, (int64_t)nC);
    mix_norm_backward(first ? NULL : dx.device, dx0.device, dl.device, dl0.device, dx.device,
                      dx_mlp.device, dh.device, h.device, r.device, x_in.device, x0.device,
                      l.device, l0.device, !last, scratch, n, C, 0);
    char shape[80];
    snprintf(shape, sizeof shape, "n %d, C %d, first %d, last %d", n, C, first, last);
    if (first)
        gpu_compare(dx, dx.host, n, C, "%s", shape);  // as it was
    else
        gpu_compare(dx, d, n, C, "%s", shape);
    gpu_compare(dx0, d0, n, C, "%s", shape);
    gpu_compare_sums(dl, &dlambda, &size, 1, shape);
    gpu_compare_sums(dl0, &dlambda0, &size0, 1, shape);
    gpu_end_case();
}

static void check_mix(int n, int C) {
    for (int parts : {1, 2, 3}) check_mix_forward(n, C, parts);
    for (int layer = 0; layer < 4; layer++) check_mix_backward(n, C, layer);
}

static void check_residual_forward(int n, int C, int parts) {
    size_t nC = (size_t)n * C;
    Stream in = stream_normal(nC, parts);
    GpuArray<floatX> h = gpu_poisoned<floatX>("h", nC);
    GpuArray<float> r = gpu_poisoned<float>("r", n);
    float *h_expected = gpu_expected(nC), *r_expected = gpu_expected(n);
    residual_norm_forward(h.device, r.device, in.sum, n, C, 0);
    cpu::norm_forward(h_expected, r_expected, in.expected, n, C);
    gpu_compare(h, h_expected, n, C, "n %d, C %d, parts %d", n, C, parts);
    gpu_compare(r, r_expected, n, 1, "n %d, C %d, parts %d", n, C, parts);
    gpu_end_case();
}

static void check_residual_backward(int n, int C) {
    size_t nC = (size_t)n * C;
    GpuArray<floatX> dh = gpu_normal<floatX>("dh", nC, 1), h = gpu_normal<floatX>("h", nC, 1);
    GpuArray<floatX> dx = gpu_normal<floatX>("dx", nC, 1);
    GpuArray<float> r = gpu_random<float>("r", n, 0.5, 2);
    GpuArray<floatX> da = gpu_poisoned<floatX>("da", nC);
    GpuArray<floatX> dx_mlp = gpu_poisoned<floatX>("dx_mlp", nC);
    float *da_expected = gpu_expected(nC), *mlp_expected = gpu_expected(nC);
    residual_norm_backward(da.device, dx_mlp.device, dx.device, dh.device, h.device, r.device, n, C,
                           0);
    cpu::norm_backward(mlp_expected, dh.host, h.host, r.host, n, C, false);
    memcpy(da_expected, mlp_expected, nC * sizeof *da_expected);
    cpu::add_forward(da_expected, dx.host, (int64_t)nC);
    gpu_compare(dx_mlp, mlp_expected, n, C, "n %d, C %d", n, C);
    gpu_compare(da, da_expected, n, C, "n %d, C %d", n, C);
    gpu_end_case();
}

static void check_residual(int n, int C) {
    for (int parts : {1, 2, 3}) check_residual_forward(n, C, parts);
    check_residual_backward(n, C);
}

// has: there is an x_middle.
static void check_backout_forward(int n, int C, int parts, bool has) {
    size_t nC = (size_t)n * C;
    Stream in = stream_normal(nC, parts);
    GpuArray<floatX> middle = x_in_normal("x_middle", nC, 2);
    GpuArray<float> l = gpu_copy<float>("lambda", &lambda, 1);
    GpuArray<floatX> hf = gpu_poisoned<floatX>("hf", nC);
    GpuArray<float> rf = gpu_poisoned<float>("rf", n);
    float *y = gpu_expected(nC), *hf_expected = gpu_expected(nC), *rf_expected = gpu_expected(n);
    backout_norm_forward(hf.device, rf.device, in.sum, has ? middle.device : NULL,
                         has ? l.device : NULL, n, C, 0);
    cpu::backout_forward(y, in.expected, middle.host, has ? lambda : 0, (int64_t)nC);
    cpu::norm_forward(hf_expected, rf_expected, y, n, C);
    gpu_compare(hf, hf_expected, n, C, "n %d, C %d, parts %d, backout %d", n, C, parts, has);
    gpu_compare(rf, rf_expected, n, 1, "n %d, C %d, parts %d, backout %d", n, C, parts, has);
    gpu_end_case();
}

static void check_backout_backward(int n, int C, bool has) {
    size_t nC = (size_t)n * C;
    GpuArray<floatX> dhf = gpu_normal<floatX>("dhf", nC, 1), hf = gpu_normal<floatX>("hf", nC, 1);
    GpuArray<floatX> middle = x_in_normal("x_middle", nC, 2);
    GpuArray<float> rf = gpu_random<float>("rf", n, 0.5, 2);
    GpuArray<float> l = gpu_copy<float>("lambda", &lambda, 1);
    GpuArray<float> dl = gpu_copy<float>("dlambda", &before, 1);
    GpuArray<floatX> dx = gpu_poisoned<floatX>("dx", nC);
    GpuArray<floatX> dx_middle = gpu_poisoned<floatX>("dx_middle", nC);
    void *scratch = gpu_bytes("scratch", residual_scratch_bytes(n, C));

    float *d = gpu_expected(nC), *d_middle = gpu_expected(nC), dlambda = before;
    cpu::norm_backward(d, dhf.host, hf.host, rf.host, n, C, false);
    float size = has ? sum_of_sizes(d, middle.host, nC) : 0;
    if (has)
        cpu::backout_backward(d_middle, &dlambda, d, middle.host, lambda, gpu_expected<double>(n),
                              n, C);
    backout_norm_backward(dx.device, has ? dx_middle.device : NULL, dl.device, dhf.device,
                          hf.device, rf.device, has ? middle.device : NULL, l.device, scratch, n, C,
                          0);
    char shape[80];
    snprintf(shape, sizeof shape, "n %d, C %d, backout %d", n, C, has);
    gpu_compare(dx, d, n, C, "%s", shape);
    if (has) gpu_compare(dx_middle, d_middle, n, C, "%s", shape);
    gpu_compare_sums(dl, &dlambda, &size, 1, shape);
    gpu_end_case();
}

static void check_backout(int n, int C) {
    for (bool has : {false, true}) {
        check_backout_forward(n, C, has ? 3 : 2, has);
        check_backout_backward(n, C, has);
    }
}

// A row of zeros has norm 0 and a factor that is finite; so do rows too small for a square of FP32.
TEST(zeros_and_tiny_numbers) {
    for (double size : {0.0, 1e-25}) {
        int n = 3, C = 768;
        GpuArray<floatX> x = gpu_normal<floatX>("x", n * C, size);
        GpuArray<floatX> h = gpu_poisoned<floatX>("h", n * C);
        GpuArray<float> r = gpu_poisoned<float>("r", n);
        float *h_expected = gpu_expected(n * C), *r_expected = gpu_expected(n);
        residual_norm_forward(h.device, r.device, {x.device, NULL, NULL}, n, C, 0);
        cpu::norm_forward(h_expected, r_expected, x.host, n, C);
        gpu_compare(h, h_expected, n, C, "numbers of size %g", size);
        gpu_compare(r, r_expected, n, 1, "numbers of size %g", size);
        gpu_end_case();
    }
}

TEST(mix_norm) { each_shape(check_mix); }
TEST(residual_norm) { each_shape(check_residual); }
TEST(backout_norm) { each_shape(check_backout); }

// So many tokens that blocks take several in turn and their sums are many.
TEST(sums_over_many_tokens) {
    if (grid_small) SKIP("GRID=small");
    check_mix_backward(40000, 128, 0);
    check_mix_backward(5003, 1536, 0);
    check_backout_backward(40000, 128, true);
}

// At each width of a token: one warp, two, and as many as there can be.
TEST(same_bits_again) {
    for (int C : {768, 1536, CHANNELS_MAX}) {
        if (grid_small && C > 1536) continue;
        int n = grid_small ? 63 : 777;
        size_t nC = (size_t)n * C;
        GpuArray<floatX> x = gpu_normal<floatX>("x", nC, 1), dh = gpu_normal<floatX>("dh", nC, 1);
        GpuArray<float> r = gpu_random<float>("r", n, 0.5, 2);
        GpuArray<float> l = gpu_copy<float>("lambda", &lambda, 1);
        void *scratch = gpu_bytes("scratch", residual_scratch_bytes(n, C));
        GpuArray<floatX> dx[3], dx0[3], d[3], dxb[3];
        GpuArray<float> dl[3], dl0[3], dlb[3];
        for (int i = 0; i < 3; i++) {
            dx[i] = gpu_copy<floatX>("dx", dh.host, nC);
            dx0[i] = gpu_copy<floatX>("dx0", dh.host, nC);
            d[i] = gpu_poisoned<floatX>("dx", nC), dxb[i] = gpu_poisoned<floatX>("dxb", nC);
            for (GpuArray<float> *sum : {&dl[i], &dl0[i], &dlb[i]})
                *sum = gpu_copy<float>("dlambda", &before, 1);
            mix_norm_backward(dx[i].device, dx0[i].device, dl[i].device, dl0[i].device,
                              dx[i].device, dh.device, dh.device, x.device, r.device, x.device,
                              dh.device, l.device, l.device, true, scratch, n, C, 0);
            backout_norm_backward(d[i].device, dxb[i].device, dlb[i].device, dh.device, x.device,
                                  r.device, dh.device, l.device, scratch, n, C, 0);
            CHECK(same_bits(dx[0], dx[i]) && same_bits(dx0[0], dx0[i]));
            CHECK(same_bits(d[0], d[i]) && same_bits(dxb[0], dxb[i]));
            CHECK(same_bits(dl[0], dl[i]) && same_bits(dl0[0], dl0[i]));
            CHECK(same_bits(dlb[0], dlb[i]));
        }
        gpu_end_case();
    }
}

// Twenty layers whose branches are a thousandth of x, when half an ulp of BF16 is two to four times
// as much: how much of them is there in the end, against sums in double? Added to x one by one and
// rounded each time, 0.37 of them would be.
// Of branches far below half an ulp of x, what is kept of x_in has neither less nor more, on
// average.
TEST(tiny_branches_are_kept_in_x_in) {
    int n = 1024, C = 768;
    float one = 1, zero = 0;
    size_t nC = (size_t)n * C;
    GpuArray<floatX> x = gpu_normal<floatX>("x", nC, 1), a = gpu_normal<floatX>("a", nC, 1e-4);
    GpuArray<floatX> h = gpu_poisoned<floatX>("h", nC), x_in = gpu_poisoned<floatX>("x_in", nC);
    GpuArray<float> l = gpu_copy<float>("lambda", &one, 1), r = gpu_poisoned<float>("r", n);
    GpuArray<float> l0 = gpu_copy<float>("lambda0", &zero, 1);
    float *start = gpu_expected(nC);
    memcpy(start, x.host, nC * sizeof *start);
    mix_norm_forward(x.device, x_in.device, h.device, r.device, {x.device, a.device, NULL},
                     x.device, l.device, l0.device, n, C, 0);
    gpu_read(x_in);
    double found = 0, expected = 0;
    for (size_t i = 0; i < nC; i++) {
        found += ((double)x_in.host[i] / X_IN_SCALE - start[i]) * a.host[i];
        expected += (double)a.host[i] * a.host[i];
    }
    CHECK_NEAR(found / expected, 1, 0.1);  // 0.02 is chance; a factor of 1.3 has 1.6
    gpu_end_case();
}

TEST(small_branches_are_kept) {
    int n = 16, C = 768;
    float scale = 1.05f, scale0 = 0.05f;
    size_t nC = (size_t)n * C;
    GpuArray<floatX> x = gpu_normal<floatX>("x", nC, 1), x0 = gpu_normal<floatX>("x0", nC, 1);
    GpuArray<floatX> a = gpu_normal<floatX>("a", nC, 1e-3), b = gpu_normal<floatX>("b", nC, 1e-3);
    GpuArray<floatX> h = gpu_poisoned<floatX>("h", nC), x_in = gpu_poisoned<floatX>("x_in", nC);
    GpuArray<float> l = gpu_copy<float>("lambda", &scale, 1), r = gpu_poisoned<float>("r", n);
    GpuArray<float> l0 = gpu_copy<float>("lambda0", &scale0, 1);
    double power = 1, sum = 0, sum0 = 0;  // what stream, branches and x0 have been multiplied by
    for (int layer = 0; layer < 20; layer++) {
        mix_norm_forward(x.device, layer ? NULL : x_in.device, h.device, r.device,
                         {x.device, a.device, b.device}, x0.device, l.device, l0.device, n, C, 0);
        power *= scale, sum = scale * (sum + 1), sum0 = scale * sum0 + scale0;
    }
    float *start = gpu_expected(nC);
    memcpy(start, x.host, nC * sizeof *start), gpu_read(x), gpu_read(x_in);
    double found = 0, expected = 0, found_in = 0, expected_in = 0;
    for (size_t i = 0; i < nC; i++) {
        double branch = (double)a.host[i] + b.host[i], branches = sum * branch;
        found_in += (x_in.host[i] / X_IN_SCALE - start[i]) * branch;
        expected_in += branch * branch;
        found += (x.host[i] - power * start[i] - sum0 * x0.host[i]) * branches;
        expected += branches * branches;
    }
    CHECK_NEAR(found / expected, 1, 0.02);
    CHECK_NEAR(found_in / expected_in, 1, 0.04);  // of the first layer's, in what is kept of it
    gpu_end_case();
}

TEST(add) {
    for (int count : {8, FLAT_BLOCK - 8, FLAT_BLOCK, FLAT_BLOCK + 8, 3 * FLAT_BLOCK + 1000}) {
        GpuArray<floatX> x = gpu_normal<floatX>("x", count, 1);
        GpuArray<floatX> y = gpu_normal<floatX>("y", count, 1);
        float *expected = gpu_expected(count);
        memcpy(expected, y.host, count * sizeof *expected);
        cpu::add_forward(expected, x.host, count);
        add_forward(y.device, x.device, count, 0);
        gpu_compare(y, expected, 1, count, "count %d", count);
        gpu_end_case();
    }
}

// The sum x + a, and a layer's start from it.
TEST(beyond_2_31_elements) {
    Large m = large_matrix(CHANNELS_MAX);
    if (grid_small) SKIP("GRID=small");
    if (!gpu_has_room(4 * m.count * sizeof(floatX))) SKIP("too little GPU memory");
    floatX *x = filled_array<floatX>(m.count), *x0 = filled_array<floatX>(m.count),
           *sum = filled_array<floatX>(m.count), *h = filled_array<floatX>(m.count);
    float *r = filled_array<float>((size_t)m.rows);
    GpuArray<float> l = gpu_copy<float>("lambda", &lambda, 1);
    GpuArray<float> l0 = gpu_copy<float>("lambda0", &lambda0, 1);
    GpuArray<floatX> before[WINDOWS];
    for (int i = 0; i < WINDOWS; i++) before[i] = large_window("x", x, &m, i, m.cols);
    CUDA_CHECK(cudaMemcpy(sum, x, m.count * sizeof *x, cudaMemcpyDeviceToDevice));
    add_forward(sum, x0, m.count, 0);
    mix_norm_forward(x, NULL, h, r, {x, x0, NULL}, x0, l.device, l0.device, m.rows, m.cols, 0);
    for (int i = 0; i < WINDOWS; i++) {
        GpuArray<floatX> x_mixed = large_window("x", x, &m, i, m.cols),
                         of_x0 = large_window("x0", x0, &m, i, m.cols),
                         of_sum = large_window("sum", sum, &m, i, m.cols),
                         of_h = large_window("h", h, &m, i, m.cols);
        GpuArray<float> of_r = large_window("r", r, &m, i, 1);
        float *added = before[i].host, *mixed = gpu_expected(of_h.count);
        float *h_expected = gpu_expected(of_h.count), *r_expected = gpu_expected(WINDOW_ROWS);
        cpu::add_forward(added, of_x0.host, (int64_t)of_h.count);
        cpu::mix_forward(mixed, added, of_x0.host, lambda, lambda0, (int64_t)of_h.count);
        cpu::norm_forward(h_expected, r_expected, mixed, WINDOW_ROWS, m.cols);
        gpu_compare(of_sum, added, WINDOW_ROWS, m.cols, "rows from %d", m.window[i]);
        gpu_compare(x_mixed, mixed, WINDOW_ROWS, m.cols, "rows from %d", m.window[i]);
        gpu_compare(of_h, h_expected, WINDOW_ROWS, m.cols, "rows from %d", m.window[i]);
        gpu_compare(of_r, r_expected, WINDOW_ROWS, 1, "rows from %d", m.window[i]);
    }
    gpu_end_case();
}

static void lines(int n, int C) {
    size_t nC = (size_t)n * C;
    floatX *a[7];
    for (floatX *&x : a) x = filled_array<floatX>(nC);
    float *r = filled_array<float>(n), *l = filled_array<float>(1), *dl = filled_array<float>(2);
    void *scratch = gpu_bytes("scratch", residual_scratch_bytes(n, C));
    Residual sum = {a[0], a[1], a[2]}, first = {a[0], a[1], NULL};
    bench("mix_norm_forward", n, C, 7,
          [=] { mix_norm_forward(a[3], a[4], a[5], r, sum, a[6], l, l, n, C, 0); });
    bench("mix_norm_backward", n, C, 9, [=] {
        mix_norm_backward(a[0], a[1], dl, dl + 1, a[0], a[2], a[3], a[4], r, a[5], a[6], l, l, true,
                          scratch, n, C, 0);
    });
    bench("residual_norm_forward", n, C, 3,
          [=] { residual_norm_forward(a[3], r, first, n, C, 0); });
    bench("residual_norm_backward", n, C, 5,
          [=] { residual_norm_backward(a[0], a[1], a[2], a[3], a[4], r, n, C, 0); });
    bench("backout_norm_forward", n, C, 5,
          [=] { backout_norm_forward(a[3], r, sum, a[4], l, n, C, 0); });
    bench("backout_norm_backward", n, C, 5,
          [=] { backout_norm_backward(a[0], a[1], dl, a[2], a[3], r, a[4], l, scratch, n, C, 0); });
    bench("add_forward", n, C, 3, [=] { add_forward(a[0], a[1], nC, 0); });
}

int main(int argc, char **argv) {
    gpu_test_begin();
    bench_if_asked(argc, argv, lines);
    RUN(zeros_and_tiny_numbers);
    RUN(mix_norm);
    RUN(residual_norm);
    RUN(backout_norm);
    RUN(sums_over_many_tokens);
    RUN(same_bits_again);
    RUN(tiny_branches_are_kept_in_x_in);
    RUN(small_branches_are_kept);
    RUN(add);
    RUN(beyond_2_31_elements);
    return test_end();
}
