// ptx.cuh: instructions that CUDA C++ has no word for, each in a function of its own. Everything
// here works from sm_80 (A100) on.
//
// MATRICES. A warp multiplies small matrices on the tensor cores: D = A B + D with A (16, 16),
// B (16, 8) and D (16, 8). Each lane holds a few elements of each; two BF16 numbers that are
// neighbours in a row of A, in a column of B, share a 32-bit register, the first in its low half.
// With g = lane / 4 and t = lane % 4 (r0 .. r3: a lane's registers):
//
//     A (16, 16)        columns 2t, 2t+1   2t+8, 2t+9       B (16, 8)              column g
//     row g             r0                 r2               rows 2t, 2t+1          r0
//     row g + 8         r1                 r3               rows 2t+8, 2t+9        r1
//
//     D (16, 8), FP32   columns 2t  2t+1          which lane holds what of a row of D, or of
//     row g             d0          d1            8 columns of a row of A:
//     row g + 8         d2          d3            column  0 1 | 2 3 | 4 5 | 6 7
//                                                 lane    4g  | 4g+1| 4g+2| 4g+3
//
// Two D side by side, rounded to BF16, are laid out as an A: {d0,d1}, {d2,d3} of the left one are
// r0, r1, those of the right one r2, r3. So the result of one product can be the left operand of
// the next without leaving its registers.
#ifndef LLMC_PTX_CUH
#define LLMC_PTX_CUH

#include "llmc/cuda_common.cuh"  // bf16

// The address of shared memory as the instructions below take it.
__device__ __forceinline__ unsigned shared_address(const void *p) {
    return (unsigned)__cvta_generic_to_shared(p);
}

// Four 8 x 8 matrices of BF16 numbers from shared memory, one a register. Lane l gives the address
// of row l % 8, 16 bytes, of matrix l / 8. Of each matrix a lane receives columns 2t, 2t+1 of row
// g: with matrices {top left, bottom left, top right, bottom right} that is the layout of A above.
__device__ __forceinline__ void ldmatrix(unsigned (&m)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address));
}

// The same of the transposed matrices: a lane receives rows 2t, 2t+1 of column g, which is the
// layout of B above when the rows in memory are the rows of B.
__device__ __forceinline__ void ldmatrix_trans(unsigned (&m)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address));
}

// d += a b, in the layouts above: BF16 factors, exact products, FP32 sums.
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0,
                                    unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Starts a copy of 16 bytes from global to shared memory, by way of L2 only; zeros when not `there`
// (nothing is read then). Both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(unsigned to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0)
                 : "memory");
}

// The same of 4 bytes.
__device__ __forceinline__ void cp_async_4(unsigned to, const void *from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(there ? 4 : 0)
                 : "memory");
}

// The copies that this thread has started since the last commit become a group.
__device__ __forceinline__ void cp_async_commit(void) {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all but the last N groups of this thread. Others see what has come after a barrier.
template <int N> __device__ __forceinline__ void cp_async_wait_group(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Waits for all copies that this thread started. Others see them after the next barrier.
__device__ __forceinline__ void cp_async_wait(void) {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// 2^x, to 2 units in the last place; 0 for -infinity. Results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// sqrt(x), to 2^-22 or so; of x below 2^-126: 0.
__device__ __forceinline__ float sqrt_fast(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, to 1 unit in the last place; of x below 2^-126, and where the result is: infinity, 0.
__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif
