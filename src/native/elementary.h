// Logarithm and exponential in double by +, -, * and / alone, in one order: C libraries and NumPy's kernels differ
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

// NaN of NaN; 0 below -708, and that of 709 above it. Error below one unit in the last place.
inline double exp_of(double x) {
  if (!(x >= -708.0)) return x != x ? x : 0.0;
  if (x > 709.0) x = 709.0;
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to whole numbers
  const double n = (x * 0x1.71547652b82fep+0 + kShift) - kShift;
  // log 2 in two parts, the first of 42 bits: its product with a whole number below 2^10 is exact.
  const double high = x - n * 0x1.62e42fefa38p-1, low = n * 0x1.ef35793c76730p-45;
  const double r = high - low;  // at most log(2) / 2 by amount
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  // 1 + r + r^2 p, with what the subtraction above lost.
  const double y = 1.0 + (r + (r * r * p + ((high - r) - low)));
  const uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, 8);
  return y * power;
}

}  // namespace redwood
