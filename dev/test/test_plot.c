// test_plot.c: dev/plot/plot.py draws what the logs hold. Skipped where there is no python3.
#include "dev/test/cli.h"

static bool have_python(void) {
    return run("python3 -c 'import sys; sys.exit(sys.version_info < (3, 7))'") == 0;
}

// How often a part stands in the drawing, which must be well-formed XML.
static int drawn(const char *part) {
    int count = 0;
    size_t size;
    char *svg = read_text(in_dir("plot.svg"), &size);
    CHECK_INT(run("python3 -c 'import sys, xml.dom.minidom as m; m.parse(sys.argv[1])' %s",
                  in_dir("plot.svg")),
              0);
    for (char *p = svg; (p = strstr(p, part)) != NULL; p++) count++;
    free(svg);
    return count;
}

TEST(runs_become_lines_and_validations_circles) {
    if (!have_python()) SKIP("python3 is not installed");
    train_well("--val %s --eval-every 5 --out %s", in_dir("s01.bin"), in_dir("run"));
    static const char points[] = "step,val_loss\n6,5.25\n12,5.125\n";
    write_bytes(in_dir("points.csv"), points, strlen(points));
    CHECK_INT(run("python3 dev/plot/plot.py --out %s --title 'a < b' %s/run/log.csv 'x & y=%s'",
                  in_dir("plot.svg"), dir, in_dir("points.csv")),
              0);
    CHECK_INT(drawn("<polyline"), 3);                // the run's two and the points
    CHECK_INT(drawn("<circle"), 4 + 2 + 2);          // with one of each in the legend
    CHECK_INT(drawn(">run: loss, validation "), 1);  // the last one's number comes next
    CHECK_INT(drawn(">x &amp; y: validation 5.125<"), 1);
    CHECK_INT(drawn(">a &lt; b<"), 1);
    CHECK_INT(run("python3 dev/plot/plot.py --out %s --x tokens --first 5 --top 1 %s/run/log.csv",
                  in_dir("plot.svg"), dir),
              0);
    CHECK_INT(drawn(">tokens<"), 1);
}

TEST(bad_logs_are_named) {
    if (!have_python()) SKIP("python3 is not installed");
    static const char *const text[] = {"",
                                       "step,loss\n",
                                       "a,b\n1,2\n",
                                       "step,loss\n1,x\n",
                                       "step,loss\n1,nan\n",
                                       "step,loss\n1,1\n2,inf\n",
                                       "step,loss\nnan,1\n",
                                       "step,loss\n1,\xff\n"};
    for (int i = 0; i < (int)(sizeof text / sizeof *text); i++) {
        write_bytes(in_dir("log.csv"), text[i], strlen(text[i]));
        CHECK_INT(
            run("python3 dev/plot/plot.py --out %s %s", in_dir("plot.svg"), in_dir("log.csv")), 1);
        CHECK_INT(count_said("\n"), 1);
        CHECK_SAID("log.csv");
    }
    CHECK_INT(run("python3 dev/plot/plot.py --out %s nowhere.csv", in_dir("plot.svg")), 1);
    CHECK_SAID("nowhere.csv");
    CHECK(!io_exists(in_dir("plot.svg")));
}

TEST(paths_with_an_equals_sign_and_odd_flags) {
    if (!have_python()) SKIP("python3 is not installed");
    static const char points[] = "step,loss\n6,5.25\n12,5.125\n";
    write_bytes(in_dir("lr=2.csv"), points, strlen(points));
    const char *svg = in_dir("plot.svg"), *log = in_dir("lr=2.csv");
    CHECK_INT(run("python3 dev/plot/plot.py --out %s %s lr=3=%s", svg, log, log), 0);
    CHECK_INT(drawn(">lr=3: loss<"), 1);
    CHECK_INT(drawn("<polyline"), 2);
    CHECK_INT(run("python3 dev/plot/plot.py --out %s --first 99 %s", svg, log), 1);
    CHECK_SAID("lr=2.csv: found no step from --first 99 on, the last is 12");
    CHECK_INT(run("python3 dev/plot/plot.py --out %s --first nan %s", svg, log), 2);
    CHECK_INT(run("python3 dev/plot/plot.py --out %s/no/plot.svg %s", dir, log), 1);
    CHECK_SAID("no/plot.svg: cannot write it");
    CHECK_INT(count_said("\n"), 1);
}

int main(void) {
    cli_prepare();
    RUN_IN_DIR(runs_become_lines_and_validations_circles);
    RUN_IN_DIR(bad_logs_are_named);
    RUN_IN_DIR(paths_with_an_equals_sign_and_odd_flags);
    return test_end();
}
