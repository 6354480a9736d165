// The scheduler behind shim.h. x86-64 only: fibers are switched in assembler.
#include "shim.h"

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define SHIM_TSAN(...) __VA_ARGS__
#else
#define SHIM_TSAN(...)
#endif

extern "C" void shim_switch(void** from, void* to);
asm(R"(.text
.globl shim_switch
.type shim_switch,@function
shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace shim {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr unsigned kPermuted = 181;  // a prime: n -> (181 n + seed) % threads visits every fiber

enum State { kRuns, kAtBlock, kAtWarp, kExchanges, kAtGrid, kDone };
// Lockstep: every block a step at a time. Greedy: a block runs until it waits for another one.
enum Schedule { kAscending, kPermutedOrder, kGreedyDescending, kSchedules };

struct Fiber {
  Thread seen;
  void* stack_pointer = nullptr;
  void* sanitizer = nullptr;
  State state = kRuns;
  unsigned mask = 0;                    // lanes it waits for at a warp barrier
  bool phase_block = 0, phase_warp = 0, phase_grid = 0, phase_exchange = 0;
  alignas(16) unsigned char left[2][64];  // for other lanes
};

struct Tags {  // addresses through which barriers order accesses
  char at[2];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Tags> warps;
  Tags tags;
  std::unique_ptr<unsigned char[]> memory;
  size_t live = 0;
};

struct Launch {
  std::vector<std::unique_ptr<Block>> blocks;
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  void* main_stack = nullptr;
  void* main_sanitizer = nullptr;
  Tags grid;
  char start, end;
  unsigned seed = 1;
};

Launch* running = nullptr;
Schedule schedule = kAscending;
std::string removed;
int processors = 5;

std::vector<std::unique_ptr<char[]>> free_stacks, used_stacks;

char* take_stack() {
  if (free_stacks.empty()) free_stacks.emplace_back(new char[kStack]);
  used_stacks.push_back(std::move(free_stacks.back()));
  free_stacks.pop_back();
  return used_stacks.back().get();
}

bool is_removed(Site site) {
  if (removed.empty()) return false;
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line) == removed;
}

SHIM_UNSEEN void to_scheduler() {
  SHIM_TSAN(__tsan_switch_to_fiber(running->main_sanitizer, 1);)
  shim_switch(&running->current->stack_pointer, running->main_stack);
}

SHIM_UNSEEN void wait(State state, char* tag) {
  SHIM_TSAN(__tsan_release(tag);)
  running->current->state = state;
  to_scheduler();
  SHIM_TSAN(__tsan_acquire(tag);)
  (void)tag;
}

SHIM_UNSEEN Block& own_block() {
  const dim3 at = running->current->seen.block, of = running->current->seen.blocks;
  const size_t index = at.x + size_t(of.x) * (at.y + size_t(of.y) * at.z);
  return *running->blocks[index];
}

SHIM_UNSEEN void enter() {
  SHIM_TSAN(__tsan_acquire(&running->start);)
  (*running->body)();
  SHIM_TSAN(__tsan_release(&running->end);)
  running->current->state = kDone;
  to_scheduler();
  abort();
}

SHIM_UNSEEN std::unique_ptr<Block> new_block(dim3 at, dim3 blocks, unsigned threads,
                                             size_t shared) {
  auto block = std::make_unique<Block>();
  block->fibers.resize(threads);
  block->warps.resize(threads / 32 + 1);
  block->live = threads;
  block->memory.reset(new unsigned char[shared + 128]);
  memset(block->memory.get(), 0xff, shared + 128);  // NaN
  const auto base = (reinterpret_cast<uintptr_t>(block->memory.get()) + 127) & ~uintptr_t(127);
  for (unsigned n = 0; n < threads; ++n) {
    Fiber& fiber = block->fibers[n];
    fiber.seen = {dim3(n), at, dim3(threads), blocks, reinterpret_cast<unsigned char*>(base)};
    fiber.seen.thread.y = fiber.seen.thread.z = 0;
    char* stack = take_stack();
    auto** top = reinterpret_cast<void**>(
        ((reinterpret_cast<uintptr_t>(stack) + kStack) & ~uintptr_t(15)) - 64);
    memset(top, 0, 64);
    top[6] = reinterpret_cast<void*>(&enter);
    fiber.stack_pointer = top;
    SHIM_TSAN(fiber.sanitizer = __tsan_create_fiber(0);)
  }
  return block;
}

// Opens the warp barriers and exchanges of a block that are complete.
SHIM_UNSEEN bool open_warps(Block& block) {
  bool opened = false;
  for (size_t first = 0; first < block.fibers.size(); first += 32) {
    const size_t end = std::min(block.fibers.size(), first + 32);
    for (size_t n = first; n < end; ++n) {
      const State state = block.fibers[n].state;
      if (state != kAtWarp && state != kExchanges) continue;
      const unsigned mask = block.fibers[n].mask;
      bool complete = true;
      for (size_t m = first; m < end; ++m)
        if (mask >> (m - first) & 1)
          complete &= block.fibers[m].state == state && block.fibers[m].mask == mask;
      if (!complete) continue;
      for (size_t m = first; m < end; ++m)
        if (mask >> (m - first) & 1) block.fibers[m].state = kRuns;
      opened = true;
    }
  }
  return opened;
}

SHIM_UNSEEN bool open_block(Block& block) {
  bool waiting = false;
  for (const Fiber& fiber : block.fibers) {
    if (fiber.state != kAtBlock && fiber.state != kDone) return false;
    waiting |= fiber.state == kAtBlock;
  }
  for (Fiber& fiber : block.fibers)
    if (fiber.state == kAtBlock) fiber.state = kRuns;
  return waiting;
}

// Runs every fiber of a block that can run, once. Whether anything happened.
SHIM_UNSEEN bool step(Block& block) {
  const size_t count = block.fibers.size();
  bool progress = false;
  for (size_t n = 0; n < count; ++n) {
    const size_t at = schedule == kAscending          ? n
                      : schedule == kGreedyDescending ? count - 1 - n
                                                      : (n * kPermuted + running->seed) % count;
    Fiber& fiber = block.fibers[at];
    if (fiber.state != kRuns) continue;
    running->current = &fiber;
    SHIM_TSAN(__tsan_switch_to_fiber(fiber.sanitizer, 1);)
    shim_switch(&running->main_stack, fiber.stack_pointer);
    running->current = nullptr;
    block.live -= fiber.state == kDone;
    progress = true;
  }
  progress |= open_warps(block);
  progress |= open_block(block);
  running->seed = running->seed * 1664525u + 1013904223u;
  return progress;
}

SHIM_UNSEEN bool open_grid() {
  bool waiting = false;
  for (const auto& block : running->blocks)
    for (const Fiber& fiber : block->fibers) {
      if (fiber.state != kAtGrid && fiber.state != kDone) return false;
      waiting |= fiber.state == kAtGrid;
    }
  for (auto& block : running->blocks)
    for (Fiber& fiber : block->fibers)
      if (fiber.state == kAtGrid) fiber.state = kRuns;
  return waiting;
}

// Runs the blocks that are there until all are done.
SHIM_UNSEEN void run_blocks() {
  for (size_t live = 1; live;) {
    bool progress = false;
    live = 0;
    const size_t count = running->blocks.size();
    for (size_t n = 0; n < count; ++n) {
      auto& block = running->blocks[schedule == kGreedyDescending ? count - 1 - n : n];
      if (!block) continue;
      while (block->live && step(*block)) {
        progress = true;
        if (schedule != kGreedyDescending) break;
      }
      live += block->live;
    }
    if (!live) break;
    const bool all = count && running->blocks[0] && running->blocks[count - 1];
    progress |= all && open_grid();
    if (!progress) throw std::runtime_error("shim: deadlock: threads wait for some that never come");
  }
}

SHIM_UNSEEN void retire(std::unique_ptr<Block>& block) {
  SHIM_TSAN(for (Fiber& fiber : block->fibers) __tsan_destroy_fiber(fiber.sanitizer);)
  block.reset();
}

SHIM_UNSEEN void return_stacks() {
  for (auto& stack : used_stacks) free_stacks.push_back(std::move(stack));
  used_stacks.clear();
}

}  // namespace

SHIM_UNSEEN const Thread& self() { return running->current->seen; }

SHIM_UNSEEN void block_barrier(Site site) {
  if (is_removed(site)) return;
  wait(kAtBlock, &own_block().tags.at[running->current->phase_block ^= 1]);
}

SHIM_UNSEEN void warp_barrier(Site site, unsigned mask) {
  if (is_removed(site)) return;
  Fiber& fiber = *running->current;
  fiber.mask = mask;
  wait(kAtWarp, &own_block().warps[fiber.seen.thread.x / 32].at[fiber.phase_warp ^= 1]);
}

SHIM_UNSEEN void grid_barrier(Site site) {
  if (is_removed(site)) return;
  wait(kAtGrid, &running->grid.at[running->current->phase_grid ^= 1]);
}

SHIM_UNSEEN void exchange(unsigned mask, const void* value, size_t size,
                          const void* (&others)[32]) {
  Fiber& fiber = *running->current;
  if (size > sizeof fiber.left[0]) throw std::runtime_error("shim: too much to exchange");
  const int phase = fiber.phase_exchange ^= 1;
  memcpy(fiber.left[phase], value, size);
  // Registers pass, but memory is not ordered: no tag.
  fiber.mask = mask;
  fiber.state = kExchanges;
  to_scheduler();
  auto& fibers = own_block().fibers;
  const size_t first = fiber.seen.thread.x / 32 * 32;
  for (size_t lane = 0; lane < 32; ++lane)
    others[lane] = first + lane < fibers.size() ? fibers[first + lane].left[phase] : nullptr;
}

SHIM_UNSEEN bool arrive_last(unsigned* counter, unsigned blocks) {
  unsigned old = __atomic_load_n(counter, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(counter, &old, old >= blocks - 1 ? 0 : old + 1, false,
                                      __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
  }
  SHIM_TSAN(__tsan_release(counter); if (old == blocks - 1) __tsan_acquire(counter);)
  return old == blocks - 1;
}

SHIM_UNSEEN void launch(dim3 blocks, unsigned threads, size_t shared, bool cooperative,
                        const std::function<void()>& body) {
  Launch launch;
  running = &launch;
  launch.body = &body;
  SHIM_TSAN(launch.main_sanitizer = __tsan_get_current_fiber(); __tsan_release(&launch.start);)
  const size_t count = size_t(blocks.x) * blocks.y * blocks.z;
  launch.blocks.resize(count);
  try {
    for (size_t n = 0; n < count; ++n) {
      const size_t index = schedule == kGreedyDescending ? count - 1 - n : n;
      const dim3 at(index % blocks.x, index / blocks.x % blocks.y, index / blocks.x / blocks.y);
      launch.blocks[index] = new_block(at, blocks, threads, shared);
      if (cooperative) continue;
      run_blocks();
      retire(launch.blocks[index]);
      return_stacks();
    }
    if (cooperative) run_blocks();
  } catch (...) {
    running = nullptr;
    return_stacks();
    throw;
  }
  for (auto& block : launch.blocks)
    if (block) retire(block);
  SHIM_TSAN(__tsan_acquire(&launch.end);)
  return_stacks();
  running = nullptr;
}

int schedules() { return kSchedules; }
void set_schedule(int wanted) { schedule = Schedule(wanted % kSchedules); }
void remove_barrier(const char* file_and_line) { removed = file_and_line; }
int multiprocessors() { return processors; }
void set_multiprocessors(int count) { processors = count; }

}  // namespace shim
