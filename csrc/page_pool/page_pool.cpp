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
  for (int64_t page = num_pages; page-- > 0;) free_.push_back(static_cast<int32_t>(page));
  pages_.resize(num_pages);
  // Not zeroed: the system hands out memory for what is written alone.
  if (share_prefixes) tokens_.reset(new int64_t[num_pages * page_size]);
  page_table = std::make_shared<Array>(std::vector<int64_t>{1, 1});
  for (ArrayPtr* array : {&cache_seqlens, &seqlens_k, &cu_seqlens_q, &slots, &positions})
    *array = std::make_shared<Array>(std::vector<int64_t>{1});
  changes = std::make_shared<Array>(std::vector<int64_t>{16, 2});
}

int64_t PagePool::allocate(Ints tokens) {
  Sequence sequence;
  if (share_prefixes_) {
    for (int64_t start = 0; start + page_size_ < tokens.size; start += page_size_) {
      const int32_t before = sequence.pages.empty() ? kNone : sequence.pages.back();
      const int32_t page = lookup(hash(before, tokens.data + start), before, tokens.data + start);
      if (page == kNone) break;
      hold(page);
      sequence.pages.push_back(page);
    }
    sequence.indexed = count(sequence.pages);
    sequence.length = sequence.known = sequence.indexed * page_size_;
  }
  return add(std::move(sequence));
}

Copies PagePool::extend(int64_t id, int64_t count, const int64_t* tokens) {
  const char* where = "PagePool.extend";
  Sequence& sequence = find(where, id);
  check_count(where, count);
  Sequence* batch = &sequence;
  reserve(where, &batch, &count, 1);
  Copies copies;
  append(id, sequence, count, tokens, copies);
  let_go_of_sources(copies);
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
  const Sequence& sequence = find("PagePool.fork", id);
  for (int32_t page : sequence.pages) hold(page);
  Sequence copy;
  copy.length = sequence.length;
  copy.known = sequence.known;
  copy.indexed = sequence.indexed;
  copy.pages = sequence.pages;
  const int64_t new_id = add(std::move(copy));
  note_uncommitted(new_id, sequences_.at(new_id));
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
  sequence.indexed = std::min(sequence.indexed, length / page_size_);
  sequence.clean = std::min(sequence.clean, kept);
}

void PagePool::commit() {
  for (int64_t id : uncommitted_) index_full_pages(sequences_.at(id));
  uncommitted_.clear();
}

PoolStep PagePool::step(Ints ids, Ints counts, const Ints* tokens) {
  const char* where = "PagePool.step";
  const int64_t batch = ids.size;
  if (counts.size != batch)
    throw std::invalid_argument(std::string(where) + ": new must be one int, or " + batch + " to match ids, got " + counts.size);
  int64_t total = 0, most = 0, columns = 0;
  for (int64_t row = 0; row < batch; ++row) {
    check_count(where, counts.data[row]);
    total += counts.data[row];
    most = std::max(most, counts.data[row]);
  }
  if (tokens && tokens->size != total)
    throw std::invalid_argument(std::string(where) + ": tokens must hold the " + total + " new ones, got " + tokens->size);
  batch_.resize(batch);
  ++attempts_;
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t id = ids.data[row];
    // A row mostly shows the sequence it showed last; that saves looking it up.
    const bool same = row < page_table->shape[0] && rows_[row].sequence && rows_[row].id == id;
    Sequence& sequence = same ? *rows_[row].sequence : find(where, id);
    if (sequence.seen_at == attempts_) throw std::invalid_argument(std::string(where) + ": ids must be distinct, got " + id + " twice");
    sequence.seen_at = attempts_;
    batch_[row] = &sequence;
    columns = std::max(columns, pages_for(sequence.length + counts.data[row]));
  }
  if (columns > 0 && batch > (kLimit - 1) / columns)
    throw std::invalid_argument(
        std::string(where) + ": the page table must have fewer than 2**31 entries, got " + batch + " * " + columns);

  commit();
  reserve(where, batch_.data(), counts.data, batch);
  const bool whole = grow_arrays(batch, columns, total);
  int64_t num_changes = whole ? kUncounted : 0;
  Copies copies;
  int32_t start = 0;
  cu_seqlens_q->values[0] = 0;
  for (int64_t row = 0; row < batch; ++row) {
    Sequence& sequence = *batch_[row];
    const int64_t length = sequence.length, added = counts.data[row];
    append(ids.data[row], sequence, added, tokens ? tokens->data + start : nullptr, copies);
    write_slots(sequence, length, start);
    start += static_cast<int32_t>(added);
    cache_seqlens->values[row] = static_cast<int32_t>(length);
    seqlens_k->values[row] = static_cast<int32_t>(sequence.length);
    cu_seqlens_q->values[row + 1] = start;
    num_changes = write_row(row, ids.data[row], sequence, num_changes);
  }
  let_go_of_sources(copies);
  return {batch, total, most, num_changes, std::move(copies)};
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

void PagePool::reserve(const char* where, Sequence* const* batch, const int64_t* counts, int64_t size) {
  int64_t needed = 0;
  for (int64_t i = 0; i < size; ++i) {
    Sequence& sequence = *batch[i];
    needed += pages_for(sequence.length + counts[i]) - count(sequence.pages);
    sequence.copying = false;
    if (counts[i] == 0 || sequence.length % page_size_ == 0) continue;
    Page& last = pages_[sequence.pages.back()];
    if (last.refs > 1 || last.indexed) {
      sequence.copying = true;
      if (!last.indexed) --last.refs;
      ++needed;
    }
  }
  if (needed <= num_free()) return;
  for (int64_t i = 0; i < size; ++i) {
    if (!batch[i]->copying) continue;
    Page& last = pages_[batch[i]->pages.back()];
    if (!last.indexed) ++last.refs;
  }
  throw OutOfPages(std::string(where) + ": needs " + needed + " pages, of " + num_pages_ + " there are " + num_free() + " free");
}

void PagePool::append(int64_t id, Sequence& sequence, int64_t added, const int64_t* tokens, Copies& copies) {
  if (sequence.copying) {
    const int32_t source = sequence.pages.back(), target = take();
    copies.emplace_back(source, target);
    if (share_prefixes_) std::copy_n(tokens_of(source), page_size_, tokens_of(target));
    sequence.pages.back() = target;
    sequence.clean = std::min(sequence.clean, count(sequence.pages) - 1);
  }
  for (int64_t missing = pages_for(sequence.length + added) - count(sequence.pages); missing > 0; --missing)
    sequence.pages.push_back(take());
  if (share_prefixes_ && tokens && sequence.known == sequence.length) {
    for (int64_t i = 0; i < added; ++i) {
      const int64_t at = sequence.length + i;
      tokens_of(sequence.pages[at / page_size_])[at % page_size_] = tokens[i];
    }
    sequence.known += added;
  }
  sequence.length += added;
  note_uncommitted(id, sequence);
}

// The index

uint64_t PagePool::hash(int32_t before, const int64_t* tokens) const {
  // splitmix64's finaliser over a running value: one changed bit anywhere changes half of the hash.
  uint64_t value = static_cast<uint64_t>(before) + 1;
  for (int64_t i = 0; i < page_size_; ++i) {
    value = (value ^ static_cast<uint64_t>(tokens[i])) + 0x9e3779b97f4a7c15;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
    value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
    value ^= value >> 31;
  }
  return value & hash_mask_;
}

int32_t PagePool::lookup(uint64_t hash, int32_t before, const int64_t* tokens) const {
  const auto [first, last] = index_.equal_range(hash);
  for (auto entry = first; entry != last; ++entry) {
    const int32_t page = entry->second;
    if (pages_[page].before == before && std::equal(tokens, tokens + page_size_, tokens_of(page))) return page;
  }
  return kNone;
}

void PagePool::note_uncommitted(int64_t id, const Sequence& sequence) {
  if (sequence.known / page_size_ > sequence.indexed) uncommitted_.insert(id);
}

void PagePool::index_full_pages(Sequence& sequence) {
  for (int64_t i = sequence.indexed; i < sequence.known / page_size_; ++i) {
    const int32_t page = sequence.pages[i], before = i ? sequence.pages[i - 1] : kNone;
    const uint64_t key = hash(before, tokens_of(page));
    const int32_t first = lookup(key, before, tokens_of(page));
    if (first == kNone) {
      index_.emplace(key, page);
      pages_[page].indexed = true;
      pages_[page].before = before;
      pages_[page].hash = key;
    } else if (first != page) {
      hold(first);
      let_go(page);
      sequence.pages[i] = first;
      sequence.clean = std::min(sequence.clean, i);
    }
    sequence.indexed = i + 1;
  }
}

void PagePool::remove_from_index(int32_t page) {
  auto entry = index_.equal_range(pages_[page].hash).first;
  while (entry->second != page) ++entry;
  index_.erase(entry);
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

void PagePool::let_go_of_sources(const Copies& copies) {
  for (const auto& copy : copies)
    if (pages_[copy.first].indexed) let_go(copy.first);
}

void PagePool::unlink(int32_t page) {
  const Page& it = pages_[page];
  (it.older == kNone ? oldest_ : pages_[it.older].newer) = it.newer;
  (it.newer == kNone ? newest_ : pages_[it.newer].older) = it.older;
  --num_unreferenced_;
}

// The arrays

bool PagePool::grow_arrays(int64_t rows, int64_t columns, int64_t total) {
  const auto grown = [](int64_t needed, int64_t old) { return needed > old ? std::max(needed, 2 * old) : old; };
  const std::pair<ArrayPtr*, int64_t> vectors[] = {
      {&cache_seqlens, rows}, {&seqlens_k, rows}, {&cu_seqlens_q, rows + 1}, {&slots, total}, {&positions, total}};
  for (const auto& [array, size] : vectors)
    if (size > (*array)->shape[0]) *array = std::make_shared<Array>(std::vector<int64_t>{grown(size, (*array)->shape[0])});
  const int64_t old_rows = page_table->shape[0], old_columns = page_table->shape[1];
  if (rows <= old_rows && columns <= old_columns) return false;
  int64_t grown_rows = grown(rows, old_rows), grown_columns = grown(columns, old_columns);
  if (grown_rows * grown_columns >= kLimit) grown_rows = rows, grown_columns = columns;
  page_table = std::make_shared<Array>(std::vector<int64_t>{grown_rows, grown_columns});
  changes = std::make_shared<Array>(std::vector<int64_t>{std::max(int64_t{16}, grown_rows * grown_columns / 16), 2});
  for (const Row& row : rows_)
    if (row.sequence) row.sequence->row = kNone;
  rows_.assign(grown_rows, Row{});
  return true;
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
