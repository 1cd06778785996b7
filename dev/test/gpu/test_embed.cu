// test_embed.cu: the token embedding (llmc/embed.cuh).
#include "dev/test/gpu/test_index.cuh"
#include "llmc/embed.cuh"  // embed_norm_forward, embed_backward

static void check_forward(int n, int C) {
    int V = 300;
    size_t nC = (size_t)n * C;
    Tokens k = make_tokens(n, V, TOKENS_RANDOM);
    GpuArray<floatX> table = gpu_normal<floatX>("table", (size_t)V * C, 0.8);
    GpuArray<floatX> x = gpu_poisoned<floatX>("x", nC);
    GpuArray<float> r = gpu_poisoned<float>("r", n);
    float *embed = gpu_expected(nC), *x_expected = gpu_expected(nC), *r_expected = gpu_expected(n);
    embed_norm_forward(x.device, r.device, k.device, table.device, n, C, 0);
    cpu::embed_forward(embed, k.host, table.host, n, C);
    cpu::norm_forward(x_expected, r_expected, embed, n, C);
    gpu_compare(x, x_expected, n, C, "n %d, C %d", n, C);
    gpu_compare(r, r_expected, n, 1, "n %d, C %d", n, C);
    gpu_end_case();
}

// The gradient is added to what is there; twice the same bits.
static void check_backward(int n, int C, int V, int kind) {
    size_t VC = (size_t)V * C;
    Tokens k = make_tokens(n, V, kind);
    GpuArray<floatX> dx = gpu_normal<floatX>("dx", (size_t)n * C, 1);
    GpuArray<float> dtable = gpu_normal<float>("dtable", VC, 1),
                    again = gpu_copy<float>("dtable", dtable.host, VC);
    float *expected = gpu_expected(VC);
    memcpy(expected, dtable.host, VC * sizeof *expected);
    cpu::embed_backward(expected, dx.host, k.host, n, C);
    for (float *to : {dtable.device, again.device}) {
        void *scratch = gpu_bytes("scratch", embed_scratch_bytes(n, C));
        embed_backward(to, dx.device, k.index, scratch, n, C, 0);
    }
    if (n > 10000) dtable.tolerance = 5e-5;  // the CPU adds thousands of numbers one by one
    gpu_compare(dtable, expected, V, C, "n %d, C %d, V %d, tokens %d", n, C, V, kind);
    CHECK(same_bits(dtable, again));
    gpu_end_case();
}

static void check_backward_kinds(int n, int C) {
    for (int kind = 0; kind < TOKENS_KINDS; kind++)
        if (kind == TOKENS_ZIPF || C <= 2048) check_backward(n, C, 301, kind);
}

TEST(forward) { each_shape(check_forward); }
TEST(backward) { each_shape(check_backward_kinds); }

// Occurrences around whole pieces: the last piece of a token holds one position, or all it can.
TEST(pieces) {
    for (int n = EMBED_PIECE - 1; n <= 4 * EMBED_PIECE + 1; n += n % EMBED_PIECE == 1 ? 30 : 1)
        check_backward(n, 48, 3, TOKENS_EQUAL);
}

TEST(many_tokens) {
    if (grid_small) SKIP("GRID=small");
    check_backward(131072, 128, 50257, TOKENS_ZIPF);
    check_backward(131072, 128, 131072, TOKENS_DIFFERENT);
    check_backward(65536, 64, 140, TOKENS_RANDOM);
}

// Of the table and of x.
TEST(beyond_2_31_elements) {
    Large m = large_matrix(CHANNELS_MAX);
    if (grid_small) SKIP("GRID=small");
    if (!gpu_has_room(2 * m.count * sizeof(floatX))) SKIP("too little GPU memory");
    floatX *x = filled_array<floatX>(m.count), *table = filled_array<floatX>(m.count);
    float *r = filled_array<float>((size_t)m.rows);
    int *tokens = gpu_expected<int>((size_t)m.rows);
    for (int t = 0; t < m.rows; t++) tokens[t] = t;
    embed_norm_forward(x, r, gpu_ints("tokens", tokens, (size_t)m.rows), table, m.rows, m.cols, 0);
    for (int i = 0; i < WINDOWS; i++) {
        GpuArray<floatX> out = large_window("x", x, &m, i, m.cols),
                         in = large_window("table", table, &m, i, m.cols);
        GpuArray<float> of_r = large_window("r", r, &m, i, 1);
        float *expected = gpu_expected(in.count), *r_expected = gpu_expected(WINDOW_ROWS);
        cpu::norm_forward(expected, r_expected, in.host, WINDOW_ROWS, m.cols);
        gpu_compare(out, expected, WINDOW_ROWS, m.cols, "rows from %d", m.window[i]);
        gpu_compare(of_r, r_expected, WINDOW_ROWS, 1, "rows from %d", m.window[i]);
    }
    gpu_end_case();
}

static void lines(int n, int C) {
    int V = 50257;
    size_t nC = (size_t)n * C, VC = (size_t)V * C;
    Tokens k = make_tokens(n, V, TOKENS_ZIPF);
    floatX *x = filled_array<floatX>(nC), *table = filled_array<floatX>(VC);
    float *r = filled_array<float>(n), *dtable = filled_array<float>(VC);
    void *scratch = gpu_bytes("scratch", embed_scratch_bytes(n, C));
    double rows = different_tokens(&k);
    printf("%.0f different tokens\n", rows * n);
    bench("embed_norm_forward", n, C, 1 + rows,
          [=] { embed_norm_forward(x, r, k.device, table, n, C, 0); });
    bench("embed_backward", n, C, 1 + rows * 8 / sizeof(floatX),
          [=] { embed_backward(dtable, x, k.index, scratch, n, C, 0); });
}

int main(int argc, char **argv) {
    gpu_test_begin();
    bench_if_asked(argc, argv, lines);
    RUN(forward);
    RUN(backward);
    RUN(pieces);
    RUN(many_tokens);
    RUN(beyond_2_31_elements);
    return test_end();
}
