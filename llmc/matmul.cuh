// matmul.cuh: products of matrices, by cuBLASLt. No other file calls it.
//
//     forward   y  (n, N)  = x (n, K) W^T                    W is stored (N, K): (out, in)
//     dgrad     dx (n, K)  = dy (n, N) W
//     wgrad     dW (N, K)  = dy^T x, or is added to          FP32, whatever dy and x are
//     batched   d  (M, N)  = alpha op(a) op(b) + beta c      for each of `batch` matrices
//     square    d  (M, M)  = alpha op(x) op(x)^T + beta c    likewise
//
// Everything is stored row by row, without gaps. n is any number from 1 on; K, N and all sizes of
// matmul_batched are multiples of 8, and pointers multiples of 16 bytes. Sums are FP32 and rounded
// once, after what is added; FP32 operands are never rounded to TF32. Split sums go through the
// workspace and are added in FP32, in order: the same call gives the same bits.
//
// ROWS AND COLUMNS. cuBLASLt reads memory column by column. The same bytes are a matrix to us and
// its transpose to it:
//
//     memory 1 2 3 4 5 6     ours (2, 3)   1 2 3     cuBLASLt's (3, 2)   1 4
//                                          4 5 6                         2 5
//                                                                        3 6
//
// So our d = a b is its d^T = b^T a^T: b goes first, M and N change places, and no number moves. An
// operand which we read transposed is read transposed there, too.
//
// PLANS. The choice of an algorithm is asked for once for each shape and kept. It takes the first
// answer, which depends on shape and GPU alone, not on addresses or clocks; llmc/matmul_tune.cuh
// may put a faster one with the same bits in its place. Nothing here allocates or waits after
// matmul_init, so every product can be captured in a CUDA graph. There is one workspace: products
// of one Matmul must run on one stream, or one after the other.
//
// EPILOGUES say what happens to a product on its way to memory. For ReLU^2's, BF16 builds for
// Hopper alone (HOPPER) take llmc/gemm_sm90.cuh's kernel if it fits the sizes, and for squares the
// one that computes half of them and mirrors it; else the product is
// cuBLASLt's, and llmc/relu2.cuh's kernel follows. Both leave the same in memory, but for the
// rounding to BF16 of a product that comes to memory in between.
//
// Leaves out: the making of FP8 operands and their scales (an operand that comes as FP8, with its
// scale and its transposed copy, is multiplied).
#ifndef LLMC_MATMUL_CUH
#define LLMC_MATMUL_CUH

#include <assert.h>
#include <cublasLt.h>
#include <string.h>

#include "llmc/cuda_common.cuh"  // floatX, bf16, Gpu, gpu_alloc, CUDA_CHECK
#include "llmc/relu2.cuh"        // relu2_forward, relu2_backward

#if defined(HOPPER) && !defined(PRECISION_FP32)
#include "llmc/gemm_sm90.cuh"  // GemmSm90, gemm_sm90_relu2_forward, gemm_sm90_relu2_backward
#else
typedef struct {
} GemmSm90;
static inline void gemm_sm90_init(GemmSm90 *, const Gpu *) {}
static inline void gemm_sm90_free(GemmSm90 *) {}
static inline bool gemm_sm90_fits(int, int) { return false; }
static inline bool gemm_sm90_squares(int, int) { return false; }
static inline void gemm_sm90_relu2_forward(GemmSm90 *, floatX *, const floatX *, const floatX *,
                                           int, int, int, cudaStream_t) {}
static inline void gemm_sm90_relu2_backward(GemmSm90 *, floatX *, const floatX *, const floatX *,
                                            const floatX *, int, int, int, cudaStream_t) {}
static inline void gemm_sm90_square(GemmSm90 *, floatX *, const floatX *, bool, const floatX *,
                                    float, float, int, int, int, cudaStream_t) {}
#endif

// Bytes. The gradient of qkv's weights has too few tiles for all SMs: its sums are split, into as
// many parts as find room here.
constexpr size_t MATMUL_WORKSPACE = 128 << 20;
constexpr int MATMUL_PLANS = 1024;     // places for plans; half of them are used at most
constexpr uint32_t MATMUL_ALIGN = 16;  // bytes

// One factor.
typedef struct {
    const void *data;
    cudaDataType_t type;
    const float *scale;      // FP8 only: one number on the device, at a multiple of 16 bytes, by
                             // which all of it is multiplied; NULL: 1
    const void *transposed;  // its transpose, or NULL. Hopper multiplies FP8 only where both
                             // factors' rows run along the sum, which dgrad and wgrad need this for
} MatmulOperand;

static inline MatmulOperand matmul_operand(const bf16 *data) {
    return {data, CUDA_R_16BF, NULL, NULL};
}
static inline MatmulOperand matmul_operand(const float *data) {
    return {data, CUDA_R_32F, NULL, NULL};
}

// What happens to a product on its way to memory.
typedef enum {
    MATMUL_STORE,           // y = product
    MATMUL_ADD,             // y = extra + product; extra NULL: y += product
    MATMUL_RELU2,           // of forward: y = relu(product)^2
    MATMUL_RELU2_BACKWARD,  // of dgrad: dx = 2 sqrt(extra) product; extra: that y
} MatmulEpilogueKind;
struct MatmulEpilogue {
    MatmulEpilogueKind kind;
    const floatX *extra = NULL;  // of y's shape; may be y where it is added
};

// What an algorithm is chosen by.
typedef struct {
    int M, N, K, batch;                     // d (M, N) = op(a) (M, K) op(b) (K, N), `batch` times
    int ta, tb;                             // a is stored (K, M); b is stored (N, K)
    cudaDataType_t a_type, b_type, d_type;  // c has d's
} MatmulShape;

typedef struct {
    MatmulShape shape;  // M 0: an empty place
    cublasLtMatmulAlgo_t algo;
} MatmulPlan;

typedef struct {
    cublasLtHandle_t lt;
    void *workspace;   // (MATMUL_WORKSPACE bytes), on the device
    MatmulPlan *plan;  // (MATMUL_PLANS): a hash table
    int planned;       // places in use
    GemmSm90 fused;
} Matmul;

// A product in cuBLASLt's words.
typedef struct {
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t a, b, d;
} MatmulWords;

static inline void matmul_check(cublasStatus_t status, const char *call, const MatmulShape *s) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    die(EXIT_INTERNAL,
        "%s: %s; (%d, %d) = (%d, %d)%s (%d, %d)%s, batch %d, types %d = %d x %d (cudaDataType)",
        call, cublasLtGetStatusString(status), s->M, s->N, s->M, s->K, s->ta ? " transposed" : "",
        s->K, s->N, s->tb ? " transposed" : "", s->batch, s->d_type, s->a_type, s->b_type);
}
#define MATMUL_CHECK(call) matmul_check((call), #call, s)  // s: the shape at hand

static inline void matmul_init(Matmul *m, Gpu *g) {
    cublasStatus_t status = cublasLtCreate(&m->lt);
    if (status != CUBLAS_STATUS_SUCCESS)
        die(EXIT_DEVICE, "cublasLtCreate: %s", cublasLtGetStatusString(status));
    m->workspace = gpu_alloc(g, MATMUL_WORKSPACE, "the workspace of matrix products");
    m->plan = (MatmulPlan *)die_alloc(MATMUL_PLANS, sizeof *m->plan, "plans of matrix products");
    m->planned = 0;
    gemm_sm90_init(&m->fused, g);
}

static inline void matmul_free(Matmul *m) {
    gemm_sm90_free(&m->fused);
    cublasLtDestroy(m->lt);
    CUDA_CHECK(cudaFree(m->workspace));
    free(m->plan);
}

// A stored matrix of ours, rows by cols.
static inline void matmul_layout(cublasLtMatrixLayoutOpaque_t *x, cudaDataType_t type, int rows,
                                 int cols, const MatmulShape *s) {
    int64_t stride = (int64_t)rows * cols;
    MATMUL_CHECK(cublasLtMatrixLayoutInit(x, type, cols, rows, cols));
    MATMUL_CHECK(cublasLtMatrixLayoutSetAttribute(x, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &s->batch,
                                                  sizeof s->batch));
    MATMUL_CHECK(cublasLtMatrixLayoutSetAttribute(x, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                                  &stride, sizeof stride));
}

static inline MatmulWords matmul_words(const MatmulShape *s, const float *a_scale,
                                       const float *b_scale) {
    MatmulWords w;
    cublasLtMatmulDesc_t p = &w.product;
    cublasOperation_t op_a = s->ta ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t op_b = s->tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    MATMUL_CHECK(cublasLtMatmulDescInit(p, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    // Their A is our b, their B our a.
    MATMUL_CHECK(
        cublasLtMatmulDescSetAttribute(p, CUBLASLT_MATMUL_DESC_TRANSA, &op_b, sizeof op_b));
    MATMUL_CHECK(
        cublasLtMatmulDescSetAttribute(p, CUBLASLT_MATMUL_DESC_TRANSB, &op_a, sizeof op_a));
    if (b_scale)
        MATMUL_CHECK(cublasLtMatmulDescSetAttribute(p, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
                                                    &b_scale, sizeof b_scale));
    if (a_scale)
        MATMUL_CHECK(cublasLtMatmulDescSetAttribute(p, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER,
                                                    &a_scale, sizeof a_scale));
    matmul_layout(&w.a, s->a_type, s->ta ? s->K : s->M, s->ta ? s->M : s->K, s);
    matmul_layout(&w.b, s->b_type, s->tb ? s->N : s->K, s->tb ? s->K : s->N, s);
    matmul_layout(&w.d, s->d_type, s->M, s->N, s);
    return w;
}

// Asks cuBLASLt for up to `most` algorithms, the likely fastest first, that need no more than our
// workspace and alignment; returns how many it has. Of the ways to add up split sums, in place is
// out (the order would vary), and so is in d's type (BF16).
static inline int matmul_ask(Matmul *m, MatmulWords *w, const MatmulShape *s,
                             cublasLtMatmulHeuristicResult_t *found /* (most) */, int most) {
    cublasLtMatmulPreferenceOpaque_t want;
    uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    cublasLtMatmulPreferenceAttributes_t aligned[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    MATMUL_CHECK(cublasLtMatmulPreferenceInit(&want));
    MATMUL_CHECK(cublasLtMatmulPreferenceSetAttribute(
        &want, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &MATMUL_WORKSPACE, sizeof(size_t)));
    MATMUL_CHECK(cublasLtMatmulPreferenceSetAttribute(
        &want, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction, sizeof reduction));
    for (int i = 0; i < 4; i++)
        MATMUL_CHECK(cublasLtMatmulPreferenceSetAttribute(&want, aligned[i], &MATMUL_ALIGN,
                                                          sizeof MATMUL_ALIGN));
    int count = 0;
    MATMUL_CHECK(cublasLtMatmulAlgoGetHeuristic(m->lt, &w->product, &w->b, &w->a, &w->d, &w->d,
                                                &want, most, found, &count));
    MATMUL_CHECK(count ? found[0].state : CUBLAS_STATUS_NOT_SUPPORTED);
    return count;
}

// The plan for a shape. A table half full starts anew: samples, whose lengths are multiples of
// 128, bring more shapes than that where rows are very long.
static inline MatmulPlan *matmul_plan(Matmul *m, MatmulWords *w, const MatmulShape *s) {
    uint64_t hash = 14695981039346656037u;  // FNV-1a
    for (size_t i = 0; i < sizeof *s; i++)
        hash = (hash ^ ((const unsigned char *)s)[i]) * 1099511628211u;
    if (m->planned == MATMUL_PLANS / 2) {
        memset(m->plan, 0, MATMUL_PLANS * sizeof *m->plan);
        m->planned = 0;
    }
    MatmulPlan *plan = &m->plan[hash % MATMUL_PLANS];
    while (plan->shape.M && memcmp(&plan->shape, s, sizeof *s))
        if (++plan == m->plan + MATMUL_PLANS) plan = m->plan;
    if (!plan->shape.M) {
        cublasLtMatmulHeuristicResult_t found;
        matmul_ask(m, w, s, &found, 1);
        plan->algo = found.algo, plan->shape = *s;
        m->planned++;
    }
    return plan;
}

static inline bool matmul_aligned(const void *p) { return (uintptr_t)p % MATMUL_ALIGN == 0; }

// d (M, N) = alpha op(a) op(b) + beta c, all of it. c NULL: d.
static inline void matmul(Matmul *m, void *d, cudaDataType_t d_type, MatmulOperand a, bool ta,
                          MatmulOperand b, bool tb, const void *c, float alpha, float beta, int M,
                          int N, int K, int batch, cudaStream_t stream) {
    if (ta && a.transposed) a.data = a.transposed, ta = false;
    if (!tb && b.transposed) b.data = b.transposed, tb = true;
    if (!c) c = d;
    assert(M > 0 && N > 0 && K > 0 && batch > 0);
    assert(matmul_aligned(a.data) && matmul_aligned(b.data) && matmul_aligned(c) &&
           matmul_aligned(d));
    const MatmulShape shape = {M, N, K, batch, ta, tb, a.type, b.type, d_type}, *s = &shape;
    MatmulWords w = matmul_words(s, a.scale, b.scale);
    const cublasLtMatmulAlgo_t *algo = &matmul_plan(m, &w, s)->algo;
    MATMUL_CHECK(cublasLtMatmul(m->lt, &w.product, &alpha, b.data, &w.b, a.data, &w.a, &beta, c,
                                &w.d, d, &w.d, algo, m->workspace, MATMUL_WORKSPACE, stream));
}

// ---------------------------------------------------------------------------------------------
// The three products of a linear layer y = x W^T, W (out, in), over n rows.

// Whether ReLU^2 is done on the way of such a product, `columns` wide, over `sum` terms.
static inline bool matmul_fuses(MatmulOperand a, MatmulOperand b, int columns, int sum) {
    return gemm_sm90_fits(columns, sum) && a.type == CUDA_R_16BF && b.type == CUDA_R_16BF;
}

static inline void matmul_forward(Matmul *m,
                                  floatX *y,        // (n, N)
                                  MatmulOperand x,  // (n, K)
                                  MatmulOperand w,  // (N, K)
                                  MatmulEpilogue epilogue, int n, int K, int N,
                                  cudaStream_t stream) {
    bool relu2 = epilogue.kind == MATMUL_RELU2;
    assert(epilogue.kind != MATMUL_RELU2_BACKWARD);
    if (relu2 && matmul_fuses(x, w, N, K)) {
        gemm_sm90_relu2_forward(&m->fused, y, (const floatX *)x.data, (const floatX *)w.data, n, K,
                                N, stream);
        return;
    }
    matmul(m, y, matmul_operand(y).type, x, false, w, true, epilogue.extra, 1,
           epilogue.kind == MATMUL_ADD, n, N, K, 1, stream);
    if (relu2) relu2_forward(y, (size_t)n * (size_t)N, stream);
}

static inline void matmul_dgrad(Matmul *m,
                                floatX *dx,        // (n, K)
                                MatmulOperand dy,  // (n, N)
                                MatmulOperand w,   // (N, K)
                                MatmulEpilogue epilogue, int n, int K, int N, cudaStream_t stream) {
    bool relu2 = epilogue.kind == MATMUL_RELU2_BACKWARD;
    assert(epilogue.kind != MATMUL_RELU2);
    if (relu2 && matmul_fuses(dy, w, K, N)) {
        gemm_sm90_relu2_backward(&m->fused, dx, (const floatX *)dy.data, (const floatX *)w.data,
                                 epilogue.extra, n, K, N, stream);
        return;
    }
    matmul(m, dx, matmul_operand(dx).type, dy, false, w, false, relu2 ? NULL : epilogue.extra, 1,
           epilogue.kind == MATMUL_ADD, n, K, N, 1, stream);
    if (relu2) relu2_backward(dx, epilogue.extra, (size_t)n * (size_t)K, stream);
}

static inline void matmul_wgrad(Matmul *m,
                                float *dw,         // (N, K)
                                MatmulOperand dy,  // (n, N)
                                MatmulOperand x,   // (n, K)
                                MatmulEpilogueKind into /* MATMUL_STORE: dw =; MATMUL_ADD: dw += */,
                                int n, int K, int N, cudaStream_t stream) {
    assert(into == MATMUL_STORE || into == MATMUL_ADD);
    matmul(m, dw, CUDA_R_32F, dy, true, x, false, dw, 1, into == MATMUL_ADD, N, K, n, 1, stream);
}

// ---------------------------------------------------------------------------------------------
// d = alpha op(a) op(b) + beta c for matrices that lie one behind the other; op transposes where ta
// or tb say so. c NULL: none is added, and beta must be 0. c may be d.

static inline void matmul_batched(Matmul *m,
                                  floatX *d,                 // (batch, M, N)
                                  const floatX *a, bool ta,  // (batch, M, K), or (batch, K, M)
                                  const floatX *b, bool tb,  // (batch, K, N), or (batch, N, K)
                                  const floatX *c,           // (batch, M, N), or NULL
                                  float alpha, float beta, int M, int N, int K, int batch,
                                  cudaStream_t stream) {
    assert(c || beta == 0);
    matmul(m, d, matmul_operand(d).type, matmul_operand(a), ta, matmul_operand(b), tb, c, alpha,
           beta, M, N, K, batch, stream);
}

// d = alpha op(x) op(x)^T + beta c likewise, c symmetric or NULL; op transposes where tx says so. d
// may be neither x nor c.
static inline void matmul_square(Matmul *m,
                                 floatX *d,                 // (batch, M, M)
                                 const floatX *x, bool tx,  // (batch, M, K), or (batch, K, M)
                                 const floatX *c,           // (batch, M, M), or NULL
                                 float alpha, float beta, int M, int K, int batch,
                                 cudaStream_t stream) {
    if (gemm_sm90_squares(M, K) && (c ? !tx : alpha == 1))
        gemm_sm90_square(&m->fused, d, x, tx, c, alpha, beta, M, K, batch, stream);
    else
        matmul_batched(m, d, x, tx, x, !tx, c, alpha, beta, M, M, K, batch, stream);
}

#endif
