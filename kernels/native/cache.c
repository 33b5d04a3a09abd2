/* Rows of the paged KV cache as floats. */
#include "attention.h"
#include "vec.h"

/* Loops over bytes are left to the compiler, which widens them in one instruction where they may not alias what is written. */

/* The same way as half_to_float, from a byte of 4 exponent and 3 mantissa bits; NaN reads as 480. */
#define E4M3_REBIAS 1.329227995784916e36f /* 2^120 */

static void read_e4m3(const uint8_t *restrict row, int64_t dim, float *restrict out) {
    for (int64_t d = 0; d < dim; d++) {
        const float magnitude = bits_to_float((row[d] & 0x7fu) << 20) * E4M3_REBIAS;
        out[d] = bits_to_float(float_to_bits(magnitude) | (row[d] & 0x80u) << 24);
    }
}

static void read_codes(const uint8_t *restrict row, int64_t dim, float scale, float minimum, float *restrict out) {
    for (int64_t d = 0; d < dim; d++) out[d] = (float)(int32_t)row[d] * scale + minimum;
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
INLINE void clear_end(float *row, int64_t dim) { memset(row + dim, 0, sizeof(float) * (padded(dim) - dim)); }

static void gather_bytes(const Side *side, int64_t head, int64_t heads, const Keys *keys, float *to) {
    const int64_t dim = side->dim;
    for (int64_t i = 0; i < keys->count; i++) {
        const int64_t first = keys->slots[i] * side->kv_heads + head;
        for (int64_t h = 0; h < heads; h++) {
            const uint8_t *row = (const uint8_t *)side->store->data + (first + h) * dim;
            const uint16_t *params = side->store->params + (first + h) * 2;
            float *out = to + (h * CHUNK + i) * padded(dim);
            clear_end(out, dim);
            if (side->type == I8) read_codes(row, dim, from_half(params[0]), from_half(params[1]), out);
            else read_e4m3(row, dim, out);
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

/* Half a row of codes: those in the upper halves of bytes (`shift` 4) or in the lower ones; with the lower plane's beside
   them where there is one; scales and minima of each channel, or one of all. */
INLINE void unpack(int by_channel, int shift, const uint8_t *restrict upper, const uint8_t *restrict lower, int64_t half,
                   const float *restrict scales, const float *restrict minima, float *restrict out) {
    for (int64_t d = 0; d < half; d++) {
        int32_t code = upper[d] >> shift & 15;
        if (lower) code = code * 16 + (lower[d] >> shift & 15) - 8;
        out[d] = (float)code * scales[by_channel ? d : 0] + minima[by_channel ? d : 0];
    }
}

INLINE void unpack_halves(int by_channel, const uint8_t *upper, const uint8_t *lower, int64_t half, const float *scales,
                          const float *minima, float *out) {
    const int64_t next = by_channel ? half : 0;
    unpack(by_channel, 0, upper, lower, half, scales, minima, out);
    unpack(by_channel, 4, upper, lower, half, scales + next, minima + next, out + half);
}

/* One head's row in a slot. */
static void unpack_row(const Side *side, int64_t row, const uint8_t *lower, const float *scales, const float *minima,
                       float *out) {
    const int64_t half = side->dim / 2;
    const uint8_t *upper = (const uint8_t *)side->store->data + row * half;
    const uint16_t *params = side->store->params + row * 2;
    const float scale = side->by_channel ? 0 : from_half(params[0]) * (lower ? 1.0f / 16 : 1);
    const float minimum = side->by_channel ? 0 : from_half(params[1]);
    if (side->by_channel && lower) unpack_halves(1, upper, lower + row * half, half, scales, minima, out);
    else if (side->by_channel) unpack_halves(1, upper, NULL, half, scales, minima, out);
    else if (lower) unpack_halves(0, upper, lower + row * half, half, &scale, &minimum, out);
    else unpack_halves(0, upper, NULL, half, &scale, &minimum, out);
}

/* One head's row of an open page. */
static void widen_row(const uint16_t *restrict row, int64_t dim, float *restrict out) {
    for (int64_t d = 0; d < dim; d++) out[d] = from_bf16(row[d]);
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
            clear_end(out, dim);
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
    case F8: case I8: gather_bytes(side, head, heads, keys, to); break;
    default: gather_pages(side, head, heads, keys, to);
    }
}
