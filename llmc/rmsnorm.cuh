// rmsnorm.cuh: the norm of every vector the network looks at, without gain and bias:
//
//     y = N(x) = r x,   r = 1 / sqrt(mean(x^2) + 2^-23),   over the C channels of each token
//     dx = r (dy - y mean(dy y))
//
// x, y and their gradients are (n, C), r is (n). Backward needs y and r, not x; it moves 3C of
// floatX per token. Forward always comes with something else: with a sum in llmc/residual.cuh
// (residual_norm_forward and others), with the table in llmc/embed.cuh; norms of q and k are in
// llmc/rotary.cuh.
#ifndef LLMC_RMSNORM_CUH
#define LLMC_RMSNORM_CUH

#include "llmc/channels.cuh"  // Channels, channels_load, channels_sum, token_launch

// r of a token, from its channels.
__device__ __forceinline__ float norm_factor(const Channels &x, int C) {
    return rsqrtf(channels_sum(channels_dot(x, x)) / C + 0x1p-23f);
}

// d += r (dy - y mean(dy y)) for a token, in an order that is done with dy before the sum is there.
__device__ __forceinline__ void norm_backward_token(Channels &d, const Channels &dy,
                                                    const Channels &y, float r, int C) {
#pragma unroll
    for (int i = 0; i < CHANNELS_HELD; i++) d[i] += r * dy[i];
    float mean = channels_sum(channels_dot(dy, y)) / C;
#pragma unroll
    for (int i = 0; i < CHANNELS_HELD; i++) d[i] -= r * mean * y[i];
}

static __global__ void __launch_bounds__(CHANNELS_THREADS)
    norm_backward_kernel(floatX *dx, const floatX *dy, const floatX *y, const float *r, int n,
                         int C) {
    for (int t = token_first(); t < n; t += token_step()) {
        size_t at = (size_t)t * C;
        Channels d = {}, g, v;
        channels_load(g, dy + at, C);
        channels_load(v, y + at, C);
        norm_backward_token(d, g, v, r[t], C);
        channels_store(dx + at, d, C);
    }
}

static inline void norm_backward(floatX *dx,        // (n, C), may be dy
                                 const floatX *dy,  // (n, C)
                                 const floatX *y,   // (n, C), forward's output
                                 const float *r,    // (n)
                                 int n, int C, cudaStream_t stream) {
    TokenLaunch l = token_launch(n, C, 2);
    norm_backward_kernel<<<l.grid, l.block, 0, stream>>>(dx, dy, y, r, n, C);
    CUDA_LAUNCHED();
}

#endif
