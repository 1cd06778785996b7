// value_embed.cuh: the value embedding, gated per head by 12 channels of the layer's normed input
// (ResFormer, Zhou et al. 2024; the gate is nanochat's):
//
//     s = sigmoid(h[t][0:12] . w[head]),   gate = 3 s,   v[t][head] += gate table[idx[t]][head]
//
//     dtable[idx[t]][head] += gate dv[t][head]                              value_embed_backward
//     dz = <dv[t][head], table[idx[t]][head]> 3 s (1 - s)
//     dw[head] += dz h[t][0:12],   dh[t][0:12] += sum_head dz w[head]       value_gate_backward
//
// v and dv are heads of D in rows of stride ld (part of the packed q | k | v), h is (n, C),
// C = H D, gate and dz (n, H) FP32, w (H, 12) FP32, the table (Vp, C). v's own gradient is dv.
// Backward needs h, gate, dv and the table, not v.
//
// A head is the work of a team: 8 or 16 lanes (16 or 32 in FP32) with 16 bytes each at D = 64 and
// 128; at any other D a warp, a number a lane, in passes. Moved per token, of floatX: forward 3C;
// backward C, and for each different token C and 8C bytes of gradient.
#ifndef LLMC_VALUE_EMBED_CUH
#define LLMC_VALUE_EMBED_CUH

#include "llmc/embed.cuh"  // EmbedIndex, embed_sum_row, embed_add_partials
#include "llmc/model.h"    // GATE_CHANNELS

constexpr int VALUE_THREADS = 128;
constexpr int VALUE_AHEAD = 4;  // tokens on their way to a team
constexpr int GATE_TOKENS = 128, GATE_THREADS = 128;

// D is 64, 128, or 0: any.
template <int D> constexpr int TEAM_LANES = D ? D / VEC : WARP;
template <int D> constexpr int TEAM_WIDTH = D ? VEC : 1;  // numbers a lane

// Sum over the lanes of a team, in each of them. Other teams of the warp may be elsewhere.
template <int LANES> __device__ __forceinline__ float team_sum(float x) {
    unsigned mask = FULL_WARP >> (WARP - LANES) << threadIdx.x % WARP / LANES * LANES;
#pragma unroll
    for (int d = LANES / 2; d > 0; d /= 2) x += __shfl_xor_sync(mask, x, d);
    return x;
}

template <int WIDTH, class T>
__device__ __forceinline__ void team_load(float (&x)[WIDTH], const T *p) {
    if constexpr (WIDTH == 1)
        x[0] = to_float(*p);
    else
        vec_load(x, p);
}

template <int WIDTH, class T>
__device__ __forceinline__ void team_store(T *p, const float (&x)[WIDTH]) {
    if constexpr (WIDTH == 1)
        *p = from_float<T>(x[0]);
    else
        vec_store(p, x);
}

// A team takes a head of a token.
template <int D>
static __global__ void __launch_bounds__(VALUE_THREADS)
    value_embed_forward_kernel(floatX *v, float *gate, const floatX *h, const float *w,
                               const floatX *table, const int *tokens, int n, int H, int any_D,
                               int ld) {
    constexpr int LANES = TEAM_LANES<D>, WIDTH = TEAM_WIDTH<D>;
    int size = D ? D : any_D, C = H * size, lane = threadIdx.x % LANES;
    int team = blockIdx.x * (VALUE_THREADS / LANES) + threadIdx.x / LANES;
    int t = team / H, head = team % H;
    if (t >= n) return;
    float z = 0;
    for (int c = lane; c < GATE_CHANNELS; c += LANES)
        z += to_float(h[(size_t)t * C + c]) * w[head * GATE_CHANNELS + c];
    float g = 3 / (1 + expf(-team_sum<LANES>(z)));
    const floatX *from = table + (size_t)tokens[t] * C + head * size;
    floatX *to = v + (size_t)t * ld + head * size;
    for (int d = lane * WIDTH; d < size; d += LANES * WIDTH) {
        float sum[WIDTH], embed[WIDTH];
        team_load(sum, to + d);
        team_load(embed, from + d);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sum[i] += g * embed[i];
        team_store(to + d, sum);
    }
    if (lane == 0) gate[(size_t)t * H + head] = g;
}

// A team takes a head of a piece of a token's positions: the token's row of the table stays in
// registers while the positions pass by.
template <int D>
static __global__ void __launch_bounds__(VALUE_THREADS, 5)
    value_embed_backward_kernel(float *dtable, float *partials, float *dz, const floatX *dv,
                                const float *gate, const floatX *table, EmbedIndex index, int H,
                                int any_D, int ld) {
    constexpr int LANES = TEAM_LANES<D>, WIDTH = TEAM_WIDTH<D>, TEAMS = VALUE_THREADS / LANES;
    int size = D ? D : any_D, C = H * size, lane = threadIdx.x % LANES;
    int items = index.counts->pieces * H, step = gridDim.x * TEAMS;
    for (int item = blockIdx.x * TEAMS + threadIdx.x / LANES; item < items; item += step) {
        EmbedPiece piece = index.piece[item / H];
        int head = item % H;
        const int *position = index.position + piece.first;
        for (int pass = 0; pass < size; pass += LANES * WIDTH) {
            int d = pass + lane * WIDTH, at = head * size + d;
            bool live = D || d < size;
            float embed[WIDTH] = {}, sum[WIDTH] = {};
            if (live) team_load(embed, table + (size_t)piece.token * C + at);
            for (int k = 0; k < piece.count; k += VALUE_AHEAD) {
                int t[VALUE_AHEAD];
                float row[VALUE_AHEAD][WIDTH] = {}, g[VALUE_AHEAD];
#pragma unroll
                for (int j = 0; j < VALUE_AHEAD; j++)  // after the last one: the last again
                    t[j] = position[min(k + j, piece.count - 1)];
#pragma unroll
                for (int j = 0; j < VALUE_AHEAD; j++) {
                    if (live) team_load(row[j], dv + (size_t)t[j] * ld + at);
                    g[j] = k + j < piece.count ? gate[(size_t)t[j] * H + head] : 0;
                }
#pragma unroll
                for (int j = 0; j < VALUE_AHEAD; j++) {
                    float dot = 0;
#pragma unroll
                    for (int i = 0; i < WIDTH; i++) {
                        dot += row[j][i] * embed[i];
                        sum[i] += g[j] * row[j][i];
                    }
                    float ds = team_sum<LANES>(dot) * g[j] * (1 - (1.0f / 3) * g[j]);
                    float *to = dz + (size_t)t[j] * H + head;
                    if (lane == 0 && k + j < piece.count) *to = pass ? *to + ds : ds;
                }
            }
            if (!live) continue;
            float *to = embed_sum_row(piece, dtable, partials, C) + at, before[WIDTH] = {};
            if (piece.partial < 0) team_load(before, to);
#pragma unroll
            for (int i = 0; i < WIDTH; i++) sum[i] += before[i];
            team_store(to, sum);
        }
    }
}

// A block takes GATE_TOKENS tokens, and leaves its part of each of dw's sums.
static __global__ void __launch_bounds__(GATE_THREADS)
    value_gate_backward_kernel(double *part /* (12 H, blocks) */, floatX *dh, const float *dz,
                               const floatX *h, const float *w, int n, int H, int C) {
    int first = blockIdx.x * GATE_TOKENS, count = min(GATE_TOKENS, n - first);
    dz += (size_t)first * H, h += (size_t)first * C, dh += (size_t)first * C;
    for (int i = threadIdx.x; i < H * GATE_CHANNELS; i += GATE_THREADS) {
        int head = i / GATE_CHANNELS, c = i % GATE_CHANNELS;
        float sum = 0;
#pragma unroll 8
        for (int t = 0; t < count; t++) sum += dz[t * H + head] * to_float(h[(size_t)t * C + c]);
        part[(size_t)i * gridDim.x + blockIdx.x] = sum;
    }
    for (int i = threadIdx.x; i < count * GATE_CHANNELS; i += GATE_THREADS) {
        int t = i / GATE_CHANNELS, c = i % GATE_CHANNELS;
        floatX *to = dh + (size_t)t * C + c;
        float sum = to_float(*to);
        for (int head = 0; head < H; head++) sum += dz[t * H + head] * w[head * GATE_CHANNELS + c];
        *to = from_float<floatX>(sum);
    }
}

// ---------------------------------------------------------------------------------------------

static inline bool team_has_size(int D) { return D == 64 || D == 128; }
static inline int team_lanes(int D) { return team_has_size(D) ? D / VEC : WARP; }

static inline void value_embed_forward(floatX *v,            // (n) rows of H heads, stride ld
                                       float *gate,          // (n, H), kept for backward
                                       const floatX *h,      // (n, C)
                                       const float *w,       // (H, 12)
                                       const floatX *table,  // (Vp, C)
                                       const int *tokens,    // (n)
                                       int n, int H, int D, int ld, cudaStream_t stream) {
    auto kernel = D == 64    ? value_embed_forward_kernel<64>
                  : D == 128 ? value_embed_forward_kernel<128>
                             : value_embed_forward_kernel<0>;
    int blocks = ceil_div(n * H, VALUE_THREADS / team_lanes(D));
    kernel<<<blocks, VALUE_THREADS, 0, stream>>>(v, gate, h, w, table, tokens, n, H, D, ld);
    CUDA_LAUNCHED();
}

static inline void value_embed_backward(float *dtable,        // (Vp, C), added to
                                        float *dz,            // (n, H)
                                        const floatX *dv,     // (n) rows of H heads, stride ld
                                        const float *gate,    // (n, H)
                                        const floatX *table,  // (Vp, C)
                                        EmbedIndex index,     // of the n tokens, device memory
                                        void *scratch,        // (embed_scratch_bytes(n, C))
                                        int n, int H, int D, int ld, cudaStream_t stream) {
    auto kernel = D == 64    ? value_embed_backward_kernel<64>
                  : D == 128 ? value_embed_backward_kernel<128>
                             : value_embed_backward_kernel<0>;
    float *partials = (float *)scratch;
    int blocks = ceil_div(n * H, 4 * VALUE_THREADS / team_lanes(D));  // as embed_backward's
    kernel<<<blocks, VALUE_THREADS, 0, stream>>>(dtable, partials, dz, dv, gate, table, index, H, D,
                                                 ld);
    CUDA_LAUNCHED();
    embed_add_partials(dtable, partials, index, n, H * D, stream);
}

static inline size_t value_gate_scratch_bytes(int n, int H) {
    return (size_t)(H * GATE_CHANNELS) * (size_t)ceil_div(n, GATE_TOKENS) * sizeof(double);
}

static inline void value_gate_backward(float *dw,        // (H, 12), added to
                                       floatX *dh,       // (n, C), its first 12 channels added to
                                       const float *dz,  // (n, H)
                                       const floatX *h,  // (n, C)
                                       const float *w,   // (H, 12)
                                       void *scratch,    // (value_gate_scratch_bytes(n, H))
                                       int n, int H, int C, cudaStream_t stream) {
    int blocks = ceil_div(n, GATE_TOKENS);
    double *part = (double *)scratch;
    value_gate_backward_kernel<<<blocks, GATE_THREADS, 0, stream>>>(part, dh, dz, h, w, n, H, C);
    CUDA_LAUNCHED();
    tokens_add_sums(dw, H * GATE_CHANNELS, NULL, part, blocks, stream);
}

#endif
