// tile_sm90.cuh: tiles of BF16 rows on Hopper, and the way of their numbers: a matrix in global
// memory -> (TMA) tile in shared memory -> (wgmma) product in registers -> left operand of the next
// product, or -> rows in global memory.
//
//     Tile<D, ROWS>   ROWS rows of D (a multiple of 64): columns 0 .. 63 of all rows, then columns
//                     64 .. 127, ..; each 64 x 64 box is a copy of its own, swizzled
//                     (ptx_sm90.cuh). Begins at a multiple of 1024 bytes.
//     product         float x[N / 2] of each thread of a warpgroup: (64, N), laid out as in
//                     ptx_sm90.cuh: x[4 c + 2 half + e] of lane 4 g + t of warp w (0 .. 3) is
//                     row 16 w + 8 half + g, column 8 c + 2 t + e
//     left operand    unsigned p[K / 16][4]: (64, K), a product rounded to BF16
//
// RINGS. Who copies and who computes walk through the same stages in the same order, each with a
// Ring of its own. A stage has two barriers. `full`: its copies have come. `empty`: all who compute
// are done with it. The parity of the round that one is in is waited for at `full`, its opposite at
// `empty` (so that the first round does not wait).
#ifndef LLMC_TILE_SM90_CUH
#define LLMC_TILE_SM90_CUH

#include "llmc/ptx_sm90.cuh"  // mbarrier_*, tma_*, wgmma*
#include "llmc/vec.cuh"       // pack

constexpr int WARPGROUP = 128;
constexpr int GROUP_ROWS = 64;  // of a product
constexpr int BOX = 64;         // a copy's rows and columns

template <int D, int ROWS> struct Tile {
    static_assert(D % BOX == 0 && ROWS % BOX == 0, "made of whole boxes");
    bf16 x[D / BOX][ROWS][BOX];
};

typedef struct {
    int stage;
    unsigned parity;
} Ring;

// A warp arrives once, when its lanes have met. Built for racecheck, which does not see that lanes
// which have met are done, too, each lane arrives.
#ifdef RACECHECK
constexpr unsigned ARRIVALS = WARP;
#else
constexpr unsigned ARRIVALS = 1;
#endif

// A warp arrives: what it wrote, or read, is done with.
__device__ __forceinline__ void release(uint64_t *barrier) {
    __syncwarp();
    if (ARRIVALS == WARP || lane_id() == 0) mbarrier_arrive(barrier);
}

// The barriers of `count` stages: how many arrivals fill one, how many warps drain it.
// __syncthreads() comes next. The TMA, which arrives at them, sees them after both fences.
__device__ __forceinline__ void ring_init(uint64_t *full, uint64_t *empty, int count, unsigned fill,
                                          unsigned drain) {
    if (threadIdx.x > 0) return;
    for (int i = 0; i < count; i++)
        mbarrier_init(full + i, fill), mbarrier_init(empty + i, drain * ARRIVALS);
    mbarrier_init_fence();
    fence_async();
}

template <int STAGES> __device__ __forceinline__ void ring_next(Ring &ring) {
    if (++ring.stage == STAGES) ring.stage = 0, ring.parity ^= 1;
}

// Starts the copy of rows row .. of columns column .. of a matrix. One thread calls it.
template <int D, int ROWS>
__device__ __forceinline__ void tile_load(Tile<D, ROWS> &tile, const CUtensorMap &map, int row,
                                          int column, uint64_t *full) {
#pragma unroll
    for (int c = 0; c < D / BOX; c++)
#pragma unroll
        for (int r = 0; r < ROWS; r += BOX)
            tma_load(tile.x[c][r], &map, row + r, column + c * BOX, full);
}

// Brings the same rows and columns to L2. One thread calls it.
template <int D, int ROWS>
__device__ __forceinline__ void tile_prefetch(const CUtensorMap &map, int row, int column) {
#pragma unroll
    for (int c = 0; c < D; c += BOX)
#pragma unroll
        for (int r = 0; r < ROWS; r += BOX) tma_prefetch(&map, row + r, column + c);
}

// Starts x = a b^T of 64 rows of a, from `row` on, and 2 X rows of b, from `first` on.
template <int D, int ROWS, int N, int X>
__device__ __forceinline__ void multiply_rows(float (&x)[X], const Tile<D, ROWS> &a, int row,
                                              const Tile<D, N> &b, int first = 0) {
    uint64_t left = wgmma_rows(a.x[0][row]), right = wgmma_rows(b.x[0][first]);
    wgmma_fence();
#pragma unroll
    for (unsigned c = 0; c < D / BOX; c++)
#pragma unroll
        for (unsigned k = 0; k < BOX / 16; k++)
            wgmma(x, left + c * 8 * ROWS + 2 * k, right + c * 8 * N + 2 * k, c + k > 0);
    wgmma_commit();
}

// Starts y += p b: the first N columns of p (64, ROWS), and N rows of b (ROWS, D), from `first` on.
template <int N, int D, int ROWS>
__device__ __forceinline__ void multiply_add(float (&y)[D / 2], const unsigned (&p)[ROWS / 16][4],
                                             const Tile<D, ROWS> &b, int first = 0) {
    uint64_t right = wgmma_columns(b.x[0][first], ROWS * BOX * sizeof(bf16));
    wgmma_fence();
#pragma unroll
    for (unsigned k = 0; k < N / 16; k++) wgmma(y, p[k], right + 8 * 16 * k);
    wgmma_commit();
}

template <int N> __device__ __forceinline__ void clear(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = 0;
}

// A product as a left operand, or as its first columns: the numbers are where they must be.
template <int K, int X>
__device__ __forceinline__ void pack_rows(unsigned (&p)[K][4], const float (&x)[X]) {
    static_assert(X <= 8 * K, "p has room");
#pragma unroll
    for (int i = 0; i < X / 2; i++) p[i / 4][i % 4] = pack(x[2 * i], x[2 * i + 1]);
}

// Rows row .. row + 15 of a tile, for a warp, laid out as a left operand. By loads that the
// compiler may move: ldmatrix, which stays where it stands, made attention's backward spill.
template <int D, int ROWS>
__device__ __forceinline__ void read_rows(unsigned (&p)[D / 16][4], const Tile<D, ROWS> &tile,
                                          int row) {
    int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < D / 4; i++) {
        int c = i / 2, half = i % 2;
        const bf16 *from = tile.x[c / 8][row + 8 * half + g] + 8 * (c % 8 ^ g) + 2 * t;
        p[i / 4][i % 4] = *reinterpret_cast<const unsigned *>(from);
    }
}

// Writes a warp's 16 rows x, times factor[half], to rows first .. of y, as far as n. They pass
// through rows row .. of a tile that only this warp uses, to leave in pieces of 16 bytes.
template <int D, int ROWS>
__device__ __forceinline__ void store_rows(bf16 *y,  // (n) rows of D, ld apart
                                           const float (&x)[D / 2], const float (&factor)[2],
                                           Tile<D, ROWS> &tile, int row, int first, int n, int ld) {
    constexpr int CHUNKS = D / 8;
    int lane = lane_id(), g = lane / 4, t = lane % 4;
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            bf16 *to = tile.x[c / 8][row + 8 * half + g] + 8 * (c % 8 ^ g) + 2 * t;
            *reinterpret_cast<unsigned *>(to) =
                pack(factor[half] * x[4 * c + 2 * half], factor[half] * x[4 * c + 2 * half + 1]);
        }
    __syncwarp();
#pragma unroll
    for (int r = lane / CHUNKS; r < 16; r += WARP / CHUNKS) {
        int chunk = lane % CHUNKS;
        bf16 *from = tile.x[chunk / 8][row + r] + 8 * (chunk % 8 ^ r % 8);
        if (first + r < n)
            *reinterpret_cast<uint4 *>(y + (size_t)(first + r) * (unsigned)ld + 8 * chunk) =
                *reinterpret_cast<uint4 *>(from);
    }
}

// The map of x for the TMA: boxes of a matrix of n rows of `columns`, ld apart. Depends on nothing
// but its arguments: a launch that takes it can be captured.
static inline CUtensorMap tile_map(const bf16 *x, int n, int columns, int ld, int box_rows = BOX) {
    typedef CUresult (*Encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                               const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                               const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                               CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static Encode encode;  // by name, so that the program need not be linked with the driver
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSuccess;
    if (!encode)
        CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode,
                                                    12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess)
        die(EXIT_DEVICE, "driver: found no cuTensorMapEncodeTiled; update it to CUDA 12 or newer");
    CUtensorMap map;
    cuuint64_t size[2] = {(cuuint64_t)columns, (cuuint64_t)n};
    cuuint64_t apart[1] = {(cuuint64_t)ld * sizeof(bf16)};
    cuuint32_t box[2] = {BOX, (cuuint32_t)box_rows}, step[2] = {1, 1};
    CUresult e = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)x, size, apart, box,
                        step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (e != CUDA_SUCCESS)
        die(EXIT_INTERNAL,
            "cuTensorMapEncodeTiled: error %d (%d rows of %d, %d apart; boxes of %d rows)", (int)e,
            n, columns, ld, box_rows);
    return map;
}

#endif
