// AVX2 with FMA and F16C, with (REDWOOD_VNNI) or without the 8-bit dot product.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "formats.h"

namespace {

struct V8 {  // 8 floats
  __m256 v;
};
inline V8 set1(float x) { return {_mm256_set1_ps(x)}; }
inline V8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, V8 a) { _mm256_storeu_ps(p, a.v); }
inline V8 load(const uint16_t* half) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half)))};
}
inline V8 load_bf16(const uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
}
inline void store_half(uint16_t* p, V8 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, 0));
}
inline V8 add(V8 a, V8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline V8 sub(V8 a, V8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline V8 mul(V8 a, V8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline V8 div(V8 a, V8 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline V8 fma(V8 a, V8 b, V8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline V8 max(V8 a, V8 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline V8 min(V8 a, V8 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline V8 round(V8 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2 to the power of whole numbers in [-126, 127].
inline V8 power2(V8 n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(e, 23))};
}
// a where x >= bound, else 0.
inline V8 keep_above(V8 a, V8 x, float bound) {
  return {_mm256_and_ps(a.v, _mm256_cmp_ps(x.v, _mm256_set1_ps(bound), _CMP_GE_OQ))};
}
inline void store_int8(int8_t* p, V8 a) {
  const __m256i i = _mm256_cvtps_epi32(a.v);
  const __m128i s = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(s, s));
}

// Integer side: registers of W outputs x 4 inputs.
struct Isa {
  static constexpr int W = 8;     // outputs per register
  static constexpr int ROWS = 4;  // rows that fit in the registers, with 16 outputs
#ifdef REDWOOD_VNNI
  static constexpr bool WIDE = true;  // sums of 8-bit products are 32 bits wide at once
#else
  static constexpr bool WIDE = false;
#endif
  using Q = __m256i;  // 8-bit quads, or 16- or 32-bit sums
  using F = __m256;

  static Q zero() { return _mm256_setzero_si256(); }
  static Q load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Q*>(p)); }
  static Q load32(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Q*>(p)); }
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
  // Bits [shift, shift + width) of each byte, moved to bit 4.
  template <int SHIFT, int MASK>
  static Q plane(Q v) {
    if constexpr (SHIFT < 4) v = _mm256_slli_epi16(v, 4 - SHIFT);
    if constexpr (SHIFT > 4) v = _mm256_srli_epi16(v, SHIFT - 4);
    return _mm256_and_si256(v, _mm256_set1_epi8(MASK));
  }
  static Q either(Q a, Q b) { return _mm256_or_si256(a, b); }
  static Q add32(Q a, Q b) { return _mm256_add_epi32(a, b); }
  // Products of 16-bit pairs, summed in pairs.
  static Q madd16(Q a, Q b) { return _mm256_madd_epi16(a, b); }
  static F to_float(Q a) { return _mm256_cvtepi32_ps(a); }
  static F loadf(const float* p) { return _mm256_loadu_ps(p); }
  static void storef(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F setf(float x) { return _mm256_set1_ps(x); }
  static F zerof() { return _mm256_setzero_ps(); }
  static F half(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F mulf(F a, F b) { return _mm256_mul_ps(a, b); }
  static F addf(F a, F b) { return _mm256_add_ps(a, b); }
  static F fmaf(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
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
  static uint32_t scale_bits(int s) { return static_cast<uint32_t>(s); }
#else
  // 16-bit sums: exact for 8 products of 4-bit, 4 of 5-bit or 2 of 6-bit weights with |x| <= 127.
  static Q mac(Q sum, Q w, Q x) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
    asm("" : "+x"(sum));  // keeps the compiler from turning the chain into a tree that spills
    return sum;
  }
  static Q flush(Q sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
  static Q flush(Q sum, Q scale) { return _mm256_madd_epi16(sum, scale); }
  static uint32_t scale_bits(int s) { return static_cast<uint16_t>(s) * 0x10001u; }
#endif
};

}  // namespace
