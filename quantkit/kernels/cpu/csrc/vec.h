/* Vectors of floats by the vector extensions of GCC and Clang: 8 lanes, 16 where the processor has AVX-512.

   Nothing here names an instruction set; a machine without 32-byte registers gets the same results from smaller ones.
   Sums over lanes are taken in one fixed order, so that a result depends on its operands only. */
#ifndef QUANTKIT_VEC_H
#define QUANTKIT_VEC_H

#include <stdint.h>
#include <string.h>

#ifndef LANES /* may be given, to test one width on a processor of the other */
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#endif

#define INLINE static inline __attribute__((always_inline))

/* For inner loops: a function of its own has all registers to itself. */
#define NOINLINE __attribute__((noinline))

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vs __attribute__((vector_size(2 * LANES)));

/* Element types of dense matrices (the first three) and of KV caches; F8 is e4m3, I8 and I4 are codes. */
enum { F32 = 0, BF16 = 1, F16 = 2, F8 = 3, I8 = 4, I4 = 5 };

INLINE vf load(const float *from) { vf v; memcpy(&v, from, sizeof v); return v; }
INLINE vu load_words(const void *from) { vu v; memcpy(&v, from, sizeof v); return v; }
/* A load that the compiler may not repeat as an operand of several instructions: load ports are scarcer than registers. */
INLINE vf load_once(const void *from) { return *(const volatile vf *)from; }
INLINE void store(float *to, vf v) { memcpy(to, &v, sizeof v); }

/* The first `count` lanes; the others are 0, or stay in the register. */
INLINE vf load_some(const float *from, int64_t count) {
    float part[LANES] = {0};
    if (count >= LANES) return load(from);
    if (count > 0) memcpy(part, from, sizeof(float) * count);
    return load(part);
}
INLINE void store_some(float *to, vf v, int64_t count) {
    if (count >= LANES) store(to, v);
    else memcpy(to, &v, sizeof(float) * count);
}
INLINE vf splat(float x) { return x - (vf){0}; }

INLINE float bits_to_float(uint32_t bits) { float f; memcpy(&f, &bits, sizeof f); return f; }
INLINE uint32_t float_to_bits(float f) { uint32_t bits; memcpy(&bits, &f, sizeof bits); return bits; }

/* IEEE half to float by integer steps: the exponent is rebiased by a multiplication, which is exact for subnormals too.
   Infinity and NaN do not survive: they read as values of 65536 and more. */
#define HALF_REBIAS 5.192296858534828e33f /* 2^112 */

INLINE vf half_to_float(vu half) {
    vf magnitude = (vf)((half & 0x7fffu) << 13) * HALF_REBIAS;
    return (vf)((vu)magnitude | (half & 0x8000u) << 16);
}

INLINE float from_half(uint16_t half) {
    const float magnitude = bits_to_float((half & 0x7fffu) << 13) * HALF_REBIAS;
    return bits_to_float(float_to_bits(magnitude) | (half & 0x8000u) << 16);
}

INLINE float from_bf16(uint16_t bits) { return bits_to_float((uint32_t)bits << 16); }

/* A word holds two neighbours of a 16-bit array: LANES words give the even elements, then the odd ones. Everything that
   meets such a vector is put into the same order beforehand; no unpacking instruction is needed then. */
INLINE vf even_half(vu words, int type) { return type == BF16 ? (vf)(words << 16) : half_to_float(words & 0xffffu); }
INLINE vf odd_half(vu words, int type) { return type == BF16 ? (vf)(words & 0xffff0000u) : half_to_float(words >> 16); }

/* scale * x [n] into the order of a type's vectors, padded by zeros to a multiple of 2 * LANES; F32 stays as it is. */
INLINE void to_order(int type, const float *x, int64_t n, float scale, float *to) {
    for (int64_t k = 0; k < n; k += 2 * LANES, to += 2 * LANES) {
        float part[2 * LANES] = {0};
        if (n - k >= 2 * LANES) memcpy(part, x + k, sizeof part); /* of a length that the compiler knows */
        else memcpy(part, x + k, sizeof(float) * (n - k));
        for (int i = 0; i < LANES; i++) {
            to[i] = scale * part[type == F32 ? i : 2 * i];
            to[LANES + i] = scale * part[type == F32 ? LANES + i : 2 * i + 1];
        }
    }
}

/* The way back, n elements. */
INLINE void from_order(int type, const float *x, int64_t n, float scale, float *to) {
    for (int64_t k = 0; k < n; k += 2 * LANES, x += 2 * LANES) {
        float part[2 * LANES];
        for (int i = 0; i < LANES; i++) {
            part[type == F32 ? i : 2 * i] = scale * x[i];
            part[type == F32 ? LANES + i : 2 * i + 1] = scale * x[LANES + i];
        }
        if (n - k >= 2 * LANES) memcpy(to + k, part, sizeof part);
        else memcpy(to + k, part, sizeof(float) * (n - k));
    }
}

/* Round to nearest even, as torch does; a half out of range becomes infinity. */
INLINE uint16_t to_bf16(float value) {
    uint32_t bits = float_to_bits(value);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE uint16_t to_half(float value) {
    uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) /* subnormal: adding 1/2 leaves the half's bits at the bottom of the sum */
        return (uint16_t)(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

INLINE float lane_sum(vf v) {
    float part[LANES];
    memcpy(part, &v, sizeof part);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

INLINE float lane_maximum(vf v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}

/* Of x [n]; NaN where there is one. Magnitudes are compared as integers, which puts NaN above infinity. */
INLINE float largest_magnitude(const float *x, int64_t n) {
    vi most = {0};
    for (int64_t k = 0; k < n; k += LANES) {
        const vi magnitude = (vi)load_some(x + k, n - k) & 0x7fffffff, more = magnitude > most;
        most = (more & magnitude) | (~more & most);
    }
    int32_t largest = most[0];
    for (int i = 1; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    return bits_to_float((uint32_t)largest);
}

INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf at_least(vf v, vf floor) { return choose(v < floor, floor, v); }
INLINE vf at_most(vf v, vf ceiling) { return choose(v > ceiling, ceiling, v); }

/* e^x to about 1 unit in the last place (Cephes expf); below -87.3 it stays at 1e-38, above 88.7 at 3e38; NaN stays NaN. */
INLINE vf exp_lanes(vf x) {
    x = at_most(at_least(x, splat(-87.33654f)), splat(88.37f));
    vf n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
    vf r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
}

INLINE vf tanh_lanes(vf x) { return 1.0f - 2.0f / (1.0f + exp_lanes(2.0f * x)); }

#endif
