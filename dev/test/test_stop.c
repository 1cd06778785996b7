// test_stop.c: a run that is told to stop or to save (llmc/stop.h), by signals and by files: it
// ends where it should, says what is saved, and goes on with the same bits.
//
// The trainer runs as a process, as its user runs it (dev/test/cli.h).
#include "dev/test/cli.h"
#include "llmc/checkpoint.h"  // ckpt_check
#include "llmc/stop.h"        // stop_poll

// Steps long enough for a signal to come between the first and the last.
#define LONGER "--depth 2 --channels 64 --heads 2 --seq-len 64 --batch-tokens 512 --steps 40 "

// Runs the small run with these flags in the background; when it has printed `sign`, runs the shell
// commands `then`, where $p is its process. Returns its exit code.
static int signalled(const char *flags, const char *sign, const char *then) {
    return run("f=%s; %s %s > $f 2>&1 & p=$!; until grep -q '%s' $f; do sleep 0.01; done; %s; "
               "wait $p; code=$?; cat $f; exit $code",
               in_dir("said"), train(), flags, sign, then);
}

static void touch(const char *path) {
    CHECK_INT(io_make_dir(in_dir("out")), 0);
    CHECK_INT(io_write_file(path, "", 0), 0);
}

// Goes on in `out`, to the same end as the run in `whole`.
static void check_goes_on(const char *flags) {
    Log whole, csv;
    char path[64];
    train_well("%s --out %s --resume auto", flags, in_dir("out"));
    CHECK_SAID("resumed from");
    read_log(&whole, in_dir("whole"));
    read_log(&csv, in_dir("out"));
    check_rows(&csv, &whole, 0);
    snprintf(path, sizeof path, "ckpt/%.50s", listing(in_dir("whole/ckpt")));
    CHECK_SAME_FILE(in_dir("out/%s/model.safetensors", path),
                    in_dir("whole/%s/model.safetensors", path));
    CHECK_SAME_FILE(in_dir("out/%s/optim_rank000.safetensors", path),
                    in_dir("whole/%s/optim_rank000.safetensors", path));
}

TEST(files_ask_once) {
    const char *out = in_dir("out");
    CHECK_INT(stop_poll(out), STOP_NO);  // no folder
    touch(in_dir("out/SAVE"));
    CHECK_INT(stop_poll(""), STOP_NO);
    CHECK_INT(stop_poll(out), STOP_SAVE);
    CHECK_INT(stop_poll(out), STOP_NO);
    touch(in_dir("out/STOP"));
    CHECK_INT(stop_poll(out), STOP_END);
    CHECK_INT(stop_poll(out), STOP_NO);
    touch(in_dir("out/STOP")), touch(in_dir("out/SAVE"));
    CHECK_INT(stop_poll(out), STOP_END);
    CHECK_STR(listing(out), "");
}

TEST(the_file_stop_saves_and_ends) {
    train_well("--out %s", in_dir("whole"));
    touch(in_dir("out/STOP"));
    CHECK_INT(run("%s --out %s", train(), in_dir("out")), EXIT_PREEMPTED);
    CHECK_SAID("stopped after step 1, as asked; it is saved, and --resume auto goes on from it");
    CHECK_STR(listing(in_dir("out")), "ckpt lock log.csv run.json");
    CHECK_STR(listing(in_dir("out/ckpt")), "step_00000001");
    check_goes_on("");
}

TEST(the_file_save_saves_and_goes_on) {
    train_well("--out %s", in_dir("whole"));
    touch(in_dir("out/SAVE"));
    train_well("--out %s", in_dir("out"));
    CHECK_INT(count_said("saved step 1, as asked"), 1);
    CHECK_STR(listing(in_dir("out")), "ckpt lock log.csv run.json");
    CHECK_STR(listing(in_dir("out/ckpt")), "step_00000001 step_00000012");
    CHECK_INT(io_remove(in_dir("out/ckpt/step_00000012")), 0);
    check_goes_on("");
}

TEST(signals_save_and_end) {
    static const char *names[] = {"TERM", "USR1"};
    train_well(LONGER "--out %s", in_dir("whole"));
    for (int i = 0; i < 2; i++) {
        char flags[700], then[20];
        snprintf(flags, sizeof flags, LONGER "--out %s", in_dir("out"));
        snprintf(then, sizeof then, "kill -%s $p", names[i]);
        CHECK_INT(signalled(flags, "first step ", then), EXIT_PREEMPTED);
        CHECK_INT(count_said("stopped after step "), 1);
        CHECK_NOT_SAID("error: ");
        CHECK(atoi(strstr(printed, "stopped after step ") + 19) < 40);
        check_goes_on(LONGER);
        CHECK_INT(io_remove(in_dir("out")), 0);
    }
}

TEST(without_out_a_signal_ends_the_run_and_says_that_nothing_is_saved) {
    CHECK_INT(signalled(LONGER, "first step ", "kill $p"), EXIT_PREEMPTED);
    CHECK_SAID("as asked; nothing is saved, since there is no --out to go on from");
}

// A step of some seconds; the second signal does not wait for its end.
TEST(the_same_signal_again_ends_the_run_at_once) {
    char flags[700];
    snprintf(flags, sizeof flags,
             "--depth 2 --channels 128 --seq-len 256 --batch-tokens 65536 --out %s", in_dir("out"));
    CHECK_INT(signalled(flags, "matrix parameters",
                        "kill $p; sleep 0.1; kill -USR1 $p; sleep 0.1; kill $p"),
              EXIT_PREEMPTED);
    CHECK_SAID("error: told to stop by the same signal for the second time: ended at once");
    CHECK_NOT_SAID("loss");
    CHECK_STR(listing(in_dir("out")), "lock log.csv run.json");
}

// As Slurm does it. The second signal comes in the middle of the save, which is of 75 MB: its
// folder is there, and not yet renamed.
TEST(another_signal_lets_the_save_be_finished) {
    static const char *order[][2] = {{"USR1", "TERM"}, {"TERM", "USR1"}};
    for (int i = 0; i < 2; i++) {
        char flags[700], then[700];
        snprintf(flags, sizeof flags, "--vocab 65000 --steps 1000 --out %s", in_dir("out"));
        snprintf(then, sizeof then,
                 "kill -%s $p; until [ \"$(ls -A %s)\" ]; do :; done; kill -%s $p; ls %s",
                 order[i][0], in_dir("out/ckpt"), order[i][1], in_dir("out/ckpt"));
        CHECK_INT(signalled(flags, "first step ", then), EXIT_PREEMPTED);
        CHECK_SAID(".tmp");
        CHECK_NOT_SAID("error: ");
        CHECK_INT(count_said("it is saved, and --resume auto goes on from it"), 1);
        CHECK_INT(ckpt_check(in_dir("out/ckpt/%s", listing(in_dir("out/ckpt"))), true), 0);
        CHECK_INT(io_remove(in_dir("out")), 0);
    }
}

TEST(a_stop_that_cannot_save_is_an_error) {
    touch(in_dir("out/STOP"));
    int code = run("(trap '' XFSZ; ulimit -f 64; exec %s --out %s)", train(), in_dir("out"));
    CHECK_INT(code, EXIT_CHECKPOINT);
    CHECK_SAID("warning: step 1 is not saved: ");
    CHECK_INT(count_said("error: "), 1);
}

int main(void) {
    cli_prepare();
    RUN_IN_DIR(files_ask_once);
    RUN_IN_DIR(the_file_stop_saves_and_ends);
    RUN_IN_DIR(the_file_save_saves_and_goes_on);
    RUN_IN_DIR(signals_save_and_end);
    RUN_IN_DIR(without_out_a_signal_ends_the_run_and_says_that_nothing_is_saved);
    RUN_IN_DIR(the_same_signal_again_ends_the_run_at_once);
    RUN_IN_DIR(another_signal_lets_the_save_be_finished);
    RUN_IN_DIR(a_stop_that_cannot_save_is_an_error);
    return test_end();
}
