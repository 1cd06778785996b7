// test_meet.c: how the ranks of a run find each other (llmc/meet.h): late, at names of several
// kinds, with strangers at the door; and what each says when one is missing or is not of the run.
#define MEET_PATIENCE_S 0.4
#define MEET_GUEST_S    0.5
#include "dev/test/ranks.h"
#include "llmc/meet.h"

static double timeout = 10;

// Meets and, to see that each line leads to the right rank, sends the ranks' numbers over them.
static void meet_and_talk(const char *identity) {
    int fd[RANKS_MAX][MEET_LINES], rank = ranks_place.rank,
                                   links = rank ? 1 : ranks_place.world - 1;
    meet(&ranks_place, identity, timeout, fd);
    for (int i = 0; i < links * MEET_LINES; i++) {
        int line = i % MEET_LINES, mine[2] = {rank, line}, theirs[2] = {-1, -1};
        int peer = rank ? 0 : i / MEET_LINES + 1, *f = fd[i / MEET_LINES];
        if (write(f[line], mine, sizeof mine) != (ssize_t)sizeof mine) exit(1);
        if (recv(f[line], theirs, sizeof theirs, MSG_WAITALL) != (ssize_t)sizeof theirs) exit(1);
        if (theirs[0] != peer || theirs[1] != line) die(EXIT_INTERNAL, "wrong peer");
        if (!(fcntl(f[line], F_GETFD) & FD_CLOEXEC)) die(EXIT_INTERNAL, "open after exec");
    }
}

static void meet_well(int rank) {
    (void)rank;
    meet_and_talk("a test");
}

static void start_closed(int world, void (*body)(int rank)) {
    ranks_begin_closed();
    for (int rank = 0; rank < world; rank++) ranks_fork(rank, world, body);
    ranks_forked(world);
}

// ---------------------------------------------------------------------------------------------
// They meet.

TEST(ranks_meet_at_a_socket_that_listens_already) {
    for (int world = 2; world <= RANKS_MAX; world += 3) {
        ranks_start(world, meet_well);
        ranks_wait();
        CHECK_QUIET();
    }
}

static int last;  // this rank comes late
static void come_late(int rank) {
    if (rank == last) usleep(600000);
    meet_and_talk("a test");
}

TEST(a_rank_may_come_late_and_the_others_say_for_whom_they_wait) {
    for (last = 0; last < 4; last += 2) {
        if (last)
            ranks_start(4, come_late);
        else
            start_closed(4, come_late);  // the others come before there is anything to connect to
        ranks_wait();
        for (int r = 0; r < 4; r++) {
            char says[100];
            snprintf(says, sizeof says, "rank %d: waiting for rank %d at 127.0.0.1:%d\n", r, last,
                     ranks_place.port);
            bool waits = r != last && (last == 0 || r == 0);
            CHECK_RANK(r, 0, waits ? says : "");
        }
    }
}

static const char *address;
static bool on_other_machines;
static void meet_at_address(int rank) {
    (void)rank;
    strcpy(ranks_place.address, address);
    if (on_other_machines) ranks_place.local_world = 1, ranks_place.local_rank = 0;
    meet_and_talk("a test");
}

TEST(ranks_meet_at_names_and_numbers_of_both_kinds) {
    static const char *names[] = {"localhost", "127.0.0.1", "::1"};
    int six = socket(AF_INET6, SOCK_STREAM, 0);
    struct sockaddr_in6 one;
    memset(&one, 0, sizeof one);
    one.sin6_family = AF_INET6, one.sin6_addr = in6addr_loopback;
    bool has6 = six >= 0 && !bind(six, (struct sockaddr *)&one, sizeof one);
    if (six >= 0) close(six);
    for (int i = 0; i < 6; i++) {
        address = names[i / 2], on_other_machines = i % 2;
        if (strchr(address, ':') && !has6) continue;
        start_closed(3, meet_at_address);
        ranks_wait();
        for (int r = 0; r < 3; r++) CHECK_INT(ranks[r].code, 0);  // (it may say that it waits)
    }
}

// Connects to where the ranks meet.
static int stranger(const void *says, size_t bytes) {
    const char *why = "";
    int fd = meet_connect(&ranks_place, &why);
    if (fd < 0 || send(fd, says, bytes, MSG_NOSIGNAL) != (ssize_t)bytes)
        CHECK(!"the stranger connects");
    return fd;
}

TEST(strangers_hold_nobody_up) {
    static const char http[] = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    MeetHello odd;
    memset(&odd, 0, sizeof odd);
    memcpy(odd.magic, MEET_HELLO, sizeof odd.magic);
    odd.version = MEET_VERSION, odd.world = 3, odd.rank = 7;  // no such rank
    int fd[6];
    double start = test_seconds();
    ranks_begin();
    fd[0] = stranger("", 0);  // says nothing
    fd[1] = stranger(http, sizeof http);
    fd[2] = stranger(MEET_HELLO, 8);  // half a hello
    fd[3] = stranger("pe", 2);
    fd[4] = stranger(&odd, sizeof odd);
    fd[5] = stranger(http, 4);
    close(fd[5]);  // at once
    for (int rank = 0; rank < 3; rank++) ranks_fork(rank, 3, meet_well);
    ranks_forked(3);
    ranks_wait();
    CHECK_QUIET();
    CHECK(test_seconds() - start < 3);
    for (int i = 0; i < 5; i++) close(fd[i]);
}

// More than there are places for: they wait outside until those inside have had their time.
TEST(many_silent_strangers_only_take_time) {
    int fd[MEET_GUESTS + 5];
    ranks_begin();
    for (int i = 0; i < MEET_GUESTS + 5; i++) fd[i] = stranger("", 0);
    for (int rank = 0; rank < 2; rank++) ranks_fork(rank, 2, meet_well);
    ranks_forked(2);
    ranks_wait();
    for (int r = 0; r < 2; r++) CHECK_INT(ranks[r].code, 0);
    for (int i = 0; i < MEET_GUESTS + 5; i++) close(fd[i]);
}

// ---------------------------------------------------------------------------------------------
// They do not.

TEST(missing_ranks_are_named_to_all) {
    timeout = 0.6;
    ranks_begin();
    for (int rank = 0; rank < 6; rank++)
        if (rank != 2 && rank != 5) ranks_fork(rank, 6, meet_well);
    ranks[2].pid = ranks[5].pid = 0;
    ranks_forked(6);
    ranks_wait();
    for (int r = 0; r < 6; r++)
        if (r != 2 && r != 5) CHECK_RANK(r, EXIT_COMM, "ranks 2, 5 did not come to 127.0.0.1:");
    CHECK(strstr(ranks[0].text, "rank 0: waiting for ranks 2, 5 at 127.0.0.1:"));
}

TEST(a_missing_rank_0_is_named) {
    timeout = 0.6;
    ranks_begin_closed();
    for (int rank = 1; rank < 3; rank++) ranks_fork(rank, 3, meet_well);
    ranks[0].pid = 0;
    ranks_forked(3);
    ranks_wait();
    for (int r = 1; r < 3; r++) {
        CHECK_RANK(r, EXIT_COMM, ": waiting for rank 0 at 127.0.0.1:");
        CHECK_RANK(r, EXIT_COMM, "error: rank 0 at 127.0.0.1:");
        CHECK_RANK(r, EXIT_COMM, "found none within 0.6 s (Connection refused), expected it to");
    }
}

static void stay_away(int rank) {
    if (rank == 2) pause();
    meet_and_talk("a test");
}

TEST(a_rank_that_dies_before_all_have_come_is_named) {
    timeout = 10;
    ranks_start(4, stay_away);
    usleep(200000);
    kill(ranks[1].pid, SIGKILL);
    ranks_wait_but(2);
    CHECK_RANK(0, EXIT_COMM, "rank 1 left before all ranks had come");
    CHECK_RANK(3, EXIT_COMM, "rank 1 left before all ranks had come");
    kill(ranks[2].pid, SIGKILL);
    ranks_wait();
}

TEST(when_rank_0_dies_before_all_have_come_it_is_named) {
    timeout = 10;
    ranks_start(3, stay_away);
    usleep(200000);
    kill(ranks[0].pid, SIGKILL);
    ranks_wait_but(2);
    CHECK_RANK(1, EXIT_COMM, "left before all ranks had come: ");
    CHECK_RANK(1, EXIT_COMM, "error: rank 0 at 127.0.0.1:");
    kill(ranks[2].pid, SIGKILL);
    ranks_wait();
}

static void differ_in_identity(int rank) {
    meet_and_talk(rank == 2 ? "speedrun.c 2, NCCL 2.20" : "speedrun.c 1, NCCL 2.28");
}

TEST(a_different_identity_ends_all_and_both_are_shown) {
    timeout = 0.6;  // for those that come when rank 0 has gone
    ranks_start(4, differ_in_identity);
    ranks_wait();
    for (int r = 0; r < 4; r += 2)
        CHECK_RANK(r, EXIT_COMM,
                   "rank 2: found 'speedrun.c 2, NCCL 2.20', expected 'speedrun.c 1, NCCL 2.28' as "
                   "in rank 0; run the same program");
    for (int r = 1; r < 4; r += 2) CHECK_INT(ranks[r].code, EXIT_COMM);
}

static void differ_in_world(int rank) {
    if (rank == 1) ranks_place.world = 8;
    meet_and_talk("a test");
}

TEST(a_different_world_ends_all) {
    ranks_start(2, differ_in_world);
    ranks_wait();
    for (int r = 0; r < 2; r++)
        CHECK_RANK(r, EXIT_COMM, "rank 1: found one of a world of 8, expected 2 as in rank 0");
}

TEST(another_version_ends_rank_0) {
    MeetHello odd;
    memset(&odd, 0, sizeof odd);
    memcpy(odd.magic, MEET_HELLO, sizeof odd.magic);
    odd.version = 99, odd.world = 2, odd.rank = 1;
    ranks_begin();
    int fd = stranger(&odd, sizeof odd);
    ranks_fork(0, 2, meet_well);
    ranks_forked(1);
    ranks_wait();
    CHECK_RANK(0, EXIT_COMM, "rank 1: found version 99 of the protocol, expected 1 as in rank 0");
    MeetReply r;
    CHECK_INT(recv(fd, &r, sizeof r, MSG_WAITALL), sizeof r);
    CHECK(!r.agreed && strstr(r.text, "found version 99"));
    close(fd);
}

// Rank 1 of two runs that meet at one port: the second is refused, the first waits for rank 2.
static void come_twice(int rank) {
    if (rank == 2) usleep(200000), ranks_place.rank = 1;
    meet_and_talk("a test");
}

TEST(a_rank_that_is_there_twice_is_refused) {
    timeout = 0.8;
    ranks_start(3, come_twice);
    ranks_wait();
    CHECK_RANK(0, EXIT_COMM, "warning: rank 1: found two of them, expected one; if these are two");
    for (int r = 0; r < 2; r++) CHECK_RANK(r, EXIT_COMM, "rank 2 did not come to 127.0.0.1:");
    CHECK_RANK(2, EXIT_COMM,
               "rank 1: found two of them, expected one; if these are two runs, set "
               "another MASTER_PORT for one of them");
}

// Rank 0 of another run.
TEST(a_port_in_use_is_an_error_at_once) {
    double start = test_seconds();
    ranks_begin();
    int listener = ranks_place.listener;
    ranks_place.listener = -1;
    ranks_fork(0, 2, meet_well);
    ranks_forked(1);
    ranks_wait();
    char says[100];
    snprintf(says, sizeof says,
             "error: port %d: found it in use, expected it free; set another "
             "MASTER_PORT",
             ranks_place.port);
    CHECK_RANK(0, EXIT_COMM, says);
    CHECK(test_seconds() - start < 1);
    close(listener);
}

TEST(an_address_of_another_machine_is_an_error) {
    ranks_begin_closed();
    strcpy(ranks_place.address, "192.0.2.77");  // of no machine: for documentation
    ranks_fork(0, 2, meet_well);
    ranks_forked(1);
    ranks_wait();
    CHECK_RANK(0, EXIT_COMM, "rank 0 cannot listen at 192.0.2.77:");
}

// A server of another kind at the port: it answers with something, or closes without a word.
TEST(something_else_that_answers_is_noticed) {
    static const char *answers[] = {"HTTP/1.1 400 Bad Request\r\n\r\n", "SSH", ""};
    timeout = 0.6;
    for (int i = 0; i < 3; i++) {
        char unread[sizeof(MeetHello)];
        ranks_begin();
        ranks[0].pid = 0;
        ranks_fork(1, 2, meet_well);
        int fd = accept(ranks_place.listener, NULL, NULL);
        CHECK_INT(recv(fd, unread, sizeof unread, MSG_WAITALL), sizeof unread);
        CHECK(write(fd, answers[i], strlen(answers[i])) >= 0);
        close(fd);
        ranks_forked(2);
        ranks_wait();
        CHECK_RANK(1, EXIT_COMM,
                   *answers[i] ? "found something else that answers, expected rank 0"
                               : "found none within 0.6 s");
    }
}

// Rank 0 gives up while rank 1 has one connection and is about to make the other.
TEST(a_rank_between_its_connections_hears_why_it_ends) {
    char hello[sizeof(MeetHello)];
    timeout = 10;
    double start = test_seconds();
    ranks_begin();
    ranks[0].pid = 0;
    ranks_fork(1, 2, meet_well);
    int fd = accept(ranks_place.listener, NULL, NULL);
    CHECK_INT(recv(fd, hello, sizeof hello, MSG_WAITALL), sizeof hello);
    ranks_forked(2);
    meet_answer(fd, true, "");
    usleep(300000);
    meet_answer(fd, false, "this is why");
    close(fd);
    ranks_wait();
    CHECK_RANK(1, EXIT_COMM, ": this is why\n");
    CHECK(test_seconds() - start < 5);
}

// What a socket that is connected to itself would send: not an answer, and no reason to give up.
TEST(an_echo_of_the_hello_is_no_answer) {
    char hello[sizeof(MeetHello)];
    timeout = 0.6;
    ranks_begin();
    ranks[0].pid = 0;
    ranks_fork(1, 2, meet_well);
    int fd = accept(ranks_place.listener, NULL, NULL);
    CHECK_INT(recv(fd, hello, sizeof hello, MSG_WAITALL), sizeof hello);
    ranks_forked(2);
    CHECK_INT(write(fd, hello, sizeof hello), sizeof hello);
    ranks_wait();
    close(fd);
    CHECK_RANK(1, EXIT_COMM, "found none within 0.6 s (");
}

int main(void) {
    RUN(ranks_meet_at_a_socket_that_listens_already);
    RUN(a_rank_may_come_late_and_the_others_say_for_whom_they_wait);
    RUN(ranks_meet_at_names_and_numbers_of_both_kinds);
    RUN(strangers_hold_nobody_up);
    RUN(many_silent_strangers_only_take_time);
    RUN(missing_ranks_are_named_to_all);
    RUN(a_missing_rank_0_is_named);
    RUN(a_rank_that_dies_before_all_have_come_is_named);
    RUN(when_rank_0_dies_before_all_have_come_it_is_named);
    RUN(a_different_identity_ends_all_and_both_are_shown);
    RUN(a_different_world_ends_all);
    RUN(another_version_ends_rank_0);
    RUN(a_rank_that_is_there_twice_is_refused);
    RUN(a_port_in_use_is_an_error_at_once);
    RUN(an_address_of_another_machine_is_an_error);
    RUN(something_else_that_answers_is_noticed);
    RUN(a_rank_between_its_connections_hears_why_it_ends);
    RUN(an_echo_of_the_hello_is_no_answer);
    return test_end();
}
