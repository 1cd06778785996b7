// ranks.h: for tests of several processes: forks the ranks of a small run, keeps what each prints
// to stderr, and looks at how and when each ended.
//
//     ranks_start(4, body);  // each runs body(rank) and exits 0; the parent goes on
//     ranks_wait();          // for all
//     CHECK_RANK(2, EXIT_COMM, "part of the message");
//
// A rank that does not end in time is killed, which is a failed check. None outlives the test.
#ifndef DEV_RANKS_H
#define DEV_RANKS_H

#include <signal.h>
#include <sys/prctl.h>

#include "dev/test/test.h"  // test_check, test_seconds
#include "llmc/die.h"       // die_rank
#include "llmc/launch.h"    // LaunchPlace, launch_listen

enum { RANKS_MAX = 8, RANKS_KILLED = 1000 };  // killed by signal s: code RANKS_KILLED + s

typedef struct {
    pid_t pid;
    FILE *said;
    char text[4096];  // of said, once it has ended
    int code;
    double ended;  // test_seconds
} Rank;

static Rank ranks[RANKS_MAX];
static int ranks_count, ranks_ready[2];
static LaunchPlace ranks_place;  // of the rank that runs; address and port may be set before

// A port where nobody listens at this moment.
static inline int ranks_free_port(void) {
    int port;
    close(launch_listen(&port));
    return port;
}

// Forks one rank.
static inline void ranks_fork(int rank, int world, void (*body)(int rank)) {
    Rank *r = &ranks[rank];
    memset(r, 0, sizeof *r);
    r->said = tmpfile();
    r->code = -1;
    fflush(stdout);
    r->pid = fork();
    if (r->pid) return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    alarm(20);
    dup2(fileno(r->said), STDERR_FILENO);
    die_rank = ranks_place.rank = ranks_place.local_rank = rank;
    ranks_place.world = ranks_place.local_world = world;
    if (rank && ranks_place.listener >= 0) close(ranks_place.listener), ranks_place.listener = -1;
    body(rank);
    exit(0);
}

// Where the ranks meet: a port at which rank 0 finds a socket that listens, as under --gpus.
static inline void ranks_begin(void) {
    memset(&ranks_place, 0, sizeof ranks_place);
    strcpy(ranks_place.address, "127.0.0.1");
    ranks_place.listener = launch_listen(&ranks_place.port);
    ranks_count = 0;
    if (pipe(ranks_ready)) perror("pipe"), exit(1);
}

// The same, but rank 0 has to open the port.
static inline void ranks_begin_closed(void) {
    ranks_begin();
    close(ranks_place.listener);
    ranks_place.listener = -1;
}

static inline void ranks_forked(int world) {
    ranks_count = world;
    if (ranks_place.listener >= 0) close(ranks_place.listener);
    close(ranks_ready[1]);
}

static inline void ranks_start(int world, void (*body)(int rank)) {
    ranks_begin();
    for (int rank = 0; rank < world; rank++) ranks_fork(rank, world, body);
    ranks_forked(world);
}

// Called by a rank: it has come so far that the test can do what it is to do.
static inline void ranks_is_ready(void) {
    if (write(ranks_ready[1], "", 1) != 1) exit(1);
}

// Waits until so many are ready.
static inline void ranks_wait_ready(int count) {
    for (char c; count > 0 && read(ranks_ready[0], &c, 1) == 1;) count--;
    CHECK_INT(count, 0);
}

// Takes note of a rank that has ended. Returns whether it has.
static inline bool ranks_poll(Rank *r) {
    int status;
    if (!r->pid || waitpid(r->pid, &status, WNOHANG) != r->pid) return !r->pid;
    r->pid = 0, r->ended = test_seconds();
    r->code = WIFEXITED(status) ? WEXITSTATUS(status) : RANKS_KILLED + WTERMSIG(status);
    rewind(r->said);
    r->text[fread(r->text, 1, sizeof r->text - 1, r->said)] = 0;
    fclose(r->said);
    return true;
}

// Waits for all but rank `except` (-1: for all), 15 s at most.
static inline void ranks_wait_but(int except) {
    double until = test_seconds() + 15;
    for (int open = 1; open;) {
        open = 0;
        for (int i = 0; i < ranks_count; i++) open += i != except && !ranks_poll(&ranks[i]);
        for (int i = 0; open && test_seconds() > until && i < ranks_count; i++)
            if (ranks[i].pid && i != except) {
                test_check(false, __FILE__, __LINE__, "rank %d does not end", i);
                kill(ranks[i].pid, SIGKILL);
            }
        if (open) usleep(2000);
    }
    if (except < 0) close(ranks_ready[0]);
}
static inline void ranks_wait(void) { ranks_wait_but(-1); }

static inline void ranks_check(int rank, int code, const char *message, int line) {
    Rank *r = &ranks[rank];
    test_check(r->code == code && strstr(r->text, message), __FILE__, line,
               "rank %d: found exit code %d, expected %d; expected '%s' in: %s", rank, r->code,
               code, message, r->text);
}
#define CHECK_RANK(rank, code, message) ranks_check(rank, code, message, __LINE__)

// All ended well and said nothing.
static inline void ranks_check_quiet(int line) {
    for (int i = 0; i < ranks_count; i++)
        test_check(ranks[i].code == 0 && !*ranks[i].text, __FILE__, line,
                   "rank %d: found exit code %d, expected 0 and no word; it said: %s", i,
                   ranks[i].code, ranks[i].text);
}
#define CHECK_QUIET() ranks_check_quiet(__LINE__)

#endif
