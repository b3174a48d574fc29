/* Numbers as PyTorch has them, and an exponential that compilers turn into vectors. */

#ifndef XVERSE_FLOATS
#define XVERSE_FLOATS

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float widen(uint16_t half)
{
    const uint32_t bits = (uint32_t)half << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

static inline uint16_t narrow(float wide)
{
    uint32_t bits;
    memcpy(&bits, &wide, 4);
    const uint32_t up = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)up; /* NaN stays NaN */
}

static inline float at(const void *x, int64_t i, int bf16)
{
    return bf16 ? widen(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

static inline float rounded(float wide, int bf16) { return bf16 ? widen(narrow(wide)) : wide; }

static inline float sum16(const float part[16])
{
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += part[i];
    return sum;
}

/* e^x by 2^n * p(f), |f| <= 1/2; p is Taylor's series of degree 6, 2e-7 off at most. */
static inline float exponential(float x)
{
    const float above = x > -87.0f ? x : -87.0f, bound = above < 88.0f ? above : 88.0f;
    const float t = bound * 1.44269504f;
    const float n = rintf(t), f = (t - n) * 0.69314718f;
    const float tail = 1.0f / 24 + f * (1.0f / 120 + f * (1.0f / 720));
    const float p = 1.0f + f * (1.0f + f * (0.5f + f * (1.0f / 6 + f * tail)));
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

#endif
