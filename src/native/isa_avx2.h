// AVX2 with FMA and F16C, with (REDWOOD_VNNI) or without the 8-bit dot product.
#pragma once
#include <cstring>

#include "formats.h"
#include "simd_avx2.h"

namespace {

// Integer side: registers of W outputs x 4 inputs.
struct Isa {
  static constexpr int W = 8;     // outputs per register
  static constexpr int ROWS = 4, BLOCKS = 1;  // rows that fit in the registers, with 16 outputs
#ifdef REDWOOD_VNNI
  static constexpr bool WIDE = true;  // sums of 8-bit products are 32 bits wide at once
#else
  static constexpr bool WIDE = false;
#endif
  using Q = __m256i;  // 8-bit quads, or 16- or 32-bit sums
  using F = __m256;

  static Q zero() { return _mm256_setzero_si256(); }
  static Q load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Q*>(p)); }
  static __m128i eight(const int8_t* p) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  }
  // Numbers of 16 bits: (a, b) for each of 8 outputs.
  static Q pairs(const int8_t* a, const int8_t* b) {
    return _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(eight(a), eight(b)));
  }
  static Q set32(int32_t x) { return _mm256_set1_epi32(x); }
  static Q quad(const int8_t* p) {
    int32_t bits;
    std::memcpy(&bits, p, 4);
    return _mm256_set1_epi32(bits);
  }
  static Q low(Q v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  static Q high(Q v) {
    return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
  }
  // Bits from SHIFT of each byte, moved to bit TO; those of MASK.
  template <int SHIFT, int MASK, int TO = 4>
  static Q plane(Q v) {
    if constexpr (SHIFT < TO) v = _mm256_slli_epi16(v, TO - SHIFT);
    if constexpr (SHIFT > TO) v = _mm256_srli_epi16(v, SHIFT - TO);
    return _mm256_and_si256(v, _mm256_set1_epi8(MASK));
  }
  static Q either(Q a, Q b) { return _mm256_or_si256(a, b); }
  // 16 bytes, and the bytes of them that codes below 16 choose.
  static Q table(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Q lookup(Q table, Q codes) { return _mm256_shuffle_epi8(table, codes); }
  static Q add32(Q a, Q b) { return _mm256_add_epi32(a, b); }
  static Q less128(Q a, Q b) { return _mm256_sub_epi32(a, _mm256_slli_epi32(b, 7)); }  // a - 128 b
  // Adds products of 16-bit pairs, summed in pairs.
  static Q mac16(Q sum, Q a, Q b) { return add32(sum, _mm256_madd_epi16(a, b)); }
  static F to_float(Q a) { return _mm256_cvtepi32_ps(a); }
  static F loadf(const float* p) { return _mm256_loadu_ps(p); }
  static void storef(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F setf(float x) { return _mm256_set1_ps(x); }
  static F zerof() { return _mm256_setzero_ps(); }
  static F half(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F bf16(const uint8_t* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
  static F mulf(F a, F b) { return _mm256_mul_ps(a, b); }
  static F addf(F a, F b) { return _mm256_add_ps(a, b); }
  static F fmaf(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
#ifdef REDWOOD_VNNI
  static Q mac(Q sum, Q w, Q x) {
#ifdef __AVX512VNNI__
    return _mm256_dpbusd_epi32(sum, w, x);
#else
    return _mm256_dpbusd_avx_epi32(sum, w, x);
#endif
  }
  static Q flush(Q sum) { return sum; }
  static Q flush(Q sum, Q scale) { return _mm256_mullo_epi32(sum, scale); }
  static Q times16(Q factors) { return _mm256_slli_epi32(factors, 4); }
  static Q factor(const int8_t* s) { return _mm256_cvtepi8_epi32(eight(s)); }
#else
  // 16-bit sums: exact for 8 products of 4-bit, 4 of 5-bit or 2 of 6-bit weights with |x| <= 127.
  static Q mac(Q sum, Q w, Q x) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
    asm("" : "+x"(sum));  // keeps the compiler from turning the chain into a tree that spills
    return sum;
  }
  static Q flush(Q sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
  static Q flush(Q sum, Q scale) { return _mm256_madd_epi16(sum, scale); }
  static Q times16(Q factors) { return _mm256_slli_epi16(factors, 4); }
  // Factors of 8 outputs, each as two numbers of 16 bits.
  static Q factor(const int8_t* s) {
    const Q twice = _mm256_set1_epi32(0x01000100);
    const Q at = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808,
                                   0x0c0c0c0c);
    return _mm256_shuffle_epi8(_mm256_cvtepi8_epi32(eight(s)), _mm256_add_epi8(twice, at));
  }
#endif
};

}  // namespace
