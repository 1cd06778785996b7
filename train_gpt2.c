// train_gpt2.c: a GPT-2 of 2026, trained on the CPU in FP32. The oracle of the CUDA trainer, and
// the explanation of the model: every operation is a function with its formula above it.
//
//     x  = N(wte[idx])                          N(x) = x / sqrt(mean(x^2) + 2^-23), over channels
//     x  = x + smear(x)                         a gated part of the token before
//     x0 = x
//     for each layer i:
//         x = resid_lambda[i] x + x0_lambda[i] x0
//         x = x + attention(N(x)) wo^T          rotary, q and k normed, windows, value embeddings
//         x = x + relu(N(x) wfc^T)^2 wproj^T
//     x = x - backout_lambda x_middle           the stream as it left layer L/2
//     logits = 15 tanh(N(x) lm_head^T / 15),    loss = mean cross entropy
//
// The file runs: operations, model, forward and backward, optimizer, a whole step. Backward passes
// are written by hand, below their forward pass; dy is the gradient of the loss with respect to y.
// Matrix products (llmc/matmul.h) are blocked FP32; norms, softmax, loss and dot products sum in
// double. Threads share out independent outputs only, so the bits of a run do not depend on their
// number. What is around the model (flags, data, evaluation, samples, saves, log) is llmc/run.h's.
// Several processes may share the work: each does rows of its own with all weights, and updates the
// part of them that it owns (llmc/shard.h, llmc/dist.h).
//
// Leaves out: dropout, biases, learned norms, a key-value cache (a sample recomputes its row).
#include <assert.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llmc/dataloader.h"  // loader_next, loader_origin, loader_state
#include "llmc/die.h"         // die_alloc
#include "llmc/dist.h"        // Dist, dist_sum, dist_all_gather, dist_broadcast
#include "llmc/flags.h"       // Flags
#include "llmc/matmul.h"      // matmul_forward, matmul_dgrad, matmul_wgrad
#include "llmc/model.h"       // Config, Table, table_init, table_fill
#include "llmc/run.h"         // run_main; declares the model_ functions that this file defines
#include "llmc/schedule.h"    // Plan, Phase, plan_group, schedule_at, schedule_lr
#include "llmc/shard.h"       // ShardPlan, Piece, shard_init, shard_next

// =============================================================================================
// Operations, in the order of the computation.
//
// n is the number of tokens of a micro-batch, B*T; a "row" is one sequence of T of them.

// sum_i a_i b_i, in double.
static inline double dot(const float *a, const float *b, int n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += (double)a[i] * b[i];
    return sum;
}

// y += a x
static inline void axpy(float *restrict y, float a, const float *restrict x, int n) {
    for (int i = 0; i < n; i++) y[i] += a * x[i];
}

// e^x in double for |x| <= 700, to 1e-15: 2^k e^r with |r| <= ln(2)/2. Branchless, so that loops
// over it become vector code; libm's exp would take longer than the head's matmul at V = 50257.
static inline double exp_inline(double x) {
    const double shift = 0x1.8p52;  // adding it leaves the rounded k in the low bits
    double k = x * 1.4426950408889634 + shift, whole = k - shift, scale;
    double r = x - whole * 6.93147180369123816490e-01 - whole * 1.90821492927058770002e-10;
    // clang-format off
    double p = 1 + r * (1 + r * (1.0 / 2 + r * (1.0 / 6 + r * (1.0 / 24 + r * (1.0 / 120 +
               r * (1.0 / 720 + r * (1.0 / 5040 + r * (1.0 / 40320 + r * (1.0 / 362880 +
               r * (1.0 / 3628800 + r * (1.0 / 39916800)))))))))));
    // clang-format on
    uint64_t bits;
    memcpy(&bits, &k, sizeof bits);
    bits = (bits + 1023) << 52;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

static double sigmoid(double z) { return 1 / (1 + exp(-z)); }

// y = N(x) = r x,  r = 1 / sqrt(mean(x^2) + 2^-23), over each of `rows` vectors of `width`.
static void norm_forward(float *y,        // (rows, width)
                         float *r,        // (rows), kept for backward
                         const float *x,  // (rows, width)
                         int64_t rows, int width) {
#pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        const float *xi = x + i * width;
        double scale = 1 / sqrt(dot(xi, xi, width) / width + 0x1p-23);
        r[i] = (float)scale;
        for (int c = 0; c < width; c++) y[i * width + c] = (float)(scale * xi[c]);
    }
}

// dx (+)= r (dy - y mean(dy y)). dx may be dy.
static void norm_backward(float *dx,        // (rows, width)
                          const float *dy,  // (rows, width)
                          const float *y,   // (rows, width), forward's output
                          const float *r,   // (rows)
                          int64_t rows, int width, bool add) {
#pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        const float *dyi = dy + i * width, *yi = y + i * width;
        float *dxi = dx + i * width;
        float mean = (float)(dot(dyi, yi, width) / width);
        for (int c = 0; c < width; c++) {
            float d = r[i] * (dyi[c] - yi[c] * mean);
            dxi[c] = add ? dxi[c] + d : d;
        }
    }
}

// y[t] = table[idx[t]]
static void embed_forward(float *y,            // (n, C)
                          const int *idx,      // (n)
                          const float *table,  // (Vp, C)
                          int64_t n, int C) {
#pragma omp parallel for
    for (int64_t t = 0; t < n; t++)
        memcpy(y + t * C, table + (int64_t)idx[t] * C, sizeof(float) * (size_t)C);
}

// dtable[idx[t]] += dy[t]. Tokens repeat, so threads share out the channels, not the tokens.
static void embed_backward(float *dtable,    // (Vp, C)
                           const float *dy,  // (n, C)
                           const int *idx,   // (n)
                           int64_t n, int C) {
    const int slice = 32;
#pragma omp parallel for
    for (int c0 = 0; c0 < C; c0 += slice)
        for (int64_t t = 0; t < n; t++)
            for (int c = c0; c < c0 + slice && c < C; c++)
                dtable[(int64_t)idx[t] * C + c] += dy[t * C + c];
}

// Where the document of each token begins: the last BOS up to t in its row, or the row's start.
// With doc_mask 0 the row is one document. A token is its document's first iff doc_start[t] == t.
static void find_documents(int *doc_start,  // (B, T), positions in the row
                           const int *idx,  // (B, T)
                           int B, int T, int bos, bool doc_mask) {
    for (int64_t b = 0; b < B; b++)
        for (int t = 0; t < T; t++) {
            int64_t at = b * T + t;
            bool first = t == 0 || (doc_mask && idx[at] == bos);
            doc_start[at] = first ? t : doc_start[at - 1];
        }
}

// y[t] = x[t] + lambda s[t] x[t-1],  s[t] = sigmoid(x[t][0:24] . gate); y[t] = x[t] at a document's
// start. (modded-nanogpt's smear: a token mixes with the one before it at almost no cost.)
static void smear_forward(float *y,           // (B, T, C)
                          float *s,           // (B, T), 0 at a document's start
                          const float *x,     // (B, T, C)
                          const float *gate,  // (24)
                          float lambda,
                          const int *doc_start,  // (B, T)
                          int B, int T, int C) {
#pragma omp parallel for
    for (int64_t i = 0; i < (int64_t)B * T; i++) {
        bool first = doc_start[i] == i % T;
        const float *xi = x + i * C, *before = first ? xi : xi - C;
        s[i] = first ? 0 : (float)sigmoid(dot(xi, gate, SMEAR_CHANNELS));
        for (int c = 0; c < C; c++)
            y[i * C + c] = first ? xi[c] : xi[c] + lambda * s[i] * before[c];
    }
}

// dx[t] = dy[t] + lambda s[t+1] dy[t+1]        t's own term, and its part in the token after it
// with  g = <dy[t], x[t-1]>:   dlambda += s[t] g,   dz = lambda g s (1 - s),
//                              dx[t][0:24] += dz gate,   dgate += dz x[t][0:24]
static void smear_backward(float *dx,          // (B, T, C)
                           float *dgate,       // (24)
                           float *dlambda,     // (1)
                           const float *dy,    // (B, T, C)
                           const float *x,     // (B, T, C)
                           const float *s,     // (B, T)
                           const float *gate,  // (24)
                           float lambda,
                           double *g,  // (B, T) scratch
                           int B, int T, int C) {
    int64_t n = (int64_t)B * T;
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        bool passed_on = (i + 1) % T && s[i + 1] != 0;
        for (int c = 0; c < C; c++)
            dx[i * C + c] =
                dy[i * C + c] + (passed_on ? lambda * s[i + 1] * dy[(i + 1) * C + c] : 0);
        g[i] = s[i] != 0 ? dot(dy + i * C, x + (i - 1) * C, C) : 0;
        float dz = (float)(lambda * g[i] * s[i] * (1 - s[i]));
        for (int c = 0; c < SMEAR_CHANNELS; c++) dx[i * C + c] += dz * gate[c];
    }
    double lambda_sum = 0, gate_sum[SMEAR_CHANNELS] = {0};
    for (int64_t i = 0; i < n; i++) {
        lambda_sum += s[i] * g[i];
        double dz = lambda * g[i] * s[i] * (1 - s[i]);
        for (int c = 0; c < SMEAR_CHANNELS; c++) gate_sum[c] += dz * x[i * C + c];
    }
    *dlambda += (float)lambda_sum;
    for (int c = 0; c < SMEAR_CHANNELS; c++) dgate[c] += (float)gate_sum[c];
}

// y = lambda x + lambda0 x0: what a layer starts from.
static void mix_forward(float *y,         // (count)
                        const float *x,   // (count)
                        const float *x0,  // (count)
                        float lambda, float lambda0, int64_t count) {
#pragma omp parallel for
    for (int64_t i = 0; i < count; i++) y[i] = lambda * x[i] + lambda0 * x0[i];
}

// <a, b> over n tokens of C channels; the token sums are added in order.
static double dot_tokens(const float *a,   // (n, C)
                         const float *b,   // (n, C)
                         double *partial,  // (n) scratch
                         int64_t n, int C) {
#pragma omp parallel for
    for (int64_t t = 0; t < n; t++) partial[t] = dot(a + t * C, b + t * C, C);
    double sum = 0;
    for (int64_t t = 0; t < n; t++) sum += partial[t];
    return sum;
}

// dlambda += <dy, x>, dlambda0 += <dy, x0>, dx0 += lambda0 dy, dx = lambda dy. dx may be dy.
static void mix_backward(float *dx,        // (n, C)
                         float *dx0,       // (n, C)
                         float *dlambda,   // (1)
                         float *dlambda0,  // (1)
                         const float *dy,  // (n, C)
                         const float *x,   // (n, C)
                         const float *x0,  // (n, C)
                         float lambda, float lambda0,
                         double *partial,  // (n) scratch
                         int64_t n, int C) {
    *dlambda += (float)dot_tokens(dy, x, partial, n, C);
    *dlambda0 += (float)dot_tokens(dy, x0, partial, n, C);
#pragma omp parallel for
    for (int64_t i = 0; i < n * C; i++) {
        dx0[i] += lambda0 * dy[i];
        dx[i] = lambda * dy[i];
    }
}

// cos and sin of pos * 100000^(-2j/D), computed in double.
static void rope_init(float *cosine,  // (T, D/2)
                      float *sine,    // (T, D/2)
                      int T, int D) {
    for (int t = 0; t < T; t++)
        for (int j = 0; j < D / 2; j++) {
            double angle = t * pow(100000, -2.0 * j / D);
            int64_t at = (int64_t)t * (D / 2) + j;
            cosine[at] = (float)cos(angle), sine[at] = (float)sin(angle);
        }
}

// Half-split rotation of one head (RoFormer, Su et al. 2021), dims j and j + D/2 as a pair:
//     y1 = x1 cos + x2 sin,   y2 = x2 cos - x1 sin.    direction -1 rotates back.
static void rope_rotate(float *x,             // (D)
                        const float *cosine,  // (D/2)
                        const float *sine,    // (D/2)
                        int half, float direction) {
    for (int j = 0; j < half; j++) {
        float x1 = x[j], x2 = x[j + half], s = direction * sine[j];
        x[j] = x1 * cosine[j] + x2 * s;
        x[j + half] = x2 * cosine[j] - x1 * s;
    }
}

// q, k = N(rope(q)), N(rope(k)) per head, in place in the packed rows q | k | v of 3C.
static void qk_forward(float *qkv,           // (B, T, 3C)
                       float *r,             // (B, T, 2H), the norms' factors: q's heads, then k's
                       const float *cosine,  // (T, D/2)
                       const float *sine,    // (T, D/2)
                       int B, int T, int H, int D) {
    int C = H * D, half = D / 2;
#pragma omp parallel for
    for (int64_t i = 0; i < (int64_t)B * T; i++)
        for (int h = 0; h < 2 * H; h++) {  // heads of q, then of k: they lie one after the other
            float *x = qkv + i * 3 * C + h * D;
            int64_t t = i % T;
            rope_rotate(x, cosine + t * half, sine + t * half, half, 1);
            double scale = 1 / sqrt(dot(x, x, D) / D + 0x1p-23);
            r[i * 2 * H + h] = (float)scale;
            for (int d = 0; d < D; d++) x[d] = (float)(scale * x[d]);
        }
}

// In place in the packed gradients: the norm's backward, then the rotation back.
static void qk_backward(float *dqkv,          // (B, T, 3C)
                        const float *qkv,     // (B, T, 3C), forward's output
                        const float *r,       // (B, T, 2H)
                        const float *cosine,  // (T, D/2)
                        const float *sine,    // (T, D/2)
                        int B, int T, int H, int D) {
    int C = H * D, half = D / 2;
#pragma omp parallel for
    for (int64_t i = 0; i < (int64_t)B * T; i++)
        for (int h = 0; h < 2 * H; h++) {
            float *dx = dqkv + i * 3 * C + h * D;
            const float *y = qkv + i * 3 * C + h * D;
            float scale = r[i * 2 * H + h], mean = (float)(dot(dx, y, D) / D);
            for (int d = 0; d < D; d++) dx[d] = scale * (dx[d] - y[d] * mean);
            int64_t t = i % T;
            rope_rotate(dx, cosine + t * half, sine + t * half, half, -1);
        }
}

// Value embedding (ResFormer, Zhou et al. 2024; gated per head as in nanochat):
//     gate[t][h] = 3 s,  s = sigmoid(x[t][0:12] . w[h]),    v[t][h] += gate[t][h] table[idx[t]][h]
static void value_embed_forward(float *v,            // (n, 3C) rows, v's part of qkv
                                float *gate,         // (n, H)
                                const float *x,      // (n, C), the layer's normed input
                                const float *w,      // (H, 12)
                                const float *table,  // (Vp, C)
                                const int *idx,      // (n)
                                int64_t n, int H, int D) {
    int C = H * D;
#pragma omp parallel for
    for (int64_t t = 0; t < n; t++)
        for (int h = 0; h < H; h++) {
            float g = (float)(3 * sigmoid(dot(x + t * C, w + h * GATE_CHANNELS, GATE_CHANNELS)));
            const float *embed = table + (int64_t)idx[t] * C + h * D;
            gate[t * H + h] = g;
            for (int d = 0; d < D; d++) v[t * 3 * C + h * D + d] += g * embed[d];
        }
}

// dtable[idx[t]][h] += gate dv[t][h],   dgate = <dv[t][h], table[idx[t]][h]>,
// dz = dgate 3 s (1 - s),   dw[h] += dz x[t][0:12],   dx[t][0:12] += dz w[h].
// v's own gradient is dv, unchanged.
static void value_embed_backward(float *dtable,       // (Vp, C)
                                 float *dw,           // (H, 12)
                                 float *dx,           // (n, C)
                                 const float *dv,     // (n, 3C) rows, v's part of dqkv
                                 const float *gate,   // (n, H)
                                 const float *x,      // (n, C)
                                 const float *w,      // (H, 12)
                                 const float *table,  // (Vp, C)
                                 const int *idx,      // (n)
                                 double *dz,          // (n, H) scratch
                                 int64_t n, int H, int D) {
    int C = H * D;
#pragma omp parallel for
    for (int h = 0; h < H; h++) {
        double sum[GATE_CHANNELS] = {0};
        for (int64_t t = 0; t < n; t++) {
            int64_t at = (int64_t)idx[t] * C + h * D;
            const float *dvh = dv + t * 3 * C + h * D;
            double g = gate[t * H + h], s = g / 3;
            dz[t * H + h] = dot(dvh, table + at, D) * 3 * s * (1 - s);
            for (int d = 0; d < D; d++) dtable[at + d] += (float)g * dvh[d];
            for (int c = 0; c < GATE_CHANNELS; c++) sum[c] += dz[t * H + h] * x[t * C + c];
        }
        for (int c = 0; c < GATE_CHANNELS; c++) dw[h * GATE_CHANNELS + c] += (float)sum[c];
    }
#pragma omp parallel for
    for (int64_t t = 0; t < n; t++)
        for (int h = 0; h < H; h++)
            for (int c = 0; c < GATE_CHANNELS; c++)
                dx[t * C + c] += (float)(dz[t * H + h] * w[h * GATE_CHANNELS + c]);
}

static double attention_scale(int D) { return 1.44 / sqrt(D); }

// Query i of a row sees keys first .. i: causal, at most W before it, in its own document.
static int first_key(int i, int W, int doc_start) {
    int first = i - W > 0 ? i - W : 0;
    return first > doc_start ? first : doc_start;
}

// p[j] = exp(scale q . k_j - shift) for one query and its `count` keys, which lie `row` floats
// apart. q and k have norm sqrt(D), so |scale q . k_j| <= 1.44 sqrt(D).
static void attention_weights(float *p,        // (count)
                              const float *q,  // (D)
                              const float *k,  // (count) rows of (D)
                              double scale, double shift, int count, int64_t row, int D) {
    for (int j = 0; j < count; j++) p[j] = (float)(scale * dot(q, k + j * row, D) - shift);
    for (int j = 0; j < count; j++) p[j] = (float)exp_inline(p[j]);
}

// o_i = sum_j p_ij v_j over the visible keys j, p_i = softmax_j(scale q_i . k_j).
// q, k, v are the parts of packed rows of 3C. Keeps lse_i = log sum_j exp(scale q_i . k_j).
static void attention_forward(float *o,              // (B, T, C)
                              float *lse,            // (B, T, H)
                              const float *qkv,      // (B, T, 3C)
                              const int *doc_start,  // (B, T)
                              int W, int B, int T, int H, int D) {
    int C = H * D;
    double scale = attention_scale(D);
#pragma omp parallel
    {
        float *p = die_alloc((size_t)T, sizeof *p, "attention's weights of a query");
#pragma omp for collapse(2) schedule(dynamic, 16)
        for (int64_t bh = 0; bh < (int64_t)B * H; bh++)
            for (int i = 0; i < T; i++) {
                int64_t b = bh / H, h = bh % H, at = b * T + i, row = 3 * C;
                int first = first_key(i, W, doc_start[at]), count = i - first + 1;
                const float *q = qkv + at * row + h * D,
                            *k = qkv + (b * T + first) * row + C + h * D, *v = k + C;
                for (int j = 0; j < count; j++) p[j] = (float)(scale * dot(q, k + j * row, D));
                float largest = p[0];
                for (int j = 1; j < count; j++) largest = p[j] > largest ? p[j] : largest;
                for (int j = 0; j < count; j++) p[j] = (float)exp_inline(p[j] - largest);
                double sum = 0;
                for (int j = 0; j < count; j++) sum += p[j];
                lse[at * H + h] = (float)(largest + log(sum));
                float *oi = o + at * C + h * D;
                memset(oi, 0, sizeof *oi * (size_t)D);
                for (int j = 0; j < count; j++) axpy(oi, (float)(p[j] / sum), v + j * row, D);
            }
        free(p);
    }
}

// With dp_ij = do_i . v_j and delta_i = do_i . o_i:   ds_ij = p_ij (dp_ij - delta_i) scale,
//     dv_j = sum_i p_ij do_i,   dq_i = sum_j ds_ij k_j,   dk_j = sum_i ds_ij q_i.
static void attention_backward(float *dqkv,           // (B, T, 3C)
                               const float *dout,     // (B, T, C), do above
                               const float *o,        // (B, T, C)
                               const float *lse,      // (B, T, H)
                               const float *qkv,      // (B, T, 3C)
                               const int *doc_start,  // (B, T)
                               int W, int B, int T, int H, int D) {
    int C = H * D;
    double scale = attention_scale(D);
    memset(dqkv, 0, sizeof *dqkv * (size_t)B * (size_t)T * 3 * (size_t)C);
#pragma omp parallel
    {
        float *p = die_alloc((size_t)T, sizeof *p, "attention's weights of a query");
#pragma omp for schedule(dynamic)
        for (int64_t bh = 0; bh < (int64_t)B * H; bh++)
            for (int i = 0; i < T; i++) {
                int64_t b = bh / H, h = bh % H, at = b * T + i, row = 3 * C;
                int first = first_key(i, W, doc_start[at]), count = i - first + 1;
                const float *q = qkv + at * row + h * D, *doi = dout + at * C + h * D;
                const float *k = qkv + (b * T + first) * row + C + h * D, *v = k + C;
                float *dq = dqkv + at * row + h * D, *dk = dqkv + (b * T + first) * row + C + h * D,
                      *dv = dk + C;
                double delta = dot(doi, o + at * C + h * D, D);
                attention_weights(p, q, k, scale, lse[at * H + h], count, row, D);
                for (int j = 0; j < count; j++) {
                    float ds = (float)(p[j] * (dot(doi, v + j * row, D) - delta) * scale);
                    axpy(dv + j * row, p[j], doi, D);
                    axpy(dq, ds, k + j * row, D);
                    axpy(dk + j * row, ds, q, D);
                }
            }
        free(p);
    }
}

// y += x
static void add_forward(float *y,        // (count)
                        const float *x,  // (count)
                        int64_t count) {
#pragma omp parallel for
    for (int64_t i = 0; i < count; i++) y[i] += x[i];
}

// y = relu(x)^2 (Primer, So et al. 2021); NaN stays NaN.
static void relu2_forward(float *y,        // (count)
                          const float *x,  // (count)
                          int64_t count) {
#pragma omp parallel for
    for (int64_t i = 0; i < count; i++) y[i] = x[i] <= 0 ? 0 : x[i] * x[i];
}

// dx = 2 relu(x) dy. dx may be dy.
static void relu2_backward(float *dx,        // (count)
                           const float *dy,  // (count)
                           const float *x,   // (count)
                           int64_t count) {
#pragma omp parallel for
    for (int64_t i = 0; i < count; i++) dx[i] = x[i] <= 0 ? 0 : 2 * x[i] * dy[i];
}

// y = x - lambda xb
static void backout_forward(float *y,         // (count)
                            const float *x,   // (count)
                            const float *xb,  // (count)
                            float lambda, int64_t count) {
#pragma omp parallel for
    for (int64_t i = 0; i < count; i++) y[i] = x[i] - lambda * xb[i];
}

// dlambda += -<dy, xb>,   dxb = -lambda dy;   dx = dy, which the caller has already.
static void backout_backward(float *dxb,       // (n, C)
                             float *dlambda,   // (1)
                             const float *dy,  // (n, C)
                             const float *xb,  // (n, C)
                             float lambda,
                             double *partial,  // (n) scratch
                             int64_t n, int C) {
    *dlambda -= (float)dot_tokens(dy, xb, partial, n, C);
#pragma omp parallel for
    for (int64_t i = 0; i < n * C; i++) dxb[i] = -lambda * dy[i];
}

// z = 15 tanh(a / 15), in place, for `count` logits a; 15 (1 - 2/(e^(2a/15) + 1)) is the same.
static void softcap_forward(float *z,  // (count)
                            int count) {
    for (int v = 0; v < count; v++) {
        double a = z[v] > 2000 ? 2000 : z[v] < -2000 ? -2000 : z[v];
        z[v] = (float)(15 - 30 / (exp_inline(a * (2.0 / 15)) + 1));
    }
}

// For each row: z = softcap(a), loss = log sum_v exp(z_v) - z_target. |z| <= 15: exp needs no
// shift.
static void classifier_forward(float *logits,       // (rows, V), a in, z out
                               double *losses,      // (rows)
                               const int *targets,  // (rows)
                               int64_t rows, int V) {
#pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        float *z = logits + i * V;
        softcap_forward(z, V);
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int v = 0; v < V; v++) sum += exp_inline(z[v]);
        losses[i] = log(sum) - z[targets[i]];
    }
}

// In place: da_v = scale (softmax(z)_v - [v = target]) (1 - (z_v/15)^2).
// The forward pass left log sum_v exp(z_v) = loss + z_target.
static void classifier_backward(float *logits,         // (rows, V), z in, da out
                                const double *losses,  // (rows)
                                const int *targets,    // (rows)
                                double scale,          // 1 / targets of the whole step
                                int64_t rows, int V) {
#pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        float *z = logits + i * V;
        double at_target = z[targets[i]], log_sum = losses[i] + at_target;
        for (int v = 0; v < V; v++) {
            double cap = 1 - (double)z[v] * z[v] / 225;
            z[v] = (float)(scale * exp_inline(z[v] - log_sum) * cap);
        }
        z[targets[i]] -= (float)(scale * (1 - at_target * at_target / 225));
    }
}

// =============================================================================================
// The model: parameters, activations, gradients. One allocation per kind of memory.

// Pointers into an arena laid out by the table; the parameters have one, the gradients another.
typedef struct {
    float *wte;           // (Vp, C)
    float *smear_gate;    // (24)
    float *smear_lambda;  // (1)
    struct {
        float *wqkv;         // (3C, C): wq, wk, wv
        float *wo;           // (C, C)
        float *wfc;          // (F, C)
        float *wproj;        // (C, F)
        float *ve_gate;      // (H, 12), NULL in layers without a value embedding
        float *value_embed;  // (Vp, C), likewise
    } layer[MODEL_MAX_LAYERS];
    float *resid_lambda;    // (L)
    float *x0_lambda;       // (L)
    float *backout_lambda;  // (1)
    float *lm_head;         // (Vp, C)
} Weights;

// What forward keeps for backward, and backward's own scratch. n = B*T tokens of a micro-batch.
typedef struct {
    float *embed, *embed_r;  // (n, C), (n): N(wte[idx]) and its factors
    float *smear;            // (n): the smear gates
    float *x0;               // (n, C): the stream after the smear
    // (L + 1, n, C): the residual stream as it enters each layer, and leaves the last
    float *stream;
    float *h1, *r1, *h2, *r2;  // (L, n, C), (L, n): the normed inputs of attention and MLP
    // (L, n, 3C), (L, n, 2H): q and k normed and rotated, v with its value embedding
    float *qkv, *qk_r;
    float *gate;       // (L, n, H): the value embedding's gates
    float *att, *lse;  // (L, n, C), (L, n, H): attention's output before wo, and its softmax sums
    float *fc;         // (L, n, F): h2 wfc^T
    float *hf, *rf;    // (n, C), (n): the normed input of the head
    float *logits;     // (HEAD_ROWS, V): the head goes through the tokens in chunks
    float *x, *dh, *dx, *dx0, *dxb;  // (n, C) each
    float *dqkv;                     // (n, 3C)
    float *relu2, *dfc;              // (n, F) each
    double *losses;                  // (n): nats of each target
    double *partial;                 // (n, H): sums of one token, before they are added in order
    int *inputs, *targets;           // (n) each
    int *doc_start;                  // (n)
} Activations;

enum { HEAD_ROWS = 512 };

// Muon's memory for the largest of its matrices, (R, K); side = min(R, K).
typedef struct {
    float *x, *product;  // (R, K) each
    float *a, *a2;       // (side, side) each: A, and b A + c A^2
} MuonScratch;

// What a rank tells the others at the end of a step, and the squares of its gradients after it.
typedef struct {
    double loss;        // sum of its targets' nats
    int64_t bad_row;    // first of its rows whose loss is not finite, or -1
    int bad_tensor;     // its first tensor whose gradient is not, or -1
    int bad_place;      // and where that comes in backward: tensor_place
    StopRequest asked;  // what it was told from outside
} RankResult;

struct Model {
    Config cfg;
    Table table;
    const Dist *dist;
    ShardPlan shard;
    float *params, *grads;   // (table.numel) each; grads: of this rank's rows
    float *sums;             // (numel of this rank): gradients of all rows; of one rank: grads
    float *state1, *state2;  // (numel, state_numel of this rank): the optimizer's
    // (world, table.count): squares of the ranks' sums, by tensor; and once more: this rank's
    double *squares;
    Weights w, dw;  // views of params and grads
    Activations a;
    void *activations;  // the memory that a points into
    MuonScratch muon;
    float *scratch;        // the memory that muon points into
    float *cosine, *sine;  // (T, D/2) each
};

static Weights weights_view(const Table *t, const Config *c, float *arena) {
    Weights w;
    memset(&w, 0, sizeof w);
#define AT(role, layer)                                                                            \
    (table_find(t, role, layer) ? arena + table_find(t, role, layer)->offset : NULL)
    w.wte = AT(WTE, -1), w.lm_head = AT(LM_HEAD, -1);
    w.smear_gate = AT(SMEAR_GATE, -1), w.smear_lambda = AT(SMEAR_LAMBDA, -1);
    w.resid_lambda = AT(RESID_LAMBDA, -1), w.x0_lambda = AT(X0_LAMBDA, -1),
    w.backout_lambda = AT(BACKOUT_LAMBDA, -1);
    for (int i = 0; i < c->L; i++) {
        w.layer[i].wqkv = AT(WQ, i), w.layer[i].wo = AT(WO, i);
        w.layer[i].wfc = AT(WFC, i), w.layer[i].wproj = AT(WPROJ, i);
        w.layer[i].ve_gate = AT(VE_GATE, i), w.layer[i].value_embed = AT(VALUE_EMBED, i);
        assert(AT(WK, i) == AT(WQ, i) + (size_t)c->C * (size_t)c->C);
        assert(AT(WV, i) == AT(WK, i) + (size_t)c->C * (size_t)c->C);
    }
#undef AT
    return w;
}

// Lays the activations of B rows out from `memory` on; returns their bytes. NULL: only counts.
static size_t activations_layout(Activations *a, const Config *c, int B, char *memory) {
    size_t n = (size_t)B * (size_t)c->T, L = (size_t)c->L;
    size_t C = (size_t)c->C, H = (size_t)c->H, F = (size_t)c->F;
    // clang-format off
    struct { void *field; size_t elements, size; } parts[] = {
        {&a->embed, n * C, 4}, {&a->embed_r, n, 4}, {&a->smear, n, 4}, {&a->x0, n * C, 4},
        {&a->stream, (L + 1) * n * C, 4},
        {&a->h1, L * n * C, 4}, {&a->r1, L * n, 4}, {&a->h2, L * n * C, 4}, {&a->r2, L * n, 4},
        {&a->qkv, L * n * 3 * C, 4}, {&a->qk_r, L * n * 2 * H, 4}, {&a->gate, L * n * H, 4},
        {&a->att, L * n * C, 4}, {&a->lse, L * n * H, 4}, {&a->fc, L * n * F, 4},
        {&a->hf, n * C, 4}, {&a->rf, n, 4}, {&a->logits, HEAD_ROWS * (size_t)c->V, 4},
        {&a->x, n * C, 4}, {&a->dh, n * C, 4}, {&a->dx, n * C, 4}, {&a->dx0, n * C, 4},
        {&a->dxb, n * C, 4}, {&a->dqkv, n * 3 * C, 4}, {&a->relu2, n * F, 4}, {&a->dfc, n * F, 4},
        {&a->losses, n, 8}, {&a->partial, n * H, 8},
        {&a->inputs, n, 4}, {&a->targets, n, 4}, {&a->doc_start, n, 4},
    };
    // clang-format on
    size_t at = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (memory) *(void **)parts[i].field = memory + at;
        at += (parts[i].elements * parts[i].size + 63) / 64 * 64;
    }
    return at;
}

// Lays Muon's scratch out from `memory` on; returns its elements. NULL: only counts.
static size_t muon_layout(MuonScratch *s, const Table *t, float *memory) {
    size_t largest = 0, square = 0;
    for (int i = 0; i < t->count; i++) {
        const Tensor *x = &t->tensor[i];
        if (x->group != GROUP_MATRIX) continue;
        size_t side = (size_t)(x->rows < x->cols ? x->rows : x->cols);
        if (tensor_numel(x) > largest) largest = tensor_numel(x);
        if (side * side > square) square = side * side;
    }
    if (memory) {
        s->x = memory, s->product = memory + largest;
        s->a = memory + 2 * largest, s->a2 = s->a + square;
    }
    return 2 * (largest + square);
}

// A micro-batch of some 8192 tokens keeps the matmuls busy.
int model_micro_tokens(const Config *cfg, int recompute) {
    (void)cfg, (void)recompute;
    return 8192;
}

int model_memory(DescribeMemory *rows, const Config *cfg, const Plan *plan,
                 const ShardPlan *shard) {
    Table table;
    Activations a;
    MuonScratch muon;
    table_init(&table, cfg);
    const ShardRank *share = &shard->share[shard->rank];
    double arena = (double)table.numel * sizeof(float), mine = (double)share->numel * sizeof(float);
    DescribeMemory all[] = {
        {"parameters", arena},
        {"gradients", arena},
        {"gradients, summed over ranks", shard->world > 1 ? mine : 0},
        {"optimizer, first state", mine},
        {"optimizer, second state", (double)share->state_numel * sizeof(float)},
        {"Muon's scratch", (double)muon_layout(&muon, &table, NULL) * sizeof(float)},
        {"activations of a micro-batch",
         (double)activations_layout(&a, cfg, phase_largest(plan, cfg).micro_rows, NULL)},
    };
    memcpy(rows, all, sizeof all);
    table_free(&table);
    return sizeof all / sizeof *all;
}

void model_init(Model *m, const Config *cfg, const Plan *plan, const Dist *dist, uint32_t seed,
                bool test_init) {
    int B = phase_largest(plan, cfg).micro_rows;
    memset(m, 0, sizeof *m);
    m->cfg = *cfg, m->dist = dist;
    table_init(&m->table, cfg);
    shard_init(&m->shard, &m->table, dist->rank, dist->world);
    size_t numel = m->table.numel, mine = m->shard.share[dist->rank].numel;
    size_t tensors = (size_t)m->table.count;
    m->params = die_alloc(numel, sizeof(float), "the parameters; lower --depth");
    m->grads = die_alloc(numel, sizeof(float), "the gradients; lower --depth");
    m->sums = dist->world == 1 ? m->grads : die_alloc(mine, sizeof(float), "summed gradients");
    m->state1 = die_alloc(mine, sizeof(float), "the optimizer's first state; lower --depth");
    m->state2 = die_alloc(m->shard.share[dist->rank].state_numel, sizeof(float),
                          "the optimizer's second state; lower --depth");
    m->squares = die_alloc(((size_t)dist->world + 1) * tensors, sizeof(double), "norms");
    m->activations = die_alloc(activations_layout(&m->a, cfg, B, NULL), 1,
                               "the activations; lower --micro-batch");
    activations_layout(&m->a, cfg, B, m->activations);
    m->scratch = die_alloc(muon_layout(&m->muon, &m->table, NULL), sizeof(float), "Muon's scratch");
    muon_layout(&m->muon, &m->table, m->scratch);
    m->w = weights_view(&m->table, cfg, m->params);
    m->dw = weights_view(&m->table, cfg, m->grads);
    m->cosine = die_alloc((size_t)cfg->T * (size_t)(cfg->D / 2), sizeof(float), "rotary angles");
    m->sine = die_alloc((size_t)cfg->T * (size_t)(cfg->D / 2), sizeof(float), "rotary angles");
    rope_init(m->cosine, m->sine, cfg->T, cfg->D);
    table_fill(&m->table, m->params, seed, test_init);
}

void model_free(Model *m) {
    if (m->sums != m->grads) free(m->sums);
    free(m->params), free(m->grads), free(m->state1), free(m->state2), free(m->squares);
    free(m->activations), free(m->scratch), free(m->cosine), free(m->sine);
    shard_free(&m->shard), table_free(&m->table);
}

ModelFacts model_facts(const Model *m) {
    (void)m;
    ModelFacts facts = {"train_gpt2 (CPU, FP32)", "CPU", 0, 0};
    return facts;
}

// The arenas themselves.
ModelState model_download(Model *m) {
    ModelState state = {m->params, m->state1, m->state2};
    return state;
}
void model_upload(Model *m, ModelState state) { (void)m, (void)state; }
void model_state_free(Model *m, ModelState state) { (void)m, (void)state; }

// =============================================================================================
// Forward and backward.

// From tokens to the head's input a->hf. B and T may be smaller than the model was made for.
static void trunk_forward(Model *m, const int *idx /* (B, T) */, int B, int T,
                          const int *window /* (L) */) {
    const Config *c = &m->cfg;
    const Weights *w = &m->w;
    Activations *a = &m->a;
    int C = c->C, H = c->H, D = c->D, F = c->F;
    int64_t n = (int64_t)B * T;
    find_documents(a->doc_start, idx, B, T, c->bos, c->doc_mask);
    embed_forward(a->x, idx, w->wte, n, C);
    norm_forward(a->embed, a->embed_r, a->x, n, C);
    smear_forward(a->x0, a->smear, a->embed, w->smear_gate, *w->smear_lambda, a->doc_start, B, T,
                  C);
    memcpy(a->stream, a->x0, sizeof(float) * (size_t)(n * C));
    for (int i = 0; i < c->L; i++) {
        const float *x_in = a->stream + i * n * C;
        float *x_out = a->stream + (i + 1) * n * C;
        float *h1 = a->h1 + i * n * C, *h2 = a->h2 + i * n * C, *qkv = a->qkv + i * n * 3 * C;
        float *att = a->att + i * n * C, *fc = a->fc + i * n * F;
        mix_forward(a->x, x_in, a->x0, w->resid_lambda[i], w->x0_lambda[i], n * C);
        norm_forward(h1, a->r1 + i * n, a->x, n, C);
        matmul_forward(qkv, h1, w->layer[i].wqkv, n, C, 3 * C);
        if (w->layer[i].value_embed)
            value_embed_forward(qkv + 2 * C, a->gate + i * n * H, h1, w->layer[i].ve_gate,
                                w->layer[i].value_embed, idx, n, H, D);
        qk_forward(qkv, a->qk_r + i * n * 2 * H, m->cosine, m->sine, B, T, H, D);
        attention_forward(att, a->lse + i * n * H, qkv, a->doc_start, window[i], B, T, H, D);
        matmul_forward(x_out, att, w->layer[i].wo, n, C, C);
        add_forward(a->x, x_out, n * C);
        norm_forward(h2, a->r2 + i * n, a->x, n, C);
        matmul_forward(fc, h2, w->layer[i].wfc, n, C, F);
        relu2_forward(a->relu2, fc, n * F);
        matmul_forward(x_out, a->relu2, w->layer[i].wproj, n, F, C);
        add_forward(x_out, a->x, n * C);
    }
    const float *x_last = a->stream + c->L * n * C, *x_middle = a->stream + (c->L / 2 + 1) * n * C;
    backout_forward(a->x, x_last, x_middle, config_has_backout(c) ? *w->backout_lambda : 0, n * C);
    norm_forward(a->hf, a->rf, a->x, n, C);
}

// Logits and loss of n tokens, in chunks of HEAD_ROWS: the logits of a whole micro-batch are never
// there at once. Returns the sum of the targets' nats; each is in a->losses. With grad_scale > 0
// also the gradient: into dw->lm_head, and for the trunk into a->dh. keep: where to copy the
// logits, or NULL.
static double head_loss(Model *m, const int *targets, int64_t n, double grad_scale, float *keep) {
    int C = m->cfg.C, V = m->cfg.V;
    Activations *a = &m->a;
    for (int64_t t = 0; t < n; t += HEAD_ROWS) {
        int64_t rows = n - t < HEAD_ROWS ? n - t : HEAD_ROWS;
        matmul_forward(a->logits, a->hf + t * C, m->w.lm_head, rows, C, V);
        classifier_forward(a->logits, a->losses + t, targets + t, rows, V);
        if (keep) memcpy(keep + t * V, a->logits, sizeof(float) * (size_t)(rows * V));
        if (grad_scale <= 0) continue;
        classifier_backward(a->logits, a->losses + t, targets + t, grad_scale, rows, V);
        matmul_dgrad(a->dh + t * C, a->logits, m->w.lm_head, rows, C, V);
        matmul_wgrad(m->dw.lm_head, a->logits, a->hf + t * C, rows, C, V);
    }
    double sum = 0;
    for (int64_t t = 0; t < n; t++) sum += a->losses[t];
    return sum;
}

// One layer's backward: a->dx comes in as the gradient of the stream that leaves layer i, and goes
// out as that of the stream that enters it. Each step undoes the line of trunk_forward it names.
static void layer_backward(Model *m, const int *idx, int i, const Phase *phase) {
    const Config *c = &m->cfg;
    const Weights *w = &m->w, *dw = &m->dw;
    Activations *a = &m->a;
    int B = phase->micro_rows, T = phase->T, C = c->C, H = c->H, D = c->D, F = c->F;
    int64_t n = (int64_t)B * T;
    const float *h1 = a->h1 + i * n * C, *h2 = a->h2 + i * n * C, *qkv = a->qkv + i * n * 3 * C;
    const float *att = a->att + i * n * C, *fc = a->fc + i * n * F;
    // x_out = x + relu2(fc) wproj^T
    relu2_forward(a->relu2, fc, n * F);
    matmul_wgrad(dw->layer[i].wproj, a->dx, a->relu2, n, F, C);
    matmul_dgrad(a->dfc, a->dx, w->layer[i].wproj, n, F, C);
    relu2_backward(a->dfc, a->dfc, fc, n * F);
    // fc = h2 wfc^T, h2 = N(x)
    matmul_wgrad(dw->layer[i].wfc, a->dfc, h2, n, C, F);
    matmul_dgrad(a->dh, a->dfc, w->layer[i].wfc, n, C, F);
    norm_backward(a->dx, a->dh, h2, a->r2 + i * n, n, C, true);
    // x += att wo^T
    matmul_wgrad(dw->layer[i].wo, a->dx, att, n, C, C);
    matmul_dgrad(a->dh, a->dx, w->layer[i].wo, n, C, C);
    attention_backward(a->dqkv, a->dh, att, a->lse + i * n * H, qkv, a->doc_start, phase->window[i],
                       B, T, H, D);
    qk_backward(a->dqkv, qkv, a->qk_r + i * n * 2 * H, m->cosine, m->sine, B, T, H, D);
    // qkv = h1 wqkv^T, and v += gate * value_embed[idx]
    matmul_wgrad(dw->layer[i].wqkv, a->dqkv, h1, n, C, 3 * C);
    matmul_dgrad(a->dh, a->dqkv, w->layer[i].wqkv, n, C, 3 * C);
    if (w->layer[i].value_embed)
        value_embed_backward(dw->layer[i].value_embed, dw->layer[i].ve_gate, a->dh, a->dqkv + 2 * C,
                             a->gate + i * n * H, h1, w->layer[i].ve_gate, w->layer[i].value_embed,
                             idx, a->partial, n, H, D);
    // h1 = N(x), x = resid_lambda x_in + x0_lambda x0
    norm_backward(a->dx, a->dh, h1, a->r1 + i * n, n, C, true);
    mix_backward(a->dx, a->dx0, dw->resid_lambda + i, dw->x0_lambda + i, a->dx,
                 a->stream + i * n * C, a->x0, w->resid_lambda[i], w->x0_lambda[i], a->partial, n,
                 C);
}

// From a->dh, the gradient of the head's input, to all gradients, which are added to.
static void trunk_backward(Model *m, const int *idx /* (B, T) */, const Phase *phase) {
    const Config *c = &m->cfg;
    const Weights *w = &m->w, *dw = &m->dw;
    Activations *a = &m->a;
    int B = phase->micro_rows, T = phase->T, C = c->C;
    int64_t n = (int64_t)B * T;
    norm_backward(a->dx, a->dh, a->hf, a->rf, n, C, false);
    bool backout = config_has_backout(c);
    if (backout)
        backout_backward(a->dxb, dw->backout_lambda, a->dx, a->stream + (c->L / 2 + 1) * n * C,
                         *w->backout_lambda, a->partial, n, C);
    memset(a->dx0, 0, sizeof(float) * (size_t)(n * C));
    for (int i = c->L - 1; i >= 0; i--) {
        if (backout && i == c->L / 2) add_forward(a->dx, a->dxb, n * C);
        layer_backward(m, idx, i, phase);
    }
    add_forward(a->dx0, a->dx, n * C);  // the first layer's x_in is x0
    smear_backward(a->dx, dw->smear_gate, dw->smear_lambda, a->dx0, a->embed, a->smear,
                   w->smear_gate, *w->smear_lambda, a->partial, B, T, C);
    norm_backward(a->dx, a->dx, a->embed, a->embed_r, n, C, false);
    embed_backward(dw->wte, a->dx, idx, n, C);
}

// Forward and backward of one micro-batch; gradients of the mean loss of the whole step are added
// to. Returns the sum of the targets' nats.
static double model_accumulate(Model *m, const int *inputs /* (B, T) */,
                               const int *targets /* (B, T) */, const Phase *phase,
                               float *keep_logits) {
    int B = phase->micro_rows, T = phase->T;
    trunk_forward(m, inputs, B, T, phase->window);
    double sum = head_loss(m, targets, (int64_t)B * T, 1.0 / (double)phase->batch, keep_logits);
    trunk_backward(m, inputs, phase);
    return sum;
}

void model_losses(Model *m, const int *inputs, const int *targets, int rows, int T,
                  const Phase *phase, double *losses) {
    if (!rows) return;
    trunk_forward(m, inputs, rows, T, phase->window);
    head_loss(m, targets, (int64_t)rows * T, 0, NULL);
    memcpy(losses, m->a.losses, sizeof *losses * (size_t)rows * (size_t)T);
}

void model_logits(Model *m, const int *tokens, int count, const Phase *phase, float *logits) {
    int C = m->cfg.C, V = m->cfg.V;
    trunk_forward(m, tokens, 1, count, phase->window);
    matmul_forward(logits, m->a.hf + (int64_t)(count - 1) * C, m->w.lm_head, 1, C, V);
    softcap_forward(logits, V);
}

// =============================================================================================
// Optimizer. Every function updates one tensor; numbers and schedule come from llmc/schedule.h.

// sum_i x_i^2 in double: blocks of fixed size, added in order.
static double sum_squares(const float *x, size_t count) {
    enum { BLOCK = 1 << 14 };
    int64_t blocks = (int64_t)((count + BLOCK - 1) / BLOCK);
    double *partial = die_alloc((size_t)blocks, sizeof *partial, "partial sums"), sum = 0;
#pragma omp parallel for
    for (int64_t b = 0; b < blocks; b++) {
        size_t from = (size_t)b * BLOCK, n = count - from < BLOCK ? count - from : BLOCK;
        partial[b] = dot(x + from, x + from, (int)n);
    }
    for (int64_t b = 0; b < blocks; b++) sum += partial[b];
    free(partial);
    return sum;
}

// AdamW (Loshchilov and Hutter 2019), t = 1, 2, ...:
//     m = b1 m + (1-b1) g,   v = b2 v + (1-b2) g^2,
//     p = p - lr wd p,       p = p - lr m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps)
static void adamw_update(float *p,        // (count)
                         float *m,        // (count)
                         float *v,        // (count)
                         const float *g,  // (count)
                         double grad_scale, GroupNumbers k, double lr, int64_t t, size_t count) {
    float b1 = (float)k.beta1, b2 = (float)k.beta2, scale = (float)grad_scale, eps = (float)k.eps;
    float keep = (float)(1 - lr * k.wd), step = (float)(lr / (1 - pow(k.beta1, (double)t)));
    float v_unbias = (float)(1 / (1 - pow(k.beta2, (double)t)));
#pragma omp parallel for simd
    for (size_t i = 0; i < count; i++) {
        float gi = scale * g[i];
        m[i] = b1 * m[i] + (1 - b1) * gi;
        v[i] = b2 * v[i] + (1 - b2) * gi * gi;
        p[i] = keep * p[i] - step * m[i] / (sqrtf(v[i] * v_unbias) + eps);
    }
}

static void scale_all(float *x, double factor, size_t count) {
#pragma omp parallel for simd
    for (size_t i = 0; i < count; i++) x[i] = (float)(x[i] * factor);
}

// Rows made even (MuonEq, 2603.28254): X[r] *= (||X|| / sqrt(R)) / max(||X[r]||, 1e-6).
static void muon_equalize_rows(float *x, int R, int K) {
    double rms = sqrt(sum_squares(x, (size_t)R * (size_t)K) / R);  // of the rows' norms
#pragma omp parallel for
    for (int r = 0; r < R; r++) {
        float *row = x + (int64_t)r * K;
        double factor = rms / fmax(sqrt(dot(row, row, K)), 1e-6);
        for (int k = 0; k < K; k++) row[k] = (float)(row[k] * factor);
    }
}

// Polar Express (Amsel et al., 2505.16932): five steps X = a X + (b A + c A^2) X, A = X X^T, each
// with its own a, b, c, drive the singular values of X / (1.01 ||X|| + 1e-6) towards 1. Where R > K
// the shorter side is the other one: A = X^T X, X = a X + X (b A + c A^2).
static void muon_polar_express(MuonScratch *s, int R, int K) {
    static const double abc[5][3] = {
        {8.156554524902461, -22.48329292557795, 15.878769915207462},
        {4.042929935166739, -2.808917465908714, 0.5000178451051316},
        {3.8916678022926607, -2.772484153217685, 0.5060648178503393},
        {3.285753657755655, -2.3681294933425376, 0.46449024233003106},
        {2.3465413258596377, -1.7097828382687081, 0.42323551169305323},
    };
    size_t count = (size_t)R * (size_t)K;
    int side = R < K ? R : K;
    MatmulView x = {s->x, K, 1}, x_transposed = {s->x, 1, K}, a = {s->a, side, 1},
               a2 = {s->a2, side, 1};
    scale_all(s->x, 1 / (1.01 * sqrt(sum_squares(s->x, count)) + 1e-6), count);
    for (int step = 0; step < 5; step++) {
        float ka = (float)abc[step][0], kb = (float)abc[step][1], kc = (float)abc[step][2];
        if (R <= K)
            matmul(s->a, side, x, x_transposed, R, R, K, 0);
        else
            matmul(s->a, side, x_transposed, x, K, K, R, 0);
        matmul(s->a2, side, a, a, side, side, side, 0);
#pragma omp parallel for simd
        for (size_t i = 0; i < (size_t)side * (size_t)side; i++)
            s->a2[i] = kb * s->a[i] + kc * s->a2[i];
        if (R <= K)
            matmul(s->product, K, a2, x, R, K, R, 0);
        else
            matmul(s->product, K, x, a2, R, K, K, 0);
#pragma omp parallel for simd
        for (size_t i = 0; i < count; i++) s->x[i] = ka * s->x[i] + s->product[i];
    }
}

// NorMuon (2510.05491): each row (R >= K) or column, of n elements and mean square v, is divided by
// the root of its running mean square s; then X gets its Frobenius norm back:
//     s = b2 s + (1-b2) v,   r = 1/sqrt(max(s, 1e-10)),
//     X *= r sqrt(n sum v) / max(sqrt(n sum v r^2), 1e-10)
static void muon_normalize(float *x,       // (R, K)
                           float *second,  // (R) or (K): s
                           double beta2, int R, int K) {
    bool by_row = R >= K;
    int lines = by_row ? R : K, n = by_row ? K : R;
    int64_t line = by_row ? K : 1, along = by_row ? 1 : K;
    double before = 0, after = 0;
    for (int i = 0; i < lines; i++) {
        double v = 0;
        for (int j = 0; j < n; j++) {
            double e = x[i * line + j * along];
            v += e * e / n;
        }
        second[i] = (float)(beta2 * second[i] + (1 - beta2) * v);
        before += n * v, after += n * v / fmax(second[i], 1e-10);
    }
    double keep_norm = sqrt(before) / fmax(sqrt(after), 1e-10);
#pragma omp parallel for
    for (int i = 0; i < lines; i++) {
        double factor = keep_norm / sqrt(fmax(second[i], 1e-10));
        for (int j = 0; j < n; j++)
            x[i * line + j * along] = (float)(factor * x[i * line + j * along]);
    }
}

// Muon (Jordan 2024) on one matrix w (R, K): X is the momentum with its singular values drawn
// towards 1, lr is scaled by sqrt(max(1, R/K)), and
//     w = w - lr X - lr wd w [X w >= 0]
// Decay is cautious: it leaves alone a weight that the update makes larger.
static void muon_update(float *w,         // (R, K)
                        float *momentum,  // (R, K)
                        float *second,    // (max(R, K))
                        const float *g,   // (R, K)
                        double grad_scale, double mu, double beta2, double lr, double wd, int R,
                        int K, MuonScratch *s) {
    size_t count = (size_t)R * (size_t)K;
    float keep = (float)mu, scale = (float)grad_scale;
#pragma omp parallel for simd
    for (size_t i = 0; i < count; i++) {
        float gi = scale * g[i];
        momentum[i] = keep * momentum[i] + (1 - keep) * gi;
        s->x[i] = (1 - keep) * gi + keep * momentum[i];  // Nesterov
    }
    muon_equalize_rows(s->x, R, K);
    muon_polar_express(s, R, K);
    // Muon+ (2602.21545): Polar Express leaves small singular values small; restore the norm.
    scale_all(s->x, sqrt(R < K ? R : K) / fmax(sqrt(sum_squares(s->x, count)), 1e-6), count);
    muon_normalize(s->x, second, beta2, R, K);
    float step = (float)(lr * sqrt(fmax(1, (double)R / K))), decay = (float)(step * wd);
#pragma omp parallel for simd
    for (size_t i = 0; i < count; i++)
        w[i] -= step * s->x[i] + (s->x[i] * w[i] >= 0 ? decay * w[i] : 0);
}

// =============================================================================================
// Between backward and update, between ranks. Of one rank, its gradients are the sums.

// m->sums = the gradients of all ranks, of what this rank owns.
static void sum_gradients(Model *m) {
    for (int i = 0; i < m->shard.count; i++) {
        const Piece *p = &m->shard.piece[i];
        int to = p->owner == SHARD_ALL ? DIST_ALL : p->owner;
        dist_sum(m->dist, m->sums + p->at, m->grads + p->offset, p->count, to);
    }
}

// After the update: every rank gets the others' parameters.
static void gather_parameters(Model *m) {
    for (int i = 0; i < m->shard.count; i++) {
        const Piece *p = &m->shard.piece[i];
        if (p->owner == SHARD_ALL) continue;
        dist_broadcast(m->dist, m->params + p->offset, p->count * sizeof(float), p->owner);
    }
}

// Root of the sum of squares of all gradients: of each tensor's pieces by rank, tensor by tensor.
// What every rank has, rank 0 counts.
static double model_grad_norm(Model *m) {
    const ShardPlan *s = &m->shard;
    size_t count = (size_t)m->table.count;
    double *mine = m->squares + (size_t)s->world * count, sum = 0;
    memset(mine, 0, count * sizeof *mine);
    for (int i = shard_next(s, 0); i < s->count; i = shard_next(s, i + 1)) {
        const Piece *p = &s->piece[i];
        if (p->owner == SHARD_ALL && s->rank > 0) continue;
        mine[p->tensor - m->table.tensor] = sum_squares(m->sums + p->at, p->count);
    }
    dist_all_gather(m->dist, m->squares, mine, count * sizeof *mine);
    for (size_t i = 0; i < count; i++) {
        double tensor = 0;
        for (int r = 0; r < s->world; r++) tensor += m->squares[(size_t)r * count + i];
        sum += tensor;
    }
    return sqrt(sum);
}

// Updates every piece that this rank owns from its gradient; step `it` of plan->steps. grad_norm:
// of model_grad_norm.
static void model_update(Model *m, const Flags *f, const Plan *plan, int64_t it, double grad_norm) {
    Schedule now = schedule_at(it, plan->steps, f->warmup);
    const ShardPlan *s = &m->shard;
    double clip = f->grad_clip > 0 ? fmin(1, f->grad_clip / (grad_norm + 1e-6)) : 1;
    for (int i = shard_next(s, 0); i < s->count; i = shard_next(s, i + 1)) {
        const Piece *piece = &s->piece[i];
        const Tensor *x = piece->tensor;
        if (x->frozen) continue;
        GroupNumbers k = plan_group(plan, f, &m->cfg, x->group);
        double lr = schedule_lr(now, k, x->group);
        float *p = m->params + piece->offset, *first = m->state1 + piece->at,
              *second = m->state2 + piece->state;
        const float *g = m->sums + piece->at;
        if (x->group == GROUP_MATRIX)
            muon_update(p, first, second, g, clip, now.momentum, k.beta2, lr, k.wd * now.wd,
                        x->rows, x->cols, &m->muon);
        else
            adamw_update(p, first, second, g, clip, k, lr, it + 1, piece->count);
    }
}

// =============================================================================================
// A whole step, and the program.

// Notes the first row of a micro-batch whose loss is not finite, and where it came from.
static void find_bad_row(RankResult *mine, LoaderOrigin *origin, const double *losses /* (B, T) */,
                         const Loader *l, const Phase *phase, int64_t micro) {
    int64_t t = 0, n = (int64_t)phase->micro_rows * phase->T;
    while (t < n && isfinite(losses[t])) t++;
    if (t == n) return;
    mine->bad_row = (micro * l->ranks + l->rank) * phase->micro_rows + t / phase->T;
    *origin = loader_origin(l, (int)(t / phase->T));
}

// Loss and gradients of this rank's part of the loader's next batch.
static RankResult model_gradients(Model *m, Loader *loader, const Phase *phase,
                                  LoaderOrigin *origin, StepTrace *trace) {
    RankResult mine = {0, -1, -1, 0, STOP_NO};
    int64_t tokens = (int64_t)phase->micro_rows * phase->T;
    loader_require_length(loader, phase->T);
    memset(m->grads, 0, m->table.numel * sizeof(float));
    for (int64_t micro = 0; micro < phase->micro_steps; micro++) {
        int *inputs = trace ? trace->tokens + micro * tokens : m->a.inputs;
        int *targets = trace ? trace->targets + micro * tokens : m->a.targets;
        loader_next(loader, inputs, targets, phase->micro_rows);
        if (micro == 0) *origin = loader_origin(loader, 0);
        double sum = model_accumulate(m, inputs, targets, phase,
                                      trace ? trace->logits + micro * tokens * m->cfg.V : NULL);
        mine.loss += sum;
        if (!isfinite(sum) && mine.bad_row < 0)
            find_bad_row(&mine, origin, m->a.losses, loader, phase, micro);
    }
    return mine;
}

// What all ranks found, in one: the loss, what was asked, and what is not finite and who can tell,
// the rank with the first row or else the one with the first tensor that backward came to.
static void add_results(StepResult *s, Model *m, const RankResult *mine) {
    RankResult all[SHARD_MAX_RANKS];
    const RankResult *row = NULL, *tensor = NULL;
    dist_all_gather(m->dist, all, mine, sizeof *mine);
    for (const RankResult *r = all; r < all + m->dist->world; r++) {
        s->loss += r->loss;
        if (r->asked > s->asked) s->asked = r->asked;
        if (r->bad_row >= 0 && (!row || r->bad_row < row->bad_row)) row = r;
        if (r->bad_tensor >= 0 && (!tensor || r->bad_place > tensor->bad_place)) tensor = r;
    }
    s->bad_row = row ? row->bad_row : -1;
    s->teller = row ? (int)(row - all) : tensor ? (int)(tensor - all) : 0;
    if (!row && tensor) s->bad_tensor = m->table.tensor[tensor->bad_tensor].name;
}

StepResult model_step(Model *m, Loader *loader, const Phase *phase, const Plan *plan,
                      const Flags *flags, int64_t step, StopRequest asked, StepTrace *trace) {
    StepResult s;
    memset(&s, 0, sizeof s);
    RankResult mine = model_gradients(m, loader, phase, &s.origin, trace);
    sum_gradients(m);
    s.grad_norm = model_grad_norm(m);
    if (!isfinite(s.grad_norm)) {
        const Tensor *bad = shard_find_nonfinite(&m->shard, m->sums, &mine.bad_place);
        if (bad) mine.bad_tensor = (int)(bad - m->table.tensor);
    }
    mine.asked = asked;
    add_results(&s, m, &mine);
    s.loss /= (double)phase->batch;
    s.at = loader_state(loader);
    s.finite = isfinite(s.loss) && isfinite(s.grad_norm);
    if (trace) memcpy(trace->grads, m->grads, m->table.numel * sizeof(float));
    if (!s.finite) return s;
    model_update(m, flags, plan, step, s.grad_norm);
    gather_parameters(m);
    return s;
}

int main(int argc, char **argv) {
    static Model model;
    return run_main(&model, argc, argv);
}
