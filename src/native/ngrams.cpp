#include "ngrams.h"

#include <algorithm>
#include <limits>
#include <queue>
#include <stdexcept>
#include <tuple>

namespace redwood {

namespace {

constexpr size_t MOST_PLACES = 128;  // per match length; the latest count

uint32_t checked(int64_t token) {
  if (token < 0 || token > std::numeric_limits<uint32_t>::max())
    throw std::invalid_argument("a token must be from 0 to 2^32 - 1");
  return static_cast<uint32_t>(token);
}

// See ngram_bin of redwood/algorithms/dynamic.py.
size_t bin_of(size_t match, size_t count, size_t total, bool longest) {
  size_t share;
  if (count == total)
    share = total == 1 ? 3 : 4;
  else
    share = 2 * count >= total ? 2 : 4 * count >= total ? 1 : 0;
  const size_t length = std::min(match, TextIndex::MATCHES) - 1;
  return ((longest ? TextIndex::MATCHES : 0) + length) * TextIndex::SHARES + share;
}

struct Offer {
  double chance;
  int64_t depth;
  size_t order;
  size_t parent;
  uint32_t token;
  Places behind;
  int match;
  size_t bin;
};

// Whether b is better: more probable, then deeper, then found earlier.
struct Worse {
  bool operator()(const Offer& a, const Offer& b) const {
    return std::tuple(a.chance, a.depth, b.order) < std::tuple(b.chance, b.depth, a.order);
  }
};

}  // namespace

size_t TextIndex::Hash::operator()(const Gram& gram) const {
  uint64_t mixed = 0;
  for (const uint32_t token : gram) {
    mixed = (mixed ^ token) * 0x9e3779b97f4a7c15u;
    mixed ^= mixed >> 29;
  }
  return static_cast<size_t>(mixed);
}

void TextIndex::extend(const std::vector<int64_t>& tokens) {
  if (tokens.size() > std::numeric_limits<int32_t>::max() - 1 - text_.size())
    throw std::invalid_argument("the text is too long");
  for (const int64_t token : tokens) checked(token);
  for (const int64_t token : tokens) {
    text_.push_back(static_cast<uint32_t>(token));
    const size_t end = text_.size();
    Gram gram{};
    for (size_t length = 1; length <= LONGEST; ++length) {
      if (length > end) {
        earlier_[length - 1].push_back(0);
        continue;
      }
      gram[length - 1] = text_[end - length];
      int32_t& place = latest_[length - 1][gram];
      earlier_[length - 1].push_back(place);
      place = static_cast<int32_t>(end);
    }
  }
}

Matches TextIndex::matches(const std::vector<int64_t>& suffix) const {
  Matches found;
  Gram gram{};
  const size_t longest = std::min<size_t>(suffix.size(), LONGEST);
  for (size_t length = 1; length <= longest; ++length) {
    gram[length - 1] = checked(suffix[suffix.size() - length]);
    const auto held = latest_[length - 1].find(gram);
    int32_t place = held == latest_[length - 1].end() ? 0 : held->second;
    Places places;
    for (size_t n = 0; place && n <= MOST_PLACES; ++n) {
      if (static_cast<size_t>(place) < text_.size()) places.push_back(place);
      place = earlier_[length - 1][place];
    }
    std::reverse(places.begin(), places.end());
    if (!places.empty()) found.emplace_back(static_cast<int>(length), std::move(places));
  }
  std::reverse(found.begin(), found.end());
  return found;
}

Followers TextIndex::followers(const Places& places) const {
  Followers grouped;
  for (const int32_t place : places) {
    if (place < 0) throw std::invalid_argument("a place below 0");
    if (static_cast<size_t>(place) >= text_.size()) continue;
    const uint32_t token = text_[place];
    auto at = std::find_if(grouped.begin(), grouped.end(),
                           [token](const auto& each) { return each.first == token; });
    if (at == grouped.end()) at = grouped.insert(at, {token, {}});
    at->second.push_back(place + 1);
  }
  return grouped;
}

Drafted TextIndex::likely(const std::vector<int64_t>& suffix, size_t size,
                          const std::vector<double>& rates, size_t max_branch,
                          double least) const {
  if (rates.size() != 2 * MATCHES * SHARES) throw std::invalid_argument("wrong number of rates");
  Drafted made;
  if (size <= 1) return made;
  const Matches found = matches(suffix);
  const int longest = found.empty() ? 0 : found.front().first;
  std::priority_queue<Offer, std::vector<Offer>, Worse> offers;
  std::vector<std::vector<std::pair<uint32_t, size_t>>> known(1);  // node -> its children
  size_t order = 0;

  const auto offer = [&](size_t parent, int64_t depth, const Places& places, double reached,
                         int match) {
    Followers grouped = followers(places);
    size_t total = 0;
    for (const auto& each : grouped) total += each.second.size();
    for (auto& [token, behind] : grouped) {
      ++order;
      const size_t bin =
          bin_of(static_cast<size_t>(match + depth - 1), behind.size(), total, match == longest);
      const double chance = reached * rates[bin];
      if (chance < least) continue;
      offers.push({chance, depth, order, parent, token, std::move(behind), match, bin});
    }
  };

  for (const auto& [length, places] : found) offer(0, 1, places, 1.0, length);
  while (!offers.empty()) {
    const Offer best = offers.top();
    offers.pop();
    auto& children = known[best.parent];
    const auto at = std::find_if(children.begin(), children.end(),
                                 [&best](const auto& each) { return each.first == best.token; });
    size_t node;
    if (at == children.end()) {
      if (children.size() >= max_branch) continue;
      made.tokens.push_back(best.token);
      made.parents.push_back(static_cast<int64_t>(best.parent));
      made.bins.push_back(static_cast<int64_t>(best.bin));
      made.chances.push_back(best.chance);
      if (made.tokens.size() == size - 1) break;
      node = made.tokens.size();
      children.emplace_back(best.token, node);
      known.emplace_back();
    } else {
      node = at->second;
    }
    offer(node, best.depth + 1, best.behind, best.chance, best.match);
  }
  return made;
}

}  // namespace redwood
