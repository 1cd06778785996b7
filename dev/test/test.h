// test.h: a test is a function; a test program is a list of them.
//
//     TEST(adds_up) { CHECK(1 + 1 == 2); CHECK_INT(1 + 1, 2); }
//     int main(int argc, char **argv) { RUN(adds_up); return test_end(); }
//
// A failed CHECK prints file, line, the expression and both values, marks the test failed and goes
// on. DIES(code, "part of the message") { ... } runs its block in a child process and checks how it
// ended. test_end prints "N passed, N failed" and returns 0 when none failed. With TEST_STOP in the
// environment the first failed test is the last.
#ifndef DEV_TEST_H
#define DEV_TEST_H

#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int test_passed, test_failed, test_skipped;
static bool test_ok, test_was_skipped;

static inline double test_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

__attribute__((format(printf, 4, 5))) static inline void
test_check(bool ok, const char *file, int line, const char *format, ...) {
    if (ok) return;
    test_ok = false;
    printf("  FAILED %s:%d: ", file, line);
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
}

#define TEST(name) static void test_##name(void)
#define CHECK(x)   test_check((x), __FILE__, __LINE__, "%s", #x)
#define CHECK_INT(a, b)                                                                            \
    do {                                                                                           \
        long long a_ = (long long)(a), b_ = (long long)(b);                                        \
        test_check(a_ == b_, __FILE__, __LINE__, "%s: found %lld, expected %lld (%s)", #a, a_, b_, \
                   #b);                                                                            \
    } while (0)
#define CHECK_STR(a, b)                                                                            \
    do {                                                                                           \
        const char *a_ = (a), *b_ = (b);                                                           \
        test_check(!strcmp(a_, b_), __FILE__, __LINE__, "%s: found '%s', expected '%s'", #a, a_,   \
                   b_);                                                                            \
    } while (0)
#define CHECK_NEAR(a, b, tolerance)                                                                \
    do {                                                                                           \
        double a_ = (a), b_ = (b);                                                                 \
        test_check(fabs(a_ - b_) <= (tolerance), __FILE__, __LINE__,                               \
                   "%s: found %.17g, expected %.17g", #a, a_, b_);                                 \
    } while (0)

// Marks the test as skipped, with the reason, and leaves it.
#define SKIP(reason)                                                                               \
    do {                                                                                           \
        printf("  skipped: %s\n", reason);                                                         \
        test_was_skipped = true;                                                                   \
        return;                                                                                    \
    } while (0)

static inline int test_end(void) {
    printf("%d passed, %d failed", test_passed, test_failed);
    printf(test_skipped ? ", %d skipped\n" : "\n", test_skipped);
    return test_failed != 0;
}

#define RUN(name) test_run(#name, test_##name)
static inline void test_run(const char *name, void (*body)(void)) {
    test_ok = true, test_was_skipped = false;
    double start = test_seconds();
    body();
    const char *verdict = !test_ok ? "FAILED" : test_was_skipped ? "skip" : "ok";
    printf("%-6s %s (%.2f s)\n", verdict, name, test_seconds() - start);
    if (!test_ok)
        test_failed++;
    else if (test_was_skipped)
        test_skipped++;
    else
        test_passed++;
    fflush(stdout);
    if (!test_ok && getenv("TEST_STOP")) exit(test_end());
}

// The child's side of DIES: forks; returns true in the child, whose stderr goes to a pipe; in the
// parent waits, checks exit code and message, returns false.
static inline bool test_dies(int code, const char *message, const char *file, int line) {
    static int state;  // 0: about to fork; 1: in the child, block is done
    if (state == 1) exit(0);
    int pipes[2];
    fflush(stdout);
    if (pipe(pipes)) return false;
    pid_t pid = fork();
    if (pid == 0) {
        state = 1;
        dup2(pipes[1], 2);
        close(pipes[0]), close(pipes[1]);
        return true;
    }
    close(pipes[1]);
    char text[4096];
    size_t n = 0;
    for (ssize_t got;
         n < sizeof text - 1 && (got = read(pipes[0], text + n, sizeof text - 1 - n)) > 0;)
        n += (size_t)got;
    text[n] = 0;
    close(pipes[0]);
    int status = 0;
    waitpid(pid, &status, 0);
    int found = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
    test_check(found == code, file, line, "exit code %d, expected %d; it said: %s", found, code,
               text);
    test_check(strstr(text, message) != NULL, file, line, "found message: %s expected in it: %s",
               text, message);
    return false;
}
#define DIES(code, message) while (test_dies(code, message, __FILE__, __LINE__))

// A fresh folder under $TMPDIR or /tmp; the caller removes it with test_remove_dir.
static inline const char *test_make_dir(void) {
    static char dir[256];
    const char *base = getenv("TMPDIR");
    snprintf(dir, sizeof dir, "%s/speedrun_test_XXXXXX", base ? base : "/tmp");
    if (!mkdtemp(dir)) perror("mkdtemp"), exit(1);
    return dir;
}

static inline void test_remove_dir(const char *dir) {
    char command[512];
    snprintf(command, sizeof command, "rm -rf '%s'", dir);
    if (system(command)) printf("  could not remove %s\n", dir);
}

#endif
