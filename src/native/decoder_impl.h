// What the parts of the decoder share.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <vector>

#include "decoder.h"

namespace redwood {

constexpr int kNodes = 256;    // of one pass; longer prompts take several
constexpr int64_t kTaken = 96 << 10;  // bytes of weights of a portion, about
constexpr int64_t kIdleBytes = 512;  // of weights, fetched at each look at a barrier
constexpr int64_t kLong = 512;  // slots behind which attention outweighs a barrier
constexpr int kTile = 24;      // queries of one task of the attention, about

struct Decoder::Node {
  const Append* from;
  int64_t slot, position, logits;  // logits: its row of the answer, -1: none
  // Its path is the first `run` provisional nodes, in order, and then those of `tail`, itself last.
  int64_t run, tail;  // tail: where its own part begins in the list of all tails
  int32_t token;
};

// A step of a tree's recurrence: the state of slot `from`, -1 being that before the tree, after a node
// goes to slot `to`. `task`: the node in the pass; -1: it was there before.
struct Decoder::Move {
  int32_t node, task, from, to;
};

// Nodes [first, last) of a pass, of one row.
struct Decoder::Span {
  const Append* from;
  int first, last;
  std::vector<Move> moves = {};  // but for chains whose states are written ahead
  int slots = 0;                 // that they take
};

// What quantises rows of input, and for which formats.
struct Decoder::Input {
  int buffer = 0;
  int64_t cols = 0;
  bool group = false, super = false;

  void serve(const Matrix& matrix) {
    cols = matrix.cols;
    group |= is_group(matrix.format);
    super |= is_super(matrix.format);
  }
};

// Matrices that share one input: lists of blocks, of which each thread begins with a part of its own.
struct Decoder::Product {
  std::vector<const Matrix*> matrices;
  Input input;
  // Side by side: a part is the same outputs of each matrix, and whole units of `align` blocks, so that
  // who has them can make the next product's input of them. Else the lists are read one after another.
  bool side_by_side = false;
  int64_t align = 2;           // blocks; kernels take two together
  int64_t most = 0;            // blocks that a thread takes at once, so that what it fetches comes soon
  std::vector<int64_t> cuts = {};   // of blocks, [threads + 1]
  std::vector<int64_t> start = {};  // where the part of each thread begins in the stream of its weights
};

// Rows of input of a product, in 8 bits.
struct Quantised {
  std::vector<int8_t> quant_store[2];
  std::vector<float> scale_store[3];
  std::vector<int32_t> sum_store;
  std::vector<int16_t> sum16_store, sum32_store;
  int8_t *group_quants, *super_quants;
  float *group_scales, *offsets, *super_scales;
  int32_t* sums;
  int16_t *sums16, *sums32;
};

// Rows by expert: a row of slots is a node's part in one of its experts.
struct Decoder::Groups {
  std::vector<int32_t> active;  // experts that have rows
  std::vector<int32_t> first;   // [active + 1]: their first slots
  std::vector<int32_t> nodes;   // of each slot
  std::vector<int32_t> slots;   // [nodes, used]
  std::vector<int32_t> counts;  // [experts]
};

// One norm for the queries of all heads, and one for the keys.
inline bool norms_all_heads(const Layer& layer, int64_t head_dim) {
  return static_cast<int64_t>(layer.q_norm.size()) > head_dim;
}

// Keeps the last `taps` inputs of those in `tail` and the ones behind them.
template <class Input>
void move_tail(float* tail, int64_t taps, int64_t channels, int64_t count, Input input) {
  const int64_t stay = std::max<int64_t>(0, taps - count);
  std::memmove(tail, tail + (taps - stay) * channels, static_cast<size_t>(stay * channels) * sizeof(float));
  for (int64_t t = stay; t < taps; ++t) {
    std::copy_n(input(count - taps + t), channels, tail + t * channels);
  }
}

struct Decoder::Scratch {
  std::vector<WeightStream> streams;  // per thread
  std::vector<float> stores[23];
  // 0: the normed residual; 1: what attention and MLP made of it; 2: what the experts did.
  Quantised inputs[3];
  std::vector<std::vector<float>> scores, outs, queries, choices, looked_up;  // per thread
  std::vector<Quantised> gathered;      // per thread: rows of one expert
  std::vector<std::vector<float>> rows;  // per thread: the same as floats
  std::vector<Groups> groups;           // per thread, all alike
  std::vector<int32_t> chosen;          // [nodes, used]: experts of a node, in order
  std::vector<float> shares;            // [nodes, used]: their weights
  float *h, *x, *q, *k, *v, *mixed, *gate, *up, *y;
  float *latents, *expanded;  // of keys and values; the parts of keys that do not turn
  float* asked;               // latents of queries
  // [nodes, layers * ple]; [streams, nodes, hidden]; [nodes, rank]; [nodes, hidden]; [nodes, others * hidden]
  float *ple, *residuals, *low, *laurel, *others;
  float* o_gate;
  // Of recurrent layers: products, records of chains whose states are written ahead, queries, answers.
  float *mix, *out_gate, *alpha, *beta, *led, *recurrent_q, *recurred;
  std::vector<float> recurrent_stores[8];
  std::vector<std::vector<float>> slots;  // per thread: states within a tree
  float *router, *shared_switch, *shared, *expert_gate, *expert_up, *expert_y;
};

// One pass through the model: its nodes, and counters that hand out the work of each phase.
struct Decoder::Task {
  const Node* nodes;
  int count;
  std::vector<const Node*> scored;
  float* logits;
  int64_t stride;
  Scratch& s;
  Pool& pool;
  std::vector<std::atomic<int64_t>> counters;
  uint64_t inputs = 0;  // the number of the first product's
  int64_t slots = 0;    // of the longest row
  std::vector<Span> spans = {};  // where there are recurrent layers

  // Cuts items between the threads; each takes its own, a quarter of them or `most` at a time and in
  // order, and then what others have left: then all wait. Every thread calls this with the same
  // arguments. `cut(t)`: where the part of a thread begins. `body` gets a first and a last item, and
  // whether they are its own.
  template <class Cut, class Body>
  void share(int& phase, int thread, int64_t align, int64_t most, Cut cut, Body body) {
    const int threads = pool.size();
    auto* taken = &counters[static_cast<size_t>(phase)];
    phase += threads;
    for (int k = 0; k < threads; ++k) {
      const int whose = (thread + k) % threads;
      const int64_t first = cut(whose), count = cut(whose + 1) - first;
      const int64_t some = portion(count, align, most);
      for (int64_t i; (i = taken[whose].fetch_add(some, std::memory_order_relaxed)) < count;) {
        body(first + i, first + std::min(count, i + some), k == 0);
      }
    }
    // Weights come while a thread waits.
    WeightStream& stream = s.streams[static_cast<size_t>(thread)];
    pool.barrier([&] {
      const auto run = stream.next(kIdleBytes);
      for (const uint8_t* at = run.at; at < run.end; at += 64) __builtin_prefetch(at, 0, 2);
    });
  }
  static int64_t portion(int64_t count, int64_t align, int64_t most) {
    return std::max(align, round_up(std::min((count + 3) / 4, most), align));
  }

  // `body` gets each item once.
  template <class Body>
  void each(int& phase, int thread, int64_t items, Body body) {
    const int threads = pool.size();
    share(phase, thread, 1, items, [&](int t) { return items * t / threads; },
          [&](int64_t first, int64_t last, bool) {
            for (int64_t i = first; i < last; ++i) body(i);
          });
  }
};

// What one thread does of a pass. Every thread makes the same calls.
struct Decoder::Work {
  struct Out {
    float* at;
    int64_t stride;
    bool add;
  };

  Decoder& decoder;
  Task& task;
  const int thread;
  WeightStream& stream = task.s.streams[static_cast<size_t>(thread)];
  int64_t read = 0;  // the end of what is read of the stream
  int phase = 0;
  size_t product = 0;

  template <class Body>
  void each(int64_t items, Body body) {
    task.each(phase, thread, items, body);
  }

  const Input& input() const { return decoder.products_[product].input; }

  // Rows of input of the next product. `make` writes one of them to x.
  template <class Make>
  void prepare(int rows, const float* x, int64_t stride, Make make) {
    stream.reach(decoder.products_[product].start[static_cast<size_t>(thread)], read);
    each(rows, [&](int64_t i) {
      make(i);
      decoder.quantise(task, input(), x, stride, i, 0, std::numeric_limits<int64_t>::max());
    });
  }

  // What a thread knows that it will read: `used` bytes of it so far, up to `end`.
  struct Ahead {
    WeightStream& stream;
    int64_t used, end;
  };

  // A product of packed weights; of its block `from` to block `to`. `own`: where these stand in what
  // the thread reads, or none.
  void blocks(const Matrix& matrix, const Quantised& in, const float* x, int64_t x_stride, int rows,
              uint64_t inputs, const Out& out, int64_t from, int64_t to, Ahead* own) {
    const Format f = matrix.format;
    const int64_t w = round_up(matrix.cols, info(f).step);
    const bool g = is_group(f);
    Matmul mm{matrix.data, block_bytes(f, matrix.cols), w, rows, {}, out.at, out.stride, out.add};
    mm.x = {is_float(f) ? x_stride : w, x, g ? in.group_quants : in.super_quants,
            g ? in.group_scales : in.super_scales, in.offsets, in.sums, in.sums16, in.sums32};
    mm.inputs = inputs;
    if (own) {
      own->used += (to - from) * mm.block_bytes;
      own->stream.reach(own->used, own->end);
      mm.ahead = &own->stream;
      mm.ahead_bytes = std::min(own->stream.wanted(), 2 * (to - from) * mm.block_bytes);
    }
    decoder.kernels_->matmul[static_cast<int>(f)](mm, from, to);
  }

  // The next product. `after` is called with outputs [first, last) of it, when they are done.
  template <class After>
  void multiply(int rows, const float* x, int64_t x_stride, const Out* outs, After after) {
    const uint64_t inputs = task.inputs + product;
    const Product& p = decoder.products_[product++];
    const Quantised& in = task.s.inputs[p.input.buffer];
    Ahead ahead{stream, p.start[static_cast<size_t>(thread)], read};
    const auto cut = [&](int t) { return p.cuts[static_cast<size_t>(t)]; };
    task.share(phase, thread, p.align, p.most, cut, [&](int64_t first, int64_t last, bool own) {
      parts(p, first, last, [&](size_t i, int64_t from, int64_t to) {
        blocks(*p.matrices[i], in, x, x_stride, rows, inputs, outs[i], from, to, own ? &ahead : nullptr);
      });
      after(first * kLanes, round_up(last, p.align) * kLanes);
    });
  }
  void multiply(int rows, const float* x, int64_t x_stride, std::initializer_list<Out> outs) {
    multiply(rows, x, x_stride, outs.begin(), [](int64_t, int64_t) {});
  }
};

// The blocks of each matrix in blocks [first, last) of a product.
template <class Body>
void Decoder::parts(const Product& p, int64_t first, int64_t last, Body body) {
  for (size_t i = 0; i < p.matrices.size(); ++i) {
    const int64_t here = round_up(p.matrices[i]->rows, kLanes) / kLanes;
    const int64_t from = std::max<int64_t>(0, first), to = std::min(here, last);
    if (from < to) body(i, from, to);
    if (!p.side_by_side) first -= here, last -= here;
  }
}

}  // namespace redwood
