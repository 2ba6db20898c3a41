// Tile instructions in plain C++, which end the program where a processor would refuse: so the
// logic of kernels with tiles is tested on every machine.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "formats.h"
#include "tiles.h"

namespace {
using namespace redwood;

struct Tiles {
  struct State {
    bool configured = false;
    TileConfig config;
    uint8_t bytes[kTiles][kTileRows][kTileBytes];
  };
  static State& state() {
    static thread_local State s;
    return s;
  }
  static void demand(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "tiles: %s\n", what);
    std::abort();
  }
  // The tile's number of rows; it must be configured.
  template <int T>
  static int rows() {
    static_assert(T >= 0 && T < kTiles, "there are eight tiles");
    demand(state().configured && state().config.rows[T] > 0, "a tile that is not configured");
    return state().config.rows[T];
  }
  template <int T>
  static int width() {
    return rows<T>(), state().config.row_bytes[T];
  }

  // The fewest rows of activations that come here: all, so that all are tested.
  static constexpr int fewest(Format) { return 1; }

  static void configure(const TileConfig& config) {
    demand(config.palette == 1 && config.start_row == 0, "another palette, or a row to start from");
    for (uint8_t byte : config.reserved) demand(byte == 0, "reserved bytes");
    for (int t = 0; t < 16; ++t) {
      const int most = t < kTiles ? kTileRows : 0, widest = t < kTiles ? kTileBytes : 0;
      demand(config.rows[t] <= most && config.row_bytes[t] <= widest, "a tile that is too large");
      demand((config.rows[t] == 0) == (config.row_bytes[t] == 0), "a tile with one side of zero");
    }
    state().config = config;
    state().configured = true;
    std::memset(state().bytes, 0, sizeof state().bytes);
  }
  static void release() { state().configured = false; }
  template <int T>
  static void zero() {
    rows<T>();
    std::memset(state().bytes[T], 0, sizeof state().bytes[T]);
  }
  template <int T>
  static void load(const void* from, int64_t stride) {
    zero<T>();
    for (int r = 0; r < rows<T>(); ++r) {
      std::memcpy(state().bytes[T][r], static_cast<const uint8_t*>(from) + r * stride,
                  static_cast<size_t>(width<T>()));
    }
  }
  template <int T>
  static void store(void* to, int64_t stride) {
    for (int r = 0; r < rows<T>(); ++r) {
      std::memcpy(static_cast<uint8_t*>(to) + r * stride, state().bytes[T][r],
                  static_cast<size_t>(width<T>()));
    }
  }
  // Sums += A times B; signed bytes by unsigned ones (TDPBSUD) or by signed ones (TDPBSSD).
  template <int SUMS, int A, int B>
  static void multiply_unsigned() {
    product<SUMS, A, B>([](uint8_t byte) { return int32_t{byte}; });
  }
  template <int SUMS, int A, int B>
  static void multiply_signed() {
    product<SUMS, A, B>([](uint8_t byte) { return int32_t{static_cast<int8_t>(byte)}; });
  }

 private:
  static uint32_t word(const uint8_t* p) {
    uint32_t bits;
    std::memcpy(&bits, p, 4);
    return bits;
  }
  template <int SUMS, int A, int B, class Read>
  static void product(Read read) {
    static_assert(SUMS != A && SUMS != B && A != B, "three tiles");
    demand((width<SUMS>() | width<A>() | width<B>()) % 4 == 0, "parts of a number");
    demand(rows<SUMS>() == rows<A>() && width<SUMS>() == width<B>() && width<A>() == 4 * rows<B>(),
           "tiles that do not fit each other");
    auto& s = state();
    const int row_count = rows<SUMS>(), outputs = width<SUMS>() / 4, quads = width<A>() / 4;
    for (int r = 0; r < row_count; ++r) {
      for (int o = 0; o < outputs; ++o) {
        uint32_t sum = word(s.bytes[SUMS][r] + 4 * o);  // wraps, as the instruction's does
        for (int q = 0; q < quads; ++q) {
          const uint32_t a = word(s.bytes[A][r] + 4 * q), b = word(s.bytes[B][q] + 4 * o);
          for (int i = 0; i < 32; i += 8) {
            const int32_t x = static_cast<int8_t>(a >> i);
            sum += static_cast<uint32_t>(x * read(static_cast<uint8_t>(b >> i)));
          }
        }
        std::memcpy(s.bytes[SUMS][r] + 4 * o, &sum, 4);
      }
    }
  }
};

}  // namespace
