// AVX-512 with VNNI.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__) && defined(__AVX512VNNI__) && defined(__AVX2__) && defined(__FMA__) && \
    defined(__F16C__)
#include "isa_avx512.h"
#include "matmul_impl.h"
#include "float_impl.h"
#include "float_avx512.h"

namespace {

struct Sixteen {
  __m512 x;
  static Sixteen read(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Sixteen all(float v) { return {_mm512_set1_ps(v)}; }
  void write(float* p) const { _mm512_storeu_ps(p, x); }
  friend Sixteen operator+(Sixteen a, Sixteen b) { return {_mm512_add_ps(a.x, b.x)}; }
  friend Sixteen operator-(Sixteen a, Sixteen b) { return {_mm512_sub_ps(a.x, b.x)}; }
  friend Sixteen operator*(Sixteen a, Sixteen b) { return {_mm512_mul_ps(a.x, b.x)}; }
  static Sixteen fused(Sixteen a, Sixteen b, Sixteen c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
};

void wide_gate(const float* gate_, const float* up, int64_t n, bool gelu, float* out) {
  const int64_t whole = gelu ? 0 : n / 16 * 16;
  wide::silu(gate_, up, whole, out);
  if (whole < n) gate(gate_ + whole, up + whole, n - whole, gelu, out + whole);
}

float wide_softmax(float* scores, int64_t n, float scale, float cap) {
  return cap == 0.0f ? wide::plain_softmax(scores, n, scale) : softmax(scores, n, scale, cap);
}

void wide_group(const float* x, int64_t cols, int64_t stride, int8_t* q, float* scales,
                float* offsets, int32_t* sums) {
  const int64_t g = wide::quantise_groups(x, cols, q, scales, offsets, sums), at = g * kGroup;
  if (at < stride) {
    quantise_group(x + at, cols - at, stride - at, q + at, scales + g, offsets + g, sums + g);
  }
}

void wide_super(const float* x, int64_t cols, int64_t stride, int8_t* q, float* scales,
                int16_t* sums16, int16_t* sums32) {
  const int64_t s = wide::quantise_supers(x, cols, q, scales, sums16, sums32), at = s * kSuper;
  if (at < stride) {
    quantise_super(x + at, cols - at, stride - at, q + at, scales + s, sums16 + s * 16,
                   sums32 + s * 8);
  }
}

}  // namespace

const redwood::Kernels* redwood::kernels_avx512vnni() {
  const Kernels* avx2 = kernels_avx2();
  const bool here = avx2 && __builtin_cpu_supports("avx512f") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  if (!here) return nullptr;
  static const Kernels kernels = [] {
    Kernels k = *table("avx512vnni");
    k.quantise_group = wide_group;
    k.quantise_super = wide_super;
    k.gate = wide_gate;
    k.dot_keys[0] = wide::dot_keys<uint16_t>;
    k.dot_keys[1] = wide::dot_keys<float>;
    k.add_values[0] = wide::add_values<uint16_t>;
    k.add_values[1] = wide::add_values<float>;
    k.softmax = wide_softmax;
    k.recur = recur<Sixteen>;
    return k;
  }();
  return &kernels;
}
#else
const redwood::Kernels* redwood::kernels_avx512vnni() { return nullptr; }
#endif
