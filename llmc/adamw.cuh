// adamw.cuh: AdamW (Loshchilov and Hutter 2019) on one tensor, t = 1, 2, ...:
//
//     g = grad_scale g
//     m = b1 m + (1-b1) g,   v = b2 v + (1-b2) g^2,
//     p = (1 - lr wd) p - lr m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps)
//
// p, m, v, g (count) FP32, and the working copy w (count), p rounded to floatX in the same pass.
// The numbers of the group come from device memory (llmc/step.cuh). Must move 28 bytes an element,
// and 2 for the copy.
#ifndef LLMC_ADAMW_CUH
#define LLMC_ADAMW_CUH

#include "llmc/step.cuh"  // StepState, AdamwNumbers
#include "llmc/vec.cuh"   // vec_load, vec_store

constexpr int ADAMW_THREADS = 256;

__device__ __forceinline__ void adamw_element(float &p, float &m, float &v, float g,
                                              const AdamwNumbers &k) {
    m = k.beta1 * m + (1 - k.beta1) * g;
    v = k.beta2 * v + (1 - k.beta2) * g * g;
    p = k.shrink * p - k.rate * m / (sqrtf(v * k.v_unbias) + k.eps);
}

// A thread takes VEC elements; the last of the tensor take the slow path.
[[maybe_unused]] static __global__ void __launch_bounds__(ADAMW_THREADS)
    adamw_kernel(float *p,        // (count)
                 floatX *w,       // (count) or NULL
                 float *m,        // (count)
                 float *v,        // (count)
                 const float *g,  // (count)
                 const StepState *step, Group group, size_t count) {
    if (step->skip) return;
    AdamwNumbers k = step->adamw[group];
    float scale = step->grad_scale;
    size_t i = VEC * ((size_t)blockIdx.x * ADAMW_THREADS + threadIdx.x);
    if (i + VEC <= count) {
        float pi[VEC], mi[VEC], vi[VEC], gi[VEC];
        vec_load(gi, g + i), vec_load(pi, p + i), vec_load(mi, m + i), vec_load(vi, v + i);
#pragma unroll
        for (int j = 0; j < VEC; j++) adamw_element(pi[j], mi[j], vi[j], scale * gi[j], k);
        vec_store(p + i, pi), vec_store(m + i, mi), vec_store(v + i, vi);
        if (w) vec_store(w + i, pi);
        return;
    }
    for (; i < count; i++) {
        adamw_element(p[i], m[i], v[i], scale * g[i], k);
        if (w) w[i] = from_float<floatX>(p[i]);
    }
}

[[maybe_unused]] static __global__ void __launch_bounds__(ADAMW_THREADS)
    weights_round_kernel(floatX *w,       // (count)
                         const float *p,  // (count)
                         size_t count) {
    size_t i = VEC * ((size_t)blockIdx.x * ADAMW_THREADS + threadIdx.x);
    if (i + VEC <= count) {
        float x[VEC];
        vec_load(x, p + i);
        vec_store(w + i, x);
        return;
    }
    for (; i < count; i++) w[i] = from_float<floatX>(p[i]);
}

// ---------------------------------------------------------------------------------------------
// Launchers.

static inline unsigned adamw_blocks(size_t count) {
    return (unsigned)ceil_div(count, (size_t)(VEC * ADAMW_THREADS));
}

// Nothing happens where step->skip is set.
static inline void adamw_update(float *p,        // (count)
                                floatX *w,       // (count): working copy, NULL where p serves
                                float *m,        // (count)
                                float *v,        // (count)
                                const float *g,  // (count)
                                const StepState *step, Group group, size_t count,
                                cudaStream_t stream) {
    adamw_kernel<<<adamw_blocks(count), ADAMW_THREADS, 0, stream>>>(p, w, m, v, g, step, group,
                                                                    count);
    CUDA_LAUNCHED();
}

// Working copies from masters: w = p, rounded. The update keeps them so; this is for the start.
static inline void weights_round(floatX *w,       // (count)
                                 const float *p,  // (count)
                                 size_t count, cudaStream_t stream) {
    weights_round_kernel<<<adamw_blocks(count), ADAMW_THREADS, 0, stream>>>(w, p, count);
    CUDA_LAUNCHED();
}

#endif
