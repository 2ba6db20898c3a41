// The functions of redwood._native that pass over rows of the vocabulary; see redwood/rowmath.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>

#include "sampling.h"

namespace nb = nanobind;
using namespace redwood;

namespace {

template <class T>
using Line = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using LineOut = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class Array>
int64_t length(const Array& row) {
  if (row.size() == 0) throw std::invalid_argument("an empty row");
  return static_cast<int64_t>(row.size());
}

template <class T>
std::tuple<double, double, int64_t> range_of(Line<T> row) {
  const int64_t n = length(row);
  nb::gil_scoped_release free;
  const Range held = row_range(row.data(), n);
  return {held.low, held.high, held.best};
}

template <class T>
double weigh_row(Line<T> row, double high, double temperature, LineOut out) {
  const int64_t n = length(row);
  if (length(out) != n) throw std::invalid_argument("wrong size of out");
  nb::gil_scoped_release free;
  return weigh(row.data(), n, high, temperature, out.data());
}

double truncate_row(LineOut weights, double mass, int64_t top_k, double top_p, double min_p) {
  const int64_t n = length(weights);
  nb::gil_scoped_release free;
  return truncate(weights.data(), n, mass, top_k, top_p, min_p);
}

int64_t draw_from(Line<double> weights, double uniform) {
  const int64_t n = length(weights);
  nb::gil_scoped_release free;
  return draw(weights.data(), n, uniform);
}

std::tuple<std::vector<int64_t>, std::vector<double>> race_row(Line<double> weights, uint64_t key,
                                                              uint64_t position) {
  const int64_t n = length(weights);
  std::tuple<std::vector<int64_t>, std::vector<double>> found;
  nb::gil_scoped_release free;
  race(weights.data(), n, {key, position}, std::get<0>(found), std::get<1>(found));
  return found;
}

void uniforms_at(uint64_t key, uint64_t position, Line<int64_t> tokens, LineOut out) {
  if (out.size() != tokens.size()) throw std::invalid_argument("wrong size of out");
  const Noise noise{key, position};
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens.data()[i] < 0) throw std::invalid_argument("a token below 0");
    out.data()[i] = noise.uniform(tokens.data()[i]);
  }
}

void log_of_row(Line<double> row, LineOut out) {
  if (out.size() != row.size()) throw std::invalid_argument("wrong size of out");
  log_all(row.data(), static_cast<int64_t>(row.size()), out.data());
}

// Whether every value of all rows is finite; else the results mean nothing.
bool best_few_of(nb::ndarray<const float, nb::ndim<2>, nb::device::cpu> rows,
                 nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> ids,
                 nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> probs) {
  if (rows.shape(0) != ids.shape(0) || rows.shape(0) != probs.shape(0) ||
      ids.shape(1) != probs.shape(1) || rows.stride(1) != 1)
    throw std::invalid_argument("wrong shapes");
  nb::gil_scoped_release free;
  const size_t k = ids.shape(1);
  bool finite = true;
  for (size_t i = 0; i < rows.shape(0); ++i) {
    finite = best_few(rows.data() + static_cast<int64_t>(i) * rows.stride(0),
                      static_cast<int64_t>(rows.shape(1)), static_cast<int64_t>(k),
                      ids.data() + i * k, probs.data() + i * k) &&
             finite;
  }
  return finite;
}

}  // namespace

void bind_sampling(nb::module_& m) {
  m.def("row_range", &range_of<float>, nb::arg("row"));
  m.def("row_range", &range_of<double>, nb::arg("row"));
  m.def("best_few", &best_few_of, nb::arg("rows"), nb::arg("ids"), nb::arg("probs"));
  m.def("weigh", &weigh_row<float>, nb::arg("row"), nb::arg("high"), nb::arg("temperature"),
        nb::arg("out"));
  m.def("weigh", &weigh_row<double>, nb::arg("row"), nb::arg("high"), nb::arg("temperature"),
        nb::arg("out"));
  m.def("truncate", &truncate_row, nb::arg("weights"), nb::arg("mass"), nb::arg("top_k"),
        nb::arg("top_p"), nb::arg("min_p"));
  m.def("draw", &draw_from, nb::arg("weights"), nb::arg("uniform"));
  m.def("race", &race_row, nb::arg("weights"), nb::arg("key"), nb::arg("position"));
  m.def("uniforms_at", &uniforms_at, nb::arg("key"), nb::arg("position"), nb::arg("tokens"),
        nb::arg("out"));
  m.def("log", &log_of_row, nb::arg("row"), nb::arg("out"));
}
