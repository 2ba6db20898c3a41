// Everything but the matrix products: norms, rotary, attention, activations. Included once per
// instruction set. Sums run over 8 lanes by index, whatever the length, and end in one fixed tree.
#pragma once
#include <cmath>
#include <limits>

#include "kernels.h"

namespace {
using namespace redwood;

inline float sum_lanes(V8 a) {
  float x[8];
  store(x, a);
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

inline float max_lanes(V8 a) {
  float x[8], most = -std::numeric_limits<float>::infinity();
  store(x, a);
  for (float v : x) most = v > most ? v : most;
  return most;
}

// The last, partial 8 of a row, zeros beyond its end.
inline V8 load_tail(const float* x, int64_t count) {
  float t[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t i = 0; i < count; ++i) t[i] = x[i];
  return load(t);
}

template <class Body>
inline void each8(int64_t n, const float* x, float* out, Body body) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store(out + i, body(load(x + i), i));
  if (i < n) {
    float t[8];
    store(t, body(load_tail(x + i, n - i), i));
    for (int64_t j = 0; j < n - i; ++j) out[i + j] = t[j];
  }
}

// exp for arguments up to 88; exactly 0 below -87. Error under 2 units in the last place.
inline V8 exp8(V8 x) {
  const V8 t = max(min(x, set1(88.0f)), set1(-87.0f));
  const V8 n = round(mul(t, set1(1.44269504088896341f)));
  V8 r = fma(n, set1(-0.693359375f), t);
  r = fma(n, set1(2.12194440e-4f), r);
  V8 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  return keep_above(mul(p, power2(n)), x, -87.0f);
}

inline V8 tanh8(V8 x) {  // 1 - 2 / (exp(2x) + 1), with x held where tanh is 1 in float32
  const V8 t = max(min(x, set1(15.0f)), set1(-15.0f));
  return sub(set1(1.0f), div(set1(2.0f), add(exp8(add(t, t)), set1(1.0f))));
}

inline float largest(const float* x, int64_t n) {
  V8 most = set1(0.0f);
  int64_t i = 0;
  const V8 sign = set1(-1.0f);
  for (; i + 8 <= n; i += 8) {
    const V8 v = load(x + i);
    most = max(most, max(v, mul(v, sign)));
  }
  float peak = max_lanes(most);
  for (; i < n; ++i) peak = std::fabs(x[i]) > peak ? std::fabs(x[i]) : peak;
  return std::fabs(peak);  // zeros have no sign, in whatever order they came
}

// Rounds n (a multiple of 8) values to x / scale in [-127, 127]; values past `cols` are 0.
inline void quantise(const float* x, int64_t cols, int64_t n, float peak, int8_t* q) {
  const V8 by = set1(peak > 0 ? 127.0f / peak : 0.0f);
  const V8 top = set1(127.0f), least = set1(-127.0f);
  for (int64_t i = 0; i < n; i += 8) {
    const int64_t left = cols - i;
    const V8 v = left >= 8 ? load(x + i) : load_tail(x + i, left > 0 ? left : 0);
    store_int8(q + i, max(min(mul(v, by), top), least));
  }
}

inline int32_t sum_quants(const int8_t* q, int n) {
  int32_t sum = 0;
  for (int i = 0; i < n; ++i) sum += q[i];
  return sum;
}

void quantise_group(const float* x, int64_t cols, int64_t stride, int8_t* q, float* scales,
                    float* offsets, int32_t* sums) {
  for (int64_t g = 0; g < stride / kGroup; ++g) {
    const int64_t at = g * kGroup, left = cols - at < 0 ? 0 : cols - at;
    const int64_t here = left < kGroup ? left : kGroup;
    const float peak = largest(x + at, here);
    quantise(x + at, here, kGroup, peak, q + at);
    sums[g] = sum_quants(q + at, kGroup);
    scales[g] = peak / 127.0f;
    offsets[g] = scales[g] * static_cast<float>(sums[g]);
  }
}

void quantise_super(const float* x, int64_t cols, int64_t stride, int8_t* q, float* scales,
                    int16_t* sums16, int16_t* sums32) {
  for (int64_t b = 0; b < stride / kSuper; ++b) {
    const int64_t at = b * kSuper, left = cols - at < 0 ? 0 : cols - at;
    const int64_t here = left < kSuper ? left : kSuper;
    const float peak = largest(x + at, here);
    quantise(x + at, here, kSuper, peak, q + at);
    scales[b] = peak / 127.0f;
    for (int i = 0; i < 16; ++i) {
      sums16[b * 16 + i] = static_cast<int16_t>(sum_quants(q + at + 16 * i, 16));
    }
    for (int i = 0; i < 8; ++i) {
      sums32[b * 8 + i] = static_cast<int16_t>(sums16[b * 16 + 2 * i] + sums16[b * 16 + 2 * i + 1]);
    }
  }
}

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  V8 squares = set1(0.0f);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) squares = fma(load(x + i), load(x + i), squares);
  if (i < n) squares = fma(load_tail(x + i, n - i), load_tail(x + i, n - i), squares);
  const V8 by = set1(1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(n) + eps));
  each8(n, x, out, [&](V8 v, int64_t at) {
    const V8 w = n - at >= 8 ? load(weight + at) : load_tail(weight + at, n - at);
    return mul(mul(v, by), w);
  });
}

void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  for (; i + 8 <= half; i += 8) {  // no fused operation, here and below
    const V8 a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, sub(mul(a, c), mul(b, s)));
    store(x + half + i, add(mul(b, c), mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

void gate(const float* gate, const float* up, int64_t n, bool gelu, float* out) {
  each8(n, gate, out, [&](V8 g, int64_t at) {
    const V8 u = n - at >= 8 ? load(up + at) : load_tail(up + at, n - at);
    if (!gelu) {  // x / (1 + exp(-x))
      const V8 e = exp8(min(mul(g, set1(-1.0f)), set1(88.0f)));
      return mul(div(g, add(set1(1.0f), e)), u);
    }
    const V8 cube = mul(mul(g, g), g);
    const V8 inner = mul(set1(0.7978845608028654f), fma(set1(0.044715f), cube, g));
    return mul(mul(mul(set1(0.5f), g), add(set1(1.0f), tanh8(inner))), u);
  });
}

void sigmoid(const float* gate, int64_t n, float* x) {
  each8(n, x, x, [&](V8 v, int64_t at) {
    const V8 g = n - at >= 8 ? load(gate + at) : load_tail(gate + at, n - at);
    return div(v, add(set1(1.0f), exp8(min(mul(g, set1(-1.0f)), set1(88.0f)))));
  });
}

void add_row(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}

void to_half(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store_half(out + i, load(x + i));
  if (i < n) {
    uint16_t t[8];
    store_half(t, load_tail(x + i, n - i));
    for (int64_t j = 0; j < n - i; ++j) out[i + j] = t[j];
  }
}

constexpr int kQueries = 6;  // rows of a tile: 12 sums of 8 lanes stay in registers

// Calls `tile` with 1 to MOST rows at a time, tiles of nearly equal size: its first row and their number.
template <int MOST, class Tile>
inline void in_tiles(int n, Tile tile) {
  const int tiles = (n + MOST - 1) / MOST;
  for (int t = 0, row = 0; t < tiles; ++t) {
    const int count = (n - row + tiles - t - 1) / (tiles - t);
    tile(row, count);
    row += count;
  }
}

template <class T, int R>
void dot_some(const float* q, int64_t q_stride, const T* keys, int64_t dim, float* scores,
              int64_t stride) {
  V8 sum[R][2];
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = set1(0.0f);
  for (int64_t d = 0; d < dim; ++d, keys += kLanes, q += q_stride) {
    const V8 a = load(keys), b = load(keys + 8);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const V8 v = set1(q[r]);
      sum[r][0] = fma(a, v, sum[r][0]);
      sum[r][1] = fma(b, v, sum[r][1]);
    }
  }
  for (int r = 0; r < R; ++r) {
    store(scores + r * stride, sum[r][0]);
    store(scores + r * stride + 8, sum[r][1]);
  }
}

template <class T, int R = kQueries>
void dot_up_to(const float* q, int64_t q_stride, int n, const T* keys, int64_t dim, float* scores,
               int64_t stride) {
  if constexpr (R > 1) {
    if (n < R) return dot_up_to<T, R - 1>(q, q_stride, n, keys, dim, scores, stride);
  }
  dot_some<T, R>(q, q_stride, keys, dim, scores, stride);
}

template <class T>
void dot_keys(const float* q, int64_t q_stride, int n, const void* keys, int64_t blocks, int64_t dim,
              float* scores, int64_t stride) {
  for (int64_t b = 0; b < blocks; ++b) {
    const T* k = static_cast<const T*>(keys) + b * dim * kLanes;
    in_tiles<kQueries>(n, [&](int r, int count) {
      dot_up_to<T>(q + r, q_stride, count, k, dim, scores + r * stride + b * kLanes, stride);
    });
  }
}

template <class T, int R>
void add_some(const float* weights, int64_t stride, const T* values, int64_t slots, int64_t dim,
              float* out) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    V8 sum[R][2];
    for (int r = 0; r < R; ++r) {
      sum[r][0] = load(out + r * dim + d);
      sum[r][1] = load(out + r * dim + d + 8);
    }
    const T* v = values + d;
    for (int64_t s = 0; s < slots; ++s, v += dim) {
      const V8 a = load(v), b = load(v + 8);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const V8 w = set1(weights[r * stride + s]);
        sum[r][0] = fma(a, w, sum[r][0]);
        sum[r][1] = fma(b, w, sum[r][1]);
      }
    }
    for (int r = 0; r < R; ++r) {
      store(out + r * dim + d, sum[r][0]);
      store(out + r * dim + d + 8, sum[r][1]);
    }
  }
}

template <class T, int R = kQueries>
void add_up_to(const float* weights, int64_t stride, int n, const T* values, int64_t slots,
               int64_t dim, float* out) {
  if constexpr (R > 1) {
    if (n < R) return add_up_to<T, R - 1>(weights, stride, n, values, slots, dim, out);
  }
  add_some<T, R>(weights, stride, values, slots, dim, out);
}

template <class T>
void add_values(const float* weights, int64_t stride, int n, const void* values, int64_t slots,
                int64_t dim, float* out) {
  in_tiles<kQueries>(n, [&](int r, int count) {
    add_up_to<T>(weights + r * stride, stride, count, static_cast<const T*>(values), slots, dim,
                 out + r * dim);
  });
}

void softcap(float* x, int64_t n, float cap) {
  const V8 up = set1(cap), down = set1(1.0f / cap);
  each8(n, x, x, [&](V8 v, int64_t) { return mul(tanh8(mul(v, down)), up); });
}

float softmax(float* scores, int64_t n, float scale, float cap) {
  // Masked scores are -inf: they stay so under the scale, and are put back after a soft cap.
  const V8 by = set1(scale);
  V8 most = set1(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < n; i += 8) {
    V8 v = mul(load(scores + i), by);
    if (cap != 0.0f) {
      const V8 capped = mul(tanh8(mul(v, set1(1.0f / cap))), set1(cap));
      float a[8], b[8];
      store(a, v);
      store(b, capped);
      for (int j = 0; j < 8; ++j) b[j] = std::isinf(a[j]) && a[j] < 0 ? a[j] : b[j];
      v = load(b);
    }
    store(scores + i, v);
    most = max(most, v);
  }
  const V8 peak = set1(max_lanes(most));
  V8 sum = set1(0.0f);
  for (int64_t i = 0; i < n; i += 8) {
    const V8 e = exp8(sub(load(scores + i), peak));
    store(scores + i, e);
    sum = add(sum, e);
  }
  return sum_lanes(sum);
}

}  // namespace

#include "recur_impl.h"

namespace {

const Kernels* table(const char* name) {
  static const Kernels kernels = {
      name,
      {matmul<Format::kA4>, matmul<Format::kA4M>, matmul<Format::kA5>, matmul<Format::kA5M>,
       matmul<Format::kA8>, matmul<Format::kK4>, matmul<Format::kK5>, matmul<Format::kK6>,
       matmul<Format::kF32>, matmul<Format::kF16>, matmul<Format::kBF16>, matmul<Format::kA4N>,
       matmul<Format::kA4X>, matmul<Format::kK2>, matmul<Format::kT4>, matmul<Format::kT3>},
      quantise_group,
      quantise_super,
      rms_norm,
      rotate,
      gate,
      add_row,
      to_half,
      {dot_keys<uint16_t>, dot_keys<float>},
      {add_values<uint16_t>, add_values<float>},
      softmax,
      softcap,
      sigmoid,
      convolve,
      recur<Pair>,
  };
  return &kernels;
}

}  // namespace
