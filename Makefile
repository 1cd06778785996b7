# speedrun.c. `make` builds the programs into build/; `make quickstart` trains a small model;
# `make test` checks everything that needs no GPU, `make test-gpu` the rest. Needs make and a compiler
# (cc; CC=clang takes clang), for the GPU nvcc; uses OpenMP, PCRE2, OpenBLAS, cuDNN where they are
# found (`make doctor` tells). PRECISION=FP32 builds the CUDA trainer that is held against the CPU.

BUILD     ?= build
CFLAGS    ?= -O3 -march=native
PRECISION ?= BF16
EXTRA     ?=
WERROR    ?=

# What this machine has.
runs    = $(shell printf '$(1)' | $(CC) $(2) -x c - -o /dev/null 2>/dev/null && echo $(3))
OPENMP  := $(call runs,int main(void){return 0;},-fopenmp,-fopenmp)
PCRE2   := $(shell pkg-config --exists libpcre2-8 2>/dev/null && echo -DUSE_PCRE2 $$(pkg-config --cflags libpcre2-8))
PCRE2_L := $(if $(PCRE2),$(shell pkg-config --libs libpcre2-8))
BLAS    := $(shell pkg-config --exists openblas 2>/dev/null && echo -DUSE_OPENBLAS $$(pkg-config --cflags openblas))
BLAS_L  := $(if $(BLAS),$(shell pkg-config --libs openblas))

# MPI, for several ranks on CPUs (mpirun); MPI= leaves it out.
MPI     := $(shell pkg-config --exists ompi-c 2>/dev/null && echo -DUSE_MPI $$(pkg-config --cflags ompi-c))
MPI_L   := $(if $(MPI),$(shell pkg-config --libs ompi-c))

# CUDA: nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda, and the architectures to build for:
# ARCH=80,90a, or this machine's GPUs' (9.0 is 90a), or 90a.
NVCC     := $(firstword $(wildcard $(CUDA_HOME:%=%/bin/nvcc)) $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
CUDA_DIR := $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
CUDA_LIB := $(patsubst %/libcublasLt.so,%,$(firstword $(wildcard $(addsuffix /libcublasLt.so,$(CUDA_DIR)/lib64 $(CUDA_DIR)/lib /usr/lib/*-linux-gnu))))
CUDA     := $(and $(NVCC),$(CUDA_LIB))
CUDA_MISSING = $(if $(NVCC),libcublasLt,nvcc) not found in CUDA_HOME, on the PATH, in /usr/local/cuda
FIND     := $(foreach v,CUDNN_HOME NCCL_HOME CUDNN_FRONTEND_PATH,$(v)="$($(v))") CUDA_HOME="$(or $(CUDA_HOME),$(CUDA_DIR))" dev/find.sh
GPU_ARCH := $(if $(CUDA),$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n 's/^9\.0$$/90a/; s/^\([0-9]*\)\.\([0-9][a-z]*\)$$/\1\2/p; /^90a$$/p' | sort -u))
ARCH     ?= $(or $(GPU_ARCH),90a)
comma    := ,
# HOPPER: all is for sm_90a, and kernels of Hopper's own take the place of portable ones.
HOPPER   := $(if $(filter-out 90a,$(ARCH)),,-DHOPPER)
GENCODE  := $(foreach a,$(subst $(comma), ,$(ARCH)),-gencode arch=compute_$(a),code=sm_$(a))
FP32     := $(if $(filter FP32,$(PRECISION)),_fp32)
$(if $(filter BF16 FP32,$(PRECISION)),,$(error PRECISION: found $(PRECISION), expected BF16 or FP32))

# NCCL, where it is found, for several GPUs; NCCL= leaves it out.
NCCL     := $(if $(CUDA),$(shell $(FIND) nccl))
NCCL_F   := $(if $(NCCL),-DUSE_NCCL $(addprefix -isystem ,$(filter-out /usr/include,$(word 1,$(NCCL)))))
NCCL_SO  := $(word 2,$(NCCL))
NCCL_L   := $(if $(NCCL),-L$(dir $(NCCL_SO)) -l:$(notdir $(NCCL_SO)) -Xlinker -rpath=$(dir $(NCCL_SO)))

# USE_CUDNN=1: the BF16 trainer's attention is cuDNN's.
ifdef USE_CUDNN
CUDNN    := $(shell $(FIND) cudnn)
FRONTEND := $(shell $(FIND) cudnn-frontend)
$(if $(or $(and $(CUDNN),$(FRONTEND)),$(filter doctor,$(MAKECMDGOALS))),,$(error USE_CUDNN=1: found no $(if $(CUDNN),cudnn-frontend,cuDNN); make doctor tells what to do))
CUDNN_O  := $(BUILD)/cudnn_attention.o
CUDNN_SO := $(word 2,$(CUDNN))
CUDNN_L  := -L$(dir $(CUDNN_SO)) -l:$(notdir $(CUDNN_SO)) -Xlinker -rpath=$(dir $(CUDNN_SO)) -lnvrtc
endif

ALL_CFLAGS = -std=gnu11 $(CFLAGS) -fno-math-errno -Wall -Wextra $(if $(OPENMP),,-Wno-unknown-pragmas) \
             $(if $(WERROR),-Werror) -I. -MMD -MP $(OPENMP) $(PCRE2) $(EXTRA)
LDLIBS     = $(PCRE2_L) -lm -lpthread
NVCC_FLAGS = -std=c++20 -O3 -lineinfo $(GENCODE) $(HOPPER) -t 0 -I. -Xcompiler -Wall,-Wextra,$(or $(OPENMP),-Wno-unknown-pragmas) \
             $(if $(WERROR),-Werror all-warnings) $(PCRE2)
CUDA_LIBS  = -L$(CUDA_LIB) -lcublasLt $(if $(filter /usr/%-linux-gnu,$(CUDA_LIB)),,-Xlinker -rpath=$(CUDA_LIB)) $(LDLIBS)
nvcc       = $(NVCC) $(NVCC_FLAGS) -MMD -MP -MF $@.d -MT $@ $(1) $< $(filter %.o,$^) -o $@ \
             $(if $(filter $(CUDNN_O),$^),$(CUDNN_L)) $(CUDA_LIBS)

PROGRAMS   = $(addprefix $(BUILD)/,train_gpt2 tokenize bigram diff)
TESTS      = $(patsubst dev/test/%.c,$(BUILD)/test/%,$(wildcard dev/test/test_*.c))
GPU_HERE   = $(or $(wildcard /dev/nvidia[0-9]*),$(GPU_ARCH))
LADDERS    = $(patsubst dev/cuda/%.cu,$(BUILD)/cuda/%,$(wildcard dev/cuda/*.cu))
for_gpu    = $(if $(GPU_HERE),$(if $(CUDA),$(1),need-cuda))
GPU_TESTS  = $(filter-out $(BUILD)/gpu/fp32/test_cudnn% $(if $(USE_CUDNN),,%/test_cudnn_attention), \
             $(foreach p,bf16 fp32,$(patsubst dev/test/gpu/%.cu,$(BUILD)/gpu/$(p)/%,$(wildcard dev/test/gpu/test_*.cu)))) \
             $(if $(HOPPER),$(BUILD)/gpu/bf16/test_attention_portable)
RACECHECK  = $(addsuffix _racecheck,$(addprefix $(BUILD)/gpu/bf16/test_,attention matmul))

# Idle OpenMP threads sleep: spinning, they slow a step down several times where others are at work.
diff test test-mpi test-mutations test-emulated bench-cpu: export OMP_WAIT_POLICY ?= passive

.PHONY: all cpu train_gpt2cu cuda no-cuda need-cuda quickstart test test-asan test-mutations \
        test-mpi gpu-tests test-gpu test-emulated sanitize ladders ladder diff bench bench-cpu doctor readme format clean
all: cpu $(if $(CUDA),train_gpt2cu,no-cuda)

# The programs that need no GPU; the CUDA trainer of PRECISION.
cpu: $(PROGRAMS)
train_gpt2cu: $(if $(CUDA),$(BUILD)/train_gpt2cu$(FP32),need-cuda)
# All CUDA code: the trainer in both precisions, tests, benchmark, ladders.
cuda: $(if $(CUDA),$(addprefix $(BUILD)/,train_gpt2cu train_gpt2cu_fp32 bench/bench_gpu) $(GPU_TESTS) $(LADDERS),need-cuda)
no-cuda:
	@echo "$(CUDA_MISSING): built for the CPU only"
need-cuda:
	@echo "$(CUDA_MISSING)" >&2; exit 1

# Everything built depends on one of these, which change only when compiler or flags do.
STAMP = @mkdir -p $(BUILD)/test $(BUILD)/bench $(BUILD)/cuda $(BUILD)/gpu/bf16 $(BUILD)/gpu/fp32; \
        echo '$(1)' | cmp -s - $@ || echo '$(1)' > $@
$(BUILD)/flags: FORCE
	$(call STAMP,$(CC) $(ALL_CFLAGS) $(BLAS) $(MPI) $(LDLIBS))
$(BUILD)/flags.cuda: FORCE
	$(call STAMP,$(NVCC) $(NVCC_FLAGS) $(CUDA_LIBS) $(CUDNN) $(FRONTEND) $(NCCL))
FORCE:

$(BUILD)/train_gpt2: train_gpt2.c $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) $(MPI) $< -o $@ $(LDLIBS) $(MPI_L)

$(BUILD)/train_gpt2cu: train_gpt2.cu $(CUDNN_O) $(BUILD)/flags.cuda
	$(call nvcc,$(CUDNN_O:%.o=-DUSE_CUDNN) $(NCCL_F)) $(NCCL_L)

$(BUILD)/train_gpt2cu_fp32: train_gpt2.cu $(BUILD)/flags.cuda
	$(call nvcc,-DPRECISION_FP32 $(NCCL_F)) $(NCCL_L)

$(BUILD)/diff: dev/diff/diff.c $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) $< -o $@ $(LDLIBS)

$(BUILD)/%: dev/data/%.c $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) $< -o $@ $(LDLIBS)

$(BUILD)/test/%: dev/test/%.c $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) -DIO_FAULTS $< -o $@ $(LDLIBS)

# The trainer with faults to inject into its file access.
$(BUILD)/test/train_gpt2: train_gpt2.c $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) $(MPI) -DIO_FAULTS $< -o $@ $(LDLIBS) $(MPI_L)

$(BUILD)/bench/%: dev/bench/%.c $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) $(BLAS) $< -o $@ $(BLAS_L) $(LDLIBS)

# A GPU test: the kernels beside the functions of train_gpt2.c.
$(BUILD)/gpu/twin.o: dev/test/gpu/twin.c $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) -c $< -o $@

$(BUILD)/gpu/bf16/%: dev/test/gpu/%.cu $(BUILD)/gpu/twin.o $(BUILD)/flags.cuda
	$(call nvcc)

$(BUILD)/gpu/fp32/%: dev/test/gpu/%.cu $(BUILD)/gpu/twin.o $(BUILD)/flags.cuda
	$(call nvcc,-DPRECISION_FP32)

# For compute-sanitizer's racecheck: see ARRIVALS in llmc/tile_sm90.cuh.
$(BUILD)/gpu/bf16/%_racecheck: dev/test/gpu/%.cu $(BUILD)/gpu/twin.o $(BUILD)/flags.cuda
	$(call nvcc,-DRACECHECK)

# The portable attention on a Hopper GPU.
$(BUILD)/gpu/bf16/test_attention_portable: dev/test/gpu/test_attention.cu $(BUILD)/gpu/twin.o $(BUILD)/flags.cuda
	$(call nvcc,-UHOPPER)

$(BUILD)/cuda/%: dev/cuda/%.cu $(BUILD)/gpu/twin.o $(BUILD)/flags.cuda
	$(call nvcc)

$(BUILD)/bench/bench_gpu: dev/bench/bench_gpu.cu $(CUDNN_O) $(BUILD)/flags.cuda
	$(call nvcc,$(CUDNN_O:%.o=-DUSE_CUDNN))

$(BUILD)/gpu/bf16/test_cudnn_attention: $(CUDNN_O)
$(BUILD)/cudnn_attention.o: llmc/cudnn_attention.cpp $(BUILD)/flags.cuda
	$(CXX) -std=c++20 -O1 -Wall -Wextra $(if $(WERROR),-Werror) -I. -DCUDNN_FRONTEND_SKIP_JSON_LIB -MMD -MP -c $< -o $@ \
	    $(addprefix -isystem ,$(filter-out /usr/include,$(word 1,$(CUDNN)) $(word 1,$(FRONTEND)) $(CUDA_DIR)/include))

-include $(wildcard $(BUILD)/*.d $(BUILD)/test/*.d $(BUILD)/bench/*.d $(BUILD)/cuda/*.d $(BUILD)/gpu/*.d $(BUILD)/gpu/*/*.d)

# Text of this repository -> byte shards -> a small model, its loss beside a bigram model's, a sample.
quickstart: cpu
	@scripts/quickstart.sh $(BUILD)

# Every test that needs no GPU; the last line is "N passed, N failed".
test: cpu $(TESTS) $(BUILD)/test/train_gpt2
	@BUILD=$(BUILD) dev/test/run.sh $(TESTS)

# Ranks under mpirun, on CPUs: 1, 2, 4 and 8 train the same.
test-mpi: cpu
	@BUILD=$(BUILD) dev/test/mpi.sh

# The same tests, but the compilers', under AddressSanitizer and UndefinedBehaviorSanitizer.
test-asan:
	@$(MAKE) test BUILD=$(BUILD)/asan CFLAGS="-O1 -g -march=native" EXTRA="-fsanitize=address,undefined -fno-sanitize-recover=all" \
	    TESTS="$(patsubst $(BUILD)/%,$(BUILD)/asan/%,$(filter-out %/test_headers,$(TESTS)))"

# Single errors, put into the trainer one at a time: the comparison with the oracle must see each.
test-mutations: $(BUILD)/test/mutate
	@CC="$(CC)" BUILD=$(BUILD) $(BUILD)/test/mutate dev/test/mutations.txt "$(ALL_CFLAGS)" "$(LDLIBS)"

# The tests that need a GPU, built; and run, both precisions, where there is one. GRID=small: a few
# small shapes of each.
gpu-tests: $(if $(CUDA),$(GPU_TESTS),need-cuda)
test-gpu: $(call for_gpu,$(GPU_TESTS))
	@dev/test/gpu/run.sh $(call for_gpu,$(GPU_TESTS))

# The same, small, on this machine's CPU (dev/emulate/emulate.h), and the CUDA trainer's against the
# CPU's. Needs CUDA's headers and g++, no GPU.
test-emulated: cpu
	@$(MAKE) -f dev/emulate/Makefile BUILD=$(BUILD) CUDA=$(CUDA_DIR) test

# The same, small, under compute-sanitizer: memcheck, racecheck, initcheck, synccheck; and the ladders.
sanitize: $(call for_gpu,$(GPU_TESTS) $(LADDERS) $(RACECHECK))
	@BUILD=$(BUILD) dev/test/gpu/run.sh --sanitize $(call for_gpu,$(filter-out %_cudnn_attention,$(GPU_TESTS)) $(LADDERS))

# The ladders, one operation from a naive kernel to llmc/'s, built; and one, OP=rmsnorm, checked and
# timed rung by rung, or all. ONLY=check: not timed.
ladders: $(if $(CUDA),$(LADDERS),need-cuda)
OP ?= $(notdir $(LADDERS))
ladder: $(call for_gpu,$(OP:%=$(BUILD)/cuda/%))
	@$(if $(GPU_HERE),set -e; for op in $(OP); do echo "== $$op"; $(BUILD)/cuda/$$op $(ONLY); done,dev/test/gpu/run.sh)

# Two trainers on the same seed and data: losses, then logits, gradients and updated parameters, worst
# first. A, B: programs, folders of runs or dumps; DIFF: flags of build/diff, after -- the trainers'.
A ?= $(BUILD)/train_gpt2
B ?= $(BUILD)/$(if $(and $(CUDA),$(GPU_HERE)),train_gpt2cu_fp32,train_gpt2)
diff: cpu $(filter $(BUILD)/train_gpt2cu%,$(A) $(B))
	@$(if $(filter $(A),$(B)),echo "a trainer against itself: not a bit may differ")
	@$(BUILD)/diff $(A) $(B) $(DIFF)

# Every operation of a step on the GPU: us, GB/s or TFLOP/s, % of the ceiling, share of the step.
bench: $(call for_gpu,$(BUILD)/bench/bench_gpu)
	@$(if $(GPU_HERE),$<,dev/test/gpu/run.sh)

# Matmul beside OpenBLAS, tokens a second, memory, packing.
bench-cpu: cpu $(BUILD)/bench/bench_matmul $(BUILD)/bench/bench_packing
	@BUILD=$(BUILD) dev/bench/bench_cpu.sh

# What was found on this machine, and what is left out without it.
doctor:
	@echo "compiler    $$($(CC) --version | head -n 1)"
	@echo "OpenMP      $(if $(OPENMP),found,not found: one thread)"
	@echo "PCRE2       $(if $(PCRE2),found,not found: no GPT-2 encoding (byte tokens work); install libpcre2-dev)"
	@echo "MPI         $(if $(MPI),found,not found: one rank on CPUs; install libopenmpi-dev and openmpi-bin)"
	@echo "OpenBLAS    $(if $(BLAS),found,not found: make bench-cpu compares with nothing; install libopenblas-dev)"
	@echo "CUDA        $(if $(CUDA),$$($(NVCC) --version | sed -n 's/.*release \([^ ,]*\),.*/\1/p') in $(CUDA_DIR),$(CUDA_MISSING): no CUDA trainer)"
	@$(if $(CUDA),,#)echo "GPU         $(if $(GPU_ARCH),$$(nvidia-smi --query-gpu=name --format=csv,noheader | sort | uniq -c | xargs),none here; ARCH= names the one to build for): code for sm_$(subst $(comma), sm_,$(ARCH))"
	@$(if $(CUDA),,#)echo "attention   $(if $(HOPPER),llmc/attention_sm90.cuh: wgmma,llmc/attention.cuh: mma.sync$(if $(findstring 90a,$(ARCH)),; ARCH=90a alone takes Hopper's))"
	@$(FIND) cudnn          | awk '{ print "cuDNN       " $$3 " at " $$2; found = 1 } END { if (!found) print "cuDNN       not found: no USE_CUDNN=1; set CUDNN_HOME" }'
	@$(FIND) cudnn-frontend | awk '{ print "  frontend  " $$3 " at " $$1; found = 1 } END { if (!found) print "  frontend  not found: no USE_CUDNN=1; install the wheel nvidia-cudnn-frontend or set CUDNN_FRONTEND_PATH" }'
	@$(FIND) nccl           | awk '{ print "NCCL        " $$3 " at " $$2 }' | grep . || echo "NCCL        not found: one GPU; install libnccl-dev, or set NCCL_HOME"

# README.md's list of flags, from the table.
readme: $(BUILD)/train_gpt2
	@BUILD=$(BUILD) dev/readme.sh

# Source in the style of .clang-format.
format:
	clang-format -i *.c *.cu llmc/*.[ch]* dev/*/*.[ch]* dev/*/*/*.[ch]*

# Removes all that was built.
clean:
	rm -rf $(BUILD)
