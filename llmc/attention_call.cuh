// attention_call.cuh: causal attention with windows and documents: what it computes, the arguments
// of a call, and the two functions the trainer calls. The kernels are those of the file that
// includes this one: attention.cuh (BF16, on tensor cores), attention_sm90.cuh (the same for
// Hopper) or attention_fp32.cuh (plain). It names them: ATTENTION_NAME; and says whether their
// backward can undo norm and rotation: ATTENTION_ROTATES.
//
//     s_ij = scale q_i . k_j,   p_ij = exp(s_ij - lse_i),   o_i = sum_j p_ij v_j
//     scale = 1.44 / sqrt(D),   lse_i = log sum_j exp(s_ij)              j: the keys i sees
//
// Query i sees keys first_i .. i, first_i = max(doc_start[i], i - W): itself, at most W before it,
// none of another document. There is no batch axis: the n tokens lie one behind the other, and rows
// of the batch are apart because they are different documents. Each head is a problem of its own.
// Backward, with do = dout and delta_i = do_i . o_i:
//
//     dp_ij = do_i . v_j,       ds_ij = p_ij (dp_ij - delta_i),
//     dv_j = sum_i p_ij do_i,   dk_j = scale sum_i ds_ij q_i,   dq_i = scale sum_j ds_ij k_j
//
// q, k, v, dq, dk, dv are n rows of H heads of D, ld apart; o and dout too, ldo apart. lse and
// delta are (H, n), FP32. Backward needs q, k, v, o and lse. Given a Rotary, it goes on through the
// backward of q, k = N(rope(..)) (rotary.cuh): dq and dk are gradients of what these were made of.
// Left out: fewer heads of k and v than of q, dropout, and storing s and p, which are (n, n).
#ifndef LLMC_ATTENTION_CALL_CUH
#define LLMC_ATTENTION_CALL_CUH

#include <assert.h>
#include <math.h>

#include "llmc/cuda_common.cuh"  // floatX, LOG2_E

// What backward needs to go on through norm and rotation. r NULL: it does not.
typedef struct {
    const float *r;        // (n, 2H): the norms' factors, q's heads, then k's
    const float2 *angles;  // (T, D/2): cos and sin; token t stands at position t % T
    int T;
} Rotary;

// A call's arguments.
typedef struct {
    floatX *o;                // (n) rows of H D, ldo apart; backward reads it
    float *lse;               // (H, n); backward reads it
    const floatX *q, *k, *v;  // (n) rows of H D, ld apart
    const int *doc_start;     // (n)
    floatX *dq, *dk, *dv;     // as q, k, v
    float *delta;             // (H, n)
    const floatX *dout;       // as o
    Rotary rotary;            // backward's
    int n, H, D, W, ldo, ld;
    float scale, scale2;  // scale2 = scale log2 e: exp(scale x) = 2^(scale2 x)
} Attention;

// What the including file brings: they enqueue the kernels that write o and lse; delta, dq, dk, dv.
void attention_run_forward(const Attention &a, cudaStream_t stream);
void attention_run_backward(const Attention &a, cudaStream_t stream);

// Moves the pointers to a head.
__device__ __forceinline__ void at_head(Attention &a, int head) {
    int h = head * a.D;
    size_t at = (size_t)head * (unsigned)a.n;
    a.o += h, a.dout += h, a.q += h, a.k += h, a.v += h, a.dq += h, a.dk += h, a.dv += h;
    a.lse += at, a.delta += at;
}

// The first key that query i sees. Never falls as i rises.
__device__ __forceinline__ int first_key(const Attention &a, int i) {
    return max(a.doc_start[i], i - a.W);
}

// The last query that sees key k: the last i from k on with first_i <= k. The warp tries 32 places
// between one that does and one that does not, until they are neighbours.
__device__ __forceinline__ int last_query(const Attention &a, int k) {
    int yes = k, no = min(a.n, k + a.W + 1), lane = lane_id();
    while (no - yes > 1) {
        int step = (no - yes + WARP - 1) / WARP, i = yes + (lane + 1) * step;
        bool sees = i < no && a.doc_start[i] <= k;
        yes += step * __popc(__ballot_sync(FULL_WARP, sees));
        no = min(no, yes + step);
    }
    return yes;
}

static inline Attention attention_of(const floatX *q, const floatX *k, const floatX *v,
                                     const int *doc_start, int n, int H, int D, int W, int ldo,
                                     int ld) {
    Attention a = {};
    a.q = q, a.k = k, a.v = v, a.doc_start = doc_start;
    a.n = n, a.H = H, a.D = D, a.W = min(W, n), a.ldo = ldo, a.ld = ld;
    a.scale = 1.44f / sqrtf((float)D), a.scale2 = a.scale * LOG2_E;
    return a;
}

static inline void attention_forward(floatX *o,        // (n) rows of H D, ldo apart
                                     float *lse,       // (H, n)
                                     const floatX *q,  // (n) rows of H D, ld apart; so k, v
                                     const floatX *k, const floatX *v,
                                     const int *doc_start,  // (n)
                                     int n, int H, int D, int W, int ldo, int ld,
                                     cudaStream_t stream) {
    Attention a = attention_of(q, k, v, doc_start, n, H, D, W, ldo, ld);
    a.o = o, a.lse = lse;
    attention_run_forward(a, stream);
}

static inline void attention_backward(floatX *dq,  // (n) rows of H D, ld apart; so dk, dv, q, k, v
                                      floatX *dk, floatX *dv,
                                      float *delta,        // (H, n), scratch
                                      const floatX *dout,  // (n) rows of H D, ldo apart; so o
                                      const floatX *o,
                                      const float *lse,  // (H, n)
                                      const floatX *q, const floatX *k, const floatX *v,
                                      const int *doc_start,  // (n)
                                      const Rotary &rotary,  // r NULL without ATTENTION_ROTATES
                                      int n, int H, int D, int W, int ldo, int ld,
                                      cudaStream_t stream) {
    Attention a = attention_of(q, k, v, doc_start, n, H, D, W, ldo, ld);
    a.rotary = rotary;
    a.o = (floatX *)o, a.lse = (float *)lse;  // only read
    a.dq = dq, a.dk = dk, a.dv = dv, a.delta = delta, a.dout = dout;
    attention_run_backward(a, stream);
}

#endif
