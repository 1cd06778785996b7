// rows.h: the one sequence of rows that a run trains on, and any place in it.
//
// The sequence is endless, a pure function of (seed, shards, T, packing, tails), and numbered from
// the start of the run. Epoch e visits the shards in a Fisher-Yates order drawn from Philox
// (seed, e):
//     for i = n-1 down to 1: j = word i * (i+1) >> 32, swap order[i] and order[j]
// and makes rows of T+1 tokens (inputs row[0..T), targets row[1..T]):
//     bestfit   documents in file order go through the buffer of packing.h; each row starts with a
//               BOS; tokens before a shard's first BOS are a document, with a BOS put before it;
//               those of epoch e+1 follow right after those of epoch e, but wait until none of
//               epoch e-1 is left in the buffer
//     stream    row r of a shard is its tokens [rT, rT+T]
// Documents longer than a row gather in the buffer, as they never fit. Were it to drain at the end
// of an epoch, the last rows would be of these alone: of 50M tokens of FineWeb, T 2048, 64 rows a
// step, steps 310 to 380 had 80 BOS a step in place of 150, and at step 380 the validation loss was
// 0.03 higher. Without a bound, few documents would fill it with copies of the longest, which would
// never be picked. The bound has its price: it drains the buffer at the end of each epoch but the
// first (the last 12% of their rows there), and where an epoch has less than 500 documents, two
// epochs are in the buffer from the start, and a document and its copy come one after the other.
//
// A row is planned on lengths; rows_copy reads its tokens. A shard is scanned to its end before a
// row is made of it, so a bad token is found before any row of its shard. rows_scan_ahead scans the
// next shard in small parts, for a caller that has time. One thread at a time.
//
// Going to a row counts (stream), or plans all rows since the start again (bestfit) on lengths: 12M
// documents and 2 G tokens/s, or what reading the shards takes. Memory: 4 bytes a document of two
// shards, and the packer's 44 KB.
//
// Functions return 0, or -1 with a sentence in io_error; where they return more, it is said there.
#ifndef LLMC_ROWS_H
#define LLMC_ROWS_H

#include "llmc/packing.h"  // pack_put, pack_take
#include "llmc/rand.h"     // rand_u32
#include "llmc/shards.h"   // shards_open, shards_read, shards_scan

typedef struct {
    const char *pattern;  // files or patterns, separated by commas
    int T, V, bos;        // tokens a row, size of the vocabulary, the token that starts a document
    bool bestfit;         // else stream
    bool keep_tails;      // bestfit: the tail of a cropped document is packed again
    uint64_t seed;        // of the order of shards; its low 32 bits count
} RowsConfig;

// One row: which tokens it is made of, in order.
typedef struct {
    uint64_t epoch, number;  // bestfit: the epoch that fills the buffer; from 0, at the run's start
    PackPiece *piece;        // (pieces)
    int pieces, room;
} Row;

typedef struct {
    RowsConfig config;
    ShardList shards;
    char *description;      // the packing and every shard, on one line: rows_describe
    uint64_t fingerprint;   // a hash of it
    uint64_t number;        // of the next row
    Packer packer;          // bestfit
    ShardIndex now, ahead;  // the shard that rows are made of, and the next one
    uint64_t epoch;         // of `now`
    int64_t taken;          // documents (bestfit) or rows (stream) taken from `now`
    uint64_t visit;         // of `ahead`: epoch * shards + place in the epoch's order
    int *order;             // (shards) order of the epoch of `ahead`
} Rows;

// ---------------------------------------------------------------------------------------------
// From shard to shard.

static inline void rows_draw_order(Rows *s, uint64_t epoch) {
    RandKey key = {(uint32_t)s->config.seed, (uint32_t)epoch, RAND_SHUFFLE};
    for (int i = 0; i < s->shards.count; i++) s->order[i] = i;
    for (int i = s->shards.count - 1; i > 0; i--) {
        int j = (int)((uint64_t)rand_u32(key, (uint64_t)i) * (uint64_t)(i + 1) >> 32);
        int swapped = s->order[i];
        s->order[i] = s->order[j], s->order[j] = swapped;
    }
}

// Makes the shard of visit number v the next one.
static inline void rows_look_ahead(Rows *s, uint64_t v) {
    uint64_t n = (uint64_t)s->shards.count;
    if (v % n == 0) rows_draw_order(s, v / n);
    s->visit = v;
    shards_index_reset(&s->ahead, s->order[v % n]);
}

// Scans a part of the next shard. Returns 1 when there is more, 0 when it is done, -1 on an error,
// which the sequence meets again when it gets there.
static inline int rows_scan_ahead(Rows *s) {
    if (shards_scanned(&s->shards, &s->ahead)) return 0;
    return shards_scan(&s->shards, &s->ahead, s->config.bos, s->config.V) ? -1 : 1;
}

static inline int rows_next_shard(Rows *s) {
    int more;
    while ((more = rows_scan_ahead(s)) > 0) continue;
    if (more < 0) return -1;
    ShardIndex done = s->now;
    s->now = s->ahead, s->ahead = done;
    s->taken = 0, s->epoch = s->visit / (uint64_t)s->shards.count;
    rows_look_ahead(s, s->visit + 1);
    return 0;
}

// True when `now` is the last shard of its epoch.
static inline bool rows_last_shard(const Rows *s) {
    return s->visit % (uint64_t)s->shards.count == 0;
}

// ---------------------------------------------------------------------------------------------
// Planning a row.

// Takes the next document of the shard in work; false: it has no more.
static inline bool rows_document(Rows *s, PackPiece *out) {
    const ShardIndex *index = &s->now;
    bool headless = index->count == 0 || index->start[0] > 0;  // starts inside a document
    int64_t i = s->taken - headless;                           // which BOS starts this one
    if (i >= index->count) return false;
    int64_t tokens = s->shards.shard[index->shard].tokens;
    int64_t start = i < 0 ? 0 : index->start[i];
    int64_t end = i + 1 < index->count ? index->start[i + 1] : tokens;
    out->shard = (uint32_t)index->shard;
    out->start = (uint32_t)start, out->tokens = (uint32_t)(end - start);
    out->bos = i < 0, out->odd = s->epoch % 2;
    s->taken++;
    return true;
}

// Fills the buffer, as far as the next document need not wait.
static inline int rows_fill(Rows *s) {
    PackPiece piece;
    while (s->packer.count < PACK_BUFFER) {
        if (rows_document(s, &piece))
            pack_put(&s->packer, piece);
        else if (rows_last_shard(s) && s->packer.of[(s->epoch + 1) % 2])
            return 0;  // of the epoch before this one
        else if (rows_next_shard(s))
            return -1;
    }
    return 0;
}

static inline void rows_add_piece(Row *row, PackPiece piece) {
    if (row->pieces == row->room) {
        row->room = row->room ? 2 * row->room : 8;
        row->piece = (PackPiece *)realloc(row->piece, (size_t)row->room * sizeof piece);
        if (!row->piece) die(EXIT_INTERNAL, "out of memory for %d documents of a row", row->room);
    }
    row->piece[row->pieces++] = piece;
}

static inline int rows_plan_bestfit(Rows *s, Row *row) {
    for (int space = s->config.T + 1; space > 0;) {
        if (rows_fill(s)) return -1;
        PackPiece piece = pack_take(&s->packer, space, s->config.keep_tails);
        rows_add_piece(row, piece);
        space -= (int)pack_length(piece);
    }
    return 0;
}

// How many rows of stream so many tokens make.
static inline int64_t rows_of_stream(int64_t tokens, int T) { return (tokens - 1) / T; }

static inline int rows_plan_stream(Rows *s, Row *row) {
    int64_t T = s->config.T;
    while (s->taken >= rows_of_stream(s->shards.shard[s->now.shard].tokens, s->config.T))
        if (rows_next_shard(s)) return -1;
    PackPiece piece = {(uint32_t)s->now.shard, (uint32_t)(T * s->taken++), (uint32_t)T + 1, 0, 0};
    rows_add_piece(row, piece);
    return 0;
}

// ---------------------------------------------------------------------------------------------
// The sequence.

// Tokens of an epoch, and the BOS put before a shard's first ones.
static inline int64_t rows_tokens(const Rows *s) {
    int64_t tokens = s->shards.tokens;
    for (int i = 0; i < s->shards.count; i++) tokens += s->shards.shard[i].first != s->config.bos;
    return tokens;
}

// Plans the next row.
static inline int rows_next(Rows *s, Row *row) {
    row->pieces = 0;
    if (s->config.bestfit ? rows_plan_bestfit(s, row) : rows_plan_stream(s, row)) return -1;
    row->epoch = s->epoch, row->number = s->number++;
    return 0;
}

// Reads the tokens of a row into tokens[0..T].
static inline int rows_copy(Rows *s, const Row *row, uint16_t *tokens) {
    for (const PackPiece *p = row->piece; p < row->piece + row->pieces; tokens += p->tokens, p++) {
        if (p->bos) *tokens++ = (uint16_t)s->config.bos;
        if (shards_read(&s->shards, (int)p->shard, tokens, p->tokens, p->start)) return -1;
    }
    return 0;
}

static inline int rows_seek_bestfit(Rows *s, uint64_t number, const bool *stop) {
    Row row;
    memset(&row, 0, sizeof row);
    pack_clear(&s->packer);
    rows_look_ahead(s, 0);
    int failed = rows_next_shard(s);
    while (!failed && s->number < number && !__atomic_load_n(stop, __ATOMIC_RELAXED))
        failed = rows_next(s, &row);
    free(row.piece);
    return failed;
}

static inline int rows_seek_stream(Rows *s, uint64_t number) {
    uint64_t rows = 0;  // of an epoch, then of a shard
    for (int i = 0; i < s->shards.count; i++)
        rows += (uint64_t)rows_of_stream(s->shards.shard[i].tokens, s->config.T);
    uint64_t epoch = number ? (number - 1) / rows : 0, left = number - epoch * rows;
    for (uint64_t v = epoch * (uint64_t)s->shards.count;; v++, left -= rows) {
        rows_look_ahead(s, v);
        rows = (uint64_t)rows_of_stream(s->shards.shard[s->ahead.shard].tokens, s->config.T);
        if (left <= rows) break;
    }
    if (rows_next_shard(s)) return -1;
    s->taken = (int64_t)left, s->number = number;
    return 0;
}

// Goes to the row after the first `number`; `epoch` is that of the last of them. Returns early, and
// nowhere, when another thread sets *stop. A number that the epochs cannot hold is refused at once
// (each row has one BOS at most that no shard has, a tail's, so T of its tokens are an epoch's),
// any other that is not of this epoch when it is found.
static inline int rows_seek(Rows *s, uint64_t epoch, uint64_t number, const bool *stop) {
    uint64_t tokens = (uint64_t)rows_tokens(s);
    s->epoch = s->number = 0;
    if (epoch <= UINT32_MAX && number / (epoch + 1) <= tokens / (uint64_t)s->config.T) {
        if (s->config.bestfit ? rows_seek_bestfit(s, number, stop) : rows_seek_stream(s, number))
            return -1;
        if (s->epoch == epoch || __atomic_load_n(stop, __ATOMIC_RELAXED)) return 0;
    }
    return shards_fail(
        "row %llu of epoch %llu: found %llu tokens an epoch in these shards, expected that row in "
        "that epoch; the checkpoint's place in the data is damaged, start from another",
        (unsigned long long)number, (unsigned long long)epoch, (unsigned long long)tokens);
}

// ---------------------------------------------------------------------------------------------
// Opening.

// One line that names the packing and every shard with its tokens and hash:
//     T 2048 endless bestfit keep bos 50256; train_000.bin 49999576 c0ffee0123456789; ...
// "endless": rows are numbered through all epochs. Saves without the word count them in each epoch.
static inline void rows_describe(Rows *s) {
    const RowsConfig *c = &s->config;
    size_t room = 128, n;
    for (int i = 0; i < s->shards.count; i++) room += strlen(s->shards.shard[i].name) + 64;
    char *text = (char *)die_alloc(room, 1, "the description of the shards");
    n = (size_t)snprintf(text, room, "T %d endless %s", c->T, c->bestfit ? "bestfit" : "stream");
    if (c->bestfit)
        n += (size_t)snprintf(text + n, room - n, " %s bos %d", c->keep_tails ? "keep" : "drop",
                              c->bos);
    for (int i = 0; i < s->shards.count; i++) {
        Shard *shard = &s->shards.shard[i];
        n += (size_t)snprintf(text + n, room - n, "; %s %lld %016llx", shard->name,
                              (long long)shard->tokens, (unsigned long long)shard->hash);
    }
    s->description = text;
    s->fingerprint = shards_hash(SHARD_HASH_START, text, n);
}

// Fails unless an epoch has a row.
static inline int rows_require_one(const Rows *s) {
    const RowsConfig *c = &s->config;
    int64_t longest = 0;
    for (int i = 0; i < s->shards.count; i++)
        longest = s->shards.shard[i].tokens > longest ? s->shards.shard[i].tokens : longest;
    int64_t found = c->bestfit ? rows_tokens(s) : longest;
    if (found > c->T) return 0;
    return shards_fail(
        "%s: byte 8: found %lld tokens in %s of %d shard%s, expected at least %d for one "
        "row; give more text or a smaller --seq-len",
        s->shards.shard[0].file.path, (long long)found, c->bestfit ? "all" : "the longest",
        s->shards.count, s->shards.count == 1 ? "" : "s", c->T + 1);
}

static inline void rows_free(Rows *s) {
    shards_index_free(&s->now), shards_index_free(&s->ahead);
    pack_free(&s->packer);
    shards_free(&s->shards);
    free(s->order), free(s->description);
    memset(s, 0, sizeof *s);
}

// Opens and checks all shards. rows_seek comes next.
static inline int rows_open(Rows *s, const RowsConfig *config) {
    memset(s, 0, sizeof *s);
    s->config = *config;
    if (shards_open(&s->shards, config->pattern)) return -1;
    bool good = !config->bestfit || !shards_require_bos(&s->shards, config->bos);
    if (!good || rows_require_one(s)) {
        shards_free(&s->shards);
        return -1;
    }
    rows_describe(s);
    s->order = (int *)die_alloc((size_t)s->shards.count, sizeof(int), "the order of the shards");
    pack_init(&s->packer, config->T + 1);
    return 0;
}

#endif
