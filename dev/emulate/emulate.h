// emulate.h: a GPU made of one CPU thread: it runs the project's CUDA kernels, unchanged, where
// there is no GPU. Every thread of a block is a fiber with a stack of its own; they run one after
// the other, each until it has to wait for others. Blocks run one after the other.
//
//     translate.sed   kernel<<<grid, block, bytes, stream>>>(...) becomes emulate::launch(...)(...)
//     emulate.h       what a kernel sees of C++: threadIdx, __syncthreads, __shfl_sync, ...
//     ptx.cuh         in place of llmc/ptx.cuh and llmc/ptx_sm90.cuh: each instruction in plain C
//     emulate.cc      fibers, barriers, launches; CUDA's runtime; the products of cuBLASLt
//
// LATE. What the hardware does on its own (copies to and from shared memory, wgmma) may happen at
// any moment up to the one at which the program waits for it. Here it happens at the last: copies
// when nobody else can go on, products when they are waited for. So what is read too early, or
// overwritten too early, is wrong, every time. EMULATE=early does copies at once, which finds the
// stage that is given back while a product still reads it; EMULATE=backward lets the threads of a
// block take their turns in the opposite order.
//
// MEMORY. What is allocated ends at a page that nobody may touch: the first access after it names
// kernel, block and thread and ends the program. Device memory begins as NaN, as does a block's
// dynamic shared memory.
//
// Leaves out: time, clusters, fences (memory is always consistent), atomics but those of ladders.
#ifndef DEV_EMULATE_H
#define DEV_EMULATE_H

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <tuple>

#undef __shared__
#define __shared__ static
#define __launch_bounds__(...)

extern "C" const uint3 threadIdx, blockIdx;  // of the thread that runs
extern "C" const dim3 blockDim, gridDim;

namespace emulate {

constexpr size_t SHARED_BYTES = 227 << 10;  // of a block, at most
alignas(1024) extern unsigned char shared[SHARED_BYTES];

// ---------------------------------------------------------------------------------------------
// Waiting.

// The thread goes on once waits(what, x) is false.
typedef bool Waits(const void *what, uint64_t x);
void wait(Waits *waits, const void *what, uint64_t x);

// Barrier `id`: `threads` arrive (0: all of the block that still run); waits: for the others.
void barrier(int id, int threads, bool waits);

// The lanes of a warp that are in `mask`, and still run, meet. Each shows `bytes` of its own to the
// others: returns where lane 0's lie, lane i's i times 32 bytes after, until the next call.
const unsigned char *exchange(unsigned mask, const void *mine, size_t bytes);

// Does `work` when it is waited for: copies that a barrier waits for; this thread's copies and
// products, those that came after the last commit or all but the last `groups` of them.
enum Queue { COPY, PRODUCT, STORE, QUEUES };
void later(Queue queue, std::function<void()> work);
void later_at_barrier(std::function<void()> work);
void commit(Queue queue);
void finish(Queue queue, size_t groups);

// What a CUtensorMap holds here.
typedef struct {
    unsigned char *data;
    uint64_t columns, rows, pitch;  // of a row in bytes
    uint32_t box_columns, box_rows;
} TensorMap;

[[noreturn]] void stop(const char *what);  // names the thread, ends the program

// ---------------------------------------------------------------------------------------------
// Launches.

void enqueue(cudaStream_t stream, std::function<void()> work);
void run_grid(const char *name, dim3 grid, dim3 block, size_t shared_bytes,
              const std::function<void()> &thread);

template <class... P> struct Launch {
    const char *name;
    void (*kernel)(P...);
    dim3 grid, block;
    size_t shared_bytes;
    cudaStream_t stream;
    void operator()(P... arguments) {
        auto kept = std::make_tuple(arguments...);
        Launch l = *this;
        enqueue(stream, [l, kept] {
            run_grid(l.name, l.grid, l.block, l.shared_bytes,
                     [&l, &kept] { std::apply(l.kernel, kept); });
        });
    }
};

template <class... P>
Launch<P...> launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block,
                    size_t shared_bytes = 0, cudaStream_t stream = 0) {
    return {name, kernel, grid, block, shared_bytes, stream};
}

}  // namespace emulate

// ---------------------------------------------------------------------------------------------
// CUDA C++.

static inline void __syncthreads(void) { emulate::barrier(0, 0, true); }
static inline void __syncwarp(unsigned mask = ~0u) { emulate::exchange(mask, "", 1); }
static inline int emulate_lane(void) {
    return (int)((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}

template <class T> static inline T __shfl_sync(unsigned mask, T x, int lane, int width = 32) {
    const unsigned char *all = emulate::exchange(mask, &x, sizeof x);
    int first = emulate_lane() / width * width;
    memcpy(&x, all + 32 * (first + lane % width), sizeof x);
    return x;
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
    (void)width;
    const unsigned char *all = emulate::exchange(mask, &x, sizeof x);
    memcpy(&x, all + 32 * (emulate_lane() ^ bits), sizeof x);
    return x;
}
static inline unsigned __ballot_sync(unsigned mask, int yes) {
    const unsigned char *all = emulate::exchange(mask, &yes, sizeof yes);
    unsigned bits = 0;
    for (int i = 0; i < 32; i++) {
        memcpy(&yes, all + 32 * i, sizeof yes);
        if (mask >> i & 1 && yes) bits |= 1u << i;
    }
    return bits;
}
static inline int __any_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) != 0; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline size_t __cvta_generic_to_shared(const void *p) {
    return (size_t)((const unsigned char *)p - emulate::shared);
}
static inline size_t __cvta_generic_to_global(const void *p) { return (size_t)p; }
template <class T> static inline T __ldcg(const T *p) { return *p; }
[[noreturn]] static inline void __trap(void) { emulate::stop("__trap"); }
#define __expf expf
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
static inline float cospif(float x) { return cosf((float)M_PI * x); }
template <class A, class B> static inline auto min(A a, B b) { return a < b ? a : b; }
template <class A, class B> static inline auto max(A a, B b) { return a > b ? a : b; }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __uint_as_float(unsigned x) {
    float y;
    memcpy(&y, &x, sizeof y);
    return y;
}
template <class F> static inline cudaError_t cudaFuncSetAttribute(F *, cudaFuncAttribute, int) {
    return cudaSuccess;
}
template <class F> static inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, F *) {
    return cudaSuccess;
}
template <class T> static inline T emulate_swap(T *x, T y) {
    T old = *x;
    *x = y;
    return old;
}
template <class T> static inline T atomicAdd(T *x, T y) { return emulate_swap(x, (T)(*x + y)); }
template <class T> static inline T atomicMin(T *x, T y) { return emulate_swap(x, y < *x ? y : *x); }
static inline unsigned atomicInc(unsigned *x, unsigned last) {
    return emulate_swap(x, *x >= last ? 0 : *x + 1);
}

#endif
