/* Dropout over N float32: out = x * (kept ? scale : 0), where element i is kept if its 16 random bits are below
 * `threshold` (1 ... 65536). The bits are those of SplitMix64 begun at `seed`, four elements a draw, so that the
 * backward pass, on gradients, finds the same ones again, by however many threads.
 */
#include <omp.h>
#include <stdint.h>

enum { BLOCK = 1024, DRAWS = BLOCK / 4 };

static void draw(uint64_t *restrict bits, uint64_t first) {
    for (int j = 0; j < DRAWS; j++) {
        uint64_t z = first + (uint64_t)j * 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        bits[j] = z ^ (z >> 31);
    }
}

void dropout(const float *restrict x, float *restrict out, int64_t N, uint64_t seed, int32_t threshold, float scale) {
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < N; start += BLOCK) {
        union { uint64_t drawn[DRAWS]; uint16_t of[BLOCK]; } bits;
        draw(bits.drawn, seed + ((uint64_t)start / 4 + 1) * 0x9e3779b97f4a7c15u);
        int64_t count = N - start < BLOCK ? N - start : BLOCK;
        for (int64_t i = 0; i < count; i++) out[start + i] = x[start + i] * (bits.of[i] < threshold ? scale : 0.0f);
    }
}
