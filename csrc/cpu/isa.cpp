#include "isa.h"

#include <stdexcept>

namespace supclap {

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> found{{"baseline", true, &baseline::kernels()}};
#if SUPCLAP_HAVE_AVX2
    found.push_back({"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
                     &avx2::kernels()});
#endif
#if SUPCLAP_HAVE_AVX512
    found.push_back({"avx512",
                     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
                     &avx512::kernels()});
#endif
    return found;
  }();
  return all;
}

namespace {

const Isa* widest() {
  const Isa* best = nullptr;
  for (const Isa& isa : isas())
    if (isa.runs) best = &isa;
  return best;
}

const Isa*& active() {
  static const Isa* isa = widest();
  return isa;
}

}  // namespace

const Isa& isa_in_use() { return *active(); }

const Kernels& kernels() { return *active()->kernels; }

void set_isa(const std::string& name) {
  for (const Isa& isa : isas())
    if (isa.name == name && isa.runs) {
      active() = &isa;
      return;
    }
  throw std::invalid_argument("instruction set '" + name +
                              "' is not compiled in, or not of this processor");
}

}  // namespace supclap
