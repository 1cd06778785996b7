// cuda_common.cuh: what every device header builds on: the type of the network's numbers, checked
// CUDA calls, memory, sums over warps and blocks, and the names and times of a step's operations.
//
// PRECISION. floatX is the type of weights, activations and their gradients: BF16, or FP32 when
// PRECISION_FP32 is defined (the build that is held against the CPU, number by number). Kernels
// compute in FP32 whatever floatX is; gradients of weights, masters and optimizer state are always
// FP32.
//
// SUMS. No float atomics anywhere: a block leaves its partial sum in its own place, a later kernel
// adds the places in order. Two runs of the same command give the same bits.
#ifndef LLMC_CUDA_COMMON_CUH
#define LLMC_CUDA_COMMON_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>
#include <stdint.h>
#include <string.h>

#include "llmc/die.h"  // die, EXIT_DEVICE, EXIT_INTERNAL

#ifdef PRECISION_FP32
typedef float floatX;
#define PRECISION_NAME "FP32"
#else
typedef __nv_bfloat16 floatX;
#define PRECISION_NAME "BF16"
#endif
typedef __nv_bfloat16 bf16;

constexpr int WARP = 32;
constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr float LOG2_E =
    1.44269504f;  // exp(x) = 2^(x log2 e): the GPU has an instruction for 2^x only

// ---------------------------------------------------------------------------------------------
// Checked calls.

static inline void cuda_check(cudaError_t e, const char *file, int line, const char *call) {
    if (e == cudaSuccess) return;
    die(e == cudaErrorMemoryAllocation ? EXIT_DEVICE : EXIT_INTERNAL, "%s:%d: %s: %s", file, line,
        call, cudaGetErrorString(e));
}
#define CUDA_CHECK(call) cuda_check((call), __FILE__, __LINE__, #call)

// Behind every launch.
#define CUDA_LAUNCHED() CUDA_CHECK(cudaGetLastError())

// ---------------------------------------------------------------------------------------------
// The GPU and its memory.

typedef struct {
    char name[256];
    int processors;    // SMs
    int major, minor;  // compute capability
    size_t memory;     // bytes in all
    size_t taken;      // bytes taken by gpu_alloc
} Gpu;

// Of no use but to be asked for: this program holds code for the GPU, or it does not.
[[maybe_unused]] static __global__ void gpu_code_kernel(void) {}

// Makes the context and asks for code. Exits 7 when another process holds the GPU, or the program
// was built for other architectures.
static inline void gpu_open(const Gpu *g, int device) {
    const int built_for[] = {__CUDA_ARCH_LIST__};
    char list[100] = "";
    cudaFuncAttributes code;
    cudaError_t e = cudaSetDevice(device);
    if (e == cudaSuccess) e = cudaFree(NULL);  // before CUDA 12 only this makes a context
    if (e == cudaSuccess) e = cudaFuncGetAttributes(&code, gpu_code_kernel);
    if (e == cudaSuccess) return;
    if (e != cudaErrorNoKernelImageForDevice && e != cudaErrorInvalidDeviceFunction)
        die(EXIT_DEVICE,
            "%s: cannot be opened (%s); nvidia-smi tells which processes use it, and whether its "
            "compute mode lets one alone do so",
            g->name, cudaGetErrorString(e));
    for (int arch : built_for)
        snprintf(list + strlen(list), sizeof list - strlen(list), " %d", arch / 10);
    die(EXIT_DEVICE,
        "%s: found a GPU of architecture %d%d, expected one that this program was built for:%s; "
        "build it with make ARCH=%d%d%s",
        g->name, g->major, g->minor, list, g->major, g->minor, g->major == 9 ? "a" : "");
}

// Opens GPU `device` of those visible. Exits 7, saying why, when there is none, its driver is too
// old, it is another process's alone, or the program holds no code for it; 2 when there are fewer.
static inline void gpu_init(Gpu *g, int device) {
    int count = 0, driver = 0, runtime = 0;
    cudaError_t e = cudaGetDeviceCount(&count);
    cudaDriverGetVersion(&driver), cudaRuntimeGetVersion(&runtime);
    if (e == cudaErrorInsufficientDriver && driver > 0)
        die(EXIT_DEVICE,
            "driver: found one for CUDA %d.%d, expected %d.%d or newer; update the driver, or "
            "build with an older toolkit",
            driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    if (e != cudaSuccess || count == 0)
        die(EXIT_DEVICE,
            "GPU: found none (%s); nvidia-smi and CUDA_VISIBLE_DEVICES tell what is visible; "
            "train_gpt2 trains on the CPU",
            e == cudaSuccess ? "no device is visible" : cudaGetErrorString(e));
    if (device >= count)
        die(EXIT_USAGE,
            "found %d GPU%s on this machine, expected one for each of its ranks: start "
            "fewer, or see CUDA_VISIBLE_DEVICES",
            count, count == 1 ? "" : "s");
    cudaDeviceProp p;
    CUDA_CHECK(cudaGetDeviceProperties(&p, device));
    snprintf(g->name, sizeof g->name, "%s", p.name);
    g->processors = p.multiProcessorCount;
    g->major = p.major, g->minor = p.minor;
    g->memory = p.totalGlobalMem;
    g->taken = 0;
    gpu_open(g, device);
}

// Device memory; `what` and what to lower stand in the message when there is too little (exit 7).
static inline void *gpu_alloc(Gpu *g, size_t bytes, const char *what) {
    void *p = NULL;
    size_t left = 0, all = 0;
    cudaError_t e = cudaMalloc(&p, bytes ? bytes : 1);
    if (e == cudaErrorMemoryAllocation) {
        cudaMemGetInfo(&left, &all);
        die(EXIT_DEVICE,
            "GPU memory for %s: needed %.2f GB, found %.2f GB free of %.2f GB (%.2f GB are this "
            "program's); lower --micro-batch, or --depth",
            what, 1e-9 * (double)bytes, 1e-9 * (double)left, 1e-9 * (double)all,
            1e-9 * (double)g->taken);
    }
    CUDA_CHECK(e);
    g->taken += bytes;
    return p;
}

// Host memory that the GPU copies from and to while the host goes on; cudaFreeHost releases it.
static inline void *gpu_alloc_host(size_t bytes, const char *what) {
    void *p = NULL;
    cudaError_t e = cudaHostAlloc(&p, bytes, cudaHostAllocDefault);
    if (e == cudaErrorMemoryAllocation)
        die(EXIT_DEVICE,
            "pinned memory for %s: needed %.2f GB, found less; lower --batch-tokens, or give the "
            "program more memory",
            what, 1e-9 * (double)bytes);
    CUDA_CHECK(e);
    return p;
}

// ---------------------------------------------------------------------------------------------
// Warps and sums.

template <class Int> __host__ __device__ constexpr Int ceil_div(Int a, Int b) {
    return (a + b - 1) / b;
}

__device__ __forceinline__ int lane_id(void) { return (int)(threadIdx.x % WARP); }
__device__ __forceinline__ int warp_id(void) {  // the compiler must see that lanes have the same
    return __shfl_sync(FULL_WARP, (int)(threadIdx.x / WARP), 0);
}

// Sum over the lanes of a warp, in every lane.
template <class T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) x += __shfl_xor_sync(FULL_WARP, x, d);
    return x;
}

// Sum over the threads of a block, in every thread. THREADS = blockDim.x. May be called again.
template <int THREADS, class T> __device__ __forceinline__ T block_sum(T x) {
    __shared__ T of_warp[THREADS / WARP];
    x = warp_sum(x);
    __syncthreads();  // the call before has read its sums
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    T sum = 0;
#pragma unroll
    for (int w = 0; w < THREADS / WARP; w++) sum += of_warp[w];
    return sum;
}

// ---------------------------------------------------------------------------------------------
// A step's operations by name: NVTX ranges for the profilers, and times for `make bench`.

typedef struct {
    const char *name;
    int layer;            // -1 outside the layers
    double flops, bytes;  // that it must do and move
    cudaEvent_t begin, end;
} TraceOp;

enum { TRACE_OPS = 1 << 14 };

typedef struct {
    bool timed;           // measure, besides naming
    bool open;            // an operation is under way
    cudaStream_t stream;  // where it runs
    TraceOp *op;          // (TRACE_OPS) when timed
    int count;
} Trace;

// Ends the operation under way, if there is one.
static inline void trace_end(Trace *t) {
    if (!t->open) return;
    nvtxRangePop();
    if (t->timed) CUDA_CHECK(cudaEventRecord(t->op[t->count++].end, t->stream));
    t->open = false;
}

// From here on, until the next call or trace_end, the stream works on operation `name`, which must
// do `flops` and move `bytes` (each input read once, each output written once).
static inline void trace_op(Trace *t, const char *name, int layer, double flops, double bytes) {
    char text[64];
    trace_end(t);
    if (layer >= 0)
        snprintf(text, sizeof text, "%s %d", name, layer);
    else
        snprintf(text, sizeof text, "%s", name);
    nvtxRangePushA(text);
    t->open = true;
    if (!t->timed) return;
    if (t->count == TRACE_OPS) die(EXIT_INTERNAL, "trace: more than %d operations", TRACE_OPS);
    TraceOp *op = &t->op[t->count];
    op->name = name, op->layer = layer, op->flops = flops, op->bytes = bytes;
    if (!op->begin) {
        CUDA_CHECK(cudaEventCreate(&op->begin));
        CUDA_CHECK(cudaEventCreate(&op->end));
    }
    CUDA_CHECK(cudaEventRecord(op->begin, t->stream));
}

#endif
