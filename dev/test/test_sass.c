// test_sass.c: the machine code of build/train_gpt2cu, where that is built for Hopper alone: each
// kernel of attention, and each product of our own, multiplies by wgmma (HGMMA) and keeps all it
// works on in registers (no stack: ptxas spilled nothing). Needs cuobjdump, of CUDA's toolkit.
#include "dev/test/test.h"
#include "llmc/io.h"  // io_read_file

// As their mangled names begin: kernel, head size or GemmKind.
static const char *const kernels[] = {
    "attention_forward_kernelILi64E", "attention_forward_kernelILi128E",
    "attention_dq_kernelILi64E",      "attention_dq_kernelILi128E",
    "attention_dkv_kernelILi64E",     "attention_dkv_kernelILi128E",
    "gemm_kernelIL8GemmKind0E",       "gemm_kernelIL8GemmKind1E",
    "gemm_kernelIL8GemmKind2E",       "gemm_kernelIL8GemmKind3E",
    "gemm_kernelIL8GemmKind4E",
};

static const char *build(void) { return getenv("BUILD") ? getenv("BUILD") : "build"; }

// What cuobjdump says of the trainer; the caller frees it. "" where there is no cuobjdump.
static char *cuobjdump(const char *options) {
    char line[800], *text = malloc(1);
    snprintf(
        line, sizeof line,
        "PATH=\"$PATH:$CUDA_HOME/bin:/usr/local/cuda/bin\"; command -v cuobjdump >/dev/null && "
        "cuobjdump %s '%s/train_gpt2cu' 2>&1",
        options, build());
    FILE *in = popen(line, "r");
    size_t size = 0, got = 1;
    for (; in && text && got > 0; size += got) {
        text = realloc(text, size + (1 << 16) + 1);
        got = text ? fread(text + size, 1, 1 << 16, in) : 0;
    }
    if (in) pclose(in);
    if (text) text[size] = 0;
    return text;
}

// What stands in `text` about a kernel: from its name to the next function; the caller frees it.
// NULL if it is not there.
static char *about(const char *text, const char *kernel) {
    const char *from = strstr(text, kernel), *to = from ? strstr(from, "Function") : NULL;
    return !from ? NULL : to ? strndup(from, (size_t)(to - from)) : strdup(from);
}

// Checks that of each kernel's part of what cuobjdump says `wanted` is there.
static void check_kernels(const char *options, const char *wanted) {
    char *flags = NULL, path[400];
    size_t size = 0;
    snprintf(path, sizeof path, "%s/flags.cuda", build());
    if (io_read_file(path, &flags, &size)) SKIP("no CUDA program is built");
    bool hopper = strstr(flags, "-DHOPPER") != NULL;
    free(flags);
    if (!hopper) SKIP("the CUDA programs are not for Hopper alone");
    snprintf(path, sizeof path, "%s/train_gpt2cu", build());
    if (!io_exists(path)) SKIP("train_gpt2cu is not built");
    char *text = cuobjdump(options);
    if (!text || !*text) {
        free(text);
        SKIP("cuobjdump is not installed");
    }
    for (size_t k = 0; k < sizeof kernels / sizeof *kernels; k++) {
        char *part = about(text, kernels[k]);
        test_check(part && strstr(part, wanted), __FILE__, __LINE__, "%s: %s '%s'", kernels[k],
                   part ? "without" : "not found, expected with", wanted);
        free(part);
    }
    free(text);
}

TEST(kernels_multiply_by_wgmma) { check_kernels("-sass", "HGMMA"); }
TEST(kernels_spill_nothing) { check_kernels("-res-usage", " STACK:0 "); }

int main(void) {
    RUN(kernels_multiply_by_wgmma);
    RUN(kernels_spill_nothing);
    return test_end();
}
