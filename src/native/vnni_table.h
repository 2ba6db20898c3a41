// The table of AVX2 with the integer products of an instruction set that has an 8-bit dot product:
// all else would be the same code, built once more. Included after matmul_impl.h.
#pragma once
#include "kernels.h"

namespace {

const redwood::Kernels* with_integer_side(const redwood::Kernels& avx2, const char* name) {
  static const redwood::Kernels kernels = [&] {
    redwood::Kernels k = avx2;
    k.name = name;
    each_quantised([&](auto format) { k.matmul[static_cast<int>(format())] = matmul<format()>; });
    return k;
  }();
  return &kernels;
}

}  // namespace
