// die.h: the one way out of the program, and the meaning of each exit code.
//
// A restart loop reads the code and decides: 6 and 75 are worth another try, the rest are not
// (the input must change first). Every message goes to stderr as
//     error: <what>: found <this>, expected <that>; <what to do>
// and, when there is more than one rank, names the rank that speaks.
#ifndef LLMC_DIE_H
#define LLMC_DIE_H

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    EXIT_OK = 0,          // done
    EXIT_INTERNAL = 1,    // a bug of ours, or no memory
    EXIT_USAGE = 2,       // flags that do not exist, do not parse or contradict each other
    EXIT_DATA = 3,        // a token shard or a tokenizer file
    EXIT_CHECKPOINT = 4,  // a checkpoint that is damaged or does not fit
    EXIT_NONFINITE = 5,   // NaN or Inf in loss or gradient
    EXIT_COMM = 6,        // communication between ranks, or its timeout
    EXIT_DEVICE = 7,      // no GPU, driver, device memory, architecture
    EXIT_DOWNLOAD = 8,    // a download failed
    EXIT_PREEMPTED = 75,  // told to stop; saved, if there is an --out
};

static int die_rank = -1;  // set by a program with several ranks; -1: do not print one

// What every rank would say of the same flags, rank 0 says for all. The others are silent about
// warnings, or about errors, too, and only leave with the code.
static enum { DIE_SPEAKS, DIE_NO_WARNINGS, DIE_SILENT } die_voice = DIE_SPEAKS;

static inline void die_print(const char *kind, const char *format, va_list args) {
    char line[4096], rank[24] = "";
    if (die_rank >= 0) snprintf(rank, sizeof rank, "[rank %d] ", die_rank);
    int n = snprintf(line, sizeof line, "%s%s: ", rank, kind);
    vsnprintf(line + n, sizeof line - (size_t)n, format, args);
    fflush(stdout);
    fprintf(stderr, "%s\n", line);  // at one go: ranks may speak at the same time
}

// Prints one line to stderr and leaves with `code`, one of the EXIT_ values above.
__attribute__((noreturn, format(printf, 2, 3))) static inline void die(int code, const char *format,
                                                                       ...) {
    va_list args;
    va_start(args, format);
    if (die_voice != DIE_SILENT) die_print("error", format, args);
    va_end(args);
    exit(code);
}

// Prints the line of die() and goes on: for who has something to finish before it leaves.
__attribute__((format(printf, 1, 2))) static inline void die_say(const char *format, ...) {
    va_list args;
    va_start(args, format);
    die_print("error", format, args);
    va_end(args);
}

// Prints one line to stderr and goes on.
__attribute__((format(printf, 1, 2))) static inline void warn(const char *format, ...) {
    va_list args;
    va_start(args, format);
    if (die_voice == DIE_SPEAKS) die_print("warning", format, args);
    va_end(args);
}

// malloc that cannot return NULL. Zeroed. `what` names the memory in the message.
static inline void *die_alloc(size_t count, size_t size, const char *what) {
    void *p = calloc(count ? count : 1, size ? size : 1);
    if (!p) die(EXIT_INTERNAL, "out of memory for %s: %zu x %zu bytes", what, count, size);
    return p;
}

// strdup that cannot return NULL.
static inline char *die_strdup(const char *text, const char *what) {
    size_t size = strlen(text) + 1;
    return (char *)memcpy(die_alloc(size, 1, what), text, size);
}

#endif
