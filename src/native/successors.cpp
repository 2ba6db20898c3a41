#include "successors.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace redwood {

namespace {

constexpr float NEWEST = 0.4f;  // weight of the newest row in the average

uint64_t mixed(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdu;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53u;
  return x ^ (x >> 33);
}

uint64_t key_of(const uint32_t* latest, size_t order) {
  uint64_t key = order;
  for (size_t i = 0; i < order; ++i) key = mixed(key ^ latest[i]) + 0x9e3779b97f4a7c15u;
  return key == 0 ? 1 : key;
}

// The row joins the average; tokens that fall behind the best KEPT are forgotten.
void average(Successors& entry, const int32_t* ids, const float* probs, size_t best) {
  std::array<std::pair<float, uint32_t>, 2 * Successors::KEPT> all;
  size_t count = 0;
  if (entry.rows > 0) {
    for (size_t i = 0; i < Successors::KEPT && entry.probs[i] > 0.0f; ++i)
      all[count++] = {entry.probs[i] * (1.0f - NEWEST), entry.tokens[i]};
  }
  const size_t old = count;
  const float weight = entry.rows > 0 ? NEWEST : 1.0f;
  for (size_t i = 0; i < best; ++i) {
    const auto token = static_cast<uint32_t>(ids[i]);
    if (!(probs[i] > 0.0f)) break;
    auto* const end = all.begin() + old;
    auto* const at = std::find_if(all.begin(), end, [token](const auto& x) { return x.second == token; });
    if (at != end)
      at->first += weight * probs[i];
    else
      all[count++] = {weight * probs[i], token};
  }
  std::stable_sort(all.begin(), all.begin() + count,
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  for (size_t i = 0; i < Successors::KEPT; ++i) {
    entry.tokens[i] = i < count ? all[i].second : 0;
    entry.probs[i] = i < count ? all[i].first : 0.0f;
  }
  entry.rows += entry.rows < std::numeric_limits<uint32_t>::max();
}

}  // namespace

SuccessorTable::SuccessorTable(size_t max_bytes)
    : max_bytes_(max_bytes), entries_(LEAST_BYTES / sizeof(Successors)) {
  if (max_bytes < LEAST_BYTES) throw std::invalid_argument("a table takes at least 512 KiB");
}

const Successors* SuccessorTable::find(const uint32_t* latest, size_t order) const {
  const uint64_t key = key_of(latest, order);
  const Successors* at = &entries_[(key % (entries_.size() / WAYS)) * WAYS];
  for (size_t i = 0; i < WAYS; ++i, ++at) {
    if (at->key == key) return at;
  }
  return nullptr;
}

void SuccessorTable::grow() {
  std::vector<Successors> old(entries_.size() * 2);
  old.swap(entries_);
  const size_t buckets = entries_.size() / WAYS;
  // A bucket splits into two, so neither can overflow.
  for (const Successors& entry : old) {
    if (entry.key == 0) continue;
    Successors* at = &entries_[(entry.key % buckets) * WAYS];
    while (at->key != 0) ++at;
    *at = entry;
  }
}

// The entry of this key, or the one it takes: an empty one, else the one unchanged for longest.
Successors& SuccessorTable::place_for(uint64_t key) {
  for (;;) {
    Successors* at = &entries_[(key % (entries_.size() / WAYS)) * WAYS];
    Successors* oldest = at;
    for (size_t i = 0; i < WAYS; ++i, ++at) {
      if (at->key == key) return *at;
      if (at->key == 0) {
        *at = Successors{};
        at->key = key;
        ++size_;
        return *at;
      }
      if (at->stamp < oldest->stamp) oldest = at;
    }
    if (2 * bytes() <= max_bytes_) {
      grow();
      continue;
    }
    *oldest = Successors{};
    oldest->key = key;
    return *oldest;
  }
}

void SuccessorTable::learn(const std::vector<int64_t>& tail, const std::vector<int64_t>& tokens,
                           const std::vector<int64_t>& parents, const int32_t* ids,
                           const float* probs, size_t best) {
  if (best > Successors::KEPT) throw std::invalid_argument("a row has at most 6 tokens");
  if (parents.size() != tokens.size()) throw std::invalid_argument("a parent for every token");
  const auto token_of = [](int64_t token) {
    if (token < 0 || token > std::numeric_limits<uint32_t>::max())
      throw std::invalid_argument("a token must be from 0 to 2^32 - 1");
    return static_cast<uint32_t>(token);
  };
  for (size_t node = 0; node < tokens.size(); ++node) {
    if (parents[node] >= static_cast<int64_t>(node) || parents[node] < -1)
      throw std::invalid_argument("a parent must come before its child");
    token_of(tokens[node]);
  }
  for (const int64_t token : tail) token_of(token);
  for (size_t node = 0; node < tokens.size(); ++node, ids += best, probs += best) {
    uint32_t latest[ORDERS];
    size_t known = 0;
    for (int64_t at = static_cast<int64_t>(node); at >= 0 && known < ORDERS; at = parents[at])
      latest[known++] = token_of(tokens[at]);
    for (size_t i = tail.size(); i > 0 && known < ORDERS; --i) latest[known++] = token_of(tail[i - 1]);
    ++rows_;
    for (size_t order = 1; order <= known; ++order) {
      Successors& entry = place_for(key_of(latest, order));
      average(entry, ids, probs, best);
      entry.stamp = static_cast<uint32_t>(std::min<uint64_t>(rows_, std::numeric_limits<uint32_t>::max()));
    }
  }
}

void SuccessorTable::clear() {
  entries_.assign(LEAST_BYTES / sizeof(Successors), Successors{});
  entries_.shrink_to_fit();
  size_ = 0, rows_ = 0;
}

std::vector<Successors> SuccessorTable::entries() const {
  std::vector<Successors> all;
  all.reserve(size_);
  for (const Successors& entry : entries_) {
    if (entry.key != 0) all.push_back(entry);
  }
  std::sort(all.begin(), all.end(), [](const Successors& a, const Successors& b) {
    return a.stamp != b.stamp ? a.stamp < b.stamp : a.key < b.key;
  });
  return all;
}

void SuccessorTable::load(const Successors* entries, size_t count, uint64_t rows) {
  for (size_t i = 0; i < count; ++i) {
    const Successors& entry = entries[i];
    bool fine = entry.key != 0 && entry.rows > 0;
    for (size_t j = 0; j < Successors::KEPT; ++j) {
      const float p = entry.probs[j], before = j == 0 ? 1.001f : entry.probs[j - 1];
      fine = fine && p >= 0.0f && p <= before;
    }
    if (!fine) throw std::invalid_argument("an entry that no table can hold");
  }
  for (size_t i = 0; i < count; ++i) place_for(entries[i].key) = entries[i];
  rows_ = std::max(rows_, rows);
}

}  // namespace redwood
