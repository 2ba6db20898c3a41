// Packed weight formats. One layout serves every instruction set.
//
// Outputs come in blocks of 16, inputs in groups of 32. Within a group, inputs come in quads of 4: a
// 64-byte line holds 16 outputs x 4 inputs, so one register of any width holds whole outputs, and an
// 8-bit dot product of a line with 4 broadcast activations adds to one 32-bit sum per output.
// Line j of 4-bit values holds quad 2j in its low and quad 2j+1 in its high nibbles; line j of 2-bit
// values holds quads 4j to 4j+3, from the lowest bits up; a line of single bits holds eight quads.
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
  kA4N,  // 4 bits that choose one of IQ4_NL's 16 numbers, a scale per group of 32
  kA4X,  // 4 bits that choose one of MXFP4's, a scale in bf16 per group of 32
  kK2,   // 2 bits, 4-bit scales and minima per 16 in a super-block of 256 (Q2_K, TQ1_0, TQ2_0)
  kT4,   // 4 bits that choose from the matrix's own table, 8-bit scales per 32 in a super-block of 256
         // (IQ4_XS, IQ3_S, IQ3_XXS)
  kT3,   // 3 bits, likewise, scales per 16 (IQ2_S, IQ2_XS, IQ2_XXS, IQ1_S, IQ1_M)
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
// K2: 8 groups of quants, then scale | minimum << 4 [16 groups of 16][16 outputs], fp16 d [16], dmin [16].
// T4, T3: 8 groups of codes, then int8 scales [8 or 16][16 outputs], fp16 d [16], then what is the same in
// all units of a matrix: 16 numbers, each plus 128, a float that multiplies d, and 12 zeros.
constexpr int kNibbles = 256, kPlane1 = 64, kPlane2 = 128, kBytes = 512;
constexpr int kHalf = 2 * kLanes;  // 16 fp16 numbers
constexpr int kTable = 16, kTableBytes = 32;
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
    {"a4n", kGroup, kNibbles + kHalf},
    {"a4x", kGroup, kNibbles + kHalf},
    {"k2", kSuper, 8 * kPlane2 + 16 * kLanes + 2 * kHalf},
    {"t4", kSuper, 8 * kNibbles + 8 * kLanes + kHalf + kTableBytes},
    {"t3", kSuper, 8 * (kPlane2 + kPlane1) + 16 * kLanes + kHalf + kTableBytes},
};

// Numbers of IQ4_NL (IQ4_XS has them in its units) and of MXFP4, each plus 128.
static constexpr uint8_t kNonlinear[kTable] = {1,   24,  45,  63,  79,  93,  106, 118,
                                               129, 141, 153, 166, 181, 197, 217, 241};
static constexpr uint8_t kFp4[kTable] = {128, 129, 130, 131, 132, 134, 136, 140,
                                         128, 127, 126, 125, 124, 122, 120, 116};

// Static: a copy compiled for one instruction set must not serve the others.
static constexpr const FormatInfo& info(Format format) { return kFormats[static_cast<int>(format)]; }
static constexpr bool is_float(Format f) { return f >= Format::kF32 && f <= Format::kBF16; }
static constexpr bool is_group(Format f) { return info(f).step == kGroup; }
static constexpr bool is_super(Format f) { return info(f).step == kSuper; }
// Codes choose numbers of a table, one for the whole matrix.
static constexpr bool is_table(Format f) {
  return f == Format::kA4N || f == Format::kA4X || f == Format::kT4 || f == Format::kT3;
}
// An explicit minimum, beside the scale.
static constexpr bool has_minimum(Format f) {
  return f == Format::kA4M || f == Format::kA5M || f == Format::kK4 || f == Format::kK5 ||
         f == Format::kK2;
}
// Scales of a super-block are for 16 inputs, not for 32.
static constexpr bool has_halves(Format f) {
  return f == Format::kK6 || f == Format::kK2 || f == Format::kT3;
}
static constexpr int bits_of(Format f) {
  switch (f) {
    case Format::kK2: return 2;
    case Format::kT3: return 3;
    case Format::kA5: case Format::kA5M: case Format::kK5: return 5;
    case Format::kK6: return 6;
    case Format::kA8: return 8;
    default: return 4;
  }
}
// Bytes of a group of quants of 16 outputs: nibbles and planes of higher bits, planes, or bytes.
static constexpr int group_bytes(int bits) {
  return bits == 8 ? kBytes
                   : (bits >= 4 ? kNibbles : kPlane2) + (bits == 3 || bits == 5 ? kPlane1 : 0) +
                         (bits == 6 ? kPlane2 : 0);
}
// Bytes of what multiplies the groups of a super-block.
static constexpr int scale_bytes_of(Format f) {
  return has_halves(f) ? 16 * kLanes : f == Format::kT4 ? 8 * kLanes : kScaleBytes;
}
static constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Bytes of one block of 16 outputs, and of a whole matrix.
static inline int64_t block_bytes(Format f, int64_t cols) {
  return round_up(cols, info(f).step) / info(f).step * info(f).unit_bytes;
}
static inline int64_t packed_bytes(Format f, int64_t rows, int64_t cols) {
  return round_up(rows, kLanes) / kLanes * block_bytes(f, cols);
}

}  // namespace redwood
