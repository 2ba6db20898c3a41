// Checks every instruction set that runs on this machine against plain arithmetic in double, and that
// a row's result does not depend on the rows beside it. Run by make, under sanitizers.
#include <algorithm>
#include <limits>

#include "weights.h"

namespace {
using namespace check;

const float kNone = -std::numeric_limits<float>::infinity();

// Activations of n rows as the format wants them, in vectors of exactly their size, so that a read
// past the end is seen.
struct Rows {
  int64_t stride;
  std::vector<float> values, scales, offsets;
  std::vector<int8_t> quants;
  std::vector<int32_t> sums;
  std::vector<int16_t> sums16, sums32;
  std::vector<double> meant;  // [n, stride]: what the quants and scales stand for

  Rows(const Kernels& k, Format f, const std::vector<float>& x, int n, int64_t cols)
      : stride(round_up(cols, info(f).step)) {
    const auto size = [&](int64_t unit) { return static_cast<size_t>(n * stride / unit); };
    if (is_float(f)) {
      values = x;
      meant.assign(x.begin(), x.end());
      return;
    }
    const int64_t unit = is_group(f) ? kGroup : kSuper, units = stride / unit;
    quants.resize(size(1)), scales.resize(size(unit));
    if (is_group(f)) {
      offsets.resize(size(kGroup)), sums.resize(size(kGroup));
    } else {
      sums16.resize(size(16)), sums32.resize(size(32));
    }
    for (int r = 0; r < n; ++r) {
      // A copy of its own length: quantising must not read past the row.
      const std::vector<float> row(x.begin() + r * cols, x.begin() + (r + 1) * cols);
      if (is_group(f)) {
        k.quantise_group(row.data(), cols, stride, quants.data() + r * stride,
                         scales.data() + r * units, offsets.data() + r * units,
                         sums.data() + r * units);
      } else {
        k.quantise_super(row.data(), cols, stride, quants.data() + r * stride,
                         scales.data() + r * units, sums16.data() + r * units * 16,
                         sums32.data() + r * units * 8);
      }
    }
    for (int64_t i = 0; i < n * stride; ++i) {
      meant.push_back(static_cast<double>(quants[static_cast<size_t>(i)]) *
                      scales[static_cast<size_t>(i / unit)]);
    }
  }

  Activations view(int64_t row, Format f) const {
    const int64_t groups = row * stride / kGroup;
    const auto at = [](const auto& v, int64_t i) { return v.empty() ? nullptr : v.data() + i; };
    return {stride, at(values, row * stride), at(quants, row * stride),
            at(scales, is_super(f) ? row * stride / kSuper : groups), at(offsets, groups),
            at(sums, groups), at(sums16, row * stride / 16), at(sums32, groups)};
  }
};

// Rows [first, first + n) of `in`; blocks in two parts, as two threads would do them.
std::vector<float> product(const Kernels& k, Format f, const std::vector<uint8_t>& weights,
                           int64_t cols, int64_t width, const Rows& in, int first, int n,
                           bool add = false, float start = 7.0f) {
  std::vector<float> out(static_cast<size_t>(n * width), start);
  const Matmul m{weights.data(), block_bytes(f, cols), in.stride, n, in.view(first, f), out.data(),
                 width, add};
  k.matmul[static_cast<int>(f)](m, 0, 1);
  k.matmul[static_cast<int>(f)](m, 1, width / kLanes);
  return out;
}

void check_product(const Kernels& k, const std::string& kind, Format f, int64_t cols, bool full) {
  const std::string what = std::string(k.name) + " " + kind + " as " + info(f).name;
  const int64_t rows = 40, width = round_up(rows, kLanes);
  const int most = is_float(f) ? 9 : 70;
  const auto file = file_rows(kind, rows, cols, full);
  const auto weights = packed(kind, file, rows, cols, f);
  std::vector<float> w(static_cast<size_t>(rows * cols)), plain(static_cast<size_t>(cols));
  for (int64_t o = 0; o < rows; ++o) {
    unpack_row(f, weights.data(), cols, o, w.data() + o * cols);
    read_row(*find_kind(kind), file.data() + o * static_cast<int64_t>(file.size()) / rows, cols,
             plain.data());
    if (f == find_kind(kind)->format) {
      expect(same_bits(plain.data(), w.data() + o * cols, cols), what + ": unpacked as it was read");
    }
  }
  std::vector<float> x = normals(most * cols);
  // All quants of a row at one end: the largest sums there are.
  if (full) std::fill(x.begin(), x.begin() + 5 * cols, 1.0f);
  if (full) std::fill(x.begin() + cols, x.begin() + 2 * cols, -1.0f);
  const Rows in(k, f, x, most, cols);
  const auto run = [&](int first, int n, bool add, float start) {
    return product(k, f, weights, cols, width, in, first, n, add, start);
  };
  const std::vector<float> all = run(0, most, false, 7.0f);
  for (int r = 0; r < most; ++r) {
    for (int64_t o = 0; o < width; ++o) {
      double sum = 0, size = 1e-30;
      for (int64_t c = 0; o < rows && c < cols; ++c) {
        const double term = static_cast<double>(w[static_cast<size_t>(o * cols + c)]) *
                            in.meant[static_cast<size_t>(r * in.stride + c)];
        sum += term;
        size += std::fabs(term);
      }
      const double error = std::fabs(static_cast<double>(all[static_cast<size_t>(r * width + o)]) - sum);
      // Formats with an offset or minimum take the difference of larger numbers.
      expect(error <= size * (is_float(f) ? 2e-6 : 2e-5), what + ": value");
    }
    const auto alone = run(r, 1, false, 7.0f), added = run(r, 1, true, 0.5f);
    expect(same_bits(alone.data(), all.data() + r * width, width), what + ": a row alone");
    for (int64_t o = 0; o < width; ++o) {
      const size_t i = static_cast<size_t>(o);
      expect(added[i] == alone[i] + 0.5f, what + ": added");
    }
  }
  for (int n : {2, 3, 4, 5, 6, 7, 8, 11, 15, 16, 17, 31, 33, 48, 50, 69}) {
    if (n >= most) break;
    const auto some = run(0, n, false, 7.0f);
    expect(same_bits(some.data(), all.data(), n * width), what + ": rows in a batch");
  }
}

void check_products(const Kernels& k) {
  for (const char* name : kKinds) {
    const Kind& kind = *find_kind(name);
    const bool super = is_super(kind.format), real = is_float(kind.format);
    check_product(k, name, kind.format, super ? 768 : kind.step == 1 ? 75 : real ? 64 : 352, false);
    if (!real) check_product(k, name, kind.format, super ? 512 : 96, true);
  }
  // Made from floats, of a width that is no whole number of groups.
  for (Format f : {Format::kA4, Format::kA4M, Format::kA5, Format::kA5M, Format::kA8}) {
    check_product(k, "F32", f, 75, false);
  }
}

// All instruction sets against the first, bit for bit, for every number of rows that takes another way.
void check_same_bits(const std::vector<const Kernels*>& sets) {
  const int64_t outputs = 40, width = round_up(outputs, kLanes);
  const int most = 70;
  for (const char* name : kKinds) {
    const Format f = find_kind(name)->format;
    const int64_t cols = is_super(f) ? 768 : find_kind(name)->step == 1 ? 75 : is_float(f) ? 64 : 352;
    const auto weights = packed(name, file_rows(name, outputs, cols), outputs, cols, f);
    const Rows in(*sets[0], f, normals(most * cols), most, cols);
    const auto want = product(*sets[0], f, weights, cols, width, in, 0, most);
    for (const Kernels* k : sets) {
      for (int n = 1; n <= most; n += n < 40 ? 1 : n < 64 ? 24 : 6) {
        const auto got = product(*k, f, weights, cols, width, in, 0, n);
        expect(same_bits(got.data(), want.data(), n * width),
               std::string(k->name) + " " + name + ": the bits of " + sets[0]->name);
      }
    }
  }
}

void check_quantise(const Kernels& k) {
  const std::string what = std::string(k.name) + " quantise";
  for (int64_t cols : {1, 31, 32, 75, 256, 300}) {
    std::vector<float> x = normals(cols, 3.0f);
    if (cols == 75) std::fill(x.begin() + 32, x.begin() + 64, 0.0f);
    for (Format f : {Format::kA8, Format::kK4}) {
      const Rows in(k, f, x, 1, cols);
      const int64_t unit = is_group(f) ? kGroup : kSuper;
      for (int64_t u = 0; u * unit < in.stride; ++u) {
        float peak = 0.0f;
        for (int64_t i = u * unit; i < std::min(cols, (u + 1) * unit); ++i) {
          peak = std::max(peak, std::fabs(x[static_cast<size_t>(i)]));
        }
        const float by = peak > 0 ? 127.0f / peak : 0.0f;
        expect(in.scales[static_cast<size_t>(u)] == peak / 127.0f, what + ": scale");
        int sum = 0;
        for (int64_t i = u * unit; i < (u + 1) * unit; ++i) {
          const float v = i < cols ? x[static_cast<size_t>(i)] * by : 0.0f;
          const int q = static_cast<int>(std::nearbyint(std::min(127.0f, std::max(-127.0f, v))));
          expect(in.quants[static_cast<size_t>(i)] == q, what + ": value");
          sum += q;
          const size_t at = static_cast<size_t>(i / 16);
          if (!is_group(f) && i % 32 == 31) {
            expect(in.sums32[at / 2] == in.sums16[at] + in.sums16[at - 1], what + ": sum of 32");
            sum -= in.sums32[at / 2];
          }
        }
        if (is_group(f)) {
          expect(in.sums[static_cast<size_t>(u)] == sum, what + ": sum");
          expect(in.offsets[static_cast<size_t>(u)] ==
                     in.scales[static_cast<size_t>(u)] * static_cast<float>(sum), what + ": offset");
        } else {
          expect(sum == 0, what + ": sums");
        }
      }
    }
  }
}

bool near(double got, double want, double tolerance) {
  return std::fabs(got - want) <= tolerance * std::max(1.0, std::fabs(want));
}

void check_rows(const Kernels& k) {
  const std::string what = k.name;
  for (int64_t n : {1, 7, 8, 64, 75}) {
    const size_t size = static_cast<size_t>(n);
    const auto x = normals(n, 4.0f), y = normals(n, 4.0f);
    std::vector<float> out(size);
    k.rms_norm(x.data(), y.data(), n, 1e-5f, out.data());
    double squares = 0;
    for (float v : x) squares += static_cast<double>(v) * v;
    for (size_t i = 0; i < size; ++i) {
      const double want = x[i] / std::sqrt(squares / static_cast<double>(n) + 1e-5) * y[i];
      expect(near(out[i], want, 3e-6), what + " rms_norm");
    }
    for (bool gelu : {false, true}) {
      k.gate(x.data(), y.data(), n, gelu, out.data());
      for (size_t i = 0; i < size; ++i) {
        const double g = x[i];
        const double inner = 0.7978845608028654 * (g + 0.044715 * g * g * g);
        const double gated = gelu ? 0.5 * g * (1 + std::tanh(inner)) : g / (1 + std::exp(-g));
        expect(near(out[i], gated * y[i], 4e-6), what + " gate");
      }
    }
    std::vector<float> capped = x, added = x;
    k.softcap(capped.data(), n, 5.0f);
    k.add(added.data(), y.data(), n);
    std::vector<uint16_t> halves(size);
    std::vector<float> hard = x;
    for (size_t i = 0; i < size; ++i) hard[i] = std::ldexp(x[i], static_cast<int>(i % 45) - 28);
    k.to_half(hard.data(), n, halves.data());
    for (size_t i = 0; i < size; ++i) {
      expect(near(capped[i], 5 * std::tanh(static_cast<double>(x[i]) / 5), 3e-6), what + " softcap");
      expect(added[i] == x[i] + y[i], what + " add");
      expect(halves[i] == float_to_half(hard[i]), what + " to_half");
    }
    std::vector<float> pair = normals(2 * n);
    const std::vector<float> before = pair;
    k.rotate(pair.data(), x.data(), y.data(), n);
    for (size_t i = 0; i < size; ++i) {
      const double a = before[i], b = before[i + size];
      expect(near(pair[i], a * x[i] - b * y[i], 4e-6), what + " rotate");
      expect(near(pair[i + size], b * x[i] + a * y[i], 4e-6), what + " rotate");
    }
  }
}

void check_softmax(const Kernels& k) {
  const std::string what = std::string(k.name) + " softmax";
  for (float cap : {0.0f, 20.0f}) {
    for (int64_t n : {16, 48}) {
      std::vector<float> x = normals(n, 30.0f);
      for (size_t i = 3; i < x.size(); i += 5) x[i] = kNone;
      x[1] = -4000.0f;  // so far below that its share is exactly 0
      std::vector<double> want;
      double most = -1e300, sum = 0;
      for (float v : x) {
        const double scaled = 0.5 * v;
        want.push_back(cap != 0 && !std::isinf(v) ? cap * std::tanh(scaled / cap) : scaled);
        most = std::max(most, want.back());
      }
      for (double& v : want) sum += v = std::exp(v - most);
      const float got = k.softmax(x.data(), n, 0.5f, cap);
      expect(near(got, sum, 1e-5), what + ": sum");
      for (size_t i = 0; i < x.size(); ++i) expect(near(x[i], want[i], 1e-5), what + ": value");
      expect(x[3] == 0.0f && (cap != 0 || x[1] == 0.0f), what + ": masked scores count nothing");
    }
  }
}

// Keys and values, fp16 (0) or float32 (1).
struct Cache {
  std::vector<uint16_t> halves;
  std::vector<float> floats;
  Cache(int64_t count) : halves(static_cast<size_t>(count)), floats(normals(count)) {
    for (size_t i = 0; i < halves.size(); ++i) {
      halves[i] = float_to_half(floats[i]);
      floats[i] = half_to_float(halves[i]);  // both hold the same numbers
    }
  }
  const void* of(int cast) const {
    return cast ? static_cast<const void*>(floats.data()) : halves.data();
  }
};

void check_attention(const Kernels& k) {
  const std::string what = k.name;
  const int64_t dim = 48, blocks = 3, lanes = blocks * kLanes, slots = 23, n = 29;
  const Cache keys(dim * lanes), values(slots * dim);
  const auto q = normals(n * dim), weights = normals(n * slots), start = normals(n * dim);  // q: [dim][n]
  for (int cast : {0, 1}) {
    std::vector<float> scores(n * lanes), sums = start, score(lanes), sum(dim);
    k.dot_keys[cast](q.data(), n, n, keys.of(cast), blocks, dim, scores.data(), lanes);
    k.add_values[cast](weights.data(), slots, n, values.of(cast), slots, dim, sums.data());
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t s = 0; s < lanes; ++s) {
        double want = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const int64_t at = s / kLanes * dim * kLanes + d * kLanes + s % kLanes;
          want += static_cast<double>(q[static_cast<size_t>(d * n + r)]) *
                  keys.floats[static_cast<size_t>(at)];
        }
        expect(near(scores[static_cast<size_t>(r * lanes + s)], want, 1e-5), what + " dot_keys");
      }
      const float* added = sums.data() + r * dim;
      for (int64_t d = 0; d < dim; ++d) {
        double want = start[static_cast<size_t>(r * dim + d)];
        for (int64_t s = 0; s < slots; ++s) {
          want += static_cast<double>(weights[static_cast<size_t>(r * slots + s)]) *
                  values.floats[static_cast<size_t>(s * dim + d)];
        }
        expect(near(added[d], want, 1e-5), what + " add_values");
      }
      k.dot_keys[cast](q.data() + r, n, 1, keys.of(cast), blocks, dim, score.data(), lanes);
      expect(same_bits(score.data(), scores.data() + r * lanes, lanes), what + " dot_keys alone");
      // Slot by slot, as the path of a tree is read.
      sum.assign(start.begin() + r * dim, start.begin() + (r + 1) * dim);
      for (int64_t s = 0; s < slots; ++s) {
        const size_t bytes = static_cast<size_t>(s * dim) * (cast ? 4 : 2);
        k.add_values[cast](weights.data() + r * slots + s, slots, 1,
                           static_cast<const uint8_t*>(values.of(cast)) + bytes, 1, dim, sum.data());
      }
      expect(same_bits(sum.data(), added, dim), what + " add_values alone");
    }
  }
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // lines come as they are said, in a file too
  std::vector<const Kernels*> sets;
  for (const char* name : {"amx", "avx512vnni", "avxvnni", "avx2", "i8mm", "neon", "portable",
                           "amx-emulated"}) {
    const Kernels* k = choose_kernels(name);
    if (!k) {
      std::printf("%-12s not on this machine\n", name);
      continue;
    }
    const int before = check::failures;
    check_products(*k);
    check_quantise(*k);
    check_rows(*k);
    check_softmax(*k);
    check_attention(*k);
    std::printf("%-12s %s\n", name, check::failures == before ? "ok" : "FAILED");
    sets.insert(std::strcmp(name, "avx2") == 0 ? sets.begin() : sets.end(), k);
  }
  const int before = check::failures;
  check_same_bits(sets);
  std::printf("%-12s %s\n", "same bits", check::failures == before ? "ok" : "FAILED");
  return check::failures ? 1 : 0;
}
