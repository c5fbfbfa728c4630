/* What the kernels compute of each element, written so that a loop over it vectorises without -ffast-math, which would
 * give up NaN and infinity: no call of the C library, no branch.
 */
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float load_float(const float *p) { return *p; }
static inline void store_float(float *p, float v) { *p = v; }

static inline float load_bf16(const bf16 *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

/* To nearest, ties to even, as torch rounds; a NaN stays one. */
static inline void store_bf16(bf16 *p, float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *p = (bf16)(v != v ? 0x7fc0 : rounded);
}

/* 2^(a b) for a, b with |a b| <= 126, to about 1e-7 + 1e-8 |a b| relative where products and sums are fused, NaN for
 * NaN. a b = n + f with |f| <= 1/2, and 2^f by the polynomial of least relative error, 9e-8. Rounded to n by adding and
 * taking off 1.5 * 2^23. */
static inline float exp2_of_product(float a, float b) {
    float shifted = a * b + 12582912.0f;
    float f = a * b - (shifted - 12582912.0f);
    float p = 0.00967151753f + f * 0.00132647352f;
    p = 0.24022242f + f * (0.0555073377f + f * p);
    p = 1.0f + f * (0.693146978f + f * p);
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    uint32_t scale_bits = (bits << 23) + 0x3f800000u; /* the low bits of `shifted` are n */
    float scale;
    memcpy(&scale, &scale_bits, 4);
    return p * scale;
}

/* The lesser of |v| and bound; NaN for NaN. */
static inline float magnitude_to(float bound, float v) {
    float magnitude = __builtin_fabsf(v);
    return bound < magnitude ? bound : magnitude;
}

/* exp(-|v|); from 87 on it stays as there, 2e-38. */
static inline float exp_of_minus_magnitude(float v) { return exp2_of_product(magnitude_to(87.0f, v), -1.44269504f); }

/* z = sigmoid(k), keep = sigmoid(-k) and low = sigmoid(-|x|): none by subtraction, which would lose digits of a small
 * one, and all with one division. */
static inline void gates(float x, float k, float *z, float *keep, float *low) {
    float u = exp_of_minus_magnitude(k), w = exp_of_minus_magnitude(x);
    float both = 1.0f / ((1.0f + u) * (1.0f + w)), large = both * (1.0f + w), small = u * large;
    *z = k >= 0.0f ? large : small;
    *keep = k >= 0.0f ? small : large;
    *low = w * both * (1.0f + u);
}

/* The standard normal distribution's cumulative probability at v, and e = exp(-v^2 / 2), its density but for
 * 1 / sqrt(2 pi): 0 from |v| = 13 on. The tail beyond |v| is e times a smooth function of |v|: a polynomial in
 * s = |v| / 2.75 - 1 that holds the error of v Phi(v) below 2e-7 + 2e-7 |v|; beyond 5.5, where the tail is 2e-8, the
 * function stays as there. */
static inline float normal_cdf(float v, float *e) {
    float magnitude = magnitude_to(13.0f, v);
    *e = __builtin_fabsf(v) > 13.0f ? 0.0f : exp2_of_product(magnitude, magnitude * -0.721347520f);
    float s = (5.5f < magnitude ? 5.5f : magnitude) * (1.0f / 2.75f) - 1.0f;
    float p = 0.0536689928f + s * 0.0314493806f;
    p = -0.0345040262f + s * (0.0332917508f + s * p);
    p = -0.0327133747f + s * (-0.00786784495f + s * p);
    p = -0.0602870835f + s * (0.0459431122f + s * p);
    p = -0.108513786f + s * (0.0841109841f + s * p);
    p = 0.130723218f + s * p;
    float tail = *e * p;
    return v >= 0.0f ? 1.0f - tail : tail;
}
