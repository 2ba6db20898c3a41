// Formats with a scale (and a minimum) per group of 32, by tiles.
//
// Half of a tile's depth is one group, and its sums are scaled in floats: 16 rows take about 16
// cycles to multiply, 16 to store and 24 (with a minimum 32) to scale. These take turns of a few
// groups each: while tiles are in use, a processor multiplies vectors at half its speed, and what a
// tile has just stored cannot be read at once.
#pragma once
#include "tiles_common.h"

namespace {

constexpr int kTurn = 8;  // tiles of a turn

template <Format FORMAT>
struct GroupTiles {
  static constexpr int bits = bits_of(FORMAT);
  static constexpr bool minimum = has_minimum(FORMAT), table = is_table(FORMAT);
  static constexpr int quants = group_bytes(bits), unit = info(FORMAT).unit_bytes;
  static constexpr int offset = table ? 128 : 1 << (bits - 1);  // where there is no minimum
  static constexpr int depth = kGroup;
  static constexpr int most_rows = 64;  // of a pass: every group goes over all their sums

  struct Scratch {
    alignas(64) uint8_t bytes[kTurn][kBytes];
    alignas(64) float scale[kTurn][kLanes], least[kTurn][kLanes];
    alignas(64) int32_t sums[std::max(kTurn, kPassTiles)][kSums];  // [groups][tiles]
    alignas(64) float y[kPassRows * kLanes];
  };

  // Group `at` of a turn: bytes, signed ones where the format has no minimum.
  static REDWOOD_INLINE void spread(const uint8_t* w, int at, Scratch& s) {
    [[maybe_unused]] const auto numbers = Isa::table(FORMAT == Format::kA4N ? kNonlinear : kFp4);
    each_quad<bits>(w, [&](int quad, int h, typename Isa::Q q) {
      if constexpr (table) q = Isa::lookup(numbers, q);
      if constexpr (!minimum) q = Isa::template less8<offset>(q);
      Isa::store(s.bytes[at] + 64 * quad + h * Isa::W * 4, q);
    });
    REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
      const int lane = h * Isa::W;
      const uint8_t* scale = w + quants + 2 * lane;
      Isa::storef(s.scale[at] + lane, FORMAT == Format::kA4X ? Isa::bf16(scale) : Isa::half(scale));
      if constexpr (minimum) {
        Isa::storef(s.least[at] + lane, Isa::half(w + quants + kHalf + 2 * lane));
      }
    }
  }

  template <int SUMS>
  static REDWOOD_INLINE void multiply(const int8_t* x, const uint8_t* w, int32_t* to) {
    constexpr int a = 4 + SUMS % 2, b = 6 + SUMS % 2;
    Tiles::zero<SUMS>();
    Tiles::load<a>(x, depth);
    Tiles::load<b>(w, 4 * kLanes);
    if constexpr (minimum) {
      Tiles::multiply_unsigned<SUMS, a, b>();
    } else {
      Tiles::multiply_signed<SUMS, a, b>();
    }
    Tiles::store<SUMS>(to, 4 * kLanes);
  }

  // R rows, from `row` of the activations on, and `count` groups from `group` on.
  template <int R>
  static REDWOOD_INLINE void scale(const Activations& x, int64_t row, int64_t groups, int64_t group,
                                   int count, const int32_t* sums, int step, const Scratch& s,
                                   float* y) {
    typename Isa::F total[R][kHalves];
    REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
      REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
        total[r][h] = Isa::loadf(y + r * kLanes + h * Isa::W);
      }
    }
    const float* scales = x.scales + row * groups + group;
    const float* offsets = x.offsets + row * groups + group;
    for (int g = 0; g < count; ++g, sums += step) {
      REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
        const int lane = h * Isa::W;
        const auto scale = Isa::loadf(s.scale[g] + lane);
        REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
          const auto sum = Isa::load(reinterpret_cast<const uint8_t*>(sums + r * kLanes + lane));
          const auto by = Isa::mulf(scale, Isa::setf(scales[r * groups + g]));
          total[r][h] = Isa::fmaf(Isa::to_float(sum), by, total[r][h]);
        }
        if constexpr (minimum) {
          const auto least = Isa::loadf(s.least[g] + lane);
          REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
            total[r][h] = Isa::fmaf(least, Isa::setf(offsets[r * groups + g]), total[r][h]);
          }
        }
      }
    }
    REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
      REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
        Isa::storef(y + r * kLanes + h * Isa::W, total[r][h]);
      }
    }
  }

  static void block(const Matmul& m, const uint8_t* w, Fetcher& fetch, int first,
                    const RowTiles& tiles, const int8_t* x, int64_t at) {
    Scratch s;
    std::fill(s.y, s.y + tiles.rows * kLanes, 0.0f);
    const int64_t groups = m.cols / kGroup;
    const int of_x = tiles.size * depth, step = tiles.count * kSums;
    const int most = std::max(1, kTurn / tiles.count);
    for (int64_t group = 0; group < groups; group += most) {
      const int count = static_cast<int>(std::min<int64_t>(most, groups - group));
      for (int g = 0; g < count; ++g, w += unit) {
        fetch();
        spread(w, g, s);
      }
      for (int g = 0, i = 0; g < count; ++g) {
        for (int t = 0; t < tiles.count; ++t, ++i, x += of_x) {
          switch (i % 4) {
            case 0: multiply<0>(x, s.bytes[g], s.sums[i]); break;
            case 1: multiply<1>(x, s.bytes[g], s.sums[i]); break;
            case 2: multiply<2>(x, s.bytes[g], s.sums[i]); break;
            default: multiply<3>(x, s.bytes[g], s.sums[i]);
          }
        }
      }
      for (int t = 0; t < tiles.count; ++t) {
        const int row = tiles.first(t);
        int r = 0;
        for (; r + 4 <= tiles.of(t); r += 4) {
          scale<4>(m.x, first + row + r, groups, group, count, s.sums[t] + r * kLanes, step, s,
                   s.y + (row + r) * kLanes);
        }
        for (; r < tiles.of(t); ++r) {
          scale<1>(m.x, first + row + r, groups, group, count, s.sums[t] + r * kLanes, step, s,
                   s.y + (row + r) * kLanes);
        }
      }
    }
    finish_block(m, first, tiles.rows, at, s.y);
  }
};

}  // namespace
