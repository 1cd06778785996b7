// peers.h: the ranks of a run exchange small things through host memory, and notice when one of
// them is gone.
//
//     Peers *p = peers_init(&place, "what all must be alike in", 60);  // llmc/meet.h
//     peers_broadcast(p, &id, sizeof id);                              // of rank 0, to all
//     peers_all_gather(p, all, mine, bytes);                           // all (world, bytes)
//     peers_watch(p, 60);            // from here on, 60 s in one place are a hang
//     peers_at(p, step, "forward");  // the main thread's place
//     peers_free(p);                 // waits for all: a rank that leaves in another way is lost
//
// The calls go through rank 0, to which every rank has a connection. On a second one a thread sends
// a heartbeat a second. When a rank's connection closes, when it is silent or stands still for too
// long, rank 0 tells all which rank it was, and each prints that and ends with EXIT_COMM. It must
// end, and at once: a GPU that waits for a lost rank's part of a sum waits for ever, and so does
// whatever waits for that GPU. In a world of 1 there is neither connection nor thread.
#ifndef LLMC_PEERS_H
#define LLMC_PEERS_H

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "llmc/die.h"     // die, die_alloc, EXIT_COMM
#include "llmc/launch.h"  // LaunchPlace, launch_now
#include "llmc/meet.h"    // meet

#ifndef PEERS_BEAT_MS
#define PEERS_BEAT_MS 1000  // a heartbeat
#endif
#ifndef PEERS_LEAVE_MS
#define PEERS_LEAVE_MS 10000  // so long may a process take that has called exit
#endif

enum { PEERS_BEAT, PEERS_BYE, PEERS_VERDICT };

// A message of the watchdogs.
typedef struct {
    int32_t kind, unused;
    int64_t step, still, limit;  // BEAT: the place, ms since it changed, ms that are a hang (or 0)
    char text[480];              // BEAT: the phase. VERDICT: why all end
} PeersNote;

// The head of a call, from each rank to rank 0 and back. The data follow.
typedef struct {
    uint32_t kind, unused;
    uint64_t number, bytes;
} PeersCall;
enum { PEERS_BARRIER, PEERS_BROADCAST, PEERS_ALL_GATHER, PEERS_FREE };

// The watchdog's side of a connection. All but `fd` is that thread's own.
typedef struct {
    int fd;
    int64_t heard;          // when the last note came
    PeersNote last, begun;  // its last heartbeat; a note of which `got` bytes are here
    size_t got;
    bool bye, gone;  // it said goodbye; its connection is closed
} PeersLink;

typedef struct {
    int rank, world;
    int links;        // world - 1 on rank 0; 1 on others; 0 in a world of 1
    int *calls;       // (links) connections of the main thread
    PeersLink *link;  // (links) rank 0: to rank i + 1; others: to rank 0
    uint64_t number;  // of the next call

    // Read by the watchdog while the main thread writes: PEERS_GET, PEERS_SET.
    int64_t step, moved, limit;  // place; when it changed, ms; ms that are a hang (0: not watched)
    const char *phase;
    int over;     // rank 0: all have called peers_free
    int stop;     // the thread is to end
    int leaving;  // 1 + the code with which this process has called exit

    int64_t woke;     // written by the watchdog: when this process ran again after a pause
    int64_t silence;  // ms without a heartbeat that are a loss while not watched
    int wake;         // eventfd: ends the watchdog's wait
    pthread_t thread;
    pthread_mutex_t lock;  // for sending notes
    pid_t pid;
} Peers;

static Peers *peers_open;  // for peers_on_exit, which can reach nothing else

// Who sees a value sees all that was set before it.
#define PEERS_SET(x, value) __atomic_store_n(&(x), value, __ATOMIC_RELEASE)
#define PEERS_GET(x)        __atomic_load_n(&(x), __ATOMIC_ACQUIRE)

static inline int64_t peers_ms(void) { return (int64_t)(1e3 * launch_now()); }

// ---------------------------------------------------------------------------------------------
// What the main thread tells the watchdog.

// The main thread's place: the phase is a literal, which stays where it is. No system call.
static inline void peers_at(Peers *p, int64_t step, const char *phase) {
    PEERS_SET(p->step, step);
    PEERS_SET(p->phase, phase);
    PEERS_SET(p->moved, peers_ms());
}

// From here on the run ends when a rank stays in one place for `timeout` seconds; 0: it may, as
// during a long save. A rank that is gone or silent ends the run in any case.
static inline void peers_watch(Peers *p, double timeout) {
    int64_t ms = (int64_t)(1e3 * timeout), least = 3 * PEERS_BEAT_MS;
    PEERS_SET(p->moved, peers_ms());  // before the limit: see peers_own
    PEERS_SET(p->limit, ms <= 0 ? 0 : ms < least ? least : ms);
}

// ---------------------------------------------------------------------------------------------
// The end, where a rank is lost.

static inline int peers_rank(const Peers *p, const PeersLink *l) {
    return p->rank ? 0 : (int)(l - p->link) + 1;
}

// The place of a heartbeat: "at step 12 in forward".
static inline const char *peers_where(const PeersNote *n, char *text /* (80) */) {
    if (!*n->text || n->step < 0) return "before its first step";
    snprintf(text, 80, "at step %lld in %.40s", (long long)n->step, n->text);
    return text;
}

// This rank's own heartbeat. now: as of the watchdog's last look at the clock, so that a pause
// after it does not count as time in which the main thread stood still. The limit is read first: a
// new one beside the place from before it would make a hang of the long save that has just ended.
static inline PeersNote peers_own(const Peers *p, int64_t now) {
    PeersNote n;
    memset(&n, 0, sizeof n);
    n.kind = PEERS_BEAT, n.limit = PEERS_GET(p->limit), n.step = PEERS_GET(p->step);
    int64_t moved = PEERS_GET(p->moved), woke = PEERS_GET(p->woke);
    n.still = now - (moved > woke ? moved : woke);
    snprintf(n.text, sizeof n.text, "%s", PEERS_GET(p->phase));
    return n;
}

// Sends a note to all that this rank is linked to. It never waits: one that is not taken finds the
// buffer full, of a process that has not read for many minutes. The caller has p->lock.
static inline void peers_tell(Peers *p, const PeersNote *note) {
    for (int i = 0; i < p->links; i++)
        send(p->link[i].fd, note, sizeof *note, MSG_DONTWAIT | MSG_NOSIGNAL);
}

// Waits until the other sides have read all and closed, `ms` at most: closed with unread bytes, a
// connection may lose what it has just sent.
static inline void peers_drain(Peers *p, int64_t ms) {
    for (int i = 0; i < p->links; i++) shutdown(p->link[i].fd, SHUT_WR);
    int64_t until = peers_ms() + ms;
    for (int i = 0; i < p->links; i++) {
        char unread[4096];
        for (int64_t left; (left = until - peers_ms()) > 0;) {
            struct pollfd ready = {p->link[i].fd, POLLIN, 0};
            if (poll(&ready, 1, (int)left) > 0 &&
                recv(p->link[i].fd, unread, sizeof unread, MSG_DONTWAIT) <= 0)
                break;
        }
    }
}

// Where the main thread has called exit, the process ends with that code, now or, if exit does not
// come to its end, after a while.
static inline void peers_let_leave(const Peers *p) {
    if (!PEERS_GET(p->leaving)) return;
    poll(NULL, 0, PEERS_LEAVE_MS);
    _exit(PEERS_GET(p->leaving) - 1);
}

// Ends this process, and those it is linked to, for a reason that all print. May be called by both
// threads: the first one does it, and the lock stays taken. Not by die: its exit would run what
// others have registered, as GPU libraries do, which may wait for ever; and a stream's lock may be
// held by the main thread.
__attribute__((noreturn, format(printf, 2, 3))) static inline void
peers_end(Peers *p, const char *format, ...) {
    pthread_mutex_lock(&p->lock);
    peers_let_leave(p);
    PeersNote note, own = peers_own(p, 0);
    memset(&note, 0, sizeof note);
    note.kind = PEERS_VERDICT;
    va_list args;
    va_start(args, format);
    vsnprintf(note.text, sizeof note.text, format, args);
    va_end(args);
    peers_tell(p, &note);
    char line[700], place[80];
    int n = snprintf(line, sizeof line, "[rank %d] error: %s (this rank: %s)\n", p->rank, note.text,
                     peers_where(&own, place));
    struct pollfd room = {STDERR_FILENO, POLLOUT, 0};  // nobody may be reading
    if (poll(&room, 1, 1000) > 0 && write(STDERR_FILENO, line, (size_t)n) < 0) n = 0;
    peers_drain(p, 500);
    _exit(EXIT_COMM);
}

// ---------------------------------------------------------------------------------------------
// The watchdog.

// Reads what has come on a link.
static inline void peers_hear(Peers *p, PeersLink *l, int64_t now) {
    char place[80];
    for (;;) {
        ssize_t got =
            recv(l->fd, (char *)&l->begun + l->got, sizeof l->begun - l->got, MSG_DONTWAIT);
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (got <= 0) {
            l->gone = true;
            if (l->bye || PEERS_GET(p->over)) return;
            peers_end(p,
                      "rank %d ended without a goodbye, last seen %s; it was killed, or says "
                      "itself why",
                      peers_rank(p, l), peers_where(&l->last, place));
        }
        l->got += (size_t)got;
        if (l->got < sizeof l->begun) continue;
        l->got = 0, l->heard = now;
        l->begun.text[sizeof l->begun.text - 1] = 0;
        if (l->begun.kind == PEERS_VERDICT) peers_end(p, "%s", l->begun.text);
        if (l->begun.kind == PEERS_BYE) l->bye = true;
        if (l->begun.kind == PEERS_BEAT) l->last = l->begun;
    }
}

// A link without a heartbeat: a process that is stopped, a machine or a network that is gone.
static inline void peers_check_silence(Peers *p, int64_t now) {
    int64_t limit = PEERS_GET(p->limit);
    char place[80];
    if (limit == 0) limit = p->silence;
    for (PeersLink *l = p->link; l < p->link + p->links; l++)
        if (!l->gone && now - l->heard > limit)
            peers_end(p,
                      "rank %d has been silent for %.1f s, last seen %s; its process is stopped "
                      "or its machine cannot be reached",
                      peers_rank(p, l), 1e-3 * (double)(now - l->heard),
                      peers_where(&l->last, place));
}

// Rank 0: a rank stands still for longer than it may. The others wait for it and soon stand still,
// too: to blame is the one that is at the lowest step, and among these the first that stood still.
static inline void peers_check_hang(Peers *p, int64_t now) {
    PeersNote worst = peers_own(p, now);
    bool hang = worst.limit && worst.still > worst.limit;
    int rank = 0;
    char place[80];
    for (PeersLink *l = p->link; l < p->link + p->links; l++) {
        PeersNote n = l->last;
        hang |= n.limit && n.still > n.limit;
        n.still += now - l->heard;
        if (n.step < worst.step || (n.step == worst.step && n.still > worst.still))
            worst = n, rank = peers_rank(p, l);
    }
    if (hang)
        peers_end(p, "rank %d hangs: it has stood still for %.1f s, %s", rank,
                  1e-3 * (double)worst.still, peers_where(&worst, place));
}

// After a pause in which this process did not run (Ctrl-Z, too much load) all notes are late.
static inline void peers_forgive(Peers *p, int64_t now) {
    PEERS_SET(p->woke, now);
    for (int i = 0; i < p->links; i++) p->link[i].heard = now;
}

static inline void *peers_watchdog(void *context) {
    Peers *p = (Peers *)context;
    struct pollfd *ready =
        (struct pollfd *)die_alloc((size_t)p->links + 1, sizeof *ready, "the watchdog");
    ready[p->links].fd = p->wake;
    for (int i = 0; i <= p->links; i++) ready[i].events = POLLIN;
    for (int64_t now = peers_ms(), last = now, next = now; !PEERS_GET(p->stop); last = now) {
        for (int i = 0; i < p->links; i++) ready[i].fd = p->link[i].gone ? -1 : p->link[i].fd;
        int found = poll(ready, (nfds_t)p->links + 1, next > now ? (int)(next - now) : 0);
        peers_let_leave(p);
        now = peers_ms();
        if (now - last > 3 * PEERS_BEAT_MS) peers_forgive(p, now);
        for (int i = 0; i < p->links; i++)
            if (found > 0 && ready[i].revents) peers_hear(p, &p->link[i], now);
        peers_check_silence(p, now);
        if (p->rank == 0) peers_check_hang(p, now);
        if (now < next) continue;
        PeersNote beat = peers_own(p, now);
        pthread_mutex_lock(&p->lock);
        peers_tell(p, &beat);
        pthread_mutex_unlock(&p->lock);
        next = now + PEERS_BEAT_MS;
    }
    free(ready);
    return NULL;
}

// Called by exit, as from die: the others are to know at once, and this process is to keep its own
// code, even where a GPU library's own exit waits for ranks that have left by then.
static inline void peers_on_exit(int code, void *unused) {
    (void)unused;
    Peers *p = peers_open;
    if (!p || p->pid != getpid()) return;  // a fork's copy
    PEERS_SET(p->leaving, code + 1);
    for (int i = 0; i < p->links; i++) shutdown(p->link[i].fd, SHUT_RDWR);
    eventfd_write(p->wake, 1);
}

// ---------------------------------------------------------------------------------------------
// The calls. In each, every rank sends a head and its data to rank 0, which compares the heads, and
// gets one back with the result.

// The main thread has lost the connection to a rank. The watchdog knows it, too, or is about to,
// and knows more.
__attribute__((noreturn)) static inline void peers_lost(Peers *p, int link) {
    poll(NULL, 0, 3000);
    peers_end(p, "rank %d closed its connection", peers_rank(p, &p->link[link]));
}

static inline void peers_send(Peers *p, int link, const void *data, size_t bytes, bool more) {
    for (size_t done = 0; done < bytes;) {
        ssize_t put = send(p->calls[link], (const char *)data + done, bytes - done,
                           MSG_NOSIGNAL | (more ? MSG_MORE : 0));
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) peers_lost(p, link);
        done += (size_t)put;
    }
}

static inline void peers_receive(Peers *p, int link, void *data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        ssize_t got = recv(p->calls[link], (char *)data + done, bytes - done, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) peers_lost(p, link);
        done += (size_t)got;
    }
}

static inline const char *peers_call_text(const PeersCall *c, char *text /* (80) */) {
    static const char *names[] = {"barrier", "broadcast", "all_gather", "free"};
    snprintf(text, 80, "peers_%s of %llu bytes, call %llu", c->kind < 4 ? names[c->kind] : "?",
             (unsigned long long)c->bytes, (unsigned long long)c->number);
    return text;
}

// Receives a head and sees that the other rank is in the same call.
static inline void peers_receive_head(Peers *p, int link, const PeersCall *own) {
    PeersCall found;
    char a[80], b[80];
    peers_receive(p, link, &found, sizeof found);
    if (!memcmp(&found, own, sizeof found)) return;
    peers_end(p, "rank %d: found %s, expected %s as in rank %d; the ranks do not do the same",
              peers_rank(p, &p->link[link]), peers_call_text(&found, a), peers_call_text(own, b),
              p->rank);
}

// Rank 0 knows that all have come to their end: from here on a connection may close.
static inline void peers_say_bye(Peers *p) {
    PeersNote bye;
    memset(&bye, 0, sizeof bye);
    bye.kind = PEERS_BYE;
    PEERS_SET(p->over, 1);
    pthread_mutex_lock(&p->lock);
    peers_tell(p, &bye);
    pthread_mutex_unlock(&p->lock);
}

// One call. bytes: as the caller gave it, equal in all ranks.
static inline void peers_call(Peers *p, uint32_t kind, size_t bytes, const void *in,
                              size_t in_bytes,                // sent by each rank but 0
                              void *out, size_t out_bytes) {  // received by each rank but 0
    PeersCall head;
    memset(&head, 0, sizeof head);
    head.kind = kind, head.number = p->number++, head.bytes = bytes;
    if (p->rank) {
        peers_send(p, 0, &head, sizeof head, in_bytes > 0);
        peers_send(p, 0, in, in_bytes, false);
        peers_receive_head(p, 0, &head);
        peers_receive(p, 0, out, out_bytes);
        return;
    }
    for (int i = 0; i < p->links; i++) {
        peers_receive_head(p, i, &head);
        if (in_bytes) peers_receive(p, i, (char *)out + (size_t)(i + 1) * in_bytes, in_bytes);
    }
    if (kind == PEERS_FREE) peers_say_bye(p);
    for (int i = 0; i < p->links; i++) {
        peers_send(p, i, &head, sizeof head, out_bytes > 0);
        peers_send(p, i, out, out_bytes, false);
    }
}

// Returns when all ranks have called it.
static inline void peers_barrier(Peers *p) { peers_call(p, PEERS_BARRIER, 0, NULL, 0, NULL, 0); }

// Gives all ranks the data of rank 0.
static inline void peers_broadcast(Peers *p, void *data, size_t bytes) {
    peers_call(p, PEERS_BROADCAST, bytes, NULL, 0, data, bytes);
}

// Gives all ranks the data of all, in the order of the ranks.
static inline void peers_all_gather(Peers *p, void *out /* (world, bytes) */,
                                    const void *in /* (bytes) */, size_t bytes) {
    if (p->rank == 0 && bytes) memmove(out, in, bytes);
    peers_call(p, PEERS_ALL_GATHER, bytes, in, bytes, out, (size_t)p->world * bytes);
}

// ---------------------------------------------------------------------------------------------

// Waits for all ranks, `timeout` seconds at most. From here on a rank that leaves without
// peers_free ends the run, and so does one that is silent for that long, or for as long as
// peers_watch says. identity: up to 255 letters, equal in all ranks. One at a time.
static inline Peers *peers_init(const LaunchPlace *place, const char *identity, double timeout) {
    Peers *p = (Peers *)die_alloc(1, sizeof *p, "the ranks' connections");
    p->rank = place->rank, p->world = place->world, p->phase = "", p->step = -1;
    if (p->world == 1) return p;
    p->links = p->rank ? 1 : p->world - 1, p->pid = getpid();
    p->calls = (int *)die_alloc((size_t)p->links, sizeof *p->calls, "connections");
    p->link = (PeersLink *)die_alloc((size_t)p->links, sizeof *p->link, "connections");
    int(*fd)[MEET_LINES] =
        (int(*)[MEET_LINES])die_alloc((size_t)p->links, sizeof *fd, "connections");
    meet(place, identity, timeout, fd);
    for (int i = 0; i < p->links; i++) {
        p->calls[i] = fd[i][MEET_CALLS], p->link[i].fd = fd[i][MEET_WATCH];
        p->link[i].heard = peers_ms(), p->link[i].last.step = -1;
    }
    free(fd);
    p->silence = (int64_t)(1e3 * timeout);
    if (p->silence < 3 * PEERS_BEAT_MS) p->silence = 3 * PEERS_BEAT_MS;
    p->wake = eventfd(0, EFD_CLOEXEC);
    pthread_mutex_init(&p->lock, NULL);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&p->thread, NULL, peers_watchdog, p);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed || p->wake < 0)
        die(EXIT_INTERNAL, "cannot start the watchdog: %s", strerror(failed ? failed : errno));
    static bool registered;
    if (!registered) on_exit(peers_on_exit, NULL);
    registered = true, peers_open = p;
    return p;
}

// Waits until all ranks have called it, however long their ends take, and takes leave.
static inline void peers_free(Peers *p) {
    if (p->world > 1) {
        peers_watch(p, 0);
        peers_call(p, PEERS_FREE, 0, NULL, 0, NULL, 0);
        PEERS_SET(p->stop, 1);
        if (eventfd_write(p->wake, 1)) die(EXIT_INTERNAL, "cannot end the watchdog");
        pthread_join(p->thread, NULL);
        peers_open = NULL;
        peers_drain(p, 2000);
        for (int i = 0; i < p->links; i++) close(p->link[i].fd), close(p->calls[i]);
        close(p->wake);
        pthread_mutex_destroy(&p->lock);
    }
    free(p->calls), free(p->link), free(p);
}

#endif
