// dataloader.h: rows of T inputs and T targets for this rank, made ahead of time by a thread.
//
// rows.h defines one sequence of rows. With R ranks, a call for B rows takes the next R*B of them,
// and rank r gets rows r*B .. r*B+B-1 of those. So a step of batch/T rows is the same rows whatever
// the ranks and micro-steps, and B may change from call to call. Every rank plans all rows, which
// takes lengths only, and copies its own.
//
// The thread's work, by urgency: copy a planned row that is this rank's; plan a row, as long as
// those ahead are fewer than 4 calls take, or 64; scan a part of the next shard. What it finds
// wrong in the data waits until the caller gets to the row that is missing, so the program ends at
// the same row each time.
// Memory: rows.h's, and 2(T+1) bytes for each row ahead.
//
// State to save, 32 bytes: {seed, epoch, row, fingerprint}; loader_describe gives the names in the
// fingerprint, so that loader_restore can say which shard is another one.
//
// Validation (loader_val_): rows of stream over one shard in order, without a thread.
#ifndef LLMC_DATALOADER_H
#define LLMC_DATALOADER_H

#include <pthread.h>
#include <signal.h>

#include "llmc/die.h"   // die, die_alloc
#include "llmc/rows.h"  // rows_open, rows_seek, rows_next, rows_copy

#define LOADER_AHEAD 4  // calls of loader_next to plan ahead

typedef struct {
    uint64_t seed;
    uint64_t epoch;        // of the last row (Row.epoch)
    uint64_t row;          // rows that all ranks together have consumed since the start of the run
    uint64_t fingerprint;  // of the shards and the way of packing
} LoaderState;

// Where a row came from, for messages.
typedef struct {
    const char *path;  // the shard of its first token
    uint64_t token;    // that token's number there
    uint64_t epoch, row;
} LoaderOrigin;

typedef struct LoaderRow {
    struct LoaderRow *next;
    Row plan;
    uint64_t place;    // in the sequence, counted from the start of the thread
    uint16_t *tokens;  // (T + 1)
    bool copied;
} LoaderRow;

typedef struct {
    Rows rows;         // the thread's own while it runs, but for the list of shards
    uint64_t planned;  // rows planned since its start
    bool ahead_done;   // the next shard is scanned, or bad: then the plan will say so

    pthread_t thread;
    pthread_mutex_t lock;    // over all that follows
    pthread_cond_t work;     // wakes the thread
    pthread_cond_t ready;    // wakes the caller
    LoaderRow *head, *tail;  // rows planned, not consumed
    LoaderRow *uncopied;     // the first of them that was not yet looked at for copying
    LoaderRow *spare;        // rows to use again
    int queued;              // from head to tail
    int rank, ranks;
    int B;              // rows a call; 0 before the first
    uint64_t consumed;  // rows that all ranks together have taken since the start
    uint64_t base;      // of them, those before B became what it is
    bool stop, plan_failed, copy_failed;
    char error[sizeof io_error];

    LoaderState state;     // the caller's
    LoaderOrigin *origin;  // (origins) of the rows of the last call
    int origins;
} Loader;

// ---------------------------------------------------------------------------------------------
// The queue of rows. All of it under the lock.

// True when the row is one of this rank's, in calls of B rows.
static inline bool loader_own(const Loader *l, const LoaderRow *row) {
    if (!l->B) return false;
    return (row->place - l->base) / (uint64_t)l->B % (uint64_t)l->ranks == (uint64_t)l->rank;
}

// The next row to copy, or NULL.
static inline LoaderRow *loader_find_uncopied(Loader *l) {
    while (l->B && l->uncopied) {
        LoaderRow *row = l->uncopied;
        l->uncopied = row->next;
        if (loader_own(l, row) && !row->copied) return row;
    }
    return NULL;
}

static inline LoaderRow *loader_take_spare(Loader *l) {
    LoaderRow *row = l->spare;
    if (row)
        l->spare = row->next;
    else
        row = (LoaderRow *)die_alloc(1, sizeof *row, "a row");
    row->copied = false;
    return row;
}

static inline void loader_put_spare(Loader *l, LoaderRow *row) {
    row->next = l->spare;
    l->spare = row;
}

static inline void loader_append(Loader *l, LoaderRow *row) {
    row->next = NULL;
    row->place = l->planned++;
    if (l->tail)
        l->tail->next = row;
    else
        l->head = row;
    l->tail = row;
    if (!l->uncopied) l->uncopied = row;
    l->queued++;
}

// Takes the first row out of the queue.
static inline void loader_release(Loader *l) {
    LoaderRow *row = l->head;
    if (l->uncopied == row) l->uncopied = row->next;
    l->head = row->next;
    if (!l->head) l->tail = NULL;
    l->queued--;
    l->consumed++;
    l->state.epoch = row->plan.epoch, l->state.row = row->plan.number + 1;
    loader_put_spare(l, row);
}

// Whether another row should be planned.
static inline bool loader_has_room(const Loader *l) {
    int64_t ahead = (int64_t)LOADER_AHEAD * l->B * l->ranks;
    return l->queued < (ahead < 64 ? 64 : ahead);
}

// ---------------------------------------------------------------------------------------------
// The thread.

// Keeps the reason of a failure for the caller.
static inline void loader_note(Loader *l, bool *flag) {
    memcpy(l->error, io_error, sizeof l->error);
    *flag = true;
}

static inline void loader_copy_row(Loader *l, LoaderRow *row) {
    pthread_mutex_unlock(&l->lock);
    size_t tokens = (size_t)l->rows.config.T + 1;
    if (!row->tokens) row->tokens = (uint16_t *)die_alloc(tokens, sizeof(uint16_t), "a row");
    int failed = rows_copy(&l->rows, &row->plan, row->tokens);
    pthread_mutex_lock(&l->lock);
    if (failed) loader_note(l, &l->copy_failed);
    row->copied = !failed;
}

static inline void loader_plan_row(Loader *l) {
    LoaderRow *row = loader_take_spare(l);
    pthread_mutex_unlock(&l->lock);
    int failed = rows_next(&l->rows, &row->plan);
    l->ahead_done = false;  // the plan may have moved on to another shard
    pthread_mutex_lock(&l->lock);
    if (!failed)
        loader_append(l, row);
    else
        loader_note(l, &l->plan_failed), loader_put_spare(l, row);
}

// Does one piece of work. Holds the lock on entry and on return. False: there is none.
static inline bool loader_work(Loader *l) {
    LoaderRow *row = loader_find_uncopied(l);
    if (row) {
        loader_copy_row(l, row);
    } else if (!l->plan_failed && loader_has_room(l)) {
        loader_plan_row(l);
    } else {
        if (l->plan_failed || l->ahead_done) return false;
        pthread_mutex_unlock(&l->lock);
        l->ahead_done = rows_scan_ahead(&l->rows) <= 0;
        pthread_mutex_lock(&l->lock);
    }
    pthread_cond_signal(&l->ready);
    return true;
}

static inline void *loader_thread(void *arg) {
    Loader *l = (Loader *)arg;
    int failed = rows_seek(&l->rows, l->state.epoch, l->state.row, &l->stop);
    pthread_mutex_lock(&l->lock);
    if (failed) loader_note(l, &l->plan_failed);
    while (!l->stop) {
        if (!l->copy_failed && loader_work(l)) continue;
        pthread_cond_signal(&l->ready);
        pthread_cond_wait(&l->work, &l->lock);
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

// Starts the thread at l->state. It takes no signals: those are for the caller's thread.
static inline void loader_start(Loader *l) {
    sigset_t all, before;
    l->stop = l->plan_failed = l->copy_failed = l->ahead_done = false;
    l->planned = l->consumed = l->base = 0;
    l->B = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&l->thread, NULL, loader_thread, l);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) die(EXIT_INTERNAL, "cannot start the loader's thread: %s", strerror(failed));
}

// Ends the thread and takes back the rows it has made.
static inline void loader_stop(Loader *l) {
    pthread_mutex_lock(&l->lock);
    __atomic_store_n(&l->stop, true, __ATOMIC_RELAXED);  // rows_seek looks at it without the lock
    pthread_cond_signal(&l->work);
    pthread_mutex_unlock(&l->lock);
    pthread_join(l->thread, NULL);
    if (l->tail) l->tail->next = l->spare, l->spare = l->head;
    l->head = l->tail = l->uncopied = NULL;
    l->queued = 0;
}

// ---------------------------------------------------------------------------------------------
// What the trainers call.

// Opens and checks the shards, and starts at the first row of epoch 0. What is wrong with a shard
// ends the program with exit code 3 and the file, the byte, what was found, what was expected and
// what to do, here or in the first loader_next that would need it. `l` must not move afterwards.
static inline void loader_init(Loader *l, const RowsConfig *config, int rank, int ranks) {
    memset(l, 0, sizeof *l);
    assert(config->T >= 1 && config->V >= 1 && rank >= 0 && rank < ranks);
    if (config->bestfit && (config->bos < 0 || config->bos >= config->V))
        die(EXIT_USAGE, "--bos: found %d, expected a token from 0 to %d", config->bos,
            config->V - 1);
    if (rows_open(&l->rows, config)) die(EXIT_DATA, "%s", io_error);
    l->rank = rank, l->ranks = ranks;
    l->state.seed = config->seed, l->state.fingerprint = l->rows.fingerprint;
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->work, NULL), pthread_cond_init(&l->ready, NULL);
    loader_start(l);
}

static inline void loader_free(Loader *l) {
    loader_stop(l);
    for (LoaderRow *row; (row = l->spare) != NULL;) {
        l->spare = row->next;
        free(row->plan.piece), free(row->tokens), free(row);
    }
    pthread_mutex_destroy(&l->lock);
    pthread_cond_destroy(&l->work), pthread_cond_destroy(&l->ready);
    rows_free(&l->rows);
    free(l->origin);
    memset(l, 0, sizeof *l);
}

// From the next row on, calls are for B rows. Rows that are planned stay; of those that are this
// rank's now, the thread copies the ones it has not.
static inline void loader_set_rows(Loader *l, int B) {
    assert(B > 0);
    if (l->B == B) return;
    l->B = B, l->base = l->consumed, l->uncopied = l->head;
    if (B <= l->origins) return;
    free(l->origin);
    l->origin = (LoaderOrigin *)die_alloc((size_t)B, sizeof *l->origin, "where rows came from");
    l->origins = B;
}

// Waits until the queue holds the next `count` rows, copied where they are this rank's. False: what
// was found wrong in the data, l->error, is before the end of them. Holds the lock.
static inline bool loader_wait(Loader *l, int64_t count) {
    for (LoaderRow **row = &l->head; count > 0; row = &(*row)->next, count--) {
        while (!*row || (loader_own(l, *row) && !(*row)->copied)) {
            if (l->copy_failed || (!*row && l->plan_failed)) return false;
            pthread_cond_signal(&l->work);
            pthread_cond_wait(&l->ready, &l->lock);
        }
    }
    return true;
}

static inline LoaderOrigin loader_find_origin(const Loader *l, const Row *row) {
    const PackPiece *first = &row->piece[0];
    LoaderOrigin origin = {l->rows.shards.shard[first->shard].file.path, first->start, row->epoch,
                           row->number};
    return origin;
}

// A plan whose rows are not of the loader's one length ends here.
static inline void loader_require_length(const Loader *l, int T) {
    if (T != l->rows.config.T)
        die(EXIT_USAGE,
            "a phase of the plan: found rows of %d tokens, expected %d, --seq-len, throughout: the "
            "loader's rows keep one length",
            T, l->rows.config.T);
}

// Hands out this rank's B of the next ranks*B rows. False, and no row is taken, where the data of
// one of them are bad: the next call, too, finds them so, and loader_next says why. For a caller
// that asks ahead of need, and has something to finish first.
static inline bool loader_try_next(Loader *l,
                                   int32_t *inputs,   // (B, T)
                                   int32_t *targets,  // (B, T)
                                   int B) {
    int T = l->rows.config.T, b = 0;
    int64_t rows = (int64_t)B * l->ranks;
    pthread_mutex_lock(&l->lock);
    loader_set_rows(l, B);
    bool there = loader_wait(l, rows);
    for (int64_t i = 0; there && i < rows; i++) {
        LoaderRow *row = l->head;
        if (loader_own(l, row)) {
            pthread_mutex_unlock(&l->lock);  // the row stays: only we take rows out
            for (int t = 0; t < T; t++) inputs[t] = row->tokens[t];
            for (int t = 0; t < T; t++) targets[t] = row->tokens[t + 1];
            inputs += T, targets += T;
            l->origin[b++] = loader_find_origin(l, &row->plan);
            pthread_mutex_lock(&l->lock);
        }
        loader_release(l);
    }
    pthread_cond_signal(&l->work);
    pthread_mutex_unlock(&l->lock);
    return there;
}

// The same, but ends the program where the data are bad.
static inline void loader_next(Loader *l,
                               int32_t *inputs,   // (B, T)
                               int32_t *targets,  // (B, T)
                               int B) {
    if (!loader_try_next(l, inputs, targets, B)) die(EXIT_DATA, "%s", l->error);
}

// Where row b of the last call came from.
static inline LoaderOrigin loader_origin(const Loader *l, int b) {
    assert(b >= 0 && b < l->B);
    return l->origin[b];
}

// The state after the rows handed out so far. The same on every rank.
static inline LoaderState loader_state(const Loader *l) { return l->state; }

// The packing and the shards as one line of text (rows.h), to be saved beside the state.
static inline const char *loader_describe(const Loader *l) { return l->rows.description; }

// Dies with the first entry in which two descriptions differ.
static inline void loader_compare(const char *found, const char *expected) {
    for (int i = 0; *found || *expected; i++) {
        int n = (int)strcspn(found, ";"), m = (int)strcspn(expected, ";");
        if (n != m || strncmp(found, expected, (size_t)n))
            die(EXIT_DATA,
                "the data is not the checkpoint's: %s: found '%.*s', expected '%.*s'; give "
                "the same, or start without the checkpoint",
                i ? "shard (name, tokens, hash)" : "packing", n ? n : 4, n ? found : "none",
                m ? m : 4, m ? expected : "none");
        found += n, expected += m;
        found += strspn(found, "; "), expected += strspn(expected, "; ");
    }
}

// Goes to a saved state. `description` is what loader_describe gave when it was saved, or NULL.
// With it the message names the shard that is missing, renamed, resized, reordered or new inside.
static inline void loader_restore(Loader *l, LoaderState state, const char *description) {
    if (description) loader_compare(l->rows.description, description);
    if (state.fingerprint != l->rows.fingerprint)
        die(EXIT_DATA,
            "the data is not the checkpoint's: found fingerprint %016llx, expected %016llx; "
            "give the same shards, --seq-len, --packing, --tails and --bos, or start without the "
            "checkpoint",
            (unsigned long long)l->rows.fingerprint, (unsigned long long)state.fingerprint);
    loader_stop(l);
    l->state = state;
    l->rows.config.seed = state.seed;
    loader_start(l);
}

// ---------------------------------------------------------------------------------------------
// Validation: rows of stream over the first shard, the same whatever the ranks and B.

typedef struct {
    ShardList shards;  // only the first is read
    int T, rank, ranks;
    int64_t rows;      // in all
    int64_t next;      // of all ranks together
    uint16_t *tokens;  // (T + 1)
} LoaderVal;

// Opens the shard and checks the tokens of its first `targets` targets, or of all it has.
static inline void loader_val_init(LoaderVal *v, const char *pattern, int T, int V, int64_t targets,
                                   int rank, int ranks) {
    memset(v, 0, sizeof *v);
    v->T = T, v->rank = rank, v->ranks = ranks;
    if (targets < T)
        die(EXIT_USAGE, "--val-tokens: found %lld, expected at least %d, one row",
            (long long)targets, T);
    if (shards_open(&v->shards, pattern)) die(EXIT_DATA, "%s", io_error);
    Shard *shard = &v->shards.shard[0];
    v->rows = rows_of_stream(shard->tokens, T);
    if (v->rows > targets / T) v->rows = targets / T;
    if (!v->rows)
        die(EXIT_DATA,
            "%s: byte 8: found %lld tokens, expected at least %d for one row; give more text "
            "or a smaller --seq-len",
            shard->file.path, (long long)shard->tokens, T + 1);
    ShardIndex index;
    memset(&index, 0, sizeof index);
    shards_index_reset(&index, 0);
    while (index.scanned <= v->rows * T)
        if (shards_scan(&v->shards, &index, -1, V)) die(EXIT_DATA, "%s", io_error);
    shards_index_free(&index);
    v->tokens = (uint16_t *)die_alloc((size_t)T + 1, sizeof *v->tokens, "a row");
}

static inline void loader_val_free(LoaderVal *v) {
    shards_free(&v->shards);
    free(v->tokens);
    memset(v, 0, sizeof *v);
}

// Back to the first row.
static inline void loader_val_rewind(LoaderVal *v) { v->next = 0; }

// True while a call would give a row to some rank. All ranks see the same.
static inline bool loader_val_more(const LoaderVal *v) { return v->next < v->rows; }

// Hands out this rank's B of the next ranks*B rows, and returns how many of the B there are: at the
// end fewer, or none. The places of missing rows are filled with inputs 0 and targets -1.
static inline int loader_val_next(LoaderVal *v,
                                  int32_t *inputs,   // (B, T)
                                  int32_t *targets,  // (B, T)
                                  int B) {
    int64_t T = v->T, first = v->next + (int64_t)v->rank * B, left = v->rows - first;
    int rows = left < 0 ? 0 : left < B ? (int)left : B;
    for (int64_t b = 0; b < B; b++, inputs += T, targets += T) {
        size_t start = (size_t)(first + b) * (size_t)T;
        if (b < rows && shards_read(&v->shards, 0, v->tokens, (size_t)T + 1, start))
            die(EXIT_DATA, "%s", io_error);
        for (int64_t t = 0; t < T; t++) {
            inputs[t] = b < rows ? v->tokens[t] : 0;
            targets[t] = b < rows ? v->tokens[t + 1] : -1;
        }
    }
    v->next += (int64_t)B * v->ranks;
    return rows;
}

#endif
