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

// Four sums by index modulo 4 in each lane, so that additions do not wait for each other.
struct Lanes16 {
  V8 sum[4][2];
  Lanes16() {
    for (auto& s : sum) s[0] = s[1] = set1(0.0f);
  }
  V8 total(int half) const { return add(add(sum[0][half], sum[2][half]), add(sum[1][half], sum[3][half])); }
};

template <class Body>
inline void fours(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) body(i + r, r);
  }
  for (int r = 0; i < n; ++i, ++r) body(i, r);
}

void recur(const Recur& s) {
  const V8 by = set1(s.decay), beta = set1(s.beta);
  V8 low = load(s.value), high = load(s.value + 8);
  if (s.correct) {
    Lanes16 known;
    fours(s.key_dim, [&](int64_t i, int r) {
      const float* from = s.from + i * kLanes;
      const V8 key = set1(s.key[i]);
      known.sum[r][0] = fma(mul(load(from), by), key, known.sum[r][0]);
      known.sum[r][1] = fma(mul(load(from + 8), by), key, known.sum[r][1]);
    });
    low = sub(low, known.total(0)), high = sub(high, known.total(1));
  }
  low = mul(low, beta), high = mul(high, beta);
  Lanes16 out;
  fours(s.key_dim, [&](int64_t i, int r) {
    const float* from = s.from + i * kLanes;
    const V8 key = set1(s.key[i]);
    const V8 a = fma(low, key, mul(load(from), by)), b = fma(high, key, mul(load(from + 8), by));
    store(s.to + i * kLanes, a);
    store(s.to + i * kLanes + 8, b);
    if (!s.query) return;
    const V8 query = set1(s.query[i]);
    out.sum[r][0] = fma(a, query, out.sum[r][0]);
    out.sum[r][1] = fma(b, query, out.sum[r][1]);
  });
  if (!s.query) return;
  store(s.out, out.total(0));
  store(s.out + 8, out.total(1));
}

}  // namespace
