// bench_packing.c: how fast documents are packed, and how fast rows come out of the loader.
//
//     build/bench_packing              on shards of random tokens, made in $TMPDIR and removed
//     build/bench_packing 'data/*.bin' on these shards (V 50257, BOS 50256)
//
// Packing alone works on lengths in memory: a million documents, best-fit, tails kept, one thread.
// The lengths are log-normal with the mean of real text in GPT-2 tokens (1,475) or short ones (60).
// The loader reads the shards from the page cache, as a trainer would that calls as fast as it can.
#include <math.h>
#include <time.h>

#include "llmc/dataloader.h"  // loader_init, loader_next, loader_restore

enum { DOCUMENTS = 1000000, T = 2048, V = 50257, BOS = 50256, SHARDS = 2, SHARD_TOKENS = 30000000 };

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Length of document i, BOS included.
static int document_length(double mean, uint64_t i) {
    RandKey key = {1, 0, RAND_PARAMETER};
    double spread = 1.2,
           length = exp(log(mean) - spread * spread / 2 + spread * rand_normal(key, i));
    return length < 2 ? 2 : (int)length;
}

static void bench_packing(double mean) {
    Packer *packer = die_alloc(1, sizeof *packer, "the packer");
    uint32_t *length = die_alloc(DOCUMENTS, sizeof *length, "lengths");
    for (uint64_t i = 0; i < DOCUMENTS; i++) length[i] = (uint32_t)document_length(mean, i);
    pack_init(packer, T + 1);
    int next = 0, space = T + 1;
    long long picks = 0, rows = 0;
    double start = seconds();
    for (;; picks++) {
        while (packer->count < PACK_BUFFER && next < DOCUMENTS)
            pack_put(packer, (PackPiece){0, (uint32_t)next, length[next], 0, 0}), next++;
        if (!packer->count) break;
        space -= (int)pack_length(pack_take(packer, space, true));
        if (!space) rows++, space = T + 1;
    }
    double time = seconds() - start;
    printf("packing, mean length %5.0f: %6.2f M documents/s, %6.2f M picks/s, %6.1f G tokens/s, "
           "%lld rows\n",
           mean, DOCUMENTS / time * 1e-6, (double)picks / time * 1e-6,
           (double)rows * T / time * 1e-9, rows);
    pack_free(packer);
    free(packer), free(length);
}

static void write_shard(const char *path, double mean, int seed) {
    static int32_t header[SHARD_HEADER / 4];
    uint16_t *tokens = die_alloc(SHARD_TOKENS, sizeof *tokens, "tokens");
    header[0] = SHARD_MAGIC, header[1] = SHARD_VERSION, header[2] = SHARD_TOKENS;
    uint64_t document = (uint64_t)seed << 32, word = (uint64_t)seed;
    for (int i = 0, left = 0; i < SHARD_TOKENS; i++, left--) {
        word = word * 6364136223846793005ull + 1442695040888963407ull;
        tokens[i] = left ? (uint16_t)((word >> 33) % BOS) : BOS;
        if (!left) left = document_length(mean, document++);
    }
    IoFile f;
    if (io_create(&f, path) || io_write(&f, header, sizeof header) ||
        io_write(&f, tokens, SHARD_TOKENS * sizeof *tokens) || io_close(&f))
        die(EXIT_INTERNAL, "%s", io_error);
    free(tokens);
}

// Times `calls` calls of a rank that is the only one, or the first of several.
static void bench_loader(const char *name, RowsConfig config, int ranks, int B, int calls) {
    Loader loader;
    int32_t *inputs = die_alloc((size_t)B * T, sizeof *inputs, "inputs");
    int32_t *targets = die_alloc((size_t)B * T, sizeof *targets, "targets");
    double start = seconds();
    loader_init(&loader, &config, 0, ranks);
    double opened = seconds();
    loader_next(&loader, inputs, targets, B);
    double first = seconds();
    for (int i = 0; i < calls; i++) loader_next(&loader, inputs, targets, B);
    double end = seconds(), all = (double)calls * ranks * B * T / (end - first);
    LoaderState state = loader_state(&loader);
    printf("%-28s open %5.2f ms, first call %6.1f ms, then %7.1f M tokens/s of all ranks, %6.1f M "
           "of this one\n",
           name, 1e3 * (opened - start), 1e3 * (first - opened), all * 1e-6, all / ranks * 1e-6);
    start = seconds();
    loader_restore(&loader, state, loader_describe(&loader));
    loader_next(&loader, inputs, targets, B);
    printf("%-28s resume at row %llu of epoch %llu: %.1f ms\n", "", (unsigned long long)state.row,
           (unsigned long long)state.epoch, 1e3 * (seconds() - start));
    loader_free(&loader);
    free(inputs), free(targets);
}

static void bench_loaders(const char *pattern) {
    RowsConfig bestfit = {pattern, T, V, BOS, true, true, 1}, stream = bestfit;
    stream.bestfit = false;
    bench_loader("loader, best-fit, 1 rank", bestfit, 1, 32, 1500);
    bench_loader("loader, stream, 1 rank", stream, 1, 32, 1500);
    bench_loader("loader, best-fit, 8 ranks", bestfit, 8, 32, 300);
}

int main(int argc, char **argv) {
    bench_packing(1475);
    bench_packing(60);
    if (argc > 1) {
        bench_loaders(argv[1]);
        return 0;
    }
    const char *base = getenv("TMPDIR");
    char path[512], pattern[512];
    for (int mean = 1475; mean; mean = mean == 1475 ? 60 : 0) {
        printf("%d shards of %d random tokens, mean length %d\n", SHARDS, SHARD_TOKENS, mean);
        for (int s = 0; s < SHARDS; s++) {
            snprintf(path, sizeof path, "%s/bench_packing_%d.bin", base ? base : "/tmp", s);
            write_shard(path, mean, s);
        }
        snprintf(pattern, sizeof pattern, "%s/bench_packing_*.bin", base ? base : "/tmp");
        bench_loaders(pattern);
        for (int s = 0; s < SHARDS; s++) {
            snprintf(path, sizeof path, "%s/bench_packing_%d.bin", base ? base : "/tmp", s);
            io_remove(path);
        }
    }
    return 0;
}
