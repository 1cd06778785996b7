// test_rand.c: llmc/rand.h against the published answers of Philox4x32-10 and against the moments
// of its two distributions.
#include "dev/test/test.h"
#include "llmc/rand.h"

// The known answers of the Random123 library (kat_vectors, philox4x32 with 10 rounds).
TEST(known_answers) {
    const uint32_t cases[3][10] = {
        // counter                                        key                     output
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09,
         0x94fdcceb, 0x5001e420, 0x24126ea1},
    };
    for (int i = 0; i < 3; i++) {
        const uint32_t *c = cases[i];
        uint32_t out[4];
        rand_philox(out, c[0], c[1], c[2], c[3], c[4], c[5]);
        for (int j = 0; j < 4; j++) CHECK_INT(out[j], c[6 + j]);
    }
}

TEST(words_place_key_and_counter) {
    RandKey key = {5, 6, 7};
    uint32_t found[4], expected[4];
    rand_words(found, key, 0x900000008u);
    rand_philox(expected, 8, 9, 7, 0, 5, 6);
    for (int j = 0; j < 4; j++) CHECK_INT(found[j], expected[j]);
}

TEST(element_is_a_word_of_its_block) {
    RandKey key = {1, 2, 3};
    uint32_t words[4];
    for (uint64_t e = 0; e < 64; e++) {
        uint64_t far = e + (7ull << 40);
        rand_words(words, key, far / 4);
        CHECK_INT(rand_u32(key, far), words[e % 4]);
        CHECK(rand_uniform(key, far) == (words[e % 4] >> 8) / 16777216.0);
    }
}

TEST(uniform_is_in_its_interval) {
    RandKey key = {42, 0, RAND_PARAMETER};
    double low = 1, high = 0, sum = 0, squares = 0;
    enum { N = 200000 };
    for (int e = 0; e < N; e++) {
        double u = rand_uniform(key, (uint64_t)e);
        low = fmin(low, u), high = fmax(high, u), sum += u, squares += u * u;
    }
    CHECK(low >= 0 && low < 1e-4);
    CHECK(high < 1 && high > 1 - 1e-4);
    CHECK_NEAR(sum / N, 0.5, 4 * sqrt(1.0 / 12 / N));  // within 4 standard errors
    CHECK_NEAR(squares / N, 1.0 / 3, 4 * sqrt(4.0 / 45 / N));
}

TEST(normal_has_the_moments_of_one) {
    RandKey key = {42, 1, RAND_PARAMETER};
    enum { N = 200000 };
    double moment[5] = {0}, product = 0, tail = 0, last = 0;
    for (int e = 0; e < N; e++) {
        double z = rand_normal(key, (uint64_t)e), power = 1;
        for (int m = 0; m < 5; m++, power *= z) moment[m] += power / N;
        product += e % 2 ? last * z : 0;  // the two of a pair are independent
        tail += fabs(z) > 1.959964;
        last = z;
    }
    CHECK_NEAR(moment[1], 0, 4 * sqrt(1.0 / N));
    CHECK_NEAR(moment[2], 1, 4 * sqrt(2.0 / N));
    CHECK_NEAR(moment[3], 0, 4 * sqrt(15.0 / N));
    CHECK_NEAR(moment[4], 3, 4 * sqrt(96.0 / N));
    CHECK_NEAR(product / (N / 2), 0, 4 * sqrt(2.0 / N));
    CHECK_NEAR(tail / N, 0.05, 4 * sqrt(0.05 * 0.95 / N));
}

TEST(normal_is_box_muller) {
    RandKey key = {3, 4, 0};
    uint32_t w[4];
    for (uint64_t block = 0; block < 16; block++) {
        rand_words(w, key, block);
        for (int pair = 0; pair < 4; pair += 2) {
            double u = ((w[pair] >> 8) + 1) / 16777216.0, v = (w[pair + 1] >> 8) / 16777216.0;
            double r = sqrt(-2 * log(u)), phi = 8 * atan(1) * v;
            CHECK_NEAR(rand_normal(key, 4 * block + (uint64_t)pair), r * cos(phi), 1e-14 * r);
            CHECK_NEAR(rand_normal(key, 4 * block + (uint64_t)pair + 1), r * sin(phi), 1e-14 * r);
        }
    }
}

// How many of the first n words two keys have in common.
static int equal_words(RandKey a, RandKey b, int n) {
    int equal = 0;
    for (int e = 0; e < n; e++) equal += rand_u32(a, (uint64_t)e) == rand_u32(b, (uint64_t)e);
    return equal;
}

TEST(seeds_streams_and_purposes_differ) {
    RandKey key = {1, 1, 1}, seed = {2, 1, 1}, stream = {1, 2, 1}, purpose = {1, 1, 2};
    CHECK_INT(equal_words(key, key, 1000), 1000);
    CHECK_INT(equal_words(key, seed, 1000), 0);
    CHECK_INT(equal_words(key, stream, 1000), 0);
    CHECK_INT(equal_words(key, purpose, 1000), 0);
    CHECK_INT(equal_words(seed, stream, 1000), 0);
    CHECK_INT(equal_words(stream, purpose, 1000), 0);
}

TEST(purposes_are_distinct) {
    int purposes[] = {RAND_PARAMETER, RAND_SHUFFLE, RAND_SAMPLE, RAND_SKETCH, RAND_SPLIT};
    for (int i = 0; i < 5; i++) CHECK_INT(purposes[i], i);  // files on disk depend on these numbers
}

int main(void) {
    RUN(known_answers);
    RUN(words_place_key_and_counter);
    RUN(element_is_a_word_of_its_block);
    RUN(uniform_is_in_its_interval);
    RUN(normal_has_the_moments_of_one);
    RUN(normal_is_box_muller);
    RUN(seeds_streams_and_purposes_differ);
    RUN(purposes_are_distinct);
    return test_end();
}
