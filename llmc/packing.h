// packing.h: best-fit packing of documents into rows of fixed length, on their lengths alone.
//
// A buffer holds up to 1000 documents in the order they came. A pick for the `space` left in a row
// is the longest document that fits; if none fits, the shortest, cropped to the space; the earliest
// of equal ones. The tail of a cropped document goes to the end of the buffer with a BOS put before
// it, or is dropped. Of each document the buffer knows whether its epoch is even or odd, and how
// many of either kind it holds (rows.h lets no third epoch in); the picks do not depend on it.
//
// A scan of 1000 lengths costs 2 us a pick (EPYC, gcc -O2), this buffer, kept by length, 0.1 us:
//     length 1..row   a list for each length, oldest first, and a bit that says it is not empty:
//                     longest that fits = highest bit <= space, shortest = lowest bit
//     length > row    these never fit, and are only ever "the shortest": a heap by (length, age)
// The order in the buffer matters only between equal lengths, where it is the order of arrival, so
// the lists give exactly the picks of the scan (dev/test/test_packing.c compares them).
// Memory: 44 KB for the buffer and 8 bytes for each length. A pick looks at row/64 words at most.
#ifndef LLMC_PACKING_H
#define LLMC_PACKING_H

#include <assert.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "llmc/die.h"  // die_alloc

#define PACK_BUFFER 1000

// A run of tokens of one shard: a document, or a part of one.
typedef struct {
    uint32_t shard;   // its number in the list of shards
    uint32_t start;   // its first token there
    uint32_t tokens;  // how many
    uint16_t bos;     // 1: a BOS that is not in the shard goes before them
    uint16_t odd;     // 1: of an odd epoch
} PackPiece;

typedef struct {
    int row;    // length of a row
    int count;  // documents in the buffer
    int of[2];  // of them, those of even epochs and those of odd ones
    PackPiece piece[PACK_BUFFER];
    uint64_t age[PACK_BUFFER];  // number of arrival
    int next[PACK_BUFFER];      // in the list of its length, or of unused places; -1 ends it
    int unused;                 // first unused place
    uint64_t arrived;           // documents put so far
    int *first, *last;          // (row + 1) ends of the list of each length
    uint64_t *filled;           // (row + 1) bits: this length's list is not empty
    int heap[PACK_BUFFER];      // documents longer than a row, the shortest on top
    int heaped;
} Packer;

static inline int64_t pack_length(PackPiece piece) { return (int64_t)piece.tokens + piece.bos; }

static inline void pack_clear(Packer *k) {
    k->count = k->of[0] = k->of[1] = k->heaped = k->unused = 0;
    k->arrived = 0;
    for (int i = 0; i < PACK_BUFFER; i++) k->next[i] = i + 1 < PACK_BUFFER ? i + 1 : -1;
    memset(k->filled, 0, ((size_t)k->row / 64 + 1) * sizeof *k->filled);
}

// An empty buffer for rows of `row` tokens.
static inline void pack_init(Packer *k, int row) {
    memset(k, 0, sizeof *k);
    k->row = row;
    k->first = (int *)die_alloc((size_t)row + 1, sizeof(int), "packing");
    k->last = (int *)die_alloc((size_t)row + 1, sizeof(int), "packing");
    k->filled = (uint64_t *)die_alloc((size_t)row / 64 + 1, sizeof(uint64_t), "packing");
    pack_clear(k);
}

static inline void pack_free(Packer *k) {
    free(k->first), free(k->last), free(k->filled);
    memset(k, 0, sizeof *k);
}

// ---------------------------------------------------------------------------------------------
// Documents longer than a row: a binary heap of places, ordered by length, then by age.

static inline bool pack_before(const Packer *k, int a, int b) {
    int64_t la = pack_length(k->piece[a]), lb = pack_length(k->piece[b]);
    return la != lb ? la < lb : k->age[a] < k->age[b];
}

static inline void pack_heap_push(Packer *k, int place) {
    int i = k->heaped++;
    for (int above; i > 0 && pack_before(k, place, k->heap[above = (i - 1) / 2]); i = above)
        k->heap[i] = k->heap[above];
    k->heap[i] = place;
}

static inline int pack_heap_pop(Packer *k) {
    int top = k->heap[0], moved = k->heap[--k->heaped], i = 0;
    for (int child; (child = 2 * i + 1) < k->heaped; i = child) {
        if (child + 1 < k->heaped && pack_before(k, k->heap[child + 1], k->heap[child])) child++;
        if (!pack_before(k, k->heap[child], moved)) break;
        k->heap[i] = k->heap[child];
    }
    k->heap[i] = moved;
    return top;
}

// ---------------------------------------------------------------------------------------------
// Documents of a length up to a row's: lists.

static inline void pack_list_push(Packer *k, int length, int place) {
    uint64_t bit = 1ull << (length % 64);
    k->next[place] = -1;
    if (k->filled[length / 64] & bit)
        k->next[k->last[length]] = place;
    else
        k->first[length] = place;
    k->last[length] = place;
    k->filled[length / 64] |= bit;
}

static inline int pack_list_pop(Packer *k, int length) {
    int place = k->first[length];
    k->first[length] = k->next[place];
    if (k->first[length] < 0) k->filled[length / 64] &= ~(1ull << (length % 64));
    return place;
}

// The longest length <= space that is there, or 0.
static inline int pack_longest(const Packer *k, int space) {
    uint64_t word = k->filled[space / 64] & (~0ull >> (63 - space % 64));
    for (int i = space / 64;; word = k->filled[--i]) {
        if (word) return 64 * i + 63 - __builtin_clzll(word);
        if (i == 0) return 0;
    }
}

// The shortest length that is there, or 0.
static inline int pack_shortest(const Packer *k) {
    for (int i = 0; i <= k->row / 64; i++)
        if (k->filled[i]) return 64 * i + __builtin_ctzll(k->filled[i]);
    return 0;
}

// ---------------------------------------------------------------------------------------------
// What the loader calls.

// Puts a document of at least one token at the end of the buffer, which must have a place for it.
static inline void pack_put(Packer *k, PackPiece piece) {
    int place = k->unused;
    assert(k->count < PACK_BUFFER && place >= 0 && pack_length(piece) > 0);
    k->unused = k->next[place];
    k->piece[place] = piece;
    k->age[place] = k->arrived++;
    k->count++, k->of[piece.odd]++;
    if (pack_length(piece) > k->row)
        pack_heap_push(k, place);
    else
        pack_list_push(k, (int)pack_length(piece), place);
}

// Takes the best fit for `space` (1..row) out of a buffer that is not empty, cropped if need be.
static inline PackPiece pack_take(Packer *k, int space, bool keep_tails) {
    assert(k->count > 0 && space > 0 && space <= k->row);
    int length = pack_longest(k, space);
    if (!length) length = pack_shortest(k);
    int place = length ? pack_list_pop(k, length) : pack_heap_pop(k);
    PackPiece head = k->piece[place], tail = head;
    k->next[place] = k->unused;
    k->unused = place;
    k->count--, k->of[head.odd]--;
    if (pack_length(head) <= space) return head;

    head.tokens = (uint32_t)space - head.bos;
    tail.start += head.tokens;
    tail.tokens -= head.tokens;
    tail.bos = 1;
    if (keep_tails) pack_put(k, tail);
    return head;
}

#endif
