/* Rows of the paged KV cache as floats. */
#include "attention.h"
#include "vec.h"

typedef uint8_t vb __attribute__((vector_size(LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));


/* `count` bytes, or LANES where there are more; the rest is 0. */
INLINE vu load_bytes(const uint8_t *from, int64_t count) {
    vb bytes = {0};
    uint8_t part[LANES] = {0};
    if (count >= LANES) memcpy(&bytes, from, sizeof bytes);
    else if (count > 0) memcpy(part, from, count), memcpy(&bytes, part, sizeof bytes);
    return __builtin_convertvector(bytes, vu);
}

INLINE vf to_floats(vu codes) { return __builtin_convertvector((vi)codes, vf); }

/* The same way as half_to_float, from a byte of 4 exponent and 3 mantissa bits; NaN reads as 480. */
#define E4M3_REBIAS 1.329227995784916e36f /* 2^120 */

INLINE vf e4m3_to_float(vu bytes) {
    vf magnitude = (vf)((bytes & 0x7fu) << 20) * E4M3_REBIAS;
    return (vf)((vu)magnitude | (bytes & 0x80u) << 24);
}

INLINE void gather_as(int type, const Side *side, int64_t head, int64_t heads, const Keys *keys, float *to) {
    const int64_t dim = side->dim, whole = dim / (2 * LANES) * (2 * LANES), width = padded(dim), size = type == F32 ? 4 : 2;
    char tail[2 * LANES * 4] = {0};
    for (int64_t i = 0; i < keys->count; i++) {
        const char *row = (const char *)side->store->data + (keys->slots[i] * side->kv_heads + head) * dim * size;
        for (int64_t h = 0; h < heads; h++, row += dim * size) {
            float *out = to + (h * CHUNK + i) * width;
            for (int64_t d = 0; d < width; d += 2 * LANES) {
                const char *at = row + d * size;
                if (d == whole) at = memcpy(tail, at, (dim - whole) * size);
                vu words = load_words(at);
                store(out + d, type == F32 ? (vf)words : even_half(words, type));
                store(out + d + LANES, type == F32 ? load((const float *)at + LANES) : odd_half(words, type));
            }
        }
    }
}

INLINE void gather_bytes(int type, const Side *side, int64_t head, int64_t heads, const Keys *keys, float *to) {
    const int64_t dim = side->dim, width = padded(dim);
    for (int64_t i = 0; i < keys->count; i++) {
        const int64_t first = keys->slots[i] * side->kv_heads + head;
        for (int64_t h = 0; h < heads; h++) {
            const uint8_t *row = (const uint8_t *)side->store->data + (first + h) * dim;
            const uint16_t *params = side->store->params + (first + h) * 2;
            const float scale = type == I8 ? from_half(params[0]) : 0, minimum = type == I8 ? from_half(params[1]) : 0;
            float *out = to + (h * CHUNK + i) * width;
            for (int64_t d = 0; d < width; d += LANES) {
                const vu bytes = load_bytes(row + d, dim - d);
                store(out + d, type == I8 ? to_floats(bytes) * scale + minimum : e4m3_to_float(bytes));
            }
        }
    }
}

/* Scales (times `factor`) and minima of a page's channels as floats [dim]. */
static void fetch_channels(const Side *side, int64_t block, int64_t head, float factor, float *scales, float *minima) {
    const int64_t dim = side->dim;
    const uint16_t *params = side->store->params + (block * side->kv_heads + head) * 2 * dim;
    for (int64_t d = 0; d < dim; d++) {
        scales[d] = factor * from_half(params[d]);
        minima[d] = from_half(params[dim + d]);
    }
}

/* One row of codes, those of the lower plane beside them where there is one; scales and minima of each channel, or one of
   all. The second half of the elements is written over the end of the first; what is written behind the last is finite. */
INLINE void unpack(int by_channel, const uint8_t *upper, const uint8_t *lower, int64_t half, const float *scales,
                   const float *minima, float *out) {
    for (int high = 0; high < 2; high++)
        for (int64_t d = 0; d < half; d += LANES) {
            const int64_t at = high * half + d;
            vu code = load_bytes(upper + d, half - d) >> 4 * high & 15u;
            if (lower) code = (code << 4) + (load_bytes(lower + d, half - d) >> 4 * high & 15u) - 8u;
            const vf scale = by_channel ? load_some(scales + at, half - d) : splat(*scales);
            store(out + at, to_floats(code) * scale + (by_channel ? load_some(minima + at, half - d) : splat(*minima)));
        }
}

/* One head's row in a slot. */
INLINE void unpack_row(const Side *side, int64_t row, const uint8_t *lower, const float *scales, const float *minima,
                       float *out) {
    const int64_t half = side->dim / 2;
    const uint8_t *upper = (const uint8_t *)side->store->data + row * half;
    const uint16_t *params = side->store->params + row * 2;
    const float scale = side->by_channel ? 0 : from_half(params[0]) * (lower ? 1.0f / 16 : 1);
    const float minimum = side->by_channel ? 0 : from_half(params[1]);
    if (side->by_channel && lower) unpack(1, upper, lower + row * half, half, scales, minima, out);
    else if (side->by_channel) unpack(1, upper, NULL, half, scales, minima, out);
    else if (lower) unpack(0, upper, lower + row * half, half, &scale, &minimum, out);
    else unpack(0, upper, NULL, half, &scale, &minimum, out);
}

/* One head's row of an open page. */
INLINE void widen_row(const uint16_t *row, int64_t dim, float *out) {
    for (int64_t d = 0; d < dim; d += LANES) {
        vh words = {0};
        if (dim - d >= LANES) memcpy(&words, row + d, sizeof words);
        else
            for (int64_t i = 0; i < dim - d; i++) words[i] = row[d + i];
        store(out + d, (vf)(__builtin_convertvector(words, vu) << 16));
    }
}

static void gather_pages(const Side *side, int64_t head, int64_t heads, const Keys *keys, float *to) {
    const int64_t dim = side->dim, width = padded(dim);
    const uint8_t *lower = side->pages->draft ? NULL : side->store->lower;
    float scales[heads * dim], minima[heads * dim];
    int64_t block = -1;
    for (int64_t i = 0; i < keys->count; i++) {
        const int64_t row = keys->slots[i] * side->kv_heads + head, in = keys->slots[i] / side->pages->block_size;
        if (side->by_channel && i < keys->settled && in != block)
            for (int64_t h = 0; h < heads; h++)
                fetch_channels(side, in, head + h, lower ? 1.0f / 16 : 1, scales + h * dim, minima + h * dim);
        block = in;
        for (int64_t h = 0; h < heads; h++) {
            float *out = to + (h * CHUNK + i) * width;
            memset(out + width - 2 * LANES, 0, sizeof(float) * 2 * LANES); /* whatever stays behind the row's end */
            if (i < keys->settled) unpack_row(side, row + h, lower, scales + h * dim, minima + h * dim, out);
            else widen_row(side->store->open + (row + h) * dim, dim, out);
        }
    }
}

void gather(const Side *side, int64_t head, int64_t heads, const Keys *keys, float *to) {
    switch (side->type) {
    case F32: gather_as(F32, side, head, heads, keys, to); break;
    case BF16: gather_as(BF16, side, head, heads, keys, to); break;
    case F16: gather_as(F16, side, head, heads, keys, to); break;
    case F8: gather_bytes(F8, side, head, heads, keys, to); break;
    case I8: gather_bytes(I8, side, head, heads, keys, to); break;
    default: gather_pages(side, head, heads, keys, to);
    }
}
