/* Preparation of inputs, and the matrix product as Python calls it. */
#include "matmul.h"
#include "team.h"
#include "vec.h"

EXPORT int64_t quantkit_prepared_floats(const Matrix *w) { return prepared_floats(w); }

int64_t prepared_floats(const Matrix *w) {
    if (!w->bits) return round_up(w->columns, 2 * LANES);
    const int64_t runs = groups(w) * ((padded_group(w) + RUN - 1) / RUN);
    return padded_columns(w) + round_up(runs, LANES);
}

void prepare(const Matrix *w, const float *x, float *prepared) {
    if (!w->bits) {
        for (int64_t k = 0; k < round_up(w->columns, 2 * LANES); k++)
            prepared[w->type == F32 ? k : split_place(k)] = k < w->columns ? x[k] : 0;
        return;
    }
    const int fields = 32 / w->bits;
    const int64_t padded = padded_group(w);
    float factor[16], *sums = prepared + padded_columns(w);
    for (int j = 0; j < fields; j++) factor[j] = j == fields - 1 ? 1.0f : 1.0f / (float)(1u << j * w->bits);
    for (int64_t g = 0; g < groups(w); g++, x += w->group, prepared += padded) {
        for (int64_t first = 0; first < padded; first += RUN) {
            int64_t last = smaller(first + RUN, padded), given = smaller(last, w->group);
            float part[16] = {0}, sum = 0;
            for (int64_t k = first; k < last; k += fields)
                for (int j = 0; j < fields; j++) {
                    float value = k + j < given ? x[k + j] : 0;
                    part[j] += value;
                    prepared[k + j] = value * factor[j];
                }
            for (int j = 0; j < fields; j++) sum += part[j];
            *sums++ = sum;
        }
    }
}

void matmul_share(const Matrix *w, const float *prepared, int64_t m, float *out, int64_t *counter) {
    if (w->bits) packed_share(w, prepared, m, out, counter);
    else dense_share(w, prepared, m, out, counter);
}

typedef struct { const Matrix *weight; const float *x; float *prepared, *out; int64_t m, counter; } MatmulCall;

static void matmul_body(void *argument) {
    MatmulCall *c = argument;
    const int64_t stride = prepared_floats(c->weight);
    for (Range r = my_share(c->m); r.first < r.last; r.first++)
        prepare(c->weight, c->x + r.first * c->weight->columns, c->prepared + r.first * stride);
    wait_for_team();
    matmul_share(c->weight, c->prepared, c->m, c->out, &c->counter);
}

/* out [m, rows] = x [m, columns] @ weight^T + bias; prepared: room for m * prepared_floats(weight) floats. */
EXPORT void quantkit_matmul(const Matrix *weight, const float *x, int64_t m, float *prepared, float *out, int threads) {
    MatmulCall call = {weight, x, prepared, out, m, 0};
    run_team(matmul_body, &call, (unsigned)threads);
}
