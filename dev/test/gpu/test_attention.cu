// test_attention.cu: attention of each build (llmc/attention.cuh, llmc/attention_sm90.cuh,
// llmc/attention_fp32.cuh) against the CPU's; `test_attention bench` times it instead. Backward
// that undoes norm and rotation is held against the CPU's attention_backward and qk_backward.
#include "dev/test/gpu/test_qkv.cuh"  // columns, compare_gradient

#ifdef PRECISION_FP32
#include "llmc/attention_fp32.cuh"  // attention_forward, attention_backward
static const int head_sizes[] = {2, 8, 16, 32, 64, 128, 256};
constexpr double LSE_TOLERANCE = TOLERANCE_FP32;
#else
#ifdef HOPPER
#include "llmc/attention_sm90.cuh"  // attention_forward, attention_backward
#else
#include "llmc/attention.cuh"  // attention_forward, attention_backward
#endif
static const int head_sizes[] = {64, 128};
constexpr double LSE_TOLERANCE = 1e-4;  // exponentials are the fast unit's
#endif

// Beside DOCS_ONE, DOCS_TOKENS and DOCS_MIX: documents that begin at, before and after the edges
// of tiles.
enum { DOCS_EDGES = DOCS_KINDS };

// B rows of T tokens, H heads of D: packed as the trainer packs them, or with 8 unused numbers
// after each row. A test may put other numbers into qkv.
typedef struct {
    int B, T, H, D, W, n, C, ld, ldo;
    int *in_row, *doc_start;     // (n): on the host, positions in the row; on the device, absolute
    GpuArray<floatX> qkv, dout;  // (n, ld), (n, ldo): q, k and v side by side
    GpuArray<floatX> o, dqkv;    // (n, ldo), (n, ld)
    GpuArray<float> lse, delta;  // (H, n)
    GpuArray<float> r;           // (n, 2H): any factors of norms; q and k are any numbers, too
    const float2 *angles;        // (T, D/2)
    float *cosine, *sine;        // likewise, the CPU's
} Problem;

static Problem problem(int B, int T, int H, int D, int W, int docs, bool gap) {
    Problem p = {};
    p.B = B, p.T = T, p.H = H, p.D = D, p.W = W, p.n = B * T, p.C = H * D;
    p.ldo = p.C + 8 * gap, p.ld = 3 * p.C + 8 * gap;
    size_t n = (size_t)p.n, ld = (size_t)p.ld, ldo = (size_t)p.ldo;
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
    p.qkv = gpu_normal<floatX>("qkv", n * ld, 1), p.dout = gpu_normal<floatX>("dout", n * ldo, 1);
    p.o = gpu_poisoned<floatX>("o", n * ldo), p.dqkv = gpu_poisoned<floatX>("dqkv", n * ld);
    p.lse = gpu_poisoned<float>("lse", n * (size_t)H);
    p.delta = gpu_poisoned<float>("delta", n * (size_t)H);
    size_t angles = (size_t)T * (size_t)(D / 2);
    p.cosine = gpu_expected(angles), p.sine = gpu_expected(angles);
    cpu::rope_init(p.cosine, p.sine, T, D);
    p.angles = gpu_angles(p.cosine, p.sine, angles);
    p.r = gpu_random<float>("r", n * 2 * (size_t)H, 0.5, 2);
    return p;
}

static void forward(const Problem *p) {
    const floatX *q = p->qkv.device;
    attention_forward(p->o.device, p->lse.device, q, q + p->C, q + 2 * p->C, p->doc_start, p->n,
                      p->H, p->D, p->W, p->ldo, p->ld, 0);
}

static void backward_through(const Problem *p, const Rotary &rotary) {
    const floatX *q = p->qkv.device;
    floatX *dq = p->dqkv.device;
    attention_backward(dq, dq + p->C, dq + 2 * p->C, p->delta.device, p->dout.device, p->o.device,
                       p->lse.device, q, q + p->C, q + 2 * p->C, p->doc_start, rotary, p->n, p->H,
                       p->D, p->W, p->ldo, p->ld, 0);
}

static void backward(const Problem *p) { backward_through(p, Rotary{}); }

// As the trainer calls it.
static void backward_rotated(const Problem *p) {
    Rotary rotary = {p->r.device, p->angles, p->T};
    backward_through(p, ATTENTION_ROTATES ? rotary : Rotary{});
}

// ---------------------------------------------------------------------------------------------
// Against the CPU.

// What lies after each row, from column `from` on, is still poison.
static void check_gap(const GpuArray<floatX> &x, int n, int ld, int from, const char *shape) {
    for (int t = 0; t < n; t++)
        for (int c = from; c < ld; c++)
            if (!isnan(x.host[(size_t)t * (size_t)ld + (size_t)c]))
                return test_check(false, __FILE__, __LINE__, "%s of %s: written after row %d",
                                  x.name, shape, t);
}

// Forward: o and lse. Returns the CPU's lse (n, H) and the GPU's o (n, C), for backward.
static void check_forward(Problem *p, float *lse, float **rounded, const char *shape) {
    size_t C = (size_t)p->C, count = (size_t)p->n * C, rows = (size_t)p->n * (size_t)p->H;
    float *o = gpu_expected(count), *qkv = columns(p->qkv.host, p->n, p->ld, 0, 3 * p->C);
    float *lse_by_head = gpu_expected(rows), *sizes = gpu_expected(rows);
    cpu::attention_forward(o, lse, qkv, p->in_row, p->W, p->B, p->T, p->H, p->D);
    for (int i = 0; i < p->n * p->H; i++) {
        int at = i % p->H * p->n + i / p->H;
        lse_by_head[at] = lse[i];
        sizes[at] = 1 + fabsf(lse[i]);  // it may be the logarithm of about 1
    }
    forward(p);
    gpu_read(p->o);
    check_gap(p->o, p->n, p->ldo, p->C, shape);
    *rounded = columns(p->o.host, p->n, p->ldo, 0, p->C);
    GpuArray<floatX> found = gpu_copy<floatX>("o", *rounded, count);
    gpu_compare(found, o, p->n, p->C, "%s", shape);
    p->lse.tolerance = LSE_TOLERANCE;
    gpu_compare_sums(p->lse, lse_by_head, sizes, p->n * p->H, shape);
}

// dq, dk and dv against the CPU's (n, 3C).
static void check_gradients(Problem *p, const float *dqkv, const char *shape) {
    gpu_read(p->dqkv);
    check_gap(p->dqkv, p->n, p->ld, 3 * p->C, shape);
    for (int part = 0; part < 3; part++)
        compare_gradient(p->dqkv.host, dqkv, part, p->n, p->C, p->ld, shape);
}

static void check_problem(Problem *p, const char *docs) {
    size_t count = (size_t)p->n * (size_t)p->C;
    float *dqkv = gpu_expected(3 * count), *lse = gpu_expected((size_t)p->n * (size_t)p->H), *o;
    float *qkv = columns(p->qkv.host, p->n, p->ld, 0, 3 * p->C);
    char shape[120];
    snprintf(shape, sizeof shape, "B %d, T %d, H %d, D %d, W %d, ld %d, %s", p->B, p->T, p->H, p->D,
             p->W, p->ld, docs);
    check_forward(p, lse, &o, shape);
    backward(p);  // both from the GPU's o: its rounding is forward's matter
    cpu::attention_backward(dqkv, columns(p->dout.host, p->n, p->ldo, 0, p->C), o, lse, qkv,
                            p->in_row, p->W, p->B, p->T, p->H, p->D);
    check_gradients(p, dqkv, shape);
    if (ATTENTION_ROTATES) {
        strcat(shape, ", rotated");
        CUDA_CHECK(cudaMemset(p->dqkv.device, 0xff, p->dqkv.count * sizeof(floatX)));
        backward_rotated(p);
        cpu::qk_backward(dqkv, qkv, p->r.host, p->cosine, p->sine, p->B, p->T, p->H, p->D);
        check_gradients(p, dqkv, shape);
    }
    gpu_end_case();
}

static void check_case(int B, int T, int H, int D, int W, int docs) {
    static const char *const names[] = {"rows", "documents of a token", "documents", "at edges"};
    Problem p = problem(B, T, H, D, W, docs, docs == DOCS_MIX);
    check_problem(&p, names[docs]);
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
        for (int T : {1, 2, 63, 64, 65, 127, 128, 129, 192, 300})
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

// More rows of a head than there are processors; tiles that end with rows, and do not.
TEST(many_rows) {
    for (int D : head_sizes)
        if (D >= 64)
            for (int docs = 0; docs <= DOCS_EDGES; docs++) {
                check_case(8, 512, 6, D, 512, docs);
                check_case(8, 512, 6, D, 200, docs);
                check_case(5, 192, 12, D, 100, docs);
                check_case(33, 64, 7, D, 64, docs);
            }
}

// Scores of up to some hundreds, which rise and fall along the row. Of BF16 inputs: their products
// are exact; of FP32 ones the rounding of such scores is more than what is allowed.
TEST(large_scores) {
    for (int D : head_sizes) {
        Problem p = problem(1, grid_small ? 130 : 1000, 1, D, 1000, DOCS_ONE, false);
        float *qkv = gpu_expected(p.qkv.count);
        for (size_t i = 0; i < p.qkv.count; i++) {
            size_t t = i / (size_t)p.ld, column = i % (size_t)p.ld;
            float factor = column < 2 * (size_t)p.C ? 1 + (float)(t / 100 % 4) : 1;
            qkv[i] = p.qkv.host[i] * factor;
        }
        p.qkv = gpu_copy<floatX>("qkv", qkv, p.qkv.count);
        float *lse = gpu_expected((size_t)p.n), *o;
        check_forward(&p, lse, &o, "large scores");
        gpu_end_case();
    }
}

// The same call again, over other rubbish: the same bits. On Hopper a block takes one piece of work
// after the other, 128 rows of a head each: 600 of them for its 132 processors, so that which block
// takes what differs.
TEST(same_bits_again) {
    const int H = sizeof(floatX) == sizeof(bf16) && !grid_small ? 50 : 2;
    for (int D : head_sizes) {
        Problem p = problem(grid_small ? 1 : 3, grid_small ? 65 : 500, H, D, 130, DOCS_MIX, false);
        size_t o_bytes = p.o.count * sizeof(float), dqkv_bytes = p.dqkv.count * sizeof(float);
        float *o = gpu_expected(p.o.count), *dqkv = gpu_expected(p.dqkv.count);
        for (int i = 0; i < (grid_small ? 2 : 5); i++) {
            CUDA_CHECK(cudaMemset(p.o.device, 0x7f, p.o.count * sizeof(floatX)));
            CUDA_CHECK(cudaMemset(p.dqkv.device, 0x7f, p.dqkv.count * sizeof(floatX)));
            forward(&p);
            backward_rotated(&p);
            gpu_read(p.o), gpu_read(p.dqkv);
            if (i == 0) memcpy(o, p.o.host, o_bytes), memcpy(dqkv, p.dqkv.host, dqkv_bytes);
            CHECK(!memcmp(o, p.o.host, o_bytes));
            CHECK(!memcmp(dqkv, p.dqkv.host, dqkv_bytes));
        }
        gpu_end_case();
    }
}

// A NaN in a row of k: o and lse are NaN where a query sees that key, and nowhere else. Backward
// gives NaN to all that these queries reach; and, as tiles hold 0 times NaN, to no more than what
// lies in a tile of at most 128 rows with it. The other head, and rows beyond, stay clean.
TEST(nan_stays_near) {
    const int T = 280, W = 20, key = 100, beyond = 256;  // from 256 on no query sees a key before
    for (int D : head_sizes) {
        Problem p = problem(1, T, 2, D, W, DOCS_EDGES, false);
        float *qkv = gpu_expected(p.qkv.count);
        memcpy(qkv, p.qkv.host, p.qkv.count * sizeof *qkv);
        qkv[key * p.ld + p.C + D - 1] = NAN;
        p.qkv = gpu_copy<floatX>("qkv", qkv, p.qkv.count);
        forward(&p), backward(&p);
        gpu_read(p.o), gpu_read(p.lse), gpu_read(p.dqkv);
        int wrong = 0, missing = 0, spread = 0;
        for (int i = 0; i < T; i++)
            for (int c = 0; c < p.C; c++) {
                bool in_head = c < D, sees = i >= key && i <= key + W && p.in_row[i] <= key;
                const float *d = p.dqkv.host + i * p.ld + c;
                wrong += isnan(p.o.host[i * p.ldo + c]) != (in_head && sees);
                wrong += isnan(p.lse.host[c / D * T + i]) != (in_head && sees);
                if (in_head && sees) missing += !isnan(d[0]);
                if (in_head && i == key) missing += !isnan(d[p.C]) + !isnan(d[2 * p.C]);
                if (!in_head || i >= beyond)
                    spread += isnan(d[0]) || isnan(d[p.C]) || isnan(d[2 * p.C]);
            }
        test_check(!wrong && !missing && !spread, __FILE__, __LINE__,
                   "D %d: found %d of o and lse wrong, %d gradients without a NaN that they must "
                   "have, %d with one from far away",
                   D, wrong, missing, spread);
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

// What a call costs the host, until it returns.
static void bench_host(void) {
    const int calls = 100;  // fewer than the stream holds
    Problem p = problem(1, 64, 1, 128, 64, DOCS_ONE, false);
    for (void (*call)(const Problem *) : {forward, backward}) {
        call(&p);
        CUDA_CHECK(cudaDeviceSynchronize());
        double start = test_seconds();
        for (int i = 0; i < calls; i++) call(&p);
        printf("%-9s host: %.2f us a call\n", call == forward ? "forward" : "backward",
               1e6 * (test_seconds() - start) / calls);
        CUDA_CHECK(cudaDeviceSynchronize());
    }
#if defined HOPPER && !defined PRECISION_FP32
    double start = test_seconds();
    for (int i = 0; i < calls; i++) tile_map(p.qkv.device, p.n, p.C, p.ld);
    printf("tile_map  host: %.2f us\n", 1e6 * (test_seconds() - start) / calls);
#endif
    gpu_end_case();
}

// length: of documents, on average; 0: rows are documents.
static void bench_shape(int B, int T, int H, int D, int W, int length) {
    Problem p = problem(B, T, H, D, W, DOCS_ONE, false);
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
    if (ATTENTION_ROTATES) bench("rotated", &p, docs, pairs, 5, backward_rotated);
    gpu_end_case();
}

int main(int argc, char **argv) {
    gpu_test_begin();
    if (argc > 1 && !strcmp(argv[1], "bench")) {
        bench_host();
        bench_shape(32, 2048, 6, 128, 2048, 0);
        bench_shape(32, 2048, 6, 128, 512, 0);
        bench_shape(32, 2048, 6, 128, 2048, 700);
        bench_shape(16, 2048, 16, 128, 2048, 0);
        bench_shape(64, 1024, 12, 64, 1024, 0);
        return 0;
    }
    RUN(one_row);
    RUN(rows);
    if (!grid_small) RUN(long_row);
    if (!grid_small) RUN(many_rows);
    if (sizeof(floatX) == sizeof(bf16)) RUN(large_scores);
    RUN(same_bits_again);
    RUN(nan_stays_near);
    return test_end();
}
