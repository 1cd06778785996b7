// dist.h: what ranks, the processes that train one model together, do with one another in host
// memory. How depends on the build; without both there is one rank, which this costs nothing:
//
//     USE_NCCL   peers.h: by TCP through rank 0, which also watches that all are alive. Started by
//                mpirun, srun, torchrun, or by --gpus. (What is large goes between GPUs: dist.cuh.)
//     USE_MPI    MPI, also for what is large. Started by mpirun.
//
//     mpirun -np 4 build/train_gpt2 ...        build/train_gpt2cu --gpus 8 ...
//
// SUMS are added in the order of ranks, by whoever needs them, of numbers that come as they are. So
// the same ranks give the same bits, whatever way messages take, and no rank gets other bits than
// the next. (MPI_Reduce may add in any order.)
//
// All ranks call the same functions in the same order, or wait for each other forever.
#ifndef LLMC_DIST_H
#define LLMC_DIST_H

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined USE_NCCL
#include <nccl.h>

#include "llmc/launch.h"  // LaunchPlace, launch_place, launch_spawn
#include "llmc/peers.h"   // peers_init, peers_all_gather, peers_broadcast, peers_watch
#elif defined USE_MPI
#define OMPI_SKIP_MPICXX 1  // not its C++ classes, which need a library of their own
#include <mpi.h>
#endif

#include "llmc/die.h"  // die, die_rank, EXIT_COMM

typedef struct {
    int rank, world;
    int local;     // rank among those of the same machine
    float *parts;  // (world, DIST_CHUNK): numbers of all ranks, to be added
#ifdef USE_NCCL
    LaunchPlace place;
    Peers *peers;
#endif
} Dist;

#define DIST_ALL   (-1)
#define DIST_CHUNK ((size_t)1 << 18)  // numbers that are added at once

// ---------------------------------------------------------------------------------------------
// By peers.h. What is sent: `in` of every rank to rank `to`, or to all, as out (world, bytes), by
// rank; bytes of rank `from` to all others; nothing, but that all have come here.

#if defined USE_NCCL

static inline void dist_place_find(Dist *d) {
    d->place = launch_place();
    d->rank = d->place.rank, d->world = d->place.world, d->local = d->place.local_rank;
}
static inline void dist_connect(Dist *d, const char *identity, double timeout) {
    char all[256];
    int nccl = 0;
    ncclGetVersion(&nccl);
    snprintf(all, sizeof all, "NCCL %d, %s", nccl, identity);
    d->peers = peers_init(&d->place, all, timeout);
}
static inline void dist_leave(Dist *d) {
    if (d->peers) peers_free(d->peers);
}
static inline int dist_spawn(int count, char **argv) { return launch_spawn(count, argv); }
static inline void dist_watch(const Dist *d, double timeout) {
    if (d->world > 1) peers_watch(d->peers, timeout);
}
static inline void dist_at(const Dist *d, int64_t step, const char *phase) {
    if (d->world > 1) peers_at(d->peers, step, phase);
}
static inline void dist_send_gather(const Dist *d, void *out, const void *in, int bytes, int to) {
    (void)to;  // all get it
    peers_all_gather(d->peers, out, in, (size_t)bytes);
}
static inline void dist_send_broadcast(const Dist *d, void *data, int bytes, int from) {
    if (from) die(EXIT_INTERNAL, "dist_broadcast: found rank %d, expected 0", from);
    peers_broadcast(d->peers, data, (size_t)bytes);
}
static inline void dist_send_barrier(const Dist *d) { peers_barrier(d->peers); }

// ---------------------------------------------------------------------------------------------
// The same by MPI, which watches by itself.

#elif defined USE_MPI

#define MPI_CHECK(call) dist_check(call, #call, __FILE__, __LINE__)
static inline void dist_check(int error, const char *what, const char *file, int line) {
    char reason[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    if (error == MPI_SUCCESS) return;
    MPI_Error_string(error, reason, &length);
    die(EXIT_COMM, "%s:%d: %s: %s", file, line, what, reason);
}
static inline void dist_place_find(Dist *d) {
    const char *world = getenv("OMPI_COMM_WORLD_SIZE");
    if (!world || atoi(world) == 1) return;
    MPI_CHECK(MPI_Init(NULL, NULL));
    MPI_CHECK(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
    MPI_CHECK(MPI_Comm_rank(MPI_COMM_WORLD, &d->rank));
    MPI_CHECK(MPI_Comm_size(MPI_COMM_WORLD, &d->world));
}
static inline void dist_connect(Dist *d, const char *identity, double timeout) {
    (void)d, (void)identity, (void)timeout;
}
static inline void dist_leave(Dist *d) {
    if (d->world > 1) MPI_CHECK(MPI_Finalize());
}
static inline int dist_spawn(int count, char **argv) {
    (void)argv;
    die(EXIT_USAGE, "--gpus: found %d, but this program trains on CPUs; start it by mpirun -np %d",
        count, count);
}
static inline void dist_watch(const Dist *d, double timeout) { (void)d, (void)timeout; }
static inline void dist_at(const Dist *d, int64_t step, const char *phase) {
    (void)d, (void)step, (void)phase;
}
static inline void dist_send_gather(const Dist *d, void *out, const void *in, int bytes, int to) {
    (void)d;
    if (to == DIST_ALL)
        MPI_CHECK(MPI_Allgather(in, bytes, MPI_BYTE, out, bytes, MPI_BYTE, MPI_COMM_WORLD));
    else
        MPI_CHECK(MPI_Gather(in, bytes, MPI_BYTE, out, bytes, MPI_BYTE, to, MPI_COMM_WORLD));
}
static inline void dist_send_broadcast(const Dist *d, void *data, int bytes, int from) {
    (void)d;
    MPI_CHECK(MPI_Bcast(data, bytes, MPI_BYTE, from, MPI_COMM_WORLD));
}
static inline void dist_send_barrier(const Dist *d) {
    (void)d;
    MPI_CHECK(MPI_Barrier(MPI_COMM_WORLD));
}

// ---------------------------------------------------------------------------------------------
// Without both. Nothing is sent, as there is one rank.

#else

static inline void dist_place_find(Dist *d) {
    const char *world = getenv("OMPI_COMM_WORLD_SIZE");
    (void)d;
    if (world && atoi(world) > 1)
        die(EXIT_USAGE,
            "found %s processes started by mpirun, but a program built for one: without MPI for "
            "CPUs, NCCL for GPUs (make doctor tells); start one",
            world);
}
static inline void dist_connect(Dist *d, const char *identity, double timeout) {
    (void)d, (void)identity, (void)timeout;
}
static inline void dist_leave(Dist *d) { (void)d; }
static inline int dist_spawn(int count, char **argv) {
    (void)argv;
    die(EXIT_USAGE,
        "--gpus: found %d, but this program is built without NCCL, or for CPUs (make doctor tells)",
        count);
}
static inline void dist_watch(const Dist *d, double timeout) { (void)d, (void)timeout; }
static inline void dist_at(const Dist *d, int64_t step, const char *phase) {
    (void)d, (void)step, (void)phase;
}
static inline void dist_send_gather(const Dist *d, void *out, const void *in, int bytes, int to) {
    (void)d, (void)out, (void)in, (void)bytes, (void)to;
}
static inline void dist_send_broadcast(const Dist *d, void *data, int bytes, int from) {
    (void)d, (void)data, (void)bytes, (void)from;
}
static inline void dist_send_barrier(const Dist *d) { (void)d; }
#endif

// ---------------------------------------------------------------------------------------------

// Finds this process's place among the ranks.
static inline void dist_init(Dist *d) {
    memset(d, 0, sizeof *d);
    d->world = 1;
    dist_place_find(d);
    if (d->world > 1) die_rank = d->rank;
}

// Meets the other ranks, before anything else is called, within `timeout` seconds. identity: what
// must be the same in all. dist_free is due, on every rank, unless the program ends by die().
static inline void dist_meet(Dist *d, const char *identity, double timeout) {
    dist_connect(d, identity, timeout);
    if (d->world > 1)
        d->parts =
            (float *)die_alloc((size_t)d->world * DIST_CHUNK, sizeof *d->parts, "sums of ranks");
}

static inline void dist_free(Dist *d) {
    dist_leave(d);
    free(d->parts);
    memset(d, 0, sizeof *d);
}

static inline void dist_barrier(const Dist *d) {
    if (d->world > 1) dist_send_barrier(d);
}

// Small things: out is `in` of every rank, by rank.
static inline void dist_all_gather(const Dist *d,
                                   void *out,       // (world, bytes)
                                   const void *in,  // (bytes)
                                   size_t bytes) {
    if (bytes > INT_MAX) die(EXIT_INTERNAL, "dist_all_gather: found %zu bytes", bytes);
    if (d->world > 1)
        dist_send_gather(d, out, in, (int)bytes, DIST_ALL);
    else
        memcpy(out, in, bytes);
}

// Copies the bytes of rank `from` to all others.
static inline void dist_broadcast(const Dist *d, void *data, size_t bytes, int from) {
    for (size_t at = 0, n; d->world > 1 && at < bytes; at += n) {
        n = bytes - at < INT_MAX ? bytes - at : INT_MAX;
        dist_send_broadcast(d, (char *)data + at, (int)n, from);
    }
}

// out = the sum of all ranks' in, for rank `to` or, DIST_ALL, for all; the others' out is not
// touched, and may be NULL. out may be in.
static inline void dist_sum(const Dist *d,
                            float *out,       // (count)
                            const float *in,  // (count)
                            size_t count, int to) {
    if (d->world == 1 && out != in) memcpy(out, in, count * sizeof *out);
    for (size_t at = 0, n; d->world > 1 && at < count; at += n) {
        n = count - at < DIST_CHUNK ? count - at : DIST_CHUNK;
        dist_send_gather(d, d->parts, in + at, (int)(n * sizeof *in), to);
        if (to != DIST_ALL && to != d->rank) continue;
        for (size_t i = 0; i < n; i++) {
            float sum = d->parts[i];
            for (int r = 1; r < d->world; r++) sum += d->parts[(size_t)r * n + i];
            out[at + i] = sum;
        }
    }
}

#endif
