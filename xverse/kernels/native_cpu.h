/* What is told to the functions for CPUs; native.py has the same structures. */

#ifndef XVERSE_NATIVE
#define XVERSE_NATIVE

#include <stdint.h>

enum { NO_NORM, NORM_IN_FP32, NORM_ROUNDED };

typedef struct {
    const uint8_t *weight; /* [blocks][inputs * bits / 8][32] */
    const float *scale;    /* [blocks][groups][32] */
    const uint8_t *zero;   /* [blocks][groups][32]; null: 2^(bits-1) everywhere */
    const float *bias;     /* [blocks][32] or null */
    const float *norm;     /* [inputs] or null: RMSNorm of x first */
    float eps;
    int32_t norm_kind;
    int32_t outputs; /* as they come out: half of the weight's if gated */
    int32_t inputs, group, bits;
    int32_t gated; /* a block is 16 gates and their 16 ups: silu(gate) * up */
} Product;

typedef struct {
    void *keys, *values;     /* [pages, kv_heads, page, size] */
    const int64_t *tables;   /* [rows, width]: the pages of each row's sequence */
    const int64_t *lengths;  /* [rows]: tokens it holds by now, the row's own the last */
    int64_t width, page, size;
    int32_t heads, kv_heads;
} Pages;

typedef struct {
    Product qkv, o, gate_up, down;
    void *keys, *values;
} Layer;

typedef struct {
    void *weight, *first, *second;
    const void *gradient;
    uint16_t *copy; /* or null */
    float scale, share1, keep2, share2, bias2, epsilon, keep, step_size;
    uint32_t seeds[3]; /* of the rounding of weight and moments, where they are in bf16 */
    int32_t weight16, gradient16, moments16; /* whether they are */
} Update;

int multiply(const Product *p, const void *x, const void *residual, void *y, int64_t rows, int bf16,
             int threads);
void rotate(void *x, const void *cosines, const void *sines, int64_t rows, int64_t stride,
            int heads, int64_t size, int bf16, int threads);
int attend(const Pages *p, const void *q, const void *k, const void *v, void *out, int64_t rows,
           int64_t q_stride, int64_t k_stride, int64_t v_stride, int bf16, int threads);

#endif
