// check.h: what can be found wrong with a run before its first step: flags that contradict each
// other or the save's, places that cannot be written to, a folder that another process has.
//
// What cannot be done exits 2; what can, but is hardly meant, is warned of.
#ifndef LLMC_CHECK_H
#define LLMC_CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llmc/checkpoint.h"  // ckpt_join, ckpt_list
#include "llmc/die.h"         // die, die_strdup, warn
#include "llmc/flags.h"       // Flags, args_find, args_changed
#include "llmc/io.h"          // io_create, io_lock, io_disk_full
#include "llmc/schedule.h"    // Config, Plan
#include "llmc/shards.h"      // ShardList
#include "llmc/tokenizer.h"   // tokenizer_require_encode

// Flags that ask for what cannot be, or have no effect.
static inline void check_flags(const Flags *f, const Tokenizer *t /* NULL: none */) {
    if (*f->prompt && !t) die(EXIT_USAGE, "--prompt: found text, but --tokenizer none; name one");
    if (*f->prompt) tokenizer_require_encode(t);
    if (f->sample_every && !t)
        die(EXIT_USAGE, "--sample-every: found %d, but --tokenizer none; name one",
            f->sample_every);
    if (f->save_every && !*f->out)
        die(EXIT_USAGE, "--save-every: found %d, but no --out to save in; name a folder",
            f->save_every);
    if (f->steps && f->tokens) warn("--tokens is not used: --steps says how long the run is");
}

// --ratio says how long the run is only where nothing else does.
static inline void check_ratio(const Flags *f, const Arg *ratio) {
    if ((f->steps || f->tokens) && f->ratio != strtod(ratio->fallback, NULL))
        warn("--ratio is not used: --%s says how long the run is", f->steps ? "steps" : "tokens");
}

// A micro-batch must divide the batch, which may leave it far smaller than micro_tokens.
static inline void check_micro_batch(const Flags *f, const Config *c, const Plan *p,
                                     int micro_tokens) {
    int64_t rows = p->batch / c->T, most = micro_tokens / c->T < rows ? micro_tokens / c->T : rows;
    if (f->micro_batch || 2 * p->micro_rows >= most) return;
    warn("micro-batches of %d row%s, where %lld would fit: the %lld rows of --batch-tokens %lld "
         "have no larger divisor up to there; choose a number of rows that has",
         p->micro_rows, p->micro_rows == 1 ? "" : "s", (long long)most, (long long)rows,
         (long long)p->batch);
}

// Names the flags that shape the training, all rows of the table before --out, and are not those of
// the save, a line of args_line or NULL. (Of --train it is the shards that count: loader_restore
// compares them.)
static inline void check_saved_flags(const Arg *args, const char *saved) {
    char *text = NULL;
    size_t size = 0;
    int changed = 0;
    FILE *list = saved ? open_memstream(&text, &size) : NULL;
    if (!list) return;
    for (const Arg *arg = args; strcmp(arg->name, "out"); arg++) {
        char *line = die_strdup(saved, "the save's flags"), now[64];
        const char *was;
        if (strcmp(arg->name, "train") && args_changed(arg, line, &was))
            fprintf(list, "%s--%s %s (was %s)%s", changed++ ? ", " : "", arg->name,
                    args_text(arg, now, sizeof now), *was ? was : "empty",
                    strcmp(arg->name, "seed") ? "" : ": the order of the data stays the save's");
        free(line);
    }
    fclose(list);
    if (changed) warn("--resume goes on with other flags than the save's: %s", text);
    free(text);
}

// Whether a validation shard, by its tokens' number and hash, is one of the training shards.
static inline void check_val(const ShardList *train, const Shard *val) {
    for (const Shard *s = train->shard; s < train->shard + train->count; s++)
        if (s->tokens == val->tokens && s->hash == val->hash)
            warn("--val: %s is also trained on, as %s: its loss says nothing of new text",
                 val->file.path, s->file.path);
}

// That a file can be made with the name that two parts make. A full disk may have room again when
// it is due.
static inline void check_place(const char *flag, const char *begin, const char *end) {
    char path[IO_PATH_MAX];
    IoFile f;
    if (snprintf(path, sizeof path, "%s%s", begin, end) >= IO_PATH_MAX)
        die(EXIT_USAGE, "--%s: a path of %d characters or more: %s", flag, IO_PATH_MAX, begin);
    bool failed = io_create(&f, path) || io_close(&f);
    if (failed && !io_disk_full())
        die(EXIT_USAGE, "--%s: %s; choose another place", flag, io_error);
    unlink(path);
}

// Makes the folder --out, sees that it can be written to, and takes it for this process alone,
// until `lock` is closed.
static inline void check_out(const char *out, IoFile *lock) {
    char path[IO_PATH_MAX];
    if (io_make_dir(out)) die(EXIT_USAGE, "--out: %s", io_error);
    check_place("out", out, "/probe.tmp");
    ckpt_join(path, out, "lock");
    int held = io_lock(lock, path);
    if (held > 0)
        die(EXIT_USAGE,
            "--out %s: another process is running there; stop it, or choose another folder", out);
    if (held < 0) warn("--out %s: another process may start there, too: %s", out, io_error);
}

// That --out holds no save of a later step than the one this run begins at: the newest counts, and
// --keep removes the oldest, so the run would lose its own saves. (After --resume auto only damaged
// ones can be newer.)
static inline void check_saves(const Flags *f, int64_t step) {
    CkptEntry *saves = NULL;
    if (!*f->out || !strcmp(f->resume, "auto")) return;
    int count = ckpt_list(f->out, &saves);
    if (count < 0) die(EXIT_CHECKPOINT, "--out: cannot look for saves: %s", io_error);
    if (count > 0 && saves[0].step > step)
        die(EXIT_USAGE,
            "--out: found the save %s, expected none later than step %lld, where this run begins; "
            "go on with --resume auto, or choose another folder",
            saves[0].path, (long long)step);
    free(saves);
}

#endif
