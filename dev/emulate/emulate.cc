// emulate.cc: fibers, barriers and launches of emulate.h; the functions of CUDA's runtime, of the
// driver and of cuBLASLt that the project calls, on host memory.
#include <cublasLt.h>
#include <cuda_fp8.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <deque>
#include <map>
#include <vector>

// The variables that kernels see as constants.
extern "C" {
uint3 emulate_thread, emulate_block;
dim3 emulate_block_dim, emulate_grid_dim;
}
asm(".globl threadIdx\n.set threadIdx, emulate_thread\n"
    ".globl blockIdx\n.set blockIdx, emulate_block\n"
    ".globl blockDim\n.set blockDim, emulate_block_dim\n"
    ".globl gridDim\n.set gridDim, emulate_grid_dim\n");

#include "dev/emulate/emulate.h"

namespace emulate {

alignas(1024) unsigned char shared[SHARED_BYTES];

// ---------------------------------------------------------------------------------------------
// Fibers: the threads of a block. A fiber lives as long as the program and runs one thread of each
// block after the other.

enum { THREADS = 1024, BARRIERS = 16, STACK_BYTES = 256 << 10 };

typedef struct {
    size_t uncommitted;         // works at the queue's end that no commit has closed yet
    std::deque<size_t> groups;  // sizes of those that are closed
    std::deque<std::function<void()>> works;
} AsyncQueue;

typedef struct {
    jmp_buf at;
    bool begun, done;
    uint3 index;
    Waits *waits;
    const void *what;
    uint64_t x;
    AsyncQueue queue[QUEUES];
} Fiber;

// Where the lanes of a mask meet: each mask's lowest lane has a place of its own.
typedef struct {
    unsigned mask, arrived, turn;
    unsigned char slots[2][32][32];  // of this exchange and of the one before
} Meeting;

typedef struct {
    unsigned arrived, wanted, turn;  // wanted 0: all that run
} Barrier;

static Fiber fiber[THREADS];
static Meeting meeting[THREADS];
static Barrier barriers[BARRIERS];
static std::deque<std::function<void()>> copies;  // that arrive at a barrier
static const std::function<void()> *thread_body;
static const char *kernel_name;
static jmp_buf scheduler;
static int running = -1, block_threads, alive;
static bool early, backward;

static void say(const char *what) {
    fprintf(stderr, "emulate: %s", what);
    if (running >= 0)
        fprintf(stderr, "; kernel %s, block (%u, %u, %u), thread (%u, %u, %u)", kernel_name,
                emulate_block.x, emulate_block.y, emulate_block.z, emulate_thread.x,
                emulate_thread.y, emulate_thread.z);
    fprintf(stderr, "\n");
}

void stop(const char *what) {
    say(what);
    _exit(1);
}

static void turn_if_full(Barrier *b) {
    unsigned wanted = b->wanted ? b->wanted : (unsigned)alive;
    if (!b->arrived || b->arrived < wanted) return;
    b->arrived = 0, b->turn++;
}

static unsigned lanes_alive(int w) {
    unsigned mask = 0;
    for (int i = 0; i < 32 && 32 * w + i < block_threads; i++)
        if (!fiber[32 * w + i].done) mask |= 1u << i;
    return mask;
}

static void meet_if_all(Meeting *m, int w) {
    if (!m->arrived || m->arrived != (m->mask & lanes_alive(w))) return;
    m->arrived = 0, m->turn++;
}

// A fiber's thread has returned: who waits for all need no longer wait for it.
static void thread_ends(int i) {
    for (int q = 0; q < QUEUES; q++) commit((Queue)q), finish((Queue)q, 0);
    fiber[i].done = true;
    alive--;
    turn_if_full(&barriers[0]);
    for (int k = i / 32 * 32; k < i / 32 * 32 + 32; k++) meet_if_all(&meeting[k], i / 32);
}

static void fiber_main(void) {
    for (;;) {
        int i = running;
        (*thread_body)();
        thread_ends(i);
        if (!_setjmp(fiber[i].at)) _longjmp(scheduler, 1);
    }
}

static void fiber_begin(int i) {
    ucontext_t context;
    char *stack = (char *)mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) stop("no memory for a thread's stack");
    mprotect(stack, 4096, PROT_NONE);
    getcontext(&context);
    context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = NULL;
    makecontext(&context, fiber_main, 0);
    fiber[i].begun = true;
    setcontext(&context);
}

static void fiber_resume(int i) {
    running = i;
    emulate_thread = fiber[i].index;
    if (!_setjmp(scheduler)) {
        if (fiber[i].begun)
            _longjmp(fiber[i].at, 1);
        else
            fiber_begin(i);
    }
    running = -1;
}

void wait(Waits *waits, const void *what, uint64_t x) {
    Fiber *f = &fiber[running];
    if (!waits(what, x)) return;
    f->waits = waits, f->what = what, f->x = x;
    if (!_setjmp(f->at)) _longjmp(scheduler, 1);
}

static bool same_turn(const void *turn, uint64_t x) { return *(const unsigned *)turn == x; }

void barrier(int id, int threads, bool waits) {
    Barrier *b = &barriers[id];
    unsigned turn = b->turn;
    if (b->arrived && b->wanted != (unsigned)threads)
        stop("a barrier at which different numbers of threads are expected");
    b->wanted = (unsigned)threads, b->arrived++;
    turn_if_full(b);
    if (waits) wait(same_turn, &b->turn, turn);
}

const unsigned char *exchange(unsigned mask, const void *mine, size_t bytes) {
    int w = running / 32, lane = running % 32;
    Meeting *m = &meeting[32 * w + __builtin_ctz(mask)];
    unsigned turn = m->turn;
    if (m->arrived && m->mask != mask) stop("lanes of a warp that name different masks");
    m->mask = mask, m->arrived |= 1u << lane;
    memcpy(m->slots[turn % 2][lane], mine, bytes);
    meet_if_all(m, w);
    wait(same_turn, &m->turn, turn);
    return m->slots[turn % 2][0];
}

void later(Queue queue, std::function<void()> work) {
    if (early && queue != PRODUCT) return work();
    fiber[running].queue[queue].works.push_back(work);
    fiber[running].queue[queue].uncommitted++;
}

void commit(Queue queue) {
    AsyncQueue *q = &fiber[running].queue[queue];
    q->groups.push_back(q->uncommitted);
    q->uncommitted = 0;
}

void finish(Queue queue, size_t groups) {
    AsyncQueue *q = &fiber[running].queue[queue];
    while (q->groups.size() > groups) {
        for (size_t i = q->groups.front(); i > 0; i--) {
            q->works.front()();
            q->works.pop_front();
        }
        q->groups.pop_front();
    }
}

void later_at_barrier(std::function<void()> work) {
    if (early) return work();
    copies.push_back(work);
}

// One turn for each thread that can go on. Returns how many could.
static int turns(void) {
    int went = 0;
    for (int k = 0; k < block_threads; k++) {
        int i = backward ? block_threads - 1 - k : k;
        Fiber *f = &fiber[i];
        if (f->done || (f->waits && f->waits(f->what, f->x))) continue;
        f->waits = NULL;
        fiber_resume(i);
        went++;
    }
    return went;
}

static void run_block(size_t shared_bytes) {
    memset(shared, 0xff, shared_bytes);
    memset(barriers, 0, sizeof barriers);
    for (int i = 0; i < block_threads; i++) meeting[i].arrived = meeting[i].turn = 0;
    alive = block_threads;
    for (int i = 0; i < block_threads; i++) {
        unsigned x = (unsigned)i % emulate_block_dim.x, yz = (unsigned)i / emulate_block_dim.x;
        fiber[i].index = {x, yz % emulate_block_dim.y, yz / emulate_block_dim.y};
        fiber[i].done = false, fiber[i].waits = NULL;
    }
    while (alive) {
        if (turns()) continue;
        if (copies.empty()) {
            for (running = 0; fiber[running].done;) running++;
            emulate_thread = fiber[running].index;
            stop("all threads of a block wait for one another");
        }
        copies.front()();
        copies.pop_front();
    }
    if (!copies.empty()) stop("a block has ended before its copies came");
}

void run_grid(const char *name, dim3 grid, dim3 block, size_t shared_bytes,
              const std::function<void()> &thread) {
    kernel_name = name, thread_body = &thread;
    block_threads = (int)(block.x * block.y * block.z);
    if (!block_threads || block_threads > THREADS || !grid.x || !grid.y || !grid.z ||
        grid.y > 65535 || grid.z > 65535 || shared_bytes > SHARED_BYTES)
        stop("a launch that no GPU can do");
    emulate_block_dim = block, emulate_grid_dim = grid;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                emulate_block = {x, y, z};
                run_block(shared_bytes);
            }
}

static void on_fault(int) {
    say("memory that is not the program's");
    _exit(1);
}

// Before main: what the environment asks for; a stack for the handler, as a fiber's may be full.
__attribute__((constructor)) static void begin(void) {
    static char stack[64 << 10];
    const char *how = getenv("EMULATE");
    early = how && strstr(how, "early"), backward = how && strstr(how, "backward");
    stack_t s = {stack, 0, sizeof stack};
    sigaltstack(&s, NULL);
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_handler = on_fault, a.sa_flags = SA_ONSTACK;
    sigaction(SIGSEGV, &a, NULL), sigaction(SIGBUS, &a, NULL);
}

}  // namespace emulate

// ---------------------------------------------------------------------------------------------
// Streams run their work at once, or, while they are captured, leave it to the graph.

typedef std::vector<std::function<void()>> Works;
static Works *captured;

void emulate::enqueue(cudaStream_t, std::function<void()> work) {
    if (captured)
        captured->push_back(work);
    else
        work();
}

extern "C" {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) {
    *s = (cudaStream_t)malloc(1);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithFlags(s, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return free(s), cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    if (captured) emulate::stop("the host waits for a stream that is captured");
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) { return cudaStreamSynchronize(0); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    captured = new Works;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
    *graph = (cudaGraph_t)captured;
    captured = NULL;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    *exec = (cudaGraphExec_t) new Works(*(Works *)graph);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
    for (const std::function<void()> &work : *(Works *)exec) work();
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete (Works *)graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete (Works *)exec, cudaSuccess; }

// An event is the time at which it was reached.
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    *e = (cudaEvent_t)calloc(1, sizeof(double));
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return free(e), cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t stream) {
    emulate::enqueue(stream, [e] {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        *(double *)e = 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
    });
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    *ms = (float)(*(double *)to - *(double *)from);
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------
// Memory that ends at a page which nobody may touch.

static std::map<void *, std::pair<char *, size_t>> allocated;
static size_t memory_taken;
enum : size_t { PAGE = 4096, MEMORY = (size_t)64 << 30 };

cudaError_t cudaMalloc(void **p, size_t bytes) {
    size_t room = (bytes + 255) / 256 * 256, pages = (room + PAGE - 1) / PAGE * PAGE;
    char *at = (char *)mmap(NULL, pages + PAGE, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED || memory_taken + bytes > MEMORY) return cudaErrorMemoryAllocation;
    mprotect(at + pages, PAGE, PROT_NONE);
    *p = at + pages - room;
    memset(*p, 0xff, room);
    allocated[*p] = {at, pages + PAGE};
    memory_taken += pages;
    return cudaSuccess;
}
cudaError_t cudaFree(void *p) {
    if (!p) return cudaSuccess;
    auto found = allocated.find(p);
    if (found == allocated.end()) emulate::stop("cudaFree: memory that was not allocated");
    munmap(found->second.first, found->second.second);
    memory_taken -= found->second.second - PAGE;
    allocated.erase(found);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
cudaError_t cudaFreeHost(void *p) { return cudaFree(p); }
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) {
    *left = MEMORY - memory_taken, *all = MEMORY;
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
    emulate::enqueue(stream, [=] { memcpy(to, from, bytes); });
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) {
    cudaStreamSynchronize(0);
    memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    emulate::enqueue(stream, [=] { memset(to, value, bytes); });
    return cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t bytes) {
    return cudaMemsetAsync(to, value, bytes, 0);
}

// ---------------------------------------------------------------------------------------------
// The GPU: two SMs, so that grids made for its processors stay small.

enum { PROCESSORS = 2 };

cudaError_t cudaGetDeviceCount(int *count) { return *count = 8, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "emulated GPU");
    p->multiProcessorCount = PROCESSORS, p->totalGlobalMem = MEMORY;
    p->major = 9, p->minor = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int) {
    if (what == cudaDevAttrMultiProcessorCount)
        *value = PROCESSORS;
    else if (what == cudaDevAttrMaxSharedMemoryPerBlockOptin)
        *value = (int)emulate::SHARED_BYTES;
    else
        return cudaErrorInvalidValue;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }  // launches stop the program instead
const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess                 ? "no error"
           : e == cudaErrorMemoryAllocation ? "out of memory"
                                            : "error";
}

// ---------------------------------------------------------------------------------------------
// The driver: maps for the TMA.

static CUresult encode_tiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                             void *data, const cuuint64_t *size, const cuuint64_t *pitch,
                             const cuuint32_t *box, const cuuint32_t *step, CUtensorMapInterleave,
                             CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                             CUtensorMapFloatOOBfill) {
    if (type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || rank != 2 || (size_t)data % 16 ||
        pitch[0] % 16 || box[0] > 64 || box[1] > 256 || step[0] != 1 || step[1] != 1 ||
        swizzle != CU_TENSOR_MAP_SWIZZLE_128B || !size[0] || !size[1])
        return CUDA_ERROR_INVALID_VALUE;
    emulate::TensorMap m = {(unsigned char *)data, size[0], size[1], pitch[0], box[0], box[1]};
    memset(map, 0, sizeof *map);
    memcpy(map, &m, sizeof m);
    return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult *found) {
    bool known = !strcmp(name, "cuTensorMapEncodeTiled");
    *function = known ? (void *)encode_tiled : NULL;
    *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------
// cuBLASLt: d = alpha op(a) op(b) + beta c, column by column, sums in FP32. Of a description only
// what the project sets is kept.

typedef struct {
    int32_t transa, transb;
    const float *a_scale, *b_scale;
} Product;
typedef struct {
    cudaDataType type;
    uint64_t rows, cols;
    int64_t ld, stride;
    int32_t batch;
} Layout;

const char *cublasLtGetStatusString(cublasStatus_t) { return "error"; }
cublasStatus_t cublasLtCreate(cublasLtHandle_t *lt) {
    *lt = (cublasLtHandle_t)malloc(1);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t lt) { return free(lt), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t x, size_t,
                                                 cudaDataType type, uint64_t rows, uint64_t cols,
                                                 int64_t ld) {
    static_assert(sizeof(Layout) <= sizeof(*x));
    Layout l = {type, rows, cols, ld, 0, 1};
    memcpy(x, &l, sizeof l);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t x,
                                                cublasLtMatrixLayoutAttribute_t what,
                                                const void *value, size_t bytes) {
    Layout *l = (Layout *)x;
    if (what == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) memcpy(&l->batch, value, bytes);
    if (what == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET) memcpy(&l->stride, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t p, size_t, cublasComputeType_t,
                                               cudaDataType_t) {
    static_assert(sizeof(Product) <= sizeof(*p));
    memset(p, 0, sizeof(Product));
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t p,
                                              cublasLtMatmulDescAttributes_t what,
                                              const void *value, size_t bytes) {
    Product *x = (Product *)p;
    if (what == CUBLASLT_MATMUL_DESC_TRANSA) memcpy(&x->transa, value, bytes);
    if (what == CUBLASLT_MATMUL_DESC_TRANSB) memcpy(&x->transb, value, bytes);
    if (what == CUBLASLT_MATMUL_DESC_A_SCALE_POINTER) memcpy(&x->a_scale, value, bytes);
    if (what == CUBLASLT_MATMUL_DESC_B_SCALE_POINTER) memcpy(&x->b_scale, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t, size_t) {
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                    cublasLtMatmulPreferenceAttributes_t,
                                                    const void *, size_t) {
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int asked,
                                              cublasLtMatmulHeuristicResult_t *found, int *count) {
    memset(found, 0, (size_t)asked * sizeof *found);
    *count = asked;
    return CUBLAS_STATUS_SUCCESS;
}

static float number_at(const void *p, cudaDataType type, size_t i) {
    if (type == CUDA_R_32F) return ((const float *)p)[i];
    if (type == CUDA_R_16BF) return __bfloat162float(((const __nv_bfloat16 *)p)[i]);
    if (type == CUDA_R_8F_E4M3) return (float)((const __nv_fp8_e4m3 *)p)[i];
    emulate::stop("cublasLtMatmul: a type other than FP32, BF16 and E4M3");
}
static void number_put(void *p, cudaDataType type, size_t i, float x) {
    if (type == CUDA_R_32F)
        ((float *)p)[i] = x;
    else
        ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(x);
}

// op(x) as rows (rows, K) where what is summed over runs along the row.
static std::vector<float> factor(const void *x, const Layout *l, bool rows_are_columns,
                                 size_t batch, size_t *rows, size_t *K) {
    size_t ld = (size_t)l->ld, at = batch * (size_t)l->stride;
    *rows = rows_are_columns ? l->cols : l->rows, *K = rows_are_columns ? l->rows : l->cols;
    std::vector<float> out(*rows * *K);
    for (size_t c = 0; c < l->cols; c++)
        for (size_t r = 0; r < l->rows; r++)
            out[rows_are_columns ? c * *K + r : r * *K + c] =
                number_at(x, l->type, at + c * ld + r);
    return out;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t a_desc, const void *b,
                              cublasLtMatrixLayout_t b_desc, const void *beta, const void *c,
                              cublasLtMatrixLayout_t, void *d, cublasLtMatrixLayout_t d_desc,
                              const cublasLtMatmulAlgo_t *, void *, size_t, cudaStream_t stream) {
    Product p = *(Product *)desc;
    Layout la = *(Layout *)a_desc, lb = *(Layout *)b_desc, ld = *(Layout *)d_desc;
    float by = *(const float *)alpha, add = *(const float *)beta;
    emulate::enqueue(stream, [=] {
        float scale = by * (p.a_scale ? *p.a_scale : 1) * (p.b_scale ? *p.b_scale : 1);
        for (size_t i = 0; i < (size_t)ld.batch; i++) {
            size_t m, n, K, Kb;
            std::vector<float> x = factor(a, &la, p.transa == CUBLAS_OP_T, i, &m, &K);
            std::vector<float> y = factor(b, &lb, p.transb == CUBLAS_OP_N, i, &n, &Kb);
            if (K != Kb || m != ld.rows || n != ld.cols) emulate::stop("cublasLtMatmul: shapes");
            for (size_t q = 0; q < n; q++)
                for (size_t r = 0; r < m; r++) {
                    size_t at = i * (size_t)ld.stride + q * (size_t)ld.ld + r;
                    const float *s = &x[r * K], *t = &y[q * K];
                    float sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (size_t k = 0; k < K; k++) sum += s[k] * t[k];
                    sum *= scale;
                    if (add != 0) sum += add * number_at(c, ld.type, at);
                    number_put(d, ld.type, at, sum);
                }
        }
    });
    return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"
