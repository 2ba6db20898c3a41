// What the parts of the decoder share.
#pragma once
#include <atomic>
#include <vector>

#include "decoder.h"

namespace redwood {

constexpr int kNodes = 256;    // of one pass; longer prompts take several
constexpr int kTile = 24;      // queries of one task of the attention, about

struct Decoder::Node {
  const Append* from;
  int64_t slot, position, logits;  // logits: its row of the answer, -1: none
  // Its path is the first `run` provisional nodes, in order, and then those of `tail`, itself last.
  int64_t run, tail;  // tail: where its own part begins in the list of all tails
  int32_t token;
};

struct Decoder::Scratch {
  std::vector<float> stores[11];
  std::vector<int8_t> quant_store[2];
  std::vector<int32_t> sum_store;
  std::vector<int16_t> sum16_store, sum32_store;
  std::vector<std::vector<float>> scores, outs;  // per thread
  float *h, *x, *q, *k, *v, *mixed, *gate, *up, *y, *group_scales, *offsets;
  std::vector<float> super_store;
  float* super_scales;
  int8_t *group_quants, *super_quants;
  int32_t* sums;
  int16_t *sums16, *sums32;
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

  // Every thread calls this with the same arguments; `body` gets each item once. All wait at the end.
  template <class Body>
  void each(int& phase, int64_t items, Body body) {
    auto& next = counters[static_cast<size_t>(phase++)];
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(i);
    pool.barrier();
  }
};

}  // namespace redwood
