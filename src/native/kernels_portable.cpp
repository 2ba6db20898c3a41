#include "isa_portable.h"
#include "matmul_impl.h"
#include "float_impl.h"

const redwood::Kernels* redwood::kernels_portable() { return table("portable"); }
