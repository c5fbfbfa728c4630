/* One step of schedule-free AdamW over one tensor, all in float32, in a single pass over memory:
 *     v <- beta2 v + (1 - beta2) d^2          with d = dL/dy
 *     u  = d / (sqrt(v / bias_correction2) + eps) + decay y
 *     y <- y + pull (z - y) - y_rate u        pull: the average's share of the newest iterate
 *     z <- z - z_rate u
 */
#include <math.h>
#include <stdint.h>

/* Rounded as the library rounds, without fused multiply-adds: the pass is bound by memory, not by arithmetic. */
#pragma GCC optimize("fp-contract=off")
#pragma STDC FP_CONTRACT OFF

void schedule_free_step(float *restrict y, float *restrict z, float *restrict v, const float *restrict d, int64_t count,
                        float beta2, float one_minus_beta2, float bias_correction2, float eps, float decay, float pull,
                        float y_rate, float z_rate) {
#pragma omp parallel for simd schedule(static) if (parallel : count > 32768)
    for (int64_t i = 0; i < count; i++) {
        float second = beta2 * v[i] + one_minus_beta2 * d[i] * d[i];
        float update = d[i] / (sqrtf(second / bias_correction2) + eps) + decay * y[i];
        v[i] = second;
        y[i] = y[i] + pull * (z[i] - y[i]) - y_rate * update;
        z[i] = z[i] - z_rate * update;
    }
}
