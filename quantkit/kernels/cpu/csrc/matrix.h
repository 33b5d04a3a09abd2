/* The weight of a matrix product, packed (2, 4 or 8 bits) or dense, and how its arrays are laid out. */
#ifndef QUANTKIT_MATRIX_H
#define QUANTKIT_MATRIX_H

#include "vec.h"

#include <stdint.h>

/* Rows of a packed weight that are interleaved. */
#define TILE 32

/* How far ahead of their use words are prefetched, in words. */
#define PREFETCH 1024

/* Longest run of columns that is summed before its scale is applied. x is prepared in such runs; no run crosses a group. */
#define RUN 256

/* A weight [rows, columns].
   bits == 0: dense, `data` row-major of `type`; scales and zeros are unused.
   bits in {2, 4, 8}: `data` uint32 [ceil(rows/TILE), groups, words, TILE]. Word w of a row's group holds the codes of columns
   w*F .. w*F+F-1 (F = 32/bits), the first one in the lowest bits; words = ceil(group/F), the rest of the last word is 0.
   scales [tiles, groups, TILE] of `type`, F32 or F16. zeros uint32 [tiles, ceil(groups/4), TILE]: byte g % 4 of a word is the
   zero point of group g; NULL where all zero points are `zero`. value = (code - zero) * scale.
   activation_bits in {4, 8}, packed weights only: x is quantized to that many bits and multiplied in integers (w4a8.c). */
typedef struct {
    const void *data;
    const void *scales;
    const uint32_t *zeros;
    const float *bias;          /* [rows] or NULL */
    const int32_t *column_perm; /* [columns], packed only: the column of x that each column multiplies; NULL: identity */
    int64_t rows, columns;
    int64_t group; /* columns that share a scale; divides columns */
    int32_t bits, type, activation_bits, zero;
} Matrix;

/* Of a packed weight: groups per row; columns of a group and of all groups, padding included; words per tile; runs per row. */
static inline int64_t groups(const Matrix *w) { return w->columns / w->group; }
static inline int64_t padded_group(const Matrix *w) { return round_up(w->group, 32 / w->bits); }
static inline int64_t padded_columns(const Matrix *w) { return groups(w) * padded_group(w); }
static inline int64_t tile_words(const Matrix *w) { return padded_columns(w) / (32 / w->bits) * TILE; }
static inline int64_t runs(const Matrix *w) { return groups(w) * ((padded_group(w) + RUN - 1) / RUN); }

/* Size of one prepared row of x, in floats. For packed weights it is what packed_input.c needs, which is more than w4a8.c
   does. */
static inline int64_t prepared_floats(const Matrix *w) {
    if (!w->bits) return round_up(w->columns, 2 * LANES);
    return round_up(padded_columns(w) / 2 + 2 * runs(w), LANES);
}

/* Weights are read once, in order, and faster than the processor's own prefetching delivers them (measured: 14 instead of
   7 GB/s per thread). The distance is long enough for main memory and short enough for the first-level cache; prefetching past
   the end does no harm. */
INLINE void prefetch_words(const uint32_t *words) {
    __builtin_prefetch(words + PREFETCH);
    __builtin_prefetch(words + PREFETCH + TILE / 2);
}

/* The inputs that columns first .. first+count-1 multiply; `gathered` has room for them. */
INLINE const float *gather_inputs(const Matrix *w, const float *x, int64_t first, int64_t count, float *gathered) {
    if (!w->column_perm) return x + first;
    for (int64_t k = 0; k < count; k++) gathered[k] = x[w->column_perm[first + k]];
    return gathered;
}

/* Index of a tile's first scale, and of its first word of zero points. */
static inline int64_t tile_scales(const Matrix *w, int64_t tile) { return tile * groups(w) * TILE; }
static inline int64_t tile_zeros(const Matrix *w, int64_t tile) { return tile * ((groups(w) + 3) / 4) * TILE; }

/* LANES scales from index `at` on. */
INLINE vf load_scales(const Matrix *w, int64_t at) {
    if (w->type == F32) return load((const float *)w->scales + at);
    return load_halves((const uint16_t *)w->scales + at);
}

/* LANES zero points of group g; the words that hold those of the rows' first four groups begin at index `at`. */
INLINE vi load_zeros(const Matrix *w, int64_t at, int64_t g) {
    if (!w->zeros) return w->zero - (vi){0};
    return (vi)(load_words(w->zeros + at + g / 4 * TILE) >> (uint32_t)(g % 4 * 8) & 0xffu);
}

#endif
