// Layers whose MLP is a mixture: each row goes through the experts that its router chose.
//
// Rows of a pass are put in order of their experts, so that an expert's weights are read once for all
// its rows. What a row gets is the sum over its experts in the order of their numbers: its bits depend
// on its own choice alone.
#include <cmath>

#include "decoder_impl.h"

namespace redwood {

// Chooses the experts of a node, and their weights.
void Decoder::route(Task& task, const Layer& layer, int64_t node, int thread) {
  const Routing& r = model_.routing;
  const int64_t count = r.experts, width = round_up(count, kLanes), each = count / r.groups;
  float* logits = task.s.router + node * width;
  float* choice = task.s.choices[static_cast<size_t>(thread)].data();  // what decides
  float* weight = choice + width;
  if (!layer.experts.router_bias.empty()) kernels_->add(logits, layer.experts.router_bias.data(), count);
  float total = 1.0f;
  if (r.sigmoid) {
    kernels_->gate(logits, ones_.data(), count, false, weight);  // x times its sigmoid
    for (int64_t i = 0; i < count; ++i) {
      weight[i] = std::fabs(logits[i]) < 1e-30f ? 0.5f : weight[i] / logits[i];
      choice[i] = weight[i];
    }
  } else {
    std::copy(logits, logits + count, weight);
    std::fill(weight + count, weight + width, -std::numeric_limits<float>::infinity());
    total = kernels_->softmax(weight, width, 1.0f, 0.0f);
    if (layer.experts.choice_bias.empty()) {
      std::copy(logits, logits + count, choice);
    } else {
      for (int64_t i = 0; i < count; ++i) choice[i] = weight[i] / total;
    }
  }
  if (!layer.experts.choice_bias.empty()) kernels_->add(choice, layer.experts.choice_bias.data(), count);
  // The best of [first, last) that is not taken yet; of equals the first, and of NaN any.
  const auto best = [&](const float* of, int64_t first, int64_t last, const bool* taken) {
    int64_t at = -1;
    for (int64_t i = first; i < last; ++i) {
      if (!taken[i] && (at < 0 || of[i] > of[at])) at = i;
    }
    return at;
  };
  bool taken[kMostExperts] = {};
  if (r.groups_used < r.groups) {
    float scores[kMostExperts];
    bool used[kMostExperts] = {};
    for (int64_t g = 0; g < r.groups; ++g) {
      const int64_t first = best(choice, g * each, (g + 1) * each, taken);
      scores[g] = choice[first];
      if (r.two_best && each > 1) {
        taken[first] = true;
        scores[g] += choice[best(choice, g * each, (g + 1) * each, taken)];
        taken[first] = false;
      }
    }
    for (int64_t k = 0; k < r.groups_used; ++k) used[best(scores, 0, r.groups, used)] = true;
    for (int64_t i = 0; i < count; ++i) taken[i] = !used[i / each];
  }
  int32_t* chosen = task.s.chosen.data() + node * r.used;
  float* shares = task.s.shares.data() + node * r.used;
  for (int64_t k = 0; k < r.used; ++k) {
    chosen[k] = static_cast<int32_t>(best(choice, 0, count, taken));
    taken[chosen[k]] = true;
  }
  std::sort(chosen, chosen + r.used);
  float sum = 0.0f;
  for (int64_t k = 0; k < r.used; ++k) {
    shares[k] = weight[chosen[k]] / total;
    sum += shares[k];
  }
  for (int64_t k = 0; k < r.used; ++k) {
    if (r.normalise) shares[k] /= sum;
    shares[k] *= r.scale;
  }
}

// Puts the chosen experts' rows in order.
void Decoder::group(const Task& task, Groups& g) const {
  const int64_t used = model_.routing.used, parts = task.count * used;
  const int32_t* chosen = task.s.chosen.data();
  std::fill(g.counts.begin(), g.counts.end(), 0);
  for (int64_t i = 0; i < parts; ++i) ++g.counts[static_cast<size_t>(chosen[i])];
  g.active.clear();
  g.first.assign(1, 0);
  for (size_t e = 0; e < g.counts.size(); ++e) {
    const int32_t rows = g.counts[e];
    if (rows == 0) continue;
    g.counts[e] = g.first.back();  // from now on: its next slot
    g.active.push_back(static_cast<int32_t>(e));
    g.first.push_back(g.first.back() + rows);
  }
  for (int64_t i = 0; i < parts; ++i) {
    const int32_t slot = g.counts[static_cast<size_t>(chosen[i])]++;
    g.slots[static_cast<size_t>(i)] = slot;
    g.nodes[static_cast<size_t>(slot)] = static_cast<int32_t>(i / used);
  }
}

namespace {

// An expert of stacked ones.
Matrix expert_of(const Matrix& all, int64_t expert, int64_t rows) {
  Matrix one = all;
  one.rows = rows;
  one.data += expert * packed_bytes(all.format, rows, all.cols);
  return one;
}

// Rows from `row` on of quantised inputs of this width.
Quantised rows_from(const Quantised& in, int64_t row, int64_t cols) {
  Quantised out;
  const int64_t g = row * round_up(cols, kGroup), s = row * round_up(cols, kSuper);
  out.group_quants = in.group_quants + g, out.super_quants = in.super_quants + s;
  out.group_scales = in.group_scales + g / kGroup, out.offsets = in.offsets + g / kGroup;
  out.sums = in.sums + g / kGroup;
  out.super_scales = in.super_scales + s / kSuper;
  out.sums16 = in.sums16 + s / 16, out.sums32 = in.sums32 + s / kGroup;
  return out;
}

// A product of all experts that have rows: `blocks` of each, one expert after the other, cut between the
// threads in units of `align`.
struct Cuts {
  int64_t blocks, align, each, all, most, threads;

  int64_t operator()(int64_t t) const { return std::min(all, round_up(all * t / threads, align)); }
  // Calls body(expert's place, its first block, its last, its last with those that only pad) for what
  // lies in [first, last).
  template <class Body>
  void parts(int64_t first, int64_t last, Body body) const {
    for (int64_t at = first / each; at * each < last; ++at) {
      const int64_t from = std::max<int64_t>(0, first - at * each), to = std::min(each, last - at * each);
      if (std::min(to, blocks) > from) body(at, from, std::min(to, blocks), to);
    }
  }
  // The same for what a thread takes of its own, `some` blocks at a time.
  template <class Body>
  void own(int64_t thread, int64_t some, Body body) const {
    const int64_t end = (*this)(thread + 1);
    for (int64_t at = (*this)(thread); at < end; at += some) parts(at, std::min(end, at + some), body);
  }
};

template <class T>
void copy_row(const T* from, int64_t at, T* to, int64_t row, int64_t width) {
  std::copy(from + at * width, from + (at + 1) * width, to + row * width);
}

// Copies rows of quantised inputs to stand one behind the other.
void gather(const Quantised& in, bool group, bool super, int64_t cols, const int32_t* nodes, int rows,
            Quantised& out) {
  const int64_t g = round_up(cols, kGroup), s = round_up(cols, kSuper);
  for (int r = 0; r < rows; ++r) {
    const int64_t node = nodes[r];
    if (group) {
      copy_row(in.group_quants, node, out.group_quants, r, g);
      copy_row(in.group_scales, node, out.group_scales, r, g / kGroup);
      copy_row(in.offsets, node, out.offsets, r, g / kGroup);
      copy_row(in.sums, node, out.sums, r, g / kGroup);
    }
    if (super) {
      copy_row(in.super_quants, node, out.super_quants, r, s);
      copy_row(in.super_scales, node, out.super_scales, r, s / kSuper);
      copy_row(in.sums16, node, out.sums16, r, s / 16);
      copy_row(in.sums32, node, out.sums32, r, s / kGroup);
    }
  }
}

}  // namespace

void Decoder::experts(Work& w, const Layer& layer) {
  Task& task = w.task;
  Scratch& s = task.s;
  const Experts& e = layer.experts;
  const Routing& r = model_.routing;
  const int n = task.count;
  const int64_t hidden = round_up(model_.hidden, kLanes), ffn = round_up(r.ffn, kLanes);
  const int64_t threads = task.pool.size();
  const auto part = [](const Vector& v, int64_t at) { return v.empty() ? nullptr : v.data() + at; };

  const int64_t scores = round_up(r.experts, kLanes);
  if (e.shared_switch.data) {
    w.multiply(n, s.x, hidden, {{s.router, scores, false}, {s.shared_switch, kLanes, false}});
  } else {
    w.multiply(n, s.x, hidden, {{s.router, scores, false}});
  }
  w.each(n, [&](int64_t i) { route(task, layer, i, w.thread); });
  Groups& g = s.groups[static_cast<size_t>(w.thread)];
  group(task, g);
  if (layer.up.data) {
    gated(w, layer);
    w.multiply(n, s.gate, round_up(layer.up.rows, kLanes), {{s.shared, hidden, false}});
  }

  const auto cuts = [&](int64_t blocks, int64_t align, int64_t bytes) {
    const int64_t each = round_up(blocks, align);
    return Cuts{blocks, align, each, each * static_cast<int64_t>(g.active.size()), kTaken / bytes, threads};
  };
  const auto expert_at = [&](const Matrix& all, int64_t at, int64_t rows) {
    return expert_of(all, g.active[static_cast<size_t>(at)], rows);
  };
  const bool gates = e.gate.data != nullptr;
  const int64_t gate_bytes = gates ? block_bytes(e.gate.format, model_.hidden) : 0,
                up_bytes = block_bytes(e.up.format, model_.hidden), down_bytes = block_bytes(e.down.format, r.ffn);
  const int64_t unit = (is_float(e.down.format) ? 2 * kLanes : info(e.down.format).step) / kLanes;
  const Cuts first_cuts = cuts(ffn / kLanes, unit, gate_bytes + up_bytes);
  const Cuts second_cuts = cuts(hidden / kLanes, 2, down_bytes);
  const auto some = [&](const Cuts& c) { return Task::portion(c(w.thread + 1) - c(w.thread), c.align, c.most); };
  // What this thread will read of experts is known now.
  WeightStream weights;
  first_cuts.own(w.thread, some(first_cuts), [&](int64_t at, int64_t from, int64_t to, int64_t) {
    if (gates) weights.add(expert_at(e.gate, at, ffn).data + from * gate_bytes, (to - from) * gate_bytes);
    weights.add(expert_at(e.up, at, ffn).data + from * up_bytes, (to - from) * up_bytes);
  });
  const int64_t second = weights.total();
  second_cuts.own(w.thread, some(second_cuts), [&](int64_t at, int64_t from, int64_t to, int64_t) {
    weights.add(expert_at(e.down, at, hidden).data + from * down_bytes, (to - from) * down_bytes);
  });
  weights.restart();
  Work::Ahead ahead{weights, 0, weights.total()};

  Input made;  // of the second products
  made.buffer = 2;
  made.serve(e.down);
  Quantised& own = s.gathered[static_cast<size_t>(w.thread)];
  float* own_rows = s.rows[static_cast<size_t>(w.thread)].data();
  const Format first_format = gates ? e.gate.format : e.up.format;
  const bool floats = is_float(first_format) || is_float(e.up.format);
  const bool quads = is_group(first_format) || is_group(e.up.format);
  const bool supers = is_super(first_format) || is_super(e.up.format);
  int64_t gathered = -1;
  const auto both = [&](int64_t at, int64_t from, int64_t to, int64_t end, Work::Ahead* own_ahead) {
    const int64_t slot = g.first[static_cast<size_t>(at)], expert = g.active[static_cast<size_t>(at)];
    const int rows = g.first[static_cast<size_t>(at) + 1] - static_cast<int>(slot);
    const int32_t* nodes = g.nodes.data() + slot;
    const bool lone = rows == 1;
    if (!lone && gathered != at) {
      gather(s.inputs[0], quads, supers, model_.hidden, nodes, rows, own);
      for (int i = 0; floats && i < rows; ++i) copy_row(s.x, nodes[i], own_rows, i, hidden);
      gathered = at;
    }
    const Quantised in = rows_from(lone ? s.inputs[0] : own, lone ? nodes[0] : 0, model_.hidden);
    const float* x = lone ? s.x + nodes[0] * hidden : own_rows;
    float *gate = s.expert_gate + slot * ffn, *up = gates ? s.expert_up + slot * ffn : gate;
    if (gates) {
      w.blocks(expert_of(e.gate, expert, ffn), in, x, hidden, rows, 0, {gate, ffn, false}, from, to, own_ahead);
    }
    w.blocks(expert_of(e.up, expert, ffn), in, x, hidden, rows, 0, {up, ffn, false}, from, to, own_ahead);
    const int64_t first = from * kLanes, last = end * kLanes, count = std::min(r.ffn, last) - first;
    for (int64_t i = 0; i < rows && count > 0; ++i) {
      if (gates) {
        activate(gate + i * ffn + first, up + i * ffn + first, part(e.gate_bias, expert * r.ffn + first),
                 part(e.up_bias, expert * r.ffn + first), count);
      } else {
        activate(gate + i * ffn + first, ones_.data(), part(e.up_bias, expert * r.ffn + first), nullptr, count);
      }
      quantise(task, made, s.expert_gate, ffn, slot + i, first, last);
    }
  };
  task.share(w.phase, w.thread, unit, first_cuts.most, first_cuts, [&](int64_t first, int64_t last, bool is_own) {
    first_cuts.parts(first, last, [&](int64_t at, int64_t from, int64_t to, int64_t end) {
      both(at, from, to, end, is_own ? &ahead : nullptr);
    });
  });
  ahead.used = second;
  task.share(w.phase, w.thread, 2, second_cuts.most, second_cuts, [&](int64_t first, int64_t last, bool is_own) {
    second_cuts.parts(first, last, [&](int64_t at, int64_t from, int64_t to, int64_t) {
      const int64_t slot = g.first[static_cast<size_t>(at)];
      const int rows = g.first[static_cast<size_t>(at) + 1] - static_cast<int>(slot);
      w.blocks(expert_at(e.down, at, hidden), rows_from(s.inputs[2], slot, r.ffn), s.expert_gate + slot * ffn, ffn,
               rows, 0, {s.expert_y + slot * hidden, hidden, false}, from, to, is_own ? &ahead : nullptr);
    });
  });
  w.each(n, [&](int64_t i) { combine(task, layer, i, g); });
}

// Adds what the experts of a node said, weighed, to its residual.
void Decoder::combine(Task& task, const Layer& layer, int64_t node, const Groups& groups) {
  const Scratch& s = task.s;
  const Experts& e = layer.experts;
  const int64_t n = model_.hidden, hidden = round_up(n, kLanes), used = model_.routing.used;
  float* y = s.y + node * hidden;
  std::fill(y, y + n, 0.0f);
  for (int64_t k = 0; k < used; ++k) {
    const int64_t part = node * used + k;
    const float share = s.shares[static_cast<size_t>(part)];
    float* out = s.expert_y + groups.slots[static_cast<size_t>(part)] * hidden;
    if (!e.down_bias.empty()) {
      kernels_->add(out, e.down_bias.data() + s.chosen[static_cast<size_t>(part)] * n, n);
    }
    for (int64_t i = 0; i < n; ++i) y[i] += share * out[i];
  }
  if (layer.up.data) {
    const float* shared = s.shared + node * hidden;
    float by = 1.0f;
    if (e.shared_switch.data) {
      const float x = s.shared_switch[node * kLanes];
      kernels_->gate(&x, ones_.data(), 1, false, &by);
      by = std::fabs(x) < 1e-30f ? 0.5f : by / x;
    }
    for (int64_t i = 0; i < n; ++i) y[i] += by * shared[i];
  }
  if (!layer.post_ffn_norm.empty()) norm(y, layer.post_ffn_norm, {}, y);
  kernels_->add(s.h + node * hidden, y, n);
}

}  // namespace redwood
