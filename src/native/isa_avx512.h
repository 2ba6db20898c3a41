// AVX-512 with its 8-bit dot product: a register holds all 16 outputs of a block. The float side is
// that of AVX2.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own header leaves the operands that a mask of all ones never takes undefined, and warns of it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <cstring>

#include "formats.h"
#include "simd_avx2.h"

namespace {

struct Isa {
  static constexpr int W = 16;
  static constexpr int ROWS = 8, BLOCKS = 2;  // 16 of 32 registers hold sums; the rest is in memory
  static constexpr bool WIDE = true;
  using Q = __m512i;  // 8-bit quads, or 32-bit sums
  using F = __m512;

  static Q zero() { return _mm512_setzero_si512(); }
  static Q load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static __m128i bytes(const int8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static Q factor(const int8_t* s) { return _mm512_cvtepi8_epi32(bytes(s)); }
  // Numbers of 16 bits: (a, b) for each of 16 outputs.
  static Q pairs(const int8_t* a, const int8_t* b) {
    const __m128i first = _mm_unpacklo_epi8(bytes(a), bytes(b));
    const __m128i last = _mm_unpackhi_epi8(bytes(a), bytes(b));
    return _mm512_cvtepi8_epi16(_mm256_set_m128i(last, first));
  }
  static Q set32(int32_t x) { return _mm512_set1_epi32(x); }
  static Q quad(const int8_t* p) {
    int32_t bits;
    std::memcpy(&bits, p, 4);
    return _mm512_set1_epi32(bits);
  }
  static Q low(Q v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static Q high(Q v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
  // Bits from SHIFT of each byte, moved to bit TO; those of MASK.
  template <int SHIFT, int MASK, int TO = 4>
  static Q plane(Q v) {
    if constexpr (SHIFT < TO) v = _mm512_slli_epi16(v, TO - SHIFT);
    if constexpr (SHIFT > TO) v = _mm512_srli_epi16(v, SHIFT - TO);
    return _mm512_and_si512(v, _mm512_set1_epi8(MASK));
  }
  static Q either(Q a, Q b) { return _mm512_or_si512(a, b); }
  // 16 bytes, and the bytes of them that codes below 16 choose.
  static Q table(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Q lookup(Q table, Q codes) { return _mm512_shuffle_epi8(table, codes); }
  static Q add32(Q a, Q b) { return _mm512_add_epi32(a, b); }
  static Q less128(Q a, Q b) { return _mm512_sub_epi32(a, _mm512_slli_epi32(b, 7)); }  // a - 128 b
  // Adds products of 16-bit pairs, summed in pairs.
  static Q mac16(Q sum, Q a, Q b) { return _mm512_dpwssd_epi32(sum, a, b); }
  static Q mac(Q sum, Q w, Q x) { return _mm512_dpbusd_epi32(sum, w, x); }
  static Q flush(Q sum) { return sum; }
  static Q flush(Q sum, Q scale) { return _mm512_mullo_epi32(sum, scale); }
  static Q times16(Q factors) { return _mm512_slli_epi32(factors, 4); }
  static F to_float(Q a) { return _mm512_cvtepi32_ps(a); }
  static F loadf(const float* p) { return _mm512_loadu_ps(p); }
  static void storef(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F setf(float x) { return _mm512_set1_ps(x); }
  static F zerof() { return _mm512_setzero_ps(); }
  static F half(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F bf16(const uint8_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
  static F mulf(F a, F b) { return _mm512_mul_ps(a, b); }
  static F addf(F a, F b) { return _mm512_add_ps(a, b); }
  static F fmaf(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static void prefetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
  }

  // For tiles (tiles_impl.h).
  static void store(uint8_t* p, Q v) { _mm512_storeu_si512(p, v); }
  template <int N>
  static Q less8(Q v) {
    return _mm512_sub_epi8(v, _mm512_set1_epi8(static_cast<char>(N)));
  }
  // Bits from SHIFT of each byte, those of MASK.
  template <int SHIFT, int MASK>
  static Q bits(Q v) {
    return _mm512_and_si512(_mm512_srli_epi16(v, SHIFT), _mm512_set1_epi8(MASK));
  }
  static Q mul16(Q a, Q b) { return _mm512_mullo_epi16(a, b); }
  template <int N>
  static Q up(Q v) {
    return _mm512_slli_epi32(v, N);
  }
  // Lower and upper bytes of unsigned bytes times signed numbers of 16 bits that fit a byte.
  static void two_bytes(Q w, Q by, Q& low, Q& high) {
    const Q mask = _mm512_set1_epi16(255);
    const Q even = _mm512_maddubs_epi16(w, _mm512_and_si512(by, mask));
    const Q odd = _mm512_maddubs_epi16(w, _mm512_slli_epi16(by, 8));
    // a where the mask has ones, else b
    low = _mm512_ternarylogic_epi32(mask, even, _mm512_slli_epi16(odd, 8), 0xca);
    high = _mm512_ternarylogic_epi32(mask, _mm512_srli_epi16(even, 8), odd, 0xca);
  }
};

}  // namespace
