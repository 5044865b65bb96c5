"""``lpcam data check``: contents and problems of a data set, and the cost of a run on it."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lpcam.data.coco.files import ALL, LABELLED
from lpcam.data.dataset import BACKGROUND, IGNORE, Dataset, Item
from lpcam.data.masks import read_index_mask
from lpcam.data.open_dataset import Truth
from lpcam.data.survey import MOST_NAMED, Estimate, Finding, ListCounts, Survey, count_of
from lpcam.data.validation import check_images
from lpcam.runtime.errors import DataError, LpcamError
from lpcam.runtime.parallel import ordered_map

FEW_IMAGES = 20
"""A class with fewer images gets a warning in the summary."""
RARE = 0.1
"""A class with less than this share of the images of a similar name may be a misspelling."""
_UNLABELLED = re.compile(r"\d+ of \d+ images (has|have) no label")
"""A reader's notice of what is a finding here."""


def survey(
    dataset: Dataset,
    *,
    truth: Truth | None = None,
    estimate: Callable[[Dataset, Mapping[str, tuple[int, int]]], Estimate] | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Inspect every file of a data set once and count its contents.

    Unlike a run this does not stop at a mask that cannot be used: all of them are findings.

    Args:
        dataset: a data set that a reader returned.
        truth: true masks that annotations give, as :func:`lpcam.data.open_dataset.open_with_truth`
            gives them. Each is made in memory, and what is wrong with it is a finding.
        estimate: called with the usable images and their sizes (height, width); its result goes
            into the survey. None: no estimate.
        workers: number of files read at a time.
        progress: called with the number of files looked at and of all.

    Raises:
        DataError: if no image can be used.

    Example:
        >>> from lpcam.data.creatures import write
        >>> from lpcam.data.folder import read_folder
        >>> write(getfixture("tmp_path"), images=2, size=32, seed=0)
        >>> survey(read_folder(getfixture("tmp_path"))).whole.masks
        2
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
        yield Finding("left out", f"{count_of(len(names), 'image')} left out ({text})", names)


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
    """Contents of the true mask of an image."""

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
        count = count_of(len(names), "mask cannot be used", "masks cannot be used")
        yield Finding("mask", f"{count} ({text})", names)
    for text, names in _by_reason((name, why) for name, why, made in faults if made):
        images = count_of(len(names), "image")
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
            f"({_commonest(groups['strange'], 'values', ' in')}; of "
            f"{count_of(len(masks), 'mask')})",
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
            text = f"{count_of(len(names), 'image')} with {words} ({_commonest(groups[kind])})"
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
            text = f"{count_of(len(found), 'group')} of images with equal files{words}"
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
        text = f"{count_of(len(close), 'pair')} of classes that may be one, spelt in two ways"
        yield Finding("class names", text, close)
    parts = {name: [part.strip() for part in re.split(r"[,|]", name)] for name in names}
    joined = tuple(name for name in names if len(parts[name]) > 1 and {*parts[name]} <= {*names})
    if joined:
        text = (
            f"{count_of(len(joined), 'class whose name is', 'classes whose names are')} those of "
            "others with ',' or '|' between them; the labels of an image are separated by ';'"
        )
        yield Finding("class names", text, joined)
    folded: dict[str, list[str]] = defaultdict(list)
    for name in dataset.items:
        folded[name.casefold()].append(name)
    same = tuple(", ".join(ids) for ids in folded.values() if len(ids) > 1)
    if same:
        text = (
            f"{count_of(len(same), 'group')} of images whose names differ in capitals only; their "
            "outputs are one file on some systems"
        )
        yield Finding("image names", text, same)


def _may_be_one(one: str, other: str, images: int, others: int) -> bool:
    """Whether two class names differ only by case, blanks, a plural, or a typing error."""
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
        text = count_of(len(none), "class that no image shows", "classes that no image shows")
        yield Finding("empty classes", text, none)
    if few := tuple(f"{name} ({count})" for name, count in counts if 0 < count < FEW_IMAGES):
        text = f"{count_of(len(few), 'class', 'classes')} with fewer than {FEW_IMAGES} images"
        yield Finding("small classes", f"{text}, whose maps may be weak", few, False)
    if bare := tuple(name for name, item in dataset.items.items() if not item.labels):
        text = f"{count_of(len(bare), 'image')} without a label"
        yield Finding("no label", text, bare, len(bare) == whole.images)
    if empty := tuple(one.name for one in lists if not one.images):
        text = count_of(len(empty), "list without a usable image", "lists without a usable image")
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
            text = f"the lists {a} and {b} share {count_of(len(both), 'image')}"
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


def _united(groups: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    return tuple(sorted({name for group in groups.values() for name in group}))


def _commonest(groups: Mapping[str, Sequence[str]], what: str = "classes", word: str = "") -> str:
    """The largest groups with their sizes, and how many more there are."""
    parts = sorted(groups.items(), key=lambda one: (-len(one[1]), one[0].zfill(3)))
    texts = [f"{name}{word} {len(names):,}" for name, names in parts[: 2 * MOST_NAMED]]
    more = len(parts) - len(texts)
    return ", ".join([*texts, f"{more} more {what}"] if more else texts)
