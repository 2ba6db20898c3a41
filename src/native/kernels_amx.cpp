// AVX-512 VNNI with the 8-bit tiles of AMX.
#include "kernels.h"

#if defined(__linux__) && defined(__x86_64__) && defined(__AMX_INT8__) && defined(__AMX_TILE__) && \
    defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own header leaves operands undefined that a mask of all ones never takes, and warns of it.
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "isa_avx512.h"
#include "tiles.h"

namespace {
using namespace redwood;

// By name, not by intrinsics: those of GCC 12 take no constant expressions as tiles, and do not say
// that a load reads memory.
struct Tiles {
  // The fewest rows of activations that are faster here than by dot products, as measured in whole
  // passes of two models (formats with tables and of 2 bits: taken over from the others). Groups of 32
  // fill half of a tile and need floats after each.
  static constexpr int fewest(Format f) {
    if (is_super(f)) return 12;
    return bits_of(f) < 8 && !has_minimum(f) ? 32 : 96;
  }

  static void configure(const TileConfig& config) {
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  static void release() { asm volatile("tilerelease"); }
  template <int T>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
  }
  // Sums += A times B; signed bytes by unsigned or by signed ones.
  template <int SUMS, int A, int B>
  static void multiply_unsigned() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(A), "i"(B));
  }
  template <int SUMS, int A, int B>
  static void multiply_signed() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(A), "i"(B));
  }
};

// The processor has tiles of the size we use, and the system keeps their state.
bool has_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned kOsXsave = 1u << 27, kTile = 1u << 24, kInt8 = 1u << 25;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsXsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTile) || !(d & kInt8)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;  // configuration and data
  if ((low & kTileState) != kTileState) return false;
  // Palette 1: bytes of a row and number of tiles, rows.
  if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return false;
  return (b & 0xffff) >= kTileBytes && b >> 16 >= kTiles && (c & 0xffff) >= kTileRows;
}

// Linux lends the 8 KiB of tiles to a process that asks, for all its threads. It refuses where it
// is too old, or where a thread's alternate signal stack could not hold them.
bool allowed() {
  constexpr long kGet = 0x1022, kAsk = 0x1023, kTileData = 18;  // ARCH_..._XCOMP_PERM
  if (syscall(SYS_arch_prctl, kAsk, kTileData) != 0) return false;
  unsigned long granted = 0;
  return syscall(SYS_arch_prctl, kGet, &granted) == 0 && (granted >> kTileData & 1) != 0;
}

}  // namespace

#include "tiles_impl.h"

const redwood::Kernels* redwood::kernels_amx() {
  static const Kernels* const kernels = []() -> const Kernels* {
    const Kernels* base = kernels_avx512vnni();
    return base && has_tiles() && allowed() ? with_tiles(*base, "amx") : nullptr;
  }();
  return kernels;
}
#else
const redwood::Kernels* redwood::kernels_amx() { return nullptr; }
#endif
