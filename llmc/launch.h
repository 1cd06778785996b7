// launch.h: which rank of how many this process is, and where rank 0 can be reached.
//
//     LaunchPlace place = launch_place();  // what torchrun, mpirun or srun says; else rank 0 of 1
//     if (place.world == 1 && gpus > 1) return launch_spawn(gpus, argv);  // our own launcher
//
// A launcher starts the processes and tells each of them its place by environment variables, every
// launcher by its own. A value that is not what it should be exits 2 and is named: a rank that is
// wrong about its place would leave all others waiting.
//
// launch_spawn is the launcher of one machine. Its process stays as the parent: it hands signals
// on, waits for all ranks, and ends the rest when one has failed.
#ifndef LLMC_LAUNCH_H
#define LLMC_LAUNCH_H

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "llmc/die.h"  // die, die_alloc, EXIT_

#define LAUNCH_WORLD_MAX 65536
#ifndef LAUNCH_GRACE_S
#define LAUNCH_GRACE_S 30  // so long may the others go on when a rank has failed
#endif

typedef struct {
    int rank, world;              // 0 <= rank < world
    int local_rank, local_world;  // the same among the ranks of this machine
    char address[256];            // of rank 0's machine: a name, an IPv4 or an IPv6 address
    int port;                     // at which rank 0 listens
    const char *launcher;         // "torchrun", "mpirun", "srun", "--gpus" or "none"
    int listener;                 // rank 0 under --gpus: a socket that listens there; else -1
} LaunchPlace;

// The variables of one launcher.
typedef struct {
    const char *launcher, *rank, *world, *local_rank, *local_world;
} LaunchNames;

static const LaunchNames launch_names[] = {
    {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
    {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE"},
    {"srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", NULL}};  // launch_slurm_local

// Set by launch_spawn, in all its ranks: the descriptor of rank 0's socket, -1 in the others.
#define LAUNCH_LISTENER "LAUNCH_LISTENER"

// ---------------------------------------------------------------------------------------------
// The environment.

// A whole number from the environment; anything else ends the program.
static inline int launch_number(const LaunchNames *from, const char *name, int low, int high) {
    const char *text = getenv(name);
    char *end = NULL;
    errno = 0;
    long value = text ? strtol(text, &end, 10) : 0;
    bool digits = text && (*text == '-' || (*text >= '0' && *text <= '9')) && !*end;
    if (!digits || errno || value < low || value > high)
        die(EXIT_USAGE,
            "%s: found %s%s%s, expected a whole number of %d to %d, as %s sets it; start the ranks "
            "with %s, or unset %s to run without it",
            name, text ? "'" : "nothing", text ? text : "", text ? "'" : "", low, high,
            from->launcher, from->launcher, from->rank);
    return (int)value;
}

// Ports below those that the kernel gives to outgoing connections (32768 and up on Linux): one of
// them may be in use at any moment.
static inline int launch_port_of(uint32_t number) { return 20000 + (int)(number % 12000); }

// The same for a name (FNV-1a).
static inline int launch_port_of_name(const char *name) {
    uint32_t hash = 2166136261u;
    for (; *name; name++) hash = (hash ^ (uint8_t)*name) * 16777619u;
    return launch_port_of(hash);
}

static inline void launch_set_address(LaunchPlace *p, const char *name, const char *address) {
    if (!*address || strlen(address) >= sizeof p->address)
        die(EXIT_USAGE, "%s: found '%s', expected the name of rank 0's machine in 1 to %d letters",
            name, address, (int)sizeof p->address - 1);
    strcpy(p->address, address);
}

// ---------------------------------------------------------------------------------------------
// Slurm's lists.

// The tasks of a node, counted from 0, in a list like "8(x2),4": eight on each of the first two
// nodes, four on the third. 0 when the list is no such list or ends before.
static inline int launch_slurm_tasks(const char *list, int node) {
    for (const char *s = list; *s;) {
        char *end;
        long tasks = strtol(s, &end, 10), nodes = 1;
        if (end == s || tasks < 1 || tasks > LAUNCH_WORLD_MAX) return 0;
        if (!strncmp(end, "(x", 2)) {
            s = end + 2;
            nodes = strtol(s, &end, 10);
            if (end == s || nodes < 1 || *end++ != ')') return 0;
        }
        if (*end && *end != ',') return 0;
        if (node < nodes) return (int)tasks;
        node -= (int)nodes;
        s = *end ? end + 1 : end;
    }
    return 0;
}

// The first name in a list like "rack[1-2]node[01-04,07],login": "rack1node01".
static inline bool launch_slurm_first(const char *list, char *host, size_t size) {
    size_t n = 0;
    bool inside = false;
    for (const char *s = list; *s && (inside || *s != ','); s++) {
        if (*s == (inside ? '[' : ']') || n + 1 >= size) return false;
        if (*s == '[') {
            inside = true;
        } else if (inside && strchr("-,]", *s)) {  // the first number is read: leave the bracket
            if (s[-1] == '[' || !(s = strchr(s, ']'))) return false;
            inside = false;
        } else {
            host[n++] = *s;
        }
    }
    host[n] = 0;
    return n > 0 && !inside;
}

// Whether srun started this process as one of several. Slurm also sets variables in a batch script
// and in the shell of salloc, with the tasks that srun could start there: these are no ranks. They
// have no step, or one of a single task.
static inline bool launch_slurm(void) {
    const char *tasks = getenv("SLURM_STEP_NUM_TASKS");
    if (!tasks) tasks = getenv("SLURM_NTASKS");
    return getenv("SLURM_PROCID") && (getenv("SLURM_STEP_ID") || getenv("SLURM_STEPID")) && tasks &&
           strcmp(tasks, "1");
}

// The number of ranks on this machine.
static inline int launch_slurm_local(const LaunchNames *from, int world) {
    const char *list = getenv("SLURM_STEP_TASKS_PER_NODE");
    if (!list) return launch_number(from, "SLURM_NTASKS_PER_NODE", 1, world);
    int node = getenv("SLURM_NODEID") ? launch_number(from, "SLURM_NODEID", 0, 1 << 20) : 0;
    int tasks = launch_slurm_tasks(list, node);
    if (!tasks)
        die(EXIT_USAGE,
            "SLURM_STEP_TASKS_PER_NODE: found '%s', expected the tasks of node %d in a list like "
            "8(x2),4; start the ranks with srun",
            list, node);
    if (tasks > world)
        die(EXIT_USAGE,
            "SLURM_STEP_TASKS_PER_NODE: found %d tasks on this node, expected up to %d, which is "
            "SLURM_NTASKS; start the ranks with srun",
            tasks, world);
    return tasks;
}

// ---------------------------------------------------------------------------------------------
// Where rank 0 is. Each takes MASTER_ADDR and MASTER_PORT when they are set.

// torchrun has a store of its own, which mostly listens at MASTER_PORT itself: then that port is
// taken, and one that follows from its number and from the run's name is rank 0's.
static inline void launch_meet_torchrun(LaunchPlace *p, const LaunchNames *from) {
    const char *address = getenv("MASTER_ADDR"), *store = getenv("TORCHELASTIC_USE_AGENT_STORE");
    launch_set_address(p, "MASTER_ADDR", address ? address : "");
    p->port = launch_number(from, "MASTER_PORT", 1, 65535);
    if (store && !strcmp(store, "True")) {
        const char *run = getenv("TORCHELASTIC_RUN_ID");
        char name[300];
        snprintf(name, sizeof name, "%d %s", p->port, run ? run : "");
        p->port = launch_port_of_name(name);
    }
}

// Two runs on one machine differ in mpirun's job number, or in mpirun's process.
static inline void launch_meet_mpirun(LaunchPlace *p, const LaunchNames *from) {
    const char *address = getenv("MASTER_ADDR"), *job = getenv("OMPI_MCA_ess_base_jobid");
    if (!job) job = getenv("PMIX_NAMESPACE");
    bool here = p->local_world == p->world;
    if (!address && !here)
        die(EXIT_USAGE,
            "MASTER_ADDR: found nothing, expected the name of rank 0's machine, since %d of %d "
            "ranks are here; set it: mpirun -x MASTER_ADDR=HOST ...",
            p->local_world, p->world);
    launch_set_address(p, "MASTER_ADDR", address ? address : "127.0.0.1");
    if (getenv("MASTER_PORT") || (!job && !here))
        p->port = launch_number(from, "MASTER_PORT", 1, 65535);
    else
        p->port = job ? launch_port_of_name(job) : launch_port_of((uint32_t)getppid());
}

// Rank 0 is on the first machine of the step. (SLURM_LAUNCH_NODE_IPADDR is where srun was called,
// which may be a login node.)
static inline void launch_meet_srun(LaunchPlace *p, const LaunchNames *from) {
    const char *address = getenv("MASTER_ADDR"), *name = "SLURM_STEP_NODELIST";
    const char *list = getenv(name);
    char host[256] = "127.0.0.1";
    if (!list) list = getenv(name = "SLURM_JOB_NODELIST");
    if (!address && p->local_world < p->world &&
        !(list && launch_slurm_first(list, host, sizeof host)))
        die(EXIT_USAGE, "%s: found '%s', expected machines like node[01-04,07]; set MASTER_ADDR",
            name, list ? list : "");
    launch_set_address(p, "MASTER_ADDR", address ? address : host);
    if (getenv("MASTER_PORT"))
        p->port = launch_number(from, "MASTER_PORT", 1, 65535);
    else
        p->port = launch_port_of((uint32_t)launch_number(from, "SLURM_JOB_ID", 0, INT32_MAX));
}

// The socket that launch_spawn's rank 0 has from its parent; -1 when there is none (any more).
static inline int launch_inherited(const LaunchNames *from) {
    int fd = launch_number(from, LAUNCH_LISTENER, -1, 1 << 20), listens = 0;
    socklen_t size = sizeof listens;
    if (fd < 0 || getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) || !listens) return -1;
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    return fd;
}

// This process's place, from the environment. Exits 2 when that makes no sense.
static inline LaunchPlace launch_place(void) {
    LaunchPlace p;
    memset(&p, 0, sizeof p);
    p.world = p.local_world = 1, p.launcher = "none", p.listener = -1;
    int n = getenv("RANK") ? 0 : getenv("OMPI_COMM_WORLD_RANK") ? 1 : launch_slurm() ? 2 : -1;
    if (n < 0) return p;
    const LaunchNames *from = &launch_names[n];
    p.launcher = from->launcher;
    p.world = launch_number(from, from->world, 1, LAUNCH_WORLD_MAX);
    p.rank = launch_number(from, from->rank, 0, p.world - 1);
    if (from->local_world)
        p.local_world = launch_number(from, from->local_world, 1, p.world);
    else
        p.local_world = launch_slurm_local(from, p.world);
    p.local_rank = launch_number(from, from->local_rank, 0, p.local_world - 1);
    if (p.world == 1) return p;
    if (n == 0) launch_meet_torchrun(&p, from);
    if (n == 1) launch_meet_mpirun(&p, from);
    if (n == 2) launch_meet_srun(&p, from);
    if (n == 0 && getenv(LAUNCH_LISTENER)) {
        p.launcher = "--gpus";
        p.listener = launch_inherited(from);
    }
    return p;
}

// ---------------------------------------------------------------------------------------------
// The launcher of one machine.

typedef struct {
    pid_t pid;    // 0: it has ended
    bool killed;  // by us, for the sake of another rank's failure
} LaunchChild;

typedef struct {
    int count, alive;
    LaunchChild *child;  // (count)
    int code;            // of the whole run, see launch_ended
    bool failed, known;  // a rank has failed; it is known which was the first
    double until;        // if failed: when the rest is killed, in seconds of launch_now
    int told;            // the last signal handed on, 0: none
} Launch;

static inline double launch_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// A socket that listens at a free port of this machine. It is kept open until rank 0 has it: a port
// that was only looked up could be taken by another process.
static inline int launch_listen(int *port) {
    struct sockaddr_in name;
    socklen_t size = sizeof name;
    memset(&name, 0, sizeof name);
    name.sin_family = AF_INET, name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&name, size) || listen(fd, SOMAXCONN) ||
        getsockname(fd, (struct sockaddr *)&name, &size))
        die(EXIT_COMM, "cannot listen at 127.0.0.1: %s", strerror(errno));
    *port = ntohs(name.sin_port);
    return fd;
}

// The child's side: the same program with the same arguments, but with a place. It starts anew, by
// exec, since a GPU's driver does not survive a fork. The kernel ends it when the parent dies.
__attribute__((noreturn)) static inline void launch_exec(int rank, int world, int port,
                                                         int listener, pid_t parent, char **argv) {
    const char *names[] = {"RANK",        "LOCAL_RANK",   "WORLD_SIZE", "LOCAL_WORLD_SIZE",
                           "MASTER_PORT", LAUNCH_LISTENER};
    int values[] = {rank, rank, world, world, port, rank ? -1 : listener};
    for (int i = 0; i < 6; i++) {
        char text[16];
        snprintf(text, sizeof text, "%d", values[i]);
        setenv(names[i], text, 1);
    }
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    unsetenv("TORCHELASTIC_USE_AGENT_STORE");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(EXIT_INTERNAL);  // it died before the line above
    if (rank == 0) fcntl(listener, F_SETFD, 0);
    execv("/proc/self/exe", argv);
    fprintf(stderr, "error: rank %d: cannot start /proc/self/exe: %s\n", rank, strerror(errno));
    _exit(EXIT_INTERNAL);
}

// Takes note of a child that has ended. The run's code is that of the first rank that failed. But 6
// is what a rank leaves with when it sees another one gone, and it may be faster than the one that
// is still on its way out: 6 gives way to a rank that was killed or that leaves with another code.
static inline void launch_ended(Launch *l, int rank, int status) {
    bool killed = WIFSIGNALED(status), known = l->known;
    int number = killed ? WTERMSIG(status) : 0, code = killed ? EXIT_COMM : WEXITSTATUS(status);
    l->child[rank].pid = 0, l->alive--;
    if (l->child[rank].killed || code == EXIT_OK) return;
    if (code == EXIT_PREEMPTED) {  // no failure: the others are about to do the same
        if (l->code == EXIT_OK) l->code = code;
        return;
    }
    if (killed && number == l->told)
        code = 128 + number;  // as asked for, before it could listen: not to be tried again
    else if (killed && !known)
        fprintf(stderr, "error: rank %d was killed by signal %d (%s)\n", rank, number,
                strsignal(number));
    if (!known) l->code = code;
    l->known = known || killed || code != EXIT_COMM;
    if (!l->failed) l->failed = true, l->until = launch_now() + LAUNCH_GRACE_S;
}

static inline void launch_reap(Launch *l) {
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
        for (int rank = 0; rank < l->count; rank++)
            if (l->child[rank].pid == pid) launch_ended(l, rank, status);
}

static inline void launch_kill_rest(Launch *l) {
    for (int rank = 0; rank < l->count; rank++) {
        if (!l->child[rank].pid || l->child[rank].killed) continue;
        fprintf(stderr, "error: rank %d is killed: it has not ended within %d s of a failure\n",
                rank, LAUNCH_GRACE_S);
        l->child[rank].killed = true;
        kill(l->child[rank].pid, SIGKILL);
    }
}

// Waits for a signal: a child has ended, or there is one to hand on. A terminal's Ctrl-C has gone
// to the children already.
static inline void launch_wait(Launch *l, const sigset_t *signals) {
    double left = l->failed ? l->until - launch_now() : 3600;
    if (left <= 0) launch_kill_rest(l), left = 3600;
    struct timespec limit;
    limit.tv_sec = (time_t)left, limit.tv_nsec = (long)(1e9 * (left - (double)limit.tv_sec));
    siginfo_t info;
    int number = sigtimedwait(signals, &info, &limit);
    if (number <= 0 || number == SIGCHLD) return;
    l->told = number;
    for (int rank = 0; rank < l->count && info.si_code != SI_KERNEL; rank++)
        if (l->child[rank].pid) kill(l->child[rank].pid, number);
}

// Starts this program `count` times on this machine and waits for all. Call it before there is a
// thread or anything of the GPU. Returns the exit code of the run.
static inline int launch_spawn(int count, char **argv) {
    Launch l;
    memset(&l, 0, sizeof l);
    l.child = (LaunchChild *)die_alloc((size_t)count, sizeof *l.child, "the ranks' processes");
    sigset_t signals, before;
    sigemptyset(&signals);
    sigaddset(&signals, SIGCHLD), sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT), sigaddset(&signals, SIGUSR1);
    sigprocmask(SIG_BLOCK, &signals, &before);
    signal(SIGCHLD, SIG_DFL);  // ignored, the children's codes would be lost
    int port, listener = launch_listen(&port);
    pid_t parent = getpid();
    fflush(NULL);
    for (; l.count < count; l.count++, l.alive++) {
        pid_t pid = l.child[l.count].pid = fork();
        if (pid < 0) die(EXIT_INTERNAL, "cannot start rank %d: %s", l.count, strerror(errno));
        if (pid) continue;
        sigprocmask(SIG_SETMASK, &before, NULL);
        launch_exec(l.count, count, port, listener, parent, argv);
    }
    close(listener);  // rank 0's alone: when that is gone nobody answers
    while (l.alive) {
        launch_wait(&l, &signals);
        launch_reap(&l);
    }
    free(l.child);
    return l.code;  // with the signals still blocked: a late one changes nothing
}

#endif
