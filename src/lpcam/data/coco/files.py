"""Finding the annotation files and the images of a COCO folder, in COCO's layout and others."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from lpcam.data.dataset import safe_id
from lpcam.data.labels import relative_name
from lpcam.runtime.errors import DataError

ALL = "all"  #: List of the images of all annotation files.
LABELLED = ".labelled"  #: Ending of the list of those images that show at least one class.
_ROBOFLOW = "_annotations.coco.json"
_INSTANCES = "instances_"
_NAMED = (f"annotations/{_INSTANCES}*.json", "annotations/*.json", f"*/{_ROBOFLOW}")
"""Patterns of annotation files, with the list in the place of ``*``."""
_ANY_JSON = ("annotations.json", "*.json")


def find_files(
    root: Path, lists: Sequence[str] | None
) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """A data set's folder, the annotation files of some lists (None: all), and all it has."""
    folder = root
    found: dict[str, Path] = {}
    places: tuple[str, ...] = ()
    if root.is_file():
        folder = root.parent.parent if root.parent.name == "annotations" else root.parent
        found = {_list_name(root): root}
    elif root.is_dir():
        found = annotation_files(root)
        places = (*_NAMED, "*.json")
    wanted: dict[str, Path] = {}
    for given in lists or (ALL,):
        name = safe_id(given.removesuffix(LABELLED))
        tried = (root / place.replace("*", name) for place in places)
        path = next((path for path in tried if path.is_file()), found.get(name))
        if path is not None:
            wanted[name] = path
        elif name == ALL and found:
            wanted |= found
        else:
            known = ", ".join([*found, ALL]) if found else "none"
            raise DataError(f"there is no annotation file of {given!r} in {root}; lists: {known}")
    return folder, wanted, found


def annotation_files(root: Path) -> dict[str, Path]:
    """The annotation files of a folder, by list, from the first place that has any."""
    for pattern in (*_NAMED, _ROBOFLOW, *_ANY_JSON):
        found = {
            _list_name(path): path
            for path in sorted(root.glob(pattern))
            if path.is_file() and (pattern not in _ANY_JSON or _has_annotations(path))
        }
        if found:
            return found
    return {}


def _has_annotations(path: Path) -> bool:
    """Tell if a JSON file seems to have arrays of images and annotations."""
    with contextlib.suppress(OSError):
        data = path.read_bytes().replace(b"\0", b"")  # of UTF-16
        return all(re.search(rb'"%s"\s*:\s*\[' % key, data) for key in (b"images", b"annotations"))
    return False


def _list_name(path: Path) -> str:
    if path.name == _ROBOFLOW:
        return path.resolve().parent.name or ALL
    if path.name == "annotations.json":
        return ALL
    return safe_id(path.stem.removeprefix(_INSTANCES))


def image_folders(root: Path, name: str, path: Path) -> tuple[Path, ...]:
    """The folders in which the images of a list with the annotation file ``path`` are searched."""
    images = root / "images"
    subset = images / name.rpartition("_")[2]  # CVAT's of labels_default.json, ...
    places = (root / name, images / name, subset, images, root / "data", root, path.parent)
    return tuple(dict.fromkeys(places))


def listing_of(folder: Path) -> dict[str, str]:
    """The names of a folder's files by their form NFC; empty if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {unicodedata.normalize("NFC", e.name): e.name for e in entries if e.is_file()}
    except OSError:
        return {}


def name_parts(file_name: str) -> tuple[str, ...]:
    """Folders and name of an image in any tool's writing: without host, drive, query and ``..``."""
    text = unicodedata.normalize("NFC", relative_name(file_name.strip()))
    if re.search(r"://|^/data/|\?(d|fileuri)=", text):  # an address, also of Label Studio
        query = parse_qs(urlsplit(text).query)
        if "fileuri" in query:
            return name_parts(base64.urlsafe_b64decode(query["fileuri"][0] + "==").decode())
        text = query["d"][0] if "d" in query else unquote(urlsplit(text).path)
    parts = [part for part in text.split("/") if part not in ("", ".", "..")]
    return tuple(parts[len(parts) > 1 and parts[0].endswith(":") :])


def find_image(
    places: Sequence[Path], file_name: str, listing: Callable[[Path], Mapping[str, str]]
) -> tuple[Path | None, str]:
    """The file of an image, or None, by the longest end of its name that is below a folder."""
    parts = name_parts(file_name)
    plain = "/".join(parts)
    for start in range(len(parts)):
        parent, name = "/".join(parts[start:-1]), parts[-1]
        stem, dot, ending = name.rpartition(".")
        spellings = (name, stem + dot + ending.lower(), stem + dot + ending.upper())
        found: dict[Path, Path] = {}
        for place in places:
            folder = place / parent if parent else place
            names = listing(folder)
            stored = next((names[one] for one in spellings if one in names), None)
            if stored is not None:
                if not start and plain == relative_name(file_name):
                    return folder / stored, plain
                found.setdefault((folder / stored).resolve(), folder / stored)
        if len(found) > 1:
            options = ", ".join(map(str, found.values()))
            raise DataError(
                f"the image {file_name!r} may be any of {options}; write more of its path"
            )
        for path in found.values():
            return path, "/".join(parts[start:])
    return None, plain
