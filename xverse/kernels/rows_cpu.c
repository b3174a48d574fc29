/* X, W -> X @ W.T. Products of bf16 numbers on an x86 CPU that has no bf16 arithmetic.

   Compiled once with AVX-512 and once with AVX2 (compile_native.py); `multiply.py` calls it, and
   says where. Twin: `functional.linear`. A bf16 number is the upper half of a float: two of a pair
   are had by a shift and by a mask, and sums are of floats. A row's result does not depend on the
   rows beside it, nor on the number of threads. */

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "floats_cpu.h"
#include "native_cpu.h"

#define MOST_ROWS 4 /* of x in a tile */
#define PIECE 64    /* rows of x that stay in a core's cache while weights pass */
#define ALONE 65536 /* products up to which waking other threads takes longer */

#ifdef __AVX512F__
#define LANES 16
#define OUTPUTS 4 /* of a tile: 16 sums, half of the registers */
typedef __m512 Floats;
#define ZERO() _mm512_setzero_ps()
#define LOADF(p) _mm512_loadu_ps(p)
#define FUSED(a, b, c) _mm512_fmadd_ps(a, b, c)
#define TOTAL(v) _mm512_reduce_add_ps(v)
#define PAIRS __m512i
#define LOAD(p) _mm512_loadu_si512(p)
#define EVEN(w) _mm512_castsi512_ps(_mm512_slli_epi32(w, 16))
#define ODD(w) _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000)))
#else
#define LANES 8
#define OUTPUTS 2
typedef __m256 Floats;
#define ZERO() _mm256_setzero_ps()
#define LOADF(p) _mm256_loadu_ps(p)
#define FUSED(a, b, c) _mm256_fmadd_ps(a, b, c)
#define PAIRS __m256i
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define EVEN(w) _mm256_castsi256_ps(_mm256_slli_epi32(w, 16))
#define ODD(w) _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000)))
static inline float TOTAL(Floats v)
{
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#endif
#define STEP (2 * LANES) /* inputs that one vector of weights holds */

/* A row of x as floats, of every STEP the even ones first; filled up with zeros. */
static void spread(const uint16_t *x, int64_t inputs, float *out)
{
    for (int64_t start = 0; start < inputs; start += STEP, out += STEP)
        for (int i = 0; i < STEP; i++)
            out[i % 2 * LANES + i / 2] = start + i < inputs ? widen(x[start + i]) : 0.0f;
}

/* The products of `n` rows of w and `m` of x, which the compiler knows. `last` has what is left of
   the rows of w behind their whole steps, filled up with zeros. */
static inline __attribute__((always_inline)) void tile(
    const int n, const int m, const uint16_t *w, const uint16_t *last, const float *x,
    int64_t inputs, float sums[][MOST_ROWS])
{
    const int64_t whole = inputs / STEP, steps = (inputs + STEP - 1) / STEP;
    Floats sum[OUTPUTS][MOST_ROWS];
    for (int j = 0; j < n; j++)
        for (int r = 0; r < m; r++) sum[j][r] = ZERO();
    for (int64_t k = 0; k < steps; k++) {
        const float *const at = x + k * STEP;
        for (int j = 0; j < n; j++) {
            const PAIRS read = LOAD(k < whole ? w + j * inputs + k * STEP : last + j * STEP);
            const Floats even = EVEN(read), odd = ODD(read);
            for (int r = 0; r < m; r++) {
                sum[j][r] = FUSED(even, LOADF(at + r * steps * STEP), sum[j][r]);
                sum[j][r] = FUSED(odd, LOADF(at + r * steps * STEP + LANES), sum[j][r]);
            }
        }
    }
    for (int j = 0; j < n; j++)
        for (int r = 0; r < m; r++) sums[j][r] = TOTAL(sum[j][r]);
}

static void some(int n, int m, const uint16_t *w, const uint16_t *last, const float *x,
                 int64_t inputs, float sums[][MOST_ROWS])
{
#define TILE(m) \
    (n == OUTPUTS ? tile(OUTPUTS, m, w, last, x, inputs, sums) : tile(1, m, w, last, x, inputs, sums))
    if (m == 1) TILE(1);
    else if (m == 2) TILE(2);
    else if (m == 3) TILE(3);
    else TILE(4);
}

/* y [rows, outputs] = x [rows, inputs] @ w.T + bias (or null), all bf16. Returns 0, or 1 where
   memory ran out. */
int multiply_rows(const uint16_t *w, const uint16_t *x, const uint16_t *bias, uint16_t *y,
                  int64_t rows, int64_t outputs, int64_t inputs, int threads)
{
    const int64_t width = (inputs + STEP - 1) / STEP * STEP;
    const int64_t blocks = (outputs + OUTPUTS - 1) / OUTPUTS, pieces = (rows + PIECE - 1) / PIECE;
    if (rows * outputs * inputs < ALONE) threads = 1;
    const size_t bytes = (size_t)(rows * width) * sizeof(float);
    float *const wide = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!wide) return 1;
    if (rows == 1) spread(x, inputs, wide); /* sooner done than shared */
#pragma omp parallel num_threads(threads)
    {
        if (rows > 1) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++)
                spread(x + row * inputs, inputs, wide + row * width);
        }
#pragma omp for schedule(static) nowait
        for (int64_t task = 0; task < blocks * pieces; task++) {
            const int64_t first = task % blocks * OUTPUTS, start = task / blocks * PIECE;
            const int64_t end = start + PIECE < rows ? start + PIECE : rows;
            const int n = first + OUTPUTS <= outputs ? OUTPUTS : 1;
            for (int64_t o = first; o < first + OUTPUTS && o < outputs; o += n) {
                uint16_t last[OUTPUTS * STEP] = {0};
                for (int j = 0; j < n; j++)
                    for (int64_t i = inputs / STEP * STEP; i < inputs; i++)
                        last[j * STEP + i % STEP] = w[(o + j) * inputs + i];
                for (int64_t row = start, m; row < end; row += m) {
                    float sums[OUTPUTS][MOST_ROWS];
                    m = end - row < MOST_ROWS ? end - row : MOST_ROWS;
                    some(n, (int)m, w + o * inputs, last, wide + row * width, inputs, sums);
                    for (int r = 0; r < m; r++)
                        for (int j = 0; j < n; j++) {
                            const float sum = rounded(sums[j][r], 1);
                            y[(row + r) * outputs + o + j] =
                                bias ? narrow(sum + widen(bias[o + j])) : narrow(sum);
                        }
                }
            }
        }
    }
    free(wide);
    return 0;
}
