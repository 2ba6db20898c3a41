// AVX-512 with VNNI.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "isa_avx512.h"
#include "matmul_impl.h"
#include "vnni_table.h"

const redwood::Kernels* redwood::kernels_avx512vnni() {
  const Kernels* avx2 = kernels_avx2();
  const bool here = avx2 && __builtin_cpu_supports("avx512f") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni");
  return here ? with_integer_side(*avx2, "avx512vnni") : nullptr;
}
#else
const redwood::Kernels* redwood::kernels_avx512vnni() { return nullptr; }
#endif
