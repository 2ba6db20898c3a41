// What Mamba-2 (Dao and Gu 2024, arXiv 2405.21060) does otherwise than gated delta nets: a state takes in
// values times a step of time without correction, and says them in part as they are.
#include <algorithm>

#include "decoder_impl.h"
#include "elementary.h"

namespace redwood {

// How long a node's step is, and how its state fades meanwhile.
void Decoder::read_times(Task& task, const Recurrent& r, const Record& record, int64_t node) const {
  const Recurrence& m = model_.recurrence;
  const float* alpha = task.s.alpha + node * round_up(m.heads, kLanes);
  for (int64_t h = 0; h < m.heads; ++h) {
    const float a = alpha[h] * m.time_scale + r.dt_bias[static_cast<size_t>(h)];
    float time = a > 20.0f ? a : static_cast<float>(log_of(1.0 + exp_of(a)));  // softplus, as PyTorch has it
    time = time < m.least_time ? m.least_time : time > m.most_time ? m.most_time : time;
    record.decays[h] = static_cast<float>(exp_of(static_cast<double>(r.decay[static_cast<size_t>(h)]) * time));
    record.betas[h] = time;
  }
}

// What the convolution made of a node: values, keys and queries.
void Decoder::split_mamba(Task& task, const RecurrentShape& shape, const Record& record, int64_t node) const {
  const Recurrence& m = model_.recurrence;
  const float* mix = task.s.mix + node * round_up(m.channels, kLanes);
  for (int64_t h = 0; h < m.heads; ++h, mix += m.value_dim) {
    float* value = record.values + h * shape.value_dim;
    std::fill(std::copy_n(mix, m.value_dim, value), value + shape.value_dim, 0.0f);
  }
  std::copy_n(mix, shape.keys(), record.keys);
  std::copy_n(mix + shape.keys(), shape.keys(), task.s.recurrent_q + node * round_up(shape.keys(), kLanes));
}

// What the layer says of a node: the state's answer and a part of the value, gated and normed in groups.
void Decoder::say_mamba(Task& task, const Recurrent& r, const RecurrentShape& shape, const Record& record,
                        int64_t node) const {
  const Recurrence& m = model_.recurrence;
  Scratch& s = task.s;
  const int64_t width = m.heads * m.value_dim, stride = round_up(width, kLanes), group = width / m.key_heads;
  float *mixed = s.mixed + node * stride, *gate = s.out_gate + node * stride;
  for (int64_t h = 0; h < m.heads; ++h) {
    const float *said = s.recurred + node * shape.values() + h * shape.value_dim,
                *value = record.values + h * shape.value_dim;
    const float skip = r.skip[static_cast<size_t>(h)];
    for (int64_t d = 0; d < m.value_dim; ++d) mixed[h * m.value_dim + d] = said[d] + skip * value[d];
  }
  if (m.gate_scale != 1.0f) {
    for (int64_t i = 0; i < width; ++i) gate[i] *= m.gate_scale;
  }
  if (!r.gate_bias.empty()) kernels_->add(gate, r.gate_bias.data(), width);
  if (!m.norm_first) kernels_->gate(gate, mixed, width, false, mixed);
  for (int64_t g = 0; g < m.key_heads && !r.norm.empty(); ++g) {
    kernels_->rms_norm(mixed + g * group, r.norm.data() + g * group, group, model_.eps, mixed + g * group);
  }
  if (m.norm_first) kernels_->gate(gate, mixed, width, false, mixed);
  if (model_.state_out != 1.0f) {
    for (int64_t i = 0; i < width; ++i) mixed[i] *= model_.state_out;
  }
}

}  // namespace redwood
