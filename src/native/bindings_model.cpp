// From the dictionaries that Python gives to a model: every size is checked here.
#include "bindings_model.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
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
  m.hidden = number("hidden"), m.heads = number("heads"), m.kv_heads = number("kv_heads");
  m.head_dim = number("head_dim"), m.vocab = number("vocab_size");
  m.outputs = number("outputs");
  m.value_dim = number("value_dim"), m.latent = number("latent");
  const auto size = [](int64_t n) {
    require(n > 0 && n < (1 << 24), "a size of the model is out of range");
    return n;
  };
  for (int64_t n : {m.hidden, m.heads, m.kv_heads, m.head_dim, m.value_dim, m.vocab, m.outputs}) size(n);
  require(m.latent >= 0 && m.latent < (1 << 24), "a width of latents out of range");
  require(m.value_dim <= m.head_dim, "values wider than keys");
  require(m.outputs <= m.vocab, "more outputs than tokens");
  require(m.heads % m.kv_heads == 0, "heads are no multiple of kv_heads");
  m.eps = real("norm_eps"), m.attention_scale = real("attention_scale");
  m.attention_softcap = real("attention_softcap"), m.logit_softcap = real("logit_softcap");
  m.embedding_scale = real("embedding_scale");
  m.attention_out = real("attention_out"), m.state_out = real("state_out");
  m.mlp_out = real("mlp_out"), m.mlp_gate = real("mlp_gate");
  m.glu_limit = real("glu_limit"), m.glu_alpha = real("glu_alpha");
  const auto flag = [&](const char* key) { return nb::cast<bool>(config[key]); };
  m.gelu = flag("gelu"), m.squared = flag("squared"), m.half_cache = flag("half_cache");
  m.layer_norm = flag("layer_norm"), m.parallel = flag("parallel");
  const auto windows = nb::cast<std::vector<int64_t>>(config["windows"]);
  const auto rope_of = nb::cast<std::vector<int>>(config["rope_of_layer"]);
  const auto widths = nb::cast<std::vector<int64_t>>(config["ffns"]);
  for (auto& [freqs, factor] :
       nb::cast<std::vector<std::tuple<std::vector<float>, float>>>(config["ropes"])) {
    require(static_cast<int64_t>(freqs.size()) * 2 <= m.head_dim, "rotary wider than a head");
    m.ropes.push_back({freqs, factor, {}, {}});
  }
  require(!windows.empty() && windows.size() == rope_of.size() && windows.size() == widths.size(),
          "layers without window, rope or width");
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
  const int64_t heads = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
  const int64_t values = m.kv_heads * m.value_dim;
  for (size_t i = 0; i < windows.size(); ++i) {
    Layer l;
    l.window = windows[i], l.rope = rope_of[i];
    require(l.window >= 0, "a negative window");
    require(l.rope >= -1 && l.rope < static_cast<int>(m.ropes.size()), "a rope that is not there");
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
      l.q = matrix(at + "q", heads, m.hidden), l.o = matrix(at + "o", m.hidden, m.heads * m.value_dim);
      l.o_gate = matrix(at + "o_gate", heads, m.hidden, false);
    }
    if (m.latent && attends[i]) {
      require(l.rope >= 0 && m.heads == m.kv_heads, "latents want positions, and keys of every head");
      const int64_t turning = 2 * static_cast<int64_t>(m.ropes[static_cast<size_t>(l.rope)].inv_freq.size());
      l.kv_a = matrix(at + "kv_a", m.latent + turning, m.hidden);
      l.kv_b = matrix(at + "kv_b", m.heads * (m.head_dim - turning + m.value_dim), m.latent);
      l.kv_a_norm = vector(at + "kv_a_norm", {m.latent}, true);
    } else if (attends[i]) {
      l.k = matrix(at + "k", kv, m.hidden), l.v = matrix(at + "v", values, m.hidden);
    }
    if (const int64_t ffn = widths[i]; ffn != 0) {
      l.up = matrix(at + "up", size(ffn), m.hidden), l.down = matrix(at + "down", m.hidden, ffn);
      l.gate = matrix(at + "gate", ffn, m.hidden, false);
      l.gate_bias = vector(at + "gate_bias", {ffn}), l.up_bias = vector(at + "up_bias", {ffn});
      l.down_bias = vector(at + "down_bias", {m.hidden});
      require(l.gate.data || m.glu_limit == 0.0f, "a limit without gate");
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
      require(l.gate_bias.empty() && l.up_bias.empty() && l.down_bias.empty(), "a shared expert with biases");
    }
    require(l.experts || widths[i] || l.recurrent.kind || attends[i], "an empty layer");
    require(!m.latent || !l.recurrent.kind || !attends[i], "latents beside a recurrent layer");
    require(!m.parallel || l.experts || widths[i], "a layer without MLP");
    l.attn_norm = vector(at + "attn_norm", {m.hidden});
    l.attn_norm_bias = vector(at + "attn_norm_bias", {m.hidden});
    l.ffn_norm = vector(at + "ffn_norm", {m.hidden});
    l.ffn_norm_bias = vector(at + "ffn_norm_bias", {m.hidden});
    l.q_bias = vector(at + "q_bias", {heads}), l.k_bias = vector(at + "k_bias", {kv});
    l.v_bias = vector(at + "v_bias", {values}), l.o_bias = vector(at + "o_bias", {m.hidden});
    l.q_norm = vector(at + "q_norm", {m.head_dim, heads});
    l.k_norm = vector(at + "k_norm", {m.head_dim, kv});
    require(l.q_norm.empty() == l.k_norm.empty() &&
                (l.q_norm.size() == l.k_norm.size() ||
                 static_cast<int64_t>(l.q_norm.size()) == heads) &&
                (static_cast<int64_t>(l.q_norm.size()) != heads || heads == m.head_dim ||
                 static_cast<int64_t>(l.k_norm.size()) == kv),
            "norms of queries and keys that do not go together");
    l.sinks = vector(at + "sinks", {m.heads});
    require(l.sinks.empty() || m.attention_softcap == 0.0f, "sinks under a soft cap");
    l.post_attn_norm = vector(at + "post_attn_norm", {m.hidden});
    l.post_ffn_norm = vector(at + "post_ffn_norm", {m.hidden});
    m.layers.push_back(std::move(l));
  }
  m.embed = matrix("embed", m.vocab, m.hidden);
  m.head = matrix("output", m.outputs, m.hidden);
  m.output_norm = vector("output_norm", {m.hidden}, true);
  m.output_norm_bias = vector("output_norm_bias", {m.hidden});
  return m;
}

}  // namespace redwood
