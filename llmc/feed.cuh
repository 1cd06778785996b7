// feed.cuh: micro-batches on their way to the GPU.
//
// A slot is one micro-batch, n = rows T tokens, in pinned host memory and again in device memory:
//
//     tokens (n)  |  targets (n)  |  doc_start (n)  |  index (llmc/embed_index.h)
//
// feed_load fills the host's half from the loader and sends as much of it as there is, in one copy
// on the feed's own stream; feed_get makes the stream that computes wait for that copy, and not the
// host. Half a millisecond of one core for 131,072 tokens, beside which the GPU computes.
//
// A slot may be filled again when the work that reads it and its own copy are done: the caller sees
// to that. The trainer has a slot for each micro-step and one for the next step's first, and waits
// for the GPU once a step.
#ifndef LLMC_FEED_CUH
#define LLMC_FEED_CUH

#include <assert.h>

#include "llmc/cuda_common.cuh"  // Gpu, gpu_alloc, CUDA_CHECK
#include "llmc/dataloader.h"     // Loader, loader_next, loader_origin
#include "llmc/embed_index.h"    // EmbedIndex, embed_index_build
#include "llmc/model.h"          // Config

// A micro-batch, in the memory of the device, or of the host.
typedef struct {
    int *tokens;       // (n)
    int *targets;      // (n)
    int *doc_start;    // (n), where each token's document begins, in tokens of the micro-batch
    EmbedIndex index;  // of the tokens
    int n, rows, T;
} DeviceBatch;

typedef struct {
    char *host_memory, *device_memory;
    DeviceBatch host, device;
    LoaderOrigin *origin;  // (max_rows): where each row came from (feed_load)
    cudaEvent_t sent;
} FeedSlot;

typedef struct {
    int slots, max_rows, max_T;
    FeedSlot *slot;  // (slots)
    char *host_memory, *device_memory;
    LoaderOrigin *origin;
    int V, bos;
    bool doc_mask;
    int *counts;  // (V) scratch of the index
    cudaStream_t stream;
} Feed;

static inline size_t feed_array_bytes(int n) { return ((size_t)n * sizeof(int) + 15) / 16 * 16; }
static inline size_t feed_slot_bytes(int n) {
    return 3 * feed_array_bytes(n) + (embed_index_bytes(n) + 15) / 16 * 16;
}

// The micro-batch of rows of T tokens that lies in `memory`.
static inline DeviceBatch feed_batch_at(char *memory, int rows, int T) {
    DeviceBatch b;
    b.n = rows * T, b.rows = rows, b.T = T;
    size_t bytes = feed_array_bytes(b.n);
    b.tokens = (int *)memory;
    b.targets = (int *)(memory + bytes);
    b.doc_start = (int *)(memory + 2 * bytes);
    b.index = embed_index_at(memory + 3 * bytes, b.n);
    return b;
}

// Takes memory for `slots` micro-batches of at most max_rows rows of max_T tokens each.
static inline void feed_init(Feed *f, Gpu *gpu, const Config *c, int max_rows, int max_T,
                             int slots) {
    size_t bytes = feed_slot_bytes(max_rows * max_T), all = bytes * (size_t)slots;
    f->slots = slots, f->max_rows = max_rows, f->max_T = max_T;
    f->V = c->V, f->bos = c->bos, f->doc_mask = c->doc_mask;
    f->device_memory = (char *)gpu_alloc(gpu, all, "the batches");
    CUDA_CHECK(cudaHostAlloc((void **)&f->host_memory, all, cudaHostAllocDefault));
    CUDA_CHECK(cudaStreamCreateWithFlags(&f->stream, cudaStreamNonBlocking));
    f->counts = (int *)die_alloc((size_t)f->V, sizeof *f->counts, "the tokens of a batch");
    f->origin = (LoaderOrigin *)die_alloc((size_t)slots * (size_t)max_rows, sizeof *f->origin,
                                          "where rows came from");
    f->slot = (FeedSlot *)die_alloc((size_t)slots, sizeof *f->slot, "the batches");
    for (int i = 0; i < slots; i++) {
        FeedSlot *s = &f->slot[i];
        s->host_memory = f->host_memory + bytes * (size_t)i;
        s->device_memory = f->device_memory + bytes * (size_t)i;
        s->origin = f->origin + (size_t)i * (size_t)max_rows;
        CUDA_CHECK(cudaEventCreateWithFlags(&s->sent, cudaEventDisableTiming));
    }
}

static inline void feed_free(Feed *f) {
    for (int i = 0; i < f->slots; i++) CUDA_CHECK(cudaEventDestroy(f->slot[i].sent));
    CUDA_CHECK(cudaStreamDestroy(f->stream));
    CUDA_CHECK(cudaFree(f->device_memory));
    CUDA_CHECK(cudaFreeHost(f->host_memory));
    free(f->slot), free(f->origin), free(f->counts);
    memset(f, 0, sizeof *f);
}

// A token's document begins at the last BOS up to it in its row, or else at the row's start; with
// --doc-mask 0 at the row's start.
static inline void feed_find_documents(const Feed *f, DeviceBatch *b) {
    for (int t = 0, start = 0; t < b->n; t++) {
        if (t % b->T == 0 || (f->doc_mask && b->tokens[t] == f->bos)) start = t;
        b->doc_start[t] = start;
    }
}

// The slot, laid out for rows of T tokens.
static inline FeedSlot *feed_open(Feed *f, int slot, int rows, int T) {
    assert(slot >= 0 && slot < f->slots && rows >= 1 && T >= 1);
    assert(rows <= f->max_rows && rows * T <= f->max_rows * f->max_T);
    FeedSlot *s = &f->slot[slot];
    s->host = feed_batch_at(s->host_memory, rows, T);
    s->device = feed_batch_at(s->device_memory, rows, T);
    return s;
}

// Finds the documents and sends everything up to the first `bytes` of the index.
static inline void feed_send(Feed *f, FeedSlot *s, size_t bytes) {
    feed_find_documents(f, &s->host);
    bytes += (size_t)((char *)s->host.index.counts - s->host_memory);
    CUDA_CHECK(cudaMemcpyAsync(s->device_memory, s->host_memory, bytes, cudaMemcpyHostToDevice,
                               f->stream));
    CUDA_CHECK(cudaEventRecord(s->sent, f->stream));
}

// Puts the loader's next rows of T tokens on their way. Waits for the loader where it is behind.
static inline void feed_load(Feed *f, int slot, Loader *l, int rows, int T) {
    FeedSlot *s = feed_open(f, slot, rows, T);
    DeviceBatch *b = &s->host;
    loader_next(l, b->tokens, b->targets, rows);
    for (int i = 0; i < rows; i++) s->origin[i] = loader_origin(l, i);
    feed_send(f, s, embed_index_build(b->index.counts, b->tokens, b->n, f->V, f->counts));
}

// Puts given rows on their way, without an index: for what has no backward pass.
static inline void feed_put(Feed *f, int slot,
                            const int *inputs,   // (rows, T)
                            const int *targets,  // (rows, T), NULL: none
                            int rows, int T) {
    FeedSlot *s = feed_open(f, slot, rows, T);
    size_t bytes = (size_t)s->host.n * sizeof(int);
    memcpy(s->host.tokens, inputs, bytes);
    if (targets) memcpy(s->host.targets, targets, bytes);
    feed_send(f, s, 0);
}

// The slot's micro-batch in device memory; what is put on stream `compute` from now on finds it
// there.
static inline DeviceBatch feed_get(Feed *f, int slot, cudaStream_t compute) {
    FeedSlot *s = &f->slot[slot];
    CUDA_CHECK(cudaStreamWaitEvent(compute, s->sent, 0));
    return s->device;
}

#endif
