// test_vec.cu: 16-byte access (llmc/vec.cuh) and sums over a block (llmc/cuda_common.cuh).
#include "dev/test/gpu/test_gpu.cuh"
#include "llmc/vec.cuh"  // VEC, vec_load, vec_store

// y = x, VEC numbers a thread.
static __global__ void copy_kernel(floatX *y, const floatX *x, int count) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= count) return;
    float v[VEC];
    vec_load(v, x + i);
    vec_store(y + i, v);
}

// Two sums by every block, one after the other: of x and of x^2.
template <int THREADS>
static __global__ void sum_kernel(float *sums /* (blocks, 2) */,
                                  const float *x /* (blocks, THREADS) */) {
    float v = x[blockIdx.x * THREADS + threadIdx.x];
    float sum = block_sum<THREADS>(v), squares = block_sum<THREADS>(v * v);
    if (threadIdx.x == THREADS - 1) sums[2 * blockIdx.x] = sum, sums[2 * blockIdx.x + 1] = squares;
}

TEST(vec_round_trip) {
    for (int count : {VEC, 2 * VEC, 128 * VEC, 129 * VEC}) {
        GpuArray<floatX> x = gpu_normal<floatX>("x", (size_t)count, 1);
        GpuArray<floatX> y = gpu_poisoned<floatX>("y", (size_t)count);
        copy_kernel<<<ceil_div(count, 128 * VEC), 128>>>(y.device, x.device, count);
        CUDA_LAUNCHED();
        y.tolerance = 0;
        gpu_compare(y, x.host, 1, count, "count %d", count);
        gpu_end_case();
    }
}

template <int THREADS> static void check_block_sum(void) {
    const int blocks = 3;
    GpuArray<float> x = gpu_normal<float>("x", blocks * THREADS, 1);
    GpuArray<float> sums = gpu_poisoned<float>("sums", 2 * blocks);
    float *expected = gpu_expected(2 * blocks), *sizes = gpu_expected(2 * blocks);
    for (int i = 0; i < blocks * THREADS; i++) {
        float v = x.host[i], *to = expected + 2 * (i / THREADS), *size = sizes + 2 * (i / THREADS);
        to[0] += v, to[1] += v * v, size[0] += fabsf(v), size[1] += v * v;
    }
    sum_kernel<THREADS><<<blocks, THREADS>>>(sums.device, x.device);
    CUDA_LAUNCHED();
    gpu_compare_sums(sums, expected, sizes, 2 * blocks, "block_sum");
    gpu_end_case();
}

TEST(block_sums) {
    check_block_sum<32>();
    check_block_sum<128>();
    check_block_sum<1024>();
}

int main(void) {
    gpu_test_begin();
    RUN(vec_round_trip);
    RUN(block_sums);
    return test_end();
}
