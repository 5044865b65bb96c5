"""Folders of outputs for a folder of images: names, index and summary."""

from __future__ import annotations

import itertools
import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpcam.data.dataset import Skip, skip_lines
from lpcam.data.image_files import FolderFiles, how_to_convert, list_images
from lpcam.data.images import IMAGE_SUFFIXES, has_pages, pages_notice
from lpcam.runtime.errors import ArtefactError, DataError, PrototypeError
from lpcam.runtime.files import digest_bytes, printable, read_json, write_json
from lpcam.runtime.parallel import ordered_map
from lpcam.runtime.progress import progress

logger = logging.getLogger(__name__)
SHEET = "sheet.png"
SHEET_ROWS = 24  #: Rows of the contact sheet.
_MOST_LINES = 20  # images that a summary lists
OUTPUT_FOLDERS = ("found", "heatmaps", "masks", "overlays", "probabilities")
_LONGEST_NAME = 160  # bytes, so that an ending still fits into the 255 of most file systems


@dataclass(frozen=True)
class OutputKind:
    """Names of the files that a command on image files writes below the output folder."""

    command: str  #: Name, such as ``lpcam explain``; kind of the index.
    index: str  #: File name of the index.
    forms: Sequence[re.Pattern[str]]  #: Paths of outputs; the group ``name`` is the image's.
    describe: Callable[[Mapping[str, Any]], str]  #: The findings of one image in words.
    pictures: str  #: File or folder to look at.
    others: Sequence[str] = ()  #: Files that are not of one image.


@dataclass(frozen=True)
class ImageResults:
    """Results of a command that works on image files."""

    kind: OutputKind
    folder: Path
    found: list[dict[str, Any]]  #: The contents of each image's JSON file.
    skipped: list[dict[str, str]]  #: ``image`` and ``reason`` of each one that failed or is unread.
    notices: tuple[str, ...] = ()  #: What else is in the folders.

    def summary(self) -> str:
        """One line per image, of the first ones, then skipped images and the folder."""
        describe = self.kind.describe
        lines = [f"{one['image']}: {describe(one)}" for one in self.found[:_MOST_LINES]]
        more = len(self.found) - _MOST_LINES
        lines += [f"... and {more} more images"] * (more > 0)
        skipped = [Skip(one["image"], one["reason"]) for one in self.skipped]
        lines += [*skip_lines(skipped, "left out"), *(f"note: {text}" for text in self.notices)]
        lines.append(f"results in {self.folder}")
        lines += [f"pictures in {self.folder / self.kind.pictures}"] * bool(self.found)
        return "\n".join(lines)


def find_images(sources: Iterable[Path], output: Path) -> FolderFiles:
    """Image files by the names of their outputs: the path below its folder without the extension.

    Images that would share a name keep their extensions, or are numbered; ``output`` is not
    searched. DataError if there is no image or source.
    """
    own = [(output / folder).resolve() for folder in OUTPUT_FOLDERS]
    files, skipped, notices = dict[Path, tuple[str, Path]](), list[Skip](), list[str]()
    for source in (sources := list(sources)):
        if source.is_dir():
            listed = list_images(source, [output])
            for _, path in listed.images:
                files.setdefault(path.resolve(), (path.relative_to(source).as_posix(), path))
            skipped += (Skip(printable(source / skip.id), skip.reason) for skip in listed.unread)
            notices += listed.notices
        elif not source.is_file():
            raise DataError(f"there is no image or folder {source}")
        elif any(source.resolve().is_relative_to(folder) for folder in own):
            raise DataError(
                f"{source} is in the output folder {output}, where the results would replace it; "
                "choose another --output"
            )
        elif reason := how_to_convert(source.name):
            skipped.append(Skip(printable(source), reason))
        else:
            files.setdefault(source.resolve(), (source.name, source))
    if not files:
        lines = [
            f"there is no image below {', '.join(map(str, sources))}; files with the endings "
            f"{', '.join(sorted(IMAGE_SUFFIXES))} are accepted"
        ]
        raise DataError("\n".join([*lines, *skip_lines(skipped, "cannot be used"), *notices]))
    paged = [name for name, path in files.values() if has_pages(path)]
    notices += [pages_notice(paged)] * bool(paged)
    short = {name: _safe_name(name.removesuffix(Path(name).suffix)) for name, _ in files.values()}
    counts = Counter(short[name].casefold() for name, _ in files.values())
    taken = {name for name, count in counts.items() if count == 1}
    names: dict[str, Path] = {}
    for whole, path in files.values():
        name = short[whole]
        if counts[name.casefold()] > 1:
            tries = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
            name = _safe_name(whole)
            name += next(end for end in tries if f"{name}{end}".casefold() not in taken)
            taken.add(name.casefold())
        names[name] = path
    return FolderFiles(tuple(names.items()), tuple(skipped), tuple(notices))


def read_index(path: Path, command: str) -> dict[str, Any] | None:
    """Index that an earlier call of a command wrote; ArtefactError if it is of another kind."""
    if not path.exists():
        return None
    index = read_json(path)
    if not isinstance(index, dict) or index.get("kind") != command:
        raise ArtefactError(
            f"{path} was not written by '{command}', so it may be yours; choose another --output"
        )
    return index


def process_images(
    files: FolderFiles,
    output: Path,
    make: Callable[[str, Path], dict[str, Any]],
    kind: OutputKind,
    *,
    made_by: Mapping[str, Any],
    command: str,
    workers: int,
    title: str,
) -> ImageResults:
    """Write the outputs of every image and an index of them; an image that fails is left out.

    ``make`` writes the outputs of an image and returns its findings. ArtefactError if files would
    be replaced that are no outputs of earlier calls for the same images.
    """
    images, path = dict(files.images), output / kind.index
    earlier = read_index(path, kind.command) or {"images": {}}
    outputs = _outputs_by_image(output, kind.forms)
    foreign = [file for name in images if name not in earlier["images"] for file in outputs[name]]
    if not path.exists():
        foreign += [output / name for name in kind.others if (output / name).exists()]
    if foreign:
        raise ArtefactError(
            f"{foreign[0]} is there already and was not written by an earlier '{kind.command}' of "
            "this image, so it may be yours; choose another --output"
        )
    index: dict[str, Any] = {
        "format": 1,
        "kind": kind.command,
        "command": command,
        "made_by": made_by,
        "skipped": [{"image": skip.id, "reason": skip.reason} for skip in files.unread],
        "notices": list(files.notices),
        "images": {**earlier["images"], **{n: printable(file) for n, file in images.items()}},
    }
    # first: after an interruption, the next call knows which files are its own
    write_json(path, index)

    def work(entry: tuple[str, Path]) -> dict[str, Any] | str:
        for old in outputs[entry[0]]:  # the new outputs may have other names
            old.unlink(missing_ok=True)
        try:
            return make(*entry)
        except (DataError, PrototypeError) as error:
            return str(error)

    found = []
    with progress(title, len(images)) as advance:
        for name, result in zip(images, ordered_map(work, images.items(), workers), strict=True):
            if isinstance(result, str):
                index["skipped"].append({"image": index["images"].pop(name), "reason": result})
                logger.warning("left out: %s", result)
            else:
                found.append(result)
            advance(1, name)
    write_json(path, index)
    return ImageResults(kind, output, found, index["skipped"], files.notices)


def _outputs_by_image(
    output: Path, forms: Sequence[re.Pattern[str]]
) -> defaultdict[str, list[Path]]:
    """Files below a folder whose paths have the form of outputs, by the image's name."""
    outputs: defaultdict[str, list[Path]] = defaultdict(list)
    for folder in OUTPUT_FOLDERS:
        for path in sorted((output / folder).rglob("*")):
            relative = path.relative_to(output).as_posix()
            for match in filter(None, (form.fullmatch(relative) for form in forms)):
                outputs[match["name"]].append(path)
    return outputs


def _safe_name(text: str) -> str:
    """A relative path that any file system accepts, made of a path below a folder."""
    text = unicodedata.normalize("NFC", printable(Path(text)))
    parts = []
    for part in text.split("/"):
        safe = re.sub(r'[\x00-\x1f\x7f\\:*?"<>|]', "_", part).strip() or "_"
        if len(safe.encode()) > _LONGEST_NAME:
            head = safe.encode()[: _LONGEST_NAME - 10].decode("utf-8", "ignore")
            safe = f"{head}-{digest_bytes(part.encode())[:8]}"
        parts.append(safe)
    return "/".join(parts)
