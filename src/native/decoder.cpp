#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "pack.h"

namespace redwood {
namespace {

constexpr int kNodes = 256;    // of one pass; longer prompts take several
constexpr int kTile = 24;      // queries of one task of the attention, about
constexpr int64_t kLine = 64;  // bytes of a cache line

template <class T>
T* lines(std::vector<T>& store, int64_t count) {
  store.resize(static_cast<size_t>(count) + kLine / sizeof(T));
  const auto at = reinterpret_cast<uintptr_t>(store.data());
  return reinterpret_cast<T*>((at + kLine - 1) / kLine * kLine);
}

}  // namespace

struct Decoder::Node {
  const Append* from;
  int64_t slot, position, logits;  // logits: its row of the answer, -1: none
  // Its path is the first `run` provisional nodes, in order, and then those of `tail`, itself last.
  int64_t run, tail;  // tail: where its own part begins in the list of all tails
  int32_t token;
};

struct Decoder::Scratch {
  std::vector<float> stores[11];
  std::vector<int8_t> quant_store[2];
  std::vector<int32_t> sum_store;
  std::vector<int16_t> sum16_store, sum32_store;
  std::vector<std::vector<float>> scores, outs;  // per thread
  float *h, *x, *q, *k, *v, *mixed, *gate, *up, *y, *group_scales, *offsets;
  std::vector<float> super_store;
  float* super_scales;
  int8_t *group_quants, *super_quants;
  int32_t* sums;
  int16_t *sums16, *sums32;
};

// One pass through the model: its nodes, and counters that hand out the work of each phase.
struct Decoder::Task {
  const Node* nodes;
  int count;
  std::vector<const Node*> scored;
  float* logits;
  int64_t stride;
  Scratch& s;
  Pool& pool;
  std::vector<std::atomic<int64_t>> counters;
  int64_t wide = 0;  // inputs per row of the present activations

  // Every thread calls this with the same arguments; `body` gets each item once. All wait at the end.
  template <class Body>
  void each(int& phase, int64_t items, Body body) {
    auto& next = counters[static_cast<size_t>(phase++)];
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(i);
    pool.barrier();
  }
};

Decoder::Decoder(Model model, const Kernels* kernels, std::shared_ptr<Pool> pool)
    : model_(std::move(model)), kernels_(kernels), pool_(std::move(pool)),
      scratch_(std::make_unique<Scratch>()) {
  shape_ = {static_cast<int64_t>(model_.layers.size()), model_.kv_heads, model_.head_dim,
            round_up(model_.head_dim, kLanes), model_.half_cache ? 2 : 4};
  Scratch& s = *scratch_;
  const int64_t heads = model_.heads * model_.head_dim, kv = model_.kv_heads * model_.head_dim;
  const int64_t widest = round_up(std::max({model_.hidden, heads, model_.ffn}), kSuper);
  auto floats = [&](int i, int64_t width) {
    return lines(s.stores[i], kNodes * round_up(width, kLanes));
  };
  s.h = floats(0, model_.hidden);
  s.x = floats(1, widest);
  s.q = floats(2, heads);
  s.k = floats(3, kv);
  s.v = floats(4, kv);
  s.mixed = floats(5, heads);
  s.gate = floats(6, model_.ffn);
  s.up = floats(7, model_.ffn);
  s.y = floats(8, model_.hidden);
  s.group_scales = floats(9, widest / kGroup);
  s.offsets = floats(10, widest / kGroup);
  s.super_scales = lines(s.super_store, kNodes * widest / kSuper);
  s.group_quants = lines(s.quant_store[0], kNodes * widest);
  s.super_quants = lines(s.quant_store[1], kNodes * widest);
  s.sums = lines(s.sum_store, kNodes * widest / kGroup);
  s.sums16 = lines(s.sum16_store, kNodes * widest / 16);
  s.sums32 = lines(s.sum32_store, kNodes * widest / kGroup);
  s.scores.resize(static_cast<size_t>(pool_->size()));
  s.outs.resize(static_cast<size_t>(pool_->size()));
}

Decoder::~Decoder() = default;

void Decoder::grow_tables(int64_t positions) {
  for (Rope& rope : model_.ropes) {
    const size_t half = rope.inv_freq.size();
    const size_t have = half ? rope.cos.size() / half : 0;
    if (half == 0 || static_cast<int64_t>(have) >= positions) continue;
    const size_t want = static_cast<size_t>(round_up(positions, 1024));
    rope.cos.resize(want * half);
    rope.sin.resize(want * half);
    for (size_t p = have; p < want; ++p) {
      for (size_t i = 0; i < half; ++i) {
        // The angle is rounded to float32, as the models were trained.
        const double angle = static_cast<float>(p) * rope.inv_freq[i];
        rope.cos[p * half + i] = static_cast<float>(std::cos(angle)) * rope.factor;
        rope.sin[p * half + i] = static_cast<float>(std::sin(angle)) * rope.factor;
      }
    }
  }
}

void Decoder::extend(const std::vector<Append>& rows, float* logits, int64_t stride) {
  std::lock_guard<std::mutex> one(one_);
  std::vector<Node> nodes;
  tails_.clear();
  int64_t answers = 0, furthest = 0;
  for (const Append& a : rows) {
    const int64_t total = a.held + a.count;
    a.row->reserve(a.length + total);
    int32_t chain = 0;  // the provisional nodes begin with a chain of this many
    while (chain < total && a.parents[chain] == chain - 1) ++chain;
    for (int64_t i = a.held; i < total; ++i) {
      const size_t tail = tails_.size();
      int32_t n = static_cast<int32_t>(i);
      for (; n >= chain; n = a.parents[n]) tails_.push_back(n);
      std::reverse(tails_.begin() + static_cast<int64_t>(tail), tails_.end());
      const int64_t run = n + 1, position = a.length + run + static_cast<int64_t>(tails_.size() - tail) - 1;
      const bool scored = i >= total - a.num_logits;
      furthest = std::max(furthest, position + 1);
      nodes.push_back({&a, a.length + i, position, scored ? answers++ : -1, run,
                       static_cast<int64_t>(tail), a.tokens[i - a.held]});
    }
  }
  grow_tables(furthest);
  for (size_t at = 0; at < nodes.size(); at += kNodes) {
    const int count = static_cast<int>(std::min<size_t>(kNodes, nodes.size() - at));
    forward(nodes.data() + at, count, logits, stride);
  }
}

void Decoder::forward(const Node* nodes, int count, float* logits, int64_t stride) {
  Task task{nodes, count, {}, logits, stride, *scratch_, *pool_, {}, 0};
  int64_t slots = 0;
  for (int i = 0; i < count; ++i) {
    if (nodes[i].logits >= 0) task.scored.push_back(nodes + i);
    slots = std::max(slots, nodes[i].slot + 1);
  }
  for (size_t t = 0; t < scratch_->scores.size(); ++t) {  // here, where running out is no disaster
    scratch_->scores[t].resize(static_cast<size_t>(kTile * round_up(slots, kLanes)));
    scratch_->outs[t].resize(static_cast<size_t>(kTile * shape_.value_dim));
  }
  task.counters = std::vector<std::atomic<int64_t>>(model_.layers.size() * 20 + 20);
  pool_->run([&](int thread) { work(task, thread); });
}

void Decoder::quantise(Task& task, const float* x, int64_t cols, int64_t stride, int64_t node,
                       bool group, bool super) {
  Scratch& s = task.s;
  const float* row = x + node * stride;
  if (group) {
    const int64_t w = round_up(cols, kGroup), g = w / kGroup;
    kernels_->quantise_group(row, cols, w, s.group_quants + node * w, s.group_scales + node * g,
                             s.offsets + node * g, s.sums + node * g);
  }
  if (super) {
    const int64_t w = round_up(cols, kSuper), b = w / kSuper;
    kernels_->quantise_super(row, cols, w, s.super_quants + node * w, s.super_scales + node * b,
                             s.sums16 + node * b * 16, s.sums32 + node * b * 8);
  }
}

void Decoder::embed(Task& task, int64_t node) {
  float* h = task.s.h + node * round_up(model_.hidden, kLanes);
  unpack_row(model_.embed.format, model_.embed.data, model_.hidden, task.nodes[node].token, h);
  if (model_.embedding_scale != 1.0f) {
    for (int64_t i = 0; i < model_.hidden; ++i) h[i] *= model_.embedding_scale;
  }
}

// Biases, norms and rotation of one head of one node; its keys and values go to their slot.
void Decoder::place(Task& task, const Layer& layer, int index, int64_t item) {
  const int64_t heads = model_.heads, dim = model_.head_dim, all = heads + 2 * model_.kv_heads;
  const int64_t node = item / all, which = item % all;
  const int64_t kind = which < heads ? 0 : which < heads + model_.kv_heads ? 1 : 2;
  const int64_t head = kind == 0 ? which : (which - heads) % model_.kv_heads;
  const int64_t width = round_up((kind == 0 ? heads : model_.kv_heads) * dim, kLanes);
  float* x = (kind == 0 ? task.s.q : kind == 1 ? task.s.k : task.s.v) + node * width + head * dim;
  const Vector& bias = kind == 0 ? layer.q_bias : kind == 1 ? layer.k_bias : layer.v_bias;
  if (!bias.empty()) kernels_->add(x, bias.data() + head * dim, dim);
  const Node& n = task.nodes[node];
  if (kind < 2) {
    const Vector& norm = kind == 0 ? layer.q_norm : layer.k_norm;
    if (!norm.empty()) kernels_->rms_norm(x, norm.data(), dim, model_.eps, x);
    const Rope& rope = model_.ropes[static_cast<size_t>(layer.rope)];
    const int64_t half = static_cast<int64_t>(rope.inv_freq.size());
    kernels_->rotate(x, rope.cos.data() + n.position * half, rope.sin.data() + n.position * half,
                     half);
  }
  if (kind == 0) return;
  const Row& row = *n.from->row;
  if (kind == 2) {
    uint8_t* to = row.values(index, head, n.slot);
    if (model_.half_cache) {
      kernels_->to_half(x, dim, reinterpret_cast<uint16_t*>(to));
    } else {
      std::copy(x, x + dim, reinterpret_cast<float*>(to));
    }
    return;
  }
  uint8_t* to = row.keys(index, head, n.slot / kLanes * kLanes);
  const int64_t lane = n.slot % kLanes;
  if (model_.half_cache) {
    uint16_t bits[kSuper];
    for (int64_t d = 0; d < dim; d += kSuper) {
      const int64_t some = std::min<int64_t>(kSuper, dim - d);
      kernels_->to_half(x + d, some, bits);
      for (int64_t i = 0; i < some; ++i) {
        reinterpret_cast<uint16_t*>(to)[(d + i) * kLanes + lane] = bits[i];
      }
    }
  } else {
    for (int64_t d = 0; d < dim; ++d) reinterpret_cast<float*>(to)[d * kLanes + lane] = x[d];
  }
}

// Attention of a few nodes of one row, for the query heads that share one key-value head. Scores are
// put in order of position, prefix and path alike, and summed in that order.
void Decoder::attend(Task& task, const Layer& layer, int index, int64_t item, int thread) {
  const int64_t dim = model_.head_dim, group = model_.heads / model_.kv_heads;
  const int64_t q_width = round_up(model_.heads * dim, kLanes), value_dim = shape_.value_dim;
  const int per = static_cast<int>(std::max<int64_t>(1, kTile / group));
  const int64_t head = item % model_.kv_heads, tile = item / model_.kv_heads;
  const int first = static_cast<int>(tile) * per, end = std::min(task.count, first + per);
  const size_t cast = model_.half_cache ? 0 : 1;
  auto &scores = task.s.scores[static_cast<size_t>(thread)],
       &outs = task.s.outs[static_cast<size_t>(thread)];
  const float* queries[kTile];
  float* sums[kTile];

  for (int from = first, to; from < end; from = to) {
    // Nodes of one row at a time.
    const Append* append = task.nodes[from].from;
    for (to = from + 1; to < end && task.nodes[to].from == append;) ++to;
    const Row& row = *append->row;
    const int64_t slots = task.nodes[to - 1].slot + 1, stride = round_up(slots, kLanes);
    int64_t start = slots, common = slots;
    for (int i = from; i < to; ++i) {
      const Node& n = task.nodes[i];
      start = std::min(start, layer.window ? n.position - layer.window + 1 : int64_t{0});
      common = std::min(common, append->length + n.run);
    }
    start = std::max<int64_t>(0, start) / kLanes * kLanes;
    for (int64_t g = 0; g < group; g += kTile) {
      const int64_t heads = std::min<int64_t>(kTile, group - g);
      const int n = static_cast<int>((to - from) * heads);
      std::fill(outs.begin(), outs.begin() + n * value_dim, 0.0f);
      for (int i = 0; i < n; ++i) {
        const int64_t node = from + i / heads, h = head * group + g + i % heads;
        queries[i] = task.s.q + node * q_width + h * dim;
        sums[i] = outs.data() + i * value_dim;
      }
      for (int64_t s = start; s < slots; s += kLanes) {
        kernels_->dot_keys[cast](queries, n, row.keys(index, head, s), dim, scores.data() + s,
                                 stride);
      }
      float totals[kTile];
      for (int i = 0; i < n; ++i) {
        const Node& node = task.nodes[from + i / heads];
        float* row_scores = scores.data() + i * stride;
        const float none = -std::numeric_limits<float>::infinity();
        // A node's slot never comes before its position, so this copies downwards in place.
        const int64_t own = append->length + node.run;
        for (int64_t p = own; p <= node.position; ++p) {
          row_scores[p] = row_scores[append->length + tails_[static_cast<size_t>(node.tail + p - own)]];
        }
        std::fill(row_scores + node.position + 1, row_scores + stride, none);
        if (layer.window) {
          const int64_t seen = std::max<int64_t>(start, node.position - layer.window + 1);
          std::fill(row_scores + start, row_scores + std::max(start, seen), none);
        }
        const int64_t length = round_up(node.position + 1, kLanes) - start;
        totals[i] = kernels_->softmax(row_scores + start, length, model_.attention_scale,
                                      model_.attention_softcap);
      }
      for (int64_t s = start; s < common;) {
        const int64_t some = std::min(common, (s / kPage + 1) * kPage) - s;
        kernels_->add_values[cast](scores.data() + s, stride, n, row.values(index, head, s), some,
                                   value_dim, sums);
        s += some;
      }
      for (int i = 0; i < n; ++i) {
        const Node& node = task.nodes[from + i / heads];
        for (int64_t p = std::max(common, start); p <= node.position; ++p) {
          const int64_t own = append->length + node.run;
          const int64_t slot =
              p < own ? p : append->length + tails_[static_cast<size_t>(node.tail + p - own)];
          kernels_->add_values[cast](scores.data() + i * stride + p, stride, 1,
                                     row.values(index, head, slot), 1, value_dim, sums + i);
        }
        float* out = task.s.mixed + (queries[i] - task.s.q);
        const float by = 1.0f / totals[i];
        for (int64_t d = 0; d < dim; ++d) out[d] = sums[i][d] * by;
      }
    }
  }
}

void Decoder::work(Task& task, int thread) {
  Scratch& s = task.s;
  const Model& m = model_;
  const int n = task.count;
  const int64_t hidden = round_up(m.hidden, kLanes), heads = round_up(m.heads * m.head_dim, kLanes),
                kv = round_up(m.kv_heads * m.head_dim, kLanes), ffn = round_up(m.ffn, kLanes);
  int phase = 0;

  struct Product {
    const Matrix* matrix;
    float* out;
    int64_t stride;
    bool add;
  };
  // Matrices that share the same input, together one list of blocks.
  auto multiply = [&](int rows, const float* x, int64_t x_stride,
                      std::initializer_list<Product> list) {
    bool group = false, super = false;
    for (const Product& p : list) {
      group |= is_group(p.matrix->format);
      super |= is_super(p.matrix->format);
    }
    const int64_t cols = list.begin()->matrix->cols;
    if (group || super) {
      task.each(phase, rows, [&](int64_t i) { quantise(task, x, cols, x_stride, i, group, super); });
    }
    int64_t blocks = 0;
    for (const Product& p : list) blocks += round_up(p.matrix->rows, kLanes) / kLanes;
    const int64_t share = std::max<int64_t>(1, blocks / (task.pool.size() * 4));
    task.each(phase, (blocks + share - 1) / share, [&](int64_t item) {
      int64_t first = item * share, last = std::min(blocks, first + share);
      for (const Product& p : list) {
        const int64_t here = round_up(p.matrix->rows, kLanes) / kLanes;
        if (first < here && last > 0) {
          const Format f = p.matrix->format;
          const int64_t w = round_up(cols, info(f).step);
          const bool g = is_group(f);
          Matmul mm{p.matrix->data, block_bytes(f, cols), w, rows, {}, p.out, p.stride, p.add};
          mm.x = {is_float(f) ? x_stride : w, x, g ? s.group_quants : s.super_quants,
                  g ? s.group_scales : s.super_scales, s.offsets, s.sums, s.sums16, s.sums32};
          kernels_->matmul[static_cast<int>(f)](mm, std::max<int64_t>(0, first),
                                                std::min(here, last));
        }
        first -= here;
        last -= here;
      }
    });
  };
  auto normed = [&](const float* from, int64_t i, const Vector& weight, float* to) {
    kernels_->rms_norm(from, weight.data(), m.hidden, m.eps, to + i * hidden);
  };
  // Adds the product to the residual, through a norm where the model has one.
  auto residual = [&](const float* x, int64_t x_stride, const Matrix& matrix, const Vector& norm) {
    if (norm.empty()) return multiply(n, x, x_stride, {{&matrix, s.h, hidden, true}});
    multiply(n, x, x_stride, {{&matrix, s.y, hidden, false}});
    task.each(phase, n, [&](int64_t i) {
      normed(s.y + i * hidden, i, norm, s.y);
      kernels_->add(s.h + i * hidden, s.y + i * hidden, m.hidden);
    });
  };

  task.each(phase, n, [&](int64_t i) { embed(task, i); });
  const int64_t group = m.heads / m.kv_heads, per = std::max<int64_t>(1, kTile / group);
  for (size_t l = 0; l < m.layers.size(); ++l) {
    const Layer& layer = m.layers[l];
    const int index = static_cast<int>(l);
    task.each(phase, n, [&](int64_t i) { normed(s.h + i * hidden, i, layer.attn_norm, s.x); });
    multiply(n, s.x, hidden,
             {{&layer.q, s.q, heads, false}, {&layer.k, s.k, kv, false}, {&layer.v, s.v, kv, false}});
    task.each(phase, n * (m.heads + 2 * m.kv_heads),
              [&](int64_t i) { place(task, layer, index, i); });
    task.each(phase, (n + per - 1) / per * m.kv_heads,
              [&](int64_t i) { attend(task, layer, index, i, thread); });
    if (!layer.o_bias.empty()) {
      task.each(phase, n, [&](int64_t i) {
        kernels_->add(s.h + i * hidden, layer.o_bias.data(), m.hidden);
      });
    }
    residual(s.mixed, heads, layer.o, layer.post_attn_norm);
    task.each(phase, n, [&](int64_t i) { normed(s.h + i * hidden, i, layer.ffn_norm, s.x); });
    multiply(n, s.x, hidden, {{&layer.gate, s.gate, ffn, false}, {&layer.up, s.up, ffn, false}});
    task.each(phase, n, [&](int64_t i) {
      kernels_->gate(s.gate + i * ffn, s.up + i * ffn, m.ffn, m.gelu, s.gate + i * ffn);
    });
    residual(s.gate, ffn, layer.down, layer.post_ffn_norm);
  }
  const int scored = static_cast<int>(task.scored.size());
  if (scored == 0) return;
  task.each(phase, scored, [&](int64_t i) {
    const int64_t node = task.scored[static_cast<size_t>(i)] - task.nodes;
    normed(s.h + node * hidden, i, m.output_norm, s.x);
  });
  float* out = task.logits + task.scored[0]->logits * task.stride;
  multiply(scored, s.x, hidden, {{&m.head, out, task.stride, false}});
  if (m.logit_softcap != 0.0f) {
    task.each(phase, scored, [&](int64_t i) {
      kernels_->softcap(out + i * task.stride, m.vocab, m.logit_softcap);
    });
  }
}

}  // namespace redwood
