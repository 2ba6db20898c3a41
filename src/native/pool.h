// A team of threads that runs one function at a time, with a cheap barrier inside it.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace redwood {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
  static constexpr int kYieldAfter = 1000;

 public:
  // `cpus`: one processor per thread to pin to, or empty.
  Pool(int threads, const std::vector<int>& cpus);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }

  // Calls work(thread) on every thread, 0 being the caller; returns when all are done. One caller
  // at a time; others wait. Work must not throw.
  void run(const std::function<void(int)>& work);

  // Inside run: waits until every thread is here, and calls `idle` meanwhile, which must be short.
  template <class Idle>
  void barrier(Idle idle) {
    if (size_ == 1) return;
    const uint64_t round = passed_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      passed_.fetch_add(1, std::memory_order_release);
      return;
    }
    for (int spins = 0; passed_.load(std::memory_order_acquire) == round; ++spins) {
      idle();
      // Gives way only if a peer has lost its processor.
      spins < kYieldAfter ? relax() : std::this_thread::yield();
    }
  }

  // Pools are shared by all models of the process: idle teams would fight for the processors. A
  // forked child has none of its parent's threads: it gets pools of its own, and leaves the others
  // as they are, since nobody is there to be joined.
  static std::shared_ptr<Pool> shared(int threads, const std::vector<int>& cpus);

 private:
  void serve(int thread);

  const int size_;
  std::vector<std::thread> threads_;
  std::mutex callers_, sleep_;
  std::condition_variable wake_;
  const std::function<void(int)>* work_ = nullptr;
  alignas(64) std::atomic<uint64_t> turn_{0};
  alignas(64) std::atomic<int> working_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint64_t> passed_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace redwood
