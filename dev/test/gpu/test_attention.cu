// test_attention.cu: attention of both builds (llmc/attention.cuh, llmc/attention_fp32.cuh) against
// the CPU's; `test_attention bench` times it instead.
#include "dev/test/gpu/test_gpu.cuh"

#ifdef PRECISION_FP32
#include "llmc/attention_fp32.cuh"  // attention_forward, attention_backward
static const int head_sizes[] = {2, 8, 16, 32, 64, 128, 256};
constexpr double LSE_TOLERANCE = TOLERANCE_FP32;
#else
#include "llmc/attention.cuh"  // attention_forward, attention_backward
static const int head_sizes[] = {64, 128};
constexpr double LSE_TOLERANCE = 1e-4;  // exponentials are the fast unit's
#endif

// Beside DOCS_ONE, DOCS_TOKENS and DOCS_MIX: documents that begin at, before and behind the edges
// of tiles.
enum { DOCS_EDGES = DOCS_KINDS };

// B rows of T tokens, H heads of D, packed as the trainer packs them.
typedef struct {
    int B, T, H, D, W, n, C;
    int *in_row, *doc_start;     // (n): on the host, positions in the row; on the device, absolute
    GpuArray<floatX> qkv, dout;  // (n, 3C), (n, C)
    GpuArray<floatX> o, dqkv;    // (n, C), (n, 3C)
    GpuArray<float> lse, delta;  // (H, n)
} Problem;

static Problem problem(int B, int T, int H, int D, int W, int docs) {
    Problem p = {};
    p.B = B, p.T = T, p.H = H, p.D = D, p.W = W, p.n = B * T, p.C = H * D;
    size_t n = (size_t)p.n, C = (size_t)p.C;
    int *absolute = gpu_expected<int>(n);
    p.in_row = gpu_expected<int>(n);
    test_documents(p.in_row, absolute, docs == DOCS_EDGES ? DOCS_ONE : docs, B, T);
    if (docs == DOCS_EDGES)
        for (int i = 0; i < p.n; i++) {
            int t = i % T, at = t % 192;
            bool edge = at == 0 || at == 31 || at == 32 || at == 33 || at == 64 || at == 127;
            p.in_row[i] = t == 0 || edge ? t : p.in_row[i - 1];
            absolute[i] = i - t + p.in_row[i];
        }
    p.doc_start = gpu_ints("doc_start", absolute, n);
    p.qkv = gpu_normal<floatX>("qkv", n * 3 * C, 1), p.dout = gpu_normal<floatX>("dout", n * C, 1);
    p.o = gpu_poisoned<floatX>("o", n * C), p.dqkv = gpu_poisoned<floatX>("dqkv", n * 3 * C);
    p.lse = gpu_poisoned<float>("lse", n * (size_t)H);
    p.delta = gpu_poisoned<float>("delta", n * (size_t)H);
    return p;
}

static void forward(const Problem *p) {
    const floatX *q = p->qkv.device;
    attention_forward(p->o.device, p->lse.device, q, q + p->C, q + 2 * p->C, p->doc_start, p->n,
                      p->H, p->D, p->W, p->C, 3 * p->C, 0);
}

static void backward(const Problem *p) {
    const floatX *q = p->qkv.device;
    floatX *dq = p->dqkv.device;
    attention_backward(dq, dq + p->C, dq + 2 * p->C, p->delta.device, p->dout.device, p->o.device,
                       p->lse.device, q, q + p->C, q + 2 * p->C, p->doc_start, p->n, p->H, p->D,
                       p->W, p->C, 3 * p->C, 0);
}

// ---------------------------------------------------------------------------------------------
// Against the CPU.

// dq, dk or dv (part 0, 1, 2): compared one by one, lest one hides behind another. Where every
// query sees one key only, dq and dk are 0: what rounding leaves there is held against 1, the size
// of the inputs.
static void compare_gradient(Problem *p, const float *dqkv /* (n, 3C) */, int part,
                             const char *shape) {
    static const char *const names[] = {"dq", "dk", "dv"};
    size_t n = (size_t)p->n, C = (size_t)p->C, row = C * sizeof(floatX);
    GpuArray<floatX> found = gpu_poisoned<floatX>(names[part], n * C);
    CUDA_CHECK(cudaMemcpy2D(found.device, row, p->dqkv.device + (size_t)part * C, 3 * row, row, n,
                            cudaMemcpyDeviceToDevice));
    float *expected = gpu_expected(n * C), *ones = gpu_expected(n * C);
    bool zero = true;
    for (size_t i = 0; i < n * C; i++) {
        expected[i] = dqkv[i / C * 3 * C + (size_t)part * C + i % C];
        ones[i] = 1, zero = zero && expected[i] == 0;
    }
    if (zero) {
        found.tolerance = 1e-4;
        gpu_compare_sums(found, expected, ones, (int)(n * C), shape);
    } else {
        gpu_compare(found, expected, p->n, p->C, "%s", shape);
    }
}

static void check_case(int B, int T, int H, int D, int W, int docs) {
    Problem p = problem(B, T, H, D, W, docs);
    size_t n = (size_t)p.n, C = (size_t)p.C;
    char shape[120];
    snprintf(shape, sizeof shape, "B %d, T %d, H %d, D %d, W %d, documents %d", B, T, H, D, W,
             docs);
    forward(&p);
    float *o = gpu_expected(n * C), *dqkv = gpu_expected(n * 3 * C);
    size_t rows = n * (size_t)H;
    float *lse = gpu_expected(rows), *lse_by_head = gpu_expected(rows), *sizes = gpu_expected(rows);
    cpu::attention_forward(o, lse, p.qkv.host, p.in_row, W, B, T, H, D);
    for (int i = 0; i < p.n * H; i++) {
        int at = i % H * p.n + i / H;
        lse_by_head[at] = lse[i];
        sizes[at] = 1 + fabsf(lse[i]);  // it may be the logarithm of about 1
    }
    p.lse.tolerance = LSE_TOLERANCE;
    gpu_compare(p.o, o, p.n, p.C, "%s", shape);
    gpu_compare_sums(p.lse, lse_by_head, sizes, p.n * H, shape);
    backward(&p);  // both from the GPU's o: its rounding is forward's matter
    cpu::attention_backward(dqkv, p.dout.host, p.o.host, lse, p.qkv.host, p.in_row, W, B, T, H, D);
    for (int part = 0; part < 3; part++) compare_gradient(&p, dqkv, part, shape);
    gpu_end_case();
}

// Windows of all kinds, those that reach beyond the row once; all kinds of documents.
static void check_shape(int B, int T, int H, int D) {
    for (int W : {T, 0, 1, 17, 64, 100, 128, 500})
        for (int docs = 0; docs <= DOCS_EDGES; docs++)
            if (W < T || (W == T && (T > 1 || docs == 0))) check_case(B, T, H, D, W, docs);
}

TEST(one_row) {
    for (int D : head_sizes) {
        if (grid_small) check_case(1, 70, 1, D, 40, DOCS_MIX);
        for (int T : {1, 2, 63, 64, 65, 127, 128, 129, 192})
            if (!grid_small)
                check_shape(1, T, T <= 2 ? 8 : 2, D);  // few pairs may cancel: more heads
    }
}

TEST(rows) {
    for (int D : head_sizes) {
        check_case(2, 33, 2, D, 33, DOCS_ONE);
        if (grid_small) continue;
        check_shape(3, 65, 1, D);
        check_shape(2, 129, 3, D);
    }
}

TEST(long_row) {
    for (int D : head_sizes)
        if (D >= 64) check_shape(1, 1000, 1, D);
    check_case(1, 1000, 2, 128, 1000, DOCS_MIX);
}

// The same call twice, over other rubbish: the same bits.
TEST(same_bits_again) {
    for (int D : head_sizes) {
        Problem p = problem(grid_small ? 1 : 3, grid_small ? 65 : 500, 2, D, 130, DOCS_MIX);
        size_t o_bytes = p.o.count * sizeof(float), dqkv_bytes = p.dqkv.count * sizeof(float);
        float *o = gpu_expected(p.o.count), *dqkv = gpu_expected(p.dqkv.count);
        for (int i = 0; i < (grid_small ? 2 : 5); i++) {
            CUDA_CHECK(cudaMemset(p.o.device, 0x7f, p.o.count * sizeof(floatX)));
            CUDA_CHECK(cudaMemset(p.dqkv.device, 0x7f, p.dqkv.count * sizeof(floatX)));
            forward(&p);
            backward(&p);
            gpu_read(p.o), gpu_read(p.dqkv);
            if (i == 0) memcpy(o, p.o.host, o_bytes), memcpy(dqkv, p.dqkv.host, dqkv_bytes);
            CHECK(!memcmp(o, p.o.host, o_bytes));
            CHECK(!memcmp(dqkv, p.dqkv.host, dqkv_bytes));
        }
        gpu_end_case();
    }
}

// ---------------------------------------------------------------------------------------------
// Bench.

// Time of a call, the median of 20, and its speed: `products` times 2 D FLOPs for each pair of
// query and key that see each other.
static void bench(const char *name, const Problem *p, const char *docs, double pairs,
                  double products, void (*call)(const Problem *)) {
    enum { CALLS = 20, WARM = 3 };
    float ms[CALLS];
    cudaEvent_t event[CALLS + 1];
    for (int i = 0; i <= CALLS; i++) CUDA_CHECK(cudaEventCreate(&event[i]));
    for (int i = 0; i < WARM; i++) call(p);
    CUDA_CHECK(cudaEventRecord(event[0]));
    for (int i = 0; i < CALLS; i++) {
        call(p);
        CUDA_CHECK(cudaEventRecord(event[i + 1]));
    }
    CUDA_CHECK(cudaEventSynchronize(event[CALLS]));
    for (int i = 0; i < CALLS; i++) {
        CUDA_CHECK(cudaEventElapsedTime(&ms[i], event[i], event[i + 1]));
        for (int j = i; j > 0 && ms[j] < ms[j - 1]; j--) {
            float swap = ms[j];
            ms[j] = ms[j - 1], ms[j - 1] = swap;
        }
    }
    double us = 1e3 * ms[CALLS / 2], flops = products * 2 * pairs * p->D * p->H;
    printf("%-9s %s  B %2d  H %2d  T %4d  D %3d  W %4d  %-14s %9.1f us  %6.1f TFLOP/s\n", name,
           PRECISION_NAME, p->B, p->H, p->T, p->D, p->W, docs, us, 1e-6 * flops / us);
    for (int i = 0; i <= CALLS; i++) CUDA_CHECK(cudaEventDestroy(event[i]));
}

// length: of documents, on average; 0: rows are documents.
static void bench_shape(int B, int T, int H, int D, int W, int length) {
    Problem p = problem(B, T, H, D, W, DOCS_ONE);
    RandKey key = gpu_fresh_key();
    int *start = gpu_expected<int>((size_t)p.n);
    double pairs = 0;
    char docs[40];
    snprintf(docs, sizeof docs, length ? "documents %d" : "rows", length);
    for (int i = 0; i < p.n; i++) {
        bool first = i % T == 0 || (length && rand_uniform(key, (uint64_t)i) * length < 1);
        start[i] = first ? i : start[i - 1];
        pairs += (i - start[i] < W ? i - start[i] : W) + 1;
    }
    p.doc_start = gpu_ints("doc_start", start, (size_t)p.n);
    bench("forward", &p, docs, pairs, 2, forward);
    bench("backward", &p, docs, pairs, 5, backward);
    gpu_end_case();
}

int main(int argc, char **argv) {
    gpu_test_begin();
    if (argc > 1 && !strcmp(argv[1], "bench")) {
        bench_shape(32, 2048, 6, 128, 2048, 0);
        bench_shape(32, 2048, 6, 128, 512, 0);
        bench_shape(32, 2048, 6, 128, 2048, 700);
        bench_shape(64, 1024, 12, 64, 1024, 0);
        return 0;
    }
    RUN(one_row);
    RUN(rows);
    if (!grid_small) RUN(long_row);
    RUN(same_bits_again);
    return test_end();
}
