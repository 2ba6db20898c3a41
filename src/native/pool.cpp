#include "pool.h"

#include <map>
#include <tuple>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

namespace redwood {
namespace {

// About 50 microseconds: longer than the gap between two forwards of a busy decoder's inner steps,
// short enough not to take a processor from the Python beside us.
constexpr int kSpins = 2000;

void pin(const std::vector<int>& cpus, int thread) {
#ifdef __linux__
  if (cpus.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpus[static_cast<size_t>(thread) % cpus.size()], &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#else
  (void)cpus;
  (void)thread;
#endif
}

long this_process() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<long>(getpid());
#else
  return 0;
#endif
}

}  // namespace

Pool::Pool(int threads, const std::vector<int>& cpus) : size_(threads) {
  for (int t = 1; t < size_; ++t) {
    threads_.emplace_back([this, t, cpus] {
      pin(cpus, t);
      serve(t);
    });
  }
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(sleep_);
    stop_ = true;
    ++turn_;
  }
  wake_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Pool::run(const std::function<void(int)>& work) {
  std::lock_guard<std::mutex> one(callers_);
  work_ = &work;
  working_.store(size_ - 1, std::memory_order_relaxed);
  {
    std::lock_guard<std::mutex> lock(sleep_);
    turn_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  work(0);
  for (int spins = 0; working_.load(std::memory_order_acquire) > 0; ++spins) {
    spins < kYieldAfter ? relax() : std::this_thread::yield();
  }
}

void Pool::serve(int thread) {
  uint64_t seen = 0;
  while (true) {
    int spins = 0;
    while (turn_.load(std::memory_order_acquire) == seen && spins++ < kSpins) relax();
    if (turn_.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(sleep_);
      wake_.wait(lock, [&] { return turn_.load(std::memory_order_acquire) != seen; });
    }
    seen = turn_.load(std::memory_order_acquire);
    if (stop_) return;
    (*work_)(thread);
    working_.fetch_sub(1, std::memory_order_release);
  }
}

std::shared_ptr<Pool> Pool::shared(int threads, const std::vector<int>& cpus) {
  static std::mutex mutex;
  static std::map<std::tuple<long, int, std::vector<int>>, std::weak_ptr<Pool>> pools;
  std::lock_guard<std::mutex> lock(mutex);
  const long process = this_process();
  auto& known = pools[{process, threads, cpus}];
  auto pool = known.lock();
  if (!pool) {
    pool = std::shared_ptr<Pool>(new Pool(threads, cpus), [process](Pool* made) {
      if (process == this_process()) delete made;
    });
    known = pool;
  }
  return pool;
}

}  // namespace redwood
