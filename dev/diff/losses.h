// losses.h: compares the losses of two runs, step by step, from their log.csv, and prints them.
//
//     each step                          |a - b| <= each
//     the mean of |a - b| over the last half of the steps <= mean
//
// A step of the reference that the other does not have is too far off: its run broke off.
// A validation loss that both have at a step is held to `each`, too. Columns are found by their
// names in the first line; a loss is read from its hexadecimal column, which has all its bits.
#ifndef DEV_DIFF_LOSSES_H
#define DEV_DIFF_LOSSES_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llmc/die.h"  // die, die_alloc
#include "llmc/io.h"   // io_read_file

typedef struct {
    int64_t step;
    double loss, val_loss;  // NaN where the row has none
} LossRow;

typedef struct {
    LossRow *row;  // (count)
    int count;
} Losses;

typedef struct {
    int count, failed;    // losses compared; those past their limit, and the mean when it is
    double worst;         // largest difference as a part of what is allowed
    char worst_name[48];  // where
} LossVerdict;

// The column of that name, counted from 0, or -1.
static inline int losses_column(const char *header, const char *name) {
    size_t n = strlen(name);
    for (int column = 0; *header && *header != '\n'; column++) {
        size_t length = strcspn(header, ",\n");
        if (length == n && !memcmp(header, name, n)) return column;
        header += length + (header[length] == ',');
    }
    return -1;
}

// The number in a column of the line, NaN where it is empty or not there.
static inline double losses_cell(const char *line, int column) {
    for (; column > 0; column--) {
        line += strcspn(line, ",\n");
        if (*line != ',') return NAN;
        line++;
    }
    return column < 0 || *line == ',' || *line == '\n' || !*line ? NAN : strtod(line, NULL);
}

// Reads a log.csv up to `steps`: the losses before it, validations up to it. The caller frees row.
static inline Losses losses_read(const char *path, int64_t steps) {
    Losses l = {NULL, 0};
    char *text;
    size_t size, lines = 0;
    if (io_read_file(path, &text, &size)) die(EXIT_DATA, "%s", io_error);
    int step = losses_column(text, "step"), loss = losses_column(text, "loss"),
        exact = losses_column(text, "loss_hex"), val = losses_column(text, "val_loss");
    if (step < 0 || loss < 0)
        die(EXIT_DATA, "%s: found no columns named step and loss in the first line", path);
    for (size_t i = 0; i < size; i++) lines += text[i] == '\n';
    l.row = (LossRow *)die_alloc(lines, sizeof *l.row, "the rows of a log");
    for (char *line = strchr(text, '\n'); line && line[1]; line = strchr(line + 1, '\n')) {
        if (!strchr(line + 1, '\n')) break;  // a torn row
        double s = losses_cell(line + 1, step), hex = losses_cell(line + 1, exact);
        if (!(s >= 0 && s <= (double)steps)) continue;
        LossRow row = {(int64_t)s, isnan(hex) ? losses_cell(line + 1, loss) : hex,
                       losses_cell(line + 1, val)};
        if (row.step == steps) row.loss = NAN;  // of this one only the validation counts
        l.row[l.count++] = row;
    }
    free(text);
    return l;
}

// Notes a difference and what is allowed; returns what the table says of it.
static inline const char *losses_judge(LossVerdict *v, const char *what, int64_t step, double d,
                                       double allowed) {
    double part = allowed > 0 ? fabs(d) / allowed : d == 0 ? 0 : INFINITY;
    v->failed += !(part <= 1);
    if (!(part <= v->worst)) {
        v->worst = isnan(part) ? INFINITY : part;
        snprintf(v->worst_name, sizeof v->worst_name, "%s %lld", what, (long long)step);
    }
    return part <= 1 ? "ok" : "TOO FAR";
}

// One line; `what` is what the step's number stands for in the verdict, `note` ends the line.
static inline void losses_print(LossVerdict *v, const char *what, int64_t step, double reference,
                                double other, double allowed, const char *note) {
    char difference[24] = "0";  // not a bit
    if (other != reference) snprintf(difference, sizeof difference, "%+.1e", other - reference);
    const char *judged = losses_judge(v, what, step, other - reference, allowed);
    v->count++;
    printf("  %6lld %12.6f %12.6f  %10s  %s%s\n", (long long)step, reference, other, difference,
           judged, note);
}

// Says how many steps of the reference, from `first` on, the other does not have.
static inline void losses_print_missing(LossVerdict *v, int count, int64_t first) {
    printf(
        "  the other side has no loss of %d of the reference's steps, step %lld first  TOO FAR\n",
        count, (long long)first);
    v->count += count, v->failed += count, v->worst = INFINITY;
    snprintf(v->worst_name, sizeof v->worst_name, "step %lld", (long long)first);
}

// Compares `other` with the reference over the reference's steps, and prints it.
static inline LossVerdict losses_compare(const Losses *other, const Losses *reference, double each,
                                         double mean) {
    LossVerdict v = {0, 0, -1, ""};
    double *apart = (double *)die_alloc((size_t)reference->count, sizeof *apart, "differences");
    int steps = 0, missing = 0;
    int64_t first_missing = 0;
    printf("  %6s %12s %12s  %10s\n", "step", "reference", "other", "difference");
    for (int i = 0, k = 0; k < reference->count; k++) {
        const LossRow none = {0, NAN, NAN}, *y = &reference->row[k];
        while (i < other->count && other->row[i].step < y->step) i++;
        bool there = i < other->count && other->row[i].step == y->step;
        const LossRow *x = there ? &other->row[i] : &none;
        if (isnan(x->loss) && !isnan(y->loss) && !missing++) first_missing = y->step;
        double d = x->loss - y->loss, val = x->val_loss - y->val_loss;
        if (!isnan(val))
            losses_print(&v, "validation at step", x->step, y->val_loss, x->val_loss, each,
                         "  validation");
        if (isnan(d)) continue;
        losses_print(&v, "step", x->step, y->loss, x->loss, each, "");
        apart[steps++] = fabs(d);
    }
    double sum = 0;
    int half = (steps + 1) / 2;  // of the steps, the last
    for (int i = steps - half; i < steps; i++) sum += apart[i];
    if (half)
        printf("  mean |difference| of the last %d step%s: %.1e, allowed %g  %s\n", half,
               half == 1 ? "" : "s", sum / half, mean,
               losses_judge(&v, "the mean of the steps from", steps - half, sum / half, mean));
    if (missing) losses_print_missing(&v, missing, first_missing);
    free(apart);
    return v;
}

#endif
