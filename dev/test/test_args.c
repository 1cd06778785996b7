// test_args.c: llmc/args.h on good and bad command lines, files of flags, and its own echo.
#include "dev/test/test.h"
#include "llmc/args.h"

// One flag of each type, and a parser over them.
typedef struct {
    bool dry;
    int depth;
    int64_t tokens;
    double rate;
    const char *name;
    ArgList file;
} Values;

enum { COUNT = 6 };

static void make_table(Arg table[COUNT], Values *v) {
    Arg rows[COUNT] = {
        {"dry-run", ARG_BOOL, &v->dry, "0", "only print", 0, 0, false},
        {"depth", ARG_INT, &v->depth, "12", "layers", 1, 128, false},
        {"tokens", ARG_INT64, &v->tokens, "0", "tokens", 0, 1e15, false},
        {"rate", ARG_DOUBLE, &v->rate, "0.02", "learning rate", 0, 10, false},
        {"name", ARG_STRING, &v->name, "", "of the run", 0, 0, false},
        {"file", ARG_LIST, &v->file, "", "input", 0, 0, false},
    };
    memset(v, 0, sizeof *v);
    memcpy(table, rows, sizeof rows);
}

// Parses words separated by '|'. They stay valid until the next call.
static Arg table[COUNT];
static Values parse(const char *line) {
    static Values v;
    static char text[4096];
    free((void *)v.file.item);
    make_table(table, &v);
    char *argv[64] = {"program"};
    int argc = 1;
    snprintf(text, sizeof text, "%s", line);
    for (char *p = strtok(text, "|"); p; p = strtok(NULL, "|")) argv[argc++] = p;
    args_parse(table, COUNT, "program --depth N", argc, argv);
    return v;
}

// Parses a file of flags with this content.
static Values parse_text(const char *content) {
    const char *dir = test_make_dir();
    char path[300], at[310];
    snprintf(path, sizeof path, "%s/flags", dir);
    snprintf(at, sizeof at, "@%s", path);
    if (io_write_file(path, content, strlen(content))) printf("%s\n", io_error);
    Values v = parse(at);
    test_remove_dir(dir);
    return v;
}

TEST(defaults_are_set) {
    Values v = parse("");
    CHECK(!v.dry);
    CHECK_INT(v.depth, 12);
    CHECK_INT(v.tokens, 0);
    CHECK(v.rate == 0.02);
    CHECK_STR(v.name, "");
    CHECK_INT(v.file.count, 0);
    for (int i = 0; i < COUNT; i++) CHECK(!table[i].given);
}

TEST(a_bool_alone_is_1) {
    CHECK(parse("--dry-run").dry);
    CHECK(!parse("--dry-run=0").dry);
    Values v = parse("--dry-run|--depth|7");
    CHECK(v.dry);
    CHECK_INT(v.depth, 7);
}

TEST(every_type_is_read) {
    Values v = parse(
        "--dry-run|1|--depth|7|--tokens|123456789012345|--rate|1e-3|--name|a b|--file|x|--file|y");
    CHECK(v.dry);
    CHECK_INT(v.depth, 7);
    CHECK_INT(v.tokens, 123456789012345);
    CHECK(v.rate == 1e-3);
    CHECK_STR(v.name, "a b");
    CHECK_INT(v.file.count, 2);
    CHECK_STR(v.file.item[0], "x");
    CHECK_STR(v.file.item[1], "y");
    for (int i = 0; i < COUNT; i++) CHECK(table[i].given);
}

TEST(equals_sign_joins_name_and_value) {
    Values v = parse("--depth=3|--name=a=b|--dry-run=1|--rate=2");
    CHECK_INT(v.depth, 3);
    CHECK_STR(v.name, "a=b");
    CHECK(v.dry);
    CHECK(v.rate == 2);
    CHECK(!table[2].given);
}

TEST(empty_value_after_equals_sign) {
    CHECK_STR(parse("--name|x|--name=").name, "");
    DIES(EXIT_USAGE, "--depth: found '', expected a whole number") parse("--depth=");
}

TEST(later_value_replaces_earlier) { CHECK_INT(parse("--depth|3|--depth|4").depth, 4); }

TEST(value_may_look_like_a_flag_or_a_file) {
    DIES(EXIT_USAGE, "--name: found the flag --depth where its value should be; for a value that "
                     "begins with -- write --name=...")
    parse("--name|--depth|3");
    CHECK_STR(parse("--name=--depth").name, "--depth");
    CHECK_STR(parse("--name|-x").name, "-x");
    CHECK_STR(parse("--name|@x").name, "@x");
    CHECK(parse("--rate|+0.5").rate == 0.5);
}

TEST(words_go_to_the_list) {
    Values v = parse("a.txt|--depth|3|b.txt");
    CHECK_INT(v.file.count, 2);
    CHECK_STR(v.file.item[1], "b.txt");
    CHECK_INT(v.depth, 3);
    DIES(EXIT_USAGE, "found '-nam', expected a file or a flag; did you mean --name?")
    parse("a.txt|-nam|x");
}

TEST(word_without_a_list_exits_2) {
    int depth;
    Arg one = {"depth", ARG_INT, &depth, "1", "", 0, 0, false};
    char *argv[] = {"program", "oops"};
    DIES(EXIT_USAGE, "found 'oops', expected a flag") args_parse(&one, 1, "", 2, argv);
}

TEST(ranges_hold_at_their_ends) {
    CHECK_INT(parse("--depth|1").depth, 1);
    CHECK_INT(parse("--depth|128").depth, 128);
    DIES(EXIT_USAGE, "--depth: found '0', expected a whole number from 1 to 128")
    parse("--depth|0");
    DIES(EXIT_USAGE, "--depth: found '129', expected a whole number from 1 to 128")
    parse("--depth|129");
    DIES(EXIT_USAGE, "--rate: found '-0.1', expected a number from 0 to 10") parse("--rate|-0.1");
    DIES(EXIT_USAGE, "--dry-run: found '2', expected a whole number from 0 to 1")
    parse("--dry-run|2");
    DIES(EXIT_USAGE, "--tokens: found '1000000000000001', expected a whole number from 0 to "
                     "1000000000000000; see --help")
    parse("--tokens|1000000000000001");
    DIES(EXIT_USAGE, "--tokens: found '1e9', expected a whole number from 0 to 1000000000000000, "
                     "written out in digits; see --help")
    parse("--tokens|1e9");
}

TEST(int_without_range_is_bounded_by_its_type) {
    int value;
    Arg one = {"n", ARG_INT, &value, "-2147483648", "", 0, 0, false};
    args_set(&one, "-2147483648");
    CHECK_INT(value, -2147483647 - 1);
    DIES(EXIT_USAGE, "--n: found '2147483648', expected a whole number")
    args_set(&one, "2147483648");
    DIES(EXIT_USAGE, "99999999999999999999") args_set(&one, "99999999999999999999");
}

TEST(malformed_numbers_exit_2) {
    const char *whole[] = {"x", "3x", "3.5", " 3", "3 ", "", "--", "0x10", "1e3"};
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++) {
        char line[64];
        snprintf(line, sizeof line, "--depth=%s", whole[i]);
        DIES(EXIT_USAGE, "--depth: found '") parse(line);
    }
    const char *real[] = {"x", "1e", "nan", "inf", "-inf", "1e999", "1,5", " 1"};
    for (size_t i = 0; i < sizeof real / sizeof *real; i++) {
        char line[64];
        snprintf(line, sizeof line, "--rate=%s", real[i]);
        DIES(EXIT_USAGE, "expected a number from 0 to 10") parse(line);
    }
}

TEST(unknown_flag_names_the_nearest) {
    DIES(EXIT_USAGE, "unknown flag --detph; did you mean --depth?") parse("--detph|3");
    DIES(EXIT_USAGE, "did you mean --dry-run?") parse("--dryrun|1");
    DIES(EXIT_USAGE, "unknown flag --rates; did you mean --rate?") parse("--rates=1");
    DIES(EXIT_USAGE, "unknown flag --;") parse("--|1");
    DIES(EXIT_USAGE, "unknown flag --;") parse("--=1");
}

TEST(distance_counts_edits) {
    CHECK_INT(args_distance("", ""), 0);
    CHECK_INT(args_distance("abc", ""), 3);
    CHECK_INT(args_distance("", "abc"), 3);
    CHECK_INT(args_distance("kitten", "sitting"), 3);
    CHECK_INT(args_distance("flaw", "lawn"), 2);
    char longer[200];
    memset(longer, 'a', sizeof longer), longer[199] = 0;
    CHECK_INT(args_distance(longer, longer), 0);
    CHECK_INT(args_distance(longer, ""), 63);
}

TEST(missing_value_exits_2) {
    DIES(EXIT_USAGE, "--depth: its value is missing; expected a whole number") parse("--depth");
    DIES(EXIT_USAGE, "--name: its value is missing; expected text") parse("--depth|3|--name");
}

TEST(file_is_read_in_place) {
    Values v = parse_text(
        "--depth 5 # a comment with --depth 6\n\n\t--name \"a  b # c\"\r\n--rate\n0.5\n#end");
    CHECK_INT(v.depth, 5);
    CHECK_STR(v.name, "a  b # c");
    CHECK(v.rate == 0.5);
}

TEST(file_quotes) {
    CHECK_STR(parse_text("--name \"\"").name, "");
    CHECK_STR(parse_text("--name \"\"\"\"").name, "\"");
    CHECK_STR(parse_text("--name \"say \"\"hi\"\" now\"").name, "say \"hi\" now");
    CHECK_STR(parse_text("--name a\"b").name, "a\"b");
    CHECK_STR(parse_text("--name a#b").name, "a#b");
    CHECK_INT(parse_text("--name \"two\nlines\"--depth 2").depth, 2);
    DIES(EXIT_USAGE, "found a \" that is never closed") parse_text("--name \"abc");
    DIES(EXIT_USAGE, "found a \" that is never closed") parse_text("--name \"abc\"\"");
}

TEST(file_of_single_letters_fits) {  // the most words for its size
    DIES(EXIT_USAGE, "--name: its value is missing")
    parse_text("a b c d e f g h i j k l --name");
    CHECK_INT(parse_text("a b c d e f g").file.count, 7);
}

TEST(file_errors_exit_2) {
    DIES(EXIT_USAGE, "@/nowhere/flags: cannot open /nowhere/flags") parse("@/nowhere/flags");
    DIES(EXIT_USAGE, "@/: cannot read /: it is a folder") parse("@/");
    DIES(EXIT_USAGE, "--depth: its value is missing") parse_text("--depth # 3");
    const char *dir = test_make_dir();
    char path[300], at[310];
    snprintf(path, sizeof path, "%s/zero", dir), snprintf(at, sizeof at, "@%s", path);
    CHECK(io_write_file(path, "--depth 3\0--depth 4", 19) == 0);
    DIES(EXIT_USAGE, "found a zero byte at 9, expected text") parse(at);
    test_remove_dir(dir);
}

TEST(files_nest_and_order_decides) {
    const char *dir = test_make_dir();
    char inner[300], outer[300], text[700], line[700];
    snprintf(inner, sizeof inner, "%s/inner", dir), snprintf(outer, sizeof outer, "%s/outer", dir);
    CHECK(io_write_file(inner, "--depth 5 --rate 5", 18) == 0);
    snprintf(text, sizeof text, "--depth 4 @%s --rate 4 --name outer", inner);
    CHECK(io_write_file(outer, text, strlen(text)) == 0);
    snprintf(line, sizeof line, "--name|first|@%s|--tokens|3", outer);
    Values v = parse(line);
    CHECK_INT(v.depth, 5);
    CHECK(v.rate == 4);
    CHECK_STR(v.name, "outer");
    CHECK_INT(v.tokens, 3);
    snprintf(text, sizeof text, "@%s", outer);  // now a circle
    CHECK(io_write_file(inner, text, strlen(text)) == 0);
    DIES(EXIT_USAGE, "found more than 64 files of flags") parse(line);
    test_remove_dir(dir);
}

// Echoes the table of the last parse and reads that as a file.
static Values echoed(bool all) {
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    args_echo(out, table, COUNT, all);
    fclose(out);
    Values v = parse_text(text);
    free(text);
    return v;
}

TEST(echo_reads_back) {
    const char *names[] = {"plain",   "two words",  "",        "#",         "a#b",
                           "\"",      "say \"hi\"", "\"\"",    "tab\there", "line\nbreak",
                           "cr\r",    "@file",      "--depth", "-- \"x\"",  "back\\slash",
                           "\xc3\xa9"};
    const char *numbers[] = {"0.1", "1e-10", "0.3333333333333333", "1e-300", "2", "0"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char line[300];
        snprintf(line, sizeof line,
                 "--depth|3|--tokens|999999999999999|--dry-run|1|--rate=%s|--file=%s|--file|x "
                 "y|--name=%s",
                 numbers[i % 6], *names[i] ? names[i] : "-", names[i]);
        for (int all = 0; all < 2; all++) {
            parse(line);
            Values v = echoed(all);
            CHECK_STR(v.name, names[i]);
            CHECK_INT(v.depth, 3);
            CHECK_INT(v.tokens, 999999999999999);
            CHECK(v.dry);
            CHECK(v.rate == strtod(numbers[i % 6], NULL));
            CHECK_INT(v.file.count, 2);
            CHECK_STR(v.file.count == 2 ? v.file.item[1] : "", "x y");
            args_free();
        }
    }
}

TEST(echo_leaves_out_what_was_not_given) {
    parse("--depth|3");
    Values v = echoed(false);
    CHECK_INT(v.depth, 3);
    for (int i = 0; i < COUNT; i++) CHECK_INT(table[i].given, i == 1);
    parse("--depth|3");
    echoed(true);
    for (int i = 0; i < COUNT - 1; i++) CHECK(table[i].given);
}

// What a child printed to stdout, and its exit code.
static int child_output(const char *line, char *text, size_t size) {
    int pipes[2], status = 0;
    fflush(stdout);
    if (pipe(pipes)) return -1;
    pid_t pid = fork();
    if (pid == 0) {
        dup2(pipes[1], 1), close(pipes[0]), close(pipes[1]);
        parse(line);
        exit(99);
    }
    close(pipes[1]);
    size_t n = 0;
    for (ssize_t got; (got = read(pipes[0], text + n, size - 1 - n)) > 0;) n += (size_t)got;
    text[n] = 0;
    close(pipes[0]);
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(help_exits_0_and_lists_every_flag) {
    char text[4096];
    CHECK_INT(child_output("--help", text, sizeof text), 0);
    CHECK(strstr(text, "usage: program --depth N\n") != NULL);
    for (int i = 0; i < COUNT; i++) {
        CHECK(strstr(text, table[i].name) != NULL);
        CHECK(strstr(text, table[i].help) != NULL);
    }
    CHECK(strstr(text, "[0.02]") != NULL);
    CHECK_INT(child_output("--depth|3|-h", text, sizeof text), 0);
}

int main(void) {
    RUN(defaults_are_set);
    RUN(a_bool_alone_is_1);
    RUN(every_type_is_read);
    RUN(equals_sign_joins_name_and_value);
    RUN(empty_value_after_equals_sign);
    RUN(later_value_replaces_earlier);
    RUN(value_may_look_like_a_flag_or_a_file);
    RUN(words_go_to_the_list);
    RUN(word_without_a_list_exits_2);
    RUN(ranges_hold_at_their_ends);
    RUN(int_without_range_is_bounded_by_its_type);
    RUN(malformed_numbers_exit_2);
    RUN(unknown_flag_names_the_nearest);
    RUN(distance_counts_edits);
    RUN(missing_value_exits_2);
    RUN(file_is_read_in_place);
    RUN(file_quotes);
    RUN(file_of_single_letters_fits);
    RUN(file_errors_exit_2);
    RUN(files_nest_and_order_decides);
    RUN(echo_reads_back);
    RUN(echo_leaves_out_what_was_not_given);
    RUN(help_exits_0_and_lists_every_flag);
    args_free();
    return test_end();
}
