#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace redwood {
namespace {

constexpr Kind kKinds[] = {
    {"Q4_0", 32, 18, Format::kA4},  {"Q4_1", 32, 20, Format::kA4M}, {"Q5_0", 32, 22, Format::kA5},
    {"Q5_1", 32, 24, Format::kA5M}, {"Q8_0", 32, 34, Format::kA8},  {"Q3_K", 256, 110, Format::kK6},
    {"Q4_K", 256, 144, Format::kK4}, {"Q5_K", 256, 176, Format::kK5}, {"Q6_K", 256, 210, Format::kK6},
    {"F32", 1, 4, Format::kF32},    {"F16", 1, 2, Format::kF16},    {"BF16", 1, 2, Format::kBF16},
};

// One unit (a group or a super-block) of one row, whatever the kind: unsigned quants and scales.
struct Unit {
  uint8_t q[kSuper];
  int8_t scale[16];  // K6: per 16; K4, K5: [8], unsigned
  uint8_t least[8];
  uint16_t d, m;  // fp16 scale and minimum
};

uint16_t half_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return bits;
}

uint32_t word_at(const uint8_t* p) {
  uint32_t bits;
  std::memcpy(&bits, p, 4);
  return bits;
}

void nibbles(const uint8_t* p, uint8_t* q) {
  for (int i = 0; i < 16; ++i) {
    q[i] = p[i] & 15;
    q[i + 16] = p[i] >> 4;
  }
}

void fifth_bits(uint32_t bits, uint8_t* q) {
  for (int i = 0; i < 32; ++i) q[i] |= static_cast<uint8_t>((bits >> i & 1) << 4);
}

// 6-bit scales and minima of Q4_K and Q5_K: eight of each in 12 bytes.
void six_bits(const uint8_t* p, Unit& u) {
  for (int g = 0; g < 4; ++g) {
    u.scale[g] = static_cast<int8_t>(p[g] & 63);
    u.least[g] = p[g + 4] & 63;
    u.scale[g + 4] = static_cast<int8_t>((p[g + 8] & 15) | (p[g] >> 6) << 4);
    u.least[g + 4] = static_cast<uint8_t>(p[g + 8] >> 4 | (p[g + 4] >> 6) << 4);
  }
}

void read_q3k(const uint8_t* p, Unit& u) {
  const uint8_t *high = p, *low = p + 32, *scales = p + 96;
  u.d = half_at(p + 108);
  for (int i = 0; i < 16; ++i) {
    const int nibble = i < 8 ? scales[i] & 15 : scales[i - 8] >> 4;
    u.scale[i] = static_cast<int8_t>((nibble | (scales[8 + i % 4] >> (2 * (i / 4)) & 3) << 4) - 32);
  }
  for (int e = 0; e < kSuper; ++e) {
    const int half = e / 128, turn = e % 128 / 32, at = e % 32;
    const int two = low[32 * half + at] >> (2 * turn) & 3;
    const int bit = high[at] >> (4 * half + turn) & 1;
    u.q[e] = static_cast<uint8_t>(two - (bit ? 0 : 4) + 32);
  }
}

void read_q6k(const uint8_t* p, Unit& u) {
  const uint8_t *low = p, *high = p + 128;
  std::memcpy(u.scale, p + 192, 16);
  u.d = half_at(p + 208);
  for (int e = 0; e < kSuper; ++e) {
    const int half = e / 128, turn = e % 128 / 32, at = e % 32;
    const uint8_t byte = low[64 * half + 32 * (turn % 2) + at];
    const int nibble = turn < 2 ? byte & 15 : byte >> 4;
    u.q[e] = static_cast<uint8_t>(nibble | (high[32 * half + at] >> (2 * turn) & 3) << 4);
  }
}

// One unit of a quantised kind. `p`: the block of the file.
void read_unit(const Kind& kind, const uint8_t* p, Unit& u) {
  u.d = half_at(p);
  u.m = half_at(p + 2);
  switch (kind.format) {
    case Format::kA4: return nibbles(p + 2, u.q);
    case Format::kA4M: return nibbles(p + 4, u.q);
    case Format::kA5: nibbles(p + 6, u.q); return fifth_bits(word_at(p + 2), u.q);
    case Format::kA5M: nibbles(p + 8, u.q); return fifth_bits(word_at(p + 4), u.q);
    case Format::kA8:
      for (int i = 0; i < 32; ++i) u.q[i] = p[2 + i] ^ 128;
      return;
    case Format::kK4:
    case Format::kK5: {
      const bool five = kind.format == Format::kK5;
      const uint8_t *high = p + 16, *low = p + (five ? 48 : 16);
      six_bits(p + 4, u);
      for (int e = 0; e < kSuper; ++e) {
        const uint8_t byte = low[32 * (e / 64) + e % 32];
        const int bit = five ? high[e % 32] >> (e / 32) & 1 : 0;
        u.q[e] = static_cast<uint8_t>((e % 64 < 32 ? byte & 15 : byte >> 4) | bit << 4);
      }
      return;
    }
    default: return kind.block_bytes == 110 ? read_q3k(p, u) : read_q6k(p, u);
  }
}

int bits_of(Format f) {
  switch (f) {
    case Format::kA4: case Format::kA4M: case Format::kK4: return 4;
    case Format::kA5: case Format::kA5M: case Format::kK5: return 5;
    case Format::kK6: return 6;
    default: return 8;
  }
}

int group_bytes(int bits) {
  return bits == 8 ? kBytes : kNibbles + (bits == 5 ? kPlane1 : bits == 6 ? kPlane2 : 0);
}

// The 32 quants of one output in a group; `out` is zeroed before the first output.
void put_group(const uint8_t* q, int bits, int lane, uint8_t* out) {
  for (int i = 0; i < kGroup; ++i) {
    const int t = i / 4, at = 4 * lane + i % 4;
    if (bits == 8) {
      out[64 * t + at] = q[i];
      continue;
    }
    out[64 * (t / 2) + at] |= static_cast<uint8_t>((q[i] & 15) << (4 * (t % 2)));
    if (bits == 5) out[kNibbles + at] |= static_cast<uint8_t>((q[i] >> 4) << t);
    if (bits == 6) {
      out[kNibbles + 64 * (t / 4) + at] |= static_cast<uint8_t>((q[i] >> 4) << (2 * (t % 4)));
    }
  }
}

void get_group(const uint8_t* in, int bits, int lane, uint8_t* q) {
  for (int i = 0; i < kGroup; ++i) {
    const int t = i / 4, at = 4 * lane + i % 4;
    if (bits == 8) {
      q[i] = in[64 * t + at];
      continue;
    }
    int v = in[64 * (t / 2) + at] >> (4 * (t % 2)) & 15;
    if (bits == 5) v |= (in[kNibbles + at] >> t & 1) << 4;
    if (bits == 6) v |= (in[kNibbles + 64 * (t / 4) + at] >> (2 * (t % 4)) & 3) << 4;
    q[i] = static_cast<uint8_t>(v);
  }
}

void put_half(uint8_t* out, int lane, uint16_t bits) { std::memcpy(out + 2 * lane, &bits, 2); }

void put_unit(Format f, const Unit& u, int lane, uint8_t* out) {
  const int bits = bits_of(f), bytes = group_bytes(bits);
  const bool super = is_super(f);
  for (int g = 0; g < (super ? 8 : 1); ++g, out += bytes) put_group(u.q + 32 * g, bits, lane, out);
  if (super && bits == 6) {
    for (int i = 0; i < 16; ++i) out[i * kLanes + lane] = static_cast<uint8_t>(u.scale[i]);
    out += 16 * kLanes;
  } else if (super) {
    for (int g = 0; g < 8; ++g) {
      const int s = u.scale[g], m = u.least[g];
      out[g * kLanes + lane] = static_cast<uint8_t>((s & 15) | (m & 15) << 4);
      out[(8 + g % 4) * kLanes + lane] |=
          static_cast<uint8_t>((s >> 4 | (m >> 4) << 2) << (g < 4 ? 0 : 4));
    }
    out += kScaleBytes;
  }
  put_half(out, lane, u.d);
  const bool minimum = f == Format::kA4M || f == Format::kA5M || (super && bits != 6);
  if (minimum) put_half(out + kHalf, lane, u.m);
}

// 8 bits: symmetric. 4 and 5 bits: symmetric or from the least value, as the format has it.
void quantise_unit(Format f, const float* x, int64_t count, Unit& u) {
  const int bits = bits_of(f), top = (1 << bits) - 1, middle = 1 << (bits - 1);
  const bool minimum = f == Format::kA4M || f == Format::kA5M;
  float least = 0, most = 0, peak = 0;
  for (int64_t i = 0; i < count; ++i) {
    least = std::min(least, x[i]);
    most = std::max(most, x[i]);
    if (std::fabs(x[i]) > std::fabs(peak)) peak = x[i];
  }
  // With few bits the largest value falls on -middle, which has no counterpart above.
  float scale = minimum ? (most - least) / static_cast<float>(top)
                : bits == 8 ? std::fabs(peak) / 127.0f
                            : peak / static_cast<float>(-middle);
  u.d = float_to_half(scale);
  u.m = float_to_half(least);
  scale = half_to_float(u.d);
  const float from = minimum ? half_to_float(u.m) : 0.0f;
  for (int64_t i = 0; i < kGroup; ++i) {
    const float v = i < count && scale != 0 ? (x[i] - from) / scale : 0.0f;
    const int q = static_cast<int>(std::lrintf(v)) + (minimum ? 0 : middle);
    u.q[i] = static_cast<uint8_t>(std::clamp(q, bits == 8 ? 1 : 0, top));
  }
}

void put_float(Format f, float x, uint8_t* out, int lane) {
  if (f == Format::kF32) {
    std::memcpy(out + 4 * lane, &x, 4);
  } else if (f == Format::kF16) {
    put_half(out, lane, float_to_half(x));
  } else {  // to the nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
    put_half(out, lane, static_cast<uint16_t>(rounded >> 16));
  }
}

// Numbers of a unit of a quantised format.
void unit_numbers(Format f, const Unit& u, float* out) {
  const float d = half_to_float(u.d), m = half_to_float(u.m);
  const bool minimum = f == Format::kA4M || f == Format::kA5M;
  for (int i = 0; i < info(f).step; ++i) {
    const float q = u.q[i];
    if (is_group(f)) {
      out[i] = minimum ? d * q + m : d * (q - static_cast<float>(1 << (bits_of(f) - 1)));
    } else if (f == Format::kK6) {
      out[i] = d * static_cast<float>(u.scale[i / 16]) * (q - 32.0f);
    } else {
      out[i] = d * static_cast<float>(u.scale[i / 32]) * q - m * static_cast<float>(u.least[i / 32]);
    }
  }
}

}  // namespace

const Kind* find_kind(const std::string& name) {
  for (const Kind& kind : kKinds) {
    if (name == kind.name) return &kind;
  }
  return nullptr;
}

Format find_format(const std::string& name) {
  for (int f = 0; f < static_cast<int>(Format::kCount); ++f) {
    if (name == kFormats[f].name) return static_cast<Format>(f);
  }
  return Format::kCount;
}

float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  float x;
  if (rest >= 0x7c00u) {  // a NaN becomes a quiet one, as in the processors' own conversions
    const uint32_t quiet = rest > 0x7c00u ? 0x400000u : 0u;
    const uint32_t all = sign | 0x7f800000u | quiet | (rest & 0x3ffu) << 13;
    std::memcpy(&x, &all, 4);
    return x;
  }
  if (rest < 0x400u) {  // whole steps of 2^-24: a caller may have switched subnormal floats off
    x = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -x : x;
  }
  const uint32_t shifted = rest << 13;  // exponent and fraction in place, the bias still wrong
  std::memcpy(&x, &shifted, 4);
  x *= 5.192296858534828e33f;  // 2^112
  return sign ? -x : x;
}

uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (bits >> 13 & 0x3ffu));
  if (bits >= 0x47800000u) return sign | 0x7c00u;
  if (bits < 0x38800000u) {  // subnormal: the adder rounds for us
    float tiny;
    std::memcpy(&tiny, &bits, 4);
    tiny += 0.5f;
    std::memcpy(&bits, &tiny, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  bits += 0xfffu + (bits >> 13 & 1u);
  return sign | static_cast<uint16_t>((bits - 0x38000000u) >> 13);
}

void read_row(const Kind& kind, const uint8_t* row, int64_t cols, float* out) {
  if (is_float(kind.format)) {
    for (int64_t i = 0; i < cols; ++i) {
      if (kind.format == Format::kF32) {
        std::memcpy(out + i, row + 4 * i, 4);
      } else if (kind.format == Format::kF16) {
        out[i] = half_to_float(half_at(row + 2 * i));
      } else {
        const uint32_t bits = static_cast<uint32_t>(half_at(row + 2 * i)) << 16;
        std::memcpy(out + i, &bits, 4);
      }
    }
    return;
  }
  Unit unit{};
  for (int64_t i = 0; i < cols; i += kind.step, row += kind.block_bytes, out += kind.step) {
    read_unit(kind, row, unit);
    unit_numbers(kind.format, unit, out);
  }
}

void pack_blocks(const Kind& kind, const uint8_t* rows, int64_t row_count, int64_t cols,
                 const int32_t* order, Format format, uint8_t* out, int64_t first, int64_t last) {
  const int64_t row_bytes = cols / kind.step * kind.block_bytes, bytes = block_bytes(format, cols);
  const int step = info(format).step, unit_bytes = info(format).unit_bytes;
  std::vector<float> numbers(static_cast<size_t>(cols));
  Unit unit{};
  for (int64_t block = first; block < last; ++block) {
    uint8_t* to = out + block * bytes;
    std::memset(to, 0, static_cast<size_t>(bytes));
    for (int lane = 0; lane < kLanes && block * kLanes + lane < row_count; ++lane) {
      const int64_t r = block * kLanes + lane;
      const uint8_t* from = rows + (order ? order[r] : r) * row_bytes;
      const bool anew = is_float(kind.format) || kind.format != format;  // through floats
      if (anew) read_row(kind, from, cols, numbers.data());
      uint8_t* at = to;
      for (int64_t i = 0; i < cols; i += step, at += unit_bytes) {
        if (is_float(format)) {
          put_float(format, numbers[static_cast<size_t>(i)], at, lane);
        } else if (anew) {
          quantise_unit(format, numbers.data() + i, std::min<int64_t>(kGroup, cols - i), unit);
          put_unit(format, unit, lane, at);
        } else {
          read_unit(kind, from + i / step * kind.block_bytes, unit);
          put_unit(format, unit, lane, at);
        }
      }
    }
  }
}

void unpack_row(Format format, const uint8_t* packed, int64_t cols, int64_t row, float* out) {
  const uint8_t* at = packed + row / kLanes * block_bytes(format, cols);
  const int lane = static_cast<int>(row % kLanes), step = info(format).step;
  if (is_float(format)) {
    const Kind& kind = kKinds[9 + static_cast<int>(format) - static_cast<int>(Format::kF32)];
    for (int64_t i = 0; i < cols; ++i, at += info(format).unit_bytes) {
      read_row(kind, at + kind.block_bytes * lane, 1, out + i);
    }
    return;
  }
  const int bits = bits_of(format), bytes = group_bytes(bits), groups = step / kGroup;
  Unit u{};
  float numbers[kSuper];
  for (int64_t i = 0; i < cols; i += step, at += info(format).unit_bytes) {
    for (int g = 0; g < groups; ++g) get_group(at + g * bytes, bits, lane, u.q + kGroup * g);
    const uint8_t* s = at + groups * bytes;
    if (format == Format::kK6) {
      for (int k = 0; k < 16; ++k) u.scale[k] = static_cast<int8_t>(s[k * kLanes + lane]);
      s += 16 * kLanes;
    } else if (is_super(format)) {
      for (int g = 0; g < 8; ++g) {
        const int low = s[g * kLanes + lane];
        const int high = s[(8 + g % 4) * kLanes + lane] >> (g < 4 ? 0 : 4);
        u.scale[g] = static_cast<int8_t>((low & 15) | (high & 3) << 4);
        u.least[g] = static_cast<uint8_t>(low >> 4 | (high >> 2 & 3) << 4);
      }
      s += kScaleBytes;
    }
    u.d = half_at(s + 2 * lane);
    u.m = format == Format::kK6 || format == Format::kA4 || format == Format::kA5 ||
                  format == Format::kA8
              ? 0
              : half_at(s + kHalf + 2 * lane);
    unit_numbers(format, u, numbers);
    const int64_t count = std::min<int64_t>(step, cols - i);
    std::copy(numbers, numbers + count, out + i);
  }
}

}  // namespace redwood
