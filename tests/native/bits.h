// Digests of results, and numbers that are the same on every processor: made by integers alone, since
// the distributions of the standard library differ from one to the next.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace check {

// FNV-1a of 64 bits, over the bytes of numbers, lowest first.
struct Hash {
  uint64_t value = 0xcbf29ce484222325u;
  void bits(uint64_t x, int bytes) {
    for (int i = 0; i < bytes; ++i) value = (value ^ (x >> 8 * i & 255)) * 0x100000001b3u;
  }
  void add(double x) {
    uint64_t raw;
    std::memcpy(&raw, &x, 8);
    bits(raw, 8);
  }
  void add(float x) {
    uint32_t raw;
    std::memcpy(&raw, &x, 4);
    bits(raw, 4);
  }
  void add(int8_t x) { bits(static_cast<uint8_t>(x), 1); }
  void add(int16_t x) { bits(static_cast<uint16_t>(x), 2); }
  void add(uint16_t x) { bits(x, 2); }
  void add(int32_t x) { bits(static_cast<uint32_t>(x), 4); }
  template <class T>
  void add(const std::vector<T>& all) {
    for (const T x : all) add(x);
  }
};

class Numbers {  // a linear congruential generator, of which the upper half is used
 public:
  explicit Numbers(uint64_t seed) : state_(seed) {}
  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  // Nearly normal, of mean 0 and spread 1.15 * 2^exponent.
  float bell(int exponent = 0) {
    int sum = -131070;
    for (int i = 0; i < 4; ++i) sum += static_cast<int>(next() & 0xffff);
    return std::ldexp(static_cast<float>(sum), exponent - 15);
  }
  std::vector<float> bells(int64_t count, int exponent = 0) {
    std::vector<float> out(static_cast<size_t>(count));
    for (float& x : out) x = bell(exponent);
    return out;
  }

 private:
  uint64_t state_;
};

}  // namespace check
