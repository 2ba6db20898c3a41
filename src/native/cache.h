// Keys and values of a row, in pages of 64 slots that are never moved. Rows may share pages, which are
// counted; whoever writes to a shared one takes a copy first.
//
// A page holds, for every layer that has keys and values of its own and every key-value head, keys as
// [4 blocks][head_dim][16 slots] and values as [64 slots][value_dim]: what the attention kernels read in
// order. Numbers are fp16 or float32.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <unordered_set>
#include <vector>

#include "formats.h"
#include "states.h"

namespace redwood {

constexpr int64_t kPage = 64;

// Of a layer; no heads: it holds nothing.
struct CacheLayer {
  int64_t kv_heads = 0, head_dim = 0, value_dim = 0;  // value_dim: padded to 16
  int64_t start = 0;                                  // where it begins in a page
  int64_t item = 2;                                   // bytes of a number

  int64_t key_bytes() const { return kPage * head_dim * item; }
  int64_t head_bytes() const { return key_bytes() + kPage * value_dim * item; }
};

struct CacheShape {
  std::vector<CacheLayer> layers;  // of the model
  int64_t bytes = 0;
  std::shared_ptr<const StatesShape> states = nullptr;  // of recurrent layers

  void add(int64_t kv_heads, int64_t head_dim, int64_t value_dim, int64_t item) {
    layers.push_back({kv_heads, head_dim, value_dim, bytes, item});
    bytes += kv_heads * layers.back().head_bytes();
  }
  const CacheLayer& layer(int64_t index) const { return layers[static_cast<size_t>(index)]; }
  int64_t page_bytes() const { return bytes; }
};

class Row {
 public:
  explicit Row(const CacheShape& shape) : states(shape.states), shape_(shape) {}

  States states;

  // Allocates pages for this many slots.
  void reserve(int64_t slots) {
    while (static_cast<int64_t>(pages_.size()) * kPage < slots) {
      // Zeroed: kernels read whole blocks of 16 slots, of which some may be new.
      pages_.emplace_back(new uint64_t[words()]());
    }
  }

  // Copies the pages from this slot on that other rows hold, too: it is about to be written.
  void own(int64_t slot) {
    for (size_t i = static_cast<size_t>(slot / kPage); i < pages_.size(); ++i) {
      if (pages_[i].use_count() == 1) continue;
      Page copy(new uint64_t[words()]);
      std::memcpy(copy.get(), pages_[i].get(), words() * sizeof(uint64_t));
      pages_[i] = std::move(copy);
    }
  }

  // Holds the pages of another row's first slots, too.
  void share(const Row& other, int64_t slots) {
    const auto count = static_cast<std::ptrdiff_t>((slots + kPage - 1) / kPage);
    pages_.assign(other.pages_.begin(), other.pages_.begin() + count);
    if (states) states.share(other.states, slots);
  }

  // Adds its pages to a set.
  void collect(std::unordered_set<const uint64_t*>& pages) const {
    for (const Page& page : pages_) pages.insert(page.get());
  }

  // Numbers that tell its pages apart while they are held, in order.
  std::vector<uint64_t> page_ids() const {
    std::vector<uint64_t> ids;
    for (const Page& page : pages_) ids.push_back(reinterpret_cast<uintptr_t>(page.get()));
    return ids;
  }

  // Copies a page out, or a new one in behind the others: `page_bytes` of the shape.
  void read_page(int64_t page, uint8_t* out) const {
    std::memcpy(out, pages_[static_cast<size_t>(page)].get(), static_cast<size_t>(shape_.page_bytes()));
  }
  void append_page(const uint8_t* data) {
    pages_.emplace_back(new uint64_t[words()]());
    std::memcpy(pages_.back().get(), data, static_cast<size_t>(shape_.page_bytes()));
  }

  // Frees the pages past this many slots.
  void shrink(int64_t slots) {
    const size_t keep = static_cast<size_t>((slots + kPage - 1) / kPage);
    if (keep < pages_.size()) pages_.resize(keep);
    if (states) states.cut(slots);
  }

  int64_t slots() const { return static_cast<int64_t>(pages_.size()) * kPage; }

  // Keys of the 16 slots from `slot`, a multiple of 16.
  uint8_t* keys(int64_t layer, int64_t head, int64_t slot) const {
    const CacheLayer& of = shape_.layer(layer);
    return head_of(of, head, slot) + slot % kPage * of.head_dim * of.item;
  }
  // Values from `slot` to the end of its page.
  uint8_t* values(int64_t layer, int64_t head, int64_t slot) const {
    const CacheLayer& of = shape_.layer(layer);
    return head_of(of, head, slot) + of.key_bytes() + slot % kPage * of.value_dim * of.item;
  }

  // Copies keys and values of a slot to an earlier one, for all layers.
  void move(int64_t from, int64_t to) {
    for (int64_t layer = 0; layer < static_cast<int64_t>(shape_.layers.size()); ++layer) {
      const CacheLayer& of = shape_.layer(layer);
      for (int64_t head = 0; head < of.kv_heads; ++head) {
        std::memcpy(values(layer, head, to), values(layer, head, from),
                    static_cast<size_t>(of.value_dim * of.item));
        const uint8_t* k = keys(layer, head, from / kLanes * kLanes) + from % kLanes * of.item;
        uint8_t* t = keys(layer, head, to / kLanes * kLanes) + to % kLanes * of.item;
        for (int64_t d = 0; d < of.head_dim; ++d) {
          std::memcpy(t + d * kLanes * of.item, k + d * kLanes * of.item, static_cast<size_t>(of.item));
        }
      }
    }
  }

 private:
  using Page = std::shared_ptr<uint64_t[]>;

  size_t words() const { return static_cast<size_t>(round_up(shape_.page_bytes(), 8) / 8); }
  uint8_t* head_of(const CacheLayer& of, int64_t head, int64_t slot) const {
    auto* page = reinterpret_cast<uint8_t*>(pages_[static_cast<size_t>(slot / kPage)].get());
    return page + of.start + head * of.head_bytes();
  }

  CacheShape shape_;
  std::vector<Page> pages_;
};

}  // namespace redwood
