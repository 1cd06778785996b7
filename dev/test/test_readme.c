// test_readme.c: what README.md says is so: its list of flags is the program's, its files are
// there.
#include "dev/test/test.h"
#include "llmc/io.h"  // io_read_file, io_exists

static char *read_readme(void) {
    char *text;
    size_t size;
    if (io_read_file("README.md", &text, &size)) printf("%s\n", io_error), exit(1);
    return text;
}

// `make readme` mends it.
TEST(flags_are_those_of_the_program) {
    const char *build = getenv("BUILD");
    char command[512], *readme = read_readme(), line[512];
    snprintf(command, sizeof command, "%s/train_gpt2 --help", build ? build : "build");
    FILE *help = popen(command, "r");
    const char *at = strstr(readme, "<!-- flags -->");
    int lines = 0;
    for (; at && fgets(line, sizeof line, help); lines++) {
        const char *found = strstr(at, line);
        test_check(found != NULL, __FILE__, __LINE__, "not in README.md: %s", line);
        at = found ? found : at;
    }
    pclose(help);
    CHECK(lines > 40);
    free(readme);
}

// Every `llmc/...`, `dev/...`, `docs/...`, `scripts/...` between back quotes.
TEST(files_are_there) {
    char *readme = read_readme(), path[256];
    int files = 0;
    for (char *p = strchr(readme, '`'); p; p = strchr(p + 1, '`')) {
        size_t n = strcspn(p + 1, "` \n");
        bool ours = !strncmp(p + 1, "llmc/", 5) || !strncmp(p + 1, "dev/", 4) ||
                    !strncmp(p + 1, "docs/", 5) || !strncmp(p + 1, "scripts/", 8);
        if (!ours || p[1 + n] != '`' || n >= sizeof path) continue;
        snprintf(path, sizeof path, "%.*s", (int)n, p + 1);
        test_check(io_exists(path), __FILE__, __LINE__, "%s is in README.md, but not here", path);
        files++;
    }
    CHECK(files > 15);
    free(readme);
}

int main(void) {
    RUN(flags_are_those_of_the_program);
    RUN(files_are_there);
    return test_end();
}
