/* Dense weights, row-major as in a checkpoint: lanes run along the columns, several rows at a time. */
#include "dense.h"
#include "threads.h"
#include "vec.h"

/* Multiplies `count` rows of a dense weight with `rows` rows of x over 2 * LANES columns. */
INLINE void dense_step(int type, int count, int rows, const char *weight, int64_t weight_stride, const float *x,
                       int64_t x_stride, vf acc[8][4]) {
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) {
        const char *from = weight + i * weight_stride;
        vu words = load_words(from);
        vf low = type == F32 ? (vf)words : even_elements(words, type);
        vf high = type == F32 ? load((const float *)from + LANES) : odd_elements(words, type);
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            acc[i][m] += low * load(x + m * x_stride);
            acc[i][m] += high * load(x + m * x_stride + LANES);
        }
    }
}

/* Multiplies rows n .. n+count-1 of a dense weight with `rows` rows of x. The last columns are copied and padded with zeros,
   because the next row follows them in memory. type, count and rows are compile-time constants of each instance. */
INLINE void dense_block(int type, int count, int rows, const Matrix *w, int64_t n, const float *x, int64_t x_stride,
                        float *out, int64_t out_stride) {
    enum { STEP = 2 * LANES };
    const int64_t size = type == F32 ? 4 : 2, whole = w->columns / STEP * STEP, stride = w->columns * size;
    const char *weight = (const char *)w->data + n * stride;
    vf acc[8][4];
#pragma GCC unroll 8
    for (int i = 0; i < count; i++)
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) acc[i][m] = (vf){0};
    for (int64_t k = 0; k < whole; k += STEP) {
        const char *from = weight + k * size;
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) __builtin_prefetch(from + (count + i) * stride); /* the next rows */
        dense_step(type, count, rows, from, stride, x + k, x_stride, acc);
    }
    if (whole < w->columns) {
        char tail[8 * STEP * 4] = {0};
        for (int i = 0; i < count; i++)
            memcpy(tail + i * STEP * 4, weight + i * stride + whole * size, (w->columns - whole) * size);
        dense_step(type, count, rows, tail, STEP * 4, x + whole, x_stride, acc);
    }
#pragma GCC unroll 8
    for (int i = 0; i < count; i++)
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++)
            out[m * out_stride + n + i] = lane_sum(acc[i][m]) + (w->bias ? w->bias[n + i] : 0.0f);
}

typedef void DenseBlock(const Matrix *w, int64_t n, const float *x, int64_t x_stride, float *out, int64_t out_stride);

#define DENSE(TYPE, COUNT, ROWS)                                                                                            \
    static NOINLINE void dense_##TYPE##_##COUNT##_##ROWS(const Matrix *w, int64_t n, const float *x, int64_t x_stride,      \
                                                         float *out, int64_t out_stride) {                                  \
        dense_block(TYPE, COUNT, ROWS, w, n, x, x_stride, out, out_stride);                                                 \
    }
#define DENSE_TYPE(TYPE)                                                                                                    \
    DENSE(TYPE, 1, 1) DENSE(TYPE, 1, 2) DENSE(TYPE, 1, 3) DENSE(TYPE, 1, 4) DENSE(TYPE, 8, 1) DENSE(TYPE, 4, 2)             \
    DENSE(TYPE, 3, 1) DENSE(TYPE, 3, 2) DENSE(TYPE, 3, 3) DENSE(TYPE, 3, 4)
#define DENSE_TABLE(TYPE)                                                                                                   \
    {[1] = {0, dense_##TYPE##_1_1, dense_##TYPE##_1_2, dense_##TYPE##_1_3, dense_##TYPE##_1_4},                             \
     [3] = {0, dense_##TYPE##_3_1, dense_##TYPE##_3_2, dense_##TYPE##_3_3, dense_##TYPE##_3_4},                             \
     [4] = {0, 0, dense_##TYPE##_4_2}, [8] = {0, dense_##TYPE##_8_1}}
DENSE_TYPE(F32) DENSE_TYPE(BF16) DENSE_TYPE(F16)

/* By type, rows of the weight and rows of x; no instance has more than 12 sums. */
static DenseBlock *const DENSE_BLOCK[3][9][5] = {DENSE_TABLE(F32), DENSE_TABLE(BF16), DENSE_TABLE(F16)};

void prepare_dense(const Matrix *w, const float *x, float *prepared) {
    to_lane_order(w->type == F32 ? F32 : BF16, x, w->columns, 1, prepared);
}

void dense_share(const Matrix *w, const float *x, int64_t m, float *out) {
    const int64_t stride = prepared_floats(w), max_rows = m == 1 ? 8 : m == 2 ? 4 : 3;
    const Range share = thread_range(w->rows);
    for (int64_t n = share.first, count; n < share.last; n += count) {
        count = n + max_rows <= share.last ? max_rows : 1;
        for (int64_t row = 0; row < m; row += 4) {
            DenseBlock *block = DENSE_BLOCK[w->type][count][min_i64(4, m - row)];
            block(w, n, x + row * stride, stride, out + row * w->rows, w->rows);
        }
    }
}

void embed_row(int64_t type, const void *table, int64_t row, int64_t columns, float scale, float *out) {
    const uint16_t *halves = (const uint16_t *)table + row * columns;
    for (int64_t i = 0; i < columns; i++)
        out[i] = scale * (type == F32    ? ((const float *)table)[row * columns + i]
                          : type == BF16 ? from_bf16(halves[i])
                                         : from_half(halves[i]));
}
