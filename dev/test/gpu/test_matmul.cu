// test_matmul.cu: products (llmc/matmul.cuh) against sums in double on the host. `test_matmul
// bench` times those that cuBLASLt has not.
#include <cuda_fp8.h>

#include "dev/test/gpu/test_tokens.cuh"  // filled_array
#include "llmc/matmul_tune.cuh"  // matmul_tune_forward, matmul_tune_dgrad, matmul_tune_wgrad
#include "llmc/matmul.cuh"       // matmul_forward, matmul_dgrad, matmul_wgrad, matmul_batched

// racecheck cannot launch cuBLAS's kernels: built for it, tests make only what gemm_sm90.cuh does.
#ifdef RACECHECK
constexpr bool cublas = false;
#else
constexpr bool cublas = true;
#endif

static Matmul mm;

// d (M, N) = alpha op(a) op(b) + beta c, of each matrix of a batch, with sums in double. c may be
// NULL.
static void reference(float *d, const float *a, bool ta, const float *b, bool tb, const float *c,
                      double alpha, double beta, int M, int N, int K, int batch) {
    double *rows = (double *)die_alloc((size_t)K * (size_t)N, sizeof *rows, "b by rows");
    for (int m = 0; m < batch; m++, a += (size_t)M * K, b += (size_t)K * N) {
        for (int k = 0; k < K; k++)
            for (int j = 0; j < N; j++)
                rows[(size_t)k * N + j] = tb ? b[(size_t)j * K + k] : b[(size_t)k * N + j];
#pragma omp parallel for
        for (int i = 0; i < M; i++) {
            double *sum = (double *)calloc((size_t)N, sizeof *sum);
            for (int k = 0; k < K; k++) {
                double x = ta ? a[(size_t)k * M + i] : a[(size_t)i * K + k];
                for (int j = 0; j < N; j++) sum[j] += x * rows[(size_t)k * N + j];
            }
            size_t at = ((size_t)m * M + i) * N;
            for (int j = 0; j < N; j++)
                d[at + j] = (float)(alpha * sum[j] + (c ? beta * c[at + j] : 0));
            free(sum);
        }
    }
    free(rows);
}

// The sizes of a linear layer: y (n, N) = x (n, K) W^T.
typedef struct {
    int K, N;
} Layer;
static const Layer all_layers[] = {{8, 8},     {48, 144},  {48, 48},    {128, 384},
                                   {768, 128}, {128, 768}, {768, 3072}, {3072, 768}};
static const int all_n[] = {1, 2, 63, 64, 65, 127, 128, 129, 192, 1000};

// check(n, K, N) over the grid.
static void each_layer(void (*check)(int n, int K, int N)) {
    for (const Layer &l : all_layers)
        for (int n : all_n)
            if (!grid_small || (n <= 65 && l.K <= 128 && l.N <= 384)) check(n, l.K, l.N);
}

static void check_forward(int n, int K, int N) {
    size_t nN = (size_t)n * N;
    GpuArray<floatX> x = gpu_normal<floatX>("x", (size_t)n * K, 1);
    GpuArray<floatX> w = gpu_normal<floatX>("w", (size_t)N * K, 1);
    GpuArray<floatX> residual = gpu_normal<floatX>("residual", nN, 30);
    GpuArray<floatX> y = gpu_poisoned<floatX>("y", nN);
    GpuArray<floatX> sum = gpu_poisoned<floatX>("sum", nN);
    GpuArray<floatX> in_place = gpu_copy<floatX>("in_place", residual.host, nN);
    MatmulOperand X = matmul_operand(x.device), W = matmul_operand(w.device);
    matmul_forward(&mm, y.device, X, W, {MATMUL_STORE}, n, K, N, 0);
    matmul_forward(&mm, sum.device, X, W, {MATMUL_ADD, residual.device}, n, K, N, 0);
    matmul_forward(&mm, in_place.device, X, W, {MATMUL_ADD}, n, K, N, 0);
    float *expected = gpu_expected(nN);
    reference(expected, x.host, false, w.host, true, NULL, 1, 0, n, N, K, 1);
    gpu_compare(y, expected, n, N, "n %d, K %d, N %d", n, K, N);
    for (size_t i = 0; i < nN; i++) expected[i] += residual.host[i];
    gpu_compare(sum, expected, n, N, "n %d, K %d, N %d", n, K, N);
    gpu_compare(in_place, expected, n, N, "n %d, K %d, N %d", n, K, N);
    gpu_end_case();
}

static void check_dgrad(int n, int K, int N) {
    size_t nK = (size_t)n * K;
    GpuArray<floatX> dy = gpu_normal<floatX>("dy", (size_t)n * N, 1);
    GpuArray<floatX> w = gpu_normal<floatX>("w", (size_t)N * K, 1);
    GpuArray<floatX> dx = gpu_poisoned<floatX>("dx", nK);
    GpuArray<floatX> added = gpu_normal<floatX>("added", nK, 30);
    float *expected = gpu_expected(nK), *before = added.host;
    MatmulOperand dY = matmul_operand(dy.device), W = matmul_operand(w.device);
    matmul_dgrad(&mm, dx.device, dY, W, {MATMUL_STORE}, n, K, N, 0);
    matmul_dgrad(&mm, added.device, dY, W, {MATMUL_ADD}, n, K, N, 0);
    reference(expected, dy.host, false, w.host, false, NULL, 1, 0, n, K, N, 1);
    gpu_compare(dx, expected, n, K, "n %d, K %d, N %d", n, K, N);
    for (size_t i = 0; i < nK; i++) expected[i] += before[i];
    gpu_compare(added, expected, n, K, "n %d, K %d, N %d", n, K, N);
    gpu_end_case();
}

static void check_wgrad(int n, int K, int N, MatmulEpilogueKind into) {
    GpuArray<floatX> dy = gpu_normal<floatX>("dy", (size_t)n * N, 1);
    GpuArray<floatX> x = gpu_normal<floatX>("x", (size_t)n * K, 1);
    size_t count = (size_t)N * K;
    bool add = into == MATMUL_ADD;
    GpuArray<float> dw =
        add ? gpu_normal<float>("dw", count, 10) : gpu_poisoned<float>("dw", count);
    float *expected = gpu_expected(count);
    reference(expected, dy.host, true, x.host, false, add ? dw.host : expected, 1, add, N, K, n, 1);
    matmul_wgrad(&mm, dw.device, matmul_operand(dy.device), matmul_operand(x.device), into, n, K, N,
                 0);
    gpu_compare(dw, expected, N, K, "n %d, K %d, N %d", n, K, N);
    gpu_end_case();
}

TEST(forward) { each_layer(check_forward); }
TEST(dgrad) { each_layer(check_dgrad); }
static void check_wgrad_both(int n, int K, int N) {
    check_wgrad(n, K, N, MATMUL_ADD), check_wgrad(n, K, N, MATMUL_STORE);
}
TEST(wgrad) { each_layer(check_wgrad_both); }

// Muon's products among them: X X^T, X^T X, b A + c A^2 and a X + B X.
TEST(batched) {
    static const struct {
        int M, N, K, batch;
    } shape[] = {{8, 8, 8, 1},       {48, 48, 192, 3},    {128, 128, 128, 5}, {128, 384, 128, 2},
                 {768, 768, 768, 2}, {768, 768, 3072, 2}, {3072, 768, 768, 2}};
    for (int i = 0; i < (grid_small ? 4 : 7); i++)
        for (int kind = 0; kind < 16; kind++) {
            int M = shape[i].M, N = shape[i].N, K = shape[i].K, batch = shape[i].batch;
            bool ta = kind & 1, tb = kind & 2, add = kind & 4, in_place = kind & 8;
            if ((in_place && !add) || (M * (double)N * K > 1e9 && ta != tb)) continue;
            float alpha = add ? 0.75f : 1, beta = add ? -1.5f : 0;
            size_t count = (size_t)batch * M * N;
            GpuArray<floatX> a = gpu_normal<floatX>("a", (size_t)batch * M * K, 1);
            GpuArray<floatX> b = gpu_normal<floatX>("b", (size_t)batch * K * N, 1);
            GpuArray<floatX> c = gpu_normal<floatX>("c", count, 10);
            GpuArray<floatX> d = gpu_poisoned<floatX>("d", count);
            float *expected = gpu_expected(count);
            reference(expected, a.host, ta, b.host, tb, add ? c.host : NULL, alpha, beta, M, N, K,
                      batch);
            GpuArray<floatX> &out = in_place ? c : d;
            matmul_batched(&mm, out.device, a.device, ta, b.device, tb, add ? c.device : NULL,
                           alpha, beta, M, N, K, batch, 0);
            gpu_compare(out, expected, batch * M, N, "M %d, N %d, K %d, batch %d, kind %d", M, N, K,
                        batch, kind);
            gpu_end_case();
        }
}

// Symmetric products: X X^T, X^T X, and with what is added; whole blocks of (128, 128), which a
// kernel of Hopper's makes one side of the diagonal of, and other sizes.
TEST(square) {
    static const struct {
        int M, K, batch;
    } shape[] = {{8, 8, 1},     {48, 192, 3},   {128, 64, 1},   {128, 128, 3}, {256, 320, 2},
                 {384, 64, 3},  {384, 384, 5},  {192, 192, 2},  {640, 72, 1},  {640, 128, 30},
                 {768, 768, 3}, {768, 3072, 2}, {1536, 1536, 1}};
    for (int i = 0; i < (grid_small ? 6 : 13); i++)
        for (int kind = 0; kind < 4; kind++) {
            int M = shape[i].M, K = shape[i].K, batch = shape[i].batch;
            bool tx = kind & 1, add = kind & 2;
            if (!cublas && (!gemm_sm90_squares(M, K) || kind == 3)) continue;
            float alpha = add ? 0.75f : 1, beta = add ? -1.5f : 0;
            size_t count = (size_t)batch * M * M;
            GpuArray<floatX> x = gpu_normal<floatX>("x", (size_t)batch * M * K, 1);
            GpuArray<floatX> c = gpu_normal<floatX>("c", count, 10);
            for (size_t at = 0; at < count; at++) {
                size_t row = at / M % M, column = at % M;
                if (column > row) c.host[at] = c.host[at - at % (M * M) + column * M + row];
            }
            c = gpu_copy<floatX>("c", c.host, count);
            GpuArray<floatX> d = gpu_poisoned<floatX>("d", count);
            GpuArray<floatX> again = gpu_poisoned<floatX>("again", count);
            float *expected = gpu_expected(count);
            reference(expected, x.host, tx, x.host, !tx, add ? c.host : NULL, alpha, beta, M, M, K,
                      batch);
            for (const GpuArray<floatX> &out : {d, again})
                matmul_square(&mm, out.device, x.device, tx, add ? c.device : NULL, alpha, beta, M,
                              K, batch, 0);
            gpu_compare(d, expected, batch * M, M, "M %d, K %d, batch %d, kind %d", M, K, batch,
                        kind);
            CHECK(same_bits(d, again));
            gpu_end_case();
        }
}

// The same call gives the same bits, whatever ran before it and lies in the workspace.
TEST(same_bits_again) {
    for (int n : {1, 65, grid_small ? 128 : 1000}) {
        int K = 768, N = 128;
        GpuArray<floatX> x = gpu_normal<floatX>("x", (size_t)n * K, 1);
        GpuArray<floatX> dy = gpu_normal<floatX>("dy", (size_t)n * N, 1);
        GpuArray<floatX> w = gpu_normal<floatX>("w", (size_t)N * K, 1);
        float *first[3] = {};
        for (int run = 0; run < 3; run++) {
            GpuArray<floatX> y = gpu_poisoned<floatX>("y", (size_t)n * N);
            GpuArray<floatX> dx = gpu_poisoned<floatX>("dx", (size_t)n * K);
            GpuArray<float> dw = gpu_poisoned<float>("dw", (size_t)N * K);
            MatmulOperand X = matmul_operand(x.device), dY = matmul_operand(dy.device);
            MatmulOperand W = matmul_operand(w.device);
            CUDA_CHECK(cudaMemset(mm.workspace, 17 * run, MATMUL_WORKSPACE));
            matmul_forward(&mm, y.device, X, W, {MATMUL_STORE}, n, K, N, 0);
            matmul_dgrad(&mm, dx.device, dY, W, {MATMUL_STORE}, n, K, N, 0);
            matmul_wgrad(&mm, dw.device, dY, X, MATMUL_STORE, n, K, N, 0);
            float *now[3] = {gpu_read(y), gpu_read(dx), gpu_read(dw)};
            size_t count[3] = {y.count, dx.count, dw.count};
            for (int i = 0; i < 3; i++) {
                if (run == 0) first[i] = now[i];
                CHECK(!memcmp(now[i], first[i], count[i] * sizeof(float)));
            }
        }
        gpu_end_case();
    }
}

// ---------------------------------------------------------------------------------------------
// ReLU^2 after a product. Whether or not a kernel does both, the same must lie in memory.

// What a case is made of: a (n, sum), b (columns, sum) or, in backward, (sum, columns), and the
// product (n, columns).
typedef struct {
    int n, columns, sum;
    GpuArray<floatX> a, b;
    float *product;
} Relu2;
#define RELU2_SHAPE "n %d, columns %d, sum %d", c.n, c.columns, c.sum

static Relu2 relu2_case(int n, int columns, int sum, bool backward) {
    Relu2 c = {n,
               columns,
               sum,
               gpu_normal<floatX>("a", (size_t)n * (size_t)sum, 1),
               gpu_normal<floatX>("b", (size_t)columns * (size_t)sum, 1),
               gpu_expected((size_t)n * (size_t)columns)};
    reference(c.product, c.a.host, false, c.b.host, !backward, NULL, 1, 0, n, columns, sum, 1);
    return c;
}

static GpuArray<floatX> relu2_result(const char *name, const Relu2 *c) {
    return gpu_poisoned<floatX>(name, (size_t)c->n * (size_t)c->columns);
}

static void run_forward(const Relu2 *c, GpuArray<floatX> &y, cudaStream_t stream) {
    matmul_forward(&mm, y.device, matmul_operand(c->a.device), matmul_operand(c->b.device),
                   {MATMUL_RELU2}, c->n, c->sum, c->columns, stream);
}

static void run_backward(const Relu2 *c, GpuArray<floatX> &dz, const GpuArray<floatX> &y,
                         cudaStream_t stream) {
    matmul_dgrad(&mm, dz.device, matmul_operand(c->a.device), matmul_operand(c->b.device),
                 {MATMUL_RELU2_BACKWARD, y.device}, c->n, c->columns, c->sum, stream);
}

static void check_relu2_forward(int n, int columns, int sum) {
    Relu2 c = relu2_case(n, columns, sum, false);
    GpuArray<floatX> y = relu2_result("y", &c), again = relu2_result("again", &c);
    run_forward(&c, y, 0);
    run_forward(&c, again, 0);
    cpu::relu2_forward(c.product, c.product, (int64_t)y.count);
    gpu_compare(y, c.product, n, columns, RELU2_SHAPE);
    CHECK(same_bits(y, again));
    gpu_end_case();
}

static void check_relu2_backward(int n, int columns, int sum) {
    Relu2 c = relu2_case(n, columns, sum, true);
    GpuArray<floatX> x = gpu_normal<floatX>("x", (size_t)n * (size_t)columns, 2);
    float *square = gpu_expected(x.count);
    cpu::relu2_forward(square, x.host, (int64_t)x.count);
    GpuArray<floatX> y = gpu_copy<floatX>("y", square, x.count);
    GpuArray<floatX> dz = relu2_result("dz", &c), again = relu2_result("again", &c);
    run_backward(&c, dz, y, 0);
    run_backward(&c, again, y, 0);
    cpu::relu2_backward(c.product, c.product, x.host, (int64_t)x.count);
    gpu_compare(dz, c.product, n, columns, RELU2_SHAPE);
    for (size_t i = 0; i < x.count; i++)
        if (x.host[i] <= 0 && dz.host[i] != 0) {
            test_check(false, __FILE__, __LINE__, "dz[%zu] is %g where x is %g", i, dz.host[i],
                       x.host[i]);
            break;
        }
    CHECK(same_bits(dz, again));
    gpu_end_case();
}

// Sizes that a kernel of Hopper's takes and sizes that it does not; at the end several tiles a
// block, in bands, of fewer and of more steps than its ring has stages (an emulated GPU runs two).
static void each_relu2(void (*check)(int n, int columns, int sum)) {
    static const int shape[][2] = {{256, 64}, {256, 128}, {8, 48},     {384, 128},
                                   {256, 72}, {768, 320}, {3072, 768}, {768, 3072}};
    for (auto s : shape)
        for (int n : {1, 64, 65, 127, 128, 129, 256, 257, 1000})
            if ((!grid_small || (n < 130 && s[0] < 768)) && (cublas || gemm_sm90_fits(s[0], s[1])))
                check(n, s[0], s[1]);
    if (!cublas)
        check(6000, 768, 320);
    else if (grid_small)
        check(300, 512, 320);
    else
        check(9000, 3072, 192), check(9000, 3072, 768), check(9000, 768, 3072);
}

TEST(relu2_epilogue) { each_relu2(check_relu2_forward); }
TEST(relu2_backward_epilogue) { each_relu2(check_relu2_backward); }

// NaN stays NaN on its way through, and spoils nothing but its row; so does infinity.
TEST(relu2_not_finite) {
    for (int columns : {256, 264}) {
        Relu2 c = relu2_case(130, columns, 128, false);
        for (int k = 0; k < c.sum; k++) c.a.host[5 * c.sum + k] = 0, c.a.host[129 * c.sum + k] = 0;
        c.a.host[5 * c.sum + 77] = NAN, c.a.host[129 * c.sum] = INFINITY;
        c.a = gpu_copy<floatX>("a", c.a.host, c.a.count);
        GpuArray<floatX> y = relu2_result("y", &c), dz = relu2_result("dz", &c);
        run_forward(&c, y, 0);
        run_backward(&c, dz, y, 0);
        gpu_read(y), gpu_read(dz);
        for (int i = 0; i < 130 * columns; i++) {
            int row = i / columns;
            if (row == 5 ? isnan(y.host[i]) && isnan(dz.host[i])
                         : row == 129 || (isfinite(y.host[i]) && isfinite(dz.host[i])))
                continue;
            CHECK_INT(i, -1);
            break;
        }
        int right = 0;  // infinite where b is positive, 0 where it is negative
        for (int j = 0; j < columns; j++) {
            float b = c.b.host[j * c.sum], found = y.host[129 * columns + j];
            right += b > 0 ? found == INFINITY : b < 0 ? found == 0 : 1;
        }
        CHECK_INT(right, columns);
        gpu_end_case();
    }
}

// Both kinds, captured, leave the same bits as launched.
TEST(relu2_captured) {
    Relu2 c = relu2_case(200, 512, 128, false);
    GpuArray<floatX> y = relu2_result("y", &c), y_replayed = relu2_result("y replayed", &c);
    GpuArray<floatX> dz = relu2_result("dz", &c), dz_replayed = relu2_result("dz replayed", &c);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    run_forward(&c, y_replayed, stream);
    run_backward(&c, dz_replayed, y_replayed, stream);
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    run_forward(&c, y, stream);
    run_backward(&c, dz, y, stream);
    for (int i = 0; i < 2; i++) {
        CUDA_CHECK(cudaMemsetAsync(y_replayed.device, 0xff, y.count * sizeof(floatX), stream));
        CUDA_CHECK(cudaGraphLaunch(exec, stream));
    }
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CHECK(same_bits(y, y_replayed) && same_bits(dz, dz_replayed));
    CUDA_CHECK(cudaGraphExecDestroy(exec));
    CUDA_CHECK(cudaGraphDestroy(graph));
    CUDA_CHECK(cudaStreamDestroy(stream));
    gpu_end_case();
}

// ---------------------------------------------------------------------------------------------

// More shapes than the table of plans holds, as samples bring them.
// A plan that was tuned gives the bits that it gave before. In BF16 on a GPU some shape's is
// replaced.
TEST(tuned_plans_have_the_same_bits) {
    if (sizeof(floatX) == 4) SKIP("of BF16");
    Matmul tuned;
    matmul_init(&tuned, &test_gpu);
    for (int n : {64, grid_small ? 136 : 8192}) {
        int K = grid_small ? 64 : 768, N = grid_small ? 128 : 3072;
        size_t bytes = 4 * ((size_t)n * K + (size_t)n * N + (size_t)N * K) + 4096;
        void *memory = gpu_bytes("memory", bytes);
        GpuArray<floatX> x = gpu_normal<floatX>("x", (size_t)n * K, 1);
        GpuArray<floatX> w = gpu_normal<floatX>("w", (size_t)N * K, 1);
        GpuArray<floatX> dy = gpu_normal<floatX>("dy", (size_t)n * N, 1);
        GpuArray<floatX> y[2], dx[2];
        GpuArray<float> dw[2];
        CHECK(!matmul_tune_forward(&tuned, n, K, N, memory, 1000, 0));  // too little memory
        matmul_tune_forward(&tuned, n, K, N, memory, bytes, 0);
        matmul_tune_dgrad(&tuned, n, K, N, memory, bytes, 0);
        matmul_tune_wgrad(&tuned, n, K, N, memory, bytes, 0);
        int planned = tuned.planned;
        for (int i = 0; i < 2; i++) {
            Matmul *by = i ? &tuned : &mm;
            y[i] = gpu_poisoned<floatX>("y", (size_t)n * N);
            dx[i] = gpu_poisoned<floatX>("dx", (size_t)n * K);
            dw[i] = gpu_poisoned<float>("dw", (size_t)N * K);
            MatmulOperand X = matmul_operand(x.device), dY = matmul_operand(dy.device);
            MatmulOperand W = matmul_operand(w.device);
            matmul_forward(by, y[i].device, X, W, {MATMUL_STORE}, n, K, N, 0);
            matmul_dgrad(by, dx[i].device, dY, W, {MATMUL_STORE}, n, K, N, 0);
            matmul_wgrad(by, dw[i].device, dY, X, MATMUL_STORE, n, K, N, 0);
        }
        CHECK(same_bits(y[0], y[1]) && same_bits(dx[0], dx[1]) && same_bits(dw[0], dw[1]));
        CHECK_INT(tuned.planned, planned);  // the products took the plans that were tuned
        gpu_end_case();
    }
    matmul_free(&tuned);
}

TEST(more_shapes_than_plans) {
    const int K = 8, N = 16, all = grid_small ? 40 : MATMUL_PLANS + 50;
    GpuArray<floatX> x = gpu_normal<floatX>("x", (size_t)all * K, 1);
    GpuArray<floatX> w = gpu_normal<floatX>("w", N * K, 1);
    float *expected = gpu_expected((size_t)all * N);
    reference(expected, x.host, false, w.host, true, NULL, 1, 0, all, N, K, 1);
    GpuArray<floatX> y = gpu_poisoned<floatX>("y", (size_t)all * N);
    // From the longest down: row n - 1 keeps what the product of n rows wrote last.
    for (int n = all; n > 0; n--)
        matmul_forward(&mm, y.device, matmul_operand(x.device), matmul_operand(w.device),
                       {MATMUL_STORE}, n, K, N, 0);
    gpu_compare(y, expected, all, N, "n up to %d", all);
    CHECK(mm.planned <= MATMUL_PLANS / 2);
    gpu_end_case();
}

// Captured before its shape was ever seen: planning neither allocates nor waits.
TEST(capture_in_a_graph) {
    const int n = 72, K = 128, N = 256;
    GpuArray<floatX> x = gpu_normal<floatX>("x", n * K, 1);
    GpuArray<floatX> w = gpu_normal<floatX>("w", N * K, 1);
    GpuArray<floatX> y = gpu_poisoned<floatX>("y", n * N);
    float *expected = gpu_expected(n * N);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    matmul_forward(&mm, y.device, matmul_operand(x.device), matmul_operand(w.device),
                   {MATMUL_STORE}, n, K, N, stream);
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CUDA_CHECK(cudaGraphLaunch(exec, stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));
    reference(expected, x.host, false, w.host, true, NULL, 1, 0, n, N, K, 1);
    gpu_compare(y, expected, n, N, "n %d, K %d, N %d", n, K, N);
    CUDA_CHECK(cudaGraphExecDestroy(exec));
    CUDA_CHECK(cudaGraphDestroy(graph));
    CUDA_CHECK(cudaStreamDestroy(stream));
    gpu_end_case();
}

#ifndef PRECISION_FP32
typedef __nv_fp8_e4m3 fp8;
static inline void to_host(float *to, fp8 from) { *to = (float)from; }
static inline void from_host(fp8 *to, float from) { *to = fp8(from); }

// FP8 numbers (rows, cols) with a scale; only_transposed: none but the transposed copy holds them.
static MatmulOperand fp8_operand(GpuArray<fp8> x, const float *scale, int rows, int cols,
                                 bool only_transposed) {
    float *turned = gpu_expected(x.count);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) turned[j * rows + i] = x.host[i * cols + j];
    const fp8 *copy = gpu_copy<fp8>("transposed", turned, x.count).device;
    const fp8 *data = only_transposed ? gpu_poisoned<fp8>("unused", x.count).device : x.device;
    return {data, CUDA_R_8F_E4M3, scale, only_transposed ? copy : NULL};
}

// Operands as the FP8 build will hand them over: scales on the device, transposed copies where the
// sum does not run along the rows.
TEST(fp8_operands) {
    if (test_gpu.major * 10 + test_gpu.minor < 89) SKIP("no FP8 before compute capability 8.9");
    const int n = 64, K = 128, N = 256;
    const float scales[] = {0.5f, 0, 0, 0, 0.25f, 0, 0, 0, 4};  // each at a multiple of 16 bytes
    GpuArray<float> scale = gpu_copy<float>("scales", scales, 9);
    GpuArray<fp8> x = gpu_normal<fp8>("x", n * K, 1), w = gpu_normal<fp8>("w", N * K, 1);
    GpuArray<fp8> dy = gpu_normal<fp8>("dy", n * N, 1);
    GpuArray<floatX> y = gpu_poisoned<floatX>("y", n * N), dx = gpu_poisoned<floatX>("dx", n * K);
    GpuArray<float> dw = gpu_normal<float>("dw", N * K, 10);
    float *expected_y = gpu_expected(n * N), *expected_dx = gpu_expected(n * K);
    float *expected_dw = gpu_expected(N * K);
    dw.tolerance = 1e-3;  // the sums inside the tensor cores hold fewer bits for FP8
    reference(expected_y, x.host, false, w.host, true, NULL, 0.125, 0, n, N, K, 1);
    reference(expected_dx, dy.host, false, w.host, false, NULL, 1, 0, n, K, N, 1);
    reference(expected_dw, dy.host, true, x.host, false, dw.host, 2, 1, N, K, n, 1);
    const float *sx = scale.device, *sw = sx + 4, *sdy = sx + 8;
    matmul_forward(&mm, y.device, fp8_operand(x, sx, n, K, false), fp8_operand(w, sw, N, K, false),
                   {MATMUL_STORE}, n, K, N, 0);
    matmul_dgrad(&mm, dx.device, fp8_operand(dy, sdy, n, N, false), fp8_operand(w, sw, N, K, true),
                 {MATMUL_STORE}, n, K, N, 0);
    matmul_wgrad(&mm, dw.device, fp8_operand(dy, sdy, n, N, true), fp8_operand(x, sx, n, K, true),
                 MATMUL_ADD, n, K, N, 0);
    gpu_compare(y, expected_y, n, N, "n %d, K %d, N %d", n, K, N);
    gpu_compare(dx, expected_dx, n, K, "n %d, K %d, N %d", n, K, N);
    gpu_compare(dw, expected_dw, N, K, "n %d, K %d, N %d", n, K, N);
    gpu_end_case();
}
#endif

// ---------------------------------------------------------------------------------------------
// Bench: a product that ends in ReLU^2 beside cuBLASLt's and a kernel for ReLU^2.

// Times ours() and theirs() by turns, each call by itself, and prints the medians: a GPU that comes
// to its power limit lowers its clocks for tenths of a second.
template <class Ours, class Theirs>
static void compare(const char *name, int n, int columns, int sum, Ours ours, Theirs theirs) {
    enum { TIMES = 51 };
    static cudaEvent_t event[TIMES][3];
    double us[2][TIMES], flops = 2.0 * n * columns * sum;
    for (int i = -20; i < TIMES; i++) {
        for (int k = 0; i >= 0 && k < 3; k++)
            if (!event[i][k]) CUDA_CHECK(cudaEventCreate(&event[i][k]));
        if (i >= 0) CUDA_CHECK(cudaEventRecord(event[i][0]));
        ours();
        if (i >= 0) CUDA_CHECK(cudaEventRecord(event[i][1]));
        theirs();
        if (i >= 0) CUDA_CHECK(cudaEventRecord(event[i][2]));
    }
    CUDA_CHECK(cudaDeviceSynchronize());
    for (int k = 0; k < 2; k++) {
        for (int i = 0; i < TIMES; i++) {
            float ms = 0;
            CUDA_CHECK(cudaEventElapsedTime(&ms, event[i][k], event[i][k + 1]));
            us[k][i] = 1e3 * ms;
        }
        qsort(us[k], TIMES, sizeof(double), [](const void *a, const void *b) {
            double x = *(const double *)a, y = *(const double *)b;
            return (x > y) - (x < y);
        });
    }
    double our = us[0][TIMES / 2], their = us[1][TIMES / 2];
    printf("%-14s %s  n %6d  columns %4d  sum %4d  %8.1f us %4.0f TFLOP/s  (%.0f to %.0f)   "
           "cuBLASLt%s %8.1f us   %.3f\n",
           name, PRECISION_NAME, n, columns, sum, our, 1e-6 * flops / our, us[0][TIMES / 10],
           us[0][TIMES - 1 - TIMES / 10], strstr(name, "relu2") ? " + kernel" : "", their,
           our / their);
}

static void lines(int n, int C) {
    int F = 4 * C;
    size_t nF = (size_t)n * F;
    floatX *x = filled_array<floatX>((size_t)n * C), *w = filled_array<floatX>((size_t)F * C),
           *y = filled_array<floatX>(nF), *dz = filled_array<floatX>(nF);
    MatmulOperand X = matmul_operand(x), W = matmul_operand(w);
    compare(
        "fc relu2", n, F, C, [=] { matmul_forward(&mm, y, X, W, {MATMUL_RELU2}, n, C, F, 0); },
        [=] {
            matmul_forward(&mm, y, X, W, {MATMUL_STORE}, n, C, F, 0);
            relu2_forward(y, nF, 0);
        });
    compare(
        "relu2 backward", n, F, C,
        [=] {
            matmul_dgrad(&mm, dz, X, W, {MATMUL_RELU2_BACKWARD, y}, n, F, C, 0);
        },
        [=] {
            matmul_dgrad(&mm, dz, X, W, {MATMUL_STORE}, n, F, C, 0);
            relu2_backward(dz, y, nF, 0);
        });
    gpu_end_case();
}

// Muon's, in batches of as many as its scratch holds. TFLOP/s count both halves.
static void square_lines(int M, int K, int batch) {
    floatX *x = filled_array<floatX>((size_t)batch * M * K),
           *a = filled_array<floatX>((size_t)batch * M * M),
           *d = filled_array<floatX>((size_t)batch * M * M);
    for (bool tx : {false, true})
        compare(
            tx ? "X^T X" : "X X^T", batch * M, M, K,
            [=] { matmul_square(&mm, a, x, tx, NULL, 1, 0, M, K, batch, 0); },
            [=] { matmul_batched(&mm, a, x, tx, x, !tx, NULL, 1, 0, M, M, K, batch, 0); });
    compare(
        "b A + c A^2", batch * M, M, M,
        [=] { matmul_square(&mm, d, a, false, a, 2, -1, M, M, batch, 0); },
        [=] { matmul_batched(&mm, d, a, false, a, false, a, 2, -1, M, M, M, batch, 0); });
    gpu_end_case();
}

int main(int argc, char **argv) {
    gpu_test_begin();
    matmul_init(&mm, &test_gpu);
    if (argc > 1 && !strcmp(argv[1], "bench")) {
        for (int i = 0; i < 2; i++) lines(131072, 768), lines(65536, 768), lines(32768, 1536);
        square_lines(1536, 1536, 56), square_lines(1536, 6144, 22);
        square_lines(768, 768, 48), square_lines(768, 3072, 12);
        return 0;
    }
    RUN(square);
    RUN(relu2_epilogue);
    RUN(relu2_backward_epilogue);
    if (!cublas) return test_end();
    RUN(relu2_not_finite);
    RUN(forward);
    RUN(dgrad);
    RUN(wgrad);
    RUN(batched);
    RUN(same_bits_again);
    RUN(relu2_captured);
    RUN(tuned_plans_have_the_same_bits);
    RUN(more_shapes_than_plans);
    RUN(capture_in_a_graph);
#ifndef PRECISION_FP32
    RUN(fp8_operands);
#endif
    matmul_free(&mm);
    return test_end();
}
