"""Map files of other programs of the field: IRN's, AMN's and PSA's, read and written.

All are ``.npy`` files of a pickled dictionary (specification of data sets, section 5):

==========  ==================================================================================
style       contents
==========  ==================================================================================
irn         ``keys`` int64 (K,), ``cam`` float32 (K, ceil(H/4), ceil(W/4)), ``high_res`` float32
            (K, H, W); of IRN, LPCAM, ReCAM and AdvCAM
amn         the same with a plane of the background before the others: K + 1 planes, K keys
psa         {class: float32 (H, W)}; of PSA, SEAM, MCTformer and EDAM
psa-crf     {0: background, class + 1: float32 (H, W)}, as PSA keeps maps after the CRF
==========  ==================================================================================

A key k is the class of the value k + 1 in masks, also where a run has some of the classes alone and
its own label indices are others. Files are read by :mod:`lpcam.arrays`, which runs nothing of them;
what is written needs no torch to be read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lpcam.arrays import dictionary_file, read_pickled_arrays
from lpcam.data.classes import choose_classes
from lpcam.data.images import MAXIMUM_PIXELS
from lpcam.data.items import ClassTable, Skip, safe_id
from lpcam.data.labels import read_text
from lpcam.errors import ArtefactError, DataError
from lpcam.formats.labels import CLASSES_FILE
from lpcam.functional import normalize, strided
from lpcam.parallel import ordered_map
from lpcam.storage import (
    MapFile,
    digest_bytes,
    map_path,
    read_bytes,
    read_maps,
    write_bytes,
    write_maps,
)
from lpcam.version import __version__

MapStyle = Literal["irn", "amn", "psa", "psa-crf"]
Background = float | NDArray[np.float32]
"""A score of the whole image, or a plane (H, W)."""
Progress = Callable[[int, int], None]
"""Called with how many images are done, and of how many."""

_WITH_BACKGROUND = ("amn", "psa-crf")
_STRIDE = 4
_COCO_ID = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12})")
_VOC_ID = re.compile(r"((?:19|20)\d{2})_?(\d{6})")


@dataclass(frozen=True, eq=False)
class ForeignMaps:
    """What a foreign map file held.

    ``background`` float32 (H, W) is the plane of the background, where the style has one; ``maps``
    never holds it.
    """

    maps: MapFile
    style: MapStyle
    background: NDArray[np.float32] | None


@dataclass(frozen=True)
class ImportedMaps:
    """What `import_maps` did: ids written, by style; those of no class; what was left out.

    ``not_chosen`` counts the maps that were left out of their files, by class.
    """

    folder: Path
    ids: tuple[str, ...]
    styles: Mapping[str, int]
    without_class: tuple[str, ...]
    skipped: tuple[Skip, ...]
    not_chosen: Mapping[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """In words, a line each."""
        styles = ", ".join(f"{count} {style}" for style, count in sorted(self.styles.items()))
        lines = [f"{len(self.ids)} map files ({styles}) in {self.folder}"]
        if self.without_class:
            lines.append(f"{len(self.without_class)} of them of no class")
        if dropped := sum(self.styles.get(style, 0) for style in _WITH_BACKGROUND):
            lines.append(f"the plane of the background of {dropped} was dropped")
        if self.not_chosen:
            counts = ", ".join(f"{n} {self.not_chosen[n]}" for n in sorted(self.not_chosen))
            lines.append(f"maps of classes not chosen were dropped: {counts}")
        if self.skipped:
            lines.append(f"{len(self.skipped)} left out, the first: {self.skipped[0].reason}")
        return "\n".join(lines)


@dataclass(frozen=True)
class ExportedMaps:
    """What `export_maps` did."""

    folder: Path
    style: MapStyle
    files: tuple[Path, ...]

    def summary(self) -> str:
        """In words."""
        return f"{len(self.files)} map files of the style {self.style} in {self.folder}"


# -- Reading -----------------------------------------------------------------------------------


def read_foreign_maps(
    path: Path,
    *,
    size: tuple[int, int] | None = None,
    style: MapStyle | Literal["auto"] = "auto",
    classes: ClassTable | None = None,
) -> ForeignMaps:
    """Read the maps of one image; values stay as they are (no ReLU, no normalisation).

    Where the file has no map of stride 4 (psa), ``maps.cam`` is the full one resized, bilinear
    without aligned corners. A file without any class may lack arrays, be an empty dictionary, or
    have arrays of no planes.

    Args:
        path: of the ``.npy`` file.
        size: (H, W) of the image; a file of another size is refused. Needed where an image has no
            class and its file no size.
        style: "auto": told by the contents. "psa-crf" looks like "psa" and has to be named.
        classes: a key k becomes the label index of the class of mask value k + 1; a key of none is
            refused. None: keys stay as they are.

    Returns:
        The maps, with ``made_by`` {"imported": {"file", "digest", "style"}, "lpcam": version}, and
        "classes", their names in label order, where they are given.

    Raises:
        ArtefactError: naming the file, if it is missing, damaged, tries to run code, is of no such
            style, class or size, has negative or infinite values, or could be either psa style.
    """
    if style not in ("auto", *get_args(MapStyle)):
        raise DataError(f"map style {style!r} is unknown; choose 'auto', {_STYLES}")
    data = read_bytes(path)
    found = read_pickled_arrays(data, what=f"map file {path}")
    try:
        maps, kind, background = _told_apart(found, size, None if style == "auto" else style)
    except _WrongMapsError as error:
        raise ArtefactError(f"map file {path} is refused: {error}") from error
    keys = maps.keys.tolist()
    if len(set(keys)) != len(keys) or (keys and min(keys) < 0):
        raise ArtefactError(f"map file {path} is refused: its classes {keys[:9]} repeat or are < 0")
    made_by: dict[str, Any] = {
        "imported": {"file": path.name, "digest": digest_bytes(data), "style": kind},
        "lpcam": __version__,
    }
    labels = maps.keys
    if classes is not None:
        unknown = [key for key in keys if key + 1 not in classes.mask_ids]
        if unknown:
            raise ArtefactError(
                f"map file {path} is refused: it has the key {unknown[0]}, and no class has the "
                f"mask value {unknown[0] + 1}; give the classes that the maps were made with"
            )
        labels = np.array([classes.mask_ids.index(key + 1) for key in keys], dtype=np.int64)
        made_by["classes"] = list(classes.names)
    return ForeignMaps(MapFile(labels, maps.cam, maps.high_res, made_by), kind, background)


_STYLES = ", ".join(map(repr, get_args(MapStyle)))


class _WrongMapsError(Exception):
    """What is wrong with a file, without its name."""


_Told = tuple[MapFile, MapStyle, NDArray[np.float32] | None]


def _told_apart(found: Any, size: tuple[int, int] | None, style: MapStyle | None) -> _Told:
    if not isinstance(found, dict):
        raise _WrongMapsError(
            f"it holds {_kind(found)}; expected a dictionary with 'keys' and 'high_res', or of maps"
            " by class"
        )
    by_class = all(type(key) is int for key in found)
    if "keys" in found and style in (None, "irn", "amn"):
        return _of_keys(found, size, style)
    if by_class and style in (None, "psa", "psa-crf"):
        return _by_class(found, size, style)
    names = ", ".join(f"{key!r:.20}" for key in list(found)[:5])
    raise _WrongMapsError(
        f"its dictionary has the keys {names or 'none'}; expected "
        + ("0-based classes" if style in ("psa", "psa-crf") else "'keys' and 'high_res'")
        + (f" of the style {style!r}" if style else ", or 0-based classes")
    )


def _of_keys(
    found: Mapping[str, Any], size: tuple[int, int] | None, style: MapStyle | None
) -> _Told:
    keys = found["keys"]
    if isinstance(keys, list | tuple):
        keys = np.array(keys or np.zeros(0, np.int64))
    if (
        not isinstance(keys, np.ndarray)
        or keys.ndim != 1
        or (keys.size and keys.dtype.kind not in "iu")
    ):
        raise _WrongMapsError(f"'keys' are {_kind(keys)}; expected whole numbers (K,)")
    keys = keys.astype(np.int64)
    planes = {}
    for name in ("cam", "high_res"):
        if found.get(name) is not None:
            planes[name] = _planes(found[name], f"{name!r}", 3)
    if "high_res" not in planes:
        if len(keys):
            raise _WrongMapsError(f"it has {len(keys)} classes, but no 'high_res'")
        return _nothing(size), style or "irn", None
    full = planes["high_res"]
    if not len(full):  # the sides of no planes mean little
        return _nothing(size or (full.shape[1], full.shape[2])), style or "irn", None
    _check_size(full.shape[1:], size)
    extra = len(full) - len(keys)
    if extra not in (0, 1) or style == ("irn" if extra else "amn"):
        expected = {"irn": len(keys), "amn": len(keys) + 1}
        counts = expected[style] if style in expected else f"{len(keys)} (irn) or one more (amn)"
        raise _WrongMapsError(
            f"'high_res' has {len(full)} planes and 'keys' {len(keys)} classes; expected {counts}"
        )
    quarter = _quarter(full.shape[1:])
    if "cam" in planes and planes["cam"].shape != (len(full), *quarter):
        raise _WrongMapsError(
            f"'cam' is {planes['cam'].shape} and 'high_res' {full.shape}; expected 'cam' of "
            f"{(len(full), *quarter)}"
        )
    cam = planes["cam"] if "cam" in planes else _resized(full, quarter)
    if extra:
        return MapFile(keys, cam[1:], full[1:]), "amn", full[0]
    return MapFile(keys, cam, full), "irn", None


def _by_class(
    found: Mapping[int, Any], size: tuple[int, int] | None, style: MapStyle | None
) -> _Told:
    if any(not 0 <= key < 2**31 for key in found):
        raise _WrongMapsError("it has a class below 0 or above any; classes are 0-based")
    found = {key: _planes(value, f"class {key}", 2) for key, value in sorted(found.items())}
    shapes = {plane.shape for plane in found.values()}
    if len(shapes) > 1:
        raise _WrongMapsError(f"its maps have different sizes {sorted(shapes)}")
    if not found:
        return _nothing(size), style or "psa", None
    full = np.stack(list(found.values()))
    _check_size(full.shape[1:], size)
    if style is None and 0 in found and len(found) > 1 and _is_partition(full):
        raise _WrongMapsError(
            "its maps add up to 1 at every pixel, as those with a background after a CRF do; name "
            "the style: 'psa-crf' if 0 is the background, 'psa' if it is the first class"
        )
    keys = np.array(list(found), dtype=np.int64)
    background = None
    if style == "psa-crf":
        if keys[0] != 0:
            raise _WrongMapsError("it has no plane 0, the background; its style is not 'psa-crf'")
        background, full, keys = full[0], full[1:], keys[1:] - 1
    maps = MapFile(keys, _resized(full, _quarter(full.shape[1:])), full)
    return maps, style or "psa", background


def _is_partition(planes: NDArray[np.float32]) -> bool:
    return bool(np.allclose(planes.sum(axis=0), 1, atol=1e-3))


def _planes(value: Any, name: str, axes: int) -> NDArray[np.float32]:
    if not isinstance(value, np.ndarray) or value.ndim != axes or value.dtype.kind != "f":
        shape = "(K, H, W)" if axes == 3 else "(H, W)"
        raise _WrongMapsError(f"{name} is {_kind(value)}; expected floats {shape}")
    height, width = value.shape[-2:]
    if height * width > MAXIMUM_PIXELS or (min(height, width) < 1 and (axes == 2 or len(value))):
        raise _WrongMapsError(
            f"{name} is {value.shape}; expected at most {MAXIMUM_PIXELS:,} pixels and no empty side"
        )
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        planes = np.array(value, dtype=np.float32)
    # of NaN both comparisons are false
    if planes.size and not (planes.min() >= 0 and planes.max() < np.inf):
        raise _WrongMapsError(f"{name} has negative, NaN or infinite values; maps are >= 0")
    return planes


def _kind(value: Any) -> str:
    """For messages: what a file nests could be too long to write out."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return "None" if value is None else f"a {type(value).__name__}"


def _check_size(found: tuple[int, ...], size: tuple[int, int] | None) -> None:
    if size is not None and found != tuple(size):
        raise _WrongMapsError(
            f"its maps are {found[0]} x {found[1]} pixels, the image {size[0]} x {size[1]}"
        )


def _quarter(size: tuple[int, ...]) -> tuple[int, int]:
    height, width = size
    return strided(height, _STRIDE), strided(width, _STRIDE)


def _nothing(size: tuple[int, int] | None) -> MapFile:
    if size is None or min(size) < 1:
        raise _WrongMapsError("it has no class and no map, so the size of its image must be given")
    none = np.zeros(0, np.int64)
    return MapFile(
        none, np.zeros((0, *_quarter(size)), np.float32), np.zeros((0, *size), np.float32)
    )


def _resized(planes: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Planes (K, h, w) at another size, bilinear without aligned corners."""
    if not len(planes):
        return np.zeros((0, *size), np.float32)
    found = F.interpolate(
        torch.from_numpy(planes)[None], size=size, mode="bilinear", align_corners=False
    )
    resized: NDArray[np.float32] = found[0].numpy()
    return resized


# -- Writing -----------------------------------------------------------------------------------


def write_foreign_maps(
    path: Path,
    maps: MapFile,
    style: MapStyle,
    *,
    background: Background | None = None,
    classes: ClassTable | None = None,
) -> None:
    """Write the maps of one image for other programs, whole or not at all.

    They read it with ``np.load(path, allow_pickle=True).item()``, without torch. Values are float32
    and stay as they are. An image of no class has arrays of no planes (irn), ``keys`` alone (amn),
    or an empty dictionary (psa); psa-crf then holds the background.

    Args:
        path: of the ``.npy`` file.
        maps: foreground planes.
        style: one of `MapStyle`.
        background: score of the background where the style has one (amn, psa-crf), such as the
            threshold of the seeds; a plane is resized for ``cam``, bilinear.
        classes: those whose label indices the maps have: each becomes its mask value less 1. None:
            keys stay as they are.

    Raises:
        DataError: if the style is unknown, lacks its background or has none, the background is of
            another size, or a map is of none of the classes.
        ArtefactError: if the file cannot be written.
    """
    if classes is not None:
        if maps.keys.size and maps.keys.max() >= len(classes):
            raise DataError(
                f"maps of {path.stem!r} have the class index {maps.keys.max()}; there are "
                f"{len(classes)} classes"
            )
        keys = np.array([classes.mask_ids[n] - 1 for n in maps.keys.tolist()], dtype=np.int64)
        maps = replace(maps, keys=keys)
    write_bytes(path, dictionary_file(_dictionary(maps, style, background)))


def _dictionary(maps: MapFile, style: MapStyle, background: Background | None) -> dict[Any, Any]:
    if style not in get_args(MapStyle):
        raise DataError(f"map style {style!r} is unknown; choose {_STYLES}")
    if (style in _WITH_BACKGROUND) != (background is not None):
        raise DataError(
            f"files of the style {style!r} have "
            + ("a plane of the background; give its score" if background is None else "none of it")
        )
    full = maps.high_res
    if background is not None:
        plane = np.asarray(background, np.float32)
        if plane.shape not in ((), full.shape[1:]):
            raise DataError(f"the background is {plane.shape}, the maps are {full.shape[1:]}")
        plane = np.broadcast_to(plane, full.shape[1:])[None]
    if style == "psa":
        return dict(zip(maps.keys.tolist(), full, strict=True))
    if style == "psa-crf":
        shifted = (key + 1 for key in maps.keys.tolist())
        return {0: plane[0], **dict(zip(shifted, full, strict=True))}
    if style == "irn":
        return {"keys": maps.keys, "cam": maps.cam, "high_res": full}
    if not len(maps.keys):
        return {"keys": maps.keys}
    quarter = _resized(plane.copy(), _quarter(full.shape[1:]))
    return {
        "keys": maps.keys,
        "cam": np.concatenate([quarter, maps.cam]),
        "high_res": np.concatenate([plane, full]),
    }


# -- Folders -----------------------------------------------------------------------------------


def import_maps(
    source: Path,
    output: Path,
    ids: Sequence[str] | None = None,
    *,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    style: MapStyle | Literal["auto"] = "auto",
    classes: ClassTable | None = None,
    chosen: Sequence[str] | None = None,
    without_file: Literal["skip", "no class"] = "skip",
    normalise: bool = False,
    dtype: Literal["uint8", "float16"] = "float16",
    workers: int = 1,
    progress: Progress | None = None,
) -> ImportedMaps:
    """Import a folder of map files, ``source/ID.npy``, as ``output/ID.npz``.

    A file may also be named by the bare 12 digits of a COCO image, with or without
    ``COCO_train2014_``, or by the 10 digits of a VOC image, whatever the ids are. The background of
    amn and psa-crf is dropped. Files that cannot be read are left out, with the reason.

    Args:
        source: the folder, searched below.
        output: a folder of map files of this package (:func:`lpcam.storage.write_maps`).
        ids: of the images; None: the names of the files.
        sizes: (H, W) by id, checked against the files.
        style, classes: as of `read_foreign_maps`, for all files.
        chosen: names of some of ``classes``, which then are the classes of what is written, in this
            order; maps of the others are dropped and counted.
        without_file: what an image of ``ids`` is without a file: left out, or, as MCTformer means
            it, one that shows no class (``sizes`` must have it).
        normalise: divide each map by its maximum (:func:`lpcam.functional.normalize`), as IRN does.
        dtype: that is stored.
        workers: files read at a time.
        progress: called after each image.

    Raises:
        DataError: if there is no such folder or file in it, an id is not safe, two files are of one
            image, or a chosen class is none of ``classes``.
        ArtefactError: if none of the files can be read, or an output cannot be written.
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
            if path is None:
                made_by = {
                    "imported": {"file": None},
                    "lpcam": __version__,
                    **({} if table is None else {"classes": list(table.names)}),
                }
                if without_file == "skip" or size is None:
                    wanted = "" if without_file == "skip" else ", and the size of its image neither"
                    return Skip(item_id, f"{source} has no file of it{wanted}")
                nothing = _nothing(size)
                found = ForeignMaps(
                    MapFile(nothing.keys, nothing.cam, nothing.high_res, made_by), "psa", None
                )
            else:
                found = read_foreign_maps(path, size=size, style=style, classes=classes)
        except ArtefactError as error:
            return Skip(item_id, str(error))
        maps, others = found.maps, list[str]()
        if classes is not None and table is not None:
            maps, others = _chosen(maps, classes, table)
        if normalise:
            maps = MapFile(
                maps.keys,
                _normalised(maps.cam),
                _normalised(maps.high_res),
                {**maps.made_by, "normalised": "max"},
            )
        write_maps(map_path(output, item_id), maps, dtype=dtype)
        return "no file" if path is None else found.style, len(maps.keys), others

    done: list[str] = []
    empty: list[str] = []
    skipped: list[Skip] = []
    styles: Counter[str] = Counter()
    not_chosen: Counter[str] = Counter()
    for number, (item_id, result) in enumerate(
        zip(ids, ordered_map(convert, ids, workers), strict=True), start=1
    ):
        if isinstance(result, Skip):
            skipped.append(result)
        else:
            done.append(item_id)
            styles[result[0]] += 1
            not_chosen.update(result[2])
            if not result[1]:
                empty.append(item_id)
        if progress is not None:
            progress(number, len(ids))
    if not done:
        raise ArtefactError(f"no map file of {source} can be used: {skipped[0].reason}")
    return ImportedMaps(
        output, tuple(done), dict(styles), tuple(empty), tuple(skipped), dict(not_chosen)
    )


def _chosen(maps: MapFile, classes: ClassTable, table: ClassTable) -> tuple[MapFile, list[str]]:
    """The maps of the classes of ``table`` with its label indices, and the names of the others."""
    names = [classes.names[key] for key in maps.keys.tolist()]
    kept = [row for row, name in enumerate(names) if name in table.names]
    keys = np.array([table.names.index(names[row]) for row in kept], dtype=np.int64)
    made_by = {**maps.made_by, "classes": list(table.names)}
    others = [name for name in names if name not in table.names]
    return MapFile(keys, maps.cam[kept], maps.high_res[kept], made_by), others


def _normalised(planes: NDArray[np.float32]) -> NDArray[np.float32]:
    if not planes.size:
        return planes
    found: NDArray[np.float32] = normalize(torch.from_numpy(planes)).numpy()
    return found


def _find_files(source: Path) -> dict[str, Path]:
    """Files by the ids that their names are."""
    if not source.is_dir():
        raise DataError(f"there is no folder {source}; give the folder of ID.npy files")
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
    """The image that a name is of, in whichever way it is written."""
    folder, slash, last = name.rpartition("/")
    if match := _COCO_ID.fullmatch(last):
        last = f"coco {match[1]}"
    elif match := _VOC_ID.fullmatch(last):
        last = f"voc {match[1]}_{match[2]}"
    return folder + slash + last


def export_maps(
    source: Path,
    output: Path,
    style: MapStyle,
    ids: Sequence[str],
    *,
    classes: ClassTable | None = None,
    background: float | None = None,
    bare_digits: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
) -> ExportedMaps:
    """Export map files of this package, ``source/ID.npz``, as ``output/ID.npy`` of another style.

    Args:
        source: a folder of map files (:func:`lpcam.storage.write_maps`).
        output: the folder to write to; files of the same names are replaced.
        style, classes, background: as of `write_foreign_maps`. Where classes are given,
            `CLASSES_FILE` beside the maps has their names and mask values (`read_classes`).
        ids: of the images.
        bare_digits: name the file of ``COCO_train2014_000000000009`` ``000000000009.npy``, as AMN
            does.
        workers: files written at a time.
        progress: called after each image.

    Raises:
        DataError: as `write_foreign_maps`, or if an id is not safe, two ids give one file, or there
            is another `CLASSES_FILE` already.
        ArtefactError: if a map file is missing or damaged, or an output cannot be written.
    """
    names = {}
    for item_id in ids:
        match = _COCO_ID.fullmatch(safe_id(item_id).rpartition("/")[2]) if bare_digits else None
        names[item_id] = match[1] if match else item_id
    if len(set(names.values())) != len(ids):
        raise DataError("two of the images would be written to one file; give each id once")

    if classes is not None:
        _write_classes(output / CLASSES_FILE, classes)

    def convert(item_id: str) -> Path:
        path = output / f"{names[item_id]}.npy"
        maps = read_maps(map_path(source, item_id))
        write_foreign_maps(path, maps, style, background=background, classes=classes)
        return path

    files = []
    for path in ordered_map(convert, ids, workers):
        files.append(path)
        if progress is not None:
            progress(len(files), len(ids))
    return ExportedMaps(output, style, tuple(files))


def _write_classes(path: Path, classes: ClassTable) -> None:
    lines = zip(classes.names, classes.mask_ids, strict=True)
    data = "".join(f"{name}\t{value}\n" for name, value in lines).encode()
    if path.exists() and (not path.is_file() or path.read_bytes() != data):
        raise DataError(f"{path} is there already with other contents; choose another output")
    write_bytes(path, data)


def read_classes(path: Path) -> ClassTable:
    """Read class names, one a line, from mask value 1 on; a tab and a number give another value.

    Raises:
        DataError: naming the file, if it is missing or no UTF-8 text, a value is no whole number,
            and as :class:`lpcam.data.items.ClassTable`.
    """
    names, values = [], []
    for number, line in enumerate(read_text(path, "Write one name a line.").splitlines(), start=1):
        name, tab, value = line.strip().rpartition("\t")
        if tab and not value.isdecimal():
            raise DataError(
                f"{path} line {number}: {value!r} after the tab is no whole number; expected the "
                "value of the class in masks"
            )
        if value:
            names.append(name.strip() if tab else value)
            values.append(int(value) if tab else len(names))
    try:
        return ClassTable(tuple(names), tuple(values))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
