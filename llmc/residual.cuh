// residual.cuh: the residual stream: its sums, each in one pass with the norm beside it.
//
//     mix_norm:       x_in = x + a + b,  x = lambda x_in + lambda0 x0,  h = N(x)    a layer's start
//     residual_norm:  h = N(x + a + b)                                     behind its attention
//     backout_norm:   hf = N(x + a + b - lambda x_middle)                  the head's input
//     add:            y += x
//
// Backward of residual_norm, dx being the gradient of the layer's output:
//     db = r (dh - h mean(dh h)),   dx_mid = dx + db
// Backward of mix_norm, d being the gradient of x, from the layer's output, db and h:
//     d = dx + db + r (dh - h mean(dh h)),   dlambda += <d, x_in>,   dlambda0 += <d, x0>,
//     dx0 += lambda0 d,   dx = lambda d
// Backward of backout_norm:
//     dx = r (dhf - hf mean(dhf hf)),   dlambda -= <dx, x_middle>,   dxb = -lambda dx
//
// Tensors are (n, C), r is (n), lambdas are FP32 on the device, and so are their gradients. All of
// it is FP32 in registers, rounded only where it is stored: h is the norm of the x before rounding.
// Moved per token, of floatX: mix_norm 7C, backward 9C; residual_norm 3C, 4C with b, backward 5C;
// backout_norm 5C, backward 5C; add 3C. Each input or output that is NULL saves C.
#ifndef LLMC_RESIDUAL_CUH
#define LLMC_RESIDUAL_CUH

#include "llmc/channels.cuh"  // Channels, channels_load, token_launch, tokens_add_sums
#include "llmc/rmsnorm.cuh"   // norm_factor, norm_backward_token, norm_backward

// The residual stream as an unfinished sum x + a + b: what the layer began from and what attention
// and MLP add. Were a branch added to a BF16 x, one smaller than half an ulp of x, as all are when
// training begins, would round away: x lies on the grid already, so each layer would lose it. The
// sum is made in FP32 and rounded once a layer, behind the lambda, where errors have no direction.
typedef struct {
    const floatX *x;  // (n, C)
    const floatX *a;  // (n, C), or NULL: nothing has been added yet
    const floatX *b;  // (n, C), or NULL
} Residual;

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
        channels_store(x_in + at, v, x_in ? C : 0);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++) v[i] = l * v[i] + l0 * v0[i];
        channels_store(x + at, v, C);
        residual_norm_token(h, r, v, t, C);
    }
}

static __global__ void __launch_bounds__(CHANNELS_THREADS)
    mix_norm_backward_kernel(floatX *dx, floatX *dx0, double *part, const floatX *db,
                             const floatX *dh, const floatX *h, const float *r, const floatX *x_in,
                             const floatX *x0, const float *lambda, const float *lambda0, int n,
                             int C) {
    float l = *lambda, l0 = *lambda0;
    double dl = 0, dl0 = 0;
    for (int t = token_first(); t < n; t += token_step()) {
        size_t at = (size_t)t * C;
        Channels d, b, g, v, in, in0, d0;
        channels_load(g, dh + at, C);
        channels_load(v, h + at, C);
        channels_load(d, dx + at, C);
        channels_load(b, db + at, C);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++) d[i] += b[i];
        norm_backward_token(d, g, v, r[t], C);
        // Loaded only now: held across the sum, these three would spill in FP32.
        channels_load(in, x_in + at, C);
        channels_load(in0, x0 + at, C);
        dl += channels_dot(d, in), dl0 += channels_dot(d, in0);
        channels_load(d0, dx0 + at, C);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++) d0[i] += l0 * d[i], d[i] *= l;
        channels_store(dx0 + at, d0, C);
        channels_store(dx + at, d, C);
    }
    tokens_leave_sum(part, dl);
    tokens_leave_sum(part + gridDim.x, dl0);
}

static __global__ void __launch_bounds__(CHANNELS_THREADS)
    residual_norm_forward_kernel(floatX *h, float *r, Residual sum, int n, int C) {
    for (int t = token_first(); t < n; t += token_step()) {
        Channels v;
        residual_load(v, sum, (size_t)t * C, C);
        residual_norm_token(h, r, v, t, C);
    }
}

static __global__ void __launch_bounds__(CHANNELS_THREADS)
    branch_norm_backward_kernel(floatX *dx_mid, floatX *db, const floatX *dx, const floatX *dh,
                                const floatX *h, const float *r, int n, int C) {
    for (int t = token_first(); t < n; t += token_step()) {
        size_t at = (size_t)t * C;
        Channels b = {}, d, g, v;
        channels_load(g, dh + at, C);
        channels_load(v, h + at, C);
        channels_load(d, dx + at, C);
        norm_backward_token(b, g, v, r[t], C);
        channels_store(db + at, b, C);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++) d[i] += b[i];
        channels_store(dx_mid + at, d, C);
    }
}

static __global__ void __launch_bounds__(CHANNELS_THREADS)
    backout_norm_forward_kernel(floatX *hf, float *rf, Residual sum, const floatX *x_middle,
                                const float *lambda, int n, int C) {
    float l = *lambda;
    for (int t = token_first(); t < n; t += token_step()) {
        size_t at = (size_t)t * C;
        Channels v, middle;
        residual_load(v, sum, at, C);
        channels_load(middle, x_middle + at, C);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++) v[i] -= l * middle[i];
        residual_norm_token(hf, rf, v, t, C);
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

static inline void mix_norm_forward(floatX *x,             // (n, C), may be sum.x
                                    floatX *x_in,          // (n, C), for backward; NULL: not kept
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
mix_norm_backward(floatX *dx,            // (n, C), of the layer's output; on return of x_in
                  floatX *dx0,           // (n, C), added to
                  float *dlambda,        // (1), added to
                  float *dlambda0,       // (1), added to
                  const floatX *db,      // (n, C), of branch_norm_backward
                  const floatX *dh,      // (n, C)
                  const floatX *h,       // (n, C), forward's output
                  const float *r,        // (n)
                  const floatX *x_in,    // (n, C), may be x0
                  const floatX *x0,      // (n, C)
                  const float *lambda,   // (1)
                  const float *lambda0,  // (1)
                  void *scratch,         // residual_scratch_bytes(n, C)
                  int n, int C, cudaStream_t stream) {
    TokenLaunch l = token_launch(n, C, RESIDUAL_REPEATS);
    double *part = (double *)scratch;
    mix_norm_backward_kernel<<<l.grid, l.block, 0, stream>>>(dx, dx0, part, db, dh, h, r, x_in, x0,
                                                             lambda, lambda0, n, C);
    CUDA_LAUNCHED();
    tokens_add_sums(dlambda, 1, dlambda0, part, (int)l.grid.x, stream);
}

static inline void residual_norm_forward(floatX *h,  // (n, C)
                                         float *r,   // (n), kept for backward
                                         Residual sum, int n, int C, cudaStream_t stream) {
    TokenLaunch l = token_launch(n, C, 2);
    residual_norm_forward_kernel<<<l.grid, l.block, 0, stream>>>(h, r, sum, n, C);
    CUDA_LAUNCHED();
}

// db is the MLP's part of the gradient, kept apart from dx for the reason that Residual has.
static inline void branch_norm_backward(floatX *dx_mid,    // (n, C), of x + a
                                        floatX *db,        // (n, C)
                                        const floatX *dx,  // (n, C), of the layer's output
                                        const floatX *dh,  // (n, C)
                                        const floatX *h,   // (n, C), forward's output
                                        const float *r,    // (n)
                                        int n, int C, cudaStream_t stream) {
    TokenLaunch l = token_launch(n, C, 2);
    branch_norm_backward_kernel<<<l.grid, l.block, 0, stream>>>(dx_mid, db, dx, dh, h, r, n, C);
    CUDA_LAUNCHED();
}

static inline void backout_norm_forward(floatX *hf,              // (n, C)
                                        float *rf,               // (n), kept for backward
                                        Residual sum,            // what the last layer leaves
                                        const floatX *x_middle,  // (n, C), or NULL: no backout
                                        const float *lambda,     // (1)
                                        int n, int C, cudaStream_t stream) {
    if (!x_middle) return residual_norm_forward(hf, rf, sum, n, C, stream);
    TokenLaunch l = token_launch(n, C, 2);
    backout_norm_forward_kernel<<<l.grid, l.block, 0, stream>>>(hf, rf, sum, x_middle, lambda, n,
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
    if (!x_middle) return norm_backward(dx, dhf, hf, rf, n, C, stream);
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
