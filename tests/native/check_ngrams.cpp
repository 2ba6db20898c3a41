// Checks the index of a text against a search of the whole text. Run by make, under sanitizers.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "ngrams.h"

using namespace redwood;

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "check_ngrams: %s\n", what);
  std::exit(1);
}

Matches searched(const std::vector<int64_t>& text, const std::vector<int64_t>& suffix) {
  Matches found;
  for (size_t length = std::min<size_t>(TextIndex::LONGEST, suffix.size()); length; --length) {
    Places places;
    for (size_t at = length; at < text.size(); ++at)
      if (std::equal(suffix.end() - length, suffix.end(), text.begin() + at - length))
        places.push_back(static_cast<int32_t>(at));
    if (places.size() > 128) places.erase(places.begin(), places.end() - 128);
    if (!places.empty()) found.emplace_back(static_cast<int>(length), places);
  }
  return found;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (int turn = 0; turn < 200; ++turn) {
    TextIndex index;
    std::vector<int64_t> text;
    const int64_t most = 1 + turn % 5;
    for (int part = 0; part < 4; ++part) {
      std::vector<int64_t> more(random() % 150);
      for (auto& token : more) token = random() % most;
      index.extend(more);
      text.insert(text.end(), more.begin(), more.end());
      const std::vector<int64_t> tail(text.end() - std::min<size_t>(6, text.size()), text.end());
      require(index.matches(tail) == searched(text, tail), "other matches");
      std::vector<double> rates(2 * TextIndex::MATCHES * TextIndex::SHARES);
      for (auto& rate : rates) rate = (random() % 1000) / 1000.0;
      const Drafted made = index.likely(tail, 1 + random() % 40, rates, 1 + random() % 5, 0.05);
      require(made.tokens.size() == made.parents.size(), "lists that differ");
      for (size_t node = 0; node < made.tokens.size(); ++node) {
        require(made.parents[node] <= static_cast<int64_t>(node), "a parent behind its child");
        require(made.chances[node] >= 0.05, "a node of a smaller chance");
      }
    }
  }
  std::puts("ngrams: well");
}
