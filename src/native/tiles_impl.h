// Products of packed weights with many rows of activations by tiles; included once per kind of
// tiles, after its `Tiles` and its `Isa`.
//
// A line of packed weights (16 outputs x 4 inputs) is a row of the right-hand tile as it stands,
// once its weights are bytes. Sums are the integers that the other kernels form, and meet their
// scales in the same order: the bits are the same.
#pragma once
#include "tiles_groups.h"
#include "tiles_supers.h"

namespace {

const Kernels* below;  // for fewer rows, and for all else

PackedRows& packed_rows() {
  static thread_local PackedRows rows;
  return rows;
}

template <Format FORMAT>
void tiled(const Matmul& m, int64_t first, int64_t last) {
  using Kind = std::conditional_t<is_super(FORMAT), SuperTiles<FORMAT>, GroupTiles<FORMAT>>;
  PackedRows& x = packed_rows();
  const int passes = (m.n + Kind::most_rows - 1) / Kind::most_rows;
  if (m.n < Tiles::fewest(FORMAT) || !x.reserve((m.n + passes * kPassTiles) * m.cols)) {
    return below->matmul[static_cast<int>(FORMAT)](m, first, last);
  }
  const bool packed = x.has(m.inputs, Kind::depth, m.n);
  Fetcher fetch(m, std::max<int64_t>(1, m.cols / kGroup * (last - first) * passes));
  int8_t* at = x.data();
  for (int pass = 0, row = 0; pass < passes; ++pass) {
    const RowTiles tiles((m.n - row + passes - pass - 1) / (passes - pass));
    if (!packed) {
      pack_rows<Kind::depth>(m.x.quants + row * m.x.stride, m.x.stride, m.cols, tiles, at);
    }
    configure(tiles.size, Kind::depth);
    for (int64_t block = first; block < last; ++block) {
      const uint8_t* w = m.weights + block * m.block_bytes;
      Kind::block(m, w, fetch, row, tiles, at, block);
    }
    row += tiles.rows;
    at += tiles.size * tiles.count * m.cols;
  }
  Tiles::release();  // a thread carries no tiles to what it does next
}

const Kernels* with_tiles(const Kernels& base, const char* name) {
  static const Kernels kernels = [&] {
    below = &base;
    Kernels k = base;
    k.name = name;
    each_quantised([&](auto format) {
      k.matmul[static_cast<int>(format())] = tiled<format()>;
    });
    return k;
  }();
  return &kernels;
}

}  // namespace
