// dump.h: the tensors of --dump, each whole or as its sketch (sketch.h), gathered for one file.
#ifndef LLMC_DUMP_H
#define LLMC_DUMP_H

#include "llmc/model.h"        // Table
#include "llmc/safetensors.h"  // StTensor, st_tensor, st_write
#include "llmc/sketch.h"       // sketch_compute

typedef struct {
    StTensor *tensor;               // (room), `count` of them in use
    double (*sketch)[SKETCH_SIZE];  // (room): of tensor i, when it is a sketch
    int count;
    bool sketches;
} Dump;

static inline void dump_init(Dump *d, int room, bool sketches) {
    d->tensor = (StTensor *)die_alloc((size_t)room, sizeof *d->tensor, "a dump");
    d->sketch = (double(*)[SKETCH_SIZE])die_alloc((size_t)room, sizeof *d->sketch, "a dump");
    d->count = 0, d->sketches = sketches;
}

static inline void dump_free(Dump *d) { free(d->tensor), free(d->sketch); }

// Adds a tensor as it is. Its data must stay where they are until the dump is written.
static inline void dump_add_whole(Dump *d, const char *name, StDtype dtype, int ndim,
                                  const uint64_t *shape, const void *data) {
    d->tensor[d->count++] = st_tensor(name, dtype, ndim, shape, data);
}

// Adds kind.name, a float tensor: whole, or its sketch as sketch.kind.name.
static inline void dump_add(Dump *d, const char *kind, const char *name, int ndim,
                            const uint64_t *shape, const float *data) {
    char full[64];
    uint64_t count = 1, size = SKETCH_SIZE;
    for (int i = 0; i < ndim; i++) count *= shape[i];
    snprintf(full, sizeof full, "%s%s%s%s", d->sketches ? "sketch." : "", kind, *name ? "." : "",
             name);
    if (!d->sketches) {
        dump_add_whole(d, full, ST_F32, ndim, shape, data);
        return;
    }
    sketch_compute(d->sketch[d->count], data, count);
    dump_add_whole(d, full, ST_F64, 1, &size, d->sketch[d->count]);
}

// Adds kind.name for every tensor of an arena laid out by the table.
static inline void dump_add_all(Dump *d, const char *kind, const Table *t, const float *arena) {
    for (int i = 0; i < t->count; i++) {
        const Tensor *x = &t->tensor[i];
        uint64_t shape[2] = {(uint64_t)x->rows, (uint64_t)x->cols};
        dump_add(d, kind, x->name, x->ndim, x->ndim == 2 ? shape : shape + 1, arena + x->offset);
    }
}

#endif
