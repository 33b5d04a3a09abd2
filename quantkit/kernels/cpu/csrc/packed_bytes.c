/* The tile product by instructions that multiply bytes. A 16-bit input is an upper and a lower byte, both signed; the codes are
   multiplied with each of them. One mask extracts four codes from every word, so that unpacking costs little next to the
   products for any number of rows, and weights are never unpacked to memory. */
#include "packed_tile.h"

#if HAS_BYTE_DOT

/* Rows of x per block: with two vectors of a tile and two bytes per input, that many sums fill most vector registers. */
#define BLOCK_ROWS (LANES == 16 ? 6 : 3)
#define MOST_BLOCK_ROWS 6

/* The codes of columns b * F/4 + j of each word, b = 0..3, F = 32/bits, minus CODE_SHIFT. */
INLINE vu extract_bytes(vu word, int bits, int j) {
    return bits == 8 ? word ^ CODE_SHIFT(8) * 0x01010101u : (word >> bits * j) & ((1u << bits) - 1) * 0x01010101u;
}

/* bits, rows and own_zeros are compile-time constants. */
INLINE void add_runs(int bits, int rows, int own_zeros, const TileRuns *p, float *totals) {
    const int quads = 8 / bits, vectors = 2;
    const int64_t steps = p->length / (4 * quads);
    for (int part = 0; part < TILE; part += vectors * LANES)
        for (int64_t run = 0; run < p->runs; run++) {
            vi upper[MOST_BLOCK_ROWS][2] = {0}, lower[MOST_BLOCK_ROWS][2];
#pragma GCC unroll 8
            for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
                for (int v = 0; v < vectors; v++) lower[m][v] = first_sums(own_zeros, p, run, m, part + v * LANES);
            const uint32_t *words = p->words + run * steps * TILE + part;
            const int32_t *x = p->x + run * p->length / 2;
            for (int64_t step = 0; step < steps; step++, words += TILE, x += 2 * quads) {
                prefetch_words(words - part);
#pragma GCC unroll 4
                for (int j = 0; j < quads; j++) {
                    vu codes[2];
#pragma GCC unroll 2
                    for (int v = 0; v < vectors; v++) codes[v] = extract_bytes(load_words(words + v * LANES), bits, j);
#pragma GCC unroll 8
                    for (int m = 0; m < rows; m++) {
                        const vi high = x[m * p->stride + 2 * j] - (vi){0}, low = x[m * p->stride + 2 * j + 1] - (vi){0};
#pragma GCC unroll 2
                        for (int v = 0; v < vectors; v++) {
                            upper[m][v] = byte_dot(upper[m][v], codes[v], high);
                            lower[m][v] = byte_dot(lower[m][v], codes[v], low);
                        }
                    }
                }
            }
#pragma GCC unroll 8
            for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
                for (int v = 0; v < vectors; v++) lower[m][v] += upper[m][v] << 8;
            add_scaled(p, run, rows, part, vectors, 2, lower[0], totals);
        }
}

typedef void AddRuns(const TileRuns *runs, float *totals);

#define INSTANCE(BITS, ROWS)                                                                                                \
    static NOINLINE void add_##BITS##_##ROWS(const TileRuns *runs, float *totals) {                                         \
        if (runs->weight->zeros) add_runs(BITS, ROWS, 1, runs, totals);                                                     \
        else add_runs(BITS, ROWS, 0, runs, totals);                                                                         \
    }
#define INSTANCES(BITS)                                                                                                     \
    INSTANCE(BITS, 1) INSTANCE(BITS, 2) INSTANCE(BITS, 3) INSTANCE(BITS, 4) INSTANCE(BITS, 5) INSTANCE(BITS, 6)
INSTANCES(2) INSTANCES(4) INSTANCES(8)

/* By bits / 4 and rows of x. */
static AddRuns *const ADD_RUNS[3][MOST_BLOCK_ROWS + 1] = {
    {0, add_2_1, add_2_2, add_2_3, add_2_4, add_2_5, add_2_6},
    {0, add_4_1, add_4_2, add_4_3, add_4_4, add_4_5, add_4_6},
    {0, add_8_1, add_8_2, add_8_3, add_8_4, add_8_5, add_8_6},
};

int64_t groups_at_once(int64_t m, int64_t padded, int64_t all) { return all; }

void add_rows(const TileRuns *p, int64_t m, float *totals) {
    TileRuns block = *p;
    for (int64_t row = 0, rows; row < m; row += rows) {
        rows = even_block(m - row, BLOCK_ROWS);
        block.x = p->x + row * p->stride;
        block.x_scales = p->x_scales + row * p->stride;
        block.x_offsets = p->x_offsets + row * p->stride;
        ADD_RUNS[p->weight->bits / 4][rows](&block, totals + row * TILE);
    }
}

#endif
