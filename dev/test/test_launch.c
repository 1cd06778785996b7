// test_launch.c: llmc/launch.h. A process's place, from the environment that each launcher makes,
// and from one that makes no sense; and launch_spawn, which starts this program again as its ranks:
// with an argument it is one of them.
#define LAUNCH_GRACE_S 1
#include "dev/test/ranks.h"
#include "llmc/launch.h"
#include "llmc/meet.h"  // meet
#include "llmc/stop.h"  // stop_listen, stop_told

// ---------------------------------------------------------------------------------------------
// The environment.

// The environment becomes "A=1 B=2", and nothing else.
static void set_environment(const char *variables) {
    static char text[1000];
    clearenv();
    snprintf(text, sizeof text, "%s", variables);
    for (char *word = strtok(text, " "); word; word = strtok(NULL, " ")) putenv(word);
}

static void check_place(int line, const char *variables, const char *launcher, int rank, int world,
                        int local_rank, int local_world, const char *address, int port) {
    set_environment(variables);
    LaunchPlace p = launch_place();
    bool same = !strcmp(p.launcher, launcher) && p.rank == rank && p.world == world &&
                p.local_rank == local_rank && p.local_world == local_world &&
                !strcmp(p.address, address) && (p.port == port || port < 0) && p.listener == -1;
    test_check(same, __FILE__, line,
               "%s: found %s, rank %d of %d, %d of %d here, %s:%d; expected %s, rank %d of %d, %d "
               "of %d here, %s:%d",
               variables, p.launcher, p.rank, p.world, p.local_rank, p.local_world, p.address,
               p.port, launcher, rank, world, local_rank, local_world, address, port);
    bool bound = p.world == 1 || (p.port >= 1 && p.port <= 65535 && (p.port < 32768 || port > 0));
    test_check(bound, __FILE__, line, "%s: found port %d", variables, p.port);
}
#define CHECK_PLACE(...) check_place(__LINE__, __VA_ARGS__)

static void check_refused(int line, const char *variables, const char *message) {
    while (test_dies(EXIT_USAGE, message, __FILE__, line)) {
        set_environment(variables);
        launch_place();
    }
}
#define CHECK_REFUSED(variables, message) check_refused(__LINE__, variables, message)

#define TORCHRUN                                                                                   \
    "RANK=5 WORLD_SIZE=16 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=node-a MASTER_PORT=29500"
#define MPIRUN                                                                                     \
    "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=3 "                  \
    "OMPI_COMM_WORLD_LOCAL_SIZE=8 "
#define MPIRUN_FAR                                                                                 \
    "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=3 "                  \
    "OMPI_COMM_WORLD_LOCAL_SIZE=4 "
#define SRUN                                                                                       \
    "SLURM_PROCID=9 SLURM_NTASKS=20 SLURM_LOCALID=1 SLURM_NODEID=1 SLURM_STEP_ID=0 "               \
    "SLURM_STEP_NUM_TASKS=20 SLURM_JOB_ID=4012345 "
#define SRUN_FAR SRUN "SLURM_STEP_TASKS_PER_NODE=8(x2),4 "

TEST(no_launcher) {
    CHECK_PLACE("", "none", 0, 1, 0, 1, "", 0);
    CHECK_PLACE("WORLD_SIZE=4 MASTER_ADDR=a MASTER_PORT=1", "none", 0, 1, 0, 1, "", 0);
}

TEST(torchrun) {
    CHECK_PLACE(TORCHRUN, "torchrun", 5, 16, 1, 4, "node-a", 29500);
    CHECK_PLACE(TORCHRUN " TORCHELASTIC_USE_AGENT_STORE=False", "torchrun", 5, 16, 1, 4, "node-a",
                29500);
    CHECK_PLACE(SRUN_FAR MPIRUN TORCHRUN, "torchrun", 5, 16, 1, 4, "node-a", 29500);
    CHECK_PLACE("RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1", "torchrun", 0, 1, 0, 1, "",
                0);
}

// The port that torchrun's own store has is not ours; all ranks of a run agree on another.
TEST(torchrun_with_a_store_at_the_port) {
    static const char *more[] = {"", "TORCHELASTIC_RUN_ID=a", "TORCHELASTIC_RUN_ID=b"};
    int port[3];
    for (int i = 0; i < 3; i++) {
        char variables[300];
        snprintf(variables, sizeof variables, TORCHRUN " TORCHELASTIC_USE_AGENT_STORE=True %s",
                 more[i]);
        set_environment(variables);
        port[i] = launch_place().port;
        CHECK(port[i] >= 20000 && port[i] < 32000);
        CHECK_PLACE(variables, "torchrun", 5, 16, 1, 4, "node-a", port[i]);
    }
    CHECK(port[0] != port[1] && port[1] != port[2]);
}

TEST(torchrun_malformed) {
    CHECK_REFUSED("RANK=x WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2",
                  "error: RANK: found 'x', expected a whole number of 0 to 1, as torchrun sets it; "
                  "start the ranks with torchrun, or unset RANK to run without it");
    CHECK_REFUSED("RANK=0", "WORLD_SIZE: found nothing, expected a whole number of 1 to 65536");
    CHECK_REFUSED("RANK=0 WORLD_SIZE=0", "WORLD_SIZE: found '0'");
    CHECK_REFUSED("RANK=0 WORLD_SIZE=99999999999999999999", "WORLD_SIZE: found '99999999999");
    CHECK_REFUSED("RANK=0 WORLD_SIZE=", "WORLD_SIZE: found ''");
    CHECK_REFUSED("RANK=2 WORLD_SIZE=2", "RANK: found '2', expected a whole number of 0 to 1");
    CHECK_REFUSED("RANK=-1 WORLD_SIZE=2", "RANK: found '-1'");
    CHECK_REFUSED("RANK=1x WORLD_SIZE=2", "RANK: found '1x'");
    CHECK_REFUSED("RANK=+1 WORLD_SIZE=2", "RANK: found '+1'");
    CHECK_REFUSED("RANK=- WORLD_SIZE=2", "RANK: found '-'");
    CHECK_REFUSED("RANK=0 WORLD_SIZE=2", "LOCAL_WORLD_SIZE: found nothing");
    CHECK_REFUSED("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=3", "LOCAL_WORLD_SIZE: found '3'");
    CHECK_REFUSED("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 LOCAL_RANK=2", "LOCAL_RANK: found '2'");
    CHECK_REFUSED("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 LOCAL_RANK=0",
                  "MASTER_ADDR: found '', expected the name of rank 0's machine");
    CHECK_REFUSED("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a",
                  "MASTER_PORT: found nothing, expected a whole number of 1 to 65535");
    CHECK_REFUSED(TORCHRUN "0", "MASTER_PORT: found '295000'");
    CHECK_REFUSED(TORCHRUN " MASTER_PORT=0", "MASTER_PORT: found '0'");
}

TEST(mpirun) {
    CHECK_PLACE(MPIRUN "OMPI_MCA_ess_base_jobid=651558913", "mpirun", 3, 8, 3, 8, "127.0.0.1", -1);
    CHECK_PLACE(MPIRUN "PMIX_NAMESPACE=prterun-a-1@1", "mpirun", 3, 8, 3, 8, "127.0.0.1", -1);
    CHECK_PLACE(MPIRUN, "mpirun", 3, 8, 3, 8, "127.0.0.1", 20000 + (int)getppid() % 12000);
    CHECK_PLACE(MPIRUN "MASTER_ADDR=a MASTER_PORT=77", "mpirun", 3, 8, 3, 8, "a", 77);
    CHECK_PLACE(MPIRUN_FAR "MASTER_ADDR=a OMPI_MCA_ess_base_jobid=1", "mpirun", 3, 8, 3, 4, "a",
                -1);
    int one = launch_port_of_name("651558913"), other = launch_port_of_name("651558914");
    CHECK(one != other);
}

TEST(mpirun_malformed) {
    CHECK_REFUSED(MPIRUN_FAR, "MASTER_ADDR: found nothing, expected the name of rank 0's machine, "
                              "since 4 of 8 ranks are here; set it: mpirun -x MASTER_ADDR=HOST");
    CHECK_REFUSED(MPIRUN_FAR "MASTER_ADDR=a", "MASTER_PORT: found nothing");
    CHECK_REFUSED(MPIRUN "MASTER_PORT=65536", "MASTER_PORT: found '65536'");
    CHECK_REFUSED("OMPI_COMM_WORLD_RANK=8 OMPI_COMM_WORLD_SIZE=8",
                  "OMPI_COMM_WORLD_RANK: found '8', expected a whole number of 0 to 7, as mpirun "
                  "sets it");
    CHECK_REFUSED("OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE: found nothing");
}

TEST(srun) {
    int port = 20000 + 4012345 % 12000;
    CHECK_PLACE(SRUN_FAR "SLURM_STEP_NODELIST=node[01-03]", "srun", 9, 20, 1, 8, "node01", port);
    CHECK_PLACE(SRUN_FAR "SLURM_JOB_NODELIST=a,b,c", "srun", 9, 20, 1, 8, "a", port);
    CHECK_PLACE(SRUN_FAR "MASTER_ADDR=b MASTER_PORT=5", "srun", 9, 20, 1, 8, "b", 5);
    CHECK_PLACE(SRUN_FAR "MASTER_ADDR=b SLURM_NODEID=2", "srun", 9, 20, 1, 4, "b", port);
    CHECK_PLACE(SRUN "SLURM_STEP_TASKS_PER_NODE=20 SLURM_NODEID=0", "srun", 9, 20, 1, 20,
                "127.0.0.1", port);
    CHECK_PLACE(SRUN "SLURM_NTASKS_PER_NODE=10 SLURM_STEP_NODELIST=n[7,9]x", "srun", 9, 20, 1, 10,
                "n7x", port);
}

// A batch script, the shell of salloc, a step of one task.
TEST(slurm_without_ranks) {
    CHECK_PLACE("SLURM_JOB_ID=1 SLURM_NTASKS=8", "none", 0, 1, 0, 1, "", 0);
    CHECK_PLACE("SLURM_JOB_ID=1 SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_LOCALID=0", "none", 0, 1, 0, 1,
                "", 0);
    CHECK_PLACE("SLURM_JOB_ID=1 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_STEP_ID=0", "none", 0, 1, 0, 1,
                "", 0);
    CHECK_PLACE("SLURM_JOB_ID=1 SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_STEP_ID=4294967290 "
                "SLURM_STEP_NUM_TASKS=1",
                "none", 0, 1, 0, 1, "", 0);
}

TEST(srun_malformed) {
    CHECK_REFUSED(SRUN "SLURM_NTASKS=many", "SLURM_NTASKS: found 'many'");
    CHECK_REFUSED(SRUN "SLURM_PROCID=20", "SLURM_PROCID: found '20', expected a whole number of 0");
    CHECK_REFUSED(SRUN, "SLURM_NTASKS_PER_NODE: found nothing");
    CHECK_REFUSED(SRUN_FAR "SLURM_LOCALID=8", "SLURM_LOCALID: found '8'");
    CHECK_REFUSED(SRUN_FAR "SLURM_NODEID=3",
                  "SLURM_STEP_TASKS_PER_NODE: found '8(x2),4', expected the tasks of node 3 in a ");
    CHECK_REFUSED(SRUN_FAR, "SLURM_JOB_NODELIST: found '', expected machines like node[01-04,07]");
    CHECK_REFUSED(SRUN_FAR "SLURM_STEP_NODELIST=node[", "SLURM_STEP_NODELIST: found 'node['");
    CHECK_REFUSED(SRUN_FAR "SLURM_STEP_NODELIST=a SLURM_JOB_ID=x", "SLURM_JOB_ID: found 'x'");
    CHECK_REFUSED(SRUN "SLURM_STEP_TASKS_PER_NODE=30 SLURM_NODEID=0",
                  "SLURM_STEP_TASKS_PER_NODE: found 30 tasks on this node, expected up to 20");
}

TEST(slurm_task_lists) {
    static const struct {
        const char *list;
        int node, tasks;
    } cases[] = {{"4", 0, 4},         {"4", 1, 0},        {"8(x2),4", 0, 8},
                 {"8(x2),4", 1, 8},   {"8(x2),4", 2, 4},  {"8(x2),4", 3, 0},
                 {"1,2,3(x2)", 3, 3}, {"", 0, 0},         {"x", 0, 0},
                 {"8(x", 0, 0},       {"8(x2", 0, 0},     {"8(x0)", 0, 0},
                 {"8(x-1)", 0, 0},    {"8(y2)", 0, 0},    {"8;4", 1, 0},
                 {"-8", 0, 0},        {"0", 0, 0},        {"8(x2)4", 2, 0},
                 {"8,,4", 1, 0},      {"99999999", 0, 0}, {"8(x9999999999),4", 7, 8}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        test_check(launch_slurm_tasks(cases[i].list, cases[i].node) == cases[i].tasks, __FILE__,
                   __LINE__, "'%s', node %d: found %d, expected %d", cases[i].list, cases[i].node,
                   launch_slurm_tasks(cases[i].list, cases[i].node), cases[i].tasks);
}

TEST(slurm_machine_lists) {
    static const char *cases[][2] = {{"node7", "node7"},
                                     {"a,b", "a"},
                                     {"node[01-04,07]", "node01"},
                                     {"node[07,01-04]", "node07"},
                                     {"node[5]", "node5"},
                                     {"rack[1-2]node[03-04],login", "rack1node03"},
                                     {"n[1-2]-ib,b", "n1-ib"},
                                     {"a.b.c,d", "a.b.c"},
                                     {"", ""},
                                     {",a", ""},
                                     {"node[", ""},
                                     {"node[01", ""},
                                     {"node[]", ""},
                                     {"node[,1]", ""},
                                     {"node[1-2", ""},
                                     {"node]", ""},
                                     {"node[[1]]", ""},
                                     {"a23456789012345678901234567890123456789", ""}};  // room: 32
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char host[32];
        bool ok = launch_slurm_first(cases[i][0], host, sizeof host);
        CHECK_INT(ok, *cases[i][1] != 0);
        if (ok) CHECK_STR(host, cases[i][1]);
    }
}

TEST(a_long_address_is_refused) {
    char variables[600];
    int n = snprintf(variables, sizeof variables,
                     "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 MASTER_PORT=1 "
                     "MASTER_ADDR=");
    memset(variables + n, 'a', 256), variables[n + 256] = 0;
    CHECK_REFUSED(variables, "MASTER_ADDR: found 'aaaa");
    variables[n + 255] = 0;
    set_environment(variables);
    CHECK_INT(strlen(launch_place().address), 255);
}

// ---------------------------------------------------------------------------------------------
// launch_spawn. Each rank has the writing end of `ranks_ready`, which is closed when all are gone.

static int ready_fd = -1;  // a rank's

static void say_ready(void) {
    if (write(ready_fd, "", 1) != 1) exit(1);
}

static int rank_main(int argc, char **argv) {
    LaunchPlace p = launch_place();
    const char *mode = argv[1];
    die_rank = p.rank;
    ready_fd = argc > 2 ? atoi(argv[2]) : -1;
    if (strcmp(p.launcher, "--gpus") || p.local_rank != p.rank || p.local_world != p.world)
        return 9;
    if ((p.rank == 0) != (p.listener >= 0) || strcmp(p.address, "127.0.0.1")) return 10;
    if (!strcmp(mode, "meet")) {
        int fd[RANKS_MAX][MEET_LINES];
        meet(&p, "spawned", 10, fd);
        return 0;
    }
    if (!strcmp(mode, "one_fails")) return p.rank == 1 ? 3 : (usleep(200000), 0);
    if (!strcmp(mode, "one_fails_others_stay")) return p.rank == 1 ? 3 : (pause(), 0);
    if (!strcmp(mode, "one_is_killed")) {
        if (p.rank == 2) raise(SIGKILL);
        return usleep(200000), EXIT_COMM;
    }
    if (!strcmp(mode, "the_cause_is_slow")) {
        usleep(p.rank == 1 ? 300000 : 0);
        return p.rank == 1 ? EXIT_NONFINITE : EXIT_COMM;
    }
    if (!strcmp(mode, "all_see_a_loss")) return EXIT_COMM;
    if (!strcmp(mode, "signal")) {
        sigset_t waited;
        sigemptyset(&waited), sigaddset(&waited, SIGTERM), sigaddset(&waited, SIGUSR1);
        stop_listen();
        say_ready();
        while (!stop_told) usleep(2000);
        return stop_told >> SIGTERM & 1 ? EXIT_PREEMPTED : 11;
    }
    if (!strcmp(mode, "stay")) {
        signal(SIGINT, SIG_DFL);  // what a shell starts in the background ignores it
        return say_ready(), pause(), 0;
    }
    return 12;
}

static const char *mode;
static void spawn_three(int rank) {
    char name[] = "test_launch", how[40], fd[16];
    char *argv[] = {name, how, fd, NULL};
    (void)rank;
    snprintf(how, sizeof how, "%s", mode);
    snprintf(fd, sizeof fd, "%d", ranks_ready[1]);
    die_rank = -1;
    exit(launch_spawn(3, argv));
}

static void start_launcher(const char *how) {
    mode = how;
    ranks_start(1, spawn_three);
}

// After the launcher has ended, or before: all its ranks are gone, 5 s at most from now.
static void check_all_gone(void) {
    struct pollfd end = {ranks_ready[0], POLLIN, 0};
    char c;
    while (poll(&end, 1, 5000) > 0)
        if (read(ranks_ready[0], &c, 1) == 0) return;
    CHECK(!"a rank is left behind");
}

static void launch(const char *how) {
    start_launcher(how);
    ranks_wait_but(1);
    check_all_gone();
    close(ranks_ready[0]);
}

TEST(spawned_ranks_meet) {
    launch("meet");
    CHECK_QUIET();
}

TEST(the_code_is_that_of_the_rank_that_failed) {
    launch("one_fails");
    CHECK_RANK(0, 3, "");
}

TEST(when_a_rank_fails_the_others_have_some_time) {
    double start = test_seconds();
    launch("one_fails_others_stay");
    CHECK_RANK(0, 3, "error: rank 0 is killed: it has not ended within 1 s of a failure\n");
    CHECK(strstr(ranks[0].text, "error: rank 2 is killed"));
    CHECK(test_seconds() - start >= 1);
}

TEST(a_rank_that_is_killed_makes_the_code_6) {
    launch("one_is_killed");
    CHECK_RANK(0, EXIT_COMM, "error: rank 2 was killed by signal 9 (Killed)\n");
}

TEST(the_cause_counts_though_its_effects_are_there_first) {
    launch("the_cause_is_slow");
    CHECK_RANK(0, EXIT_NONFINITE, "");
    launch("all_see_a_loss");
    CHECK_RANK(0, EXIT_COMM, "");
}

// Starts a launcher in a mode, signals it when its ranks are there, and waits until all are gone.
static void signal_launcher(const char *mode, int number) {
    start_launcher(mode);
    ranks_wait_ready(3);
    kill(ranks[0].pid, number);
    ranks_wait_but(1);
    check_all_gone();
    close(ranks_ready[0]);
}

TEST(signals_are_handed_on) {
    static const int numbers[] = {SIGTERM, SIGUSR1};
    for (int i = 0; i < 2; i++) {
        signal_launcher("signal", numbers[i]);
        CHECK_RANK(0, numbers[i] == SIGTERM ? EXIT_PREEMPTED : 11, "");
        CHECK_STR(ranks[0].text, "");
    }
}

// Nobody should start it again.
TEST(an_interrupt_ends_all_with_the_code_of_a_shell) {
    signal_launcher("stay", SIGINT);
    CHECK_RANK(0, 128 + SIGINT, "");
    CHECK_STR(ranks[0].text, "");
}

TEST(when_the_launcher_is_killed_its_ranks_are_too) {
    signal_launcher("stay", SIGKILL);
    CHECK_INT(ranks[0].code, RANKS_KILLED + SIGKILL);
}

// Where whoever started the launcher ignores SIGCHLD, the codes of its children would be lost.
static void spawn_deaf(int rank) {
    signal(SIGCHLD, SIG_IGN);
    spawn_three(rank);
}

TEST(an_ignored_SIGCHLD_does_not_matter) {
    mode = "one_fails";
    ranks_start(1, spawn_deaf);
    ranks_wait();
    CHECK_RANK(0, 3, "");
}

int main(int argc, char **argv) {
    if (argc > 1) return rank_main(argc, argv);
    RUN(spawned_ranks_meet);
    RUN(the_code_is_that_of_the_rank_that_failed);
    RUN(when_a_rank_fails_the_others_have_some_time);
    RUN(a_rank_that_is_killed_makes_the_code_6);
    RUN(the_cause_counts_though_its_effects_are_there_first);
    RUN(signals_are_handed_on);
    RUN(an_interrupt_ends_all_with_the_code_of_a_shell);
    RUN(when_the_launcher_is_killed_its_ranks_are_too);
    RUN(an_ignored_SIGCHLD_does_not_matter);
    RUN(no_launcher);
    RUN(torchrun);
    RUN(torchrun_with_a_store_at_the_port);
    RUN(torchrun_malformed);
    RUN(mpirun);
    RUN(mpirun_malformed);
    RUN(srun);
    RUN(slurm_without_ranks);
    RUN(srun_malformed);
    RUN(slurm_task_lists);
    RUN(slurm_machine_lists);
    RUN(a_long_address_is_refused);
    return test_end();
}
