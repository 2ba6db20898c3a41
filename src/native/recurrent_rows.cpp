// States of rows before, in and after a pass.
#include <cmath>
#include <cstring>
#include <numeric>

#include "decoder_impl.h"

namespace redwood {

// Chains from the first number of tokens on, of whose logits one is wanted at most, are texts that are
// read, and so are all from the second on: trees are smaller.
constexpr int64_t kLead = 16, kLongText = 128;

void Decoder::shape_states() {
  const Recurrence& m = model_.recurrence;
  auto made = std::make_shared<StatesShape>();
  bool any = false;
  for (const Layer& l : model_.layers) {
    RecurrentShape r;
    if (l.recurrent.kind) {
      any = true;
      r.taps = m.width - 1, r.channels = m.channels;
      if (l.recurrent.kind != Recurrent::kShortConv) {
        r.corrects = l.recurrent.kind == Recurrent::kDelta;
        r.heads = m.heads, r.key_heads = m.key_heads, r.key_dim = m.key_dim;
        r.value_dim = round_up(m.value_dim, kLanes);
      }
      r.state_at = made->state, r.record_at = made->record;
      made->state += round_up(r.tail() + r.matrices(), kLanes);
      made->record += round_up(r.record(), kLanes);
    }
    made->layers.push_back(r);
  }
  if (!any) return;
  made->every = m.every;
  made->zero = State(new float[static_cast<size_t>(made->state)]());
  shape_.states = made;
  const double root = std::sqrt(static_cast<double>(std::max<int64_t>(1, m.key_dim)));
  key_unit_.assign(static_cast<size_t>(m.key_dim), static_cast<float>(1.0 / root));
  query_unit_.assign(static_cast<size_t>(m.key_dim), static_cast<float>(1.0 / (root * root)));
}

static std::vector<int32_t> chain_of(int64_t count) {
  std::vector<int32_t> parents(static_cast<size_t>(count));
  std::iota(parents.begin(), parents.end(), -1);
  return parents;
}

// Makes a row's states ready for new nodes.
void Decoder::begin(Append& a) {
  States& states = a.row->states;
  states.start(a.length, a.held);
  if (states.at < states.length) catch_up(*a.row);
  const int64_t total = a.held + a.count;
  bool chain = a.held == 0 && (a.count > kLongText || (a.count >= kLead && a.num_logits <= 1)), joins = true;
  for (int64_t i = a.held; i < total; ++i) {
    chain &= a.parents[i] == i - 1;
    joins &= a.parents[i] >= states.led - 1;
  }
  if (chain) states.lead();
  if (!chain && states.led && (!joins || states.led > a.held)) {
    const int64_t count = states.unlead();
    const std::vector<int32_t> parents = chain_of(count);
    const std::vector<int32_t> tokens(states.tokens.begin() + a.length, states.tokens.begin() + a.length + count);
    Append again{a.row, a.length, parents.data(), 0, count, tokens.data(), 0};
    again.stored = true;
    run({again}, nullptr, 0);
  }
  a.leads = chain;
  states.append(a.tokens, a.count, chain);
}

// Computes the states of committed tokens that a row has without states.
void Decoder::catch_up(Row& row) {
  States& states = row.states;
  const int64_t count = states.length - states.at;
  const std::vector<int32_t> parents = chain_of(count);
  const std::vector<int32_t> tokens(states.tokens.begin() + states.at, states.tokens.begin() + states.length);
  Append again{&row, states.at, parents.data(), 0, count, tokens.data(), 0};
  again.leads = again.stored = true;
  states.lead();
  run({again}, nullptr, 0);
  states.adopt();
  states.at = states.length;
}

void Decoder::prepare_span(Span& span, const Node* nodes) {
  States& states = span.from->row->states;
  if (span.from->leads) {
    states.writable(states.ahead);
    return;
  }
  plan_moves(span, nodes);
  int64_t most = 0;
  for (const RecurrentShape& r : shape_.states->layers) most = std::max(most, r.key_dim);
  for (auto& slots : scratch_->slots) {
    const size_t wanted = static_cast<size_t>(span.slots * most * kLanes);
    if (slots.size() < wanted) slots.resize(wanted);
  }
}

void Decoder::end_span(const Span& span) {
  if (!span.from->leads) return;
  States& states = span.from->row->states;
  states.led += span.last - span.first;
  const int64_t length = span.from->length + states.led;
  if (states.next_checkpoint(length - 1) == length) states.coming[length] = states.ahead;
}

// An order of the new nodes and of those that they stand on: each after its parent, and few states
// at a time.
void Decoder::plan_moves(Span& span, const Node* nodes) const {
  const Append& a = *span.from;
  const int32_t led = static_cast<int32_t>(a.row->states.led);
  const int32_t total = static_cast<int32_t>(nodes[span.last - 1].slot - a.length) + 1;
  constexpr int32_t kIdle = -2, kOld = -1;
  std::vector<int32_t> task(static_cast<size_t>(total), kIdle), children(static_cast<size_t>(total), 0),
      slot(static_cast<size_t>(total), -1), pending, spare;
  for (int i = span.first; i < span.last; ++i) task[static_cast<size_t>(nodes[i].slot - a.length)] = i;
  for (int32_t i = total - 1; i >= led; --i) {
    const int32_t parent = a.parents[i];
    if (task[static_cast<size_t>(i)] == kIdle || parent < led) continue;
    ++children[static_cast<size_t>(parent)];
    if (task[static_cast<size_t>(parent)] == kIdle) task[static_cast<size_t>(parent)] = kOld;
  }
  std::vector<std::vector<int32_t>> below(static_cast<size_t>(total));
  for (int32_t i = total - 1; i >= led; --i) {
    if (task[static_cast<size_t>(i)] == kIdle) continue;
    if (a.parents[i] < led) {
      pending.push_back(i);
    } else {
      below[static_cast<size_t>(a.parents[i])].push_back(i);
    }
  }
  while (!pending.empty()) {
    const int32_t node = pending.back(), parent = a.parents[node];
    pending.pop_back();
    const size_t at = static_cast<size_t>(node);
    const int32_t from = parent < led ? -1 : slot[static_cast<size_t>(parent)];
    int32_t to = from;
    if (parent < led || --children[static_cast<size_t>(parent)] > 0) {
      if (spare.empty()) spare.push_back(span.slots++);
      to = spare.back();
      spare.pop_back();
    }
    slot[at] = to;
    span.moves.push_back({node, task[at], from, to});
    if (below[at].empty()) spare.push_back(to);
    pending.insert(pending.end(), below[at].begin(), below[at].end());
  }
}

void Decoder::keep(Row& row, int64_t length, const int32_t* nodes, int64_t count) {
  bool owned = false;
  for (int64_t i = 0; i < count; ++i) {
    if (nodes[i] == i) continue;
    if (!owned) row.own(length + i);  // it may have been forked since they were written
    owned = true;
    row.move(length + nodes[i], length + i);
  }
  if (!row.states) return;
  std::lock_guard<std::mutex> one(one_);
  States& states = row.states;
  int64_t done = 0;
  if (states.led && states.led <= count) {
    done = states.led;
    states.adopt();
    states.at = length + done;
  } else if (states.led || states.at < length) {
    done = count;  // their states are computed before the next nodes
  }
  while (done < count) {
    const int64_t end = std::min(count, done + states.next_checkpoint(states.at) - states.at);
    fold(states, nodes + done, end - done);
    states.at += end - done;
    states.checkpoint();
    done = end;
  }
  states.commit(nodes, count);
}

// Takes nodes with records into the state behind the committed tokens, as a pass would.
void Decoder::fold(States& states, const int32_t* nodes, int64_t count) {
  struct Part {
    const RecurrentShape* shape;
    int64_t item;  // -1: the tail
  };
  float* state = states.writable(states.base);
  std::vector<Part> parts;
  for (const RecurrentShape& r : shape_.states->layers) {
    if (r.channels == 0) continue;
    for (int64_t item = -1; item < r.values() / kLanes; ++item) parts.push_back({&r, item});
  }
  std::atomic<size_t> next{0};
  const size_t some = parts.size() / static_cast<size_t>(8 * pool_->size()) + 1;
  pool_->run([&](int) {
    for (size_t first; (first = next.fetch_add(some)) < parts.size();) {
      for (size_t p = first; p < std::min(parts.size(), first + some); ++p) {
        const RecurrentShape& r = *parts[p].shape;
        const auto record = [&](int64_t i) { return Record(states.record(nodes[i]) + r.record_at, r); };
        float* at = state + r.state_at;
        if (parts[p].item < 0) {
          move_tail(at, r.taps, r.channels, count, [&](int64_t i) { return record(i).input; });
          continue;
        }
        at += r.tail() + parts[p].item * r.key_dim * kLanes;
        for (int64_t i = 0; i < count; ++i) {
          const Record one = record(i);
          Recur move = step(r, one, parts[p].item, nullptr);
          move.from = move.to = at;
          kernels_->recur(move);
        }
      }
    }
  });
}

}  // namespace redwood
