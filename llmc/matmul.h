// matmul.h: C = A B on the CPU, the one loop worth tuning: 95% of a training step's time.
//
//     c[i][j] (+)= sum_k a(i,k) b(k,j)         i < M, j < N, k < K
//
// a and b are read through two strides each, so that one routine serves a linear layer's forward
// pass, its data gradient and its weight gradient (W is stored (out, in)):
//
//     forward  y  (n, out) = x (n, in) W^T      b(k,j) = W[j][k]
//     dgrad    dx (n, in)  = dy (n, out) W      b(k,j) = W[k][j]
//     wgrad    dW (out, in) += dy^T x           a(i,k) = dy[k][i], b(k,j) = x[k][j]
//
// After Goto and van de Geijn 2008 ("Anatomy of high-performance matrix multiplication"): blocks of
// a and b are copied into the order in which the innermost loop reads them, b's strips of KC x NR
// (16 KB, in L1) and a's block of MC x KC (192 KB, in L2); a tile of MR x NR sums stays in registers.
//
//         N ->                 one strip of b: k = 0: NR numbers, k = 1: NR numbers, ...
//     M  +--+--+--+            one strip of a: k = 0: MR numbers, k = 1: MR numbers, ...
//     |  |  |  |  | MC x NC    inner loop: MR x NR sums += a's MR numbers times b's NR
//        +--+--+--+
//
// Threads take whole MC x NC blocks of c and share nothing; k always runs upward in steps of KC. So
// the sum behind each element has one order, and the bits do not depend on the number of threads.
#ifndef LLMC_MATMUL_H
#define LLMC_MATMUL_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
enum { MATMUL_LANES = 16, MATMUL_MR = 12 };  // 24 of 32 registers hold sums
#else
enum { MATMUL_LANES = 8, MATMUL_MR = 6 };    // 12 of 16
#endif
enum { MATMUL_NR = 2 * MATMUL_LANES, MATMUL_KC = 256, MATMUL_MC = 192, MATMUL_NC = 384 };

typedef float MatmulVec __attribute__((vector_size(MATMUL_LANES * sizeof(float)), aligned(4), may_alias));

// An operand: element (r, s) of the matrix is at[r * row + s * col].
typedef struct {
    const float *at;
    int64_t row, col;
} MatmulView;

// Copies `count` lines of `depth` elements each into strips of `width` lines: strip s holds, for each
// depth index in turn, its `width` elements. Missing lines of the last strip are 0.
static inline void matmul_pack(float *out, const float *in, int64_t line, int64_t deep, int count, int depth, int width) {
    for (int s = 0; s < count; s += width, out += (size_t)width * (size_t)depth) {
        int n = count - s < width ? count - s : width;
        const float *strip = in + s * line;
        if (n < width) memset(out, 0, sizeof *out * (size_t)width * (size_t)depth);
        if (line == 1) {
            for (int k = 0; k < depth; k++)
                for (int i = 0; i < n; i++) out[k * width + i] = strip[k * deep + i];
        } else {
            for (int i = 0; i < n; i++)
                for (int k = 0; k < depth; k++) out[k * width + i] = strip[i * line + k * deep];
        }
    }
}

// One MR x NR tile: a strip of a times a strip of b, over `depth`. rows, cols: how much of the tile
// lies inside c. add: on top of what c holds.
static inline void matmul_tile(float *c, int64_t c_row, const float *a, const float *b, int depth, int rows, int cols, int add) {
    MatmulVec sum[MATMUL_MR][2];
    memset(sum, 0, sizeof sum);
    for (int k = 0; k < depth; k++, a += MATMUL_MR, b += MATMUL_NR) {
        MatmulVec b0 = *(const MatmulVec *)b, b1 = *(const MatmulVec *)(b + MATMUL_LANES);
#pragma GCC unroll 12
        for (int i = 0; i < MATMUL_MR; i++) {
            sum[i][0] += a[i] * b0;
            sum[i][1] += a[i] * b1;
        }
    }
    for (int i = 0; i < rows; i++) {
        const float *s = (const float *)sum[i];
        float *out = c + i * c_row;
        for (int j = 0; j < cols; j++) out[j] = add ? out[j] + s[j] : s[j];
    }
}

// c (M, N), rows c_row apart. add: c += a b, else c = a b. K may be 0.
static inline void matmul(float *c, int64_t c_row, MatmulView a, MatmulView b, int64_t M, int64_t N, int64_t K, int add) {
    int64_t down = (M + MATMUL_MC - 1) / MATMUL_MC, across = (N + MATMUL_NC - 1) / MATMUL_NC;
#pragma omp parallel
    {
        float *memory = (float *)aligned_alloc(64, sizeof(float) * MATMUL_KC * (MATMUL_MC + MATMUL_NC));
        float *pack_a = memory, *pack_b = memory + MATMUL_KC * MATMUL_MC;
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < down * across; block++) {
            int64_t i0 = block / across * MATMUL_MC, j0 = block % across * MATMUL_NC;
            int rows = (int)(M - i0 < MATMUL_MC ? M - i0 : MATMUL_MC), cols = (int)(N - j0 < MATMUL_NC ? N - j0 : MATMUL_NC);
            for (int64_t k0 = 0; k0 < K || k0 == 0; k0 += MATMUL_KC) {
                int depth = (int)(K - k0 < MATMUL_KC ? K - k0 : MATMUL_KC);
                matmul_pack(pack_a, a.at + i0 * a.row + k0 * a.col, a.row, a.col, rows, depth, MATMUL_MR);
                matmul_pack(pack_b, b.at + k0 * b.row + j0 * b.col, b.col, b.row, cols, depth, MATMUL_NR);
                for (int j = 0; j < cols; j += MATMUL_NR)
                    for (int i = 0; i < rows; i += MATMUL_MR)
                        matmul_tile(c + (i0 + i) * c_row + j0 + j, c_row, pack_a + i * depth, pack_b + j * depth, depth,
                                    rows - i < MATMUL_MR ? rows - i : MATMUL_MR, cols - j < MATMUL_NR ? cols - j : MATMUL_NR,
                                    add || k0 > 0);
            }
        }
        free(memory);
    }
}

// The three products of a linear layer y = x W^T, W (out, in), over n rows. wgrad adds to dw.
static inline void matmul_forward(float *y, const float *x, const float *w, int64_t n, int64_t in, int64_t out) {
    MatmulView a = {x, in, 1}, b = {w, 1, in};
    matmul(y, out, a, b, n, out, in, 0);
}

static inline void matmul_dgrad(float *dx, const float *dy, const float *w, int64_t n, int64_t in, int64_t out) {
    MatmulView a = {dy, out, 1}, b = {w, in, 1};
    matmul(dx, in, a, b, n, in, out, 0);
}

static inline void matmul_wgrad(float *dw, const float *dy, const float *x, int64_t n, int64_t in, int64_t out) {
    MatmulView a = {dy, 1, out}, b = {x, in, 1};
    matmul(dw, in, a, b, out, in, n, 1);
}

#endif
