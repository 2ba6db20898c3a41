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
  Scratch& s = *scratch_;
  const Routing& routing = model_.routing;
  const bool attends = std::any_of(model_.layers.begin(), model_.layers.end(),
                                   [](const Layer& l) { return l.q.data != nullptr; });
  int64_t ffn = model_.ple, heads = 0, kv = 0, values = 0, dim = 0, rank = 0;
  for (size_t i = 0; i < model_.layers.size(); ++i) {
    const Layer& l = model_.layers[i];
    // Rows are counted in pages, of models without attention, too.
    const bool holds = l.source == static_cast<int>(i) && (l.q.data || (!attends && i == 0));
    shape_.add(holds ? l.kv_heads : 0, l.head_dim, round_up(l.value_dim, kLanes), model_.half_cache ? 2 : 4);
    ffn = std::max(ffn, l.up.rows), rank = std::max(rank, l.laurel_left.rows);
    dim = std::max({dim, l.head_dim, l.value_dim}), heads = std::max(heads, model_.heads * l.head_dim);
    kv = std::max(kv, l.kv_heads * l.head_dim), values = std::max(values, l.kv_heads * l.value_dim);
  }
  shape_states();
  const Recurrence& recurrence = model_.recurrence;
  const int64_t mixed = std::max({heads, recurrence.channels, recurrence.heads * recurrence.value_dim});
  const int64_t widest =
      round_up(std::max({model_.hidden, mixed, ffn, rank, model_.latent, model_.query_latent}), kSuper);
  const int64_t parts = kNodes * routing.used;  // rows of all experts together
  auto floats = [&](int i, int64_t rows, int64_t width) {
    return lines(s.stores[i], rows * round_up(width, kLanes));
  };
  s.h = floats(0, kNodes, model_.hidden);
  s.x = floats(1, kNodes, widest);
  s.q = floats(2, kNodes, heads);
  s.k = floats(3, kNodes, kv);
  s.v = floats(4, kNodes, values);
  s.mixed = floats(5, kNodes, mixed);
  s.gate = floats(6, kNodes, ffn);
  s.up = floats(7, kNodes, ffn);
  s.y = floats(8, kNodes, model_.hidden);
  if (model_.latent) {
    s.latents = floats(15, kNodes, model_.latent + dim);
    s.expanded = floats(16, kNodes, kv);
    s.asked = floats(22, kNodes, model_.query_latent);
  }
  const int64_t layers = static_cast<int64_t>(model_.layers.size()), hidden = round_up(model_.hidden, kLanes);
  s.ple = floats(17, kNodes, layers * model_.ple);
  s.residuals = floats(18, kNodes * model_.streams, hidden);
  s.low = floats(19, kNodes, rank);
  s.laurel = floats(20, rank ? kNodes : 0, hidden);
  s.others = floats(21, model_.streams ? kNodes : 0, (model_.streams - 1) * hidden);
  auto quants = [](Quantised& in, int64_t size) {
    in.group_scales = lines(in.scale_store[0], size / kGroup);
    in.offsets = lines(in.scale_store[1], size / kGroup);
    in.super_scales = lines(in.scale_store[2], size / kSuper);
    in.group_quants = lines(in.quant_store[0], size);
    in.super_quants = lines(in.quant_store[1], size);
    in.sums = lines(in.sum_store, size / kGroup);
    in.sums16 = lines(in.sum16_store, size / 16);
    in.sums32 = lines(in.sum32_store, size / kGroup);
  };
  quants(s.inputs[0], kNodes * widest);
  quants(s.inputs[1], kNodes * widest);
  const size_t threads = static_cast<size_t>(pool_->size());
  if (routing.experts) {
    s.router = floats(9, kNodes, routing.experts);
    s.shared_switch = floats(10, kNodes, 1);
    s.shared = floats(11, kNodes, model_.hidden);
    s.expert_gate = floats(12, parts, routing.ffn);
    s.expert_up = floats(13, parts, routing.ffn);
    s.expert_y = floats(14, parts, model_.hidden);
    quants(s.inputs[2], parts * round_up(routing.ffn, kSuper));
    s.chosen.resize(static_cast<size_t>(parts));
    s.shares.resize(static_cast<size_t>(parts));
    s.groups.resize(threads);
    s.gathered.resize(threads);
    s.rows.resize(threads);
    s.choices.resize(threads);
    for (size_t t = 0; t < threads; ++t) {
      quants(s.gathered[t], kNodes * round_up(model_.hidden, kSuper));
      s.rows[t].resize(static_cast<size_t>(kNodes * round_up(model_.hidden, kLanes)));
      s.choices[t].resize(static_cast<size_t>(2 * round_up(routing.experts, kLanes)));
      Groups& g = s.groups[t];
      g.active.reserve(static_cast<size_t>(routing.experts));
      g.first.reserve(static_cast<size_t>(routing.experts) + 1);
      g.nodes.resize(static_cast<size_t>(parts));
      g.slots.resize(static_cast<size_t>(parts));
      g.counts.resize(static_cast<size_t>(routing.experts));
    }
  }
  bool gated = false;
  int64_t mix = 0, record = 0;
  for (const Layer& l : model_.layers) gated |= l.o_gate.data != nullptr, mix = std::max(mix, l.recurrent.mix.rows);
  const auto recurrent = [&](int i, int64_t width) {
    return lines(s.recurrent_stores[i], kNodes * round_up(width, kLanes));
  };
  if (gated) s.o_gate = recurrent(0, heads);
  if (shape_.states) {
    for (const RecurrentShape& r : shape_.states->layers) record = std::max(record, r.record());
    s.mix = recurrent(1, mix);
    s.out_gate = recurrent(2, recurrence.heads * recurrence.value_dim);
    s.alpha = recurrent(3, recurrence.heads);
    s.beta = recurrent(4, recurrence.heads);
    s.led = recurrent(5, record);
    s.recurrent_q = recurrent(6, recurrence.key_heads * recurrence.key_dim);
    s.recurred = recurrent(7, recurrence.heads * round_up(recurrence.value_dim, kLanes));
    s.slots.resize(threads);
  }
  ones_.assign(static_cast<size_t>(std::max({ffn, routing.experts, routing.ffn, dim})), 1.0f);
  widest_head_ = round_up(dim, kLanes);
  s.looked_up.assign(threads, std::vector<float>(static_cast<size_t>(round_up(layers * model_.ple, kSuper))));
  s.scores.resize(threads);
  s.outs.resize(threads);
  s.queries.resize(threads);
  plan();
}

void Decoder::plan() {
  // A product, and what reads the same input after it.
  const auto add = [&](std::vector<const Matrix*> matrices, int buffer, std::vector<const Matrix*> also = {}) {
    Product p;
    for (const Matrix* m : matrices) if (m->data) p.matrices.push_back(m);
    p.input.buffer = buffer;
    for (const Matrix* m : p.matrices) p.input.serve(*m);
    for (const Matrix* m : also) if (m->data) p.input.serve(*m);
    products_.push_back(std::move(p));
  };
  if (model_.ple) add({&model_.ple_model, &model_.altup_proj}, 0);
  for (const Layer& l : model_.layers) {
    const Experts& e = l.experts;
    const std::vector<const Matrix*> readers{&l.gate, &l.up, &e.gate, &e.up, &e.router, &e.shared_switch};
    const std::vector<const Matrix*> also = model_.parallel ? readers : std::vector<const Matrix*>{};
    const Recurrent& r = l.recurrent;
    if (r.kind) {
      add({&r.mix, &r.gate, &r.beta, &r.alpha}, 0, {&l.q, &l.k, &l.v, &l.o_gate});
      add({&r.out}, 1);
    }
    if (l.q_a.data) {
      add({&l.q_a, &l.kv_a}, 0, also);
      add({&l.q}, 1);
    } else if (l.q.data) {
      add({&l.q, &l.k, &l.v, &l.o_gate, &l.kv_a, &l.laurel_left}, 0, also);
    }
    if (l.kv_a.data) add({&l.k_b, &l.v_b}, 1);
    if (l.laurel_right.data) add({&l.laurel_right}, 1);
    if (l.q.data) add({&l.o}, 1);
    if (e && !e.beside()) add({&e.router, &e.shared_switch}, 0, readers);
    if (l.up.data) {
      add({&l.gate, &l.up}, 0);
      const Format f = l.down.format;
      products_.back().side_by_side = true;
      products_.back().align = (is_float(f) ? 2 * kLanes : info(f).step) / kLanes;
      add({&l.down}, 1);
    }
    if (e && e.beside()) add({&e.router}, 0);
    if (l.ple_gate.data) add({&l.ple_gate}, 0), add({&l.ple_proj}, 1);
  }
  for (const Matrix& m : model_.altup_unembed) add({&m}, 0);
  add({&model_.head}, 0);
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
  if (!shape_.states) return run(rows, logits, stride);
  std::vector<Append> all(rows);
  for (Append& a : all) begin(a);
  run(all, logits, stride);
}

void Decoder::run(const std::vector<Append>& rows, float* logits, int64_t stride) {
  std::vector<Node> nodes;
  tails_.clear();
  int64_t answers = 0, furthest = 0;
  for (const Append& a : rows) {
    const int64_t total = a.held + a.count;
    if (!a.stored) a.row->own(a.length + a.held);
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
  for (size_t at = 0; at < nodes.size();) {
    size_t end = std::min<size_t>(nodes.size(), at + kNodes);
    for (size_t i = at; shape_.states && i < end; ++i) {  // states are kept between passes
      const Node& n = nodes[i];
      if (n.from->leads && n.from->row->states.next_checkpoint(n.slot) == n.slot + 1) end = i + 1;
    }
    forward(nodes.data() + at, static_cast<int>(end - at), logits, stride);
    at = end;
  }
}

void Decoder::forward(const Node* nodes, int count, float* logits, int64_t stride) {
  Task task{nodes, count, {}, logits, stride, *scratch_, *pool_, {}};
  int64_t slots = 0;
  for (int i = 0; i < count; ++i) {
    if (nodes[i].logits >= 0) task.scored.push_back(nodes + i);
    slots = std::max(slots, nodes[i].slot + 1);
    if (!shape_.states) continue;
    if (i == 0 || nodes[i].from != nodes[i - 1].from) task.spans.push_back({nodes[i].from, i, i});
    ++task.spans.back().last;
  }
  task.slots = slots;
  for (Span& span : task.spans) prepare_span(span, nodes);
  for (size_t t = 0; t < scratch_->scores.size(); ++t) {  // here, where running out is no disaster
    scratch_->scores[t].resize(static_cast<size_t>(kTile * round_up(slots + 1, kLanes)));
    scratch_->outs[t].resize(static_cast<size_t>(kTile * widest_head_));
    scratch_->queries[t].resize(static_cast<size_t>(kTile * widest_head_));
  }
  const size_t phases = 2 * model_.layers.size() + 1;
  task.counters = std::vector<std::atomic<int64_t>>(phases * static_cast<size_t>(16 * pool_->size()));
  // Numbers of inputs are never used twice, by whatever decoder: threads may serve several.
  static std::atomic<uint64_t> inputs{1};
  task.inputs = inputs.fetch_add(products_.size(), std::memory_order_relaxed);
  pool_->run([&](int thread) { work(task, thread); });
  for (const Span& span : task.spans) end_span(span);
}

// Inputs [first, last) of a row for a product, as its formats want them; `first` begins a unit of theirs.
void Decoder::quantise(Task& task, const Input& input, const float* x, int64_t stride, int64_t node,
                       int64_t first, int64_t last) {
  Quantised& in = task.s.inputs[input.buffer];
  const float* row = x + node * stride + first;
  const int64_t cols = input.cols;
  if (input.group) {
    const int64_t w = round_up(cols, kGroup), at = node * w + first, g = at / kGroup;
    kernels_->quantise_group(row, std::min(cols, last) - first, std::min(w, last) - first,
                             in.group_quants + at, in.group_scales + g, in.offsets + g, in.sums + g);
  }
  if (input.super) {
    const int64_t w = round_up(cols, kSuper), at = node * w + first;
    kernels_->quantise_super(row, std::min(cols, last) - first, std::min(w, last) - first,
                             in.super_quants + at, in.super_scales + at / kSuper, in.sums16 + at / 16,
                             in.sums32 + at / kGroup);
  }
}

}  // namespace redwood
