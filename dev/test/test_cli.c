// test_cli.c: the trainer as its user meets it: flags, what it refuses and how it says so, the
// files of a run, --dry-run, --dump, validation, samples.
//
// The trainer runs as a process of its own (dev/test/cli.h). test_resume.c has what concerns saves.
#include "dev/test/cli.h"
#include "llmc/flags.h"   // flags_table, flags_parse
#include "llmc/model.h"   // config_from_flags, table_init, table_fill
#include "llmc/sketch.h"  // sketch_compute

// ---------------------------------------------------------------------------------------------
// Flags.

static Arg flag[FLAGS_COUNT];
static Flags flag_values;

TEST(help_lists_every_flag) {
    flags_table(flag, &flag_values);
    CHECK_INT(run("%s --help", program("train_gpt2")), 0);
    CHECK_SAID("usage: train_gpt2 --train SHARDS");
    for (int i = 0; i < FLAGS_COUNT; i++) {
        char line[64];
        snprintf(line, sizeof line, "\n  --%s ", flag[i].name);
        CHECK_INT(count_said(line), 1);
        CHECK_SAID(flag[i].help);
    }
    CHECK_INT(run("%s --depth 2 --help --depth x", program("train_gpt2")), 0);
}

// Exit code 2, one line, and this part of it; nothing is written.
static void refuse_flags(const char *flags, const char *message) {
    int code = run("%s --out %s %s", train(), in_dir("out"), flags);
    test_check(code == EXIT_USAGE, __FILE__, __LINE__, "%s: exit code %d, expected 2; it said: %s",
               flags, code, printed);
    CHECK_SAID(message);
    CHECK_INT(count_said("error: "), 1);
    CHECK_INT(count_said("\n"), 1);
    CHECK(!io_exists(in_dir("out")));
}

TEST(unknown_flags_name_the_nearest) {
    refuse_flags("--chanels 32", "unknown flag --chanels; did you mean --channels?");
    refuse_flags("--batch_tokens 64", "did you mean --batch-tokens?");
    refuse_flags("--lr 0.1", "unknown flag --lr; did you mean --");
    refuse_flags("-h2", "found '-h2', expected a flag");
    refuse_flags("shard.bin", "found 'shard.bin', expected a flag");
}

TEST(values_that_cannot_be_are_refused) {
    refuse_flags("--depth twelve",
                 "--depth: found 'twelve', expected a whole number from 1 to 128");
    refuse_flags("--depth 1.5", "--depth: found '1.5'");
    refuse_flags("--depth 0", "--depth: found '0'");
    refuse_flags("--depth ''", "--depth: found ''");
    refuse_flags("--steps 99999999999999999999", "--steps: found '99999999999999999999'");
    refuse_flags("--lr-matrix nan", "--lr-matrix: found 'nan', expected a number");
    refuse_flags("--lr-matrix -1", "--lr-matrix: found '-1'");
    refuse_flags("--doc-mask 2", "--doc-mask: found '2'");
    refuse_flags("--temperature", "--temperature: its value is missing; expected a number");
    refuse_flags("--packing best", "--packing: found 'best', expected one of: bestfit stream");
    refuse_flags("--tails cut", "--tails: found 'cut', expected one of: keep drop");
    refuse_flags("--init zero", "--init: found 'zero', expected one of: default test");
    refuse_flags("--window-pattern SXL", "--window-pattern: found 'SXL'");
}

TEST(values_that_do_not_fit_together_are_refused) {
    refuse_flags("--channels 36", "--channels: found 36, expected a multiple of 8");
    refuse_flags("--heads 3", "--channels 32 and --heads 3");
    refuse_flags("--batch-tokens 65",
                 "--batch-tokens: found 65, expected a multiple of --seq-len 16");
    refuse_flags("--micro-batch 3", "found 4 rows, expected a multiple of --micro-batch 3");
    refuse_flags("--steps 0 --tokens 63", "found less than one step");
    refuse_flags("--vocab 200", "--vocab: found 200, expected at least 257");
    refuse_flags("--bos 257", "--bos 257");
    refuse_flags("--train ''", "--train: found nothing");
    refuse_flags("--resume auto --out ''", "--resume auto: found no --out");
    refuse_flags("--save-every 5 --out ''", "--save-every: found 5, but no --out to save in");
    refuse_flags("--sample-every 5 --tokenizer none",
                 "--sample-every: found 5, but --tokenizer none; name one");
    refuse_flags("--out --dry-run", "--out: found the flag --dry-run where its value should be");
    char val[600];
    snprintf(val, sizeof val, "--val %s --val-tokens 15", in_dir("s00.bin"));
    refuse_flags(val, "--val-tokens: found 15, expected at least 16");
    CHECK_INT(run("%s --out %s/below", train(), in_dir("s00.bin")), EXIT_USAGE);
    CHECK_SAID("--out: cannot make the folder");
    CHECK_INT(run("%s --dump %s", train(), in_dir("nowhere/dump")), EXIT_USAGE);
    CHECK_SAID("--dump: cannot create");
}

// Before the parameters are filled, which here would take a minute, and for more memory than most
// machines have.
TEST(places_that_cannot_be_written_are_found_first) {
    const char *large = "--depth 100 --channels 6400 --heads 50 --micro-batch 1";
    CHECK_INT(io_make_dir(in_dir("out/probe.tmp")), 0);
    CHECK_INT(run("%s %s --out %s", train(), large, in_dir("out")), EXIT_USAGE);
    CHECK_SAID("--out: cannot create ");
    CHECK_INT(run("%s %s --out %s/below", train(), large, in_dir("s00.bin")), EXIT_USAGE);
    CHECK_SAID("--out: cannot make the folder");
    CHECK_INT(run("%s %s --dump %s", train(), large, in_dir("nowhere/dump")), EXIT_USAGE);
    CHECK_SAID("--dump: cannot create ");
}

TEST(flags_without_effect_are_warned_of) {
    train_well("--steps 1 --tokens 640 --ratio 3");
    CHECK_SAID("warning: --tokens is not used: --steps says how long the run is");
    CHECK_SAID("warning: --ratio is not used: --steps says how long the run is");
    train_well("--steps 0 --tokens 64 --ratio 3");
    CHECK_INT(count_said("warning: "), 1);
    CHECK_SAID("warning: --ratio is not used: --tokens says how long the run is");
    train_well("--steps 0 --ratio 0.004");
    CHECK_NOT_SAID("warning: ");
    train_well("--steps 1 --val %s", in_dir("s01.bin"));
    CHECK_INT(count_said("warning: "), 1);
    CHECK_SAID("/s01.bin is also trained on, as ");
    // 521 rows, a prime, of which 512 fit
    CHECK_INT(run("%s --batch-tokens 8336 --micro-batch 0 --dry-run 1", train()), 0);
    CHECK_SAID("warning: micro-batches of 1 row, where 512 would fit: the 521 rows of "
               "--batch-tokens 8336 have");
    CHECK_INT(run("%s --batch-tokens 8208 --micro-batch 0 --dry-run 1", train()), 0);  // 3 x 171
    CHECK_SAID("warning: micro-batches of 171 rows, where 512 would fit");
    CHECK_INT(run("%s --batch-tokens 16384 --micro-batch 0 --dry-run 1", train()), 0);
    CHECK_NOT_SAID("warning: ");
}

// Five points of the schedule, but each step once.
TEST(dry_run_shows_a_step_once) {
    CHECK_INT(run("%s --steps 3 --dry-run 1", train()), 0);
    for (int i = 0; i < 3; i++) {
        char row[20];
        snprintf(row, sizeof row, "\n%10d ", i);
        CHECK_INT(count_said(row), 1);
    }
}

TEST(flags_come_from_files_too) {
    Log direct, filed;
    train_well("--depth 2 --seed 5 --prompt 'two  words' --out %s", in_dir("direct"));
    static const char text[] = "# a run\n--depth 2\n--seed 5 --prompt \"two  words\"\n";
    write_bytes(in_dir("flags.txt"), text, strlen(text));
    train_well("@%s --out=%s", in_dir("flags.txt"), in_dir("filed"));
    CHECK_SAID("--seed 5");
    read_log(&direct, in_dir("direct"));
    read_log(&filed, in_dir("filed"));
    check_rows(&filed, &direct, 0);
    refuse_flags("@nowhere.txt", "@nowhere.txt: cannot open");
}

// ---------------------------------------------------------------------------------------------
// --dry-run.

TEST(dry_run_tells_what_the_flags_resolve_to) {
    flags_table(flag, &flag_values);
    CHECK_INT(run("%s --tokenizer bytes --seq-len 16 --depth 1 --channels 32 --batch-tokens 64 "
                  "--train nowhere --val nowhere --out %s --dry-run 1",
                  program("train_gpt2"), in_dir("out")),
              0);
    CHECK(!io_exists(in_dir("out")));
    for (int i = 0; i < FLAGS_COUNT; i++) {
        char line[64];
        snprintf(line, sizeof line, "%s--%s ", i ? "\n" : "", flag[i].name);
        CHECK_INT(count_said(line), 1);
    }
    CHECK_SAID("vocabulary V 257 (stored 384), row T 16, BOS 256");
    // 3 tables of 384 x 32, 4 matrices of 32 x 32, 2 of 32 x 128, 24 + 12 gates, 4 lambdas
    CHECK_SAID("\nall                                                 49192\n");
    // P = 12 x 32^2 + 257 x 32; FLOPs 6 P + 12 x 32 x 16
    CHECK_SAID("\nmatrix parameters P                                 20512 ");
    CHECK_SAID("FLOPs per token 1.292e+05");
    CHECK_SAID("layers.0.wproj                    (32, 128)          4096  0 ");
    CHECK_SAID("layers.0.ve_gate                    (1, 12)            12  uniform 0 .. 0.02 ");
    CHECK_SAID("parameters                                0.2 MiB");
    CHECK_SAID("activations of a micro-batch");
    CHECK_SAID("batch 64 tokens = 1 micro-step of 4 rows per rank, 3205 steps");  // 10 P / 64
    static const char *points[] = {"\n         0   0.02500    0.85000    1.00000",
                                   "\n       801   1.00000    0.97000", "\n      1602   0.78108",
                                   "\n      2403   0.41577", "\n      3204   0.05046"};
    for (int i = 0; i < 5; i++) CHECK_SAID(points[i]);
}

TEST(dry_run_prints_flags_that_read_back) {
    char first[sizeof printed];
    CHECK_INT(run("%s --depth 3 --channels 64 --heads 2 --lr-matrix 0.0123 --prompt 'a \"b\" #c' "
                  "--dry-run 1",
                  train()),
              0);
    snprintf(first, sizeof first, "%s", printed);
    char *end = strstr(printed, "\n\n");
    CHECK(end != NULL);
    if (end) write_bytes(in_dir("flags.txt"), printed, (size_t)(end - printed));
    CHECK_INT(run("%s @%s", program("train_gpt2"), in_dir("flags.txt")), 0);
    CHECK_STR(printed, first);
}

// ---------------------------------------------------------------------------------------------
// The files of a run.

TEST(a_run_leaves_its_log_its_facts_and_its_save) {
    Log csv;
    train_well("--depth 2 --prompt 'say \"so\"' --out %s", in_dir("new/out"));
    CHECK_STR(listing(in_dir("new/out")), "ckpt lock log.csv run.json");
    CHECK_STR(listing(in_dir("new/out/ckpt")), "step_00000012");
    CHECK_STR(listing(in_dir("new/out/ckpt/step_00000012")),
              "meta.json model.safetensors optim_rank000.safetensors");
    read_log(&csv, in_dir("new/out"));
    CHECK_INT(csv.rows, 13);
    CHECK_INT(count_said("first step "), 1);
    CHECK_NOT_SAID("mfu");  // of a CPU there is none
    for (int i = 0; i < 13; i++) {
        CHECK_INT(atoi(csv.cell[i][STEP]), i);
        CHECK_INT(atoi(csv.cell[i][TOKENS]), 64 * i);
        CHECK((*csv.cell[i][LOSS] != 0) == (i < 12) && (*csv.cell[i][LOSS_HEX] != 0) == (i < 12));
        if (i == 12) continue;
        CHECK_NEAR(log_number(&csv, i, LOSS_HEX), log_number(&csv, i, LOSS), 5.1e-7);
        CHECK_NEAR(log_number(&csv, i, GRAD_NORM_HEX), log_number(&csv, i, GRAD_NORM), 5.1e-7);
    }
    CHECK_NEAR(log_number(&csv, 0, LOSS), log(257), 0.05);
    CHECK(log_number(&csv, 11, LOSS) < log_number(&csv, 0, LOSS) - 0.02);
    size_t size;
    char *text = read_text(in_dir("new/out/run.json"), &size);
    Json j;
    json_init(&j, text, size);
    CHECK(json_skip(&j) && json_end(&j));
    CHECK(strstr(text, "\"flags\": \"--depth 2 ") && strstr(text, "s01.bin 90 "));
    free(text);
}

TEST(without_out_nothing_is_written) {
    CHECK_INT(io_make_dir(in_dir("here")), 0);
    CHECK_INT(run("p=$(realpath %s) && cd %s && $p --train '../s*.bin' " SMALL,
                  program("train_gpt2"), in_dir("here")),
              0);
    CHECK_STR(listing(in_dir("here")), "");
}

// ---------------------------------------------------------------------------------------------
// Bad shards.

// Exit code 3 within a second, one line that names the file and says this; nothing is written.
static void refuse_shard(const char *flags, const char *path, const char *message) {
    char line[600];
    double start = test_seconds();
    int code = run("%s --out %s %s", train(), in_dir("out"), flags);
    double took = test_seconds() - start;
    snprintf(line, sizeof line, "%s: %s", path, message);
    test_check(code == EXIT_DATA, __FILE__, __LINE__, "%s: exit code %d, expected 3; it said: %s",
               line, code, printed);
    CHECK_SAID(line);
    CHECK_INT(count_said("error: "), 1);
    CHECK_INT(count_said("\n"), 1);
    test_check(took < 1, __FILE__, __LINE__, "%s: took %.2f s, expected less than 1", line, took);
    CHECK(!io_exists(in_dir("out")));
}

// A file with this header and size, as the middle one of --train and as --val.
static void refuse_header(int32_t magic, int32_t version, int32_t count, size_t size,
                          const char *message) {
    int32_t bytes[512] = {magic, version, count};
    char val[600];
    write_bytes(in_dir("s01.bin"), bytes, size);
    refuse_shard("", in_dir("s01.bin"), message);
    write_bytes(in_dir("val.bin"), bytes, size);
    put_corpus_shard(1, shard_tokens[1]);
    snprintf(val, sizeof val, "--val %s", in_dir("val.bin"));
    refuse_shard(val, in_dir("val.bin"), message);
}

TEST(bad_shards_are_named) {
    refuse_header(20240520 + 1, 1, 90, 1204,
                  "byte 0: found magic number 20240521, expected 20240520");
    refuse_header(20240520, 2, 90, 1204, "byte 4: found version 2, expected 1");
    refuse_header(20240520, 1, 91, 1204,
                  "byte 8: found a count of 91 tokens, which makes 1206 bytes, expected 1204");
    refuse_header(20240520, 1, -1, 1204, "byte 8: found a count of -1 tokens, expected at least 1");
    refuse_header(20240520, 1, 90, 1202,
                  "byte 8: found a count of 90 tokens, which makes 1204 bytes, expected 1202");
    refuse_header(20240520, 1, 90, 1206,
                  "byte 8: found a count of 90 tokens, which makes 1204 bytes, expected 1206");
    refuse_header(20240520, 1, 90, 1000,
                  "byte 1000: found the end of the file, expected a header of 1024 bytes");
    refuse_header(0, 0, 0, 0, "byte 0: found the end of the file (it is empty)");
}

TEST(paths_that_are_no_shards_are_named) {
    char flags[700];
    static const char *names[] = {"--train", "--val"};
    CHECK_INT(io_make_dir(in_dir("folder")), 0);
    for (int i = 0; i < 2; i++) {
        snprintf(flags, sizeof flags, "%s %s", names[i], in_dir("folder"));
        CHECK_INT(run("%s %s", train(), flags), EXIT_DATA);
        CHECK_SAID("cannot read ");
        CHECK_SAID("/folder: it is a folder, expected a file");
        snprintf(flags, sizeof flags, "%s '%s'", names[i], in_dir("t*.bin"));
        refuse_shard(flags, in_dir("t*.bin"), "found no such file, expected token shards");
    }
    snprintf(flags, sizeof flags, "--train %s,%s", in_dir("s00.bin"), in_dir("missing.bin"));
    refuse_shard(flags, in_dir("missing.bin"), "found no such file");
    snprintf(flags, sizeof flags, "--train %s --bos 7", in_dir("s00.bin"));
    refuse_shard(flags, in_dir("s00.bin"), "byte 1024 to the end: found no BOS (token 7)");
    snprintf(flags, sizeof flags, "--train %s --seq-len 256 --batch-tokens 256 --micro-batch 1",
             in_dir("s01.bin"));
    CHECK_INT(run("%s %s", train(), flags), EXIT_DATA);
}

// One token of one shard is too large. The steps on the shards before it are made, and no more.
TEST(a_token_out_of_range_ends_the_run_before_its_batch) {
    int order[CLI_SHARDS];
    Log whole, csv;
    train_well("--packing stream --out %s", in_dir("whole"));
    read_log(&whole, in_dir("whole"));
    plain_order(order, CLI_SHARDS, 1337, 0);
    for (int i = 0, rows = 0; i < CLI_SHARDS; i++) {
        int s = order[i], at = shard_tokens[s] - 3;
        char message[256], *text;
        size_t size;
        text = read_text(in_dir("s%02d.bin", s), &size);
        text[1024 + 2 * at] = 1, text[1024 + 2 * at + 1] = 1;
        write_bytes(in_dir("s%02d.bin", s), text, size);
        CHECK_INT(run("%s --packing stream --out %s", train(), in_dir("out")), EXIT_DATA);
        snprintf(message, sizeof message,
                 "s%02d.bin: byte %d: found token 257, expected less than 257", s, 1024 + 2 * at);
        CHECK_SAID(message);
        read_log(&csv, in_dir("out"));
        CHECK_INT(csv.rows, rows / 4);  // steps of 4 rows
        for (int r = 0; r < rows / 4; r++)
            CHECK_STR(csv.cell[r][LOSS_HEX], whole.cell[r][LOSS_HEX]);
        rows += (shard_tokens[s] - 1) / CLI_T;
        CHECK_INT(io_remove(in_dir("out")), 0);
        put_corpus_shard(s, shard_tokens[s]);
        free(text);
    }
    write_shard(in_dir("val.bin"), (const uint16_t[32]){256, 1, 2, 300}, 32);
    char val[600];
    snprintf(val, sizeof val, "--val %s", in_dir("val.bin"));
    refuse_shard(val, in_dir("val.bin"), "byte 1030: found token 300, expected less than 257");
}

TEST(a_damaged_tokenizer_is_named) {
    size_t size;
    char *text = read_text("dev/test/fixtures/tokenizer_subset.bin", &size);
    static const struct {
        size_t cut;
        int flip;
        const char *message;
    } cases[] = {
        {0, 0, "tokenizer.bin, byte 0: found magic"},
        {0, 4, "tokenizer.bin, byte 4: found version"},
        {1, -1, "expected 13"},
        {9000, -1, "found the end"},
        {1 << 20, -1, "byte 0: found the end, expected a header"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_bytes(in_dir("tokenizer.bin"), text, size > cases[i].cut ? size - cases[i].cut : 0);
        if (cases[i].flip >= 0) flip_bit(in_dir("tokenizer.bin"), (size_t)cases[i].flip);
        CHECK_INT(run("%s --tokenizer %s", train(), in_dir("tokenizer.bin")), EXIT_DATA);
        CHECK_SAID(cases[i].message);
        CHECK_INT(count_said("\n"), 1);
    }
    CHECK_INT(run("%s --tokenizer %s", train(), dir), EXIT_DATA);
    CHECK_SAID("it is a folder");
    CHECK_INT(run("%s --tokenizer %s", train(), in_dir("none.bin")), EXIT_DATA);
    CHECK_SAID("none.bin");
    free(text);
}

// ---------------------------------------------------------------------------------------------
// --dump.

typedef struct {
    StFile file;
    Table table;
    int *tokens, *targets;  // (rows, T)
    float *logits;          // (rows * T, V)
    double loss, grad_norm;
    int count;  // rows * T
} DumpFile;

static void dump_open(DumpFile *d, const char *path, int rows, int depth) {
    Flags flags;
    char depth_text[16],
        *argv[] = {"", "--depth", depth_text, "--channels", "32", "--vocab", "257"};
    snprintf(depth_text, sizeof depth_text, "%d", depth);
    flags_parse(&flags, flag, 7, argv);
    Config cfg = config_from_flags(&flags, -1, -1);
    memset(d, 0, sizeof *d);
    table_init(&d->table, &cfg);
    if (st_open(&d->file, path)) die(1, "%s", io_error);
    const StTensor *t;
    d->count = rows * CLI_T;
    d->tokens = (int *)read_tensor(&d->file, "tokens", &t);
    CHECK(t->dtype == ST_I32 && t->ndim == 2 && t->shape[0] == (uint64_t)rows &&
          t->shape[1] == CLI_T);
    d->targets = (int *)read_tensor(&d->file, "targets", &t);
    CHECK(t->dtype == ST_I32 && t->ndim == 2 && t->shape[0] == (uint64_t)rows &&
          t->shape[1] == CLI_T);
    d->logits = (float *)read_tensor(&d->file, "logits", &t);
    CHECK(t->dtype == ST_F32 && t->ndim == 2 && t->shape[0] == (uint64_t)d->count &&
          t->shape[1] == CLI_V);
    double *loss = (double *)read_tensor(&d->file, "loss", &t),
           *norm = (double *)read_tensor(&d->file, "grad_norm", &t);
    CHECK(t->dtype == ST_F64 && t->ndim == 1 && t->shape[0] == 1);
    d->loss = *loss, d->grad_norm = *norm;
    free(loss), free(norm);
}

static void dump_close(DumpFile *d) {
    free(d->tokens), free(d->targets), free(d->logits);
    table_free(&d->table);
    st_close(&d->file);
}

// -log softmax(logits)[target] of token i.
static double nats_of(const DumpFile *d, int i) {
    double sum = 0;
    const float *z = d->logits + i * CLI_V;
    for (int v = 0; v < CLI_V; v++) sum += exp(z[v]);
    return log(sum) - z[d->targets[i]];
}

// kind.name of the dump, whose shape is checked.
static float *dump_tensor(DumpFile *d, const char *kind, const Tensor *x) {
    const StTensor *t;
    char name[80];
    snprintf(name, sizeof name, "%s.%s", kind, x->name);
    float *data = (float *)read_tensor(&d->file, name, &t);
    CHECK(data && t->dtype == ST_F32 && t->ndim == x->ndim &&
          t->shape[t->ndim - 1] == (uint64_t)x->cols);
    CHECK(!data || t->ndim == 1 || t->shape[0] == (uint64_t)x->rows);
    return data;
}

// The dump's tensors of one kind are those of a save.
static void check_dump_equals_save(DumpFile *d, const char *kind, const char *save) {
    StFile f;
    char path[600];
    snprintf(path, sizeof path, "%s/model.safetensors", save);
    if (st_open(&f, path)) die(1, "%s", io_error);
    for (int i = 0; i < d->table.count; i++) {
        const Tensor *x = &d->table.tensor[i];
        float *found = dump_tensor(d, kind, x), *expected = (float *)read_tensor(&f, x->name, NULL);
        bool same = found && expected && !memcmp(found, expected, tensor_numel(x) * sizeof *found);
        test_check(same, __FILE__, __LINE__, "%s.%s differs from %s", kind, x->name, save);
        free(found), free(expected);
    }
    st_close(&f);
}

// Inputs and targets are the tokens of rows, the loss is that of the logits and of the log's row,
// the norm that of the gradients.
static void check_dump(DumpFile *d, const Log *csv, int step) {
    double nats = 0, squares = 0;
    CHECK_INT(d->file.count, 5 + 3 * d->table.count);
    for (int i = 0; i < d->count; i++) {
        CHECK(d->tokens[i] >= 0 && d->tokens[i] < CLI_V && d->targets[i] >= 0 &&
              d->targets[i] < CLI_V);
        if (i % CLI_T == 0) CHECK_INT(d->tokens[i], CLI_BOS);
        if ((i + 1) % CLI_T) CHECK_INT(d->targets[i], d->tokens[i + 1]);
        nats += nats_of(d, i);
    }
    CHECK_NEAR(nats / d->count, d->loss, 1e-6);
    CHECK(d->loss == log_number(csv, step, LOSS_HEX));
    CHECK(d->grad_norm == log_number(csv, step, GRAD_NORM_HEX));
    for (int i = 0; i < d->table.count; i++) {
        float *g = dump_tensor(d, "grad", &d->table.tensor[i]);
        for (size_t e = 0; e < tensor_numel(&d->table.tensor[i]); e++)
            squares += (double)g[e] * g[e];
        free(g);
    }
    CHECK_NEAR(sqrt(squares), d->grad_norm, 1e-9 * d->grad_norm);
}

TEST(a_dump_holds_the_first_step) {
    Log csv;
    DumpFile d;
    const char *flags = "--depth 3 --init test --save-every 1 --keep 20";
    train_well("%s --out %s", flags, in_dir("out"));
    train_well("%s --out %s --dump %s", flags, in_dir("none"), in_dir("dump.safetensors"));
    CHECK_SAID("dump.safetensors: ");
    CHECK(!io_exists(in_dir("none")));
    read_log(&csv, in_dir("out"));
    dump_open(&d, in_dir("dump.safetensors"), 4, 3);
    check_dump(&d, &csv, 0);
    float *params = (float *)die_alloc(d.table.numel, sizeof *params, "parameters");
    table_fill(&d.table, params, 1337, true);
    for (int i = 0; i < d.table.count; i++) {
        const Tensor *x = &d.table.tensor[i];
        float *found = dump_tensor(&d, "param", x);
        CHECK(!memcmp(found, params + x->offset, tensor_numel(x) * sizeof *found));
        free(found);
    }
    check_dump_equals_save(&d, "updated", in_dir("out/ckpt/step_00000001"));
    char text[1024] = "";
    CHECK(st_metadata(&d.file, "flags", text, sizeof text) && strstr(text, "--depth 3"));
    free(params);
    dump_close(&d);
}

TEST(a_dump_of_a_resumed_run_holds_the_next_step) {
    Log csv;
    DumpFile d;
    train_well("--depth 2 --micro-batch 1 --save-every 1 --keep 20 --out %s", in_dir("out"));
    read_log(&csv, in_dir("out"));
    for (int step = 5; step <= 7; step += 2) {
        const char *save = in_dir("out/ckpt/step_%08d", step);
        train_well("--depth 2 --micro-batch 1 --resume %s --dump %s", save, in_dir("dump"));
        dump_open(&d, in_dir("dump"), 4, 2);
        check_dump(&d, &csv, step);
        check_dump_equals_save(&d, "param", save);
        check_dump_equals_save(&d, "updated", in_dir("out/ckpt/step_%08d", step + 1));
        dump_close(&d);
    }
}

TEST(a_dump_of_sketches_holds_those_of_the_dump) {
    StFile whole, sketches;
    train_well("--depth 2 --init test --dump %s", in_dir("whole"));
    train_well("--depth 2 --init test --dump %s --dump-sketch 1", in_dir("sketches"));
    CHECK_INT(st_open(&whole, in_dir("whole")) | st_open(&sketches, in_dir("sketches")), 0);
    CHECK_INT(sketches.count, whole.count);
    for (int i = 0; i < whole.count; i++) {
        const StTensor *t = &whole.tensors[i], *found;
        char name[80];
        snprintf(name, sizeof name, "%s%s", t->dtype == ST_F32 ? "sketch." : "", t->name);
        void *data = read_tensor(&whole, t->name, NULL),
             *other = read_tensor(&sketches, name, &found);
        if (t->dtype != ST_F32) {
            CHECK(other && !memcmp(data, other, (size_t)(t->end - t->begin)));
        } else if (other) {
            double expected[SKETCH_SIZE], *sketch = (double *)other;
            sketch_compute(expected, (float *)data, (size_t)((t->end - t->begin) / sizeof(float)));
            CHECK(found->dtype == ST_F64 && found->ndim == 1 && found->shape[0] == SKETCH_SIZE);
            for (int k = 0; k < SKETCH_SIZE; k++)
                CHECK_NEAR(sketch[k], expected[k], 1e-10 * (1 + fabs(expected[SKETCH_NORM])));
            CHECK(strstr(t->name, "backout") || sketch[SKETCH_NONZERO] > 0);
        }
        free(data), free(other);
    }
    st_close(&whole), st_close(&sketches);
}

// ---------------------------------------------------------------------------------------------
// Validation.

// A shard of 7 rows and a partial one; with BOS every 10th token, or one at the start only.
static void put_val(bool many_bos) {
    uint16_t tokens[7 * CLI_T + 9];
    for (int i = 0; i < 7 * CLI_T + 9; i++)
        tokens[i] = (uint16_t)(i == 0 || (many_bos && i % 10 == 0) ? CLI_BOS : 'a' + i * i % 23);
    write_shard(in_dir("val.bin"), tokens, 7 * CLI_T + 9);
}

TEST(validation_does_not_depend_on_the_micro_batch) {
    char first[2][40] = {"", ""};
    put_val(true);
    for (int rows = 1; rows <= 4; rows *= 2) {
        Log csv;
        train_well("--init test --doc-mask 1 --micro-batch %d --val %s --out %s --steps 1", rows,
                   in_dir("val.bin"), in_dir("out%d", rows));
        read_log(&csv, in_dir("out%d", rows));
        if (rows == 1)
            memcpy(first[0], csv.cell[0][VAL_LOSS], 40), memcpy(first[1], csv.cell[0][VAL_BPB], 40);
        CHECK(*first[0] && *first[1]);
        CHECK_STR(csv.cell[0][VAL_LOSS], first[0]);
        CHECK_STR(csv.cell[0][VAL_BPB], first[1]);
        CHECK_SAID("val loss ");
    }
}

// The same rows as a batch to train on: the dump's logits tell every target's nats.
TEST(validation_is_the_mean_over_the_targets) {
    for (int many_bos = 0; many_bos < 2; many_bos++) {
        Log csv;
        DumpFile d;
        double all = 0, two = 0, text = 0;
        int bytes = 0;
        put_val(many_bos);
        const char *val = in_dir("val.bin");
        train_well(
            "--init test --train %s --packing stream --batch-tokens 112 --micro-batch 7 --dump %s",
            val, in_dir("dump"));
        dump_open(&d, in_dir("dump"), 7, 1);
        for (int i = 0; i < d.count; i++) {
            double nats = nats_of(&d, i);
            all += nats, two += i < 2 * CLI_T ? nats : 0;
            if (d.targets[i] != CLI_BOS) text += nats, bytes++;
        }
        dump_close(&d);
        train_well("--init test --val %s --steps 1 --out %s", val, in_dir("all%d", many_bos));
        read_log(&csv, in_dir("all%d", many_bos));
        CHECK_NEAR(log_number(&csv, 0, VAL_LOSS), all / d.count, 2e-6);
        CHECK_NEAR(log_number(&csv, 0, VAL_BPB), text / bytes / log(2), 2e-6);
        if (!many_bos)
            CHECK_NEAR(log_number(&csv, 0, VAL_BPB), log_number(&csv, 0, VAL_LOSS) / log(2), 2e-6);
        train_well("--init test --val %s --val-tokens 47 --steps 1 --out %s", val,
                   in_dir("two%d", many_bos));
        read_log(&csv, in_dir("two%d", many_bos));
        CHECK_NEAR(log_number(&csv, 0, VAL_LOSS), two / (2 * CLI_T), 2e-6);
    }
}

TEST(validation_comes_when_asked_and_changes_nothing) {
    Log without, with;
    put_val(true);
    train_well("--out %s", in_dir("without"));
    train_well("--out %s --val %s --eval-every 4 --sample-every 1 --sample-tokens 3",
               in_dir("with"), in_dir("val.bin"));
    read_log(&without, in_dir("without"));
    read_log(&with, in_dir("with"));
    for (int i = 0; i <= 12; i++) {
        CHECK_INT(*with.cell[i][VAL_LOSS] != 0, i % 4 == 0);
        CHECK_INT(*without.cell[i][VAL_LOSS] != 0, 0);
        CHECK_STR(with.cell[i][LOSS_HEX], without.cell[i][LOSS_HEX]);
    }
    CHECK_SAME_FILE(in_dir("with/ckpt/step_00000012/model.safetensors"),
                    in_dir("without/ckpt/step_00000012/model.safetensors"));
    Log last, none;
    train_well("--out %s --val %s --eval-every 0", in_dir("last"), in_dir("val.bin"));
    train_well("--out %s --val %s --eval-every 0 --tokenizer none --vocab 257", in_dir("none"),
               in_dir("val.bin"));
    read_log(&last, in_dir("last"));
    read_log(&none, in_dir("none"));
    CHECK(!*last.cell[0][VAL_LOSS] && !*last.cell[4][VAL_LOSS]);
    CHECK_STR(last.cell[12][VAL_LOSS], with.cell[12][VAL_LOSS]);
    CHECK_STR(none.cell[12][VAL_LOSS], with.cell[12][VAL_LOSS]);
    CHECK(*last.cell[12][VAL_BPB] && !*none.cell[12][VAL_BPB]);
}

// ---------------------------------------------------------------------------------------------
// Samples.

// The sample of the trained model in OUT with these flags: the last that it prints.
static const char *sample(int which, const char *flags) {
    static char text[4][2000];
    train_well("--resume %s --sample-tokens 40 %s", in_dir("out/ckpt/step_00000012"), flags);
    const char *begin = strstr(printed, "\nsample: ");
    CHECK(begin != NULL);
    snprintf(text[which], sizeof text[which], "%s", begin ? begin + 9 : "?");
    text[which][strlen(text[which]) - 1] = 0;
    for (const char *p = text[which]; *p; p++)
        CHECK((uint8_t)*p >= 0x20 || *p == '\n' || *p == '\t');
    return text[which];
}

// Bytes of a sample: what is not text stands there as \xNN.
static size_t sample_bytes(const char *text) {
    size_t bytes = 0;
    for (; *text; text += strncmp(text, "\\x", 2) ? 1 : 4) bytes++;
    return bytes;
}

TEST(samples_are_a_function_of_seed_and_flags) {
    train_well("--init test --out %s", in_dir("out"));
    const char *one = sample(0, "--temperature 1 --top-k 0");
    CHECK(strlen(one) > 0);
    CHECK_STR(sample(1, "--temperature 1 --top-k 0"), one);
    CHECK(strcmp(sample(1, "--temperature 1 --top-k 0 --seed 2"), one) != 0);
    CHECK(strcmp(sample(1, "--temperature 0"), one) != 0);
    CHECK_STR(sample(2, "--top-k 1 --temperature 1"), sample(3, "--temperature 0"));
    CHECK_STR(sample(2, "--top-k 1 --seed 3"), sample(3, "--temperature 0"));
    CHECK_STR(sample(2, "--temperature 1e-6 --top-k 0"), sample(3, "--temperature 0"));
}

TEST(samples_go_on_from_the_prompt) {
    train_well("--init test --out %s", in_dir("out"));
    const char *long_prompt = "a prompt that is longer than one row of 16 tokens is";
    char flags[200];
    snprintf(flags, sizeof flags, "--temperature 0 --prompt '%s'", long_prompt);
    const char *text = sample(0, flags);
    CHECK(!strncmp(text, long_prompt, strlen(long_prompt)));
    CHECK_INT(sample_bytes(text), strlen(long_prompt) + 40);
    // The likeliest text is the same however far it goes.
    const char *greedy = sample(2, "--temperature 0 --prompt q");
    snprintf(flags, sizeof flags, "--temperature 0 --prompt q --sample-tokens 4");
    CHECK(!strncmp(greedy, sample(3, flags), strlen(sample(3, flags))));
}

// é is text; a tab, too; what would steer a terminal or is half a character is not.
TEST(samples_print_nothing_but_text) {
    const char *prompt = "a\tb\xc3\xa9\033[2J\x7f\xc2\x9b\xe2\x82";
    CHECK_INT(run("%s --steps 1 --temperature 0 --sample-tokens 1 --prompt '%s' | "
                  "grep -F 'sample: a\tb\xc3\xa9\\x1B[2J\\x7F\\xC2\\x9B\\xE2\\x82'",
                  train(), prompt),
              0);
}

TEST(samples_come_when_asked) {
    train_well("--sample-tokens 5 --sample-every 6");
    CHECK_INT(count_said("sample: "), 3);  // before step 0, at 6 and at the end
    train_well("--sample-tokens 5");
    CHECK_INT(count_said("sample: "), 1);
    train_well("--sample-tokens 0");
    CHECK_INT(count_said("sample: "), 0);
    train_well("--sample-tokens 5 --tokenizer none --vocab 257");
    CHECK_INT(count_said("sample: "), 0);
    CHECK_NOT_SAID("step 12/12");  // a row without a loss
}

// With an empty prompt there is nothing to split.
TEST(gpt2_tokens_need_pcre2_for_a_prompt_alone) {
    const char *flags = "--tokenizer dev/test/fixtures/tokenizer_subset.bin --packing stream "
                        "--steps 1 --sample-tokens 3";
    train_well("%s", flags);
    CHECK_SAID("sample: ");
    int code = run("%s %s --prompt a", train(), flags);
#ifdef USE_PCRE2
    CHECK_INT(code, 0);
#else
    CHECK_INT(code, EXIT_USAGE);
    CHECK_SAID("install libpcre2-dev");
    CHECK_NOT_SAID("step ");
#endif
}

int main(void) {
    cli_prepare();
    RUN_IN_DIR(help_lists_every_flag);
    RUN_IN_DIR(unknown_flags_name_the_nearest);
    RUN_IN_DIR(values_that_cannot_be_are_refused);
    RUN_IN_DIR(values_that_do_not_fit_together_are_refused);
    RUN_IN_DIR(places_that_cannot_be_written_are_found_first);
    RUN_IN_DIR(flags_without_effect_are_warned_of);
    RUN_IN_DIR(dry_run_shows_a_step_once);
    RUN_IN_DIR(flags_come_from_files_too);
    RUN_IN_DIR(dry_run_tells_what_the_flags_resolve_to);
    RUN_IN_DIR(dry_run_prints_flags_that_read_back);
    RUN_IN_DIR(a_run_leaves_its_log_its_facts_and_its_save);
    RUN_IN_DIR(without_out_nothing_is_written);
    RUN_IN_DIR(bad_shards_are_named);
    RUN_IN_DIR(paths_that_are_no_shards_are_named);
    RUN_IN_DIR(a_token_out_of_range_ends_the_run_before_its_batch);
    RUN_IN_DIR(a_damaged_tokenizer_is_named);
    RUN_IN_DIR(a_dump_holds_the_first_step);
    RUN_IN_DIR(a_dump_of_a_resumed_run_holds_the_next_step);
    RUN_IN_DIR(a_dump_of_sketches_holds_those_of_the_dump);
    RUN_IN_DIR(validation_does_not_depend_on_the_micro_batch);
    RUN_IN_DIR(validation_is_the_mean_over_the_targets);
    RUN_IN_DIR(validation_comes_when_asked_and_changes_nothing);
    RUN_IN_DIR(samples_are_a_function_of_seed_and_flags);
    RUN_IN_DIR(samples_go_on_from_the_prompt);
    RUN_IN_DIR(samples_print_nothing_but_text);
    RUN_IN_DIR(samples_come_when_asked);
    RUN_IN_DIR(gpt2_tokens_need_pcre2_for_a_prompt_alone);
    return test_end();
}
