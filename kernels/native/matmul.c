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

/* A run of a group: `given` columns of x and zeros up to `length`; returns the sum. factor [16] repeats with the fields. */
static float prepare_run(const float *x, int64_t given, int64_t length, const float *factor, float *prepared) {
    vf sum = {0};
    for (int64_t k = 0; k < length; k += LANES) {
        const vf value = load_some(x + k, given - k);
        sum += value;
        store_some(prepared + k, value * load(factor + k % 16), length - k);
    }
    return lane_sum(sum);
}

void prepare(const Matrix *w, const float *x, float *prepared) {
    if (!w->bits) {
        if (w->type == F32) to_order(F32, x, w->columns, 1, prepared);
        else to_order(BF16, x, w->columns, 1, prepared);
        return;
    }
    if (w->input_bits) {
        prepare_rounded(w, x, prepared);
        return;
    }
    const int64_t fields = 32 / w->bits, padded = padded_group(w), all = groups(w);
    float factor[16], *sums = prepared + padded_columns(w);
    for (int i = 0; i < 16; i++) factor[i] = i % fields == fields - 1 ? 1.0f : 1.0f / (float)(1u << i % fields * w->bits);
    for (int64_t g = 0; g < all; g++, x += w->group, prepared += padded)
        for (int64_t first = 0; first < padded; first += RUN)
            *sums++ = prepare_run(x + first, w->group - first, smaller(RUN, padded - first), factor, prepared + first);
}

void matmul_share(const Matrix *w, const float *prepared, int64_t m, float *out) {
    if (w->input_bits) rounded_share(w, prepared, m, out);
    else if (w->bits) packed_share(w, prepared, m, out);
    else dense_share(w, prepared, m, out);
}

typedef struct { const Matrix *weight; const float *x; float *prepared, *out; int64_t m; } MatmulCall;

static void matmul_body(void *argument) {
    MatmulCall *c = argument;
    const int64_t stride = prepared_floats(c->weight);
    for (Range r = my_share(c->m); r.first < r.last; r.first++)
        prepare(c->weight, c->x + r.first * c->weight->columns, c->prepared + r.first * stride);
    wait_for_team();
    matmul_share(c->weight, c->prepared, c->m, c->out);
}

/* out [m, rows] = x [m, columns] @ weight^T + bias; prepared: room for m * prepared_floats(weight) floats. */
EXPORT void quantkit_matmul(const Matrix *weight, const float *x, int64_t m, float *prepared, float *out, int threads) {
    MatmulCall call = {weight, x, prepared, out, m};
    run_team(matmul_body, &call, (unsigned)threads);
}
