/* The largest value of each row and its first index, in one pass. Every step does this to its logits. */
#include "threads.h"
#include "vec.h"

#include <math.h>

/* Columns per chunk. Chunk maxima are compared first; the index is then searched in one chunk only. */
#define CHUNK 512

/* The largest value of x [n]; NaN if x holds a NaN. */
static float max_or_nan(const float *x, int64_t n) {
    vf largest[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
    vi not_nan = largest[0] == largest[0];
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; j++) {
            const vf v = load(x + i + j * LANES);
            largest[j] = vec_select(v > largest[j], v, largest[j]);
            not_nan &= v == v;
        }
    float found = -INFINITY;
    int nan = 0;
    for (; i < n; i++) {
        found = x[i] > found ? x[i] : found;
        nan |= x[i] != x[i];
    }
    for (int lane = 0; lane < LANES; lane++) {
        for (int j = 0; j < 4; j++) found = largest[j][lane] > found ? largest[j][lane] : found;
        nan |= !not_nan[lane];
    }
    return nan ? NAN : found;
}

static float row_max(const float *row, int64_t width, int64_t *index) {
    float largest = -INFINITY;
    int64_t chunk = 0;
    for (int64_t first = 0; first < width && largest == largest; first += CHUNK) {
        const float chunk_max = max_or_nan(row + first, min_i64(CHUNK, width - first));
        if (!(chunk_max <= largest)) {
            largest = chunk_max;
            chunk = first;
        }
    }
    *index = chunk;
    while (largest == largest ? row[*index] != largest : row[*index] == row[*index]) ++*index;
    return largest;
}

typedef struct { const float *rows; int64_t count, width; float *values; int64_t *indices; } RowMaxCall;

static void row_max_body(void *argument) {
    const RowMaxCall *c = argument;
    for (Range r = thread_range(c->count); r.first < r.last; r.first++)
        c->values[r.first] = row_max(c->rows + r.first * c->width, c->width, c->indices + r.first);
}

/* rows [count, width], not empty -> values and indices [count]. A row that holds a NaN gives NaN and the index of its first
   one. */
EXPORT void quantkit_row_max(const float *rows, int64_t count, int64_t width, float *values, int64_t *indices, int threads) {
    RowMaxCall call = {rows, count, width, values, indices};
    run_threads(row_max_body, &call, (unsigned)min_i64(threads, count));
}
