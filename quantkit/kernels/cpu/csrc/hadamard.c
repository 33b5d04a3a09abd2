/* x H with the orthonormal Hadamard matrix: log2(block) steps of sums and differences, neighbours first.

   The same numbers are added in the same order as in the reference, so the results are equal to the bit. */
#include "hadamard.h"
#include "threads.h"
#include "vec.h"

#include <math.h>

/* The steps that combine elements of one vector: those below `block`. */
INLINE vf hadamard_in_vector(vf v, int64_t block) {
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
        if (step >= block) break;
        const vf other = SHUFFLE(v, v, LANE_NUMBERS ^ step);
        v = vec_select((LANE_NUMBERS & step) != 0, other - v, v + other);
    }
    return v;
}

/* Transforms x [n] in place; n is a multiple of LANES and of block. */
static void transform_vectors(float *x, int64_t n, int64_t block, float scale) {
    for (int64_t i = 0; i < n; i += LANES) store(x + i, hadamard_in_vector(load(x + i), block));
    for (int64_t step = LANES; step < block; step *= 2)
        for (int64_t i = 0; i < n; i += 2 * step)
            for (int64_t j = i; j < i + step; j += LANES) {
                const vf a = load(x + j), b = load(x + j + step);
                store(x + j, a + b);
                store(x + j + step, a - b);
            }
    for (int64_t i = 0; i < n; i += LANES) store(x + i, load(x + i) * scale);
}

void hadamard_row(float *x, int64_t n, int64_t block) {
    if (!block) return;
    const float scale = (float)(1.0 / sqrt((double)block));
    const int64_t whole = block < LANES ? n / LANES * LANES : n;
    transform_vectors(x, whole, block, scale);
    if (whole == n) return;
    float rest[LANES] = {0}; /* with blocks smaller than a vector, n may end within one */
    memcpy(rest, x + whole, sizeof(float) * (n - whole));
    transform_vectors(rest, LANES, block, scale);
    memcpy(x + whole, rest, sizeof(float) * (n - whole));
}

typedef struct { float *x; int64_t rows, columns, block; } HadamardCall;

static void hadamard_body(void *argument) {
    const HadamardCall *c = argument;
    for (Range r = thread_range(c->rows); r.first < r.last; r.first++)
        hadamard_row(c->x + r.first * c->columns, c->columns, c->block);
}

/* Transforms every row of x [rows, columns] in place. */
EXPORT void quantkit_hadamard(float *x, int64_t rows, int64_t columns, int64_t block, int threads) {
    HadamardCall call = {x, rows, columns, block};
    run_threads(hadamard_body, &call, (unsigned)threads);
}
