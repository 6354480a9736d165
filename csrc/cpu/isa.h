// The instruction sets that the kernels are compiled for, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace supclap {

struct Isa {
  std::string name;
  bool runs;  // on this processor
  const Kernels* kernels;
};

// Widest last.
const std::vector<Isa>& isas();

// The widest that runs, or the one chosen by hand.
const Isa& isa_in_use();
const Kernels& kernels();

// Raises std::invalid_argument for one that is not there.
void set_isa(const std::string& name);

}  // namespace supclap
