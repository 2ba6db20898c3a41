// A model's best next tokens after the last one to three tokens of any text, averaged.
// The reference is redwood/algorithms/successors.py: the same entries, bit for bit.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace redwood {

// One key and what follows it; a file of a table holds these as they are, little-endian.
struct Successors {
  static constexpr size_t KEPT = 6;
  uint64_t key = 0;                 // 0: empty
  uint32_t stamp = 0, rows = 0;     // when it was changed last; rows averaged, at most 2^32 - 1
  std::array<uint32_t, KEPT> tokens{};
  std::array<float, KEPT> probs{};  // descending; 0: no token
};
static_assert(sizeof(Successors) == 64);

class SuccessorTable {
 public:
  static constexpr size_t ORDERS = 3, WAYS = 8;  // longest key; entries of a bucket
  static constexpr size_t LEAST_BYTES = 1024 * WAYS * sizeof(Successors);

  explicit SuccessorTable(size_t max_bytes);
  // Rows after the nodes of a tree: ids, probs: [n, best], best first. `tail` are the last tokens
  // before it; parents below the node, -1 for `tail` itself.
  void learn(const std::vector<int64_t>& tail, const std::vector<int64_t>& tokens,
             const std::vector<int64_t>& parents, const int32_t* ids, const float* probs,
             size_t best);
  // The entry of the last `order` tokens, the last one first; nullptr if there is none.
  const Successors* find(const uint32_t* latest, size_t order) const;
  size_t size() const { return size_; }
  size_t bytes() const { return entries_.size() * sizeof(Successors); }
  size_t max_bytes() const { return max_bytes_; }
  uint64_t rows() const { return rows_; }
  void clear();
  // All entries, oldest first.
  std::vector<Successors> entries() const;
  // Puts entries in as they are, in order; later ones replace those of equal keys.
  void load(const Successors* entries, size_t count, uint64_t rows);

 private:
  Successors& place_for(uint64_t key);
  void grow();
  size_t max_bytes_, size_ = 0;
  uint64_t rows_ = 0;
  std::vector<Successors> entries_;  // buckets of WAYS
};

}  // namespace redwood
