/* Inputs of packed weights as integers of 16 bits, each run of columns with a scale of its own.

   A prepared row: pairs [padded columns / 2], two inputs a word; scales float [runs]; sums of the integers int32 [runs]. The
   largest magnitude of a run becomes 32767, so that rounding moves an input by at most 2^-16 of that magnitude. Columns j and
   j + F/2 of each F side by side make a pair, as the codes that one mask cuts out of a word (F = 32/bits) do. */
#include "matmul.h"
#include "vec.h"

#include <math.h>

#define MOST 32767.0f

/* Below this the inverse of a scale is out of range; such inputs are as good as zero. */
#define LEAST 1e-30f

/* Added to a float below 2^22 it leaves the nearest integer at the bottom of the sum's bits. */
#define ROUNDER 12582912.0f /* 1.5 * 2^23 */

/* A run: `given` columns of x and zeros up to `length` -> integers; returns their sum. */
static int32_t round_run(const float *x, int64_t given, int64_t length, float inverse, uint32_t *integers) {
    vu sum = {0};
    for (int64_t k = 0; k < length; k += LANES) {
        const vu integer = (vu)(load_some(x + k, given - k) * inverse + ROUNDER) - float_to_bits(ROUNDER);
        sum += integer;
        memcpy(integers + k, &integer, sizeof integer);
    }
    uint32_t total = 0;
    for (int i = 0; i < LANES; i++) total += sum[i];
    return (int32_t)total;
}

INLINE void place_pairs(int fields, const uint32_t *integers, int64_t length, uint32_t *pairs) {
    const int half = fields / 2;
    for (int64_t word = 0; word < length; word += fields, pairs += half)
        for (int j = 0; j < half; j++) pairs[j] = (integers[word + j] & 0xffffu) | integers[word + half + j] << 16;
}

/* A row that holds infinity or NaN gets NaN for a scale: whatever it is multiplied by becomes NaN. */
void prepare_packed(const Matrix *w, const float *x, float *prepared) {
    const int64_t padded = padded_group(w);
    uint32_t *pairs = (uint32_t *)prepared, integers[RUN + LANES];
    float gathered[RUN];
    float *scales = prepared + padded_columns(w) / 2;
    int32_t *sums = (int32_t *)(scales + runs(w));
    for (int64_t g = 0; g < groups(w); g++)
        for (int64_t first = 0; first < padded; first += RUN) {
            const int64_t given = w->group - first, length = smaller(RUN, padded - first);
            const float *part = inputs_of(w, x, g * w->group + first, smaller(given, length), gathered);
            const float largest = largest_magnitude(part, smaller(given, length));
            *scales++ = largest < INFINITY ? largest / MOST : NAN;
            *sums++ = round_run(part, given, length, largest > LEAST ? MOST / largest : 0.0f, integers);
            if (w->bits == 2) place_pairs(16, integers, length, pairs);
            else if (w->bits == 4) place_pairs(8, integers, length, pairs);
            else place_pairs(4, integers, length, pairs);
            pairs += length / 2;
        }
}
