"""Segment image files and whole folders, onto disk, and pack masks for the VOC test server."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lpcam.data.images import limit_long_side, read_image, read_index_mask
from lpcam.data.items import ClassTable, check_unique
from lpcam.data.voc import CLASSES as VOC_CLASSES
from lpcam.errors import ArtefactError, DataError
from lpcam.explain.explainer import printable
from lpcam.explain.files import ImageResults, OutputKind, find_images, process_images
from lpcam.masks import enlarge_labels, overlay_mask, write_mask
from lpcam.presets import SegmentTestSettings
from lpcam.refine.crf import DenseCrf
from lpcam.resources import memory_of_an_image
from lpcam.segmentation import predict
from lpcam.segmentation.predict import SegmenterLike
from lpcam.storage import read_bytes, write_bytes, write_json
from lpcam.version import versions

KIND = "lpcam predict"
INDEX = "predicted.json"
MAXIMUM_SIDE = 1024
"""Pixels. A longer image is segmented at this long side, as a run maps it."""
BACKGROUND_NAME = "background"
"""Of label 0 in files of probabilities."""

Competition = Literal["comp5", "comp6"]
"""Of the VOC test server: trained on VOC's own data alone, or on any."""
ARCHIVE = "{}_test_cls.tar.gz"

_ZLIB_LEVEL = 1
_VOC_ID = re.compile(r"\d{4}_\d{6}")
_MOST_NAMED = 5
"""Ids that a message names."""


def _describe(found: Mapping[str, Any]) -> str:
    """The findings of one image in words."""
    classes = [f"{c['name']} ({100 * c['area']:.0f} %)" for c in found["classes"]]
    return ", ".join(classes) or "background alone"


_PREDICTED = OutputKind(
    KIND,
    INDEX,
    (
        re.compile(r"found/(?P<name>.+)\.json"),
        re.compile(r"(masks|overlays)/(?P<name>.+)\.png"),
        re.compile(r"probabilities/(?P<name>.+)\.npz"),
    ),
    describe=_describe,
    pictures="overlays",
)


def segment_files(
    segmenter: SegmenterLike,
    sources: Iterable[Path],
    output: Path,
    settings: SegmentTestSettings,
    *,
    probabilities: bool = False,
    maximum_side: int = MAXIMUM_SIDE,
    workers: int = 1,
    memory: int | None = None,
    command: str = "",
    made_by: Mapping[str, Any] | None = None,
) -> ImageResults:
    """Segment image files and the images of folders; a broken one is left out, with the reason.

    Below ``output``, by the names of :func:`lpcam.explain.files.find_images`: ``masks/NAME.png`` at
    the image's size, with the VOC palette and the classes' mask ids; ``overlays/NAME.png``, the
    mask over the image; ``found/NAME.json``, the classes and their share of the image; on demand
    ``probabilities/NAME.npz`` (:func:`write_probabilities`); and ``predicted.json``, which names
    the images, what was left out, and what made the masks. A later call replaces the files of the
    same names that an earlier one wrote, and no others.

    An image whose longer side is above ``maximum_side`` is segmented smaller: its mask is enlarged
    to the nearest pixel, its overlay and probabilities stay smaller.

    Args:
        segmenter: in evaluation mode; with ``workers`` above 1 it is shared by threads.
        settings: scales, fusion and the CRF.
        probabilities: whether to keep them.
        maximum_side: in pixels.
        workers: images worked on at a time.
        memory: bytes that the CRF may need of each image, which is left out if it needs more; None:
            three quarters of the memory, shared among the workers.
        command: recorded.
        made_by: provenance, recorded.

    Raises:
        DataError: if there is no image.
        ClassifierError: if the segmenter is in training mode or its logits are no numbers.
        ArtefactError: if a file that is not an earlier call's would be replaced, or one cannot be
            written.
    """
    images = find_images(sources, output)
    made = {
        "classes": dict(zip(segmenter.classes.names, segmenter.classes.mask_ids, strict=True)),
        "settings": settings.model_dump(mode="json"),
        "changed_from_preset": sorted(settings.changes()),
        "maximum_side": maximum_side,
        "versions": versions(),
        **(made_by or {}),
    }
    if memory is None and segmenter.device.type == "cpu":
        memory = memory_of_an_image(segmenter.device, workers)
    crf = predict.make_crf(settings, memory)

    def make(name: str, path: Path) -> dict[str, Any]:
        image = read_image(path)
        seen = limit_long_side(image, maximum_side)
        scores = _probabilities(segmenter, seen, settings, crf, path)
        labels = predict.labels(scores).cpu()
        small = predict.label_mask(labels, segmenter.classes)
        mask = predict.label_mask(enlarge_labels(labels, image.shape[:2]), segmenter.classes)
        files = {"mask": f"masks/{name}.png", "overlay": f"overlays/{name}.png"}
        write_mask(output / files["mask"], mask)
        write_bytes(output / files["overlay"], _png(overlay_mask(seen, small)))
        if probabilities:
            files["probabilities"] = f"probabilities/{name}.npz"
            write_probabilities(output / files["probabilities"], scores, segmenter.classes, made)
        found = {
            "format": 1,
            "kind": KIND,
            "image": name,
            "width": image.shape[1],
            "height": image.shape[0],
            "segmented_width": seen.shape[1],
            "segmented_height": seen.shape[0],
            "classes": _areas(mask, segmenter.classes),
            "files": files,
            "made_by": {**made, "file": printable(path)},
        }
        # last: it says that the rest is there
        write_json(output / "found" / f"{name}.json", found)
        return found

    return process_images(
        images,
        output,
        make,
        _PREDICTED,
        made_by=made,
        command=command,
        workers=workers,
        title="segmenting",
    )


def _probabilities(
    segmenter: SegmenterLike,
    image: NDArray[np.uint8],
    settings: SegmentTestSettings,
    crf: DenseCrf | None,
    path: Path,
) -> Tensor:
    """Those of one image, its name in the message where the CRF refuses it."""
    scores = predict.probabilities(segmenter, image, settings)
    if crf is None:
        return scores
    try:
        return predict.refine(scores, image, settings, crf)
    except DataError as error:
        raise DataError(
            f"cannot segment image {path}: {error}; or lower the longest side of images"
        ) from error


def _areas(mask: NDArray[np.uint8], classes: ClassTable) -> list[dict[str, Any]]:
    """The classes in a mask, the largest first, with their share of the pixels."""
    counts = np.bincount(mask.reshape(-1), minlength=256) / mask.size
    found = [
        {"name": name, "mask_value": value, "area": round(float(counts[value]), 6)}
        for name, value in zip(classes.names, classes.mask_ids, strict=True)
        if counts[value]
    ]
    return sorted(found, key=lambda one: -float(one["area"]))


def _png(picture: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


# -- Probabilities -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ProbabilityFile:
    """The probabilities of one image's labels."""

    names: tuple[str, ...]
    """Of the L labels: ``background``, then the classes."""
    mask_ids: tuple[int, ...]
    """Their values in masks."""
    probabilities: NDArray[np.float32]
    """(L, H, W) in [0, 1], in steps of 1/255."""
    made_by: dict[str, Any] = field(default_factory=dict)


def write_probabilities(
    path: Path, probabilities: Tensor, classes: ClassTable, made_by: Mapping[str, Any]
) -> None:
    """Write probabilities (L, H, W) in [0, 1] as a compressed npz without pickle.

    Its members: ``probabilities`` uint8 (L, H, W), round(255 p), so the error is at most 1/510;
    ``names`` (L,), ``background`` and the class names; ``mask_ids`` (L,); and ``made_by``, JSON as
    UTF-8 bytes.

    Raises:
        DataError: if there is another number of labels, or a value outside [0, 1].
        ArtefactError: if the file cannot be written.
    """
    if probabilities.ndim != 3 or len(probabilities) != len(classes) + 1:
        raise DataError(
            f"probabilities are {tuple(probabilities.shape)}; expected ({len(classes) + 1}, H, W): "
            f"the background and {len(classes)} classes"
        )
    values = np.empty(tuple(probabilities.shape), np.uint8)
    for into, plane in zip(values, probabilities, strict=True):  # one at a time, to save memory
        # of NaN both comparisons are false
        if not (float(plane.min()) >= 0.0 and float(plane.max()) <= 1.0):
            raise DataError("probabilities are NaN or outside [0, 1]; find what made them")
        into[:] = (plane * 255.0).round().cpu().numpy()
    members = {
        "probabilities": values,
        "names": np.array([BACKGROUND_NAME, *classes.names]),
        "mask_ids": np.array([0, *classes.mask_ids], np.uint8),
        "made_by": np.frombuffer(json.dumps(dict(made_by), sort_keys=True).encode(), np.uint8),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=_ZLIB_LEVEL) as archive:
        for name, array in members.items():
            # a member opened by name carries no date: equal values give equal bytes
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def read_probabilities(path: Path) -> ProbabilityFile:
    """Read what :func:`write_probabilities` wrote; ArtefactError if it is damaged or another's."""
    data = read_bytes(path)
    try:
        archive = np.load(io.BytesIO(data), allow_pickle=False)
        return ProbabilityFile(
            tuple(str(name) for name in archive["names"]),
            tuple(int(value) for value in archive["mask_ids"]),
            archive["probabilities"].astype(np.float32) / 255,
            json.loads(archive["made_by"].tobytes()),
        )
    except Exception as error:  # a damaged archive makes zipfile, zlib and numpy raise anything
        raise ArtefactError(
            f"{path} is damaged or holds no probabilities ({error}); write it again with '{KIND}'"
        ) from error


# -- The VOC test server -----------------------------------------------------------------------


def write_voc_server(
    masks: Mapping[str, Path] | Path,
    ids: Sequence[str],
    classes: ClassTable,
    output: Path,
    *,
    competition: Competition = "comp6",
) -> Path:
    """Pack masks as the PASCAL VOC test server takes them.

    Below ``output``: ``results/VOC2012/Segmentation/COMPETITION_test_cls/ID.png``, palette PNGs of
    the values 0..20, and the same in ``COMPETITION_test_cls.tar.gz``, whose bytes depend on the
    masks alone. Everything is checked before anything is written.

    Args:
        masks: the mask of each id, or a folder of ``ID.png``.
        ids: of the list ``test``, as YYYY_NNNNNN, each once.
        classes: of the masks; names of VOC with VOC's mask ids, perhaps not all.
        output: a folder.
        competition: ``comp5`` for what was trained on VOC's own data alone, else ``comp6``.

    Returns:
        the archive.

    Raises:
        DataError: if there is no id, one is no VOC id or stands twice, a mask is missing, damaged
            or has a value outside 0..20, the classes are not VOC's, or the competition is unknown.
        ArtefactError: if there are other masks in the folder already, or a file cannot be written.
    """
    if competition not in get_args(Competition):
        allowed = ", ".join(get_args(Competition))
        raise DataError(f"unknown competition {competition!r}; the server has {allowed}")
    _check_voc_classes(classes)
    if not ids:
        raise DataError("no id was given; give those of the list 'test'")
    wrong = [name for name in ids if _VOC_ID.fullmatch(name) is None]
    if wrong:
        raise DataError(f"{_named(wrong)} is no id of VOC, as 2008_000006 is; give VOC's own list")
    check_unique(ids, "the list for the server")
    paths = {
        name: masks / f"{name}.png" if isinstance(masks, Path) else masks.get(name)
        for name in sorted(ids)
    }
    present = {name: path for name, path in paths.items() if path is not None and path.is_file()}
    missing = [name for name in paths if name not in present]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} masks are missing: {_named(missing)}; segment these "
            "images first, for the server wants every image of its list"
        )
    for path in present.values():
        values = np.unique(read_index_mask(path))
        outside = values[values > len(VOC_CLASSES)].tolist()
        if outside:
            raise DataError(
                f"mask {path} has the value {outside[0]}; the server takes 0 to "
                f"{len(VOC_CLASSES)}, and 255 (ignored) is no answer"
            )
    inner = Path("results", "VOC2012", "Segmentation", f"{competition}_test_cls")
    written = [output / inner / f"{name}.png" for name in present]
    others = sorted(set((output / inner).glob("*")) - set(written))
    if others:
        raise ArtefactError(
            f"{others[0]} is there already and not of this list; choose another folder"
        )
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for path, into in zip(present.values(), written, strict=True):
            write_mask(into, read_index_mask(path))
            data = read_bytes(into)
            member = tarfile.TarInfo((inner / into.name).as_posix())  # no date and no owner
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    target = output / ARCHIVE.format(competition)
    write_bytes(target, buffer.getvalue())
    return target


def _check_voc_classes(classes: ClassTable) -> None:
    for name, value in zip(classes.names, classes.mask_ids, strict=True):
        if not value <= len(VOC_CLASSES) or VOC_CLASSES[value - 1] != name:
            raise DataError(
                f"class {name!r} with the mask id {value} is not one of VOC; the server takes the "
                f"{len(VOC_CLASSES)} classes of VOC with the ids 1 to {len(VOC_CLASSES)}"
            )


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _MOST_NAMED} more" if len(ids) > _MOST_NAMED else ""
    return ", ".join(repr(name) for name in ids[:_MOST_NAMED]) + more
