// Products by Arm's 8-bit matrix instruction: 2 outputs x 8 inputs times 8 inputs x 2 rows at once.
// Included after matmul_impl.h, whose product takes what has no second row.
//
// A line of a block holds quads 2J and 2J + 1 of 16 outputs in its nibbles; with these side by side,
// 16 bytes are 8 inputs of 2 outputs. Sums of integers are exact in any order, and the sums of floats
// have that of matmul_impl.h, so the bits are the same.
#pragma once
#include "kernels.h"

namespace {
using namespace redwood;

constexpr int kPart = 8;           // outputs at a time: their sums for 4 rows stay in registers
constexpr int kFours = kPart / 4;  // registers of 4 outputs
constexpr int kParts = kLanes / kPart;

template <int P>
using Tiles = int32x4_t[P][2 * kFours];  // of P pairs of rows: 2 outputs x 2 rows each
template <int P>
using IntRows = int32x4_t[2 * P][kFours];  // of 2 P rows
template <int P>
using FloatRows = float32x4_t[2 * P][kFours];

// Inputs 8J to 8J + 7 of a group, added to the sums of a part. `w`: the group, from that part on.
// `table`: if there is one, the numbers that the weights choose.
template <int BITS, int J, int P>
REDWOOD_INLINE void add_inputs(const uint8_t* w, const int8_t* x, int64_t stride, Tiles<P>& sum,
                               const typename Isa::Q* table = nullptr) {
  int8x16_t pair[P];
  REDWOOD_UNROLL for (int p = 0; p < P; ++p) {
    const int8_t* row = x + 2 * p * stride + 8 * J;
    pair[p] = vcombine_s8(vld1_s8(row), vld1_s8(row + stride));
  }
  REDWOOD_UNROLL for (int f = 0; f < kFours; ++f) {
    int32x4_t first, second;  // the two quads of 4 outputs
    if constexpr (BITS == 8) {
      first = Isa::load(w + 128 * J + 16 * f);
      second = Isa::load(w + 128 * J + 64 + 16 * f);
    } else {
      two_quads<BITS, J>(w + 16 * f, first, second);
    }
    if (table) first = Isa::lookup(*table, first), second = Isa::lookup(*table, second);
    const uint8x16_t two = Isa::bytes(vzip1q_s32(first, second));
    const uint8x16_t next = Isa::bytes(vzip2q_s32(first, second));
    REDWOOD_UNROLL for (int p = 0; p < P; ++p) {
      sum[p][2 * f] = vusmmlaq_s32(sum[p][2 * f], two, pair[p]);
      sum[p][2 * f + 1] = vusmmlaq_s32(sum[p][2 * f + 1], next, pair[p]);
    }
  }
}

template <int P>
REDWOOD_INLINE void clear_tiles(Tiles<P>& sum) {
  REDWOOD_UNROLL for (int p = 0; p < P; ++p) {
    REDWOOD_UNROLL for (int f = 0; f < 2 * kFours; ++f) sum[p][f] = vdupq_n_s32(0);
  }
}

// Row `r` of tiles: 4 outputs.
template <int P>
REDWOOD_INLINE int32x4_t row_of(const Tiles<P>& sum, int r, int f) {
  const int32x4_t a = sum[r / 2][2 * f], b = sum[r / 2][2 * f + 1];
  return r % 2 ? vuzp2q_s32(a, b) : vuzp1q_s32(a, b);
}

template <int P>
REDWOOD_INLINE void clear_rows(FloatRows<P>& y) {
  REDWOOD_UNROLL for (int r = 0; r < 2 * P; ++r) {
    REDWOOD_UNROLL for (int f = 0; f < kFours; ++f) y[r][f] = vdupq_n_f32(0.0f);
  }
}

template <int P>
REDWOOD_INLINE void store_rows(const Matmul& m, int row, int64_t output, const FloatRows<P>& y) {
  REDWOOD_UNROLL for (int r = 0; r < 2 * P; ++r) {
    REDWOOD_UNROLL for (int f = 0; f < kFours; ++f) {
      float* out = m.out + (row + r) * m.out_stride + output + 4 * f;
      vst1q_f32(out, m.add ? vaddq_f32(vld1q_f32(out), y[r][f]) : y[r][f]);
    }
  }
}

template <Format FORMAT, int P>
void group_pairs(const Matmul& m, const uint8_t* w, int row, int64_t block, int part) {
  constexpr int bits = bits_of(FORMAT), quants = group_bytes(bits), unit = info(FORMAT).unit_bytes;
  constexpr bool minimum = has_minimum(FORMAT);
  constexpr int offset = is_table(FORMAT) ? 128 : 1 << (bits - 1);  // where there is no minimum
  const auto numbers = Isa::table(FORMAT == Format::kA4N ? kNonlinear : kFp4);
  const auto* table = is_table(FORMAT) ? &numbers : nullptr;
  const int64_t groups = m.cols / kGroup, stride = m.x.stride;
  const int8_t* x = m.x.quants + row * stride;
  FloatRows<P> y;
  clear_rows<P>(y);
  for (int64_t g = 0; g < groups; ++g, w += unit, x += kGroup) {
    Tiles<P> sum;
    clear_tiles<P>(sum);
    const uint8_t* from = w + 4 * kPart * part;
    add_inputs<bits, 0, P>(from, x, stride, sum, table);
    add_inputs<bits, 1, P>(from, x, stride, sum, table);
    add_inputs<bits, 2, P>(from, x, stride, sum, table);
    add_inputs<bits, 3, P>(from, x, stride, sum, table);
    REDWOOD_UNROLL for (int f = 0; f < kFours; ++f) {
      const uint8_t* scales = w + quants + 2 * (kPart * part + 4 * f);
      const float32x4_t scale = FORMAT == Format::kA4X ? Isa::bf16(scales) : Isa::half(scales);
      REDWOOD_UNROLL for (int r = 0; r < 2 * P; ++r) {
        const int64_t at = (row + r) * groups + g;
        int32x4_t total = row_of<P>(sum, r, f);
        if constexpr (!minimum) total = vaddq_s32(total, vdupq_n_s32(-offset * m.x.sums[at]));
        const float32x4_t by = vmulq_f32(scale, vdupq_n_f32(m.x.scales[at]));
        y[r][f] = vfmaq_f32(y[r][f], vcvtq_f32_s32(total), by);
        if constexpr (minimum) {
          const float32x4_t least = Isa::half(scales + kHalf);
          y[r][f] = vfmaq_f32(y[r][f], least, vdupq_n_f32(m.x.offsets[at]));
        }
      }
    }
  }
  store_rows<P>(m, row, block * kLanes + kPart * part, y);
}

// Adds sums times the factors of the outputs.
template <int P>
REDWOOD_INLINE void scale_tiles(const Tiles<P>& sum, const int8_t* factors, IntRows<P>& total) {
  REDWOOD_UNROLL for (int f = 0; f < kFours; ++f) {
    const int32x4_t by = Isa::factor(factors + 4 * f);
    REDWOOD_UNROLL for (int r = 0; r < 2 * P; ++r) {
      total[r][f] = vmlaq_s32(total[r][f], row_of<P>(sum, r, f), by);
    }
  }
}

template <Format FORMAT, int P>
void super_pairs(const Matmul& m, const uint8_t* w, int row, int64_t block, int part) {
  constexpr int bits = bits_of(FORMAT), quants = group_bytes(bits);
  constexpr int scale_bytes = scale_bytes_of(FORMAT);
  constexpr bool minimum = has_minimum(FORMAT), halves = has_halves(FORMAT);
  constexpr int pairs = halves ? 8 : 4, per_group = halves ? 2 : 1;
  const int64_t supers = m.cols / kSuper, stride = m.x.stride;
  const int16_t* sums = halves ? m.x.sums16 : m.x.sums32;
  const int8_t* x = m.x.quants + row * stride;
  FloatRows<P> y;
  clear_rows<P>(y);
  alignas(64) int8_t unpacked[2][per_group * 8 * kLanes];
  // The same in all units of a matrix.
  const uint8_t* common = w + 8 * quants + scale_bytes + kHalf;
  const auto numbers = Isa::table(is_table(FORMAT) ? common : kFp4);
  const auto* table = is_table(FORMAT) ? &numbers : nullptr;
  float step = 1.0f;
  if constexpr (is_table(FORMAT)) std::memcpy(&step, common + kTable, sizeof step);
  for (int64_t b = 0; b < supers; ++b, w += info(FORMAT).unit_bytes) {
    const uint8_t* packed = w + 8 * quants;
    const int8_t *factors = reinterpret_cast<const int8_t*>(packed), *minima = factors;
    if constexpr (minimum) {
      unpack_factors<FORMAT>(packed, unpacked[0], unpacked[1]);
      factors = unpacked[0];
      minima = unpacked[1];
    }
    factors += kPart * part;
    minima += kPart * part;
    IntRows<P> total;
    REDWOOD_UNROLL for (int r = 0; r < 2 * P; ++r) {
      REDWOOD_UNROLL for (int f = 0; f < kFours; ++f) total[r][f] = vdupq_n_s32(0);
    }
    for (int g = 0; g < 8; ++g, x += kGroup, factors += per_group * kLanes) {
      const uint8_t* from = w + g * quants + 4 * kPart * part;
      Tiles<P> sum;
      clear_tiles<P>(sum);
      add_inputs<bits, 0, P>(from, x, stride, sum, table);
      add_inputs<bits, 1, P>(from, x, stride, sum, table);
      if constexpr (halves) {
        scale_tiles<P>(sum, factors, total);
        clear_tiles<P>(sum);
      }
      add_inputs<bits, 2, P>(from, x, stride, sum, table);
      add_inputs<bits, 3, P>(from, x, stride, sum, table);
      scale_tiles<P>(sum, factors + (halves ? kLanes : 0), total);
    }
    REDWOOD_UNROLL for (int f = 0; f < kFours; ++f) {
      const uint8_t* scales = packed + scale_bytes + 2 * (kPart * part + 4 * f);
      const float32x4_t d = Isa::half(scales);
      float32x4_t dmin = d;
      if constexpr (minimum) dmin = Isa::half(scales + kHalf);
      int32x4_t least[2 * P];
      REDWOOD_UNROLL for (int r = 0; r < 2 * P; ++r) least[r] = vdupq_n_s32(0);
      REDWOOD_UNROLL for (int p = 0; p < pairs; ++p) {
        const int8_t* of = minima + 2 * p * kLanes + 4 * f;
        const int32x4_t two = Isa::pairs(of, of + kLanes);
        REDWOOD_UNROLL for (int r = 0; r < 2 * P; ++r) {
          const int16_t* s = sums + ((row + r) * supers + b) * 2 * pairs + 2 * p;
          const int32x4_t pair = Isa::quad(reinterpret_cast<const int8_t*>(s));
          least[r] = Isa::mac16(least[r], two, pair);
        }
      }
      REDWOOD_UNROLL for (int r = 0; r < 2 * P; ++r) {
        const int64_t at = (row + r) * supers + b;
        const float scale = m.x.scales[at];
        if constexpr (is_table(FORMAT)) {
          const float32x4_t sum = vcvtq_f32_s32(Isa::less128(total[r][f], least[r]));
          y[r][f] = vfmaq_f32(y[r][f], sum, vmulq_f32(d, vdupq_n_f32(step * scale)));
          continue;
        }
        const float32x4_t by = vmulq_f32(d, vdupq_n_f32(scale));
        const float32x4_t off = vmulq_f32(dmin, vdupq_n_f32(minimum ? -scale : -32.0f * scale));
        y[r][f] = vfmaq_f32(y[r][f], vcvtq_f32_s32(total[r][f]), by);
        y[r][f] = vfmaq_f32(y[r][f], vcvtq_f32_s32(least[r]), off);
      }
    }
  }
  store_rows<P>(m, row, block * kLanes + kPart * part, y);
}

template <Format FORMAT, int P>
void some_pairs(const Matmul& m, const uint8_t* w, int row, int64_t block) {
  for (int part = 0; part < kParts; ++part) {
    if constexpr (is_group(FORMAT)) {
      group_pairs<FORMAT, P>(m, w, row, block, part);
    } else {
      super_pairs<FORMAT, P>(m, w, row, block, part);
    }
  }
}

// The product of one row alone.
inline Matmul one_row(const Matmul& m, int row, int unit) {
  const auto from = [](auto* p, int64_t count) { return p ? p + count : nullptr; };
  const int64_t stride = m.x.stride, at = row * stride;
  Matmul one = m;
  one.n = 1;
  one.ahead_bytes = 0;
  one.x = {stride, nullptr, m.x.quants + at, m.x.scales + at / unit,
           from(m.x.offsets, at / kGroup), from(m.x.sums, at / kGroup),
           from(m.x.sums16, at / 16), from(m.x.sums32, at / kGroup)};
  one.out += row * m.out_stride;
  return one;
}

template <Format FORMAT>
void matmul_pairs(const Matmul& m, int64_t first, int64_t last) {
  if (m.n == 1) return matmul<FORMAT>(m, first, last);
  for (int64_t block = first; block < last; ++block) {
    const uint8_t* w = m.weights + block * m.block_bytes;
    int row = 0;
    for (; row + 4 <= m.n; row += 4) some_pairs<FORMAT, 2>(m, w, row, block);
    if (row + 2 <= m.n) {
      some_pairs<FORMAT, 1>(m, w, row, block);
      row += 2;
    }
    if (row < m.n) matmul<FORMAT>(one_row(m, row, info(FORMAT).step), block, block + 1);
  }
}

}  // namespace
