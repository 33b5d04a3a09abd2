/* out [M, N] = x [M, K] @ weight [N, K]^T + bias, the weight packed (2, 4 or 8 bits) or dense.

   A row of the result depends on its row of x only: not on M, not on the number of threads. */
#ifndef QUANTKIT_MATMUL_H
#define QUANTKIT_MATMUL_H

#include "vec.h"

#include <stdint.h>

/* Rows of a packed weight that lie together. */
#define TILE 32

/* Words that are asked for ahead of their use. */
#define PREFETCH 1024

/* Longest run of columns that is summed before its scale is applied; x is prepared in such runs, none across groups. */
#define RUN 256

/* A weight [rows, columns].
   bits == 0: dense, `data` row-major of `type`; scales and zeros unused.
   bits in {2, 4, 8}: `data` uint32 [ceil(rows/TILE), groups, words, TILE], word w of a row's group holding the codes of
   columns w*F .. w*F+F-1 (F = 32/bits), the first in the lowest bits; words = ceil(group/F), the rest of the last one 0.
   scales [tiles, groups, TILE] of `type`, F32 or F16; zeros uint32 [tiles, ceil(groups/4), TILE], byte g % 4 of a word that of
   group g, or NULL where all are `zero`. value = (code - zero) * scale.
   input_bits in {4, 8}, packed weights only: x is rounded to as many bits and multiplied in integers (rounded.c). */
typedef struct {
    const void *data;
    const void *scales;
    const uint32_t *zeros;
    const float *bias;    /* [rows] or NULL */
    const int32_t *order; /* [columns], packed weights only: the column of x that each one multiplies; NULL: the same */
    int64_t rows, columns;
    int64_t group; /* columns that share a scale; divides columns */
    int32_t bits, type, input_bits, zero;
} Matrix;

/* Groups of a packed row; columns of a group, and of all groups, with padding; words of a tile; runs of a row. */
static inline int64_t groups(const Matrix *w) { return w->columns / w->group; }
static inline int64_t padded_group(const Matrix *w) { return round_up(w->group, 32 / w->bits); }
static inline int64_t padded_columns(const Matrix *w) { return groups(w) * padded_group(w); }
static inline int64_t tile_words(const Matrix *w) { return padded_columns(w) / (32 / w->bits) * TILE; }
static inline int64_t runs(const Matrix *w) { return groups(w) * ((padded_group(w) + RUN - 1) / RUN); }

/* Floats that one prepared row of x takes. */
int64_t prepared_floats(const Matrix *weight);

/* x [columns] -> what the matmul reads. Packed: see packed_input.c; rounded: see rounded.c; 16-bit: even and odd columns apart
   (vec.h); all padded with zeros. */
void prepare(const Matrix *weight, const float *x, float *prepared);
void prepare_packed(const Matrix *weight, const float *x, float *prepared);
void prepare_rounded(const Matrix *weight, const float *x, float *prepared);

/* This thread's share of the columns of out [m, weight->rows]; no barrier. */
void matmul_share(const Matrix *weight, const float *prepared, int64_t m, float *out);

/* The ways of it. */
void rounded_share(const Matrix *weight, const float *prepared, int64_t m, float *out);
void packed_share(const Matrix *weight, const float *prepared, int64_t m, float *out);
void dense_share(const Matrix *weight, const float *prepared, int64_t m, float *out);

/* scale * a row [columns] of a dense table of `type`. */
void embed_row(int64_t type, const void *table, int64_t row, int64_t columns, float scale, float *out);

/* Size of the next block of `left` rows, `most` at a time: as few blocks as possible, and none of them small. */
static inline int64_t even_block(int64_t left, int64_t most) {
    const int64_t blocks = (left + most - 1) / most;
    return (left + blocks - 1) / blocks;
}

/* Weights are read once, in order, and faster than a processor's own prefetching brings them (measured: 7 instead of 14 GB/s
   a thread). Far enough for memory, near enough for the first cache; reading past the end only asks in vain. */
INLINE void prefetch_words(const uint32_t *words) {
    __builtin_prefetch(words + PREFETCH);
    __builtin_prefetch(words + PREFETCH + TILE / 2);
}

/* The inputs of columns first .. first+count-1; `gathered` has room for them. */
INLINE const float *inputs_of(const Matrix *w, const float *x, int64_t first, int64_t count, float *gathered) {
    if (!w->order) return x + first;
    for (int64_t k = 0; k < count; k++) gathered[k] = x[w->order[first + k]];
    return gathered;
}

/* Where the scales and the zero points of a tile begin. */
static inline int64_t tile_scales(const Matrix *w, int64_t tile) { return tile * groups(w) * TILE; }
static inline int64_t tile_zeros(const Matrix *w, int64_t tile) { return tile * ((groups(w) + 3) / 4) * TILE; }

/* LANES scales, the first being number `at` of all. */
INLINE vf scales_of(const Matrix *w, int64_t at) {
    if (w->type == F32) return load((const float *)w->scales + at);
    vs halves;
    memcpy(&halves, (const uint16_t *)w->scales + at, sizeof halves);
    return half_to_float(__builtin_convertvector(halves, vu));
}

/* LANES zero points of group g; those of the rows' first four groups are in the words from number `at` on. */
INLINE vi zeros_of(const Matrix *w, int64_t at, int64_t g) {
    if (!w->zeros) return w->zero - (vi){0};
    return (vi)(load_words(w->zeros + at + g / 4 * TILE) >> (uint32_t)(g % 4 * 8) & 0xffu);
}

#endif
