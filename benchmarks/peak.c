/* How fast this processor multiplies when all operands are in registers: the bound that benchmarks.cpu_kernels compares with. */
#include "dot.h"
#include "threads.h"

#define CHAINS 12

#define LOOP(TYPE, START, STEP)                                                                                             \
    TYPE sums[CHAINS];                                                                                                      \
    for (int i = 0; i < CHAINS; i++) sums[i] = START;                                                                       \
    for (int64_t n = 0; n < steps; n++) {                                                                                   \
        _Pragma("GCC unroll 16") for (int i = 0; i < CHAINS; i++) {                                                         \
            STEP;                                                                                                           \
            __asm__("" : "+" REGISTER(sums[i]));                                                                            \
        }                                                                                                                   \
    }                                                                                                                       \
    volatile TYPE sink;                                                                                                     \
    for (int i = 0; i < CHAINS; i++) sink = sums[i];                                                                        \
    (void)sink;

#if defined(__x86_64__) || defined(__i386__)
#define REGISTER(x) "v"(x)
#else
#define REGISTER(x) "m"(x)
#endif

/* Products per step of each kind: float, byte (0 if there is no such instruction), bfloat16 (likewise). */
EXPORT int64_t peak_products(int kind) {
    return kind == 0 ? CHAINS * LANES : kind == 1 ? HAS_BYTE_DOT * CHAINS * LANES * 4 : HAS_BF16_DOT * CHAINS * LANES * 2;
}

EXPORT void peak_loop(int kind, int64_t steps) {
    if (kind == 0) {
        const vf a = splat(1.0f), b = splat(0.5f);
        LOOP(vf, a, sums[i] += a * b)
    } else if (kind == 1) {
#if HAS_BYTE_DOT
        const vu a = (vu){0} + 0x01010101u;
        LOOP(vi, (vi){0}, sums[i] = byte_dot(sums[i], a, (vi)a))
#endif
    } else {
#if HAS_BF16_DOT
        const vu a = (vu){0} + 0x3f803f80u;
        LOOP(vf, splat(0), sums[i] = bf16_dot(sums[i], a, a))
#endif
    }
}
