// flags.h: the flags of the trainers, one row each. train_gpt2.c and train_gpt2.cu share them all.
//
// A row makes the struct's field, the parser, --help, the README's list and the echo at start:
//     F(C type, ARG_ type, field, name on the command line, default, lowest, highest, help)
// A number with lowest = highest = 0 has no range beyond that of its type. What depends on other
// flags (0 or "" here) is resolved in model.h and schedule.h; --dry-run prints the outcome.
#ifndef LLMC_FLAGS_H
#define LLMC_FLAGS_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "llmc/args.h"  // Arg, args_parse
#include "llmc/die.h"   // die, EXIT_USAGE

#define SPEEDRUN_VERSION "0.1"

// clang-format off
#define TRAIN_FLAGS(F)                                                                             \
    /* the model */                                                                                \
    F(int, INT, depth, "depth", "12", 1, 128,                                                      \
      "layers L: the one dial; it sets every size below")                                          \
    F(int, INT, channels, "channels", "0", 0, 65536,                                               \
      "width C; 0: 64 L, rounded up to a multiple of 128")                                         \
    F(int, INT, heads, "heads", "0", 0, 1024,                                                      \
      "attention heads H; 0: C/128, at least 1")                                                   \
    F(int, INT, vocab, "vocab", "0", 0, 65536,                                                     \
      "vocabulary V; 0: the tokenizer's, or 50257 without one")                                    \
    F(int, INT, bos, "bos", "-1", -1, 65535,                                                       \
      "token that starts a document; -1: the tokenizer's, else 50256 or V-1")                      \
    F(int, INT, seq_len, "seq-len", "2048", 1, 1 << 20,                                            \
      "tokens in a row T")                                                                         \
    F(const char *, STRING, window_pattern, "window-pattern", "SSSL", 0, 0,                        \
      "short and long windows, tiled over the layers; the last is L")                              \
    F(int, INT, window_short, "window-short", "0", 0, 1 << 20,                                     \
      "keys before the query in an S layer; 0: T/4, up to a multiple of 128")                      \
    F(bool, BOOL, doc_mask, "doc-mask", "0", 0, 0,                                                 \
      "1: attention and smear stay inside a document")                                             \
    /* the data */                                                                                 \
    F(const char *, STRING, train, "train", "", 0, 0,                                              \
      "training shards: files or patterns, separated by commas")                                   \
    F(const char *, STRING, val, "val", "", 0, 0,                                                  \
      "validation shard; of several, the first")                                                   \
    F(const char *, STRING, tokenizer, "tokenizer", "none", 0, 0,                                  \
      "bytes, a tokenizer file, or none (no sampling, no bits per byte)")                          \
    F(const char *, STRING, packing, "packing", "bestfit", 0, 0,                                   \
      "bestfit (rows start at a BOS) or stream (rows are cut as they come)")                       \
    F(const char *, STRING, tails, "tails", "keep", 0, 0,                                          \
      "keep or drop what best-fit packing cuts off a document")                                    \
    F(int64_t, INT64, batch_tokens, "batch-tokens", "0", 0, 1e12,                                  \
      "tokens per update; 0: a power of two that suits the horizon")                               \
    F(int, INT, micro_batch, "micro-batch", "0", 0, 1 << 20,                                       \
      "rows at once per rank; 0: within 8192 tokens (CPU), 131072 or 28 GB (GPU)")                 \
    F(int, INT, recompute, "recompute", "0", 0, 2,                                                 \
      "on a GPU, what backward makes again: 0 nothing, 1 relu^2, 2 the layer")                     \
    /* how long */                                                                                 \
    F(int64_t, INT64, steps, "steps", "0", 0, 1e12,                                                \
      "updates; 0: from --tokens or --ratio")                                                      \
    F(int64_t, INT64, tokens, "tokens", "0", 0, 1e15,                                              \
      "tokens to train on; 0: from --ratio")                                                       \
    F(double, DOUBLE, ratio, "ratio", "10", 1e-6, 1e6,                                             \
      "tokens per matrix parameter")                                                               \
    F(int, INT, warmup, "warmup", "40", 0, 1 << 30,                                                \
      "steps in which the learning rates rise to their value")                                     \
    /* the optimizer: learning rates before their scaling by width and batch (schedule.h) */       \
    F(double, DOUBLE, lr_matrix, "lr-matrix", "0.02", 0, 1e3,                                      \
      "learning rate of the matrices (Muon)")                                                      \
    F(double, DOUBLE, lr_lm_head, "lr-lm-head", "0.008", 0, 1e3,                                   \
      "... of lm_head (AdamW, like all that follow)")                                              \
    F(double, DOUBLE, lr_wte, "lr-wte", "0.3", 0, 1e3,                                             \
      "... of the token embedding")                                                                \
    F(double, DOUBLE, lr_value_embed, "lr-value-embed", "0.15", 0, 1e3,                            \
      "... of the value embeddings")                                                               \
    F(double, DOUBLE, lr_resid, "lr-resid", "0.005", 0, 1e3,                                       \
      "... of resid_lambda")                                                                       \
    F(double, DOUBLE, lr_x0, "lr-x0", "0.5", 0, 1e3,                                               \
      "... of x0_lambda")                                                                          \
    F(double, DOUBLE, lr_smear, "lr-smear", "0.2", 0, 1e3,                                         \
      "... of smear_gate, smear_lambda, backout_lambda")                                           \
    F(double, DOUBLE, wd_matrix, "wd-matrix", "0.28", 0, 1e3,                                      \
      "weight decay of the matrices, before its scaling")                                          \
    F(double, DOUBLE, grad_clip, "grad-clip", "0", 0, 1e9,                                         \
      "largest global gradient norm; 0: no clipping")                                              \
    F(int, INT, seed, "seed", "1337", 0, 2147483647,                                               \
      "of the weights, the order of shards and the samples")                                       \
    F(const char *, STRING, init, "init", "default", 0, 0,                                         \
      "default, or test: every tensor random and non-zero")                                        \
    /* what comes out */                                                                           \
    F(const char *, STRING, out, "out", "", 0, 0,                                                  \
      "folder of log.csv, run.json, ckpt/ (a file STOP or SAVE in it is obeyed); none: no files")  \
    F(const char *, STRING, resume, "resume", "", 0, 0,                                            \
      "auto (newest valid save in --out, or a fresh start) or a save's folder")                    \
    F(int, INT, gpus, "gpus", "0", 0, 255,                                                         \
      "ranks to start on this machine, each with a GPU; 0: a launcher's, or one")                  \
    F(double, DOUBLE, timeout, "timeout", "60", 1, 1e6,                                            \
      "seconds without a sign of life after which a rank is lost, and the run ends")               \
    F(int, INT, save_every, "save-every", "0", 0, 1 << 30,                                         \
      "steps between saves; 0: at the end only")                                                   \
    F(int, INT, keep, "keep", "2", 1, 1 << 30,                                                     \
      "newest saves kept")                                                                         \
    F(int, INT, keep_every, "keep-every", "0", 0, 1 << 30,                                         \
      "saves at multiples of this step are kept for good; 0: none")                                \
    F(int, INT, eval_every, "eval-every", "250", 0, 1 << 30,                                       \
      "steps between validations; 0: at the end only")                                             \
    F(int64_t, INT64, val_tokens, "val-tokens", "10485760", 0, 1e15,                               \
      "targets of a validation; 0: all")                                                           \
    F(int, INT, sample_every, "sample-every", "0", 0, 1 << 30,                                     \
      "steps between samples; 0: at the end only")                                                 \
    F(int, INT, sample_tokens, "sample-tokens", "64", 0, 1 << 20,                                  \
      "tokens of a sample")                                                                        \
    F(const char *, STRING, prompt, "prompt", "", 0, 0,                                            \
      "text that a sample goes on from")                                                           \
    F(double, DOUBLE, temperature, "temperature", "0.8", 0, 100,                                   \
      "of a sample; 0: the likeliest token")                                                       \
    F(int, INT, top_k, "top-k", "50", 0, 65536,                                                    \
      "a sample draws from the k likeliest tokens; 0: from all")                                   \
    F(const char *, STRING, dump, "dump", "", 0, 0,                                                \
      "do one step, write all its tensors to this safetensors file, and exit")                     \
    F(bool, BOOL, dump_sketch, "dump-sketch", "0", 0, 0,                                           \
      "1: --dump writes sketches: norm, sum, non-zeros, 64 projections")                           \
    F(bool, BOOL, dry_run, "dry-run", "0", 0, 0,                                                   \
      "1: print what the flags resolve to, and exit")
// clang-format on

#define FLAGS_FIELD(c_type, arg_type, field, ...) c_type field;
typedef struct {
    TRAIN_FLAGS(FLAGS_FIELD)
} Flags;
#undef FLAGS_FIELD

enum {
#define FLAGS_ONE(...) +1
    FLAGS_COUNT = 0 TRAIN_FLAGS(FLAGS_ONE)
#undef FLAGS_ONE
};

// Fills the table (FLAGS_COUNT rows) that args.h works on; values land in `flags`.
static inline void flags_table(Arg table[FLAGS_COUNT], Flags *flags) {
    int n = 0;
#define FLAGS_ROW(c_type, arg_type, field, flag_name, default_text, lowest, highest, help_text)    \
    table[n].name = flag_name, table[n].type = ARG_##arg_type, table[n].value = &flags->field,     \
    table[n].fallback = default_text, table[n].help = help_text, table[n].low = lowest,            \
    table[n].high = highest, table[n++].given = false;
    TRAIN_FLAGS(FLAGS_ROW)
#undef FLAGS_ROW
}

// Parses the command line. Exits 2 on a bad flag, 0 after --help.
static inline void flags_parse(Flags *flags, Arg table[FLAGS_COUNT], int argc, char **argv) {
    char usage[200];
    const char *slash = strrchr(argv[0], '/');
    snprintf(usage, sizeof usage, "%.99s --train SHARDS [--val SHARD] [--flag value]... [@file]",
             slash ? slash + 1 : argv[0]);
    flags_table(table, flags);
    args_parse(table, FLAGS_COUNT, usage, argc, argv);
}

// The index of `value` among the words of `choices` (separated by spaces); else exits 2.
static inline int flags_choice(const char *flag, const char *value, const char *choices) {
    int index = 0;
    for (const char *p = choices; *p; index++) {
        size_t n = strcspn(p, " ");
        if (strlen(value) == n && !memcmp(p, value, n)) return index;
        p += n + (p[n] == ' ');
    }
    die(EXIT_USAGE, "--%s: found '%s', expected one of: %s", flag, value, choices);
}

#endif
