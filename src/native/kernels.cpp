#include "kernels.h"

#include <cstring>

namespace redwood {

const Kernels* choose_kernels(const char* name) {
  const Kernels* all[] = {kernels_avx512vnni(), kernels_avxvnni(), kernels_avx2(), kernels_i8mm(),
                          kernels_neon(), kernels_portable()};
  for (const Kernels* kernels : all) {
    if (kernels && (std::strcmp(name, "auto") == 0 || std::strcmp(name, kernels->name) == 0)) {
      return kernels;
    }
  }
  return nullptr;
}

}  // namespace redwood
