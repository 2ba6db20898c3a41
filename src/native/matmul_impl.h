// Products of packed weights with a few rows of activations; included once per instruction set.
//
// A block of 16 outputs meets up to Isa::ROWS rows at a time: its weights are unpacked once for these
// rows. Sums inside a group (or super-block) are integers, so only the order of the groups matters,
// and that is always the same. While a block is worked on, the next one is fetched from memory.
#pragma once
#include <type_traits>

#include "kernels.h"

namespace {
using namespace redwood;

constexpr int kHalves = kLanes / Isa::W;

template <int N, class Body>
inline __attribute__((always_inline)) void repeat(Body&& body) {
  if constexpr (N > 0) {
    repeat<N - 1>(body);
    body(std::integral_constant<int, N - 1>{});
  }
}

// Fetches a share of the next block with every group, spread over all passes over this one.
struct Fetcher {
  const uint8_t* at;
  int64_t step;
  inline void operator()() {
    for (int64_t b = 0; b < step; b += 64) Isa::prefetch(at + b);
    at += step;
  }
};

// Sum over one group of 32 inputs, R rows and 16 outputs: BITS-bit weights, scaled by `scale` per
// half group (K6), group (K4, K5) or not at all. total[r][h] grows by integers.
template <int BITS, int R, bool SCALED>
inline __attribute__((always_inline)) void group_sum(const uint8_t* w, const int8_t* x,
                                                     int64_t x_stride, const uint32_t* scale,
                                                     typename Isa::Q (&total)[R][kHalves]) {
  using Q = typename Isa::Q;
  constexpr int kFlush = BITS == 4 ? 4 : BITS == 5 ? 2 : 1;  // lines whose sums fit in 16 bits
  constexpr int kScales = BITS == 6 ? 2 : 1;                 // scales of a group
  Q sum[R][kHalves];
  repeat<4>([&](auto line) {
    constexpr int j = decltype(line)::value;
    if constexpr (j % kFlush == 0) {
      repeat<R>([&](auto r) { repeat<kHalves>([&](auto h) { sum[r][h] = Isa::zero(); }); });
    }
    Q lo[kHalves], hi[kHalves];
    repeat<kHalves>([&](auto h) {
      constexpr int at = decltype(h)::value * Isa::W * 4;
      const Q v = Isa::load(w + 64 * j + at);
      lo[h] = Isa::low(v);
      hi[h] = Isa::high(v);
      if constexpr (BITS == 5) {
        const Q p = Isa::load(w + kNibbles + at);
        lo[h] = Isa::either(lo[h], Isa::template plane<2 * j, 16>(p));
        hi[h] = Isa::either(hi[h], Isa::template plane<2 * j + 1, 16>(p));
      }
      if constexpr (BITS == 6) {
        const Q p = Isa::load(w + kNibbles + 64 * (j / 2) + at);
        lo[h] = Isa::either(lo[h], Isa::template plane<4 * (j % 2), 48>(p));
        hi[h] = Isa::either(hi[h], Isa::template plane<4 * (j % 2) + 2, 48>(p));
      }
    });
    repeat<R>([&](auto r) {
      const Q a = Isa::quad(x + r * x_stride + 8 * j), b = Isa::quad(x + r * x_stride + 8 * j + 4);
      repeat<kHalves>([&](auto h) { sum[r][h] = Isa::mac(sum[r][h], lo[h], a); });
      repeat<kHalves>([&](auto h) { sum[r][h] = Isa::mac(sum[r][h], hi[h], b); });
    });
    if constexpr (j % kFlush == kFlush - 1) {
      repeat<kHalves>([&](auto h) {
        if constexpr (SCALED) {
          constexpr int s = (j * kScales / 4) * kLanes + decltype(h)::value * Isa::W;
          const Q by = Isa::load32(scale + s);
          repeat<R>([&](auto r) {
            total[r][h] = Isa::add32(total[r][h], Isa::flush(sum[r][h], by));
          });
        } else {
          repeat<R>([&](auto r) {
            total[r][h] = Isa::add32(total[r][h], Isa::flush(sum[r][h]));
          });
        }
      });
    }
  });
}

// The same for 8-bit weights (stored plus 128): by halves of a byte where sums are 16 bits wide.
template <int R>
inline __attribute__((always_inline)) void group_sum8(const uint8_t* w, const int8_t* x,
                                                      int64_t x_stride,
                                                      typename Isa::Q (&total)[R][kHalves]) {
  using Q = typename Isa::Q;
  const Q sixteen = Isa::set32(static_cast<int32_t>(Isa::scale_bits(16)));
  repeat<Isa::WIDE ? 1 : 2>([&](auto part) {
    Q sum[R][kHalves];
    repeat<R>([&](auto r) { repeat<kHalves>([&](auto h) { sum[r][h] = Isa::zero(); }); });
#pragma GCC unroll 8
    for (int t = 0; t < 8; ++t) {
      Q v[kHalves];
      repeat<kHalves>([&](auto h) {
        v[h] = Isa::load(w + 64 * t + h * Isa::W * 4);
        if constexpr (!Isa::WIDE) v[h] = decltype(part)::value ? Isa::high(v[h]) : Isa::low(v[h]);
      });
      repeat<R>([&](auto r) {
        const Q a = Isa::quad(x + r * x_stride + 4 * t);
        repeat<kHalves>([&](auto h) { sum[r][h] = Isa::mac(sum[r][h], v[h], a); });
      });
    }
    repeat<R>([&](auto r) {
      repeat<kHalves>([&](auto h) {
        total[r][h] = Isa::add32(total[r][h], decltype(part)::value ? Isa::flush(sum[r][h], sixteen)
                                                                    : Isa::flush(sum[r][h]));
      });
    });
  });
}

template <int R>
inline __attribute__((always_inline)) void store_block(const Matmul& m, int row, int64_t block,
                                                       typename Isa::F (&y)[R][kHalves]) {
  repeat<R>([&](auto r) {
    repeat<kHalves>([&](auto h) {
      float* out = m.out + (row + r) * m.out_stride + block * kLanes + h * Isa::W;
      Isa::storef(out, m.add ? Isa::addf(Isa::loadf(out), y[r][h]) : y[r][h]);
    });
  });
}

// Formats with a scale (and a minimum) per group of 32.
template <Format FORMAT, int R>
void group_rows(const Matmul& m, const uint8_t* w, Fetcher& fetch, int row, int64_t block) {
  using Q = typename Isa::Q;
  constexpr int bits = FORMAT == Format::kA8 ? 8 : FORMAT <= Format::kA4M ? 4 : 5;
  constexpr bool minimum = FORMAT == Format::kA4M || FORMAT == Format::kA5M;
  constexpr int offset = minimum ? 0 : 1 << (bits - 1);
  constexpr int quants = bits == 8 ? kBytes : kNibbles + (bits == 5 ? kPlane1 : 0);
  constexpr int unit = quants + kHalf * (minimum ? 2 : 1);
  const int64_t groups = m.cols / kGroup;
  const int8_t* x = m.x.quants + row * m.x.stride;
  typename Isa::F y[R][kHalves];
  repeat<R>([&](auto r) { repeat<kHalves>([&](auto h) { y[r][h] = Isa::zerof(); }); });
  for (int64_t g = 0; g < groups; ++g, w += unit, x += kGroup) {
    fetch();
    Q total[R][kHalves];
    repeat<R>([&](auto r) {
      const int32_t sum = m.x.sums[(row + r) * groups + g];
      repeat<kHalves>([&](auto h) { total[r][h] = Isa::set32(-offset * sum); });
    });
    if constexpr (bits == 8) {
      group_sum8<R>(w, x, m.x.stride, total);
    } else {
      group_sum<bits, R, false>(w, x, m.x.stride, nullptr, total);
    }
    repeat<kHalves>([&](auto h) {
      const auto scale = Isa::half(w + quants + 2 * h * Isa::W);
      repeat<R>([&](auto r) {
        const auto by = Isa::mulf(scale, Isa::setf(m.x.scales[(row + r) * groups + g]));
        y[r][h] = Isa::fmaf(Isa::to_float(total[r][h]), by, y[r][h]);
      });
      if constexpr (minimum) {
        const auto least = Isa::half(w + quants + kHalf + 2 * h * Isa::W);
        repeat<R>([&](auto r) {
          y[r][h] = Isa::fmaf(least, Isa::setf(m.x.offsets[(row + r) * groups + g]), y[r][h]);
        });
      }
    });
  }
  store_block<R>(m, row, block, y);
}

// Scales of a super-block of K4 or K5: as factors [8][16], minima as 16-bit pairs [4][16].
inline void unpack_scales(const uint8_t* packed, uint32_t* factors, uint32_t* pairs) {
  uint32_t minima[8][kLanes];
  for (int g = 0; g < 8; ++g) {
    const uint8_t* low = packed + g * kLanes;
    const uint8_t* high = packed + (8 + g % 4) * kLanes;
    const int shift = g < 4 ? 0 : 4;
    for (int o = 0; o < kLanes; ++o) {
      const uint32_t bits = static_cast<uint32_t>(high[o]) >> shift;
      factors[g * kLanes + o] = ((low[o] & 15u) | (bits & 3u) << 4) * Isa::scale_bits(1);
      minima[g][o] = static_cast<uint32_t>(low[o]) >> 4 | (bits >> 2 & 3u) << 4;
    }
  }
  for (int p = 0; p < 4; ++p) {
    for (int o = 0; o < kLanes; ++o) {
      pairs[p * kLanes + o] = minima[2 * p][o] | minima[2 * p + 1][o] << 16;
    }
  }
}

// Scales of a super-block of K6: as factors [16][16] and as 16-bit pairs [8][16].
inline void unpack_scales6(const uint8_t* packed, uint32_t* factors, uint32_t* pairs) {
  const int8_t* s = reinterpret_cast<const int8_t*>(packed);
  for (int i = 0; i < 16 * kLanes; ++i) factors[i] = Isa::scale_bits(s[i]);
  for (int p = 0; p < 8; ++p) {
    for (int o = 0; o < kLanes; ++o) {
      const uint32_t a = static_cast<uint16_t>(s[2 * p * kLanes + o]);
      const uint32_t b = static_cast<uint16_t>(s[(2 * p + 1) * kLanes + o]);
      pairs[p * kLanes + o] = a | b << 16;
    }
  }
}

// Formats with scales inside a super-block of 256: integers up to there, one float sum beyond.
template <Format FORMAT, int R>
void super_rows(const Matmul& m, const uint8_t* w, Fetcher& fetch, int row, int64_t block) {
  using Q = typename Isa::Q;
  constexpr int bits = FORMAT == Format::kK4 ? 4 : FORMAT == Format::kK5 ? 5 : 6;
  constexpr int quants = kNibbles + (bits == 5 ? kPlane1 : bits == 6 ? kPlane2 : 0);
  constexpr int scale_bytes = bits == 6 ? 16 * kLanes : kScaleBytes;
  constexpr int pairs = bits == 6 ? 8 : 4;
  constexpr int per_group = bits == 6 ? 2 : 1;
  const int64_t supers = m.cols / kSuper;
  const int16_t* sums = bits == 6 ? m.x.sums16 : m.x.sums32;
  const int8_t* x = m.x.quants + row * m.x.stride;
  typename Isa::F y[R][kHalves];
  repeat<R>([&](auto r) { repeat<kHalves>([&](auto h) { y[r][h] = Isa::zerof(); }); });
  alignas(64) uint32_t factors[8 * per_group * kLanes];
  alignas(64) uint32_t paired[pairs * kLanes];
  for (int64_t b = 0; b < supers; ++b, x += kSuper) {
    const uint8_t* scales = w + 8 * quants;
    if constexpr (bits == 6) {
      unpack_scales6(scales, factors, paired);
    } else {
      unpack_scales(scales, factors, paired);
    }
    Q total[R][kHalves], least[R][kHalves];
    repeat<R>([&](auto r) {
      repeat<kHalves>([&](auto h) { total[r][h] = least[r][h] = Isa::zero(); });
    });
    for (int g = 0; g < 8; ++g, w += quants) {
      fetch();
      group_sum<bits, R, true>(w, x + g * kGroup, m.x.stride, factors + g * per_group * kLanes,
                               total);
    }
    repeat<R>([&](auto r) {
      const int16_t* s = sums + ((row + r) * supers + b) * 2 * pairs;
      for (int p = 0; p < pairs; ++p) {
        const Q pair = Isa::quad(reinterpret_cast<const int8_t*>(s + 2 * p));
        repeat<kHalves>([&](auto h) {
          const Q by = Isa::load32(paired + p * kLanes + h * Isa::W);
          least[r][h] = Isa::add32(least[r][h], Isa::madd16(by, pair));
        });
      }
    });
    w += scale_bytes;
    repeat<kHalves>([&](auto h) {
      const auto d = Isa::half(w + 2 * h * Isa::W);
      repeat<R>([&](auto r) {
        const auto scale = Isa::setf(m.x.scales[(row + r) * supers + b]);
        y[r][h] = Isa::fmaf(Isa::to_float(total[r][h]), Isa::mulf(d, scale), y[r][h]);
        if constexpr (bits == 6) {
          const auto by = Isa::mulf(d, Isa::mulf(scale, Isa::setf(-32.0f)));
          y[r][h] = Isa::fmaf(Isa::to_float(least[r][h]), by, y[r][h]);
        } else {
          const auto dmin = Isa::half(w + kHalf + 2 * h * Isa::W);
          const auto by = Isa::mulf(dmin, Isa::mulf(scale, Isa::setf(-1.0f)));
          y[r][h] = Isa::fmaf(Isa::to_float(least[r][h]), by, y[r][h]);
        }
      });
    });
    w += kHalf * (bits == 6 ? 1 : 2);
  }
  store_block<R>(m, row, block, y);
}

template <Format FORMAT, int R>
void float_rows(const Matmul& m, const uint8_t* w, Fetcher& fetch, int row, int64_t block) {
  V8 y[R][2];
  repeat<R>([&](auto r) { y[r][0] = y[r][1] = set1(0.0f); });
  const float* x = m.x.values + row * m.x.stride;
  for (int64_t k = 0; k < m.cols; ++k, w += info(FORMAT).unit_bytes) {
    if (k % 16 == 0) fetch();
    V8 a, b;
    if constexpr (FORMAT == Format::kF32) {
      a = load(reinterpret_cast<const float*>(w));
      b = load(reinterpret_cast<const float*>(w) + 8);
    } else if constexpr (FORMAT == Format::kF16) {
      a = load(reinterpret_cast<const uint16_t*>(w));
      b = load(reinterpret_cast<const uint16_t*>(w) + 8);
    } else {
      a = load_bf16(reinterpret_cast<const uint16_t*>(w));
      b = load_bf16(reinterpret_cast<const uint16_t*>(w) + 8);
    }
    repeat<R>([&](auto r) {
      const V8 v = set1(x[r * m.x.stride + k]);
      y[r][0] = fma(a, v, y[r][0]);
      y[r][1] = fma(b, v, y[r][1]);
    });
  }
  repeat<R>([&](auto r) {
    float* out = m.out + (row + r) * m.out_stride + block * kLanes;
    store(out, m.add ? add(load(out), y[r][0]) : y[r][0]);
    store(out + 8, m.add ? add(load(out + 8), y[r][1]) : y[r][1]);
  });
}

template <Format FORMAT, int R>
void some_rows(const Matmul& m, const uint8_t* w, Fetcher& fetch, int row, int64_t block) {
  if constexpr (FORMAT <= Format::kA8) {
    group_rows<FORMAT, R>(m, w, fetch, row, block);
  } else if constexpr (FORMAT <= Format::kK6) {
    super_rows<FORMAT, R>(m, w, fetch, row, block);
  } else {
    float_rows<FORMAT, R>(m, w, fetch, row, block);
  }
}

template <Format FORMAT, int R>
void up_to_rows(int count, const Matmul& m, const uint8_t* w, Fetcher& fetch, int row,
                int64_t block) {
  if constexpr (R > 1) {
    if (count < R) return up_to_rows<FORMAT, R - 1>(count, m, w, fetch, row, block);
  }
  some_rows<FORMAT, R>(m, w, fetch, row, block);
}

template <Format FORMAT>
void matmul(const Matmul& m, int64_t first, int64_t last) {
  constexpr int most = is_float(FORMAT) ? 4 : Isa::ROWS;
  const int passes = (m.n + most - 1) / most;
  const int64_t per_step = is_float(FORMAT) ? 16 : kGroup;
  const int64_t steps = (m.cols + per_step - 1) / per_step;
  for (int64_t block = first; block < last; ++block) {
    const uint8_t* w = m.weights + block * m.block_bytes;
    Fetcher fetch{w + m.block_bytes, 0};
    if (block + 1 < last) fetch.step = round_up(m.block_bytes / (steps * passes) + 1, 64);
    for (int pass = 0, row = 0; pass < passes; ++pass) {
      // Passes of nearly equal size: 5 rows are 3 + 2, not 4 + 1.
      const int count = (m.n - row + passes - pass - 1) / (passes - pass);
      up_to_rows<FORMAT, most>(count, m, w, fetch, row, block);
      row += count;
    }
  }
}

}  // namespace
