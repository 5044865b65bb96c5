"""``lpcam data check``: contents and problems of a data set, and the cost of a run on it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import combinations
from typing import NamedTuple

import numpy as np

from lpcam.data.coco.files import ALL, LABELLED
from lpcam.data.dataset import BACKGROUND, IGNORE, Dataset, Item, Skip, by_reason
from lpcam.data.label_findings import label_findings
from lpcam.data.open_dataset import Truth
from lpcam.data.pixels import MaskLook, mask_findings, measure
from lpcam.data.survey import MOST_NAMED, Estimate, Finding, ListCounts, Survey, count_of
from lpcam.data.validation import check_images
from lpcam.runtime.errors import LpcamError
from lpcam.runtime.parallel import ordered_map
from lpcam.runtime.progress import progress

FEW_IMAGES = 20  #: A class with fewer images gets a warning in the summary.
_RARE = 0.1  # a class with less than this share of a similar one's images may be a misspelling
# a reader's notice of what is a finding here
_UNLABELLED = re.compile(r"\d+ of \d+ images (has|have) no label")
_Groups = defaultdict[str, list[str]]


def survey(
    dataset: Dataset,
    *,
    truth: Truth | None = None,
    estimate: Callable[[Dataset, Mapping[str, tuple[int, int]]], Estimate] | None = None,
    workers: int = 1,
) -> Survey:
    """Inspect every file of a data set once and count its contents.

    A mask that cannot be used stops a run, but is a finding here; so is one that annotations give
    (``truth``, made in memory). ``estimate`` is called with the usable
    images and their sizes (height, width). DataError if no image can be used.
    """
    truth = truth or {}
    items = dataset.items.values()
    masked = [i for i in items if i.mask is not None or i.parts is not None or i.id in truth]
    # a bad mask ends the check of images, and is one of many findings here
    dataset, of_masks, measured = measure(dataset, truth, workers)
    bare = {name: replace(i, mask=None, parts=None) for name, i in dataset.items.items()}
    masks = {}
    with progress("checking files", len(items) + len(masked)) as advance:
        checked, records = check_images(
            replace(dataset, items=bare), advance=advance, workers=workers
        )
        sizes = {name: (record["height"], record["width"]) for name, record in records.items()}
        dataset = replace(checked, items={name: dataset.items[name] for name in sizes})
        masked = [item for item in masked if item.id in sizes]
        looks = ordered_map(lambda item: _look(item, sizes[item.id], truth), masked, workers)
        for item, look in zip(masked, looks, strict=True):
            masks[item.id] = look
            advance(1, "")

    place = {name: row for row, name in enumerate(sizes)}
    labels = np.zeros((len(sizes), len(dataset.classes)), np.float32)
    for row, item in enumerate(dataset.items.values()):
        labels[row, list(item.labels)] = 1
    true = {i for i, look in masks.items() if look.mask is not None or dataset.items[i].mask}

    def counts(name: str, ids: Sequence[str], within: tuple[str, ...] = ()) -> ListCounts:
        rows = labels[[place[i] for i in ids]]
        shown = tuple(rows.sum(0).astype(int).tolist())
        return ListCounts(name, len(ids), int(rows.any(1).sum()), len(true & {*ids}), within, shown)

    sets = {of: frozenset(ids) for of, ids in dataset.lists.items()}
    whole = counts("", list(sizes))
    lists = tuple(
        counts(of, ids, tuple(o for o in sets if o != of and ids and sets[of] <= sets[o]))
        for of, ids in dataset.lists.items()
    )
    files = {name: one.mask for name, one in masks.items() if one.mask and not one.made}
    ruin = list(mask_findings(dataset, of_masks, files))
    findings = [
        *measured,
        *ruin,
        *_mask_findings(dataset, masks, told={finding.kind for finding in ruin}),
        *_duplicates(dataset, {n: record["image_digest"] for n, record in records.items()}),
        *_name_findings(dataset, whole),
        *_list_findings(dataset, whole, lists),
        *_label_findings(dataset),
        *(Finding("notice", n, (), False) for n in dataset.notices if not _UNLABELLED.fullmatch(n)),
    ]
    by_area = sorted(sizes.values(), key=lambda size: size[0] * size[1])
    median: tuple[int, int] = tuple(np.median(by_area, axis=0).round().astype(int).tolist())
    suffixes = Counter(
        item.image.suffix.lower() or "no extension" for item in dataset.items.values()
    )
    return Survey(
        name=dataset.name,
        label_source=dataset.label_source,
        classes=dataset.classes,
        suffixes=dict(suffixes.most_common()),
        sizes={"smallest": by_area[0], "median": median, "largest": by_area[-1]},
        lists=lists,
        whole=whole,
        # float32 as BLAS wants it: exact up to 16 million images
        together=(labels.T @ labels).astype(np.int64),
        alone=tuple(labels[labels.sum(1) == 1].sum(0).astype(int).tolist()),
        findings=tuple(sorted(findings, key=lambda finding: not finding.attention)),
        estimate=None if estimate is None else estimate(dataset, sizes),
    )


def _some(
    kind: str, names: Sequence[str], one: str, rest: str = "", several: str = "", alert: bool = True
) -> Iterator[Finding]:
    """A finding if there are names: their number with a noun (and its plural), and the rest."""
    if names:
        yield Finding(kind, f"{count_of(len(names), one, several)}{rest}", tuple(names), alert)


class _Look(NamedTuple):
    """Contents of the true mask of an image."""

    mask: MaskLook | None  # None where there is no usable mask of classes
    faults: tuple[str, ...]
    made: bool  # from annotations, not read from a file


def _look(item: Item, size: tuple[int, int], truth: Truth) -> _Look:
    made, mask = item.mask is None and item.parts is None, None
    faults: tuple[str, ...] = ()
    try:
        if made:
            mask, faults = truth[item.id]()
        if item.parts is not None:
            item.read_mask(item.parts, size)
        if item.mask is not None:
            mask = item.read_mask(size=size)
    except LpcamError as error:
        return _Look(None, (str(error),), made)
    if mask is None:
        return _Look(None, faults, made)
    return _Look(MaskLook.of(mask), faults, made)


def _mask_findings(
    dataset: Dataset, masks: Mapping[str, _Look], told: set[str]
) -> Iterator[Finding]:
    """Files that cannot be used, values of no class, and what labels and masks disagree on."""
    table = dataset.classes
    faults: dict[bool, list[Skip]] = {True: [], False: []}
    for name, look in masks.items():
        faults[look.made] += [Skip(name, why) for why in look.faults]
    for kind, reasons, one, rest, several in (
        ("left out", dataset.skipped, "image", " left out", ""),
        ("mask", faults[False], "mask cannot be used", "", "masks cannot be used"),
        ("annotations", faults[True], "image", " with wrong annotations", ""),
    ):
        for names, text in by_reason(reasons):
            example = "e.g. " * (len(names) > 1)
            yield from _some(kind, names, one, f"{rest} ({example}{text})", several)
    usable = {name: look.mask.values for name, look in masks.items() if look.mask is not None}
    labelled = [name for name in usable if dataset.items[name].labels]
    all_values = frozenset().union(*usable.values())
    if "mask values" in told:
        return
    strange, unsaid, unseen = (_Groups(list) for _ in range(3))
    for name, values in usable.items():
        for value in values - {BACKGROUND, IGNORE, *table.mask_ids}:
            strange[str(value)].append(name)
        for index, (class_name, value) in enumerate(zip(table.names, table.mask_ids, strict=True)):
            if (value in values) != (index in dataset.items[name].labels):
                (unsaid if value in values else unseen)[class_name].append(name)
    if strange:
        yield Finding(
            "mask values",
            "mask values of no class here, whose pixels no score counts "
            f"({_commonest(strange, 'values', ' in')}; of {count_of(len(masks), 'mask')})",
            _united(strange),
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
    ids = _united(unsaid)
    text = " with pixels in the mask of a class that is no label, so that no map can show it"
    yield from _some("mask without label", ids, "image", f"{text} ({_commonest(unsaid)})")
    # some labels without pixels are usual where objects are void, as difficult ones of VOC
    ids = _united(unseen)
    text = f" with a label but no pixel of the class in the mask ({_commonest(unseen)})"
    attention = len(ids) > len(labelled) / 2
    yield from _some("label without mask", ids, "image", text, alert=attention)


def _duplicates(dataset: Dataset, digests: Mapping[str, str]) -> Iterator[Finding]:
    """Images whose files are equal byte for byte."""
    groups, found = _Groups(list), _Groups(list)
    for name, digest in digests.items():
        groups[digest].append(name)
    lists = {of: set(ids) for of, ids in dataset.lists.items()}
    words = {
        "duplicates with other labels": ", but with different labels",
        "duplicates across lists": ", but in lists that share nothing",
        "duplicates": "",
    }
    for names in (group for group in groups.values() if len(group) > 1):
        listed = {frozenset(of for of, ids in lists.items() if n in ids) for n in names}
        differ = len({dataset.items[name].labels for name in names}) > 1
        apart = any(a.isdisjoint(b) for a, b in combinations(listed - {frozenset()}, 2))
        for kind, holds in zip(words, (differ, apart, not differ and not apart), strict=True):
            found[kind] += [" = ".join(names)] * holds
    for kind, text in words.items():
        rest = f" of images with equal files{text}"
        yield from _some(kind, found[kind], "group", rest, alert=bool(text))


def _name_findings(dataset: Dataset, whole: ListCounts) -> Iterator[Finding]:
    names = dataset.classes.names
    counts = dict(zip(names, whole.classes, strict=True))
    close = [
        f"{a} ({counts[a]:,}), {b} ({counts[b]:,})"
        for a, b in combinations(names, 2)
        if _may_be_one(a, b, counts[a], counts[b])
    ]
    rest = " of classes that may be one, spelt in two ways"
    yield from _some("class names", close, "pair", rest)
    folded = _Groups(list)
    for name in dataset.items:
        folded[name.casefold()].append(name)
    same = [", ".join(ids) for ids in folded.values() if len(ids) > 1]
    rest = (
        " of images whose names differ in capitals only; their outputs are one file on some systems"
    )
    yield from _some("image names", same, "group", rest)


def _may_be_one(one: str, other: str, images: int, others: int) -> bool:
    """Whether two class names differ only by case, blanks, a plural, or a typing error."""
    a, b = sorted((re.sub(r"[\W_]", "", name.casefold()) for name in (one, other)), key=len)
    if re.sub(r"\D", "", a) != re.sub(r"\D", "", b) or len(b) - len(a) > 2:
        return False
    if b in (a, f"{a}s", f"{a}es"):
        return True
    rare = min(images, others) < _RARE * max(images, others)
    return rare and len(b) - len(a) < 2 and SequenceMatcher(None, a, b).ratio() >= 0.8


def _list_findings(
    dataset: Dataset, whole: ListCounts, lists: Sequence[ListCounts]
) -> Iterator[Finding]:
    counts = list(zip(dataset.classes.names, whole.classes, strict=True))
    none = [name for name, count in counts if not count]
    several = "classes that no image shows"
    yield from _some("empty classes", none, "class that no image shows", several=several)
    few = [f"{name} ({count})" for name, count in counts if 0 < count < FEW_IMAGES]
    rest = f" with fewer than {FEW_IMAGES} images, whose maps may be weak"
    yield from _some("small classes", few, "class", rest, several="classes", alert=False)
    bare = [name for name, item in dataset.items.items() if not item.labels]
    of_all = len(bare) == whole.images
    yield from _some("no label", bare, "image", " without a label", alert=of_all)
    empty = [one.name for one in lists if not one.images]
    several = "lists without a usable image"
    yield from _some("lists", empty, "list without a usable image", several=several)
    sets = {
        of: frozenset(ids)
        for of, ids in dataset.lists.items()
        # what is made up of other lists shares images with them
        if of != ALL and not (of.endswith(LABELLED) and of.removesuffix(LABELLED) in dataset.lists)
    }
    for a, b in combinations(sets, 2):
        both = sets[a] & sets[b]
        if both and both not in (sets[a], sets[b]):
            text = f"the lists {a} and {b} share {count_of(len(both), 'image')}"
            yield Finding("lists", text, tuple(sorted(both)), False)


def _label_findings(dataset: Dataset) -> Iterator[Finding]:
    """What labels cannot teach, of all images and of lists that may train."""
    yield from (found := [*label_findings(dataset.classes, [*dataset.items.values()])])
    for name in dataset.lists if not found else ():
        if name.startswith("train") and not name.endswith(LABELLED):
            of_list = label_findings(dataset.classes, dataset.select(name), (), f"list {name}: ")
            yield from (replace(finding, attention=False) for finding in of_list)


def _united(groups: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    return tuple(sorted({name for group in groups.values() for name in group}))


def _commonest(groups: Mapping[str, Sequence[str]], what: str = "classes", word: str = "") -> str:
    """The largest groups with their sizes, and how many more there are."""
    parts = sorted(groups.items(), key=lambda one: (-len(one[1]), one[0].zfill(3)))
    texts = [f"{name}{word} {len(names):,}" for name, names in parts[: 2 * MOST_NAMED]]
    more = len(parts) - len(texts)
    return ", ".join([*texts, f"{more} more {what}"] if more else texts)
