/* The product with a packed weight and inputs of 16-bit integers; packed_input.c describes a prepared row. */
#ifndef QUANTKIT_PACKED_H
#define QUANTKIT_PACKED_H

#include "matrix.h"

void prepare_packed(const Matrix *weight, const float *x, float *prepared);
void packed_share(const Matrix *weight, const float *prepared, int64_t m, float *out);

#endif
