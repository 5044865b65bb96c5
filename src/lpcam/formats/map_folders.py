"""Map files of other programs: ``.npy`` files of a pickled dictionary, and folders of them.

A key k is the class of the value k + 1 in masks, also in runs of some classes, whose label indices
differ. Files are never unpickled (:mod:`lpcam.formats.pickled_arrays`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lpcam.data.dataset import ClassTable, Skip, choose_classes, safe_id
from lpcam.data.map_files import MapFile, map_path, read_maps, write_maps
from lpcam.formats.labels import CLASSES_FILE, write_unchanged
from lpcam.formats.map_formats import kind_of, maps_without_class, names_in
from lpcam.formats.pickled_arrays import dictionary_file, read_pickled_arrays
from lpcam.formats.registry import MAP_FORMATS
from lpcam.method.functional import normalize
from lpcam.runtime.errors import ArtefactError, DataError
from lpcam.runtime.files import digest_bytes, read_bytes, write_bytes
from lpcam.runtime.parallel import ordered_map, progress_map
from lpcam.runtime.versions import __version__

AUTO = "auto"  #: Name of no map format: it is found from the contents.
_COCO_ID = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12})")
_VOC_ID = re.compile(r"((?:19|20)\d{2})_?(\d{6})")
_NO_FILE = "no file"


def read_foreign_maps(
    path: Path,
    *,
    size: tuple[int, int] | None = None,
    style: str = AUTO,
    classes: ClassTable | None = None,
) -> MapFile:
    """Read the maps of one image, with their values unchanged (no ReLU, no normalisation).

    Where the file has no map of stride 4 (psa), ``cam`` is the full one resized. ArtefactError if
    the file is damaged, tries to run code, does not fit the arguments, or may be of two styles.

    Args:
        size: (H, W) of the image; required where a file without a class has no size.
        style: a name of `MAP_FORMATS`; "auto" finds it from the contents.
        classes: a key k becomes the label index of mask value k + 1. None: keys are not changed.
    """
    named = None if style == AUTO else MAP_FORMATS[style]
    data = read_bytes(path)
    found = read_pickled_arrays(data, what=f"map file {path}")
    try:
        if not isinstance(found, dict):
            raise DataError(f"it holds {kind_of(found)}; expected a dictionary of maps")
        style = _recognised(found) if named is None else style
        maps = MAP_FORMATS[style].read(found, size)
        sides = maps.high_res.shape[1:]
        if size is not None and sides != tuple(size):
            raise DataError(f"its maps are {sides} (height, width), the image {tuple(size)}")
        keys = maps.keys.tolist()
        if len(set(keys)) != len(keys) or (keys and min(keys) < 0):
            raise DataError(f"its classes {keys[:9]} repeat or are < 0")
        if classes is not None and (others := {key + 1 for key in keys} - {*classes.mask_ids}):
            raise DataError(
                f"it has the key {min(others) - 1}, and no class has the mask value {min(others)}; "
                "give the classes that the maps were made with"
            )
    except DataError as error:
        raise ArtefactError(f"map file {path} is refused: {error}") from error
    made_by: dict[str, Any] = {
        "imported": {"file": path.name, "digest": digest_bytes(data), "style": style},
        "lpcam": __version__,
    }
    if classes is not None:
        made_by["classes"] = list(classes.names)
        keys = [classes.mask_ids.index(key + 1) for key in keys]
    return MapFile(np.array(keys, dtype=np.int64), maps.cam, maps.high_res, made_by)


def _recognised(found: dict[Any, Any]) -> str:
    fitting = [name for name, one in MAP_FORMATS.items() if one.fits(found)]
    if len(fitting) == 1:
        return fitting[0]
    layouts = "; ".join(f"{name}: {MAP_FORMATS[name].layout}" for name in fitting or MAP_FORMATS)
    if fitting:
        raise DataError(f"it may be of several styles, name one ({layouts})")
    raise DataError(f"it holds {names_in(found)}; expected one of {layouts}")


def _check_background(style: str, background: float | None) -> None:
    if MAP_FORMATS[style].has_background != (background is not None):
        raise DataError(
            f"files of the style {style!r} have "
            + ("a plane of the background; give its score" if background is None else "none of it")
        )


def write_foreign_maps(
    path: Path,
    maps: MapFile,
    style: str,
    *,
    background: float | None = None,
    classes: ClassTable | None = None,
) -> None:
    """Write the maps of one image, in float32 and with their values unchanged.

    Args:
        background: score of the background in every pixel, for the styles that have one (amn,
            psa-crf); DataError if missing or superfluous.
        classes: a key, its label index, becomes its mask value - 1. None: keys are not changed.
    """
    _check_background(style, background)
    plane = None
    if background is not None:
        plane = np.full(maps.high_res.shape[1:], background, np.float32)
    if classes is not None:
        keys = np.array([classes.mask_ids[n] - 1 for n in maps.keys.tolist()], dtype=np.int64)
        maps = replace(maps, keys=keys)
    write_bytes(path, dictionary_file(MAP_FORMATS[style].write(maps, plane)))


@dataclass(frozen=True)
class ImportedMaps:
    """Result of `import_maps`; ``not_chosen`` counts the maps that were dropped of each class."""

    folder: Path
    ids: tuple[str, ...]
    styles: Mapping[str, int]
    without_class: tuple[str, ...]
    skipped: tuple[Skip, ...]
    not_chosen: Mapping[str, int]

    def summary(self) -> str:
        """The result as text, one fact per line."""
        styles = ", ".join(f"{count} {style}" for style, count in sorted(self.styles.items()))
        lines = [f"{len(self.ids)} map files ({styles}) in {self.folder}"]
        if self.without_class:
            lines.append(f"{len(self.without_class)} of them without a class")
        known = [style for style in self.styles if style != _NO_FILE]
        if dropped := sum(self.styles[s] for s in known if MAP_FORMATS[s].has_background):
            lines.append(f"the background plane of {dropped} was dropped")
        if self.not_chosen:
            counts = ", ".join(f"{n} {count}" for n, count in sorted(self.not_chosen.items()))
            lines.append(f"maps of classes not chosen were dropped: {counts}")
        if self.skipped:
            lines.append(f"{len(self.skipped)} left out, the first: {self.skipped[0].reason}")
        return "\n".join(lines)


def import_maps(
    source: Path,
    output: Path,
    ids: Sequence[str] | None = None,
    *,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    style: str = AUTO,
    classes: ClassTable | None = None,
    chosen: Sequence[str] | None = None,
    no_file_no_class: bool = False,
    normalise: bool = False,
    workers: int = 1,
) -> ImportedMaps:
    """Import a folder of map files, ``source/ID.npy``, as ``output/ID.npz``.

    A file may also be named by the digits of an image of COCO or VOC. A background plane is
    dropped. Files that cannot be read are left out, with the reason.

    Args:
        source: the folder, searched recursively.
        ids: ids of the images. None: the names of the files.
        sizes: (H, W) by id, checked against the files.
        style, classes: as in `read_foreign_maps`, for all files.
        chosen: names of some of ``classes``, in label order; maps of others are dropped.
        no_file_no_class: an image of ``ids`` without a file has no class, as in MCTformer.
        normalise: divide each map by its maximum, as IRN does.

    Raises:
        DataError: if two files are of one image, or a file or a chosen class is not there.
        ArtefactError: if no file can be read.
    """
    table = None if classes is None else choose_classes(classes, chosen)
    files = _find_files(source)
    named = {_image_of(name): name for name in files}
    if ids is None:
        ids = tuple(files)
    paths = {i: files.get(safe_id(i), files.get(named.get(_image_of(i), ""))) for i in ids}
    if not any(paths.values()):
        raise DataError(
            f"none of the {len(ids)} images has a file in {source}: it holds "
            f"{next(iter(files))!r}.npy, the first image is {next(iter(ids), '')!r}"
        )

    def convert(item_id: str) -> tuple[str, int, list[str]] | Skip:
        path, size = paths[item_id], (sizes or {}).get(item_id)
        try:
            if path is not None:
                maps = read_foreign_maps(path, size=size, style=style, classes=classes)
            elif no_file_no_class:
                made_by = {"imported": {"file": None}, "lpcam": __version__}
                maps = replace(maps_without_class(size), made_by=made_by)
            else:
                raise DataError(f"{source} has no file of it")
        except (ArtefactError, DataError) as error:
            return Skip(item_id, str(error))
        others: list[str] = []
        if classes is not None and table is not None:
            names = [classes.names[key] for key in maps.keys.tolist()]
            others = [name for name in names if name not in table.names]
            rows = [row for row, name in enumerate(names) if name in table.names]
            keys = np.array([table.names.index(names[row]) for row in rows], dtype=np.int64)
            made_by = {**maps.made_by, "classes": list(table.names)}
            maps = MapFile(keys, maps.cam[rows], maps.high_res[rows], made_by)
        if normalise:
            made_by = {**maps.made_by, "normalised": "max"}
            cam, full = (
                normalize(torch.from_numpy(planes)).numpy() if planes.size else planes
                for planes in (maps.cam, maps.high_res)
            )
            maps = MapFile(maps.keys, cam, full, made_by)
        write_maps(map_path(output, item_id), maps, dtype="float16")
        return maps.made_by["imported"].get("style", _NO_FILE), len(maps.keys), others

    results = dict(zip(ids, ordered_map(convert, ids, workers), strict=True))
    skipped = tuple(found for found in results.values() if isinstance(found, Skip))
    done = {i: found for i, found in results.items() if not isinstance(found, Skip)}
    if not done:
        raise ArtefactError(f"no map file of {source} can be used: {skipped[0].reason}")
    return ImportedMaps(
        output,
        ids=tuple(done),
        styles=Counter(style for style, _, _ in done.values()),
        without_class=tuple(item_id for item_id, (_, count, _) in done.items() if not count),
        skipped=skipped,
        not_chosen=Counter(name for *_, others in done.values() for name in others),
    )


def _find_files(source: Path) -> dict[str, Path]:
    files = {
        safe_id(path.relative_to(source).with_suffix("").as_posix()): path
        for path in sorted(source.rglob("*.npy"))
        if not any(part.startswith(".") for part in path.relative_to(source).parts)
    }
    if not files:
        raise DataError(f"there is no .npy file in {source}; give the folder of ID.npy files")
    images: dict[str, str] = {}
    for name in files:
        other = images.setdefault(_image_of(name), name)
        if other != name:
            raise DataError(f"{source} has {other!r}.npy and {name!r}.npy of one image; keep one")
    return files


def _image_of(name: str) -> str:
    """Name of an image, independent of the spelling of its file name."""
    folder, slash, last = name.rpartition("/")
    if match := _COCO_ID.fullmatch(last):
        last = f"coco {match[1]}"
    elif match := _VOC_ID.fullmatch(last):
        last = f"voc {match[1]}_{match[2]}"
    return folder + slash + last


def export_maps(
    source: Path,
    output: Path,
    style: str,
    ids: Sequence[str],
    *,
    classes: ClassTable | None = None,
    background: float | None = None,
    bare_digits: bool = False,
    workers: int = 1,
) -> list[Path]:
    """Export map files of this package, ``source/ID.npz``, as ``output/ID.npy`` of another style.

    Args:
        style, classes, background: as in `write_foreign_maps`; classes also go to `CLASSES_FILE`.
        bare_digits: name files of COCO by their 12 digits alone, as AMN does.

    Raises:
        DataError: if two ids give one file, or the folder has a different `CLASSES_FILE`.
    """
    _check_background(style, background)
    names = {}
    for item_id in ids:
        match = _COCO_ID.fullmatch(safe_id(item_id).rpartition("/")[2]) if bare_digits else None
        names[item_id] = match[1] if match else item_id
    if len(set(names.values())) != len(ids):
        raise DataError("two of the images would be written to one file; give each id once")
    if classes is not None:
        lines = zip(classes.names, classes.mask_ids, strict=True)
        data = "".join(f"{name}\t{value}\n" for name, value in lines).encode()
        write_unchanged({output / CLASSES_FILE: data})

    def convert(item_id: str) -> Path:
        path = output / f"{names[item_id]}.npy"
        maps = read_maps(map_path(source, item_id))
        write_foreign_maps(path, maps, style, background=background, classes=classes)
        return path

    return [*progress_map(f"maps as {style}", convert, ids, workers)]
