// sight_sm90.cuh: which keys of a tile the queries of a warpgroup see, and which of its two halves
// have to be multiplied at all, for what holds queries and walks over keys (attention_sm90.cuh).
//
//     keys of a tile                                   0 .. 63    64 .. 127
//     on the diagonal       queries   0 ..  63         part       none
//                           queries  64 .. 127         all        part
//     W before it, where    queries   0 ..  63         part       all
//     windows begin         queries  64 .. 127         none       part
//
// (Query i sees keys i - W .. i; W a multiple of 128 here.) With W = 512 that is 1 half tile of 10,
// and 1 of 34 where T = 2048 has no window. Documents hide halves, too. A tile of which a warpgroup
// sees nothing costs it half a tile, in which all is masked.
#ifndef LLMC_SIGHT_SM90_CUH
#define LLMC_SIGHT_SM90_CUH

#include "llmc/attention_call.cuh"  // Attention, first_key
#include "llmc/tile_sm90.cuh"       // Tile, GROUP_ROWS, multiply_add

constexpr int KEYS = 128, HALF = KEYS / 2;  // of a tile that is walked over

// What the lane's two rows see: keys low[half] .. row + 8 half; the keys low_all .. high_all that
// every row of the warpgroup sees, and low_any .. high_any, beyond which none sees any.
typedef struct {
    int row, low[2], low_all, high_all, low_any, high_any;
} Sight;
__device__ __forceinline__ Sight sight_of(const Attention &a, int first, int row) {
    int last = a.n - 1, end = first + GROUP_ROWS - 1;
    int low[2] = {first_key(a, min(row, last)), first_key(a, min(row + 8, last))};
    int low_all = first_key(a, min(end, last)), low_any = first_key(a, min(first, last));
    return Sight{row, {low[0], low[1]}, low_all, first, low_any, end};
}
__device__ __forceinline__ bool sees_all(const Sight &sight, int k0) {
    return k0 >= sight.low_all && k0 + KEYS - 1 <= sight.high_all;
}

// The part of a tile of keys that the warpgroup multiplies: all, or where it sees nothing of one
// half the other, HALF keys from the tile's key `first` on.
typedef struct {
    int first;
    bool all;
} Part;
__device__ __forceinline__ Part part_of(const Sight &sight, int k0) {
    bool left = sight.low_any < k0 + HALF, right = sight.high_any >= k0 + HALF;
    return Part{left ? 0 : HALF, left && right};
}

// step(s, first): s has room for a product of the part. All that touches the product is to be in
// the step: where paths with products of two sizes under way meet, ptxas serialises all.
template <class Step> __device__ __forceinline__ void for_part(Part part, Step step) {
    float s[KEYS / 2], few[HALF / 2];
    if (part.all)
        step(s, 0);
    else
        step(few, part.first);
}

// Starts out += p v of the part. A step may hold it: out has one size.
template <int D>
__device__ __forceinline__ void multiply_part(float (&out)[D / 2],
                                              const unsigned (&p)[KEYS / 16][4],
                                              const Tile<D, KEYS> &v, Part part) {
    if (part.all)
        multiply_add<KEYS>(out, p, v);
    else
        multiply_add<HALF>(out, p, v, part.first);
}

// x = nothing where query (row) does not see key (column) k0 + ..
template <int N>
__device__ __forceinline__ void mask_keys(float (&x)[N], const Sight &sight, int k0,
                                          float nothing) {
    int k = k0 + lane_id() % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int from = sight.low[half] - k, to = sight.row + 8 * half - k;
#pragma unroll
        for (int c = 0; c < N / 4; c++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (8 * c + e < from || 8 * c + e > to) x[4 * c + 2 * half + e] = nothing;
    }
}

#endif
