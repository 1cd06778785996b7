// bench_matmul.c: GFLOP/s of llmc/matmul.h beside OpenBLAS, same threads, same run.
//
// Products of linear layers n x in x out: forward y = x W^T, dgrad dx = dy W, wgrad dW += dy^T x.
// Ours and OpenBLAS take turns, so that whatever else the machine does meets both; the figures are
// medians of 11 turns. The peak is what a loop of fused multiply-adds reaches that never leaves the
// registers, the best of several tries. Threads: OMP_NUM_THREADS, or all cores.
//
// Two variables are read when the libraries are loaded, so this program sets them and starts again:
// OPENBLAS_CORETYPE is dropped, since it may name a slower kernel than the machine's own, and
// OMP_WAIT_POLICY is passive, since threads of ours that spin while they wait disturb the others.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "llmc/die.h"     // die, die_alloc
#include "llmc/matmul.h"  // matmul_forward, matmul_dgrad, matmul_wgrad
#include "llmc/rand.h"    // rand_uniform

#ifdef USE_OPENBLAS
#include <cblas.h>  // cblas_sgemm, openblas_get_corename, openblas_set_num_threads
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
#endif

typedef enum { FORWARD, DGRAD, WGRAD } Product;
static const char *const product_name[] = {"forward", "dgrad", "wgrad"};

// One linear layer, its operands, and the result of each product from either side.
typedef struct {
    int n, in, out;
    float *x, *w, *dy;     // (n, in), (out, in), (n, out)
    float *ours, *theirs;  // large enough for any of the three
} Layer;

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void run_ours(const Layer *l, Product product) {
    if (product == FORWARD) matmul_forward(l->ours, l->x, l->w, l->n, l->in, l->out);
    if (product == DGRAD) matmul_dgrad(l->ours, l->dy, l->w, l->n, l->in, l->out);
    if (product == WGRAD) matmul_wgrad(l->ours, l->dy, l->x, l->n, l->in, l->out);
}

static void run_theirs(const Layer *l, Product product) {
#ifdef USE_OPENBLAS
    int n = l->n, in = l->in, out = l->out;
    if (product == FORWARD)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, n, out, in, 1, l->x, in, l->w, in, 0,
                    l->theirs, out);
    if (product == DGRAD)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, in, out, 1, l->dy, out, l->w, in,
                    0, l->theirs, in);
    if (product == WGRAD)
        cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, out, in, n, 1, l->dy, out, l->x, in, 1,
                    l->theirs, in);
#else
    (void)l, (void)product;
#endif
}

static size_t result_size(const Layer *l, Product product) {
    size_t n = (size_t)l->n, in = (size_t)l->in, out = (size_t)l->out;
    return product == FORWARD ? n * out : product == DGRAD ? n * in : out * in;
}

static float *random_numbers(size_t count, uint32_t stream) {
    float *x = (float *)die_alloc(count, sizeof *x, "an operand");
    RandKey key = {1, stream, 0};
    for (size_t i = 0; i < count; i++) x[i] = (float)(2 * rand_uniform(key, i) - 1);
    return x;
}

static Layer layer_init(int n, int in, int out) {
    Layer l = {n, in, out, NULL, NULL, NULL, NULL, NULL};
    l.x = random_numbers((size_t)n * (size_t)in, 0);
    l.w = random_numbers((size_t)out * (size_t)in, 1);
    l.dy = random_numbers((size_t)n * (size_t)out, 2);
    size_t most = fmax(fmax((double)result_size(&l, FORWARD), (double)result_size(&l, DGRAD)),
                       (double)result_size(&l, WGRAD));
    l.ours = (float *)die_alloc(most, sizeof *l.ours, "a result");
    l.theirs = (float *)die_alloc(most, sizeof *l.theirs, "a result");
    return l;
}

static void layer_free(Layer *l) {
    free(l->x), free(l->w), free(l->dy), free(l->ours), free(l->theirs);
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

enum { TURNS = 11 };

static double median(double *x) {
    qsort(x, TURNS, sizeof *x, ascending);
    return x[TURNS / 2];
}

// Seconds of one run, the mean of `repeats` in a row.
static double timed(void (*run)(const Layer *, Product), const Layer *l, Product product,
                    int repeats) {
    double start = seconds();
    for (int i = 0; i < repeats; i++) run(l, product);
    return (seconds() - start) / repeats;
}

// Largest difference of the two results, relative to the largest result.
static double difference(const Layer *l, Product product) {
    double worst = 0, largest = 0;
    for (size_t i = 0; i < result_size(l, product); i++) {
        worst = fmax(worst, fabs((double)l->ours[i] - l->theirs[i]));
        largest = fmax(largest, fabs((double)l->ours[i]));
    }
    return worst / largest;
}

static void bench(const Layer *l, Product product, double peak) {
    double flops = 2.0 * l->n * l->in * l->out, ours[TURNS], theirs[TURNS];
    int repeats = (int)fmin(1000, ceil(5e8 / flops));
    memset(l->ours, 0, result_size(l, product) * sizeof *l->ours);
    memset(l->theirs, 0, result_size(l, product) * sizeof *l->theirs);
    run_ours(l, product), run_theirs(l, product);
#ifdef USE_OPENBLAS
    if (difference(l, product) > 1e-4)
        die(EXIT_INTERNAL, "%s %d x %d x %d: results differ by %g", product_name[product], l->n,
            l->in, l->out, difference(l, product));
#else
    (void)difference;
#endif
    for (int turn = 0; turn < TURNS; turn++) {
        usleep(40000);  // OpenBLAS's threads spin for 2^26 clocks after a product
        ours[turn] = timed(run_ours, l, product, repeats);
        theirs[turn] = timed(run_theirs, l, product, repeats);
    }
    double mine = flops / median(ours) * 1e-9, other = flops / median(theirs) * 1e-9;
    printf("%5d x %5d x %5d  %-8s %9.1f %8.0f%%", l->n, l->in, l->out, product_name[product], mine,
           100 * mine / peak);
#ifdef USE_OPENBLAS
    printf(" %9.1f %8.0f%% %8.2f", other, 100 * other / peak, mine / other);
#else
    (void)other;
#endif
    printf("\n");
    fflush(stdout);
}

// GFLOP/s of multiply-adds that never leave the registers, all threads together.
static double register_peak(void) {
    enum { STEPS = 2000000, SUMS = 12 };
    double best = 0;
    for (int attempt = 0; attempt < 9; attempt++) {
        double start = seconds();
        int threads = 0;
#pragma omp parallel reduction(+ : threads)
        {
            MatmulVec sum[SUMS], factor, term;
            memset(sum, 0, sizeof sum), memset(&factor, 0, sizeof factor),
                memset(&term, 0, sizeof term);
            __asm__ volatile(""
                             : "+x"(factor), "+x"(term));  // the compiler must not know they are 0
            for (int step = 0; step < STEPS; step++) {
#pragma GCC unroll 12
                for (int i = 0; i < SUMS; i++) sum[i] = sum[i] * factor + term;
            }
            for (int i = 0; i < SUMS; i++) __asm__ volatile("" : "+x"(sum[i]));
            threads += 1;
        }
        best = fmax(best, 2.0 * STEPS * SUMS * MATMUL_LANES * threads / (seconds() - start) * 1e-9);
    }
    return best;
}

static const int shapes[][3] = {
    {1024, 768, 3072}, {3072, 768, 768}, {256, 256, 50257},  // depth 12; the head of depth 4
    {2048, 128, 384},  {2048, 512, 128},                     // depth 2
    {1, 768, 3072},                                          // one row, as in sampling
};

int main(int argc, char **argv) {
    (void)argc;
    if (getenv("OPENBLAS_CORETYPE") || !getenv("OMP_WAIT_POLICY")) {
        unsetenv("OPENBLAS_CORETYPE");
        setenv("OMP_WAIT_POLICY", "passive", 0);
        execv("/proc/self/exe", argv);
    }
    double peak = register_peak();
    printf("%d threads, %d numbers a vector; multiply-adds in registers: %.1f GFLOP/s\n",
           omp_get_max_threads(), MATMUL_LANES, peak);
#ifdef USE_OPENBLAS
    openblas_set_num_threads(omp_get_max_threads());
    printf("OpenBLAS: kernel %s, %s\n", openblas_get_corename(), openblas_get_config());
    printf("\n%5s   %5s   %5s  %-8s %9s %9s %9s %9s %8s\n", "n", "in", "out", "product", "GFLOP/s",
           "of peak", "OpenBLAS", "of peak", "ratio");
#else
    printf("without OpenBLAS: it was not found\n\n%5s   %5s   %5s  %-8s %9s %9s\n", "n", "in",
           "out", "product", "GFLOP/s", "of peak");
#endif
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        Layer l = layer_init(shapes[i][0], shapes[i][1], shapes[i][2]);
        for (int product = FORWARD; product <= WGRAD; product++) bench(&l, (Product)product, peak);
        layer_free(&l);
    }
    return 0;
}
