// test_smear.cu: the smear (llmc/smear.cuh).
#include "dev/test/gpu/test_tokens.cuh"
#include "llmc/smear.cuh"  // smear_forward, smear_backward

// A case: rows of T tokens, cut into documents, with a gate as --init test has it.
typedef struct {
    int B, T, C, n;
    float lambda;
    GpuArray<floatX> x;
    GpuArray<float> gate, lambda_array;
    int *in_row, *doc_start;  // (B, T) on the host, as the CPU has it; on the device
    char name[80];
} Case;

static Case make_case(int B, int T, int C, int documents, float lambda) {
    Case c = {};
    c.B = B, c.T = T, c.C = C, c.n = B * T, c.lambda = lambda;
    int *absolute = gpu_expected<int>(c.n);
    c.x = gpu_normal<floatX>("x", (size_t)c.n * C, 1);
    c.gate = gpu_random<float>("gate", SMEAR_CHANNELS, -0.5, 0.5);
    c.lambda_array = gpu_copy<float>("lambda", &lambda, 1);
    c.in_row = gpu_expected<int>(c.n);
    test_documents(c.in_row, absolute, documents, B, T);
    c.doc_start = gpu_ints("doc_start", absolute, c.n);
    snprintf(c.name, sizeof c.name, "B %d, T %d, C %d, documents %d, lambda %g", B, T, C, documents,
             lambda);
    return c;
}

static void check_forward(Case c) {
    size_t nC = (size_t)c.n * c.C;
    GpuArray<floatX> y = gpu_poisoned<floatX>("y", nC);
    GpuArray<float> s = gpu_poisoned<float>("s", c.n);
    float *y_expected = gpu_expected(nC), *s_expected = gpu_expected(c.n);
    smear_forward(y.device, s.device, c.x.device, c.gate.device, c.lambda_array.device, c.doc_start,
                  c.n, c.C, 0);
    cpu::smear_forward(y_expected, s_expected, c.x.host, c.gate.host, c.lambda, c.in_row, c.B, c.T,
                       c.C);
    gpu_compare(y, y_expected, c.n, c.C, "%s", c.name);
    gpu_compare(s, s_expected, c.n, 1, "%s", c.name);
    for (int t = 0; t < c.n; t++) {
        bool first = c.in_row[t] == t % c.T;
        size_t at = (size_t)t * c.C;
        bool same = s.host[t] == 0;
        for (int i = 0; i < c.C; i++) same = same && y.host[at + i] == c.x.host[at + i];  // -0 is 0
        if (first && !same) CHECK_INT(t, -1);  // a document's first token stays as it is
    }
}

// What the sums for dgate and dlambda are held against: those of their terms' sizes.
static void sum_sizes(Case *c, const float *dy, const float *s, float *gate_sizes,
                      float *lambda_size) {
    double sizes[SMEAR_CHANNELS + 1] = {};
    for (int t = 1; t < c->n; t++) {
        const float *x = c->x.host + (size_t)t * c->C, *dyt = dy + (size_t)t * c->C;
        double g = 0;
        if (s[t] == 0) continue;
        for (int i = 0; i < c->C; i++) g += fabs((double)dyt[i] * x[i - c->C]);
        for (int i = 0; i < SMEAR_CHANNELS; i++)
            sizes[i] += g * s[t] * (1 - s[t]) * fabs(c->lambda * x[i]);
        sizes[SMEAR_CHANNELS] += g * s[t];
    }
    for (int i = 0; i < SMEAR_CHANNELS; i++) gate_sizes[i] = (float)sizes[i];
    *lambda_size = (float)sizes[SMEAR_CHANNELS];
}

static void check_backward(Case c) {
    size_t nC = (size_t)c.n * c.C;
    float *y = gpu_expected(nC), *s_host = gpu_expected(c.n), before = 3, lambda_size;
    float dgate_expected[SMEAR_CHANNELS], gate_sizes[SMEAR_CHANNELS], dlambda_expected = before;
    for (float &d : dgate_expected) d = before;
    cpu::smear_forward(y, s_host, c.x.host, c.gate.host, c.lambda, c.in_row, c.B, c.T, c.C);
    GpuArray<float> s = gpu_copy<float>("s", s_host, c.n);
    GpuArray<floatX> dy = gpu_normal<floatX>("dy", nC, 1), dx = gpu_poisoned<floatX>("dx", nC);
    GpuArray<float> dgate = gpu_copy<float>("dgate", dgate_expected, SMEAR_CHANNELS);
    GpuArray<float> dlambda = gpu_copy<float>("dlambda", &before, 1);
    float *dx_expected = gpu_expected(nC);
    smear_backward(dx.device, dgate.device, dlambda.device, dy.device, c.x.device, s.device,
                   c.gate.device, c.lambda_array.device, c.doc_start,
                   gpu_bytes("scratch", smear_scratch_bytes(c.n)), c.n, c.C, 0);
    cpu::smear_backward(dx_expected, dgate_expected, &dlambda_expected, dy.host, c.x.host, s_host,
                        c.gate.host, c.lambda, gpu_expected<double>(c.n), c.B, c.T, c.C);
    sum_sizes(&c, dy.host, s_host, gate_sizes, &lambda_size);
    gpu_compare(dx, dx_expected, c.n, c.C, "%s", c.name);
    gpu_compare_sums(dgate, dgate_expected, gate_sizes, SMEAR_CHANNELS, c.name);
    gpu_compare_sums(dlambda, &dlambda_expected, &lambda_size, 1, c.name);
}

static void check_shape(int T, int C) {
    for (int documents = 0; documents < DOCS_KINDS; documents++) {
        Case c = make_case(T <= 65 ? 3 : 1, T, C, documents, 0.45f);
        check_forward(c);
        check_backward(c);
        gpu_end_case();
    }
}

TEST(smear) { each_shape(check_shape); }

// As training starts: the gate gets no gradient, its lambda does.
TEST(lambda_zero) {
    Case c = make_case(2, 64, 768, DOCS_MIX, 0);
    check_forward(c);
    check_backward(c);
    gpu_end_case();
}

TEST(sums_over_many_tokens) {
    if (grid_small) SKIP("GRID=small");
    Case c = make_case(40, 1000, 128, DOCS_MIX, 0.45f);
    check_backward(c);
    gpu_end_case();
}

// A document begins with each window, for the twin to know all of it.
TEST(beyond_2_31_elements) {
    Large m = large_matrix(CHANNELS_MAX);
    float a = 0.45f;
    if (grid_small) SKIP("GRID=small");
    if (!gpu_has_room(2 * m.count * sizeof(floatX))) SKIP("too little GPU memory");
    floatX *x = filled_array<floatX>(m.count), *y = filled_array<floatX>(m.count);
    float *s = filled_array<float>((size_t)m.rows);
    GpuArray<float> gate = gpu_random<float>("gate", SMEAR_CHANNELS, -0.5, 0.5);
    GpuArray<float> lambda = gpu_copy<float>("lambda", &a, 1);
    int *start = gpu_expected<int>((size_t)m.rows), in_row[WINDOW_ROWS] = {};
    for (int t = 1; t < m.rows; t++)
        start[t] = t == m.window[1] || t == m.window[2] ? t : start[t - 1];
    int *doc_start = gpu_ints("doc_start", start, (size_t)m.rows);
    smear_forward(y, s, x, gate.device, lambda.device, doc_start, m.rows, m.cols, 0);
    for (int i = 0; i < WINDOWS; i++) {
        GpuArray<floatX> in = large_window("x", x, &m, i, m.cols),
                         out = large_window("y", y, &m, i, m.cols);
        GpuArray<float> of_s = large_window("s", s, &m, i, 1);
        float *expected = gpu_expected(in.count), *s_expected = gpu_expected(WINDOW_ROWS);
        cpu::smear_forward(expected, s_expected, in.host, gate.host, a, in_row, 1, WINDOW_ROWS,
                           m.cols);
        gpu_compare(out, expected, WINDOW_ROWS, m.cols, "rows from %d", m.window[i]);
        gpu_compare(of_s, s_expected, WINDOW_ROWS, 1, "rows from %d", m.window[i]);
    }
    gpu_end_case();
}

// At each width of a token: one warp, two, and as many as there can be.
TEST(same_bits_again) {
    for (int C : {128, 768, 1536, 8192}) {
        if (grid_small && C > 1536) continue;
        Case c = make_case(3, grid_small ? 21 : 251, C, DOCS_MIX, 0.45f);
        GpuArray<float> s = gpu_poisoned<float>("s", c.n), dgate[3], dlambda[3];
        GpuArray<floatX> dy = gpu_normal<floatX>("dy", c.x.count, 1), y[3], dx[3];
        float *zeros = gpu_expected(SMEAR_CHANNELS);
        for (int i = 0; i < 3; i++) {
            y[i] = gpu_poisoned<floatX>("y", c.x.count);
            dx[i] = gpu_poisoned<floatX>("dx", c.x.count);
            dgate[i] = gpu_copy<float>("dgate", zeros, SMEAR_CHANNELS);
            dlambda[i] = gpu_copy<float>("dlambda", zeros, 1);
            smear_forward(y[i].device, s.device, c.x.device, c.gate.device, c.lambda_array.device,
                          c.doc_start, c.n, C, 0);
            smear_backward(dx[i].device, dgate[i].device, dlambda[i].device, dy.device, c.x.device,
                           s.device, c.gate.device, c.lambda_array.device, c.doc_start,
                           gpu_bytes("scratch", smear_scratch_bytes(c.n)), c.n, C, 0);
            CHECK(same_bits(y[0], y[i]) && same_bits(dx[0], dx[i]));
            CHECK(same_bits(dgate[0], dgate[i]) && same_bits(dlambda[0], dlambda[i]));
        }
        gpu_end_case();
    }
}

static void lines(int n, int C) {
    size_t nC = (size_t)n * C;
    floatX *x = filled_array<floatX>(nC), *y = filled_array<floatX>(nC),
           *dx = filled_array<floatX>(nC);
    float *s = filled_array<float>(n), *gate = filled_array<float>(SMEAR_CHANNELS),
          *dgate = filled_array<float>(SMEAR_CHANNELS), *lambda = filled_array<float>(1),
          *dlambda = filled_array<float>(1);
    int *in_row = gpu_expected<int>(n), *absolute = gpu_expected<int>(n);
    test_documents(in_row, absolute, DOCS_ONE, n / 2048, 2048);
    int *doc_start = gpu_ints("doc_start", absolute, n);
    void *scratch = gpu_bytes("scratch", smear_scratch_bytes(n));
    bench("smear_forward", n, C, 2,
          [=] { smear_forward(y, s, x, gate, lambda, doc_start, n, C, 0); });
    bench("smear_backward", n, C, 3, [=] {
        smear_backward(dx, dgate, dlambda, y, x, s, gate, lambda, doc_start, scratch, n, C, 0);
    });
}

int main(int argc, char **argv) {
    gpu_test_begin();
    bench_if_asked(argc, argv, lines);
    RUN(smear);
    RUN(lambda_zero);
    RUN(sums_over_many_tokens);
    RUN(same_bits_again);
    RUN(beyond_2_31_elements);
    return test_end();
}
