// Packed weight formats. One layout serves every instruction set.
//
// Outputs come in blocks of 16, inputs in groups of 32. Within a group, inputs come in quads of 4: a
// 64-byte line holds 16 outputs x 4 inputs, so one register of any width holds whole outputs, and an
// 8-bit dot product of a line with 4 broadcast activations adds to one 32-bit sum per output.
// Line j of 4-bit values holds quad 2j in its low and quad 2j+1 in its high nibbles.
#pragma once
#include <cstddef>
#include <cstdint>

namespace redwood {

constexpr int kLanes = 16;   // outputs of a block
constexpr int kGroup = 32;   // inputs of a group
constexpr int kSuper = 256;  // inputs of a super-block (K formats)
constexpr int kMaxThreads = 64;

enum class Format : int {
  kA4 = 0,  // 4 bits, a scale per group of 32 (GGUF Q4_0)
  kA4M,     // 4 bits, a scale and a minimum (Q4_1)
  kA5,      // 5 bits, a scale (Q5_0)
  kA5M,     // 5 bits, a scale and a minimum (Q5_1)
  kA8,      // 8 bits, a scale (Q8_0)
  kK4,      // 4 bits, 6-bit scales and minima per 32 in a super-block of 256 (Q4_K)
  kK5,      // 5 bits, likewise (Q5_K)
  kK6,      // 6 bits, 8-bit scales per 16 in a super-block of 256 (Q6_K, Q3_K)
  kF32,
  kF16,
  kBF16,
  kCount
};

struct FormatInfo {
  const char* name;
  int step;        // inputs of the unit that repeats along a row
  int unit_bytes;  // bytes of that unit for the 16 outputs of a block
};

// Group formats: quants, then fp16 scales [16], then fp16 minima [16].
// K4, K5: 8 groups of quants, then 6-bit scales and minima (see kScaleBytes), fp16 d [16], dmin [16].
// K6: 8 groups of quants, then int8 scales [16 groups of 16][16 outputs], fp16 d [16].
constexpr int kNibbles = 256, kPlane1 = 64, kPlane2 = 128, kBytes = 512;
constexpr int kHalf = 2 * kLanes;  // 16 fp16 numbers
// 8 rows of (low 4 bits of scale | low 4 bits of minimum << 4), then 4 rows with the high 2 bits of
// scale and minimum of group g in the low and of group g + 4 in the high nibble; 16 outputs a row.
constexpr int kScaleBytes = 12 * kLanes;

static constexpr FormatInfo kFormats[] = {
    {"a4", kGroup, kNibbles + kHalf},
    {"a4m", kGroup, kNibbles + 2 * kHalf},
    {"a5", kGroup, kNibbles + kPlane1 + kHalf},
    {"a5m", kGroup, kNibbles + kPlane1 + 2 * kHalf},
    {"a8", kGroup, kBytes + kHalf},
    {"k4", kSuper, 8 * kNibbles + kScaleBytes + 2 * kHalf},
    {"k5", kSuper, 8 * (kNibbles + kPlane1) + kScaleBytes + 2 * kHalf},
    {"k6", kSuper, 8 * (kNibbles + kPlane2) + 16 * kLanes + kHalf},
    {"f32", 1, 4 * kLanes},
    {"f16", 1, 2 * kLanes},
    {"bf16", 1, 2 * kLanes},
};

// Static: a copy compiled for one instruction set must not serve the others.
static constexpr const FormatInfo& info(Format format) { return kFormats[static_cast<int>(format)]; }
static constexpr bool is_group(Format f) { return f <= Format::kA8; }
static constexpr bool is_super(Format f) { return f >= Format::kK4 && f <= Format::kK6; }
static constexpr bool is_float(Format f) { return f >= Format::kF32; }
static constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Bytes of one block of 16 outputs, and of a whole matrix.
static inline int64_t block_bytes(Format f, int64_t cols) {
  return round_up(cols, info(f).step) / info(f).step * info(f).unit_bytes;
}
static inline int64_t packed_bytes(Format f, int64_t rows, int64_t cols) {
  return round_up(rows, kLanes) / kLanes * block_bytes(f, cols);
}

}  // namespace redwood
