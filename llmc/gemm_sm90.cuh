// gemm_sm90.cuh: products of BF16 matrices on Hopper that cuBLASLt has not. It knows neither
// ReLU^2, for which a kernel of its own reads and writes (n, 4C) numbers once more, nor that a
// matrix times its transpose is symmetric. These here save that pass, or half of that product: more
// than they lose by multiplying slower. In a step of depth 12 on an H200 cuBLASLt's products of the
// MLP are made at 661 to 687 TFLOP/s, these at 599 forward, 527 backward (docs/measurements.md).
//
//     relu2_forward    y  (n, N) = relu(x W^T)^2            x (n, K), W (N, K)
//     relu2_backward   dz (n, K) = 2 sqrt(y) (dy W)         dy (n, N), y (n, K): relu2.cuh
//     square           d (M, M)  = alpha op(x) op(x)^T + beta c, of each matrix of a batch
//
// Everything is stored row by row, without gaps, at multiples of 16 bytes. Sums are FP32, in one
// order, and rounded once, at the end: the same call gives the same bits. NaN stays NaN. n is any
// number from 1 on; gemm_sm90_fits and _squares tell which other sizes are taken. Nothing here
// allocates or waits after gemm_sm90_init, and all can be captured in a CUDA graph.
//
// All are C (M, columns) = A (M, sum) B^T. What differs is how A and B lie in memory: their rows
// run along the sum, or across it. Tensor cores take either.
//
// A BLOCK of threads stays on its SM and makes tile after tile of C, (128, 256) each. One thread,
// the producer, has the TMA bring steps of 64 of the sum to a ring of 4 stages. Two groups of 4
// warps multiply: each has half of the tile's rows, (64, 256) sums, 128 registers a thread.
//
//                 B: 256 columns                       a stage of the ring:
//               +---------------------+                A (128, 64)    16 KB
//     A: rows   | group 0: 0 .. 63    |                B (256, 64)    32 KB
//               | group 1: 64 .. 127  |                two barriers: full, empty
//               +---------------------+
//
// A tile's way to memory takes as long as a few steps of the sum, in which its group multiplies
// nothing. So the groups take turns: group 1 begins its way out when group 0 has started the last
// copy of its own, and follows it by that much. One multiplies while the other is on its way:
//
//     group 0   multiply  | out | multiply        | out |
//     group 1     multiply      | out | multiply        | out |
//
// but only as far as the ring reaches, for a stage is filled again when both have read it. What a
// way out takes beyond the 4 steps that one group can be ahead, the tensor cores wait: twice a
// tile, which sums of 768, 12 steps, feel more than sums of 3072.
//
// What the product is combined with (y, c) comes as two more steps of the ring, (128, 128) each. A
// group reads them, and rounds, before its turn: stages are not held while it waits for that. But
// two of the 4 steps that it can be ahead are these, then: backward waits more than forward.
//
// THE WAY OUT: registers -> stmatrix -> boxes of (16, 64) in shared memory -> TMA. A warp has two
// and fills one while the TMA reads the other; it hands the turn on before those have been read.
//
// WHAT BINDS THEM, it seems, is L2: a tile brings 48 KB a step, and with what leaves that is 8.3 to
// 8.5 TB/s at every size of ReLU^2's products, forward and backward, on an H200. A shorter way out
// (boxes for a whole tile) was no faster; clusters that share B would bring a third less, but two
// blocks that wait for each other lost more.
//
// SYMMETRIC results are made by blocks of (128, 128): those on the diagonal (D) and below it (x).
// One below is stored twice, as it is and mirrored (m). A tile is two blocks wide; of every other
// one on the diagonal the right block (-) is left out, and A serves as B.
//
//     D - | m m | m m         tiles of 6 x 6 blocks: 12 of 18, three of them halves
//     x D | m m | m m
//     x x | D - | m m
//     x x | x D | m m
//     x x | x x | D -
//     x x | x x | x D
#ifndef LLMC_GEMM_SM90_CUH
#define LLMC_GEMM_SM90_CUH

#include <assert.h>
#include <string.h>

#include "llmc/ptx_sm90.cuh"   // mbarrier_*, tma_*, wgmma_*, stmatrix
#include "llmc/tile_sm90.cuh"  // Ring, ring_*, release, tile_map, BOX, GROUP_ROWS, WARPGROUP

constexpr int GEMM_ROWS = 128, GEMM_COLUMNS = 256;  // of a tile
constexpr int GEMM_BAND = 16;  // tiles one above the other that are made together

constexpr int GEMM_STAGES = 4;  // of the ring; a step is BOX terms of the sum
constexpr int GEMM_GROUPS = 2;  // that multiply; one more copies
constexpr int GEMM_THREADS = (GEMM_GROUPS + 1) * WARPGROUP;
constexpr int GEMM_WARPS = 4, GEMM_WARP_ROWS = 16;  // of a group; of a warp

static_assert(GEMM_ROWS == GEMM_GROUPS * GROUP_ROWS && GEMM_COLUMNS == 256, "wgmma of 64 by 256");
static_assert(GEMM_GROUPS == 2, "turns are passed to and fro");

// What becomes of a product.
typedef enum {
    GEMM_RELU2,
    GEMM_RELU2_BACKWARD,
    GEMM_SQUARE,         // A is B
    GEMM_SQUARE_ACROSS,  // likewise, its rows across the sum
    GEMM_SQUARE_ADD,     // alpha A A^T + beta c
} GemmKind;

template <GemmKind E> constexpr bool gemm_reads = E == GEMM_RELU2_BACKWARD || E == GEMM_SQUARE_ADD;
template <GemmKind E> constexpr bool gemm_symmetric = E >= GEMM_SQUARE;
template <GemmKind E> constexpr bool gemm_a_across = E == GEMM_SQUARE_ACROSS;
template <GemmKind E>
constexpr bool gemm_b_across = E == GEMM_RELU2_BACKWARD || E == GEMM_SQUARE_ACROSS;

// Boxes begin at multiples of 1024 bytes, as shared memory itself does.
typedef struct {
    bf16 a[GEMM_STAGES][GEMM_ROWS][BOX];  // across: boxes (64, 64), one of 64 columns after another
    bf16 b[GEMM_STAGES][GEMM_COLUMNS][BOX];
    bf16 out[GEMM_GROUPS][2][GEMM_WARPS][GEMM_WARP_ROWS][BOX];  // results on their way
    uint64_t full[GEMM_STAGES];   // the producer has announced a stage's bytes, and they have come
    uint64_t empty[GEMM_STAGES];  // every warp that multiplies has read it
    uint64_t turn[GEMM_GROUPS];   // the other group's warps have passed the turn
} GemmShared;

constexpr unsigned GEMM_A_BYTES = GEMM_ROWS * BOX * sizeof(bf16);
constexpr unsigned GEMM_B_BYTES = GEMM_COLUMNS * BOX * sizeof(bf16);
constexpr unsigned GEMM_BOX_BYTES = BOX * BOX * sizeof(bf16);  // of what is across
static_assert(sizeof(GemmShared) <= 227 << 10, "what an SM of sm_90 has for a block");

// A call, as the kernel gets it. The matrices of a batch lie one below the other.
typedef struct {
    CUtensorMap a;         // (M, sum), boxes of (128, 64); across: (sum, M), (64, 64)
    CUtensorMap b;         // (columns, sum), (256, 64); across: (sum, columns), (64, 64)
    CUtensorMap in;        // (M, columns), (128, 64): y of backward, or c
    CUtensorMap out;       // (M, columns), (16, 64)
    CUtensorMap mirror;    // out in boxes of (64, 64)
    int tiles;             // in all
    int tiles_m, tiles_n;  // of a matrix, (128, 256) each
    int side;              // M of a symmetric matrix
    int sum;
    float alpha, beta;
} GemmCall;

// ---------------------------------------------------------------------------------------------
// Walking over tiles.

typedef struct {
    int row, column;
    int matrix;  // of the batch
} GemmTile;

// Tiles are made in bands, down each column of a band: those that are in work at once share rows of
// A and of B, which L2 then has. Of a symmetric matrix: down each column, from the diagonal on.
template <GemmKind E> __device__ __forceinline__ GemmTile gemm_tile(const GemmCall &call, int t) {
    if (gemm_symmetric<E>) {
        int n = 0, of_matrix = call.tiles_n * (call.tiles_m + 1 - call.tiles_n);
        int m = t % of_matrix;
        for (; m >= call.tiles_m - 2 * n; n++) m -= call.tiles_m - 2 * n;
        return {(2 * n + m) * GEMM_ROWS, n * GEMM_COLUMNS, t / of_matrix};
    }
    int in_band = GEMM_BAND * call.tiles_n, top = t / in_band * GEMM_BAND;
    int height = min(GEMM_BAND, call.tiles_m - top);
    int m = top + t % in_band % height, n = t % in_band / height;
    return {m * GEMM_ROWS, n * GEMM_COLUMNS, 0};
}

// Whether of this tile only the left half is needed: it, A times its own transpose.
template <GemmKind E> __device__ __forceinline__ bool gemm_on_diagonal(GemmTile tile) {
    return gemm_symmetric<E> && tile.row == tile.column;
}

// ---------------------------------------------------------------------------------------------
// The producer.

// Numbers k .. of the sum of `rows` rows of a factor, from `first` on; across: they are columns.
template <bool ACROSS>
__device__ __forceinline__ void gemm_load(bf16 (*to)[BOX], const CUtensorMap *map, int first,
                                          int rows, int k, uint64_t *full) {
    if (!ACROSS) tma_load(to, map, first, k, full);
    for (int i = 0; ACROSS && i < rows; i += BOX) tma_load(to + i, map, k, first + i, full);
}

template <GemmKind E>
__device__ __forceinline__ void gemm_produce(GemmShared *s, const GemmCall &call) {
    constexpr bool A_ACROSS = gemm_a_across<E>, B_ACROSS = gemm_b_across<E>;
    Ring at = {0, 0};
    for (int t = blockIdx.x; t < call.tiles; t += gridDim.x) {
        GemmTile tile = gemm_tile<E>(call, t);
        bool diagonal = gemm_on_diagonal<E>(tile);
        int top = tile.matrix * call.side;        // of this matrix in what lies below one another
        int top_across = tile.matrix * call.sum;  // and where rows run across the sum
        for (int k = 0; k < call.sum; k += BOX, ring_next<GEMM_STAGES>(at)) {
            uint64_t *full = &s->full[at.stage];
            mbarrier_wait(&s->empty[at.stage], at.parity ^ 1);
            mbarrier_expect(full, GEMM_A_BYTES + (diagonal ? 0 : GEMM_B_BYTES));
            gemm_load<A_ACROSS>(s->a[at.stage], &call.a, A_ACROSS ? tile.row : top + tile.row,
                                GEMM_ROWS, A_ACROSS ? top_across + k : k, full);
            if (!diagonal)
                gemm_load<B_ACROSS>(s->b[at.stage], &call.b,
                                    B_ACROSS ? tile.column : top + tile.column, GEMM_COLUMNS,
                                    B_ACROSS ? top_across + k : k, full);
        }
        for (int c = 0; gemm_reads<E> && c < 4; c += 2, ring_next<GEMM_STAGES>(at)) {
            uint64_t *full = &s->full[at.stage];
            mbarrier_wait(&s->empty[at.stage], at.parity ^ 1);
            mbarrier_expect(full, 2 * GEMM_A_BYTES);
            for (int i = 0; i < 2; i++)
                tma_load(s->b[at.stage][i * GEMM_ROWS], &call.in, top + tile.row,
                         tile.column + (c + i) * BOX, full);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The groups that multiply.

// What two neighbours of the product become; in: two of y or c.
template <GemmKind E>
__device__ __forceinline__ unsigned gemm_finish(const GemmCall &call, float low, float high,
                                                unsigned in) {
    __nv_bfloat162 x = reinterpret_cast<__nv_bfloat162 &>(in);
    if (E == GEMM_RELU2) low = low <= 0 ? 0 : low * low, high = high <= 0 ? 0 : high * high;
    if (E == GEMM_RELU2_BACKWARD)
        low *= 2 * sqrt_fast(__low2float(x)), high *= 2 * sqrt_fast(__high2float(x));
    if (E == GEMM_SQUARE_ADD) {
        low = call.alpha * low + call.beta * __low2float(x);
        high = call.alpha * high + call.beta * __high2float(x);
    }
    return pack(low, high);
}

// Lane l gives ldmatrix and stmatrix the address of row l % 16, chunk l / 16 of 16 columns, where
// ptx.cuh's D of two times 8 columns lies:
//
//     columns      0 .. 7              8 .. 15             of 64 columns, that is chunk
//     row 0 .. 7   lanes 0 .. 7        lanes 16 .. 23      2 c + l / 16 of row l % 16, for
//     row 8 .. 15  lanes 8 .. 15       lanes 24 .. 31      c = 0 .. 3, at place chunk ^ (l % 8)
//
// so that going on to the next c is an exclusive or of the address with 32 c.
__device__ __forceinline__ unsigned gemm_place(void) {
    int lane = lane_id();
    return lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
}

// The product d of this warp's 16 rows, from row `row` of the tile on, finished and rounded.
template <GemmKind E>
__device__ __forceinline__ void gemm_round(unsigned (&out)[16][4], const float (&d)[128],
                                           GemmShared *s, const GemmCall &call, Ring &at, int row) {
    unsigned in = 0;
#pragma unroll
    for (int c = 0; c < 16; c++) {
        if (gemm_reads<E> && c % 8 == 0) mbarrier_wait(&s->full[at.stage], at.parity);
        if (gemm_reads<E> && c % 4 == 0)
            in = gemm_place() + shared_address(s->b[at.stage][c / 4 % 2 * GEMM_ROWS + row]);
        unsigned x[4] = {};
        if (gemm_reads<E>) ldmatrix(x, in ^ c % 4 * 32);
#pragma unroll
        for (int i = 0; i < 4; i++)
            out[c][i] = gemm_finish<E>(call, d[8 * c + 2 * i], d[8 * c + 2 * i + 1], x[i]);
        if (gemm_reads<E> && c % 8 == 7) release(&s->empty[at.stage]), ring_next<GEMM_STAGES>(at);
    }
}

// Those who fill a box together: a warp; a group where results are stored mirrored, too.
template <GemmKind E> __device__ __forceinline__ void gemm_meet(int group) {
    if (gemm_symmetric<E>)
        barrier_sync(1 + group, WARPGROUP);
    else
        __syncwarp();
}

// The way out of 16 rows. Mirrored, they are columns 16 warp .. of a box of (64, 64), which a
// group's four warps fill together:
//
//     columns      0 .. 7              8 .. 15             of the 16, that is chunk 2 warp + l / 8
//     row 0 .. 7   lanes 0 .. 7        lanes 8 .. 15       % 2 of row 16 c + l / 16 * 8 + l % 8
//     row 8 .. 15  lanes 16 .. 23      lanes 24 .. 31
template <GemmKind E>
__device__ __forceinline__ void gemm_leave(GemmShared *s, const GemmCall &call,
                                           const unsigned (&x)[16][4], GemmTile tile, int group,
                                           int row) {
    int warp = threadIdx.x % WARPGROUP / WARP, lane = lane_id();
    int top = tile.matrix * call.side;
    unsigned mine = gemm_place();
    unsigned turned =
        (lane / 16 * 8 + lane % 8) * 128 + ((2 * warp + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
    for (int j = 0; j < GEMM_COLUMNS / BOX; j++) {
        int column = tile.column + j * BOX;
        bool above = gemm_symmetric<E> && column >= tile.row + GEMM_ROWS;
        bool below = gemm_symmetric<E> && column < tile.row;
        if (above) break;
#pragma unroll
        for (int mirrored = 0; mirrored < 2; mirrored++) {
            if (mirrored && !below) break;
            auto *box = s->out[group][below ? mirrored : j % 2];
            if (lane == 0) tma_store_wait_read<1>();  // this box has been read, if not the other
            gemm_meet<E>(group);
#pragma unroll
            for (int c = 0; c < 4; c++) {
                if (!mirrored) stmatrix(shared_address(box[warp]) + (mine ^ c * 32), x[4 * j + c]);
                if (mirrored)
                    stmatrix_trans(shared_address(box) + turned + c * 16 * 128, x[4 * j + c]);
            }
            fence_async();
            gemm_meet<E>(group);
            if (lane == 0) {
                if (!mirrored) tma_store(&call.out, top + tile.row + row, column, box[warp]);
                if (mirrored && warp == 0)
                    tma_store(&call.mirror, top + column, tile.row + row, box);
                tma_store_commit();  // of no store, too: a group for each box, and boxes alternate
            }
        }
    }
}

// d = the product of this group's 64 rows and COLUMNS columns of the tile. On the diagonal that is
// half a tile, and its columns of B are A.
template <GemmKind E, int COLUMNS>
__device__ __forceinline__ void gemm_multiply(float (&d)[COLUMNS / 2], GemmShared *s, int sum,
                                              Ring &at, int group) {
    constexpr bool A_ACROSS = gemm_a_across<E>, B_ACROSS = gemm_b_across<E>;
    constexpr int A_STEP = A_ACROSS ? 16 * 8 : 2;  // to the next 16 of the sum: 16 rows, or columns
    constexpr int B_STEP = B_ACROSS ? 16 * 8 : 2;
    int before = 0;  // the stage of the step before
    for (int k = 0; k < sum; k += BOX, ring_next<GEMM_STAGES>(at)) {
        const void *a_tile = s->a[at.stage][group * GROUP_ROWS];
        const void *b_tile = COLUMNS < GEMM_COLUMNS ? s->a[at.stage] : s->b[at.stage];
        uint64_t a = A_ACROSS ? wgmma_columns(a_tile, GEMM_BOX_BYTES) : wgmma_rows(a_tile);
        uint64_t b = B_ACROSS ? wgmma_columns(b_tile, GEMM_BOX_BYTES) : wgmma_rows(b_tile);
        mbarrier_wait(&s->full[at.stage], at.parity);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < BOX / 16; i++)
            wgmma<A_ACROSS, B_ACROSS>(d, a + i * A_STEP, b + i * B_STEP, k > 0 || i > 0);
        wgmma_commit();
        wgmma_wait<1>();  // the step before has been read; this one goes on
        if (k > 0) release(&s->empty[before]);
        before = at.stage;
    }
    wgmma_wait<0>();
    pin(d);
    release(&s->empty[before]);
}

template <GemmKind E>
__device__ __forceinline__ void gemm_consume(GemmShared *s, const GemmCall &call, int group) {
    int turn = group ^ 1;  // parity: the first turn is group 0's
    int warp = threadIdx.x % WARPGROUP / WARP;
    int row = group * GROUP_ROWS + warp * GEMM_WARP_ROWS;  // of the tile, this warp's first
    Ring at = {0, 0};
    for (int t = blockIdx.x; t < call.tiles; t += gridDim.x, turn ^= 1) {
        GemmTile tile = gemm_tile<E>(call, t);
        // divided for here, not when it is this group's turn
        pin(tile.row), pin(tile.column), pin(tile.matrix);
        float d[128];
        if (gemm_on_diagonal<E>(tile))
            gemm_multiply<E, GEMM_ROWS>(reinterpret_cast<float(&)[64]>(d), s, call.sum, at, group);
        else
            gemm_multiply<E, GEMM_COLUMNS>(d, s, call.sum, at, group);
        unsigned out[16][4];
        gemm_round<E>(out, d, s, call, at, row);
        pin(out);  // all but stores is done by when the turn comes
        mbarrier_wait(&s->turn[group], turn);
        gemm_leave<E>(s, call, out, tile, group, row);
        release(&s->turn[group ^ 1]);
    }
    if (lane_id() == 0) tma_store_wait_read<0>();  // shared memory lasts until then
}

// ---------------------------------------------------------------------------------------------

template <GemmKind E>
static __global__ void __launch_bounds__(GEMM_THREADS, 1)
    gemm_kernel(const __grid_constant__ GemmCall call) {
    extern __shared__ __align__(1024) unsigned char memory[];
    GemmShared *s = (GemmShared *)memory;
    int group = threadIdx.x / WARPGROUP;
    for (int i = 0; threadIdx.x == 0 && i < GEMM_GROUPS; i++)
        mbarrier_init(&s->turn[i], GEMM_WARPS * ARRIVALS);
    ring_init(s->full, s->empty, GEMM_STAGES, 1, GEMM_GROUPS * GEMM_WARPS);
    __syncthreads();
    if (group == GEMM_GROUPS) {
        registers_give<40>();
        if (threadIdx.x % WARPGROUP == 0) gemm_produce<E>(s, call);
    } else {
        registers_take<232>();
        gemm_consume<E>(s, call, group);
    }
}

// ---------------------------------------------------------------------------------------------
// Launchers.

// A matrix as the TMA knows it, kept from call to call: the driver takes its time to describe one.
typedef struct {
    const bf16 *p;
    int rows, columns, box_rows;
    uint64_t map[sizeof(CUtensorMap) / sizeof(uint64_t)];  // CUtensorMap, wherever it lies
} GemmMap;

typedef struct {
    int processors;
    GemmMap *map;  // (GEMM_MAPS): a hash table; who comes last has the place
} GemmSm90;

constexpr int GEMM_MAPS = 1024;

static inline void gemm_sm90_init(GemmSm90 *g, const Gpu *gpu) {
    for (auto kernel :
         {gemm_kernel<GEMM_RELU2>, gemm_kernel<GEMM_RELU2_BACKWARD>, gemm_kernel<GEMM_SQUARE>,
          gemm_kernel<GEMM_SQUARE_ACROSS>, gemm_kernel<GEMM_SQUARE_ADD>})
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        sizeof(GemmShared)));
    g->processors = gpu->processors;
    g->map = (GemmMap *)die_alloc(GEMM_MAPS, sizeof *g->map, "descriptions of matrices");
}

static inline void gemm_sm90_free(GemmSm90 *g) { free(g->map); }

// Whether products of so many columns, over so many terms, are taken here for ReLU^2.
static inline bool gemm_sm90_fits(int columns, int sum) {
    return columns % GEMM_COLUMNS == 0 && sum % BOX == 0;
}

// Whether squares (side, side) are, over so many terms.
static inline bool gemm_sm90_squares(int side, int sum) {
    return side % GEMM_ROWS == 0 && sum % BOX == 0;
}

// Describes p (rows, columns) and its boxes of (box_rows, 64).
static inline void gemm_map(const GemmSm90 *g, CUtensorMap *map, const bf16 *p, int rows,
                            int columns, int box_rows) {
    uint64_t hash = (uint64_t)(uintptr_t)p ^ (uint64_t)rows << 40 ^ (uint64_t)box_rows;
    GemmMap *m = &g->map[hash * 0x9e3779b97f4a7c15u >> 54];
    static_assert(GEMM_MAPS == 1 << (64 - 54), "as many places as the hash has values");
    if (m->p != p || m->rows != rows || m->columns != columns || m->box_rows != box_rows) {
        *map = tile_map(p, rows, columns, columns, box_rows);
        m->p = p, m->rows = rows, m->columns = columns, m->box_rows = box_rows;
        memcpy(m->map, map, sizeof *map);
    }
    memcpy(map, m->map, sizeof *map);
}

template <GemmKind E>
static inline void gemm_launch(const GemmSm90 *g, const GemmCall *call, cudaStream_t stream) {
    int blocks = call->tiles < g->processors ? call->tiles : g->processors;
    gemm_kernel<E><<<blocks, GEMM_THREADS, sizeof(GemmShared), stream>>>(*call);
    CUDA_LAUNCHED();
}

// out (M, N) = what ReLU^2 makes of a (M, K) b; in (M, N): backward's y, else NULL.
template <GemmKind E>
static inline void gemm_relu2(const GemmSm90 *g, bf16 *out, const bf16 *a, const bf16 *b,
                              const bf16 *in, int M, int N, int K, cudaStream_t stream) {
    GemmCall call = {};
    bool across = gemm_b_across<E>;
    assert(M > 0 && gemm_sm90_fits(N, K));
    gemm_map(g, &call.a, a, M, K, GEMM_ROWS);
    gemm_map(g, &call.b, b, across ? K : N, across ? N : K, across ? BOX : GEMM_COLUMNS);
    gemm_map(g, &call.out, out, M, N, GEMM_WARP_ROWS);
    if (in) gemm_map(g, &call.in, in, M, N, GEMM_ROWS);
    call.tiles_m = ceil_div(M, GEMM_ROWS), call.tiles_n = N / GEMM_COLUMNS;
    call.tiles = call.tiles_m * call.tiles_n;
    call.sum = K;
    gemm_launch<E>(g, &call, stream);
}

static inline void gemm_sm90_relu2_forward(const GemmSm90 *g,
                                           bf16 *y,        // (n, N)
                                           const bf16 *x,  // (n, K)
                                           const bf16 *w,  // (N, K)
                                           int n, int K, int N, cudaStream_t stream) {
    gemm_relu2<GEMM_RELU2>(g, y, x, w, NULL, n, N, K, stream);
}

static inline void gemm_sm90_relu2_backward(const GemmSm90 *g,
                                            bf16 *dz,        // (n, K)
                                            const bf16 *dy,  // (n, N)
                                            const bf16 *w,   // (N, K)
                                            const bf16 *y,   // (n, K)
                                            int n, int K, int N, cudaStream_t stream) {
    gemm_relu2<GEMM_RELU2_BACKWARD>(g, dz, dy, w, y, n, K, N, stream);
}

// d = x x^T, or x^T x if `across`; with c: d = alpha x x^T + beta c, c symmetric.
static inline void gemm_sm90_square(const GemmSm90 *g,
                                    bf16 *d,                     // (batch, M, M); neither x nor c
                                    const bf16 *x, bool across,  // (batch, M, K), or (batch, K, M)
                                    const bf16 *c,               // (batch, M, M), or NULL
                                    float alpha, float beta, int M, int K, int batch,
                                    cudaStream_t stream) {
    GemmCall call = {};
    int rows = batch * (across ? K : M), columns = across ? M : K, all = batch * M;
    assert(batch > 0 && gemm_sm90_squares(M, K) && !(across && c) && d != x && d != c);
    gemm_map(g, &call.a, x, rows, columns, across ? BOX : GEMM_ROWS);
    gemm_map(g, &call.b, x, rows, columns, across ? BOX : GEMM_COLUMNS);
    gemm_map(g, &call.out, d, all, M, GEMM_WARP_ROWS);
    gemm_map(g, &call.mirror, d, all, M, GROUP_ROWS);
    if (c) gemm_map(g, &call.in, c, all, M, GEMM_ROWS);
    call.tiles_m = M / GEMM_ROWS, call.tiles_n = ceil_div(M, GEMM_COLUMNS);
    call.tiles = batch * call.tiles_n * (call.tiles_m + 1 - call.tiles_n);
    call.side = M, call.sum = K;
    call.alpha = alpha, call.beta = beta;
    auto launch = c        ? gemm_launch<GEMM_SQUARE_ADD>
                  : across ? gemm_launch<GEMM_SQUARE_ACROSS>
                           : gemm_launch<GEMM_SQUARE>;
    launch(g, &call, stream);
}

#endif
