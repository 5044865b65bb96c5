"""Masks written for other tools: VOC, COCO, YOLO, Label Studio, CVAT, and pictures for the eye.

What each holds, below the output folder:

``voc``
    ``SegmentationClass/ID.png`` (the mask as it is, 255 too), ``Annotations/ID.xml`` (boxes of the
    objects), ``ImageSets/Segmentation/all.txt``, ``class_names.txt``.
``coco``, ``coco-polygons``
    ``annotations.json``: see :mod:`lpcam.formats.coco_json`.
``yolo``
    ``images/`` (copies, as YOLO finds labels beside them), ``labels/ID.txt``, ``data.yaml``: see
    :mod:`lpcam.formats.yolo`.
``label-studio``
    ``tasks.json``, ``label_config.xml``: see :mod:`lpcam.formats.label_studio`.
``cvat``
    ``annotations.xml``: see :mod:`lpcam.formats.cvat`.
``overlays``
    ``overlays/ID.jpg``: the image with its mask over it, in VOC colours.

COCO, CVAT and Label Studio name an image as its data do (:attr:`MaskEntry.name`); elsewhere its
name is its id with the ending of its file. Both have ``/`` between folders. Beside them lies
``exported.json``: what was written, what from, and what was left out.
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lpcam.data.images import read_image, read_index_mask, upright_size
from lpcam.data.items import IGNORE, ClassTable, Skip, check_unique, safe_id
from lpcam.data.voc import CLASS_NAMES, CLASSES
from lpcam.errors import ArtefactError, DataError
from lpcam.formats import coco_json, cvat, label_studio, yolo
from lpcam.formats.regions import Region, regions
from lpcam.masks import overlay_mask, write_mask
from lpcam.parallel import ordered_map
from lpcam.storage import read_bytes, read_json, write_bytes, write_json
from lpcam.version import __version__

MaskFormat = Literal["voc", "coco", "coco-polygons", "yolo", "label-studio", "cvat", "overlays"]
INDEX = "exported.json"
KIND = "lpcam export masks"
_JPEG_QUALITY = 90
_IGNORED = {
    "voc": "kept as 255",
    "overlays": "drawn in the colour of 255",
}
_IGNORED_OTHERWISE = "of no object: the format has no such pixels, its readers take background"
_NAMING = ("coco", "coco-polygons", "label-studio", "cvat")
"""Formats that name images which stay where they are."""


@dataclass(frozen=True)
class MaskEntry:
    """A mask that is to be exported, and its image where there is one."""

    id: str
    """As of :class:`lpcam.data.items.Item`."""
    image: Path | None
    """None: its name is taken to end in ``.jpg``."""
    mask: Path
    file_name: str | None = None
    """As of :class:`lpcam.data.items.Item`."""

    @property
    def name(self) -> str:
        """What the image is called where it is: its path below some folder, with its ending."""
        return self.file_name or self.name_by_id

    @property
    def name_by_id(self) -> str:
        """What the image is called where ids name files."""
        return self.id + (self.image.suffix if self.image is not None else ".jpg")

    @property
    def images_below(self) -> Path | None:
        """The folder below which `name` is the image's path; None: there is no such folder."""
        image = "" if self.image is None else os.path.normpath(self.image.absolute())
        folder = image.removesuffix(f"/{self.name}")
        return None if folder == image else Path(folder or "/")


@dataclass(frozen=True)
class ExportedMasks:
    """What :func:`export_masks` wrote."""

    folder: Path
    format: MaskFormat
    files: int
    images: int
    annotations: int
    """Objects; in ``yolo`` there may be more lines than objects."""
    left_out: tuple[Skip, ...]
    ignored_pixels: int
    """Pixels of 255."""
    ignored: str
    """What became of them."""
    images_below: Path | None = None
    """The one folder that names of images begin at, of formats that name images elsewhere."""

    def summary(self) -> str:
        """In words, a line each."""
        lines = [
            f"{self.images} masks, {self.annotations} objects, as {self.format} in {self.folder}"
        ]
        if self.images_below is not None:
            lines.append(f"images are named by their paths below {self.images_below}")
        if self.ignored_pixels:
            lines.append(f"{self.ignored_pixels:,} ignored pixels (255) are {self.ignored}")
        if self.left_out:
            lines.append(f"{len(self.left_out)} left out, the first: {self.left_out[0].reason}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Picture:
    """A mask with its objects."""

    entry: MaskEntry
    mask: NDArray[np.uint8]
    objects: Sequence[Region]

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.mask.shape
        return height, width


@dataclass(frozen=True)
class _Written:
    """What one image came to."""

    id: str
    annotations: int
    ignored_pixels: int
    files: Sequence[str]
    record: Any
    """Its part of the format's one document."""


Record = Callable[[_Picture], Any]
Document = Callable[[Iterable[Any]], Iterator[bytes]]


@dataclass(frozen=True)
class _Writer:
    """A format: files of each image, or records of all that make one document, and files beside."""

    paths: Callable[[MaskEntry], Sequence[str]] = lambda entry: ()
    write: Callable[[_Picture, Sequence[Path]], None] = lambda picture, paths: None
    record: Callable[[_Picture], Any] = lambda picture: None
    document: tuple[str, Document] | None = None
    beside: Mapping[str, Callable[[Sequence[str]], bytes]] = field(default_factory=dict)
    """By path: contents, of the ids of the images that were written."""


def export_masks(
    entries: Sequence[MaskEntry | Skip],
    classes: ClassTable,
    output: Path,
    format: MaskFormat,
    *,
    instances: bool = False,
    image_root: str = "",
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    made_by: Mapping[str, Any] | None = None,
) -> ExportedMasks:
    """Write masks in the format of another tool.

    An image whose mask or image cannot be read, whose sizes differ or whose mask has a value of no
    class is left out, with the reason. A later call into the same folder replaces what an earlier
    one wrote in the same format, and no other file. Masks are held one a worker; of the images in
    one document, only their names and sizes.

    Args:
        entries: in the order in which they are written; ids as of data sets. A `Skip` is an image
            that has no mask, which is left out for its reason.
        classes: their mask ids are the values in the masks.
        instances: an object is a connected component of a class, not all of a class in an image.
            ``yolo`` has a line a component in either case, ``overlays`` shows none.
        image_root: of ``label-studio``: path of the folder of the images below the one that is
            served (``images_below`` of what is returned); it stands before each image's name.
        workers: images worked on at a time; the files do not depend on it.
        progress: called with how many images are done and how many there are.
        made_by: JSON, what the masks were made from; recorded.

    Raises:
        DataError: if the format is unknown, there is no mask, an id repeats or is unsafe, a format
            cannot name an image, ``overlays`` lacks an image, ``image_root`` is of another format
            or no plain relative path, or every image would be left out.
        ArtefactError: if a file would be replaced that is not an earlier call's, or one cannot be
            written.
        LpcamError: for ``instances``, if SciPy is not installed.
    """
    if format in _NAMING:
        entries = _named_once(entries)
    masks = [entry for entry in entries if isinstance(entry, MaskEntry)]
    _check_entries(masks, format)
    writer = _writer(format, classes, _image_prefix(image_root, format))
    planned = [*writer.beside, *([writer.document[0]] if writer.document else [])]
    planned += [path for entry in masks for path in writer.paths(entry)]
    before = _earlier_files(output, format)
    _check_foreign(output, planned, before)
    _check_sources(masks, output, {*before, *planned})
    folders = {entry.images_below for entry in masks} - {None}
    images_below = folders.pop() if format in _NAMING and len(folders) == 1 else None
    index = {
        "format": 1,
        "kind": KIND,
        "masks": format,
        "instances": instances,
        "classes": {"names": classes.names, "mask_ids": classes.mask_ids},
        "ignored": _IGNORED.get(format, _IGNORED_OTHERWISE),
        "images_below": None if images_below is None else str(images_below),
        "made_by": dict(made_by or {}),
    }
    # First: after a stop, the next call knows what is its own.
    write_json(output / INDEX, {**index, "files": sorted({*before, *planned})})

    def work(entry: MaskEntry | Skip) -> _Written | Skip:
        if isinstance(entry, Skip):
            return entry
        return _export(entry, writer, classes, output, instances)

    left_out: list[Skip] = []
    ids: list[str] = []
    files = [*writer.beside, *([writer.document[0]] if writer.document else [])]
    counts = {"annotations": 0, "ignored_pixels": 0}

    def records() -> Iterator[Any]:
        for number, result in enumerate(ordered_map(work, entries, workers), start=1):
            if progress is not None:
                progress(number, len(entries))
            if isinstance(result, Skip):
                left_out.append(result)
                continue
            ids.append(result.id)
            files.extend(result.files)
            counts["annotations"] += result.annotations
            counts["ignored_pixels"] += result.ignored_pixels
            yield result.record
        if not ids:
            raise DataError(f"no mask can be exported, the first because: {left_out[0].reason}")

    if writer.document is None:
        for _ in records():
            pass
    else:
        name, document = writer.document
        _write_parts(output / name, document(records()))
    for name, contents in writer.beside.items():
        write_bytes(output / name, contents(ids))
    for stale in {*before, *planned} - set(files):
        (output / stale).unlink(missing_ok=True)
    skipped = [{"image": skip.id, "reason": skip.reason} for skip in left_out]
    found = {"images": len(ids), **counts, "left_out": skipped, "files": sorted(files)}
    write_json(output / INDEX, {**index, **found})
    return ExportedMasks(
        output,
        format,
        len(files),
        len(ids),
        counts["annotations"],
        tuple(left_out),
        counts["ignored_pixels"],
        str(index["ignored"]),
        images_below,
    )


def _export(
    entry: MaskEntry, writer: _Writer, classes: ClassTable, output: Path, instances: bool
) -> _Written | Skip:
    try:
        mask = _read(entry)
        try:
            picture = _Picture(entry, mask, regions(mask, classes, instances=instances))
        except DataError as error:
            raise DataError(f"mask {entry.mask} is refused: {error}") from error
        paths = writer.paths(entry)
        writer.write(picture, [output / path for path in paths])
    except DataError as error:
        return Skip(entry.id, str(error))
    ignored = int((mask == IGNORE).sum())
    return _Written(entry.id, len(picture.objects), ignored, paths, writer.record(picture))


# -- What goes in ------------------------------------------------------------------------------


def _check_entries(entries: Sequence[MaskEntry], format: MaskFormat) -> None:
    if format not in get_args(MaskFormat):
        raise DataError(
            f"mask format {format!r} is unknown; choose one of {', '.join(get_args(MaskFormat))}"
        )
    if not entries:
        raise DataError("there is no mask to export; give at least one")
    ids = {entry.id for entry in entries}
    check_unique([safe_id(entry.id) for entry in entries], "what is to be exported")
    for entry in entries:
        if format == "overlays" and entry.image is None:
            raise DataError(f"{entry.id!r} has no image to lay its mask over; give its image")
        short = yolo.below_images(entry.id)
        if format == "yolo" and (
            "images" in short.split("/")[:-1] or (short != entry.id and short in ids)
        ):
            raise DataError(
                f"{entry.id!r} has a folder 'images', which YOLO's readers take for the one beside "
                "'labels'; rename that folder"
            )


def _named_once(entries: Iterable[MaskEntry | Skip]) -> list[MaskEntry | Skip]:
    """Leave out an image that two lists of a data set share: it has two ids, and one name."""
    found: list[MaskEntry | Skip] = []
    owners: dict[str, str] = {}
    for entry in entries:
        if isinstance(entry, MaskEntry):
            owner = owners.setdefault(entry.name, entry.id)
            if owner != entry.id:
                reason = f"its image {entry.name} is that of {owner!r}, whose mask is exported"
                found.append(Skip(entry.id, reason))
                continue
        found.append(entry)
    return found


def _image_prefix(root: str, format: MaskFormat) -> str:
    if not root:
        return ""
    if format != "label-studio":
        raise DataError(f"the image root belongs to label-studio, not to {format}; leave it out")
    try:
        return f"{safe_id(root.rstrip('/') or root)}/"
    except DataError as error:
        raise DataError(
            f"the image root {root!r} is refused; expected the path of the images' folder below "
            "the folder that Label Studio serves, such as 'images'"
        ) from error


def _read(entry: MaskEntry) -> NDArray[np.uint8]:
    mask = read_index_mask(entry.mask)
    if entry.image is not None:
        size = upright_size(entry.image)
        if size != mask.shape:
            raise DataError(
                f"mask {entry.mask} is {mask.shape[0]} x {mask.shape[1]} (height x width), its "
                f"upright image is {size[0]} x {size[1]}; give the mask of this image"
            )
    return mask


# -- What is there already ---------------------------------------------------------------------


def _earlier_files(output: Path, format: MaskFormat) -> list[str]:
    """What an earlier call wrote into the folder."""
    path = output / INDEX
    if not path.exists():
        return []
    index = read_json(path)
    if not isinstance(index, dict) or index.get("kind") != KIND:
        raise ArtefactError(
            f"{path} was not written by '{KIND}', so it may be yours; choose another output folder"
        )
    if index.get("masks") != format:
        raise ArtefactError(
            f"{output} holds masks exported as {index.get('masks')}; choose another output folder "
            f"for {format}"
        )
    try:
        return [safe_id(name) for name in index["files"]]  # they are deleted by name
    except (KeyError, TypeError, DataError) as error:
        raise ArtefactError(f"{path} is damaged ({error}); choose another output folder") from error


def _check_foreign(output: Path, planned: Iterable[str], before: Iterable[str]) -> None:
    own = set(before)
    for name in planned:
        if name not in own and (output / name).exists():
            raise ArtefactError(
                f"{output / name} is there already and was not written by an earlier '{KIND}', so "
                "it may be yours; choose another output folder"
            )


def _check_sources(entries: Iterable[MaskEntry], output: Path, own: Iterable[str]) -> None:
    """Files of an earlier call are replaced or deleted, so they cannot be exported themselves."""
    folder = output.resolve()
    written = {folder / name for name in own}
    for entry in entries:
        for path in filter(None, (entry.mask, entry.image)):
            if path.absolute() in written or path.parent.resolve() / path.name in written:
                raise ArtefactError(
                    f"{path} is to be exported and lies where the export goes; choose another "
                    "--output"
                )


def _write_parts(path: Path, parts: Iterable[bytes]) -> None:
    """`write_bytes` of a document that is never whole in memory."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ArtefactError(
            f"cannot write {path}: {error.strerror or error}; make room there or choose another "
            "output folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


# -- The formats -------------------------------------------------------------------------------


def _writer(format: MaskFormat, classes: ClassTable, prefix: str) -> _Writer:
    made = f"lpcam {__version__}"
    if format == "voc":
        return _Writer(
            paths=lambda entry: (
                f"SegmentationClass/{entry.id}.png",
                f"Annotations/{entry.id}.xml",
            ),
            write=lambda picture, paths: _write_voc(picture, paths, classes),
            beside={
                CLASS_NAMES: lambda ids: _lines(_names_by_value(classes)),
                "ImageSets/Segmentation/all.txt": _lines,
            },
        )
    if format in ("coco", "coco-polygons"):
        return _Writer(
            record=lambda picture: _coco_record(picture, classes, format == "coco-polygons"),
            document=(
                "annotations.json",
                lambda records: coco_json.document(records, classes, f"masks written by {made}"),
            ),
        )
    if format == "yolo":
        return _Writer(
            paths=_yolo_paths,
            write=_write_yolo,
            beside={"data.yaml": lambda ids: yolo.data_file(classes).encode()},
        )
    if format == "label-studio":
        return _Writer(
            record=lambda picture: label_studio.task(
                prefix + picture.entry.name, picture.size, picture.objects, classes, made
            ),
            document=("tasks.json", label_studio.document),
            beside={"label_config.xml": lambda ids: label_studio.configuration(classes).encode()},
        )
    if format == "cvat":
        return _Writer(
            record=lambda picture: cvat.image_element(
                picture.entry.name, picture.size, picture.objects, classes
            ),
            document=("annotations.xml", lambda records: cvat.document(records, classes, made)),
        )
    return _Writer(
        paths=lambda entry: (f"overlays/{entry.id}.jpg",),
        write=_write_overlay,
    )


def _coco_record(picture: _Picture, classes: ClassTable, polygons: bool) -> Any:
    annotations = [
        coco_json.annotation(one, picture.size, classes, polygons=polygons)
        for one in picture.objects
    ]
    return picture.entry.name, picture.size, annotations


def _yolo_paths(entry: MaskEntry) -> tuple[str, ...]:
    label = f"labels/{yolo.below_images(entry.id)}.txt"
    if entry.image is None:
        return (label,)
    return label, f"images/{yolo.below_images(entry.name_by_id)}"


def _write_yolo(picture: _Picture, paths: Sequence[Path]) -> None:
    write_bytes(paths[0], yolo.label_lines(picture.objects, picture.size).encode())
    if picture.entry.image is not None:
        write_bytes(paths[1], read_bytes(picture.entry.image))


def _write_overlay(picture: _Picture, paths: Sequence[Path]) -> None:
    assert picture.entry.image is not None  # checked of all before
    buffer = io.BytesIO()
    laid = Image.fromarray(overlay_mask(read_image(picture.entry.image), picture.mask))
    laid.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    write_bytes(paths[0], buffer.getvalue())


def _write_voc(picture: _Picture, paths: Sequence[Path], classes: ClassTable) -> None:
    write_mask(paths[0], picture.mask)
    height, width = picture.size
    annotation = ElementTree.Element("annotation")
    ElementTree.SubElement(annotation, "filename").text = picture.entry.name_by_id
    size = ElementTree.SubElement(annotation, "size")
    for name, value in (("width", width), ("height", height), ("depth", 3)):
        ElementTree.SubElement(size, name).text = str(value)
    ElementTree.SubElement(annotation, "segmented").text = "1"
    for one in picture.objects:
        entry = ElementTree.SubElement(annotation, "object")
        ElementTree.SubElement(entry, "name").text = classes.names[one.label]
        box = ElementTree.SubElement(entry, "bndbox")
        # VOC counts pixels from 1 and names the last one
        corners = (one.x0 + 1, one.y0 + 1, one.x0 + one.width, one.y0 + one.height)
        for name, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
            ElementTree.SubElement(box, name).text = str(value)
    ElementTree.indent(annotation)
    write_bytes(paths[1], ElementTree.tostring(annotation, encoding="utf-8"))


def _names_by_value(classes: ClassTable) -> list[str]:
    """A name for each value from 1 on, as VOC's own readers count lines."""
    by_value = dict(zip(classes.mask_ids, classes.names, strict=True))
    voc = dict(enumerate(CLASSES, start=1))
    if by_value.items() <= voc.items():
        return list(CLASSES)
    return [by_value.get(value, f"unused_{value}") for value in range(1, max(by_value) + 1)]


def _lines(texts: Iterable[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()
