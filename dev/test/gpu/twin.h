// twin.h: the operations of train_gpt2.c that GPU tests call: cpu::norm_forward(...) on host
// arrays. The formula and the shape of every argument stand at the definition in train_gpt2.c
// (matmul_*: llmc/matmul.h).
#ifndef DEV_TEST_GPU_TWIN_H
#define DEV_TEST_GPU_TWIN_H

#include <stdbool.h>
#include <stdint.h>

#include "llmc/schedule.h"  // GroupNumbers

#ifdef __cplusplus
namespace cpu {
extern "C" {
#endif

void adamw_update(float *p, float *m, float *v, const float *g, double grad_scale, GroupNumbers k,
                  double lr, int64_t t, size_t count);
void add_forward(float *y, const float *x, int64_t count);
void attention_backward(float *dqkv, const float *dout, const float *o, const float *lse,
                        const float *qkv, const int *doc_start, int W, int B, int T, int H, int D);
void attention_forward(float *o, float *lse, const float *qkv, const int *doc_start, int W, int B,
                       int T, int H, int D);
void backout_backward(float *dxb, float *dlambda, const float *dy, const float *xb, float lambda,
                      double *partial, int64_t n, int C);
void backout_forward(float *y, const float *x, const float *xb, float lambda, int64_t count);
void classifier_backward(float *logits, const double *losses, const int *targets, double scale,
                         int64_t rows, int V);
void classifier_forward(float *logits, double *losses, const int *targets, int64_t rows, int V);
void embed_backward(float *dtable, const float *dy, const int *idx, int64_t n, int C);
void embed_forward(float *y, const int *idx, const float *table, int64_t n, int C);
void find_documents(int *doc_start, const int *idx, int B, int T, int bos, bool doc_mask);
void matmul_dgrad(float *dx, const float *dy, const float *w, int64_t n, int64_t in, int64_t out);
void matmul_forward(float *y, const float *x, const float *w, int64_t n, int64_t in, int64_t out);
void matmul_wgrad(float *dw, const float *dy, const float *x, int64_t n, int64_t in, int64_t out);
void mix_backward(float *dx, float *dx0, float *dlambda, float *dlambda0, const float *dy,
                  const float *x, const float *x0, float lambda, float lambda0, double *partial,
                  int64_t n, int C);
void mix_forward(float *y, const float *x, const float *x0, float lambda, float lambda0,
                 int64_t count);
void norm_backward(float *dx, const float *dy, const float *y, const float *r, int64_t rows,
                   int width, bool add);
void norm_forward(float *y, float *r, const float *x, int64_t rows, int width);
void qk_backward(float *dqkv, const float *qkv, const float *r, const float *cosine,
                 const float *sine, int B, int T, int H, int D);
void qk_forward(float *qkv, float *r, const float *cosine, const float *sine, int B, int T, int H,
                int D);
void relu2_backward(float *dx, const float *dy, const float *x, int64_t count);
void relu2_forward(float *y, const float *x, int64_t count);
void rope_init(float *cosine, float *sine, int T, int D);
void smear_backward(float *dx, float *dgate, float *dlambda, const float *dy, const float *x,
                    const float *s, const float *gate, float lambda, double *g, int B, int T,
                    int C);
void smear_forward(float *y, float *s, const float *x, const float *gate, float lambda,
                   const int *doc_start, int B, int T, int C);
void softcap_forward(float *z, int count);
double sum_squares(const float *x, size_t count);
void value_embed_backward(float *dtable, float *dw, float *dx, const float *dv, const float *gate,
                          const float *x, const float *w, const float *table, const int *idx,
                          double *dz, int64_t n, int H, int D);
void value_embed_forward(float *v, float *gate, const float *x, const float *w, const float *table,
                         const int *idx, int64_t n, int H, int D);

#ifdef __cplusplus
typedef struct {
    float *x, *product;  // (R, K) each
    float *a, *a2;       // (side, side) each, side = min(R, K)
} MuonScratch;           // the C compiler knows it from train_gpt2.c
void muon_polar_express(MuonScratch *s, int R, int K);
void muon_update(float *w, float *momentum, float *second, const float *g, double grad_scale,
                 double mu, double beta2, double lr, double wd, int R, int K, MuonScratch *s);
#endif

#ifdef __cplusplus
}
}
#endif

#endif
