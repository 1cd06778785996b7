// sketch.h: 67 numbers that stand for a tensor of any size, so that two of them can be compared
// without both being there.
//
//     sketch[0]      norm          sqrt(sum of x^2)
//     sketch[1]      sum           sum of x
//     sketch[2]      non-zeros     how many elements are not 0
//     sketch[3 + j]  projection j  sum over e of x[e] * s(j, e),  j = 0..63,  s = +1 or -1
//
// s(j, e) is +1 where bit j of word64(e) is set. word64(e) is a half of the four words that
// rand_words({0, 0, RAND_SKETCH}, e/2) makes: 0 (low) and 1 (high) for even e, 2 and 3 for odd e.
// The signs are independent, so the expectation of (pa_j - pb_j)^2 is ||a - b||^2 (Alon, Matias,
// Szegedy 1996; Achlioptas 2003); the root of the mean of 64 of them estimates ||a - b|| with a
// standard error of 9%.
//
// All sums are in double. Elements are taken in chunks of a fixed size and the sums of the chunks
// added in their order, so the bits do not depend on the number of threads.
#ifndef LLMC_SKETCH_H
#define LLMC_SKETCH_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "llmc/rand.h"  // rand_words

enum {
    SKETCH_NORM = 0,
    SKETCH_SUM = 1,
    SKETCH_NONZERO = 2,
    SKETCH_PROJECTION = 3,
    SKETCH_SIZE = 67,
    SKETCH_BLOCK = 128,    // elements whose sign words are made at once
    SKETCH_CHUNK = 32768,  // elements one thread sums up
    SKETCH_ROUND = 64,     // chunks between two additions to the result
};

typedef struct {
    double sign[256][8];
} SketchSigns;  // sign[b][i]: +1 if bit i of b is set, or -1

// words[i] = word64(start + i) for i in 0..SKETCH_BLOCK; start is even.
static inline void sketch_words(uint64_t words[SKETCH_BLOCK], uint64_t start) {
    RandKey key = {0, 0, RAND_SKETCH};
    for (uint64_t i = 0; i < SKETCH_BLOCK; i += 2) {
        uint32_t w[4];
        rand_words(w, key, (start + i) / 2);
        words[i] = (uint64_t)w[1] << 32 | w[0];
        words[i + 1] = (uint64_t)w[3] << 32 | w[2];
    }
}

// Adds x[i] * s(j, i) over n elements to projection[j], for 32 of the 64 projections: those of the
// low (half 0) or high (half 1) half of the words. 32 sums stay in vector registers, 64 do not; nor
// do they when a memcpy takes their address. AMD EPYC (AVX2), one thread, gcc 12 -O3 -march=native:
// 12 ns an element for all 64, of which 5 make the words; 24 ns with memcpy under OpenMP.
static inline void sketch_half(double projection[32], const float *x, int n, const uint64_t *words,
                               int half, const SketchSigns *signs) {
    double sum[32];
    for (int k = 0; k < 32; k++) sum[k] = projection[k];
    for (int i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)(words[i] >> 32 * half);
        double value = x[i];
        for (int g = 0; g < 4; g++, bits >>= 8)
            for (int k = 0; k < 8; k++) sum[8 * g + k] += value * signs->sign[bits & 255][k];
    }
    for (int k = 0; k < 32; k++) projection[k] = sum[k];
}

// The sums over x[0..n), which are the elements start.. of the tensor; the norm is left squared.
static inline void sketch_chunk(double out[SKETCH_SIZE], const float *x, size_t n, uint64_t start,
                                const SketchSigns *signs) {
    uint64_t words[SKETCH_BLOCK];
    memset(out, 0, SKETCH_SIZE * sizeof *out);
    for (size_t i = 0; i < n; i += SKETCH_BLOCK) {
        int count = n - i < SKETCH_BLOCK ? (int)(n - i) : SKETCH_BLOCK;
        sketch_words(words, start + i);
        for (int half = 0; half < 2; half++)
            sketch_half(out + SKETCH_PROJECTION + 32 * half, x + i, count, words, half, signs);
        for (int k = 0; k < count; k++) {
            double value = x[i + (size_t)k];
            out[SKETCH_NORM] += value * value;
            out[SKETCH_SUM] += value;
            out[SKETCH_NONZERO] += value != 0;
        }
    }
}

// The sketch of x[0..n).
static inline void sketch_compute(double out[SKETCH_SIZE], const float *x, size_t n) {
    SketchSigns signs;
    for (int b = 0; b < 256; b++)
        for (int i = 0; i < 8; i++) signs.sign[b][i] = b >> i & 1 ? 1 : -1;
    const size_t chunk = SKETCH_CHUNK, round = chunk * SKETCH_ROUND;
    memset(out, 0, SKETCH_SIZE * sizeof *out);
    for (size_t start = 0; start < n; start += round) {
        double part[SKETCH_ROUND][SKETCH_SIZE];
        int chunks = (int)(((n - start < round ? n - start : round) + chunk - 1) / chunk);
#pragma omp parallel for schedule(dynamic)
        for (int c = 0; c < chunks; c++) {
            size_t first = start + (size_t)c * chunk;
            sketch_chunk(part[c], x + first, n - first < chunk ? n - first : chunk, first, &signs);
        }
        for (int c = 0; c < chunks; c++)
            for (int k = 0; k < SKETCH_SIZE; k++) out[k] += part[c][k];
    }
    out[SKETCH_NORM] = sqrt(out[SKETCH_NORM]);
}

// An estimate of ||a - b|| for the tensors a and b from their sketches.
static inline double sketch_distance(const double a[SKETCH_SIZE], const double b[SKETCH_SIZE]) {
    double sum = 0;
    for (int j = SKETCH_PROJECTION; j < SKETCH_SIZE; j++) sum += (a[j] - b[j]) * (a[j] - b[j]);
    return sqrt(sum / (SKETCH_SIZE - SKETCH_PROJECTION));
}

#endif
