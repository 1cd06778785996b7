// rmsnorm.cu: a ladder, and the one to begin with: the norm of a sum, as it stands before the MLP,
//
//     h = N(x + a) = r (x + a),   r = 1 / sqrt(mean((x + a)^2) + 2^-23),   over the C channels
//
// of each token. x, a and h are (n, C) in BF16, r is (n). `make ladder OP=rmsnorm` checks and times
// every rung. Each is a kernel, a function that thousands of threads run at once, and the function
// that launches it: kernel<<<blocks, threads of a block>>>(arguments). Read from v1 downward; what
// one rung changes against the one above it is all there is to learn from it.
//
//     rung  what it changes, and why that is faster                     us     GB/s of top times v1
//     v1    nothing yet: the CPU's loops; a thread takes a token     2,502      241     6%      1.0
//     v2    a warp takes a token: neighbours are read together         404    1,495    35%      6.2
//     v3    the sum is made where it is needed, and never stored       193    3,137    74%       13
//     v4    16 bytes a load instead of 2: an eighth of the loads       187    3,235    76%       13
//     llmc  a token is read once and stays in registers                144    4,195    99%       17
//
// (H200; n 131072, C 768. GB/s: of the 6C bytes a token that must move, however many do.)
//
// WHY MEMORY IS ALL THERE IS. A token takes about 4C additions and products and moves 6C bytes,
// less than one operation a byte; an H200 does 16 in the time in which its memory moves one. So
// arithmetic costs nothing, and the best time is known beforehand: 131072 * 768 * 6 bytes at 4.23
// TB/s are 143 us. Every rung removes something that keeps the memory from being busy all the time
// with bytes that are needed.
#include "dev/cuda/ladder.cuh"  // Rung, ladder_check, ladder_time
#include "llmc/residual.cuh"    // residual_norm_forward

typedef void NormForward(floatX *h,        // (n, C)
                         float *r,         // (n)
                         floatX *sum,      // (n, C), scratch: for x + a
                         const floatX *x,  // (n, C)
                         const floatX *a,  // (n, C)
                         int n, int C, cudaStream_t stream);

// ---------------------------------------------------------------------------------------------
// v1: the loops of train_gpt2.c. Each element of the sum is a thread's; then each token is.
//
// A GPU runs threads in warps: 32 lanes that go through the code in step. When they load, the 32
// addresses become as few transfers of 32 bytes as cover them. In add they are neighbours, 64 bytes
// in all, two transfers. In norm each lane is in another token, 1536 bytes from the next: 32
// transfers of 32 bytes, for 64 bytes that are wanted. The rest of each transfer is the lane's own
// next 15 channels; the L1 cache may still have them when their turn comes, if the thousand threads
// of its multiprocessor (SM) have not pushed them out.

static __global__ void add_kernel(floatX *sum, const floatX *x, const floatX *a, size_t count) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;  // this thread's element
    if (i < count) sum[i] = from_float<floatX>(to_float(x[i]) + to_float(a[i]));
}

static __global__ void norm_v1_kernel(floatX *h, float *r, const floatX *x, int n, int C) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;  // this thread's token
    if (t >= n) return;
    x += (size_t)t * C, h += (size_t)t * C;
    float squares = 0;
    for (int c = 0; c < C; c++) squares += to_float(x[c]) * to_float(x[c]);
    float factor = rsqrtf(squares / C + 0x1p-23f);
    for (int c = 0; c < C; c++) h[c] = from_float<floatX>(factor * to_float(x[c]));
    r[t] = factor;
}

static void norm_v1(floatX *h, float *r, floatX *sum, const floatX *x, const floatX *a, int n,
                    int C, cudaStream_t stream) {
    size_t count = (size_t)n * C;
    add_kernel<<<(unsigned)ceil_div(count, (size_t)256), 256, 0, stream>>>(sum, x, a, count);
    norm_v1_kernel<<<ceil_div(n, 128), 128, 0, stream>>>(h, r, sum, n, C);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// v2: a warp takes a token. Lane 0 has channels 0, 32, 64 ..., lane 1 has 1, 33, 65 ...: in each
// round of the loop the warp reads 32 neighbours, all of every transfer is wanted at once, and no
// cache need remember anything. The price: a lane has only its own part of the sum of squares.
// warp_sum (llmc/cuda_common.cuh) adds the 32 parts in five steps, in which lanes read each other's
// registers. There are also 32 times as many threads, so that the memory always has work.

constexpr int WARPS = 4;  // of a block, each with a token of its own

static __global__ void norm_v2_kernel(floatX *h, float *r, const floatX *x, int n, int C) {
    int t = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (t >= n) return;  // all lanes of a warp, or none
    x += (size_t)t * C, h += (size_t)t * C;
    float squares = 0;
    for (int c = lane; c < C; c += WARP) squares += to_float(x[c]) * to_float(x[c]);
    float factor = rsqrtf(warp_sum(squares) / C + 0x1p-23f);
    for (int c = lane; c < C; c += WARP) h[c] = from_float<floatX>(factor * to_float(x[c]));
    if (lane == 0) r[t] = factor;
}

static void norm_v2(floatX *h, float *r, floatX *sum, const floatX *x, const floatX *a, int n,
                    int C, cudaStream_t stream) {
    size_t count = (size_t)n * C;
    add_kernel<<<(unsigned)ceil_div(count, (size_t)256), 256, 0, stream>>>(sum, x, a, count);
    norm_v2_kernel<<<ceil_div(n, WARPS), WARPS * WARP, 0, stream>>>(h, r, sum, n, C);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// v3: x + a is made in the norm's kernel, twice, instead of being written by one kernel and read by
// the next: 5C numbers a token become 3C. (The second reading of x and a follows so soon that it
// finds them in a cache.) It is more exact, too: h is the norm of a sum that was never rounded.

static __global__ void norm_v3_kernel(floatX *h, float *r, const floatX *x, const floatX *a, int n,
                                      int C) {
    int t = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (t >= n) return;
    x += (size_t)t * C, a += (size_t)t * C, h += (size_t)t * C;
    float squares = 0;
    for (int c = lane; c < C; c += WARP) {
        float v = to_float(x[c]) + to_float(a[c]);
        squares += v * v;
    }
    float factor = rsqrtf(warp_sum(squares) / C + 0x1p-23f);
    for (int c = lane; c < C; c += WARP)
        h[c] = from_float<floatX>(factor * (to_float(x[c]) + to_float(a[c])));
    if (lane == 0) r[t] = factor;
}

static void norm_v3(floatX *h, float *r, floatX *, const floatX *x, const floatX *a, int n, int C,
                    cudaStream_t stream) {
    norm_v3_kernel<<<ceil_div(n, WARPS), WARPS * WARP, 0, stream>>>(h, r, x, a, n, C);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// v4: 16 bytes at a time (llmc/vec.cuh), 8 channels a lane, 512 bytes a warp. C 768 takes 3 rounds
// of the loop instead of 24. A load costs an instruction, an address and a place in the queue
// whatever its size; and with eight times as many bytes in each, eight times as many are on their
// way while a warp waits. Memory answers after some 600 ns, and 4.23 TB/s times 600 ns are 2.5 MB
// that must be on their way at any moment, 19 KB for each of the 132 SMs.

static __global__ void norm_v4_kernel(floatX *h, float *r, const floatX *x, const floatX *a, int n,
                                      int C) {
    int t = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (t >= n) return;
    x += (size_t)t * C, a += (size_t)t * C, h += (size_t)t * C;
    float squares = 0, v[VEC], w[VEC];
    for (int c = lane * VEC; c < C; c += WARP * VEC) {
        vec_load(v, x + c), vec_load(w, a + c);
        for (int i = 0; i < VEC; i++) squares += (v[i] + w[i]) * (v[i] + w[i]);
    }
    float factor = rsqrtf(warp_sum(squares) / C + 0x1p-23f);
    for (int c = lane * VEC; c < C; c += WARP * VEC) {
        vec_load(v, x + c), vec_load(w, a + c);
        for (int i = 0; i < VEC; i++) v[i] = factor * (v[i] + w[i]);
        vec_store(h + c, v);
    }
    if (lane == 0) r[t] = factor;
}

static void norm_v4(floatX *h, float *r, floatX *, const floatX *x, const floatX *a, int n, int C,
                    cudaStream_t stream) {
    norm_v4_kernel<<<ceil_div(n, WARPS), WARPS * WARP, 0, stream>>>(h, r, x, a, n, C);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// llmc: sum_norm_forward_kernel of llmc/residual.cuh. A lane's share of a token has a size that is
// known when the program is compiled (Channels, llmc/channels.cuh: 24 floats), so it stays in
// registers: x and a are loaded once, all 6 loads ahead of any arithmetic, and the second pass
// touches no memory but h. A token wider than that gets more warps. (The kernel can subtract a
// third tensor, too; here it is NULL.)

static void norm_llmc(floatX *h, float *r, floatX *, const floatX *x, const floatX *a, int n, int C,
                      cudaStream_t stream) {
    residual_norm_forward(h, r, {x, a, NULL}, n, C, stream);
}

// ---------------------------------------------------------------------------------------------

static const Rung<NormForward> RUNGS[] = {
    {"v1", "a thread takes a token", norm_v1},
    {"v2", "a warp takes a token", norm_v2},
    {"v3", "the sum is never stored", norm_v3},
    {"v4", "16 bytes a load", norm_v4},
    {"llmc", "a token is read once and stays in registers", norm_llmc},
};

static void check_shape(Rung<NormForward> rung, int n, int C) {
    size_t nC = (size_t)n * C;
    GpuArray<floatX> x = gpu_normal<floatX>("x", nC, 2), a = gpu_normal<floatX>("a", nC, 1);
    GpuArray<floatX> h = gpu_poisoned<floatX>("h", nC), sum = gpu_poisoned<floatX>("sum", nC);
    GpuArray<float> r = gpu_poisoned<float>("r", n);
    float *h_expected = gpu_expected(nC), *r_expected = gpu_expected(n);
    rung.run(h.device, r.device, sum.device, x.device, a.device, n, C, 0);
    cpu::add_forward(x.host, a.host, (int64_t)nC);
    cpu::norm_forward(h_expected, r_expected, x.host, n, C);
    r.tolerance = TOLERANCE_X;  // v1 and v2 round the sum before they square it
    gpu_compare(h, h_expected, n, C, "%s, n %d, C %d", rung.name, n, C);
    gpu_compare(r, r_expected, n, 1, "%s, n %d, C %d", rung.name, n, C);
    gpu_end_case();
}

static void check(Rung<NormForward> rung) {
    for (int C : {8, 48, 200, 768, 1280, 2048})
        for (int n : {1, 2, 63, 129, 1000})
            if (n <= (grid_small ? 63 : 1000)) check_shape(rung, n, C);
}

static void time_rungs(void) {
    int n = 131072, C = 768;
    size_t nC = (size_t)n * C;
    floatX *x = ladder_normal<floatX>(nC, 2), *a = ladder_normal<floatX>(nC, 1);
    floatX *h = ladder_empty<floatX>(nC), *sum = ladder_empty<floatX>(nC);
    float *r = ladder_empty<float>((size_t)n);
    ladder_time(RUNGS, "h = N(x + a), n 131072, C 768", ladder_bytes(6.0 * (double)nC),
                [=](Rung<NormForward> rung) { rung.run(h, r, sum, x, a, n, C, 0); });
    gpu_end_case();
}

int main(int argc, char **argv) {
    ladder_begin(argc, argv);
    ladder_check(RUNGS, check);
    if (ladder_timed()) time_rungs();
    return test_end();
}
