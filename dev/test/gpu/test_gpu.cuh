// test_gpu.cuh: what every GPU test is made of. A test runs a kernel beside its twin of
// train_gpt2.c (twin.h) on the same numbers and compares what both wrote.
//
//     TEST(norm) {
//         for (int n : {1, 2, 63}) {
//             int C = 128;
//             GpuArray<floatX> x = gpu_normal<floatX>("x", n * C, 1);  // x.host: as floatX holds it
//             GpuArray<floatX> y = gpu_poisoned<floatX>("y", n * C);
//             GpuArray<float> r = gpu_poisoned<float>("r", n);
//             float *y_expected = gpu_expected(n * C), *r_expected = gpu_expected(n);
//             residual_norm_forward(y.device, r.device, {x.device, NULL, NULL}, n, C, 0);
//             cpu::norm_forward(y_expected, r_expected, x.host, n, C);
//             gpu_compare(y, y_expected, n, C, "n %d, C %d", n, C);
//             gpu_compare(r, r_expected, n, 1, "n %d, C %d", n, C);
//             gpu_end_case();                                            // frees, checks the guards
//         }
//     }
//     int main(void) { gpu_test_begin(); RUN(norm); return test_end(); }
//
// RULE, for what was found, a, and what is expected, b:
//
//     ||a - b|| <= tolerance ||b||,   each |a - b| <= 8 tolerance max(|b|, rms b)
//
// so that every element is finite, and all are exactly 0 if all of b is. (That single ones are
// exactly 0, a test checks by itself.) The tolerance goes with the array's type; an FP32 array that
// a kernel fills from numbers it rounded to BF16 first is given the other one: x.tolerance =
// TOLERANCE_X. A sum whose terms cancel is held against their sizes: gpu_compare_sums.
//
// Memory is poisoned (NaN) where a kernel shall write, and before and after every array lie guard
// zones of NaN: what is read there spoils the result, what is written there fails the test. With
// GRID=small, which is for the sanitizers, shapes are few and the guards are left out, so that the
// sanitizer sees the true ends.
#ifndef DEV_TEST_GPU_CUH
#define DEV_TEST_GPU_CUH

#include <stdarg.h>
#include <unistd.h>

#include "dev/test/gpu/twin.h"   // namespace cpu
#include "dev/test/test.h"       // TEST, RUN, CHECK, test_end
#include "llmc/cuda_common.cuh"  // floatX, gpu_init, CUDA_CHECK
#include "llmc/rand.h"           // rand_uniform, rand_normal

constexpr double TOLERANCE_FP32 = 1e-5, TOLERANCE_BF16 = 1e-2;
constexpr double TOLERANCE_X = sizeof(floatX) == 4 ? TOLERANCE_FP32 : TOLERANCE_BF16;
template <class T> constexpr double tolerance_of = sizeof(T) == 2 ? TOLERANCE_BF16 : TOLERANCE_FP32;

static bool grid_small;  // GRID=small: few small shapes, every kernel instantiation once
static Gpu test_gpu;

// ---------------------------------------------------------------------------------------------
// Arrays, all known to a list so that gpu_end_case can check and free them.

template <class T> struct GpuArray {
    T *device;
    float *host;  // the values as floats, as T holds them; of a poisoned array NaN
    size_t count;
    const char *name;
    double tolerance;
};

typedef struct {
    char *memory;  // guard, array, guard
    size_t bytes;  // of the array
    void *host;
    const char *name;
} GpuMemory;

enum { GPU_GUARD = 4096, GPU_ARRAYS = 256 };
static GpuMemory gpu_memory[GPU_ARRAYS];
static int gpu_memory_count;
static void *gpu_hosts[GPU_ARRAYS];
static int gpu_hosts_count;

static inline size_t gpu_guard(void) { return grid_small ? 0 : GPU_GUARD; }

// Device memory of 0xff bytes (NaN in every type, -1 in int) with guards around it.
static inline void *gpu_bytes(const char *name, size_t bytes) {
    GpuMemory *m = &gpu_memory[gpu_memory_count++];
    if (gpu_memory_count > GPU_ARRAYS) die(EXIT_INTERNAL, "more arrays than GPU_ARRAYS in a case");
    size_t all = bytes + 2 * gpu_guard();
    CUDA_CHECK(cudaMalloc((void **)&m->memory, all ? all : 1));
    CUDA_CHECK(cudaMemset(m->memory, 0xff, all));
    m->bytes = bytes, m->name = name;
    return m->memory + gpu_guard();
}

// Host memory of zeros, freed by gpu_end_case: for what the twin computes.
template <class T = float> static inline T *gpu_expected(size_t count) {
    if (gpu_hosts_count == GPU_ARRAYS) die(EXIT_INTERNAL, "more arrays than GPU_ARRAYS in a case");
    gpu_hosts[gpu_hosts_count] = calloc(count + 1, sizeof(T));
    return (T *)gpu_hosts[gpu_hosts_count++];
}

static inline void to_host(float *to, float from) { *to = from; }
static inline void to_host(float *to, bf16 from) { *to = __bfloat162float(from); }
static inline void from_host(float *to, float from) { *to = from; }
static inline void from_host(bf16 *to, float from) { *to = __float2bfloat16_rn(from); }

// An array that a kernel shall write.
template <class T> static inline GpuArray<T> gpu_poisoned(const char *name, size_t count) {
    GpuArray<T> x = {(T *)gpu_bytes(name, count * sizeof(T)), gpu_expected<float>(count), count,
                     name, tolerance_of<T>};
    for (size_t i = 0; i < count; i++) x.host[i] = NAN;
    return x;
}

// An array of given numbers, rounded to T.
template <class T>
static inline GpuArray<T> gpu_copy(const char *name, const float *values, size_t count) {
    GpuArray<T> x = gpu_poisoned<T>(name, count);
    T *rounded = (T *)die_alloc(count + 1, sizeof(T), name);
    for (size_t i = 0; i < count; i++)
        from_host(&rounded[i], values[i]), to_host(&x.host[i], rounded[i]);
    CUDA_CHECK(cudaMemcpy(x.device, rounded, count * sizeof(T), cudaMemcpyHostToDevice));
    free(rounded);
    return x;
}

// No two arrays of a program are filled with the same random numbers.
static inline RandKey gpu_fresh_key(void) {
    static uint32_t stream;
    return RandKey{1, stream++, 100};
}

// Normal numbers of a standard deviation.
template <class T>
static inline GpuArray<T> gpu_normal(const char *name, size_t count, double std) {
    RandKey key = gpu_fresh_key();
    float *values = (float *)die_alloc(count + 1, sizeof(float), name);
#pragma omp parallel for
    for (int64_t i = 0; i < (int64_t)count; i++)
        values[i] = (float)(std * rand_normal(key, (uint64_t)i));
    GpuArray<T> x = gpu_copy<T>(name, values, count);
    free(values);
    return x;
}

// Uniform numbers in [low, high).
template <class T>
static inline GpuArray<T> gpu_random(const char *name, size_t count, double low, double high) {
    RandKey key = gpu_fresh_key();
    float *values = (float *)die_alloc(count + 1, sizeof(float), name);
#pragma omp parallel for
    for (int64_t i = 0; i < (int64_t)count; i++)
        values[i] = (float)(low + (high - low) * rand_uniform(key, (uint64_t)i));
    GpuArray<T> x = gpu_copy<T>(name, values, count);
    free(values);
    return x;
}

// Rotary's table of pairs on the device, from the CPU's two.
static inline const float2 *gpu_angles(const float *cosine, const float *sine, size_t count) {
    float *pairs = gpu_expected(2 * count);
    for (size_t i = 0; i < count; i++) pairs[2 * i] = cosine[i], pairs[2 * i + 1] = sine[i];
    return (const float2 *)gpu_copy<float>("angles", pairs, 2 * count).device;
}

// Given ints on the device.
static inline int *gpu_ints(const char *name, const int *values, size_t count) {
    int *device = (int *)gpu_bytes(name, count * sizeof(int));
    CUDA_CHECK(cudaMemcpy(device, values, count * sizeof(int), cudaMemcpyHostToDevice));
    return device;
}

// Whether so much device memory is left. A test that is larger than some GPUs is skipped there.
static inline bool gpu_has_room(size_t bytes) {
    size_t left = 0, all = 0;
    CUDA_CHECK(cudaMemGetInfo(&left, &all));
    return bytes + ((size_t)1 << 30) < left;
}

// What the device holds now, as floats: to x.host, which is returned.
template <class T> static inline float *gpu_read(GpuArray<T> &x) {
    T *raw = (T *)die_alloc(x.count + 1, sizeof(T), x.name);
    CUDA_CHECK(cudaMemcpy(raw, x.device, x.count * sizeof(T), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < x.count; i++) to_host(&x.host[i], raw[i]);
    free(raw);
    return x.host;
}

// Whether the device holds the same bits in two arrays.
template <class T> static inline bool same_bits(const GpuArray<T> &a, const GpuArray<T> &b) {
    T *x = gpu_expected<T>(a.count), *y = gpu_expected<T>(a.count);
    CUDA_CHECK(cudaMemcpy(x, a.device, a.count * sizeof(T), cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaMemcpy(y, b.device, a.count * sizeof(T), cudaMemcpyDeviceToHost));
    return !memcmp(x, y, a.count * sizeof(T));
}

// Ends a case: waits, checks every guard zone, frees all arrays.
static inline void gpu_end_case(void) {
    CUDA_CHECK(cudaDeviceSynchronize());
    for (int i = 0; i < gpu_memory_count; i++) {
        GpuMemory *m = &gpu_memory[i];
        unsigned char guards[2][GPU_GUARD];
        size_t guard = gpu_guard();
        CUDA_CHECK(cudaMemcpy(guards[0], m->memory, guard, cudaMemcpyDeviceToHost));
        CUDA_CHECK(
            cudaMemcpy(guards[1], m->memory + guard + m->bytes, guard, cudaMemcpyDeviceToHost));
        for (size_t k = 0; k < 2 * guard; k++)
            if (guards[k / guard][k % guard] != 0xff) {
                test_check(false, __FILE__, __LINE__, "%s: written %s its memory, at byte %lld",
                           m->name, k < guard ? "before" : "after",
                           k < guard ? (long long)k - (long long)guard
                                     : (long long)(m->bytes + k - guard));
                break;
            }
        CUDA_CHECK(cudaFree(m->memory));
    }
    for (int i = 0; i < gpu_hosts_count; i++) free(gpu_hosts[i]);
    gpu_memory_count = gpu_hosts_count = 0;
}

// ---------------------------------------------------------------------------------------------
// Comparing.

// Says what is wrong with element i of an array of `cols` columns.
static inline void gpu_differs(const char *file, int line, const char *name, const char *shape,
                               size_t i, int cols, double found, double expected,
                               const char *what) {
    test_check(false, file, line, "%s[%zu][%zu] of %s: found %.9g, expected %.9g (%s)", name,
               i / (size_t)cols, i % (size_t)cols, shape, found, expected, what);
}

// got (rows, cols) on the device against expected by the rule above; format, ...: the shape of the
// case, for the message. Call it as gpu_compare(got, expected, rows, cols, format, ...).
template <class T>
__attribute__((format(printf, 7, 8))) static inline void
gpu_compare_at(const char *file, int line, GpuArray<T> &got, const float *expected, int rows,
               int cols, const char *format, ...) {
    char shape[200], what[80];
    va_list args;
    va_start(args, format);
    vsnprintf(shape, sizeof shape, format, args);
    va_end(args);
    size_t count = (size_t)rows * (size_t)cols;
    if (count != got.count)
        die(EXIT_INTERNAL, "%s: %zu elements are compared of %zu", got.name, count, got.count);
    const float *found = gpu_read(got);
    double error = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        double e = expected[i], d = found[i] - e;
        error += d * d, norm += e * e;
    }
    double rms = sqrt(norm / (double)(count ? count : 1));
    for (size_t i = 0; i < count; i++) {
        double e = expected[i], allowed = 8 * got.tolerance * fmax(fabs(e), rms);
        if (fabs(found[i] - e) <= allowed) continue;  // false for NaN
        snprintf(what, sizeof what, "allowed: %.3g apart", allowed);
        gpu_differs(file, line, got.name, shape, i, cols, found[i], e, what);
        return;
    }
    if (sqrt(error) > got.tolerance * sqrt(norm))
        test_check(false, file, line, "%s of %s: found an error of %.3g, allowed %.3g", got.name,
                   shape, sqrt(error), got.tolerance * sqrt(norm));
}
#define gpu_compare(...) gpu_compare_at(__FILE__, __LINE__, __VA_ARGS__)

// Sums whose terms cancel: |a - b| <= tolerance * sum of |terms|, element by element. Call it as
// gpu_compare_sums(got, expected, terms, count, shape).
template <class T>
static inline void gpu_compare_sums_at(const char *file, int line, GpuArray<T> &got,
                                       const float *expected, const float *terms, int count,
                                       const char *shape) {
    const float *found = gpu_read(got);
    for (int i = 0; i < count; i++) {
        double allowed = got.tolerance * terms[i];
        char what[80];
        if (fabs((double)found[i] - expected[i]) <= allowed) continue;
        snprintf(what, sizeof what, "allowed: %.3g apart", allowed);
        gpu_differs(file, line, got.name, shape, (size_t)i, count, found[i], expected[i], what);
        return;
    }
}
#define gpu_compare_sums(...) gpu_compare_sums_at(__FILE__, __LINE__, __VA_ARGS__)

// ---------------------------------------------------------------------------------------------
// Documents: what B rows of T tokens may be cut into.

enum { DOCS_ONE, DOCS_TOKENS, DOCS_MIX, DOCS_KINDS };

// Where the document of each token begins, as the CPU has it (positions in the row) and as the GPU
// has it (tokens of the micro-batch): one a row, one a token, or of random lengths from 1 on.
static inline void test_documents(int *in_row,    // (B, T)
                                  int *absolute,  // (B, T)
                                  int kind, int B, int T) {
    RandKey key = gpu_fresh_key();
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++) {
            int at = b * T + t;
            bool first =
                t == 0 || kind == DOCS_TOKENS ||
                (kind == DOCS_MIX && rand_uniform(key, (uint64_t)at) < (t % 100 < 20 ? 0.3 : 0.02));
            in_row[at] = first ? t : in_row[at - 1];
            absolute[at] = b * T + in_row[at];
        }
}

// ---------------------------------------------------------------------------------------------

__global__ static void gpu_probe(int *answer) { *answer = 42; }

// First line of main. Where there is no GPU the program ends here, with 0 tests and exit code 0;
// one that is there and cannot be used is a failure. GPU_PROBE=1: only to see which it is.
static inline void gpu_test_begin(void) {
    int count = 0;
    const char *grid = getenv("GRID"), *probe = getenv("GPU_PROBE");
    grid_small = grid && !strcmp(grid, "small");
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    if (!count && (access("/dev/nvidia0", F_OK) || getenv("CUDA_VISIBLE_DEVICES"))) {
        printf(probe ? "no GPU: skipped\n" : "no GPU: skipped\n0 passed, 0 failed\n");
        exit(0);
    }
    gpu_init(&test_gpu, 0);
    int *answer = (int *)gpu_bytes("probe", sizeof(int)), found = 0;
    gpu_probe<<<1, 1>>>(answer);
    CUDA_LAUNCHED();
    CUDA_CHECK(cudaMemcpy(&found, answer, sizeof found, cudaMemcpyDeviceToHost));
    if (found != 42) die(EXIT_DEVICE, "%s: a kernel gave %d, expected 42", test_gpu.name, found);
    gpu_end_case();
    if (probe) exit(0);
}

#endif
