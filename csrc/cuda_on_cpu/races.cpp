// Races and reads of shared memory that nobody has written, found by what -fsanitize=thread makes of a kernel: a call before each access.
// The calls come here instead of to libtsan, which must not be linked.
//
// Ordered are two accesses of one thread, of one block with a __syncthreads between them, of one warp with a __syncwarp between them whose
// mask names both, and of two launches. Other blocks of the launch are ordered by fences alone: what a block did before a barrier, after
// which a thread of it came to a __threadfence and then to an atomic operation, comes before what another block does after a later atomic
// operation on the same place, a __threadfence of the same thread and a barrier. Two accesses that are not ordered, not both reads and not
// both atomic are a race, whatever the values are. Shuffles and votes order nothing, as CUDA has it.

#include "races.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("hidden")))

namespace cuda_on_cpu::races {
namespace {

constexpr int kLanes = 32;
constexpr size_t kGranule = 1;     // bytes that share a record: a record of two would take neighbours in byte-sized data for each other
constexpr size_t kPage = 1 << 12;  // bytes whose records are made together

struct Access {
  uint32_t stamp;  // which stretch between barriers, of which block; 0: none
  uint16_t thread, clock;
  const void* pc;

  int warp() const { return thread / kLanes; }
};

// Of the accesses of one kind to one place, as many as decide every later question.
struct History {
  Access last;
  Access other_lane;   // the newest of another lane of the last one's warp,
  Access other_warp;   // and of another warp, both in the last one's stretch;
  Access other_block;  // the newest of a block before the last one's
};

struct Record {
  History reads, writes, atomics;
  bool holds_nothing;
};

// What a block did in stretches [first, limit).
struct Past {
  uint32_t first, limit;
};

// A past that the running block knows in the stretches after `since`.
struct Known {
  Past past;
  uint32_t since;
};

struct Fences {  // of a thread
  uint32_t newest = 0;      // the stretch that its last one was in; 0: none
  std::vector<Past> heard;  // by its atomic operations since
};

using Page = std::array<Record, kPage / kGranule>;

struct Detector {
  uint32_t stamp = 0, block_stamp = 0, launch_stamp = 0;  // now; of the block's and the launch's first stretch
  std::array<std::array<std::array<uint16_t, kLanes>, kLanes>, kLanes> clocks;  // [warp][lane][other]: what a lane knows of the others
  std::unordered_map<const void*, std::vector<Past>> published;  // in this launch, by the place of an atomic operation
  std::vector<Known> known;                                      // to the running block
  std::array<Fences, kLanes * kLanes> fences;
  std::unordered_map<uintptr_t, Page*> pages;
  uintptr_t newest_number = ~uintptr_t{0};
  Page* newest = nullptr;

  Record& record(uintptr_t address) {
    const uintptr_t number = address / kPage;
    if (number != newest_number) {
      Page*& page = pages[number];
      if (page == nullptr) page = static_cast<Page*>(std::calloc(1, sizeof(Page)));
      if (page == nullptr) throw std::bad_alloc();
      newest_number = number;
      newest = page;
    }
    return (*newest)[address % kPage / kGranule];
  }
};

Detector& detector() {
  static Detector& instance = *new Detector;
  return instance;
}

// "kernel.cu:12 in f, called at kernel.cu:40"
std::string place(const void* pc) {
  const uintptr_t call = reinterpret_cast<uintptr_t>(pc) - 1;  // pc is where the access's call returns to
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(call), &info) || info.dli_fname == nullptr) return "an unknown place";
  char offset[32];
  std::snprintf(offset, sizeof offset, "0x%zx", static_cast<size_t>(call - reinterpret_cast<uintptr_t>(info.dli_fbase)));
  const std::string unknown = std::string(info.dli_fname) + "+" + offset;
  FILE* lines = popen(("addr2line -i -s -e '" + std::string(info.dli_fname) + "' " + offset + " 2>/dev/null").c_str(), "r");
  if (lines == nullptr) return unknown;
  std::string text;
  char line[512];
  while (std::fgets(line, sizeof line, lines)) {
    line[std::strcspn(line, " \n")] = '\0';
    if (line[0] != '?') text += (text.empty() ? "" : ", inlined at ") + std::string(line);
  }
  pclose(lines);
  return text.empty() ? unknown : text;
}

const char* verb(Kind kind) { return kind == Kind::kRead ? "read" : kind == Kind::kAtomic ? "atomic access" : "write"; }

std::string thread_text(int thread) {
  return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / kLanes) + ", lane " + std::to_string(thread % kLanes) + ")";
}

[[noreturn]] void report(const char* between, const void* address, const Access& a, Kind kind, const Access& b, Kind earlier) {
  char at[32];
  std::snprintf(at, sizeof at, "%p", address);
  fail((std::string("race between ") + between + " at address " + at + ": " + verb(kind) + " by " + thread_text(a.thread) + " at " +
        place(a.pc) + "; " + verb(earlier) + " by " + thread_text(b.thread) + " at " + place(b.pc))
           .c_str());
}

// Whether an access of another block comes before what happens now.
bool is_known(const Access& a) {
  const Detector& d = detector();
  return std::any_of(d.known.begin(), d.known.end(), [&](const Known& known) {
    return known.since < d.stamp && known.past.first <= a.stamp && a.stamp < known.past.limit;
  });
}

// An atomic operation hears what others have published there, and publishes what its thread had to tell at its last fence.
void exchange_pasts(const void* address, int thread) {
  Detector& d = detector();
  Fences& fences = d.fences[thread];
  std::vector<Past>& published = d.published[address];
  fences.heard.insert(fences.heard.end(), published.begin(), published.end());
  if (fences.newest == 0) return;
  published.push_back({d.block_stamp, fences.newest});
  for (const Known& known : d.known)
    if (known.since < fences.newest) published.push_back(known.past);
}

void check(const History& history, Kind earlier, const Access& now, Kind kind, const void* address) {
  const Detector& d = detector();
  const auto in_launch = [&](const Access& a) { return a.stamp != 0 && a.stamp >= d.launch_stamp; };
  if (in_launch(history.other_block) && !is_known(history.other_block)) report("blocks", address, now, kind, history.other_block, earlier);
  const Access& last = history.last;
  if (!in_launch(last)) return;
  if (last.stamp < d.block_stamp && !is_known(last)) report("blocks", address, now, kind, last, earlier);
  if (last.stamp != d.stamp) return;  // a barrier since
  if (last.warp() != now.warp()) report("warps", address, now, kind, last, earlier);
  if (history.other_warp.stamp != 0) report("warps", address, now, kind, history.other_warp, earlier);
  const auto& known = d.clocks[now.warp()][now.thread % kLanes];
  for (const Access* a : {&last, &history.other_lane})
    if (a->stamp != 0 && a->thread != now.thread && known[a->thread % kLanes] < a->clock)
      report("lanes of a warp", address, now, kind, *a, earlier);
}

void note(History& history, const Access& now) {
  const Detector& d = detector();
  Access& last = history.last;
  if (last.stamp != now.stamp) {
    if (last.stamp != 0 && last.stamp < d.block_stamp) history.other_block = last;
    history.other_lane = history.other_warp = Access{};
  } else if (last.warp() != now.warp()) {
    history.other_warp = last;
    history.other_lane = Access{};
  } else if (last.thread != now.thread) {
    history.other_lane = last;
  }
  last = now;
}

}  // namespace

void launch_begins() {
  Detector& d = detector();
  d.launch_stamp = ++d.stamp;
  d.published.clear();
}

void block_begins() {
  Detector& d = detector();
  d.block_stamp = ++d.stamp;
  d.known.clear();
  d.fences.fill({});
  for (auto& warp : d.clocks)
    for (int lane = 0; lane < kLanes; ++lane) {
      warp[lane].fill(0);
      warp[lane][lane] = 1;
    }
}

void block_barrier() { ++detector().stamp; }

void fence() {
  Detector& d = detector();
  Fences& fences = d.fences[cuda_on_cpu::running().thread];
  for (const Past& past : fences.heard) d.known.push_back({past, d.stamp});
  fences.heard.clear();
  fences.newest = d.stamp;
}

void warp_sync(int warp, unsigned mask) {
  auto& clocks = detector().clocks[warp];
  std::array<uint16_t, kLanes> joined = {};
  for (int lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1)
      for (int other = 0; other < kLanes; ++other) joined[other] = std::max(joined[other], clocks[lane][other]);
  for (int lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) {
      clocks[lane] = joined;
      if (++clocks[lane][lane] == 0) fail("more __syncwarp's in a block than the race detector counts");
    }
}

void shared_allocated(const void* address, size_t size) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = first; at < first + size; at += kGranule) {
    Record& record = detector().record(at);
    record = Record{};
    record.holds_nothing = true;
  }
}

void shared_freed(const void* address, size_t size) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = first; at < first + size; at += kGranule) detector().record(at) = Record{};
}

void access(const void* address, size_t size, Kind kind, const void* pc) {
  const Running running = cuda_on_cpu::running();
  const uintptr_t first = reinterpret_cast<uintptr_t>(address);
  if (!running.any || is_stack(first)) return;
  Detector& d = detector();
  const auto thread = static_cast<uint16_t>(running.thread);
  if (kind == Kind::kAtomic) exchange_pasts(address, thread);
  const Access now = {d.stamp, thread, d.clocks[thread / kLanes][thread % kLanes][thread % kLanes], pc};
  for (uintptr_t at = first & ~(kGranule - 1); at < first + size; at += kGranule) {
    const void* where = reinterpret_cast<const void*>(at);
    Record& record = d.record(at);
    check(record.writes, Kind::kWrite, now, kind, where);
    if (kind != Kind::kAtomic) check(record.atomics, Kind::kAtomic, now, kind, where);
    if (kind == Kind::kWrite || kind == Kind::kIssue) record.holds_nothing = kind == Kind::kIssue;
    if (record.holds_nothing && kind != Kind::kIssue)
      fail((std::string(verb(kind)) + " of shared memory that holds nothing yet, by " + thread_text(thread) + " at " + place(pc)).c_str());
    if (kind == Kind::kRead) {
      note(record.reads, now);
      continue;
    }
    check(record.reads, Kind::kRead, now, kind, where);
    note(kind == Kind::kAtomic ? record.atomics : record.writes, now);
  }
}

}  // namespace cuda_on_cpu::races

// --------------------------------------------------------------------------------------------------------------------
// What the compiler calls.

using cuda_on_cpu::races::access;
using cuda_on_cpu::races::Kind;

#define ACCESS(size)                                                                                                     \
  EXPORT void __tsan_read##size(void* address) { access(address, size, Kind::kRead, __builtin_return_address(0)); }      \
  EXPORT void __tsan_write##size(void* address) { access(address, size, Kind::kWrite, __builtin_return_address(0)); }
#define UNALIGNED(size)                                                                                                            \
  EXPORT void __tsan_unaligned_read##size(void* address) { access(address, size, Kind::kRead, __builtin_return_address(0)); }      \
  EXPORT void __tsan_unaligned_write##size(void* address) { access(address, size, Kind::kWrite, __builtin_return_address(0)); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
UNALIGNED(2)
UNALIGNED(4)
UNALIGNED(8)
UNALIGNED(16)

EXPORT void __tsan_read_range(void* address, size_t size) { access(address, size, Kind::kRead, __builtin_return_address(0)); }
EXPORT void __tsan_write_range(void* address, size_t size) { access(address, size, Kind::kWrite, __builtin_return_address(0)); }
EXPORT void __tsan_vptr_read(void**) {}
EXPORT void __tsan_vptr_update(void**, void*) {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}
EXPORT void __tsan_init() {}
