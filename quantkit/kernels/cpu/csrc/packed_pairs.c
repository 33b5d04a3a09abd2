/* The tile product by instructions that multiply 16-bit integers, or in plain C. Lanes hold rows of the weight; columns are
   processed one after the other.

   For few rows of x, codes are extracted from words during the product, two columns per mask. For many rows, a run of columns
   is unpacked once into a panel. */
#include "packed_tile.h"

#if !HAS_BYTE_DOT

/* Rows of x per block: 6 x 2 accumulators, 2 weights, 1 input and 1 product fit into 16 vector registers. */
#define BLOCK_ROWS 6

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

/* totals [rows, TILE] += scales * x's scales * sums, for `vectors` vectors of one run from lane `first` on. rows and vectors are
   compile-time constants. Pointers are copied from *p beforehand: as far as the compiler knows, a store to `totals` may change
   them. */
INLINE void add_scaled(const TileRuns *p, int64_t run, int rows, int first, int vectors,
                       const vi sums[BLOCK_ROWS][TILE / LANES], float *totals) {
    const float *x_scales = p->x_scales + run;
    const int64_t stride = p->stride;
    vf scales[TILE / LANES];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++)
        scales[v] = load_scales(p->weight, p->scales + (p->group + run) * TILE + first + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
        const vf x_scale = splat(x_scales[m * stride]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            float *total = totals + m * TILE + first + v * LANES;
            store(total, load(total) + scales[v] * x_scale * __builtin_convertvector(sums[m][v], vf));
        }
    }
}

/* Adds the products of the runs to totals [rows, TILE]. bits (0: unpacked), rows and own_zeros are compile-time constants. */
INLINE void add_runs(int bits, int rows, int own_zeros, const TileRuns *p, float *totals) {
    const int pairs = bits ? 16 / bits : 1, vectors = rows == 1 ? TILE / LANES : 2;
    const int64_t steps = p->length / (2 * pairs);
    for (int part = 0; part < TILE; part += vectors * LANES)
        for (int64_t run = 0; run < p->runs; run++) {
            vi acc[BLOCK_ROWS][TILE / LANES];
#pragma GCC unroll 8
            for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
                for (int v = 0; v < vectors; v++) acc[m][v] = first_sums(own_zeros, p, run, m, part + v * LANES);
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
            add_scaled(p, run, rows, part, vectors, acc, totals);
        }
}

typedef void AddRuns(const TileRuns *runs, float *totals);

#define INSTANCE(BITS, ROWS)                                                                                                \
    static NOINLINE void add_##BITS##_##ROWS(const TileRuns *runs, float *totals) {                                         \
        if (runs->weight->zeros) add_runs(BITS, ROWS, 1, runs, totals);                                                     \
        else add_runs(BITS, ROWS, 0, runs, totals);                                                                         \
    }
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

/* Unpacks the words of the runs to pairs: panel [runs * length / 2, TILE]. bits is a compile-time constant. */
INLINE void unpack_words(int bits, const TileRuns *p, uint32_t *panel) {
    const uint32_t *words = p->words, *end = words + p->runs * p->length * bits / 32 * TILE;
    for (; words < end; words += TILE) {
        prefetch_words(words);
#pragma GCC unroll 8
        for (int j = 0; j < 16 / bits; j++)
            for (int v = 0; v < TILE / LANES; v++, panel += LANES) {
                const vh pairs = extract_pairs(load_words(words + v * LANES), bits, j);
                memcpy(panel, &pairs, sizeof pairs);
            }
    }
}

static void unpack_runs(const TileRuns *p, uint32_t *panel) {
    if (p->weight->bits == 2) unpack_words(2, p, panel);
    else if (p->weight->bits == 4) unpack_words(4, p, panel);
    else unpack_words(8, p, panel);
}

int64_t groups_at_once(int64_t m, int64_t padded, int64_t all) { return m < BLOCK_ROWS ? all : max_i64(1, RUN / padded); }

void add_rows(const TileRuns *p, int64_t m, float *totals) {
    if (m < BLOCK_ROWS) {
        ADD_RUNS[p->weight->bits / 2][m](p, totals);
        return;
    }
    uint32_t panel[RUN / 2 * TILE] __attribute__((aligned(64)));
    unpack_runs(p, panel);
    TileRuns block = *p;
    block.words = panel;
    for (int64_t row = 0, rows; row < m; row += rows) {
        rows = even_block(m - row, BLOCK_ROWS);
        move_to_row(&block, p, row);
        ADD_RUNS[0][rows](&block, totals + row * TILE);
    }
}

#endif
