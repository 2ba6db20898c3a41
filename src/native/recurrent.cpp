// Recurrent layers: short convolutions and gated delta nets (Yang et al. 2024, arXiv 2412.06464), one
// token after another in float32, every sum in one order. What Mamba-2 does otherwise: mamba.cpp.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "decoder_impl.h"
#include "elementary.h"

namespace redwood {

// The record of a node in a pass.
static Record record_of(float* led, const Row& row, bool leads, int64_t node, int64_t index, const RecurrentShape& r) {
  if (!leads) return {row.states.record(index) + r.record_at, r};
  return {led + node * round_up(r.record(), kLanes), r};
}

void Decoder::recurrent(Work& w, const Layer& layer, int index) {
  Task& task = w.task;
  Scratch& s = task.s;
  const Recurrence& m = model_.recurrence;
  const Recurrent& r = layer.recurrent;
  const RecurrentShape& shape = shape_.states->layers[static_cast<size_t>(index)];
  const int n = task.count;
  const int64_t hidden = round_up(model_.hidden, kLanes), mix = round_up(r.mix.rows, kLanes);
  const int64_t heads = round_up(m.heads, kLanes), spans = static_cast<int64_t>(task.spans.size());
  w.prepare(n, s.x, hidden, [&](int64_t i) {
    norm(s.h + i * hidden, layer.attn_norm, layer.attn_norm_bias, s.x + i * hidden);
  });
  const bool delta = r.kind == Recurrent::kDelta, mamba = r.kind == Recurrent::kMamba;
  const int64_t out = delta || mamba ? m.heads * m.value_dim : m.channels, stride = round_up(out, kLanes);
  if (mamba) {
    w.multiply(n, s.x, hidden, {{s.mix, mix, false}, {s.out_gate, stride, false}, {s.alpha, heads, false}});
  } else if (delta) {
    w.multiply(n, s.x, hidden, {{s.mix, mix, false}, {s.out_gate, stride, false}, {s.beta, heads, false},
                                {s.alpha, heads, false}});
  } else {
    w.multiply(n, s.x, hidden, {{s.mix, mix, false}});
  }
  w.each(n, [&](int64_t i) { read_inputs(task, layer, index, i); });
  if (delta || mamba) {
    w.each(n, [&](int64_t i) { convolve(task, layer, index, i); });
    const int64_t items = shape.values() / kLanes;
    w.each(spans * items, [&](int64_t i) {
      recur(task, index, task.spans[static_cast<size_t>(i / items)], i % items, w.thread);
    });
  }
  w.prepare(n, s.mixed, stride, [&](int64_t i) {
    float* mixed = s.mixed + i * stride;
    if (mamba) {
      const Node& at = task.nodes[i];
      const Record record = record_of(s.led, *at.from->row, at.from->leads, i, at.slot - at.from->length, shape);
      return say_mamba(task, r, shape, record, i);
    }
    if (!delta) return convolve(task, layer, index, i);
    for (int64_t h = 0; h < m.heads; ++h, mixed += m.value_dim) {
      const float* said = s.recurred + i * shape.values() + h * shape.value_dim;
      kernels_->rms_norm(said, r.norm.data(), m.value_dim, model_.eps, mixed);
      kernels_->gate(s.out_gate + i * stride + h * m.value_dim, mixed, m.value_dim, false, mixed);
    }
  });
  w.each(spans, [&](int64_t i) {
    const Span& span = task.spans[static_cast<size_t>(i)];
    if (!span.from->leads) return;
    move_tail(span.from->row->states.ahead.get() + shape.state_at, shape.taps, shape.channels,
              span.last - span.first, [&](int64_t at) {
                return record_of(s.led, *span.from->row, true, span.first + at, 0, shape).input;
              });
  });
  residual(w, s.mixed, stride, r.out_bias, layer.post_attn_norm);
}

// What a node gives to the convolution, and how its state fades.
void Decoder::read_inputs(Task& task, const Layer& layer, int index, int64_t node) {
  Scratch& s = task.s;
  const Recurrence& m = model_.recurrence;
  const Recurrent& r = layer.recurrent;
  const RecurrentShape& shape = shape_.states->layers[static_cast<size_t>(index)];
  const Node& at = task.nodes[node];
  const Record record =
      record_of(s.led, *at.from->row, at.from->leads, node, at.slot - at.from->length, shape);
  float* mix = s.mix + node * round_up(r.mix.rows, kLanes);
  if (!r.mix_bias.empty()) kernels_->add(mix, r.mix_bias.data(), r.mix.rows);
  if (r.kind == Recurrent::kShortConv) {
    const float* x = mix + 2 * m.channels;
    for (int64_t c = 0; c < m.channels; ++c) record.input[c] = mix[c] * x[c];
    return;
  }
  std::copy_n(mix, m.channels, record.input);
  if (r.kind == Recurrent::kMamba) return read_times(task, r, record, node);
  const float *alpha = s.alpha + node * round_up(m.heads, kLanes), *beta = s.beta + node * round_up(m.heads, kLanes);
  for (int64_t h = 0; h < m.heads; ++h) {
    const float a = alpha[h] + r.dt_bias[static_cast<size_t>(h)];
    const double time = a > 20.0f ? a : log_of(1.0 + exp_of(a));  // softplus, as PyTorch has it
    record.decays[h] = static_cast<float>(exp_of(r.decay[static_cast<size_t>(h)] * time));
    record.betas[h] = static_cast<float>(1.0 / (1.0 + exp_of(-static_cast<double>(beta[h]))));
  }
}

// The convolution over a node and those before it on its path.
void Decoder::convolve(Task& task, const Layer& layer, int index, int64_t node) {
  Scratch& s = task.s;
  const Recurrence& m = model_.recurrence;
  const Recurrent& r = layer.recurrent;
  const RecurrentShape& shape = shape_.states->layers[static_cast<size_t>(index)];
  const Node& at = task.nodes[node];
  const Row& row = *at.from->row;
  const float* tail = row.states.origin() + shape.state_at;
  const float* inputs[kMostWidth];
  int64_t own = at.slot - at.from->length;  // among the provisional nodes
  const Record record = record_of(s.led, row, at.from->leads, node, own, shape);
  inputs[shape.taps] = record.input;
  if (at.from->leads) {
    int64_t first = node;  // of the row in this pass
    while (first > 0 && task.nodes[first - 1].from == at.from) --first;
    for (int64_t back = 1; back <= shape.taps; ++back) {
      const int64_t before = node - back;
      inputs[shape.taps - back] = before >= first
                                      ? record_of(s.led, row, true, before, 0, shape).input
                                      : tail + (shape.taps + before - first) * shape.channels;
    }
  } else {
    const int64_t led = row.states.led;
    int64_t past = 0;  // steps back beyond the first node that has a record
    for (int64_t back = 1; back <= shape.taps; ++back) {
      if (own >= led) own = at.from->parents[own];
      if (own < led) ++past;
      inputs[shape.taps - back] = past ? tail + (shape.taps - past) * shape.channels
                                       : record_of(s.led, row, false, 0, own, shape).input;
    }
  }
  float* mix = s.mix + node * round_up(r.mix.rows, kLanes);
  const float* bias = r.conv_bias.empty() ? nullptr : r.conv_bias.data();
  if (r.kind == Recurrent::kShortConv) {
    float* mixed = s.mixed + node * round_up(m.channels, kLanes);
    kernels_->convolve(inputs, r.conv.data(), bias, m.width, m.channels, false, mixed);
    for (int64_t c = 0; c < m.channels; ++c) mixed[c] *= mix[m.channels + c];
    return;
  }
  kernels_->convolve(inputs, r.conv.data(), bias, m.width, m.channels, true, mix);  // inputs are copies
  if (r.kind == Recurrent::kMamba) return split_mamba(task, shape, record, node);
  float* query = s.recurrent_q + node * round_up(shape.keys(), kLanes);
  const float eps = 1e-6f / static_cast<float>(m.key_dim);
  for (int64_t h = 0; h < m.key_heads; ++h) {
    const int64_t first = h * m.key_dim;
    kernels_->rms_norm(mix + first, query_unit_.data(), m.key_dim, eps, query + first);
    kernels_->rms_norm(mix + shape.keys() + first, key_unit_.data(), m.key_dim, eps, record.keys + first);
  }
  for (int64_t h = 0; h < m.heads; ++h) {
    float* value = record.values + h * shape.value_dim;
    std::copy_n(mix + 2 * shape.keys() + h * m.value_dim, m.value_dim, value);
    std::fill(value + m.value_dim, value + shape.value_dim, 0.0f);
  }
}

// What a record does to 16 components of a head's values, `item` of all. `queries`: those of the node,
// where its answer is wanted.
Recur Decoder::step(const RecurrentShape& shape, const Record& record, int64_t item, const float* queries) const {
  const Recurrence& m = model_.recurrence;
  const int64_t head = item / (shape.value_dim / kLanes);
  const int64_t key = m.key_dim * (m.tiled ? head % m.key_heads : head / (m.heads / m.key_heads));
  return {nullptr, nullptr, record.keys + key, record.values + item * kLanes, record.decays[head], record.betas[head],
          shape.corrects, m.key_dim, queries ? queries + key : nullptr, nullptr};
}

void Decoder::recur(Task& task, int index, const Span& span, int64_t item, int thread) {
  Scratch& s = task.s;
  const RecurrentShape& shape = shape_.states->layers[static_cast<size_t>(index)];
  const Row& row = *span.from->row;
  const int64_t size = shape.key_dim * kLanes, place = shape.state_at + shape.tail() + item * size;
  const auto queries = [&](int64_t node) { return s.recurrent_q + node * round_up(shape.keys(), kLanes); };
  const auto answer = [&](int64_t node) { return s.recurred + node * shape.values() + item * kLanes; };
  if (span.from->leads) {
    float* state = row.states.ahead.get() + place;
    for (int node = span.first; node < span.last; ++node) {
      const Record record = record_of(s.led, row, true, node, 0, shape);
      Recur next = step(shape, record, item, queries(node));
      next.from = next.to = state;
      next.out = answer(node);
      kernels_->recur(next);
    }
    return;
  }
  float* slots = s.slots[static_cast<size_t>(thread)].data();
  const float* origin = row.states.origin() + place;
  for (const Move& move : span.moves) {
    const Record record = record_of(s.led, row, false, 0, move.node, shape);
    Recur next = step(shape, record, item, move.task < 0 ? nullptr : queries(move.task));
    next.from = move.from < 0 ? origin : slots + move.from * size;
    next.to = slots + move.to * size;
    if (move.task >= 0) next.out = answer(move.task);
    kernels_->recur(next);
  }
}

}  // namespace redwood
