#include "decoder.h"

#include <algorithm>
#include <limits>
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
  for (Quantised& in : s.inputs) {
    in.group_scales = lines(in.scale_store[0], kNodes * widest / kGroup);
    in.offsets = lines(in.scale_store[1], kNodes * widest / kGroup);
    in.super_scales = lines(in.scale_store[2], kNodes * widest / kSuper);
    in.group_quants = lines(in.quant_store[0], kNodes * widest);
    in.super_quants = lines(in.quant_store[1], kNodes * widest);
    in.sums = lines(in.sum_store, kNodes * widest / kGroup);
    in.sums16 = lines(in.sum16_store, kNodes * widest / 16);
    in.sums32 = lines(in.sum32_store, kNodes * widest / kGroup);
  }
  s.scores.resize(static_cast<size_t>(pool_->size()));
  s.outs.resize(static_cast<size_t>(pool_->size()));
  s.queries.resize(static_cast<size_t>(pool_->size()));
  plan();
}

void Decoder::plan() {
  for (const Layer& l : model_.layers) {
    products_.push_back({{&l.q, &l.k, &l.v}});
    products_.push_back({{&l.o}});
    const Format f = l.down.format;
    const int64_t unit = is_float(f) ? 2 * kLanes : info(f).step;
    products_.push_back({{&l.gate, &l.up}, true, unit / kLanes});
    products_.push_back({{&l.down}});
  }
  products_.push_back({{&model_.head}});
  const int64_t threads = pool_->size();
  scratch_->streams.resize(static_cast<size_t>(threads));
  for (Product& p : products_) {
    int64_t blocks = 0, bytes = 0;  // bytes: of a block, or of those that lie side by side
    for (const Matrix* m : p.matrices) {
      const int64_t here = round_up(m->rows, kLanes) / kLanes, each = block_bytes(m->format, m->cols);
      blocks = p.side_by_side ? here : blocks + here;
      bytes = p.side_by_side ? bytes + each : std::max(bytes, each);
    }
    p.most = kTaken / bytes;
    for (int64_t t = 0; t <= threads; ++t) {
      p.cuts.push_back(std::min(blocks, round_up(blocks * t / threads, p.align)));
    }
    for (size_t t = 0; t < scratch_->streams.size(); ++t) {
      WeightStream& stream = scratch_->streams[t];
      p.start.push_back(stream.total());
      const int64_t end = p.cuts[t + 1], some = Task::portion(end - p.cuts[t], p.align, p.most);
      for (int64_t first = p.cuts[t]; first < end; first += some) {
        parts(p, first, std::min(end, first + some), [&](size_t i, int64_t from, int64_t to) {
          const Matrix& m = *p.matrices[i];
          const int64_t bytes = block_bytes(m.format, m.cols);
          stream.add(m.data + from * bytes, (to - from) * bytes);
        });
      }
    }
  }
}

// The blocks of each matrix in blocks [first, last) of a product.
template <class Body>
void Decoder::parts(const Product& p, int64_t first, int64_t last, Body body) {
  for (size_t i = 0; i < p.matrices.size(); ++i) {
    const int64_t here = round_up(p.matrices[i]->rows, kLanes) / kLanes;
    const int64_t from = std::max<int64_t>(0, first), to = std::min(here, last);
    if (from < to) body(i, from, to);
    if (!p.side_by_side) first -= here, last -= here;
  }
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
    rope.sin.resize(want * half);  // first: `have` is counted by the other
    rope.cos.resize(want * half);
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
    a.row->own(a.length + a.held);
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
  task.slots = slots;
  for (size_t t = 0; t < scratch_->scores.size(); ++t) {  // here, where running out is no disaster
    scratch_->scores[t].resize(static_cast<size_t>(kTile * round_up(slots, kLanes)));
    scratch_->outs[t].resize(static_cast<size_t>(kTile * shape_.value_dim));
    scratch_->queries[t].resize(static_cast<size_t>(kTile * shape_.head_dim));
  }
  const size_t phases = model_.layers.size() + 1;
  task.counters = std::vector<std::atomic<int64_t>>(phases * static_cast<size_t>(16 * pool_->size()));
  // Numbers of inputs are never used twice, by whatever decoder: threads may serve several.
  static std::atomic<uint64_t> inputs{1};
  task.inputs = inputs.fetch_add(products_.size(), std::memory_order_relaxed);
  pool_->run([&](int thread) { work(task, thread); });
}

// Inputs [first, last) of a row for a product, as its formats want them; `first` begins a unit of theirs.
void Decoder::quantise(Task& task, size_t index, const float* x, int64_t stride, int64_t node,
                       int64_t first, int64_t last) {
  const Product& product = products_[index];
  Quantised& in = task.s.inputs[index % 2];
  const float* row = x + node * stride + first;
  const int64_t cols = product.matrices[0]->cols;
  bool group = false, super = false;
  for (const Matrix* matrix : product.matrices) {
    group |= is_group(matrix->format);
    super |= is_super(matrix->format);
  }
  if (group) {
    const int64_t w = round_up(cols, kGroup), at = node * w + first, g = at / kGroup;
    kernels_->quantise_group(row, std::min(cols, last) - first, std::min(w, last) - first,
                             in.group_quants + at, in.group_scales + g, in.offsets + g, in.sums + g);
  }
  if (super) {
    const int64_t w = round_up(cols, kSuper), at = node * w + first;
    kernels_->quantise_super(row, std::min(cols, last) - first, std::min(w, last) - first,
                             in.super_quants + at, in.super_scales + at / kSuper, in.sums16 + at / 16,
                             in.sums32 + at / kGroup);
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

  WeightStream& stream = s.streams[static_cast<size_t>(thread)];
  stream.restart();
  // Nothing of the head is fetched where it is not read.
  const int64_t end = products_.back().start[static_cast<size_t>(thread)];
  const int64_t read = task.scored.empty() ? end : stream.total();
  size_t product = 0;

  struct Out {
    float* at;
    int64_t stride;
    bool add;
  };
  constexpr int64_t all = std::numeric_limits<int64_t>::max();
  // Rows of input of the next product. `make` writes one of them to x.
  auto prepare = [&](int rows, const float* x, int64_t x_stride, auto make) {
    stream.reach(products_[product].start[static_cast<size_t>(thread)], read);
    task.each(phase, thread, rows, [&](int64_t i) {
      make(i);
      quantise(task, product, x, x_stride, i, 0, all);
    });
  };
  // The next product. `after` is called with outputs [first, last) of it, when they are done.
  auto multiply = [&](int rows, const float* x, int64_t x_stride, std::initializer_list<Out> outs,
                      auto after) {
    const Quantised& in = s.inputs[product % 2];
    const uint64_t inputs = task.inputs + product;
    const Product& p = products_[product++];
    const int64_t cols = p.matrices[0]->cols;
    int64_t used = p.start[static_cast<size_t>(thread)];
    const auto cut = [&](int t) { return p.cuts[static_cast<size_t>(t)]; };
    task.share(phase, thread, p.align, p.most, cut, [&](int64_t first, int64_t last, bool own) {
      parts(p, first, last, [&](size_t i, int64_t from, int64_t to) {
        const Matrix& matrix = *p.matrices[i];
        const Out& out = outs.begin()[i];
        const Format f = matrix.format;
        const int64_t w = round_up(cols, info(f).step);
        const bool g = is_group(f);
        Matmul mm{matrix.data, block_bytes(f, cols), w, rows, {}, out.at, out.stride, out.add};
        mm.x = {is_float(f) ? x_stride : w, x, g ? in.group_quants : in.super_quants,
                g ? in.group_scales : in.super_scales, in.offsets, in.sums, in.sums16, in.sums32};
        mm.inputs = inputs;
        if (own) {
          used += (to - from) * mm.block_bytes;
          stream.reach(used, read);
          mm.ahead = &stream;
          mm.ahead_bytes = std::min(stream.wanted(), 2 * (to - from) * mm.block_bytes);
        }
        kernels_->matmul[static_cast<int>(f)](mm, from, to);
      });
      after(first * kLanes, round_up(last, p.align) * kLanes);
    });
  };
  auto nothing = [](int64_t, int64_t) {};
  auto normed = [&](const float* from, int64_t i, const Vector& weight, float* to) {
    kernels_->rms_norm(from, weight.data(), m.hidden, m.eps, to + i * hidden);
  };
  // Adds the next product to the residual, through a norm where the model has one.
  auto residual = [&](const float* x, int64_t x_stride, const Vector& norm) {
    if (norm.empty()) return multiply(n, x, x_stride, {{s.h, hidden, true}}, nothing);
    multiply(n, x, x_stride, {{s.y, hidden, false}}, nothing);
    task.each(phase, thread, n, [&](int64_t i) {
      normed(s.y + i * hidden, i, norm, s.y);
      kernels_->add(s.h + i * hidden, s.y + i * hidden, m.hidden);
    });
  };

  task.each(phase, thread, n, [&](int64_t i) { embed(task, i); });
  const int64_t group = m.heads / m.kv_heads, lines = m.heads + 2 * m.kv_heads;
  int64_t per = std::max<int64_t>(1, kTile / group), tiles = (n + per - 1) / per;
  // Behind a long text, halves of tiles where whole ones would leave threads waiting: 3 heads for 2.
  const int64_t threads = task.pool.size(), items = tiles * m.kv_heads;
  if (task.slots > kLong && items % threads != 0 && items < 4 * threads) {
    per = std::max<int64_t>(1, std::min<int64_t>(per, n + 1) / 2);
    tiles = (n + per - 1) / per;
  }
  for (size_t l = 0; l < m.layers.size(); ++l) {
    const Layer& layer = m.layers[l];
    const int index = static_cast<int>(l);
    prepare(n, s.x, hidden, [&](int64_t i) { normed(s.h + i * hidden, i, layer.attn_norm, s.x); });
    multiply(n, s.x, hidden, {{s.q, heads, false}, {s.k, kv, false}, {s.v, kv, false}}, nothing);
    // Where one item attends for all nodes of a head, nobody else reads what it places.
    const bool alone = tiles == 1;
    // The outputs of a head's group are whole units of the next input.
    const bool whole = group * m.head_dim % info(layer.o.format).step == 0;
    if (!alone) {
      task.each(phase, thread, n * lines, [&](int64_t i) { place(task, layer, index, i / lines, i % lines); });
    }
    task.each(phase, thread, tiles * m.kv_heads, [&](int64_t i) {
      const int64_t head = i % m.kv_heads, tile = i / m.kv_heads;
      const int64_t first = tile * per, last = std::min<int64_t>(n, first + per);
      for (int64_t node = 0; alone && node < n; ++node) {
        for (int64_t g = 0; g < group; ++g) place(task, layer, index, node, head * group + g);
        place(task, layer, index, node, m.heads + head);
        place(task, layer, index, node, m.heads + m.kv_heads + head);
      }
      attend(task, layer, index, head, static_cast<int>(first), static_cast<int>(last), thread);
      const int64_t width = group * m.head_dim;
      for (int64_t node = first; whole && node < last; ++node) {
        quantise(task, product, s.mixed, heads, node, head * width, (head + 1) * width);
      }
    });
    if (!whole) prepare(n, s.mixed, heads, [](int64_t) {});
    if (!layer.o_bias.empty()) {
      task.each(phase, thread, n, [&](int64_t i) {
        kernels_->add(s.h + i * hidden, layer.o_bias.data(), m.hidden);
      });
    }
    residual(s.mixed, heads, layer.post_attn_norm);
    prepare(n, s.x, hidden, [&](int64_t i) { normed(s.h + i * hidden, i, layer.ffn_norm, s.x); });
    multiply(n, s.x, hidden, {{s.gate, ffn, false}, {s.up, ffn, false}}, [&](int64_t first, int64_t last) {
      for (int64_t i = 0; i < n; ++i) {
        float* gate = s.gate + i * ffn + first;
        kernels_->gate(gate, s.up + i * ffn + first, std::min(m.ffn, last) - first, m.gelu, gate);
        quantise(task, product, s.gate, ffn, i, first, last);
      }
    });
    residual(s.gate, ffn, layer.post_ffn_norm);
  }
  const int scored = static_cast<int>(task.scored.size());
  if (scored == 0) return;
  float* out = task.logits + task.scored[0]->logits * task.stride;
  prepare(scored, s.x, hidden, [&](int64_t i) {
    const int64_t node = task.scored[static_cast<size_t>(i)] - task.nodes;
    normed(s.h + node * hidden, i, m.output_norm, s.x);
  });
  multiply(scored, s.x, hidden, {{out, task.stride, false}}, nothing);
  if (m.logit_softcap != 0.0f) {
    task.each(phase, thread, scored, [&](int64_t i) {
      kernels_->softcap(out + i * task.stride, m.outputs, m.logit_softcap);
    });
  }
}

}  // namespace redwood
