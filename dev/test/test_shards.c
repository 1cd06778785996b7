// test_shards.c: which files are taken, which are refused and how, where documents start.
#include "dev/test/corpus.h"  // corpus_make, write_shard
#include "llmc/shards.h"      // shards_open, shards_read, shards_scan

static uint16_t tokens[SHARD_CHUNK + 5000];

// Opens what `pattern` stands for in a folder; the list's names in one string, or "" on an error.
static const char *names(const char *dir, const char *pattern) {
    static char text[1024];
    char full[1024], *out = full;
    for (const char *p = pattern; *p; p++) {  // '@' stands for the folder
        if (*p == '@')
            out += sprintf(out, "%s", dir);
        else
            *out++ = *p;
    }
    *out = *text = 0;
    ShardList list;
    if (shards_open(&list, full)) return text;
    for (int i = 0; i < list.count; i++) sprintf(text + strlen(text), "%s ", list.shard[i].name);
    shards_free(&list);
    return text;
}

TEST(patterns_give_files_by_name_each_once) {
    char dir[256], path[512];
    const char *made[] = {"b.bin", "a.bin", "c.bin", "a,b.bin", "sub/aa.bin", "d e.bin"};
    snprintf(dir, sizeof dir, "%s", test_make_dir());
    snprintf(path, sizeof path, "%s/sub", dir);
    io_make_dir(path);
    for (int i = 0; i < 6; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, made[i]);
        write_shard(path, tokens, 3);
    }
    CHECK_STR(names(dir, "@/c.bin"), "c.bin ");
    CHECK_STR(names(dir, "@/?.bin"), "a.bin b.bin c.bin ");
    CHECK_STR(names(dir, "@/c.bin,@/a.bin,@/b.bin"), "a.bin b.bin c.bin ");
    CHECK_STR(names(dir, "@/c.bin, @/?.bin,"), "a.bin b.bin c.bin ");
    CHECK_STR(names(dir, "@/b.bin,@/*/aa.bin,\n @/a.bin"), "a.bin aa.bin b.bin ");
    CHECK_STR(names(dir, "@/d e.bin,@/a.bin"), "a.bin d e.bin ");
    CHECK_STR(names(dir, "@/d*.bin,@/d e.bin"), "d e.bin ");
    CHECK_STR(names(dir, "@/a.bin @/b.bin"), "");
    CHECK_STR(names(dir, "@/a,b.bin"), "a,b.bin ");
    CHECK_STR(names(dir, "@/a.bin,@/none.bin"), "");
    CHECK(strstr(io_error, "none.bin: found no such file, expected token shards"));
    CHECK_STR(names(dir, ""), "");
    CHECK(strstr(io_error, "no token shards given"));
    CHECK_STR(names(dir, " , "), "");
    test_remove_dir(dir);
}

TEST(many_shards_are_read_through_few_open_files) {
    int count[CORPUS_SHARDS];
    for (int s = 0; s < CORPUS_SHARDS; s++) count[s] = 50 + s;
    Corpus c = corpus_make(CORPUS_SHARDS, count, 9, true);
    ShardList list;
    uint16_t found[100];
    int wrong = 0, most = 0;
    CHECK_INT(shards_open(&list, c.pattern), 0);
    CHECK_INT(list.count, CORPUS_SHARDS);
    for (int i = 0; i < 2000; i++) {
        int s = below(list.count), start = below(c.count[s]), n = below(c.count[s] - start + 1);
        wrong += shards_read(&list, s, found, (size_t)n, (size_t)start) != 0;
        wrong += memcmp(found, c.token[s] + start, 2 * (size_t)n) != 0;
        int open = 0;
        for (int k = 0; k < list.count; k++) open += list.shard[k].file.fd >= 0;
        wrong += open != list.open;
        most = open > most ? open : most;
    }
    CHECK_INT(wrong, 0);
    CHECK_INT(most, SHARD_OPEN_FILES);
    shards_free(&list);
    corpus_free(&c);
}

TEST(hash_sees_header_and_both_ends) {
    char path[300];
    snprintf(path, sizeof path, "%s/h.bin", test_make_dir());
    uint64_t seen[5] = {0};
    for (int change = 0; change < 5; change++) {
        int count = change == 1 ? 9999 : 10000;
        uint16_t kept = tokens[change == 2 ? 0 : change == 3 ? 2047 : 9999];
        if (change > 1) tokens[change == 2 ? 0 : change == 3 ? 2047 : 9999] ^= 1;
        write_shard(path, tokens, count);
        if (change > 1) tokens[change == 2 ? 0 : change == 3 ? 2047 : 9999] = kept;
        ShardList list;
        CHECK_INT(shards_open(&list, path), 0);
        seen[change] = list.shard[0].hash;
        for (int i = 0; i < change; i++) CHECK(seen[i] != seen[change]);
        shards_free(&list);
    }
    *strrchr(path, '/') = 0;
    test_remove_dir(path);
}

// Scans one shard made of tokens[0..count); the number of chunks, or -1.
static int scan(const char *path, int count, ShardIndex *index, int V) {
    ShardList list;
    write_shard(path, tokens, count);
    memset(index, 0, sizeof *index);
    if (shards_open(&list, path)) return -1;
    int chunks = 0;
    for (shards_index_reset(index, 0); chunks >= 0 && !shards_scanned(&list, index);)
        chunks = shards_scan(&list, index, CORPUS_BOS, V) ? -1 : chunks + 1;
    shards_free(&list);
    return chunks;
}

TEST(scan_finds_every_bos) {
    char path[300];
    snprintf(path, sizeof path, "%s/s.bin", test_make_dir());
    int sizes[] = {1,
                   63,
                   64,
                   65,
                   128,
                   1000,
                   SHARD_CHUNK - 1,
                   SHARD_CHUNK,
                   SHARD_CHUNK + 1,
                   SHARD_CHUNK + 5000};
    for (int i = 0; i < 10; i++) {
        ShardIndex index;
        int expected = 0, wrong = 0, one_in = 1 + below(200);
        for (int t = 0; t < sizes[i]; t++)
            tokens[t] = below(one_in) ? (uint16_t)below(CORPUS_BOS) : CORPUS_BOS;
        CHECK_INT(scan(path, sizes[i], &index, CORPUS_V), sizes[i] > SHARD_CHUNK ? 2 : 1);
        for (int t = 0; t < sizes[i]; t++)
            if (tokens[t] == CORPUS_BOS)
                wrong += expected >= index.count || index.start[expected] != (uint32_t)t,
                    expected++;
        CHECK_INT(index.count, expected);
        CHECK_INT(wrong, 0);
        shards_index_free(&index);
    }
    *strrchr(path, '/') = 0;
    test_remove_dir(path);
}

TEST(scan_names_the_first_bad_token) {
    char path[300], expected[100];
    snprintf(path, sizeof path, "%s/s.bin", test_make_dir());
    memset(tokens, 0, sizeof tokens);
    for (int at = 0; at < 200; at += at < 140 ? 1 : 7) {
        ShardIndex index;
        tokens[at] = CORPUS_V, tokens[at + 20] = 65535;
        CHECK_INT(scan(path, 230, &index, CORPUS_V), -1);
        shards_index_free(&index);
        snprintf(expected, sizeof expected, "s.bin: byte %d: found token %d, expected less than %d",
                 1024 + 2 * at, CORPUS_V, CORPUS_V);
        CHECK(strstr(io_error, expected));
        CHECK_INT(scan(path, 230, &index, 65536), 1);
        shards_index_free(&index);
        tokens[at] = tokens[at + 20] = 0;
    }
    tokens[SHARD_CHUNK + 7] = CORPUS_V;
    ShardIndex index;
    CHECK_INT(scan(path, SHARD_CHUNK + 9, &index, CORPUS_V), -1);
    snprintf(expected, sizeof expected, "byte %d:", 1024 + 2 * (SHARD_CHUNK + 7));
    CHECK(strstr(io_error, expected));
    shards_index_free(&index);
    *strrchr(path, '/') = 0;
    test_remove_dir(path);
}

// A file of random length with a header that is partly right: it opens only if all of it is right.
TEST(random_files_are_refused_unless_right) {
    char path[300];
    snprintf(path, sizeof path, "%s/r.bin", test_make_dir());
    static int32_t bytes[2000];
    int opened = 0, wrong = 0;
    for (int i = 0; i < 1000; i++) {
        size_t size = (size_t)below(4) ? 1024 + (size_t)below(3000) : (size_t)below(1100);
        for (size_t k = 0; k < size / 4 + 1; k++)
            bytes[k] = (int32_t)((uint32_t)below(1 << 30) * 5u);
        if (below(10)) bytes[0] = SHARD_MAGIC;
        if (below(10)) bytes[1] = SHARD_VERSION;
        if (below(4)) bytes[2] = ((int)size - 1024) / 2 + (below(4) ? 0 : below(3) - 1);
        write_bytes(path, bytes, size);
        bool right = size > 1024 && bytes[0] == SHARD_MAGIC && bytes[1] == SHARD_VERSION &&
                     bytes[2] > 0 && 1024 + 2 * (int64_t)bytes[2] == (int64_t)size;
        ShardList list;
        bool good = !shards_open(&list, path);
        wrong += good != right || (!good && !strstr(io_error, path));
        opened += good;
        if (good) shards_free(&list);
    }
    CHECK_INT(wrong, 0);
    CHECK(opened > 100);
    *strrchr(path, '/') = 0;
    test_remove_dir(path);
}

#ifdef IO_FAULTS
TEST(every_failing_call_is_reported) {
    int count[] = {100, 200, 300};
    Corpus c = corpus_make(3, count, 9, true);
    IoFaultKind kinds[] = {IO_FAULT_EIO, IO_FAULT_ENOSPC, IO_FAULT_SHORT};
    for (int k = 0; k < 3; k++) {
        for (int at = 1; at <= 9; at++) {  // an open and two reads for each shard
            ShardList list;
            io_fault.kind = kinds[k], io_fault.at = at, io_fault.calls = 0;
            int failed = shards_open(&list, c.pattern);
            io_fault.kind = IO_FAULT_NONE;
            CHECK_INT(failed, kinds[k] == IO_FAULT_SHORT ? 0 : -1);
            if (failed)
                CHECK(strstr(io_error, corpus_path(&c, (at - 1) / 3)));
            else
                shards_free(&list);
        }
    }
    corpus_free(&c);
}
#endif

int main(void) {
    RUN(patterns_give_files_by_name_each_once);
    RUN(many_shards_are_read_through_few_open_files);
    RUN(hash_sees_header_and_both_ends);
    RUN(scan_finds_every_bos);
    RUN(scan_names_the_first_bad_token);
    RUN(random_files_are_refused_unless_right);
#ifdef IO_FAULTS
    RUN(every_failing_call_is_reported);
#endif
    return test_end();
}
