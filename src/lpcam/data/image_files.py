"""Files of a folder: images that are read, files that are not, and marks of other tools."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml

from lpcam.data.dataset import Dataset, Item, Skip, check_unique, safe_id
from lpcam.data.images import IMAGE_SUFFIXES, is_image
from lpcam.runtime.errors import DataError, shortened

NEGATIVES = "negatives"
"""Name of the list of images that show none of the classes, and the beginning of their ids."""
FOREIGN_FILES: dict[str, Any] = yaml.safe_load(
    resources.files("lpcam.data").joinpath("foreign_files.yaml").read_text("utf-8")
)
"""What is known of other tools' files: ``marks``, and image files that are ``unread``."""
_OPENED = 5  # files whose contents are looked at for a mark
_UNREAD: dict[str, str] = {
    ending: how for endings, how in FOREIGN_FILES["unread"].items() for ending in endings.split()
}
_NO_IMAGES = ".txt .csv .tsv .json .jsonl .xml .yaml .yml .md .html .py .log"
_TEXT = frozenset(_NO_IMAGES.split())  # of other endings the content decides


class FolderFiles(NamedTuple):
    """Contents of a folder of images."""

    images: tuple[tuple[str, Path], ...]  #: Sorted names below the folder in NFC, and paths.
    unread: tuple[Skip, ...]  #: Images, recordings and archives in formats that are not read.
    notices: tuple[str, ...]  #: What else is there, with counts by extension.


def ending_of(name: str) -> str:
    """The extension of a file in lower case; ``.nii.gz`` is one."""
    lower = name.lower()
    return ".nii.gz" if lower.endswith(".nii.gz") else PurePosixPath(lower).suffix


def how_to_convert(name: str) -> str | None:
    """Why a file is not read as an image and what makes one of it; None for other extensions."""
    ending = ending_of(name)
    how = _UNREAD.get(ending)
    return how and f"files that end in {ending} are not read; {how}"


def list_images(
    folder: Path, ignored: Collection[Path] = (), own: Collection[str] = ()
) -> FolderFiles:
    """List the images below a folder by their extensions, or by their content without a known one.

    Folders ``ignored`` are not searched; ``own`` are names of other files that belong there.
    """
    files, hidden = _walk(folder, ignored)
    images, unread, by_content, others = [], [], list[str](), Counter[str]()
    for name, path in files:
        ending = ending_of(name)
        if reason := how_to_convert(name):
            unread.append(Skip(name, reason))
        elif ending in IMAGE_SUFFIXES:
            images.append((name, path))
        elif ending not in _TEXT and is_image(path):
            images.append((name, path))
            by_content.append(name)
        elif name not in own:
            others[ending or PurePosixPath(name).name] += 1
    counts = [f"{ending} {count}" for ending, count in others.most_common()]
    notices = (
        ("images by their content alone", len(by_content), shortened(by_content)),
        ("files that are no images", others.total(), shortened(counts, 10)),
        ("hidden files and folders, and runs, not read", len(hidden), shortened(sorted(hidden))),
    )
    told = tuple(f"{what}: {count} ({some})" for what, count, some in notices if count)
    return FolderFiles(tuple(images), tuple(unread), told)


def with_negatives(dataset: Dataset, folder: Path) -> Dataset:
    """A copy of a data set with images of a folder that show none of the classes.

    Their ids begin with ``negatives/``. DataError if there is none, or one that is labelled.
    """
    found = list_images(folder)
    if not found.images:
        raise DataError(
            f"there is no image below {folder} (data.negatives); give a folder of images without "
            "any of the classes, or leave data.negatives out"
        )
    items = {
        name: Item(name, path, (), file_name=own, reading=dataset.reading)
        for own, path in found.images
        for name in [f"{NEGATIVES}/{safe_id(own)}"]
    }
    check_unique([*dataset.items, *items], "the data set with its negatives")
    check_unique([*dataset.lists, NEGATIVES], "the lists of the data set with its negatives")
    labelled = {item.image.resolve() for item in dataset.items.values() if item.labels}
    for path in (path for _, path in found.images if path.resolve() in labelled):
        raise DataError(f"{path} is labelled, but data.negatives has it too; move it out of there")
    return replace(
        dataset,
        items={**dataset.items, **items},
        lists={**dataset.lists, NEGATIVES: tuple(items)},
        skipped=(*dataset.skipped, *found.unread),
        notices=(*dataset.notices, *(f"negatives: {one}" for one in found.notices)),
    )


def unnamed(named: Iterable[Path], by: str) -> tuple[str, ...]:
    """A notice of images beside others that nothing names; ``by`` says what would name them."""
    known = {*named}
    others = {path for folder in {p.parent for p in known} for path in folder.iterdir()} - known
    endings = IMAGE_SUFFIXES | _UNREAD.keys()
    names = sorted(p.name for p in others if p.name[0] != "." and ending_of(p.name) in endings)
    return (f"images that {by} names: {len(names)} ({shortened(names, 2)})",) * bool(names)


def _walk(folder: Path, ignored: Collection[Path]) -> tuple[list[tuple[str, Path]], list[str]]:
    """Files below a folder, links followed: sorted names in NFC and paths; what is hidden."""
    found, hidden, top = [], [], folder.resolve()
    above = {folder: {top, *top.parents, *(path.resolve() for path in ignored)}}
    for place, folders, files in os.walk(folder, followlinks=True):
        left_out = above.pop(Path(place))
        inside = {path: path.resolve() for path in (Path(place, name) for name in folders)}
        inside = {path: real for path, real in inside.items() if real not in left_out}
        runs = {p for p in inside if (p / ".lock").is_file() and (p / "index.json").is_file()}
        runs |= {path for path in inside if path.name.startswith((".", "__MACOSX"))}
        folders[:] = [path.name for path in inside if path not in runs]
        above |= {path: left_out | {real} for path, real in inside.items()}
        for path in (*runs, *(Path(place, name) for name in files)):
            text = path.relative_to(folder).as_posix()
            # names that are not Unicode are escaped, so that reports can hold them
            text = unicodedata.normalize("NFC", text.encode("utf-8", "backslashreplace").decode())
            if path in runs or path.name.startswith("."):
                hidden.append(text)
            else:
                found.append((text, path))
    return sorted(found), hidden


def other_format(path: Path) -> str:
    """Text that names the format of a folder's or file's marks and what to do; empty if none."""
    root, names = path.parent, [path.name]
    if path.is_dir():
        files = (file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file())
        shown = (p for p in files if not any(part.startswith(".") for part in p.parts))
        root, names = path, [p.as_posix() for p in shown]
    for mark in FOREIGN_FILES["marks"]:
        contents = mark.get("contents")
        found = [[m for n in names if (m := re.search(p, n))] for p in mark["paths"]]
        for match in found[0][:_OPENED] if all(found) else ():
            if not contents or re.search(contents.encode(), _head(root / match.string)):
                folder = f"{root}/{match[1] or ''}" if match.groups() else ""
                return (
                    f"{match.string} is of {mark['name']}; {mark['advice'].replace('{}', folder)}"
                )
    return ""


def _head(path: Path) -> bytes:
    with suppress(OSError), path.open("rb") as file:
        return file.read(1 << 16)
    return b""
