// rotary_sm90.cuh: rotary.cuh's backward on Hopper, for a gradient that is still in registers: what
// leaves attention's backward (attention_sm90.cuh) as the gradient of q or k. So it need not be
// written, read and written again, and is rounded once. For each row of a head, out = N(rope(x)):
//
//     dy = r (dout - out mean(dout out)),   dx1 = dy1 cos - dy2 sin,   dx2 = dy2 cos + dy1 sin
//
// dout is 16 rows of a product, a warp's (tile_sm90.cuh), and out lies beside it in the same
// layout. A lane has both numbers of each pair j, j + D/2: chunks c and c + D/16 of 8 columns hold
// them. A row is in four lanes. cos and sin are 4 D bytes a row and head, from L2: angles_load()
// asks for them where there is other work until they come.
#ifndef LLMC_ROTARY_SM90_CUH
#define LLMC_ROTARY_SM90_CUH

#include "llmc/attention_call.cuh"  // Rotary
#include "llmc/tile_sm90.cuh"       // Tile; the layout of a product

// Of a lane's two rows: the norm's factor; cos and sin of columns 8 c + 2 t, + 1.
template <int D> struct Angles {
    float r[2];
    float2 cosine[2][D / 16], sine[2][D / 16];
};

// Rows `row` and row + 8 of n. head: of the 2 H of q and k.
template <int D>
__device__ __forceinline__ void angles_load(Angles<D> &angles, const Rotary &rotary, int row, int n,
                                            int head, int H) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int i = min(row + 8 * half, n - 1), at = i % rotary.T * (D / 2) + lane_id() % 4 * 2;
        angles.r[half] = rotary.r[(size_t)i * 2 * (unsigned)H + (unsigned)head];
#pragma unroll
        for (int c = 0; c < D / 16; c++) {
            angles.cosine[half][c] = *reinterpret_cast<const float2 *>(rotary.cosine + at + 8 * c);
            angles.sine[half][c] = *reinterpret_cast<const float2 *>(rotary.sine + at + 8 * c);
        }
    }
}

// d: dout becomes dx / r; factor, which d is still to be multiplied by, takes r in.
template <int D>
__device__ __forceinline__ void rotary_backward(float (&d)[D / 2], float (&factor)[2],
                                                const unsigned (&out)[D / 16][4],
                                                const Angles<D> &angles) {
    constexpr int PAIR = D / 4;  // from d[i] of j to that of j + D/2
#pragma unroll
    for (int half = 0; half < 2; half++) {
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
            float2 cosine = angles.cosine[half][c], sine = angles.sine[half][c];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &d1 = d[4 * c + 2 * half + e], &d2 = d[4 * c + 2 * half + e + PAIR];
                float g1 = d1 - (e ? y1.y : y1.x) * mean, g2 = d2 - (e ? y2.y : y2.x) * mean;
                float cos = e ? cosine.y : cosine.x, sin = e ? sine.y : sine.x;
                d1 = g1 * cos - g2 * sin, d2 = g2 * cos + g1 * sin;
            }
        }
        factor[half] *= angles.r[half];
    }
}

#endif
