// The table of AVX2 with the integer products of an instruction set that has an 8-bit dot product:
// all else would be the same code, built once more. Included after matmul_impl.h.
#pragma once
#include "kernels.h"

namespace {

const redwood::Kernels* with_integer_side(const redwood::Kernels& avx2, const char* name) {
  static const redwood::Kernels kernels = [&] {
    redwood::Kernels k = avx2;
    const auto set = [&](Format format, auto* function) {
      k.matmul[static_cast<int>(format)] = function;
    };
    k.name = name;
    set(Format::kA4, matmul<Format::kA4>);
    set(Format::kA4M, matmul<Format::kA4M>);
    set(Format::kA5, matmul<Format::kA5>);
    set(Format::kA5M, matmul<Format::kA5M>);
    set(Format::kA8, matmul<Format::kA8>);
    set(Format::kK4, matmul<Format::kK4>);
    set(Format::kK5, matmul<Format::kK5>);
    set(Format::kK6, matmul<Format::kK6>);
    return k;
  }();
  return &kernels;
}

}  // namespace
