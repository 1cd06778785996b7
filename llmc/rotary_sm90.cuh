// rotary_sm90.cuh: rotary.cuh's backward on Hopper, for a gradient that is still in registers: what
// leaves attention's backward (attention_sm90.cuh) as the gradient of q or k. So it need not be
// written, read and written again, and is rounded once. For each row of a head, out = N(rope(x)):
//
//     dy = r (dout - out mean(dout out)),   dx1 = dy1 cos - dy2 sin,   dx2 = dy2 cos + dy1 sin
//
// dout is 16 rows of a product, a warp's (tile_sm90.cuh), and out lies beside it in the same
// layout. A lane has both numbers of each pair j, j + D/2: chunks c and c + D/16 of 8 columns hold
// them. A row is in four lanes.
//
// ANGLES are asked for where there is other work until they come. A head's 128 rows want 64 KB of
// them, as much from L2 as a tile of keys and its values; no memory nearer has room for the table.
// But position a + b, a a multiple of 16, b < 16, turns by the angles of a and of b:
//
//     cos(a + b) = cos a cos b - sin a sin b,     sin(a + b) = sin a cos b + cos a sin b
//
// A warp's rows have one a, and the b are the table's first 16 rows, 8 KB, which L1 keeps. All in
// FP32: the result is a few 2^-24 from the table's own.
#ifndef LLMC_ROTARY_SM90_CUH
#define LLMC_ROTARY_SM90_CUH

#include "llmc/attention_call.cuh"  // Rotary
#include "llmc/tile_sm90.cuh"       // Tile; the layout of a product

// Of a row: the norm's factor; cos and sin of columns 8 c + 2 t, + 1.
template <int D> struct Angles {
    float r;
    float2 cosine[D / 16], sine[D / 16];
};
constexpr int ANGLE_ROWS = 16;  // from one a to the next

// Of row i of n. head: of the 2 H of q and k.
template <int D>
__device__ __forceinline__ void angles_load(Angles<D> &angles, const Rotary &rotary, int i, int n,
                                            int head, int H) {
    i = min(i, n - 1);
    int position = i % rotary.T, b = position % ANGLE_ROWS;
    const float4 *table = reinterpret_cast<const float4 *>(rotary.angles);  // two columns' each
    unsigned of_a = (unsigned)((position - b) * (D / 4) + lane_id() % 4);
    unsigned of_b = (unsigned)(b * (D / 4) + lane_id() % 4);
    angles.r = rotary.r[(size_t)i * 2 * (unsigned)H + (unsigned)head];
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
        float4 x = table[of_a + 4 * c], y = table[of_b + 4 * c];  // cos, sin; cos, sin
        angles.cosine[c] = {x.x * y.x - x.y * y.y, x.z * y.z - x.w * y.w};
        angles.sine[c] = {x.y * y.x + x.x * y.y, x.w * y.z + x.z * y.w};
    }
}

// d, of the row `half` of the lane's two: dout becomes dx / r; factor, which d is still to be
// multiplied by, takes r in.
template <int D>
__device__ __forceinline__ void rotary_backward(float (&d)[D / 2], int half, float &factor,
                                                const unsigned (&out)[D / 16][4],
                                                const Angles<D> &angles) {
    constexpr int PAIR = D / 4;  // from d[i] of j to that of j + D/2
    float2 sum = {0, 0};
#pragma unroll
    for (int c = 0; c < D / 8; c++) {
        float2 y = unpack(out[c / 2][c % 2 * 2 + half]);
        sum.x += d[4 * c + 2 * half] * y.x, sum.y += d[4 * c + 2 * half + 1] * y.y;
    }
    float mean = sum.x + sum.y;
    mean += __shfl_xor_sync(FULL_WARP, mean, 1);
    mean = (mean + __shfl_xor_sync(FULL_WARP, mean, 2)) / D;
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
        float2 y1 = unpack(out[c / 2][c % 2 * 2 + half]);
        float2 y2 = unpack(out[c / 2 + D / 32][c % 2 * 2 + half]);
        float2 cosine = angles.cosine[c], sine = angles.sine[c];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float &d1 = d[4 * c + 2 * half + e], &d2 = d[4 * c + 2 * half + e + PAIR];
            float g1 = d1 - (e ? y1.y : y1.x) * mean, g2 = d2 - (e ? y2.y : y2.x) * mean;
            float cos = e ? cosine.y : cosine.x, sin = e ? sine.y : sine.x;
            d1 = g1 * cos - g2 * sin, d2 = g2 * cos + g1 * sin;
        }
    }
    factor *= angles.r;
}

#endif
