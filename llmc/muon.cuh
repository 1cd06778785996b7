// muon.cuh: Muon (Jordan 2024) on all matrices at once. For a matrix w (R, K) with gradient G:
//
//     1. buf = mu buf + (1-mu) G,   X = (1-mu) G + mu buf             momentum, Nesterov's way
//     2. X[r] *= (||X|| / sqrt(R)) / max(||X[r]||, 1e-6)              rows made even (2603.28254)
//     3. X /= 1.01 ||X|| + 1e-6, then five steps of Polar Express (2505.16932), which draw the
//        singular values towards 1, each with its own a, b, c:
//            R <= K:  A = X X^T,  X = a X + (b A + c A^2) X
//            R >  K:  A = X^T X,  X = a X + X (b A + c A^2)
//     4. X *= sqrt(min(R, K)) / max(||X||, 1e-6)                      norm restored (2602.21545)
//     5. v = mean square of each row (R >= K) or column of X, n its length,
//        s = b2 s + (1-b2) v,  r = 1/sqrt(max(s, 1e-10)),
//        X *= r sqrt(n sum v) / max(sqrt(n sum v r^2), 1e-10)         evened by s (2510.05491)
//     6. w -= lr X + lr wd w [X w >= 0],  lr times sqrt(max(1, R/K))  cautious decay
//
// Matrices of one shape go through every kernel together, as many at once as the scratch holds: X
// twice, A and b A + c A^2, all floatX. The products are batched GEMMs, summed in FP32; in the BF16
// build X, A and b A + c A^2 are each rounded once when made. All else is FP32, and sums over whole
// matrices double. Steps 2 and 3, and 4 and 5, fold into one factor for each row or column of X, so
// that beside the products an element moves (BF16)
//
//     momentum   reads G, buf; writes buf                  12 bytes
//     scale      reads G, buf; writes X                    10
//     squares    reads X                                    2
//     apply      reads X, w; writes w, its working copy    12
//
// The value gates (H, 12) are too narrow for GEMMs: llmc/muon_gate.cuh does those. A gradient of 0
// gives X = 0, and only decay moves w. Where step->skip is set, nothing but scratch is written.
#ifndef LLMC_MUON_CUH
#define LLMC_MUON_CUH

#include <assert.h>
#include <math.h>
#include <string.h>

#include "llmc/matmul.cuh"     // Matmul, matmul_square, matmul_batched
#include "llmc/model.h"        // Tensor, GROUP_MATRIX
#include "llmc/muon_gate.cuh"  // muon_gate_update; muon_polar, muon_nesterov, ...
#include "llmc/shard.h"        // ShardPlan, Piece, shard_next
#include "llmc/step.cuh"       // StepState
#include "llmc/vec.cuh"        // vec_load, vec_store, block_sum

enum {
    MUON_SHAPES = 4,         // (C, C), (F, C), (C, F), (H, 12)
    MUON_SCRATCH = 1 << 30,  // bytes, unless a single matrix needs more
    MUON_THREADS = 256,      // of a kernel that takes a row a warp
    MUON_ROWS = MUON_THREADS / WARP,
    MUON_LINE_THREADS = 512,    // of a kernel that takes a matrix a block
    MUON_COLUMN_THREADS = 128,  // each takes VEC columns of a segment
    MUON_SEGMENT = 64,          // rows whose squares one thread adds up
};

// The matrices of one shape, and the scratch of a chunk of them. All pointers are to the device.
typedef struct {
    int R, K;
    bool gate;           // the whole matrix by one block
    float lr_scale;      // sqrt(max(1, R/K))
    int count, batch;    // matrices; those of a chunk
    int lines;           // max(R, K): rows where R >= K, else columns
    int segments;        // in which the squares of a line are added up
    MuonMatrix *matrix;  // (count), in the table's order
    floatX *x, *next;    // (batch, R, K)
    floatX *a, *poly;    // (batch, side, side), side = min(R, K): A, b A + c A^2
    double *squares;     // (batch, R): of rows; then (batch, segments, lines)
    float *factor;       // (batch, R): what step 2 and 3 scale; then (batch, lines): 4 and 5
} MuonShape;

typedef struct {
    int shapes;
    MuonShape shape[MUON_SHAPES];
    void *memory;
} Muon;

// ---------------------------------------------------------------------------------------------
// Kernels of a chunk of matrices (R, K). A warp takes a row; row counts on through the chunk.

// This warp's row, and where it begins in the arenas.
__device__ __forceinline__ int muon_row(void) {
    return (int)blockIdx.x * MUON_ROWS + (int)threadIdx.x / WARP;
}
__device__ __forceinline__ size_t muon_row_offset(const MuonMatrix *matrix, int row, int R, int K) {
    return matrix[row / R].offset + (size_t)(row % R) * K;
}

// Step 1: buf, and the squares of each row of X.
[[maybe_unused]] static __global__ void __launch_bounds__(MUON_THREADS)
    muon_momentum_kernel(double *squares,     // (rows)
                         float *first,        // arena: buf
                         const float *grads,  // arena
                         const MuonMatrix *matrix, const StepState *step, int rows, int R, int K) {
    int row = muon_row(), lane = (int)threadIdx.x % WARP;
    if (row >= rows || step->skip) return;
    size_t at = muon_row_offset(matrix, row, R, K);
    float mu = step->momentum, scale = step->grad_scale;
    double sum = 0;
    for (int k = VEC * lane; k < K; k += VEC * WARP) {
        float g[VEC], buf[VEC];
        vec_load(g, grads + at + k), vec_load(buf, first + at + k);
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            buf[j] = mu * buf[j] + (1 - mu) * (scale * g[j]);
            double x = muon_nesterov(scale * g[j], buf[j], mu);
            sum += x * x;
        }
        vec_store(first + at + k, buf);
    }
    sum = warp_sum(sum);
    if (lane == 0) squares[row] = sum;
}

// One block a matrix: what steps 2 and 3 multiply its rows by.
[[maybe_unused]] static __global__ void __launch_bounds__(MUON_LINE_THREADS)
    muon_row_factors_kernel(float *factor,          // (batch, R)
                            const double *squares,  // (batch, R)
                            const StepState *step, int R) {
    if (step->skip) return;
    factor += (size_t)blockIdx.x * R, squares += (size_t)blockIdx.x * R;
    double all = 0, even = 0;  // squares of X before and after step 2
    for (int r = (int)threadIdx.x; r < R; r += MUON_LINE_THREADS) all += squares[r];
    double rms = sqrt(block_sum<MUON_LINE_THREADS>(all) / R);
    for (int r = (int)threadIdx.x; r < R; r += MUON_LINE_THREADS) {
        double f = muon_even(rms, squares[r]);
        even += f * f * squares[r];
    }
    double shrink = muon_shrink(block_sum<MUON_LINE_THREADS>(even));
    for (int r = (int)threadIdx.x; r < R; r += MUON_LINE_THREADS)
        factor[r] = (float)(shrink * muon_even(rms, squares[r]));
}

// X after steps 1, 2 and the division of step 3.
[[maybe_unused]] static __global__ void __launch_bounds__(MUON_THREADS)
    muon_scale_kernel(floatX *x,            // (rows, K)
                      const float *factor,  // (rows)
                      const float *first,   // arena: buf
                      const float *grads,   // arena
                      const MuonMatrix *matrix, const StepState *step, int rows, int R, int K) {
    int row = muon_row(), lane = (int)threadIdx.x % WARP;
    if (row >= rows || step->skip) return;
    size_t at = muon_row_offset(matrix, row, R, K);
    float mu = step->momentum, scale = step->grad_scale, f = factor[row];
    for (int k = VEC * lane; k < K; k += VEC * WARP) {
        float g[VEC], buf[VEC];
        vec_load(g, grads + at + k), vec_load(buf, first + at + k);
#pragma unroll
        for (int j = 0; j < VEC; j++) g[j] = f * muon_nesterov(scale * g[j], buf[j], mu);
        vec_store(x + (size_t)row * K + k, g);
    }
}

// The squares of each row of X.
[[maybe_unused]] static __global__ void __launch_bounds__(MUON_THREADS)
    muon_row_squares_kernel(double *squares,  // (rows)
                            const floatX *x,  // (rows, K)
                            const StepState *step, int rows, int K) {
    int row = muon_row(), lane = (int)threadIdx.x % WARP;
    if (row >= rows || step->skip) return;
    float sum = 0;
    for (int k = VEC * lane; k < K; k += VEC * WARP) {
        float xk[VEC];
        vec_load(xk, x + (size_t)row * K + k);
#pragma unroll
        for (int j = 0; j < VEC; j++) sum += xk[j] * xk[j];
    }
    sum = warp_sum(sum);
    if (lane == 0) squares[row] = sum;
}

// The squares of each column of X, a sum for each segment of rows. Blocks are (columns, segments,
// batch).
[[maybe_unused]] static __global__ void __launch_bounds__(MUON_COLUMN_THREADS)
    muon_column_squares_kernel(double *squares,  // (batch, segments, K)
                               const floatX *x,  // (batch, R, K)
                               const StepState *step, int R, int K) {
    int k = VEC * (int)(blockIdx.x * MUON_COLUMN_THREADS + threadIdx.x);
    if (k >= K || step->skip) return;
    int from = (int)blockIdx.y * MUON_SEGMENT, to = min(from + (int)MUON_SEGMENT, R);
    float sum[VEC] = {0};
    x += (size_t)blockIdx.z * R * K + k;
#pragma unroll 8
    for (int r = from; r < to; r++) {
        float xr[VEC];
        vec_load(xr, x + (size_t)r * K);
#pragma unroll
        for (int j = 0; j < VEC; j++) sum[j] += xr[j] * xr[j];
    }
    squares += ((size_t)blockIdx.z * gridDim.y + blockIdx.y) * K + k;
#pragma unroll
    for (int j = 0; j < VEC; j++) squares[j] = sum[j];
}

// One block a matrix: s, and what steps 4 and 5 multiply its lines by. A line is n elements long.
[[maybe_unused]] static __global__ void __launch_bounds__(MUON_LINE_THREADS)
    muon_line_factors_kernel(float *factor,    // (batch, lines)
                             double *squares,  // (batch, segments, lines): to the first segment's
                                               // numbers the others are added
                             float *second,    // arena: s
                             const MuonMatrix *matrix, const StepState *step, int segments,
                             int lines, int n) {
    if (step->skip) return;
    factor += (size_t)blockIdx.x * lines, squares += (size_t)blockIdx.x * segments * lines;
    second += matrix[blockIdx.x].state;
    double all = 0, sum_v = 0, sum_vr2 = 0;
    for (int i = (int)threadIdx.x; i < lines; i += MUON_LINE_THREADS) {
        double sum = 0;
        for (int j = 0; j < segments; j++) sum += squares[(size_t)j * lines + i];
        squares[i] = sum, all += sum;
    }
    double restore = muon_restore(block_sum<MUON_LINE_THREADS>(all), n);
    for (int i = (int)threadIdx.x; i < lines; i += MUON_LINE_THREADS) {
        double v = restore * restore * squares[i] / n, r2 = muon_second(second + i, v, step->beta2);
        sum_v += v, sum_vr2 += v * r2;
        squares[i] = r2;
    }
    sum_v = block_sum<MUON_LINE_THREADS>(sum_v), sum_vr2 = block_sum<MUON_LINE_THREADS>(sum_vr2);
    double keep = restore * sqrt(n * sum_v) / fmax(sqrt(n * sum_vr2), 1e-10);
    for (int i = (int)threadIdx.x; i < lines; i += MUON_LINE_THREADS)
        factor[i] = (float)(keep * sqrt(squares[i]));
}

// Step 6, with the factors of steps 4 and 5.
[[maybe_unused]] static __global__ void __launch_bounds__(MUON_THREADS)
    muon_apply_kernel(float *params,        // arena
                      floatX *weights,      // arena or NULL
                      const floatX *x,      // (rows, K)
                      const float *factor,  // (rows) where R >= K, else (batch, K)
                      const MuonMatrix *matrix, const StepState *step, float lr_scale, int rows,
                      int R, int K) {
    int row = muon_row(), lane = (int)threadIdx.x % WARP;
    if (row >= rows || step->skip) return;
    size_t at = muon_row_offset(matrix, row, R, K);
    float lr = step->lr * lr_scale, decay = lr * step->wd;
    if (weights) weights += matrix[row / R].weight + (size_t)(row % R) * K;
    for (int k = VEC * lane; k < K; k += VEC * WARP) {
        float xk[VEC], w[VEC], f[VEC];
        vec_load(xk, x + (size_t)row * K + k), vec_load(w, params + at + k);
        if (R < K) vec_load(f, factor + (size_t)(row / R) * K + k);
#pragma unroll
        for (int j = 0; j < VEC; j++)
            w[j] = muon_apply(w[j], (R < K ? f[j] : factor[row]) * xk[j], lr, decay);
        vec_store(params + at + k, w);
        if (weights) vec_store(weights + k, w);
    }
}

// ---------------------------------------------------------------------------------------------
// Memory.

static inline MuonShape *muon_shape_of(Muon *m, const Tensor *x) {
    int i = 0;
    while (i < m->shapes && (m->shape[i].R != x->rows || m->shape[i].K != x->cols)) i++;
    assert(i < MUON_SHAPES);
    MuonShape *s = &m->shape[i];
    if (i == m->shapes) m->shapes++;
    s->R = x->rows, s->K = x->cols, s->gate = x->role == VE_GATE;
    s->lr_scale = (float)sqrt(fmax(1, (double)s->R / s->K));
    return s;
}

// A place of `bytes` in the memory from `memory` on; NULL: only counts.
static inline void *muon_place(char *memory, size_t *at, size_t bytes) {
    size_t from = *at;
    *at += (bytes + 255) / 256 * 256;
    return memory ? memory + from : NULL;
}

// The scratch of as many matrices of a shape as `scratch` bytes hold, chunks of about equal size.
static inline size_t muon_shape_layout(MuonShape *s, size_t scratch, char *memory) {
    size_t R = (size_t)s->R, K = (size_t)s->K, side = R < K ? R : K, at = 0;
    s->lines = s->R > s->K ? s->R : s->K;
    s->segments = s->R < s->K ? ceil_div(s->R, (int)MUON_SEGMENT) : 1;
    size_t lines = (size_t)s->lines, sums = (size_t)s->segments * lines;
    size_t one =
        2 * sizeof(floatX) * (R * K + side * side) + sizeof(double) * sums + sizeof(float) * lines;
    size_t most = scratch / one ? scratch / one : 1;
    int chunks = (int)ceil_div((size_t)s->count, most);
    s->batch = ceil_div(s->count, chunks);
    size_t batch = (size_t)s->batch;
    s->x = (floatX *)muon_place(memory, &at, sizeof(floatX) * batch * R * K);
    s->next = (floatX *)muon_place(memory, &at, sizeof(floatX) * batch * R * K);
    s->a = (floatX *)muon_place(memory, &at, sizeof(floatX) * batch * side * side);
    s->poly = (floatX *)muon_place(memory, &at, sizeof(floatX) * batch * side * side);
    s->squares = (double *)muon_place(memory, &at, sizeof(double) * batch * sums);
    s->factor = (float *)muon_place(memory, &at, sizeof(float) * batch * lines);
    return at;
}

// Lays everything out from `memory` on; the shapes share the scratch. Returns the bytes; memory
// NULL: only counts.
static inline size_t muon_layout(Muon *m, const ShardPlan *plan, size_t scratch, char *memory) {
    memset(m, 0, sizeof *m);
    for (int i = shard_next(plan, 0); i < plan->count; i = shard_next(plan, i + 1)) {
        const Tensor *x = plan->piece[i].tensor;
        if (x->group == GROUP_MATRIX) muon_shape_of(m, x)->count++;
    }
    size_t at = 0, largest = 0;
    for (int i = 0; i < m->shapes; i++) {
        MuonShape *s = &m->shape[i];
        s->matrix = (MuonMatrix *)muon_place(memory, &at, (size_t)s->count * sizeof(MuonMatrix));
    }
    for (int i = 0; i < m->shapes; i++) {
        if (m->shape[i].gate) continue;
        size_t bytes = muon_shape_layout(&m->shape[i], scratch, memory ? memory + at : NULL);
        if (bytes > largest) largest = bytes;
    }
    return at + largest;
}

// Bytes that muon_init will take.
static inline size_t muon_bytes(const ShardPlan *plan, size_t scratch) {
    Muon m;
    return muon_layout(&m, plan, scratch, NULL);
}

// For the matrices that this rank owns, in chunks that need `scratch` bytes (MUON_SCRATCH), or one.
// The scratch begins as NaN, so that what is read before it is written shows.
static inline void muon_init(Muon *m, Gpu *g, const ShardPlan *plan, size_t scratch) {
    size_t bytes = muon_bytes(plan, scratch);
    char *memory = (char *)gpu_alloc(g, bytes, "Muon's scratch");
    CUDA_CHECK(cudaMemset(memory, 0xff, bytes));
    muon_layout(m, plan, scratch, memory);
    m->memory = memory;
    for (int i = 0; i < m->shapes; i++) {
        MuonShape *s = &m->shape[i];
        MuonMatrix *matrix =
            (MuonMatrix *)die_alloc((size_t)s->count, sizeof *matrix, "the list of matrices");
        int count = 0;
        for (int j = shard_next(plan, 0); j < plan->count; j = shard_next(plan, j + 1)) {
            const Piece *p = &plan->piece[j];
            if (p->tensor->group == GROUP_MATRIX && muon_shape_of(m, p->tensor) == s)
                matrix[count++] = MuonMatrix{p->at, p->offset, p->state};
        }
        CUDA_CHECK(
            cudaMemcpy(s->matrix, matrix, (size_t)count * sizeof *matrix, cudaMemcpyHostToDevice));
        free(matrix);
        if (s->gate) muon_gate_init(s->R, s->K);
    }
}

static inline void muon_free(Muon *m) {
    CUDA_CHECK(cudaFree(m->memory));
    m->memory = NULL;
}

// ---------------------------------------------------------------------------------------------
// The update.

// FLOPs of the products of an update.
static inline double muon_flops(const Muon *m) {
    double flops = 0;
    for (int i = 0; i < m->shapes; i++) {
        const MuonShape *s = &m->shape[i];
        double side = fmin(s->R, s->K), lines = fmax(s->R, s->K);
        if (!s->gate) flops += MUON_POLAR_STEPS * s->count * side * side * (4 * lines + 2 * side);
    }
    return flops;
}

// Bytes that an update must move: those of the passes over each element, as at the top, and those
// of the products: X; A; A, A's polynomial; that, X, the new X.
static inline double muon_traffic(const Muon *m) {
    const double X = sizeof(floatX), copy = X < 4 ? X : 0;
    double bytes = 0;
    for (int i = 0; i < m->shapes; i++) {
        const MuonShape *s = &m->shape[i];
        double side = fmin(s->R, s->K), all = (double)s->R * s->K;
        double passes = s->gate ? 20 + copy : 12 + (8 + X) + X + (X + 8 + copy);
        double products = s->gate ? 0 : X * (int)MUON_POLAR_STEPS * (3 * all + 4 * side * side);
        bytes += s->count * (passes * all + products);
    }
    return bytes;
}

// Steps 1, 2 and the division of step 3, on matrices from .. from + batch - 1 of a shape: buf and
// s->x.
static inline void muon_begin(const MuonShape *s, MuonArenas arena, const StepState *step, int from,
                              int batch, cudaStream_t stream) {
    const MuonMatrix *matrix = s->matrix + from;
    int R = s->R, K = s->K, rows = batch * R, blocks = ceil_div(rows, (int)MUON_ROWS);
    muon_momentum_kernel<<<blocks, MUON_THREADS, 0, stream>>>(s->squares, arena.first, arena.grads,
                                                              matrix, step, rows, R, K);
    CUDA_LAUNCHED();
    muon_row_factors_kernel<<<batch, MUON_LINE_THREADS, 0, stream>>>(s->factor, s->squares, step,
                                                                     R);
    CUDA_LAUNCHED();
    muon_scale_kernel<<<blocks, MUON_THREADS, 0, stream>>>(s->x, s->factor, arena.first,
                                                           arena.grads, matrix, step, rows, R, K);
    CUDA_LAUNCHED();
}

// The rest of step 3: from s->x to what is returned, s->x or s->next.
static inline const floatX *muon_polar_express(const MuonShape *s, Matmul *m, int batch,
                                               cudaStream_t stream) {
    int R = s->R, K = s->K, side = R < K ? R : K;
    floatX *x = s->x, *next = s->next;
    for (int i = 0; i < MUON_POLAR_STEPS; i++) {
        MuonPolar p = muon_polar(i);
        matmul_square(m, s->a, x, R > K, NULL, 1, 0, side, s->lines, batch, stream);
        matmul_square(m, s->poly, s->a, false, s->a, p.c, p.b, side, side, batch, stream);
        if (R <= K)
            matmul_batched(m, next, s->poly, false, x, false, x, 1, p.a, R, K, R, batch, stream);
        else
            matmul_batched(m, next, x, false, s->poly, false, x, 1, p.a, R, K, K, batch, stream);
        floatX *last = x;
        x = next, next = last;
    }
    return x;
}

// Steps 4 to 6: s, w and its working copy.
static inline void muon_end(const MuonShape *s, const floatX *x /* (batch, R, K) */,
                            MuonArenas arena, const StepState *step, int from, int batch,
                            cudaStream_t stream) {
    const MuonMatrix *matrix = s->matrix + from;
    int R = s->R, K = s->K, rows = batch * R, blocks = ceil_div(rows, (int)MUON_ROWS);
    if (R >= K) {
        muon_row_squares_kernel<<<blocks, MUON_THREADS, 0, stream>>>(s->squares, x, step, rows, K);
    } else {
        dim3 grid(ceil_div(K, VEC * MUON_COLUMN_THREADS), s->segments, batch);
        muon_column_squares_kernel<<<grid, MUON_COLUMN_THREADS, 0, stream>>>(s->squares, x, step, R,
                                                                             K);
    }
    CUDA_LAUNCHED();
    muon_line_factors_kernel<<<batch, MUON_LINE_THREADS, 0, stream>>>(
        s->factor, s->squares, arena.second, matrix, step, s->segments, s->lines, R < K ? R : K);
    CUDA_LAUNCHED();
    muon_apply_kernel<<<blocks, MUON_THREADS, 0, stream>>>(
        arena.params, arena.weights, x, s->factor, matrix, step, s->lr_scale, rows, R, K);
    CUDA_LAUNCHED();
}

// Updates every matrix that this rank owns. Nothing in the arenas changes where step->skip is set.
static inline void muon_update(Muon *m, Matmul *matmul,
                               float *params,       // (numel of the rank)
                               floatX *weights,     // (table.numel), NULL where params serve
                               const float *grads,  // (numel of the rank)
                               float *first,        // (numel of the rank): momentum
                               float *second,       // (state_numel of the rank)
                               const StepState *step, cudaStream_t stream) {
    MuonArenas arena = {params, weights, grads, first, second};
    for (int i = 0; i < m->shapes; i++) {
        const MuonShape *s = &m->shape[i];
        if (s->gate) {
            muon_gate_update(arena, s->matrix, step, s->lr_scale, s->R, s->K, s->count, stream);
            continue;
        }
        for (int from = 0; from < s->count; from += s->batch) {
            int batch = s->count - from < s->batch ? s->count - from : s->batch;
            muon_begin(s, arena, step, from, batch, stream);
            muon_end(s, muon_polar_express(s, matmul, batch, stream), arena, step, from, batch,
                     stream);
        }
    }
}

#endif
