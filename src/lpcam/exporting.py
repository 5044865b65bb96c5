"""What a run or ``lpcam predict`` left in a folder, for other tools: masks and maps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lpcam.data.items import IMAGE_SUFFIXES, ClassTable, Dataset, Skip
from lpcam.errors import ArtefactError
from lpcam.formats.base import MaskEntry
from lpcam.recipe import ListName, load_recipe
from lpcam.segmentation.files import INDEX as PREDICTED
from lpcam.stages.context import read_dataset
from lpcam.stages.host import MAPS as HOST_MAPS
from lpcam.stages.host import SEEDS
from lpcam.stages.refine import BOUNDARIES, MAPS, PSEUDO
from lpcam.stages.segment import CRF, TEST
from lpcam.storage import map_path, read_json

LPCAM_FIRST = "lpcam"
"""Of several folders of masks or maps the first that ends so is taken, where none is named."""


@dataclass(frozen=True)
class Masks:
    """Masks of one folder, and what they show."""

    name: str
    """Of the folder within that of the run, such as ``pseudo/lpcam``."""
    entries: tuple[MaskEntry | Skip, ...]
    """In the order of the images' list; a `Skip` has no mask, or its image has gone."""
    classes: ClassTable
    made_by: Mapping[str, Any]


@dataclass(frozen=True)
class Maps:
    """Map files of one folder."""

    name: str
    folder: Path
    ids: tuple[str, ...]
    missing: tuple[str, ...]
    """Images of the list that have no map."""
    classes: ClassTable
    made_by: Mapping[str, Any]


def masks_of(folder: Path, name: str | None = None) -> Masks:
    """The masks of a run, or of what ``lpcam predict`` wrote.

    Every image of the list that the masks are of should have one. Those that have none, those that
    the run skipped, and masks of images that the list does not have now come with the reason.

    Images are named by their paths below the folder that the data have for them; where there are
    several such folders, by their paths below the one that holds them all.

    Args:
        folder: of either.
        name: which of a run's masks: ``seeds``, ``pseudo/lpcam``, ``test/lpcam``, ... None: pseudo
            masks where there are any (LPCAM's first), else seeds.

    Raises:
        ArtefactError: if the folder is neither, or has no such masks; the message lists those it
            has.
    """
    if (folder / PREDICTED).is_file():
        return _predicted(folder, name)
    recipe = _recipe(folder)
    patterns = (f"{PSEUDO}/*", "seeds", f"{SEEDS}/*", f"{TEST}/*/crf", f"{TEST}/*")
    chosen = _chosen(folder, name, "masks", patterns, ".png")
    stage: ListName = "test" if chosen.split("/")[0] == TEST else "maps"
    dataset = read_dataset(recipe, (stage,))
    name_of_list = recipe.data.list_of(stage)
    items = dataset.select(name_of_list)
    masks = [MaskEntry(i.id, i.image, folder / chosen / f"{i.id}.png", i.file_name) for i in items]
    entries = _present(_apart(masks), "bring the run up to date first", _reasons(folder))
    if not any(isinstance(entry, MaskEntry) for entry in entries):
        raise ArtefactError(
            f"{folder / chosen} has no mask of any image of the list {name_of_list!r}; bring the "
            "run up to date first"
        )
    entries += [*dataset.skipped, *_gone(folder, chosen, name_of_list, dataset)]
    made_by = {"run": recipe.name, "masks": chosen}
    return Masks(chosen, tuple(entries), dataset.classes, made_by)


def maps_of(folder: Path, name: str | None = None) -> Maps:
    """The map files of a run.

    Args:
        folder: of the run.
        name: ``lpcam``, ``cam``, ``lpcam_f``, ``host-maps/amn_lpcam``, ``pseudo/lpcam/maps``, ...;
            None: ``lpcam``.

    Raises:
        ArtefactError: if the folder holds no run, or has no such maps.
    """
    recipe = _recipe(folder)
    patterns = ("lpcam", "cam", "lpcam_f", f"{HOST_MAPS}/*", f"{PSEUDO}/*/{MAPS}")
    chosen = _chosen(folder, name, "maps", patterns, ".npz")
    dataset = read_dataset(recipe, ("maps",))
    ids = dataset.lists[recipe.data.list_of("maps")]
    present = tuple(i for i in ids if map_path(folder / chosen, i).is_file())
    if not present:
        raise ArtefactError(
            f"{folder / chosen} has no maps of any image of the list "
            f"{recipe.data.list_of('maps')!r}; bring the run up to date first"
        )
    made_by = {"run": recipe.name, "maps": chosen}
    there = set(present)
    missing = tuple(image_id for image_id in ids if image_id not in there)
    return Maps(chosen, folder / chosen, present, missing, dataset.classes, made_by)


def _recipe(folder: Path) -> Any:
    path = folder / "recipe.yaml"
    if not path.is_file() or not (folder / "index.json").is_file():
        raise ArtefactError(
            f"{folder} holds neither a run nor what 'lpcam predict' wrote; give the folder of one"
        )
    return load_recipe(path)


def _chosen(
    folder: Path, name: str | None, what: str, patterns: tuple[str, ...], suffix: str
) -> str:
    """The named folder, or the first that there is."""
    known = [
        path.relative_to(folder).as_posix()
        for pattern in patterns
        for path in sorted(folder.glob(pattern), key=_lpcam_first)
        if path.is_dir() and any(path.rglob(f"*{suffix}"))
    ]
    if not known:
        raise ArtefactError(f"{folder} has no {what} yet; bring the run up to date first")
    if name is None:
        return known[0]
    if name not in known:
        raise ArtefactError(f"{folder} has no {what} {name!r}; it has {', '.join(known)}")
    return name


def _lpcam_first(path: Path) -> tuple[bool, str]:
    return not path.name.endswith(LPCAM_FIRST), path.name


def _predicted(folder: Path, name: str | None) -> Masks:
    if name not in (None, "masks"):
        raise ArtefactError(f"{folder} has no masks {name!r}; it has masks")
    index = read_json(folder / PREDICTED)
    try:
        table = index["made_by"]["classes"]
        names = sorted(table, key=table.__getitem__)  # the file's own order is the alphabet's
        classes = ClassTable(tuple(names), tuple(table[name] for name in names))
        images = {str(key): Path(value) for key, value in index["images"].items()}
        made_by = {"run": index["made_by"].get("run"), "masks": "masks"}
        skipped = [Skip(str(one["image"]), str(one["reason"])) for one in index["skipped"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(
            f"{folder / PREDICTED} is damaged ({error}); write it again with 'lpcam predict'"
        ) from error
    masks = [
        # a key has the folders of its image, and may have an ending or other signs
        MaskEntry(
            key,
            image,
            folder / "masks" / f"{key}.png",
            "/".join(image.parts[-1 - key.count("/") :]),
        )
        for key, image in images.items()
    ]
    there = [
        entry if entry.image is not None and entry.image.is_file() else replace(entry, image=None)
        for entry in _apart(masks)
    ]
    entries = _present(there, "run 'lpcam predict' again", {})
    if not any(isinstance(entry, MaskEntry) for entry in entries):
        raise ArtefactError(f"{folder} has no masks; run 'lpcam predict' first")
    return Masks("masks", (*entries, *skipped), classes, made_by)


# -- Names of images ---------------------------------------------------------------------------


def _apart(entries: Sequence[MaskEntry]) -> list[MaskEntry]:
    """Names that begin at one folder: two lists of a data set may each have an image 0.jpg."""
    folders = [entry.images_below for entry in entries]
    if len({*folders} - {None}) < 2:
        return [*entries]
    above = os.path.commonpath([folder for folder in folders if folder is not None])
    return [
        entry
        if folder is None
        else replace(entry, file_name=(folder / entry.name).relative_to(above).as_posix())
        for entry, folder in zip(entries, folders, strict=True)
    ]


# -- What has no mask --------------------------------------------------------------------------


def _present(
    entries: Sequence[MaskEntry], remedy: str, reasons: Mapping[str, str]
) -> list[MaskEntry | Skip]:
    """Entries, and in the place of those whose mask is missing the reason."""

    def why(entry: MaskEntry) -> str:
        if entry.id in reasons:
            return f"the run skipped it: {reasons[entry.id]}"
        return f"there is no mask {entry.mask}; {remedy}"

    return [e if e.mask.is_file() else Skip(e.id, why(e)) for e in entries]


def _reasons(folder: Path) -> dict[str, str]:
    """Why a run skipped images: files that cannot be read, maps of another program that misfit."""
    records = [
        read_json(path)
        for path in (folder / "metrics.json", folder / "index.json")
        if path.is_file()
    ]
    return {one["id"]: one["reason"] for record in records for one in record.get("skipped", ())}


def _gone(folder: Path, chosen: str, name_of_list: str, dataset: Dataset) -> Iterator[Skip]:
    """Masks of images that the list had when they were made."""
    known = {*dataset.lists[name_of_list]}
    for skip in dataset.skipped:
        known |= {skip.id, *(skip.id.removesuffix(ending) for ending in IMAGE_SUFFIXES)}
    # what lies in the folder of the masks beside them
    beside = {PSEUDO: BOUNDARIES, TEST: CRF}.get(chosen.partition("/")[0])
    for path in sorted((folder / chosen).rglob("*.png")):
        image_id = path.relative_to(folder / chosen).as_posix().removesuffix(".png")
        if image_id not in known and image_id.partition("/")[0] != beside:
            yield Skip(
                image_id,
                f"the run made a mask of it, and the list {name_of_list!r} has no such image now; "
                "put image and label back, or bring the run up to date",
            )
