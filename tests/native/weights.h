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

constexpr const char* kKinds[] = {"Q4_0",   "Q4_1",  "Q5_0",   "Q5_1",  "Q8_0",    "Q3_K",  "Q4_K",
                                  "Q5_K",   "Q6_K",  "F32",    "F16",   "BF16",    "Q2_K",  "IQ4_NL",
                                  "MXFP4",  "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS",
                                  "IQ2_XXS", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0",   "NVFP4"};

// Where a block of a quantised kind holds its fp16 scales; any other byte may be anything.
inline std::vector<int> scale_offsets(const std::string& kind) {
  if (kind == "Q3_K") return {108};
  if (kind == "Q6_K") return {208};
  if (kind == "Q2_K") return {80, 82};
  if (kind == "TQ1_0") return {52};
  if (kind == "TQ2_0") return {64};
  if (kind == "Q4_0" || kind == "Q5_0" || kind == "Q8_0" || kind[0] == 'I') return {0};
  return {0, 2};
}

// Gives a block of a quantised kind the scales that next() draws, as fp16.
template <class Next>
void put_scales(const std::string& kind, uint8_t* block, Next next) {
  if (kind == "MXFP4") {  // powers of two
    block[0] = static_cast<uint8_t>(118 + (next() >> 8 & 3));
  } else if (kind == "NVFP4") {  // near 1
    for (int i = 0; i < 4; ++i) block[i] = static_cast<uint8_t>(0x30 + (next() >> 4 & 15));
  } else if (kind == "IQ1_M") {  // a nibble in each word
    const uint32_t d = next();
    for (int i = 0; i < 4; ++i) {
      uint8_t& high = block[49 + 2 * i];
      high = static_cast<uint8_t>((high & 15) | (d >> 4 * i & 15) << 4);
    }
  } else {
    for (int at : scale_offsets(kind)) {
      const uint32_t d = next();
      block[at] = static_cast<uint8_t>(d), block[at + 1] = static_cast<uint8_t>(d >> 8);
    }
  }
}

// Rows of a file. `full`: quants and the scales inside a block are as large as they can be.
inline std::vector<uint8_t> file_rows(const std::string& name, int64_t rows, int64_t cols,
                                      bool full = false) {
  const Kind& kind = *find_kind(name);
  const int64_t blocks = rows * (cols / kind.step);
  std::vector<uint8_t> out(static_cast<size_t>(blocks * kind.block_bytes));
  const std::vector<float> numbers = normals(blocks, 0.05f);
  if (kind.step == 1) {
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
    put_scales(name, block, [&] {
      return uint32_t{float_to_half(0.001f + 0.01f * std::fabs(numbers[static_cast<size_t>(i)]))};
    });
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
