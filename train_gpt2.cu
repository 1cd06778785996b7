// train_gpt2.cu: a GPT-2 of 2026, trained on GPUs. The same model, flags, data, saves and log as
// train_gpt2.c, whose functions state the formulas; here are their order, their memory and their
// cost. Kernels live in llmc/*.cuh, one operation a file.
//
// PRECISION. BF16: weights, activations and their gradients are BF16; sums, norms, softmax and loss
// FP32; masters, optimizer state and the gradients of weights FP32. The FP32 build, of
// -DPRECISION_FP32, has no BF16 and no TF32 in it and is held against the CPU, number by number
// (make diff).
//
// MEMORY. One allocation a kind, laid out by the table of llmc/model.h, block by block:
//     masters, gradients, first and second optimizer states (FP32), weights (the masters in BF16)
// and the activations of one micro-batch of n = B*T tokens. What a layer keeps for backward, and
// what is computed there again from that, --recompute says; the numbers are the same:
//     0    11 C a token   x_in, h1, q, k, v, att, h2: C each; relu2: 4C
//     1     7 C           all but relu2, which fc makes again of h2
//     2     3 C           x, att_out, mlp_out: the stream that enters the next layer, as its sum's
//                         parts; all else but att_out and mlp_out is made again
//
// ONE STEP. All but the norms is enqueued on one stream; the host waits once, at the end:
//
//     host     load the next step's batches into the slots that are free                   | wait
//     stream   numbers, batches | micro-step 1 .. M: forward, head, backward | check | update
//     net        weights, a block       gradients, a block as it becomes     ^ numbers
//                ahead of forward       final; sums of squares of the sums
//
// RANKS. Each has a GPU, all weights, and rows of its own. When the last micro-step's backward has
// made a block's gradients final, they go to their owners (llmc/dist.cuh) while backward goes on.
// Loss and norms of all ranks decide on the update, of what a rank owns; masters and optimizer
// state are of that only. The new weights go to all at the start of the next step, each block's
// under the forward of those before it. Events, from stream to stream:
//
//     stream  --stepped-->      net   weights may be sent: the update is done
//     net     --there[b]-->     stream   forward comes to block b
//     stream  --final[b]-->     net   gradients of block b may be sent
//     stream  --backward_done-> net   the loss may be told
//     net     --norms_done-->   stream   check and update
//
// What changes from step to step (rates, momentum, clip scale, skip) is one struct in device memory
// (llmc/step.cuh), and a micro-step reads its batch at the same place each time. So no launch
// argument ever changes, and the work between batches and result is captured once, as a CUDA graph,
// and replayed. The check kernel sets skip on NaN or Inf, and the optimizer's kernels do nothing.
//
// The file runs: parameters, activations, model, forward, head, backward, update, a step,
// validation and samples, save and load, main.
#include <assert.h>
#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llmc/adamw.cuh"        // adamw_update
#include "llmc/classifier.cuh"   // classifier, loss_reduce
#include "llmc/cuda_common.cuh"  // floatX, Gpu, gpu_init, gpu_alloc, Trace, trace_op
#include "llmc/dataloader.h"     // Loader, loader_state
#include "llmc/dist.cuh"         // Net, net_reduce, net_gather, net_numbers, net_collect
#include "llmc/embed.cuh"        // embed_norm_forward, embed_backward
#include "llmc/feed.cuh"         // Feed, feed_load, feed_put, feed_send, feed_get
#include "llmc/matmul.cuh"       // matmul_forward, matmul_dgrad, matmul_wgrad
#include "llmc/matmul_tune.cuh"  // matmul_tune_forward, matmul_tune_dgrad, matmul_tune_wgrad
#include "llmc/model.h"          // Config, Table, table_init, table_fill
#include "llmc/muon.cuh"         // Muon, muon_update
#include "llmc/residual.cuh"     // Residual, mix_norm_forward, backout_norm_forward, add_forward
#include "llmc/rmsnorm.cuh"      // norm_backward
#include "llmc/rotary.cuh"       // rope_init, qk_forward, qk_backward
#include "llmc/run.h"            // run_main; what it asks of a trainer: model_init, model_step, ...
#include "llmc/schedule.h"       // Plan, Phase, phase_at, phase_largest
#include "llmc/smear.cuh"        // smear_forward, smear_backward
#include "llmc/step.cuh"         // StepState, step_numbers, step_check, grad_norm_add
#include "llmc/value_embed.cuh"  // value_embed_forward, value_embed_backward

#ifdef PRECISION_FP32
#include "llmc/attention_fp32.cuh"  // attention_forward, attention_backward
#elif defined HOPPER
#include "llmc/attention_sm90.cuh"  // the same for sm_90a
#else
#include "llmc/attention.cuh"  // the same for sm_80 and up
#endif
#ifdef USE_CUDNN
#include "llmc/cudnn_attention.h"  // cudnn_attention_forward, cudnn_attention_backward
#undef ATTENTION_NAME
#define ATTENTION_NAME "cuDNN"
#endif

// =============================================================================================
// Parameters: pointers into an arena laid out by the table. Weights are floatX; what is small
// (gates, lambdas) is read from the FP32 masters. All gradients are FP32.

template <class T> struct EmbedViews {
    T *wte;               // (Vp, C)
    float *smear_gate;    // (24)
    float *smear_lambda;  // (1)
};

template <class T> struct LayerViews {
    T *wqkv;         // (3C, C): wq, wk, wv
    T *wo;           // (C, C)
    T *wfc;          // (F, C)
    T *wproj;        // (C, F)
    T *value_embed;  // (Vp, C), NULL in layers without one
    float *ve_gate;  // (H, 12), likewise
};

template <class T> struct HeadViews {
    float *resid_lambda;    // (L)
    float *x0_lambda;       // (L)
    float *backout_lambda;  // (1)
    T *lm_head;             // (Vp, C)
};

// Block by block, as the table has them.
template <class T> struct Views {
    EmbedViews<T> embed;
    LayerViews<T> layer[MODEL_MAX_LAYERS];
    HeadViews<T> head;
};
typedef EmbedViews<floatX> EmbedWeights;
typedef LayerViews<floatX> LayerWeights;
typedef LayerViews<float> LayerGradients;
typedef HeadViews<floatX> HeadWeights;

// Where a tensor starts, or NULL where the model has none of that role.
template <class T> static T *view(const Table *t, T *arena, Role role, int layer) {
    const Tensor *x = table_find(t, role, layer);
    return x ? arena + x->offset : NULL;
}

// The arena is laid out by the table, and gates and lambdas are taken from `small`, which is a
// rank's own, laid out by its plan; plan NULL: by the table.
template <class T>
static Views<T> views_of(const Table *t, const Config *c, T *arena, const ShardPlan *plan,
                         float *small) {
    auto small_view = [&](Role role, int layer) {
        const Piece *p = plan ? shard_find(plan, role, layer) : NULL;
        return p ? small + p->at : plan ? NULL : view(t, small, role, layer);
    };
    Views<T> v;
    memset(&v, 0, sizeof v);
    v.embed.wte = view(t, arena, WTE, -1);
    v.embed.smear_gate = small_view(SMEAR_GATE, -1);
    v.embed.smear_lambda = small_view(SMEAR_LAMBDA, -1);
    v.head.resid_lambda = small_view(RESID_LAMBDA, -1);
    v.head.x0_lambda = small_view(X0_LAMBDA, -1);
    v.head.backout_lambda = small_view(BACKOUT_LAMBDA, -1);
    v.head.lm_head = view(t, arena, LM_HEAD, -1);
    for (int i = 0; i < c->L; i++) {
        LayerViews<T> *l = &v.layer[i];
        l->wqkv = view(t, arena, WQ, i), l->wo = view(t, arena, WO, i);
        l->wfc = view(t, arena, WFC, i), l->wproj = view(t, arena, WPROJ, i);
        l->value_embed = view(t, arena, VALUE_EMBED, i);
        l->ve_gate = small_view(VE_GATE, i);
    }
    return v;
}

// =============================================================================================
// Activations.

// What a layer's forward makes, and its backward reads. What is not kept (--recompute) lies in the
// same place for all layers.
typedef struct {
    floatX *x_in;     // (n, C): the stream as it enters, times X_IN_SCALE; the first layer's: x0
    floatX *h1, *h2;  // (n, C): the normed inputs of attention and MLP
    float *r1, *r2;   // (n): the norms' factors
    floatX *qkv;      // (n, 3C): q and k normed and rotated, v with its value embedding
    float *qk_r;      // (n, 2H): the factors of the norms of q and k
    float *gate;      // (n, H): the value embedding's gates
    floatX *att;      // (n, C): attention's output before wo
    float *lse;       // (H, n): its log-sum-exps
    floatX *relu2;    // (n, F): relu(h2 wfc^T)^2
    // The stream as it leaves, a sum of three: what mix_norm makes of x_in, what attention adds to
    // it, what the MLP adds. (n, C) each.
    floatX *x, *att_out, *mlp_out;
} LayerActivations;

typedef struct {
    LayerActivations layer[MODEL_MAX_LAYERS];
    floatX *embed, *x0;  // (n, C): embed: N(wte[idx]); x0: that, smeared
    float *embed_r;      // (n)
    float *smear;        // (n): the smear gates
    floatX *hf;          // (n, C): the normed input of the head
    float *rf;           // (n)
    floatX *logits;      // (HEAD_ROWS, Vp): the head goes through the tokens in chunks
    float *losses;       // (n): nats of each target
    floatX *dfc;         // (n, F)
    floatX *dx, *dx0;    // (n, C): gradients of the stream, of x0
    floatX *dx_middle;   // (n, C): of x_middle
    floatX *datt_out;    // (n, C)
    floatX *dx_mlp;      // (n, C): what of datt_out came through the MLP
    floatX *dh;          // (n, C): of a branch's normed input
    floatX *dqkv;        // (n, 3C)
    float *delta, *dz;   // (H, n), (n, H): of attention, of the value gates
    void *scratch;       // partial sums of whichever kernel runs
} Activations;

enum { HEAD_ROWS = 16384 };

static size_t largest(size_t a, size_t b) { return a > b ? a : b; }

static size_t scratch_bytes(const Config *c, int n) {
    size_t bytes = residual_scratch_bytes(n, c->C);
    bytes = largest(bytes, smear_scratch_bytes(n));
    bytes = largest(bytes, embed_scratch_bytes(n, c->C));
    return largest(bytes, value_gate_scratch_bytes(n, c->H));
}

// Takes the next `bytes` of the memory from `base` on, of which *at are taken. NULL: only counts.
static void *place(char *base, size_t *at, size_t bytes) {
    void *p = base ? base + *at : NULL;
    *at += (bytes + 255) / 256 * 256;
    return p;
}

#define PLACE(field, type, size, count) field = (type *)place(memory, at, (size) * (count))

// Lays out one layer. Layer 0 has all of it; of the others `l` comes as a copy of that one, and
// what is kept gets a place of its own. level: --recompute.
static void layer_layout(LayerActivations *l, const Config *c, size_t n, int i, int level,
                         char *memory, size_t *at) {
    size_t C = (size_t)c->C, H = (size_t)c->H, F = (size_t)c->F, X = sizeof(floatX);
    bool middle = config_has_backout(c) && i == c->L / 2 + 1;  // its x_in is x_middle
    if (i > 0 && (level < 2 || middle || i == 1)) PLACE(l->x_in, floatX, X, n * C);
    if (i == 0 || level < 2) {
        PLACE(l->h1, floatX, X, n * C), PLACE(l->h2, floatX, X, n * C);
        PLACE(l->r1, float, 4, n), PLACE(l->r2, float, 4, n);
        PLACE(l->qkv, floatX, X, n * 3 * C), PLACE(l->qk_r, float, 4, n * 2 * H);
        PLACE(l->gate, float, 4, n *H), PLACE(l->lse, float, 4, n *H);
        PLACE(l->att, floatX, X, n * C);
    }
    if (i == 0 || level < 1) PLACE(l->relu2, floatX, X, n * F);
    if (i == 0 || level == 2) {
        PLACE(l->x, floatX, X, n * C), PLACE(l->att_out, floatX, X, n * C);
        PLACE(l->mlp_out, floatX, X, n * C);
    }
}

// Lays out the activations of n tokens from `memory` on; returns their bytes. NULL: only counts.
static size_t activations_layout(Activations *a, const Config *c, int tokens, int level,
                                 char *memory) {
    size_t n = (size_t)tokens, C = (size_t)c->C, H = (size_t)c->H, F = (size_t)c->F;
    size_t X = sizeof(floatX), head_rows = n < (size_t)HEAD_ROWS ? n : (size_t)HEAD_ROWS;
    size_t bytes = 0, *at = &bytes;
    PLACE(a->embed, floatX, X, n * C), PLACE(a->x0, floatX, X, n * C);
    PLACE(a->embed_r, float, 4, n), PLACE(a->smear, float, 4, n);
    for (int i = 0; i < c->L; i++) {
        a->layer[i] = a->layer[i > 1];
        if (i == 0) a->layer[i].x_in = a->x0;
        layer_layout(&a->layer[i], c, n, i, level, memory, at);
    }
    PLACE(a->hf, floatX, X, n * C), PLACE(a->rf, float, 4, n);
    PLACE(a->losses, float, 4, n), PLACE(a->dh, floatX, X, n * C);
    PLACE(a->scratch, void, 1, scratch_bytes(c, tokens));
    // The head is done with the logits when backward begins, and dfc is not read once dqkv is made.
    size_t shared = bytes, head_end;
    PLACE(a->logits, floatX, X, head_rows * (size_t)c->Vp);
    head_end = bytes, bytes = shared;
    PLACE(a->dfc, floatX, X, n * F);
    a->dqkv = a->dfc;  // 3C of its 4C
    PLACE(a->dx, floatX, X, n * C), PLACE(a->dx0, floatX, X, n * C);
    PLACE(a->dx_middle, floatX, X, n * C), PLACE(a->datt_out, floatX, X, n * C);
    PLACE(a->dx_mlp, floatX, X, n * C);
    PLACE(a->delta, float, 4, n *H), PLACE(a->dz, float, 4, n *H);
    return largest(bytes, head_end);
}
#undef PLACE

// The stream that enters layer i; that of layer L enters the head.
static Residual stream_into(const Activations *a, int i) {
    if (i == 0) return {a->x0, NULL, NULL};
    const LayerActivations *l = &a->layer[i - 1];
    return {l->x, l->att_out, l->mlp_out};
}

// The stream as it left layer L/2, for backout; NULL where there is none.
static const floatX *x_middle(const Activations *a, const Config *c) {
    return config_has_backout(c) ? a->layer[c->L / 2 + 1].x_in : NULL;
}

// =============================================================================================
// The model.

struct Model {
    Config cfg;
    Table table;
    ShardPlan plan;  // of this rank
    const Dist *dist;
    Gpu gpu;
    cudaStream_t stream;  // the step
    Net net;              // what goes between ranks; and norms, on its stream
    Trace trace;
    Matmul matmul;
    float *masters, *first;  // (numel of the rank) each
    float *second;           // (state_numel of the rank)
    float *grads;            // (table.numel): of this rank's rows
    float *sums;             // (numel of the rank): of all ranks; of one rank: grads
    floatX *weights;         // (table.numel); of one rank's FP32 build the masters themselves
    Views<floatX> w;
    Views<float> dw;
    bool held[MODEL_MAX_LAYERS + 2];     // blocks of weights between get and release
    bool awaited[MODEL_MAX_LAYERS + 2];  // those on their way from other ranks
    bool stale;                          // others have updated weights that are not here yet
    int recompute;                       // --recompute
    Activations a;
    void *activations;  // the memory that a points into
#ifdef USE_CUDNN
    CudnnAttention *cudnn;
    void *cudnn_work;
    size_t cudnn_bytes;
#endif
    Muon muon;
    StepState *host_step;      // pinned
    void *numbers;             // what the next six point into
    StepState *step;           // what changes from step to step
    double *norm_partial;      // (chunks): sums of squares
    double *told;              // (world, TOLD_SQUARES + tensors)
    int *first_chunk;          // (tensors + 1): where each tensor's chunks begin
    float2 *angles;            // (T, D/2): cos and sin, of rotary
    cudaEvent_t *block_final;  // (table.blocks): a block's gradients are final
    cudaEvent_t *block_there;  // (table.blocks): a block's weights are
    cudaEvent_t stepped, backward_done, norms_done;
    Feed feed;              // two sets of slots, each of one for every micro-step
    int set;                // the one for the next step
    int loaded;             // so many of its micro-batches are in it
    float *host_losses;     // (max_tokens) pinned, for validation
    size_t max_tokens;      // n
    Phase phase;            // of the last step
    cudaGraphExec_t graph;  // step_work in that phase; NULL: not captured
};

// The table's blocks of weights, each used from get to release only; `held` catches misuse. Of
// several ranks, a block that others own is awaited before it is used.
static int embed_block(void) { return 0; }
static int layer_block(int i) { return 1 + i; }
static int head_block(const Model *m) { return 1 + m->cfg.L; }

static void block_get(Model *m, int block) {
    assert(!m->held[block]);
    m->held[block] = true;
}

static void block_await(Model *m, int block) {
    if (m->awaited[block]) CUDA_CHECK(cudaStreamWaitEvent(m->stream, m->block_there[block], 0));
    m->awaited[block] = false;
}

static void block_release(Model *m, int block) {
    assert(m->held[block]);
    m->held[block] = false;
}

// Starts to bring the blocks from other ranks, in the order in which forward needs them.
static void weights_gather(Model *m) {
    if (m->plan.world == 1) return;
    CUDA_CHECK(cudaEventRecord(m->stepped, m->stream));
    CUDA_CHECK(cudaStreamWaitEvent(m->net.stream, m->stepped, 0));
    for (int block = 0; block < m->table.blocks; block++) {
        net_gather(&m->net, m->weights, block);
        CUDA_CHECK(cudaEventRecord(m->block_there[block], m->net.stream));
        m->awaited[block] = true;
    }
    m->stale = false;
}

static const EmbedWeights *embed_get(Model *m) {
    block_get(m, embed_block()), block_await(m, embed_block());
    return &m->w.embed;
}

static const LayerWeights *layer_get(Model *m, int i) {
    block_get(m, layer_block(i)), block_await(m, layer_block(i));
    return &m->w.layer[i];
}

// With it come all lambdas, which every layer reads: held through a whole pass. They are every
// rank's own; lm_head is awaited where it is used.
static const HeadWeights *head_get(Model *m) {
    block_get(m, head_block(m));
    return &m->w.head;
}

// =============================================================================================
// Forward and backward. Each trace_op names the operation that follows, with the floating-point
// operations it must do and the bytes it must move (nC: those of n C numbers of floatX).

static double matmul_flops(int n, int K, int N) { return 2.0 * n * K * N; }

static double matmul_bytes(int n, int K, int N) {
    return sizeof(floatX) * ((double)n * K + (double)K * N + (double)n * N);
}

// Of wgrad, which reads and writes the FP32 gradient (N, K).
static double wgrad_bytes(int n, int K, int N) {
    return sizeof(floatX) * ((double)n * K + (double)n * N) + 8.0 * K * N;
}

// Of attention over n tokens in rows of T, counting the keys that a query sees: `products` times
// 2 D operations for each query, key and head. (Documents shorten it further; that is not counted.)
static double attention_flops(int n, int T, int C, int W, int products) {
    double w = fmin(W, T), keys = (w * (w + 1) / 2 + (T - w) * (w + 1)) / T;
    return 2.0 * products * n * C * keys;
}

#ifdef USE_CUDNN
// Whether attention of this batch is cuDNN's, which must plan each shape: whole micro-batches are.
// Samples, the last rows of a validation and smaller phases stay with ours.
static bool by_cudnn(const Model *m, const DeviceBatch *b) {
    return b->T == m->cfg.T && (size_t)b->n == m->max_tokens;
}
#endif

// From l->qkv to att and lse.
static void attend(Model *m, const DeviceBatch *b, LayerActivations *l, int W) {
    int n = b->n, C = m->cfg.C, H = m->cfg.H, D = m->cfg.D;
    const floatX *q = l->qkv, *k = q + C, *v = k + C;
#ifdef USE_CUDNN
    if (by_cudnn(m, b)) {
        cudnn_attention_forward(m->cudnn, l->att, l->lse, q, k, v, m->cudnn_work, n, b->T, H, D, W,
                                C, 3 * C, m->stream);
        return;
    }
#endif
    attention_forward(l->att, l->lse, q, k, v, b->doc_start, n, H, D, W, C, 3 * C, m->stream);
}

// From a.dh, the gradient of layer i's att, to a.dqkv: the gradients of v, and of what q and k were
// before norm and rotation. Those two are undone by attention itself, or by a pass behind it.
static void attend_backward(Model *m, const DeviceBatch *b, int i, int W) {
    Activations *a = &m->a;
    const LayerActivations *l = &a->layer[i];
    int n = b->n, T = b->T, C = m->cfg.C, H = m->cfg.H, D = m->cfg.D;
    double nC = (double)sizeof(floatX) * n * C;
    const floatX *q = l->qkv, *k = q + C, *v = k + C;
    floatX *dq = a->dqkv, *dk = dq + C, *dv = dk + C;
    bool rotated = ATTENTION_ROTATES;
    trace_op(&m->trace, "attention backward", i, attention_flops(n, T, C, W, 5), 8 * nC);
#ifdef USE_CUDNN
    rotated = rotated && !by_cudnn(m, b);
    if (by_cudnn(m, b))
        cudnn_attention_backward(m->cudnn, dq, dk, dv, a->dh, l->att, l->lse, q, k, v,
                                 m->cudnn_work, n, T, H, D, W, C, 3 * C, m->stream);
    else
#endif
        attention_backward(dq, dk, dv, a->delta, a->dh, l->att, l->lse, q, k, v, b->doc_start,
                           rotated ? Rotary{l->qk_r, m->angles, T} : Rotary{}, n, H, D, W, C, 3 * C,
                           m->stream);
    if (rotated) return;
    trace_op(&m->trace, "qk_norm_rope backward", i, 0, 6 * nC);
    qk_backward(a->dqkv, l->qkv, l->qk_r, m->angles, n, T, H, D, m->stream);
}

// The first half of layer i, from the stream that enters it to l->att.
static void layer_attend(Model *m, const DeviceBatch *b, const Phase *phase, int i,
                         const LayerWeights *w, const HeadWeights *lambdas, floatX *x_in) {
    const Config *c = &m->cfg;
    Activations *a = &m->a;
    LayerActivations *l = &a->layer[i];
    Trace *t = &m->trace;
    cudaStream_t s = m->stream;
    int n = b->n, C = c->C, H = c->H, D = c->D, W = phase->window[i];
    double nC = (double)sizeof(floatX) * n * C;
    const MatmulEpilogue store = {MATMUL_STORE};

    trace_op(t, "mix_norm", i, 0, (i ? x_in ? 7 : 6 : 3) * nC);
    mix_norm_forward(l->x, x_in, l->h1, l->r1, stream_into(a, i), a->x0, lambdas->resid_lambda + i,
                     lambdas->x0_lambda + i, n, C, s);
    trace_op(t, "qkv", i, matmul_flops(n, C, 3 * C), matmul_bytes(n, C, 3 * C));
    matmul_forward(&m->matmul, l->qkv, matmul_operand(l->h1), matmul_operand(w->wqkv), store, n, C,
                   3 * C, s);
    if (w->value_embed) {
        trace_op(t, "value_embed", i, 0, 3 * nC);
        value_embed_forward(l->qkv + 2 * C, l->gate, l->h1, w->ve_gate, w->value_embed, b->tokens,
                            n, H, D, 3 * C, s);
    }
    trace_op(t, "qk_norm_rope", i, 0, 4 * nC);
    qk_forward(l->qkv, l->qk_r, m->angles, n, b->T, H, D, s);
    trace_op(t, "attention", i, attention_flops(n, b->T, C, W, 2), 4 * nC);
    attend(m, b, l, W);
}

// h2 of layer i, the norm of the stream after attention.
static void layer_norm(Model *m, const DeviceBatch *b, int i) {
    LayerActivations *l = &m->a.layer[i];
    trace_op(&m->trace, "norm", i, 0, 3.0 * sizeof(floatX) * b->n * m->cfg.C);
    residual_norm_forward(l->h2, l->r2, {l->x, l->att_out, NULL}, b->n, m->cfg.C, m->stream);
}

// relu2 of layer i, from h2.
static void layer_fc(Model *m, const DeviceBatch *b, int i, const LayerWeights *w) {
    LayerActivations *l = &m->a.layer[i];
    int n = b->n, C = m->cfg.C, F = m->cfg.F;
    trace_op(&m->trace, "fc relu2", i, matmul_flops(n, C, F), matmul_bytes(n, C, F));
    matmul_forward(&m->matmul, l->relu2, matmul_operand(l->h2), matmul_operand(w->wfc),
                   {MATMUL_RELU2}, n, C, F, m->stream);
}

// From tokens to the head's input a.hf.
static void trunk_forward(Model *m, const DeviceBatch *b, const Phase *phase,
                          const HeadWeights *head) {
    const Config *c = &m->cfg;
    Activations *a = &m->a;
    Trace *t = &m->trace;
    cudaStream_t s = m->stream;
    int n = b->n, C = c->C, F = c->F;
    double nC = (double)sizeof(floatX) * n * C;
    const MatmulEpilogue store = {MATMUL_STORE};

    const EmbedWeights *embed = embed_get(m);
    trace_op(t, "embed_norm", -1, 0, 2 * nC);
    embed_norm_forward(a->embed, a->embed_r, b->tokens, embed->wte, n, C, s);
    trace_op(t, "smear", -1, 0, 2 * nC);
    smear_forward(a->x0, a->smear, a->embed, embed->smear_gate, embed->smear_lambda, b->doc_start,
                  n, C, s);
    block_release(m, embed_block());
    for (int i = 0; i < c->L; i++) {
        const LayerWeights *w = layer_get(m, i);
        LayerActivations *l = &a->layer[i];
        bool x_in = i > 0 && (m->recompute < 2 || l->x_in == x_middle(a, c));
        layer_attend(m, b, phase, i, w, head, x_in ? l->x_in : NULL);
        trace_op(t, "wo", i, matmul_flops(n, C, C), matmul_bytes(n, C, C));
        matmul_forward(&m->matmul, l->att_out, matmul_operand(l->att), matmul_operand(w->wo), store,
                       n, C, C, s);
        layer_norm(m, b, i);
        layer_fc(m, b, i, w);
        trace_op(t, "proj", i, matmul_flops(n, F, C), matmul_bytes(n, F, C));
        matmul_forward(&m->matmul, l->mlp_out, matmul_operand(l->relu2), matmul_operand(w->wproj),
                       store, n, F, C, s);
        block_release(m, layer_block(i));
    }
    trace_op(t, "backout_norm", -1, 0, (x_middle(a, c) ? 5 : 4) * nC);
    backout_norm_forward(a->hf, a->rf, stream_into(a, c->L), x_middle(a, c), head->backout_lambda,
                         n, C, s);
    trace_end(t);
}

// For --dump: what softcap makes of raw logits that lie on the device, in double.
static void keep_logits(Model *m, float *keep /* (rows, V) */, int rows) {
    size_t V = (size_t)m->cfg.V, Vp = (size_t)m->cfg.Vp;
    floatX *raw = (floatX *)die_alloc((size_t)rows * Vp, sizeof *raw, "logits to keep");
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    CUDA_CHECK(
        cudaMemcpy(raw, m->a.logits, (size_t)rows * Vp * sizeof *raw, cudaMemcpyDeviceToHost));
    for (size_t r = 0; r < (size_t)rows; r++)
        for (size_t v = 0; v < V; v++)
            keep[r * V + v] = (float)(15 * tanh((double)(float)raw[r * Vp + v] / 15));
    free(raw);
}

// Losses of n tokens into a.losses, the head in chunks of HEAD_ROWS: the logits of a whole
// micro-batch never exist at once. With grad_scale > 0 also the gradients: that of lm_head, added
// to what is there from other micro-batches (`first`: nothing yet), and for the trunk a.dh. keep:
// (n, V) on the host, for the capped logits, or NULL.
static void head_loss(Model *m, const DeviceBatch *b, const HeadWeights *head, float grad_scale,
                      bool first, float *keep) {
    Activations *a = &m->a;
    Trace *t = &m->trace;
    cudaStream_t s = m->stream;
    int C = m->cfg.C, V = m->cfg.V, Vp = m->cfg.Vp;
    const MatmulEpilogue store = {MATMUL_STORE};
    block_await(m, head_block(m));
    for (int from = 0; from < b->n; from += HEAD_ROWS) {
        int rows = b->n - from < HEAD_ROWS ? b->n - from : HEAD_ROWS;
        floatX *hf = a->hf + (size_t)from * C, *dh = a->dh + (size_t)from * C;
        double flops = matmul_flops(rows, C, Vp), bytes = matmul_bytes(rows, C, Vp);
        trace_op(t, "head", -1, flops, bytes);
        matmul_forward(&m->matmul, a->logits, matmul_operand(hf), matmul_operand(head->lm_head),
                       store, rows, C, Vp, s);
        if (keep) keep_logits(m, keep + (size_t)from * (size_t)V, rows);
        trace_op(t, "classifier", -1, 0, 2.0 * sizeof(floatX) * rows * Vp);
        classifier(a->logits, a->losses + from, b->targets + from, grad_scale, rows, V, Vp, s);
        if (grad_scale <= 0) continue;
        trace_op(t, "head dgrad", -1, flops, bytes);
        matmul_dgrad(&m->matmul, dh, matmul_operand(a->logits), matmul_operand(head->lm_head),
                     store, rows, C, Vp, s);
        trace_op(t, "head wgrad", -1, flops, wgrad_bytes(rows, C, Vp));
        matmul_wgrad(&m->matmul, m->dw.head.lm_head, matmul_operand(a->logits), matmul_operand(hf),
                     first && from == 0 ? MATMUL_STORE : MATMUL_ADD, rows, C, Vp, s);
    }
    trace_end(t);
}

// One layer's backward: a.dx comes in as the gradient of the stream that leaves layer i, and goes
// out as that of the stream that enters it; of the first layer, all of x0's goes out as a.dx0. Each
// step undoes the line of forward that it names. first: of the step's micro-batches.
static void layer_backward(Model *m, const DeviceBatch *b, const Phase *phase, int i,
                           const HeadWeights *lambdas, bool first) {
    const Config *c = &m->cfg;
    Activations *a = &m->a;
    LayerActivations *l = &a->layer[i];
    const LayerWeights *w = layer_get(m, i);
    const LayerGradients *dw = &m->dw.layer[i];
    Matmul *mm = &m->matmul;
    Trace *t = &m->trace;
    cudaStream_t s = m->stream;
    int n = b->n, C = c->C, H = c->H, D = c->D, F = c->F, W = phase->window[i];
    double nC = (double)sizeof(floatX) * n * C, nF = (double)sizeof(floatX) * n * F;
    double flops_F = matmul_flops(n, C, F), bytes_F = matmul_bytes(n, C, F);
    double flops_C = matmul_flops(n, C, C), bytes_C = matmul_bytes(n, C, C);
    double flops_3C = 3 * flops_C, bytes_3C = matmul_bytes(n, C, 3 * C);
    const MatmulEpilogue store = {MATMUL_STORE};
    const MatmulEpilogueKind into = first ? MATMUL_STORE : MATMUL_ADD;  // gradients of weights

    // what forward did not keep
    if (m->recompute == 2) layer_attend(m, b, phase, i, w, lambdas, i ? l->x_in : NULL);
    if (m->recompute == 2) layer_norm(m, b, i);
    if (m->recompute >= 1) layer_fc(m, b, i, w);
    // mlp_out = relu2 wproj^T
    trace_op(t, "proj dgrad relu2", i, flops_F, bytes_F + nF);
    matmul_dgrad(mm, a->dfc, matmul_operand(a->dx), matmul_operand(w->wproj),
                 {MATMUL_RELU2_BACKWARD, l->relu2}, n, F, C, s);
    trace_op(t, "proj wgrad", i, flops_F, wgrad_bytes(n, F, C));
    matmul_wgrad(mm, dw->wproj, matmul_operand(a->dx), matmul_operand(l->relu2), into, n, F, C, s);
    // relu2 = relu(h2 wfc^T)^2, h2 = N(x + att_out)
    trace_op(t, "fc wgrad", i, flops_F, wgrad_bytes(n, C, F));
    matmul_wgrad(mm, dw->wfc, matmul_operand(a->dfc), matmul_operand(l->h2), into, n, C, F, s);
    trace_op(t, "fc dgrad", i, flops_F, bytes_F);
    matmul_dgrad(mm, a->dh, matmul_operand(a->dfc), matmul_operand(w->wfc), store, n, C, F, s);
    trace_op(t, "norm backward", i, 0, 5 * nC);
    residual_norm_backward(a->datt_out, a->dx_mlp, a->dx, a->dh, l->h2, l->r2, n, C, s);
    // att_out = att wo^T
    trace_op(t, "wo wgrad", i, flops_C, wgrad_bytes(n, C, C));
    matmul_wgrad(mm, dw->wo, matmul_operand(a->datt_out), matmul_operand(l->att), into, n, C, C, s);
    trace_op(t, "wo dgrad", i, flops_C, bytes_C);
    matmul_dgrad(mm, a->dh, matmul_operand(a->datt_out), matmul_operand(w->wo), store, n, C, C, s);
    // att = attention(q, k, v),   q, k = N(rope(q)), N(rope(k))
    attend_backward(m, b, i, W);
    // v += gate * value_embed[idx]
    if (w->value_embed) {
        trace_op(t, "value_embed backward", i, 0,
                 nC + b->distinct * C * (sizeof(floatX) + 8.0) + 8.0 * n * H);
        value_embed_backward(dw->value_embed, a->dz, a->dqkv + 2 * C, l->gate, w->value_embed,
                             b->index, a->scratch, n, H, D, 3 * C, s);
    }
    // qkv = h1 wqkv^T
    trace_op(t, "qkv wgrad", i, flops_3C, wgrad_bytes(n, C, 3 * C));
    matmul_wgrad(mm, dw->wqkv, matmul_operand(a->dqkv), matmul_operand(l->h1), into, n, C, 3 * C,
                 s);
    trace_op(t, "qkv dgrad", i, flops_3C, bytes_3C);
    matmul_dgrad(mm, a->dh, matmul_operand(a->dqkv), matmul_operand(w->wqkv), store, n, C, 3 * C,
                 s);
    if (w->value_embed) {
        trace_op(t, "value_gate backward", i, 0, 96.0 * n);
        value_gate_backward(dw->ve_gate, a->dh, a->dz, l->h1, w->ve_gate, a->scratch, n, H, C, s);
    }
    // h1 = N(x), x = resid_lambda x_in + x0_lambda x0
    trace_op(t, "mix_norm backward", i, 0, (i && i < c->L - 1 ? 9 : 7) * nC);
    mix_norm_backward(i ? a->dx : NULL, a->dx0, m->dw.head.resid_lambda + i,
                      m->dw.head.x0_lambda + i, a->dx, a->dx_mlp, a->dh, l->h1, l->r1, l->x_in,
                      a->x0, lambdas->resid_lambda + i, lambdas->x0_lambda + i, i < c->L - 1,
                      a->scratch, n, C, s);
    trace_end(t);
    block_release(m, layer_block(i));
}

// Whether a piece's gradient counts for this rank's part of the norm: what all have, rank 0 counts.
static bool counts_for_norm(const ShardPlan *p, const Piece *piece) {
    return shard_owns(piece, p->rank) && (piece->owner != SHARD_ALL || p->rank == 0);
}

// The gradients of a block have their last term. They go to their owners, who sum their squares.
static void block_is_final(Model *m, int block) {
    const ShardPlan *plan = &m->plan;
    CUDA_CHECK(cudaEventRecord(m->block_final[block], m->stream));
    CUDA_CHECK(cudaStreamWaitEvent(m->net.stream, m->block_final[block], 0));
    net_reduce(&m->net, m->sums, m->grads, block);
    for (int i = 0, chunk = 0; i < plan->first[block + 1]; i++) {
        const Piece *p = &plan->piece[i];
        if (!counts_for_norm(plan, p)) continue;
        if (i >= plan->first[block])
            grad_norm_add(m->norm_partial + chunk, m->sums + p->at, p->count, m->net.stream);
        chunk += grad_norm_chunks(p->count);
    }
}

// From a.dh, the gradient of the head's input, to all gradients. first, last: of the step's
// micro-batches; in the last a block is final when its layer is done.
static void trunk_backward(Model *m, const DeviceBatch *b, const Phase *phase,
                           const HeadWeights *head, bool first, bool last) {
    const Config *c = &m->cfg;
    Activations *a = &m->a;
    Trace *t = &m->trace;
    cudaStream_t s = m->stream;
    int n = b->n, C = c->C, L = c->L;
    double nC = (double)sizeof(floatX) * n * C;
    bool backout = config_has_backout(c);

    trace_op(t, "backout_norm backward", -1, 0, (backout ? 5 : 3) * nC);
    backout_norm_backward(a->dx, a->dx_middle, m->dw.head.backout_lambda, a->dh, a->hf, a->rf,
                          x_middle(a, c), head->backout_lambda, a->scratch, n, C, s);
    for (int i = L - 1; i >= 0; i--) {
        if (backout && i == L / 2) add_forward(a->dx, a->dx_middle, (size_t)n * C, s);
        layer_backward(m, b, phase, i, head, first);
        if (last) block_is_final(m, layer_block(i));
    }
    const EmbedWeights *embed = embed_get(m);
    trace_op(t, "smear backward", -1, 0, 3 * nC);
    smear_backward(a->dx, m->dw.embed.smear_gate, m->dw.embed.smear_lambda, a->dx0, a->embed,
                   a->smear, embed->smear_gate, embed->smear_lambda, b->doc_start, a->scratch, n, C,
                   s);
    block_release(m, embed_block());
    trace_op(t, "embed_norm backward", -1, 0, 4 * nC + 8.0 * b->distinct * C);
    norm_backward(a->dx, a->dx, a->embed, a->embed_r, n, C, s);
    embed_backward(m->dw.embed.wte, a->dx, b->index, a->scratch, n, C, s);
    trace_end(t);
    if (last) block_is_final(m, embed_block()), block_is_final(m, head_block(m));
}

// Forward and backward of micro-batch `micro` of the step: its gradients are added to those before.
static void model_accumulate(Model *m, const DeviceBatch *b, const Phase *phase, int64_t micro,
                             float *keep) {
    bool first = micro == 0, last = micro + 1 == phase->micro_steps;
    const HeadWeights *head = head_get(m);
    trunk_forward(m, b, phase, head);
    head_loss(m, b, head, (float)(1.0 / (double)phase->batch), first, keep);
    int first_row = ((int)micro * m->plan.world + m->plan.rank) * phase->micro_rows;
    loss_reduce(m->step, m->a.losses, b->n, b->T, first_row, m->stream);
    trunk_backward(m, b, phase, head, first, last);
    block_release(m, head_block(m));
}

// Whether a gradient is made by a product (matmul_wgrad).
static bool by_product(const Tensor *x) {
    return x->role == LM_HEAD || (x->role >= WQ && x->role <= WPROJ);
}

// Clears the gradients that kernels only add to, of tables and of small tensors, neighbours at one
// go. Those made by products are written by the first micro-batch.
static void gradients_clear(Model *m) {
    const Table *t = &m->table;
    for (int i = 0, end; i < t->count; i = end) {
        size_t from = t->tensor[i].offset, to = from;
        for (end = i; end < t->count && !by_product(&t->tensor[end]); end++)
            to = t->tensor[end].offset + tensor_numel(&t->tensor[end]);
        if (end == i) end++;
        if (to > from)
            CUDA_CHECK(cudaMemsetAsync(m->grads + from, 0, (to - from) * sizeof(float), m->stream));
    }
}

// =============================================================================================
// The update: norm and check, then every tensor by its optimizer.

// The working copy of the masters from `offset` on; NULL where the masters themselves serve.
static floatX *working_copy(const Model *m, size_t offset) {
    bool masters_serve = sizeof(floatX) == sizeof(float) && m->plan.world == 1;
    return masters_serve ? NULL : m->weights + offset;
}

// Loss and norms of all ranks become known, on every rank, and whether there is to be an update.
static void step_decide(Model *m) {
    cudaStream_t net = m->net.stream;
    size_t apart = TOLD_SQUARES + (size_t)m->table.count;
    CUDA_CHECK(cudaEventRecord(m->backward_done, m->stream));
    CUDA_CHECK(cudaStreamWaitEvent(net, m->backward_done, 0));
    step_tell(m->told + (size_t)m->plan.rank * apart, m->step, m->norm_partial, m->first_chunk,
              m->table.count, net);
    net_numbers(&m->net, m->told, apart);
    CUDA_CHECK(cudaEventRecord(m->norms_done, net));
    CUDA_CHECK(cudaStreamWaitEvent(m->stream, m->norms_done, 0));
    step_check(m->step, m->told, m->plan.world, m->table.count, m->stream);
}

static void model_update(Model *m) {
    const ShardPlan *plan = &m->plan;
    Trace *t = &m->trace;
    step_decide(m);
    size_t tables = 0;
    for (int i = shard_next(plan, 0); i < plan->count; i = shard_next(plan, i + 1))
        if (plan->piece[i].tensor->group != GROUP_MATRIX) tables += plan->piece[i].count;
    trace_op(t, "adamw", -1, 0, (28.0 + (sizeof(floatX) == 2 ? 2 : 0)) * (double)tables);
    for (int i = shard_next(plan, 0); i < plan->count; i = shard_next(plan, i + 1)) {
        const Piece *p = &plan->piece[i];
        if (p->tensor->frozen || p->tensor->group == GROUP_MATRIX) continue;
        adamw_update(m->masters + p->at, working_copy(m, p->offset), m->first + p->at,
                     m->second + p->state, m->sums + p->at, m->step, p->tensor->group, p->count,
                     m->stream);
    }
    trace_op(t, "muon", -1, muon_flops(&m->muon), muon_traffic(&m->muon));
    muon_update(&m->muon, &m->matmul, m->masters, working_copy(m, 0), m->sums, m->first, m->second,
                m->step, m->stream);
    trace_end(t);
}

// =============================================================================================
// A step.

// Fills those of the next step's slots that are not filled yet. ahead: the step before is still
// under way, and shall have its result, so bad data only end the loading.
static void fetch_batches(Model *m, Loader *loader, const Phase *phase, bool ahead) {
    int from = m->set * m->feed.places;
    while (m->loaded < phase->micro_steps &&
           feed_load(&m->feed, from + m->loaded, loader, phase->micro_rows, phase->T, ahead))
        m->loaded++;
}

// Sends the step's batches to their places on the GPU, and --dump's copies to the trace.
static void send_batches(Model *m, const Phase *phase, StepTrace *trace) {
    size_t n = (size_t)phase->micro_rows * (size_t)phase->T;
    for (int i = 0; i < phase->micro_steps; i++) {
        int slot = m->set * m->feed.places + i;
        const DeviceBatch *b = &m->feed.slot[slot].batch;
        feed_send(&m->feed, slot, i, m->stream);
        if (!trace) continue;
        memcpy(trace->tokens + (size_t)i * n, b->tokens, n * sizeof(int));
        memcpy(trace->targets + (size_t)i * n, b->targets, n * sizeof(int));
    }
}

// All that a step does between batches and result.
static void step_work(Model *m, const Phase *phase, StepTrace *trace) {
    weights_gather(m);
    for (int i = 0; i < phase->micro_steps; i++) {
        DeviceBatch b = feed_get(&m->feed, i, phase->micro_rows, phase->T);
        size_t at = (size_t)i * (size_t)b.n * (size_t)m->cfg.V;
        model_accumulate(m, &b, phase, i, trace ? trace->logits + at : NULL);
    }
    model_update(m);
}

// The same as a graph, which is launched in one call and leaves the GPU no gaps.
static void step_capture(Model *m, const Phase *phase) {
    cudaGraph_t graph;
    CUDA_CHECK(cudaStreamBeginCapture(m->stream, cudaStreamCaptureModeGlobal));
    step_work(m, phase, NULL);
    CUDA_CHECK(cudaStreamEndCapture(m->stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&m->graph, graph, 0));
    CUDA_CHECK(cudaGraphDestroy(graph));
}

static void step_forget(Model *m) {
    if (m->graph) CUDA_CHECK(cudaGraphExecDestroy(m->graph));
    m->graph = NULL;
}

// A phase's first step is done as it is, which loads kernels and plans products; so are steps that
// are traced. The second is captured, and replayed from then on.
static void step_run(Model *m, const Phase *phase, StepTrace *trace) {
    bool same = !memcmp(&m->phase, phase, sizeof *phase);
    if (!same) step_forget(m);
    m->phase = *phase;
    if (!same || trace || m->trace.timed) {
        step_work(m, phase, trace);
        return;
    }
    if (!m->graph) step_capture(m, phase);
    CUDA_CHECK(cudaGraphLaunch(m->graph, m->stream));
}

// The tensor whose gradient, of all ranks, was the first not to be finite, NULL: all are; *teller:
// a rank that found it. Copies gradients to the host: for a run that is about to end.
static const char *find_bad_tensor(const Model *m, int *teller) {
    typedef struct {
        int tensor, place;
    } Found;
    size_t numel = m->plan.share[m->plan.rank].numel;
    float *sums = (float *)die_alloc(numel, sizeof *sums, "a copy of the gradients");
    CUDA_CHECK(cudaMemcpy(sums, m->sums, numel * sizeof *sums, cudaMemcpyDeviceToHost));
    Found mine = {-1, 0}, all[SHARD_MAX_RANKS] = {};
    const Tensor *bad = shard_find_nonfinite(&m->plan, sums, &mine.place);
    if (bad) mine.tensor = (int)(bad - m->table.tensor);
    dist_all_gather(m->dist, all, &mine, sizeof mine);
    const Found *first = NULL;
    for (const Found *f = all; f < all + m->plan.world; f++)
        if (f->tensor >= 0 && (!first || f->place > first->place)) first = f;
    free(sums);
    *teller = first ? (int)(first - all) : 0;
    return first ? m->table.tensor[first->tensor].name : NULL;
}

// The first of the step's rows, from `row` on, whose loss is not finite when it is alone in the
// batch: attention multiplies whole tiles, where a masked NaN still makes NaNs of rows beside its
// own. For a run that is about to end. first_slot: of the step's first micro-batch.
static int find_bad_row(Model *m, const Phase *phase, int first_slot, int row) {
    size_t T = (size_t)phase->T, n = (size_t)phase->micro_rows * T;
    size_t count = (size_t)phase->micro_steps * n;
    int *inputs = (int *)die_alloc(2 * count, sizeof *inputs, "a copy of the step's tokens");
    int *targets = inputs + count, rows = (int)(count / T), found = row;
    double *losses = (double *)die_alloc(T, sizeof *losses, "a row's losses"), sum = 0;
    for (int i = 0; i < phase->micro_steps; i++) {  // model_losses uses one of the slots
        const DeviceBatch *b = &m->feed.slot[first_slot + i].batch;
        memcpy(inputs + (size_t)i * n, b->tokens, n * sizeof *inputs);
        memcpy(targets + (size_t)i * n, b->targets, n * sizeof *targets);
    }
    for (int r = row; r < rows && isfinite(sum); r++) {
        size_t at = (size_t)r * T;
        model_losses(m, inputs + at, targets + at, 1, phase->T, phase, losses);
        for (size_t t = 0; t < T; t++) sum += losses[t];
        if (!isfinite(sum)) found = r;
    }
    free(inputs), free(losses);
    return found;
}

// What the step left in host_step. first_slot: of its first micro-batch.
static StepResult step_result(Model *m, const Phase *phase, int first_slot) {
    const StepState *done = m->host_step;
    int B = phase->micro_rows, world = m->plan.world, row = 0;  // of this rank
    StepResult r;
    memset(&r, 0, sizeof r);
    r.loss = done->loss_sum / (double)phase->batch, r.grad_norm = done->grad_norm;
    r.finite = !done->skip, r.asked = (StopRequest)done->asked, r.bad_row = -1;
    if (done->bad_row < INT_MAX) {
        r.bad_row = done->bad_row, r.teller = done->bad_row / B % world;
        row = done->bad_row / B / world * B + done->bad_row % B;
        if (r.teller == m->plan.rank) {
            row = find_bad_row(m, phase, first_slot, row);
            r.bad_row = (row / B * world + m->plan.rank) * B + row % B;
        }
    }
    if (isfinite(r.loss) && !r.finite) r.bad_tensor = find_bad_tensor(m, &r.teller);
    r.origin = m->feed.slot[first_slot + row / B].origin[row % B];
    return r;
}

StepResult model_step(Model *m, Loader *loader, const Phase *phase, const Plan *plan,
                      const Flags *flags, int64_t step, StopRequest asked, StepTrace *trace) {
    cudaStream_t s = m->stream;
    step_numbers(m->host_step, plan, flags, &m->cfg, step);
    m->host_step->asked = asked;
    CUDA_CHECK(cudaMemcpyAsync(m->step, m->host_step, sizeof *m->step, cudaMemcpyHostToDevice, s));
    gradients_clear(m);
    fetch_batches(m, loader, phase, false);
    send_batches(m, phase, trace);
    step_run(m, phase, trace);
    CUDA_CHECK(cudaMemcpyAsync(m->host_step, m->step, sizeof *m->step, cudaMemcpyDeviceToHost, s));
    LoaderState at = loader_state(loader);
    int first_slot = m->set * m->feed.places;
    m->set = 1 - m->set, m->loaded = 0;
    if (!trace && step + 1 < plan->steps) {
        Phase next = phase_at(plan, &m->cfg, step + 1);
        fetch_batches(m, loader, &next, true);
    }
    CUDA_CHECK(cudaStreamSynchronize(s));
    m->stale = m->plan.world > 1 && !m->host_step->skip;
    StepResult result = step_result(m, phase, first_slot);
    result.at = at;
    if (trace)
        CUDA_CHECK(cudaMemcpy(trace->grads, m->grads, m->table.numel * sizeof(float),
                              cudaMemcpyDeviceToHost));
    return result;
}

// =============================================================================================
// Validation and samples.

// Sends given rows to the GPU's first place. Between steps that is free, as are the slots of the
// step before.
static DeviceBatch send_rows(Model *m, const int *inputs, const int *targets, int rows, int T) {
    int slot = (1 - m->set) * m->feed.places;
    feed_put(&m->feed, slot, inputs, targets, rows, T);
    return feed_send(&m->feed, slot, 0, m->stream);
}

void model_losses(Model *m, const int *inputs, const int *targets, int rows, int T,
                  const Phase *phase, double *losses) {
    if (m->stale) weights_gather(m);
    if (!rows) return;
    DeviceBatch b = send_rows(m, inputs, targets, rows, T);
    const HeadWeights *head = head_get(m);
    trunk_forward(m, &b, phase, head);
    head_loss(m, &b, head, 0, false, NULL);
    block_release(m, head_block(m));
    CUDA_CHECK(cudaMemcpyAsync(m->host_losses, m->a.losses, (size_t)b.n * sizeof(float),
                               cudaMemcpyDeviceToHost, m->stream));
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    for (int t = 0; t < b.n; t++) losses[t] = m->host_losses[t];
}

// The tokens are filled up to a multiple of 128 with BOS, which those before them do not see: few
// shapes, so few plans of matmuls.
void model_logits(Model *m, const int *tokens, int count, const Phase *phase, float *logits) {
    const Config *c = &m->cfg;
    int T = ceil_div(count, 128) * 128 < c->T ? ceil_div(count, 128) * 128 : c->T;
    int *row = (int *)die_alloc((size_t)T, sizeof *row, "a sample's row");
    floatX *raw = (floatX *)die_alloc((size_t)c->Vp, sizeof *raw, "a sample's logits");
    for (int t = 0; t < T; t++) row[t] = t < count ? tokens[t] : c->bos;
    if (m->stale) weights_gather(m);
    DeviceBatch b = send_rows(m, row, NULL, 1, T);
    const HeadWeights *head = head_get(m);
    trunk_forward(m, &b, phase, head);
    block_await(m, head_block(m));
    const MatmulEpilogue store = {MATMUL_STORE};
    matmul_forward(&m->matmul, m->a.logits, matmul_operand(m->a.hf + (size_t)(count - 1) * c->C),
                   matmul_operand(head->lm_head), store, 1, c->C, c->Vp, m->stream);
    block_release(m, head_block(m));
    CUDA_CHECK(cudaMemcpyAsync(raw, m->a.logits, (size_t)c->Vp * sizeof *raw,
                               cudaMemcpyDeviceToHost, m->stream));
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    for (int v = 0; v < c->V; v++) logits[v] = (float)(15 * tanh((double)(float)raw[v] / 15));
    free(row), free(raw);
}

// =============================================================================================
// Memory: what the model takes, gives back, shows and exchanges with saves.

// Tokens at once, when --micro-batch does not say: what is kept of them within 28 GB, so that an
// 80 GB GPU holds it beside a model of depth 24.
int model_micro_tokens(const Config *c, int recompute) {
    static const double kept[] = {11, 7, 3};
    double most = 28e9 / (kept[recompute] * sizeof(floatX) * c->C * c->L);
    return most < 131072 ? (int)most : 131072;
}

// Attention has a block along y for each 64 tokens, and a grid at most 65535 of them.
enum { MOST_TOKENS = 65535 * 64 };

// Exits 2 on flags that no GPU can do. Kernels count the heads of all tokens, or pieces of 128 of
// their channels, in ints, and go one step past the last.
static void model_require(const Config *c, const Plan *plan) {
    Phase most = phase_largest(plan, c);
    int64_t tokens = (int64_t)most.micro_rows * most.T;
    int counted = max(c->H, c->C / 128 + 1), limit = min((int)MOST_TOKENS, INT_MAX / 2 / counted);
    if (tokens > limit)
        die(EXIT_USAGE,
            "--micro-batch %d: found %lld tokens at once in rows of --seq-len %d, expected at most "
            "%d; lower it, or --seq-len",
            most.micro_rows, (long long)tokens, most.T, limit);
    if (most.batch / most.T > INT_MAX / 2)
        die(EXIT_USAGE, "--batch-tokens %lld: found %lld rows of --seq-len %d, expected at most %d",
            (long long)most.batch, (long long)(most.batch / most.T), most.T, INT_MAX / 2);
    if (sizeof(floatX) == 2 && c->D != 64 && c->D != 128)
        die(EXIT_USAGE,
            "--channels %d, --heads %d: found heads of %d, expected 64 or 128 (the BF16 build's "
            "attention); choose --heads, or build with PRECISION=FP32",
            c->C, c->H, c->D);
#ifdef PRECISION_FP32
    if (c->D > ATTENTION_MAX_D)
        die(EXIT_USAGE,
            "--channels %d, --heads %d: found heads of %d, expected at most %d (the FP32 build's "
            "attention); choose more --heads",
            c->C, c->H, c->D, ATTENTION_MAX_D);
#endif
#ifdef USE_CUDNN
    cudnn_attention_check(c->T, c->doc_mask);
#endif
}

// Waits until the bytes are there: streams of ours do not wait for the default stream's copies.
static void upload(void *device, const void *host, size_t bytes) {
    CUDA_CHECK(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaStreamSynchronize(0));
}

#ifdef USE_CUDNN
enum { CUDNN_DETERMINISTIC = 1 << 30 };  // bytes that cuDNN may take to be deterministic

// Plans attention for every window; sets cudnn_bytes, the memory that it works in.
static void cudnn_init(Model *m, const Phase *phase) {
    const Config *c = &m->cfg;
    int n = phase->micro_rows * phase->T;
    m->cudnn = cudnn_attention_init(CUDNN_DETERMINISTIC);
    for (int i = 0; i < c->L; i++)
        m->cudnn_bytes = cudnn_attention_bytes(m->cudnn, n, phase->T, c->H, c->D, phase->window[i],
                                               c->C, 3 * c->C);
}
#endif

// Lays out the small things from `memory` on; returns their bytes. NULL: only counts.
static size_t numbers_layout(Model *m, char *memory) {
    size_t at = 0, tensors = (size_t)m->table.count, world = (size_t)m->plan.world;
    size_t chunks = m->table.numel / NORM_CHUNK + tensors;  // at most: each tensor's last is short
    size_t angles = (size_t)m->cfg.T * (size_t)(m->cfg.D / 2);
    m->step = (StepState *)place(memory, &at, sizeof *m->step);
    m->norm_partial = (double *)place(memory, &at, chunks * sizeof(double));
    m->told = (double *)place(memory, &at, world * (TOLD_SQUARES + tensors) * sizeof(double));
    m->first_chunk = (int *)place(memory, &at, (tensors + 1) * sizeof(int));
    m->angles = (float2 *)place(memory, &at, angles * sizeof(float2));
    return at;
}

static cudaEvent_t event_create(void) {
    cudaEvent_t event;
    CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    return event;
}

// Tells the GPU where each tensor's chunks of sums of squares begin, one after the other: of those
// that count for this rank's part of the norm.
static void norms_init(Model *m) {
    int count = m->table.count;
    int *first_chunk =
        (int *)die_alloc((size_t)count + 1, sizeof *first_chunk, "chunks of gradients");
    for (const Piece *p = m->plan.piece; p < m->plan.piece + m->plan.count; p++)
        if (counts_for_norm(&m->plan, p))
            first_chunk[p->tensor - m->table.tensor + 1] = grad_norm_chunks(p->count);
    for (int i = 0; i < count; i++) first_chunk[i + 1] += first_chunk[i];
    upload(m->first_chunk, first_chunk, ((size_t)count + 1) * sizeof *first_chunk);
    free(first_chunk);
}

static void events_init(Model *m) {
    size_t blocks = (size_t)m->table.blocks;
    m->block_final = (cudaEvent_t *)die_alloc(blocks, sizeof(cudaEvent_t), "events");
    m->block_there = (cudaEvent_t *)die_alloc(blocks, sizeof(cudaEvent_t), "events");
    for (size_t i = 0; i < blocks; i++)
        m->block_final[i] = event_create(), m->block_there[i] = event_create();
    m->stepped = event_create(), m->backward_done = event_create();
    m->norms_done = event_create();
}

static void events_free(Model *m) {
    for (int i = 0; i < m->table.blocks; i++) {
        CUDA_CHECK(cudaEventDestroy(m->block_final[i]));
        CUDA_CHECK(cudaEventDestroy(m->block_there[i]));
    }
    for (cudaEvent_t event : {m->stepped, m->backward_done, m->norms_done})
        CUDA_CHECK(cudaEventDestroy(event));
    free(m->block_final), free(m->block_there);
}

static void rotary_init(Model *m) {
    int T = m->cfg.T, D = m->cfg.D;
    size_t count = (size_t)T * (size_t)(D / 2);
    float2 *angles = (float2 *)die_alloc(count, sizeof *angles, "rotary angles");
    rope_init(angles, T, D);
    upload(m->angles, angles, count * sizeof *angles);
    free(angles);
}

// Device memory by kind, of a model whose cfg and table are set. The one list of it.
static int memory_rows(DescribeMemory *rows, Model *m, const Phase *most) {
    Activations a;
    int n = most->micro_rows * most->T;
    const ShardRank *share = &m->plan.share[m->plan.rank];
    double arena = (double)m->table.numel, mine = (double)share->numel * sizeof(float);
    DescribeMemory list[] = {
        {sizeof(floatX) == 2 ? "masters" : "parameters", mine},
        {"working weights", working_copy(m, 0) ? sizeof(floatX) * arena : 0},
        {"gradients", sizeof(float) * arena},
        {"gradients, summed over ranks", m->plan.world > 1 ? mine : 0},
        {"gradients on their way", (double)net_bytes(&m->table, &m->plan)},
        {"optimizer, first state", mine},
        {"optimizer, second state", (double)share->state_numel * sizeof(float)},
        {"Muon's scratch", (double)muon_bytes(&m->plan, MUON_SCRATCH)},
        {"activations of a micro-batch",
         (double)activations_layout(&a, &m->cfg, n, m->recompute, NULL)},
        {"batches of a step", (double)feed_batch_bytes(n) * (double)most->micro_steps},
        {"workspace of matrix products", (double)MATMUL_WORKSPACE},
        {"norms, rotary angles", (double)numbers_layout(m, NULL)},
#ifdef USE_CUDNN
        {"cuDNN's attention (its own plan)", (double)m->cudnn_bytes},
#endif
    };
    memcpy(rows, list, sizeof list);
    return sizeof list / sizeof *list;
}

int model_memory(DescribeMemory *rows, const Config *c, const Plan *plan, const ShardPlan *shard) {
    Phase most = phase_largest(plan, c);
    Model *m = (Model *)die_alloc(1, sizeof *m, "a model");
    model_require(c, plan);
    m->cfg = *c, m->recompute = plan->recompute;
    table_init(&m->table, c);
    shard_init(&m->plan, &m->table, shard->rank, shard->world);
    m->weights = (floatX *)m;  // there are some, for working_copy
#ifdef USE_CUDNN
    m->cudnn_bytes = CUDNN_DETERMINISTIC;  // about: without a GPU there is no plan
#endif
    int count = memory_rows(rows, m, &most);
    shard_free(&m->plan), table_free(&m->table);
    free(m);
    return count;
}

// Exits 7, before any of it is taken, when the GPU has not all the memory that the run needs.
static void require_memory(Model *m, const Phase *most) {
    DescribeMemory rows[MODEL_MEMORY_ROWS];
    size_t left = 0, all = 0;
    double needed = 0;
    for (int i = memory_rows(rows, m, most) - 1; i >= 0; i--) needed += rows[i].bytes;
    CUDA_CHECK(cudaMemGetInfo(&left, &all));
    if (needed > (double)left)
        die(EXIT_DEVICE,
            "GPU memory: needed %.2f GB in all, found %.2f GB free of %.2f GB; lower --micro-batch "
            "(now %d rows), or --depth (--dry-run 1 lists what takes how much)",
            1e-9 * needed, 1e-9 * (double)left, 1e-9 * (double)all, most->micro_rows);
}

// Plans for the large products of a micro-batch of n tokens, tried in the activations' memory. fc's
// forward and proj's dgrad are cuBLASLt's only where llmc/gemm_sm90.cuh is not.
static void tune_products(Model *m, int n, size_t bytes) {
    Matmul *mm = &m->matmul;
    int C = m->cfg.C, F = m->cfg.F, Vp = m->cfg.Vp;
    int out[][2] = {{C, 3 * C}, {C, C}, {C, F}, {F, C}};  // qkv, wo, fc, proj: from, to
    if (matmul_flops(n, C, C) < 1e10) return;             // below some 20 us guesses will do
    for (auto [K, N] : out) {
        if (N != F || !gemm_sm90_fits(F, C))
            matmul_tune_forward(mm, n, K, N, m->activations, bytes, m->stream);
        if (K != F || !gemm_sm90_fits(F, C))
            matmul_tune_dgrad(mm, n, K, N, m->activations, bytes, m->stream);
        matmul_tune_wgrad(mm, n, K, N, m->activations, bytes, m->stream);
    }
    for (int rows : {min(n, (int)HEAD_ROWS), n > HEAD_ROWS ? n % HEAD_ROWS : 0}) {
        if (!rows) continue;  // the last chunk of the head is as long as the others
        matmul_tune_forward(mm, rows, C, Vp, m->activations, bytes, m->stream);
        matmul_tune_dgrad(mm, rows, C, Vp, m->activations, bytes, m->stream);
        matmul_tune_wgrad(mm, rows, C, Vp, m->activations, bytes, m->stream);
    }
}

void model_init(Model *m, const Config *cfg, const Plan *plan, const Dist *dist, uint32_t seed,
                bool test_init) {
    Phase most = phase_largest(plan, cfg);
    memset(m, 0, sizeof *m);
    m->cfg = *cfg, m->recompute = plan->recompute;
    model_require(cfg, plan);
    gpu_init(&m->gpu, dist->local);
    CUDA_CHECK(cudaStreamCreateWithFlags(&m->stream, cudaStreamNonBlocking));
    m->trace.stream = m->stream, m->dist = dist;
    table_init(&m->table, cfg);
    shard_init(&m->plan, &m->table, dist->rank, dist->world);
#ifdef USE_CUDNN
    cudnn_init(m, &most);
#endif
    require_memory(m, &most);
    matmul_init(&m->matmul, &m->gpu);

    net_init(&m->net, &m->gpu, dist, &m->table, &m->plan);
    const ShardRank *share = &m->plan.share[dist->rank];
    size_t arena = m->table.numel * sizeof(float), mine = share->numel * sizeof(float);
    size_t second = share->state_numel * sizeof(float);
    bool alone = dist->world == 1;
    m->masters = (float *)gpu_alloc(&m->gpu, mine, "the parameters");
    m->grads = (float *)gpu_alloc(&m->gpu, arena, "the gradients");
    m->sums = alone ? m->grads : (float *)gpu_alloc(&m->gpu, mine, "the summed gradients");
    m->first = (float *)gpu_alloc(&m->gpu, mine, "the optimizer's first state");
    m->second = (float *)gpu_alloc(&m->gpu, second, "the optimizer's second state");
    CUDA_CHECK(cudaMemset(m->grads, 0, arena));
    CUDA_CHECK(cudaMemset(m->first, 0, mine));
    CUDA_CHECK(cudaMemset(m->second, 0, second));
    m->weights = alone && sizeof(floatX) == sizeof(float)
                     ? (floatX *)m->masters
                     : (floatX *)gpu_alloc(&m->gpu, m->table.numel * sizeof(floatX), "the weights");
    m->w = views_of(&m->table, cfg, m->weights, &m->plan, m->masters);
    m->dw = views_of(&m->table, cfg, m->grads, NULL, m->grads);
    muon_init(&m->muon, &m->gpu, &m->plan, MUON_SCRATCH);
    m->numbers = gpu_alloc(&m->gpu, numbers_layout(m, NULL), "norms and rotary angles");
    numbers_layout(m, (char *)m->numbers);
    norms_init(m);
    events_init(m);
    rotary_init(m);

    int tokens = most.micro_rows * most.T, places = (int)most.micro_steps;
    m->max_tokens = (size_t)tokens;
    size_t bytes = activations_layout(&m->a, cfg, tokens, m->recompute, NULL);
    m->activations = gpu_alloc(&m->gpu, bytes, "the activations");
    activations_layout(&m->a, cfg, tokens, m->recompute, (char *)m->activations);
#ifdef USE_CUDNN
    m->cudnn_work = gpu_alloc(&m->gpu, m->cudnn_bytes, "cuDNN's attention");
#endif
    if (sizeof(floatX) == 2) tune_products(m, tokens, bytes);
    feed_init(&m->feed, &m->gpu, cfg, tokens, most.micro_rows, 2 * places, places);
    m->host_step = (StepState *)gpu_alloc_host(sizeof *m->step, "the step's numbers");
    m->host_losses = (float *)gpu_alloc_host(m->max_tokens * sizeof(float), "validation's losses");

    ModelState state = {(float *)die_alloc(m->table.numel, sizeof(float), "the parameters"), NULL,
                        NULL};
    table_fill(&m->table, state.params, seed, test_init);
    model_upload(m, state);
    model_state_free(m, state);
}

void model_free(Model *m) {
    step_forget(m);
    void *device[] = {m->masters,     m->grads,   m->first,           m->second,
                      m->activations, m->numbers, working_copy(m, 0), NULL};
    if (m->sums != m->grads) device[7] = m->sums;
    for (size_t i = 0; i < sizeof device / sizeof *device; i++) CUDA_CHECK(cudaFree(device[i]));
    events_free(m);
    net_free(&m->net);
    CUDA_CHECK(cudaFreeHost(m->host_step));
    CUDA_CHECK(cudaFreeHost(m->host_losses));
#ifdef USE_CUDNN
    cudnn_attention_free(m->cudnn);
    CUDA_CHECK(cudaFree(m->cudnn_work));
#endif
    feed_free(&m->feed);
    muon_free(&m->muon);
    matmul_free(&m->matmul);
    CUDA_CHECK(cudaStreamDestroy(m->stream));
    shard_free(&m->plan), table_free(&m->table);
}

// Peak of the tensor cores, dense BF16, by the vendor's datasheets; 0: not known, no MFU.
static double peak_flops(const Gpu *g) {
    if (sizeof(floatX) != 2) return 0;
    if (g->major == 8 && g->minor == 0) return 312e12;  // A100
    return g->major == 9 ? 989e12 : 0;                  // H100, H200
}

ModelFacts model_facts(const Model *m) {
    size_t left = 0, all = 0;
    CUDA_CHECK(cudaMemGetInfo(&left, &all));
    ModelFacts facts = {"train_gpt2cu (" PRECISION_NAME ", attention " ATTENTION_NAME ")",
                        m->gpu.name, peak_flops(&m->gpu), all - left};
    return facts;
}

ModelState model_download(Model *m) {
    const ShardRank *share = &m->plan.share[m->plan.rank];
    size_t mine = share->numel, second = share->state_numel;
    ModelState state = {(float *)die_alloc(m->table.numel, sizeof(float), "a save's parameters"),
                        (float *)die_alloc(mine, sizeof(float), "a save's first state"),
                        (float *)die_alloc(second, sizeof(float), "a save's second state")};
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    net_collect(&m->net, state.params, m->masters);
    CUDA_CHECK(cudaMemcpy(state.first, m->first, mine * sizeof(float), cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaMemcpy(state.second, m->second, second * sizeof(float), cudaMemcpyDeviceToHost));
    return state;
}

// The states may be NULL: then they stay. The working weights follow the masters, those of other
// ranks when they are next needed.
void model_upload(Model *m, ModelState state) {
    const ShardPlan *plan = &m->plan;
    const ShardRank *share = &plan->share[plan->rank];
    for (int i = shard_next(plan, 0); i < plan->count; i = shard_next(plan, i + 1)) {
        const Piece *p = &plan->piece[i];
        upload(m->masters + p->at, state.params + p->offset, p->count * sizeof(float));
        if (working_copy(m, 0))
            weights_round(m->weights + p->offset, m->masters + p->at, p->count, m->stream);
    }
    if (state.first) upload(m->first, state.first, share->numel * sizeof(float));
    if (state.second) upload(m->second, state.second, share->state_numel * sizeof(float));
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    m->stale = plan->world > 1;
}

void model_state_free(Model *m, ModelState state) {
    (void)m;
    free(state.params), free(state.first), free(state.second);
}

int main(int argc, char **argv) {
    static Model model;
    return run_main(&model, argc, argv);
}
