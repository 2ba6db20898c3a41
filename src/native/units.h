// Units of quantised weights (a group of 32 or a super-block of 256 of one row) between a file and the
// packed layouts. Inside this library only.
#pragma once
#include <cstring>

#include "pack.h"

namespace redwood {

// One unit of one row, whatever the kind: unsigned quants or codes, and scales.
struct Unit {
  uint8_t q[kSuper];
  int8_t scale[16];   // per 16 (has_halves) or per 32: [8]
  uint8_t least[16];  // likewise
  uint16_t d, m;      // scale and minimum: fp16, A4X: bf16
  uint8_t table[kTable];  // T4, T3: numbers plus 128
  float step;             // T4, T3: multiplies d
};

// One unit of a quantised kind that is not held as floats. `p`: the block of the file.
void read_unit(const Kind& kind, const uint8_t* p, Unit& u);
// A block of NVFP4: 64 numbers.
void read_nvfp4(const uint8_t* p, float* out);

inline uint16_t half_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return bits;
}

inline uint32_t word_at(const uint8_t* p) {
  uint32_t bits;
  std::memcpy(&bits, p, 4);
  return bits;
}

inline float bf16_to_float(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// codebooks.cpp
extern const uint16_t kIq2xxs[256], kIq2xs[512], kIq2s[1024], kIq3xxs[256], kIq3s[512], kIq1[2048];

}  // namespace redwood
