// Checks recurrent layers: kernels against double precision and against the portable ones bit for bit,
// and a small random decoder with states: chains, trees, commits, forks and cuts equal plain decoding.
// Run by make, under sanitizers.
#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "bits.h"
#include "decoder.h"
#include "weights.h"

namespace {
using namespace check;

constexpr int64_t kVocab = 40, kStride = 48;
using Ints = std::vector<int32_t>;
using Logits = std::vector<float>;

void check_recur(const Kernels& k, const Kernels& right, int64_t dim, bool correct) {
  const std::vector<float> state = normals(dim * 16), key = normals(dim, 0.2f), query = normals(dim, 0.2f);
  const std::vector<float> value = normals(16);
  std::vector<float> to[2] = {std::vector<float>(state.size()), state}, out[2] = {std::vector<float>(16), std::vector<float>(16)};
  for (int i = 0; i < 2; ++i) {  // to another place; in place, by the portable ones
    const float* from = i ? to[1].data() : state.data();
    (i ? right : k).recur({from, to[i].data(), key.data(), value.data(), 0.9f, 0.3f, correct, dim, query.data(), out[i].data()});
  }
  const std::string what = std::string(k.name) + " recur " + std::to_string(dim);
  expect(same_bits(to[0].data(), to[1].data(), dim * 16), what + ": state");
  expect(same_bits(out[0].data(), out[1].data(), 16), what + ": answer");
  for (size_t j = 0; j < 16; ++j) {
    double known = 0, said = 0;
    const auto faded = [&](int64_t i) { return 0.9 * static_cast<double>(state[static_cast<size_t>(i) * 16 + j]); };
    for (int64_t i = 0; correct && i < dim; ++i) known += faded(i) * static_cast<double>(key[static_cast<size_t>(i)]);
    for (int64_t i = 0; i < dim; ++i) {
      said += (faded(i) + static_cast<double>(key[static_cast<size_t>(i)]) * 0.3 * (static_cast<double>(value[j]) - known)) *
              static_cast<double>(query[static_cast<size_t>(i)]);
    }
    expect(std::fabs(said - static_cast<double>(out[0][j])) < 1e-5, what + ": not what it is");
  }
  std::vector<float> quiet(state.size());
  k.recur({state.data(), quiet.data(), key.data(), value.data(), 0.9f, 0.3f, correct, dim, nullptr, nullptr});
  expect(same_bits(quiet.data(), to[0].data(), dim * 16), what + ": without a query");
}

void check_convolve(const Kernels& k, const Kernels& right, int64_t taps, int64_t channels) {
  const std::vector<float> weights = normals(taps * channels), x = normals(taps * channels), bias = normals(channels);
  std::vector<const float*> inputs;
  for (int64_t t = 0; t < taps; ++t) inputs.push_back(x.data() + t * channels);
  for (bool silu : {false, true}) {
    Logits out[2];
    for (int i = 0; i < 2; ++i) {
      out[i].resize(static_cast<size_t>(channels));
      (i ? right : k).convolve(inputs.data(), weights.data(), silu ? nullptr : bias.data(), taps, channels, silu, out[i].data());
    }
    expect(same_bits(out[0].data(), out[1].data(), channels), std::string(k.name) + ": convolve");
    for (size_t c = 0; c < out[0].size(); ++c) {
      double sum = silu ? 0.0 : static_cast<double>(bias[c]);
      for (size_t t = 0; t < inputs.size(); ++t) sum += static_cast<double>(inputs[t][c]) * static_cast<double>(weights[t * out[0].size() + c]);
      const double want = silu ? sum / (1 + std::exp(-sum)) : sum;
      expect(std::fabs(want - static_cast<double>(out[0][c])) < 1e-5, std::string(k.name) + ": convolve, not what it is");
    }
  }
  Logits gated[2] = {x, x};
  k.sigmoid(weights.data(), channels, gated[0].data());
  right.sigmoid(weights.data(), channels, gated[1].data());
  expect(same_bits(gated[0].data(), gated[1].data(), channels), std::string(k.name) + ": sigmoid");
}

// Two recurrent layers around one with attention; Mamba-2's have attention beside, and one has no MLP.
struct Made {
  std::vector<std::vector<uint8_t>> keep;
  Model model;

  Matrix matrix(int64_t rows, int64_t cols) {
    keep.push_back(packed("F32", file_rows("F32", rows, cols), rows, cols, Format::kF32));
    return {Format::kF32, keep.back().data(), rows, cols};
  }
  static Vector vector(int64_t size, float mean) {
    Vector v = normals(size, 0.1f);
    for (float& x : v) x += mean;
    return v;
  }

  explicit Made(Recurrent::Kind kind) {
    const bool delta = kind == Recurrent::kDelta, mamba = kind == Recurrent::kMamba;
    Model& m = model;
    m.hidden = 40, m.heads = 4, m.vocab = m.outputs = kVocab;
    m.attention_scale = 0.3f, m.half_cache = delta;
    m.ropes = {{normals(4), 1.0f, {}, {}}};
    Recurrence& s = m.recurrence;
    s.width = delta ? 4 : 3, s.every = 8, s.tiled = delta;
    if (delta || mamba) s.heads = 6, s.key_heads = 2, s.key_dim = 10, s.value_dim = 20;
    if (mamba) s.norm_first = false, s.gate_scale = 0.8f, s.time_scale = 1.1f, s.least_time = 0.1f, s.most_time = 2.0f;
    if (mamba) m.attention_out = 0.9f, m.state_out = 1.2f, m.mlp_out = 0.7f, m.mlp_gate = 1.3f, m.squared = true;
    s.channels = delta || mamba ? 2 * s.key_heads * s.key_dim + s.heads * s.value_dim : m.hidden;
    for (int i = 0; i < 3; ++i) {
      Layer l;
      l.kv_heads = 2, l.head_dim = l.value_dim = 12, l.source = i;
      l.attn_norm = vector(m.hidden, 1.0f), l.ffn_norm = vector(m.hidden, 1.0f);
      if (i == 1 || mamba) {
        l.q = matrix(48, m.hidden), l.k = matrix(24, m.hidden), l.v = matrix(24, m.hidden), l.o = matrix(m.hidden, 48);
        if (delta) l.o_gate = matrix(48, m.hidden);
      }
      if (i != 1) {
        Recurrent& r = l.recurrent;
        r.kind = kind;
        r.mix = matrix(delta || mamba ? s.channels : 3 * s.channels, m.hidden);
        r.conv = normals(s.width * s.channels, 0.5f);
        if (delta || mamba) {
          r.gate = matrix(s.heads * s.value_dim, m.hidden), r.alpha = matrix(s.heads, m.hidden);
          if (delta) r.beta = matrix(s.heads, m.hidden);
          r.dt_bias = normals(s.heads), r.decay = vector(s.heads, -1.0f);
          r.norm = vector(delta ? s.value_dim : s.heads * s.value_dim, 1.0f);
          if (mamba) r.skip = normals(s.heads), r.gate_bias = normals(s.heads * s.value_dim, 0.1f);
        } else {
          r.mix_bias = normals(3 * s.channels, 0.1f), r.conv_bias = normals(s.channels, 0.1f);
        }
        r.out = matrix(m.hidden, delta || mamba ? s.heads * s.value_dim : s.channels);
      }
      if (!mamba || i == 1) l.gate = matrix(64, m.hidden), l.up = matrix(64, m.hidden), l.down = matrix(m.hidden, 64);
      m.layers.push_back(l);
    }
    m.embed = matrix(kVocab, m.hidden), m.head = matrix(kVocab, m.hidden);
    m.output_norm = vector(m.hidden, 1.0f);
  }
};

Ints chain(int64_t count) {
  Ints parents(static_cast<size_t>(count));
  std::iota(parents.begin(), parents.end(), -1);
  return parents;
}

Logits extend(Decoder& decoder, Row& row, int64_t length, const Ints& parents, int64_t held, const Ints& tokens,
              int64_t wanted) {
  Logits out(static_cast<size_t>(wanted * kStride));
  decoder.extend({{&row, length, parents.data(), held, static_cast<int64_t>(parents.size()) - held,
                   tokens.data() + held, wanted}}, out.data(), kStride);
  return out;
}

// Logits after the last of these tokens, decoded one by one behind `length` tokens of the row.
Logits plain(Decoder& decoder, Row& row, int64_t length, const Ints& tokens) {
  Logits out;
  const int32_t first = 0;
  for (int32_t token : tokens) {
    out = extend(decoder, row, length, {-1}, 0, {token}, 1);
    decoder.keep(row, length++, &first, 1);
  }
  return out;
}

bool same(const Logits& got, size_t at, const Logits& want) {
  return same_bits(got.data() + at * kStride, want.data(), kVocab);
}

Ints some_tokens(int64_t count) {
  Ints tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) token = static_cast<int32_t>(chance()() % kVocab);
  return tokens;
}

// Gives a new row copies of another's pages and states, as from a file.
void restore(const Decoder& decoder, Row& made, const Row& from, const Ints& tokens) {
  std::vector<uint8_t> page(static_cast<size_t>(decoder.shape().page_bytes()));
  for (int64_t i = 0; i < from.slots() / kPage; ++i) {
    from.read_page(i, page.data());
    made.append_page(page.data());
  }
  const size_t floats = static_cast<size_t>(decoder.shape().states->state);
  std::map<int64_t, State> states;
  for (const auto& [at, state] : from.states.held()) {
    states[at] = State(new float[floats]);
    std::memcpy(states[at].get(), state.get(), floats * sizeof(float));
  }
  made.states.restore(tokens.data(), static_cast<int64_t>(tokens.size()), states);
}

const Ints kParents{-1, 0, 0, 1, -1, 2, 5, 3, 4, 6, 6, 9};

void check_rows(Decoder& decoder, Recurrent::Kind kind, int64_t length) {
  const std::string what = std::string(decoder.kernels().name) + " kind " + std::to_string(kind) + ", length " + std::to_string(length);
  const Ints prompt = some_tokens(length), nodes = some_tokens(12);
  std::vector<Logits> want;
  std::vector<Ints> paths;
  Row one(decoder.shape());
  const Logits last = plain(decoder, one, 0, prompt);
  for (size_t n = 0; n < kParents.size(); ++n) {
    paths.push_back(kParents[n] < 0 ? Ints{} : paths[static_cast<size_t>(kParents[n])]);
    paths.back().push_back(static_cast<int32_t>(n));
    Row branch(decoder.shape());
    branch.share(one, length);
    Ints text;
    for (int32_t i : paths[n]) text.push_back(nodes[static_cast<size_t>(i)]);
    want.push_back(plain(decoder, branch, length, text));
  }
  for (const int64_t wanted : {length, int64_t{1}}) {  // with records, and written ahead
    Row row(decoder.shape());
    const Logits got = extend(decoder, row, 0, chain(length), 0, prompt, wanted);
    expect(same(got, static_cast<size_t>(wanted) - 1, last), what + ": a prompt in one call");
    Ints all(static_cast<size_t>(length));
    std::iota(all.begin(), all.end(), 0);
    decoder.keep(row, 0, all.data(), length);
    for (size_t split : {size_t{12}, size_t{5}, size_t{1}}) {
      Row part(decoder.shape());
      if (split == 5) {
        restore(decoder, part, row, prompt);
      } else {
        part.share(row, length);
      }
      const Ints few(kParents.begin(), kParents.begin() + static_cast<int64_t>(split));
      Logits said = extend(decoder, part, length, few, 0, nodes, static_cast<int64_t>(split));
      if (split < kParents.size()) {
        const Logits rest = extend(decoder, part, length, kParents, static_cast<int64_t>(split), nodes,
                                   static_cast<int64_t>(kParents.size() - split));
        said.insert(said.end(), rest.begin(), rest.end());
      }
      for (size_t n = 0; n < kParents.size(); ++n) {
        expect(same(said, n, want[n]), what + ": node " + std::to_string(n) + " of a tree");
      }
      const Ints& path = paths.back();
      const int64_t kept = static_cast<int64_t>(path.size());
      decoder.keep(part, length, path.data(), kept);
      Row again(decoder.shape());
      again.share(one, length);
      Ints text;
      for (int32_t i : path) text.push_back(nodes[static_cast<size_t>(i)]);
      text.push_back(3);
      expect(same(extend(decoder, part, length + kept, {-1}, 0, {3}, 1), 0, plain(decoder, again, length, text)),
             what + ": after a commit");
      part.shrink(length - 2);  // states are computed anew
      Row cut(decoder.shape());
      Ints before(prompt.begin(), prompt.end() - 2);
      before.push_back(5);
      expect(same(extend(decoder, part, length - 2, {-1}, 0, {5}, 1), 0, plain(decoder, cut, 0, before)),
             what + ": after a cut");
    }
  }
}

}  // namespace

// Arguments: the instruction sets to check; none: all that are here.
int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  std::vector<std::string> names(argv + 1, argv + argc);
  if (names.empty()) names = {"amx", "avx512vnni", "avxvnni", "avx2", "i8mm", "neon", "portable"};
  const Kernels* right = choose_kernels("portable");
  for (const std::string& name : names) {
    const Kernels* k = choose_kernels(name.c_str());
    if (!k) continue;
    const int before = failures;
    for (int64_t dim : {1, 10, 128}) {
      for (bool correct : {true, false}) check_recur(*k, *right, dim, correct);
    }
    for (int64_t channels : {1, 8, 37}) check_convolve(*k, *right, 3, channels);
    for (auto kind : {Recurrent::kDelta, Recurrent::kShortConv, Recurrent::kMamba}) {
      chance().seed(5);
      Made made(kind);
      for (int threads : {1, 3}) {
        Decoder decoder(made.model, k, Pool::shared(threads, {}));
        const Ints lengths = threads == 1 ? Ints{7, 70} : Ints{20};
        for (const int64_t length : lengths) check_rows(decoder, kind, length);
      }
    }
    std::printf("recurrent layers, %s: %s\n", name.c_str(), failures == before ? "right" : "WRONG");
  }
  return failures ? 1 : 0;
}
