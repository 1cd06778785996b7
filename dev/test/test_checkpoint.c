// test_checkpoint.c: the promises of llmc/checkpoint.h: a save is whole or not there, whichever
// system call fails or is the last; every flipped bit and every cut is found and named; the newest
// whole save is the one that is loaded, and the last whole one is never removed.
#include "dev/test/test.h"
#include "llmc/checkpoint.h"
#include "llmc/rand.h"
#include "llmc/restore.h"

static char out[256];     // folder of the run
static char said[16384];  // what `overhear` heard on stderr

// ---------------------------------------------------------------------------------------------
// These two stand in for the C library's. They note what is synced and renamed, in which order; and
// some 600 saves take no disk's time.

static char trace[4096];

static void note_call(const char *what, const char *path) {
    const char *name = strrchr(path, '/');
    size_t n = strlen(trace);
    snprintf(trace + n, sizeof trace - n, "%s%s %s", n ? ", " : "", what, name ? name + 1 : path);
}

int fsync(int fd) {
    char link[64], path[IO_PATH_MAX] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, path, sizeof path - 1) > 0) note_call("sync", path);
    return 0;
}

int rename(const char *from, const char *to) {
    note_call("rename", to);
    return renameat(AT_FDCWD, from, AT_FDCWD, to);
}

// ---------------------------------------------------------------------------------------------

static float wte[32 * 4], wq[16 * 16], lambda[2], moment[32 * 4];
static StTensor model[3], optim[1];

// The tensors of the model, with the values they have after so many steps of "training".
static void train(int64_t step) {
    uint64_t wte_shape[] = {32, 4}, wq_shape[] = {16, 16}, two = 2;
    for (int i = 0; i < 128; i++) wte[i] = (float)(step * 1000 + i);
    for (int i = 0; i < 256; i++) wq[i] = (float)(step * 1000 - i);
    for (int i = 0; i < 128; i++) moment[i] = (float)step / (float)(i + 1);
    lambda[0] = (float)step, lambda[1] = -1;
    model[0] = st_tensor("wte", ST_F32, 2, wte_shape, wte);
    model[1] = st_tensor("layers.0.wq", ST_F32, 2, wq_shape, wq);
    model[2] = st_tensor("resid_lambda", ST_F32, 1, &two, lambda);
    optim[0] = st_tensor("wte.m", ST_F32, 2, wte_shape, moment);
}

static CkptMeta meta_of(int64_t step) {
    CkptMeta m;
    memset(&m, 0, sizeof m);
    m.step = step, m.tokens = step * 512;
    m.loader_seed = 1337, m.loader_epoch = 1, m.loader_row = (uint64_t)step * 8;
    m.loader_fingerprint = UINT64_MAX - 1;
    ckpt_note(&m, "flags", "--depth 1 --prompt \"a \\ b\"");
    ckpt_note(&m, "data", "T 64 bestfit; train_000.bin 1000 c0ffee");
    return m;
}

static const char *note_of(const CkptMeta *m, const char *key) {
    const char *value = ckpt_find_note(m, key);
    return value ? value : "(none)";
}

// A save of one rank.
static int save_one_rank(const char *folder, const CkptMeta *meta, StTensor *params, int n,
                         StTensor *states, int k) {
    char temporary[IO_PATH_MAX];
    if (ckpt_begin(folder, meta->step, temporary)) return -1;
    if (!ckpt_write_rank(temporary, 0, states, k)) return ckpt_finish(meta, temporary, params, n);
    ckpt_abandon(temporary);
    return -1;
}

static int save(int64_t step) {
    CkptMeta meta = meta_of(step);
    train(step);
    return save_one_rank(out, &meta, model, 3, optim, 1);
}

// Loads a save into cleared memory and compares every value. Its step, or -1.
static int64_t load(const char *folder) {
    CkptMeta meta;
    train(0);
    memset(wte, 0, sizeof wte), memset(wq, 0, sizeof wq), memset(lambda, 0, sizeof lambda);
    memset(moment, 0, sizeof moment);
    restore_save(folder, &meta, model, 3, optim, 1);
    int64_t step = meta.step;
    bool right = wte[127] == (float)(step * 1000 + 127) && wq[255] == (float)(step * 1000 - 255) &&
                 wte[0] == (float)(step * 1000) && lambda[0] == (float)step && lambda[1] == -1 &&
                 moment[127] == (float)step / 128 && meta.loader_row == (uint64_t)step * 8;
    ckpt_meta_free(&meta);
    return right ? step : -1;
}

// The step that --resume auto goes on from; 0: there is none.
static int64_t newest(void) {
    char folder[IO_PATH_MAX];
    return ckpt_find(out, "auto", folder) ? load(folder) : 0;
}

static const char *path_of(int64_t step, const char *file) {
    static char path[IO_PATH_MAX];
    snprintf(path, sizeof path, "%s/ckpt/step_%08lld%s%s", out, (long long)step, *file ? "/" : "",
             file);
    return path;
}

static void begin_anew(void) {
    char folder[IO_PATH_MAX];
    snprintf(folder, sizeof folder, "%s/ckpt", out);
    CHECK_INT(io_remove(folder), 0);
}

// Names in OUT/ckpt, joined by spaces.
static const char *listing(void) {
    static char text[4096];
    char folder[IO_PATH_MAX], **names;
    snprintf(folder, sizeof folder, "%s/ckpt", out);
    int count = io_list_dir(folder, &names);
    text[0] = 0;
    for (int i = 0; i < count; i++) strcat(text, i ? " " : ""), strcat(text, names[i]);
    io_free_names(names, count < 0 ? 0 : count);
    return text;
}

// True when something of an unfinished or replaced save is there.
static bool leftovers(void) { return strstr(listing(), ".tmp") || strstr(listing(), ".old"); }

static size_t size_of(const char *path) {
    struct stat st;
    return stat(path, &st) ? 0 : (size_t)st.st_size;
}

static void flip_bit(const char *path, size_t bit) {
    unsigned char byte = 0;
    int fd = open(path, O_RDWR);
    bool ok = fd >= 0 && pread(fd, &byte, 1, (off_t)(bit / 8)) == 1;
    byte ^= (unsigned char)(1 << bit % 8);
    ok = ok && pwrite(fd, &byte, 1, (off_t)(bit / 8)) == 1;
    if (!ok || close(fd)) perror(path), exit(1);
}

// A bit of the last tensor's data.
static void damage(int64_t step) {
    const char *path = path_of(step, "model.safetensors");
    flip_bit(path, 8 * size_of(path) - 3);
}

// Between overhear(true) and overhear(false), stderr goes to `said`.
static void overhear(bool start) {
    static int keep = -1;
    static FILE *file;
    fflush(stderr);
    if (start) {
        keep = dup(2), file = tmpfile();
        dup2(fileno(file), 2);
        return;
    }
    dup2(keep, 2), close(keep);
    rewind(file);
    said[fread(said, 1, sizeof said - 1, file)] = 0;
    fclose(file);
}

static int warnings(void) {
    int count = 0;
    for (const char *p = said; (p = strstr(p, "warning: ")) != NULL; p++) count++;
    return count;
}

static void fail_at(IoFaultKind kind, long at, bool sticky) {
    io_fault.kind = kind, io_fault.at = at, io_fault.sticky = sticky, io_fault.calls = 0;
}

static void fail_no_more(void) { io_fault.kind = IO_FAULT_NONE; }

// Runs the action in a child process whose at-th call is its last. False when it had none such.
static bool killed_at(long at, int (*action)(int64_t), int64_t step) {
    int status = 0;
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        fail_at(IO_FAULT_EXIT, at, false);
        _exit(action(step) ? 1 : 0);
    }
    waitpid(pid, &status, 0);
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    CHECK(code == IO_FAULT_EXIT_CODE || code == 0);
    return code == IO_FAULT_EXIT_CODE;
}

// ---------------------------------------------------------------------------------------------

TEST(what_is_saved_is_loaded) {
    char folder[IO_PATH_MAX];
    CkptMeta meta;
    begin_anew();
    CHECK(!ckpt_find(out, "auto", folder));
    CHECK_INT(save(7), 0);
    CHECK(ckpt_find(out, "auto", folder));
    CHECK_STR(folder, path_of(7, ""));
    CHECK_INT(load(folder), 7);
    train(1);
    restore_save(folder, &meta, model, 3, NULL, 0);  // without the optimizer
    CHECK_INT(meta.step, 7);
    CHECK_INT(meta.tokens, 7 * 512);
    CHECK_INT(meta.loader_seed, 1337);
    CHECK_INT(meta.loader_epoch, 1);
    CHECK(meta.loader_fingerprint == UINT64_MAX - 1);
    CHECK_STR(note_of(&meta, "flags"), "--depth 1 --prompt \"a \\ b\"");
    CHECK_STR(note_of(&meta, "data"), "T 64 bestfit; train_000.bin 1000 c0ffee");
    CHECK_STR(note_of(&meta, "none"), "(none)");
    CHECK(wte[0] == 7000 && moment[0] == 1);
    ckpt_meta_free(&meta);
}

TEST(a_save_is_a_folder_of_three_files) {
    char **names;
    begin_anew();
    CHECK_INT(save(100), 0);
    CHECK_STR(listing(), "step_00000100");
    int count = io_list_dir(path_of(100, ""), &names);
    CHECK_INT(count, 3);
    CHECK_STR(names[0], "meta.json");
    CHECK_STR(names[1], "model.safetensors");
    CHECK_STR(names[2], "optim_rank000.safetensors");
    io_free_names(names, count);
}

TEST(everything_is_synced_before_it_gets_its_name) {
    char expected[1024];
    const char *run = strrchr(out, '/') + 1;
    begin_anew();
    trace[0] = 0;
    CHECK_INT(save(1), 0);
    snprintf(expected, sizeof expected,
             "sync %s, sync optim_rank000.safetensors.tmp, rename optim_rank000.safetensors, "
             "sync step_00000001.tmp, sync model.safetensors.tmp, rename model.safetensors, "
             "sync step_00000001.tmp, sync meta.json.tmp, rename meta.json, sync "
             "step_00000001.tmp, rename step_00000001, sync ckpt",
             run);
    CHECK_STR(trace, expected);
}

TEST(newest_is_by_number_not_by_name) {
    begin_anew();
    CHECK_INT(save(99999999), 0);
    CHECK_INT(save(100000000), 0);
    CHECK_INT(save(5), 0);
    char folder[IO_PATH_MAX];
    CHECK(ckpt_find(out, "auto", folder));
    CHECK_STR(folder, path_of(100000000, ""));
}

TEST(unfinished_and_foreign_names_are_passed_over) {
    begin_anew();
    CHECK_INT(save(3), 0);
    const char *names[] = {"step_00000009.tmp", "step_9", "step_00000009x", "notes",
                           "step_00000009.old.tmp"};
    for (int i = 0; i < 5; i++) {
        char path[IO_PATH_MAX];
        snprintf(path, sizeof path, "%s/ckpt/%s/sub", out, names[i]);
        CHECK_INT(io_make_dir(path), 0);
    }
    overhear(true);
    CHECK_INT(newest(), 3);
    overhear(false);
    CHECK_INT(warnings(), 0);
    CHECK_INT(save(4), 0);
    CHECK_STR(listing(), "notes step_00000003 step_00000004 step_00000009x step_9");
}

TEST(a_thousand_flipped_bits_and_a_hundred_cuts_are_all_refused) {
    static const char *files[] = {"meta.json", "model.safetensors", "optim_rank000.safetensors"};
    RandKey key = {1, 2, RAND_SAMPLE};
    begin_anew();
    CHECK_INT(save(1), 0);
    int named = 0;
    for (uint64_t k = 0; k < 1000; k++) {
        const char *path = path_of(1, files[k % 3]);
        size_t bit = rand_u32(key, k) % (8 * size_of(path));
        flip_bit(path, bit);
        test_check(ckpt_check(path_of(1, ""), true) && strstr(io_error, files[k % 3]), __FILE__,
                   __LINE__, "%s, bit %zu: not refused, or not named: %s", files[k % 3], bit,
                   io_error);
        named += strstr(io_error, "tensor ") && strstr(io_error, " is damaged");
        flip_bit(path_of(1, files[k % 3]), bit);
        CHECK(k % 100 || ckpt_check(path_of(1, ""), true) == 0);
    }
    CHECK(named > 300);  // those in the data name their tensor
    for (uint64_t k = 0; k < 100; k++) {
        const char *file = files[k % 3];
        CHECK_INT(save(1), 0);
        size_t size = rand_u32(key, 1000 + k) % size_of(path_of(1, file));
        CHECK_INT(truncate(path_of(1, file), (off_t)size), 0);
        test_check(ckpt_check(path_of(1, ""), true) && strstr(io_error, file), __FILE__, __LINE__,
                   "%s cut to %zu bytes: not refused, or not named: %s", file, size, io_error);
    }
}

TEST(a_file_of_another_save_is_refused) {  // whole in itself, but not the one meta.json means
    static const char *files[] = {"model.safetensors", "optim_rank000.safetensors"};
    for (int k = 0; k < 2; k++) {
        char from[IO_PATH_MAX];
        begin_anew();
        CHECK_INT(save(1), 0);
        CHECK_INT(save(2), 0);
        snprintf(from, sizeof from, "%s", path_of(1, files[k]));
        CHECK_INT(io_rename(from, path_of(2, files[k])), 0);
        CHECK_INT(ckpt_check(path_of(2, ""), true), -1);
        CHECK(strstr(io_error, files[k]) && strstr(io_error, "not this save's"));
        CHECK_INT(ckpt_check(path_of(1, ""), true), -1);
        CHECK(strstr(io_error, files[k]) && strstr(io_error, "No such file"));
    }
}

TEST(a_damaged_newest_save_gives_one_warning_and_the_one_before) {
    begin_anew();
    for (int step = 1; step <= 3; step++) CHECK_INT(save(step), 0);
    damage(3);
    overhear(true);
    CHECK_INT(newest(), 2);
    overhear(false);
    CHECK_INT(warnings(), 1);
    CHECK(strstr(said, "step_00000003") && strstr(said, "tensor resid_lambda is damaged"));
    damage(2);
    overhear(true);
    CHECK_INT(newest(), 1);
    overhear(false);
    CHECK_INT(warnings(), 2);
    damage(1);
    DIES(EXIT_CHECKPOINT, "/ckpt: found 3 saves, none of them whole; remove them to start over")
    newest();
}

TEST(an_explicit_save_that_is_damaged_ends_the_run) {
    char folder[IO_PATH_MAX];
    begin_anew();
    CHECK_INT(save(1), 0);
    CHECK_INT(save(2), 0);
    CHECK(ckpt_find(out, path_of(1, ""), folder));
    CHECK_INT(load(folder), 1);
    damage(1);
    DIES(EXIT_CHECKPOINT, "tensor resid_lambda is damaged") ckpt_find(out, path_of(1, ""), folder);
    DIES(EXIT_CHECKPOINT, "meta.json: No such file") ckpt_find(out, "/nonexistent", folder);
    DIES(EXIT_CHECKPOINT, "this is a run's folder; give one of its saves (")
    ckpt_find("", out, folder);
    DIES(EXIT_CHECKPOINT, "tensor resid_lambda is damaged") load(path_of(1, ""));
}

// Only a folder that is not there holds no saves.
TEST(a_folder_that_cannot_be_looked_at_is_no_fresh_start) {
    char folder[IO_PATH_MAX];
    static const char *const targets[] = {"ckpt", "nowhere", "/dev/null"};
    snprintf(folder, sizeof folder, "%s/ckpt", out);
    for (int i = 0; i < 3; i++) {
        begin_anew();
        CHECK_INT(newest(), 0);
        CHECK_INT(symlink(targets[i], folder), 0);
        DIES(EXIT_CHECKPOINT, "cannot look for saves: cannot list ") newest();
    }
    begin_anew();
}

// Loads save 1 with one expected tensor changed.
static void load_with(int which, StDtype dtype, uint64_t rows, const char *name, int count) {
    CkptMeta meta;
    train(1);
    model[which].dtype = dtype, model[which].shape[0] = rows;
    snprintf(model[which].name, sizeof model[which].name, "%s", name);
    restore_save(path_of(1, ""), &meta, model, count, optim, 1);
}

TEST(a_model_that_does_not_fit_is_refused_with_both_shapes) {
    begin_anew();
    CHECK_INT(save(1), 0);
    DIES(0, "") load_with(0, ST_F32, 32, "wte", 3);
    DIES(EXIT_CHECKPOINT, "tensor wte: found F32 (32, 4), expected F32 (64, 4)")
    load_with(0, ST_F32, 64, "wte", 3);
    DIES(EXIT_CHECKPOINT, "found F32 (32, 4), expected BF16 (32, 4)")
    load_with(0, ST_BF16, 32, "wte", 3);
    DIES(EXIT_CHECKPOINT, "must be those of the save: --depth 1")
    load_with(0, ST_F32, 64, "wte", 3);
    DIES(EXIT_CHECKPOINT, "tensor layers.1.wq is missing")
    load_with(1, ST_F32, 16, "layers.1.wq", 3);
    DIES(EXIT_CHECKPOINT, "found tensor resid_lambda, which") load_with(0, ST_F32, 32, "wte", 2);
}

TEST(another_format_of_meta_is_refused) {
    char *text, *found;
    size_t size;
    begin_anew();
    CHECK_INT(save(1), 0);
    CHECK_INT(io_read_file(path_of(1, "meta.json"), &text, &size), 0);
    found = strstr(text, "\"format\": 1");
    CHECK(found != NULL);
    found[10] = '2';
    char crc[9];
    snprintf(crc, sizeof crc, "%08x", (unsigned)crc32c_sealed(text, size, strlen(CKPT_SEAL)));
    memcpy(text + strlen(CKPT_SEAL), crc, 8);
    CHECK_INT(io_write_file(path_of(1, "meta.json"), text, size), 0);
    CHECK_INT(ckpt_check(path_of(1, ""), true), -1);
    CHECK(strstr(io_error, "meta.json") && strstr(io_error, "format"));
    free(text);
}

// ---------------------------------------------------------------------------------------------
// Every call.

TEST(death_at_every_call_of_a_save_leaves_the_newest_whole_one) {
    long at = 1;
    begin_anew();
    CHECK_INT(save(1), 0);
    for (; killed_at(at, save, 2); at++) {
        bool there = io_exists(path_of(2, ""));
        overhear(true);
        CHECK_INT(newest(), there ? 2 : 1);
        overhear(false);
        CHECK_INT(warnings(), 0);
        CHECK_INT(io_remove(path_of(2, "")), 0);
    }
    CHECK(at > 30);
    CHECK_INT(newest(), 2);
    CHECK(!leftovers());
}

TEST(death_at_every_call_of_the_first_save) {
    long at = 1;
    for (begin_anew(); killed_at(at, save, 1); at++) {
        CHECK_INT(newest(), io_exists(path_of(1, "")) ? 1 : 0);
        begin_anew();
    }
    CHECK_INT(newest(), 1);
}

TEST(death_at_every_call_of_saving_a_step_again) {
    long at = 1;
    int olds = 0;
    begin_anew();
    CHECK_INT(save(1), 0);
    for (;; at++) {
        CHECK_INT(save(2), 0);
        if (!killed_at(at, save, 2)) break;
        olds += strstr(listing(), "step_00000002.old") != NULL;
        overhear(true);
        CHECK_INT(newest(), 2);
        overhear(false);
        CHECK_INT(warnings(), 0);
    }
    CHECK(olds > 0);
    CHECK_STR(listing(), "step_00000001 step_00000002");
}

static int prune_one(int64_t unused) {
    (void)unused;
    return ckpt_prune(out, 1, 0);
}

TEST(death_at_every_call_of_pruning) {
    begin_anew();
    for (long at = 1;; at++) {
        for (int step = 1; step <= 3; step++)
            if (!io_exists(path_of(step, ""))) CHECK_INT(save(step), 0);
        if (!killed_at(at, prune_one, 0)) break;
        CHECK_INT(newest(), 3);
        CkptEntry *entries;
        int count = ckpt_list(out, &entries);
        for (int i = 0; i < count; i++) CHECK_INT(ckpt_check(entries[i].path, true), 0);
        free(entries);
    }
    CHECK_STR(listing(), "step_00000003");
}

static void save_with_a_failure(IoFaultKind kind, bool sticky) {
    long failures = 0;
    begin_anew();
    CHECK_INT(save(1), 0);
    for (long at = 1;; at++) {
        fail_at(kind, at, sticky);
        int failed = save(2);
        bool reached = io_fault.calls >= at;
        fail_no_more();
        bool there = io_exists(path_of(2, ""));
        overhear(true);
        CHECK_INT(newest(), there ? 2 : 1);
        overhear(false);
        CHECK_INT(warnings(), 0);
        CHECK(failed || there);
        CHECK(!failed || strlen(io_error) > 20);
        CHECK(sticky || !leftovers());
        CHECK_INT(save(2), 0);  // the next try works, and clears up what was left
        CHECK(!leftovers());
        CHECK_INT(newest(), 2);
        CHECK_INT(io_remove(path_of(2, "")), 0);
        failures += failed != 0;
        if (!reached) break;
    }
    CHECK(kind == IO_FAULT_SHORT ? failures == 0 : failures > 20);
}

TEST(a_full_disk_at_every_call) { save_with_a_failure(IO_FAULT_ENOSPC, false); }
TEST(a_disk_that_stays_full_from_every_call) { save_with_a_failure(IO_FAULT_ENOSPC, true); }
TEST(an_input_output_error_at_every_call) { save_with_a_failure(IO_FAULT_EIO, false); }
TEST(short_counts_at_every_call) { save_with_a_failure(IO_FAULT_SHORT, false); }

TEST(a_read_that_fails_passes_over_the_save) {
    begin_anew();
    CHECK_INT(save(1), 0);
    CHECK_INT(save(2), 0);
    fail_at(IO_FAULT_EIO, 8, false);  // after the 5 that list the folder
    overhear(true);
    int64_t found = newest();
    overhear(false);
    fail_no_more();
    CHECK_INT(found, 1);
    CHECK_INT(warnings(), 1);
    CHECK(strstr(said, "Input/output error"));
}

// ---------------------------------------------------------------------------------------------
// Retention.

static void save_all(int first, int last) {
    begin_anew();
    for (int step = first; step <= last; step++) CHECK_INT(save(step), 0);
}

TEST(prune_keeps_the_newest) {
    save_all(1, 5);
    CHECK_INT(ckpt_prune(out, 0, 0), 0);
    CHECK_INT(newest(), 5);
    CHECK_INT(ckpt_prune(out, 3, 0), 0);
    CHECK_STR(listing(), "step_00000003 step_00000004 step_00000005");
    CHECK_INT(ckpt_prune(out, 7, 0), 0);
    CHECK_STR(listing(), "step_00000003 step_00000004 step_00000005");
    CHECK_INT(ckpt_prune(out, 1, 0), 0);
    CHECK_STR(listing(), "step_00000005");
}

TEST(prune_keeps_every_kth) {
    save_all(1, 9);
    CHECK_INT(ckpt_prune(out, 2, 3), 0);
    CHECK_STR(listing(), "step_00000003 step_00000006 step_00000008 step_00000009");
}

TEST(prune_counts_whole_saves_only) {
    save_all(1, 5);
    damage(5);
    CHECK_INT(truncate(path_of(4, "meta.json"), 20), 0);
    overhear(true);
    CHECK_INT(ckpt_prune(out, 2, 0), 0);
    overhear(false);
    CHECK_INT(warnings(), 2);
    CHECK_STR(listing(), "step_00000002 step_00000003 step_00000004 step_00000005");
    overhear(true);
    CHECK_INT(newest(), 3);
    overhear(false);
}

TEST(prune_never_removes_the_last_whole_save) {
    save_all(1, 4);
    for (int step = 2; step <= 4; step++) damage(step);
    overhear(true);
    CHECK_INT(ckpt_prune(out, 1, 0), 0);
    CHECK_INT(newest(), 1);
    damage(1);
    CHECK_INT(ckpt_prune(out, 1, 0), 0);
    overhear(false);
    CHECK_STR(listing(), "step_00000001 step_00000002 step_00000003 step_00000004");
}

TEST(prune_of_nothing) {
    begin_anew();
    CHECK_INT(ckpt_prune(out, 2, 0), 0);
    CHECK_INT(ckpt_prune("/nonexistent", 2, 0), 0);
}

TEST(prune_removes_a_save_that_was_replaced) {
    char old[2 * IO_PATH_MAX];
    save_all(1, 3);
    snprintf(old, sizeof old, "%s.old", path_of(2, ""));
    CHECK_INT(io_rename(path_of(2, ""), old), 0);
    CHECK_INT(ckpt_prune(out, 2, 0), 0);
    CHECK_STR(listing(), "step_00000002.old step_00000003");  // the only one of its step
    CHECK_INT(save(2), 0);
    CHECK_INT(ckpt_prune(out, 2, 1), 0);
    CHECK_STR(listing(), "step_00000002 step_00000003");
}

int main(void) {
    snprintf(out, sizeof out, "%s", test_make_dir());
    RUN(what_is_saved_is_loaded);
    RUN(a_save_is_a_folder_of_three_files);
    RUN(everything_is_synced_before_it_gets_its_name);
    RUN(newest_is_by_number_not_by_name);
    RUN(unfinished_and_foreign_names_are_passed_over);
    RUN(a_thousand_flipped_bits_and_a_hundred_cuts_are_all_refused);
    RUN(a_file_of_another_save_is_refused);
    RUN(a_damaged_newest_save_gives_one_warning_and_the_one_before);
    RUN(an_explicit_save_that_is_damaged_ends_the_run);
    RUN(a_folder_that_cannot_be_looked_at_is_no_fresh_start);
    RUN(a_model_that_does_not_fit_is_refused_with_both_shapes);
    RUN(another_format_of_meta_is_refused);
    RUN(death_at_every_call_of_a_save_leaves_the_newest_whole_one);
    RUN(death_at_every_call_of_the_first_save);
    RUN(death_at_every_call_of_saving_a_step_again);
    RUN(death_at_every_call_of_pruning);
    RUN(a_full_disk_at_every_call);
    RUN(a_disk_that_stays_full_from_every_call);
    RUN(an_input_output_error_at_every_call);
    RUN(short_counts_at_every_call);
    RUN(a_read_that_fails_passes_over_the_save);
    RUN(prune_keeps_the_newest);
    RUN(prune_keeps_every_kth);
    RUN(prune_counts_whole_saves_only);
    RUN(prune_never_removes_the_last_whole_save);
    RUN(prune_of_nothing);
    RUN(prune_removes_a_save_that_was_replaced);
    test_remove_dir(out);
    return test_end();
}
