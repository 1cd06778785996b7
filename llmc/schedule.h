// schedule.h: how long to train, in which batches, and what every number of the optimizer is at
// step it of n. Pure functions of the flags, shared by both trainers and printed by --dry-run.
//
//     P    matrix parameters (config_matrix_params)     Z    = ratio * P, the horizon in tokens
//     Z12  the horizon of depth 12 at its default shape with this vocabulary
//     batch = 2^round(log2(2^19 (Z/Z12)^0.383))         steps = floor(floor(ratio * P) / batch)
//
//     lr        linear rise over the warmup, flat, then a linear fall to 5% over the last 65%;
//               that of the lambdas is 0 in step 0 (schedule_lr)
//     momentum  of Muon: 0.85 -> 0.97 over the first 400 steps, whatever lr does; after them 0.97,
//               and towards 0.90 where lr falls
//     wd        of Muon: falls as a half cosine, (1 + cos(pi it/n)) / 2
//
// Learning rates grow with sqrt(batch), all but GROUP_SMEAR's; those of
// the tables and the head fall with sqrt(width). Constants from
// modded-nanogpt and nanochat (2025-2026).
#ifndef LLMC_SCHEDULE_H
#define LLMC_SCHEDULE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "llmc/die.h"    // die, EXIT_USAGE
#include "llmc/flags.h"  // Flags
#include "llmc/model.h"  // Config, Group, config_matrix_params

typedef struct {
    int64_t batch;        // tokens per update
    int64_t steps;        // n
    int micro_rows;       // rows at once per rank
    int64_t micro_steps;  // passes per update, forward and backward, micro_rows on every rank each
    double horizon;       // Z
    double horizon12;     // Z12
    int recompute;        // what backward makes again instead of keeping it, on a GPU: 0 to 2
} Plan;

// What may change from one step to the next, but for T: the loader's rows keep one length. Without
// gaps, so that memcmp tells whether two are the same.
typedef struct {
    int64_t batch;                 // tokens per update
    int64_t micro_steps;           // forward and backward passes per update
    int micro_rows;                // rows at once per rank
    int T;                         // tokens a row
    int window[MODEL_MAX_LAYERS];  // (L): W_i
} Phase;

// AdamW's or Muon's numbers of one group, before the schedule.
typedef struct {
    const char *name;
    double lr;            // scaled by width and batch
    double beta1, beta2;  // Muon: beta1 and eps are not used, its momentum is scheduled
    double eps, wd;
} GroupNumbers;

// The factors that step it of n puts on every group's lr and on Muon's wd, and Muon's momentum.
typedef struct {
    double lr, momentum, wd;
    bool first;  // step 0
} Schedule;

static inline int64_t plan_default_batch(double horizon, double horizon12) {
    return (int64_t)exp2(rint(log2(exp2(19) * pow(horizon / horizon12, 0.383))));
}

// Largest divisor of `rows` that keeps rows * T within `tokens`; 1 when a single row is longer.
static inline int plan_default_micro_rows(int64_t rows, int T, int tokens) {
    int most = tokens / T > 1 ? tokens / T : 1;
    while (rows % most) most--;
    return most;
}

// Batch, steps and micro-steps from the flags. micro_tokens: how many tokens at once the trainer
// wants at most, where the flags do not say. Exits 2 when they do not divide.
static inline Plan plan_from_flags(const Flags *f, const Config *c, int ranks, int micro_tokens) {
    Plan p;
    double P = config_matrix_params(c);
    p.recompute = f->recompute;
    p.horizon = f->ratio * P;
    p.horizon12 = f->ratio * (12.0 * 12 * 768 * 768 + 768.0 * c->V);
    p.batch = f->batch_tokens ? f->batch_tokens : plan_default_batch(p.horizon, p.horizon12);
    if (p.batch % c->T)
        die(EXIT_USAGE, "--batch-tokens: found %lld%s, expected a multiple of --seq-len %d",
            (long long)p.batch, f->batch_tokens ? "" : " (this model's default)", c->T);
    int64_t rows = p.batch / c->T;
    if (rows % ranks)
        die(EXIT_USAGE, "--batch-tokens %lld: found %lld rows, expected a multiple of the %d ranks",
            (long long)p.batch, (long long)rows, ranks);
    p.micro_rows =
        f->micro_batch ? f->micro_batch : plan_default_micro_rows(rows / ranks, c->T, micro_tokens);
    if (rows % ((int64_t)p.micro_rows * ranks))
        die(EXIT_USAGE,
            "--batch-tokens %lld: found %lld rows, expected a multiple of --micro-batch %d on %d "
            "ranks",
            (long long)p.batch, (long long)rows, p.micro_rows, ranks);
    p.micro_steps = rows / ((int64_t)p.micro_rows * ranks);
    int64_t tokens = f->tokens ? f->tokens : (int64_t)floor(p.horizon);
    p.steps = f->steps ? f->steps : tokens / p.batch;
    if (p.steps < 1)
        die(EXIT_USAGE,
            "found less than one step: %lld tokens in batches of %lld; raise --tokens or --ratio, "
            "or lower --batch-tokens",
            (long long)tokens, (long long)p.batch);
    return p;
}

// The phase of step it = 0 .. n. So far every run has one.
static inline Phase phase_at(const Plan *p, const Config *c, int64_t it) {
    Phase phase;
    (void)it;
    phase.T = c->T, phase.batch = p->batch;
    phase.micro_rows = p->micro_rows, phase.micro_steps = p->micro_steps;
    memcpy(phase.window, c->window, sizeof phase.window);
    return phase;
}

// The most of everything in any phase: what memory is taken for.
static inline Phase phase_largest(const Plan *p, const Config *c) { return phase_at(p, c, 0); }

// The numbers of one group, its lr scaled by width and batch.
static inline GroupNumbers plan_group(const Plan *p, const Flags *f, const Config *c, Group group) {
    double by_batch = sqrt((double)p->batch / exp2(19)), by_width = sqrt(768.0 / c->C);
    double wd_matrix = f->wd_matrix * by_batch * p->horizon12 / p->horizon;
    // In the order of Group: name, lr, beta1, beta2, eps, wd.
    GroupNumbers table[GROUP_COUNT] = {
        {"lm_head", f->lr_lm_head * by_width * by_batch, 0.8, 0.96, 1e-10, 0.01},
        {"wte", f->lr_wte * by_width * by_batch, 0.8, 0.995, 1e-10, 0.001},
        {"value_embed", f->lr_value_embed * by_width * by_batch, 0.8, 0.995, 1e-10, 0.01},
        {"resid_lambda", f->lr_resid * by_batch, 0.8, 0.95, 1e-8, 0.05},
        {"x0_lambda", f->lr_x0 * by_batch, 0.96, 0.95, 1e-8, 0},
        {"smear, backout", f->lr_smear, 0.8, 0.95, 1e-8, 0},
        {"matrices (Muon)", f->lr_matrix * by_batch, 0, 0.9, 0, wd_matrix},
    };
    return table[group];
}

// The schedule at step it = 0 .. n-1 of n; at n, its end (the last row of the log).
static inline Schedule schedule_at(int64_t it, int64_t n, int warmup) {
    Schedule s;
    double x = (double)it, end = (double)n, d = rint(0.65 * end);  // d: steps in which lr falls
    double left = (end - x) / d;
    if (it < warmup)
        s.lr = (x + 1) / warmup;
    else if (x <= end - d)
        s.lr = 1;
    else
        s.lr = left + 0.05 * (1 - left);
    if (it < 400)
        s.momentum = 0.85 + 0.12 * x / 400;
    else if (x >= end - d)
        s.momentum = 0.97 - 0.07 * (x - (end - d)) / d;
    else
        s.momentum = 0.97;
    s.wd = (1 + cos(3.141592653589793 * x / end)) / 2;
    s.first = it == 0;
    return s;
}

// The learning rate of a group, numbers k, where the schedule is at s. In step 0 the lambdas rest:
// as long as wo and wproj are 0, x is a multiple of x0 and every norm undoes resid_lambda,
// x0_lambda and backout_lambda, so that their gradients are 0 but for rounding, whose sign AdamW
// would take for a direction. (smear_lambda, which has a gradient, is of backout's group and rests
// with it.) (H200, depth 12, BF16 against FP32 with and without that first step: the losses of step
// 14 are 0.028 and 0.005 apart.)
static inline double schedule_lr(Schedule s, GroupNumbers k, Group group) {
    bool lambdas = group == GROUP_RESID || group == GROUP_X0 || group == GROUP_SMEAR;
    return s.first && lambdas ? 0 : k.lr * s.lr;
}

#endif
