/* One decoding step of the whole language model for a few lanes: every weight is read once, nothing else of size is.
 *
 * N lanes, D width, E inner width, F width of the feed-forward (0: none), K taps of the convolution (0: none), V
 * tokens.
 * Matrices are float32 or bfloat16, (rows, columns) and contiguous; vectors and all activations are float32.
 * The threads of one parallel region share the rows of each matrix and meet at barriers between the phases: what a
 * phase needs of one vector each thread computes for itself where that is less work than a barrier.
 */
#include <math.h>
#include <omp.h>

#include "elementwise.h"

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

static inline void share(int64_t count, int64_t grain, int64_t *from, int64_t *to) {
    int64_t grains = (count + grain - 1) / grain, threads = omp_get_num_threads(), me = omp_get_thread_num();
    *from = grains * me / threads * grain;
    *to = grains * (me + 1) / threads * grain;
    if (*to > count) *to = count;
}

/* normal (N, D) = x / rms(x) * weight, all of it. */
static void normalise(const float *restrict x, const float *restrict weight, float *restrict normal, const Shape *s) {
    for (int64_t n = 0; n < s->N; n++) {
        const float *row = x + n * s->D;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < s->D; d++) sum += row[d] * row[d];
        float scale = 1.0f / sqrtf(sum / s->D + s->epsilon);
        for (int64_t d = 0; d < s->D; d++) normal[n * s->D + d] = row[d] * scale * weight[d];
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

/* The state's units from ... to move on by one step; projected (N, 2E): candidates, then gates. */
static void recur(const float *projected, float *hidden, int64_t from, int64_t to, const Shape *s) {
    for (int64_t n = 0; n < s->N; n++) {
        const float *restrict candidate = projected + n * 2 * s->E, *restrict gate = candidate + s->E;
        float *restrict h = hidden + n * s->E;
        for (int64_t e = from; e < to; e++) {
            float z, keep, low;
            gates(candidate[e], gate[e], &z, &keep, &low);
            h[e] = keep * h[e] + z * (candidate[e] >= 0.0f ? candidate[e] + 0.5f : low);
        }
    }
}

/* wide = gelu(wide + bias) in the rows from ... to of N vectors. */
static void through_gelu(float *restrict wide, const float *restrict bias, int64_t from, int64_t to, const Shape *s) {
    for (int64_t n = 0; n < s->N; n++)
        for (int64_t f = from; f < to; f++) {
            float v = wide[n * s->F + f] + bias[f], e;
            wide[n * s->F + f] = v * normal_cdf(v, &e);
        }
}

/* x += branch + bias (NULL: none) in the rows from ... to of N vectors. */
static void add(float *restrict x, const float *restrict branch, const float *restrict bias, int64_t from, int64_t to,
                const Shape *s) {
    for (int64_t n = 0; n < s->N; n++)
        for (int64_t d = from; d < to; d++) x[n * s->D + d] += branch[n * s->D + d] + (bias ? bias[d] : 0.0f);
}

/* Sixteen float32, anywhere in memory; and as many bfloat16. */
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef bf16 Halves __attribute__((vector_size(32), aligned(2), may_alias));

static inline Floats floats_of_float(const float *p) { return *(const Floats *)p; }

static inline Floats floats_of_bf16(const bf16 *p) {
    return (Floats)(__builtin_convertvector(*(const Halves *)p, Words) << 16);
}

static inline float total(Floats v) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < 16; i++) sum += v[i];
    return sum;
}

/* How many rows ahead of their use the weights are fetched: a Zen 5 reads the lines of a matrix faster when asked for
   them, which had cost a Xeon with AMX time (docs/performance.md). */
static int64_t rows_ahead(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") ? 12 : 0;
#else
    return 0;
#endif
}

/* A tile of a product, R rows by L lanes, K sums in flight of each: out[n * rows + r] = w[r] . x[n]. The weights that
   lie `ahead` items further on are fetched meanwhile. */
#define TILE(TYPE, R, L, K)                                                                                            \
    static inline void tile_##TYPE##_##R##_by_##L(const TYPE *restrict w, const float *restrict x,                     \
                                                  float *restrict out, int64_t columns, int64_t rows, int64_t ahead) { \
        Floats sum[R][L][K] = {{{{0}}}};                                                                               \
        int64_t i = 0;                                                                                                 \
        for (; i + 16 * K <= columns; i += 16 * K)                                                                     \
            for (int k = 0; k < K; k++)                                                                                \
                for (int r = 0; r < R; r++) {                                                                          \
                    const TYPE *p = w + r * columns + i + 16 * k;                                                      \
                    __builtin_prefetch(p + ahead);                                                                     \
                    Floats weights = floats_of_##TYPE(p);                                                              \
                    for (int n = 0; n < L; n++)                                                                        \
                        sum[r][n][k] += weights * floats_of_float(x + n * columns + i + 16 * k);                       \
                }                                                                                                      \
        for (int n = 0; n < L; n++)                                                                                    \
            for (int r = 0; r < R; r++) {                                                                              \
                Floats all = sum[r][n][0];                                                                             \
                for (int k = 1; k < K; k++) all += sum[r][n][k];                                                       \
                float rest = 0.0f;                                                                                     \
                for (int64_t j = i; j < columns; j++) rest += load_##TYPE(w + r * columns + j) * x[n * columns + j];   \
                out[n * rows + r] = total(all) + rest;                                                                 \
            }                                                                                                          \
    }

#define DEFINE(TYPE)                                                                                                   \
    TILE(TYPE, 4, 4, 1)                                                                                                \
    TILE(TYPE, 4, 1, 2)                                                                                                \
    TILE(TYPE, 1, 1, 4)                                                                                                \
                                                                                                                       \
    /* The rows from ... to of out (N, rows) = matrix x; x is (N, columns). A lone lane of float32 is bound by memory, \
       which likes to be read in one go, row by row; one of bfloat16 reads x once for four rows. */                    \
    static void apply_##TYPE(const void *matrix, const float *x, float *out, int64_t from, int64_t to, int64_t rows,   \
                             int64_t columns, int64_t N) {                                                             \
        int64_t ahead = rows_ahead() * columns, r = from;                                                              \
        for (; r + 4 <= to && (N > 1 || sizeof(TYPE) == 2); r += 4) {                                                  \
            const TYPE *w = (const TYPE *)matrix + r * columns;                                                        \
            int64_t n = 0;                                                                                             \
            for (; n + 4 <= N; n += 4)                                                                                 \
                tile_##TYPE##_4_by_4(w, x + n * columns, out + n * rows + r, columns, rows, n ? 0 : ahead);            \
            for (; n < N; n++)                                                                                         \
                tile_##TYPE##_4_by_1(w, x + n * columns, out + n * rows + r, columns, rows, n ? 0 : ahead);            \
        }                                                                                                              \
        for (; r < to; r++)                                                                                            \
            for (int64_t n = 0; n < N; n++)                                                                            \
                tile_##TYPE##_1_by_1((const TYPE *)matrix + r * columns, x + n * columns, out + n * rows + r, columns, \
                                     rows, n ? 0 : ahead);                                                             \
    }                                                                                                                  \
                                                                                                                       \
    /* hidden (layers, N, E) and past (layers, N, K - 1, D) move on by one step; logits (N, V).                        \
       scratch: N * (3D + 2E + F + D threads) floats. ids: tokens below the embedding's rows. */                       \
    void decode_step_##TYPE(const Shape *s, const Layer *layers, const float *embedding, const float *last_norm,       \
                            const void *to_logits, const int64_t *ids, float *hidden, float *past, float *logits,      \
                            float *scratch, int64_t threads) {                                                         \
        int64_t N = s->N, D = s->D, E = s->E, F = s->F;                                                                \
        float *x = scratch, *mixed = x + N * D, *branch = mixed + N * D, *projected = branch + N * D;                  \
        float *wide = projected + N * 2 * E, *normals = wide + N * F;                                                  \
        for (int64_t n = 0; n < N; n++) memcpy(x + n * D, embedding + ids[n] * D, D * sizeof(float));                  \
        _Pragma("omp parallel num_threads(threads)") {                                                                 \
            float *normal = normals + omp_get_thread_num() * N * D;                                                    \
            int64_t from, to;                                                                                          \
            for (const Layer *layer = layers; layer < layers + s->layers; layer++) {                                   \
                float *h = hidden + (layer - layers) * N * E;                                                          \
                if (s->K) {                                                                                            \
                    convolve(layer, x, past + (layer - layers) * N * (s->K - 1) * D, mixed, s);                        \
                    share(D, 4, &from, &to);                                                                           \
                    _Pragma("omp barrier") apply_##TYPE(layer->pointwise, mixed, branch, from, to, D, D, N);           \
                    add(x, branch, layer->pointwise_bias, from, to, s);                                                \
                    _Pragma("omp barrier")                                                                             \
                }                                                                                                      \
                normalise(x, layer->norm, normal, s);                                                                  \
                share(E, 16, &from, &to);                                                                              \
                apply_##TYPE(layer->hidden_and_gate, normal, projected, from, to, 2 * E, D, N);                        \
                apply_##TYPE(layer->hidden_and_gate, normal, projected, E + from, E + to, 2 * E, D, N);                \
                recur(projected, h, from, to, s);                                                                      \
                _Pragma("omp barrier") if (layer->out) {                                                               \
                    share(D, 4, &from, &to);                                                                           \
                    apply_##TYPE(layer->out, h, branch, from, to, D, E, N);                                            \
                    add(x, branch, 0, from, to, s);                                                                    \
                }                                                                                                      \
                else add(x, h, 0, from, to, s);                                                                        \
                _Pragma("omp barrier") if (F) {                                                                        \
                    normalise(x, layer->ff_norm, normal, s);                                                           \
                    share(F, 16, &from, &to);                                                                          \
                    apply_##TYPE(layer->up, normal, wide, from, to, F, D, N);                                          \
                    through_gelu(wide, layer->up_bias, from, to, s);                                                   \
                    share(D, 4, &from, &to);                                                                           \
                    _Pragma("omp barrier") apply_##TYPE(layer->down, wide, branch, from, to, D, F, N);                 \
                    add(x, branch, layer->down_bias, from, to, s);                                                     \
                    _Pragma("omp barrier")                                                                             \
                }                                                                                                      \
            }                                                                                                          \
            normalise(x, last_norm, normal, s);                                                                        \
            share(s->V, 4, &from, &to);                                                                                \
            apply_##TYPE(to_logits, normal, logits, from, to, s->V, D, N);                                             \
        }                                                                                                              \
    }

DEFINE(float)
DEFINE(bf16)
