/* The matrix product: picks the implementation for the weight's layout. */
#include "matmul.h"
#include "dense.h"
#include "packed.h"
#include "threads.h"
#include "w4a8.h"

EXPORT int64_t quantkit_prepared_floats(const Matrix *w) { return prepared_floats(w); }


void prepare(const Matrix *w, const float *x, float *prepared) {
    if (w->activation_bits) prepare_w4a8(w, x, prepared);
    else if (w->bits) prepare_packed(w, x, prepared);
    else prepare_dense(w, x, prepared);
}

void matmul_share(const Matrix *w, const float *prepared, int64_t m, float *out) {
    if (w->activation_bits) w4a8_share(w, prepared, m, out);
    else if (w->bits) packed_share(w, prepared, m, out);
    else dense_share(w, prepared, m, out);
}

typedef struct { const Matrix *weight; const float *x; float *prepared, *out; int64_t m; } MatmulCall;

static void matmul_body(void *argument) {
    MatmulCall *c = argument;
    const int64_t stride = prepared_floats(c->weight);
    for (Range r = thread_range(c->m); r.first < r.last; r.first++)
        prepare(c->weight, c->x + r.first * c->weight->columns, c->prepared + r.first * stride);
    thread_barrier();
    matmul_share(c->weight, c->prepared, c->m, c->out);
}

/* out [m, rows] = x [m, columns] @ weight^T + bias; `prepared` has room for m * prepared_floats(weight) floats. */
EXPORT void quantkit_matmul(const Matrix *weight, const float *x, int64_t m, float *prepared, float *out, int threads) {
    MatmulCall call = {weight, x, prepared, out, m};
    run_threads(matmul_body, &call, (unsigned)threads);
}
