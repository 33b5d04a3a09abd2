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

/* Points `block` to row `row` of the rows of *p. */
INLINE void move_to_row(TileRuns *block, const TileRuns *p, int64_t row) {
    block->x = p->x + row * p->stride;
    block->x_scales = p->x_scales + row * p->stride;
    block->x_offsets = p->x_offsets + row * p->stride;
}

/* What the sums of one run start from: minus zero points times x's sum; for LANES lanes from lane `first` on and row m of x.
   Integers wrap around where a sum overflows in between. own_zeros: each group of a row of the weight has its own zero point. */
INLINE vi first_sums(int own_zeros, const TileRuns *p, int64_t run, int64_t m, int first) {
    const uint32_t offset = (uint32_t)p->x_offsets[m * p->stride + run];
    if (!own_zeros) return (vi)(offset - (vu){0});
    const vu zeros = (vu)load_zeros(p->weight, p->zeros + first, p->group + run);
    return (vi)((zeros - CODE_SHIFT(p->weight->bits)) * offset);
}

#endif
