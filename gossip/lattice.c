// Numbers as places on a lattice, modulo sixteen: see lattice.py. Any thread may call these; they start none.

#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 8192
#define TILE 16
#define ROW (BLOCK / 2 + 4)  // bytes of a block that travel: two numbers each, and a tag

// Times the Hadamard matrix of BLOCK rows, in place and unscaled.
static void butterflies(float *restrict x) {
    for (int64_t half = TILE; half < BLOCK; half *= 2)
        for (int64_t start = 0; start < BLOCK; start += 2 * half)
            for (int64_t i = start; i < start + half; i++) {
                float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
    // The nearest sixteen of each other: rows become columns for it, so that whole rows are added.
    for (int64_t start = 0; start < BLOCK; start += TILE * TILE) {
        float tile[TILE][TILE];
        for (int i = 0; i < TILE; i++)
            for (int j = 0; j < TILE; j++) tile[j][i] = x[start + TILE * i + j];
        for (int half = 1; half < TILE; half *= 2)
            for (int first = 0; first < TILE; first += 2 * half)
                for (int row = first; row < first + half; row++)
                    for (int i = 0; i < TILE; i++) {
                        float a = tile[row][i], b = tile[row + half][i];
                        tile[row][i] = a + b;
                        tile[row + half][i] = a - b;
                    }
        for (int i = 0; i < TILE; i++)
            for (int j = 0; j < TILE; j++) x[start + TILE * i + j] = tile[j][i];
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

// rotated becomes what the receiver will find.
void encode(float *restrict rotated, int64_t blocks, const float *restrict spacing, uint8_t *restrict packed,
            uint8_t *restrict tagged) {
    for (int64_t block = 0; block < blocks; block++) {
        float *x = rotated + block * BLOCK, each = 1.0f / spacing[block];
        uint8_t *low = tagged + block * BLOCK, *out = packed + block * ROW;
        for (int64_t i = 0; i < BLOCK; i++) {
            float place = rintf(x[i] * each);
            x[i] = place * spacing[block];
            low[i] = low_bits(place);
        }
        for (int64_t i = 0; i < BLOCK / 2; i++) out[i] = (low[i] & 15) | (low[i + BLOCK / 2] << 4);
    }
}

// rotated: the receiver's own blocks; afterwards what the sender's became.
void decode(const uint8_t *restrict packed, int64_t blocks, const float *restrict spacing, float *restrict rotated,
            uint8_t *restrict tagged) {
    for (int64_t block = 0; block < blocks; block++) {
        float *x = rotated + block * BLOCK, each = 1.0f / spacing[block];
        const uint8_t *in = packed + block * ROW;
        uint8_t *low = tagged + block * BLOCK;
        for (int64_t i = 0; i < BLOCK / 2; i++) {
            low[i] = in[i] & 15;
            low[i + BLOCK / 2] = in[i] >> 4;
        }
        for (int64_t i = 0; i < BLOCK; i++) {
            float place = low[i] + 16.0f * rintf((x[i] * each - low[i]) * 0.0625f);
            x[i] = place * spacing[block];
            low[i] = low_bits(place);
        }
    }
}
