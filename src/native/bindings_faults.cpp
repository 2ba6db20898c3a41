// What a process says when a file that it has mapped is cut short: without this it dies by SIGBUS,
// and nobody learns why.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <cstring>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>
#endif

namespace nb = nanobind;

#if defined(__unix__) || defined(__APPLE__)
namespace {

constexpr int kExitCode = 1;
struct sigaction before;
char line[4608], block[4096];  // static: a handler should not ask for much of somebody's stack

bool hex(const char*& at, uintptr_t& value) {
  const char* start = at;
  for (value = 0;; ++at) {
    const char c = *at;
    if (c >= '0' && c <= '9') value = value * 16 + static_cast<uintptr_t>(c - '0');
    else if (c >= 'a' && c <= 'f') value = value * 16 + static_cast<uintptr_t>(c - 'a' + 10);
    else return at != start;
  }
}

// Whether a line of /proc/self/maps holds the address; `path` is then where its file's name begins.
bool holds(const char* at, uintptr_t address, const char*& path) {
  uintptr_t first = 0, last = 0;
  if (!hex(at, first) || *at++ != '-' || !hex(at, last) || address < first || address >= last) {
    return false;
  }
  path = std::strchr(at, '/');
  return path != nullptr;
}

// Finds the file that is mapped at an address; its name is then in `line`. Only system calls.
const char* file_at(uintptr_t address) {
  const int maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  if (maps < 0) return nullptr;
  const char* path = nullptr;
  size_t length = 0;
  for (ssize_t got; path == nullptr && (got = read(maps, block, sizeof block)) > 0;) {
    for (ssize_t i = 0; i < got && path == nullptr; ++i) {
      if (block[i] != '\n') {
        if (length + 1 < sizeof line) line[length++] = block[i];
        continue;
      }
      line[length] = 0;
      length = 0;
      holds(line, address, path);
    }
  }
  close(maps);
  return path;
}

void say(const char* text) {
  size_t left = std::strlen(text);
  while (left > 0) {
    const ssize_t sent = write(2, text, left);
    if (sent <= 0) return;
    text += sent;
    left -= static_cast<size_t>(sent);
  }
}

void on_bus_error(int, siginfo_t* about, void*) {
  static volatile sig_atomic_t seen = 0;
  const bool first = !seen;
  seen = 1;
  const char* path = first ? file_at(reinterpret_cast<uintptr_t>(about->si_addr)) : nullptr;
  if (first && path != nullptr) {
    say("error: ");
    say(path);
    say(" was cut short, or can no longer be read, while it was in use: start again\n");
    if (before.sa_handler == SIG_DFL) _exit(kExitCode);
  }
  sigaction(SIGBUS, &before, nullptr);  // the access is made again, and is somebody else's
}

void explain_bus_errors() {
  struct sigaction now;
  if (sigaction(SIGBUS, nullptr, &now) != 0 || now.sa_sigaction == on_bus_error) return;
  before = now;
  struct sigaction ours = {};
  ours.sa_sigaction = on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGBUS, &ours, nullptr);
}

}  // namespace
#else
static void explain_bus_errors() {}  // Windows lets nobody cut a file that is mapped
#endif

void bind_faults(nb::module_& m) { m.def("explain_bus_errors", &explain_bus_errors); }
