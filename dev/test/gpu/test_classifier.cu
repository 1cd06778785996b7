// test_classifier.cu: softcap, cross entropy and their gradient (llmc/classifier.cuh).
#include "dev/test/gpu/test_index.cuh"
#include "llmc/classifier.cuh"  // classifier, loss_reduce

static int padded(int V) { return (V + 127) / 128 * 128; }

// Logits in rows of Vp, NaN after column V, and targets, the first and the last token among them.
// With `huge` every third row has some of 200, and all of the row after it are -200 but two.
typedef struct {
    int rows, V, Vp;
    GpuArray<floatX> logits;
    int *targets, *targets_device;
} Case;

static Case make_case(int rows, int V, bool huge) {
    RandKey key = gpu_fresh_key();
    Case c = {rows, V, padded(V), {}, gpu_expected<int>(rows), NULL};
    size_t count = (size_t)rows * c.Vp;
    float *values = gpu_expected(count);
    for (size_t i = 0; i < count; i++) {
        int row = (int)(i / c.Vp), v = (int)(i % c.Vp);
        float x = (float)(4 * rand_normal(key, i));
        if (huge && row % 3 == 1 && v % 97 == 1) x = 200;
        if (huge && row % 3 == 2 && v > 1) x = -200;
        values[i] = v < V ? x : NAN;
    }
    for (int i = 0; i < rows; i++)
        c.targets[i] = i % 3 == 0   ? 0
                       : i % 3 == 1 ? V - 1
                                    : (int)(rand_uniform(key, count + (size_t)i) * V);
    c.logits = gpu_copy<floatX>("logits", values, count);
    c.targets_device = gpu_ints("targets", c.targets, rows);
    return c;
}

// What train_gpt2.c computes: losses, and the gradient in rows of Vp, 0 after column V.
static void expect(const Case *c, float scale, float *losses, float *gradient) {
    float *a = gpu_expected((size_t)c->rows * c->V);
    double *nats = gpu_expected<double>(c->rows);
    for (int i = 0; i < c->rows; i++)
        memcpy(a + (size_t)i * c->V, c->logits.host + (size_t)i * c->Vp, c->V * sizeof *a);
    cpu::classifier_forward(a, nats, c->targets, c->rows, c->V);
    cpu::classifier_backward(a, nats, c->targets, scale, c->rows, c->V);
    for (int i = 0; i < c->rows; i++) {
        losses[i] = (float)nats[i];
        memcpy(gradient + (size_t)i * c->Vp, a + (size_t)i * c->V, c->V * sizeof *a);
    }
}

// A gradient that was read: after column V it is 0 and nothing else, since it goes on into
// products with all Vp columns.
static void check_padding(const GpuArray<floatX> &gradient, int V, int Vp) {
    for (size_t i = 0; i < gradient.count; i++)
        if ((int)(i % (size_t)Vp) >= V && gradient.host[i] != 0) {
            test_check(false, __FILE__, __LINE__, "V %d, row %zu, column %zu: found %g, expected 0",
                       V, i / (size_t)Vp, i % (size_t)Vp, gradient.host[i]);
            return;
        }
}

static void check(int rows, int V, bool huge) {
    Case c = make_case(rows, V, huge);
    size_t count = (size_t)rows * c.Vp;
    float scale = 1.0f / 4096, *losses_expected = gpu_expected(rows),
          *gradient = gpu_expected(count);
    expect(&c, scale, losses_expected, gradient);
    GpuArray<floatX> again = gpu_copy<floatX>("logits", c.logits.host, count),
                     before = gpu_copy<floatX>("logits", c.logits.host, count);
    GpuArray<float> losses = gpu_poisoned<float>("losses", rows),
                    alone = gpu_poisoned<float>("losses", rows);
    classifier(c.logits.device, alone.device, c.targets_device, 0, rows, V, c.Vp, 0);
    CHECK(same_bits(c.logits, before));  // losses only: the logits stay
    classifier(c.logits.device, losses.device, c.targets_device, scale, rows, V, c.Vp, 0);
    CHECK(same_bits(losses, alone));
    classifier(again.device, alone.device, c.targets_device, scale, rows, V, c.Vp, 0);
    CHECK(same_bits(c.logits, again) && same_bits(losses, alone));
    losses.tolerance = sizeof(floatX) == 4 ? 1e-6 : 1e-5;
    gpu_compare(losses, losses_expected, rows, 1, "rows %d, V %d, huge %d", rows, V, huge);
    if (huge) c.logits.tolerance = fmax(TOLERANCE_X, 5e-5);  // what cancels where one logit wins
    gpu_compare(c.logits, gradient, rows, c.Vp, "rows %d, V %d, huge %d", rows, V, huge);
    check_padding(c.logits, V, c.Vp);
    gpu_end_case();
}

// V with and without padding and ragged last pieces; 65536 in FP32 is more than shared memory.
TEST(vocabularies) {
    for (int V : {2, 7, 8, 9, 140, 257, 300, 4096, 4097, 32768, 50257, 50304, 65536}) {
        if (grid_small && V > 300 && V != 65536) continue;
        check(1, V, false);
        check(grid_small ? 2 : 9, V, false);
    }
}

TEST(huge_logits) {
    for (int V : {140, 50257})
        if (V < 1000 || !grid_small) check(9, V, true);
}

// Where one logit wins, what is left of its gradient is small, and must be right nevertheless.
TEST(sure_of_the_target) {
    int V = 300, Vp = padded(V), target = 17;
    float *values = gpu_expected(Vp), *gradient = gpu_expected(Vp), loss_expected;
    for (int v = 0; v < V; v++) values[v] = v == target ? 9 : -4;
    Case c = {1, V, Vp, gpu_copy<floatX>("logits", values, Vp), &target, NULL};
    GpuArray<float> loss = gpu_poisoned<float>("loss", 1);
    expect(&c, 1, &loss_expected, gradient);
    classifier(c.logits.device, loss.device, gpu_ints("target", &target, 1), 1, 1, V, Vp, 0);
    c.logits.tolerance = fmax(TOLERANCE_X, 2e-4);  // 1 - p is what rounding leaves of it
    gpu_compare(c.logits, gradient, 1, Vp, "one row, %d of 9, the rest -4", target);
    CHECK(fabs(c.logits.host[target] - gradient[target]) < 1e-2 * fabs(gradient[target]));
    loss.tolerance = 3e-3;  // of a loss of 0.002
    gpu_compare(loss, &loss_expected, 1, 1, "one row, %d of 9, the rest -4", target);
    gpu_end_case();
}

static StepState *make_step(double loss_sum, int bad_row) {
    StepState step = {};
    step.loss_sum = loss_sum, step.bad_row = bad_row;
    StepState *device = (StepState *)gpu_bytes("step", sizeof step);
    CUDA_CHECK(cudaMemcpy(device, &step, sizeof step, cudaMemcpyHostToDevice));
    return device;
}

static StepState read_step(const StepState *device) {
    StepState step;
    CUDA_CHECK(cudaMemcpy(&step, device, sizeof step, cudaMemcpyDeviceToHost));
    return step;
}

// A NaN among the logits, wherever it is, makes its row's loss NaN, and no other.
TEST(nan_logit_names_its_row) {
    int V = 300, T = 4, rows = 12;
    for (int at : {0, 150, 298, 299}) {
        Case c = make_case(rows, V, false);
        c.logits.host[(size_t)6 * c.Vp + at] = NAN;
        GpuArray<floatX> logits = gpu_copy<floatX>("logits", c.logits.host, c.logits.count);
        GpuArray<float> losses = gpu_poisoned<float>("losses", rows);
        StepState *step = make_step(0, INT_MAX);
        classifier(logits.device, losses.device, c.targets_device, 1, rows, V, c.Vp, 0);
        loss_reduce(step, losses.device, rows, T, 20, 0);
        StepState found = read_step(step);
        CHECK_INT(found.bad_row, 20 + 6 / T);
        CHECK(!isfinite(found.loss_sum));
        gpu_read(losses);
        for (int i = 0; i < rows; i++) CHECK(isfinite(losses.host[i]) == (i != 6));
        gpu_end_case();
    }
}

// Sums, over several calls; the first row that is not finite, of several, and of several calls.
TEST(loss_sums_and_bad_rows) {
    for (int n : {1, 3, 1000, 1024, 1025, grid_small ? 2048 : 131072}) {
        GpuArray<float> losses = gpu_random<float>("losses", n, 0, 12);
        StepState *step = make_step(1.5, INT_MAX);
        double sum = 1.5;
        for (int i = 0; i < n; i++) sum += 2.0 * losses.host[i];
        loss_reduce(step, losses.device, n, n, 0, 0);
        loss_reduce(step, losses.device, n, n, 1, 0);
        StepState found = read_step(step);
        CHECK_NEAR(found.loss_sum, sum, 1e-12 * sum);
        CHECK_INT(found.bad_row, INT_MAX);
        losses.host[n / 2] = INFINITY, losses.host[n - 1] = NAN;
        GpuArray<float> bad = gpu_copy<float>("losses", losses.host, n);
        int T = n > 2 ? n / 3 : 1;
        loss_reduce(step, bad.device, n, T, 7, 0);
        CHECK_INT(read_step(step).bad_row, 7 + n / 2 / T);
        loss_reduce(step, bad.device, n, T, 9, 0);
        CHECK_INT(read_step(step).bad_row, 7 + n / 2 / T);
        gpu_end_case();
    }
}

TEST(beyond_2_31_elements) {
    int V = 50257;
    Large m = large_matrix(padded(V));
    if (grid_small) SKIP("GRID=small");
    if (!gpu_has_room(m.count * sizeof(floatX))) SKIP("too little GPU memory");
    floatX *logits = filled_array<floatX>(m.count);
    float *losses = filled_array<float>((size_t)m.rows);
    int *targets = gpu_expected<int>((size_t)m.rows);
    for (int i = 0; i < m.rows; i++) targets[i] = (int)(i * 7919LL % V);
    int *device = gpu_ints("targets", targets, (size_t)m.rows);
    Case c[WINDOWS];
    for (int i = 0; i < WINDOWS; i++)
        c[i] = {WINDOW_ROWS,           V,   m.cols, large_window("logits", logits, &m, i, m.cols),
                targets + m.window[i], NULL};
    classifier(logits, losses, device, 1, m.rows, V, m.cols, 0);
    for (int i = 0; i < WINDOWS; i++) {
        GpuArray<floatX> out = large_window("logits", logits, &m, i, m.cols);
        GpuArray<float> of_losses = large_window("losses", losses, &m, i, 1);
        float *gradient = gpu_expected(out.count), *losses_expected = gpu_expected(WINDOW_ROWS);
        expect(&c[i], 1, losses_expected, gradient);
        gpu_compare(of_losses, losses_expected, WINDOW_ROWS, 1, "rows from %d", m.window[i]);
        gpu_compare(out, gradient, WINDOW_ROWS, m.cols, "rows from %d", m.window[i]);
        check_padding(out, V, m.cols);
    }
    gpu_end_case();
}

// n rows of C logits each.
static void line(int rows, int V) {
    int Vp = padded(V), *targets = gpu_expected<int>(rows);
    for (int i = 0; i < rows; i++) targets[i] = (int)(i * 7919LL % V);
    floatX *logits = filled_array<floatX>((size_t)rows * Vp);
    float *losses = filled_array<float>(rows);
    int *device = gpu_ints("targets", targets, rows);
    bench("classifier", rows, Vp, 2,
          [=] { classifier(logits, losses, device, 1, rows, V, Vp, 0); });
    bench("classifier, losses only", rows, Vp, 1,
          [=] { classifier(logits, losses, device, 0, rows, V, Vp, 0); });
    gpu_end_case();
}

static void lines(int n, int C) {
    if (C == 768) line(8192, 50257), line(8192, 32768), line(8192, 65536);
    float *losses = filled_array<float>(n);
    StepState *step = make_step(0, INT_MAX);
    bench("loss_reduce", n, 1, sizeof(float) / (double)sizeof(floatX),
          [=] { loss_reduce(step, losses, n, 2048, 0, 0); });
}

int main(int argc, char **argv) {
    gpu_test_begin();
    bench_if_asked(argc, argv, lines);
    RUN(vocabularies);
    RUN(huge_logits);
    RUN(sure_of_the_target);
    RUN(nan_logit_names_its_row);
    RUN(loss_sums_and_bad_rows);
    RUN(beyond_2_31_elements);
    return test_end();
}
