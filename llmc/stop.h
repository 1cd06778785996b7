// stop.h: how a run is told, from outside, to save or to stop.
//
//     SIGTERM, SIGUSR1   save at the end of the step under way and exit with EXIT_PREEMPTED;
//                        without --out nothing is saved. The same signal again exits at once
//     OUT/STOP           the same
//     OUT/SAVE           save at the end of the step under way, and go on
//
// Schedulers send one signal as a warning and another some time later (Slurm SIGUSR1, then
// SIGTERM): both are one request, and the second does not end a save that the first brought about.
// A file is removed when it is obeyed, so that the next run is not stopped by the STOP of this one.
// What is in it does not matter: `touch` makes it.
#ifndef LLMC_STOP_H
#define LLMC_STOP_H

#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "llmc/die.h"  // EXIT_PREEMPTED
#include "llmc/io.h"   // IO_PATH_MAX

typedef enum { STOP_NO, STOP_SAVE, STOP_END } StopRequest;

static volatile sig_atomic_t stop_told;  // signals that have come, a bit each: all that a handler
                                         // can reach

static inline void stop_on_signal(int signal_number) {
    static const char text[] =
        "error: told to stop by the same signal for the second time: ended at "
        "once; what came after the newest save is lost\n";
    if (stop_told >> signal_number & 1 && write(STDERR_FILENO, text, sizeof text - 1))
        _exit(EXIT_PREEMPTED);
    stop_told = stop_told | 1 << signal_number;
}

// From here on the signals ask instead of killing. The sooner it is called the better.
static inline void stop_listen(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = stop_on_signal, action.sa_flags = SA_RESTART;
    sigaction(SIGTERM, &action, NULL), sigaction(SIGUSR1, &action, NULL);
}

// True when the folder held that file, which is gone now.
static inline bool stop_take(const char *out, const char *name) {
    char path[IO_PATH_MAX];
    return snprintf(path, sizeof path, "%s/%s", out, name) < IO_PATH_MAX && !unlink(path);
}

// What is asked for at the end of a step. out: the run's folder, or "".
static inline StopRequest stop_poll(const char *out) {
    bool save = *out && stop_take(out, "SAVE"), end = *out && stop_take(out, "STOP");
    return end || stop_told ? STOP_END : save ? STOP_SAVE : STOP_NO;
}

#endif
