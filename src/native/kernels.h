// What an instruction set must provide. Every function treats each row of activations alone and in a
// fixed order of operations, so a row's result does not depend on the other rows.
#pragma once
#include <type_traits>

#include "formats.h"
#include "stream.h"

namespace redwood {

// Activations of n rows, as the format of the weights wants them.
struct Activations {
  int64_t stride = 0;             // inputs per row, padded to the format's step
  const float* values = nullptr;  // [n, stride]: float formats
  const int8_t* quants = nullptr;  // [n, stride]: quantised formats
  const float* scales = nullptr;  // [n, stride / 32] or, for K formats, [n, stride / 256]
  const float* offsets = nullptr;  // [n, stride / 32]: scale times sum of quants (group formats)
  const int32_t* sums = nullptr;   // [n, stride / 32]: sum of quants (group formats)
  const int16_t* sums16 = nullptr;  // [n, stride / 16]: sums of 16 quants (K6, K2, T3)
  const int16_t* sums32 = nullptr;  // [n, stride / 32]: sums of 32 quants (K4, K5, T4)
};

// A state S [key_dim][16] takes in a key k and a value v [16]: with S' = decay S it becomes
// S' + k (beta (v - S'^T k))^T, or S' + k (beta v)^T where nothing is corrected. `out`: S^T q of what it
// becomes, if there is a query.
struct Recur {
  const float* from;
  float* to;  // the same as `from`, or another place
  const float *key, *value;
  float decay, beta;
  bool correct;
  int64_t key_dim;
  const float* query;
  float* out;
};

struct Matmul {
  const uint8_t* weights;  // packed, first block
  int64_t block_bytes;     // from one block of 16 outputs to the next
  int64_t cols;            // padded to the format's step
  int n;                   // rows of activations
  Activations x;
  float* out;  // [n, out_stride], columns padded to 16
  int64_t out_stride;
  bool add;  // add to what `out` holds
  // Another number for other activations, by which a thread knows what it has prepared; 0: unknown.
  uint64_t inputs = 0;
  WeightStream* ahead = nullptr;  // weights of later calls: so many bytes are brought near meanwhile
  int64_t ahead_bytes = 0;
};

// Keys of 16 slots: [head_dim][16]; values: [slot][head_dim padded to 16].
struct Kernels {
  const char* name;
  // Outputs of blocks [first, last) for all rows.
  void (*matmul[static_cast<int>(Format::kCount)])(const Matmul&, int64_t first, int64_t last);
  // One row of `cols` values (padded with zeros to `stride`) to 8 bits per group of 32.
  void (*quantise_group)(const float* x, int64_t cols, int64_t stride, int8_t* q, float* scales,
                         float* offsets, int32_t* sums);
  // The same per super-block of 256.
  void (*quantise_super)(const float* x, int64_t cols, int64_t stride, int8_t* q, float* scales,
                         int16_t* sums16, int16_t* sums32);
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* out);
  // Rotates pairs (i, i + half) of a head by cos and sin [half].
  void (*rotate)(float* x, const float* cos, const float* sin, int64_t half);
  void (*gate)(const float* gate, const float* up, int64_t n, bool gelu, float* out);
  void (*add)(float* x, const float* y, int64_t n);
  void (*to_half)(const float* x, int64_t n, uint16_t* out);
  // scores[r * score_stride + s] = query r . key of slot s, for `blocks` of 16 slots; r < n. Queries are
  // [head_dim][q_stride], so that those of one dimension stand together. Keys are fp16 or float32.
  void (*dot_keys[2])(const float* q, int64_t q_stride, int n, const void* keys, int64_t blocks,
                      int64_t head_dim, float* scores, int64_t score_stride);
  // out[r * dim + 0..dim) += sum over slots of weights[r * weight_stride + slot] * values[slot], in
  // order of slots.
  void (*add_values[2])(const float* weights, int64_t weight_stride, int n, const void* values,
                        int64_t slots, int64_t dim, float* out);
  // Scales (with a soft cap if it is not 0) and turns n scores into exp(score - max); n is a
  // multiple of 16, masked ones are -inf. Returns the sum.
  float (*softmax)(float* scores, int64_t n, float scale, float softcap);
  void (*softcap)(float* x, int64_t n, float cap);
  // x[i] times the sigmoid of gate[i].
  void (*sigmoid)(const float* gate, int64_t n, float* x);
  // out[c] = sum over t of weights[t * channels + c] * inputs[t][c], t rising, then a bias if there is
  // one; `silu`: silu of that.
  void (*convolve)(const float* const* inputs, const float* weights, const float* bias, int64_t taps,
                   int64_t channels, bool silu, float* out);
  // One step of a recurrence, for 16 components of a head's values: see `Recur`.
  void (*recur)(const Recur& step);
};

// Calls body(format) for every quantised format, each as a constant; to fill a table.
template <class Body>
void each_quantised(Body body) {
  body(std::integral_constant<Format, Format::kA4>{});
  body(std::integral_constant<Format, Format::kA4M>{});
  body(std::integral_constant<Format, Format::kA5>{});
  body(std::integral_constant<Format, Format::kA5M>{});
  body(std::integral_constant<Format, Format::kA8>{});
  body(std::integral_constant<Format, Format::kK4>{});
  body(std::integral_constant<Format, Format::kK5>{});
  body(std::integral_constant<Format, Format::kK6>{});
  body(std::integral_constant<Format, Format::kA4N>{});
  body(std::integral_constant<Format, Format::kA4X>{});
  body(std::integral_constant<Format, Format::kK2>{});
  body(std::integral_constant<Format, Format::kT4>{});
  body(std::integral_constant<Format, Format::kT3>{});
}

// Null where the library was built without that instruction set, or this processor lacks it.
const Kernels* kernels_portable();
const Kernels* kernels_avx2();
const Kernels* kernels_avxvnni();
const Kernels* kernels_avx512vnni();
const Kernels* kernels_amx();
const Kernels* kernels_neon();
const Kernels* kernels_i8mm();
// A reference for tests; never chosen by "auto".
const Kernels* kernels_amx_emulated();

// The best of them here; a name chooses one. Null: no such name, or it cannot run here.
const Kernels* choose_kernels(const char* name);

}  // namespace redwood
