// safetensors.h: named tensors in one file, in the public safetensors format, with checksums.
//
//     offset 0      u64, little-endian: H, the size of the header
//            8      header: a JSON object of H bytes, padded with spaces to a multiple of 8
//            8 + H  data: every tensor's elements, little-endian, row-major, without gaps
//
// The header maps each name to {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, the
// offsets counted from 8 + H, and "__metadata__" to an object of strings. Files written here carry
// their checksums there, where other readers of the format ignore them:
//     "header_crc32c"    CRC-32C of the H bytes, computed with these 8 digits as 00000000
//     "crc32c.<tensor>"  CRC-32C of the tensor's bytes
// A file without them (another program's) is read, too, but then nothing guards its bits.
//
// The reader trusts nothing: sizes are multiplied with checks, tensors must cover the data exactly.
// Functions return 0, or -1 with a sentence in io_error that names the file and the tensor.
#ifndef LLMC_SAFETENSORS_H
#define LLMC_SAFETENSORS_H

#include <assert.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llmc/crc32c.h"  // crc32c, crc32c_sealed
#include "llmc/die.h"     // die_alloc
#include "llmc/io.h"      // io_write_parts, io_open_read, io_read_at, io_error
#include "llmc/json.h"    // Json, JsonText, JsonPair

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors.h writes memory as it is: it needs a little-endian machine"
#endif

typedef enum {
    ST_BOOL,
    ST_U8,
    ST_I8,
    ST_U16,
    ST_I16,
    ST_F16,
    ST_BF16,
    ST_U32,
    ST_I32,
    ST_F32,
    ST_U64,
    ST_I64,
    ST_F64,
    ST_DTYPES
} StDtype;

static const char *const st_dtype_name[ST_DTYPES] = {
    "BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64"};
static const unsigned char st_dtype_size[ST_DTYPES] = {1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 8, 8, 8};

#define ST_NAME_MAX   64  // with its NUL
#define ST_DIMS_MAX   4
#define ST_HEADER_MAX 16777216  // bytes: some 100,000 tensors
#define ST_PIECE      1048576   // bytes read at a time, so that they are still in cache for the CRC

typedef struct {
    char name[ST_NAME_MAX];
    StDtype dtype;
    int ndim;
    uint64_t shape[ST_DIMS_MAX];
    uint64_t begin, end;  // bytes in the data part; st_write and st_open set them
    uint32_t crc;         // of those bytes; only in a sealed file
    bool has_crc;
    const void *data;  // st_write: the elements; st_open: NULL
} StTensor;

typedef struct {
    IoFile file;
    char *header;  // (header_size), not NUL-terminated
    size_t header_size;
    uint64_t data_at;  // offset of the data part in the file
    uint64_t data_size;
    StTensor *tensors;         // (count), in the header's order
    const StTensor **by_name;  // (count), sorted
    int count;
    bool has_metadata;
    Json metadata;  // before the value of __metadata__
    bool sealed;    // header and tensors have checksums, and the header's is right
    uint32_t header_crc;
} StFile;

// ---------------------------------------------------------------------------------------------
// One tensor.

// A tensor of up to 4 dimensions for st_write. `shape` has ndim numbers.
static inline StTensor st_tensor(const char *name, StDtype dtype, int ndim, const uint64_t *shape,
                                 const void *data) {
    StTensor t;
    memset(&t, 0, sizeof t);
    assert(strlen(name) < sizeof t.name && ndim >= 0 && ndim <= ST_DIMS_MAX);
    memcpy(t.name, name, strlen(name) + 1);
    t.dtype = dtype, t.ndim = ndim, t.data = data;
    for (int i = 0; i < ndim; i++) t.shape[i] = shape[i];
    return t;
}

// Bytes of the elements. False when the number passes 2^64.
static inline bool st_bytes(const StTensor *t, uint64_t *bytes) {
    *bytes = st_dtype_size[t->dtype];
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] && *bytes > UINT64_MAX / t->shape[i]) return false;
        *bytes *= t->shape[i];
    }
    return true;
}

// "(50304, 768)"
static inline const char *st_shape_text(const StTensor *t, char *buffer, size_t room) {
    size_t n = (size_t)snprintf(buffer, room, "(");
    for (int i = 0; i < t->ndim && n < room; i++)
        n += (size_t)snprintf(buffer + n, room - n, i ? ", %llu" : "%llu",
                              (unsigned long long)t->shape[i]);
    if (n < room) snprintf(buffer + n, room - n, ")");
    return buffer;
}

// ---------------------------------------------------------------------------------------------
// Writing.

// The header of the file as text, padded and sealed. Sets begin, end and crc of every tensor.
static inline JsonText st_header(StTensor *tensors, int n, const JsonPair *pairs, int pair_count) {
    JsonText t = {NULL, 0, 0};
    json_put(&t, "{\"__metadata__\":{\"header_crc32c\":\"");
    size_t digits = t.size;
    json_put(&t, "00000000\"");
    for (int i = 0; i < pair_count; i++) {
        json_put(&t, ",");
        json_put_pair(&t, pairs[i]);
    }
    for (int i = 0; i < n; i++)
        json_put(&t, ",\"crc32c.%s\":\"%08x\"", tensors[i].name, (unsigned)tensors[i].crc);
    json_put(&t, "}");
    for (int i = 0; i < n; i++) {
        const StTensor *x = &tensors[i];
        json_put(&t, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", x->name, st_dtype_name[x->dtype]);
        for (int d = 0; d < x->ndim; d++)
            json_put(&t, d ? ",%llu" : "%llu", (unsigned long long)x->shape[d]);
        json_put(&t, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)x->begin,
                 (unsigned long long)x->end);
    }
    json_put(&t, "}");
    while (t.size % 8) json_put(&t, " ");
    char crc[9];
    snprintf(crc, sizeof crc, "%08x", (unsigned)crc32c(0, t.text, t.size));
    memcpy(t.text + digits, crc, 8);
    return t;
}

// Gives every tensor its place in the data part and its checksum.
static inline void st_lay_out(StTensor *tensors, int n) {
    uint64_t at = 0, bytes = 0;
    for (int i = 0; i < n; i++) {
        StTensor *t = &tensors[i];
        bool fits = st_bytes(t, &bytes);
        assert(fits && *t->name && strcmp(t->name, "__metadata__") && !strpbrk(t->name, "\"\\"));
        (void)fits;
        for (int k = 0; k < i; k++) assert(strcmp(tensors[k].name, t->name));
        t->begin = at, t->end = at += bytes;
        t->crc = crc32c(0, t->data, (size_t)bytes), t->has_crc = true;
    }
}

// Writes n tensors and pairs of strings to a file: beside its place, synced, renamed. On an error
// what was there before stands. Names must differ and need no escapes in JSON; keys of pairs must
// not be the two of the checksums. Sets begin, end and crc of the tensors.
static inline int st_write(const char *path, StTensor *tensors, int n, const JsonPair *pairs,
                           int pair_count) {
    st_lay_out(tensors, n);
    JsonText header = st_header(tensors, n, pairs, pair_count);
    uint64_t size = header.size;
    IoPart *parts = (IoPart *)die_alloc((size_t)n + 2, sizeof *parts, "the parts of a file");
    parts[0].data = &size, parts[0].size = sizeof size;
    parts[1].data = header.text, parts[1].size = header.size;
    for (int i = 0; i < n; i++) {
        parts[i + 2].data = tensors[i].data;
        parts[i + 2].size = (size_t)(tensors[i].end - tensors[i].begin);
    }
    int failed = io_write_parts(path, parts, n + 2);
    free(parts);
    json_text_free(&header);
    return failed;
}

// ---------------------------------------------------------------------------------------------
// Reading: the header.

__attribute__((format(printf, 2, 3))) static inline int st_fail(const StFile *f, const char *format,
                                                                ...) {
    size_t n = (size_t)snprintf(io_error, sizeof io_error, "%s: ", f->file.path);
    va_list args;
    va_start(args, format);
    vsnprintf(io_error + n, sizeof io_error - n, format, args);
    va_end(args);
    return -1;
}

static inline int st_header_fail(const StFile *f, const Json *j, const char *name) {
    const char *colon = *name ? ": " : "";
    return st_fail(f, "%s%sbyte %zu of the header: %s", name, colon, j->error_at, j->error);
}

static inline bool st_parse_dtype(Json *j, StDtype *dtype) {
    char text[16];
    size_t at = j->at;
    if (!json_string(j, text, sizeof text, NULL)) return false;
    for (int i = 0; i < ST_DTYPES; i++) {
        if (strcmp(text, st_dtype_name[i])) continue;
        *dtype = (StDtype)i;
        return true;
    }
    return json_fail(j, at, "found a dtype that is not known here");
}

// The value after a tensor's name.
static inline bool st_parse_tensor(Json *j, StTensor *t) {
    char key[16];
    int dtypes = 0, shapes = 0, offsets = 0, bounds = 0;
    for (json_enter(j, '{'); json_more(j, '}');) {
        json_key(j, key, sizeof key);
        if (!strcmp(key, "dtype")) {
            st_parse_dtype(j, &t->dtype);
            dtypes++;
        } else if (!strcmp(key, "shape")) {
            for (json_enter(j, '['); json_more(j, ']'); t->ndim++) {
                bool room = t->ndim < ST_DIMS_MAX;
                if (!room) return json_fail(j, j->at, "found more than 4 dimensions");
                json_u64(j, &t->shape[t->ndim]);
            }
            shapes++;
        } else if (!strcmp(key, "data_offsets")) {
            for (json_enter(j, '['); json_more(j, ']'); bounds++) {
                if (bounds == 2) return json_fail(j, j->at, "found more than 2 data_offsets");
                json_u64(j, bounds ? &t->end : &t->begin);
            }
            offsets++;
        } else {
            json_fail(j, j->at, "found a member of a tensor that is not known here");
        }
    }
    if (j->error) return false;
    bool whole = dtypes == 1 && shapes == 1 && offsets == 1 && bounds == 2;
    return whole ? true : json_fail(j, j->at, "expected one dtype, one shape and two data_offsets");
}

// Fills f->tensors from the header; remembers where __metadata__ is.
static inline int st_parse_header(StFile *f) {
    Json j;
    json_init(&j, f->header, f->header_size);
    Json counting = j;
    int members = 0;
    for (json_enter(&counting, '{'); json_more(&counting, '}'); members++)
        json_skip_key(&counting), json_skip(&counting);
    if (!json_end(&counting)) return st_header_fail(f, &counting, "");
    f->tensors = (StTensor *)die_alloc((size_t)members, sizeof *f->tensors, "a file's tensors");
    f->by_name = (const StTensor **)die_alloc((size_t)members, sizeof *f->by_name, "their names");
    for (json_enter(&j, '{'); json_more(&j, '}');) {
        StTensor *t = &f->tensors[f->count];
        if (!json_key(&j, t->name, sizeof t->name)) return st_header_fail(f, &j, "a tensor's name");
        for (const char *c = t->name; *c; c++)
            if ((unsigned char)*c < 0x20) return st_fail(f, "found a control character in a name");
        if (strcmp(t->name, "__metadata__")) {
            if (!st_parse_tensor(&j, t)) return st_header_fail(f, &j, t->name);
            f->by_name[f->count] = t;
            f->count++;
        } else {
            if (f->has_metadata) return st_fail(f, "found __metadata__ twice");
            f->has_metadata = true, f->metadata = j;
            json_skip(&j);
            memset(t, 0, sizeof *t);
        }
    }
    return 0;
}

static inline int st_place_order(const void *a, const void *b) {
    const StTensor *x = *(const StTensor *const *)a, *y = *(const StTensor *const *)b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

static inline int st_name_order(const void *a, const void *b) {
    return strcmp((*(const StTensor *const *)a)->name, (*(const StTensor *const *)b)->name);
}

// Every tensor has the size its shape says; together they cover the data part once, without gaps;
// no name comes twice. Leaves by_name sorted.
static inline int st_check_layout(StFile *f) {
    uint64_t at = 0, bytes;
    qsort(f->by_name, (size_t)f->count, sizeof *f->by_name, st_place_order);
    for (int i = 0; i < f->count; at = f->by_name[i]->end, i++) {
        const StTensor *t = f->by_name[i];
        unsigned long long begin = t->begin, end = t->end, data_size = f->data_size;
        if (begin > end || !st_bytes(t, &bytes) || bytes != end - begin) {
            char shape[96];
            return st_fail(f, "tensor %s: found data_offsets %llu and %llu, not the size of %s %s",
                           t->name, begin, end, st_dtype_name[t->dtype],
                           st_shape_text(t, shape, sizeof shape));
        }
        if (begin != at)
            return st_fail(f,
                           "tensor %s: its data begin at %llu, expected %llu, the end of the "
                           "tensor before",
                           t->name, begin, (unsigned long long)at);
        if (end > data_size)
            return st_fail(f,
                           "tensor %s: its data end at %llu, the file holds %llu bytes of data; "
                           "it is cut short",
                           t->name, end, data_size);
    }
    if (at != f->data_size)
        return st_fail(f, "found %llu bytes of data, expected %llu; the end is too much",
                       (unsigned long long)f->data_size, (unsigned long long)at);
    qsort(f->by_name, (size_t)f->count, sizeof *f->by_name, st_name_order);
    for (int i = 1; i < f->count; i++)
        if (!strcmp(f->by_name[i - 1]->name, f->by_name[i]->name))
            return st_fail(f, "tensor %s: found twice", f->by_name[i]->name);
    return 0;
}

// The tensor of that name, or NULL.
static inline const StTensor *st_find(const StFile *f, const char *name) {
    int low = 0, high = f->count;
    while (low < high) {
        int middle = low + (high - low) / 2, order = strcmp(name, f->by_name[middle]->name);
        if (order == 0) return f->by_name[middle];
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

// The next member of the metadata: its key (empty if 128 characters or longer), with the cursor in
// front of its value. False at the end.
static inline bool st_metadata_next(Json *j, char key[128]) {
    size_t length = 0;
    if (!json_more(j, '}')) return false;
    *key = 0;
    if (json_string_length(j, &length) && length >= 128) return json_skip_key(j);
    return json_key(j, key, 128);
}

// The string that the metadata hold under that key. False when there is none or it does not fit.
static inline bool st_metadata(const StFile *f, const char *key, char *value, size_t room) {
    char found[128];
    Json j = f->metadata;
    if (!f->has_metadata) return false;
    for (json_enter(&j, '{'); st_metadata_next(&j, found);) {
        if (!strcmp(found, key)) return json_string(&j, value, room, NULL);
        json_skip(&j);
    }
    return false;
}

// ---------------------------------------------------------------------------------------------
// Reading: the checksums.

// 8 lower-case hexadecimal digits.
static inline bool st_parse_crc(const char *text, uint32_t *crc) {
    if (strlen(text) != 8 || strspn(text, "0123456789abcdef") != 8) return false;
    *crc = (uint32_t)strtoul(text, NULL, 16);
    return true;
}

static inline int st_check_header_crc(StFile *f, size_t digits, uint32_t expected) {
    uint32_t found = crc32c_sealed(f->header, f->header_size, digits);
    if (found != expected)
        return st_fail(f, "the header is damaged: found CRC-32C %08x, expected %08x",
                       (unsigned)found, (unsigned)expected);
    f->sealed = true, f->header_crc = found;
    return 0;
}

// Reads the checksums from the metadata. All or none of them must be there.
static inline int st_parse_seal(StFile *f) {
    int crcs = 0;
    char key[128], value[16];
    Json j = f->metadata;
    if (!f->has_metadata) return 0;
    for (json_enter(&j, '{'); st_metadata_next(&j, key);) {
        bool header = !strcmp(key, "header_crc32c");
        if (!header && strstr(key, "crc32c.") != key) {
            json_string(&j, NULL, 0, NULL);
            continue;
        }
        json_peek(&j);
        size_t quote = j.at;
        uint32_t crc = 0;
        bool read = json_string(&j, value, sizeof value, NULL) && st_parse_crc(value, &crc);
        StTensor *t = header ? NULL : (StTensor *)st_find(f, key + 7);
        if (!read || j.at - quote != 10 || (!header && !t) || (header ? f->sealed : t->has_crc))
            return st_fail(f, "header: found a bad or second %s", key);
        if (header && st_check_header_crc(f, quote + 1, crc)) return -1;
        if (t) t->crc = crc, t->has_crc = true, crcs++;
    }
    if (j.error) return st_header_fail(f, &j, "__metadata__");
    if (crcs != (f->sealed ? f->count : 0))
        return st_fail(f, "found checksums of %d tensors and %s of the header, expected %d and one",
                       crcs, f->sealed ? "one" : "none", f->count);
    return 0;
}

// ---------------------------------------------------------------------------------------------
// Reading: the file.

static inline void st_close(StFile *f) {
    io_close(&f->file);
    free(f->header), free(f->tensors), free(f->by_name);
    f->header = NULL, f->tensors = NULL, f->by_name = NULL, f->count = 0;
}

static inline int st_read_header(StFile *f) {
    int64_t size = io_size(&f->file);
    uint64_t header = 0;
    if (size < 0) return -1;
    if (size < 10)
        return st_fail(f, "found %lld bytes, too few for a safetensors file", (long long)size);
    if (io_read_at(&f->file, &header, 8, 0)) return -1;
    if (header > ST_HEADER_MAX || header > (uint64_t)size - 8)
        return st_fail(f,
                       "found a header of %llu bytes in %lld; the file is damaged, cut short "
                       "or no safetensors file",
                       (unsigned long long)header, (long long)size);
    f->header_size = (size_t)header;
    f->data_at = 8 + header, f->data_size = (uint64_t)size - f->data_at;
    f->header = (char *)die_alloc(f->header_size, 1, "a safetensors header");
    return io_read_at(&f->file, f->header, f->header_size, 8);
}

// Opens a file and checks all of its header. st_close is due only after a 0.
static inline int st_open(StFile *f, const char *path) {
    memset(f, 0, sizeof *f);
    if (io_open_read(&f->file, path)) return -1;
    bool failed = st_read_header(f) || st_parse_header(f) || st_check_layout(f) || st_parse_seal(f);
    if (!failed) return 0;
    close(f->file.fd);
    f->file.fd = -1;
    st_close(f);
    return -1;
}

// Reads a tensor's bytes into `buffer`, or with NULL nowhere, and verifies its checksum.
static inline int st_read(StFile *f, const StTensor *t, void *buffer) {
    uint32_t crc = 0;
    char *scratch = buffer ? NULL : (char *)die_alloc(ST_PIECE, 1, "a piece of a tensor");
    int failed = 0;
    for (uint64_t at = t->begin; at < t->end && !failed;) {
        size_t left = (size_t)(t->end - at), n = left < ST_PIECE ? left : ST_PIECE;
        char *piece = buffer ? (char *)buffer + (at - t->begin) : scratch;
        failed = io_read_at(&f->file, piece, n, f->data_at + at);
        if (!failed) crc = crc32c(crc, piece, n);
        at += n;
    }
    free(scratch);
    if (failed) {
        char reason[sizeof io_error];
        memcpy(reason, io_error, sizeof reason);
        snprintf(io_error, sizeof io_error, "tensor %s: %.1200s", t->name, reason);
        return -1;
    }
    if (t->has_crc && crc != t->crc)
        return st_fail(f, "tensor %s is damaged: found CRC-32C %08x, expected %08x", t->name,
                       (unsigned)crc, (unsigned)t->crc);
    return 0;
}

#endif
