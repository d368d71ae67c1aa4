// The pages of a key/value cache: which sequence holds which, who may share them, and the index arrays of a step.
//
// Plain C++17, without Python or torch; bindings.cpp is its Python face. fastattn/page_pool.py defines what it does, in the same order
// under the same names, and documents every call; this file says what is particular to C++. A call asks for all the memory it needs before
// it changes anything: one that throws, std::bad_alloc included, leaves the pool as it was.

#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fastattn {

struct OutOfPages : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An int32 array with several owners: one that the pool outgrows lives on with whoever still looks at it.
struct Array {
  explicit Array(std::vector<int64_t> shape);
  std::vector<int64_t> shape;
  std::vector<int32_t> values;
};
using ArrayPtr = std::shared_ptr<Array>;

// Integers that somebody else owns.
struct Ints {
  const int64_t* data = nullptr;
  int64_t size = 0;
};

using Copies = std::vector<std::pair<int32_t, int32_t>>;  // (source, target) pages

struct PoolStep {
  int64_t number, batch, total_q, max_seqlen_q;
  int64_t num_changes;  // kUncounted: the whole page table
  Copies copies;
};

class PagePool {
 public:
  static constexpr int64_t kUncounted = -1;

  // hash_mask cuts the index's hash short, so that a test can make all prefixes collide.
  PagePool(int64_t num_pages, int64_t page_size, bool share_prefixes = true, uint64_t hash_mask = ~uint64_t{0});

  int64_t num_pages() const { return num_pages_; }
  int64_t page_size() const { return page_size_; }
  int64_t num_sequences() const { return static_cast<int64_t>(sequences_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()) + num_unreferenced_; }

  int64_t allocate(Ints tokens);
  int64_t length(int64_t id) { return find("PagePool.length", id).length; }
  const std::vector<int32_t>& pages(int64_t id) { return find("PagePool.pages", id).pages; }
  Copies extend(int64_t id, int64_t count, const int64_t* tokens);  // tokens: null where unknown
  void free(int64_t id);
  int64_t fork(int64_t id);
  void truncate(int64_t id, int64_t length);
  void commit();
  void abandon();
  PoolStep step(Ints ids, Ints counts, const Ints* tokens);

  // For callers that check or compare what a call would.
  void check_count(const char* where, int64_t count) const;
  uint64_t hash(int64_t before, const int64_t* tokens) const;

  ArrayPtr page_table, cache_seqlens, seqlens_k, cu_seqlens_q, slots, positions, changes;

 private:
  static constexpr int32_t kNone = -1;  // no page, no row
  static constexpr int64_t kRoot = 0;   // the number of the empty prefix

  struct Sequence {
    int64_t length = 0;
    int64_t known = 0;      // leading tokens whose ids are known
    int64_t indexed = 0;    // leading pages that are in the index
    int64_t round = 0;      // in which it last got known tokens; a round ends with commit() or abandon()
    int64_t committed = 0;  // known tokens as that round began
    std::vector<int32_t> pages;
    int32_t row = kNone;  // of the page table, as of the last step that it took part in
    int64_t clean = 0;    // leading pages that this row shows as they are
    int64_t seen_at = 0;  // the attempted step that named it last: finds an id named twice
  };

  struct Page {
    int32_t refs = 0;
    bool indexed = false;
    int64_t number = kRoot, before = kRoot;  // of the prefix that it ends, and of the one before it
    uint64_t hash = 0;
    int32_t next = kNone;                  // in its bucket of the index
    int32_t older = kNone, newer = kNone;  // neighbours among the unreferenced pages
  };

  struct Row {
    int64_t id = -1;
    Sequence* sequence = nullptr;
  };

  struct Batch {
    std::vector<Sequence*> sequences;
    int64_t total = 0, most = 0;  // new tokens: of all, of one
    int64_t columns = 0;          // pages of the longest, with its new tokens
  };

  void end_round();
  void check_step(const char* where, Ints ids, Ints counts, const Ints* tokens);

  int64_t add(Sequence sequence);
  Sequence& find(const char* where, int64_t id);
  int64_t pages_for(int64_t length) const { return (length + page_size_ - 1) / page_size_; }
  Copies check_room(const char* where, Sequence* const* batch, const int64_t* counts, int64_t size) const;
  bool notes(const Sequence& sequence, const int64_t* tokens) const;
  void prepare(int64_t id, Sequence& sequence, int64_t count, const int64_t* tokens);
  void append(Sequence& sequence, int64_t count, const int64_t* tokens, Copies& copies);
  void own_last_page(Sequence& sequence, Copies& copies);
  void write_tokens(Sequence& sequence, int64_t count, const int64_t* tokens);

  int32_t& bucket(uint64_t hash) { return buckets_[hash & (buckets_.size() - 1)]; }
  int32_t lookup(uint64_t hash, int64_t before, const int64_t* tokens) const;
  void index_full_pages(Sequence& sequence);
  void add_to_index(int32_t page, int64_t before, uint64_t hash);
  void remove_from_index(int32_t page);

  int64_t* tokens_of(int32_t page) const { return tokens_.get() + page * page_size_; }
  int32_t take();
  void hold(int32_t page);
  void let_go(int32_t page);
  void let_go_from(Sequence& sequence, int64_t first);
  void unlink(int32_t page);

  bool grow_arrays(int64_t rows, int64_t columns, int64_t total);
  void forget_rows(std::vector<Row> rows);
  void write_slots(const Sequence& sequence, int64_t length, int64_t start);
  int64_t write_row(int64_t row, int64_t id, Sequence& sequence, int64_t num_changes);  // returns num_changes, counted on

  int64_t num_pages_, page_size_;
  bool share_prefixes_;
  uint64_t hash_mask_;
  std::vector<int32_t> free_;                       // the last one goes first
  std::vector<Page> pages_;
  std::unique_ptr<int64_t[]> tokens_;               // page_size of each page
  std::vector<int32_t> buckets_;                    // of the index: the first page of each; a power of two of them
  int64_t last_number_ = kRoot;
  int32_t oldest_ = kNone, newest_ = kNone;         // ends of the list of unreferenced pages
  int64_t num_unreferenced_ = 0;
  std::unordered_map<int64_t, Sequence> sequences_;
  int64_t next_id_ = 0, round_ = 1, steps_ = 0, attempts_ = 0;
  std::set<int64_t> uncommitted_;                   // at least the ids of sequences that have full pages to index
  std::vector<Row> rows_;                           // whose pages each row of the table shows
  Batch batch_;                                     // of the step under way
};

}  // namespace fastattn
