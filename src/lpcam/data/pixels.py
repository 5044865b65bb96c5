"""What a run would use, measured before it costs time: levels, orientation, palettes, agreement.

Looked at are all headers, and the pixels of a seeded sample (``lpcam data check``: of all masks).
What would ruin a run or its scores (`Finding.ruins`) stops ``lpcam init`` and ``lpcam run``.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lpcam.data.dataset import BACKGROUND, IGNORE, Dataset, Item, shows_nothing
from lpcam.data.images import (
    FEW_LEVELS,
    Header,
    Reading,
    Span,
    Values,
    distinct,
    is_squeezed,
    load_values,
    read_header,
    scale_values,
    to_rgb,
)
from lpcam.data.labels import normal_name, read_text
from lpcam.data.reader import TrueMask
from lpcam.data.survey import Finding, count_of
from lpcam.runtime.errors import DataError, LpcamError, nearest_name, shortened
from lpcam.runtime.files import digest_json
from lpcam.runtime.parallel import ordered_map

SAMPLE = 200  #: Images, and masks, whose pixels are looked at before a run.
SAMPLE_PIXELS = 60_000_000  #: Pixels of a sample, so that large images take seconds too.
FEWEST = 3  #: Images from which on shares of a sample count.
SQUEEZED = 0.25  #: Share of images with few grey levels above which they ruin a run.
AGREEMENT = 0.5  #: Share of the classes shown below which labels and masks disagree.
EXPLAINED = 0.9  #: Share from which on an order explains masks, or palettes are right.
RANGES = ((0, 1), (0, 255), (0, 1023), (0, 4095), (0, 16383), (0, 65535))
TAILS = (0.1, 99.9)
Headers = Mapping[str, Header]
Labelled = Mapping[str, frozenset[int]]  # values in masks of labelled images
T = TypeVar("T")
R = TypeVar("R")
_PIXELS_OF_EACH = 20_000  # of an image, for percentiles
_COLOUR_LINES = (  # name:r,g,b:: of CVAT and name,r,g,b of CSV files, r g b name of CamVid
    r"(?P<name>[^:,]+)[:,]\s*(?P<rgb>\d+\s*,\s*\d+\s*,\s*\d+)\s*(:.*)?",
    r"(?P<rgb>\d+\s+\d+\s+\d+)\s+(?P<name>.+)",
)


def given_reading(
    dataset: Dataset, range: Span = None, orientation: Any = None, palette: Path | None = None
) -> Dataset:
    """The data set with what the user says of its pixels; DataError if that cannot be."""
    if range is not None and not range[0] < range[1]:
        raise DataError(f"the range {range[0]:g},{range[1]:g} is empty; give the lower value first")
    colours = () if palette is None else read_palette(palette, dataset)
    return dataset.read_with(Reading(range, orientation, colours))


def read_palette(path: Path, dataset: Dataset) -> tuple[tuple[int, int], ...]:
    """Colours (0xRRGGBB) of a data set's classes with their mask values, of a file that names them.

    What is ignored and classes that were not chosen have 255. DataError if the file does not fit.
    """
    how = "Write lines such as cow:64,128,0:: (CVAT's labelmap.txt)."
    text = read_text(path, how)
    try:
        lines = [line.strip() for line in text.splitlines()]
        found = [re.fullmatch(form, line) for line in lines for form in _COLOUR_LINES]
        pairs = [(m["name"], re.findall(r"\d+", m["rgb"])) for m in found if m is not None]
        if path.suffix.lower() == ".json":
            pairs = [*json.loads(text).items()]
        colours = {normal_name(name): int.from_bytes(map(int, rgb)) for name, rgb in pairs}
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path} names no colours ({error}). {how}") from error
    values = dict(zip(dataset.classes.names, dataset.classes.mask_ids, strict=True))
    for name in (name for name in values if name not in colours):
        named = shortened([*colours]) or "nothing"
        near = nearest_name(name, colours)
        raise DataError(f"{path} names no colour of {name!r}{near}; add one. It names {named}")
    if len(set(colours.values())) < len(colours):
        raise DataError(f"{path} has one colour for several names; give each its own")
    empty = [name for name in colours if shows_nothing(name) == "background"]
    others = {name: BACKGROUND if name in empty else IGNORE for name in colours}
    return tuple(sorted((colour, (others | values)[name]) for name, colour in colours.items()))


@dataclass(frozen=True)
class MaskLook:
    """Contents of a true mask."""

    values: frozenset[int]
    thin: int  #: Number of objects' values that fill no square of 3 x 3 pixels.

    @classmethod
    def of(cls, mask: NDArray[np.uint8]) -> MaskLook:
        """The look of one mask (H, W)."""
        values = frozenset(np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist())
        objects = values - {BACKGROUND, IGNORE}
        if min(mask.shape) < 16 or len(objects) < 2:
            return cls(values, 0)
        windows = np.lib.stride_tricks.sliding_window_view(mask, (3, 3))
        solid = np.all(windows == windows[:, :, 1:2, 1:2], axis=(2, 3))
        return cls(values, len(objects - {*np.unique(windows[solid][:, 1, 1]).tolist()}))


def look_at_pixels(
    dataset: Dataset, truth: Mapping[str, TrueMask] | None = None, workers: int = 1
) -> tuple[Dataset, tuple[Finding, ...]]:
    """Measure a data set before a run; it is returned with the range that was measured."""
    dataset, of_masks, findings = measure(dataset, truth, workers)
    chosen = _sample([dataset.items[name] for name in of_masks], of_masks)
    looks = _each(lambda item: MaskLook.of(item.read_mask()), chosen, workers)
    seen = replace(findings[0], text=f"{findings[0].text} and {count_of(len(looks), 'mask')}")
    return dataset, (seen, *findings[1:], *mask_findings(dataset, of_masks, looks))


def refuse_ruin(findings: Iterable[Finding], *, anyway: bool) -> None:
    """Raise DataError with the findings that would ruin a run, unless it shall go on anyway."""
    ruins = [f"\n- {finding}" for finding in findings if finding.ruins]
    if ruins and not anyway:
        raise DataError(
            f"a run on these pixels would be of no use:{''.join(ruins)}\nto go on all the same: "
            "--anyway (in a recipe data.anyway: true)"
        )


def key_of(dataset: Dataset) -> str:
    """Digest of what the measurements depend on but the range; contents count by size and time."""
    version, reading = 2, dataset.reading
    parts: list[Any] = [version, reading.orientation, reading.palette, dataset.classes.mask_ids]
    for item in dataset.items.values():
        for path in filter(None, (item.image, item.mask)):
            with contextlib.suppress(OSError):
                stat = path.stat()
                parts.append([item.id, path.name, stat.st_size, stat.st_mtime_ns, item.labels])
    return digest_json(parts)


def measure(
    dataset: Dataset, truth: Mapping[str, TrueMask] | None = None, workers: int = 1
) -> tuple[Dataset, dict[str, Header], list[Finding]]:
    """The data set with its range, the headers of its masks, and what headers and a sample tell."""
    items = dataset.items
    of_images = _each(lambda item: read_header(item.image), items, workers)
    masked = {name: item.mask for name, item in items.items() if item.mask is not None}
    of_masks = _each(read_header, masked, workers)
    deep = [items[name] for name, header in of_images.items() if header.deep]
    flat = [items[name] for name, header in of_images.items() if not header.deep]
    of_deep = _each(_values, _sample(deep, of_images), workers)
    of_flat = _each(_values, _sample(flat, of_images), workers)
    span = dataset.reading.range or _measured_range([*of_deep.values()])
    findings = [
        Finding(
            "pixels",
            f"looked at: the headers of {count_of(len(items), 'image')} and "
            f"{count_of(len(of_masks), 'mask')}, and the pixels of "
            f"{count_of(len(of_deep) + len(of_flat), 'image')}",
            attention=False,
        ),
        *_dark(of_flat, of_deep),
        *_range_findings(dataset, len(deep), of_deep, span),
        *_orientation(dataset, of_images, of_masks, truth or {}),
    ]
    return dataset.read_with(replace(dataset.reading, range=span)), of_masks, findings


def _each(work: Callable[[T], R | None], of: Mapping[str, T], workers: int) -> dict[str, R]:
    """Results by id; files that cannot be read are left to the check of all files."""

    def attempt(one: T) -> R | None:
        with contextlib.suppress(LpcamError):
            return work(one)
        return None

    found = zip(of, ordered_map(attempt, of.values(), workers), strict=True)
    return {name: one for name, one in found if one is not None}


def _sample(items: Sequence[Item], headers: Mapping[str, Header]) -> dict[str, Item]:
    """At most `SAMPLE` items by id with at most `SAMPLE_PIXELS` pixels, the same in every call."""
    pixels, chosen = 0, dict[str, Item]()
    for place in np.random.default_rng(0).permutation(len(items)).tolist():
        pixels += math.prod(headers[items[place].id].size)
        if len(chosen) == SAMPLE or (chosen and pixels > SAMPLE_PIXELS):
            break
        chosen[items[place].id] = items[place]
    return chosen


def _values(item: Item) -> Values | None:
    """Some finite values of an image with its lowest and highest; None without any."""
    image, values = load_values(item.image, item.image, reading=item.reading)
    flat = (to_rgb(image) if values is None else values).ravel()
    flat = flat[np.isfinite(flat)] if flat.dtype.kind == "f" else flat
    some = flat[:: 1 + flat.size // _PIXELS_OF_EACH]
    return np.append(some, [flat.min(), flat.max()]).astype(flat.dtype) if flat.size else None


def _measured_range(values: Sequence[Values]) -> Span:
    """One range for all images with more than 8 bits; None without any."""
    if not values:
        return None
    pooled = np.concatenate([one.astype(np.float64) for one in values])
    low, high = np.percentile(pooled, TAILS).tolist()
    whole = all(one.dtype.kind != "f" for one in values)
    held = [r for r in RANGES[whole:] if r[0] <= pooled.min() and pooled.max() <= r[1]]
    if held and high - low > held[0][1] / 2:
        return float(held[0][0]), float(held[0][1])
    low, high = (math.floor(low), math.ceil(high)) if whole else (low, high)
    return float(f"{low:.6g}"), float(f"{high if high > low else low + 1:.6g}")


def _dark(values: Mapping[str, Values], deep: Mapping[str, Values]) -> Iterator[Finding]:
    """Images of one colour, and images of 8 bits that use the lowest values alone."""
    everything = {**values, **deep}
    plain = [name for name, v in everything.items() if v.min() == v.max()]
    if len(plain) >= FEWEST and len(plain) > len(everything) / 2:
        yield Finding(
            "one colour",
            f"{count_of(len(plain), 'image')} of {len(everything)} looked at of one grey value "
            "alone (transparent pixels are white), which shows nothing; save them again",
            tuple(plain),
            ruins=True,
        )
    low = {name: v for name, v in values.items() if v.max() < FEW_LEVELS}
    dark = [name for name, v in low.items() if distinct(v) > FEWEST]  # not of one colour
    if len(dark) >= FEWEST and len(dark) > SQUEEZED * len(values):
        yield Finding(
            "range",
            f"{count_of(len(dark), 'image')} of {len(values)} looked at with no value above "
            f"{FEW_LEVELS - 1} of 255: squeezed when they were saved, or masks; save them again",
            tuple(dark),
            ruins=True,
        )


def _range_findings(
    dataset: Dataset, deep: int, values: Mapping[str, Values], span: Span
) -> Iterator[Finding]:
    """What becomes of values with more than 8 bits, of which a range may leave few grey levels."""
    if span is None:
        return
    if not values:
        unused = "the range is not used: no image has more than 8 bits"
        yield Finding("range", unused, attention=False)
        return
    text = f"values from {span[0]:g} to {span[1]:g} become 0 to 255"
    pooled = np.concatenate([*values.values()])
    has = f"{pooled.min():g} to {pooled.max():g}"
    squeezed = [name for name, v in values.items() if is_squeezed(v, scale_values(v, span))]
    if squeezed:
        yield Finding(
            "range",
            f"{count_of(len(squeezed), 'image')} of {len(values)} looked at left with fewer than "
            f"{FEW_LEVELS} grey levels, because {text}; they have {has}. Give one for all images: "
            "--range LOW,HIGH",
            tuple(squeezed),
            ruins=len(squeezed) > SQUEEZED * len(values),
        )
    mixed = deep < len(dataset.items)
    how = "measured" if dataset.reading.range is None else "given"
    yield Finding(
        "range",
        f"{count_of(deep, 'image')} of {len(dataset.items):,} with more than 8 bits: {text}, "
        f"others are clipped ({how}; {len(values)} looked at have {has}). --range LOW,HIGH changes "
        f"it{'; the other images have 8 bits, which are read as they are' * mixed}",
        attention=mixed,
    )


def _orientation(
    dataset: Dataset, of_images: Headers, of_masks: Headers, truth: Mapping[str, TrueMask]
) -> Iterator[Finding]:
    """Images with an EXIF orientation and masks that may be of the stored image."""
    if dataset.reading.orientation is not None:
        return
    turned = [name for name, header in of_images.items() if header.turn > 1]
    sizes = {name: of_masks[name].upright for name in turned if name in of_masks}
    made = [dataset.items[name] for name in turned if name in truth and name not in of_masks]
    masks = _each(lambda item: truth[item.id]()[0], _sample(made, of_images), 1)
    sizes |= {name: (mask.shape[0], mask.shape[1]) for name, mask in masks.items()}
    fits = defaultdict[tuple[bool, bool], list[str]](list)
    for name, size in sizes.items():
        fits[size == of_images[name].upright, size == of_images[name].size].append(name)
    both, stored = fits[True, True], fits[False, True]
    if both or stored:
        yield Finding(
            "orientation",
            f"{count_of(len(both + stored), 'image')} with an EXIF orientation, whose masks fit "
            f"the stored image: {len(both)} fit the upright one too, {len(stored)} do not "
            f"({len(fits[True, False])} more fit the upright one alone). Say which pixels the "
            "masks are of: --orientation stored (EXIF is then ignored), or --orientation upright",
            tuple(both + stored),
            ruins=True,
        )


def mask_findings(
    dataset: Dataset, of_masks: Headers, looks: Mapping[str, MaskLook]
) -> Iterator[Finding]:
    """Findings about all true masks together, by the contents of some or all of their files."""
    table = dataset.classes
    labelled = {name: look.values for name, look in looks.items() if dataset.items[name].labels}
    enough = len(labelled) >= FEWEST
    if labelled and {*frozenset().union(*(x.values for x in looks.values()))} == {0, IGNORE}:
        yield Finding(
            "mask values",
            "the masks hold 0 and 255 alone, and 255 is not counted; write the class's number "
            f"instead ({table.mask_ids[0]} for {table.names[0]})",
            ruins=enough,
        )
        return
    objects = {n: x.values - {BACKGROUND, IGNORE} for n, x in looks.items()}
    between = [n for n, values in objects.items() if looks[n].thin > max(1, len(values) / 3)]
    if enough and len(between) > sum(map(bool, objects.values())) / 2:
        yield Finding(
            "mask edges",
            f"{count_of(len(between), 'mask')} of {len(looks)} with values in thin lines alone: "
            "they were resized with interpolation; make them again, to the nearest pixel",
            tuple(between),
            ruins=True,
        )
    shared = _agreement(dataset, labelled, table.mask_ids)
    yield from _disagreement(dataset, labelled, shared) if enough else ()
    yield from () if dataset.reading.palette else _palette_finding(of_masks, looks, shared)


def _agreement(dataset: Dataset, labelled: Labelled, ids: Sequence[int]) -> float:
    """Share of the pairs of an image and a class that labels and masks, of these ids, both show."""
    said = {(name, index) for name in labelled for index in dataset.items[name].labels}
    pairs = ((name, index) for name in labelled for index in range(len(ids)))
    shown = {(name, index) for name, index in pairs if ids[index] in labelled[name]}
    return len(said & shown) / len(said | shown) if said else 1.0


def _disagreement(dataset: Dataset, labelled: Labelled, shared: float) -> Iterator[Finding]:
    """Masks of other classes than the labels, and an order of the classes that explains them."""
    table, drawn, counts = dataset.classes, list[int](), list[int]()
    by_value = {v: {n for n, values in labelled.items() if v in values} for v in range(IGNORE)}
    for index, own in enumerate(table.mask_ids):
        said = {name for name in labelled if index in dataset.items[name].labels}
        # of values in equally fitting images the class's own, then those near it
        order = sorted(by_value, key=lambda value: (value != own, value == 0, abs(value - own)))
        like = {v: len(said & by_value[v]) / max(1, len(said | by_value[v])) for v in order}
        drawn.append(max(order, key=like.__getitem__) if said else own)
        counts.append(len(said))
    changed = [n for n, own in enumerate(table.mask_ids) if drawn[n] != own]
    better = _agreement(dataset, labelled, drawn)
    explained = changed and len({*drawn}) == len(drawn) and better >= EXPLAINED
    if shared >= AGREEMENT and not (explained and min(counts[n] for n in changed) >= FEWEST):
        return
    steps = {drawn[n] - table.mask_ids[n] for n in range(len(drawn))}
    each = shortened([f"{drawn[n]} is {table.names[n]}" for n in changed])
    why = f"all values are {min(steps):+d} off" if len(steps) == 1 else f"in the masks {each}"
    yield Finding(
        "mask labels",
        f"labels and masks disagree: of {count_of(len(labelled), 'labelled image')} they share "
        f"{100 * shared:.0f} % of the classes that either shows"
        f"{f', and {100 * better:.0f} % if {why}' * bool(explained)}. Scores, and tests of "
        "segmenters, would mean nothing: correct the masks, or the order of classes.txt",
        ruins=True,
    )


def _palette_finding(
    of_masks: Headers, looks: Mapping[str, MaskLook], shared: float
) -> Iterator[Finding]:
    """Palette masks in which an index has different colours, as adaptive palettes have."""
    colours = defaultdict[int, dict[bytes, str]](dict)
    indices = defaultdict[bytes, set[int]](set)
    for name, look in looks.items():
        if (palette := of_masks[name].palette) is not None:
            used = {v: palette[3 * v : 3 * v + 3] for v in look.values - {IGNORE}}
            for value, colour in used.items():
                colours[value].setdefault(colour, name)
                indices[colour] |= {value} if [*used.values()].count(colour) == 1 else set()
    differ = [(value, names) for value, names in sorted(colours.items()) if len(names) > 1]
    if differ and (shared < EXPLAINED or max(map(len, indices.values())) > 1):
        value, names = differ[0]
        shown = [f"{tuple(colour)} in {name}" for colour, name in list(names.items())[:2]]
        yield Finding(
            "palette",
            "palette masks whose indices have other colours from file to file (index "
            f"{value} is {' and '.join(shown)}), so that colours are the classes: name them with "
            "--palette FILE (labelmap.txt), or save masks with the classes' numbers",
            ruins=True,
        )
