// test_rotary.cu: rotary positions and the norm of q and k (llmc/rotary.cuh).
#include "dev/test/gpu/test_tokens.cuh"
#include "llmc/rotary.cuh"  // qk_forward, qk_backward, rope_init

// Heads of whole pieces of 16 bytes, of one number's width, and of several pieces a lane; as many
// of them as one step of a warp takes, fewer, and more.
static const struct {
    int H, D;
} all_heads[] = {{1, 64}, {6, 128}, {12, 128}, {12, 64}, {5, 128}, {3, 32},  {3, 16},  {24, 2},
                 {4, 8},  {8, 6},   {2, 48},   {1, 96},  {2, 100}, {1, 256}, {1, 512}, {1, 1024}};

// Both programs' tables of (T, D/2).
typedef struct {
    float *cosine, *sine;  // the CPU's
    const float2 *angles;  // on the device
} Tables;

static Tables tables(int T, int D) {
    size_t count = (size_t)T * (size_t)(D / 2);
    Tables t = {gpu_expected(count), gpu_expected(count), NULL};
    cpu::rope_init(t.cosine, t.sine, T, D);
    t.angles = gpu_angles(t.cosine, t.sine, count);
    return t;
}

// Of rows of 3C, the last third is not touched.
static void check_v_untouched(const float *found, const float *before, int n, int C) {
    for (int t = 0; t < n; t++) {
        size_t v = (size_t)t * 3 * C + 2 * C;
        if (memcmp(found + v, before + v, sizeof(float) * C)) CHECK_INT(t, -1);
    }
}

// n tokens of rows of T; of a row shorter than T, which samples have, the CPU is told its length.
static void check(int n, int T, int H, int D) {
    int C = H * D, B = n < T ? 1 : n / T, length = n < T ? n : T;
    size_t count = (size_t)n * 3 * C;
    Tables tab = tables(T, D);
    GpuArray<floatX> qkv = gpu_normal<floatX>("qkv", count, 2);
    GpuArray<floatX> dqkv = gpu_normal<floatX>("dqkv", count, 1);
    GpuArray<float> r = gpu_poisoned<float>("r", (size_t)n * 2 * H);
    float *before = gpu_expected(count), *y = gpu_expected(count);
    float *r_expected = gpu_expected((size_t)n * 2 * H);
    memcpy(before, qkv.host, count * sizeof *before), memcpy(y, before, count * sizeof *y);
    cpu::qk_forward(y, r_expected, tab.cosine, tab.sine, B, length, H, D);
    qk_forward(qkv.device, r.device, tab.angles, n, T, H, D, 0);
    gpu_compare(qkv, y, n, 3 * C, "n %d, T %d, H %d, D %d", n, T, H, D);
    gpu_compare(r, r_expected, n, 2 * H, "n %d, T %d, H %d, D %d", n, T, H, D);
    check_v_untouched(qkv.host, before, n, C);

    // What forward left is what backward is given on both sides: qkv.host and r.host.
    float *d = gpu_expected(count);
    memcpy(before, dqkv.host, count * sizeof *before), memcpy(d, before, count * sizeof *d);
    cpu::qk_backward(d, qkv.host, r.host, tab.cosine, tab.sine, B, length, H, D);
    qk_backward(dqkv.device, qkv.device, r.device, tab.angles, n, T, H, D, 0);
    gpu_compare(dqkv, d, n, 3 * C, "n %d, T %d, H %d, D %d", n, T, H, D);
    check_v_untouched(dqkv.host, before, n, C);
    gpu_end_case();
}

TEST(heads) {
    for (auto h : all_heads)
        for (int n : {1, 63, 129})
            if (!grid_small || (n < 100 && h.D <= 128)) check(n, n, h.H, h.D);
}

TEST(lengths) {
    for (int n : {1, 2, 63, 64, 65, 127, 128, 129, 192, 1000})
        if (n <= (grid_small ? 65 : 1000)) check(n, n, 6, 128);
}

TEST(rows) {
    check(3 * 65, 65, 2, 64);
    check(4 * 16, 16, 3, 128);
    check(5, 64, 6, 128);  // shorter than a row
}

TEST(angles) {
    int T = 200, D = 64;
    size_t count = (size_t)T * (D / 2), wrong = 0;
    float2 *angles = (float2 *)gpu_expected(2 * count);
    Tables tab = tables(T, D);
    rope_init(angles, T, D);
    for (size_t i = 0; i < count; i++)
        wrong += angles[i].x != tab.cosine[i] || angles[i].y != tab.sine[i];
    CHECK_INT(wrong, 0);
    gpu_end_case();
}

TEST(beyond_2_31_elements) {
    int H = 64, D = 128, T = 2048;
    Large m = large_matrix(3 * H * D);
    if (grid_small) SKIP("GRID=small");
    if (!gpu_has_room(2 * m.count * sizeof(floatX))) SKIP("too little GPU memory");
    floatX *qkv = filled_array<floatX>(m.count), *dqkv = filled_array<floatX>(m.count);
    float *r = filled_array<float>((size_t)m.rows * 2 * H);
    Tables tab = tables(T, D);
    GpuArray<floatX> y[WINDOWS], d[WINDOWS];
    for (int i = 0; i < WINDOWS; i++) {
        y[i] = large_window("qkv", qkv, &m, i, m.cols);
        d[i] = large_window("dqkv", dqkv, &m, i, m.cols);
        CHECK(m.window[i] % T + WINDOW_ROWS <= T);
    }
    qk_forward(qkv, r, tab.angles, m.rows, T, H, D, 0);
    qk_backward(dqkv, qkv, r, tab.angles, m.rows, T, H, D, 0);
    for (int i = 0; i < WINDOWS; i++) {
        GpuArray<floatX> out = large_window("qkv", qkv, &m, i, m.cols),
                         d_out = large_window("dqkv", dqkv, &m, i, m.cols);
        GpuArray<float> of_r = large_window("r", r, &m, i, 2 * H);
        float *r_expected = gpu_expected(of_r.count);
        size_t angle = (size_t)(m.window[i] % T) * (D / 2);
        const float *c = tab.cosine + angle, *s = tab.sine + angle;
        cpu::qk_forward(y[i].host, r_expected, c, s, 1, WINDOW_ROWS, H, D);
        gpu_compare(out, y[i].host, WINDOW_ROWS, m.cols, "rows from %d", m.window[i]);
        gpu_compare(of_r, r_expected, WINDOW_ROWS, 2 * H, "rows from %d", m.window[i]);
        cpu::qk_backward(d[i].host, out.host, of_r.host, c, s, 1, WINDOW_ROWS, H, D);
        gpu_compare(d_out, d[i].host, WINDOW_ROWS, m.cols, "rows from %d", m.window[i]);
    }
    gpu_end_case();
}

static void lines(int n, int C) {
    int D = 128, H = C / D, T = 2048;
    floatX *qkv = filled_array<floatX>((size_t)n * 3 * C);
    floatX *dqkv = filled_array<floatX>((size_t)n * 3 * C);
    float *r = filled_array<float>((size_t)n * 2 * H);
    const float2 *angles = tables(T, D).angles;
    bench("qk_forward", n, C, 4, [=] { qk_forward(qkv, r, angles, n, T, H, D, 0); });
    bench("qk_backward", n, C, 6, [=] { qk_backward(dqkv, qkv, r, angles, n, T, H, D, 0); });
}

int main(int argc, char **argv) {
    gpu_test_begin();
    bench_if_asked(argc, argv, lines);
    RUN(heads);
    RUN(lengths);
    RUN(rows);
    RUN(angles);
    RUN(beyond_2_31_elements);
    return test_end();
}
