// matmul_tune.cuh: faster plans for a step's products: found by the clock, with the same bits.
//
// cuBLASLt guesses which of its algorithms is the fastest for a shape; it is not always right. So
// it is asked for several, and each computes the same product of random numbers, in turns, since
// clocks drift. But a choice by the clock may come out differently the next time, and the same
// command must give the same bits. So an algorithm is taken only if all its bits are those of the
// first answer, whoever is chosen then: it adds in the same order, in tiles of another size or
// shape. And only if it is faster by more than chance.
//
//     matmul_tune_forward, _dgrad, _wgrad      of one product of a linear layer each
//
// Takes 20 to 30 products' time a shape, before the first step; needs memory for the product.
#ifndef LLMC_MATMUL_TUNE_CUH
#define LLMC_MATMUL_TUNE_CUH

#include "llmc/matmul.cuh"  // Matmul, MatmulShape, matmul_ask, matmul_plan

constexpr int TUNE_CANDIDATES = 8, TUNE_TURNS = 4;  // the first turn warms up
// Of the first answer's time: what a better one takes at most; what one is not tried again at.
constexpr float TUNE_FASTER = 0.98f, TUNE_HOPELESS = 1.1f;
constexpr int TUNE_BLOCKS = 1024, TUNE_THREADS = 256;

__device__ __forceinline__ unsigned tune_mix(unsigned x) {  // MurmurHash3's last step
    x = (x ^ x >> 16) * 0x85ebca6bu;
    x = (x ^ x >> 13) * 0xc2b2ae35u;
    return x ^ x >> 16;
}

// Pairs of BF16 numbers of either sign between 2^-7 and 2: of many sizes, so that sums are rounded,
// and their order shows.
[[maybe_unused]] static __global__ void tune_fill_kernel(unsigned *x, size_t words, unsigned seed) {
    size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += step)
        x[i] = (tune_mix((unsigned)i ^ seed) & 0x83ff83ffu) | 0x3c003c00u;
}

// A sum over all words of what their place and bits make: whole numbers, whose order does not
// matter.
[[maybe_unused]] static __global__ void tune_hash_kernel(unsigned long long *hash,
                                                         const unsigned *x, size_t words) {
    size_t step = (size_t)gridDim.x * blockDim.x;
    unsigned long long sum = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += step)
        sum += tune_mix(x[i] + tune_mix((unsigned)i)) * 0x9e3779b97f4a7c15ull;
    atomicAdd(hash, sum);
}

// What one candidate was found to do.
typedef struct {
    float ms;  // the least of its turns; 0: it failed
    unsigned long long hash;
} TuneResult;

// One turn: d (M, N) = op(a) op(b) by this algorithm. False where it does not do this product.
static inline bool tune_turn(Matmul *m, MatmulWords *w, const cublasLtMatmulAlgo_t *algo, void *d,
                             size_t d_bytes, const void *a, const void *b, cudaEvent_t event[2],
                             unsigned long long *hash, TuneResult *r, cudaStream_t stream) {
    float one = 1, zero = 0, ms;
    unsigned long long found;
    CUDA_CHECK(cudaMemsetAsync(d, 0xff, d_bytes, stream));
    CUDA_CHECK(cudaMemsetAsync(hash, 0, sizeof *hash, stream));
    CUDA_CHECK(cudaEventRecord(event[0], stream));
    cublasStatus_t status =
        cublasLtMatmul(m->lt, &w->product, &one, b, &w->b, a, &w->a, &zero, d, &w->d, d, &w->d,
                       algo, m->workspace, MATMUL_WORKSPACE, stream);
    CUDA_CHECK(cudaEventRecord(event[1], stream));
    if (status != CUBLAS_STATUS_SUCCESS) return false;
    tune_hash_kernel<<<TUNE_BLOCKS, TUNE_THREADS, 0, stream>>>(hash, (const unsigned *)d,
                                                               d_bytes / sizeof(unsigned));
    CUDA_LAUNCHED();
    CUDA_CHECK(cudaMemcpyAsync(&found, hash, sizeof found, cudaMemcpyDeviceToHost, stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaEventElapsedTime(&ms, event[0], event[1]));
    if (r->ms == 0 || ms < r->ms) r->ms = ms;
    r->hash = found;
    return true;
}

// Tries the candidates for a shape of BF16 factors in `memory`, whose contents are lost; the plan
// becomes the best. Returns whether it was replaced. Does nothing where memory is too small.
static inline bool matmul_tune(Matmul *m, MatmulShape shape, void *memory, size_t bytes,
                               cudaStream_t stream) {
    const MatmulShape *s = &shape;
    size_t M = (size_t)s->M, N = (size_t)s->N, K = (size_t)s->K;
    size_t a_bytes = M * K * sizeof(bf16), b_bytes = K * N * sizeof(bf16);
    size_t d_bytes = M * N * (s->d_type == CUDA_R_32F ? sizeof(float) : sizeof(bf16));
    size_t b_at = ceil_div(a_bytes, (size_t)256) * 256;
    size_t d_at = b_at + ceil_div(b_bytes, (size_t)256) * 256;
    size_t hash_at = d_at + ceil_div(d_bytes, (size_t)256) * 256;
    if (s->batch != 1 || s->a_type != CUDA_R_16BF || hash_at + 256 > bytes) return false;
    char *a = (char *)memory, *b = a + b_at, *d = a + d_at;
    unsigned long long *hash = (unsigned long long *)(a + hash_at);
    tune_fill_kernel<<<TUNE_BLOCKS, TUNE_THREADS, 0, stream>>>((unsigned *)a, d_at / 4, 1);
    CUDA_LAUNCHED();

    MatmulWords w = matmul_words(s, NULL, NULL);
    cublasLtMatmulHeuristicResult_t found[TUNE_CANDIDATES];
    TuneResult result[TUNE_CANDIDATES] = {};
    cudaEvent_t event[2];
    int count = matmul_ask(m, &w, s, found, TUNE_CANDIDATES), best = 0;
    for (cudaEvent_t &e : event) CUDA_CHECK(cudaEventCreate(&e));
    for (int turn = 0; turn < TUNE_TURNS; turn++)
        for (int i = 0; i < count; i++) {
            TuneResult *r = &result[i];
            if (turn == 1) r->ms = 0;
            if (turn && r->hash != result[0].hash) continue;
            if (turn > 1 && r->ms > TUNE_HOPELESS * result[0].ms) continue;
            if (found[i].state != CUBLAS_STATUS_SUCCESS ||
                !tune_turn(m, &w, &found[i].algo, d, d_bytes, a, b, event, hash, r, stream))
                r->hash = result[0].hash + 1;
        }
    for (cudaEvent_t e : event) CUDA_CHECK(cudaEventDestroy(e));
    for (int i = 1; i < count; i++)
        if (result[i].hash == result[0].hash && result[i].ms < TUNE_FASTER * result[0].ms &&
            (!best || result[i].ms < result[best].ms))
            best = i;
    matmul_plan(m, &w, s)->algo = found[best].algo;
    return best > 0;
}

// ---------------------------------------------------------------------------------------------
// The shapes that matmul_forward, matmul_dgrad and matmul_wgrad make of n, K, N.

static inline bool matmul_tune_forward(Matmul *m, int n, int K, int N, void *memory, size_t bytes,
                                       cudaStream_t stream) {
    MatmulShape s = {n, N, K, 1, 0, 1, CUDA_R_16BF, CUDA_R_16BF, CUDA_R_16BF};
    return matmul_tune(m, s, memory, bytes, stream);
}

static inline bool matmul_tune_dgrad(Matmul *m, int n, int K, int N, void *memory, size_t bytes,
                                     cudaStream_t stream) {
    MatmulShape s = {n, K, N, 1, 0, 0, CUDA_R_16BF, CUDA_R_16BF, CUDA_R_16BF};
    return matmul_tune(m, s, memory, bytes, stream);
}

static inline bool matmul_tune_wgrad(Matmul *m, int n, int K, int N, void *memory, size_t bytes,
                                     cudaStream_t stream) {
    MatmulShape s = {N, K, n, 1, 1, 0, CUDA_R_16BF, CUDA_R_16BF, CUDA_R_32F};
    return matmul_tune(m, s, memory, bytes, stream);
}

#endif
