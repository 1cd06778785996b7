// test_safetensors.c: llmc/safetensors.h writes what it reads and what others read, refuses every
// damaged or malformed file with a sentence, and replaces a file as a whole or not at all.
#include "dev/test/test.h"
#include "llmc/safetensors.h"

static char dir[256], path[512];

static void put_file(const char *data, size_t n) {
    IoFile f;
    bool failed = io_create(&f, path) || io_write(&f, data, n) || io_close(&f);
    if (failed) printf("%s\n", io_error), exit(1);
}

// A file with this header and so many bytes of data, all zero.
static void put_header(const char *header, size_t data_size) {
    uint64_t size = strlen(header);
    char *file = (char *)calloc(1, 8 + size + data_size);
    memcpy(file, &size, 8), memcpy(file + 8, header, size);
    put_file(file, 8 + size + data_size);
    free(file);
}

// Opens the file and reads every tensor. -1 as soon as something is refused.
static int read_all(void) {
    StFile f;
    io_error[0] = 0;
    if (st_open(&f, path)) return -1;
    int failed = 0;
    for (int i = 0; i < f.count && !failed; i++) failed = st_read(&f, &f.tensors[i], NULL);
    st_close(&f);
    return failed ? -1 : 0;
}

static float wte[6] = {1, -2, 3.5f, 0, 1e-30f, 7};
static int64_t ids[2] = {-1, INT64_MAX};
static double scalar = 0.1;
static unsigned char odd[3] = {1, 2, 3};

// Writes four tensors of different kinds and two strings.
static int write_sample(void) {
    uint64_t two_three[] = {2, 3}, two[] = {2}, three[] = {3};
    StTensor t[4] = {st_tensor("wte", ST_F32, 2, two_three, wte),
                     st_tensor("odd", ST_U8, 1, three, odd), st_tensor("ids", ST_I64, 1, two, ids),
                     st_tensor("scalar", ST_F64, 0, NULL, &scalar)};
    JsonPair pairs[] = {{"flags", "--depth 1 \"quoted\" \\ caf\xc3\xa9"}, {"step", "12"}};
    return st_write(path, t, 4, pairs, 2);
}

TEST(what_is_written_is_read) {
    StFile f;
    float a[6];
    int64_t b[2];
    double c;
    unsigned char d[3];
    char text[64];
    CHECK_INT(write_sample(), 0);
    CHECK_INT(st_open(&f, path), 0);
    CHECK_INT(f.count, 4);
    CHECK(f.sealed);
    CHECK_STR(f.tensors[1].name, "odd");
    CHECK_INT(st_read(&f, st_find(&f, "wte"), a), 0);
    CHECK_INT(st_read(&f, st_find(&f, "ids"), b), 0);
    CHECK_INT(st_read(&f, st_find(&f, "scalar"), &c), 0);
    CHECK_INT(st_read(&f, st_find(&f, "odd"), d), 0);
    CHECK(!memcmp(a, wte, sizeof a) && !memcmp(b, ids, sizeof b));
    CHECK(c == scalar && !memcmp(d, odd, 3));
    CHECK_INT(st_find(&f, "wte")->dtype, ST_F32);
    CHECK_INT(st_find(&f, "wte")->ndim, 2);
    CHECK_INT(st_find(&f, "wte")->shape[1], 3);
    CHECK_INT(st_find(&f, "scalar")->ndim, 0);
    CHECK(st_find(&f, "wt") == NULL && st_find(&f, "wtee") == NULL && st_find(&f, "") == NULL);
    CHECK(st_metadata(&f, "flags", text, sizeof text));
    CHECK_STR(text, "--depth 1 \"quoted\" \\ caf\xc3\xa9");
    CHECK(st_metadata(&f, "step", text, sizeof text));
    CHECK_STR(text, "12");
    CHECK(!st_metadata(&f, "none", text, sizeof text));
    CHECK(!st_metadata(&f, "flags", text, 5));
    CHECK_INT(f.data_at % 8, 0);
    st_close(&f);
}

TEST(many_tensors_are_found_by_name) {
    enum { N = 300 };
    static StTensor t[N];
    static float data[N][2];
    for (int i = 0; i < N; i++) {
        char name[32];
        uint64_t two = 2;
        snprintf(name, sizeof name, "layers.%d.wq", i);
        data[i][0] = (float)i, data[i][1] = -1;
        t[i] = st_tensor(name, ST_F32, 1, &two, data[i]);
    }
    StFile f;
    CHECK_INT(st_write(path, t, N, NULL, 0), 0);
    CHECK_INT(st_open(&f, path), 0);
    CHECK_INT(f.count, N);
    for (int i = 0; i < N; i++) {
        float back[2] = {0, 0};
        CHECK(st_find(&f, t[i].name) == &f.tensors[i]);
        CHECK_INT(st_read(&f, &f.tensors[i], back), 0);
        CHECK(back[0] == (float)i);
    }
    st_close(&f);
}

TEST(tensor_larger_than_a_piece) {
    uint64_t n = 3 * ST_PIECE / 4 + 5;
    float *x = (float *)malloc(n * 4), *back = (float *)calloc(n, 4);
    for (uint64_t i = 0; i < n; i++) x[i] = (float)i;
    StTensor t = st_tensor("x", ST_F32, 1, &n, x);
    StFile f;
    CHECK_INT(st_write(path, &t, 1, NULL, 0), 0);
    CHECK_INT(read_all(), 0);
    CHECK_INT(st_open(&f, path), 0);
    CHECK_INT(st_read(&f, &f.tensors[0], back), 0);
    CHECK(!memcmp(x, back, n * 4));
    st_close(&f);
    free(x), free(back);
}

TEST(reads_a_file_of_the_python_library) {
    static const char bytes[] =
        " \x01\0\0\0\0\0\0"
        "{\"__metadata__\":{\"flags\":\"--depth 1 \\\"x\\\" \xc3\xa9\",\"format\":\"pt\"},"
        "\"a\":{\"dtype\":\"I64\",\"shape\":[2],\"data_offsets\":[0,16]},"
        "\"s\":{\"dtype\":\"F64\",\"shape\":[],\"data_offsets\":[16,24]},"
        "\"e\":{\"dtype\":\"F32\",\"shape\":[0,4],\"data_offsets\":[24,24]},"
        "\"b\":{\"dtype\":\"BF16\",\"shape\":[1,3],\"data_offsets\":[24,30]}}    "
        "\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\x08@\xc0?\0\xc0\x80>";
    StFile f;
    char text[64];
    double s = 0;
    uint16_t b[3];
    put_file(bytes, sizeof bytes - 1);
    CHECK_INT(st_open(&f, path), 0);
    CHECK(!f.sealed);
    CHECK_INT(f.count, 4);
    CHECK(st_metadata(&f, "flags", text, sizeof text));
    CHECK_STR(text, "--depth 1 \"x\" \xc3\xa9");
    CHECK_INT(st_read(&f, st_find(&f, "s"), &s), 0);
    CHECK(s == 3.0);
    CHECK_INT(st_read(&f, st_find(&f, "b"), b), 0);
    CHECK_INT(b[0], 0x3FC0);  // 1.5 as BF16
    CHECK_INT(st_read(&f, st_find(&f, "e"), &s), 0);
    st_close(&f);
}

#define T(name, dtype, shape, offsets)                                                             \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" offsets "]}"
#define META(key, value) "\"__metadata__\":{\"" key "\":\"" value "\"}"

TEST(malformed_headers_are_refused) {
    static const struct {
        const char *header;
        size_t data;
        const char *message;
    } bad[] = {
        {"{" T("a", "F32", "2", "0,8"), 8, "byte 53 of the header: expected , or }"},
        {"[]", 0, "byte 0 of the header: expected {"},
        {"{" T("a", "F32", "2", "0,8") "} x", 8, "expected the end"},
        {"{" T("a", "F31", "2", "0,8") "}", 8, "a: byte 14 of the header: found a dtype"},
        {"{" T("a", "F32", "3", "0,8") "}", 8, "offsets 0 and 8, not the size of F32 (3)"},
        {"{" T("a", "F32", "2", "8,0") "}", 8, "tensor a: found data_offsets"},
        {"{" T("a", "F32", "2", "0,8") "}", 7, "tensor a: its data end at 8"},
        {"{" T("a", "F32", "2", "0,8") "}", 9, "found 9 bytes of data, expected 8"},
        {"{" T("a", "F32", "2", "4,12") "}", 12, "tensor a: its data begin at 4, expected 0"},
        {"{" T("a", "F32", "4294967296,4294967296", "0,0") "}", 0, "tensor a: found data_offsets"},
        {"{" T("a", "F64", "2305843009213693952", "0,0") "}", 0, "tensor a: found data_offsets"},
        {"{" T("a", "F32", "-1", "0,0") "}", 0,
         "a: byte 29 of the header: expected a whole number"},
        {"{" T("a", "F32", "1,1,1,1,1", "0,4") "}", 4, "more than 4 dimensions"},
        {"{" T("a", "F32", "1", "0,4,5") "}", 4, "more than 2 data_offsets"},
        {"{" T("a", "F32", "1", "0") "}", 4, "expected one dtype, one shape and two data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "expected one dtype"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"shape\":[1],\"data_offsets\":[0,4]}}", 4,
         "expected one dtype"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"size\":4,\"data_offsets\":[0,4]}}", 4,
         "not known"},
        {"{" T("a", "U8", "1", "0,1") "," T("a", "U8", "1", "1,2") "}", 2, "tensor a: found twice"},
        {"{" T("a", "U8", "2", "0,2") "," T("b", "U8", "1", "1,2") "}", 2,
         "b: its data begin at 1"},
        {"{" T("a", "U8", "2", "0,2") "," T("b", "U8", "1", "3,4") "}", 4,
         "b: its data begin at 3"},
        {"{" T("a\\u0001", "U8", "0", "0,0") "}", 0, "control character"},
        {"{\"__metadata__\":{\"x\":1}}", 0, "__metadata__: byte"},
        {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "__metadata__ twice"},
        {"{" META("crc32c.a", "00000000") "}", 0, "bad or second crc32c.a"},
        {"{" META("header_crc32c", "0000000") "}", 0, "bad or second header_crc32c"},
        {"{" META("header_crc32c", "0000000A") "}", 0, "bad or second header_crc32c"},
        {"{" META("header_crc32c", "0000000\\u0030") "}", 0, "bad or second header_crc32c"},
        {"{" META("header_crc32c", "00000000") "}", 0, "header is damaged"},
        {"{" META("crc32c.a", "00000000") "," T("a", "U8", "0", "0,0") "}", 0,
         "found checksums of 1 tensors and none of the header"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        put_header(bad[i].header, bad[i].data);
        test_check(read_all() == -1, __FILE__, __LINE__, "accepted: %s", bad[i].header);
        test_check(strstr(io_error, bad[i].message) && strstr(io_error, path), __FILE__, __LINE__,
                   "found message: %s expected in it: %s", io_error, bad[i].message);
    }
}

TEST(files_that_are_no_such_file_are_refused) {
    uint64_t huge = UINT64_MAX;
    put_file("", 0);
    CHECK(read_all() == -1 && strstr(io_error, "found 0 bytes"));
    put_file((char *)&huge, 8);
    CHECK(read_all() == -1 && strstr(io_error, "found 8 bytes"));
    put_file("\377\377\377\377\377\377\377\377{}", 10);
    CHECK(read_all() == -1 && strstr(io_error, "18446744073709551615"));
    put_file("\3\0\0\0\0\0\0\0{}", 10);
    CHECK(read_all() == -1 && strstr(io_error, "cut short"));
    put_file("\2\0\0\0\0\0\0\0{}", 10);
    CHECK_INT(read_all(), 0);  // no tensors at all is a file, too
    StFile f;
    CHECK(st_open(&f, dir) == -1 && strstr(io_error, "a folder"));
    CHECK(st_open(&f, "/nonexistent/x") == -1 && strstr(io_error, "No such file"));
}

static void flip_bit(size_t bit) {
    unsigned char byte = 0;
    int fd = open(path, O_RDWR);
    bool ok = fd >= 0 && pread(fd, &byte, 1, (off_t)(bit / 8)) == 1;
    byte ^= (unsigned char)(1 << bit % 8);
    ok = ok && pwrite(fd, &byte, 1, (off_t)(bit / 8)) == 1;
    if (!ok || close(fd)) perror(path), exit(1);
}

static size_t file_size(void) {
    struct stat st;
    return stat(path, &st) ? 0 : (size_t)st.st_size;
}

TEST(every_flipped_bit_is_seen) {
    CHECK_INT(write_sample(), 0);
    size_t bits = 8 * file_size();
    CHECK(bits > 1000);
    for (size_t bit = 0; bit < bits; bit++) {  // every single one: the file is small
        flip_bit(bit);
        test_check(read_all() == -1 && strstr(io_error, path), __FILE__, __LINE__,
                   "bit %zu of %zu: not refused, or not named: %s", bit, bits, io_error);
        flip_bit(bit);
    }
    CHECK_INT(read_all(), 0);
    flip_bit(bits - 1);
    CHECK(read_all() == -1 && strstr(io_error, "tensor scalar is damaged"));
}

TEST(every_truncation_is_seen) {
    CHECK_INT(write_sample(), 0);
    size_t whole = file_size();
    for (size_t size = whole; size-- > 0;) {
        CHECK_INT(truncate(path, (off_t)size), 0);
        test_check(read_all() == -1 && strstr(io_error, path), __FILE__, __LINE__,
                   "%zu of %zu bytes: not refused, or not named: %s", size, whole, io_error);
        if (size == whole - 1)
            CHECK(strstr(io_error, "tensor scalar") && strstr(io_error, "cut short"));
    }
}

TEST(a_write_that_fails_leaves_the_old_file) {
    IoFaultKind kinds[] = {IO_FAULT_ENOSPC, IO_FAULT_EIO};
    char *old, *now;
    size_t n, n_now;
    put_file("old", 3);
    for (int k = 0; k < 2; k++) {
        long calls = 0;
        for (long at = 1;; at++) {
            io_read_file(path, &old, &n);
            io_fault.kind = kinds[k], io_fault.at = at, io_fault.calls = 0;
            int failed = write_sample();
            calls = io_fault.calls;
            io_fault.kind = IO_FAULT_NONE;
            io_read_file(path, &now, &n_now);
            if (failed) {
                CHECK(strstr(io_error, path) || strstr(io_error, dir));
                bool same = n == n_now && !memcmp(old, now, n);
                CHECK(same || read_all() == 0);  // the last call syncs the folder after the rename
            }
            free(old), free(now);
            if (!failed) break;
            put_file("old", 3);
            char beside[600];
            snprintf(beside, sizeof beside, "%s.tmp", path);
            CHECK(!io_exists(beside));
        }
        // create, size, header, 4 tensors, sync, close, rename; open, sync and close of the folder
        CHECK_INT(calls, 13);
        CHECK_INT(read_all(), 0);
        put_file("old", 3);
    }
}

TEST(short_reads_and_writes_are_no_errors) {
    for (long at = 1; at < 20; at++) {
        io_fault.kind = IO_FAULT_SHORT, io_fault.at = at, io_fault.calls = 0;
        CHECK_INT(write_sample(), 0);
        io_fault.calls = 0;
        CHECK_INT(read_all(), 0);
        io_fault.kind = IO_FAULT_NONE;
    }
}

TEST(a_read_that_fails_names_tensor_and_file) {
    CHECK_INT(write_sample(), 0);
    io_fault.kind = IO_FAULT_EIO, io_fault.at = 4, io_fault.calls = 0;  // open, size, header, wte
    CHECK_INT(read_all(), -1);
    io_fault.kind = IO_FAULT_NONE;
    CHECK(strstr(io_error, "tensor wte") && strstr(io_error, path));
    CHECK(strstr(io_error, "Input/output error"));
}

int main(void) {
    snprintf(dir, sizeof dir, "%s", test_make_dir());
    snprintf(path, sizeof path, "%s/x.safetensors", dir);
    RUN(what_is_written_is_read);
    RUN(many_tensors_are_found_by_name);
    RUN(tensor_larger_than_a_piece);
    RUN(reads_a_file_of_the_python_library);
    RUN(malformed_headers_are_refused);
    RUN(files_that_are_no_such_file_are_refused);
    RUN(every_flipped_bit_is_seen);
    RUN(every_truncation_is_seen);
    RUN(a_write_that_fails_leaves_the_old_file);
    RUN(short_reads_and_writes_are_no_errors);
    RUN(a_read_that_fails_names_tensor_and_file);
    test_remove_dir(dir);
    return test_end();
}
