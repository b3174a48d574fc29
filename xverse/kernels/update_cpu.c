/* GRADIENTS -> WEIGHTS. AdamW on a CPU: all it needs is read once and written once.

   Called by update_cpu.py. Twin: reference_train.adamw. */

#include <omp.h>

#include "floats_cpu.h"
#include "native_cpu.h"

#define CHUNK 16384 /* numbers that a thread takes at a time */

/* Up or down with the odds of its place between the two; the bits are a hash of the place. */
static inline uint16_t narrow_randomly(float wide, uint32_t place)
{
    uint32_t bits, hash = (place ^ place >> 16) * 0x7FEB352Du;
    hash = (hash ^ hash >> 15) * 0x846CA68Bu;
    memcpy(&bits, &wide, 4);
    return (uint16_t)((bits + ((hash ^ hash >> 16) & 0xffff)) >> 16);
}

static inline void keep(void *x, int64_t i, float value, uint32_t seed, int bf16)
{
    if (bf16) ((uint16_t *)x)[i] = narrow_randomly(value, (uint32_t)i + seed);
    else ((float *)x)[i] = value;
}

static inline __attribute__((always_inline)) void update_range(
    const Update *u, int64_t begin, int64_t end, const int weight16, const int gradient16,
    const int moments16, const int copies)
{
#pragma omp simd
    for (int64_t i = begin; i < end; i++) {
        const float g = at(u->gradient, i, gradient16) * u->scale;
        const float before = at(u->first, i, moments16);
        const float m = fmaf(u->share1, g - before, before);
        const float v = at(u->second, i, moments16) * u->keep2 + u->share2 * (g * g);
        const float root = sqrtf(v / u->bias2) + u->epsilon;
        const float w = at(u->weight, i, weight16) * u->keep - u->step_size * (m / root);
        keep(u->weight, i, w, u->seeds[0], weight16);
        keep(u->first, i, m, u->seeds[1], moments16);
        keep(u->second, i, v, u->seeds[2], moments16);
        if (copies) u->copy[i] = narrow(w);
    }
}

static void update_chunk(const Update *u, int64_t begin, int64_t end)
{
    const int kinds = (u->weight16 << 1 | u->gradient16) << 1 | u->moments16;
    switch (u->copy ? kinds | 8 : kinds) {
    case 0: update_range(u, begin, end, 0, 0, 0, 0); break;
    case 1: update_range(u, begin, end, 0, 0, 1, 0); break;
    case 2: update_range(u, begin, end, 0, 1, 0, 0); break;
    case 3: update_range(u, begin, end, 0, 1, 1, 0); break;
    case 4: update_range(u, begin, end, 1, 0, 0, 0); break;
    case 5: update_range(u, begin, end, 1, 0, 1, 0); break;
    case 6: update_range(u, begin, end, 1, 1, 0, 0); break;
    case 7: update_range(u, begin, end, 1, 1, 1, 0); break;
    case 8: update_range(u, begin, end, 0, 0, 0, 1); break;
    case 9: update_range(u, begin, end, 0, 0, 1, 1); break;
    case 10: update_range(u, begin, end, 0, 1, 0, 1); break;
    case 11: update_range(u, begin, end, 0, 1, 1, 1); break;
    }
}

/* One update, in place; u->copy gets fp32 weights rounded to nearest, if it is there. */
void adamw(const Update *u, int64_t size, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (size > CHUNK)
    for (int64_t begin = 0; begin < size; begin += CHUNK)
        update_chunk(u, begin, begin + CHUNK < size ? begin + CHUNK : size);
}
