/* The MinGRU recurrence in linear space, forward and backward, straight from the projection (B, T, 2E): x and k side by
 * side on the last dimension. h_t = keep_t h_{t-1} + z_t g(x_t), with z = sigmoid(k), keep = 1 - z computed as
 * sigmoid(-k), and g(x) = x + 1/2 for x >= 0, else sigmoid(x). The state is float32 whatever the input's type.
 *
 * The backward pass computes the gates again and reads nothing but the inputs and h:
 *     G_t  = dL/dh_t + keep_{t+1} G_{t+1}
 *     dx_t = G_t z_t g'(x_t)
 *     dk_t = G_t z_t keep_t (g(x_t) - h_{t-1})
 * A reset at t makes keep_t and h_{t-1} zero there.
 *
 * Threads share lanes and blocks of channels; a thread walks through time with the block's state in its first-level
 * cache, and the compiler vectorises over the block's channels. All arrays are contiguous.
 */
#include "elementwise.h"

#define BLOCK 1024     /* most channels of a block: its float32 state is 4 KiB */
#define LEAST_BLOCK 64 /* no finer: a block's row of float32 fills whole cache lines */

#define DEFINE(TYPE)                                                                                                   \
    static void forward_row_##TYPE(const TYPE *restrict x, const TYPE *restrict k, float alive, float *restrict state, \
                                   TYPE *restrict h, int64_t width) {                                                  \
        for (int64_t e = 0; e < width; e++) {                                                                          \
            float xe = load_##TYPE(x + e), z, keep, low;                                                               \
            gates(xe, load_##TYPE(k + e), &z, &keep, &low);                                                            \
            float g = xe >= 0.0f ? xe + 0.5f : low;                                                                    \
            state[e] = keep * alive * state[e] + z * g;                                                                \
            store_##TYPE(h + e, state[e]);                                                                             \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static void backward_row_##TYPE(const TYPE *restrict dh, const TYPE *restrict x, const TYPE *restrict k,           \
                                    float alive, const float *restrict before, float *restrict carried,                \
                                    TYPE *restrict dx, TYPE *restrict dk, int64_t width) {                             \
        for (int64_t e = 0; e < width; e++) {                                                                          \
            float xe = load_##TYPE(x + e), z, keep, low;                                                               \
            gates(xe, load_##TYPE(k + e), &z, &keep, &low);                                                            \
            float g = xe >= 0.0f ? xe + 0.5f : low, slope = xe >= 0.0f ? 1.0f : low * (1.0f - low);                    \
            float total = load_##TYPE(dh + e) + carried[e], through = total * z;                                       \
            carried[e] = total * keep * alive;                                                                         \
            store_##TYPE(dx + e, through * slope);                                                                     \
            store_##TYPE(dk + e, through * keep * (g - alive * before[e]));                                            \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    void scan_forward_##TYPE(const TYPE *projected, const float *first, const uint8_t *reset, TYPE *h, float *last,    \
                             int64_t B, int64_t T, int64_t E, int64_t block) {                                         \
        int64_t blocks = (E + block - 1) / block;                                                                      \
        _Pragma("omp parallel for collapse(2) schedule(static)") for (int64_t b = 0; b < B; b++) {                     \
            for (int64_t i = 0; i < blocks; i++) {                                                                     \
                int64_t e = i * block, width = E - e < block ? E - e : block;                                          \
                float state[BLOCK] = {0};                                                                              \
                if (first) memcpy(state, first + b * E + e, width * sizeof(float));                                    \
                for (int64_t t = 0; t < T; t++) {                                                                      \
                    int64_t row = b * T + t;                                                                           \
                    const TYPE *x = projected + row * 2 * E + e;                                                       \
                    float alive = reset && reset[row] ? 0.0f : 1.0f;                                                   \
                    forward_row_##TYPE(x, x + E, alive, state, h + row * E + e, width);                                \
                }                                                                                                      \
                memcpy(last + b * E + e, state, width * sizeof(float));                                                \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    void scan_backward_##TYPE(const TYPE *dh, const float *grad_last, const TYPE *projected, const TYPE *h,            \
                              const float *first, const uint8_t *reset, TYPE *grad_projected, float *grad_first,       \
                              int64_t B, int64_t T, int64_t E, int64_t block) {                                        \
        int64_t blocks = (E + block - 1) / block;                                                                      \
        _Pragma("omp parallel for collapse(2) schedule(static)") for (int64_t b = 0; b < B; b++) {                     \
            for (int64_t i = 0; i < blocks; i++) {                                                                     \
                int64_t e = i * block, width = E - e < block ? E - e : block;                                          \
                float carried[BLOCK], before[BLOCK] = {0};                                                             \
                memcpy(carried, grad_last + b * E + e, width * sizeof(float));                                         \
                for (int64_t t = T - 1; t >= 0; t--) {                                                                 \
                    int64_t row = b * T + t;                                                                           \
                    const TYPE *x = projected + row * 2 * E + e;                                                       \
                    TYPE *dx = grad_projected + row * 2 * E + e;                                                       \
                    float alive = reset && reset[row] ? 0.0f : 1.0f;                                                   \
                    for (int64_t c = 0; c < width; c++)                                                                \
                        before[c] = t ? load_##TYPE(h + (row - 1) * E + e + c) : first ? first[b * E + e + c] : 0.0f;  \
                    backward_row_##TYPE(dh + row * E + e, x, x + E, alive, before, carried, dx, dx + E, width);        \
                }                                                                                                      \
                memcpy(grad_first + b * E + e, carried, width * sizeof(float));                                        \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE(float)
DEFINE(bf16)

/* Channels of a block, such that `threads` threads have about equal work. */
int64_t scan_block(int64_t B, int64_t E, int64_t threads) {
    int64_t blocks = B ? (threads + B - 1) / B : 1;
    int64_t block = (E + blocks - 1) / blocks;
    block = (block + LEAST_BLOCK - 1) / LEAST_BLOCK * LEAST_BLOCK;
    return block > BLOCK ? BLOCK : block;
}
