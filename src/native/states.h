// What recurrent layers keep of a row: states, and the inputs of provisional nodes.
//
// A state is that of all recurrent layers after some tokens: per layer the last inputs of the
// convolution [taps][channels], oldest first, and a matrix per head, in blocks of 16 value
// components: [heads][value_dim / 16][key_dim][16]. All float32. States are shared between rows and
// never written while they are.
//
// A record is what a node does to states: per layer the input of the convolution [channels], and where
// there are matrices keys [key_heads][key_dim], values [heads][value_dim], decays and betas [heads].
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <unordered_set>
#include <vector>

namespace redwood {

struct RecurrentShape {
  int64_t taps = 0, channels = 0;
  int64_t heads = 0, key_heads = 0, key_dim = 0, value_dim = 0;  // value_dim: padded to 16
  int64_t state_at = 0, record_at = 0;  // in a state, and in a record
  bool corrects = false;  // values less what the state says of their keys are taken in, see `Recur`

  int64_t tail() const { return taps * channels; }
  int64_t matrices() const { return heads * key_dim * value_dim; }
  int64_t keys() const { return key_heads * key_dim; }
  int64_t values() const { return heads * value_dim; }
  int64_t record() const { return channels + keys() + values() + 2 * heads; }
};

using State = std::shared_ptr<float[]>;

struct StatesShape {
  std::vector<RecurrentShape> layers;  // of the model; without channels: not recurrent
  int64_t state = 0, record = 0;       // floats
  int64_t every = 0;                   // tokens from one checkpoint to the next; 0: none are kept
  State zero;                          // before the first token
};

// A node's record of one layer.
struct Record {
  float *input, *keys, *values, *decays, *betas;
  Record(float* at, const RecurrentShape& r)
      : input(at), keys(input + r.channels), values(keys + r.keys()), decays(values + r.values()),
        betas(decays + r.heads) {}
};

class States {
 public:
  States() = default;  // of a model without recurrent layers
  explicit States(std::shared_ptr<const StatesShape> shape);

  explicit operator bool() const { return shape_ != nullptr; }

  // A row has `length` committed tokens and `held` provisional nodes: forgets what goes beyond.
  // Throws where it knows of fewer.
  void start(int64_t length, int64_t held);
  // New provisional nodes; `led`: as part of a chain whose states `ahead` follows, so that they have
  // no records.
  void append(const int32_t* tokens, int64_t count, bool led);
  // Has `ahead` follow a chain of provisional nodes from the committed ones on.
  void lead();
  // The first provisional nodes get records in place of `ahead`, which is dropped.
  int64_t unlead();
  // Takes over `ahead`, as the state after the first provisional nodes, which are committed.
  void adopt();
  // Commits these provisional nodes; `at` stays where it is.
  void commit(const int32_t* nodes, int64_t count);
  // Drops provisional nodes and committed tokens from a length on.
  void cut(int64_t length);
  // Becomes that of another row's first tokens.
  void share(const States& other, int64_t length);
  // The states that it has of its committed tokens but for none, by length.
  std::map<int64_t, State> held() const;
  // Has these committed tokens, and states of beginnings of them, what it had included. Of those that
  // are no checkpoints the last one alone stays.
  void restore(const int32_t* all, int64_t count, const std::map<int64_t, State>& states);
  // The longest beginning of at most `length` tokens that has a state.
  int64_t reusable(int64_t length) const;
  // Keeps the state where it is a checkpoint.
  void checkpoint();
  // The length at which the next checkpoint behind `length` stands, or a very large number.
  int64_t next_checkpoint(int64_t length) const;

  // A state that may be written.
  float* writable(State& state) const;
  float* record(int64_t node) const { return records_[static_cast<size_t>(node)].get(); }
  // The state before the provisional nodes that have records.
  const float* origin() const { return (led ? ahead : base).get(); }

  // Adds its states to a set; bytes of records.
  void collect(std::unordered_set<const float*>& states) const;
  int64_t record_bytes() const;

  State base, ahead;
  int64_t at = 0;      // `base` is the state after so many committed tokens
  int64_t led = 0;     // `ahead` is that after so many provisional nodes, a chain
  int64_t length = 0;  // committed tokens
  std::vector<int32_t> tokens;       // committed ones, and those of provisional nodes
  std::map<int64_t, State> kept, coming;  // checkpoints by length; coming: of `ahead`

 private:
  void drop_nodes(int64_t held);

  std::shared_ptr<const StatesShape> shape_;
  std::vector<std::unique_ptr<float[]>> records_, spare_;
};

}  // namespace redwood
