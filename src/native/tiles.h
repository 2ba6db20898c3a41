// The configuration of tiles, for processors and for their emulation.
#pragma once
#include <cstdint>

namespace redwood {

constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;  // of palette 1

// As LDTILECFG reads it.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "64 bytes are loaded");

}  // namespace redwood
