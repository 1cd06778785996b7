// test_tokens.cuh: what the tests of the operations that are bound by memory share: their grid of
// shapes, arrays of more than 2^31 elements, and `test_x bench`, which times the kernels instead of
// testing them.
#ifndef DEV_TEST_TOKENS_CUH
#define DEV_TEST_TOKENS_CUH

#include "dev/test/gpu/test_gpu.cuh"
#include "llmc/vec.cuh"  // from_float

// check(n, C) over the grid: tokens of one, two, three and more warps, ragged numbers of them.
static inline void each_shape(void (*check)(int n, int C)) {
    for (int C : {48, 128, 200, 768, 1280, 1536, 2048, 8192})
        for (int n : {1, 2, 63, 64, 65, 127, 128, 129, 192, 1000})
            if (n <= (grid_small ? 63 : C > 2000 ? 65 : 1000) && (C <= 2048 || !grid_small))
                check(n, C);
}

// ---------------------------------------------------------------------------------------------
// Large arrays: filled on the device, and compared there with what the twin makes of a few rows.

// Numbers in [-1, 1) that have nothing to do with each other.
template <class T> static __global__ void fill_kernel(T *x, size_t count, unsigned array) {
    for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (size_t)gridDim.x * blockDim.x) {
        unsigned bits = (unsigned)(i * 2654435761u) ^ array * 2654435769u;
        bits = (bits ^ bits >> 15) * 2246822519u;
        x[i] = from_float<T>((float)(bits >> 8) * 0x1p-23f - 1);
    }
}

// An array on the device, freed by gpu_end_case. No two of a case are alike.
template <class T> static inline T *filled_array(size_t count) {
    T *x = (T *)gpu_bytes("filled", count * sizeof(T));
    fill_kernel<T><<<1024, 256>>>(x, count, (unsigned)gpu_memory_count);
    CUDA_LAUNCHED();
    return x;
}

// A matrix of more than 2^31 elements, and where its windows begin, of WINDOW_ROWS rows each: at
// the start, around element 2^31, at the end.
enum { WINDOWS = 3, WINDOW_ROWS = 4 };
typedef struct {
    int rows, cols, window[WINDOWS];
    size_t count;
} Large;

static inline Large large_matrix(int cols) {
    int middle = (int)((1u << 31) / (unsigned)cols) - 1, rows = middle + 9;
    return {rows, cols, {0, middle, rows - WINDOW_ROWS}, (size_t)rows * (size_t)cols};
}

// Window i as an array of its own, which holds in .host what the device does now; stride: the
// columns of that array's rows.
template <class T>
static inline GpuArray<T> large_window(const char *name, T *device, const Large *m, int i,
                                       int stride) {
    size_t count = (size_t)WINDOW_ROWS * (size_t)stride;
    GpuArray<T> x = {device + (size_t)m->window[i] * (size_t)stride, gpu_expected<float>(count),
                     count, name, tolerance_of<T>};
    gpu_read(x);
    return x;
}

// ---------------------------------------------------------------------------------------------
// Bench.

constexpr double BENCH_COPY_SPEED = 4230;  // GB/s, of an H200's memory

// Times run(), which must move `moved` numbers of floatX for each of n C channels; prints a line.
template <class Run>
static inline void bench(const char *name, int n, int C, double moved, Run run) {
    const int warm = 3, times = 20;
    cudaEvent_t begin, end;
    float ms = 0;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    for (int i = 0; i < warm + times; i++) {
        if (i == warm) CUDA_CHECK(cudaEventRecord(begin));
        run();
    }
    CUDA_CHECK(cudaEventRecord(end));
    CUDA_CHECK(cudaEventSynchronize(end));
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    double us = 1e3 * ms / times, speed = 1e-3 * moved * n * C * sizeof(floatX) / us;
    printf("%-24s %s  n %6d  C %4d  %8.1f us  %6.0f GB/s  %5.1f%%\n", name, PRECISION_NAME, n, C,
           us, speed, 100 * speed / BENCH_COPY_SPEED);
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
}

// Ends the program with the bench's lines if its first argument is "bench".
static inline void bench_if_asked(int argc, char **argv, void (*lines)(int n, int C)) {
    if (argc < 2 || strcmp(argv[1], "bench")) return;
    lines(131072, 768), gpu_end_case();
    lines(32768, 1536), gpu_end_case();
    exit(0);
}

#endif
