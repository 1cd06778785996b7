// rotary.cuh: position, and the norm of queries and keys, in one pass over the packed rows
// q | k | v that the matmul left. Per head of q and of k, dims j and j + D/2 being a pair:
//
//     y = rope(x):   y1 = x1 cos + x2 sin,   y2 = x2 cos - x1 sin,   angle = pos * 100000^(-2j/D)
//     out = N(y) = r y
//
//     dy = r (dout - out mean(dout out)),   dx1 = dy1 cos - dy2 sin,   dx2 = dy2 cos + dy1 sin
//
// (RoFormer, Su et al. 2021; half-split.) qkv and dqkv are (n, 3C) with H heads of D in each third,
// both changed in place; v's third is left alone. r is (n, 2H): q's heads, then k's. angles are
// (T, D/2) pairs of cos and sin, made in double on the host; token t stands at position t % T.
// Backward needs forward's output and r. Moved per token, of floatX: forward 4C, backward 6C.
// (Hopper's attention does this backward itself: rotary_sm90.cuh.)
//
// One warp takes one token, a few heads at a time; a head is the work of `lanes` lanes. A lane
// holds pieces of WIDTH pairs. D = 128 in BF16, where 8 lanes hold a head and a warp holds four:
//
//     dims     0..7  8..15  ...  56..63 | 64..71  72..79  ...  120..127
//     lane      0      1    ...    7    |    0       1    ...     7
#ifndef LLMC_ROTARY_CUH
#define LLMC_ROTARY_CUH

#include <math.h>

#include "llmc/vec.cuh"  // VEC, vec_load, vec_store

// A lane's place in the half of a head.
typedef struct {
    int lane, lanes;  // lanes: a power of two
    int half;         // D/2
} HalfPlace;

// This lane's pieces of half a head, in HELD floats; zeros beyond its end, or if not `there`.
template <int WIDTH, int HELD, class T>
__device__ __forceinline__ void half_load(float (&x)[HELD], const T *p, HalfPlace at, bool there) {
#pragma unroll
    for (int k = 0; k < HELD; k += WIDTH) {
        int j = k * at.lanes + at.lane * WIDTH;
        float piece[WIDTH] = {};
        if (there && j < at.half) {
            if constexpr (WIDTH == 1)
                piece[0] = to_float(p[j]);
            else
                vec_load(piece, p + j);
        }
#pragma unroll
        for (int i = 0; i < WIDTH; i++) x[k + i] = piece[i];
    }
}

// Likewise cos and sin of this lane's pairs, from a position's angles.
template <int WIDTH, int HELD>
__device__ __forceinline__ void half_angles(float (&c)[HELD], float (&s)[HELD],
                                            const float2 *angles, HalfPlace at) {
#pragma unroll
    for (int k = 0; k < HELD; k += WIDTH) {
        int j = k * at.lanes + at.lane * WIDTH;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            float2 angle = j < at.half ? angles[j + i] : float2{0, 0};
            c[k + i] = angle.x, s[k + i] = angle.y;
        }
    }
}

template <int WIDTH, int HELD>
__device__ __forceinline__ void half_store(floatX *p, const float (&x)[HELD], HalfPlace at,
                                           bool there) {
#pragma unroll
    for (int k = 0; k < HELD; k += WIDTH) {
        int j = k * at.lanes + at.lane * WIDTH;
        float piece[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) piece[i] = x[k + i];
        if (there && j < at.half) {
            if constexpr (WIDTH == 1)
                p[j] = from_float<floatX>(piece[0]);
            else
                vec_store(p + j, piece);
        }
    }
}

// Sum over the lanes of a head, in each of them.
__device__ __forceinline__ float lanes_sum(float x, int lanes) {
    for (int d = lanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(FULL_WARP, x, d);
    return x;
}

constexpr int ROTARY_THREADS = 128;

// A lane loads its parts of HEADS heads, then computes.
template <int WIDTH, int HELD, int HEADS>
static __global__ void __launch_bounds__(ROTARY_THREADS)
    qk_forward_kernel(floatX *qkv, float *r, const float2 *angles, int n, int T, int H, int D,
                      int lanes) {
    int t = (blockIdx.x * ROTARY_THREADS + threadIdx.x) / WARP;
    if (t >= n) return;
    HalfPlace at = {(int)threadIdx.x % lanes, lanes, D / 2};
    int own = threadIdx.x % WARP / lanes, step = WARP / lanes;  // heads own, own + step, ...
    floatX *row = qkv + (size_t)t * 3 * H * D;
    float c[HELD], s[HELD];
    half_angles<WIDTH>(c, s, angles + (size_t)(t % T) * at.half, at);
    for (int first = 0; first < 2 * H; first += HEADS * step) {
        float x1[HEADS][HELD], x2[HEADS][HELD];
#pragma unroll
        for (int k = 0; k < HEADS; k++) {
            int h = first + k * step + own;
            half_load<WIDTH>(x1[k], row + h * D, at, h < 2 * H);
            half_load<WIDTH>(x2[k], row + h * D + at.half, at, h < 2 * H);
        }
#pragma unroll
        for (int k = 0; k < HEADS; k++) {
            int h = first + k * step + own;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                float y1 = x1[k][i] * c[i] + x2[k][i] * s[i];
                float y2 = x2[k][i] * c[i] - x1[k][i] * s[i];
                sum += y1 * y1 + y2 * y2;
                x1[k][i] = y1, x2[k][i] = y2;
            }
            float factor = rsqrtf(lanes_sum(sum, lanes) / D + 0x1p-23f);
#pragma unroll
            for (int i = 0; i < HELD; i++) x1[k][i] *= factor, x2[k][i] *= factor;
            half_store<WIDTH>(row + h * D, x1[k], at, h < 2 * H);
            half_store<WIDTH>(row + h * D + at.half, x2[k], at, h < 2 * H);
            if (at.lane == 0 && h < 2 * H) r[(size_t)t * 2 * H + h] = factor;
        }
    }
}

template <int WIDTH, int HELD, int HEADS>
static __global__ void __launch_bounds__(ROTARY_THREADS)
    qk_backward_kernel(floatX *dqkv, const floatX *qkv, const float *r, const float2 *angles, int n,
                       int T, int H, int D, int lanes) {
    int t = (blockIdx.x * ROTARY_THREADS + threadIdx.x) / WARP;
    if (t >= n) return;
    HalfPlace at = {(int)threadIdx.x % lanes, lanes, D / 2};
    int own = threadIdx.x % WARP / lanes, step = WARP / lanes;
    floatX *drow = dqkv + (size_t)t * 3 * H * D;
    const floatX *row = qkv + (size_t)t * 3 * H * D;
    float c[HELD], s[HELD];
    half_angles<WIDTH>(c, s, angles + (size_t)(t % T) * at.half, at);
    for (int first = 0; first < 2 * H; first += HEADS * step) {
        float d1[HEADS][HELD], d2[HEADS][HELD], y1[HEADS][HELD], y2[HEADS][HELD];
#pragma unroll
        for (int k = 0; k < HEADS; k++) {
            int h = first + k * step + own;
            half_load<WIDTH>(d1[k], drow + h * D, at, h < 2 * H);
            half_load<WIDTH>(d2[k], drow + h * D + at.half, at, h < 2 * H);
            half_load<WIDTH>(y1[k], row + h * D, at, h < 2 * H);
            half_load<WIDTH>(y2[k], row + h * D + at.half, at, h < 2 * H);
        }
#pragma unroll
        for (int k = 0; k < HEADS; k++) {
            int h = first + k * step + own;
            float sum = 0, factor = h < 2 * H ? r[(size_t)t * 2 * H + h] : 0;
#pragma unroll
            for (int i = 0; i < HELD; i++) sum += d1[k][i] * y1[k][i] + d2[k][i] * y2[k][i];
            float mean = lanes_sum(sum, lanes) / D;
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                float g1 = factor * (d1[k][i] - y1[k][i] * mean);
                float g2 = factor * (d2[k][i] - y2[k][i] * mean);
                d1[k][i] = g1 * c[i] - g2 * s[i], d2[k][i] = g2 * c[i] + g1 * s[i];
            }
            half_store<WIDTH>(drow + h * D, d1[k], at, h < 2 * H);
            half_store<WIDTH>(drow + h * D + at.half, d2[k], at, h < 2 * H);
        }
    }
}

// On the host: cos and sin of pos * 100000^(-2j/D), computed in double.
static inline void rope_init(float2 *angles,  // (T, D/2)
                             int T, int D) {
    for (int t = 0; t < T; t++)
        for (int j = 0; j < D / 2; j++) {
            double angle = t * pow(100000, -2.0 * j / D);
            *angles++ = {(float)cos(angle), (float)sin(angle)};
        }
}

// Heads whose D/2 is no multiple of VEC, or is large, take number by number, so many a lane.
constexpr int ROTARY_HELD = 16;
constexpr int ROTARY_MAX_D = 2 * WARP * ROTARY_HELD;

// Whether a head's halves are whole pieces of VEC and a warp holds them in one each.
static inline bool rotary_wide(int D) { return D / 2 % VEC == 0 && D / 2 <= WARP * VEC; }

// Lanes that hold a head: the least power of two of them that can.
static inline int rotary_lanes(int D) {
    int lanes = 1, width = rotary_wide(D) ? VEC : 1;
    if (D > ROTARY_MAX_D)
        die(EXIT_USAGE, "--heads: found C/H = %d, expected at most %d on a GPU", D, ROTARY_MAX_D);
    while (lanes < WARP && lanes * width < D / 2) lanes *= 2;
    return lanes;
}

static inline void qk_forward(floatX *qkv,           // (n, 3C), in place
                              float *r,              // (n, 2H), kept for backward
                              const float2 *angles,  // (T, D/2)
                              int n, int T, int H, int D, cudaStream_t stream) {
    int lanes = rotary_lanes(D), blocks = ceil_div(n, ROTARY_THREADS / WARP);
    auto kernel =
        rotary_wide(D) ? qk_forward_kernel<VEC, VEC, 3> : qk_forward_kernel<1, ROTARY_HELD, 1>;
    kernel<<<blocks, ROTARY_THREADS, 0, stream>>>(qkv, r, angles, n, T, H, D, lanes);
    CUDA_LAUNCHED();
}

static inline void qk_backward(floatX *dqkv,          // (n, 3C), in place
                               const floatX *qkv,     // (n, 3C), forward's output
                               const float *r,        // (n, 2H)
                               const float2 *angles,  // (T, D/2)
                               int n, int T, int H, int D, cudaStream_t stream) {
    int lanes = rotary_lanes(D), blocks = ceil_div(n, ROTARY_THREADS / WARP);
    auto kernel =
        rotary_wide(D) ? qk_backward_kernel<VEC, VEC, 3> : qk_backward_kernel<1, ROTARY_HELD, 1>;
    kernel<<<blocks, ROTARY_THREADS, 0, stream>>>(dqkv, qkv, r, angles, n, T, H, D, lanes);
    CUDA_LAUNCHED();
}

#endif
