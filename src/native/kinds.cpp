// The kinds of weights that GGUF files hold: how a block of each is read.
#include <iterator>

#include "units.h"

namespace redwood {
namespace {

// As in ggml: which codebook, codes of which width, where parts of a block stand.
constexpr Kind kKinds[] = {
    {"Q4_0", 32, 18, Format::kA4},      {"Q4_1", 32, 20, Format::kA4M},
    {"Q5_0", 32, 22, Format::kA5},      {"Q5_1", 32, 24, Format::kA5M},
    {"Q8_0", 32, 34, Format::kA8},      {"Q2_K", 256, 84, Format::kK2},
    {"Q3_K", 256, 110, Format::kK6},    {"Q4_K", 256, 144, Format::kK4},
    {"Q5_K", 256, 176, Format::kK5},    {"Q6_K", 256, 210, Format::kK6},
    {"IQ4_NL", 32, 18, Format::kA4N},   {"MXFP4", 32, 17, Format::kA4X},
    {"IQ4_XS", 256, 136, Format::kT4},  {"IQ3_S", 256, 110, Format::kT4},
    {"IQ3_XXS", 256, 98, Format::kT4},  {"IQ2_S", 256, 82, Format::kT3},
    {"IQ2_XS", 256, 74, Format::kT3},   {"IQ2_XXS", 256, 66, Format::kT3},
    {"IQ1_S", 256, 50, Format::kT3},    {"IQ1_M", 256, 56, Format::kT3},
    {"TQ1_0", 256, 54, Format::kK2},    {"TQ2_0", 256, 66, Format::kK2},
    {"NVFP4", 64, 36, Format::kBF16},   {"F32", 1, 4, Format::kF32},
    {"F16", 1, 2, Format::kF16},        {"BF16", 1, 2, Format::kBF16},
};

uint8_t nibble_at(const uint8_t* p, int i) {
  return static_cast<uint8_t>(i % 2 ? p[i / 2] >> 4 : p[i / 2] & 15);
}

// 32 of them: low nibbles first.
void nibbles(const uint8_t* p, uint8_t* q) {
  for (int i = 0; i < 16; ++i) {
    q[i] = p[i] & 15;
    q[i + 16] = p[i] >> 4;
  }
}

void fifth_bits(uint32_t bits, uint8_t* q) {
  for (int i = 0; i < 32; ++i) q[i] |= static_cast<uint8_t>((bits >> i & 1) << 4);
}

// 256 pairs of bits: four lines of 32 inputs in each 32 bytes.
void pairs_of_bits(const uint8_t* p, uint8_t* q) {
  for (int e = 0; e < kSuper; ++e) q[e] = p[32 * (e / 128) + e % 32] >> (2 * (e % 128 / 32)) & 3;
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

void read_q2k(const uint8_t* p, Unit& u) {
  for (int i = 0; i < 16; ++i) {
    u.scale[i] = static_cast<int8_t>(p[i] & 15);
    u.least[i] = p[i] >> 4;
  }
  pairs_of_bits(p + 16, u.q);
  u.d = half_at(p + 80);
  u.m = half_at(p + 82);
}

void read_q3k(const uint8_t* p, Unit& u) {
  const uint8_t *high = p, *low = p + 32, *scales = p + 96;
  u.d = half_at(p + 108);
  pairs_of_bits(low, u.q);
  for (int i = 0; i < 16; ++i) {
    const int nibble = i < 8 ? scales[i] & 15 : scales[i - 8] >> 4;
    u.scale[i] = static_cast<int8_t>((nibble | (scales[8 + i % 4] >> (2 * (i / 4)) & 3) << 4) - 32);
  }
  for (int e = 0; e < kSuper; ++e) {
    const int bit = high[e % 32] >> (e / 32) & 1;
    u.q[e] = static_cast<uint8_t>(u.q[e] - (bit ? 0 : 4) + 32);
  }
}

void read_q45k(const uint8_t* p, bool five, Unit& u) {
  const uint8_t *high = p + 16, *low = p + (five ? 48 : 16);
  six_bits(p + 4, u);
  for (int e = 0; e < kSuper; ++e) {
    const uint8_t byte = low[32 * (e / 64) + e % 32];
    const int bit = five ? high[e % 32] >> (e / 32) & 1 : 0;
    u.q[e] = static_cast<uint8_t>((e % 64 < 32 ? byte & 15 : byte >> 4) | bit << 4);
  }
}

void read_q6k(const uint8_t* p, Unit& u) {
  const uint8_t *low = p, *high = p + 128;
  std::memcpy(u.scale, p + 192, 16);
  u.d = half_at(p + 208);
  pairs_of_bits(high, u.q);
  for (int e = 0; e < kSuper; ++e) {
    const uint8_t byte = low[64 * (e / 128) + 32 * (e / 32 % 2) + e % 32];
    u.q[e] = static_cast<uint8_t>((e % 128 < 64 ? byte & 15 : byte >> 4) | u.q[e] << 4);
  }
}

// Ternary kinds have one scale and numbers from -1: in K2, a scale and a minimum of 1 times d.
void ternary(uint16_t d, Unit& u) {
  std::memset(u.scale, 1, sizeof u.scale);
  std::memset(u.least, 1, sizeof u.least);
  u.d = u.m = d;
}

// Five digits to the base 3 in a byte, as a fraction of 256: a digit is what a third carries over.
uint8_t digit(uint8_t byte, int place) {
  static constexpr uint8_t powers[] = {1, 3, 9, 27, 81};
  const auto rest = static_cast<uint8_t>(byte * powers[place]);
  return static_cast<uint8_t>(rest * 3 >> 8);
}

void read_tq1(const uint8_t* p, Unit& u) {
  for (int e = 0; e < 160; ++e) u.q[e] = digit(p[e % 32], e / 32);
  for (int e = 0; e < 80; ++e) u.q[160 + e] = digit(p[32 + e % 16], e / 16);
  for (int e = 0; e < 16; ++e) u.q[240 + e] = digit(p[48 + e % 4], e / 4);
  ternary(half_at(p + 52), u);
}

// Numbers less than `count`, then the same with the other sign, from code `negative` on.
void signed_table(Unit& u, std::initializer_list<int> numbers, int negative, float step) {
  std::memset(u.table, 128, sizeof u.table);
  int i = 0;
  for (int n : numbers) {
    u.table[i] = static_cast<uint8_t>(128 + n);
    u.table[negative + i++] = static_cast<uint8_t>(128 - n);
  }
  u.step = step;
}
void table_iq2(Unit& u) { signed_table(u, {8, 25, 43}, 4, 0.125f); }
void table_iq1(Unit& u) { signed_table(u, {-7, 1, 9}, 4, 0.125f); }

// Seven signs; the eighth makes their number even.
uint8_t even_signs(uint32_t bits) {
  bits &= 127;
  uint32_t odd = bits;
  odd ^= odd >> 4, odd ^= odd >> 2, odd ^= odd >> 1;
  return static_cast<uint8_t>(bits | (odd & 1) << 7);
}

// Eight numbers of IQ2 kinds.
void eight(uint16_t point, uint8_t signs, uint8_t* q) {
  for (int i = 0; i < 8; ++i) {
    q[i] = static_cast<uint8_t>((point >> 2 * i & 3) | (signs >> i & 1) << 2);
  }
}
// Eight numbers of IQ1 kinds, all moved by 1/8 or by -1/8. In terms of the table, -7, 1 and 9 eighths or
// their opposites: the index counts from the other end.
void eight_moved(uint16_t point, bool down, uint8_t* q) {
  for (int i = 0; i < 8; ++i) {
    const int index = point >> 2 * i & 3;
    q[i] = static_cast<uint8_t>(down ? 4 + 2 - index : index);
  }
}
// Twice four numbers of IQ3 kinds.
void twice_four(uint16_t first, uint16_t second, uint8_t signs, uint8_t* q) {
  for (int i = 0; i < 8; ++i) {
    const int point = i < 4 ? first : second;
    q[i] = static_cast<uint8_t>((point >> 3 * (i % 4) & 7) | (signs >> i & 1) << 3);
  }
}

void read_iq4xs(const uint8_t* p, Unit& u) {
  const uint32_t high = half_at(p + 2);
  u.d = half_at(p);
  for (int g = 0; g < 8; ++g) {
    const uint32_t six = nibble_at(p + 4, g) | (high >> 2 * g & 3) << 4;
    u.scale[g] = static_cast<int8_t>(static_cast<int>(six) - 32);
    nibbles(p + 8 + 16 * g, u.q + 32 * g);
  }
  std::memcpy(u.table, kNonlinear, kTable);
  u.step = 1.0f;
}

void read_iq3s(const uint8_t* p, Unit& u) {
  const uint8_t *points = p + 2, *high = p + 66, *signs = p + 74, *scales = p + 106;
  u.d = half_at(p);
  for (int g = 0; g < 8; ++g) u.scale[g] = static_cast<int8_t>(2 * nibble_at(scales, g) + 1);
  for (int i = 0; i < 32; ++i) {
    const int a = points[2 * i] | (high[i / 4] >> (2 * i % 8) & 1) << 8;
    const int b = points[2 * i + 1] | (high[i / 4] >> (2 * i % 8 + 1) & 1) << 8;
    twice_four(kIq3s[a], kIq3s[b], signs[i], u.q + 8 * i);
  }
  signed_table(u, {1, 3, 5, 7, 9, 11, 13, 15}, 8, 1.0f);
}

void read_iq3xxs(const uint8_t* p, Unit& u) {
  u.d = half_at(p);
  for (int g = 0; g < 8; ++g) {
    const uint8_t* points = p + 2 + 8 * g;
    const uint32_t rest = word_at(p + 66 + 4 * g);
    u.scale[g] = static_cast<int8_t>(2 * (rest >> 28) + 1);
    for (int i = 0; i < 4; ++i) {
      twice_four(kIq3xxs[points[2 * i]], kIq3xxs[points[2 * i + 1]], even_signs(rest >> 7 * i),
                 u.q + 32 * g + 8 * i);
    }
  }
  signed_table(u, {2, 6, 10, 14, 18, 22, 26, 31}, 8, 0.5f);
}

void read_iq2xxs(const uint8_t* p, Unit& u) {
  u.d = half_at(p);
  for (int g = 0; g < 8; ++g) {
    const uint8_t* points = p + 2 + 8 * g;
    const uint32_t rest = word_at(points + 4);
    u.scale[2 * g] = u.scale[2 * g + 1] = static_cast<int8_t>(2 * (rest >> 28) + 1);
    for (int i = 0; i < 4; ++i) {
      eight(kIq2xxs[points[i]], even_signs(rest >> 7 * i), u.q + 32 * g + 8 * i);
    }
  }
  table_iq2(u);
}

void read_iq2xs(const uint8_t* p, Unit& u) {
  u.d = half_at(p);
  for (int i = 0; i < 16; ++i) u.scale[i] = static_cast<int8_t>(2 * nibble_at(p + 66, i) + 1);
  for (int i = 0; i < 32; ++i) {
    const uint32_t both = half_at(p + 2 + 2 * i);
    eight(kIq2xs[both & 511], even_signs(both >> 9), u.q + 8 * i);
  }
  table_iq2(u);
}

void read_iq2s(const uint8_t* p, Unit& u) {
  const uint8_t *points = p + 2, *signs = p + 34, *high = p + 66;
  u.d = half_at(p);
  for (int i = 0; i < 16; ++i) u.scale[i] = static_cast<int8_t>(2 * nibble_at(p + 74, i) + 1);
  for (int i = 0; i < 32; ++i) {
    const int point = points[i] | (high[i / 4] >> (2 * (i % 4)) & 3) << 8;
    eight(kIq2s[point], signs[i], u.q + 8 * i);
  }
  table_iq2(u);
}

void read_iq1s(const uint8_t* p, Unit& u) {
  u.d = half_at(p);
  for (int g = 0; g < 8; ++g) {
    const uint32_t rest = half_at(p + 34 + 2 * g);
    u.scale[2 * g] = u.scale[2 * g + 1] = static_cast<int8_t>(2 * (rest >> 12 & 7) + 1);
    for (int i = 0; i < 4; ++i) {
      const uint32_t point = p[2 + 4 * g + i] | (rest >> 3 * i & 7) << 8;
      eight_moved(kIq1[point], (rest >> 15) != 0, u.q + 32 * g + 8 * i);
    }
  }
  table_iq1(u);
}

void read_iq1m(const uint8_t* p, Unit& u) {
  const uint8_t *high = p + 32, *scales = p + 48;
  uint32_t d = 0;  // a nibble in each of four words of scales
  for (int k = 0; k < 4; ++k) d |= static_cast<uint32_t>(half_at(scales + 2 * k) >> 12) << 4 * k;
  u.d = static_cast<uint16_t>(d);
  for (int i = 0; i < 16; ++i) {
    const int three = half_at(scales + i / 4 * 2) >> (3 * (i % 4)) & 7;
    u.scale[i] = static_cast<int8_t>(2 * three + 1);
  }
  for (int i = 0; i < 32; ++i) {
    const uint32_t rest = nibble_at(high, i);
    eight_moved(kIq1[p[i] | (rest & 7) << 8], (rest & 8) != 0, u.q + 8 * i);
  }
  table_iq1(u);
}

// bf16 bits of half the power of two that a byte means; the least two are subnormal.
uint16_t half_power(uint8_t e) {
  return static_cast<uint16_t>(e < 2 ? 0x20 << e : (e - 1) << 7);
}

}  // namespace

const Kind* find_kind(const std::string& name) {
  for (const Kind& kind : kKinds) {
    if (name == kind.name) return &kind;
  }
  return nullptr;
}

void read_unit(const Kind& kind, const uint8_t* p, Unit& u) {
  u.d = half_at(p);
  u.m = half_at(p + 2);
  switch (kind.format) {
    case Format::kA4: case Format::kA4N: return nibbles(p + 2, u.q);
    case Format::kA4M: return nibbles(p + 4, u.q);
    case Format::kA4X: u.d = half_power(*p); return nibbles(p + 1, u.q);
    case Format::kA5: nibbles(p + 6, u.q); return fifth_bits(word_at(p + 2), u.q);
    case Format::kA5M: nibbles(p + 8, u.q); return fifth_bits(word_at(p + 4), u.q);
    case Format::kA8:
      for (int i = 0; i < 32; ++i) u.q[i] = p[2 + i] ^ 128;
      return;
    case Format::kK4: case Format::kK5: return read_q45k(p, kind.format == Format::kK5, u);
    case Format::kK6: return kind.block_bytes == 110 ? read_q3k(p, u) : read_q6k(p, u);
    default: break;
  }
  switch (kind.block_bytes) {  // the kinds that share a layout differ in size
    case 50: return read_iq1s(p, u);
    case 54: return read_tq1(p, u);
    case 56: return read_iq1m(p, u);
    case 66:
      if (kind.format == Format::kT3) return read_iq2xxs(p, u);
      pairs_of_bits(p, u.q);  // TQ2_0
      return ternary(half_at(p + 64), u);
    case 74: return read_iq2xs(p, u);
    case 82: return read_iq2s(p, u);
    case 84: return read_q2k(p, u);
    case 98: return read_iq3xxs(p, u);
    case 110: return read_iq3s(p, u);
    default: return read_iq4xs(p, u);
  }
}

void read_nvfp4(const uint8_t* p, float* out) {
  for (int i = 0; i < 64; ++i) {
    const uint8_t scale = p[i / 16], *pair = p + 4 + i / 16 * 8 + i % 8;
    const uint16_t bits = scale == 0x7f ? 0 : static_cast<uint16_t>((scale & 0x7f) << 7);
    // As fp16 a power of 2^8 less; half of it, as the numbers are doubled.
    const float d = half_to_float(bits) * 128.0f;
    out[i] = d * static_cast<float>(kFp4[i % 16 < 8 ? *pair & 15 : *pair >> 4] - 128);
  }
}

}  // namespace redwood
