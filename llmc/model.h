// model.h: the shape of the model, and THE table of its parameters.
//
// Letters, here and everywhere: B rows, T tokens a row, C channels, L layers, H heads, D = C/H,
// V vocabulary, Vp = V rounded up to a multiple of 128, F = 4C. Matrices are stored (out, in), row
// by row. --depth L sets every size; each has a flag of its own that overrides it.
//
// The table lists each tensor's name, shape, both initial distributions and optimizer group.
// Memory, initialisation, optimizer, checkpoint, dump and the printed summary walk it; nothing
// knows a tensor by its number. Its order is the order in memory, block by block: embedding and
// smear, each layer, lambdas and head. wq, wk, wv of a layer lie one after the other, so that one
// (3C, C) matmul serves all three.
#ifndef LLMC_MODEL_H
#define LLMC_MODEL_H

#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llmc/die.h"    // die, EXIT_USAGE
#include "llmc/flags.h"  // Flags
#include "llmc/rand.h"   // rand_uniform, rand_normal

// ---------------------------------------------------------------------------------------------
// Shape.

enum { MODEL_MAX_LAYERS = 128, SMEAR_CHANNELS = 24, GATE_CHANNELS = 12 };

typedef struct {
    int L, C, H, D, F, V, Vp, T;
    int bos;        // token that starts a document
    bool doc_mask;  // attention and smear stay inside a document
    // W_i: a query of layer i sees the W_i keys before it, and itself
    int window[MODEL_MAX_LAYERS];
} Config;

static inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
static inline bool config_has_value_embed(const Config *c, int layer) {
    return layer % 2 == (c->L - 1) % 2;
}

// Below three layers there is nothing to take back: backout_lambda is 0, without gradient, and
// stays.
static inline bool config_has_backout(const Config *c) { return c->L >= 3; }

// Matrix parameters P: what Muon trains, less the value gates, and the head. The horizon, the batch
// and FLOPs per token count these.
static inline double config_matrix_params(const Config *c) {
    return (double)c->L * (4.0 * c->C * c->C + 2.0 * c->C * c->F) + (double)c->V * c->C;
}

// Training FLOPs per token as PaLM counts them (Chowdhery et al. 2022, appendix B): 6 for each
// matrix parameter and 12 C W for the attention of each layer. causal: count only the keys a query
// sees.
static inline double config_flops_per_token(const Config *c, bool causal) {
    double flops = 6 * config_matrix_params(c);
    for (int i = 0; i < c->L; i++) {
        double w = fmin(c->window[i], c->T), T = c->T;
        double seen = (w * (w + 1) / 2 + (T - w) * (w + 1)) / T;  // query i: min(i, w) + 1 keys
        flops += 12.0 * c->C * (causal ? seen : w);
    }
    return flops;
}

// Shape from flags. vocab and bos: what the tokenizer says, or -1 without one. Exits 2 when the
// sizes do not fit together.
static inline Config config_from_flags(const Flags *f, int vocab, int bos) {
    Config c;
    memset(&c, 0, sizeof c);
    c.L = f->depth;
    c.C = f->channels ? f->channels : round_up(64 * c.L, 128);
    c.H = f->heads ? f->heads : c.C >= 128 ? c.C / 128 : 1;
    c.D = c.C / c.H;
    c.F = 4 * c.C;
    c.V = f->vocab ? f->vocab : vocab > 0 ? vocab : 50257;
    c.Vp = round_up(c.V, 128);
    c.T = f->seq_len;
    c.bos = f->bos >= 0 ? f->bos : bos >= 0 ? bos : c.V > 50256 ? 50256 : c.V - 1;
    c.doc_mask = f->doc_mask;
    if (c.C % c.H || c.D % 2)
        die(EXIT_USAGE,
            "--channels %d and --heads %d: found C/H = %g, expected an even whole number", c.C, c.H,
            (double)c.C / c.H);
    if (c.D > 32768)
        die(EXIT_USAGE, "--heads %d: found C/H = %d, expected at most 32768", c.H, c.D);
    if (c.C < SMEAR_CHANNELS || c.C % 8)
        die(EXIT_USAGE, "--channels: found %d, expected a multiple of 8, at least %d", c.C,
            SMEAR_CHANNELS);
    if (c.V < vocab)
        die(EXIT_USAGE, "--vocab: found %d, expected at least %d, the tokenizer's", c.V, vocab);
    if (c.V < 2 || c.bos >= c.V)
        die(EXIT_USAGE, "--vocab %d: expected at least 2, and more than --bos %d", c.V, c.bos);
    size_t period = strlen(f->window_pattern);
    if (!period || strspn(f->window_pattern, "SL") != period)
        die(EXIT_USAGE, "--window-pattern: found '%s', expected letters S (short) and L (long)",
            f->window_pattern);
    int window_short = f->window_short ? f->window_short : round_up((c.T + 3) / 4, 128);
    for (int i = 0; i < c.L; i++) {
        bool is_long = f->window_pattern[(size_t)i % period] == 'L' || i == c.L - 1;
        c.window[i] = is_long || window_short > c.T ? c.T : window_short;
    }
    return c;
}

// ---------------------------------------------------------------------------------------------
// The table of parameters.

// One name for each role a tensor can play, in the order in which forward comes to them; those of a
// layer come once per layer, of the first two an element.
typedef enum {
    WTE,
    SMEAR_GATE,
    SMEAR_LAMBDA,
    X0_LAMBDA,
    RESID_LAMBDA,
    VE_GATE,
    VALUE_EMBED,
    WQ,
    WK,
    WV,
    WO,
    WFC,
    WPROJ,
    BACKOUT_LAMBDA,
    LM_HEAD,
    ROLE_COUNT,
} Role;

// Groups share an optimizer and its numbers (schedule.h).
typedef enum {
    GROUP_LM_HEAD,
    GROUP_WTE,
    GROUP_VALUE_EMBED,
    GROUP_RESID,
    GROUP_X0,
    GROUP_SMEAR,
    GROUP_MATRIX,
    GROUP_COUNT,
} Group;

typedef enum { INIT_RAMP, INIT_UNIFORM, INIT_NORMAL } InitKind;
typedef struct {
    InitKind kind;
    // ramp: from a to b over the elements; uniform: a .. b; normal: standard deviation a
    double a, b;
} Init;

typedef struct {
    char name[48];  // "layers.3.wq", in every file
    Role role;
    int layer;  // -1 outside the layers
    int ndim;   // 1: (cols); 2: (rows, cols)
    int rows, cols;
    int live_rows;  // rows from here on are padding: 0, and stay 0
    bool frozen;    // gets no gradient and no update
    Group group;
    Init init, test_init;
    int block;           // which block of the arena it lies in
    size_t offset;       // where it starts in the arena of parameters, in elements
    size_t state;        // where its second optimizer state starts in that arena, in elements
    size_t state_count;  // AdamW: v, as large as the tensor; Muon: one number per longer-axis index
} Tensor;

typedef struct {
    int count;
    Tensor *tensor;      // (count)
    size_t numel;        // elements of the parameter arena
    size_t state_numel;  // elements of the arena of second optimizer states
    size_t params;       // parameters: the sum of rows * cols, padding rows included
    int blocks;          // L + 2: before the layers, each layer, after them
    size_t block_offset[MODEL_MAX_LAYERS + 3];  // (blocks + 1): where each starts, and the end
} Table;

static inline size_t tensor_numel(const Tensor *t) { return (size_t)t->rows * (size_t)t->cols; }

// Tensors start at multiples of 64 bytes; where C is a multiple of 4, wq, wk and wv touch. Blocks
// are padded so that up to 8 ranks can split each into equal pieces that start so, too.
enum { TABLE_ALIGN = 16, TABLE_BLOCK_ALIGN = 8 * TABLE_ALIGN };

static inline size_t table_align(size_t n, size_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// Ends a block: what is added next begins another.
static inline void table_end_block(Table *t) {
    t->numel = table_align(t->numel, TABLE_BLOCK_ALIGN);
    t->block_offset[++t->blocks] = t->numel;
}

static inline void table_add(Table *t, const char *name, Role role, int layer, int rows, int cols,
                             Group group, Init init, Init test_init) {
    Tensor *x = &t->tensor[t->count++];
    memset(x, 0, sizeof *x);
    if (layer < 0)
        snprintf(x->name, sizeof x->name, "%s", name);
    else
        snprintf(x->name, sizeof x->name, "layers.%d.%s", layer, name);
    x->role = role, x->layer = layer, x->group = group;
    x->ndim = rows ? 2 : 1;
    x->rows = x->live_rows = rows ? rows : 1, x->cols = cols;
    x->init = init, x->test_init = test_init;
    x->block = t->blocks, x->offset = t->numel, x->state = t->state_numel;
    size_t n = tensor_numel(x);
    x->state_count = group != GROUP_MATRIX ? n : (size_t)(rows >= cols ? rows : cols);
    t->params += n;
    t->numel += table_align(n, TABLE_ALIGN);
    t->state_numel += table_align(x->state_count, TABLE_ALIGN);
}

static inline Init init_ramp(double a, double b) {
    Init i = {INIT_RAMP, a, b};
    return i;
}
static inline Init init_uniform(double a, double b) {
    Init i = {INIT_UNIFORM, a, b};
    return i;
}
static inline Init init_normal(double std) {
    Init i = {INIT_NORMAL, std, 0};
    return i;
}

// Builds the table; table_free releases it. The second Init of each row is --init test's: at the
// default one wo = wproj = 0 silence most of the network, so it cannot be compared there.
static inline void table_init(Table *t, const Config *c) {
    int C = c->C, F = c->F, L = c->L, H = c->H, Vp = c->Vp;
    double b = sqrt(3.0 / C), bf = sqrt(3.0 / F);
    Init zero = init_ramp(0, 0), wide = init_uniform(-b, b);
    Init backout = config_has_backout(c) ? init_ramp(0.2, 0.2) : zero;
    Init backout_test = config_has_backout(c) ? init_uniform(0.2, 0.4) : zero;
    memset(t, 0, sizeof *t);
    t->tensor =
        (Tensor *)die_alloc((size_t)(8 * L + 7), sizeof *t->tensor, "the table of parameters");
    table_add(t, "wte", WTE, -1, Vp, C, GROUP_WTE, init_normal(0.8), init_normal(0.8));
    table_add(t, "smear_gate", SMEAR_GATE, -1, 0, SMEAR_CHANNELS, GROUP_SMEAR,
              init_uniform(0, 0.02), init_uniform(-0.5, 0.5));
    table_add(t, "smear_lambda", SMEAR_LAMBDA, -1, 0, 1, GROUP_SMEAR, zero, init_uniform(0.3, 0.6));
    table_end_block(t);
    for (int i = 0; i < L; i++) {
        table_add(t, "wq", WQ, i, C, C, GROUP_MATRIX, wide, wide);
        table_add(t, "wk", WK, i, C, C, GROUP_MATRIX, wide, wide);
        table_add(t, "wv", WV, i, C, C, GROUP_MATRIX, wide, wide);
        table_add(t, "wo", WO, i, C, C, GROUP_MATRIX, zero, wide);
        table_add(t, "wfc", WFC, i, F, C, GROUP_MATRIX, init_uniform(-0.4 * b, 0.4 * b), wide);
        table_add(t, "wproj", WPROJ, i, C, F, GROUP_MATRIX, zero, init_uniform(-bf, bf));
        if (config_has_value_embed(c, i)) {
            table_add(t, "ve_gate", VE_GATE, i, H, GATE_CHANNELS, GROUP_MATRIX,
                      init_uniform(0, 0.02), init_uniform(-0.5, 0.5));
            table_add(t, "value_embed", VALUE_EMBED, i, Vp, C, GROUP_VALUE_EMBED, wide, wide);
        }
        table_end_block(t);
    }
    table_add(t, "resid_lambda", RESID_LAMBDA, -1, 0, L, GROUP_RESID, init_ramp(1.15, 1.05),
              init_uniform(0.8, 1.2));
    table_add(t, "x0_lambda", X0_LAMBDA, -1, 0, L, GROUP_X0, init_ramp(0.20, 0.05),
              init_uniform(0.1, 0.4));
    table_add(t, "backout_lambda", BACKOUT_LAMBDA, -1, 0, 1, GROUP_SMEAR, backout, backout_test);
    t->tensor[t->count - 1].frozen = !config_has_backout(c);
    table_add(t, "lm_head", LM_HEAD, -1, Vp, C, GROUP_LM_HEAD, init_normal(0.001),
              init_normal(3 / sqrt(C)));
    table_end_block(t);
    for (int i = 0; i < t->count; i++)
        if (t->tensor[i].role == WTE || t->tensor[i].role == VALUE_EMBED ||
            t->tensor[i].role == LM_HEAD)
            t->tensor[i].live_rows = c->V;
}

static inline void table_free(Table *t) {
    free(t->tensor);
    t->tensor = NULL;
}

// The tensor of a role; layer -1 outside the layers. NULL where a layer does not have it.
static inline const Tensor *table_find(const Table *t, Role role, int layer) {
    for (int i = 0; i < t->count; i++)
        if (t->tensor[i].role == role && t->tensor[i].layer == layer) return &t->tensor[i];
    return NULL;
}

// A number that grows as forward goes from element to element, and falls as backward makes their
// gradients: by layer, and by role in a layer.
static inline int tensor_place(const Tensor *x, size_t element) {
    int layer = x->role == RESID_LAMBDA || x->role == X0_LAMBDA ? (int)element
                : x->role >= BACKOUT_LAMBDA                     ? MODEL_MAX_LAYERS
                                                                : x->layer;
    return layer * ROLE_COUNT + (int)x->role;
}

// Whether a tensor has, among its elements from .. from + count - 1, one that is not finite and
// that forward, or backward, comes to before *place, which it then sets; table_no_place to begin.
static inline bool tensor_find_nonfinite(const Tensor *x, const float *elements, size_t from,
                                         size_t count, bool backward, int *place) {
    bool found = false;
    for (size_t e = 0; e < count; e++) {
        if (isfinite(elements[e])) continue;
        int here = tensor_place(x, from + e);
        if (backward ? here > *place : here < *place) *place = here, found = true;
    }
    return found;
}
static inline int table_no_place(bool backward) { return backward ? INT_MIN : INT_MAX; }

// The tensor of an arena in which something not finite arose: of those with such an element the
// first that forward comes to, or, for gradients, backward, as one spoils all after it. NULL: none.
static inline const Tensor *table_find_nonfinite(const Table *t, const float *arena /* (numel) */,
                                                 bool backward) {
    const Tensor *found = NULL;
    int place = table_no_place(backward);
    for (const Tensor *x = t->tensor; x < t->tensor + t->count; x++)
        if (tensor_find_nonfinite(x, arena + x->offset, 0, tensor_numel(x), backward, &place))
            found = x;
    return found;
}

// Fills the parameters (arena of t->numel elements) from (seed, tensor's index, element) alone, so
// that the CPU and every rank make the same weights without talking. test: the second Init.
static inline void table_fill(const Table *t, float *params, uint32_t seed, bool test) {
    memset(params, 0, t->numel * sizeof *params);
    for (int i = 0; i < t->count; i++) {
        const Tensor *x = &t->tensor[i];
        Init init = test ? x->test_init : x->init;
        RandKey key = {seed, (uint32_t)i, RAND_PARAMETER};
        int64_t live = (int64_t)x->live_rows * x->cols;
#pragma omp parallel for
        for (int64_t e = 0; e < live; e++) {
            double value =
                init.kind == INIT_RAMP
                    ? init.a + (live > 1 ? (init.b - init.a) * (double)e / (double)(live - 1) : 0)
                : init.kind == INIT_UNIFORM
                    ? init.a + (init.b - init.a) * rand_uniform(key, (uint64_t)e)
                    : init.a * rand_normal(key, (uint64_t)e);
            params[x->offset + (size_t)e] = (float)value;
        }
    }
}

#endif
