// test_value_embed.cu: the value embedding and its gate (llmc/value_embed.cuh).
#include "dev/test/gpu/test_index.cuh"
#include "llmc/value_embed.cuh"  // value_embed_forward, value_embed_backward, value_gate_backward

// A case: what both passes read. v lies in packed rows of 3C, after q and k.
typedef struct {
    int n, H, D, C, V;
    Tokens tokens;
    GpuArray<floatX> h, table, qkv;
    GpuArray<float> w;
    char name[80];
} Case;

static Case make_case(int n, int H, int D, int kind) {
    Case c = {};
    c.n = n, c.H = H, c.D = D, c.C = H * D, c.V = 301;
    c.tokens = make_tokens(n, c.V, kind);
    c.h = gpu_normal<floatX>("h", (size_t)n * c.C, 1);
    c.table = gpu_normal<floatX>("table", (size_t)c.V * c.C, 1);
    c.qkv = gpu_normal<floatX>("qkv", (size_t)n * 3 * c.C, 1);
    c.w = gpu_random<float>("w", H * GATE_CHANNELS, -0.5, 0.5);
    snprintf(c.name, sizeof c.name, "n %d, H %d, D %d, tokens %d", n, H, D, kind);
    return c;
}

// q and k stay as they are. Leaves the gates in gate_expected.
static void check_forward(Case c, float *gate_expected) {
    size_t count = (size_t)c.n * 3 * c.C;
    float *expected = gpu_expected(count);
    memcpy(expected, c.qkv.host, count * sizeof *expected);
    GpuArray<float> gate = gpu_poisoned<float>("gate", (size_t)c.n * c.H);
    value_embed_forward(c.qkv.device + 2 * c.C, gate.device, c.h.device, c.w.device, c.table.device,
                        c.tokens.device, c.n, c.H, c.D, 3 * c.C, 0);
    cpu::value_embed_forward(expected + 2 * c.C, gate_expected, c.h.host, c.w.host, c.table.host,
                             c.tokens.host, c.n, c.H, c.D);
    gpu_compare(c.qkv, expected, c.n, 3 * c.C, "%s", c.name);
    gpu_compare(gate, gate_expected, c.n, c.H, "%s", c.name);
}

// The sum of the sizes of dz's terms, of head i % H of token i / H.
static float term_sizes(const Case *c, const float *dv, float gate, size_t i) {
    const float *embed = c->table.host + (size_t)c->tokens.host[i / c->H] * c->C + i % c->H * c->D;
    double sum = 0;
    for (int d = 0; d < c->D; d++) sum += fabs((double)dv[i * c->D + d] * embed[d]);
    return (float)(sum * gate * (1 - gate / 3));
}

// Gradients are added to what is there; twice the same bits. dqkv's other parts are not read.
static void check_backward(Case c, const float *gate_host) {
    size_t nC = (size_t)c.n * c.C, VC = (size_t)c.V * c.C, nH = (size_t)c.n * c.H;
    int weights = c.H * GATE_CHANNELS;
    float *dqkv_host = gpu_expected(3 * nC), *dz_expected = gpu_expected(nH),
          *dz_sizes = gpu_expected(nH), *dw_sizes = gpu_expected(weights);
    double *dz_host = gpu_expected<double>(nH);
    GpuArray<floatX> dv = gpu_normal<floatX>("dv", nC, 1);
    for (size_t i = 0; i < 3 * nC; i++) {
        size_t t = i / (3 * (size_t)c.C), at = i % (3 * (size_t)c.C);
        dqkv_host[i] = at < 2 * (size_t)c.C ? NAN : dv.host[t * c.C + at - 2 * c.C];
    }
    GpuArray<floatX> dqkv = gpu_copy<floatX>("dqkv", dqkv_host, 3 * nC);
    GpuArray<float> gate = gpu_copy<float>("gate", gate_host, nH);
    GpuArray<float> dtable = gpu_normal<float>("dtable", VC, 1),
                    dw = gpu_normal<float>("dw", weights, 1);
    GpuArray<floatX> dh = gpu_normal<floatX>("dh", nC, 1);
    float *dtable_expected = gpu_expected(VC), *dw_expected = gpu_expected(weights),
          *dh_expected = gpu_expected(nC);
    memcpy(dtable_expected, dtable.host, VC * sizeof(float));
    memcpy(dw_expected, dw.host, weights * sizeof(float));
    memcpy(dh_expected, dh.host, nC * sizeof(float));
    cpu::value_embed_backward(dtable_expected, dw_expected, dh_expected, dqkv_host + 2 * c.C,
                              gate_host, c.h.host, c.w.host, c.table.host, c.tokens.host, dz_host,
                              c.n, c.H, c.D);
    for (size_t i = 0; i < nH; i++) {
        dz_expected[i] = (float)dz_host[i];
        dz_sizes[i] = term_sizes(&c, dv.host, gate_host[i], i);
        const float *h = c.h.host + i / c.H * c.C;
        for (int k = 0; k < GATE_CHANNELS; k++)
            dw_sizes[i % c.H * GATE_CHANNELS + k] += dz_sizes[i] * fabsf(h[k]);
    }
    GpuArray<float> dtables[] = {dtable, gpu_copy<float>("dtable", dtable.host, VC)},
                    dws[] = {dw, gpu_copy<float>("dw", dw.host, weights)},
                    dzs[] = {gpu_poisoned<float>("dz", nH), gpu_poisoned<float>("dz", nH)};
    GpuArray<floatX> dhs[] = {dh, gpu_copy<floatX>("dh", dh.host, nC)};
    for (int i = 0; i < 2; i++) {
        void *scratch = gpu_bytes("scratch", embed_scratch_bytes(c.n, c.C)),
             *gate_scratch = gpu_bytes("scratch", value_gate_scratch_bytes(c.n, c.H));
        value_embed_backward(dtables[i].device, dzs[i].device, dqkv.device + 2 * c.C, gate.device,
                             c.table.device, c.tokens.index, scratch, c.n, c.H, c.D, 3 * c.C, 0);
        value_gate_backward(dws[i].device, dhs[i].device, dzs[i].device, c.h.device, c.w.device,
                            gate_scratch, c.n, c.H, c.C, 0);
    }
    gpu_compare(dtables[0], dtable_expected, c.V, c.C, "%s", c.name);
    gpu_compare_sums(dzs[0], dz_expected, dz_sizes, (int)nH, c.name);
    gpu_compare(dhs[0], dh_expected, c.n, c.C, "%s", c.name);
    for (int i = 0; i < weights; i++) dw_sizes[i] += fabsf(dw.host[i]);  // what is added to
    gpu_compare_sums(dws[0], dw_expected, dw_sizes, weights, c.name);
    CHECK(same_bits(dtables[0], dtables[1]) && same_bits(dzs[0], dzs[1]));
    CHECK(same_bits(dhs[0], dhs[1]) && same_bits(dws[0], dws[1]));
}

static void check(int n, int H, int D, int kind) {
    Case c = make_case(n, H, D, kind);
    float *gate = gpu_expected((size_t)n * H);
    check_forward(c, gate);
    check_backward(c, gate);
    gpu_end_case();
}

// The sizes of heads that 16 bytes at a time are for, and others: less than a warp, more, ragged.
TEST(head_sizes) {
    const int shapes[][2] = {{1, 64}, {3, 64}, {12, 64}, {1, 128}, {6, 128}, {5, 128}, {24, 2},
                             {6, 8},  {3, 16}, {2, 24},  {4, 32},  {1, 48},  {2, 100}, {1, 320}};
    for (auto &s : shapes)
        for (int n : {1, 65}) check(n, s[0], s[1], TOKENS_RANDOM);
}

TEST(numbers_of_tokens) {
    for (int n : {1, 2, 63, 64, 65, 127, 128, 129, 192, 1000})
        for (int kind = 0; kind < TOKENS_KINDS; kind++)
            if (n <= 65 || !grid_small)
                check(n, 6, 128, kind), check(n, 3, 64, kind), check(n, 3, 16, kind);
}

TEST(wide) {
    if (grid_small) SKIP("GRID=small");
    check(1000, 12, 128, TOKENS_ZIPF);
    check(1000, 24, 64, TOKENS_ZIPF);
    check(20000, 2, 128, TOKENS_ZIPF);
}

// Of the packed rows that v lies in.
TEST(beyond_2_31_elements) {
    int H = 64, D = 128, C = H * D, V = 301;
    Large m = large_matrix(3 * C);
    if (grid_small) SKIP("GRID=small");
    if (!gpu_has_room(2 * m.count * sizeof(floatX))) SKIP("too little GPU memory");
    floatX *qkv = filled_array<floatX>(m.count), *h = filled_array<floatX>((size_t)m.rows * C);
    float *gate = filled_array<float>((size_t)m.rows * H);
    GpuArray<floatX> table = gpu_normal<floatX>("table", (size_t)V * C, 1), before[WINDOWS];
    GpuArray<float> w = gpu_random<float>("w", H * GATE_CHANNELS, -0.5, 0.5);
    Tokens k = make_tokens(m.rows, V, TOKENS_RANDOM);
    for (int i = 0; i < WINDOWS; i++) before[i] = large_window("qkv", qkv, &m, i, m.cols);
    value_embed_forward(qkv + 2 * C, gate, h, w.device, table.device, k.device, m.rows, H, D, 3 * C,
                        0);
    for (int i = 0; i < WINDOWS; i++) {
        GpuArray<floatX> out = large_window("qkv", qkv, &m, i, m.cols),
                         of_h = large_window("h", h, &m, i, C);
        GpuArray<float> of_gate = large_window("gate", gate, &m, i, H);
        float *gate_expected = gpu_expected(of_gate.count);
        cpu::value_embed_forward(before[i].host + 2 * C, gate_expected, of_h.host, w.host,
                                 table.host, k.host + m.window[i], WINDOW_ROWS, H, D);
        gpu_compare(out, before[i].host, WINDOW_ROWS, m.cols, "rows from %d", m.window[i]);
        gpu_compare(of_gate, gate_expected, WINDOW_ROWS, H, "rows from %d", m.window[i]);
    }
    gpu_end_case();
}

static void lines(int n, int C) {
    int V = 50257, D = 128, H = C / D;
    size_t nC = (size_t)n * C, nH = (size_t)n * H, VC = (size_t)V * C;
    Tokens k = make_tokens(n, V, TOKENS_ZIPF);
    floatX *qkv = filled_array<floatX>(3 * nC), *h = filled_array<floatX>(nC),
           *table = filled_array<floatX>(VC), *dh = filled_array<floatX>(nC);
    float *gate = filled_array<float>(nH), *dz = filled_array<float>(nH),
          *w = filled_array<float>(H * GATE_CHANNELS), *dw = filled_array<float>(H * GATE_CHANNELS),
          *dtable = filled_array<float>(VC);
    void *scratch = gpu_bytes("scratch", embed_scratch_bytes(n, C)),
         *gate_scratch = gpu_bytes("scratch", value_gate_scratch_bytes(n, H));
    double rows = different_tokens(&k), X = sizeof(floatX);
    bench("value_embed_forward", n, C, 2 + rows, [=] {
        value_embed_forward(qkv + 2 * C, gate, h, w, table, k.device, n, H, D, 3 * C, 0);
    });
    bench("value_embed_backward", n, C, 1 + rows * (1 + 8 / X), [=] {
        value_embed_backward(dtable, dz, qkv + 2 * C, gate, table, k.index, scratch, n, H, D, 3 * C,
                             0);
    });
    bench("value_gate_backward", n, C, (3 * GATE_CHANNELS + H * 4 / X) / C,
          [=] { value_gate_backward(dw, dh, dz, h, w, gate_scratch, n, H, C, 0); });
}

int main(int argc, char **argv) {
    gpu_test_begin();
    bench_if_asked(argc, argv, lines);
    RUN(head_sizes);
    RUN(numbers_of_tokens);
    RUN(wide);
    RUN(beyond_2_31_elements);
    return test_end();
}
