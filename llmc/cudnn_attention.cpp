// cudnn_attention.cpp: attention by cuDNN; cudnn_attention.h says what it computes. cuDNN is told a
// graph of operations, through cudnn-frontend, and answers with a plan; plans are kept by shape.
// cudnn-frontend is C++, all headers: the host's compiler takes half a minute for this file, and
// nvcc would take minutes. So it stands apart, in C++, behind a C interface.
#include <cudnn_frontend.h>
#include <math.h>
#include <string.h>

#include <memory>
#include <unordered_map>
#include <vector>

#include "llmc/cudnn_attention.h"
#include "llmc/die.h"  // die, warn, EXIT_USAGE, EXIT_DEVICE, EXIT_INTERNAL

// cudnn-frontend brings kernels of its own, used only where they are asked for, which call the
// driver's library. Weak: the program need not be linked with it, and starts without a driver.
#pragma weak cuDeviceGet
#pragma weak cuGetErrorString
#pragma weak cuKernelSetAttribute
#pragma weak cuLaunchKernel
#pragma weak cuLibraryGetKernel
#pragma weak cuLibraryLoadData
#pragma weak cuLibraryUnload
#pragma weak cuTensorMapEncodeTiled

namespace fe = cudnn_frontend;
typedef std::shared_ptr<fe::graph::Graph> Graph;
typedef std::shared_ptr<fe::graph::Tensor_attributes> Tensor;

typedef struct {
    int B, T, H, D, W, ldo, ld;
} Shape;

typedef struct {
    Shape shape;
    bool backward;
    Graph graph;
    size_t work;  // bytes
} Plan;

struct CudnnAttention {
    cudnnHandle_t cudnn;
    size_t deterministic_bytes;
    bool warned;              // that backward is not deterministic
    size_t work;              // bytes: the most that cudnn_attention_bytes has answered
    std::vector<Plan> plans;  // a few: searched from the front
};

// The names that tensors have between building a graph and running it.
enum { Q, K, V, O, LSE, DO, DQ, DK, DV };

static void check_cudnn(cudnnStatus_t status, const char *call) {
    if (status != CUDNN_STATUS_SUCCESS)
        die(EXIT_DEVICE, "%s: %s", call, cudnnGetErrorString(status));
}

static void check(fe::error_t error, const char *what, const Shape *s) {
    if (error.is_bad())
        die(EXIT_INTERNAL, "cuDNN, attention %s: %s; %d rows of %d, %d heads of %d, window %d",
            what, error.get_message().c_str(), s->B, s->T, s->H, s->D, s->W);
}

// ---------------------------------------------------------------------------------------------
// Graphs.

static Graph graph_new(void) {
    Graph g = std::make_shared<fe::graph::Graph>();
    g->set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    return g;
}

// q, k, v, o or a gradient of theirs: rows `ld` apart, read as (B, H, T, D).
static void describe_rows(fe::graph::Tensor_attributes *t, int name, const Shape *s, int64_t ld) {
    t->set_uid(name).set_dim({s->B, s->H, s->T, s->D}).set_stride({s->T * ld, s->D, ld, 1});
}

static void describe_lse(fe::graph::Tensor_attributes *t, const Shape *s) {
    t->set_uid(LSE).set_dim({s->B, s->H, s->T, 1}).set_stride({s->H * s->T, s->T, 1, 1});
    t->set_data_type(fe::DataType_t::FLOAT);
}

static Tensor input_rows(Graph g, int name, const Shape *s, int ld) {
    fe::graph::Tensor_attributes t;
    describe_rows(&t, name, s, ld);
    return g->tensor(t);
}

static void output_rows(Tensor t, int name, const Shape *s, int ld) {
    describe_rows(t.get(), name, s, ld);
    t->set_output(true);
}

// Scale, causality, window: the same words in both passes. cuDNN's window counts the query itself.
template <class Attributes> static Attributes attributes_of(const Shape *s) {
    Attributes a;
    a.set_attn_scale((float)(1.44 / sqrt(s->D)))
        .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
        .set_diagonal_band_right_bound(0);
    if (s->W < s->T - 1) a.set_diagonal_band_left_bound(s->W + 1);
    return a;
}

static Graph forward_graph(const Shape *s) {
    Graph g = graph_new();
    auto attributes = attributes_of<fe::graph::SDPA_attributes>(s);
    attributes.set_generate_stats(true);
    auto [o, lse] = g->sdpa(input_rows(g, Q, s, s->ld), input_rows(g, K, s, s->ld),
                            input_rows(g, V, s, s->ld), attributes);
    output_rows(o, O, s, s->ldo);
    describe_lse(lse.get(), s);
    lse->set_output(true);
    return g;
}

static Graph backward_graph(const Shape *s, bool deterministic) {
    Graph g = graph_new();
    auto attributes = attributes_of<fe::graph::SDPA_backward_attributes>(s);
    attributes.set_deterministic_algorithm(deterministic);
    fe::graph::Tensor_attributes lse;
    describe_lse(&lse, s);
    auto [dq, dk, dv] = g->sdpa_backward(input_rows(g, Q, s, s->ld), input_rows(g, K, s, s->ld),
                                         input_rows(g, V, s, s->ld), input_rows(g, O, s, s->ldo),
                                         input_rows(g, DO, s, s->ldo), g->tensor(lse), attributes);
    output_rows(dq, DQ, s, s->ld);
    output_rows(dk, DK, s, s->ld);
    output_rows(dv, DV, s, s->ld);
    return g;
}

// ---------------------------------------------------------------------------------------------
// Plans.

// Backward takes the deterministic way where there is room for it and cuDNN has one.
static Graph plan_backward(CudnnAttention *a, const Shape *s) {
    size_t ds = 2 * (size_t)s->B * (size_t)s->H * (size_t)s->T * (size_t)s->T;
    if (ds <= a->deterministic_bytes) {
        Graph g = backward_graph(s, true);
        if (g->build(a->cudnn, {fe::HeurMode_t::A}).is_good()) return g;
    }
    if (a->deterministic_bytes && !a->warned)
        warn("cuDNN's attention is not deterministic at %d rows of %d, %d heads, window %d: two "
             "runs "
             "of the same command will differ; lower --micro-batch, or build without USE_CUDNN",
             s->B, s->T, s->H, s->W);
    a->warned = true;
    Graph g = backward_graph(s, false);
    check(g->build(a->cudnn, {fe::HeurMode_t::A}), "backward", s);
    return g;
}

static const Plan *plan_of(CudnnAttention *a, const Shape *s, bool backward) {
    for (const Plan &p : a->plans)
        if (p.backward == backward && !memcmp(&p.shape, s, sizeof *s)) return &p;
    Plan p = {*s, backward, NULL, 0};
    int64_t work = 0;
    if (backward) {
        p.graph = plan_backward(a, s);
    } else {
        p.graph = forward_graph(s);
        check(p.graph->build(a->cudnn, {fe::HeurMode_t::A}), "forward", s);
    }
    check(p.graph->get_workspace_size(work), "work memory", s);
    p.work = (size_t)work;
    a->plans.push_back(p);
    return &a->plans.back();
}

static void run(CudnnAttention *a, const Shape *s, bool backward,
                std::unordered_map<int64_t, void *> tensors, void *work, cudaStream_t stream) {
    const Plan *p = plan_of(a, s, backward);
    if (p->work > a->work)
        die(EXIT_INTERNAL, "cuDNN, attention: needs %zu bytes of work memory, was promised %zu",
            p->work, a->work);
    check_cudnn(cudnnSetStream(a->cudnn, stream), "cudnnSetStream");
    check(p->graph->execute(a->cudnn, tensors, work), backward ? "backward" : "forward", s);
}

// ---------------------------------------------------------------------------------------------

CudnnAttention *cudnn_attention_init(size_t deterministic_bytes) {
    CudnnAttention *a = new CudnnAttention();
    check_cudnn(cudnnCreate(&a->cudnn), "cudnnCreate");
    a->deterministic_bytes = deterministic_bytes;
    return a;
}

void cudnn_attention_free(CudnnAttention *a) {
    a->plans.clear();
    check_cudnn(cudnnDestroy(a->cudnn), "cudnnDestroy");
    delete a;
}

void cudnn_attention_check(int T, bool doc_mask) {
    if (doc_mask)
        die(EXIT_USAGE,
            "--doc-mask 1: found a program built with USE_CUDNN=1, whose attention takes "
            "a row as one document; use --doc-mask 0, or build without USE_CUDNN");
    if (T % 128)
        die(EXIT_USAGE,
            "--seq-len: found %d, expected a multiple of 128, as the program is built "
            "with USE_CUDNN=1",
            T);
}

size_t cudnn_attention_bytes(CudnnAttention *a, int n, int T, int H, int D, int W, int ldo,
                             int ld) {
    Shape s = {n / T, T, H, D, W, ldo, ld};
    for (bool backward : {false, true}) {
        size_t work = plan_of(a, &s, backward)->work;
        if (work > a->work) a->work = work;
    }
    return a->work;
}

void cudnn_attention_forward(CudnnAttention *a, __nv_bfloat16 *o, float *lse,
                             const __nv_bfloat16 *q, const __nv_bfloat16 *k, const __nv_bfloat16 *v,
                             void *work, int n, int T, int H, int D, int W, int ldo, int ld,
                             cudaStream_t stream) {
    Shape s = {n / T, T, H, D, W, ldo, ld};
    run(a, &s, false, {{Q, (void *)q}, {K, (void *)k}, {V, (void *)v}, {O, o}, {LSE, lse}}, work,
        stream);
}

void cudnn_attention_backward(CudnnAttention *a, __nv_bfloat16 *dq, __nv_bfloat16 *dk,
                              __nv_bfloat16 *dv, const __nv_bfloat16 *dout, const __nv_bfloat16 *o,
                              const float *lse, const __nv_bfloat16 *q, const __nv_bfloat16 *k,
                              const __nv_bfloat16 *v, void *work, int n, int T, int H, int D, int W,
                              int ldo, int ld, cudaStream_t stream) {
    Shape s = {n / T, T, H, D, W, ldo, ld};
    run(a, &s, true,
        {{Q, (void *)q},
         {K, (void *)k},
         {V, (void *)v},
         {O, (void *)o},
         {DO, (void *)dout},
         {LSE, (void *)lse},
         {DQ, dq},
         {DK, dk},
         {DV, dv}},
        work, stream);
}
