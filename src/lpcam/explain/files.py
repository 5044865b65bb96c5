"""Explain image files and whole folders, onto disk."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lpcam.data.folder import IMAGE_SUFFIXES
from lpcam.errors import ArtefactError, DataError, ImageError, PrototypeError
from lpcam.explain.explainer import MINIMUM_SCORE, Explainer, printable
from lpcam.explain.maps import KIND
from lpcam.parallel import ordered_map
from lpcam.progress import progress
from lpcam.sheet import CELL, SheetRow, sheet
from lpcam.storage import digest_bytes, read_json, write_bytes, write_json

logger = logging.getLogger(__name__)

SHEET_ROWS = 24
"""Of the contact sheet."""
MOST_LINES = 20
"""Images whose findings a summary lists."""
INDEX = "explained.json"
FOLDERS = ("found", "heatmaps", "masks", "overlays")
_LONGEST_NAME = 160
"""Bytes of a file's name, so that an ending still fits into the 255 of most file systems."""


class Done(Protocol):
    """What a command that works on image files did."""

    @property
    def folder(self) -> Path: ...
    @property
    def found(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def skipped(self) -> Sequence[Mapping[str, str]]: ...


def summarised(lines: Sequence[str], done: Done, pictures: str) -> str:
    """Lines of at most `MOST_LINES` images, then how many more, what was left out and where."""
    lines = [*lines]
    if len(done.found) > MOST_LINES:
        lines.append(f"... and {len(done.found) - MOST_LINES} more images")
    if done.skipped:
        lines.append(f"{len(done.skipped)} left out:")
        lines += [f"  {skip['reason']}" for skip in done.skipped]
    lines.append(f"results in {done.folder}")
    if done.found:
        lines.append(f"pictures in {done.folder / pictures}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Explained:
    """What :func:`explain_files` did."""

    folder: Path
    found: list[dict[str, Any]]
    """Of each image that was mapped, as in its JSON file."""
    skipped: list[dict[str, str]]
    """``image`` and ``reason`` of each that could not be."""

    def summary(self) -> str:
        """What was found and where it is, in lines of which there are not too many."""
        lines = []
        for one in self.found[:MOST_LINES]:
            classes = ", ".join(
                f"{c['name']} {c['score']:.2f} ({100 * c['area']:.0f} % of the image)"
                for c in one["classes"]
            )
            lines.append(f"{one['image']}: {'; '.join([*filter(None, [classes]), *one['notes']])}")
        return summarised(lines, self, "sheet.png")


def find_images(sources: Iterable[Path], output: Path) -> dict[str, Path]:
    """Image files by the names of their outputs.

    Folders are searched below, hidden files and ``output`` left out; a name is the path below the
    folder without its extension. A file that is named itself has its own name. Where two would
    have the same name, all of these keep their extensions, and are numbered if that does not help.

    Raises:
        DataError: if a source is not there, there is no image at all, or one is an output of an
            earlier call.
    """
    own = [(output / folder).resolve() for folder in FOLDERS]
    files: list[tuple[str, Path]] = []
    seen: set[Path] = set()
    for source in sources:
        if source.is_dir():
            below = [
                path
                for path in sorted(source.rglob("*"))
                if path.suffix.lower() in IMAGE_SUFFIXES
                and path.is_file()
                and not any(part.startswith(".") for part in path.relative_to(source).parts)
                and not path.resolve().is_relative_to(output.resolve())
            ]
            found = [(path.relative_to(source).as_posix(), path) for path in below]
        elif source.is_file():
            if any(source.resolve().is_relative_to(folder) for folder in own):
                raise DataError(
                    f"{source} lies in {output}, where the results go and would replace it; choose "
                    "another --output"
                )
            found = [(source.name, source)]
        else:
            raise DataError(f"there is no image or folder {source}")
        for name, path in found:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                files.append((name, path))
    if not files:
        raise DataError(
            f"there is no image below {', '.join(str(s) for s in sources)}; files with the endings "
            f"{', '.join(sorted(IMAGE_SUFFIXES))} are taken"
        )
    alike: dict[str, list[tuple[str, str, Path]]] = {}
    for whole, path in files:
        short = _safe_name(whole.removesuffix(Path(whole).suffix))
        alike.setdefault(short.casefold(), []).append((short, whole, path))
    taken = {key for key, same in alike.items() if len(same) == 1}
    names: dict[str, Path] = {}
    for same in alike.values():
        for short, whole, path in same:
            name, number = short, 1
            while len(same) > 1 and (number == 1 or name.casefold() in taken):
                name = _safe_name(whole) + (f"-{number}" if number > 1 else "")
                number += 1
            taken.add(name.casefold())
            names[name] = path
    return names


def explain_files(
    explainer: Explainer,
    sources: Iterable[Path],
    output: Path,
    *,
    labels: Sequence[str] | None = None,
    minimum_score: float = MINIMUM_SCORE,
    at_least_one: bool = False,
    threshold: float | None = None,
    workers: int = 1,
    command: str = "",
) -> Explained:
    """Explain image files and the images of folders; a broken one is left out, with the reason.

    Below ``output``: what :meth:`ImageMaps.save` writes of each, ``sheet.png`` of the first, and
    ``explained.json``, which names the images, what was left out and what made the maps. A later
    call replaces the files of the same names that an earlier one wrote, and no others.

    Args:
        labels, minimum_score, at_least_one, threshold: as of :class:`Explainer`.
        workers: images worked on at a time.
        command: recorded.

    Raises:
        DataError: if there is no image or a label is unknown.
        ArtefactError: if a file that is not an earlier call's would be replaced, or one cannot be
            written.
    """
    if labels is not None:
        explainer.indices(labels)
    images = find_images(sources, output)
    before = read_index(output / INDEX, KIND)
    outputs = outputs_by_image(output, FOLDERS, _OUTPUTS)
    check_foreign(output, images, before, outputs, KIND, others=("sheet.png",))
    index: dict[str, Any] = {
        "format": 1,
        "kind": KIND,
        "command": command,
        "made_by": explainer.made_by,
        "skipped": [],
        "images": {**(before or {}), **{name: printable(path) for name, path in images.items()}},
    }
    write_json(output / INDEX, index)  # first: after a stop, the next call knows what is its own

    def make(entry: tuple[int, tuple[str, Path]]) -> tuple[dict[str, Any], list[SheetRow]] | str:
        number, (name, path) = entry
        for old in outputs.get(name, ()):  # perhaps of other classes
            old.unlink(missing_ok=True)
        try:
            maps = explainer(
                path,
                labels=labels,
                minimum_score=minimum_score,
                at_least_one=at_least_one,
                threshold=threshold,
                name=name,
            )
        except (ImageError, PrototypeError) as error:
            return str(error)
        rows = maps.sheet_rows(long_side=2 * CELL) if number < SHEET_ROWS else []
        return maps.save(output), rows

    found, rows, skipped = [], [], []
    with progress("explaining", len(images)) as advance:
        results = ordered_map(make, enumerate(images.items()), workers)
        for name, result in zip(images, results, strict=True):
            if isinstance(result, str):
                skipped.append({"image": printable(images[name]), "reason": result})
                del index["images"][name]
                logger.warning("left out: %s", result)
            else:
                found.append(result[0])
                rows += result[1]
            advance(1, name)
    if rows:
        write_bytes(output / "sheet.png", sheet(rows[:SHEET_ROWS], mask_title="mask"))
    else:
        (output / "sheet.png").unlink(missing_ok=True)
    write_json(output / INDEX, {**index, "skipped": skipped})
    return Explained(output, found, skipped)


def read_index(path: Path, kind: str) -> dict[str, str] | None:
    """Names and sources of the images of which earlier calls wrote into a folder.

    Args:
        path: of the index; None is returned where there is none.
        kind: the command that writes such an index, as it stands in it.

    Raises:
        ArtefactError: if it is damaged or another's.
    """
    if not path.exists():
        return None
    index = read_json(path)
    if not isinstance(index, dict) or index.get("kind") != kind:
        raise ArtefactError(
            f"{path} was not written by '{kind}', so it may be yours; choose another --output"
        )
    return dict(index["images"])


_OUTPUTS = (
    re.compile(r"found/(?P<name>.+)\.json"),
    re.compile(r"masks/(?P<name>.+)\.png"),
    re.compile(r"overlays/(?P<name>.+)\.mask\.png"),
    re.compile(r"(heatmaps|overlays)/(?P<name>.+)\.[^./]+\.l?p?cam\.png"),
)


def outputs_by_image(
    output: Path, folders: Iterable[str], forms: Sequence[re.Pattern[str]]
) -> dict[str, list[Path]]:
    """The files below a folder that have the form of outputs, by the image they would be of.

    Args:
        folders: of outputs, in ``output``.
        forms: of their paths below ``output``, the image's name being the group ``name``.
    """
    outputs: dict[str, list[Path]] = {}
    for folder in folders:
        for path in sorted((output / folder).rglob("*")):
            relative = path.relative_to(output).as_posix()
            for form in forms:
                if (match := form.fullmatch(relative)) is not None:
                    outputs.setdefault(match["name"], []).append(path)
                    break
    return outputs


def check_foreign(
    output: Path,
    images: Iterable[str],
    before: Mapping[str, str] | None,
    outputs: Mapping[str, Sequence[Path]],
    kind: str,
    *,
    others: Iterable[str] = (),
) -> None:
    """Refuse to replace files that are not an earlier call's.

    Args:
        images: names of those that are to be written.
        before: what :func:`read_index` found.
        outputs: what :func:`outputs_by_image` found.
        kind: the command, for the message.
        others: files of ``output`` that a first call writes too.

    Raises:
        ArtefactError: naming a file that is in the way.
    """
    foreign = [
        path for name in images if name not in (before or {}) for path in outputs.get(name, ())
    ]
    if before is None:
        foreign += [output / name for name in others if (output / name).exists()]
    if foreign:
        raise ArtefactError(
            f"{foreign[0]} is there already and was not written by an earlier '{kind}' of this "
            "image, so it may be yours; choose another --output"
        )


def _safe_name(text: str) -> str:
    """A relative path that any file system takes, of a path below a folder."""
    text = unicodedata.normalize("NFC", printable(Path(text)))
    parts = []
    for part in text.split("/"):
        safe = re.sub(r'[\x00-\x1f\x7f\\:*?"<>|]', "_", part).strip() or "_"
        if len(safe.encode()) > _LONGEST_NAME:
            head = safe.encode()[: _LONGEST_NAME - 10].decode("utf-8", "ignore")
            safe = f"{head}-{digest_bytes(part.encode())[:8]}"
        parts.append(safe)
    return "/".join(parts)
