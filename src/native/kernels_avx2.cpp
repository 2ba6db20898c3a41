// AVX2, FMA and F16C. Built with the flags for these where the compiler has them (CMakeLists.txt).
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "isa_avx2.h"
#include "matmul_impl.h"
#include "float_impl.h"

const redwood::Kernels* redwood::kernels_avx2() {
  const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  return here ? table("avx2") : nullptr;
}
#else
const redwood::Kernels* redwood::kernels_avx2() { return nullptr; }
#endif
