"""``lpcam data check``: contents and problems of a data set, and the cost of a run on it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import combinations

import numpy as np

from lpcam.data.coco.files import ALL, LABELLED
from lpcam.data.dataset import BACKGROUND, IGNORE, Dataset, Item, Skip, by_reason
from lpcam.data.open_dataset import Truth
from lpcam.data.pixels import MaskLook, mask_findings, measure
from lpcam.data.survey import Estimate, Finding, ListCounts, Survey, count_of, label_findings
from lpcam.data.validation import check_images
from lpcam.runtime.errors import LpcamError, shortened
from lpcam.runtime.parallel import ordered_map
from lpcam.runtime.progress import progress

FEW_IMAGES = 20  #: A class with fewer images gets a warning in the summary.
_RARE = 0.1  # a class with less than this share of a similar one's images may be a misspelling
# a reader's notice of what is a finding here
_UNLABELLED = re.compile(r"\d+ of \d+ images (has|have) no label")
_Groups = defaultdict[str, list[str]]
_Look = tuple[MaskLook | None, tuple[str, ...]]


def survey(
    dataset: Dataset,
    *,
    truth: Truth | None = None,
    estimate: Callable[[Dataset, Mapping[str, tuple[int, int]]], Estimate] | None = None,
    workers: int = 1,
) -> Survey:
    """Inspect every file of a data set once and count its contents.

    ``truth`` are masks that annotations give; ``estimate`` is called with the usable images and
    their sizes (height, width). DataError if no image can be used.
    """
    truth = truth or {}
    items = dataset.items.values()
    masked = [i for i in items if i.mask is not None or i.parts is not None or i.id in truth]
    # a bad mask ends the check of images, and is one of many findings here
    dataset, of_masks, measured = measure(dataset, truth, workers)
    bare = {name: replace(i, mask=None, parts=None) for name, i in dataset.items.items()}
    bare_set, masks = replace(dataset, items=bare), {}
    with progress("checking files", len(items) + len(masked)) as advance:
        checked, records = check_images(bare_set, advance=advance, workers=workers)
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
    true = {name for name, (look, _) in masks.items() if look or dataset.items[name].mask}

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
    files = {n: look for n, (look, _) in masks.items() if look and dataset.items[n].mask}
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
    suffixes = Counter(i.image.suffix.lower() or "no extension" for i in dataset.items.values())
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


def _look(item: Item, size: tuple[int, int], truth: Truth) -> _Look:
    """What the true mask of an image holds, None without a usable one, and its faults."""
    mask, faults = None, tuple[str, ...]()
    try:
        if item.parts is not None:
            item.read_mask(item.parts, size)
        if item.mask is not None:
            mask = item.read_mask(size=size)
        elif item.parts is None:
            mask, faults = truth[item.id]()
    except LpcamError as error:
        return None, (str(error),)
    return None if mask is None else MaskLook.of(mask), faults


def _mask_findings(
    dataset: Dataset, masks: Mapping[str, _Look], told: set[str]
) -> Iterator[Finding]:
    """Files that cannot be used, values of no class, and what labels and masks disagree on."""
    table = dataset.classes
    files, made = list[Skip](), list[Skip]()
    for name, (_, faults) in masks.items():
        item = dataset.items[name]
        (files if item.mask or item.parts else made).extend(Skip(name, why) for why in faults)
    for kind, reasons, one, rest, several in (
        ("left out", dataset.skipped, "image", " left out", ""),
        ("mask", files, "mask cannot be used", "", "masks cannot be used"),
        ("annotations", made, "image", " with wrong annotations", ""),
    ):
        for names, text in by_reason(reasons):
            example = "e.g. " * (len(names) > 1)
            yield from _some(kind, names, one, f"{rest} ({example}{text})", several)
    if "mask values" in told:
        return
    usable = {name: look.values for name, (look, _) in masks.items() if look is not None}
    labelled = [name for name in usable if dataset.items[name].labels]
    all_values = frozenset().union(*usable.values())
    strange, unsaid, unseen = (_Groups(list) for _ in range(3))
    for name, values in usable.items():
        for value in values - {BACKGROUND, IGNORE, *table.mask_ids}:
            strange[str(value)].append(name)
        for index, (class_name, value) in enumerate(zip(table.names, table.mask_ids, strict=True)):
            if (value in values) != (index in dataset.items[name].labels):
                (unsaid if value in values else unseen)[class_name].append(name)
    if strange:
        what = f"({_commonest(strange, ' in')}; of {count_of(len(masks), 'mask')})"
        text = f"mask values of no class here, whose pixels no score counts {what}"
        yield Finding("mask values", text, _united(strange))
    if usable and all_values.isdisjoint(table.mask_ids):
        found = shortened([str(value) for value in sorted(all_values)])
        text = (
            f"none of the true masks ({len(usable):,}) shows a class, so a run is not scored (the "
            f"values in them: {found}; 0 is background, 255 is not counted)"
        )
        yield Finding("no truth", text, tuple(usable))
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
    counts = zip(names, whole.classes, strict=True)
    pairs = ((a, b, n, m) for (a, n), (b, m) in combinations(counts, 2))
    close = [f"{a} ({n:,}), {b} ({m:,})" for a, b, n, m in pairs if _may_be_one(a, b, n, m)]
    rest = " of classes that may be one, spelt in two ways"
    yield from _some("class names", close, "pair", rest)
    folded = _Groups(list)
    for name in dataset.items:
        folded[name.casefold()].append(name)
    same = [", ".join(ids) for ids in folded.values() if len(ids) > 1]
    rest = " of images whose names differ in capitals only, which are one file on some systems"
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
    rest = " that no image shows"
    yield from _some("empty classes", none, "class", rest, "classes")
    few = [f"{name} ({count})" for name, count in counts if 0 < count < FEW_IMAGES]
    rest = f" with fewer than {FEW_IMAGES} images, whose maps may be weak"
    yield from _some("small classes", few, "class", rest, "classes", alert=False)
    bare = [name for name, item in dataset.items.items() if not item.labels]
    yield from _some("no label", bare, "image", " without a label", alert=not whole.labelled)
    empty = [one.name for one in lists if not one.images]
    yield from _some("lists", empty, "list", " without a usable image")
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
    """What labels cannot teach, of all images, else of lists that may train."""
    yield from (found := [*label_findings(dataset.classes, [*dataset.items.values()])])
    train = [n for n in dataset.lists if n.startswith("train") and not n.endswith(LABELLED)]
    for name in train if not found else ():
        of_list = label_findings(dataset.classes, dataset.select(name), where=f"list {name}: ")
        yield from (replace(finding, attention=False) for finding in of_list)


def _united(groups: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    return tuple(sorted({name for group in groups.values() for name in group}))


def _commonest(groups: Mapping[str, Sequence[str]], word: str = "") -> str:
    """The largest groups with their sizes, and how many more there are."""
    parts = sorted(groups.items(), key=lambda one: (-len(one[1]), one[0].zfill(3)))
    return shortened([f"{name}{word} {len(names):,}" for name, names in parts])
