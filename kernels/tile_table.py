"""A table of tiles: the rows that are shipped, and rows that stand in for them because somebody measured them on a GPU of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Key = tuple[Any, ...]


class TileTable(dict):
    """Key → tile, each a frozen dataclass of type `tile`. Shipped rows stay as they are; `installed` ones come before them.

    asked: a set that collects the keys that `pick` is asked for, or None.
    """

    def __init__(self, tile: type, rows: Mapping[Key, Any]):
        super().__init__(rows)
        self.tile = tile
        self.installed: dict[Key, Any] = {}
        self.asked: set[Key] | None = None

    def pick(self, *key: Any) -> Any:
        """The row's tile. Raises: KeyError, for a key that is not shipped."""
        if self.asked is not None:
            self.asked.add(key)
        shipped = self[key]
        return self.installed.get(key, shipped)

    def install(self, rows: Mapping[Key, Any]) -> None:
        """Let these stand in for shipped rows, from the next launch on, in place of all that were installed before.

        Raises: KeyError for a key that is not shipped, TypeError for what is no tile of this table; nothing is installed then.
        """
        for key, tile in rows.items():
            if key not in self:
                raise KeyError(f"TileTable.install: a row must be one of the table's, got {key}")
            if not isinstance(tile, self.tile):
                raise TypeError(f"TileTable.install: a tile must be a {self.tile.__name__}, got {tile!r}")
        self.installed = dict(rows)
