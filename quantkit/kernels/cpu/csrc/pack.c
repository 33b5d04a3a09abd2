/* Packs codes into the layout of matrix.h, and dequantizes them again. */
#include "matrix.h"
#include "threads.h"
#include "vec.h"

typedef struct { const Matrix *w; const uint8_t *codes, *zeros; const float *scales; } PackCall;

static void store_scale(const Matrix *w, int64_t at, float scale) {
    if (w->type == F32) ((float *)w->scales)[at] = scale;
    else ((uint16_t *)w->scales)[at] = to_half(scale);
}

/* Packs the codes of one row (NULL: a row of padding); `words` points to the row's first word in its tile. */
static void pack_row(const Matrix *w, const uint8_t *codes, uint32_t *words) {
    const int fields = 32 / w->bits;
    for (int64_t g = 0; g < groups(w); g++)
        for (int64_t k = 0; k < padded_group(w); k += fields, words += TILE) {
            uint32_t word = 0;
            for (int64_t j = 0; codes && j < min_i64(fields, w->group - k); j++)
                word |= (uint32_t)codes[g * w->group + k + j] << j * w->bits;
            *words = word;
        }
}

static void pack_body(void *argument) {
    const PackCall *c = argument;
    const Matrix *w = c->w;
    const int64_t all = groups(w);
    for (Range r = thread_range((w->rows + TILE - 1) / TILE); r.first < r.last; r.first++) {
        const int64_t scales = tile_scales(w, r.first);
        uint32_t *zeros = (uint32_t *)w->zeros + tile_zeros(w, r.first);
        for (int64_t n = 0; n < TILE; n++) {
            const int64_t row = r.first * TILE + n;
            const int given = row < w->rows;
            pack_row(w, given ? c->codes + row * w->columns : 0, (uint32_t *)w->data + r.first * tile_words(w) + n);
            for (int64_t g = 0; g < all; g++) {
                store_scale(w, scales + g * TILE + n, given ? c->scales[row * all + g] : 0);
                if (w->zeros) zeros[g / 4 * TILE + n] |= (given ? (uint32_t)c->zeros[row * all + g] : 0) << g % 4 * 8;
            }
        }
    }
}

/* codes uint8 [rows, columns], scales float [rows, groups], zeros uint8 [rows, groups] -> the weight's arrays. Its zeros must
   be all 0 beforehand. */
EXPORT void quantkit_pack(const Matrix *weight, const uint8_t *codes, const float *scales, const uint8_t *zeros, int threads) {
    PackCall call = {weight, codes, zeros, scales};
    run_threads(pack_body, &call, (unsigned)threads);
}

typedef struct { const Matrix *w; void *out; int64_t first, count; int type; } UnpackCall;

static float scale_at(const Matrix *w, int64_t at) {
    return w->type == F32 ? ((const float *)w->scales)[at] : from_half(((const uint16_t *)w->scales)[at]);
}

static void unpack_body(void *argument) {
    const UnpackCall *c = argument;
    const Matrix *w = c->w;
    const int fields = 32 / w->bits;
    const int64_t words_in_group = padded_group(w) / fields;
    for (Range r = thread_range(c->count); r.first < r.last; r.first++) {
        const int64_t row = c->first + r.first, tile = row / TILE, n = row % TILE;
        const int64_t scales = tile_scales(w, tile) + n, zeros = tile_zeros(w, tile) + n;
        const uint32_t *words = (const uint32_t *)w->data + tile * tile_words(w) + n;
        for (int64_t k = 0; k < w->columns; k++) {
            const int64_t g = k / w->group, j = k % w->group;
            const uint32_t word = words[(g * words_in_group + j / fields) * TILE] >> j % fields * w->bits;
            const int code = (int)(word & ((1u << w->bits) - 1));
            const int zero = w->zeros ? (int)(w->zeros[zeros + g / 4 * TILE] >> g % 4 * 8 & 0xffu) : w->zero;
            const float value = (float)(code - zero) * scale_at(w, scales + g * TILE);
            if (c->type == F32) ((float *)c->out)[r.first * w->columns + k] = value;
            else ((uint16_t *)c->out)[r.first * w->columns + k] = to_bf16(value);
        }
    }
}

/* Dequantizes rows first .. first+count-1 of a packed weight to out [count, columns], F32 or BF16. */
EXPORT void quantkit_dequantize(const Matrix *weight, int64_t first, int64_t count, int type, void *out, int threads) {
    UnpackCall call = {weight, out, first, count, type};
    run_threads(unpack_body, &call, (unsigned)threads);
}
