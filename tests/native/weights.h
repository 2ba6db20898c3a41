// Random weights for the checks, as they would stand in a file, and packed.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"
#include "pack.h"

namespace check {
using namespace redwood;

inline int failures = 0;

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

inline std::mt19937& chance() {
  static std::mt19937 generator(17);
  return generator;
}

// Nearly normal numbers, the same everywhere: those of the standard library are not.
inline std::vector<float> normals(int64_t count, float scale = 1.0f) {
  std::vector<float> out(static_cast<size_t>(count));
  for (float& x : out) {
    const uint32_t a = chance()(), b = chance()();
    const uint32_t sum = (a & 0xffff) + (a >> 16) + (b & 0xffff) + (b >> 16);
    x = (static_cast<float>(sum) - 131070.0f) * (scale * 0x1.bb67aep-16f);
  }
  return out;
}

// Where a block of a quantised kind holds its fp16 scales; any other byte may be anything.
inline std::vector<int> scale_offsets(const std::string& kind) {
  if (kind == "Q4_0" || kind == "Q5_0" || kind == "Q8_0") return {0};
  if (kind == "Q3_K") return {108};
  if (kind == "Q6_K") return {208};
  return {0, 2};
}

// Rows of a file. `full`: quants and the scales inside a block are as large as they can be.
inline std::vector<uint8_t> file_rows(const std::string& name, int64_t rows, int64_t cols,
                                      bool full = false) {
  const Kind& kind = *find_kind(name);
  const int64_t blocks = rows * (cols / kind.step);
  std::vector<uint8_t> out(static_cast<size_t>(blocks * kind.block_bytes));
  const std::vector<float> numbers = normals(blocks, 0.05f);
  if (is_float(kind.format)) {
    for (int64_t i = 0; i < blocks; ++i) {
      const float x = numbers[static_cast<size_t>(i)];
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if (name == "F16") bits = float_to_half(x);
      if (name == "BF16") bits >>= 16;
      std::memcpy(out.data() + i * kind.block_bytes, &bits, static_cast<size_t>(kind.block_bytes));
    }
    return out;
  }
  for (uint8_t& b : out) b = full ? 255 : static_cast<uint8_t>(chance()());
  if (full && name == "Q8_0") std::fill(out.begin(), out.end(), uint8_t{127});
  for (int64_t i = 0; i < blocks; ++i) {
    uint8_t* block = out.data() + i * kind.block_bytes;
    if (full && name == "Q6_K") std::fill(block + 192, block + 208, uint8_t{128});  // signed scales
    for (int at : scale_offsets(name)) {
      const uint16_t d = float_to_half(0.001f + 0.01f * std::fabs(numbers[static_cast<size_t>(i)]));
      std::memcpy(block + at, &d, 2);
    }
  }
  return out;
}

inline std::vector<uint8_t> packed(const std::string& kind, const std::vector<uint8_t>& file,
                                   int64_t rows, int64_t cols, Format format) {
  std::vector<uint8_t> out(static_cast<size_t>(packed_bytes(format, rows, cols)));
  pack_blocks(*find_kind(kind), file.data(), rows, cols, nullptr, format, out.data(), 0,
              round_up(rows, kLanes) / kLanes);
  return out;
}

inline bool same_bits(const float* a, const float* b, int64_t count) {
  return std::memcmp(a, b, static_cast<size_t>(count) * sizeof(float)) == 0;
}

}  // namespace check
