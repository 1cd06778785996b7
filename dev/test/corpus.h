// corpus.h: small random shards for the tests of the data path, and the rows they must give.
//
// plain_rows makes the rows as plainly as they are defined, and slowly: documents with their tokens
// in a list, a scan of the whole buffer for each pick, tokens moved by hand. It shares no code with
// llmc/rows.h and llmc/packing.h but the random numbers.
#ifndef DEV_TEST_CORPUS_H
#define DEV_TEST_CORPUS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dev/test/test.h"  // test_make_dir
#include "llmc/rand.h"      // rand_u32
#include "llmc/rows.h"      // RowsConfig

enum { CORPUS_SHARDS = 48, CORPUS_V = 60000, CORPUS_BOS = 59999 };

typedef struct {
    char dir[256], pattern[300];
    int shards;
    int count[CORPUS_SHARDS];
    uint16_t *token[CORPUS_SHARDS];  // by name: s00.bin, s01.bin, ...
} Corpus;

// A random number below n; the n-th call of a test gives the n-th number.
static uint64_t corpus_drawn;
static inline int below(int n) {
    RandKey key = {12345, 0, RAND_PARAMETER};
    return (int)((uint64_t)rand_u32(key, corpus_drawn++) * (uint64_t)n >> 32);
}

static inline void write_bytes(const char *path, const void *data, size_t count) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, count, f) != count || fclose(f)) perror(path), exit(1);
}

static inline void write_shard(const char *path, const uint16_t *tokens, int count) {
    size_t size = 1024 + 2 * (size_t)count;
    int32_t *bytes = (int32_t *)calloc(1, size);
    bytes[0] = 20240520, bytes[1] = 1, bytes[2] = count;
    memcpy((char *)bytes + 1024, tokens, 2 * (size_t)count);
    write_bytes(path, bytes, size);
    free(bytes);
}

static inline const char *corpus_path(const Corpus *c, int s) {
    static char path[300];
    snprintf(path, sizeof path, "%s/s%02d.bin", c->dir, s);
    return path;
}

static inline void corpus_write(const Corpus *c) {
    for (int s = 0; s < c->shards; s++) write_shard(corpus_path(c, s), c->token[s], c->count[s]);
}

// Shards with count[s] tokens, in documents of 1..longest tokens, BOS included; the other tokens
// are 0, 1, 2, ... over all shards, so that each says where it came from. With `headless` every
// shard but the first starts inside a document.
static inline Corpus corpus_make(int shards, const int *count, int longest, bool headless) {
    Corpus c;
    memset(&c, 0, sizeof c);
    snprintf(c.dir, sizeof c.dir, "%s", test_make_dir());
    snprintf(c.pattern, sizeof c.pattern, "%s/s*.bin", c.dir);
    c.shards = shards;
    for (int s = 0, number = 0; s < shards; s++) {
        c.count[s] = count[s];
        c.token[s] = (uint16_t *)calloc((size_t)count[s], sizeof(uint16_t));
        for (int i = 0, left = headless && s ? 1 + below(longest) : 0; i < count[s]; i++, left--) {
            c.token[s][i] = left ? (uint16_t)(number++ % CORPUS_BOS) : CORPUS_BOS;
            if (!left) left = 1 + below(longest);
        }
    }
    corpus_write(&c);
    return c;
}

// Three shards of unequal length, the later two starting inside a document.
static inline Corpus corpus_three(void) {
    int count[] = {300, 90, 511};
    return corpus_make(3, count, 30, true);
}

static inline void corpus_free(Corpus *c) {
    test_remove_dir(c->dir);
    for (int s = 0; s < c->shards; s++) free(c->token[s]);
}

static inline RowsConfig corpus_config(const Corpus *c, int T, bool bestfit, bool keep_tails) {
    RowsConfig config = {c->pattern, T, CORPUS_V, CORPUS_BOS, bestfit, keep_tails, 7};
    return config;
}

// ---------------------------------------------------------------------------------------------
// The rows by plain means.

typedef struct {
    uint16_t *token;
    int count, epoch;
} PlainDocument;

typedef struct {
    PlainDocument *item;
    int count, room;
} PlainList;

static inline void plain_add(PlainList *list, bool bos, const uint16_t *token, int count,
                             int epoch) {
    if (list->count == list->room) {
        list->room = 2 * list->room + 16;
        list->item = (PlainDocument *)realloc(list->item, sizeof *list->item * (size_t)list->room);
    }
    PlainDocument d = {(uint16_t *)malloc(2 * (size_t)(count + 1)), 0, epoch};
    if (bos) d.token[d.count++] = CORPUS_BOS;
    memcpy(d.token + d.count, token, 2 * (size_t)count);
    d.count += count;
    list->item[list->count++] = d;
}

static inline void plain_remove(PlainList *list, int i) {
    free(list->item[i].token);
    list->count--;
    memmove(list->item + i, list->item + i + 1, sizeof *list->item * (size_t)(list->count - i));
}

static inline void plain_order(int *order, int shards, uint64_t seed, uint64_t epoch) {
    RandKey key = {(uint32_t)seed, (uint32_t)epoch, RAND_SHUFFLE};
    for (int i = 0; i < shards; i++) order[i] = i;
    for (int i = shards - 1; i > 0; i--) {
        int j = (int)(((uint64_t)rand_u32(key, (uint64_t)i) * (uint64_t)(i + 1)) >> 32),
            kept = order[i];
        order[i] = order[j], order[j] = kept;
    }
}

static inline PlainList plain_documents(const Corpus *c, uint64_t seed, int epoch) {
    PlainList list = {NULL, 0, 0};
    int order[CORPUS_SHARDS];
    plain_order(order, c->shards, seed, (uint64_t)epoch);
    for (int o = 0; o < c->shards; o++) {
        const uint16_t *token = c->token[order[o]];
        for (int i = 0, end, n = c->count[order[o]]; i < n; i = end) {
            for (end = i + 1; end < n && token[end] != CORPUS_BOS;) end++;
            plain_add(&list, token[i] != CORPUS_BOS, token + i, end - i, epoch);
        }
    }
    return list;
}

// What to pick for the space left.
static inline int plain_pick(const PlainList *buffer, int space) {
    int best = -1;
    for (int i = 0; i < buffer->count; i++)
        if (buffer->item[i].count <= space &&
            (best < 0 || buffer->item[i].count > buffer->item[best].count))
            best = i;
    if (best >= 0) return best;
    for (int i = 0; i < buffer->count; i++)
        if (best < 0 || buffer->item[i].count < buffer->item[best].count) best = i;
    return best;
}

// Makes room for one more row after `count` rows of n tokens; returns its place.
static inline uint16_t *plain_row(uint16_t **rows, int count, int n) {
    if ((count & (count - 1)) == 0)
        *rows = (uint16_t *)realloc(*rows, 2 * (size_t)n * (size_t)(count ? 2 * count : 1));
    return *rows + (size_t)count * (size_t)n;
}

static inline void plain_clear(PlainList *list) {
    while (list->count) plain_remove(list, list->count - 1);
    free(list->item);
    memset(list, 0, sizeof *list);
}

static inline bool plain_holds(const PlainList *buffer, int epoch) {
    bool found = false;
    for (int i = 0; i < buffer->count; i++) found |= buffer->item[i].epoch == epoch;
    return found;
}

// Makes rows (count, T+1), which grow, until documents of epoch `epochs` would enter the buffer.
static inline uint16_t *plain_bestfit(const Corpus *c, const RowsConfig *config, int epochs,
                                      int *ends) {
    PlainList entering = plain_documents(c, config->seed, 0), buffer = {NULL, 0, 0};
    uint16_t *rows = NULL, *row = NULL;
    for (int n = config->T + 1, epoch = 0, next = 0, count = 0, filled = n;;) {
        if (filled == n) row = plain_row(&rows, count, n), filled = 0;
        while (buffer.count < 1000) {
            if (next < entering.count) {
                PlainDocument *d = &entering.item[next++];
                plain_add(&buffer, false, d->token, d->count, d->epoch);
                continue;
            }
            if (plain_holds(&buffer, epoch - 1)) break;
            plain_clear(&entering);
            ends[epoch++] = count, next = 0;
            if (epoch == epochs) {
                plain_clear(&buffer);
                return rows;
            }
            entering = plain_documents(c, config->seed, epoch);
        }
        int i = plain_pick(&buffer, n - filled);
        PlainDocument d = buffer.item[i];
        int taken = d.count < n - filled ? d.count : n - filled;
        memcpy(row + filled, d.token, 2 * (size_t)taken);
        if (taken < d.count && config->keep_tails)
            plain_add(&buffer, true, d.token + taken, d.count - taken, d.epoch);
        plain_remove(&buffer, i);
        filled += taken;
        count += filled == n;
    }
}

static inline uint16_t *plain_stream(const Corpus *c, const RowsConfig *config, int epochs,
                                     int *ends) {
    uint16_t *rows = NULL;
    int order[CORPUS_SHARDS], T = config->T, count = 0;
    for (int e = 0; e < epochs; ends[e++] = count) {
        plain_order(order, c->shards, config->seed, (uint64_t)e);
        for (int o = 0; o < c->shards; o++)
            for (int r = 0; (r + 1) * T < c->count[order[o]]; r++, count++)
                memcpy(plain_row(&rows, count, T + 1), c->token[order[o]] + r * T,
                       2 * (size_t)(T + 1));
    }
    return rows;
}

// The rows of the first `epochs` epochs, (count, T+1); ends[e] = rows up to and with epoch e. A row
// of bestfit is of the epoch that fills the buffer when the row is done.
static inline uint16_t *plain_rows(const Corpus *c, const RowsConfig *config, int epochs,
                                   int *ends) {
    return config->bestfit ? plain_bestfit(c, config, epochs, ends)
                           : plain_stream(c, config, epochs, ends);
}

#endif
