// What the files of the Python module share.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>
#include <vector>

#include "decoder.h"

namespace nb = nanobind;

namespace redwood {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Throws an argument error unless `holds`.
void require(bool holds, const std::string& message);

// A packed format by its name; an argument error if there is none.
Format format_of(const std::string& name);

// A model of these weights, whose bytes `keep` holds alive.
Model make_model(nb::dict config, nb::dict matrices, nb::dict vectors, std::vector<Bytes>& keep);

}  // namespace redwood
