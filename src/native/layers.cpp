#include "decoder_impl.h"
#include "pack.h"

namespace redwood {

void Decoder::embed(Task& task, int64_t node) {
  float* h = task.s.h + node * round_up(model_.hidden, kLanes);
  unpack_row(model_.embed.format, model_.embed.data, model_.hidden, task.nodes[node].token, h);
  if (model_.embedding_scale != 1.0f) {
    for (int64_t i = 0; i < model_.hidden; ++i) h[i] *= model_.embedding_scale;
  }
}

// A row of the residual, normed; copied where the model has no norm here.
void Decoder::norm(const float* x, const Vector& weight, const Vector& bias, float* out) const {
  const int64_t n = model_.hidden;
  if (weight.empty()) {
    if (out != x) std::copy(x, x + n, out);
    return;
  }
  if (model_.layer_norm) {
    double sums[8] = {};
    for (int64_t i = 0; i < n; ++i) sums[i % 8] += x[i];
    const double sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    const float mean = static_cast<float>(sum / static_cast<double>(n));
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] - mean;
    x = out;
  }
  kernels_->rms_norm(x, weight.data(), n, model_.eps, out);
  if (!bias.empty()) kernels_->add(out, bias.data(), n);
}

// What comes between the two products of an MLP, in the place of the gate.
void Decoder::activate(float* gate, float* up, const float* gate_bias, const float* up_bias,
                       int64_t count) const {
  if (gate_bias) kernels_->add(gate, gate_bias, count);
  if (up_bias) kernels_->add(up, up_bias, count);
  if (const float limit = model_.glu_limit; limit > 0.0f) {
    // min(g, limit) sigmoid(alpha g) (u + 1), of which silu(alpha g) = alpha g sigmoid(alpha g).
    const float alpha = model_.glu_alpha;
    for (int64_t i = 0; i < count; ++i) {
      gate[i] = alpha * (gate[i] > limit ? limit : gate[i]);
      up[i] = ((up[i] > limit ? limit : up[i] < -limit ? -limit : up[i]) + 1.0f) / alpha;
    }
  }
  if (const float by = model_.mlp_gate; by != 1.0f) {
    for (int64_t i = 0; i < count; ++i) gate[i] *= by;
  }
  if (model_.squared) {
    for (int64_t i = 0; i < count; ++i) gate[i] = gate[i] < 0.0f ? 0.0f : gate[i] * gate[i] * up[i];
  } else {
    kernels_->gate(gate, up, count, model_.gelu, gate);
  }
  if (const float by = model_.mlp_out; by != 1.0f) {
    for (int64_t i = 0; i < count; ++i) gate[i] *= by;
  }
}

// Adds the next product to the residual, through a norm where the model has one.
void Decoder::residual(Work& w, const float* x, int64_t stride, const Vector& bias, const Vector& norm_weight) {
  Scratch& s = w.task.s;
  const int n = w.task.count;
  const int64_t hidden = round_up(model_.hidden, kLanes);
  if (norm_weight.empty()) {
    if (!bias.empty()) {
      w.each(n, [&](int64_t i) { kernels_->add(s.h + i * hidden, bias.data(), model_.hidden); });
    }
    return w.multiply(n, x, stride, {{s.h, hidden, true}});
  }
  w.multiply(n, x, stride, {{s.y, hidden, false}});
  w.each(n, [&](int64_t i) {
    float* y = s.y + i * hidden;
    if (!bias.empty()) kernels_->add(y, bias.data(), model_.hidden);
    norm(y, norm_weight, {}, y);
    kernels_->add(s.h + i * hidden, y, model_.hidden);
  });
}

// The first half of an MLP, to s.gate.
void Decoder::gated(Work& w, const Layer& layer) {
  Scratch& s = w.task.s;
  const int n = w.task.count;
  const int64_t ffn = layer.up.rows, stride = round_up(ffn, kLanes);
  const auto part = [](const Vector& v, int64_t at) { return v.empty() ? nullptr : v.data() + at; };
  const auto after = [&](int64_t first, int64_t last) {
    const int64_t count = std::min(ffn, last) - first;
    for (int64_t i = 0; i < n; ++i) {
      float* gate = s.gate + i * stride + first;
      if (layer.gate.data) {
        activate(gate, s.up + i * stride + first, part(layer.gate_bias, first), part(layer.up_bias, first), count);
      } else {
        activate(gate, ones_.data(), part(layer.up_bias, first), nullptr, count);
      }
      quantise(w.task, w.input(), s.gate, stride, i, first, last);
    }
  };
  if (layer.gate.data) {
    w.multiply(n, s.x, round_up(model_.hidden, kLanes), {{s.gate, stride, false}, {s.up, stride, false}}, after);
  } else {
    w.multiply(n, s.x, round_up(model_.hidden, kLanes), {{s.gate, stride, false}}, after);
  }
}

// Queries, keys and values of all nodes.
void Decoder::project(Work& w, const Layer& layer) {
  Scratch& s = w.task.s;
  const Model& m = model_;
  const int n = w.task.count;
  const int64_t hidden = round_up(m.hidden, kLanes), heads = round_up(m.heads * m.head_dim, kLanes),
                kv = round_up(m.kv_heads * m.head_dim, kLanes),
                values = round_up(m.kv_heads * m.value_dim, kLanes);
  if (!layer.kv_a.data) {
    return w.multiply(n, s.x, hidden, {{s.q, heads, false}, {s.k, kv, false}, {s.v, values, false},
                                       {s.o_gate, heads, false}});
  }
  const int64_t turning = layer.kv_a.rows - m.latent, still = m.head_dim - turning;
  const int64_t latents = round_up(layer.kv_a.rows, kLanes), expanded = round_up(layer.kv_b.rows, kLanes);
  w.multiply(n, s.x, hidden, {{s.q, heads, false}, {s.latents, latents, false}});
  w.prepare(n, s.latents, latents, [&](int64_t i) {
    float* latent = s.latents + i * latents;
    kernels_->rms_norm(latent, layer.kv_a_norm.data(), m.latent, m.eps, latent);
  });
  w.multiply(n, s.latents, latents, {{s.expanded, expanded, false}});
  w.each(n, [&](int64_t i) {
    const float *shared = s.latents + i * latents + m.latent, *from = s.expanded + i * expanded;
    float *key = s.k + i * kv, *value = s.v + i * values;
    for (int64_t head = 0; head < m.kv_heads; ++head, from += still + m.value_dim) {
      key = std::copy(shared, shared + turning, key);
      key = std::copy(from, from + still, key);
      value = std::copy(from + still, from + still + m.value_dim, value);
    }
  });
}

void Decoder::attention(Work& w, const Layer& layer, int index) {
  Task& task = w.task;
  Scratch& s = task.s;
  const Model& m = model_;
  const int n = task.count;
  const int64_t hidden = round_up(m.hidden, kLanes), heads = round_up(m.heads * m.head_dim, kLanes),
                kv = round_up(m.kv_heads * m.head_dim, kLanes);
  const int64_t group = m.heads / m.kv_heads, lines = m.heads + 2 * m.kv_heads;
  int64_t per = std::max<int64_t>(1, kTile / group), tiles = (n + per - 1) / per;
  // Behind a long text, halves of tiles where whole ones would leave threads waiting: 3 heads for 2.
  const int64_t threads = task.pool.size(), items = tiles * m.kv_heads;
  if (task.slots > kLong && items % threads != 0 && items < 4 * threads) {
    per = std::max<int64_t>(1, std::min<int64_t>(per, n + 1) / 2);
    tiles = (n + per - 1) / per;
  }
  if (!layer.recurrent.kind) {  // else it has been done for the recurrent layer beside
    w.prepare(n, s.x, hidden, [&](int64_t i) {
      norm(s.h + i * hidden, layer.attn_norm, layer.attn_norm_bias, s.x + i * hidden);
    });
  }
  project(w, layer);
  if (norms_all_heads(layer, m.head_dim)) {
    w.each(n, [&](int64_t i) {
      float *q = s.q + i * heads, *k = s.k + i * kv;
      if (!layer.q_bias.empty()) kernels_->add(q, layer.q_bias.data(), m.heads * m.head_dim);
      if (!layer.k_bias.empty()) kernels_->add(k, layer.k_bias.data(), m.kv_heads * m.head_dim);
      kernels_->rms_norm(q, layer.q_norm.data(), m.heads * m.head_dim, m.eps, q);
      kernels_->rms_norm(k, layer.k_norm.data(), m.kv_heads * m.head_dim, m.eps, k);
    });
  }
  // Where one item attends for all nodes of a head, nobody else reads what it places.
  const bool alone = tiles == 1;
  // The outputs of a head's group are whole units of the next input.
  const int64_t width = group * m.value_dim, mixed = round_up(m.heads * m.value_dim, kLanes);
  const bool whole = width % info(layer.o.format).step == 0;
  if (!alone) {
    w.each(n * lines, [&](int64_t i) { place(task, layer, index, i / lines, i % lines); });
  }
  w.each(tiles * m.kv_heads, [&](int64_t i) {
    const int64_t head = i % m.kv_heads, tile = i / m.kv_heads;
    const int64_t first = tile * per, last = std::min<int64_t>(n, first + per);
    for (int64_t node = 0; alone && node < n; ++node) {
      for (int64_t g = 0; g < group; ++g) place(task, layer, index, node, head * group + g);
      place(task, layer, index, node, m.heads + head);
      place(task, layer, index, node, m.heads + m.kv_heads + head);
    }
    attend(task, layer, index, head, static_cast<int>(first), static_cast<int>(last), w.thread);
    for (int64_t node = first; node < last; ++node) {
      if (layer.o_gate.data) {
        kernels_->sigmoid(s.o_gate + node * heads + head * width, width, s.mixed + node * mixed + head * width);
      }
      if (m.attention_out != 1.0f) {
        float* said = s.mixed + node * mixed + head * width;
        for (int64_t d = 0; d < width; ++d) said[d] *= m.attention_out;
      }
      if (whole) quantise(task, w.input(), s.mixed, mixed, node, head * width, (head + 1) * width);
    }
  });
  if (!whole) w.prepare(n, s.mixed, mixed, [](int64_t) {});
  residual(w, s.mixed, mixed, layer.o_bias, layer.post_attn_norm);
}

void Decoder::work(Task& task, int thread) {
  Scratch& s = task.s;
  const Model& m = model_;
  const int n = task.count;
  const int64_t hidden = round_up(m.hidden, kLanes);
  Work w{*this, task, thread};
  w.stream.restart();
  // Nothing of the head is fetched where it is not read.
  w.read = task.scored.empty() ? products_.back().start[static_cast<size_t>(thread)] : w.stream.total();

  w.each(n, [&](int64_t i) { embed(task, i); });
  for (size_t l = 0; l < m.layers.size(); ++l) {
    const Layer& layer = m.layers[l];
    if (layer.recurrent.kind) recurrent(w, layer, static_cast<int>(l));
    if (layer.q.data) attention(w, layer, layer.cache);
    if (!layer.up.data && !layer.experts) continue;
    if (!m.parallel) {
      w.prepare(n, s.x, hidden, [&](int64_t i) {
        norm(s.h + i * hidden, layer.ffn_norm, layer.ffn_norm_bias, s.x + i * hidden);
      });
    }
    if (layer.experts) {
      experts(w, layer);
    } else {
      gated(w, layer);
      residual(w, s.gate, round_up(layer.up.rows, kLanes), layer.down_bias, layer.post_ffn_norm);
    }
  }
  const int scored = static_cast<int>(task.scored.size());
  if (scored == 0) return;
  float* out = task.logits + task.scored[0]->logits * task.stride;
  w.prepare(scored, s.x, hidden, [&](int64_t i) {
    const int64_t node = task.scored[static_cast<size_t>(i)] - task.nodes;
    norm(s.h + node * hidden, m.output_norm, m.output_norm_bias, s.x + i * hidden);
  });
  w.multiply(scored, s.x, hidden, {{out, task.stride, false}});
  if (m.logit_softcap != 0.0f) {
    w.each(scored, [&](int64_t i) {
      kernels_->softcap(out + i * task.stride, m.outputs, m.logit_softcap);
    });
  }
}

}  // namespace redwood
