// What gains most, besides the products, from registers of 16 floats: attention, activations to 8 bits,
// the exponentials. Every number is computed as in float_impl.h: lanes are slots, dimensions or
// elements, and a sum over them keeps its order, so the bits are those of 8 floats at a time.
#pragma once
#include <immintrin.h>

#include <limits>

#include "kernels.h"

namespace wide {
using namespace redwood;

constexpr int kQueries = 12;  // rows of a tile: with two registers each, 24 of 32 hold sums

inline __m512 load16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }

// B blocks of 16 slots, or of 16 dimensions: each number broadcast is used B times.
template <class T, int R, int B>
void dot_some(const float* q, int64_t q_stride, const T* keys, int64_t dim, float* scores,
              int64_t stride) {
  __m512 sum[R][B];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) sum[r][b] = _mm512_setzero_ps();
  }
  for (int64_t d = 0; d < dim; ++d, keys += kLanes, q += q_stride) {
    __m512 k[B];
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) k[b] = load16(keys + b * dim * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512 v = _mm512_set1_ps(q[r]);
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) sum[r][b] = _mm512_fmadd_ps(k[b], v, sum[r][b]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) _mm512_storeu_ps(scores + r * stride + b * kLanes, sum[r][b]);
  }
}

template <class T, int R, int B>
void add_some(const float* weights, int64_t stride, const T* values, int64_t slots, int64_t dim,
              float* out) {
  __m512 sum[R][B];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) sum[r][b] = _mm512_loadu_ps(out + r * dim + b * kLanes);
  }
  for (int64_t s = 0; s < slots; ++s, values += dim, ++weights) {
    __m512 v[B];
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) v[b] = load16(values + b * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512 w = _mm512_set1_ps(weights[r * stride]);
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) sum[r][b] = _mm512_fmadd_ps(v[b], w, sum[r][b]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) _mm512_storeu_ps(out + r * dim + b * kLanes, sum[r][b]);
  }
}

// Calls `tile` with the number of rows as a constant.
template <int R = kQueries, class Tile>
inline void with_rows(int count, Tile tile) {
  if constexpr (R > 1) {
    if (count < R) return with_rows<R - 1>(count, tile);
  }
  tile(std::integral_constant<int, R>{});
}

template <class T>
void dot_keys(const float* q, int64_t q_stride, int n, const void* keys, int64_t blocks, int64_t dim,
              float* scores, int64_t stride) {
  in_tiles<kQueries>(n, [&](int r, int count) {
    with_rows(count, [&](auto rows) {
      const T* k = static_cast<const T*>(keys);
      int64_t b = 0;
      for (; b + 2 <= blocks; b += 2, k += 2 * dim * kLanes) {
        dot_some<T, rows(), 2>(q + r, q_stride, k, dim, scores + r * stride + b * kLanes, stride);
      }
      if (b < blocks) {
        dot_some<T, rows(), 1>(q + r, q_stride, k, dim, scores + r * stride + b * kLanes, stride);
      }
    });
  });
}

template <class T>
void add_values(const float* weights, int64_t stride, int n, const void* values, int64_t slots,
                int64_t dim, float* out) {
  in_tiles<kQueries>(n, [&](int r, int count) {
    with_rows(count, [&](auto rows) {
      const float* w = weights + r * stride;
      const T* v = static_cast<const T*>(values);
      float* to = out + r * dim;
      int64_t d = 0;
      for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
        add_some<T, rows(), 2>(w, stride, v + d, slots, dim, to + d);
      }
      if (d < dim) add_some<T, rows(), 1>(w, stride, v + d, slots, dim, to + d);
    });
  });
}

inline __m512 exp16(__m512 x) {
  const auto set = [](float v) { return _mm512_set1_ps(v); };
  const __m512 t = _mm512_max_ps(_mm512_min_ps(x, set(88.0f)), set(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(t, set(1.44269504088896341f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fmadd_ps(n, set(-0.693359375f), t);
  r = _mm512_fmadd_ps(n, set(2.12194440e-4f), r);
  __m512 p = set(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, set(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, set(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, set(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, set(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, set(5.0000001201e-1f));
  p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), set(1.0f));
  const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  const __m512 power = _mm512_castsi512_ps(_mm512_slli_epi32(e, 23));
  const __mmask16 held = _mm512_cmp_ps_mask(x, set(-87.0f), _CMP_GE_OQ);
  return _mm512_maskz_mul_ps(held, p, power);
}

// Without a soft cap; the sum runs over 8 lanes, as in float_impl.h.
float plain_softmax(float* scores, int64_t n, float scale) {
  const __m512 by = _mm512_set1_ps(scale);
  __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < n; i += 16) {
    most = _mm512_max_ps(most, _mm512_mul_ps(_mm512_loadu_ps(scores + i), by));
  }
  const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  __m256 sum = _mm256_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(scores + i), by);
    const __m512 e = exp16(_mm512_sub_ps(v, peak));
    _mm512_storeu_ps(scores + i, e);
    sum = _mm256_add_ps(sum, _mm512_castps512_ps256(e));
    sum = _mm256_add_ps(sum, _mm512_extractf32x8_ps(e, 1));
  }
  return sum_lanes({sum});
}

// The gate of SiLU for a multiple of 16.
void silu(const float* gate, const float* up, int64_t n, float* out) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 g = _mm512_loadu_ps(gate + i);
    const __m512 minus = _mm512_mul_ps(g, _mm512_set1_ps(-1.0f));
    const __m512 e = exp16(_mm512_min_ps(minus, _mm512_set1_ps(88.0f)));
    const __m512 v = _mm512_div_ps(g, _mm512_add_ps(one, e));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(v, _mm512_loadu_ps(up + i)));
  }
}

// 16 values to 8 bits; returns them as 32-bit numbers, too.
inline __m512i to_int8(const float* x, __m512 by, int8_t* q) {
  __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x), by);
  // 127 where it is NaN, too (0 times infinity), as min does in 256 bits; compilers may swap the
  // operands of this one.
  const __mmask16 less = _mm512_cmp_ps_mask(v, _mm512_set1_ps(127.0f), _CMP_LT_OQ);
  v = _mm512_max_ps(_mm512_mask_mov_ps(_mm512_set1_ps(127.0f), less, v), _mm512_set1_ps(-127.0f));
  const __m512i i = _mm512_cvtps_epi32(v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtsepi32_epi8(i));
  return i;
}

inline float largest(const float* x, int count) {  // a multiple of 32
  __m512 a = _mm512_abs_ps(_mm512_loadu_ps(x)), b = _mm512_abs_ps(_mm512_loadu_ps(x + 16));
  for (int i = 32; i < count; i += 32) {
    a = _mm512_max_ps(a, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
    b = _mm512_max_ps(b, _mm512_abs_ps(_mm512_loadu_ps(x + i + 16)));
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(a, b));
}

// Whole groups; returns how many there were.
int64_t quantise_groups(const float* x, int64_t cols, int8_t* q, float* scales, float* offsets,
                        int32_t* sums) {
  const int64_t groups = cols / kGroup;
  for (int64_t g = 0; g < groups; ++g, x += kGroup, q += kGroup) {
    const float peak = largest(x, kGroup);
    const __m512 by = _mm512_set1_ps(peak > 0 ? 127.0f / peak : 0.0f);
    const __m512i a = to_int8(x, by, q), b = to_int8(x + 16, by, q + 16);
    sums[g] = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
    scales[g] = peak / 127.0f;
    offsets[g] = scales[g] * static_cast<float>(sums[g]);
  }
  return groups;
}

int64_t quantise_supers(const float* x, int64_t cols, int8_t* q, float* scales, int16_t* sums16,
                        int16_t* sums32) {
  const int64_t supers = cols / kSuper;
  for (int64_t s = 0; s < supers; ++s, x += kSuper, q += kSuper) {
    const float peak = largest(x, kSuper);
    const __m512 by = _mm512_set1_ps(peak > 0 ? 127.0f / peak : 0.0f);
    for (int i = 0; i < kSuper; i += 16) to_int8(x + i, by, q + i);
    scales[s] = peak / 127.0f;
    for (int i = 0; i < 4; ++i, sums16 += 4, sums32 += 2) {
      // Sums of 4 in each of 16 lanes, then of 16 in every fourth.
      const __m512i bytes = _mm512_loadu_si512(q + 64 * i);
      __m512i t = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes);
      t = _mm512_add_epi32(t, _mm512_shuffle_epi32(t, _MM_PERM_CDAB));
      t = _mm512_add_epi32(t, _mm512_shuffle_epi32(t, _MM_PERM_BADC));
      const __m128i four = _mm512_castsi512_si128(_mm512_maskz_compress_epi32(0x1111, t));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(sums16), _mm_packs_epi32(four, four));
      for (int j = 0; j < 2; ++j) {
        sums32[j] = static_cast<int16_t>(sums16[2 * j] + sums16[2 * j + 1]);
      }
    }
  }
  return supers;
}

}  // namespace wide
