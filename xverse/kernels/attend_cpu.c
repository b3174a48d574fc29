/* Q, K, V -> MIXED V. Rope, and attention of decoding sequences over their pages, on a CPU.

   Called by attend_cpu.py. What a row gives depends on its own sequence alone. */

#include <omp.h>
#include <stdlib.h>

#include "floats_cpu.h"
#include "native_cpu.h"

#define LANES 16

static inline void put(void *x, int64_t i, float value, int bf16)
{
    if (bf16) ((uint16_t *)x)[i] = narrow(value);
    else ((float *)x)[i] = value;
}

static inline __attribute__((always_inline)) void turn(
    void *x, const void *cosines, const void *sines, int64_t size, const int bf16)
{
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = at(x, i, bf16), b = at(x, i + half, bf16);
        const float first = rounded(a * at(cosines, i, bf16), bf16);
        const float second = rounded(b * at(cosines, i + half, bf16), bf16);
        put(x, i, first + rounded(-b * at(sines, i, bf16), bf16), bf16);
        put(x, i + half, second + rounded(a * at(sines, i + half, bf16), bf16), bf16);
    }
}

/* Rotary embedding of the first `heads` of each row's heads, in place: x [rows, stride] holds them
   side by side, cosines and sines are [rows, size]. Twin: reference.rotate. */
void rotate(void *x, const void *cosines, const void *sines, int64_t rows, int64_t stride,
            int heads, int64_t size, int bf16, int threads)
{
    const int bytes = bf16 ? 2 : 4;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 8)
    for (int64_t row = 0; row < rows; row++)
        for (int head = 0; head < heads; head++) {
            char *const own = (char *)x + (row * stride + head * size) * bytes;
            const char *const c = (const char *)cosines + row * size * bytes;
            const char *const s = (const char *)sines + row * size * bytes;
            if (bf16) turn(own, c, s, size, 1);
            else turn(own, c, s, size, 0);
        }
}

static inline __attribute__((always_inline)) float product(
    const float *q, const void *k, int64_t size, const int bf16)
{
    float part[LANES] = {0}, rest = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int j = 0; j < LANES; j++) part[j] += q[i + j] * at(k, i + j, bf16);
    for (; i < size; i++) rest += q[i] * at(k, i, bf16);
    return sum16(part) + rest;
}

/* One query head of one row: softmax(q k / sqrt(size)) v; q and sum have `size` floats of room. */
static inline __attribute__((always_inline)) void attend_head(
    const Pages *p, int64_t row, int head, const void *query, void *out, float *q, float *sum,
    float *weights, const int bf16)
{
    const int64_t seen = p->lengths[row], size = p->size, bytes = bf16 ? 2 : 4;
    const int kv_head = head / (p->heads / p->kv_heads);
    const float scale = 1.0f / sqrtf((float)size);
    for (int64_t i = 0; i < size; i++) q[i] = at(query, i, bf16) * scale;
    float largest = -INFINITY;
    for (int64_t token = 0; token < seen; token++) {
        const int64_t place = p->tables[row * p->width + token / p->page] * p->kv_heads + kv_head;
        const int64_t start = (place * p->page + token % p->page) * size;
        weights[token] = product(q, (const char *)p->keys + start * bytes, size, bf16);
        largest = fmaxf(largest, weights[token]);
    }
    float total = 0;
    for (int64_t token = 0; token < seen; token++) {
        /* What is not a number is kept one: exponential() would bound it. */
        const float apart = weights[token] - largest;
        weights[token] = apart == apart ? exponential(apart) : NAN;
    }
    for (int64_t token = 0; token < seen; token++) total += weights[token];
    for (int64_t i = 0; i < size; i++) sum[i] = 0;
    for (int64_t token = 0; token < seen; token++) {
        const int64_t place = p->tables[row * p->width + token / p->page] * p->kv_heads + kv_head;
        const int64_t start = (place * p->page + token % p->page) * size;
        const char *const v = (const char *)p->values + start * bytes;
        for (int64_t i = 0; i < size; i++) sum[i] += weights[token] * at(v, i, bf16);
    }
    for (int64_t i = 0; i < size; i++) put(out, i, sum[i] / total, bf16);
}

/* Keep the rows' keys and values in their pages, then attend. Rows of q are `q_stride` elements
   apart, and so on; out is [rows, heads, size]. Returns 1 where memory ran out. */
int attend(const Pages *p, const void *q, const void *k, const void *v, void *out, int64_t rows,
           int64_t q_stride, int64_t k_stride, int64_t v_stride, int bf16, int threads)
{
    const int64_t size = p->size, bytes = bf16 ? 2 : 4;
    int64_t most = 0;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t last = p->lengths[row] - 1; /* where the row itself goes */
        const int64_t page = p->tables[row * p->width + last / p->page];
        most = last >= most ? last + 1 : most;
        for (int head = 0; head < p->kv_heads; head++) {
            const int64_t to = ((page * p->kv_heads + head) * p->page + last % p->page) * size;
            const char *const key = (const char *)k + (row * k_stride + head * size) * bytes;
            const char *const value = (const char *)v + (row * v_stride + head * size) * bytes;
            memcpy((char *)p->keys + to * bytes, key, size * bytes);
            memcpy((char *)p->values + to * bytes, value, size * bytes);
        }
    }
    float *const memory = malloc((size_t)threads * (2 * size + most) * sizeof(float));
    if (!memory) return 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (rows * most * p->heads > 512)
    for (int64_t task = 0; task < rows * p->heads; task++) {
        const int64_t row = task / p->heads, head = task % p->heads;
        float *const own = memory + omp_get_thread_num() * (2 * size + most);
        const char *const query = (const char *)q + (row * q_stride + head * size) * bytes;
        char *const to = (char *)out + task * size * bytes;
        if (bf16) attend_head(p, row, (int)head, query, to, own, own + size, own + 2 * size, 1);
        else attend_head(p, row, (int)head, query, to, own, own + size, own + 2 * size, 0);
    }
    free(memory);
    return 0;
}
