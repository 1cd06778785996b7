// test_diff.c: build/diff says what differs, and nothing else: on trainers, recorded runs, dumps
// and sketches, with the CPU trainer on both sides.
#include "dev/test/cli.h"

// A trainer beside the real one: the same with a flag more.
static const char *changed_trainer(const char *flag) {
    const char *path = in_dir("changed");
    char script[1200];
    snprintf(script, sizeof script, "#!/bin/sh\nexec %s \"$@\" %s\n", program("train_gpt2"), flag);
    write_bytes(path, script, strlen(script));
    chmod(path, 0755);
    return path;
}

// Runs diff; `sides` are paths and its own flags.
static int diff_of(const char *sides, const char *trainer_flags) {
    return run("%s %s -- --train '%s/s0*.bin' %s %s", program("diff"), sides, dir, SMALL,
               trainer_flags);
}

static int diff_programs(const char *other, const char *flags) {
    char sides[1600];
    snprintf(sides, sizeof sides, "%s %s %s", program("train_gpt2"), other, flags);
    return diff_of(sides, "");
}

// ---------------------------------------------------------------------------------------------
// Trainers.

TEST(a_trainer_equals_itself) {
    CHECK_INT(diff_programs(program("train_gpt2"), "--steps 4 --loss-tol 0 --mean-tol 0 "
                                                   "--dump-loss-tol 0 --logits-tol 0 --grad-tol 0 "
                                                   "--updated-tol 0"),
              0);
    CHECK_INT(count_said("           0  ok\n"), 4);
    CHECK_INT(count_said("one step from"), 2);
    CHECK_INT(count_said("parameters after 3 steps from --init test"), 1);
    CHECK_NOT_SAID("TOO FAR");
    CHECK_NOT_SAID("left out");
    CHECK_SAID("go into the step, and are equal");
    CHECK_SAID("\nok: 4 losses and ");
    CHECK_SAID("agree; no difference at all\n");
    CHECK_SAID("tolerances of FP32");
}

TEST(a_changed_learning_rate_is_seen) {
    CHECK_INT(diff_programs(changed_trainer("--lr-matrix 0.03"), "--steps 2 --top 2"), 1);
    CHECK_SAID("layers.0.wq ");
    CHECK_SAID("\nTOO FAR: 0 of 2 losses and ");
    CHECK_SAID(" more, each at most ");
}

TEST(changed_data_are_seen) {
    CHECK_INT(diff_programs(changed_trainer("--packing stream"), "--steps 0 --updates 0"), 1);
    CHECK_SAID("it goes into the step, and must be equal");
    // from --init test: the default init's first losses are ln V, whatever the seed
    char sides[1200];
    snprintf(sides, sizeof sides, "%s %s --steps 3 --dumps 0 --updates 0", program("train_gpt2"),
             changed_trainer("--seed 2"));
    CHECK_INT(diff_of(sides, "--init test"), 1);
    CHECK_SAID("  TOO FAR\n");
    CHECK_SAID("of 3 losses and 0 of 0 tensors; worst: the loss of ");
}

TEST(changed_shapes_are_seen) {
    CHECK_INT(diff_programs(changed_trainer("--vocab 500"), "--steps 0 --updates 0"), 1);
    CHECK_SAID("expected (64, 257)");
    CHECK_SAID("left out: there is no save to resume from");
    CHECK_INT(diff_programs(changed_trainer("--depth 2"), "--steps 0 --updates 0"), 1);
    CHECK_SAID("not in ");
}

TEST(a_run_with_a_longer_plan_is_stopped) {
    CHECK_INT(run("%s %s %s --steps 3 --dumps 0 --updates 0 --keep %s -- --train '%s/s0*.bin' %s "
                  "--steps 5000",
                  program("diff"), program("train_gpt2"), program("train_gpt2"), in_dir("kept"),
                  dir, SMALL),
              0);
    CHECK_SAID("\nok: 3 losses");
    size_t size;
    char *said = read_text(in_dir("kept/a/printed.txt"), &size);
    CHECK(strstr(said, "stopped after step") != NULL);
    free(said);
}

TEST(a_trainer_that_fails_is_quoted) {
    CHECK_INT(diff_programs(changed_trainer("--nonsense"), ""), EXIT_USAGE);
    CHECK_SAID("unknown flag --nonsense");
    CHECK_SAID("ended with exit code 2");
    write_bytes(in_dir("changed"), "#!/bin/sh\nkill -9 $$\n", 21);
    chmod(in_dir("changed"), 0755);
    CHECK_INT(diff_programs(in_dir("changed"), ""), 1);
    CHECK_SAID("ended with signal 9");
}

// Nothing is run but the trainer on the flags that were made.
TEST(no_flags_mean_the_default_model) {
    CHECK_INT(run("%s %s %s --steps 0 --dumps 0 --updates 0 --keep %s", program("diff"),
                  program("train_gpt2"), program("train_gpt2"), in_dir("kept")),
              EXIT_USAGE);
    CHECK_SAID("--depth 4 --channels 256");
    CHECK_INT(run("%s @%s --dry-run 1", program("train_gpt2"), in_dir("kept/flags.txt")), 0);
    CHECK_SAID("vocabulary V 257");
    CHECK(io_exists(in_dir("kept/text_train_000000.bin")));
}

// ---------------------------------------------------------------------------------------------
// Recordings.

TEST(a_recording_stands_for_its_trainer) {
    char sides[1200];
    snprintf(sides, sizeof sides, "%s --keep %s --steps 3", program("train_gpt2"), in_dir("kept"));
    CHECK_INT(diff_of(sides, ""), 0);
    CHECK_SAID("recorded in ");
    // without flags after --: those of the recording
    CHECK_INT(run("%s %s/a %s --steps 3", program("diff"), in_dir("kept"), program("train_gpt2")),
              0);
    CHECK_SAID("\nok: 3 losses and ");
    CHECK_NOT_SAID("left out");
    CHECK_INT(
        run("%s %s/a %s --steps 3", program("diff"), in_dir("kept"), changed_trainer("--seed 5")),
        1);
    CHECK_INT(run("%s %s/a %s/a", program("diff"), in_dir("kept"), in_dir("kept")), 0);
    CHECK_INT(diff_of(sides, ""), EXIT_USAGE);
    CHECK_SAID("--keep: found ");
}

// A plain run has its losses only, here more of them than are asked for.
TEST(a_plain_run_stands_for_its_losses) {
    train_well("--out %s", in_dir("run"));
    CHECK_INT(run("%s %s %s --steps 4", program("diff"), in_dir("run"), program("train_gpt2")), 0);
    CHECK_INT(count_said("           0  ok\n"), 4);
    CHECK_SAID("left out: there is no ");
    train_well("--out %s --seed 3", in_dir("other"));
    CHECK_INT(run("%s %s %s", program("diff"), in_dir("run"), in_dir("other")), 1);
    CHECK_SAID("\nTOO FAR: ");
}

// Its schedule is that of its own steps, however few are compared and whatever they follow from.
TEST(a_recording_keeps_its_plan) {
    static const char *const lengths[] = {"--tokens 832", "--ratio 0.041", "--steps 13"};
    for (int i = 0; i < 3; i++) {
        train_well("--steps 0 %s --lr-matrix 0.2 --val %s --eval-every 4 --out %s", lengths[i],
                   in_dir("s01.bin"), in_dir("run%d", i));
        for (int steps = 4; steps <= 13; steps += 9) {
            CHECK_INT(run("%s %s %s --steps %d --dumps 0 --updates 0", program("diff"),
                          in_dir("run%d", i), program("train_gpt2"), steps),
                      0);
            CHECK_INT(count_said("           0  ok\n"), steps);
            CHECK_INT(count_said("0  ok  validation\n"), steps == 4 ? 2 : 5);
        }
    }
}

TEST(a_run_that_broke_off_is_seen) {
    size_t size;
    train_well("--out %s", in_dir("run"));
    CHECK_INT(io_make_dir(in_dir("cut")), 0);
    char *text = read_text(in_dir("run/log.csv"), &size), *row = strstr(text, "\n5,");
    CHECK(row != NULL);
    if (row) write_bytes(in_dir("cut/log.csv"), text, (size_t)(row + 1 - text));
    free(text);
    CHECK_INT(run("%s %s %s", program("diff"), in_dir("run"), in_dir("cut")), 1);
    CHECK_SAID("the other side has no loss of 7 of the reference's steps, step 5 first  TOO FAR");
    CHECK_SAID(
        "\nTOO FAR: 7 of 12 losses and 0 of 0 tensors; worst: the loss of step 5, see there");
    CHECK_INT(run("%s %s %s --steps 5", program("diff"), in_dir("run"), in_dir("cut")), 0);
    CHECK_INT(run("%s %s %s", program("diff"), in_dir("cut"), in_dir("run")), 0);
    CHECK_SAID("\nok: 5 losses and 0 tensors agree");
}

TEST(validation_losses_are_compared) {
    train_well("--val %s --eval-every 5 --out %s", in_dir("s01.bin"), in_dir("run"));
    CHECK_INT(run("%s %s %s", program("diff"), in_dir("run"), in_dir("run")), 0);
    CHECK_INT(count_said("validation"), 4);
    CHECK_SAID("           0  ok  validation\n");
}

TEST(bad_logs_are_refused) {
    const char *log = in_dir("run/log.csv");
    CHECK_INT(io_make_dir(in_dir("run")), 0);
    write_bytes(log, "a,b\n1,2\n", 8);
    CHECK_INT(run("%s %s %s", program("diff"), in_dir("run"), in_dir("run")), EXIT_DATA);
    CHECK_SAID("found no columns named step and loss");
    write_bytes(log, "", 0);
    CHECK_INT(run("%s %s %s", program("diff"), in_dir("run"), in_dir("run")), EXIT_DATA);
    write_bytes(log, "step,loss\n0,5.5\n1,5.", 20);  // the last row is torn
    CHECK_INT(run("%s %s %s", program("diff"), in_dir("run"), in_dir("run")), 0);
    CHECK_SAID("\nok: 1 loss and 0 tensors agree");
    write_bytes(log, "step,loss\n", 10);
    CHECK_INT(run("%s %s %s", program("diff"), in_dir("run"), in_dir("run")), EXIT_USAGE);
    CHECK_SAID("found nothing that both sides have");
}

// ---------------------------------------------------------------------------------------------
// Dumps.

TEST(dumps_and_sketches_stand_for_each_other) {
    train_well("--init test --dump %s", in_dir("whole.st"));
    train_well("--init test --dump %s --dump-sketch 1", in_dir("sketch.st"));
    train_well("--init test --dump %s --lr-wte 0.9", in_dir("changed.st"));
    train_well("--init test --dump %s --lr-wte 0.9 --dump-sketch 1", in_dir("changed_sketch.st"));
    static const char *const same[] = {"whole.st", "sketch.st"}, *const other[] = {
                                                                     "changed.st",
                                                                     "changed_sketch.st"};
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < 2; k++) {
            CHECK_INT(
                run("%s %s %s", program("diff"), in_dir("%s", same[i]), in_dir("%s", same[k])), 0);
            CHECK_SAID("\nok: 0 losses and ");
            CHECK_INT(
                run("%s %s %s", program("diff"), in_dir("%s", same[i]), in_dir("%s", other[k])), 1);
            CHECK_SAID("worst: updated.wte, ");
        }
    // the trainer with the flags of the dump
    CHECK_INT(run("%s %s %s", program("diff"), in_dir("sketch.st"), program("train_gpt2")), 0);
    CHECK_SAID("--init test");
}

// Copies a dump, with one number of a tensor changed by a factor or, where it is 0, to a value.
static void change_dump(const char *name, size_t at, float factor, float value) {
    StFile f;
    if (st_open(&f, in_dir("dump.st"))) die(1, "%s", io_error);
    StTensor *all = (StTensor *)die_alloc((size_t)f.count, sizeof *all, "tensors");
    for (int i = 0; i < f.count; i++) {
        const StTensor *t = &f.tensors[i];
        float *data = (float *)read_tensor(&f, t->name, NULL);
        if (!strcmp(t->name, name)) data[at] = data[at] * factor + value;
        all[i] = st_tensor(t->name, t->dtype, t->ndim, t->shape, data);
    }
    if (st_write(in_dir("changed.st"), all, f.count, NULL, 0)) die(1, "%s", io_error);
    for (int i = 0; i < f.count; i++) free((void *)all[i].data);
    free(all);
    st_close(&f);
}

static int diff_changed(const char *name, size_t at, float factor, float value) {
    change_dump(name, at, factor, value);
    return run("%s %s %s", program("diff"), in_dir("dump.st"), in_dir("changed.st"));
}

TEST(one_number_in_a_dump_is_seen) {
    train_well("--init test --dump %s", in_dir("dump.st"));
    CHECK_INT(diff_changed("grad.lm_head", 7, 1, 0), 0);
    CHECK_INT(diff_changed("grad.lm_head", 7, 1, NAN), 1);
    CHECK_SAID("found NaN or Inf");
    CHECK_INT(diff_changed("logits", 100, 1, 0.1f), 1);
    CHECK_SAID("worst: logits");
    CHECK_INT(diff_changed("grad.x0_lambda", 0, 1, 0.1f), 1);
    CHECK_SAID("worst: grad.x0_lambda");
    CHECK_INT(diff_changed("param.wte", 5, 1.000001f, 0), 1);
    CHECK_SAID("it goes into the step, and must be equal");
    // exactly 0: a row of padding, however small what is found there
    CHECK_INT(diff_changed("grad.wte", 300 * 32 + 5, 1, 1e-30f), 1);
    CHECK_SAID("at (300, 5): found 1e-30, expected exactly 0");
    flip_bit(in_dir("changed.st"), 100000);
    CHECK_INT(run("%s %s %s", program("diff"), in_dir("dump.st"), in_dir("changed.st")), EXIT_DATA);
    CHECK_SAID("is damaged");
}

// ---------------------------------------------------------------------------------------------
// Usage.

TEST(usage_errors_exit_with_2) {
    CHECK_INT(run("%s --help", program("diff")), 0);
    CHECK_SAID("usage: diff REFERENCE OTHER");
    CHECK_INT(run("%s", program("diff")), EXIT_USAGE);
    CHECK_INT(run("%s %s", program("diff"), program("train_gpt2")), EXIT_USAGE);
    CHECK_SAID("expected a reference and another side (or one, to --keep), found 1");
    CHECK_INT(run("%s nowhere %s", program("diff"), dir), EXIT_USAGE);
    CHECK_SAID("nowhere: found nothing there");
    write_bytes(in_dir("log.csv"), "step,loss\n", 10);
    CHECK_INT(run("%s %s %s", program("diff"), in_dir("log.csv"), dir), EXIT_USAGE);
    CHECK_SAID("log.csv: found a log, expected the run's folder, which holds it");
    CHECK_INT(run("%s %s %s --grad-tolerance 1", program("diff"), dir, dir), EXIT_USAGE);
    CHECK_SAID("did you mean --grad-tol?");
    CHECK_INT(run("%s %s %s --precision fp64", program("diff"), dir, dir), EXIT_USAGE);
    CHECK_INT(run("%s %s %s", program("diff"), dir, dir), EXIT_USAGE);
    CHECK_SAID("found nothing that both sides have");
    CHECK_INT(diff_programs(program("train_gpt2"), "--from nowhere"), EXIT_CHECKPOINT);
}

int main(void) {
    cli_prepare();
    RUN_IN_DIR(a_trainer_equals_itself);
    RUN_IN_DIR(a_changed_learning_rate_is_seen);
    RUN_IN_DIR(changed_data_are_seen);
    RUN_IN_DIR(changed_shapes_are_seen);
    RUN_IN_DIR(a_run_with_a_longer_plan_is_stopped);
    RUN_IN_DIR(a_trainer_that_fails_is_quoted);
    RUN_IN_DIR(no_flags_mean_the_default_model);
    RUN_IN_DIR(a_recording_stands_for_its_trainer);
    RUN_IN_DIR(a_plain_run_stands_for_its_losses);
    RUN_IN_DIR(a_recording_keeps_its_plan);
    RUN_IN_DIR(a_run_that_broke_off_is_seen);
    RUN_IN_DIR(validation_losses_are_compared);
    RUN_IN_DIR(bad_logs_are_refused);
    RUN_IN_DIR(dumps_and_sketches_stand_for_each_other);
    RUN_IN_DIR(one_number_in_a_dump_is_seen);
    RUN_IN_DIR(usage_errors_exit_with_2);
    return test_end();
}
