// args.h: one table of flags that parses, prints --help, and is echoed.
//
// Each row: name (without --), type, where the value goes, default as text, help. The default goes
// through the same parser as the user's text, so it cannot be out of range or out of date.
//
//     --name value    --name=value    @file    --help
//
// A bool takes 0 or 1, and alone is 1. A value that begins with -- needs the form with '='. A list
// takes one more item each time, and all words that are no flags, if the table has one. @file reads
// more arguments from a file: separated by white space, '#' starts a comment, "..." keeps spaces
// and in it "" is one "; @file may stand anywhere and hold further @files. A later value replaces
// an earlier one. What cannot be parsed ends the program with exit code 2 and names the flag, the
// text found, what was expected, and for an unknown flag the nearest one there is.
#ifndef LLMC_ARGS_H
#define LLMC_ARGS_H

#include <ctype.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llmc/die.h"  // die, EXIT_USAGE
#include "llmc/io.h"   // io_read_file

typedef enum { ARG_BOOL, ARG_INT, ARG_INT64, ARG_DOUBLE, ARG_STRING, ARG_LIST } ArgType;

typedef struct {
    const char **item;  // (count) start from {0}; free(item) when done
    int count;
} ArgList;

typedef struct {
    const char *name;  // "batch-tokens"
    ArgType type;
    void *value;           // bool *, int *, int64_t *, double *, const char **, ArgList *
    const char *fallback;  // the default, as the user would type it
    const char *help;
    double low, high;  // numbers outside are refused; both 0: any finite number
    bool given;        // set by args_parse when the user named it
} Arg;

// By type: in --help, and in sentences.
static const char *const args_type_name[] = {"0|1",    "integer", "integer",
                                             "number", "text",    "text..."};
static const char *const args_type_words[] = {"0 or 1",   "a whole number", "a whole number",
                                              "a number", "text",           "text"};

static inline Arg *args_find(Arg *table, int count, const char *name) {
    for (int i = 0; i < count; i++)
        if (!strcmp(table[i].name, name)) return &table[i];
    return NULL;
}

// The row that takes words that are no flags, or NULL.
static inline Arg *args_find_list(Arg *table, int count) {
    for (int i = 0; i < count; i++)
        if (table[i].type == ARG_LIST) return &table[i];
    return NULL;
}

// Levenshtein distance; names longer than 63 characters are compared by their first 63.
static inline int args_distance(const char *a, const char *b) {
    int row[64], n = strlen(b) < 63 ? (int)strlen(b) : 63;
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 1; a[i - 1] && i < 64; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int change = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            int gap = 1 + (row[j - 1] < row[j] ? row[j - 1] : row[j]);
            row[j] = change < gap ? change : gap;
        }
    }
    return row[n];
}

static inline const char *args_nearest(const Arg *table, int count, const char *name) {
    int best = 0;
    for (int i = 1; i < count; i++)
        if (args_distance(name, table[i].name) < args_distance(name, table[best].name)) best = i;
    return table[best].name;
}

static inline void args_append(ArgList *list, const char *text) {
    size_t size = ((size_t)list->count + 1) * sizeof *list->item;
    list->item = (const char **)realloc((void *)list->item, size);
    if (!list->item) die(EXIT_INTERNAL, "out of memory for %zu bytes of flags", size);
    list->item[list->count++] = text;
}

// Sets one value from its text. Exits 2 when the text is not of the flag's type or range.
static inline void args_set(Arg *arg, const char *text) {
    char *end = (char *)text;
    double number = 0;
    long long whole = 0;
    errno = 0;
    if (arg->type == ARG_STRING) {
        *(const char **)arg->value = text;
        return;
    } else if (arg->type == ARG_LIST) {
        args_append((ArgList *)arg->value, text);
        return;
    } else if (arg->type == ARG_DOUBLE) {
        number = strtod(text, &end);
    } else {
        whole = strtoll(text, &end, 10);
        number = (double)whole;
    }
    bool bad = end == text || *end || errno || isspace((unsigned char)*text) || !isfinite(number);
    bool ranged = arg->low != 0 || arg->high != 0;
    double low = ranged ? arg->low : -DBL_MAX, high = ranged ? arg->high : DBL_MAX;
    if (arg->type == ARG_BOOL) low = 0, high = 1, ranged = true;
    if (arg->type == ARG_INT) low = fmax(low, INT_MIN), high = fmin(high, INT_MAX);
    if (bad || number < low || number > high) {
        char range[96] = "";
        bool real = arg->type == ARG_DOUBLE;
        if (ranged && high < 1e18)
            snprintf(range, sizeof range, real ? " from %g to %g" : " from %.0f to %.0f", low,
                     high);
        else if (ranged)
            snprintf(range, sizeof range, real ? " of at least %g" : " of at least %.0f", low);
        die(EXIT_USAGE, "--%s: found '%s', expected %s%s%s; see --help", arg->name, text,
            real ? "a number" : "a whole number", range,
            bad && !real ? ", written out in digits" : "");
    }
    if (arg->type == ARG_BOOL) *(bool *)arg->value = whole != 0;
    if (arg->type == ARG_INT) *(int *)arg->value = (int)whole;
    if (arg->type == ARG_INT64) *(int64_t *)arg->value = whole;
    if (arg->type == ARG_DOUBLE) *(double *)arg->value = number;
}

// The text that args_set would turn into the present value; not for a list.
static inline const char *args_text(const Arg *arg, char *buffer, size_t size) {
    if (arg->type == ARG_BOOL) snprintf(buffer, size, "%d", *(bool *)arg->value);
    if (arg->type == ARG_INT) snprintf(buffer, size, "%d", *(int *)arg->value);
    if (arg->type == ARG_INT64) snprintf(buffer, size, "%lld", (long long)*(int64_t *)arg->value);
    if (arg->type == ARG_DOUBLE) {
        snprintf(buffer, size, "%.9g", *(double *)arg->value);
        if (strtod(buffer, NULL) != *(double *)arg->value)
            snprintf(buffer, size, "%.17g", *(double *)arg->value);
    }
    return arg->type == ARG_STRING ? *(const char **)arg->value : buffer;
}

// The table as text: one row a flag. The README's list is this output.
static inline void args_help(FILE *out, const char *usage, const Arg *table, int count) {
    fprintf(out, "usage: %s\n\n", usage);
    for (int i = 0; i < count; i++) {
        char left[64];
        snprintf(left, sizeof left, "--%s %s", table[i].name, args_type_name[table[i].type]);
        fprintf(out, "  %-26s %s", left, table[i].help);
        fprintf(out, *table[i].fallback ? " [%s]\n" : "\n", table[i].fallback);
    }
    fprintf(out, "\n  @file reads flags from a file; --help prints this and exits.\n");
}

// One flag, as a line that @file reads back.
static inline void args_echo_line(FILE *out, const char *name, const char *text) {
    bool quote = !*text || strpbrk(text, " \t\r\n\v\f\"#");
    if (!strncmp(text, "--", 2))
        fprintf(out, quote ? "\"--%s=" : "--%s=", name);
    else
        fprintf(out, quote ? "--%s \"" : "--%s ", name);
    for (const char *p = text; *p; p++) fprintf(out, *p == '"' ? "\"\"" : "%c", *p);
    fprintf(out, quote ? "\"\n" : "\n");
}

// The flags with the value in force, as a file that @file reads back: those the user gave, or all.
static inline void args_echo(FILE *out, const Arg *table, int count, bool all) {
    for (int i = 0; i < count; i++) {
        char buffer[64];
        const ArgList *list = table[i].type == ARG_LIST ? (const ArgList *)table[i].value : NULL;
        if (!list && (all || table[i].given))
            args_echo_line(out, table[i].name, args_text(&table[i], buffer, sizeof buffer));
        for (int k = 0; list && k < list->count; k++)
            args_echo_line(out, table[i].name, list->item[k]);
    }
}

// The flags that the user gave, on one line, for a file's header. free() when done.
static inline char *args_line(const Arg *table, int count) {
    char *line = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&line, &size);
    if (!out) die(EXIT_INTERNAL, "out of memory for the flags");
    args_echo(out, table, count, false);
    fclose(out);
    for (char *p = line; *p; p++)
        if (*p == '\n') *p = p[1] ? ' ' : 0;
    return line;
}

// The text of every @file read. It stays, since string flags point into it, until args_free.
enum { ARGS_MAX_FILES = 64 };
static char *args_files[ARGS_MAX_FILES];
static int args_file_count;

static inline void args_free(void) {
    while (args_file_count) free(args_files[--args_file_count]);
}

// Cuts one word off a file's text, in place; *end is where the next one may start. NULL: the quotes
// do not close.
static inline char *args_word(char *word, char **end) {
    if (*word != '"') {
        *end = word + strcspn(word, " \t\r\n\v\f");
        if (**end) *(*end)++ = 0;
        return word;
    }
    char *out = word, *in = word + 1;
    for (; *in && (*in != '"' || in[1] == '"'); in++) {
        in += *in == '"';
        *out++ = *in;
    }
    if (!*in) return NULL;
    *end = in + 1;
    *out = 0;
    return word;
}

// True when a line of args_line gives the flag another value than it has now; *was is that value,
// the default where the line does not name the flag. `line` is cut into words, so it is a copy.
static inline bool args_changed(const Arg *arg, char *line, const char **was) {
    char buffer[64], *end = line;
    size_t n = strlen(arg->name);
    const char *now = args_text(arg, buffer, sizeof buffer);
    *was = arg->fallback;
    while (*(end += strspn(end, " "))) {
        const char *word = args_word(end, &end);
        bool named = word && !strncmp(word, "--", 2) && !strncmp(word + 2, arg->name, n);
        if (!word) break;
        if (named && word[2 + n] == '=') *was = word + 3 + n;
        if (!named || word[2 + n]) continue;
        end += strspn(end, " ");
        if ((word = args_word(end, &end))) *was = word;
    }
    if (arg->type == ARG_STRING) return strcmp(*was, now) != 0;
    return strtod(*was, NULL) != strtod(now, NULL);
}

static inline void args_parse_list(Arg *table, int count, const char *usage, char **list, int n);

// Splits the text of a file into arguments, in place, and reads those.
static inline void args_parse_file(Arg *table, int count, const char *usage, const char *path) {
    char *text;
    size_t size;
    if (args_file_count == ARGS_MAX_FILES)
        die(EXIT_USAGE, "@%s: found more than %d files of flags; does one of them name itself?",
            path, ARGS_MAX_FILES);
    if (io_read_file(path, &text, &size)) die(EXIT_USAGE, "@%s: %s", path, io_error);
    args_files[args_file_count++] = text;
    if (strlen(text) != size)
        die(EXIT_USAGE, "@%s: found a zero byte at %zu, expected text", path, strlen(text));
    char **list = (char **)die_alloc(size / 2 + 2, sizeof *list, "flags from a file");
    int n = 0;
    for (char *p = text; *p;) {
        if (isspace((unsigned char)*p)) {
            p++;
            continue;
        }
        if (*p == '#') {
            p += strcspn(p, "\n");
            continue;
        }
        list[n] = args_word(p, &p);
        if (!list[n++]) die(EXIT_USAGE, "@%s: found a \" that is never closed", path);
    }
    args_parse_list(table, count, usage, list, n);
    free(list);
}

static inline void args_parse_list(Arg *table, int count, const char *usage, char **list, int n) {
    for (int i = 0; i < n; i++) {
        if (list[i][0] == '@') {
            args_parse_file(table, count, usage, list[i] + 1);
            continue;
        }
        if (!strcmp(list[i], "--help") || !strcmp(list[i], "-h")) {
            args_help(stdout, usage, table, count);
            exit(EXIT_OK);
        }
        if (strncmp(list[i], "--", 2)) {
            Arg *words = args_find_list(table, count);
            if (!words)
                die(EXIT_USAGE, "found '%s', expected a flag (--name value); see --help", list[i]);
            if (list[i][0] == '-')
                die(EXIT_USAGE, "found '%s', expected a file or a flag; did you mean --%s?",
                    list[i], args_nearest(table, count, list[i] + 1));
            args_set(words, list[i]);
            words->given = true;
            continue;
        }
        char name[64];
        const char *equals = strchr(list[i], '=');
        snprintf(name, sizeof name, "%.*s", equals ? (int)(equals - list[i] - 2) : 63, list[i] + 2);
        Arg *arg = args_find(table, count, name);
        if (!arg)
            die(EXIT_USAGE, "unknown flag --%s; did you mean --%s? see --help", name,
                args_nearest(table, count, name));
        bool alone = i + 1 >= n || !strncmp(list[i + 1], "--", 2) || list[i + 1][0] == '@';
        if (!equals && alone && arg->type == ARG_BOOL) {
            args_set(arg, "1");
            arg->given = true;
            continue;
        }
        if (!equals && i + 1 >= n)
            die(EXIT_USAGE, "--%s: its value is missing; expected %s", name,
                args_type_words[arg->type]);
        if (!equals && !strncmp(list[i + 1], "--", 2))
            die(EXIT_USAGE,
                "--%s: found the flag %s where its value should be; for a value that begins with "
                "-- write --%s=...",
                name, list[i + 1], name);
        args_set(arg, equals ? equals + 1 : list[++i]);
        arg->given = true;
    }
}

// Sets every value to its default, then reads the command line. usage: the first line of --help.
static inline void args_parse(Arg *table, int count, const char *usage, int argc, char **argv) {
    for (int i = 0; i < count; i++) {
        if (table[i].type != ARG_LIST) args_set(&table[i], table[i].fallback);
        table[i].given = false;
    }
    args_parse_list(table, count, usage, argv + 1, argc - 1);
}

#endif
