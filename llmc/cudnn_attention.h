// cudnn_attention.h: attention by cuDNN, for the BF16 build (make USE_CUDNN=1).
// attention_call.cuh has the formulas. Pointers and strides are the same, but
//
//   - the n tokens are n/T rows of T, T a multiple of 128, and each row is one document: a mask
//     within rows is not built (cudnn_attention_check says so to the user). For samples and the
//     last rows of a validation, which no plan is made for, our own attention is still needed.
//   - lse, which only backward reads, is (n/T, H, T), not (H, n).
//   - work memory comes from the caller; cudnn_attention_bytes tells how much.
//
// cuDNN plans each new shape once, which takes a while: at the start, as cudnn_attention_bytes is
// asked for every shape of the run. What is planned can be captured in a CUDA graph.
//
// DETERMINISM. cuDNN adds up dq in no fixed order, unless it may write all of ds (n/T, H, T, T) to
// memory, in BF16. Given that much room (deterministic_bytes) it does; else two runs of the same
// command differ in their last bits, and one line says so.
#ifndef LLMC_CUDNN_ATTENTION_H
#define LLMC_CUDNN_ATTENTION_H

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stddef.h>

extern "C" {

typedef struct CudnnAttention CudnnAttention;

// deterministic_bytes: room that backward may take to be deterministic; 0: it is not.
CudnnAttention *cudnn_attention_init(size_t deterministic_bytes);
void cudnn_attention_free(CudnnAttention *a);

// Leaves with EXIT_USAGE when cuDNN cannot do what the flags say.
void cudnn_attention_check(int T, bool doc_mask);

// Plans both passes of this shape. Returns the work memory that serves it and all shapes before.
size_t cudnn_attention_bytes(CudnnAttention *a, int n, int T, int H, int D, int W, int ldo, int ld);

void cudnn_attention_forward(CudnnAttention *a,
                             __nv_bfloat16 *o,        // (n) rows of H D, ldo apart
                             float *lse,              // (n/T, H, T)
                             const __nv_bfloat16 *q,  // (n) rows of H D, ld apart; so k, v
                             const __nv_bfloat16 *k, const __nv_bfloat16 *v,
                             void *work,  // (cudnn_attention_bytes)
                             int n, int T, int H, int D, int W, int ldo, int ld,
                             cudaStream_t stream);

void cudnn_attention_backward(CudnnAttention *a,
                              __nv_bfloat16 *dq,  // (n) rows of H D, ld apart; so dk, dv, q, k, v
                              __nv_bfloat16 *dk, __nv_bfloat16 *dv,
                              const __nv_bfloat16 *dout,  // (n) rows of H D, ldo apart; so o
                              const __nv_bfloat16 *o,
                              const float *lse,  // (n/T, H, T)
                              const __nv_bfloat16 *q, const __nv_bfloat16 *k,
                              const __nv_bfloat16 *v,
                              void *work,  // (cudnn_attention_bytes)
                              int n, int T, int H, int D, int W, int ldo, int ld,
                              cudaStream_t stream);

}  // extern "C"

#endif
