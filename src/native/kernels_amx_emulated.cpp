// Tiles in plain C++: the logic of the kernels with tiles, tested on every machine. Slow.
#include "isa_portable.h"
#include "tiles_emulated.h"
#include "tiles_impl.h"

const redwood::Kernels* redwood::kernels_amx_emulated() {
  return with_tiles(*kernels_portable(), "amx-emulated");
}
