// embed.cuh: the token embedding,
//
//     x = N(table[idx]),                  N(x) = r x,   r = 1 / sqrt(mean(x^2) + 2^-23)
//     dtable[idx[t]] += dx[t]             dx: of table[idx], as the norm's backward left it
//
// idx is (n), x and dx (n, C), r (n), the table (Vp, C). Backward goes by the index of
// llmc/embed_index.h: a warp takes a piece of a token's positions and 32 VEC of the channels, adds
// the rows up in registers and puts the sum where it belongs:
//
//     token with one piece            dtable[token] +=
//     token with several              partial[piece] =, and a second kernel adds those in order
//
// Rows of tokens that do not occur are not touched. Moved per token: forward 2C of floatX; backward
// C of floatX, and 8C bytes for each different token.
#ifndef LLMC_EMBED_CUH
#define LLMC_EMBED_CUH

#include "llmc/embed_index.h"  // EmbedIndex, EmbedPiece, EmbedSplit
#include "llmc/rmsnorm.cuh"    // norm_factor, Channels, token_launch

constexpr int EMBED_THREADS = 256;
constexpr int EMBED_AHEAD = 4;  // rows on their way to a warp

static __global__ void __launch_bounds__(CHANNELS_THREADS)
    embed_norm_forward_kernel(floatX *x, float *r, const int *tokens, const floatX *table, int n,
                              int C) {
    for (int t = token_first(); t < n; t += token_step()) {
        Channels v;
        channels_load(v, table + (size_t)tokens[t] * C, C);
        float factor = norm_factor(v, C);
#pragma unroll
        for (int i = 0; i < CHANNELS_HELD; i++) v[i] *= factor;
        channels_store(x + (size_t)t * C, v, C);
        if (threadIdx.x == 0) r[t] = factor;
    }
}

// Where a piece's sum goes: added to the token's row, or written to its own partial sum.
__device__ __forceinline__ float *embed_sum_row(EmbedPiece piece, float *dtable, float *partials,
                                                int C) {
    return piece.partial < 0 ? dtable + (size_t)piece.token * C
                             : partials + (size_t)piece.partial * C;
}

// Warp w of the grid takes slice w % slices of the channels of piece w / slices.
static __global__ void __launch_bounds__(EMBED_THREADS)
    embed_backward_kernel(float *dtable, float *partials, const floatX *dx, EmbedIndex index,
                          int C) {
    int lane = threadIdx.x % WARP, slices = ceil_div(C, WARP * VEC);
    int warps = gridDim.x * (EMBED_THREADS / WARP), items = index.counts->pieces * slices;
    for (int w = blockIdx.x * (EMBED_THREADS / WARP) + threadIdx.x / WARP; w < items; w += warps) {
        EmbedPiece piece = index.piece[w / slices];
        int c = (w % slices * WARP + lane) * VEC;
        if (c >= C) continue;
        float sum[VEC] = {};
        for (int k = 0; k < piece.count; k += EMBED_AHEAD) {
            int t[EMBED_AHEAD];
            float row[EMBED_AHEAD][VEC];
#pragma unroll
            for (int j = 0; j < EMBED_AHEAD; j++)  // after the last one: the last again
                t[j] = index.position[piece.first + min(k + j, piece.count - 1)];
#pragma unroll
            for (int j = 0; j < EMBED_AHEAD; j++) vec_load(row[j], dx + (size_t)t[j] * C + c);
#pragma unroll
            for (int j = 0; j < EMBED_AHEAD; j++)
#pragma unroll
                for (int i = 0; i < VEC; i++)
                    if (k + j < piece.count) sum[i] += row[j][i];
        }
        float *to = embed_sum_row(piece, dtable, partials, C) + c, before[VEC] = {};
        if (piece.partial < 0) vec_load(before, to);
#pragma unroll
        for (int i = 0; i < VEC; i++) sum[i] += before[i];
        vec_store(to, sum);
    }
}

// dtable[token] += the token's partial sums. A block takes 4 WARP channels of a split token; its
// warps share out the partial sums, and their sums are added in order.
static __global__ void __launch_bounds__(EMBED_THREADS)
    embed_add_partials_kernel(float *dtable, const float *partials, EmbedIndex index, int C) {
    constexpr int WARPS = EMBED_THREADS / WARP;
    __shared__ alignas(16) float of_warp[WARPS][WARP][4];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int c = (blockIdx.x * WARP + lane) * 4;
    partials += min(c, C - 4);
    for (int s = blockIdx.y; s < index.counts->splits; s += gridDim.y) {
        EmbedSplit split = index.split[s];
        float sum[4] = {};
        for (int k = warp; k < split.count; k += EMBED_AHEAD * WARPS) {
            float part[EMBED_AHEAD][4];
#pragma unroll
            for (int j = 0; j < EMBED_AHEAD; j++) {
                int from = split.first + min(k + j * WARPS, split.count - 1);
                vec_load(part[j], partials + (size_t)from * C);
            }
#pragma unroll
            for (int j = 0; j < EMBED_AHEAD; j++)
                for (int i = 0; i < 4; i++)
                    if (k + j * WARPS < split.count) sum[i] += part[j][i];
        }
        vec_store(of_warp[warp][lane], sum);
        __syncthreads();
        if (warp == 0 && c < C) {
            float *to = dtable + (size_t)split.token * C + c;
            vec_load(sum, to);
            for (int w = 0; w < WARPS; w++)
                for (int i = 0; i < 4; i++) sum[i] += of_warp[w][lane][i];
            vec_store(to, sum);
        }
        __syncthreads();
    }
}

// ---------------------------------------------------------------------------------------------

// Scratch of embed_backward and value_embed_backward: the partial sums.
static inline size_t embed_scratch_bytes(int n, int C) {
    return (size_t)embed_max_partials(n) * (size_t)C * sizeof(float);
}

static inline void embed_add_partials(float *dtable, const float *partials, EmbedIndex index, int n,
                                      int C, cudaStream_t stream) {
    if (!embed_max_splits(n)) return;
    dim3 grid((unsigned)ceil_div(C, 4 * WARP), (unsigned)min(embed_max_splits(n), 512));
    embed_add_partials_kernel<<<grid, EMBED_THREADS, 0, stream>>>(dtable, partials, index, C);
    CUDA_LAUNCHED();
}

static inline void embed_norm_forward(floatX *x,            // (n, C)
                                      float *r,             // (n), kept for backward
                                      const int *tokens,    // (n)
                                      const floatX *table,  // (Vp, C)
                                      int n, int C, cudaStream_t stream) {
    TokenLaunch l = token_launch(n, C, 2);
    embed_norm_forward_kernel<<<l.grid, l.block, 0, stream>>>(x, r, tokens, table, n, C);
    CUDA_LAUNCHED();
}

static inline void embed_backward(float *dtable,     // (Vp, C), added to
                                  const floatX *dx,  // (n, C)
                                  EmbedIndex index,  // of the n tokens, in device memory
                                  void *scratch,     // (embed_scratch_bytes(n, C))
                                  int n, int C, cudaStream_t stream) {
    // A warp for each 4 tokens: natural text has fewer pieces; where all differ, 4 pieces a warp.
    int blocks = ceil_div(n * ceil_div(C, WARP * VEC), 4 * EMBED_THREADS / WARP);
    float *partials = (float *)scratch;
    embed_backward_kernel<<<blocks, EMBED_THREADS, 0, stream>>>(dtable, partials, dx, index, C);
    CUDA_LAUNCHED();
    embed_add_partials(dtable, partials, index, n, C, stream);
}

#endif
