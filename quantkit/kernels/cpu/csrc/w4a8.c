/* Packed weights times quantized inputs: x becomes integers of 8 or 4 bits with one scale per row, and integers are
   multiplied.

   A prepared row: bytes [padded columns], where the four columns whose codes one mask extracts from a word are adjacent; int32
   sums [groups]; the scale. The byte multiply instruction adds two neighbouring products in 16 bits, which hold a few such
   sums before they must be widened. 8-bit codes are multiplied in two halves of 4 bits, since 2 * 255 * 127 overflows 16 bits.
   Sums are exact for groups of up to 65536 columns. */
#include "w4a8.h"
#include "dot.h"
#include "threads.h"

#include <math.h>

/* Rows of x per block. */
#define BLOCK_ROWS 4

/* Columns that are quantized at a time: whole words for any number of bits. */
#define COLUMNS_AT_ONCE 64

/* Adds to the sums the products of the four bytes of each word: `codes`, below 16, times `x`, signed. */
INLINE vi add_products(vi sums, vu codes, vi x) {
#if HAS_BYTE_DOT
    return byte_dot(sums, codes, x);
#elif defined(__AVX512BW__) && LANES == 16
    return (vi)_mm512_add_epi16((__m512i)sums, _mm512_maddubs_epi16((__m512i)codes, (__m512i)x));
#elif defined(__AVX2__) && LANES == 8
    return (vi)_mm256_add_epi16((__m256i)sums, _mm256_maddubs_epi16((__m256i)codes, (__m256i)x));
#else
    for (int b = 0; b < 4; b++) sums += (vi)(codes >> 8 * b & 0xffu) * (x << (24 - 8 * b) >> 24);
    return sums;
#endif
}

/* The sums of `add_products`, widened to one int32 per word and multiplied by `factor` (1 or 16). */
INLINE vi widened(vi sums, int factor) {
#if HAS_BYTE_DOT
    return sums * factor;
#elif defined(__AVX512BW__) && LANES == 16
    return (vi)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16((short)factor));
#elif defined(__AVX2__) && LANES == 8
    return (vi)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16((short)factor));
#else
    return sums * factor;
#endif
}

INLINE vi splat_bytes(const int8_t *four) {
    int32_t word;
    memcpy(&word, four, sizeof word);
    return word - (vi){0};
}

/* Sums of codes times x over a group of `count` words, for TILE rows of the weight and `rows` rows of x: sums [rows, TILE].
   bits and rows are compile-time constants. */
INLINE void group_sums(int bits, int rows, int64_t count, const uint32_t *words, const int8_t *x, int64_t x_stride,
                       int32_t *sums) {
    const int halves = bits == 8 ? 2 : 1, width = bits / halves, fields = 8 / width, inputs = 8 / bits;
    /* 16 bits hold 8 sums of two products of 4-bit codes, and 43 of 2-bit codes. */
    const int64_t safe = bits == 4 ? 4 : 8;
    const int chains = halves * rows <= 2 ? 4 : halves * rows <= 4 ? 2 : 1;
    const int vectors = chains < TILE / LANES ? chains : TILE / LANES;
    for (int part = 0; part < TILE; part += vectors * LANES) {
        vi total[BLOCK_ROWS][TILE / LANES] = {0};
        for (int64_t first = 0; first < count; first += safe) {
            vi acc[2][BLOCK_ROWS][TILE / LANES] = {0};
            for (int64_t step = first; step < min_i64(first + safe, count); step++) {
                prefetch_words(words + step * TILE);
#pragma GCC unroll 4
                for (int j = 0; j < fields; j++) {
                    vu code[TILE / LANES];
#pragma GCC unroll 4
                    for (int v = 0; v < vectors; v++)
                        code[v] = load_words(words + step * TILE + part + v * LANES) >> (width * j) &
                                  ((1u << width) - 1) * 0x01010101u;
#pragma GCC unroll 4
                    for (int m = 0; m < rows; m++) {
                        const vi input = splat_bytes(x + m * x_stride + (step * inputs + j % inputs) * 4);
#pragma GCC unroll 4
                        for (int v = 0; v < vectors; v++)
                            acc[j / inputs][m][v] = add_products(acc[j / inputs][m][v], code[v], input);
                    }
                }
            }
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) {
                    total[m][v] += widened(acc[0][m][v], 1);
                    if (halves == 2) total[m][v] += widened(acc[1][m][v], 16);
                }
        }
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) memcpy(sums + m * TILE + part + v * LANES, &total[m][v], sizeof(vi));
    }
}

typedef void GroupSums(int64_t count, const uint32_t *words, const int8_t *x, int64_t x_stride, int32_t *sums);

#define INSTANCE(BITS, ROWS)                                                                                                \
    static NOINLINE void sums_##BITS##_##ROWS(int64_t count, const uint32_t *words, const int8_t *x, int64_t stride,        \
                                              int32_t *sums) {                                                              \
        group_sums(BITS, ROWS, count, words, x, stride, sums);                                                              \
    }
#define INSTANCES(BITS) INSTANCE(BITS, 1) INSTANCE(BITS, 2) INSTANCE(BITS, 3) INSTANCE(BITS, 4)
INSTANCES(2) INSTANCES(4) INSTANCES(8)

/* By bits / 4 and rows of x. */
static GroupSums *const GROUP_SUMS[3][BLOCK_ROWS + 1] = {
    {0, sums_2_1, sums_2_2, sums_2_3, sums_2_4},
    {0, sums_4_1, sums_4_2, sums_4_3, sums_4_4},
    {0, sums_8_1, sums_8_2, sums_8_3, sums_8_4},
};

/* The sums and the scale of a prepared row. */
INLINE const int32_t *input_sums(const Matrix *w, const float *prepared) {
    return (const int32_t *)prepared + padded_columns(w) / 4;
}
INLINE float input_scale(const Matrix *w, const float *prepared) { return prepared[padded_columns(w) / 4 + groups(w)]; }

/* Multiplies one tile with rows <= BLOCK_ROWS rows of x that are `stride` floats apart: totals [rows, TILE], without the scale
   of x. */
static void tile_totals(const Matrix *w, int64_t tile, const float *prepared, int64_t stride, int64_t rows, float *totals) {
    const int64_t all = groups(w), words = tile_words(w) / all;
    const int64_t scales = tile_scales(w, tile), zeros = tile_zeros(w, tile);
    const uint32_t *data = (const uint32_t *)w->data + tile * tile_words(w);
    const int8_t *x = (const int8_t *)prepared;
    int32_t sums[BLOCK_ROWS * TILE] __attribute__((aligned(64)));
    memset(totals, 0, sizeof(float) * rows * TILE);
    for (int64_t g = 0; g < all; g++, data += words, x += padded_group(w)) {
        GROUP_SUMS[w->bits / 4][rows](words / TILE, data, x, stride * 4, sums);
        for (int v = 0; v < TILE; v += LANES) {
            const vf scale = load_scales(w, scales + g * TILE + v);
            const vi zero = load_zeros(w, zeros + v, g);
            for (int64_t m = 0; m < rows; m++) {
                const vi dot = (vi)load_words(sums + m * TILE + v) - zero * input_sums(w, prepared + m * stride)[g];
                float *total = totals + m * TILE + v;
                store(total, load(total) + scale * __builtin_convertvector(dot, vf));
            }
        }
    }
}

void w4a8_share(const Matrix *w, const float *prepared, int64_t m, float *out) {
    const int64_t stride = prepared_floats(w);
    float totals[BLOCK_ROWS * TILE] __attribute__((aligned(64)));
    for (Range r = thread_range((w->rows + TILE - 1) / TILE); r.first < r.last; r.first++) {
        const int64_t base = r.first * TILE, count = min_i64(TILE, w->rows - base);
        for (int64_t row = 0, rows; row < m; row += rows) {
            rows = even_block(m - row, BLOCK_ROWS);
            tile_totals(w, r.first, prepared + row * stride, stride, rows, totals);
            for (int64_t i = 0; i < rows; i++) {
                const float scale = input_scale(w, prepared + (row + i) * stride);
                float *to = out + (row + i) * w->rows + base;
                for (int64_t n = 0; n < count; n++)
                    to[n] = totals[i * TILE + n] * scale + (w->bias ? w->bias[base + n] : 0.0f);
            }
        }
    }
}

/* Reorders bytes: within each word of 4 * fields columns, columns b * fields + j for b = 0..3 become adjacent. */
INLINE void interleave_bytes(int fields, const int8_t *row, int64_t length, int8_t *to) {
    for (int64_t word = 0; word < length; word += 4 * fields)
        for (int j = 0; j < fields; j++)
            for (int b = 0; b < 4; b++) to[word + j * 4 + b] = row[word + b * fields + j];
}

/* Quantizes group g of x to bytes, padded with zeros. Returns their sum. */
static int32_t quantize_group(const Matrix *w, const float *x, int64_t g, float inverse, int8_t *to) {
    const int64_t count = w->group, length = padded_group(w);
    float gathered[COLUMNS_AT_ONCE];
    int32_t sum = 0;
    for (int64_t first = 0; first < length; first += COLUMNS_AT_ONCE) {
        int8_t row[COLUMNS_AT_ONCE] = {0};
        const int64_t given = min_i64(COLUMNS_AT_ONCE, count - first), piece = min_i64(COLUMNS_AT_ONCE, length - first);
        const float *part = gather_inputs(w, x, g * count + first, given, gathered);
        for (int64_t k = 0; k < given; k++) row[k] = (int8_t)rintf(part[k] * inverse);
        for (int64_t k = 0; k < COLUMNS_AT_ONCE; k++) sum += row[k];
        if (w->bits == 2) interleave_bytes(4, row, piece, to + first);
        else if (w->bits == 4) interleave_bytes(2, row, piece, to + first);
        else memcpy(to + first, row, piece);
    }
    return sum;
}

void prepare_w4a8(const Matrix *w, const float *x, float *prepared) {
    const float int_max = w->activation_bits == 4 ? 7.0f : 127.0f, largest = max_abs(x, w->columns);
    const float inverse = largest > 0 ? int_max / largest : 0.0f;
    int8_t *bytes = (int8_t *)prepared;
    int32_t *sums = (int32_t *)input_sums(w, prepared);
    for (int64_t g = 0; g < groups(w); g++, bytes += padded_group(w)) sums[g] = quantize_group(w, x, g, inverse, bytes);
    prepared[padded_columns(w) / 4 + groups(w)] = largest / int_max;
}
