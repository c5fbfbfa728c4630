/* Cross-entropy of the rows of logits l (N, V), in float32 whatever their type, and its gradient in their place, each
 * in one pass over memory:
 *     norm = log sum exp(l),  loss = norm - l[target]
 *     dl = scale (exp(l - norm) - [i = target])
 * Threads share the rows. Arrays are contiguous, and targets in [0, V).
 */
#include <math.h>

#include "elementwise.h"

#define DEFINE(TYPE)                                                                                                   \
    void cross_entropy_forward_##TYPE(const TYPE *restrict logits, const int64_t *restrict targets,                    \
                                      float *restrict norms, float *restrict losses, int64_t N, int64_t V) {           \
        _Pragma("omp parallel for schedule(static)") for (int64_t n = 0; n < N; n++) {                                 \
            const TYPE *l = logits + n * V;                                                                            \
            float most = -INFINITY, sum = 0.0f;                                                                        \
            _Pragma("omp simd reduction(max : most)") for (int64_t i = 0; i < V; i++) {                                \
                float v = load_##TYPE(l + i);                                                                          \
                most = v > most ? v : most;                                                                            \
            }                                                                                                          \
            _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < V; i++) {                                   \
                sum += exp_of_minus_magnitude(load_##TYPE(l + i) - most);                                              \
            }                                                                                                          \
            norms[n] = most + logf(sum);                                                                               \
            losses[n] = norms[n] - load_##TYPE(l + targets[n]);                                                        \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    void cross_entropy_backward_##TYPE(TYPE *restrict logits, const int64_t *restrict targets,                         \
                                       const float *restrict norms, const float *scale, int64_t N, int64_t V) {        \
        _Pragma("omp parallel for schedule(static)") for (int64_t n = 0; n < N; n++) {                                 \
            TYPE *l = logits + n * V;                                                                                  \
            float norm = norms[n], factor = *scale, wanted = load_##TYPE(l + targets[n]);                              \
            for (int64_t i = 0; i < V; i++)                                                                            \
                store_##TYPE(l + i, factor * exp_of_minus_magnitude(load_##TYPE(l + i) - norm));                       \
            store_##TYPE(l + targets[n], factor * (exp_of_minus_magnitude(wanted - norm) - 1.0f));                     \
        }                                                                                                              \
    }

DEFINE(float)
DEFINE(bf16)
