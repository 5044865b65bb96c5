"""The data set that a recipe describes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lpcam.data.dataset import Dataset
from lpcam.data.image_files import with_negatives
from lpcam.data.pixels import given_reading
from lpcam.data.reader import OPTIONS, ListName, Opened, Request
from lpcam.pipeline.recipe import Recipe
from lpcam.runtime.errors import DataError

LISTS: tuple[ListName, ...] = ("classify", "prototypes", "maps", "evaluate")
"""The lists that every run needs."""
SEGMENT_LISTS: tuple[ListName, ...] = ("segment", "test")
"""The lists of recipes with a section segment."""


@dataclass(frozen=True)
class Given:
    """Maps or masks that another program made."""

    folder: Path
    key: str  #: Digest of their contents.


def read_dataset(
    recipe: Recipe,
    lists: Sequence[ListName] = LISTS,
    *,
    painted: Path | None = None,
    workers: int = 1,
    check: Callable[[Opened], Dataset] | None = None,
) -> Dataset:
    """Read the labels and lists of a recipe's data set; images are not read yet.

    Masks that must be painted are written to ``painted``; ``check`` is called before that, and the
    data set is read as the one it returns. DataError if folders, lists or labels do not fit.
    """
    data = recipe.data
    names = {data.list_of(s) for s in lists}
    if data.lists.validate_ is not None and "classify" in lists:
        names.add(data.lists.validate_)
    unlabelled = {data.list_of(s) for s in lists if s in SEGMENT_LISTS}
    unlabelled -= {data.list_of(s) for s in lists if s in LISTS}
    request = Request(data.root, sorted(names), frozenset(unlabelled), settings=data.settings)
    options = {name: getattr(data, name) for name in OPTIONS}
    opened = data.reader.open(replace(request, **options))
    dataset = given_reading(opened.dataset, data.range, data.orientation, data.palette)
    if check is not None:
        dataset = check(replace(opened, dataset=dataset))
    if opened.paint is not None and painted is not None and data.masks is None:
        scored: list[ListName] = [s for s in ("evaluate", "test") if s in lists]
        if "segment" in lists and "truth" in recipe.segmented:
            scored.append("segment")
        ids = dict.fromkeys(i.id for s in scored for i in dataset.select(data.list_of(s)))
        dataset = opened.paint(painted, ids, workers).read_with(dataset.reading)
    if data.negatives is not None and "classify" in lists:
        dataset = with_negatives(dataset, data.negatives)
    for name in sorted(names):
        dataset.select(name)
    maps = data.list_of("maps")
    for stage in ("evaluate", "segment"):
        if stage not in lists or "maps" not in lists:
            continue
        own = data.list_of(stage)
        if outside := {*dataset.lists[own]} - {*dataset.lists[maps]}:
            raise DataError(
                f"{len(outside)} images of the list {own!r} ({stage}) are not in the list that "
                f"gets maps ({maps!r}), e.g. {min(outside)!r}; set data.lists.maps to a list with "
                "them"
            )
    return dataset
