/* Packed weights times rounded inputs: x becomes integers of 8 or 4 bits and one scale a row, products are of integers.

   A prepared row: bytes [padded columns], the four columns whose codes one mask cuts out of a word side by side; int32 sums
   [groups]; the scale. A multiplication of bytes adds two neighbours in 16 bits, which hold a few such sums before they are
   widened. Codes of 8 bits are multiplied in halves, since 2 * 255 * 127 is more than 16 bits hold. Sums are exact integers
   up to groups of 65536 columns. */
#include "matmul.h"
#include "team.h"
#include "vec.h"

#include <math.h>

#if (defined(__AVX2__) && LANES == 8) || (defined(__AVX512BW__) && LANES == 16)
#include <immintrin.h>
#endif

/* Rows of x that are multiplied at a time. */
#define BLOCK 4

/* Columns that are rounded at a time, whole words for any number of bits. */
#define PIECE 64

/* The four bytes of each word of `codes`, below 16, times those of `x`, signed: to the sums so far. */
INLINE vi add_products(vi sums, vu codes, vi x) {
#if defined(__AVX512BW__) && LANES == 16
    return (vi)_mm512_add_epi16((__m512i)sums, _mm512_maddubs_epi16((__m512i)codes, (__m512i)x));
#elif defined(__AVX2__) && LANES == 8
    return (vi)_mm256_add_epi16((__m256i)sums, _mm256_maddubs_epi16((__m256i)codes, (__m256i)x));
#else
    for (int b = 0; b < 4; b++) sums += (vi)(codes >> 8 * b & 0xffu) * (x << (24 - 8 * b) >> 24);
    return sums;
#endif
}

/* What `add_products` has added up, as one sum a word, times 1 or 16. */
INLINE vi widened(vi sums, int factor) {
#if defined(__AVX512BW__) && LANES == 16
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

/* Sums of codes times x over a group, `count` words of TILE weight rows, for `rows` rows of x; sums [rows, TILE]. Constants
   of each instance: bits, rows. */
INLINE void group_sums(int bits, int rows, int64_t count, const uint32_t *words, const int8_t *x, int64_t x_stride,
                       int32_t *sums) {
    const int halves = bits == 8 ? 2 : 1, width = bits / halves, fields = 8 / width, inputs = 8 / bits;
    /* 16 bits hold 8 sums of two products of 4 bits, and 43 of 2 bits. */
    const int64_t safe = bits == 4 ? 4 : 8;
    const int chains = halves * rows <= 2 ? 4 : halves * rows <= 4 ? 2 : 1;
    const int vectors = chains < TILE / LANES ? chains : TILE / LANES;
    for (int part = 0; part < TILE; part += vectors * LANES) {
        vi total[BLOCK][TILE / LANES] = {0};
        for (int64_t first = 0; first < count; first += safe) {
            vi acc[2][BLOCK][TILE / LANES] = {0};
            for (int64_t step = first; step < smaller(first + safe, count); step++) {
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
static GroupSums *const GROUP_SUMS[3][BLOCK + 1] = {
    {0, sums_2_1, sums_2_2, sums_2_3, sums_2_4},
    {0, sums_4_1, sums_4_2, sums_4_3, sums_4_4},
    {0, sums_8_1, sums_8_2, sums_8_3, sums_8_4},
};

/* Where a prepared row has what. */
INLINE const int32_t *sums_of(const Matrix *w, const float *prepared) { return (const int32_t *)prepared + padded_columns(w) / 4; }
INLINE float scale_of(const Matrix *w, const float *prepared) { return prepared[padded_columns(w) / 4 + groups(w)]; }

/* One tile for up to BLOCK rows of x, `stride` floats apart; totals [rows, TILE], without the scale of x. */
static void tile_totals(const Matrix *w, int64_t tile, const float *prepared, int64_t stride, int64_t rows, float *totals) {
    const int64_t all = groups(w), words = tile_words(w) / all;
    const int64_t scales = tile_scales(w, tile), zeros = tile_zeros(w, tile);
    const uint32_t *data = (const uint32_t *)w->data + tile * tile_words(w);
    const int8_t *x = (const int8_t *)prepared;
    int32_t sums[BLOCK * TILE] __attribute__((aligned(64)));
    memset(totals, 0, sizeof(float) * rows * TILE);
    for (int64_t g = 0; g < all; g++, data += words, x += padded_group(w)) {
        GROUP_SUMS[w->bits / 4][rows](words / TILE, data, x, stride * 4, sums);
        for (int v = 0; v < TILE; v += LANES) {
            const vf scale = scales_of(w, scales + g * TILE + v);
            const vi zero = zeros_of(w, zeros + v, g);
            for (int64_t m = 0; m < rows; m++) {
                const vi dot = (vi)load_words(sums + m * TILE + v) - zero * sums_of(w, prepared + m * stride)[g];
                float *total = totals + m * TILE + v;
                store(total, load(total) + scale * __builtin_convertvector(dot, vf));
            }
        }
    }
}

void rounded_share(const Matrix *w, const float *prepared, int64_t m, float *out) {
    const int64_t stride = prepared_floats(w);
    float totals[BLOCK * TILE] __attribute__((aligned(64)));
    for (Range r = my_share((w->rows + TILE - 1) / TILE); r.first < r.last; r.first++) {
        const int64_t base = r.first * TILE, count = smaller(TILE, w->rows - base);
        for (int64_t row = 0, rows; row < m; row += rows) {
            rows = even_block(m - row, BLOCK);
            tile_totals(w, r.first, prepared + row * stride, stride, rows, totals);
            for (int64_t i = 0; i < rows; i++) {
                const float scale = scale_of(w, prepared + (row + i) * stride);
                float *to = out + (row + i) * w->rows + base;
                for (int64_t n = 0; n < count; n++)
                    to[n] = totals[i * TILE + n] * scale + (w->bias ? w->bias[base + n] : 0.0f);
            }
        }
    }
}

/* Bytes in the order of columns -> columns b * fields + j of a word of 4 * fields side by side for b = 0..3. */
INLINE void place_bytes(int fields, const int8_t *row, int64_t length, int8_t *to) {
    for (int64_t word = 0; word < length; word += 4 * fields)
        for (int j = 0; j < fields; j++)
            for (int b = 0; b < 4; b++) to[word + j * 4 + b] = row[word + b * fields + j];
}

/* Group g of x as bytes, padded with zeros; returns their sum. */
static int32_t round_group(const Matrix *w, const float *x, int64_t g, float inverse, int8_t *to) {
    const int64_t count = w->group, length = padded_group(w);
    float gathered[PIECE];
    int32_t sum = 0;
    for (int64_t first = 0; first < length; first += PIECE) {
        int8_t row[PIECE] = {0};
        const int64_t given = smaller(PIECE, count - first), piece = smaller(PIECE, length - first);
        const float *part = inputs_of(w, x, g * count + first, given, gathered);
        for (int64_t k = 0; k < given; k++) row[k] = (int8_t)rintf(part[k] * inverse);
        for (int64_t k = 0; k < PIECE; k++) sum += row[k];
        if (w->bits == 2) place_bytes(4, row, piece, to + first);
        else if (w->bits == 4) place_bytes(2, row, piece, to + first);
        else memcpy(to + first, row, piece);
    }
    return sum;
}

void prepare_rounded(const Matrix *w, const float *x, float *prepared) {
    const float most = w->input_bits == 4 ? 7.0f : 127.0f, largest = largest_magnitude(x, w->columns);
    const float inverse = largest > 0 ? most / largest : 0.0f;
    int8_t *bytes = (int8_t *)prepared;
    int32_t *sums = (int32_t *)sums_of(w, prepared);
    for (int64_t g = 0; g < groups(w); g++, bytes += padded_group(w)) sums[g] = round_group(w, x, g, inverse, bytes);
    prepared[padded_columns(w) / 4 + groups(w)] = largest / most;
}
