// Implements async.h. ThreadSanitizer does not instrument this file: it is told what is read and
// written.
#include "async.h"

#include <array>
#include <stdexcept>

#include "fibers.h"

#if SHIM_TELLS_TSAN
extern "C" void __tsan_read_range(void* at, unsigned long size);
extern "C" void __tsan_write_range(void* at, unsigned long size);
#endif

namespace shim {
namespace {

// Bytes 4-6 of an address in shared memory are exclusive-ored with bytes 7-9.
unsigned char* swizzled(unsigned char* shared, uint32_t address) {
  return shared + (address ^ (address >> 7 & 7) << 4);
}

[[maybe_unused]] char* tag(Mbarrier& at, int parity) {
  return reinterpret_cast<char*>(&at) + parity;
}

void complete(Mbarrier& at) {
  if (at.pending == 0 && at.bytes == 0) {
    at.phase ^= 1;
    at.pending = uint8_t(at.count);
  }
}

struct Operand {
  uint32_t start, group;  // first byte; bytes from 8 rows to the next 8
  explicit Operand(uint64_t descriptor)
      : start(uint32_t(descriptor & 0x3fff) << 4), group(uint32_t(descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1) throw std::runtime_error("shim: no 128-byte swizzle");
  }
  // Reads 16 elements of a row.
  void read(float (&out)[16], int row, float (*widen)(uint16_t)) const {
    const uint32_t from = start + row / 8 * group + row % 8 * 128;
    for (int piece = 0; piece < 2; ++piece) {
      unsigned char* at = swizzled(self().shared, from + 16 * piece);
      SHIM_TSAN(__tsan_read_range(at, 16);)
      for (int n = 0; n < 8; ++n) {
        uint16_t bits;
        memcpy(&bits, at + 2 * n, 2);
        out[8 * piece + n] = widen(bits);
      }
    }
  }
};

void compute(const Wgmma& one) {
  const Operand a(one.a), b(one.b);
  const int lane = self().thread.x % 32, warp = self().thread.x % 128 / 32;
  float left[2][16], right[16];
  for (int u = 0; u < 2; ++u) a.read(left[u], 16 * warp + 8 * u + lane / 4, one.widen);
  for (int q = 0; q < 32; ++q)
    for (int n = 0; n < 2; ++n) {
      b.read(right, 8 * q + lane % 4 * 2 + n, one.widen);
      for (int u = 0; u < 2; ++u) {
        float& c = one.c[4 * q + 2 * u + n];
        float sum = one.adds ? c : 0;
        for (int k = 0; k < 16; ++k) sum += left[u][k] * right[k];
        c = sum;
      }
    }
}

void act(const Copy& one) {
  SHIM_TSAN(__tsan_write_range(one.to, 16);)
  SHIM_TSAN(if (one.there) __tsan_read_range(const_cast<void*>(one.from), 16);)
  if (one.there)
    memcpy(one.to, one.from, 16);
  else
    memset(one.to, 0, 16);
}

// Copies the box at four coordinates, of 64 columns, one row after the other.
void copy(void* to, const TensorMap& map, std::array<int64_t, 4> at, Mbarrier& full) {
  unsigned char* shared = self().shared;
  const uint32_t start = shared_address(to);
  if (start % 1024 || map.box[0] != 64) throw std::runtime_error("shim: no swizzled box");
  const int rows = map.box[1] * map.box[2] * map.box[3];
  const auto act = [=, map = map, &full] {
    const auto* from = static_cast<const uint16_t*>(map.start);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < 64; ++c) {
        const int box[] = {c, r % map.box[1], r / map.box[1] % map.box[2],
                           r / map.box[1] / map.box[2]};
        bool inside = true;
        int64_t element = 0;
        for (int n = 0; n < 4; ++n) {
          const int64_t place = at[n] + box[n];
          inside = inside && place >= 0 && place < map.size[n];
          element += place * map.stride[n];
        }
        const uint16_t value = inside ? from[element] : 0;
        memcpy(swizzled(shared, start + r * 128 + 2 * c), &value, 2);
      }
    SHIM_TSAN(__tsan_write_range(to, rows * 128);)
    SHIM_TSAN(__tsan_release(tag(full, full.phase));)
    full.bytes -= rows * 128;
    complete(full);
  };
  std::function<void()> kept;
  {
    const Unseen unseen;
    kept = act;
  }
  later(std::move(kept));
}

}  // namespace

void copy_async(void* to, const void* from, bool there) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    throw std::runtime_error("shim: not 16 aligned bytes");
  const Copy one{to, from, there};
  if (at_once())
    act(one);
  else
    running->current->copies.back().push_back(one);
}
void copies_commit() { running->current->copies.emplace_back(); }
void copies_wait(int pending) {
  auto& groups = running->current->copies;  // the last one is open
  while (int(groups.size()) > pending + 1) {
    for (const Copy& one : groups.front()) act(one);
    groups.erase(groups.begin());
  }
}

void mbarrier_init(Mbarrier& at, int count) { at = {uint16_t(count), uint8_t(count), 0, 0}; }

void mbarrier_arrive(Mbarrier& at) {
  SHIM_TSAN(__tsan_release(tag(at, at.phase));)
  if (at.pending-- == 0) throw std::runtime_error("shim: an arrival too many");
  complete(at);
}

void mbarrier_expect(Mbarrier& at, int bytes) {
  at.bytes += bytes;
  mbarrier_arrive(at);
}

void mbarrier_wait(Site site, Mbarrier& at, int parity) {
  if (is_removed(site)) return;
  wait_until([&] { return at.phase != parity; });
  SHIM_TSAN(__tsan_acquire(tag(at, parity));)
}

void copy_box(void* to, const TensorMap& map, int row, int column, Mbarrier& full) {
  copy(to, map, {column, row, 0, 0}, full);
}
void copy_groups(void* to, const TensorMap& map, int group, int column, Mbarrier& full) {
  copy(to, map, {column, 0, 0, group}, full);
}

void wgmma_m64n256k16(const Wgmma& one) { running->current->products.back().push_back(one); }
void wgmma_commit() { running->current->products.emplace_back(); }
void wgmma_wait(int pending) {
  auto& groups = running->current->products;  // the last one is open
  while (int(groups.size()) > pending + 1) {
    for (const Wgmma& one : groups.front()) compute(one);
    groups.erase(groups.begin());
  }
  warp_barrier({"", 0}, ~0u);  // a warp waits together: what one lane says afterwards holds for all
}

}  // namespace shim
