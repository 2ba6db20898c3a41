// Products of packed weights with many rows of activations by tiles; included once per kind of tiles,
// after its `Tiles` and an `Isa`.
//
// A line of packed weights (16 outputs x 4 inputs) is a row of the right-hand tile as it stands, once
// its weights are bytes. Sums are the integers that the other kernels form, and meet their scales in
// the same order, so the bits are the same.
//
// Work goes in turns: first products of some units (groups or super-blocks) with all rows, then their
// scales. While tiles are in use a processor multiplies vectors at half its speed, and what a tile
// has just stored cannot be read at once; turns of a few hundred cycles suffer from neither.
#pragma once
#include <algorithm>
#include <type_traits>

#include "matmul_impl.h"
#include "tiles.h"

namespace {

constexpr int kMostRows = 256;  // of one pass
constexpr int kSums = kTileRows * kLanes;  // of one tile
constexpr int kTurn = 32;       // tiles of sums in a turn: they stay in the first-level cache
static_assert(kTurn * kTileRows >= 2 * kMostRows, "a super-block of all rows is one turn");

// Rows of a pass as tiles of one size: the last reaches back, and what it shares is not used twice.
struct RowTiles {
  int rows, count, size;
  explicit RowTiles(int n)
      : rows(n), count((n + kTileRows - 1) / kTileRows), size((n + count - 1) / count) {}
  int first(int tile) const { return std::min(tile * size, rows - size); }  // of the tile
  int fresh(int tile) const { return tile * size - first(tile); }  // its first row that is its own
};

// Tiles 0 to 3: sums; 4 and 5: activations; 6 and 7: weights.
void configure(int rows, int depth) {
  TileConfig c;
  for (int t = 0; t < 8; ++t) {
    c.rows[t] = static_cast<uint8_t>(t < 6 ? rows : depth / 4);
    c.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? depth : 4 * kLanes);
  }
  Tiles::configure(c);
}

// Calls body(quad, half, weights as bytes) for the 8 quads of a group.
template <int BITS, class Body>
REDWOOD_INLINE void each_quad(const uint8_t* w, Body body) {
  using Q = typename Isa::Q;
  REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
    const int at = h * Isa::W * 4;
    if constexpr (BITS == 8) {
      REDWOOD_UNROLL for (int t = 0; t < 8; ++t) body(t, h, Isa::load(w + 64 * t + at));
    } else {
      const auto line = [&](auto index) {
        constexpr int j = decltype(index)::value;
        const Q v = Isa::load(w + 64 * j + at);
        Q lo = Isa::low(v), hi = Isa::high(v);
        if constexpr (BITS == 5) {
          const Q p = Isa::load(w + kNibbles + at);
          lo = Isa::either(lo, Isa::template plane<2 * j, 16>(p));
          hi = Isa::either(hi, Isa::template plane<2 * j + 1, 16>(p));
        }
        if constexpr (BITS == 6) {
          const Q p = Isa::load(w + kNibbles + 64 * (j / 2) + at);
          lo = Isa::either(lo, Isa::template plane<4 * (j % 2), 48>(p));
          hi = Isa::either(hi, Isa::template plane<4 * (j % 2) + 2, 48>(p));
        }
        body(2 * j, h, lo);
        body(2 * j + 1, h, hi);
      };
      line(std::integral_constant<int, 0>{});
      line(std::integral_constant<int, 1>{});
      line(std::integral_constant<int, 2>{});
      line(std::integral_constant<int, 3>{});
    }
  }
}

// y [rows][16]: sums of a block so far.
REDWOOD_INLINE void finish_block(const Matmul& m, int first, int rows, int64_t block, const float* y) {
  for (int r = 0; r < rows; ++r) {
    REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
      float* out = m.out + (first + r) * m.out_stride + block * kLanes + h * Isa::W;
      const auto v = Isa::loadf(y + r * kLanes + h * Isa::W);
      Isa::storef(out, m.add ? Isa::addf(Isa::loadf(out), v) : v);
    }
  }
}

template <Format FORMAT>
struct GroupTiles {
  static constexpr int bits = FORMAT == Format::kA8 ? 8 : FORMAT <= Format::kA4M ? 4 : 5;
  static constexpr bool minimum = FORMAT == Format::kA4M || FORMAT == Format::kA5M;
  static constexpr int quants = bits == 8 ? kBytes : kNibbles + (bits == 5 ? kPlane1 : 0);
  static constexpr int depth = kGroup, unit_inputs = kGroup;

  struct Scratch {
    alignas(64) uint8_t bytes[kTurn][kBytes];
    alignas(64) int32_t sums[kTurn * kSums];
    alignas(64) float y[kMostRows * kLanes];
    alignas(64) float scales[kTurn][kLanes], least[kTurn][kLanes];
  };

  // Group `at` of a turn: bytes, signed ones where the format has no minimum.
  static REDWOOD_INLINE void spread(const uint8_t* w, Scratch& s, int at) {
    each_quad<bits>(w, [&](int quad, int h, typename Isa::Q q) {
      if constexpr (!minimum) q = Isa::template less8<1 << (bits - 1)>(q);
      Isa::store(s.bytes[at] + 64 * quad + h * Isa::W * 4, q);
    });
    REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
      const int lane = h * Isa::W;
      Isa::storef(s.scales[at] + lane, Isa::half(w + quants + 2 * lane));
      if constexpr (minimum) {
        Isa::storef(s.least[at] + lane, Isa::half(w + quants + kHalf + 2 * lane));
      }
    }
  }

  template <int SLOT>
  static REDWOOD_INLINE void multiply(const int8_t* x, int64_t stride, const uint8_t* w,
                                      int32_t* sums) {
    constexpr int a = 4 + SLOT % 2, b = 6 + SLOT % 2;
    Tiles::zero<SLOT>();
    Tiles::load<a>(x, stride);
    Tiles::load<b>(w, 64);
    if constexpr (minimum) {
      Tiles::multiply_unsigned<SLOT, a, b>();
    } else {
      Tiles::multiply_signed<SLOT, a, b>();
    }
    Tiles::store<SLOT>(sums, 4 * kLanes);
  }

  // Scales of `count` groups, from `group` on, for R rows from `row` on; their sums are a tile apart.
  template <int R>
  static REDWOOD_INLINE void scale(const Activations& x, int64_t row, int64_t groups, int64_t group,
                                   int count, const int32_t* sums, const Scratch& s, float* y) {
    Totals<R> total;
    REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
      REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
        total[r][h] = Isa::loadf(y + r * kLanes + h * Isa::W);
      }
    }
    const float *scales = x.scales + row * groups + group, *offsets = x.offsets + row * groups + group;
    for (int g = 0; g < count; ++g, sums += kSums) {
      REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
        const int lane = h * Isa::W;
        const auto scale = Isa::loadf(s.scales[g] + lane);
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
                    const RowTiles& tiles, int64_t at) {
    constexpr int unit = quants + kHalf * (minimum ? 2 : 1);
    Scratch s;
    std::fill(s.y, s.y + tiles.rows * kLanes, 0.0f);
    const int64_t groups = m.cols / kGroup;
    const int most = kTurn / tiles.count;
    for (int64_t group = 0; group < groups; group += most) {
      const int count = static_cast<int>(std::min<int64_t>(most, groups - group));
      for (int g = 0; g < count; ++g, w += unit) {
        fetch();
        spread(w, s, g);
      }
      for (int t = 0; t < tiles.count; ++t) {
        const int8_t* x = m.x.quants + (first + tiles.first(t)) * m.x.stride + group * kGroup;
        int32_t* sums = s.sums + t * count * kSums;
        int g = 0;
        for (; g + 4 <= count; g += 4, x += 4 * kGroup, sums += 4 * kSums) {
          multiply<0>(x, m.x.stride, s.bytes[g], sums);
          multiply<1>(x + kGroup, m.x.stride, s.bytes[g + 1], sums + kSums);
          multiply<2>(x + 2 * kGroup, m.x.stride, s.bytes[g + 2], sums + 2 * kSums);
          multiply<3>(x + 3 * kGroup, m.x.stride, s.bytes[g + 3], sums + 3 * kSums);
        }
        for (; g < count; ++g, x += kGroup, sums += kSums) {
          multiply<0>(x, m.x.stride, s.bytes[g], sums);
        }
      }
      for (int t = 0; t < tiles.count; ++t) {
        const int32_t* sums = s.sums + t * count * kSums;
        for (int i = tiles.fresh(t); i < tiles.size;) {
          const int row = tiles.first(t) + i;
          float* y = s.y + row * kLanes;
          if (i + 4 <= tiles.size) {
            scale<4>(m.x, first + row, groups, group, count, sums + i * kLanes, s, y);
            i += 4;
          } else {
            scale<1>(m.x, first + row, groups, group, count, sums + i * kLanes, s, y);
            i += 1;
          }
        }
      }
    }
    finish_block(m, first, tiles.rows, at, s.y);
  }
};

// The integer factor of a group is multiplied into its weights once for all rows, as two bytes; then
// tiles sum a whole super-block with nothing in between, and the sum is the same integer.
template <Format FORMAT>
struct SuperTiles {
  using Q = typename Isa::Q;
  using F = typename Isa::F;
  static constexpr int bits = FORMAT == Format::kK4 ? 4 : FORMAT == Format::kK5 ? 5 : 6;
  static constexpr int quants = kNibbles + (bits == 5 ? kPlane1 : bits == 6 ? kPlane2 : 0);
  static constexpr int scale_bytes = bits == 6 ? 16 * kLanes : kScaleBytes;
  static constexpr int pairs = bits == 6 ? 8 : 4, parts = 2 * pairs;
  static constexpr int unit = 8 * quants + scale_bytes + kHalf * (bits == 6 ? 1 : 2);
  // Weight times factor is low + high << shift. 5 bits by either half of 6 make a byte; 6 bits by 8
  // signed ones are two bytes, the upper one signed.
  static constexpr int shift = bits == 6 ? 8 : 3;
  static constexpr int depth = 64, unit_inputs = kSuper;
  static constexpr int kUnits = kTurn / 2;  // super-blocks of a turn

  struct Factors {
    Q least[pairs][kHalves];
    F d[kHalves], dmin[kHalves];
  };
  struct Scratch {
    alignas(64) uint8_t low[2][kSuper * kLanes], high[2][kSuper * kLanes];
    alignas(64) int32_t sums[kTurn * kSums];
    alignas(64) float y[kMostRows * kLanes];
    alignas(64) Factors factors[kUnits];
  };

  static REDWOOD_INLINE void spread(const uint8_t* w, Fetcher& fetch, uint8_t* low, uint8_t* high,
                                    Factors& to) {
    alignas(64) int8_t unpacked[2][8 * kLanes];
    const uint8_t* at = w + 8 * quants;
    const auto* packed = reinterpret_cast<const int8_t*>(at);
    const int8_t *factors = packed, *minima = packed;
    if constexpr (bits != 6) {
      unpack_scales(at, unpacked[0], unpacked[1]);
      factors = unpacked[0];
      minima = unpacked[1];
    }
    for (int g = 0; g < 8; ++g, w += quants, low += kBytes, high += kBytes) {
      fetch();
      const int8_t* f = factors + g * kLanes * (bits == 6 ? 2 : 1);
      each_quad<bits>(w, [&](int quad, int h, Q q) {
        const int8_t* here = f + h * Isa::W + (bits == 6 && quad >= 4 ? kLanes : 0);
        const Q by = Isa::pairs(here, here);
        Q lo, hi;
        if constexpr (bits == 6) {
          Isa::two_bytes(q, by, lo, hi);
        } else {
          lo = Isa::mul16(q, Isa::template bits<0, 7>(by));
          hi = Isa::mul16(q, Isa::template bits<3, 7>(by));
        }
        Isa::store(low + 64 * quad + h * Isa::W * 4, lo);
        Isa::store(high + 64 * quad + h * Isa::W * 4, hi);
      });
    }
    at += scale_bytes;
    REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
      const int lane = h * Isa::W;
      REDWOOD_UNROLL for (int p = 0; p < pairs; ++p) {
        const int8_t* pair = minima + 2 * p * kLanes + lane;
        to.least[p][h] = Isa::pairs(pair, pair + kLanes);
      }
      to.d[h] = to.dmin[h] = Isa::half(at + 2 * lane);
      if constexpr (bits != 6) to.dmin[h] = Isa::half(at + kHalf + 2 * lane);
    }
  }

  // One or two tiles of rows.
  template <bool TWO>
  static REDWOOD_INLINE void multiply(const int8_t* x, const int8_t* x2, int64_t stride,
                                      const uint8_t* low, const uint8_t* high, int32_t* sums) {
    Tiles::zero<0>();
    Tiles::zero<1>();
    if constexpr (TWO) Tiles::zero<2>();
    if constexpr (TWO) Tiles::zero<3>();
    for (int k = 0; k < kSuper; k += depth, low += depth * kLanes, high += depth * kLanes) {
      Tiles::load<4>(x + k, stride);
      Tiles::load<6>(low, 64);
      Tiles::multiply_unsigned<0, 4, 6>();
      Tiles::load<7>(high, 64);
      multiply_high<1, 4>();
      if constexpr (TWO) {
        Tiles::load<5>(x2 + k, stride);
        Tiles::multiply_unsigned<2, 5, 6>();
        multiply_high<3, 5>();
      }
    }
    Tiles::store<0>(sums, 4 * kLanes);
    Tiles::store<1>(sums + kSums, 4 * kLanes);
    if constexpr (TWO) Tiles::store<2>(sums + 2 * kSums, 4 * kLanes);
    if constexpr (TWO) Tiles::store<3>(sums + 3 * kSums, 4 * kLanes);
  }
  template <int SUMS, int A>
  static REDWOOD_INLINE void multiply_high() {
    if constexpr (bits == 6) {
      Tiles::multiply_signed<SUMS, A, 7>();
    } else {
      Tiles::multiply_unsigned<SUMS, A, 7>();
    }
  }

  template <int R>
  static REDWOOD_INLINE void scale(const Activations& x, int64_t row, int64_t supers, int64_t super,
                                   int count, const int32_t* sums, int step, const Scratch& s,
                                   float* y) {
    Totals<R> out;
    REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
      REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
        out[r][h] = Isa::loadf(y + r * kLanes + h * Isa::W);
      }
    }
    const int16_t* of_x = (bits == 6 ? x.sums16 : x.sums32) + (row * supers + super) * parts;
    const float* scales = x.scales + row * supers + super;
    for (int u = 0; u < count; ++u, sums += step, of_x += parts) {
      const Factors& f = s.factors[u];
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
          const Q high = Isa::load(at + 4 * kSums);
          const Q total = Isa::add32(Isa::load(at), Isa::template up<shift>(high));
          const float scale = scales[r * supers + u];
          const F by = Isa::mulf(f.d[h], Isa::setf(scale));
          const F off = Isa::mulf(f.dmin[h], Isa::setf(bits == 6 ? -32.0f * scale : -scale));
          out[r][h] = Isa::fmaf(Isa::to_float(total), by, out[r][h]);
          out[r][h] = Isa::fmaf(Isa::to_float(least[r]), off, out[r][h]);
        }
      }
    }
    REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
      REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
        Isa::storef(y + r * kLanes + h * Isa::W, out[r][h]);
      }
    }
  }

  static void block(const Matmul& m, const uint8_t* w, Fetcher& fetch, int first,
                    const RowTiles& tiles, int64_t at) {
    Scratch s;
    std::fill(s.y, s.y + tiles.rows * kLanes, 0.0f);
    const int64_t supers = m.cols / kSuper;
    const int most = kUnits / tiles.count, step = 2 * kSums * tiles.count;
    for (int64_t super = 0; super < supers; super += most) {
      const int count = static_cast<int>(std::min<int64_t>(most, supers - super));
      spread(w, fetch, s.low[0], s.high[0], s.factors[0]);
      for (int u = 0; u < count; ++u) {
        w += unit;
        // One ahead: what was just written cannot be loaded into a tile at once.
        const int next = (u + 1) % 2;
        if (u + 1 < count) spread(w, fetch, s.low[next], s.high[next], s.factors[u + 1]);
        int32_t* sums = s.sums + u * step;
        for (int t = 0; t < tiles.count; t += 2, sums += 4 * kSums) {
          const int8_t* x = m.x.quants + (super + u) * kSuper + first * m.x.stride;
          const int8_t* x1 = x + tiles.first(t) * m.x.stride;
          if (t + 1 < tiles.count) {
            const int8_t* x2 = x + tiles.first(t + 1) * m.x.stride;
            multiply<true>(x1, x2, m.x.stride, s.low[u % 2], s.high[u % 2], sums);
          } else {
            multiply<false>(x1, nullptr, m.x.stride, s.low[u % 2], s.high[u % 2], sums);
          }
        }
      }
      for (int t = 0; t < tiles.count; ++t) {
        const int32_t* sums = s.sums + 2 * t * kSums;
        for (int i = tiles.fresh(t); i < tiles.size;) {
          const int row = tiles.first(t) + i;
          float* y = s.y + row * kLanes;
          if (i + 4 <= tiles.size) {
            scale<4>(m.x, first + row, supers, super, count, sums + i * kLanes, step, s, y);
            i += 4;
          } else {
            scale<1>(m.x, first + row, supers, super, count, sums + i * kLanes, step, s, y);
            i += 1;
          }
        }
      }
    }
    finish_block(m, first, tiles.rows, at, s.y);
  }
};

// Kernels for fewer rows, and for all else.
const Kernels* below;

template <Format FORMAT>
void tiled(const Matmul& m, int64_t first, int64_t last) {
  using Kind = std::conditional_t<is_super(FORMAT), SuperTiles<FORMAT>, GroupTiles<FORMAT>>;
  if (m.n < Tiles::fewest(FORMAT)) return below->matmul[static_cast<int>(FORMAT)](m, first, last);
  const int passes = (m.n + kMostRows - 1) / kMostRows;
  const int64_t steps = m.cols / kGroup;
  int configured = 0;
  for (int64_t block = first; block < last; ++block) {
    const uint8_t* w = m.weights + block * m.block_bytes;
    Fetcher fetch{w + m.block_bytes, 0};
    if (block + 1 < last) fetch.step = round_up(m.block_bytes / (steps * passes) + 1, 64);
    for (int pass = 0, row = 0; pass < passes; ++pass) {
      const RowTiles tiles((m.n - row + passes - pass - 1) / (passes - pass));
      if (tiles.size != configured) configure(configured = tiles.size, Kind::depth);
      Kind::block(m, w, fetch, row, tiles, block);
      row += tiles.rows;
    }
  }
  Tiles::release();  // so that no thread carries tiles to what it does next
}

const Kernels* with_tiles(const Kernels& base, const char* name) {
  below = &base;
  static const Kernels kernels = [&] {
    Kernels k = base;
    k.name = name;
    const auto set = [&](Format format, auto* function) {
      k.matmul[static_cast<int>(format)] = function;
    };
    set(Format::kA4, tiled<Format::kA4>);
    set(Format::kA4M, tiled<Format::kA4M>);
    set(Format::kA5, tiled<Format::kA5>);
    set(Format::kA5M, tiled<Format::kA5M>);
    set(Format::kA8, tiled<Format::kA8>);
    set(Format::kK4, tiled<Format::kK4>);
    set(Format::kK5, tiled<Format::kK5>);
    set(Format::kK6, tiled<Format::kK6>);
    return k;
  }();
  return &kernels;
}

}  // namespace
