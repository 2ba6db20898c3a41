// Where every n-gram of one text was seen, and what is likely to follow its end. The reference is
// redwood/algorithms/sssd.py, TextIndex and likely_tree: the same trees, bit for bit.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace redwood {

// Nodes below the root in the order in which they were found; parent 0 is the root.
struct Drafted {
  std::vector<int64_t> tokens, parents, bins;
  std::vector<double> chances;
};

using Places = std::vector<int32_t>;
// Tokens, each with the places behind it, in the order in which they first stood there.
using Followers = std::vector<std::pair<uint32_t, Places>>;
using Matches = std::vector<std::pair<int, Places>>;

class TextIndex {
 public:
  static constexpr int LONGEST = 4;            // tokens compared at most
  static constexpr size_t MATCHES = 8, SHARES = 5;  // bins of dynamic.ngram_bin, twice

  // Appends tokens, each below 2^32.
  void extend(const std::vector<int64_t>& tokens);
  size_t size() const { return text_.size(); }
  // Match lengths with their places, longest first, for every tail of the suffix seen before.
  Matches matches(const std::vector<int64_t>& suffix) const;
  Followers followers(const Places& places) const;
  // At most size - 1 nodes, the most probable paths first; rates: [2 * MATCHES * SHARES].
  Drafted likely(const std::vector<int64_t>& suffix, size_t size, const std::vector<double>& rates,
                 size_t max_branch, double least) const;

 private:
  using Gram = std::array<uint32_t, LONGEST>;  // the last token first, 0 behind
  struct Hash {
    size_t operator()(const Gram& gram) const;
  };
  std::vector<uint32_t> text_;
  // By length: the latest place behind a gram, and by place the one before it (0: none).
  std::unordered_map<Gram, int32_t, Hash> latest_[LONGEST];
  Places earlier_[LONGEST] = {{0}, {0}, {0}, {0}};
};

}  // namespace redwood
