// tokenize: text files, folders of them, or JSONL -> token shards (format: llmc/shards.h).
//
//     build/tokenize --tokenizer bytes --val-fraction 0.1 --out data/notes notes/*.txt book.jsonl
//     -> data/notes_train_000000.bin ..., data/notes_val_000000.bin ...
//
// A document is a text file, a part of one between lines equal to --split-on, or one line of a
// .jsonl file (its member --field). Every document starts with BOS; empty ones are left out; none
// is cut: a shard is closed by the document that takes it to --shard-tokens. Document number i,
// counted from 0 in the order of the input, is for validation when uniform number i (rand.h, stream
// RAND_SPLIT of --seed) is below --val-fraction: nothing else decides it.
//
// Files are read in the order given, folders by name, with the folders in them, without names that
// start with a dot. Documents are encoded a batch at a time by all threads and written in order.
// Memory: one shard of each split, one batch (64 MB of text), and its tokens.
#include <strings.h>
#include <time.h>

#include "llmc/args.h"       // args_parse
#include "llmc/json.h"       // json_enter, json_more, json_string
#include "llmc/rand.h"       // rand_uniform, RAND_SPLIT
#include "llmc/shards.h"     // SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER
#include "llmc/tokenizer.h"  // tokenizer_init, tokenizer_require_encode, tokenizer_encode

#define BATCH_BYTES    ((size_t)64 << 20)
#define BATCH_COUNT    (1 << 16)
#define DOCUMENT_BYTES ((size_t)1 << 30)  // of one document: a shard counts its tokens in an int32
#define LINE_BLOCK     ((size_t)1 << 20)  // bytes read at once

typedef struct {
    ArgList in;
    const char *endings, *field, *split_on, *tokenizer, *out;
    int64_t shard_tokens, seed;
    double val_fraction;
} Config;

typedef struct {
    char *text;  // (size)
    size_t size;
    TokenList ids;
} Document;

typedef struct {
    const char *name;  // "train" or "val"
    uint16_t *shard;   // (room) the header's 512 words, then the tokens of the shard being made
    size_t count, room;
    int64_t tokens, documents;
    int files;
} Split;

typedef struct {
    Config config;
    Tokenizer tokenizer;
    Split train, val;
    Document *batch;  // (BATCH_COUNT)
    int batched;
    size_t batch_bytes;
    int64_t documents, bytes, empty;
} Job;

// ---------------------------------------------------------------------------------------------
// Shards.

static void shard_path(const Job *job, const Split *split, char path[IO_PATH_MAX]) {
    const char *out = job->config.out;
    const char *between = out[strlen(out) - 1] == '/' ? "" : io_is_dir(out) ? "/" : "_";
    int n = snprintf(path, IO_PATH_MAX, "%s%s%s_%06d.bin", out, between, split->name, split->files);
    if (n >= IO_PATH_MAX - 4)
        die(EXIT_USAGE, "--out: found a path of %d bytes, expected less than 1020", n);
}

// Writes the shard being made, if it holds anything.
static void shard_write(Job *job, Split *split) {
    if (!split->count) return;
    char path[IO_PATH_MAX];
    int32_t header[SHARD_HEADER / 4] = {SHARD_MAGIC, SHARD_VERSION, (int32_t)split->count};
    memcpy(split->shard, header, sizeof header);
    shard_path(job, split, path);
    if (io_write_file(path, split->shard, SHARD_HEADER + 2 * split->count)) {
        if (io_disk_full()) die(EXIT_DATA, "%s; make room and run this again", io_error);
        die(EXIT_USAGE, "--out: %s; choose another --out", io_error);
    }
    printf("%s  %zu tokens\n", path, split->count);
    fflush(stdout);
    split->tokens += (int64_t)split->count;
    split->files++;
    split->count = 0;
}

static void shard_reserve(Split *split, size_t more) {
    size_t need = SHARD_HEADER / 2 + split->count + more;
    if (need <= split->room) return;
    split->room = need + need / 2;
    split->shard = (uint16_t *)realloc(split->shard, split->room * sizeof *split->shard);
    if (!split->shard)
        die(EXIT_INTERNAL, "out of memory for a shard of %zu tokens; use a smaller --shard-tokens",
            need);
}

static void shard_add(Job *job, Split *split, const TokenList *ids) {
    shard_reserve(split, ids->count + 1);
    uint16_t *tokens = split->shard + SHARD_HEADER / 2 + split->count;
    tokens[0] = (uint16_t)job->tokenizer.bos;
    memcpy(tokens + 1, ids->ids, ids->count * sizeof *tokens);
    split->count += ids->count + 1;
    split->documents++;
    if (split->count >= (size_t)job->config.shard_tokens) shard_write(job, split);
}

// ---------------------------------------------------------------------------------------------
// Documents.

// Encodes the batch, gives each document to its split, and empties the batch.
static void batch_flush(Job *job) {
    RandKey key = {(uint32_t)job->config.seed, 0, RAND_SPLIT};
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < job->batched; i++) {
        Document *d = &job->batch[i];
        tokenizer_encode(&job->tokenizer, d->text, d->size, &d->ids);
        free(d->text);
    }
    for (int i = 0; i < job->batched; i++) {
        bool is_val = rand_uniform(key, (uint64_t)job->documents++) < job->config.val_fraction;
        shard_add(job, is_val ? &job->val : &job->train, &job->batch[i].ids);
        free(job->batch[i].ids.ids);
    }
    job->batched = 0;
    job->batch_bytes = 0;
}

static void document_require(const char *path, uint64_t size) {
    if (size > DOCUMENT_BYTES)
        die(EXIT_DATA,
            "%s: found a document of %llu bytes, expected at most %zu; cut it, or give --split-on",
            path, (unsigned long long)size, DOCUMENT_BYTES);
}

// Takes over `text`, (size) bytes from malloc, as the next document; `path` is for messages.
static void document_add(Job *job, const char *path, char *text, size_t size) {
    document_require(path, size);
    if (!size) {
        free(text);
        job->empty++;
        return;
    }
    Document document = {text, size, {NULL, 0, 0}};
    job->batch[job->batched++] = document;
    job->batch_bytes += size;
    job->bytes += (int64_t)size;
    if (job->batched == BATCH_COUNT || job->batch_bytes >= BATCH_BYTES) batch_flush(job);
}

// ---------------------------------------------------------------------------------------------
// Lines of a file that need not fit into memory.

typedef struct {
    IoFile file;
    uint64_t size, at;        // of the file, and how much of it has been read
    char *text;               // (room)
    size_t begin, end, room;  // text[begin, end) is read and not yet given out
    int64_t number;           // of the line given out last, from 1
} Lines;

static void lines_open(Lines *l, const char *path) {
    memset(l, 0, sizeof *l);
    int64_t size = io_open_read(&l->file, path) ? -1 : io_size(&l->file);
    if (size < 0) die(EXIT_DATA, "%s", io_error);
    l->size = (uint64_t)size;
}

static void lines_close(Lines *l) {
    io_close(&l->file);
    free(l->text);
}

// Reads the next block to text[end). Returns false at the end of the file.
static bool lines_read(Lines *l) {
    uint64_t left = l->size - l->at;
    size_t want = left < LINE_BLOCK ? (size_t)left : LINE_BLOCK;
    if (!want) return false;
    if (l->begin) memmove(l->text, l->text + l->begin, l->end - l->begin);
    l->end -= l->begin, l->begin = 0;
    if (l->room < l->end + want) {
        l->room = 2 * (l->end + want);
        l->text = (char *)realloc(l->text, l->room);
        if (!l->text) die(EXIT_INTERNAL, "out of memory for a line of %zu bytes", l->room);
    }
    if (io_read_at(&l->file, l->text + l->end, want, l->at)) die(EXIT_DATA, "%s", io_error);
    l->end += want, l->at += want;
    return true;
}

// The next line, with its newline if it has one; valid until the next call. False at the end.
static bool lines_next(Lines *l, char **line, size_t *size) {
    size_t seen = 0;  // bytes from begin on known to hold no newline
    char *newline = NULL;
    do {
        size_t left = l->end - l->begin - seen;
        newline = left ? (char *)memchr(l->text + l->begin + seen, '\n', left) : NULL;
        seen += left;
    } while (!newline && lines_read(l));
    *line = l->text + l->begin;
    *size = newline ? (size_t)(newline - *line) + 1 : l->end - l->begin;
    l->begin += *size;
    l->number++;
    return *size > 0;
}

// ---------------------------------------------------------------------------------------------
// Files.

static bool is_separator(const char *line, size_t size, const char *separator) {
    while (size && (line[size - 1] == '\n' || line[size - 1] == '\r')) size--;
    return size == strlen(separator) && !memcmp(line, separator, size);
}

// A text file with documents between lines equal to --split-on.
static void read_split(Job *job, const char *path) {
    Lines lines;
    char *line, *text = NULL;
    size_t size, used = 0, room = 0;
    lines_open(&lines, path);
    while (lines_next(&lines, &line, &size)) {
        if (is_separator(line, size, job->config.split_on)) {
            document_add(job, path, text, used);
            text = NULL, used = room = 0;
            continue;
        }
        if (used + size > room) {
            room = 2 * (used + size);
            text = (char *)realloc(text, room);
            if (!text) die(EXIT_INTERNAL, "out of memory for a document of %zu bytes", used + size);
        }
        memcpy(text + used, line, size);
        used += size;
    }
    document_add(job, path, text, used);
    lines_close(&lines);
}

// Copies the member `field` of the object on one line. Dies when the line is not such an object.
static void read_json_line(Job *job, const char *path, int64_t number, const char *line,
                           size_t size) {
    const char *field = job->config.field;
    char *text = (char *)die_alloc(size + 1, 1, "a document"),
         *key = (char *)die_alloc(size + 1, 1, "a name");
    size_t length = 0;
    bool found = false;
    Json j;
    json_init(&j, line, size);
    for (json_enter(&j, '{'); json_more(&j, '}');) {
        json_key(&j, key, size + 1);
        if (j.error || strcmp(key, field))
            json_skip(&j);
        else
            found = json_string(&j, text, size + 1, &length);
    }
    free(key);
    if (!json_end(&j))
        die(EXIT_DATA,
            "%s: line %lld, byte %zu: %s; every line is one JSON object with the text in \"%s\"",
            path, (long long)number, j.error_at, j.error, field);
    if (!found)
        die(EXIT_DATA,
            "%s: line %lld: found no member \"%s\", expected one with the text; see --field", path,
            (long long)number, field);
    document_add(job, path, text, length);
}

static void read_jsonl(Job *job, const char *path) {
    Lines lines;
    char *line;
    size_t size;
    lines_open(&lines, path);
    while (lines_next(&lines, &line, &size)) {
        bool blank = strspn(line, " \t\r\n") >= size;
        if (!blank) read_json_line(job, path, lines.number, line, size);
    }
    lines_close(&lines);
}

static void read_whole(Job *job, const char *path) {
    char *text;
    size_t size;
    struct stat st;
    if (!stat(path, &st) && S_ISREG(st.st_mode)) document_require(path, (uint64_t)st.st_size);
    if (io_read_file(path, &text, &size)) die(EXIT_DATA, "%s", io_error);
    document_add(job, path, text, size);
}

static void read_file(Job *job, const char *path) {
    const char *dot = strrchr(path, '.');
    if (dot && !strcasecmp(dot, ".jsonl"))
        read_jsonl(job, path);
    else if (*job->config.split_on)
        read_split(job, path);
    else
        read_whole(job, path);
}

// ---------------------------------------------------------------------------------------------
// Folders.

// True when the name ends in one of the endings ("c .h *.md"), or there are none.
static bool has_ending(const char *name, const char *endings) {
    const char *dot = strrchr(name, '.');
    if (!*endings) return true;
    for (size_t n; *endings; endings += n + strspn(endings + n, " ,")) {
        endings += *endings == '*';
        endings += *endings == '.';
        n = strcspn(endings, " ,");
        if (n && dot && strlen(dot + 1) == n && !memcmp(dot + 1, endings, n)) return true;
    }
    return false;
}

// Adds a file, or the files of a folder and of those in it, to the list.
static void find_files(const Job *job, const char *path, ArgList *files) {
    if (!io_is_dir(path)) {
        args_append(files, die_strdup(path, "the name of a file"));
        return;
    }
    char **names;
    int count = io_list_dir(path, &names);
    if (count < 0) die(EXIT_DATA, "%s", io_error);
    for (int i = 0; i < count; i++) {
        char child[IO_PATH_MAX];
        if (names[i][0] == '.') continue;
        if (snprintf(child, sizeof child, "%s/%s", path, names[i]) >= (int)sizeof child)
            die(EXIT_DATA,
                "%s/%s: found a path of more than 1023 bytes; is a folder linked into itself?",
                path, names[i]);
        if (io_is_dir(child) || has_ending(names[i], job->config.endings))
            find_files(job, child, files);
    }
    io_free_names(names, count);
}

// ---------------------------------------------------------------------------------------------

static Config parse_config(int argc, char **argv) {
    Config c;
    memset(&c, 0, sizeof c);
    Arg table[] = {
        {"in", ARG_LIST, &c.in, "", "text files, .jsonl files, folders; --in may be left out", 0, 0,
         0},
        {"out", ARG_STRING, &c.out, "", "start of the shards' names, or a folder for them", 0, 0,
         0},
        {"tokenizer", ARG_STRING, &c.tokenizer, "bytes",
         "bytes, or a file such as gpt2_tokenizer.bin", 0, 0, 0},
        {"val-fraction", ARG_DOUBLE, &c.val_fraction, "0", "share of the documents for validation",
         0, 1, 0},
        {"seed", ARG_INT64, &c.seed, "1337", "of the choice of those documents", 0, 4294967295.0,
         0},
        {"shard-tokens", ARG_INT64, &c.shard_tokens, "100000000", "tokens that close a shard", 1,
         1e9, 0},
        {"field", ARG_STRING, &c.field, "text", "member with the text in .jsonl files", 0, 0, 0},
        {"split-on", ARG_STRING, &c.split_on, "", "line that separates documents in text files", 0,
         0, 0},
        {"endings", ARG_STRING, &c.endings, "", "take only such files from folders: \"txt md\"", 0,
         0, 0},
    };
    args_parse(table, sizeof table / sizeof *table, "tokenize --out PREFIX FILE...", argc, argv);
    if (!*c.out) die(EXIT_USAGE, "--out: found nothing, expected the start of the shards' names");
    if (!c.in.count)
        die(EXIT_USAGE, "found no input, expected text files, .jsonl files or folders");
    return c;
}

// Makes the folder that the shards go to.
static void make_folder(const char *out) {
    char dir[IO_PATH_MAX];
    snprintf(dir, sizeof dir, "%s", out);
    char *slash = strrchr(dir, '/');
    if (!slash || slash == dir) return;
    *slash = 0;
    if (io_make_dir(dir)) die(EXIT_USAGE, "--out: %s", io_error);
}

// Writes what is left of a split; says so when it stayed empty or older files come after its own.
static void finish_split(Job *job, Split *split, bool wanted) {
    char path[IO_PATH_MAX];
    shard_write(job, split);
    if (wanted && !split->files)
        warn("no document fell to %s; change --val-fraction or --seed", split->name);
    shard_path(job, split, path);
    if (io_exists(path))
        warn("%s is left from an earlier run; remove it, or it will be read with these", path);
    free(split->shard);
}

static void print_split(const Split *s) {
    printf("%-6s %lld document%s, %lld tokens, %d shard%s\n", s->name, (long long)s->documents,
           s->documents == 1 ? "" : "s", (long long)s->tokens, s->files, s->files == 1 ? "" : "s");
}

static void print_summary(const Job *job, int files, double seconds) {
    int64_t tokens = job->train.tokens + job->val.tokens;
    double bytes = (double)job->bytes, encoded = (double)(tokens - job->documents);
    print_split(&job->train);
    print_split(&job->val);
    printf("all    %lld document%s (%lld empty left out) of %d file%s, %lld bytes, %lld tokens\n",
           (long long)job->documents, job->documents == 1 ? "" : "s", (long long)job->empty, files,
           files == 1 ? "" : "s", (long long)job->bytes, (long long)tokens);
    printf("       %.3f bytes a token without BOS, %.1f s, %.1f MB/s\n", bytes / encoded, seconds,
           bytes / seconds * 1e-6);
}

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(int argc, char **argv) {
    Job job;
    ArgList files = {NULL, 0};
    double start = seconds_now();
    memset(&job, 0, sizeof job);
    job.config = parse_config(argc, argv);
    job.train.name = "train", job.val.name = "val";
    job.batch = (Document *)die_alloc(BATCH_COUNT, sizeof *job.batch, "a batch of documents");
    tokenizer_init(&job.tokenizer, job.config.tokenizer);
    tokenizer_require_encode(&job.tokenizer);
    make_folder(job.config.out);
    for (int i = 0; i < job.config.in.count; i++) find_files(&job, job.config.in.item[i], &files);
    for (int i = 0; i < files.count; i++) read_file(&job, files.item[i]);
    batch_flush(&job);
    if (!job.documents)
        die(EXIT_DATA, "found no text in %d file%s, expected some", files.count,
            files.count == 1 ? "" : "s");
    finish_split(&job, &job.train, job.config.val_fraction < 1);
    finish_split(&job, &job.val, job.config.val_fraction > 0);
    print_summary(&job, files.count, seconds_now() - start);
    for (int i = 0; i < files.count; i++) free((char *)files.item[i]);
    free(files.item), free(job.config.in.item), free(job.batch);
    tokenizer_free(&job.tokenizer);
    args_free();
    return EXIT_OK;
}
