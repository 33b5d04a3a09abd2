/* x H with the orthonormal Hadamard matrix: log2(block) steps of sums and differences, neighbours first.

   All additions are of the same numbers in the same order as in the reference, so results are equal to the bit. */
#include "hadamard.h"
#include "team.h"
#include "vec.h"

#include <math.h>

/* The elements that are `step` lanes away. */
INLINE vf partners(vf v, vi lane, int step) {
#ifdef __clang__
    vf other;
    for (int i = 0; i < LANES; i++) other[i] = v[i ^ step];
    return other;
#else
    return __builtin_shuffle(v, lane ^ step);
#endif
}

/* Steps between elements of one vector, below `block`. */
INLINE vf within(vf v, int64_t block) {
    vi lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
        if (step >= block) break;
        const vf other = partners(v, lane, step);
        v = choose((lane & step) != 0, other - v, v + other);
    }
    return v;
}

/* x [n], n a multiple of LANES and of block. */
static void vectors(float *x, int64_t n, int64_t block, float scale) {
    for (int64_t i = 0; i < n; i += LANES) store(x + i, within(load(x + i), block));
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
    vectors(x, whole, block, scale);
    if (whole == n) return;
    float rest[LANES] = {0}; /* blocks smaller than a vector may leave a part of one */
    memcpy(rest, x + whole, sizeof(float) * (n - whole));
    vectors(rest, LANES, block, scale);
    memcpy(x + whole, rest, sizeof(float) * (n - whole));
}

typedef struct { float *x; int64_t rows, columns, block; } HadamardCall;

static void hadamard_body(void *argument) {
    const HadamardCall *c = argument;
    for (Range r = my_share(c->rows); r.first < r.last; r.first++)
        hadamard_row(c->x + r.first * c->columns, c->columns, c->block);
}

/* Every row of x [rows, columns], in place. */
EXPORT void quantkit_hadamard(float *x, int64_t rows, int64_t columns, int64_t block, int threads) {
    HadamardCall call = {x, rows, columns, block};
    run_team(hadamard_body, &call, (unsigned)threads);
}
