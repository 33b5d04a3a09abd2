/* Floats into the paged KV cache. reference.py says what the quantized types mean; codes here are the same to the bit. */
#include "attention.h"
#include "team.h"
#include "vec.h"

#include <math.h>

/* Saturates at 448; a subnormal's bits are left at the bottom of its sum with 2^14. */
INLINE uint8_t to_e4m3(float value) {
    const uint32_t bits = float_to_bits(value), sign = bits >> 24 & 0x80;
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint8_t)(sign | 0x7f);
    if (magnitude > 0x43e00000) magnitude = 0x43e00000;
    if (magnitude < 0x3c800000) return (uint8_t)(sign | (float_to_bits(bits_to_float(magnitude) + 16384.0f) - 0x46800000));
    return (uint8_t)(sign | (magnitude - 0x3c000000 + 0x7ffff + (magnitude >> 20 & 1)) >> 20);
}

/* Scale and minimum as halves {scale, minimum} for numbers between low and high. */
INLINE void choose_params(float low, float high, float levels, uint16_t *scale, uint16_t *minimum) {
    *scale = to_half((high - low) / levels);
    *minimum = to_half(low);
}

INLINE float code_of(float x, float scale, float minimum, float levels) {
    const float code = rintf((x - minimum) / scale);
    return scale > 0 ? code < 0 ? 0 : code > levels ? levels : code : 0;
}

static void extremes(const float *x, int64_t n, float *low, float *high) {
    vf least = splat(x[0]), most = least;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        least = at_most(load(x + i), least);
        most = at_least(load(x + i), most);
    }
    *low = -lane_maximum(-least), *high = lane_maximum(most);
    for (; i < n; i++) {
        if (x[i] < *low) *low = x[i];
        if (x[i] > *high) *high = x[i];
    }
}

static void write_codes(const float *x, int64_t n, uint8_t *codes, uint16_t *params) {
    float low, high;
    extremes(x, n, &low, &high);
    choose_params(low, high, 255, params, params + 1);
    const float scale = from_half(params[0]), minimum = from_half(params[1]);
    for (int64_t i = 0; i < n; i++) codes[i] = (uint8_t)(int32_t)code_of(x[i], scale, minimum, 255);
}

void write_row(const Side *side, int64_t slot, const float *row) {
    const Store *s = side->store;
    const int64_t width = side->kv_heads * side->dim, block_size = side->pages->block_size;
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
    default: /* BF16, and open pages, which are of that type */
        if (side->type == I4)
            half = s->open + (side->pages->open_pages[slot / block_size] * block_size + slot % block_size) * width;
        for (int64_t i = 0; i < width; i++) half[i] = to_bf16(row[i]);
    }
}

/* Codes of one row x [dim] into both planes. */
static void pack_row(const float *x, int64_t dim, const float *scales, const float *minima, uint8_t *upper, uint8_t *lower) {
    uint8_t codes[dim], rests[dim];
    for (int64_t d = 0; d < dim; d++) {
        const float code = code_of(x[d], scales[d], minima[d], 15), step = scales[d] / 16;
        const float rest = rintf((x[d] - (scales[d] * code + minima[d])) / step);
        codes[d] = (uint8_t)(int32_t)code;
        rests[d] = (uint8_t)(int32_t)(step > 0 ? (rest < -8 ? 0 : rest > 7 ? 15 : rest + 8) : 8);
    }
    for (int64_t d = 0; d < dim / 2; d++) {
        upper[d] = (uint8_t)(codes[d] | codes[d + dim / 2] << 4);
        if (lower) lower[d] = (uint8_t)(rests[d] | rests[d + dim / 2] << 4);
    }
}

/* Scales and minima of the channels of one head's page x [tokens, dim]: stored, and as floats [dim]. */
static void channel_params(const float *x, int64_t tokens, int64_t dim, uint16_t *params, float *scales, float *minima) {
    float low[dim], high[dim];
    memcpy(low, x, sizeof low);
    memcpy(high, x, sizeof high);
    for (int64_t t = 1; t < tokens; t++)
        for (int64_t d = 0; d < dim; d++) {
            low[d] = x[t * dim + d] < low[d] ? x[t * dim + d] : low[d];
            high[d] = x[t * dim + d] > high[d] ? x[t * dim + d] : high[d];
        }
    for (int64_t d = 0; d < dim; d++) {
        choose_params(low[d], high[d], 15, params + d, params + dim + d);
        scales[d] = from_half(params[d]), minima[d] = from_half(params[dim + d]);
    }
}

/* The same of one token, repeated. */
static void token_params(const float *x, int64_t dim, uint16_t *params, float *scales, float *minima) {
    float low, high;
    extremes(x, dim, &low, &high);
    choose_params(low, high, 15, params, params + 1);
    for (int64_t d = 0; d < dim; d++) scales[d] = from_half(params[0]), minima[d] = from_half(params[1]);
}

static void settle_page(const Side *side, int64_t block) {
    const Store *s = side->store;
    const int64_t dim = side->dim, tokens = side->pages->block_size, heads = side->kv_heads;
    const uint16_t *open = s->open + side->pages->open_pages[block] * tokens * heads * dim;
    float page[tokens * dim], scales[dim], minima[dim];
    for (int64_t h = 0; h < heads; h++) {
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t d = 0; d < dim; d++)
                page[t * dim + d] = from_bf16(open[(t * heads + h) * dim + d]);
        if (side->by_channel)
            channel_params(page, tokens, dim, s->params + (block * heads + h) * 2 * dim, scales, minima);
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t row = (block * tokens + t) * heads + h;
            if (!side->by_channel) token_params(page + t * dim, dim, s->params + row * 2, scales, minima);
            pack_row(page + t * dim, dim, scales, minima, (uint8_t *)s->data + row * dim / 2,
                     s->lower ? s->lower + row * dim / 2 : NULL);
        }
    }
}

void settle_slot(const Side *side, int64_t slot) {
    const int64_t size = side->pages->block_size;
    if (side->type == I4 && slot >= 0 && slot % size == size - 1) settle_page(side, slot / size);
}

typedef struct { const Side *sides; const int64_t *slots; const float *const *rows; int64_t count; } WriteCall;

static void write_body(void *argument) {
    const WriteCall *c = argument;
    const Range share = my_share(c->count);
    for (int phase = 0; phase < 2; phase++) {
        for (int64_t i = share.first; i < share.last; i++)
            for (int k = 0; k < 2; k++) {
                const Side *side = c->sides + k;
                if (phase) settle_slot(side, c->slots[i]);
                else if (c->slots[i] >= 0) write_row(side, c->slots[i], c->rows[k] + i * side->kv_heads * side->dim);
            }
        if (c->sides->type != I4) return;
        wait_for_team(); /* a page is settled once all of its tokens are there */
    }
}

/* Keys [count, kv_heads, dim] and values [count, kv_heads, value_dim] into their slots; a slot of -1 is not written. */
EXPORT void quantkit_kv_write(const Heads *heads, const Pages *pages, const Store *keys, const Store *values,
                              const int64_t *slots, int64_t count, const float *key, const float *value, int threads) {
    const Side sides[2] = {key_side(heads, pages, keys), value_side(heads, pages, values)};
    const float *const rows[2] = {key, value};
    WriteCall call = {sides, slots, rows, count};
    run_team(write_body, &call, (unsigned)threads);
}
