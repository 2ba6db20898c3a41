// Passes over one row of the vocabulary. redwood/sampling/_kernels_numpy.py is the reference: it does the
// same operations in the same order, so the results are equal bit for bit.
#pragma once
#include <cstdint>
#include <vector>

namespace redwood {

// Lowest and highest value, NaN if any is NaN, and the first place of the highest.
struct Range {
  double low, high;
  int64_t best;
};
template <class T>
Range row_range(const T* row, int64_t n);

// out[i] = exp((row[i] - high) / temperature), 0 below exp(-708); returns their sum.
template <class T>
double weigh(const T* row, int64_t n, double high, double temperature, double* out);

// The k best tokens of a row, best first, of equals the lower id, and their probabilities; false if
// any value is NaN or infinite.
bool best_few(const float* row, int64_t n, int64_t k, int32_t* ids, float* probs);

// Sets weights outside top-k, top-p and min-p to 0 (0, 1 and 0: off); returns the sum of the
// others. The largest weight must be 1, `mass` the sum of all.
double truncate(double* weights, int64_t n, double mass, int64_t top_k, double top_p, double min_p);

// The token at share `uniform` of the running sum of weights; n: none, by rounding.
int64_t draw(const double* weights, int64_t n, double uniform);

// out[i] = log(x[i]); see log_of.
void log_all(const double* x, int64_t n, double* out);

// Uniforms of GumbelNoise, in (0, 1): the generator Philox4x64-10 (Salmon et al., SC 2011).
struct Noise {
  uint64_t key, position;
  double uniform(int64_t token) const;
};

// Tokens that may have the largest log(weight) + Gumbel noise, ascending, with their uniforms: all
// within a relative 1e-9 of the winner (lowest) of the exponential race -log(uniform) / weight.
void race(const double* weights, int64_t n, Noise noise, std::vector<int64_t>& tokens,
          std::vector<double>& uniforms);

}  // namespace redwood
