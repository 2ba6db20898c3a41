// The logarithm in double by +, -, * and / alone, in one order: C libraries and NumPy's kernels differ
// in the last bit. redwood/sampling/_kernels_numpy.py does the same operations.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>

namespace redwood {

// Of a number that is 0 or positive and finite; error below one unit in the last place.
inline double log_of(double x) {
  if (x == 0.0) return -std::numeric_limits<double>::infinity();
  const bool small = x < 0x1p-1022;
  if (small) x *= 0x1p54;
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  int exponent = static_cast<int>(bits >> 52) - 1022 - (small ? 54 : 0);
  bits = (bits & 0xfffffffffffffu) | 0x3fe0000000000000u;  // [1/2, 1)
  double m;
  std::memcpy(&m, &bits, 8);
  if (m < 0x1.6a09e667f3bcdp-1) m += m, --exponent;  // [sqrt(1/2), sqrt(2))
  // log(1 + f) = 2 artanh(s) with s = f / (2 + f), of which 2s is f - f^2/2 + s f^2/2.
  const double f = m - 1.0, s = f / (2.0 + f), z = s * s, half = 0.5 * f * f;
  double r = 2.0 / 23.0;
  r = r * z + 2.0 / 21.0;
  r = r * z + 2.0 / 19.0;
  r = r * z + 2.0 / 17.0;
  r = r * z + 2.0 / 15.0;
  r = r * z + 2.0 / 13.0;
  r = r * z + 2.0 / 11.0;
  r = r * z + 2.0 / 9.0;
  r = r * z + 2.0 / 7.0;
  r = r * z + 2.0 / 5.0;
  r = r * z + 2.0 / 3.0;
  const double e = exponent;
  // log 2 in two parts, the first of 42 bits.
  const double low = s * (half + r * z) + e * 0x1.ef35793c76730p-45;
  return e * 0x1.62e42fefa38p-1 + (f - (half - low));
}

}  // namespace redwood
