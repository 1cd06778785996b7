// test_sketch.c: llmc/sketch.h against its definition, against figures of a separate program, and
// against what it promises about distances and threads.
#include "dev/test/test.h"
#include "llmc/sketch.h"
#ifdef _OPENMP
#include <omp.h>  // omp_set_num_threads
#endif

// s(j, e) for all j.
static void signs_of(double sign[64], uint64_t e) {
    uint32_t w[4];
    rand_words(w, (RandKey){0, 0, RAND_SKETCH}, e / 2);
    uint64_t word64 = e % 2 ? (uint64_t)w[3] << 32 | w[2] : (uint64_t)w[1] << 32 | w[0];
    for (int j = 0; j < 64; j++) sign[j] = (double)(word64 >> j & 1) * 2 - 1;
}

// The definition, element by element.
static void sketch_plainly(double out[SKETCH_SIZE], const float *x, size_t n) {
    memset(out, 0, SKETCH_SIZE * sizeof *out);
    for (size_t e = 0; e < n; e++) {
        double sign[64];
        signs_of(sign, e);
        for (int j = 0; j < 64; j++) out[3 + j] += sign[j] * x[e];
        out[0] += (double)x[e] * x[e], out[1] += x[e], out[2] += x[e] != 0;
    }
    out[0] = sqrt(out[0]);
}

static float *random_tensor(size_t n, uint32_t seed) {
    float *x = (float *)malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = (float)rand_normal((RandKey){seed, 0, RAND_PARAMETER}, i);
    return x;
}

TEST(equals_the_figures_of_a_separate_program) {
    // x[e] = 0 for e % 5 == 0, else (37 e mod 101 - 50) / 8: all sums are exact. The figures are
    // those of a program of ten lines in Python, written from the comment in sketch.h alone.
    float x[1000];
    double s[SKETCH_SIZE];
    for (int e = 0; e < 1000; e++) x[e] = e % 5 ? (float)(e * 37 % 101 - 50) / 8 : 0;
    sketch_compute(s, x, 1000);
    CHECK(s[0] == 0x1.9ca424e4e1605p+6);
    CHECK(s[1] == -4.875);
    CHECK(s[2] == 792);
    CHECK(s[3] == 44.125);
    CHECK(s[4] == -265.625);
    CHECK(s[34] == 71.125);
    CHECK(s[35] == 137.875);
    CHECK(s[66] == 10.625);
}

TEST(equals_its_definition_at_ragged_sizes) {
    const size_t chunk = SKETCH_CHUNK;
    size_t sizes[] = {0, 1, 2, 3, 127, 128, 129, 1000, chunk - 1, chunk, chunk + 1, 3 * chunk + 77};
    float *x = random_tensor(3 * chunk + 77, 1);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        double fast[SKETCH_SIZE], plain[SKETCH_SIZE];
        sketch_compute(fast, x, sizes[i]);
        sketch_plainly(plain, x, sizes[i]);
        double worst = 0;
        for (int k = 0; k < SKETCH_SIZE; k++) worst = fmax(worst, fabs(fast[k] - plain[k]));
        CHECK_NEAR(worst, 0, 1e-9);
    }
    free(x);
}

TEST(goes_past_one_round_of_chunks) {
    size_t n = (size_t)SKETCH_ROUND * SKETCH_CHUNK + 3 * SKETCH_CHUNK + 5;
    float *x = (float *)calloc(n, sizeof *x);
    x[n - 1] = 2, x[n - 3 * SKETCH_CHUNK] = -1, x[0] = 1;  // few non-zeros: easy to sum up by hand
    double s[SKETCH_SIZE], expected[64] = {0};
    size_t at[] = {0, n - 3 * SKETCH_CHUNK, n - 1};
    for (int k = 0; k < 3; k++) {
        double sign[64];
        signs_of(sign, at[k]);
        for (int j = 0; j < 64; j++) expected[j] += sign[j] * x[at[k]];
    }
    sketch_compute(s, x, n);
    CHECK(!memcmp(s + SKETCH_PROJECTION, expected, sizeof expected));
    CHECK(s[SKETCH_NORM] == sqrt(6));
    CHECK(s[SKETCH_SUM] == 2);
    CHECK(s[SKETCH_NONZERO] == 3);
    free(x);
}

TEST(distance_is_that_of_the_tensors_within_a_few_deviations) {
    size_t n = 20000;
    float *a = random_tensor(n, 2), *b = random_tensor(n, 3);
    double sa[SKETCH_SIZE], sb[SKETCH_SIZE];
    sketch_compute(sa, a, n);
    for (double scale = 1e-6; scale < 2; scale *= 100) {
        double sum = 0;
        float *c = (float *)malloc(n * sizeof *c);
        for (size_t i = 0; i < n; i++) {
            c[i] = a[i] + (float)scale * b[i];
            sum += ((double)c[i] - a[i]) * ((double)c[i] - a[i]);
        }
        sketch_compute(sb, c, n);
        CHECK_NEAR(sketch_distance(sa, sb) / sqrt(sum), 1, 0.3);  // 9% is one deviation
        free(c);
    }
    CHECK(sketch_distance(sa, sa) == 0);
    free(a), free(b);
}

TEST(distance_is_the_root_of_the_mean_square_of_projections) {
    double a[SKETCH_SIZE] = {1, 2, 3}, b[SKETCH_SIZE] = {9, 9, 9};
    for (int j = 0; j < 64; j++) b[3 + j] = j % 2 ? 2 : -2;
    CHECK(sketch_distance(a, b) == 2);
}

TEST(one_element_swapped_with_another_is_seen) {
    size_t n = 5000;
    float *x = random_tensor(n, 4);
    double before[SKETCH_SIZE], after[SKETCH_SIZE];
    sketch_compute(before, x, n);
    float keep = x[10];
    x[10] = x[4000], x[4000] = keep;
    sketch_compute(after, x, n);
    CHECK_NEAR(before[SKETCH_NORM], after[SKETCH_NORM], 1e-9);
    CHECK(sketch_distance(before, after) > 0.5 * fabs(keep - x[10]));
    free(x);
}

TEST(nan_and_infinity_show) {
    float x[3] = {1, NAN, INFINITY};
    double s[SKETCH_SIZE];
    sketch_compute(s, x, 3);
    CHECK(isnan(s[SKETCH_NORM]) && isnan(s[SKETCH_SUM]) && isnan(s[SKETCH_PROJECTION]));
    CHECK(s[SKETCH_NONZERO] == 3);
}

TEST(bits_do_not_depend_on_threads) {
#ifdef _OPENMP
    size_t n = 5 * SKETCH_CHUNK + 11;
    float *x = random_tensor(n, 5);
    double one[SKETCH_SIZE], more[SKETCH_SIZE];
    int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    sketch_compute(one, x, n);
    for (int t = 2; t <= 5; t++) {
        omp_set_num_threads(t);
        sketch_compute(more, x, n);
        CHECK(!memcmp(one, more, sizeof one));
    }
    omp_set_num_threads(threads);
    free(x);
#else
    SKIP("built without OpenMP");
#endif
}

int main(void) {
    RUN(equals_the_figures_of_a_separate_program);
    RUN(equals_its_definition_at_ragged_sizes);
    RUN(goes_past_one_round_of_chunks);
    RUN(distance_is_that_of_the_tensors_within_a_few_deviations);
    RUN(distance_is_the_root_of_the_mean_square_of_projections);
    RUN(one_element_swapped_with_another_is_seen);
    RUN(nan_and_infinity_show);
    RUN(bits_do_not_depend_on_threads);
    return test_end();
}
