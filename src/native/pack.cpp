#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "units.h"

namespace redwood {
namespace {

// The 32 quants of one output in a group; `out` is zeroed before the first output.
void put_group(const uint8_t* q, int bits, int lane, uint8_t* out) {
  for (int i = 0; i < kGroup; ++i) {
    const int t = i / 4, at = 4 * lane + i % 4;
    if (bits == 8) {
      out[64 * t + at] = q[i];
      continue;
    }
    if (bits < 4) {
      out[64 * (t / 4) + at] |= static_cast<uint8_t>((q[i] & 3) << (2 * (t % 4)));
      if (bits == 3) out[kPlane2 + at] |= static_cast<uint8_t>((q[i] >> 2) << t);
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
    if (bits < 4) {
      q[i] = in[64 * (t / 4) + at] >> (2 * (t % 4)) & 3;
      if (bits == 3) q[i] |= static_cast<uint8_t>((in[kPlane2 + at] >> t & 1) << 2);
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
  if (super && (!has_minimum(f) || has_halves(f))) {
    for (int i = 0; i < scale_bytes_of(f) / kLanes; ++i) {
      const int least = has_minimum(f) ? u.least[i] << 4 : 0;
      out[i * kLanes + lane] = static_cast<uint8_t>(u.scale[i] | least);
    }
    out += scale_bytes_of(f);
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
  if (has_minimum(f)) put_half(out + kHalf, lane, u.m);
  if (super && is_table(f)) {
    std::memcpy(out + kHalf, u.table, kTable);
    std::memcpy(out + kHalf + kTable, &u.step, sizeof u.step);
  }
}

// 8 bits: symmetric. 4 and 5 bits: symmetric or from the least value, as the format has it.
void quantise_unit(Format f, const float* x, int64_t count, Unit& u) {
  const int bits = bits_of(f), top = (1 << bits) - 1, middle = 1 << (bits - 1);
  const bool minimum = has_minimum(f);
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
  const float d = f == Format::kA4X ? bf16_to_float(u.d) : half_to_float(u.d);
  const float m = half_to_float(u.m);
  const uint8_t* table = f == Format::kA4N ? kNonlinear : f == Format::kA4X ? kFp4 : u.table;
  for (int i = 0; i < info(f).step; ++i) {
    const int part = has_halves(f) ? i / 16 : i / 32;
    const float q = is_table(f) ? static_cast<float>(table[u.q[i]] - 128) : u.q[i];
    if (is_group(f)) {
      const float middle = is_table(f) ? 0.0f : static_cast<float>(1 << (bits_of(f) - 1));
      out[i] = has_minimum(f) ? d * q + m : d * (q - middle);
    } else if (has_minimum(f)) {
      out[i] = d * static_cast<float>(u.scale[part]) * q - m * static_cast<float>(u.least[part]);
    } else {
      const float by = is_table(f) ? d * u.step : d;  // powers of two: exact
      out[i] = by * static_cast<float>(u.scale[part]) * (is_table(f) ? q : q - 32.0f);
    }
  }
}

// One number of a float format, at `p`.
float float_at(Format f, const uint8_t* p) {
  if (f == Format::kF16) return half_to_float(half_at(p));
  if (f == Format::kBF16) return bf16_to_float(half_at(p));
  float x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

}  // namespace

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
  if (kind.step == 1) {
    for (int64_t i = 0; i < cols; ++i) out[i] = float_at(kind.format, row + i * kind.block_bytes);
    return;
  }
  Unit unit{};
  for (int64_t i = 0; i < cols; i += kind.step, row += kind.block_bytes, out += kind.step) {
    if (is_float(kind.format)) {
      read_nvfp4(row, out);
      continue;
    }
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
    const int bytes = info(format).unit_bytes;
    for (int64_t i = 0; i < cols; ++i) out[i] = float_at(format, at + i * bytes + bytes / kLanes * lane);
    return;
  }
  const int bits = bits_of(format), bytes = group_bytes(bits), groups = step / kGroup;
  Unit u{};
  float numbers[kSuper];
  for (int64_t i = 0; i < cols; i += step, at += info(format).unit_bytes) {
    for (int g = 0; g < groups; ++g) get_group(at + g * bytes, bits, lane, u.q + kGroup * g);
    const uint8_t* s = at + groups * bytes;
    if (is_super(format) && (!has_minimum(format) || has_halves(format))) {
      for (int k = 0; k < scale_bytes_of(format) / kLanes; ++k) {
        const uint8_t both = s[k * kLanes + lane];
        u.scale[k] = static_cast<int8_t>(has_minimum(format) ? both & 15 : both);
        u.least[k] = both >> 4;
      }
      s += scale_bytes_of(format);
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
    u.m = has_minimum(format) ? half_at(s + kHalf + 2 * lane) : 0;
    if (is_super(format) && is_table(format)) {
      std::memcpy(u.table, s + kHalf, kTable);
      std::memcpy(&u.step, s + kHalf + kTable, sizeof u.step);
    }
    unit_numbers(format, u, numbers);
    const int64_t count = std::min<int64_t>(step, cols - i);
    std::copy(numbers, numbers + count, out + i);
  }
}

}  // namespace redwood
