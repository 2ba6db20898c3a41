// Checks sine, cosine, logarithm and exponential against long double, and that their bits are those of every
// processor: digests that stand here.
#include <cfloat>
#include <cmath>
#include <vector>

#include "bits.h"
#include "elementary.h"
#include "trig.h"
#include "weights.h"

namespace {
using namespace check;

// long double is 128 bits by software on Arm: a few are enough there; none where it is a double.
constexpr int64_t kHashed = 20000;
constexpr int64_t kCount = LDBL_MANT_DIG == 64 ? 1000000 : LDBL_MANT_DIG > 64 ? kHashed : 0;

double between(Numbers& numbers) {  // 0 and 1, both left out
  const uint64_t high = numbers.next() >> 6, low = numbers.next() >> 6;
  return std::ldexp(static_cast<double>(high << 26 | low) + 0.5, -52);
}

// Distance in units of the last place of what is right.
double off(double got, long double want) {
  int exponent;
  std::frexp(static_cast<double>(want), &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - 53, -1074));
  return static_cast<double>(std::fabs(got - want)) / unit;
}

void check_trig() {
  Numbers numbers(1);
  Hash hash;
  double worst = 0;
  for (int64_t i = 0; i < std::max(kCount, kHashed); ++i) {
    // Of any size; a position times a frequency; as near to quarter turns as floats are.
    float x = static_cast<float>(std::ldexp(between(numbers), static_cast<int>(i % 34) - 10));
    if (i % 3 == 0) {
      x = static_cast<float>(numbers.next() % 1000000) * static_cast<float>(between(numbers));
    }
    if (i % 3 == 1) x = static_cast<float>(numbers.next() % 6366197 * 1.5707963267948966);
    if (x > kMostAngle) x = kMostAngle;
    const SineCosine got = sine_cosine(x);
    if (i < kHashed) hash.add(got.sine), hash.add(got.cosine);
    if (i >= kCount) continue;
    const long double wide = x;
    worst = std::max({worst, off(got.sine, std::sin(wide)), off(got.cosine, std::cos(wide))});
  }
  expect(worst < 1.0, "sine and cosine: off by " + std::to_string(worst));
  expect(hash.value == 0x6f3d4ce941acebd0u, "sine and cosine: other bits");
  std::printf("sine and cosine: at most %.3f units off\n", worst);
}

void check_log() {
  Numbers numbers(2);
  Hash hash;
  double worst = 0;
  for (int64_t i = 0; i < std::max(kCount, kHashed); ++i) {
    double x = between(numbers);
    if (i % 4 == 1) x = 1.0 - std::ldexp(x, -static_cast<int>(i % 53));
    if (i % 4 == 2) x = std::ldexp(x, static_cast<int>(i % 2098) - 1073);
    if (i % 4 == 3) x = x < 0.5 ? x + 0.5 : 2.0 * x;
    const double got = log_of(x);
    if (i < kHashed) hash.add(got);
    if (i >= kCount || x == 1.0) continue;
    worst = std::max(worst, off(got, std::log(static_cast<long double>(x))));
  }
  expect(log_of(1.0) == 0.0 && std::isinf(log_of(0.0)) && log_of(0.0) < 0, "logarithm: of 1 and 0");
  expect(worst < 1.0, "logarithm: off by " + std::to_string(worst));
  expect(hash.value == 0x7524026405e8ef8fu, "logarithm: other bits");
  std::printf("logarithm: at most %.3f units off\n", worst);
}

void check_exp() {
  Numbers numbers(3);
  Hash hash;
  double worst = 0;
  for (int64_t i = 0; i < std::max(kCount, kHashed); ++i) {
    double x = std::ldexp(between(numbers), static_cast<int>(i % 12) - 2);
    if (i % 2) x = -x;
    x = std::max(-700.0, std::min(700.0, x));
    const double got = exp_of(x);
    if (i < kHashed) hash.add(got);
    if (i >= kCount) continue;
    worst = std::max(worst, off(got, std::exp(static_cast<long double>(x))));
  }
  expect(exp_of(0.0) == 1.0 && exp_of(-709.0) == 0.0 && std::isfinite(exp_of(1e300)) && std::isnan(exp_of(NAN)),
         "exponential: of 0, and far out");
  expect(worst < 1.0, "exponential: off by " + std::to_string(worst));
  expect(hash.value == 0x614641e83e4aff85u, "exponential: other bits");
  std::printf("exponential: at most %.3f units off\n", worst);
}

}  // namespace

int main() {
  check_trig();
  check_log();
  check_exp();
  return failures ? 1 : 0;
}
