// test_die.c: llmc/die.h: the line on stderr, the exit codes, memory.
#include "dev/test/test.h"
#include "llmc/die.h"

TEST(die_prints_one_line_and_leaves_with_its_code) {
    DIES(EXIT_DATA, "error: shard 3: found 7, expected 8\n") {
        die(EXIT_DATA, "shard %d: found %d, expected %d", 3, 7, 8);
    }
    DIES(EXIT_PREEMPTED, "error: ") die(EXIT_PREEMPTED, "told to stop");
}

TEST(a_rank_names_itself) {
    DIES(EXIT_COMM, "[rank 5] error: timeout\n") {
        die_rank = 5;
        die(EXIT_COMM, "timeout");
    }
}

TEST(warn_goes_on) {
    DIES(EXIT_OK, "warning: the disk is 99% full\n") warn("the disk is %d%% full", 99);
}

TEST(die_flushes_what_was_printed_before) {
    int pipes[2], status;
    char text[64] = "";
    fflush(stdout);
    CHECK(pipe(pipes) == 0);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(pipes[1], 1), dup2(pipes[1], 2), close(pipes[0]), close(pipes[1]);
        printf("step 1\n");
        die(EXIT_INTERNAL, "step 2");
    }
    close(pipes[1]);
    size_t n = 0;
    for (ssize_t got; (got = read(pipes[0], text + n, sizeof text - 1 - n)) > 0;) n += (size_t)got;
    close(pipes[0]);
    waitpid(pid, &status, 0);
    CHECK_STR(text, "step 1\nerror: step 2\n");
}

TEST(exit_codes_keep_their_numbers) {  // scripts outside depend on them
    const int codes[] = {EXIT_OK,        EXIT_INTERNAL, EXIT_USAGE,  EXIT_DATA,    EXIT_CHECKPOINT,
                         EXIT_NONFINITE, EXIT_COMM,     EXIT_DEVICE, EXIT_DOWNLOAD};
    for (int i = 0; i < 9; i++) CHECK_INT(codes[i], i);
    CHECK_INT(EXIT_PREEMPTED, 75);
}

TEST(memory_is_zero_and_never_null) {
    void *dirty = malloc(4000);
    memset(dirty, 0xff, 4000);
    free(dirty);
    int *p = (int *)die_alloc(1000, sizeof *p, "numbers");
    for (int i = 0; i < 1000; i++) CHECK_INT(p[i], 0);
    free(p);
    void *none = die_alloc(0, 0, "nothing");
    CHECK(none != NULL);
    free(none);
}

// The address sanitizer, in a build with it, must return NULL as any malloc does.
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "allocator_may_return_null=1"; }

TEST(memory_that_cannot_be_had_ends_the_program) {  // the product does not fit a size_t
    volatile size_t count = SIZE_MAX / 8 + 2;
    DIES(EXIT_INTERNAL, "error: out of memory for the moon: ")
    free(die_alloc(count, 8, "the moon"));
}

int main(void) {
    RUN(die_prints_one_line_and_leaves_with_its_code);
    RUN(a_rank_names_itself);
    RUN(warn_goes_on);
    RUN(die_flushes_what_was_printed_before);
    RUN(exit_codes_keep_their_numbers);
    RUN(memory_is_zero_and_never_null);
    RUN(memory_that_cannot_be_had_ends_the_program);
    return test_end();
}
