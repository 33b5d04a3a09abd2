/* The fast Walsh-Hadamard transform; see hadamard.c. */
#ifndef QUANTKIT_HADAMARD_H
#define QUANTKIT_HADAMARD_H

#include <stdint.h>

/* x [n] -> x H in place, block by block. block is a power of two that divides n; 0 leaves x unchanged. */
void hadamard_row(float *x, int64_t n, int64_t block);

#endif
