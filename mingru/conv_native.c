/* A causal depthwise convolution of K taps over time, forward and backward. Of each lane of x (B, T, D) the K - 1 steps
 * before it are in past (B, K - 1, D), so that a step has a row at every time from 1 - K on:
 *     out_t = bias + sum over back < K of taps_{K-1-back} x_{t-back}
 * and nothing that lies before a reset is seen from the reset on. reset is (B, T), or null where there is none.
 * Threads share the steps. Arrays are contiguous; out and its gradient d are float32 or bfloat16, all else is float32.
 */
#include <omp.h>
#include <stdbool.h>

#include "elementwise.h"

enum { BLOCK = 64 }; /* channels whose sums stay in registers */

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* How many of the `most` steps before step t of a lane are of its document. */
static inline int64_t reach(const bool *reset, int64_t t, int64_t most) {
    for (int64_t back = 0; reset && back < most && back <= t; back++)
        if (reset[t - back]) return back;
    return most;
}

/* The row of a lane at a time from 1 - K on. */
static inline const float *row_at(const float *x, const float *past, int64_t t, int64_t D, int64_t K) {
    return t < 0 ? past + (t + K - 1) * D : x + t * D;
}

/* sum_i += tap_i row_i over `width` channels. */
#define ADD_PRODUCT(TYPE)                                                                                              \
    static inline void add_product_##TYPE(float *restrict sum, const float *restrict tap, const TYPE *restrict row,    \
                                          int64_t width) {                                                             \
        for (int64_t i = 0; i < width; i++) sum[i] += tap[i] * load_##TYPE(row + i);                                   \
    }

ADD_PRODUCT(float)
ADD_PRODUCT(bf16)

#define DEFINE(TYPE)                                                                                                   \
    static inline void sum_of_taps_##TYPE(const float *x, const float *past, int64_t t, int64_t seen, int64_t first,   \
                                          int64_t width, const float *taps, const float *bias, TYPE *out, int64_t D,   \
                                          int64_t K) {                                                                 \
        float sum[BLOCK];                                                                                              \
        for (int64_t i = 0; i < width; i++) sum[i] = bias[first + i];                                                  \
        for (int64_t back = 0; back <= seen; back++)                                                                   \
            add_product_float(sum, taps + (K - 1 - back) * D + first, row_at(x, past, t - back, D, K) + first, width); \
        for (int64_t i = 0; i < width; i++) store_##TYPE(out + first + i, sum[i]);                                     \
    }                                                                                                                  \
                                                                                                                       \
    void conv_forward_##TYPE(const float *restrict x, const float *restrict past, const bool *reset,                   \
                             const float *restrict taps, const float *restrict bias, TYPE *restrict out, int64_t B,    \
                             int64_t T, int64_t D, int64_t K) {                                                        \
        _Pragma("omp parallel for schedule(static)") for (int64_t n = 0; n < B * T; n++) {                             \
            int64_t b = n / T, t = n % T, seen = reach(reset ? reset + b * T : 0, t, K - 1), first = 0;                \
            const float *own = x + b * T * D, *before = past + b * (K - 1) * D;                                        \
            for (; first + BLOCK <= D; first += BLOCK)                                                                 \
                sum_of_taps_##TYPE(own, before, t, seen, first, BLOCK, taps, bias, out + n * D, D, K);                 \
            sum_of_taps_##TYPE(own, before, t, seen, first, D - first, taps, bias, out + n * D, D, K);                 \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static inline void sum_of_gradients_##TYPE(const TYPE *d, int64_t t, int64_t begin, int64_t end, int64_t first,    \
                                               int64_t width, const float *taps, float *to, int64_t D, int64_t K) {    \
        float sum[BLOCK] = {0.0f};                                                                                     \
        for (int64_t later = begin; later < end; later++)                                                              \
            add_product_##TYPE(sum, taps + (K - 1 - later + t) * D + first, d + later * D + first, width);             \
        for (int64_t i = 0; i < width; i++) to[first + i] = sum[i];                                                    \
    }                                                                                                                  \
                                                                                                                       \
    /* Into `to` the gradient of a lane's row at time t: what later steps, of the same document, made of it. */        \
    static void gradient_of_row_##TYPE(const TYPE *restrict d, const bool *reset, const float *restrict taps,          \
                                       float *restrict to, int64_t t, int64_t T, int64_t D, int64_t K) {               \
        int64_t begin = t < 0 ? 0 : t, end = begin, first = 0;                                                         \
        while (end < least(T, t + K) && !(end > t && reset && reset[end])) end++;                                      \
        for (; first + BLOCK <= D; first += BLOCK)                                                                     \
            sum_of_gradients_##TYPE(d, t, begin, end, first, BLOCK, taps, to, D, K);                                   \
        sum_of_gradients_##TYPE(d, t, begin, end, first, D - first, taps, to, D, K);                                   \
    }                                                                                                                  \
                                                                                                                       \
    /* partial: (threads, K + 1, D), zeros; of the taps and then the bias. Each thread adds up its own steps, so that  \
     * the same threads give the same bits. */                                                                         \
    void conv_backward_##TYPE(const TYPE *restrict d, const float *restrict x, const float *restrict past,             \
                              const bool *reset, const float *restrict taps, float *restrict dx,                       \
                              float *restrict dpast, float *restrict partial, int64_t B, int64_t T, int64_t D,         \
                              int64_t K, int64_t threads) {                                                            \
        _Pragma("omp parallel num_threads(threads)") {                                                                 \
            float *own = partial + omp_get_thread_num() * (K + 1) * D;                                                 \
            _Pragma("omp for schedule(static)") for (int64_t n = 0; n < B * T; n++) {                                  \
                int64_t b = n / T, t = n % T;                                                                          \
                const bool *resets = reset ? reset + b * T : 0;                                                        \
                const TYPE *dr = d + n * D;                                                                            \
                float *restrict dbias = own + K * D;                                                                   \
                for (int64_t i = 0; i < D; i++) dbias[i] += load_##TYPE(dr + i);                                       \
                for (int64_t back = 0, seen = reach(resets, t, K - 1); back <= seen; back++) {                         \
                    const float *row = row_at(x + b * T * D, past + b * (K - 1) * D, t - back, D, K);                  \
                    float *restrict dtap = own + (K - 1 - back) * D;                                                   \
                    for (int64_t i = 0; i < D; i++) dtap[i] += load_##TYPE(dr + i) * row[i];                           \
                }                                                                                                      \
                gradient_of_row_##TYPE(d + b * T * D, resets, taps, dx + n * D, t, T, D, K);                           \
            }                                                                                                          \
            _Pragma("omp for schedule(static)") for (int64_t n = 0; n < B * (K - 1); n++) {                            \
                int64_t b = n / (K - 1);                                                                               \
                const bool *resets = reset ? reset + b * T : 0;                                                        \
                gradient_of_row_##TYPE(d + b * T * D, resets, taps, dpast + n * D, n % (K - 1) + 1 - K, T, D, K);      \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE(float)
DEFINE(bf16)
