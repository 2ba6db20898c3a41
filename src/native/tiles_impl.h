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
#include <cstdlib>
#include <type_traits>

#include "matmul_impl.h"
#include "tiles.h"

namespace {

constexpr int kMostRows = 256;  // of one pass
constexpr int kMostTiles = kMostRows / kTileRows;
constexpr int kTurn = 8;  // tiles of sums between two turns
constexpr int kSums = kTileRows * kLanes;  // of one tile

// Rows of a pass as tiles of one size: zeros fill the last.
struct RowTiles {
  int rows, count, size;
  explicit RowTiles(int n)
      : rows(n), count((n + kTileRows - 1) / kTileRows), size((n + count - 1) / count) {}
  int first(int tile) const { return tile * size; }
  int of(int tile) const { return std::min(size, rows - first(tile)); }
};

// Activations in the order in which tiles are loaded: [inputs / depth][tiles][rows][depth].
// Rows of a matrix may be powers of two apart, and begin anywhere: a tile of them would not fit the
// cache, or take two lines for each of its own.
class PackedRows {
 public:
  // False: no memory.
  bool reserve(size_t bytes) {
    if (bytes <= size_) return true;
    std::free(data_);
    data_ = static_cast<int8_t*>(std::aligned_alloc(64, round_up(static_cast<int64_t>(bytes), 64)));
    size_ = data_ ? bytes : 0;
    return data_ != nullptr;
  }
  const int8_t* data() const { return data_; }
  template <int DEPTH>
  void fill(const int8_t* x, int64_t stride, int64_t cols, const RowTiles& tiles) {
    const int rows = tiles.count * tiles.size;
    for (int r = 0; r < rows; ++r) {
      int8_t* to = data_ + r * DEPTH;
      for (int64_t k = 0; k < cols; k += DEPTH, to += rows * DEPTH) {
        if (r < tiles.rows) std::memcpy(to, x + r * stride + k, DEPTH);
        else std::memset(to, 0, DEPTH);
      }
    }
  }
  ~PackedRows() { std::free(data_); }

 private:
  int8_t* data_ = nullptr;
  size_t size_ = 0;
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
  static constexpr int unit = quants + kHalf * (minimum ? 2 : 1);
  static constexpr int depth = kGroup;

  struct Scratch {
    alignas(64) uint8_t bytes[kTurn][kBytes];
    alignas(64) float scale[kTurn][kLanes], least[kTurn][kLanes];
    alignas(64) int32_t sums[std::max(kTurn, kMostTiles)][kSums];  // [groups][tiles]
    alignas(64) float y[kMostRows * kLanes];
  };

  // Group `at` of a turn: bytes, signed ones where the format has no minimum.
  static REDWOOD_INLINE void spread(const uint8_t* w, int at, Scratch& s) {
    each_quad<bits>(w, [&](int quad, int h, typename Isa::Q q) {
      if constexpr (!minimum) q = Isa::template less8<1 << (bits - 1)>(q);
      Isa::store(s.bytes[at] + 64 * quad + h * Isa::W * 4, q);
    });
    REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
      const int lane = h * Isa::W;
      Isa::storef(s.scale[at] + lane, Isa::half(w + quants + 2 * lane));
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
  static constexpr int depth = 64;
  static constexpr int steps = kSuper / depth;

  // Of one super-block.
  struct Factors {
    alignas(64) int8_t of_groups[parts * kLanes], minima[parts * kLanes];
    Q least[pairs][kHalves];
    F d[kHalves], dmin[kHalves];
  };
  struct Scratch {
    alignas(64) uint8_t low[steps][depth * kLanes], high[steps][depth * kLanes];
    alignas(64) int32_t sums[4][kSums];
    alignas(64) float y[kMostRows * kLanes];
    Factors factors[2];  // of this super-block and the next
  };

  static REDWOOD_INLINE void read_factors(const uint8_t* w, Factors& f) {
    const uint8_t* at = w + 8 * quants;
    const int8_t* minima = f.of_groups;
    if constexpr (bits == 6) {
      std::memcpy(f.of_groups, at, sizeof f.of_groups);
    } else {
      unpack_scales(at, f.of_groups, f.minima);
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
      if constexpr (bits != 6) f.dmin[h] = Isa::half(at + kHalf + 2 * lane);
    }
  }

  // Two groups of a super-block, times their factors.
  static REDWOOD_INLINE void spread(const uint8_t* w, int step, const Factors& f, Fetcher& fetch,
                                    Scratch& s) {
    for (int g = 2 * step; g < 2 * step + 2; ++g) {
      fetch();
      const int8_t* factors = f.of_groups + g * kLanes * (bits == 6 ? 2 : 1);
      const int to = g % 2 * kBytes;
      // Of either half of the inputs, or either half of the factor's bits.
      Q by[kHalves][2];
      REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
        const int8_t* at = factors + h * Isa::W;
        const Q whole = by[h][0] = Isa::pairs(at, at);
        if constexpr (bits == 6) {
          by[h][1] = Isa::pairs(at + kLanes, at + kLanes);
        } else {
          by[h][0] = Isa::template bits<0, 7>(whole);
          by[h][1] = Isa::template bits<3, 7>(whole);
        }
      }
      each_quad<bits>(w + g * quants, [&](int quad, int h, Q q) {
        Q low, high;
        if constexpr (bits == 6) {
          Isa::two_bytes(q, by[h][quad / 4], low, high);
        } else {
          low = Isa::mul16(q, by[h][0]);
          high = Isa::mul16(q, by[h][1]);
        }
        Isa::store(s.low[step] + to + 64 * quad + h * Isa::W * 4, low);
        Isa::store(s.high[step] + to + 64 * quad + h * Isa::W * 4, high);
      });
    }
  }

  template <int SUMS, int A>
  static REDWOOD_INLINE void multiply_high() {
    if constexpr (bits == 6) {
      Tiles::multiply_signed<SUMS, A, 7>();
    } else {
      Tiles::multiply_unsigned<SUMS, A, 7>();
    }
  }
  // Tiles of rows `x` and, if there is one, `x2`.
  static REDWOOD_INLINE void multiply(const int8_t* x, const int8_t* x2, int step, const Scratch& s) {
    Tiles::load<4>(x, depth);
    Tiles::load<6>(s.low[step], 4 * kLanes);
    Tiles::multiply_unsigned<0, 4, 6>();
    Tiles::load<7>(s.high[step], 4 * kLanes);
    multiply_high<1, 4>();
    if (x2) {
      Tiles::load<5>(x2, depth);
      Tiles::multiply_unsigned<2, 5, 6>();
      multiply_high<3, 5>();
    }
  }

  // R rows: `row` of the activations is row `at` of its tile.
  template <int R>
  static REDWOOD_INLINE void scale(const Activations& x, int64_t row, int64_t supers, int64_t super,
                                   const int32_t* sums, const Factors& f, float* y) {
    const int16_t* of_x = (bits == 6 ? x.sums16 : x.sums32) + (row * supers + super) * parts;
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
        const float scale = x.scales[(row + r) * supers + super];
        const F by = Isa::mulf(f.d[h], Isa::setf(scale));
        const F off = Isa::mulf(f.dmin[h], Isa::setf(bits == 6 ? -32.0f * scale : -scale));
        float* out = y + r * kLanes + h * Isa::W;
        const F sum = Isa::fmaf(Isa::to_float(total), by, Isa::loadf(out));
        Isa::storef(out, Isa::fmaf(Isa::to_float(least[r]), off, sum));
      }
    }
  }

  static void block(const Matmul& m, const uint8_t* w, Fetcher& fetch, int first,
                    const RowTiles& tiles, const int8_t* x, int64_t at) {
    Scratch s;
    std::fill(s.y, s.y + tiles.rows * kLanes, 0.0f);
    const int64_t supers = m.cols / kSuper;
    const int of_x = tiles.size * depth;
    read_factors(w, s.factors[0]);
    for (int k = 0; k < steps; ++k) spread(w, k, s.factors[0], fetch, s);
    for (int64_t super = 0; super < supers; ++super) {
      w += unit;
      const Factors& f = s.factors[super % 2];
      Factors& next = s.factors[(super + 1) % 2];
      for (int t = 0; t < tiles.count; t += 2) {
        const bool two = t + 1 < tiles.count;
        const bool ahead = t + 2 >= tiles.count && super + 1 < supers;
        if (ahead) read_factors(w, next);
        Tiles::zero<0>();
        Tiles::zero<1>();
        Tiles::zero<2>();
        Tiles::zero<3>();
        for (int k = 0; k < steps; ++k) {
          const int8_t* px = x + ((super * steps + k) * tiles.count + t) * of_x;
          multiply(px, two ? px + of_x : nullptr, k, s);
          if (ahead) spread(w, k, next, fetch, s);  // over what is not needed any more
        }
        Tiles::store<0>(s.sums[0], 4 * kLanes);
        Tiles::store<1>(s.sums[1], 4 * kLanes);
        if (two) {
          Tiles::store<2>(s.sums[2], 4 * kLanes);
          Tiles::store<3>(s.sums[3], 4 * kLanes);
        }
        scale(m, first, tiles, super, t, s.sums[0], f, s.y);
        if (two) scale(m, first, tiles, super, t + 1, s.sums[2], f, s.y);
      }
    }
    finish_block(m, first, tiles.rows, at, s.y);
  }

 private:
  static void scale(const Matmul& m, int first, const RowTiles& tiles, int64_t super, int tile,
                    const int32_t* sums, const Factors& f, float* y) {
    const int64_t row = first + tiles.first(tile), supers = m.cols / kSuper;
    y += tiles.first(tile) * kLanes;
    int r = 0;
    for (; r + 4 <= tiles.of(tile); r += 4) {
      scale<4>(m.x, row + r, supers, super, sums + r * kLanes, f, y + r * kLanes);
    }
    for (; r < tiles.of(tile); ++r) {
      scale<1>(m.x, row + r, supers, super, sums + r * kLanes, f, y + r * kLanes);
    }
  }
};

// Kernels for fewer rows, and for all else.
const Kernels* below;

template <Format FORMAT>
void tiled(const Matmul& m, int64_t first, int64_t last) {
  using Kind = std::conditional_t<is_super(FORMAT), SuperTiles<FORMAT>, GroupTiles<FORMAT>>;
  if (m.n < Tiles::fewest(FORMAT)) return below->matmul[static_cast<int>(FORMAT)](m, first, last);
  const int passes = (m.n + kMostRows - 1) / kMostRows;
  static thread_local PackedRows packed;
  if (!packed.reserve(static_cast<size_t>(kTileRows + std::min(m.n, kMostRows)) * m.cols)) {
    return below->matmul[static_cast<int>(FORMAT)](m, first, last);
  }
  for (int pass = 0, row = 0; pass < passes; ++pass) {
    const RowTiles tiles((m.n - row + passes - pass - 1) / (passes - pass));
    packed.fill<Kind::depth>(m.x.quants + row * m.x.stride, m.x.stride, m.cols, tiles);
    configure(tiles.size, Kind::depth);
    for (int64_t block = first; block < last; ++block) {
      const uint8_t* w = m.weights + block * m.block_bytes;
      Fetcher fetch{w + m.block_bytes, 0};
      if (block + 1 < last) fetch.step = round_up(m.block_bytes / (m.cols / kGroup) + 1, 64);
      Kind::block(m, w, fetch, row, tiles, packed.data(), block);
    }
    row += tiles.rows;
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
