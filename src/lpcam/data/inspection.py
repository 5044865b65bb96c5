"""``lpcam data check``: what a data set holds, what is wrong with it, and what a run would take."""

from __future__ import annotations

import io
import itertools
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from lpcam.data.coco.files import ALL, LABELLED
from lpcam.data.dataset import BACKGROUND, IGNORE, ClassTable, Dataset, Item, Skip
from lpcam.data.masks import read_index_mask
from lpcam.data.open_dataset import Truth
from lpcam.data.validation import check_images
from lpcam.runtime.errors import DataError, LpcamError
from lpcam.runtime.files import write_json
from lpcam.runtime.parallel import ordered_map
from lpcam.runtime.versions import versions


@dataclass(frozen=True)
class Estimate:
    """What a run takes on this machine, by images that were timed on it."""

    backbone: str
    scales: tuple[float, ...]
    flip: bool
    device: str
    workers: int
    timed: int
    """Images."""
    seconds: Mapping[str, float]
    """By list: for a run all of whose lists are this one."""
    disk: Mapping[str, int]
    """By list: bytes of maps and seeds."""
    repeated: tuple[str, ...]
    """Lists whose features do not fit into memory, so that the stages compute them again."""


FEW_IMAGES = 20
"""A class with fewer images gets a warning in the summary."""


MOST_NAMED = 3
"""Images or classes that a line of a summary names; the JSON names all."""


MOST_CLASSES = 24
"""Classes in the table of a summary: of more, half as many from either end."""


MOST_LISTS = 4
"""Columns of lists in that table."""


COMPANIONS = 2
"""Classes named beside each, if the table of all pairs is too wide."""


RARE = 0.1
"""A class with less than this share of the images of one that is spelt nearly alike may be a slip
of the pen."""


_UNLABELLED = re.compile(r"\d+ of \d+ images (has|have) no label")
"""A reader's notice of what is a finding here."""


@dataclass(frozen=True)
class Finding:
    """Something about a data set that its owner should know."""

    kind: str
    text: str
    """A sentence, with the number of what it concerns."""
    names: tuple[str, ...] = ()
    """Of the images, pairs or classes that it concerns, all of them."""
    attention: bool = True
    """Whether it is likely a mistake, or spoils a run or its figures."""


@dataclass(frozen=True)
class ListCounts:
    """A list of the data set, of its usable images."""

    name: str
    images: int
    labelled: int
    masks: int
    within: tuple[str, ...]
    """Lists that hold all of its images."""
    classes: tuple[int, ...]
    """Images that show each class."""


@dataclass(frozen=True)
class Survey:
    """What :func:`survey` found."""

    name: str
    label_source: str
    classes: ClassTable
    suffixes: Mapping[str, int]
    """Images by the extension of their file."""
    smallest: tuple[int, int]
    """(height, width) of the upright image with the fewest pixels."""
    median: tuple[int, int]
    """Median height and median width."""
    largest: tuple[int, int]
    lists: tuple[ListCounts, ...]
    whole: ListCounts
    """All images, whatever their list."""
    together: NDArray[np.int64]
    """(N, N): images that show both classes; on the diagonal those that show the class."""
    alone: tuple[int, ...]
    """Images that show this class and no other."""
    findings: tuple[Finding, ...]
    estimate: Estimate | None = field(default=None)

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that need attention."""
        return tuple(finding for finding in self.findings if finding.attention)

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it; ``co_occurrence`` is by class name, symmetric."""
        names = self.classes.names
        counts = {one.name: one.classes for one in self.lists}
        return {
            "format": 1,
            "name": self.name,
            "label_source": self.label_source,
            "images": self.whole.images,
            "labelled": self.whole.labelled,
            "masks": self.whole.masks,
            "suffixes": dict(self.suffixes),
            "sizes": {
                what: dict(zip(("height", "width"), getattr(self, what), strict=True))
                for what in ("smallest", "median", "largest")
            },
            "lists": [
                {k: v for k, v in asdict(one).items() if k != "classes"} for one in self.lists
            ],
            "classes": [
                {
                    "name": name,
                    "mask_id": self.classes.mask_ids[row],
                    "images": self.whole.classes[row],
                    "alone": self.alone[row],
                    "lists": {of: count[row] for of, count in counts.items()},
                }
                for row, name in enumerate(names)
            ],
            "co_occurrence": {
                name: dict(zip(names, self.together[row].tolist(), strict=True))
                for row, name in enumerate(names)
            },
            "findings": [asdict(finding) for finding in self.findings],
            "needs_attention": bool(self.problems),
            "estimate": None if self.estimate is None else asdict(self.estimate),
        }

    def write_json(self, path: Path, *, command: str) -> None:
        """Write everything to a file, with the command that asked for it."""
        write_json(path, {**self.as_json(), "command": command, "versions": versions()})

    def summary(self, width: int = 100) -> str:
        """The same in words and tables of at most ``width`` columns, long lists cut short."""
        height, across = self.median
        sizes = f"{self.smallest[0]} × {self.smallest[1]} to {self.largest[0]} × {self.largest[1]}"
        kinds = ", ".join(
            suffix if len(self.suffixes) == 1 else f"{count:,} {suffix}"
            for suffix, count in self.suffixes.items()
        )
        lines = _wrapped(
            f"{self.name}: {_count(self.whole.images, 'image')} ({kinds}), "
            f"{_count(len(self.classes), 'class', 'classes')}, "
            f"{_count(self.whole.masks, 'mask')}; labels from {self.label_source}. "
            f"Height × width {sizes}, median {height} × {across} pixels.",
            width,
        )
        lines += ["", *_rendered(self._list_table(), width)]
        if self.estimate is not None:
            lines += _wrapped(_how(self.estimate), width)
        lines += ["", *_rendered(self._class_table(width), width), ""]
        for title, findings in (
            ("Needs attention", self.problems),
            ("Good to know", [f for f in self.findings if not f.attention]),
        ):
            if findings:
                lines.append(title)
                for finding in findings:
                    lines += _wrapped(f"{finding.text}{_named(finding)}", width, "- ")
        if not self.problems:
            lines.append("Nothing needs attention.")
        return "\n".join(lines)

    def _list_table(self) -> Table:
        table = _table()
        estimate = self.estimate
        for title in ("list", "images", "labelled", "masks"):
            table.add_column(title, justify="left" if title == "list" else "right")
        if estimate is not None:
            table.add_column("time of a run", justify="right")
            table.add_column("disk", justify="right")
        nested = any(one.within for one in self.lists)
        if nested:
            table.add_column("lies within")
        for one in self.lists:
            row = [one.name, f"{one.images:,}", f"{one.labelled:,}", f"{one.masks:,}"]
            if estimate is not None:
                row.append(_duration(estimate.seconds[one.name]))
                row.append(_bytes(estimate.disk[one.name]))
            table.add_row(*row, *([", ".join(one.within)] if nested else []))
        return table

    def _class_table(self, width: int) -> Table:
        """Classes by row; beside them all pairs where they fit, or the commonest companions."""
        names = self.classes.names
        shown = _distinct(self.whole, self.lists)
        titles = ["class", "images", *(one.name for one in shown), "alone"]
        columns = [[f"{one.classes[row]:,}" for row in range(len(names))] for one in shown]
        rows = [
            [name, f"{self.whole.classes[row]:,}", *(c[row] for c in columns), f"{self.alone[row]}"]
            for row, name in enumerate(names)
        ]
        pairs = [
            ["·" if a == b else str(count) for b, count in enumerate(row)]
            for a, row in enumerate(self.together.tolist())
        ]
        others = [f"+{name}" for name in names]
        left = sum(2 + max(map(len, column)) for column in zip(titles, *rows, strict=True))
        wide = sum(2 + max(map(len, column)) for column in zip(others, *pairs, strict=True))
        fits = 1 < len(names) <= MOST_CLASSES and left + wide <= width
        table = _table()
        for title in titles:
            table.add_column(title, justify="left" if title == "class" else "right")
        if fits:
            table.title = "images of each class, and of those that show another class too (+)"
            for title in others:
                table.add_column(title, justify="right", no_wrap=True)
        else:
            table.add_column("most often together with")
        half = MOST_CLASSES // 2
        order: list[int] = list(range(len(names)))
        if len(order) > MOST_CLASSES:
            order.sort(key=lambda row: -self.whole.classes[row])
            order = [*order[:half], -1, *order[-half:]]
        for row in order:
            if row < 0:
                table.add_row(f"... {len(names) - 2 * half} more")
            else:
                table.add_row(*rows[row], *(pairs[row] if fits else [self._companions(row)]))
        return table

    def _companions(self, row: int) -> str:
        counts = self.together[row].tolist()
        others = sorted((-count, other) for other, count in enumerate(counts) if other != row)
        return ", ".join(
            f"{self.classes.names[other]} {-100 * count / counts[row]:.0f} %"
            for count, other in others[:COMPANIONS]
            if count < 0
        )


def survey(
    dataset: Dataset,
    *,
    truth: Truth | None = None,
    estimate: Callable[[Dataset, Mapping[str, tuple[int, int]]], Estimate] | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Look at every file of a data set once, and count what is in it.

    Unlike a run this does not stop at a mask that cannot be used: all of them are findings.

    Args:
        dataset: as a reader gave it.
        truth: true masks that annotations give, as :func:`lpcam.data.open_dataset.open_with_truth`
            gives them. Each is made in memory, and what is wrong with it is a finding.
        estimate: called with the usable images and their sizes (height, width); its result goes
            into the survey. None: no estimate.
        workers: number of files read at a time.
        progress: called with the number of files looked at and of all.

    Raises:
        DataError: if no image can be used.
    """
    truth = truth or {}
    total = len(dataset.items) + sum(_has_truth(item, truth) for item in dataset.items.values())

    def advance(done: int, _: int) -> None:
        if progress is not None:
            progress(done, total)

    # a bad mask ends that check, and is one of many findings here
    bare = {name: replace(i, mask=None, parts=None) for name, i in dataset.items.items()}
    checked, records = check_images(replace(dataset, items=bare), progress=advance, workers=workers)
    usable = {name: dataset.items[name] for name in checked.items}
    dataset = replace(checked, items=usable)
    sizes = {name: (record["height"], record["width"]) for name, record in records.items()}

    findings = [*_left_out(dataset)]
    masks = _look_at_masks(dataset, sizes, truth, workers, lambda left: advance(total - left, 0))
    findings += _mask_findings(dataset, masks)
    findings += _duplicates(dataset, {n: record["image_digest"] for n, record in records.items()})
    made = {name for name, look in masks.items() if look.made and look.values is not None}
    whole = _counts("", list(usable), dataset, made, ())
    lists = _lists(dataset, made)
    labels = _multi_hot(dataset, usable)
    # in float32 as BLAS wants it: exact up to 16 million images
    together = (labels.T @ labels).astype(np.int64)
    alone = labels[labels.sum(1) == 1].sum(0).astype(np.int64)
    findings += [*_name_findings(dataset, whole), *_list_findings(dataset, whole, lists)]
    findings += [
        Finding("notice", notice, (), False)
        for notice in dataset.notices
        if not _UNLABELLED.fullmatch(notice)
    ]
    return Survey(
        name=dataset.name,
        label_source=dataset.label_source,
        classes=dataset.classes,
        suffixes=dict(Counter(i.image.suffix.lower() for i in usable.values()).most_common()),
        smallest=min(sizes.values(), key=_area),
        median=(
            round(float(np.median([height for height, _ in sizes.values()]))),
            round(float(np.median([width for _, width in sizes.values()]))),
        ),
        largest=max(sizes.values(), key=_area),
        lists=lists,
        whole=whole,
        together=together,
        alone=tuple(alone.tolist()),
        findings=tuple(sorted(findings, key=lambda finding: not finding.attention)),
        estimate=None if estimate is None else estimate(dataset, sizes),
    )


# -- Findings ----------------------------------------------------------------------------------


def _left_out(dataset: Dataset) -> Iterator[Finding]:
    """What is left out, grouped by the reason; 80,000 missing files are one finding."""
    for text, names in _by_reason(dataset.skipped):
        yield Finding("left out", f"{_count(len(names), 'image')} left out ({text})", names)


def _by_reason(skipped: Iterable[Skip]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A reason in short, and the ids that share it but for names and numbers in it."""
    groups: dict[str, list[str]] = defaultdict(list)
    first: dict[str, str] = {}
    for skip in skipped:
        text = re.sub(r"[^\s'\"]*[/\\](?=\S)", "", skip.reason)  # of a path only the name
        name = skip.id.rsplit("/", 1)[-1]
        key = re.sub(r"\d+", "#", re.sub(rf"(?<!\w){re.escape(name)}(\.\w+)?(?!\w)", "#", text))
        first.setdefault(key, text)
        groups[key].append(skip.id)
    for key, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        yield ("e.g. " if len(names) > 1 else "") + first[key], tuple(dict.fromkeys(names))


@dataclass(frozen=True, slots=True)
class _Look:
    """What the true mask of an image holds."""

    values: frozenset[int] | None
    """None where there is none that can be used, of a class."""
    faults: tuple[str, ...]
    made: bool
    """Of annotations, not read from a file."""


def _has_truth(item: Item, truth: Truth) -> bool:
    return item.mask is not None or item.parts is not None or item.id in truth


def _look_at_masks(
    dataset: Dataset,
    sizes: Mapping[str, tuple[int, int]],
    truth: Truth,
    workers: int,
    advance: Callable[[int], None],
) -> dict[str, _Look]:
    """What the mask of each image that has one holds."""

    def look(item: Item) -> _Look:
        made = item.mask is None and item.parts is None
        try:
            if not made:
                values = _values(item, sizes[item.id])
                return _Look(frozenset(values) if item.mask is not None else None, (), made)
            mask, faults = truth[item.id]()
            return _Look(None if mask is None else frozenset(_held(mask)), faults, made)
        except LpcamError as error:
            return _Look(None, (str(error),), made)

    items = [item for item in dataset.items.values() if _has_truth(item, truth)]
    found = {}
    for number, look_of in enumerate(ordered_map(look, items, workers), start=1):
        found[items[number - 1].id] = look_of
        advance(len(items) - number)
    return found


def _mask_findings(dataset: Dataset, masks: Mapping[str, _Look]) -> Iterator[Finding]:
    """Masks that cannot be used, values of no class, and what labels and masks disagree on."""
    table = dataset.classes
    known = {BACKGROUND, IGNORE, *table.mask_ids}
    bad = [Skip(i, why) for i, look in masks.items() if not look.made for why in look.faults]
    wrong = [Skip(i, why) for i, look in masks.items() if look.made for why in look.faults]
    strange: dict[int, list[str]] = defaultdict(list)
    unseen: dict[str, list[str]] = defaultdict(list)
    unsaid: dict[str, list[str]] = defaultdict(list)
    values_of_all: set[int] = set()
    labelled = 0
    for name_of, look in masks.items():
        item, found = dataset.items[name_of], look.values
        if found is None:
            continue
        values_of_all |= found
        labelled += bool(item.labels)
        for value in found - known:
            strange[value].append(item.id)
        for index, (name, value) in enumerate(zip(table.names, table.mask_ids, strict=True)):
            if (value in found) != (index in item.labels):
                (unsaid if value in found else unseen)[name].append(item.id)
    for text, names in _by_reason(bad):
        count = _count(len(names), "mask cannot be used", "masks cannot be used")
        yield Finding("mask", f"{count} ({text})", names)
    for text, names in _by_reason(wrong):
        images = _count(len(names), "image")
        yield Finding("annotations", f"{images} with wrong annotations ({text})", names)
    usable = [name for name, look in masks.items() if look.values is not None]
    drawn = any(not masks[name].made for name in usable)
    if drawn and labelled and values_of_all == {BACKGROUND, IGNORE}:
        yield Finding(
            "mask values",
            "the masks hold 0 and 255 alone, and 255 is not counted; write the class's number "
            f"instead ({table.mask_ids[0]} for {table.names[0]})",
        )
        return
    if strange:
        counts = sorted((-len(ids), value) for value, ids in strange.items())
        parts = ", ".join(f"{value} in {-count:,}" for count, value in counts[: 2 * MOST_NAMED])
        if len(counts) > 2 * MOST_NAMED:
            parts += f", {len(counts) - 2 * MOST_NAMED} more values"
        yield Finding(
            "mask values",
            f"mask values of no class here, whose pixels no score counts ({parts}; of "
            f"{_count(len(masks), 'mask')})",
            _united(strange.values()),
        )
    if usable and values_of_all.isdisjoint(table.mask_ids):
        values = ", ".join(map(str, sorted(values_of_all)[: 2 * MOST_NAMED]))
        yield Finding(
            "no truth",
            f"none of the true masks ({len(usable):,}) shows a class, so a run is not scored (the "
            f"values in them: {values}{', ...' * (len(values_of_all) > 2 * MOST_NAMED)}; 0 is "
            "background, 255 is not counted)",
            tuple(usable),
        )
        return
    if unsaid:
        names = _united(unsaid.values())
        yield Finding(
            "mask without label",
            f"{_count(len(names), 'image')} with pixels in the mask of a class that is no label, "
            f"so that no map can show it ({_per_class(unsaid)})",
            names,
        )
    if unseen:
        names = _united(unseen.values())
        yield Finding(
            "label without mask",
            f"{_count(len(names), 'image')} with a label but no pixel of the class in the mask "
            f"({_per_class(unseen)})",
            names,
            # where objects are void, as difficult ones of VOC are, some is usual
            attention=len(names) > labelled / 2,
        )


def _values(item: Item, size: tuple[int, int]) -> set[int]:
    """Values of an item's mask; DataError if a mask of it cannot be read or has another size."""
    found: set[int] = set()
    for path in (item.parts, item.mask):
        if path is None:
            continue
        mask = read_index_mask(path)
        if mask.shape != size:
            raise DataError(
                f"{path} is {mask.shape[0]} × {mask.shape[1]} (height × width), the upright image "
                f"{size[0]} × {size[1]}"
            )
        found = _held(mask)
    return found


def _held(mask: NDArray[np.uint8]) -> set[int]:
    return set(np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist())


def _duplicates(dataset: Dataset, digests: Mapping[str, str]) -> Iterator[Finding]:
    """Images whose files are equal byte for byte."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, digest in digests.items():
        groups[digest].append(name)
    equal = [names for names in groups.values() if len(names) > 1]
    if not equal:
        return
    of_item: dict[str, set[str]] = {name: set() for names in equal for name in names}
    for of, ids in dataset.lists.items():
        for name in of_item.keys() & set(ids):
            of_item[name].add(of)

    def differ(names: Sequence[str]) -> bool:
        return len({dataset.items[name].labels for name in names}) > 1

    def apart(names: Sequence[str]) -> bool:
        places = {frozenset(of_item[name]) for name in names if of_item[name]}
        return any(a.isdisjoint(b) for a, b in itertools.combinations(places, 2))

    for test, kind, words in (
        (differ, "duplicates with other labels", ", but with different labels"),
        (apart, "duplicates across lists", ", but in lists that share nothing"),
        (lambda names: not differ(names) and not apart(names), "duplicates", ""),
    ):
        found = [" = ".join(names) for names in equal if test(names)]
        if found:
            text = f"{_count(len(found), 'group')} of images with equal files{words}"
            yield Finding(kind, text, tuple(found), bool(words))


def _name_findings(dataset: Dataset, whole: ListCounts) -> Iterator[Finding]:
    names = dataset.classes.names
    counts = dict(zip(names, whole.classes, strict=True))
    close = [
        f"{a} ({counts[a]:,}), {b} ({counts[b]:,})"
        for a, b in itertools.combinations(names, 2)
        if _may_be_one(a, b, counts[a], counts[b])
    ]
    if close:
        text = f"{_count(len(close), 'pair')} of classes that may be one, spelt in two ways"
        yield Finding("class names", text, tuple(close))
    joined = tuple(name for name in names if _is_several(name, names))
    if joined:
        text = (
            f"{_count(len(joined), 'class whose name is', 'classes whose names are')} those of "
            "others with ',' or '|' between them; the labels of an image are separated by ';'"
        )
        yield Finding("class names", text, joined)
    folded: dict[str, list[str]] = defaultdict(list)
    for name in dataset.items:
        folded[name.casefold()].append(name)
    same = tuple(", ".join(ids) for ids in folded.values() if len(ids) > 1)
    if same:
        text = (
            f"{_count(len(same), 'group')} of images whose names differ in capitals only; their "
            "outputs are one file on some systems"
        )
        yield Finding("image names", text, same)


def _is_several(name: str, names: Sequence[str]) -> bool:
    """Whether a class name is made of other classes' names with a wrong separator."""
    parts = [part.strip() for part in re.split(r"[,|]", name)]
    return len(parts) > 1 and all(part in names for part in parts)


def _may_be_one(one: str, other: str, images: int, others: int) -> bool:
    """Whether two class names are one but for case, blanks, a plural, or a slip in a rare one."""
    a, b = sorted((re.sub(r"[\W_]", "", name.casefold()) for name in (one, other)), key=len)
    if re.sub(r"\D", "", a) != re.sub(r"\D", "", b) or len(b) - len(a) > 2:
        return False
    if b in (a, f"{a}s", f"{a}es"):
        return True
    rare = min(images, others) < RARE * max(images, others)
    return rare and len(b) - len(a) < 2 and SequenceMatcher(None, a, b).ratio() >= 0.8


def _list_findings(
    dataset: Dataset, whole: ListCounts, lists: Sequence[ListCounts]
) -> Iterator[Finding]:
    names = dataset.classes.names
    none = tuple(name for name, count in zip(names, whole.classes, strict=True) if not count)
    if none:
        text = f"{_count(len(none), 'class that no image shows', 'classes that no image shows')}"
        yield Finding("empty classes", text, none)
    few = tuple(
        f"{name} ({count})"
        for name, count in zip(names, whole.classes, strict=True)
        if 0 < count < FEW_IMAGES
    )
    if few:
        text = f"{_count(len(few), 'class', 'classes')} with fewer than {FEW_IMAGES} images"
        yield Finding("small classes", f"{text}, whose maps may be weak", few, False)
    bare = tuple(name for name, item in dataset.items.items() if not item.labels)
    if bare:
        every = len(bare) == whole.images
        yield Finding("no label", f"{_count(len(bare), 'image')} without a label", bare, every)
    empty = tuple(one.name for one in lists if not one.images)
    if empty:
        text = _count(len(empty), "list without a usable image", "lists without a usable image")
        yield Finding("lists", text, empty)
    sets = {
        of: frozenset(ids)
        for of, ids in dataset.lists.items()
        # what is made up of other lists shares images with them
        if of != ALL and not (of.endswith(LABELLED) and of.removesuffix(LABELLED) in dataset.lists)
    }
    for a, b in itertools.combinations(sets, 2):
        both = sets[a] & sets[b]
        if both and both != sets[a] and both != sets[b]:
            text = f"the lists {a} and {b} share {_count(len(both), 'image')}"
            yield Finding("lists", text, tuple(sorted(both)), False)


# -- Counts ------------------------------------------------------------------------------------


def _multi_hot(dataset: Dataset, ids: Iterable[str]) -> NDArray[np.float32]:
    """(images, classes), 1 where an image shows a class."""
    ids = list(ids)
    labels = np.zeros((len(ids), len(dataset.classes)), np.float32)
    for row, name in enumerate(ids):
        labels[row, list(dataset.items[name].labels)] = 1
    return labels


def _counts(
    name: str,
    ids: Sequence[str],
    dataset: Dataset,
    made: Collection[str],
    within: tuple[str, ...],
) -> ListCounts:
    items = [dataset.items[i] for i in ids]
    return ListCounts(
        name,
        len(items),
        sum(bool(item.labels) for item in items),
        sum(item.mask is not None or item.id in made for item in items),
        within,
        tuple(_multi_hot(dataset, ids).sum(0).astype(int).tolist()),
    )


def _lists(dataset: Dataset, made: Collection[str]) -> tuple[ListCounts, ...]:
    sets = {name: frozenset(ids) for name, ids in dataset.lists.items()}
    return tuple(
        _counts(
            name,
            ids,
            dataset,
            made,
            tuple(o for o, others in sets.items() if o != name and ids and sets[name] <= others),
        )
        for name, ids in dataset.lists.items()
    )


def _distinct(whole: ListCounts, lists: Sequence[ListCounts]) -> list[ListCounts]:
    """Lists that a table of classes shows: those with counts of their own."""
    shown: list[ListCounts] = []
    for one in lists:
        if one.classes not in [other.classes for other in (whole, *shown)]:
            shown.append(one)
    return shown[:MOST_LISTS]


# -- Words -------------------------------------------------------------------------------------


def _how(estimate: Estimate) -> str:
    text = (
        f"Time and disk of a run on a list: {_count(estimate.timed, 'image')} timed here with "
        f"{estimate.backbone}, scales {', '.join(f'{s:g}' for s in estimate.scales)}"
        f"{' and flip' if estimate.flip else ''}, {_count(estimate.workers, 'worker')} on "
        f"{estimate.device}; without start, fit, clustering, evaluation and report."
    )
    if estimate.repeated:
        text += (
            f" The features of {', '.join(estimate.repeated)} do not fit into memory and are "
            "counted for each stage."
        )
    return text


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _united(groups: Iterable[Sequence[str]]) -> tuple[str, ...]:
    return tuple(sorted({name for group in groups for name in group}))


def _per_class(images: Mapping[str, Sequence[str]]) -> str:
    parts = sorted((-len(names), name) for name, names in images.items())
    more = [f"{len(parts) - 2 * MOST_NAMED} more classes"] if len(parts) > 2 * MOST_NAMED else []
    return ", ".join([*(f"{name} {-count:,}" for count, name in parts[: 2 * MOST_NAMED]), *more])


def _named(finding: Finding) -> str:
    names = list(finding.names[:MOST_NAMED])
    more = len(finding.names) - len(names)
    return f": {'; '.join(names)}{f' and {more:,} more' if more else ''}" if names else ""


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


def _wrapped(text: str, width: int, bullet: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table() -> Table:
    return Table(
        box=None, pad_edge=False, header_style="", title_justify="left", padding=(0, 2, 0, 0)
    )


def _rendered(table: Table, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, markup=False, emoji=False).print(table)
    return [line.rstrip() for line in stream.getvalue().splitlines()]
