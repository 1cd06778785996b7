// diff: holds one trainer, run or dump against another, number by number.
//
//     build/diff build/train_gpt2 build/train_gpt2cu_fp32
//     build/diff build/train_gpt2cu_fp32 build/train_gpt2cu --steps 100 -- --train 'data/*.bin'
//     build/diff runs/cpu build/train_gpt2cu                    runs/cpu: a folder with log.csv
//     build/diff cpu.safetensors gpu.safetensors                made with --dump
//
// The first side is the reference. Programs run one after the other with the flags after --, or
// with those of the recorded side, or on a small model of this repository's text. Four parts:
//     losses    of --steps steps of training, from log.csv
//     test      one step from --init test: loss, logits, every gradient, every updated parameter
//     updates   the parameters after --updates steps from --init test, from both saves
//     resumed   one step again, both from one save: --from, or what the reference's training left
// tensors.h and losses.h say by which rules. A recorded folder has a part when it has its file;
// --keep makes such a folder, of one program or of two.
//
// Exit codes: 0 all within tolerance, 1 not, 2 usage, 3 a damaged file, else that of a program that
// failed.
#include "dev/diff/losses.h"   // losses_read, losses_compare
#include "dev/diff/tensors.h"  // tensors_compare, tensors_print
#include "dev/diff/trainer.h"  // trainer_run
#include "llmc/args.h"         // args_parse, args_line
#include "llmc/checkpoint.h"   // ckpt_find
#include "llmc/flags.h"        // flags_table
#include "llmc/json.h"         // json_enter, json_string

typedef enum { SIDE_PROGRAM, SIDE_RUN, SIDE_DUMP } SideKind;
typedef enum { PART_LOSSES, PART_TEST, PART_UPDATES, PART_RESUMED, PART_DUMP } Part;

typedef struct {
    SideKind kind;
    const char *path;          // as given
    char folder[IO_PATH_MAX];  // where its files are; a dump: empty
    char program[128];         // what wrote them, "train_gpt2 (CPU, FP32)", once it is known
} Side;

typedef struct {
    ArgList paths;
    int steps, updates, top;
    bool dumps, sketch;
    const char *from, *keep, *precision;
    // Tolerances, < 0: by precision.
    double loss_tol, mean_tol, dump_loss_tol, logits_tol, grad_tol, updated_tol;
    Side side[2];
    int sides;
    char folder[IO_PATH_MAX];  // --keep, or a temporary one
    char **words;              // (word_count) the trainers' flags
    int word_count;
    bool has_plan;           // they say how long a run is
    char save[IO_PATH_MAX];  // what both resume from, once it is known
    int losses, losses_failed, tensors, tensors_failed;
    double worst;  // largest part of what is allowed
    char worst_name[256];
} Diff;

// The model of the default flags: every mechanism, windows and rows that end inside a tile, two
// micro-steps; the learning rates are those of scripts/quickstart.sh, but for two. At the default
// init the gradients of the lambdas are rounding noise, whose sign AdamW follows: --lr-smear, which
// is not scaled down for small batches, would make it large. And of a value embedding now and then
// one gradient in 100,000 is rounding noise in the first step, which then goes the other way: at a
// rate of 0.3 that alone is 7 times what is allowed of the tensor, at 0.01 a quarter. (What the
// step changes in all is 100 times what is allowed.)
static const char default_flags[] =
    "--vocab 257 --bos 256 --depth 4 --channels 256 --heads 2 --seq-len 256 --window-short 100 "
    "--doc-mask 1 --batch-tokens 1024 --micro-batch 2 --warmup 10 --lr-matrix 0.16 "
    "--lr-lm-head 0.064 --lr-wte 2.4 --lr-value-embed 0.01 --lr-smear 0.02";

// ---------------------------------------------------------------------------------------------
// What files say of themselves.

// The string of that name in a run.json; "" when it has none.
static void run_fact(const char *path, const char *name, char *value, size_t room) {
    char key[128], *text;
    size_t size;
    *value = 0;
    if (io_read_file(path, &text, &size)) return;
    Json j;
    json_init(&j, text, size);
    for (json_enter(&j, '{'); json_more(&j, '}');) {
        json_key(&j, key, sizeof key);
        if (strcmp(key, name))
            json_skip(&j);
        else
            json_string(&j, value, room, NULL);
    }
    if (!json_end(&j)) die(EXIT_DATA, "%s: byte %zu: %s", path, j.error_at, j.error);
    free(text);
}

// The same of a dump's metadata.
static void dump_fact(const char *path, const char *name, char *value, size_t room) {
    StFile f;
    *value = 0;
    if (st_open(&f, path)) die(EXIT_DATA, "%s", io_error);
    if (!st_metadata(&f, name, value, room)) *value = 0;
    st_close(&f);
}

// The file that holds a part of a side; the text lives until the next call for that side.
static const char *part_file(const Diff *d, const Side *s, Part part) {
    static char path[2][IO_PATH_MAX];
    static const char *const names[] = {"log.csv", "test.safetensors", "", "resumed.safetensors",
                                        "dump.safetensors"};
    char name[80];
    if (part == PART_DUMP && s->kind == SIDE_DUMP) return s->path;
    snprintf(name, sizeof name, "updates/ckpt/step_%08d/model.safetensors", d->updates);
    ckpt_join(path[s - d->side], s->folder, part == PART_UPDATES ? name : names[part]);
    return path[s - d->side];
}

// ---------------------------------------------------------------------------------------------
// Running programs.

// The save that both resume from: --from, or the newest of the reference, else of the other side.
static bool find_save(Diff *d) {
    bool found = *d->save || (*d->from && ckpt_find("", d->from, d->save));
    for (int i = 0; i < d->sides && !found; i++)
        found = *d->side[i].folder && ckpt_find(d->side[i].folder, "auto", d->save);
    return found;
}

// Updates done in a save.
static int64_t save_step(const char *save) {
    CkptMeta meta;
    if (ckpt_read_meta(save, &meta)) die(EXIT_CHECKPOINT, "%s", io_error);
    int64_t step = meta.step;
    ckpt_meta_free(&meta);
    return step;
}

// Makes the file of a part with the side's program: the common flags, then the part's own.
static void part_run(const Diff *d, const Side *s, Part part) {
    const char **argv = die_alloc((size_t)d->word_count + 32, sizeof *argv, "flags");
    const char *file = part_file(d, s, part),
               *sketch = d->sketch ? "--dump-sketch=1" : "--dump-sketch=0";
    char steps[32], updates[IO_PATH_MAX];
    int64_t count = 1000, stop_after = 0;
    int n = 0;
#define ADD(...)                                                                                   \
    do {                                                                                           \
        const char *words[] = {__VA_ARGS__};                                                       \
        for (size_t i = 0; i < sizeof words / sizeof *words; i++) argv[n++] = words[i];            \
    } while (0)
    ADD(s->path);
    for (int i = 0; i < d->word_count; i++) ADD(d->words[i]);
    ADD("--out=", "--dump=", "--dry-run=0", "--save-every=0", "--sample-every=0",
        "--sample-tokens=0");
    switch (part) {
    case PART_LOSSES:
        ADD("--resume=", "--out", s->folder);
        // The schedule is that of the flags' own number of steps. One more than are compared, as
        // its row of the log has their last validation.
        count = d->has_plan ? 0 : d->steps;
        if (d->has_plan) stop_after = (int64_t)d->steps + 1;
        break;
    case PART_TEST:
        ADD("--resume=", "--init=test", "--warmup=0", "--dump", file, sketch);
        break;
    case PART_UPDATES:
        ckpt_join(updates, s->folder, "updates");
        ADD("--resume=", "--init=test", "--warmup=0", "--out", updates);
        count = d->updates;
        break;
    case PART_RESUMED:
        ADD("--resume", d->save, "--dump", file, sketch);
        count = 4 * save_step(d->save);  // so that the learning rate has not begun to fall
        break;
    case PART_DUMP:
        ADD("--dump", file, sketch);
        if (*d->from) ADD("--resume", d->from);
    }
    snprintf(steps, sizeof steps, "%lld", (long long)count);
    if (part != PART_DUMP && count) ADD("--steps", steps);
#undef ADD
    trainer_run(argv, s->folder, stop_after);
    free(argv);
}

// ---------------------------------------------------------------------------------------------
// The parts.

// Whether the file of a part is there, or can be made; else says what is missing.
static bool part_is_possible(Diff *d, Part part) {
    for (int i = 0; i < d->sides; i++) {
        const Side *s = &d->side[i];
        const char *file = part_file(d, s, part);
        if (s->kind != SIDE_PROGRAM && !io_exists(file)) {
            printf("  left out: there is no %s\n", file);
            return false;
        }
        if (s->kind != SIDE_PROGRAM || part != PART_RESUMED || find_save(d)) continue;
        printf("  left out: there is no save to resume from; --from names one\n");
        return false;
    }
    return true;
}

// Makes what is missing of a part's files, and learns what wrote them. False: there is nothing to
// compare.
static bool part_make(Diff *d, Part part, const char *title) {
    printf("\n%s\n", title);
    if (!part_is_possible(d, part)) return false;
    for (int i = 0; i < d->sides; i++) {
        Side *s = &d->side[i];
        char run[IO_PATH_MAX];
        ckpt_join(run, s->folder, part == PART_UPDATES ? "updates/run.json" : "run.json");
        if (s->kind == SIDE_PROGRAM) part_run(d, s, part);
        if (*s->program) continue;
        if (part == PART_LOSSES || part == PART_UPDATES)
            run_fact(run, "program", s->program, sizeof s->program);
        else
            dump_fact(part_file(d, s, part), "program", s->program, sizeof s->program);
    }
    return d->sides == 2;
}

static bool is_bf16(const Diff *d) {
    if (strcmp(d->precision, "auto")) return !strcmp(d->precision, "bf16");
    return strstr(d->side[0].program, "BF16") || strstr(d->side[1].program, "BF16");
}

// What is allowed: as the flags say, else by whether a side computes in BF16.
static Tolerances tolerances(const Diff *d, double *each, double *mean) {
    static const Tolerances by_precision[2] = {{1e-6, 1e-5, 1e-4, 1e-4, false},
                                               {5e-3, 2e-2, 1e-1, 2e-2, true}};
    bool bf16 = is_bf16(d);
    Tolerances t = by_precision[bf16];
    *each = d->loss_tol >= 0 ? d->loss_tol : bf16 ? 0.03 : 1e-3;
    *mean = d->mean_tol >= 0 ? d->mean_tol : bf16 ? 0.005 : 1e-3;
    if (d->dump_loss_tol >= 0) t.loss = d->dump_loss_tol;
    if (d->logits_tol >= 0) t.logits = d->logits_tol;
    if (d->grad_tol >= 0) t.grad = d->grad_tol;
    if (d->updated_tol >= 0) t.updated = d->updated_tol;
    return t;
}

// Adds what a part found to the verdict.
static void note_worst(Diff *d, double part, const char *name, const char *where) {
    if (part <= d->worst) return;
    d->worst = part;
    snprintf(d->worst_name, sizeof d->worst_name, "%s%s", name, where);
}

static void compare_losses(Diff *d) {
    char title[64];
    double each, mean;
    snprintf(title, sizeof title, "losses of %d step%s of training", d->steps,
             d->steps == 1 ? "" : "s");
    if (!part_make(d, PART_LOSSES, title)) return;
    tolerances(d, &each, &mean);
    Losses a = losses_read(part_file(d, &d->side[1], PART_LOSSES), d->steps),
           b = losses_read(part_file(d, &d->side[0], PART_LOSSES), d->steps);
    LossVerdict v = losses_compare(&a, &b, each, mean);
    d->losses += v.count, d->losses_failed += v.failed;
    note_worst(d, v.worst, "the loss of ", v.worst_name);
    free(a.row), free(b.row);
}

static void compare_tensors(Diff *d, Part part, const char *title, const char *where) {
    double each, mean;
    if (!part_make(d, part, title)) return;
    Tolerances t = tolerances(d, &each, &mean);
    TensorRows rows =
        tensors_compare(part_file(d, &d->side[1], part), part_file(d, &d->side[0], part), &t);
    tensors_print(&rows, d->top, part == PART_TEST || part == PART_DUMP);
    d->tensors += rows.count, d->tensors_failed += rows.failed;
    if (rows.count) note_worst(d, rows.row[rows.worst].part, rows.row[rows.worst].name, where);
    free(rows.row);
    for (int i = 0; i < 2 && !*d->keep; i++)  // these files are as large as the model
        if (d->side[i].kind == SIDE_PROGRAM) io_remove(part_file(d, &d->side[i], part));
}

// ---------------------------------------------------------------------------------------------
// From start to end.

static Diff diff;

static void remove_folder(void) {
    if (!*diff.keep && *diff.folder) io_remove(diff.folder);
}

static void open_folder(Diff *d) {
    const char *base = getenv("TMPDIR");
    if (*d->keep) {
        snprintf(d->folder, sizeof d->folder, "%s", d->keep);
        if (io_make_dir(d->folder)) die(EXIT_USAGE, "--keep: %s", io_error);
        return;
    }
    snprintf(d->folder, sizeof d->folder, "%s/diff_XXXXXX", base ? base : "/tmp");
    if (!mkdtemp(d->folder)) die(EXIT_USAGE, "cannot make %s: %s", d->folder, strerror(errno));
    atexit(remove_folder);
    signal(SIGINT, SIG_IGN);  // the trainer dies of it, then this program ends, and tidies up
}

static void open_side(Diff *d, Side *s, const char *path) {
    s->path = path;
    s->kind = io_is_dir(path) ? SIDE_RUN : access(path, X_OK) ? SIDE_DUMP : SIDE_PROGRAM;
    if (!io_exists(path))
        die(EXIT_USAGE, "%s: found nothing there, expected a trainer, a run's folder or a dump",
            path);
    if (ckpt_ends_with(path, ".csv"))
        die(EXIT_USAGE, "%s: found a log, expected the run's folder, which holds it", path);
    const char *folder = s->kind == SIDE_RUN ? path : d->folder;
    int n = snprintf(s->folder, sizeof s->folder, s->kind == SIDE_PROGRAM ? "%s/%c" : "%s", folder,
                     s == d->side ? 'a' : 'b');
    if (n >= (int)sizeof s->folder) die(EXIT_USAGE, "%s: found a path that is too long", folder);
    if (s->kind == SIDE_DUMP) *s->folder = 0;
    if (s->kind == SIDE_PROGRAM && io_exists(s->folder))
        die(EXIT_USAGE, "--keep: found %s, expected a folder without it", s->folder);
}

// Makes shards of this repository's own text, and the flags of the default model on them.
static void default_model(const Diff *d, const char *program, char *flags, size_t room) {
    char command[4 * IO_PATH_MAX];
    const char *slash = strrchr(program, '/');
    if (!io_exists("train_gpt2.c"))
        die(EXIT_USAGE, "found no flags after --, and no train_gpt2.c to train on: give flags, or "
                        "run this in the repository's folder");
    snprintf(command, sizeof command,
             "'%.*stokenize' --tokenizer bytes --out '%s/text' --endings 'c h md sh py' README.md "
             "train_gpt2.c llmc dev scripts >/dev/null",
             slash ? (int)(slash + 1 - program) : 0, program, d->folder);
    if (system(command)) die(EXIT_USAGE, "this failed: %s", command);
    snprintf(flags, room, "--train \"%s/text_train_*.bin\" %s", d->folder, default_flags);
}

// The trainers' flags: those after --, else those of a recorded side, else the default model's.
static void open_flags(Diff *d, int argc, char **argv, const char *program) {
    static Flags flags;
    static Arg table[FLAGS_COUNT];
    enum { ROOM = 1 << 16 };
    static char word[IO_PATH_MAX + 1] = "@", *words[] = {word};
    char *all = die_alloc(ROOM, 1, "flags"), file[IO_PATH_MAX];
    d->words = argv, d->word_count = argc;
    for (int i = 0; i < d->sides && argc == 0; i++) {
        const Side *s = &d->side[i];
        ckpt_join(file, s->folder, "run.json");
        if (!*all && s->kind == SIDE_RUN) run_fact(file, "flags", all, ROOM);
        if (!*all && s->kind == SIDE_DUMP) dump_fact(s->path, "flags", all, ROOM);
    }
    d->has_plan = argc == 0 && *all;  // a recording's, whatever it follows from
    if (argc == 0) {
        if (!*all) default_model(d, program, all, ROOM);
        ckpt_join(word + 1, d->folder, "flags.txt");
        if (io_write_file(word + 1, all, strlen(all))) die(EXIT_USAGE, "%s", io_error);
        d->words = words, d->word_count = 1;
    }
    flags_table(table, &flags);
    char **whole = die_alloc((size_t)d->word_count + 1, sizeof *whole, "flags");
    memcpy(whole + 1, d->words, (size_t)d->word_count * sizeof *whole);
    args_parse(table, FLAGS_COUNT, "diff REFERENCE OTHER [--flag value]... -- [trainer's flags]",
               d->word_count + 1, whole);
    d->has_plan |= flags.steps || flags.tokens || args_find(table, FLAGS_COUNT, "ratio")->given;
    char *line = args_line(table, FLAGS_COUNT);
    printf("flags      %s\n", line);
    free(line), free(whole), free(all);
}

static void parse(Diff *d, int argc, char **argv) {
    Arg table[] = {
        {"side", ARG_LIST, &d->paths, "", "trainers, runs' folders, dumps; --side may be left out",
         0, 0, false},
        {"steps", ARG_INT, &d->steps, "50", "steps of training whose losses are compared; 0: none",
         0, 1 << 30, false},
        {"dumps", ARG_BOOL, &d->dumps, "1", "1: compare one step from --init test, and from a save",
         0, 0, false},
        {"updates", ARG_INT, &d->updates, "3", "compare the parameters after so many; 0: do not", 0,
         1000, false},
        {"from", ARG_STRING, &d->from, "", "save to resume from; none: that after --steps", 0, 0,
         false},
        {"top", ARG_INT, &d->top, "-1",
         "tensors listed in each table; 0: all; -1: 5, but of the first gradients all", -1, 1 << 30,
         false},
        {"sketch", ARG_BOOL, &d->sketch, "0", "1: dumps are sketches, small enough to record", 0, 0,
         false},
        {"keep", ARG_STRING, &d->keep, "", "folder for all files made; a program alone is recorded",
         0, 0, false},
        {"precision", ARG_STRING, &d->precision, "auto", "fp32 or bf16: the tolerances below", 0, 0,
         false},
        {"loss-tol", ARG_DOUBLE, &d->loss_tol, "-1",
         "of each loss; -1, here and below: fp32 1e-3, bf16 0.03", -1, 1e9, false},
        {"mean-tol", ARG_DOUBLE, &d->mean_tol, "-1",
         "of the mean over the last half; fp32 1e-3, bf16 0.005", -1, 1e9, false},
        {"dump-loss-tol", ARG_DOUBLE, &d->dump_loss_tol, "-1",
         "of one step's loss, relative; fp32 1e-6, bf16 0.005", -1, 1e9, false},
        {"logits-tol", ARG_DOUBLE, &d->logits_tol, "-1", "relative; fp32 1e-5, bf16 0.02", -1, 1e9,
         false},
        {"grad-tol", ARG_DOUBLE, &d->grad_tol, "-1", "relative; fp32 1e-4, bf16 0.1", -1, 1e9,
         false},
        {"updated-tol", ARG_DOUBLE, &d->updated_tol, "-1",
         "of parameters, relative; fp32 1e-4, bf16 0.02", -1, 1e9, false},
    };
    args_parse(table, sizeof table / sizeof *table,
               "diff REFERENCE OTHER [--flag value]... [-- trainer's flags]", argc, argv);
    flags_choice("precision", d->precision, "auto fp32 bf16");
    if (d->paths.count != 2 && !(d->paths.count == 1 && *d->keep))
        die(EXIT_USAGE,
            "expected a reference and another side (or one, to --keep), found %d; see --help",
            d->paths.count);
}

static const char *known(const Side *s) { return *s->program ? s->program : s->path; }

// Prints the last lines. Returns the exit code.
static int verdict(const Diff *d) {
    bool ok = d->losses_failed + d->tensors_failed == 0;
    char part[32];
    if (d->sides < 2) return printf("\nrecorded in %s\n", d->side[0].folder), EXIT_OK;
    if (d->losses + d->tensors == 0)
        die(EXIT_USAGE, "found nothing that both sides have, or can make");
    printf("\n%s against %s, tolerances of %s", known(&d->side[1]), known(&d->side[0]),
           is_bf16(d) ? "BF16" : "FP32");
    if (ok)
        printf("\nok: %d loss%s and %d tensor%s agree; ", d->losses, d->losses == 1 ? "" : "es",
               d->tensors, d->tensors == 1 ? "" : "s");
    else
        printf("\nTOO FAR: %d of %d loss%s and %d of %d tensor%s; ", d->losses_failed, d->losses,
               d->losses == 1 ? "" : "es", d->tensors_failed, d->tensors,
               d->tensors == 1 ? "" : "s");
    if (isinf(d->worst))
        printf("worst: %s, see there\n", d->worst_name);
    else if (d->worst > 0)
        printf("worst: %s, %s%s what is allowed\n", d->worst_name, tensor_part_text(part, d->worst),
               d->worst > 1 ? "" : " of");
    else
        printf("no difference at all\n");
    return ok ? EXIT_OK : EXIT_INTERNAL;
}

int main(int argc, char **argv) {
    Diff *d = &diff;
    int own = 1;
    bool programs = false, dump = false;
    while (own < argc && strcmp(argv[own], "--")) own++;
    parse(d, own, argv);
    open_folder(d);
    for (d->sides = 0; d->sides < d->paths.count; d->sides++) {
        Side *s = &d->side[d->sides];
        open_side(d, s, d->paths.item[d->sides]);
        programs |= s->kind == SIDE_PROGRAM, dump |= s->kind == SIDE_DUMP;
        printf("%s  %s\n", d->sides ? "other    " : "reference", s->path);
    }
    if (programs) open_flags(d, own < argc ? argc - own - 1 : 0, argv + own + 1, argv[0]);
    char updates[80];
    snprintf(updates, sizeof updates, "parameters after %d step%s from --init test", d->updates,
             d->updates == 1 ? "" : "s");
    if (dump) {
        compare_tensors(d, PART_DUMP, "one step", "");
    } else {
        if (d->steps) compare_losses(d);
        if (d->dumps) compare_tensors(d, PART_TEST, "one step from --init test", ", --init test");
        if (d->updates) compare_tensors(d, PART_UPDATES, updates, ", updated from --init test");
        if (d->dumps) compare_tensors(d, PART_RESUMED, "one step from a save", ", from a save");
    }
    return verdict(d);
}
