/* The product with a dense weight, and rows of a dense table. A prepared row is x itself; for bfloat16 weights even and odd
   columns are apart (vec.h), or x is rounded to bfloat16 (dense.c). */
#ifndef QUANTKIT_DENSE_H
#define QUANTKIT_DENSE_H

#include "matrix.h"

void prepare_dense(const Matrix *weight, const float *x, float *prepared);
void dense_share(const Matrix *weight, const float *prepared, int64_t m, float *out);

/* scale * row number `row` of a dense table [.., columns] of `type`. */
void embed_row(int64_t type, const void *table, int64_t row, int64_t columns, float scale, float *out);

#endif
