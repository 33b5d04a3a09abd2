/* One tile of a packed weight times some rows of x: what packed.c asks of packed_bytes.c or packed_pairs.c. */
#ifndef QUANTKIT_PACKED_TILE_H
#define QUANTKIT_PACKED_TILE_H

#include "dot.h"
#include "matrix.h"

/* Rows of x that are multiplied with a tile at a time. */
#define MOST_ROWS 96

/* Consecutive runs of equal length of one tile, and the same columns of some rows of x. */
typedef struct {
    const Matrix *weight;
    int64_t scales, zeros; /* indices of the tile's first scale and first word of zero points */
    int64_t group;         /* group of the first run */
    const uint32_t *words; /* of the first run */
    const int32_t *x;      /* integers, see packed_input.c */
    const float *x_scales;
    const int32_t *x_sums; /* multiplied by the zero point, if the weight has just one */
    int64_t stride;        /* from one row of x to the next, in words */
    int64_t runs, length;
} TileRuns;

/* Groups of `padded` columns, of `all` in a row, that one call of `add_rows` may be given for m rows of x. */
int64_t groups_at_once(int64_t m, int64_t padded, int64_t all);

/* Adds the products of the runs with m <= MOST_ROWS rows of x to totals [m, TILE]. */
void add_rows(const TileRuns *runs, int64_t m, float *totals);

/* `add_scaled`; own_zeros: the weight has zero points of its own for each row and group. */
INLINE void add_scaled_sums(int own_zeros, const TileRuns *p, int64_t run, int rows, int first, int vectors, int most,
                            const vi *sums, float *totals) {
    const Matrix *w = p->weight;
    const float *x_scales = p->x_scales + run;
    const int32_t *x_sums = p->x_sums + run;
    const int64_t stride = p->stride;
    vf scales[TILE / LANES];
    vi zeros[TILE / LANES];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
        scales[v] = load_scales(w, p->scales + (p->group + run) * TILE + first + v * LANES);
        if (own_zeros) zeros[v] = load_zeros(w, p->zeros + first + v * LANES, p->group + run);
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
        const vi x_sum = x_sums[m * stride] - (vi){0};
        const vf x_scale = splat(x_scales[m * stride]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            const vi sum = (vi)((vu)sums[m * most + v] - (own_zeros ? (vu)zeros[v] * (vu)x_sum : (vu)x_sum));
            float *total = totals + m * TILE + first + v * LANES;
            store(total, load(total) + scales[v] * x_scale * __builtin_convertvector(sum, vf));
        }
    }
}

/* totals [rows, TILE] += scales * x's scales * (sums - zero points * x's sums), for `vectors` vectors of one run from lane
   `first` on; sums [rows, most]. Integers wrap around where a sum overflows before its zero points are subtracted. rows,
   vectors and most are compile-time constants. Pointers are copied from *p beforehand: as far as the compiler knows, a store to
   `totals` may change them. */
INLINE void add_scaled(const TileRuns *p, int64_t run, int rows, int first, int vectors, int most, const vi *sums,
                       float *totals) {
    if (p->weight->zeros) add_scaled_sums(1, p, run, rows, first, vectors, most, sums, totals);
    else add_scaled_sums(0, p, run, rows, first, vectors, most, sums, totals);
}

#endif
