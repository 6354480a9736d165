// Threads for the CPU kernels, without an OpenMP runtime of our own beside PyTorch's.
#pragma once

#include <cstdint>

namespace supclap {

// Calls body(data, n) for n = 0 .. count - 1 on at most `threads` threads. Every index gets its own
// call, and which thread makes it must not matter to the result.
void parallel(int64_t count, int threads, void (*body)(void*, int64_t), void* data);

// The runtime in use: the path of the OpenMP library already in the process, or "std::thread".
const char* parallel_runtime();

}  // namespace supclap
