// test_json.c: llmc/json.h on well-formed text, on every kind of malformed text, and on noise.
#include "dev/test/test.h"
#include "llmc/json.h"

static Json cursor(const char *text) {
    Json j;
    json_init(&j, text, strlen(text));
    return j;
}

// True when json_skip takes the text as exactly one value.
static bool is_json(const char *text) {
    Json j = cursor(text);
    json_skip(&j);
    return json_end(&j);
}

static const char *string_of(const char *text) {
    static char buffer[256];
    Json j = cursor(text);
    if (!json_string(&j, buffer, sizeof buffer, NULL) || !json_end(&j)) return j.error;
    return buffer;
}

TEST(walks_an_object) {
    Json j = cursor(" {\"a\": 1, \"b\" : [2, 3,4 ] ,\"c\": {}, \"d\": [], \"e\": \"x\"} ");
    char key[8], text[8], seen[16] = "";
    uint64_t number = 0, sum = 0;
    for (json_enter(&j, '{'); json_more(&j, '}');) {
        CHECK(json_key(&j, key, sizeof key));
        strcat(seen, key);
        if (!strcmp(key, "a")) {
            CHECK(json_u64(&j, &number));
            CHECK_INT(number, 1);
        } else if (!strcmp(key, "b")) {
            for (json_enter(&j, '['); json_more(&j, ']');)
                CHECK(json_u64(&j, &number)), sum += number;
        } else if (!strcmp(key, "e")) {
            CHECK(json_string(&j, text, sizeof text, NULL));
            CHECK_STR(text, "x");
        } else {
            CHECK(json_skip(&j));
        }
    }
    CHECK(json_end(&j));
    CHECK_INT(sum, 9);
    CHECK_STR(seen, "abcde");
}

TEST(accepts_json) {
    const char *texts[] = {"null",
                           "true",
                           "false",
                           "0",
                           "-0",
                           "1.5e+3",
                           "\"\"",
                           "[]",
                           "{}",
                           " [ ] ",
                           "[[],[[]],{}]",
                           "{\"a\":{\"b\":[1,{\"c\":null}]},\"d\":2}",
                           "[\"\\ud83d\\ude00\"]",
                           "[1,\n2,\t3\r]"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        test_check(is_json(texts[i]), __FILE__, __LINE__, "refused: %s", texts[i]);
}

TEST(refuses_what_is_not_json) {
    const char *texts[] = {"",
                           " ",
                           "nul",
                           "nulll",
                           "True",
                           "01",
                           "-",
                           "+1",
                           ".5",
                           "1.",
                           "1e",
                           "1e+",
                           "0x1",
                           "NaN",
                           "Infinity",
                           "'a'",
                           "\"",
                           "\"a",
                           "\"\\",
                           "\"\\u12\"",
                           "\"\\u123g\"",
                           "\"\\x\"",
                           "\"\\ud800\"",
                           "\"\\ud800\\u0041\"",
                           "\"\\udc00\"",
                           "\"a\nb\"",
                           "[",
                           "[1",
                           "[1,",
                           "[1,]",
                           "[,1]",
                           "[1 2]",
                           "[1}",
                           "{",
                           "{\"a\"",
                           "{\"a\":",
                           "{\"a\":1",
                           "{\"a\":1,",
                           "{\"a\":1,}",
                           "{\"a\" 1}",
                           "{a:1}",
                           "{1:2}",
                           "{\"a\":1]",
                           "1 2",
                           "[] []",
                           "// c\n1",
                           "[1]x",
                           "{\"a\":}",
                           "]",
                           "}",
                           "[[]",
                           "[[]}",
                           "{\"a\":[}"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        test_check(!is_json(texts[i]), __FILE__, __LINE__, "accepted: %s", texts[i]);
}

TEST(decodes_strings) {
    CHECK_STR(string_of("\"plain\""), "plain");
    CHECK_STR(string_of("\"\\\"\\\\\\/\\b\\f\\n\\r\\t\""), "\"\\/\b\f\n\r\t");
    CHECK_STR(string_of("\"\\u0041\\u00e9\\u20AC\\uD83D\\uDE00\""),
              "A\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80");
    CHECK_STR(string_of("\"\\uffff\\u07ff\\u0800\""), "\xef\xbf\xbf\xdf\xbf\xe0\xa0\x80");
    CHECK_STR(string_of("\"\\udbff\\udfff\""), "\xf4\x8f\xbf\xbf");
    CHECK_STR(string_of("\"caf\xc3\xa9 \xff\""), "caf\xc3\xa9 \xff");
    CHECK_STR(string_of("\"\\ude00\""), "found half a surrogate pair");
    CHECK_STR(string_of("\"a\\u0000b\""), "found a NUL in a string");
}

TEST(string_must_fit_its_buffer) {
    char buffer[5];
    size_t length = 99;
    Json j = cursor("\"abcd\"");
    CHECK(json_string(&j, buffer, 5, &length));
    CHECK_INT(length, 4);
    CHECK_STR(buffer, "abcd");
    j = cursor("\"abcde\"");
    CHECK(!json_string(&j, buffer, 5, &length));
    CHECK_STR(j.error, "found a string that is too long");
    j = cursor("\"ab\\u20ac\"");
    CHECK(!json_string(&j, buffer, 5, &length));
    j = cursor("\"\"");
    CHECK(json_string(&j, buffer, 1, &length));
    CHECK_INT(length, 0);
}

TEST(length_of_a_long_string_is_known_before) {
    Json j = cursor(" \"a\\u0000b\\ud83d\\ude00\" ");
    size_t length = 0, again = 0;
    char buffer[8];
    CHECK(json_string_length(&j, &length));
    CHECK_INT(length, 7);
    CHECK(json_string(&j, buffer, length + 1, &again));
    CHECK_INT(again, 7);
    CHECK(!memcmp(buffer, "a\0b\xf0\x9f\x98\x80", 8));
    CHECK(json_end(&j));
}

TEST(reads_whole_numbers_up_to_2_64) {
    uint64_t value = 5;
    Json j = cursor("18446744073709551615");
    CHECK(json_u64(&j, &value));
    CHECK(value == UINT64_MAX);
    const char *bad[] = {
        "18446744073709551616", "99999999999999999999999", "-1", "1.0", "1e2", "\"1\"", ""};
    for (int i = 0; i < 7; i++) {
        value = 5;
        j = cursor(bad[i]);
        test_check(!json_u64(&j, &value) && value == 5, __FILE__, __LINE__, "accepted: %s", bad[i]);
    }
}

TEST(first_error_stays_with_its_offset) {
    Json j = cursor("[1, x, \"y\"]");
    uint64_t value = 0;
    json_enter(&j, '[');
    CHECK(json_more(&j, ']') && json_u64(&j, &value));
    CHECK(json_more(&j, ']') && !json_u64(&j, &value));
    CHECK_INT(j.error_at, 4);
    CHECK_STR(j.error, "expected a number");
    CHECK(!json_more(&j, ']') && !json_skip(&j) && !json_end(&j));
    CHECK_INT(j.error_at, 4);
    CHECK_INT(j.at, 4);
}

static const char *error_of(const char *text) {
    Json j = cursor(text);
    json_skip(&j);
    json_end(&j);
    return j.error ? j.error : "none";
}

TEST(errors_say_what_is_wrong) {
    CHECK_STR(error_of("[1,]"), "found a comma with nothing after it");
    CHECK_STR(error_of("[1"), "expected , or ]");
    CHECK_STR(error_of("{\"a\" 1}"), "expected :");
    CHECK_STR(error_of("["), "the text ends inside { or [");
    CHECK_STR(error_of("\"a"), "found a string that is never closed");
    CHECK_STR(error_of("01"), "found a number that begins with 0");
    CHECK_STR(error_of("1 1"), "expected the end of the text");
    CHECK_STR(error_of(" [1.5] "), "none");
}

TEST(nesting_is_bounded) {
    char text[400];
    for (int depth = 63; depth <= 65; depth++) {
        memset(text, '[', (size_t)depth), memset(text + depth, ']', (size_t)depth),
            text[2 * depth] = 0;
        test_check(is_json(text) == (depth <= 64), __FILE__, __LINE__, "depth %d", depth);
    }
    size_t n = 1 << 20;
    char *deep = (char *)malloc(n);
    memset(deep, '[', n);
    Json j;
    json_init(&j, deep, n);
    CHECK(!json_skip(&j));
    free(deep);
}

TEST(text_needs_no_nul_after_it) {
    const char *text = "{\"key\": [true, -1.5e3, \"a\\u00e9\"]}";
    for (size_t n = 0; n < strlen(text);
         n++) {  // each prefix in its own memory: a sanitizer sees a step too far
        char *copy = (char *)malloc(n ? n : 1);
        memcpy(copy, text, n);
        Json j;
        json_init(&j, copy, n);
        json_skip(&j);
        CHECK(!json_end(&j));
        CHECK(j.error_at <= n);
        free(copy);
    }
}

TEST(noise_ends_in_an_error_or_a_value) {
    const char alphabet[] = "{}[],:\"\\u0123e-. ntrlfas\xff";
    uint64_t state = 1;
    int accepted = 0;
    for (int trial = 0; trial < 100000; trial++) {
        char text[24], buffer[16];
        size_t n = 0, length;
        for (; n < 23; n++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            if (state >> 60 == 0) break;
            text[n] = alphabet[(state >> 33) % (sizeof alphabet - 1)];
        }
        Json j;
        json_init(&j, text, n);
        accepted += json_skip(&j);
        CHECK(j.at <= n);
        json_init(&j, text, n);
        if (json_string(&j, buffer, sizeof buffer, &length)) CHECK(length < sizeof buffer);
    }
    CHECK(accepted > 100);
}

TEST(written_strings_come_back) {
    char all[255], back[256];
    for (int i = 0; i < 255; i++) all[i] = (char)(i + 1);
    JsonText t = {NULL, 0, 0};
    json_put(&t, "{\"k\": ");
    json_put_string(&t, all, sizeof all);
    json_put(&t, ", \"n\": %d}", 12);
    Json j;
    json_init(&j, t.text, t.size);
    CHECK_INT(strlen(t.text), t.size);
    char key[4];
    CHECK(json_enter(&j, '{') && json_more(&j, '}') && json_key(&j, key, sizeof key));
    size_t length = 0;
    CHECK(json_string(&j, back, sizeof back, &length));
    CHECK_INT(length, 255);
    CHECK(!memcmp(all, back, 255));
    json_text_free(&t);
    CHECK(t.text == NULL);
}

TEST(written_text_grows) {
    JsonText t = {NULL, 0, 0};
    for (int i = 0; i < 1000; i++) json_put(&t, "%d,", i);
    CHECK_INT(t.size, 10 * 2 + 90 * 3 + 900 * 4);
    CHECK(!strncmp(t.text + t.size - 8, "998,999,", 9));
    json_text_free(&t);
}

int main(void) {
    RUN(walks_an_object);
    RUN(accepts_json);
    RUN(refuses_what_is_not_json);
    RUN(decodes_strings);
    RUN(string_must_fit_its_buffer);
    RUN(length_of_a_long_string_is_known_before);
    RUN(reads_whole_numbers_up_to_2_64);
    RUN(first_error_stays_with_its_offset);
    RUN(errors_say_what_is_wrong);
    RUN(nesting_is_bounded);
    RUN(text_needs_no_nul_after_it);
    RUN(noise_ends_in_an_error_or_a_value);
    RUN(written_strings_come_back);
    RUN(written_text_grows);
    return test_end();
}
