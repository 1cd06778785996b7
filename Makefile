# speedrun.c. `make` builds the programs into build/; `make quickstart` trains a small model;
# `make test` checks everything that needs no GPU. Needs make and a compiler (cc; CC=clang takes
# clang); uses OpenMP, PCRE2 and OpenBLAS where they are found (`make doctor` tells).

BUILD  ?= build
CFLAGS ?= -O3 -march=native
EXTRA  ?=
WERROR ?=

# What this machine has.
runs    = $(shell printf '$(1)' | $(CC) $(2) -x c - -o /dev/null 2>/dev/null && echo $(3))
OPENMP  := $(call runs,int main(void){return 0;},-fopenmp,-fopenmp)
PCRE2   := $(shell pkg-config --exists libpcre2-8 2>/dev/null && echo -DUSE_PCRE2 $$(pkg-config --cflags libpcre2-8))
PCRE2_L := $(if $(PCRE2),$(shell pkg-config --libs libpcre2-8))
BLAS    := $(shell pkg-config --exists openblas 2>/dev/null && echo -DUSE_OPENBLAS $$(pkg-config --cflags openblas))
BLAS_L  := $(if $(BLAS),$(shell pkg-config --libs openblas))

ALL_CFLAGS = -std=gnu11 $(CFLAGS) -fno-math-errno -Wall -Wextra $(if $(OPENMP),,-Wno-unknown-pragmas) \
             $(if $(WERROR),-Werror) -I. -MMD -MP $(OPENMP) $(PCRE2) $(EXTRA)
LDLIBS     = $(PCRE2_L) -lm -lpthread

PROGRAMS = $(addprefix $(BUILD)/,train_gpt2 tokenize bigram)
TESTS    = $(patsubst dev/test/%.c,$(BUILD)/test/%,$(wildcard dev/test/test_*.c))

.PHONY: all quickstart test test-asan test-mutations bench-cpu doctor readme format clean
all: $(PROGRAMS)

# Everything built depends on this file, which changes only when compiler or flags do.
$(BUILD)/flags: FORCE
	@mkdir -p $(BUILD)/test $(BUILD)/bench
	@echo '$(CC) $(ALL_CFLAGS) $(BLAS) $(LDLIBS)' | cmp -s - $@ || echo '$(CC) $(ALL_CFLAGS) $(BLAS) $(LDLIBS)' > $@
FORCE:

$(BUILD)/train_gpt2: train_gpt2.c $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) $< -o $@ $(LDLIBS)

$(BUILD)/%: dev/data/%.c $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) $< -o $@ $(LDLIBS)

$(BUILD)/test/%: dev/test/%.c $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) -DIO_FAULTS $< -o $@ $(LDLIBS)

# The trainer with faults to inject into its file access.
$(BUILD)/test/train_gpt2: train_gpt2.c $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) -DIO_FAULTS $< -o $@ $(LDLIBS)

$(BUILD)/bench/%: dev/bench/%.c $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) $(BLAS) $< -o $@ $(BLAS_L) $(LDLIBS)

-include $(wildcard $(BUILD)/*.d $(BUILD)/test/*.d $(BUILD)/bench/*.d)

# Text of this repository -> byte shards -> a small model, its loss beside a bigram model's, a sample.
quickstart: all
	@scripts/quickstart.sh $(BUILD)

# Every test that needs no GPU; the last line is "N passed, N failed".
test: all $(TESTS) $(BUILD)/test/train_gpt2
	@BUILD=$(BUILD) dev/test/run.sh $(TESTS)

# The same tests under AddressSanitizer and UndefinedBehaviorSanitizer.
test-asan:
	@$(MAKE) test BUILD=$(BUILD)/asan CFLAGS="-O1 -g -march=native" EXTRA="-fsanitize=address,undefined -fno-sanitize-recover=all"

# Single errors, put into the trainer one at a time: the comparison with the oracle must see each.
test-mutations: $(BUILD)/test/mutate
	@CC="$(CC)" BUILD=$(BUILD) $(BUILD)/test/mutate dev/test/mutations.txt "$(ALL_CFLAGS)" "$(LDLIBS)"

# Matmul beside OpenBLAS, tokens a second, memory, packing.
bench-cpu: all $(BUILD)/bench/bench_matmul $(BUILD)/bench/bench_packing
	@BUILD=$(BUILD) dev/bench/bench_cpu.sh

# What was found on this machine, and what is left out without it.
doctor:
	@echo "compiler    $$($(CC) --version | head -n 1)"
	@echo "OpenMP      $(if $(OPENMP),found,not found: one thread)"
	@echo "PCRE2       $(if $(PCRE2),found,not found: no GPT-2 encoding (byte tokens work); install libpcre2-dev)"
	@echo "OpenBLAS    $(if $(BLAS),found,not found: make bench-cpu compares with nothing; install libopenblas-dev)"

# README.md's list of flags, from the table.
readme: $(BUILD)/train_gpt2
	@BUILD=$(BUILD) dev/readme.sh

# Source in the style of .clang-format.
format:
	clang-format -i train_gpt2.c llmc/*.h dev/*/*.c dev/*/*.h

# Removes all that was built.
clean:
	rm -rf $(BUILD)
