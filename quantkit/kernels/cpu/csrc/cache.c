/* Rows of the paged KV cache as floats. */
#include "attention.h"
#include "vec.h"

/* The same way as half_to_float, from a byte of 4 exponent and 3 mantissa bits; NaN reads as 480. */
#define E4M3_REBIAS 1.329227995784916e36f /* 2^120 */

static void read_e4m3(const uint8_t *restrict row, int64_t dim, float *restrict out) {
    for (int64_t d = 0; d < dim; d++) {
        const float magnitude = bits_to_float((row[d] & 0x7fu) << 20) * E4M3_REBIAS;
        out[d] = bits_to_float(float_to_bits(magnitude) | (row[d] & 0x80u) << 24);
    }
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

/* The floats of a row behind its last number, which nobody reads for their value, but which a NaN would spoil. */
INLINE void clear_end(float *row, int64_t dim) {
    for (int64_t d = dim; d < padded(dim); d++) row[d] = 0;
}

/* Codes that are widened together: of loops over bytes the compiler makes good code where it knows their length. */
#define PIECE 32

/* scale * code + minimum, of each channel or one of all. */
INLINE void scale_codes(int by_channel, const uint8_t *restrict codes, int64_t count, const float *restrict scales,
                        const float *restrict minima, float *restrict out) {
    for (int64_t i = 0; i < count; i++) out[i] = (float)codes[i] * scales[by_channel ? i : 0] + minima[by_channel ? i : 0];
}

/* `count` bytes of a row from channel d on: both halves, which belong `half` channels apart, with those of the lower plane
   where there is one. */
INLINE void unpack(int by_channel, const uint8_t *restrict upper, const uint8_t *restrict lower, int64_t d, int64_t count,
                   int64_t half, const float *scales, const float *minima, float *out) {
    const int64_t at = by_channel ? d : 0, next = by_channel ? d + half : 0;
    uint8_t first[PIECE], second[PIECE];
    for (int64_t i = 0; i < count; i++) {
        first[i] = lower ? (uint8_t)(upper[d + i] << 4 | (lower[d + i] & 15)) : upper[d + i] & 15;
        second[i] = lower ? (upper[d + i] & 0xf0) | lower[d + i] >> 4 : upper[d + i] >> 4;
    }
    scale_codes(by_channel, first, count, scales + at, minima + at, out + d);
    scale_codes(by_channel, second, count, scales + next, minima + next, out + half + d);
}

/* Codes of both planes are 16 times as fine, and 8 too large. */
INLINE float scale_of(uint16_t half, int both) { return from_half(half) * (both ? 1.0f / 16 : 1); }
INLINE float minimum_of(uint16_t half, int both, float scale) { return from_half(half) - (both ? 8 * scale : 0); }

/* Scales and minima [count, heads] of the first `count` keys, where each key and head has its own. */
static void fetch_tokens(const Side *side, int64_t head, int64_t heads, const Keys *keys, int64_t count, int both,
                         float *scales, float *minima) {
    uint32_t pairs[heads * CHUNK];
    for (int64_t i = 0; i < count; i++)
        memcpy(pairs + i * heads, side->store->params + (keys->slots[i] * side->kv_heads + head) * 2, sizeof *pairs * heads);
    for (int64_t i = 0; i < count * heads; i++) {
        scales[i] = scale_of((uint16_t)pairs[i], both);
        minima[i] = minimum_of((uint16_t)(pairs[i] >> 16), both, scales[i]);
    }
}

/* Scales and minima [heads, dim] of a page's channels. */
static void fetch_channels(const Side *side, int64_t block, int64_t head, int64_t heads, int both, float *scales,
                           float *minima) {
    const int64_t dim = side->dim;
    for (int64_t h = 0; h < heads; h++, scales += dim, minima += dim) {
        const uint16_t *params = side->store->params + (block * side->kv_heads + head + h) * 2 * dim;
        for (int64_t d = 0; d < dim; d++) {
            scales[d] = scale_of(params[d], both);
            minima[d] = minimum_of(params[dim + d], both, scales[d]);
        }
    }
}

static void gather_bytes(const Side *side, int64_t head, int64_t heads, const Keys *keys, float *to) {
    const int64_t dim = side->dim, whole = dim / PIECE * PIECE;
    float scales[heads * CHUNK], minima[heads * CHUNK];
    if (side->type == I8) fetch_tokens(side, head, heads, keys, keys->count, 0, scales, minima);
    for (int64_t i = 0; i < keys->count; i++) {
        const uint8_t *row = (const uint8_t *)side->store->data + (keys->slots[i] * side->kv_heads + head) * dim;
        for (int64_t h = 0; h < heads; h++, row += dim) {
            const float *scale = scales + i * heads + h, *minimum = minima + i * heads + h;
            float *out = to + (h * CHUNK + i) * padded(dim);
            if (side->type == F8) read_e4m3(row, dim, out);
            else {
                for (int64_t d = 0; d < whole; d += PIECE) scale_codes(0, row + d, PIECE, scale, minimum, out + d);
                scale_codes(0, row + whole, dim - whole, scale, minimum, out + whole);
            }
            clear_end(out, dim);
        }
    }
}

/* One head's row of an open page. */
static void widen_row(const uint16_t *restrict row, int64_t dim, float *restrict out) {
    for (int64_t d = 0; d < dim; d++) out[d] = from_bf16(row[d]);
}

INLINE void unpack_pages(int by_channel, int both, const Side *side, int64_t head, int64_t heads, const Keys *keys,
                         float *to) {
    const int64_t dim = side->dim, half = dim / 2, whole = half / PIECE * PIECE, params = heads * (by_channel ? dim : CHUNK);
    float scales[params], minima[params];
    int64_t block = -1;
    if (!by_channel) fetch_tokens(side, head, heads, keys, keys->settled, both, scales, minima);
    for (int64_t i = 0; i < keys->settled; i++) {
        const int64_t row = keys->slots[i] * side->kv_heads + head, in = keys->slots[i] / side->pages->block_size;
        if (by_channel && in != block) fetch_channels(side, in, head, heads, both, scales, minima);
        block = in;
        for (int64_t h = 0; h < heads; h++) {
            const int64_t at = by_channel ? h * dim : i * heads + h;
            const uint8_t *upper = (const uint8_t *)side->store->data + (row + h) * half;
            const uint8_t *lower = both ? side->store->lower + (row + h) * half : NULL;
            float *out = to + (h * CHUNK + i) * padded(dim);
            for (int64_t d = 0; d < whole; d += PIECE)
                unpack(by_channel, upper, lower, d, PIECE, half, scales + at, minima + at, out);
            unpack(by_channel, upper, lower, whole, half - whole, half, scales + at, minima + at, out);
            clear_end(out, dim);
        }
    }
}

static void gather_pages(const Side *side, int64_t head, int64_t heads, const Keys *keys, float *to) {
    const int64_t dim = side->dim;
    const int both = side->store->lower && !side->pages->draft;
    if (side->by_channel && both) unpack_pages(1, 1, side, head, heads, keys, to);
    else if (side->by_channel) unpack_pages(1, 0, side, head, heads, keys, to);
    else if (both) unpack_pages(0, 1, side, head, heads, keys, to);
    else unpack_pages(0, 0, side, head, heads, keys, to);
    for (int64_t i = keys->settled; i < keys->count; i++)
        for (int64_t h = 0; h < heads; h++) {
            float *out = to + (h * CHUNK + i) * padded(dim);
            widen_row(side->store->open + (keys->slots[i] * side->kv_heads + head + h) * dim, dim, out);
            clear_end(out, dim);
        }
}

void gather(const Side *side, int64_t head, int64_t heads, const Keys *keys, float *to) {
    switch (side->type) {
    case F32: gather_as(F32, side, head, heads, keys, to); break;
    case BF16: gather_as(BF16, side, head, heads, keys, to); break;
    case F16: gather_as(F16, side, head, heads, keys, to); break;
    case F8: case I8: gather_bytes(side, head, heads, keys, to); break;
    default: gather_pages(side, head, heads, keys, to);
    }
}
