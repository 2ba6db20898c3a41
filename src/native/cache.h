// Keys and values of a row, in pages of 64 slots that are never moved.
//
// A page holds, for every layer and key-value head, keys as [4 blocks][head_dim][16 slots] and values
// as [64 slots][value_dim]: what the attention kernels read in order. Numbers are fp16 or float32.
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "formats.h"

namespace redwood {

constexpr int64_t kPage = 64;

struct CacheShape {
  int64_t layers = 0, kv_heads = 0, head_dim = 0, value_dim = 0;  // value_dim: padded to 16
  int64_t item = 2;                                               // bytes of a number

  int64_t key_bytes() const { return kPage * head_dim * item; }
  int64_t head_bytes() const { return key_bytes() + kPage * value_dim * item; }
  int64_t page_bytes() const { return layers * kv_heads * head_bytes(); }
};

class Row {
 public:
  explicit Row(const CacheShape& shape) : shape_(shape) {}

  // Allocates pages for this many slots.
  void reserve(int64_t slots) {
    while (static_cast<int64_t>(pages_.size()) * kPage < slots) {
      // Zeroed: kernels read whole blocks of 16 slots, of which some may be new.
      pages_.emplace_back(std::make_unique<uint64_t[]>(
          static_cast<size_t>(round_up(shape_.page_bytes(), 8) / 8)));
    }
  }

  // Frees the pages past this many slots.
  void shrink(int64_t slots) {
    const size_t keep = static_cast<size_t>((slots + kPage - 1) / kPage);
    if (keep < pages_.size()) pages_.resize(keep);
  }

  int64_t slots() const { return static_cast<int64_t>(pages_.size()) * kPage; }
  int64_t bytes() const { return static_cast<int64_t>(pages_.size()) * shape_.page_bytes(); }

  // Keys of the 16 slots from `slot`, a multiple of 16.
  uint8_t* keys(int64_t layer, int64_t head, int64_t slot) const {
    return head_of(layer, head, slot) + slot % kPage * shape_.head_dim * shape_.item;
  }
  // Values from `slot` to the end of its page.
  uint8_t* values(int64_t layer, int64_t head, int64_t slot) const {
    return head_of(layer, head, slot) + shape_.key_bytes() +
           slot % kPage * shape_.value_dim * shape_.item;
  }

  // Copies keys and values of a slot to an earlier one, for all layers.
  void move(int64_t from, int64_t to) {
    for (int64_t layer = 0; layer < shape_.layers; ++layer) {
      for (int64_t head = 0; head < shape_.kv_heads; ++head) {
        std::memcpy(values(layer, head, to), values(layer, head, from),
                    static_cast<size_t>(shape_.value_dim * shape_.item));
        const uint8_t* k = keys(layer, head, from / kLanes * kLanes) + from % kLanes * shape_.item;
        uint8_t* t = keys(layer, head, to / kLanes * kLanes) + to % kLanes * shape_.item;
        for (int64_t d = 0; d < shape_.head_dim; ++d) {
          std::memcpy(t + d * kLanes * shape_.item, k + d * kLanes * shape_.item,
                      static_cast<size_t>(shape_.item));
        }
      }
    }
  }

 private:
  uint8_t* head_of(int64_t layer, int64_t head, int64_t slot) const {
    auto* page = reinterpret_cast<uint8_t*>(pages_[static_cast<size_t>(slot / kPage)].get());
    return page + (layer * shape_.kv_heads + head) * shape_.head_bytes();
  }

  CacheShape shape_;
  std::vector<std::unique_ptr<uint64_t[]>> pages_;
};

}  // namespace redwood
