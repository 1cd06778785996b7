// step.cuh: what changes from step to step, in one struct of device memory, and the check between
// backward and update.
//
//     grad_norm_add   sums of squares of one tensor's gradient, a number for each chunk of it
//     step_tell       what the others must know of this rank: its loss, the squares of each tensor
//     step_check      norm = sqrt(sum of all ranks'), grad_scale = min(1, clip / (norm + 1e-6)),
//                     skip = loss or norm is not finite
//
// The optimizer's kernels read their rates from the struct and do nothing where skip is set, so no
// launch argument ever changes and the host need not look before the update is enqueued.
//
// Squares are added in double: no finite gradient overflows it, so a sum is finite iff every
// element is. Chunks begin at fixed elements and are added in a fixed order. Sums of squares move 4
// bytes an element.
#ifndef LLMC_STEP_CUH
#define LLMC_STEP_CUH

#include <limits.h>
#include <math.h>
#include <string.h>

#include "llmc/schedule.h"  // Plan, Schedule, plan_group, schedule_at
#include "llmc/vec.cuh"     // vec_load, block_sum

// One group's numbers at step t = 1, 2, ..., made in double and rounded once.
typedef struct {
    float rate;      // lr / (1 - beta1^t)
    float shrink;    // 1 - lr wd
    float v_unbias;  // 1 / (1 - beta2^t)
    float beta1, beta2, eps;
} AdamwNumbers;

typedef struct {
    // Made on the host (step_numbers).
    AdamwNumbers adamw[GROUP_COUNT];
    float momentum, beta2, lr, wd;  // Muon's
    float clip;                     // --grad-clip, 0: off
    int asked;                      // of the run, from outside: a StopRequest
    // Made on the device; of this rank, and from step_check on of all.
    double loss_sum;   // nats of all targets (loss_reduce)
    double grad_norm;  // of all tensors
    float grad_scale;  // what clipping multiplies the gradient by
    int skip;          // loss or gradient is not finite: no update
    int bad_row;       // first row with a loss that is not finite, else INT_MAX (loss_reduce)
} StepState;

// The numbers of step `it` = 0, 1, ...; what the device makes is reset.
static inline void step_numbers(StepState *s, const Plan *plan, const Flags *f, const Config *c,
                                int64_t it) {
    Schedule now = schedule_at(it, plan->steps, f->warmup);
    double t = (double)(it + 1);
    memset(s, 0, sizeof *s);
    for (int i = 0; i < GROUP_COUNT; i++) {
        GroupNumbers k = plan_group(plan, f, c, (Group)i);
        double lr = schedule_lr(now, k, (Group)i);
        if (i == GROUP_MATRIX) {
            s->momentum = (float)now.momentum, s->beta2 = (float)k.beta2;
            s->lr = (float)lr, s->wd = (float)(k.wd * now.wd);
            continue;
        }
        AdamwNumbers *a = &s->adamw[i];
        a->rate = (float)(lr / (1 - pow(k.beta1, t)));
        a->shrink = (float)(1 - lr * k.wd);
        a->v_unbias = (float)(1 / (1 - pow(k.beta2, t)));
        a->beta1 = (float)k.beta1, a->beta2 = (float)k.beta2, a->eps = (float)k.eps;
    }
    s->clip = (float)f->grad_clip;
    s->grad_scale = 1, s->bad_row = INT_MAX;
}

// ---------------------------------------------------------------------------------------------
// Kernels.

constexpr int NORM_CHUNK = 65536, NORM_THREADS = 512, CHECK_THREADS = 1024;

// One block a chunk.
[[maybe_unused]] static __global__ void __launch_bounds__(NORM_THREADS)
    grad_norm_kernel(double *partial,  // (chunks)
                     const float *g,   // (count)
                     size_t count) {
    size_t from = (size_t)blockIdx.x * NORM_CHUNK;
    int n = count - from < NORM_CHUNK ? (int)(count - from) : NORM_CHUNK;
    double sum = 0;
    g += from;
#pragma unroll 4
    for (int i = 4 * (int)threadIdx.x; i + 4 <= n; i += 4 * NORM_THREADS) {
        float x[4];
        vec_load(x, g + i);
        for (int j = 0; j < 4; j++) sum += (double)x[j] * x[j];
    }
    for (int i = n / 4 * 4 + (int)threadIdx.x; i < n; i += NORM_THREADS) sum += (double)g[i] * g[i];
    sum = block_sum<NORM_THREADS>(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// What a rank tells: these numbers, then a sum of squares for each tensor.
enum { TOLD_LOSS, TOLD_BAD_ROW, TOLD_ASKED, TOLD_SQUARES };

// One block; a warp adds up a tensor.
[[maybe_unused]] static __global__ void __launch_bounds__(CHECK_THREADS)
    step_tell_kernel(double *told,  // (TOLD_SQUARES + tensors)
                     const StepState *s,
                     const double *partial,   // (first_chunk[tensors])
                     const int *first_chunk,  // (tensors + 1)
                     int tensors) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    for (int t = warp; t < tensors; t += CHECK_THREADS / WARP) {
        double sum = 0;
        for (int i = first_chunk[t] + lane; i < first_chunk[t + 1]; i += WARP) sum += partial[i];
        sum = warp_sum(sum);
        if (lane == 0) told[TOLD_SQUARES + t] = sum;
    }
    if (threadIdx.x) return;
    told[TOLD_LOSS] = s->loss_sum, told[TOLD_BAD_ROW] = s->bad_row, told[TOLD_ASKED] = s->asked;
}

// One block. Ranks are added in their order, for each tensor.
[[maybe_unused]] static __global__ void __launch_bounds__(CHECK_THREADS)
    step_check_kernel(StepState *s,
                      const double *told,  // (world, TOLD_SQUARES + tensors)
                      int world, int tensors) {
    double all = 0;
    int apart = TOLD_SQUARES + tensors;
    for (int t = (int)threadIdx.x; t < tensors; t += CHECK_THREADS) {
        double sum = 0;
        for (int r = 0; r < world; r++) sum += told[r * apart + TOLD_SQUARES + t];
        all += sum;
    }
    all = block_sum<CHECK_THREADS>(all);
    if (threadIdx.x) return;
    double loss = 0, bad_row = INT_MAX, asked = 0;
    for (int r = 0; r < world; r++) {
        loss += told[r * apart + TOLD_LOSS];
        bad_row = fmin(bad_row, told[r * apart + TOLD_BAD_ROW]);
        asked = fmax(asked, told[r * apart + TOLD_ASKED]);
    }
    s->loss_sum = loss, s->bad_row = (int)bad_row, s->asked = (int)asked;
    s->grad_norm = sqrt(all);
    s->grad_scale = s->clip > 0 ? (float)fmin(1.0, s->clip / (s->grad_norm + 1e-6)) : 1.0f;
    s->skip = !isfinite(s->loss_sum) || !isfinite(s->grad_norm);
}

// ---------------------------------------------------------------------------------------------
// Launchers.

// Numbers that grad_norm_add makes of a tensor of `count` elements.
static inline int grad_norm_chunks(size_t count) {
    return (int)ceil_div(count, (size_t)NORM_CHUNK);
}

static inline void grad_norm_add(double *partial,  // (grad_norm_chunks(count)): this tensor's
                                 const float *g,   // (count)
                                 size_t count, cudaStream_t stream) {
    grad_norm_kernel<<<grad_norm_chunks(count), NORM_THREADS, 0, stream>>>(partial, g, count);
    CUDA_LAUNCHED();
}

static inline void step_tell(double *told,            // (TOLD_SQUARES + tensors)
                             const StepState *step,   // its loss is final
                             const double *partial,   // (first_chunk[tensors])
                             const int *first_chunk,  // (tensors + 1), device: where each begins
                             int tensors, cudaStream_t stream) {
    step_tell_kernel<<<1, CHECK_THREADS, 0, stream>>>(told, step, partial, first_chunk, tensors);
    CUDA_LAUNCHED();
}

static inline void step_check(StepState *step,
                              const double *told,  // (world, TOLD_SQUARES + tensors)
                              int world, int tensors, cudaStream_t stream) {
    step_check_kernel<<<1, CHECK_THREADS, 0, stream>>>(step, told, world, tensors);
    CUDA_LAUNCHED();
}

#endif
