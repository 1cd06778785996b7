// test_model.cu: the whole model on the GPU: against the oracle (dev/test/oracle.h), as on the CPU,
// and against itself: the same bits twice, in a CUDA graph and without, and no update from what is
// not finite. All activations and gradients are NaN before each step, so that none is read before
// it is written.
// With arguments the program is the trainer: so it is run for its exit codes and messages.
#define main train_gpt2cu_main
#include "train_gpt2.cu"
#undef main

#include "dev/test/gpu/test_gpu.cuh"  // gpu_test_begin, grid_small
#include "dev/test/oracle.h"          // test_oracle, test_optimizer, small_train
#include "llmc/io.h"                  // io_write_file

// ---------------------------------------------------------------------------------------------
// What oracle.h asks for: model_step on tokens that are given, not loaded.

// Poisons the activations, and puts step `it`'s numbers on their way.
static void begin_step(Trainer *t, int64_t it) {
    Model *m = &t->model;
    Activations none;
    size_t bytes = activations_layout(&none, &t->cfg, (int)m->max_tokens, m->recompute, NULL);
    CUDA_CHECK(cudaMemsetAsync(m->activations, 0xff, bytes, m->stream));
    step_numbers(m->host_step, &t->plan, &t->flags, &t->cfg, it);
    CUDA_CHECK(
        cudaMemcpyAsync(m->step, m->host_step, sizeof *m->step, cudaMemcpyHostToDevice, m->stream));
    CUDA_CHECK(cudaMemsetAsync(m->grads, 0xff, m->table.numel * sizeof(float), m->stream));
    gradients_clear(m);
}

static StepResult end_step(Trainer *t) {
    Model *m = &t->model;
    const StepState *s = m->host_step;
    StepResult result;
    memset(&result, 0, sizeof result);
    CUDA_CHECK(
        cudaMemcpyAsync(m->host_step, m->step, sizeof *m->step, cudaMemcpyDeviceToHost, m->stream));
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    result.loss = s->loss_sum / (double)t->phase.batch, result.grad_norm = s->grad_norm;
    result.finite = !s->skip, result.bad_row = s->bad_row;
    return result;
}

static bool without_graph;

// From a phase's second step on the work is a graph's, so what is held against the oracle is, too.
static StepResult trainer_step(Trainer *t, const int *rows, int64_t it, StepTrace *keep) {
    Model *m = &t->model;
    Feed *f = &m->feed;
    begin_step(t, it);
    for (int i = 0; i < t->phase.micro_steps; i++) {
        FeedSlot *s = feed_open(f, i, t->phase.micro_rows, t->phase.T);
        DeviceBatch *b = &s->batch;
        trainer_micro_batch(t, rows, i, b->tokens, b->targets);
        feed_close(f, s, embed_index_build(b->index.counts, b->tokens, b->n, f->V, f->counts));
        feed_send(f, i, i, m->stream);
    }
    if (without_graph)
        step_work(m, &t->phase, NULL);
    else
        step_run(m, &t->phase, keep && keep->logits ? keep : NULL);
    StepResult result = end_step(t);
    if (keep && keep->grads)
        CUDA_CHECK(cudaMemcpy(keep->grads, m->grads, m->table.numel * sizeof(float),
                              cudaMemcpyDeviceToHost));
    return result;
}

static void trainer_update(Trainer *t, const float *grads, int64_t it) {
    Model *m = &t->model;
    begin_step(t, it);
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    upload(m->grads, grads, m->table.numel * sizeof(float));
    for (int block = 0; block < m->table.blocks; block++) block_is_final(m, block);
    model_update(m);
    end_step(t);
}

// ---------------------------------------------------------------------------------------------

TEST(same_command_same_bits) {
    static Trainer one, two;
    Small a = small_train(&one, 4), b = small_train(&two, 4);
    CHECK(small_equal(&a, &b));
    small_free(&one, &a), small_free(&two, &b);
}

// The same step in both: loss, norm and parameters have the same bits, and no block is held.
static void check_same(Trainer *a, Trainer *b, StepResult x, StepResult y, int it) {
    float *p = trainer_params(a), *q = trainer_params(b);
    bool same = !memcmp(p, q, a->model.table.numel * sizeof(float)), held = false;
    for (int i = 0; i < b->model.table.blocks; i++) held = held || b->model.held[i];
    test_check(same && x.finite && x.loss == y.loss && x.grad_norm == y.grad_norm && !held,
               __FILE__, __LINE__, "step %d: found loss %.17g, norm %.17g, expected %.17g, %.17g%s",
               it, y.loss, y.grad_norm, x.loss, x.grad_norm, same ? "" : "; parameters differ");
    free(p), free(q);
}

// The second step of a phase is captured, so it neither allocates nor waits; the later ones are the
// same graph again. Other windows make another phase.
TEST(steps_of_a_graph) {
    static Trainer plain, graphed;
    char flags[512];
    cudaGraphExec_t graph = NULL;
    snprintf(flags, sizeof flags, "%s 4 --steps 8", SMALL);
    trainer_init(&plain, flags), trainer_init(&graphed, flags);
    for (int it = 0; it < (grid_small ? 3 : 8); it++) {
        int rows[SMALL_TOKENS];
        small_rows(rows, it);
        if (it == 4) plain.phase.window[0] = graphed.phase.window[0] = 7;
        without_graph = true;
        StepResult expected = trainer_step(&plain, rows, it, NULL);
        without_graph = false;
        StepResult found = trainer_step(&graphed, rows, it, NULL);
        check_same(&plain, &graphed, expected, found, it);
        if (it % 4 >= 2) CHECK(graphed.model.graph == graph);
        graph = graphed.model.graph;
        CHECK((graph != NULL) == (it % 4 >= 1));
    }
    CHECK(!plain.model.graph);
    model_free(&plain.model), model_free(&graphed.model);
}

// Whatever --recompute lets backward make again.
TEST(recomputed_layers_have_the_same_bits) {
    for (int level = 1; level <= 2; level++) {
        static Trainer kept, again;
        char flags[512];
        snprintf(flags, sizeof flags, "%s 4", SMALL);
        trainer_init(&kept, flags);
        snprintf(flags, sizeof flags, "%s 4 --recompute %d", SMALL, level);
        trainer_init(&again, flags);
        for (int it = 0; it < (grid_small ? 1 : 3); it++) {
            int rows[SMALL_TOKENS];
            small_rows(rows, it);
            StepResult expected = trainer_step(&kept, rows, it, NULL);
            check_same(&kept, &again, expected, trainer_step(&again, rows, it, NULL), it);
        }
        model_free(&kept.model), model_free(&again.model);
    }
}

// A shard of random tokens of SMALL's vocabulary, in a folder of its own.
static const char *small_shard(void) {
    static char path[300];
    const RandKey key = {6, 0, 99};
    enum { COUNT = 4000 };
    char *shard = (char *)die_alloc(SHARD_HEADER + 2 * COUNT, 1, "a shard");
    int32_t header[] = {SHARD_MAGIC, SHARD_VERSION, COUNT};
    memcpy(shard, header, sizeof header);
    for (uint64_t i = 0; i < COUNT; i++)
        ((uint16_t *)(shard + SHARD_HEADER))[i] = i ? rand_u32(key, i) % 130 : 3;
    snprintf(path, sizeof path, "%s/shard.bin", test_make_dir());
    if (io_write_file(path, shard, SHARD_HEADER + 2 * COUNT)) die(EXIT_DATA, "%s", io_error);
    free(shard);
    return path;
}

static void remove_shard(char *path) {
    *strrchr(path, '/') = 0;
    test_remove_dir(path);
}

// The loader's next 8 rows, as trainer_step takes them.
static void next_rows(Loader *l, int *rows /* (SMALL_TOKENS) */) {
    int inputs[SMALL_ROWS * 48], targets[SMALL_ROWS * 48];
    loader_next(l, inputs, targets, SMALL_ROWS);
    for (int i = 0; i < SMALL_TOKENS; i++)
        rows[i] = i % 49 < 48 ? inputs[i / 49 * 48 + i % 49] : targets[i / 49 * 48 + 47];
}

// model_step, which reads a step ahead, on a loader, and validation and samples between steps:
// beside plain steps on the same rows.
TEST(steps_of_a_loader) {
    static Trainer plain, ahead;
    char flags[512], path[300];
    Loader loader, same;
    snprintf(path, sizeof path, "%s", small_shard());
    for (int micro = 2; micro <= 8; micro *= 4) {
        snprintf(flags, sizeof flags, "%s %d --steps 5", SMALL, micro);
        trainer_init(&plain, flags), trainer_init(&ahead, flags);
        RowsConfig config = {path, 48, 130, 3, true, true, 1};
        loader_init(&loader, &config, 0, 1), loader_init(&same, &config, 0, 1);
        for (int it = 0; it < 5; it++) {
            int rows[SMALL_TOKENS];
            double losses[96];
            float logits[130];
            next_rows(&same, rows);
            without_graph = true;
            StepResult expected = trainer_step(&plain, rows, it, NULL);
            without_graph = false;
            model_losses(&ahead.model, rows, rows, 2, 48, &ahead.phase, losses);
            model_logits(&ahead.model, rows, 5, &ahead.phase, logits);
            StepResult found = model_step(&ahead.model, &loader, &ahead.phase, &ahead.plan,
                                          &ahead.flags, it, STOP_NO, NULL);
            LoaderState at = loader_state(&same);
            check_same(&plain, &ahead, expected, found, it);
            CHECK(!memcmp(&found.at, &at, sizeof at));
        }
        loader_free(&loader), loader_free(&same);
        model_free(&plain.model), model_free(&ahead.model);
    }
    remove_shard(path);
}

TEST(memory_is_what_dry_run_says) {
    static Trainer t;
    char flags[512];
    DescribeMemory rows[MODEL_MEMORY_ROWS];
    double said = 0;
    snprintf(flags, sizeof flags, "%s 4", SMALL);
    trainer_init(&t, flags);
    for (int i = model_memory(rows, &t.cfg, &t.plan, &t.model.plan) - 1; i >= 0; i--)
        said += rows[i].bytes;
    CHECK_INT(t.model.gpu.taken, said);
    model_free(&t.model);
}

static char self[300];  // this program

// The trainer with these flags after `environment`: its exit code, and a part of what it says.
static void check_ends(const char *environment, const char *flags, int code, const char *part) {
    char command[1000], said[4096];
    snprintf(command, sizeof command, "%s '%s' %s 2>&1", environment, self, flags);
    FILE *out = popen(command, "r");
    said[fread(said, 1, sizeof said - 1, out)] = 0;
    int status = pclose(out), found = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + status;
    test_check(found == code && strstr(said, part), __FILE__, __LINE__,
               "%s: found exit code %d, expected %d and '%s'; it said: %s", flags, found, code,
               part, said);
}

TEST(says_what_is_too_much) {
    char path[300], small[700], large[800];
    snprintf(path, sizeof path, "%s", small_shard());
    snprintf(small, sizeof small, "--train '%s' %s 8", path, SMALL);
    snprintf(large, sizeof large, "%s --depth 64 --channels 8192 --heads 64", small);
    check_ends("", "--dry-run 1 --micro-batch 4096 --batch-tokens 8388608", EXIT_USAGE,
               "--micro-batch 4096: found 8388608 tokens at once");
    check_ends("", "--dry-run 1 --seq-len 1 --batch-tokens 1000000000000 --ratio 100000",
               EXIT_USAGE, "--batch-tokens 1000000000000: found 1000000000000 rows");
    check_ends("", large, EXIT_DEVICE, "GPU memory: needed ");
    check_ends("CUDA_VISIBLE_DEVICES=", small, EXIT_DEVICE, "GPU: found none");
    check_ends("CUDA_FORCE_PTX_JIT=1", small, EXIT_DEVICE, "make ARCH=");
    remove_shard(path);
}

// A weight that is NaN, of a token that only row 5 has. Row 4 is in the same tile of attention's.
TEST(not_finite_no_update) {
    static Trainer t;
    char flags[512];
    int rows[SMALL_TOKENS], teller;
    snprintf(flags, sizeof flags, "%s 2", SMALL);
    trainer_init(&t, flags);
    size_t C = (size_t)t.cfg.C, bytes = t.model.table.numel * sizeof(float);
    CUDA_CHECK(cudaMemset(t.model.w.embed.wte + 77 * C, 0xff, C * sizeof(floatX)));
    small_rows(rows, 0);
    rows[5 * (SMALL_TOKENS / SMALL_ROWS) + 20] = 77;
    float *before = trainer_params(&t);
    StepResult s = trainer_step(&t, rows, 0, NULL);
    float *after = trainer_params(&t);
    CHECK(!s.finite);
    CHECK_INT(find_bad_row(&t.model, &t.phase, 0, (int)s.bad_row), 5);
    CHECK_STR(find_bad_tensor(&t.model, &teller),
              "lm_head");  // the loss was first: all of backward is NaN
    CHECK(!memcmp(before, after, bytes));
    free(before), free(after);
    model_free(&t.model);
}

// Gradients of three tensors are not finite: the one that backward comes to first is named, and
// nothing is updated.
TEST(bad_gradient_is_named) {
    static Trainer t;
    char flags[512];
    snprintf(flags, sizeof flags, "%s 2", SMALL);
    trainer_init(&t, flags);
    const Table *table = &t.model.table;
    size_t bytes = table->numel * sizeof(float);
    int teller;
    float *grads = (float *)die_alloc(table->numel, sizeof *grads, "gradients");
    float *before = trainer_params(&t);
    CUDA_CHECK(cudaMemcpy(grads, t.model.grads, bytes, cudaMemcpyDeviceToHost));
    CHECK(find_bad_tensor(&t.model, &teller) == NULL);
    grads[table_find(table, WTE, -1)->offset] = NAN;
    grads[table_find(table, WQ, 1)->offset] = NAN;
    grads[table_find(table, WFC, 1)->offset + 3] = INFINITY;
    trainer_update(&t, grads, 0);
    float *after = trainer_params(&t);
    CHECK_INT(t.model.host_step->skip, 1);
    CHECK_STR(find_bad_tensor(&t.model, &teller), "layers.1.wfc");
    CHECK(!memcmp(before, after, bytes));
    free(grads), free(before), free(after);
    model_free(&t.model);
}

int main(int argc, char **argv) {
    if (argc > 1) return train_gpt2cu_main(argc, argv);
    gpu_test_begin();
    self[readlink("/proc/self/exe", self, sizeof self - 1)] = 0;
    if (sizeof(floatX) == 4) {
        run_fixtures(grid_small ? "dev/test/fixtures/oracle_odd*" : "dev/test/fixtures/oracle_*",
                     test_oracle);
    } else {  // heads of 64 or 128 only; rounding alone is far above what FP32 is allowed
        tolerance = {0.01, 0.05, 0.15, INFINITY, INFINITY, INFINITY};
        run_fixtures("dev/test/fixtures/oracle_*_d128*", test_oracle);
    }
    RUN(steps_of_a_graph);
    RUN(recomputed_layers_have_the_same_bits);
    if (grid_small) return test_end();  // under the sanitizers one model is slow enough
    if (sizeof(floatX) == 4) {
        run_fixtures("dev/test/fixtures/optim_*", test_optimizer);
        RUN(micro_batches_change_nothing_but_rounding);
    }
    RUN(same_command_same_bits);
    RUN(not_finite_no_update);
    RUN(bad_gradient_is_named);
    RUN(steps_of_a_loader);
    RUN(memory_is_what_dry_run_says);
    RUN(says_what_is_too_much);
    RUN(padding_stays_zero);
    return test_end();
}
