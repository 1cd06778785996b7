// vec.cuh: 16 bytes at a time. A thread that reads and writes memory in 16-byte pieces needs a
// quarter of the instructions of one that goes float by float, and comes near the copy speed.
//
//     float x[VEC];
//     vec_load(x, p + i);       // 8 BF16 numbers or 4 floats, as floats
//     vec_store(p + i, x);      // rounded to floatX once
//
// p + i must be a multiple of 16 bytes: i a multiple of VEC, and rows of C a multiple of VEC, which
// llmc/model.h sees to (C is a multiple of 8).
#ifndef LLMC_VEC_CUH
#define LLMC_VEC_CUH

#include "llmc/cuda_common.cuh"  // floatX, bf16

// Numbers of type T in 16 bytes.
template <class T> constexpr int vec_size = 16 / (int)sizeof(T);

constexpr int VEC = vec_size<floatX>;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

// Rounds to T, to nearest even.
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}

// Two floats, rounded, in a register; the first in the low half.
__device__ __forceinline__ unsigned pack(float low, float high) {
    __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<unsigned &>(two);
}
__device__ __forceinline__ float2 unpack(unsigned x) {
    return __bfloat1622float2(reinterpret_cast<__nv_bfloat162 &>(x));
}

// Four floats, or eight in two pieces: what a thread holds of FP32 memory beside VEC of floatX.
template <int N> __device__ __forceinline__ void vec_load(float (&x)[N], const float *p) {
    static_assert(N % 4 == 0, "whole pieces of 16 bytes");
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        float4 four = *reinterpret_cast<const float4 *>(p + i);
        x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
}

template <int N> __device__ __forceinline__ void vec_store(float *p, const float (&x)[N]) {
    static_assert(N % 4 == 0, "whole pieces of 16 bytes");
#pragma unroll
    for (int i = 0; i < N; i += 4)
        *reinterpret_cast<float4 *>(p + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
}

template <int N> __device__ __forceinline__ void vec_load(float (&x)[N], const bf16 *p) {
    static_assert(N % 8 == 0, "whole pieces of 16 bytes");
#pragma unroll
    for (int i = 0; i < N; i += 8) {
        uint4 piece = *reinterpret_cast<const uint4 *>(p + i);
        const __nv_bfloat162 *two = reinterpret_cast<const __nv_bfloat162 *>(&piece);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 f = __bfloat1622float2(two[j]);
            x[i + 2 * j] = f.x, x[i + 2 * j + 1] = f.y;
        }
    }
}

template <int N> __device__ __forceinline__ void vec_store(bf16 *p, const float (&x)[N]) {
    static_assert(N % 8 == 0, "whole pieces of 16 bytes");
#pragma unroll
    for (int i = 0; i < N; i += 8) {
        uint4 piece;
        __nv_bfloat162 *two = reinterpret_cast<__nv_bfloat162 *>(&piece);
#pragma unroll
        for (int j = 0; j < 4; j++) two[j] = __floats2bfloat162_rn(x[i + 2 * j], x[i + 2 * j + 1]);
        *reinterpret_cast<uint4 *>(p + i) = piece;
    }
}

#endif
