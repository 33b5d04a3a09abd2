/* Preparation of inputs, and the matrix product as Python calls it. */
#include "matmul.h"
#include "team.h"
#include "vec.h"

EXPORT int64_t quantkit_prepared_floats(const Matrix *w) { return prepared_floats(w); }

int64_t prepared_floats(const Matrix *w) {
    if (!w->bits) return round_up(w->columns, 2 * LANES);
    return round_up(padded_columns(w) / 2 + 2 * runs(w), LANES); /* more than rounded.c needs */
}

void prepare(const Matrix *w, const float *x, float *prepared) {
    if (w->input_bits) prepare_rounded(w, x, prepared);
    else if (w->bits) prepare_packed(w, x, prepared);
    else to_order(w->type == F32 ? F32 : BF16, x, w->columns, 1, prepared);
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
