/* Reads rows of the paged KV cache as floats. */
#include "kv_cache.h"
#include "vec.h"

/* Reads float8 e4m3 the way half_to_float reads halves. NaN reads as 480. */
#define E4M3_REBIAS 1.329227995784916e36f /* 2^120 */

static void read_e4m3(const uint8_t *restrict row, int64_t dim, float *restrict out) {
    for (int64_t d = 0; d < dim; d++) {
        const float magnitude = bits_to_float((row[d] & 0x7fu) << 20) * E4M3_REBIAS;
        out[d] = bits_to_float(float_to_bits(magnitude) | (row[d] & 0x80u) << 24);
    }
}

INLINE void gather_floats(int type, const KVSide *side, int64_t head, int64_t heads, const KeyChunk *keys, float *to) {
    const int64_t dim = side->dim, whole = dim / (2 * LANES) * (2 * LANES), width = padded_dim(dim);
    const int64_t size = type == F32 ? 4 : 2;
    char tail[2 * LANES * 4] = {0};
    for (int64_t i = 0; i < keys->count; i++) {
        const char *row = (const char *)side->arrays->data + (keys->slots[i] * side->kv_heads + head) * dim * size;
        for (int64_t h = 0; h < heads; h++, row += dim * size) {
            float *out = to + (h * CHUNK + i) * width;
            for (int64_t d = 0; d < width; d += 2 * LANES) {
                const char *at = row + d * size;
                if (d == whole) at = memcpy(tail, at, (dim - whole) * size);
                vu words = load_words(at);
                store(out + d, type == F32 ? (vf)words : even_elements(words, type));
                store(out + d + LANES, type == F32 ? load((const float *)at + LANES) : odd_elements(words, type));
            }
        }
    }
}

/* Zeroes the padding at the end of a row: it is multiplied by zeros, and a NaN there would spoil the sum. */
INLINE void clear_padding(float *row, int64_t dim) {
    for (int64_t d = dim; d < padded_dim(dim); d++) row[d] = 0;
}

/* Codes that are converted at a time: the compiler vectorizes loops over bytes well if it knows their length. */
#define CODES_AT_ONCE 32

/* scale * code + minimum; by_channel: each code has its own scale and minimum, else all share the first. */
INLINE void scale_codes(int by_channel, const uint8_t *restrict codes, int64_t count, const float *restrict scales,
                        const float *restrict minima, float *restrict out) {
    for (int64_t i = 0; i < count; i++) out[i] = (float)codes[i] * scales[by_channel ? i : 0] + minima[by_channel ? i : 0];
}

/* Unpacks `count` bytes of a row from channel d on. A byte holds the codes of two channels that are `half` apart. If there is
   a `lower` array, its 4 bits are appended to each code. */
INLINE void unpack_nibbles(int by_channel, const uint8_t *restrict upper, const uint8_t *restrict lower, int64_t d,
                           int64_t count, int64_t half, const float *scales, const float *minima, float *out) {
    const int64_t at = by_channel ? d : 0, next = by_channel ? d + half : 0;
    uint8_t first[CODES_AT_ONCE], second[CODES_AT_ONCE];
    for (int64_t i = 0; i < count; i++) {
        first[i] = lower ? (uint8_t)(upper[d + i] << 4 | (lower[d + i] & 15)) : upper[d + i] & 15;
        second[i] = lower ? (upper[d + i] & 0xf0) | lower[d + i] >> 4 : upper[d + i] >> 4;
    }
    scale_codes(by_channel, first, count, scales + at, minima + at, out + d);
    scale_codes(by_channel, second, count, scales + next, minima + next, out + half + d);
}

/* With the lower 4 bits, codes are 16 times as fine, and 8 too large. */
INLINE float read_scale(uint16_t half, int with_lower) { return from_half(half) * (with_lower ? 1.0f / 16 : 1); }
INLINE float read_minimum(uint16_t half, int with_lower, float scale) {
    return from_half(half) - (with_lower ? 8 * scale : 0);
}

/* Scales and minima [count, heads] of the first `count` keys, when each key and head has its own. */
static void load_token_params(const KVSide *side, int64_t head, int64_t heads, const KeyChunk *keys, int64_t count,
                              int with_lower, float *scales, float *minima) {
    uint32_t pairs[heads * CHUNK];
    for (int64_t i = 0; i < count; i++)
        memcpy(pairs + i * heads, side->arrays->params + (keys->slots[i] * side->kv_heads + head) * 2, sizeof *pairs * heads);
    for (int64_t i = 0; i < count * heads; i++) {
        scales[i] = read_scale((uint16_t)pairs[i], with_lower);
        minima[i] = read_minimum((uint16_t)(pairs[i] >> 16), with_lower, scales[i]);
    }
}

/* Scales and minima [heads, dim] of the channels of a page. */
static void load_channel_params(const KVSide *side, int64_t block, int64_t head, int64_t heads, int with_lower, float *scales,
                                float *minima) {
    const int64_t dim = side->dim;
    for (int64_t h = 0; h < heads; h++, scales += dim, minima += dim) {
        const uint16_t *params = side->arrays->params + (block * side->kv_heads + head + h) * 2 * dim;
        for (int64_t d = 0; d < dim; d++) {
            scales[d] = read_scale(params[d], with_lower);
            minima[d] = read_minimum(params[dim + d], with_lower, scales[d]);
        }
    }
}

static void gather_bytes(const KVSide *side, int64_t head, int64_t heads, const KeyChunk *keys, float *to) {
    const int64_t dim = side->dim, whole = dim / CODES_AT_ONCE * CODES_AT_ONCE;
    float scales[heads * CHUNK], minima[heads * CHUNK];
    if (side->type == I8) load_token_params(side, head, heads, keys, keys->count, 0, scales, minima);
    for (int64_t i = 0; i < keys->count; i++) {
        const uint8_t *row = (const uint8_t *)side->arrays->data + (keys->slots[i] * side->kv_heads + head) * dim;
        for (int64_t h = 0; h < heads; h++, row += dim) {
            const float *scale = scales + i * heads + h, *minimum = minima + i * heads + h;
            float *out = to + (h * CHUNK + i) * padded_dim(dim);
            if (side->type == F8) read_e4m3(row, dim, out);
            else {
                for (int64_t d = 0; d < whole; d += CODES_AT_ONCE)
                    scale_codes(0, row + d, CODES_AT_ONCE, scale, minimum, out + d);
                scale_codes(0, row + whole, dim - whole, scale, minimum, out + whole);
            }
            clear_padding(out, dim);
        }
    }
}

/* One head's row of a tail page. */
static void bf16_row_to_float(const uint16_t *restrict row, int64_t dim, float *restrict out) {
    for (int64_t d = 0; d < dim; d++) out[d] = from_bf16(row[d]);
}

INLINE void gather_quantized_pages(int by_channel, int with_lower, const KVSide *side, int64_t head, int64_t heads,
                                   const KeyChunk *keys, float *to) {
    const int64_t dim = side->dim, half = dim / 2, whole = half / CODES_AT_ONCE * CODES_AT_ONCE;
    const int64_t params = heads * (by_channel ? dim : CHUNK);
    float scales[params], minima[params];
    int64_t block = -1;
    if (!by_channel) load_token_params(side, head, heads, keys, keys->quantized, with_lower, scales, minima);
    for (int64_t i = 0; i < keys->quantized; i++) {
        const int64_t row = keys->slots[i] * side->kv_heads + head, in = keys->slots[i] / side->paged->block_size;
        if (by_channel && in != block) load_channel_params(side, in, head, heads, with_lower, scales, minima);
        block = in;
        for (int64_t h = 0; h < heads; h++) {
            const int64_t at = by_channel ? h * dim : i * heads + h;
            const uint8_t *upper = (const uint8_t *)side->arrays->data + (row + h) * half;
            const uint8_t *lower = with_lower ? side->arrays->lower + (row + h) * half : NULL;
            float *out = to + (h * CHUNK + i) * padded_dim(dim);
            for (int64_t d = 0; d < whole; d += CODES_AT_ONCE)
                unpack_nibbles(by_channel, upper, lower, d, CODES_AT_ONCE, half, scales + at, minima + at, out);
            unpack_nibbles(by_channel, upper, lower, whole, half - whole, half, scales + at, minima + at, out);
            clear_padding(out, dim);
        }
    }
}

static void gather_pages(const KVSide *side, int64_t head, int64_t heads, const KeyChunk *keys, float *to) {
    const int64_t dim = side->dim;
    const int with_lower = side->arrays->lower && !side->paged->draft;
    if (side->by_channel && with_lower) gather_quantized_pages(1, 1, side, head, heads, keys, to);
    else if (side->by_channel) gather_quantized_pages(1, 0, side, head, heads, keys, to);
    else if (with_lower) gather_quantized_pages(0, 1, side, head, heads, keys, to);
    else gather_quantized_pages(0, 0, side, head, heads, keys, to);
    for (int64_t i = keys->quantized; i < keys->count; i++)
        for (int64_t h = 0; h < heads; h++) {
            float *out = to + (h * CHUNK + i) * padded_dim(dim);
            bf16_row_to_float(side->arrays->tail_pages + (keys->slots[i] * side->kv_heads + head + h) * dim, dim, out);
            clear_padding(out, dim);
        }
}

void gather_rows(const KVSide *side, int64_t head, int64_t heads, const KeyChunk *keys, float *to) {
    switch (side->type) {
    case F32: gather_floats(F32, side, head, heads, keys, to); break;
    case BF16: gather_floats(BF16, side, head, heads, keys, to); break;
    case F16: gather_floats(F16, side, head, heads, keys, to); break;
    case F8: case I8: gather_bytes(side, head, heads, keys, to); break;
    default: gather_pages(side, head, heads, keys, to);
    }
}
