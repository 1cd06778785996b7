// twin.c: the operations of train_gpt2.c for the GPU tests: the very same functions, compiled by
// the C compiler without their `static`, so that a test links to them. twin.h declares them.
#include <assert.h>
#include <math.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "llmc/checkpoint.h"
#include "llmc/dataloader.h"
#include "llmc/describe.h"
#include "llmc/die.h"
#include "llmc/flags.h"
#include "llmc/logger.h"
#include "llmc/model.h"
#include "llmc/sampler.h"
#include "llmc/schedule.h"
#include "llmc/sketch.h"
#include "llmc/tokenizer.h"

#include "dev/test/gpu/twin.h"  // the compiler holds declarations and definitions together

#define static
#define inline
#define main train_gpt2_main
#include "train_gpt2.c"  // and llmc/matmul.h
