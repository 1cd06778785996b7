// channels.cuh: the C channels of a token in the registers of a warp, or of a few, and sums over
// them: what norms, residual sums and the smear are made of. They are bound by memory, so each
// number is read once, 16 bytes at a time, and all of a token's loads stand before its arithmetic.
//
//     Channels x;
//     channels_load(x, p + t * C, C);                     // zeros where there is no channel
//     float square = channels_sum(channels_dot(x, x));    // in every thread of the token
//     channels_store(p + t * C, x, C);
//
// A thread holds 3 pieces of VEC channels. C = 768 in BF16 is one warp:
//
//     channels   0..7  8..15  ...  248..255 | 256..263  ...  504..511 | 512..519  ...  760..767
//     lane        0      1    ...     31    |    0      ...     31    |    0      ...     31
//
// Wider tokens take more warps, up to C = 8192. A block is (threads of a token, tokens at a time):
// (32, 4), or (32 k, 1), because several warps meet at the block's barrier.
//
// Sums over all tokens, the gradients of scalars: each block leaves its part in scratch, in double;
// tokens_add_sums adds the parts in order.
#ifndef LLMC_CHANNELS_CUH
#define LLMC_CHANNELS_CUH

#include "llmc/vec.cuh"  // VEC, vec_load, vec_store

constexpr int CHANNELS_HELD = 3 * VEC;               // by a thread
constexpr int CHANNELS_WARP = WARP * CHANNELS_HELD;  // by a warp
constexpr int CHANNELS_MAX = 8192;
constexpr int CHANNELS_THREADS = ceil_div(CHANNELS_MAX, CHANNELS_WARP) * WARP;  // at most

typedef float Channels[CHANNELS_HELD];

// Piece k of this thread begins at this channel. Each warp has a stretch of its own, so that a
// thread's pieces lie at fixed distances.
__device__ __forceinline__ int channels_at(int k) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    return warp * CHANNELS_WARP + (k * WARP + lane) * VEC;
}

// The condition is on the load alone: what it brings may stay packed until it is used.
__device__ __forceinline__ void channels_load(Channels &x, const floatX *p /* (C) */, int C) {
#pragma unroll
    for (int k = 0; k < CHANNELS_HELD / VEC; k++) {
        uint4 raw = {};
        float piece[VEC];
        if (channels_at(k) < C) raw = *reinterpret_cast<const uint4 *>(p + channels_at(k));
        vec_load(piece, reinterpret_cast<const floatX *>(&raw));
#pragma unroll
        for (int i = 0; i < VEC; i++) x[k * VEC + i] = piece[i];
    }
}

__device__ __forceinline__ void channels_store(floatX *p /* (C) */, const Channels &x, int C) {
#pragma unroll
    for (int k = 0; k < CHANNELS_HELD / VEC; k++) {
        float piece[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) piece[i] = x[k * VEC + i];
        if (channels_at(k) < C) vec_store(p + channels_at(k), piece);
    }
}

// This thread's part of <a, b>.
__device__ __forceinline__ float channels_dot(const Channels &a, const Channels &b) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < CHANNELS_HELD; i++) sum += a[i] * b[i];
    return sum;
}

// Sum over the threads of a token, in each of them.
__device__ __forceinline__ float channels_sum(float x) {
    __shared__ float of_warp[WARP];
    x = warp_sum(x);
    if (blockDim.x == WARP) return x;
    __syncthreads();  // the call before has read its sums
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    int lane = threadIdx.x % WARP;
    return warp_sum(lane < blockDim.x / WARP ? of_warp[lane] : 0.0f);
}

// ---------------------------------------------------------------------------------------------
// Tokens: the loop over them, and sums over all.

// for (int t = token_first(); t < n; t += token_step())
__device__ __forceinline__ int token_first() { return blockIdx.x * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int token_step() { return gridDim.x * blockDim.y; }

constexpr int TOKENS_AT_ONCE = 4;  // by a block, one a warp

typedef struct {
    dim3 grid, block;
} TokenLaunch;

// For n tokens of C channels, about `repeats` of them one after the other.
static inline TokenLaunch token_launch(int n, int C, int repeats) {
    if (C > CHANNELS_MAX)
        die(EXIT_USAGE, "--channels: found %d, expected at most %d on a GPU", C, CHANNELS_MAX);
    unsigned threads = (unsigned)(ceil_div(C, CHANNELS_WARP) * WARP);
    unsigned tokens = threads == WARP ? TOKENS_AT_ONCE : 1;
    return {dim3(ceil_div((unsigned)n, tokens * (unsigned)repeats)), dim3(threads, tokens)};
}

// Leaves the sum of x over the threads of the block in part[blockIdx.x].
__device__ __forceinline__ void tokens_leave_sum(double *part /* (gridDim.x) */, double x) {
    __shared__ double of_warp[WARP];
    int thread = threadIdx.y * blockDim.x + threadIdx.x, warps = blockDim.x * blockDim.y / WARP;
    x = warp_sum(x);
    __syncthreads();  // the call before has read its sums
    if (thread % WARP == 0) of_warp[thread / WARP] = x;
    __syncthreads();
    if (thread != 0) return;
    for (int w = 1; w < warps; w++) x += of_warp[w];
    part[blockIdx.x] = x;
}

constexpr int TOKENS_SUM_THREADS = 512;

static __global__ void tokens_add_sums_kernel(float *out, int outs, float *last, const double *part,
                                              int parts) {
    double sum = 0;
    for (int i = threadIdx.x; i < parts; i += TOKENS_SUM_THREADS)
        sum += part[(size_t)blockIdx.x * parts + i];
    sum = block_sum<TOKENS_SUM_THREADS>(sum);
    float *to = blockIdx.x < outs ? out + blockIdx.x : last;
    if (threadIdx.x == 0) *to += (float)sum;
}

// out[i] += sum_j part[i][j], and one more sum into *last.
static inline void tokens_add_sums(float *out,  // (outs)
                                   int outs,
                                   float *last,         // (1), or NULL: no more
                                   const double *part,  // (outs + 1, parts), or (outs, parts)
                                   int parts, cudaStream_t stream) {
    tokens_add_sums_kernel<<<outs + (last != NULL), TOKENS_SUM_THREADS, 0, stream>>>(
        out, outs, last, part, parts);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// Element by element: an array without rows is cut into what a block holds at once.

constexpr int FLAT_THREADS = 256;
constexpr int FLAT_BLOCK = FLAT_THREADS * CHANNELS_HELD;

static inline unsigned flat_grid(size_t count) {
    return (unsigned)ceil_div(count, (size_t)FLAT_BLOCK);
}
// Where this block's part of `count` elements begins, and how many it has.
__device__ __forceinline__ size_t flat_first() { return (size_t)blockIdx.x * FLAT_BLOCK; }
__device__ __forceinline__ int flat_here(size_t count) {
    return (int)min(count - flat_first(), (size_t)FLAT_BLOCK);
}

#endif
