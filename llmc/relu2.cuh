// relu2.cuh: the nonlinearity of the MLP, ReLU^2 (Primer, So et al. 2021), after a product:
//
//     y = relu(x)^2,    dx = 2 relu(x) dy = 2 sqrt(y) dy
//
// where relu(x) is x unless x <= 0: NaN stays NaN. Both in place, on arrays of `count` elements,
// count % 8 == 0. Only y is kept for backward, which needs it anyway, for the gradient of the
// matrix that y goes into. The root of y as BF16 holds it is off by 2^-10 at most; relu(x) as BF16
// would hold it, by 2^-9. Moved per element, of floatX: forward 2, backward 3. (llmc/gemm_sm90.cuh
// does both on the way out of the products.)
#ifndef LLMC_RELU2_CUH
#define LLMC_RELU2_CUH

#include "llmc/channels.cuh"  // Channels, channels_load, channels_store, flat_grid

static __global__ void relu2_forward_kernel(floatX *y, size_t count) {
    size_t at = flat_first();
    int here = flat_here(count);
    Channels a;
    channels_load(a, y + at, here);
#pragma unroll
    for (int i = 0; i < CHANNELS_HELD; i++) a[i] = a[i] <= 0 ? 0 : a[i] * a[i];
    channels_store(y + at, a, here);
}

static __global__ void relu2_backward_kernel(floatX *dx, const floatX *y, size_t count) {
    size_t at = flat_first();
    int here = flat_here(count);
    Channels a, d;
    channels_load(a, y + at, here);
    channels_load(d, dx + at, here);
#pragma unroll
    for (int i = 0; i < CHANNELS_HELD; i++) d[i] *= 2 * sqrtf(a[i]);
    channels_store(dx + at, d, here);
}

static inline void relu2_forward(floatX *y,  // (count): x in, y out
                                 size_t count, cudaStream_t stream) {
    relu2_forward_kernel<<<flat_grid(count), FLAT_THREADS, 0, stream>>>(y, count);
    CUDA_LAUNCHED();
}

static inline void relu2_backward(floatX *dx,       // (count): dy in, dx out
                                  const floatX *y,  // (count)
                                  size_t count, cudaStream_t stream) {
    relu2_backward_kernel<<<flat_grid(count), FLAT_THREADS, 0, stream>>>(dx, y, count);
    CUDA_LAUNCHED();
}

#endif
