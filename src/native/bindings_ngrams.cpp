// TextIndex of redwood._native; see redwood/algorithms/sssd.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "ngrams.h"

namespace nb = nanobind;
using namespace redwood;

namespace {

nb::dict followers_of(const TextIndex& index, const Places& places) {
  nb::dict grouped;
  for (const auto& [token, behind] : index.followers(places)) grouped[nb::cast(token)] = behind;
  return grouped;
}

auto likely_of(const TextIndex& index, const std::vector<int64_t>& suffix, size_t size,
               const std::vector<double>& rates, size_t max_branch, double least) {
  Drafted made = index.likely(suffix, size, rates, max_branch, least);
  return std::tuple(std::move(made.tokens), std::move(made.parents), std::move(made.chances),
                    std::move(made.bins));
}

}  // namespace

void bind_ngrams(nb::module_& m) {
  nb::class_<TextIndex>(m, "TextIndex")
      .def(nb::init<>())
      .def("__len__", &TextIndex::size)
      .def("extend", &TextIndex::extend, nb::arg("token_ids"))
      .def("matches", &TextIndex::matches, nb::arg("suffix"))
      .def("followers", &followers_of, nb::arg("places"))
      .def("likely", &likely_of, nb::arg("suffix"), nb::arg("size"), nb::arg("rates"),
           nb::arg("max_branch"), nb::arg("least"));
}
