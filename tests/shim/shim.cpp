// The scheduler behind shim.h. x86-64 only: fibers are switched in assembler.
#include "shim.h"

#include <sys/stat.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "fibers.h"

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

Launch* running = nullptr;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr size_t kGroup = 128;       // threads of a warpgroup
constexpr unsigned kPermuted = 181;  // a prime: n -> (181 n + seed) % threads visits every fiber

Schedule schedule = kAscending;
std::string removed, race_log;
int processors = 5;

// What a fiber runs on: a stack, and to the sanitizer a thread. Slow to make, so they are used
// again; a stack stays with its thread. In a launch whose blocks run one after the other, blocks
// that are kSets apart share them, so races between neighbours are seen.
constexpr size_t kSets = 4;
struct Lane {
  std::unique_ptr<char[]> stack;
  void* sanitizer = nullptr;
};
std::vector<Lane> lanes;

void make_lanes(size_t count) {
  while (lanes.size() < count) {
    lanes.push_back({std::unique_ptr<char[]>(new char[kStack]), nullptr});
    SHIM_TSAN(lanes.back().sanitizer = __tsan_create_fiber(0);)
  }
}

// Whether the sanitizer has written a report to the log, which was empty before (a mutant's run).
bool raced() {
  struct stat log;
  return !race_log.empty() && stat(race_log.c_str(), &log) == 0 && log.st_size > 0;
}

void to_scheduler() {
  SHIM_TSAN(__tsan_switch_to_fiber(running->main_sanitizer, 1);)
  shim_switch(&running->current->stack_pointer, running->main_stack);
}

void enter() {
  SHIM_TSAN(__tsan_acquire(&running->start);)
  (*running->body)();
  SHIM_TSAN(__tsan_release(&running->end);)
  running->current->state = kDone;
  to_scheduler();
  abort();
}

std::unique_ptr<Block> new_block(dim3 at, dim3 blocks, unsigned threads, size_t shared) {
  auto block = std::make_unique<Block>();
  block->fibers.resize(threads);
  block->warps.resize(threads / 32 + 1);
  block->groups.resize(threads / kGroup + 1);
  block->live = threads;
  block->memory.reset(new unsigned char[shared + 128]);
  memset(block->memory.get(), 0xff, shared + 128);  // NaN
  const auto base = (reinterpret_cast<uintptr_t>(block->memory.get()) + 127) & ~uintptr_t(127);
  for (unsigned n = 0; n < threads; ++n)
    block->fibers[n].seen = {dim3(n, 0, 0), at, dim3(threads), blocks,
                             reinterpret_cast<unsigned char*>(base)};
  return block;
}

// Puts a block's fibers at the start of the kernel, on lanes from `first`.
void start(Block& block, size_t first) {
  for (size_t n = 0; n < block.fibers.size(); ++n) {
    Lane& lane = lanes[first + n];
    auto** top = reinterpret_cast<void**>(
        ((reinterpret_cast<uintptr_t>(lane.stack.get()) + kStack) & ~uintptr_t(15)) - 64);
    memset(top, 0, 64);
    top[6] = reinterpret_cast<void*>(&enter);
    block.fibers[n].stack_pointer = top;
    block.fibers[n].sanitizer = lane.sanitizer;
  }
}

// Opens the warp barriers and exchanges of a block that are complete.
bool open_warps(Block& block) {
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

// Opens the barrier of `count` threads from `first` on, if all that are not done wait at it.
bool open_barrier(Block& block, size_t first, size_t count, State state) {
  bool waiting = false;
  const auto begin = block.fibers.begin() + first, end = begin + count;
  for (auto fiber = begin; fiber != end; ++fiber) {
    if (fiber->state != state && fiber->state != kDone) return false;
    waiting |= fiber->state == state;
  }
  for (auto fiber = begin; fiber != end; ++fiber)
    if (fiber->state == state) fiber->state = kRuns;
  return waiting;
}

// Whether a fiber's poll succeeded.
bool poll(Block& block) {
  bool any = false;
  for (Fiber& fiber : block.fibers)
    if (fiber.state == kPolls && fiber.ready()) {
      fiber.state = kRuns;
      any = true;
    }
  return any;
}

// Does one of the things that were left for later, as the fiber that left it.
bool do_later() {
  const Unseen unseen;
  auto& all = running->later;
  if (all.empty()) return false;
  const auto which = schedule == kGreedyDescending ? all.begin() : all.end() - 1;
  const auto [fiber, act] = std::move(*which);
  all.erase(which);
  SHIM_TSAN(__tsan_switch_to_fiber(fiber->sanitizer, 1);)
  act();
  SHIM_TSAN(__tsan_switch_to_fiber(running->main_sanitizer, 1);)
  return true;
}

// Runs every fiber of a block that can run, once. Whether anything happened.
bool step(Block& block) {
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
    // One report says it, and more take minutes; where none is expected, asking takes longer.
    if (!removed.empty() && raced()) throw std::runtime_error("shim: race");
  }
  progress |= open_warps(block);
  progress |= open_barrier(block, 0, count, kAtBlock);
  for (size_t first = 0; first + kGroup <= count; first += kGroup)
    progress |= open_barrier(block, first, kGroup, kAtGroup);
  progress |= poll(block);
  running->seed = running->seed * 1664525u + 1013904223u;
  return progress;
}

bool open_grid() {
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

// Runs blocks [first, end) until all are done.
void run_blocks(size_t first, size_t end) {
  for (size_t live = 1; live;) {
    bool progress = false;
    live = 0;
    for (size_t n = first; n < end; ++n) {
      Block& block = *running->blocks[schedule == kGreedyDescending ? first + end - 1 - n : n];
      while (block.live && step(block)) {
        progress = true;
        if (schedule != kGreedyDescending) break;
      }
      live += block.live;
    }
    if (!live) break;
    if (!progress) progress = do_later();
    if (end - first == running->blocks.size()) progress |= open_grid();
    if (!progress)
      throw std::runtime_error("shim: deadlock: threads wait for some that never come");
  }
  if (raced()) throw std::runtime_error("shim: race");
  if (!running->later.empty()) throw std::runtime_error("shim: a copy that nobody waited for");
}

}  // namespace

bool is_removed(Site site) {
  return !removed.empty() && std::string(site.file) + ":" + std::to_string(site.line) == removed;
}

void wait(State state, char* tag) {
  SHIM_TSAN(__tsan_release(tag);)
  running->current->state = state;
  to_scheduler();
  SHIM_TSAN(__tsan_acquire(tag);)
  (void)tag;
}

void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  running->current->ready = std::move(ready);
  running->current->state = kPolls;
  to_scheduler();
}

bool at_once() { return schedule == kAscending; }
void later(std::function<void()> act) {
  if (at_once()) return act();
  const Unseen unseen;
  running->later.emplace_back(running->current, std::move(act));
}

Block& own_block() {
  const dim3 at = running->current->seen.block, of = running->current->seen.blocks;
  const size_t index = at.x + size_t(of.x) * (at.y + size_t(of.y) * at.z);
  return *running->blocks[index];
}

const Thread& self() { return running->current->seen; }

void block_barrier(Site site) {
  if (is_removed(site)) return;
  wait(kAtBlock, &own_block().tags.at[running->current->phase_block ^= 1]);
}

void warpgroup_barrier(Site site) {
  if (is_removed(site)) return;
  Fiber& fiber = *running->current;
  wait(kAtGroup, &own_block().groups[fiber.seen.thread.x / kGroup].at[fiber.phase_group ^= 1]);
}

void warp_barrier(Site site, unsigned mask) {
  if (is_removed(site)) return;
  Fiber& fiber = *running->current;
  fiber.mask = mask;
  wait(kAtWarp, &own_block().warps[fiber.seen.thread.x / 32].at[fiber.phase_warp ^= 1]);
}

void grid_barrier(Site site) {
  if (is_removed(site)) return;
  wait(kAtGrid, &running->grid.at[running->current->phase_grid ^= 1]);
}

void exchange(unsigned mask, const void* value, size_t size, const void* (&others)[32]) {
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

bool arrive_last(unsigned* counter, unsigned blocks) {
  unsigned old = __atomic_load_n(counter, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(counter, &old, old >= blocks - 1 ? 0 : old + 1, false,
                                      __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
  }
  SHIM_TSAN(__tsan_release(counter); if (old == blocks - 1) __tsan_acquire(counter);)
  return old == blocks - 1;
}

bool recording = false;
std::vector<std::function<void()>> recorded;

void record(bool on) {
  recording = on;
  if (on) recorded.clear();
}

void replay() {
  for (const auto& again : recorded) again();
}

void launch(dim3 blocks, unsigned threads, size_t shared, bool cooperative,
            const std::function<void()>& body) {
  if (recording) {
    const auto again = [=] { launch(blocks, threads, shared, cooperative, body); };
    recorded.push_back(again);
  }
  Launch launch;
  running = &launch;
  launch.body = &body;
  SHIM_TSAN(launch.main_sanitizer = __tsan_get_current_fiber();)
  const size_t count = size_t(blocks.x) * blocks.y * blocks.z;
  for (size_t n = 0; n < count; ++n) {
    const dim3 at(n % blocks.x, n / blocks.x % blocks.y, n / blocks.x / blocks.y);
    launch.blocks.push_back(new_block(at, blocks, threads, shared));
  }
  make_lanes((cooperative ? count : kSets) * threads);
  SHIM_TSAN(__tsan_release(&launch.start);)
  try {
    if (cooperative) {
      for (size_t n = 0; n < count; ++n) start(*launch.blocks[n], n * threads);
      run_blocks(0, count);
    } else {
      for (size_t n = 0; n < count; ++n) {
        const size_t index = schedule == kGreedyDescending ? count - 1 - n : n;
        start(*launch.blocks[index], n % kSets * threads);
        run_blocks(index, index + 1);
      }
    }
  } catch (...) {
    SHIM_TSAN(__tsan_acquire(&launch.end);)
    const Unseen unseen;  // threads were left where they are: nothing orders what they allocated
    launch.blocks.clear();
    launch.later.clear();
    running = nullptr;
    throw;
  }
  SHIM_TSAN(__tsan_acquire(&launch.end);)
  running = nullptr;
}

int schedules() { return kSchedules; }
void set_schedule(int wanted) { schedule = Schedule(wanted % kSchedules); }
void remove_barrier(const char* file_and_line, const char* log) {
  removed = file_and_line;
  race_log = log;
}
int multiprocessors() { return processors; }
void set_multiprocessors(int count) { processors = count; }

}  // namespace shim
