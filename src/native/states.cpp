#include "states.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace redwood {

States::States(std::shared_ptr<const StatesShape> shape) : shape_(std::move(shape)) {
  if (shape_) base = shape_->zero;
}

void States::drop_nodes(int64_t held) {
  while (static_cast<int64_t>(records_.size()) > held) {
    if (records_.back()) spare_.push_back(std::move(records_.back()));
    records_.pop_back();
  }
  tokens.resize(static_cast<size_t>(length + held));
}

void States::start(int64_t committed, int64_t held) {
  if (committed < length) cut(committed);
  const int64_t nodes = static_cast<int64_t>(tokens.size()) - length;
  if (committed > length || nodes < held) throw std::invalid_argument("extend: tokens that were never given");
  drop_nodes(held);
  if (led && held == 0) ahead.reset(), led = 0, coming.clear();
}

void States::append(const int32_t* new_tokens, int64_t count, bool leads) {
  for (int64_t i = 0; i < count; ++i) {
    std::unique_ptr<float[]> made;
    if (!leads && !spare_.empty()) {
      made = std::move(spare_.back());
      spare_.pop_back();
    } else if (!leads) {
      made.reset(new float[static_cast<size_t>(shape_->record)]);
    }
    records_.push_back(std::move(made));
  }
  tokens.insert(tokens.end(), new_tokens, new_tokens + count);
}

void States::lead() {
  ahead = base;
  led = 0;
  coming.clear();
}

int64_t States::unlead() {
  const int64_t count = std::min(led, static_cast<int64_t>(records_.size()));
  ahead.reset();
  led = 0;
  coming.clear();
  for (int64_t i = 0; i < count; ++i) {
    records_[static_cast<size_t>(i)].reset(new float[static_cast<size_t>(shape_->record)]);
  }
  return count;
}

void States::adopt() {
  base = std::move(ahead);
  ahead.reset();
  led = 0;
  kept.insert(coming.begin(), coming.end());
  coming.clear();
}

void States::commit(const int32_t* nodes, int64_t count) {
  std::vector<int32_t> path;
  for (int64_t i = 0; i < count; ++i) path.push_back(tokens[static_cast<size_t>(length + nodes[i])]);
  tokens.resize(static_cast<size_t>(length));
  tokens.insert(tokens.end(), path.begin(), path.end());
  length += count;
  ahead.reset();
  led = 0;
  coming.clear();
  drop_nodes(0);
}

void States::cut(int64_t to) {
  ahead.reset();
  led = 0;
  coming.clear();
  length = std::min(length, to);
  drop_nodes(0);
  spare_.clear();
  kept.erase(kept.upper_bound(length), kept.end());
  if (at <= length) return;
  if (kept.empty()) {
    base = shape_->zero;
    at = 0;
  } else {
    base = kept.rbegin()->second;
    at = kept.rbegin()->first;
  }
}

void States::share(const States& other, int64_t to) {
  base = other.base;
  at = other.at;
  length = std::min(other.length, to);
  tokens.assign(other.tokens.begin(), other.tokens.begin() + length);
  kept = other.kept;
  cut(length);
}

std::map<int64_t, State> States::held() const {
  std::map<int64_t, State> found = kept;
  if (at > 0) found[at] = base;
  return found;
}

void States::restore(const int32_t* all, int64_t count, const std::map<int64_t, State>& states) {
  cut(length);
  tokens.assign(all, all + count);
  length = count;
  for (const auto& [where, state] : states) {
    if (shape_->every && where % shape_->every == 0) kept[where] = state;
    if (where > at) at = where, base = state;
  }
}

int64_t States::reusable(int64_t to) const {
  if (at <= to) return at;  // it may lag behind its row
  const auto after = kept.upper_bound(to);
  return after == kept.begin() ? 0 : std::prev(after)->first;
}

void States::checkpoint() {
  if (shape_->every && at && at % shape_->every == 0) kept[at] = base;
}

int64_t States::next_checkpoint(int64_t from) const {
  const int64_t every = shape_->every;
  return every ? (from / every + 1) * every : std::numeric_limits<int64_t>::max() / 2;
}

float* States::writable(State& state) const {
  if (state.use_count() > 1) {
    const size_t size = static_cast<size_t>(shape_->state);
    State copy(new float[size]);
    std::memcpy(copy.get(), state.get(), size * sizeof(float));
    state = std::move(copy);
  }
  return state.get();
}

void States::collect(std::unordered_set<const float*>& states) const {
  if (!shape_) return;
  const auto add = [&](const State& state) {
    if (state && state != shape_->zero) states.insert(state.get());
  };
  add(base);
  add(ahead);
  for (const auto* held : {&kept, &coming}) {
    for (const auto& [where, state] : *held) add(state);
  }
}

int64_t States::record_bytes() const {
  if (!shape_) return 0;
  int64_t count = static_cast<int64_t>(spare_.size());
  for (const auto& record : records_) count += record != nullptr;
  return count * shape_->record * static_cast<int64_t>(sizeof(float));
}

}  // namespace redwood
