// test_headers.c: every header in llmc/ compiles alone, without a warning: the host's as C (gcc,
// clang) and all together as C++20 (g++), since nvcc reads them too; the device's, and the one that
// speaks to cuDNN, in both precisions with nvcc. A compiler that is not there is skipped.
#include "dev/test/test.h"
#include "llmc/io.h"

#define HOST     "llmc/*.h | grep -v cudnn"
#define WARNINGS "-Wall -Wextra -Werror -Wno-unknown-pragmas -fsyntax-only -I. -"
#define NVCC                                                                                       \
    "PATH=$PATH:$CUDA_HOME/bin:/usr/local/cuda/bin nvcc -std=c++20 -Werror all-warnings -Xcicc "   \
    "-O0 -ptx -arch=sm_80 -I. -x cu -o /dev/null "

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
    snprintf(command, sizeof command,
             "PATH=$PATH:$CUDA_HOME/bin:/usr/local/cuda/bin; command -v %s >/dev/null", compiler);
    return system(command) == 0;
}

// Gives each of the files to the compiler, included twice, two files at a time. Returns what it
// said, "" when it took them all.
static char *include_each(const char *files, const char *compiler) {
    char command[800];
    snprintf(command, sizeof command,
             "ls %s | xargs -P 2 -I{} sh -c 'for i in 1 2; do echo \"#include \\\"{}\\\"\"; done |"
             " %s 2>&1 || echo \"{}: refused\"'",
             files, compiler);
    return output_of(command);
}

// The same in one file.
static char *include_together(const char *files, const char *compiler) {
    char command[800];
    snprintf(command, sizeof command,
             "for h in $(ls %s); do echo \"#include \\\"$h\\\"\"; done | %s " WARNINGS " 2>&1",
             files, compiler);
    return output_of(command);
}

static void check_empty(char *said) {
    test_check(!*said, __FILE__, __LINE__, "the compiler said:\n%s", said);
    free(said);
}

TEST(each_as_c_with_gcc) {
    if (!has("gcc")) SKIP("gcc is not installed");
    check_empty(include_each(HOST, "gcc -std=gnu11 -x c " WARNINGS));
}

TEST(each_as_c_with_clang) {
    if (!has("clang")) SKIP("clang is not installed");
    check_empty(include_each(HOST, "clang -std=gnu11 -x c " WARNINGS));
}

TEST(together_as_cxx_with_gxx) {
    if (!has("g++")) SKIP("g++ is not installed");
    check_empty(include_together(HOST, "g++ -std=c++20 -x c++"));
}

// Each precision has an attention of its own.
TEST(each_with_nvcc) {
    if (!has("nvcc")) SKIP("nvcc is not installed");
    check_empty(include_each("llmc/*.cuh llmc/cudnn*.h | grep -v _fp32", NVCC "-"));
    check_empty(
        include_each("llmc/*.cuh | grep -Ev 'attention(_sm90)?.cuh'", NVCC "-DPRECISION_FP32 -"));
}

// The checks themselves: a good header, then one that lacks an include, one that warns, one that is
// C only.
TEST(bad_headers_are_noticed) {
    char dir[256], path[300];
    const char *texts[] = {
        "#pragma once\nstatic inline int f(void) { return 0; }\n",
        "#pragma once\nstatic inline size_t f(void) { return 0; }\n",
        "#pragma once\nstatic inline int f(int unused) { return 0; }\n",
        "#pragma once\n#include <stdlib.h>\nstatic inline int *f(void) { return malloc(4); }\n"};
    snprintf(dir, sizeof dir, "%s", test_make_dir());
    snprintf(path, sizeof path, "%s/bad.h", dir);
    for (int i = 0; i < 4; i++) {
        CHECK(!io_write_file(path, texts[i], strlen(texts[i])));
        char *c = has("gcc") ? include_each(path, "gcc -std=gnu11 -x c " WARNINGS) : NULL;
        char *cxx = has("g++") ? include_together(path, "g++ -std=c++20 -x c++") : NULL;
        char *cuda = has("nvcc") ? include_each(path, NVCC "-") : NULL;
        CHECK(!c || !*c == (i == 0 || i == 3));
        CHECK(!cxx || !*cxx == (i == 0));
        CHECK(!cuda || !*cuda == (i != 3));  // it has size_t, and says nothing of unused parameters
        free(c), free(cxx), free(cuda);
    }
    test_remove_dir(dir);
}

int main(void) {
    RUN(each_as_c_with_gcc);
    RUN(each_as_c_with_clang);
    RUN(together_as_cxx_with_gxx);
    RUN(each_with_nvcc);
    RUN(bad_headers_are_noticed);
    return test_end();
}
