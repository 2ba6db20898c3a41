// What the parts of the decoder share.
#pragma once
#include <atomic>
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

// Matrices that share one input: lists of blocks, of which each thread begins with a part of its own.
struct Decoder::Product {
  std::vector<const Matrix*> matrices;
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

struct Decoder::Scratch {
  std::vector<WeightStream> streams;  // per thread
  std::vector<float> stores[9];
  Quantised inputs[2];  // of products in turn: one's are made while those of the one before are read
  std::vector<std::vector<float>> scores, outs, queries;  // per thread
  float *h, *x, *q, *k, *v, *mixed, *gate, *up, *y;
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

}  // namespace redwood
