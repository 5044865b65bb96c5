"""Data sets as lists of images with labels: items, classes and lists."""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
import yaml
from numpy.typing import NDArray

from lpcam.data.images import IMAGE_SUFFIXES, USUAL, Reading, read_image, upright_size
from lpcam.data.masks import read_index_mask
from lpcam.runtime.errors import DataError, nearest_name, shortened

BACKGROUND = 0  #: Mask value of the background.
FEW_SKIPPED = 5  #: Images left out for one reason that are listed one by one.
_COCO_NUMBER = re.compile(r"(?:COCO_\w+_)?(\d{12})")
IGNORE = 255  #: Mask value of pixels that no loss and no metric counts (void).

Nothing = Literal["background", "ignore", "none"]
NAMES: dict[str, Any] = yaml.safe_load(
    resources.files("lpcam.data").joinpath("names.yaml").read_text("utf-8")
)
"""What names mean: patterns by the kind of name, and the categories of COCO."""
_NO_CLASS = "--no-class {0} (in a recipe data.no_class) if it means that an image shows no class"


def shows_nothing(name: str) -> Nothing | None:
    """What a name means that is no class by itself; None for the name of a class.

    ``none`` is doubtful: such a name can be a class if the user says so.
    """
    folded = re.sub(r"[\s_-]+", " ", name.casefold()).strip(" .<>[](){}#?!*'\"")
    kinds = get_args(Nothing)
    return next((k for k in kinds if any(re.fullmatch(form, folded) for form in NAMES[k])), None)


def check_known(name: str, known: Sequence[str], where: str = "") -> None:
    """Raise DataError if a class is unknown; ``where`` begins the message."""
    if name not in known:
        way = f"; give {_NO_CLASS.format(name)}" if shows_nothing(name) else ""
        raise DataError(
            f"{where}unknown class {name!r}{nearest_name(name, known)}; the classes are "
            f"{shortened(known, 30)}{way}"
        )


@dataclass(frozen=True, slots=True)
class ClassTable:
    """The classes of a run in label order, and the value of each in mask files.

    DataError if names or ids repeat or do not fit.

    Example:
        >>> table = ClassTable(("cow", "dog"), (10, 12))
        >>> table.mask_ids[table.index("dog")]
        12
    """

    names: tuple[str, ...]  #: The class with label index ``n`` (0-based) is ``names[n]``.
    mask_ids: tuple[int, ...]  #: Pixel value of each class in masks, 1..254.

    def __post_init__(self) -> None:
        if not self.names:
            raise DataError("no classes were given; name at least one class")
        if len(self.names) != len(self.mask_ids):
            numbers = f"{len(self.names)} class names but {len(self.mask_ids)} mask ids"
            raise DataError(f"{numbers}; give one id per class")
        check_unique(self.names, "the table of classes")
        check_unique(self.mask_ids, "the table of mask ids")
        wrong = [i for i in self.mask_ids if not BACKGROUND < i < IGNORE]
        if wrong:
            raise DataError(
                f"mask ids {shortened([*map(str, wrong)])} are outside 1..254 (0 is background, "
                "255 is ignored); choose at most 254 classes (--classes), where there are masks "
                "those of lower ids"
            )

    @classmethod
    def numbered(
        cls,
        names: Iterable[str] | None,
        source: Path | str,
        chosen: Sequence[str] | None = None,
        **rules: Any,
    ) -> ClassTable:
        """The classes of a data set with the mask values 1, 2, 3, ...

        ``chosen`` are names in label order, which keep their mask values; None: all. The other
        arguments and errors are those of :func:`class_values`.
        """
        values = class_values(names, source, chosen, **rules)
        for name in chosen or ():
            check_known(name, tuple(values), f"{source}: ")
        chosen = tuple(values if chosen is None else chosen)
        try:
            return cls(chosen, tuple(values[name] for name in chosen))
        except DataError as error:
            raise DataError(f"{source}: {error}") from error

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """Label index of a class name; DataError lists the known names if it is unknown."""
        check_known(name, self.names)
        return self.names.index(name)


def class_values(
    names: Iterable[str] | None,
    source: Path | str,
    chosen: Sequence[str] | None = None,
    *,
    labels: Mapping[str, str] | None = None,
    no_class: Sequence[str] = (),
    own: bool = False,
    masked: bool = True,
) -> dict[str, int]:
    """The value in masks of each class, the rule of every reader: 1, 2, 3, ... in their order.

    An entry for the background that begins the list (also after one for ignored pixels) is no
    class. Without masks such entries are left out wherever they are, and the chosen classes come
    first where a value would be above 254.

    Args:
        names: the list of classes, in the order of the mask values; None: the sorted labels.
        source: what names the classes, for errors.
        chosen: names that are classes, whatever they seem to mean.
        labels: the labels of images, and where each is first found, for errors.
        no_class: names that mean that an image shows no class.
        own: whether the user wrote the list, so that a doubtful name in it is a class.
        masked: whether there are files of masks, whose values must agree with the list.

    Raises:
        DataError: if names repeat, are unknown or doubtful, or values and masks cannot agree.
    """
    labels, chosen, listed = labels or {}, chosen or (), names is not None
    names = tuple(sorted(labels) if names is None else names)
    check_unique(names, str(source))
    for name, where in labels.items():
        if name not in no_class:
            check_known(name, names, f"{where}: ")
    for name in no_class:
        check_known(name, tuple({*names, *labels}), f"{source}, no class: ")
    meant = {name: shows_nothing(name) for name in names}
    never = [name for name in names if meant[name] in ("background", "ignore")]
    left_out = {*never, *no_class}
    values = {n: v for v, n in enumerate((n for n in names if n not in left_out), start=1)}
    if not values:
        why = "--no-class names them all" if names else "no image has a label; label some images"
        raise DataError(f"{source} names no class: {why}")
    roles = [meant[name] for name in names[:2]]
    first = 2 if roles == ["ignore", "background"] else int(roles[0] == "background")
    by_line = {name: value for value, name in enumerate(names[first:], start=1)}
    moved = any(by_line[name] != value for name, value in values.items())
    if listed and masked and (moved or {*never} & {*by_line}):
        wrong = next(name for name in by_line if name in left_out)
        raise DataError(
            f"{source} names {wrong!r} as class {by_line[wrong]}, but masks have 0 for the "
            "background, 255 for ignored pixels and 1, 2, ... for the classes; take it out of the "
            "list, or put the background first, as the masks have it"
        )
    asked = [name for name in never if name in labels and name not in no_class]
    if not (chosen and listed):
        asked += [n for n in values if meant[n] and n not in chosen]
    if own:  # of the user's own list only the first entry is doubtful: it may stand for 0
        asked = [name for name in asked if masked and name == names[0]]
    for name in asked[:1]:
        way = "" if name in never else ", or --classes with it if it is a class"
        raise DataError(
            f"{labels.get(name, source)}: {name!r} may mean that an image shows no class; give "
            f"{_NO_CLASS.format(name)}{way}"
        )
    first_ones = [name for name in chosen if name in values]
    if not masked and any(values[name] >= IGNORE for name in first_ones):
        values = {n: v for v, n in enumerate(dict.fromkeys([*first_ones, *values]), start=1)}
    return values


def choose_classes(table: ClassTable, names: Sequence[str] | None) -> ClassTable:
    """The named classes of ``table`` in the order given, with its mask ids; None: all of them."""
    names = table.names if names is None else tuple(names)
    return ClassTable(names, tuple(table.mask_ids[table.index(name)] for name in names))


class DecodedImages:
    """Images that stages share, each decoded once; thread-safe, up to ``budget`` bytes."""

    def __init__(self, budget: int) -> None:
        self.left = budget
        self._images: dict[tuple[Path, Reading], NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def read(self, path: Path, reading: Reading) -> NDArray[np.uint8]:
        """A copy of the image as RGB, uint8 (H, W, 3); ImageError if it cannot be read."""
        if (kept := self._images.get((path, reading))) is not None:
            return kept.copy()
        image = read_image(path, reading)
        with self._lock:
            if image.nbytes <= self.left and (path, reading) not in self._images:
                self.left -= image.nbytes
                self._images[path, reading] = image.copy()
        return image


@dataclass(frozen=True, slots=True)
class Item:
    """One image with its image-level labels."""

    id: str  #: Relative POSIX path without extension (``barn/cow 7``), as in lists and outputs.
    image: Path
    labels: tuple[int, ...]  #: Sorted 0-based class indices, possibly none.
    mask: Path | None = None  #: File of the true mask, for evaluation only.
    parts: Path | None = None  #: File of the true mask of parts, for evaluation only.
    #: Path below the folder of images, spelled as on disk; None: ``id`` with the image's extension.
    file_name: str | None = None
    reading: Reading = USUAL  #: That of its data set.
    decoded: DecodedImages | None = field(default=None, repr=False, compare=False)
    """Where the image is kept once it was read, if anywhere."""

    def read(self) -> NDArray[np.uint8]:
        """The image as RGB, uint8 (H, W, 3); ImageError if it cannot be read."""
        read = read_image if self.decoded is None else self.decoded.read
        return read(self.image, self.reading)

    def size(self) -> tuple[int, int]:
        """(height, width) of the image as it is read, from the file's header."""
        return upright_size(self.image, self.reading)

    def read_mask(
        self, path: Path | None = None, size: tuple[int, int] | None = None
    ) -> NDArray[np.uint8]:
        """Values (H, W) of a mask of the image, or of the true one, as `read_index_mask` gives."""
        path = path or self.mask
        assert path is not None
        # the palette is that of true masks alone
        reading = self.reading if path == self.mask else replace(self.reading, palette=())
        return read_index_mask(path, size=size, reading=reading)


@dataclass(frozen=True, slots=True)
class Skip:
    """An image that was left out of a run, and the reason in words a user can act on."""

    id: str
    reason: str


def by_reason(skipped: Iterable[Skip]) -> Iterator[tuple[list[str], str]]:
    """Ids that share a reason but for names and numbers in it, and the first one's in short."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for skip in skipped:
        text = re.sub(r"[^\s'\"]*[/\\](?=\S)", "", skip.reason)  # of a path only the name
        name = re.escape(skip.id.rsplit("/", 1)[-1])
        key = re.sub(r"\d+", "#", re.sub(rf"(?<!\w){name}(\.\w+)?(?!\w)", "#", text))
        groups.setdefault(key, []).append((skip.id, text))
    for group in sorted(groups.values(), key=lambda group: -len(group)):
        yield list(dict.fromkeys(name for name, _ in group)), group[0][1]


def skip_lines(skipped: Sequence[Skip], title: str = "skipped") -> list[str]:
    """Lines that name images which were left out, many of one reason by their number."""
    lines = [f"{len(skipped)} {title}:"] * bool(skipped)
    reasons = {skip.id: skip.reason for skip in skipped}
    for ids, reason in by_reason(skipped):
        few = len(ids) <= FEW_SKIPPED
        lines += [f"  {name}: {reasons[name]}" for name in ids if few]
        lines += [f"  {len(ids)} ({shortened(ids)}): {reason}"] * (not few)
    return lines


@dataclass(frozen=True)
class Dataset:
    """Items by id, named lists of ids, and what was left out."""

    name: str
    classes: ClassTable
    items: Mapping[str, Item]
    lists: Mapping[str, tuple[str, ...]]
    label_source: str  #: Where the labels come from; part of the protocol of every score.
    skipped: tuple[Skip, ...] = ()
    notices: tuple[str, ...] = ()
    part_names: Mapping[str, int] = field(default_factory=dict)  #: Values in masks of parts.

    @property
    def reading(self) -> Reading:
        """How all images and masks are read."""
        return next((item.reading for item in self.items.values()), USUAL)

    def read_with(self, reading: Reading) -> Dataset:
        """A copy whose images and masks are read in another way."""
        return self._changed(reading=reading)

    def keeping(self, decoded: DecodedImages) -> Dataset:
        """A copy whose images are kept once they were read."""
        return self._changed(decoded=decoded)

    def _changed(self, **values: Any) -> Dataset:
        items = {name: replace(item, **values) for name, item in self.items.items()}
        return replace(self, items=items)

    def without(self, skipped: Sequence[Skip]) -> Dataset:
        """A copy that lacks some items, also in its lists, with the reasons added."""
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
    """Return ``text`` if it can be an item id, a plain relative path; DataError says why not."""
    problems = {
        "it is empty or has blanks at its ends": not text or text != text.strip(),
        "it has a backslash or a control character": re.search(r"[\\\x00-\x1f\x7f]", text),
        "it is an absolute path": text.startswith("/") or text[1:2] == ":",
        "an empty, '.' or '..' part could leave its folder": {"", ".", ".."} & {*text.split("/")},
    }
    for problem in (problem for problem, found in problems.items() if found):
        raise DataError(f"image name {text!r} is refused: {problem}; use a plain relative path")
    return text


def without_suffix(name: str) -> str:
    """The name of an image file without its extension; other names stay as they are."""
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in IMAGE_SUFFIXES else name


def check_unique(ids: Iterable[Hashable], where: str, places: Iterable[object] = ()) -> None:
    """Raise DataError if an id occurs twice; ``where`` holds the ids, in lines ``places``."""
    seen: dict[Hashable, object] = {}
    for name, place in zip_longest(ids, places):
        if name in seen:
            both = "" if place is None else f" (lines {seen[name]} and {place})"
            raise DataError(f"{where} lists {name!r} twice{both}; keep one of them")
        seen[name] = place


def with_mask_folder(dataset: Dataset, folder: Path) -> Dataset:
    """A copy of a data set with the masks ``ID.png`` (of COCO also ``9.png``) of another folder."""
    if not folder.is_dir():
        raise DataError(f"there is no folder of masks {folder}; give the folder that holds ID.png")
    files = files_by_id(folder, (".png",))
    items = {}
    for name, item in dataset.items.items():
        number = _COCO_NUMBER.fullmatch(name.rpartition("/")[2])
        names = [name] if number is None else [name, number[1], str(int(number[1]))]
        items[name] = replace(item, mask=next((files[n] for n in names if n in files), None))
    if not any(item.mask for item in items.values()):
        raise DataError(
            f"{folder} has no mask of any of the {len(items)} images; they are called ID.png, "
            f"such as {next(iter(items))}.png"
        )
    return replace(dataset, items=items)


def files_by_id(folder: Path, endings: Collection[str]) -> dict[str, Path]:
    """Files below a folder whose extension, in either case, is one of ``endings``, by id in NFC."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in endings:
            # ids are in NFC; some systems store names in another Unicode form
            name = unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
            other = found.setdefault(name, path)
            if other != path:
                raise DataError(f"{other} and {path} have the same id {name!r}; rename one of them")
    return found
