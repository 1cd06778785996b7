// tensors.h: compares two safetensors files, tensor by tensor, and prints what it found.
//
// The files are a trainer's dumps (--dump), dumps of sketches (--dump-sketch 1), one of each, or
// the model.safetensors of two saves. b is the reference, a is held against it:
//     ||a - b|| <= tolerance ||b|| + 1e-8 sqrt(numel)
//     a lambda's gradient: ||a - b|| <= tolerance * the norm of all lambdas' gradients, since each
//         is a sum whose terms cancel and may come near 0 by chance. (The fixtures' yardstick, the
//         sum of |terms|, is not in a dump: it is 30 to 100 times as large from --init test, and
//         0.5 to 5 times after 50 steps; depth 4, C 256, 1024 tokens.)
//     what is exactly 0 in b is exactly 0 in a: a row, a column, an element of a vector. A single 0
//         between other numbers of a matrix is rounding, and counts as any number.
//         BF16 excuses wfc and wproj: a unit that was silent for all tokens may just wake.
//     tokens, targets: equal. Parameters before the step: equal, but for a sketch's last digits.
// From sketches (llmc/sketch.h) the distance is an estimate (standard error 9%), zeros are counted.
#ifndef DEV_DIFF_TENSORS_H
#define DEV_DIFF_TENSORS_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llmc/die.h"          // die, die_alloc
#include "llmc/safetensors.h"  // st_open, st_find, st_read
#include "llmc/sketch.h"       // sketch_compute, sketch_distance

typedef struct {
    double loss, logits, grad, updated;
    bool bf16;
} Tolerances;

typedef enum { OF_STEP, OF_GRADIENTS, OF_PARAMETERS, OF_GROUPS } TensorGroup;

// What became of one tensor.
typedef struct {
    char name[ST_NAME_MAX];
    TensorGroup group;
    double norm, error, allowed;  // of the reference, of the difference, of which at most
    double part;                  // error as a part of what is allowed; infinite: see the note
    char note[160];
} TensorRow;

typedef struct {
    TensorRow *row;  // (count)
    int count;
    int given;          // of these went into the step, and are equal
    int failed, worst;  // past their limit; index of the worst
    uint64_t numbers;   // compared in all
} TensorRows;

// A tensor in memory. A sketch stands for one of a size that is not known.
typedef struct {
    StTensor about;
    void *data;
    uint64_t numel;
    bool sketch;
} Loaded;

static inline double tensor_at(const Loaded *x, uint64_t i) {
    switch (x->about.dtype) {
    case ST_F64:
        return ((const double *)x->data)[i];
    case ST_I32:
        return ((const int32_t *)x->data)[i];
    default:
        return (double)((const float *)x->data)[i];
    }
}

// The tensor of that name, or its sketch; data is NULL when the file has neither.
static inline Loaded tensor_load(StFile *f, const char *name) {
    Loaded x;
    char sketched[ST_NAME_MAX + 8];
    uint64_t bytes;
    memset(&x, 0, sizeof x);
    snprintf(sketched, sizeof sketched, "sketch.%s", name);
    const StTensor *whole = st_find(f, name), *t = whole ? whole : st_find(f, sketched);
    if (!t) return x;
    if (t->dtype != ST_F32 && t->dtype != ST_F64 && t->dtype != ST_I32)
        die(EXIT_DATA, "%s: %s: found dtype %s, expected F32, F64 or I32", f->file.path, name,
            st_dtype_name[t->dtype]);
    st_bytes(t, &bytes);
    x.about = *t, x.sketch = !whole, x.numel = bytes / st_dtype_size[t->dtype];
    if (x.sketch && (t->dtype != ST_F64 || x.numel != SKETCH_SIZE))
        die(EXIT_DATA, "%s: %s: found %llu numbers, expected the %d of a sketch", f->file.path,
            name, (unsigned long long)x.numel, SKETCH_SIZE);
    x.data = die_alloc(1, bytes, "a tensor");
    if (st_read(f, t, x.data)) die(EXIT_DATA, "%s", io_error);
    return x;
}

static inline bool tensor_starts(const char *name, const char *prefix) {
    return !strncmp(name, prefix, strlen(prefix));
}

static inline bool tensor_is_given(const char *name) {  // what goes into the step
    return !strcmp(name, "tokens") || !strcmp(name, "targets") || tensor_starts(name, "param.");
}

static inline bool tensor_is_lambda(const char *name) {
    return tensor_starts(name, "grad.") && strstr(name, "_lambda");
}

static inline TensorGroup tensor_group(const char *name) {
    if (!strcmp(name, "loss") || !strcmp(name, "grad_norm") || !strcmp(name, "logits"))
        return OF_STEP;
    if (tensor_is_given(name)) return OF_STEP;
    return tensor_starts(name, "grad.") ? OF_GRADIENTS : OF_PARAMETERS;  // also those of a save
}

static inline double tensor_tolerance(const Tolerances *t, const char *name) {
    if (!strcmp(name, "loss")) return t->loss;
    if (!strcmp(name, "logits")) return t->logits;
    if (tensor_is_given(name)) return 1e-12;
    return tensor_starts(name, "grad") ? t->grad : t->updated;
}

// The error as a part of what is allowed, which may be nothing.
static inline double tensor_part(double error, double allowed) {
    return allowed > 0 ? error / allowed : error > 0 ? INFINITY : error;
}

// Two whole tensors. Fills in norm, error, and with `zeros` a note where a 0 of b is none in a.
static inline void tensor_compare_whole(TensorRow *row, const Loaded *a, const Loaded *b,
                                        bool zeros) {
    uint64_t K = b->about.ndim ? b->about.shape[b->about.ndim - 1] : 1, R = K ? b->numel / K : 0;
    bool *live_row = (bool *)die_alloc(R + K, 1, "a tensor's rows"), *live_column = live_row + R;
    double error = 0, norm = 0;
    for (uint64_t r = 0; r < R; r++)
        for (uint64_t k = 0; k < K; k++) {
            double y = tensor_at(b, r * K + k), d = tensor_at(a, r * K + k) - y;
            error += d * d, norm += y * y;
            if (y != 0) live_row[r] = live_column[k] = true;
        }
    row->norm = sqrt(norm), row->error = sqrt(error);
    for (uint64_t r = 0; r < R && zeros; r++)
        for (uint64_t k = 0; k < K && zeros; k++) {
            if ((live_row[r] && live_column[k]) || tensor_at(b, r * K + k) != 0 ||
                tensor_at(a, r * K + k) == 0)
                continue;
            snprintf(row->note, sizeof row->note, "at (%llu, %llu): found %g, expected exactly 0",
                     (unsigned long long)r, (unsigned long long)k, tensor_at(a, r * K + k));
            zeros = false;
        }
    free(live_row);
}

// The same where at least one is a sketch; a few zeros in a million may be rounding.
static inline void tensor_compare_sketch(TensorRow *row, const Loaded *a, const Loaded *b,
                                         bool zeros) {
    double sketch[2][SKETCH_SIZE];
    const Loaded *side[2] = {a, b};
    for (int s = 0; s < 2; s++) {
        if (side[s]->sketch)
            memcpy(sketch[s], side[s]->data, sizeof sketch[s]);
        else
            sketch_compute(sketch[s], (const float *)side[s]->data, side[s]->numel);
    }
    double more = sketch[0][SKETCH_NONZERO] - sketch[1][SKETCH_NONZERO];
    row->norm = sketch[1][SKETCH_NORM];
    row->error = sketch_distance(sketch[0], sketch[1]);
    if (zeros && more > 1e-6 * sketch[1][SKETCH_NONZERO])
        snprintf(row->note, sizeof row->note, "found %.0f numbers more that are not 0", more);
}

// Norm of the gradients of all lambdas of a file.
static inline double tensor_lambdas_norm(StFile *f) {
    double sum = 0;
    for (int i = 0; i < f->count; i++) {
        const char *name = f->by_name[i]->name;
        bool sketch = tensor_starts(name, "sketch.");
        if (!tensor_is_lambda(sketch ? name + 7 : name)) continue;
        Loaded x = tensor_load(f, sketch ? name + 7 : name);
        for (uint64_t k = 0; k < (sketch ? 1 : x.numel); k++) sum += pow(tensor_at(&x, k), 2);
        free(x.data);
    }
    return sqrt(sum);
}

// Whether something keeps two tensors from being compared, and then a note of it.
static inline bool tensor_mismatch(char note[160], const StFile *fa, const StFile *fb,
                                   const Loaded *a, const Loaded *b) {
    char shape_a[64], shape_b[64];
    bool same = a->about.ndim == b->about.ndim &&
                !memcmp(a->about.shape, b->about.shape, sizeof a->about.shape);
    if (!a->data || !b->data)
        snprintf(note, 160, "not in %.140s", (a->data ? fb : fa)->file.path);
    else if (!same && !a->sketch && !b->sketch)
        snprintf(note, 160, "found shape %s, expected %s",
                 st_shape_text(&a->about, shape_a, sizeof shape_a),
                 st_shape_text(&b->about, shape_b, sizeof shape_b));
    return *note;
}

// One tensor of both files; counts it among the rows.
static inline TensorRow tensor_compare(StFile *fa, StFile *fb, const char *name,
                                       const Tolerances *tolerances, TensorRows *rows) {
    TensorRow row;
    memset(&row, 0, sizeof row);
    snprintf(row.name, sizeof row.name, "%s", name), row.group = tensor_group(name);
    Loaded a = tensor_load(fa, name), b = tensor_load(fb, name);
    double tolerance = tensor_tolerance(tolerances, name), slack = 0;
    bool apart = tensor_mismatch(row.note, fa, fb, &a, &b);
    bool zeros = !tolerances->bf16 || !(strstr(name, ".wfc") || strstr(name, ".wproj"));
    if (!apart && !a.sketch && !b.sketch)
        tensor_compare_whole(&row, &a, &b, zeros);
    else if (!apart)
        tensor_compare_sketch(&row, &a, &b, zeros);
    if (b.data && tolerance > 0 && !tensor_is_given(name))
        slack = 1e-8 * sqrt(b.sketch ? ((double *)b.data)[SKETCH_NONZERO] : (double)b.numel);
    double norm = tensor_is_lambda(name) ? tensor_lambdas_norm(fb) : row.norm;
    row.allowed = tolerance * norm + slack, row.part = tensor_part(row.error, row.allowed);
    if (!isfinite(row.error)) snprintf(row.note, sizeof row.note, "found NaN or Inf");
    if (!*row.note && tensor_is_given(name) && row.part > 1)
        snprintf(row.note, sizeof row.note, "it goes into the step, and must be equal");
    if (*row.note) row.part = INFINITY;
    rows->given += tensor_is_given(name) && row.part <= 1;
    rows->numbers += a.sketch ? a.numel : b.numel;
    free(a.data), free(b.data);
    return row;
}

static inline int tensor_order(const void *a, const void *b) {
    const TensorRow *x = (const TensorRow *)a, *y = (const TensorRow *)b;
    if (x->group != y->group) return x->group < y->group ? -1 : 1;
    if (x->part != y->part) return x->part > y->part ? -1 : 1;
    return strcmp(x->name, y->name);
}

// Every tensor that file a or file b has; by group, worst first.
static inline TensorRows tensors_compare(const char *path_a, const char *path_b,
                                         const Tolerances *tolerances) {
    TensorRows rows;
    StFile f[2];
    memset(&rows, 0, sizeof rows);
    if (st_open(&f[0], path_a) || st_open(&f[1], path_b)) die(EXIT_DATA, "%s", io_error);
    rows.row = (TensorRow *)die_alloc((size_t)f[0].count + (size_t)f[1].count, sizeof *rows.row,
                                      "the table of tensors");
    for (int side = 0; side < 2; side++)
        for (int i = 0; i < f[side].count; i++) {
            const char *name = f[side].by_name[i]->name;
            name += tensor_starts(name, "sketch.") ? 7 : 0;
            bool seen = false;
            for (int k = 0; k < rows.count && !seen; k++) seen = !strcmp(rows.row[k].name, name);
            if (seen) continue;
            TensorRow row = tensor_compare(&f[0], &f[1], name, tolerances, &rows);
            rows.row[rows.count++] = row;
        }
    qsort(rows.row, (size_t)rows.count, sizeof *rows.row, tensor_order);
    for (int i = 0; i < rows.count; i++) {
        rows.failed += !(rows.row[i].part <= 1);
        if (rows.row[i].part > rows.row[rows.worst].part) rows.worst = i;
    }
    st_close(&f[0]), st_close(&f[1]);
    return rows;
}

// A part of what is allowed: "0" when not a bit differs, "16.02%", "1031.2 x", "" with a note.
static inline const char *tensor_part_text(char text[32], double part) {
    if (!isfinite(part)) return "";
    if (part == 0) return "0";
    snprintf(text, 32, part > 1 ? "%.1f x" : "%.2f%%", part > 1 ? part : 100 * part);
    return text;
}

static inline void tensor_print_error(const TensorRow *x) {
    char error[24] = "0", part[32];
    if (x->error != 0) snprintf(error, sizeof error, "%.2e", x->error);
    printf(" %9.2e %9s %9.2e %11s", x->norm, error, x->allowed, tensor_part_text(part, x->part));
}

// The rows of a group: up to `top` of them (0: all), those past their limit always; not what went
// into the step and is equal.
static inline void tensors_print_group(const TensorRows *rows, TensorGroup group, int top) {
    static const char *const title[OF_GROUPS] = {"result", "gradient of", "updated parameter"};
    int shown = 0, left_out = 0;
    double most = 0;  // the largest part of those left out
    for (int i = 0; i < rows->count; i++) {
        const TensorRow *x = &rows->row[i];
        bool bad = !(x->part <= 1);
        if (x->group != group || (!bad && tensor_is_given(x->name))) continue;
        if (top && shown >= top && !bad) {
            left_out++, most = fmax(most, x->part);
            continue;
        }
        if (!shown++)
            printf("  %-26s %9s %9s %9s %11s\n", title[group], "norm", "error", "allowed",
                   "of allowed");
        const char *dot = group == OF_STEP ? NULL : strchr(x->name, '.');
        bool prefix = tensor_starts(x->name, "grad.") || tensor_starts(x->name, "updated.");
        printf("    %-24s", prefix ? dot + 1 : x->name);
        tensor_print_error(x);
        printf("%s%s%s\n", bad ? "  TOO FAR" : "", *x->note ? "  " : "", x->note);
    }
    char part[32];
    if (left_out)
        printf(most > 0 ? "    ... and %d more, each at most %s\n"
                        : "    ... and %d more, all %s\n",
               left_out, tensor_part_text(part, most));
}

// top < 0: as many as read well, but of the gradients all if all_gradients says so.
static inline void tensors_print(const TensorRows *rows, int top, bool all_gradients) {
    enum { READS_WELL = 5 };
    for (TensorGroup g = OF_STEP; g < OF_GROUPS; g++) {
        bool all = g == OF_GRADIENTS && all_gradients;
        tensors_print_group(rows, g, top >= 0 ? top : all ? 0 : READS_WELL);
    }
    printf("  %d tensors, %llu numbers compared", rows->count, (unsigned long long)rows->numbers);
    printf(rows->given ? "; %d of the tensors go into the step, and are equal\n" : "\n",
           rows->given);
}

#endif
