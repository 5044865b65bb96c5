"""Map files of other programs: ``.npy`` files of a pickled dictionary, read and written.

A key k is the class of the value k + 1 in masks, also in runs of some classes, whose label indices
differ. Files are never unpickled (:mod:`lpcam.formats.pickled_arrays`); what is written can be read
without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpcam.data.dataset import ClassTable
from lpcam.data.map_files import MapFile
from lpcam.formats.map_formats import kind_of, names_in
from lpcam.formats.pickled_arrays import dictionary_file, read_pickled_arrays
from lpcam.formats.registry import MAP_FORMATS
from lpcam.runtime.errors import ArtefactError, DataError
from lpcam.runtime.files import digest_bytes, read_bytes, write_bytes
from lpcam.runtime.versions import __version__

AUTO = "auto"
"""Name of no map format: it is found from the contents."""


@dataclass(frozen=True, eq=False)
class ForeignMaps:
    """Contents of a map file; ``background`` is float32 (H, W), where the style has it."""

    maps: MapFile
    style: str
    background: NDArray[np.float32] | None


def read_foreign_maps(
    path: Path,
    *,
    size: tuple[int, int] | None = None,
    style: str = AUTO,
    classes: ClassTable | None = None,
) -> ForeignMaps:
    """Read the maps of one image, with their values unchanged (no ReLU, no normalisation).

    Where the file has no map of stride 4 (psa), ``maps.cam`` is the full one resized.

    Args:
        path: the ``.npy`` file.
        size: (H, W) of the image; a file of another size is refused. Required where the file of an
            image without a class has no size.
        style: a name of `MAP_FORMATS`; "auto" finds it from the contents.
        classes: a key k becomes the label index of the class with mask value k + 1; any other key
            is refused. None: keys are not changed.

    Raises:
        ArtefactError: if the file is missing, damaged, tries to run code, does not fit the style,
            classes or size, has negative or infinite values, or could be of several styles.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp()) / "a.npy"
        >>> one = np.ones((1, 8, 12), np.float32)
        >>> write_foreign_maps(path, MapFile(np.array([3]), one[:, ::4, ::4], one), "irn")
        >>> read_foreign_maps(path).style
        'irn'
    """
    named = None if style == AUTO else MAP_FORMATS[style]
    data = read_bytes(path)
    found = read_pickled_arrays(data, what=f"map file {path}")
    made_by: dict[str, Any] = {
        "imported": {"file": path.name, "digest": digest_bytes(data)},
        "lpcam": __version__,
    }
    try:
        if not isinstance(found, dict):
            raise DataError(f"it holds {kind_of(found)}; expected a dictionary of maps")
        style = _recognised(found) if named is None else style
        maps, background = MAP_FORMATS[style].read(found, size)
        made_by["imported"]["style"] = style
        keys = maps.keys.tolist()
        if len(set(keys)) != len(keys) or (keys and min(keys) < 0):
            raise DataError(f"its classes {keys[:9]} repeat or are < 0")
        if classes is not None:
            unknown = [key for key in keys if key + 1 not in classes.mask_ids]
            if unknown:
                raise DataError(
                    f"it has the key {unknown[0]}, and no class has the mask value "
                    f"{unknown[0] + 1}; give the classes that the maps were made with"
                )
            keys = [classes.mask_ids.index(key + 1) for key in keys]
            made_by["classes"] = list(classes.names)
    except DataError as error:
        raise ArtefactError(f"map file {path} is refused: {error}") from error
    labels = np.array(keys, dtype=np.int64)
    return ForeignMaps(MapFile(labels, maps.cam, maps.high_res, made_by), style, background)


def _recognised(found: dict[Any, Any]) -> str:
    fitting = [name for name, one in MAP_FORMATS.items() if one.fits(found)]
    if len(fitting) == 1:
        return fitting[0]
    layouts = "; ".join(f"{name}: {MAP_FORMATS[name].layout}" for name in fitting or MAP_FORMATS)
    if fitting:
        raise DataError(f"it may be of several styles, name one ({layouts})")
    raise DataError(f"it holds {names_in(found)}; expected one of {layouts}")


def write_foreign_maps(
    path: Path,
    maps: MapFile,
    style: str,
    *,
    background: float | NDArray[np.float32] | None = None,
    classes: ClassTable | None = None,
) -> None:
    """Write the maps of one image for other programs, atomically.

    They read it with ``np.load(path, allow_pickle=True).item()``, without torch. Values are float32
    and not changed.

    Args:
        path: the ``.npy`` file.
        maps: foreground planes.
        style: a name of `MAP_FORMATS`.
        background: background score for the styles that have one (amn, psa-crf), such as the
            threshold of the seeds: of the whole image, or a plane (H, W).
        classes: classes whose label indices are the keys of the maps; each becomes its mask value
            minus 1. None: keys are not changed.

    Raises:
        DataError: if a background is missing, superfluous or of another size, or a key is not a
            label index.
    """
    format = MAP_FORMATS[style]
    if format.has_background != (background is not None):
        raise DataError(
            f"files of the style {style!r} have "
            + ("a plane of the background; give its score" if background is None else "none of it")
        )
    size = maps.high_res.shape[1:]
    if background is not None:
        background = np.asarray(background, np.float32)
        if background.shape not in ((), size):
            raise DataError(f"the background is {background.shape}, the maps are {size}")
        background = np.broadcast_to(background, size).copy()
    if classes is not None:
        if maps.keys.size and maps.keys.max() >= len(classes):
            raise DataError(
                f"maps of {path.stem!r} have the class index {maps.keys.max()}; there are "
                f"{len(classes)} classes"
            )
        keys = np.array([classes.mask_ids[n] - 1 for n in maps.keys.tolist()], dtype=np.int64)
        maps = replace(maps, keys=keys)
    write_bytes(path, dictionary_file(format.write(maps, background)))
