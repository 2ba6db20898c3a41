// 64-bit Arm with the dot product extension.
#pragma once
#include <arm_neon.h>

#include <cstring>

#include "formats.h"

namespace {

struct V8 {  // 8 floats
  float32x4_t a, b;
};
inline V8 set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline V8 load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline void store(float* p, V8 x) {
  vst1q_f32(p, x.a);
  vst1q_f32(p + 4, x.b);
}
inline V8 load(const uint16_t* half) {
  const float16x8_t raw = vreinterpretq_f16_u16(vld1q_u16(half));
  return {vcvt_f32_f16(vget_low_f16(raw)), vcvt_high_f32_f16(raw)};
}
inline V8 load_bf16(const uint16_t* p) {
  const uint16x8_t raw = vld1q_u16(p);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(raw), 16)),
          vreinterpretq_f32_u32(vshll_high_n_u16(raw, 16))};
}
inline void store_half(uint16_t* p, V8 x) {
  vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.a), x.b)));
}
inline V8 add(V8 x, V8 y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
inline V8 sub(V8 x, V8 y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
inline V8 mul(V8 x, V8 y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
inline V8 div(V8 x, V8 y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
inline V8 fma(V8 x, V8 y, V8 z) { return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
// As on x86, and not as Arm's own instructions: the second where either is NaN or both are zeros.
inline V8 max(V8 x, V8 y) {
  return {vbslq_f32(vcgtq_f32(x.a, y.a), x.a, y.a), vbslq_f32(vcgtq_f32(x.b, y.b), x.b, y.b)};
}
inline V8 min(V8 x, V8 y) {
  return {vbslq_f32(vcltq_f32(x.a, y.a), x.a, y.a), vbslq_f32(vcltq_f32(x.b, y.b), x.b, y.b)};
}
inline V8 round(V8 x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b)}; }
// 2 to the power of whole numbers in [-126, 127].
inline V8 power2(V8 n) {
  const auto one = [](float32x4_t x) {
    const int32x4_t e = vaddq_s32(vcvtq_s32_f32(x), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(e, 23));
  };
  return {one(n.a), one(n.b)};
}
// x where y >= bound, else 0.
inline V8 keep_above(V8 x, V8 y, float bound) {
  const auto one = [bound](float32x4_t v, float32x4_t w) {
    const uint32x4_t held = vcgeq_f32(w, vdupq_n_f32(bound));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), held));
  };
  return {one(x.a, y.a), one(x.b, y.b)};
}
inline void store_int8(int8_t* p, V8 x) {  // rounds to the nearest, ties to even
  const int16x4_t a = vqmovn_s32(vcvtnq_s32_f32(x.a)), b = vqmovn_s32(vcvtnq_s32_f32(x.b));
  vst1_s8(p, vqmovn_s16(vcombine_s16(a, b)));
}

// Integer side: registers of 4 outputs x 4 inputs.
struct Isa {
  static constexpr int W = 4;
  static constexpr int ROWS = 2, BLOCKS = 1;  // of 16 outputs: 8 registers each for sums, totals and results
  // The dot product takes weights as signed: right for those below 128, so 8-bit weights go by halves.
  static constexpr bool WIDE = false;
  using Q = int32x4_t;  // 8-bit quads, or 32-bit sums
  using F = float32x4_t;

  static uint8x16_t bytes(Q v) { return vreinterpretq_u8_s32(v); }
  static Q of(uint8x16_t v) { return vreinterpretq_s32_u8(v); }

  static Q zero() { return vdupq_n_s32(0); }
  static Q load(const uint8_t* p) { return of(vld1q_u8(p)); }
  static int8x8_t four(const int8_t* p) {  // and the same four again
    int32_t bits;
    std::memcpy(&bits, p, 4);
    return vreinterpret_s8_s32(vdup_n_s32(bits));
  }
  static Q factor(const int8_t* s) { return vmovl_s16(vget_low_s16(vmovl_s8(four(s)))); }
  // Numbers of 16 bits: (a, b) for each of 4 outputs.
  static Q pairs(const int8_t* a, const int8_t* b) {
    return vreinterpretq_s32_s16(vmovl_s8(vzip1_s8(four(a), four(b))));
  }
  static Q set32(int32_t x) { return vdupq_n_s32(x); }
  static Q quad(const int8_t* p) {
    int32_t bits;
    std::memcpy(&bits, p, 4);
    return vdupq_n_s32(bits);
  }
  static Q low(Q v) { return of(vandq_u8(bytes(v), vdupq_n_u8(15))); }
  static Q high(Q v) { return of(vshrq_n_u8(bytes(v), 4)); }
  // Bits from SHIFT of each byte, moved to bit TO; those of MASK.
  template <int SHIFT, int MASK, int TO = 4>
  static Q plane(Q v) {
    uint8x16_t b = bytes(v);
    if constexpr (SHIFT < TO) b = vshlq_n_u8(b, TO - SHIFT);
    if constexpr (SHIFT > TO) b = vshrq_n_u8(b, SHIFT - TO);
    return of(vandq_u8(b, vdupq_n_u8(MASK)));
  }
  static Q either(Q a, Q b) { return vorrq_s32(a, b); }
  // 16 bytes, and the bytes of them that codes below 16 choose.
  static Q table(const uint8_t* p) { return of(vld1q_u8(p)); }
  static Q lookup(Q table, Q codes) { return of(vqtbl1q_u8(bytes(table), bytes(codes))); }
  static Q add32(Q a, Q b) { return vaddq_s32(a, b); }
  static Q less128(Q a, Q b) { return vsubq_s32(a, vshlq_n_s32(b, 7)); }  // a - 128 b
  static Q mac16(Q sum, Q a, Q b) {
    const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    return vaddq_s32(sum, vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
  }
  static Q mac(Q sum, Q w, Q x) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
  }
  static Q flush(Q sum) { return sum; }
  static Q flush(Q sum, Q scale) { return vmulq_s32(sum, scale); }
  static Q times16(Q factors) { return vshlq_n_s32(factors, 4); }
  static F to_float(Q a) { return vcvtq_f32_s32(a); }
  static F loadf(const float* p) { return vld1q_f32(p); }
  static void storef(float* p, F a) { vst1q_f32(p, a); }
  static F setf(float x) { return vdupq_n_f32(x); }
  static F zerof() { return vdupq_n_f32(0.0f); }
  static F half(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
  static F bf16(const uint8_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
  }
  static F mulf(F a, F b) { return vmulq_f32(a, b); }
  static F addf(F a, F b) { return vaddq_f32(a, b); }
  static F fmaf(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }
};

}  // namespace
