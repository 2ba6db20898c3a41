// Plain C++, for processors without kernels of their own, and as a second opinion in tests.
#pragma once
#include <cmath>
#include <cstring>

#include "formats.h"
#include "pack.h"

namespace {

struct V8 {
  float v[8];
};

template <class Body>
inline V8 make8(Body body) {
  V8 out;
  for (int i = 0; i < 8; ++i) out.v[i] = body(i);
  return out;
}

inline V8 set1(float x) { return make8([&](int) { return x; }); }
inline V8 load(const float* p) { return make8([&](int i) { return p[i]; }); }
inline void store(float* p, V8 a) { std::memcpy(p, a.v, sizeof a.v); }
inline V8 load(const uint16_t* half) {
  return make8([&](int i) { return redwood::half_to_float(half[i]); });
}
inline V8 load_bf16(const uint16_t* p) {
  V8 out;
  for (int i = 0; i < 8; ++i) {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    std::memcpy(out.v + i, &bits, 4);
  }
  return out;
}
inline void store_half(uint16_t* p, V8 a) {
  for (int i = 0; i < 8; ++i) p[i] = redwood::float_to_half(a.v[i]);
}
inline V8 add(V8 a, V8 b) { return make8([&](int i) { return a.v[i] + b.v[i]; }); }
inline V8 sub(V8 a, V8 b) { return make8([&](int i) { return a.v[i] - b.v[i]; }); }
inline V8 mul(V8 a, V8 b) { return make8([&](int i) { return a.v[i] * b.v[i]; }); }
inline V8 div(V8 a, V8 b) { return make8([&](int i) { return a.v[i] / b.v[i]; }); }
inline V8 fma(V8 a, V8 b, V8 c) { return make8([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline V8 max(V8 a, V8 b) { return make8([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline V8 min(V8 a, V8 b) { return make8([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline V8 round(V8 a) { return make8([&](int i) { return std::nearbyintf(a.v[i]); }); }
inline V8 power2(V8 n) {
  return make8([&](int i) { return std::ldexp(1.0f, static_cast<int>(n.v[i])); });
}
inline V8 keep_above(V8 a, V8 x, float bound) {
  return make8([&](int i) { return x.v[i] >= bound ? a.v[i] : 0.0f; });
}
inline void store_int8(int8_t* p, V8 a) {
  for (int i = 0; i < 8; ++i) p[i] = static_cast<int8_t>(std::lrintf(a.v[i]));
}

struct Isa {
  static constexpr int W = 4, ROWS = 2;
  static constexpr bool WIDE = true;
  struct Q {
    uint32_t v[4];  // one output each: 4 bytes, 2 numbers of 16 bits, or a sum
  };
  struct F {
    float v[4];
  };

  template <class Body>
  static Q make(Body body) {
    Q out;
    for (int i = 0; i < 4; ++i) out.v[i] = static_cast<uint32_t>(body(i));
    return out;
  }
  template <class Body>
  static F makef(Body body) {
    F out;
    for (int i = 0; i < 4; ++i) out.v[i] = body(i);
    return out;
  }

  static Q zero() { return make([](int) { return 0u; }); }
  static Q load(const uint8_t* p) {
    Q out;
    std::memcpy(out.v, p, 16);
    return out;
  }
  static Q load32(const uint32_t* p) { return make([&](int i) { return p[i]; }); }
  static Q set32(int32_t x) { return make([&](int) { return x; }); }
  static Q quad(const int8_t* p) {
    uint32_t bits;
    std::memcpy(&bits, p, 4);
    return make([&](int) { return bits; });
  }
  static Q low(Q a) { return make([&](int i) { return a.v[i] & 0x0f0f0f0fu; }); }
  static Q high(Q a) { return make([&](int i) { return a.v[i] >> 4 & 0x0f0f0f0fu; }); }
  template <int SHIFT, int MASK>
  static Q plane(Q a) {
    return make([&](int i) {
      const uint32_t bits = SHIFT < 4 ? a.v[i] << (4 - (SHIFT < 4 ? SHIFT : 4)) : a.v[i] >> (SHIFT < 4 ? 0 : SHIFT - 4);
      return bits & MASK * 0x01010101u;
    });
  }
  static Q either(Q a, Q b) { return make([&](int i) { return a.v[i] | b.v[i]; }); }
  static Q add32(Q a, Q b) { return make([&](int i) { return a.v[i] + b.v[i]; }); }
  static Q mac(Q sum, Q w, Q x) {
    return make([&](int i) {
      uint32_t s = sum.v[i];
      for (int b = 0; b < 32; b += 8) {
        s += static_cast<uint32_t>(static_cast<int32_t>(w.v[i] >> b & 255u) *
                                   static_cast<int8_t>(x.v[i] >> b & 255u));
      }
      return s;
    });
  }
  static Q flush(Q sum) { return sum; }
  static Q flush(Q sum, Q scale) { return make([&](int i) { return sum.v[i] * scale.v[i]; }); }
  static uint32_t scale_bits(int s) { return static_cast<uint32_t>(s); }
  static Q madd16(Q a, Q b) {
    return make([&](int i) {
      const int32_t low = static_cast<int16_t>(a.v[i] & 0xffffu) * static_cast<int16_t>(b.v[i] & 0xffffu);
      return low + static_cast<int16_t>(a.v[i] >> 16) * static_cast<int16_t>(b.v[i] >> 16);
    });
  }
  static F to_float(Q a) {
    return makef([&](int i) { return static_cast<float>(static_cast<int32_t>(a.v[i])); });
  }
  static F loadf(const float* p) { return makef([&](int i) { return p[i]; }); }
  static void storef(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
  static F setf(float x) { return makef([&](int) { return x; }); }
  static F zerof() { return setf(0.0f); }
  static F half(const uint8_t* p) {
    uint16_t bits[4];
    std::memcpy(bits, p, 8);
    return makef([&](int i) { return redwood::half_to_float(bits[i]); });
  }
  static F mulf(F a, F b) { return makef([&](int i) { return a.v[i] * b.v[i]; }); }
  static F addf(F a, F b) { return makef([&](int i) { return a.v[i] + b.v[i]; }); }
  static F fmaf(F a, F b, F c) { return makef([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
  static void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
};

}  // namespace
