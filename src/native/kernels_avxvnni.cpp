// AVX2 with the 8-bit dot product of AVX-VNNI.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__AVXVNNI__)
#define REDWOOD_VNNI
#include "isa_avx2.h"
#include "matmul_impl.h"
#include "vnni_table.h"

const redwood::Kernels* redwood::kernels_avxvnni() {
  const Kernels* avx2 = kernels_avx2();
  return avx2 && __builtin_cpu_supports("avxvnni") ? with_integer_side(*avx2, "avxvnni") : nullptr;
}
#else
const redwood::Kernels* redwood::kernels_avxvnni() { return nullptr; }
#endif
