// Times products of packed weights, kernel by kernel: microseconds for one matrix and some numbers of
// rows, on one thread, in turns between instruction sets. The best of many bursts: beside other
// tenants of a processor, medians say more of them. Build and run: make -C tests/native bench
//   [ARGS="--isa avx512vnni,amx --formats k4,a4m --rows 1,8,16 --cols N --outputs N --stream MB"]
// --stream: walks over that many megabytes of weights, so that they come from memory, not from a cache.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "kernels.h"
#include "pack.h"

using namespace redwood;

static std::vector<std::string> parts(const std::string& text) {
  std::vector<std::string> out;
  std::stringstream in(text);
  for (std::string part; std::getline(in, part, ',');) out.push_back(part);
  return out;
}

static uint32_t state = 1;
static uint32_t next() { return state = state * 1664525u + 1013904223u; }

int main(int count, char** arguments) {
  std::string isas = "auto", formats = "k4,k6,a4,a4m,a8", rows_text = "1,4,8,12,16,24,32,64";
  int64_t cols = 1536, outputs = 256, stream = 0;
  int bursts = 41;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = arguments[i], value = arguments[i + 1];
    if (name == "--isa") isas = value;
    else if (name == "--formats") formats = value;
    else if (name == "--rows") rows_text = value;
    else if (name == "--cols") cols = std::atoll(value.c_str());
    else if (name == "--outputs") outputs = std::atoll(value.c_str());
    else if (name == "--stream") stream = std::atoll(value.c_str());
    else if (name == "--bursts") bursts = std::atoi(value.c_str());
    else return std::fprintf(stderr, "unknown option %s\n", name.c_str()), 2;
  }
  std::vector<const Kernels*> sets;
  for (const auto& name : parts(isas)) {
    sets.push_back(choose_kernels(name.c_str()));
    if (!sets.back()) return std::fprintf(stderr, "%s is not here\n", name.c_str()), 2;
  }
  std::printf("%-6s %5s", "format", "rows");
  for (auto* k : sets) std::printf(" %14s", k->name);
  std::printf("   us (multiply-adds per ns)\n");
  for (const auto& format : parts(formats)) {
    const Format f = find_format(format);
    const int64_t w = round_up(cols, info(f).step), bytes = packed_bytes(f, outputs, cols);
    const int64_t copies = std::max<int64_t>(1, (stream << 20) / bytes);
    const size_t size = static_cast<size_t>(round_up(bytes * copies, 64));
    auto* weights = static_cast<uint8_t*>(std::aligned_alloc(64, size));
    for (size_t i = 0; i + 4 <= size; i += 4) {
      const uint32_t bits = next() & 0x3bff3bffu;  // no infinity in any fp16 number
      std::memcpy(weights + i, &bits, 4);
    }
    for (const auto& text : parts(rows_text)) {
      const int n = std::atoi(text.c_str());
      std::vector<float> values(static_cast<size_t>(n * w)), out(static_cast<size_t>(n * outputs));
      std::vector<int8_t> quants(values.size());
      std::vector<float> scales(values.size() / 32 + 1, 0.01f), offsets(scales.size(), 0.3f);
      std::vector<int32_t> sums(scales.size(), 30);
      std::vector<int16_t> sums16(values.size() / 16 + 1, 15), sums32(scales.size(), 30);
      for (auto& q : quants) q = static_cast<int8_t>(next() >> 24);
      for (auto& q : quants) q = q == -128 ? 0 : q;
      for (auto& v : values) v = static_cast<float>(next() >> 8) * 1e-8f;
      std::printf("%-6s %5d", format.c_str(), n);
      std::vector<std::vector<double>> times(sets.size());
      for (int b = 0; b < bursts; ++b) {
        for (size_t s = 0; s < sets.size(); ++s) {
          Matmul m{weights, block_bytes(f, cols), w, n,
                   {w, values.data(), quants.data(), scales.data(), offsets.data(), sums.data(), sums16.data(),
                    sums32.data()},
                   out.data(), outputs, false};
          const auto product = sets[s]->matmul[static_cast<int>(f)];
          const int64_t once = outputs * cols * n / 64 + 1;
          const int64_t calls = copies > 1 ? copies : std::max<int64_t>(1, 4000000 / once);
          const auto start = std::chrono::steady_clock::now();
          for (int64_t c = 0; c < calls; ++c) {
            m.weights = weights + c % copies * bytes;
            WeightStream ahead;
            if (copies > 1) {
              ahead.add(weights + (c + 1) % copies * bytes, bytes);
              ahead.restart();
              m.ahead = &ahead, m.ahead_bytes = bytes;
            }
            product(m, 0, outputs / kLanes);
          }
          const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
          if (b) times[s].push_back(taken.count() * 1e6 / static_cast<double>(calls));
        }
      }
      for (auto& t : times) {
        const double us = *std::min_element(t.begin(), t.end());
        std::printf(" %8.1f (%3.0f)", us, static_cast<double>(outputs * cols * n) / us * 1e-3);
      }
      std::printf("\n");
      std::fflush(stdout);
    }
    std::free(weights);
  }
}
