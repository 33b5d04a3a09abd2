/* The largest of each row and the first place where it stands, in one pass: what is done to the logits of every step. */
#include "team.h"
#include "vec.h"

#include <math.h>

/* Columns whose maximum is taken at a time; only one such piece is looked at again. */
#define PIECE 512

/* NaN where x [n] holds one. */
static float maximum(const float *x, int64_t n) {
    vf most[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
    vi sound = most[0] == most[0];
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; j++) {
            const vf v = load(x + i + j * LANES);
            most[j] = choose(v > most[j], v, most[j]);
            sound &= v == v;
        }
    float found = -INFINITY;
    int nan = 0;
    for (; i < n; i++) {
        found = x[i] > found ? x[i] : found;
        nan |= x[i] != x[i];
    }
    for (int lane = 0; lane < LANES; lane++) {
        for (int j = 0; j < 4; j++) found = most[j][lane] > found ? most[j][lane] : found;
        nan |= !sound[lane];
    }
    return nan ? NAN : found;
}

static float row_maximum(const float *row, int64_t width, int64_t *place) {
    float most = -INFINITY;
    int64_t piece = 0;
    for (int64_t first = 0; first < width && most == most; first += PIECE) {
        const float here = maximum(row + first, smaller(PIECE, width - first));
        if (!(here <= most)) {
            most = here;
            piece = first;
        }
    }
    *place = piece;
    while (most == most ? row[*place] != most : row[*place] == row[*place]) ++*place;
    return most;
}

typedef struct { const float *rows; int64_t count, width; float *values; int64_t *places; } Call;

static void body(void *argument) {
    const Call *c = argument;
    for (Range r = my_share(c->count); r.first < r.last; r.first++)
        c->values[r.first] = row_maximum(c->rows + r.first * c->width, c->width, c->places + r.first);
}

/* rows [count, width], not empty -> values, places [count]. A row that holds NaN gives NaN and the first place of one. */
EXPORT void quantkit_row_maximum(const float *rows, int64_t count, int64_t width, float *values, int64_t *places, int threads) {
    Call call = {rows, count, width, values, places};
    run_team(body, &call, (unsigned)smaller(threads, count));
}
