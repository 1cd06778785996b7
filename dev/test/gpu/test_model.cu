// test_model.cu: the whole model on the GPU: against the oracle (dev/test/oracle.h), as on the CPU,
// and against itself: the same bits twice, in a CUDA graph and without, and no update from what is
// not finite. All activations are NaN before each step, so that none is read before it is written.
#define main train_gpt2cu_main
#include "train_gpt2.cu"
#undef main

#include "dev/test/gpu/test_gpu.cuh"  // gpu_test_begin, grid_small
#include "dev/test/oracle.h"          // test_oracle, test_optimizer, small_train

// ---------------------------------------------------------------------------------------------
// What oracle.h asks for: model_step on tokens that are given, not loaded.

// Poisons the activations, and puts step `it`'s numbers on their way.
static void begin_step(Trainer *t, int64_t it) {
    Model *m = &t->model;
    Activations none;
    size_t bytes = activations_layout(&none, &t->cfg, (int)m->max_tokens, NULL);
    CUDA_CHECK(cudaMemsetAsync(m->activations, 0xff, bytes, m->stream));
    step_numbers(m->host_step, &t->plan, &t->flags, &t->cfg, it);
    CUDA_CHECK(
        cudaMemcpyAsync(m->step, m->host_step, sizeof *m->step, cudaMemcpyHostToDevice, m->stream));
    CUDA_CHECK(cudaMemsetAsync(m->grads, 0, m->table.numel * sizeof(float), m->stream));
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

// Micro-batch `micro` of the rows, sent to its slot; the stream waits for it.
static DeviceBatch put_batch(Trainer *t, const int *rows, int64_t micro) {
    Feed *f = &t->model.feed;
    FeedSlot *s = feed_open(f, (int)micro, t->phase.micro_rows, t->phase.T);
    DeviceBatch *b = &s->host;
    trainer_micro_batch(t, rows, micro, b->tokens, b->targets);
    feed_send(f, s, embed_index_build(b->index.counts, b->tokens, b->n, f->V, f->counts));
    return feed_get(f, (int)micro, t->model.stream);
}

static void read_grads(Trainer *t, float *grads) {
    CUDA_CHECK(cudaStreamSynchronize(t->model.stream));
    CUDA_CHECK(cudaMemcpy(grads, t->model.grads, t->model.table.numel * sizeof(float),
                          cudaMemcpyDeviceToHost));
}

static StepResult trainer_step(Trainer *t, const int *rows, int64_t it, StepTrace *keep) {
    Model *m = &t->model;
    begin_step(t, it);
    for (int64_t micro = 0; micro < t->phase.micro_steps; micro++) {
        DeviceBatch b = put_batch(t, rows, micro);
        size_t at = (size_t)micro * (size_t)b.n * (size_t)t->cfg.V;
        model_accumulate(m, &b, &t->phase, micro, keep && keep->logits ? keep->logits + at : NULL);
    }
    if (keep && keep->grads) read_grads(t, keep->grads);
    model_update(m);
    return end_step(t);
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

// A step's work captured in a graph: it neither allocates nor waits, and gives the same bits.
TEST(step_in_a_graph) {
    static Trainer plain, graphed;
    char flags[512];
    int rows[SMALL_TOKENS];
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    snprintf(flags, sizeof flags, "%s 8", SMALL);
    trainer_init(&plain, flags), trainer_init(&graphed, flags);
    small_rows(rows, 0);
    StepResult expected = trainer_step(&plain, rows, 0, NULL);
    Model *m = &graphed.model;
    DeviceBatch b = put_batch(&graphed, rows, 0);
    CUDA_CHECK(cudaStreamSynchronize(m->feed.stream));
    CUDA_CHECK(cudaStreamBeginCapture(m->stream, cudaStreamCaptureModeGlobal));
    begin_step(&graphed, 0);
    model_accumulate(m, &b, &graphed.phase, 0, NULL);
    model_update(m);
    CUDA_CHECK(cudaStreamEndCapture(m->stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CUDA_CHECK(cudaGraphLaunch(exec, m->stream));
    StepResult found = end_step(&graphed);
    float *p = trainer_params(&plain), *g = trainer_params(&graphed);
    CHECK(found.finite && found.loss == expected.loss && found.grad_norm == expected.grad_norm);
    CHECK(!memcmp(p, g, m->table.numel * sizeof(float)));
    CUDA_CHECK(cudaGraphExecDestroy(exec));
    CUDA_CHECK(cudaGraphDestroy(graph));
    free(p), free(g);
    model_free(&plain.model), model_free(&graphed.model);
}

// A weight that is NaN, of a token that only row 5 has.
TEST(not_finite_no_update) {
    static Trainer t;
    char flags[512];
    int rows[SMALL_TOKENS];
    snprintf(flags, sizeof flags, "%s 2", SMALL);
    trainer_init(&t, flags);
    size_t C = (size_t)t.cfg.C, bytes = t.model.table.numel * sizeof(float);
    CUDA_CHECK(cudaMemset(t.model.w.wte + 77 * C, 0xff, C * sizeof(floatX)));
    small_rows(rows, 0);
    rows[5 * (SMALL_TOKENS / SMALL_ROWS) + 20] = 77;
    float *before = trainer_params(&t);
    StepResult s = trainer_step(&t, rows, 0, NULL);
    float *after = trainer_params(&t);
    CHECK(!s.finite);
    CHECK_INT(s.bad_row, 5);
    CHECK_STR(find_bad_tensor(&t.model), "lm_head");  // the loss was first: all of backward is NaN
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
    float *grads = (float *)die_alloc(table->numel, sizeof *grads, "gradients");
    float *before = trainer_params(&t);
    read_grads(&t, grads);
    CHECK(find_bad_tensor(&t.model) == NULL);
    grads[table_find(table, WTE, -1)->offset] = NAN;
    grads[table_find(table, WQ, 1)->offset] = NAN;
    grads[table_find(table, WFC, 1)->offset + 3] = INFINITY;
    trainer_update(&t, grads, 0);
    float *after = trainer_params(&t);
    CHECK_INT(t.model.host_step->skip, 1);
    CHECK_STR(find_bad_tensor(&t.model), "layers.1.wfc");
    CHECK(!memcmp(before, after, bytes));
    free(grads), free(before), free(after);
    model_free(&t.model);
}

int main(void) {
    gpu_test_begin();
    if (sizeof(floatX) == 4) {
        run_fixtures(grid_small ? "dev/test/fixtures/oracle_odd*" : "dev/test/fixtures/oracle_*",
                     test_oracle);
    } else {  // heads of 64 or 128 only; rounding alone is far above what FP32 is allowed
        tolerance = {0.01, 0.05, 0.15, INFINITY, INFINITY, INFINITY};
        run_fixtures("dev/test/fixtures/oracle_*_d128*", test_oracle);
    }
    RUN(step_in_a_graph);
    if (grid_small) return test_end();  // under the sanitizers one model is slow enough
    if (sizeof(floatX) == 4) {
        run_fixtures("dev/test/fixtures/optim_*", test_optimizer);
        RUN(micro_batches_change_nothing_but_rounding);
    }
    RUN(same_command_same_bits);
    RUN(not_finite_no_update);
    RUN(bad_gradient_is_named);
    RUN(padding_stays_zero);
    return test_end();
}
