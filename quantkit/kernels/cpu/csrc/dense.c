/* Dense weights, row-major as in a checkpoint: lanes run along the columns, several rows at a time.

   Where there is an instruction for products of bfloat16, inputs of bfloat16 weights are rounded to bfloat16, for any number of
   rows. All other inputs stay floats, and weights are converted to floats. Columns are summed in runs, and each run lane by
   lane: the order of a sum depends on the number of columns only. */
#include "dense.h"
#include "dot.h"
#include "threads.h"

/* Columns per step. */
#define STEP (2 * LANES)

/* Bytes of a row of the weight per run of columns: so few that a block of weights and a block of inputs stay in the
   first-level cache. */
#define RUN_BYTES 4096

/* Rows of x that go through all weights together: so few that a run of them stays in the second-level cache. */
#define PASS_ROWS 96

/* Rows of x per block, and rows of the weight for one and for more rows of x: their sums leave registers for operands. */
#define BLOCK_ROWS 4
enum { COUNT_1 = 8, COUNT = LANES == 16 ? 6 : 3, MOST_COUNT = 8 };

INLINE int rounds_inputs(int type) { return HAS_BF16_DOT && type == BF16; }
INLINE int64_t element_size(int type) { return type == F32 ? 4 : 2; }

/* One run of columns of some rows of a weight and of some prepared rows of x. Strides are in bytes, and so is the distance
   `next` to the weights that are multiplied after these. */
typedef struct {
    const char *weight, *x;
    int64_t weight_stride, x_stride, columns, next;
    const float *base; /* what the sums are added to: the sums of earlier runs, the bias, or NULL for nothing */
    int64_t base_stride;
    float *out;
    int64_t out_stride; /* in floats, and so is base_stride */
} DenseRun;

/* Multiplies `count` rows of the weight with `rows` rows of x over STEP columns. */
INLINE void dense_step(int type, int count, int rows, const char *weight, int64_t weight_stride, const char *x,
                       int64_t x_stride, vf acc[BLOCK_ROWS][MOST_COUNT]) {
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) {
        const char *from = weight + i * weight_stride;
        const vu words = load_words(from);
        if (rounds_inputs(type)) {
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) acc[m][i] = bf16_dot(acc[m][i], words, load_words(x + m * x_stride));
            continue;
        }
        const uint16_t *halves = (const uint16_t *)from;
        const vf low = type == F32 ? (vf)words : type == BF16 ? even_elements(words, BF16) : load_halves(halves);
        const vf high = type == F32    ? load((const float *)from + LANES)
                        : type == BF16 ? odd_elements(words, BF16)
                                       : load_halves(halves + LANES);
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            const float *input = (const float *)(x + m * x_stride);
            acc[m][i] += low * load(input);
            acc[m][i] += high * load(input + LANES);
        }
    }
}

/* out [rows, count] = base + `rows` rows of x times `count` rows of the weight. The last columns are copied and padded with
   zeros, because the next row follows them in memory. type, count and rows are compile-time constants. */
INLINE void dense_block(int type, int count, int rows, const DenseRun *r) {
    const int64_t size = element_size(type), x_size = rounds_inputs(type) ? 2 : 4, whole = r->columns / STEP * STEP;
    vf acc[BLOCK_ROWS][MOST_COUNT];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) acc[m][i] = (vf){0};
    for (int64_t k = 0; k < whole; k += STEP) {
        const char *from = r->weight + k * size;
#pragma GCC unroll 8
        for (int i = 0; i < count && rows < BLOCK_ROWS; i++) __builtin_prefetch(from + i * r->weight_stride + r->next);
        dense_step(type, count, rows, from, r->weight_stride, r->x + k * x_size, r->x_stride, acc);
    }
    if (whole < r->columns) {
        char tail[MOST_COUNT * STEP * 4] = {0};
        for (int i = 0; i < count; i++)
            memcpy(tail + i * STEP * 4, r->weight + i * r->weight_stride + whole * size, (r->columns - whole) * size);
        dense_step(type, count, rows, tail, STEP * 4, r->x + whole * x_size, r->x_stride, acc);
    }
    float sums[BLOCK_ROWS * MOST_COUNT + LANES];
#pragma GCC unroll 4
    for (int first = 0; first < rows * count; first += LANES) {
        vf part[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            part[i] = first + i < rows * count ? acc[(first + i) / count][(first + i) % count] : (vf){0};
        store(sums + first, lane_sums(part));
    }
    for (int m = 0; m < rows; m++)
        for (int i = 0; i < count; i++) {
            const float sum = sums[m * count + i];
            r->out[m * r->out_stride + i] = r->base ? r->base[m * r->base_stride + i] + sum : sum;
        }
}

typedef void DenseBlock(const DenseRun *run);

#define DENSE(TYPE, COUNT, ROWS)                                                                                            \
    static NOINLINE void dense_##TYPE##_##COUNT##_##ROWS(const DenseRun *run) { dense_block(TYPE, COUNT, ROWS, run); }
#define DENSE_TYPE(TYPE)                                                                                                    \
    DENSE(TYPE, 1, 1) DENSE(TYPE, 1, 2) DENSE(TYPE, 1, 3) DENSE(TYPE, 1, 4) DENSE(TYPE, COUNT_1, 1)                         \
    DENSE(TYPE, COUNT, 1) DENSE(TYPE, COUNT, 2) DENSE(TYPE, COUNT, 3) DENSE(TYPE, COUNT, 4)
#define DENSE_TABLE(TYPE)                                                                                                   \
    {{0, dense_##TYPE##_1_1, dense_##TYPE##_1_2, dense_##TYPE##_1_3, dense_##TYPE##_1_4},                                   \
     {0, dense_##TYPE##_COUNT_1_1},                                                                                         \
     {0, dense_##TYPE##_COUNT_1, dense_##TYPE##_COUNT_2, dense_##TYPE##_COUNT_3, dense_##TYPE##_COUNT_4}}
DENSE_TYPE(F32) DENSE_TYPE(BF16) DENSE_TYPE(F16)

/* By type; rows of the weight: 1, COUNT_1 or COUNT; and rows of x. */
static DenseBlock *const DENSE_BLOCK[3][3][BLOCK_ROWS + 1] = {DENSE_TABLE(F32), DENSE_TABLE(BF16), DENSE_TABLE(F16)};

/* Whether inputs of bfloat16 weights are rounded. */
EXPORT int quantkit_rounds_inputs(void) { return rounds_inputs(BF16); }

void prepare_dense(const Matrix *w, const float *x, float *prepared) {
    if (!rounds_inputs(w->type)) {
        to_lane_order(w->type == BF16 ? BF16 : F32, x, w->columns, 1, prepared);
        return;
    }
    for (int64_t k = 0; k < w->columns; k += STEP, prepared += LANES) {
        const vu words = round_to_bf16(load_partial(x + k, w->columns - k), load_partial(x + k + LANES, w->columns - k - LANES));
        memcpy(prepared, &words, sizeof words);
    }
}

/* Multiplies `count` rows of the weight from row n on with m prepared rows of x; `kind` selects the instances for `count`. */
static void multiply_rows(const Matrix *w, int64_t n, int64_t count, int kind, const float *prepared, int64_t m, float *out) {
    const int64_t size = element_size(w->type), x_size = rounds_inputs(w->type) ? 2 : 4, run_columns = RUN_BYTES / size;
    DenseRun run = {.weight_stride = w->columns * size, .x_stride = prepared_floats(w) * 4, .out_stride = w->rows};
    const char *weight = (const char *)w->data + n * run.weight_stride;
    for (int64_t k = 0; k < w->columns; k += run_columns) {
        run.weight = weight + k * size;
        run.columns = min_i64(run_columns, w->columns - k);
        run.next = k + run_columns < w->columns ? RUN_BYTES : count * run.weight_stride - k * size;
        run.base_stride = k ? w->rows : 0;
        for (int64_t row = 0, rows; row < m; row += rows) {
            rows = even_block(m - row, BLOCK_ROWS);
            run.x = (const char *)prepared + row * run.x_stride + k * x_size;
            run.out = out + row * w->rows + n;
            run.base = k ? run.out : w->bias ? w->bias + n : NULL;
            DENSE_BLOCK[w->type][kind][rows](&run);
        }
    }
}

void dense_share(const Matrix *w, const float *prepared, int64_t m, float *out) {
    const int64_t most = m == 1 ? COUNT_1 : COUNT;
    const Range share = thread_range(w->rows);
    for (int64_t row = 0, rows; row < m; row += rows) {
        rows = even_block(m - row, PASS_ROWS);
        for (int64_t n = share.first, count; n < share.last; n += count) {
            count = n + most <= share.last ? most : 1;
            multiply_rows(w, n, count, count == 1 ? 0 : m == 1 ? 1 : 2, prepared + row * prepared_floats(w), rows,
                          out + row * w->rows);
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
