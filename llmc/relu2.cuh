// relu2.cuh: the nonlinearity of the MLP, ReLU^2 (Primer, So et al. 2021):
//
//     y = relu(x)^2,    dx = 2 relu(x) dy        relu(x) is x unless x <= 0: NaN stays NaN
//
// All are arrays of `count` elements, count % 8 == 0. Only x is kept: backward makes y again in the
// pass that makes dx, for the gradient of the matrix that y goes into. Moved per element, of
// floatX: forward 2, backward 4.
#ifndef LLMC_RELU2_CUH
#define LLMC_RELU2_CUH

#include "llmc/channels.cuh"  // Channels, channels_load, channels_store, flat_grid

static __global__ void relu2_forward_kernel(floatX *y, const floatX *x, size_t count) {
    size_t at = flat_first();
    int here = flat_here(count);
    Channels a;
    channels_load(a, x + at, here);
#pragma unroll
    for (int i = 0; i < CHANNELS_HELD; i++) a[i] = a[i] <= 0 ? 0 : a[i] * a[i];
    channels_store(y + at, a, here);
}

static __global__ void relu2_backward_kernel(floatX *dx, floatX *y, const floatX *x, size_t count) {
    size_t at = flat_first();
    int here = flat_here(count);
    Channels a, d;
    channels_load(a, x + at, here);
    channels_load(d, dx + at, here);
#pragma unroll
    for (int i = 0; i < CHANNELS_HELD; i++) {
        d[i] = a[i] <= 0 ? 0 : 2 * a[i] * d[i];
        a[i] = a[i] <= 0 ? 0 : a[i] * a[i];
    }
    channels_store(dx + at, d, here);
    channels_store(y + at, a, here);
}

static inline void relu2_forward(floatX *y,        // (count)
                                 const floatX *x,  // (count)
                                 size_t count, cudaStream_t stream) {
    relu2_forward_kernel<<<flat_grid(count), FLAT_THREADS, 0, stream>>>(y, x, count);
    CUDA_LAUNCHED();
}

static inline void relu2_backward(floatX *dx,       // (count): dy in, dx out
                                  floatX *y,        // (count): relu(x)^2 again
                                  const floatX *x,  // (count)
                                  size_t count, cudaStream_t stream) {
    relu2_backward_kernel<<<flat_grid(count), FLAT_THREADS, 0, stream>>>(dx, y, x, count);
    CUDA_LAUNCHED();
}

#endif
