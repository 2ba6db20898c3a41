#include "kernels.h"

#include <cstring>

namespace redwood {

const Kernels* choose_kernels(const char* name) {
  // Best first. What is asked for by name alone is looked at alone: AMX asks the system for leave.
  // Portable kernels are everywhere, so that "auto" never gets past them.
  static constexpr struct {
    const char* name;
    const Kernels* (*find)();
  } sets[] = {{"amx", kernels_amx},
              {"avx512vnni", kernels_avx512vnni},
              {"avxvnni", kernels_avxvnni},
              {"avx2", kernels_avx2},
              {"i8mm", kernels_i8mm},
              {"neon", kernels_neon},
              {"portable", kernels_portable},
              {"amx-emulated", kernels_amx_emulated}};
  const bool best = std::strcmp(name, "auto") == 0;
  for (const auto& set : sets) {
    if (!best && std::strcmp(name, set.name) != 0) continue;
    if (const Kernels* kernels = set.find()) return kernels;
  }
  return nullptr;
}

}  // namespace redwood
