// test_sass.c: the machine code of build/train_gpt2cu, where that is built for Hopper alone. Each
// kernel of attention, and each product of our own, multiplies by wgmma (HGMMA), keeps all it works
// on in registers (no stack: ptxas spilled nothing), and has what ptxas takes away with a mere
// remark where it cannot do it:
//
//     registers change hands    a setmaxnreg that it ignores is missing: USETMAXREG
//     products run beside       what touches a result in flight makes it serialise all products of
//     other work                the kernel: it waits (WARPGROUP.DEPBAR) after each HGMMA
//
// Needs cuobjdump, of CUDA's toolkit.
#include "dev/test/test.h"
#include "llmc/io.h"  // io_read_file

// Kernels as their mangled names begin: name, head size or GemmKind. waits: how often wgmma_wait()
// stands in the source (twice in what is compiled for tiles and for halves), to which ptxas has
// none to add; 0: only fewer than products.
typedef struct {
    const char *name;
    int waits;
} Kernel;

static const Kernel kernels[] = {
    {"attention_forward_kernelILi64E", 9}, {"attention_forward_kernelILi128E", 9},
    {"attention_dq_kernelILi64E", 7},      {"attention_dq_kernelILi128E", 7},
    {"attention_dkv_kernelILi64E", 4},     {"attention_dkv_kernelILi128E", 4},
    {"gemm_kernelIL8GemmKind0E", 0},       {"gemm_kernelIL8GemmKind1E", 0},
    {"gemm_kernelIL8GemmKind2E", 0},       {"gemm_kernelIL8GemmKind3E", 0},
    {"gemm_kernelIL8GemmKind4E", 0},
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

// check(kernel, its part of what cuobjdump says) for each kernel.
static void check_kernels(const char *options, void (*check)(const Kernel *, const char *part)) {
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
        char *part = about(text, kernels[k].name);
        test_check(part, __FILE__, __LINE__, "%s: not found", kernels[k].name);
        if (part) check(&kernels[k], part);
        free(part);
    }
    free(text);
}

static void check_has(const Kernel *kernel, const char *part, const char *wanted) {
    test_check(strstr(part, wanted), __FILE__, __LINE__, "%s: without '%s'", kernel->name, wanted);
}

static int count(const char *text, const char *what) {
    int n = 0;
    while ((text = strstr(text, what))) n++, text += strlen(what);
    return n;
}

static void check_code(const Kernel *kernel, const char *part) {
    int products = count(part, " HGMMA"), waits = count(part, "WARPGROUP.DEPBAR");
    check_has(kernel, part, " HGMMA");
    check_has(kernel, part, "USETMAXREG.DEALLOC");
    check_has(kernel, part, "USETMAXREG.TRY_ALLOC");
    test_check(kernel->waits ? waits == kernel->waits : waits < products, __FILE__, __LINE__,
               "%s: found %d waits for %d products, expected %s%d: serialised?", kernel->name,
               waits, products, kernel->waits ? "" : "fewer than ",
               kernel->waits ? kernel->waits : products);
}

static void check_usage(const Kernel *kernel, const char *part) {
    check_has(kernel, part, " STACK:0 ");
}

TEST(kernels_multiply_by_wgmma) { check_kernels("-sass", check_code); }
TEST(kernels_spill_nothing) { check_kernels("-res-usage", check_usage); }

int main(void) {
    RUN(kernels_multiply_by_wgmma);
    RUN(kernels_spill_nothing);
    return test_end();
}
