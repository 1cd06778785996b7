// attention_backward.cu: the ladder of attention, backward, from a thread a row to
// llmc/attention.cuh and llmc/attention_sm90.cuh. The ladder of forward, dev/cuda/attention.cu,
// comes first: it tells what a GPU is, and this one stands on its functions and its problems.
//
//     p_ij = exp(scale q_i . k_j - lse_i),    ds_ij = p_ij (do_i . v_j - delta_i),
//     dq_i = scale sum_j ds_ij k_j,           delta_i = do_i . o_i,
//     dk_j = scale sum_i ds_ij q_i,           dv_j = sum_i p_ij do_i
//
// do is the gradient of o; o and lse are what forward left. Query i sees the keys first_i .. i, so
// key j is seen by the queries from j on, up to the last whose first_i is no later than j. p and ds
// would be 6.4 GB at the full shape: no rung stores them. With lse a p is one exponential, no sum
// need be known before: all that forward's ladder did for the softmax is done already.
//
// TWO PASSES. dq_i is a sum over keys, dk_j and dv_j are sums over queries. Who takes a query has
// dq_i for himself, but would have to add to the dk_j and dv_j of all its keys, as all others do:
// by atomics, in an order that is another in each run, and so are the last bits. So every rung goes
// over the pairs twice. One pass takes queries and sums dq, the other takes keys and sums dk and
// dv; both make p and ds again. That is 7 products of 128 multiply-adds a pair,
//
//     queries   s = q k^T     dp = do v^T      dq += ds k
//     keys      s^T = k q^T   dp^T = v do^T    dv += p^T do     dk += ds^T q
//
// where 5 are needed; the table counts 5, 1280 FLOPs, whatever a rung does. No atomics, the same
// bits each time.
//
// THE LADDER on an H200: 32 rows of T = 2048, H = 6, no window; 5.16e11 FLOPs. The ceiling is what
// cuDNN reaches where it may add in any order. `make ladder OP=attention_backward` prints this
// table.
//
//     rung  what it changes, and why that is faster                     us  TFLOP/s of 413 times v1
//     v1    nothing yet: a thread a row                          2,283,624      0.2   0.1%      1.0
//     v2    a warp a row: lanes read side by side                   85,514      6.0     2%       27
//     v3    delta first: two dot products a pair, not three         78,062      6.6     2%       29
//     v4    tiles in shared memory, read by all                     25,622       20     5%       89
//     v5    tensor cores                                             3,418      151    36%      668
//     v6    copies run beside products                               2,996      172    42%      762
//     llmc  llmc/attention.cuh: 32 rows a warp                       2,234      231    56%    1,022
//     sm90  llmc/attention_sm90.cuh: TMA, wgmma                      1,192      432   105%    1,915
#define main attention_forward_main
#include "dev/cuda/attention.cu"  // row_of, warp_dot, product_of_rows, .., Problem, full_problem
#undef main
#include "dev/test/gpu/test_qkv.cuh"  // compare_gradient

// ---------------------------------------------------------------------------------------------
// v1: a thread a row, of queries in one kernel, of keys in the other. As in forward, the lanes of a
// warp have rows of their own and read far apart. New is that a thread's sums are as long as a row:
// 128 numbers of dq, or 256 of dk and dv, where a thread has 255 registers at the most. What does
// not fit goes to memory and back; and of threads that take so many there is room for one block of
// 256 on an SM, which has little else to do while it waits.

__device__ __forceinline__ float dot_of(const bf16 *x, const bf16 *y) {
    float sum = 0;
    for (int d = 0; d < D; d++) sum += to_float(x[d]) * to_float(y[d]);
    return sum;
}

static __global__ void backward_v1_dq_kernel(Attention a) {
    int t = (int)(blockIdx.x * blockDim.x + threadIdx.x), head = t / a.n, i = t % a.n;
    if (head >= a.H) return;
    at_head(a, head);
    const bf16 *q = row_of(a.q, i, a.ld), *dout = row_of(a.dout, i, a.ldo);
    float delta = dot_of(dout, row_of(a.o, i, a.ldo)), dq[D] = {};
    for (int j = first_key(a, i); j <= i; j++) {
        const bf16 *k = row_of(a.k, j, a.ld);
        float p = __expf(a.scale * dot_of(q, k) - a.lse[i]);
        float ds = p * (dot_of(dout, row_of(a.v, j, a.ld)) - delta);
        for (int d = 0; d < D; d++) dq[d] += ds * to_float(k[d]);
    }
    for (int d = 0; d < D; d++) row_of(a.dq, i, a.ld)[d] = from_float<bf16>(a.scale * dq[d]);
}

static __global__ void backward_v1_dkv_kernel(Attention a) {
    int t = (int)(blockIdx.x * blockDim.x + threadIdx.x), head = t / a.n, j = t % a.n;
    if (head >= a.H) return;
    at_head(a, head);
    const bf16 *k = row_of(a.k, j, a.ld), *v = row_of(a.v, j, a.ld);
    float dk[D] = {}, dv[D] = {};
    for (int i = j; i < a.n && first_key(a, i) <= j; i++) {
        const bf16 *q = row_of(a.q, i, a.ld), *dout = row_of(a.dout, i, a.ldo);
        float p = __expf(a.scale * dot_of(q, k) - a.lse[i]);
        float ds = p * (dot_of(dout, v) - dot_of(dout, row_of(a.o, i, a.ldo)));
        for (int d = 0; d < D; d++) {
            dk[d] += ds * to_float(q[d]);
            dv[d] += p * to_float(dout[d]);
        }
    }
    for (int d = 0; d < D; d++) {
        row_of(a.dk, j, a.ld)[d] = from_float<bf16>(a.scale * dk[d]);
        row_of(a.dv, j, a.ld)[d] = from_float<bf16>(dv[d]);
    }
}

static void backward_v1(const Attention &a) {
    for (auto kernel : {backward_v1_dq_kernel, backward_v1_dkv_kernel}) {
        kernel<<<(unsigned)ceil_div(a.H * a.n, 256), 256>>>(a);
        CUDA_LAUNCHED();
    }
}

// ---------------------------------------------------------------------------------------------
// v2: a warp a row, 4 columns a lane, as in forward's v2: a row is read side by side, and its sums
// are 4 registers of each lane. The price is warp_sum, 5 rounds for each dot product; the keys'
// pass has three of them a pair, s, dp and delta.
//
// v3: delta first. delta_i is the same for all keys that query i sees, but v2's pass over keys
// makes it anew for each, up to 2048 times. A kernel of its own makes it once, 4 bytes a query. Two
// dot products are left of three, and o is not read again.

template <bool DELTA_FIRST>
__device__ __forceinline__ float delta_of(const Attention &a, int i, float4 dout) {
    return DELTA_FIRST ? a.delta[i] : warp_dot(dout, lane_columns(row_of(a.o, i, a.ldo)));
}

static __global__ void delta_kernel(Attention a) {
    int t = warp_row(), head = t / a.n, i = t % a.n;
    if (head >= a.H) return;
    at_head(a, head);
    float delta = delta_of<false>(a, i, lane_columns(row_of(a.dout, i, a.ldo)));
    if (threadIdx.x % WARP == 0) a.delta[i] = delta;
}

template <bool DELTA_FIRST> static __global__ void backward_v2_dq_kernel(Attention a) {
    int t = warp_row(), head = t / a.n, i = t % a.n;
    if (head >= a.H) return;
    at_head(a, head);
    float4 q = lane_columns(row_of(a.q, i, a.ld)), dout = lane_columns(row_of(a.dout, i, a.ldo));
    float4 dq = {0, 0, 0, 0};
    float delta = delta_of<DELTA_FIRST>(a, i, dout), lse = a.lse[i];
    for (int j = first_key(a, i); j <= i; j++) {
        float4 k = lane_columns(row_of(a.k, j, a.ld)), v = lane_columns(row_of(a.v, j, a.ld));
        float p = __expf(a.scale * warp_dot(q, k) - lse);
        add_scaled(dq, p * (warp_dot(dout, v) - delta), k);
    }
    store_lane_columns(row_of(a.dq, i, a.ld), dq, a.scale);
}

template <bool DELTA_FIRST> static __global__ void backward_v2_dkv_kernel(Attention a) {
    int t = warp_row(), head = t / a.n, j = t % a.n;
    if (head >= a.H) return;
    at_head(a, head);
    float4 k = lane_columns(row_of(a.k, j, a.ld)), v = lane_columns(row_of(a.v, j, a.ld));
    float4 dk = {0, 0, 0, 0}, dv = {0, 0, 0, 0};
    int last = last_query(a, j);
    for (int i = j; i <= last; i++) {
        float4 q = lane_columns(row_of(a.q, i, a.ld));
        float4 dout = lane_columns(row_of(a.dout, i, a.ldo));
        float p = __expf(a.scale * warp_dot(q, k) - a.lse[i]);
        add_scaled(dv, p, dout);
        add_scaled(dk, p * (warp_dot(dout, v) - delta_of<DELTA_FIRST>(a, i, dout)), q);
    }
    store_lane_columns(row_of(a.dk, j, a.ld), dk, a.scale);
    store_lane_columns(row_of(a.dv, j, a.ld), dv, 1);
}

static void backward_v2(const Attention &a) {
    launch_warp_rows(backward_v2_dq_kernel<false>, a);
    launch_warp_rows(backward_v2_dkv_kernel<false>, a);
}

static void backward_v3(const Attention &a) {
    launch_warp_rows(delta_kernel, a);
    launch_warp_rows(backward_v2_dq_kernel<true>, a);
    launch_warp_rows(backward_v2_dkv_kernel<true>, a);
}

// ---------------------------------------------------------------------------------------------
// v4: tiles. v3 reads 512 bytes of L1 for the pairs of one row with one other. Here a block holds
// 64 rows in shared memory, and brings 64 others at a time, for 64 x 64 pairs; what a thread of 256
// does of them is drawn at forward's v4, and no sum crosses threads. Rows that stay and rows that
// come by are queries and keys in one kernel, keys and queries in the other: the thread's 4 x 4 of
// s are then those of s^T.
//
//               in shared memory          walks                    left operands
//     dq        q, do, tiles of k and v   down to the first key    ds, in v's place
//     dk, dv    k, v, tiles of q and do   up to the last query     p, then ds, in a fifth tile
//
// Four tiles in FP32 are 132 KB, five are 165: a block an SM, 8 warps. That each thread has 16
// multiply-adds at a time that do not depend on each other must make up for it.

constexpr int V4_DQ_SHARED = 4 * TILE * (int)sizeof(LongRow);
constexpr int V4_DKV_SHARED = 5 * TILE * (int)sizeof(LongRow);

static __global__ void __launch_bounds__(V4_THREADS, 1) backward_v4_dq_kernel(Attention a) {
    extern __shared__ __align__(16) unsigned char memory[];
    LongRow *q = (LongRow *)memory, *dout = q + TILE, *k = dout + TILE, *v = k + TILE;
    int q0 = (int)blockIdx.y * TILE, ty = (int)threadIdx.x / 16, tx = (int)threadIdx.x % 16;
    at_head(a, (int)blockIdx.x);
    int first[4];
    float lse[4], delta[4], factor[4], dq[4][8] = {};
    for (int r = 0; r < 4; r++) {
        int i = min(q0 + 4 * ty + r, a.n - 1);
        first[r] = first_key(a, i), lse[r] = a.lse[i], delta[r] = a.delta[i], factor[r] = a.scale;
    }
    load_tile_fp32(q, a.q, q0, a.n, a.ld);
    load_tile_fp32(dout, a.dout, q0, a.n, a.ldo);

    for (int k0 = q0; k0 + TILE > first_key(a, q0); k0 -= TILE) {
        __syncthreads();  // all are done with the tile before
        load_tile_fp32(k, a.k, k0, a.n, a.ld);
        load_tile_fp32(v, a.v, k0, a.n, a.ld);
        __syncthreads();  // the tile is there
        float s[4][4], dp[4][4];
        multiply_4x4(s, q, k);
        multiply_4x4(dp, dout, v);
#pragma unroll
        for (int r = 0; r < 4; r++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int j = k0 + tx + 16 * c;
                bool sees = first[r] <= j && j <= q0 + 4 * ty + r;
                float p = sees ? __expf(a.scale * s[r][c] - lse[r]) : 0;
                s[r][c] = p * (dp[r][c] - delta[r]);
            }
        __syncthreads();  // all are done with v
        add_4x8(dq, s, v, k);
    }
    store_4x8(a.dq, dq, factor, q0, a.n, a.ld);
}

static __global__ void __launch_bounds__(V4_THREADS, 1) backward_v4_dkv_kernel(Attention a) {
    extern __shared__ __align__(16) unsigned char memory[];
    LongRow *k = (LongRow *)memory, *v = k + TILE, *q = v + TILE, *dout = q + TILE,
            *p = dout + TILE;
    int k0 = (int)blockIdx.y * TILE, ty = (int)threadIdx.x / 16, tx = (int)threadIdx.x % 16;
    at_head(a, (int)blockIdx.x);
    int last = last_query(a, min(k0 + TILE, a.n) - 1);
    float dk[4][8] = {}, dv[4][8] = {};
    load_tile_fp32(k, a.k, k0, a.n, a.ld);
    load_tile_fp32(v, a.v, k0, a.n, a.ld);

    for (int i0 = k0; i0 <= last; i0 += TILE) {
        __syncthreads();
        load_tile_fp32(q, a.q, i0, a.n, a.ld);
        load_tile_fp32(dout, a.dout, i0, a.n, a.ldo);
        __syncthreads();
        float s[4][4], dp[4][4];
        multiply_4x4(s, k, q);
        multiply_4x4(dp, v, dout);
#pragma unroll
        for (int c = 0; c < 4; c++) {
            int i = i0 + tx + 16 * c, there = min(i, a.n - 1), first = first_key(a, there);
            float lse = a.lse[there], delta = a.delta[there];
#pragma unroll
            for (int r = 0; r < 4; r++) {
                int j = k0 + 4 * ty + r;
                bool sees = first <= j && j <= i && i < a.n;
                s[r][c] = sees ? __expf(a.scale * s[r][c] - lse) : 0;
                dp[r][c] = s[r][c] * (dp[r][c] - delta);
            }
        }
        add_4x8(dv, s, p, dout);
        add_4x8(dk, dp, p, q);
    }
    float scale[4] = {a.scale, a.scale, a.scale, a.scale}, one[4] = {1, 1, 1, 1};
    store_4x8(a.dk, dk, scale, k0, a.n, a.ld);
    store_4x8(a.dv, dv, one, k0, a.n, a.ld);
}

static void backward_v4(const Attention &a) {
    launch_warp_rows(delta_kernel, a);
    launch_tiles(backward_v4_dq_kernel, V4_THREADS, V4_DQ_SHARED, a);
    launch_tiles(backward_v4_dkv_kernel, V4_THREADS, V4_DKV_SHARED, a);
}

// ---------------------------------------------------------------------------------------------
// v5: tensor cores. As in forward's v5 a block is 4 warps of 16 rows each, and what one product
// leaves in registers, rounded to BF16, is the left operand of the next: p and ds never go to
// shared memory. In the pass over keys s^T and dp^T are made, (16 keys, queries), so that this
// holds for p^T do and ds^T q, too; what is a query's, lse, delta and where its document begins,
// then goes by columns, and comes to shared memory with the tile.
//
// A warp's sums are (16, 128), 64 registers of each lane; the keys' warps have two of them. s and
// dp are in registers together. So tiles that come by have 32 rows, which takes 16 registers for
// each; and dq's blocks come three to an SM, the keys' two.

constexpr int WALK = 32;  // rows of a tile that is walked over

typedef struct {
    Row k[WALK], v[WALK];
} KeyTile;

typedef struct {
    Row q[WALK], dout[WALK];
    float lse[WALK], delta[WALK];
    int start[WALK];  // doc_start
} QueryTile;

// STAGES: tiles of the walk for which there is room.
template <int STAGES> struct DqShared {
    Row q[TILE], dout[TILE];
    KeyTile stage[STAGES];
};
template <int STAGES> struct DkvShared {
    Row k[TILE], v[TILE];
    QueryTile stage[STAGES];
};

// What the lane's two queries have: i and i + 8.
typedef struct {
    int i, first[2];
    float lse2[2], delta[2];
} LaneQueries;
__device__ __forceinline__ LaneQueries lane_queries(const Attention &a, int i) {
    LaneQueries x = {i, {}, {}, {}};
    for (int half = 0; half < 2; half++) {
        int there = min(i + 8 * half, a.n - 1);
        x.first[half] = first_key(a, there);
        x.lse2[half] = LOG2_E * a.lse[there], x.delta[half] = a.delta[there];
    }
    return x;
}

// dq (16 queries) += ds k of a tile of keys. q, dout: the warp's rows.
__device__ __forceinline__ void add_keys(float (&dq)[D / 8][4], const Row *q, const Row *dout,
                                         const KeyTile &tile, const LaneQueries &x, int k0,
                                         float scale2) {
    float s[WALK / 8][4], dp[WALK / 8][4];
    product_of_rows<WALK>(s, q, tile.k);
    product_of_rows<WALK>(dp, dout, tile.v);
    hide_keys<WALK>(s, x.first, x.i, k0);
#pragma unroll
    for (int e = 0; e < WALK / 2; e++) {
        int half = e / 2 % 2;
        float p = exp2_fast(scale2 * s[e / 4][e % 4] - x.lse2[half]);
        s[e / 4][e % 4] = p * (dp[e / 4][e % 4] - x.delta[half]);
    }
    add_product<WALK>(dq, s, tile.k);
}

// dv (16 keys) += p^T do, dk += ds^T q of a tile of queries. k, v: the warp's rows; j: the lane's
// first key, its other one is j + 8.
__device__ __forceinline__ void add_queries(float (&dk)[D / 8][4], float (&dv)[D / 8][4],
                                            const Row *k, const Row *v, const QueryTile &tile,
                                            const Attention &a, int i0, int j) {
    float s[WALK / 8][4], dp[WALK / 8][4];
    int pair = (int)threadIdx.x % 4 * 2;
    product_of_rows<WALK>(s, k, tile.q);
#pragma unroll
    for (int e = 0; e < WALK / 2; e++) {
        int column = e / 4 * 8 + pair + e % 2, i = i0 + column, key = j + e / 2 % 2 * 8;
        bool sees = max(tile.start[column], i - a.W) <= key && key <= i && i < a.n;
        float &x = s[e / 4][e % 4];
        x = sees ? exp2_fast(a.scale2 * x - LOG2_E * tile.lse[column]) : 0;
    }
    add_product<WALK>(dv, s, tile.dout);
    product_of_rows<WALK>(dp, v, tile.dout);
#pragma unroll
    for (int e = 0; e < WALK / 2; e++)
        s[e / 4][e % 4] *= dp[e / 4][e % 4] - tile.delta[e / 4 * 8 + pair + e % 2];
    add_product<WALK>(dk, s, tile.q);
}

__device__ __forceinline__ void store_dkv(const Attention &a, const float (&dk)[D / 8][4],
                                          const float (&dv)[D / 8][4], int j) {
    const float scale[2] = {a.scale, a.scale}, one[2] = {1, 1};
    store_tile(a.dk, dk, scale, j, a.n, a.ld);
    store_tile(a.dv, dv, one, j, a.n, a.ld);
}

static __global__ void __launch_bounds__(MMA_THREADS, 3) backward_v5_dq_kernel(Attention a) {
    extern __shared__ __align__(16) unsigned char memory[];
    DqShared<1> &shared = *(DqShared<1> *)memory;
    KeyTile &tile = shared.stage[0];
    int q0 = (int)blockIdx.y * TILE, w = (int)threadIdx.x / WARP * 16;
    at_head(a, (int)blockIdx.x);
    LaneQueries x = lane_queries(a, q0 + w + (int)threadIdx.x % WARP / 4);
    int low = first_key(a, q0);
    float dq[D / 8][4] = {}, factor[2] = {a.scale, a.scale};
    load_tile<TILE>(shared.q, a.q, q0, a.n, a.ld);
    load_tile<TILE>(shared.dout, a.dout, q0, a.n, a.ldo);

    for (int k0 = q0 + TILE - WALK; k0 + WALK > low; k0 -= WALK) {
        __syncthreads();  // all are done with the tile before
        load_tile<WALK>(tile.k, a.k, k0, a.n, a.ld);
        load_tile<WALK>(tile.v, a.v, k0, a.n, a.ld);
        __syncthreads();  // the tile is there
        add_keys(dq, shared.q + w, shared.dout + w, tile, x, k0, a.scale2);
    }
    store_tile(a.dq, dq, factor, x.i, a.n, a.ld);
}

static __global__ void __launch_bounds__(MMA_THREADS, 2) backward_v5_dkv_kernel(Attention a) {
    extern __shared__ __align__(16) unsigned char memory[];
    DkvShared<1> &shared = *(DkvShared<1> *)memory;
    QueryTile &tile = shared.stage[0];
    int k0 = (int)blockIdx.y * TILE, w = (int)threadIdx.x / WARP * 16;
    int j = k0 + w + (int)threadIdx.x % WARP / 4;
    at_head(a, (int)blockIdx.x);
    int last = last_query(a, min(k0 + TILE, a.n) - 1);
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    load_tile<TILE>(shared.k, a.k, k0, a.n, a.ld);
    load_tile<TILE>(shared.v, a.v, k0, a.n, a.ld);

    for (int i0 = k0; i0 <= last; i0 += WALK) {
        __syncthreads();
        load_tile<WALK>(tile.q, a.q, i0, a.n, a.ld);
        load_tile<WALK>(tile.dout, a.dout, i0, a.n, a.ldo);
        if (threadIdx.x < WALK) {
            int i = min(i0 + (int)threadIdx.x, a.n - 1);
            tile.lse[threadIdx.x] = a.lse[i], tile.delta[threadIdx.x] = a.delta[i];
            tile.start[threadIdx.x] = a.doc_start[i];
        }
        __syncthreads();
        add_queries(dk, dv, shared.k + w, shared.v + w, tile, a, i0, j);
    }
    store_dkv(a, dk, dv, j);
}

static void backward_v5(const Attention &a) {
    launch_warp_rows(delta_kernel, a);
    launch_tiles(backward_v5_dq_kernel, MMA_THREADS, sizeof(DqShared<1>), a);
    launch_tiles(backward_v5_dkv_kernel, MMA_THREADS, sizeof(DkvShared<1>), a);
}

// ---------------------------------------------------------------------------------------------
// v6: copies run beside products. v5's warps wait for a tile, then compute, and no copy is under
// way. cp.async copies by itself; with room for two tiles the next one lands while this one is
// used, and one barrier a tile is enough: after it this tile is there, and all are done with the
// one before, whose place the next one takes.

__device__ __forceinline__ void copy_keys(KeyTile &tile, const Attention &a, int k0) {
    copy_tile<WALK>(tile.k, a.k, k0, a.n, a.ld);
    copy_tile<WALK>(tile.v, a.v, k0, a.n, a.ld);
}

__device__ __forceinline__ void copy_queries(QueryTile &tile, const Attention &a, int i0) {
    int r = (int)threadIdx.x, i = i0 + r;
    copy_tile<WALK>(tile.q, a.q, i0, a.n, a.ld);
    copy_tile<WALK>(tile.dout, a.dout, i0, a.n, a.ldo);
    if (r >= WALK) return;
    cp_async_4(shared_address(tile.lse + r), a.lse + i, i < a.n);
    cp_async_4(shared_address(tile.delta + r), a.delta + i, i < a.n);
    cp_async_4(shared_address(tile.start + r), a.doc_start + i, i < a.n);
}

static __global__ void __launch_bounds__(MMA_THREADS, 3) backward_v6_dq_kernel(Attention a) {
    extern __shared__ __align__(16) unsigned char memory[];
    DqShared<2> &shared = *(DqShared<2> *)memory;
    int q0 = (int)blockIdx.y * TILE, w = (int)threadIdx.x / WARP * 16, begin = q0 + TILE - WALK;
    at_head(a, (int)blockIdx.x);
    LaneQueries x = lane_queries(a, q0 + w + (int)threadIdx.x % WARP / 4);
    int low = first_key(a, q0), now = 0;
    float dq[D / 8][4] = {}, factor[2] = {a.scale, a.scale};
    copy_tile<TILE>(shared.q, a.q, q0, a.n, a.ld);
    copy_tile<TILE>(shared.dout, a.dout, q0, a.n, a.ldo);
    copy_keys(shared.stage[0], a, begin);

    for (int k0 = begin; k0 + WALK > low; k0 -= WALK, now ^= 1) {
        cp_async_wait();
        __syncthreads();
        if (k0 > low) copy_keys(shared.stage[now ^ 1], a, k0 - WALK);
        add_keys(dq, shared.q + w, shared.dout + w, shared.stage[now], x, k0, a.scale2);
    }
    store_tile(a.dq, dq, factor, x.i, a.n, a.ld);
}

static __global__ void __launch_bounds__(MMA_THREADS, 2) backward_v6_dkv_kernel(Attention a) {
    extern __shared__ __align__(16) unsigned char memory[];
    DkvShared<2> &shared = *(DkvShared<2> *)memory;
    int k0 = (int)blockIdx.y * TILE, w = (int)threadIdx.x / WARP * 16, now = 0;
    int j = k0 + w + (int)threadIdx.x % WARP / 4;
    at_head(a, (int)blockIdx.x);
    int last = last_query(a, min(k0 + TILE, a.n) - 1);
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    copy_tile<TILE>(shared.k, a.k, k0, a.n, a.ld);
    copy_tile<TILE>(shared.v, a.v, k0, a.n, a.ld);
    copy_queries(shared.stage[0], a, k0);

    for (int i0 = k0; i0 <= last; i0 += WALK, now ^= 1) {
        cp_async_wait();
        __syncthreads();
        if (i0 + WALK <= last) copy_queries(shared.stage[now ^ 1], a, i0 + WALK);
        add_queries(dk, dv, shared.k + w, shared.v + w, shared.stage[now], a, i0, j);
    }
    store_dkv(a, dk, dv, j);
}

static void backward_v6(const Attention &a) {
    launch_warp_rows(delta_kernel, a);
    launch_tiles(backward_v6_dq_kernel, MMA_THREADS, sizeof(DqShared<2>), a);
    launch_tiles(backward_v6_dkv_kernel, MMA_THREADS, sizeof(DkvShared<2>), a);
}

// ---------------------------------------------------------------------------------------------
// llmc: llmc/attention.cuh. What it has beyond v6:
//
// - A warp owns 32 rows: what ldmatrix brings serves two mma. For the keys that is dk and dv of 32
//   rows, more than a warp's registers hold: one warp sums dv, another dk, and p passes from one to
//   the other.
// - delta is made on the way, by the pass over queries, which has do in shared memory.
// - Swizzled rows, tiles stepped over, masks only where they are needed, long walks first: as in
//   forward.
//
// sm90: llmc/attention_sm90.cuh. What it has beyond that is what forward has, too: the TMA, wgmma,
// roles, blocks that stay. And with 240 registers a thread dk and dv of 64 keys, s and dp are all
// in one warpgroup's.

static void backward_llmc(const Attention &a) { portable::attention_run_backward(a, 0); }
#ifdef HOPPER
static void backward_sm90(const Attention &a) { hopper::attention_run_backward(a, 0); }
#endif

typedef void Backward(const Attention &a);

static const Rung<Backward> BACKWARD[] = {
    {"v1", "a thread a row", backward_v1},
    {"v2", "a warp a row: lanes read side by side", backward_v2},
    {"v3", "delta first", backward_v3},
    {"v4", "tiles in shared memory, read by all", backward_v4},
    {"v5", "tensor cores", backward_v5},
    {"v6", "copies run beside products", backward_v6},
    {"llmc", "llmc/attention.cuh: 32 rows a warp", backward_llmc},
#ifdef HOPPER
    {"sm90", "llmc/attention_sm90.cuh: TMA, wgmma", backward_sm90},
#endif
};

// ---------------------------------------------------------------------------------------------
// Checks and times.

static void check_backward(Rung<Backward> rung) {
    for (const Shape &s : SHAPES) {
        if (grid_small && &s - SHAPES >= SMALL_SHAPES) break;
        Problem p = problem_of(s);
        size_t rows = (size_t)p.n * (size_t)s.H, count = (size_t)p.n * (size_t)p.C;
        GpuArray<bf16> o = gpu_copy<bf16>("o", p.o, count),
                       dout = gpu_normal<bf16>("dout", count, 1),
                       dqkv = gpu_poisoned<bf16>("dqkv", 3 * count);
        float *expected = gpu_expected(3 * count);
        cpu::attention_backward(expected, dout.host, o.host, p.lse, p.qkv.host, p.in_row, s.W, s.B,
                                s.T, s.H, D);
        p.a.o = o.device, p.a.lse = gpu_copy<float>("lse", p.lse_by_head, rows).device;
        p.a.dq = dqkv.device, p.a.dk = p.a.dq + p.C, p.a.dv = p.a.dk + p.C, p.a.dout = dout.device;
        p.a.delta = gpu_poisoned<float>("delta", rows).device;
        rung.run(p.a);
        gpu_read(dqkv);
        for (int part = 0; part < 3; part++)
            compare_gradient(dqkv.host, expected, part, p.n, p.C, 3 * p.C, p.name);
        gpu_end_case();
    }
}

static void time_backward(void) {
    double pairs;
    Attention a = full_problem(&pairs);
    size_t count = (size_t)a.n * (size_t)(a.H * D);
    portable::attention_run_forward(a, 0);  // o and lse
    a.dq = ladder_empty<bf16>(3 * count), a.dk = a.dq + a.H * D, a.dv = a.dk + a.H * D;
    a.dout = ladder_normal<bf16>(count, 1), a.delta = ladder_empty<float>((size_t)a.n * a.H);
    ladder_time(BACKWARD, FULL_SHAPE, ladder_flops(5 * 2 * D * pairs, LADDER_ATTENTION_BACKWARD),
                [=](Rung<Backward> rung) { rung.run(a); });
    gpu_end_case();
}

int main(int argc, char **argv) {
    ladder_begin(argc, argv);
    ladder_check(BACKWARD, check_backward);
    if (ladder_timed()) time_backward();
    return test_end();
}
