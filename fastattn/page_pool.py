"""The pages of a key/value cache: which sequence holds which, who may share them, and the index arrays of a step.

`PagePool` is the C++ one of csrc/page_pool where it is built, and `PythonPagePool`, below, where it is not: the same interface, page
numbers, arrays and messages. The Python one is the definition; random traces hold the other to it (tests/test_page_pool.py).

The life of a page. It is free; or held by `refs` sequences, of which one alone may write to it; or held by none and kept for its contents.
A full page whose tokens are known enters the index once its keys and values are written, which is at `commit`; the prefix that it ends gets
a number, never used again. Its key is the number of the prefix before it and its own tokens, so that equal keys mean equal prefixes from
the first token on. It leaves the index when it is taken for something else, or when the only one who holds it has truncated into it and
writes: nothing finds the pages behind it then, and they wait for their turn to be taken. Whoever holds an indexed page holds the pages
before it too: a page is therefore let go no later than the one before it, and evicting the page that was let go first never breaks a chain.
"""

from __future__ import annotations

import operator
import warnings
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice

try:
    import fastattn._page_pool as compiled
except ImportError as error:
    if not (isinstance(error, ModuleNotFoundError) and error.name == "fastattn._page_pool"):
        warnings.warn(
            f"fastattn: the compiled page pool cannot be imported, and the Python one stands in: {error}", RuntimeWarning, stacklevel=2
        )
    compiled = None

if compiled is not None:
    OutOfPages = compiled.OutOfPages
else:

    class OutOfPages(RuntimeError):
        """There are fewer free pages than a call needs; it has changed nothing."""


ROOT = 0  # the number of the empty prefix
LIMIT = 2**31  # of whatever the arrays index


@dataclass(slots=True)
class _Sequence:
    length: int = 0
    known: int = 0  # leading tokens whose ids are known
    indexed: int = 0  # leading pages that are in the index
    round: int = 0  # in which it last got known tokens; a round ends with `commit` or `abandon`
    committed: int = 0  # known tokens as that round began
    pages: list[int] = field(default_factory=list)
    row: int | None = None  # of the page table, as of the last step that it took part in
    clean: int = 0  # leading pages that this row shows as they are


@dataclass(frozen=True, slots=True)
class PoolStep:
    """What a step made of the pool's arrays: how much of them is in use, and what changed.

    number: how many steps the pool has taken, this one included.
    batch, total_q: sequences and new tokens. max_seqlen_q: the most new tokens of one sequence.
    num_changes: how many rows of `changes` name a changed entry of the page table; None where the table is new, or changed in more
        entries than `changes` holds (a sixteenth of the table, or 16): then the whole of it counts as changed.
    copies: (source, target) pages, whose keys and values are to be copied, all at once, before the step writes any.
    """

    number: int
    batch: int
    total_q: int
    max_seqlen_q: int
    num_changes: int | None
    copies: list[tuple[int, int]]


class PythonPagePool:
    """Hands out, shares and takes back `num_pages` pages of `page_size` tokens each. It moves no keys and values.

    Args:
        num_pages, page_size: positive; their product, the number of slots, is below 2**31.
        share_prefixes: index full pages by their tokens, so that a new sequence starts on the pages of an old one with the same prefix.

    Arrays, int32, readable by numpy.asarray and torch.frombuffer, written in place by `step`, replaced by larger ones as steps grow
    (with B = batch, T = total_q; what lies beyond is stale, and nothing reads it):
        page_table: (rows, columns); row b < B starts with the pages of the b-th sequence.
        cache_seqlens, seqlens_k: (B,) the lengths before and after the step. cu_seqlens_q: (B + 1,) sums of the new tokens, from 0.
        slots, positions: (T,) page · page_size + offset of each new token, and its position in its sequence.
        changes: (num_changes, 2) row · columns + column, and the new value, of each entry of page_table that changed in the last step.

    Any call that raises leaves the pool as it was, a MemoryError of the C++ one too. Not for several threads at once, and not to be copied.
    """

    def __init__(self, num_pages: int, page_size: int, *, share_prefixes: bool = True) -> None:
        self._num_pages = integer("PagePool", "num_pages", num_pages)
        self._page_size = integer("PagePool", "page_size", page_size)
        for name, value in (("num_pages", self._num_pages), ("page_size", self._page_size)):
            if value < 1:
                raise ValueError(f"PagePool: {name} must be at least 1, got {value}")
        if self._num_pages * self._page_size >= LIMIT:
            raise ValueError(
                f"PagePool: num_pages * page_size must be below 2**31, got {self._num_pages} * {self._page_size}"
            )
        self._share_prefixes = bool(share_prefixes)
        self._free = list(reversed(range(self._num_pages)))  # the last one goes first
        self._unreferenced: OrderedDict[int, None] = OrderedDict()  # indexed pages that nobody holds, oldest first
        self._refs = [0] * self._num_pages
        self._tokens: list[list[int]] = [[] for _ in range(self._num_pages)]
        self._index: dict[tuple[int, tuple[int, ...]], int] = {}  # (number of the prefix before, tokens) → page
        self._key: dict[int, tuple[int, tuple[int, ...]]] = {}  # and back
        self._number = [ROOT] * self._num_pages  # of the prefix that each page in the index ends
        self._last_number = ROOT
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0
        self._uncommitted: set[int] = set()  # ids of sequences that have full pages to index
        self._round = 1
        self._steps = 0
        self._rows: list[int | None] = [None]  # whose pages each row of the table shows
        self.page_table = _matrix(1, 1)
        self.cache_seqlens, self.seqlens_k, self.cu_seqlens_q, self.slots, self.positions = (_vector(1) for _ in range(5))
        self.changes = _matrix(16, 2)

    def __reduce__(self) -> str:
        raise TypeError("a PagePool cannot be copied or pickled")

    @property
    def num_pages(self) -> int:
        return self._num_pages

    @property
    def page_size(self) -> int:
        return self._page_size

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    @property
    def num_free(self) -> int:
        """Pages that a call can still take: the free ones, and those kept for their contents alone."""
        return len(self._free) + len(self._unreferenced)

    def allocate(self, tokens: Iterable[int] | None = None) -> int:
        """A new sequence's id, never used before. `tokens` (1-D ints): it starts on the longest run of indexed full pages that hold
        their beginning, and its length says how many tokens that covers; one token at least is left to compute. No other page is taken.
        """
        tokens = [] if tokens is None else integers("PagePool.allocate", "tokens", tokens)
        sequence = _Sequence()
        if self._share_prefixes:
            before = ROOT
            for start in range(0, len(tokens) - self._page_size, self._page_size):
                page = self._index.get((before, tuple(tokens[start : start + self._page_size])))
                if page is None:
                    break
                self._hold(page)
                sequence.pages.append(page)
                before = self._number[page]
            sequence.indexed = len(sequence.pages)
            sequence.length = sequence.known = sequence.indexed * self._page_size
        return self._add(sequence)

    def length(self, id: int) -> int:
        return self._find("PagePool.length", id).length

    def pages(self, id: int) -> list[int]:
        """The pages that hold the sequence, in order. `commit` may put a shared page in an equal one's place."""
        return list(self._find("PagePool.pages", id).pages)

    def extend(self, id: int, new: int | Iterable[int]) -> list[tuple[int, int]]:
        """Make room for new tokens, given by their ids (1-D ints) or by their count; after a token of unknown id none is shared.

        Returns (source, target) pages: the caller copies their keys and values before it writes any. Raises OutOfPages, and then nothing
        has changed.
        """
        tokens = None if is_integer(new) else integers("PagePool.extend", "new", new)
        count = integer("PagePool.extend", "new", new) if tokens is None else len(tokens)
        sequence = self._find("PagePool.extend", id)
        self._check_count("PagePool.extend", count)
        self._check_room("PagePool.extend", [sequence], [count])
        copies: list[tuple[int, int]] = []
        self._append(id, sequence, count, tokens, copies)
        return copies

    def free(self, id: int) -> None:
        """Give the sequence up. Its pages that are in the index stay there until their room is needed."""
        sequence = self._find("PagePool.free", id)
        self._let_go(reversed(sequence.pages))
        if sequence.row is not None:
            self._rows[sequence.row] = None
        self._uncommitted.discard(id)
        del self._sequences[id]

    def fork(self, id: int) -> int:
        """A new sequence of the same tokens on the same pages. Whichever of the two writes first to a page that is part full copies it."""
        sequence = self._find("PagePool.fork", id)
        for page in sequence.pages:
            self._hold(page)
        copy = replace(sequence, pages=list(sequence.pages), row=None, clean=0)
        new_id = self._add(copy)
        self._note_uncommitted(new_id, copy)
        return new_id

    def truncate(self, id: int, length: int) -> None:
        """Forget the tokens from `length` on (rejected speculation), and let go of the pages behind it."""
        length = integer("PagePool.truncate", "length", length)
        sequence = self._find("PagePool.truncate", id)
        if not 0 <= length <= sequence.length:
            raise ValueError(
                f"PagePool.truncate: length must be between 0 and the sequence's {sequence.length}, got {length}"
            )
        kept = -(-length // self._page_size)
        self._let_go(reversed(sequence.pages[kept:]))
        del sequence.pages[kept:]
        sequence.length = length
        sequence.known, sequence.committed = min(sequence.known, length), min(sequence.committed, length)
        sequence.indexed = min(sequence.indexed, length // self._page_size)
        sequence.clean = min(sequence.clean, kept)

    def commit(self) -> None:
        """Say that the keys and values of every token so far are written: full pages become shareable.

        Where two sequences have filled a page with the same prefix, both go on with the page that was there first.
        """
        for id in sorted(self._uncommitted):
            self._index_full_pages(self._sequences[id])
        self._end_round()

    def abandon(self) -> None:
        """Say that the keys and values of the tokens since the last `commit` may never have been written: they stay, as if their ids
        were unknown, and are not shared."""
        for sequence in self._sequences.values():
            if sequence.round == self._round:
                sequence.known = min(sequence.known, sequence.committed)
        self._end_round()

    def _end_round(self) -> None:
        self._uncommitted.clear()
        self._round += 1

    def step(
        self, ids: Iterable[int], new: int | Iterable[int] = 1, tokens: Iterable[int] | None = None
    ) -> PoolStep:
        """Extend every sequence of a batch, and write the arrays of the step that will compute its new tokens.

        ids: (B,) distinct. new: how many tokens each sequence gets, or one number for all; 0 is allowed. tokens: (T,) their ids, one
        sequence's after the other's, where they are known. Raises OutOfPages, and then nothing has changed.
        """
        where = "PagePool.step"
        ids = integers(where, "ids", ids)
        counts = self._counts(where, new, len(ids))
        tokens = None if tokens is None else integers(where, "tokens", tokens)
        batch = self._check_step(where, ids, counts, tokens)
        total = sum(counts)
        self._check_room(where, batch, counts)
        whole = self._grow_arrays(len(ids), self._columns(batch, counts), total)

        num_changes = None if whole else 0
        copies: list[tuple[int, int]] = []
        start = 0
        self.cu_seqlens_q[0] = 0
        for row, (id, sequence, count) in enumerate(zip(ids, batch, counts)):
            length, end = sequence.length, start + count
            self._append(id, sequence, count, None if tokens is None else tokens[start:end], copies)
            self._write_slots(sequence, length, start)
            self.cache_seqlens[row], self.seqlens_k[row], self.cu_seqlens_q[row + 1] = length, sequence.length, end
            start = end
            num_changes = self._write_row(row, id, sequence, num_changes)
        self._steps += 1
        return PoolStep(self._steps, len(ids), total, max(counts, default=0), num_changes, copies)

    def _counts(self, where: str, new: int | Iterable[int], batch: int) -> list[int]:
        if not is_integer(new):
            return integers(where, "new", new)
        count = integer(where, "new", new)
        self._check_count(where, count)  # of no sequence at all, too
        return [count] * batch

    def _check_step(self, where: str, ids: list[int], counts: list[int], tokens: list[int] | None) -> list[_Sequence]:
        """The sequences of a batch."""
        if len(counts) != len(ids):
            raise ValueError(f"{where}: new must be one int, or {len(ids)} to match ids, got {len(counts)}")
        for count in counts:
            self._check_count(where, count)
        if tokens is not None and len(tokens) != sum(counts):
            raise ValueError(f"{where}: tokens must hold the {sum(counts)} new ones, got {len(tokens)}")
        batch: dict[int, _Sequence] = {}
        for id in ids:
            sequence = self._find(where, id)
            if id in batch:
                raise ValueError(f"{where}: ids must be distinct, got {id} twice")
            batch[id] = sequence
        columns = self._columns(batch.values(), counts)
        if len(ids) * columns >= LIMIT:
            raise ValueError(f"{where}: the page table must have fewer than 2**31 entries, got {len(ids)} * {columns}")
        return list(batch.values())

    # Sequences

    def _add(self, sequence: _Sequence) -> int:
        id, self._next_id = self._next_id, self._next_id + 1
        self._sequences[id] = sequence
        return id

    def _find(self, where: str, id: int) -> _Sequence:
        id = integer(where, "id", id)
        if id not in self._sequences:
            raise ValueError(f"{where}: id must be a live sequence's, got {id}")
        return self._sequences[id]

    def _check_count(self, where: str, count: int) -> None:
        if count < 0:
            raise ValueError(f"{where}: new must not be negative, got {count}")
        if count > self._num_pages * self._page_size:
            raise OutOfPages(f"{where}: {count} new tokens do not fit {self._num_pages} pages of {self._page_size}")

    def _pages_for(self, length: int) -> int:
        return -(-length // self._page_size)

    def _columns(self, batch: Iterable[_Sequence], counts: list[int]) -> int:
        return max((self._pages_for(s.length + n) for s, n in zip(batch, counts)), default=0)

    def _check_room(self, where: str, batch: list[_Sequence], counts: list[int]) -> None:
        """See that there are pages for the new tokens, and for the copies of last pages that others still hold when their turn comes."""
        needed = 0
        others: dict[int, int] = {}
        for sequence, count in zip(batch, counts):
            needed += self._pages_for(sequence.length + count) - len(sequence.pages)
            if count and sequence.length % self._page_size:
                last = sequence.pages[-1]
                others[last] = others.get(last, self._refs[last]) - 1
                needed += others[last] > 0
        if needed > self.num_free:
            raise OutOfPages(f"{where}: needs {needed} pages, of {self._num_pages} there are {self.num_free} free")

    def _append(
        self, id: int, sequence: _Sequence, count: int, tokens: list[int] | None, copies: list[tuple[int, int]]
    ) -> None:
        if count and sequence.length % self._page_size:
            self._own_last_page(sequence, copies)
        while len(sequence.pages) < self._pages_for(sequence.length + count):
            sequence.pages.append(self._take())
        if self._share_prefixes and tokens is not None and sequence.known == sequence.length:
            self._write_tokens(sequence, tokens)
        sequence.length += count
        self._note_uncommitted(id, sequence)

    def _own_last_page(self, sequence: _Sequence, copies: list[tuple[int, int]]) -> None:
        """See that the last page, which is part full, may be written: by a copy of it where others hold it too."""
        source = sequence.pages[-1]
        if self._refs[source] == 1:
            self._remove_from_index(source)
            return
        target = self._take()
        copies.append((source, target))
        self._tokens[target] = list(self._tokens[source])
        self._refs[source] -= 1
        sequence.pages[-1] = target
        sequence.clean = min(sequence.clean, len(sequence.pages) - 1)

    def _write_tokens(self, sequence: _Sequence, tokens: list[int]) -> None:
        if sequence.round != self._round:
            sequence.round, sequence.committed = self._round, sequence.known
        for position, token in enumerate(tokens, sequence.length):
            page, offset = divmod(position, self._page_size)
            self._tokens[sequence.pages[page]][offset:] = [token]
        sequence.known += len(tokens)

    # The index

    def _note_uncommitted(self, id: int, sequence: _Sequence) -> None:
        if sequence.known // self._page_size > sequence.indexed:
            self._uncommitted.add(id)

    def _index_full_pages(self, sequence: _Sequence) -> None:
        for i in range(sequence.indexed, sequence.known // self._page_size):
            page = sequence.pages[i]
            key = (self._number[sequence.pages[i - 1]] if i else ROOT, tuple(self._tokens[page]))
            first = self._index.get(key)
            if first is None:
                self._add_to_index(page, key)
            elif first != page:
                self._hold(first)
                self._let_go([page])
                sequence.pages[i] = first
                sequence.clean = min(sequence.clean, i)
            sequence.indexed = i + 1

    def _add_to_index(self, page: int, key: tuple[int, tuple[int, ...]]) -> None:
        self._last_number += 1
        self._index[key], self._key[page], self._number[page] = page, key, self._last_number

    def _remove_from_index(self, page: int) -> None:
        if page in self._key:
            del self._index[self._key.pop(page)]

    # Pages

    def _take(self) -> int:
        """A page of one's own: a free one, else the unreferenced one that was let go first."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unreferenced.popitem(last=False)
            self._remove_from_index(page)
        self._refs[page] = 1
        self._tokens[page] = []
        return page

    def _hold(self, page: int) -> None:
        self._unreferenced.pop(page, None)
        self._refs[page] += 1

    def _let_go(self, pages: Iterable[int]) -> None:
        """A sequence's last page comes first."""
        for page in pages:
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if page in self._key:
                    self._unreferenced[page] = None
                else:
                    self._free.append(page)

    # The arrays

    def _grow_arrays(self, rows: int, columns: int, total: int) -> bool:
        """Double what is too small, all of it or nothing. True: the page table is a new one."""
        sizes = {"cache_seqlens": rows, "seqlens_k": rows, "cu_seqlens_q": rows + 1, "slots": total, "positions": total}
        grown = {}
        for name, size in sizes.items():
            old = len(getattr(self, name))
            if size > old:
                grown[name] = _vector(max(size, 2 * old))
        old_rows, old_columns = self.page_table.shape
        whole = rows > old_rows or columns > old_columns
        if whole:
            grown_rows = max(rows, 2 * old_rows) if rows > old_rows else old_rows
            grown_columns = max(columns, 2 * old_columns) if columns > old_columns else old_columns
            if grown_rows * grown_columns >= LIMIT:
                grown_rows, grown_columns = rows, columns
            grown["page_table"] = _matrix(grown_rows, grown_columns)
            grown["changes"] = _matrix(max(16, grown_rows * grown_columns // 16), 2)
        for name, new in grown.items():
            setattr(self, name, new)
        if whole:
            self._forget_rows(grown_rows)
        return whole

    def _forget_rows(self, rows: int) -> None:
        for id in self._rows:
            if id is not None:
                self._sequences[id].row = None
        self._rows = [None] * rows

    def _write_slots(self, sequence: _Sequence, length: int, start: int) -> None:
        """The slots and positions of a sequence's tokens from `length` on, from `start` on in the arrays."""
        for i, position in enumerate(range(length, sequence.length), start):
            page, offset = divmod(position, self._page_size)
            self.slots[i], self.positions[i] = sequence.pages[page] * self._page_size + offset, position

    def _write_row(self, row: int, id: int, sequence: _Sequence, num_changes: int | None) -> int | None:
        """Write the entries of a row that changed. Returns num_changes, counted on; None once `changes` is full."""
        if sequence.row != row:
            if sequence.row is not None:
                self._rows[sequence.row] = None
            shown = self._rows[row]
            if shown is not None:
                self._sequences[shown].row = None
            self._rows[row], sequence.row, sequence.clean = id, row, 0
        table, changes = self.page_table, self.changes
        for column, page in enumerate(islice(sequence.pages, sequence.clean, None), sequence.clean):
            if table[row, column] == page:
                continue
            table[row, column] = page
            if num_changes == changes.shape[0]:
                num_changes = None
            elif num_changes is not None:
                changes[num_changes, 0], changes[num_changes, 1] = row * table.shape[1] + column, page
                num_changes += 1
        sequence.clean = len(sequence.pages)
        return num_changes


def _vector(size: int) -> memoryview:
    return memoryview(array("i", bytes(4 * size)))


def _matrix(rows: int, columns: int) -> memoryview:
    return memoryview(bytearray(4 * rows * columns)).cast("i", (rows, columns))


def is_integer(value: object) -> bool:
    return isinstance(value, int) or (hasattr(type(value), "__index__") and not hasattr(value, "__len__"))


def integer(where: str, name: str, value: object) -> int:
    if not is_integer(value):
        raise TypeError(f"{where}: {name} must be an int, got {type(value).__name__}")
    value = operator.index(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}: {name} must fit 64 bits")
    return value


def integers(where: str, name: str, values: Iterable[int]) -> list[int]:
    """1-D integers, from a list, a numpy array or a tensor. Errors of an iterator's own go through."""
    wrong = TypeError(f"{where}: {name} must be 1-D ints, got {type(values).__name__}")
    values = values.tolist() if hasattr(values, "tolist") else values
    try:
        iterator = iter(values)
    except TypeError:
        raise wrong from None
    items = list(iterator)
    try:
        items = list(map(operator.index, items))
    except TypeError:
        raise wrong from None
    if any(not -(2**63) <= item < 2**63 for item in items):
        raise ValueError(f"{where}: {name} must fit 64 bits")
    return items


COMPILED = compiled is not None
PagePool = compiled.PagePool if COMPILED else PythonPagePool
