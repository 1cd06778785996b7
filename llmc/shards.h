// shards.h: token shards: which files they are, whether they are whole, and where documents start.
//
// The format is that of llm.c and of the public FineWeb/GPT-2 shards, little-endian:
//     byte 0     int32 magic 20240520
//     byte 4     int32 version 1
//     byte 8     int32 number of tokens
//     byte 12    int32 0 x 253
//     byte 1024  uint16 tokens
// Opening reads a header and 8 KB of tokens of each shard, not the rest: 200 shards of 100M tokens
// open in 10 ms. The tokens themselves are read when a row needs them, with pread, through at most
// 16 open files; nothing is mapped, nothing is kept.
//
// Functions return 0, or -1 with a sentence in io_error that names the file, the byte, what was
// found, what was expected and what to do. They die for lack of memory only: threads call them too.
#ifndef LLMC_SHARDS_H
#define LLMC_SHARDS_H

#include <glob.h>
#include <stdarg.h>

#include "llmc/die.h"  // die, die_alloc, die_strdup
#include "llmc/io.h"   // io_open_read, io_read_at, io_error

#define SHARD_MAGIC      20240520
#define SHARD_VERSION    1
#define SHARD_HEADER     1024       // bytes before the first token
#define SHARD_SAMPLE     2048       // tokens at each end that go into the hash
#define SHARD_CHUNK      (1 << 18)  // tokens scanned at once
#define SHARD_OPEN_FILES 16
#define SHARD_HASH_START 0xcbf29ce484222325ull

typedef struct {
    IoFile file;       // .path for messages; open or not
    const char *name;  // the path without its folders: what a checkpoint remembers
    int64_t tokens;
    uint64_t hash;   // FNV-1a of the header and of the tokens at both ends
    uint16_t first;  // the first token
    uint64_t used;   // time of the last use, in reads
} Shard;

typedef struct {
    Shard *shard;  // (count) in order of name
    int count;
    int64_t tokens;  // of all shards
    int open;        // files open now
    uint64_t reads;  // clock for Shard.used
} ShardList;

// Where the documents of one shard start; filled by shards_scan, a chunk at a time.
typedef struct {
    int shard;        // number in the list, -1: none
    int64_t scanned;  // tokens scanned so far
    uint32_t *start;  // (count) positions of the BOS tokens
    int64_t count, room;
    uint16_t *chunk;  // (SHARD_CHUNK) the tokens just read
} ShardIndex;

__attribute__((format(printf, 1, 2))) static inline int shards_fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(io_error, sizeof io_error, format, args);
    va_end(args);
    return -1;
}

// FNV-1a (Fowler, Noll, Vo 1991), from SHARD_HASH_START or from the hash of what came before.
static inline uint64_t shards_hash(uint64_t hash, const void *data, size_t count) {
    const uint8_t *byte = (const uint8_t *)data;
    for (size_t i = 0; i < count; i++) hash = (hash ^ byte[i]) * 0x100000001b3ull;
    return hash;
}

// ---------------------------------------------------------------------------------------------
// Which files.

static inline int shards_path_order(const void *a, const void *b) {
    const char *x = *(char *const *)a, *y = *(char *const *)b;
    const char *x_name = strrchr(x, '/'), *y_name = strrchr(y, '/');
    int order = strcmp(x_name ? x_name + 1 : x, y_name ? y_name + 1 : y);
    return order ? order : strcmp(x, y);
}

// Adds the files that one pattern stands for.
static inline int shards_glob(const char *pattern, char ***paths, int *count) {
    glob_t found;
    memset(&found, 0, sizeof found);
    int failed = glob(pattern, 0, NULL, &found);
    if (failed == GLOB_NOSPACE) die(EXIT_INTERNAL, "out of memory for the files of %s", pattern);
    size_t all = (size_t)*count + (failed ? 0 : found.gl_pathc);
    if (!failed) *paths = (char **)realloc(*paths, all * sizeof **paths);
    if (!failed && !*paths) die(EXIT_INTERNAL, "out of memory for the names of %zu shards", all);
    for (size_t i = 0; !failed && i < found.gl_pathc; i++)
        (*paths)[(*count)++] = die_strdup(found.gl_pathv[i], "the name of a shard");
    globfree(&found);
    if (!failed) return 0;
    return shards_fail("%s: found no such file, expected token shards: a file or a pattern such as "
                       "'data/train_*.bin', several separated by commas",
                       pattern);
}

// The files that patterns stand for, by name, each once. Commas separate them, with white space
// after them or none; other white space is part of a name. The caller frees them, also on an error.
// A path that is there as it stands is taken as one file, whatever signs it holds.
static inline int shards_match(const char *patterns, char ***paths, int *count) {
    *paths = NULL, *count = 0;
    if (*patterns && io_exists(patterns)) {
        *paths = (char **)die_alloc(1, sizeof **paths, "the name of a shard");
        (*paths)[(*count)++] = die_strdup(patterns, "the name of a shard");
        return 0;
    }
    char *text = die_strdup(patterns, "the names of shards"), *rest = text;
    int failed = 0;
    for (char *one; !failed && (one = strtok_r(rest, ",", &rest));) {
        one += strspn(one, " \t\n");
        if (*one) failed = shards_glob(one, paths, count);
    }
    free(text);
    if (failed) return -1;
    if (!*count)
        return shards_fail("no token shards given: expected a file or a pattern such as "
                           "'data/train_*.bin'");
    qsort(*paths, (size_t)*count, sizeof **paths, shards_path_order);
    int kept = 1;
    for (int i = 1; i < *count; i++) {
        if (strcmp((*paths)[i], (*paths)[kept - 1]))
            (*paths)[kept++] = (*paths)[i];
        else
            free((*paths)[i]);
    }
    *count = kept;
    return 0;
}

// ---------------------------------------------------------------------------------------------
// Reading.

// Opens shard s if it is not open, and closes the one used longest ago when too many are.
static inline int shards_file(ShardList *list, int s) {
    Shard *shard = &list->shard[s];
    shard->used = ++list->reads;
    if (shard->file.fd >= 0) return 0;
    if (list->open >= SHARD_OPEN_FILES) {
        Shard *oldest = NULL;
        for (Shard *i = list->shard; i < list->shard + list->count; i++)
            if (i->file.fd >= 0 && (!oldest || i->used < oldest->used)) oldest = i;
        if (io_close(&oldest->file)) return -1;
        list->open--;
    }
    char path[IO_PATH_MAX];
    memcpy(path, shard->file.path, sizeof path);
    int failed = io_open_read(&shard->file, path);
    list->open += !failed;
    return failed;
}

// Reads tokens [start, start + count) of shard s.
static inline int shards_read(ShardList *list, int s, uint16_t *tokens, size_t count,
                              size_t start) {
    if (shards_file(list, s)) return -1;
    size_t size = sizeof *tokens;
    return io_read_at(&list->shard[s].file, tokens, count * size, SHARD_HEADER + start * size);
}

// Checks a header against the size of the file.
static inline int shards_check(const char *path, const int32_t *header, int64_t size) {
    if (size < SHARD_HEADER)
        return shards_fail(
            "%s: byte %lld: found the end of the file%s, expected a header of %d bytes; "
            "make or copy the shard again",
            path, (long long)size, size ? "" : " (it is empty)", SHARD_HEADER);
    if (header[0] != SHARD_MAGIC)
        return shards_fail(
            "%s: byte 0: found magic number %d, expected %d; this is not a token shard, "
            "build/tokenize makes them from text",
            path, (int)header[0], SHARD_MAGIC);
    if (header[1] != SHARD_VERSION)
        return shards_fail(
            "%s: byte 4: found version %d, expected %d (16-bit tokens); build/tokenize makes such "
            "shards from text",
            path, (int)header[1], SHARD_VERSION);
    if (header[2] <= 0)
        return shards_fail(
            "%s: byte 8: found a count of %d tokens, expected at least 1; make or copy "
            "the shard again",
            path, (int)header[2]);
    long long need = SHARD_HEADER + 2 * (long long)header[2], more = size - need;
    if (more)
        return shards_fail(
            "%s: byte 8: found a count of %d tokens, which makes %lld bytes, expected "
            "%lld, the size of the file (%lld bytes %s); make or copy the shard again",
            path, (int)header[2], need, (long long)size, more < 0 ? -more : more,
            more < 0 ? "are missing" : "too many");
    return 0;
}

// Opens shard s for the first time: checks it, and reads the ends of it for the hash.
static inline int shards_open_one(ShardList *list, int s) {
    struct {
        int32_t header[SHARD_HEADER / 4];
        uint16_t tokens[SHARD_SAMPLE];
    } head;
    uint16_t tail[SHARD_SAMPLE];
    Shard *shard = &list->shard[s];
    if (shards_file(list, s)) return -1;
    int64_t size = io_size(&shard->file);
    size_t want = size < (int64_t)sizeof head ? (size_t)size : sizeof head;
    if (size < 0 || io_read_at(&shard->file, &head, want, 0)) return -1;
    if (shards_check(shard->file.path, head.header, size)) return -1;
    shard->tokens = head.header[2];
    shard->first = head.tokens[0];
    size_t count = shard->tokens < SHARD_SAMPLE ? (size_t)shard->tokens : SHARD_SAMPLE;
    if (shards_read(list, s, tail, count, (size_t)shard->tokens - count)) return -1;
    shard->hash = shards_hash(SHARD_HASH_START, &head, want);
    shard->hash = shards_hash(shard->hash, tail, count * sizeof *tail);
    list->tokens += shard->tokens;
    return 0;
}

static inline void shards_free(ShardList *list) {
    for (int i = 0; i < list->count; i++) io_close(&list->shard[i].file);
    free(list->shard);
    memset(list, 0, sizeof *list);
}

// Opens and checks every shard that a list of patterns stands for.
static inline int shards_open(ShardList *list, const char *patterns) {
    char **paths;
    int count, failed = 0;
    memset(list, 0, sizeof *list);
    if (shards_match(patterns, &paths, &count)) {
        io_free_names(paths, count);
        return -1;
    }
    list->shard = (Shard *)die_alloc((size_t)count, sizeof *list->shard, "the list of shards");
    for (; list->count < count && !failed; list->count++) {
        Shard *shard = &list->shard[list->count];
        char *path = paths[list->count], *slash;
        shard->file.fd = -1;
        if (snprintf(shard->file.path, IO_PATH_MAX, "%s", path) >= IO_PATH_MAX)
            failed =
                shards_fail("%.100s...: the path has more than %d bytes", path, IO_PATH_MAX - 1);
        slash = strrchr(shard->file.path, '/');
        shard->name = slash ? slash + 1 : shard->file.path;
        failed = failed || shards_open_one(list, list->count);
    }
    io_free_names(paths, count);
    if (failed) shards_free(list);
    return failed ? -1 : 0;
}

// ---------------------------------------------------------------------------------------------
// Where documents start.

static inline void shards_index_free(ShardIndex *index) {
    free(index->start), free(index->chunk);
    memset(index, 0, sizeof *index);
}

// Empties the index and makes it one of shard s.
static inline void shards_index_reset(ShardIndex *index, int s) {
    if (!index->chunk)
        index->chunk =
            (uint16_t *)die_alloc(SHARD_CHUNK, sizeof *index->chunk, "a part of a shard");
    index->shard = s;
    index->scanned = index->count = 0;
}

static inline void shards_index_add(ShardIndex *index, int64_t token) {
    if (index->count == index->room) {
        index->room = index->room ? 2 * index->room : 4096;
        index->start = (uint32_t *)realloc(index->start, (size_t)index->room * sizeof(uint32_t));
        if (!index->start)
            die(EXIT_INTERNAL, "out of memory for %lld documents of a shard",
                (long long)index->room);
    }
    index->start[index->count++] = (uint32_t)token;
}

// Looks at each of `count` tokens in turn; false at the first that is not below V.
static inline bool shards_scan_each(ShardIndex *index, const uint16_t *tokens, int count,
                                    int64_t at, int bos, int V) {
    for (int i = 0; i < count; i++) {
        if (tokens[i] >= V) return false;
        if (tokens[i] == bos) shards_index_add(index, at + i);
    }
    return true;
}

// True when a block of 64 tokens needs a closer look. Without a branch it becomes vector code: the
// scan runs at 2 G tokens/s with it, at 1 G without (EPYC, gcc 12 -O2, file in the page cache).
static inline bool shards_block_hit(const uint16_t *tokens, int bos, int V) {
    uint16_t hit = 0, start = (uint16_t)bos, last = (uint16_t)(V < 65536 ? V - 1 : 65535);
    for (int i = 0; i < 64; i++) hit = (uint16_t)(hit | (tokens[i] == start) | (tokens[i] > last));
    return hit != 0;
}

// Scans the next chunk of the index's shard: notes where each BOS is, and refuses a token >= V.
static inline int shards_scan(ShardList *list, ShardIndex *index, int bos, int V) {
    Shard *shard = &list->shard[index->shard];
    int64_t at = index->scanned, left = shard->tokens - at;
    int count = left < SHARD_CHUNK ? (int)left : SHARD_CHUNK;
    if (shards_read(list, index->shard, index->chunk, (size_t)count, (size_t)at)) return -1;
    for (int i = 0; i < count; i += 64) {
        int n = count - i < 64 ? count - i : 64;
        if (n == 64 && !shards_block_hit(index->chunk + i, bos, V)) continue;
        if (shards_scan_each(index, index->chunk + i, n, at + i, bos, V)) continue;
        while (index->chunk[i] < V) i++;
        return shards_fail("%s: byte %lld: found token %d, expected less than %d, the size of the "
                           "vocabulary; make the shard again or choose its tokenizer",
                           shard->file.path, (long long)(SHARD_HEADER + 2 * (at + i)),
                           index->chunk[i], V);
    }
    index->scanned += count;
    return 0;
}

static inline bool shards_scanned(const ShardList *list, const ShardIndex *index) {
    return index->scanned == list->shard[index->shard].tokens;
}

// Fails when no shard holds a BOS. Nearly always the first token of one is one, so nothing is read.
static inline int shards_require_bos(ShardList *list, int bos) {
    for (int s = 0; s < list->count; s++)
        if (list->shard[s].first == bos) return 0;
    ShardIndex index;
    memset(&index, 0, sizeof index);
    int failed = 0;
    for (int s = 0; s < list->count && !failed && !index.count; s++)
        for (shards_index_reset(&index, s);
             !failed && !index.count && !shards_scanned(list, &index);)
            failed = shards_scan(list, &index, bos, 65536);
    bool found = index.count > 0;
    shards_index_free(&index);
    if (failed || found) return failed;
    return shards_fail(
        "%s: byte %d to the end%s: found no BOS (token %d), expected one before each "
        "document; give the shards' --tokenizer ('bytes' for bytes) or --bos, or --packing stream",
        list->shard[0].file.path, SHARD_HEADER, list->count > 1 ? ", and in the other shards" : "",
        bos);
}

#endif
