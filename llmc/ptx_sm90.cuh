// ptx_sm90.cuh: Hopper's own instructions (sm_90a), each in a function of its own: barriers that
// count bytes, copies of whole tiles by the TMA, products by a warpgroup. They exist in code for
// sm_90a only: a kernel asks PTX_SM90 before it uses them.
//
// TILES. A copy moves a box of some rows of 64 BF16 numbers between a matrix in global memory,
// which a CUtensorMap describes, and shared memory. There a row takes 128 bytes, and its chunk c of
// 16 bytes lies at place c ^ (row % 8) (the "128-byte swizzle"): a column of chunks lies in all
// banks. So every block of boxes begins at a multiple of 1024 bytes. What lies outside the matrix
// is read as zeros, and not written.
//
// PRODUCTS. A warpgroup, 128 threads, multiplies D = A B + D with A (64, 16), B (16, N), D (64, N).
// Warp w of the four holds rows 16 w .. of D, and lane 4 g + t of them
//
//     d[4 c + 2 half + e]:   row 16 w + 8 half + g,   column 8 c + 2 t + e
//
// A may come from registers: a[2 i + half] holds row 16 w + 8 half + g, columns 8 i + 2 t and one
// more. So columns 16 k .. of one product's D, rounded, are the A of step k of the next product:
// a[2 i + half] = {d[8 k + 4 i + 2 half], d[8 k + 4 i + 2 half + 1]}.
// From shared memory an operand is given by a descriptor of a tile of swizzled rows, in two ways:
//
//     rows:     what is summed over runs along the rows: D += X Y^T
//     columns:  what is summed over runs across the rows: D += P Y
//
// A product runs on its own: from wgmma_fence() over any number of them to wgmma_commit() is one
// group; wgmma_wait<N>() waits for all but the last N groups. Like the products it is for the whole
// warpgroup: no branch leads some of its warps to one and others past it. Until then nobody may
// touch D, nor A in registers. The compiler does not know that: pin(x), after the wait, keeps what
// uses x there.
#ifndef LLMC_PTX_SM90_CUH
#define LLMC_PTX_SM90_CUH

#include <cuda.h>  // CUtensorMap

#include "llmc/ptx.cuh"  // shared_address

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool PTX_SM90 = true;
#else
constexpr bool PTX_SM90 = false;
#endif

// ---------------------------------------------------------------------------------------------
// Barriers in shared memory. A barrier's phase ends when `count` have arrived and all bytes that
// were announced have come. mbarrier_wait(b, parity) returns once a phase of that parity is over:
// the first has parity 0. Before any phase, one of parity 1 counts as over.

__device__ __forceinline__ void mbarrier_init(uint64_t *barrier, unsigned count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(count)
                 : "memory");
}

// Behind all mbarrier_init: the TMA sees them, too, after a barrier.
__device__ __forceinline__ void mbarrier_init_fence(void) {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

// Arrives, and announces `bytes` that copies will bring.
__device__ __forceinline__ void mbarrier_expect(uint64_t *barrier, unsigned bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint64_t *barrier, unsigned parity) {
    unsigned over;
    do
        asm volatile("{\n\t.reg .pred over;\n\t"
                     "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n\t"
                     "selp.u32 %0, 1, 0, over;\n\t}"
                     : "=r"(over)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    while (!over);
}

// Barrier `id` of the block's 1 to 15 (0 is __syncthreads): `threads` meet, or only announce
// themselves.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// `threads` meet at barrier `id`, and learn whether any of them says yes.
__device__ __forceinline__ bool barrier_any(int id, int threads, bool yes) {
    unsigned any;
    asm volatile("{\n\t.reg .pred yes, any;\n\tsetp.ne.u32 yes, %3, 0;\n\t"
                 "bar.red.or.pred any, %1, %2, yes;\n\tselp.u32 %0, 1, 0, any;\n\t}"
                 : "=r"(any)
                 : "r"(id), "r"(threads), "r"((unsigned)yes)
                 : "memory");
    return any;
}

// ---------------------------------------------------------------------------------------------
// Copies, and registers.

// Starts the copy of the box that begins at (row, column); its bytes arrive at the barrier.
__device__ __forceinline__ void tma_load(void *to, const CUtensorMap *map, int row, int column,
                                         uint64_t *barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
                 : "memory");
}

// Brings the box that begins at (row, column) to L2, some time: nothing waits for it.
__device__ __forceinline__ void tma_prefetch(const CUtensorMap *map, int row, int column) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map),
                 "r"(column), "r"(row)
                 : "memory");
}

// Starts the copy of a box from shared memory to (row, column). What threads have stored there it
// sees after fence_async() by each of them, and a barrier.
__device__ __forceinline__ void tma_store(const CUtensorMap *map, int row, int column,
                                          const void *from) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
        "r"(column), "r"(row), "r"(shared_address(from))
        : "memory");
}
__device__ __forceinline__ void fence_async(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The stores that this thread has started since the last commit become a group.
__device__ __forceinline__ void tma_store_commit(void) {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all but the last N groups of this thread have read shared memory.
template <int N> __device__ __forceinline__ void tma_store_wait_read(void) {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// The warpgroup gives registers back, down to N a thread; or takes more, up to N.
template <int N> __device__ __forceinline__ void registers_give(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void registers_take(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// ---------------------------------------------------------------------------------------------
// Products.

// Descriptors. Bits 0-13: the tile's address; 16-29 and 32-45: two strides; 62-63: the swizzle;
// addresses and strides in units of 16 bytes. Groups of 8 rows are 1024 bytes apart. One 16 columns
// further right, within the 64 of a box, is at + 2; one r rows further down at + 8 r (r % 8 == 0).
__device__ __forceinline__ uint64_t wgmma_rows(const void *tile) {
    return (uint64_t)(shared_address(tile) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// The same for columns, where `apart` bytes further on the next 64 columns lie.
__device__ __forceinline__ uint64_t wgmma_columns(const void *tile, unsigned apart) {
    return (uint64_t)(shared_address(tile) >> 4) | (uint64_t)(apart >> 4) << 16 | 64ull << 32 |
           1ull << 62;
}

__device__ __forceinline__ void wgmma_fence(void) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void wgmma_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

template <int N> __device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
__device__ __forceinline__ void pin(int &x) { asm volatile("" : "+r"(x)::"memory"); }
template <int K> __device__ __forceinline__ void pin(unsigned (&x)[K][4]) {
#pragma unroll
    for (int i = 0; i < 4 * K; i++) asm volatile("" : "+r"(x[i / 4][i % 4])::"memory");
}

// clang-format off
#define WGMMA_8(i)   "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                     "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_32     WGMMA_8(0), WGMMA_8(8), WGMMA_8(16), WGMMA_8(24)
#define WGMMA_64     WGMMA_32, WGMMA_8(32), WGMMA_8(40), WGMMA_8(48), WGMMA_8(56)
#define WGMMA_NAMES_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,"   \
                       "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_NAMES_64 WGMMA_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45," \
                       "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_128    WGMMA_64, WGMMA_8(64), WGMMA_8(72), WGMMA_8(80), WGMMA_8(88), WGMMA_8(96), \
                     WGMMA_8(104), WGMMA_8(112), WGMMA_8(120)
#define WGMMA_NAMES_128 WGMMA_NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,"    \
                       "%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94," \
                       "%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,"   \
                       "%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,"   \
                       "%124,%125,%126,%127"
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 "

// D = A B^T, or D += A B^T if `add`; A and B are rows.
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, int add) {
    asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %34, 0;\n\t"
                 WGMMA(64) "{" WGMMA_NAMES_32 "}, %32, %33, add, 1, 1, 0, 0;\n\t}"
                 : WGMMA_32 : "l"(a), "l"(b), "r"(add));
}

// The same; A or B may be columns: the product is A^T B^T, A B or A^T B.
template <bool A_COLUMNS = false, bool B_COLUMNS = false>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, int add) {
    asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %66, 0;\n\t"
                 WGMMA(128) "{" WGMMA_NAMES_64 "}, %64, %65, add, 1, 1, %67, %68;\n\t}"
                 : WGMMA_64 : "l"(a), "l"(b), "r"(add), "n"(A_COLUMNS), "n"(B_COLUMNS));
}
template <bool A_COLUMNS, bool B_COLUMNS>
__device__ __forceinline__ void wgmma(float (&d)[128], uint64_t a, uint64_t b, int add) {
    asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %130, 0;\n\t"
                 WGMMA(256) "{" WGMMA_NAMES_128 "}, %128, %129, add, 1, 1, %131, %132;\n\t}"
                 : WGMMA_128 : "l"(a), "l"(b), "r"(add), "n"(A_COLUMNS), "n"(B_COLUMNS));
}

// D += A B; A in registers, B is columns.
__device__ __forceinline__ void wgmma(float (&d)[64], const unsigned (&a)[4], uint64_t b) {
    asm volatile("{\n\t.reg .pred add;\n\tsetp.eq.b32 add, 0, 0;\n\t"
                 WGMMA(128) "{" WGMMA_NAMES_64 "}, {%64,%65,%66,%67}, %68, add, 1, 1, 1;\n\t}"
                 : WGMMA_64 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma(float (&d)[32], const unsigned (&a)[4], uint64_t b) {
    asm volatile("{\n\t.reg .pred add;\n\tsetp.eq.b32 add, 0, 0;\n\t"
                 WGMMA(64) "{" WGMMA_NAMES_32 "}, {%32,%33,%34,%35}, %36, add, 1, 1, 1;\n\t}"
                 : WGMMA_32 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// clang-format on

// ---------------------------------------------------------------------------------------------
// Results on their way out.

// Four 8 x 8 matrices of BF16 numbers to shared memory, ldmatrix (ptx.cuh) backwards: lane l gives
// the address of row l % 8 of matrix l / 8, and columns 2t, 2t+1 of row g of each.
__device__ __forceinline__ void stmatrix(unsigned address, const unsigned (&m)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
                 : "memory");
}

// The same of the transposed matrices: row r of memory gets column r.
__device__ __forceinline__ void stmatrix_trans(unsigned address, const unsigned (&m)[4]) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
        "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
        : "memory");
}

#endif
