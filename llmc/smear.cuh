// smear.cuh: a token takes in a gated part of the token before it (modded-nanogpt's smear):
//
//     y[t] = x[t] + lambda s[t] x[t-1],   s[t] = sigmoid(x[t][0:24] . gate)
//     s[t] = 0 and y[t] = x[t] at a document's start, where doc_start[t] == t
//
// Backward, with g = <dy[t], x[t-1]> and dz = lambda g s (1 - s):
//     dx[t] = dy[t] + lambda s[t+1] dy[t+1]       t's own term, and its part in the token after it
//     dx[t][0:24] += dz gate,   dgate += dz x[t][0:24],   dlambda += s g
//
// x, y and their gradients are (n, C), s is (n), gate (24), lambda (1); gate, lambda and their
// gradients are FP32. A token reads its neighbours, so y is not x, nor dx dy. Backward needs x and
// s. Moved per token, of floatX: forward 2C, backward 3C, as neighbours come from cache. They are
// loaded whether they belong to the document or not, rather than after doc_start.
#ifndef LLMC_SMEAR_CUH
#define LLMC_SMEAR_CUH

#include "llmc/channels.cuh"  // Channels, channels_load, token_launch, tokens_add_sums
#include "llmc/model.h"       // SMEAR_CHANNELS

static_assert(SMEAR_CHANNELS % VEC == 0 && SMEAR_CHANNELS <= VEC * WARP,
              "the gate's channels are whole first pieces of a token's first lanes");
static_assert(SMEAR_CHANNELS < WARP, "a lane for each of the gate's sums, and one for lambda's");

// This thread's part of x[0:24] . gate, and x[0:24] += a gate.
__device__ __forceinline__ float smear_gate_dot(const Channels &x, const float *gate) {
    float sum = 0;
    if (channels_at(0) < SMEAR_CHANNELS)
#pragma unroll
        for (int i = 0; i < VEC; i++) sum += x[i] * gate[channels_at(0) + i];
    return sum;
}
__device__ __forceinline__ void smear_gate_add(Channels &x, float a, const float *gate) {
    if (channels_at(0) < SMEAR_CHANNELS)
#pragma unroll
        for (int i = 0; i < VEC; i++) x[i] += a * gate[channels_at(0) + i];
}

static __global__ void __launch_bounds__(CHANNELS_THREADS)
    smear_forward_kernel(floatX *y, float *s, const floatX *x, const float *gate,
                         const float *lambda, const int *doc_start, int n, int C) {
    float a = *lambda;
    for (int t = token_first(); t < n; t += token_step()) {
        size_t at = (size_t)t * C;
        bool first = doc_start[t] == t;
        Channels v, before;
        channels_load(v, x + at, C);
        channels_load(before, x + at - (t > 0 ? C : 0), C);
        float z = channels_sum(smear_gate_dot(v, gate)), open = first ? 0 : 1 / (1 + expf(-z));
        if (!first)
#pragma unroll
            for (int i = 0; i < CHANNELS_HELD; i++) v[i] += a * open * before[i];
        channels_store(y + at, v, C);
        if (threadIdx.x == 0) s[t] = open;
    }
}

// part (25, blocks): each block's sums for dgate, then for dlambda. Lane c of a token's first warp
// gathers sum c.
static __global__ void __launch_bounds__(CHANNELS_THREADS)
    smear_backward_kernel(floatX *dx, double *part, const floatX *dy, const floatX *x,
                          const float *s, const float *gate, const float *lambda,
                          const int *doc_start, int n, int C) {
    __shared__ double of_token[TOKENS_AT_ONCE][SMEAR_CHANNELS + 1];
    float a = *lambda;
    double sum = 0;
    for (int t = token_first(); t < n; t += token_step()) {
        size_t at = (size_t)t * C;
        bool first = doc_start[t] == t, passed_on = t + 1 < n && doc_start[t + 1] != t + 1;
        Channels d, after, before;
        channels_load(d, dy + at, C);
        channels_load(after, dy + at + (t + 1 < n ? C : 0), C);
        channels_load(before, x + at - (t > 0 ? C : 0), C);
        float open = s[t], open_after = t + 1 < n ? s[t + 1] : 0;
        float product = channels_sum(channels_dot(d, before)), g = first ? 0 : product;
        float dz = a * g * open * (1 - open);
        if (passed_on)
#pragma unroll
            for (int i = 0; i < CHANNELS_HELD; i++) d[i] += a * open_after * after[i];
        smear_gate_add(d, dz, gate);
        channels_store(dx + at, d, C);
        if (threadIdx.x < SMEAR_CHANNELS) sum += dz * to_float(x[at + threadIdx.x]);
        if (threadIdx.x == SMEAR_CHANNELS) sum += open * g;
    }
    if (threadIdx.x <= SMEAR_CHANNELS) of_token[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || threadIdx.x > SMEAR_CHANNELS) return;
    for (int i = 1; i < blockDim.y; i++) sum += of_token[i][threadIdx.x];
    part[(size_t)threadIdx.x * gridDim.x + blockIdx.x] = sum;
}

static inline void smear_forward(floatX *y,             // (n, C), not x
                                 float *s,              // (n), kept for backward
                                 const floatX *x,       // (n, C)
                                 const float *gate,     // (24)
                                 const float *lambda,   // (1)
                                 const int *doc_start,  // (n)
                                 int n, int C, cudaStream_t stream) {
    TokenLaunch l = token_launch(n, C, 2);
    smear_forward_kernel<<<l.grid, l.block, 0, stream>>>(y, s, x, gate, lambda, doc_start, n, C);
    CUDA_LAUNCHED();
}

constexpr int SMEAR_REPEATS = 8;  // few blocks leave few parts of sums

// Bytes of scratch that backward needs: 25 sums a block, of which there are most in wide models.
static inline size_t smear_scratch_bytes(int n) {
    return (SMEAR_CHANNELS + 1) * sizeof(double) *
           token_launch(n, CHANNELS_MAX, SMEAR_REPEATS).grid.x;
}

static inline void smear_backward(floatX *dx,            // (n, C), not dy
                                  float *dgate,          // (24), added to
                                  float *dlambda,        // (1), added to
                                  const floatX *dy,      // (n, C)
                                  const floatX *x,       // (n, C)
                                  const float *s,        // (n), from forward
                                  const float *gate,     // (24)
                                  const float *lambda,   // (1)
                                  const int *doc_start,  // (n)
                                  void *scratch,         // smear_scratch_bytes(n)
                                  int n, int C, cudaStream_t stream) {
    TokenLaunch l = token_launch(n, C, SMEAR_REPEATS);
    double *part = (double *)scratch;
    smear_backward_kernel<<<l.grid, l.block, 0, stream>>>(dx, part, dy, x, s, gate, lambda,
                                                          doc_start, n, C);
    CUDA_LAUNCHED();
    tokens_add_sums(dgate, SMEAR_CHANNELS, dlambda, part, (int)l.grid.x, stream);
}

#endif
