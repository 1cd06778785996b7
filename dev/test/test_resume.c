// test_resume.c: what a run promises about going on: from any step, in a fresh process, with the
// same bits; from the newest save that is whole, whatever was damaged; with the data it began with;
// and after a death or a full disk at any system call.
//
// The trainer runs as a process, as its user runs it (dev/test/cli.h).
#include "dev/test/cli.h"
#include "llmc/checkpoint.h"  // ckpt_check, ckpt_read_meta, ckpt_write_meta

// ---------------------------------------------------------------------------------------------
// Saves in the test's folder.

static const char *save_of(const char *out, int step) {
    return in_dir("%s/ckpt/step_%08d", out, step);
}

static const char *file_of(const char *out, int step, const char *name) {
    return in_dir("%s/ckpt/step_%08d/%s", out, step, name);
}

// Both tensor files of a step are the same, byte by byte.
static void check_same_save(const char *a, const char *b, int step) {
    CHECK_SAME_FILE(file_of(a, step, "model.safetensors"), file_of(b, step, "model.safetensors"));
    CHECK_SAME_FILE(file_of(a, step, "optim_rank000.safetensors"),
                    file_of(b, step, "optim_rank000.safetensors"));
}

// Where the data of a tensor of a save begin in its file.
static size_t byte_of(const char *path, const char *tensor) {
    StFile f;
    size_t at = 0;
    if (st_open(&f, path)) {
        test_check(false, __FILE__, __LINE__, "%s", io_error);
        return 0;
    }
    if (st_find(&f, tensor)) at = (size_t)(f.data_at + st_find(&f, tensor)->begin);
    st_close(&f);
    return at;
}

// ---------------------------------------------------------------------------------------------
// The same bits.

// A run that saves after every step; then from each of the saves a run of its own, elsewhere.
static void resume_from_every_step(const char *flags) {
    Log whole, rest;
    train_well("%s --out %s --save-every 1 --keep 100", flags, in_dir("whole"));
    read_log(&whole, in_dir("whole"));
    CHECK_INT(whole.rows, CLI_STEPS + 1);
    CHECK_STR(whole.cell[0][EPOCH], "0");
    CHECK(atoi(whole.cell[CLI_STEPS - 1][EPOCH]) > 0);
    for (int step = 1; step <= CLI_STEPS; step++) {
        train_well("%s --out %s --resume %s", flags, in_dir("rest"), save_of("whole", step));
        read_log(&rest, in_dir("rest"));
        check_rows(&rest, &whole, step);
        if (step < CLI_STEPS) check_same_save("rest", "whole", CLI_STEPS);
        CHECK_INT(io_remove(in_dir("rest")), 0);
    }
}

TEST(resume_from_every_step_bestfit) {
    resume_from_every_step("--depth 3 --val-tokens 64 --eval-every 3");
}
TEST(resume_from_every_step_stream) {
    resume_from_every_step("--packing stream --depth 2 --micro-batch 1");
}
TEST(resume_from_every_step_with_doc_mask) {
    resume_from_every_step("--doc-mask 1 --init test --grad-clip 0.5");
}
TEST(resume_from_every_step_with_dropped_tails) {
    resume_from_every_step("--tails drop --micro-batch 4");
}

TEST(an_interrupted_run_reads_as_if_nothing_had_happened) {
    Log whole, again;
    train_well("--out %s", in_dir("whole"));
    train_well("--out %s --save-every 5 --keep 100", in_dir("again"));
    CHECK_INT(io_remove(save_of("again", 12)), 0);
    CHECK_INT(io_remove(save_of("again", 10)), 0);
    CHECK_INT(run("printf '13,8' >> %s", in_dir("again/log.csv")), 0);  // a torn row
    train_well("--out %s --resume auto", in_dir("again"));
    CHECK_SAID("resumed from");
    CHECK_SAID("step_00000005");
    read_log(&whole, in_dir("whole"));
    read_log(&again, in_dir("again"));
    check_rows(&again, &whole, 0);
    check_same_save("again", "whole", 12);
}

TEST(the_same_command_twice_gives_the_same_bits) {
    Log one, two;
    train_well("--depth 3 --out %s", in_dir("one"));
    train_well("--depth 3 --out %s --save-every 1", in_dir("two"));  // saving changes nothing
    read_log(&one, in_dir("one"));
    read_log(&two, in_dir("two"));
    check_rows(&two, &one, 0);
    check_same_save("one", "two", 12);
}

TEST(threads_change_no_bit) {
    Log one, two;
    const char *flags =
        "--depth 3 --channels 64 --heads 2 --seq-len 32 --batch-tokens 128 --doc-mask 1";
    for (int threads = 1; threads <= 2; threads++)
        CHECK_INT(run("OMP_NUM_THREADS=%d %s %s --out %s", threads, train(), flags,
                      in_dir("threads%d", threads)),
                  0);
    read_log(&one, in_dir("threads1"));
    read_log(&two, in_dir("threads2"));
    check_rows(&two, &one, 0);
    check_same_save("threads1", "threads2", 12);
}

TEST(the_batch_may_change) {
    Log csv;
    train_well("--steps 6 --out %s", in_dir("out"));
    train_well("--steps 9 --out %s --resume auto --batch-tokens 128 --micro-batch 4",
               in_dir("out"));
    read_log(&csv, in_dir("out"));
    CHECK_INT(csv.rows, 10);
    CHECK_STR(csv.cell[6][TOKENS], "384");
    CHECK_STR(csv.cell[7][TOKENS], "512");
    CHECK_STR(csv.cell[9][TOKENS], "768");
}

// ---------------------------------------------------------------------------------------------
// Which save.

TEST(auto_without_a_save_starts_anew) {
    Log fresh, automatic;
    train_well("--out %s", in_dir("fresh"));
    train_well("--out %s --resume auto", in_dir("automatic"));
    CHECK_NOT_SAID("resumed");
    read_log(&fresh, in_dir("fresh"));
    read_log(&automatic, in_dir("automatic"));
    check_rows(&automatic, &fresh, 0);
    CHECK_INT(run("%s --resume auto", train()), EXIT_USAGE);
    CHECK_SAID("--out");
}

TEST(a_run_that_is_done_does_nothing_more) {
    train_well("--out %s", in_dir("out"));
    CHECK_INT(run("cp %s %s", file_of("out", 12, "meta.json"), in_dir("meta.json")), 0);
    train_well("--out %s --resume auto", in_dir("out"));
    CHECK_SAME_FILE(file_of("out", 12, "meta.json"), in_dir("meta.json"));
    CHECK_INT(run("%s --out %s --resume auto --steps 11", train(), in_dir("out")), EXIT_USAGE);
    CHECK_SAID("found 12 steps done, expected at most --steps 11");
}

TEST(a_flipped_bit_in_the_newest_save_costs_one_warning) {
    train_well("--out %s", in_dir("whole"));
    static const char *files[] = {"model.safetensors", "optim_rank000.safetensors", "meta.json"};
    for (int i = 0; i < 3; i++) {
        train_well("--out %s --save-every 4 --keep 3", in_dir("out"));
        const char *path = file_of("out", 12, files[i]);
        flip_bit(path, i == 0   ? byte_of(path, "lm_head")
                       : i == 1 ? byte_of(path, "layers.0.wq.first")
                                : 200);
        train_well("--out %s --resume auto", in_dir("out"));
        CHECK_INT(count_said("warning: "), 1);
        CHECK_SAID(i == 0   ? "tensor lm_head is damaged"
                   : i == 1 ? "tensor layers.0.wq.first is damaged"
                            : "meta.json");
        CHECK_SAID("step_00000008: 8 steps, 512 tokens");
        check_same_save("out", "whole", 12);  // and the damaged save has a whole one in its place
        CHECK_INT(io_remove(in_dir("out")), 0);
    }
}

TEST(only_damaged_saves_are_no_fresh_start) {
    train_well("--out %s --save-every 6", in_dir("out"));
    for (int step = 6; step <= 12; step += 6)
        CHECK_INT(truncate(file_of("out", step, "optim_rank000.safetensors"), 1000), 0);
    CHECK_INT(run("%s --out %s --resume auto", train(), in_dir("out")), EXIT_CHECKPOINT);
    CHECK_SAID("/ckpt: found 2 saves, none of them whole");
}

// A save named by --resume, with `bytes` of a file left or a bit of a tensor inverted, is refused.
static void refuse_damage(const char *file, const char *tensor, long bytes, const char *message) {
    const char *path = file_of("out", 12, file);
    train_well("--out %s", in_dir("out"));
    if (tensor)
        flip_bit(path, byte_of(path, tensor));
    else
        CHECK_INT(truncate(path, bytes), 0);
    CHECK_INT(run("%s --resume %s", train(), save_of("out", 12)), EXIT_CHECKPOINT);
    CHECK_SAID("cannot resume from");
    CHECK_SAID(path);
    CHECK_SAID(message);
    CHECK_INT(io_remove(in_dir("out")), 0);
}

TEST(a_damaged_save_that_is_named_ends_the_run) {
    static const char *model = "model.safetensors", *optim = "optim_rank000.safetensors";
    refuse_damage(model, "layers.0.wfc", 0, "tensor layers.0.wfc is damaged: found CRC-32C");
    refuse_damage(model, "smear_lambda", 0, "tensor smear_lambda is damaged");
    refuse_damage(optim, "wte.second", 0, "tensor wte.second is damaged");
    refuse_damage(model, NULL, 150000, "cut short");
    refuse_damage(optim, NULL, 20, "cut short");
    refuse_damage(optim, NULL, 0, "too few");
    refuse_damage("meta.json", NULL, 100, "damaged");
    train_well("--out %s", in_dir("out"));
    flip_bit(file_of("out", 12, model), 100);
    CHECK_INT(run("%s --resume %s", train(), save_of("out", 12)), EXIT_CHECKPOINT);
    CHECK_SAID("header");
    CHECK_INT(io_remove(file_of("out", 12, optim)), 0);
    CHECK_INT(run("%s --resume %s", train(), save_of("out", 12)), EXIT_CHECKPOINT);
    CHECK_INT(run("%s --resume %s", train(), in_dir("nowhere")), EXIT_CHECKPOINT);
    CHECK_SAID("nowhere/meta.json");
}

TEST(another_shape_is_refused_with_both) {
    train_well("--depth 2 --out %s --steps 1", in_dir("out"));
    const char *save = save_of("out", 1);
    CHECK_INT(run("%s --depth 2 --channels 48 --resume %s", train(), save), EXIT_CHECKPOINT);
    CHECK_SAID("model.safetensors: tensor wte: found F32 (384, 32), expected F32 (384, 48)");
    CHECK_SAID("--depth 2 --channels 32");  // the save's flags
    CHECK_INT(run("%s --depth 4 --resume %s", train(), save), EXIT_CHECKPOINT);
    CHECK_SAID("layers.2.wq is missing");
    CHECK_INT(run("%s --depth 1 --resume %s", train(), save), EXIT_CHECKPOINT);
    CHECK_SAID("layers.0.ve_gate is missing");
    CHECK_INT(run("%s --depth 2 --heads 2 --resume %s", train(), save), EXIT_CHECKPOINT);
    CHECK_SAID("layers.1.ve_gate: found F32 (1, 12), expected F32 (2, 12)");
}

TEST(saves_of_other_steps_are_kept_as_asked) {
    train_well("--out %s --save-every 2 --keep 3", in_dir("three"));
    CHECK_STR(listing(in_dir("three/ckpt")), "step_00000008 step_00000010 step_00000012");
    train_well("--out %s --save-every 1 --keep 1 --keep-every 5", in_dir("fifths"));
    CHECK_STR(listing(in_dir("fifths/ckpt")), "step_00000005 step_00000010 step_00000012");
    train_well("--out %s", in_dir("last"));
    CHECK_STR(listing(in_dir("last/ckpt")), "step_00000012");
}

TEST(a_run_does_not_mix_its_saves_with_those_of_another) {
    train_well("--out %s --save-every 4 --keep 5", in_dir("out"));
    CHECK_INT(run("%s --out %s --seed 2", train(), in_dir("out")), EXIT_USAGE);
    CHECK_SAID("step_00000012");
    CHECK_INT(run("%s --out %s --resume %s", train(), in_dir("out"), save_of("out", 4)),
              EXIT_USAGE);
    CHECK_SAID("step_00000012");
    Log csv;
    read_log(&csv, in_dir("out"));
    CHECK_INT(csv.rows, 13);
    train_well("--out %s --resume %s --steps 13", in_dir("out"), save_of("out", 12));
}

// The lock of a run ends with its process.
TEST(two_processes_do_not_share_a_folder) {
    train_well("--out %s --steps 6", in_dir("out"));
    CHECK_INT(run("cp %s %s", in_dir("out/log.csv"), in_dir("log.csv")), 0);
    CHECK_INT(run("exec 9>>%s && flock -n 9 && %s --out %s --resume auto 9>&-", in_dir("out/lock"),
                  train(), in_dir("out")),
              EXIT_USAGE);
    CHECK_SAID(": another process is running there; stop it, or choose another folder");
    CHECK_SAME_FILE(in_dir("out/log.csv"), in_dir("log.csv"));
    train_well("--out %s --resume auto", in_dir("out"));
}

TEST(changed_flags_are_named) {
    train_well("--out %s --steps 6 --save-every 2", in_dir("out"));
    train_well("--out %s --resume auto --seed 2 --lr-matrix 0.1 --keep 5", in_dir("out"));
    CHECK_INT(count_said("warning: "), 1);
    CHECK_SAID("warning: --resume goes on with other flags than the save's: --steps 12 (was 6), "
               "--lr-matrix 0.1 (was 0.02), --seed 2 (was 1337): the order of the data stays the "
               "save's\n");
    CHECK_INT(run("mkdir %s && mv %s/s0*.bin %s", in_dir("moved"), dir, in_dir("moved")), 0);
    train_well("--train '%s/*.bin' --out %s --resume auto --seed 2 --lr-matrix 0.1",
               in_dir("moved"), in_dir("out"));
    CHECK_NOT_SAID("warning: ");
}

// ---------------------------------------------------------------------------------------------
// The data of the save.

static void refuse_data(const char *message) {
    CHECK_INT(run("%s --out %s --resume auto", train(), in_dir("out")), EXIT_DATA);
    CHECK_SAID("the data is not the checkpoint's");
    CHECK_SAID(message);
    for (int s = 0; s < CLI_SHARDS; s++) put_corpus_shard(s, shard_tokens[s]);
}

TEST(other_data_than_the_saves_is_named) {
    train_well("--steps 6 --out %s", in_dir("out"));
    CHECK_INT(run("cp %s %s", in_dir("out/log.csv"), in_dir("log.csv")), 0);
    CHECK_INT(rename(in_dir("s01.bin"), in_dir("s01b.bin")), 0);
    refuse_data("found 's01b.bin 90 ");
    CHECK_INT(io_remove(in_dir("s01b.bin")), 0);
    put_corpus_shard(1, 91);
    refuse_data("found 's01.bin 91 ");
    put_corpus_shard(3, 50);
    refuse_data("found 's03.bin 50 ");
    CHECK_INT(io_remove(in_dir("s03.bin")), 0);
    CHECK_INT(io_remove(in_dir("s02.bin")), 0);
    refuse_data("expected 's02.bin 131 ");
    CHECK_INT(run("cd %s && mv s00.bin t && mv s01.bin s00.bin && mv t s01.bin", dir),
              0);  // reordered
    refuse_data("found 's00.bin 90 ");
    flip_bit(in_dir("s02.bin"), 1024 + 2 * 60);  // one token is another
    refuse_data("found 's02.bin 131 ");
    CHECK_INT(run("%s --out %s --resume auto --packing stream", train(), in_dir("out")), EXIT_DATA);
    CHECK_SAID("packing: found ");
    CHECK_INT(run("%s --out %s --resume auto --seq-len 32", train(), in_dir("out")), EXIT_DATA);
    CHECK_SAID("packing: found 'T 32 ");
    CHECK_SAME_FILE(in_dir("out/log.csv"), in_dir("log.csv"));  // nothing was touched
    CHECK_INT(run("mkdir %s && mv %s/s0*.bin %s", in_dir("moved"), dir, in_dir("moved")), 0);
    train_well("--train '%s/*.bin' --out %s --resume auto", in_dir("moved"), in_dir("out"));
}

// ---------------------------------------------------------------------------------------------
// Not a number.

// Gives the elements first .. end-1 of a tensor of a save one value, and seals the save again.
static void fill_elements(const char *save, const char *name, uint64_t first, uint64_t end,
                          double value) {
    StFile f;
    StTensor tensors[64];
    CkptMeta meta;
    char path[IO_PATH_MAX];
    ckpt_join(path, save, "model.safetensors");
    if (st_open(&f, path) || ckpt_read_meta(save, &meta)) die(1, "%s", io_error);
    for (int i = 0; i < f.count; i++) {
        const StTensor *t;
        float *x = (float *)read_tensor(&f, f.tensors[i].name, &t);
        uint64_t count = (t->end - t->begin) / sizeof *x;
        for (uint64_t e = first; !strcmp(t->name, name) && e < end && e < count; e++)
            x[e] = (float)value;
        tensors[i] = st_tensor(t->name, t->dtype, t->ndim, t->shape, x);
    }
    CHECK(st_find(&f, name) != NULL);
    if (st_write(path, tensors, f.count, NULL, 0) || ckpt_write_meta(&meta, save))
        die(1, "%s", io_error);
    for (int i = 0; i < f.count; i++) free((void *)tensors[i].data);
    st_close(&f), ckpt_meta_free(&meta);
}

static void fill_tensor(const char *save, const char *name, double value) {
    fill_elements(save, name, 0, UINT64_MAX, value);
}

// What is saved is finite, and the run can go on from it.
static void check_saves_are_finite(const char *out, int steps) {
    for (int step = 1; step <= steps; step++) {
        StFile f;
        if (!io_exists(save_of(out, step))) continue;
        CHECK_INT(ckpt_check(save_of(out, step), true), 0);
        if (st_open(&f, file_of(out, step, "model.safetensors"))) continue;
        for (int i = 0; i < f.count; i++) {
            const StTensor *t;
            float *x = (float *)read_tensor(&f, f.tensors[i].name, &t);
            uint64_t bad = 0;
            for (uint64_t e = 0; e < (t->end - t->begin) / sizeof *x; e++) bad += !isfinite(x[e]);
            test_check(bad == 0, __FILE__, __LINE__,
                       "step %d: %s has %d numbers that are not finite", step, t->name, (int)bad);
            free(x);
        }
        st_close(&f);
    }
}

// Matrices that each step multiplies by -500,000 soon overflow.
TEST(a_run_that_diverges_ends_before_it_saves_what_is_not_finite) {
    int code =
        run("%s --out %s --save-every 1 --keep 100 --lr-matrix 1000 --wd-matrix 1000 --steps 30",
            train(), in_dir("out"));
    CHECK_INT(code, EXIT_NONFINITE);
    CHECK_SAID("error: step ");
    CHECK_INT(count_said("error: "), 1);
    CHECK(strlen(listing(in_dir("out/ckpt"))) > 0);
    check_saves_are_finite("out", 30);
}

// Made so that the loss is finite and a gradient is not: a smear so large that the stream is near
// the largest float, and mixed down to nearly nothing, where N's backward multiplies by 2900.
TEST(a_gradient_that_is_not_finite_is_named) {
    Log csv;
    train_well("--out %s --steps 1 --lr-lm-head 100", in_dir("out"));
    fill_tensor(save_of("out", 1), "smear_lambda", 1e37);
    fill_tensor(save_of("out", 1), "resid_lambda", 0);
    fill_tensor(save_of("out", 1), "x0_lambda", 1e-41);
    CHECK_INT(run("%s --out %s --resume auto --save-every 1", train(), in_dir("out")),
              EXIT_NONFINITE);
    CHECK_SAID("error: step 1: found loss ");
    CHECK_NOT_SAID("found loss nan");
    CHECK_SAID("gradient norm inf, first in resid_lambda; the step's rows begin in ");
    CHECK_STR(listing(in_dir("out/ckpt")), "step_00000001");
    read_log(&csv, in_dir("out"));
    CHECK_INT(csv.rows, 1);
}

// v = 0 before a wo so large that the gradient of attention overflows, and with it all that
// backward makes after it: of layer 1 wq, wk and wv, of layer 0 and the embedding everything. (The
// head's gradient, wo's and the MLP's are finite.)
TEST(the_first_bad_gradient_is_the_one_that_backward_makes_first) {
    const char *flags = "--depth 2 --lr-lm-head 100";
    train_well("%s --out %s --steps 1", flags, in_dir("out"));
    fill_tensor(save_of("out", 1), "layers.1.wv", 0);
    fill_tensor(save_of("out", 1), "layers.1.value_embed", 0);
    fill_tensor(save_of("out", 1), "layers.1.wo", 3e38);
    CHECK_INT(run("%s %s --out %s --resume auto", train(), flags, in_dir("out")), EXIT_NONFINITE);
    CHECK_NOT_SAID("found loss nan");
    CHECK_SAID(", first in layers.1.wv; the step's rows begin in ");
}

// Row r of stream is tokens 16 r .. 16 r + 16. A z stands in row 6 alone, which is row 2 of step 1;
// its embedding is not a number.
TEST(a_row_whose_loss_is_not_finite_is_named) {
    uint16_t tokens[200];
    char flags[700];
    for (int i = 0; i < 200; i++) tokens[i] = (uint16_t)(i == 101 ? 'z' : i ? 'a' + i % 7 : 256);
    write_shard(in_dir("z.bin"), tokens, 200);
    for (int micro_batch = 1; micro_batch <= 4; micro_batch *= 2) {
        snprintf(flags, sizeof flags, "--train %s --packing stream --micro-batch %d --out %s",
                 in_dir("z.bin"), micro_batch, in_dir("out"));
        train_well("%s --steps 1", flags);
        fill_elements(save_of("out", 1), "wte", 'z' * 32 + 7, 'z' * 32 + 8, NAN);
        CHECK_INT(run("%s %s --resume auto --save-every 1", train(), flags), EXIT_NONFINITE);
        CHECK_SAID("error: step 1: found loss nan and gradient norm ");
        CHECK_SAID(", first in the loss; row 2 of the step begins in ");
        CHECK_SAID("/z.bin at token 96; the weights are as before the step, where the first that "
                   "is not finite is wte\n");
        CHECK_INT(count_said("error: "), 1);
        CHECK_STR(listing(in_dir("out/ckpt")), "step_00000001");
        CHECK_INT(io_remove(in_dir("out")), 0);
    }
}

// ---------------------------------------------------------------------------------------------
// Deaths and full disks.

#define SHORT "--steps 3 --save-every 1 --keep 1"

// Which calls: each 7th takes 6 seconds, so every one is for EVERY_CALL=1.
static int stride(void) {
#ifdef __SANITIZE_ADDRESS__
    return 29;  // processes start slowly
#endif
    return getenv("EVERY_CALL") ? 1 : 7;
}

// Goes on after a run that ended early: it must load a save, or start anew, and reach the same end.
static void check_goes_on(const char *out, const char *reference) {
    int code = run("%s " SHORT " --out %s --resume auto", train(), in_dir("%s", out));
    test_check(code == 0 && count_said("warning: ") == 0, __FILE__, __LINE__,
               "exit code %d; it said: %s", code, printed);
    check_same_save(out, reference, 3);
}

static int calls;  // of a short run; the loader's thread makes it a few more or less

TEST(a_run_killed_at_any_call_goes_on_to_the_same_end) {
    Log expected, csv;
    train_well(SHORT " --out %s", in_dir("whole"));
    read_log(&expected, in_dir("whole"));
    for (calls = 1;; calls += stride()) {
        int code = run("IO_FAULT=exit:%d %s " SHORT " --out %s", calls, train_with_faults(),
                       in_dir("out"));
        if (code == 0) break;
        CHECK_INT(code, 42);  // IO_FAULT_EXIT_CODE
        check_goes_on("out", "whole");
        read_log(&csv, in_dir("out"));
        check_rows(&csv, &expected, 0);
        CHECK_INT(io_remove(in_dir("out")), 0);
    }
    CHECK(calls > 200);
}

TEST(a_run_with_a_full_disk_at_any_call_goes_on_to_the_same_end) {
    int lost = 0, ended = 0;
    train_well(SHORT " --out %s", in_dir("whole"));
    for (int at = 1; at < calls; at += stride()) {
        int code =
            run("IO_FAULT=enospc:%d %s " SHORT " --out %s", at, train_with_faults(), in_dir("out"));
        if (code) CHECK(count_said("error: ") == 1 && count_said("No space left on device"));
        CHECK(code == 0 || code == EXIT_DATA || code == EXIT_CHECKPOINT ||
              (code == EXIT_USAGE && count_said("--out: ")));
        lost += count_said("is not saved: "), ended += code != 0;
        check_goes_on("out", "whole");
        CHECK_INT(io_remove(in_dir("out")), 0);
    }
    CHECK(lost > 3);
    CHECK(ended > 0);
}

// Every write beyond the first 64 blocks of a file fails, as on a disk that stays full.
TEST(a_disk_that_stays_full_does_not_stop_training) {
    Log whole, csv;
    train_well("--out %s", in_dir("whole"));
    train_well("--out %s --save-every 4 --keep 3", in_dir("out"));
    CHECK_INT(io_remove(save_of("out", 12)) || io_remove(save_of("out", 8)), 0);
    int code = run("(trap '' XFSZ; ulimit -f 64; exec %s --out %s --resume auto --save-every 2)",
                   train(), in_dir("out"));
    CHECK_INT(count_said("is not saved: "), 4);  // after steps 6, 8, 10, 12
    CHECK_INT(code, EXIT_CHECKPOINT);            // the last of them is an error
    CHECK_STR(listing(in_dir("out/ckpt")), "step_00000004");
    read_log(&whole, in_dir("whole"));
    read_log(&csv, in_dir("out"));
    check_rows(&csv, &whole, 0);
    train_well("--out %s --resume auto", in_dir("out"));
    CHECK_SAID("step_00000004");
    check_same_save("out", "whole", 12);
}

int main(void) {
    cli_prepare();
    RUN_IN_DIR(resume_from_every_step_bestfit);
    RUN_IN_DIR(resume_from_every_step_stream);
    RUN_IN_DIR(resume_from_every_step_with_doc_mask);
    RUN_IN_DIR(resume_from_every_step_with_dropped_tails);
    RUN_IN_DIR(an_interrupted_run_reads_as_if_nothing_had_happened);
    RUN_IN_DIR(the_same_command_twice_gives_the_same_bits);
    RUN_IN_DIR(threads_change_no_bit);
    RUN_IN_DIR(the_batch_may_change);
    RUN_IN_DIR(auto_without_a_save_starts_anew);
    RUN_IN_DIR(a_run_that_is_done_does_nothing_more);
    RUN_IN_DIR(a_flipped_bit_in_the_newest_save_costs_one_warning);
    RUN_IN_DIR(only_damaged_saves_are_no_fresh_start);
    RUN_IN_DIR(a_damaged_save_that_is_named_ends_the_run);
    RUN_IN_DIR(another_shape_is_refused_with_both);
    RUN_IN_DIR(saves_of_other_steps_are_kept_as_asked);
    RUN_IN_DIR(a_run_does_not_mix_its_saves_with_those_of_another);
    RUN_IN_DIR(two_processes_do_not_share_a_folder);
    RUN_IN_DIR(changed_flags_are_named);
    RUN_IN_DIR(other_data_than_the_saves_is_named);
    RUN_IN_DIR(a_run_that_diverges_ends_before_it_saves_what_is_not_finite);
    RUN_IN_DIR(a_gradient_that_is_not_finite_is_named);
    RUN_IN_DIR(the_first_bad_gradient_is_the_one_that_backward_makes_first);
    RUN_IN_DIR(a_row_whose_loss_is_not_finite_is_named);
    RUN_IN_DIR(a_run_killed_at_any_call_goes_on_to_the_same_end);
    RUN_IN_DIR(a_run_with_a_full_disk_at_any_call_goes_on_to_the_same_end);
    RUN_IN_DIR(a_disk_that_stays_full_does_not_stop_training);
    return test_end();
}
