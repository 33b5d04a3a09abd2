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
    const int32_t *x_offsets;
    int64_t stride;        /* from one row of x to the next, in words */
    int64_t runs, length;
} TileRuns;

/* Groups of `padded` columns, of `all` in a row, that one call of `add_rows` may be given for m rows of x. */
int64_t groups_at_once(int64_t m, int64_t padded, int64_t all);

/* Adds the products of the runs with m <= MOST_ROWS rows of x to totals [m, TILE]. */
void add_rows(const TileRuns *runs, int64_t m, float *totals);

/* What the sums of one run start from: minus zero points times x's sum; for LANES lanes from lane `first` on and row m of x.
   Integers wrap around where a sum overflows in between. own_zeros: each group of a row of the weight has its own zero point. */
INLINE vi first_sums(int own_zeros, const TileRuns *p, int64_t run, int64_t m, int first) {
    const uint32_t offset = (uint32_t)p->x_offsets[m * p->stride + run];
    if (!own_zeros) return (vi)(offset - (vu){0});
    const vu zeros = (vu)load_zeros(p->weight, p->zeros + first, p->group + run);
    return (vi)((zeros - CODE_SHIFT(p->weight->bits)) * offset);
}

/* totals [rows, TILE] += scales * x's scales * sums, for `vectors` vectors of one run from lane `first` on; sums [rows, most].
   rows, vectors and most are compile-time constants. Pointers are copied from *p beforehand: as far as the compiler knows, a
   store to `totals` may change them. */
INLINE void add_scaled(const TileRuns *p, int64_t run, int rows, int first, int vectors, int most, const vi *sums,
                       float *totals) {
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
            store(total, load(total) + scales[v] * x_scale * __builtin_convertvector(sums[m * most + v], vf));
        }
    }
}

#endif
