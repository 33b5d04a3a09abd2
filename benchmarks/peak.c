/* How fast this processor multiplies when all operands are in registers: the bound that benchmarks.cpu_kernels compares with. */
#include "dot.h"
#include "threads.h"

/* Independent sums: enough to hide the latency of an instruction. */
#define CHAINS 12

/* Products per step of each kind: float, byte and bfloat16; 0 if there is no such instruction. */
EXPORT int64_t peak_products(int kind) {
    return kind == 0 ? CHAINS * LANES : kind == 1 ? HAS_BYTE_DOT * CHAINS * LANES * 4 : HAS_BF16_DOT * CHAINS * LANES * 2;
}

static float sum_floats(int kind, int64_t steps, float seed) {
    vf sums[CHAINS], factor = splat(seed);
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS; i++) sums[i] = splat(seed + i);
    for (int64_t n = 0; n < steps; n++)
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) sums[i] = kind ? bf16_dot(sums[i], (vu)factor, (vu)factor) : sums[i] * factor + factor;
#pragma GCC unroll 16
    for (int i = 1; i < CHAINS; i++) sums[0] += sums[i];
    return lane_sum(sums[0]);
}

static float sum_bytes(int64_t steps, uint32_t seed) {
#if HAS_BYTE_DOT
    vi sums[CHAINS];
    const vu factor = (vu){0} + seed;
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS; i++) sums[i] = (vi){0} + i;
    for (int64_t n = 0; n < steps; n++)
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) sums[i] = byte_dot(sums[i], factor, (vi)factor);
#pragma GCC unroll 16
    for (int i = 1; i < CHAINS; i++) sums[0] += sums[i];
    return (float)sums[0][0];
#else
    return (float)(steps + seed);
#endif
}

/* The seed comes from outside, so that nothing can be computed beforehand; the result, so that nothing can be left out. */
EXPORT float peak_loop(int kind, int64_t steps, uint32_t seed) {
    return kind == 0 ? sum_floats(0, steps, (float)seed) : kind == 1 ? sum_bytes(steps, seed) : sum_floats(1, steps, (float)seed);
}
