// Checks a small random decoder: logits of chains, trees, batches and committed rows equal those of
// plain decoding, one token at a time, bit for bit. Run by make, under sanitizers.
#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "bits.h"
#include "decoder.h"
#include "weights.h"

namespace {
using namespace check;

constexpr int64_t kVocab = 50, kStride = 64, kFfn = 300;

// A model with every part a model may have, of weights in several formats.
struct Made {
  std::vector<std::vector<uint8_t>> keep;
  Model model;

  Matrix matrix(const std::string& kind, Format f, int64_t rows, int64_t cols) {
    keep.push_back(packed(kind, file_rows(kind, rows, cols), rows, cols, f));
    return {f, keep.back().data(), rows, cols};
  }
  static Vector vector(int64_t size, float mean, float spread) {
    Vector v = normals(size, spread);
    for (float& x : v) x += mean;
    return v;
  }

  explicit Made(bool half_cache, bool mixture = false) {
    Model& m = model;
    m.hidden = 256, m.heads = 6, m.vocab = m.outputs = kVocab;
    m.half_cache = half_cache, m.gelu = !half_cache;
    m.attention_scale = 0.2f, m.embedding_scale = 3.0f;
    m.attention_softcap = half_cache ? 0.0f : 30.0f, m.logit_softcap = half_cache ? 0.0f : 20.0f;
    const int64_t kv_heads = 2, dim = 24, heads = m.heads * dim, kv = kv_heads * dim;
    m.ropes = {{normals(dim / 2), 1.0f, {}, {}}, {normals(dim / 4), 0.5f, {}, {}}};
    for (int i = 0; i < 3; ++i) {
      Layer l;
      l.kv_heads = kv_heads, l.head_dim = l.value_dim = dim, l.source = i;
      l.window = i == 1 ? 20 : 0, l.rope = i == 1 ? 1 : 0;
      l.q = matrix("Q4_K", Format::kK4, heads, m.hidden);
      l.k = matrix(i ? "Q8_0" : "Q5_K", i ? Format::kA8 : Format::kK5, kv, m.hidden);
      l.v = matrix("Q6_K", Format::kK6, kv, m.hidden);
      l.o = matrix("F32", i ? Format::kF16 : Format::kA4, m.hidden, heads);
      l.gate = matrix("Q4_0", Format::kA4, kFfn, m.hidden);
      l.up = matrix("Q5_1", Format::kA5M, kFfn, m.hidden);
      l.down = matrix("F32", i ? Format::kA8 : Format::kBF16, m.hidden, kFfn);
      l.attn_norm = vector(m.hidden, 1.0f, 0.1f), l.ffn_norm = vector(m.hidden, 1.0f, 0.1f);
      if (i == 1) l.q_bias = normals(heads), l.k_bias = normals(kv), l.v_bias = normals(kv);
      if (i == 2) l.q_norm = vector(dim, 1, 0.1f), l.k_norm = vector(dim, 1, 0.1f);
      if (i == 2) l.post_attn_norm = l.post_ffn_norm = vector(m.hidden, 1.0f, 0.1f);
      m.layers.push_back(l);
    }
    m.embed = matrix("Q5_0", Format::kA5, kVocab, m.hidden);
    m.head = matrix("F32", Format::kF32, kVocab, m.hidden);
    m.output_norm = vector(m.hidden, 1.0f, 0.1f);
    if (mixture) mix();
  }

  // Layers with experts, one of them with a shared one; sinks, biases, and a layer without positions.
  void mix() {
    Model& m = model;
    Routing& r = m.routing;
    r.experts = 6, r.used = 2, r.ffn = 40;
    if (m.half_cache) {
      m.glu_limit = 1.5f, m.glu_alpha = 1.7f;
      m.layers[0].sinks = normals(m.heads);
    } else {
      r.sigmoid = r.normalise = r.two_best = true, r.groups = 3, r.groups_used = 2, r.scale = 1.5f;
    }
    m.layers[0].rope = -1;
    constexpr int64_t ffn = 48;  // in whole blocks
    for (size_t i : {1, 2}) {
      Layer& l = m.layers[i];
      Experts& e = l.experts;
      e.router = matrix("F32", Format::kF32, r.experts, m.hidden);
      e.gate = matrix("Q4_K", Format::kK4, r.experts * ffn, m.hidden);
      e.up = matrix(i == 1 ? "Q8_0" : "F16", i == 1 ? Format::kA8 : Format::kF16, r.experts * ffn, m.hidden);
      e.down = matrix("F32", i == 1 ? Format::kA8 : Format::kF32, r.experts * m.hidden, r.ffn);
      if (i == 1) {
        e.shared_switch = matrix("F32", Format::kF32, 1, m.hidden);
        e.choice_bias = normals(r.experts);
        l.gate_bias = l.up_bias = {};
      } else {
        l.gate = l.up = l.down = {};
        e.router_bias = normals(r.experts);
        e.gate_bias = normals(r.experts * r.ffn), e.up_bias = normals(r.experts * r.ffn);
        e.down_bias = normals(r.experts * m.hidden);
      }
    }
  }
};

using Ints = std::vector<int32_t>;
using Logits = std::vector<float>;

Ints chain(int64_t count) {
  Ints parents(static_cast<size_t>(count));
  std::iota(parents.begin(), parents.end(), -1);
  return parents;
}

Append some(Row& row, int64_t length, const Ints& parents, int64_t held, const Ints& tokens,
            int64_t num_logits) {
  return {&row, length, parents.data(), held, static_cast<int64_t>(parents.size()) - held,
          tokens.data() + held, num_logits};
}

Logits extend(Decoder& decoder, const std::vector<Append>& rows) {
  int64_t answers = 0;
  for (const Append& a : rows) answers += a.num_logits;
  Logits out(static_cast<size_t>(answers * kStride));
  decoder.extend(rows, out.data(), kStride);
  return out;
}

// Logits after every token, decoded one by one behind `length` tokens of the row.
Logits plain(Decoder& decoder, Row& row, int64_t length, const Ints& tokens) {
  Logits out;
  const Ints root{-1};
  for (int32_t token : tokens) {
    const Ints one{token};
    const Logits next = extend(decoder, {some(row, length++, root, 0, one, 1)});
    out.insert(out.end(), next.begin(), next.end());
  }
  return out;
}

bool same(const Logits& got, size_t at, const Logits& want, size_t from, size_t count = 1) {
  for (size_t i = 0; i < count; ++i) {
    const float *a = got.data() + (at + i) * kStride, *b = want.data() + (from + i) * kStride;
    if (!same_bits(a, b, kVocab)) return false;
  }
  return true;
}

const Ints kParents{-1, 0, 0, 1, -1, 2, 5, 3, 4, 6, 6, 9};

// A text with a tree behind it, and what plain decoding says of it.
struct Case {
  Ints prompt, nodes, next;            // tokens; next: after the path of the last node
  std::vector<Ints> paths;             // of every node, its own index last
  Logits prompt_logits, after_logits;  // of every token of the prompt and of next
  std::vector<Logits> want;            // of every token of the path

  Case(Decoder& decoder, size_t length) {
    const auto token = [] { return static_cast<int32_t>(chance()() % kVocab); };
    for (size_t i = 0; i < length; ++i) prompt.push_back(token());
    for (int i = 0; i < 3; ++i) next.push_back(token());
    Row row(decoder.shape());
    prompt_logits = plain(decoder, row, 0, prompt);
    const int64_t end = static_cast<int64_t>(length);
    for (size_t n = 0; n < kParents.size(); ++n) {
      nodes.push_back(token());
      const int32_t p = kParents[n];
      paths.push_back(p < 0 ? Ints{} : paths[static_cast<size_t>(p)]);
      paths.back().push_back(static_cast<int32_t>(n));
      Ints text;
      for (int32_t i : paths[n]) text.push_back(nodes[static_cast<size_t>(i)]);
      want.push_back(plain(decoder, row, end, text));  // in the place of the last node's path
    }
    after_logits = plain(decoder, row, end + static_cast<int64_t>(paths.back().size()), next);
  }
};

void check_rows(Decoder& decoder, const Case& c, const std::string& what) {
  const int64_t length = static_cast<int64_t>(c.prompt.size());
  const int64_t count = static_cast<int64_t>(kParents.size());
  Row row(decoder.shape()), other(decoder.shape());
  const Logits prompt = extend(decoder, {some(row, 0, chain(length), 0, c.prompt, length)});
  expect(same(prompt, 0, c.prompt_logits, 0, c.prompt.size()), what + ": a prompt in one call");

  // The tree in two parts, beside the prompt of another row.
  const Ints few(kParents.begin(), kParents.begin() + 5);
  const Logits first = extend(decoder, {some(row, length, few, 0, c.nodes, 5)});
  const Logits second = extend(decoder, {some(other, 0, chain(length), 0, c.prompt, 2),
                                         some(row, length, kParents, 5, c.nodes, count - 5)});
  expect(same(second, 0, c.prompt_logits, c.prompt.size() - 2, 2), what + ": a row beside a tree");
  for (size_t n = 0; n < kParents.size(); ++n) {
    const Logits& got = n < 5 ? first : second;
    const size_t at = n < 5 ? n : n - 5 + 2;
    expect(same(got, at, c.want[n], c.paths[n].size() - 1),
           what + ": node " + std::to_string(n) + " of a tree");
  }

  // The deepest path is kept, and the text goes on from it.
  const Ints& path = c.paths.back();
  for (size_t i = 0; i < path.size(); ++i) {
    if (path[i] != static_cast<int32_t>(i)) row.move(length + path[i], length + static_cast<int64_t>(i));
  }
  const int64_t kept = length + static_cast<int64_t>(path.size());
  row.shrink(kept);
  const Logits after = extend(decoder, {some(row, kept, chain(3), 0, c.next, 3)});
  expect(same(after, 0, c.after_logits, 0, 3), what + ": after a commit");
}

void check_decoder(const Kernels* kernels, bool half_cache, bool mixture) {
  Made made(half_cache, mixture);
  Decoder alone(made.model, kernels, Pool::shared(1, {})), team(made.model, kernels, Pool::shared(3, {}));
  const std::string what = std::string(kernels->name) + (half_cache ? " fp16" : " float32") + (mixture ? ", experts" : "");
  // Lengths before the window is full, and after it with a tree across the end of a page (64 slots).
  for (size_t length : {3, 60}) {
    const Case c(alone, length);
    const std::string at = what + ", length " + std::to_string(length);
    expect(std::none_of(c.prompt_logits.begin(), c.prompt_logits.end(),
                        [](float x) { return std::isnan(x); }), at + ": NaN");
    check_rows(alone, c, at + ", 1 thread");
    check_rows(team, c, at + ", 3 threads");
  }
}

// More nodes than one pass takes (256), all in one call.
void check_long(const Kernels* kernels, int threads) {
  Made made(true);
  Decoder decoder(made.model, kernels, Pool::shared(threads, {}));
  Ints prompt;
  for (int i = 0; i < 300; ++i) prompt.push_back(i * 7 % kVocab);
  Row row(decoder.shape()), parts(decoder.shape());
  const Logits whole = extend(decoder, {some(row, 0, chain(300), 0, prompt, 1)});
  Logits got;
  for (int64_t at = 0; at < 300; at += 100) {
    const Ints part(prompt.begin() + at, prompt.begin() + at + 100);
    got = extend(decoder, {some(parts, at, chain(100), 0, part, 1)});
  }
  expect(same(whole, 0, got, 0), std::string(kernels->name) + ": a long prompt in parts");
}

// Logits of a whole model are the same on every processor: digests of one with keys and values in
// fp16, and of one with float32.
void check_bits(const Kernels* kernels) {
  constexpr uint64_t want[] = {0x3c0a956e8b6560c6u, 0xb8e95dd3a59b63a5u};
  for (bool half_cache : {true, false}) {
    chance().seed(17);
    Made made(half_cache);
    Decoder decoder(made.model, kernels, Pool::shared(1, {}));
    Ints prompt;
    for (int i = 0; i < 30; ++i) prompt.push_back(i * 11 % kVocab);
    Row row(decoder.shape());
    const Logits got = extend(decoder, {some(row, 0, chain(30), 0, prompt, 30)});
    Hash hash;
    for (size_t i = 0; i < got.size(); ++i) {
      if (i % kStride < kVocab) hash.add(got[i]);
    }
    const unsigned long long value = hash.value;
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", value);
    expect(value == want[half_cache ? 0 : 1],
           std::string(kernels->name) + ": other logits than elsewhere, " + text);
  }
}

// Rotary angles beyond those that are computed exactly are refused, before anything is kept.
void check_angles(const Kernels* kernels) {
  Made made(true);
  made.model.ropes[0].inv_freq[0] = 1e5f;
  Decoder decoder(made.model, kernels, Pool::shared(1, {}));
  Row row(decoder.shape());
  bool refused = false;
  try {
    extend(decoder, {some(row, 0, chain(1), 0, {1}, 1)});
  } catch (const std::length_error&) {
    refused = true;
  }
  expect(refused, std::string(kernels->name) + ": angles without end");
}

// Two models on one pool, called from two threads.
void check_sharing(const Kernels* kernels) {
  Made made(true);
  Decoder one(made.model, kernels, Pool::shared(3, {})), two(made.model, kernels, Pool::shared(3, {}));
  const Ints prompt{1, 2, 3, 4, 5, 6, 7, 8, 9};
  Logits got[2];
  Row rows[2] = {Row(one.shape()), Row(two.shape())};
  std::thread beside([&] { got[1] = plain(two, rows[1], 0, prompt); });
  got[0] = plain(one, rows[0], 0, prompt);
  beside.join();
  expect(same(got[0], 0, got[1], 0, prompt.size()), "two models on one pool");
}

}  // namespace

// Arguments: the instruction sets to check; none: the best here, and the logits of all others.
int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // lines come as they are said, in a file too
  std::vector<std::string> names(argv + 1, argv + argc);
  if (names.empty()) {
    names = {"auto"};
    for (const char* name : {"amx", "avx512vnni", "avxvnni", "avx2", "i8mm", "neon", "portable",
                           "amx-emulated"}) {
      if (const Kernels* k = choose_kernels(name)) check_bits(k);
    }
  }
  for (const std::string& name : names) {
    const Kernels* k = choose_kernels(name.c_str());
    if (!k) continue;
    const int before = check::failures;
    for (bool half_cache : {true, false}) {
      for (bool mixture : {false, true}) check_decoder(k, half_cache, mixture);
    }
    check_long(k, 3);
    check_sharing(k);
    check_bits(k);
    check_angles(k);
    std::printf("decoder on %-10s %s\n", k->name, check::failures == before ? "ok" : "FAILED");
  }
  return check::failures ? 1 : 0;
}
