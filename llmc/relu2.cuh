// relu2.cuh: the nonlinearity of the MLP, ReLU^2 (Primer, So et al. 2021), behind a product:
//
//     r = relu(x),  y = r^2,    dx = 2 r dy        relu(x) is x unless x <= 0: NaN stays NaN
//
// All are arrays of `count` elements, count % 8 == 0. Only r is kept: backward makes y again in the
// pass that makes dx, for the gradient of the matrix that y goes into. Moved per element, of
// floatX: forward 3, backward 4. (llmc/gemm_sm90.cuh does both on the way out of the products.)
#ifndef LLMC_RELU2_CUH
#define LLMC_RELU2_CUH

#include "llmc/channels.cuh"  // Channels, channels_load, channels_store, flat_grid

static __global__ void relu2_forward_kernel(floatX *y, floatX *r, size_t count) {
    size_t at = flat_first();
    int here = flat_here(count);
    Channels a;
    channels_load(a, r + at, here);
#pragma unroll
    for (int i = 0; i < CHANNELS_HELD; i++) a[i] = a[i] <= 0 ? 0 : a[i];
    channels_store(r + at, a, here);
#pragma unroll
    for (int i = 0; i < CHANNELS_HELD; i++) a[i] *= a[i];
    channels_store(y + at, a, here);
}

static __global__ void relu2_backward_kernel(floatX *dx, floatX *y, const floatX *r, size_t count) {
    size_t at = flat_first();
    int here = flat_here(count);
    Channels a, d;
    channels_load(a, r + at, here);
    channels_load(d, dx + at, here);
#pragma unroll
    for (int i = 0; i < CHANNELS_HELD; i++) d[i] *= 2 * a[i], a[i] *= a[i];
    channels_store(dx + at, d, here);
    channels_store(y + at, a, here);
}

static inline void relu2_forward(floatX *y,  // (count)
                                 floatX *r,  // (count): x in, r out
                                 size_t count, cudaStream_t stream) {
    relu2_forward_kernel<<<flat_grid(count), FLAT_THREADS, 0, stream>>>(y, r, count);
    CUDA_LAUNCHED();
}

static inline void relu2_backward(floatX *dx,       // (count): dy in, dx out
                                  floatX *y,        // (count): r^2 again
                                  const floatX *r,  // (count)
                                  size_t count, cudaStream_t stream) {
    relu2_backward_kernel<<<flat_grid(count), FLAT_THREADS, 0, stream>>>(dx, y, r, count);
    CUDA_LAUNCHED();
}

#endif
