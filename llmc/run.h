// run.h: a run of training from start to end: everything around the model, for both trainers.
//
//     configure     flags, tokenizer, shape, plan           --dry-run prints them and ends
//     open          shards, --out, the model, --resume      --dump does one step and ends
//     train         validate, sample, step, log, save; until the last step, or told to stop
//     close
//
// The model is behind the functions declared first: train_gpt2.c brings them for the CPU,
// train_gpt2.cu for a GPU. This file knows its parameters by the table (model.h), and as arenas of
// host memory only where it saves, loads or dumps them.
//
// Of several ranks (dist.h), each runs all of this on its own rows; rank 0 alone logs, speaks and
// has --out, but for the part of a save that each writes.
#ifndef LLMC_RUN_H
#define LLMC_RUN_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llmc/check.h"       // check_flags, check_saved_flags, check_out
#include "llmc/checkpoint.h"  // ckpt_begin, ckpt_write_rank, ckpt_finish, ckpt_find, ckpt_prune
#include "llmc/dataloader.h"  // loader_init, loader_val_next, loader_state
#include "llmc/describe.h"    // describe_model, describe_table, describe_plan
#include "llmc/die.h"         // die, die_alloc, warn
#include "llmc/dist.h"        // Dist, dist_init, dist_all_gather, dist_broadcast
#include "llmc/dump.h"        // dump_add, dump_add_all
#include "llmc/flags.h"       // Flags, flags_parse
#include "llmc/logger.h"      // log_open, log_row, log_write_run, log_seconds
#include "llmc/model.h"       // Config, Table, table_init, table_find_nonfinite
#include "llmc/restore.h"     // restore_save
#include "llmc/sampler.h"     // sampler_pick, sampler_print
#include "llmc/schedule.h"    // Plan, Phase, schedule_at
#include "llmc/shard.h"       // ShardPlan, Piece, shard_init, shard_next
#include "llmc/stop.h"        // stop_listen, stop_poll
#include "llmc/tokenizer.h"   // tokenizer_init, tokenizer_encode, tokenizer_decode

// ---------------------------------------------------------------------------------------------
// What a trainer brings.

typedef struct Model Model;  // the trainer's own

// Most tokens of a micro-batch where --micro-batch does not say how many rows; a pure function.
int model_micro_tokens(const Config *, int recompute);

// Takes all memory of a run with this plan and fills the parameters; model_free releases it. The
// ranks must stay where they are.
void model_init(Model *, const Config *, const Plan *, const Dist *, uint32_t seed, bool test_init);
void model_free(Model *);

// The memory that model_init would take, by kind, for --dry-run. Returns the number of rows.
enum { MODEL_MEMORY_ROWS = 16 };
int model_memory(DescribeMemory *rows /* (MODEL_MEMORY_ROWS) */, const Config *, const Plan *,
                 const ShardPlan *);

typedef struct {
    const char *program;  // "train_gpt2 (CPU, FP32)"
    const char *device;   // what it runs on
    double peak_flops;    // of the device, a second; 0: no MFU is given
    uint64_t memory;      // bytes in use on the device; 0: the process's peak counts
} ModelFacts;
ModelFacts model_facts(const Model *);

// Parameters in host memory, laid out by the table, and this rank's part of the optimizer's two
// states, laid out by shard.h. On the CPU they are the model's own arenas, on a GPU copies: what is
// changed counts after model_upload.
typedef struct {
    float *params;  // (table.numel); of a download all of it on rank 0 only
    float *first;   // (numel of the rank)
    float *second;  // (state_numel of the rank)
} ModelState;
ModelState model_download(Model *);
void model_upload(Model *, ModelState);
void model_state_free(Model *, ModelState);

// A whole step: gradients of the loader's next batch, their norm, the update. When loss or norm is
// not finite there is no update. asked: what this rank was told from outside; the loss takes it to
// the others. trace: where to keep what --dump wants, or NULL.
typedef struct {
    double loss, grad_norm;
    bool finite;        // both of them
    StopRequest asked;  // the most that any rank was told
    int teller;         // of what is not finite: the first rank that found it, and can say more
    const char *bad_tensor;  // whose gradient was the first not to be; NULL: none, or the loss was
    int64_t bad_row;         // first of the step's rows whose loss is not finite, or -1
    LoaderOrigin origin;     // of that row, else of the step's first
    LoaderState at;          // the loader after the step's rows (it may have been read ahead)
} StepResult;
typedef struct {
    int *tokens, *targets;  // (batch) each
    float *logits;          // (batch, V), capped
    float *grads;           // (table.numel)
} StepTrace;
StepResult model_step(Model *, Loader *, const Phase *, const Plan *, const Flags *, int64_t step,
                      StopRequest asked, StepTrace *trace);

// Nats of each target, without gradients. rows * T is at most a micro-batch; 0: other ranks have the
// last rows. All ranks call it as often.
void model_losses(Model *, const int *inputs /* (rows, T) */, const int *targets /* (rows, T) */,
                  int rows, int T, const Phase *, double *losses /* (rows, T) */);

// Logits, capped, after the last of up to T tokens.
void model_logits(Model *, const int *tokens /* (count) */, int count, const Phase *,
                  float *logits /* (V) */);

// ---------------------------------------------------------------------------------------------
// The run: what the program holds besides the model.

typedef struct {
    double started;  // the process: seconds of log_seconds
    Dist dist;
    int ranks;  // dist.world, or those that --gpus is to start
    Arg args[FLAGS_COUNT];
    Flags flags;
    char *flags_text;  // the flags that were given, on one line
    Tokenizer tokenizer;
    bool has_tokenizer;
    bool bestfit, keep_tails, test_init;  // --packing, --tails, --init
    Config cfg;
    Table table;
    ShardPlan shard;
    Plan plan;
    Model *model;
    ModelFacts facts;
    Loader loader;          // of --train
    LoaderState at;         // its place after the steps done
    LoaderVal val;          // of --val, when it is given
    Logger log;             // of --out, when it is given
    IoFile lock;            // of --out: no other process runs there
    int *inputs, *targets;  // (micro_rows, T) each: validation and samples
    double *losses;         // (micro_rows, T)
    float *logits;          // (V)
    int64_t step;           // updates done
    int64_t tokens;         // tokens trained on in them
    double clock;           // when the last step, or what came between steps, ended
} Run;

// Everything that flags decide, before memory is taken or data opened.
static inline void run_configure(Run *r, int argc, char **argv) {
    flags_parse(&r->flags, r->args, argc, argv);
    const Flags *f = &r->flags;
    r->bestfit = flags_choice("packing", f->packing, "bestfit stream") == 0;
    r->keep_tails = flags_choice("tails", f->tails, "keep drop") == 0;
    r->test_init = flags_choice("init", f->init, "default test") == 1;
    r->flags_text = args_line(r->args, FLAGS_COUNT);
    r->has_tokenizer = strcmp(f->tokenizer, "none") != 0;
    if (r->has_tokenizer) tokenizer_init(&r->tokenizer, f->tokenizer);
    check_flags(f, r->has_tokenizer ? &r->tokenizer : NULL);
    check_ratio(f, args_find(r->args, FLAGS_COUNT, "ratio"));
    r->cfg = config_from_flags(f, r->has_tokenizer ? r->tokenizer.vocab : -1,
                               r->has_tokenizer ? r->tokenizer.bos : -1);
    int micro_tokens = model_micro_tokens(&r->cfg, f->recompute);
    r->ranks = r->dist.world > 1 || !f->gpus ? r->dist.world : f->gpus;
    if (r->ranks > SHARD_MAX_RANKS)
        die(EXIT_USAGE, "found %d ranks, expected at most %d; start fewer", r->ranks,
            SHARD_MAX_RANKS);
    r->plan = plan_from_flags(f, &r->cfg, r->ranks, micro_tokens);
    check_micro_batch(f, &r->cfg, &r->plan, micro_tokens);
    table_init(&r->table, &r->cfg);
    shard_init(&r->shard, &r->table, r->dist.rank, r->ranks);
    if (*f->dump && r->ranks > 1)
        die(EXIT_USAGE, "--dump: found %d ranks, expected 1; a dump is of one", r->ranks);
    if (f->gpus && r->dist.world > 1 && f->gpus != r->dist.world)
        die(EXIT_USAGE, "--gpus: found %d, but a launcher that has started %d ranks; leave it out",
            f->gpus, r->dist.world);
}

// --dry-run.
static inline void run_describe(const Run *r) {
    DescribeMemory memory[MODEL_MEMORY_ROWS];
    int rows = model_memory(memory, &r->cfg, &r->plan, &r->shard);
    args_echo(stdout, r->args, FLAGS_COUNT, true);
    describe_model(stdout, &r->cfg);
    describe_table(stdout, &r->table, &r->plan, &r->flags, &r->cfg);
    describe_memory(stdout, memory, rows);
    describe_shard(stdout, &r->shard);
    describe_plan(stdout, &r->plan, &r->flags, &r->cfg);
}

// --- saves -------------------------------------------------------------------------------------

// The tensors of model.safetensors, in the table's order. Returns their number; *out is the
// caller's to free.
static inline int run_params(const Table *t, ModelState s, StTensor **out) {
    *out = (StTensor *)die_alloc((size_t)t->count, sizeof **out, "the list of tensors");
    for (int i = 0; i < t->count; i++) {
        const Tensor *x = &t->tensor[i];
        uint64_t shape[2] = {(uint64_t)x->rows, (uint64_t)x->cols};
        const uint64_t *dims = x->ndim == 2 ? shape : shape + 1;
        (*out)[i] = st_tensor(x->name, ST_F32, x->ndim, dims, s.params + x->offset);
    }
    return t->count;
}

// "wte.first"; of a part, "wte.first@640" (checkpoint.h).
static inline const char *run_state_name(char name[80], const Piece *p, const char *state,
                                         size_t from) {
    int n = snprintf(name, 80, "%s.%s", p->tensor->name, state);
    if (p->rows < p->tensor->rows) snprintf(name + n, 80 - (size_t)n, "@%zu", from);
    return name;
}

// The optimizer's two states of this rank's pieces, likewise. What every rank has, rank 0 saves;
// to load it, all want it.
static inline int run_states(const ShardPlan *s, ModelState m, bool saving, StTensor **out) {
    int n = 0;
    *out = (StTensor *)die_alloc((size_t)s->count * 2, sizeof **out, "the list of tensors");
    for (int i = shard_next(s, 0); i < s->count; i = shard_next(s, i + 1)) {
        const Piece *p = &s->piece[i];
        if (saving && p->owner == SHARD_ALL && s->rank > 0) continue;
        char name[80];
        uint64_t shape[2] = {(uint64_t)p->rows, (uint64_t)p->tensor->cols}, count = p->state_count;
        int ndim = p->tensor->ndim;
        run_state_name(name, p, "first", (size_t)p->row);
        (*out)[n++] = st_tensor(name, ST_F32, ndim, shape + 2 - ndim, m.first + p->at);
        run_state_name(name, p, "second", p->state_first);
        (*out)[n++] = st_tensor(name, ST_F32, 1, &count, m.second + p->state);
    }
    return n;
}

// Whether any rank says so.
static inline bool run_any(const Run *r, bool mine) {
    bool all[SHARD_MAX_RANKS] = {false}, any = false;
    dist_all_gather(&r->dist, all, &mine, sizeof mine);
    for (int i = 0; i < r->dist.world; i++) any |= all[i];
    return any;
}

// What rank 0 notes beside the tensors.
static inline CkptMeta run_meta(const Run *r) {
    CkptMeta meta;
    memset(&meta, 0, sizeof meta);
    meta.step = r->step, meta.tokens = r->tokens;
    meta.loader_seed = r->at.seed, meta.loader_epoch = r->at.epoch;
    meta.loader_row = r->at.row, meta.loader_fingerprint = r->at.fingerprint;
    ckpt_note(&meta, "flags", r->flags_text);
    ckpt_note(&meta, "shards", loader_describe(&r->loader));
    return meta;
}

// All ranks save together: rank 0 makes the folder, each writes its part of the optimizer's state,
// rank 0 the parameters and the rest. Returns false, on all, with a warning of the one that failed,
// when the step could not be saved.
static inline bool run_save(Run *r) {
    bool first = r->dist.rank == 0;
    char folder[IO_PATH_MAX] = "";
    dist_at(&r->dist, r->step, "a save");
    ModelState state = model_download(r->model);
    StTensor *params, *states;
    int n = run_params(&r->table, state, &params), k = run_states(&r->shard, state, true, &states);
    bool failed = first && ckpt_begin(r->flags.out, r->step, folder), mine = failed;
    bool begun = !run_any(r, failed);
    if (begun) {
        dist_broadcast(&r->dist, folder, sizeof folder, 0);
        failed = mine = ckpt_write_rank(folder, r->dist.rank, states, k) != 0;
        if (run_any(r, failed)) {
            failed = true;
            if (first) ckpt_abandon(folder);
        } else {
            CkptMeta meta = run_meta(r);
            mine = first && ckpt_finish(&meta, folder, params, n);
            failed = run_any(r, mine);
        }
    }
    if (mine) warn("step %lld is not saved: %s", (long long)r->step, io_error);
    if (!failed && first && ckpt_prune(r->flags.out, r->flags.keep, r->flags.keep_every))
        warn("old saves are not removed: %s", io_error);
    free(params), free(states);
    model_state_free(r->model, state);
    return begun && !failed;
}

// --resume: parameters, optimizer, place in the data and step of a save, when there is one. Rank 0
// looks for it, all load what they need of it.
static inline void run_resume(Run *r) {
    char folder[IO_PATH_MAX] = "";
    if (!*r->flags.resume) return;
    if (r->dist.rank == 0 && !ckpt_find(r->flags.out, r->flags.resume, folder)) *folder = 0;
    dist_broadcast(&r->dist, folder, sizeof folder, 0);
    if (!*folder) return;
    ModelState state = model_download(r->model);
    StTensor *params, *states;
    int n = run_params(&r->table, state, &params), k = run_states(&r->shard, state, false, &states);
    CkptMeta meta;
    restore_save(folder, &meta, params, n, states, k);
    model_upload(r->model, state);
    model_state_free(r->model, state);
    LoaderState at = {meta.loader_seed, meta.loader_epoch, meta.loader_row,
                      meta.loader_fingerprint};
    loader_restore(&r->loader, at, ckpt_find_note(&meta, "shards"));
    r->step = meta.step, r->tokens = meta.tokens;
    printf("resumed from %s: %lld step%s, %lld tokens\n", folder, (long long)r->step,
           r->step == 1 ? "" : "s", (long long)r->tokens);
    check_saved_flags(r->args, ckpt_find_note(&meta, "flags"));
    if (r->step > r->plan.steps)
        die(EXIT_USAGE, "%s: found %lld steps done, expected at most --steps %lld", folder,
            (long long)r->step, (long long)r->plan.steps);
    ckpt_meta_free(&meta);
    free(params), free(states);
}

// --- validation and samples --------------------------------------------------------------------

// Of the targets of a validation: nats of all, and of those that are text; their number; bytes.
typedef struct {
    double nats, text_nats;
    int64_t count, bytes;
} RunSums;

// Mean loss over the targets of --val-tokens, and bits per byte: the nats of targets other than BOS
// over ln 2 times their bytes. They stay NaN where there is no --val, or no tokenizer to count
// bytes.
static inline void run_validate(Run *r, LogRow *row) {
    RunSums mine = {0, 0, 0, 0}, sum = mine, all[SHARD_MAX_RANKS] = {mine};
    int64_t T = r->cfg.T;
    Phase phase = phase_at(&r->plan, &r->cfg, r->step);
    if (!*r->flags.val) return;
    loader_val_rewind(&r->val);
    while (loader_val_more(&r->val)) {
        dist_at(&r->dist, r->step, "a validation");
        int rows = loader_val_next(&r->val, r->inputs, r->targets, r->plan.micro_rows);
        model_losses(r->model, r->inputs, r->targets, rows, (int)T, &phase, r->losses);
        for (int64_t t = 0; t < rows * T; t++) {
            mine.nats += r->losses[t];
            if (r->targets[t] == r->cfg.bos || !r->has_tokenizer) continue;
            mine.text_nats += r->losses[t];
            mine.bytes += tokenizer_byte_count(&r->tokenizer, r->targets[t]);
        }
        mine.count += rows * T;
    }
    dist_all_gather(&r->dist, all, &mine, sizeof mine);
    for (int i = 0; i < r->dist.world; i++) {
        sum.nats += all[i].nats, sum.text_nats += all[i].text_nats;
        sum.count += all[i].count, sum.bytes += all[i].bytes;
    }
    row->val_loss = sum.nats / (double)sum.count;
    if (sum.bytes) row->val_bpb = sum.text_nats / (log(2) * (double)sum.bytes);
}

// Goes on from BOS and --prompt for --sample-tokens tokens or until a BOS, and prints the text.
// Each token costs a forward pass over the last T: short, and it tests the very code that trains.
static inline void run_sample(Run *r) {
    const Flags *f = &r->flags;
    int T = r->cfg.T;
    Phase phase = phase_at(&r->plan, &r->cfg, r->step);
    TokenList list = {NULL, 0, 0};
    if (!r->has_tokenizer || !f->sample_tokens) return;
    tokenizer_append(&list, (uint32_t)r->cfg.bos);
    tokenizer_encode(&r->tokenizer, f->prompt, strlen(f->prompt), &list);
    RandKey key = {(uint32_t)f->seed, (uint32_t)r->step, RAND_SAMPLE};
    for (int i = 0; i < f->sample_tokens; i++) {
        int count = list.count < (size_t)T ? (int)list.count : T;
        for (int t = 0; t < count; t++) r->inputs[t] = list.ids[list.count - (size_t)(count - t)];
        model_logits(r->model, r->inputs, count, &phase, r->logits);
        int next = sampler_pick(r->logits, r->cfg.V, f->temperature, f->top_k,
                                rand_uniform(key, (uint64_t)i));
        if (next == r->cfg.bos) break;
        tokenizer_append(&list, (uint32_t)next);
    }
    char *text = NULL;
    size_t size = 0, bytes;
    FILE *out = open_memstream(&text, &size);
    if (!out) die(EXIT_INTERNAL, "out of memory for a sample");
    for (size_t i = 1; i < list.count; i++) {
        const uint8_t *token = tokenizer_decode(&r->tokenizer, list.ids[i], &bytes);
        fwrite(token, 1, bytes, out);
    }
    fclose(out);
    printf("sample: ");
    sampler_print(stdout, (const uint8_t *)text, size);
    printf("\n");
    free(text), free(list.ids);
}

// --- steps -------------------------------------------------------------------------------------

// NaN or Inf has not reached the weights, and must not: says where it was first.
static inline void run_tell_nonfinite(const Run *r, const StepResult *s, const Tensor *bad_weight) {
    char row[48] = "the step's rows begin";
    if (s->bad_row >= 0)
        snprintf(row, sizeof row, "row %lld of the step begins", (long long)s->bad_row);
    die_say("step %lld: found loss %g and gradient norm %g, first in %s; %s in %s at token %llu; "
            "the weights are as before the step%s%s",
            (long long)r->step, fabs(s->loss), fabs(s->grad_norm),
            s->bad_tensor ? s->bad_tensor : "the loss", row, s->origin.path,
            (unsigned long long)s->origin.token,
            bad_weight ? ", where the first that is not finite is " : "",
            bad_weight ? bad_weight->name : "");
}

// Ends the run of a step that is not finite; the rank that found it speaks before any leaves.
static inline void run_require_finite(Run *r, const StepResult *s) {
    if (s->finite) return;
    const float *params = model_download(r->model).params;
    const Tensor *bad = r->dist.rank ? NULL : table_find_nonfinite(&r->table, params, false);
    int bad_index = bad ? (int)(bad - r->table.tensor) : -1;
    dist_broadcast(&r->dist, &bad_index, sizeof bad_index, 0);
    bad = bad_index < 0 ? NULL : &r->table.tensor[bad_index];
    if (r->dist.rank == s->teller) run_tell_nonfinite(r, s, bad);
    dist_barrier(&r->dist);
    dist_free(&r->dist);
    exit(EXIT_NONFINITE);
}

// What is asked of the run from outside. Of several ranks each may be signalled; rank 0 has --out.
static inline StopRequest run_poll(const Run *r) {
    return stop_poll(r->dist.rank == 0 ? r->flags.out : "");
}

// One update. Fills in the row's loss, norm and time: that since the step before, or since what
// came between them. Returns what is asked of the run at its end. Several ranks must all know the
// same: what one is told goes to all with a step's loss, so it is asked for before the step.
static inline StopRequest run_step(Run *r, LogRow *row) {
    bool alone = r->dist.world == 1;
    dist_at(&r->dist, r->step, "a step");
    Phase phase = phase_at(&r->plan, &r->cfg, r->step);
    StepResult s = model_step(r->model, &r->loader, &phase, &r->plan, &r->flags, r->step,
                              alone ? STOP_NO : run_poll(r), NULL);
    run_require_finite(r, &s);
    double now = log_seconds();
    row->loss = s.loss, row->grad_norm = s.grad_norm;
    row->ms = 1e3 * (now - r->clock);
    row->tok_per_s = 1e3 * (double)phase.batch / row->ms;
    if (r->facts.peak_flops > 0)
        row->mfu = row->tok_per_s * config_flops_per_token(&r->cfg, false) /
                   (r->facts.peak_flops * r->dist.world);
    r->step++, r->tokens += phase.batch, r->at = s.at, r->clock = now;
    return alone ? run_poll(r) : s.asked;
}

// Validations, samples and saves may take so many times --timeout.
static const double RUN_PATIENCE = 10;

static inline bool run_due(int64_t step, int every) { return every > 0 && step % every == 0; }

// The rest of the steps, or those until the run is told to stop. Row s of the log is the state
// after s updates: its validation, if one is due, and the loss of the batch that makes update
// s + 1. The last row has no loss. Returns the program's exit code.
static inline int run_train(Run *r) {
    const Flags *f = &r->flags;
    const int64_t first = r->step;
    StopRequest asked = STOP_NO;
    bool saved = true;
    while (asked != STOP_END) {
        bool last = r->step == r->plan.steps;
        bool validate = last || run_due(r->step, f->eval_every),
             sample = last || run_due(r->step, f->sample_every);
        Schedule now = schedule_at(r->step, r->plan.steps, f->warmup);
        LogRow row =
            log_row_init(r->step, r->tokens, (int64_t)r->at.epoch, now.lr, now.momentum, now.wd);
        dist_watch(&r->dist, r->step == first ? 0 : RUN_PATIENCE * f->timeout);
        if (validate) run_validate(r, &row);
        if (sample) run_sample(r);
        dist_watch(&r->dist, r->step == first ? 0 : f->timeout);
        if (validate || sample || r->step == first) r->clock = log_seconds();
        if (!last) asked = run_step(r, &row);
        if (r->step == first + 2)  // now all kernels are loaded
            r->log.memory = model_facts(r->model).memory;
        if (r->dist.rank == 0) log_row(&r->log, &row);
        if (last) break;
        if (r->step == first + 1)
            printf("first step %.1f s after the start\n", r->clock - r->started);
        bool save = asked != STOP_NO || r->step == r->plan.steps || run_due(r->step, f->save_every);
        if (!save || !*f->out) continue;
        dist_watch(&r->dist, RUN_PATIENCE * f->timeout);
        saved = run_save(r);
        r->clock = log_seconds();
        if (saved && asked == STOP_SAVE) printf("saved step %lld, as asked\n", (long long)r->step);
    }
    if (!saved)
        die(EXIT_CHECKPOINT, "step %lld, the last one, is not saved; the warning above says why",
            (long long)r->step);
    if (asked != STOP_END) return EXIT_OK;
    printf("stopped after step %lld, as asked; %s\n", (long long)r->step,
           *f->out ? "it is saved, and --resume auto goes on from it"
                   : "nothing is saved, since there is no --out to go on from");
    return EXIT_PREEMPTED;
}

// --dump: one step, and everything that goes into it and comes out of it. NaN and Inf are written
// as they are: a dump is for finding them.
static inline void run_dump(Run *r) {
    const Flags *f = &r->flags;
    const Table *t = &r->table;
    Phase phase = phase_at(&r->plan, &r->cfg, r->step);
    uint64_t batch = (uint64_t)phase.batch, V = (uint64_t)r->cfg.V, one = 1;
    int *tokens = (int *)die_alloc(2 * batch, sizeof *tokens, "the tokens of a dump");
    float *logits =
        (float *)die_alloc(batch * V, sizeof *logits, "the logits of a dump; lower --batch-tokens");
    float *grads = (float *)die_alloc(t->numel, sizeof *grads, "the gradients of a dump");
    float *before = (float *)die_alloc(t->numel, sizeof *before, "the parameters of a dump");
    ModelState state = model_download(r->model);
    memcpy(before, state.params, t->numel * sizeof *before);
    model_state_free(r->model, state);
    StepTrace trace = {tokens, tokens + batch, logits, grads};
    StepResult s = model_step(r->model, &r->loader, &phase, &r->plan, f, r->step, STOP_NO, &trace);
    state = model_download(r->model);
    uint64_t rows[2] = {batch / (uint64_t)phase.T, (uint64_t)phase.T}, logits_shape[2] = {batch, V};
    Dump d;
    dump_init(&d, 5 + 3 * t->count, f->dump_sketch);
    dump_add_whole(&d, "tokens", ST_I32, 2, rows, trace.tokens);
    dump_add_whole(&d, "targets", ST_I32, 2, rows, trace.targets);
    dump_add_whole(&d, "loss", ST_F64, 1, &one, &s.loss);
    dump_add_whole(&d, "grad_norm", ST_F64, 1, &one, &s.grad_norm);
    dump_add(&d, "logits", "", 2, logits_shape, logits);
    dump_add_all(&d, "param", t, before);
    dump_add_all(&d, "grad", t, grads);
    dump_add_all(&d, "updated", t, state.params);
    char step[24];
    snprintf(step, sizeof step, "%lld", (long long)r->step);
    r->facts = model_facts(r->model);
    JsonPair about[] = {{"program", r->facts.program}, {"flags", r->flags_text}, {"step", step}};
    if (st_write(f->dump, d.tensor, d.count, about, 3)) die(EXIT_USAGE, "--dump: %s", io_error);
    printf("%s: %d tensors of step %lld, loss %.6f, gradient norm %.6f\n", f->dump, d.count,
           (long long)r->step, s.loss, s.grad_norm);
    model_state_free(r->model, state);
    free(tokens), free(logits), free(grads), free(before);
    dump_free(&d);
}

// --- from start to end -------------------------------------------------------------------------

// Opens the data, takes --out and memory, and goes to the save to resume from.
static inline void run_open(Run *r) {
    const Flags *f = &r->flags;
    if (!*f->train)
        die(EXIT_USAGE,
            "--train: found nothing, expected token shards (build/tokenize makes them from text)");
    if (*f->resume && !*f->out && !strcmp(f->resume, "auto"))
        die(EXIT_USAGE, "--resume auto: found no --out to look for saves in");
    // What is wrong with data or --out is the same for all: rank 0 finds it first.
    if (r->dist.rank > 0) dist_barrier(&r->dist);
    RowsConfig rows = {f->train,   r->cfg.T,      r->cfg.V,         r->cfg.bos,
                       r->bestfit, r->keep_tails, (uint64_t)f->seed};
    loader_init(&r->loader, &rows, r->dist.rank, r->dist.world);
    if (*f->val) {
        loader_val_init(&r->val, f->val, r->cfg.T, r->cfg.V,
                        f->val_tokens ? f->val_tokens : INT64_MAX, r->dist.rank, r->dist.world);
        check_val(&r->loader.rows.shards, &r->val.shards.shard[0]);
    }
    if (*f->dump)
        check_place("dump", f->dump, ".tmp");
    else if (*f->out && r->dist.rank == 0)
        check_out(f->out, &r->lock);
    if (r->dist.rank == 0) dist_barrier(&r->dist);
    model_init(r->model, &r->cfg, &r->plan, &r->dist, (uint32_t)f->seed, r->test_init);
    size_t tokens = (size_t)r->plan.micro_rows * (size_t)r->cfg.T;
    r->inputs = (int *)die_alloc(tokens, sizeof(int), "tokens");
    r->targets = (int *)die_alloc(tokens, sizeof(int), "tokens");
    r->losses = (double *)die_alloc(tokens, sizeof(double), "losses");
    r->logits = (float *)die_alloc((size_t)r->cfg.V, sizeof(float), "logits");
    run_resume(r);
    r->at = loader_state(&r->loader);
}

// log.csv and run.json in --out, and the first lines on stdout.
static inline void run_log_open(Run *r) {
    const Flags *f = &r->flags;
    r->facts = model_facts(r->model);
    if (r->dist.rank > 0) return;
    JsonPair facts[] = {{"program", r->facts.program}, {"device", r->facts.device},
                        {"version", SPEEDRUN_VERSION}, {"compiler", __VERSION__},
                        {"flags", r->flags_text},      {"shards", loader_describe(&r->loader)}};
    log_open(&r->log, f->out, r->step, r->plan.steps);
    r->log.memory = r->facts.memory;
    if (*f->out && log_write_run(f->out, facts, sizeof facts / sizeof *facts))
        warn("run.json is not written: %s", io_error);
    printf("%s %s\n", r->facts.program, r->flags_text);
    if (r->dist.world > 1) printf("%d ranks\n", r->dist.world);
    printf("%zu parameters, matrix parameters P %.0f; %lld step%s of %lld tokens, %lld tokens in "
           "the shards\n",
           r->table.params, config_matrix_params(&r->cfg), (long long)r->plan.steps,
           r->plan.steps == 1 ? "" : "s", (long long)r->plan.batch,
           (long long)r->loader.rows.shards.tokens);
    if (r->facts.peak_flops > 0)
        printf("mfu: %.4g FLOPs a token (PaLM's count; %.4g for only the keys a query sees) of the "
               "%.0f TFLOP/s of %s\n",
               config_flops_per_token(&r->cfg, false), config_flops_per_token(&r->cfg, true),
               1e-12 * r->facts.peak_flops, r->facts.device);
}

static inline void run_close(Run *r) {
    if (*r->flags.val) loader_val_free(&r->val);
    if (r->has_tokenizer) tokenizer_free(&r->tokenizer);
    loader_free(&r->loader);
    model_free(r->model);
    shard_free(&r->shard);
    table_free(&r->table);
    io_close(&r->lock);
    free(r->inputs), free(r->targets), free(r->losses), free(r->logits), free(r->flags_text);
    args_free();
}

// Finds this rank's place. Only rank 0 speaks, but for errors that another one alone may find.
static inline void run_place(Run *r) {
    dist_init(&r->dist);
    if (r->dist.rank == 0) return;
    die_voice = DIE_SILENT;
    if (!freopen("/dev/null", "w", stdout)) die(EXIT_INTERNAL, "cannot open /dev/null");
}

// Meets the other ranks: those of this version with these flags.
static inline void run_meet(Run *r) {
    char identity[128];
    uint32_t flags = crc32c(0, r->flags_text, strlen(r->flags_text));
    snprintf(identity, sizeof identity, "version " SPEEDRUN_VERSION ", flags of CRC %08x",
             (unsigned)flags);
    if (r->dist.rank > 0) die_voice = DIE_NO_WARNINGS;
    dist_meet(&r->dist, identity, r->flags.timeout);
}

// The whole program; main calls it with the memory for a model. Returns the exit code.
static inline int run_main(Model *model, int argc, char **argv) {
    static Run run;
    int code = EXIT_OK;
    run.started = log_seconds(), run.model = model, run.lock.fd = -1;
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ);  // what is said is seen, in a file, too
    stop_listen();
    run_place(&run);
    run_configure(&run, argc, argv);
    if (run.flags.dry_run) {
        run_describe(&run);
        dist_free(&run.dist);
        return EXIT_OK;
    }
    if (run.ranks > run.dist.world) return dist_spawn(run.ranks, argv);
    run_meet(&run);
    run_open(&run);
    die_voice = DIE_SPEAKS;
    if (*run.flags.dump) {
        run_dump(&run);
    } else {
        if (run.dist.rank == 0) check_saves(&run.flags, run.step);
        run_log_open(&run);
        code = run_train(&run);
        if (run.dist.rank == 0) log_close(&run.log);
    }
    run_close(&run);
    dist_free(&run.dist);
    return code;
}

#endif
