// test_headers.c: every header in llmc/ compiles alone, without a warning, as C (gcc, clang), and
// all of them together as C++20 (g++), since nvcc reads the same headers. A compiler that is not
// there is skipped.
#include "dev/test/test.h"
#include "llmc/io.h"

#define WARNINGS "-Wall -Wextra -Werror -Wno-unknown-pragmas -fsyntax-only -I. -"

// Runs a shell command and returns what it printed; the caller frees it.
static char *output_of(const char *command) {
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size), *in = popen(command, "r");
    for (int c; in && (c = fgetc(in)) != EOF;) fputc(c, out);
    if (!in || pclose(in)) fprintf(out, "(the command failed)");
    fclose(out);
    return text;
}

static bool has(const char *compiler) {
    char command[100];
    snprintf(command, sizeof command, "command -v %s >/dev/null", compiler);
    return system(command) == 0;
}

// Gives each of the files to the compiler in an #include of its own, two at a time. Returns what it
// said, "" when it took them all.
static char *include_each(const char *files, const char *compiler) {
    char command[800];
    snprintf(command, sizeof command,
             "ls %s | xargs -P 2 -I{} sh -c 'echo \"#include \\\"{}\\\"\" | %s " WARNINGS
             " 2>&1 || echo \"{}: refused\"'",
             files, compiler);
    return output_of(command);
}

// The same in one file.
static char *include_together(const char *files, const char *compiler) {
    char command[800];
    snprintf(command, sizeof command,
             "for h in %s; do echo \"#include \\\"$h\\\"\"; done | %s " WARNINGS " 2>&1", files,
             compiler);
    return output_of(command);
}

static void check_empty(char *said) {
    test_check(!*said, __FILE__, __LINE__, "the compiler said:\n%s", said);
    free(said);
}

TEST(each_as_c_with_gcc) {
    if (!has("gcc")) SKIP("gcc is not installed");
    check_empty(include_each("llmc/*.h", "gcc -std=gnu11 -x c"));
}

TEST(each_as_c_with_clang) {
    if (!has("clang")) SKIP("clang is not installed");
    check_empty(include_each("llmc/*.h", "clang -std=gnu11 -x c"));
}

TEST(together_as_cxx_with_gxx) {
    if (!has("g++")) SKIP("g++ is not installed");
    check_empty(include_together("llmc/*.h", "g++ -std=c++20 -x c++"));
}

// The checks themselves: a good header, then one that lacks an include, one that warns, one that is
// C only.
TEST(bad_headers_are_noticed) {
    char dir[256], path[300];
    const char *texts[] = {
        "static inline int f(void) { return 0; }\n", "static inline size_t f(void) { return 0; }\n",
        "static inline int f(int unused) { return 0; }\n",
        "#include <stdlib.h>\nstatic inline int *f(void) { return malloc(4); }\n"};
    snprintf(dir, sizeof dir, "%s", test_make_dir());
    snprintf(path, sizeof path, "%s/bad.h", dir);
    for (int i = 0; i < 4; i++) {
        CHECK(!io_write_file(path, texts[i], strlen(texts[i])));
        char *c = has("gcc") ? include_each(path, "gcc -std=gnu11 -x c") : NULL;
        char *cxx = has("g++") ? include_together(path, "g++ -std=c++20 -x c++") : NULL;
        CHECK(!c || !*c == (i == 0 || i == 3));
        CHECK(!cxx || !*cxx == (i == 0));
        free(c), free(cxx);
    }
    test_remove_dir(dir);
}

int main(void) {
    RUN(each_as_c_with_gcc);
    RUN(each_as_c_with_clang);
    RUN(together_as_cxx_with_gxx);
    RUN(bad_headers_are_noticed);
    return test_end();
}
