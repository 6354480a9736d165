// What shim.cpp and async.cpp know of the fibers of a launch.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "async.h"
#include "shim.h"

#if SHIM_TELLS_TSAN  // these files are not instrumented themselves: they are no part of the kernels
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#define SHIM_TSAN(...) __VA_ARGS__
#else
#define SHIM_TSAN(...)
#endif

namespace shim {

// While one lives, the sanitizer sees nothing of what fibers and scheduler hand each other.
struct Unseen {
#if SHIM_TELLS_TSAN
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unseen() {}
  ~Unseen() {}
#endif
};

enum State { kRuns, kAtBlock, kAtGroup, kAtWarp, kExchanges, kAtGrid, kPolls, kDone };
// Lockstep: every block a step at a time. Greedy: a block runs until it waits for another one.
enum Schedule { kAscending, kPermutedOrder, kGreedyDescending, kSchedules };

struct Copy {  // of 16 bytes
  void* to;
  const void* from;
  bool there;
};

struct Fiber {
  Thread seen;
  void* stack_pointer = nullptr;
  void* sanitizer = nullptr;
  State state = kRuns;
  unsigned mask = 0;  // lanes it waits for at a warp barrier
  bool phase_block = 0, phase_group = 0, phase_warp = 0, phase_grid = 0, phase_exchange = 0;
  std::function<bool()> ready;                  // what it polls
  std::vector<std::vector<Wgmma>> products{1};  // under way, by commit; the last one is open
  std::vector<std::vector<Copy>> copies{1};     // the same of 16-byte copies
  alignas(16) unsigned char left[2][64];        // for other lanes
};

struct Tags {  // addresses through which barriers order accesses
  char at[2];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Tags> warps, groups;
  Tags tags;
  std::unique_ptr<unsigned char[]> memory;
  size_t live = 0;
};

struct Launch {
  std::vector<std::unique_ptr<Block>> blocks;
  const std::function<void()>* body = nullptr;
  std::vector<std::pair<Fiber*, std::function<void()>>> later;
  Fiber* current = nullptr;
  void* main_stack = nullptr;
  void* main_sanitizer = nullptr;
  Tags grid;
  char start, end;
  unsigned seed = 1;
};

extern Launch* running;

bool is_removed(Site site);
// The running fiber waits at a barrier; `tag` is the address its accesses are ordered by.
void wait(State state, char* tag);
// The running fiber waits until ready(); the caller orders its accesses.
void wait_until(std::function<bool()> ready);
// Whether copies arrive at once.
bool at_once();
// Runs act() at once, or when nothing else can go on, as the running fiber.
void later(std::function<void()> act);
Block& own_block();

}  // namespace shim
