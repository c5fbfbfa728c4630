/* One decoding step of the whole language model for a few lanes: every weight is read once, nothing else of size is.
 *
 * N lanes, D width, E inner width, F width of the feed-forward (0: none), K taps of the convolution (0: none), V tokens.
 * Matrices are float32 or bfloat16, (rows, columns) and contiguous; vectors and all activations are float32.
 * The threads of one parallel region share the rows of each matrix and meet at barriers between the phases.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

typedef struct {
    const float *taps, *taps_bias;     /* (K, D) oldest first, (D) */
    const void *pointwise;             /* (D, D) */
    const float *pointwise_bias;       /* (D) */
    const float *norm;                 /* (D) */
    const void *hidden_and_gate, *out; /* (2E, D), (D, E); out NULL: E = D and h is the branch */
    const float *ff_norm;              /* (D) */
    const void *up;                    /* (F, D) */
    const float *up_bias;              /* (F) */
    const void *down;                  /* (D, F) */
    const float *down_bias;            /* (D) */
} Layer;

typedef struct {
    int64_t N, D, E, F, K, V, layers;
    float epsilon; /* of the normalisations */
} Shape;

static inline float value_float(const float *p) { return *p; }
static inline float value_bf16(const bf16 *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

static inline void share(int64_t count, int64_t grain, int64_t *from, int64_t *to) {
    int64_t grains = (count + grain - 1) / grain, threads = omp_get_num_threads(), me = omp_get_thread_num();
    *from = grains * me / threads * grain;
    *to = grains * (me + 1) / threads * grain;
    if (*to > count) *to = count;
}

static inline float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }
static inline float gelu(float v) { return 0.5f * v * (1.0f + erff(v * 0.70710678f)); }

/* This thread's share of normal = x / rms(x) * weight. */
static void normalise(const float *x, const float *weight, float *normal, const Shape *s) {
    int64_t from, to;
    share(s->D, 16, &from, &to);
    for (int64_t n = 0; n < s->N; n++) {
        const float *row = x + n * s->D;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < s->D; d++) sum += row[d] * row[d];
        float scale = 1.0f / sqrtf(sum / s->D + s->epsilon);
        for (int64_t d = from; d < to; d++) normal[n * s->D + d] = row[d] * scale * weight[d];
    }
}

/* This thread's share of the convolution's taps over the carried inputs, which move on by one. */
static void convolve(const Layer *layer, const float *x, float *past, float *mixed, const Shape *s) {
    int64_t from, to;
    share(s->D, 16, &from, &to);
    for (int64_t n = 0; n < s->N; n++) {
        float *carried = past + n * (s->K - 1) * s->D;
        for (int64_t d = from; d < to; d++) {
            float sum = layer->taps_bias[d] + layer->taps[(s->K - 1) * s->D + d] * x[n * s->D + d];
            for (int64_t j = 0; j < s->K - 1; j++) {
                sum += layer->taps[j * s->D + d] * carried[j * s->D + d];
                carried[j * s->D + d] = j + 1 < s->K - 1 ? carried[(j + 1) * s->D + d] : x[n * s->D + d];
            }
            mixed[n * s->D + d] = sum;
        }
    }
}

/* Ask for what is read soon: rows of bfloat16 are so short that the processor learns too late where each leads. */
static inline void fetch(const void *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i, 0, 2);
}

/* Four rows at a time: four sums in flight hide the adder's latency, and x is read once for them. */
#define DEFINE(TYPE)                                                                                                   \
    static inline void dot4_##TYPE(const TYPE *restrict w, int64_t stride, const float *restrict x, int64_t count,     \
                                   float *restrict sums) {                                                             \
        float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;                                                                  \
        const TYPE *wb = w + stride, *wc = wb + stride, *wd = wc + stride;                                             \
        _Pragma("omp simd reduction(+ : a, b, c, d)") for (int64_t i = 0; i < count; i++) {                            \
            a += value_##TYPE(w + i) * x[i];                                                                           \
            b += value_##TYPE(wb + i) * x[i];                                                                          \
            c += value_##TYPE(wc + i) * x[i];                                                                          \
            d += value_##TYPE(wd + i) * x[i];                                                                          \
        }                                                                                                              \
        sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;                                                            \
    }                                                                                                                  \
    static inline float dot_##TYPE(const TYPE *restrict w, const float *restrict x, int64_t count) {                   \
        float sum = 0.0f;                                                                                              \
        _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < count; i++) sum += value_##TYPE(w + i) * x[i];  \
        return sum;                                                                                                    \
    }                                                                                                                  \
                                                                                                                       \
    /* This thread's share of out (N, rows) = matrix x + bias, through gelu if asked, added to what is there if so. */ \
    static void apply_##TYPE(const void *matrix, const float *bias, const float *x, float *out, int64_t rows,          \
                             int64_t columns, int64_t N, int through_gelu, int add) {                                  \
        int64_t from, to;                                                                                              \
        share(rows, 4, &from, &to);                                                                                    \
        for (int64_t r = from; r < to; r += 4) {                                                                       \
            const TYPE *w = (const TYPE *)matrix + r * columns;                                                        \
            int64_t here = to - r < 4 ? to - r : 4, next = to - r - here < 4 ? to - r - here : 4;                      \
            if (sizeof(TYPE) == 2) fetch(w + here * columns, next * columns * sizeof(TYPE));                           \
            for (int64_t n = 0; n < N; n++) {                                                                          \
                float sums[4];                                                                                         \
                if (here == 4)                                                                                         \
                    dot4_##TYPE(w, columns, x + n * columns, columns, sums);                                           \
                else                                                                                                   \
                    for (int64_t i = 0; i < here; i++) sums[i] = dot_##TYPE(w + i * columns, x + n * columns, columns); \
                for (int64_t i = 0; i < here; i++) {                                                                   \
                    float v = sums[i] + (bias ? bias[r + i] : 0.0f), *o = out + n * rows + r + i;                      \
                    v = through_gelu ? gelu(v) : v;                                                                    \
                    *o = add ? *o + v : v;                                                                             \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* hidden (layers, N, E) and past (layers, N, K - 1, D) move on by one step; logits (N, V).                        \
       scratch: N * (2D + 2E + F) floats. ids: tokens below the embedding's rows. */                                   \
    void decode_step_##TYPE(const Shape *s, const Layer *layers, const float *embedding, const float *last_norm,       \
                            const void *to_logits, const int64_t *ids, float *hidden, float *past, float *logits,      \
                            float *scratch) {                                                                          \
        int64_t N = s->N, D = s->D, E = s->E, F = s->F;                                                                \
        float *x = scratch, *normal = x + N * D, *projected = normal + N * D, *wide = projected + N * 2 * E;           \
        for (int64_t n = 0; n < N; n++) memcpy(x + n * D, embedding + ids[n] * D, D * sizeof(float));                  \
        _Pragma("omp parallel") for (int64_t l = 0; l < s->layers; l++) {                                              \
            const Layer *layer = layers + l;                                                                           \
            int64_t from, to;                                                                                          \
            if (s->K) {                                                                                                \
                convolve(layer, x, past + l * N * (s->K - 1) * D, normal, s);                                          \
                _Pragma("omp barrier") apply_##TYPE(layer->pointwise, layer->pointwise_bias, normal, x, D, D, N, 0, 1); \
                _Pragma("omp barrier")                                                                                 \
            }                                                                                                          \
            normalise(x, layer->norm, normal, s);                                                                      \
            _Pragma("omp barrier") apply_##TYPE(layer->hidden_and_gate, 0, normal, projected, 2 * E, D, N, 0, 0);      \
            _Pragma("omp barrier") share(E, 16, &from, &to);                                                           \
            for (int64_t n = 0; n < N; n++) {                                                                          \
                float *h = hidden + (l * N + n) * E, *candidate = projected + n * 2 * E, *gate = candidate + E;        \
                for (int64_t e = from; e < to; e++) {                                                                  \
                    float g = candidate[e] >= 0.0f ? candidate[e] + 0.5f : sigmoid(candidate[e]);                      \
                    h[e] = sigmoid(-gate[e]) * h[e] + sigmoid(gate[e]) * g;                                            \
                    if (!layer->out) x[n * D + e] += h[e];                                                             \
                }                                                                                                      \
            }                                                                                                          \
            _Pragma("omp barrier") if (layer->out) {                                                                   \
                apply_##TYPE(layer->out, 0, hidden + l * N * E, x, D, E, N, 0, 1);                                     \
                _Pragma("omp barrier")                                                                                 \
            }                                                                                                          \
            if (F) {                                                                                                   \
                normalise(x, layer->ff_norm, normal, s);                                                               \
                _Pragma("omp barrier") apply_##TYPE(layer->up, layer->up_bias, normal, wide, F, D, N, 1, 0);           \
                _Pragma("omp barrier") apply_##TYPE(layer->down, layer->down_bias, wide, x, D, F, N, 0, 1);            \
                _Pragma("omp barrier")                                                                                 \
            }                                                                                                          \
            if (l + 1 == s->layers) {                                                                                  \
                normalise(x, last_norm, normal, s);                                                                    \
                _Pragma("omp barrier") apply_##TYPE(to_logits, 0, normal, logits, s->V, D, N, 0, 0);                   \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE(float)
DEFINE(bf16)
