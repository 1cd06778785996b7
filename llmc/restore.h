// restore.h: goes back to a save of checkpoint.h, of any number of ranks: restore_save.
//
// A save's flags decide what tensors it has. It is loaded only where these are, by name, type and
// shape, those that the flags of this run ask for; else the program leaves with EXIT_CHECKPOINT,
// the tensor's name and the save's flags: a run that cannot go on from the save it was told to must
// not start over. Every byte that is read is verified by its checksum.
//
// The optimizer's state is in a file for each rank that saved. A tensor that several of them shared
// is there in parts, NAME@K, and what is wanted may be a part, too: another one. All parts are
// looked through, and of each what overlaps is copied.
#ifndef LLMC_RESTORE_H
#define LLMC_RESTORE_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "llmc/checkpoint.h"   // CkptMeta, ckpt_read_meta, ckpt_find_note
#include "llmc/die.h"          // die, EXIT_CHECKPOINT
#include "llmc/safetensors.h"  // StFile, st_open, st_read

// What leaves with EXIT_CHECKPOINT where a save is not of these flags.
static inline const char *restore_flags_of(const CkptMeta *meta) {
    const char *flags = ckpt_find_note(meta, "flags");
    return flags ? flags : "not noted";
}

__attribute__((noreturn)) static inline void restore_missing(const char *path, const char *name,
                                                             const CkptMeta *meta) {
    die(EXIT_CHECKPOINT, "%s: tensor %s is missing; the flags must be those of the save: %s", path,
        name, restore_flags_of(meta));
}

__attribute__((noreturn)) static inline void restore_unknown(const char *path, const char *name,
                                                             const CkptMeta *meta) {
    die(EXIT_CHECKPOINT,
        "%s: found tensor %s, which these flags have no place for; they must be those of the save: "
        "%s",
        path, name, restore_flags_of(meta));
}

// Dies unless t has the type of e, and its shape; parts: their first axes may differ.
static inline void restore_require_shape(const char *path, const StTensor *t, const StTensor *e,
                                         bool parts, const CkptMeta *meta) {
    char there[96], here[96];
    bool fits = t->dtype == e->dtype && t->ndim == e->ndim;
    for (int d = parts; fits && d < t->ndim; d++) fits = t->shape[d] == e->shape[d];
    if (!fits)
        die(EXIT_CHECKPOINT,
            "%s: tensor %s: found %s %s, expected %s %s; the flags must be those of the save: %s",
            path, e->name, st_dtype_name[t->dtype], st_shape_text(t, there, sizeof there),
            st_dtype_name[e->dtype], st_shape_text(e, here, sizeof here), restore_flags_of(meta));
}

// Opens model.safetensors and compares its tensors with the expected ones.
static inline void restore_open_model(StFile *f, const char *folder, const CkptMeta *meta,
                                      const StTensor *expected, int n) {
    char path[IO_PATH_MAX];
    ckpt_join(path, folder, "model.safetensors");
    if (st_open(f, path)) die(EXIT_CHECKPOINT, "%s", io_error);
    for (int i = 0; i < n; i++) {
        const StTensor *t = st_find(f, expected[i].name);
        if (!t) restore_missing(path, expected[i].name, meta);
        restore_require_shape(path, t, &expected[i], false, meta);
    }
    for (int i = 0; i < f->count; i++) {
        int k = 0;
        while (k < n && strcmp(expected[k].name, f->tensors[i].name)) k++;
        if (k == n) restore_unknown(path, f->tensors[i].name, meta);
    }
}

// "wte.first@640": rows 640 .. of wte.first. The length of the name itself, and the 640.
typedef struct {
    size_t length;
    uint64_t from;
} RestorePart;
static inline RestorePart restore_part(const char *name) {
    RestorePart p = {strcspn(name, "@"), 0};
    if (name[p.length]) p.from = strtoull(name + p.length + 1, NULL, 10);
    return p;
}

// Reads from an optimizer's file what tensor t, there, has of the wanted part e; data NULL: only
// counts. Returns how much of the first axis that is.
static inline uint64_t restore_read_part(StFile *f, const StTensor *t, const StTensor *e) {
    RestorePart here = restore_part(t->name), want = restore_part(e->name);
    if (here.length != want.length || memcmp(t->name, e->name, here.length)) return 0;
    uint64_t here_end = here.from + t->shape[0], want_end = want.from + e->shape[0];
    uint64_t from = here.from > want.from ? here.from : want.from;
    uint64_t end = here_end < want_end ? here_end : want_end;
    if (from >= end) return 0;
    if (e->data) {
        size_t line = (size_t)((t->end - t->begin) / t->shape[0]);
        bool same = here.from == want.from && here_end == want_end;
        char *to = (char *)e->data + (size_t)(from - want.from) * line;
        char *all = same ? to : (char *)die_alloc(t->shape[0], line, "a tensor of a save");
        if (st_read(f, t, all)) die(EXIT_CHECKPOINT, "%s", io_error);
        if (!same) {
            memcpy(to, all + (size_t)(from - here.from) * line, (size_t)(end - from) * line);
            free(all);
        }
    }
    return end - from;
}

// Opens an optimizer's file, optim_rank000.safetensors or its like; all in it must be the state of
// one of the model's tensors: NAME.first or NAME.second, or a part of that.
static inline void restore_open_optim(StFile *f, const char *path, const CkptMeta *meta,
                                      const StTensor *model, int model_count) {
    if (st_open(f, path)) die(EXIT_CHECKPOINT, "%s", io_error);
    for (int i = 0; i < f->count; i++) {
        const char *name = f->tensors[i].name, *dot = strrchr(name, '.');
        size_t length = dot ? (size_t)(dot - name) : strlen(name);
        int k = 0;
        while (k < model_count &&
               (strlen(model[k].name) != length || memcmp(model[k].name, name, length)))
            k++;
        if (k == model_count) restore_unknown(path, name, meta);
    }
}

// Finds every wanted part in the files, all of it. Nothing is read.
static inline void restore_check_parts(StFile *files, int count, const char *folder,
                                       const StTensor *wanted, int n, const CkptMeta *meta) {
    char where[IO_PATH_MAX];
    ckpt_join(where, folder, count == 1 ? "optim_rank000.safetensors" : "optim_rank*.safetensors");
    for (int i = 0; i < n; i++) {
        StTensor e = wanted[i];
        uint64_t found = 0;
        e.data = NULL;
        for (int k = 0; k < count; k++)
            for (int j = 0; j < files[k].count; j++) {
                const StTensor *t = &files[k].tensors[j];
                uint64_t part = t->ndim && e.ndim ? restore_read_part(&files[k], t, &e) : 0;
                bool whole = !strchr(t->name, '@') && !strchr(e.name, '@');
                if (part) restore_require_shape(where, t, &e, !whole, meta);
                found += part;
            }
        if (found != e.shape[0]) restore_missing(where, e.name, meta);
    }
}

// Loads a save. `model` is what ckpt_finish got, `optim` what any rank of any number of them would
// give to ckpt_write_rank; their `data` are filled. With no `optim` tensors the state of the
// optimizer is left alone. Nothing is filled before all names, dtypes and shapes were found right.
// ckpt_meta_free(meta) is due.
static inline void restore_save(const char *folder, CkptMeta *meta, const StTensor *model,
                                int model_count, const StTensor *optim, int optim_count) {
    StFile f, *files;
    char path[IO_PATH_MAX];
    int count = 0;
    if (ckpt_read_meta(folder, meta)) die(EXIT_CHECKPOINT, "%s", io_error);
    files = (StFile *)die_alloc((size_t)meta->file_count, sizeof *files, "the files of a save");
    restore_open_model(&f, folder, meta, model, model_count);
    for (int i = 0; i < meta->file_count && optim_count; i++) {
        if (strncmp(meta->files[i].key, "optim_rank", 10)) continue;
        ckpt_join(path, folder, meta->files[i].key);
        restore_open_optim(&files[count++], path, meta, model, model_count);
    }
    restore_check_parts(files, count, folder, optim, optim_count, meta);
    for (int i = 0; i < model_count; i++)
        if (st_read(&f, st_find(&f, model[i].name), (void *)model[i].data))
            die(EXIT_CHECKPOINT, "%s", io_error);
    st_close(&f);
    for (int k = 0; k < count; k++) {
        for (int j = 0; j < files[k].count; j++)
            for (int i = 0; i < optim_count; i++)
                restore_read_part(&files[k], &files[k].tensors[j], &optim[i]);
        st_close(&files[k]);
    }
    free(files);
}

#endif
