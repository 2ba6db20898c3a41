// What Gemma 3n and Gemma 4 have beside other decoders: embeddings for each layer, several streams of
// residuals of which one goes through the layers (AltUp), a residual of low rank (Laurel), and gates of
// which few are open. Every sum has one order, which depends on the node alone.
#include <cmath>

#include "decoder_impl.h"
#include "pack.h"

namespace redwood {
namespace {

// The sum of term(i) for i < n.
template <class Term>
double sum_of(int64_t n, Term term) {
  double sums[8] = {};
  for (int64_t i = 0; i < n; ++i) sums[i % 8] += term(i);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

float mean_square(const float* x, int64_t n) {
  const double sum = sum_of(n, [&](int64_t i) { return static_cast<double>(x[i]) * x[i]; });
  return static_cast<float>(sum / static_cast<double>(n));
}

constexpr float kHalfRoot = 0.70710678118654752f;  // 1 / sqrt(2)

}  // namespace

// Embeddings, those for each layer, and the streams.
void Decoder::begin_streams(Work& w) {
  Task& task = w.task;
  Scratch& s = task.s;
  const Model& m = model_;
  const int n = task.count;
  const int64_t hidden = round_up(m.hidden, kLanes), all = round_up(m.ple_model.rows, kLanes);
  w.prepare(n, s.h, hidden, [&](int64_t i) { embed(task, i); });
  const int64_t others = (m.streams - 1) * hidden;
  const Work::Out outs[] = {{s.ple, all, false}, {s.others, others, false}};
  w.multiply(n, s.h, hidden, outs, [](int64_t, int64_t) {});
  w.each(n, [&](int64_t i) {
    per_layer_inputs(task, i, w.thread);
    if (!m.streams) return;
    const float* h = s.h + i * hidden;
    std::copy(h, h + m.hidden, stream_of(task, 0, i));
    const float target = std::sqrt(mean_square(h, m.hidden));
    for (int64_t k = 1; k < m.streams; ++k) {
      const float* from = s.others + i * others + (k - 1) * hidden;
      const float by = std::sqrt(std::max(mean_square(from, m.hidden), 1e-5f));
      float* to = stream_of(task, k, i);
      for (int64_t d = 0; d < m.hidden; ++d) to[d] = from[d] * target / by;
    }
  });
}

float* Decoder::stream_of(Task& task, int64_t stream, int64_t node) const {
  return task.s.residuals + (stream * kNodes + node) * round_up(model_.hidden, kLanes);
}

// Adds a token's embeddings for each layer to what its embedding makes of them.
void Decoder::per_layer_inputs(Task& task, int64_t node, int thread) {
  const Model& m = model_;
  float* looked_up = task.s.looked_up[static_cast<size_t>(thread)].data();
  // Tokens past the table (those of images and sounds) have its first row.
  const int64_t token = task.nodes[node].token, row = token < m.ple_embed.rows ? token : 0;
  unpack_row(m.ple_embed.format, m.ple_embed.data, m.ple_embed.cols, row, looked_up);
  const float root = std::sqrt(static_cast<float>(m.ple));
  const float by = 1.0f / std::sqrt(static_cast<float>(m.hidden));
  float* x = task.s.ple + node * round_up(m.ple_model.rows, kLanes);
  for (size_t l = 0; l < m.layers.size(); ++l, x += m.ple, looked_up += m.ple) {
    for (int64_t i = 0; i < m.ple; ++i) x[i] *= by;
    kernels_->rms_norm(x, m.ple_norm.data(), m.ple, m.eps, x);
    for (int64_t i = 0; i < m.ple; ++i) x[i] = (x[i] + looked_up[i] * root) * kHalfRoot;
  }
}

// Behind the MLP: what the layer changed goes to all streams, and the layer's embedding is added.
void Decoder::per_layer(Work& w, const Layer& layer, int64_t index) {
  Task& task = w.task;
  Scratch& s = task.s;
  const Model& m = model_;
  const int n = task.count;
  const int64_t hidden = round_up(m.hidden, kLanes), width = round_up(m.ple, kLanes),
                all = round_up(m.ple_model.rows, kLanes);
  w.prepare(n, s.x, hidden, [&](int64_t i) {
    if (m.streams) return correct(task, layer, i);
    std::copy(s.h + i * hidden, s.h + i * hidden + m.hidden, s.x + i * hidden);
  });
  w.multiply(n, s.x, hidden, {{s.gate, width, false}});
  w.prepare(n, s.gate, width, [&](int64_t i) {
    float* gate = s.gate + i * width;
    kernels_->gate(gate, s.ple + i * all + index * m.ple, m.ple, m.gelu, gate);
  });
  w.multiply(n, s.gate, width, {{s.y, hidden, false}});
  w.each(n, [&](int64_t i) {
    float* y = s.y + i * hidden;
    norm(y, layer.ple_norm, {}, y);
    if (!m.streams) return add_scaled(s.h + i * hidden, y, layer.scale);
    for (int64_t k = 1; k < m.streams; ++k) kernels_->add(stream_of(task, k, i), y, m.hidden);
  });
}

// out [streams]: tanh of what the router says of x; `normed` [hidden] is written.
void Decoder::modalities(const Layer& layer, const float* x, float* normed, float* out) const {
  const int64_t n = model_.hidden;
  kernels_->rms_norm(x, layer.altup.norm.data(), n, model_.eps, normed);
  for (int64_t k = 0; k < model_.streams; ++k) {
    const float* row = layer.altup.router.data() + k * n;
    out[k] = static_cast<float>(sum_of(n, [&](int64_t i) { return static_cast<double>(row[i]) * normed[i]; }));
  }
  kernels_->softcap(out, model_.streams, 1.0f);
}

// The streams as they would be behind the layer; the active one goes through it.
void Decoder::predict(Task& task, const Layer& layer, int64_t node) {
  const int64_t count = model_.streams, hidden = round_up(model_.hidden, kLanes);
  float *x = task.s.x + node * hidden, *h = task.s.h + node * hidden;
  float modality[kMostStreams], coefs[kMostStreams * kMostStreams], before[kMostStreams];
  float* streams[kMostStreams] = {};
  for (int64_t k = 0; k < count; ++k) streams[k] = stream_of(task, k, node);
  modalities(layer, streams[model_.active], x, modality);
  for (int64_t i = 0; i < count * count; ++i) {
    const float* row = layer.altup.predict.data() + i * count;
    coefs[i] = 0.0f;
    for (int64_t k = 0; k < count; ++k) coefs[i] += row[k] * modality[k];
  }
  for (int64_t d = 0; d < model_.hidden; ++d) {
    for (int64_t k = 0; k < count; ++k) before[k] = streams[k][d];
    for (int64_t k = 0; k < count; ++k) {
      float sum = 0.0f;
      for (int64_t j = 0; j < count; ++j) sum += coefs[k * count + j] * before[j];
      streams[k][d] = sum + before[k];
    }
    h[d] = streams[model_.active][d];
  }
}

// Spreads what the layer changed over the streams; s.x becomes the input of the layer's embedding.
void Decoder::correct(Task& task, const Layer& layer, int64_t node) {
  const int64_t count = model_.streams, hidden = round_up(model_.hidden, kLanes);
  const float* h = task.s.h + node * hidden;
  float *x = task.s.x + node * hidden, *active = stream_of(task, model_.active, node);
  float modality[kMostStreams], coefs[kMostStreams];
  modalities(layer, h, x, modality);
  for (int64_t k = 0; k < count; ++k) {
    const float* row = layer.altup.correct.data() + k * count;
    float sum = 0.0f;
    for (int64_t j = 0; j < count; ++j) sum += row[j] * modality[j];
    coefs[k] = sum + 1.0f;
  }
  for (int64_t d = 0; d < model_.hidden; ++d) x[d] = h[d] - active[d];
  for (int64_t k = 0; k < count; ++k) {
    float* stream = stream_of(task, k, node);
    for (int64_t d = 0; d < model_.hidden; ++d) stream[d] += x[d] * coefs[k];
  }
  const Vector& scale = layer.altup.scale;
  for (int64_t d = 0; d < model_.hidden; ++d) {
    x[d] = scale.empty() ? active[d] : active[d] * scale[static_cast<size_t>(d)];
  }
}

// The residual behind attention and the one of low rank, together.
void Decoder::add_laurel(Task& task, const Layer& layer, int64_t node) {
  const int64_t n = model_.hidden, hidden = round_up(n, kLanes);
  // What attention read, once more: s.x may hold something else by now.
  float *x = task.s.x + node * hidden, *h = task.s.h + node * hidden, *laurel = task.s.laurel + node * hidden;
  norm(stream_of(task, model_.active, node), layer.attn_norm, layer.attn_norm_bias, x);
  norm(laurel, layer.laurel_norm, {}, laurel);
  for (int64_t d = 0; d < n; ++d) h[d] = (h[d] + (x[d] + laurel[d])) * kHalfRoot;
}

// Leaves of a gate what lies above the layer's cutoff, in standard deviations from the mean.
void Decoder::cut_gate(const Layer& layer, float* gate) const {
  const int64_t n = layer.up.rows;
  const double mean = sum_of(n, [&](int64_t i) { return static_cast<double>(gate[i]); }) / static_cast<double>(n);
  const double square = sum_of(n, [&](int64_t i) { return (gate[i] - mean) * (gate[i] - mean); });
  const float deviation = static_cast<float>(std::sqrt(square / static_cast<double>(n)));
  const float least = static_cast<float>(mean) + deviation * layer.cutoff;
  for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] > least ? gate[i] - least : 0.0f;
}

// What the other streams of the scored nodes add to the answer.
void Decoder::end_streams(Work& w) {
  Task& task = w.task;
  Scratch& s = task.s;
  const int scored = static_cast<int>(task.scored.size());
  const int64_t hidden = round_up(model_.hidden, kLanes), others = (model_.streams - 1) * hidden;
  for (int64_t k = 1; k < model_.streams; ++k) {
    w.prepare(scored, s.x, hidden, [&](int64_t i) {
      const float* stream = stream_of(task, k, task.scored[static_cast<size_t>(i)] - task.nodes);
      std::copy(stream, stream + model_.hidden, s.x + i * hidden);
    });
    w.multiply(scored, s.x, hidden, {{s.others + (k - 1) * hidden, others, false}});
  }
}

// The mean of all streams of a node, which is row `row` of those scored.
void Decoder::merge_streams(Task& task, int64_t node, int64_t row) {
  const int64_t n = model_.hidden, hidden = round_up(n, kLanes);
  float* h = task.s.h + node * hidden;
  const float* first = stream_of(task, 0, node);
  const float target = std::sqrt(mean_square(first, n));
  std::copy(first, first + n, h);
  for (int64_t k = 1; k < model_.streams; ++k) {
    const float* from = task.s.others + (row * (model_.streams - 1) + k - 1) * hidden;
    const float by = std::sqrt(std::max(mean_square(from, n), 1e-5f));
    for (int64_t d = 0; d < n; ++d) h[d] += from[d] * target / by;
  }
  for (int64_t d = 0; d < n; ++d) h[d] /= static_cast<float>(model_.streams);
}

}  // namespace redwood
