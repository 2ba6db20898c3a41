// Checks that all instruction sets compute the same bits: digests of their results on fixed inputs
// are those that stand here, on every processor.
#include <algorithm>
#include <limits>

#include "bits.h"
#include "weights.h"

namespace {
using namespace check;

struct Digest {
  const char* part;
  uint64_t value;
};

const Digest kDigests[] = {
    {"Q4_0", 0x583426029216aa85u},
    {"Q4_1", 0x452f36098f31e44au},
    {"Q5_0", 0x546adf161f53a797u},
    {"Q5_1", 0x7f08e8490c80eb6au},
    {"Q8_0", 0x5be28834d4fde750u},
    {"Q3_K", 0xd589fc4d9a17094au},
    {"Q4_K", 0x1f86355d42ec732eu},
    {"Q5_K", 0x491815655bcf7869u},
    {"Q6_K", 0xbfe1b39d016a9a04u},
    {"F32", 0xd24171106144fa84u},
    {"F16", 0x691be34b96c7f786u},
    {"BF16", 0xc43dcab65c08ab57u},
    {"Q2_K", 0x09ca4d3bc2322212u},
    {"IQ4_NL", 0xd58e46b979505d2du},
    {"MXFP4", 0xb04bd956061f40c0u},
    {"IQ4_XS", 0xdb6b234aa7575af4u},
    {"IQ3_S", 0x2f9ac3ad022181d8u},
    {"IQ3_XXS", 0xed49ef25e98dabeeu},
    {"IQ2_S", 0x9856c98b03d577b3u},
    {"IQ2_XS", 0xba5747ac67fae5a4u},
    {"IQ2_XXS", 0x245b80b2b1088e14u},
    {"IQ1_S", 0x8891fd9d36444e6fu},
    {"IQ1_M", 0x1ab6006756b1b11eu},
    {"TQ1_0", 0x713ec3c0bd03a3c0u},
    {"TQ2_0", 0x94ac65b3d08420aau},
    {"NVFP4", 0xd5dfcd386fe94473u},
    {"quantise_group", 0x51e87d5bf5c91dfau},
    {"quantise_super", 0x21753d07f5810548u},
    {"rms_norm", 0xd9076240391a9712u},
    {"silu", 0x08dcd0bcf48e9bb0u},
    {"gelu", 0xaa749a7e21ee23a7u},
    {"add", 0x24aab65be4bdfd8du},
    {"softcap", 0xcda7e99d14728e6eu},
    {"rotate", 0xdefbb66273e58145u},
    {"to_half", 0xdabaf6dc3c755080u},
    {"softmax", 0x7a60b307accfc523u},
    {"dot_keys fp16", 0x9da288cca0204bbeu},
    {"dot_keys float32", 0x9da288cca0204bbeu},
    {"add_values fp16", 0x2a958f7e6ebdec7cu},
    {"add_values float32", 0x2a958f7e6ebdec7cu},
};

// Numbers where instruction sets might part: signed zeros, denormals, the smallest normal ones, ties
// of rounding to whole numbers and to fp16.
const float kEdges[] = {
    0.0f,     -0.0f,     0x1p-149f, -0x1.8p-140f, 0x1p-126f,  -0x1.fp-127f, 0.5f,         -1.5f,
    2.5f,     -126.5f,   0x1.002p0f, -0x1.006p0f, 65519.0f,   -65520.0f,    65536.0f,     0x1p-25f,
    -0x1.8p-25f, 0x1.8p-24f, 0x1.ffcp-15f, 0x1.ffep-15f, -0x1.4p-24f, 1e-6f, 1e4f,        -3e4f};
const float kMost = std::numeric_limits<float>::max();
const float kNone = -std::numeric_limits<float>::infinity();

// The kinds of rows that every function sees: plain, with edges among them, of one kind alone.
std::vector<std::vector<float>> rows_of(int64_t n, uint64_t seed) {
  Numbers numbers(seed);
  const size_t size = static_cast<size_t>(n);
  std::vector<std::vector<float>> rows{numbers.bells(n, 2), numbers.bells(n, -130),
                                       numbers.bells(n, 100), numbers.bells(n, -142)};
  for (float each : {0.0f, -0.0f, 1.0f, -0x1p-149f, kMost}) rows.emplace_back(size, each);
  rows.push_back(rows[0]);
  for (size_t i = 0; i < size; i += 2) rows.back()[i] = kEdges[(i / 2 + seed) % std::size(kEdges)];
  rows.push_back(rows[0]);
  for (size_t i = 0; i < size; ++i) rows.back()[i] = static_cast<float>(i % 254) - 126.5f;  // ties
  rows.back()[0] = 127.0f;
  return rows;
}

struct Quantised {
  int64_t stride, units;
  std::vector<int8_t> quants;
  std::vector<float> scales, offsets;
  std::vector<int32_t> sums;
  std::vector<int16_t> sums16, sums32;

  Quantised(const Kernels& k, Format f, const std::vector<std::vector<float>>& x, int64_t cols)
      : stride(round_up(cols, info(f).step)), units(stride / info(f).step) {
    const int64_t n = static_cast<int64_t>(x.size());
    const auto size = [&](int64_t unit) { return static_cast<size_t>(n * stride / unit); };
    quants.resize(size(1)), scales.resize(size(info(f).step));
    if (is_group(f)) offsets.resize(size(kGroup)), sums.resize(size(kGroup));
    if (is_super(f)) sums16.resize(size(16)), sums32.resize(size(kGroup));
    for (int64_t r = 0; r < n; ++r) {
      const float* row = x[static_cast<size_t>(r)].data();
      int8_t* q = quants.data() + r * stride;
      float* scale = scales.data() + r * units;
      if (is_group(f)) {
        k.quantise_group(row, cols, stride, q, scale, offsets.data() + r * units,
                         sums.data() + r * units);
      } else {
        k.quantise_super(row, cols, stride, q, scale, sums16.data() + r * units * 16,
                         sums32.data() + r * units * 8);
      }
    }
  }
};

void quantise(const Kernels& k, Format f, Hash& hash) {
  for (int64_t cols : {1, 31, 32, 75, 256, 300}) {
    const Quantised q(k, f, rows_of(cols, static_cast<uint64_t>(cols)), cols);
    hash.add(q.quants), hash.add(q.scales), hash.add(q.offsets), hash.add(q.sums);
    hash.add(q.sums16), hash.add(q.sums32);
  }
}

// Packed weights, 40 outputs. Bytes are anything, but for scales, which are moderate, 0 or tiny.
std::vector<uint8_t> weights(const Kind& kind, int64_t cols, bool full, Numbers& numbers) {
  const int64_t outputs = 40, blocks = outputs * (cols / kind.step);
  std::vector<uint8_t> file(static_cast<size_t>(blocks * kind.block_bytes));
  for (uint8_t& b : file) b = full ? 255 : static_cast<uint8_t>(numbers.next());
  const std::string name = kind.name;
  for (int64_t i = 0; i < blocks; ++i) {
    uint8_t* block = file.data() + i * kind.block_bytes;
    if (kind.step == 1) {
      const float x = i % 97 == 5 ? kEdges[i % std::size(kEdges)] : numbers.bell(-4);
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if (name == "F16") bits = float_to_half(x) & 0xfbffu;  // no infinity
      if (name == "BF16") bits >>= 16;
      for (int b = 0; b < kind.block_bytes; ++b) block[b] = static_cast<uint8_t>(bits >> 8 * b);
      continue;
    }
    if (full && name == "Q6_K") std::fill(block + 192, block + 208, uint8_t{128});  // signed scales
    if (full && name == "Q8_0") std::fill(block, block + kind.block_bytes, uint8_t{127});
    put_scales(name, block, [&] {
      uint32_t d = 0x1000u + numbers.next() % 0x1800u + (numbers.next() % 2 << 15);
      if (numbers.next() % 16 == 0) d &= 0x83ffu;  // a denormal half
      return d;
    });
  }
  return packed(name, file, outputs, cols, kind.format);
}

void product(const Kernels& k, const Kind& kind, bool full, Hash& hash) {
  const Format f = kind.format;
  const int64_t cols = is_super(f) ? 512 : kind.step == 1 ? 75 : is_float(f) ? 64 : 160, width = 48, most = 33;
  Numbers numbers(static_cast<uint64_t>(f) * 2 + full);
  const std::vector<uint8_t> packed_weights = weights(kind, cols, full, numbers);
  std::vector<std::vector<float>> rows;
  std::vector<float> flat;
  for (int64_t r = 0; r < most; ++r) {
    rows.push_back(numbers.bells(cols, static_cast<int>(r % 5) - 2));
    if (full && r % 3 == 1) rows.back().assign(static_cast<size_t>(cols), r % 2 ? 1.0f : -1.0f);
    if (r % 7 == 2) rows.back()[static_cast<size_t>(r)] = 0x1p-140f;
    if (r % 11 == 3) std::fill(rows.back().begin() + 32, rows.back().begin() + 64, -0.0f);
    flat.insert(flat.end(), rows.back().begin(), rows.back().end());
  }
  Activations x;
  x.stride = cols, x.values = flat.data();
  const Quantised q(k, is_float(f) ? Format::kA8 : f, rows, cols);
  if (!is_float(f)) {
    x = {q.stride, nullptr, q.quants.data(), q.scales.data(), q.offsets.data(), q.sums.data(),
         q.sums16.data(), q.sums32.data()};
  }
  const auto run = [&](int n, bool add) {
    std::vector<float> out(static_cast<size_t>(n * width), 0.375f);
    const Matmul m{packed_weights.data(), block_bytes(f, cols), x.stride, n, x, out.data(), width,
                   add};
    k.matmul[static_cast<int>(f)](m, 0, 1);  // in two parts, as two threads would
    k.matmul[static_cast<int>(f)](m, 1, width / kLanes);
    return out;
  };
  const std::vector<float> all = run(most, false);
  hash.add(all);
  hash.add(run(most, true));
  for (int n = 1; n <= 9; ++n) {
    expect(same_bits(run(n, false).data(), all.data(), n * width),
           std::string(k.name) + " " + kind.name + ": " + std::to_string(n) + " rows as among 33");
  }
}

template <class Body>
void each_row(Body body) {
  for (int64_t n : {1, 7, 8, 64, 75}) {
    for (const auto& x : rows_of(n, static_cast<uint64_t>(n) + 7)) body(x, n);
  }
  // A last bit that is off shows in a few results of a hundred.
  Numbers numbers(9);
  for (int i = 0; i < 60; ++i) body(numbers.bells(75, 2), 75);
}

void rows(const Kernels& k, const std::string& part, Hash& hash) {
  each_row([&](const std::vector<float>& x, int64_t n) {
    Numbers numbers(static_cast<uint64_t>(n));
    const std::vector<float> y = numbers.bells(n), z = numbers.bells(n);
    std::vector<float> out(x.size());
    if (part == "rms_norm") k.rms_norm(x.data(), y.data(), n, 1e-5f, out.data());
    if (part == "silu") k.gate(x.data(), y.data(), n, false, out.data());
    if (part == "gelu") k.gate(x.data(), y.data(), n, true, out.data());
    if (part == "add") k.add((out = x).data(), y.data(), n);
    if (part == "softcap") k.softcap((out = x).data(), n, 5.0f);
    if (part == "rotate") {
      out = x;
      out.insert(out.end(), z.begin(), z.end());
      k.rotate(out.data(), y.data(), z.data(), n);
    }
    if (part == "to_half") {
      std::vector<uint16_t> halves(x.size());
      k.to_half(x.data(), n, halves.data());
      return hash.add(halves);
    }
    hash.add(out);
  });
}

void softmax(const Kernels& k, Hash& hash) {
  for (float cap : {0.0f, 20.0f}) {
    for (int64_t n : {16, 48}) {
      for (std::vector<float> x : rows_of(n, 3)) {
        for (size_t i = 3; i < x.size(); i += 5) x[i] = kNone;
        x[1] = x[1] * 0.0f - 4000.0f;  // so far below that its share is 0, or all of it
        hash.add(k.softmax(x.data(), n, 0.25f, cap));
        hash.add(x);
      }
    }
  }
}

void attention(const Kernels& k, int cast, bool values, Hash& hash) {
  const int64_t dim = 48, slots = 23, n = 13;
  Numbers numbers(5);
  std::vector<float> floats = numbers.bells(slots * dim);
  for (size_t i = 0; i < std::size(kEdges); ++i) floats[i * 17] = kEdges[i];
  std::vector<uint16_t> halves(floats.size());
  for (size_t i = 0; i < halves.size(); ++i) {
    halves[i] = float_to_half(floats[i]);
    if ((halves[i] & 0x7fffu) == 0x7c00u) halves[i] = 0x7bffu;
    floats[i] = half_to_float(halves[i]);
  }
  const void* cache = cast ? static_cast<const void*>(floats.data()) : halves.data();
  const auto q = numbers.bells(n * dim), shares = numbers.bells(n * slots, -3);
  std::vector<float> across(q.size());  // [dim][n]
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t d = 0; d < dim; ++d) {
      across[static_cast<size_t>(d * n + r)] = q[static_cast<size_t>(r * dim + d)];
    }
  }
  for (int some = 1; some <= n; ++some) {
    std::vector<float> out = numbers.bells(some * (values ? dim : kLanes));
    if (values) {
      k.add_values[cast](shares.data(), slots, some, cache, some == 1 ? 1 : slots, dim, out.data());
    } else {
      k.dot_keys[cast](across.data(), n, some, cache, 1, dim, out.data(), kLanes);
    }
    hash.add(out);
  }
}

std::vector<Digest> digests(const Kernels& k) {
  std::vector<Digest> out;
  const auto part = [&](const char* name, auto body) {
    Hash hash;
    body(hash);
    out.push_back({name, hash.value});
  };
  for (const char* name : kKinds) {
    part(name, [&](Hash& hash) {
      for (bool full : {false, true}) product(k, *find_kind(name), full, hash);
    });
  }
  part("quantise_group", [&](Hash& hash) { quantise(k, Format::kA8, hash); });
  part("quantise_super", [&](Hash& hash) { quantise(k, Format::kK4, hash); });
  for (const char* name : {"rms_norm", "silu", "gelu", "add", "softcap", "rotate", "to_half"}) {
    part(name, [&](Hash& hash) { rows(k, name, hash); });
  }
  part("softmax", [&](Hash& hash) { softmax(k, hash); });
  part("dot_keys fp16", [&](Hash& hash) { attention(k, 0, false, hash); });
  part("dot_keys float32", [&](Hash& hash) { attention(k, 1, false, hash); });
  part("add_values fp16", [&](Hash& hash) { attention(k, 0, true, hash); });
  part("add_values float32", [&](Hash& hash) { attention(k, 1, true, hash); });
  return out;
}

}  // namespace

// No arguments: every set that runs here. --print: the table above. --sets: the names of those that
// run here; --sets all: of all there are.
int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string asked = argc > 1 ? argv[1] : "";
  if (asked == "--print") {
    for (const Digest& d : digests(*kernels_portable())) {
      std::printf("    {\"%s\", 0x%016llxu},\n", d.part, static_cast<unsigned long long>(d.value));
    }
    return 0;
  }
  for (const char* name : {"amx", "avx512vnni", "avxvnni", "avx2", "i8mm", "neon", "portable",
                           "amx-emulated"}) {
    const Kernels* k = choose_kernels(name);
    if (asked == "--sets") {
      if (k || argc > 2) std::printf("%s ", name);
      continue;
    }
    if (!k) continue;
    const int before = failures;
    const std::vector<Digest> got = digests(*k);
    expect(got.size() == std::size(kDigests), "as many digests as parts");
    for (size_t i = 0; i < std::min(got.size(), std::size(kDigests)); ++i) {
      expect(got[i].value == kDigests[i].value, std::string(name) + ": the bits of " + got[i].part);
    }
    std::printf("%-10s %s\n", name, failures == before ? "bits as on every processor" : "FAILED");
  }
  return failures ? 1 : 0;
}
