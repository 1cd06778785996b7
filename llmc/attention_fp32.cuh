// attention_fp32.cuh: causal attention with windows and documents, plainly, in FP32: for the build
// that is held against the CPU. attention.cuh is the fast one, and tells how it all hangs together.
//
//     s_ij = scale q_i . k_j,   p_ij = exp(s_ij - lse_i),   o_i = sum_j p_ij v_j
//     scale = 1.44 / sqrt(D),   lse_i = log sum_j exp(s_ij)     j: max(doc_start[i], i - W) .. i
// backward, with do = dout:
//     dp_ij = do_i . v_j,   delta_i = do_i . o_i,   ds_ij = p_ij (dp_ij - delta_i),
//     dv_j = sum_i p_ij do_i,   dk_j = scale sum_i ds_ij q_i,   dq_i = scale sum_j ds_ij k_j
//
// q, k, v, dq, dk, dv are n rows of H heads of D, ld apart; o and dout the same, ldo apart; lse and
// delta are (H, n). D is at most 256. A warp does one row of one head: of queries for o and dq, of
// keys for dk and dv. Lane l has the numbers l, l + 32, .. of each row of D; a dot product ends in
// a sum over the warp. Everything is read from global memory, where caches hold it.
#ifndef LLMC_ATTENTION_FP32_CUH
#define LLMC_ATTENTION_FP32_CUH

#include <assert.h>
#include <math.h>

#include "llmc/cuda_common.cuh"  // warp_sum

constexpr int ATTENTION_WARPS = 8;  // rows a block does, neighbours of one head
constexpr int ATTENTION_MAX_D = 256;

// A call's arguments.
typedef struct {
    float *o, *lse;          // (n) rows of H D, ldo apart; (H, n)
    const float *q, *k, *v;  // (n) rows of H D, ld apart
    const int *doc_start;    // (n)
    float *dq, *dk, *dv;     // as q, k, v
    float *delta;            // (H, n)
    const float *dout;       // as o
    int n, H, D, W, ldo, ld;
    float scale;
} Attention;

// Moves the pointers to a head.
__device__ __forceinline__ void at_head(Attention &a, int head) {
    int h = head * a.D;
    size_t at = (size_t)head * (unsigned)a.n;
    a.o += h, a.dout += h, a.q += h, a.k += h, a.v += h, a.dq += h, a.dk += h, a.dv += h;
    a.lse += at, a.delta += at;
}

// The first key that query i sees. Never falls as i rises.
__device__ __forceinline__ int first_key(const Attention &a, int i) {
    return max(a.doc_start[i], i - a.W);
}

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

static inline Attention attention_of(const float *q, const float *k, const float *v,
                                     const int *doc_start, int n, int H, int D, int W, int ldo,
                                     int ld) {
    Attention a = {};
    assert(D <= ATTENTION_MAX_D);
    a.q = q, a.k = k, a.v = v, a.doc_start = doc_start;
    a.n = n, a.H = H, a.D = D, a.W = min(W, n), a.ldo = ldo, a.ld = ld;
    a.scale = 1.44f / sqrtf((float)D);
    return a;
}

static inline void attention_forward(float *o,        // (n) rows of H D, ldo apart
                                     float *lse,      // (H, n)
                                     const float *q,  // (n) rows of H D, ld apart; so k, v
                                     const float *k, const float *v,
                                     const int *doc_start,  // (n)
                                     int n, int H, int D, int W, int ldo, int ld,
                                     cudaStream_t stream) {
    Attention a = attention_of(q, k, v, doc_start, n, H, D, W, ldo, ld);
    a.o = o, a.lse = lse;
    if (D <= 32)
        attention_launch(attention_forward_kernel<1>, a, stream);
    else if (D <= 64)
        attention_launch(attention_forward_kernel<2>, a, stream);
    else if (D <= 128)
        attention_launch(attention_forward_kernel<4>, a, stream);
    else
        attention_launch(attention_forward_kernel<8>, a, stream);
}

static inline void attention_backward(float *dq,  // (n) rows of H D, ld apart; so dk, dv, q, k, v
                                      float *dk, float *dv,
                                      float *delta,       // (H, n), scratch
                                      const float *dout,  // (n) rows of H D, ldo apart; so o
                                      const float *o,
                                      const float *lse,  // (H, n)
                                      const float *q, const float *k, const float *v,
                                      const int *doc_start,  // (n)
                                      int n, int H, int D, int W, int ldo, int ld,
                                      cudaStream_t stream) {
    Attention a = attention_of(q, k, v, doc_start, n, H, D, W, ldo, ld);
    a.o = (float *)o, a.lse = (float *)lse;  // only read
    a.dq = dq, a.dk = dk, a.dv = dv, a.delta = delta, a.dout = dout;
    if (D <= 32)
        attention_launch_backward<1>(a, stream);
    else if (D <= 64)
        attention_launch_backward<2>(a, stream);
    else if (D <= 128)
        attention_launch_backward<4>(a, stream);
    else
        attention_launch_backward<8>(a, stream);
}

#endif
