/* gelu(v) = v Phi(v) with v = x + bias, over the rows of (N, F), and its slope Phi(v) + v phi(v), by which the backward
 * pass multiplies: both come of the same exponential, so the slope is kept in the place of x.
 *     dx = dy slope,  dbias = sum over rows of dx
 * Phi and phi: the standard normal distribution and its density. Threads share the rows. Arrays are contiguous; the
 * bias and its gradient are float32 whatever the others' type.
 */
#include <omp.h>

#include "elementwise.h"

#define DENSITY_AT_ZERO 0.398942280f

#define DEFINE(TYPE)                                                                                                   \
    void gelu_forward_##TYPE(TYPE *restrict x, const float *restrict bias, TYPE *restrict y, int64_t N, int64_t F) {   \
        _Pragma("omp parallel for schedule(static)") for (int64_t n = 0; n < N; n++) {                                 \
            for (int64_t i = 0; i < F; i++) {                                                                          \
                float v = load_##TYPE(x + n * F + i) + bias[i], e, phi = normal_cdf(v, &e);                            \
                store_##TYPE(y + n * F + i, v * phi);                                                                  \
                store_##TYPE(x + n * F + i, phi + v * e * DENSITY_AT_ZERO);                                            \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* dbias: (threads, F), zeros; each thread adds up its own rows, so that the same threads give the same bits. */   \
    void gelu_backward_##TYPE(const TYPE *restrict dy, const TYPE *restrict slope, TYPE *restrict dx,                  \
                              float *restrict dbias, int64_t N, int64_t F, int64_t threads) {                          \
        _Pragma("omp parallel num_threads(threads)") {                                                                 \
            float *restrict own = dbias + omp_get_thread_num() * F;                                                    \
            _Pragma("omp for schedule(static)") for (int64_t n = 0; n < N; n++) {                                      \
                for (int64_t i = 0; i < F; i++) {                                                                      \
                    float d = load_##TYPE(dy + n * F + i) * load_##TYPE(slope + n * F + i);                            \
                    own[i] += d;                                                                                       \
                    store_##TYPE(dx + n * F + i, d);                                                                   \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE(float)
DEFINE(bf16)
