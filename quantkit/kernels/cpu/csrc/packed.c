/* Packed weights times the 16-bit integers that packed_input.c makes of x, tile by tile.

   The sums of a run are exact integers, and they are added to the result's floats in the order of the columns. So every
   processor and every number of rows gives the same result. Sums do not overflow: RUN columns of |code - zero| <= 255 times
   LARGEST_INPUT are less than 2^31. */
#include "packed.h"
#include "packed_tile.h"
#include "threads.h"

/* Multiplies all columns of a tile with m <= MOST_ROWS rows of x: totals [m, TILE]. `p` starts at the tile's first run and is
   advanced past its last. It is changed in place because a copy would be read in wider words than it was written in: the load
   would have to wait for earlier stores, among them outputs whose cache lines another core holds. */
static void tile_totals(TileRuns *p, int64_t m, float *totals) {
    const Matrix *w = p->weight;
    const int64_t padded = padded_group(w), all = groups(w), most = padded > RUN ? 1 : groups_at_once(m, padded, all);
    memset(totals, 0, sizeof(float) * m * TILE);
    for (int64_t g = 0, count; g < all; g += count) {
        count = min_i64(most, all - g);
        p->group = g;
        p->runs = count;
        for (int64_t k = 0; k < padded; k += RUN) {
            p->length = min_i64(RUN, padded - k);
            add_rows(p, m, totals);
            p->words += count * p->length * w->bits / 32 * TILE;
            p->x += count * p->length / 2;
            p->x_scales += count;
            p->x_offsets += count;
        }
    }
}

/* out = totals + bias, for the first `count` of TILE rows of the weight. */
static void store_row(const float *totals, const float *bias, int64_t count, float *out) {
    if (count < TILE)
        for (int64_t n = 0; n < count; n++) out[n] = bias ? totals[n] + bias[n] : totals[n];
    else
        for (int n = 0; n < TILE; n += LANES) store(out + n, bias ? load(totals + n) + load(bias + n) : load(totals + n));
}

void packed_share(const Matrix *w, const float *prepared, int64_t m, float *out) {
    const int64_t stride = prepared_floats(w);
    float totals[MOST_ROWS * TILE] __attribute__((aligned(64)));
    for (Range r = thread_range((w->rows + TILE - 1) / TILE); r.first < r.last; r.first++) {
        const int64_t base = r.first * TILE, count = min_i64(TILE, w->rows - base);
        for (int64_t row = 0, rows; row < m; row += rows) {
            rows = min_i64(MOST_ROWS, m - row);
            const float *x = prepared + row * stride, *x_scales = x + padded_columns(w) / 2;
            TileRuns piece = {.weight = w, .scales = tile_scales(w, r.first), .zeros = tile_zeros(w, r.first),
                              .words = (const uint32_t *)w->data + r.first * tile_words(w),
                              .x = (const int32_t *)x, .x_scales = x_scales,
                              .x_offsets = (const int32_t *)x_scales + runs(w), .stride = stride};
            tile_totals(&piece, rows, totals);
            for (int64_t i = 0; i < rows; i++)
                store_row(totals + i * TILE, w->bias ? w->bias + base : NULL, count, out + (row + i) * w->rows + base);
        }
    }
}
