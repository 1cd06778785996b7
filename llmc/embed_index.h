// embed_index.h: the positions of a micro-batch sorted by token, so that the gradient of an
// embedding table can be added up row by row, in one order, without atomics.
//
//     tokens      7  3  7  9  7  3            position   1 5 | 0 2 4 | 3
//                                             piece      3     7       9
//
// A token's positions, in ascending order, are cut into pieces of at most EMBED_PIECE. One piece is
// the work of a few threads. A token of one piece is added straight into its row of the gradient;
// the pieces of a token that is split (the commonest of a natural text is 4% of it) leave partial
// sums, which are added in order afterwards.
//
// The host builds the index, once for each micro-batch; the token embedding and every value
// embedding use it. It lies in one piece of memory of embed_index_bytes(n), laid out alike on host
// and device; how much there is of what changes with the tokens and stands in the memory, too.
#ifndef LLMC_EMBED_INDEX_H
#define LLMC_EMBED_INDEX_H

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

enum { EMBED_PIECE = 32 };

// Some occurrences of a token: position[first .. first+count).
typedef struct {
    int token, first, count;
    int partial;  // which partial sum they leave; -1: none, the token is not split
} EmbedPiece;

// A token whose pieces leave partial sums first .. first+count-1.
typedef struct {
    int token, first, count;
} EmbedSplit;

typedef struct {
    int pieces, splits;
} EmbedCounts;

typedef struct {
    EmbedCounts *counts;  // (1)
    int *position;        // (n)
    EmbedSplit *split;    // (embed_max_splits(n)), the first counts->splits are set
    EmbedPiece *piece;    // (n), the first counts->pieces are set
} EmbedIndex;

// A split token occurs EMBED_PIECE+1 times or more, and then has at most two pieces for each
// EMBED_PIECE+1 occurrences.
static inline int embed_max_splits(int n) { return n / (EMBED_PIECE + 1); }
static inline int embed_max_partials(int n) { return (int)(2LL * n / (EMBED_PIECE + 1)); }

// Each part starts at a multiple of 16 bytes: counts, positions, splits, pieces.
static inline size_t embed_index_align(size_t bytes) { return (bytes + 15) / 16 * 16; }
static inline size_t embed_index_bytes(int n) {
    return embed_index_align(sizeof(EmbedCounts)) + embed_index_align((size_t)n * sizeof(int)) +
           embed_index_align((size_t)embed_max_splits(n) * sizeof(EmbedSplit)) +
           (size_t)n * sizeof(EmbedPiece);
}

// The index of n positions in `memory`, which starts at a multiple of 16 bytes.
static inline EmbedIndex embed_index_at(void *memory, int n) {
    EmbedIndex index;
    char *at = (char *)memory;
    index.counts = (EmbedCounts *)at, at += embed_index_align(sizeof(EmbedCounts));
    index.position = (int *)at, at += embed_index_align((size_t)n * sizeof(int));
    index.split = (EmbedSplit *)at;
    at += embed_index_align((size_t)embed_max_splits(n) * sizeof(EmbedSplit));
    index.piece = (EmbedPiece *)at;
    return index;
}

// Builds the index of n tokens, each of 0 .. V-1. Returns how many of its bytes are in use.
static inline size_t embed_index_build(void *memory,       // (embed_index_bytes(n))
                                       const int *tokens,  // (n)
                                       int n, int V, int *counts /* (V) scratch */) {
    EmbedIndex index = embed_index_at(memory, n);
    int first = 0, pieces = 0, splits = 0, partials = 0;
    memset(counts, 0, (size_t)V * sizeof *counts);
    for (int t = 0; t < n; t++) counts[tokens[t]]++;
    for (int v = 0; v < V; v++) {
        int count = counts[v], end = first + count;
        bool split = count > EMBED_PIECE;
        if (split) {
            EmbedSplit s = {v, partials, (count + EMBED_PIECE - 1) / EMBED_PIECE};
            index.split[splits++] = s;
        }
        counts[v] = first;  // from here on: where the next occurrence goes
        for (; first < end; first += EMBED_PIECE) {
            int left = end - first;
            EmbedPiece p = {v, first, left < EMBED_PIECE ? left : EMBED_PIECE,
                            split ? partials++ : -1};
            index.piece[pieces++] = p;
        }
        first = end;
    }
    for (int t = 0; t < n; t++) index.position[counts[tokens[t]]++] = t;
    index.counts->pieces = pieces, index.counts->splits = splits;
    return (size_t)((char *)(index.piece + pieces) - (char *)memory);
}

// How many different tokens there are: those of one piece, and those that are split.
static inline int embed_index_distinct(EmbedIndex index) {
    int splits = index.counts->splits, partials = 0;
    if (splits) partials = index.split[splits - 1].first + index.split[splits - 1].count;
    return index.counts->pieces - partials + splits;
}

#endif
