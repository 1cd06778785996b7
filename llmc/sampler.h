// sampler.h: draws the next token from a row of logits, and prints what tokens spell.
//
//     p_v proportional to exp(z_v / temperature) over the top_k largest logits (0: over all)
//
// temperature 0 takes the largest logit. The random number comes from the caller, so a sample is a
// pure function of (seed, number of the sample, position).
#ifndef LLMC_SAMPLER_H
#define LLMC_SAMPLER_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "llmc/die.h"        // die_alloc
#include "llmc/tokenizer.h"  // tokenizer_utf8

static inline int sampler_descending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

// The k-th largest of V logits, 1 <= k <= V.
static inline float sampler_threshold(const float *logits, int V, int k) {
    float *sorted = (float *)die_alloc((size_t)V, sizeof *sorted, "a sample's logits");
    for (int v = 0; v < V; v++) sorted[v] = logits[v];
    qsort(sorted, (size_t)V, sizeof *sorted, sampler_descending);
    float threshold = sorted[k - 1];
    free(sorted);
    return threshold;
}

// Returns a token id in 0 .. V-1. u: uniform in [0, 1). Logits equal to the k-th largest all stay
// in.
static inline int sampler_pick(const float *logits,  // (V)
                               int V, double temperature, int top_k, double u) {
    int best = 0;
    for (int v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    if (temperature <= 0) return best;
    float threshold = top_k > 0 && top_k < V ? sampler_threshold(logits, V, top_k) : -INFINITY;
    double sum = 0;
    for (int v = 0; v < V; v++)
        if (logits[v] >= threshold) sum += exp((logits[v] - logits[best]) / temperature);
    double seen = 0;
    for (int v = 0; v < V; v++) {
        if (logits[v] < threshold) continue;
        seen += exp((logits[v] - logits[best]) / temperature);
        if (seen > u * sum) return v;
    }
    return best;
}

// Prints text, (n) bytes of anything, so that no terminal takes a part of it for a command: control
// characters but for newline and tab, and what is not UTF-8, as \xNN.
static inline void sampler_print(FILE *out, const uint8_t *s, size_t n) {
    for (size_t at = 0, size; at < n; at += size) {
        size = tokenizer_utf8(s + at, n - at);
        bool control = (s[at] < 0x20 && s[at] != '\n' && s[at] != '\t') || s[at] == 0x7F ||
                       (size == 2 && s[at] == 0xC2 && s[at + 1] < 0xA0);
        const char *format = control || !size ? "\\x%02X" : "%c";
        if (!size) size = 1;
        for (size_t i = at; i < at + size; i++) fprintf(out, format, s[i]);
    }
}

#endif
