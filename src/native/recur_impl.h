// Convolutions over a few tokens, and steps of recurrences. Included once per instruction set, by
// float_impl.h.
#pragma once
#include "kernels.h"

namespace {
using namespace redwood;

void convolve(const float* const* inputs, const float* weights, const float* bias, int64_t taps,
              int64_t channels, bool silu, float* out) {
  for (int64_t c = 0; c < channels; c += 8) {
    const int64_t left = channels - c;
    const auto some = [&](const float* x) { return left >= 8 ? load(x + c) : load_tail(x + c, left); };
    V8 sum = set1(0.0f);
    for (int64_t t = 0; t < taps; ++t) sum = fma(some(inputs[t]), some(weights + t * channels), sum);
    if (bias) sum = add(sum, some(bias));
    if (silu) sum = div(sum, add(set1(1.0f), exp8(min(mul(sum, set1(-1.0f)), set1(88.0f)))));
    if (left >= 8) {
      store(out + c, sum);
    } else {
      float t[8];
      store(t, sum);
      for (int64_t i = 0; i < left; ++i) out[c + i] = t[i];
    }
  }
}

// 16 floats in two registers; wider sets have a type of one.
struct Pair {
  V8 low, high;
  static Pair read(const float* x) { return {load(x), load(x + 8)}; }
  static Pair all(float x) { return {set1(x), set1(x)}; }
  void write(float* x) const { store(x, low), store(x + 8, high); }
  friend Pair operator+(Pair a, Pair b) { return {add(a.low, b.low), add(a.high, b.high)}; }
  friend Pair operator-(Pair a, Pair b) { return {sub(a.low, b.low), sub(a.high, b.high)}; }
  friend Pair operator*(Pair a, Pair b) { return {mul(a.low, b.low), mul(a.high, b.high)}; }
  static Pair fused(Pair a, Pair b, Pair c) { return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)}; }
};

// Calls body(i, i modulo 4) for i below n: four sums, so that additions do not wait for each other.
template <class Body>
inline void fours(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) body(i + r, r);
  }
  for (int r = 0; i < n; ++i, ++r) body(i, r);
}

// `Wide`: 16 floats. `SAYS`: an answer is wanted.
template <class Wide, bool SAYS>
inline void recur_one(const Recur& s) {
  const Wide by = Wide::all(s.decay), none = Wide::all(0.0f);
  Wide value = Wide::read(s.value);
  if (s.correct) {
    Wide known[4] = {none, none, none, none};
    fours(s.key_dim, [&](int64_t i, int r) {
      known[r] = Wide::fused(Wide::read(s.from + i * kLanes) * by, Wide::all(s.key[i]), known[r]);
    });
    value = value - ((known[0] + known[2]) + (known[1] + known[3]));
  }
  value = value * Wide::all(s.beta);
  Wide out[4] = {none, none, none, none};
  fours(s.key_dim, [&](int64_t i, int r) {
    const Wide next = Wide::fused(value, Wide::all(s.key[i]), Wide::read(s.from + i * kLanes) * by);
    next.write(s.to + i * kLanes);
    if constexpr (SAYS) out[r] = Wide::fused(next, Wide::all(s.query[i]), out[r]);
  });
  if constexpr (SAYS) ((out[0] + out[2]) + (out[1] + out[3])).write(s.out);
}

template <class Wide>
void recur(const Recur& s) {
  s.query ? recur_one<Wide, true>(s) : recur_one<Wide, false>(s);
}

}  // namespace
