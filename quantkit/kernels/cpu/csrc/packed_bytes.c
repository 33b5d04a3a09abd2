/* The tile product by instructions that multiply bytes. A 16-bit input is an upper and a lower byte, both signed; the codes are
   multiplied with each of them. One mask extracts four codes from every word, so that unpacking costs little next to the
   products for any number of rows, and weights are never unpacked to memory. */
#include "packed_tile.h"

#if HAS_BYTE_DOT

/* Rows of x per block. Six rows times two vectors of a tile leave registers for operands, even if there are only 16. */
#define BLOCK_ROWS 6

/* Up to this many rows, codes are multiplied with both bytes of the inputs at once. For more rows there are not enough registers,
   and codes are extracted twice. */
#define ONE_PASS_ROWS 3

/* The codes of columns b * F/4 + j of each word, b = 0..3, F = 32/bits, minus CODE_SHIFT. */
INLINE vu extract_bytes(vu word, int bits, int j) {
    return bits == 8 ? word ^ CODE_SHIFT(8) * 0x01010101u : (word >> bits * j) & ((1u << bits) - 1) * 0x01010101u;
}

/* Adds the products of a run's codes with the upper bytes of the inputs to `upper`, and those with the lower bytes to `lower`.
   Either may be NULL. bits, rows and which of the two is NULL are compile-time constants. */
INLINE void add_products(int bits, int rows, const uint32_t *words, const int32_t *x, int64_t stride, int64_t steps,
                         vi (*upper)[2], vi (*lower)[2]) {
    const int quads = 8 / bits;
    for (int64_t step = 0; step < steps; step++, words += TILE, x += 2 * quads) {
        if (upper) prefetch_words(words);
#pragma GCC unroll 4
        for (int j = 0; j < quads; j++) {
            vu codes[2];
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) codes[v] = extract_bytes(load_words(words + v * LANES), bits, j);
#pragma GCC unroll 8
            for (int m = 0; m < rows; m++) {
                const int32_t *input = x + m * stride + 2 * j;
#pragma GCC unroll 2
                for (int v = 0; v < 2; v++) {
                    if (upper) upper[m][v] = byte_dot(upper[m][v], codes[v], input[0] - (vi){0});
                    if (lower) lower[m][v] = byte_dot(lower[m][v], codes[v], input[1] - (vi){0});
                }
            }
        }
    }
}

/* Adds the products of the runs to out [rows, TILE]. bits, rows and own_zeros are compile-time constants. */
INLINE void add_runs(int bits, int rows, int own_zeros, const TileRuns *p, float *out) {
    const int64_t steps = p->length * bits / 32, stride = p->stride, runs = p->runs, half = p->length / 2;
    const float *x_scales = p->x_scales;
    for (int part = 0; part < TILE; part += 2 * LANES) {
        vf totals[BLOCK_ROWS][2];
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) totals[m][v] = load(out + m * TILE + part + v * LANES);
        for (int64_t run = 0; run < runs; run++) {
            vi upper[BLOCK_ROWS][2] = {0}, lower[BLOCK_ROWS][2] = {0};
            const uint32_t *words = p->words + run * steps * TILE + part;
            const int32_t *x = p->x + run * half;
            add_products(bits, rows, words, x, stride, steps, upper, rows <= ONE_PASS_ROWS ? lower : NULL);
#pragma GCC unroll 8
            for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
                for (int v = 0; v < 2; v++)
                    lower[m][v] += (upper[m][v] << 8) + first_sums(own_zeros, p, run, m, part + v * LANES);
            if (rows > ONE_PASS_ROWS) add_products(bits, rows, words, x, stride, steps, NULL, lower);
            vf scales[2];
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++)
                scales[v] = load_scales(p->weight, p->scales + (p->group + run) * TILE + part + v * LANES);
#pragma GCC unroll 8
            for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
                for (int v = 0; v < 2; v++)
                    totals[m][v] += scales[v] * x_scales[m * stride + run] * __builtin_convertvector(lower[m][v], vf);
        }
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) store(out + m * TILE + part + v * LANES, totals[m][v]);
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
static AddRuns *const ADD_RUNS[3][BLOCK_ROWS + 1] = {
    {0, add_2_1, add_2_2, add_2_3, add_2_4, add_2_5, add_2_6},
    {0, add_4_1, add_4_2, add_4_3, add_4_4, add_4_5, add_4_6},
    {0, add_8_1, add_8_2, add_8_3, add_8_4, add_8_5, add_8_6},
};

int64_t groups_at_once(int64_t m, int64_t padded, int64_t all) {
    (void)m, (void)padded;
    return all;
}

void add_rows(const TileRuns *p, int64_t m, float *totals) {
    TileRuns block = *p;
    for (int64_t row = 0, rows; row < m; row += rows) {
        rows = even_block(m - row, BLOCK_ROWS);
        move_to_row(&block, p, row);
        ADD_RUNS[p->weight->bits / 4][rows](&block, totals + row * TILE);
    }
}

#endif
