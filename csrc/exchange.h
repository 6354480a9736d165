// Tensors as PyTorch hands them out without a copy: the exchange table of DLPack 1.x, whose layout
// is an ABI, so nothing of torch is included. A tensor that requires a gradient is handed out, too.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace supclap {

// DLPack's DLTensor.
struct TensorView {
  void* data;
  int32_t device_type, device_index;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;

  void* start() const { return static_cast<char*>(data) + byte_offset; }
};

constexpr int32_t kOnCpu = 1, kOnCuda = 2;
constexpr uint8_t kInteger = 0, kFloat = 2, kBfloat = 4;

// DLPack's DLPackExchangeAPI.
struct ExchangeTable {
  uint32_t major, minor;
  ExchangeTable* older;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*view)(void* object, TensorView* out);
  int (*stream)(int32_t device_type, int32_t device_index, void** out);
};

// The table of torch.Tensor, or null where this PyTorch has none.
const ExchangeTable* exchange_table();

// Fills `out`; false where a tensor has no plain memory.
bool view_of(PyObject* tensor, TensorView& out);

}  // namespace supclap
