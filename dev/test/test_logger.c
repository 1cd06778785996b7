// test_logger.c: the text of llmc/logger.h, its rows cut on resume, its patience with a full disk.
#include <signal.h>
#include <sys/resource.h>

#include "dev/test/test.h"
#include "llmc/logger.h"

static char out[300];

static LogRow row_of(int64_t step) {
    LogRow r = log_row_init(step, step * 512, 0, 0.5, 0.95, 0.28);
    r.loss = 1.0 / (double)(step + 3), r.grad_norm = 2, r.ms = 10.5, r.tok_per_s = 48762;
    return r;
}

static const char *read_log(void) {
    static char text[65536];
    char path[512], *data;
    size_t size;
    snprintf(path, sizeof path, "%s/log.csv", out);
    if (io_read_file(path, &data, &size)) return io_error;
    snprintf(text, sizeof text, "%s", data);
    free(data);
    return text;
}

// What log.csv must hold after the steps first..last-1.
static const char *rows_of(int64_t first, int64_t last) {
    static char text[65536];
    strcpy(text, LOG_HEADER);
    for (int64_t s = first; s < last; s++) {
        char line[LOG_LINE_MAX];
        LogRow r = row_of(s);
        log_format_row(line, &r);
        strcat(text, line);
    }
    return text;
}

static void begin_anew(void) {
    CHECK_INT(io_remove(out), 0);
    CHECK_INT(io_make_dir(out), 0);
}

// Logs the steps first..last-1 to the file, without lines on stdout.
static void run(int64_t first, int64_t last) {
    Logger log;
    log_open(&log, out, first, 100);
    for (int64_t s = first; s < last; s++) {
        LogRow r = row_of(s);
        log_append(&log, &r);
    }
    log_close(&log);
}

static void fail_at(IoFaultKind kind, long at, bool sticky) {
    io_fault.kind = kind, io_fault.at = at, io_fault.sticky = sticky, io_fault.calls = 0;
}

// ---------------------------------------------------------------------------------------------

TEST(row_has_every_column_in_its_place) {
    char line[LOG_LINE_MAX];
    LogRow r = log_row_init(12, 6144, 1, 0.0203125, 0.97, 0.1234567891);
    r.loss = 3.5, r.grad_norm = 0.1, r.ms = 12.3456, r.tok_per_s = 1234.56, r.mfu = 0.41239;
    r.val_loss = 3.25, r.val_bpb = 1.125;
    size_t n = log_format_row(line, &r);
    CHECK_INT(n, strlen(line));
    CHECK_STR(line, "12,6144,1,3.500000,0.100000,0.0203125,0.97,0.123456789,12.346,1234.6,0.4124,"
                    "3.250000,1.125000,0x1.cp+1,0x1.999999999999ap-4\n");
}

TEST(absent_values_are_empty) {
    char line[LOG_LINE_MAX];
    LogRow r = log_row_init(0, 0, 0, 1, 0.85, 0);
    log_format_row(line, &r);
    CHECK_STR(line, "0,0,0,,,1,0.85,0,,,,,,,\n");
}

TEST(header_and_rows_have_the_same_number_of_columns) {
    char line[LOG_LINE_MAX];
    LogRow r = row_of(3);
    int in_header = 1, in_row = 1;
    log_format_row(line, &r);
    for (const char *c = LOG_HEADER; *c; c++) in_header += *c == ',';
    for (const char *c = line; *c; c++) in_row += *c == ',';
    CHECK_INT(in_header, LOG_COLUMNS);
    CHECK_INT(in_row, LOG_COLUMNS);
}

TEST(hexadecimal_loss_keeps_every_bit) {
    for (int k = 0; k < 1000; k++) {
        char line[LOG_LINE_MAX];
        LogRow r = row_of(k);
        r.grad_norm = exp(r.loss * 300 - 50);
        log_format_row(line, &r);
        const char *hex = line;
        for (int commas = 0; commas < 13; hex++) commas += *hex == ',';
        char *end;
        CHECK(strtod(hex, &end) == r.loss);
        CHECK(strtod(end + 1, &end) == r.grad_norm && *end == '\n');
    }
}

TEST(largest_values_fit_a_line) {
    char line[LOG_LINE_MAX];
    LogRow r;
    double *value = &r.loss;
    r.step = r.tokens = r.epoch = INT64_MIN;
    for (; value <= &r.val_bpb; value++) *value = -1.7976931348623157e308;
    size_t n = log_format_row(line, &r);
    CHECK(n < LOG_LINE_MAX && line[n] == 0);
    n = log_format_line(line, &r, INT64_MAX, 1e300, UINT64_MAX);
    CHECK(n < LOG_LINE_MAX && line[n] == 0);
}

TEST(line_shows_progress_in_fixed_columns) {
    char line[LOG_LINE_MAX], other[LOG_LINE_MAX];
    LogRow r = log_row_init(7, 0, 0, 0.5, 0.9, 0);
    r.loss = 5.123456, r.grad_norm = 0.25, r.ms = 123.45, r.tok_per_s = 4147.6;
    log_format_line(line, &r, 2000, 3723.4, 1250000000);
    CHECK_STR(line,
              "step    7/2000  loss  5.123456  norm   0.2500  lr     0.5     123.5 ms      4148 "
              "tok/s   1.25 GB  eta 1:02:03");
    r.step = 1999, r.loss = 10.5, r.grad_norm = 123, r.ms = 12345.6, r.lr = 0.0125;
    log_format_line(other, &r, 2000, 0, 1250000000);
    CHECK_INT(strstr(line, " GB") - line, strstr(other, " GB") - other);
    CHECK_INT(strstr(line, " ms") - line, strstr(other, " ms") - other);
    r.mfu = 0.4515;
    log_format_line(line, &r, 2000, 0, 0);
    CHECK(strstr(line, "tok/s  mfu 45.1%  ") || strstr(line, "tok/s  mfu 45.2%  "));
}

TEST(line_of_a_validation) {
    char line[LOG_LINE_MAX];
    LogRow r = log_row_init(50, 0, 0, 0, 0, 0);
    r.val_loss = 4.5;
    log_format_line(line, &r, 50, 0, 0);
    CHECK_STR(line, "step 50/50  val loss 4.500000");
    r.val_bpb = 1.25, r.loss = 4, r.grad_norm = 1, r.ms = 1, r.tok_per_s = 1;
    log_format_line(line, &r, 50, 0, 0);
    CHECK(!strncmp(line, "step 50/50  val loss 4.500000 bpb 1.250000\nstep 50/50  loss ", 60));
}

TEST(time_left) {
    char text[24];
    CHECK_STR(log_format_time(text, 0), "0:00:00");
    CHECK_STR(log_format_time(text, 59.6), "0:01:00");
    CHECK_STR(log_format_time(text, 360000), "100:00:00");
    CHECK_STR(log_format_time(text, -1), "-");
    CHECK_STR(log_format_time(text, NAN), "-");
    CHECK_STR(log_format_time(text, INFINITY), "-");
}

TEST(cut_takes_rows_from_the_step_on_and_torn_ones) {
    char text[65536];
    for (int64_t step = 0; step <= 12; step++) {
        strcpy(text, rows_of(0, 10));
        text[log_cut(text, strlen(text), step)] = 0;
        CHECK_STR(text, rows_of(0, step < 10 ? step : 10));
    }
    strcpy(text, rows_of(0, 3));
    strcat(text, "3,1536,0,0.1");  // a row that a dead process left
    text[log_cut(text, strlen(text), 9)] = 0;
    CHECK_STR(text, rows_of(0, 3));
    strcat(text, "\n3,15\nnot,a,row,,,,,,,,,,,,\n\n");
    text[log_cut(text, strlen(text), 9)] = 0;
    CHECK_STR(text, rows_of(0, 3));
}

TEST(resume_cuts_the_log_and_goes_on) {
    begin_anew();
    run(0, 10);
    CHECK_STR(read_log(), rows_of(0, 10));
    run(6, 8);
    CHECK_STR(read_log(), rows_of(0, 8));
    run(8, 12);
    CHECK_STR(read_log(), rows_of(0, 12));
    run(0, 2);
    CHECK_STR(read_log(), rows_of(0, 2));
}

TEST(every_row_is_in_the_file_at_once) {
    Logger log;
    begin_anew();
    log_open(&log, out, 0, 5);
    for (int64_t s = 0; s < 5; s++) {
        LogRow r = row_of(s);
        log_append(&log, &r);
        CHECK_STR(read_log(), rows_of(0, s + 1));
    }
    log_close(&log);
}

TEST(a_file_with_other_columns_is_left_alone) {
    char path[512];
    begin_anew();
    snprintf(path, sizeof path, "%s/log.csv", out);
    CHECK_INT(io_write_file(path, "step,loss\n1,2\n", 14), 0);
    DIES(0, "other columns") run(0, 3);
    CHECK_STR(read_log(), "step,loss\n1,2\n");
}

TEST(no_folder_no_file) {
    Logger log;
    LogRow r = row_of(0);
    log_open(&log, "", 0, 5);
    log_append(&log, &r);
    CHECK(!log.open);
    log_close(&log);
}

// Runs the action with stderr in `said`.
static char said[4096];
static void overhear(void (*action)(void)) {
    FILE *heard = tmpfile();
    int keep = dup(2);
    fflush(stderr);
    dup2(fileno(heard), 2);
    action();
    fflush(stderr);
    dup2(keep, 2), close(keep);
    rewind(heard);
    said[fread(said, 1, sizeof said - 1, heard)] = 0;
    fclose(heard);
}

static int warnings(void) {
    int count = 0;
    for (const char *p = said; (p = strstr(p, "warning: ")) != NULL; p++) count++;
    return count;
}

// Steps 0..19; the disk is full in steps 5 to 7 and 12 to 14.
static void run_through_full_disks(void) {
    Logger log;
    log_open(&log, out, 0, 20);
    for (int64_t s = 0; s < 20; s++) {
        LogRow r = row_of(s);
        if (s == 5 || s == 12) fail_at(IO_FAULT_ENOSPC, 1, true);
        if (s == 8 || s == 15) fail_at(IO_FAULT_NONE, 0, false);
        log_append(&log, &r);
    }
    log_close(&log);
}

TEST(a_full_disk_costs_rows_and_one_warning) {
    static char expected[65536];
    begin_anew();
    overhear(run_through_full_disks);
    CHECK_INT(warnings(), 2);  // one each time that it fills up
    CHECK(strstr(said, "training goes on") && strstr(said, "No space left"));
    strcpy(expected, rows_of(0, 5));
    strcat(expected, rows_of(8, 12) + strlen(LOG_HEADER));
    strcat(expected, rows_of(15, 20) + strlen(LOG_HEADER));
    CHECK_STR(read_log(), expected);
}

// Step 1 meets a limit in the middle of its row: the system writes a part of it and then fails.
static void run_into_a_limit(void) {
    Logger log;
    struct rlimit before, limit;
    LogRow r = row_of(0);
    log_open(&log, out, 0, 3);
    log_append(&log, &r);
    getrlimit(RLIMIT_FSIZE, &before);
    limit = before;
    limit.rlim_cur = strlen(read_log()) + 10;
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    r = row_of(1);
    log_append(&log, &r);
    setrlimit(RLIMIT_FSIZE, &before);
    CHECK_INT(strlen(read_log()), limit.rlim_cur);
    r = row_of(2);
    log_append(&log, &r);
    log_close(&log);
}

TEST(a_torn_row_is_gone_from_the_next_step_on) {
    static char expected[4096];
    begin_anew();
    overhear(run_into_a_limit);
    CHECK_INT(warnings(), 1);
    CHECK(strstr(said, "File too large"));
    strcpy(expected, rows_of(0, 1));
    strcat(expected, rows_of(2, 3) + strlen(LOG_HEADER));
    CHECK_STR(read_log(), expected);
}

static void run_ten(void) { run(0, 10); }

TEST(any_single_failure_loses_at_most_a_row) {
    for (long at = 1; at < 30; at++) {
        begin_anew();
        fail_at(IO_FAULT_EIO, at, false);
        overhear(run_ten);
        fail_at(IO_FAULT_NONE, 0, false);
        int rows = -1;
        for (const char *c = read_log(); *c; c++) rows += *c == '\n';
        CHECK(rows == 10 || rows == 9);
        CHECK(!strncmp(read_log(), LOG_HEADER, strlen(LOG_HEADER)));
    }
}

TEST(run_json_holds_the_facts) {
    char path[512], *text, key[16], value[64];
    size_t size;
    JsonPair facts[] = {{"flags", "--prompt \"a\nb\" --depth 4"}, {"version", "1"}};
    begin_anew();
    CHECK_INT(log_write_run(out, facts, 2), 0);
    snprintf(path, sizeof path, "%s/run.json", out);
    CHECK_INT(io_read_file(path, &text, &size), 0);
    Json j;
    json_init(&j, text, size);
    const char *keys[] = {"started", "flags", "version"};
    int k = 0;
    for (json_enter(&j, '{'); json_more(&j, '}'); k++) {
        CHECK(json_key(&j, key, sizeof key) && json_string(&j, value, sizeof value, NULL));
        CHECK(k < 3);
        CHECK_STR(key, keys[k < 3 ? k : 0]);
        if (k == 0) CHECK(strlen(value) == 20 && value[10] == 'T' && value[19] == 'Z');
        if (k == 1) CHECK_STR(value, facts[0].value);
    }
    CHECK(json_end(&j));
    CHECK_INT(k, 3);
    free(text);
}

int main(void) {
    snprintf(out, sizeof out, "%s/run", test_make_dir());
    RUN(row_has_every_column_in_its_place);
    RUN(absent_values_are_empty);
    RUN(header_and_rows_have_the_same_number_of_columns);
    RUN(hexadecimal_loss_keeps_every_bit);
    RUN(largest_values_fit_a_line);
    RUN(line_shows_progress_in_fixed_columns);
    RUN(line_of_a_validation);
    RUN(time_left);
    RUN(cut_takes_rows_from_the_step_on_and_torn_ones);
    RUN(resume_cuts_the_log_and_goes_on);
    RUN(every_row_is_in_the_file_at_once);
    RUN(a_file_with_other_columns_is_left_alone);
    RUN(no_folder_no_file);
    RUN(a_full_disk_costs_rows_and_one_warning);
    RUN(a_torn_row_is_gone_from_the_next_step_on);
    RUN(any_single_failure_loses_at_most_a_row);
    RUN(run_json_holds_the_facts);
    *strrchr(out, '/') = 0;
    test_remove_dir(out);
    return test_end();
}
