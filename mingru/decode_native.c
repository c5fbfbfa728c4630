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

/* Sixteen float32, anywhere in memory; as many pairs of bfloat16; and as many bfloat16. */
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint32_t Pairs __attribute__((vector_size(64), aligned(2), may_alias));
typedef bf16 Halves __attribute__((vector_size(32), aligned(2), may_alias));

static inline Floats floats_of_float(const float *p) { return *(const Floats *)p; }

static inline Floats floats_of_bf16(const bf16 *p) {
    return (Floats)(__builtin_convertvector(*(const Halves *)p, Words) << 16);
}

/* The numbers of v at the given places. */
#ifdef __clang__
#define TURNED(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
typedef int32_t Places __attribute__((vector_size(64)));
#define TURNED(v, ...) __builtin_shuffle(v, (Places){__VA_ARGS__})
#endif

static inline float total(Floats v) {
    v += TURNED(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += TURNED(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += TURNED(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v += TURNED(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return v[0];
}

/* A row of a matrix times a lone lane's x, four sums in flight. The processor fetches ahead by itself. */
static inline float dot_float(const float *restrict w, const float *restrict x, int64_t columns, const float *soon) {
    (void)soon;
    Floats sum[4] = {{0}};
    int64_t i = 0;
    for (; i + 64 <= columns; i += 64)
        for (int k = 0; k < 4; k++) sum[k] += floats_of_float(w + i + 16 * k) * floats_of_float(x + i + 16 * k);
    float rest = 0.0f;
    for (; i < columns; i++) rest += w[i] * x[i];
    return total((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

static inline const float *arrange_float(const float *x, float *space, int64_t columns) {
    (void)space, (void)columns;
    return x;
}

/* The same in bfloat16, two neighbours at a time: of 32 bits the upper half is the second as it is, the lower half,
   moved up, the first. x as arrange_bf16() leaves it. The row at `soon` is fetched meanwhile. */
static inline float dot_bf16(const bf16 *restrict w, const float *restrict x, int64_t columns, const bf16 *soon) {
    Floats first[2] = {{0}}, second[2] = {{0}};
    int64_t i = 0;
    for (; i + 64 <= columns; i += 64)
        for (int k = 0; k < 2; k++) {
            __builtin_prefetch(soon + i + 32 * k);
            Words pairs = *(const Pairs *)(w + i + 32 * k);
            first[k] += (Floats)(pairs << 16) * floats_of_float(x + i + 32 * k);
            second[k] += (Floats)(pairs & 0xffff0000u) * floats_of_float(x + i + 32 * k + 16);
        }
    float rest = 0.0f;
    for (; i < columns; i++) rest += load_bf16(w + i) * x[i];
    return total((first[0] + first[1]) + (second[0] + second[1])) + rest;
}

/* x in `space`, of each 32 numbers those with even places before the others, in blocks of 64; the rest as it was. */
static inline const float *arrange_bf16(const float *restrict x, float *restrict space, int64_t columns) {
    int64_t i = 0;
    for (; i + 64 <= columns; i += 64)
        for (int64_t half = i; half < i + 64; half += 32)
            for (int64_t j = 0; j < 16; j++) {
                space[half + j] = x[half + 2 * j];
                space[half + 16 + j] = x[half + 2 * j + 1];
            }
    memcpy(space + i, x + i, (columns - i) * sizeof(float));
    return space;
}

/* How many rows ahead of their use weights are fetched: an AMD reads the lines of a matrix faster when asked for them,
   which had cost a Xeon with AMX time (docs/performance.md). */
static int64_t rows_ahead(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") ? 12 : 0;
#else
    return 0;
#endif
}

/* A tile of a product, R rows by L lanes, K sums in flight of each: out[n * rows + r] = w[r] . x[n]. The R rows at
   `soon` are fetched meanwhile. */
#define TILE(TYPE, R, L, K)                                                                                            \
    static inline void tile_##TYPE##_##R##_by_##L(const TYPE *restrict w, const float *restrict x,                     \
                                                  float *restrict out, int64_t columns, int64_t rows,                  \
                                                  const TYPE *soon) {                                                  \
        Floats sum[R][L][K] = {{{{0}}}};                                                                               \
        int64_t i = 0;                                                                                                 \
        for (; i + 16 * K <= columns; i += 16 * K)                                                                     \
            for (int k = 0; k < K; k++)                                                                                \
                for (int r = 0; r < R; r++) {                                                                          \
                    int64_t at = r * columns + i + 16 * k;                                                             \
                    __builtin_prefetch(soon + at);                                                                     \
                    Floats weights = floats_of_##TYPE(w + at);                                                         \
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
    /* The rows from ... to of out (N, rows) = matrix x; x is (N, columns). next: what this thread reads after them,   \
       fetched towards their end; space: columns floats of this thread. */                                             \
    static void apply_##TYPE(const void *matrix, const float *x, float *out, int64_t from, int64_t to, int64_t rows,   \
                             int64_t columns, int64_t N, const TYPE *next, float *space) {                             \
        int64_t ahead = rows_ahead(), r = from;                                                                        \
        const TYPE *w = (const TYPE *)matrix + from * columns, *last = w + (to - from - ahead) * columns;              \
        for (; N > 1 && r + 4 <= to; r += 4, w += 4 * columns) {                                                       \
            const TYPE *soon = w < last ? w + ahead * columns : next + (w - last);                                     \
            int64_t n = 0;                                                                                             \
            for (; n + 4 <= N; n += 4)                                                                                 \
                tile_##TYPE##_4_by_4(w, x + n * columns, out + n * rows + r, columns, rows, n ? w : soon);             \
            for (; n < N; n++)                                                                                         \
                tile_##TYPE##_4_by_1(w, x + n * columns, out + n * rows + r, columns, rows, n ? w : soon);             \
        }                                                                                                              \
        if (N == 1) x = arrange_##TYPE(x, space, columns);                                                             \
        for (; r < to; r++, w += columns) {                                                                            \
            if (N == 1)                                                                                                \
                out[r] = dot_##TYPE(w, x, columns, w < last ? w + ahead * columns : next + (w - last));                \
            else                                                                                                       \
                for (int64_t n = 0; n < N; n++)                                                                        \
                    tile_##TYPE##_1_by_1(w, x + n * columns, out + n * rows + r, columns, rows, w);                    \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* hidden (layers, N, E) and past (layers, N, K - 1, D) move on by one step; logits (N, V). scratch:               \
       N * (3D + 2E + F) + threads * (N * D + max(D, E, F)) floats. ids: tokens below the embedding's rows. */         \
    void decode_step_##TYPE(const Shape *s, const Layer *layers, const float *embedding, const float *last_norm,       \
                            const void *to_logits, const int64_t *ids, float *hidden, float *past, float *logits,      \
                            float *scratch, int64_t threads) {                                                         \
        int64_t N = s->N, D = s->D, E = s->E, F = s->F, longest = D > E ? D : E;                                       \
        if (F > longest) longest = F;                                                                                  \
        float *x = scratch, *mixed = x + N * D, *branch = mixed + N * D, *projected = branch + N * D;                  \
        float *wide = projected + N * 2 * E, *own = wide + N * F;                                                      \
        for (int64_t n = 0; n < N; n++) memcpy(x + n * D, embedding + ids[n] * D, D * sizeof(float));                  \
        _Pragma("omp parallel num_threads(threads)") {                                                                 \
            float *normal = own + omp_get_thread_num() * (N * D + longest), *space = normal + N * D;                   \
            int64_t d, d_end, e, e_end, f, f_end, v, v_end; /* this thread's rows of matrices of D, E, F and V rows */ \
            share(D, 4, &d, &d_end), share(E, 16, &e, &e_end), share(F, 16, &f, &f_end), share(s->V, 4, &v, &v_end);   \
            for (const Layer *layer = layers, *end = layers + s->layers; layer < end; layer++) {                       \
                const TYPE *candidates = (const TYPE *)layer->hidden_and_gate + e * D, *gate = candidates + E * D;     \
                const TYPE *below = layer + 1 == end ? (const TYPE *)to_logits + v * D                                 \
                                    : s->K           ? (const TYPE *)layer[1].pointwise + d * D                        \
                                                     : (const TYPE *)layer[1].hidden_and_gate + e * D;                 \
                const TYPE *up = F ? (const TYPE *)layer->up + f * D : below;                                          \
                const TYPE *outward = layer->out ? (const TYPE *)layer->out + d * E : up;                              \
                float *h = hidden + (layer - layers) * N * E;                                                          \
                if (s->K) {                                                                                            \
                    convolve(layer, x, past + (layer - layers) * N * (s->K - 1) * D, mixed, s);                        \
                    _Pragma("omp barrier");                                                                            \
                    apply_##TYPE(layer->pointwise, mixed, branch, d, d_end, D, D, N, candidates, space);               \
                    add(x, branch, layer->pointwise_bias, d, d_end, s);                                                \
                    _Pragma("omp barrier");                                                                            \
                }                                                                                                      \
                normalise(x, layer->norm, normal, s);                                                                  \
                apply_##TYPE(layer->hidden_and_gate, normal, projected, e, e_end, 2 * E, D, N, gate, space);           \
                apply_##TYPE(layer->hidden_and_gate, normal, projected, E + e, E + e_end, 2 * E, D, N, outward,        \
                             space);                                                                                   \
                recur(projected, h, e, e_end, s);                                                                      \
                _Pragma("omp barrier");                                                                                \
                if (layer->out) {                                                                                      \
                    apply_##TYPE(layer->out, h, branch, d, d_end, D, E, N, up, space);                                 \
                    add(x, branch, 0, d, d_end, s);                                                                    \
                } else                                                                                                 \
                    add(x, h, 0, e, e_end, s);                                                                         \
                _Pragma("omp barrier");                                                                                \
                if (F) {                                                                                               \
                    normalise(x, layer->ff_norm, normal, s);                                                           \
                    const TYPE *down = (const TYPE *)layer->down + d * F;                                              \
                    apply_##TYPE(layer->up, normal, wide, f, f_end, F, D, N, down, space);                             \
                    through_gelu(wide, layer->up_bias, f, f_end, s);                                                   \
                    _Pragma("omp barrier");                                                                            \
                    apply_##TYPE(layer->down, wide, branch, d, d_end, D, F, N, below, space);                          \
                    add(x, branch, layer->down_bias, d, d_end, s);                                                     \
                    _Pragma("omp barrier");                                                                            \
                }                                                                                                      \
            }                                                                                                          \
            normalise(x, last_norm, normal, s);                                                                        \
            const TYPE *again = (const TYPE *)to_logits + v * D;                                                       \
            apply_##TYPE(to_logits, normal, logits, v, v_end, s->V, D, N, again, space);                               \
        }                                                                                                              \
    }

DEFINE(float)
DEFINE(bf16)
