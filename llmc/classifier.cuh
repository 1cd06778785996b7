// classifier.cuh: capped logits, their cross entropy and its gradient, in one pass over them:
//
//     z = 15 tanh(a / 15),   loss = log sum_v e^z_v - z_target
//     da_v = scale (softmax(z)_v - [v = target]) (1 - (z_v / 15)^2)
//
// a is (rows, Vp) of floatX, of which the columns from V on are padding: they take no part, and
// their gradient is 0. da takes a's place. losses are (rows), targets (rows), each of 0 .. V-1.
//
// tanh(u) = 1 - 2 / (e^(2u) + 1). So for each logit one number q = 1 / (e^(2a/15) + 1), in 0 .. 1,
// gives all that is asked for:
//
//     z = 15 - 30 q,      e^(z-15) = e^(-30 q),      1 - (z/15)^2 = 4 q (1 - q)
//
// As |z| <= 15, e^(z-15) lies in e^-30 .. 1: it neither overflows nor vanishes, and the row's
// maximum, which a softmax without a cap must find first, is not needed. A logit takes two
// exponentials and a reciprocal (the special units do 16 a clock and SM, which at 4 TB/s is 3.5 a
// logit of BF16).
//
// A block takes a row. All of it is on its way to shared memory at once, by cp.async, which holds
// no registers; a thread works on what it has copied itself, in CLASSIFIER_PARTS parts, so that it
// waits for the first part alone. It sums up e^(z-15), and e^(z-15) q (1-q) takes the logit's place
// there; the sum known, it multiplies that by 4 scale / sum on the way to the row. Where shared
// memory is too small, the row itself is what is read and keeps it. The target's own gradient, in
// which much may cancel, is computed apart. In FP32 throughout; kept numbers are rounded to floatX.
//
// Moved: 2 Vp of floatX a row. In BF16, V 32768 takes 64 KB of shared memory: three blocks an SM;
// V 50257 takes 100 KB: two.
#ifndef LLMC_CLASSIFIER_CUH
#define LLMC_CLASSIFIER_CUH

#include <assert.h>
#include <limits.h>

#include "llmc/ptx.cuh"   // cp_async_16, exp2_fast, reciprocal_fast
#include "llmc/step.cuh"  // StepState
#include "llmc/vec.cuh"   // VEC, vec_load, vec_store

constexpr int CLASSIFIER_THREADS = 512, CLASSIFIER_STEP = CLASSIFIER_THREADS * VEC;
constexpr int CLASSIFIER_PARTS = 4;                             // of a row
constexpr int CLASSIFIER_BLOCKS = sizeof(floatX) == 2 ? 3 : 2;  // of an SM, if they find room
constexpr int LOSS_THREADS = 1024;
constexpr float LOGIT_CAP = 15;

// 2^x and 1/x, in BF16 by the special units, which are good to 2^-22; the FP32 build is held
// against a double.
#ifdef PRECISION_FP32
__device__ __forceinline__ float cap_exp2(float x) { return exp2f(x); }
__device__ __forceinline__ float cap_reciprocal(float x) { return 1 / x; }
#else
__device__ __forceinline__ float cap_exp2(float x) { return exp2_fast(x); }
__device__ __forceinline__ float cap_reciprocal(float x) { return reciprocal_fast(x); }
#endif

// q of a logit, and e^(z-15) from it.
__device__ __forceinline__ float cap_q(float a) {
    return cap_reciprocal(cap_exp2(a * (2 / LOGIT_CAP * LOG2_E)) + 1);
}
__device__ __forceinline__ float cap_exp(float q) {
    return cap_exp2(q * (-2 * LOGIT_CAP * LOG2_E));
}

// A logit becomes e^(z-15) q (1-q); e^(z-15) joins the sum.
__device__ __forceinline__ void classify(float *x, float *sum) {
    float q = cap_q(*x), e = cap_exp(q);
    *sum += e;
    *x = e * (q - q * q);
}

// SHARED: the row fits shared memory.
template <bool SHARED>
static __global__ void __launch_bounds__(CLASSIFIER_THREADS, CLASSIFIER_BLOCKS)
    classifier_kernel(floatX *logits, float *losses, const int *targets, float grad_scale, int V,
                      int Vp) {
    extern __shared__ uint4 shared_row[];
    floatX *row = logits + (size_t)blockIdx.x * Vp, *keep = SHARED ? (floatX *)shared_row : row;
    int target = targets[blockIdx.x], first = threadIdx.x * VEC, whole = V / VEC * VEC;
    float q = cap_q(to_float(row[target])), sum = 0;
    if (!SHARED) __syncthreads();  // all have read it before the row is written over

    int part = ceil_div(whole, CLASSIFIER_PARTS * CLASSIFIER_STEP) * CLASSIFIER_STEP;
    for (int p = 0; SHARED && p < CLASSIFIER_PARTS; p++) {
        for (int i = p * part + first; i < min((p + 1) * part, whole); i += CLASSIFIER_STEP)
            cp_async_16(shared_address(keep + i), row + i, true);
        cp_async_commit();
    }
    auto pass = [&](int p) {
        for (int i = p * part + first; i < min((p + 1) * part, whole); i += CLASSIFIER_STEP) {
            float x[VEC];
            vec_load(x, keep + i);
#pragma unroll
            for (int k = 0; k < VEC; k++) classify(&x[k], &sum);
            if (grad_scale > 0) vec_store(keep + i, x);
        }
    };
    static_assert(CLASSIFIER_PARTS == 4, "so many groups are waited for");
    cp_async_wait_group<3>(), pass(0);
    cp_async_wait_group<2>(), pass(1);
    cp_async_wait_group<1>(), pass(2);
    cp_async_wait_group<0>(), pass(3);
    int rest = whole + threadIdx.x;  // the columns after the last whole piece, one a thread
    float x_rest = 0;
    if (rest < V) x_rest = to_float(row[rest]), classify(&x_rest, &sum);

    sum = block_sum<CLASSIFIER_THREADS>(sum);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + 2 * LOGIT_CAP * q;
    if (grad_scale <= 0) return;
    float scale = 4 * grad_scale / sum;
#pragma unroll 4
    for (int i = first; i < whole; i += CLASSIFIER_STEP) {
        float x[VEC];
        vec_load(x, keep + i);
#pragma unroll
        for (int k = 0; k < VEC; k++) x[k] *= scale;
        vec_store(row + i, x);
    }
    if (rest < Vp) row[rest] = from_float<floatX>(scale * x_rest);
    __syncthreads();
    if (threadIdx.x == 0)
        row[target] = from_float<floatX>(scale * (cap_exp(q) - sum) * (q - q * q));
}

// One block, so that losses are added in one order.
static __global__ void __launch_bounds__(LOSS_THREADS)
    loss_reduce_kernel(StepState *step, const float *losses, int n, int T, int first_row) {
    double sum = 0;
    int bad = INT_MAX;
#pragma unroll 8
    for (int t = threadIdx.x; t < n; t += LOSS_THREADS) {
        sum += losses[t];
        if (!isfinite(losses[t])) bad = min(bad, t);
    }
    sum = block_sum<LOSS_THREADS>(sum);
    if (threadIdx.x == 0) step->loss_sum += sum;
    if (bad < INT_MAX) atomicMin(&step->bad_row, first_row + bad / T);
}

// ---------------------------------------------------------------------------------------------

// grad_scale is 1 / (targets of the whole step); 0: losses only, the logits stay as they are.
static inline void classifier(floatX *logits,      // (rows, Vp), a in, da out
                              float *losses,       // (rows), nats
                              const int *targets,  // (rows)
                              float grad_scale, int rows, int V, int Vp, cudaStream_t stream) {
    assert(V <= Vp && Vp - V / VEC * VEC <= CLASSIFIER_THREADS && Vp % VEC == 0);
    int most = 0, bytes = Vp * (int)sizeof(floatX);
    CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    most -= 1024;  // the sums take some, too
    // The most there can be, in every call: no call takes away what a captured one needs.
    CUDA_CHECK(cudaFuncSetAttribute(classifier_kernel<true>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    auto kernel = bytes <= most ? classifier_kernel<true> : classifier_kernel<false>;
    int shared = bytes <= most ? bytes : 0;
    kernel<<<rows, CLASSIFIER_THREADS, (size_t)shared, stream>>>(logits, losses, targets,
                                                                 grad_scale, V, Vp);
    CUDA_LAUNCHED();
}

// step->loss_sum += sum of losses; step->bad_row becomes the first row with one that is not finite,
// if it comes before. first_row is the number of losses' first row in the step.
static inline void loss_reduce(StepState *step,
                               const float *losses,  // (n), rows of T
                               int n, int T, int first_row, cudaStream_t stream) {
    loss_reduce_kernel<<<1, LOSS_THREADS, 0, stream>>>(step, losses, n, T, first_row);
    CUDA_LAUNCHED();
}

#endif
