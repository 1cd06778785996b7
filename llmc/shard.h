// shard.h: who owns what where several ranks train one model. Each rank computes gradients of its
// own rows, with all weights; a piece of the parameters is updated by the one rank that owns it,
// which alone keeps its optimizer state (ZeRO, Rajbhandari et al. 2020, stage 1):
//
//     gradients of all ranks --sum--> the owner of a piece --update--> weights, to all ranks
//
//     Muon's matrices    whole, as Polar Express needs all of one: longest first, each to the rank
//                        with the least to do so far (Graham 1969: at most 4/3 of the best)
//     tables             (wte, value_embed, lm_head) by rows, as many to each rank
//     what is small      (gates, lambdas) to all: every rank updates it, with the same bits
//
// The plan depends on the table and the number of ranks alone, so every rank makes it by itself.
// Of one rank it is the table: every piece is a whole tensor, at the same place.
//
// A rank's own numbers (optimizer state, summed gradients, FP32 masters beside BF16 weights) are in
// arenas of its pieces only, in the table's order, laid out as the table's are.
#ifndef LLMC_SHARD_H
#define LLMC_SHARD_H

#include <assert.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llmc/die.h"    // die_alloc
#include "llmc/model.h"  // Table, Tensor, table_align

// As many ranks as a save has room for files of (CKPT_FILES_MAX), beside the parameters'.
enum { SHARD_ALL = -1, SHARD_MAX_RANKS = 255 };

// Rows row .. row + rows - 1 of a tensor, and who owns them.
typedef struct {
    const Tensor *tensor;
    int owner;           // a rank, or SHARD_ALL
    int row, rows;       // all of them, but of tables
    size_t offset;       // where they start in the table's arena, in elements
    size_t count;        // elements
    size_t at;           // where they start in this rank's arena, if it owns them
    size_t state;        // where their second state starts in its arena of those
    size_t state_count;  // its elements
    size_t state_first;  // and the first of them among the tensor's
} Piece;

// What a rank has: elements of its two arenas, and FLOPs of Polar Express a step.
typedef struct {
    size_t numel, state_numel;
    double flops;
} ShardRank;

// The plan, as rank `rank` sees it.
typedef struct {
    int rank, world, count;
    Piece *piece;                     // (count), in the table's order
    int first[MODEL_MAX_LAYERS + 3];  // (blocks + 1): where each block's pieces begin, and the end
    ShardRank *share;                 // (world): what each rank has
} ShardPlan;

static inline bool shard_owns(const Piece *p, int rank) {
    return p->owner == rank || p->owner == SHARD_ALL;
}

// The next piece of this rank from piece i on; s->count: there is none.
static inline int shard_next(const ShardPlan *s, int i) {
    while (i < s->count && !shard_owns(&s->piece[i], s->rank)) i++;
    return i;
}

// The first piece of the tensor of that role, NULL where the model has none.
static inline const Piece *shard_find(const ShardPlan *s, Role role, int layer) {
    for (const Piece *p = s->piece; p < s->piece + s->count; p++)
        if (p->tensor->role == role && p->tensor->layer == layer) return p;
    return NULL;
}

// FLOPs of Polar Express on a matrix, side s and length l: five steps of A = X X^T, A^2, and (b A +
// c A^2) X.
static inline double shard_muon_flops(const Tensor *x) {
    double s = fmin(x->rows, x->cols), l = fmax(x->rows, x->cols);
    return 5 * (2 * s * s * l + 2 * s * s * s + 2 * s * s * l);
}

// Tensors that every rank updates: what is small, and what is not updated at all.
static inline bool shard_is_small(const Tensor *x) { return x->ndim == 1 || x->role == VE_GATE; }
static inline bool shard_is_whole(const Tensor *x) { return x->group == GROUP_MATRIX; }

// A matrix and its cost, to be sorted: the most expensive first, of equal ones the table's first.
typedef struct {
    int tensor;
    double flops;
} ShardWork;

static inline int shard_by_work(const void *a, const void *b) {
    const ShardWork *x = (const ShardWork *)a, *y = (const ShardWork *)b;
    if (x->flops != y->flops) return x->flops > y->flops ? -1 : 1;
    return x->tensor - y->tensor;
}

// owner[i]: of each of Muon's matrices. Adds to the ranks' FLOPs.
static inline void shard_assign(ShardPlan *s, const Table *t, int *owner /* (t->count) */) {
    ShardWork *work = (ShardWork *)die_alloc((size_t)t->count, sizeof *work, "Muon's matrices");
    int count = 0;
    for (int i = 0; i < t->count; i++) {
        const Tensor *x = &t->tensor[i];
        if (!shard_is_whole(x) || shard_is_small(x)) continue;
        work[count].tensor = i, work[count++].flops = shard_muon_flops(x);
    }
    qsort(work, (size_t)count, sizeof *work, shard_by_work);
    for (int i = 0; i < count; i++) {
        int least = 0;
        for (int r = 1; r < s->world; r++)
            if (s->share[r].flops < s->share[least].flops) least = r;
        owner[work[i].tensor] = least;
        s->share[least].flops += work[i].flops;
    }
    free(work);
}

// Adds rows row .. row + rows - 1 of a tensor.
static inline void shard_add(ShardPlan *s, const Tensor *x, int owner, int row, int rows) {
    Piece *p = &s->piece[s->count++];
    bool whole = rows == x->rows;
    size_t cols = (size_t)x->cols;
    p->tensor = x, p->owner = owner, p->row = row, p->rows = rows;
    p->offset = x->offset + (size_t)row * cols, p->count = (size_t)rows * cols;
    p->state_count = whole ? x->state_count : p->count;
    p->state_first = whole ? 0 : (size_t)row * cols;
}

// Lays the arenas of `rank` out, for their sizes; keep: also for the places of its pieces.
static inline void shard_place(ShardPlan *s, int rank, bool keep) {
    ShardRank *r = &s->share[rank];
    int block = 0;
    r->numel = r->state_numel = 0;
    for (int i = 0; i < s->count; i++) {
        Piece *p = &s->piece[i];
        for (; block < p->tensor->block; block++)
            r->numel = table_align(r->numel, TABLE_BLOCK_ALIGN);
        if (!shard_owns(p, rank)) continue;
        if (keep) p->at = r->numel, p->state = r->state_numel;
        r->numel += table_align(p->count, TABLE_ALIGN);
        r->state_numel += table_align(p->state_count, TABLE_ALIGN);
    }
    r->numel = table_align(r->numel, TABLE_BLOCK_ALIGN);
}

// The plan for rank `rank` of `world`; shard_free releases it. The table must stay where it is.
static inline void shard_init(ShardPlan *s, const Table *t, int rank, int world) {
    memset(s, 0, sizeof *s);
    assert(world >= 1 && world <= SHARD_MAX_RANKS && rank >= 0 && rank < world);
    s->rank = rank, s->world = world;
    s->share = (ShardRank *)die_alloc((size_t)world, sizeof *s->share, "the plan of ranks");
    s->piece = (Piece *)die_alloc((size_t)t->count * (size_t)world, sizeof *s->piece, "pieces");
    int *owner = (int *)die_alloc((size_t)t->count, sizeof *owner, "owners"), block = 0;
    shard_assign(s, t, owner);
    for (int i = 0; i < t->count; i++) {
        const Tensor *x = &t->tensor[i];
        while (block < x->block) s->first[++block] = s->count;
        if (shard_is_small(x) || shard_is_whole(x) || world == 1) {
            shard_add(s, x, shard_is_small(x) ? SHARD_ALL : owner[i], 0, x->rows);
            continue;
        }
        for (int r = 0; r < world; r++) {
            int from = (int)((int64_t)x->rows * r / world);
            int to = (int)((int64_t)x->rows * (r + 1) / world);
            if (to > from) shard_add(s, x, r, from, to - from);
        }
    }
    while (block < t->blocks) s->first[++block] = s->count;
    for (int r = 0; r < world; r++) shard_place(s, r, r == rank);
    free(owner);
}

// table_find_nonfinite of gradients, for this rank's pieces alone; *place tells ranks which of them
// backward came to first.
static inline const Tensor *shard_find_nonfinite(const ShardPlan *s,
                                                 const float *sums /* (numel) */, int *place) {
    const Tensor *found = NULL;
    *place = table_no_place(true);
    for (int i = shard_next(s, 0); i < s->count; i = shard_next(s, i + 1)) {
        const Piece *p = &s->piece[i];
        size_t from = (size_t)p->row * (size_t)p->tensor->cols;
        if (tensor_find_nonfinite(p->tensor, sums + p->at, from, p->count, true, place))
            found = p->tensor;
    }
    return found;
}

static inline void shard_free(ShardPlan *s) {
    free(s->piece), free(s->share);
    memset(s, 0, sizeof *s);
}

#endif
