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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from lpcam.data.coco.files import ALL, LABELLED
from lpcam.data.dataset import BACKGROUND, IGNORE, ClassTable, Dataset, Item
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
"""Classes named beside each in that table: those it is most often shown with."""
RARE = 0.1
"""A class with less than this share of the images of a similar name may be a misspelling."""
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
    """Numbers of usable images of a list."""

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
        kinds = ", ".join(
            suffix if len(self.suffixes) == 1 else f"{count:,} {suffix}"
            for suffix, count in self.suffixes.items()
        )
        sizes = [f"{height} × {across}" for height, across in (self.smallest, self.largest)]
        lines = _wrapped(
            f"{self.name}: {_count(self.whole.images, 'image')} ({kinds}), "
            f"{_count(len(self.classes), 'class', 'classes')}, "
            f"{_count(self.whole.masks, 'mask')}; labels from {self.label_source}. Height × width "
            f"{' to '.join(sizes)}, median {self.median[0]} × {self.median[1]} pixels.",
            width,
        )
        lines += ["", *_rendered(self._list_rows(), width)]
        if self.estimate is not None:
            lines += _wrapped(_how(self.estimate), width)
        lines += ["", *_rendered(self._class_rows(), width), ""]
        for title, attention in (("Needs attention", True), ("Good to know", False)):
            findings = [f for f in self.findings if f.attention == attention]
            lines += [title] * bool(findings)
            for finding in findings:
                lines += _wrapped(f"{finding.text}{_named(finding)}", width, "- ")
        if not self.problems:
            lines.append("Nothing needs attention.")
        return "\n".join(lines)

    def _list_rows(self) -> Iterator[list[str]]:
        estimate = self.estimate
        nested = any(one.within for one in self.lists)
        titles = ["list", "images", "labelled", "masks"]
        titles += [] if estimate is None else ["time of a run", "disk"]
        yield [*titles, "lies within"] if nested else titles
        for one in self.lists:
            row = [one.name, f"{one.images:,}", f"{one.labelled:,}", f"{one.masks:,}"]
            if estimate is not None:
                row += [_duration(estimate.seconds[one.name]), _bytes(estimate.disk[one.name])]
            yield [*row, ", ".join(one.within)] if nested else row

    def _class_rows(self) -> Iterator[list[str]]:
        names, count = self.classes.names, len(self.classes)
        shown: list[ListCounts] = []
        for one in self.lists:  # those with counts of their own
            if one.classes not in [other.classes for other in (self.whole, *shown)]:
                shown.append(one)
        shown = [self.whole, *shown[:MOST_LISTS]]
        titles = ["class", "images", *(one.name for one in shown[1:]), "alone"]
        yield [*titles, "most often together with"]
        order, half = list(range(count)), MOST_CLASSES // 2
        if count > MOST_CLASSES:
            order.sort(key=lambda row: -self.whole.classes[row])
            order[half:-half] = [-1]
        for row in order:
            if row < 0:
                yield [f"... {count - 2 * half} more"]
                continue
            pairs = sorted((-n, other) for other, n in enumerate(self.together[row].tolist()) if n)
            companions = [
                f"{names[other]} {-100 * n / self.whole.classes[row]:.0f} %"
                for n, other in pairs
                if other != row
            ]
            counts = [f"{one.classes[row]:,}" for one in shown]
            companion = ", ".join(companions[:COMPANIONS])
            yield [names[row], *counts, f"{self.alone[row]}", companion]


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
    masked = [
        item
        for item in dataset.items.values()
        if item.mask is not None or item.parts is not None or item.id in truth
    ]
    total = len(dataset.items) + len(masked)

    def advance(done: int, _: int) -> None:
        if progress is not None:
            progress(done, total)

    # a bad mask ends that check, and is one of many findings here
    bare = {name: replace(i, mask=None, parts=None) for name, i in dataset.items.items()}
    checked, records = check_images(replace(dataset, items=bare), progress=advance, workers=workers)
    usable = {name: dataset.items[name] for name in checked.items}
    dataset = replace(checked, items=usable)
    sizes = {name: (record["height"], record["width"]) for name, record in records.items()}
    masks = {}
    masked = [item for item in masked if item.id in usable]
    looks = ordered_map(lambda item: _look(item, sizes[item.id], truth), masked, workers)
    for number, (item, look) in enumerate(zip(masked, looks, strict=True), start=1):
        masks[item.id] = look
        advance(total - len(masked) + number, 0)

    made = {name for name, look in masks.items() if look.made and look.values is not None}
    sets = {name: frozenset(ids) for name, ids in dataset.lists.items()}
    whole = _counts(dataset, "", list(usable), made, {})
    lists = tuple(_counts(dataset, of, ids, made, sets) for of, ids in dataset.lists.items())
    labels = _multi_hot(dataset, usable)
    findings = [
        *_left_out(dataset),
        *_mask_findings(dataset, masks),
        *_duplicates(dataset, {n: record["image_digest"] for n, record in records.items()}),
        *_name_findings(dataset, whole),
        *_list_findings(dataset, whole, lists),
        *(Finding("notice", n, (), False) for n in dataset.notices if not _UNLABELLED.fullmatch(n)),
    ]
    by_area = sorted(sizes.values(), key=lambda size: size[0] * size[1])
    return Survey(
        name=dataset.name,
        label_source=dataset.label_source,
        classes=dataset.classes,
        suffixes=dict(Counter(i.image.suffix.lower() for i in usable.values()).most_common()),
        smallest=by_area[0],
        median=tuple(np.median(by_area, axis=0).round().astype(int).tolist()),
        largest=by_area[-1],
        lists=lists,
        whole=whole,
        # float32 as BLAS wants it: exact up to 16 million images
        together=(labels.T @ labels).astype(np.int64),
        alone=tuple(labels[labels.sum(1) == 1].sum(0).astype(int).tolist()),
        findings=tuple(sorted(findings, key=lambda finding: not finding.attention)),
        estimate=None if estimate is None else estimate(dataset, sizes),
    )


# -- Findings ----------------------------------------------------------------------------------


def _left_out(dataset: Dataset) -> Iterator[Finding]:
    for text, names in _by_reason([(skip.id, skip.reason) for skip in dataset.skipped]):
        yield Finding("left out", f"{_count(len(names), 'image')} left out ({text})", names)


def _by_reason(reasons: Iterable[tuple[str, str]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A reason in short, and the ids that share it but for names and numbers in it."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for image_id, reason in reasons:
        text = re.sub(r"[^\s'\"]*[/\\](?=\S)", "", reason)  # of a path only the name
        name = re.escape(image_id.rsplit("/", 1)[-1])
        key = re.sub(r"\d+", "#", re.sub(rf"(?<!\w){name}(\.\w+)?(?!\w)", "#", text))
        groups[key].append((image_id, text))
    for group in sorted(groups.values(), key=lambda group: -len(group)):
        example = "e.g. " if len(group) > 1 else ""
        yield example + group[0][1], tuple(dict.fromkeys(name for name, _ in group))


class _Look(NamedTuple):
    """What the true mask of an image holds."""

    values: frozenset[int] | None
    """None where there is no usable mask of classes."""
    faults: tuple[str, ...]
    made: bool
    """Whether it is made from annotations, not read from a file."""


def _look(item: Item, size: tuple[int, int], truth: Truth) -> _Look:
    made = item.mask is None and item.parts is None
    try:
        if made:
            mask, faults = truth[item.id]()
            return _Look(None if mask is None else _values(mask), faults, made)
        values = None
        for path in filter(None, (item.parts, item.mask)):
            mask = read_index_mask(path)
            if mask.shape != size:
                height, width = mask.shape
                raise DataError(
                    f"{path} is {height} × {width} (height × width), the upright image "
                    f"{size[0]} × {size[1]}"
                )
            values = _values(mask) if path == item.mask else None
        return _Look(values, (), made)
    except LpcamError as error:
        return _Look(None, (str(error),), made)


def _values(mask: NDArray[np.uint8]) -> frozenset[int]:
    return frozenset(np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist())


def _mask_findings(dataset: Dataset, masks: Mapping[str, _Look]) -> Iterator[Finding]:
    """Masks that cannot be used, values of no class, and what labels and masks disagree on."""
    table = dataset.classes
    faults = [(name, why, look.made) for name, look in masks.items() for why in look.faults]
    for text, names in _by_reason((name, why) for name, why, made in faults if not made):
        count = _count(len(names), "mask cannot be used", "masks cannot be used")
        yield Finding("mask", f"{count} ({text})", names)
    for text, names in _by_reason((name, why) for name, why, made in faults if made):
        images = _count(len(names), "image")
        yield Finding("annotations", f"{images} with wrong annotations ({text})", names)
    usable = {name: look.values for name, look in masks.items() if look.values is not None}
    labelled = [name for name in usable if dataset.items[name].labels]
    all_values = frozenset().union(*usable.values())
    drawn = any(not masks[name].made for name in usable)
    if drawn and labelled and all_values == {BACKGROUND, IGNORE}:
        yield Finding(
            "mask values",
            "the masks hold 0 and 255 alone, and 255 is not counted; write the class's number "
            f"instead ({table.mask_ids[0]} for {table.names[0]})",
        )
        return
    groups: dict[str, dict[str, list[str]]] = {
        kind: defaultdict(list) for kind in ("strange", "unsaid", "unseen")
    }
    for name, values in usable.items():
        for value in values - {BACKGROUND, IGNORE, *table.mask_ids}:
            groups["strange"][str(value)].append(name)
        for index, (class_name, value) in enumerate(zip(table.names, table.mask_ids, strict=True)):
            if (value in values) != (index in dataset.items[name].labels):
                kind = "unsaid" if value in values else "unseen"
                groups[kind][class_name].append(name)
    if groups["strange"]:
        yield Finding(
            "mask values",
            "mask values of no class here, whose pixels no score counts "
            f"({_commonest(groups['strange'], 'values', ' in')}; of {_count(len(masks), 'mask')})",
            _united(groups["strange"]),
        )
    if usable and all_values.isdisjoint(table.mask_ids):
        found = ", ".join(map(str, sorted(all_values)[: 2 * MOST_NAMED]))
        yield Finding(
            "no truth",
            f"none of the true masks ({len(usable):,}) shows a class, so a run is not scored (the "
            f"values in them: {found}{', ...' * (len(all_values) > 2 * MOST_NAMED)}; 0 is "
            "background, 255 is not counted)",
            tuple(usable),
        )
        return
    for kind, title, words in (
        (
            "unsaid",
            "mask without label",
            "pixels in the mask of a class that is no label, so that no map can show it",
        ),
        ("unseen", "label without mask", "a label but no pixel of the class in the mask"),
    ):
        if names := _united(groups[kind]):
            text = f"{_count(len(names), 'image')} with {words} ({_commonest(groups[kind])})"
            # some labels without pixels are usual where objects are void, as difficult ones of VOC
            attention = kind == "unsaid" or len(names) > len(labelled) / 2
            yield Finding(title, text, names, attention)


def _duplicates(dataset: Dataset, digests: Mapping[str, str]) -> Iterator[Finding]:
    """Images whose files are equal byte for byte."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, digest in digests.items():
        groups[digest].append(name)
    equal = [names for names in groups.values() if len(names) > 1]
    lists_of: dict[str, set[str]] = {name: set() for names in equal for name in names}
    for of, ids in dataset.lists.items():
        for name in lists_of.keys() & set(ids):
            lists_of[name].add(of)

    def differ(names: Sequence[str]) -> bool:
        return len({dataset.items[name].labels for name in names}) > 1

    def apart(names: Sequence[str]) -> bool:
        places = {frozenset(lists_of[name]) for name in names if lists_of[name]}
        return any(a.isdisjoint(b) for a, b in itertools.combinations(places, 2))

    for test, kind, words in (
        (differ, "duplicates with other labels", ", but with different labels"),
        (apart, "duplicates across lists", ", but in lists that share nothing"),
        (lambda names: not differ(names) and not apart(names), "duplicates", ""),
    ):
        found = tuple(" = ".join(names) for names in equal if test(names))
        if found:
            text = f"{_count(len(found), 'group')} of images with equal files{words}"
            yield Finding(kind, text, found, bool(words))


def _name_findings(dataset: Dataset, whole: ListCounts) -> Iterator[Finding]:
    names = dataset.classes.names
    counts = dict(zip(names, whole.classes, strict=True))
    close = tuple(
        f"{a} ({counts[a]:,}), {b} ({counts[b]:,})"
        for a, b in itertools.combinations(names, 2)
        if _may_be_one(a, b, counts[a], counts[b])
    )
    if close:
        text = f"{_count(len(close), 'pair')} of classes that may be one, spelt in two ways"
        yield Finding("class names", text, close)
    parts = {name: [part.strip() for part in re.split(r"[,|]", name)] for name in names}
    joined = tuple(name for name in names if len(parts[name]) > 1 and {*parts[name]} <= {*names})
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
    counts = list(zip(dataset.classes.names, whole.classes, strict=True))
    if none := tuple(name for name, count in counts if not count):
        text = _count(len(none), "class that no image shows", "classes that no image shows")
        yield Finding("empty classes", text, none)
    if few := tuple(f"{name} ({count})" for name, count in counts if 0 < count < FEW_IMAGES):
        text = f"{_count(len(few), 'class', 'classes')} with fewer than {FEW_IMAGES} images"
        yield Finding("small classes", f"{text}, whose maps may be weak", few, False)
    if bare := tuple(name for name, item in dataset.items.items() if not item.labels):
        text = f"{_count(len(bare), 'image')} without a label"
        yield Finding("no label", text, bare, len(bare) == whole.images)
    if empty := tuple(one.name for one in lists if not one.images):
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
        if both and both not in (sets[a], sets[b]):
            text = f"the lists {a} and {b} share {_count(len(both), 'image')}"
            yield Finding("lists", text, tuple(sorted(both)), False)


# -- Counts ------------------------------------------------------------------------------------


def _multi_hot(dataset: Dataset, ids: Collection[str]) -> NDArray[np.float32]:
    """(images, classes), 1 where an image shows a class."""
    labels = np.zeros((len(ids), len(dataset.classes)), np.float32)
    for row, name in enumerate(ids):
        labels[row, list(dataset.items[name].labels)] = 1
    return labels


def _counts(
    dataset: Dataset,
    name: str,
    ids: Sequence[str],
    made: Collection[str],
    sets: Mapping[str, frozenset[str]],
) -> ListCounts:
    items = [dataset.items[i] for i in ids]
    return ListCounts(
        name,
        len(items),
        sum(bool(item.labels) for item in items),
        sum(item.mask is not None or item.id in made for item in items),
        tuple(o for o, others in sets.items() if o != name and ids and sets[name] <= others),
        tuple(_multi_hot(dataset, ids).sum(0).astype(int).tolist()),
    )


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


def _united(groups: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    return tuple(sorted({name for group in groups.values() for name in group}))


def _commonest(groups: Mapping[str, Sequence[str]], what: str = "classes", word: str = "") -> str:
    """The largest groups with their sizes, and how many more there are."""
    parts = sorted(groups.items(), key=lambda one: (-len(one[1]), one[0].zfill(3)))
    texts = [f"{name}{word} {len(names):,}" for name, names in parts[: 2 * MOST_NAMED]]
    more = len(parts) - len(texts)
    return ", ".join([*texts, f"{more} more {what}"] if more else texts)


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


def _rendered(rows: Iterable[Sequence[str]], width: int) -> list[str]:
    """Lines of a table whose first row is its head; numbers are aligned at the right."""
    head, *body = rows
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    texts = ("list", "class", "lies within", "most often together with")
    for title in head:
        table.add_column(title, justify="left" if title in texts else "right")
    for row in body:
        table.add_row(*row)
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, markup=False, emoji=False).print(table)
    return [line.rstrip() for line in stream.getvalue().splitlines()]
