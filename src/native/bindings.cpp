// The Python module redwood._native: checks every argument, then calls the library without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unordered_map.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <unordered_map>
#include <unordered_set>

#include "bindings_model.h"
#include "decoder.h"
#include "pack.h"

using namespace redwood;

namespace {

using BytesOut = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using RowsOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

const Kind& kind_of(const std::string& name) {
  const Kind* kind = find_kind(name);
  require(kind != nullptr, "unknown kind of weights " + name);
  return *kind;
}

const Kernels* isa_of(const std::string& name) {
  const Kernels* kernels = choose_kernels(name.c_str());
  require(kernels != nullptr, "instruction set " + name + " is unknown, or not here");
  return kernels;
}

int64_t file_bytes(const Kind& kind, int64_t rows, int64_t cols) {
  require(rows > 0 && cols > 0 && rows < (1ll << 31) && cols < (1ll << 31), "bad shape");
  require(cols % kind.step == 0, "columns are no multiple of the block of " + std::string(kind.name));
  return rows * (cols / kind.step) * kind.block_bytes;
}

void pack(const std::string& kind_name, Bytes data, int64_t rows, int64_t cols,
          std::optional<Ints> order, const std::string& format_name, BytesOut out, int threads) {
  const Kind& kind = kind_of(kind_name);
  const Format format = format_of(format_name);
  const int64_t size = file_bytes(kind, rows, cols);
  const int64_t file_rows = static_cast<int64_t>(data.size()) / (size / rows);
  require(static_cast<int64_t>(data.size()) % (size / rows) == 0 && file_rows >= 1,
          "data are no whole number of rows");
  require(format == kind.format || is_float(format) || (is_group(format) && !is_table(format)),
          std::string(kind.name) + " cannot be packed as " + format_name);
  require(static_cast<int64_t>(out.size()) == packed_bytes(format, rows, cols), "wrong size of out");
  if (order) {
    require(static_cast<int64_t>(order->size()) == rows, "order has another length than the rows");
    const int32_t* o = order->data();
    require(std::all_of(o, o + rows, [&](int32_t r) { return r >= 0 && r < file_rows; }),
            "order names a row that is not in data");
  } else {
    require(file_rows == rows, "wrong size of data");
  }
  nb::gil_scoped_release free;
  const int64_t blocks = (rows + kLanes - 1) / kLanes;
  auto pool = Pool::shared(threads, {});
  std::atomic<int64_t> next{0};
  pool->run([&](int) {
    for (int64_t b; (b = next.fetch_add(4)) < blocks;) {
      pack_blocks(kind, data.data(), rows, cols, order ? order->data() : nullptr, format, out.data(),
                  b, std::min(blocks, b + 4));
    }
  });
}

void unpack(const std::string& format_name, Bytes packed, int64_t cols, int64_t first, RowsOut out) {
  const Format format = format_of(format_name);
  const int64_t count = static_cast<int64_t>(out.shape(0)), bytes = block_bytes(format, cols);
  require(cols > 0 && static_cast<int64_t>(out.shape(1)) == cols, "wrong shape of out");
  require(first >= 0 && round_up(first + count, kLanes) / kLanes * bytes <=
                            static_cast<int64_t>(packed.size()), "rows past the end");
  for (int64_t r = 0; r < count; ++r) {
    unpack_row(format, packed.data(), cols, first + r, out.data() + r * cols);
  }
}

void read_rows(const std::string& kind_name, Bytes data, RowsOut out) {
  const Kind& kind = kind_of(kind_name);
  const int64_t rows = static_cast<int64_t>(out.shape(0)), cols = static_cast<int64_t>(out.shape(1));
  const int64_t size = file_bytes(kind, rows, cols);
  require(static_cast<int64_t>(data.size()) == size, "wrong size of data");
  for (int64_t r = 0; r < rows; ++r) {
    read_row(kind, data.data() + r * (size / rows), cols, out.data() + r * cols);
  }
}

// One product alone. out: [n, rows padded to 16].
void product(const std::string& isa, const std::string& format_name, Bytes packed, int64_t rows,
             Rows x, RowsOut out, bool add, int threads) {
  require(threads >= 1 && threads <= kMaxThreads, "threads must be in 1..64");
  const Kernels* kernels = isa_of(isa);
  const Format f = format_of(format_name);
  const int64_t n = static_cast<int64_t>(x.shape(0)), cols = static_cast<int64_t>(x.shape(1));
  require(n > 0 && rows > 0 && cols > 0, "empty product");
  require(static_cast<int64_t>(packed.size()) == packed_bytes(f, rows, cols), "wrong size of packed");
  require(static_cast<int64_t>(out.shape(0)) == n &&
              static_cast<int64_t>(out.shape(1)) == round_up(rows, kLanes), "wrong shape of out");
  const int64_t w = round_up(cols, info(f).step);
  const auto count = [&](int64_t unit) { return static_cast<size_t>(n * (w / unit + 1)); };
  std::vector<int8_t> quants(count(1));
  std::vector<float> scales(count(kGroup)), offsets(count(kGroup));
  std::vector<int32_t> sums(count(kGroup));
  std::vector<int16_t> sums16(count(16)), sums32(count(kGroup));
  for (int64_t r = 0; r < n && !is_float(f); ++r) {
    const float* row = x.data() + r * cols;
    if (is_group(f)) {
      const int64_t g = w / kGroup;
      kernels->quantise_group(row, cols, w, quants.data() + r * w, scales.data() + r * g,
                              offsets.data() + r * g, sums.data() + r * g);
    } else {
      const int64_t b = w / kSuper;
      kernels->quantise_super(row, cols, w, quants.data() + r * w, scales.data() + r * b,
                              sums16.data() + r * b * 16, sums32.data() + r * b * 8);
    }
  }
  const Matmul m{packed.data(), block_bytes(f, cols), w, static_cast<int>(n),
                 {w, x.data(), quants.data(), scales.data(), offsets.data(), sums.data(),
                  sums16.data(), sums32.data()},
                 out.data(), static_cast<int64_t>(out.shape(1)), add};
  nb::gil_scoped_release free;
  const int64_t blocks = round_up(rows, kLanes) / kLanes;
  const auto multiply = kernels->matmul[static_cast<int>(f)];
  if (threads == 1) return multiply(m, 0, blocks);
  Pool::shared(threads, {})->run([&](int thread) {
    const int64_t first = blocks * thread / threads, last = blocks * (thread + 1) / threads;
    if (first < last) multiply(m, first, last);
  });
}

// A state of recurrent layers by itself, which rows may share.
struct OneState {
  State state;
  int64_t floats = 0;

  uint64_t id() const { return reinterpret_cast<uintptr_t>(state.get()); }
  int64_t bytes() const { return floats * static_cast<int64_t>(sizeof(float)); }
  void read(BytesOut out) const {
    require(static_cast<int64_t>(out.size()) == bytes(), "read: wrong size of out");
    std::memcpy(out.data(), state.get(), out.size());
  }
};

// A decoder with its rows; keeps the arrays of its weights alive.
class Native {
 public:
  Native(nb::dict config, nb::dict matrices, nb::dict vectors, int threads,
         const std::vector<int>& cpus, const std::string& isa) {
    require(threads >= 1 && threads <= kMaxThreads, "threads must be in 1..64");
    Model m = make_model(config, matrices, vectors, keep_);
    decoder_ = std::make_unique<Decoder>(std::move(m), isa_of(isa), Pool::shared(threads, cpus));
  }

  std::string isa() const { return decoder_->kernels().name; }
  int64_t cache_bytes() const {
    std::unordered_set<const uint64_t*> pages;
    for (const auto& [id, row] : rows_) row->collect(pages);
    return static_cast<int64_t>(pages.size()) * decoder_->shape().page_bytes() + state_bytes();
  }
  // Bytes of states of recurrent layers, and of what provisional nodes do to them.
  int64_t state_bytes() const {
    std::unordered_set<const float*> states;
    int64_t records = 0;
    for (const auto& [id, row] : rows_) {
      row->states.collect(states);
      records += row->states.record_bytes();
    }
    return static_cast<int64_t>(states.size()) * one_state() + records;
  }
  int64_t one_state() const { return of_states(&StatesShape::state); }
  int64_t one_record() const { return of_states(&StatesShape::record); }
  int64_t states(const std::vector<int64_t>& ids) {
    std::unordered_set<const float*> held;
    for (int64_t id : ids) row(id).states.collect(held);
    return static_cast<int64_t>(held.size());
  }
  int64_t reusable(int64_t id, int64_t length) {
    const Row& r = row(id);
    return r.states ? r.states.reusable(length) : length;
  }
  // Pages that these rows hold, shared ones counted once.
  int64_t pages(const std::vector<int64_t>& ids) {
    std::unordered_set<const uint64_t*> held;
    for (int64_t id : ids) row(id).collect(held);
    return static_cast<int64_t>(held.size());
  }

  int64_t open() {
    rows_.emplace(++last_, std::make_unique<Row>(decoder_->shape()));
    return last_;
  }
  // A row that holds the first slots of another.
  int64_t fork(int64_t id, int64_t slots) {
    const Row& from = row(id);
    require(slots >= 0 && slots <= from.slots(), "fork: slots that are not there");
    const int64_t made = open();
    row(made).share(from, slots);
    return made;
  }
  std::vector<uint64_t> page_ids(int64_t id) { return row(id).page_ids(); }
  int64_t page_bytes() const { return decoder_->shape().page_bytes(); }
  void read_page(int64_t id, int64_t page, BytesOut out) {
    const Row& r = row(id);
    require(page >= 0 && page < r.slots() / kPage, "read_page: a page that is not there");
    require(static_cast<int64_t>(out.size()) == page_bytes(), "read_page: wrong size of out");
    r.read_page(page, out.data());
  }
  void append_page(int64_t id, Bytes data) {
    require(static_cast<int64_t>(data.size()) == page_bytes(), "append_page: wrong size of data");
    row(id).append_page(data.data());
  }
  std::map<int64_t, OneState> states_of(int64_t id) {
    std::map<int64_t, OneState> found;
    const Row& r = row(id);
    if (!r.states) return found;
    for (const auto& [length, state] : r.states.held()) found[length] = {state, decoder_->shape().states->state};
    return found;
  }
  OneState make_state(Bytes data) {
    require(one_state() > 0 && static_cast<int64_t>(data.size()) == one_state(), "make_state: wrong size of data");
    const int64_t floats = decoder_->shape().states->state;
    OneState made{State(new float[static_cast<size_t>(floats)]), floats};
    std::memcpy(made.state.get(), data.data(), data.size());
    return made;
  }
  void restore_states(int64_t id, Ints tokens, const std::map<int64_t, OneState>& states) {
    Row& r = row(id);
    const int64_t count = static_cast<int64_t>(tokens.size());
    require(one_state() > 0 && r.states.length <= count && count <= r.slots(), "tokens that are not those of the row");
    for (int64_t i = 0; i < count; ++i) {
      require(tokens.data()[i] >= 0 && tokens.data()[i] < decoder_->model().vocab, "a token out of range");
    }
    std::map<int64_t, State> given;
    for (const auto& [length, one] : states) {
      require(length > 0 && length <= count && one.bytes() == one_state(), "a state that follows none of the tokens");
      given[length] = one.state;
    }
    r.states.restore(tokens.data(), count, given);
  }
  void release(int64_t id) {
    row(id);
    rows_.erase(id);
  }
  void shrink(int64_t id, int64_t slots) { row(id).shrink(slots); }

  // Keeps these provisional nodes, in order, behind `length` slots.
  void keep(int64_t id, int64_t length, Ints nodes) {
    Row& r = row(id);
    const int64_t n = static_cast<int64_t>(nodes.size()), room = r.slots();
    for (int64_t i = 0; i < n; ++i) {
      require(nodes.data()[i] >= i && length >= 0 && length + nodes.data()[i] < room,
              "keep: a node that is not there");
    }
    if (r.states) {
      const int64_t held = static_cast<int64_t>(r.states.tokens.size()) - r.states.length;
      require(length == r.states.length && (n == 0 || nodes.data()[n - 1] < held), "keep: a node that is not there");
    }
    nb::gil_scoped_release free;
    decoder_->keep(r, length, nodes.data(), n);
  }

  using Entry = std::tuple<int64_t, int64_t, Ints, Ints, int64_t>;

  // Entries: (row, committed length, parents of all provisional nodes, new tokens, num_logits).
  void extend(const std::vector<Entry>& entries, RowsOut logits) {
    std::vector<Append> appends;
    int64_t answers = 0;
    for (const auto& [id, length, parents, tokens, num_logits] : entries) {
      const int64_t total = static_cast<int64_t>(parents.size());
      const int64_t count = static_cast<int64_t>(tokens.size());
      Row& r = row(id);
      for (const Append& other : appends) require(other.row != &r, "extend: a row twice");
      require(count > 0 && count <= total && length >= 0, "extend: bad lengths");
      require(length + total - count <= r.slots(), "extend: slots that were never written");
      require(num_logits >= 0 && num_logits <= count, "extend: bad num_logits");
      for (int64_t i = 0; i < total; ++i) {
        require(parents.data()[i] >= -1 && parents.data()[i] < i, "extend: bad parent");
      }
      for (int64_t i = 0; i < count; ++i) {
        const int32_t token = tokens.data()[i];
        require(token >= 0 && token < decoder_->model().vocab, "extend: token out of range");
      }
      appends.push_back({&r, length, parents.data(), total - count, count, tokens.data(), num_logits});
      answers += num_logits;
    }
    require(static_cast<int64_t>(logits.shape(0)) == answers &&
                static_cast<int64_t>(logits.shape(1)) == round_up(decoder_->model().outputs, kLanes),
            "extend: wrong shape of logits");
    if (appends.empty()) return;
    nb::gil_scoped_release free;
    decoder_->extend(appends, logits.data(), static_cast<int64_t>(logits.shape(1)));
  }

 private:
  Row& row(int64_t id) {
    const auto at = rows_.find(id);
    require(at != rows_.end(), "no row " + std::to_string(id));
    return *at->second;
  }

  int64_t of_states(int64_t StatesShape::*size) const {
    const auto& shape = decoder_->shape().states;
    return shape ? (*shape).*size * static_cast<int64_t>(sizeof(float)) : 0;
  }

  std::vector<Bytes> keep_;
  std::unordered_map<int64_t, std::unique_ptr<Row>> rows_;
  int64_t last_ = 0;
  std::unique_ptr<Decoder> decoder_;
};

}  // namespace

void bind_sampling(nb::module_& m);
void bind_ngrams(nb::module_& m);  // bindings_sampling.cpp

void bind_faults(nb::module_& m);  // bindings_faults.cpp

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // what lives until the interpreter ends is no leak
  bind_faults(m);
  bind_sampling(m);
  bind_ngrams(m);
  m.def("kinds", [](const std::string& name) -> std::optional<std::string> {
    const Kind* kind = find_kind(name);
    if (!kind) return std::nullopt;
    return info(kind->format).name;
  }, nb::arg("kind"), "The format that holds a kind of weights exactly; None: it is not read.");
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const char* name :
         {"amx", "avx512vnni", "avxvnni", "avx2", "i8mm", "neon", "portable"}) {
      if (choose_kernels(name)) names.push_back(name);
    }
    return names;
  }, "Those that run here, best first.");
  m.def("packed_bytes", [](const std::string& format, int64_t rows, int64_t cols) {
    require(rows > 0 && cols > 0 && rows < (1ll << 31) && cols < (1ll << 31), "bad shape");
    return packed_bytes(format_of(format), rows, cols);
  }, nb::arg("format"), nb::arg("rows"), nb::arg("cols"));
  m.def("pack", &pack, nb::arg("kind"), nb::arg("data"), nb::arg("rows"), nb::arg("cols"),
        nb::arg("order").none(), nb::arg("format"), nb::arg("out"), nb::arg("threads"));
  m.def("unpack", &unpack, nb::arg("format"), nb::arg("packed"), nb::arg("cols"), nb::arg("first"),
        nb::arg("out"));
  m.def("read", &read_rows, nb::arg("kind"), nb::arg("data"), nb::arg("out"));
  m.def("product", &product, nb::arg("isa"), nb::arg("format"), nb::arg("packed"), nb::arg("rows"),
        nb::arg("x"), nb::arg("out"), nb::arg("add") = false, nb::arg("threads") = 1);
  nb::class_<OneState>(m, "State")
      .def_prop_ro("id", &OneState::id)
      .def("read", &OneState::read, nb::arg("out"));
  nb::class_<Native>(m, "Decoder")
      .def(nb::init<nb::dict, nb::dict, nb::dict, int, const std::vector<int>&, const std::string&>(),
           nb::arg("config"), nb::arg("matrices"), nb::arg("vectors"), nb::arg("threads"),
           nb::arg("cpus"), nb::arg("isa"))
      .def_prop_ro("isa", &Native::isa)
      .def_prop_ro("cache_bytes", &Native::cache_bytes)
      .def_prop_ro("state_bytes", &Native::one_state)
      .def_prop_ro("record_bytes", &Native::one_record)
      .def("states", &Native::states, nb::arg("rows"))
      .def("reusable", &Native::reusable, nb::arg("row"), nb::arg("length"))
      .def("open", &Native::open)
      .def("fork", &Native::fork, nb::arg("row"), nb::arg("slots"))
      .def("pages", &Native::pages, nb::arg("rows"))
      .def_prop_ro("page_bytes", &Native::page_bytes)
      .def("page_ids", &Native::page_ids, nb::arg("row"))
      .def("read_page", &Native::read_page, nb::arg("row"), nb::arg("page"), nb::arg("out"))
      .def("append_page", &Native::append_page, nb::arg("row"), nb::arg("data"))
      .def("states_of", &Native::states_of, nb::arg("row"))
      .def("make_state", &Native::make_state, nb::arg("data"))
      .def("restore_states", &Native::restore_states, nb::arg("row"), nb::arg("tokens"), nb::arg("states"))
      .def("release", &Native::release, nb::arg("row"))
      .def("shrink", &Native::shrink, nb::arg("row"), nb::arg("slots"))
      .def("keep", &Native::keep, nb::arg("row"), nb::arg("length"), nb::arg("nodes"))
      .def("extend", &Native::extend, nb::arg("entries"), nb::arg("logits"));
}
