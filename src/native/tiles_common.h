// What products by tiles share, whatever the format.
#pragma once
#include <algorithm>
#include <new>
#include <type_traits>

#include "matmul_impl.h"
#include "tiles.h"

namespace {

constexpr int kPassRows = 256;  // of activations, at most: their sums stay in the cache
constexpr int kPassTiles = kPassRows / kTileRows;
constexpr int kSums = kTileRows * kLanes;  // of one tile

// Rows of a pass as tiles of one size: zeros fill the last.
struct RowTiles {
  int rows, count, size;
  explicit RowTiles(int n)
      : rows(n), count((n + kTileRows - 1) / kTileRows), size((n + count - 1) / count) {}
  int first(int tile) const { return tile * size; }
  int of(int tile) const { return std::min(size, rows - first(tile)); }
};

// Activations in the order in which tiles are loaded: [inputs / depth][tiles][rows][depth]. Where
// they come from, rows may begin anywhere in a line, and fall on each other in the cache.
class PackedRows {
 public:
  ~PackedRows() { clear(); }
  // False: there is no memory.
  bool reserve(int64_t bytes) {
    if (bytes <= size_) return true;
    clear();
    inputs_ = 0;
    data_ = new (std::align_val_t{64}, std::nothrow) int8_t[static_cast<size_t>(bytes)];
    size_ = data_ ? bytes : 0;
    return data_ != nullptr;
  }
  int8_t* data() const { return data_; }

  // Whether these activations, by their number, are here already; from now on they are meant to be.
  bool has(uint64_t inputs, int depth, int rows) {
    const bool here = inputs != 0 && inputs == inputs_ && depth == depth_ && rows == rows_;
    inputs_ = inputs, depth_ = depth, rows_ = rows;
    return here;
  }

 private:
  void clear() { operator delete[](data_, std::align_val_t{64}); }

  int8_t* data_ = nullptr;
  int64_t size_ = 0;
  uint64_t inputs_ = 0;
  int depth_ = 0, rows_ = 0;
};

template <int DEPTH>
void pack_rows(const int8_t* x, int64_t stride, int64_t cols, const RowTiles& tiles, int8_t* out) {
  for (int t = 0; t < tiles.count; ++t) {
    const int8_t* from = x + tiles.first(t) * stride;
    for (int64_t k = 0; k < cols; k += DEPTH) {
      int8_t* to = out + (k * tiles.count + t * DEPTH) * tiles.size;
      for (int r = 0; r < tiles.size; ++r, to += DEPTH) {
        if (r < tiles.of(t)) {
          std::memcpy(to, from + r * stride + k, DEPTH);
        } else {
          std::memset(to, 0, DEPTH);
        }
      }
    }
  }
}

// Tiles 0 to 3: sums; 4 and 5: activations; 6 and 7: weights.
void configure(int rows, int depth) {
  TileConfig c;
  for (int t = 0; t < 8; ++t) {
    c.rows[t] = static_cast<uint8_t>(t < 6 ? rows : depth / 4);
    c.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? depth : 4 * kLanes);
  }
  Tiles::configure(c);
}

// Calls body(quad, register of the block, weights or codes as bytes) for the 8 quads of a group.
template <int BITS, class Body>
REDWOOD_INLINE void each_quad(const uint8_t* w, Body body) {
  REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
    const int at = h * Isa::W * 4;
    if constexpr (BITS == 8) {
      REDWOOD_UNROLL for (int t = 0; t < 8; ++t) body(t, h, Isa::load(w + 64 * t + at));
    } else {
      const auto line = [&](auto index) {
        constexpr int j = decltype(index)::value;
        typename Isa::Q lo, hi;
        two_quads<BITS, j>(w + at, lo, hi);
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
REDWOOD_INLINE void finish_block(const Matmul& m, int first, int rows, int64_t block,
                                 const float* y) {
  for (int r = 0; r < rows; ++r) {
    REDWOOD_UNROLL for (int h = 0; h < kHalves; ++h) {
      float* out = m.out + (first + r) * m.out_stride + block * kLanes + h * Isa::W;
      const auto v = Isa::loadf(y + r * kLanes + h * Isa::W);
      Isa::storef(out, m.add ? Isa::addf(Isa::loadf(out), v) : v);
    }
  }
}

}  // namespace
