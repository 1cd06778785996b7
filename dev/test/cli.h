// cli.h: for the tests that run the trainer as a user does: as a process of its own, by a shell
// command, looked at by its exit code, by what it prints and by the files it leaves.
//
// Every test works in a fresh folder with three shards of bytes, s00.bin, s01.bin and s02.bin, of
// unequal size, that 12 steps of the small run below pass once and begin again. The programs are
// taken from $BUILD, or build/, where `make test` puts them.
#ifndef DEV_TEST_CLI_H
#define DEV_TEST_CLI_H

#include "dev/test/corpus.h"   // write_shard, below
#include "dev/test/test.h"     // CHECK, RUN, test_make_dir
#include "llmc/io.h"           // io_read_file, io_write_file, io_exists
#include "llmc/safetensors.h"  // st_open, st_find, st_read

enum { CLI_V = 257, CLI_BOS = 256, CLI_T = 16, CLI_STEPS = 12, CLI_SHARDS = 3 };

static const int shard_tokens[CLI_SHARDS] = {210, 90, 131};
static const char *dir;        // of the test that runs
static char printed[1 << 17];  // by the last command, both streams

// ---------------------------------------------------------------------------------------------
// Files.

// A path in the test's folder, from a format. 32 of them live at a time.
__attribute__((format(printf, 1, 2))) static inline const char *in_dir(const char *format, ...) {
    static char path[32][512];
    static int next;
    next = (next + 1) % 32;
    int n = snprintf(path[next], sizeof path[next], "%s/", dir);
    va_list args;
    va_start(args, format);
    vsnprintf(path[next] + n, sizeof path[next] - (size_t)n, format, args);
    va_end(args);
    return path[next];
}

// All of a file, NUL-terminated; the caller frees it. A file that is not there is a failed check.
static inline char *read_text(const char *path, size_t *size) {
    char *text;
    if (io_read_file(path, &text, size) == 0) return text;
    test_check(false, __FILE__, __LINE__, "%s", io_error);
    *size = 0;
    return (char *)die_alloc(1, 1, "an empty text");
}

static inline bool same_file(const char *a, const char *b) {
    size_t n, m;
    char *x = read_text(a, &n), *y = read_text(b, &m);
    bool same = n > 0 && n == m && !memcmp(x, y, n);
    free(x), free(y);
    return same;
}
#define CHECK_SAME_FILE(a, b)                                                                      \
    test_check(same_file(a, b), __FILE__, __LINE__, "%s differs from %s", a, b)

// Inverts one bit of a file.
static inline void flip_bit(const char *path, size_t byte) {
    size_t size;
    char *text = read_text(path, &size);
    CHECK(byte < size);
    if (byte < size) text[byte] = (char)(text[byte] ^ 4);
    write_bytes(path, text, size);
    free(text);
}

// Names in a folder, joined by spaces; "" when it is not there.
static inline const char *listing(const char *path) {
    static char text[4096];
    char **names;
    text[0] = 0;
    int count = io_list_dir(path, &names);
    for (int i = 0; i < count; i++) strcat(text, i ? " " : ""), strcat(text, names[i]);
    if (count >= 0) io_free_names(names, count);
    return text;
}

// Shard s of the corpus: documents of up to 40 letters after a BOS.
static inline void put_corpus_shard(int s, int count) {
    uint16_t tokens[1024];
    corpus_drawn = 1000 * (uint64_t)s;
    for (int i = 0, left = 0; i < count; i++, left--) {
        tokens[i] = (uint16_t)(left ? "etaoin shr"[below(10)] : CLI_BOS);
        if (!left) left = 1 + below(40);
    }
    write_shard(in_dir("s%02d.bin", s), tokens, count);
}

static inline void cli_begin(void) {
    dir = test_make_dir();
    for (int s = 0; s < CLI_SHARDS; s++) put_corpus_shard(s, shard_tokens[s]);
}

#define RUN_IN_DIR(name) (cli_begin(), RUN(name), test_remove_dir(dir))

// A thousand small runs sync ten thousand times: in memory, where there is a place for it, that
// takes none of the disk's time. One thread each, but where a test says otherwise.
static inline void cli_prepare(void) {
    if (io_is_dir("/dev/shm") && access("/dev/shm", W_OK) == 0) setenv("TMPDIR", "/dev/shm", 0);
    setenv("OMP_NUM_THREADS", "1", 1);
    setenv("OMP_WAIT_POLICY", "passive", 1);
}

// ---------------------------------------------------------------------------------------------
// Commands.

// Runs a shell command and keeps what it prints. Returns its exit code.
__attribute__((format(printf, 1, 2))) static inline int run(const char *format, ...) {
    char command[4096], redirected[4608];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    snprintf(redirected, sizeof redirected, "{ %s\n } >%s 2>&1", command, in_dir("printed"));
    int status = system(redirected);
    size_t size;
    char *text = read_text(in_dir("printed"), &size);
    for (size_t i = 0; i < size; i++) text[i] = text[i] ? text[i] : '0';
    snprintf(printed, sizeof printed, "%s", text);
    free(text);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + status;
}

static inline const char *program(const char *name) {
    static char path[4][512];
    static int next;
    const char *build = getenv("BUILD");
    next = (next + 1) % 4;
    snprintf(path[next], sizeof path[next], "%s/%s", build ? build : "build", name);
    if (!io_exists(path[next])) die(1, "%s is not there; run make test", path[next]);
    return path[next];
}

// The small run: flags after these replace them.
#define SMALL                                                                                      \
    "--tokenizer bytes --seq-len 16 --depth 1 --channels 32 --batch-tokens 64 --micro-batch 2 "    \
    "--steps 12 --warmup 2 --sample-tokens 0"

// The command of the small run on the corpus, and the same with a trainer whose I/O can be made to
// fail from outside (llmc/io.h).
static inline const char *train(void) {
    static char text[1024];
    snprintf(text, sizeof text, "%s --train '%s/s*.bin' " SMALL, program("train_gpt2"), dir);
    return text;
}
static inline const char *train_with_faults(void) {
    static char text[1024];
    snprintf(text, sizeof text, "%s --train '%s/s*.bin' " SMALL, program("test/train_gpt2"), dir);
    return text;
}

// Runs the small run with these flags; it must end well.
__attribute__((format(printf, 1, 2))) static inline void train_well(const char *format, ...) {
    char flags[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(flags, sizeof flags, format, args);
    va_end(args);
    int code = run("%s %s", train(), flags);
    test_check(code == 0, __FILE__, __LINE__, "%s: exit code %d, expected 0; it said: %s", flags,
               code, printed);
}

static inline int count_said(const char *part) {
    int count = 0;
    for (const char *p = printed; (p = strstr(p, part)) != NULL; p++) count++;
    return count;
}

#define CHECK_SAID(part)                                                                           \
    test_check(strstr(printed, part) != NULL, __FILE__, __LINE__,                                  \
               "printed: %s expected in it: %s", printed, part)
#define CHECK_NOT_SAID(part)                                                                       \
    test_check(!strstr(printed, part), __FILE__, __LINE__, "printed: %s not expected in it: %s",   \
               printed, part)

// ---------------------------------------------------------------------------------------------
// log.csv.

enum {
    STEP,
    TOKENS,
    EPOCH,
    LOSS,
    GRAD_NORM,
    LR,
    MOMENTUM,
    WD,
    MS,
    TOK_PER_S,
    MFU,
    VAL_LOSS,
    VAL_BPB,
    LOSS_HEX,
    GRAD_NORM_HEX,
    COLUMNS
};
static const char log_columns[] = "step,tokens,epoch,loss,grad_norm,lr,momentum,wd,ms,tok_per_s,"
                                  "mfu,val_loss,val_bpb,loss_hex,grad_norm_hex\n";

typedef struct {
    int rows;
    char cell[40][COLUMNS][40];  // rows beyond the 40th are not kept
} Log;

// Reads OUT/log.csv; what is not a row of 15 cells is a failed check.
static inline void read_log(Log *log, const char *out) {
    char path[600];
    size_t size, header = strlen(log_columns);
    snprintf(path, sizeof path, "%s/log.csv", out);
    char *text = read_text(path, &size), *at = text + header;
    memset(log, 0, sizeof *log);
    CHECK(size >= header && !strncmp(text, log_columns, header));
    CHECK(size == 0 || text[size - 1] == '\n');
    for (; size > header && *at && log->rows < 40; log->rows++) {
        for (int c = 0; c < COLUMNS; c++) {
            int n = (int)strcspn(at, ",\n");
            snprintf(log->cell[log->rows][c], sizeof log->cell[0][0], "%.*s", n, at);
            at += n;
            CHECK(*at == (c < COLUMNS - 1 ? ',' : '\n'));
            at += *at != 0;
        }
    }
    free(text);
}

// Every row of `found` equals that of `expected` with the same step, but for the time it took; the
// first is that of step `first`, the last that of the last.
static inline void check_rows(const Log *found, const Log *expected, int first) {
    CHECK_INT(found->rows, expected->rows - first);
    for (int i = 0; i < found->rows && first + i < expected->rows; i++) {
        for (int c = 0; c < COLUMNS; c++)
            if (c != MS && c != TOK_PER_S && c != MFU)
                test_check(!strcmp(found->cell[i][c], expected->cell[first + i][c]), __FILE__,
                           __LINE__, "row %d, column %d: found '%s', expected '%s'", first + i, c,
                           found->cell[i][c], expected->cell[first + i][c]);
    }
}

static inline double log_number(const Log *log, int row, int column) {
    const char *cell = log->cell[row][column];
    return *cell ? strtod(cell, NULL) : NAN;
}

// ---------------------------------------------------------------------------------------------
// Tensors in files.

// The tensor of that name and its elements, which the caller frees; NULL and a failed check when it
// is not there or damaged.
static inline void *read_tensor(StFile *f, const char *name, const StTensor **tensor) {
    uint64_t bytes = 0;
    const StTensor *t = st_find(f, name);
    test_check(t != NULL, __FILE__, __LINE__, "%s: found no tensor %s", f->file.path, name);
    if (tensor) *tensor = t;
    if (!t || !st_bytes(t, &bytes)) return NULL;
    void *data = die_alloc(1, bytes, "a tensor");
    if (st_read(f, t, data) == 0) return data;
    test_check(false, __FILE__, __LINE__, "%s", io_error);
    free(data);
    return NULL;
}

#endif
