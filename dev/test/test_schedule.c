// test_schedule.c: llmc/schedule.h on hand-worked values, and on the table in
// fixtures/schedule.txt, which the PyTorch oracle writes from its own reading of the formulas.
#include "dev/test/test.h"
#include "llmc/io.h"
#include "llmc/schedule.h"

// The flags at their defaults.
static Flags defaults(void) {
    Flags f;
    Arg table[FLAGS_COUNT];
    char *argv[] = {"test"};
    flags_parse(&f, table, 1, argv);
    return f;
}

static Plan plan(const Flags *f, int ranks) {
    Config c = config_from_flags(f, -1, -1);
    return plan_from_flags(f, &c, ranks, 8192);
}

static GroupNumbers group(const Flags *f, Group g) {
    Config c = config_from_flags(f, -1, -1);
    Plan p = plan_from_flags(f, &c, 1, 8192);
    return plan_group(&p, f, &c, g);
}

// ---------------------------------------------------------------------------------------------
// The three schedules.

TEST(lr_rises_stays_and_falls) {
    CHECK_NEAR(schedule_at(0, 1000, 40).lr, 0.025, 0);  // (0 + 1) / 40
    CHECK_NEAR(schedule_at(39, 1000, 40).lr, 1, 0);
    CHECK_NEAR(schedule_at(40, 1000, 40).lr, 1, 0);
    CHECK_NEAR(schedule_at(350, 1000, 40).lr, 1, 0);  // n - d = 1000 - 650
    CHECK_NEAR(schedule_at(351, 1000, 40).lr, 0.05 + 0.95 * 649 / 650, 1e-15);
    CHECK_NEAR(schedule_at(675, 1000, 40).lr, 0.525, 1e-15);  // half of the fall
    CHECK_NEAR(schedule_at(999, 1000, 40).lr, 0.05 + 0.95 / 650, 1e-15);
}

TEST(warmup_wins_over_the_fall) {
    CHECK_NEAR(schedule_at(38, 50, 40).lr, 39.0 / 40, 0);  // n - d = 50 - 32
    CHECK_NEAR(schedule_at(40, 50, 40).lr, 0.05 + 0.95 * 10 / 32, 1e-15);
    CHECK_NEAR(schedule_at(0, 50, 0).lr, 1, 0);  // no warmup
    CHECK_NEAR(schedule_at(0, 1, 0).lr, 1, 0);
}

TEST(lambdas_rest_in_step_0) {
    for (int64_t it = 0; it < 3; it++) {
        Schedule now = schedule_at(it, 1000, 40);
        for (int g = 0; g < GROUP_COUNT; g++) {
            GroupNumbers k = {.lr = 2};
            bool rests = it == 0 && (g == GROUP_RESID || g == GROUP_X0 || g == GROUP_SMEAR);
            CHECK_NEAR(schedule_lr(now, k, (Group)g), rests ? 0 : 2 * now.lr, 0);
        }
    }
}

TEST(length_of_the_fall_rounds_half_to_even) {
    CHECK_NEAR(schedule_at(5, 10, 0).lr, 0.05 + 0.95 * 5 / 6, 1e-15);     // d = rint(6.5) = 6
    CHECK_NEAR(schedule_at(11, 30, 0).lr, 0.05 + 0.95 * 19 / 20, 1e-15);  // d = rint(19.5) = 20
    CHECK_NEAR(schedule_at(10, 30, 0).lr, 1, 0);
}

TEST(momentum_rises_stays_and_falls) {
    CHECK_NEAR(schedule_at(0, 10000, 40).momentum, 0.85, 1e-15);
    CHECK_NEAR(schedule_at(200, 10000, 40).momentum, 0.91, 1e-15);
    CHECK_NEAR(schedule_at(399, 10000, 40).momentum, 0.9697, 1e-15);
    CHECK_NEAR(schedule_at(400, 10000, 40).momentum, 0.97, 0);
    CHECK_NEAR(schedule_at(3500, 10000, 40).momentum, 0.97, 0);
    CHECK_NEAR(schedule_at(6750, 10000, 40).momentum, 0.935, 1e-15);
    CHECK_NEAR(schedule_at(9999, 10000, 40).momentum, 0.97 - 0.07 * 6499 / 6500, 1e-15);
    CHECK_NEAR(schedule_at(300, 500, 40).momentum, 0.94, 1e-15);  // still rising, though lr falls
    CHECK_NEAR(schedule_at(400, 500, 40).momentum, 0.97 - 0.07 * 225 / 325, 1e-15);
}

TEST(decay_is_a_half_cosine) {
    CHECK_NEAR(schedule_at(0, 1000, 40).wd, 1, 0);
    CHECK_NEAR(schedule_at(250, 1000, 40).wd, 0.5 + sqrt(0.125), 1e-15);
    CHECK_NEAR(schedule_at(500, 1000, 40).wd, 0.5, 1e-15);
    CHECK_NEAR(schedule_at(999, 1000, 40).wd, 0.25e-6 * M_PI * M_PI, 1e-11);
}

// ---------------------------------------------------------------------------------------------
// Batch and steps.

TEST(default_plan_of_depth_12) {  // P = 12 * 12 * 768^2 + 50257 * 768 = 123,532,032
    Flags f = defaults();
    Plan p = plan(&f, 1);
    CHECK(p.horizon == 1235320320.0 && p.horizon12 == p.horizon);
    CHECK_INT(p.batch, 524288);
    CHECK_INT(p.steps, 2356);  // 1235320320 / 524288 = 2356.2
    CHECK_INT(p.micro_rows, 4);
    CHECK_INT(p.micro_steps, 64);
}

TEST(default_batch_is_a_power_of_two) {
    CHECK_INT(plan_default_batch(1, 1), 524288);
    CHECK_INT(plan_default_batch(0.129614, 1), 262144);  // 2^(19 - 1.129)
    CHECK_INT(plan_default_batch(pow(2, 1 / 0.383), 1), 1048576);
    CHECK_INT(plan_default_batch(pow(2, 0.49 / 0.383), 1), 524288);
    CHECK_INT(plan_default_batch(pow(2, 0.51 / 0.383), 1), 1048576);
}

TEST(default_batch_counts_this_vocabulary) {
    Flags f = defaults();
    f.depth = 4, f.vocab = 257;
    Plan p = plan(&f, 1);
    CHECK(p.horizon == 10 * (4 * 12 * 256.0 * 256 + 257 * 256));
    CHECK(p.horizon12 == 10 * (12 * 12 * 768.0 * 768 + 257 * 768));
}

TEST(steps_come_from_steps_tokens_or_ratio) {
    Flags f = defaults();
    f.batch_tokens = 8192;
    CHECK_INT(plan(&f, 1).steps, 150795);  // 1235320320 / 8192 = 150795.9
    f.ratio = 0.5;                         // 61766016 / 8192 = 7539.8
    CHECK_INT(plan(&f, 1).steps, 7539);
    f.ratio = (3 * 8192 - 0.5) / 123532032;  // half a token short of three batches
    CHECK_INT(plan(&f, 1).steps, 2);
    f.tokens = 8192 * 5 + 8191;
    CHECK_INT(plan(&f, 1).steps, 5);
    f.steps = 3;
    CHECK_INT(plan(&f, 1).steps, 3);
}

TEST(horizon_stays_the_models_own) {
    Flags f = defaults();
    f.batch_tokens = 1 << 19;
    double wd = group(&f, GROUP_MATRIX).wd;
    f.steps = 7;
    CHECK(group(&f, GROUP_MATRIX).wd == wd);
    f.steps = 0, f.tokens = 1 << 21;
    CHECK(group(&f, GROUP_MATRIX).wd == wd);
    f.ratio = 20;  // Z and Z12 both double
    CHECK_NEAR(group(&f, GROUP_MATRIX).wd, wd, 1e-15);
}

TEST(micro_steps_divide_the_batch) {
    Flags f = defaults();
    f.seq_len = 64, f.batch_tokens = 64 * 24, f.steps = 1;
    for (int ranks = 1; ranks <= 4; ranks++) {
        for (int rows = 1; rows * ranks <= 24; rows++) {
            f.micro_batch = rows;
            if (24 % (rows * ranks)) continue;
            Plan p = plan(&f, ranks);
            CHECK_INT(p.micro_rows, rows);
            CHECK_INT(p.micro_steps * rows * ranks, 24);
        }
    }
}

TEST(default_micro_batch_fits_the_trainers_tokens) {
    CHECK_INT(plan_default_micro_rows(256, 2048, 8192), 4);
    CHECK_INT(plan_default_micro_rows(256, 1024, 8192), 8);
    CHECK_INT(plan_default_micro_rows(6, 2048, 8192), 3);  // 4 does not divide 6
    CHECK_INT(plan_default_micro_rows(7, 2048, 8192), 1);
    CHECK_INT(plan_default_micro_rows(5, 64, 8192), 5);
    CHECK_INT(plan_default_micro_rows(64, 10000, 8192), 1);
    CHECK_INT(plan_default_micro_rows(1, 8192, 8192), 1);
    CHECK_INT(plan_default_micro_rows(256, 2048, 131072), 64);
    CHECK_INT(plan_default_micro_rows(96, 2048, 131072), 48);  // 64 does not divide 96
    Flags f = defaults();
    Config c = config_from_flags(&f, -1, -1);
    CHECK_INT(plan_from_flags(&f, &c, 1, 131072).micro_rows, 64);
    CHECK_INT(plan_from_flags(&f, &c, 8, 131072).micro_rows, 32);  // 2^19 tokens: 32 rows a rank
    f.micro_batch = 2;
    CHECK_INT(plan_from_flags(&f, &c, 1, 131072).micro_rows, 2);
}

TEST(the_one_phase_is_the_plans) {
    CHECK_INT(sizeof(Phase), 2 * sizeof(int64_t) + (2 + MODEL_MAX_LAYERS) * sizeof(int));
    Flags f = defaults();
    Config c = config_from_flags(&f, -1, -1);
    Plan p = plan_from_flags(&f, &c, 1, 8192);
    for (int64_t it = 0; it <= p.steps; it += p.steps / 2) {
        Phase phase = phase_at(&p, &c, it);
        CHECK_INT(phase.T, 2048);
        CHECK_INT(phase.batch, phase.micro_steps * phase.micro_rows * phase.T);
        CHECK_INT(phase.batch, p.batch);
        CHECK(phase.micro_rows <= phase_largest(&p, &c).micro_rows);
        for (int i = 0; i < c.L; i++) CHECK_INT(phase.window[i], i % 4 == 3 ? 2048 : 512);
    }
}

TEST(what_does_not_divide_exits_2) {
    Flags f = defaults();
    f.seq_len = 64, f.steps = 1, f.batch_tokens = 100;
    DIES(EXIT_USAGE, "--batch-tokens: found 100, expected a multiple of --seq-len 64") plan(&f, 1);
    f.batch_tokens = 64 * 6;
    DIES(EXIT_USAGE, "found 6 rows, expected a multiple of the 4 ranks") plan(&f, 4);
    f.micro_batch = 4;
    DIES(EXIT_USAGE, "found 6 rows, expected a multiple of --micro-batch 4 on 1 ranks") plan(&f, 1);
    f.micro_batch = 2;
    DIES(EXIT_USAGE, "--micro-batch 2 on 2 ranks") plan(&f, 2);
    f.micro_batch = 0, f.steps = 0, f.tokens = 64 * 6 - 1;
    DIES(EXIT_USAGE, "found less than one step: 383 tokens in batches of 384") plan(&f, 1);
}

// ---------------------------------------------------------------------------------------------
// Each group's numbers.

TEST(group_numbers_at_the_reference_shape) {  // C = 768, batch 2^19: every factor is 1
    Flags f = defaults();
    const double expected[GROUP_COUNT][5] = {
        // lr, beta1, beta2, eps, wd
        {0.008, 0.8, 0.96, 1e-10, 0.01}, {0.3, 0.8, 0.995, 1e-10, 0.001},
        {0.15, 0.8, 0.995, 1e-10, 0.01}, {0.005, 0.8, 0.95, 1e-8, 0.05},
        {0.5, 0.96, 0.95, 1e-8, 0},      {0.2, 0.8, 0.95, 1e-8, 0},
        {0.02, 0, 0.9, 0, 0.28},
    };
    for (int g = 0; g < GROUP_COUNT; g++) {
        GroupNumbers n = group(&f, (Group)g);
        const double found[5] = {n.lr, n.beta1, n.beta2, n.eps, n.wd};
        for (int k = 0; k < 5; k++) CHECK_NEAR(found[k], expected[g][k], 1e-15 * expected[g][k]);
    }
}

TEST(group_lr_scales_with_width_and_batch) {
    Flags f = defaults();
    f.channels = 192, f.heads = 3, f.batch_tokens = 1 << 15;
    double width = 2, batch = 0.25;  // sqrt(768 / 192), sqrt(2^15 / 2^19)
    CHECK_NEAR(group(&f, GROUP_LM_HEAD).lr, 0.008 * width * batch, 1e-15);
    CHECK_NEAR(group(&f, GROUP_WTE).lr, 0.3 * width * batch, 1e-15);
    CHECK_NEAR(group(&f, GROUP_VALUE_EMBED).lr, 0.15 * width * batch, 1e-15);
    CHECK_NEAR(group(&f, GROUP_RESID).lr, 0.005 * batch, 1e-15);
    CHECK_NEAR(group(&f, GROUP_X0).lr, 0.5 * batch, 1e-15);
    CHECK_NEAR(group(&f, GROUP_SMEAR).lr, 0.2, 1e-15);
    CHECK_NEAR(group(&f, GROUP_MATRIX).lr, 0.02 * batch, 1e-15);
    double P = 12 * 12 * 192.0 * 192 + 50257 * 192.0, P12 = 123532032;
    CHECK_NEAR(group(&f, GROUP_MATRIX).wd, 0.28 * batch * P12 / P, 1e-14);
}

TEST(group_numbers_follow_their_flags) {
    Flags f = defaults();
    f.lr_lm_head = 1, f.lr_wte = 2, f.lr_value_embed = 3, f.lr_resid = 4, f.lr_x0 = 5,
    f.lr_smear = 6, f.lr_matrix = 7, f.wd_matrix = 8;
    for (int g = 0; g < GROUP_COUNT; g++) CHECK_NEAR(group(&f, (Group)g).lr, g + 1, 1e-14);
    CHECK_NEAR(group(&f, GROUP_MATRIX).wd, 8, 1e-14);
}

// ---------------------------------------------------------------------------------------------
// The oracle's table: lines of a name, its arguments, and the value.

typedef struct {
    const char *name;
    int arguments;
    double (*value)(const double *a);
} Oracle;

static Flags of_depth(const double *a) {
    Flags f = defaults();
    f.depth = (int)a[0], f.vocab = (int)a[1];
    return f;
}

static Config config_of(const double *a) {
    Flags f = of_depth(a);
    return config_from_flags(&f, -1, -1);
}

static Plan plan_of(const double *a) {
    Flags f = of_depth(a);
    return plan(&f, 1);
}

static GroupNumbers group_of(const double *a, Group g) {
    Flags f = of_depth(a);
    return group(&f, g);
}

static double oracle_lr(const double *a) {
    return schedule_at((int64_t)a[0], (int64_t)a[1], (int)a[2]).lr;
}
static double oracle_momentum(const double *a) {
    return schedule_at((int64_t)a[0], (int64_t)a[1], 40).momentum;
}
static double oracle_decay(const double *a) {
    return schedule_at((int64_t)a[0], (int64_t)a[1], 40).wd;
}
static double oracle_channels(const double *a) { return config_of(a).C; }
static double oracle_horizon(const double *a) { return plan_of(a).horizon; }
static double oracle_batch(const double *a) { return (double)plan_of(a).batch; }
static double oracle_steps(const double *a) { return (double)plan_of(a).steps; }
static double oracle_lr_head(const double *a) { return group_of(a, GROUP_LM_HEAD).lr; }
static double oracle_lr_matrix(const double *a) { return group_of(a, GROUP_MATRIX).lr; }
static double oracle_lr_smear(const double *a) { return group_of(a, GROUP_SMEAR).lr; }
static double oracle_wd(const double *a) { return group_of(a, GROUP_MATRIX).wd; }

static double oracle_params(const double *a) {
    Config c = config_of(a);
    return config_matrix_params(&c);
}

static double oracle_flops(const double *a) {
    Config c = config_of(a);
    return config_flops_per_token(&c, false);
}

static double
oracle_window(const double *a) {  // layer 0 of SSSL is short; never longer than the row
    Flags f = defaults();
    f.seq_len = (int)a[0];
    return config_from_flags(&f, -1, -1).window[0];
}

static double oracle_steps_of_ratio(const double *a) {
    Flags f = of_depth(a);
    f.ratio = a[2], f.batch_tokens = (int64_t)a[3];
    return (double)plan(&f, 1).steps;
}

static double oracle_steps_of_tokens(const double *a) {
    Flags f = defaults();
    f.tokens = (int64_t)a[0], f.batch_tokens = (int64_t)a[1];
    if (f.tokens < f.batch_tokens) return 0;  // refused: what_does_not_divide_exits_2
    return (double)plan(&f, 1).steps;
}

static const Oracle oracles[] = {
    {"lr_multiplier", 3, oracle_lr},
    {"muon_momentum", 2, oracle_momentum},
    {"muon_decay", 2, oracle_decay},
    {"channels", 2, oracle_channels},
    {"matrix_parameters", 2, oracle_params},
    {"horizon", 2, oracle_horizon},
    {"batch", 2, oracle_batch},
    {"steps", 2, oracle_steps},
    {"flops_per_token", 2, oracle_flops},
    {"lr_lm_head", 2, oracle_lr_head},
    {"lr_matrix", 2, oracle_lr_matrix},
    {"lr_smear", 2, oracle_lr_smear},
    {"muon_wd", 2, oracle_wd},
    {"window_short", 1, oracle_window},
    {"steps_of_ratio", 4, oracle_steps_of_ratio},
    {"steps_of_tokens", 2, oracle_steps_of_tokens},
};
enum { ORACLES = sizeof oracles / sizeof *oracles };

TEST(equals_the_oracles_table) {
    char *text, *line, *rest;
    size_t size;
    int seen[ORACLES] = {0}, lines = 0;
    CHECK(!io_read_file("dev/test/fixtures/schedule.txt", &text, &size));
    for (line = text ? strtok_r(text, "\n", &rest) : NULL; line;
         line = strtok_r(NULL, "\n", &rest)) {
        if (line[0] == '#') continue;
        char name[64];
        int at = 0, k = 0;
        CHECK(sscanf(line, "%63s%n", name, &at) == 1);
        while (k < ORACLES && strcmp(oracles[k].name, name)) k++;
        test_check(k < ORACLES, __FILE__, __LINE__, "unknown name in the table: %s", line);
        if (k == ORACLES) continue;
        double a[5];
        char *p = line + at;
        for (int i = 0; i <= oracles[k].arguments; i++) a[i] = strtod(p, &p);
        double found = oracles[k].value(a), expected = a[oracles[k].arguments];
        if (!strcmp(name, "window_short")) expected = fmin(expected, a[0]);
        test_check(fabs(found - expected) <= 1e-14 * fabs(expected), __FILE__, __LINE__,
                   "%s: found %.17g", line, found);
        seen[k]++, lines++;
    }
    for (int k = 0; k < ORACLES; k++)
        test_check(seen[k] > 0, __FILE__, __LINE__, "no line for %s", oracles[k].name);
    CHECK(lines > 600);
    free(text);
}

int main(void) {
    RUN(lr_rises_stays_and_falls);
    RUN(warmup_wins_over_the_fall);
    RUN(lambdas_rest_in_step_0);
    RUN(length_of_the_fall_rounds_half_to_even);
    RUN(momentum_rises_stays_and_falls);
    RUN(decay_is_a_half_cosine);
    RUN(default_plan_of_depth_12);
    RUN(default_batch_is_a_power_of_two);
    RUN(default_batch_counts_this_vocabulary);
    RUN(steps_come_from_steps_tokens_or_ratio);
    RUN(horizon_stays_the_models_own);
    RUN(micro_steps_divide_the_batch);
    RUN(default_micro_batch_fits_the_trainers_tokens);
    RUN(the_one_phase_is_the_plans);
    RUN(what_does_not_divide_exits_2);
    RUN(group_numbers_at_the_reference_shape);
    RUN(group_lr_scales_with_width_and_batch);
    RUN(group_numbers_follow_their_flags);
    RUN(equals_the_oracles_table);
    return test_end();
}
