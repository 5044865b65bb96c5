"""Plain typed records: what a data set is, before any pixel is read (floor 0)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from lpcam.errors import DataError

BACKGROUND = 0
"""Mask value of the background (specs of every data set used here)."""
IGNORE = 255
"""Mask value of pixels that no loss and no metric counts (void)."""


@dataclass(frozen=True, slots=True)
class ClassTable:
    """The classes of a run in label order, and the value each has in mask files.

    ``names[n]`` is the class with label index ``n`` (0-based); ``mask_ids[n]`` its pixel value in
    masks and seeds (1..254). A subset of a larger data set keeps that data set's mask ids, so that
    seeds can be laid over the official masks.

    Raises:
        DataError: if names repeat, ids repeat, lengths differ or an id is outside 1..254.
    """

    names: tuple[str, ...]
    mask_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise DataError("no classes were given; name at least one class")
        if len(self.names) != len(self.mask_ids):
            raise DataError(
                f"{len(self.names)} class names but {len(self.mask_ids)} mask ids; "
                "give one id a class"
            )
        for what, values in (("class names", self.names), ("mask ids", self.mask_ids)):
            repeated = sorted({str(v) for v in values if values.count(v) > 1})
            if repeated:
                raise DataError(f"{what} repeat: {', '.join(repeated)}; each may stand once")
        wrong = [i for i in self.mask_ids if not BACKGROUND < i < IGNORE]
        if wrong:
            raise DataError(f"mask ids {wrong} are outside 1..254 (0 is background, 255 is ignore)")

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """Label index of a class name; DataError lists the known names if it is unknown."""
        try:
            return self.names.index(name)
        except ValueError:
            raise DataError(
                f"unknown class {name!r}; the classes are {', '.join(self.names)}"
            ) from None


@dataclass(frozen=True, slots=True)
class Item:
    """One image with its image-level labels.

    ``id`` is a relative POSIX path without extension (``2007_000063``, ``barn/cow 7``) and names
    the image in every list and output file. ``labels`` holds sorted 0-based class indices, possibly
    none. ``mask`` and ``parts`` are optional truth for evaluation only. ``file_name`` is what the
    data call the image, its path below their folder of images, spelt as on disk; None: ``id`` with
    the ending of ``image``.
    """

    id: str
    image: Path
    labels: tuple[int, ...]
    mask: Path | None = None
    parts: Path | None = None
    file_name: str | None = None


@dataclass(frozen=True, slots=True)
class Skip:
    """Something that was left out of a run, and the reason in words a user can act on."""

    id: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """Items by id, named lists of ids, and what was left out.

    ``label_source`` says where image-level labels come from (it is part of every figure's
    protocol). ``part_names`` maps a part's name to its value in part masks (0 is no part).
    """

    name: str
    classes: ClassTable
    items: Mapping[str, Item]
    lists: Mapping[str, tuple[str, ...]]
    label_source: str
    skipped: tuple[Skip, ...] = ()
    notices: tuple[str, ...] = ()
    part_names: Mapping[str, int] = field(default_factory=dict)

    def without(self, skipped: Sequence[Skip]) -> Dataset:
        """The same without some of its items, in no list, with the reasons added."""
        if not skipped:
            return self
        out = {skip.id for skip in skipped}
        return replace(
            self,
            items={name: item for name, item in self.items.items() if name not in out},
            lists={name: tuple(i for i in ids if i not in out) for name, ids in self.lists.items()},
            skipped=(*self.skipped, *skipped),
        )

    def select(self, name: str) -> list[Item]:
        """Items of the named list, in list order; DataError names the lists that exist."""
        if name not in self.lists:
            raise DataError(
                f"unknown list {name!r}; this data set has {', '.join(sorted(self.lists))}"
            )
        return [self.items[i] for i in self.lists[name]]


def safe_id(text: str) -> str:
    """Return ``text`` as an item id, or refuse it.

    An id is a relative POSIX path of non-empty parts that cannot leave its folder: no leading
    slash, drive, backslash, control character, ``.`` or ``..`` part. Spaces and any script are
    fine.

    Raises:
        DataError: naming the id and what is wrong with it.
    """
    problem = None
    if not text or text != text.strip():
        problem = "it is empty or has blanks at its ends"
    elif "\\" in text or any(ord(c) < 32 or ord(c) == 127 for c in text):
        problem = "it has a backslash or a control character"
    elif PurePosixPath(text).is_absolute() or (len(text) > 1 and text[1] == ":"):
        problem = "it is an absolute path"
    elif any(part in ("", ".", "..") for part in text.split("/")):
        problem = "it has an empty, '.' or '..' part and could leave its folder"
    if problem is not None:
        raise DataError(f"image name {text!r} is refused: {problem}; use a plain relative path")
    return text


def check_unique(ids: Sequence[str], where: str) -> None:
    """Refuse a list in which an id stands twice (its file would be written twice)."""
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise DataError(f"{where} names {name!r} more than once; keep one of the lines")
        seen.add(name)
