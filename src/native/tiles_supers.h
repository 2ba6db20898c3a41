// Formats with scales inside a super-block of 256, by tiles.
//
// The integer factor of each group is multiplied into its weights once for all rows, as two bytes;
// then tiles sum a whole super-block with nothing in between, and the sum is the same integer.
#pragma once
#include "tiles_common.h"

namespace {

template <Format FORMAT>
struct SuperTiles {
  using Q = typename Isa::Q;
  using F = typename Isa::F;
  static constexpr int bits = bits_of(FORMAT), quants = group_bytes(bits);
  static constexpr int scale_bytes = scale_bytes_of(FORMAT), unit = info(FORMAT).unit_bytes;
  static constexpr bool minimum = has_minimum(FORMAT), halves = has_halves(FORMAT);
  static constexpr bool table = is_table(FORMAT);
  static constexpr int pairs = halves ? 8 : 4, parts = 2 * pairs;
  // Weight times factor is low + high << shift. 2 bits by 4 make a byte, and so do 5 bits by either half
  // of 6; by 8 signed ones they are two bytes, the upper one signed.
  static constexpr bool two = FORMAT != Format::kK2, is_signed = !minimum;
  static constexpr int shift = is_signed ? 8 : 3;
  static constexpr int depth = 64;
  static constexpr int most_rows = kPassRows;
  static constexpr int steps = kSuper / depth;

  // Of one super-block.
  struct Factors {
    alignas(64) int8_t of_groups[parts * kLanes], minima[parts * kLanes];
    Q least[pairs][kHalves];
    F d[kHalves], dmin[kHalves];
  };
  // Of a whole matrix.
  struct Table {
    Q numbers;
    float step;
  };
  struct Scratch {
    alignas(64) uint8_t low[steps][depth * kLanes], high[steps][depth * kLanes];
    alignas(64) int32_t sums[4][kSums];
    alignas(64) float y[kPassRows * kLanes];
    Factors factors[2];  // of this super-block and the next
  };

  static REDWOOD_INLINE void read_factors(const uint8_t* w, Factors& f) {
    const uint8_t* at = w + 8 * quants;
    const int8_t* minima = f.of_groups;
    if constexpr (!minimum) {
      std::memcpy(f.of_groups, at, sizeof f.of_groups);
    } else {
      unpack_factors<FORMAT>(at, f.of_groups, f.minima);
      minima = f.minima;
    }
    at += scale_bytes;
    REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
      const int lane = h * Isa::W;
      REDWOOD_UNROLL for (int p = 0; p < pairs; ++p) {
        const int8_t* pair = minima + 2 * p * kLanes + lane;
        f.least[p][h] = Isa::pairs(pair, pair + kLanes);
      }
      f.d[h] = f.dmin[h] = Isa::half(at + 2 * lane);
      if constexpr (minimum) f.dmin[h] = Isa::half(at + kHalf + 2 * lane);
    }
  }

  // Two groups of a super-block, times their factors.
  static REDWOOD_INLINE void spread(const uint8_t* w, int step, const Factors& f, const Table& of,
                                    Fetcher& fetch, Scratch& s) {
    for (int g = 2 * step; g < 2 * step + 2; ++g) {
      fetch();
      const int8_t* factors = f.of_groups + g * kLanes * (halves ? 2 : 1);
      const int to = g % 2 * kBytes;
      // Of either half of the inputs, or either half of the factor's bits.
      Q by[kHalves][2];
      REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
        const int8_t* at = factors + h * Isa::W;
        const Q whole = by[h][0] = by[h][1] = Isa::pairs(at, at);
        if constexpr (halves) {
          by[h][1] = Isa::pairs(at + kLanes, at + kLanes);
        } else if constexpr (!is_signed) {
          by[h][0] = Isa::template bits<0, 7>(whole);
          by[h][1] = Isa::template bits<3, 7>(whole);
        }
      }
      each_quad<bits>(w + g * quants, [&](int quad, int h, Q q) {
        const int line = to + 64 * quad + h * Isa::W * 4;
        if constexpr (table) q = Isa::lookup(of.numbers, q);
        if constexpr (!two) {
          Isa::store(s.low[step] + line, Isa::mul16(q, by[h][quad / 4]));
        } else {
          Q low, high;
          if constexpr (is_signed) {
            Isa::two_bytes(q, by[h][quad / 4], low, high);
          } else {
            low = Isa::mul16(q, by[h][0]);
            high = Isa::mul16(q, by[h][1]);
          }
          Isa::store(s.low[step] + line, low);
          Isa::store(s.high[step] + line, high);
        }
      });
    }
  }

  template <int SUMS, int A>
  static REDWOOD_INLINE void multiply_high() {
    if constexpr (is_signed) {
      Tiles::multiply_signed<SUMS, A, 7>();
    } else {
      Tiles::multiply_unsigned<SUMS, A, 7>();
    }
  }
  // Tiles of rows `x` and, if there is one, `x2`.
  static REDWOOD_INLINE void multiply(const int8_t* x, const int8_t* x2, int step,
                                      const Scratch& s) {
    Tiles::load<4>(x, depth);
    Tiles::load<6>(s.low[step], 4 * kLanes);
    Tiles::multiply_unsigned<0, 4, 6>();
    if constexpr (two) {
      Tiles::load<7>(s.high[step], 4 * kLanes);
      multiply_high<1, 4>();
    }
    if (x2) {
      Tiles::load<5>(x2, depth);
      Tiles::multiply_unsigned<2, 5, 6>();
      if constexpr (two) multiply_high<3, 5>();
    }
  }

  // R rows, from `row` of the activations on.
  template <int R>
  static REDWOOD_INLINE void scale(const Activations& x, int64_t row, int64_t supers, int64_t super,
                                   const int32_t* sums, const Factors& f, float step, float* y) {
    const int16_t* of_x = (halves ? x.sums16 : x.sums32) + (row * supers + super) * parts;
    REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
      Q least[R];
      REDWOOD_UNROLL for (int r = 0; r < R; ++r) least[r] = Isa::zero();
      REDWOOD_UNROLL for (int p = 0; p < pairs; ++p) {
        REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
          const int16_t* pair = of_x + r * supers * parts + 2 * p;
          least[r] = Isa::mac16(least[r], f.least[p][h],
                                Isa::quad(reinterpret_cast<const int8_t*>(pair)));
        }
      }
      REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
        const auto* at = reinterpret_cast<const uint8_t*>(sums + r * kLanes + h * Isa::W);
        Q total = Isa::load(at);
        if constexpr (two) {
          total = Isa::add32(total, Isa::template up<shift>(Isa::load(at + 4 * kSums)));
        }
        const float scale = x.scales[(row + r) * supers + super];
        float* out = y + r * kLanes + h * Isa::W;
        if constexpr (table) {
          const F sum = Isa::to_float(Isa::less128(total, least[r]));
          const F by = Isa::mulf(f.d[h], Isa::setf(step * scale));
          Isa::storef(out, Isa::fmaf(sum, by, Isa::loadf(out)));
        } else {
          const F by = Isa::mulf(f.d[h], Isa::setf(scale));
          const F off = Isa::mulf(f.dmin[h], Isa::setf(minimum ? -scale : -32.0f * scale));
          const F sum = Isa::fmaf(Isa::to_float(total), by, Isa::loadf(out));
          Isa::storef(out, Isa::fmaf(Isa::to_float(least[r]), off, sum));
        }
      }
    }
  }

  static void block(const Matmul& m, const uint8_t* w, Fetcher& fetch, int first,
                    const RowTiles& tiles, const int8_t* x, int64_t at) {
    Scratch s;
    std::fill(s.y, s.y + tiles.rows * kLanes, 0.0f);
    const int64_t supers = m.cols / kSuper;
    const int of_x = tiles.size * depth;
    Table of{Isa::zero(), 1.0f};
    if constexpr (table) {
      const uint8_t* common = w + 8 * quants + scale_bytes + kHalf;
      of.numbers = Isa::table(common);
      std::memcpy(&of.step, common + kTable, sizeof of.step);
    }
    read_factors(w, s.factors[0]);
    for (int k = 0; k < steps; ++k) spread(w, k, s.factors[0], of, fetch, s);
    for (int64_t super = 0; super < supers; ++super) {
      w += unit;
      const Factors& f = s.factors[super % 2];
      Factors& next = s.factors[(super + 1) % 2];
      for (int t = 0; t < tiles.count; t += 2) {
        const bool second = t + 1 < tiles.count;
        const bool ahead = t + 2 >= tiles.count && super + 1 < supers;
        if (ahead) read_factors(w, next);
        Tiles::zero<0>();
        Tiles::zero<1>();
        Tiles::zero<2>();
        Tiles::zero<3>();
        for (int k = 0; k < steps; ++k) {
          const int8_t* px = x + ((super * steps + k) * tiles.count + t) * of_x;
          multiply(px, second ? px + of_x : nullptr, k, s);
          if (ahead) spread(w, k, next, of, fetch, s);  // over what is not needed any more
        }
        Tiles::store<0>(s.sums[0], 4 * kLanes);
        if constexpr (two) Tiles::store<1>(s.sums[1], 4 * kLanes);
        if (second) {
          Tiles::store<2>(s.sums[2], 4 * kLanes);
          if constexpr (two) Tiles::store<3>(s.sums[3], 4 * kLanes);
        }
        scale(m, first, tiles, super, t, s.sums[0], f, of.step, s.y);
        if (second) scale(m, first, tiles, super, t + 1, s.sums[2], f, of.step, s.y);
      }
    }
    finish_block(m, first, tiles.rows, at, s.y);
  }

 private:
  static void scale(const Matmul& m, int first, const RowTiles& tiles, int64_t super, int tile,
                    const int32_t* sums, const Factors& f, float step, float* y) {
    const int64_t row = first + tiles.first(tile), supers = m.cols / kSuper;
    y += tiles.first(tile) * kLanes;
    int r = 0;
    for (; r + 4 <= tiles.of(tile); r += 4) {
      scale<4>(m.x, row + r, supers, super, sums + r * kLanes, f, step, y + r * kLanes);
    }
    for (; r < tiles.of(tile); ++r) {
      scale<1>(m.x, row + r, supers, super, sums + r * kLanes, f, step, y + r * kLanes);
    }
  }
};

}  // namespace
