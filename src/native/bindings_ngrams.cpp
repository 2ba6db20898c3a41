// TextIndex, SuccessorTable, Rates and Retriever of redwood._native; see redwood/algorithms/sssd.py,
// successors.py and retrieval.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "ngrams.h"
#include "retrieval.h"
#include "successors.h"

namespace nb = nanobind;
using namespace redwood;

namespace {

using Ids = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Probs = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

nb::dict followers_of(const TextIndex& index, const Places& places) {
  nb::dict grouped;
  for (const auto& [token, behind] : index.followers(places)) grouped[nb::cast(token)] = behind;
  return grouped;
}

void learn(SuccessorTable& table, const std::vector<int64_t>& tail,
           const std::vector<int64_t>& tokens, const std::vector<int64_t>& parents, Ids ids,
           Probs probs) {
  if (ids.shape(0) != tokens.size() || probs.shape(0) != tokens.size() ||
      ids.shape(1) != probs.shape(1))
    throw nb::value_error("a row of ids and of probs for every token");
  table.learn(tail, tokens, parents, ids.data(), probs.data(), ids.shape(1));
}

std::vector<std::pair<size_t, std::vector<std::pair<uint32_t, float>>>> find(
    const SuccessorTable& table, const std::vector<int64_t>& context) {
  std::vector<uint32_t> latest;
  for (size_t i = context.size(); i > 0 && latest.size() < SuccessorTable::ORDERS; --i)
    latest.push_back(static_cast<uint32_t>(context[i - 1]));
  std::vector<std::pair<size_t, std::vector<std::pair<uint32_t, float>>>> found;
  for (size_t order = latest.size(); order > 0; --order) {
    const Successors* entry = table.find(latest.data(), order);
    if (entry == nullptr) continue;
    found.emplace_back(order, std::vector<std::pair<uint32_t, float>>());
    for (size_t i = 0; i < Successors::KEPT && entry->probs[i] > 0.0f; ++i)
      found.back().second.emplace_back(entry->tokens[i], entry->probs[i]);
  }
  return found;
}

nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>> entries(const SuccessorTable& table) {
  const std::vector<Successors> all = table.entries();
  auto* bytes = new uint8_t[all.size() * sizeof(Successors) + 1];
  nb::capsule owner(bytes, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
  std::memcpy(bytes, static_cast<const void*>(all.data()), all.size() * sizeof(Successors));
  return {bytes, {all.size(), sizeof(Successors)}, owner};
}

void load(SuccessorTable& table, Bytes bytes, uint64_t rows) {
  if (bytes.shape(1) != sizeof(Successors)) throw nb::value_error("an entry has 64 bytes");
  std::vector<Successors> all(bytes.shape(0));
  std::memcpy(static_cast<void*>(all.data()), bytes.data(), all.size() * sizeof(Successors));
  table.load(all.data(), all.size(), rows);
}

auto draft(Retriever& retriever, size_t size, size_t max_branch, double least, const Rates& rates,
           const SuccessorTable* table, const Stored& stored,
           const std::vector<int64_t>& predicted, size_t run) {
  Retrieved made = retriever.draft(size, max_branch, least, rates, table, stored, predicted, run);
  return std::tuple(std::move(made.tokens), std::move(made.parents), std::move(made.chances),
                    std::move(made.sources));
}

void load_rates(Rates& rates, const std::vector<double>& hits, const std::vector<double>& trials) {
  if (hits.size() != rates.hits.size() || trials.size() != rates.trials.size())
    throw nb::value_error("another number of cells");
  rates.hits = hits, rates.trials = trials;
}

}  // namespace

void bind_ngrams(nb::module_& m) {
  nb::class_<TextIndex>(m, "TextIndex")
      .def(nb::init<>())
      .def("__len__", &TextIndex::size)
      .def("extend", &TextIndex::extend, nb::arg("token_ids"))
      .def("matches", &TextIndex::matches, nb::arg("suffix"))
      .def("followers", &followers_of, nb::arg("places"));
  nb::class_<SuccessorTable>(m, "SuccessorTable")
      .def(nb::init<size_t>(), nb::arg("max_bytes"))
      .def("__len__", &SuccessorTable::size)
      .def_prop_ro("nbytes", &SuccessorTable::bytes)
      .def_prop_ro("max_bytes", &SuccessorTable::max_bytes)
      .def_prop_ro("rows", &SuccessorTable::rows)
      .def("learn", &learn, nb::arg("tail"), nb::arg("token_ids"), nb::arg("parents"),
           nb::arg("ids"), nb::arg("probs"))
      .def("find", &find, nb::arg("context"))
      .def("clear", &SuccessorTable::clear)
      .def("entries", &entries)
      .def("load", &load, nb::arg("entries"), nb::arg("rows"));
  nb::class_<Rates>(m, "Rates")
      .def(nb::init<>())
      .def("rate", &Rates::rate, nb::arg("cell"), nb::arg("prior"))
      .def("count", &Rates::count, nb::arg("cell"), nb::arg("hit"))
      .def_static("prior_of", &Rates::prior_of, nb::arg("cell"))
      .def_prop_ro("hits", [](const Rates& rates) { return rates.hits; })
      .def_prop_ro("trials", [](const Rates& rates) { return rates.trials; })
      .def("load", &load_rates, nb::arg("hits"), nb::arg("trials"));
  nb::class_<Retriever>(m, "Retriever")
      .def(nb::init<bool>(), nb::arg("own_text"))
      .def("__len__", &Retriever::size)
      .def_prop_ro("index", &Retriever::index, nb::rv_policy::reference_internal)
      .def("extend", &Retriever::extend, nb::arg("token_ids"), nb::arg("rates"))
      .def("draft", &draft, nb::arg("size"), nb::arg("max_branch"), nb::arg("least"),
           nb::arg("rates"), nb::arg("table").none(), nb::arg("stored"), nb::arg("predicted"),
           nb::arg("run"));
}
