/* Vectors of floats, through the vector extensions of GCC and Clang: 8 lanes, or 16 if the processor has AVX-512.

   The code is independent of the instruction set: a machine without 32-byte registers computes the same results with smaller
   ones. Sums over lanes are taken in one fixed order, so that a result depends on its operands only. */
#ifndef QUANTKIT_VEC_H
#define QUANTKIT_VEC_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifndef LANES /* -DLANES=n tests another width than the processor's own */
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#endif

#define INLINE static inline __attribute__((always_inline))

/* For inner loops: in a separate function, the compiler can use all registers for them. */
#define NOINLINE __attribute__((noinline))

static inline int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* Size of the next block when `left` rows remain and a block holds at most `most`: as few blocks as possible, of even size. */
static inline int64_t even_block(int64_t left, int64_t most) {
    const int64_t blocks = (left + most - 1) / most;
    return (left + blocks - 1) / blocks;
}

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vs __attribute__((vector_size(2 * LANES)));

/* Element types of dense matrices (the first three) and of KV caches (all). F8 is float8 e4m3; I8 and I4 are codes. */
enum { F32 = 0, BF16 = 1, F16 = 2, F8 = 3, I8 = 4, I4 = 5 };

INLINE vf load(const float *from) { vf v; memcpy(&v, from, sizeof v); return v; }
INLINE vu load_words(const void *from) { vu v; memcpy(&v, from, sizeof v); return v; }
/* A load that the compiler must do once, instead of as a memory operand of several instructions: load ports are scarcer than
   registers. */
INLINE vf load_once(const void *from) { return *(const volatile vf *)from; }
INLINE void store(float *to, vf v) { memcpy(to, &v, sizeof v); }

/* Load or store the first `count` lanes only; the other lanes are loaded as 0. */
INLINE vf load_partial(const float *from, int64_t count) {
    float part[LANES] = {0};
    if (count >= LANES) return load(from);
    if (count > 0) memcpy(part, from, sizeof(float) * count);
    return load(part);
}
INLINE void store_partial(float *to, vf v, int64_t count) {
    if (count >= LANES) store(to, v);
    else if (count > 0) memcpy(to, &v, sizeof(float) * count);
}
INLINE vf splat(float x) { return x - (vf){0}; }

INLINE float bits_to_float(uint32_t bits) { float f; memcpy(&f, &bits, sizeof f); return f; }
INLINE uint32_t float_to_bits(float f) { uint32_t bits; memcpy(&bits, &f, sizeof bits); return bits; }

/* IEEE half to float with integer operations. A multiplication rebiases the exponent, which is exact for subnormals too.
   Infinity and NaN are not preserved: they read as values of 65536 and more. */
#define HALF_REBIAS 5.192296858534828e33f /* 2^112 */

INLINE vf half_to_float(vu half) {
    vf magnitude = (vf)((half & 0x7fffu) << 13) * HALF_REBIAS;
    return (vf)((vu)magnitude | (half & 0x8000u) << 16);
}

/* LANES halves to floats. */
INLINE vf load_halves(const uint16_t *from) {
    vs halves;
    memcpy(&halves, from, sizeof halves);
#if defined(__AVX512F__) && LANES == 16
    return (vf)_mm512_cvtph_ps((__m256i)halves);
#elif defined(__F16C__) && LANES == 8
    return (vf)_mm256_cvtph_ps((__m128i)halves);
#else
    return half_to_float(__builtin_convertvector(halves, vu));
#endif
}

INLINE float from_half(uint16_t half) {
    const float magnitude = bits_to_float((half & 0x7fffu) << 13) * HALF_REBIAS;
    return bits_to_float(float_to_bits(magnitude) | (half & 0x8000u) << 16);
}

INLINE float from_bf16(uint16_t bits) { return bits_to_float((uint32_t)bits << 16); }

/* Lane order. A 32-bit word holds two neighbours of a 16-bit array, so LANES words give a vector of the even elements and a
   vector of the odd ones. The other operand is put into the same order beforehand; then no unpacking instruction is needed. */
INLINE vf even_elements(vu words, int type) { return type == BF16 ? (vf)(words << 16) : half_to_float(words & 0xffffu); }
INLINE vf odd_elements(vu words, int type) { return type == BF16 ? (vf)(words & 0xffff0000u) : half_to_float(words >> 16); }

/* Round to nearest even, as torch does. A half out of range becomes infinity. */
INLINE uint16_t to_bf16(float value) {
    uint32_t bits = float_to_bits(value);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE uint16_t to_half(float value) {
    uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) /* subnormal: adding 1/2 leaves the half's bits in the lowest bits of the sum */
        return (uint16_t)(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

/* 0, 1, 2, ... A literal, and arithmetic on it, since compilers fold that into constants, but not loops over lanes. */
#define COUNT_8(from) (from), (from) + 1, (from) + 2, (from) + 3, (from) + 4, (from) + 5, (from) + 6, (from) + 7
#if LANES == 16
#define LANE_NUMBERS ((vi){COUNT_8(0), COUNT_8(8)})
#else
#define LANE_NUMBERS ((vi){COUNT_8(0)})
#endif

/* Lane i of the result is lane order[i] of a, or lane order[i] - LANES of b; order is a compile-time constant. */
#ifdef __clang__
#define SHUFFLE(a, b, order)                                                                                                \
    ({                                                                                                                      \
        __typeof__((a) + (b)) out_; /* the type without const */                                                            \
        enum { COUNT_ = sizeof out_ / sizeof out_[0] };                                                                     \
        _Pragma("clang loop unroll(full)") for (int i_ = 0; i_ < COUNT_; i_++)                                              \
            out_[i_] = (order)[i_] < COUNT_ ? (a)[(order)[i_] % COUNT_] : (b)[(order)[i_] % COUNT_];                        \
        out_;                                                                                                               \
    })
#else
#define SHUFFLE(a, b, order) __builtin_shuffle(a, b, order)
#endif

/* scale * x [n] in the lane order of a type, padded with zeros to a multiple of 2 * LANES. For F32 the order is unchanged. */
INLINE void to_lane_order(int type, const float *x, int64_t n, float scale, float *to) {
    for (int64_t k = 0; k < n; k += 2 * LANES, to += 2 * LANES) {
        const vf low = load_partial(x + k, n - k), high = load_partial(x + k + LANES, n - k - LANES);
        store(to, scale * (type == F32 ? low : SHUFFLE(low, high, 2 * LANE_NUMBERS)));
        store(to + LANES, scale * (type == F32 ? high : SHUFFLE(low, high, 2 * LANE_NUMBERS + 1)));
    }
}

/* The inverse of `to_lane_order`, for n elements. */
INLINE void from_lane_order(int type, const float *x, int64_t n, float scale, float *to) {
    const vi first = LANE_NUMBERS / 2 + (LANE_NUMBERS & 1) * LANES;
    for (int64_t k = 0; k < n; k += 2 * LANES, x += 2 * LANES) {
        const vf even = load(x), odd = load(x + LANES);
        store_partial(to + k, scale * (type == F32 ? even : SHUFFLE(even, odd, first)), n - k);
        store_partial(to + k + LANES, scale * (type == F32 ? odd : SHUFFLE(even, odd, first + LANES / 2)), n - k - LANES);
    }
}

/* Combines the lanes of v: each lane of the lower half with its counterpart in the upper half, until one is left. */
#define REDUCE_LANES(v, combine)                                                                                            \
    ({                                                                                                                      \
        _Pragma("GCC unroll 4") for (int half_ = LANES / 2; half_; half_ /= 2) {                                            \
            const __typeof__(v) other_ = SHUFFLE(v, v, ((LANE_NUMBERS + half_) & (LANES - 1)));                             \
            v = combine(v, other_);                                                                                         \
        }                                                                                                                   \
        v[0];                                                                                                               \
    })
#define ADD(a, b) ((a) + (b))

INLINE float lane_sum(vf v) { return REDUCE_LANES(v, ADD); }
INLINE uint32_t lane_sum_integers(vu v) { return REDUCE_LANES(v, ADD); }

INLINE vf vec_select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

/* The larger, or smaller, of v and a limit, element by element; NaN in v stays. */
#if defined(__AVX512F__) && LANES == 16
INLINE vf vec_max(vf v, vf floor) { return (vf)_mm512_max_ps((__m512)floor, (__m512)v); }
INLINE vf vec_min(vf v, vf ceiling) { return (vf)_mm512_min_ps((__m512)ceiling, (__m512)v); }
INLINE vi vec_max_integers(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__) && LANES == 8
INLINE vf vec_max(vf v, vf floor) { return (vf)_mm256_max_ps((__m256)floor, (__m256)v); }
INLINE vf vec_min(vf v, vf ceiling) { return (vf)_mm256_min_ps((__m256)ceiling, (__m256)v); }
INLINE vi vec_max_integers(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
#else
INLINE vf vec_max(vf v, vf floor) { return vec_select(v < floor, floor, v); }
INLINE vf vec_min(vf v, vf ceiling) { return vec_select(v > ceiling, ceiling, v); }
INLINE vi vec_max_integers(vi a, vi b) { return ((a > b) & a) | (~(a > b) & b); }
#endif

INLINE float lane_max(vf v) { return REDUCE_LANES(v, vec_max); }

/* The largest magnitude of x [n]; NaN if x holds a NaN. Magnitudes are compared as integers, which orders NaN above
   infinity. */
INLINE float max_abs(const float *x, int64_t n) {
    vi maxima = {0};
    for (int64_t k = 0; k < n; k += LANES) {
        const vi magnitude = (vi)load_partial(x + k, n - k) & 0x7fffffff;
        maxima = vec_max_integers(magnitude, maxima);
    }
    return bits_to_float((uint32_t)REDUCE_LANES(maxima, vec_max_integers));
}

/* Orders for SHUFFLE(a, b, order), for blocks of 2 * half lanes: the lower halves of a's and b's blocks in turn, and the upper
   halves. */
#define LOWER_HALVES(half) (LANE_NUMBERS + (((LANE_NUMBERS & (half)) == (half)) & (LANES - (half))))
#define UPPER_HALVES(half) (LOWER_HALVES(half) + (half))

/* Transposes LANES vectors of LANES floats: in each step, the upper half of a vector's block is exchanged with the lower half
   of its partner's, for ever smaller blocks. */
INLINE void transpose_lanes(vf v[LANES]) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & half)) {
                const vf a = v[i], b = v[i + half];
                v[i] = SHUFFLE(a, b, LOWER_HALVES(half));
                v[i + half] = SHUFFLE(a, b, UPPER_HALVES(half));
            }
}

/* Lane i of the result is lane_sum(v[i]), for all vectors at once. */
INLINE vf lane_sums(vf v[LANES]) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++)
            if (i < half)
                v[i] = SHUFFLE(v[i], v[i + half], LOWER_HALVES(half)) + SHUFFLE(v[i], v[i + half], UPPER_HALVES(half));
    return v[0];
}

/* e^x to about 1 unit in the last place (Cephes expf). x is clamped to -87.33654 .. 88.37, so the result stays in about 1e-38
   .. 2e38; NaN stays NaN. */
INLINE vf vec_exp(vf x) {
    x = vec_min(vec_max(x, splat(-87.33654f)), splat(88.37f));
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
#if defined(__AVX512F__) && LANES == 16
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
#endif
}

INLINE vf vec_tanh(vf x) { return 1.0f - 2.0f / (1.0f + vec_exp(2.0f * x)); }

#endif
