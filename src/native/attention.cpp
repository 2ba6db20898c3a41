#include <algorithm>
#include <limits>

#include "decoder_impl.h"

namespace redwood {

// Biases, norms and rotation of one head of one node; its keys and values go to their slot.
void Decoder::place(Task& task, const Layer& layer, int index, int64_t node, int64_t which) {
  const int64_t heads = model_.heads;
  const int64_t kind = which < heads ? 0 : which < heads + layer.kv_heads ? 1 : 2;
  const int64_t dim = kind == 2 ? layer.value_dim : layer.head_dim;
  const int64_t head = kind == 0 ? which : (which - heads) % layer.kv_heads;
  const int64_t width = round_up((kind == 0 ? heads : layer.kv_heads) * dim, kLanes);
  float* x = (kind == 0 ? task.s.q : kind == 1 ? task.s.k : task.s.v) + node * width + head * dim;
  const Vector& bias = kind == 0 ? layer.q_bias : kind == 1 ? layer.k_bias : layer.v_bias;
  const bool done = kind < 2 && norms_all_heads(layer, dim);  // before this
  if (!bias.empty() && !done) kernels_->add(x, bias.data() + head * dim, dim);
  if (kind == 1 && layer.values_are_keys()) {  // as they are now
    std::copy(x, x + dim, task.s.v + node * width + head * dim);
    place(task, layer, index, node, which + layer.kv_heads);
  }
  const Node& n = task.nodes[node];
  const Vector& norm = kind == 0 ? layer.q_norm : layer.k_norm;
  if (kind < 2 && !norm.empty() && !done) kernels_->rms_norm(x, norm.data(), dim, model_.eps, x);
  if (kind == 2 && layer.value_norm) kernels_->rms_norm(x, ones_.data(), dim, model_.eps, x);
  if (kind < 2 && layer.rope >= 0) {
    const Rope& rope = model_.ropes[static_cast<size_t>(layer.rope)];
    const int64_t half = static_cast<int64_t>(rope.inv_freq.size());
    kernels_->rotate(x, rope.cos.data() + n.position * half, rope.sin.data() + n.position * half,
                     half);
  }
  if (kind == 0 || n.from->stored) return;
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

// Fetches what stands in another place of memory than what is worked on, so that no prefetcher knows.
static void fetch(const uint8_t* at, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + b, 0, 2);
}

// Attention of a few nodes of one row, for the query heads that share one key-value head. Scores are
// put in order of position, prefix and path alike, and summed in that order.
void Decoder::attend(Task& task, const Layer& layer, int index, int64_t head, int first, int end,
                     int thread) {
  const CacheLayer& cached = shape_.layer(index);
  const int64_t dim = layer.head_dim, group = model_.heads / layer.kv_heads;
  const int64_t q_width = round_up(model_.heads * dim, kLanes), value_dim = cached.value_dim;
  const int64_t out_width = round_up(model_.heads * layer.value_dim, kLanes);
  const size_t cast = model_.half_cache ? 0 : 1;
  auto &scores = task.s.scores[static_cast<size_t>(thread)],
       &outs = task.s.outs[static_cast<size_t>(thread)],
       &queries = task.s.queries[static_cast<size_t>(thread)];

  const int64_t sink = layer.sinks.empty() ? 0 : 1;  // a score behind those of the keys
  for (int from = first, to; from < end; from = to) {
    // Nodes of one row at a time.
    const Append* append = task.nodes[from].from;
    for (to = from + 1; to < end && task.nodes[to].from == append;) ++to;
    const Row& row = *append->row;
    const int64_t slots = task.nodes[to - 1].slot + 1, stride = round_up(slots + sink, kLanes);
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
      const auto place_of = [&](int i, int64_t width, int64_t size) {  // of a query, or its answer
        return (from + i / heads) * width + (head * group + g + i % heads) * size;
      };
      for (int i = 0; i < n; ++i) {
        const float* query = task.s.q + place_of(i, q_width, dim);
        for (int64_t d = 0; d < dim; ++d) queries[static_cast<size_t>(d * kTile + i)] = query[d];
      }
      for (int64_t s = start; s < slots;) {  // page by page
        const int64_t some = std::min(slots, (s / kPage + 1) * kPage) - s;
        if (s + some < slots) fetch(row.keys(index, head, s + some), cached.key_bytes());
        kernels_->dot_keys[cast](queries.data(), kTile, n, row.keys(index, head, s),
                                 round_up(some, kLanes) / kLanes, dim, scores.data() + s, stride);
        s += some;
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
        if (sink) {  // `softmax` will scale it
          const float score = layer.sinks[static_cast<size_t>(head * group + g + i % heads)];
          row_scores[node.position + 1] = score / model_.attention_scale;
        }
        const int64_t length = round_up(node.position + 1 + sink, kLanes) - start;
        totals[i] = kernels_->softmax(row_scores + start, length, model_.attention_scale,
                                      model_.attention_softcap);
      }
      for (int64_t s = start; s < common;) {
        const int64_t some = std::min(common, (s / kPage + 1) * kPage) - s;
        if (s + some < common) {
          fetch(row.values(index, head, s + some), cached.head_bytes() - cached.key_bytes());
        }
        kernels_->add_values[cast](scores.data() + s, stride, n, row.values(index, head, s), some,
                                   value_dim, outs.data());
        s += some;
      }
      for (int i = 0; i < n; ++i) {
        const Node& node = task.nodes[from + i / heads];
        for (int64_t p = std::max(common, start); p <= node.position; ++p) {
          const int64_t own = append->length + node.run;
          const int64_t slot =
              p < own ? p : append->length + tails_[static_cast<size_t>(node.tail + p - own)];
          kernels_->add_values[cast](scores.data() + i * stride + p, stride, 1,
                                     row.values(index, head, slot), 1, value_dim,
                                     outs.data() + i * value_dim);
        }
        float* out = task.s.mixed + place_of(i, out_width, layer.value_dim);
        const float by = 1.0f / totals[i], *sum = outs.data() + i * value_dim;
        for (int64_t d = 0; d < layer.value_dim; ++d) out[d] = sum[d] * by;
      }
    }
  }
}

}  // namespace redwood
