// The best few tokens of rows of logits with their probabilities: one pass over a row, and a second
// one over the few blocks that hold what counts.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "sampling.h"

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define REDWOOD_AVX2 __attribute__((target("avx2")))
#endif
#define REDWOOD_INLINE inline __attribute__((always_inline))

namespace redwood {
namespace {

constexpr int64_t kBlock = 512;
// Blocks whose values are all further below the best one are left out of the sum: together they
// weigh some 0.001 in a row of a language model, and the numbers only rate drafts.
constexpr float kDeep = 10.0f;

// The largest value of a block; odd: set where any is NaN or infinite.
REDWOOD_INLINE float block_high(const float* x, int64_t n, int& odd) {
  constexpr int kLanes = 32;
  float high[kLanes];
  int odds[kLanes] = {};
  std::fill(high, high + kLanes, x[0]);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float value = x[i + j];
      high[j] = value > high[j] ? value : high[j];
      odds[j] |= value - value != 0.0f;
    }
  }
  for (int j = 0; i + j < n; ++j) {
    const float value = x[i + j];
    high[0] = value > high[0] ? value : high[0];
    odds[0] |= value - value != 0.0f;
  }
  for (int j = 1; j < kLanes; ++j) high[0] = std::max(high[0], high[j]), odds[0] |= odds[j];
  odd |= odds[0];
  return high[0];
}

// exp(x) of -80 <= x <= 0 to one part in 10,000, in operations that compilers make vectors of:
// 2^(k + f) by the bits of k and a polynomial of f, |f| <= 1/2.
REDWOOD_INLINE float rough_exp(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
  const float y = x * 1.44269504f, shifted = y + kShift, f = y - (shifted - kShift);
  const float part =
      1.0f + f * (0.69314718f + f * (0.24022651f + f * (0.05550411f + f * 0.00961813f)));
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return power * part;
}

// The sum of exp(x - best) over a block.
REDWOOD_INLINE float block_sum(const float* x, int64_t n, float best) {
  constexpr int kLanes = 32;
  constexpr float kNothing = -80.0f;  // exp of it is a normal number, and nothing beside 1
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    float near[kLanes];  // in a loop of its own: with the next one it would become branches
    for (int j = 0; j < kLanes; ++j) near[j] = std::max(x[i + j] - best, kNothing);
    for (int j = 0; j < kLanes; ++j) sums[j] += rough_exp(near[j]);
  }
  for (int j = 0; i + j < n; ++j) {
    sums[j] += rough_exp(std::max(x[i + j] - best, kNothing));
  }
  float sum = 0.0f;
  for (int j = 0; j < kLanes; ++j) sum += sums[j];
  return sum;
}

REDWOOD_INLINE bool best_few_body(const float* row, int64_t n, int64_t k, int32_t* ids,
                                  float* probs, float* highs) {
  int odd = 0;
  int64_t found = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t size = std::min(kBlock, n - first);
    const float high = block_high(row + first, size, odd);
    highs[first / kBlock] = high;
    if (found == k && !(high > probs[k - 1])) continue;
    for (int64_t i = first; i < first + size; ++i) {
      const float value = row[i];
      if (found == k && !(value > probs[k - 1])) continue;
      int64_t at = found < k ? found++ : k - 1;  // equal values stand in the order of their ids
      for (; at > 0 && value > probs[at - 1]; --at) probs[at] = probs[at - 1], ids[at] = ids[at - 1];
      probs[at] = value, ids[at] = static_cast<int32_t>(i);
    }
  }
  if (odd != 0) return false;
  const float best = probs[0];
  double sum = 0.0;
  for (int64_t first = 0; first < n; first += kBlock) {
    if (highs[first / kBlock] < best - kDeep) continue;
    sum += block_sum(row + first, std::min(kBlock, n - first), best);
  }
  for (int64_t i = 0; i < k; ++i) {
    probs[i] = static_cast<float>(std::exp(double(probs[i]) - best) / sum);
  }
  return true;
}

#ifdef REDWOOD_AVX2
REDWOOD_AVX2 bool best_few_avx2(const float* row, int64_t n, int64_t k, int32_t* ids, float* probs,
                                float* highs) {
  return best_few_body(row, n, k, ids, probs, highs);
}
#endif

}  // namespace

bool best_few(const float* row, int64_t n, int64_t k, int32_t* ids, float* probs) {
  if (k < 1 || k > n) throw std::invalid_argument("a row has fewer tokens than are asked for");
  std::vector<float> highs((n + kBlock - 1) / kBlock);
#ifdef REDWOOD_AVX2
  static const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2) return best_few_avx2(row, n, k, ids, probs, highs.data());
#endif
  return best_few_body(row, n, k, ids, probs, highs.data());
}

}  // namespace redwood
