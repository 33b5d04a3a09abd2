/* The product with a packed weight and inputs of 8 or 4 bits; w4a8.c describes a prepared row. */
#ifndef QUANTKIT_W4A8_H
#define QUANTKIT_W4A8_H

#include "matrix.h"

void prepare_w4a8(const Matrix *weight, const float *x, float *prepared);
void w4a8_share(const Matrix *weight, const float *prepared, int64_t m, float *out);

#endif
