// test_flags.c: llmc/flags.h: the table of the trainers' flags is sound, and every row arrives.
#include "dev/test/test.h"
#include "llmc/flags.h"

static Arg table[FLAGS_COUNT];

static Flags parse(int argc, char **argv) {
    static Flags f;  // the table points into it
    flags_parse(&f, table, argc, argv);
    return f;
}

TEST(defaults_parse_and_are_in_range) {
    char *argv[] = {"train_gpt2"};
    Flags f = parse(1, argv);
    CHECK_INT(f.depth, 12);
    CHECK_INT(f.seq_len, 2048);
    CHECK_INT(f.seed, 1337);
    CHECK(f.ratio == 10);
    CHECK_STR(f.packing, "bestfit");
    CHECK_STR(f.window_pattern, "SSSL");
}

TEST(names_differ_and_each_has_help) {
    for (int i = 0; i < FLAGS_COUNT; i++) {
        CHECK(args_find(table, FLAGS_COUNT, table[i].name) == &table[i]);
        CHECK(strlen(table[i].help) > 5);
        for (const char *p = table[i].name; *p; p++)
            CHECK((*p >= 'a' && *p <= 'z') || (*p >= '0' && *p <= '9') || *p == '-');
    }
}

TEST(every_row_has_a_field_of_its_own) {
    Flags f;
    flags_table(table, &f);
    for (int i = 0; i < FLAGS_COUNT; i++) {
        CHECK((char *)table[i].value >= (char *)&f && (char *)table[i].value < (char *)(&f + 1));
        for (int j = 0; j < i; j++) CHECK(table[i].value != table[j].value);
    }
}

// Gives every flag a value that is not its default and reads all of them back.
TEST(every_flag_arrives) {
    char *argv[2 * FLAGS_COUNT + 1] = {"train_gpt2"};
    static char name[FLAGS_COUNT][40], text[FLAGS_COUNT][40];
    Flags f;
    flags_table(table, &f);
    for (int i = 0; i < FLAGS_COUNT; i++) {
        double low = table[i].low, high = table[i].high;  // 0, 0: no range
        snprintf(name[i], sizeof name[i], "--%s", table[i].name);
        if (table[i].type == ARG_STRING)
            snprintf(text[i], sizeof text[i], "text %d", i);
        else if (table[i].type == ARG_BOOL)
            snprintf(text[i], sizeof text[i], "1");
        else if (table[i].type == ARG_DOUBLE)
            snprintf(text[i], sizeof text[i], "%g", low + 0.25);
        else
            snprintf(text[i], sizeof text[i], "%.0f",
                     high > low && high < low + 3 ? high : low + 3);
        argv[2 * i + 1] = name[i], argv[2 * i + 2] = text[i];
    }
    parse(2 * FLAGS_COUNT + 1, argv);
    for (int i = 0; i < FLAGS_COUNT; i++) {
        char buffer[64];
        CHECK_STR(args_text(&table[i], buffer, sizeof buffer), text[i]);
        CHECK(strcmp(text[i], table[i].fallback) != 0);
        CHECK(table[i].given);
    }
}

TEST(bounds_of_the_bounded) {
    char *cases[][2] = {{"--depth", "0"},    {"--depth", "129"}, {"--vocab", "65537"},
                        {"--seq-len", "0"},  {"--steps", "-1"},  {"--ratio", "0"},
                        {"--seed", "-1"},    {"--keep", "0"},    {"--lr-matrix", "-1"},
                        {"--doc-mask", "2"}, {"--warmup", "-1"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *argv[] = {"train_gpt2", cases[i][0], cases[i][1]};
        DIES(EXIT_USAGE, cases[i][0]) parse(3, argv);
    }
}

TEST(choice_is_one_of_the_words) {
    CHECK_INT(flags_choice("packing", "bestfit", "bestfit stream"), 0);
    CHECK_INT(flags_choice("packing", "stream", "bestfit stream"), 1);
    CHECK_INT(flags_choice("x", "c", "a b c"), 2);
    const char *wrong[] = {"", "best", "bestfit ", "bestfits", "bestfit stream", "tream"};
    for (int i = 0; i < 6; i++) {
        char message[100];
        snprintf(message, sizeof message, "--packing: found '%s', expected one of: bestfit stream",
                 wrong[i]);
        DIES(EXIT_USAGE, message) flags_choice("packing", wrong[i], "bestfit stream");
    }
}

int main(void) {
    RUN(defaults_parse_and_are_in_range);
    RUN(names_differ_and_each_has_help);
    RUN(every_row_has_a_field_of_its_own);
    RUN(every_flag_arrives);
    RUN(bounds_of_the_bounded);
    RUN(choice_is_one_of_the_words);
    return test_end();
}
