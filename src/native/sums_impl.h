// Integer sums of a group of packed weights with a few rows of activations, and what brings the next
// weights meanwhile; included once per instruction set, by matmul_impl.h.
#pragma once
#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace {
using namespace redwood;

constexpr int kHalves = kLanes / Isa::W;  // registers of a block

// Brings weights of later calls to the second-level cache while others are worked on, line by line: an
// even flow, since a burst fills the queue of what is under way, and then all loads wait.
struct Fetcher {
  const uint8_t *at = nullptr, *end = nullptr;
  int64_t step, due = 0;  // bytes of a turn, and those not asked for yet
  WeightStream* stream;
  int64_t left;

  // `turns`: how often it will be called.
  Fetcher(const Matmul& m, int64_t turns)
      : step((m.ahead_bytes + turns - 1) / turns), stream(m.ahead), left(m.ahead_bytes) {}
  inline void operator()() {
    for (due += step; due >= 64; due -= 64, at += 64) {
      if (at >= end && !more()) return;
      Isa::prefetch(at);
    }
  }
  __attribute__((noinline)) bool more() {
    const auto run = stream->next(left);
    at = run.at;
    end = run.end;
    left -= end - at;
    if (at < end) return true;
    step = 0;
    return false;
  }
};

#define REDWOOD_INLINE inline __attribute__((always_inline))
// Loops over rows and registers must vanish before the compiler assigns registers.
#define REDWOOD_UNROLL _Pragma("GCC unroll 24")

// Registers of B blocks for each of R rows: 8-bit quads or integer sums, and floats.
template <int R, int B>
using Sums = typename Isa::Q[R][B * kHalves];
template <int R, int B>
using Totals = typename Isa::F[R][B * kHalves];

// Where the outputs of register h stand, of `bytes` bytes each; the next block is `block` bytes on.
template <class T>
REDWOOD_INLINE const T* part(const T* first, int64_t block, int h, int bytes) {
  return first + (h / kHalves) * block + (h % kHalves) * Isa::W * bytes;
}

// Quads 2J and 2J + 1 of a group of BITS-bit weights, as bytes. `at`: the group, from a register on.
template <int BITS, int J>
REDWOOD_INLINE void two_quads(const uint8_t* at, typename Isa::Q& lo, typename Isa::Q& hi) {
  using Q = typename Isa::Q;
  if constexpr (BITS < 4) {
    const Q v = Isa::load(at + 64 * (J / 2));
    lo = Isa::template plane<4 * (J % 2), 3, 0>(v);
    hi = Isa::template plane<4 * (J % 2) + 2, 3, 0>(v);
  } else {
    const Q v = Isa::load(at + 64 * J);
    lo = Isa::low(v);
    hi = Isa::high(v);
  }
  if constexpr (BITS == 3) {
    const Q p = Isa::load(at + kPlane2);
    lo = Isa::either(lo, Isa::template plane<2 * J, 4, 2>(p));
    hi = Isa::either(hi, Isa::template plane<2 * J + 1, 4, 2>(p));
  }
  if constexpr (BITS == 5) {
    const Q p = Isa::load(at + kNibbles);
    lo = Isa::either(lo, Isa::template plane<2 * J, 16>(p));
    hi = Isa::either(hi, Isa::template plane<2 * J + 1, 16>(p));
  }
  if constexpr (BITS == 6) {
    const Q p = Isa::load(at + kNibbles + 64 * (J / 2));
    lo = Isa::either(lo, Isa::template plane<4 * (J % 2), 48>(p));
    hi = Isa::either(hi, Isa::template plane<4 * (J % 2) + 2, 48>(p));
  }
}

// Quads 2J and 2J + 1 of a group of BITS-bit weights, added to sums. `table`: if there is one, the
// numbers that the weights choose.
template <int BITS, int J, int R, int B>
REDWOOD_INLINE void line_sum(const uint8_t* w, int64_t block, const int8_t* x, int64_t x_stride,
                             Sums<R, B>& sum, const typename Isa::Q* table = nullptr) {
  using Q = typename Isa::Q;
  constexpr int parts = B * kHalves;
  Q lo[parts], hi[parts];
  REDWOOD_UNROLL for (int h = 0; h < parts; ++h) {
    two_quads<BITS, J>(part(w, block, h, 4), lo[h], hi[h]);
    if (table) lo[h] = Isa::lookup(*table, lo[h]), hi[h] = Isa::lookup(*table, hi[h]);
  }
  REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
    const Q a = Isa::quad(x + r * x_stride + 8 * J), b = Isa::quad(x + r * x_stride + 8 * J + 4);
    REDWOOD_UNROLL for (int h = 0; h < parts; ++h) sum[r][h] = Isa::mac(sum[r][h], lo[h], a);
    REDWOOD_UNROLL for (int h = 0; h < parts; ++h) sum[r][h] = Isa::mac(sum[r][h], hi[h], b);
  }
}

template <int R, int B>
REDWOOD_INLINE void clear(Sums<R, B>& sum) {
  REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
    REDWOOD_UNROLL for (int h = 0; h < B * kHalves; ++h) sum[r][h] = Isa::zero();
  }
}

// Moves sums to the 32-bit total, times the 8-bit factors of the outputs, if there are any: those of
// the next block stand `block` bytes on.
template <int R, int B>
REDWOOD_INLINE void flush(const Sums<R, B>& sum, const int8_t* factors, int64_t block,
                          Sums<R, B>& total) {
  REDWOOD_UNROLL for (int h = 0; h < B * kHalves; ++h) {
    if (factors) {
      const auto by = Isa::factor(part(factors, block, h, 1));
      REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
        total[r][h] = Isa::add32(total[r][h], Isa::flush(sum[r][h], by));
      }
    } else {
      REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
        total[r][h] = Isa::add32(total[r][h], Isa::flush(sum[r][h]));
      }
    }
  }
}

// Sum over a group of 32 inputs: 16-bit sums hold 8 products of 4-bit, 4 of 5-bit or 2 of 6-bit
// weights. `factors`: per half group (2 and 6 bits: second half at +16), per group, or null; those of the
// next block are `factor_block` bytes on.
template <int BITS, int R, int B>
REDWOOD_INLINE void group_sum(const uint8_t* w, int64_t block, const int8_t* x, int64_t x_stride,
                              const int8_t* factors, int64_t factor_block, Sums<R, B>& total) {
  constexpr bool often = BITS == 6 && !Isa::WIDE, halves = BITS == 6 || BITS == 2;
  Sums<R, B> sum;
  clear<R, B>(sum);
  line_sum<BITS, 0, R, B>(w, block, x, x_stride, sum);
  if constexpr (often) {
    flush<R, B>(sum, factors, factor_block, total);
    clear<R, B>(sum);
  }
  line_sum<BITS, 1, R, B>(w, block, x, x_stride, sum);
  if constexpr (halves || (BITS == 5 && !Isa::WIDE)) {
    flush<R, B>(sum, factors, factor_block, total);
    clear<R, B>(sum);
  }
  if constexpr (halves) factors += kLanes;
  line_sum<BITS, 2, R, B>(w, block, x, x_stride, sum);
  if constexpr (often) {
    flush<R, B>(sum, factors, factor_block, total);
    clear<R, B>(sum);
  }
  line_sum<BITS, 3, R, B>(w, block, x, x_stride, sum);
  flush<R, B>(sum, factors, factor_block, total);
}

// As `flush`, for sums of which each counts 16 times.
template <int R, int B>
REDWOOD_INLINE void flush16(const Sums<R, B>& sum, const int8_t* factors, int64_t block,
                            Sums<R, B>& total) {
  if constexpr (!Isa::WIDE) {
    alignas(16) static constexpr int8_t one[kLanes] = {1, 1, 1, 1, 1, 1, 1, 1,
                                                       1, 1, 1, 1, 1, 1, 1, 1};
    REDWOOD_UNROLL for (int h = 0; h < B * kHalves; ++h) {
      const auto by = Isa::times16(Isa::factor(factors ? part(factors, block, h, 1) : one));
      REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
        total[r][h] = Isa::add32(total[r][h], Isa::flush(sum[r][h], by));
      }
    }
  }
}

// A turn over a group of codes: quads 4 * HALF and the next 3, or all (HALF = 2).
template <int BITS, int R, int B, bool HIGH, int HALF>
REDWOOD_INLINE void turn_table(const uint8_t* w, int64_t block, const int8_t* x, int64_t x_stride,
                               const typename Isa::Q& table, const int8_t* factors,
                               int64_t factor_block, Sums<R, B>& total) {
  Sums<R, B> sum;
  clear<R, B>(sum);
  if constexpr (HALF != 1) {
    line_sum<BITS, 0, R, B>(w, block, x, x_stride, sum, &table);
    line_sum<BITS, 1, R, B>(w, block, x, x_stride, sum, &table);
  }
  if constexpr (HALF != 0) {
    line_sum<BITS, 2, R, B>(w, block, x, x_stride, sum, &table);
    line_sum<BITS, 3, R, B>(w, block, x, x_stride, sum, &table);
  }
  if constexpr (HIGH) {
    flush16<R, B>(sum, factors, factor_block, total);
  } else {
    flush<R, B>(sum, factors, factor_block, total);
  }
}

// The numbers (plus 128) of a table; where sums are 16 bits wide, low and high halves of them.
struct Table {
  typename Isa::Q all, high;
  explicit REDWOOD_INLINE Table(const uint8_t* p) : all(Isa::table(p)), high(all) {
    if constexpr (!Isa::WIDE) high = Isa::high(all), all = Isa::low(all);
  }
};

// Sum over a group of codes, with `factors` as in group_sum, per half group for 3 bits.
template <int BITS, int R, int B>
REDWOOD_INLINE void table_sum(const uint8_t* w, int64_t block, const int8_t* x, int64_t x_stride,
                              const Table& table, const int8_t* factors, int64_t factor_block,
                              Sums<R, B>& total) {
  constexpr int first = BITS == 3 ? 0 : 2;
  turn_table<BITS, R, B, false, first>(w, block, x, x_stride, table.all, factors, factor_block, total);
  if constexpr (!Isa::WIDE) {
    turn_table<BITS, R, B, true, first>(w, block, x, x_stride, table.high, factors, factor_block,
                                        total);
  }
  if constexpr (BITS == 3) {
    factors += kLanes;
    turn_table<BITS, R, B, false, 1>(w, block, x, x_stride, table.all, factors, factor_block, total);
    if constexpr (!Isa::WIDE) {
      turn_table<BITS, R, B, true, 1>(w, block, x, x_stride, table.high, factors, factor_block, total);
    }
  }
}

// A group of 8-bit weights (stored plus 128). Where sums are 16 bits wide it takes two turns: low
// halves of the bytes, then high ones times 16.
template <int R, int B, bool HIGH>
REDWOOD_INLINE void turn_sum8(const uint8_t* w, int64_t block, const int8_t* x, int64_t x_stride,
                              Sums<R, B>& total) {
  using Q = typename Isa::Q;
  constexpr int parts = B * kHalves;
  Sums<R, B> sum;
  clear<R, B>(sum);
  REDWOOD_UNROLL for (int t = 0; t < 8; ++t) {
    Q v[parts];
    REDWOOD_UNROLL for (int h = 0; h < parts; ++h) {
      v[h] = Isa::load(part(w, block, h, 4) + 64 * t);
      if constexpr (!Isa::WIDE) v[h] = HIGH ? Isa::high(v[h]) : Isa::low(v[h]);
    }
    REDWOOD_UNROLL for (int r = 0; r < R; ++r) {
      const Q a = Isa::quad(x + r * x_stride + 4 * t);
      REDWOOD_UNROLL for (int h = 0; h < parts; ++h) sum[r][h] = Isa::mac(sum[r][h], v[h], a);
    }
  }
  alignas(16) static constexpr int8_t sixteen[kLanes] = {16, 16, 16, 16, 16, 16, 16, 16,
                                                         16, 16, 16, 16, 16, 16, 16, 16};
  flush<R, B>(sum, HIGH ? sixteen : nullptr, 0, total);
}

template <int R, int B>
REDWOOD_INLINE void group_sum8(const uint8_t* w, int64_t block, const int8_t* x, int64_t x_stride,
                               Sums<R, B>& total) {
  turn_sum8<R, B, false>(w, block, x, x_stride, total);
  if constexpr (!Isa::WIDE) turn_sum8<R, B, true>(w, block, x, x_stride, total);
}

}  // namespace
