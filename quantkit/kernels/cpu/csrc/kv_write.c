/* Writes floats to the paged KV cache. The codes equal those of reference.py to the bit. */
#include "kv_cache.h"
#include "threads.h"
#include "vec.h"

#include <math.h>

/* Saturates at 448. Adding 2^14 to a subnormal leaves its bits at the bottom of the sum. */
INLINE uint8_t to_e4m3(float value) {
    const uint32_t bits = float_to_bits(value), sign = bits >> 24 & 0x80;
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint8_t)(sign | 0x7f);
    if (magnitude > 0x43e00000) magnitude = 0x43e00000;
    if (magnitude < 0x3c800000) return (uint8_t)(sign | (float_to_bits(bits_to_float(magnitude) + 16384.0f) - 0x46800000));
    return (uint8_t)(sign | (magnitude - 0x3c000000 + 0x7ffff + (magnitude >> 20 & 1)) >> 20);
}

/* Scale and minimum, as halves, for numbers between low and high. */
INLINE void choose_qparams(float low, float high, float levels, uint16_t *scale, uint16_t *minimum) {
    *scale = to_half((high - low) / levels);
    *minimum = to_half(low);
}

INLINE float code_of(float x, float scale, float minimum, float levels) {
    const float code = rintf((x - minimum) / scale);
    return scale > 0 ? code < 0 ? 0 : code > levels ? levels : code : 0;
}

static void extremes(const float *x, int64_t n, float *low, float *high) {
    vf minima = splat(x[0]), maxima = minima;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        minima = vec_min(load(x + i), minima);
        maxima = vec_max(load(x + i), maxima);
    }
    *low = -lane_max(-minima), *high = lane_max(maxima);
    for (; i < n; i++) {
        if (x[i] < *low) *low = x[i];
        if (x[i] > *high) *high = x[i];
    }
}

static void write_codes(const float *x, int64_t n, uint8_t *codes, uint16_t *params) {
    float low, high;
    extremes(x, n, &low, &high);
    choose_qparams(low, high, 255, params, params + 1);
    const float scale = from_half(params[0]), minimum = from_half(params[1]);
    for (int64_t i = 0; i < n; i++) codes[i] = (uint8_t)(int32_t)code_of(x[i], scale, minimum, 255);
}

void write_token(const KVSide *side, int64_t slot, const float *row) {
    const KVArrays *s = side->arrays;
    const int64_t width = side->kv_heads * side->dim, block_size = side->paged->block_size;
    uint16_t *half = (uint16_t *)s->data + slot * width;
    switch (side->type) {
    case F32: memcpy((float *)s->data + slot * width, row, sizeof(float) * width); break;
    case F16:
        for (int64_t i = 0; i < width; i++) half[i] = to_half(row[i]);
        break;
    case F8:
        for (int64_t i = 0; i < width; i++) ((uint8_t *)s->data)[slot * width + i] = to_e4m3(row[i]);
        break;
    case I8:
        for (int64_t h = 0; h < side->kv_heads; h++)
            write_codes(row + h * side->dim, side->dim, (uint8_t *)s->data + slot * width + h * side->dim,
                        s->params + (slot * side->kv_heads + h) * 2);
        break;
    default: /* BF16, and I4, whose tail pages are bfloat16 */
        if (side->type == I4)
            half = s->tail_pages + (side->paged->tail_page_ids[slot / block_size] * block_size + slot % block_size) * width;
        for (int64_t i = 0; i < width; i++) half[i] = to_bf16(row[i]);
    }
}

/* Quantizes one head of a token, x [dim]: codes to `upper` and, unless it is NULL, what they leave to `lower`. */
static void pack_token(const float *x, int64_t dim, const float *scales, const float *minima, uint8_t *upper, uint8_t *lower) {
    uint8_t codes[dim], residuals[dim];
    for (int64_t d = 0; d < dim; d++) {
        const float code = code_of(x[d], scales[d], minima[d], 15), step = scales[d] / 16;
        const float residual = rintf((x[d] - (scales[d] * code + minima[d])) / step);
        codes[d] = (uint8_t)(int32_t)code;
        residuals[d] = (uint8_t)(int32_t)(step > 0 ? (residual < -8 ? 0 : residual > 7 ? 15 : residual + 8) : 8);
    }
    for (int64_t d = 0; d < dim / 2; d++) {
        upper[d] = (uint8_t)(codes[d] | codes[d + dim / 2] << 4);
        if (lower) lower[d] = (uint8_t)(residuals[d] | residuals[d + dim / 2] << 4);
    }
}

/* Scales and minima of the channels of one head's page, x [tokens, dim]: stored as halves, and returned as floats [dim]. */
static void channel_qparams(const float *x, int64_t tokens, int64_t dim, uint16_t *params, float *scales, float *minima) {
    float low[dim], high[dim];
    memcpy(low, x, sizeof low);
    memcpy(high, x, sizeof high);
    for (int64_t t = 1; t < tokens; t++)
        for (int64_t d = 0; d < dim; d++) {
            low[d] = x[t * dim + d] < low[d] ? x[t * dim + d] : low[d];
            high[d] = x[t * dim + d] > high[d] ? x[t * dim + d] : high[d];
        }
    for (int64_t d = 0; d < dim; d++) {
        choose_qparams(low[d], high[d], 15, params + d, params + dim + d);
        scales[d] = from_half(params[d]), minima[d] = from_half(params[dim + d]);
    }
}

/* The same for one token, whose scale and minimum are repeated for all channels. */
static void token_qparams(const float *x, int64_t dim, uint16_t *params, float *scales, float *minima) {
    float low, high;
    extremes(x, dim, &low, &high);
    choose_qparams(low, high, 15, params, params + 1);
    for (int64_t d = 0; d < dim; d++) scales[d] = from_half(params[0]), minima[d] = from_half(params[1]);
}

static void quantize_page(const KVSide *side, int64_t block) {
    const KVArrays *s = side->arrays;
    const int64_t dim = side->dim, tokens = side->paged->block_size, heads = side->kv_heads;
    const uint16_t *tail = s->tail_pages + side->paged->tail_page_ids[block] * tokens * heads * dim;
    float page[tokens * dim], scales[dim], minima[dim];
    for (int64_t h = 0; h < heads; h++) {
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t d = 0; d < dim; d++)
                page[t * dim + d] = from_bf16(tail[(t * heads + h) * dim + d]);
        if (side->by_channel)
            channel_qparams(page, tokens, dim, s->params + (block * heads + h) * 2 * dim, scales, minima);
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t row = (block * tokens + t) * heads + h;
            if (!side->by_channel) token_qparams(page + t * dim, dim, s->params + row * 2, scales, minima);
            pack_token(page + t * dim, dim, scales, minima, (uint8_t *)s->data + row * dim / 2,
                     s->lower ? s->lower + row * dim / 2 : NULL);
        }
    }
}

void quantize_if_full(const KVSide *side, int64_t slot) {
    const int64_t size = side->paged->block_size;
    if (side->type == I4 && slot >= 0 && slot % size == size - 1) quantize_page(side, slot / size);
}

typedef struct { const KVSide *sides; const int64_t *slots; const float *const *rows; int64_t count; } WriteCall;

static void write_body(void *argument) {
    const WriteCall *c = argument;
    const Range share = thread_range(c->count);
    for (int phase = 0; phase < 2; phase++) {
        for (int64_t i = share.first; i < share.last; i++)
            for (int k = 0; k < 2; k++) {
                const KVSide *side = c->sides + k;
                if (phase) quantize_if_full(side, c->slots[i]);
                else if (c->slots[i] >= 0) write_token(side, c->slots[i], c->rows[k] + i * side->kv_heads * side->dim);
            }
        if (c->sides->type != I4) return;
        thread_barrier(); /* a page is quantized after all of its tokens have been written */
    }
}

/* Writes keys [count, kv_heads, dim] and values [count, kv_heads, value_dim] to their slots; tokens with slot -1 are
   skipped. */
EXPORT void quantkit_kv_write(const AttentionConfig *config, const PagedBatch *paged, const KVArrays *keys,
                              const KVArrays *values, const int64_t *slots, int64_t count, const float *key,
                              const float *value, int threads) {
    const KVSide sides[2] = {key_side(config, paged, keys), value_side(config, paged, values)};
    const float *const rows[2] = {key, value};
    WriteCall call = {sides, slots, rows, count};
    run_threads(write_body, &call, (unsigned)threads);
}
