// bench_gpu.cu: where the time of a training step goes, operation by operation.
//
//     build/bench/bench_gpu                 depth 12 (131,072 tokens a step) and 24 (65,536)
//     build/bench/bench_gpu --depth 12 ...  one model of your flags
//     build/bench/bench_gpu --speed [...]   no table; without flags: the four of dev/bench/speed.sh
//
// It is the trainer itself, on tokens drawn by Zipf's law (V 32768, T 2048, windows SSSL): first 31
// steps as always, the median of steps 10 to 30 for the tokens a second; then TRACED steps with an
// event before and after each operation, for the table. An operation's row adds up its calls of a
// step, all layers and micro-batches; its rate is in what binds it, arithmetic or memory, and % of
// the ceiling is the time that it would take at the ceiling over the time it took. What it must
// move counts once: of weights, inputs, outputs each byte.
//
// Sums of squares of gradients are on a second stream and have no row. Attention and the products
// of gemm_sm90.cuh leave them no room, as blocks of these take 64,512 of the 65,536 registers of
// each SM: they run before or after, and what waits for them shows their time in its own row.
#include <unistd.h>

#define main train_gpt2cu_main
#include "train_gpt2.cu"
#undef main

// Ceilings of one H200 (700 W, CUDA 13.0, driver 580, 2026-11-22, medians of 20). On other GPUs
// read the last but one column as "of an H200".
static const double COPY = 4.23e12;  // cudaMemcpy, bytes read and written a second
static const struct {
    const char *op;
    double flops;  // a second
} CEILINGS[] = {
    {"attention", 455e12},           // cuDNN 9.19, 32 rows, H 6, T 2048, D 128, causal
    {"attention backward", 413e12},  // the same, not deterministic
    {"", 680e12},                    // cuBLASLt, 640 to 735 at the shapes of both models
};

enum { WARM = 10, STEPS = 21, TRACED = 5, SHARD_TOKENS = 1 << 22 };

// What is timed without flags of yours: the first two with a table, all with --speed.
static const char *const MODELS[] = {
    " --depth 12", " --depth 24 --batch-tokens 65536", " --depth 24 --batch-tokens 524288",
    " --depth 12 --vocab 50304 --seq-len 1024 --window-pattern L --batch-tokens 524288"};

// One line of the table.
typedef struct {
    const char *name;
    int calls;
    double us, flops, bytes;
} Line;

static double ceiling_of(const char *op) {
    int i = 0;
    while (*CEILINGS[i].op && strcmp(CEILINGS[i].op, op)) i++;
    return CEILINGS[i].flops;
}

// A shard of documents of 1,475 tokens in the mean, BOS 0, the other tokens by Zipf's law:
// token k about as often as 1/k.
static void write_shard(const char *path, int V) {
    const RandKey key = {1, 0, 100};
    char *shard = (char *)die_alloc(SHARD_HEADER + 2 * SHARD_TOKENS, 1, "a shard");
    int32_t *header = (int32_t *)shard;
    uint16_t *tokens = (uint16_t *)(shard + SHARD_HEADER);
    memset(shard, 0, SHARD_HEADER);
    header[0] = SHARD_MAGIC, header[1] = SHARD_VERSION, header[2] = SHARD_TOKENS;
    for (uint64_t i = 0; i < SHARD_TOKENS; i++) {
        bool bos = i == 0 || rand_uniform(key, 2 * i) < 1.0 / 1475;
        tokens[i] = bos ? 0 : (uint16_t)pow(V, rand_uniform(key, 2 * i + 1));
    }
    if (io_write_file(path, shard, SHARD_HEADER + 2 * SHARD_TOKENS)) die(EXIT_DATA, "%s", io_error);
    free(shard);
}

// Adds the operations of the steps traced to the lines, per step. Returns the number of lines.
static int add_up(Line *lines, const Trace *t, int steps) {
    int count = 0;
    for (int i = 0; i < t->count; i++) {
        const TraceOp *op = &t->op[i];
        float ms = 0;
        int at = 0;
        CUDA_CHECK(cudaEventElapsedTime(&ms, op->begin, op->end));
        while (at < count && strcmp(lines[at].name, op->name)) at++;
        if (at == count) memset(&lines[count++], 0, sizeof *lines), lines[at].name = op->name;
        lines[at].calls++, lines[at].us += 1e3 * ms / steps;
        lines[at].flops += op->flops / steps, lines[at].bytes += op->bytes / steps;
    }
    for (int i = 0; i < count; i++) lines[i].calls /= steps;
    return count;
}

static int by_time(const void *a, const void *b) {
    double x = ((const Line *)a)->us, y = ((const Line *)b)->us;
    return (x < y) - (x > y);
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_table(Line *lines, int count, double step_us) {
    double sum = 0, ideal = 0;
    qsort(lines, (size_t)count, sizeof *lines, by_time);
    printf("%-24s %6s %10s %15s %9s %7s\n", "operation", "calls", "us", "rate", "ceiling", "share");
    for (int i = 0; i < count; i++) {
        const Line *r = &lines[i];
        double flops_us = 1e6 * r->flops / ceiling_of(r->name), bytes_us = 1e6 * r->bytes / COPY;
        bool arithmetic = flops_us > bytes_us;
        double least = arithmetic ? flops_us : bytes_us;
        printf("%-24s %6d %10.1f %8.0f %s %8.0f%% %6.1f%%\n", r->name, r->calls, r->us,
               arithmetic ? 1e-6 * r->flops / r->us : 1e-3 * r->bytes / r->us,
               arithmetic ? "TFLOP/s" : "GB/s   ", 100 * least / r->us, 100 * r->us / step_us);
        sum += r->us, ideal += least;
    }
    printf("%-24s %6s %10.1f %15s %9s %6.1f%%\n", "between operations", "", step_us - sum, "", "",
           100 * (step_us - sum) / step_us);
    printf("%-24s %6s %10.1f %15s %8.0f%% %6.1f%%\n", "step, with events", "", step_us, "",
           100 * ideal / step_us, 100.0);
}

// `steps` steps from r->step on, at most STEPS. Returns the microseconds of one, their median.
static double run_steps(Run *r, int steps) {
    double us[STEPS];
    for (int i = 0; i < steps; i++) {
        double start = log_seconds();
        Phase phase = phase_at(&r->plan, &r->cfg, r->step);
        StepResult s =
            model_step(r->model, &r->loader, &phase, &r->plan, &r->flags, r->step++, STOP_NO, NULL);
        if (!s.finite) die(EXIT_NONFINITE, "step %d: loss %g, norm %g", i, s.loss, s.grad_norm);
        us[i] = 1e6 * (log_seconds() - start);
    }
    qsort(us, (size_t)steps, sizeof *us, by_size);
    return us[steps / 2];
}

static void bench(char *flags, bool table) {
    char *argv[64];
    int argc = 0;
    Run *r = (Run *)die_alloc(1, sizeof *r, "a run");
    Model *m = (Model *)die_alloc(1, sizeof *m, "a model");
    Line lines[100];
    for (char *word = strtok(flags, " "); word; word = strtok(NULL, " ")) argv[argc++] = word;
    memset(r, 0, sizeof *r);
    r->model = m;
    dist_init(&r->dist);
    run_configure(r, argc, argv);
    run_open(r);
    ModelFacts facts = model_facts(m);
    printf("\ndepth %d: C %d, H %d, V %d, T %d, windows %s; %lld tokens a step, %lld at once, "
           "--recompute %d; %s\n",
           r->cfg.L, r->cfg.C, r->cfg.H, r->cfg.V, r->cfg.T, r->flags.window_pattern,
           (long long)r->plan.batch, (long long)r->plan.micro_rows * r->cfg.T, r->plan.recompute,
           facts.device);
    run_steps(r, WARM);
    double us = run_steps(r, STEPS);
    if (table) {
        m->trace.op = (TraceOp *)die_alloc(TRACE_OPS, sizeof(TraceOp), "the trace");
        memset(m->trace.op, 0, TRACE_OPS * sizeof(TraceOp));
        m->trace.timed = true;
        double traced_us = run_steps(r, TRACED);
        print_table(lines, add_up(lines, &m->trace, TRACED), traced_us);
    }
    double rate = 1e6 * (double)r->plan.batch / us, flops = config_flops_per_token(&r->cfg, false);
    facts = model_facts(m);
    printf("step: %.2f ms, %.0f tok/s", 1e-3 * us, rate);
    if (facts.peak_flops > 0) printf(", MFU %.1f%% (PaLM)", 100 * rate * flops / facts.peak_flops);
    printf(", %.1f GB\n", 1e-9 * (double)facts.memory);
    free(m->trace.op);
    run_close(r);
    free(r), free(m);
}

int main(int argc, char **argv) {
    int count = 0;
    char path[300], flags[2000], own[1000] = "";
    const char *dir = getenv("TMPDIR");
    if ((cudaGetDeviceCount(&count) != cudaSuccess || !count) && access("/dev/nvidia0", F_OK)) {
        printf("no GPU: skipped\n0 passed, 0 failed\n");
        return EXIT_OK;
    }
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ);
    snprintf(path, sizeof path, "%s/bench_gpu_%d.bin", dir ? dir : "/tmp", (int)getpid());
    write_shard(path, 32768);
    bool table = argc < 2 || strcmp(argv[1], "--speed");
    int own_from = table ? 1 : 2, models = argc > own_from ? 1 : table ? 2 : 4;
    for (int i = own_from; i < argc; i++)
        snprintf(own + strlen(own), sizeof own - strlen(own), " %s", argv[i]);
    for (int i = 0; i < models; i++) {
        snprintf(flags, sizeof flags,
                 "bench_gpu --train %s --steps 1000 --vocab 32768 --bos 0 --batch-tokens 131072%s",
                 path, argc > own_from ? own : MODELS[i]);
        bench(flags, table);
    }
    unlink(path);
    return EXIT_OK;
}
