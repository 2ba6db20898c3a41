// The weights that one thread will read in a pass, in order, so that memory can bring them while the
// thread computes or waits: they go to its second-level cache, a bounded distance ahead of their use.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace redwood {

class alignas(64) WeightStream {  // each thread writes its own
 public:
  // Bytes ahead: what comes while there are no products, and less than half of a second-level cache.
  static constexpr int64_t kAhead = 256 << 10;

  // Appends what is read next.
  void add(const uint8_t* data, int64_t bytes) {
    pieces_.push_back({data, bytes});
    total_ += bytes;
  }
  int64_t total() const { return total_; }

  void restart() {
    used_ = fetched_ = end_ = 0, piece_ = 0;
    open();
  }

  // All before this offset has been read, or is being read; nothing at `end` or beyond will be.
  void reach(int64_t offset, int64_t end) {
    used_ = std::max(used_, offset);
    end_ = std::min(end, total_);
    while (fetched_ < used_ && piece_ < pieces_.size()) {  // too late for these
      skip(std::min<int64_t>(used_ - fetched_, stop_ - at_));
    }
  }

  // Bytes that should be fetched next.
  int64_t wanted() const { return std::max<int64_t>(0, std::min(used_ + kAhead, end_) - fetched_); }

  // The next of them that stand together, `most` bytes at most; they count as fetched.
  struct Run {
    const uint8_t *at, *end;
  };
  Run next(int64_t most) {
    const int64_t bytes = std::min({wanted(), most, static_cast<int64_t>(stop_ - at_)});
    const Run run{at_, at_ + bytes};
    skip(bytes);
    return run;
  }

 private:
  struct Piece {
    const uint8_t* data;
    int64_t bytes;
  };
  void open() {
    if (piece_ < pieces_.size()) at_ = pieces_[piece_].data, stop_ = at_ + pieces_[piece_].bytes;
  }
  void skip(int64_t bytes) {  // inside the present piece
    at_ += bytes;
    fetched_ += bytes;
    if (at_ >= stop_) ++piece_, open();
  }

  std::vector<Piece> pieces_;
  size_t piece_ = 0;
  const uint8_t *at_ = nullptr, *stop_ = nullptr;  // what is to be fetched of the present piece
  int64_t total_ = 0, end_ = 0, used_ = 0, fetched_ = 0;
};

}  // namespace redwood
