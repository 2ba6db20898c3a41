// A decoder-only transformer over paged slots: rows of tokens and, after them, trees of nodes.
#pragma once
#include <memory>
#include <vector>

#include "cache.h"
#include "kernels.h"
#include "pool.h"

namespace redwood {

struct Matrix {
  Format format = Format::kF32;
  const uint8_t* data = nullptr;
  int64_t rows = 0, cols = 0;
};

using Vector = std::vector<float>;  // empty: the model has none

struct Layer {
  Vector attn_norm, q_bias, k_bias, v_bias, q_norm, k_norm, o_bias;
  Vector post_attn_norm, ffn_norm, post_ffn_norm;
  Matrix q, k, v, o, gate, up, down;
  int64_t window = 0;  // 0: all positions are seen
  int rope = 0;
};

struct Rope {
  Vector inv_freq;
  float factor = 1.0f;  // of cos and sin
  Vector cos, sin;      // [positions, inv_freq.size()], as far as needed so far
};

struct Model {
  int64_t hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, ffn = 0, vocab = 0;
  int64_t outputs = 0;  // tokens with a score: the first of the vocabulary, or all
  float eps = 1e-6f, attention_scale = 1.0f, attention_softcap = 0.0f, logit_softcap = 0.0f;
  float embedding_scale = 1.0f;
  bool gelu = false, half_cache = true;
  std::vector<Layer> layers;
  std::vector<Rope> ropes;
  Matrix embed, head;
  Vector output_norm;
};

// New nodes of one row, appended to its provisional ones.
struct Append {
  Row* row = nullptr;
  int64_t length = 0;                // committed tokens
  const int32_t* parents = nullptr;  // of all provisional nodes, old and new; -1: the prefix
  int64_t held = 0, count = 0;       // old, new
  const int32_t* tokens = nullptr;   // [count]
  int64_t num_logits = 0;            // of the last nodes
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

 private:
  struct Node;
  struct Product;
  struct Scratch;
  struct Task;

  void plan();
  template <class Body>
  static void parts(const Product& product, int64_t first, int64_t last, Body body);

  void grow_tables(int64_t positions);
  void forward(const Node* nodes, int count, float* logits, int64_t stride);
  void work(Task& task, int thread);
  void embed(Task& task, int64_t node);
  void place(Task& task, const Layer& layer, int index, int64_t node, int64_t which);
  void attend(Task& task, const Layer& layer, int index, int64_t head, int first, int end, int thread);
  void quantise(Task& task, size_t product, const float* x, int64_t stride, int64_t node,
                int64_t first, int64_t last);

  Model model_;
  const Kernels* kernels_;
  std::shared_ptr<Pool> pool_;
  CacheShape shape_;
  std::vector<Product> products_;  // of a pass, in order
  std::unique_ptr<Scratch> scratch_;
  std::vector<int32_t> tails_;  // of the nodes of the present call
  std::mutex one_;
};

}  // namespace redwood
