/* Quantizes the inputs of packed weights to 16-bit integers, with one scale per run of columns.

   A prepared row: the integers, in words [padded columns / 2]; scales float [runs]; offsets int32 [runs], minus the sum of the
   integers, multiplied by the zero point if the weight has just one. The largest magnitude of a run becomes LARGEST_INPUT, so
   rounding changes an input by at most 2^-15.99 of that magnitude.

   Words hold the columns whose codes one mask extracts from a word of the weight, with F = 32/bits. For instructions on 16-bit
   integers, columns j and j + F/2 of each F columns are a word. For instructions on bytes, columns b * F/4 + j, b = 0..3, are
   two words: their upper bytes, rounded to nearest, then their lower bytes, both signed. */
#include "dot.h"
#include "packed.h"
#include "vec.h"

#include <math.h>

/* 127 * 256 + 127: the largest integer whose upper and lower byte are both signed. */
#define LARGEST_INPUT 32639.0f

/* Below this magnitude the inverse of a scale would overflow; such inputs become zero. */
#define SMALLEST 1e-30f

/* Adding this to a float below 2^22 leaves the nearest integer in the lowest bits of the sum. */
#define ROUNDER 12582912.0f /* 1.5 * 2^23 */

typedef uint16_t vh __attribute__((vector_size(4 * LANES)));
typedef uint8_t vb __attribute__((vector_size(4 * LANES)));

/* LANES columns of x as integers; the last ones are zeros if fewer are given. */
INLINE vi quantize(const float *x, int64_t given, float inverse) {
    return (vi)(load_partial(x, given) * inverse + ROUNDER) - (int32_t)float_to_bits(ROUNDER);
}

#if LANES == 16
#define BYTE_NUMBERS                                                                                                        \
    ((vb){COUNT_8(0), COUNT_8(8), COUNT_8(16), COUNT_8(24), COUNT_8(32), COUNT_8(40), COUNT_8(48), COUNT_8(56)})
#define EVEN_NUMBERS                                                                                                        \
    ((vh){COUNT_8(0), COUNT_8(8), COUNT_8(16), COUNT_8(24)} * 2)
#else
#define BYTE_NUMBERS ((vb){COUNT_8(0), COUNT_8(8), COUNT_8(16), COUNT_8(24)})
#define EVEN_NUMBERS ((vh){COUNT_8(0), COUNT_8(8)} * 2)
#endif

/* Which bytes of 2 * LANES 16-bit integers, in column order, become the bytes of their words; fields = F. */
INLINE vb byte_order(int fields) {
    const vb i = BYTE_NUMBERS, group = i / (uint8_t)(2 * fields) * (uint8_t)fields, word = i % (uint8_t)(2 * fields) / 4;
    if (HAS_BYTE_DOT) return 2 * (group + i % 4 * (uint8_t)(fields / 4) + word / 2) + 1 - word % 2;
    return 2 * (group + i % 4 / 2 * (uint8_t)(fields / 2) + word) + i % 2;
}

/* Quantizes a run to words: `given` columns of x, then zeros up to `length`. Returns the sum of the integers. */
INLINE uint32_t quantize_run(int fields, const float *x, int64_t given, int64_t length, float inverse, uint32_t *words) {
    vu sum = {0};
    for (int64_t k = 0; k < length; k += 2 * LANES) {
        const vi low = quantize(x + k, given - k, inverse), high = quantize(x + k + LANES, given - k - LANES, inverse);
        vh integers = SHUFFLE((vh)low, (vh)high, EVEN_NUMBERS);
        /* Adding 128 rounds the upper byte to nearest and flips the sign bit of the lower byte, which is flipped back. */
        if (HAS_BYTE_DOT) integers = (integers + 128) ^ 128;
        const vb bytes = SHUFFLE((vb)integers, (vb)integers, byte_order(fields));
        if (length - k >= 2 * LANES) memcpy(words + k / 2, &bytes, sizeof bytes); /* a length that the compiler knows */
        else memcpy(words + k / 2, &bytes, 2 * (length - k));
        sum += (vu)low + (vu)high;
    }
    return lane_sum_integers(sum);
}

/* The largest magnitude of each run of a row. They are found before anything is quantized, so that the processor can work on
   several runs at once: each is a long chain of operations. */
static void run_maxima(const Matrix *w, const float *x, float *largest) {
    for (int64_t g = 0; g < groups(w); g++, x += w->group)
        for (int64_t first = 0; first < padded_group(w); first += RUN)
            *largest++ = max_abs(x + first, min_i64(RUN, w->group - first));
}

/* Quantizes a row, run by run; fields = F. A run that holds infinity or NaN gets the scale NaN, so that the row's result is
   NaN. */
INLINE void quantize_row(int fields, const Matrix *w, const float *x, const float *largest, uint32_t *words, float *scales,
                         uint32_t *offsets) {
    const int64_t padded = padded_group(w);
    for (int64_t g = 0; g < groups(w); g++, x += w->group)
        for (int64_t first = 0; first < padded; first += RUN, largest++) {
            const int64_t length = min_i64(RUN, padded - first);
            const float inverse = *largest > SMALLEST ? LARGEST_INPUT / *largest : 0.0f;
            const uint32_t sum = quantize_run(fields, x + first, w->group - first, length, inverse, words);
            *scales++ = *largest < INFINITY ? *largest / LARGEST_INPUT : NAN;
            *offsets++ = w->zeros ? -sum : -sum * ((uint32_t)w->zero - CODE_SHIFT(w->bits));
            words += length / 2;
        }
}

void prepare_packed(const Matrix *w, const float *x, float *prepared) {
    float gathered[w->column_perm ? w->columns : 1], largest[runs(w)];
    float *scales = prepared + padded_columns(w) / 2;
    uint32_t *words = (uint32_t *)prepared, *offsets = (uint32_t *)(scales + runs(w));
    x = gather_inputs(w, x, 0, w->columns, gathered);
    run_maxima(w, x, largest);
    if (w->bits == 2) quantize_row(16, w, x, largest, words, scales, offsets);
    else if (w->bits == 4) quantize_row(8, w, x, largest, words, scales, offsets);
    else quantize_row(4, w, x, largest, words, scales, offsets);
}
