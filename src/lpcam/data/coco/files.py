"""Finding the annotation files and the images of a COCO folder, in COCO's layout and others."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lpcam.data.coco.json_stream import stream_arrays
from lpcam.data.dataset import safe_id
from lpcam.data.labels import relative_name
from lpcam.runtime.errors import DataError

ALL = "all"
"""List of the images of all annotation files."""
LABELLED = ".labelled"
"""Ending of the list of those images that show at least one class."""
_ROBOFLOW = "_annotations.coco.json"
_INSTANCES = "instances_"
_ANY_JSON = ("annotations.json", "*.json")
_LARGE = 2**20


def find_files(
    root: Path, lists: Sequence[str] | None
) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """Find the annotation files of a data set.

    Args:
        root: an annotation file, or a folder with some.
        lists: names of the lists that are wanted; None: all.

    Returns:
        The data set's folder; the annotation files to read, by list; and all that it has.

    Raises:
        DataError: if there is no file, or none of a list.
    """
    if root.is_file():
        name = _list_name(root)
        wrong = [n for n in lists or () if n.removesuffix(LABELLED) not in (name, ALL)]
        if wrong:
            raise DataError(
                f"{root} has no list {wrong[0]!r}; it has {name}, {ALL} and, of images with a "
                f"label, {name}{LABELLED} and {ALL}{LABELLED}"
            )
        folder = root.parent.parent if root.parent.name == "annotations" else root.parent
        return folder, {name: root}, {name: root}
    if not root.is_dir():
        raise DataError(f"there is no {root}; give an annotation file or a folder that holds one")
    found = annotation_files(root)
    wanted: dict[str, Path] = {}
    for given in lists or (ALL,):
        name = safe_id(given.removesuffix(LABELLED))
        places = (
            root / "annotations" / f"{_INSTANCES}{name}.json",
            root / "annotations" / f"{name}.json",
            root / name / _ROBOFLOW,
            root / f"{name}.json",
        )
        path = next((p for p in places if p.is_file()), found.get(name))
        if path is not None:
            wanted[name] = path
        elif name == ALL and found:
            wanted |= found
        else:
            raise DataError(
                f"list {given!r} is missing: there is no "
                f"{' or '.join(p.relative_to(root).as_posix() for p in places)} in {root}; the "
                f"lists are {', '.join([*found, ALL]) if found else 'none'}"
            )
    return root, wanted, found


def annotation_files(root: Path) -> dict[str, Path]:
    """The annotation files of a folder, by list, from the first place that has any.

    COCO's own ``annotations`` also has captions and key points, which are ignored. Files whose
    names say nothing count if they have arrays of images and annotations.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "cows.json").write_text('{"images": [], "annotations": []}')
        ...     [*annotation_files(Path(folder))]
        ['cows']
    """
    for pattern in (
        f"annotations/{_INSTANCES}*.json",
        "annotations/*.json",
        f"*/{_ROBOFLOW}",
        _ROBOFLOW,
        *_ANY_JSON,
    ):
        found = {
            _list_name(path): path
            for path in sorted(root.glob(pattern))
            if path.is_file() and (pattern not in _ANY_JSON or _has_annotations(path))
        }
        if found:
            return found
    return {}


def _has_annotations(path: Path) -> bool:
    """Tell if the object of a JSON file has arrays of images and annotations.

    In a file of more than 1 MiB one of them is enough: it may be large.
    """
    found = 0
    try:
        for _ in stream_arrays(path, ("images", "annotations")):
            found += 1
            if found == 2 or path.stat().st_size > _LARGE:
                return True
    except DataError:
        pass
    return False


def _list_name(path: Path) -> str:
    if path.name == _ROBOFLOW:
        return path.resolve().parent.name or ALL
    if path.name == "annotations.json":
        return ALL
    return safe_id(path.stem.removeprefix(_INSTANCES))


def image_folders(root: Path, name: str, path: Path) -> tuple[Path, ...]:
    """The folders in which the images of a list with the annotation file ``path`` are searched."""
    places = (root / name, root / "images" / name, root / "images", root, path.parent)
    return tuple(dict.fromkeys(places))


def listing_of(folder: Path) -> dict[str, str]:
    """The names of a folder's files by their form NFC; empty if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {unicodedata.normalize("NFC", e.name): e.name for e in entries if e.is_file()}
    except OSError:
        return {}


def find_image(
    places: Sequence[Path], file_name: str, listing: Callable[[Path], Mapping[str, str]]
) -> Path | None:
    """The first file of that name in some folders; None if there is none.

    Args:
        file_name: relative, as in the annotation file, in any Unicode form.
        listing: :func:`listing_of`, or a cached version of it.
    """
    parent, _, name = unicodedata.normalize("NFC", relative_name(file_name)).rpartition("/")
    for place in places:
        folder = place / parent if parent else place
        stored = listing(folder).get(name)
        if stored is not None:
            return folder / stored
    return None
