"""Results of inspecting a data set, as JSON and as text; what its labels cannot teach."""

from __future__ import annotations

import io
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from lpcam.data.dataset import ClassTable, Item
from lpcam.runtime.files import write_json
from lpcam.runtime.progress import duration
from lpcam.runtime.versions import versions

MOST_NAMED = 3  #: Images or classes that a line of a summary names; the JSON names all.
_MOST_CLASSES = 24  # rows in the table of classes: of more, half as many from either end
_MOST_LISTS = 4  # columns of lists in that table
_FEW = 0.02  # share of images without a class below which it has few negatives
_COMPANIONS = 2  # classes named beside each: those it is most often shown with


@dataclass(frozen=True)
class Estimate:
    """Time and disk space of a run on this machine, extrapolated from some timed images."""

    backbone: str
    scales: tuple[float, ...]
    flip: bool
    device: str
    workers: int
    timed: int  #: Number of timed images.
    seconds: Mapping[str, float]  #: Time by list, if every stage uses that list.
    disk: Mapping[str, int]  #: Bytes of maps and seeds by list.
    repeated: tuple[str, ...]  #: Lists whose features are recomputed for lack of memory.


@dataclass(frozen=True)
class Finding:
    """A finding about a data set."""

    kind: str
    text: str  #: A sentence, with the number of images, pairs or classes that it concerns.
    names: tuple[str, ...] = ()  #: Names of all images, pairs or classes that it concerns.
    attention: bool = True  #: Whether it is probably a mistake, or harms a run or its scores.
    ruins: bool = False  #: Whether it stops a run, unless the user wants it anyway.

    def __str__(self) -> str:
        """The text with the first names."""
        names, more = self.names[:MOST_NAMED], len(self.names) - MOST_NAMED
        named = f": {'; '.join(names)}" if names else ""
        return f"{self.text}{named}" + (f" and {more:,} more" if more > 0 else "")


def label_findings(
    classes: ClassTable, items: Sequence[Item], held_out: Sequence[Item] = (), where: str = ""
) -> Iterator[Finding]:
    """Findings about labels of which a classifier learns nothing, or which no mAP measures.

    It learns from ``items`` and is measured on ``held_out``; ``where`` begins each text.
    """

    def shown(images: Sequence[Item]) -> list[frozenset[int]]:
        places = range(len(classes))
        return [frozenset(n for n, i in enumerate(images) if c in i.labels) for c in places]

    sets = defaultdict[frozenset[int], list[str]](list)
    for name, rows in zip(classes.names, shown(items), strict=True):
        sets[rows].append(name)
    sets.pop(frozenset(), None)  # classes that no image shows are told elsewhere
    if everywhere := sets.pop(frozenset(range(len(items))), None):
        yield Finding(
            "no negatives",
            f"{where}there are no negatives, so that the loss becomes 0, the mAP 1, and seeds "
            "cover whole images (add images that show none of the classes: a folder given as "
            "data.negatives or --no-class, or an empty cell in labels.csv); classes that every "
            "image shows",
            tuple(everywhere),
        )
    lack = {name: len(items) - len(rows) for rows, names in sets.items() for name in names}
    if few := [f"{name} ({n})" for name, n in lack.items() if n < _FEW * len(items)]:
        text = f"{where}classes that few images lack, as negatives"
        yield Finding("few negatives", text, tuple(few), attention=False)
    if same := [" = ".join(names) for names in sets.values() if len(names) > 1]:
        text = f"{where}classes that the same images show, so that no map can tell them apart"
        yield Finding("always together", text, tuple(same))
    counts = zip(classes.names, map(len, shown(held_out)), strict=True)
    names = tuple(name for name, n in counts if held_out and n in (0, len(held_out)))
    if names:
        text = f"classes that none or all of the {len(held_out)} validation images show"
        yield Finding("validation", f"{text}; their mAP says nothing", names, attention=False)


@dataclass(frozen=True)
class ListCounts:
    """Numbers of usable images of a list."""

    name: str
    images: int
    labelled: int
    masks: int
    within: tuple[str, ...]  #: Lists that hold all of its images.
    classes: tuple[int, ...]  #: Number of images that show each class.


@dataclass(frozen=True)
class Survey:
    """Result of :func:`lpcam.data.inspection.survey`."""

    name: str
    label_source: str
    classes: ClassTable
    suffixes: Mapping[str, int]  #: Number of images by file extension.
    sizes: Mapping[str, tuple[int, int]]  #: (height, width): ``smallest``, ``median``, ``largest``
    lists: tuple[ListCounts, ...]
    whole: ListCounts  #: All images, whatever their list.
    together: NDArray[np.int64]  #: (N, N): number of images that show both classes.
    alone: tuple[int, ...]  #: Number of images that show this class only.
    findings: tuple[Finding, ...]
    estimate: Estimate | None = None

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that need attention."""
        return tuple(finding for finding in self.findings if finding.attention)

    def as_json(self) -> dict[str, Any]:
        """The survey as a JSON value; ``co_occurrence`` is by class name, symmetric."""
        names = self.classes.names
        lists = [asdict(one) for one in self.lists]
        counts = {one["name"]: one.pop("classes") for one in lists}
        columns = zip(names, self.classes.mask_ids, self.whole.classes, self.alone, strict=True)
        return {
            "format": 1,
            "name": self.name,
            "label_source": self.label_source,
            **{key: getattr(self.whole, key) for key in ("images", "labelled", "masks")},
            "suffixes": dict(self.suffixes),
            "sizes": {name: {"height": h, "width": w} for name, (h, w) in self.sizes.items()},
            "lists": lists,
            "classes": [
                {"name": name, "mask_id": mask_id, "images": images, "alone": alone}
                | {"lists": {of: count[row] for of, count in counts.items()}}
                for row, (name, mask_id, images, alone) in enumerate(columns)
            ],
            "co_occurrence": {
                name: dict(zip(names, row, strict=True))
                for name, row in zip(names, self.together.tolist(), strict=True)
            },
            "findings": [asdict(finding) for finding in self.findings],
            "needs_attention": bool(self.problems),
            "estimate": self.estimate and asdict(self.estimate),
        }

    def write_json(self, path: Path, *, command: str) -> None:
        """Write the survey to a JSON file, with the command line."""
        write_json(path, {**self.as_json(), "command": command, "versions": versions()})

    def summary(self, width: int = 100) -> str:
        """The survey as text in at most ``width`` columns, with long lists cut short."""
        several = len(self.suffixes) > 1
        kinds = ", ".join(f"{n:,} " * several + suffix for suffix, n in self.suffixes.items())
        sizes = {name: f"{height} × {across}" for name, (height, across) in self.sizes.items()}
        lines = _wrapped(
            f"{self.name}: {count_of(self.whole.images, 'image')} ({kinds}), "
            f"{count_of(len(self.classes), 'class', 'classes')}, "
            f"{count_of(self.whole.masks, 'mask')}; labels from {self.label_source}. Height × "
            f"width {sizes['smallest']} to {sizes['largest']}, median {sizes['median']} pixels.",
            width,
        )
        lines += ["", *_rendered(list(self._list_rows()), width)]
        if self.estimate is not None:
            lines += _wrapped(_how(self.estimate), width)
        lines += ["", *_rendered(self._class_rows(), width), ""]
        for title, attention in (("Needs attention", True), ("Good to know", False)):
            findings = [f for f in self.findings if f.attention == attention]
            lines += [title] * bool(findings)
            for one in findings:
                lines += _wrapped(f"{'A run would stop: ' * one.ruins}{one}", width, "- ")
        if not self.problems:
            lines.append("Nothing needs attention.")
        return "\n".join(lines)

    def _list_rows(self) -> Iterator[list[str]]:
        estimate, nested = self.estimate, any(one.within for one in self.lists)
        costs = [] if estimate is None else ["time of a run", "disk"]
        yield ["list", "images", "labelled", "masks", *costs, *["lies within"] * nested]
        for one in self.lists:
            if estimate is not None:
                costs = [duration(estimate.seconds[one.name]), _bytes(estimate.disk[one.name])]
            counts = [f"{count:,}" for count in (one.images, one.labelled, one.masks)]
            yield [one.name, *counts, *costs, *[", ".join(one.within)] * nested]

    def _class_rows(self) -> list[list[str]]:
        shown: dict[tuple[int, ...], ListCounts] = {}  # those with counts of their own
        for one in (self.whole, *self.lists):
            shown.setdefault(one.classes, one)
        columns, names = list(shown.values())[: 1 + _MOST_LISTS], self.classes.names

        def row(index: int, name: str) -> list[str]:
            beside = Counter(dict(zip(names, self.together[index].tolist(), strict=True)))
            images, pairs = beside.pop(name), beside.most_common(_COMPANIONS)
            most = [f"{other} {100 * n / images:.0f} %" for other, n in pairs if n]
            counts = [f"{one.classes[index]:,}" for one in columns]
            return [name, *counts, f"{self.alone[index]}", ", ".join(most)]

        classes, half = list(enumerate(names)), _MOST_CLASSES // 2
        if many := len(classes) > _MOST_CLASSES:
            classes.sort(key=lambda one: -self.whole.classes[one[0]])
        rows = [row(*one) for one in classes]
        if many:
            rows[half:-half] = [[f"... {len(rows) - 2 * half} more"]]
        lists = [one.name for one in columns[1:]]
        return [["class", "images", *lists, "alone", "most often together with"], *rows]


def _how(estimate: Estimate) -> str:
    lists = ", ".join(estimate.repeated)
    again = f" The features of {lists} do not fit into memory and are counted for each stage."
    return (
        f"Time and disk of a run on a list: {count_of(estimate.timed, 'image')} timed here with "
        f"{estimate.backbone}, scales {', '.join(f'{s:g}' for s in estimate.scales)}"
        f"{' and flip' * estimate.flip}, {count_of(estimate.workers, 'worker')} on "
        f"{estimate.device}; without start, fit, clustering, evaluation and report."
        f"{again * bool(lists)}"
    )


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


def _wrapped(text: str, width: int, bullet: str = "") -> list[str]:
    wrapper = textwrap.TextWrapper(width, bullet, " " * len(bullet))
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return wrapper.wrap(text)


def _rendered(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Lines of a table whose first row is its head; numbers are aligned at the right."""
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    texts = ("list", "class", "lies within", "most often together with")
    for title in rows[0]:
        table.add_column(title, justify="left" if title in texts else "right")
    for row in rows[1:]:
        table.add_row(*row)
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, markup=False, emoji=False).print(table)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def count_of(number: int, one: str, several: str = "") -> str:
    """A number with its noun, such as "2 masks"."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"
