// test_peers.c: the calls of llmc/peers.h for several worlds and sizes, and its watchdog: a rank
// that is killed, is stopped, hangs or fails ends all others, which name it; one that ends as it
// should does not, whoever is first.
#define PEERS_BEAT_MS  100
#define PEERS_LEAVE_MS 500
#include <sys/mman.h>

#include "dev/test/ranks.h"
#include "llmc/peers.h"

static Peers *begin(void) { return peers_init(&ranks_place, "a test", 10); }

// ---------------------------------------------------------------------------------------------
// Calls.

static char byte_of(int rank, size_t i, int round) {
    return (char)((size_t)rank * 31 + i * 7 + i / 251 + (size_t)round);
}

// Every call for many sizes; each rank checks what it gets.
static void call_all(int rank) {
    static const size_t sizes[] = {0, 1, 3, 128, 4097, 100003, 1 << 20};
    Peers *p = begin();
    int wrong = 0, world = p->world;
    for (int s = 0; s < 7; s++) {
        size_t n = sizes[s];
        char *in = (char *)die_alloc(n, 1, "in"), *out = (char *)die_alloc(n, (size_t)world, "out");
        for (size_t i = 0; i < n; i++) in[i] = byte_of(rank, i, s);
        peers_all_gather(p, out, in, n);
        for (int r = 0; r < world; r++)
            for (size_t i = 0; i < n; i++) wrong += out[(size_t)r * n + i] != byte_of(r, i, s);
        peers_broadcast(p, in, n);
        for (size_t i = 0; i < n; i++) wrong += in[i] != byte_of(0, i, s);
        peers_barrier(p);
        free(in), free(out);
    }
    peers_free(p);
    if (wrong) die(EXIT_INTERNAL, "%d wrong bytes", wrong);
}

TEST(calls_give_all_ranks_the_same) {
    for (int world = 1; world <= RANKS_MAX; world *= 2) {
        ranks_start(world, call_all);
        ranks_wait();
        CHECK_QUIET();
    }
}

// A rank's own part may lie in the result.
static void call_in_place(int rank) {
    Peers *p = begin();
    int all[3] = {0, 0, 0};
    all[rank] = rank + 5;
    peers_all_gather(p, all, all + rank, sizeof(int));
    peers_free(p);
    if (all[0] != 5 || all[1] != 6 || all[2] != 7) exit(1);
}

TEST(all_gather_in_place) {
    ranks_start(3, call_in_place);
    ranks_wait();
    CHECK_QUIET();
}

// No rank is beyond a barrier that another has not reached.
static int *shared_count;  // in memory that all ranks share
static void count_at_barriers(int rank) {
    Peers *p = begin();
    for (int i = 1; i <= 50; i++) {
        if (i % 10 == rank) usleep(3000);
        __atomic_add_fetch(shared_count, 1, __ATOMIC_SEQ_CST);
        peers_barrier(p);
        if (__atomic_load_n(shared_count, __ATOMIC_SEQ_CST) < i * p->world) exit(1);
    }
    peers_free(p);
}

TEST(a_barrier_waits_for_all) {
    *shared_count = 0;
    ranks_start(4, count_at_barriers);
    ranks_wait();
    CHECK_QUIET();
}

static void differ_in_kind(int rank) {
    Peers *p = begin();
    int value = 0;
    peers_barrier(p);
    if (rank == 2) peers_broadcast(p, &value, sizeof value);
    peers_barrier(p);
    peers_free(p);
}
static void differ_in_size(int rank) {
    Peers *p = begin();
    char in[3] = "", out[12];
    peers_all_gather(p, out, in, rank == 1 ? 3 : 2);
    peers_free(p);
}
static void differ_in_end(int rank) {
    Peers *p = begin();
    if (rank != 3) peers_barrier(p);
    peers_free(p);
}

TEST(ranks_in_different_calls_end) {
    static const struct {
        void (*body)(int rank);
        const char *says;
    } cases[] = {
        {differ_in_kind, "rank 2: found peers_broadcast of 4 bytes, call 1, expected peers_barrier "
                         "of 0 bytes, call 1 as in rank 0"},
        {differ_in_size, "rank 1: found peers_all_gather of 3 bytes, call 0, expected "
                         "peers_all_gather of 2 bytes, call 0 as in rank 0"},
        {differ_in_end, "rank 3: found peers_free of 0 bytes, call 0, expected peers_barrier"}};
    for (int i = 0; i < 3; i++) {
        ranks_start(4, cases[i].body);
        ranks_wait();
        for (int r = 0; r < 4; r++) CHECK_RANK(r, EXIT_COMM, cases[i].says);
    }
}

// ---------------------------------------------------------------------------------------------
// The watchdog.

static double limit;  // of peers_watch, in seconds
static int victim;

// Tells the test, once, that this rank runs and that its place has been in a heartbeat.
static void ready_after_beats(void) {
    static double first;
    if (first == 0) first = test_seconds();
    if (first < 0 || test_seconds() < first + 2.5e-3 * PEERS_BEAT_MS) return;
    first = -1;
    ranks_is_ready();
}

// A long run. Its ranks wait for each other in every step.
static void run_with_calls(int rank) {
    Peers *p = begin();
    for (int64_t step = 0;; step++) {
        int64_t all[RANKS_MAX];
        peers_at(p, step, "forward");
        usleep(2000);
        peers_at(p, step, "reduce");
        peers_all_gather(p, all, &step, sizeof step);
        if (step == 0) peers_watch(p, limit);
        ready_after_beats();
        if (all[rank] != step) exit(1);
    }
}

// Its ranks do not.
static void run_without_calls(int rank) {
    (void)rank;
    Peers *p = begin();
    peers_watch(p, limit);
    for (int64_t step = 0;; step++) {
        peers_at(p, step, "forward");
        usleep(2000);
        ready_after_beats();
    }
}

// All but one ended within `seconds` of `since`, and named that one.
static void check_named(int world, const char *how, double since, double seconds) {
    char says[100];
    snprintf(says, sizeof says, "error: rank %d %s", victim, how);
    for (int r = 0; r < world; r++) {
        if (r == victim) continue;
        CHECK_RANK(r, EXIT_COMM, says);
        CHECK_RANK(r, EXIT_COMM, ", last seen at step ");
        CHECK_RANK(r, EXIT_COMM, "(this rank: at step ");
        double took = ranks[r].ended - since;
        test_check(took < seconds, __FILE__, __LINE__, "rank %d ended %.1f s later", r, took);
    }
}

TEST(a_killed_rank_ends_all_others) {
    limit = 10;
    for (int i = 0; i < 7; i++) {
        victim = i < 5 ? i : 3 * (i - 5);
        ranks_start(5, i < 5 ? run_with_calls : run_without_calls);
        ranks_wait_ready(5);
        double start = test_seconds();
        kill(ranks[victim].pid, SIGKILL);
        ranks_wait();
        check_named(5, "ended without a goodbye", start, 3);
        CHECK_INT(ranks[victim].code, RANKS_KILLED + SIGKILL);
    }
}

// Of two ranks.
TEST(a_killed_rank_ends_the_other) {
    for (victim = 0; victim < 2; victim++) {
        ranks_start(2, run_with_calls);
        ranks_wait_ready(2);
        double start = test_seconds();
        kill(ranks[victim].pid, SIGKILL);
        ranks_wait();
        check_named(2, "ended without a goodbye", start, 3);
    }
}

// The stopped rank ends, too, when it goes on.
TEST(a_stopped_rank_ends_all_others) {
    limit = 0.8;
    for (victim = 0; victim < 3; victim += 2) {
        ranks_start(3, run_without_calls);
        ranks_wait_ready(3);
        double start = test_seconds();
        kill(ranks[victim].pid, SIGSTOP);
        ranks_wait_but(victim);
        check_named(3, "has been silent for ", start, limit + 2);
        kill(ranks[victim].pid, SIGCONT);
        ranks_wait();
        CHECK_INT(ranks[victim].code, EXIT_COMM);
    }
}

TEST(a_stopped_rank_that_others_wait_for_ends_them) {
    limit = 1, victim = 1;
    ranks_start(3, run_with_calls);
    ranks_wait_ready(3);
    double start = test_seconds();
    kill(ranks[victim].pid, SIGSTOP);
    ranks_wait_but(victim);
    kill(ranks[victim].pid, SIGKILL);
    ranks_wait();
    for (int r = 0; r < 3; r += 2) {
        CHECK_RANK(r, EXIT_COMM, "error: rank 1 ");
        CHECK(ranks[r].ended - start < limit + 2);
    }
}

// As by Ctrl-Z and fg: all stop, and nobody is to blame.
static void run_for_a_while(int rank) {
    (void)rank;
    Peers *p = begin();
    peers_watch(p, limit);
    for (int64_t step = 0; step < 40; step++) {
        peers_at(p, step, "forward");
        peers_barrier(p);
        usleep(5000);
        if (step == 5) ranks_is_ready();
    }
    peers_free(p);
}

TEST(a_run_that_is_stopped_as_a_whole_goes_on) {
    limit = 0.8;
    ranks_start(3, run_for_a_while);
    ranks_wait_ready(3);
    for (int r = 0; r < 3; r++) kill(ranks[r].pid, SIGSTOP);
    usleep(1200000);
    for (int r = 0; r < 3; r++) kill(ranks[r].pid, SIGCONT);
    ranks_wait();
    CHECK_QUIET();
}

// The others wait in the same step, or in the next one.
static bool early;
static void hang_in_step_3(int rank) {
    Peers *p = begin();
    for (int64_t step = 0;; step++) {
        bool here = step == 3 && rank == victim;
        peers_at(p, step, "forward");
        if (here && early) pause();
        if (step == 3 && early) usleep(200000);
        peers_at(p, step, "reduce");
        peers_barrier(p);
        if (step == 0) peers_watch(p, limit);
        if (!here) continue;
        peers_at(p, step, "save");
        pause();
    }
}

TEST(a_hang_ends_all_and_the_one_they_wait_for_is_named) {
    limit = 0.8;
    for (int i = 0; i < 4; i++) {
        char says[100];
        victim = i % 2 ? 2 : 0, early = i / 2;
        ranks_start(3, hang_in_step_3);
        double start = test_seconds();
        ranks_wait();
        snprintf(says, sizeof says, "error: rank %d hangs: it has stood still for ", victim);
        for (int r = 0; r < 3; r++) {
            CHECK_RANK(r, EXIT_COMM, says);
            CHECK_RANK(r, EXIT_COMM,
                       early ? " s, at step 3 in forward (this rank: at step 3 in "
                             : " s, at step 3 in save (this rank: at step ");
            CHECK(ranks[r].ended - start < limit + 3);
        }
    }
}

static void rest_unwatched(int rank) {
    Peers *p = begin();
    peers_at(p, 0, "forward");
    peers_barrier(p);
    peers_watch(p, limit);
    peers_watch(p, 0);
    peers_at(p, 1, "save");
    if (rank == 0) usleep(800000);
    peers_barrier(p);
    peers_watch(p, limit);
    peers_at(p, 2, "forward");
    peers_free(p);
}

TEST(while_it_is_not_watched_a_rank_may_take_its_time) {
    limit = 0.4;
    ranks_start(2, rest_unwatched);
    ranks_wait();
    CHECK_QUIET();
}

// ---------------------------------------------------------------------------------------------
// Ends.

static void fail(int rank) {
    Peers *p = begin();
    peers_barrier(p);
    peers_at(p, 7, "update");
    usleep(300000);  // a heartbeat with that
    if (rank == victim) die(EXIT_NONFINITE, "found NaN");
    peers_barrier(p);
}

TEST(a_rank_that_fails_keeps_its_code_and_ends_all_others) {
    for (victim = 0; victim < 3; victim += 2) {
        ranks_start(3, fail);
        ranks_wait();
        for (int r = 0; r < 3; r++) {
            if (r != victim) CHECK_RANK(r, EXIT_COMM, "ended without a goodbye, last seen at step");
        }
        CHECK_RANK(victim, EXIT_NONFINITE, "error: found NaN");
        CHECK(!strstr(ranks[victim].text, "goodbye"));
    }
}

static void sleep_long(void) { sleep(15); }
static void fail_and_hang(int rank) {
    atexit(sleep_long);  // runs after what peers_init registers
    fail(rank);
}

TEST(a_rank_that_fails_and_cannot_exit_is_ended_with_its_code) {
    victim = 1;
    ranks_start(2, fail_and_hang);
    double start = test_seconds();
    ranks_wait();
    CHECK_RANK(0, EXIT_COMM, "rank 1 ended without a goodbye");
    CHECK_RANK(1, EXIT_NONFINITE, "error: found NaN");
    CHECK(ranks[1].ended - start < 5);
    CHECK(ranks[0].ended < ranks[1].ended);  // it need not wait for that
}

static void exit_early(int rank) {
    Peers *p = begin();
    if (rank == 1) exit(0);
    peers_free(p);
}

TEST(an_exit_without_a_goodbye_is_a_loss) {
    ranks_start(3, exit_early);
    ranks_wait();
    for (int r = 0; r < 3; r += 2) CHECK_RANK(r, EXIT_COMM, "rank 1 ended without a goodbye");
    CHECK_INT(ranks[1].code, 0);
}

// A process that a rank forks is no rank.
static void fork_one(int rank) {
    Peers *p = begin();
    if (rank == 1 && fork() == 0) exit(0);
    if (rank == 1) wait(NULL);
    peers_barrier(p);
    peers_free(p);
}

TEST(the_exit_of_a_fork_is_no_loss) {
    ranks_start(2, fork_one);
    ranks_wait();
    CHECK_QUIET();
}

static int order;  // of the ends: one of the 6 of three ranks
static void end_in_order(int rank) {
    static const int late[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2},
                                   {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
    Peers *p = begin();
    peers_barrier(p);
    usleep((useconds_t)(40000 * late[order][rank]));
    peers_free(p);
    usleep((useconds_t)(40000 * late[5 - order][rank]));
}

TEST(a_normal_end_in_every_order) {
    for (order = 0; order < 6; order++) {
        ranks_start(3, end_in_order);
        ranks_wait();
        CHECK_QUIET();
    }
}

static void begin_and_end(int rank) {
    (void)rank;
    peers_free(begin());
}

TEST(a_normal_end_at_once_many_times) {
    for (int i = 0; i < 20; i++) {
        ranks_start(1 + i % 6, begin_and_end);
        ranks_wait();
        CHECK_QUIET();
    }
}

// The others wait in peers_free, and are told when the last one dies.
static void wait_for_the_last(int rank) {
    Peers *p = begin();
    peers_at(p, 9, "save");
    ranks_is_ready();
    if (rank == victim) pause();
    peers_free(p);
}

TEST(a_rank_killed_while_the_others_wait_for_their_end) {
    for (victim = 0; victim < 2; victim++) {
        ranks_start(3, wait_for_the_last);
        ranks_wait_ready(3);
        usleep(300000);
        double start = test_seconds();
        kill(ranks[victim].pid, SIGKILL);
        ranks_wait();
        check_named(3, "ended without a goodbye", start, 3);
    }
}

TEST(a_world_of_one_has_no_connection) {
    LaunchPlace place;
    memset(&place, 0, sizeof place);
    place.world = 1, place.listener = -1;
    Peers *p = peers_init(&place, "", 1);
    int in = 3, out = 0;
    peers_watch(p, 0.01);
    peers_at(p, 1, "forward");
    peers_all_gather(p, &out, &in, sizeof in);
    CHECK_INT(out, 3);
    peers_broadcast(p, &out, sizeof out);
    peers_barrier(p);
    CHECK_INT(p->links, 0);
    peers_free(p);
}

int main(void) {
    shared_count = (int *)mmap(NULL, sizeof *shared_count, PROT_READ | PROT_WRITE,
                               MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    RUN(calls_give_all_ranks_the_same);
    RUN(all_gather_in_place);
    RUN(a_barrier_waits_for_all);
    RUN(ranks_in_different_calls_end);
    RUN(a_killed_rank_ends_all_others);
    RUN(a_killed_rank_ends_the_other);
    RUN(a_stopped_rank_ends_all_others);
    RUN(a_stopped_rank_that_others_wait_for_ends_them);
    RUN(a_run_that_is_stopped_as_a_whole_goes_on);
    RUN(a_hang_ends_all_and_the_one_they_wait_for_is_named);
    RUN(while_it_is_not_watched_a_rank_may_take_its_time);
    RUN(a_rank_that_fails_keeps_its_code_and_ends_all_others);
    RUN(a_rank_that_fails_and_cannot_exit_is_ended_with_its_code);
    RUN(an_exit_without_a_goodbye_is_a_loss);
    RUN(the_exit_of_a_fork_is_no_loss);
    RUN(a_normal_end_in_every_order);
    RUN(a_normal_end_at_once_many_times);
    RUN(a_rank_killed_while_the_others_wait_for_their_end);
    RUN(a_world_of_one_has_no_connection);
    return test_end();
}
