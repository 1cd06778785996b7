// json.h: reads JSON with a cursor that moves over the text, and writes escaped strings.
//
// The reader allocates nothing and keeps no tree: the caller walks the text in its order and takes
// what it needs. It is strict (RFC 8259): no comments, no trailing commas, no bare words.
//
//     Json j;                                        // {"width": 3, "names": ["a", "b"], ...}
//     json_init(&j, text, size);
//     for (json_enter(&j, '{'); json_more(&j, '}');) {
//         json_key(&j, key, sizeof key);
//         if (!strcmp(key, "width")) json_u64(&j, &width);
//         else json_skip(&j);
//     }
//     if (!json_end(&j)) die(EXIT_DATA, "%s: byte %zu: %s", path, j.error_at, j.error);
//
// The first error stays: every later call returns false and changes nothing, so one look at the end
// is enough. Bytes from 0x80 on pass through strings as they are: UTF-8 is not checked.
#ifndef LLMC_JSON_H
#define LLMC_JSON_H

#include <assert.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llmc/die.h"  // die_alloc

#define JSON_DEPTH_MAX 64  // json_skip refuses values nested deeper

typedef struct {
    const char *text;   // not NUL-terminated
    size_t size, at;    // bytes in it, next byte to read
    bool fresh;         // after an opening bracket: the next element has no comma before it
    const char *error;  // NULL as long as all is well, then the reason
    size_t error_at;    // and its offset
} Json;

static inline void json_init(Json *j, const char *text, size_t size) {
    memset(j, 0, sizeof *j);
    j->text = text, j->size = size;
}

static inline bool json_fail(Json *j, size_t at, const char *reason) {
    if (!j->error) j->error = reason, j->error_at = at;
    return false;
}

// The next character that is not white space; it stays. 0 at the end and after an error.
static inline char json_peek(Json *j) {
    if (j->error) return 0;
    for (; j->at < j->size; j->at++) {
        char c = j->text[j->at];
        if (c != ' ' && c != '\n' && c != '\r' && c != '\t') return c;
    }
    return 0;
}

static inline bool json_expect(Json *j, char c, const char *reason) {
    if (json_peek(j) != c) return json_fail(j, j->at, reason);
    j->at++;
    return true;
}

// Goes into an object (open is '{') or an array ('[').
static inline bool json_enter(Json *j, char open) {
    if (!json_expect(j, open, open == '{' ? "expected {" : "expected [")) return false;
    j->fresh = true;
    return true;
}

// True when another member or element follows; its comma is before the cursor then. False when the
// closing bracket came, which is consumed, and after an error.
static inline bool json_more(Json *j, char close) {
    char c = json_peek(j);
    bool first = j->fresh;
    if (j->error) return false;
    j->fresh = false;
    if (c == close) {
        j->at++;
        return false;
    }
    if (first) return c ? true : json_fail(j, j->at, "the text ends inside { or [");
    if (c != ',') return json_fail(j, j->at, close == '}' ? "expected , or }" : "expected , or ]");
    j->at++;
    if (json_peek(j) == close) return json_fail(j, j->at, "found a comma with nothing after it");
    return true;
}

// True when nothing but white space is left and there was no error.
static inline bool json_end(Json *j) {
    char c = json_peek(j);
    if (!j->error && (c || j->at < j->size)) json_fail(j, j->at, "expected the end of the text");
    return !j->error;
}

// ---------------------------------------------------------------------------------------------
// Strings.

// Four hexadecimal digits at the cursor, or -1.
static inline int json_hex4(Json *j) {
    int value = 0;
    if (j->size - j->at < 4) return -1;
    for (int i = 0; i < 4; i++) {
        char c = j->text[j->at + (size_t)i];
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0) return -1;
        value = 16 * value + digit;
    }
    j->at += 4;
    return value;
}

static inline int json_utf8(char out[4], uint32_t c) {
    int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    static const unsigned char lead[5] = {0, 0, 0xC0, 0xE0, 0xF0};
    for (int i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3F));
    out[0] = (char)(lead[n] | c);
    return n;
}

// Reads what follows a backslash. Returns the number of bytes put into out, 0 on an error.
static inline int json_escape(Json *j, char out[4]) {
    size_t start = j->at - 1;
    char c = j->at < j->size ? j->text[j->at++] : 0;
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    const char *simple = c ? strchr(names, c) : NULL;
    if (simple) {
        out[0] = values[simple - names];
        return 1;
    }
    if (c != 'u') return json_fail(j, start, "found a \\ with an unknown character after it"), 0;
    int high = json_hex4(j);
    if (high < 0) return json_fail(j, start, "expected 4 hexadecimal digits after \\u"), 0;
    if (high < 0xD800 || high > 0xDFFF) return json_utf8(out, (uint32_t)high);
    int low = -1;
    if (high < 0xDC00 && j->size - j->at >= 2 && !memcmp(j->text + j->at, "\\u", 2)) {
        j->at += 2;
        low = json_hex4(j);
    }
    if (low < 0xDC00 || low > 0xDFFF) return json_fail(j, start, "found half a surrogate pair"), 0;
    return json_utf8(out, 0x10000 + ((uint32_t)(high - 0xD800) << 10) + (uint32_t)(low - 0xDC00));
}

// Decodes the string at the cursor into buffer[0, *length), with a NUL after it; `room` counts it,
// too. A string that does not fit is an error. Without a buffer the string is checked and counted.
// length may be NULL: then a NUL inside the string is an error, since the caller could not see it.
static inline bool json_string(Json *j, char *buffer, size_t room, size_t *length) {
    assert(!buffer || room > 0);
    if (!json_expect(j, '"', "expected a string")) return false;
    size_t n = 0, start = j->at - 1;
    while (!j->error) {
        if (j->at >= j->size) return json_fail(j, start, "found a string that is never closed");
        char decoded[4] = {j->text[j->at++], 0, 0, 0};
        int count = 1;
        if (decoded[0] == '"') break;
        bool control = (unsigned char)decoded[0] < 0x20;
        if (control) return json_fail(j, j->at - 1, "found a control character in a string");
        if (decoded[0] == '\\') count = json_escape(j, decoded);
        bool fits = !buffer || (size_t)count < room - n;
        if (!fits) return json_fail(j, start, "found a string that is too long");
        bool hidden = buffer && !length && count && !decoded[0];
        if (hidden) return json_fail(j, start, "found a NUL in a string");
        for (int i = 0; i < count && buffer; i++) buffer[n + (size_t)i] = decoded[i];
        n += (size_t)count;
    }
    if (j->error) return false;
    if (buffer) buffer[n] = 0;
    if (length) *length = n;
    return true;
}

// The decoded length of the string at the cursor, which stays. A buffer of length + 1 holds it; so
// does, without asking, one as long as the text: decoding never makes a string longer.
static inline bool json_string_length(Json *j, size_t *length) {
    json_peek(j);
    size_t at = j->at;
    bool ok = json_string(j, NULL, 0, length);
    if (ok) j->at = at;
    return ok;
}

// The name of a member, with the colon after it.
static inline bool json_key(Json *j, char *buffer, size_t room) {
    return json_string(j, buffer, room, NULL) && json_expect(j, ':', "expected :");
}

// ---------------------------------------------------------------------------------------------
// Numbers, and values of no interest.

static inline size_t json_digits(Json *j) {
    size_t start = j->at;
    while (j->at < j->size && j->text[j->at] >= '0' && j->text[j->at] <= '9') j->at++;
    return j->at - start;
}

// Moves over -?(0|[1-9][0-9]*)(.[0-9]+)?([eE][+-]?[0-9]+)?
static inline bool json_scan_number(Json *j) {
    char c = json_peek(j);
    size_t start = j->at;
    if (j->error) return false;
    if (c == '-') j->at++;
    bool zero = j->at < j->size && j->text[j->at] == '0';
    size_t whole = json_digits(j);
    if (!whole) return json_fail(j, start, "expected a number");
    if (zero && whole > 1) return json_fail(j, start, "found a number that begins with 0");
    if (j->at < j->size && j->text[j->at] == '.') {
        j->at++;
        if (!json_digits(j)) return json_fail(j, start, "expected digits after the point");
    }
    if (j->at < j->size && (j->text[j->at] == 'e' || j->text[j->at] == 'E')) {
        j->at++;
        if (j->at < j->size && (j->text[j->at] == '+' || j->text[j->at] == '-')) j->at++;
        if (!json_digits(j)) return json_fail(j, start, "expected digits in the exponent");
    }
    return true;
}

// A whole number from 0 to 2^64 - 1, written without point and exponent.
static inline bool json_u64(Json *j, uint64_t *value) {
    json_peek(j);
    size_t start = j->at;
    uint64_t found = 0;
    if (!json_scan_number(j)) return false;
    for (size_t i = start; i < j->at; i++) {
        unsigned digit = (unsigned)(j->text[i] - '0');
        if (digit > 9) return json_fail(j, start, "expected a whole number of at least 0");
        bool fits = found <= (UINT64_MAX - digit) / 10;
        if (!fits) return json_fail(j, start, "found a number that passes 2^64 - 1");
        found = 10 * found + digit;
    }
    *value = found;
    return true;
}

static inline bool json_word(Json *j, const char *word) {
    size_t n = strlen(word);
    bool same = j->size - j->at >= n && !memcmp(j->text + j->at, word, n);
    if (!same) return json_fail(j, j->at, "expected a value");
    j->at += n;
    return true;
}

// The name of a member whose text is of no interest.
static inline bool json_skip_key(Json *j) {
    return json_string(j, NULL, 0, NULL) && json_expect(j, ':', "expected :");
}

static inline bool json_skip_scalar(Json *j) {
    switch (json_peek(j)) {
    case '"':
        return json_string(j, NULL, 0, NULL);
    case 't':
        return json_word(j, "true");
    case 'f':
        return json_word(j, "false");
    case 'n':
        return json_word(j, "null");
    case 0:
        return json_fail(j, j->at, "expected a value, found the end of the text");
    default:
        return json_scan_number(j);
    }
}

// Moves over one value of any kind. No recursion: `objects` is a stack of one bit for each open
// container, 1 for an object, so that hostile nesting costs nothing and ends at JSON_DEPTH_MAX.
static inline bool json_skip(Json *j) {
    uint64_t objects = 0;
    int depth = 0;
    do {
        char c = json_peek(j);
        if (c == '{' || c == '[') {
            bool deep = depth == JSON_DEPTH_MAX;
            if (deep) return json_fail(j, j->at, "found a value nested more than 64 deep");
            json_enter(j, c);
            objects = objects << 1 | (c == '{');
            depth++;
        } else if (!json_skip_scalar(j)) {
            return false;
        }
        while (depth && !json_more(j, objects & 1 ? '}' : ']')) {  // several containers may end
            if (j->error) return false;
            objects >>= 1;
            depth--;
        }
        if (depth && objects & 1) json_skip_key(j);
    } while (depth && !j->error);
    return !j->error;
}

// ---------------------------------------------------------------------------------------------
// Writing: text that grows as it is appended to. The caller frees it with json_text_free.

typedef struct {
    char *text;  // NUL-terminated
    size_t size, room;
} JsonText;

typedef struct {
    const char *key, *value;
} JsonPair;

static inline void json_text_reserve(JsonText *t, size_t more) {
    if (t->size + more < t->room) return;
    t->room = 2 * (t->size + more) + 256;
    char *larger = (char *)die_alloc(t->room, 1, "JSON text");
    if (t->size) memcpy(larger, t->text, t->size);
    free(t->text);
    t->text = larger;
}

static inline void json_text_free(JsonText *t) {
    free(t->text);
    memset(t, 0, sizeof *t);
}

// Appends what printf would print: the brackets, commas and numbers, which need no escapes.
__attribute__((format(printf, 2, 3))) static inline void json_put(JsonText *t, const char *format,
                                                                  ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    json_text_reserve(t, (size_t)n + 1);
    vsnprintf(t->text + t->size, (size_t)n + 1, format, again);
    t->size += (size_t)n;
    va_end(again);
    va_end(args);
}

// Appends a string in quotes, with escapes for quotes, backslashes and control characters.
static inline void json_put_string(JsonText *t, const char *s, size_t n) {
    json_put(t, "\"");
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c == '"' || c == '\\')
            json_put(t, "\\%c", c);
        else if (c == '\n')
            json_put(t, "\\n");
        else if (c < 0x20)
            json_put(t, "\\u%04x", c);
        else
            json_text_reserve(t, 1), t->text[t->size++] = (char)c, t->text[t->size] = 0;
    }
    json_put(t, "\"");
}

// Appends "key": "value".
static inline void json_put_pair(JsonText *t, JsonPair pair) {
    json_put_string(t, pair.key, strlen(pair.key));
    json_put(t, ": ");
    json_put_string(t, pair.value, strlen(pair.value));
}

#endif
