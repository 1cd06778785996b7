// rand.h: random numbers that are a pure function of (seed, stream, purpose, element).
//
// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a 128-bit
// counter and a 64-bit key into four 32-bit words. There is no state: whoever knows the coordinates
// of a number can make it, in any order, on any rank, on CPU or GPU.
//
//     key     = { seed, stream }
//     counter = { low half of element/4, high half of element/4, purpose, 0 }
//     word of element e = output[e % 4]
//
//     purpose          stream               element
//     RAND_PARAMETER   tensor's table index row-major index in the tensor
//     RAND_SHUFFLE     epoch                step of the Fisher-Yates shuffle
//     RAND_SAMPLE      number of the sample position of the token
//     RAND_SKETCH      0                    index in the tensor (sketch.h)
//     RAND_SPLIT       0                    number of the document (dev/data/tokenize.c)
//
// uniform in [0, 1):  (word >> 8) * 2^-24
// normal:             elements 4j and 4j+1 share words 0 and 1, 4j+2 and 4j+3 share words 2 and 3:
//                     r = sqrt(-2 ln(((w_a >> 8) + 1) * 2^-24)), phi = 2 pi (w_b >> 8) * 2^-24,
//                     the even element is r cos(phi), the odd one r sin(phi); computed in double.
#ifndef LLMC_RAND_H
#define LLMC_RAND_H

#include <math.h>
#include <stdint.h>

enum { RAND_PARAMETER = 0, RAND_SHUFFLE = 1, RAND_SAMPLE = 2, RAND_SKETCH = 3, RAND_SPLIT = 4 };

typedef struct {
    uint32_t seed, stream, purpose;
} RandKey;

// The function of the paper: ten rounds over the counter c with the key k.
static inline void rand_philox(uint32_t out[4], uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                               uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1, c3 = (uint32_t)p0;
        c0 = n0, c2 = n2;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// The four words that belong to elements 4*block .. 4*block+3.
static inline void rand_words(uint32_t out[4], RandKey key, uint64_t block) {
    rand_philox(out, (uint32_t)block, (uint32_t)(block >> 32), key.purpose, 0, key.seed,
                key.stream);
}

static inline uint32_t rand_u32(RandKey key, uint64_t element) {
    uint32_t w[4];
    rand_words(w, key, element / 4);
    return w[element % 4];
}

// Uniform in [0, 1), a multiple of 2^-24.
static inline double rand_uniform(RandKey key, uint64_t element) {
    return (rand_u32(key, element) >> 8) * 0x1p-24;
}

// Standard normal.
static inline double rand_normal(RandKey key, uint64_t element) {
    uint32_t w[4];
    rand_words(w, key, element / 4);
    int pair = (int)(element % 4) & 2;
    double radius = sqrt(-2.0 * log(((w[pair] >> 8) + 1) * 0x1p-24));
    double angle = 6.283185307179586 * ((w[pair + 1] >> 8) * 0x1p-24);
    return element % 2 ? radius * sin(angle) : radius * cos(angle);
}

#endif
