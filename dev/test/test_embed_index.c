// test_embed_index.c: llmc/embed_index.h: every position once, in order, in pieces that fit, within
// the memory that its sizes promise.
#include "dev/test/test.h"
#include "llmc/die.h"          // die_alloc
#include "llmc/embed_index.h"  // embed_index_build, embed_index_at
#include "llmc/rand.h"         // rand_uniform

enum { FILL = 0x5a, GUARD = 64 };

// Walks the pieces in order: token after token, its positions ascending, none too long; partial
// sums numbered in order, for split tokens only.
static void check_pieces(const EmbedIndex *index, const int *tokens, int n, const int *occurs) {
    int first = 0, partials = 0, before = -1;
    for (int i = 0; i < index->counts->pieces; i++) {
        EmbedPiece p = index->piece[i];
        CHECK_INT(p.first, first);
        CHECK(p.count >= 1 && p.count <= EMBED_PIECE);
        CHECK(p.token >= before);
        CHECK_INT(p.partial, occurs[p.token] > EMBED_PIECE ? partials++ : -1);
        for (int k = first; k < first + p.count && k < n; k++) {
            int at = index->position[k];
            CHECK(at >= 0 && at < n && tokens[at] == p.token);
            CHECK(k == 0 || tokens[index->position[k - 1]] != p.token ||
                  index->position[k - 1] < at);
        }
        first += p.count, before = p.token;
    }
    CHECK_INT(first, n);
    CHECK(partials <= embed_max_partials(n));
}

// The splits name each token with more than a piece, and share out the partial sums in order.
static void check_splits(const EmbedIndex *index, int n, int V, const int *occurs) {
    int split = 0, partial = 0;
    for (int v = 0; v < V; v++) {
        if (occurs[v] <= EMBED_PIECE) continue;
        EmbedSplit s = index->split[split++];
        CHECK_INT(s.token, v);
        CHECK_INT(s.first, partial);
        CHECK_INT(s.count, (occurs[v] + EMBED_PIECE - 1) / EMBED_PIECE);
        partial += s.count;
    }
    CHECK_INT(index->counts->splits, split);
    CHECK(split <= embed_max_splits(n));
}

// Builds the index of n tokens below V, checks it, and that nothing after its bytes is written.
static void check_index(const int *tokens, int n, int V) {
    size_t bytes = embed_index_bytes(n);
    char *memory = aligned_alloc(16, (bytes + GUARD + 15) / 16 * 16);
    int *counts = die_alloc((size_t)V, sizeof *counts, "counts"),
        *occurs = die_alloc((size_t)V, sizeof *occurs, "occurs");
    memset(memory, FILL, bytes + GUARD);
    for (int t = 0; t < n; t++) occurs[tokens[t]]++;
    size_t used = embed_index_build(memory, tokens, n, V, counts);
    EmbedIndex index = embed_index_at(memory, n);
    CHECK(used <= bytes);
    CHECK((char *)(index.piece + n) == memory + bytes);
    for (size_t i = used; i < bytes + GUARD; i++)
        if (memory[i] != FILL) {
            CHECK_INT(memory[i], FILL);
            break;
        }
    check_pieces(&index, tokens, n, occurs);
    check_splits(&index, n, V, occurs);
    int distinct = 0;
    for (int v = 0; v < V; v++) distinct += occurs[v] > 0;
    CHECK_INT(embed_index_distinct(index), distinct);
    free(memory), free(counts), free(occurs);
}

// Token t of n, by rank r with frequency about 1/r.
static void fill_zipf(int *tokens, int n, int V) {
    RandKey key = {1, 2, 3};
    for (int t = 0; t < n; t++) {
        int rank = (int)exp(rand_uniform(key, (uint64_t)t) * log(V));
        tokens[t] = (int)(rank * 48271LL % V);  // common tokens lie anywhere
    }
}

TEST(one_token) {
    int tokens[] = {4};
    check_index(tokens, 1, 5);
    check_index((int[]){0}, 1, 1);
}

TEST(all_equal) {
    enum { MOST = 4 * EMBED_PIECE + 1 };
    int tokens[MOST];
    for (int t = 0; t < MOST; t++) tokens[t] = 7;
    for (int n = 1; n <= MOST; n++) check_index(tokens, n, 9);
}

TEST(all_different) {
    int tokens[1000];
    for (int t = 0; t < 1000; t++) tokens[t] = 999 - t;
    check_index(tokens, 1000, 1000);
}

// As many splits and partial sums as there can be: each token occurs EMBED_PIECE + 1 times.
TEST(most_splits) {
    enum { V = 40, N = V * (EMBED_PIECE + 1) };
    int tokens[N];
    for (int t = 0; t < N; t++) tokens[t] = t % V;
    check_index(tokens, N, V);
    CHECK_INT(embed_max_splits(N), V);
    CHECK_INT(embed_max_partials(N), 2 * V);
}

TEST(any_lengths) {
    enum { N = 4000 };
    int tokens[N];
    for (int V = 2; V < 3000; V = V * 3 / 2 + 1) {
        fill_zipf(tokens, N, V);
        for (int n = 1; n <= N; n = n * 5 / 3 + 1) check_index(tokens, n, V);
        check_index(tokens, N, V);
    }
}

// A micro-batch of 64 rows of 2048: it must take a small part of a step of 100 ms.
TEST(a_micro_batch_takes_milliseconds) {
    enum { N = 131072, V = 50257 };
    int *tokens = die_alloc(N, sizeof *tokens, "tokens"),
        *counts = die_alloc(V, sizeof *counts, "counts");
    char *memory = aligned_alloc(16, (embed_index_bytes(N) + 15) / 16 * 16);
    fill_zipf(tokens, N, V);
    check_index(tokens, N, V);
    double best = 1;
    size_t used = 0;
    for (int i = 0; i < 20; i++) {
        double start = test_seconds();
        used = embed_index_build(memory, tokens, N, V, counts);
        best = fmin(best, test_seconds() - start);
    }
    printf("  %d tokens: %.2f ms, %zu of %zu bytes in use\n", N, 1e3 * best, used,
           embed_index_bytes(N));
    CHECK(best < 0.02);
    free(tokens), free(counts), free(memory);
}

int main(void) {
    RUN(one_token);
    RUN(all_equal);
    RUN(all_different);
    RUN(most_splits);
    RUN(any_lengths);
    RUN(a_micro_batch_takes_milliseconds);
    return test_end();
}
