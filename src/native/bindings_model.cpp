// From the dictionaries that Python gives to a model: every size is checked here.
#include "bindings_model.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "elementary.h"
#include "pack.h"

namespace redwood {
namespace {

// What multiplies parts of Mamba-2's first projection, and its input.
struct Scales {
  float input, gate, value, key, query, time;
};

// Takes multipliers into what follows the projection. W (ax) + b = a (W x + b / a): all of it is a product
// without bias, times a scale.
void scale_mamba(const Recurrence& size, const Scales& scales, const Vector& time_bias, Recurrent& r) {
  const int64_t values = size.heads * size.value_dim, keys = size.key_heads * size.key_dim;
  for (int64_t c = 0; c < size.channels; ++c) {
    const float part = c < values ? scales.value : c < values + keys ? scales.key : scales.query;
    for (int64_t t = 0; t < size.width; ++t) r.conv[static_cast<size_t>(t * size.channels + c)] *= part * scales.input;
  }
  for (float& bias : r.mix_bias) bias /= scales.input;
  for (float& bias : r.gate_bias) bias *= scales.gate;
  for (size_t h = 0; h < time_bias.size(); ++h) r.dt_bias[h] += scales.time * time_bias[h];
}

// A recurrent layer: `matrix` and `vector` find its weights by role.
template <class Matrices, class Vectors>
Recurrent make_recurrent(const Model& m, Recurrent::Kind kind, bool log_decay, const Scales& scales, Matrices matrix,
                         Vectors vector) {
  const Recurrence& size = m.recurrence;
  Recurrent r;
  r.kind = kind;
  const int64_t values = size.heads * size.value_dim;
  const int64_t mix = kind == Recurrent::kShortConv ? 3 * size.channels : size.channels;
  r.out = matrix("state_o", m.hidden, kind == Recurrent::kShortConv ? size.channels : values);
  r.out_bias = vector("state_o_bias", m.hidden, false);
  r.mix = matrix("mix", mix, m.hidden);
  r.mix_bias = vector("mix_bias", mix, false);
  const Vector conv = vector("conv", size.channels * size.width, true);  // [channels, width]
  r.conv.resize(conv.size());
  for (int64_t c = 0; c < size.channels; ++c) {
    for (int64_t t = 0; t < size.width; ++t) {
      r.conv[static_cast<size_t>(t * size.channels + c)] = conv[static_cast<size_t>(c * size.width + t)];
    }
  }
  r.conv_bias = vector("conv_bias", size.channels, false);
  if (kind == Recurrent::kShortConv) return r;
  r.gate = matrix("out_gate", values, m.hidden), r.alpha = matrix("alpha", size.heads, m.hidden);
  r.dt_bias = vector("dt_bias", size.heads, true), r.decay = vector("decay", size.heads, true);
  if (kind == Recurrent::kDelta) {
    r.beta = matrix("beta", size.heads, m.hidden);
    r.norm = vector("state_norm", size.value_dim, true);
  } else {
    r.norm = vector("state_norm", values, false), r.skip = vector("skip", size.heads, true);
    r.gate_bias = vector("out_gate_bias", values, false);
    scale_mamba(size, scales, vector("alpha_bias", size.heads, false), r);
  }
  for (float& decay : r.decay) {
    if (log_decay) decay = static_cast<float>(-exp_of(decay));
    require(decay <= 0.0f, "a recurrent layer whose state grows");
  }
  return r;
}

using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

}  // namespace

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

Format format_of(const std::string& name) {
  const Format f = find_format(name);
  require(f != Format::kCount, "unknown format " + name);
  return f;
}

Model make_model(nb::dict config, nb::dict matrices, nb::dict vectors, std::vector<Bytes>& keep) {
  Model m;
  auto number = [&](const char* key) { return nb::cast<int64_t>(config[key]); };
  auto real = [&](const char* key) { return nb::cast<float>(config[key]); };
  m.hidden = number("hidden"), m.heads = number("heads"), m.vocab = number("vocab_size");
  m.outputs = number("outputs"), m.latent = number("latent"), m.query_latent = number("query_latent");
  m.ple = number("ple"), m.streams = number("streams"), m.active = number("active_stream");
  const auto size = [](int64_t n) {
    require(n > 0 && n < (1 << 24), "a size of the model is out of range");
    return n;
  };
  for (int64_t n : {m.hidden, m.heads, m.vocab, m.outputs}) size(n);
  for (int64_t n : {m.latent, m.query_latent}) require(n >= 0 && n < (1 << 24), "a width of latents out of range");
  require(m.latent || !m.query_latent, "latents of queries alone");
  require(m.outputs <= m.vocab, "more outputs than tokens");
  require(m.ple >= 0 && m.ple < (1 << 24), "a width of per-layer embeddings out of range");
  require(m.streams >= 0 && m.streams <= kMostStreams && m.streams != 1 && m.active >= 0 &&
              m.active < std::max<int64_t>(1, m.streams) && (m.ple || !m.streams), "streams out of range");
  m.eps = real("norm_eps"), m.attention_scale = real("attention_scale");
  m.attention_softcap = real("attention_softcap"), m.logit_softcap = real("logit_softcap");
  m.embedding_scale = real("embedding_scale"), m.latent_eps = real("latent_eps");
  m.attention_out = real("attention_out"), m.state_out = real("state_out");
  m.mlp_out = real("mlp_out"), m.mlp_gate = real("mlp_gate");
  m.glu_limit = real("glu_limit"), m.glu_alpha = real("glu_alpha");
  const auto flag = [&](const char* key) { return nb::cast<bool>(config[key]); };
  m.gelu = flag("gelu"), m.squared = flag("squared"), m.half_cache = flag("half_cache");
  m.layer_norm = flag("layer_norm"), m.parallel = flag("parallel");
  const auto windows = nb::cast<std::vector<int64_t>>(config["windows"]);
  const auto rope_of = nb::cast<std::vector<int>>(config["rope_of_layer"]);
  const auto widths = nb::cast<std::vector<int64_t>>(config["ffns"]);
  const auto counts = [&](const char* key) { return nb::cast<std::vector<int64_t>>(config[key]); };
  const auto kv_heads = counts("kv_heads"), head_dims = counts("head_dims"), value_dims = counts("value_dims"),
             sources = counts("sources");
  const auto cutoffs = nb::cast<std::vector<float>>(config["cutoffs"]);
  for (auto& [freqs, factor] :
       nb::cast<std::vector<std::tuple<std::vector<float>, float>>>(config["ropes"])) {
    m.ropes.push_back({freqs, factor, {}, {}});
  }
  for (size_t count : {rope_of.size(), widths.size(), kv_heads.size(), head_dims.size(), value_dims.size(),
                       sources.size(), cutoffs.size()}) {
    require(!windows.empty() && windows.size() == count, "layers without window, rope, heads or width");
  }
  Routing& r = m.routing;
  r.experts = number("experts");
  if (r.experts) {
    r.used = size(number("experts_used")), r.ffn = size(number("expert_ffn"));
    r.sigmoid = flag("expert_sigmoid"), r.normalise = flag("expert_normalise");
    r.two_best = flag("expert_two_best"), r.scale = real("expert_scale");
    r.groups = size(number("expert_groups")), r.groups_used = size(number("expert_groups_used"));
    require(r.experts <= kMostExperts, "too many experts");
    require(r.groups_used <= r.groups && r.experts % r.groups == 0 &&
                r.used <= r.experts / r.groups * r.groups_used,
            "experts that cannot be chosen");
  }

  const auto kinds = nb::cast<std::vector<std::string>>(config["recurrent"]);  // of the layers; "": none
  const auto attends = nb::cast<std::vector<bool>>(config["attention"]);
  require(kinds.size() == windows.size() && attends.size() == windows.size(), "layers without a kind");
  Scales scales{1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
  if (std::any_of(kinds.begin(), kinds.end(), [](const std::string& kind) { return !kind.empty(); })) {
    Recurrence& s = m.recurrence;
    s.width = size(number("conv_width")), s.channels = size(number("conv_channels"));
    s.heads = number("state_heads"), s.key_heads = number("state_key_heads");
    s.key_dim = number("state_key_dim"), s.value_dim = number("state_value_dim");
    s.tiled = flag("state_tiled"), s.every = number("checkpoint_tokens");
    s.norm_first = flag("state_norm_first");
    s.least_time = real("least_time"), s.most_time = real("most_time");
    scales = {real("state_input"), real("state_gate"), real("state_value"),
              real("state_key"), real("state_query"), real("state_time")};
    s.gate_scale = scales.input * scales.gate, s.time_scale = scales.input * scales.time;
    require(scales.input != 0.0f, "a recurrent layer without input");
    require(0.0f <= s.least_time && s.least_time <= s.most_time, "limits of time that leave none");
    require(s.width <= kMostWidth, "a convolution that is too wide");
    require(s.every >= 0, "a negative distance of checkpoints");
    if (s.heads) {
      for (int64_t n : {s.heads, s.key_heads, s.key_dim, s.value_dim}) size(n);
      require(s.heads % s.key_heads == 0, "heads of states are no multiple of their key heads");
      require(s.channels == 2 * s.key_heads * s.key_dim + s.heads * s.value_dim, "channels that fit no heads");
    }
  }
  const bool log_decay = flag("log_decay");

  auto matrix = [&](const std::string& name, int64_t rows, int64_t cols, bool needed = true) {
    if (!needed && !matrices.contains(name.c_str())) return Matrix{};
    require(matrices.contains(name.c_str()), "no weights " + name);
    const auto [format, data] = nb::cast<std::tuple<std::string, Bytes>>(matrices[name.c_str()]);
    const Format f = format_of(format);
    require(static_cast<int64_t>(data.size()) == packed_bytes(f, rows, cols),
            "weights " + name + " have the wrong size");
    keep.push_back(data);
    return Matrix{f, data.data(), rows, cols};
  };
  auto vector = [&](const std::string& name, std::initializer_list<int64_t> sizes, bool needed = false) {
    if (!vectors.contains(name.c_str())) {
      require(!needed, "no weights " + name);
      return Vector{};
    }
    const auto data = nb::cast<Floats>(vectors[name.c_str()]);
    require(std::any_of(sizes.begin(), sizes.end(),
                        [&](int64_t n) { return static_cast<int64_t>(data.size()) == n; }),
            "weights " + name + " have the wrong size");
    return Vector(data.data(), data.data() + data.size());
  };
  for (size_t i = 0; i < windows.size(); ++i) {
    Layer l;
    l.window = windows[i], l.rope = rope_of[i];
    l.kv_heads = size(kv_heads[i]), l.head_dim = size(head_dims[i]), l.value_dim = size(value_dims[i]);
    l.cutoff = cutoffs[i], l.value_norm = flag("value_norm");
    require(l.window >= 0, "a negative window");
    require(l.rope >= -1 && l.rope < static_cast<int>(m.ropes.size()), "a rope that is not there");
    require(l.rope < 0 || static_cast<int64_t>(m.ropes[static_cast<size_t>(l.rope)].inv_freq.size()) * 2 <= l.head_dim,
            "rotary wider than a head");
    require(l.value_dim <= l.head_dim, "values wider than keys");
    require(m.heads % l.kv_heads == 0, "heads are no multiple of kv_heads");
    const bool own = sources[i] == static_cast<int64_t>(i);
    require(sources[i] >= 0 && (own || sources[i] < static_cast<int64_t>(i)), "keys and values of a later layer");
    l.source = static_cast<int>(sources[i]);
    if (!own) {
      const Layer& from = m.layers[static_cast<size_t>(l.source)];
      require(attends[static_cast<size_t>(l.source)] && from.source == l.source && from.kv_heads == l.kv_heads &&
                  from.head_dim == l.head_dim && from.value_dim == l.value_dim, "keys and values of another size than these heads");
    }
    const int64_t heads = m.heads * l.head_dim, kv = l.kv_heads * l.head_dim, values = l.kv_heads * l.value_dim;
    const std::string at = std::to_string(i) + ".";
    if (!kinds[i].empty()) {
      const auto kind = kinds[i] == "delta" ? Recurrent::kDelta
                        : kinds[i] == "mamba" ? Recurrent::kMamba : Recurrent::kShortConv;
      require(kind != Recurrent::kShortConv || kinds[i] == "short_conv",
              "a recurrent layer of unknown kind " + kinds[i]);
      require((kind != Recurrent::kShortConv) == (m.recurrence.heads > 0), "recurrent layers of several kinds");
      l.recurrent = make_recurrent(
          m, kind, log_decay, scales,
          [&](const char* role, int64_t rows, int64_t cols) { return matrix(at + role, rows, cols); },
          [&](const char* role, int64_t count, bool needed) { return vector(at + role, {count}, needed); });
    }
    if (attends[i]) {
      l.q = matrix(at + "q", heads, m.query_latent ? m.query_latent : m.hidden);
      l.o = matrix(at + "o", m.hidden, m.heads * l.value_dim);
      l.o_gate = matrix(at + "o_gate", heads, m.hidden, false);
      require(!l.o_gate.data || (!m.latent && l.value_dim == l.head_dim), "gates of another size than values");
    }
    if (m.latent && attends[i]) {
      require(own && l.rope >= 0 && m.heads == l.kv_heads, "latents want positions, and keys of every head");
      const int64_t turning = 2 * static_cast<int64_t>(m.ropes[static_cast<size_t>(l.rope)].inv_freq.size());
      require(turning < l.head_dim, "keys that turn as a whole");
      l.kv_a = matrix(at + "kv_a", m.latent + turning, m.hidden);
      l.k_b = matrix(at + "k_b", m.heads * (l.head_dim - turning), m.latent);
      l.v_b = matrix(at + "v_b", values, m.latent);
      l.kv_a_norm = vector(at + "kv_a_norm", {m.latent}, true);
      if (m.query_latent) {
        l.q_a = matrix(at + "q_a", m.query_latent, m.hidden);
        l.q_a_norm = vector(at + "q_a_norm", {m.query_latent}, true);
      }
    } else if (attends[i] && own) {
      l.k = matrix(at + "k", kv, m.hidden);
      l.v = matrix(at + "v", values, m.hidden, l.value_dim != l.head_dim || !flag("values_are_keys"));
    }
    if (const int64_t ffn = widths[i]; ffn != 0) {
      l.up = matrix(at + "up", size(ffn), m.hidden), l.down = matrix(at + "down", m.hidden, ffn);
      l.gate = matrix(at + "gate", ffn, m.hidden, false);
      l.gate_bias = vector(at + "gate_bias", {ffn}), l.up_bias = vector(at + "up_bias", {ffn});
      l.down_bias = vector(at + "down_bias", {m.hidden});
      require(l.gate.data || m.glu_limit == 0.0f, "a limit without gate");
      require(std::isinf(l.cutoff) || (l.gate.data && l.gate_bias.empty() && l.up_bias.empty()),
              "a cutoff without gate");
    }
    if (matrices.contains((at + "router").c_str())) {
      require(r.experts > 0, "a router without experts");
      const int64_t ffn = round_up(r.ffn, kLanes), hidden = round_up(m.hidden, kLanes);
      Experts& e = l.experts;
      e.router = matrix(at + "router", r.experts, m.hidden);
      e.gate = matrix(at + "expert_gate", r.experts * ffn, m.hidden, false);
      e.up = matrix(at + "expert_up", r.experts * ffn, m.hidden);
      e.down = matrix(at + "expert_down", r.experts * hidden, r.ffn);
      e.shared_switch = matrix(at + "shared_switch", 1, m.hidden, false);
      e.router_bias = vector(at + "router_bias", {r.experts});
      e.choice_bias = vector(at + "choice_bias", {r.experts});
      e.gate_bias = vector(at + "expert_gate_bias", {r.experts * r.ffn});
      e.up_bias = vector(at + "expert_up_bias", {r.experts * r.ffn});
      e.down_bias = vector(at + "expert_down_bias", {r.experts * m.hidden});
      e.scale = vector(at + "expert_scale", {r.experts});
      e.norm = vector(at + "expert_norm", {m.hidden});
      e.router_norm = vector(at + "router_norm", {m.hidden}, e.beside());
      e.post_norm = vector(at + "expert_post_norm", {m.hidden}, e.beside());
      e.dense_post_norm = vector(at + "dense_post_norm", {m.hidden}, e.beside());
      require(!e.beside() || (l.up.data && !m.parallel), "experts beside no dense MLP");
      require(l.gate_bias.empty() && l.up_bias.empty() && l.down_bias.empty(), "a shared expert with biases");
    }
    require(l.experts || widths[i] || l.recurrent.kind || attends[i], "an empty layer");
    require(!m.latent || !l.recurrent.kind || !attends[i], "latents beside a recurrent layer");
    require(!(m.parallel || m.ple) || l.experts || widths[i], "a layer without MLP");
    l.attn_norm = vector(at + "attn_norm", {m.hidden});
    l.attn_norm_bias = vector(at + "attn_norm_bias", {m.hidden});
    l.ffn_norm = vector(at + "ffn_norm", {m.hidden});
    l.ffn_norm_bias = vector(at + "ffn_norm_bias", {m.hidden});
    l.q_bias = vector(at + "q_bias", {heads}), l.k_bias = vector(at + "k_bias", {kv});
    l.v_bias = vector(at + "v_bias", {values}), l.o_bias = vector(at + "o_bias", {m.hidden});
    l.q_norm = vector(at + "q_norm", {l.head_dim, heads});
    l.k_norm = vector(at + "k_norm", {l.head_dim, kv});
    const bool whole = static_cast<int64_t>(l.q_norm.size()) == heads && heads != l.head_dim;
    require(own ? l.q_norm.empty() == l.k_norm.empty() &&
                      (whole ? static_cast<int64_t>(l.k_norm.size()) == kv : l.q_norm.size() == l.k_norm.size())
                : l.k_norm.empty() && !whole,
            "norms of queries and keys that do not go together");
    l.sinks = vector(at + "sinks", {m.heads});
    require(l.sinks.empty() || m.attention_softcap == 0.0f, "sinks under a soft cap");
    l.post_attn_norm = vector(at + "post_attn_norm", {m.hidden});
    l.post_ffn_norm = vector(at + "post_ffn_norm", {m.hidden});
    if (const Vector scale = vector(at + "layer_scale", {1}); !scale.empty()) l.scale = scale[0];
    require(l.scale == 1.0f || (!l.post_ffn_norm.empty() && !m.streams), "a scale of a layer without norms");
    if (m.ple) {
      l.ple_gate = matrix(at + "ple_gate", m.ple, m.hidden), l.ple_proj = matrix(at + "ple_proj", m.hidden, m.ple);
      l.ple_norm = vector(at + "ple_post_norm", {m.hidden}, true);
    }
    if (m.streams) {
      const int64_t n = m.streams, rank = size(number("laurel_rank"));
      l.laurel_left = matrix(at + "laurel_left", rank, m.hidden);
      l.laurel_right = matrix(at + "laurel_right", m.hidden, rank);
      l.laurel_norm = vector(at + "laurel_norm", {m.hidden}, true);
      l.altup = {vector(at + "altup_router_norm", {m.hidden}, true), vector(at + "altup_router", {n * m.hidden}, true),
                 vector(at + "altup_predict", {n * n * n}, true), vector(at + "altup_correct", {n * n}, true),
                 vector(at + "altup_scale", {m.hidden})};
      require(!m.latent && !m.parallel && !l.experts && !l.recurrent.kind && !l.attn_norm.empty(),
              "streams with parts of other models");
    }
    m.layers.push_back(std::move(l));
  }
  m.embed = matrix("embed", m.vocab, m.hidden);
  m.head = matrix("output", m.outputs, m.hidden);
  m.output_norm = vector("output_norm", {m.hidden}, true);
  m.output_norm_bias = vector("output_norm_bias", {m.hidden});
  if (m.ple) {
    const int64_t all = static_cast<int64_t>(m.layers.size()) * m.ple;
    m.ple_embed = matrix("ple_embed", size(number("ple_vocab")), size(all));
    m.ple_model = matrix("ple_model", all, m.hidden);
    m.ple_norm = vector("ple_norm", {m.ple}, true);
  }
  if (m.streams) {
    const int64_t rows = round_up(m.hidden, kLanes), others = m.streams - 1;
    m.altup_proj = matrix("altup_proj", others * rows, m.hidden);
    const Matrix all = matrix("altup_unembed", others * rows, m.hidden);
    for (int64_t i = 0; i < others; ++i) {
      const int64_t bytes = packed_bytes(all.format, rows, m.hidden);
      m.altup_unembed.push_back({all.format, all.data + i * bytes, m.hidden, m.hidden});
    }
  }
  return m;
}

}  // namespace redwood
