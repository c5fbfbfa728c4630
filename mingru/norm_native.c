/* Root-mean-square normalisation over the rows of (N, D) float32, forward and backward, each in one pass over memory:
 *     n = x * scale,  scale = 1 / sqrt(mean(x^2) + epsilon),  out = n * w
 *     dx = scale * (w d - n * mean(w d n)),  dw = sum over rows of d n
 * Threads share the rows. Arrays are contiguous.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>

void norm_forward(const float *x, const float *w, float *out, float *scales, int64_t N, int64_t D, float epsilon) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * D;
        float *to = out + n * D, sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < D; i++) sum += row[i] * row[i];
        float scale = 1.0f / sqrtf(sum / D + epsilon);
        for (int64_t i = 0; i < D; i++) to[i] = row[i] * scale * w[i];
        scales[n] = scale;
    }
}

/* dw: (threads, D), zeros; each thread adds up its own rows, so that the same threads give the same bits. */
void norm_backward(const float *restrict d, const float *restrict x, const float *restrict w, const float *scales,
                   float *restrict dx, float *restrict dw, int64_t N, int64_t D, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        float *restrict own = dw + omp_get_thread_num() * D;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++) {
            const float *dr = d + n * D, *xr = x + n * D;
            float *to = dx + n * D, scale = scales[n], sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < D; i++) {
                float product = dr[i] * xr[i] * scale;
                own[i] += product;
                sum += product * w[i];
            }
            float mean = sum / D;
            for (int64_t i = 0; i < D; i++) to[i] = scale * (dr[i] * w[i] - xr[i] * scale * mean);
        }
    }
}
