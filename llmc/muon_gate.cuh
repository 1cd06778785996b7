// muon_gate.cuh: the formulas of Muon's steps 1 to 6 (llmc/muon.cuh states them), and all of it for
// matrices so narrow that one block holds one: the value gates (H, 12).
//
// w, G, buf, X (R, K), min(R, K) <= 12; s (max(R, K)). X lies in shared memory twice, A and
// b A + c A^2 (side, side) beside it, side = min(R, K): 3.4 KB for 24 heads. Everything is FP32 in
// both builds, squares are added in double. Here a thread takes an element or a line, a step at a
// time; llmc/muon.cuh does the same to large matrices.
#ifndef LLMC_MUON_GATE_CUH
#define LLMC_MUON_GATE_CUH

#include "llmc/step.cuh"  // StepState
#include "llmc/vec.cuh"   // from_float, block_sum

// Where a matrix lies.
typedef struct {
    size_t offset;  // of the matrix in the arenas of parameters, gradients and momentum
    size_t weight;  // in that of working copies
    size_t state;   // of its s in the arena of second states
} MuonMatrix;

// The arenas, laid out by the plan of ranks; that of working copies by the table.
typedef struct {
    float *params;
    floatX *weights;  // working copies, or NULL where the parameters serve
    const float *grads;
    float *first, *second;
} MuonArenas;

// Coefficients of step i = 0 .. 4 of Polar Express.
typedef struct {
    float a, b, c;
} MuonPolar;

enum { MUON_POLAR_STEPS = 5, MUON_GATE_THREADS = 256 };

__host__ __device__ constexpr MuonPolar muon_polar(int i) {
    constexpr MuonPolar steps[MUON_POLAR_STEPS] = {
        {8.156554524902461f, -22.48329292557795f, 15.878769915207462f},
        {4.042929935166739f, -2.808917465908714f, 0.5000178451051316f},
        {3.8916678022926607f, -2.772484153217685f, 0.5060648178503393f},
        {3.285753657755655f, -2.3681294933425376f, 0.46449024233003106f},
        {2.3465413258596377f, -1.7097828382687081f, 0.42323551169305323f},
    };
    return steps[i];
}

// ---------------------------------------------------------------------------------------------
// The steps' formulas.

__device__ __forceinline__ float muon_nesterov(float g, float buf, float mu) {
    return (1 - mu) * g + mu * buf;
}

// What evens a row out; rms: of the rows' norms.
__device__ __forceinline__ double muon_even(double rms, double row_squares) {
    return rms / fmax(sqrt(row_squares), 1e-6);
}

__device__ __forceinline__ double muon_shrink(double squares) {
    return 1 / (1.01 * sqrt(squares) + 1e-6);
}

__device__ __forceinline__ double muon_restore(double squares, int side) {
    return sqrt((double)side) / fmax(sqrt(squares), 1e-6);
}

// Moves s towards v; returns r^2.
__device__ __forceinline__ double muon_second(float *s, double v, double beta2) {
    *s = (float)(beta2 * *s + (1 - beta2) * v);
    return 1 / fmax((double)*s, 1e-10);
}

__device__ __forceinline__ float muon_apply(float w, float x, float lr, float decay) {
    return w - (lr * x + (x * w >= 0 ? decay * w : 0));
}

// ---------------------------------------------------------------------------------------------
// One block does all of a matrix. Where R >= K a line is a row, else a column: X is (lines, side),
// and element j of line i is x[i line + j along].

__device__ __forceinline__ double muon_squares(const float *x, int stride, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)x[i * stride] * x[i * stride];
    return sum;
}

// Step 3 after the division. A = X^T X with X seen as (lines, side); poly: b A + c A^2. Returns
// where X ends up: x or next.
__device__ __forceinline__ float *muon_gate_polar(float *x, float *next,  // (lines, side)
                                                  float *a, float *poly,  // (side, side)
                                                  int lines, int side, int line, int along) {
    for (int step = 0; step < MUON_POLAR_STEPS; step++) {
        MuonPolar p = muon_polar(step);
        __syncthreads();
        for (int e = (int)threadIdx.x; e < side * side; e += MUON_GATE_THREADS) {
            float sum = 0;
            for (int i = 0; i < lines; i++)
                sum += x[i * line + e / side * along] * x[i * line + e % side * along];
            a[e] = sum;
        }
        __syncthreads();
        for (int e = (int)threadIdx.x; e < side * side; e += MUON_GATE_THREADS) {
            float sum = 0;
            for (int j = 0; j < side; j++) sum += a[e / side * side + j] * a[j * side + e % side];
            poly[e] = p.b * a[e] + p.c * sum;
        }
        __syncthreads();
        for (int e = (int)threadIdx.x; e < lines * side; e += MUON_GATE_THREADS) {
            int i = e / side, j = e % side;
            float sum = 0;
            for (int k = 0; k < side; k++) sum += x[i * line + k * along] * poly[k * side + j];
            next[i * line + j * along] = p.a * x[i * line + j * along] + sum;
        }
        float *last = x;
        x = next, next = last;
    }
    __syncthreads();
    return x;
}

[[maybe_unused]] static __global__ void __launch_bounds__(MUON_GATE_THREADS)
    muon_gate_kernel(MuonArenas arena, const MuonMatrix *matrix, const StepState *step,
                     float lr_scale, int R, int K) {
    extern __shared__ float muon_shared[];
    if (step->skip) return;
    int lines = max(R, K), side = min(R, K), thread = (int)threadIdx.x;
    int line = R >= K ? K : 1, along = R >= K ? 1 : K;
    float *x = muon_shared, *next = x + R * K, *a = next + R * K, *poly = a + side * side;
    const float *g = arena.grads + matrix[blockIdx.x].offset;
    float *buf = arena.first + matrix[blockIdx.x].offset;
    float *second = arena.second + matrix[blockIdx.x].state;
    float mu = step->momentum, scale = step->grad_scale;

    // 1 to 3: momentum, rows made even, Polar Express
    for (int e = thread; e < R * K; e += MUON_GATE_THREADS) {
        buf[e] = mu * buf[e] + (1 - mu) * (scale * g[e]);
        x[e] = muon_nesterov(scale * g[e], buf[e], mu);
    }
    __syncthreads();
    double all = 0, even = 0;
    for (int r = thread; r < R; r += MUON_GATE_THREADS) all += muon_squares(x + r * K, 1, K);
    double rms = sqrt(block_sum<MUON_GATE_THREADS>(all) / R);
    for (int r = thread; r < R; r += MUON_GATE_THREADS) {
        double f = muon_even(rms, muon_squares(x + r * K, 1, K));
        for (int k = 0; k < K; k++) x[r * K + k] = (float)(f * x[r * K + k]);
        even += muon_squares(x + r * K, 1, K);
    }
    double shrink = muon_shrink(block_sum<MUON_GATE_THREADS>(even));
    for (int e = thread; e < R * K; e += MUON_GATE_THREADS) x[e] = (float)(shrink * x[e]);
    x = muon_gate_polar(x, next, a, poly, lines, side, line, along);

    // 4 to 6: norm restored, lines evened, applied
    double sum_v = 0, sum_vr2 = 0;
    all = 0;
    for (int i = thread; i < lines; i += MUON_GATE_THREADS)
        all += muon_squares(x + i * line, along, side);
    double restore = muon_restore(block_sum<MUON_GATE_THREADS>(all), side);
    for (int i = thread; i < lines; i += MUON_GATE_THREADS) {
        double v = restore * restore * muon_squares(x + i * line, along, side) / side;
        double r2 = muon_second(second + i, v, step->beta2);
        sum_v += v, sum_vr2 += v * r2;
    }
    sum_v = block_sum<MUON_GATE_THREADS>(sum_v), sum_vr2 = block_sum<MUON_GATE_THREADS>(sum_vr2);
    double keep = restore * sqrt(side * sum_v) / fmax(sqrt(side * sum_vr2), 1e-10);
    float lr = step->lr * lr_scale, decay = lr * step->wd;
    for (int e = thread; e < R * K; e += MUON_GATE_THREADS) {
        float f = (float)(keep / sqrt(fmax((double)second[R >= K ? e / K : e % K], 1e-10)));
        size_t at = matrix[blockIdx.x].offset + e, weight = matrix[blockIdx.x].weight + e;
        float w = muon_apply(arena.params[at], f * x[e], lr, decay);
        arena.params[at] = w;
        if (arena.weights) arena.weights[weight] = from_float<floatX>(w);
    }
}

// ---------------------------------------------------------------------------------------------
// Launchers.

static inline size_t muon_gate_shared(int R, int K) {
    size_t side = (size_t)(R < K ? R : K);
    return sizeof(float) * 2 * ((size_t)R * (size_t)K + side * side);
}

// Once, before the first update: hundreds of heads need more shared memory than a kernel is given
// unasked.
static inline void muon_gate_init(int R, int K) {
    CUDA_CHECK(cudaFuncSetAttribute(muon_gate_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)muon_gate_shared(R, K)));
}

static inline void muon_gate_update(MuonArenas arena, const MuonMatrix *matrix,  // (count)
                                    const StepState *step, float lr_scale, int R, int K, int count,
                                    cudaStream_t stream) {
    muon_gate_kernel<<<(unsigned)count, MUON_GATE_THREADS, muon_gate_shared(R, K), stream>>>(
        arena, matrix, step, lr_scale, R, K);
    CUDA_LAUNCHED();
}

#endif
