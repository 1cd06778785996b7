// muon.cu: a ladder. Muon's update of `count` matrices of one shape, each w (R, K), gradient G:
//
//     1. buf = mu buf + (1-mu) G,   X = (1-mu) G + mu buf
//     2. X[r] *= (||X|| / sqrt(R)) / max(||X[r]||, 1e-6)                       of each row r
//     3. X /= 1.01 ||X|| + 1e-6;  five times, each with its own a, b, c:       Polar Express
//            R <= K:  A = X X^T,  X = a X + (b A + c A^2) X
//            R >  K:  A = X^T X,  X = a X + X (b A + c A^2)
//     4. X *= sqrt(min(R, K)) / max(||X||, 1e-6)
//     5. v = mean square of each row (R >= K) or column of X, n its length,
//        s = b2 s + (1-b2) v,  r = 1/sqrt(max(s, 1e-10)),
//        X *= r sqrt(n sum v) / max(sqrt(n sum v r^2), 1e-10)
//     6. w -= lr X + lr wd w [X w >= 0],  lr times sqrt(max(1, R/K));  and w once more, in BF16
//
// ||X||: the root of the sum of squares. G, buf, s and w are FP32. llmc/muon.cuh says where each
// step comes from. Ladders to read before this one: dev/cuda/rmsnorm.cu, for what moves memory, and
// dev/cuda/gemm_relu2.cu, for what multiplies. `make ladder OP=muon` checks and times every rung.
//
//     rung  what it changes, and why that is faster                     us  TFLOP/s of top times v1
//     v1    nothing yet: the CPU's loops, a matrix at a time       529,106      1.2   0.2%      1.0
//     v2    products in BF16, on tensor cores                        6,908       94    14%       77
//     v3    all matrices at once: the GPU is full                    1,899      344    51%      279
//     v4    of a symmetric product only half is computed             1,795      364    54%      295
//     llmc  half the bytes in what is not a product                  1,327      492    73%      399
//
// (H200; 48 matrices (768, 768): wq, wk, wv, wo of 12 layers. TFLOP/s: of all products, computed by
// half or not. v4 takes a build for sm_90a alone: HOPPER.)
//
// THE BILL. Step 3 takes three products of 2 x 768^3 FLOPs, five times, for 48 matrices: 6.5e11
// FLOPs, 970 us at the 672 TFLOP/s that cuBLASLt makes of a large product. Two of the three are
// symmetric; half of each need not be computed, which in whole tiles saves 22%: 755 us. All else is
// passes over memory. llmc/ moves 36 bytes an element, 1.0 GB, in 240 us at 4.23 TB/s. So it cannot
// be done in much less than 1000 us, 97% of the ceiling as it is counted here.
//
// Is that much? It is 23,040 FLOPs an element of w. Forward and backward take 6 an element and
// token: in a batch of 131,072 tokens 34 times as many. AdamW would move 30 bytes an element, in
// 200 us.
#include <assert.h>

#include "dev/cuda/ladder.cuh"  // Rung, ladder_check, ladder_time
#include "llmc/muon.cuh"        // muon_update; muon_polar_express, muon_even, muon_second, ...

static Matmul matmul_context;

typedef struct {
    int count, R, K;        // matrices, one after the other
    int side, lines;        // min(R, K), max(R, K)
    MuonArenas arena;       // w, w in BF16, G, buf (count, R, K), s (count, lines)
    const StepState *step;  // mu, b2, lr, wd; what clipping multiplies G by
    float *x;               // (count, R, K) scratch: X in FP32
    double *squares;        // (count, lines) scratch: of rows or columns
    float *factor;          // (count, lines) scratch: what those are multiplied by
    float *wide;            // v1's scratch for products: see Products
    Table table;            // of the matrices
    ShardPlan plan;         // of one rank
    Muon muon;              // llmc's: lists of matrices, and scratch
} Job;

typedef void MuonUpdate(Job *j, cudaStream_t stream);

// ---------------------------------------------------------------------------------------------
// v1: each step as it stands above, one kernel after the other; a kernel begins when the one before
// it has ended. First what is not a product, which v1 to v4 share; it can take a batch of matrices
// at once, of which v1 makes no use.
//
// Two kinds of work alternate. Where each element goes its own way, a thread takes one. But what X
// is multiplied by in steps 2 to 5 depends on all of a row (or column) and on all of the matrix.
// Then a warp adds up the squares of a row; a block adds up those sums, and makes a factor for each
// row; and a third kernel multiplies. muon_even and the like are the formulas above, one function
// each, in llmc/muon_gate.cuh. Squares are added in double.

constexpr int THREADS = 256, WARPS = THREADS / WARP;

// Step 1.
static __global__ void momentum_kernel(float *x, float *buf, const float *g, const StepState *step,
                                       int numel) {
    int i = blockIdx.x * THREADS + threadIdx.x;  // this thread's element
    if (i >= numel) return;
    float mu = step->momentum, gi = step->grad_scale * g[i];
    buf[i] = mu * buf[i] + (1 - mu) * gi;
    x[i] = muon_nesterov(gi, buf[i], mu);
}

// The squares of each row, or column, of all matrices: `lines` of them, of n elements.
template <class T>
static __global__ void squares_kernel(double *squares, const T *x, bool rows, int lines, int R,
                                      int K) {
    int i = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (i >= lines) return;
    int n = rows ? K : R, along = rows ? 1 : K;  // columns: neighbours in memory are K apart
    x += rows ? (size_t)i * K : (size_t)(i / K) * R * K + i % K;
    double sum = 0;
    for (int j = lane; j < n; j += WARP) {
        double e = to_float(x[(size_t)j * along]);
        sum += e * e;
    }
    sum = warp_sum(sum);
    if (lane == 0) squares[i] = sum;
}

enum Factor { EVEN, SHRINK, RESTORE };  // step 2; the division of step 3; step 4

// A block takes a matrix: what each row is multiplied by.
static __global__ void factor_kernel(float *factor, const double *squares, Factor what, int R,
                                     int side) {
    factor += (size_t)blockIdx.x * R, squares += (size_t)blockIdx.x * R;
    double all = 0;
    for (int r = threadIdx.x; r < R; r += THREADS) all += squares[r];
    all = block_sum<THREADS>(all);
    for (int r = threadIdx.x; r < R; r += THREADS)
        factor[r] = (float)(what == EVEN     ? muon_even(sqrt(all / R), squares[r])
                            : what == SHRINK ? muon_shrink(all)
                                             : muon_restore(all, side));
}

// A block takes a matrix: step 5's s, and what each line is multiplied by; n v: its squares.
static __global__ void second_kernel(float *factor, const double *squares, float *second,
                                     const StepState *step, int lines, int n) {
    size_t at = (size_t)blockIdx.x * lines;
    factor += at, squares += at, second += at;
    double before = 0, after = 0;
    for (int i = threadIdx.x; i < lines; i += THREADS) {
        double r2 = muon_second(second + i, squares[i] / n, step->beta2);
        before += squares[i], after += squares[i] * r2;
        factor[i] = (float)sqrt(r2);
    }
    before = block_sum<THREADS>(before), after = block_sum<THREADS>(after);
    double keep = sqrt(before) / fmax(sqrt(after), 1e-10);
    for (int i = threadIdx.x; i < lines; i += THREADS) factor[i] = (float)(keep * factor[i]);
}

// Each row, or column, times its factor.
template <class To, class From>
static __global__ void scale_kernel(To *to, const From *x, const float *factor, bool rows,
                                    int numel, int R, int K) {
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= numel) return;
    int line = rows ? i / K : i / (R * K) * K + i % K;
    to[i] = from_float<To>(factor[line] * to_float(x[i]));
}

// Step 6.
static __global__ void apply_kernel(float *w, floatX *weights, const float *x,
                                    const StepState *step, float lr_scale, int numel) {
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= numel) return;
    float lr = step->lr * lr_scale;
    w[i] = muon_apply(w[i], x[i], lr, lr * step->wd);
    weights[i] = from_float<floatX>(w[i]);
}

template <class T>
static void find_squares(Job *j, const T *x, bool rows, int batch, cudaStream_t stream) {
    int lines = batch * (rows ? j->R : j->K);
    squares_kernel<T>
        <<<ceil_div(lines, WARPS), THREADS, 0, stream>>>(j->squares, x, rows, lines, j->R, j->K);
    CUDA_LAUNCHED();
}

template <class To, class From>
static void scale(Job *j, To *to, const From *x, bool rows, int batch, cudaStream_t stream) {
    int numel = batch * j->R * j->K;
    scale_kernel<To, From><<<ceil_div(numel, THREADS), THREADS, 0, stream>>>(to, x, j->factor, rows,
                                                                             numel, j->R, j->K);
    CUDA_LAUNCHED();
}

template <class To, class From>
static void scale_rows(Job *j, To *to, const From *x, Factor what, int batch, cudaStream_t stream) {
    find_squares(j, x, true, batch, stream);
    factor_kernel<<<batch, THREADS, 0, stream>>>(j->factor, j->squares, what, j->R, j->side);
    CUDA_LAUNCHED();
    scale(j, to, x, true, batch, stream);
}

// Steps 1 and 2 and the division of step 3, of matrices from .. from + batch - 1. X ends in x.
template <class T>
static void begin_update(Job *j, T *x, int from, int batch, cudaStream_t stream) {
    int numel = batch * j->R * j->K;
    size_t at = (size_t)from * j->R * j->K;
    momentum_kernel<<<ceil_div(numel, THREADS), THREADS, 0, stream>>>(
        j->x, j->arena.first + at, j->arena.grads + at, j->step, numel);
    CUDA_LAUNCHED();
    scale_rows(j, j->x, j->x, EVEN, batch, stream);
    scale_rows(j, x, j->x, SHRINK, batch, stream);
}

// Steps 4 to 6.
template <class T>
static void end_update(Job *j, const T *x, int from, int batch, cudaStream_t stream) {
    int numel = batch * j->R * j->K;
    size_t at = (size_t)from * j->R * j->K;
    bool rows = j->R >= j->K;
    scale_rows(j, j->x, x, RESTORE, batch, stream);
    find_squares(j, j->x, rows, batch, stream);
    second_kernel<<<batch, THREADS, 0, stream>>>(j->factor, j->squares,
                                                 j->arena.second + (size_t)from * j->lines, j->step,
                                                 j->lines, j->side);
    CUDA_LAUNCHED();
    scale(j, j->x, j->x, rows, batch, stream);
    apply_kernel<<<ceil_div(numel, THREADS), THREADS, 0, stream>>>(
        j->arena.params + at, j->arena.weights + at, j->x, j->step, j->muon.shape[0].lr_scale,
        numel);
    CUDA_LAUNCHED();
}

// v1's products: a thread takes an element. Of a row of A = X X^T the lanes of a warp have 32
// columns, which are 32 rows of X: each load is 32 loads, as in gemm_relu2.cu's v1.
//
// d (M, N) = alpha op(a) op(b) + beta c; op transposes where ta or tb say so; c may be NULL.

static __global__ void product_kernel(float *d, const float *a, bool ta, const float *b, bool tb,
                                      const float *c, float alpha, float beta, int M, int N,
                                      int K) {
    int j = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y * blockDim.y + threadIdx.y;
    if (i >= M || j >= N) return;
    float sum = 0;
    for (int k = 0; k < K; k++)
        sum += a[ta ? k * M + i : i * K + k] * b[tb ? j * K + k : k * N + j];
    d[i * N + j] = alpha * sum + (c ? beta * c[i * N + j] : 0);
}

// Of one matrix: batch is 1.
static void product(float *d, const float *a, bool ta, const float *b, bool tb, const float *c,
                    float alpha, float beta, int M, int N, int K, int batch, cudaStream_t stream) {
    dim3 block(32, 8), grid(ceil_div(N, 32), ceil_div(M, 8));
    assert(batch == 1);
    product_kernel<<<grid, block, 0, stream>>>(d, a, ta, b, tb, c, alpha, beta, M, N, K);
    CUDA_LAUNCHED();
}

// v2's and v3's; they stand here because polar(), which comes next, takes either.
static void product(bf16 *d, const bf16 *a, bool ta, const bf16 *b, bool tb, const bf16 *c,
                    float alpha, float beta, int M, int N, int K, int batch, cudaStream_t stream) {
    matmul_batched(&matmul_context, d, a, ta, b, tb, c, alpha, beta, M, N, K, batch, stream);
}

template <class T> struct Products {
    T *x, *next;  // (batch, R, K): X, and what it becomes
    T *a, *poly;  // (batch, side, side): A, b A + c A^2
};

// Polar Express, after the division: from p.x to what is returned, p.x or p.next.
template <class T>
static const T *polar(const Job *j, Products<T> p, int batch, cudaStream_t stream) {
    int R = j->R, K = j->K, side = j->side;
    const T *none = NULL;
    for (int i = 0; i < MUON_POLAR_STEPS; i++) {
        MuonPolar k = muon_polar(i);
        product(p.a, p.x, R > K, p.x, R <= K, none, 1, 0, side, side, j->lines, batch, stream);
        product(p.poly, p.a, false, p.a, false, p.a, k.c, k.b, side, side, side, batch, stream);
        if (R <= K)
            product(p.next, p.poly, false, p.x, false, p.x, 1, k.a, R, K, R, batch, stream);
        else
            product(p.next, p.x, false, p.poly, false, p.x, 1, k.a, R, K, K, batch, stream);
        T *last = p.x;
        p.x = p.next, p.next = last;
    }
    return p.x;
}

static void muon_v1(Job *j, cudaStream_t stream) {
    size_t n = (size_t)j->R * j->K, a = (size_t)j->side * j->side;
    Products<float> p = {j->wide, j->wide + n, j->wide + 2 * n, j->wide + 2 * n + a};
    for (int i = 0; i < j->count; i++) {
        begin_update(j, p.x, i, 1, stream);
        end_update(j, polar(j, p, 1, stream), i, 1, stream);
    }
}

// ---------------------------------------------------------------------------------------------
// v2: tensor cores. They multiply BF16 numbers and add up in FP32. gemm_relu2.cu climbs to where
// they are kept busy, rung by rung; here stands cuBLASLt, which has done so (llmc/matmul.cuh). X, A
// and b A + c A^2 are BF16, each rounded once, when it is made; steps 1, 2 and 4 to 6 stay in FP32.
// X ends 1 to 2% from where FP32 would take it; a batch's gradient is a rougher guess than that.

static Products<floatX> bf16_products(const MuonShape *s) {
    return {s->x, s->next, s->a, s->poly};  // llmc's scratch
}

static void muon_v2(Job *j, cudaStream_t stream) {
    Products<floatX> p = bf16_products(&j->muon.shape[0]);
    for (int i = 0; i < j->count; i++) {
        begin_update(j, p.x, i, 1, stream);
        end_update(j, polar(j, p, 1, stream), i, 1, stream);
    }
}

// ---------------------------------------------------------------------------------------------
// v3: fill the GPU. A product of v2 has 768 x 768 elements: 18 tiles of (128, 256), or 36 of (128,
// 128), for 132 SMs. Each takes some 10 us, and is to be launched, which takes the host a few.
// There are 720 of them, one after the other, and 670 kernels between. But matrices do not wait
// for one another. A batched product is told how many there are and how far apart they lie: 864
// tiles, 15 products in all, and 14 other kernels. All that happens to the code is that a loop
// goes.

static void muon_v3(Job *j, cudaStream_t stream) {
    Products<floatX> p = bf16_products(&j->muon.shape[0]);
    begin_update(j, p.x, 0, j->count, stream);
    end_update(j, polar(j, p, j->count, stream), 0, j->count, stream);
}

#ifdef HOPPER
// ---------------------------------------------------------------------------------------------
// v4: do not compute what is known. A = X X^T is its own transpose, and so is b A + c A^2: above
// the diagonal is what is below it. cuBLASLt has no such product in BF16; llmc/gemm_sm90.cuh has.
// It multiplies as gemm_relu2.cu's top rung does, but leaves out tiles above the diagonal, and
// stores what lies below it twice, the second time mirrored: on its way from registers to shared
// memory stmatrix.trans turns 8 x 8 numbers round. Of 18 tiles 9 and three halves are left, those
// on the diagonal: of two products out of three 7.5 / 18 are saved, 28% of all. muon_polar_express
// (llmc/muon.cuh) is polar(), with matmul_square in two places.

static void muon_v4(Job *j, cudaStream_t stream) {
    const MuonShape *s = &j->muon.shape[0];
    begin_update(j, s->x, 0, j->count, stream);
    end_update(j, muon_polar_express(s, &matmul_context, j->count, stream), 0, j->count, stream);
}
#endif

// ---------------------------------------------------------------------------------------------
// llmc: muon_update of llmc/muon.cuh. Between the products the rungs above move, for each element,
//
//     momentum        reads G, buf; writes buf, X      16 bytes
//     rows made even  reads X twice, writes it         12
//     division        reads X twice, writes BF16       10
//     norm restored   reads BF16 twice, writes X        8
//     evened by s     reads X twice, writes it         12
//     applied         reads X, w; writes w, BF16       14
//
// 72 bytes, most of them because X is stored, to be multiplied by a number a row and stored again.
// But when a row is multiplied by f, its squares become f^2 times what they were; they need not be
// found anew. So llmc's first pass takes the squares of X without storing X, a block a matrix makes
// one factor a row of steps 2 and 3, and the second pass makes X from G and buf once more, times
// the factor. Behind Polar Express just so: one pass takes the squares of X, one factor is made of
// steps 4 and 5, and the pass that changes w multiplies by it:
//
//     momentum        reads G, buf; writes buf         12 bytes
//     scale           reads G, buf; writes BF16        10
//     squares         reads BF16                        2
//     apply           reads BF16, w; writes w, BF16    12
//
// 36 bytes, in loads of 16, as in rmsnorm.cu's v4. In a model matrices of one shape lie among
// others, layer by layer: these kernels look up where each begins (MuonMatrix); their X lie one
// after the other, for the products.

static void muon_llmc(Job *j, cudaStream_t stream) {
    MuonArenas a = j->arena;
    muon_update(&j->muon, &matmul_context, a.params, a.weights, a.grads, a.first, a.second, j->step,
                stream);
}

// ---------------------------------------------------------------------------------------------

static const Rung<MuonUpdate> RUNGS[] = {
    {"v1", "FP32, a thread an element, a matrix at a time", muon_v1},
    {"v2", "products in BF16, on tensor cores", muon_v2},
    {"v3", "all matrices at once", muon_v3},
#ifdef HOPPER
    {"v4", "half of a symmetric product", muon_v4},
#endif
    {"llmc", "half the bytes in what is not a product", muon_llmc},
};

// Of X after step 3 in BF16, and so of the change of w: test_muon.cu tells why.
constexpr double TOLERANCE_POLAR = 4e-2;

// All but the arenas; lr and wd of the step.
static void job_init(Job *j, int count, int R, int K, double lr, double wd) {
    Table *t = &j->table;
    Init zero = init_ramp(0, 0);
    memset(j, 0, sizeof *j);
    j->count = count, j->R = R, j->K = K;
    j->side = R < K ? R : K, j->lines = R < K ? K : R;
    t->tensor = (Tensor *)die_alloc((size_t)count, sizeof *t->tensor, "matrices");
    for (int i = 0; i < count; i++) table_add(t, "w", WQ, i, R, K, GROUP_MATRIX, zero, zero);
    shard_init(&j->plan, t, 0, 1);
    muon_init(&j->muon, &test_gpu, &j->plan, MUON_SCRATCH);
    size_t n = (size_t)R * K, states = (size_t)count * j->lines;
    assert(t->numel == count * n && t->state_numel == states && j->muon.shape[0].batch == count);
    StepState step;
    memset(&step, 0, sizeof step);
    step.momentum = 0.95f, step.beta2 = 0.9f, step.grad_scale = 0.75f;
    step.lr = (float)lr, step.wd = (float)wd;
    StepState *device = (StepState *)gpu_bytes("step", sizeof step);
    CUDA_CHECK(cudaMemcpy(device, &step, sizeof step, cudaMemcpyHostToDevice));
    j->step = device;
    j->x = ladder_empty<float>(count * n), j->squares = ladder_empty<double>(states);
    j->factor = ladder_empty<float>(states);
    j->wide = ladder_empty<float>(2 * (n + (size_t)j->side * j->side));
}

static void job_free(Job *j) {
    muon_free(&j->muon);
    shard_free(&j->plan), table_free(&j->table);
    gpu_end_case();
}

// Gradients whose rows are of unlike size, the second of each matrix 0.
static GpuArray<float> uneven_rows(const char *name, int count, int R, int K) {
    size_t all = (size_t)count * R * K;
    float *g = gpu_expected(all);
    RandKey key = gpu_fresh_key();
    for (size_t i = 0; i < all; i++) {
        size_t row = i / K % R;
        g[i] = row == 1 ? 0 : (float)(1e-3 * (1 + row % 7) * rand_normal(key, i));
    }
    return gpu_copy<float>(name, g, all);
}

// The change of w is compared, in units of lr. Decay moves w where X w >= 0. Where X may as well be
// above 0 as below, both are right: so that it fits the tolerance, wd w is at most 0.15 times the
// root mean square of X, 1 / sqrt(lines). Left out, decay is noticed still.
static void check_shape(Rung<MuonUpdate> rung, int count, int R, int K) {
    const double wd = 0.25;
    Job j;
    job_init(&j, count, R, K, 1, wd);
    size_t n = (size_t)R * K, all = count * n, lines = (size_t)j.lines, a = (size_t)j.side * j.side;
    double most = 0.15 / sqrt((double)lines) / wd;
    GpuArray<float> w = gpu_random<float>("w", all, -most, most);
    GpuArray<float> g = uneven_rows("g", count, R, K), buf = gpu_normal<float>("buf", all, 1e-4);
    GpuArray<float> s = gpu_random<float>("s", count * lines, 0, 1e-3);
    GpuArray<floatX> weights = gpu_poisoned<floatX>("weights", all);
    float *w_expected = gpu_expected(all), *buf_expected = gpu_expected(all);
    float *s_expected = gpu_expected(count * lines), *scratch = gpu_expected(2 * (n + a));
    float *change = gpu_expected(all), *change_expected = gpu_expected(all);
    cpu::MuonScratch m = {scratch, scratch + n, scratch + 2 * n, scratch + 2 * n + a};
    j.arena = {w.device, weights.device, g.device, buf.device, s.device};
    memcpy(w_expected, w.host, all * sizeof(float));
    memcpy(buf_expected, buf.host, all * sizeof(float));
    memcpy(s_expected, s.host, count * lines * sizeof(float));
    memcpy(change, w.host, all * sizeof(float));
    for (int i = 0; i < count; i++)
        cpu::muon_update(w_expected + i * n, buf_expected + i * n, s_expected + i * lines,
                         g.host + i * n, 0.75, 0.95, 0.9, 1, wd, R, K, &m);
    rung.run(&j, 0);
    gpu_read(w);
    for (size_t i = 0; i < all; i++) {
        change_expected[i] = change[i] - w_expected[i];
        change[i] -= w.host[i];
    }
    GpuArray<float> changed = gpu_copy<float>("change of w", change, all);
    changed.tolerance = s.tolerance = TOLERANCE_POLAR;
    gpu_compare(buf, buf_expected, count * R, K, "%s, %d of (%d, %d)", rung.name, count, R, K);
    gpu_compare(s, s_expected, count, j.lines, "%s, %d of (%d, %d)", rung.name, count, R, K);
    gpu_compare(changed, change_expected, count * R, K, "%s, %d of (%d, %d)", rung.name, count, R,
                K);
    gpu_compare(weights, w.host, count * R, K, "%s, %d of (%d, %d)", rung.name, count, R, K);
    job_free(&j);
}

static void check(Rung<MuonUpdate> rung) {
    const struct {
        int R, K;
    } shapes[] = {{128, 128}, {192, 48}, {48, 192}, {256, 128}, {128, 384}, {768, 768}};
    for (auto s : shapes)
        for (int count : {1, 3})
            if (!grid_small || (count > 1 && s.R < 200 && s.K < 200))
                check_shape(rung, count, s.R, s.K);
}

static void time_rungs(int count, int R, int K) {
    size_t all = (size_t)count * R * K;
    Job j;
    job_init(&j, count, R, K, 1e-3, 0.1);
    j.arena = {ladder_normal<float>(all, 0.02), ladder_empty<floatX>(all),
               ladder_normal<float>(all, 1e-3), ladder_normal<float>(all, 1e-3),
               ladder_normal<float>((size_t)count * j.lines, 0)};
    ladder_time(RUNGS, "Muon, 48 matrices (768, 768)",
                ladder_flops(muon_flops(&j.muon), LADDER_GEMM),
                [&](Rung<MuonUpdate> rung) { rung.run(&j, 0); });
    job_free(&j);
}

int main(int argc, char **argv) {
    ladder_begin(argc, argv);
    matmul_init(&matmul_context, &test_gpu);
    ladder_check(RUNGS, check);
    if (ladder_timed()) time_rungs(48, 768, 768);
    matmul_free(&matmul_context);
    return test_end();
}
