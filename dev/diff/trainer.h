// trainer.h: runs a trainer as a process of its own and follows what it prints.
#ifndef DEV_DIFF_TRAINER_H
#define DEV_DIFF_TRAINER_H

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "llmc/checkpoint.h"  // ckpt_join
#include "llmc/die.h"         // die, EXIT_PREEMPTED
#include "llmc/io.h"          // io_make_dir

enum { TRAINER_LAST = 6 };  // lines shown of a trainer that failed

// Copies what a trainer prints to a file, and its step to a terminal; keeps the last lines. After
// stop_after steps (0: never) tells it to stop.
static inline void trainer_follow(const char *program, pid_t pid, int64_t stop_after, FILE *from,
                                  FILE *to, char *last[TRAINER_LAST]) {
    char *line = NULL;
    size_t room = 0;
    int64_t steps = 0;
    bool terminal = isatty(2);
    while (getline(&line, &room, from) > 0) {
        fputs(line, to);
        free(last[0]);
        memmove(last, last + 1, (TRAINER_LAST - 1) * sizeof *last);
        last[TRAINER_LAST - 1] = strdup(line);
        if (strncmp(line, "step ", 5) || !strstr(line, "  loss ")) continue;
        if (terminal) fprintf(stderr, "\r%s: %.48s\033[K\r", program, line);
        if (++steps == stop_after) kill(pid, SIGTERM);
    }
    if (terminal) fprintf(stderr, "\033[K");
    free(line);
}

// Starts it with these words; what it prints can be read from *output.
static inline pid_t trainer_start(const char *const *argv, FILE **output) {
    int ends[2];
    fflush(stdout);
    if (pipe(ends)) die(EXIT_INTERNAL, "cannot make a pipe: %s", strerror(errno));
    pid_t pid = fork();
    if (pid == 0) {
        dup2(ends[1], 1), dup2(ends[1], 2), close(ends[0]), close(ends[1]);
        signal(SIGINT, SIG_DFL);
        execv(argv[0], (char *const *)argv);
        printf("cannot run it: %s\n", strerror(errno));
        fflush(stdout);
        _exit(EXIT_USAGE);
    }
    close(ends[1]);
    *output = fdopen(ends[0], "r");
    if (pid < 0 || !*output) die(EXIT_INTERNAL, "cannot start %s: %s", argv[0], strerror(errno));
    return pid;
}

// Runs argv, which ends with NULL; appends what it prints to folder/printed.txt. Ends the program
// with the trainer's exit code when it fails. Told to stop after stop_after steps, it may.
static inline void trainer_run(const char *const *argv, const char *folder, int64_t stop_after) {
    char path[IO_PATH_MAX], *last[TRAINER_LAST] = {NULL};
    int status = 0;
    if (io_make_dir(folder)) die(EXIT_USAGE, "%s", io_error);
    ckpt_join(path, folder, "printed.txt");
    FILE *from, *to = fopen(path, "a");
    if (!to) die(EXIT_USAGE, "cannot append to %s: %s", path, strerror(errno));
    pid_t pid = trainer_start(argv, &from);
    trainer_follow(argv[0], pid, stop_after, from, to, last);
    waitpid(pid, &status, 0);
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    bool failed = code && !(stop_after && (code == EXIT_PREEMPTED || code == 128 + SIGTERM));
    for (int i = 0; i < TRAINER_LAST; i++) {
        if (failed && last[i]) fprintf(stderr, "  | %s", last[i]);
        free(last[i]);
    }
    fclose(from), fclose(to);
    if (failed)
        die(code > 128 ? EXIT_INTERNAL : code, "%s ended with %s %d; its last lines stand above",
            argv[0], code > 128 ? "signal" : "exit code", code > 128 ? code - 128 : code);
}

#endif
