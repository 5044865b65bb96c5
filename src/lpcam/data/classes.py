"""Choosing classes by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from lpcam.data.items import ClassTable
from lpcam.errors import DataError


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Words for an error that suggest the most similar known name; empty if none is similar.

    Example:
        >>> nearest_name("Cows", ["cow", "dog"])
        " (did you mean 'cow'?)"
    """
    folded = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f" (did you mean {folded[near[0]]!r}?)" if near else ""


def check_known(name: str, known: Sequence[str], where: str = "") -> None:
    """Raise DataError if a class is unknown, with the most similar known name and all known names.

    Args:
        where: begins the error, such as ``labels.csv line 3: ``.

    Example:
        >>> check_known("cow", ["cow", "dog"])
    """
    if name not in known:
        raise DataError(
            f"{where}unknown class {name!r}{nearest_name(name, known)}; the classes are "
            f"{', '.join(known)}"
        )


def choose_classes(table: ClassTable, names: Sequence[str] | None) -> ClassTable:
    """The named classes of ``table`` in the order given, with its mask ids; all of them for None.

    Raises:
        DataError: if a class is unknown or given twice.

    Example:
        >>> choose_classes(ClassTable(("cat", "cow"), (8, 10)), ["cow"])
        ClassTable(names=('cow',), mask_ids=(10,))
    """
    if names is None:
        return table
    for name in names:
        check_known(name, table.names)
    ids = tuple(table.mask_ids[table.names.index(name)] for name in names)
    return ClassTable(tuple(names), ids)
