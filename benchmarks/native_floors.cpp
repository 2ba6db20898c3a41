// What this machine can do at best, in the units of a forward: prints one JSON object.
// Build: g++ -O2 -mavx2 -pthread native_floors.cpp -o native_floors; run: native_floors THREADS
// read_gb_s: the best of several ways to read a gigabyte, without and with prefetch.
// macs_ns: 8-bit multiply-adds per nanosecond of the instruction that the kernels use here, alone.
// macs_add_ns: the same with the addition that must follow each (16-bit sums).
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

static volatile int64_t sink;

template <class Work>
static double best_seconds(int threads, int repeats, Work work) {
  double best = 1e9;
  for (int r = 0; r < repeats; ++r) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> team;
    for (int t = 0; t < threads; ++t) team.emplace_back(work, t);
    for (auto& thread : team) thread.join();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = std::min(best, taken.count());
  }
  return best;
}

static void read_all(const char* p, size_t bytes, int ahead) {
  __m256i a = _mm256_setzero_si256(), b = a;
  for (size_t i = 0; i < bytes; i += 64) {
    if (ahead) _mm_prefetch(p + i + ahead, _MM_HINT_T0);
    a = _mm256_add_epi64(a, _mm256_load_si256(reinterpret_cast<const __m256i*>(p + i)));
    b = _mm256_add_epi64(b, _mm256_load_si256(reinterpret_cast<const __m256i*>(p + i + 32)));
  }
  sink = sink + _mm256_extract_epi64(_mm256_add_epi64(a, b), 0);
}

#define EIGHT(M) M("0", "8") M("1", "9") M("2", "10") M("3", "11") \
                 M("4", "12") M("5", "13") M("6", "8") M("7", "9")
#define MUL(a, b) "vpmaddubsw %%ymm15, %%ymm14, %%ymm" a "\n"
#define MUL_ADD(a, b) MUL(a, b) "vpaddw %%ymm" a ", %%ymm" b ", %%ymm" b "\n"
#define USED "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
             "xmm10", "xmm11", "xmm12", "xmm13"

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : 1;
  const size_t bytes = size_t{1} << 30;
  auto* memory = static_cast<char*>(std::aligned_alloc(4096, bytes + 65536));
  std::memset(memory, 1, bytes + 65536);
  double read = 1e9;
  for (int ahead : {0, 1024, 4096}) {
    read = std::min(read, best_seconds(threads, 3, [&](int t) {
      const size_t share = bytes / static_cast<size_t>(threads) / 64 * 64;
      read_all(memory + share * static_cast<size_t>(t), share, ahead);
    }));
  }
  const long rounds = 20000000;
  const double mul = best_seconds(threads, 3, [&](int) {
    for (long i = 0; i < rounds; ++i) asm volatile(EIGHT(MUL)::: USED);
  });
  const double mul_add = best_seconds(threads, 3, [&](int) {
    for (long i = 0; i < rounds; ++i) asm volatile(EIGHT(MUL_ADD)::: USED);
  });
  const double macs = 8.0 * 32 * static_cast<double>(rounds) * threads / 1e9;
  std::printf("{\"read_gb_s\": %.2f, \"macs_ns\": %.1f, \"macs_add_ns\": %.1f}\n",
              static_cast<double>(bytes) / read / 1e9, macs / mul, macs / mul_add);
}
