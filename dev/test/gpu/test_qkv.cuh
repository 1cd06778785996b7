// test_qkv.cuh: rows in which q, k and v, or their gradients, lie side by side, for what tests
// attention.
#ifndef DEV_TEST_QKV_CUH
#define DEV_TEST_QKV_CUH

#include "dev/test/gpu/test_gpu.cuh"

// Columns from .. from + count - 1 of rows that are ld apart.
static inline float *columns(const float *x, int n, int ld, int from, int count) {
    size_t width = (size_t)count;
    float *y = gpu_expected((size_t)n * width);
    for (size_t t = 0; t < (size_t)n; t++)
        memcpy(y + t * width, x + t * (size_t)ld + from, width * sizeof *y);
    return y;
}

// dq, dk or dv (part 0, 1, 2): compared one by one, lest one hides behind another. Where every
// query sees one key only, dq and dk are 0: what rounding leaves there is held against 1, the size
// of the inputs.
static inline void compare_gradient(const float *dqkv,      // (n) rows of 3C, ld apart: found
                                    const float *expected,  // (n, 3C)
                                    int part, int n, int C, int ld, const char *shape) {
    static const char *const names[] = {"dq", "dk", "dv"};
    size_t count = (size_t)n * (size_t)C;
    float *wanted = columns(expected, n, 3 * C, part * C, C), *ones = gpu_expected(count);
    GpuArray<floatX> found =
        gpu_copy<floatX>(names[part], columns(dqkv, n, ld, part * C, C), count);
    bool zero = true;
    for (size_t i = 0; i < count; i++) ones[i] = 1, zero = zero && wanted[i] == 0;
    if (zero) {
        found.tolerance = 1e-4;
        gpu_compare_sums(found, wanted, ones, (int)count, shape);
    } else {
        gpu_compare(found, wanted, n, C, "%s", shape);
    }
}

#endif
