// The places of every n-gram of one text. The reference is redwood/algorithms/sssd.py, TextIndex.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace redwood {

using Places = std::vector<int32_t>;
// Tokens, each with the places behind it, in the order in which they first stood there.
using Followers = std::vector<std::pair<uint32_t, Places>>;
using Matches = std::vector<std::pair<int, Places>>;

class TextIndex {
 public:
  static constexpr int LONGEST = 4;  // tokens compared at most

  // Appends tokens, each below 2^32.
  void extend(const std::vector<int64_t>& tokens);
  size_t size() const { return text_.size(); }
  // Match lengths with their places, longest first, for every tail of the suffix seen before.
  Matches matches(const std::vector<int64_t>& suffix) const;
  Followers followers(const Places& places) const;
  const std::vector<uint32_t>& text() const { return text_; }

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
