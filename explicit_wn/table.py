"""Tables for people: aligned in a terminal, HTML in a notebook."""

import html
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import attrs


class Table:
    """Something that prints as a table. A subclass says what is in it; a cell may have several lines."""

    def cells(self) -> list[list[str]]:
        """The titles, then the rows."""
        raise NotImplementedError

    def __str__(self) -> str:
        table = [[cell.split("\n") for cell in row] for row in self.cells()]
        widths = [max(len(line) for cell in column for line in cell) for column in zip(*table, strict=True)]
        table.insert(1, [["-" * width] for width in widths])
        lines = [line for row in table for line in zip_longest(*row, fillvalue="")]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *body = [[html.escape(cell) for cell in row] for row in self.cells()]
        left = ' style="text-align: left"'
        titles = "".join(f"<th{left}>{title}</th>" for title in head)
        rows = ["".join(f"<td{left}>{_preformatted(c)}</td>" for c in row) for row in body]
        return f"<table><tr>{titles}</tr>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


class Rows(Table):
    """A table of records, one for each row, which can be walked through and counted."""

    rows: list[Any]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def cells_of(kind: type, rows: Iterable[Any], without: Collection[str] = ()) -> list[list[str]]:
    """Records of an attrs class as cells: a column for each field, under its name, but for those that are left out."""
    names = [field.name for field in attrs.fields(kind) if field.name not in without]
    return [names, *([_shown(getattr(row, name)) for name in names] for row in rows)]


def shape_shown(shape: tuple[int, ...]) -> str:
    """A shape as tables show it: `3×2`, and `number` for that of a single one."""
    return "×".join(map(str, shape)) or "number"


def parts_shown(parts: Mapping[str, Any]) -> str:
    """The parts of a weight with their shapes: `g 3×1, v 3×2`."""
    return ", ".join(f"{part} {shape_shown(tuple(value.shape))}" for part, value in parts.items())


def _shown(value: Any) -> str:
    return shape_shown(value) if isinstance(value, tuple) else str(value)


def _preformatted(cell: str) -> str:
    return f"<pre>{cell}</pre>" if "\n" in cell else cell
