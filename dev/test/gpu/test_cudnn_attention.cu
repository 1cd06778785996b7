// test_cudnn_attention.cu: cuDNN's attention (llmc/cudnn_attention.h) against our own
// (llmc/attention.cuh, llmc/attention_sm90.cuh); with the argument `bench`, the speed of both.
// Built with USE_CUDNN=1 only.
#include "dev/test/gpu/test_gpu.cuh"
#ifdef HOPPER
#include "llmc/attention_sm90.cuh"  // attention_forward, attention_backward
#else
#include "llmc/attention.cuh"  // attention_forward, attention_backward
#endif
#include "llmc/cudnn_attention.h"  // cudnn_attention_forward, cudnn_attention_backward

constexpr size_t ROOM = (size_t)4 << 30;  // for the deterministic backward

// A problem of B rows and all its arrays, packed as the trainer packs them.
typedef struct {
    int B, T, H, D, W, n, C;
    int *doc_start;              // (n): each row is one document
    GpuArray<bf16> qkv, dout;    // (n, 3C), (n, C)
    GpuArray<bf16> o, dqkv;      // (n, C), (n, 3C)
    GpuArray<float> lse, delta;  // (H, n), or cuDNN's (B, H, T); (H, n)
    void *work;
} Problem;

static Problem problem(CudnnAttention *a, int B, int T, int H, int D, int W) {
    Problem p = {B, T, H, D, W, B * T, H * D, NULL, {}, {}, {}, {}, {}, {}, NULL};
    size_t n = (size_t)p.n, C = (size_t)p.C;
    int *starts = gpu_expected<int>(n);
    for (int t = 0; t < p.n; t++) starts[t] = t / T * T;
    p.doc_start = gpu_ints("doc_start", starts, n);
    p.qkv = gpu_normal<bf16>("qkv", n * 3 * C, 1), p.dout = gpu_normal<bf16>("dout", n * C, 1);
    p.o = gpu_poisoned<bf16>("o", n * C), p.dqkv = gpu_poisoned<bf16>("dqkv", n * 3 * C);
    p.lse = gpu_poisoned<float>("lse", n * H), p.delta = gpu_poisoned<float>("delta", n * H);
    p.work = gpu_bytes("work", cudnn_attention_bytes(a, p.n, T, H, D, W, p.C, 3 * p.C));
    return p;
}

static void own_forward(Problem *p) {
    const bf16 *q = p->qkv.device;
    attention_forward(p->o.device, p->lse.device, q, q + p->C, q + 2 * p->C, p->doc_start, p->n,
                      p->H, p->D, p->W, p->C, 3 * p->C, 0);
}

static void own_backward(Problem *p) {
    const bf16 *q = p->qkv.device;
    bf16 *dq = p->dqkv.device;
    attention_backward(dq, dq + p->C, dq + 2 * p->C, p->delta.device, p->dout.device, p->o.device,
                       p->lse.device, q, q + p->C, q + 2 * p->C, p->doc_start, Rotary{}, p->n, p->H,
                       p->D, p->W, p->C, 3 * p->C, 0);
}

static void cudnn_forward(CudnnAttention *a, Problem *p, cudaStream_t stream = 0) {
    const bf16 *q = p->qkv.device;
    cudnn_attention_forward(a, p->o.device, p->lse.device, q, q + p->C, q + 2 * p->C, p->work, p->n,
                            p->T, p->H, p->D, p->W, p->C, 3 * p->C, stream);
}

static void cudnn_backward(CudnnAttention *a, Problem *p, cudaStream_t stream = 0) {
    const bf16 *q = p->qkv.device;
    bf16 *dq = p->dqkv.device;
    cudnn_attention_backward(a, dq, dq + p->C, dq + 2 * p->C, p->dout.device, p->o.device,
                             p->lse.device, q, q + p->C, q + 2 * p->C, p->work, p->n, p->T, p->H,
                             p->D, p->W, p->C, 3 * p->C, stream);
}

// Both on the same numbers; dq, dk and dv are compared apart, lest one hides behind another.
static void check_case(CudnnAttention *a, int B, int T, int H, int D, int W) {
    Problem p = problem(a, B, T, H, D, W);
    size_t n = (size_t)p.n, C = (size_t)p.C;
    own_forward(&p);
    own_backward(&p);
    float *o = gpu_expected(n * C), *dqkv = gpu_expected(n * 3 * C), *lse = gpu_expected(n * H);
    memcpy(o, gpu_read(p.o), n * C * sizeof *o);
    memcpy(dqkv, gpu_read(p.dqkv), n * 3 * C * sizeof *dqkv);
    gpu_read(p.lse);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++)
            for (int t = 0; t < T; t++)
                lse[(b * H + h) * T + t] = p.lse.host[(size_t)h * n + (size_t)(b * T + t)];
    CUDA_CHECK(cudaMemset(p.o.device, 0xff, n * C * sizeof(bf16)));
    CUDA_CHECK(cudaMemset(p.dqkv.device, 0xff, n * 3 * C * sizeof(bf16)));
    CUDA_CHECK(cudaMemset(p.lse.device, 0xff, n * (size_t)H * sizeof(float)));
    cudnn_forward(a, &p);
    cudnn_backward(a, &p);
    gpu_compare(p.o, o, p.n, p.C, "B %d, T %d, H %d, D %d, W %d", B, T, H, D, W);
    p.lse.tolerance = 1e-4;  // both take logarithm and exponential from the fast units
    gpu_compare(p.lse, lse, B * H, T, "B %d, T %d, H %d, D %d, W %d", B, T, H, D, W);
    gpu_read(p.dqkv);
    for (size_t part = 0; part < 3; part++) {
        static const char *const names[] = {"dq", "dk", "dv"};
        float *found = gpu_expected(n * C), *expected = gpu_expected(n * C);
        for (size_t t = 0; t < n; t++) {
            memcpy(found + t * C, p.dqkv.host + (3 * t + part) * C, C * sizeof *found);
            memcpy(expected + t * C, dqkv + (3 * t + part) * C, C * sizeof *found);
        }
        GpuArray<bf16> gradient = gpu_copy<bf16>(names[part], found, n * C);
        gpu_compare(gradient, expected, p.n, p.C, "B %d, T %d, H %d, D %d, W %d", B, T, H, D, W);
    }
    gpu_end_case();
}

static void check_grid(size_t room) {
    CudnnAttention *a = cudnn_attention_init(room);
    for (int D : {64, 128})
        for (int T : {128, 256, 1024}) {
            if (grid_small && T > 128) continue;
            for (int W : {T, 1, 127, 200})  // at W = 0 dq and dk are 0 but for rounding
                if (W <= T) check_case(a, T == 256 ? 3 : 2, T, T == 1024 ? 2 : 3, D, W);
        }
    cudnn_attention_free(a);
}

TEST(like_ours) { check_grid(0); }
TEST(like_ours_deterministic) { check_grid(ROOM); }

// With room enough, the same bits every time.
TEST(same_bits_again) {
    CudnnAttention *a = cudnn_attention_init(ROOM);
    for (int W : {1024, 256}) {
        Problem p = problem(a, 4, 1024, 6, 128, W);
        size_t bytes = p.dqkv.count * sizeof(float);
        float *first = gpu_expected(p.dqkv.count);
        for (int i = 0; i < 5; i++) {
            cudnn_forward(a, &p);
            cudnn_backward(a, &p);
            gpu_read(p.dqkv);
            if (i == 0) memcpy(first, p.dqkv.host, bytes);
            CHECK(!memcmp(first, p.dqkv.host, bytes));
        }
        gpu_end_case();
    }
    cudnn_attention_free(a);
}

// As in the trainer: once as it is, then captured, and replayed twice. The same bits each time.
TEST(steps_of_a_graph) {
    CudnnAttention *a = cudnn_attention_init(ROOM);
    Problem p = problem(a, 2, 256, 3, 128, 100);
    size_t bytes = p.dqkv.count * sizeof(float);
    float *first = gpu_expected(p.dqkv.count);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudnn_forward(a, &p);
    cudnn_backward(a, &p);
    memcpy(first, gpu_read(p.dqkv), bytes);
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    cudnn_forward(a, &p, stream);
    cudnn_backward(a, &p, stream);
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CUDA_CHECK(cudaGraphDestroy(graph));
    for (int i = 0; i < 2; i++) {
        CUDA_CHECK(cudaMemset(p.dqkv.device, 0xff, p.dqkv.count * sizeof(bf16)));
        CUDA_CHECK(cudaMemset(p.o.device, 0xff, p.o.count * sizeof(bf16)));
        CUDA_CHECK(cudaDeviceSynchronize());
        CUDA_CHECK(cudaGraphLaunch(exec, stream));
        CUDA_CHECK(cudaStreamSynchronize(stream));
        CHECK(!memcmp(first, gpu_read(p.dqkv), bytes));
    }
    CUDA_CHECK(cudaGraphExecDestroy(exec));
    CUDA_CHECK(cudaStreamDestroy(stream));
    gpu_end_case();
    cudnn_attention_free(a);
}

// ---------------------------------------------------------------------------------------------

// Prints time and speed of 20 calls; FLOPs count the pairs of query and key that see each other.
template <class Call>
static void bench(const char *name, const Problem *p, double products, Call call) {
    const int calls = 20;
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    for (int i = 0; i < 3; i++) call();
    CUDA_CHECK(cudaEventRecord(begin));
    for (int i = 0; i < calls; i++) call();
    CUDA_CHECK(cudaEventRecord(end));
    CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    double pairs = 0, us = 1e3 * ms / calls;
    for (int t = 0; t < p->T; t++) pairs += (t < p->W ? t : p->W) + 1;
    double flops = 2 * products * pairs * p->D * p->H * p->B;
    printf("%-30s B %2d H %2d T %d D %3d W %4d  %8.1f us  %6.1f TFLOP/s\n", name, p->B, p->H, p->T,
           p->D, p->W, us, 1e-6 * flops / us);
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
}

static void bench_shape(int B, int T, int H, int D, int W) {
    CudnnAttention *a = cudnn_attention_init(0), *exact = cudnn_attention_init(ROOM);
    Problem p = problem(a, B, T, H, D, W), e = p;
    e.work = gpu_bytes("work", cudnn_attention_bytes(exact, p.n, T, H, D, W, p.C, 3 * p.C));
    bench("own forward", &p, 2, [&] { own_forward(&p); });
    bench("own backward", &p, 5, [&] { own_backward(&p); });
    bench("cuDNN forward", &p, 2, [&] { cudnn_forward(a, &p); });
    bench("cuDNN backward", &p, 5, [&] { cudnn_backward(a, &p); });
    bench("cuDNN backward, deterministic", &e, 5, [&] { cudnn_backward(exact, &e); });
    gpu_end_case();
    cudnn_attention_free(a);
    cudnn_attention_free(exact);
}

int main(int argc, char **argv) {
    gpu_test_begin();
    if (argc > 1 && !strcmp(argv[1], "bench")) {
        bench_shape(32, 2048, 6, 128, 2048);
        bench_shape(32, 2048, 6, 128, 512);
        bench_shape(64, 1024, 12, 64, 1024);
        return 0;
    }
    RUN(like_ours);
    RUN(like_ours_deterministic);
    RUN(same_bits_again);
    RUN(steps_of_a_graph);
    return test_end();
}
