// matmul.h: C = A B on the CPU, the loop where most of a training step's time goes.
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
// After Goto and van de Geijn 2008 ("Anatomy of high-performance matrix multiplication"). c is cut
// into blocks, at most MC x NC large; a thread takes one block and, for each KC steps of k,
//
//     1. packs its part of a and of b into strips, in the order in which 2 reads them
//            strip of a: k = 0: MR numbers, k = 1: MR numbers, ...    6 KB; all, 384 KB, fit L2
//            strip of b: k = 0: NR numbers, k = 1: NR numbers, ...   16 KB; one fits L1
//     2. for each strip of b and each strip of a computes a tile: MR x NR sums, in registers
//
// Threads share nothing but the input. The sum of each element of c runs through k upward in
// steps of KC, whatever the blocks: the bits depend neither on the number of threads nor on M, N.
#ifndef LLMC_MATMUL_H
#define LLMC_MATMUL_H

#include <stdint.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "llmc/die.h"  // die, EXIT_INTERNAL

#if defined __AVX512F__ && !defined __clang__  // clang cuts vectors of 16 in two, and spills
enum { MATMUL_LANES = 16, MATMUL_MR = 12 };    // 24 of 32 registers hold sums
#elif defined __AVX__
enum { MATMUL_LANES = 8, MATMUL_MR = 6 };  // 12 of 16
#else
enum { MATMUL_LANES = 4, MATMUL_MR = 6 };
#endif
enum { MATMUL_NR = 2 * MATMUL_LANES, MATMUL_MC = 384, MATMUL_NC = 768, MATMUL_KC = 256 };

typedef float MatmulVec
    __attribute__((vector_size(MATMUL_LANES * sizeof(float)), aligned(4), may_alias));

// An operand: element (r, s) of the matrix is at[r * row + s * col].
typedef struct {
    const float *at;
    int64_t row, col;
} MatmulView;

static inline int matmul_min(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

// Packs `n` lines of `depth` elements into one strip `width` wide; lines from n on are 0. A line's
// elements are `deep` apart, lines are `line` apart.
static inline void matmul_pack(float *strip, const float *in, int64_t line, int64_t deep, int n,
                               int depth, int width) {
    if (n < width) {
        for (int k = 0; k < depth; k++)
            for (int i = 0; i < width; i++)
                strip[k * width + i] = i < n ? in[i * line + k * deep] : 0;
    } else if (line == 1) {
        for (int k = 0; k < depth; k++)
            for (int i = 0; i < width; i++) strip[k * width + i] = in[i + k * deep];
    } else {
        for (int k = 0; k < depth; k++)
            for (int i = 0; i < width; i++) strip[k * width + i] = in[i * line + k * deep];
    }
}

// One tile: a strip of a times a strip of b. rows, cols: how much of it lies inside c. add: on top
// of what c holds.
static inline void matmul_tile(float *c, int64_t c_row, const float *a, const float *b, int depth,
                               int rows, int cols, int add) {
    MatmulVec sum[MATMUL_MR][2], zero = {0};
    for (int i = 0; i < MATMUL_MR; i++) sum[i][0] = sum[i][1] = zero;
    // c is in no near cache: it is fetched while the sums run. On one core of a Zen 3, wgrad of
    // 1024 x 768 x 3072: 79 GFLOP/s without, 87 with; of 256 x 256 x 50257: 61 and 77.
    for (int i = 0; i < rows; i++)
        __builtin_prefetch(c + i * c_row, 1), __builtin_prefetch(c + i * c_row + cols - 1, 1);
    for (int k = 0; k < depth; k++, a += MATMUL_MR, b += MATMUL_NR) {
        MatmulVec b0 = *(const MatmulVec *)b, b1 = *(const MatmulVec *)(b + MATMUL_LANES);
#pragma GCC unroll 12
        for (int i = 0; i < MATMUL_MR; i++) {
            sum[i][0] += a[i] * b0;
            sum[i][1] += a[i] * b1;
        }
    }
    if (rows == MATMUL_MR && cols == MATMUL_NR) {
#pragma GCC unroll 12
        for (int i = 0; i < MATMUL_MR; i++) {
            MatmulVec *out = (MatmulVec *)(c + i * c_row);
            if (add) sum[i][0] += out[0], sum[i][1] += out[1];
            out[0] = sum[i][0], out[1] = sum[i][1];
        }
        return;
    }
    for (int i = 0; i < rows; i++) {
        const float *s = (const float *)sum[i];
        float *out = c + i * c_row;
        for (int j = 0; j < cols; j++) out[j] = add ? out[j] + s[j] : s[j];
    }
}

// One block: c (rows, cols) (+)= a b. strips: memory for the block's strips.
static inline void matmul_block(float *c, int64_t c_row, MatmulView a, MatmulView b, int rows,
                                int cols, int64_t K, int add, float *strips) {
    for (int64_t k = 0; k < K || k == 0; k += MATMUL_KC) {
        int depth = matmul_min(K - k, MATMUL_KC), packed = 0;
        float *pack_a = strips;
        for (; packed < rows; packed += MATMUL_MR)
            matmul_pack(pack_a + packed * depth, a.at + packed * a.row + k * a.col, a.row, a.col,
                        matmul_min(rows - packed, MATMUL_MR), depth, MATMUL_MR);
        float *pack_b = pack_a + packed * depth;
        for (int j = 0; j < cols; j += MATMUL_NR)
            matmul_pack(pack_b + j * depth, b.at + k * b.row + j * b.col, b.col, b.row,
                        matmul_min(cols - j, MATMUL_NR), depth, MATMUL_NR);
        for (int j = 0; j < cols; j += MATMUL_NR)
            for (int i = 0; i < rows; i += MATMUL_MR)
                matmul_tile(c + i * c_row + j, c_row, pack_a + i * depth, pack_b + j * depth, depth,
                            matmul_min(rows - i, MATMUL_MR), matmul_min(cols - j, MATMUL_NR),
                            add || k > 0);
    }
}

// Size of a piece, a multiple of `unit`, when n is cut into `pieces` or fewer.
static inline int64_t matmul_piece(int64_t n, int64_t pieces, int64_t unit) {
    return (n + pieces * unit - 1) / (pieces * unit) * unit;
}

// Rows and columns of a block of c (M, N). Large blocks pack less: a number of a serves one product
// in each column of the block, a number of b one in each row. But there should be about six blocks
// for each thread, so that none waits long for the last; or, where those would be too small, as
// many for each.
static inline void matmul_block_size(int64_t *rows, int64_t *cols, int64_t M, int64_t N) {
    int64_t down = (M - 1) / MATMUL_MC + 1, across = (N - 1) / MATMUL_NC + 1, threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    while (threads > 1 && down * across < 6 * threads) {
        int64_t longer = M / down > N / across ? M / down : N / across;
        if (longer <= (down * across % threads ? 48 : 192)) break;
        *(M / down == longer ? &down : &across) += 1;
    }
    *rows = matmul_piece(M, down, MATMUL_MR);
    *cols = matmul_piece(N, across, MATMUL_NR);
}

// c (M, N), rows c_row apart. add: c += a b, else c = a b. K may be 0.
static inline void matmul(float *c, int64_t c_row, MatmulView a, MatmulView b, int64_t M, int64_t N,
                          int64_t K, int add) {
    if (M < 1 || N < 1) return;
    int64_t rows, cols;
    matmul_block_size(&rows, &cols, M, N);
#pragma omp parallel if ((double)M * N * K > 1e6)  // below, waking the threads takes longer
    {
        float *strips =
            (float *)aligned_alloc(64, sizeof(float) * MATMUL_KC * (size_t)(rows + cols));
        if (!strips) die(EXIT_INTERNAL, "out of memory for the blocks of a product");
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t i = 0; i < M; i += rows)
            for (int64_t j = 0; j < N; j += cols) {
                MatmulView ai = {a.at + i * a.row, a.row, a.col},
                           bj = {b.at + j * b.col, b.row, b.col};
                matmul_block(c + i * c_row + j, c_row, ai, bj, matmul_min(M - i, rows),
                             matmul_min(N - j, cols), K, add, strips);
            }
        free(strips);
    }
}

// The three products of a linear layer y = x W^T, W (out, in), over n rows. wgrad adds to dw.
static inline void matmul_forward(float *y, const float *x, const float *w, int64_t n, int64_t in,
                                  int64_t out) {
    MatmulView a = {x, in, 1}, b = {w, 1, in};
    matmul(y, out, a, b, n, out, in, 0);
}

static inline void matmul_dgrad(float *dx, const float *dy, const float *w, int64_t n, int64_t in,
                                int64_t out) {
    MatmulView a = {dy, out, 1}, b = {w, in, 1};
    matmul(dx, in, a, b, n, in, out, 0);
}

static inline void matmul_wgrad(float *dw, const float *dy, const float *x, int64_t n, int64_t in,
                                int64_t out) {
    MatmulView a = {dy, 1, out}, b = {x, in, 1};
    matmul(dw, in, a, b, out, in, n, 1);
}

#endif
