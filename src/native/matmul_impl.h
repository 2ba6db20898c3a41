// Products of packed weights with a few rows of activations; included once per instruction set.
//
// A block of 16 outputs meets up to Isa::ROWS rows at a time: its weights are unpacked once for these
// rows. Sums inside a group (or super-block) are integers, so only the order of the groups matters,
// and that is always the same.
#pragma once
#include "sums_impl.h"

namespace {
using namespace redwood;

template <int R, int B>
REDWOOD_INLINE void store_block(const Matmul& m, int row, int64_t block, const Totals<R, B>& y) {
  REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
    REDWOOD_UNROLL for (int h = 0; h < B * kHalves; ++h) {
      float* out = m.out + (row + r) * m.out_stride + block * kLanes + h * Isa::W;
      Isa::storef(out, m.add ? Isa::addf(Isa::loadf(out), y[r][h]) : y[r][h]);
    }
  }
}

template <int R, int B>
REDWOOD_INLINE void clear(Totals<R, B>& y) {
  REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
    REDWOOD_UNROLL for (int h = 0; h < B * kHalves; ++h) y[r][h] = Isa::zerof();
  }
}

// Formats with a scale (and a minimum) per group of 32.
template <Format FORMAT, int R, int B>
void group_rows(const Matmul& m, const uint8_t* w, Fetcher& fetch, int row, int64_t block) {
  constexpr int bits = bits_of(FORMAT);
  constexpr bool minimum = has_minimum(FORMAT);
  constexpr int offset = minimum ? 0 : is_table(FORMAT) ? 128 : 1 << (bits - 1);
  constexpr int quants = group_bytes(bits);
  constexpr int unit = quants + kHalf * (minimum ? 2 : 1);
  constexpr int parts = B * kHalves;
  const int64_t groups = m.cols / kGroup;
  const int8_t* x = m.x.quants + row * m.x.stride;
  const int32_t* sums = m.x.sums + row * groups;
  const float *scales = m.x.scales + row * groups, *offsets = m.x.offsets + row * groups;
  Totals<R, B> y;
  clear<R, B>(y);
  for (int64_t g = 0; g < groups; ++g, w += unit, x += kGroup) {
    fetch();
    Sums<R, B> total;
    REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
      const auto first = minimum ? Isa::zero() : Isa::set32(-offset * sums[r * groups + g]);
      REDWOOD_UNROLL for (int h = 0; h < parts; ++h) total[r][h] = first;
    }
    if constexpr (is_table(FORMAT)) {
      const Table table(FORMAT == Format::kA4N ? kNonlinear : kFp4);
      table_sum<bits, R, B>(w, m.block_bytes, x, m.x.stride, table, nullptr, 0, total);
    } else if constexpr (bits == 8) {
      group_sum8<R, B>(w, m.block_bytes, x, m.x.stride, total);
    } else {
      group_sum<bits, R, B>(w, m.block_bytes, x, m.x.stride, nullptr, 0, total);
    }
    REDWOOD_UNROLL for (int h = 0; h < parts; ++h) {
      const uint8_t* at = part(w, m.block_bytes, h, 2) + quants;
      const auto scale = FORMAT == Format::kA4X ? Isa::bf16(at) : Isa::half(at);
      REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
        const auto by = Isa::mulf(scale, Isa::setf(scales[r * groups + g]));
        y[r][h] = Isa::fmaf(Isa::to_float(total[r][h]), by, y[r][h]);
      }
      if constexpr (minimum) {
        const auto least = Isa::half(part(w, m.block_bytes, h, 2) + quants + kHalf);
        REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
          y[r][h] = Isa::fmaf(least, Isa::setf(offsets[r * groups + g]), y[r][h]);
        }
      }
    }
  }
  store_block<R, B>(m, row, block, y);
}

// 4-bit scales and minima of a super-block of K2, to bytes [16 groups of 16][16 outputs].
REDWOOD_INLINE void unpack_nibbles(const uint8_t* packed, int8_t* scales, int8_t* minima) {
  for (int i = 0; i < 16 * kLanes; ++i) {
    scales[i] = static_cast<int8_t>(packed[i] & 15);
    minima[i] = static_cast<int8_t>(packed[i] >> 4);
  }
}

// 6-bit scales and minima of a super-block of K4 or K5, to bytes [8 groups][16 outputs]; 32 of them
// at once.
REDWOOD_INLINE void unpack_scales(const uint8_t* packed, int8_t* scales, int8_t* minima) {
  typedef uint64_t Wide __attribute__((vector_size(32)));
  constexpr uint64_t each = 0x0101010101010101u;
  for (int half = 0; half < 2; ++half) {  // groups 0 to 3, then 4 to 7
    for (int i = 0; i < 2; ++i) {
      Wide low, high;
      std::memcpy(&low, packed + 64 * half + 32 * i, 32);
      std::memcpy(&high, packed + 8 * kLanes + 32 * i, 32);
      high = high >> (4 * half);
      const Wide s = (low & (15 * each)) | ((high & (3 * each)) << 4);
      const Wide m = ((low >> 4) & (15 * each)) | ((high & (12 * each)) << 2);
      std::memcpy(scales + 64 * half + 32 * i, &s, 32);
      std::memcpy(minima + 64 * half + 32 * i, &m, 32);
    }
  }
}

// Scales and minima of a super-block whose format has both, to bytes [groups][16 outputs].
template <Format FORMAT>
REDWOOD_INLINE void unpack_factors(const uint8_t* packed, int8_t* scales, int8_t* minima) {
  if constexpr (has_halves(FORMAT)) {
    unpack_nibbles(packed, scales, minima);
  } else {
    unpack_scales(packed, scales, minima);
  }
}

// Formats with scales inside a super-block of 256: integers up to there, one float sum beyond.
template <Format FORMAT, int R, int B>
void super_rows(const Matmul& m, const uint8_t* w, Fetcher& fetch, int row, int64_t block) {
  using Q = typename Isa::Q;
  constexpr int bits = bits_of(FORMAT), quants = group_bytes(bits);
  constexpr int scale_bytes = scale_bytes_of(FORMAT);
  constexpr bool minimum = has_minimum(FORMAT), halves = has_halves(FORMAT);
  constexpr int pairs = halves ? 8 : 4;
  constexpr int per_group = halves ? 2 : 1;
  constexpr int parts = B * kHalves;
  const int64_t supers = m.cols / kSuper;
  const int16_t* sums = (halves ? m.x.sums16 : m.x.sums32) + row * supers * 2 * pairs;
  const float* x_scales = m.x.scales + row * supers;
  const int8_t* x = m.x.quants + row * m.x.stride;
  Totals<R, B> y;
  clear<R, B>(y);
  alignas(64) int8_t unpacked[B][2][per_group * 8 * kLanes];
  // The same in all units of a matrix.
  const uint8_t* common = w + 8 * quants + scale_bytes + kHalf;
  const Table table(is_table(FORMAT) ? common : kFp4);
  float step = 1.0f;
  if constexpr (is_table(FORMAT)) std::memcpy(&step, common + kTable, sizeof step);
  for (int64_t b = 0; b < supers; ++b, x += kSuper) {
    const auto* packed = reinterpret_cast<const int8_t*>(w + 8 * quants);
    // What multiplies the groups, and what multiplies the sums of the activations alone; those of the
    // next block are `next` bytes on.
    const int8_t *factors = packed, *minima = packed;
    int64_t next = m.block_bytes;
    if constexpr (minimum) {
      for (int i = 0; i < B; ++i) {
        const uint8_t* from = w + i * m.block_bytes + 8 * quants;
        unpack_factors<FORMAT>(from, unpacked[i][0], unpacked[i][1]);
      }
      factors = unpacked[0][0];
      minima = unpacked[0][1];
      next = sizeof unpacked[0];
    }
    Sums<R, B> total, least;
    clear<R, B>(total);
    for (int g = 0; g < 8; ++g, w += quants) {
      fetch();
      const int8_t* of_group = factors + g * per_group * kLanes;
      if constexpr (is_table(FORMAT)) {
        table_sum<bits, R, B>(w, m.block_bytes, x + g * kGroup, m.x.stride, table, of_group, next,
                              total);
      } else {
        group_sum<bits, R, B>(w, m.block_bytes, x + g * kGroup, m.x.stride, of_group, next, total);
      }
    }
    clear<R, B>(least);
    REDWOOD_UNROLL for (int p = 0; p < pairs; ++p) {
      REDWOOD_UNROLL for (int h = 0; h < parts; ++h) {
        const int8_t* at = part(minima, next, h, 1) + 2 * p * kLanes;
        const Q by = Isa::pairs(at, at + kLanes);
        REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
          const int16_t* s = sums + (r * supers + b) * 2 * pairs + 2 * p;
          const Q pair = Isa::quad(reinterpret_cast<const int8_t*>(s));
          least[r][h] = Isa::mac16(least[r][h], by, pair);
        }
      }
    }
    w += scale_bytes;
    REDWOOD_UNROLL for (int h = 0; h < parts; ++h) {
      const uint8_t* at = part(w, m.block_bytes, h, 2);
      const auto d = Isa::half(at);
      auto dmin = d;
      if constexpr (minimum) dmin = Isa::half(at + kHalf);
      REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
        const float scale = x_scales[r * supers + b];
        if constexpr (is_table(FORMAT)) {
          const auto sum = Isa::to_float(Isa::less128(total[r][h], least[r][h]));
          y[r][h] = Isa::fmaf(sum, Isa::mulf(d, Isa::setf(step * scale)), y[r][h]);
          continue;
        }
        const auto by = Isa::mulf(d, Isa::setf(scale));
        const auto off = Isa::mulf(dmin, Isa::setf(minimum ? -scale : -32.0f * scale));
        y[r][h] = Isa::fmaf(Isa::to_float(total[r][h]), by, y[r][h]);
        y[r][h] = Isa::fmaf(Isa::to_float(least[r][h]), off, y[r][h]);
      }
    }
    w += is_table(FORMAT) ? kHalf + kTableBytes : kHalf * (minimum ? 2 : 1);
  }
  store_block<R, B>(m, row, block, y);
}

template <Format FORMAT, int R>
void float_rows(const Matmul& m, const uint8_t* w, Fetcher& fetch, int row, int64_t block) {
  V8 y[R][2];
  REDWOOD_UNROLL for (int r = 0; r < R; ++r) y[r][0] = y[r][1] = set1(0.0f);
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
    REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
      const V8 v = set1(x[r * m.x.stride + k]);
      y[r][0] = fma(a, v, y[r][0]);
      y[r][1] = fma(b, v, y[r][1]);
    }
  }
  REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
    float* out = m.out + (row + r) * m.out_stride + block * kLanes;
    store(out, m.add ? add(load(out), y[r][0]) : y[r][0]);
    store(out + 8, m.add ? add(load(out + 8), y[r][1]) : y[r][1]);
  }
}

template <Format FORMAT, int R, int B>
void some_rows(const Matmul& m, const uint8_t* w, Fetcher& fetch, int row, int64_t block) {
  if constexpr (is_group(FORMAT)) {
    group_rows<FORMAT, R, B>(m, w, fetch, row, block);
  } else if constexpr (is_super(FORMAT)) {
    super_rows<FORMAT, R, B>(m, w, fetch, row, block);
  } else {
    float_rows<FORMAT, R>(m, w, fetch, row, block);
  }
}

template <Format FORMAT, int R, int B>
void up_to_rows(int count, const Matmul& m, const uint8_t* w, Fetcher& fetch, int row,
                int64_t block) {
  if constexpr (R > 1) {
    if (count < R) return up_to_rows<FORMAT, R - 1, B>(count, m, w, fetch, row, block);
  }
  some_rows<FORMAT, R, B>(m, w, fetch, row, block);
}

constexpr int64_t fetch_step(Format f) { return is_float(f) ? 16 : kGroup; }  // inputs
template <Format FORMAT>
constexpr int kMostRows = is_float(FORMAT) ? 4 : Isa::ROWS;

// All rows of B blocks from `block`.
template <Format FORMAT, int B>
void blocks(const Matmul& m, Fetcher& fetch, int passes, int64_t block) {
  const uint8_t* w = m.weights + block * m.block_bytes;
  for (int pass = 0, row = 0; pass < passes; ++pass) {
    // Passes of nearly equal size: 5 rows are 3 + 2, not 4 + 1.
    const int count = (m.n - row + passes - pass - 1) / (passes - pass);
    up_to_rows<FORMAT, kMostRows<FORMAT>, B>(count, m, w, fetch, row, block);
    row += count;
  }
}

template <Format FORMAT>
void matmul(const Matmul& m, int64_t first, int64_t last) {
  constexpr int together = is_float(FORMAT) ? 1 : Isa::BLOCKS;
  const int passes = (m.n + kMostRows<FORMAT> - 1) / kMostRows<FORMAT>;
  const int64_t turns = (last - first + together - 1) / together * passes;
  Fetcher fetch(m, (m.cols + fetch_step(FORMAT) - 1) / fetch_step(FORMAT) * turns);
  int64_t block = first;
  for (; block + together <= last; block += together) {
    blocks<FORMAT, together>(m, fetch, passes, block);
  }
  if constexpr (together > 1) {
    for (; block < last; ++block) blocks<FORMAT, 1>(m, fetch, passes, block);
  }
}

}  // namespace
