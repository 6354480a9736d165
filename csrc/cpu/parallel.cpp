// PyTorch's products run on the OpenMP library that its wheel carries. A second pool would fight
// with the spinning workers of the first, so `parallel` borrows that library (its GOMP_ entry
// points, which GNU's and LLVM's runtimes share) when it is in the process, and starts
// threads of its own when it is not.
#include "parallel.h"

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace supclap {
namespace {

struct Runtime {
  void (*team)(void (*)(void*), void*, unsigned, unsigned) = nullptr;  // GOMP_parallel
  int (*thread_index)() = nullptr;                                     // omp_get_thread_num
  int (*team_size)() = nullptr;                                        // omp_get_num_threads
  std::string name = "std::thread";
};

#if defined(__linux__)
int visit(dl_phdr_info* info, size_t, void* data) {
  const std::string path = info->dlpi_name ? info->dlpi_name : "";
  const std::string file = path.substr(path.rfind('/') + 1);
  const char* names[] = {"libgomp", "libomp", "libiomp5"};
  if (std::none_of(std::begin(names), std::end(names),
                   [&](const char* name) { return file.rfind(name, 0) == 0; }))
    return 0;
  void* library = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
  if (!library) return 0;
  auto* runtime = static_cast<Runtime*>(data);
  runtime->team = reinterpret_cast<decltype(runtime->team)>(dlsym(library, "GOMP_parallel"));
  runtime->thread_index =
      reinterpret_cast<decltype(runtime->thread_index)>(dlsym(library, "omp_get_thread_num"));
  runtime->team_size =
      reinterpret_cast<decltype(runtime->team_size)>(dlsym(library, "omp_get_num_threads"));
  if (runtime->team && runtime->thread_index && runtime->team_size) {
    runtime->name = path;
    return 1;
  }
  runtime->team = nullptr;
  return 0;
}
#endif

const Runtime& runtime() {
  static const Runtime found = [] {
    Runtime result;
#if defined(__linux__)
    dl_iterate_phdr(visit, &result);
#endif
    return result;
  }();
  return found;
}

struct Job {
  int64_t count;
  void (*body)(void*, int64_t);
  void* data;
};

void run_share(const Job& job, int64_t index, int64_t size) {
  const int64_t end = job.count * (index + 1) / size;
  for (int64_t n = job.count * index / size; n < end; ++n) job.body(job.data, n);
}

void team_member(void* data) {
  run_share(*static_cast<const Job*>(data), runtime().thread_index(), runtime().team_size());
}

}  // namespace

void parallel(int64_t count, int threads, void (*body)(void*, int64_t), void* data) {
  Job job{count, body, data};
  const int64_t team = std::min<int64_t>(count, threads);
  if (team <= 1) return run_share(job, 0, 1);
  if (runtime().team) return runtime().team(team_member, &job, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int64_t n = 1; n < team; ++n) others.emplace_back(run_share, std::cref(job), n, team);
  run_share(job, 0, team);
  for (auto& other : others) other.join();
}

const char* parallel_runtime() { return runtime().name.c_str(); }

}  // namespace supclap
