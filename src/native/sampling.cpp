#include "sampling.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>

#include "elementary.h"

// A body is compiled twice where the compiler can; both round alike (-ffp-contract=off).
#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define REDWOOD_AVX2 __attribute__((target("avx2,bmi2")))
#endif
#define REDWOOD_INLINE inline __attribute__((always_inline))

namespace redwood {
namespace {

constexpr int kSums = 64;  // partial sums: entry i goes to sum i % 64

bool has_avx2() {
#ifdef REDWOOD_AVX2
  static const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
  return here;
#else
  return false;
#endif
}

REDWOOD_INLINE double add_up(double* sums) {
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

template <class T>
REDWOOD_INLINE Range row_range_body(const T* row, int64_t n) {
  constexpr int kLanes = 32;
  T low[kLanes], high[kLanes];
  int odd[kLanes] = {};  // no number equals NaN, not even itself
  std::fill(low, low + kLanes, row[0]), std::fill(high, high + kLanes, row[0]);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const T x = row[i + j];
      low[j] = x < low[j] ? x : low[j];
      high[j] = x > high[j] ? x : high[j];
      odd[j] |= x != x;
    }
  }
  for (int j = 0; i + j < n; ++j) {
    const T x = row[i + j];
    low[0] = x < low[0] ? x : low[0];
    high[0] = x > high[0] ? x : high[0];
    odd[0] |= x != x;
  }
  for (int j = 1; j < kLanes; ++j) {
    low[0] = std::min(low[0], low[j]), high[0] = std::max(high[0], high[j]), odd[0] |= odd[j];
  }
  const double none = std::numeric_limits<double>::quiet_NaN();
  if (odd[0] != 0) return {none, none, 0};
  int64_t best = 0;
  for (bool found = false; !found && best + kLanes <= n; best += found ? 0 : kLanes) {
    int any = 0;
    for (int j = 0; j < kLanes; ++j) any |= row[best + j] == high[0];
    found = any != 0;
  }
  while (row[best] != high[0]) ++best;
  return {low[0], high[0], best};
}

// exp(x) for x <= 0 by the reference's operations: x = k ln 2 + r, and the series of exp(r).
REDWOOD_INLINE double exp_of(double x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to whole numbers
  const double at = x < -708.0 ? -708.0 : x;
  const double shifted = at * 1.4426950408889634 + kShift;
  const double k = shifted - kShift;
  double r = at - k * 6.93147180369123816490e-01;
  r = r - k * 1.90821492927058770002e-10;
  // Written out: a loop here would keep the loop over the row from being vectorised.
  double sum = 1.0 / 6227020800.0;
  sum = sum * r + 1.0 / 479001600.0;
  sum = sum * r + 1.0 / 39916800.0;
  sum = sum * r + 1.0 / 3628800.0;
  sum = sum * r + 1.0 / 362880.0;
  sum = sum * r + 1.0 / 40320.0;
  sum = sum * r + 1.0 / 5040.0;
  sum = sum * r + 1.0 / 720.0;
  sum = sum * r + 1.0 / 120.0;
  sum = sum * r + 1.0 / 24.0;
  sum = sum * r + 1.0 / 6.0;
  sum = sum * r + 0.5;
  sum = sum * r + 1.0;
  sum = sum * r + 1.0;
  int64_t bits, zero;
  std::memcpy(&bits, &shifted, 8), std::memcpy(&zero, &kShift, 8);
  bits = static_cast<int64_t>(static_cast<uint64_t>(bits - zero + 1023) << 52);
  bits &= -static_cast<int64_t>(x >= -708.0);  // else the product is 0, without a branch
  double power;
  std::memcpy(&power, &bits, 8);
  return sum * power;
}

template <class T>
REDWOOD_INLINE double weigh_body(const T* row, int64_t n, double high, double temperature,
                                 double* out) {
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int j = 0; j < kSums; ++j) out[i + j] = exp_of((double(row[i + j]) - high) / temperature);
    for (int j = 0; j < kSums; ++j) sums[j] += out[i + j];
  }
  for (int j = 0; i + j < n; ++j) {
    out[i + j] = exp_of((double(row[i + j]) - high) / temperature);
    sums[j] += out[i + j];
  }
  return add_up(sums);
}

REDWOOD_INLINE double cut_body(double* weights, int64_t n, double low) {
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int j = 0; j < kSums; ++j) {
      const double w = weights[i + j];
      weights[i + j] = w >= low ? w : 0.0;
      sums[j] += weights[i + j];
    }
  }
  for (int j = 0; i + j < n; ++j) {
    if (!(weights[i + j] >= low)) weights[i + j] = 0.0;
    sums[j] += weights[i + j];
  }
  return add_up(sums);
}

// The places of a block of 64 whose value is at least `low`, as bits.
REDWOOD_INLINE uint64_t at_least_body(const double* x, double low) {
  uint64_t mask = 0;
  for (int part = 0; part < 64; part += 8) {
    bool any = false;
    for (int j = 0; j < 8; ++j) any |= x[part + j] >= low;
    if (!any) continue;
    for (int j = 0; j < 8; ++j) mask |= uint64_t(x[part + j] >= low) << (part + j);
  }
  return mask;
}

REDWOOD_INLINE void collect_body(const double* x, int64_t n, double low, std::vector<double>& out) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    uint64_t mask = at_least_body(x + i, low);
    for (; mask; mask &= mask - 1) out.push_back(x[i + __builtin_ctzll(mask)]);
  }
  for (; i < n; ++i) {
    if (x[i] >= low) out.push_back(x[i]);
  }
}

struct Block {
  uint64_t value[4];
};

REDWOOD_INLINE Block philox(uint64_t counter, uint64_t position, uint64_t key) {
  uint64_t a = counter, b = 0, c = 0, d = position, k0 = key, k1 = 0;
  for (int round = 0; round < 10; ++round) {
    const unsigned __int128 x = static_cast<unsigned __int128>(0xD2E7470EE14C6C93ull) * a;
    const unsigned __int128 y = static_cast<unsigned __int128>(0xCA5A826395121157ull) * c;
    a = static_cast<uint64_t>(y >> 64) ^ b ^ k0, b = static_cast<uint64_t>(y);
    c = static_cast<uint64_t>(x >> 64) ^ d ^ k1, d = static_cast<uint64_t>(x);
    k0 += 0x9E3779B97F4A7C15ull, k1 += 0xBB67AE8584CAA73Bull;
  }
  return {{a, b, c, d}};
}

// (cell + 1/2) 2^-52 of the upper 52 bits. Below the bits of 1.0 they are 1 + cell 2^-52.
REDWOOD_INLINE double to_uniform(uint64_t raw) {
  const uint64_t bits = raw >> 12 | 0x3FF0000000000000ull;
  double above;
  std::memcpy(&above, &bits, 8);
  return (above - 1.0) + 0x1p-53;
}

// Runs the tokens of 8 blocks; the blocks' multiplications overlap, and most groups end at `any`.
constexpr int64_t kGroup = 32;

template <class Found>
REDWOOD_INLINE void race_body(const double* weights, int64_t n, const Noise& noise, double& limit,
                              const Found& found) {
  double padded[kGroup] = {};
  for (int64_t i = 0; i < n; i += kGroup) {
    const double* w = weights + i;
    if (n - i < kGroup) {
      std::memcpy(padded, w, 8 * static_cast<size_t>(n - i));
      w = padded;
    }
    double most = 0;
    for (int j = 0; j < kGroup; ++j) most = w[j] > most ? w[j] : most;
    if (!(most * limit >= 0x1p-53)) continue;  // no uniform is that near to 1
    double u[kGroup];
    for (int b = 0; b < kGroup / 4; ++b) {
      const Block block = philox(static_cast<uint64_t>(i / 4 + b) + 1, noise.position, noise.key);
      for (int j = 0; j < 4; ++j) u[4 * b + j] = to_uniform(block.value[j]);
    }
    int any = 0;
    for (int j = 0; j < kGroup; ++j) any |= 1.0 - u[j] <= w[j] * limit;
    if (!any) continue;
    for (int j = 0; j < kGroup; ++j) {
      if (w[j] > 0 && 1.0 - u[j] <= w[j] * limit) found(i + j, w[j], u[j]);
    }
  }
}

#ifdef REDWOOD_AVX2
template <class T>
REDWOOD_AVX2 Range row_range_avx2(const T* row, int64_t n) {
  return row_range_body(row, n);
}
template <class T>
REDWOOD_AVX2 double weigh_avx2(const T* row, int64_t n, double high, double t, double* out) {
  return weigh_body(row, n, high, t, out);
}
REDWOOD_AVX2 double cut_avx2(double* weights, int64_t n, double low) {
  return cut_body(weights, n, low);
}
REDWOOD_AVX2 void collect_avx2(const double* x, int64_t n, double low, std::vector<double>& out) {
  collect_body(x, n, low, out);
}
template <class Found>
REDWOOD_AVX2 void race_avx2(const double* weights, int64_t n, const Noise& noise, double& limit,
                            const Found& found) {
  race_body(weights, n, noise, limit, found);
}
#define REDWOOD_CALL(name, ...) (has_avx2() ? name##_avx2(__VA_ARGS__) : name##_body(__VA_ARGS__))
#else
#define REDWOOD_CALL(name, ...) name##_body(__VA_ARGS__)
#endif

// Largest first. Bits of positive numbers are in the order of the numbers: a radix sort, which at
// tens of thousands of weights is some five times faster than std::sort.
void sort_down(std::vector<double>& values) {
  if (values.size() < 4096) {
    std::sort(values.begin(), values.end(), std::greater<double>());
    return;
  }
  constexpr int kDigit = 11, kBins = 1 << kDigit;
  std::vector<uint64_t> from(values.size()), to(values.size());
  std::memcpy(from.data(), values.data(), 8 * values.size());
  for (int shift = 0; shift < 64; shift += kDigit) {
    std::vector<size_t> first(kBins + 1, 0);
    for (uint64_t bits : from) ++first[kBins - (bits >> shift) % kBins];
    for (int bin = 1; bin < kBins; ++bin) first[bin] += first[bin - 1];
    for (uint64_t bits : from) to[first[kBins - 1 - (bits >> shift) % kBins]++] = bits;
    std::swap(from, to);
  }
  std::memcpy(values.data(), from.data(), 8 * values.size());
}

// Positive weights, largest first: at least `count` of them, or a sum of at least `goal`; or all.
std::vector<double> largest(const double* weights, int64_t n, int64_t count, double goal) {
  const double tiny = std::numeric_limits<double>::denorm_min();
  std::vector<double> best;
  for (const double low : {0x1p-7, 0x1p-11, 0x1p-15, 0x1p-20, 0x1p-25, 0x1p-30, 0x1p-40, tiny}) {
    best.clear();
    REDWOOD_CALL(collect, weights, n, low, best);
    bool enough = static_cast<int64_t>(best.size()) >= count;
    if (count == 0) {
      // Half a part per million more than the goal: the order of a sum must not matter here.
      double sum = 0;
      for (double w : best) sum += w;
      enough = sum >= goal * (1 + 5e-7);
    }
    if (enough || low == tiny) break;
  }
  if (0 < count && count < static_cast<int64_t>(best.size())) {
    std::nth_element(best.begin(), best.begin() + (count - 1), best.end(), std::greater<double>());
    const double last = best[count - 1];
    best.erase(std::remove_if(best.begin(), best.end(), [&](double w) { return w < last; }),
               best.end());
  }
  sort_down(best);
  return best;
}

}  // namespace

template <class T>
Range row_range(const T* row, int64_t n) {
  return REDWOOD_CALL(row_range, row, n);
}
template Range row_range(const float*, int64_t);
template Range row_range(const double*, int64_t);

template <class T>
double weigh(const T* row, int64_t n, double high, double temperature, double* out) {
  return REDWOOD_CALL(weigh, row, n, high, temperature, out);
}
template double weigh(const float*, int64_t, double, double, double*);
template double weigh(const double*, int64_t, double, double, double*);

double truncate(double* weights, int64_t n, double mass, int64_t top_k, double top_p,
                double min_p) {
  const bool some = 0 < top_k && top_k < n;
  double low = 0.0;
  if (some || top_p < 1.0) {
    std::vector<double> best = largest(weights, n, some ? top_k : 0, top_p * mass);
    if (some) {
      if (static_cast<int64_t>(best.size()) >= top_k) {
        low = best[top_k - 1];
        size_t size = top_k;
        while (size < best.size() && best[size] == low) ++size;
        best.resize(size);
      }
      mass = 0;
      for (double w : best) mass += w;
    }
    if (top_p < 1.0) {
      const double goal = top_p * mass;
      double sum = 0;
      for (double w : best) {
        sum += w, low = w;
        if (sum >= goal) break;
      }
    }
  }
  return REDWOOD_CALL(cut, weights, n, std::max(low, min_p));
}

int64_t draw(const double* weights, int64_t n, double uniform) {
  constexpr int64_t kStep = 1024;
  std::vector<double> before;
  before.reserve(n / kStep + 1);
  double sum = 0;
  for (int64_t i = 0; i < n; i += kStep) {
    before.push_back(sum);
    for (int64_t j = i, end = std::min(n, i + kStep); j < end; ++j) sum += weights[j];
  }
  const double place = uniform * sum;
  // The last block that begins at or below `place`: running sums never fall.
  const auto above = std::upper_bound(before.begin(), before.end(), place);
  int64_t i = (std::max<int64_t>(above - before.begin(), 1) - 1) * kStep;
  sum = before[i / kStep];
  for (; i < n; ++i) {
    sum += weights[i];
    if (sum > place) return i;
  }
  return n;
}

void log_all(const double* x, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = log_of(x[i]);
}

double Noise::uniform(int64_t token) const {
  return to_uniform(philox(static_cast<uint64_t>(token / 4) + 1, position, key).value[token % 4]);
}

void race(const double* weights, int64_t n, Noise noise, std::vector<int64_t>& tokens,
          std::vector<double>& uniforms) {
  const int64_t best = std::max_element(weights, weights + n) - weights;
  // Token i runs in the time -log(u) / weight >= (1 - u) / weight, and the shortest time wins. The
  // margin covers all rounding, so that the winner of the exact comparison is among the tokens.
  constexpr double kMargin = 1 + 1e-9;
  double limit = -log_of(noise.uniform(best)) / weights[best] * kMargin;
  std::vector<double> least;
  REDWOOD_CALL(race, weights, n, noise, limit, [&](int64_t token, double weight, double u) {
    tokens.push_back(token), uniforms.push_back(u), least.push_back((1.0 - u) / weight);
    limit = std::min(limit, -log_of(u) / weight * kMargin);
  });
  size_t kept = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (least[i] > limit) continue;
    tokens[kept] = tokens[i], uniforms[kept++] = uniforms[i];
  }
  tokens.resize(kept), uniforms.resize(kept);
}

}  // namespace redwood
