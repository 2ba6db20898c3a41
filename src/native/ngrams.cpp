#include "ngrams.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace redwood {

namespace {

constexpr size_t MOST_PLACES = 128;  // per match length; the latest count

uint32_t checked(int64_t token) {
  if (token < 0 || token > std::numeric_limits<uint32_t>::max())
    throw std::invalid_argument("a token must be from 0 to 2^32 - 1");
  return static_cast<uint32_t>(token);
}

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

}  // namespace redwood
