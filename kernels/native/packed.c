/* Packed weights: TILE rows of a weight side by side in the lanes, columns one after the other.

   Few rows of x: codes become floats on the way, two instructions for LANES of them. Many: a run of columns is unpacked
   into a panel of floats once and multiplied like a dense matrix. Both add the same numbers in the same order. */
#include "matmul.h"
#include "team.h"
#include "vec.h"

/* Rows of x that are multiplied at a time: 6 x 2 accumulators, 2 weights and 1 input fit 16 vector registers. */
#define BLOCK 6

/* Rows of x that one unpacked panel serves. */
#define PANEL_ROWS 96

/* Field j of each word as a float, times 2^(bits*j) except for the highest: one mask or one shift, one conversion. */
INLINE vf field(vu word, int bits, int j) {
    if (j == 32 / bits - 1) return __builtin_convertvector((vi)(word >> (32 - bits)), vf);
    return __builtin_convertvector((vi)(word & (((1u << bits) - 1) << (bits * j))), vf);
}

/* Sums of fields times x over `steps` words of columns (bits 0: over `steps` columns already unpacked, [steps, TILE] floats)
   for TILE weight rows and `rows` rows of x; sums [rows, TILE]. Constants of each instance: bits, rows. */
INLINE void run_sums(int bits, int rows, int64_t steps, const void *data, const float *x, int64_t x_stride, float *sums) {
    /* At least 8 chains of additions, to hide their latency, and at most 12, to fit the registers. */
    const int fields = bits ? 32 / bits : 1, vectors = rows <= 3 ? TILE / LANES : 2;
    for (int part = 0; part < TILE; part += vectors * LANES) {
        vf acc[BLOCK][TILE / LANES];
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) acc[m][v] = (vf){0};
        for (int64_t step = 0; step < steps; step++) {
            const uint32_t *words = (const uint32_t *)data + step * TILE + part;
            if (bits) prefetch_words((const uint32_t *)data + step * TILE);
#pragma GCC unroll 16
            for (int j = 0; j < fields; j++) {
                vf weight[TILE / LANES];
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++)
                    weight[v] = bits ? field(load_words(words + v * LANES), bits, j) : load_once(words + v * LANES);
#pragma GCC unroll 8
                for (int m = 0; m < rows; m++) {
                    vf input = splat(x[m * x_stride + step * fields + j]);
#pragma GCC unroll 4
                    for (int v = 0; v < vectors; v++) acc[m][v] += input * weight[v];
                }
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) store(sums + m * TILE + part + v * LANES, acc[m][v]);
    }
}

typedef void RunSums(int64_t steps, const void *data, const float *x, int64_t x_stride, float *sums);

#define INSTANCE(BITS, ROWS)                                                                                                \
    static NOINLINE void sums_##BITS##_##ROWS(int64_t steps, const void *data, const float *x, int64_t stride, float *sums) { \
        run_sums(BITS, ROWS, steps, data, x, stride, sums);                                                                 \
    }
#define INSTANCES(BITS) INSTANCE(BITS, 1) INSTANCE(BITS, 2) INSTANCE(BITS, 3) INSTANCE(BITS, 4) INSTANCE(BITS, 5)
INSTANCES(0) INSTANCE(0, 6) INSTANCES(2) INSTANCES(4) INSTANCES(8)

/* By bits / 2 (0: panel) and rows of x. */
static RunSums *const RUN_SUMS[5][BLOCK + 1] = {
    {0, sums_0_1, sums_0_2, sums_0_3, sums_0_4, sums_0_5, sums_0_6},
    {0, sums_2_1, sums_2_2, sums_2_3, sums_2_4, sums_2_5, 0},
    {0, sums_4_1, sums_4_2, sums_4_3, sums_4_4, sums_4_5, 0},
    {0},
    {0, sums_8_1, sums_8_2, sums_8_3, sums_8_4, sums_8_5, 0},
};

/* total += scale * (sum - zero * sum of x) for LANES weight rows and one run. */
INLINE void add_scaled(vf sum, vf scale, vi zero, float x_sum, float *total) {
    vf difference = sum - __builtin_convertvector(zero, vf) * x_sum;
    store(total, load(total) + scale * difference);
}

/* What one tile of a weight and some prepared rows of x are, with the counts that its loops need. */
typedef struct {
    const uint32_t *words;
    const float *scales;
    const uint32_t *zeros;
    const float *x;
    int64_t x_stride;
    int64_t groups, padded, columns; /* groups; columns of a group, and of all groups, with padding */
    int bits;
} Tile;

/* `add_scaled` for TILE weight rows and several rows of x; sums and totals [rows, TILE]. */
static void apply_scales(const Tile *t, int64_t g, int64_t rows, const float *sums, const float *x_sums, float *totals) {
    for (int v = 0; v < TILE; v += LANES) {
        const vf scale = load(t->scales + g * TILE + v);
        const vi zero = zeros_of(t->zeros + v, g);
        for (int64_t m = 0; m < rows; m++)
            add_scaled(load(sums + m * TILE + v), scale, zero, x_sums[m * t->x_stride], totals + m * TILE + v);
    }
}

/* `runs` runs one behind the other for one row of x, from group g on: as many more independent chains of additions, and the
   same sums as one by one. */
INLINE void add_runs(int bits, int runs, const Tile *t, int64_t g, float *totals) {
    const int fields = 32 / bits;
    const int64_t steps = t->padded / fields;
    const uint32_t *words = t->words + g * steps * TILE;
    const float *x = t->x + g * t->padded, *x_sums = t->x + t->columns + g;
    vf acc[3][TILE / LANES] = {0};
    for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 3
        for (int run = 0; run < runs; run++) prefetch_words(words + (run * steps + step) * TILE);
#pragma GCC unroll 16
        for (int j = 0; j < fields; j++)
#pragma GCC unroll 3
            for (int run = 0; run < runs; run++) {
                vf input = splat(x[(run * steps + step) * fields + j]);
#pragma GCC unroll 4
                for (int v = 0; v < TILE / LANES; v++)
                    acc[run][v] += input * field(load_words(words + (run * steps + step) * TILE + v * LANES), bits, j);
            }
    }
#pragma GCC unroll 3
    for (int run = 0; run < runs; run++)
#pragma GCC unroll 4
        for (int v = 0; v < TILE; v += LANES)
            add_scaled(acc[run][v / LANES], load(t->scales + (g + run) * TILE + v), zeros_of(t->zeros + v, g + run),
                       x_sums[run], totals + v);
}

#define ONE_ROW(BITS)                                                                                                       \
    static NOINLINE void two_runs_##BITS(const Tile *t, int64_t g, float *totals) { add_runs(BITS, 2, t, g, totals); }      \
    static NOINLINE void three_runs_##BITS(const Tile *t, int64_t g, float *totals) { add_runs(BITS, 3, t, g, totals); }
ONE_ROW(2) ONE_ROW(4) ONE_ROW(8)

/* All columns of a tile for one row of x: runs in pairs, the last three of an odd number together; totals [TILE]. Needs
   groups of at most RUN columns, and two of them. */
static void tile_one_row(const Tile *t, float *totals) {
    for (int64_t g = 0; g < t->groups;) {
        const int three = t->groups - g == 3;
        if (t->bits == 2) (three ? three_runs_2 : two_runs_2)(t, g, totals);
        else if (t->bits == 4) (three ? three_runs_4 : two_runs_4)(t, g, totals);
        else (three ? three_runs_8 : two_runs_8)(t, g, totals);
        g += three ? 3 : 2;
    }
}

/* All columns of a tile for fewer than BLOCK rows of x, fields unpacked on the way; totals [rows, TILE]. */
static void tile_direct(const Tile *t, int64_t rows, float *totals) {
    const int bits = t->bits, fields = 32 / bits;
    const float *x = t->x, *x_sums = t->x + t->columns;
    const uint32_t *words = t->words;
    float sums[BLOCK * TILE] __attribute__((aligned(64)));
    for (int64_t g = 0; g < t->groups; g++)
        for (int64_t first = 0; first < t->padded; first += RUN, x_sums++) {
            int64_t steps = smaller(RUN, t->padded - first) / fields;
            RUN_SUMS[bits / 2][rows](steps, words, x, t->x_stride, sums);
            apply_scales(t, g, rows, sums, x_sums, totals);
            words += steps * TILE;
            x += steps * fields;
        }
}

/* Size of the next block of `left` rows: as few blocks as possible, and none of them small. */
static int64_t even_block(int64_t left) {
    int64_t blocks = (left + BLOCK - 1) / BLOCK;
    return (left + blocks - 1) / blocks;
}

INLINE void unpack(int bits, const uint32_t *words, int64_t steps, float *panel) {
    const int fields = 32 / bits;
    for (int64_t step = 0; step < steps; step++) {
        prefetch_words(words + step * TILE);
#pragma GCC unroll 16
        for (int j = 0; j < fields; j++)
            for (int v = 0; v < TILE; v += LANES)
                store(panel + (step * fields + j) * TILE + v, field(load_words(words + step * TILE + v), bits, j));
    }
}

/* The same for many rows: each run is unpacked once into a panel that stays in the cache; m <= PANEL_ROWS. */
static void tile_by_panels(const Tile *t, int64_t m, float *totals) {
    const int bits = t->bits, fields = 32 / bits;
    const float *x = t->x, *x_sums = t->x + t->columns;
    const uint32_t *words = t->words;
    float panel[RUN * TILE] __attribute__((aligned(64))), sums[BLOCK * TILE] __attribute__((aligned(64)));
    for (int64_t g = 0; g < t->groups; g++)
        for (int64_t first = 0; first < t->padded; first += RUN, x_sums++) {
            int64_t columns = smaller(RUN, t->padded - first), steps = columns / fields;
            if (bits == 2) unpack(2, words, steps, panel);
            else if (bits == 4) unpack(4, words, steps, panel);
            else unpack(8, words, steps, panel);
            for (int64_t row = 0, rows; row < m; row += rows) {
                rows = even_block(m - row);
                RUN_SUMS[0][rows](columns, panel, x + row * t->x_stride, t->x_stride, sums);
                apply_scales(t, g, rows, sums, x_sums + row * t->x_stride, totals + row * TILE);
            }
            words += steps * TILE;
            x += columns;
        }
}

/* One tile for up to PANEL_ROWS rows of x; totals [m, TILE]. */
static void tile_totals(const Tile *t, int64_t m, float *totals) {
    memset(totals, 0, sizeof(float) * m * TILE);
    if (m >= BLOCK) tile_by_panels(t, m, totals);
    else if (m == 1 && t->padded <= RUN && t->groups > 1) tile_one_row(t, totals);
    else tile_direct(t, m, totals);
}

/* totals (+ bias) -> out, `count` of TILE. */
static void put_row(const float *totals, const float *bias, int64_t count, float *out) {
    if (!bias) memcpy(out, totals, sizeof(float) * count);
    else
        for (int64_t n = 0; n < count; n++) out[n] = totals[n] + bias[n];
}

/* Rows of out that one tile gives. */
static void tile_out(const Tile *t, const Matrix *w, int64_t tile, int64_t m, float *out) {
    const int64_t base = tile * TILE, count = smaller(TILE, w->rows - base);
    float totals[PANEL_ROWS * TILE] __attribute__((aligned(64)));
    Tile some = *t;
    for (int64_t row = 0, rows; row < m; row += rows) {
        rows = smaller(PANEL_ROWS, m - row);
        some.x = t->x + row * t->x_stride;
        tile_totals(&some, rows, totals);
        for (int64_t i = 0; i < rows; i++)
            put_row(totals + i * TILE, w->bias ? w->bias + base : NULL, count, out + (row + i) * w->rows + base);
    }
}

void packed_share(const Matrix *w, const float *prepared, int64_t m, float *out) {
    Tile t = {.x = prepared, .x_stride = prepared_floats(w), .groups = groups(w), .padded = padded_group(w),
              .columns = padded_columns(w), .bits = w->bits};
    const int64_t words = tile_words(w), tiles = (w->rows + TILE - 1) / TILE;
    for (Range r = my_share(tiles); r.first < r.last; r.first++) {
        t.words = (const uint32_t *)w->data + r.first * words;
        t.scales = w->scales + r.first * TILE * t.groups;
        t.zeros = w->zeros + r.first * TILE * ((t.groups + 3) / 4);
        tile_out(&t, w, r.first, m, out);
    }
}
