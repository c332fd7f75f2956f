"""Rows of a dataset that are read, or worked out, only when they are asked for."""

import array
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np

from minigrpo.config import UsageError

Row = dict[str, Any]
if TYPE_CHECKING:
    Ints = array.array[int]
else:
    Ints = array.array  # takes no type argument before Python 3.12


class CellError(ValueError):
    """A row that cannot be used; the text ends a sentence that begins with the row's number."""


class Rows:
    """A sequence of rows; a slice is a view of it, and every row is a new dictionary."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Row]:
        return (self.row(index) for index in range(len(self)))

    def row(self, index: int) -> Row:
        """Return the row of this index, which is not negative."""
        raise NotImplementedError

    @overload
    def __getitem__(self, place: SupportsIndex) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> "Rows": ...
    def __getitem__(self, place: SupportsIndex | slice) -> "Row | Rows":
        places = range(len(self))
        return Selected(self, places[place]) if isinstance(place, slice) else self.row(places[place])


@dataclasses.dataclass(frozen=True, eq=False)
class JsonLines(Rows):
    r"""Rows as lines of JSON: one buffer of bytes, and the place where each line ends.

    Example: text b'{"a": 1}\n{"a": 2}\n', ends [9, 18].
    """

    text: bytearray = dataclasses.field(default_factory=bytearray)
    ends: Ints = dataclasses.field(default_factory=lambda: array.array("q"))

    def append(self, line: bytes) -> None:
        """Add the line of one row, which is known to be a JSON object."""
        self.text.extend(line)
        self.ends.append(len(self.text))

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, index: int) -> Row:
        """Parse the row at `index`."""
        start = self.ends[index - 1] if index else 0
        row: Row = json.loads(self.text[start : self.ends[index]])
        return row


@dataclasses.dataclass(frozen=True, eq=False)
class Table(Rows):
    """Rows of a `datasets.Dataset`, which keeps them on disk; iteration takes many at once."""

    table: Any

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> Row:
        """Return the table's row at `index`."""
        return dict(self.table[index])

    def __iter__(self) -> Iterator[Row]:
        for columns in self.table.iter(batch_size=1000):
            yield from (dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Selected(Rows):
    """Some rows of others, by their indices, which rise."""

    source: Rows | list[Row]
    indices: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def row(self, index: int) -> Row:
        """Return the chosen row at `index`."""
        return self.source[self.indices[index]]


@dataclasses.dataclass(frozen=True, eq=False)
class Mapped(Rows):
    """Rows converted by a function; its CellError becomes a UsageError that names flag, file and row number."""

    label: str
    source: Rows | list[Row]
    convert: Callable[[Row], Row]

    def __len__(self) -> int:
        return len(self.source)

    def row(self, index: int) -> Row:
        """Return the converted row at `index`."""
        return self.converted(index, self.source[index])

    def __iter__(self) -> Iterator[Row]:
        for index, row in enumerate(self.source):
            yield self.converted(index, row)

    def checked(self) -> "Mapped":
        """Return these rows after converting each once, so that an error shows before work starts."""
        for _ in self:
            pass
        return self

    def converted(self, index: int, row: Row) -> Row:
        """Return the converted row; UsageError naming its number, from 1."""
        try:
            return self.convert(row)
        except CellError as error:
            raise UsageError(f"{self.label}: row {index + 1} {error}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Ragged(Sequence[list[int]]):
    """Lists of token ids in one int32 buffer, and the place where each list ends.

    Example: [[5, 6], [], [7]] is values [5, 6, 7], ends [2, 2, 3].
    """

    values: Ints = dataclasses.field(default_factory=lambda: array.array("i"))
    ends: Ints = dataclasses.field(default_factory=lambda: array.array("q"))

    def append(self, ids: Sequence[int]) -> None:
        """Add one list."""
        self.values.extend(ids)
        self.ends.append(len(self.values))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: SupportsIndex) -> list[int]: ...
    @overload
    def __getitem__(self, place: slice) -> list[list[int]]: ...
    def __getitem__(self, place: SupportsIndex | slice) -> list[int] | list[list[int]]:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        index = range(len(self))[place]
        start = self.ends[index - 1] if index else 0
        return self.values[start : self.ends[index]].tolist()

    def only(self, kept: Sequence[int] | np.ndarray) -> "Ragged":
        """Return the lists of these indices."""
        chosen = Ragged()
        for index in kept:
            chosen.append(self[index])
        return chosen
