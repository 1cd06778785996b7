// feed.cuh: micro-batches on their way to the GPU.
//
// A micro-batch is n = rows T tokens in one piece of memory:
//
//     tokens (n)  |  targets (n)  |  doc_start (n)  |  index (llmc/embed_index.h)
//
// feed_load fills a slot, in pinned host memory, from the loader: half a millisecond of a core for
// 131,072 tokens, beside which the GPU computes. feed_send copies as much of it as there is, 2 to 4
// MB of those, to a place in device memory, on the stream that computes.
//
// Slots and places are apart. A step reads the same places each time, so that nothing in it changes
// from step to step and a CUDA graph of it stays good; the next step's slots are filled meanwhile.
// A slot may be filled again when its copy is done: the caller sees to that. The trainer has two
// sets of slots, one in flight and one being filled, and waits for the GPU once a step.
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
    int distinct;  // different tokens, where there is an index
} DeviceBatch;

typedef struct {
    char *memory;
    DeviceBatch batch;     // in host memory
    size_t bytes;          // of it in use
    LoaderOrigin *origin;  // (max_rows): where each row came from (feed_load)
} FeedSlot;

typedef struct {
    int max_tokens, max_rows, slots, places;
    FeedSlot *slot;  // (slots)
    char *host_memory, *device_memory;
    LoaderOrigin *origin;
    int V, bos;
    bool doc_mask;
    int *counts;    // (V) scratch of the index
    int *distinct;  // (places): of what lies there
} Feed;

static inline size_t feed_array_bytes(int n) { return ((size_t)n * sizeof(int) + 15) / 16 * 16; }
// What a slot takes, and a place.
static inline size_t feed_batch_bytes(int n) {
    return 3 * feed_array_bytes(n) + (embed_index_bytes(n) + 15) / 16 * 16;
}

// The micro-batch of rows of T tokens that lies in `memory`.
static inline DeviceBatch feed_batch_at(char *memory, int rows, int T) {
    DeviceBatch b;
    b.n = rows * T, b.rows = rows, b.T = T, b.distinct = 0;
    size_t bytes = feed_array_bytes(b.n);
    b.tokens = (int *)memory;
    b.targets = (int *)(memory + bytes);
    b.doc_start = (int *)(memory + 2 * bytes);
    b.index = embed_index_at(memory + 3 * bytes, b.n);
    return b;
}

// Takes memory for micro-batches of at most max_tokens, of which feed_load's have max_rows at most.
static inline void feed_init(Feed *f, Gpu *gpu, const Config *c, int max_tokens, int max_rows,
                             int slots, int places) {
    size_t bytes = feed_batch_bytes(max_tokens), rows = (size_t)max_rows;
    f->max_tokens = max_tokens, f->max_rows = max_rows, f->slots = slots, f->places = places;
    f->V = c->V, f->bos = c->bos, f->doc_mask = c->doc_mask;
    f->device_memory = (char *)gpu_alloc(gpu, bytes * (size_t)places, "the batches");
    f->host_memory = (char *)gpu_alloc_host(bytes * (size_t)slots, "the batches");
    f->counts = (int *)die_alloc((size_t)f->V, sizeof *f->counts, "the tokens of a batch");
    f->distinct = (int *)die_alloc((size_t)places, sizeof *f->distinct, "the batches");
    f->origin =
        (LoaderOrigin *)die_alloc((size_t)slots * rows, sizeof *f->origin, "where rows came from");
    f->slot = (FeedSlot *)die_alloc((size_t)slots, sizeof *f->slot, "the batches");
    for (size_t i = 0; i < (size_t)slots; i++)
        f->slot[i].memory = f->host_memory + bytes * i, f->slot[i].origin = f->origin + rows * i;
}

static inline void feed_free(Feed *f) {
    CUDA_CHECK(cudaFree(f->device_memory));
    CUDA_CHECK(cudaFreeHost(f->host_memory));
    free(f->slot), free(f->origin), free(f->counts), free(f->distinct);
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
    assert(slot >= 0 && slot < f->slots && rows >= 1 && T >= 1 && rows <= f->max_tokens / T);
    FeedSlot *s = &f->slot[slot];
    s->batch = feed_batch_at(s->memory, rows, T);
    return s;
}

// Finds the documents. Of the index the first `bytes` are in use.
static inline void feed_close(const Feed *f, FeedSlot *s, size_t bytes) {
    feed_find_documents(f, &s->batch);
    s->bytes = (size_t)((char *)s->batch.index.counts - s->memory) + bytes;
}

// Fills a slot with the loader's next rows of T tokens; waits for the loader where it is behind.
// Where their data are bad it ends the program, or, when they are loaded ahead of need, returns
// false: the next call comes to the same rows.
static inline bool feed_load(Feed *f, int slot, Loader *l, int rows, int T, bool ahead) {
    assert(rows <= f->max_rows);
    loader_require_length(l, T);
    FeedSlot *s = feed_open(f, slot, rows, T);
    DeviceBatch *b = &s->batch;
    if (!ahead)
        loader_next(l, b->tokens, b->targets, rows);
    else if (!loader_try_next(l, b->tokens, b->targets, rows))
        return false;
    for (int i = 0; i < rows; i++) s->origin[i] = loader_origin(l, i);
    feed_close(f, s, embed_index_build(b->index.counts, b->tokens, b->n, f->V, f->counts));
    b->distinct = embed_index_distinct(b->index);
    return true;
}

// Fills a slot with given rows, without an index: for what has no backward pass.
static inline void feed_put(Feed *f, int slot,
                            const int *inputs,   // (rows, T)
                            const int *targets,  // (rows, T), NULL: none
                            int rows, int T) {
    FeedSlot *s = feed_open(f, slot, rows, T);
    size_t bytes = (size_t)s->batch.n * sizeof(int);
    memcpy(s->batch.tokens, inputs, bytes);
    if (targets) memcpy(s->batch.targets, targets, bytes);
    feed_close(f, s, 0);
}

// The micro-batch in a place, of rows of T tokens.
static inline DeviceBatch feed_get(const Feed *f, int place, int rows, int T) {
    assert(place >= 0 && place < f->places);
    DeviceBatch b =
        feed_batch_at(f->device_memory + feed_batch_bytes(f->max_tokens) * (size_t)place, rows, T);
    b.distinct = f->distinct[place];
    return b;
}

// Copies a slot to a place; what is put on the stream from now on finds it there.
static inline DeviceBatch feed_send(const Feed *f, int slot, int place, cudaStream_t stream) {
    const FeedSlot *s = &f->slot[slot];
    f->distinct[place] = s->batch.distinct;
    DeviceBatch b = feed_get(f, place, s->batch.rows, s->batch.T);
    CUDA_CHECK(cudaMemcpyAsync(b.tokens, s->memory, s->bytes, cudaMemcpyHostToDevice, stream));
    return b;
}

#endif
