// Drafts that cost no model: one best-first search over what the text itself, stored texts, a
// predicted answer and the target's own earlier rows give as continuations. The reference is
// redwood/algorithms/retrieval.py: the same trees, bit for bit.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "ngrams.h"
#include "successors.h"

namespace redwood {

// Acceptance rates by cell: hits and trials, over all texts or in one.
class Rates {
 public:
  Rates();
  // Of a cell, given its prior: the rate assumed before any trial.
  double rate(size_t cell, double prior) const;
  void count(size_t cell, bool hit);
  // Prior of the cell of a single source.
  static double prior_of(size_t cell);

  std::vector<double> hits, trials;
};

// What followed the end of a text in other texts: match length and rows of tokens, longest first.
using Stored = std::vector<std::pair<int, std::vector<std::vector<int64_t>>>>;

// Nodes below the root, parents before children; parent 0 is the root. `sources`: which named the
// token, as bits: 1 text, 2 stored texts, 4 table, 8 predicted answer.
struct Retrieved {
  std::vector<int64_t> tokens, parents, sources;
  std::vector<double> chances;
};

class Retriever {
 public:
  enum Source { TEXT, STORE, TABLE, PREDICTED, SOURCES };

  // own_text: whether the text itself is a source.
  explicit Retriever(bool own_text) : own_text_(own_text) {}
  // Appends tokens to the text. Those after the last tree count, in both, which of the candidates
  // they took.
  void extend(const std::vector<int64_t>& tokens, Rates& all);
  // At most size - 1 nodes, the most probable paths first, none with a chance below `least`.
  // predicted: the expected continuation of the answer, after `run` tokens that were right.
  Retrieved draft(size_t size, size_t max_branch, double least, const Rates& all,
                  const SuccessorTable* table, const Stored& stored,
                  const std::vector<int64_t>& predicted, size_t run);
  const TextIndex& index() const { return index_; }
  size_t size() const { return index_.size(); }

 private:
  struct Candidate {
    uint32_t token;
    int64_t cells[SOURCES] = {-1, -1, -1, -1};  // of the sources that named it
    int64_t joint = -1;                         // of all together, where several spoke
    double prior = 0.0, chance = 0.0;           // of the joint cell; that it is accepted
  };
  struct Node {
    uint32_t token;
    size_t parent;
    std::vector<Candidate> candidates;
    std::vector<std::pair<uint32_t, size_t>> children;
  };
  struct Asked;
  void gather(Node& node, const std::vector<uint32_t>& context, size_t depth, Asked& asked) const;

  bool own_text_;
  TextIndex index_;
  Rates own_;
  std::vector<Node> nodes_;  // of the last tree; empty once it was followed
};

}  // namespace redwood
