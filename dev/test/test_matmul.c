// test_matmul.c: llmc/matmul.h against three plain loops in double, over shapes on both sides of
// every block border.
#include <float.h>

#include "dev/test/test.h"
#include "llmc/matmul.h"
#include "llmc/rand.h"

#ifdef _OPENMP
#include <omp.h>
#else
static void omp_set_num_threads(int n) { (void)n; }
static int omp_get_max_threads(void) { return 1; }
#endif

// A fresh array of exactly this size, so that the address sanitizer sees a read outside of it.
static float *numbers(int64_t count, uint32_t stream) {
    float *x = (float *)malloc((size_t)(count ? count : 1) * sizeof *x);
    RandKey key = {1, stream, 0};
    for (int64_t i = 0; i < count; i++) x[i] = (float)(2 * rand_uniform(key, (uint64_t)i) - 1);
    return x;
}

enum { GUARD = 3 };                 // numbers after each row of c that must stay as they are
static const float POISON = 1e30f;  // in them

// Checks one product: c was `before` (NULL: it must not matter) and is now `after`. Every element
// may be off by the error bound of a sum of K products in FP32, in any order.
static void check_product(const float *after, const float *before, MatmulView a, MatmulView b,
                          int M, int N, int K, const char *what) {
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < N + GUARD; j++) {
            int64_t at = (int64_t)i * (N + GUARD) + j;
            double sum = before && j < N ? before[at] : 0, size = fabs(sum);
            for (int k = 0; k < K && j < N; k++) {
                double product = (double)a.at[i * a.row + k * a.col] * b.at[k * b.row + j * b.col];
                sum += product, size += fabs(product);
            }
            if (j >= N) sum = POISON;
            if (fabs(after[at] - sum) <= (K + 2) * (double)FLT_EPSILON / 2 * size) continue;
            test_check(false, __FILE__, __LINE__,
                       "%s of %d x %d x %d at (%d, %d): found %g, expected %g", what, M, N, K, i, j,
                       after[at], sum);
            return;
        }
    }
}

// Runs and checks c (M, N) = a b and c += a b with each operand stored either way.
static void check_shape(int M, int N, int K) {
    float *pa = numbers((int64_t)M * K, 1), *pb = numbers((int64_t)K * N, 2),
          *before = numbers((int64_t)M * (N + GUARD), 3);
    float *c = numbers((int64_t)M * (N + GUARD), 3);
    size_t size = (size_t)M * (size_t)(N + GUARD) * sizeof *c;
    for (int i = 0; i < M; i++)
        for (int j = N; j < N + GUARD; j++) before[i * (N + GUARD) + j] = POISON;
    MatmulView a[2] = {{pa, K, 1}, {pa, 1, M}}, b[2] = {{pb, N, 1}, {pb, 1, K}};
    for (int way = 0; way < 4; way++) {
        memcpy(c, before, size);
        matmul(c, N + GUARD, a[way / 2], b[way % 2], M, N, K, 1);
        check_product(c, before, a[way / 2], b[way % 2], M, N, K, "c +=");
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) c[i * (N + GUARD) + j] = NAN;
        matmul(c, N + GUARD, a[way / 2], b[way % 2], M, N, K, 0);
        check_product(c, NULL, a[way / 2], b[way % 2], M, N, K, "c =");
    }
    free(pa), free(pb), free(before), free(c);
}

TEST(every_small_shape) {
    for (int M = 1; M <= MATMUL_MR + 1; M++)
        for (int N = 1; N <= MATMUL_NR + 1; N++)
            for (int K = 0; K <= 3; K++) check_shape(M, N, K);
}

TEST(borders_of_the_tile) {
    for (int M = 2 * MATMUL_MR - 1; M <= 2 * MATMUL_MR + 1; M++)
        for (int N = 2 * MATMUL_NR - 1; N <= 2 * MATMUL_NR + 1; N++) check_shape(M, N, 9);
}

TEST(borders_of_the_blocks) {
    for (int d = -1; d <= 1; d++) {
        check_shape(MATMUL_MC + d, 5, 7);
        check_shape(5, MATMUL_NC + d, 7);
        check_shape(5, 7, MATMUL_KC + d);
        check_shape(MATMUL_MC + d, MATMUL_NC - d, 3);
        check_shape(7, MATMUL_NC + d, MATMUL_KC + d);
        check_shape(MATMUL_MC + d, 17, MATMUL_KC + d);
    }
}

TEST(several_blocks_each_way) {
    check_shape(2 * MATMUL_MC + 1, MATMUL_NC + 3, 5);
    check_shape(3, 2 * MATMUL_NC + 1, 5);
    check_shape(2, 3, 3 * MATMUL_KC + 1);
    check_shape(37, 101, 2 * MATMUL_KC + 5);
}

TEST(no_products_give_zero_or_nothing) {
    float c[2] = {NAN, 5}, *nothing = numbers(0, 1);
    MatmulView none = {nothing, 0, 1};
    matmul(c, 1, none, none, 1, 1, 0, 0);
    CHECK(c[0] == 0);
    matmul(c + 1, 1, none, none, 1, 1, 0, 1);
    CHECK(c[1] == 5);
    matmul(c, 1, none, none, 0, 1, 3, 0);  // no rows, no columns: nothing is touched
    matmul(c, 1, none, none, 1, 0, 3, 0);
    CHECK(c[0] == 0);
    free(nothing);
}

TEST(any_strides_will_do) {
    enum { M = 13, N = 35, K = 21 };
    float *pa = numbers(M * 100, 1), *pb = numbers(K * 200, 2), *c = numbers(M * (N + GUARD), 3);
    for (int i = 0; i < M; i++)
        for (int j = N; j < N + GUARD; j++) c[i * (N + GUARD) + j] = POISON;
    MatmulView a = {pa, 100, 3}, b = {pb, 200, 5};
    matmul(c, N + GUARD, a, b, M, N, K, 0);
    check_product(c, NULL, a, b, M, N, K, "c =");
    free(pa), free(pb), free(c);
}

// The three products of a linear layer over n rows.
static void check_linear(int n, int in, int out) {
    float *x = numbers((int64_t)n * in, 1), *w = numbers((int64_t)out * in, 2),
          *dy = numbers((int64_t)n * out, 3);
    float *y = numbers((int64_t)n * out, 4), *dx = numbers((int64_t)n * in, 5),
          *dw = numbers((int64_t)out * in, 6);
    float *before = numbers((int64_t)out * in, 6);
    matmul_forward(y, x, w, n, in, out);
    matmul_dgrad(dx, dy, w, n, in, out);
    matmul_wgrad(dw, dy, x, n, in, out);
    double worst[3] = {0};
    for (int r = 0; r < n; r++)
        for (int o = 0; o < out; o++) {
            double sum = 0;
            for (int i = 0; i < in; i++) sum += (double)x[r * in + i] * w[o * in + i];
            worst[0] = fmax(worst[0], fabs(y[r * out + o] - sum));
        }
    for (int r = 0; r < n; r++)
        for (int i = 0; i < in; i++) {
            double sum = 0;
            for (int o = 0; o < out; o++) sum += (double)dy[r * out + o] * w[o * in + i];
            worst[1] = fmax(worst[1], fabs(dx[r * in + i] - sum));
        }
    for (int o = 0; o < out; o++)
        for (int i = 0; i < in; i++) {
            double sum = before[o * in + i];
            for (int r = 0; r < n; r++) sum += (double)dy[r * out + o] * x[r * in + i];
            worst[2] = fmax(worst[2], fabs(dw[o * in + i] - sum));
        }
    for (int k = 0; k < 3; k++)
        test_check(worst[k] < 1e-4, __FILE__, __LINE__, "%d x %d x %d, product %d: off by %g", n,
                   in, out, k, worst[k]);
    free(x), free(w), free(dy), free(y), free(dx), free(dw), free(before);
}

TEST(linear_layer) {
    check_linear(1, 1, 1);
    check_linear(1, 24, 48);
    check_linear(7, 64, 192);
    check_linear(130, 33, 257);
    check_linear(65, 264, 12);
}

// Runs all three products of one layer and returns their bits.
static float *linear_bits(int n, int in, int out, size_t *size) {
    float *x = numbers((int64_t)n * in, 1), *w = numbers((int64_t)out * in, 2),
          *dy = numbers((int64_t)n * out, 3);
    int64_t ny = (int64_t)n * out, nx = (int64_t)n * in, nw = (int64_t)out * in;
    float *all = numbers(ny + nx + nw, 4);
    matmul_forward(all, x, w, n, in, out);
    matmul_dgrad(all + ny, dy, w, n, in, out);
    matmul_wgrad(all + ny + nx, dy, x, n, in, out);
    free(x), free(w), free(dy);
    *size = (size_t)(ny + nx + nw) * sizeof *all;
    return all;
}

TEST(bits_do_not_depend_on_threads) {
    const int shapes[][3] = {{1, 64, 64}, {100, 300, 70}, {500, 130, 800}, {33, 600, 520}};
    int threads = omp_get_max_threads();
    for (int s = 0; s < 4; s++) {
        size_t size;
        omp_set_num_threads(1);
        float *one = linear_bits(shapes[s][0], shapes[s][1], shapes[s][2], &size);
        for (int t = 2; t <= 4; t++) {
            omp_set_num_threads(t);
            float *more = linear_bits(shapes[s][0], shapes[s][1], shapes[s][2], &size);
            test_check(!memcmp(one, more, size), __FILE__, __LINE__,
                       "shape %d with %d threads: other bits", s, t);
            free(more);
        }
        free(one);
    }
    omp_set_num_threads(threads);
}

TEST(bits_of_a_row_do_not_depend_on_the_other_rows) {
    enum { N = 200, IN = 300, OUT = 500 };
    float *x = numbers(N * IN, 1), *w = numbers(OUT * IN, 2), *y = numbers(N * OUT, 3),
          *row = numbers(OUT, 4);
    matmul_forward(y, x, w, N, IN, OUT);
    for (int i = 0; i < N; i += 19) {
        matmul_forward(row, x + i * IN, w, 1, IN, OUT);
        CHECK(!memcmp(row, y + i * OUT, OUT * sizeof *row));
    }
    free(x), free(w), free(y), free(row);
}

TEST(nan_and_infinity_come_through_where_they_belong) {
    enum { N = 20, IN = 300, OUT = 40 };
    float *x = numbers(N * IN, 1), *w = numbers(OUT * IN, 2), *y = numbers(N * OUT, 3);
    x[7 * IN + 299] = NAN;
    w[33 * IN + 5] = INFINITY;
    matmul_forward(y, x, w, N, IN, OUT);
    for (int i = 0; i < N; i++)
        for (int j = 0; j < OUT; j++) CHECK(!isfinite(y[i * OUT + j]) == (i == 7 || j == 33));
    free(x), free(w), free(y);
}

int main(void) {
    RUN(every_small_shape);
    RUN(borders_of_the_tile);
    RUN(borders_of_the_blocks);
    RUN(several_blocks_each_way);
    RUN(no_products_give_zero_or_nothing);
    RUN(any_strides_will_do);
    RUN(linear_layer);
    RUN(bits_do_not_depend_on_threads);
    RUN(bits_of_a_row_do_not_depend_on_the_other_rows);
    RUN(nan_and_infinity_come_through_where_they_belong);
    return test_end();
}
