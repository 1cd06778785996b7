// classifier.cu: a ladder. Capped logits, their cross entropy and its gradient, in their place:
//
//     z = 15 tanh(a / 15),   loss = log sum_v e^z_v - z_target
//     da_v = scale (softmax(z)_v - [v = target]) (1 - (z_v / 15)^2)
//
// a is (rows, Vp) in BF16, of which the columns from V on are padding: their gradient is 0. losses
// and targets are (rows). `make ladder OP=classifier` checks and times every rung. The ladder to
// read before this one is dev/cuda/rmsnorm.cu.
//
//     rung  what it changes, and why that is faster                     us     GB/s of top times v1
//     v1    nothing yet: the CPU's loops; a thread takes a row      26,155       63     2%      1.0
//     v2    512 threads take a row: neighbours are read together     2,631      626    15%      9.9
//     v3    |z| <= 15: no maximum to find, and no tanh               1,085    1,519    36%       24
//     v4    16 bytes a load, 4 loads on their way                      692    2,381    56%       38
//     llmc  the row, and what is found of it: in shared memory         448    3,681    87%       58
//
// (H200; rows 8192, V 50257, Vp 50304. GB/s: of the 4 Vp bytes a row that must move.)
//
// The least that must move is each logit once in and its gradient once out: 8192 * 50304 * 4 bytes
// at 4.23 TB/s are 390 us. But here, unlike in the norm, arithmetic counts. An SM makes 128 sums or
// products a clock, but only 16 results of 2^x or 1/x, in its special units. In the time in which
// memory moves a logit in and out, all 132 SMs together make 3.5 of these and 28 of those. By their
// machine code v2 wants 9 special results a logit and 165 other instructions, v3 wants 6 and 26, v4
// 6 and 17, llmc 3 and 12.
#include "dev/cuda/ladder.cuh"  // Rung, ladder_check, ladder_time
#include "llmc/classifier.cuh"  // classifier, cap_q, cap_exp, LOGIT_CAP

typedef void Classifier(floatX *logits,      // (rows, Vp), a in, da out
                        float *losses,       // (rows)
                        const int *targets,  // (rows)
                        float scale, int rows, int V, int Vp, cudaStream_t stream);

// ---------------------------------------------------------------------------------------------
// v1: a thread takes a row, as on the CPU. A softmax of any numbers first takes away their maximum,
// so that no e^x overflows. So there are three passes: maximum, sum, gradient; and as z is stored
// nowhere, each makes it anew. 8192 rows are 62 threads an SM, which could hold 2048, and each lane
// of a warp reads from another row, as in rmsnorm.cu's v1.

__device__ __forceinline__ float cap(float a) { return LOGIT_CAP * tanhf(a / LOGIT_CAP); }

// The gradient of a logit that became z: max and sum are those of its row.
__device__ __forceinline__ float gradient(float z, float max, float sum, bool target, float scale) {
    float p = expf(z - max) / sum, slope = 1 - z * z / (LOGIT_CAP * LOGIT_CAP);
    return scale * (target ? p - 1 : p) * slope;
}

static __global__ void classifier_v1_kernel(floatX *logits, float *losses, const int *targets,
                                            float scale, int rows, int V, int Vp) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= rows) return;
    floatX *row = logits + (size_t)t * Vp;
    float max = -INFINITY, sum = 0;
    for (int v = 0; v < V; v++) max = fmaxf(max, cap(to_float(row[v])));
    for (int v = 0; v < V; v++) sum += expf(cap(to_float(row[v])) - max);
    losses[t] = logf(sum) + max - cap(to_float(row[targets[t]]));
    for (int v = 0; v < Vp; v++) {
        float d = v < V ? gradient(cap(to_float(row[v])), max, sum, v == targets[t], scale) : 0;
        row[v] = from_float<floatX>(d);
    }
}

static void classifier_v1(floatX *logits, float *losses, const int *targets, float scale, int rows,
                          int V, int Vp, cudaStream_t stream) {
    classifier_v1_kernel<<<ceil_div(rows, 64), 64, 0, stream>>>(logits, losses, targets, scale,
                                                                rows, V, Vp);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// v2: a block of 512 threads takes a row; there are 8192 of them, and an SM works on several. Warps
// read 32 neighbours. A maximum or a sum is now spread over 16 warps, which cannot read each
// other's registers: block_sum (llmc/cuda_common.cuh) has each warp leave its part in shared
// memory, waits at a barrier, __syncthreads, until all have, and adds up what is there. block_max
// below does the same. The barrier serves once more: nobody writes a gradient before all have read
// the target's logit.

constexpr int THREADS = 512;

__device__ __forceinline__ float block_max(float x) {
    __shared__ float of_warp[THREADS / WARP];
    for (int d = WARP / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, d));
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    for (int w = 0; w < THREADS / WARP; w++) x = fmaxf(x, of_warp[w]);
    return x;
}

static __global__ void classifier_v2_kernel(floatX *logits, float *losses, const int *targets,
                                            float scale, int V, int Vp) {
    floatX *row = logits + (size_t)blockIdx.x * Vp;
    int target = targets[blockIdx.x];
    float z_target = cap(to_float(row[target])), max = -INFINITY, sum = 0;
    for (int v = threadIdx.x; v < V; v += THREADS) max = fmaxf(max, cap(to_float(row[v])));
    max = block_max(max);
    for (int v = threadIdx.x; v < V; v += THREADS) sum += expf(cap(to_float(row[v])) - max);
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + max - z_target;
    for (int v = threadIdx.x; v < Vp; v += THREADS) {
        float d = v < V ? gradient(cap(to_float(row[v])), max, sum, v == target, scale) : 0;
        row[v] = from_float<floatX>(d);
    }
}

static void classifier_v2(floatX *logits, float *losses, const int *targets, float scale, int rows,
                          int V, int Vp, cudaStream_t stream) {
    classifier_v2_kernel<<<rows, THREADS, 0, stream>>>(logits, losses, targets, scale, V, Vp);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// v3: know your numbers. z never passes 15, so e^(z-15) never overflows; nor can a sum of them
// vanish, as z is at least -15: 15 does for every row what its maximum did, and a pass is gone. And
// tanh(u) = 1 - 2 / (e^(2u) + 1), so that one number q = 1 / (e^(2a/15) + 1) gives all (cap_q and
// cap_exp of llmc/classifier.cuh):
//
//     z = 15 - 30 q,      e^(z-15) = e^(-30 q),      1 - (z/15)^2 = 4 q (1 - q)
//
// A logit takes two exponentials and a reciprocal a pass, each a single instruction. What is the
// same for all of a row, 4 scale / sum, is divided once.

// The gradient of the logit of q; sum is the row's, scale is 4 scale / sum.
__device__ __forceinline__ float gradient_of_q(float q, float sum, bool target, float scale) {
    float e = cap_exp(q);
    return scale * (target ? e - sum : e) * (q - q * q);
}

static __global__ void classifier_v3_kernel(floatX *logits, float *losses, const int *targets,
                                            float scale, int V, int Vp) {
    floatX *row = logits + (size_t)blockIdx.x * Vp;
    int target = targets[blockIdx.x];
    float q_target = cap_q(to_float(row[target])), sum = 0;
    for (int v = threadIdx.x; v < V; v += THREADS) sum += cap_exp(cap_q(to_float(row[v])));
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + 2 * LOGIT_CAP * q_target;
    scale *= 4 / sum;
    for (int v = threadIdx.x; v < Vp; v += THREADS) {
        float d = v < V ? gradient_of_q(cap_q(to_float(row[v])), sum, v == target, scale) : 0;
        row[v] = from_float<floatX>(d);
    }
}

static void classifier_v3(floatX *logits, float *losses, const int *targets, float scale, int rows,
                          int V, int Vp, cudaStream_t stream) {
    classifier_v3_kernel<<<rows, THREADS, 0, stream>>>(logits, losses, targets, scale, V, Vp);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// v4: 16 bytes at a time, 8 logits; and of those 4 pieces a thread, loaded before the first is
// used. A load is a request that is answered some 600 ns later; a thread stops only where it uses
// what has not come. The compiler knows that: it has unrolled v3's loops, and loads 16 numbers
// ahead in the first, 32 bytes, and 4 in the second, 8 bytes. Here 64 bytes a thread are on their
// way in both, by an eighth of the loads and stores. Columns after the last whole piece, 1 of the
// 50257, and the padding are for one thread each.

constexpr int AHEAD = 4, STEP = THREADS * VEC;

static __global__ void classifier_v4_kernel(floatX *logits, float *losses, const int *targets,
                                            float scale, int V, int Vp) {
    floatX *row = logits + (size_t)blockIdx.x * Vp;
    int target = targets[blockIdx.x], whole = V / VEC * VEC, rest = whole + threadIdx.x;
    float q_target = cap_q(to_float(row[target])), sum = 0, x[AHEAD][VEC];
    for (int v = threadIdx.x * VEC; v < whole; v += AHEAD * STEP) {
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (v + j * STEP < whole) vec_load(x[j], row + v + j * STEP);
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            for (int k = 0; k < VEC && v + j * STEP < whole; k++) sum += cap_exp(cap_q(x[j][k]));
    }
    if (rest < V) sum += cap_exp(cap_q(to_float(row[rest])));
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + 2 * LOGIT_CAP * q_target;
    scale *= 4 / sum;
    for (int v = threadIdx.x * VEC; v < whole; v += AHEAD * STEP) {
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (v + j * STEP < whole) vec_load(x[j], row + v + j * STEP);
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int at = v + j * STEP;
            if (at >= whole) break;
            for (int k = 0; k < VEC; k++)
                x[j][k] = gradient_of_q(cap_q(x[j][k]), sum, at + k == target, scale);
            vec_store(row + at, x[j]);
        }
    }
    if (rest < Vp) {
        float d =
            rest < V ? gradient_of_q(cap_q(to_float(row[rest])), sum, rest == target, scale) : 0;
        row[rest] = from_float<floatX>(d);
    }
}

static void classifier_v4(floatX *logits, float *losses, const int *targets, float scale, int rows,
                          int V, int Vp, cudaStream_t stream) {
    classifier_v4_kernel<<<rows, THREADS, 0, stream>>>(logits, losses, targets, scale, V, Vp);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// llmc: classifier_kernel of llmc/classifier.cuh. The gradient is e^(z-15) q (1-q) times a number
// that is the same for the whole row. The first pass has the former at hand; now it keeps it,
// rounded to BF16, in the SM's shared memory: 100 KB a row, two rows an SM. The second pass reads
// it there, multiplies and stores: half of the special units' work is gone, and the second reading
// of the row. And since there is room for the row, it may as well come there to begin with: by
// cp.async, which takes no registers, so that all of it is on its way at once, not 4 loads a
// thread. The target's own gradient is made by one thread, once, instead of a comparison for every
// logit. (It can also make losses without gradients, which the rungs above cannot.)

// ---------------------------------------------------------------------------------------------

static const Rung<Classifier> RUNGS[] = {
    {"v1", "a thread takes a row", classifier_v1},
    {"v2", "512 threads take a row", classifier_v2},
    {"v3", "|z| <= 15: no maximum, no tanh", classifier_v3},
    {"v4", "16 bytes a load, 4 on their way", classifier_v4},
    {"llmc", "the row, and what is found of it: in shared memory", classifier},
};

static int padded(int V) { return ceil_div(V, 128) * 128; }

// Logits with NaN in the padding; the first and the last token are among the targets. The CPU's
// rows have no padding: its gradients are laid out in rows of Vp, with 0 there.
static void check_shape(Rung<Classifier> rung, int rows, int V) {
    int Vp = padded(V), *targets = gpu_expected<int>(rows);
    size_t count = (size_t)rows * Vp;
    float scale = 1.0f / 4096, *values = gpu_expected(count), *expected = gpu_expected(count);
    float *a = gpu_expected((size_t)rows * V), *losses_expected = gpu_expected(rows),
          *sizes = gpu_expected(rows);
    double *nats = gpu_expected<double>(rows);
    RandKey key = gpu_fresh_key();
    for (size_t i = 0; i < count; i++)
        values[i] = (int)(i % Vp) < V ? (float)(2 * rand_normal(key, i)) : NAN;
    for (int t = 0; t < rows; t++)
        targets[t] = t % 3 == 0 ? V - 1 : t % 3 == 1 ? 0 : (int)(t * 7919LL % V);
    GpuArray<floatX> logits = gpu_copy<floatX>("logits", values, count);
    GpuArray<float> losses = gpu_poisoned<float>("losses", rows);
    for (int t = 0; t < rows; t++)
        memcpy(a + (size_t)t * V, logits.host + (size_t)t * Vp, V * sizeof *a);
    cpu::classifier_forward(a, nats, targets, rows, V);
    cpu::classifier_backward(a, nats, targets, scale, rows, V);
    for (int t = 0; t < rows; t++) {
        losses_expected[t] = (float)nats[t], sizes[t] = (float)fmax(1, nats[t]);
        memcpy(expected + (size_t)t * Vp, a + (size_t)t * V, V * sizeof *a);
    }
    rung.run(logits.device, losses.device, gpu_ints("targets", targets, rows), scale, rows, V, Vp,
             0);
    gpu_compare_sums(losses, losses_expected, sizes, rows, rung.name);  // the small ones cancel
    gpu_compare(logits, expected, rows, Vp, "%s, rows %d, V %d", rung.name, rows, V);
    for (size_t i = 0; i < count; i++)
        if ((int)(i % Vp) >= V && logits.host[i] != 0) {
            test_check(false, __FILE__, __LINE__, "%s, V %d, padding: found %g, expected 0",
                       rung.name, V, logits.host[i]);
            break;
        }
    gpu_end_case();
}

static void check(Rung<Classifier> rung) {
    for (int V : {2, 7, 128, 140, 257, 4097, 50257})
        for (int rows : {1, 2, 9, 65})
            if (grid_small ? rows < 3 && V < 300 : rows < 10 || V < 300) check_shape(rung, rows, V);
}

// Every run finds the same logits, and none its own gradients.
static void time_rungs(void) {
    int rows = 8192, V = 50257, Vp = padded(V), *targets = gpu_expected<int>(rows);
    size_t count = (size_t)rows * Vp;
    floatX *saved = ladder_normal<floatX>(count, 4), *logits = ladder_empty<floatX>(count);
    float *losses = ladder_empty<float>(rows);
    for (int t = 0; t < rows; t++) targets[t] = (int)(t * 7919LL % V);
    int *device = gpu_ints("targets", targets, rows);
    ladder_time(
        RUNGS, "classifier, rows 8192, V 50257", ladder_bytes(4.0 * (double)count),
        [=](Rung<Classifier> r) { r.run(logits, losses, device, 1e-5f, rows, V, Vp, 0); },
        [=] {
            CUDA_CHECK(cudaMemcpyAsync(logits, saved, count * sizeof(floatX),
                                       cudaMemcpyDeviceToDevice, 0));
        });
    gpu_end_case();
}

int main(int argc, char **argv) {
    ladder_begin(argc, argv);
    ladder_check(RUNGS, check);
    if (ladder_timed()) time_rungs();
    return test_end();
}
