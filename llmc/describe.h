// describe.h: what --dry-run prints: the flags in force, the table of parameters with counts, the
// model's cost, batch and length of the run, what each rank has, and the schedules at five points.
#ifndef LLMC_DESCRIBE_H
#define LLMC_DESCRIBE_H

#include <stdio.h>

#include "llmc/model.h"     // Config, Table
#include "llmc/schedule.h"  // Plan, plan_group, schedule_at, schedule_lr
#include "llmc/shard.h"     // ShardPlan

// The init distribution in words.
static inline const char *describe_init(const Init *i, char *buffer, size_t size) {
    if (i->kind == INIT_NORMAL)
        snprintf(buffer, size, "normal, std %.4g", i->a);
    else if (i->kind == INIT_UNIFORM)
        snprintf(buffer, size, "uniform %.4g .. %.4g", i->a, i->b);
    else if (i->a != i->b)
        snprintf(buffer, size, "ramp %.4g .. %.4g", i->a, i->b);
    else
        snprintf(buffer, size, "%.4g", i->a);
    return buffer;
}

static inline void describe_table(FILE *out, const Table *t, const Plan *p, const Flags *f,
                                  const Config *c) {
    bool test = flags_choice("init", f->init, "default test") == 1;
    fprintf(out, "\n%-26s %16s %13s  %-24s %s\n", "tensor", "shape", "parameters", "init",
            "optimizer group");
    for (int i = 0; i < t->count; i++) {
        const Tensor *x = &t->tensor[i];
        char shape[40], init[48];
        if (x->ndim == 1)
            snprintf(shape, sizeof shape, "(%d)", x->cols);
        else
            snprintf(shape, sizeof shape, "(%d, %d)", x->rows, x->cols);
        fprintf(out, "%-26s %16s %13zu  %-24s %s%s\n", x->name, shape, tensor_numel(x),
                describe_init(test ? &x->test_init : &x->init, init, sizeof init),
                plan_group(p, f, c, x->group).name, x->frozen ? ", frozen" : "");
    }
    fprintf(out, "%-26s %16s %13zu\n", "all", "", t->params);
    fprintf(out, "%-26s %16s %13.0f  (Muon's without the value gates, plus V x C of lm_head)\n",
            "matrix parameters P", "", config_matrix_params(c));
}

static inline void describe_model(FILE *out, const Config *c) {
    fprintf(out,
            "\nlayers L %d, channels C %d, heads H %d of D %d, MLP F %d, vocabulary V %d (stored "
            "%d), row T %d, BOS %d\n",
            c->L, c->C, c->H, c->D, c->F, c->V, c->Vp, c->T, c->bos);
    fprintf(out, "windows");
    for (int i = 0; i < c->L; i++) fprintf(out, " %d", c->window[i]);
    fprintf(out, "; attention %s documents\n", c->doc_mask ? "stays inside" : "crosses");
    fprintf(out,
            "FLOPs per token %.4g (PaLM convention), %.4g counting only the keys a query sees\n",
            config_flops_per_token(c, false), config_flops_per_token(c, true));
}

// One row per kind of memory, in bytes.
typedef struct {
    const char *kind;
    double bytes;
} DescribeMemory;

static inline void describe_memory(FILE *out, const DescribeMemory *rows, int count) {
    double sum = 0;
    fprintf(out, "\nmemory\n");
    for (int i = 0; i < count; i++) {
        if (rows[i].bytes == 0) continue;  // what only several ranks have
        fprintf(out, "  %-34s %10.1f MiB\n", rows[i].kind, rows[i].bytes / 1048576);
        sum += rows[i].bytes;
    }
    fprintf(out, "  %-34s %10.1f MiB\n", "all", sum / 1048576);
}

// What each of several ranks has: optimizer state, FLOPs of Polar Express a step, and how much more
// of them the one with the most has than the mean. Nothing of one rank alone.
static inline void describe_shard(FILE *out, const ShardPlan *s) {
    double most = 0, sum = 0;
    if (s->world == 1) return;
    fprintf(out, "\n%4s %24s %24s\n", "rank", "optimizer state, MiB", "Muon, TFLOP a step");
    for (int r = 0; r < s->world; r++) {
        const ShardRank *x = &s->share[r];
        fprintf(out, "%4d %24.1f %24.4f\n", r,
                (double)(x->numel + x->state_numel) * sizeof(float) / 1048576, 1e-12 * x->flops);
        sum += x->flops, most = x->flops > most ? x->flops : most;
    }
    fprintf(out, "most of Muon's work: %.1f%% above the mean\n",
            100 * (sum > 0 ? most * s->world / sum - 1 : 0));
}

static inline void describe_plan(FILE *out, const Plan *p, const Flags *f, const Config *c) {
    fprintf(out,
            "\nhorizon Z %.0f tokens (depth 12: %.0f), batch %lld tokens = %lld micro-step%s of %d "
            "row%s per rank, %lld step%s\n",
            p->horizon, p->horizon12, (long long)p->batch, (long long)p->micro_steps,
            p->micro_steps == 1 ? "" : "s", p->micro_rows, p->micro_rows == 1 ? "" : "s",
            (long long)p->steps, p->steps == 1 ? "" : "s");
    fprintf(out, "%.4g tokens, %.4g FLOPs in all\n", (double)p->batch * (double)p->steps,
            (double)p->batch * (double)p->steps * config_flops_per_token(c, false));
    fprintf(out, "\n%10s %9s %10s %10s", "step", "lr factor", "momentum", "wd factor");
    for (int g = 0; g < GROUP_COUNT; g++) fprintf(out, " %15s", plan_group(p, f, c, (Group)g).name);
    fprintf(out, "\n");
    for (int64_t k = 0, last = -1; k < 5; k++) {
        int64_t it = (p->steps - 1) * k / 4;
        if (it == last) continue;
        last = it;
        Schedule s = schedule_at(it, p->steps, f->warmup);
        fprintf(out, "%10lld %9.5f %10.5f %10.5f", (long long)it, s.lr, s.momentum, s.wd);
        for (int g = 0; g < GROUP_COUNT; g++)
            fprintf(out, " %15.6g", schedule_lr(s, plan_group(p, f, c, (Group)g), (Group)g));
        fprintf(out, "\n");
    }
    fprintf(out, "weight decay of the matrices %.6g before its factor\n",
            plan_group(p, f, c, GROUP_MATRIX).wd);
}

#endif
