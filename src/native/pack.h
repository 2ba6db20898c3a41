// From the rows of a file to packed weights, and back to one row of numbers.
#pragma once
#include <string>

#include "formats.h"

namespace redwood {

// A kind of weights in a file, by its GGUF name ("Q4_K", "F32", "BF16", ...).
struct Kind {
  const char* name;
  int step;        // values of a block
  int block_bytes;
  Format format;  // the format that holds it exactly
};

// Null: we do not read this kind.
const Kind* find_kind(const std::string& name);
// kCount: no such format.
Format find_format(const std::string& name);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);

// Numbers of one row of a file.
void read_row(const Kind& kind, const uint8_t* row, int64_t cols, float* out);

// Packs blocks [first, last) of a matrix. Row r of the matrix is row order[r] of the file (null: r).
// `format` is the kind's own, one of floats, or, for kinds of floats, one of groups.
void pack_blocks(const Kind& kind, const uint8_t* rows, int64_t row_count, int64_t cols,
                 const int32_t* order, Format format, uint8_t* out, int64_t first, int64_t last);

// Numbers of one row of packed weights; the row of an embedding.
void unpack_row(Format format, const uint8_t* packed, int64_t cols, int64_t row, float* out);

}  // namespace redwood
