// bigram: the validation loss of a bigram model counted on token shards, the baseline to beat.
//
//     build/bigram --train data/train_*.bin --val data/val_000000.bin --vocab 50257 --seq-len 1024
//
// The model is interpolated Kneser-Ney (Kneser and Ney 1995; discounts: Ney, Essen, Kneser 1994).
// c(v,w): how often w follows v; c(v) = sum_w c(v,w); N(v.): how many different tokens follow v;
// N(.w): how many stand before w; N(..): how many different pairs; W: tokens with N(.w) > 0.
//
//     p(w|v) = max(c(v,w) - D, 0) / c(v)  +  D N(v.) / c(v) * q(w)       q(w) where c(v) = 0
//     q(w)   = max(N(.w) - E, 0) / N(..)  +  E W / N(..) * 1/V
//     D = (n1 + 1) / (n1 + 2 n2 + 2), n1 and n2: pairs with c = 1 and c = 2; E likewise of N(.w)
//
// Nothing is tuned on the validation text. A pair is two neighbours in a shard; BOS is a token like
// the others, pairs across a document's border count. The loss is the mean of -ln p(w|v) over the
// targets of the trainer's validation: rows of --seq-len tokens of the first --val shard, up to
// --val-tokens targets, a last partial row dropped. The trainer sees a row's past, this model one
// token; at a row's start both see one.
#include "llmc/args.h"        // args_parse
#include "llmc/dataloader.h"  // loader_val_init, loader_val_next
#include "llmc/shards.h"      // shards_open, shards_scan
#include "llmc/tokenizer.h"   // tokenizer_init, tokenizer_byte_count

typedef struct {
    uint32_t pair, count;  // v << 16 | w; count 0: a free place
} Count;

typedef struct {
    int V;
    Count *table;        // (mask + 1) c(v,w), open-addressed
    size_t mask, pairs;  // pairs = N(..)
    int64_t tokens;      // read for training
    int64_t *total;      // (V) c(v)
    int64_t *after;      // (V) N(v.)
    int64_t *before;     // (V) N(.w)
    int64_t words;       // W
    double D, E;
} Bigram;

// ---------------------------------------------------------------------------------------------
// Counting.

static Count *find_pair(const Bigram *b, uint32_t pair) {
    size_t i = (size_t)(pair * 0x9E3779B97F4A7C15u >> 32);
    for (i &= b->mask; b->table[i].count && b->table[i].pair != pair; i = (i + 1) & b->mask) {}
    return &b->table[i];
}

// Doubles the table.
static void grow(Bigram *b) {
    Count *old = b->table;
    size_t size = b->mask + 1;
    b->mask = 2 * size - 1;
    b->table = (Count *)die_alloc(2 * size, sizeof *old, "the counts of pairs");
    for (size_t i = 0; i < size; i++)
        if (old[i].count) *find_pair(b, old[i].pair) = old[i];
    free(old);
}

static void count_pair(Bigram *b, int v, int w) {
    uint32_t pair = (uint32_t)v << 16 | (uint32_t)w;
    Count *c = find_pair(b, pair);
    if (!c->count) {
        if (b->pairs > b->mask / 2) grow(b), c = find_pair(b, pair);
        c->pair = pair;
        b->pairs++;
    }
    if (c->count < UINT32_MAX) c->count++;
}

static void count_shards(Bigram *b, const char *patterns) {
    ShardList list;
    ShardIndex part;
    memset(&part, 0, sizeof part);
    if (shards_open(&list, patterns)) die(EXIT_DATA, "--train: %s", io_error);
    for (int s = 0; s < list.count; s++) {
        int last = -1;
        for (shards_index_reset(&part, s); !shards_scanned(&list, &part);) {
            int64_t start = part.scanned;
            if (shards_scan(&list, &part, -1, b->V)) die(EXIT_DATA, "%s", io_error);
            for (int64_t i = 0; i < part.scanned - start; last = part.chunk[i++])
                if (last >= 0) count_pair(b, last, part.chunk[i]);
        }
    }
    b->tokens = list.tokens;
    shards_index_free(&part);
    shards_free(&list);
}

// The share taken off every count, from how many things were counted once and twice. Never 0, so
// that what was never seen is not impossible.
static double discount(int64_t once, int64_t twice) {
    return (double)(once + 1) / (double)(once + 2 * twice + 2);
}

// Derives all other counts from those of the pairs.
static void sum_counts(Bigram *b) {
    int64_t once = 0, twice = 0;
    for (size_t i = 0; i <= b->mask; i++) {
        Count c = b->table[i];
        if (!c.count) continue;
        b->total[c.pair >> 16] += c.count;
        b->after[c.pair >> 16]++;
        b->before[c.pair & 0xFFFF]++;
        once += c.count == 1, twice += c.count == 2;
    }
    b->D = discount(once, twice);
    once = twice = 0;
    for (int w = 0; w < b->V; w++) {
        once += b->before[w] == 1, twice += b->before[w] == 2;
        b->words += b->before[w] > 0;
    }
    b->E = discount(once, twice);
}

static void bigram_init(Bigram *b, const char *patterns, int V) {
    memset(b, 0, sizeof *b);
    b->V = V;
    b->mask = 1023;
    b->table = (Count *)die_alloc(b->mask + 1, sizeof *b->table, "the counts of pairs");
    b->total = (int64_t *)die_alloc((size_t)V, sizeof *b->total, "the counts of tokens");
    b->after = (int64_t *)die_alloc((size_t)V, sizeof *b->after, "the counts of tokens");
    b->before = (int64_t *)die_alloc((size_t)V, sizeof *b->before, "the counts of tokens");
    count_shards(b, patterns);
    sum_counts(b);
}

static void bigram_free(Bigram *b) {
    free(b->table), free(b->total), free(b->after), free(b->before);
}

// ---------------------------------------------------------------------------------------------
// The model.

static double above(double count, double less) { return count > less ? count - less : 0; }

static double bigram_p(const Bigram *b, int v, int w) {
    double pairs = b->pairs ? (double)b->pairs : 1;  // a shard of one token has none
    double spared = b->pairs ? b->E * (double)b->words / pairs : 1;
    double q = above((double)b->before[w], b->E) / pairs + spared / b->V;
    double total = (double)b->total[v];
    if (total == 0) return q;
    double c = find_pair(b, (uint32_t)v << 16 | (uint32_t)w)->count;
    return above(c, b->D) / total + b->D * (double)b->after[v] / total * q;
}

// Prints the loss, and bits per byte if there is a tokenizer.
static void evaluate(const Bigram *b, LoaderVal *val, const Tokenizer *t) {
    int64_t targets = val->rows * val->T, bytes = 0;
    int32_t *input = (int32_t *)die_alloc((size_t)val->T, sizeof *input, "a row");
    int32_t *target = (int32_t *)die_alloc((size_t)val->T, sizeof *target, "a row");
    double nats = 0, text_nats = 0;
    while (loader_val_next(val, input, target, 1)) {
        for (int i = 0; i < val->T; i++) {
            double loss = -log(bigram_p(b, input[i], target[i]));
            int count = t ? tokenizer_byte_count(t, target[i]) : 0;
            nats += loss;
            if (count) text_nats += loss, bytes += count;
        }
    }
    printf("validation loss %.6f nats per target", nats / (double)targets);
    if (bytes) printf(", %.6f bits per byte", text_nats / ((double)bytes * log(2)));
    printf(" (%lld targets)\n", (long long)targets);
    free(input), free(target);
}

int main(int argc, char **argv) {
    const char *train, *val_path, *tokenizer;
    int vocab, T;
    int64_t val_tokens;
    Arg table[] = {
        {"train", ARG_STRING, &train, "", "shards to count: files or patterns, commas between", 0,
         0, 0},
        {"val", ARG_STRING, &val_path, "", "validation shard", 0, 0, 0},
        {"tokenizer", ARG_STRING, &tokenizer, "none", "none, bytes or a file: also bits per byte",
         0, 0, 0},
        {"vocab", ARG_INT, &vocab, "0", "V; 0: the tokenizer's, else 50257", 0, 65536, 0},
        {"seq-len", ARG_INT, &T, "2048", "tokens in a row of validation", 1, 1e9, 0},
        {"val-tokens", ARG_INT64, &val_tokens, "10485760", "targets of validation at most", 1, 1e18,
         0},
    };
    args_parse(table, sizeof table / sizeof *table, "bigram --train SHARDS --val SHARD", argc,
               argv);
    if (!*train || !*val_path)
        die(EXIT_USAGE, "found no --%s, expected token shards", *train ? "val" : "train");
    Tokenizer t;
    bool has_tokenizer = strcmp(tokenizer, "none") != 0;
    if (has_tokenizer) tokenizer_init(&t, tokenizer);
    if (!vocab) vocab = has_tokenizer ? t.vocab : 50257;
    LoaderVal val;
    Bigram b;
    loader_val_init(&val, val_path, T, vocab, val_tokens, 0, 1);
    bigram_init(&b, train, vocab);
    printf("bigram model (Kneser-Ney) of %lld tokens, %zu different pairs\n", (long long)b.tokens,
           b.pairs);
    evaluate(&b, &val, has_tokenizer ? &t : NULL);
    bigram_free(&b);
    loader_val_free(&val);
    if (has_tokenizer) tokenizer_free(&t);
    args_free();
    return EXIT_OK;
}
