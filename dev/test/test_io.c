// test_io.c: llmc/io.h, and what it leaves behind when a system call fails at any point.
#include "dev/test/test.h"
#include "llmc/io.h"

static char dir[256];  // a fresh folder for each test that calls begin()

static const char *in_dir(const char *name) {
    static char path[4][300];
    static int next;
    char *p = path[next++ % 4];
    snprintf(p, sizeof path[0], "%s/%s", dir, name);
    return p;
}

static void begin(void) {
    snprintf(dir, sizeof dir, "%s", test_make_dir());
    memset(&io_fault, 0, sizeof io_fault);
}

static void end(void) {
    memset(&io_fault, 0, sizeof io_fault);
    test_remove_dir(dir);
}

static void fail_at(IoFaultKind kind, long at, bool sticky) {
    memset(&io_fault, 0, sizeof io_fault);
    io_fault.kind = kind, io_fault.at = at, io_fault.sticky = sticky;
}

// The content of a file, or "absent".
static const char *content(const char *path) {
    static char text[100];
    char *data;
    size_t count;
    IoFaultKind kind = io_fault.kind;
    io_fault.kind = IO_FAULT_NONE;
    int failed = io_read_file(path, &data, &count);
    io_fault.kind = kind;
    if (failed) return "absent";
    snprintf(text, sizeof text, "%s", data);
    free(data);
    return text;
}

#define CHECK_SAYS(part)                                                                           \
    test_check(strstr(io_error, part) != NULL, __FILE__, __LINE__,                                 \
               "io_error: '%s', expected in it: '%s'", io_error, part)

TEST(write_then_read) {
    begin();
    IoFile f;
    char data[6] = "";
    CHECK_INT(io_create(&f, in_dir("a")), 0);
    CHECK_INT(io_write(&f, "hello ", 6), 0);
    CHECK_INT(io_write(&f, "world", 5), 0);
    CHECK_INT(f.written, 11);
    CHECK_INT(io_sync(&f), 0);
    CHECK_INT(io_size(&f), 11);
    CHECK_INT(io_close(&f), 0);
    CHECK_INT(f.fd, -1);
    CHECK_INT(io_close(&f), 0);  // a closed file may be closed again
    CHECK_INT(io_open_read(&f, in_dir("a")), 0);
    CHECK_INT(io_size(&f), 11);
    CHECK_INT(io_read_at(&f, data, 5, 6), 0);
    CHECK_STR(data, "world");
    CHECK_INT(io_read_at(&f, data, 0, 99), 0);
    CHECK_INT(io_close(&f), 0);
    end();
}

TEST(create_empties_and_append_keeps) {
    begin();
    IoFile f;
    for (int i = 0; i < 2; i++)
        CHECK(!io_create(&f, in_dir("a")) && !io_write(&f, "one", 3) && !io_close(&f));
    CHECK_STR(content(in_dir("a")), "one");
    for (int i = 0; i < 2; i++)
        CHECK(!io_open_append(&f, in_dir("a")) && !io_write(&f, "+", 1) && !io_close(&f));
    CHECK_STR(content(in_dir("a")), "one++");
    CHECK(!io_open_append(&f, in_dir("new")) && !io_write(&f, "x", 1) && !io_close(&f));
    CHECK_STR(content(in_dir("new")), "x");
    end();
}

TEST(short_read_names_both_numbers) {
    begin();
    IoFile f;
    char data[20];
    CHECK_INT(io_write_file(in_dir("a"), "0123456789", 10), 0);
    CHECK_INT(io_open_read(&f, in_dir("a")), 0);
    CHECK_INT(io_read_at(&f, data, 8, 5), -1);
    CHECK_SAYS("/a ends at byte 10, expected 3 more");
    CHECK_INT(io_read_at(&f, data, 1, 12), -1);
    CHECK_SAYS("/a ends at byte 10, expected 3 more");
    io_close(&f);
    end();
}

TEST(errors_name_the_file_and_the_reason) {
    begin();
    IoFile f;
    CHECK_INT(io_open_read(&f, in_dir("absent")), -1);
    CHECK_INT(f.fd, -1);
    CHECK_SAYS("cannot open ");
    CHECK_SAYS("/absent: No such file or directory");
    CHECK_INT(io_create(&f, in_dir("no/such/folder")), -1);
    CHECK_SAYS("cannot create ");
    CHECK_INT(io_open_append(&f, in_dir("no/such/folder")), -1);
    CHECK_SAYS("cannot append to ");
    CHECK_INT(io_rename(in_dir("absent"), in_dir("b")), -1);
    CHECK_SAYS("cannot rename to ");
    CHECK_INT(io_sync_dir(in_dir("absent")), -1);
    CHECK_INT(io_open_read(&f, "/dev/null"), -1);
    CHECK_SAYS("cannot read /dev/null: it is not a regular file, expected a file");
    CHECK_INT(mkfifo(in_dir("fifo"), 0666), 0);  // nobody writes to it
    CHECK_INT(io_open_read(&f, in_dir("fifo")), -1);
    CHECK_SAYS("/fifo: it is not a regular file, expected a file");
    end();
}

TEST(folder_is_refused) {
    begin();
    IoFile f;
    char *data;
    size_t count;
    CHECK_INT(io_open_read(&f, dir), -1);
    CHECK_INT(f.fd, -1);
    CHECK_SAYS("it is a folder, expected a file");
    CHECK_INT(io_read_file(dir, &data, &count), -1);
    CHECK(data == NULL);
    CHECK_INT(io_create(&f, dir), -1);
    CHECK_INT(io_write_file(dir, "x", 1), -1);
    CHECK(io_is_dir(dir));
    end();
}

TEST(long_paths_are_refused) {
    begin();
    IoFile f;
    char path[IO_PATH_MAX + 10];
    memset(path, 'a', sizeof path), path[sizeof path - 1] = 0;
    CHECK_INT(io_open_read(&f, path), -1);
    CHECK_SAYS("File name too long");
    CHECK_INT(io_make_dir(path), -1);
    path[IO_PATH_MAX - 2] = 0;  // fits, with .tmp it does not
    CHECK_INT(io_write_file(path, "x", 1), -1);
    CHECK_SAYS("File name too long");
    end();
}

TEST(exists_and_is_dir) {
    begin();
    CHECK(io_exists(dir) && io_is_dir(dir));
    CHECK(!io_exists(in_dir("a")) && !io_is_dir(in_dir("a")));
    CHECK_INT(io_write_file(in_dir("a"), "", 0), 0);
    CHECK(io_exists(in_dir("a")) && !io_is_dir(in_dir("a")));
    end();
}

TEST(make_dir_makes_those_above) {
    begin();
    CHECK_INT(io_make_dir(in_dir("a/b//c/")), 0);
    CHECK(io_is_dir(in_dir("a/b/c")));
    CHECK_INT(io_make_dir(in_dir("a/b/c")), 0);
    CHECK_INT(io_write_file(in_dir("file"), "x", 1), 0);
    CHECK_INT(io_make_dir(in_dir("file")), -1);
    CHECK_SAYS("/file: File exists");
    CHECK_INT(io_make_dir(in_dir("file/below")), -1);
    CHECK_INT(io_make_dir(""), -1);
    CHECK_SAYS("No such file or directory");
    end();
}

TEST(list_dir_is_sorted) {
    begin();
    char **names, name[8];
    CHECK_INT(io_list_dir(dir, &names), 0);
    io_free_names(names, 0);
    for (int i = 0; i < 40; i++) {
        snprintf(name, sizeof name, "%d", i * 7 % 40);
        CHECK_INT(io_write_file(in_dir(name), "", 0), 0);
    }
    CHECK_INT(io_make_dir(in_dir(".hidden")), 0);
    int count = io_list_dir(dir, &names);
    CHECK_INT(count, 41);
    CHECK_STR(names[0], ".hidden");
    CHECK_STR(names[2], "1");
    CHECK_STR(names[3], "10");
    for (int i = 1; i < count; i++) CHECK(strcmp(names[i - 1], names[i]) < 0);
    io_free_names(names, count);
    CHECK_INT(io_list_dir(in_dir("absent"), &names), -1);
    CHECK_SAYS("cannot list ");
    end();
}

TEST(remove_takes_all) {
    begin();
    CHECK_INT(io_make_dir(in_dir("a/b")), 0);
    CHECK_INT(io_write_file(in_dir("a/b/c"), "x", 1), 0);
    CHECK_INT(io_write_file(in_dir("a/d"), "x", 1), 0);
    CHECK_INT(io_make_dir(in_dir("kept")), 0);
    CHECK_INT(io_write_file(in_dir("kept/file"), "x", 1), 0);
    CHECK_INT(symlink(in_dir("kept"), in_dir("a/link")), 0);
    CHECK_INT(io_remove(in_dir("a")), 0);
    CHECK(!io_exists(in_dir("a")));
    CHECK_STR(content(in_dir("kept/file")), "x");  // the link is removed, not what it points at
    CHECK_INT(io_remove(in_dir("kept")), 0);
    CHECK_INT(io_remove(in_dir("kept")), 0);
    CHECK(!io_exists(in_dir("kept")));
    end();
}

TEST(rename_replaces) {
    begin();
    CHECK_INT(io_write_file(in_dir("a"), "new", 3), 0);
    CHECK_INT(io_write_file(in_dir("b"), "old", 3), 0);
    CHECK_INT(io_rename(in_dir("a"), in_dir("b")), 0);
    CHECK_STR(content(in_dir("b")), "new");
    CHECK(!io_exists(in_dir("a")));
    char before[IO_PATH_MAX];
    CHECK(getcwd(before, sizeof before) && chdir(dir) == 0);  // a name without a folder
    CHECK_INT(io_rename("b", "c"), 0);
    CHECK(chdir(before) == 0);
    CHECK_STR(content(in_dir("c")), "new");
    end();
}

TEST(read_file_gives_all_bytes) {
    begin();
    char *data;
    size_t count;
    CHECK_INT(io_write_file(in_dir("a"), "x\0y", 3), 0);
    CHECK_INT(io_read_file(in_dir("a"), &data, &count), 0);
    CHECK_INT(count, 3);
    CHECK(!memcmp(data, "x\0y", 4));
    free(data);
    CHECK_INT(io_write_file(in_dir("a"), "", 0), 0);
    CHECK_INT(io_read_file(in_dir("a"), &data, &count), 0);
    CHECK_INT(count, 0);
    CHECK_STR(data, "");
    free(data);
    end();
}

// A sparse file of 2^62 bytes, where the file system has such.
TEST(a_file_larger_than_memory_is_an_error_with_a_reason) {
#ifdef __SANITIZE_ADDRESS__
    SKIP("AddressSanitizer ends the program in malloc");
#endif
    begin();
    char *data;
    size_t count;
    bool made = !io_write_file(in_dir("a"), "x", 1) && !truncate(in_dir("a"), 1ll << 62);
    *io_error = 0;
    if (made) {
        CHECK_INT(io_read_file(in_dir("a"), &data, &count), -1);
        CHECK(data == NULL);
        CHECK_SAYS("/a: Cannot allocate memory");
    }
    end();
    if (!made) SKIP("the file system holds no file of 2^62 bytes");
}

TEST(parts_are_written_one_after_the_other) {
    begin();
    IoPart parts[] = {{"one ", 4}, {NULL, 0}, {"two", 3}};
    CHECK_INT(io_write_parts(in_dir("a"), parts, 3), 0);
    CHECK_STR(content(in_dir("a")), "one two");
    CHECK(!io_exists(in_dir("a.tmp")));
    end();
}

// ---------------------------------------------------------------------------------------------
// Faults.

// How many system calls io_write_file makes: open, write, sync, close, rename, and for the folder
// open, sync, close.
enum { WRITE_FILE_CALLS = 8, RENAME_CALL = 5 };

TEST(write_file_counts_its_calls) {
    begin();
    CHECK_INT(io_write_file(in_dir("a"), "content", 7), 0);
    CHECK_INT(io_fault.calls, WRITE_FILE_CALLS);
    end();
}

// At every call, with one failure and with failures from there on: the old content or the new one,
// and nothing beside it.
static void fail_write_file_everywhere(IoFaultKind kind, const char *reason) {
    begin();
    for (int sticky = 0; sticky < 2; sticky++) {
        for (int at = 1; at <= WRITE_FILE_CALLS; at++) {
            fail_at(IO_FAULT_NONE, 0, false);
            CHECK_INT(io_write_file(in_dir("a"), "old", 3), 0);
            fail_at(kind, at, sticky);
            CHECK_INT(io_write_file(in_dir("a"), "content", 7), -1);
            CHECK_SAYS(reason);
            CHECK_STR(content(in_dir("a")), at <= RENAME_CALL ? "old" : "content");
            CHECK(!io_exists(in_dir("a.tmp")));
        }
    }
    fail_at(kind, WRITE_FILE_CALLS + 1, false);
    CHECK_INT(io_write_file(in_dir("a"), "last", 4), 0);
    end();
}

TEST(write_file_on_a_full_disk) {
    fail_write_file_everywhere(IO_FAULT_ENOSPC, "No space left on device");
}
TEST(write_file_on_a_bad_disk) { fail_write_file_everywhere(IO_FAULT_EIO, "Input/output error"); }

TEST(write_file_of_a_new_name_leaves_nothing) {
    begin();
    for (int at = 1; at <= RENAME_CALL; at++) {
        fail_at(IO_FAULT_ENOSPC, at, true);
        CHECK_INT(io_write_file(in_dir("a"), "content", 7), -1);
        CHECK(!io_exists(in_dir("a")) && !io_exists(in_dir("a.tmp")));
    }
    end();
}

TEST(write_file_killed_at_every_call) {
    begin();
    for (int at = 1; at <= WRITE_FILE_CALLS; at++) {
        fail_at(IO_FAULT_NONE, 0, false);
        CHECK_INT(io_write_file(in_dir("a"), "old", 3), 0);
        fail_at(IO_FAULT_EXIT, at, false);
        DIES(IO_FAULT_EXIT_CODE, "") io_write_file(in_dir("a"), "content", 7);
        CHECK_STR(content(in_dir("a")), at <= RENAME_CALL ? "old" : "content");
    }
    fail_at(IO_FAULT_NONE, 0, false);
    CHECK_INT(io_write_file(in_dir("a"), "new", 3), 0);  // a .tmp left by a death is no obstacle
    CHECK(!io_exists(in_dir("a.tmp")));
    end();
}

TEST(short_counts_are_continued) {
    begin();
    IoFile f;
    char data[40];
    fail_at(IO_FAULT_SHORT, 1, true);
    CHECK_INT(io_write_file(in_dir("a"), "0123456789abcdefghijklmnopqrstuvwxyz", 36), 0);
    CHECK(io_fault.calls > WRITE_FILE_CALLS);
    CHECK_STR(content(in_dir("a")), "0123456789abcdefghijklmnopqrstuvwxyz");
    CHECK_INT(io_open_read(&f, in_dir("a")), 0);
    long before = io_fault.calls;
    CHECK_INT(io_read_at(&f, data, 36, 0), 0);
    CHECK(io_fault.calls > before + 1);
    CHECK(!memcmp(data, "0123456789abcdefghijklmnopqrstuvwxyz", 36));
    io_close(&f);
    end();
}

TEST(reads_fail_too) {
    begin();
    IoFile f;
    char data[4], *all;
    size_t count;
    CHECK_INT(io_write_file(in_dir("a"), "old", 3), 0);
    CHECK_INT(io_open_read(&f, in_dir("a")), 0);
    fail_at(IO_FAULT_EIO, 1, false);
    CHECK_INT(io_read_at(&f, data, 3, 0), -1);
    CHECK_SAYS("cannot read ");
    CHECK_INT(io_read_at(&f, data, 3, 0), 0);  // the second call is fine
    fail_at(IO_FAULT_EIO, 1, false);
    CHECK_INT(io_close(&f), -1);
    CHECK_SAYS("cannot close ");
    CHECK_INT(f.fd, -1);
    for (int at = 1; at <= 2; at++) {
        fail_at(IO_FAULT_EIO, at, false);
        CHECK_INT(io_read_file(in_dir("a"), &all, &count), -1);
        CHECK(all == NULL);
    }
    end();
}

TEST(names_fail_too) {
    begin();
    fail_at(IO_FAULT_ENOSPC, 2, false);
    CHECK_INT(io_make_dir(in_dir("a/b")), -1);
    CHECK_SAYS("cannot make the folder ");
    CHECK_SAYS("/a/b: No space left");
    CHECK(io_is_dir(in_dir("a")) && !io_is_dir(in_dir("a/b")));
    fail_at(IO_FAULT_NONE, 0, false);
    CHECK_INT(io_write_file(in_dir("a/c"), "x", 1), 0);
    for (int at = 1; at <= 6; at++) {  // readdir of ., .., c and the end; unlink, then rmdir
        fail_at(IO_FAULT_EIO, at, true);
        CHECK_INT(io_remove(in_dir("a")), -1);
        CHECK_SAYS(at <= 4 ? "cannot list " : "cannot remove ");
        CHECK(io_is_dir(in_dir("a")));
        CHECK_INT(io_exists(in_dir("a/c")), at <= 5);
    }
    for (int at = 1; at <= 3; at++) {
        fail_at(IO_FAULT_EIO, at, false);
        CHECK_INT(io_sync_dir(dir), -1);
    }
    end();
}

TEST(failed_calls_keep_no_descriptor) {
    begin();
    IoFile probe;
    CHECK_INT(io_write_file(in_dir("a"), "x", 1), 0);
    CHECK_INT(io_open_read(&probe, in_dir("a")), 0);
    int lowest = probe.fd;
    io_close(&probe);
    for (int at = 1; at <= WRITE_FILE_CALLS; at++) {
        fail_at(IO_FAULT_EIO, at, true);
        io_write_file(in_dir("a"), "y", 1);
        char *data;
        size_t count;
        fail_at(IO_FAULT_EIO, at, true);
        if (!io_read_file(in_dir("a"), &data, &count)) free(data);
    }
    fail_at(IO_FAULT_NONE, 0, false);
    CHECK(io_open_read(&probe, dir) == -1 && io_open_read(&probe, "/dev/null") == -1);
    CHECK_INT(io_open_read(&probe, in_dir("a")), 0);
    CHECK_INT(probe.fd, lowest);
    io_close(&probe);
    end();
}

TEST(faults_come_from_the_environment) {
    struct {
        const char *spec;
        IoFaultKind kind;
        long at;
    } cases[] = {{"enospc:3", IO_FAULT_ENOSPC, 3},
                 {"eio:1", IO_FAULT_EIO, 1},
                 {"short:20", IO_FAULT_SHORT, 20},
                 {"exit:7", IO_FAULT_EXIT, 7}};
    begin();
    for (int i = 0; i < 4; i++) {
        setenv("IO_FAULT", cases[i].spec, 1);
        fail_at(IO_FAULT_NONE, 0, false);
        if (cases[i].at > 1)
            CHECK_INT(io_sync_dir("/no such folder"), -1);
        else
            CHECK_INT(io_sync_dir(dir), -1);
        CHECK_INT(io_fault.kind, cases[i].kind);
        CHECK_INT(io_fault.at, cases[i].at);
    }
    unsetenv("IO_FAULT");
    end();
}

int main(void) {
    if (access("/dev/shm", W_OK) == 0) setenv("TMPDIR", "/dev/shm", 0);
    RUN(write_then_read);
    RUN(create_empties_and_append_keeps);
    RUN(short_read_names_both_numbers);
    RUN(errors_name_the_file_and_the_reason);
    RUN(folder_is_refused);
    RUN(long_paths_are_refused);
    RUN(exists_and_is_dir);
    RUN(make_dir_makes_those_above);
    RUN(list_dir_is_sorted);
    RUN(remove_takes_all);
    RUN(rename_replaces);
    RUN(read_file_gives_all_bytes);
    RUN(a_file_larger_than_memory_is_an_error_with_a_reason);
    RUN(parts_are_written_one_after_the_other);
    RUN(write_file_counts_its_calls);
    RUN(write_file_on_a_full_disk);
    RUN(write_file_on_a_bad_disk);
    RUN(write_file_of_a_new_name_leaves_nothing);
    RUN(write_file_killed_at_every_call);
    RUN(short_counts_are_continued);
    RUN(reads_fail_too);
    RUN(names_fail_too);
    RUN(failed_calls_keep_no_descriptor);
    RUN(faults_come_from_the_environment);
    return test_end();
}
