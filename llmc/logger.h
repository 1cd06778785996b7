// logger.h: what a run tells: OUT/log.csv, OUT/run.json and one line a step on stdout.
//
// log.csv has one row a step, with the columns of LOG_HEADER; a value that a step does not have
// (NaN) is left empty. Row s is the step from s to s + 1 updates. Loss and gradient norm come again
// as hexadecimal floats: equal text means equal bits. A run that resumes at step s cuts the
// rows from s on, and torn ones, and goes on after the rest: the file reads as if nothing had
// happened.
//
// A disk that is full must not stop a run: a row that cannot be written gives one warning and is
// lost; every later step tries again. run.json says what was started, as strings; of a run that was
// resumed, the latest start.
#ifndef LLMC_LOGGER_H
#define LLMC_LOGGER_H

#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "llmc/die.h"   // warn
#include "llmc/io.h"    // io_read_file, io_write_file, io_open_append, io_write
#include "llmc/json.h"  // JsonText, JsonPair

#define LOG_HEADER                                                                                 \
    "step,tokens,epoch,loss,grad_norm,lr,momentum,wd,ms,tok_per_s,mfu,val_loss,val_bpb,loss_hex,"  \
    "grad_norm_hex\n"
#define LOG_COLUMNS  15
#define LOG_LINE_MAX 512

typedef struct {
    int64_t step, tokens, epoch;  // before the step
    double loss, grad_norm;       // of its batch; the norm before clipping
    double lr, momentum, wd;      // in force
    double ms, tok_per_s, mfu;    // of the step alone; mfu as a fraction of 1
    double val_loss, val_bpb;     // of the weights before the step, in nats and bits per byte
} LogRow;

typedef struct {
    char path[IO_PATH_MAX];  // of log.csv; empty: there is no folder to write to
    IoFile file;
    bool open, warned;
    int64_t first, total;  // steps: where this process began, and of the whole run
    double started;        // the first step; seconds, monotonic
    uint64_t memory;       // bytes, for the line on stdout; 0: the process's peak
} Logger;

static inline LogRow log_row_init(int64_t step, int64_t tokens, int64_t epoch, double lr,
                                  double momentum, double wd) {
    LogRow r;
    r.step = step, r.tokens = tokens, r.epoch = epoch;
    r.lr = lr, r.momentum = momentum, r.wd = wd;
    r.loss = r.grad_norm = r.ms = r.tok_per_s = r.mfu = r.val_loss = r.val_bpb = NAN;
    return r;
}

// ---------------------------------------------------------------------------------------------
// Text. These functions touch nothing but their buffer.

__attribute__((format(printf, 3, 4))) static inline size_t log_add(char *line, size_t at,
                                                                   const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line + at, LOG_LINE_MAX - at, format, args);
    va_end(args);
    return at + (size_t)n < LOG_LINE_MAX ? at + (size_t)n : LOG_LINE_MAX - 1;
}

// The row of log.csv, with its newline. Returns its length.
static inline size_t log_format_row(char line[LOG_LINE_MAX], const LogRow *r) {
    size_t n = log_add(line, 0, "%" PRId64 ",%" PRId64 ",%" PRId64, r->step, r->tokens, r->epoch);
    const struct {
        double value;
        const char *format;
    } columns[] = {{r->loss, "%.6f"},      {r->grad_norm, "%.6f"}, {r->lr, "%.9g"},
                   {r->momentum, "%.9g"},  {r->wd, "%.9g"},        {r->ms, "%.3f"},
                   {r->tok_per_s, "%.1f"}, {r->mfu, "%.4f"},       {r->val_loss, "%.6f"},
                   {r->val_bpb, "%.6f"},   {r->loss, "%a"},        {r->grad_norm, "%a"}};
    for (size_t i = 0; i < sizeof columns / sizeof *columns; i++) {
        char text[64] = "";
        if (!isnan(columns[i].value))
            snprintf(text, sizeof text, columns[i].format, columns[i].value);
        n = log_add(line, n, ",%s", text);
    }
    return log_add(line, n, "\n");
}

// "1:02:03" for 3723 seconds; "-" when it is not known.
static inline const char *log_format_time(char text[24], double seconds) {
    int64_t s = seconds >= 0 && seconds < 1e9 ? llround(seconds) : -1;
    if (s < 0)
        snprintf(text, 24, "-");
    else
        snprintf(text, 24, "%d:%02d:%02d", (int)(s / 3600), (int)(s / 60 % 60), (int)(s % 60));
    return text;
}

// The line on stdout, without newline; a row with a validation loss has a line for that before it.
// eta in seconds, memory in bytes. Columns keep their places from step to step; what the row does
// not have (NaN) is left out.
static inline size_t log_format_line(char line[LOG_LINE_MAX], const LogRow *r, int64_t total,
                                     double eta, uint64_t memory) {
    char time[24];
    int width = snprintf(NULL, 0, "%" PRId64, total);
    size_t n = log_add(line, 0, "step %*" PRId64 "/%" PRId64, width, r->step, total);
    if (!isnan(r->val_loss)) n = log_add(line, n, "  val loss %.6f", r->val_loss);
    if (!isnan(r->val_bpb)) n = log_add(line, n, " bpb %.6f", r->val_bpb);
    if (isnan(r->loss)) return n;
    if (!isnan(r->val_loss))
        n = log_add(line, n, "\nstep %*" PRId64 "/%" PRId64, width, r->step, total);
    n = log_add(line, n, "  loss %9.6f  norm %8.4f  lr %7.4g", r->loss, r->grad_norm, r->lr);
    n = log_add(line, n, "  %8.1f ms  %8.0f tok/s", r->ms, r->tok_per_s);
    if (!isnan(r->mfu)) n = log_add(line, n, "  mfu %4.1f%%", 100 * r->mfu);
    n = log_add(line, n, "  %5.2f GB  eta %s", (double)memory * 1e-9, log_format_time(time, eta));
    return n;
}

// True for a line (without its newline) that is a whole row of a step before `step`.
static inline bool log_is_before(const char *line, size_t size, int64_t step) {
    int commas = 0;
    for (size_t i = 0; i < size; i++) commas += line[i] == ',';
    if (commas != LOG_COLUMNS - 1 || *line < '0' || *line > '9') return false;
    return strtoll(line, NULL, 10) < step;
}

// Takes the rows from `step` on, and torn ones, out of a log.csv in memory. Returns the new size.
static inline size_t log_cut(char *text, size_t size, int64_t step) {
    size_t kept = strlen(LOG_HEADER);
    for (size_t at = kept; at < size;) {
        const char *end = (const char *)memchr(text + at, '\n', size - at);
        if (!end) break;
        size_t length = (size_t)(end - text) - at;
        if (log_is_before(text + at, length, step)) {
            memmove(text + kept, text + at, length + 1);
            kept += length + 1;
        }
        at += length + 1;
    }
    return kept;
}

// ---------------------------------------------------------------------------------------------
// Files.

static inline double log_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Brings log.csv to where the row of `step` is next, and opens it.
static inline int log_prepare(Logger *log, int64_t step) {
    char *text = NULL;
    size_t size = 0, header = strlen(LOG_HEADER);
    bool there = io_exists(log->path);
    if (there && io_read_file(log->path, &text, &size)) return -1;
    int failed = 0;
    if (size == 0) {
        failed = io_write_file(log->path, LOG_HEADER, header);
    } else if (size < header || memcmp(text, LOG_HEADER, header)) {
        snprintf(io_error, sizeof io_error,
                 "%.900s: found other columns than this program's; "
                 "move the file away",
                 log->path);
        failed = -1;
    } else {
        size_t kept = log_cut(text, size, step);
        if (kept != size) failed = io_write_file(log->path, text, kept);
    }
    free(text);
    if (failed || io_open_append(&log->file, log->path)) return -1;
    log->open = true;
    return 0;
}

static inline void log_complain(Logger *log) {
    if (!log->warned) warn("the log is not written, training goes on: %s", io_error);
    log->warned = true;
}

// Begins to log a run of `total` steps at step `first`. An empty `out` writes no file. Afterwards
// the caller may set memory.
static inline void log_open(Logger *log, const char *out, int64_t first, int64_t total) {
    memset(log, 0, sizeof *log);
    log->first = first, log->total = total;
    if (!*out) return;
    if (snprintf(log->path, sizeof log->path, "%s/log.csv", out) >= (int)sizeof log->path)
        die(EXIT_USAGE, "--out: found a path of more than %d characters", IO_PATH_MAX - 9);
    if (io_make_dir(out) || log_prepare(log, first)) log_complain(log);
}

static inline void log_close(Logger *log) {
    if (log->open && io_close(&log->file)) log_complain(log);
    log->open = false;
}

// Appends the row. When that fails, what was written of it is cut away before the next one.
static inline void log_append(Logger *log, const LogRow *r) {
    char line[LOG_LINE_MAX];
    if (!*log->path) return;
    size_t n = log_format_row(line, r);
    if ((log->open || !log_prepare(log, r->step)) && !io_write(&log->file, line, n)) {
        log->warned = false;
        return;
    }
    log_complain(log);
    if (log->open) close(log->file.fd);
    log->open = false;
}

// Peak memory of the process in bytes.
static inline uint64_t log_peak_memory(void) {
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) ? 0 : (uint64_t)usage.ru_maxrss * 1024;
}

// One step: a row in log.csv and a line on stdout, but for a row without any loss. The time that is
// left counts what went by since the first step began, validations and saves included.
static inline void log_row(Logger *log, const LogRow *r) {
    char line[LOG_LINE_MAX];
    log_append(log, r);
    if (isnan(r->loss) && isnan(r->val_loss)) return;
    double done = (double)(r->step + 1 - log->first), left = (double)(log->total - r->step - 1);
    if (r->step == log->first) log->started = log_seconds() - 1e-3 * r->ms;
    double eta = (log_seconds() - log->started) / done * left;
    uint64_t memory = log->memory ? log->memory : log_peak_memory();
    log_format_line(line, r, log->total, eta, memory);
    puts(line);
    fflush(stdout);
}

// Writes OUT/run.json: {"started": time in UTC, and the facts}. Returns 0 or -1.
static inline int log_write_run(const char *out, const JsonPair *facts, int count) {
    char path[IO_PATH_MAX], started[32];
    struct tm utc;
    time_t now = time(NULL);
    if (snprintf(path, sizeof path, "%s/run.json", out) >= (int)sizeof path) {
        errno = ENAMETOOLONG;
        return io_fail("create", out);
    }
    strftime(started, sizeof started, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    JsonText t = {NULL, 0, 0};
    json_put(&t, "{\n  \"started\": \"%s\"", started);
    for (int i = 0; i < count; i++) {
        json_put(&t, ",\n  ");
        json_put_pair(&t, facts[i]);
    }
    json_put(&t, "\n}\n");
    int failed = io_make_dir(out) || io_write_file(path, t.text, t.size);
    json_text_free(&t);
    return failed ? -1 : 0;
}

#endif
