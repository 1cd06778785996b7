// io.h: every file the project opens, reads, writes, syncs or renames goes through here.
//
// Functions return 0, or -1 with a sentence in io_error: what was tried, on which file, at which
// offset, and why it failed. They never die: a full disk must not stop a training run, so the
// caller decides. Reads and writes loop over short counts and EINTR. Nothing is mapped: a full disk
// under a mapping arrives as SIGBUS, a failed write() as an error code.
//
// A file that others may read is written with io_write_file or io_write_parts: beside its place,
// synced, renamed, the folder synced. A reader sees the old content or the new, never a part.
//
// Compiled with -DIO_FAULTS (the test build), the n-th system call of a kind can be made to fail;
// io_fault below says how. Without it that code is not there.
#ifndef LLMC_IO_H
#define LLMC_IO_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define IO_PATH_MAX 1024

typedef struct {
    int fd;                  // -1 when closed
    char path[IO_PATH_MAX];  // for messages
    uint64_t written;        // bytes written so far
} IoFile;

static __thread char io_error[IO_PATH_MAX + 256];  // the reason of the last -1
static __thread int io_errno;                      // of the last system call that failed

// ---------------------------------------------------------------------------------------------
// Faults, for tests: "at every call" is a loop over `at`.

#ifdef IO_FAULTS
typedef enum {
    IO_FAULT_NONE,
    IO_FAULT_ENOSPC,
    IO_FAULT_EIO,
    IO_FAULT_SHORT,
    IO_FAULT_EXIT
} IoFaultKind;
static const char *const io_fault_name[] = {"none", "enospc", "eio", "short", "exit"};

static struct {
    IoFaultKind kind;
    long at;      // the at-th call from now fails, counted from 1
    long calls;   // calls seen so far
    bool sticky;  // every call from the at-th on fails, as on a disk that stays full
} io_fault;

#define IO_FAULT_EXIT_CODE 42

// Counts one system call. Returns the fault to act out in it, IO_FAULT_NONE nearly always.
// The environment variable IO_FAULT="kind:n" (enospc, eio, short, exit) sets it from outside.
static IoFaultKind io_fault_next(void) {
    long call = __atomic_add_fetch(&io_fault.calls, 1, __ATOMIC_RELAXED);  // threads read too
    const char *spec = call == 1 ? getenv("IO_FAULT") : NULL;
    for (int kind = IO_FAULT_ENOSPC; spec && kind <= IO_FAULT_EXIT; kind++) {
        size_t length = strlen(io_fault_name[kind]);
        if (strncmp(spec, io_fault_name[kind], length) || spec[length] != ':') continue;
        io_fault.kind = (IoFaultKind)kind, io_fault.at = atol(spec + length + 1);
    }
    bool hit = io_fault.sticky ? call >= io_fault.at : call == io_fault.at;
    if (io_fault.kind == IO_FAULT_NONE || !hit) return IO_FAULT_NONE;
    if (io_fault.kind == IO_FAULT_EXIT) _exit(IO_FAULT_EXIT_CODE);
    errno = io_fault.kind == IO_FAULT_ENOSPC ? ENOSPC : EIO;
    return io_fault.kind;
}
#define IO_CALL(call)                                                                              \
    (io_fault_next() > IO_FAULT_NONE && io_fault.kind != IO_FAULT_SHORT ? -1 : (call))
#define IO_COUNTED_CALL(call, count)                                                               \
    ({                                                                                             \
        IoFaultKind fault_ = io_fault_next();                                                      \
        if (fault_ == IO_FAULT_SHORT && (count) > 1) (count) /= 2;                                 \
        fault_ == IO_FAULT_NONE || fault_ == IO_FAULT_SHORT ? (call) : -1;                         \
    })
#else
#define IO_CALL(call)                (call)
#define IO_COUNTED_CALL(call, count) (call)
#endif

// ---------------------------------------------------------------------------------------------
// One file.

static inline int io_fail(const char *what, const char *path) {
    io_errno = errno;
    snprintf(io_error, sizeof io_error, "cannot %s %s: %s", what, path, strerror(io_errno));
    return -1;
}

// True when what failed last did so for want of room, which may come back.
static inline bool io_disk_full(void) { return io_errno == ENOSPC || io_errno == EDQUOT; }

static inline int io_open_flags(IoFile *f, const char *path, int flags, const char *what) {
    memset(f, 0, sizeof *f);
    f->fd = -1;
    size_t length = strlen(path);
    if (length >= sizeof f->path) {
        errno = ENAMETOOLONG;
        return io_fail(what, path);
    }
    memcpy(f->path, path, length + 1);
    do f->fd = IO_CALL(open(path, flags | O_CLOEXEC, 0666));
    while (f->fd < 0 && errno == EINTR);
    return f->fd < 0 ? io_fail(what, path) : 0;
}

static inline int io_close(IoFile *f) {
    int fd = f->fd;
    f->fd = -1;
    if (fd < 0) return 0;
    int failed = IO_CALL(0);  // the descriptor is released even when close reports an error
    return close(fd) || failed ? io_fail("close", f->path) : 0;
}

// Opens a regular file for reading. A folder is refused here, with that word. (Without O_NONBLOCK,
// opening a FIFO waits until something writes to it.)
static inline int io_open_read(IoFile *f, const char *path) {
    if (io_open_flags(f, path, O_RDONLY | O_NONBLOCK, "open")) return -1;
    struct stat st;
    if (fstat(f->fd, &st)) {
        io_fail("stat", path);
    } else if (S_ISREG(st.st_mode)) {
        return 0;
    } else {
        snprintf(io_error, sizeof io_error, "cannot read %s: it is %s, expected a file", path,
                 S_ISDIR(st.st_mode) ? "a folder" : "not a regular file");
    }
    close(f->fd);
    f->fd = -1;
    return -1;
}

// Creates a file, or empties one that is there.
static inline int io_create(IoFile *f, const char *path) {
    return io_open_flags(f, path, O_WRONLY | O_CREAT | O_TRUNC, "create");
}

// Opens a file to write at its end; creates it when it is not there.
static inline int io_open_append(IoFile *f, const char *path) {
    return io_open_flags(f, path, O_WRONLY | O_CREAT | O_APPEND, "append to");
}

// Opens a file, made where there is none, and locks it until it is closed or the process ends.
// Returns 1 when another process has the lock.
static inline int io_lock(IoFile *f, const char *path) {
    if (io_open_append(f, path)) return -1;
    if (!IO_CALL(flock(f->fd, LOCK_EX | LOCK_NB))) return 0;
    io_fail("lock", path);
    close(f->fd);
    f->fd = -1;
    return io_errno == EWOULDBLOCK ? 1 : -1;
}

// Size in bytes, or -1.
static inline int64_t io_size(IoFile *f) {
    struct stat st;
    return fstat(f->fd, &st) ? io_fail("stat", f->path) : (int64_t)st.st_size;
}

// Reads exactly `count` bytes at `offset`; fewer is an error that names both numbers.
static inline int io_read_at(IoFile *f, void *data, size_t count, uint64_t offset) {
    size_t done = 0;
    while (done < count) {
        size_t want = count - done;
        ssize_t got =
            IO_COUNTED_CALL(pread(f->fd, (char *)data + done, want, (off_t)(offset + done)), want);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return io_fail("read", f->path);
        if (got == 0) {
            int64_t size = io_size(f);  // may lie before `offset`
            if (size < 0) return -1;
            snprintf(io_error, sizeof io_error, "%s ends at byte %lld, expected %lld more", f->path,
                     (long long)size, (long long)(offset + count) - (long long)size);
            return -1;
        }
        done += (size_t)got;
    }
    return 0;
}

static inline int io_write(IoFile *f, const void *data, size_t count) {
    size_t done = 0;
    while (done < count) {
        size_t want = count - done;
        ssize_t put = IO_COUNTED_CALL(write(f->fd, (const char *)data + done, want), want);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) return io_fail("write", f->path);
        done += (size_t)put;
        f->written += (uint64_t)put;
    }
    return 0;
}

static inline int io_sync(IoFile *f) {
    return IO_CALL(fsync(f->fd)) ? io_fail("sync", f->path) : 0;
}

// ---------------------------------------------------------------------------------------------
// Names and folders.

static inline bool io_exists(const char *path) {
    struct stat st;
    return stat(path, &st) == 0;
}

static inline bool io_is_dir(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

// Makes the folder and those above it. One that is there already is no error.
static inline int io_make_dir(const char *path) {
    char part[IO_PATH_MAX];
    int length = snprintf(part, sizeof part, "%s", path);
    if (length == 0 || length >= (int)sizeof part) {
        errno = length ? ENAMETOOLONG : ENOENT;
        return io_fail("make the folder", path);
    }
    for (char *p = part + 1;; p++) {
        if (*p && *p != '/') continue;
        char end = *p;
        *p = 0;
        if (!io_is_dir(part) && IO_CALL(mkdir(part, 0777)) && (errno != EEXIST || !io_is_dir(part)))
            return io_fail("make the folder", part);
        *p = end;
        if (!end) return 0;
    }
}

// Makes a rename or a new name in the folder durable.
static inline int io_sync_dir(const char *path) {
    IoFile f;
    if (io_open_flags(&f, *path ? path : "/", O_RDONLY | O_DIRECTORY, "open")) return -1;
    int failed = io_sync(&f);
    return io_close(&f) || failed ? -1 : 0;
}

// Renames and syncs the folder that holds the new name.
static inline int io_rename(const char *from, const char *to) {
    if (IO_CALL(rename(from, to))) return io_fail("rename to", to);
    char dir[IO_PATH_MAX];
    snprintf(dir, sizeof dir, "%s", to);
    char *slash = strrchr(dir, '/');
    if (!slash) return io_sync_dir(".");
    *slash = 0;
    return io_sync_dir(dir);
}

// Names in a folder, sorted by byte value, without . and .. ; *names and each of its entries are
// the caller's to free (io_free_names). Returns their number, or -1.
static inline int io_name_order(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static inline void io_free_names(char **names, int count) {
    for (int i = 0; i < count; i++) free(names[i]);
    free(names);
}

static inline int io_list_dir(const char *path, char ***names) {
    *names = NULL;
    DIR *dir = opendir(path);
    if (!dir) return io_fail("list", path);
    int count = 0, room = 0, failed = 0;
    while (!failed) {
        struct dirent *e = IO_CALL(0) ? NULL : (errno = 0, readdir(dir));  // 0: it is the end
        if (!e && !errno) break;
        if (e && (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))) continue;
        if (e && count == room) {
            size_t size = sizeof **names * (size_t)(room = room ? 2 * room : 16);
            char **more = (char **)realloc(*names, size);
            *names = more ? more : *names, failed = !more;
        }
        failed = failed || !e || !((*names)[count] = strdup(e->d_name));
        count += !failed;
    }
    if (failed) io_fail("list", path), io_free_names(*names, count), *names = NULL;
    closedir(dir);
    if (count && !failed) qsort(*names, (size_t)count, sizeof **names, io_name_order);
    return failed ? -1 : count;
}

// Removes a file, or a folder with all it holds. What is not there is no error.
static inline int io_remove(const char *path) {
    struct stat st;
    if (lstat(path, &st)) return errno == ENOENT ? 0 : io_fail("remove", path);
    if (!S_ISDIR(st.st_mode)) return IO_CALL(unlink(path)) ? io_fail("remove", path) : 0;
    char **names;
    int count = io_list_dir(path, &names), failed = count < 0;
    for (int i = 0; i < count && !failed; i++) {
        char child[IO_PATH_MAX];
        int length = snprintf(child, sizeof child, "%s/%s", path, names[i]);
        errno = ENAMETOOLONG;
        failed = length >= (int)sizeof child ? io_fail("remove", path) : io_remove(child);
    }
    io_free_names(names, count);
    if (failed) return -1;
    return IO_CALL(rmdir(path)) ? io_fail("remove", path) : 0;
}

// ---------------------------------------------------------------------------------------------
// Whole files.

// Reads all of a file. *data has a NUL after its *count bytes, and is the caller's to free.
static inline int io_read_file(const char *path, char **data, size_t *count) {
    IoFile f;
    *data = NULL, *count = 0;
    if (io_open_read(&f, path)) return -1;
    int64_t size = io_size(&f);
    bool failed = size < 0;
    if (!failed && !(*data = (char *)malloc((size_t)size + 1))) failed = io_fail("read", path);
    failed = failed || io_read_at(&f, *data, (size_t)size, 0);
    if (!failed) (*data)[size] = 0, *count = (size_t)size;
    close(f.fd);
    if (failed) free(*data), *data = NULL;
    return failed ? -1 : 0;
}

typedef struct {
    const void *data;  // (size)
    size_t size;
} IoPart;

// Replaces the content of a file at once, by these parts one after the other: writes path.tmp,
// syncs it, renames it, syncs the folder. On an error path.tmp is gone and the old content stands;
// only where syncing the folder is what failed, the new one is in place already but may not outlive
// a power cut.
static inline int io_write_parts(const char *path, const IoPart *parts, int n) {
    char beside[IO_PATH_MAX];
    if (snprintf(beside, sizeof beside, "%s.tmp", path) >= (int)sizeof beside) {
        errno = ENAMETOOLONG;
        return io_fail("create", path);
    }
    IoFile f;
    if (io_create(&f, beside)) return -1;
    bool failed = false;
    for (int i = 0; i < n && !failed; i++) failed = io_write(&f, parts[i].data, parts[i].size);
    failed = failed || io_sync(&f);
    if (failed)
        close(f.fd);
    else
        failed = io_close(&f) != 0;
    if (!failed && io_rename(beside, path) == 0) return 0;
    unlink(beside);
    return -1;
}

static inline int io_write_file(const char *path, const void *data, size_t count) {
    IoPart all = {data, count};
    return io_write_parts(path, &all, 1);
}

#endif
