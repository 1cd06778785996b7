// attention.cu: the ladder of attention, forward: from what the formula says, a thread a query, to
// llmc/attention.cuh and llmc/attention_sm90.cuh. attention_backward.cu is the ladder of backward.
//
//     s_ij = scale q_i . k_j,   p_ij = exp(s_ij - lse_i),   o_i = sum_j p_ij v_j
//     j = first_i .. i,         lse_i = log sum_j exp(s_ij) = m_i + log sum_j exp(s_ij - m_i)
//
// Query i sees the keys first_i .. i: none after itself, none before its window, none of another
// document (llmc/attention_call.cuh; every kernel here is given its struct Attention). m_i is the
// largest s_ij: it keeps exp from overflowing, and cancels. q, k, v are BF16, D = 128 numbers a
// row. A pair of query and key costs 128 multiplications and additions for s_ij and as many for
// p_ij v_j: 512 FLOPs. The GPU can do 10^15 a second, if their numbers are at hand. All rungs
// compute the same 512; what they differ in is how often a number is fetched, from how far, and by
// which units.
//
// WHAT A GPU IS, as far as it matters here. A kernel is a function that many threads run; blockIdx
// and threadIdx tell each which one it is. Threads come in warps of 32 (its lanes), which execute
// the same instruction at the same time, each on registers of its own; warps come in blocks of up
// to 1024 threads. A block runs on one of the 132 processors (SMs), several at once as far as there
// is room: 65,536 registers, 227 KB of shared memory. An SM issues an instruction of 4 warps in
// each clock; that a warp waits costs nothing as long as others have something to do. From far to
// near:
//
//     memory         4.8 TB/s      in sectors of 32 bytes: a warp whose lanes read 4 bytes each,
//     L2, 50 MB      ~ 5.5 TB/s    side by side, takes 4; one whose lanes read far apart takes 32
//     L1, shared     ~ 30 TB/s     of each SM, 128 bytes a clock; shared memory is the part that
//                                  the program fills itself: 32 banks of 4 bytes, side by side
//     registers                    of a thread; the lanes of a warp swap theirs by __shfl_sync
//     FP32 units     67 TFLOP/s    a multiply-add of a warp is 64 FLOPs
//     tensor cores   989 TFLOP/s   one of small BF16 matrices, by a warp together, 4096
//
// __syncthreads() is where all threads of a block meet, __syncwarp() those of a warp: what others
// wrote ahead of it can be read after it.
//
// THE LADDER on an H200: 32 rows of T = 2048, H = 6, no window; 2.06e11 FLOPs. The ceiling is what
// cuDNN reaches. `make ladder OP=attention` prints this table.
//
//     rung  idea                                                        us  TFLOP/s of 455 times v1
//     v1    a thread a query, scores in memory                     393,268      0.5   0.1%      1.0
//     v2    a warp a query: lanes read side by side                 29,769      6.9     2%       13
//     v3    online softmax: no scores in memory                     32,231      6.4     1%       12
//     v4    tiles in shared memory, read by all                      6,882       30     7%       57
//     v5    tensor cores                                               986      209    46%      399
//     v6    copies run beside products                                 788      262    58%      499
//     llmc  llmc/attention.cuh: 32 rows a warp                         609      338    74%      646
//     sm90  llmc/attention_sm90.cuh: TMA, wgmma                        357      577   127%    1,100
//
// To read on the way: llmc/attention_call.cuh first; ahead of v5 the opening comment of
// llmc/ptx.cuh; after v6 llmc/attention.cuh; last llmc/ptx_sm90.cuh, llmc/tile_sm90.cuh and
// llmc/attention_sm90.cuh.
#include "dev/cuda/ladder.cuh"      // Rung, ladder_check, ladder_time
#include "llmc/attention_call.cuh"  // Attention, at_head, first_key
#include "llmc/ptx.cuh"             // mma, ldmatrix, ldmatrix_trans, cp_async_16, exp2_fast
#include "llmc/vec.cuh"             // vec_load, vec_store, to_float, from_float

// The last rungs. Each of these files brings functions of the same names, for programs that have
// one of them; here they stand side by side. HOPPER: the build is for sm_90a.
namespace portable {
#include "llmc/attention.cuh"
}
#ifdef HOPPER
#include <cuda.h>
#undef ATTENTION_NAME
namespace hopper {
#include "llmc/attention_sm90.cuh"
}
#endif

constexpr int D = 128;  // llmc's kernels take 64, too

// Row i of a matrix.
__device__ __forceinline__ const bf16 *row_of(const bf16 *x, int i, int ld) {
    return x + (size_t)i * (size_t)ld;
}
__device__ __forceinline__ bf16 *row_of(bf16 *x, int i, int ld) {
    return x + (size_t)i * (size_t)ld;
}

// ---------------------------------------------------------------------------------------------
// Forward v1: a thread a query. What anyone would write: three loops over the keys, for the scores
// and the largest of them, for the sum of exponentials, for the output.
//
// The lanes of a warp have 32 queries, so their q[d] lie in 32 different rows, and so do their
// s[..]: such a load takes 32 sectors of 32 bytes, of which 2 or 4 bytes are wanted, and 32 clocks.
// And there are 3.2 GB of scores, half of them used, which the third loop reads 128 times.

static __global__ void forward_v1_kernel(Attention a, float *scores /* (H, n, W + 1) */) {
    int t = (int)(blockIdx.x * blockDim.x + threadIdx.x), head = t / a.n, i = t % a.n;
    if (head >= a.H) return;
    at_head(a, head);
    int first = first_key(a, i);
    const bf16 *q = row_of(a.q, i, a.ld);
    float *s = scores + (size_t)t * (size_t)(a.W + 1), largest = -INFINITY, sum = 0;

    for (int j = first; j <= i; j++) {
        const bf16 *k = row_of(a.k, j, a.ld);
        float dot = 0;
        for (int d = 0; d < D; d++) dot += to_float(q[d]) * to_float(k[d]);
        s[j - first] = a.scale * dot;
        largest = fmaxf(largest, a.scale * dot);
    }
    for (int j = first; j <= i; j++) {
        s[j - first] = __expf(s[j - first] - largest);
        sum += s[j - first];
    }
    for (int d = 0; d < D; d++) {
        float out = 0;
        for (int j = first; j <= i; j++) out += s[j - first] * to_float(row_of(a.v, j, a.ld)[d]);
        row_of(a.o, i, a.ldo)[d] = from_float<bf16>(out / sum);
    }
    a.lse[i] = largest + logf(sum);
}

static void forward_v1(const Attention &a, float *scores) {
    forward_v1_kernel<<<(unsigned)ceil_div(a.H * a.n, 256), 256>>>(a, scores);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// Forward v2: a warp a query. The 32 lanes share a row: each holds 4 of its 128 columns,
//
//     column  0 1 2 3 | 4 5 6 7 | ..  | 124 .. 127        8 bytes a lane, 256 side by side: the
//     lane       0    |    1    | ..  |     31            fewest sectors there can be
//
// and the output of a query is 4 registers of each lane, gathered in one loop over the keys instead
// of 128. Scores lie side by side, too. What is new: a dot product is spread over the warp, and to
// sum it up takes 5 rounds in which lanes add what others hold (warp_sum, llmc/cuda_common.cuh). A
// key costs about 40 instructions of the warp, 8 of which are multiply-adds that are wanted.

__device__ __forceinline__ float4 lane_columns(const bf16 *row) {
    uint2 piece = reinterpret_cast<const uint2 *>(row)[threadIdx.x % WARP];
    float2 low = __bfloat1622float2(reinterpret_cast<__nv_bfloat162 &>(piece.x));
    float2 high = __bfloat1622float2(reinterpret_cast<__nv_bfloat162 &>(piece.y));
    return make_float4(low.x, low.y, high.x, high.y);
}

__device__ __forceinline__ void store_lane_columns(bf16 *row, float4 x, float factor) {
    __nv_bfloat162 *to = reinterpret_cast<__nv_bfloat162 *>(row) + threadIdx.x % WARP * 2;
    to[0] = __floats2bfloat162_rn(factor * x.x, factor * x.y);
    to[1] = __floats2bfloat162_rn(factor * x.z, factor * x.w);
}

// x . y of whole rows, in every lane.
__device__ __forceinline__ float warp_dot(float4 x, float4 y) {
    return warp_sum(x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w);
}

// y += f x
__device__ __forceinline__ void add_scaled(float4 &y, float f, float4 x) {
    y.x += f * x.x, y.y += f * x.y, y.z += f * x.z, y.w += f * x.w;
}

constexpr int BLOCK_WARPS = 8;

// Which row of which head, counted through, is this warp's.
__device__ __forceinline__ int warp_row(void) {
    return (int)(blockIdx.x * BLOCK_WARPS + threadIdx.x / WARP);
}

static __global__ void forward_v2_kernel(Attention a, float *scores /* (H, n, W + 1) */) {
    int t = warp_row(), head = t / a.n, i = t % a.n, lane = (int)(threadIdx.x % WARP);
    if (head >= a.H) return;
    at_head(a, head);
    int first = first_key(a, i);
    float4 q = lane_columns(row_of(a.q, i, a.ld)), out = {0, 0, 0, 0};
    float *s = scores + (size_t)t * (size_t)(a.W + 1), largest = -INFINITY, sum = 0;

    for (int j = first; j <= i; j++) {
        float score = a.scale * warp_dot(q, lane_columns(row_of(a.k, j, a.ld)));
        if (lane == 0) s[j - first] = score;
        largest = fmaxf(largest, score);
    }
    __syncwarp();  // the others see what lane 0 wrote
    for (int j = first + lane; j <= i; j += WARP) {
        s[j - first] = __expf(s[j - first] - largest);
        sum += s[j - first];
    }
    __syncwarp();
    sum = warp_sum(sum);
    for (int j = first; j <= i; j++)
        add_scaled(out, s[j - first], lane_columns(row_of(a.v, j, a.ld)));
    store_lane_columns(row_of(a.o, i, a.ldo), out, 1 / sum);
    if (lane == 0) a.lse[i] = largest + logf(sum);
}

static void forward_v2(const Attention &a, float *scores) {
    forward_v2_kernel<<<(unsigned)ceil_div(a.H * a.n, BLOCK_WARPS), BLOCK_WARPS * WARP>>>(a,
                                                                                          scores);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// Forward v3: online softmax. One loop; a score is used when it is there, and forgotten. What stood
// in the way: p needs the largest score of all, which is known at the end. But any m will do as
// long as all p have the same, since it cancels in out / sum. So m is the largest so far; where a
// larger score comes, all that was summed is multiplied by exp(m_old - m_new), as if the new m had
// been there from the start:
//
//     scores   3   1   5   2             m      3    3    5    5
//     sum      exp(3-3) + exp(1-3), then times exp(3-5), then + exp(5-5) + exp(2-5)
//
// Of 2048 keys in random order only about 8 score higher than all before, so the branch is seldom
// taken; and all lanes take it together. The 3.2 GB are gone, and with them what limited T. The
// time is 8% longer: it was never spent on them, but on warp_sum and on loads from L1, and now each
// score waits for the one before. But each key is needed once, keys may come in portions of any
// size, and that is what all further rungs live on.

static __global__ void forward_v3_kernel(Attention a) {
    int t = warp_row(), head = t / a.n, i = t % a.n, lane = (int)(threadIdx.x % WARP);
    if (head >= a.H) return;
    at_head(a, head);
    float4 q = lane_columns(row_of(a.q, i, a.ld)), out = {0, 0, 0, 0};
    float largest = -INFINITY, sum = 0;

    for (int j = first_key(a, i); j <= i; j++) {
        float score = a.scale * warp_dot(q, lane_columns(row_of(a.k, j, a.ld)));
        if (score > largest) {
            float factor = __expf(largest - score);  // the first time 0: exp(-infinity)
            largest = score, sum *= factor;
            out.x *= factor, out.y *= factor, out.z *= factor, out.w *= factor;
        }
        float p = __expf(score - largest);
        sum += p;
        add_scaled(out, p, lane_columns(row_of(a.v, j, a.ld)));
    }
    store_lane_columns(row_of(a.o, i, a.ldo), out, 1 / sum);
    if (lane == 0) a.lse[i] = largest + logf(sum);
}

static void launch_warp_rows(void (*kernel)(Attention), const Attention &a) {
    kernel<<<(unsigned)ceil_div(a.H * a.n, BLOCK_WARPS), BLOCK_WARPS * WARP>>>(a);
    CUDA_LAUNCHED();
}
static void forward_v3(const Attention &a, float *) { launch_warp_rows(forward_v3_kernel, a); }

// ---------------------------------------------------------------------------------------------
// Forward v4: tiles. v3 reads a row of k from L1 for one dot product: 256 bytes for 256 FLOPs. Here
// a block holds 64 queries and brings 64 keys at a time to shared memory, for all 64 x 64 pairs. A
// thread of 256 takes 4 queries and 4 keys: of 4 columns of these it reads 8 x 16 bytes, for 64
// multiply-adds, and no sum crosses threads. p goes to shared memory, since for p v a thread has
// the same 4 queries, but 8 columns of v, and needs the p of all 64 keys:
//
//               keys: tx, tx + 16, ..                 columns: 4 tx .. + 3, 64 + 4 tx .. + 3
//     4 ty   +-------------------------+    4 ty   +-----------------------------------+
//     ..     | s: 4 x 4 of thread      |    ..     | out: 4 x 8 of thread (ty, tx),    |
//     4 ty+3 | (ty, tx): k^T from q's  |    4 ty+3 | += 64 p x 64 rows of v            |
//            +-------------------------+           +-----------------------------------+
//
// Rows are 4 numbers longer than they need be. With 128, the same 16 bytes of all rows would lie in
// the same four banks, and lanes that want them would be served one row at a time; so 8 at a time.
// A block walks from the tile of its own 64 tokens down to the first key that its first query sees:
// a query has seen itself in the first tile, and m is finite from then on. Tiles in which none of
// the block sees anything are never visited. What lies after row n - 1 is read as zeros, not
// written.

constexpr int TILE = 64;       // queries of a block, keys of a tile
typedef float LongRow[D + 4];  // in shared memory
constexpr int V4_THREADS = 256, V4_SHARED = 3 * TILE * (int)sizeof(LongRow);

// Rows first .. first + 63 of x to shared memory, by all threads, 8 numbers each at a time.
__device__ __forceinline__ void load_tile_fp32(LongRow *tile, const bf16 *x, int first, int n,
                                               int ld) {
    for (int at = (int)threadIdx.x * 8; at < TILE * D; at += V4_THREADS * 8) {
        int row = at / D, d = at % D;
        float eight[8] = {};
        if (first + row < n) vec_load(eight, row_of(x, first + row, ld) + d);
        vec_store(tile[row] + d, eight);
    }
}

__device__ __forceinline__ float4 four(const float *x) { return *(const float4 *)x; }

// s = a b^T: the thread's 4 rows of a, and its 4 of b.
__device__ __forceinline__ void multiply_4x4(float (&s)[4][4], const LongRow *a, const LongRow *b) {
    int ty = (int)threadIdx.x / 16, tx = (int)threadIdx.x % 16;
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < 4; c++) s[r][c] = 0;
#pragma unroll 2
    for (int d = 0; d < D; d += 4) {
        float4 y[4];
#pragma unroll
        for (int c = 0; c < 4; c++) y[c] = four(b[tx + 16 * c] + d);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float4 x = four(a[4 * ty + r] + d);
#pragma unroll
            for (int c = 0; c < 4; c++)
                s[r][c] += x.x * y[c].x + x.y * y[c].y + x.z * y[c].z + x.w * y[c].w;
        }
    }
}

// out += p x: the thread's 4 rows of p (64, 64), which passes through shared memory, and its 8
// columns of x.
__device__ __forceinline__ void add_4x8(float (&out)[4][8], const float (&mine)[4][4], LongRow *p,
                                        const LongRow *x) {
    int ty = (int)threadIdx.x / 16, tx = (int)threadIdx.x % 16;
    __syncwarp();  // a row of p is the matter of one warp: that is done with what was there
#pragma unroll
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < 4; c++) p[4 * ty + r][tx + 16 * c] = mine[r][c];
    __syncwarp();
#pragma unroll 4
    for (int j = 0; j < TILE; j++) {
        float4 left = four(x[j] + 4 * tx), right = four(x[j] + 64 + 4 * tx);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float f = p[4 * ty + r][j];
            out[r][0] += f * left.x, out[r][1] += f * left.y;
            out[r][2] += f * left.z, out[r][3] += f * left.w;
            out[r][4] += f * right.x, out[r][5] += f * right.y;
            out[r][6] += f * right.z, out[r][7] += f * right.w;
        }
    }
}

// Writes out, times factor, to rows first + 4 ty .. of y.
__device__ __forceinline__ void store_4x8(bf16 *y, const float (&out)[4][8],
                                          const float (&factor)[4], int first, int n, int ld) {
    int ty = (int)threadIdx.x / 16, tx = (int)threadIdx.x % 16;
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int e = 0; e < 8; e++)
            if (first + 4 * ty + r < n)
                row_of(y, first + 4 * ty + r, ld)[e / 4 * 64 + 4 * tx + e % 4] =
                    from_float<bf16>(factor[r] * out[r][e]);
}

static __global__ void __launch_bounds__(V4_THREADS, 2) forward_v4_kernel(Attention a) {
    extern __shared__ __align__(16) unsigned char memory[];
    LongRow *q = (LongRow *)memory, *k = q + TILE, *v = k + TILE, *p = k;  // p takes k's place
    int q0 = (int)blockIdx.y * TILE, ty = (int)threadIdx.x / 16, tx = (int)threadIdx.x % 16;
    at_head(a, (int)blockIdx.x);
    int first[4];
    float largest[4], sum[4] = {}, out[4][8] = {};
    for (int r = 0; r < 4; r++)
        first[r] = first_key(a, min(q0 + 4 * ty + r, a.n - 1)), largest[r] = -INFINITY;
    load_tile_fp32(q, a.q, q0, a.n, a.ld);

    for (int k0 = q0; k0 + TILE > first_key(a, q0); k0 -= TILE) {
        __syncthreads();  // all are done with the tile before
        load_tile_fp32(k, a.k, k0, a.n, a.ld);
        load_tile_fp32(v, a.v, k0, a.n, a.ld);
        __syncthreads();  // the tile is there

        float s[4][4];
        multiply_4x4(s, q, k);
        // v3's step, for 64 keys together. The 16 threads of a query are lanes of one warp.
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float top = largest[r];
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int j = k0 + tx + 16 * c;
                s[r][c] = first[r] <= j && j <= q0 + 4 * ty + r ? a.scale * s[r][c] : -INFINITY;
                top = fmaxf(top, s[r][c]);
            }
            for (int d = 8; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, d));
            float factor = __expf(largest[r] - top);
            largest[r] = top, sum[r] *= factor;
#pragma unroll
            for (int e = 0; e < 8; e++) out[r][e] *= factor;
#pragma unroll
            for (int c = 0; c < 4; c++) s[r][c] = __expf(s[r][c] - top), sum[r] += s[r][c];
        }
        __syncthreads();  // all are done with k
        add_4x8(out, s, p, v);
    }
    float factor[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
        int i = q0 + 4 * ty + r;
        for (int d = 8; d > 0; d /= 2) sum[r] += __shfl_xor_sync(FULL_WARP, sum[r], d);
        if (tx == 0 && i < a.n) a.lse[i] = largest[r] + logf(sum[r]);
        factor[r] = 1 / sum[r];
    }
    store_4x8(a.o, out, factor, q0, a.n, a.ldo);
}

// A block for each 64 rows of each head.
static void launch_tiles(void (*kernel)(Attention), int threads, int shared, const Attention &a) {
    CUDA_CHECK(cudaFuncSetAttribute((const void *)kernel,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    kernel<<<dim3((unsigned)a.H, (unsigned)ceil_div(a.n, TILE)), (unsigned)threads,
             (size_t)shared>>>(a);
    CUDA_LAUNCHED();
}
static void forward_v4(const Attention &a, float *) {
    launch_tiles(forward_v4_kernel, V4_THREADS, V4_SHARED, a);
}

// ---------------------------------------------------------------------------------------------
// Forward v5: tensor cores. FP32 units end at 67 TFLOP/s. A warp's mma multiplies (16, 16) by (16,
// 8), BF16, and adds to FP32: 64 multiply-adds of the warp in one. Its 32 lanes hold a part of each
// matrix, as the opening comment of llmc/ptx.cuh draws; read that now. ldmatrix brings them there
// from shared memory. A block is 4 warps of 16 queries each; of its warp's s (16, 64) and out (16,
// 128) the lane 4 g + t holds
//
//     x[c][0], x[c][1]    row g,      columns 8 c + 2 t, 8 c + 2 t + 1       c < 8: s
//     x[c][2], x[c][3]    row g + 8,  the same                               c < 16: out
//
// Rounded to BF16, two neighbouring c of s are a left operand as they lie: p never goes to shared
// memory. k, v, q are there in BF16, in rows 16 bytes longer than they need be, for v4's reason:
// ldmatrix reads 16 bytes each of 8 rows at once, and 8 x 16 bytes are all 32 banks.
//
// exp(scale (s - m)) = 2^(scale2 s - scale2 m), scale2 = scale log2 e: a multiply-add and the one
// instruction that the GPU has for it.

typedef bf16 Row[D + 8];  // in shared memory
constexpr int MMA_THREADS = 128, V5_SHARED = 3 * TILE * (int)sizeof(Row);

// Rows first .. first + ROWS - 1 of x to shared memory, by all threads.
template <int ROWS>
__device__ __forceinline__ void load_tile(Row *tile, const bf16 *x, int first, int n, int ld) {
#pragma unroll
    for (int r = 0; r < ROWS; r += MMA_THREADS / 16) {
        int row = r + (int)threadIdx.x / 16, d = (int)threadIdx.x % 16 * 8;
        uint4 eight = {0, 0, 0, 0};
        if (first + row < n) eight = *(const uint4 *)(row_of(x, first + row, ld) + d);
        *(uint4 *)(tile[row] + d) = eight;
    }
}

// x (16, N) = a b^T: 16 rows of a, N rows of b.
template <int N>
__device__ __forceinline__ void product_of_rows(float (&x)[N / 8][4], const Row *a, const Row *b) {
    int lane = (int)(threadIdx.x % WARP);
#pragma unroll
    for (int i = 0; i < N / 2; i++) x[i / 4][i % 4] = 0;
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        unsigned left[4], right[4];
        ldmatrix(left, shared_address(&a[lane % 16][d + lane / 16 * 8]));
#pragma unroll
        for (int j = 0; j < N; j += 16) {  // 16 rows of b are two right operands' 8 columns
            ldmatrix(right, shared_address(&b[j + lane / 16 * 8 + lane % 8][d + lane / 8 % 2 * 8]));
            mma(x[j / 8], left, right[0], right[1]);
            mma(x[j / 8 + 1], left, right[2], right[3]);
        }
    }
}

__device__ __forceinline__ unsigned rounded(float low, float high) {
    __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<unsigned &>(two);
}

// y (16, D) += x b: x (16, N), rounded to BF16, and N rows of b.
template <int N>
__device__ __forceinline__ void add_product(float (&y)[D / 8][4], const float (&x)[N / 8][4],
                                            const Row *b) {
    int lane = (int)(threadIdx.x % WARP);
#pragma unroll
    for (int j = 0; j < N; j += 16) {
        const float *l = x[j / 8], *r = x[j / 8 + 1];
        unsigned left[4] = {rounded(l[0], l[1]), rounded(l[2], l[3]), rounded(r[0], r[1]),
                            rounded(r[2], r[3])};
#pragma unroll
        for (int d = 0; d < D; d += 16) {
            unsigned right[4];
            ldmatrix_trans(right, shared_address(&b[j + lane % 16][d + lane / 16 * 8]));
            mma(y[d / 8], left, right[0], right[1]);
            mma(y[d / 8 + 1], left, right[2], right[3]);
        }
    }
}

// x = -infinity where query (row) i does not see key (column). first: of the lane's queries.
template <int N>
__device__ __forceinline__ void hide_keys(float (&x)[N / 8][4], const int (&first)[2], int i,
                                          int k0) {
#pragma unroll
    for (int e = 0; e < N / 2; e++) {
        int j = k0 + e / 4 * 8 + (int)threadIdx.x % 4 * 2 + e % 2, half = e / 2 % 2;
        if (j < first[half] || j > i + 8 * half) x[e / 4][e % 4] = -INFINITY;
    }
}

// v3's step for a tile of keys: s becomes p. A row belongs to 4 neighbouring lanes.
__device__ __forceinline__ void online_softmax(float (&s)[TILE / 8][4], float (&largest)[2],
                                               float (&sum)[2], float (&out)[D / 8][4],
                                               float scale2) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = largest[half];
#pragma unroll
        for (int c = 0; c < TILE / 8; c++)
            top = fmaxf(top, fmaxf(s[c][2 * half], s[c][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
        top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
        float factor = exp2_fast(scale2 * (largest[half] - top));
        largest[half] = top, sum[half] *= factor;
#pragma unroll
        for (int c = 0; c < D / 8; c++) out[c][2 * half] *= factor, out[c][2 * half + 1] *= factor;
#pragma unroll
        for (int c = 0; c < TILE / 8; c++)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) {
                s[c][e] = exp2_fast(scale2 * s[c][e] - scale2 * top);
                sum[half] += s[c][e];
            }
    }
}

// Writes a warp's x (16, D), times factor, to rows i (the lane's first) and i + 8 of y.
__device__ __forceinline__ void store_tile(bf16 *y, const float (&x)[D / 8][4],
                                           const float (&factor)[2], int i, int n, int ld) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int c = 0; c < D / 8; c++)
            if (i + 8 * half < n)
                *(unsigned *)(row_of(y, i + 8 * half, ld) + 8 * c + threadIdx.x % 4 * 2) =
                    rounded(factor[half] * x[c][2 * half], factor[half] * x[c][2 * half + 1]);
}

// The end of forward: sums of the 4 lanes of a row, lse, o.
__device__ __forceinline__ void store_forward(const Attention &a, const float (&out)[D / 8][4],
                                              const float (&largest)[2], const float (&sum)[2],
                                              int i) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float all = sum[half] + __shfl_xor_sync(FULL_WARP, sum[half], 1);
        all += __shfl_xor_sync(FULL_WARP, all, 2);
        if (threadIdx.x % 4 == 0 && i + 8 * half < a.n)
            a.lse[i + 8 * half] = a.scale * largest[half] + logf(all);
        factor[half] = 1 / all;
    }
    store_tile(a.o, out, factor, i, a.n, a.ldo);
}

static __global__ void __launch_bounds__(MMA_THREADS, 3) forward_v5_kernel(Attention a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Row *q = (Row *)memory, *k = q + TILE, *v = k + TILE;
    int q0 = (int)blockIdx.y * TILE, w = (int)threadIdx.x / WARP * 16;  // the warp's rows
    int i = q0 + w + (int)threadIdx.x % WARP / 4;                       // the lane's: i, i + 8
    at_head(a, (int)blockIdx.x);
    int first[2] = {first_key(a, min(i, a.n - 1)), first_key(a, min(i + 8, a.n - 1))};
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {}, out[D / 8][4] = {};
    load_tile<TILE>(q, a.q, q0, a.n, a.ld);

    for (int k0 = q0; k0 + TILE > first_key(a, q0); k0 -= TILE) {
        float s[TILE / 8][4];
        __syncthreads();  // all are done with the tile before
        load_tile<TILE>(k, a.k, k0, a.n, a.ld);
        load_tile<TILE>(v, a.v, k0, a.n, a.ld);
        __syncthreads();  // the tile is there
        product_of_rows<TILE>(s, q + w, k);
        hide_keys<TILE>(s, first, i, k0);
        online_softmax(s, largest, sum, out, a.scale2);
        add_product<TILE>(out, s, v);
    }
    store_forward(a, out, largest, sum, i);
}

static void forward_v5(const Attention &a, float *) {
    launch_tiles(forward_v5_kernel, MMA_THREADS, V5_SHARED, a);
}

// ---------------------------------------------------------------------------------------------
// Forward v6: copies run beside products. In v5 all warps of a block wait for a tile, then all
// compute and no copy is under way; only the SM's other blocks fill the gap. cp.async copies to
// shared memory by itself, not by way of registers, and the thread goes on. So each half of a tile
// is sent for one product ahead of its use, to where all have just been done with another; two
// barriers still do:
//
//     copies      k of t   | v of t              | k of t - 1        | v of t - 1
//     products             | s = q k^T, softmax  | out += p v        | s = q k^T, ..
//                          ^ barrier             ^ barrier           ^ barrier

template <int ROWS>
__device__ __forceinline__ void copy_tile(Row *tile, const bf16 *x, int first, int n, int ld) {
#pragma unroll
    for (int r = 0; r < ROWS; r += MMA_THREADS / 16) {
        int row = r + (int)threadIdx.x / 16, d = (int)threadIdx.x % 16 * 8;
        cp_async_16(shared_address(tile[row] + d), row_of(x, first + row, ld) + d, first + row < n);
    }
}

static __global__ void __launch_bounds__(MMA_THREADS, 3) forward_v6_kernel(Attention a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Row *q = (Row *)memory, *k = q + TILE, *v = k + TILE;
    int q0 = (int)blockIdx.y * TILE, w = (int)threadIdx.x / WARP * 16;
    int i = q0 + w + (int)threadIdx.x % WARP / 4;
    at_head(a, (int)blockIdx.x);
    int first[2] = {first_key(a, min(i, a.n - 1)), first_key(a, min(i + 8, a.n - 1))};
    int last = first_key(a, q0);
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {}, out[D / 8][4] = {};
    copy_tile<TILE>(q, a.q, q0, a.n, a.ld);
    copy_tile<TILE>(k, a.k, q0, a.n, a.ld);

    for (int k0 = q0; k0 + TILE > last; k0 -= TILE) {
        float s[TILE / 8][4];
        cp_async_wait();
        __syncthreads();  // k is there, and all are done with v
        copy_tile<TILE>(v, a.v, k0, a.n, a.ld);
        product_of_rows<TILE>(s, q + w, k);
        hide_keys<TILE>(s, first, i, k0);
        online_softmax(s, largest, sum, out, a.scale2);
        cp_async_wait();
        __syncthreads();  // v is there, and all are done with k
        if (k0 > last) copy_tile<TILE>(k, a.k, k0 - TILE, a.n, a.ld);
        add_product<TILE>(out, s, v);
    }
    store_forward(a, out, largest, sum, i);
}

static void forward_v6(const Attention &a, float *) {
    launch_tiles(forward_v6_kernel, MMA_THREADS, V5_SHARED, a);
}

// ---------------------------------------------------------------------------------------------
// Forward llmc: llmc/attention.cuh. What it has beyond v6:
//
// - A warp owns 32 rows: what ldmatrix brings of k and v serves two mma, not one. In v6 shared
//   memory has more to do than the tensor cores.
// - There is room for two tiles of k and v, so that one barrier a tile is enough.
// - Rows are 256 bytes, without a gap; their pieces of 16 bytes lie at piece ^ row % 8 instead.
// - A warp steps over tiles that its queries do not see, and masks only those they see in part.
// - out is rescaled only when the largest score has grown 2^8-fold.
// - The blocks with the most keys start first, so that none is left alone at the end.
//
// Forward sm90: llmc/attention_sm90.cuh. What it has beyond that, all of which came with Hopper:
//
// - The TMA: one thread sends for a whole tile; a barrier in shared memory counts its bytes.
// - wgmma: four warps together multiply (64, 16) by (16, 128), right from shared memory, and go on
//   meanwhile: exponentials of one tile are taken while the next tile's product runs.
// - Roles: one warpgroup only copies, two only compute, and most registers go to these.
// - Blocks stay, and take one piece of work after the other.

static void forward_llmc(const Attention &a, float *) { portable::attention_run_forward(a, 0); }
#ifdef HOPPER
static void forward_sm90(const Attention &a, float *) { hopper::attention_run_forward(a, 0); }
#endif

// scores: (H, n, W + 1), scratch of the first two rungs.
typedef void Forward(const Attention &a, float *scores);

static const Rung<Forward> FORWARD[] = {
    {"v1", "a thread a query, scores in memory", forward_v1},
    {"v2", "a warp a query: lanes read side by side", forward_v2},
    {"v3", "online softmax: no scores in memory", forward_v3},
    {"v4", "tiles in shared memory, read by all", forward_v4},
    {"v5", "tensor cores", forward_v5},
    {"v6", "copies run beside products", forward_v6},
    {"llmc", "llmc/attention.cuh: 32 rows a warp", forward_llmc},
#ifdef HOPPER
    {"sm90", "llmc/attention_sm90.cuh: TMA, wgmma", forward_sm90},
#endif
};

// ---------------------------------------------------------------------------------------------
// Problems, checks and times.

// B rows of T tokens; a window of W = T is none.
typedef struct {
    int B, T, H, W, docs;
} Shape;

static const Shape SHAPES[] = {
    {1, 7, 8, 7, DOCS_ONE},    {2, 65, 1, 65, DOCS_ONE},   {1, 150, 2, 40, DOCS_MIX},
    {3, 64, 1, 64, DOCS_MIX},  {1, 129, 2, 0, DOCS_ONE},   {5, 33, 1, 17, DOCS_TOKENS},
    {2, 192, 3, 64, DOCS_MIX}, {1, 500, 2, 500, DOCS_ONE}, {1, 500, 2, 100, DOCS_MIX},
};
enum { SMALL_SHAPES = 3 };  // for the sanitizers

// A shape with its numbers, packed as the trainer packs them, and what the CPU computes.
typedef struct {
    Attention a;
    int n, C;
    int *in_row;         // (n), where a token's document begins in its row
    GpuArray<bf16> qkv;  // (n, 3C)
    float *o, *lse;      // the CPU's, (n, C) and (n, H)
    float *lse_by_head;  // (H, n)
    char name[100];
} Problem;

static Problem problem_of(Shape s) {
    Problem p = {};
    p.n = s.B * s.T, p.C = s.H * D;
    size_t n = (size_t)p.n, C = (size_t)p.C, H = (size_t)s.H;
    int *doc_start = gpu_expected<int>(n);
    p.in_row = gpu_expected<int>(n);
    test_documents(p.in_row, doc_start, s.docs, s.B, s.T);
    p.qkv = gpu_normal<bf16>("qkv", n * 3 * C, 1);
    p.o = gpu_expected(n * C), p.lse = gpu_expected(n * H), p.lse_by_head = gpu_expected(n * H);
    cpu::attention_forward(p.o, p.lse, p.qkv.host, p.in_row, s.W, s.B, s.T, s.H, D);
    for (size_t i = 0; i < n * H; i++) p.lse_by_head[i % H * n + i / H] = p.lse[i];
    const bf16 *q = p.qkv.device;
    p.a = attention_of(q, q + C, q + 2 * C, gpu_ints("doc_start", doc_start, n), p.n, s.H, D, s.W,
                       p.C, 3 * p.C);
    snprintf(p.name, sizeof p.name, "B %d, T %d, H %d, W %d, documents %d", s.B, s.T, s.H, s.W,
             s.docs);
    return p;
}

static void check_forward(Rung<Forward> rung) {
    for (const Shape &s : SHAPES) {
        if (grid_small && &s - SHAPES >= SMALL_SHAPES) break;
        Problem p = problem_of(s);
        size_t rows = (size_t)p.n * (size_t)s.H;
        GpuArray<bf16> o = gpu_poisoned<bf16>("o", (size_t)p.n * (size_t)p.C);
        GpuArray<float> lse = gpu_poisoned<float>("lse", rows);
        float *sizes = gpu_expected(rows);
        for (size_t i = 0; i < rows; i++) sizes[i] = 1 + fabsf(p.lse_by_head[i]);
        p.a.o = o.device, p.a.lse = lse.device;
        rung.run(p.a, ladder_empty<float>(rows * (size_t)(p.a.W + 1)));
        gpu_compare(o, p.o, p.n, p.C, "%s, %s", rung.name, p.name);
        lse.tolerance = 1e-4;  // exponentials are the fast unit's
        gpu_compare_sums(lse, p.lse_by_head, sizes, (int)rows, p.name);
        gpu_end_case();
    }
}

// The full shape: rows of T, each a document. *pairs: of query and key that see each other.
static Attention full_problem(double *pairs) {
    const int B = 32, T = 2048, H = 6, C = H * D, n = B * T;
    size_t nC = (size_t)n * (size_t)C;
    int *doc_start = gpu_expected<int>((size_t)n);
    for (int i = 0; i < n; i++) doc_start[i] = i / T * T;
    const bf16 *q = ladder_normal<bf16>(3 * nC, 1);
    Attention a = attention_of(q, q + C, q + 2 * C, gpu_ints("doc_start", doc_start, (size_t)n), n,
                               H, D, T, C, 3 * C);
    a.o = ladder_empty<bf16>(nC), a.lse = ladder_empty<float>((size_t)n * H);
    *pairs = 0.5 * n * (T + 1) * H;
    return a;
}
static const char FULL_SHAPE[] = "B 32, T 2048, H 6, D 128, causal";

static void time_forward(void) {
    double pairs;
    Attention a = full_problem(&pairs);
    float *scores = ladder_empty<float>((size_t)a.H * (size_t)a.n * (size_t)(a.W + 1));
    ladder_time(FORWARD, FULL_SHAPE, ladder_flops(2 * 2 * D * pairs, LADDER_ATTENTION),
                [=](Rung<Forward> rung) { rung.run(a, scores); });
    gpu_end_case();
}

int main(int argc, char **argv) {
    ladder_begin(argc, argv);
    ladder_check(FORWARD, check_forward);
    if (ladder_timed()) time_forward();
    return test_end();
}
