// dist.cuh: gradients and weights between the GPUs of several ranks, by NCCL. Who owns what is
// shard.h's; here is how it gets there, block by block of the table:
//
//     net_reduce   gradients of a block --> their owners, who add them up in the order of ranks
//     net_gather   weights of a block   --> from their owners to all
//     net_numbers  a few numbers        --> from each to all: loss, norms
//
// Every piece goes straight from the rank that has it to the one that needs it: each rank sends
// (world - 1) / world of what there is and receives as much, as a ring would, and every sum is
// FP32, made by a kernel of ours, in one order: the same bits each time, and on whatever way they
// came. (A ring adds in BF16, in an order that differs from piece to piece.)
//
// Gradients travel as floatX, each rank's own part of a sum stays FP32. What is small, and updated
// by all, travels FP32 to all.
//
//     grads (FP32)  --round-->  sent  ==NCCL==>  received (world) --sum--> sums (FP32)
//
// All of it is on one stream, in one order, the same on every rank, and can be captured in a CUDA
// graph. Of one rank nothing is sent, and gradients are the sums.
#ifndef LLMC_DIST_CUH
#define LLMC_DIST_CUH

#include <string.h>

#include "llmc/adamw.cuh"        // weights_round
#include "llmc/cuda_common.cuh"  // floatX, Gpu, gpu_alloc, CUDA_CHECK
#include "llmc/dist.h"           // Dist, dist_broadcast
#include "llmc/shard.h"          // ShardPlan, Piece
#include "llmc/vec.cuh"          // vec_load, vec_store

#ifdef USE_NCCL
#define NCCL_CHECK(call) net_check(call, #call, __FILE__, __LINE__)
static inline void net_check(ncclResult_t error, const char *what, const char *file, int line) {
    if (error != ncclSuccess)
        die(EXIT_COMM, "%s:%d: %s: %s", file, line, what, ncclGetErrorString(error));
}
#endif

typedef struct {
    const Dist *dist;
    const Table *table;
    const ShardPlan *plan;
    cudaStream_t stream;
#ifdef USE_NCCL
    ncclComm_t comm;
#endif
    floatX *sent;             // (largest block): other ranks' gradients, rounded
    floatX *received;         // (world, most): what this rank owns of a block, from each rank
    float *small;             // (world, most_small): likewise what all own
    size_t most, most_small;  // numbers of a rank in them
} Net;

// ---------------------------------------------------------------------------------------------
// Kernels.

constexpr int NET_THREADS = 256;

// A sum is this rank's own FP32 part and those received, from rank 0 on.
template <class T>
static __global__ void __launch_bounds__(NET_THREADS)
    net_sum_kernel(float *sums,        // (count)
                   const float *own,   // (count)
                   const T *received,  // (world), `apart` from one to the next
                   size_t apart, size_t count, int rank, int world) {
    size_t i = VEC * ((size_t)blockIdx.x * NET_THREADS + threadIdx.x);
    if (i + VEC <= count) {
        float sum[VEC] = {}, x[VEC];
        for (int r = 0; r < world; r++) {
            if (r == rank)
                vec_load(x, own + i);
            else
                vec_load(x, received + r * apart + i);
#pragma unroll
            for (int j = 0; j < VEC; j++) sum[j] = r ? sum[j] + x[j] : x[j];
        }
        vec_store(sums + i, sum);
        return;
    }
    for (; i < count; i++) {
        float sum = 0;
        for (int r = 0; r < world; r++) {
            float x = r == rank ? own[i] : to_float(received[r * apart + i]);
            sum = r ? sum + x : x;
        }
        sums[i] = sum;
    }
}

// ---------------------------------------------------------------------------------------------
// Memory.

// Places in the buffers are multiples of 16 numbers, as in the arenas.
static inline size_t net_align(size_t count) { return table_align(count, TABLE_ALIGN); }

// The sizes of the buffers, the same on every rank: the most that a rank owns of a block, and that
// all own of one.
static inline void net_sizes(Net *n) {
    for (int b = 0; b < n->table->blocks; b++)
        for (int r = SHARD_ALL; r < n->plan->world; r++) {
            size_t size = 0, *most = r == SHARD_ALL ? &n->most_small : &n->most;
            for (int i = n->plan->first[b]; i < n->plan->first[b + 1]; i++)
                if (n->plan->piece[i].owner == r) size += net_align(n->plan->piece[i].count);
            if (size > *most) *most = size;
        }
}

static inline size_t net_largest_block(const Table *t) {
    size_t largest = 0;
    for (int b = 0; b < t->blocks; b++) {
        size_t size = t->block_offset[b + 1] - t->block_offset[b];
        if (size > largest) largest = size;
    }
    return largest;
}

// Bytes that net_init will take.
static inline size_t net_bytes(const Table *t, const ShardPlan *plan) {
    Net n = {};
    if (plan->world == 1) return 0;
    n.table = t, n.plan = plan;
    net_sizes(&n);
    return sizeof(floatX) * (net_largest_block(t) + (size_t)plan->world * n.most) +
           sizeof(float) * (size_t)plan->world * n.most_small;
}

// Meets the other ranks' GPUs. Table and plan must stay where they are.
static inline void net_init(Net *n, Gpu *gpu, const Dist *dist, const Table *t,
                            const ShardPlan *plan) {
    *n = {};
    n->dist = dist, n->table = t, n->plan = plan;
    CUDA_CHECK(cudaStreamCreateWithFlags(&n->stream, cudaStreamNonBlocking));
    if (dist->world == 1) return;
#ifdef USE_NCCL
    ncclUniqueId id;
    if (dist->rank == 0) NCCL_CHECK(ncclGetUniqueId(&id));
    dist_broadcast(dist, &id, sizeof id, 0);
    NCCL_CHECK(ncclCommInitRank(&n->comm, dist->world, id, dist->rank));
    net_sizes(n);
    size_t world = (size_t)dist->world;
    n->sent = (floatX *)gpu_alloc(gpu, sizeof(floatX) * net_largest_block(t), "gradients to send");
    n->received = (floatX *)gpu_alloc(gpu, sizeof(floatX) * world * n->most, "gradients to add");
    n->small = (float *)gpu_alloc(gpu, sizeof(float) * world * n->most_small, "small gradients");
#else
    (void)gpu;
    die(EXIT_USAGE,
        "found %d ranks, but no NCCL built in; install it (make doctor tells how) and "
        "build again, or start one process",
        dist->world);
#endif
}

// Before it, graphs that the stream's work was captured in must be gone.
static inline void net_free(Net *n) {
    CUDA_CHECK(cudaFree(n->sent));
    CUDA_CHECK(cudaFree(n->received));
    CUDA_CHECK(cudaFree(n->small));
#ifdef USE_NCCL
    if (n->comm) NCCL_CHECK(ncclCommDestroy(n->comm));
#endif
    CUDA_CHECK(cudaStreamDestroy(n->stream));
}

// ---------------------------------------------------------------------------------------------
// What is sent.

#ifdef USE_NCCL
template <class T> static inline ncclDataType_t net_type(void) {
    return sizeof(T) == 8 ? ncclDouble : sizeof(T) == 4 ? ncclFloat : ncclBfloat16;
}
template <class T> static inline void net_send(Net *n, const T *from, size_t count, int to) {
    NCCL_CHECK(ncclSend(from, count, net_type<T>(), to, n->comm, n->stream));
}
template <class T> static inline void net_receive(Net *n, T *to, size_t count, int from) {
    NCCL_CHECK(ncclRecv(to, count, net_type<T>(), from, n->comm, n->stream));
}
static inline void net_group_begin(void) { NCCL_CHECK(ncclGroupStart()); }
static inline void net_group_end(void) { NCCL_CHECK(ncclGroupEnd()); }
#else  // there is one rank, and none of these is called
template <class T> static inline void net_send(Net *, const T *, size_t, int) {}
template <class T> static inline void net_receive(Net *, T *, size_t, int) {}
static inline void net_group_begin(void) {}
static inline void net_group_end(void) {}
#endif

template <class T>
static inline void net_sum(Net *n, float *sums, const float *own, const T *received, size_t apart,
                           size_t count) {
    unsigned blocks = (unsigned)ceil_div(count, (size_t)(VEC * NET_THREADS));
    net_sum_kernel<T><<<blocks, NET_THREADS, 0, n->stream>>>(sums, own, received, apart, count,
                                                             n->plan->rank, n->plan->world);
    CUDA_LAUNCHED();
}

// What this rank owns of a block: sums = the gradients of all ranks. The block's are final before
// the stream comes here.
static inline void net_reduce(Net *n,
                              float *sums,         // (numel of this rank)
                              const float *grads,  // (table.numel)
                              int block) {
    const ShardPlan *plan = n->plan;
    const Piece *first = plan->piece + plan->first[block],
                *end = plan->piece + plan->first[block + 1];
    size_t start = n->table->block_offset[block], at = 0, small_at = 0;
    if (plan->world == 1) return;
    weights_round(n->sent, grads + start, n->table->block_offset[block + 1] - start, n->stream);
    net_group_begin();
    for (const Piece *p = first; p < end; p++) {
        bool all = p->owner == SHARD_ALL, own = p->owner == plan->rank;
        for (int r = 0; r < plan->world; r++) {
            if (r == plan->rank) continue;
            if (all) {
                net_send(n, grads + p->offset, p->count, r);
                net_receive(n, n->small + (size_t)r * n->most_small + small_at, p->count, r);
            } else if (own) {
                net_receive(n, n->received + (size_t)r * n->most + at, p->count, r);
            } else if (r == p->owner) {
                net_send(n, n->sent + (p->offset - start), p->count, r);
            }
        }
        if (all) small_at += net_align(p->count);
        if (own) at += net_align(p->count);
    }
    net_group_end();
    at = small_at = 0;
    for (const Piece *p = first; p < end; p++) {
        const float *mine = grads + p->offset;
        if (p->owner == SHARD_ALL) {
            net_sum(n, sums + p->at, mine, n->small + small_at, n->most_small, p->count);
            small_at += net_align(p->count);
        } else if (p->owner == plan->rank) {
            net_sum(n, sums + p->at, mine, n->received + at, n->most, p->count);
            at += net_align(p->count);
        }
    }
}

// Every rank gets the weights of a block that others own.
static inline void net_gather(Net *n, floatX *weights /* (table.numel) */, int block) {
    const ShardPlan *plan = n->plan;
    if (plan->world == 1) return;
    net_group_begin();
    for (int i = plan->first[block]; i < plan->first[block + 1]; i++) {
        const Piece *p = &plan->piece[i];
        if (p->owner == SHARD_ALL) continue;
        for (int r = 0; r < plan->world && p->owner == plan->rank; r++)
            if (r != plan->rank) net_send(n, weights + p->offset, p->count, r);
        if (p->owner != plan->rank) net_receive(n, weights + p->offset, p->count, p->owner);
    }
    net_group_end();
}

// all: `count` numbers of every rank, by rank. This rank's are there, and go to the others.
static inline void net_numbers(Net *n, double *all /* (world, count) */, size_t count) {
    const double *mine = all + (size_t)n->plan->rank * count;
    if (n->plan->world == 1) return;
    net_group_begin();
    for (int r = 0; r < n->plan->world; r++) {
        if (r == n->plan->rank) continue;
        net_send(n, mine, count, r);
        net_receive(n, all + (size_t)r * count, count, r);
    }
    net_group_end();
}

// Rank 0 gets all masters in its host memory, laid out by the table; the others get their own.
static inline void net_collect(Net *n,
                               float *host,             // (table.numel)
                               const float *masters) {  // (numel of this rank)
    const ShardPlan *plan = n->plan;
    float *passing = (float *)n->received;  // a piece, in parts
    size_t room = sizeof(floatX) * (size_t)plan->world * n->most / sizeof(float);
    for (const Piece *p = plan->piece; p < plan->piece + plan->count; p++) {
        if (shard_owns(p, plan->rank))
            CUDA_CHECK(cudaMemcpyAsync(host + p->offset, masters + p->at, p->count * sizeof *host,
                                       cudaMemcpyDeviceToHost, n->stream));
        if (p->owner <= 0 || (plan->rank && plan->rank != p->owner)) continue;
        for (size_t at = 0, count; at < p->count; at += count) {
            count = p->count - at < room ? p->count - at : room;
            if (plan->rank) {
                net_send(n, masters + p->at + at, count, 0);
                continue;
            }
            net_receive(n, passing, count, p->owner);
            CUDA_CHECK(cudaMemcpyAsync(host + p->offset + at, passing, count * sizeof *host,
                                       cudaMemcpyDeviceToHost, n->stream));
        }
    }
    CUDA_CHECK(cudaStreamSynchronize(n->stream));
}

#endif
