// Numbers as places on a lattice, modulo sixteen: see lattice.py. Any thread may call these; they start none.

#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 8192
#define TILE 16
#define ROW (BLOCK / 2 + 4)  // bytes of a block that travel: two numbers each, and a tag

typedef float lanes __attribute__((vector_size(4 * TILE)));
typedef int32_t places __attribute__((vector_size(4 * TILE)));

// The numbers of x at the given places. With each number's partner there, adding x times SIGNS gives the lower one of a
// pair its sum, the upper one its difference.
#ifdef __clang__
#define SWAPPED(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SWAPPED(x, ...) __builtin_shuffle(x, (places){__VA_ARGS__})
#endif
#define SIGNS(...) ((lanes){__VA_ARGS__, __VA_ARGS__})

// Of two numbers, their sum and their difference.
#define BUTTERFLY(a, b) (sum = a + b, b = a - b, a = sum)

// Times the Hadamard matrix of BLOCK rows, in place and unscaled: three of its steps in each pass over the block, which
// fills a first-level cache.
static void butterflies(float *restrict x) {
    for (int64_t half = TILE; half < BLOCK; half *= 8)
        for (int64_t start = 0; start < BLOCK; start += 8 * half)
#pragma omp simd
            for (int64_t i = start; i < start + half; i++) {
                float sum, a = x[i], b = x[i + half], c = x[i + 2 * half], d = x[i + 3 * half];
                float e = x[i + 4 * half], f = x[i + 5 * half], g = x[i + 6 * half], h = x[i + 7 * half];
                BUTTERFLY(a, b), BUTTERFLY(c, d), BUTTERFLY(e, f), BUTTERFLY(g, h);
                BUTTERFLY(a, c), BUTTERFLY(b, d), BUTTERFLY(e, g), BUTTERFLY(f, h);
                BUTTERFLY(a, e), BUTTERFLY(b, f), BUTTERFLY(c, g), BUTTERFLY(d, h);
                x[i] = a, x[i + half] = b, x[i + 2 * half] = c, x[i + 3 * half] = d;
                x[i + 4 * half] = e, x[i + 5 * half] = f, x[i + 6 * half] = g, x[i + 7 * half] = h;
            }
    for (int64_t start = 0; start < BLOCK; start += TILE) {  // and the last four among neighbours, in one register
        lanes v;
        memcpy(&v, x + start, sizeof v);
        v = SWAPPED(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14) + v * SIGNS(1, -1, 1, -1, 1, -1, 1, -1);
        v = SWAPPED(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13) + v * SIGNS(1, 1, -1, -1, 1, 1, -1, -1);
        v = SWAPPED(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11) + v * SIGNS(1, 1, 1, 1, -1, -1, -1, -1);
        v = SWAPPED(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7) +
            v * (lanes){1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
        memcpy(x + start, &v, sizeof v);
    }
}

// signs: of BLOCK numbers, each 1 or -1 over the root of BLOCK.
void rotate(const float *values, int64_t count, const float *signs, float *rotated) {
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t size = count - start < BLOCK ? count - start : BLOCK;
        float *block = rotated + start;
        for (int64_t i = 0; i < size; i++) block[i] = values[start + i] * signs[i];
        memset(block + size, 0, (BLOCK - size) * sizeof(float));
        butterflies(block);
    }
}

// Spoils `rotated`.
void unrotate(float *rotated, int64_t count, const float *signs, float *values) {
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t size = count - start < BLOCK ? count - start : BLOCK;
        butterflies(rotated + start);
        for (int64_t i = 0; i < size; i++) values[start + i] = rotated[start + i] * signs[i];
    }
}

static inline uint8_t low_bits(float place) {
    float bounded = place > -0x1p30f ? place : -0x1p30f;  // a NaN too becomes a number; fmaxf() would be a call
    return (uint8_t)(int32_t)(bounded < 0x1p30f ? bounded : 0x1p30f);
}

// The upper half of the sum of a block's places, eight bits of each, times a weight: odd numbers drawn at random.
static inline uint32_t tag_of(const uint8_t *restrict low, const uint64_t *restrict weights) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < BLOCK; i++) sum += low[i] * weights[i];
    return sum >> 32;
}

// rotated becomes what the receiver will find.
void encode(float *restrict rotated, int64_t blocks, const float *restrict spacing, const uint64_t *restrict weights,
            uint8_t *restrict packed) {
    for (int64_t block = 0; block < blocks; block++) {
        float *x = rotated + block * BLOCK, each = 1.0f / spacing[block];
        uint8_t low[BLOCK], *out = packed + block * ROW;
        for (int64_t i = 0; i < BLOCK; i++) {
            float place = rintf(x[i] * each);
            x[i] = place * spacing[block];
            low[i] = low_bits(place);
        }
        for (int64_t i = 0; i < BLOCK / 2; i++) out[i] = (low[i] & 15) | (low[i + BLOCK / 2] << 4);
        uint32_t tag = tag_of(low, weights);
        memcpy(out + BLOCK / 2, &tag, sizeof tag);
    }
}

// rotated: the receiver's own blocks; afterwards what the sender's became. wrong: 1 for a block that did not, by its
// tag.
void decode(const uint8_t *restrict packed, int64_t blocks, const float *restrict spacing,
            const uint64_t *restrict weights, float *restrict rotated, uint8_t *restrict wrong) {
    for (int64_t block = 0; block < blocks; block++) {
        float *x = rotated + block * BLOCK, each = 1.0f / spacing[block];
        const uint8_t *in = packed + block * ROW;
        uint8_t low[BLOCK];
        for (int64_t i = 0; i < BLOCK / 2; i++) {
            low[i] = in[i] & 15;
            low[i + BLOCK / 2] = in[i] >> 4;
        }
        for (int64_t i = 0; i < BLOCK; i++) {
            float place = low[i] + 16.0f * rintf((x[i] * each - low[i]) * 0.0625f);
            x[i] = place * spacing[block];
            low[i] = low_bits(place);
        }
        uint32_t tag = tag_of(low, weights);
        wrong[block] = memcmp(in + BLOCK / 2, &tag, sizeof tag) != 0;
    }
}
