// ptx.cuh of dev/emulate: the instructions of llmc/ptx.cuh and llmc/ptx_sm90.cuh in plain C. What
// each does, and which lane holds what, is explained there.
#ifndef LLMC_PTX_CUH
#define LLMC_PTX_CUH
#define LLMC_PTX_SM90_CUH

#include "llmc/cuda_common.cuh"  // bf16

#ifdef HOPPER
constexpr bool PTX_SM90 = true;
#else
constexpr bool PTX_SM90 = false;
#endif

static inline unsigned shared_address(const void *p) {
    return (unsigned)__cvta_generic_to_shared(p);
}
static inline unsigned char *shared_at(unsigned address) { return emulate::shared + (int)address; }

static inline float bf16_at(const void *p) {
    unsigned short half;
    memcpy(&half, p, sizeof half);
    return __uint_as_float((unsigned)half << 16);
}
// The low and the high number of a register.
static inline float bf16_half(unsigned two, int high) {
    return __uint_as_float(high ? two & 0xffff0000u : two << 16);
}

// What lane `lane` showed.
template <class T> static inline T shown(const unsigned char *all, int lane) {
    T x;
    memcpy(&x, all + 32 * lane, sizeof x);
    return x;
}

// ---------------------------------------------------------------------------------------------
// A warp's matrices.

static inline void ldmatrix_any(unsigned (&m)[4], unsigned address, bool trans) {
    if (address % 16) emulate::stop("ldmatrix: a row that is not at a multiple of 16 bytes");
    const unsigned char *all = emulate::exchange(~0u, &address, sizeof address);
    int g = emulate_lane() / 4, t = emulate_lane() % 4;
    for (int i = 0; i < 4; i++) {
        unsigned short two[2];
        for (int e = 0; e < 2; e++) {
            int row = trans ? 2 * t + e : g, column = trans ? g : 2 * t + e;
            memcpy(&two[e], shared_at(shown<unsigned>(all, 8 * i + row)) + 2 * column, 2);
        }
        m[i] = two[0] | (unsigned)two[1] << 16;
    }
    __syncwarp();  // all have read before anyone goes on to write
}
static inline void ldmatrix(unsigned (&m)[4], unsigned address) { ldmatrix_any(m, address, false); }
static inline void ldmatrix_trans(unsigned (&m)[4], unsigned address) {
    ldmatrix_any(m, address, true);
}

static inline void stmatrix_any(unsigned address, const unsigned (&m)[4], bool trans) {
    if (address % 16) emulate::stop("stmatrix: a row that is not at a multiple of 16 bytes");
    const unsigned char *all = emulate::exchange(~0u, &address, sizeof address);
    int g = emulate_lane() / 4, t = emulate_lane() % 4;
    for (int i = 0; i < 4; i++)
        for (int e = 0; e < 2; e++) {
            int row = trans ? 2 * t + e : g, column = trans ? g : 2 * t + e;
            unsigned short half = (unsigned short)(m[i] >> 16 * e);
            memcpy(shared_at(shown<unsigned>(all, 8 * i + row)) + 2 * column, &half, 2);
        }
    __syncwarp();
}
static inline void stmatrix(unsigned address, const unsigned (&m)[4]) {
    stmatrix_any(address, m, false);
}
static inline void stmatrix_trans(unsigned address, const unsigned (&m)[4]) {
    stmatrix_any(address, m, true);
}

static inline void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const unsigned char *all = emulate::exchange(~0u, mine, sizeof mine);
    int g = emulate_lane() / 4, t = emulate_lane() % 4;
    for (int half = 0; half < 2; half++)
        for (int e = 0; e < 2; e++) {
            float sum = 0;
            for (int k = 0; k < 16; k++) {
                int from = k % 8 / 2, right = k / 8;
                unsigned x, y;
                memcpy(&x, all + 32 * (4 * g + from) + 4 * (half + 2 * right), 4);
                memcpy(&y, all + 32 * (4 * (2 * t + e) + from) + 4 * (4 + right), 4);
                sum += bf16_half(x, k % 2) * bf16_half(y, k % 2);
            }
            d[2 * half + e] += sum;
        }
}

// ---------------------------------------------------------------------------------------------
// Copies by a thread.

static inline void cp_async(unsigned to, const void *from, size_t bytes, bool there) {
    if (to % bytes || (there && (size_t)from % bytes))
        emulate::stop("cp.async: an address that is not a multiple of the copy's size");
    emulate::later(emulate::COPY, [=] {
        if (there)
            memcpy(shared_at(to), from, bytes);
        else
            memset(shared_at(to), 0, bytes);
    });
}
static inline void cp_async_16(unsigned to, const void *from, bool there) {
    cp_async(to, from, 16, there);
}
static inline void cp_async_4(unsigned to, const void *from, bool there) {
    cp_async(to, from, 4, there);
}
static inline void cp_async_commit(void) { emulate::commit(emulate::COPY); }
template <int N> static inline void cp_async_wait_group(void) { emulate::finish(emulate::COPY, N); }
static inline void cp_async_wait(void) {
    emulate::commit(emulate::COPY);
    emulate::finish(emulate::COPY, 0);
}

// ---------------------------------------------------------------------------------------------
// Functions. Numbers below 2^-126 count as 0, before and after.

static inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
static inline float exp2_fast(float x) { return flush(exp2f(flush(x))); }
static inline float sqrt_fast(float x) { return sqrtf(flush(x)); }
static inline float reciprocal_fast(float x) { return flush(1 / flush(x)); }

// ---------------------------------------------------------------------------------------------
// Barriers that count bytes.

typedef struct {
    uint16_t count, pending;  // arrivals of a phase; of this one that are missing
    int32_t bytes : 31;       // announced and not here yet
    uint32_t phase : 1;       // the parity of the phase under way
} MBarrier;
static_assert(sizeof(MBarrier) == sizeof(uint64_t));

static inline void mbarrier_turn(MBarrier *b) {
    if (b->pending || b->bytes) return;
    b->pending = b->count, b->phase ^= 1;
}
static inline void mbarrier_init(uint64_t *barrier, unsigned count) {
    MBarrier b = {(uint16_t)count, (uint16_t)count, 0, 0};
    memcpy(barrier, &b, sizeof b);
}
static inline void mbarrier_init_fence(void) {}
static inline void mbarrier_expect(uint64_t *barrier, unsigned bytes) {
    MBarrier *b = (MBarrier *)barrier;
    if (!b->pending) emulate::stop("mbarrier: more arrivals than it was made for");
    b->pending--, b->bytes += (int)bytes;
    mbarrier_turn(b);
}
static inline void mbarrier_arrive(uint64_t *barrier) { mbarrier_expect(barrier, 0); }
static inline void mbarrier_bytes(uint64_t *barrier, unsigned bytes) {
    MBarrier *b = (MBarrier *)barrier;
    b->bytes -= (int)bytes;
    mbarrier_turn(b);
}
static inline bool mbarrier_waits(const void *barrier, uint64_t parity) {
    return ((const MBarrier *)barrier)->phase == parity;
}
static inline void mbarrier_wait(uint64_t *barrier, unsigned parity) {
    emulate::wait(mbarrier_waits, barrier, parity);
}

static inline void barrier_sync(int id, int threads) { emulate::barrier(id, threads, true); }
static inline void barrier_arrive(int id, int threads) { emulate::barrier(id, threads, false); }

// Each call has one of three places in turn: who comes first clears the next one's.
static inline bool barrier_any(int id, int threads, bool yes) {
    static bool any[16][3];
    static unsigned calls[1024];
    unsigned call = calls[threadIdx.x]++;
    any[id][(call + 1) % 3] = false;
    any[id][call % 3] |= yes;
    emulate::barrier(id, threads, true);
    return any[id][call % 3];
}

// ---------------------------------------------------------------------------------------------
// Copies by the TMA.

using emulate::TensorMap;

// Moves a box between memory and swizzled rows of 128 bytes.
static inline void tma_box(TensorMap map, int row, int column, unsigned char *tile, bool to_tile) {
    if ((size_t)(tile - emulate::shared) % 1024)
        emulate::stop("TMA: a tile that is not at a multiple of 1024 bytes");
    for (unsigned r = 0; r < map.box_rows; r++)
        for (unsigned c = 0; c < map.box_columns; c++) {
            unsigned char *at = tile + 128 * r + 16 * (c / 8 ^ r % 8) + 2 * (c % 8);
            int64_t x = (int64_t)column + c, y = (int64_t)row + r;
            bool inside = x >= 0 && y >= 0 && x < (int64_t)map.columns && y < (int64_t)map.rows;
            unsigned char *in_memory = map.data + y * (int64_t)map.pitch + 2 * x;
            if (!to_tile && inside) memcpy(in_memory, at, 2);
            if (to_tile && inside) memcpy(at, in_memory, 2);
            if (to_tile && !inside) memset(at, 0, 2);
        }
}

static inline TensorMap tensor_map(const CUtensorMap *map) {
    TensorMap m;
    memcpy(&m, map, sizeof m);
    return m;
}

static inline void tma_load(void *to, const CUtensorMap *map, int row, int column,
                            uint64_t *barrier) {
    TensorMap m = tensor_map(map);
    emulate::later_at_barrier([=] {
        tma_box(m, row, column, (unsigned char *)to, true);
        mbarrier_bytes(barrier, 2 * m.box_rows * m.box_columns);
    });
}
static inline void tma_prefetch(const CUtensorMap *map, int, int) {
    if (!tensor_map(map).data) emulate::stop("TMA: a prefetch by a map that was not made");
}
static inline void tma_store(const CUtensorMap *map, int row, int column, const void *from) {
    TensorMap m = tensor_map(map);
    emulate::later(emulate::STORE, [=] { tma_box(m, row, column, (unsigned char *)from, false); });
}
static inline void fence_async(void) {}
static inline void tma_store_commit(void) { emulate::commit(emulate::STORE); }
template <int N> static inline void tma_store_wait_read(void) {
    emulate::finish(emulate::STORE, N);
}

template <int N> static inline void registers_give(void) {}
template <int N> static inline void registers_take(void) {}

// ---------------------------------------------------------------------------------------------
// A warpgroup's products. Descriptors are those of llmc/ptx_sm90.cuh.

static inline uint64_t wgmma_rows(const void *tile) {
    return (uint64_t)(shared_address(tile) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
static inline uint64_t wgmma_columns(const void *tile, unsigned apart) {
    return (uint64_t)(shared_address(tile) >> 4) | (uint64_t)(apart >> 4) << 16 | 64ull << 32 |
           1ull << 62;
}
static inline void wgmma_fence(void) {}
static inline void wgmma_commit(void) { emulate::commit(emulate::PRODUCT); }
// A warp's lanes look into each other's registers, so they do their parts together.
template <int N> static inline void wgmma_wait(void) {
    __syncwarp();
    emulate::finish(emulate::PRODUCT, N);
    __syncwarp();
}
template <class T> static inline void pin(T &) {}

// The 16 numbers along the sum that belong to row `i` of an operand: it is rows, or columns.
static inline void wgmma_gather(float (&x)[16], uint64_t descriptor, bool columns, int i) {
    unsigned start = (unsigned)(descriptor & 0x3fff) << 4;
    unsigned apart = (unsigned)(descriptor >> 16 & 0x3fff) << 4;
    unsigned eight = (unsigned)(descriptor >> 32 & 0x3fff) << 4;
    for (int k = 0; k < 16; k++) {
        int row = columns ? k : i, column = columns ? i % 64 : k;
        unsigned at = start + (unsigned)row / 8 * eight + (unsigned)row % 8 * 128 +
                      (unsigned)column * 2 + (columns ? (unsigned)i / 64 * apart : 0);
        x[k] = bf16_at(shared_at(at ^ (at >> 7 & 7) << 4));
    }
}

// B of a product, gathered by the first of a warp's lanes that comes to it. All lanes of a warp
// start the same products, so each counts them.
enum { PRODUCTS_OPEN = 64 };  // of a warp, at most
typedef struct {
    unsigned number;
    float row[256][16];
} WgmmaFactor;

static inline unsigned wgmma_number(void) {
    static unsigned count[1024];
    return ++count[threadIdx.x];
}
static inline const WgmmaFactor *wgmma_factor(unsigned number, uint64_t b, bool columns, int rows) {
    static WgmmaFactor open[32][PRODUCTS_OPEN];
    WgmmaFactor *f = &open[threadIdx.x / 32][number % PRODUCTS_OPEN];
    if (f->number != number)
        for (int i = 0; i < rows; i++) wgmma_gather(f->row[i], b, columns, i);
    f->number = number;
    return f;
}

// d (+)= A B^T of this thread's rows and columns; row(x, i) gathers row i of A.
template <int N, class Row>
static inline void wgmma_do(float (&d)[N], unsigned number, uint64_t b, bool b_columns, bool add,
                            Row row) {
    const WgmmaFactor *f = wgmma_factor(number, b, b_columns, 2 * N);
    int lane = (int)threadIdx.x % 128, w = lane / 32, g = lane % 32 / 4, t = lane % 4;
    float x[2][16];
    for (int half = 0; half < 2; half++) row(x[half], 16 * w + 8 * half + g);
    for (int c = 0; c < N / 4; c++)
        for (int e = 0; e < 2; e++) {
            const float *y = f->row[8 * c + 2 * t + e];
            for (int half = 0; half < 2; half++) {
                float sum = 0, &to = d[4 * c + 2 * half + e];
                for (int k = 0; k < 16; k++) sum += x[half][k] * y[k];
                to = add ? to + sum : sum;
            }
        }
}
template <int N>
static inline void wgmma_shared(float (&d)[N], uint64_t a, bool a_columns, uint64_t b,
                                bool b_columns, int add) {
    float *to = d;
    unsigned number = wgmma_number();
    emulate::later(emulate::PRODUCT, [=] {
        wgmma_do(*(float(*)[N])to, number, b, b_columns, add,
                 [=](float(&x)[16], int i) { wgmma_gather(x, a, a_columns, i); });
    });
}
static inline void wgmma(float (&d)[32], uint64_t a, uint64_t b, int add) {
    wgmma_shared(d, a, false, b, false, add);
}
template <bool A_COLUMNS = false, bool B_COLUMNS = false>
static inline void wgmma(float (&d)[64], uint64_t a, uint64_t b, int add) {
    wgmma_shared(d, a, A_COLUMNS, b, B_COLUMNS, add);
}
template <bool A_COLUMNS, bool B_COLUMNS>
static inline void wgmma(float (&d)[128], uint64_t a, uint64_t b, int add) {
    wgmma_shared(d, a, A_COLUMNS, b, B_COLUMNS, add);
}
template <int N>
static inline void wgmma_registers(float (&d)[N], const unsigned (&a)[4], uint64_t b) {
    typedef const unsigned *Registers;
    Registers mine = a, of_lane[32];
    const unsigned char *all = emulate::exchange(~0u, &mine, sizeof mine);
    for (int i = 0; i < 32; i++) of_lane[i] = shown<Registers>(all, i);
    float *to = d;
    unsigned number = wgmma_number();
    std::function<void(float(&)[16], int)> row = [=](float(&x)[16], int i) {
        for (int k = 0; k < 16; k++)
            x[k] = bf16_half(of_lane[4 * (i % 8) + k % 8 / 2][2 * (k / 8) + i % 16 / 8], k % 2);
    };
    emulate::later(emulate::PRODUCT,
                   [=] { wgmma_do(*(float(*)[N])to, number, b, true, true, row); });
}
static inline void wgmma(float (&d)[64], const unsigned (&a)[4], uint64_t b) {
    wgmma_registers(d, a, b);
}
static inline void wgmma(float (&d)[32], const unsigned (&a)[4], uint64_t b) {
    wgmma_registers(d, a, b);
}

#endif
