// test_feed.cu: micro-batches on their way to the GPU (llmc/feed.cuh): what arrives is what the
// loader gave.
#include "dev/test/gpu/test_gpu.cuh"
#include "llmc/feed.cuh"  // feed_init, feed_load, feed_put, feed_send, feed_get
#include "llmc/io.h"      // io_write_file

constexpr int SLOTS = 3, PLACES = 2, MAX_ROWS = 7, MAX_T = 129;
constexpr int V = 60000, BOS = V - 1;

static int below(int n) {
    static RandKey key = gpu_fresh_key();
    static uint64_t drawn;
    return (int)(rand_uniform(key, drawn++) * n);
}

// A shard of `count` tokens in a folder of its own. A document has `length` tokens, or about so;
// half of them are of a few.
typedef struct {
    char dir[256], path[280];
} ShardFile;

static ShardFile make_shard(int count, int length) {
    ShardFile s;
    size_t bytes = 1024 + 2 * (size_t)count;
    char *memory = (char *)die_alloc(bytes, 1, "a shard");
    int32_t header[] = {20240520, 1, count};
    memcpy(memory, header, sizeof header);
    uint16_t *tokens = (uint16_t *)(memory + 1024);
    for (int i = 0; i < count; i++)
        tokens[i] = (uint16_t)(i && below(length) ? below(below(2) ? BOS : 8) : BOS);
    snprintf(s.dir, sizeof s.dir, "%s", test_make_dir());
    snprintf(s.path, sizeof s.path, "%s/shard.bin", s.dir);
    if (io_write_file(s.path, memory, bytes)) die(EXIT_INTERNAL, "%s", io_error);
    free(memory);
    return s;
}

static RowsConfig make_rows(const ShardFile *s, int T) {
    return {s->path, T, V, BOS, true, true, 7};
}

static Config make_config(bool doc_mask) {
    Config c = {};
    c.V = V, c.bos = BOS, c.doc_mask = doc_mask;
    return c;
}

// Ints on the device are those expected.
static void check_ints(const char *name, const int *device, const int *expected, int n,
                       cudaStream_t stream) {
    int *found = gpu_expected<int>(n);
    CUDA_CHECK(cudaMemcpyAsync(found, device, n * sizeof(int), cudaMemcpyDeviceToHost, stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));
    for (int i = 0; i < n; i++)
        if (found[i] != expected[i]) {
            test_check(false, __FILE__, __LINE__, "%s[%d]: found %d, expected %d", name, i,
                       found[i], expected[i]);
            return;
        }
}

// Documents as train_gpt2.c finds them, but counted from the start of the micro-batch.
static int *documents(const int *tokens, int rows, int T, bool doc_mask) {
    int *start = gpu_expected<int>((size_t)rows * T);
    cpu::find_documents(start, tokens, rows, T, BOS, doc_mask);
    for (int i = 0; i < rows * T; i++) start[i] += i / T * T;
    return start;
}

// A slot sent to a place is of these tokens there. Without targets they are not looked at.
static DeviceBatch check_batch(Feed *f, int slot, int place, const int *tokens, const int *targets,
                               int rows, int T, bool doc_mask) {
    cudaStream_t compute;
    CUDA_CHECK(cudaStreamCreateWithFlags(&compute, cudaStreamNonBlocking));
    DeviceBatch b = feed_send(f, slot, place, compute), same = feed_get(f, place, rows, T);
    CHECK(b.tokens == same.tokens && b.targets == same.targets && b.doc_start == same.doc_start);
    CHECK(b.index.counts == same.index.counts && b.n == same.n);
    CHECK_INT(b.n, rows * T);
    CHECK_INT(b.rows, rows);
    CHECK_INT(b.T, T);
    check_ints("tokens", b.tokens, tokens, b.n, compute);
    check_ints("doc_start", b.doc_start, documents(tokens, rows, T, doc_mask), b.n, compute);
    if (targets) check_ints("targets", b.targets, targets, b.n, compute);
    CUDA_CHECK(cudaStreamDestroy(compute));
    return b;
}

static void check_index(EmbedIndex index, const int *tokens, int n) {
    int *counts = gpu_expected<int>(V);
    char *memory = gpu_expected<char>(embed_index_bytes(n));
    size_t used = embed_index_build(memory, tokens, n, V, counts);
    char *found = gpu_expected<char>(used);
    CUDA_CHECK(cudaMemcpy(found, index.counts, used, cudaMemcpyDeviceToHost));
    EmbedIndex a = embed_index_at(found, n), b = embed_index_at(memory, n);
    CHECK_INT(a.counts->pieces, b.counts->pieces);
    CHECK_INT(a.counts->splits, b.counts->splits);
    CHECK(!memcmp(a.position, b.position, n * sizeof *a.position));
    CHECK(!memcmp(a.split, b.split, b.counts->splits * sizeof *a.split));
    CHECK(!memcmp(a.piece, b.piece, b.counts->pieces * sizeof *a.piece));
}

// All slots are filled before the first is looked at, several times over.
static void check_loads(int rows, int T, bool doc_mask) {
    ShardFile shard = make_shard(901, 12);
    RowsConfig config = make_rows(&shard, T);
    Config c = make_config(doc_mask);
    Loader loader, same;
    Feed f;
    loader_init(&loader, &config, 0, 1), loader_init(&same, &config, 0, 1);
    feed_init(&f, &test_gpu, &c, MAX_ROWS * MAX_T, MAX_ROWS, SLOTS, PLACES);
    for (int round = 0; round < 3; round++) {
        for (int slot = 0; slot < SLOTS; slot++) feed_load(&f, slot, &loader, rows, T, slot % 2);
        for (int slot = 0; slot < SLOTS; slot++) {
            int n = rows * T, *tokens = gpu_expected<int>(n), *targets = gpu_expected<int>(n);
            loader_next(&same, tokens, targets, rows);
            DeviceBatch b =
                check_batch(&f, slot, slot % PLACES, tokens, targets, rows, T, doc_mask);
            check_index(b.index, tokens, n);
            CHECK(!memcmp(f.slot[slot].batch.targets, targets, n * sizeof *targets));
            for (int i = 0; i < rows; i++) {
                LoaderOrigin a = f.slot[slot].origin[i], b = loader_origin(&same, i);
                CHECK(a.token == b.token && a.epoch == b.epoch && a.row == b.row);
                CHECK_STR(a.path, b.path);
            }
        }
        gpu_end_case();
    }
    feed_free(&f);
    loader_free(&loader), loader_free(&same);
    test_remove_dir(shard.dir);
}

TEST(loads) {
    for (int rows : {1, 2, MAX_ROWS})
        for (int T : {1, 3, 64, MAX_T}) check_loads(rows, T, true);
    check_loads(3, 65, false);
}

// Given tokens, of fewer, more and shorter rows than the loader's, with and without targets.
TEST(puts) {
    Config c = make_config(true);
    Feed f;
    feed_init(&f, &test_gpu, &c, MAX_ROWS * MAX_T, MAX_ROWS, SLOTS, PLACES);
    for (int rows : {1, 5, MAX_ROWS, 4 * MAX_ROWS})
        for (int T : {1, 2, 63, MAX_T}) {
            if (rows * T > MAX_ROWS * MAX_T) continue;
            int n = rows * T, *tokens = gpu_expected<int>(n), *targets = gpu_expected<int>(n);
            for (int i = 0; i < n; i++)
                tokens[i] = below(5) ? below(1000) : BOS, targets[i] = below(1000);
            feed_put(&f, 1, tokens, targets, rows, T);
            check_batch(&f, 1, 0, tokens, targets, rows, T, true);
            feed_put(&f, 1, targets, NULL, rows, T);
            check_batch(&f, 1, 0, targets, NULL, rows, T, true);
            gpu_end_case();
        }
    feed_free(&f);
}

// How long the host takes for a micro-batch of 64 rows of 2048 tokens.
static void bench(void) {
    int rows = 64, T = 2048, times = 20;
    ShardFile shard = make_shard(4000000, 500);
    RowsConfig config = make_rows(&shard, T);
    Config c = make_config(true);
    Loader loader;
    Feed f;
    double load = 0, send = 0;
    loader_init(&loader, &config, 0, 1);
    feed_init(&f, &test_gpu, &c, rows * T, rows, 1, 1);
    for (int i = 0; i < times; i++) {
        double start = test_seconds();
        feed_load(&f, 0, &loader, rows, T, false);
        double loaded = test_seconds();
        feed_send(&f, 0, 0, 0);
        CUDA_CHECK(cudaStreamSynchronize(0));
        double sent = test_seconds();
        usleep(100000);  // as a step would take: the loader's thread goes ahead
        if (i) load += loaded - start, send += sent - loaded;
    }
    printf("feed_load  %d tokens  %.2f ms of the host, then %.2f ms of the copy\n", rows * T,
           1e3 * load / (times - 1), 1e3 * send / (times - 1));
    feed_free(&f);
    loader_free(&loader);
    test_remove_dir(shard.dir);
}

int main(int argc, char **argv) {
    gpu_test_begin();
    if (argc > 1 && !strcmp(argv[1], "bench")) {
        bench();
        return 0;
    }
    RUN(loads);
    RUN(puts);
    return test_end();
}
