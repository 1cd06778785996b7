// mutate.c: does the comparison with the oracle notice errors? Puts single errors into the trainer,
// one at a time, and demands that the comparison (test_train_gpt2.c) fails on each of them.
//
//     mutate LIST "compiler flags" "libraries"        CC and BUILD from the environment
//
// LIST holds, for each error, three lines; '#' starts a comment, empty lines are skipped:
//     @ file: what is wrong
//     - a piece of one line of that file, found exactly once in it
//     + what stands there instead
// The changed file goes to $BUILD/mutants/N/, in front of the real one on the include path. An
// error that does not compile, or that the comparison does not see, fails. The last line of the
// output is "N passed, N failed".
#include <omp.h>
#include <stdarg.h>

#include "dev/test/test.h"  // test_passed, test_failed, test_end
#include "llmc/die.h"       // die
#include "llmc/io.h"        // io_read_file, io_write_file, io_make_dir

typedef struct {
    char *file, *what, *from, *to;
} Mutation;

// The text after the two characters of the next line that starts with `mark`; advances *at.
static char *next_line(char **at, char mark, const char *list) {
    while (**at == '#' || **at == '\n') *at += strcspn(*at, "\n"), *at += **at == '\n';
    if (!**at && mark == '@') return NULL;
    if (**at != mark || (*at)[1] != ' ')
        die(EXIT_USAGE, "%s: found '%.30s', expected a line '%c ...'", list, *at, mark);
    char *line = *at + 2;
    *at += strcspn(*at, "\n");
    if (**at) *(*at)++ = 0;
    return line;
}

static int read_list(const char *path, Mutation **out) {
    char *text;
    size_t size;
    if (io_read_file(path, &text, &size)) die(EXIT_USAGE, "%s", io_error);
    int count = 0;
    *out = calloc(size / 6 + 1, sizeof **out);
    for (char *file; (file = next_line(&text, '@', path)); count++) {
        Mutation *m = &(*out)[count];
        char *colon = strchr(file, ':');
        if (!colon) die(EXIT_USAGE, "%s: found '%s', expected 'file: what is wrong'", path, file);
        *colon = 0;
        m->file = file, m->what = colon + 2;
        m->from = next_line(&text, '-', path), m->to = next_line(&text, '+', path);
    }
    return count;
}

// Writes the file with the error into `dir`. Returns false when the place is not there exactly
// once.
static bool write_mutant(const Mutation *m, const char *dir) {
    char *text, path[IO_PATH_MAX];
    size_t size, from = strlen(m->from), to = strlen(m->to);
    if (io_read_file(m->file, &text, &size)) die(EXIT_USAGE, "%s", io_error);
    char *at = strstr(text, m->from);
    bool once = at && !strstr(at + 1, m->from);
    if (once) {
        char *changed = malloc(size + to + 1);
        size_t before = (size_t)(at - text);
        memcpy(changed, text, before);
        memcpy(changed + before, m->to, to);
        memcpy(changed + before + to, at + from, size - before - from);
        snprintf(path, sizeof path, "%s/%s", dir, m->file);
        if (io_write_file(path, changed, size + to - from)) die(EXIT_INTERNAL, "%s", io_error);
        free(changed);
    }
    free(text);
    return once;
}

// Compiles the comparison against the files in `dir` and runs it. Returns what is to be said of it.
static const char *try_mutant(const char *dir, const char *flags, const char *libraries) {
    char command[8192];
    const char *cc = getenv("CC");
    snprintf(command, sizeof command,
             "%s -I%s %s -w -O1 -DIO_FAULTS dev/test/test_train_gpt2.c -o %s/test %s > "
             "%s/compile.log 2>&1",
             cc ? cc : "cc", dir, flags, dir, libraries, dir);
    if (system(command)) return "FAILED, does not compile";
    snprintf(command, sizeof command, "TEST_STOP=1 OMP_NUM_THREADS=1 %s/test > %s/run.log 2>&1",
             dir, dir);
    if (!system(command)) return "FAILED, not noticed";
    snprintf(command, sizeof command, "grep -q '^FAILED' %s/run.log", dir);
    return system(command) ? "FAILED, ended without a verdict" : "ok";
}

int main(int argc, char **argv) {
    if (argc != 4) die(EXIT_USAGE, "usage: mutate LIST \"compiler flags\" \"libraries\"");
    const char *build = getenv("BUILD") ? getenv("BUILD") : "build";
    Mutation *list;
    int count = read_list(argv[1], &list);
#pragma omp parallel for schedule(dynamic)
    for (int i = -1; i < count; i++) {  // -1: no error, must not be noticed
        char dir[256], llmc[300], copy[700];
        snprintf(dir, sizeof dir, "%s/mutants/%d", build, i);
        snprintf(llmc, sizeof llmc, "%s/llmc", dir);
        snprintf(copy, sizeof copy, "cp train_gpt2.c %s/", dir);
        if (io_make_dir(llmc) || system(copy)) die(EXIT_INTERNAL, "cannot make %s", dir);
        bool once = i < 0 || write_mutant(&list[i], dir);
        const char *verdict =
            once ? try_mutant(dir, argv[2], argv[3]) : "FAILED, its text is not there exactly once";
        if (i < 0)
            verdict = !strcmp(verdict, "FAILED, not noticed")
                          ? "ok"
                          : "FAILED, the comparison fails without an error";
#pragma omp critical
        {
            printf("%-6s %s: %s\n", verdict, i < 0 ? "train_gpt2.c" : list[i].file,
                   i < 0 ? "no error" : list[i].what);
            fflush(stdout);
            if (strcmp(verdict, "ok"))
                test_failed++;
            else
                test_passed++;
        }
    }
    return test_end();
}
