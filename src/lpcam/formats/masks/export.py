"""Export of masks to the formats of other tools, with ``exported.json`` of what was written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lpcam.data.dataset import IGNORE, ClassTable, Skip, check_unique, safe_id
from lpcam.data.images import upright_size
from lpcam.data.masks import read_index_mask
from lpcam.data.output_folders import read_index
from lpcam.formats.masks.base import Format, MaskEntry, Picture, regions
from lpcam.formats.registry import FORMATS
from lpcam.method.objects import Plane
from lpcam.runtime.errors import ArtefactError, DataError
from lpcam.runtime.files import write_bytes, write_json
from lpcam.runtime.parallel import ordered_map
from lpcam.runtime.progress import progress

INDEX = "exported.json"
_KIND = "lpcam export masks"
Judge = Callable[
    [MaskEntry, NDArray[np.uint8]], tuple[NDArray[np.float32] | None, Mapping[str, float]]
]
"""Heat map and scores of a mask."""


class ExportedMasks(NamedTuple):
    """Result of :func:`export_masks`."""

    folder: Path
    format: str
    images: int
    annotations: int  #: Number of objects.
    ignored_pixels: int  #: Number of pixels of 255.
    left_out: tuple[Skip, ...]
    ignored: str  #: What became of ignored pixels.
    images_below: Path | None  #: Folder of the images' names, if they have one.

    def summary(self) -> str:
        """The result as text, one fact per line."""
        count = f"{self.images} masks, {self.annotations} objects"
        lines = [f"{count}, as {self.format} in {self.folder}"]
        if self.images_below is not None:
            lines.append(f"images are named by their paths below {self.images_below}")
        if self.ignored_pixels:
            lines.append(f"{self.ignored_pixels:,} ignored pixels (255) are {self.ignored}")
        if self.left_out:
            lines.append(f"{len(self.left_out)} left out, the first: {self.left_out[0].reason}")
        return "\n".join(lines)


def export_masks(
    entries: Sequence[MaskEntry | Skip],
    classes: ClassTable,
    output: Path,
    format: str,
    *,
    instances: bool = False,
    evidence: Callable[..., Plane] | None = None,
    image_root: str = "",
    judge: Judge | None = None,
    workers: int = 1,
    made_by: Mapping[str, Any] | None = None,
) -> ExportedMasks:
    """Write masks in the format of another tool; what cannot be used is left out, with the reason.

    A later call into the same folder replaces what an earlier one wrote in the same format, and no
    other file. With ``instances`` an object is a connected component of a class, or with
    ``evidence`` (``Explainer.discriminative``) one of the objects that it separates, which needs
    the images; ``image_root`` is the images' folder below the folder that Label Studio serves.
    ``judge`` (``RunFolder.judge()``) gives heat maps and scores to the formats that hold them.
    """
    writer = FORMATS[format]
    known = judge if judge and writer.holds_scores else lambda *_: (None, {})
    if writer.refers_to_images:
        entries = _without_shared_images(entries)
    masks = _checked(entries, writer)
    prefix = _image_prefix(image_root, format)
    files = [*writer.beside(classes, ()), *filter(None, [writer.document_name])]
    planned = {*files, *(path for entry in masks for path in writer.paths(entry))}
    before = _earlier_files(output, format)
    _check_targets(masks, output, planned, before)
    folders = {entry.images_below for entry in masks} - {None}
    images_below = folders.pop() if writer.refers_to_images and len(folders) == 1 else None
    index = {
        "format": 1,
        "kind": _KIND,
        "masks": format,
        "instances": instances,
        "separated": evidence is not None,
        "classes": {"names": classes.names, "mask_ids": classes.mask_ids},
        "ignored": writer.ignored,
        "images_below": None if images_below is None else str(images_below),
        "made_by": dict(made_by or {}),
    }
    # Written first, so that a call after an interruption knows its files.
    write_json(output / INDEX, {**index, "files": sorted(before | planned)})

    def export(entry: MaskEntry | Skip) -> tuple[Picture, Any] | Skip:
        if isinstance(entry, Skip):
            return entry
        try:
            size = None if entry.image is None else upright_size(entry.image, entry.reading)
            mask = read_index_mask(entry.mask, size=size)
            objects = regions(
                mask,
                classes,
                instances=instances,
                evidence=evidence and partial(evidence, entry.image),
            )
            picture = Picture(
                entry, prefix + entry.name, mask, objects, classes, *known(entry, mask)
            )
            writer.write(picture, [output / path for path in writer.paths(entry)])
        except DataError as error:
            return Skip(entry.id, str(error))
        return picture, writer.record(picture)

    left_out: list[Skip] = []
    written: list[str] = []
    counts = Counter(annotations=0, ignored_pixels=0)

    def records() -> Iterator[Any]:
        with progress(f"masks as {format}", len(entries)) as advance:
            for result in ordered_map(export, entries, workers):
                advance(1, "")
                if isinstance(result, Skip):
                    left_out.append(result)
                    continue
                picture, record = result
                written.append(picture.entry.id)
                files.extend(p for p in writer.paths(picture.entry) if (output / p).is_file())
                counts["annotations"] += len(picture.objects)
                counts["ignored_pixels"] += int((picture.mask == IGNORE).sum())
                yield record
        if not written:
            raise DataError(f"no mask can be exported, the first because: {left_out[0].reason}")

    if writer.document_name is None:
        list(records())
    else:
        write_bytes(output / writer.document_name, writer.document(records(), classes))
    for name, contents in writer.beside(classes, written).items():
        write_bytes(output / name, contents)
    for stale in (before | planned) - set(files):
        (output / stale).unlink(missing_ok=True)
    index |= {"images": len(written), **counts, "files": sorted(files)}
    index["left_out"] = [{"image": skip.id, "reason": skip.reason} for skip in left_out]
    write_json(output / INDEX, index)
    return ExportedMasks(
        output,
        format,
        len(written),
        counts["annotations"],
        counts["ignored_pixels"],
        tuple(left_out),
        writer.ignored,
        images_below,
    )


def _checked(entries: Sequence[MaskEntry | Skip], writer: Format) -> list[MaskEntry]:
    masks = [entry for entry in entries if isinstance(entry, MaskEntry)]
    if not masks:
        raise DataError("there is no mask to export; give at least one")
    check_unique([safe_id(entry.id) for entry in masks], "what is to be exported")
    ids = frozenset(entry.id for entry in masks)
    for entry in masks:
        writer.check(entry, ids)
    return masks


def _without_shared_images(entries: Sequence[MaskEntry | Skip]) -> list[MaskEntry | Skip]:
    """Leave out an image that two lists of a data set share: it has two ids and one name."""
    owners: dict[str, str] = {}
    found = [*entries]
    for place, entry in enumerate(entries):
        if isinstance(entry, MaskEntry):
            owner = owners.setdefault(entry.name, entry.id)
            reason = f"its image {entry.name} is that of {owner!r}, whose mask is exported"
            found[place] = entry if owner == entry.id else Skip(entry.id, reason)
    return found


def _image_prefix(root: str, format: str) -> str:
    if not root:
        return ""
    if not FORMATS[format].has_image_root:
        owners = ", ".join(name for name, one in FORMATS.items() if one.has_image_root)
        raise DataError(f"the image root belongs to {owners}, not to {format}; leave it out")
    try:
        return f"{safe_id(root.rstrip('/') or root)}/"
    except DataError as error:
        raise DataError(f"the image root is a path below the served folder: {error}") from error


def _earlier_files(output: Path, format: str) -> set[str]:
    """The files that an earlier call wrote into the folder."""
    index = read_index(output / INDEX, _KIND)
    if index is None:
        return set()
    if index.get("masks") != format:
        raise ArtefactError(
            f"{output} holds masks exported as {index.get('masks')}; choose another --output"
        )
    try:
        return {safe_id(name) for name in index["files"]}  # they are deleted by name
    except (KeyError, TypeError, DataError) as error:
        raise ArtefactError(f"{output / INDEX} is damaged ({error}); choose another") from error


def _check_targets(
    entries: Sequence[MaskEntry], output: Path, planned: set[str], before: set[str]
) -> None:
    """Refuse to replace files of others, or files that are exported themselves."""
    folder = output.resolve()
    written = {folder / name for name in before | planned}
    others = [output / name for name in sorted(planned - before) if (output / name).exists()]
    for path in filter(None, (path for entry in entries for path in (entry.mask, entry.image))):
        if {path.absolute(), path.parent.resolve() / path.name} & written:
            others.append(path)
    if others:
        reason = f"was not written by an earlier '{_KIND}', or is to be exported itself"
        raise ArtefactError(f"{others[0]} is there already and {reason}; choose another --output")
