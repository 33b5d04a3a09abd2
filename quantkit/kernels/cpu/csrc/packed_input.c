/* Quantizes the inputs of packed weights to 16-bit integers, with one scale per run of columns.

   A prepared row: pairs [padded columns / 2], two inputs per word; scales float [runs]; sums of the integers int32 [runs]. The
   largest magnitude of a run becomes 32767, so rounding changes an input by at most 2^-16 of that magnitude. Within each F =
   32/bits columns, columns j and j + F/2 form a pair, like the two codes that one mask extracts from a word. */
#include "packed.h"
#include "vec.h"

#include <math.h>

#define INT16_LARGEST 32767.0f

/* Below this magnitude the inverse of a scale would overflow; such inputs become zero. */
#define SMALLEST 1e-30f

/* Adding this to a float below 2^22 leaves the nearest integer in the lowest bits of the sum. */
#define ROUNDER 12582912.0f /* 1.5 * 2^23 */

/* Quantizes a run: `given` columns of x, then zeros up to `length`. Returns the sum of the integers. */
static int32_t quantize_run(const float *x, int64_t given, int64_t length, float inverse, uint32_t *integers) {
    vu sum = {0};
    for (int64_t k = 0; k < length; k += LANES) {
        const vu integer = (vu)(load_partial(x + k, given - k) * inverse + ROUNDER) - float_to_bits(ROUNDER);
        sum += integer;
        memcpy(integers + k, &integer, sizeof integer);
    }
    uint32_t total = 0;
    for (int i = 0; i < LANES; i++) total += sum[i];
    return (int32_t)total;
}

INLINE void interleave_pairs(int fields, const uint32_t *integers, int64_t length, uint32_t *pairs) {
    const int half = fields / 2;
    for (int64_t word = 0; word < length; word += fields, pairs += half)
        for (int j = 0; j < half; j++) pairs[j] = (integers[word + j] & 0xffffu) | integers[word + half + j] << 16;
}

/* A run that holds infinity or NaN gets the scale NaN, so that the row's result is NaN. */
void prepare_packed(const Matrix *w, const float *x, float *prepared) {
    const int64_t padded = padded_group(w);
    uint32_t *pairs = (uint32_t *)prepared, integers[RUN + LANES];
    float gathered[RUN];
    float *scales = prepared + padded_columns(w) / 2;
    int32_t *sums = (int32_t *)(scales + runs(w));
    for (int64_t g = 0; g < groups(w); g++)
        for (int64_t first = 0; first < padded; first += RUN) {
            const int64_t given = w->group - first, length = min_i64(RUN, padded - first);
            const float *part = gather_inputs(w, x, g * w->group + first, min_i64(given, length), gathered);
            const float largest = max_abs(part, min_i64(given, length));
            *scales++ = largest < INFINITY ? largest / INT16_LARGEST : NAN;
            *sums++ = quantize_run(part, given, length, largest > SMALLEST ? INT16_LARGEST / largest : 0.0f, integers);
            if (w->bits == 2) interleave_pairs(16, integers, length, pairs);
            else if (w->bits == 4) interleave_pairs(8, integers, length, pairs);
            else interleave_pairs(4, integers, length, pairs);
            pairs += length / 2;
        }
}
