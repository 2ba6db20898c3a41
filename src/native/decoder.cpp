#include "decoder.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "decoder_impl.h"
#include "pack.h"
#include "trig.h"

namespace redwood {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line

template <class T>
T* lines(std::vector<T>& store, int64_t count) {
  store.resize(static_cast<size_t>(count) + kLine / sizeof(T));
  const auto at = reinterpret_cast<uintptr_t>(store.data());
  return reinterpret_cast<T*>((at + kLine - 1) / kLine * kLine);
}

}  // namespace

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
    const float fastest = *std::max_element(rope.inv_freq.begin(), rope.inv_freq.end());
    if (!(static_cast<float>(want) * fastest <= kMostAngle)) {
      throw std::length_error("rotary angles above " + std::to_string(kMostAngle) + " radians");
    }
    rope.cos.resize(want * half);
    rope.sin.resize(want * half);
    for (size_t p = have; p < want; ++p) {
      for (size_t i = 0; i < half; ++i) {
        // The angle is rounded to float32, as the models were trained.
        const SineCosine turn = sine_cosine(static_cast<float>(p) * rope.inv_freq[i]);
        rope.cos[p * half + i] = static_cast<float>(turn.cosine) * rope.factor;
        rope.sin[p * half + i] = static_cast<float>(turn.sine) * rope.factor;
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
  Task task{nodes, count, {}, logits, stride, *scratch_, *pool_, {}};
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
  // Matrices that share the same input, together one list of blocks. `prepare` makes a row of it.
  auto multiply = [&](int rows, const float* x, int64_t x_stride,
                      std::initializer_list<Product> list, auto prepare) {
    bool group = false, super = false;
    for (const Product& p : list) {
      group |= is_group(p.matrix->format);
      super |= is_super(p.matrix->format);
    }
    const int64_t cols = list.begin()->matrix->cols;
    task.each(phase, rows, [&](int64_t i) {
      prepare(i);
      quantise(task, x, cols, x_stride, i, group, super);
    });
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
  auto residual = [&](const float* x, int64_t x_stride, const Matrix& matrix, const Vector& norm,
                      auto prepare) {
    if (norm.empty()) return multiply(n, x, x_stride, {{&matrix, s.h, hidden, true}}, prepare);
    multiply(n, x, x_stride, {{&matrix, s.y, hidden, false}}, prepare);
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
    multiply(n, s.x, hidden,
             {{&layer.q, s.q, heads, false}, {&layer.k, s.k, kv, false}, {&layer.v, s.v, kv, false}},
             [&](int64_t i) { normed(s.h + i * hidden, i, layer.attn_norm, s.x); });
    task.each(phase, n * (m.heads + 2 * m.kv_heads),
              [&](int64_t i) { place(task, layer, index, i); });
    task.each(phase, (n + per - 1) / per * m.kv_heads,
              [&](int64_t i) { attend(task, layer, index, i, thread); });
    residual(s.mixed, heads, layer.o, layer.post_attn_norm, [&](int64_t i) {
      if (!layer.o_bias.empty()) {
        kernels_->add(s.h + i * hidden, layer.o_bias.data(), m.hidden);
      }
    });
    multiply(n, s.x, hidden, {{&layer.gate, s.gate, ffn, false}, {&layer.up, s.up, ffn, false}},
             [&](int64_t i) { normed(s.h + i * hidden, i, layer.ffn_norm, s.x); });
    residual(s.gate, ffn, layer.down, layer.post_ffn_norm, [&](int64_t i) {
      kernels_->gate(s.gate + i * ffn, s.up + i * ffn, m.ffn, m.gelu, s.gate + i * ffn);
    });
  }
  const int scored = static_cast<int>(task.scored.size());
  if (scored == 0) return;
  float* out = task.logits + task.scored[0]->logits * task.stride;
  multiply(scored, s.x, hidden, {{&m.head, out, task.stride, false}}, [&](int64_t i) {
    const int64_t node = task.scored[static_cast<size_t>(i)] - task.nodes;
    normed(s.h + node * hidden, i, m.output_norm, s.x);
  });
  if (m.logit_softcap != 0.0f) {
    task.each(phase, scored, [&](int64_t i) {
      kernels_->softcap(out + i * task.stride, m.outputs, m.logit_softcap);
    });
  }
}

}  // namespace redwood
