// attention.cuh: attention_call.cuh's attention, flash forward and backward, on BF16 tensor cores
// (mma.sync: sm_80 and up). For the BF16 build; attention_sm90.cuh takes its place where all is for
// Hopper, attention_fp32.cuh is the plain one. D is 64 or 128, ld and ldo are multiples of 8.
//
// FLASH ATTENTION (Dao et al. 2022). A block of threads holds a tile of queries and walks over the
// keys a tile at a time; a tile of s lives in registers, only as long as it is needed. But p needs
// the row's sum, which is known at the end. So forward keeps for each query the largest s so far,
// m, and sums exp(s - m) and exp(s - m) v. Where a later tile holds a larger s, what was summed is
// multiplied by exp(m_old - m_new), and all is as if the new m had been there from the start. At
// the end o = sum / row sum, lse = m + log(row sum). Backward has lse, and makes each tile of p
// again from q and k: D multiplications an element cost less than its way to memory and back.
//
// dq sums over keys, dk and dv over queries, so backward is two kernels: one holds queries, the
// other keys, and walks over the rest. That is 7 products where 5 would do, but each sum stays in
// the registers of one warp and has a fixed order: no atomics, the same bits each time.
//
// TILES. Of all (query, key) tiles only those are visited in which some query sees some key:
//
//       keys ->          A block of queries q0 .. q1 visits the key tiles of first_q0 .. q1, one of
//     q #                keys k0 .. k1 the query tiles of k0 .. the last query that sees k1. As
//     u o #              first_i never falls, all between two visible tiles is visible.
//     e # o #                o  every query sees every key
//     r . # o #              #  some do not: masked element by element
//     i . . # o #            .  not visited
//     e . . . # o #      A warp judges by its own 32 rows, and steps over what these do not see.
//
// A WARP owns 32 rows of the result, all D wide: 2 mma rows of 16, D / 8 mma columns. x[m][c][e] of
// lane 4 g + t, e = 0 .. 3, is what ptx.cuh draws:
//
//     row 16 m + 8 (e / 2) + g,  column 8 c + 2 t + e % 2         its r-th row of 4 is 8 r + g
//
// For each tile comes a product of rows with rows, (32, D) (N, D)^T, both from shared memory; its
// result, made into p or ds in place, is the left operand of the next, (32, N) (N, D), 16 columns
// at a time, so that exponentials of the next 16 are taken while the tensor cores are at work.
//
// SHARED MEMORY. For ldmatrix 8 lanes read 16 bytes each, of 8 rows at the same column: all in the
// same banks, since rows are 2 D bytes long. So the 16-byte chunk c of row r lies at c ^ (r % 8):
//
//     row 0   0 1 2 3 4 5 6 7         chunks 0 are the diagonal 0, 1, 2 .. of places: they come
//     row 1   1 0 3 2 5 4 7 6  ..     from all 32 banks at once, as does each column of chunks
#ifndef LLMC_ATTENTION_CUH
#define LLMC_ATTENTION_CUH

#include "llmc/attention_call.cuh"  // Attention, at_head, first_key, last_query
#include "llmc/ptx.cuh"             // ldmatrix, ldmatrix_trans, mma, cp_async_16, exp2_fast
#include "llmc/vec.cuh"             // vec_load, pack

static_assert(sizeof(floatX) == sizeof(bf16), "the FP32 build has attention_fp32.cuh");

#define ATTENTION_NAME "mma.sync"
constexpr bool ATTENTION_ROTATES = false;

constexpr int ATTENTION_THREADS = 128;
constexpr int WARP_ROWS = 32;  // of the result, per warp
// Rows that a block of each kernel holds, and rows of a tile that it walks over:
constexpr int FORWARD_QUERIES = 128, FORWARD_KEYS = 64;
constexpr int DQ_QUERIES = 128, DQ_KEYS = 32;
constexpr int DKV_KEYS = 64, DKV_QUERIES = 32;

// ---------------------------------------------------------------------------------------------
// Tiles in shared memory. A tile is bf16[rows * D], at a multiple of 256 bytes.

// Starts the copy of rows first .. first + ROWS - 1 of x to a tile, by all threads of the block.
// Rows from n on become zeros.
template <int D, int ROWS>
__device__ __forceinline__ void tile_load(bf16 *tile,
                                          const bf16 *x,  // (n) rows of D, ld apart
                                          int first, int n, int ld) {
    constexpr int CHUNKS = D / 8, STEP = ATTENTION_THREADS / CHUNKS;
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "a thread keeps its place in the swizzle");
    int chunk = (int)(threadIdx.x % CHUNKS), row = (int)(threadIdx.x / CHUNKS);
    unsigned to = shared_address(tile + row * D + 8 * (chunk ^ (row % 8)));
    const bf16 *from = x + ((size_t)(unsigned)(first + row) * (unsigned)ld + (unsigned)(8 * chunk));
#pragma unroll
    for (int r = 0; r < ROWS; r += STEP)
        cp_async_16(to + (unsigned)(2 * r * D), from + (size_t)r * (unsigned)ld,
                    first + row + r < n);
}

// Where this lane reads, for ldmatrix, of the 16 x 16 block in the corner of a tile. The block 16
// columns further right is at this ^ 32, that 16 rows further down at + 16 rows. (The tile's own
// address takes no part in bits 4 to 7.) The order of the block's four 8 x 8 matrices:
//     down first:   0 2    r0 .. r3 are A's. Transposed: {r0, r1} is B's of the left 8 columns,
//                   1 3    {r2, r3} of the right ones.
//     across first: 0 1    The rows are B's columns: {r0, r1} is B's of the upper 8 rows,
//                   2 3    {r2, r3} of the lower ones.
template <int D> __device__ __forceinline__ unsigned lane_down(const bf16 *tile) {
    int lane = lane_id(), row = lane % 16, chunk = lane / 16;
    return shared_address(tile + row * D + 8 * (chunk ^ (row % 8)));
}
template <int D> __device__ __forceinline__ unsigned lane_across(const bf16 *tile) {
    int lane = lane_id(), row = lane % 8 + lane / 16 * 8, chunk = lane / 8 % 2;
    return shared_address(tile + row * D + 8 * (chunk ^ (row % 8)));
}

// x = 0
template <int N> __device__ __forceinline__ void clear_rows(float (&x)[2][N / 8][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) x[i % 2][i / 8][i / 2 % 4] = 0;
}

// x = a b^T: a (32, D), of lane_down, and b (N, D), of lane_across, in shared memory.
template <int D, int N>
__device__ __forceinline__ void multiply_rows(float (&x)[2][N / 8][4], unsigned a, unsigned b) {
    clear_rows<N>(x);
#pragma unroll
    for (unsigned d = 0; d < D / 16; d++) {
        unsigned left[2][4], right[4];
        ldmatrix(left[0], a ^ (d << 5));
        ldmatrix(left[1], (a ^ (d << 5)) + 32 * D);
#pragma unroll
        for (unsigned c = 0; c < N / 16; c++) {
            ldmatrix(right, (b ^ (d << 5)) + c * 32 * D);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                mma(x[m][2 * c], left[m], right[0], right[1]);
                mma(x[m][2 * c + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// y += p b: p (32, 16) in registers, b (16, D), rows 16 k .. of a tile, of lane_down.
template <int D>
__device__ __forceinline__ void multiply_add(float (&y)[2][D / 8][4], const unsigned (&p)[2][4],
                                             unsigned b, int k) {
#pragma unroll
    for (unsigned c = 0; c < D / 16; c++) {
        unsigned right[4];
        ldmatrix_trans(right, (b ^ (c << 5)) + (unsigned)(k * 32 * D));
#pragma unroll
        for (int m = 0; m < 2; m++) {
            mma(y[m][2 * c], p[m], right[0], right[1]);
            mma(y[m][2 * c + 1], p[m], right[2], right[3]);
        }
    }
}

// Columns 16 k .. of a product as the left operand of the next: rounded to BF16 (ptx.cuh).
template <int N>
__device__ __forceinline__ void pack_columns(unsigned (&p)[2][4], const float (&x)[2][N][4],
                                             int k) {
#pragma unroll
    for (int r = 0; r < 8; r++) {
        const float *two = x[r / 4][2 * k + r / 2 % 2] + r % 2 * 2;
        p[r / 4][r % 4] = pack(two[0], two[1]);
    }
}

// Writes a warp's 32 rows x, times factor, to rows first .. of y, as far as n. They pass through 32
// rows of a tile that only this warp still uses, to leave in pieces of 16 bytes.
template <int D>
__device__ __forceinline__ void store_rows(bf16 *y,  // (n) rows of D, ld apart
                                           const float (&x)[2][D / 8][4], const float (&factor)[4],
                                           bf16 *tile, int first, int n, int ld) {
    constexpr int CHUNKS = D / 8;
    int lane = lane_id(), g = lane / 4, t = lane % 4;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const float *two = x[r / 2][c] + r % 2 * 2;
            bf16 *at = tile + (8 * r + g) * D + 8 * (c ^ g) + 2 * t;
            *reinterpret_cast<unsigned *>(at) = pack(factor[r] * two[0], factor[r] * two[1]);
        }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < WARP_ROWS; r += WARP / CHUNKS) {
        int row = r + lane / CHUNKS, chunk = lane % CHUNKS;
        if (first + row < n)
            *reinterpret_cast<uint4 *>(y + (size_t)(first + row) * (unsigned)ld + 8 * chunk) =
                *reinterpret_cast<uint4 *>(tile + row * D + 8 * (chunk ^ (row % 8)));
    }
}

// ---------------------------------------------------------------------------------------------
// Forward.

// What a warp sees of a tile.
typedef enum { SEES_NOTHING, SEES_SOME, SEES_ALL } Sight;

// Of keys k0 .. k0 + KEYS - 1 by queries w0 .. w0 + 31, whose first keys are first[0 .. 31].
template <int KEYS>
__device__ __forceinline__ Sight sight_of_keys(const int *first, int w0, int k0) {
    if (k0 >= w0 + WARP_ROWS || k0 + KEYS <= first[0]) return SEES_NOTHING;
    return k0 + KEYS - 1 <= w0 && k0 >= first[WARP_ROWS - 1] ? SEES_ALL : SEES_SOME;
}

// s = -infinity where query (row) w0 + .. does not see key (column) k0 + ..
template <int KEYS>
__device__ __forceinline__ void mask_keys(float (&s)[2][KEYS / 8][4], const int *first, int w0,
                                          int k0) {
    int g = lane_id() / 4, k = k0 + lane_id() % 4 * 2;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        int row = 8 * r + g, low = first[row] - k, high = w0 + row - k;
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) {
            int column = i / 2 * 8 + i % 2;
            if (column < low || column > high) s[r / 2][i / 2][r % 2 * 2 + i % 2] = -INFINITY;
        }
    }
}

// Lets `largest` follow the rows' maxima up to s, and scales sum and out with it. Any number near
// the true maximum will do, as it cancels in out / sum: largest follows only when exp of it grows
// more than 2^8-fold; in most tiles out, which is twice as large as s, is left alone.
template <int D, int KEYS>
__device__ __forceinline__ void follow_maximum(float (&largest)[4], float (&sum)[4],
                                               float (&out)[2][D / 8][4],
                                               const float (&s)[2][KEYS / 8][4], float scale2) {
    float now[4];
    bool grown = false;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        now[r] = largest[r];
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++)
            now[r] = fmaxf(now[r], s[r / 2][i / 2][r % 2 * 2 + i % 2]);
        now[r] = fmaxf(now[r], __shfl_xor_sync(FULL_WARP, now[r], 1));
        now[r] = fmaxf(now[r], __shfl_xor_sync(FULL_WARP, now[r], 2));
        grown |= scale2 * (now[r] - largest[r]) > 8;
    }
    if (!__any_sync(FULL_WARP, grown)) return;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        float factor = exp2_fast(scale2 * (largest[r] - now[r]));
        largest[r] = now[r], sum[r] *= factor;
#pragma unroll
        for (int i = 0; i < D / 4; i++) out[r / 2][i / 2][r % 2 * 2 + i % 2] *= factor;
    }
}

// A tile of keys, for the kernels that hold queries. While one is used, the next lands.
template <int D, int KEYS> struct KeyStage { bf16 k[KEYS * D], v[KEYS * D]; };
template <int D, int KEYS>
__device__ __forceinline__ void key_stage_load(KeyStage<D, KEYS> &stage, const Attention &a,
                                               int k0) {
    tile_load<D, KEYS>(stage.k, a.k, k0, a.n, a.ld);
    tile_load<D, KEYS>(stage.v, a.v, k0, a.n, a.ld);
}

// A block that holds queries, and its walk over the key tiles they see.
typedef struct {
    int q0, w;         // the block's first query; where in the block this warp's begin
    int t1, t0;        // from the tile of the block's last query down to that of its first key
    const int *first;  // first_key of this warp's queries
} Walk;

// Starts the copy of tile t1.
template <int QUERIES, int D, int KEYS>
__device__ __forceinline__ Walk walk_begin(Attention &a, int *first /* (QUERIES) */,
                                           KeyStage<D, KEYS> *stage) {
    static_assert(QUERIES == ATTENTION_THREADS, "each thread fills in first of a query");
    int q0 = (int)(gridDim.y - 1 - blockIdx.y) * QUERIES, w = warp_id() * WARP_ROWS;
    int t0 = first_key(a, q0) / KEYS, t1 = (min(q0 + QUERIES, a.n) - 1) / KEYS;
    at_head(a, (int)blockIdx.x);
    key_stage_load(stage[t1 & 1], a, t1 * KEYS);
    first[threadIdx.x] = first_key(a, min(q0 + (int)threadIdx.x, a.n - 1));
    return {q0, w, t1, t0, first + w};
}

// Waits for tile t and starts the copy of t - 1. Returns what this warp sees of t.
template <int D, int KEYS>
__device__ __forceinline__ Sight walk_to(const Attention &a, const Walk &walk,
                                         KeyStage<D, KEYS> *stage, int t) {
    cp_async_wait();
    __syncthreads();  // tile t has landed, and nobody reads t + 1 any more
    if (t > walk.t0) key_stage_load(stage[(t - 1) & 1], a, (t - 1) * KEYS);
    return sight_of_keys<KEYS>(walk.first, walk.q0 + walk.w, t * KEYS);
}

template <int D> struct ForwardShared {
    bf16 q[FORWARD_QUERIES * D];
    KeyStage<D, FORWARD_KEYS> stage[2];
    int first[FORWARD_QUERIES];  // first_key of each query
};

// A block: 128 queries of a head, 32 a warp. From their last key tile to their first: a query meets
// itself in the first tile its warp computes, m is finite from then on. (With D = 64, at 3 blocks a
// processor, ptxas spills one address, which is read once a tile.)
template <int D>
static __global__ void __launch_bounds__(ATTENTION_THREADS, D == 128 ? 2 : 3)
    attention_forward_kernel(Attention a) {
    constexpr int QUERIES = FORWARD_QUERIES, KEYS = FORWARD_KEYS;
    static_assert(KEYS % WARP_ROWS == 0, "a warp's own keys are in one tile");
    extern __shared__ __align__(1024) unsigned char memory[];
    ForwardShared<D> &shared = *reinterpret_cast<ForwardShared<D> *>(memory);

    Walk walk = walk_begin<QUERIES>(a, shared.first, shared.stage);
    int q0 = walk.q0, w = walk.w, lane = lane_id();
    tile_load<D, QUERIES>(shared.q, a.q, q0, a.n, a.ld);

    unsigned q = lane_down<D>(shared.q + w * D);
    float largest[4], sum[4], out[2][D / 8][4];
    clear_rows<D>(out);
#pragma unroll
    for (int r = 0; r < 4; r++) largest[r] = -INFINITY, sum[r] = 0;

    for (int t = walk.t1; t >= walk.t0; t--) {
        const KeyStage<D, KEYS> &stage = shared.stage[t & 1];
        Sight sight = walk_to(a, walk, shared.stage, t);
        if (sight == SEES_NOTHING) continue;
        float s[2][KEYS / 8][4];
        multiply_rows<D, KEYS>(s, q, lane_across<D>(stage.k));
        if (sight == SEES_SOME) mask_keys<KEYS>(s, walk.first, q0 + w, t * KEYS);
        follow_maximum<D, KEYS>(largest, sum, out, s, a.scale2);
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            unsigned p[2][4];
#pragma unroll
            for (int i = 0; i < 16; i++) {
                int r = i / 4;
                float &x = s[r / 2][2 * k + i / 2 % 2][r % 2 * 2 + i % 2];
                x = exp2_fast(a.scale2 * x - a.scale2 * largest[r]);
                sum[r] += x;
            }
            pack_columns(p, s, k);
            multiply_add<D>(out, p, lane_down<D>(stage.v), k);
        }
    }

#pragma unroll
    for (int r = 0; r < 4; r++) {
        sum[r] += __shfl_xor_sync(FULL_WARP, sum[r], 1);
        sum[r] += __shfl_xor_sync(FULL_WARP, sum[r], 2);
        int i = q0 + w + 8 * r + lane / 4;
        if (lane % 4 == 0 && i < a.n) a.lse[i] = a.scale * largest[r] + logf(sum[r]);
        sum[r] = __fdividef(1, sum[r]);
    }
    store_rows<D>(a.o, out, sum, shared.q + w * D, q0 + w, a.n, a.ldo);
}

// ---------------------------------------------------------------------------------------------
// Backward: dq, and delta on the way.

template <int D> struct DqShared {
    bf16 q[DQ_QUERIES * D], dout[DQ_QUERIES * D];
    KeyStage<D, DQ_KEYS> stage[2];
    int first[DQ_QUERIES];
    float delta[DQ_QUERIES];
};

// delta_i = do_i . o_i of queries w0 .. w0 + 31, to `rows` (32) in shared memory and to a.delta.
template <int D>
__device__ __forceinline__ void warp_delta(float *rows, const Attention &a, int w0) {
    constexpr int LANES = D / 8;  // a row's: 8 columns each
    int lane = lane_id();
#pragma unroll 4
    for (int row = lane / LANES; row < WARP_ROWS; row += WARP / LANES) {
        float x[8], y[8], sum = 0;
        bool there = w0 + row < a.n;
        if (there) {
            size_t at = (size_t)(w0 + row) * (unsigned)a.ldo + (unsigned)(lane % LANES * 8);
            vec_load(x, a.dout + at), vec_load(y, a.o + at);
#pragma unroll
            for (int d = 0; d < 8; d++) sum += x[d] * y[d];
        }
#pragma unroll
        for (int d = LANES / 2; d > 0; d /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, d);
        if (lane % LANES == 0) rows[row] = sum;
        if (lane % LANES == 0 && there) a.delta[w0 + row] = sum;
    }
    __syncwarp();
}

// A block: 128 queries of a head, 32 a warp, and forward's walk, over smaller tiles since s and dp
// are in registers together.
template <int D>
static __global__ void __launch_bounds__(ATTENTION_THREADS, D == 128 ? 2 : 3)
    attention_dq_kernel(Attention a) {
    constexpr int QUERIES = DQ_QUERIES, KEYS = DQ_KEYS;
    extern __shared__ __align__(1024) unsigned char memory[];
    DqShared<D> &shared = *reinterpret_cast<DqShared<D> *>(memory);

    Walk walk = walk_begin<QUERIES>(a, shared.first, shared.stage);
    int q0 = walk.q0, w = walk.w, lane = lane_id();
    tile_load<D, QUERIES>(shared.q, a.q, q0, a.n, a.ld);
    tile_load<D, QUERIES>(shared.dout, a.dout, q0, a.n, a.ldo);
    warp_delta<D>(shared.delta + w, a, q0 + w);

    unsigned q = lane_down<D>(shared.q + w * D), dout = lane_down<D>(shared.dout + w * D);
    float lse2[4], delta[4], factor[4], out[2][D / 8][4];
    clear_rows<D>(out);
#pragma unroll
    for (int r = 0; r < 4; r++) {
        int row = w + 8 * r + lane / 4;
        lse2[r] = q0 + row < a.n ? LOG2_E * a.lse[q0 + row] : 0;
        delta[r] = shared.delta[row];
        factor[r] = a.scale;
    }

    for (int t = walk.t1; t >= walk.t0; t--) {
        const KeyStage<D, KEYS> &stage = shared.stage[t & 1];
        Sight sight = walk_to(a, walk, shared.stage, t);
        if (sight == SEES_NOTHING) continue;
        float s[2][KEYS / 8][4], dp[2][KEYS / 8][4];
        multiply_rows<D, KEYS>(s, q, lane_across<D>(stage.k));
        multiply_rows<D, KEYS>(dp, dout, lane_across<D>(stage.v));
        if (sight == SEES_SOME) mask_keys<KEYS>(s, walk.first, q0 + w, t * KEYS);
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            unsigned ds[2][4];
#pragma unroll
            for (int i = 0; i < 16; i++) {
                int r = i / 4, c = 2 * k + i / 2 % 2, e = r % 2 * 2 + i % 2;
                float p = exp2_fast(a.scale2 * s[r / 2][c][e] - lse2[r]);
                s[r / 2][c][e] = p * (dp[r / 2][c][e] - delta[r]);
            }
            pack_columns(ds, s, k);
            multiply_add<D>(out, ds, lane_down<D>(stage.k), k);
        }
    }
    store_rows<D>(a.dq, out, factor, shared.q + w * D, q0 + w, a.n, a.ld);
}

// ---------------------------------------------------------------------------------------------
// Backward: dk and dv.

constexpr int DKV_STAGES = 3, DKV_PAIRS = DKV_KEYS / WARP_ROWS;  // pairs: warps of the same keys

// A tile of queries, as the kernel that holds keys walks over them.
template <int D> struct QueryStage {
    bf16 q[DKV_QUERIES * D], dout[DKV_QUERIES * D];
    float lse[DKV_QUERIES], delta[DKV_QUERIES];
    int start[DKV_QUERIES];   // doc_start
    int unused[DKV_QUERIES];  // up to a multiple of 256 bytes
};
template <int D>
__device__ __forceinline__ void query_stage_load(QueryStage<D> &stage, const Attention &a, int i0) {
    static_assert(DKV_QUERIES == WARP, "each of lse, delta and start is copied by a warp");
    tile_load<D, DKV_QUERIES>(stage.q, a.q, i0, a.n, a.ld);
    tile_load<D, DKV_QUERIES>(stage.dout, a.dout, i0, a.n, a.ldo);
    int w = warp_id(), i = i0 + lane_id();
    const float *from = w == 0 ? a.lse : w == 1 ? a.delta : (const float *)a.doc_start;
    if (w < 3) cp_async_4(shared_address(stage.lse + threadIdx.x), from + i, i < a.n);
}

template <int D> struct DkvShared {
    bf16 kv[2][DKV_KEYS * D];                               // k, v
    uint4 passed[2][DKV_PAIRS][DKV_QUERIES / 16][2][WARP];  // p of two tiles, from warp to warp
    QueryStage<D> stage[DKV_STAGES];
};

// What queries i0 .. i0 + 31, whose documents begin at start[..], see of the warp's keys w0 ..
// w0 + 31. Queries from n on see nothing.
__device__ __forceinline__ Sight sight_by_queries(const int *start, int i0, int w0, int n, int W) {
    int i1 = i0 + DKV_QUERIES - 1;
    if (i1 < w0 || max(start[0], i0 - W) >= w0 + WARP_ROWS) return SEES_NOTHING;
    if (i0 < w0 + WARP_ROWS - 1 || i1 >= n) return SEES_SOME;
    return max(start[DKV_QUERIES - 1], i1 - W) <= w0 ? SEES_ALL : SEES_SOME;
}

// s = -infinity where query (column) i0 + .. does not see key (row) w0 + ..
__device__ __forceinline__ void mask_queries(float (&s)[2][DKV_QUERIES / 8][4], const int *start,
                                             int i0, int w0, int n, int W) {
    int k = w0 + lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int c = 0; c < DKV_QUERIES / 4; c++) {
        int column = c / 2 * 8 + 2 * t + c % 2, i = i0 + column;
        int low = max(start[column], i - W) - k, high = (i < n ? i : -1) - k;
#pragma unroll
        for (int r = 0; r < 4; r++)
            if (8 * r < low || 8 * r > high) s[r / 2][c / 2][r % 2 * 2 + c % 2] = -INFINITY;
    }
}

// Columns 16 k .. of s become p = exp(s - lse) = 2^(scale2 s - lse log2 e). Queries are columns.
__device__ __forceinline__ void p_from_s(float (&s)[2][DKV_QUERIES / 8][4], const float *lse,
                                         float scale2, int k) {
#pragma unroll
    for (int c = 2 * k; c < 2 * k + 2; c++) {
        float2 two = *reinterpret_cast<const float2 *>(lse + 8 * c + lane_id() % 4 * 2);
        float lse2[2] = {LOG2_E * two.x, LOG2_E * two.y};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float &x = s[i / 4][c][i % 4];
            x = exp2_fast(scale2 * x - lse2[i % 2]);
        }
    }
}

// Columns 16 k .. of dp become ds = p (dp - delta), p packed.
__device__ __forceinline__ void ds_from_dp(float (&dp)[2][DKV_QUERIES / 8][4],
                                           const unsigned (&p)[2][4], const float *delta, int k) {
#pragma unroll
    for (int c = 2 * k; c < 2 * k + 2; c++) {
        float2 two = *reinterpret_cast<const float2 *>(delta + 8 * c + lane_id() % 4 * 2);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float *x = dp[i / 2][c] + i % 2 * 2;
            unsigned both = p[i / 2][(c - 2 * k) * 2 + i % 2];
            x[0] = __uint_as_float(both << 16) * (x[0] - two.x);
            x[1] = __uint_as_float(both & 0xffff0000u) * (x[1] - two.y);
        }
    }
}

// dv of the warp's keys, += what the queries of a tile give; p is passed on. rows: of k, lane_down.
template <int D>
__device__ __forceinline__ void visit_first(float (&out)[2][D / 8][4], unsigned rows,
                                            const QueryStage<D> &stage, uint4 *passed,
                                            const Attention &a, Sight sight, int i0, int w0) {
    float s[2][DKV_QUERIES / 8][4];
    multiply_rows<D, DKV_QUERIES>(s, rows, lane_across<D>(stage.q));
    if (sight == SEES_SOME) mask_queries(s, stage.start, i0, w0, a.n, a.W);
#pragma unroll
    for (int k = 0; k < DKV_QUERIES / 16; k++) {
        unsigned p[2][4];
        p_from_s(s, stage.lse, a.scale2, k);
        pack_columns(p, s, k);
        passed[2 * k * WARP] = reinterpret_cast<uint4 &>(p[0]);
        passed[(2 * k + 1) * WARP] = reinterpret_cast<uint4 &>(p[1]);
        multiply_add<D>(out, p, lane_down<D>(stage.dout), k);
    }
}

// dk of the warp's keys, += what the queries of a tile give. rows: of v, lane_down.
template <int D>
__device__ __forceinline__ void visit_second(float (&out)[2][D / 8][4], unsigned rows,
                                             const QueryStage<D> &stage, const uint4 *passed) {
    float dp[2][DKV_QUERIES / 8][4];
    multiply_rows<D, DKV_QUERIES>(dp, rows, lane_across<D>(stage.dout));
#pragma unroll
    for (int k = 0; k < DKV_QUERIES / 16; k++) {
        unsigned p[2][4];
        reinterpret_cast<uint4 &>(p[0]) = passed[2 * k * WARP];
        reinterpret_cast<uint4 &>(p[1]) = passed[(2 * k + 1) * WARP];
        ds_from_dp(dp, p, stage.delta, k);
        pack_columns(p, dp, k);
        multiply_add<D>(out, p, lane_down<D>(stage.q), k);
    }
}

// A block: 64 keys of a head, visited by tiles of 32 queries. The rows are keys here: s and dp are
// the transposed ones. 32 rows of dk and of dv do not fit into the registers of a warp, but into
// those of two, which share the work evenly:
//
//     first warp     s = k q^T      p = exp(s - lse)     dv += p do
//                                       | p, through shared memory
//     second warp    dp = v do^T    ds = p (dp - delta)  dk += ds q
//
// Each tile from shared memory serves 32 rows so, not 16, and it is shared memory that limits. The
// second warp works one tile behind the first: p is there when it comes, and one barrier a tile is
// all that is needed. Three stages: for the tile that lands, the first warps', the second warps'.
template <int D>
static __global__ void __launch_bounds__(ATTENTION_THREADS, D == 128 ? 2 : 3)
    attention_dkv_kernel(Attention a) {
    constexpr int KEYS = DKV_KEYS, QUERIES = DKV_QUERIES;
    extern __shared__ __align__(1024) unsigned char memory[];
    DkvShared<D> &shared = *reinterpret_cast<DkvShared<D> *>(memory);

    int k0 = (int)blockIdx.y * KEYS, lane = lane_id();
    int pair = warp_id() % DKV_PAIRS, second = warp_id() / DKV_PAIRS;
    int w0 = k0 + pair * WARP_ROWS, t0 = k0 / QUERIES;
    at_head(a, (int)blockIdx.x);
    tile_load<D, KEYS>(shared.kv[0], a.k, k0, a.n, a.ld);
    tile_load<D, KEYS>(shared.kv[1], a.v, k0, a.n, a.ld);
    query_stage_load(shared.stage[(unsigned)t0 % DKV_STAGES], a, t0 * QUERIES);
    int t1 = last_query(a, min(k0 + KEYS, a.n) - 1) / QUERIES;

    bf16 *own = shared.kv[second] + pair * WARP_ROWS * D;
    unsigned rows = lane_down<D>(own);
    float out[2][D / 8][4];
    clear_rows<D>(out);
    for (int t = t0; t <= t1 + 1; t++) {
        cp_async_wait();
        __syncthreads();  // tile t has landed, p of t - 1 is there, and nobody reads t - 2 any more
        if (t < t1)
            query_stage_load(shared.stage[(unsigned)(t + 1) % DKV_STAGES], a, (t + 1) * QUERIES);
        int mine = t - second, i0 = mine * QUERIES;
        if (mine < t0 || mine > t1) continue;
        const QueryStage<D> &stage = shared.stage[(unsigned)mine % DKV_STAGES];
        Sight sight = sight_by_queries(stage.start, i0, w0, a.n, a.W);
        uint4 *passed = &shared.passed[mine & 1][pair][0][0][lane];
        if (sight == SEES_NOTHING) continue;
        if (second)
            visit_second<D>(out, rows, stage, passed);
        else
            visit_first<D>(out, rows, stage, passed, a, sight, i0, w0);
    }
    float f = second ? a.scale : 1, factor[4] = {f, f, f, f};
    store_rows<D>(second ? a.dk : a.dv, out, factor, own, w0, a.n, a.ld);
}

// ---------------------------------------------------------------------------------------------
// Launchers.

// A block for each tile of `rows` rows and each head, the heads of a tile together, since so the
// blocks that run at one time share their tiles' neighbourhood in L2. Kernels take the tiles that
// have much to visit first: of a row's queries the last, of its keys the first.
static inline void attention_launch(void (*kernel)(Attention), size_t shared, int rows,
                                    const Attention &a, cudaStream_t stream) {
    CUDA_CHECK(cudaFuncSetAttribute((const void *)kernel,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    kernel<<<dim3((unsigned)a.H, (unsigned)ceil_div(a.n, rows)), ATTENTION_THREADS, shared,
             stream>>>(a);
    CUDA_LAUNCHED();
}

inline void attention_run_forward(const Attention &a, cudaStream_t s) {
    assert(a.D == 64 || a.D == 128);
    if (a.D == 128)
        attention_launch(attention_forward_kernel<128>, sizeof(ForwardShared<128>), FORWARD_QUERIES,
                         a, s);
    else
        attention_launch(attention_forward_kernel<64>, sizeof(ForwardShared<64>), FORWARD_QUERIES,
                         a, s);
}

template <int D> static inline void attention_launch_backward(const Attention &a, cudaStream_t s) {
    attention_launch(attention_dq_kernel<D>, sizeof(DqShared<D>), DQ_QUERIES, a, s);
    attention_launch(attention_dkv_kernel<D>, sizeof(DkvShared<D>), DKV_KEYS, a, s);
}

inline void attention_run_backward(const Attention &a, cudaStream_t s) {
    assert(!a.rotary.r);
    assert(a.D == 64 || a.D == 128);
    if (a.D == 128)
        attention_launch_backward<128>(a, s);
    else
        attention_launch_backward<64>(a, s);
}

#endif
