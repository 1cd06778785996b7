// residual.cuh: the sums of the residual stream, each in one pass with the norm beside it.
//
//     mix_norm:      x = lambda x_in + lambda0 x0,  h = N(x)           what a layer starts from
//     backout_norm:  hf = N(x_last - lambda x_middle)                  the head's input
//     add:           y += x
//
// Backward of mix_norm, d being the gradient of x: what dx holds on entry, from the branches after
// h, and h's own:
//     d = dx + r (dh - h mean(dh h)),   dlambda += <d, x_in>,   dlambda0 += <d, x0>,
//     dx0 += lambda0 d,   dx = lambda d
// Backward of backout_norm:
//     dx = r (dhf - hf mean(dhf hf)),   dlambda -= <dx, x_middle>,   dxb = -lambda dx
//
// Tensors are (n, C), r is (n), lambdas are FP32 on the device, and so are their gradients. The
// layers' first x_in is x0: they may be one buffer. In the BF16 build h is the norm of the rounded
// x; d is rounded only where it is stored. Moved per token, of floatX: mix_norm 4C, backward 8C;
// backout_norm 3C, backward 5C; add 3C.
#ifndef LLMC_RESIDUAL_CUH
#define LLMC_RESIDUAL_CUH

#include "llmc/channels.cuh"  // Channels, channels_load, token_launch, tokens_add_sums
#include "llmc/rmsnorm.cuh"   // norm_factor, norm_forward, norm_backward

static __global__ void __launch_bounds__(CHANNELS_THREADS)
    mix_norm_forward_kernel(floatX *x, floatX *h, float *r, const floatX *x_in, const floatX *x0,
                            const float *lambda, const float *lambda0, int n, int C) {
    float a = *lambda, b = *lambda0;
    for (int t = token_first(); t < n; t += token_step()) {
        size_t at = (size_t)t * C;
        Channels v, v0;
        channels_load(v, x_in + at, C);
        channels_load(v0, x0 + at, C);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++)
            v[i] = to_float(from_float<floatX>(a * v[i] + b * v0[i]));
        channels_store(x + at, v, C);
        float factor = norm_factor(v, C);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++) v[i] *= factor;
        channels_store(h + at, v, C);
        if (threadIdx.x == 0) r[t] = factor;
    }
}

static __global__ void __launch_bounds__(CHANNELS_THREADS)
    mix_norm_backward_kernel(floatX *dx, floatX *dx0, double *part, const floatX *dh,
                             const floatX *h, const float *r, const floatX *x_in, const floatX *x0,
                             const float *lambda, const float *lambda0, int n, int C) {
    float a = *lambda, b = *lambda0;
    double sum = 0, sum0 = 0;
    for (int t = token_first(); t < n; t += token_step()) {
        size_t at = (size_t)t * C;
        Channels d, g, v, in, in0, d0;
        channels_load(g, dh + at, C);
        channels_load(v, h + at, C);
        channels_load(d, dx + at, C);
        norm_backward_token(d, g, v, r[t], C);
        channels_load(in, x_in + at, C);
        channels_load(in0, x0 + at, C);
        sum += channels_dot(d, in), sum0 += channels_dot(d, in0);
        channels_load(d0, dx0 + at, C);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++) d0[i] += b * d[i], d[i] *= a;
        channels_store(dx0 + at, d0, C);
        channels_store(dx + at, d, C);
    }
    tokens_leave_sum(part, sum);
    tokens_leave_sum(part + gridDim.x, sum0);
}

static __global__ void __launch_bounds__(CHANNELS_THREADS)
    backout_norm_forward_kernel(floatX *hf, float *rf, const floatX *x_last, const floatX *x_middle,
                                const float *lambda, int n, int C) {
    float a = *lambda;
    for (int t = token_first(); t < n; t += token_step()) {
        size_t at = (size_t)t * C;
        Channels v, middle;
        channels_load(v, x_last + at, C);
        channels_load(middle, x_middle + at, C);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++) v[i] -= a * middle[i];
        float factor = norm_factor(v, C);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++) v[i] *= factor;
        channels_store(hf + at, v, C);
        if (threadIdx.x == 0) rf[t] = factor;
    }
}

static __global__ void __launch_bounds__(CHANNELS_THREADS)
    backout_norm_backward_kernel(floatX *dx, floatX *dxb, double *part, const floatX *dhf,
                                 const floatX *hf, const float *rf, const floatX *x_middle,
                                 const float *lambda, int n, int C) {
    float a = *lambda;
    double sum = 0;
    for (int t = token_first(); t < n; t += token_step()) {
        size_t at = (size_t)t * C;
        Channels d = {}, g, v, middle;
        channels_load(g, dhf + at, C);
        channels_load(v, hf + at, C);
        channels_load(middle, x_middle + at, C);
        norm_backward_token(d, g, v, rf[t], C);
        sum -= channels_dot(d, middle);
        channels_store(dx + at, d, C);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++) d[i] *= -a;
        channels_store(dxb + at, d, C);
    }
    tokens_leave_sum(part, sum);
}

static __global__ void add_forward_kernel(floatX *y, const floatX *x, size_t count) {
    size_t at = flat_first();
    int here = flat_here(count);
    Channels a, b;
    channels_load(a, y + at, here);
    channels_load(b, x + at, here);
#pragma unroll
    for (int i = 0; i < CHANNELS_HELD; i++) a[i] += b[i];
    channels_store(y + at, a, here);
}

// ---------------------------------------------------------------------------------------------
// Launchers.

constexpr int RESIDUAL_REPEATS = 8;  // few blocks leave few parts of sums

// Bytes of scratch that either backward needs: two sums a block.
static inline size_t residual_scratch_bytes(int n, int C) {
    return 2 * sizeof(double) * token_launch(n, C, RESIDUAL_REPEATS).grid.x;
}

static inline void mix_norm_forward(floatX *x,             // (n, C)
                                    floatX *h,             // (n, C)
                                    float *r,              // (n), kept for backward
                                    const floatX *x_in,    // (n, C)
                                    const floatX *x0,      // (n, C)
                                    const float *lambda,   // (1)
                                    const float *lambda0,  // (1)
                                    int n, int C, cudaStream_t stream) {
    TokenLaunch l = token_launch(n, C, 2);
    mix_norm_forward_kernel<<<l.grid, l.block, 0, stream>>>(x, h, r, x_in, x0, lambda, lambda0, n,
                                                            C);
    CUDA_LAUNCHED();
}

static inline void mix_norm_backward(floatX *dx,   // (n, C): in, of x as the stream; out, of x_in
                                     floatX *dx0,  // (n, C), added to
                                     float *dlambda,        // (1), added to
                                     float *dlambda0,       // (1), added to
                                     const floatX *dh,      // (n, C)
                                     const floatX *h,       // (n, C), forward's output
                                     const float *r,        // (n)
                                     const floatX *x_in,    // (n, C)
                                     const floatX *x0,      // (n, C)
                                     const float *lambda,   // (1)
                                     const float *lambda0,  // (1)
                                     void *scratch,         // residual_scratch_bytes(n, C)
                                     int n, int C, cudaStream_t stream) {
    TokenLaunch l = token_launch(n, C, RESIDUAL_REPEATS);
    double *part = (double *)scratch;
    mix_norm_backward_kernel<<<l.grid, l.block, 0, stream>>>(dx, dx0, part, dh, h, r, x_in, x0,
                                                             lambda, lambda0, n, C);
    CUDA_LAUNCHED();
    tokens_add_sums(dlambda, 1, dlambda0, part, (int)l.grid.x, stream);
}

static inline void backout_norm_forward(floatX *hf,              // (n, C)
                                        float *rf,               // (n), kept for backward
                                        const floatX *x_last,    // (n, C)
                                        const floatX *x_middle,  // (n, C), or NULL: no backout
                                        const float *lambda,     // (1)
                                        int n, int C, cudaStream_t stream) {
    if (!x_middle) return norm_forward(hf, rf, x_last, n, C, stream);
    TokenLaunch l = token_launch(n, C, 2);
    backout_norm_forward_kernel<<<l.grid, l.block, 0, stream>>>(hf, rf, x_last, x_middle, lambda, n,
                                                                C);
    CUDA_LAUNCHED();
}

static inline void backout_norm_backward(floatX *dx,              // (n, C)
                                         floatX *dxb,             // (n, C)
                                         float *dlambda,          // (1), added to
                                         const floatX *dhf,       // (n, C)
                                         const floatX *hf,        // (n, C), forward's output
                                         const float *rf,         // (n)
                                         const floatX *x_middle,  // (n, C), or NULL: only dx
                                         const float *lambda,     // (1)
                                         void *scratch,           // residual_scratch_bytes(n, C)
                                         int n, int C, cudaStream_t stream) {
    if (!x_middle) return norm_backward(dx, dhf, hf, rf, n, C, false, stream);
    TokenLaunch l = token_launch(n, C, RESIDUAL_REPEATS);
    double *part = (double *)scratch;
    backout_norm_backward_kernel<<<l.grid, l.block, 0, stream>>>(dx, dxb, part, dhf, hf, rf,
                                                                 x_middle, lambda, n, C);
    CUDA_LAUNCHED();
    tokens_add_sums(dlambda, 1, NULL, part, (int)l.grid.x, stream);
}

static inline void add_forward(floatX *y,        // (count), count % 8 == 0
                               const floatX *x,  // (count)
                               size_t count, cudaStream_t stream) {
    add_forward_kernel<<<flat_grid(count), FLAT_THREADS, 0, stream>>>(y, x, count);
    CUDA_LAUNCHED();
}

#endif
