// test_sampler.c: llmc/sampler.h: greedy, top-k, and frequencies against the softmax.
#include "dev/test/test.h"
#include "llmc/rand.h"
#include "llmc/sampler.h"

enum { V = 7 };
static const float logits[V] = {0.5f, -1, 2, 1.5f, 2, -3, 0};

TEST(temperature_0_takes_the_largest) {
    for (double u = 0; u < 1; u += 0.09)
        CHECK_INT(sampler_pick(logits, V, 0, 0, u), 2);  // the first of equals
    const float last[3] = {-5, -4, -3};
    CHECK_INT(sampler_pick(last, 3, 0, 0, 0), 2);
    CHECK_INT(sampler_pick(last, 1, 0, 0, 0.5), 0);
}

TEST(top_1_is_greedy) {
    const float z[4] = {0, 3, 2, 1};
    for (double u = 0; u < 1; u += 0.09) CHECK_INT(sampler_pick(z, 4, 1.0, 1, u), 1);
}

TEST(threshold_is_the_kth_largest) {
    const float sorted[V] = {2, 2, 1.5f, 0.5f, 0, -1, -3};
    for (int k = 1; k <= V; k++) CHECK(sampler_threshold(logits, V, k) == sorted[k - 1]);
}

// Draws n times with temperature and top_k; every frequency must be within 4.5 standard errors of
// the softmax over the tokens of `kept`, and 0 outside.
static void check_frequencies(double temperature, int top_k, const int kept[V]) {
    enum { N = 40000 };
    RandKey key = {9, (uint32_t)(1000 * temperature) + (uint32_t)top_k, RAND_SAMPLE};
    int seen[V] = {0};
    double sum = 0;
    for (int i = 0; i < N; i++)
        seen[sampler_pick(logits, V, temperature, top_k, rand_uniform(key, (uint64_t)i))]++;
    for (int v = 0; v < V; v++) sum += kept[v] * exp(logits[v] / temperature);
    for (int v = 0; v < V; v++) {
        double p = kept[v] * exp(logits[v] / temperature) / sum;
        CHECK_NEAR((double)seen[v] / N, p, 4.5 * sqrt(p * (1 - p) / N));
    }
}

TEST(frequencies_are_the_softmax) {
    const int all[V] = {1, 1, 1, 1, 1, 1, 1};
    check_frequencies(1.0, 0, all);
    check_frequencies(0.5, 0, all);
    check_frequencies(3.0, V, all);
    check_frequencies(1.0, 100, all);  // more than there are
}

TEST(frequencies_of_top_k) {
    const int two[V] = {0, 0, 1, 0, 1, 0, 0}, four[V] = {1, 0, 1, 1, 1, 0, 0};
    check_frequencies(1.0, 2, two);
    check_frequencies(1.0, 1, two);  // equal logits stay in together
    check_frequencies(0.7, 4, four);
}

TEST(draw_is_the_inverse_of_the_distribution) {
    const float z[3] = {0, 0, 0};
    CHECK_INT(sampler_pick(z, 3, 1, 0, 0), 0);
    CHECK_INT(sampler_pick(z, 3, 1, 0, 0.3333), 0);
    CHECK_INT(sampler_pick(z, 3, 1, 0, 0.3334), 1);
    CHECK_INT(sampler_pick(z, 3, 1, 0, 0.6667), 2);
    CHECK_INT(sampler_pick(z, 3, 1, 0, 1 - 0x1p-24), 2);
}

TEST(large_logits_do_not_overflow) {
    const float z[3] = {-1e30f, 3e4f, 2e4f};
    for (double u = 0; u < 1; u += 0.09) CHECK_INT(sampler_pick(z, 3, 0.01, 0, u), 1);
}

int main(void) {
    RUN(temperature_0_takes_the_largest);
    RUN(top_1_is_greedy);
    RUN(threshold_is_the_kth_largest);
    RUN(frequencies_are_the_softmax);
    RUN(frequencies_of_top_k);
    RUN(draw_is_the_inverse_of_the_distribution);
    RUN(large_logits_do_not_overflow);
    return test_end();
}
