"""Choosing classes by name, with the nearest known name in the error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from lpcam.data.items import ClassTable
from lpcam.errors import DataError


def unknown_name(name: str, known: Iterable[str]) -> str:
    """Words for an error: the unknown name, the nearest known one if any is near, and all known."""
    known = list(known)
    folded = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1)
    hint = f"; did you mean {folded[near[0]]!r}?" if near else ";"
    return f"{name!r}{hint} the classes are {', '.join(known)}"


def choose_classes(table: ClassTable, names: Sequence[str] | None) -> ClassTable:
    """The named classes of ``table`` in the order given, with its mask ids; all of them for None.

    Raises:
        DataError: naming an unknown class and its nearest known name, or a name given twice.
    """
    if names is None:
        return table
    for name in names:
        if name not in table.names:
            raise DataError(f"unknown class {unknown_name(name, table.names)}")
    ids = tuple(table.mask_ids[table.names.index(name)] for name in names)
    return ClassTable(tuple(names), ids)
