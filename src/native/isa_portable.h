// Plain C++, for processors without kernels of their own, and as a reference for tests. Its bits
// are those of every other instruction set: a fused operation is one here too, by a call of the C
// library where the compiler may not use the processor's.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstring>

#include "formats.h"
#include "pack.h"

static_assert(FLT_EVAL_METHOD == 0, "float arithmetic must round to float at every step");

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
inline V8 fma(V8 a, V8 b, V8 c) {
  return make8([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
// As on x86: the second where either is NaN or both are zeros.
inline V8 max(V8 a, V8 b) { return make8([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline V8 min(V8 a, V8 b) { return make8([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline V8 round(V8 a) { return make8([&](int i) { return std::nearbyintf(a.v[i]); }); }
// 2 to the power of whole numbers in [-126, 127].
inline V8 power2(V8 n) {
  return make8([&](int i) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<int>(n.v[i]) + 127) << 23;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  });
}
// a where x >= bound, else 0.
inline V8 keep_above(V8 a, V8 x, float bound) {
  return make8([&](int i) { return x.v[i] >= bound ? a.v[i] : 0.0f; });
}
inline void store_int8(int8_t* p, V8 a) {
  for (int i = 0; i < 8; ++i) p[i] = static_cast<int8_t>(std::lrintf(a.v[i]));
}

// Integer side: 4 outputs at a time in the compiler's own vectors, which it turns into whatever the
// processor has; that compiles in a third of the time of loops over arrays, and runs faster.
struct Isa {
  static constexpr int W = 4, ROWS = 1, BLOCKS = 1;
  static constexpr bool WIDE = true;
  // One output a lane: 4 bytes, 2 numbers of 16 bits, or a sum. Unsigned, so that sums may wrap.
  typedef uint32_t Q __attribute__((vector_size(16)));
  typedef int32_t Signed __attribute__((vector_size(16)));
  typedef int16_t Short __attribute__((vector_size(16)));
  typedef float F __attribute__((vector_size(16)));

  template <class To, class From>
  static To read(const From* p) {
    To out;
    std::memcpy(&out, p, sizeof out);
    return out;
  }

  static Q zero() { return set32(0); }
  static Q load(const uint8_t* p) { return read<Q>(p); }
  // Of 4 outputs: factors, and numbers of 16 bits (a, b).
  static Q factor(const int8_t* s) {
    return Q{static_cast<uint32_t>(s[0]), static_cast<uint32_t>(s[1]), static_cast<uint32_t>(s[2]),
             static_cast<uint32_t>(s[3])};
  }
  static Q pairs(const int8_t* a, const int8_t* b) {
    return (factor(a) & 0xffffu) | factor(b) << 16;
  }
  static Q set32(int32_t x) { return Q{} + static_cast<uint32_t>(x); }
  static Q quad(const int8_t* p) { return Q{} + read<uint32_t>(p); }
  static Q low(Q a) { return a & 0x0f0f0f0fu; }
  static Q high(Q a) { return a >> 4 & 0x0f0f0f0fu; }
  template <int SHIFT, int MASK>
  static Q plane(Q a) {
    if constexpr (SHIFT < 4) a <<= 4 - SHIFT;
    if constexpr (SHIFT > 4) a >>= SHIFT - 4;
    return a & MASK * 0x01010101u;
  }
  static Q either(Q a, Q b) { return a | b; }
  static Q add32(Q a, Q b) { return a + b; }
  // The two 16-bit numbers of each lane, as 32-bit ones, added up.
  static Q add_pair(Short p) { return (Q)((Signed)p >> 16) + (Q)((Signed)((Q)p << 16) >> 16); }
  static Q mac(Q sum, Q w, Q x) {
    // A product of 8 bits by 8 is below 2^15 by amount: 16-bit products of the even and odd bytes.
    const Short even = (Short)(w & 0x00ff00ffu) * ((Short)(x << 8) >> 8);
    const Short odd = (Short)(w >> 8 & 0x00ff00ffu) * ((Short)x >> 8);
    return sum + add_pair(even) + add_pair(odd);
  }
  static Q flush(Q sum) { return sum; }
  static Q flush(Q sum, Q scale) { return sum * scale; }
  static Q mac16(Q sum, Q a, Q b) {
    const Signed low = ((Signed)(a << 16) >> 16) * ((Signed)(b << 16) >> 16);
    return sum + (Q)(low + ((Signed)a >> 16) * ((Signed)b >> 16));
  }
  static F to_float(Q a) { return __builtin_convertvector((Signed)a, F); }
  static F loadf(const float* p) { return read<F>(p); }
  static void storef(float* p, F a) { std::memcpy(p, &a, sizeof a); }
  static F setf(float x) { return F{} + x; }
  static F zerof() { return F{}; }
  static F half(const uint8_t* p) {
    uint16_t bits[W];
    std::memcpy(bits, p, sizeof bits);
    F out{};
    for (int i = 0; i < W; ++i) out[i] = redwood::half_to_float(bits[i]);
    return out;
  }
  static F mulf(F a, F b) { return a * b; }
  static F addf(F a, F b) { return a + b; }
  static F fmaf(F a, F b, F c) {
    F out{};
    for (int i = 0; i < W; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return out;
  }
  static void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

  // For tiles (tiles_impl.h).
  static void store(uint8_t* p, Q v) { std::memcpy(p, &v, sizeof v); }
  template <int N>
  static Q less8(Q v) {
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    return (Q)((Bytes)v - static_cast<uint8_t>(N));
  }
  // Bits from SHIFT of each byte, those of MASK.
  template <int SHIFT, int MASK>
  static Q bits(Q v) {
    return v >> SHIFT & MASK * 0x01010101u;
  }
  static Q mul16(Q a, Q b) {
    typedef uint16_t Words __attribute__((vector_size(16)));
    return (Q)((Words)a * (Words)b);
  }
  template <int N>
  static Q up(Q v) {
    return v << N;
  }
  // Lower and upper bytes of unsigned bytes times signed numbers of 16 bits that fit a byte.
  static void two_bytes(Q w, Q by, Q& low, Q& high) {
    const Q even = mul16(w & 0x00ff00ffu, by), odd = mul16(w >> 8 & 0x00ff00ffu, by);
    low = (even & 0x00ff00ffu) | (odd & 0x00ff00ffu) << 8;
    high = (even >> 8 & 0x00ff00ffu) | (odd & 0xff00ff00u);
  }
};

}  // namespace
