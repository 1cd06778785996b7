// tokenizer.h: text to token ids and back, for bytes and for GPT-2's byte-pair encoding.
//
// "bytes": id = byte, V = 257, and 256 is the separator BOS. "<file>": GPT-2's vocabulary, in the
// format of llm.c (dev/data/get_tokenizer.sh makes it), little-endian:
//
//     byte 0     uint32 20240328    magic
//     byte 4     uint32 2           version
//     byte 8     uint32 V           number of tokens, 257 .. 65536
//     byte 12    uint32 BOS         the separator's id; <|endoftext|>, 50256, in GPT-2's
//     byte 16    uint32 0 x 252     reserved
//     byte 1024  V tokens, by id: one byte n, 1 .. 255, then the token's n bytes
//
// Encoding (Sennrich et al. 2016; Radford et al. 2019): the text is split into pieces by a pattern.
// In each piece the two neighbours whose concatenation is the token of lowest id are joined, the
// leftmost if several, until no two neighbours make a token. The order of joining is the order of
// the ids, so the vocabulary is all there is to know. Every text is ordinary text: "<|endoftext|>"
// is 13 characters, BOS comes only from whoever separates documents. Any bytes can be encoded, and
// decoding gives them back exactly.
//
// The ids are those of OpenAI's tiktoken, for bytes that are not UTF-8 too (its _encode_bytes): the
// text before the first bad byte is split as always, then its last piece and all after it are one
// piece. (White space before that piece, which tiktoken adds to it, changes no id: in GPT-2's
// vocabulary a space never stands after white space.)
//
// The splitting pattern needs Unicode's letters and numbers: the library PCRE2, compiled in with
// -DUSE_PCRE2. Without it everything but tokenizer_encode for GPT-2's tokens works. A letter that
// is younger than the library's Unicode (14.0, of 2021, in PCRE2 10.40) counts as a sign: text with
// one may get other ids than tiktoken's.
#ifndef LLMC_TOKENIZER_H
#define LLMC_TOKENIZER_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef USE_PCRE2
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#endif

#include "llmc/die.h"  // die, die_alloc, EXIT_DATA
#include "llmc/io.h"   // io_read_file

#define TOKENIZER_MAGIC    20240328u
#define TOKENIZER_VERSION  2u
#define TOKENIZER_HEADER   1024u              // bytes before the first token
#define TOKENIZER_MAX_TEXT ((size_t)1 << 31)  // bytes that one call can encode
#define TOKENIZER_NONE     0xFFFFFFFFu        // no token

typedef struct {
    uint32_t tag, id;
} TokenizerSlot;  // hash of the bytes, id or TOKENIZER_NONE

typedef struct {
    int vocab;              // V: ids are 0 .. V-1
    int bos;                // the separator before each document, never made by encoding
    uint8_t *bytes;         // the tokens' bytes, one token after the other
    uint32_t *start;        // (V + 1) token id is bytes[start[id]] .. bytes[start[id + 1] - 1]
    uint32_t byte_id[256];  // the token of one byte
    uint32_t longest;       // bytes of the longest token
    TokenizerSlot *slots;   // (slot_mask + 1) open-addressed hash of every token but BOS;
    uint32_t slot_mask;     //   NULL for the byte tokenizer
    uint64_t beside[1024];  // bit 256*a + b: some token holds byte a directly before byte b
#ifdef USE_PCRE2
    pcre2_code *pattern;
#endif
} Tokenizer;

typedef struct {
    uint16_t *ids;  // (count) start from {0}; free(ids) when done
    size_t count, room;
} TokenList;

static __thread char tokenizer_error[IO_PATH_MAX + 256];  // the reason of the last -1

// ---------------------------------------------------------------------------------------------
// Hash of byte strings.

static inline uint32_t tokenizer_hash(const uint8_t *s, size_t n) {
    uint64_t h = n;
    while (n >= 8) {
        uint64_t word;
        memcpy(&word, s, 8);
        h = (h ^ word) * 0x9E3779B97F4A7C15u;
        h ^= h >> 32;
        s += 8, n -= 8;
    }
    uint64_t word = 0;
    for (size_t i = 0; i < n; i++) word = word << 8 | s[i];
    h = (h ^ word) * 0x9E3779B97F4A7C15u;
    return (uint32_t)(h >> 32);
}

// The slot that holds the token with these bytes, or the free slot where it belongs.
static inline TokenizerSlot *tokenizer_slot(const Tokenizer *t, const uint8_t *s, size_t n,
                                            uint32_t tag) {
    for (uint32_t i = tag & t->slot_mask;; i = (i + 1) & t->slot_mask) {
        TokenizerSlot *slot = &t->slots[i];
        if (slot->id == TOKENIZER_NONE) return slot;
        uint32_t begin = t->start[slot->id], end = t->start[slot->id + 1];
        if (slot->tag == tag && end - begin == n && !memcmp(t->bytes + begin, s, n)) return slot;
    }
}

// The id of the token with exactly these bytes, or TOKENIZER_NONE.
static inline uint32_t tokenizer_find(const Tokenizer *t, const uint8_t *s, size_t n) {
    return n > t->longest ? TOKENIZER_NONE : tokenizer_slot(t, s, n, tokenizer_hash(s, n))->id;
}

static inline bool tokenizer_beside(const Tokenizer *t, uint8_t a, uint8_t b) {
    return t->beside[4 * a + b / 64] >> b % 64 & 1;
}

// ---------------------------------------------------------------------------------------------
// Reading the vocabulary.

static inline uint32_t tokenizer_u32(const uint8_t *p) {
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

__attribute__((format(printf, 3, 4))) static inline int
tokenizer_bad(const char *name, size_t offset, const char *format, ...) {
    char what[160];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    snprintf(tokenizer_error, sizeof tokenizer_error,
             "tokenizer file %s, byte %zu: %s; make it again with dev/data/get_tokenizer.sh", name,
             offset, what);
    return -1;
}

static inline int tokenizer_parse_header(Tokenizer *t, const char *name, const uint8_t *data,
                                         size_t size) {
    if (size < TOKENIZER_HEADER)
        return tokenizer_bad(name, size, "found the end, expected a header of 1024 bytes");
    uint32_t magic = tokenizer_u32(data), version = tokenizer_u32(data + 4);
    uint32_t vocab = tokenizer_u32(data + 8), bos = tokenizer_u32(data + 12);
    if (magic != TOKENIZER_MAGIC)
        return tokenizer_bad(name, 0, "found magic number %u, expected %u", magic, TOKENIZER_MAGIC);
    if (version != TOKENIZER_VERSION)
        return tokenizer_bad(name, 4, "found version %u, expected %u", version, TOKENIZER_VERSION);
    if (vocab < 257 || vocab > 65536)
        return tokenizer_bad(name, 8, "found %u tokens, expected 257 to 65536", vocab);
    if (bos >= vocab)
        return tokenizer_bad(name, 12, "found separator id %u, expected less than %u", bos, vocab);
    for (size_t i = 16; i < TOKENIZER_HEADER; i += 4) {
        uint32_t word = tokenizer_u32(data + i);
        if (word) return tokenizer_bad(name, i, "found %u, expected 0 (reserved)", word);
    }
    t->vocab = (int)vocab, t->bos = (int)bos;
    return 0;
}

// Copies the tokens' bytes and fills `start`.
static inline int tokenizer_parse_tokens(Tokenizer *t, const char *name, const uint8_t *data,
                                         size_t size) {
    size_t at = TOKENIZER_HEADER, used = 0;
    for (int id = 0; id < t->vocab; id++) {
        if (at >= size)
            return tokenizer_bad(name, at, "found the end, expected token %d of %d", id, t->vocab);
        size_t n = data[at], left = size - at - 1;
        if (n == 0)
            return tokenizer_bad(name, at, "found length 0, expected 1 to 255 (token %d)", id);
        if (n > left)
            return tokenizer_bad(name, at, "found %zu bytes to the end, expected %zu", left, n);
        memcpy(t->bytes + used, data + at + 1, n);
        used += n, at += 1 + n;
        t->start[id + 1] = (uint32_t)used;
        if (n > t->longest) t->longest = (uint32_t)n;
    }
    if (at != size)
        return tokenizer_bad(name, at, "found %zu more bytes, expected the end", size - at);
    return 0;
}

// Enters every token but BOS into the hash and the table of neighbouring bytes.
static inline int tokenizer_parse_index(Tokenizer *t, const char *name) {
    for (uint32_t id = 0; id < (uint32_t)t->vocab; id++) {
        const uint8_t *s = t->bytes + t->start[id];
        uint32_t n = t->start[id + 1] - t->start[id], tag = tokenizer_hash(s, n);
        size_t offset = TOKENIZER_HEADER + t->start[id] + id;
        if (id == (uint32_t)t->bos) continue;
        TokenizerSlot *slot = tokenizer_slot(t, s, n, tag);
        if (slot->id != TOKENIZER_NONE)
            return tokenizer_bad(
                name, offset, "found token %u again as token %u, expected a new one", slot->id, id);
        slot->tag = tag, slot->id = id;
        if (n == 1) t->byte_id[s[0]] = id;
        for (uint32_t i = 1; i < n; i++)
            t->beside[4 * s[i - 1] + s[i] / 64] |= (uint64_t)1 << s[i] % 64;
    }
    for (int b = 0; b < 256; b++)
        if (t->byte_id[b] == TOKENIZER_NONE)
            return tokenizer_bad(name, TOKENIZER_HEADER,
                                 "found no token for the single byte 0x%02X, expected all 256", b);
    return 0;
}

static inline void tokenizer_free(Tokenizer *t) {
#ifdef USE_PCRE2
    pcre2_code_free(t->pattern);
#endif
    free(t->bytes);
    free(t->start);
    free(t->slots);
    memset(t, 0, sizeof *t);
}

// Reads a vocabulary from memory; `name` is for messages. Returns 0, or -1 with a sentence in
// tokenizer_error and nothing allocated. For any bytes: this is what the fuzzer calls.
static inline int tokenizer_parse(Tokenizer *t, const char *name, const uint8_t *data,
                                  size_t size) {
    memset(t, 0, sizeof *t);
    if (tokenizer_parse_header(t, name, data, size)) return -1;
    t->bytes = (uint8_t *)die_alloc(size, 1, "the tokens' bytes");
    t->start = (uint32_t *)die_alloc((size_t)t->vocab + 1, sizeof *t->start, "the tokens' places");
    t->slot_mask = 2047;
    while (t->slot_mask < 2 * (uint32_t)t->vocab) t->slot_mask = 2 * t->slot_mask + 1;
    size_t slots = (size_t)t->slot_mask + 1;
    t->slots = (TokenizerSlot *)die_alloc(slots, sizeof *t->slots, "the tokens' hash");
    for (uint32_t i = 0; i <= t->slot_mask; i++) t->slots[i].id = TOKENIZER_NONE;
    for (int b = 0; b < 256; b++) t->byte_id[b] = TOKENIZER_NONE;
    bool bad = tokenizer_parse_tokens(t, name, data, size) || tokenizer_parse_index(t, name);
    if (bad) tokenizer_free(t);
    return bad ? -1 : 0;
}

static inline void tokenizer_init_bytes(Tokenizer *t) {
    static const char separator[] = "<|endoftext|>";
    memset(t, 0, sizeof *t);
    t->vocab = 257, t->bos = 256, t->longest = 1;
    t->bytes = (uint8_t *)die_alloc(256 + sizeof separator, 1, "the tokens' bytes");
    t->start = (uint32_t *)die_alloc(258, sizeof *t->start, "the tokens' places");
    for (uint32_t b = 0; b < 256; b++) t->bytes[b] = (uint8_t)b, t->start[b] = t->byte_id[b] = b;
    memcpy(t->bytes + 256, separator, sizeof separator);
    t->start[256] = 256, t->start[257] = 256 + sizeof separator - 1;
}

#ifdef USE_PCRE2
// GPT-2's pattern: the end of a contraction; letters, numbers or other signs, a space before them
// included; white space but for its last character, if a word follows; white space. The class of
// white space is written out because PCRE2's \s also takes U+180E, which Unicode moved away.
#define TOKENIZER_SPACE                                                                            \
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}"                               \
    "\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
static inline pcre2_code *tokenizer_pattern(void) {
    static const char pattern[] =
        "'(?:[sdmt]|ll|ve|re)| ?\\p{L}++| ?\\p{N}++| ?[^\\p{L}\\p{N}" TOKENIZER_SPACE "]++"
        "|[" TOKENIZER_SPACE "]+(?![^" TOKENIZER_SPACE "])|[" TOKENIZER_SPACE "]++";
    int code;
    PCRE2_SIZE offset;
    pcre2_code *compiled = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED,
                                         PCRE2_UTF | PCRE2_ANCHORED, &code, &offset, NULL);
    if (!compiled) die(EXIT_INTERNAL, "PCRE2 refused the splitting pattern: code %d", code);
    pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE);  // where it cannot, matching is slower
    return compiled;
}
#endif

// Reads the tokenizer: "bytes" or the path of a vocabulary. Exits 3 when the file is not in order.
static inline void tokenizer_init(Tokenizer *t, const char *name) {
    if (!strcmp(name, "bytes")) {
        tokenizer_init_bytes(t);
        return;
    }
    char *data;
    size_t size;
    if (io_read_file(name, &data, &size))
        die(EXIT_DATA, "tokenizer: %s; expected the word bytes or a file", io_error);
    int failed = tokenizer_parse(t, name, (const uint8_t *)data, size);
    free(data);
    if (failed) die(EXIT_DATA, "%s", tokenizer_error);
#ifdef USE_PCRE2
    t->pattern = tokenizer_pattern();
#endif
}

// ---------------------------------------------------------------------------------------------
// Ids to bytes.

// The bytes of a token, *count of them, not NUL-terminated. An id that the tokenizer does not have
// (a model's vocabulary may be larger) has none.
static inline const uint8_t *tokenizer_decode(const Tokenizer *t, int id, size_t *count) {
    bool known = id >= 0 && id < t->vocab;
    *count = known ? t->start[id + 1] - t->start[id] : 0;
    return t->bytes + (known ? t->start[id] : 0);
}

// How many bytes of text the token stands for, for bits per byte: 0 for BOS.
static inline int tokenizer_byte_count(const Tokenizer *t, int id) {
    size_t count;
    tokenizer_decode(t, id, &count);
    return id == t->bos ? 0 : (int)count;
}

// ---------------------------------------------------------------------------------------------
// Byte-pair encoding of one piece: O(n log n).
//
// The parts of the piece are a list linked both ways, a part known by its first byte. A heap holds
// one key for every two neighbours that make a token: id << 32 | first byte of the left one. The
// smallest key is the next to join. A join changes two pairs; their old keys stay in the heap and
// are passed over, because the part's `pair` no longer agrees.

typedef struct {
    uint32_t prev, next;  // first bytes of the neighbours; TOKENIZER_NONE, n: there is none
    uint32_t id;          // the token of this part
    uint32_t pair;        // the token of this part and the next, or TOKENIZER_NONE
} TokenizerPart;

typedef struct {
    TokenizerPart *parts;  // (room)
    uint64_t *heap;        // (2 * room): n-1 keys at the start, one more at most for each join
    size_t keys, room;
} TokenizerHeap;

static inline void tokenizer_heap_push(TokenizerHeap *h, uint64_t key) {
    size_t i = h->keys++;
    for (; i && h->heap[(i - 1) / 2] > key; i = (i - 1) / 2) h->heap[i] = h->heap[(i - 1) / 2];
    h->heap[i] = key;
}

static inline uint64_t tokenizer_heap_pop(TokenizerHeap *h) {
    uint64_t top = h->heap[0], last = h->heap[--h->keys];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < h->keys; i = child) {
        if (child + 1 < h->keys && h->heap[child + 1] < h->heap[child]) child++;
        if (h->heap[child] >= last) break;
        h->heap[i] = h->heap[child];
    }
    h->heap[i] = last;
    return top;
}

// Looks up the token of part i and its right neighbour; queues the join if there is one.
static inline void tokenizer_pair(const Tokenizer *t, TokenizerHeap *h, const uint8_t *s, size_t n,
                                  uint32_t i) {
    TokenizerPart *part = &h->parts[i];
    uint32_t middle = part->next;
    part->pair = TOKENIZER_NONE;
    if (middle == n || !tokenizer_beside(t, s[middle - 1], s[middle])) return;
    part->pair = tokenizer_find(t, s + i, h->parts[middle].next - i);
    if (part->pair != TOKENIZER_NONE) tokenizer_heap_push(h, (uint64_t)part->pair << 32 | i);
}

static inline void tokenizer_join(const Tokenizer *t, TokenizerHeap *h, const uint8_t *s, size_t n,
                                  uint32_t i) {
    TokenizerPart *part = &h->parts[i], *right = &h->parts[part->next];
    part->id = part->pair;
    part->next = right->next;
    right->pair = TOKENIZER_NONE;
    if (part->next < n) h->parts[part->next].prev = i;
    tokenizer_pair(t, h, s, n, i);
    if (part->prev != TOKENIZER_NONE) tokenizer_pair(t, h, s, n, part->prev);
}

static inline void tokenizer_heap_reserve(TokenizerHeap *h, size_t n) {
    if (n <= h->room) return;
    free(h->parts);
    free(h->heap);
    h->room = n + n / 2 + 64;
    h->parts = (TokenizerPart *)die_alloc(h->room, sizeof *h->parts, "byte-pair encoding");
    h->heap = (uint64_t *)die_alloc(2 * h->room, sizeof *h->heap, "byte-pair encoding");
}

static inline void tokenizer_append(TokenList *list, uint32_t id) {
    if (list->count == list->room) {
        list->room = list->room ? 2 * list->room : 256;
        list->ids = (uint16_t *)realloc(list->ids, list->room * sizeof *list->ids);
        if (!list->ids) die(EXIT_INTERNAL, "out of memory for %zu tokens", list->room);
    }
    list->ids[list->count++] = (uint16_t)id;
}

// Appends the tokens of s, (n) bytes, 1 <= n <= TOKENIZER_MAX_TEXT.
static inline void tokenizer_merge(const Tokenizer *t, TokenizerHeap *h, const uint8_t *s, size_t n,
                                   TokenList *out) {
    tokenizer_heap_reserve(h, n);
    h->keys = 0;
    for (uint32_t i = 0; i < n; i++) {
        TokenizerPart part = {i ? i - 1 : TOKENIZER_NONE, i + 1, t->byte_id[s[i]], TOKENIZER_NONE};
        h->parts[i] = part;
    }
    for (uint32_t i = 0; i < n; i++) tokenizer_pair(t, h, s, n, i);
    while (h->keys) {
        uint64_t key = tokenizer_heap_pop(h);
        if (h->parts[(uint32_t)key].pair == key >> 32) tokenizer_join(t, h, s, n, (uint32_t)key);
    }
    for (uint32_t i = 0; i < n; i = h->parts[i].next) tokenizer_append(out, h->parts[i].id);
}

// One piece. Between two bytes that no token holds side by side nothing is ever joined, so either
// side is encoded alone: a long piece is mostly many short ones.
static inline void tokenizer_piece(const Tokenizer *t, TokenizerHeap *h, const uint8_t *s, size_t n,
                                   TokenList *out) {
    uint32_t whole = tokenizer_find(t, s, n);
    if (whole != TOKENIZER_NONE) {
        tokenizer_append(out, whole);
        return;
    }
    for (size_t begin = 0, end; begin < n; begin = end) {
        for (end = begin + 1; end < n && tokenizer_beside(t, s[end - 1], s[end]); end++) {}
        tokenizer_merge(t, h, s + begin, end - begin, out);
    }
}

// ---------------------------------------------------------------------------------------------
// Text to ids.

// The length of the UTF-8 character at s, (n) bytes, n >= 1; 0 when it is not one (a surrogate, an
// overlong form, beyond U+10FFFF, cut short).
static inline size_t tokenizer_utf8(const uint8_t *s, size_t n) {
    if (s[0] < 0x80) return 1;
    size_t length = s[0] >= 0xF0 ? 4 : s[0] >= 0xE0 ? 3 : 2;
    if (s[0] < 0xC2 || s[0] > 0xF4 || n < length) return 0;
    uint8_t low = s[0] == 0xE0 ? 0xA0 : s[0] == 0xF0 ? 0x90 : 0x80;
    uint8_t high = s[0] == 0xED ? 0x9F : s[0] == 0xF4 ? 0x8F : 0xBF;
    if (s[1] < low || s[1] > high) return 0;
    for (size_t i = 2; i < length; i++)
        if (s[i] < 0x80 || s[i] > 0xBF) return 0;
    return length;
}

// How many of the (n) bytes of s come before the first that is not UTF-8.
static inline size_t tokenizer_utf8_prefix(const uint8_t *s, size_t n) {
    size_t at = 0;
    for (size_t step; at < n && (step = tokenizer_utf8(s + at, n - at)); at += step) {}
    return at;
}

#ifdef USE_PCRE2
// Splits s, (n) bytes of UTF-8, and appends the tokens of every piece. Returns how many of them are
// the last piece's.
static inline size_t tokenizer_split(const Tokenizer *t, TokenizerHeap *h, const uint8_t *s,
                                     size_t n, TokenList *out) {
    pcre2_match_data *match = pcre2_match_data_create(1, NULL);
    if (!match) die(EXIT_INTERNAL, "out of memory for PCRE2");
    size_t before = out->count;
    for (size_t begin = 0, end; begin < n; begin = end) {
        int found = pcre2_match(t->pattern, s, n, begin, PCRE2_NO_UTF_CHECK, match, NULL);
        end = found > 0 ? pcre2_get_ovector_pointer(match)[1] : begin;
        if (end <= begin) die(EXIT_INTERNAL, "PCRE2 code %d at byte %zu of a text", found, begin);
        before = out->count;
        tokenizer_piece(t, h, s + begin, end - begin, out);
    }
    pcre2_match_data_free(match);
    return out->count - before;
}

// Takes back the last `last` tokens, those of the last piece before the first bad byte, and encodes
// their bytes and all after them, s[good] .. s[n - 1], as one piece.
static inline void tokenizer_bad_tail(const Tokenizer *t, TokenizerHeap *h, const uint8_t *s,
                                      size_t n, size_t good, size_t last, TokenList *out) {
    for (; last; last--) {
        uint32_t id = out->ids[--out->count];
        good -= t->start[id + 1] - t->start[id];
    }
    tokenizer_piece(t, h, s + good, n - good, out);
}
#endif

// Exits when this program cannot encode text with the tokenizer.
static inline void tokenizer_require_encode(const Tokenizer *t) {
#ifndef USE_PCRE2
    if (t->slots)
        die(EXIT_USAGE,
            "this program was built without PCRE2, which splits text for this "
            "tokenizer; install libpcre2-dev and build again, or use --tokenizer bytes");
#endif
    (void)t;
}

// Appends the tokens of text, (n) bytes of anything. Exits when n is over TOKENIZER_MAX_TEXT, or
// PCRE2 is needed and was not compiled in. Several threads may share one Tokenizer.
static inline void tokenizer_encode(const Tokenizer *t, const void *text, size_t n,
                                    TokenList *out) {
    if (!n) return;
    const uint8_t *s = (const uint8_t *)text;
    tokenizer_require_encode(t);
    if (n > TOKENIZER_MAX_TEXT)
        die(EXIT_DATA, "found a text of %zu bytes, expected at most 2^31; split it", n);
    if (!t->slots) {
        for (size_t i = 0; i < n; i++) tokenizer_append(out, s[i]);
        return;
    }
#ifdef USE_PCRE2
    TokenizerHeap heap = {NULL, NULL, 0, 0};
    size_t good = tokenizer_utf8_prefix(s, n);
    size_t last = tokenizer_split(t, &heap, s, good, out);
    if (good < n) tokenizer_bad_tail(t, &heap, s, n, good, last, out);
    free(heap.parts);
    free(heap.heap);
#endif
}

#endif
