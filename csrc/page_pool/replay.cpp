// Replays a trace of calls from standard input and prints what each answers; tests/test_page_pool.py compiles it with sanitizers.
//
// The first line is "num_pages page_size hash_mask". Each other line is a call, where a list is its length and then its items:
//   allocate LIST | extend ID N | extend_tokens ID LIST | free ID | fork ID | truncate ID N | commit | abandon | pages ID
//   step IDS COUNTS | step_tokens IDS COUNTS TOKENS | hash BEFORE LIST
// Each answer is one line, and ends with the number of free pages. Every call first runs out of memory, at its first allocation, then at
// its second, and so on until it has enough: what that leaves behind shows in the answers.

#include <cstdlib>
#include <iostream>
#include <limits>
#include <new>
#include <sstream>

#include "page_pool.hpp"

using namespace fastattn;

namespace {

constexpr int64_t kPlenty = std::numeric_limits<int64_t>::max();
int64_t allocations_left = kPlenty;

}  // namespace

void* operator new(std::size_t size) {
  if (allocations_left-- <= 0) throw std::bad_alloc();
  if (void* memory = std::malloc(size ? size : 1)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

template <typename Call>
auto starved(Call call) {
  struct Refill {
    ~Refill() { allocations_left = kPlenty; }
  };
  for (int64_t allowed = 0;; ++allowed) {
    try {
      const Refill refill;
      allocations_left = allowed;
      return call();
    } catch (const std::bad_alloc&) {
    }
  }
}

int64_t number(std::istream& in) {
  int64_t value = 0;
  in >> value;
  return value;
}

std::vector<int64_t> list(std::istream& in) {
  std::vector<int64_t> values(number(in));
  for (int64_t& value : values) in >> value;
  return values;
}

Ints view(const std::vector<int64_t>& values) { return {values.data(), static_cast<int64_t>(values.size())}; }

void print(const std::vector<int32_t>& values, int64_t size) {
  for (int64_t i = 0; i < size; ++i) std::cout << values.at(i) << ' ';
  std::cout << "| ";
}

void print(const Copies& copies) {
  for (const auto& [source, target] : copies) std::cout << source << ' ' << target << ' ';
  std::cout << "| ";
}

void print(const PagePool& pool, const PoolStep& step) {
  std::cout << step.number << ' ' << step.max_seqlen_q << ' ' << step.num_changes << " | ";
  print(step.copies);
  print(pool.cache_seqlens->values, step.batch);
  print(pool.seqlens_k->values, step.batch);
  print(pool.cu_seqlens_q->values, step.batch + 1);
  print(pool.slots->values, step.total_q);
  print(pool.positions->values, step.total_q);
  if (step.num_changes != PagePool::kUncounted) print(pool.changes->values, 2 * step.num_changes);
  print(pool.page_table->values, step.batch * pool.page_table->shape[1]);
}

void call(PagePool& pool, const std::string& name, std::istream& in) {
  if (name == "allocate") {
    const auto tokens = list(in);
    std::cout << starved([&] { return pool.allocate(view(tokens)); }) << ' ';
  } else if (name == "extend") {
    const int64_t id = number(in);
    const int64_t count = number(in);
    print(starved([&] { return pool.extend(id, count, nullptr); }));
  } else if (name == "extend_tokens") {
    const int64_t id = number(in);
    const auto tokens = list(in);
    print(starved([&] { return pool.extend(id, view(tokens).size, tokens.data()); }));
  } else if (name == "free") {
    const int64_t id = number(in);
    starved([&] { pool.free(id); });
  } else if (name == "fork") {
    const int64_t id = number(in);
    std::cout << starved([&] { return pool.fork(id); }) << ' ';
  } else if (name == "truncate") {
    const int64_t id = number(in);
    const int64_t length = number(in);
    starved([&] { pool.truncate(id, length); });
  } else if (name == "commit") {
    starved([&] { pool.commit(); });
  } else if (name == "abandon") {
    starved([&] { pool.abandon(); });
  } else if (name == "hash") {
    const int64_t before = number(in);
    std::cout << pool.hash(before, list(in).data()) << ' ';
  } else if (name == "pages") {
    const auto& pages = pool.pages(number(in));
    print(pages, static_cast<int64_t>(pages.size()));
  } else if (name == "step" || name == "step_tokens") {
    const auto ids = list(in), counts = list(in), tokens = name == "step" ? std::vector<int64_t>{} : list(in);
    const Ints known = view(tokens);
    print(pool, starved([&] { return pool.step(view(ids), view(counts), name == "step" ? nullptr : &known); }));
  } else {
    throw std::invalid_argument("no such call: " + name);
  }
}

}  // namespace

int main() {
  const int64_t num_pages = number(std::cin), page_size = number(std::cin);
  PagePool pool(num_pages, page_size, true, static_cast<uint64_t>(number(std::cin)));
  std::string line, name;
  std::getline(std::cin, line);
  while (std::getline(std::cin, line)) {
    std::istringstream in(line);
    in >> name;
    try {
      call(pool, name, in);
    } catch (const std::exception& error) {
      std::cout << error.what() << ' ';
    }
    std::cout << pool.num_free() << '\n';
  }
}
