/* Packed weights times the 16-bit integers that packed_input.c makes of x. Lanes hold TILE rows of the weight; columns are
   processed one after the other.

   For few rows of x, codes are extracted from words during the product, two columns per mask. For many rows, a run of columns
   is unpacked once into a panel. Either way the sums of a run are exact integers and are added to the result's floats in the
   same order. They do not overflow: RUN columns of |code - zero| <= 255 times 32767 are less than 2^31. */
#include "packed.h"
#include "threads.h"
#include "vec.h"

#if (defined(__AVX2__) && LANES == 8) || (defined(__AVX512BW__) && LANES == 16)
#include <immintrin.h>
#endif

/* Rows of x per block: 6 x 2 accumulators, 2 weights, 1 input and 1 product fit into 16 vector registers. */
#define BLOCK_ROWS 6

/* Rows of x that share one unpacked panel. */
#define PANEL_ROWS 96

typedef uint16_t vh __attribute__((vector_size(4 * LANES))); /* LANES pairs of columns */

/* Adds the two signed products of each lane to the sums. */
INLINE vi add_products(vi sums, vh pairs, vi x) {
#if defined(__AVX512BW__) && LANES == 16
    return (vi)_mm512_add_epi32((__m512i)sums, _mm512_madd_epi16((__m512i)pairs, (__m512i)x));
#elif defined(__AVX2__) && LANES == 8
    return (vi)_mm256_add_epi32((__m256i)sums, _mm256_madd_epi16((__m256i)pairs, (__m256i)x));
#else
    return sums + ((vi)pairs << 16 >> 16) * (x << 16 >> 16) + ((vi)pairs >> 16) * (x >> 16);
#endif
}

/* The codes of columns j and j + F/2 of each word, F = 32/bits. */
INLINE vh extract_pairs(vu word, int bits, int j) {
    const vh shifted = (vh)word >> bits * j;
    return bits * (j + 1) == 16 ? shifted : shifted & (uint16_t)((1u << bits) - 1);
}

/* Consecutive runs of equal length of one tile, and the same columns of some rows of x. */
typedef struct {
    const Matrix *weight;
    int64_t scales, zeros; /* indices of the tile's first scale and first word of zero points */
    int64_t group;         /* group of the first run */
    const uint32_t *words; /* packed, or pairs [runs * length / 2, TILE] with zero points subtracted */
    const int32_t *x;      /* pairs */
    const float *x_scales;
    const int32_t *x_sums;
    int64_t stride;        /* from one row of x to the next, in words */
    int64_t runs, length;
} TileRuns;

/* totals [rows, TILE] += scales * (sums - zero points * sums of x), for `vectors` vectors of one run from lane `part` on. With
   bits == 0 (unpacked), zero points have been subtracted already. */
INLINE void add_scaled_sums(int bits, int rows, int vectors, const TileRuns *p, int64_t run, int part,
                            vi sums[BLOCK_ROWS][TILE / LANES], float *totals) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
        const int n = part + v * LANES;
        const vf scale = load_scales(p->weight, p->scales + (p->group + run) * TILE + n);
        const vi zero = load_zeros(p->weight, p->zeros + n, p->group + run);
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            const int64_t x = m * p->stride + run;
            const vi sum = bits ? sums[m][v] - zero * p->x_sums[x] : sums[m][v];
            float *total = totals + m * TILE + n;
            store(total, load(total) + scale * p->x_scales[x] * __builtin_convertvector(sum, vf));
        }
    }
}

/* Adds the products of the runs to totals [rows, TILE]. bits (0: unpacked) and rows are compile-time constants. */
INLINE void add_runs(int bits, int rows, const TileRuns *p, float *totals) {
    const int pairs = bits ? 16 / bits : 1, vectors = rows == 1 ? TILE / LANES : 2;
    const int64_t steps = p->length / (2 * pairs);
    for (int part = 0; part < TILE; part += vectors * LANES)
        for (int64_t run = 0; run < p->runs; run++) {
            vi acc[BLOCK_ROWS][TILE / LANES] = {0};
            const uint32_t *words = p->words + run * steps * TILE + part;
            const int32_t *x = p->x + run * p->length / 2;
            for (int64_t step = 0; step < steps; step++, words += TILE, x += pairs) {
                if (bits) prefetch_words(words - part);
#pragma GCC unroll 8
                for (int j = 0; j < pairs; j++) {
                    vh weight[TILE / LANES];
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; v++)
                        weight[v] = bits ? extract_pairs(load_words(words + v * LANES), bits, j)
                                         : (vh)load_once(words + v * LANES);
#pragma GCC unroll 8
                    for (int m = 0; m < rows; m++) {
                        const vi input = x[m * p->stride + j] - (vi){0};
#pragma GCC unroll 8
                        for (int v = 0; v < vectors; v++) acc[m][v] = add_products(acc[m][v], weight[v], input);
                    }
                }
            }
            add_scaled_sums(bits, rows, vectors, p, run, part, acc, totals);
        }
}

typedef void AddRuns(const TileRuns *piece, float *totals);

#define INSTANCE(BITS, ROWS)                                                                                                \
    static NOINLINE void add_##BITS##_##ROWS(const TileRuns *piece, float *totals) { add_runs(BITS, ROWS, piece, totals); }
#define INSTANCES(BITS) INSTANCE(BITS, 1) INSTANCE(BITS, 2) INSTANCE(BITS, 3) INSTANCE(BITS, 4) INSTANCE(BITS, 5)
INSTANCES(0) INSTANCE(0, 6) INSTANCES(2) INSTANCES(4) INSTANCES(8)

/* By bits / 2 (0: unpacked) and rows of x. */
static AddRuns *const ADD_RUNS[5][BLOCK_ROWS + 1] = {
    {0, add_0_1, add_0_2, add_0_3, add_0_4, add_0_5, add_0_6},
    {0, add_2_1, add_2_2, add_2_3, add_2_4, add_2_5, 0},
    {0, add_4_1, add_4_2, add_4_3, add_4_4, add_4_5, 0},
    {0},
    {0, add_8_1, add_8_2, add_8_3, add_8_4, add_8_5, 0},
};

/* Unpacks the words of a run to pairs with zero points subtracted: panel [length / 2, TILE]. */
INLINE void unpack_words(int bits, const uint32_t *words, int64_t steps, const vh *zero, uint32_t *panel) {
    for (int64_t step = 0; step < steps; step++, words += TILE) {
        prefetch_words(words);
#pragma GCC unroll 8
        for (int j = 0; j < 16 / bits; j++)
            for (int v = 0; v < TILE / LANES; v++, panel += LANES) {
                const vh pairs = extract_pairs(load_words(words + v * LANES), bits, j) - zero[v];
                memcpy(panel, &pairs, sizeof pairs);
            }
    }
}

static void unpack_runs(int bits, const TileRuns *p, uint32_t *panel) {
    const int64_t steps = p->length * bits / 32;
    for (int64_t run = 0; run < p->runs; run++) {
        const uint32_t *words = p->words + run * steps * TILE;
        uint32_t *to = panel + run * p->length / 2 * TILE;
        vh zero[TILE / LANES];
        for (int v = 0; v < TILE / LANES; v++)
            zero[v] = (vh)(load_zeros(p->weight, p->zeros + v * LANES, p->group + run) * 0x10001);
        if (bits == 2) unpack_words(2, words, steps, zero, to);
        else if (bits == 4) unpack_words(4, words, steps, zero, to);
        else unpack_words(8, words, steps, zero, to);
    }
}

/* `add_runs` for m <= PANEL_ROWS rows of x. From BLOCK_ROWS rows on, the runs must have at most RUN columns in total. */
static void add_rows(int bits, const TileRuns *p, int64_t m, float *totals) {
    if (m < BLOCK_ROWS) {
        ADD_RUNS[bits / 2][m](p, totals);
        return;
    }
    uint32_t panel[RUN / 2 * TILE] __attribute__((aligned(64)));
    unpack_runs(bits, p, panel);
    TileRuns block = *p;
    block.words = panel;
    for (int64_t row = 0, rows; row < m; row += rows) {
        rows = even_block(m - row, BLOCK_ROWS);
        block.x = p->x + row * p->stride;
        block.x_scales = p->x_scales + row * p->stride;
        ADD_RUNS[0][rows](&block, totals + row * TILE);
    }
}

/* Multiplies all columns of a tile with m <= PANEL_ROWS rows of x: totals [m, TILE]. `p` starts at the tile's first run and is
   advanced past its last. It is changed in place because a copy would be read in wider words than it was written in: the load
   would have to wait for earlier stores, among them outputs whose cache lines another core holds. */
static void tile_totals(TileRuns *p, int64_t m, float *totals) {
    const Matrix *w = p->weight;
    const int64_t padded = padded_group(w), all = groups(w);
    const int64_t max_groups = m < BLOCK_ROWS ? all : max_i64(1, RUN / padded); /* groups per call of add_rows */
    memset(totals, 0, sizeof(float) * m * TILE);
    for (int64_t g = 0, count; g < all; g += count) {
        count = padded > RUN ? 1 : min_i64(max_groups, all - g);
        p->group = g;
        p->runs = count;
        for (int64_t k = 0; k < padded; k += RUN) {
            p->length = min_i64(RUN, padded - k);
            add_rows(w->bits, p, m, totals);
            p->words += count * p->length * w->bits / 32 * TILE;
            p->x += count * p->length / 2;
            p->x_scales += count;
            p->x_sums += count;
        }
    }
}

/* out = totals + bias, for the first `count` of TILE rows of the weight. */
static void store_row(const float *totals, const float *bias, int64_t count, float *out) {
    if (!bias) memcpy(out, totals, sizeof(float) * count);
    else
        for (int64_t n = 0; n < count; n++) out[n] = totals[n] + bias[n];
}

void packed_share(const Matrix *w, const float *prepared, int64_t m, float *out) {
    const int64_t stride = prepared_floats(w);
    float totals[PANEL_ROWS * TILE] __attribute__((aligned(64)));
    for (Range r = thread_range((w->rows + TILE - 1) / TILE); r.first < r.last; r.first++) {
        const int64_t base = r.first * TILE, count = min_i64(TILE, w->rows - base);
        for (int64_t row = 0, rows; row < m; row += rows) {
            rows = min_i64(PANEL_ROWS, m - row);
            const float *x = prepared + row * stride, *x_scales = x + padded_columns(w) / 2;
            TileRuns piece = {.weight = w, .scales = tile_scales(w, r.first), .zeros = tile_zeros(w, r.first),
                           .words = (const uint32_t *)w->data + r.first * tile_words(w),
                           .x = (const int32_t *)x, .x_scales = x_scales,
                           .x_sums = (const int32_t *)x_scales + runs(w), .stride = stride};
            tile_totals(&piece, rows, totals);
            for (int64_t i = 0; i < rows; i++)
                store_row(totals + i * TILE, w->bias ? w->bias + base : NULL, count, out + (row + i) * w->rows + base);
        }
    }
}
