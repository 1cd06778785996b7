// residual.cuh: the sums of the residual stream, each in one pass with the norm that reads it.
//
//     mix_norm:       x_in = S,  x = lambda x_in + lambda0 x0,  h = N(x)     before attention
//     residual_norm:  h = N(S)                                               before the MLP
//     backout_norm:   hf = N(S - lambda x_middle)                            before the head
//     add:            y += x
//
// S is the stream at that place, handed over as an unfinished sum, Residual {x, a, b}: x is what
// mix_norm made last (x0 before the first layer), a and b what attention and MLP add to it; S is
// x + a before the MLP, and x + a + b after a layer.
//
// Backward of backout_norm. dx is the gradient of what leaves the last layer:
//     dx = r (dhf - hf mean(dhf hf)),   dlambda -= <dx, x_middle>,   dx_middle = -lambda dx
// Backward of residual_norm. dx, the gradient of what leaves the layer, x + a + b, reaches x + a
// directly and through the MLP; the two ways together are the gradient of a:
//     dx_mlp = r (dh - h mean(dh h)),   da = dx + dx_mlp
// Backward of mix_norm. Its x has a third way, through attention; d is all of its gradient:
//     d = dx + dx_mlp + r (dh - h mean(dh h)),   dlambda += <d, x_in>,   dlambda0 += <d, x0>,
//     dx0 += lambda0 d,   dx_in = lambda d, the gradient of what enters the layer
// In the last layer dx0 is made, not added to. In the first x_in is x0, and dx_in goes into dx0,
// too.
//
// Tensors are (n, C), r is (n), lambdas are FP32 on the device, and so are their gradients. All of
// it is FP32 in registers, rounded only where it is stored: h is the norm of the x before rounding.
// Moved per token, of floatX, forward and backward:
//     mix_norm 7C, 9C; in the last layer 7C, 8C; in the first, where S and x_in are x0, 3C, 7C
//     residual_norm 3C, 5C
//     backout_norm 5C, 5C; without x_middle 4C, 3C
//     add 3C
#ifndef LLMC_RESIDUAL_CUH
#define LLMC_RESIDUAL_CUH

#include "llmc/channels.cuh"  // Channels, channels_load, token_launch, tokens_add_sums
#include "llmc/rmsnorm.cuh"   // norm_factor, norm_backward_token, norm_backward

// The stream as an unfinished sum x + a + b. x lies on BF16's grid, so that x + a, rounded, is x
// again wherever a is below half an ulp of x: when training begins every branch is, and each layer
// would swallow both of its own. So the sum is made in FP32 by each kernel that reads it, and
// rounded once a layer, after lambda, where the errors have no direction. In a model of depth 4
// whose forward was rounded to BF16, that brought the error of the loss at step 11 from 2e-2 to
// 3e-3 (docs/measurements.md). dx and dx_mlp are kept apart for the same reason: 3e-3 to 4e-4.
typedef struct {
    const floatX *x;  // (n, C)
    const floatX *a;  // (n, C), what attention adds, or NULL: nothing yet
    const floatX *b;  // (n, C), what the MLP adds, or NULL
} Residual;

// For the same reason x_in, which only gradients of lambdas (and backout) read, is kept times a
// factor: x + a + b, rounded, would be x again, and <d, x_in> would lose <d, a + b>, all of whose
// terms have one sign when training begins. (H200, depth 12, the ninth step: dlambda 2% to 37% too
// large, first layers to last.) The factor must not be a short fraction: 1.3 times the 128 values
// that a BF16 mantissa can have falls on 10 places between its neighbours, and there rounding still
// has a direction. Times the golden ratio less 0.38 it falls everywhere. What is left of a branch
// a, on average over x and a, for branches of this size:
//
//     a / x             3e-5    1e-4    3e-4    1e-3
//     factor 1          0.02    0.06    0.17    0.52
//     factor 1.3        4.58    1.59    1.02    1.00
//     factor 1.236...   0.94    0.99    1.01    1.01
constexpr float X_IN_SCALE = sizeof(floatX) == 2 ? 1.23606798f : 1;

// x + a + b of the token whose channels begin at `at`.
__device__ __forceinline__ void residual_load(Channels &x, Residual sum, size_t at, int C) {
    Channels a, b;
    channels_load(x, sum.x + at, C);
    channels_load(a, sum.a + at, sum.a ? C : 0);
    channels_load(b, sum.b + at, sum.b ? C : 0);
#pragma unroll
    for (int i = 0; i < CHANNELS_HELD; i++) x[i] = x[i] + a[i] + b[i];
}

// h = N(v) for token t, and its r.
__device__ __forceinline__ void residual_norm_token(floatX *h, float *r, Channels &v, int t,
                                                    int C) {
    float factor = norm_factor(v, C);
#pragma unroll
    for (int i = 0; i < CHANNELS_HELD; i++) v[i] *= factor;
    channels_store(h + (size_t)t * C, v, C);
    if (threadIdx.x == 0) r[t] = factor;
}

static __global__ void __launch_bounds__(CHANNELS_THREADS)
    mix_norm_forward_kernel(floatX *x, floatX *x_in, floatX *h, float *r, Residual sum,
                            const floatX *x0, const float *lambda, const float *lambda0, int n,
                            int C) {
    float l = *lambda, l0 = *lambda0;
    for (int t = token_first(); t < n; t += token_step()) {
        size_t at = (size_t)t * C;
        Channels v, v0;
        residual_load(v, sum, at, C);
        channels_load(v0, x0 + at, C);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++) {
            float s = v[i];
            v[i] = l * s + l0 * v0[i], v0[i] = X_IN_SCALE * s;
        }
        channels_store(x_in + at, v0, x_in ? C : 0);
        channels_store(x + at, v, C);
        residual_norm_token(h, r, v, t, C);
    }
}

static __global__ void __launch_bounds__(CHANNELS_THREADS)
    mix_norm_backward_kernel(floatX *dx_in, floatX *dx0, double *part, const floatX *dx,
                             const floatX *dx_mlp, const floatX *dh, const floatX *h,
                             const float *r, const floatX *x_in, const floatX *x0,
                             const float *lambda, const float *lambda0, bool add, int n, int C) {
    float l = *lambda, l0 = *lambda0 + (dx_in ? 0 : l);
    double dl = 0, dl0 = 0;
    for (int t = token_first(); t < n; t += token_step()) {
        size_t at = (size_t)t * C;
        Channels d, mlp, g, v, in, in0, d0;
        channels_load(g, dh + at, C);
        channels_load(v, h + at, C);
        channels_load(d, dx + at, C);
        channels_load(mlp, dx_mlp + at, C);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++) d[i] += mlp[i];
        norm_backward_token(d, g, v, r[t], C);
        // Loaded only now: held across the sum, these three would spill in FP32.
        channels_load(in, x_in + at, C);
        channels_load(in0, x0 + at, C);
        dl += channels_dot(d, in), dl0 += channels_dot(d, in0);
        channels_load(d0, dx0 + at, add ? C : 0);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++) d0[i] += l0 * d[i], d[i] *= l;
        channels_store(dx0 + at, d0, C);
        channels_store(dx_in + at, d, dx_in ? C : 0);
    }
    tokens_leave_sum(part, x_in == x0 ? dl : dl / X_IN_SCALE);
    tokens_leave_sum(part + gridDim.x, dl0);
}

// h = N(S - lambda x_middle); x_middle NULL: N(S), of residual_norm and of a model without backout.
static __global__ void __launch_bounds__(CHANNELS_THREADS)
    sum_norm_forward_kernel(floatX *h, float *r, Residual sum, const floatX *x_middle,
                            const float *lambda, int n, int C) {
    float l = x_middle ? *lambda / X_IN_SCALE : 0;
    for (int t = token_first(); t < n; t += token_step()) {
        size_t at = (size_t)t * C;
        Channels v, middle;
        residual_load(v, sum, at, C);
        channels_load(middle, x_middle + at, x_middle ? C : 0);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++) v[i] -= l * middle[i];
        residual_norm_token(h, r, v, t, C);
    }
}

static __global__ void __launch_bounds__(CHANNELS_THREADS)
    residual_norm_backward_kernel(floatX *da, floatX *dx_mlp, const floatX *dx, const floatX *dh,
                                  const floatX *h, const float *r, int n, int C) {
    for (int t = token_first(); t < n; t += token_step()) {
        size_t at = (size_t)t * C;
        Channels mlp = {}, d, g, v;
        channels_load(g, dh + at, C);
        channels_load(v, h + at, C);
        channels_load(d, dx + at, C);
        norm_backward_token(mlp, g, v, r[t], C);
        channels_store(dx_mlp + at, mlp, C);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++) d[i] += mlp[i];
        channels_store(da + at, d, C);
    }
}

static __global__ void __launch_bounds__(CHANNELS_THREADS)
    backout_norm_backward_kernel(floatX *dx, floatX *dx_middle, double *part, const floatX *dhf,
                                 const floatX *hf, const float *rf, const floatX *x_middle,
                                 const float *lambda, int n, int C) {
    float l = *lambda;
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
        for (int i = 0; i < CHANNELS_HELD; i++) d[i] *= -l;
        channels_store(dx_middle + at, d, C);
    }
    tokens_leave_sum(part, sum / X_IN_SCALE);
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

// Bytes of scratch for the gradients of lambdas, in mix_norm_backward and backout_norm_backward:
// at most two sums a block.
static inline size_t residual_scratch_bytes(int n, int C) {
    return 2 * sizeof(double) * token_launch(n, C, RESIDUAL_REPEATS).grid.x;
}

static inline void mix_norm_forward(floatX *x,             // (n, C), may be sum.x
                                    floatX *x_in,          // (n, C), x_in times X_IN_SCALE, or NULL
                                    floatX *h,             // (n, C)
                                    float *r,              // (n), kept for backward
                                    Residual sum,          // what the layer is given
                                    const floatX *x0,      // (n, C)
                                    const float *lambda,   // (1)
                                    const float *lambda0,  // (1)
                                    int n, int C, cudaStream_t stream) {
    TokenLaunch l = token_launch(n, C, 2);
    mix_norm_forward_kernel<<<l.grid, l.block, 0, stream>>>(x, x_in, h, r, sum, x0, lambda, lambda0,
                                                            n, C);
    CUDA_LAUNCHED();
}

static inline void
mix_norm_backward(floatX *dx_in,     // (n, C), of what enters the layer; may be dx. NULL: x0 does
                  floatX *dx0,       // (n, C)
                  float *dlambda,    // (1), added to
                  float *dlambda0,   // (1), added to
                  const floatX *dx,  // (n, C), of what leaves the layer
                  const floatX *dx_mlp,  // (n, C), of residual_norm_backward
                  const floatX *dh,      // (n, C)
                  const floatX *h,       // (n, C), forward's output
                  const float *r,        // (n)
                  const floatX *x_in,    // (n, C), as forward kept it; or x0
                  const floatX *x0,      // (n, C)
                  const float *lambda,   // (1)
                  const float *lambda0,  // (1)
                  bool add,              // dx0 is added to; else it is written
                  void *scratch,         // residual_scratch_bytes(n, C)
                  int n, int C, cudaStream_t stream) {
    TokenLaunch l = token_launch(n, C, RESIDUAL_REPEATS);
    double *part = (double *)scratch;
    mix_norm_backward_kernel<<<l.grid, l.block, 0, stream>>>(dx_in, dx0, part, dx, dx_mlp, dh, h, r,
                                                             x_in, x0, lambda, lambda0, add, n, C);
    CUDA_LAUNCHED();
    tokens_add_sums(dlambda, 1, dlambda0, part, (int)l.grid.x, stream);
}

static inline void
backout_norm_forward(floatX *hf,              // (n, C)
                     float *rf,               // (n), kept for backward
                     Residual sum,            // what leaves the last layer
                     const floatX *x_middle,  // (n, C), an x_in that was kept; NULL: no backout
                     const float *lambda,     // (1), or NULL with x_middle
                     int n, int C, cudaStream_t stream) {
    TokenLaunch l = token_launch(n, C, 2);
    sum_norm_forward_kernel<<<l.grid, l.block, 0, stream>>>(hf, rf, sum, x_middle, lambda, n, C);
    CUDA_LAUNCHED();
}

static inline void residual_norm_forward(floatX *h,     // (n, C)
                                         float *r,      // (n), kept for backward
                                         Residual sum,  // x + a; its b is NULL
                                         int n, int C, cudaStream_t stream) {
    backout_norm_forward(h, r, sum, NULL, NULL, n, C, stream);
}

static inline void residual_norm_backward(floatX *da,        // (n, C), of a, and of x + a
                                          floatX *dx_mlp,    // (n, C), what came through the MLP
                                          const floatX *dx,  // (n, C), of what leaves the layer
                                          const floatX *dh,  // (n, C)
                                          const floatX *h,   // (n, C), forward's output
                                          const float *r,    // (n)
                                          int n, int C, cudaStream_t stream) {
    TokenLaunch l = token_launch(n, C, 2);
    residual_norm_backward_kernel<<<l.grid, l.block, 0, stream>>>(da, dx_mlp, dx, dh, h, r, n, C);
    CUDA_LAUNCHED();
}

static inline void backout_norm_backward(floatX *dx,              // (n, C), of S
                                         floatX *dx_middle,       // (n, C), or NULL with x_middle
                                         float *dlambda,          // (1), added to
                                         const floatX *dhf,       // (n, C)
                                         const floatX *hf,        // (n, C), forward's output
                                         const float *rf,         // (n)
                                         const floatX *x_middle,  // (n, C), or NULL: only dx
                                         const float *lambda,     // (1)
                                         void *scratch,           // residual_scratch_bytes(n, C)
                                         int n, int C, cudaStream_t stream) {
    if (!x_middle) return norm_backward(dx, dhf, hf, rf, n, C, stream);
    TokenLaunch l = token_launch(n, C, RESIDUAL_REPEATS);
    double *part = (double *)scratch;
    backout_norm_backward_kernel<<<l.grid, l.block, 0, stream>>>(dx, dx_middle, part, dhf, hf, rf,
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
