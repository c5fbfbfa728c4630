/* Root-mean-square normalisation over the rows of (N, D), forward and backward, each in one pass over memory:
 *     n = x * scale,  scale = 1 / sqrt(mean(x^2) + epsilon),  out = n * w
 *     dx = scale * (w d - n * mean(w d n)),  dw = sum over rows of d n
 * x and dx are float32; out and its gradient d are float32 or bfloat16. Threads share the rows. Arrays are contiguous.
 */
#include <math.h>
#include <omp.h>

#include "elementwise.h"

#define DEFINE(TYPE)                                                                                                   \
    void norm_forward_##TYPE(const float *restrict x, const float *restrict w, TYPE *restrict out, float *scales,      \
                             int64_t N, int64_t D, float epsilon) {                                                    \
        _Pragma("omp parallel for schedule(static)") for (int64_t n = 0; n < N; n++) {                                 \
            const float *row = x + n * D;                                                                              \
            float sum = 0.0f;                                                                                          \
            _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < D; i++) sum += row[i] * row[i];             \
            float scale = 1.0f / sqrtf(sum / D + epsilon);                                                             \
            for (int64_t i = 0; i < D; i++) store_##TYPE(out + n * D + i, row[i] * scale * w[i]);                      \
            scales[n] = scale;                                                                                         \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* dw: (threads, D), zeros; each thread adds up its own rows, so that the same threads give the same bits. */      \
    void norm_backward_##TYPE(const TYPE *restrict d, const float *restrict x, const float *restrict w,                \
                              const float *scales, float *restrict dx, float *restrict dw, int64_t N, int64_t D,       \
                              int64_t threads) {                                                                       \
        _Pragma("omp parallel num_threads(threads)") {                                                                 \
            float *restrict own = dw + omp_get_thread_num() * D;                                                       \
            _Pragma("omp for schedule(static)") for (int64_t n = 0; n < N; n++) {                                      \
                const TYPE *dr = d + n * D;                                                                            \
                const float *xr = x + n * D;                                                                           \
                float *to = dx + n * D, scale = scales[n], sum = 0.0f;                                                 \
                _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < D; i++) {                               \
                    float product = load_##TYPE(dr + i) * xr[i] * scale;                                               \
                    own[i] += product;                                                                                 \
                    sum += product * w[i];                                                                             \
                }                                                                                                      \
                float mean = sum / D;                                                                                  \
                for (int64_t i = 0; i < D; i++)                                                                        \
                    to[i] = scale * (load_##TYPE(dr + i) * w[i] - xr[i] * scale * mean);                               \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE(float)
DEFINE(bf16)
