// embed_backward.cu: a ladder. The gradient of the token embedding, a sum with addresses:
//
//     dtable[tokens[t]] += dx[t]
//
// dx is (n, C) in BF16, dtable is (V, C) in FP32, tokens is (n). `make ladder OP=embed_backward`
// checks and times every rung; dev/cuda/rmsnorm.cu is the ladder to read before.
//
//     rung  what it changes, and why that is faster                     us     GB/s of top times v1
//     v1    the CPU's loops; a thread takes a channel               52,660      6.6   0.2%      1.0
//     v2    all positions at once, and the memory adds: atomics        305    1,138    27%      173
//     v3    tokens are sorted: a warp adds one's in registers        1,404      247     6%       38
//     v4    a token that is frequent is cut into pieces of 32          237    1,465    35%      222
//     llmc  16 bytes a load, 4 rows on their way                       105    3,318    78%      503
//
// (H200; n 131072, C 768, V 50257; tokens as in text: the r-th commonest about as often as 1/r.
// GB/s: of the bytes that must move, dx once and the rows of dtable that occur in and out.)
//
// Two positions with the same token are added to the same row. That is the whole difficulty: who
// adds, so that no two threads read the same old value and one sum is lost; and in which order, for
// sums of floating-point numbers depend on it. The rungs are three answers: one thread does all
// (v1), the memory does (v2), the positions are sorted so that each row has one owner (v3 and up).
#include "dev/cuda/ladder.cuh"          // Rung, ladder_check, ladder_time
#include "dev/test/gpu/test_index.cuh"  // make_tokens
#include "llmc/embed.cuh"               // embed_backward

typedef void EmbedBackward(float *dtable,      // (V, C), added to
                           const floatX *dx,   // (n, C)
                           const int *tokens,  // (n)
                           EmbedIndex index,   // of the tokens, from v3 on
                           float *partials,    // (embed_max_partials(n), C) scratch, from v4 on
                           int n, int C, cudaStream_t stream);

// ---------------------------------------------------------------------------------------------
// v1: one thread walks over all positions, so that nothing can be lost; each of C threads does so
// for its channel. Their addresses are neighbours, as they should be. But 768 threads are all there
// are, for 132 SMs that hold 2048 each, and each waits for its load before it can add, store and go
// on: 131072 times the 600 ns or so that memory takes to answer.

static __global__ void embed_v1_kernel(float *dtable, const floatX *dx, const int *tokens, int n,
                                       int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    for (int t = 0; t < n; t++)
        dtable[(size_t)tokens[t] * C + c] += to_float(dx[(size_t)t * C + c]);
}

static void embed_v1(float *dtable, const floatX *dx, const int *tokens, EmbedIndex, float *, int n,
                     int C, cudaStream_t stream) {
    embed_v1_kernel<<<ceil_div(C, WARP), WARP, 0, stream>>>(dtable, dx, tokens, n, C);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// v2: a block takes a position, and its threads the channels: a hundred million numbers, all at
// once. That two of them may have the same address is left to the memory: atomicAdd sends the
// number to the L2 cache, whose own adders take one after the other. Nobody waits, as nobody asks
// for the result. But in which order they come is chance, so that the last bits of the gradient
// differ from run to run, and two trainings with the same seed end apart. That is why llmc/ has no
// atomic sums of floats, and why there are more rungs.

static __global__ void embed_v2_kernel(float *dtable, const floatX *dx, const int *tokens, int C) {
    dtable += (size_t)tokens[blockIdx.x] * C, dx += (size_t)blockIdx.x * C;
    for (int c = threadIdx.x; c < C; c += blockDim.x) atomicAdd(&dtable[c], to_float(dx[c]));
}

static void embed_v2(float *dtable, const floatX *dx, const int *tokens, EmbedIndex, float *, int n,
                     int C, cudaStream_t stream) {
    embed_v2_kernel<<<n, 256, 0, stream>>>(dtable, dx, tokens, C);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// v3: change the data, not the kernel. The host has the tokens before the GPU does, and the time of
// a step to sort their positions by token (llmc/embed_index.h). Now a warp takes all positions of a
// token and 32 channels, adds up in a register, and touches dtable once: no atomics, the same order
// every time, and a repetition costs dtable nothing. What is wrong with it is text: the commonest
// token is 6% of it here, 8,000 rows that one warp adds up alone while all others have long
// finished. (The index has cut the tokens into pieces already, for v4; here the warp at a token's
// first piece takes them all.)

static __global__ void embed_v3_kernel(float *dtable, const floatX *dx, EmbedIndex index, int C) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int c = blockIdx.y * WARP + lane, pieces = index.counts->pieces;
    if (c >= C) return;
    for (int p = blockIdx.x * warps + warp; p < pieces; p += gridDim.x * warps) {
        int token = index.piece[p].token;
        if (p > 0 && index.piece[p - 1].token == token) continue;
        float sum = 0;
        for (int q = p; q < pieces && index.piece[q].token == token; q++)
            for (int k = 0; k < index.piece[q].count; k++)
                sum += to_float(dx[(size_t)index.position[index.piece[q].first + k] * C + c]);
        dtable[(size_t)token * C + c] += sum;
    }
}

static void embed_v3(float *dtable, const floatX *dx, const int *, EmbedIndex index, float *, int n,
                     int C, cudaStream_t stream) {
    dim3 grid((unsigned)ceil_div(n, 16), (unsigned)ceil_div(C, WARP));
    embed_v3_kernel<<<grid, 128, 0, stream>>>(dtable, dx, index, C);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// v4: no warp has more than a piece, 32 positions. The only piece of a token is added to its row as
// before; each of several leaves its sum in a row of its own, in partials, and a second kernel adds
// those up in order. That is how any long sum is shared out without losing its order: parts that
// depend on nothing but the data, and a fixed order among them.

static __global__ void embed_v4_kernel(float *dtable, float *partials, const floatX *dx,
                                       EmbedIndex index, int C) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int c = blockIdx.y * WARP + lane;
    if (c >= C) return;
    for (int p = blockIdx.x * warps + warp; p < index.counts->pieces; p += gridDim.x * warps) {
        EmbedPiece piece = index.piece[p];
        float sum = 0;
        for (int k = 0; k < piece.count; k++)
            sum += to_float(dx[(size_t)index.position[piece.first + k] * C + c]);
        if (piece.partial < 0)
            dtable[(size_t)piece.token * C + c] += sum;
        else
            partials[(size_t)piece.partial * C + c] = sum;
    }
}

// A warp takes a token that was cut, and 32 channels.
static __global__ void embed_v4_add_kernel(float *dtable, const float *partials, EmbedIndex index,
                                           int C) {
    int c = blockIdx.y * WARP + threadIdx.x;
    if (c >= C) return;
    for (int s = blockIdx.x; s < index.counts->splits; s += gridDim.x) {
        EmbedSplit split = index.split[s];
        float sum = 0;
        for (int k = 0; k < split.count; k++) sum += partials[(size_t)(split.first + k) * C + c];
        dtable[(size_t)split.token * C + c] += sum;
    }
}

static void embed_v4(float *dtable, const floatX *dx, const int *, EmbedIndex index,
                     float *partials, int n, int C, cudaStream_t stream) {
    unsigned slices = (unsigned)ceil_div(C, WARP);
    dim3 grid((unsigned)ceil_div(n, 16), slices),
        add((unsigned)min(embed_max_splits(n), 512), slices);
    embed_v4_kernel<<<grid, 128, 0, stream>>>(dtable, partials, dx, index, C);
    if (add.x) embed_v4_add_kernel<<<add, WARP, 0, stream>>>(dtable, partials, index, C);
    CUDA_LAUNCHED();
}

// ---------------------------------------------------------------------------------------------
// llmc: llmc/embed.cuh. A lane has 8 channels, a load of 16 bytes: a row of dx takes 3 warps
// instead of 24, and positions, each of which must have come before its row can be asked for, are
// read by 3 instead of 24. A lane asks for 4 rows before it adds the first, where a piece has fewer
// for its last one again, which L1 has: then no row waits for the row before it. (The compiler does
// so for v4's loop, too, where a piece is long; but most tokens are rare.) A token's partial sums
// are shared out among 8 warps.

static void embed_llmc(float *dtable, const floatX *dx, const int *, EmbedIndex index,
                       float *partials, int n, int C, cudaStream_t stream) {
    embed_backward(dtable, dx, index, partials, n, C, stream);
}

// ---------------------------------------------------------------------------------------------

static const Rung<EmbedBackward> RUNGS[] = {
    {"v1", "a thread takes a channel", embed_v1},
    {"v2", "all positions at once, atomics add", embed_v2},
    {"v3", "sorted: a warp takes a token", embed_v3},
    {"v4", "frequent tokens are cut into pieces", embed_v4},
    {"llmc", "16 bytes a load, 4 rows on their way", embed_llmc},
};

// The gradient is added to what is there. Twice the same bits, but with atomics.
static void check_shape(Rung<EmbedBackward> rung, int n, int C, int V, int kind) {
    size_t VC = (size_t)V * C, scratch = embed_scratch_bytes(n, C) / sizeof(float);
    Tokens k = make_tokens(n, V, kind);
    GpuArray<floatX> dx = gpu_normal<floatX>("dx", (size_t)n * C, 1);
    GpuArray<float> dtable = gpu_normal<float>("dtable", VC, 1);
    GpuArray<float> again = gpu_copy<float>("dtable", dtable.host, VC);
    float *expected = gpu_expected(VC);
    memcpy(expected, dtable.host, VC * sizeof *expected);
    cpu::embed_backward(expected, dx.host, k.host, n, C);
    for (float *to : {dtable.device, again.device})
        rung.run(to, dx.device, k.device, k.index, ladder_empty<float>(scratch), n, C, 0);
    gpu_compare(dtable, expected, V, C, "%s, n %d, C %d, tokens %d", rung.name, n, C, kind);
    if (rung.run != embed_v2) CHECK(same_bits(dtable, again));
    gpu_end_case();
}

static void check(Rung<EmbedBackward> rung) {
    for (int kind = 0; kind < TOKENS_KINDS; kind++)
        for (int C : {8, 48, 200, 768})
            for (int n : {1, 2, 33, 63, 129, 1000})
                if (n <= (grid_small ? 63 : 1000)) check_shape(rung, n, C, 301, kind);
}

static void time_rungs(void) {
    int n = 131072, C = 768, V = 50257;
    size_t nC = (size_t)n * C, VC = (size_t)V * C;
    Tokens k = make_tokens(n, V, TOKENS_ZIPF);
    double rows = n * different_tokens(&k);
    floatX *dx = ladder_normal<floatX>(nC, 1);
    float *dtable = ladder_normal<float>(VC, 1);
    float *partials = ladder_empty<float>(embed_scratch_bytes(n, C) / sizeof(float));
    printf("\n%.0f different tokens of %d", rows, n);
    ladder_time(RUNGS, "embed_backward, n 131072, C 768, V 50257",
                ladder_bytes(2.0 * (double)nC + 8 * rows * C), [=](Rung<EmbedBackward> rung) {
                    rung.run(dtable, dx, k.device, k.index, partials, n, C, 0);
                });
    gpu_end_case();
}

int main(int argc, char **argv) {
    ladder_begin(argc, argv);
    ladder_check(RUNGS, check);
    if (ladder_timed()) time_rungs();
    return test_end();
}
