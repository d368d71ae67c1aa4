#include "page_pool.hpp"

#include <algorithm>

namespace fastattn {

namespace {

constexpr int64_t kLimit = int64_t{1} << 31;  // of whatever the arrays index

// For messages.
std::string operator+(const std::string& text, int64_t number) { return text + std::to_string(number); }

int64_t count(const std::vector<int32_t>& values) { return static_cast<int64_t>(values.size()); }

int64_t checked(const char* name, int64_t value) {
  if (value < 1) throw std::invalid_argument(std::string("PagePool: ") + name + " must be at least 1, got " + value);
  return value;
}

int64_t grown(int64_t needed, int64_t old) { return needed > old ? std::max(needed, 2 * old) : old; }

// splitmix64: one changed bit anywhere changes half of the result.
uint64_t mixed(uint64_t value) {
  value += 0x9e3779b97f4a7c15;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

}  // namespace

Array::Array(std::vector<int64_t> sizes) : shape(std::move(sizes)) {
  int64_t total = 1;
  for (int64_t size : shape) total *= size;
  values.resize(total);
}

PagePool::PagePool(int64_t num_pages, int64_t page_size, bool share_prefixes, uint64_t hash_mask)
    : num_pages_(checked("num_pages", num_pages)),
      page_size_(checked("page_size", page_size)),
      share_prefixes_(share_prefixes),
      hash_mask_(hash_mask),
      rows_(1) {
  if (num_pages > (kLimit - 1) / page_size)
    throw std::invalid_argument(std::string("PagePool: num_pages * page_size must be below 2**31, got ") + num_pages + " * " + page_size);
  free_.reserve(num_pages);
  for (int64_t page = num_pages; page-- > 0;) free_.push_back(static_cast<int32_t>(page));
  pages_.resize(num_pages);
  if (share_prefixes) {
    int64_t buckets = 1;
    while (buckets < num_pages) buckets *= 2;
    buckets_.assign(buckets, kNone);
    // Not zeroed: the system hands out memory for what is written alone.
    tokens_.reset(new int64_t[num_pages * page_size]);
  }
  page_table = std::make_shared<Array>(std::vector<int64_t>{1, 1});
  for (ArrayPtr* array : {&cache_seqlens, &seqlens_k, &cu_seqlens_q, &slots, &positions})
    *array = std::make_shared<Array>(std::vector<int64_t>{1});
  changes = std::make_shared<Array>(std::vector<int64_t>{16, 2});
}

int64_t PagePool::allocate(Ints tokens) {
  Sequence sequence;
  if (share_prefixes_) {
    int64_t before = kRoot;
    for (int64_t start = 0; start + page_size_ < tokens.size; start += page_size_) {
      const int32_t page = lookup(hash(before, tokens.data + start), before, tokens.data + start);
      if (page == kNone) break;
      sequence.pages.push_back(page);
      before = pages_[page].number;
    }
    sequence.indexed = count(sequence.pages);
    sequence.length = sequence.known = sequence.indexed * page_size_;
  }
  const int64_t id = add(std::move(sequence));
  for (int32_t page : sequences_.at(id).pages) hold(page);
  return id;
}

Copies PagePool::extend(int64_t id, int64_t count, const int64_t* tokens) {
  const char* where = "PagePool.extend";
  Sequence& sequence = find(where, id);
  check_count(where, count);
  Sequence* batch = &sequence;
  Copies copies = check_room(where, &batch, &count, 1);
  prepare(id, sequence, count, tokens);
  append(sequence, count, tokens, copies);
  return copies;
}

void PagePool::free(int64_t id) {
  Sequence& sequence = find("PagePool.free", id);
  let_go_from(sequence, 0);
  if (sequence.row != kNone) rows_[sequence.row] = {};
  uncommitted_.erase(id);
  sequences_.erase(id);
}

int64_t PagePool::fork(int64_t id) {
  Sequence copy = find("PagePool.fork", id);
  copy.row = kNone;
  copy.clean = 0;
  if (uncommitted_.count(id)) uncommitted_.insert(next_id_);
  const int64_t new_id = add(std::move(copy));
  for (int32_t page : sequences_.at(new_id).pages) hold(page);
  return new_id;
}

void PagePool::truncate(int64_t id, int64_t length) {
  Sequence& sequence = find("PagePool.truncate", id);
  if (length < 0 || length > sequence.length)
    throw std::invalid_argument(
        std::string("PagePool.truncate: length must be between 0 and the sequence's ") + sequence.length + ", got " + length);
  const int64_t kept = pages_for(length);
  let_go_from(sequence, kept);
  sequence.length = length;
  sequence.known = std::min(sequence.known, length);
  sequence.committed = std::min(sequence.committed, length);
  sequence.indexed = std::min(sequence.indexed, length / page_size_);
  sequence.clean = std::min(sequence.clean, kept);
}

void PagePool::commit() {
  for (int64_t id : uncommitted_) {
    const auto found = sequences_.find(id);
    if (found != sequences_.end()) index_full_pages(found->second);  // a fork that ran out of memory has none
  }
  end_round();
}

void PagePool::abandon() {
  for (auto& [id, sequence] : sequences_)
    if (sequence.round == round_) sequence.known = std::min(sequence.known, sequence.committed);
  end_round();
}

void PagePool::end_round() {
  uncommitted_.clear();
  ++round_;
}

PoolStep PagePool::step(Ints ids, Ints counts, const Ints* tokens) {
  const char* where = "PagePool.step";
  check_step(where, ids, counts, tokens);
  const int64_t batch = ids.size;
  const auto tokens_at = [&](int64_t start) { return tokens ? tokens->data + start : nullptr; };
  Copies copies = check_room(where, batch_.sequences.data(), counts.data, batch);
  for (int64_t row = 0, start = 0; row < batch; start += counts.data[row++])
    prepare(ids.data[row], *batch_.sequences[row], counts.data[row], tokens_at(start));
  const bool whole = grow_arrays(batch, batch_.columns, batch_.total);

  int64_t num_changes = whole ? kUncounted : 0;
  int32_t start = 0;
  cu_seqlens_q->values[0] = 0;
  for (int64_t row = 0; row < batch; ++row) {
    Sequence& sequence = *batch_.sequences[row];
    const int64_t length = sequence.length, added = counts.data[row];
    append(sequence, added, tokens_at(start), copies);
    write_slots(sequence, length, start);
    start += static_cast<int32_t>(added);
    cache_seqlens->values[row] = static_cast<int32_t>(length);
    seqlens_k->values[row] = static_cast<int32_t>(sequence.length);
    cu_seqlens_q->values[row + 1] = start;
    num_changes = write_row(row, ids.data[row], sequence, num_changes);
  }
  return {++steps_, batch, batch_.total, batch_.most, num_changes, std::move(copies)};
}

// Fills batch_.
void PagePool::check_step(const char* where, Ints ids, Ints counts, const Ints* tokens) {
  const int64_t batch = ids.size;
  if (counts.size != batch)
    throw std::invalid_argument(std::string(where) + ": new must be one int, or " + batch + " to match ids, got " + counts.size);
  batch_.total = batch_.most = batch_.columns = 0;
  for (int64_t row = 0; row < batch; ++row) {
    check_count(where, counts.data[row]);
    batch_.total += counts.data[row];
    batch_.most = std::max(batch_.most, counts.data[row]);
  }
  if (tokens && tokens->size != batch_.total)
    throw std::invalid_argument(std::string(where) + ": tokens must hold the " + batch_.total + " new ones, got " + tokens->size);
  batch_.sequences.resize(batch);
  ++attempts_;
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t id = ids.data[row];
    // A row mostly shows the sequence it showed last; that saves looking it up.
    const bool same = row < page_table->shape[0] && rows_[row].sequence && rows_[row].id == id;
    Sequence& sequence = same ? *rows_[row].sequence : find(where, id);
    if (sequence.seen_at == attempts_) throw std::invalid_argument(std::string(where) + ": ids must be distinct, got " + id + " twice");
    sequence.seen_at = attempts_;
    batch_.sequences[row] = &sequence;
    batch_.columns = std::max(batch_.columns, pages_for(sequence.length + counts.data[row]));
  }
  if (batch_.columns > 0 && batch > (kLimit - 1) / batch_.columns)
    throw std::invalid_argument(
        std::string(where) + ": the page table must have fewer than 2**31 entries, got " + batch + " * " + batch_.columns);
}

// Sequences

int64_t PagePool::add(Sequence sequence) {
  sequences_.emplace(next_id_, std::move(sequence));
  return next_id_++;
}

PagePool::Sequence& PagePool::find(const char* where, int64_t id) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) throw std::invalid_argument(std::string(where) + ": id must be a live sequence's, got " + id);
  return found->second;
}

void PagePool::check_count(const char* where, int64_t count) const {
  if (count < 0) throw std::invalid_argument(std::string(where) + ": new must not be negative, got " + count);
  if (count > num_pages_ * page_size_)
    throw OutOfPages(std::string(where) + ": " + count + " new tokens do not fit " + num_pages_ + " pages of " + page_size_);
}

// Returns room for the copies.
Copies PagePool::check_room(const char* where, Sequence* const* batch, const int64_t* counts, int64_t size) const {
  int64_t needed = 0;
  size_t copies = 0;
  std::unordered_map<int32_t, int32_t> others;  // of pages with several holders alone
  for (int64_t i = 0; i < size; ++i) {
    const Sequence& sequence = *batch[i];
    needed += pages_for(sequence.length + counts[i]) - count(sequence.pages);
    if (counts[i] == 0 || sequence.length % page_size_ == 0) continue;
    const int32_t last = sequence.pages.back();
    if (pages_[last].refs > 1) copies += --others.emplace(last, pages_[last].refs).first->second > 0;
  }
  needed += static_cast<int64_t>(copies);
  if (needed > num_free())
    throw OutOfPages(std::string(where) + ": needs " + needed + " pages, of " + num_pages_ + " there are " + num_free() + " free");
  Copies room;
  room.reserve(copies);
  return room;
}

// Whether the ids of tokens that are appended are kept.
bool PagePool::notes(const Sequence& sequence, const int64_t* tokens) const {
  return share_prefixes_ && tokens && sequence.known == sequence.length;
}

// Asks for the memory that append() will need.
void PagePool::prepare(int64_t id, Sequence& sequence, int64_t added, const int64_t* tokens) {
  const int64_t length = sequence.length + added, capacity = static_cast<int64_t>(sequence.pages.capacity());
  sequence.pages.reserve(grown(pages_for(length), capacity));
  if (notes(sequence, tokens) && length / page_size_ > sequence.indexed) uncommitted_.insert(id);
}

void PagePool::append(Sequence& sequence, int64_t added, const int64_t* tokens, Copies& copies) {
  if (added > 0 && sequence.length % page_size_ > 0) own_last_page(sequence, copies);
  for (int64_t missing = pages_for(sequence.length + added) - count(sequence.pages); missing > 0; --missing)
    sequence.pages.push_back(take());
  if (notes(sequence, tokens)) write_tokens(sequence, added, tokens);
  sequence.length += added;
}

void PagePool::own_last_page(Sequence& sequence, Copies& copies) {
  const int32_t source = sequence.pages.back();
  if (pages_[source].refs == 1) {
    remove_from_index(source);
    return;
  }
  const int32_t target = take();
  copies.emplace_back(source, target);
  if (share_prefixes_) std::copy_n(tokens_of(source), page_size_, tokens_of(target));
  --pages_[source].refs;
  sequence.pages.back() = target;
  sequence.clean = std::min(sequence.clean, count(sequence.pages) - 1);
}

void PagePool::write_tokens(Sequence& sequence, int64_t added, const int64_t* tokens) {
  if (sequence.round != round_) {
    sequence.round = round_;
    sequence.committed = sequence.known;
  }
  for (int64_t i = 0; i < added; ++i) {
    const int64_t at = sequence.length + i;
    tokens_of(sequence.pages[at / page_size_])[at % page_size_] = tokens[i];
  }
  sequence.known += added;
}

// The index

uint64_t PagePool::hash(int64_t before, const int64_t* tokens) const {
  uint64_t value = mixed(static_cast<uint64_t>(before));
  for (int64_t i = 0; i < page_size_; ++i) value = mixed(value ^ static_cast<uint64_t>(tokens[i]));
  return value & hash_mask_;
}

// Compares what was hashed: equal hashes do not make equal prefixes.
int32_t PagePool::lookup(uint64_t hash, int64_t before, const int64_t* tokens) const {
  int32_t page = buckets_[hash & (buckets_.size() - 1)];
  while (page != kNone && !(pages_[page].before == before && std::equal(tokens, tokens + page_size_, tokens_of(page))))
    page = pages_[page].next;
  return page;
}

void PagePool::index_full_pages(Sequence& sequence) {
  for (int64_t i = sequence.indexed; i < sequence.known / page_size_; ++i) {
    const int32_t page = sequence.pages[i];
    const int64_t before = i ? pages_[sequence.pages[i - 1]].number : kRoot;
    const uint64_t key = hash(before, tokens_of(page));
    const int32_t first = lookup(key, before, tokens_of(page));
    if (first == kNone) {
      add_to_index(page, before, key);
    } else if (first != page) {
      hold(first);
      let_go(page);
      sequence.pages[i] = first;
      sequence.clean = std::min(sequence.clean, i);
    }
    sequence.indexed = i + 1;
  }
}

void PagePool::add_to_index(int32_t page, int64_t before, uint64_t hash) {
  Page& it = pages_[page];
  it.indexed = true;
  it.number = ++last_number_;
  it.before = before;
  it.hash = hash;
  it.next = bucket(hash);
  bucket(hash) = page;
}

void PagePool::remove_from_index(int32_t page) {
  if (!pages_[page].indexed) return;
  int32_t* link = &bucket(pages_[page].hash);
  while (*link != page) link = &pages_[*link].next;
  *link = pages_[page].next;
  pages_[page].indexed = false;
}

// Pages

int32_t PagePool::take() {
  int32_t page = oldest_;
  if (!free_.empty()) {
    page = free_.back();
    free_.pop_back();
  } else {
    unlink(page);
    remove_from_index(page);
  }
  pages_[page].refs = 1;
  return page;
}

void PagePool::hold(int32_t page) {
  if (pages_[page].refs++ == 0) unlink(page);
}

// Where nobody holds it any more, a page goes to the free ones, or as the newest to those kept for their contents.
void PagePool::let_go(int32_t page) {
  Page& it = pages_[page];
  if (--it.refs > 0) return;
  if (!it.indexed) {
    free_.push_back(page);
    return;
  }
  it.older = newest_;
  it.newer = kNone;
  (newest_ == kNone ? oldest_ : pages_[newest_].newer) = page;
  newest_ = page;
  ++num_unreferenced_;
}

void PagePool::let_go_from(Sequence& sequence, int64_t first) {
  for (; count(sequence.pages) > first; sequence.pages.pop_back()) let_go(sequence.pages.back());
}

void PagePool::unlink(int32_t page) {
  const Page& it = pages_[page];
  (it.older == kNone ? oldest_ : pages_[it.older].newer) = it.newer;
  (it.newer == kNone ? newest_ : pages_[it.newer].older) = it.older;
  --num_unreferenced_;
}

// The arrays

bool PagePool::grow_arrays(int64_t rows, int64_t columns, int64_t total) {
  std::vector<std::pair<ArrayPtr*, ArrayPtr>> larger;  // each array, and what takes its place once there is memory for all
  const auto enlarge = [&](ArrayPtr& array, std::vector<int64_t> shape) {
    larger.emplace_back(&array, std::make_shared<Array>(std::move(shape)));
  };
  const std::pair<ArrayPtr*, int64_t> vectors[] = {
      {&cache_seqlens, rows}, {&seqlens_k, rows}, {&cu_seqlens_q, rows + 1}, {&slots, total}, {&positions, total}};
  for (const auto& [array, size] : vectors)
    if (size > (*array)->shape[0]) enlarge(*array, {grown(size, (*array)->shape[0])});
  const int64_t old_rows = page_table->shape[0], old_columns = page_table->shape[1];
  const bool whole = rows > old_rows || columns > old_columns;
  std::vector<Row> none;
  if (whole) {
    int64_t grown_rows = grown(rows, old_rows), grown_columns = grown(columns, old_columns);
    if (grown_rows * grown_columns >= kLimit) grown_rows = rows, grown_columns = columns;
    enlarge(page_table, {grown_rows, grown_columns});
    enlarge(changes, {std::max(int64_t{16}, grown_rows * grown_columns / 16), 2});
    none.resize(grown_rows);
  }
  for (auto& [array, new_array] : larger) array->swap(new_array);
  if (whole) forget_rows(std::move(none));
  return whole;
}

void PagePool::forget_rows(std::vector<Row> rows) {
  for (const Row& row : rows_)
    if (row.sequence) row.sequence->row = kNone;
  rows_ = std::move(rows);
}

// The slots and positions of a sequence's tokens from `length` on, page by page, from `start` on in the arrays.
void PagePool::write_slots(const Sequence& sequence, int64_t length, int64_t start) {
  int32_t* slot = slots->values.data() + start;
  int32_t* position = positions->values.data() + start;
  int64_t page = length / page_size_, offset = length % page_size_;
  for (int64_t at = length; at < sequence.length; ++page, offset = 0) {
    const int64_t first = sequence.pages[page] * page_size_;
    for (; offset < page_size_ && at < sequence.length; ++offset, ++at) {
      *slot++ = static_cast<int32_t>(first + offset);
      *position++ = static_cast<int32_t>(at);
    }
  }
}

int64_t PagePool::write_row(int64_t row, int64_t id, Sequence& sequence, int64_t num_changes) {
  if (sequence.row != row) {
    if (sequence.row != kNone) rows_[sequence.row] = {};
    if (rows_[row].sequence) rows_[row].sequence->row = kNone;
    rows_[row] = {id, &sequence};
    sequence.row = static_cast<int32_t>(row);
    sequence.clean = 0;
  }
  const int64_t begin = row * page_table->shape[1], size = count(sequence.pages);
  int32_t* entries = page_table->values.data() + begin;
  int64_t column = sequence.clean;
  for (; column < size && num_changes != kUncounted; ++column) {
    const int32_t page = sequence.pages[column];
    if (entries[column] == page) continue;
    entries[column] = page;
    if (num_changes == changes->shape[0]) {
      num_changes = kUncounted;
    } else {
      int32_t* change = changes->values.data() + 2 * num_changes++;
      change[0] = static_cast<int32_t>(begin + column);
      change[1] = page;
    }
  }
  std::copy(sequence.pages.begin() + column, sequence.pages.end(), entries + column);
  sequence.clean = size;
  return num_changes;
}

}  // namespace fastattn
