// attention_sm90.cuh: attention_call.cuh's attention for Hopper, BF16: copies by the TMA, products
// by wgmma. For builds for sm_90a alone; attention.cuh is the portable one, whose opening comment
// tells flash attention. D is 64 or 128, ld and ldo are multiples of 8.
//
// WHO DOES WHAT. A block is three warpgroups. One copies: a thread of it (a warp, where there is
// more to find) starts the TMA's copies, as far ahead as shared memory has room. Two compute, each
// 64 of the block's 128 rows, and meet nobody but at barriers in shared memory (tile_sm90.cuh).
// The one that copies hands back registers, so that the others have 240 a thread: results, s and dp
// of a tile are all there.
//
//                   a block holds        and walks over tiles of    a tile's products
//     forward       128 queries          128 keys, last to first    s = q k^T      o += p v
//     dq            128 queries          128 keys, last to first    s, dp = do v^T       dq += ds k
//     dk, dv        128 keys             64 queries, on from them   s^T, dp^T    dv += p^T do,
//                                                                                dk += ds^T q
//
// A warpgroup multiplies only those halves of 128 keys of which it sees any (sight_sm90.cuh).
// Products run beside the threads that start them. While a warpgroup takes exponentials of a tile,
// the tensor cores compute its next product, or the other warpgroup's. p and ds never leave the
// registers: what one product leaves is the left operand of the next. That is why backward is two
// kernels with 7 products in all: dq, dk and dv in one pass would take 5, but the sums for dq cross
// blocks, through memory and in turn to keep their order, and ds must go through shared memory.
// No atomics in any sum, the same bits each time. dq and dk go through rotary_sm90.cuh on their way
// out, if a.rotary is there.
//
// BLOCKS STAY, one on each SM, and take one piece of work after the other (a tile of rows of a
// head; long ones of a row first): while one ends, the copies for the next are under way. Which
// block takes what differs from run to run, what comes out does not. The counter they take from
// turns back to 0 at the end of a launch: ONE CALL AT A TIME, whatever the stream (the trainer has
// one).
//
// REGISTERS. 168 a thread for the compiler, 240 once the copying warpgroup has given; no kernel
// spills, and dev/test/test_sass.c sees to it.
//
// The compiler moves wgmma_wait() up to the last branch before it, over arithmetic that should run
// beside the product. So in each loop a branch that is needed anyway stands behind exponentials.
#ifndef LLMC_ATTENTION_SM90_CUH
#define LLMC_ATTENTION_SM90_CUH

#include "llmc/attention_call.cuh"  // Attention, at_head, first_key, last_query
#include "llmc/rotary_sm90.cuh"     // Angles, angles_load, rotary_backward
#include "llmc/sight_sm90.cuh"      // KEYS, Sight, mask_keys, Part, for_part
#include "llmc/tile_sm90.cuh"       // Tile, Ring, multiply_*, store_rows; with ptx.cuh: exp2_fast
#include "llmc/vec.cuh"             // vec_load

static_assert(sizeof(floatX) == sizeof(bf16), "the FP32 build has attention_fp32.cuh");

#define ATTENTION_NAME "wgmma"
constexpr bool ATTENTION_ROTATES = true;

constexpr int CONSUMERS = 2;  // warpgroups that compute
constexpr int CONSUMER_WARPS = CONSUMERS * WARPGROUP / WARP;
constexpr int ATTENTION_THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int BLOCK_ROWS = CONSUMERS * GROUP_ROWS;
constexpr size_t SHARED_BYTES = 227 << 10;  // that a block can have

// Tiles that are walked over, and for how many there is room.
constexpr int KEY_STAGES = 2, QUERIES = 64, QUERY_STAGES = 3;

// What the TMA copies from, beside a call's arguments: matrices of n rows of H D.
typedef struct {
    CUtensorMap q, k, v, dout;
    CUtensorMap o;  // backward's: only to bring it near
} Maps;

// A piece of work: rows row .. row + 127 of a head, and the tiles t0 .. t1 that they visit; the
// first warpgroup's need no more than t1_first.
typedef struct {
    int head, row, t0, t1, t1_first;
} Work;
constexpr int NO_WORK = -1;

// The number of the next piece of work. Every block takes one too many, and the very last turns the
// counter back to 0 for the next launch.
static __device__ unsigned attention_taken[3];  // of each kernel
__device__ __forceinline__ int take(unsigned *taken, int items) {
    return (int)atomicInc(taken, (unsigned)items + gridDim.x - 1);
}

// ---------------------------------------------------------------------------------------------
// What the kernels share that hold queries and walk over keys: forward, and backward's of dq.

// held: q, in backward also dout. out: what the result passes through.
template <int D, int HELD> struct QueryShared {
    Tile<D, BLOCK_ROWS> held[HELD];
    Tile<D, KEYS> k[KEY_STAGES], v[KEY_STAGES];
    Tile<D, BLOCK_ROWS> out;
    uint64_t held_full, held_empty;
    uint64_t k_full[KEY_STAGES], k_empty[KEY_STAGES], v_full[KEY_STAGES], v_empty[KEY_STAGES];
    Work work;  // that `held` is of
    float delta[BLOCK_ROWS];
};

// One thread copies: for each piece of work the queries, then tiles of k and v from last to first.
// There is no room for the next work's queries while this one's are in use. So they come as far as
// L2, and so does o, which dq_consumer reads by itself: products cannot begin until all are there.
template <int D, int HELD>
__device__ __forceinline__ void query_producer(QueryShared<D, HELD> &shared, const Attention &a,
                                               const Maps &maps, unsigned *taken) {
    int tiles = ceil_div(a.n, BLOCK_ROWS), items = tiles * a.H;
    Ring ring = {0, 0};
    for (unsigned parity = 0;; parity ^= 1) {
        int item = take(taken, items), row = (tiles - 1 - item / a.H) * BLOCK_ROWS;
        Work work = {item % a.H, row, 0, NO_WORK, NO_WORK};
        int column = work.head * D;
        if (item < items) {
            work.t0 = first_key(a, row) / KEYS;
            work.t1 = (min(row + BLOCK_ROWS, a.n) - 1) / KEYS;
            tile_prefetch<D, BLOCK_ROWS>(maps.q, row, column);
            if (HELD == 2) tile_prefetch<D, BLOCK_ROWS>(maps.dout, row, column);
            if (HELD == 2) tile_prefetch<D, BLOCK_ROWS>(maps.o, row, column);
        }
        mbarrier_wait(&shared.held_empty, parity ^ 1);
        shared.work = work;
        if (work.t1 == NO_WORK) {
            mbarrier_arrive(&shared.held_full);
            return;
        }
        mbarrier_expect(&shared.held_full, sizeof shared.held);
        for (int h = 0; h < HELD; h++)
            tile_load(shared.held[h], h ? maps.dout : maps.q, row, column, &shared.held_full);
        for (int t = work.t1; t >= work.t0; t--, ring_next<KEY_STAGES>(ring)) {
            int i = ring.stage;
            mbarrier_wait(&shared.k_empty[i], ring.parity ^ 1);
            mbarrier_expect(&shared.k_full[i], sizeof shared.k[i]);
            tile_load(shared.k[i], maps.k, t * KEYS, column, &shared.k_full[i]);
            mbarrier_wait(&shared.v_empty[i], ring.parity ^ 1);
            mbarrier_expect(&shared.v_full[i], sizeof shared.v[i]);
            tile_load(shared.v[i], maps.v, t * KEYS, column, &shared.v_full[i]);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Forward.

// Lets `largest` follow the rows' maxima, which now includes s. It need not be the true maximum:
// any number near it cancels in out / sum. So it follows only when that has grown by a factor of
// more than 2^8, which is seldom; then true, for the whole warpgroup, and what was summed is to be
// multiplied by factor.
template <int N>
__device__ __forceinline__ bool follow_maximum(float (&largest)[2], float (&factor)[2],
                                               const float (&s)[N], float scale2, int group) {
    float now[2];
    bool grown = false;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = largest[half];
#pragma unroll
        for (int c = 0; c < N / 4; c++)
            top = fmaxf(top, fmaxf(s[4 * c + 2 * half], s[4 * c + 2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
        now[half] = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
        grown |= scale2 * (now[half] - largest[half]) > 8;
    }
    grown = barrier_any(1 + CONSUMERS + group, WARPGROUP, grown);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        factor[half] = grown ? exp2_fast(scale2 * (largest[half] - now[half])) : 1;
        if (grown) largest[half] = now[half];
    }
    return grown;
}

// s becomes p = exp(scale (s - largest)), sum = factor sum + p.
template <int N>
__device__ __forceinline__ void p_from_s(float (&s)[N], float (&sum)[2], const float (&largest)[2],
                                         const float (&factor)[2], float scale2) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top2 = scale2 * largest[half], more[2] = {0, 0};
#pragma unroll
        for (int c = 0; c < N / 4; c++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &x = s[4 * c + 2 * half + e];
                x = exp2_fast(scale2 * x - top2), more[e] += x;
            }
        sum[half] = factor[half] * sum[half] + (more[0] + more[1]);
    }
}

// The warpgroups take turns in starting products, so that one's softmax runs beside the other's
// products.
__device__ __forceinline__ void turn_wait(int group) { barrier_sync(1 + group, 2 * WARPGROUP); }
__device__ __forceinline__ void turn_pass(int group) {
    barrier_arrive(1 + (group ^ 1), 2 * WARPGROUP);
}

template <int D>
__device__ __forceinline__ void forward_consumer(QueryShared<D, 1> &shared, const Attention &a) {
    int group = warp_id() / 4, top = group * GROUP_ROWS, w = warp_id() * 16;
    const Tile<D, BLOCK_ROWS> &q = shared.held[0];
    float out[D / 2];
    unsigned p[KEYS / 16][4];
    Ring ring = {0, 0};
    if (group == 1) turn_pass(group);

    for (unsigned parity = 0;; parity ^= 1) {
        mbarrier_wait(&shared.held_full, parity);
        Work work = shared.work;
        if (work.t1 == NO_WORK) return;
        Sight sight = sight_of(a, work.row + top, work.row + w + lane_id() / 4);
        float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, factor[2];
        clear(out);

        // The first tile, in which each query meets itself: largest is finite from then on.
        Part part = part_of(sight, work.t1 * KEYS);
        mbarrier_wait(&shared.k_full[ring.stage], ring.parity);
        for_part(part, [&](auto &s, int first) {
            multiply_rows(s, q, top, shared.k[ring.stage], first);
            wgmma_wait<0>();
            pin(s);
            release(&shared.k_empty[ring.stage]);
            if (work.t1 == work.t0) release(&shared.held_empty);
            mask_keys(s, sight, work.t1 * KEYS + first, -INFINITY);
            follow_maximum(largest, factor, s, a.scale2, group);
            p_from_s(s, sum, largest, factor, a.scale2);
            pack_rows(p, s);
        });

        // s of tile t is computed while out gathers tile t + 1. From the first tile whose left half
        // is out of sight on, all are like it: two loops. (One, with for_part in it: ptxas put the
        // sums of p behind the exponentials, which now run beside them.)
        int t = work.t1 - 1;
        auto step = [&]<int N>(float(&s)[N], int first) {
            Ring before = ring;
            Part part_before = part;
            int k0 = t * KEYS;
            part = Part{first, 2 * N == KEYS};
            ring_next<KEY_STAGES>(ring);
            mbarrier_wait(&shared.k_full[ring.stage], ring.parity);
            turn_wait(group);
            multiply_rows(s, q, top, shared.k[ring.stage], first);
            mbarrier_wait(&shared.v_full[before.stage], before.parity);
            multiply_part(out, p, shared.v[before.stage], part_before);
            turn_pass(group);
            wgmma_wait<1>();
            pin(s);
            release(&shared.k_empty[ring.stage]);
            if (t == work.t0) release(&shared.held_empty);
            if (!sees_all(sight, k0)) mask_keys(s, sight, k0 + first, -INFINITY);
            bool grown = follow_maximum(largest, factor, s, a.scale2, group);
            p_from_s(s, sum, largest, factor, a.scale2);
            pin(s), pin(sum);
            if (grown) {
                wgmma_wait<0>();
                pin(out);
#pragma unroll
                for (int i = 0; i < D / 2; i++) out[i] *= factor[i / 2 % 2];
            }
            wgmma_wait<0>();
            pin(out), pin(p);
            release(&shared.v_empty[before.stage]);
            pack_rows(p, s);
        };
        for (; t >= work.t0 && part_of(sight, t * KEYS).all; t--) {
            float s[KEYS / 2];
            step(s, 0);
        }
        for (; t >= work.t0; t--) {
            float s[HALF / 2];
            step(s, HALF);
        }
        mbarrier_wait(&shared.v_full[ring.stage], ring.parity);
        multiply_part(out, p, shared.v[ring.stage], part);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float &row_sum = sum[half];
            row_sum += __shfl_xor_sync(FULL_WARP, row_sum, 1);
            row_sum += __shfl_xor_sync(FULL_WARP, row_sum, 2);
            int i = sight.row + 8 * half;
            if (lane_id() % 4 == 0 && i < a.n)
                a.lse[(size_t)work.head * (unsigned)a.n + (unsigned)i] =
                    a.scale * largest[half] + logf(row_sum);
            row_sum = 1 / row_sum;
        }
        wgmma_wait<0>();
        pin(out), pin(p);
        release(&shared.v_empty[ring.stage]);
        ring_next<KEY_STAGES>(ring);
        store_rows<D>(a.o + work.head * D, out, sum, shared.out, w, work.row + w, a.n, a.ldo);
    }
}

template <int D>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 1)
    attention_forward_kernel(const __grid_constant__ Attention a,
                             const __grid_constant__ Maps maps) {
    if constexpr (PTX_SM90) {
        extern __shared__ __align__(1024) unsigned char memory[];
        QueryShared<D, 1> &shared = *reinterpret_cast<QueryShared<D, 1> *>(memory);
        ring_init(&shared.held_full, &shared.held_empty, 1, 1, CONSUMER_WARPS);
        ring_init(shared.k_full, shared.k_empty, KEY_STAGES, 1, CONSUMER_WARPS);
        ring_init(shared.v_full, shared.v_empty, KEY_STAGES, 1, CONSUMER_WARPS);
        __syncthreads();
        if (threadIdx.x / WARPGROUP == CONSUMERS) {
            registers_give<24>();
            if (threadIdx.x == CONSUMERS * WARPGROUP)
                query_producer(shared, a, maps, &attention_taken[0]);
        } else {
            registers_take<240>();
            forward_consumer(shared, a);
        }
    } else
        __trap();
}

// ---------------------------------------------------------------------------------------------
// Backward: dq, and delta on the way.

// delta_i = do_i . o_i of the warp's 16 rows: tile row w .., global row first ..; to shared.delta
// and to a.delta.
template <int D>
__device__ __forceinline__ void warp_delta(QueryShared<D, 2> &shared, const Attention &a,
                                           const bf16 *o, float *delta, int w, int first) {
    constexpr int LANES = D / 8, ROWS = WARP / LANES;  // a row's: 8 columns each; rows at once
    constexpr int LOADS = 4;                           // in flight
    int lane = lane_id(), chunk = lane % LANES;
#pragma unroll 1
    for (int top = 0; top < 16; top += LOADS * ROWS) {
        float sum[LOADS];
#pragma unroll
        for (int r = 0; r < LOADS; r++) {
            int row = top + r * ROWS + lane / LANES, i = min(first + row, a.n - 1);
            const bf16 *from = o + (size_t)(unsigned)i * (unsigned)a.ldo + 8 * chunk;
            uint4 piece = __ldcg(reinterpret_cast<const uint4 *>(from));  // L1 is for the angles
            float x[8], y[8];
            vec_load(x, shared.held[1].x[chunk / 8][w + row] + 8 * (chunk % 8 ^ row % 8));
            vec_load(y, reinterpret_cast<const bf16 *>(&piece));
            sum[r] = 0;
#pragma unroll
            for (int d = 0; d < 8; d++) sum[r] += x[d] * y[d];
        }
#pragma unroll
        for (int r = 0; r < LOADS; r++) {
            int row = top + r * ROWS + lane / LANES;
#pragma unroll
            for (int d = LANES / 2; d > 0; d /= 2) sum[r] += __shfl_xor_sync(FULL_WARP, sum[r], d);
            if (chunk == 0) shared.delta[w + row] = sum[r];
            if (chunk == 0 && first + row < a.n) delta[first + row] = sum[r];
        }
    }
    __syncwarp();
}

template <int D>
__device__ __forceinline__ void dq_consumer(QueryShared<D, 2> &shared, const Attention &a) {
    int top = warp_id() / 4 * GROUP_ROWS, w = warp_id() * 16;  // the warpgroup's rows, the warp's
    const Tile<D, BLOCK_ROWS> &q = shared.held[0], &dout = shared.held[1];
    float out[D / 2];
    unsigned ds[KEYS / 16][4];
    Ring ring = {0, 0};

    for (unsigned parity = 0;; parity ^= 1) {
        mbarrier_wait(&shared.held_full, parity);
        Work work = shared.work;
        if (work.t1 == NO_WORK) return;
        Sight sight = sight_of(a, work.row + top, work.row + w + lane_id() / 4);
        size_t at = (size_t)work.head * (unsigned)a.n;
        float lse2[2], delta[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = sight.row + 8 * half;
            lse2[half] = i < a.n ? LOG2_E * a.lse[at + (unsigned)i] : INFINITY;
        }
        clear(out);

        Ring before = ring;
        for (int t = work.t1; t >= work.t0; t--) {
            int k0 = t * KEYS;
            Part part = part_of(sight, k0);
            mbarrier_wait(&shared.k_full[ring.stage], ring.parity);
            for_part(part, [&]<int N>(float(&s)[N], int first) {
                float dp[N];
                multiply_rows(s, q, top, shared.k[ring.stage], first);
                mbarrier_wait(&shared.v_full[ring.stage], ring.parity);
                wgmma_wait<1>();  // out has all of tile t + 1
                pin(out), pin(ds);
                if (t < work.t1) release(&shared.k_empty[before.stage]);
                multiply_rows(dp, dout, top, shared.v[ring.stage], first);
                if (t == work.t1) {
                    warp_delta<D>(shared, a, a.o + work.head * D, a.delta + at, w, work.row + w);
                    delta[0] = shared.delta[w + lane_id() / 4];
                    delta[1] = shared.delta[w + lane_id() / 4 + 8];
                }
                wgmma_wait<1>();
                pin(s);
#pragma unroll
                for (int i = 0; i < N; i++) s[i] = exp2_fast(a.scale2 * s[i] - lse2[i / 2 % 2]);
                pin(s);
                if (!sees_all(sight, k0)) mask_keys(s, sight, k0 + first, 0);
                wgmma_wait<0>();
                pin(dp);
                release(&shared.v_empty[ring.stage]);
                if (t == work.t0 && !a.rotary.r) release(&shared.held_empty);
#pragma unroll
                for (int i = 0; i < N; i++) s[i] *= dp[i] - delta[i / 2 % 2];
                pack_rows(ds, s);
                multiply_add<2 * N>(out, ds, shared.k[ring.stage], first);
            });
            before = ring;
            ring_next<KEY_STAGES>(ring);
        }
        // Beside the last product comes what norm and rotation need; then q makes room for the
        // next work's. Zeros: what only a branch sets, ptxas keeps in registers through the loop.
        Angles<D> angles[2] = {};
        unsigned rotated[D / 16][4] = {};
        if (a.rotary.r) {
            angles_load(angles[0], a.rotary, sight.row, a.n, work.head, a.H);
            angles_load(angles[1], a.rotary, sight.row + 8, a.n, work.head, a.H);
            read_rows(rotated, q, w);
            release(&shared.held_empty);
        }
        wgmma_wait<0>();
        pin(out), pin(ds);
        release(&shared.k_empty[before.stage]);
        float factor[2] = {a.scale, a.scale};
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (a.rotary.r) rotary_backward<D>(out, half, factor[half], rotated, angles[half]);
        store_rows<D>(a.dq + work.head * D, out, factor, shared.out, w, work.row + w, a.n, a.ld);
    }
}

template <int D>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 1)
    attention_dq_kernel(const __grid_constant__ Attention a, const __grid_constant__ Maps maps) {
    if constexpr (PTX_SM90) {
        extern __shared__ __align__(1024) unsigned char memory[];
        QueryShared<D, 2> &shared = *reinterpret_cast<QueryShared<D, 2> *>(memory);
        ring_init(&shared.held_full, &shared.held_empty, 1, 1, CONSUMER_WARPS);
        ring_init(shared.k_full, shared.k_empty, KEY_STAGES, 1, CONSUMER_WARPS);
        ring_init(shared.v_full, shared.v_empty, KEY_STAGES, 1, CONSUMER_WARPS);
        __syncthreads();
        if (threadIdx.x / WARPGROUP == CONSUMERS) {
            registers_give<24>();
            if (threadIdx.x == CONSUMERS * WARPGROUP)
                query_producer(shared, a, maps, &attention_taken[1]);
        } else {
            registers_take<240>();
            dq_consumer(shared, a);
        }
    } else
        __trap();
}

// ---------------------------------------------------------------------------------------------
// Backward: dk and dv.

// Of a tile of queries: lse log2 e, delta, and the first key that each sees. Queries from n on see
// nothing: their lse is infinite.
typedef struct {
    float lse2[QUERIES], delta[QUERIES];
    int first[QUERIES];
} QueryRows;

template <int D> struct KeyShared {
    Tile<D, BLOCK_ROWS> k[KEY_STAGES], v[KEY_STAGES];  // results pass through them when all is done
    Tile<D, QUERIES> q[QUERY_STAGES], dout[QUERY_STAGES];
    QueryRows rows[QUERY_STAGES];
    uint64_t held_full[KEY_STAGES], held_empty[KEY_STAGES], full[QUERY_STAGES], empty[QUERY_STAGES];
    Work work[KEY_STAGES];  // that k and v are of
};

// The next piece of work, found by a warp together.
__device__ __forceinline__ Work take_keys(const Attention &a, unsigned *taken) {
    int items = ceil_div(a.n, BLOCK_ROWS) * a.H, item = 0;
    if (lane_id() == 0) item = take(taken, items);
    item = __shfl_sync(FULL_WARP, item, 0);
    int row = item / a.H * BLOCK_ROWS;
    Work work = {item % a.H, row, row / QUERIES, NO_WORK, NO_WORK};
    if (item < items) {
        work.t1 = last_query(a, min(row + BLOCK_ROWS, a.n) - 1) / QUERIES;
        work.t1_first = last_query(a, min(row + GROUP_ROWS, a.n) - 1) / QUERIES;
    }
    return work;
}

// One warp copies: for each piece of work k and v, while the last one is still computed, then the
// tiles of queries from first to last.
template <int D>
__device__ __forceinline__ void key_producer(KeyShared<D> &shared, const Attention &a,
                                             const Maps &maps, unsigned *taken) {
    int lane = lane_id();
    Ring ring = {0, 0}, held = {0, 0};
    Work next = take_keys(a, taken);
    for (;; ring_next<KEY_STAGES>(held)) {
        Work work = next;
        int column = work.head * D;
        uint64_t *held_full = &shared.held_full[held.stage];
        mbarrier_wait(&shared.held_empty[held.stage], held.parity ^ 1);
        if (lane == 0) {
            shared.work[held.stage] = work;
            if (work.t1 == NO_WORK)
                mbarrier_arrive(held_full);
            else {
                mbarrier_expect(held_full, sizeof shared.k[0] + sizeof shared.v[0]);
                tile_load(shared.k[held.stage], maps.k, work.row, column, held_full);
                tile_load(shared.v[held.stage], maps.v, work.row, column, held_full);
            }
        }
        if (work.t1 == NO_WORK) return;
        size_t at = (size_t)work.head * (unsigned)a.n;
        for (int t = work.t0; t <= work.t1; t++, ring_next<QUERY_STAGES>(ring)) {
            int i = ring.stage;
            mbarrier_wait(&shared.empty[i], ring.parity ^ 1);
            if (lane == 0) {
                mbarrier_expect(&shared.full[i], sizeof shared.q[i] + sizeof shared.dout[i]);
                tile_load(shared.q[i], maps.q, t * QUERIES, column, &shared.full[i]);
                tile_load(shared.dout[i], maps.dout, t * QUERIES, column, &shared.full[i]);
            }
#pragma unroll
            for (int r = lane; r < QUERIES; r += WARP) {
                int query = t * QUERIES + r;
                bool there = query < a.n;
                shared.rows[i].lse2[r] = there ? LOG2_E * a.lse[at + (unsigned)query] : INFINITY;
                shared.rows[i].delta[r] = there ? a.delta[at + (unsigned)query] : 0;
                shared.rows[i].first[r] = there ? first_key(a, query) : a.n;
            }
            release(&shared.full[i]);
            // The consumers have something to do while the next work is found.
            if (t == min(work.t0 + QUERY_STAGES - 1, work.t1)) next = take_keys(a, taken);
        }
    }
}

// p = 0 where query (column) i0 + .. does not see key (row) `key`, or key + 8.
__device__ __forceinline__ void mask_queries(float (&p)[QUERIES / 2], const int *first, int i0,
                                             int key) {
    int column = lane_id() % 4 * 2;
#pragma unroll
    for (int c = 0; c < QUERIES / 8; c++) {
        int2 low = *reinterpret_cast<const int2 *>(first + 8 * c + column);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int k = key + 8 * half, late = k - i0 - column;  // columns before that are too early
            if (k < low.x || 8 * c < late) p[4 * c + 2 * half] = 0;
            if (k < low.y || 8 * c + 1 < late) p[4 * c + 2 * half + 1] = 0;
        }
    }
}

// Tiles t .. end - 1 are not for this warpgroup.
template <int D>
__device__ __forceinline__ void skip_queries(KeyShared<D> &shared, Ring &ring, int t, int end) {
    for (; t < end; t++, ring_next<QUERY_STAGES>(ring)) {
        mbarrier_wait(&shared.full[ring.stage], ring.parity);
        release(&shared.empty[ring.stage]);
    }
}

template <int D>
__device__ __forceinline__ void dkv_consumer(KeyShared<D> &shared, const Attention &a) {
    int group = warp_id() / 4, top = group * GROUP_ROWS, w = warp_id() * 16;
    int column = lane_id() % 4 * 2;
    float dk[D / 2], dv[D / 2], s[QUERIES / 2], dp[QUERIES / 2];
    unsigned p[QUERIES / 16][4], ds[QUERIES / 16][4];
    Ring ring = {0, 0}, held = {0, 0};

    for (;; ring_next<KEY_STAGES>(held)) {
        mbarrier_wait(&shared.held_full[held.stage], held.parity);
        Work work = shared.work[held.stage];
        Tile<D, BLOCK_ROWS> &k = shared.k[held.stage], &v = shared.v[held.stage];
        if (work.t1 == NO_WORK) return;
        int key = work.row + w + lane_id() / 4, group_key = work.row + top;
        int t0 = group_key / QUERIES, t1 = group ? work.t1 : work.t1_first;
        clear(dk), clear(dv);

        skip_queries(shared, ring, work.t0, t0);
        Ring before = ring;
        for (int t = t0; t <= t1; t++) {
            const QueryRows &rows = shared.rows[ring.stage];
            mbarrier_wait(&shared.full[ring.stage], ring.parity);
            multiply_rows(s, k, top, shared.q[ring.stage]);
            wgmma_wait<1>();  // dk and dv have all of tile t - 1
            pin(dk), pin(dv), pin(p), pin(ds);
            if (t > t0) release(&shared.empty[before.stage]);
            multiply_rows(dp, v, top, shared.dout[ring.stage]);
            wgmma_wait<1>();
            pin(s);
#pragma unroll
            for (int c = 0; c < QUERIES / 8; c++) {
                float2 two = *reinterpret_cast<const float2 *>(rows.lse2 + 8 * c + column);
#pragma unroll
                for (int i = 4 * c; i < 4 * c + 4; i++)
                    s[i] = exp2_fast(a.scale2 * s[i] - (i % 2 ? two.y : two.x));
            }
            pin(s);
            if (t == t0 || rows.first[QUERIES - 1] > group_key)
                mask_queries(s, rows.first, t * QUERIES, key);
            pack_rows(p, s);
            multiply_add<QUERIES>(dv, p, shared.dout[ring.stage]);
            wgmma_wait<1>();
            pin(dp);
#pragma unroll
            for (int c = 0; c < QUERIES / 8; c++) {
                float2 two = *reinterpret_cast<const float2 *>(rows.delta + 8 * c + column);
#pragma unroll
                for (int i = 4 * c; i < 4 * c + 4; i++) s[i] *= dp[i] - (i % 2 ? two.y : two.x);
            }
            pack_rows(ds, s);
            multiply_add<QUERIES>(dk, ds, shared.q[ring.stage]);
            before = ring;
            ring_next<QUERY_STAGES>(ring);
        }
        wgmma_wait<0>();
        pin(dk), pin(dv), pin(p), pin(ds);
        if (t0 <= t1) release(&shared.empty[before.stage]);
        skip_queries(shared, ring, max(t0, t1 + 1), work.t1 + 1);
        float one[2] = {1, 1}, scale[2] = {a.scale, a.scale};
        barrier_sync(1 + group, WARPGROUP);  // nobody multiplies the warpgroup's k and v any more
        store_rows<D>(a.dv + work.head * D, dv, one, v, w, work.row + w, a.n, a.ld);
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (a.rotary.r && work.row + w + 8 * half < a.n) {
                unsigned rotated[D / 16][4];
                Angles<D> angles;
                read_rows(rotated, k, w);
                angles_load(angles, a.rotary, key + 8 * half, a.n, a.H + work.head, a.H);
                rotary_backward<D>(dk, half, scale[half], rotated, angles);
            }
        store_rows<D>(a.dk + work.head * D, dk, scale, k, w, work.row + w, a.n, a.ld);
        fence_async();
        release(&shared.held_empty[held.stage]);
    }
}

template <int D>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 1)
    attention_dkv_kernel(const __grid_constant__ Attention a, const __grid_constant__ Maps maps) {
    if constexpr (PTX_SM90) {
        extern __shared__ __align__(1024) unsigned char memory[];
        KeyShared<D> &shared = *reinterpret_cast<KeyShared<D> *>(memory);
        ring_init(shared.held_full, shared.held_empty, KEY_STAGES, 1, CONSUMER_WARPS);
        // Copies and rows fill a stage.
        ring_init(shared.full, shared.empty, QUERY_STAGES, 1 + ARRIVALS, CONSUMER_WARPS);
        __syncthreads();
        if (threadIdx.x / WARPGROUP == CONSUMERS) {
            registers_give<24>();
            if (warp_id() == CONSUMER_WARPS) key_producer(shared, a, maps, &attention_taken[2]);
        } else {
            registers_take<240>();
            dkv_consumer(shared, a);
        }
    } else
        __trap();
}

// ---------------------------------------------------------------------------------------------
// Launchers.

// As many blocks as there is work, or as there are SMs.
template <class Shared>
static inline void attention_launch(void (*kernel)(Attention, Maps), const Attention &a,
                                    const Maps &maps, cudaStream_t stream) {
    int processors = 0, items = ceil_div(a.n, BLOCK_ROWS) * a.H;
    static_assert(sizeof(Shared) <= SHARED_BYTES, "a block cannot have more");
    CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
    CUDA_CHECK(cudaFuncSetAttribute((const void *)kernel,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)));
    kernel<<<(unsigned)min(items, processors), ATTENTION_THREADS, sizeof(Shared), stream>>>(a,
                                                                                            maps);
    CUDA_LAUNCHED();
}

// They depend on the arguments alone: a launch can be captured. (test_attention bench times this.)
static inline Maps maps_of(const Attention &a) {
    Maps maps = {};
    assert(a.D == 64 || a.D == 128);
    maps.q = tile_map(a.q, a.n, a.H * a.D, a.ld), maps.k = tile_map(a.k, a.n, a.H * a.D, a.ld);
    maps.v = tile_map(a.v, a.n, a.H * a.D, a.ld);
    if (a.dout) maps.dout = tile_map(a.dout, a.n, a.H * a.D, a.ldo);
    if (a.dout) maps.o = tile_map(a.o, a.n, a.H * a.D, a.ldo);
    return maps;
}

inline void attention_run_forward(const Attention &a, cudaStream_t s) {
    Maps maps = maps_of(a);
    if (a.D == 128)
        attention_launch<QueryShared<128, 1>>(attention_forward_kernel<128>, a, maps, s);
    else
        attention_launch<QueryShared<64, 1>>(attention_forward_kernel<64>, a, maps, s);
}

template <int D> static inline void attention_launch_backward(const Attention &a, cudaStream_t s) {
    Maps maps = maps_of(a);
    attention_launch<QueryShared<D, 2>>(attention_dq_kernel<D>, a, maps, s);
    attention_launch<KeyShared<D>>(attention_dkv_kernel<D>, a, maps, s);
}

inline void attention_run_backward(const Attention &a, cudaStream_t s) {
    if (a.D == 128)
        attention_launch_backward<128>(a, s);
    else
        attention_launch_backward<64>(a, s);
}

#endif
