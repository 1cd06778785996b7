// ladder.cuh: what every ladder is made of. A ladder is one operation written several times, from
// the simplest kernel that is right (v1) to the one in llmc/; each version, a rung, has one idea
// more than the one below it. All are checked against train_gpt2.c, then timed:
//
//     typedef void Relu2(floatX *y, const floatX *x, size_t count, cudaStream_t stream);
//
//     static const Rung<Relu2> RUNGS[] = {
//         {"v1", "a thread an element", relu2_v1},        // a launcher of its own kernel
//         {"v2", "16 bytes at a time", relu2_v2},
//         {"llmc", "several loads on their way", relu2_forward},
//     };
//     static void check(Rung<Relu2> rung) {               // all shapes of one rung
//         for (int count : {8, 1000, 4104}) {
//             GpuArray<floatX> x = ..., y = gpu_poisoned<floatX>("y", count);  // see test_gpu.cuh
//             rung.run(y.device, x.device, count, 0);
//             gpu_compare(y, expected, 1, count, "%s, count %d", rung.name, count);
//             gpu_end_case();
//         }
//     }
//     static void time_rungs(void) {                      // the full shape
//         floatX *x = ladder_normal<floatX>(count, 1), *y = ladder_empty<floatX>(count);
//         ladder_time(RUNGS, "relu2, 4e8 elements", ladder_bytes(4.0 * count),
//                     [=](Rung<Relu2> rung) { rung.run(y, x, count, 0); });
//         gpu_end_case();
//     }
//     int main(int argc, char **argv) {
//         ladder_begin(argc, argv);
//         ladder_check(RUNGS, check);
//         if (ladder_timed()) time_rungs();
//         return test_end();
//     }
//
// `make ladder OP=relu2` runs it. With `check` as argument, or with GRID=small (grid_small: few
// small shapes, for the sanitizers), nothing is timed. Where there is no GPU it says so and ends
// well.
//
// TIMES are medians between two events on the GPU: after 3 runs to warm up, of 20 or of as many as
// 0.3 s hold; a run of more than 0.3 s is timed once. Full shapes are many times the L2 cache, so
// that each run finds its inputs in memory. Kernels stand outside of namespaces: the sanitizers
// look at those.
#ifndef DEV_CUDA_LADDER_CUH
#define DEV_CUDA_LADDER_CUH

#include "dev/test/gpu/test_gpu.cuh"  // GpuArray, gpu_compare, gpu_end_case
#include "llmc/vec.cuh"               // from_float

template <class F> struct Rung {
    const char *name, *idea;
    F *run;
};

// ---------------------------------------------------------------------------------------------
// What an operation must do at the least, and how fast an H200 does that (700 W, CUDA 13.0).

constexpr double LADDER_COPY = 4.23e12;               // cudaMemcpy, bytes read and written a second
constexpr double LADDER_GEMM = 672e12;                // cuBLASLt in BF16, 65536 x 768 x 3072
constexpr double LADDER_ATTENTION = 455e12;           // cuDNN, causal, B 32, H 6, T 2048, D 128
constexpr double LADDER_ATTENTION_BACKWARD = 413e12;  // the same, not deterministic

typedef struct {
    double amount, ceiling;  // bytes or floating-point operations, and how many a second
    double unit;             // what a rate is printed in
    const char *unit_name;
} LadderWork;

// Bytes moved: each input read once, each output written once.
static inline LadderWork ladder_bytes(double bytes) { return {bytes, LADDER_COPY, 1e9, "GB/s"}; }
static inline LadderWork ladder_flops(double flops, double ceiling) {
    return {flops, ceiling, 1e12, "TFLOP/s"};
}

// ---------------------------------------------------------------------------------------------
// Beginning and checking.

static bool ladder_check_only;

// First line of main. Ends the program where there is no GPU.
static inline void ladder_begin(int argc, char **argv) {
    bool check = argc == 2 && !strcmp(argv[1], "check");
    if (argc > 1 && !check) die(EXIT_USAGE, "found argument '%s', expected check or none", argv[1]);
    gpu_test_begin();
    ladder_check_only = check || grid_small;
}

static inline bool ladder_timed(void) { return !ladder_check_only; }

// check(rung) for each rung, a test each.
template <class F, int N>
static inline void ladder_check(const Rung<F> (&rungs)[N], void (*check)(Rung<F>)) {
    static void (*now)(Rung<F>);  // a test is a function without arguments
    static Rung<F> rung;
    now = check;
    for (int i = 0; i < N; i++) {
        rung = rungs[i];
        test_run(rung.name, [] { now(rung); });
    }
}

// ---------------------------------------------------------------------------------------------
// Arrays of the full shape: on the device alone, freed by gpu_end_case.

// Normal numbers (Box and Muller) from two hashes of (array, element).
template <class T>
static __global__ void ladder_normal_kernel(T *x, size_t count, float std, unsigned array) {
    for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (size_t)gridDim.x * blockDim.x) {
        unsigned bits[2];
        for (unsigned k = 0; k < 2; k++) {
            unsigned h = (unsigned)i * 2654435761u ^ (unsigned)(i >> 32) ^ (2 * array + k) << 16;
            h = (h ^ h >> 16) * 2246822519u;
            h = (h ^ h >> 13) * 3266489917u;
            bits[k] = h ^ h >> 16;
        }
        float u = ((float)(bits[0] >> 8) + 1) * 0x1p-24f, v = (float)(bits[1] >> 8) * 0x1p-24f;
        x[i] = from_float<T>(std * sqrtf(-2 * logf(u)) * cospif(2 * v));
    }
}

template <class T> static inline T *ladder_empty(size_t count) {
    return (T *)gpu_bytes("array", count * sizeof(T));
}

// Timing inputs are never zeros: numbers that are alike take less power, and run faster.
template <class T> static inline T *ladder_normal(size_t count, double std) {
    T *x = ladder_empty<T>(count);
    ladder_normal_kernel<T><<<1024, 256>>>(x, count, (float)std, (unsigned)gpu_memory_count);
    CUDA_LAUNCHED();
    return x;
}

// ---------------------------------------------------------------------------------------------
// Timing.

constexpr int LADDER_WARM = 3, LADDER_TIMES = 20;
constexpr double LADDER_ENOUGH = 0.3e6;  // us

static inline int ladder_order(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

// Median time of `times` runs, in us; before() comes ahead of each and is not timed. The host
// enqueues them all before it waits, so that the GPU never waits for the host.
template <class Run, class Before>
static inline double ladder_median(int times, Run run, Before before) {
    cudaEvent_t begin[LADDER_TIMES], end[LADDER_TIMES];
    float ms[LADDER_TIMES];
    for (int i = 0; i < times; i++) {
        CUDA_CHECK(cudaEventCreate(&begin[i]));
        CUDA_CHECK(cudaEventCreate(&end[i]));
        before();
        CUDA_CHECK(cudaEventRecord(begin[i]));
        run();
        CUDA_CHECK(cudaEventRecord(end[i]));
    }
    CUDA_CHECK(cudaDeviceSynchronize());
    for (int i = 0; i < times; i++) {
        CUDA_CHECK(cudaEventElapsedTime(&ms[i], begin[i], end[i]));
        CUDA_CHECK(cudaEventDestroy(begin[i]));
        CUDA_CHECK(cudaEventDestroy(end[i]));
    }
    qsort(ms, (size_t)times, sizeof *ms, ladder_order);
    return 1e3 * (ms[(times - 1) / 2] + ms[times / 2]) / 2;
}

// Times run(rung) of each rung and prints the table. before(), if given, restores what a run
// spoils.
template <class F, int N, class Run, class Before>
static inline void ladder_time(const Rung<F> (&rungs)[N], const char *title, LadderWork work,
                               Run run, Before before) {
    double first = 0;
    printf("\n%s; %s; %% of %.0f %s\n", title, test_gpu.name, work.ceiling / work.unit,
           work.unit_name);
    printf("%-8s %-52s %10s %12s %8s %8s\n", "rung", "idea", "us", work.unit_name, "ceiling",
           "times v1");
    for (const Rung<F> &rung : rungs) {
        auto once = [&] { run(rung); };
        double us = ladder_median(1, once, before);
        if (us < LADDER_ENOUGH) {
            int times = (int)fmin(LADDER_TIMES, fmax(LADDER_WARM, LADDER_ENOUGH / us));
            if (times == LADDER_TIMES) ladder_median(LADDER_WARM, once, before);
            us = ladder_median(times, once, before);
        }
        if (!first) first = us;
        double rate = 1e6 * work.amount / us;
        printf("%-8s %-52s %10.1f %12.1f %7.1f%% %8.1f\n", rung.name, rung.idea, us,
               rate / work.unit, 100 * rate / work.ceiling, first / us);
    }
    printf("\n");
}

template <class F, int N, class Run>
static inline void ladder_time(const Rung<F> (&rungs)[N], const char *title, LadderWork work,
                               Run run) {
    ladder_time(rungs, title, work, run, [] {});
}

#endif
