// Sine and cosine in double by +, - and * alone, in one order: C libraries differ in the last bit, and
// rotary positions must be the same numbers everywhere. Right only where nothing is fused unasked
// (-ffp-contract=off).
#pragma once
#include <cstdint>
#include <cstring>

namespace redwood {

struct SineCosine {
  double sine, cosine;
};

constexpr float kMostAngle = 1e7f;

// Of an angle of at most kMostAngle by amount; error below one unit in the last place of a double.
inline SineCosine sine_cosine(float angle) {
  const double x = angle;
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to whole numbers
  // pi / 2 in three parts. Those of 30 bits times a whole number below 2^23 are exact, and no float
  // is so near to a quarter turn that the third would be too short.
  constexpr double kFirst = 0x1.921fb54p+0, kSecond = 0x1.10b46118p-30;
  constexpr double kThird = 0x1.313198a2e0370p-61;
  const double shifted = x * 0x1.45f306dc9c883p-1 + kShift;
  const double n = shifted - kShift;
  const double first = x - n * kFirst, second = n * kSecond;
  const double rough = first - second;
  // What the subtraction lost (Knuth, The Art of Computer Programming 2, 4.2.2, theorem B).
  const double back = rough - first;
  const double rest = ((first - (rough - back)) - (second + back)) - n * kThird;
  const double y = rough + rest, low = (rough - y) + rest;  // in [-pi/4, pi/4], by their sum

  const double z = y * y;
  double s = 1.0 / 355687428096000.0;
  s = s * z - 1.0 / 1307674368000.0;
  s = s * z + 1.0 / 6227020800.0;
  s = s * z - 1.0 / 39916800.0;
  s = s * z + 1.0 / 362880.0;
  s = s * z - 1.0 / 5040.0;
  s = s * z + 1.0 / 120.0;
  s = s * z - 1.0 / 6.0;
  const double half = 0.5 * z;
  const double sine = y + (z * y * s + low * (1.0 - half));
  double c = -1.0 / 6402373705728000.0;
  c = c * z + 1.0 / 20922789888000.0;
  c = c * z - 1.0 / 87178291200.0;
  c = c * z + 1.0 / 479001600.0;
  c = c * z - 1.0 / 3628800.0;
  c = c * z + 1.0 / 40320.0;
  c = c * z - 1.0 / 720.0;
  c = c * z + 1.0 / 24.0;
  const double near = 1.0 - half;
  const double cosine = near + (((1.0 - near) - half) + (z * z * c - y * low));

  uint64_t bits;
  std::memcpy(&bits, &shifted, 8);
  switch (bits & 3) {  // quarter turns
    case 0: return {sine, cosine};
    case 1: return {cosine, -sine};
    case 2: return {-sine, -cosine};
    default: return {-cosine, sine};
  }
}

}  // namespace redwood
