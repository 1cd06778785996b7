// dist.h: what ranks, the processes that train one model together, do with one another. Here in
// host memory, by MPI where the program is built with it (USE_MPI, `make` finds it) and started by
// mpirun; otherwise there is one rank, which all of this costs nothing.
//
//     mpirun -np 4 build/train_gpt2 ...
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

#ifdef USE_MPI
#define OMPI_SKIP_MPICXX 1  // not its C++ classes, which need a library of their own
#include <mpi.h>
#endif

#include "llmc/die.h"  // die, die_rank, EXIT_COMM

typedef struct {
    int rank, world;
    int local;     // rank among those of the same machine
    float *parts;  // (world, DIST_CHUNK): numbers of all ranks, to be added
} Dist;

#define DIST_ALL   (-1)
#define DIST_CHUNK ((size_t)1 << 18)  // numbers that are added at once

#ifdef USE_MPI
#define MPI_CHECK(call) dist_check(call, #call, __FILE__, __LINE__)
static inline void dist_check(int error, const char *what, const char *file, int line) {
    char reason[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    if (error == MPI_SUCCESS) return;
    MPI_Error_string(error, reason, &length);
    die(EXIT_COMM, "%s:%d: %s: %s", file, line, what, reason);
}
#endif

// How many processes a launcher says it started beside this one, itself included; 1: none.
static inline int dist_started(void) {
    const char *world = getenv("OMPI_COMM_WORLD_SIZE");
    return world ? atoi(world) : 1;
}

// Meets the other ranks. dist_free is due, on every rank, unless the program ends by die().
static inline void dist_init(Dist *d) {
    memset(d, 0, sizeof *d);
    d->world = 1;
    if (dist_started() == 1) return;
#ifdef USE_MPI
    MPI_CHECK(MPI_Init(NULL, NULL));
    MPI_CHECK(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
    MPI_CHECK(MPI_Comm_rank(MPI_COMM_WORLD, &d->rank));
    MPI_CHECK(MPI_Comm_size(MPI_COMM_WORLD, &d->world));
    const char *local = getenv("OMPI_COMM_WORLD_LOCAL_RANK");
    d->local = local ? atoi(local) : 0;
    die_rank = d->rank;
    d->parts = (float *)die_alloc((size_t)d->world * DIST_CHUNK, sizeof *d->parts, "sums of ranks");
#else
    die(EXIT_USAGE,
        "found %d processes started by mpirun, but no MPI built in; install it (make "
        "doctor tells how) and build again, or start one process",
        dist_started());
#endif
}

static inline void dist_free(Dist *d) {
#ifdef USE_MPI
    if (d->world > 1) MPI_CHECK(MPI_Finalize());
#endif
    free(d->parts);
    memset(d, 0, sizeof *d);
}

// What is sent, by MPI: `in` of every rank to rank `to`, or to all, as out (world, bytes), by rank;
// bytes of rank `from` to all others; nothing, but that all have come here.
#ifdef USE_MPI
static inline void dist_send_gather(void *out, const void *in, int bytes, int to) {
    if (to == DIST_ALL)
        MPI_CHECK(MPI_Allgather(in, bytes, MPI_BYTE, out, bytes, MPI_BYTE, MPI_COMM_WORLD));
    else
        MPI_CHECK(MPI_Gather(in, bytes, MPI_BYTE, out, bytes, MPI_BYTE, to, MPI_COMM_WORLD));
}
static inline void dist_send_broadcast(void *data, int bytes, int from) {
    MPI_CHECK(MPI_Bcast(data, bytes, MPI_BYTE, from, MPI_COMM_WORLD));
}
static inline void dist_send_barrier(void) { MPI_CHECK(MPI_Barrier(MPI_COMM_WORLD)); }
#else  // there is one rank, and none of these is called
static inline void dist_send_gather(void *out, const void *in, int bytes, int to) {
    (void)out, (void)in, (void)bytes, (void)to;
}
static inline void dist_send_broadcast(void *data, int bytes, int from) {
    (void)data, (void)bytes, (void)from;
}
static inline void dist_send_barrier(void) {}
#endif

// ---------------------------------------------------------------------------------------------

static inline void dist_barrier(const Dist *d) {
    if (d->world > 1) dist_send_barrier();
}

// Small things: out is `in` of every rank, by rank.
static inline void dist_all_gather(const Dist *d,
                                   void *out,       // (world, bytes)
                                   const void *in,  // (bytes)
                                   size_t bytes) {
    if (bytes > INT_MAX) die(EXIT_INTERNAL, "dist_all_gather: found %zu bytes", bytes);
    if (d->world > 1)
        dist_send_gather(out, in, (int)bytes, DIST_ALL);
    else
        memcpy(out, in, bytes);
}

// Copies the bytes of rank `from` to all others.
static inline void dist_broadcast(const Dist *d, void *data, size_t bytes, int from) {
    for (size_t at = 0, n; d->world > 1 && at < bytes; at += n) {
        n = bytes - at < INT_MAX ? bytes - at : INT_MAX;
        dist_send_broadcast((char *)data + at, (int)n, from);
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
        dist_send_gather(d->parts, in + at, (int)(n * sizeof *in), to);
        if (to != DIST_ALL && to != d->rank) continue;
        for (size_t i = 0; i < n; i++) {
            float sum = d->parts[i];
            for (int r = 1; r < d->world; r++) sum += d->parts[(size_t)r * n + i];
            out[at + i] = sum;
        }
    }
}

#endif
