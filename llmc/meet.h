// meet.h: the ranks of a run connect to rank 0, which makes sure that they belong together.
//
//     int fd[links][MEET_LINES];                      // links: world - 1 on rank 0, else 1
//     meet(&place, "what all must be alike in", 60, fd);  // returns when all ranks are there
//
// Rank 0 listens at the place's address and port; each other rank connects once for each line and
// says hello: who it is, of how many, and an identity, a text that must be equal in all ranks. Rank
// 0 answers each hello, and when all have come it tells all. Otherwise all ranks leave with
// EXIT_COMM and one line of why: who is missing, what differs, what else is at the port.
//
// Others may connect too, by mistake or to look for open ports. They are let in, as nobody knows
// who they are, and dropped at their first wrong byte or after some seconds.
#ifndef LLMC_MEET_H
#define LLMC_MEET_H

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "llmc/die.h"     // die, die_alloc, warn, EXIT_COMM
#include "llmc/launch.h"  // LaunchPlace, launch_now

#ifndef MEET_PATIENCE_S
#define MEET_PATIENCE_S 5  // after so long a rank says for whom it waits, and every 10 s then
#endif
#ifndef MEET_GUEST_S
#define MEET_GUEST_S 5.0  // so long may a connection take to say hello
#endif

enum { MEET_CALLS, MEET_WATCH, MEET_LINES };  // what a rank's connections are for
enum { MEET_VERSION = 1, MEET_GUESTS = 64 };

// Sent by a rank on each of its connections. All machines are little-endian.
typedef struct {
    char magic[8];  // MEET_HELLO
    int32_t version, world, rank, line;
    char identity[256];  // NUL-terminated
} MeetHello;
#define MEET_HELLO "peers hi"

// Rank 0's answer; and once more on MEET_CALLS when all have come, or when it gives up.
typedef struct {
    char magic[8];   // MEET_REPLY
    int32_t agreed;  // 0: it is over, for the reason in `text`
    char text[1012];
} MeetReply;
#define MEET_REPLY "peers re"

// How long one waits, and when one says so.
typedef struct {
    int rank;
    double until, speak;  // in seconds of launch_now
} MeetClock;

static inline MeetClock meet_clock(int rank, double timeout) {
    MeetClock clock = {rank, launch_now() + timeout, launch_now() + MEET_PATIENCE_S};
    return clock;
}

// Says, when it is time, for whom this rank waits. Returns whether the time is over.
static inline bool meet_late(MeetClock *clock, const char *whom, const LaunchPlace *place) {
    double now = launch_now();
    if (now >= clock->speak) {
        clock->speak += 2 * MEET_PATIENCE_S;
        fprintf(stderr, "rank %d: waiting for %s at %s:%d\n", clock->rank, whom, place->address,
                place->port);
    }
    return now >= clock->until;
}

static inline void meet_set(int fd, int level, int option, int value) {
    setsockopt(fd, level, option, &value, sizeof value);
}

// The addresses of a name, to be freed with freeaddrinfo; NULL and a reason when there are none.
// name NULL: all of this machine's own.
static inline struct addrinfo *meet_look_up(const char *name, int port, const char **why) {
    struct addrinfo hints, *found = NULL;
    char service[16];
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM, hints.ai_flags = name ? 0 : AI_PASSIVE;
    snprintf(service, sizeof service, "%d", port);
    int failed = getaddrinfo(name, service, &hints, &found);
    if (failed) *why = gai_strerror(failed);
    return failed ? NULL : found;
}

// ---------------------------------------------------------------------------------------------
// A rank other than 0.

// Connects to one of the address's machines; -1 and a reason when none answers.
static inline int meet_connect(const LaunchPlace *place, const char **why) {
    struct addrinfo *all = meet_look_up(place->address, place->port, why);
    struct timeval some = {2, 0}, none = {0, 0};  // to connect takes minutes where packets are lost
    int fd = -1;
    for (struct addrinfo *a = all; a && fd < 0; a = a->ai_next) {
        fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd >= 0) setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &some, sizeof some);
        if (fd >= 0 && !connect(fd, a->ai_addr, a->ai_addrlen)) break;
        *why = errno == EINPROGRESS ? "no answer" : strerror(errno);
        if (fd >= 0) close(fd);
        fd = -1;
    }
    if (all) freeaddrinfo(all);
    if (fd < 0) return -1;
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &none, sizeof none);
    meet_set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    return fd;
}

// Waits for one of rank 0's replies. Returns false, with *why set to a reason, when the connection
// closes or the time is over. A reply that says no ends the program.
static inline bool meet_reply(const LaunchPlace *place, int fd, MeetClock *clock, const char *whom,
                              const char **why) {
    MeetReply r;
    size_t got = 0;
    memset(&r, 0, sizeof r);
    while (got < sizeof r) {
        struct pollfd ready = {fd, POLLIN, 0};
        *why = "it does not reply";
        if (meet_late(clock, whom, place)) return false;
        if (poll(&ready, 1, 100) <= 0) continue;
        ssize_t more = recv(fd, (char *)&r + got, sizeof r - got, MSG_DONTWAIT);
        if (more < 0 && (errno == EAGAIN || errno == EINTR)) continue;
        *why = more < 0 ? strerror(errno) : "it closed the connection";
        if (more <= 0 && got < sizeof r.magic) return false;
        if (more > 0) got += (size_t)more;
        // Where nobody listens at a port of this machine, connect may find its own socket there.
        *why = "it is this rank itself";
        if (got >= sizeof r.magic && !memcmp(r.magic, MEET_HELLO, sizeof r.magic)) return false;
        if (more <= 0 || memcmp(r.magic, MEET_REPLY, got < sizeof r.magic ? got : sizeof r.magic))
            die(EXIT_COMM,
                "%s:%d: found something else that answers, expected rank 0 of this program; set "
                "another MASTER_PORT",
                place->address, place->port);
    }
    r.text[sizeof r.text - 1] = 0;
    if (!r.agreed) die(EXIT_COMM, "rank 0 at %s:%d: %s", place->address, place->port, r.text);
    return true;
}

// Connects, says hello, and again until rank 0 agrees. Returns -1 when there is news on the line
// that was joined before (-1: none was), which can only be that rank 0 gives up.
static inline int meet_join(const LaunchPlace *place, const char *identity, int line, int before,
                            MeetClock *clock, double timeout) {
    MeetHello hello;
    memset(&hello, 0, sizeof hello);
    memcpy(hello.magic, MEET_HELLO, sizeof hello.magic);
    hello.version = MEET_VERSION, hello.line = line;
    hello.world = place->world, hello.rank = place->rank;
    snprintf(hello.identity, sizeof hello.identity, "%s", identity);
    for (const char *why = "";;) {
        int fd = meet_connect(place, &why);
        if (fd >= 0 && send(fd, &hello, sizeof hello, MSG_NOSIGNAL) == (ssize_t)sizeof hello &&
            meet_reply(place, fd, clock, "rank 0", &why))
            return fd;
        if (fd >= 0) close(fd);
        if (meet_late(clock, "rank 0", place))
            die(EXIT_COMM,
                "rank 0 at %s:%d: found none within %g s (%s), expected it to listen there; see "
                "what it printed, and whether this machine reaches that address",
                place->address, place->port, timeout, why);
        struct pollfd news = {before, POLLIN, 0};
        if (poll(&news, 1, 200) > 0) return -1;
    }
}

// ---------------------------------------------------------------------------------------------
// Rank 0.

typedef struct {
    int fd;
    double until;  // its hello must be there
    size_t got;    // bytes of the hello
    MeetHello hello;
} MeetGuest;

typedef struct {
    const LaunchPlace *place;
    const char *identity;
    int listener, guests, missing;  // missing: connections
    MeetGuest guest[MEET_GUESTS];   // connected, hello not read yet
    int (*fd)[MEET_LINES];          // (world - 1): -1 is missing
} MeetHost;

// Listens. Where all ranks are on this machine it does so at the address alone, else at all that
// the machine has: its own name may well be that of an address that the others cannot reach.
static inline int meet_listen(const LaunchPlace *place) {
    const char *why = "no address";
    bool here = place->local_world == place->world;
    struct addrinfo *all = meet_look_up(here ? place->address : NULL, place->port, &why);
    int fd = -1, used = 0;
    for (int want6 = here ? -1 : 1; want6 >= -1 && fd < 0; want6 -= 2) {  // IPv6 takes IPv4, too
        for (struct addrinfo *a = all; a && fd < 0; a = a->ai_next) {
            if (want6 == 1 && a->ai_family != AF_INET6) continue;
            fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
            if (fd < 0) continue;
            meet_set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
            if (a->ai_family == AF_INET6 && !here) meet_set(fd, IPPROTO_IPV6, IPV6_V6ONLY, 0);
            if (!bind(fd, a->ai_addr, a->ai_addrlen) && !listen(fd, SOMAXCONN)) break;
            used |= errno == EADDRINUSE, why = strerror(errno);
            close(fd), fd = -1;
        }
    }
    if (all) freeaddrinfo(all);
    if (fd < 0 && used)
        die(EXIT_COMM, "port %d: found it in use, expected it free; set another MASTER_PORT",
            place->port);
    if (fd < 0)
        die(EXIT_COMM, "rank 0 cannot listen at %s:%d: %s; set MASTER_ADDR to its machine's name",
            place->address, place->port, why);
    return fd;
}

// Sends a reply; one that does not arrive is noticed by what follows.
static inline void meet_answer(int fd, bool agreed, const char *text) {
    MeetReply r;
    memset(&r, 0, sizeof r);
    memcpy(r.magic, MEET_REPLY, sizeof r.magic);
    r.agreed = agreed;
    snprintf(r.text, sizeof r.text, "%s", text);
    send(fd, &r, sizeof r, MSG_NOSIGNAL);
}

// Ends the meeting: all who have come, and the guest if there is one, hear why.
__attribute__((noreturn, format(printf, 3, 4))) static inline void
meet_fail(MeetHost *h, const MeetGuest *g, const char *format, ...) {
    char text[1000];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    for (int i = 0; i < h->place->world - 1; i++)
        if (h->fd[i][MEET_CALLS] >= 0) meet_answer(h->fd[i][MEET_CALLS], false, text);
    if (g) meet_answer(g->fd, false, text);
    die(EXIT_COMM, "%s", text);
}

// "ranks 2, 5 and 9 more"
static inline void meet_missing(const MeetHost *h, char *text, size_t size) {
    int count = 0, listed = 0;
    for (int i = 0; i < h->place->world - 1; i++)
        count += h->fd[i][MEET_CALLS] < 0 || h->fd[i][MEET_WATCH] < 0;
    size_t n = (size_t)snprintf(text, size, "rank%s", count > 1 ? "s" : "");
    for (int i = 0; i < h->place->world - 1 && listed < 16; i++)
        if (h->fd[i][MEET_CALLS] < 0 || h->fd[i][MEET_WATCH] < 0)
            n += (size_t)snprintf(text + n, size - n, "%s %d", listed++ ? "," : "", i + 1);
    if (count > listed) snprintf(text + n, size - n, " and %d more", count - listed);
}

// Judges a hello. Returns whether the connection is kept.
static inline bool meet_welcome(MeetHost *h, MeetGuest *g) {
    const MeetHello *hello = &g->hello;
    int world = h->place->world, rank = hello->rank;
    g->hello.identity[sizeof hello->identity - 1] = 0;
    if (hello->version != MEET_VERSION)
        meet_fail(h, g,
                  "rank %d: found version %d of the protocol, expected %d as in rank 0; run "
                  "the same program everywhere",
                  rank, hello->version, MEET_VERSION);
    if (hello->world != world)
        meet_fail(h, g,
                  "rank %d: found one of a world of %d, expected %d as in rank 0; start all "
                  "with the same number, or, if these are two runs, set another MASTER_PORT for "
                  "one of them",
                  rank, hello->world, world);
    if (rank < 1 || rank >= world || hello->line < 0 || hello->line >= MEET_LINES) return false;
    if (strcmp(hello->identity, h->identity))
        meet_fail(h, g,
                  "rank %d: found '%s', expected '%s' as in rank 0; run the same program "
                  "with the same flags everywhere",
                  rank, hello->identity, h->identity);
    int *fd = &h->fd[rank - 1][hello->line];
    if (*fd >= 0) {
        char text[200];
        snprintf(text, sizeof text,
                 "rank %d: found two of them, expected one; if these are two "
                 "runs, set another MASTER_PORT for one of them",
                 rank);
        warn("%s", text);
        meet_answer(g->fd, false, text);
        return false;
    }
    *fd = g->fd, h->missing--;
    meet_answer(g->fd, true, "");
    return true;
}

// Reads what has come of a guest's hello. Returns false when the guest's place is free again: it is
// one of us, or it is gone.
static inline bool meet_guest(MeetHost *h, MeetGuest *g, bool ready) {
    bool wrong = launch_now() >= g->until;
    if (ready) {
        ssize_t more =
            recv(g->fd, (char *)&g->hello + g->got, sizeof g->hello - g->got, MSG_DONTWAIT);
        if (more < 0 && (errno == EAGAIN || errno == EINTR)) return true;
        if (more > 0) g->got += (size_t)more;
        size_t magic = g->got < sizeof g->hello.magic ? g->got : sizeof g->hello.magic;
        wrong = more <= 0 || memcmp(g->hello.magic, MEET_HELLO, magic);
        if (!wrong && g->got == sizeof g->hello && meet_welcome(h, g)) return false;
        wrong |= g->got == sizeof g->hello;
    }
    if (wrong) close(g->fd);
    return !wrong;
}

static inline void meet_accept(MeetHost *h) {
    int fd = accept(h->listener, NULL, NULL);
    if (fd < 0) return;  // it has gone again
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    MeetGuest *g = &h->guest[h->guests++];
    memset(g, 0, sizeof *g);
    g->fd = fd, g->until = launch_now() + MEET_GUEST_S;
    meet_set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
}

// Waits for a hello, a new connection, or the end of one that was agreed on; for 100 ms at most.
static inline void meet_turn(MeetHost *h, struct pollfd *ready /* (1 + MEET_GUESTS + world) */) {
    int n = 0, links = h->place->world - 1, guests = h->guests, kept = 0;
    for (int i = 0; i < links; i++) ready[n++].fd = h->fd[i][MEET_CALLS];
    for (int i = 0; i < guests; i++) ready[n++].fd = h->guest[i].fd;
    ready[n++].fd = guests < MEET_GUESTS ? h->listener : -1;
    for (int i = 0; i < n; i++) ready[i].events = POLLIN, ready[i].revents = 0;
    if (poll(ready, (nfds_t)n, 100) < 0) return;
    for (int i = 0; i < links; i++)
        if (ready[i].revents)  // it has nothing to say before all have come
            meet_fail(h, NULL, "rank %d left before all ranks had come; see what it printed",
                      i + 1);
    for (int i = 0; i < guests; i++)
        if (meet_guest(h, &h->guest[i], ready[links + i].revents != 0))
            h->guest[kept++] = h->guest[i];
    h->guests = kept;
    if (ready[n - 1].revents) meet_accept(h);
}

static inline void meet_host(const LaunchPlace *place, const char *identity, double timeout,
                             int (*fd)[MEET_LINES]) {
    int links = place->world - 1;
    MeetHost *h = (MeetHost *)die_alloc(1, sizeof *h, "the meeting");
    struct pollfd *ready =
        (struct pollfd *)die_alloc((size_t)(1 + MEET_GUESTS + links), sizeof *ready, "the meeting");
    h->place = place, h->identity = identity, h->fd = fd, h->missing = links * MEET_LINES;
    for (int i = 0; i < links * MEET_LINES; i++) fd[i / MEET_LINES][i % MEET_LINES] = -1;
    h->listener = place->listener >= 0 ? place->listener : meet_listen(place);
    fcntl(h->listener, F_SETFL, O_NONBLOCK);  // a connection may go again before it is accepted
    MeetClock clock = meet_clock(0, timeout);
    while (h->missing) {
        char whom[200];
        meet_missing(h, whom, sizeof whom);
        if (meet_late(&clock, whom, place))
            meet_fail(h, NULL,
                      "%s did not come to %s:%d within %g s; see what they printed, and "
                      "whether their machines reach that address",
                      whom, place->address, place->port, timeout);
        meet_turn(h, ready);
    }
    close(h->listener);
    for (int i = 0; i < h->guests; i++) close(h->guest[i].fd);
    for (int i = 0; i < links; i++) meet_answer(fd[i][MEET_CALLS], true, "");
    free(h), free(ready);
}

// ---------------------------------------------------------------------------------------------

// Connects this rank with rank 0, or rank 0 with all; place->world > 1.
// fd (links, MEET_LINES): rank 0's link i leads to rank i + 1, another rank's only one to rank 0.
// timeout: seconds. Leaves with EXIT_COMM where it does not succeed.
static inline void meet(const LaunchPlace *place, const char *identity, double timeout,
                        int (*fd)[MEET_LINES]) {
    if (strlen(identity) >= sizeof((MeetHello *)0)->identity)
        die(EXIT_INTERNAL, "the identity of a run: found %zu letters, expected up to 255",
            strlen(identity));
    if (place->rank == 0) {
        meet_host(place, identity, timeout, fd);
        return;
    }
    const char *why = "it closed the connection";
    MeetClock clock = meet_clock(place->rank, timeout);
    fd[0][MEET_CALLS] = meet_join(place, identity, MEET_CALLS, -1, &clock, timeout);
    fd[0][MEET_WATCH] = meet_join(place, identity, MEET_WATCH, fd[0][MEET_CALLS], &clock, timeout);
    // Rank 0 may have begun later: it gives up within `timeout` from now, and says for whom.
    clock.until = launch_now() + timeout + 5, clock.speak = clock.until + 1;
    if (!meet_reply(place, fd[0][MEET_CALLS], &clock, "rank 0", &why) || fd[0][MEET_WATCH] < 0)
        die(EXIT_COMM, "rank 0 at %s:%d left before all ranks had come: %s; see what it printed",
            place->address, place->port, why);
}

#endif
