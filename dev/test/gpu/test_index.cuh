// test_index.cuh: tokens of a micro-batch and their index on the device, for the tests of the
// embedding tables.
#ifndef DEV_TEST_INDEX_CUH
#define DEV_TEST_INDEX_CUH

#include "dev/test/gpu/test_tokens.cuh"  // test_gpu.cuh, bench
#include "llmc/embed_index.h"            // embed_index_build, embed_index_at

enum { TOKENS_RANDOM, TOKENS_EQUAL, TOKENS_DIFFERENT, TOKENS_ZIPF, TOKENS_KINDS };

typedef struct {
    int n, V, kind;
    int *host;         // (n)
    int *device;       // (n)
    EmbedIndex index;  // on the device
} Tokens;

// n tokens below V: uniform, all of them the last, no two alike (if V suffices), or natural text's
// frequencies: the r-th commonest token about as often as 1/r.
static inline Tokens make_tokens(int n, int V, int kind) {
    RandKey key = gpu_fresh_key();
    Tokens k = {n, V, kind, gpu_expected<int>(n), NULL, {}};
    for (int t = 0; t < n; t++) {
        double u = rand_uniform(key, (uint64_t)t);
        k.host[t] = kind == TOKENS_RANDOM  ? (int)(u * V)
                    : kind == TOKENS_EQUAL ? V - 1
                    : kind == TOKENS_ZIPF  ? (int)((int64_t)exp(u * log(V)) * 7919 % V)
                                           : (n - t) % V;
    }
    k.device = gpu_ints("tokens", k.host, n);
    char *memory = gpu_expected<char>(embed_index_bytes(n));
    size_t used = embed_index_build(memory, k.host, n, V, gpu_expected<int>(V));
    void *device = gpu_bytes("index", embed_index_bytes(n));
    CUDA_CHECK(cudaMemcpy(device, memory, used, cudaMemcpyHostToDevice));
    k.index = embed_index_at(device, n);
    return k;
}

// How many of n tokens are different, as a part of them: rows of the table for each token.
static inline double different_tokens(const Tokens *k) {
    int different = 0, *seen = gpu_expected<int>(k->V);
    for (int t = 0; t < k->n; t++) different += !seen[k->host[t]]++;
    return (double)different / k->n;
}

#endif
