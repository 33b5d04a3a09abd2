/* out [M, N] = x [M, K] @ weight [N, K]^T + bias.

   A row of the result depends on its row of x only: not on M, and not on the number of threads. */
#ifndef QUANTKIT_MATMUL_H
#define QUANTKIT_MATMUL_H

#include "matrix.h"

/* x [columns] -> prepared [prepared_floats], which is what the product reads. Each layout has a format of its own: see
   packed_input.c, w4a8.c and dense.h. All of them are padded with zeros. */
void prepare(const Matrix *weight, const float *x, float *prepared);

/* This thread's part of the columns of out [m, weight->rows]; no barrier. */
void matmul_share(const Matrix *weight, const float *prepared, int64_t m, float *out);

#endif
