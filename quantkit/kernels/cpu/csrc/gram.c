/* Products of bfloat16 matrices over their rows, X^T Y, added to float32 sums: what calibration spends most of its time on.

   Processors with AVX512_BF16 multiply two pairs of bfloat16 numbers per lane and add both products in float32. A product of two
   bfloat16 numbers is exact in float32, so nothing is rounded but the sums. The instruction treats subnormal numbers as zero.

   Every sum takes its terms in one fixed order: CHUNK pairs of rows from zero, and then that partial sum. The result therefore
   does not depend on threads, nor on the columns that are asked for in one call. */
#include "threads.h"
#include "vec.h"

/* Columns per panel of the packed layout, and rows of the result per tile: 24 vectors of sums in 32 registers. */
#define PANEL 48
#define ROWS 8

/* Pairs of rows that are summed at once. A panel's share of them takes half of the first-level cache. */
#define CHUNK 128

typedef struct { const uint16_t *x; int64_t rows, columns; uint32_t *packed; } PackCall;

/* packed uint32 [ceil(columns / PANEL), ceil(rows / 2), PANEL]: each word holds a column of two successive rows, the first of
   them in the lower half. What lies outside x is zero. */
static void pack_body(void *argument) {
    const PackCall *c = argument;
    const int64_t pairs = (c->rows + 1) / 2;
    static const uint16_t zeros[PANEL];
    for (Range r = thread_range((c->columns + PANEL - 1) / PANEL); r.first < r.last; r.first++) {
        const int64_t first = r.first * PANEL, count = min_i64(PANEL, c->columns - first);
        uint32_t *to = c->packed + r.first * pairs * PANEL;
        for (int64_t pair = 0; pair < pairs; pair++, to += PANEL) {
            const uint16_t *even = c->x + 2 * pair * c->columns + first;
            const uint16_t *odd = 2 * pair + 1 < c->rows ? even + c->columns : zeros;
            if (count == PANEL)
                for (int i = 0; i < PANEL; i++) to[i] = even[i] | (uint32_t)odd[i] << 16;
            else
                for (int i = 0; i < PANEL; i++) to[i] = i < count ? even[i] | (uint32_t)odd[i] << 16 : 0;
        }
    }
}

/* Size of a packed matrix in words. */
EXPORT int64_t quantkit_gram_words(int64_t rows, int64_t columns) {
    return round_up(columns, PANEL) * ((rows + 1) / 2);
}

/* x bfloat16 [rows, columns] -> packed uint32 [quantkit_gram_words(rows, columns)]. */
EXPORT void quantkit_gram_pack(const uint16_t *x, int64_t rows, int64_t columns, uint32_t *packed, int threads) {
    PackCall call = {x, rows, columns, packed};
    run_threads(pack_body, &call, (unsigned)threads);
}

#ifdef __AVX512BF16__
#include <immintrin.h>

typedef struct {
    const uint32_t *left, *right;
    int64_t rows, columns, first, last;
    int upper;
    float *sum;
} GramCall;

/* Adds the products of ROWS columns of `left` and PANEL columns of `right` over `pairs` pairs of rows to sum, of which `rows`
   rows, and the columns whose bits are set in `masks`, are stored. */
static NOINLINE void gram_tile(const uint32_t *left, const uint32_t *right, int64_t pairs, float *sum, int64_t stride,
                               int64_t rows, const __mmask16 *masks) {
    __m512 acc[ROWS][3];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
        for (int j = 0; j < 3; j++) {
            acc[i][j] = _mm512_setzero_ps();
            __builtin_prefetch(sum + i * stride + 16 * j, 1); /* the sums are added to after the loop */
        }
    for (int64_t pair = 0; pair < pairs; pair++, left += PANEL, right += PANEL) {
        __m512bh r[3];
#pragma GCC unroll 3
        for (int j = 0; j < 3; j++) r[j] = (__m512bh)_mm512_loadu_si512(right + 16 * j);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const __m512bh l = (__m512bh)_mm512_set1_epi32((int)left[i]);
#pragma GCC unroll 3
            for (int j = 0; j < 3; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], l, r[j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
        if (i >= rows) break;
#pragma GCC unroll 3
        for (int j = 0; j < 3; j++) {
            float *to = sum + i * stride + 16 * j;
            _mm512_mask_storeu_ps(to, masks[j], _mm512_add_ps(_mm512_maskz_loadu_ps(masks[j], to), acc[i][j]));
        }
    }
}

static void gram_body(void *argument) {
    const GramCall *c = argument;
    const int64_t pairs = (c->rows + 1) / 2;
    for (int64_t from = 0; from < pairs; from += CHUNK)
        for (int64_t panel = c->first / PANEL; panel * PANEL < c->last; panel++) {
            const int64_t column = panel * PANEL, end = min_i64(column + PANEL, c->last), stop = c->upper ? end : c->columns;
            __mmask16 masks[3] = {0, 0, 0};
            for (int64_t i = max_i64(c->first, column); i < end; i++)
                masks[(i - column) / 16] |= (__mmask16)(1u << (i - column) % 16);
            for (Range r = thread_range((stop + ROWS - 1) / ROWS); r.first < r.last; r.first++) {
                const int64_t row = r.first * ROWS;
                gram_tile(c->left + (row / PANEL * pairs + from) * PANEL + row % PANEL, c->right + (panel * pairs + from) * PANEL,
                          min_i64(CHUNK, pairs - from), c->sum + row * c->columns + column, c->columns,
                          min_i64(ROWS, stop - row), masks);
            }
        }
}

/* Adds X^T Y to sum [columns, columns], in columns first .. last-1 only. left and right are X and Y [rows, columns], packed.
   upper: of these columns, only what lies on and above the diagonal is needed; values below it are undefined. */
EXPORT void quantkit_gram_add(const uint32_t *left, const uint32_t *right, int64_t rows, int64_t columns, int64_t first,
                              int64_t last, int upper, float *sum, int threads) {
    GramCall call = {left, right, rows, columns, first, last, upper, sum};
    run_threads(gram_body, &call, (unsigned)threads);
}
#endif

/* Whether the processor that this was compiled for has the instruction. */
EXPORT int quantkit_gram_supported(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
