#include "kernels.h"

#include <cstring>

namespace redwood {

const Kernels* choose_kernels(const char* name) {
  const Kernels* all[] = {kernels_amx(),  kernels_avx512vnni(), kernels_avxvnni(),
                          kernels_avx2(), kernels_neon(),       kernels_portable()};
  for (const Kernels* kernels : all) {
    if (kernels && (std::strcmp(name, "auto") == 0 || std::strcmp(name, kernels->name) == 0)) {
      return kernels;
    }
  }
  const Kernels* emulated = kernels_amx_emulated();
  return std::strcmp(name, emulated->name) == 0 ? emulated : nullptr;
}

}  // namespace redwood
