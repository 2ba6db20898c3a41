// 64-bit Arm with the dot product and the 8-bit matrix product; all else is as in kernels_neon.cpp.
#include "kernels.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_MATMUL_INT8)
#include "isa_neon.h"
#include "matmul_impl.h"
#include "i8mm_impl.h"

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

bool has_matrix_product() {
#if defined(__linux__)
  constexpr unsigned long kSecond = 26, kI8mm = 1ul << 13;  // AT_HWCAP2, HWCAP2_I8MM
  return (getauxval(kSecond) & kI8mm) != 0;
#elif defined(__APPLE__)
  int here = 0;
  size_t size = sizeof here;
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &here, &size, nullptr, 0) == 0 && here == 1;
#else
  return false;
#endif
}

}  // namespace

const redwood::Kernels* redwood::kernels_i8mm() {
  const Kernels* neon = kernels_neon();
  if (!neon || !has_matrix_product()) return nullptr;
  static const Kernels kernels = [&] {
    Kernels k = *neon;
    k.name = "i8mm";
    each_quantised([&](auto format) {
      k.matmul[static_cast<int>(format())] = matmul_pairs<format()>;
    });
    return k;
  }();
  return &kernels;
}
#else
const redwood::Kernels* redwood::kernels_i8mm() { return nullptr; }
#endif
