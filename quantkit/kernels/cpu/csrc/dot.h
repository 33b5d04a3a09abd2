/* Products of small integers, and of bfloat16, by the instructions that the processor has for them.

   HAS_BYTE_DOT: there is an instruction that multiplies four codes with four signed bytes and adds the products to an int32
   (AVX-512 VNNI, AVX-VNNI, Arm's i8mm and dotprod). HAS_BF16_DOT: the same for two pairs of bfloat16 and a float
   (AVX512_BF16).

   HAS_SIGNED_CODES: the instruction takes codes for signed bytes, too (dotprod). 8-bit codes are multiplied as code - 128 then,
   and zero points become smaller by CODE_SHIFT as well. */
#ifndef QUANTKIT_DOT_H
#define QUANTKIT_DOT_H

#include "vec.h"

#if defined(__AVX512VNNI__) && LANES == 16
#define HAS_BYTE_DOT 1
INLINE vi byte_dot(vi sums, vu codes, vi signed_bytes) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)signed_bytes);
}
#elif defined(__AVXVNNI__) && LANES == 8
#define HAS_BYTE_DOT 1
INLINE vi byte_dot(vi sums, vu codes, vi signed_bytes) {
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, (__m256i)signed_bytes);
}
#elif (defined(__ARM_FEATURE_MATMUL_INT8) || defined(__ARM_FEATURE_DOTPROD)) && LANES == 8
#define HAS_BYTE_DOT 1
INLINE vi byte_dot(vi sums, vu codes, vi signed_bytes) {
    int32x4_t half[2];
    uint8x16_t a[2];
    int8x16_t b[2];
    memcpy(half, &sums, sizeof sums);
    memcpy(a, &codes, sizeof sums);
    memcpy(b, &signed_bytes, sizeof sums);
    for (int i = 0; i < 2; i++)
#ifdef __ARM_FEATURE_MATMUL_INT8
        half[i] = vusdotq_s32(half[i], a[i], b[i]);
#else
        half[i] = vdotq_s32(half[i], vreinterpretq_s8_u8(a[i]), b[i]);
#endif
    memcpy(&sums, half, sizeof sums);
    return sums;
}
#else
#define HAS_BYTE_DOT 0
#endif

#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
#define HAS_SIGNED_CODES 1
#else
#define HAS_SIGNED_CODES 0
#endif
#define CODE_SHIFT(bits) (HAS_SIGNED_CODES && (bits) == 8 ? 128u : 0u)

#if defined(__AVX512BF16__) && LANES == 16
#define HAS_BF16_DOT 1
INLINE vf bf16_dot(vf sums, vu a, vu b) { return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b); }
/* 2 * LANES floats, rounded to nearest even. */
INLINE vu round_to_bf16(vf low, vf high) { return (vu)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
#else
#define HAS_BF16_DOT 0
/* Never called; they let code that is left out compile. */
INLINE vf bf16_dot(vf sums, vu a, vu b) { (void)a, (void)b; return sums; }
INLINE vu round_to_bf16(vf low, vf high) { (void)high; return (vu)low; }
#endif

#endif
