"""The pages of a key/value cache: which sequence holds which, who may share them, and the index arrays of a step.

`PagePool` is the C++ one of csrc/page_pool where it is built, and `PythonPagePool`, below, where it is not: the same interface, page
numbers, arrays and messages. The Python one is the definition; random traces hold the other to it (tests/test_page_pool.py).

The life of a page. It is free; or held by `refs` sequences, of which one alone may write to it; or held by none and kept for its contents.
A full page whose tokens are known enters the index once its keys and values are written, which is at `commit`. Its key is the page before
it and its own tokens, so that equal keys mean equal prefixes from the first token on. Whoever holds an indexed page holds the pages
before it too: a page is therefore let go no later than the one before it, and evicting the page that was let go first never breaks a chain.
"""

from __future__ import annotations

import operator
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

try:
    import fastattn._page_pool as compiled
except ImportError:
    compiled = None

if compiled is not None:
    OutOfPages = compiled.OutOfPages
else:

    class OutOfPages(RuntimeError):
        """There are fewer free pages than a call needs; it has taken none."""


ROOT = -1  # stands for the page before a sequence's first one
LIMIT = 2**31  # of whatever the arrays index


@dataclass(slots=True)
class _Sequence:
    length: int = 0
    known: int = 0  # leading tokens whose ids are known
    indexed: int = 0  # leading pages that are in the index
    pages: list[int] = field(default_factory=list)
    row: int | None = None  # of the page table, as of the last step that it took part in
    clean: int = 0  # leading pages that this row shows as they are


@dataclass(frozen=True, slots=True)
class PoolStep:
    """What a step made of the pool's arrays: how much of them is in use, and what changed.

    batch, total_q: sequences and new tokens. max_seqlen_q: the most new tokens of one sequence.
    num_changes: how many rows of `changes` name a changed entry of the page table; None where the table is new, or changed in more
        entries than `changes` holds (a sixteenth of the table, or 16): then the whole of it counts as changed.
    copies: (source, target) pages, whose keys and values are to be copied, all at once, before the step writes any.
    """

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

    Any call that raises leaves the pool as it was. Not for several threads at once.
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
        self._index: dict[tuple[int, tuple[int, ...]], int] = {}  # (page before, tokens) → page
        self._key: dict[int, tuple[int, tuple[int, ...]]] = {}  # and back
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0
        self._uncommitted: set[int] = set()  # ids of sequences that have full pages to index
        self._rows: list[int | None] = [None]  # whose pages each row of the table shows
        self.page_table = _matrix(1, 1)
        self.cache_seqlens, self.seqlens_k, self.cu_seqlens_q, self.slots, self.positions = (_vector(1) for _ in range(5))
        self.changes = _matrix(16, 2)

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
            for start in range(0, len(tokens) - self._page_size, self._page_size):
                before = sequence.pages[-1] if sequence.pages else ROOT
                page = self._index.get((before, tuple(tokens[start : start + self._page_size])))
                if page is None:
                    break
                self._hold(page)
                sequence.pages.append(page)
            sequence.indexed = len(sequence.pages)
            sequence.length = sequence.known = sequence.indexed * self._page_size
        return self._add(sequence)

    def length(self, id: int) -> int:
        return self._find("PagePool.length", id).length

    def pages(self, id: int) -> list[int]:
        """The pages that hold the sequence, in order. `step` and `commit` may put a shared page in an equal one's place."""
        return list(self._find("PagePool.pages", id).pages)

    def extend(self, id: int, new: int | Iterable[int]) -> list[tuple[int, int]]:
        """Make room for new tokens, given by their ids (1-D ints) or by their count; after a token of unknown id none is shared.

        Returns (source, target) pages: the caller copies their keys and values before it writes any. Raises OutOfPages.
        """
        tokens = None if is_integer(new) else integers("PagePool.extend", "new", new)
        count = integer("PagePool.extend", "new", new) if tokens is None else len(tokens)
        sequence = self._find("PagePool.extend", id)
        self._check_count("PagePool.extend", count)
        copying = self._reserve("PagePool.extend", [sequence], [count])
        copies: list[tuple[int, int]] = []
        self._append(id, sequence, count, tokens, copying[0], copies)
        self._let_go_of_sources(copies)
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
        copy = _Sequence(sequence.length, sequence.known, sequence.indexed, list(sequence.pages))
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
        sequence.length, sequence.known = length, min(sequence.known, length)
        sequence.indexed = min(sequence.indexed, length // self._page_size)
        sequence.clean = min(sequence.clean, kept)

    def commit(self) -> None:
        """Say that the keys and values of every token so far are written: full pages become shareable.

        `step` begins with it, so that what one step appends is shared from the next one on; call it before a `free` whose pages are worth
        keeping. Where two sequences have filled a page with the same prefix, both go on with the page that was there first.
        """
        for id in sorted(self._uncommitted):
            self._index_full_pages(self._sequences[id])
        self._uncommitted.clear()

    def step(
        self, ids: Iterable[int], new: int | Iterable[int] = 1, tokens: Iterable[int] | None = None
    ) -> PoolStep:
        """Extend every sequence of a batch, and write the arrays of the step that will compute its new tokens.

        ids: (B,) distinct. new: how many tokens each sequence gets, or one number for all; 0 is allowed. tokens: (T,) their ids, one
        sequence's after the other's, where they are known. Raises OutOfPages, having done no more than commit what the steps before wrote.
        """
        where = "PagePool.step"
        ids = integers(where, "ids", ids)
        counts = [integer(where, "new", new)] * len(ids) if is_integer(new) else integers(where, "new", new)
        tokens = None if tokens is None else integers(where, "tokens", tokens)
        if len(counts) != len(ids):
            raise ValueError(f"{where}: new must be one int, or {len(ids)} to match ids, got {len(counts)}")
        for count in counts:
            self._check_count(where, count)
        total = sum(counts)
        if tokens is not None and len(tokens) != total:
            raise ValueError(f"{where}: tokens must hold the {total} new ones, got {len(tokens)}")
        batch = []
        seen = set()
        for id in ids:
            batch.append(self._find(where, id))
            if id in seen:
                raise ValueError(f"{where}: ids must be distinct, got {id} twice")
            seen.add(id)
        columns = max((self._pages_for(s.length + n) for s, n in zip(batch, counts)), default=0)
        if len(ids) * columns >= LIMIT:
            raise ValueError(f"{where}: the page table must have fewer than 2**31 entries, got {len(ids)} * {columns}")

        self.commit()
        copying = self._reserve(where, batch, counts)
        whole = self._grow_arrays(len(ids), columns, total)
        num_changes = None if whole else 0
        copies: list[tuple[int, int]] = []
        start = 0
        self.cu_seqlens_q[0] = 0
        for row, (id, sequence, count, copy) in enumerate(zip(ids, batch, counts, copying)):
            length, end = sequence.length, start + count
            own = tokens[start:end] if tokens is not None else None
            self._append(id, sequence, count, own, copy, copies)
            for position in range(length, sequence.length):
                page, offset = divmod(position, self._page_size)
                self.slots[start + position - length] = sequence.pages[page] * self._page_size + offset
                self.positions[start + position - length] = position
            self.cache_seqlens[row], self.seqlens_k[row], self.cu_seqlens_q[row + 1] = length, sequence.length, end
            start = end
            num_changes = self._write_row(row, id, sequence, num_changes)
        self._let_go_of_sources(copies)
        return PoolStep(len(ids), total, max(counts, default=0), num_changes, copies)

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

    def _reserve(self, where: str, batch: list[_Sequence], counts: list[int]) -> list[bool]:
        """See that there are pages enough, or raise. Returns which sequences will first copy their last page: it is part full, and
        shared or in the index. One that is not in the index is let go of here, so that the last to share it knows that it need not copy."""
        needed, copying = 0, []
        for sequence, count in zip(batch, counts):
            needed += self._pages_for(sequence.length + count) - len(sequence.pages)
            last = sequence.pages[-1] if count and sequence.length % self._page_size else None
            copying.append(last is not None and (self._refs[last] > 1 or last in self._key))
            if copying[-1]:
                needed += 1
                if last not in self._key:
                    self._refs[last] -= 1
        if needed > self.num_free:
            for sequence, copies in zip(batch, copying):
                if copies and sequence.pages[-1] not in self._key:
                    self._refs[sequence.pages[-1]] += 1
            raise OutOfPages(f"{where}: needs {needed} pages, of {self._num_pages} there are {self.num_free} free")
        return copying

    def _append(
        self, id: int, sequence: _Sequence, count: int, tokens: list[int] | None, copy: bool, copies: list[tuple[int, int]]
    ) -> None:
        if copy:
            source, target = sequence.pages[-1], self._take()
            copies.append((source, target))
            self._tokens[target] = list(self._tokens[source])
            sequence.pages[-1] = target
            sequence.clean = min(sequence.clean, len(sequence.pages) - 1)
        while len(sequence.pages) < self._pages_for(sequence.length + count):
            sequence.pages.append(self._take())
        if self._share_prefixes and tokens is not None and sequence.known == sequence.length:
            for position, token in enumerate(tokens, sequence.length):
                page, offset = divmod(position, self._page_size)
                self._tokens[sequence.pages[page]][offset:] = [token]
            sequence.known += count
        sequence.length += count
        self._note_uncommitted(id, sequence)

    # The index

    def _note_uncommitted(self, id: int, sequence: _Sequence) -> None:
        if sequence.known // self._page_size > sequence.indexed:
            self._uncommitted.add(id)

    def _index_full_pages(self, sequence: _Sequence) -> None:
        for i in range(sequence.indexed, sequence.known // self._page_size):
            page = sequence.pages[i]
            key = (sequence.pages[i - 1] if i else ROOT, tuple(self._tokens[page]))
            first = self._index.setdefault(key, page)
            if first == page:
                self._key[page] = key
            else:
                self._hold(first)
                self._let_go([page])
                sequence.pages[i] = first
                sequence.clean = min(sequence.clean, i)
            sequence.indexed = i + 1

    # Pages

    def _take(self) -> int:
        """A page of one's own: a free one, else the unreferenced one that was let go first."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unreferenced.popitem(last=False)
            del self._index[self._key.pop(page)]
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

    def _let_go_of_sources(self, copies: list[tuple[int, int]]) -> None:
        """The rest of what `_reserve` began: only now, so that no page taken in the meantime is one that is still to be copied."""
        self._let_go(source for source, _ in copies if source in self._key)

    # The arrays

    def _grow_arrays(self, rows: int, columns: int, total: int) -> bool:
        """Double what is too small. True: the page table is a new one."""
        sizes = {"cache_seqlens": rows, "seqlens_k": rows, "cu_seqlens_q": rows + 1, "slots": total, "positions": total}
        for name, size in sizes.items():
            old = len(getattr(self, name))
            if size > old:
                setattr(self, name, _vector(max(size, 2 * old)))
        old_rows, old_columns = self.page_table.shape
        if rows <= old_rows and columns <= old_columns:
            return False
        grown_rows = max(rows, 2 * old_rows) if rows > old_rows else old_rows
        grown_columns = max(columns, 2 * old_columns) if columns > old_columns else old_columns
        if grown_rows * grown_columns >= LIMIT:
            grown_rows, grown_columns = rows, columns
        self.page_table = _matrix(grown_rows, grown_columns)
        self.changes = _matrix(max(16, grown_rows * grown_columns // 16), 2)
        for id in self._rows:
            if id is not None:
                self._sequences[id].row = None
        self._rows = [None] * grown_rows
        return True

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
    return isinstance(value, int) or (hasattr(value, "__index__") and not hasattr(value, "__len__"))


def integer(where: str, name: str, value: object) -> int:
    if not is_integer(value):
        raise TypeError(f"{where}: {name} must be an int, got {type(value).__name__}")
    value = operator.index(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}: {name} must fit 64 bits")
    return value


def integers(where: str, name: str, values: Iterable[int]) -> list[int]:
    """1-D integers, from a list, a numpy array or a tensor."""
    kind = type(values).__name__
    values = values.tolist() if hasattr(values, "tolist") else values
    try:
        values = list(map(operator.index, values))
    except TypeError:
        raise TypeError(f"{where}: {name} must be 1-D ints, got {kind}") from None
    if any(not -(2**63) <= value < 2**63 for value in values):
        raise ValueError(f"{where}: {name} must fit 64 bits")
    return values


COMPILED = compiled is not None
PagePool = compiled.PagePool if COMPILED else PythonPagePool
