// 64-bit Arm with the dot product extension.
#include "kernels.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include "isa_neon.h"
#include "matmul_impl.h"
#include "float_impl.h"

#ifdef __linux__
#include <sys/auxv.h>
#endif

namespace {

bool has_dot_product() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP, which older headers lack
  return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
#elif defined(__APPLE__)
  return true;  // every Apple processor of a Mac has it
#else
  return false;
#endif
}

}  // namespace

const redwood::Kernels* redwood::kernels_neon() {
  return has_dot_product() ? table("neon") : nullptr;
}
#else
const redwood::Kernels* redwood::kernels_neon() { return nullptr; }
#endif
