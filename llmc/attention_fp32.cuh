// attention_fp32.cuh: attention_call.cuh's attention, plainly, in FP32: for the build that is held
// against the CPU. attention.cuh is the fast one.
//
// D is at most 256. A warp does one row of one head: of queries for o and dq, of keys for dk and
// dv. Lane l has the numbers l, l + 32, .. of each row of D; a dot product ends in a sum over the
// warp. Everything is read from global memory, where caches hold it.
#ifndef LLMC_ATTENTION_FP32_CUH
#define LLMC_ATTENTION_FP32_CUH

#include "llmc/attention_call.cuh"  // Attention, at_head, first_key, attention_forward

#define ATTENTION_NAME "plain"
constexpr bool ATTENTION_ROTATES = false;

constexpr int ATTENTION_WARPS = 8;  // rows a block does, neighbours of one head
constexpr int ATTENTION_MAX_D = 256;

// The row of this warp, n or more if there is none.
__device__ __forceinline__ int warp_row(int H) {
    return (int)(blockIdx.x / (unsigned)H * ATTENTION_WARPS + threadIdx.x / WARP);
}

// ---------------------------------------------------------------------------------------------
// Rows of D, N numbers a lane.

template <int N>
__device__ __forceinline__ void row_load(float (&x)[N], const float *rows, int i, int ld, int D) {
    int lane = (int)(threadIdx.x % WARP);
#pragma unroll
    for (int c = 0; c < N; c++)
        x[c] =
            lane + WARP * c < D ? rows[(size_t)i * (unsigned)ld + (unsigned)(lane + WARP * c)] : 0;
}

template <int N>
__device__ __forceinline__ void row_store(float *rows, const float (&x)[N], float factor, int i,
                                          int ld, int D) {
    int lane = (int)(threadIdx.x % WARP);
#pragma unroll
    for (int c = 0; c < N; c++)
        if (lane + WARP * c < D)
            rows[(size_t)i * (unsigned)ld + (unsigned)(lane + WARP * c)] = factor * x[c];
}

template <int N>
__device__ __forceinline__ float row_dot(const float (&x)[N], const float (&y)[N]) {
    float sum = 0;
#pragma unroll
    for (int c = 0; c < N; c++) sum += x[c] * y[c];
    return warp_sum(sum);
}

// y += a x
template <int N>
__device__ __forceinline__ void row_add(float (&y)[N], float a, const float (&x)[N]) {
#pragma unroll
    for (int c = 0; c < N; c++) y[c] += a * x[c];
}

// ---------------------------------------------------------------------------------------------
// Forward: 32 keys at a time, lane j with the s and p of the j-th. largest and sum are the row's so
// far; where a larger s comes, what was summed is scaled.

template <int N>
static __global__ void __launch_bounds__(ATTENTION_WARPS *WARP, 3)
    attention_forward_kernel(Attention a) {
    int i = warp_row(a.H), lane = (int)(threadIdx.x % WARP);
    if (i >= a.n) return;
    at_head(a, (int)blockIdx.x % a.H);
    float q[N], row[N], out[N] = {0}, largest = -INFINITY, sum = 0;
    row_load(q, a.q, i, a.ld, a.D);
    for (int j0 = first_key(a, i); j0 <= i; j0 += WARP) {
        int count = min(WARP, i + 1 - j0);
        float s = -INFINITY, top;
        for (int j = 0; j < count; j++) {
            row_load(row, a.k, j0 + j, a.ld, a.D);
            float x = a.scale * row_dot(q, row);
            if (lane == j) s = x;
        }
        top = fmaxf(largest, s);
#pragma unroll
        for (int d = WARP / 2; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, d));
        float factor = expf(largest - top), p = expf(s - top);
        largest = top, sum = sum * factor + warp_sum(p);
#pragma unroll
        for (int c = 0; c < N; c++) out[c] *= factor;
        for (int j = 0; j < count; j++) {
            row_load(row, a.v, j0 + j, a.ld, a.D);
            row_add(out, __shfl_sync(FULL_WARP, p, j), row);
        }
    }
    row_store(a.o, out, 1 / sum, i, a.ldo, a.D);
    if (lane == 0) a.lse[i] = largest + logf(sum);
}

// ---------------------------------------------------------------------------------------------
// Backward.

// dq_i, and delta_i on the way.
template <int N>
static __global__ void __launch_bounds__(ATTENTION_WARPS *WARP, 3)
    attention_dq_kernel(Attention a) {
    int i = warp_row(a.H);
    if (i >= a.n) return;
    at_head(a, (int)blockIdx.x % a.H);
    float q[N], dout[N], k[N], v[N], dq[N] = {0};
    row_load(q, a.q, i, a.ld, a.D), row_load(dout, a.dout, i, a.ldo, a.D);
    row_load(v, a.o, i, a.ldo, a.D);
    float delta = row_dot(dout, v), lse = a.lse[i];
    if (threadIdx.x % WARP == 0) a.delta[i] = delta;
    for (int j = first_key(a, i); j <= i; j++) {
        row_load(k, a.k, j, a.ld, a.D), row_load(v, a.v, j, a.ld, a.D);
        float p = expf(a.scale * row_dot(q, k) - lse);
        row_add(dq, p * (row_dot(dout, v) - delta), k);
    }
    row_store(a.dq, dq, a.scale, i, a.ld, a.D);
}

// dk_j and dv_j: over the queries that see j, from j itself on.
template <int N>
static __global__ void __launch_bounds__(ATTENTION_WARPS *WARP, 3)
    attention_dkv_kernel(Attention a) {
    int j = warp_row(a.H);
    if (j >= a.n) return;
    at_head(a, (int)blockIdx.x % a.H);
    float q[N], dout[N], k[N], v[N], dk[N] = {0}, dv[N] = {0};
    row_load(k, a.k, j, a.ld, a.D), row_load(v, a.v, j, a.ld, a.D);
    for (int i = j; i < a.n && first_key(a, i) <= j; i++) {
        row_load(q, a.q, i, a.ld, a.D), row_load(dout, a.dout, i, a.ldo, a.D);
        float p = expf(a.scale * row_dot(q, k) - a.lse[i]);
        row_add(dv, p, dout);
        row_add(dk, p * (row_dot(dout, v) - a.delta[i]), q);
    }
    row_store(a.dk, dk, a.scale, j, a.ld, a.D), row_store(a.dv, dv, 1, j, a.ld, a.D);
}

// ---------------------------------------------------------------------------------------------
// Launchers.

static inline void attention_launch(void (*kernel)(Attention), const Attention &a,
                                    cudaStream_t stream) {
    unsigned blocks = (unsigned)(ceil_div(a.n, ATTENTION_WARPS) * a.H);
    kernel<<<blocks, ATTENTION_WARPS * WARP, 0, stream>>>(a);
    CUDA_LAUNCHED();
}

template <int N> static inline void attention_launch_backward(const Attention &a, cudaStream_t s) {
    attention_launch(attention_dq_kernel<N>, a, s);
    attention_launch(attention_dkv_kernel<N>, a, s);
}

inline void attention_run_forward(const Attention &a, cudaStream_t stream) {
    assert(a.D <= ATTENTION_MAX_D);
    if (a.D <= 32)
        attention_launch(attention_forward_kernel<1>, a, stream);
    else if (a.D <= 64)
        attention_launch(attention_forward_kernel<2>, a, stream);
    else if (a.D <= 128)
        attention_launch(attention_forward_kernel<4>, a, stream);
    else
        attention_launch(attention_forward_kernel<8>, a, stream);
}

inline void attention_run_backward(const Attention &a, cudaStream_t stream) {
    assert(!a.rotary.r);
    assert(a.D <= ATTENTION_MAX_D);
    if (a.D <= 32)
        attention_launch_backward<1>(a, stream);
    else if (a.D <= 64)
        attention_launch_backward<2>(a, stream);
    else if (a.D <= 128)
        attention_launch_backward<4>(a, stream);
    else
        attention_launch_backward<8>(a, stream);
}

#endif
