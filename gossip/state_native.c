/* Passes over float32 values of a state that read and write each of them once. */
#include <stdint.h>
#include <string.h>

#define BLOCK 4096 /* squares are added up in float32 within a block, in float64 from block to block */

/* live moves towards peer by share (peer - own), own NULL: live stands for it; whole: live = peer. peer then holds what
 * live was. energies: the sums of squares of peer - own and of live before. Shared by the caller's OpenMP threads. */
void merge_piece(float *restrict live, float *restrict peer, const float *restrict own, int64_t count, float share,
                 int whole, double *energies) {
    double apart = 0.0, size = 0.0;
#pragma omp parallel for schedule(static) reduction(+ : apart, size)
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t stop = count - start < BLOCK ? count : start + BLOCK;
        float far = 0.0f, large = 0.0f;
#pragma omp simd reduction(+ : far, large)
        for (int64_t i = start; i < stop; i++) {
            float now = live[i], theirs = peer[i], change = theirs - (own ? own[i] : now);
            far += change * change;
            large += now * now;
            peer[i] = now;
            live[i] = whole ? theirs : now + share * change;
        }
        apart += far;
        size += large;
    }
    energies[0] = apart;
    energies[1] = size;
}

/* The least and the greatest of count values; both NaN where there is one. On the calling thread alone. */
void extremes(const float *values, int64_t count, float *found) {
    float least = values[0], greatest = values[0];
    int strange = 0;
#pragma omp simd reduction(min : least) reduction(max : greatest) reduction(| : strange)
    for (int64_t i = 0; i < count; i++) {
        least = values[i] < least ? values[i] : least;
        greatest = values[i] > greatest ? values[i] : greatest;
        strange |= values[i] != values[i];
    }
    found[0] = strange ? __builtin_nanf("") : least;
    found[1] = strange ? __builtin_nanf("") : greatest;
}

/* The sum of the squares of count values, infinite where a block's is too large for float32. On the calling thread. */
double energy(const float *values, int64_t count) {
    double total = 0.0;
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t stop = count - start < BLOCK ? count : start + BLOCK;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < stop; i++) sum += values[i] * values[i];
        total += sum;
    }
    return total;
}

/* Each value rounded to the nearest bfloat16, ties to even; a NaN stays one. On the calling thread alone. */
void narrow(const float *restrict values, uint16_t *restrict rounded, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof bits);
        uint32_t near = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        rounded[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : near;
    }
}

/* The same values as float32. On the calling thread alone. */
void widen(const uint16_t *restrict rounded, float *restrict values, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)rounded[i] << 16;
        memcpy(values + i, &bits, sizeof bits);
    }
}
