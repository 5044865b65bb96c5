"""What labels cannot teach: classes without negatives, and classes that are always together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from lpcam.data.dataset import ClassTable, Item
from lpcam.data.survey import Finding, count_of

_FEW = 0.02  # share of images without a class below which it has few negatives


def label_findings(
    classes: ClassTable, items: Sequence[Item], held_out: Sequence[Item] = (), where: str = ""
) -> Iterator[Finding]:
    """Findings about labels from which a classifier learns nothing, or what no mAP measures.

    Args:
        classes: the classes of the data set.
        items: the images that train a classifier.
        held_out: the images on which it is measured, if they are known.
        where: begins each text, such as "in the list train, ".
    """
    sets: defaultdict[frozenset[int], list[str]] = defaultdict(list)
    for index, name in enumerate(classes.names):
        shown = frozenset(row for row, item in enumerate(items) if index in item.labels)
        sets[shown].append(name)
    sets.pop(frozenset(), None)  # classes that no image shows are told elsewhere
    if everywhere := sets.pop(frozenset(range(len(items))), None):
        which = "class" if len(everywhere) == 1 else "classes"
        yield Finding(
            "no negatives",
            f"{where}every image shows the {which} named here, so there are no negatives: nothing "
            "tells where the object is, the loss becomes 0, the mAP 1, and seeds cover whole "
            "images. Add images that show none of the classes, with an empty cell in labels.csv",
            tuple(everywhere),
        )
    rare = {n: len(items) - len(rows) for rows, names in sets.items() for n in names}
    few = [f"{name} ({count})" for name, count in rare.items() if count < _FEW * len(items)]
    if few:
        text = f"{where}{count_of(len(few), 'class', 'classes')} that few images lack (negatives)"
        yield Finding("few negatives", text, tuple(few), False)
    if same := [" = ".join(names) for names in sets.values() if len(names) > 1]:
        text = f"{where}{count_of(len(same), 'group')} of classes that are shown by the same images"
        yield Finding("always together", f"{text}, so that no map can tell them apart", tuple(same))
    counts = [sum(index in item.labels for item in held_out) for index in range(len(classes))]
    names = [n for n, c in zip(classes.names, counts, strict=True) if c in (0, len(held_out))]
    if held_out and names:
        text = "the validation mAP says nothing of classes that none or all of its images show"
        yield Finding(
            "validation", f"{text} ({count_of(len(held_out), 'image')})", tuple(names), False
        )
