/* X, W -> X @ W.T. Products with integer weights on an x86 CPU, and what stands around them.

   Compiled once with AVX-512 VNNI and once with AVX2 (native_build.py); `multiply_cpu.py` calls it.
   Twin: reference.multiply_packed. A row of x is rounded to integers of 8 bits, with a scale for
   each group of inputs, so that the sums of a group are exact; a row's result therefore does not
   depend on the rows beside it, nor on the number of threads.

   Weights are unsigned, u = (w / scale) + zero, and come in blocks of 32 outputs. A block holds,
   input after input, four consecutive inputs of each of its outputs (8 bits: 128 bytes); of 4 bits
   the low halves are one such step of four inputs and the high halves the next. */

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "floats_cpu.h"
#include "native_cpu.h"

#define BLOCK 32
#define PIECE 256 /* rows whose integers stay in a core's cache */

#ifdef __AVX512VNNI__
#define LANES 16
#define MOST 8 /* rows of a tile: 16 sums of 16 lanes, half of the registers */
typedef __m512i Ints;
typedef __m512 Floats;
#define LOAD(p) _mm512_loadu_si512(p)
#define LOADF(p) _mm512_loadu_ps(p)
#define STOREF(p, v) _mm512_storeu_ps(p, v)
#define BROADCAST(i) _mm512_set1_epi32(i)
#define BROADCASTF(f) _mm512_set1_ps(f)
#define LOW(w) _mm512_and_si512(w, _mm512_set1_epi8(15))
#define HIGH(w) LOW(_mm512_srli_epi16(w, 4))
#define ADD(a, b) _mm512_add_epi32(a, b)
#define TIMES(a, b) _mm512_mullo_epi32(a, b)
#define BYTES_TO_INTS(p) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define FUSED(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MULTIPLIED(a, b) _mm512_mul_ps(a, b)
#define TO_FLOATS(a) _mm512_cvtepi32_ps(a)
static inline Ints dot8(Ints sum, Ints w, Ints x)
{
    /* As _mm512_dpbusd_epi32, of which gcc 12 copies every sum twice a loop. */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}
#define dot4 dot8
#else
#define LANES 8
#define MOST 2
typedef __m256i Ints;
typedef __m256 Floats;
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOADF(p) _mm256_loadu_ps(p)
#define STOREF(p, v) _mm256_storeu_ps(p, v)
#define BROADCAST(i) _mm256_set1_epi32(i)
#define BROADCASTF(f) _mm256_set1_ps(f)
#define LOW(w) _mm256_and_si256(w, _mm256_set1_epi8(15))
#define HIGH(w) LOW(_mm256_srli_epi16(w, 4))
#define ADD(a, b) _mm256_add_epi32(a, b)
#define TIMES(a, b) _mm256_mullo_epi32(a, b)
#define BYTES_TO_INTS(p) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p)))
#define FUSED(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MULTIPLIED(a, b) _mm256_mul_ps(a, b)
#define TO_FLOATS(a) _mm256_cvtepi32_ps(a)
static inline Ints dot4(Ints sum, Ints w, Ints x)
{
    const __m256i pairs = _mm256_maddubs_epi16(w, x); /* at most 15 * 127 * 2: no saturation */
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline Ints dot8(Ints sum, Ints w, Ints x)
{
    /* 255 * 127 * 2 would saturate, so each half of the weight's bits is multiplied by itself. */
    const __m256i high = _mm256_maddubs_epi16(HIGH(w), x);
    return _mm256_add_epi32(dot4(sum, LOW(w), x), _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
}
#endif
#define VECTORS (BLOCK / LANES)

static inline __attribute__((always_inline)) Ints four(const int8_t *from)
{
    int32_t word;
    memcpy(&word, from, 4);
    return BROADCAST(word);
}

/* A row of x as floats, normalized if so wished and rounded as reference.rms_norm rounds. */
static void read_row(const Product *p, const void *x, int bf16, int64_t row, float *out)
{
    const int n = p->inputs;
    if (bf16) {
        const uint16_t *from = (const uint16_t *)x + row * n;
        for (int i = 0; i < n; i++) out[i] = widen(from[i]);
    } else {
        memcpy(out, (const float *)x + row * n, (size_t)n * 4);
    }
    if (p->norm_kind == NO_NORM) return;
    float part[16] = {0};
    for (int i = 0; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) part[j] += out[i + j] * out[i + j];
    for (int i = n / 16 * 16; i < n; i++) part[0] += out[i] * out[i];
    const float scale = 1.0f / sqrtf(sum16(part) / (float)n + p->eps);
    if (p->norm_kind == NORM_ROUNDED)
        for (int i = 0; i < n; i++)
            out[i] = rounded(rounded(out[i] * scale, bf16) * p->norm[i], bf16);
    else
        for (int i = 0; i < n; i++) out[i] = rounded(out[i] * scale * p->norm[i], bf16);
}

/* How many integers stand for a number of x. Weights of 8 bits are worth two: x to 15 bits costs a
   row little time, for that passes in reading weights, and what is lost is the weights' alone. */
static inline int terms(const Product *p) { return p->bits == 8 ? 2 : 1; }

/* A row as integers of 8 bits: what to multiply each group by, and minus the sum of each group. The
   second term, 254 times what rounding left, is a row of its own behind. What is not finite makes
   its group's scale NaN, and so every output. */
static void round_row(const Product *p, const float *x, int8_t *q, float *scale, int32_t *minus_sum)
{
    const int size = p->group, groups = p->inputs / size, two = terms(p) == 2;
    int8_t *const rests = q + p->inputs; /* of the second term */
    for (int g = 0; g < groups; g++, x += size) {
        float most[8] = {0};
        int bad[8] = {0}, sum[8] = {0}, rest_sum[8] = {0};
        for (int i = 0; i < size; i += 8)
            for (int j = 0; j < 8; j++) {
                const float a = fabsf(x[i + j]);
                most[j] = a > most[j] ? a : most[j];
                bad[j] |= !(a <= FLT_MAX);
            }
        float largest = 0;
        int broken = 0;
        for (int j = 0; j < 8; j++) {
            largest = most[j] > largest ? most[j] : largest;
            broken |= bad[j];
        }
        const float inverse = broken || largest < 1e-30f ? 0.0f : 127.0f / largest;
        for (int i = 0; i < size; i += 8)
            for (int j = 0; j < 8; j++) {
                const float exact = broken ? 0.0f : x[i + j] * inverse, step = rintf(exact);
                q[g * size + i + j] = (int8_t)(int32_t)step;
                sum[j] -= (int32_t)step;
                if (two) {
                    const int32_t rest = (int32_t)rintf((exact - step) * 254.0f);
                    rests[g * size + i + j] = (int8_t)rest;
                    rest_sum[j] -= rest;
                }
            }
        scale[g] = broken ? NAN : largest / 127.0f;
        minus_sum[g] = 0;
        for (int j = 0; j < 8; j++) minus_sum[g] += sum[j];
        if (two) {
            scale[groups + g] = scale[g] / 254.0f;
            minus_sum[groups + g] = 0;
            for (int j = 0; j < 8; j++) minus_sum[groups + g] += rest_sum[j];
        }
    }
}

typedef struct {
    int8_t *q;          /* [rows * terms, inputs] */
    float *scale;       /* [rows * terms, groups] */
    int32_t *minus_sum; /* [rows * terms, groups] */
} Rows;

/* One row of x as the tiles read it; `wide` is room for it as floats. */
static void one_row(const Product *p, const void *x, int bf16, int64_t row, float *wide, Rows q)
{
    const int64_t groups = p->inputs / p->group;
    read_row(p, x, bf16, row, wide);
    row *= terms(p);
    round_row(p, wide, q.q + row * p->inputs, q.scale + row * groups, q.minus_sum + row * groups);
}

/* A block's sums for `m` rows; the compiler knows `bits` and `m`. */
static inline __attribute__((always_inline)) void tile(
    const Product *p, const int bits, const int m, int64_t block, Rows x, int64_t first,
    float sums[][BLOCK])
{
    const int size = p->group, groups = p->inputs / size;
    const int chains = m <= 2 ? 2 : 1; /* few sums: every other step has its own, to hide latency */
    const uint8_t *w = p->weight + block * p->inputs * BLOCK * bits / 8;
    Floats total[MOST][VECTORS];
    for (int r = 0; r < m; r++)
        for (int v = 0; v < VECTORS; v++) total[r][v] = BROADCASTF(0.0f);
    for (int g = 0; g < groups; g++) {
        Ints sum[2][MOST][VECTORS];
        const int64_t place = (block * groups + g) * BLOCK;
        for (int r = 0; r < m; r++) {
            const int32_t minus = x.minus_sum[(first + r) * groups + g];
            for (int v = 0; v < VECTORS; v++) {
                sum[0][r][v] = p->zero
                    ? TIMES(BYTES_TO_INTS(p->zero + place + v * LANES), BROADCAST(minus))
                    : BROADCAST(minus * (1 << (bits - 1)));
                sum[1][r][v] = BROADCAST(0);
            }
        }
        const int8_t *q = x.q + first * p->inputs + g * size;
        for (int k = 0; k < size; k += 8, w += BLOCK * bits) {
            Ints steps[2][VECTORS];
            for (int v = 0; v < VECTORS; v++) {
                const Ints read = LOAD(w + v * LANES * 4);
                steps[0][v] = bits == 4 ? LOW(read) : read;
                steps[1][v] = bits == 4 ? HIGH(read) : LOAD(w + (BLOCK + v * LANES) * 4);
            }
            for (int s = 0; s < 2; s++)
                for (int r = 0; r < m; r++) {
                    const Ints inputs = four(q + (int64_t)r * p->inputs + k + 4 * s);
                    for (int v = 0; v < VECTORS; v++) {
                        Ints *const at = &sum[s % chains][r][v];
                        *at = bits == 4 ? dot4(*at, steps[s][v], inputs)
                                        : dot8(*at, steps[s][v], inputs);
                    }
                }
        }
        for (int r = 0; r < m; r++)
            for (int v = 0; v < VECTORS; v++) {
                const Floats by = MULTIPLIED(LOADF(p->scale + place + v * LANES),
                                             BROADCASTF(x.scale[(first + r) * groups + g]));
                const Ints all = chains == 2 ? ADD(sum[0][r][v], sum[1][r][v]) : sum[0][r][v];
                total[r][v] = FUSED(TO_FLOATS(all), by, total[r][v]);
            }
    }
    for (int r = 0; r < m; r++)
        for (int v = 0; v < VECTORS; v++) STOREF(sums[r] + v * LANES, total[r][v]);
}

/* What follows the product of one row and block: bias, SwiGLU, residual, rounded as the plain
   operations round. */
static void finish(const Product *p, int64_t block, int64_t row, float *sums, const void *residual,
                   void *y, int bf16)
{
    const int width = p->gated ? BLOCK / 2 : BLOCK;
    const int64_t first = block * width, at = row * p->outputs + first;
    const int count = p->outputs - first < width ? (int)(p->outputs - first) : width;
    if (p->bias)
        for (int i = 0; i < BLOCK; i++) sums[i] += p->bias[block * BLOCK + i];
    for (int i = 0; i < BLOCK; i++) sums[i] = rounded(sums[i], bf16);
    if (p->gated)
        for (int i = 0; i < BLOCK / 2; i++) {
            const float silu = sums[i] / (1.0f + exponential(-sums[i]));
            sums[i] = rounded(rounded(silu, bf16) * sums[i + BLOCK / 2], bf16);
        }
    if (bf16) {
        const uint16_t *add = (const uint16_t *)residual;
        uint16_t *out = (uint16_t *)y + at;
        if (add)
            for (int i = 0; i < count; i++) out[i] = narrow(sums[i] + widen(add[at + i]));
        else
            for (int i = 0; i < count; i++) out[i] = narrow(sums[i]);
    } else {
        const float *add = (const float *)residual;
        float *out = (float *)y + at;
        if (add)
            for (int i = 0; i < count; i++) out[i] = sums[i] + add[at + i];
        else
            for (int i = 0; i < count; i++) out[i] = sums[i];
    }
}

static void some_rows(const Product *p, int m, int64_t block, Rows x, int64_t first,
                      float sums[][BLOCK])
{
#define TILE(m) \
    (p->bits == 4 ? tile(p, 4, m, block, x, first, sums) : tile(p, 8, m, block, x, first, sums))
    if (m == 1) TILE(1);
    else if (m == 2) TILE(2);
#if MOST == 8
    else if (m == 4) TILE(4);
    else TILE(8);
#endif
}

/* y [rows, outputs] = x [rows, inputs] @ w.T and what `p` says; x, residual (or null) and y are
   bf16 or float. Returns 0, or 1 where memory ran out. */
int multiply(const Product *p, const void *x, const void *residual, void *y, int64_t rows, int bf16,
             int threads)
{
    const int64_t n = p->inputs, groups = n / p->group, width = p->gated ? BLOCK / 2 : BLOCK;
    const int64_t blocks = (p->outputs + width - 1) / width;
    const int64_t pieces = (rows + PIECE - 1) / PIECE, times = terms(p), count = rows * times;
    const size_t bytes = (size_t)(count * (n + 8 * groups) + 4 * n * threads);
    float *const wide = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!wide) return 1;
    const Rows q = {
        .scale = wide + n * threads,
        .minus_sum = (int32_t *)(wide + n * threads + count * groups),
        .q = (int8_t *)(wide + n * threads + 2 * count * groups),
    };
    const int chunk = (int)(blocks * pieces / (threads * 8)) + 1;
    if (rows == 1) one_row(p, x, bf16, 0, wide, q); /* sooner done than shared */
#pragma omp parallel num_threads(threads)
    {
        if (rows > 1) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++)
                one_row(p, x, bf16, row, wide + n * omp_get_thread_num(), q);
        }
#pragma omp for schedule(dynamic, chunk) nowait
        for (int64_t task = 0; task < blocks * pieces; task++) {
            const int64_t block = task % blocks, start = task / blocks * PIECE;
            const int64_t end = start + PIECE < rows ? start + PIECE : rows;
            for (int64_t first = start, m; first < end; first += m) {
                float sums[MOST][BLOCK];
                for (m = MOST / times; m > end - first; m /= 2) {}
                some_rows(p, (int)(m * times), block, q, first * times, sums);
                for (int r = 0; r < m; r++) {
                    float *const own = sums[r * times], *const rest = sums[(r + 1) * times - 1];
                    if (times == 2)
                        for (int i = 0; i < BLOCK; i++) own[i] += rest[i];
                    finish(p, block, first + r, own, residual, y, bf16);
                }
            }
        }
    }
    free(wide);
    return 0;
}
