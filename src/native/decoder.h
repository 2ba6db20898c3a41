// A decoder-only transformer over paged slots: rows of tokens and, after them, trees of nodes.
#pragma once
#include <limits>
#include <memory>
#include <vector>

#include "cache.h"
#include "kernels.h"
#include "pool.h"

namespace redwood {

constexpr int kMostExperts = 1024;
constexpr int kMostWidth = 16;  // of convolutions

struct Matrix {
  Format format = Format::kF32;
  const uint8_t* data = nullptr;
  int64_t rows = 0, cols = 0;
};

using Vector = std::vector<float>;  // empty: the model has none

// Matrices of all experts, one behind the other, each of whole blocks; biases [experts, outputs].
struct Experts {
  Matrix router, gate, up, down;
  Matrix shared_switch;      // [1, hidden]: its sigmoid weighs the shared expert
  Vector router_bias;        // [experts], added to the scores
  Vector choice_bias;        // [experts], added for the choice alone
  Vector gate_bias, up_bias, down_bias;
  explicit operator bool() const { return router.data != nullptr; }
};

// A recurrent layer in the place of attention, or beside it: a short convolution of gated inputs; or gated
// delta nets or Mamba-2: a convolution, and then a matrix of state per head.
struct Recurrent {
  enum Kind { kNone, kShortConv, kDelta, kMamba };
  Kind kind = kNone;
  // Rows of `mix`: gates of inputs, gates of outputs and inputs; or queries, keys and values; or, of Mamba-2,
  // values, keys and queries. `alpha`: times; `out`: back to the residual.
  Matrix mix, gate, beta, alpha, out;
  Vector mix_bias, gate_bias, conv_bias, out_bias;
  Vector conv;               // [width, channels], the latest input's last
  Vector dt_bias, decay;     // [heads]; decay: negative, per unit of time
  Vector norm;               // [value_dim]; of Mamba-2: [heads * value_dim], or none
  Vector skip;               // [heads]: of Mamba-2, how much of a value is said as it is
};

// Sizes of all recurrent layers of a model.
struct Recurrence {
  int64_t width = 0;  // of the convolution, its own input counted
  int64_t channels = 0, heads = 0, key_heads = 0, key_dim = 0, value_dim = 0;
  bool tiled = false;  // head h has key head h modulo key_heads; else neighbours share one
  // Of Mamba-2: the gate follows the norm; multipliers of gate and times, and limits of times.
  bool norm_first = false;
  float gate_scale = 1.0f, time_scale = 1.0f, least_time = 0.0f;
  float most_time = std::numeric_limits<float>::infinity();
  int64_t every = 0;   // see StatesShape
};

struct Layer {
  Vector attn_norm, attn_norm_bias, q_bias, k_bias, v_bias, o_bias;
  Vector q_norm, k_norm;  // [head_dim]: of each head; [heads * head_dim]: of all heads together
  Vector sinks;           // [heads]: a score of nothing, beside those of the keys
  Vector post_attn_norm, ffn_norm, ffn_norm_bias, post_ffn_norm;
  Vector gate_bias, up_bias, down_bias;
  Matrix q, k, v, o;
  Matrix o_gate;          // its sigmoid multiplies what attention says
  Recurrent recurrent;
  int cache = 0;          // the number of the layer among those with keys and values; -1: no attention
  // In place of k and v: a latent of each token with a part that all keys share, [latent + turning],
  // and what makes keys and values of the normed latent.
  Matrix kv_a, kv_b;
  Vector kv_a_norm;
  Matrix gate, up, down;  // of the shared expert where there are experts; no gate: up alone
  Experts experts;
  int64_t window = 0;     // 0: all positions are seen
  int rope = 0;           // -1: no positions
};

// How rows are given to experts.
struct Routing {
  int64_t experts = 0, used = 0, ffn = 0;
  bool sigmoid = false;    // scores; else softmax
  bool normalise = false;  // weights of the chosen add up to 1, before `scale`
  float scale = 1.0f;
  int64_t groups = 1, groups_used = 1;  // experts are chosen from the best groups
  bool two_best = false;  // of a group count; else its best
};

struct Rope {
  Vector inv_freq;
  float factor = 1.0f;  // of cos and sin
  Vector cos, sin;      // [positions, inv_freq.size()], as far as needed so far
};

struct Model {
  int64_t hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab = 0;
  int64_t value_dim = 0;  // of a head's values
  int64_t latent = 0;     // width of latents; 0: keys and values are projected
  int64_t outputs = 0;  // tokens with a score: the first of the vocabulary, or all
  float eps = 1e-6f, attention_scale = 1.0f, attention_softcap = 0.0f, logit_softcap = 0.0f;
  float embedding_scale = 1.0f;
  // Multiply what attention, recurrent layers and MLPs add to the residual, and an MLP's gate.
  float attention_out = 1.0f, state_out = 1.0f, mlp_out = 1.0f, mlp_gate = 1.0f;
  // Gate and up are held below (and up above minus) `glu_limit`; silu of alpha times the gate, and up + 1.
  float glu_limit = 0.0f, glu_alpha = 1.0f;
  bool gelu = false, half_cache = true;
  bool squared = false;     // MLPs square what is positive of their gate, or of `up`
  bool layer_norm = false;  // in place of RMS norms
  bool parallel = false;    // attention and MLP read the same norm
  Routing routing;
  Recurrence recurrence;
  std::vector<Layer> layers;
  std::vector<Rope> ropes;
  Matrix embed, head;
  Vector output_norm, output_norm_bias;
};

// New nodes of one row, appended to its provisional ones.
struct Append {
  Row* row = nullptr;
  int64_t length = 0;                // committed tokens
  const int32_t* parents = nullptr;  // of all provisional nodes, old and new; -1: the prefix
  int64_t held = 0, count = 0;       // old, new
  const int32_t* tokens = nullptr;   // [count]
  int64_t num_logits = 0;            // of the last nodes
  bool leads = false;   // a chain whose states are written ahead, see States
  bool stored = false;  // keys and values are there already: states alone are computed
};

class Decoder {
 public:
  Decoder(Model model, const Kernels* kernels, std::shared_ptr<Pool> pool);
  ~Decoder();

  const Model& model() const { return model_; }
  const CacheShape& shape() const { return shape_; }
  const Kernels& kernels() const { return *kernels_; }

  // Scores the new nodes of all rows; logits [sum of num_logits, stride] in order.
  void extend(const std::vector<Append>& rows, float* logits, int64_t stride);

  // Keeps these provisional nodes, a path, behind `length` committed tokens.
  void keep(Row& row, int64_t length, const int32_t* nodes, int64_t count);

 private:
  struct Node;
  struct Input;
  struct Product;
  struct Groups;
  struct Scratch;
  struct Task;
  struct Span;
  struct Move;
  struct Work;

  void plan();
  template <class Body>
  static void parts(const Product& product, int64_t first, int64_t last, Body body);

  void shape_states();
  void grow_tables(int64_t positions);
  void begin(Append& append);
  void catch_up(Row& row);
  void run(const std::vector<Append>& rows, float* logits, int64_t stride);
  void prepare_span(Span& span, const Node* nodes);
  void end_span(const Span& span);
  void plan_moves(Span& span, const Node* nodes) const;
  void fold(States& states, const int32_t* nodes, int64_t count);
  void forward(const Node* nodes, int count, float* logits, int64_t stride);
  void work(Task& task, int thread);
  void embed(Task& task, int64_t node);
  void project(Work& work, const Layer& layer);
  void attention(Work& work, const Layer& layer, int index);
  void residual(Work& work, const float* x, int64_t stride, const Vector& bias, const Vector& norm_weight);
  void gated(Work& work, const Layer& layer);
  void experts(Work& work, const Layer& layer);
  void recurrent(Work& work, const Layer& layer, int index);
  void read_inputs(Task& task, const Layer& layer, int index, int64_t node);
  void read_times(Task& task, const Recurrent& r, const Record& record, int64_t node) const;
  void split_mamba(Task& task, const RecurrentShape& shape, const Record& record, int64_t node) const;
  void say_mamba(Task& task, const Recurrent& r, const RecurrentShape& shape, const Record& record,
                 int64_t node) const;
  void convolve(Task& task, const Layer& layer, int index, int64_t node);
  Recur step(const RecurrentShape& shape, const Record& record, int64_t item, const float* queries) const;
  void recur(Task& task, int index, const Span& span, int64_t item, int thread);
  void place(Task& task, const Layer& layer, int index, int64_t node, int64_t which);
  void attend(Task& task, const Layer& layer, int index, int64_t head, int first, int end, int thread);
  void norm(const float* x, const Vector& weight, const Vector& bias, float* out) const;
  void activate(float* gate, float* up, const float* gate_bias, const float* up_bias, int64_t count) const;
  void quantise(Task& task, const Input& input, const float* x, int64_t stride, int64_t node,
                int64_t first, int64_t last);
  void route(Task& task, const Layer& layer, int64_t node, int thread);
  void group(const Task& task, Groups& groups) const;
  void combine(Task& task, const Layer& layer, int64_t node, const Groups& groups);

  Model model_;
  const Kernels* kernels_;
  std::shared_ptr<Pool> pool_;
  CacheShape shape_;
  std::vector<Product> products_;  // of a pass, in order
  std::vector<float> ones_;
  Vector key_unit_, query_unit_;   // [key_dim] of recurrent layers
  std::unique_ptr<Scratch> scratch_;
  std::vector<int32_t> tails_;  // of the nodes of the present call
  std::mutex one_;
};

}  // namespace redwood
