"""What labels cannot teach: classes without negatives, and classes that are always together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from lpcam.data.dataset import ClassTable, Item
from lpcam.data.survey import Finding

_FEW = 0.02  # share of images without a class below which it has few negatives


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
