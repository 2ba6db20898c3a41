// Checks the index of a text against a search of the whole text. Run by make, under sanitizers.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "ngrams.h"
#include "retrieval.h"
#include "successors.h"

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
    }
  }
  // The free drafts: trees in order within their bounds, whatever was learned before.
  SuccessorTable table(SuccessorTable::LEAST_BYTES);
  Rates rates;
  for (int turn = 0; turn < 60; ++turn) {
    Retriever retriever(turn % 3 != 0);
    const int64_t most = 2 + turn % 400;
    std::vector<int64_t> text{0};
    retriever.extend(text, rates);
    for (int step = 0; step < 60; ++step) {
      Stored stored;
      for (int length = static_cast<int>(random() % 3); length > 0; --length)
        stored.push_back({length, {{int64_t(random() % most), int64_t(random() % most)}, {}}});
      std::vector<int64_t> predicted(random() % 4);
      for (auto& token : predicted) token = random() % most;
      const size_t size = 1 + random() % 30;
      const double least = 0.01 * (random() % 20);
      const Retrieved made = retriever.draft(size, 1 + random() % 5, least, rates, &table, stored,
                                             predicted, random() % 6);
      require(made.tokens.size() < std::max<size_t>(size, 1) || size == 1, "too many nodes");
      for (size_t node = 0; node < made.tokens.size(); ++node) {
        require(made.parents[node] <= static_cast<int64_t>(node), "a parent behind its child");
        require(made.chances[node] >= least, "a node of a smaller chance");
        require(node == 0 || made.chances[node] <= made.chances[node - 1], "nodes out of order");
      }
      std::vector<int64_t> news(1 + random() % 3);
      for (auto& token : news) token = random() % most;
      if (!made.tokens.empty()) news[0] = made.tokens[0];
      std::vector<int32_t> ids(4 * news.size());
      std::vector<float> probs(4 * news.size());
      std::vector<int64_t> parents;
      for (size_t i = 0; i < news.size(); ++i) {
        parents.push_back(static_cast<int64_t>(i) - 1);
        for (size_t j = 0; j < 4; ++j)
          ids[4 * i + j] = static_cast<int32_t>(4 * (random() % most) + j),
                       probs[4 * i + j] = 0.4f / (1 + j);
      }
      table.learn(text, news, parents, ids.data(), probs.data(), 4);
      retriever.extend(news, rates);
      text.insert(text.end(), news.begin(), news.end());
      require(table.bytes() <= table.max_bytes(), "more memory than its bound");
    }
  }
  const std::vector<Successors> all = table.entries();
  SuccessorTable other(SuccessorTable::LEAST_BYTES);
  other.load(all.data(), all.size(), table.rows());
  require(other.size() == table.size() && other.rows() == table.rows(), "another table");
  std::puts("ngrams: well");
}
