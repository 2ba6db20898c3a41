#include "retrieval.h"

#include <algorithm>
#include <queue>
#include <tuple>

namespace redwood {

namespace {

constexpr double BELIEF = 8.0, MEMORY = 512.0;
constexpr double JOINT_BELIEF = 4.0;
constexpr size_t MATCHES = 8, SHARES = 5, STORE_SHARES = 8, PROBS = 11, RUNS = 5, LEVELS = 8;
// Where the cells of a source begin: text, stored texts, table, predicted answer, all together.
constexpr size_t OF_STORE = 2 * MATCHES * SHARES, OF_TABLE = OF_STORE + 2 * MATCHES * STORE_SHARES,
                 OF_PREDICTED = OF_TABLE + 6 * PROBS * PROBS, OF_JOINT = OF_PREDICTED + RUNS,
                 CELLS = OF_JOINT + LEVELS * LEVELS * LEVELS * LEVELS;
constexpr size_t ENOUGH = 8;  // candidates of the text; shorter matches are then not asked
constexpr double HALVES[] = {0.7071067811865476, 0.5, 0.35355339059327373, 0.25,
                             0.17677669529663687, 0.125, 0.08838834764831843, 0.0625,
                             0.04419417382415922};
constexpr double LEVEL_EDGES[] = {0.05, 0.15, 0.35, 0.6, 0.85};
constexpr double RUN_PRIOR[] = {0.4, 0.7, 0.85, 0.9, 0.95};

// See source_rates.py; so the cells below.
size_t match_of(size_t match, bool longest) {
  return (longest ? MATCHES : 0) + std::min(match, MATCHES) - 1;
}

size_t text_cell(size_t match, size_t count, size_t total, bool longest) {
  size_t share;
  if (count == total)
    share = total == 1 ? 3 : 4;
  else
    share = 2 * count >= total ? 2 : 4 * count >= total ? 1 : 0;
  return match_of(match, longest) * SHARES + share;
}

size_t store_cell(size_t match, size_t count, size_t total, bool longest) {
  size_t share = 0;
  if (count == total)
    share = 4 + (total == 1 ? 1 : total < 5 ? 2 : 3);
  else
    for (const double edge : {0.1, 0.25, 0.5, 0.8}) share += count >= edge * total;
  return OF_STORE + match_of(match, longest) * STORE_SHARES + share;
}

size_t prob_bin(double prob) {
  size_t bin = 0;
  while (bin < 9 && prob <= HALVES[bin]) ++bin;
  return bin;
}

// Below the longest key found, of `first` tokens, and the next one, of `second`, 0 if there is none.
size_t table_cell(size_t first, size_t second, size_t in_first, size_t in_second) {
  const size_t pair = second == 0 ? first - 1 : first == 2 ? 3 : 3 + second;
  return OF_TABLE + (pair * PROBS + in_first) * PROBS + in_second;
}

double middle(size_t bin) {
  static constexpr double MIDDLES[] = {0.8408964152537145, 0.5946035575013605, 0.42044820762685725,
                                       0.29730177875068026, 0.21022410381342863, 0.14865088937534013,
                                       0.10511205190671431, 0.07432544468767006, 0.052556025953357156,
                                       0.03716272234383503, 0.005};
  return MIDDLES[bin];
}

struct Offer {
  double chance;
  int64_t depth;
  size_t order, parent, at;  // candidate `at` of the parent
};

// Whether b is better: more probable, then deeper, then found earlier.
struct Worse {
  bool operator()(const Offer& a, const Offer& b) const {
    return std::tuple(a.chance, a.depth, b.order) < std::tuple(b.chance, b.depth, a.order);
  }
};

}  // namespace

Rates::Rates() : hits(CELLS), trials(CELLS) {}

double Rates::prior_of(size_t cell) {
  static constexpr double OF_SHARE[] = {0.1, 0.3, 0.6, 0.75, 0.9};
  static constexpr double STORED_SHARE[] = {0.04, 0.15, 0.35, 0.6, 0.85, 0.5, 0.75, 0.95};
  if (cell < OF_STORE) {
    const size_t match = cell / SHARES;
    return (match < MATCHES ? 0.3 : 1.0) * OF_SHARE[cell % SHARES] *
           (0.5 + 0.5 * (match % MATCHES + 1) / MATCHES);
  }
  if (cell < OF_TABLE) {
    const size_t match = (cell - OF_STORE) / STORE_SHARES;
    return (match < MATCHES ? 0.6 : 0.9) * STORED_SHARE[(cell - OF_STORE) % STORE_SHARES] *
           (0.4 + 0.6 * (match % MATCHES + 1) / MATCHES);
  }
  if (cell < OF_PREDICTED) {
    const size_t bins = (cell - OF_TABLE) % (PROBS * PROBS);
    return std::max(middle(bins / PROBS), middle(bins % PROBS));
  }
  return RUN_PRIOR[cell - OF_PREDICTED];
}

double Rates::rate(size_t cell, double prior) const {
  const double belief = cell < OF_JOINT ? BELIEF : JOINT_BELIEF;
  return (belief * prior + hits[cell]) / (belief + trials[cell]);
}

void Rates::count(size_t cell, bool hit) {
  if (trials[cell] >= MEMORY) {
    hits[cell] *= 0.5;
    trials[cell] *= 0.5;
  }
  hits[cell] += hit;
  trials[cell] += 1.0;
}

struct Retriever::Asked {
  const Rates& all;
  const SuccessorTable* table;
  const Stored& stored;
  const std::vector<int64_t>& predicted;
  size_t run;
  std::vector<uint32_t> path;    // drafted tokens from the root to the node
  bool spoke[SOURCES];           // which sources know the node's context
};

// The candidates below a node; `latest`: the last tokens up to it, the last one first.
void Retriever::gather(Node& node, const std::vector<uint32_t>& latest, size_t depth,
                       Asked& asked) const {
  std::vector<Candidate>& made = node.candidates;
  const auto candidate = [&made](uint32_t token) -> Candidate& {
    const auto at = std::find_if(made.begin(), made.end(),
                                 [token](const Candidate& each) { return each.token == token; });
    if (at != made.end()) return *at;
    made.push_back(Candidate{});
    made.back().token = token;
    return made.back();
  };
  std::fill(asked.spoke, asked.spoke + SOURCES, false);

  // The text: all places behind the longest match, then behind shorter ones.
  if (own_text_) {
    const std::vector<int64_t> suffix(latest.rend() - std::min<size_t>(latest.size(), TextIndex::LONGEST),
                                      latest.rend());
    const Matches found = index_.matches(suffix);
    const std::vector<uint32_t>& text = index_.text();
    for (size_t group = 0; group < found.size() && made.size() < ENOUGH; ++group) {
      const auto& [length, places] = found[group];
      asked.spoke[TEXT] = asked.spoke[TEXT] || length >= 2;
      for (const auto& [token, behind] : index_.followers(places)) {
        size_t match = static_cast<size_t>(length);
        if (length == TextIndex::LONGEST) {
          for (const int32_t place : behind) {  // one past the token, that is two past the match
            const size_t end = static_cast<size_t>(place) - 1;
            size_t more = TextIndex::LONGEST;
            while (more < std::min({latest.size(), end, MATCHES}) &&
                   text[end - 1 - more] == latest[more])
              ++more;
            match = std::max(match, more);
          }
        }
        Candidate& each = candidate(token);
        if (each.cells[TEXT] < 0)
          each.cells[TEXT] =
              static_cast<int64_t>(text_cell(match, behind.size(), places.size(), group == 0));
      }
    }
  }

  // Stored texts: rows that begin with the drafted tokens.
  for (size_t group = 0; group < asked.stored.size(); ++group) {
    const auto& [length, rows] = asked.stored[group];
    std::vector<std::pair<uint32_t, size_t>> counts;
    size_t total = 0;
    for (const std::vector<int64_t>& row : rows) {
      if (row.size() <= depth || !std::equal(asked.path.begin(), asked.path.end(), row.begin()))
        continue;
      const auto token = static_cast<uint32_t>(row[depth]);
      auto at = std::find_if(counts.begin(), counts.end(),
                             [token](const auto& each) { return each.first == token; });
      if (at == counts.end()) at = counts.insert(at, {token, 0});
      ++at->second, ++total;
    }
    asked.spoke[STORE] = asked.spoke[STORE] || total > 0;
    for (const auto& [token, count] : counts) {
      Candidate& each = candidate(token);
      if (each.cells[STORE] < 0)
        each.cells[STORE] = static_cast<int64_t>(
            store_cell(static_cast<size_t>(length) + depth, count, total, group == 0));
    }
  }

  // The table: the two longest keys that it has.
  if (asked.table != nullptr) {
    const Successors* found[2] = {nullptr, nullptr};
    size_t orders[2] = {0, 0}, count = 0;
    for (size_t order = std::min(latest.size(), SuccessorTable::ORDERS); order > 0 && count < 2;
         --order) {
      const Successors* entry = asked.table->find(latest.data(), order);
      if (entry != nullptr) found[count] = entry, orders[count++] = order;
    }
    asked.spoke[TABLE] = count > 0;
    const auto bin_in = [](const Successors* entry, uint32_t token) {
      for (size_t i = 0; entry != nullptr && i < Successors::KEPT && entry->probs[i] > 0.0f; ++i) {
        if (entry->tokens[i] == token) return prob_bin(entry->probs[i]);
      }
      return PROBS - 1;
    };
    for (size_t which = 0; which < count; ++which) {
      for (size_t i = 0; i < Successors::KEPT && found[which]->probs[i] > 0.0f; ++i) {
        const uint32_t token = found[which]->tokens[i];
        Candidate& each = candidate(token);
        each.cells[TABLE] = static_cast<int64_t>(
            table_cell(orders[0], orders[1], bin_in(found[0], token), bin_in(found[1], token)));
      }
    }
  }

  // The predicted answer, while the drafted tokens follow it.
  if (depth < asked.predicted.size() &&
      std::equal(asked.path.begin(), asked.path.end(), asked.predicted.begin())) {
    asked.spoke[PREDICTED] = true;
    candidate(static_cast<uint32_t>(asked.predicted[depth])).cells[PREDICTED] =
        static_cast<int64_t>(OF_PREDICTED + std::min(asked.run + depth, RUNS - 1));
  }

  for (Candidate& each : made) {
    size_t joint = 0, speakers = 0;
    for (size_t source = 0; source < SOURCES; ++source) {
      size_t level = asked.spoke[source] ? 1 : 0;  // it knows the context, and not this token
      speakers += level;
      if (each.cells[source] >= 0) {
        speakers += 1 - level;
        const auto cell = static_cast<size_t>(each.cells[source]);
        const double rate = own_.rate(cell, asked.all.rate(cell, Rates::prior_of(cell)));
        each.prior = std::max(each.prior, rate);
        level = 2;
        for (const double edge : LEVEL_EDGES) level += rate >= edge;
      }
      joint = joint * LEVELS + level;
    }
    each.chance = each.prior;
    if (speakers > 1) {
      each.joint = static_cast<int64_t>(OF_JOINT + joint);
      const auto cell = static_cast<size_t>(each.joint);
      each.chance = own_.rate(cell, asked.all.rate(cell, each.prior));
    }
  }
}

Retrieved Retriever::draft(size_t size, size_t max_branch, double least, const Rates& all,
                           const SuccessorTable* table, const Stored& stored,
                           const std::vector<int64_t>& predicted, size_t run) {
  nodes_.clear();
  Retrieved made;
  if (size <= 1 || index_.size() == 0) return made;
  Asked asked{all, table, stored, predicted, run, {}, {}};
  const std::vector<uint32_t>& text = index_.text();
  std::priority_queue<Offer, std::vector<Offer>, Worse> offers;
  size_t order = 0;

  const auto expand = [&](size_t at, double reached) {
    std::vector<uint32_t> latest;
    for (size_t up = at; up != 0; up = nodes_[up].parent) latest.push_back(nodes_[up].token);
    asked.path.assign(latest.rbegin(), latest.rend());
    const size_t depth = latest.size();
    for (size_t i = text.size(); i > 0 && latest.size() < MATCHES; --i)
      latest.push_back(text[i - 1]);
    if (latest.size() > MATCHES) latest.resize(MATCHES);
    gather(nodes_[at], latest, depth, asked);
    const auto& candidates = nodes_[at].candidates;
    for (size_t i = 0; i < candidates.size(); ++i) {
      const double chance = reached * candidates[i].chance;
      ++order;
      if (chance >= least) offers.push({chance, static_cast<int64_t>(depth) + 1, order, at, i});
    }
  };

  nodes_.push_back({text.back(), 0, {}, {}});
  expand(0, 1.0);
  while (!offers.empty()) {
    const Offer best = offers.top();
    offers.pop();
    Node& parent = nodes_[best.parent];
    if (parent.children.size() >= max_branch) continue;
    const Candidate& taken = parent.candidates[best.at];
    const size_t node = nodes_.size();
    parent.children.emplace_back(taken.token, node);
    int64_t named = 0;
    for (size_t source = 0; source < SOURCES; ++source)
      named |= static_cast<int64_t>(taken.cells[source] >= 0) << source;
    made.tokens.push_back(taken.token);
    made.parents.push_back(static_cast<int64_t>(best.parent));
    made.sources.push_back(named);
    made.chances.push_back(best.chance);
    nodes_.push_back({taken.token, best.parent, {}, {}});
    if (node == size - 1) break;
    expand(node, best.chance);
  }
  return made;
}

void Retriever::extend(const std::vector<int64_t>& tokens, Rates& all) {
  size_t at = 0;
  for (size_t i = 0; i < tokens.size() && !nodes_.empty(); ++i) {
    const Node& node = nodes_[at];
    const auto token = static_cast<uint32_t>(tokens[i]);
    for (const Candidate& each : node.candidates) {
      const bool hit = each.token == token;
      for (const int64_t cell : {each.cells[TEXT], each.cells[STORE], each.cells[TABLE],
                                 each.cells[PREDICTED], each.joint}) {
        if (cell < 0) continue;
        all.count(static_cast<size_t>(cell), hit);
        own_.count(static_cast<size_t>(cell), hit);
      }
    }
    const auto next = std::find_if(node.children.begin(), node.children.end(),
                                   [token](const auto& each) { return each.first == token; });
    if (next == node.children.end()) break;
    at = next->second;
  }
  nodes_.clear();
  index_.extend(tokens);
}

}  // namespace redwood
