// The scheduler: fibers for threads, meetings of lanes, barriers of blocks, shared memory, asynchronous copies.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_on_cpu.hpp"
#include "races.hpp"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// --------------------------------------------------------------------------------------------------------------------
// Switching stacks: by hand where we can, since ucontext makes a system call each time.

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)

// Saves the callee's registers and the stack pointer, then takes up another.
extern "C" void cuda_on_cpu_switch(void** save, void* resume);
asm(R"(
.text
.p2align 4
.globl cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");

struct Context {
  void* stack_pointer = nullptr;

  void start(char* low, size_t size, void (*entry)()) {
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(low) + size) & ~uintptr_t{15});
    *--top = nullptr;  // where entry would return to
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  static void change(Context& from, Context& to) { cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer); }
};

#else

#include <ucontext.h>

struct Context {
  ucontext_t context;

  void start(char* low, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = low;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};

#endif

namespace cuda_on_cpu {
namespace {

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kStaggerBytes = 448;              // apart, or the tops of all stacks would share a few cache sets
constexpr size_t kMaxStaticShared = 48 << 10;      // what a kernel may declare
constexpr size_t kMaxDynamicShared = 227 << 10;    // what a block can have (sm_90), with an attribute that this runtime does not ask for

// A thread's stack, with a page before it that nobody may touch.
struct Stack {
  char* low;

  explicit Stack(size_t guard) {
    void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) throw std::bad_alloc();
    low = static_cast<char*>(memory) + guard;
  }
};

enum class State { kRunnable, kInWarp, kAtBarrier, kReturned };

struct Copy {
  char* target;
  int bytes;
  bool landed;
  char data[16];
};

struct Thread {
  Context context;
  State state;
  dim3 index;
  Site site;         // where it waits
  const char* name;  // for what
  Meeting meeting;
  unsigned mask;
  uint64_t value, result;
  void (*compute)(void* const*);
  int source;
  bool predicate;
  std::vector<std::vector<Copy>> copies;  // groups, oldest first; the last one is open
  void* fake_stack;                       // ASan's
};

struct SharedMemory {
  std::unique_ptr<char, decltype(&std::free)> memory{nullptr, std::free};
  size_t size = 0;

  void allocate(size_t bytes, size_t alignment) {
    forget();
    void* fresh = nullptr;
    if (posix_memalign(&fresh, std::max(alignment, sizeof(void*)), bytes) != 0) throw std::bad_alloc();
    memory.reset(static_cast<char*>(fresh));
    size = bytes;
    std::memset(fresh, 0xff, bytes);  // NaN as a float of any width, −1 as an int
    races::shared_allocated(fresh, bytes);
  }
  void forget() {
    if (memory) races::shared_freed(memory.get(), size);
  }
  ~SharedMemory() { forget(); }
};

struct Runtime {
  std::mutex mutex;  // one launch at a time
  uint64_t seed = 0;
  std::minstd_rand random;
  std::vector<Stack> stacks;
  bool stacks_are_dirty = false;  // a failed launch left threads in the middle of their work

  dim3 grid, block, block_index;
  unsigned num_threads = 0, block_number = 0;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;

  std::vector<Thread> threads;
  std::map<const void*, SharedMemory> shared;
  SharedMemory dynamic;
  size_t static_bytes = 0;
  unsigned num_returned = 0;
  Tally tally;

  Context host;
  int current = -1;  // thread that runs, −1: the host
  std::string error;
  void* host_fake_stack = nullptr;
  const void* host_stack_low = nullptr;
  size_t host_stack_size = 0;

  Thread& me() { return threads[current]; }
  bool shuffled() const { return seed > 1; }
  void order(std::vector<unsigned>& numbers) {
    if (seed == 1) std::reverse(numbers.begin(), numbers.end());
    if (shuffled()) std::shuffle(numbers.begin(), numbers.end(), random);
  }

  void run_grid(size_t shared_bytes);
  void run_block(size_t shared_bytes);
  bool run_pass(std::vector<unsigned>& warps, std::vector<unsigned>& lanes);
  void resume(unsigned thread);
  void release_barrier();
};

Runtime& runtime() {
  static Runtime& instance = *new Runtime;  // outlives whatever is destroyed at exit
  return instance;
}

std::string text_of(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string text_of(dim3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string hexadecimal(unsigned value) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", value);
  return text;
}

// "0–3, 7"
std::string ranges(const std::vector<unsigned>& numbers) {
  std::string text;
  for (size_t i = 0, end; i < numbers.size(); i = end) {
    for (end = i + 1; end < numbers.size() && numbers[end] == numbers[end - 1] + 1;) ++end;
    text += (i ? ", " : "") + std::to_string(numbers[i]);
    if (end - i > 1) text += "-" + std::to_string(numbers[end - 1]);
  }
  return text;
}

std::string where(const Thread& thread) {
  switch (thread.state) {
    case State::kReturned: return "returned";
    case State::kInWarp: return std::string("in ") + thread.name + " at " + text_of(thread.site) + " with mask " + hexadecimal(thread.mask);
    case State::kAtBarrier: return std::string("in ") + thread.name + " at " + text_of(thread.site);
    case State::kRunnable: break;
  }
  return "running";
}

// The threads of the block by what they wait for.
std::string where_all(const std::vector<Thread>& threads) {
  std::map<std::string, std::vector<unsigned>> groups;
  for (unsigned i = 0; i < threads.size(); ++i) groups[where(threads[i])].push_back(i);
  std::string text;
  for (const auto& [what, members] : groups)
    text += (text.empty() ? "" : "; ") + std::to_string(members.size()) + " " + what + " (threads " + ranges(members) + ")";
  return text;
}

// --------------------------------------------------------------------------------------------------------------------
// Between the host's stack and the threads'.

void switch_to_host(bool for_good) {
  Runtime& r = runtime();
  Thread& thread = r.me();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &thread.fake_stack, r.host_stack_low, r.host_stack_size);
#endif
  (void)for_good;
  Context::change(thread.context, r.host);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(thread.fake_stack, nullptr, nullptr);
#endif
}

void thread_entry() {
  Runtime& r = runtime();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &r.host_stack_low, &r.host_stack_size);
#endif
  r.body(r.argument);
  r.me().state = State::kReturned;
  ++r.num_returned;
  switch_to_host(true);
  std::abort();  // nobody resumes a thread that has returned
}

[[noreturn]] void fail_here(const std::string& what) {
  Runtime& r = runtime();
  const Thread& thread = r.me();
  r.error = what + " [thread " + text_of(thread.index) + " of block " + text_of(r.block_index) + "]";
  switch_to_host(true);
  std::abort();
}

}  // namespace

[[noreturn]] void fail(const char* what) { fail_here(what); }

Running running() { return {runtime().current >= 0, runtime().current, runtime().block_number}; }

bool is_stack(uintptr_t address) {
  // The stacks of a grid's threads are all that one finds near the running one: it can read no other thread's by rights.
  const Runtime& r = runtime();
  if (r.current < 0) return false;
  const uintptr_t low = reinterpret_cast<uintptr_t>(r.stacks[r.current].low);
  return address - low < kStackBytes;
}

namespace {

void Runtime::resume(unsigned thread) {
  current = static_cast<int>(thread);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&host_fake_stack, stacks[thread].low, kStackBytes);
#endif
  Context::change(host, threads[thread].context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(host_fake_stack, nullptr, nullptr);
#endif
  current = -1;
}

bool Runtime::run_pass(std::vector<unsigned>& warps, std::vector<unsigned>& lanes) {
  bool ran = false;
  order(warps);
  for (unsigned warp : warps) {
    if (shuffled()) order(lanes);
    for (unsigned lane : lanes) {
      const unsigned thread = warp * kLanes + lane;
      if (thread >= num_threads || threads[thread].state != State::kRunnable) continue;
      resume(thread);
      ran = true;
      if (!error.empty()) throw Misuse(error);
    }
  }
  return ran;
}

void Runtime::release_barrier() {
  for (const Thread& thread : threads) {
    const Thread& first = threads.front();
    const bool together = thread.state == State::kAtBarrier && thread.site.line == first.site.line &&
                          std::strcmp(thread.site.file, first.site.file) == 0;
    if (!together) throw Misuse("deadlock in block " + text_of(block_index) + ": " + where_all(threads));
  }
  tally = {0, false, true};
  for (Thread& thread : threads) {
    tally.count += thread.predicate;
    tally.any |= thread.predicate;
    tally.all &= thread.predicate;
    thread.state = State::kRunnable;
  }
  races::block_barrier();
}

void Runtime::run_block(size_t shared_bytes) {
  shared.clear();
  static_bytes = 0;
  dynamic.allocate(shared_bytes, 16);
  threads.resize(num_threads);
  num_returned = 0;
  for (unsigned i = 0; i < num_threads; ++i) {
    Thread& thread = threads[i];
    thread.state = State::kRunnable;
    thread.index = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
    thread.copies.clear();
    thread.fake_stack = nullptr;
    thread.context.start(stacks[i].low, kStackBytes - i % 64 * kStaggerBytes, thread_entry);
  }
  races::block_begins();
  std::vector<unsigned> warps((num_threads + kLanes - 1) / kLanes), lanes(kLanes);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  order(lanes);
  if (seed == 1) std::reverse(warps.begin(), warps.end());  // a pass reverses them again
  while (num_returned < num_threads)
    if (!run_pass(warps, lanes)) release_barrier();
}

void Runtime::run_grid(size_t shared_bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  while (stacks.size() < num_threads) stacks.emplace_back(page);
#ifdef __SANITIZE_ADDRESS__
  if (stacks_are_dirty)
    for (const Stack& stack : stacks) __asan_unpoison_memory_region(stack.low, kStackBytes);
#endif
  stacks_are_dirty = true;
  error.clear();
  random.seed(seed);
  races::launch_begins();
  std::vector<unsigned> blocks(size_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  order(blocks);
  for (unsigned number : blocks) {
    block_number = number;
    block_index = dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
    run_block(shared_bytes);
  }
  stacks_are_dirty = false;
}

}  // namespace

// --------------------------------------------------------------------------------------------------------------------
// The interface of the header.

void set_seed(uint64_t seed) { runtime().seed = seed; }

cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* argument) {
  Runtime& r = runtime();
  const std::lock_guard<std::mutex> lock(r.mutex);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = uint64_t{block.x} * block.y * block.z;
  if (blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (threads == 0 || block.x > kMaxThreads || block.y > kMaxThreads || block.z > 64 || threads > kMaxThreads)
    return cudaErrorInvalidConfiguration;
  if (shared_bytes > kMaxDynamicShared) return cudaErrorInvalidValue;
  if (blocks > UINT32_MAX) throw Misuse("a grid of " + std::to_string(blocks) + " blocks is more than this runtime runs");
  r.grid = grid;
  r.block = block;
  r.num_threads = static_cast<unsigned>(threads);
  r.body = body;
  r.argument = argument;
  r.run_grid(shared_bytes);
  return cudaSuccess;
}

dim3 thread_index() { return runtime().me().index; }
dim3 block_index() { return runtime().block_index; }
dim3 block_size() { return runtime().block; }
dim3 grid_size() { return runtime().grid; }

void* shared_memory(const void* key, size_t size, size_t alignment) {
  Runtime& r = runtime();
  SharedMemory& memory = r.shared[key];
  if (!memory.memory) {
    r.static_bytes += size;
    if (r.static_bytes > kMaxStaticShared) fail_here("more than 48 KiB of static shared memory");
    memory.allocate(size, alignment);
  }
  return memory.memory.get();
}

void* dynamic_shared_memory() { return runtime().dynamic.memory.get(); }

Tally block_barrier(const char* name, bool predicate, Site site) {
  Thread& thread = runtime().me();
  thread.state = State::kAtBarrier;
  thread.name = name;
  thread.site = site;
  thread.predicate = predicate;
  switch_to_host(false);
  return runtime().tally;
}

namespace {

unsigned lane_now() { return runtime().current % kLanes; }

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// The results of all, once the last lane of the mask has come.
void resolve(Meeting kind, Thread* warp, unsigned mask) {
  uint64_t total = kind == Meeting::kMin || kind == Meeting::kAnd ? UINT32_MAX : 0;
  if (kind == Meeting::kMinSigned) total = INT32_MAX;
  if (kind == Meeting::kMaxSigned) total = static_cast<uint32_t>(INT32_MIN);
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint32_t value = static_cast<uint32_t>(warp[lane].value), sum = static_cast<uint32_t>(total);
    switch (kind) {
      case Meeting::kBallot: total |= uint64_t{value != 0} << lane; break;
      case Meeting::kAdd: total = sum + value; break;
      case Meeting::kMin: total = std::min(sum, value); break;
      case Meeting::kMax: total = std::max(sum, value); break;
      case Meeting::kMinSigned: total = static_cast<uint32_t>(std::min(static_cast<int32_t>(sum), static_cast<int32_t>(value))); break;
      case Meeting::kMaxSigned: total = static_cast<uint32_t>(std::max(static_cast<int32_t>(sum), static_cast<int32_t>(value))); break;
      case Meeting::kAnd: total = sum & value; break;
      case Meeting::kOr: total = sum | value; break;
      case Meeting::kXor: total = sum ^ value; break;
      case Meeting::kSync: case Meeting::kTogether: case Meeting::kShuffle: case Meeting::kMatch: break;
    }
  }
  if (kind == Meeting::kTogether) {
    void* arguments[kLanes];
    for (unsigned lane = 0; lane < kLanes; ++lane) arguments[lane] = reinterpret_cast<void*>(warp[lane].value);
    warp[0].compute(arguments);
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& thread = warp[lane];
    thread.result = total & UINT32_MAX;
    if (kind == Meeting::kShuffle) {
      if (!(mask >> thread.source & 1))
        fail_here(std::string(thread.name) + " at " + text_of(thread.site) + ": lane " + std::to_string(lane) + " reads lane " +
                  std::to_string(thread.source) + ", which is not in the mask " + hexadecimal(mask));
      thread.result = warp[thread.source].value;
    } else if (kind == Meeting::kMatch) {
      thread.result = 0;
      for (unsigned other = 0; other < kLanes; ++other)
        if (mask >> other & 1 && warp[other].value == thread.value) thread.result |= uint64_t{1} << other;
    }
    thread.state = State::kRunnable;
  }
}

}  // namespace

uint64_t warp_meeting(Meeting kind, const char* name, unsigned mask, uint64_t value, int source, Site site) {
  Runtime& r = runtime();
  Thread& thread = r.me();
  const unsigned lane = lane_now(), first = r.current - lane;
  Thread* const warp = &r.threads[first];
  const auto refuse = [&](const std::string& why) {
    fail_here(std::string(name) + " at " + text_of(site) + " with mask " + hexadecimal(mask) + ": " + why);
  };
  if (!(mask >> lane & 1)) refuse("the caller, lane " + std::to_string(lane) + ", is not in its mask");
  thread.meeting = kind;
  thread.name = name;
  thread.site = site;
  thread.mask = mask;
  thread.value = value;
  thread.source = source;
  bool complete = true;
  for (unsigned other = 0; other < kLanes; ++other) {
    if (!(mask >> other & 1) || other == lane) continue;
    if (first + other >= r.num_threads) refuse("the block has no lane " + std::to_string(other) + " in this warp");
    const Thread& peer = warp[other];
    const bool waits_elsewhere =
        peer.state == State::kAtBarrier || peer.state == State::kReturned ||
        (peer.state == State::kInWarp && peer.mask >> lane & 1 && (peer.mask != mask || peer.meeting != kind || !same(peer.site, site)));
    if (waits_elsewhere) refuse("lane " + std::to_string(lane) + " is here, lane " + std::to_string(other) + " " + where(peer));
    complete &= peer.state == State::kInWarp && peer.mask == mask && same(peer.site, site);
  }
  thread.state = State::kInWarp;
  if (!complete) {
    switch_to_host(false);
    return thread.result;
  }
  resolve(kind, warp, mask);
  if (kind == Meeting::kSync) races::warp_sync(static_cast<int>(first / kLanes), mask);
  return thread.result;
}

void warp_together(const char* name, void* argument, void (*compute)(void* const*), const char* file, int line) {
  runtime().me().compute = compute;
  warp_meeting(Meeting::kTogether, name, 0xffffffff, reinterpret_cast<uint64_t>(argument), 0, {file, line});
}

void warp_addresses(const char* name, const void* mine, const void* (&all)[kLanes], const char* file, int line) {
  struct Addresses {
    const void* mine;
    const void** all;
  } addresses = {mine, all};
  if (reinterpret_cast<uintptr_t>(mine) % 16 != 0)
    fail_here(std::string(name) + " at " + text_of(Site{file, line}) + ": an address is not at a multiple of 16");
  const auto gather = [](void* const* lanes) {
    for (unsigned lane = 0; lane < kLanes; ++lane)
      for (unsigned other = 0; other < kLanes; ++other)
        static_cast<const Addresses*>(lanes[lane])->all[other] = static_cast<const Addresses*>(lanes[other])->mine;
  };
  warp_together(name, &addresses, gather, file, line);
}

namespace {

int clamped(int lane, int source, int width) { return lane / width == source / width && source >= 0 ? source : lane; }

int checked_width(int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail_here("a shuffle's width must be a power of two up to 32");
  return width;
}

}  // namespace

int lane_of_shuffle(int lane, int width) {
  const int here = static_cast<int>(lane_now());
  return here / checked_width(width) * width + (lane & (width - 1));
}
int lane_of_shuffle_up(int distance, int width) {
  const int here = static_cast<int>(lane_now());
  return clamped(here, here - distance, checked_width(width));
}
int lane_of_shuffle_down(int distance, int width) {
  const int here = static_cast<int>(lane_now());
  return clamped(here, here + distance, checked_width(width));
}
int lane_of_shuffle_xor(int bits, int width) {
  const int here = static_cast<int>(lane_now()), source = here ^ bits;
  return source / checked_width(width) <= here / width ? source : here;  // an earlier segment's lane is read, a later one's is not
}

// --------------------------------------------------------------------------------------------------------------------
// Asynchronous copies: the data is what the source holds at issue, and lands at the wait, or half of it at once. To the race detector the
// target is written at both times, and holds nothing in between.

namespace {

void land(Copy& copy) {
  if (!copy.landed) std::memcpy(copy.target, copy.data, static_cast<size_t>(copy.bytes));
  copy.landed = true;
}

}  // namespace

void cp_async(void* target, const void* source, int bytes, int source_bytes, const char* file, int line) {
  Runtime& r = runtime();
  Thread& thread = r.me();
  const std::string site = text_of(Site{file, line});
  if (bytes != 4 && bytes != 8 && bytes != 16) fail_here("cp.async at " + site + ": size must be 4, 8 or 16");
  if (source_bytes < 0 || source_bytes > bytes) fail_here("cp.async at " + site + ": the source's size must be at most the target's");
  if ((reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source)) % static_cast<uintptr_t>(bytes) != 0)
    fail_here("cp.async at " + site + ": an address is not at a multiple of the size");
  const void* pc = __builtin_return_address(0);
  Copy copy = {static_cast<char*>(target), bytes, false, {}};
  std::memcpy(copy.data, source, static_cast<size_t>(source_bytes));
  races::access(source, static_cast<size_t>(source_bytes), races::Kind::kRead, pc);
  races::access(target, static_cast<size_t>(bytes), races::Kind::kIssue, pc);
  if (r.shuffled() && r.random() & 64) land(copy);
  if (thread.copies.empty()) thread.copies.emplace_back();
  thread.copies.back().push_back(copy);
}

void cp_async_commit() {
  Thread& thread = runtime().me();
  if (thread.copies.empty()) thread.copies.emplace_back();
  thread.copies.emplace_back();
}

void cp_async_wait(int pending) {
  auto& groups = runtime().me().copies;
  const void* pc = __builtin_return_address(0);
  while (groups.size() > static_cast<size_t>(pending) + 1) {
    for (Copy& copy : groups.front()) {
      land(copy);
      races::access(copy.target, static_cast<size_t>(copy.bytes), races::Kind::kWrite, pc);
    }
    groups.erase(groups.begin());
  }
}

void note_atomic(void* address, size_t size) { races::access(address, size, races::Kind::kAtomic, __builtin_return_address(0)); }
void note_fence() { races::fence(); }

}  // namespace cuda_on_cpu
