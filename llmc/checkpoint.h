// checkpoint.h: the saves of a run, in the run's folder --out:
//
//     OUT/ckpt/step_00000100/model.safetensors          parameters
//                            optim_rank000.safetensors  state of the optimizer, one file a rank
//                            meta.json                  step, place in the data, flags, checksums
//
// A save is written as step_00000100.tmp, each file synced, then renamed, then ckpt/ is synced: a
// name without .tmp is a whole save, whenever the power goes. meta.json holds the header's checksum
// of each tensor file, which holds those of its tensors, and begins with its own: a flipped bit
// anywhere is found. Where a step is saved again, the save that was there stands as
// step_00000100.old until the new one has its place.
//
// A rank saves the optimizer state that it has. Of a tensor that several share, its part is called
// NAME@K, from index K of the first axis on. What loads takes the parts it needs from wherever they
// are, so a save of 2 ranks serves 1, or 8.
//
// Whoever saves calls ckpt_begin, ckpt_write_rank for each rank, ckpt_finish. They and ckpt_prune
// return 0, or -1 with the reason in io_error: training goes on without them. ckpt_find leaves
// with EXIT_CHECKPOINT: a run that cannot go on from the save it was told to must not start over.
// Loading is restore.h's.
#ifndef LLMC_CHECKPOINT_H
#define LLMC_CHECKPOINT_H

#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llmc/crc32c.h"       // crc32c, crc32c_sealed
#include "llmc/die.h"          // die, warn
#include "llmc/io.h"           // io_write_file, io_list_dir, io_rename, io_remove
#include "llmc/json.h"         // Json, JsonText, JsonPair
#include "llmc/safetensors.h"  // st_write, st_open, st_read

#define CKPT_FORMAT    1  // of meta.json
#define CKPT_NOTES_MAX 16
#define CKPT_FILES_MAX 256
#define CKPT_SEAL      "{\"crc32c\": \""  // meta.json begins with this and 8 digits

typedef struct {
    int64_t step;    // updates done
    int64_t tokens;  // tokens trained on in them
    uint64_t loader_seed, loader_epoch, loader_row, loader_fingerprint;  // LoaderState
    JsonPair notes[CKPT_NOTES_MAX];  // strings of the trainer's: flags, version, shards
    int note_count;
    JsonPair files[CKPT_FILES_MAX];  // of a save that was read: name, checksum of its header
    int file_count;
    char *memory;  // of a save that was read: what the strings point into
} CkptMeta;

// folder/name; the paths of a run are bounded by IO_PATH_MAX.
static inline void ckpt_join(char path[IO_PATH_MAX], const char *folder, const char *name) {
    if (snprintf(path, IO_PATH_MAX, "%s/%s", folder, name) >= IO_PATH_MAX)
        die(EXIT_USAGE, "a path of %d characters or more: %s/%s", IO_PATH_MAX, folder, name);
}

// Adds a note. Its strings must live as long as the meta.
static inline void ckpt_note(CkptMeta *m, const char *key, const char *value) {
    assert(m->note_count < CKPT_NOTES_MAX);
    m->notes[m->note_count].key = key, m->notes[m->note_count++].value = value;
}

// The note of that name, or NULL.
static inline const char *ckpt_find_note(const CkptMeta *m, const char *key) {
    for (int i = 0; i < m->note_count; i++)
        if (!strcmp(m->notes[i].key, key)) return m->notes[i].value;
    return NULL;
}

static inline void ckpt_meta_free(CkptMeta *m) {
    free(m->memory);
    memset(m, 0, sizeof *m);
}

// ---------------------------------------------------------------------------------------------
// Saving.

static inline bool ckpt_ends_with(const char *name, const char *suffix) {
    size_t n = strlen(name), m = strlen(suffix);
    return n >= m && !strcmp(name + n - m, suffix);
}

// Makes the folder that a save of `step` is written into. What unfinished saves left goes first: it
// may be what fills the disk.
static inline int ckpt_begin(const char *out, int64_t step, char temporary[IO_PATH_MAX]) {
    char folder[IO_PATH_MAX], name[64], **names;
    ckpt_join(folder, out, "ckpt");
    if (!io_is_dir(folder) && (io_make_dir(folder) || io_sync_dir(out))) return -1;
    int count = io_list_dir(folder, &names), failed = count < 0;
    for (int i = 0; i < count && !failed; i++) {
        ckpt_join(temporary, folder, names[i]);
        if (ckpt_ends_with(names[i], ".tmp")) failed = io_remove(temporary) != 0;
    }
    io_free_names(names, count);
    snprintf(name, sizeof name, "step_%08" PRId64 ".tmp", step);
    ckpt_join(temporary, folder, name);
    return failed || io_make_dir(temporary) ? -1 : 0;
}

// "files": {name: checksum of the header, ...} of all tensor files in the folder.
static inline int ckpt_put_files(JsonText *t, const char *folder) {
    char **names, path[IO_PATH_MAX];
    const char *comma = "";
    int count = io_list_dir(folder, &names), failed = count < 0;
    json_put(t, " \"files\": {");
    for (int i = 0; i < count && !failed; i++) {
        StFile f;
        if (!ckpt_ends_with(names[i], ".safetensors")) continue;
        ckpt_join(path, folder, names[i]);
        failed = st_open(&f, path);
        if (failed) break;
        json_put(t, "%s\"%s\": \"%08x\"", comma, names[i], (unsigned)f.header_crc);
        comma = ", ";
        st_close(&f);
    }
    json_put(t, "}\n}\n");
    io_free_names(names, count);
    return failed ? -1 : 0;
}

// Writes meta.json into the folder, over the tensor files that are there.
static inline int ckpt_write_meta(const CkptMeta *m, const char *folder) {
    JsonText t = {NULL, 0, 0};
    char path[IO_PATH_MAX], crc[9];
    json_put(&t, "%s00000000\",\n \"format\": %d,\n", CKPT_SEAL, CKPT_FORMAT);
    json_put(&t, " \"step\": %" PRId64 ",\n \"tokens\": %" PRId64 ",\n", m->step, m->tokens);
    json_put(&t, " \"loader\": {\"seed\": %" PRIu64 ", \"epoch\": %" PRIu64, m->loader_seed,
             m->loader_epoch);
    json_put(&t, ", \"row\": %" PRIu64 ", \"fingerprint\": %" PRIu64 "},\n \"notes\": {",
             m->loader_row, m->loader_fingerprint);
    for (int i = 0; i < m->note_count; i++) {
        json_put(&t, i ? ",\n  " : "\n  ");
        json_put_pair(&t, m->notes[i]);
    }
    json_put(&t, "\n },\n");
    int failed = ckpt_put_files(&t, folder);
    snprintf(crc, sizeof crc, "%08x", (unsigned)crc32c(0, t.text, t.size));
    memcpy(t.text + strlen(CKPT_SEAL), crc, 8);
    ckpt_join(path, folder, "meta.json");
    failed = failed || io_write_file(path, t.text, t.size);
    json_text_free(&t);
    return failed ? -1 : 0;
}

// Gives a finished save its name. If that step was saved before (a run that went back to an earlier
// step passes it again), there is a whole save of it under one name or the other at any moment.
static inline int ckpt_publish(const char *temporary, const char *place) {
    char old[IO_PATH_MAX];
    if (!io_exists(place)) return io_rename(temporary, place);
    if (snprintf(old, sizeof old, "%s.old", place) >= (int)sizeof old)
        return io_fail("rename", place);
    if (io_remove(old) || io_rename(place, old) || io_rename(temporary, place)) return -1;
    io_remove(old);  // may fail: ckpt_prune removes it, too
    return 0;
}

// Seals the folder of ckpt_begin, when all its tensor files are written, and gives it its name.
static inline int ckpt_commit(const CkptMeta *meta, const char *temporary) {
    char place[IO_PATH_MAX];
    if (ckpt_write_meta(meta, temporary)) return -1;
    snprintf(place, sizeof place, "%.*s", (int)(strlen(temporary) - strlen(".tmp")), temporary);
    return ckpt_publish(temporary, place);
}

// Writes what a rank has of the optimizer's state into the folder of ckpt_begin.
static inline int ckpt_write_rank(const char *temporary, int rank, StTensor *optim, int count) {
    char path[IO_PATH_MAX], name[40];
    snprintf(name, sizeof name, "optim_rank%03d.safetensors", rank);
    ckpt_join(path, temporary, name);
    return st_write(path, optim, count, NULL, 0);
}

// Removes an unfinished save; io_error stays what it was.
static inline void ckpt_abandon(const char *temporary) {
    char reason[sizeof io_error];
    memcpy(reason, io_error, sizeof reason);
    io_remove(temporary);
    memcpy(io_error, reason, sizeof reason);
}

// Writes the parameters, when all ranks have written, and gives the save its name. On -1 the
// temporary folder is gone and the saves from before stand.
static inline int ckpt_finish(const CkptMeta *meta, const char *temporary, StTensor *model,
                              int count) {
    char path[IO_PATH_MAX];
    ckpt_join(path, temporary, "model.safetensors");
    if (!st_write(path, model, count, NULL, 0) && !ckpt_commit(meta, temporary)) return 0;
    ckpt_abandon(temporary);
    return -1;
}

// ---------------------------------------------------------------------------------------------
// Reading meta.json and checking a save.

// Strings from the cursor to memory at *next; meta.json's size bounds them all.
static inline bool ckpt_parse_pairs(Json *j, JsonPair *pairs, int max, int *count, char **next,
                                    const char *end) {
    for (json_enter(j, '{'); json_more(j, '}'); ++*count) {
        if (*count == max) return json_fail(j, j->at, "found more members than expected");
        pairs[*count].key = *next;
        if (!json_key(j, *next, (size_t)(end - *next))) return false;
        *next += strlen(*next) + 1;
        pairs[*count].value = *next;
        if (!json_string(j, *next, (size_t)(end - *next), NULL)) return false;
        *next += strlen(*next) + 1;
    }
    return !j->error;
}

static inline void ckpt_parse_loader(Json *j, CkptMeta *m) {
    char key[16];
    for (json_enter(j, '{'); json_more(j, '}');) {
        json_key(j, key, sizeof key);
        if (!strcmp(key, "seed"))
            json_u64(j, &m->loader_seed);
        else if (!strcmp(key, "epoch"))
            json_u64(j, &m->loader_epoch);
        else if (!strcmp(key, "row"))
            json_u64(j, &m->loader_row);
        else if (!strcmp(key, "fingerprint"))
            json_u64(j, &m->loader_fingerprint);
        else
            json_fail(j, j->at, "found a member of the loader that is not known here");
    }
}

static inline int ckpt_parse_meta(Json *j, CkptMeta *m, char *next, const char *end) {
    char key[16];
    uint64_t format = 0, step = 0, tokens = 0;
    int members = 0;
    for (json_enter(j, '{'); json_more(j, '}'); members++) {
        json_key(j, key, sizeof key);
        if (!strcmp(key, "format"))
            json_u64(j, &format);
        else if (!strcmp(key, "step"))
            json_u64(j, &step);
        else if (!strcmp(key, "tokens"))
            json_u64(j, &tokens);
        else if (!strcmp(key, "loader"))
            ckpt_parse_loader(j, m);
        else if (!strcmp(key, "notes"))
            ckpt_parse_pairs(j, m->notes, CKPT_NOTES_MAX, &m->note_count, &next, end);
        else if (!strcmp(key, "files"))
            ckpt_parse_pairs(j, m->files, CKPT_FILES_MAX, &m->file_count, &next, end);
        else
            json_skip(j);  // the seal
    }
    if (json_end(j) && format != CKPT_FORMAT) json_fail(j, 0, "found another format than 1");
    if (!j->error && (members != 7 || step > INT64_MAX || tokens > INT64_MAX))
        json_fail(j, 0, "expected crc32c, format, step, tokens, loader, notes and files");
    m->step = (int64_t)step, m->tokens = (int64_t)tokens;
    return j->error ? -1 : 0;
}

// Reads the meta.json of a save and verifies its checksum. After a 0, ckpt_meta_free is due.
static inline int ckpt_read_meta(const char *folder, CkptMeta *m) {
    char path[IO_PATH_MAX], *text;
    size_t size, seal = strlen(CKPT_SEAL);
    memset(m, 0, sizeof *m);
    ckpt_join(path, folder, "meta.json");
    if (io_read_file(path, &text, &size)) return -1;
    char digits[9] = "";
    if (size >= seal + 8) snprintf(digits, 9, "%08x", (unsigned)crc32c_sealed(text, size, seal));
    if (!*digits || memcmp(text, CKPT_SEAL, seal) || memcmp(text + seal, digits, 8)) {
        snprintf(io_error, sizeof io_error, "%s is damaged: found CRC-32C %s, expected %.8s", path,
                 *digits ? digits : "nowhere", *digits ? text + seal : "one");
        free(text);
        return -1;
    }
    Json j;
    json_init(&j, text, size);
    m->memory = (char *)die_alloc(size, 1, "meta.json");
    int failed = ckpt_parse_meta(&j, m, m->memory, m->memory + size);
    free(text);
    if (!failed) return 0;
    snprintf(io_error, sizeof io_error, "%s: byte %zu: %s", path, j.error_at, j.error);
    ckpt_meta_free(m);
    return -1;
}

// Checks one tensor file of a save: its header, that it is the one meta.json means, and with `data`
// every tensor's bytes.
static inline int ckpt_check_file(const char *folder, JsonPair file, bool data) {
    char path[IO_PATH_MAX], crc[9];
    StFile f;
    ckpt_join(path, folder, file.key);
    if (st_open(&f, path)) return -1;
    snprintf(crc, sizeof crc, "%08x", (unsigned)f.header_crc);
    int failed = 0;
    if (!f.sealed || strcmp(crc, file.value))
        failed = st_fail(&f, "the header is not this save's: found CRC-32C %s, expected %s",
                         f.sealed ? crc : "none", file.value);
    for (int i = 0; i < f.count && data && !failed; i++) failed = st_read(&f, &f.tensors[i], NULL);
    st_close(&f);
    return failed ? -1 : 0;
}

// Checks a save: meta.json and all headers, and with `data` all of it. -1: io_error says what is
// damaged.
static inline int ckpt_check(const char *folder, bool data) {
    CkptMeta meta;
    if (ckpt_read_meta(folder, &meta)) return -1;
    int failed = 0;
    for (int i = 0; i < meta.file_count && !failed; i++)
        failed = ckpt_check_file(folder, meta.files[i], data);
    ckpt_meta_free(&meta);
    return failed;
}

// ---------------------------------------------------------------------------------------------
// Which saves there are.

typedef struct {
    int64_t step;
    bool old;  // step_00000100.old
    char path[IO_PATH_MAX];
} CkptEntry;

// Newest first; of two saves of a step the one without .old.
static inline int ckpt_entry_order(const void *a, const void *b) {
    const CkptEntry *x = (const CkptEntry *)a, *y = (const CkptEntry *)b;
    if (x->step != y->step) return x->step > y->step ? -1 : 1;
    return x->old - y->old;
}

// The saves in OUT/ckpt, newest first, none of them checked. *entries is the caller's to free.
// Returns their number, or -1.
static inline int ckpt_list(const char *out, CkptEntry **entries) {
    char folder[IO_PATH_MAX], **names;
    *entries = NULL;
    struct stat st;
    ckpt_join(folder, out, "ckpt");
    if (lstat(folder, &st) && errno == ENOENT) return 0;  // of any other, listing it fails
    int count = io_list_dir(folder, &names), found = 0;
    if (count < 0) return -1;
    *entries = (CkptEntry *)die_alloc((size_t)count, sizeof **entries, "the list of saves");
    for (int i = 0; i < count; i++) {
        const char *digits = names[i] + strlen("step_");
        size_t n = strncmp(names[i], "step_", 5) ? 0 : strspn(digits, "0123456789");
        if (n < 8 || n > 18 || (digits[n] && strcmp(digits + n, ".old"))) continue;
        CkptEntry *e = &(*entries)[found++];
        e->step = strtoll(digits, NULL, 10), e->old = digits[n] != 0;
        ckpt_join(e->path, folder, names[i]);
    }
    io_free_names(names, count);
    qsort(*entries, (size_t)found, sizeof **entries, ckpt_entry_order);
    return found;
}

// Finds the save to go on from, and checks all of it. `which` is "auto", the newest one of OUT that
// is whole, or a save's folder. False: there is none yet. Damaged saves are skipped with a warning;
// if only damaged ones are left, or the one asked for is, the program ends.
static inline bool ckpt_find(const char *out, const char *which, char folder[IO_PATH_MAX]) {
    if (strcmp(which, "auto")) {
        char saves[IO_PATH_MAX];
        ckpt_join(saves, which, "ckpt");
        if (io_is_dir(saves))
            die(EXIT_CHECKPOINT,
                "cannot resume from %s: this is a run's folder; give one of its saves "
                "(%s/step_...), or --out %s --resume auto",
                which, saves, which);
        if (ckpt_check(which, true))
            die(EXIT_CHECKPOINT, "cannot resume from %s: %s", which, io_error);
        snprintf(folder, IO_PATH_MAX, "%s", which);
        return true;
    }
    CkptEntry *entries;
    int count = ckpt_list(out, &entries), i;
    if (count < 0) die(EXIT_CHECKPOINT, "cannot look for saves: %s", io_error);
    for (i = 0; i < count && ckpt_check(entries[i].path, true); i++)
        warn("skipping a damaged save: %s", io_error);
    if (i < count) memcpy(folder, entries[i].path, IO_PATH_MAX);
    if (count > 0 && i == count)
        die(EXIT_CHECKPOINT,
            "%s/ckpt: found %d save%s, none of them whole; remove %s to start over", out, count,
            count == 1 ? "" : "s", count == 1 ? "it" : "them");
    free(entries);
    return i < count;
}

// ---------------------------------------------------------------------------------------------
// Retention.

// Removes a save; a half-removed one has no name that ckpt_find looks at.
static inline int ckpt_drop(const char *path) {
    char temporary[IO_PATH_MAX];
    if (snprintf(temporary, sizeof temporary, "%s.tmp", path) >= (int)sizeof temporary) return -1;
    return io_rename(path, temporary) || io_remove(temporary) ? -1 : 0;
}

// Keeps the newest `keep` whole saves and each whose step is a multiple of `every` (0: none), and
// removes the rest. keep < 1 removes nothing. Of the saves kept, the first is read back in full
// before anything is removed; the others are only checked by meta.json and headers, because reading
// them after every save would take as long as writing them.
static inline int ckpt_prune(const char *out, int keep, int64_t every) {
    CkptEntry *entries;
    int count = keep < 1 ? 0 : ckpt_list(out, &entries), kept = 0, failed = count < 0;
    if (keep < 1 || count < 0) return failed ? -1 : 0;
    int64_t last = -1;  // step of the last one kept
    for (int i = 0; i < count && !failed; i++) {
        const CkptEntry *e = &entries[i];
        bool replaced = kept > 0 && e->step == last;
        if (replaced || kept >= keep) {
            if (replaced || every < 1 || e->step % every) failed = ckpt_drop(e->path);
        } else if (ckpt_check(e->path, kept == 0)) {
            warn("a save does not count, it is damaged: %s", io_error);
        } else {
            kept++, last = e->step;
        }
    }
    free(entries);
    return failed ? -1 : 0;
}

#endif
