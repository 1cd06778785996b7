// gemm_relu2.cu: the first half of the MLP, from a loop to the tensor cores:
//
//     y[i][j] = relu(sum over k of x[i][k] W[j][k])^2           x (n, K), W (N, K), y (n, N)
//
// All are BF16, row by row; sums are FP32. n is any number from 1 on, K % 64 == 0, N % 256 == 0.
// Full shape: n 65536, K 768, N 3072.
//
// WORDS. A kernel is a function that many threads run. 32 of them, a warp, go through it in step;
// up to 1024, a block, stay on one SM (an H200 has 132) and can wait for one another there. Memory
// comes in four kinds, each smaller and faster than the one before: global (141 GB, 4 TB/s), the
// L2 cache before it (50 MB), shared (228 KB an SM, 128 bytes a cycle), registers (up to 255 a
// thread). Every rung moves work one kind nearer to the registers, or off the threads' hands.
//
// THE BILL. 65536 x 3072 x 768 = 1.55e11 products are to be summed, and 0.5 GB to be moved: x and W
// read once, y written once, 120 us. Fetched anew for each product, x and W would be 620 GB.
// So all is about using a number often once it has been fetched:
//
//     rung  one idea                                      fetched by    loads from shared  units
//                                                         the blocks    memory a product
//     v1    a thread for each element                       620 GB      -                  FP32
//     v2    blocks share tiles in shared memory              19 GB      2 of 4 bytes       FP32
//     v3    8 x 8 elements a thread, in registers             5 GB      1/16 of 16 bytes   FP32
//     v4    warps multiply on tensor cores                    5 GB      ldmatrix           mma.sync
//     v5    the next tiles come while these are multiplied    5 GB      ldmatrix           mma.sync
//     v6    tensor cores read shared memory themselves        5 GB      none               wgmma
//     v7    one thread has the TMA fetch tiles, to a ring     5 GB      none               wgmma
//     llmc  blocks stay; tiles leave under products         3.6 GB      none               wgmma
//     lt    for comparison: cuBLASLt, then a kernel for relu^2
//
// FP32 units make 67 TFLOP/s at the very best, 4.6 ms for this. On paper wgmma makes 989, mma.sync
// about 60% of it; the GPU's power allows cuBLASLt 672 on this shape, without relu^2.
//
// H200, n 65536, K 768, N 3072:
//
//     rung            us   TFLOP/s    of 672    times v1
//     v1         624,710       0.5      0.1%         1.0
//     v2          42,019       7.4        1%          15
//     v3           7,483        41        6%          84
//     v4           1,365       226       34%         458
//     v5           1,162       266       40%         537
//     lt             623       497       74%       1,003
//     v6           1,056       293       44%         592
//     v7             620       499       74%       1,008
//     llmc           447       691      103%       1,396
//
// From v6 on it takes a Hopper GPU: builds for sm_90a alone (HOPPER) have those rungs.
#include "dev/cuda/ladder.cuh"  // Rung, ladder_check, ladder_time
#include "llmc/matmul.cuh"      // matmul_forward: lt and the top rung
#include "llmc/ptx.cuh"         // ldmatrix, mma, cp_async_16
#include "llmc/relu2.cuh"       // relu2_forward, for lt
#ifdef HOPPER
#include "llmc/ptx_sm90.cuh"   // wgmma, tma_load, mbarrier_*
#include "llmc/tile_sm90.cuh"  // tile_map
#endif

static Matmul matmul_context;

typedef void GemmRelu2(bf16 *y,        // (n, N)
                       const bf16 *x,  // (n, K)
                       const bf16 *w,  // (N, K)
                       int n, int K, int N, cudaStream_t stream);

// ---------------------------------------------------------------------------------------------
// What every rung does with its sums.

typedef struct {
    bf16 *y;  // (n, N)
    int n, N;
} Out;

// NaN stays NaN.
__device__ __forceinline__ float relu2(float x) { return x <= 0 ? 0 : x * x; }

// One element.
__device__ __forceinline__ void store(Out out, int row, int column, float sum) {
    out.y[(size_t)row * out.N + column] = __float2bfloat16_rn(relu2(sum));
}

// Two neighbours in a row, 4 bytes at once.
__device__ __forceinline__ void store(Out out, int row, int column, float left, float right) {
    bf16 *to = out.y + (size_t)row * out.N + column;
    *(__nv_bfloat162 *)to = __floats2bfloat162_rn(relu2(left), relu2(right));
}

// ---------------------------------------------------------------------------------------------
// v1: a thread for each element. blockIdx and threadIdx tell it which: a block is 32 columns wide
// and 8 rows high, so that a warp has 32 neighbours in a row. What one lane writes the next writes,
// too, 2 bytes further on: the hardware makes one store of 64 bytes of it.
//
// Loads are not so lucky. All lanes want the same x, which is one load; but of W they read 32 rows,
// 2 K bytes apart: 32 loads. Nothing is used twice, unless a cache happens to hold it still.

static __global__ void v1_kernel(Out out, const bf16 *x, const bf16 *w, int K) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    int row = blockIdx.y * blockDim.y + threadIdx.y;
    if (row >= out.n) return;  // the last blocks reach over the end
    float sum = 0;
    for (int k = 0; k < K; k++)
        sum += to_float(x[(size_t)row * K + k]) * to_float(w[(size_t)column * K + k]);
    store(out, row, column, sum);
}

static void gemm_relu2_v1(bf16 *y, const bf16 *x, const bf16 *w, int n, int K, int N,
                          cudaStream_t stream) {
    dim3 block(32, 8), grid(N / 32, ceil_div(n, 8));
    v1_kernel<<<grid, block, 0, stream>>>({y, n, N}, x, w, K);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// v2: tiles in shared memory. The 32 x 32 elements of a block need 32 rows of x and 32 of W, and
// each of those numbers 32 times. So the block fetches them once, 32 of k at a time, a number a
// thread, and all threads read them from shared memory:
//
//                        W tile: 32 columns      x_tile[row][k] is the same for all of a warp: one
//                                    k        read. w_tile[column][k] are 32 rows, and shared
//     x tile: 32 rows    +-------+            memory serves 32 banks of 4 bytes at a time. In rows
//              k         | 32x32 |            of 32 all would lie in the same bank; in rows of 33
//                        +-------+            each lies a bank further on.
//
// Two barriers: nobody reads before all have written, nor writes again before all have read.

constexpr int V2_TILE = 32;

static __global__ void v2_kernel(Out out, const bf16 *x, const bf16 *w, int K) {
    __shared__ float x_tile[V2_TILE][V2_TILE + 1], w_tile[V2_TILE][V2_TILE + 1];
    int tx = threadIdx.x, ty = threadIdx.y;
    int row = blockIdx.y * V2_TILE + ty, column = blockIdx.x * V2_TILE + tx;
    int w_row = blockIdx.x * V2_TILE + ty;  // that this thread fetches from
    float sum = 0;
    for (int k0 = 0; k0 < K; k0 += V2_TILE) {
        x_tile[ty][tx] = row < out.n ? to_float(x[(size_t)row * K + k0 + tx]) : 0;
        w_tile[ty][tx] = to_float(w[(size_t)w_row * K + k0 + tx]);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < V2_TILE; k++) sum += x_tile[ty][k] * w_tile[tx][k];
        __syncthreads();
    }
    if (row < out.n) store(out, row, column, sum);
}

static void gemm_relu2_v2(bf16 *y, const bf16 *x, const bf16 *w, int n, int K, int N,
                          cudaStream_t stream) {
    dim3 block(V2_TILE, V2_TILE), grid(N / V2_TILE, ceil_div(n, V2_TILE));
    v2_kernel<<<grid, block, 0, stream>>>({y, n, N}, x, w, K);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// v3: 8 x 8 elements a thread. v2 reads shared memory twice for each product, and waits for that.
// With 8 numbers of x and 8 of W in registers a thread makes 64 products: an eighth of the numbers
// read, 4 of them by each load. The block's tile grows to 128 x 128: a quarter of the fetches.
//
// Tiles lie across, [k][row], so that a thread's numbers are neighbours. It takes two runs of 4, 64
// apart: 8 lanes' loads, 128 bytes, are served at a time, and lie in all 32 banks:
//
//     columns   0..3   4..7  ...  60..63 | 64..67  ...  124..127        rows likewise, by ty
//     tx         0      1          15    |   0            15

constexpr int V3_TILE = 128, V3_STEP = 16, V3_SIDE = 16;  // V3_SIDE^2 threads

// 128 rows from `first` on, 16 of k: each thread 8 numbers. Rows that are not there are zeros.
__device__ __forceinline__ void v3_load(float (&tile)[V3_STEP][V3_TILE], const bf16 *from,
                                        int first, int rows, int K, int k0) {
    int row = threadIdx.x % V3_TILE, k = threadIdx.x / V3_TILE * VEC;
    float piece[VEC] = {};
    if (first + row < rows) vec_load(piece, from + (size_t)(first + row) * K + k0 + k);
#pragma unroll
    for (int i = 0; i < VEC; i++) tile[k + i][row] = piece[i];
}

static __global__ void __launch_bounds__(V3_SIDE *V3_SIDE)
    v3_kernel(Out out, const bf16 *x, const bf16 *w, int K) {
    __shared__ __align__(16) float x_tile[V3_STEP][V3_TILE], w_tile[V3_STEP][V3_TILE];
    int tx = threadIdx.x % V3_SIDE, ty = threadIdx.x / V3_SIDE;
    int row0 = blockIdx.y * V3_TILE, column0 = blockIdx.x * V3_TILE;
    float sum[8][8] = {};
    for (int k0 = 0; k0 < K; k0 += V3_STEP) {
        v3_load(x_tile, x, row0, out.n, K, k0), v3_load(w_tile, w, column0, out.N, K, k0);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < V3_STEP; k++) {
            float a[2][4], b[2][4];
#pragma unroll
            for (int run = 0; run < 2; run++) {
                vec_load(a[run], &x_tile[k][64 * run + 4 * ty]);
                vec_load(b[run], &w_tile[k][64 * run + 4 * tx]);
            }
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) sum[i][j] += a[i / 4][i % 4] * b[j / 4][j % 4];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int row = row0 + 64 * (i / 4) + 4 * ty + i % 4;
        if (row >= out.n) continue;
#pragma unroll
        for (int j = 0; j < 8; j += 2)
            store(out, row, column0 + 64 * (j / 4) + 4 * tx + j % 4, sum[i][j], sum[i][j + 1]);
    }
}

static void gemm_relu2_v3(bf16 *y, const bf16 *x, const bf16 *w, int n, int K, int N,
                          cudaStream_t stream) {
    dim3 grid(N / V3_TILE, ceil_div(n, V3_TILE));
    v3_kernel<<<grid, V3_SIDE * V3_SIDE, 0, stream>>>({y, n, N}, x, w, K);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// v4: tensor cores. v3 is near what FP32 units can do. mma.sync has a warp multiply a (16, 16) by a
// (16, 8) matrix: 2048 products in one instruction instead of 32, of BF16 numbers as they are, with
// FP32 sums. llmc/ptx.cuh draws which lane holds what; ldmatrix brings it from shared memory. From
// here on tiles are BF16, 128 rows by 64 of k; eight warps have a part of the sums each:
//
//      128 columns, 32 each             a warp, for 16 of k:   4 ldmatrix of x: 4 x (16, 16)
//     +----+----+----+----+                                    2 ldmatrix of W: 4 x (16, 8)
//     | 0  | 1  | 2  | 3  |  64 rows                           16 mma
//     +----+----+----+----+             in the end (64, 32) sums, 64 registers a lane
//     | 4  | 5  | 6  | 7  |  64 rows
//     +----+----+----+----+
//
// BANKS again: a row is 128 bytes, all 32 banks, and ldmatrix reads 16 bytes from each of 8 rows,
// one below the other. So chunk c (16 bytes) of row r lies at place c ^ (r % 8): 8 chunks one below
// the other lie in all banks. Remember this swizzle: Hopper's hardware knows it.

constexpr int TILE = 128, STEP = 64, TILE_THREADS = 256;  // v4 to v7

// Where chunk c of row r begins in a tile of (128, 64).
__device__ __forceinline__ int swizzled(int r, int c) { return r * STEP + (c ^ r % 8) * 8; }

static_assert(STEP * sizeof(bf16) == 128, "a row of a tile is 8 chunks of 16 bytes");

typedef struct {
    bf16 x[TILE * STEP], w[TILE * STEP];  // (128, 64) each, swizzled
} Tiles;

__device__ __forceinline__ void v4_load(bf16 *tile, const bf16 *from, int first, int rows, int K,
                                        int k0) {
#pragma unroll
    for (int i = threadIdx.x; i < TILE * 8; i += TILE_THREADS) {
        int row = i / 8, chunk = i % 8;
        uint4 piece = {};
        if (first + row < rows)
            piece = *(const uint4 *)(from + (size_t)(first + row) * K + k0 + chunk * 8);
        *(uint4 *)(tile + swizzled(row, chunk)) = piece;
    }
}

// A warp's place in the block's (128, 128).
__device__ __forceinline__ int v4_row(void) { return threadIdx.x / WARP / 4 * 64; }
__device__ __forceinline__ int v4_column(void) { return threadIdx.x / WARP % 4 * 32; }

// A warp's (64, 32) sums: 4 x 4 results of mma.
__device__ __forceinline__ void v4_multiply(float (&d)[4][4][4], const Tiles *tiles) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int c = 0; c < STEP / 8; c += 2) {  // 16 of k: two chunks
        unsigned a[4][4], b[2][4];           // b[j]: 16 columns, two times what mma takes
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = swizzled(v4_row() + 16 * i + lane % 16, c + lane / 16);
            ldmatrix(a[i], shared_address(tiles->x + at));
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int at = swizzled(v4_column() + 16 * j + lane / 16 * 8 + lane % 8, c + lane / 8 % 2);
            ldmatrix(b[j], shared_address(tiles->w + at));
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                mma(d[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
}

__device__ __forceinline__ void v4_store(Out out, const float (&d)[4][4][4]) {
    int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    int row = blockIdx.y * TILE + v4_row() + g, column = blockIdx.x * TILE + v4_column() + 2 * t;
#pragma unroll
    for (int i = 0; i < 8; i++)  // groups of 8 rows
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float *two = &d[i / 2][j][i % 2 * 2];
            if (row + 8 * i < out.n) store(out, row + 8 * i, column + 8 * j, two[0], two[1]);
        }
}

static __global__ void __launch_bounds__(TILE_THREADS, 2)
    v4_kernel(Out out, const bf16 *x, const bf16 *w, int K) {
    __shared__ __align__(128) Tiles tiles;
    float d[4][4][4] = {};
    for (int k0 = 0; k0 < K; k0 += STEP) {
        v4_load(tiles.x, x, blockIdx.y * TILE, out.n, K, k0);
        v4_load(tiles.w, w, blockIdx.x * TILE, out.N, K, k0);
        __syncthreads();
        v4_multiply(d, &tiles);
        __syncthreads();
    }
    v4_store(out, d);
}

// v4 to v7: a block for each (128, 128), with so much shared memory beyond its __shared__ arrays.
template <class... A>
static void launch_tiles(void (*kernel)(Out, A...), int threads, int shared, cudaStream_t stream,
                         Out out, A... a) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    dim3 grid(out.N / TILE, ceil_div(out.n, TILE));
    kernel<<<grid, threads, shared, stream>>>(out, a...);
    CUDA_LAUNCHED();
}

static void gemm_relu2_v4(bf16 *y, const bf16 *x, const bf16 *w, int n, int K, int N,
                          cudaStream_t stream) {
    launch_tiles(v4_kernel, TILE_THREADS, 0, stream, {y, n, N}, x, w, K);
}

// ---------------------------------------------------------------------------------------------
// v5: copies under products. In v4 a block multiplies nothing while its tiles are on their way,
// half a microsecond a step: as long as its products take. cp.async starts a copy to shared memory
// and goes on; nothing passes through registers. Of two pairs of tiles, one is multiplied while the
// other is filled:
//
//     copy        0 | 1      | 2      | 3      |
//     multiply      | 0      | 1      | 2      | 3
//                   ^ wait for one's own copies, then a barrier: all have come, and all threads
//                     have read the tiles before, which may now be filled again
//
// More than 48 KB of shared memory must be asked for, and come as `extern`.

constexpr int V5_SHARED = 2 * sizeof(Tiles);

__device__ __forceinline__ Tiles *aligned_tiles(void) {
    extern __shared__ __align__(1024) unsigned char memory[];  // where v6 wants tiles
    return (Tiles *)memory;
}

__device__ __forceinline__ void v5_copy(bf16 *tile, const bf16 *from, int first, int rows, int K,
                                        int k0) {
#pragma unroll
    for (int i = threadIdx.x; i < TILE * 8; i += TILE_THREADS) {
        int row = i / 8, chunk = i % 8;
        bool there = first + row < rows;
        cp_async_16(shared_address(tile + swizzled(row, chunk)),
                    from + (there ? (size_t)(first + row) * K + k0 + chunk * 8 : 0), there);
    }
}

// Starts the copies of this block's tiles, 64 of k from k0 on.
__device__ __forceinline__ void v5_start(Tiles *to, Out out, const bf16 *x, const bf16 *w, int K,
                                         int k0) {
    v5_copy(to->x, x, blockIdx.y * TILE, out.n, K, k0);
    v5_copy(to->w, w, blockIdx.x * TILE, out.N, K, k0);
}

static __global__ void __launch_bounds__(TILE_THREADS, 2)
    v5_kernel(Out out, const bf16 *x, const bf16 *w, int K) {
    Tiles *tiles = aligned_tiles();
    float d[4][4][4] = {};
    v5_start(&tiles[0], out, x, w, K, 0);
    for (int k0 = 0, now = 0; k0 < K; k0 += STEP, now ^= 1) {
        cp_async_wait();
        __syncthreads();
        if (k0 + STEP < K) v5_start(&tiles[now ^ 1], out, x, w, K, k0 + STEP);
        v4_multiply(d, &tiles[now]);
    }
    v4_store(out, d);
}

static void gemm_relu2_v5(bf16 *y, const bf16 *x, const bf16 *w, int n, int K, int N,
                          cudaStream_t stream) {
    launch_tiles(v5_kernel, TILE_THREADS, V5_SHARED, stream, {y, n, N}, x, w, K);
}

#ifdef HOPPER
// ---------------------------------------------------------------------------------------------
// v6: wgmma. Hopper's tensor cores are faster than mma.sync can feed them: there every number goes
// from shared memory through registers, in each of the warps that need it. With wgmma four warps, a
// warpgroup, multiply (64, 16) by (16, 128), and the tensor cores read both from shared memory:
// half the reads, no ldmatrix, no registers but for the sums. A descriptor tells them where a tile
// lies and how it is swizzled, which is v4's way. The block's two groups have 64 rows each.
//
// A product runs on its own, like a copy: wgmma_fence .. wgmma_commit start a group of products,
// wgmma_wait waits for it, and pin(d) keeps the compiler from reading d sooner. And it reads shared
// memory on another path than threads write it: fence_async makes what they wrote seen there.

// A group's first row of the block's (128, 128).
__device__ __forceinline__ int v6_row(void) { return threadIdx.x / 128 * 64; }

// A group's (64, 128) sums; `first`: they begin at 0.
__device__ __forceinline__ void v6_multiply(float (&d)[64], const Tiles *tiles, bool first) {
    uint64_t a = wgmma_rows(tiles->x + v6_row() * STEP), b = wgmma_rows(tiles->w);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < STEP / 16; i++) wgmma(d, a + 2 * i, b + 2 * i, !first || i > 0);
    wgmma_commit();
    wgmma_wait<0>();
}

// Lane 4 g + t holds columns 8 c + 2 t and the next, of rows 16 warp + g and 8 further down.
__device__ __forceinline__ void v6_store(Out out, const float (&d)[64]) {
    int warp = threadIdx.x / WARP % 4, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    int row = blockIdx.y * TILE + v6_row() + 16 * warp + g, column = blockIdx.x * TILE + 2 * t;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int c = 0; c < TILE / 8; c++) {
            const float *two = &d[4 * c + 2 * half];
            if (row + 8 * half < out.n) store(out, row + 8 * half, column + 8 * c, two[0], two[1]);
        }
}

static __global__ void __launch_bounds__(TILE_THREADS, 2)
    v6_kernel(Out out, const bf16 *x, const bf16 *w, int K) {
    Tiles *tiles = aligned_tiles();
    float d[64];
    v5_start(&tiles[0], out, x, w, K, 0);
    for (int k0 = 0, now = 0; k0 < K; k0 += STEP, now ^= 1) {
        cp_async_wait();
        fence_async();
        __syncthreads();
        if (k0 + STEP < K) v5_start(&tiles[now ^ 1], out, x, w, K, k0 + STEP);
        v6_multiply(d, &tiles[now], k0 == 0);
    }
    pin(d);
    v6_store(out, d);
}

static void gemm_relu2_v6(bf16 *y, const bf16 *x, const bf16 *w, int n, int K, int N,
                          cudaStream_t stream) {
    launch_tiles(v6_kernel, TILE_THREADS, V5_SHARED, stream, {y, n, N}, x, w, K);
}

// ---------------------------------------------------------------------------------------------
// v7: a producer and a ring. In v6 every thread computes addresses and starts 8 copies a step, and
// __syncthreads holds all of them up until the slowest copy has come. Now one thread of a ninth
// warp, the producer, tells the TMA which box of x and which of W to fetch: two instructions a
// step. The TMA finds the addresses, swizzles, puts zeros where there is no row. Groups never wait
// for one another, but each for the stage of the ring that it needs. A stage has two barriers:
//
//     full    the producer announces bytes, the TMA counts them as they come; the groups wait
//     empty   each of the 8 warps arrives when it has read the stage; the producer waits
//
//     step     0    1    2    3    4    5    6    ..       the producer is up to 3 steps ahead
//     stage    0    1    2    0    1    2    0    ..
//     parity   0    0    0    1    1    1    0    ..       of the round: a barrier is asked whether
//                                                          its phase of that parity is over

constexpr int V7_STAGES = 3;  // two blocks an SM have room for them
constexpr int V7_THREADS = TILE_THREADS + WARP;

typedef struct {
    Tiles stage[V7_STAGES];
    uint64_t full[V7_STAGES], empty[V7_STAGES];
} V7Shared;

constexpr int V7_SHARED = sizeof(V7Shared);

static __global__ void __launch_bounds__(V7_THREADS, 2)
    v7_kernel(Out out, const __grid_constant__ CUtensorMap x_map,
              const __grid_constant__ CUtensorMap w_map, int K) {
    V7Shared *s = (V7Shared *)aligned_tiles();
    int steps = K / STEP;
    if (threadIdx.x == 0) {
        for (int i = 0; i < V7_STAGES; i++)
            mbarrier_init(&s->full[i], 1), mbarrier_init(&s->empty[i], TILE_THREADS / WARP);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == TILE_THREADS) {  // the producer
        for (int i = 0; i < steps; i++) {
            int stage = i % V7_STAGES, parity = i / V7_STAGES % 2;
            mbarrier_wait(&s->empty[stage], parity ^ 1);  // of the round before
            mbarrier_expect(&s->full[stage], sizeof(Tiles));
            Tiles *to = &s->stage[stage];
            tma_load(to->x, &x_map, blockIdx.y * TILE, i * STEP, &s->full[stage]);
            tma_load(to->w, &w_map, blockIdx.x * TILE, i * STEP, &s->full[stage]);
        }
    } else if (threadIdx.x < TILE_THREADS) {
        float d[64];
        for (int i = 0; i < steps; i++) {
            int stage = i % V7_STAGES, parity = i / V7_STAGES % 2;
            mbarrier_wait(&s->full[stage], parity);
            v6_multiply(d, &s->stage[stage], i == 0);
            __syncwarp();
            if (threadIdx.x % WARP == 0) mbarrier_arrive(&s->empty[stage]);
        }
        pin(d);
        v6_store(out, d);
    }
}

static void gemm_relu2_v7(bf16 *y, const bf16 *x, const bf16 *w, int n, int K, int N,
                          cudaStream_t stream) {
    // What the TMA is told of a matrix: address, sizes, box, swizzle.
    CUtensorMap x_map = tile_map(x, n, K, K, TILE);
    CUtensorMap w_map = tile_map(w, N, K, K, TILE);
    launch_tiles(v7_kernel, V7_THREADS, V7_SHARED, stream, {y, n, N}, x_map, w_map, K);
}

// ---------------------------------------------------------------------------------------------
// llmc: llmc/gemm_sm90.cuh. For what a block of v7 does before its first product and after its
// last, tensor cores wait, unless the SM's other block happens to be in its midst. With 12 steps to
// a tile that is much. So now a block stays on its SM for tile after tile, its producer runs on to
// the next one at once, and while one group's tile is on its way out the other group multiplies:
//
//     group 0   multiply  | out | multiply        | out |
//     group 1     multiply      | out | multiply        | out |
//
// as far as the ring reaches, for a stage is filled again when both have read it. Beside that:
// tiles are 128 x 256, a quarter less to fetch; results leave through shared memory and the TMA in
// whole rows of 128 bytes, where v6_store writes pieces of 16; tiles are made in an order by which
// those in work at a time share rows of x and W. Read it now: its words are v7's. What it does for
// y is GEMM_RELU2; its other kinds of products are backward's, and the squares of dev/cuda/muon.cu.

static void gemm_relu2_llmc(bf16 *y, const bf16 *x, const bf16 *w, int n, int K, int N,
                            cudaStream_t stream) {
    matmul_forward(&matmul_context, y, matmul_operand(x), matmul_operand(w), {MATMUL_RELU2}, n, K,
                   N, stream);
}
#endif

// The line to beat: a product as fast as any, then relu^2 of what it left in memory.
static void gemm_relu2_lt(bf16 *y, const bf16 *x, const bf16 *w, int n, int K, int N,
                          cudaStream_t stream) {
    matmul_forward(&matmul_context, y, matmul_operand(x), matmul_operand(w), {MATMUL_STORE}, n, K,
                   N, stream);
    relu2_forward(y, (size_t)n * N, stream);
}

// ---------------------------------------------------------------------------------------------

static const Rung<GemmRelu2> RUNGS[] = {
    {"v1", "a thread for each element", gemm_relu2_v1},
    {"v2", "tiles in shared memory", gemm_relu2_v2},
    {"v3", "8 x 8 elements a thread, in registers", gemm_relu2_v3},
    {"v4", "tensor cores: ldmatrix, mma.sync", gemm_relu2_v4},
    {"v5", "cp.async: copies under products", gemm_relu2_v5},
    {"lt", "cuBLASLt, then a kernel for relu^2", gemm_relu2_lt},
#ifdef HOPPER
    {"v6", "wgmma: both factors from shared memory", gemm_relu2_v6},
    {"v7", "a producer, the TMA and a ring", gemm_relu2_v7},
    {"llmc", "blocks stay, tiles leave under products", gemm_relu2_llmc},
#endif
};

static void check(Rung<GemmRelu2> rung) {
    const struct { int K, N; } shapes[] = {{64, 256}, {192, 512}, {768, 3072}};
    for (auto s : shapes)
        for (int n : {1, 31, 127, 128, 129, 300}) {
            if (grid_small && (s.K > 64 || n > 130)) continue;
            size_t count = (size_t)n * s.N;
            GpuArray<bf16> x = gpu_normal<bf16>("x", (size_t)n * s.K, 1);
            GpuArray<bf16> w = gpu_normal<bf16>("w", (size_t)s.N * s.K, 1 / sqrt(s.K));
            GpuArray<bf16> y = gpu_poisoned<bf16>("y", count);
            float *sum = gpu_expected(count), *expected = gpu_expected(count);
            rung.run(y.device, x.device, w.device, n, s.K, s.N, 0);
            cpu::matmul_forward(sum, x.host, w.host, n, s.K, s.N);
            cpu::relu2_forward(expected, sum, (int64_t)count);
            gpu_compare(y, expected, n, s.N, "%s, n %d, K %d, N %d", rung.name, n, s.K, s.N);
            gpu_end_case();
        }
}

static void time_rungs(int n, int K, int N) {
    size_t count = (size_t)n * N;
    bf16 *x = ladder_normal<bf16>((size_t)n * K, 1);
    bf16 *w = ladder_normal<bf16>((size_t)N * K, 1 / sqrt(K));
    bf16 *y = ladder_empty<bf16>(count);
    ladder_time(RUNGS, "relu(x W^T)^2, n 65536, K 768, N 3072",
                ladder_flops(2.0 * n * K * N, LADDER_GEMM),
                [=](Rung<GemmRelu2> rung) { rung.run(y, x, w, n, K, N, 0); });
    gpu_end_case();
}

int main(int argc, char **argv) {
    ladder_begin(argc, argv);
    matmul_init(&matmul_context, &test_gpu);
    ladder_check(RUNGS, check);
    if (ladder_timed()) time_rungs(65536, 768, 3072);
    matmul_free(&matmul_context);
    return test_end();
}
