"""What a run or ``lpcam predict`` left in a folder, for other tools: masks and maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpcam.data.items import ClassTable
from lpcam.errors import ArtefactError
from lpcam.formats.masks import MaskEntry
from lpcam.recipe import ListName, load_recipe
from lpcam.segmentation.files import INDEX as PREDICTED
from lpcam.stages.context import read_dataset
from lpcam.stages.host import MAPS as HOST_MAPS
from lpcam.stages.host import SEEDS
from lpcam.stages.refine import MAPS, PSEUDO
from lpcam.stages.segment import TEST
from lpcam.storage import map_path, read_json

LPCAM_FIRST = "lpcam"
"""Of several folders of masks or maps the first that ends so is taken, where none is named."""


@dataclass(frozen=True)
class Masks:
    """Masks of one folder, and what they show."""

    name: str
    """Of the folder within that of the run, such as ``pseudo/lpcam``."""
    entries: tuple[MaskEntry, ...]
    classes: ClassTable
    made_by: Mapping[str, Any]


@dataclass(frozen=True)
class Maps:
    """Map files of one folder."""

    name: str
    folder: Path
    ids: tuple[str, ...]
    classes: ClassTable
    made_by: Mapping[str, Any]


def masks_of(folder: Path, name: str | None = None) -> Masks:
    """The masks of a run, or of what ``lpcam predict`` wrote.

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
    items = dataset.select(recipe.data.list_of(stage))
    entries = [MaskEntry(i.id, i.image, folder / chosen / f"{i.id}.png") for i in items]
    entries = [entry for entry in entries if entry.mask.is_file()]
    if not entries:
        raise ArtefactError(
            f"{folder / chosen} has no mask of any image of the list "
            f"{recipe.data.list_of(stage)!r}; bring the run up to date first"
        )
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
    return Maps(chosen, folder / chosen, present, dataset.classes, made_by)


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
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(
            f"{folder / PREDICTED} is damaged ({error}); write it again with 'lpcam predict'"
        ) from error
    entries = [
        MaskEntry(key, image if image.is_file() else None, folder / "masks" / f"{key}.png")
        for key, image in images.items()
    ]
    entries = [entry for entry in entries if entry.mask.is_file()]
    if not entries:
        raise ArtefactError(f"{folder} has no masks; run 'lpcam predict' first")
    return Masks("masks", tuple(entries), classes, made_by)
