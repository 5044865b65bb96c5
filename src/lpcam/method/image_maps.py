"""The maps of one image: masks, pictures, findings, and files of them."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from lpcam.data.dataset import ClassTable
from lpcam.data.drawing import CELL, SheetRow, overlay, overlay_mask, sheet
from lpcam.data.images import png_bytes, resize_image, scaled_size
from lpcam.data.masks import write_mask
from lpcam.method.seeds import to_mask
from lpcam.runtime.errors import DataError, LpcamError
from lpcam.runtime.files import write_bytes, write_json

MethodName = Literal["CAM", "LPCAM"]
METHOD_NAMES: tuple[MethodName, MethodName] = ("CAM", "LPCAM")
KIND = "lpcam explain"
RANKING_LENGTH = 20
"""Classes whose scores are listed in the findings."""
MOST_MASK_VALUES = 254
"""Values of a mask between background (0) and ignored (255)."""


@dataclass(frozen=True, eq=False, repr=False)
class ImageMaps:
    """CAM and LPCAM of K classes on one image; a notebook shows it as a picture.

    Maps have the size at which the image was mapped, which is smaller than the image if that is
    longer than ``maximum_side``. Masks and heat maps have the size of the image.

    Example:
        >>> cam, lpcam = np.zeros((1, 2, 4), np.float32), np.ones((1, 2, 4), np.float32)
        >>> image = np.zeros((2, 4, 3), np.uint8)
        >>> maps = ImageMaps(image, ("cat",), (3,), (0.9,), cam, lpcam, 0.5, 0.3)
        >>> maps.mask().tolist()
        [[3, 3, 3, 3], [3, 3, 3, 3]]
        >>> maps.found()["classes"][0]["box"]
        [0, 0, 4, 2]
    """

    image: NDArray[np.uint8]
    """(H, W, 3) upright RGB"""
    classes: tuple[str, ...]
    mask_ids: tuple[int, ...]
    """Value of each class in a mask, 1 to 254."""
    scores: tuple[float, ...]
    """The classifier's scores, in [0, 1]."""
    cam: NDArray[np.float32]
    """(K, h, w) in [0, 1]"""
    lpcam: NDArray[np.float32]
    """(K, h, w) in [0, 1]"""
    threshold: float
    """Threshold of LPCAM masks: foreground is above it. Masks shrink when it grows."""
    cam_threshold: float
    """Threshold of CAM masks."""
    ranking: tuple[tuple[str, float], ...] = ()
    """Every class of the classifier and its score, the highest first."""
    notes: tuple[str, ...] = ()
    """Remarks for the reader, such as classes without prototypes."""
    name: str = "image"
    made_by: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_classes(
        cls,
        image: NDArray[np.uint8],
        names: Sequence[str],
        scores: NDArray[np.float64],
        chosen: Sequence[int],
        mask_ids: Sequence[int] | None = None,
        **values: Any,
    ) -> Self:
        """The maps of some classes of a classifier.

        Args:
            names, scores: names and scores of all classes, (N,).
            chosen: indices of the classes that are mapped.
            mask_ids: of all classes; None: 1, 2, ..., in the order chosen if there are too many.
            values: the other fields.

        Raises:
            DataError: if more classes are chosen than a mask can hold.
        """
        if mask_ids is None:
            if len(chosen) > MOST_MASK_VALUES:
                raise DataError(
                    f"{len(chosen)} classes were chosen, but a mask can hold {MOST_MASK_VALUES}; "
                    "raise the minimum score or name fewer labels"
                )
            few = len(names) <= MOST_MASK_VALUES
            ids = [n + 1 for n in chosen] if few else list(range(1, len(chosen) + 1))
        else:
            ids = [mask_ids[n] for n in chosen]
        return cls(
            image=image,
            classes=tuple(names[n] for n in chosen),
            mask_ids=tuple(ids),
            scores=tuple(float(scores[n]) for n in chosen),
            ranking=tuple((names[n], float(scores[n])) for n in descending(scores)),
            **values,
        )

    def __repr__(self) -> str:
        height, width = self.size
        found = ", ".join(
            f"{name} {score:.2f}" for name, score in zip(self.classes, self.scores, strict=True)
        )
        return f"ImageMaps({self.name!r}, {width} x {height} pixels: {found or 'no class'})"

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image."""
        return self.image.shape[0], self.image.shape[1]

    def plane(self, name: str | None = None, method: MethodName = "LPCAM") -> NDArray[np.float32]:
        """The map (H, W) of a class (None: of the highest score) at the size of the image."""
        return self._plane(self._place(name), method)

    def overlay(
        self,
        image: NDArray[np.uint8] | None = None,
        name: str | None = None,
        *,
        method: MethodName = "LPCAM",
        opacity: float = 0.7,
    ) -> NDArray[np.uint8]:
        """A class's map in colours over the image, uint8 (H, W, 3).

        Args:
            image: uint8 (H, W, 3) to draw on; None: the image that was mapped.
            name: name of the class; None: the class of the highest score.
        """
        base = self.image if image is None else image
        return overlay(base, self.plane(name, method), opacity=opacity)

    def mask(
        self,
        threshold: float | None = None,
        *,
        method: MethodName = "LPCAM",
        classes: Sequence[str] | None = None,
    ) -> NDArray[np.uint8]:
        """Mask values, uint8 (H, W): the best class where its map is above the threshold, else 0.

        Args:
            threshold: None: that of the method.
            classes: classes that compete for pixels; None: all that have maps.
        """
        if threshold is None:
            threshold = self.threshold if method == "LPCAM" else self.cam_threshold
        places = range(len(self.classes)) if classes is None else [self._place(n) for n in classes]
        if not places:
            return np.zeros(self.size, np.uint8)
        # As lpcam.method.seeds.seeds, one class at a time: a map of 20 megapixels takes 80 MB.
        best = torch.full(self.size, threshold)
        seed = torch.zeros(self.size, dtype=torch.uint8)  # at most 254 classes
        for number, place in enumerate(places, start=1):
            plane = torch.from_numpy(self._plane(place, method))
            seed[plane > best] = number
            best = torch.maximum(best, plane)
        table = ClassTable(
            tuple(self.classes[p] for p in places), tuple(self.mask_ids[p] for p in places)
        )
        return to_mask(seed, np.arange(len(places)), table)

    def found(self, threshold: float | None = None) -> dict[str, Any]:
        """Classes, scores, areas and boxes of the LPCAM mask, and provenance, as JSON.

        ``area`` is the share of the image's pixels. ``box`` is [left, top, right, bottom] in pixels
        from the upper left corner, the last two exclusive, or None if there is no pixel.
        """
        return self._found(self.mask(threshold), threshold)

    def _found(self, mask: NDArray[np.uint8], threshold: float | None) -> dict[str, Any]:
        return {
            "format": 1,
            "kind": KIND,
            "image": self.name,
            "width": self.size[1],
            "height": self.size[0],
            "mapped_width": self.cam.shape[2],
            "mapped_height": self.cam.shape[1],
            "threshold": self.threshold if threshold is None else threshold,
            "classes": [
                {
                    "name": name,
                    "score": round(score, 6),
                    "mask_value": value,
                    "area": round(float((mask == value).mean()), 6),
                    "box": _box(mask == value),
                }
                for name, value, score in zip(self.classes, self.mask_ids, self.scores, strict=True)
            ],
            "highest_scores": [
                {"name": name, "score": round(score, 6)}
                for name, score in self.ranking[:RANKING_LENGTH]
            ],
            "notes": list(self.notes),
            "made_by": self.made_by,
        }

    def sheet_rows(self, *, long_side: int | None = None) -> list[SheetRow]:
        """Rows of a sheet, one for each class (one without a class), at most ``long_side`` long."""
        mask, size = self.mask(), self.size
        if long_side is not None and max(size) > long_side:
            size = scaled_size(*size, long_side / max(size))
            # nearest pixel: mask values cannot be averaged
            shrunk = Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST)
            mask = np.array(shrunk)
        image = self.image if size == self.size else resize_image(self.image, size)
        if not self.classes:
            nothing = np.zeros(size, np.float32)
            return [SheetRow(image, "no class", nothing, nothing, mask, None)]
        cams, lpcams = (resize_maps(m, size, antialias=True) for m in (self.cam, self.lpcam))
        return [
            SheetRow(image, f"{name} {score:.2f}", cam, lpcam, mask, None)
            for name, score, cam, lpcam in zip(self.classes, self.scores, cams, lpcams, strict=True)
        ]

    def plot(self) -> Figure:
        """Image, CAM, LPCAM and mask of each class as a matplotlib figure (extra ``plot``)."""
        try:
            from matplotlib import pyplot as plt  # noqa: PLC0415 - an extra
        except ImportError:
            raise LpcamError(
                "plot needs matplotlib; install it with pip install 'lpcam[plot]'"
            ) from None
        rows = self.sheet_rows()
        figure, axes = plt.subplots(
            len(rows), 4, figsize=(12, 3.2 * len(rows)), squeeze=False, layout="constrained"
        )
        for axis, title in zip(axes[0], ("image", "CAM", "LPCAM", "mask"), strict=True):
            axis.set_title(title)
        for row, line in zip(rows, axes, strict=True):
            heat = (overlay(row.image, row.cam), overlay(row.image, row.lpcam))
            pictures = (row.image, *heat, overlay_mask(row.image, row.seed))
            for axis, picture in zip(line, pictures, strict=True):
                axis.imshow(picture)
                axis.set_xticks([])
                axis.set_yticks([])
            line[0].set_ylabel(row.name.replace("$", r"\$"))  # a dollar sign begins a formula
        return figure

    def _repr_png_(self) -> bytes:
        return sheet(self.sheet_rows(long_side=2 * CELL), mask_title="mask")

    def _repr_html_(self) -> str:
        picture = base64.b64encode(self._repr_png_()).decode()
        text = html.escape(repr(self).removeprefix("ImageMaps(").removesuffix(")"))
        notes = "".join(f"<br>{html.escape(note)}" for note in self.notes)
        return (
            f'<div><img alt="image, CAM, LPCAM and mask: {text}" '
            f'src="data:image/png;base64,{picture}"><p>{text}{notes}</p></div>'
        )

    def save(self, folder: Path | str, name: str | None = None) -> dict[str, Any]:
        """Write heat maps, overlays, mask and findings below a folder; each file atomically.

        ``masks/NAME.png`` has the VOC palette. ``heatmaps/NAME.CLASS.cam.png`` and ``.lpcam.png``
        are 8-bit grey, round(255 * map). ``overlays/`` has the maps and ``NAME.mask.png`` over the
        image, at the size at which it was mapped. ``found/NAME.json`` holds :meth:`found` and the
        names of these files.

        Args:
            name: relative path without extension; None: the image's name.

        Returns:
            the contents of the JSON file.
        """
        folder, name = Path(folder), self.name if name is None else name
        mask = self.mask()
        picture = resize_image(self.image, self.cam.shape[1:])
        files = {"mask": f"masks/{name}.png", "mask_overlay": f"overlays/{name}.mask.png"}
        write_mask(folder / files["mask"], mask)
        shown = resize_image(overlay_mask(self.image, mask), picture.shape[:2])
        write_bytes(folder / files["mask_overlay"], png_bytes(shown))
        found = self._found(mask, None)
        for place, part in enumerate(file_parts(self.classes)):
            own = {}
            for method in METHOD_NAMES:
                end = f"{name}.{part}.{method.lower()}.png"
                heat = np.rint(255 * self._plane(place, method).clip(0, 1)).astype(np.uint8)
                drawn = overlay(picture, self._maps(method)[place])
                for kind, values in (("heatmap", heat), ("overlay", drawn)):
                    own[f"{method.lower()}_{kind}"] = f"{kind}s/{end}"
                    write_bytes(folder / f"{kind}s/{end}", png_bytes(values))
            found["classes"][place]["files"] = own
        found["files"] = files
        write_json(folder / "found" / f"{name}.json", found)  # last: the others are complete
        return found

    def _maps(self, method: MethodName) -> NDArray[np.float32]:
        if method not in METHOD_NAMES:
            raise DataError(f"unknown method {method!r}; choose one of {', '.join(METHOD_NAMES)}")
        return self.cam if method == "CAM" else self.lpcam

    def _plane(self, place: int, method: MethodName) -> NDArray[np.float32]:
        """One map at the size of the image, enlarged as a run enlarges its maps."""
        plane: NDArray[np.float32]
        (plane,) = resize_maps(self._maps(method)[place : place + 1], self.size)
        return plane

    def _place(self, name: str | None) -> int:
        if not self.classes:
            raise DataError(
                f"no class was found in {self.name!r}, so there is no map to draw; lower the "
                "minimum score, ask for at least one class or give labels"
            )
        if name is None:
            return int(np.argmax(self.scores))
        if name not in self.classes:
            raise DataError(
                f"{self.name!r} has no map of {name!r}; it has maps of {', '.join(self.classes)}"
            )
        return self.classes.index(name)


def descending(scores: NDArray[np.float64]) -> list[int]:
    """Indices of scores from the highest to the lowest; of equal ones the first comes first.

    Example:
        >>> descending(np.array([0.1, 0.9, 0.1]))
        [1, 0, 2]
    """
    order: list[int] = np.argsort(-scores, kind="stable").tolist()
    return order


def _box(where: NDArray[np.bool_]) -> list[int] | None:
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    if not len(rows):
        return None
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def resize_maps(
    maps: NDArray[np.float32], size: tuple[int, int], *, antialias: bool = False
) -> NDArray[np.float32]:
    """Maps (K, h, w) at another size (height, width), bilinear.

    Args:
        antialias: for pictures: average over the pixels that one smaller pixel replaces.

    Example:
        >>> resize_maps(np.ones((2, 4, 4), np.float32), (6, 3)).shape
        (2, 6, 3)
    """
    if maps.shape[1:] == size or not len(maps):
        return maps
    resized: NDArray[np.float32] = F.interpolate(
        torch.from_numpy(maps)[None],
        size,
        mode="bilinear",
        align_corners=False,
        antialias=antialias,
    )[0].numpy()
    return resized


def file_parts(classes: Sequence[str]) -> list[str]:
    """Class names as parts of file names: without dots, and all different.

    Example:
        >>> file_parts(["cow", "a/b", "a.b"])
        ['cow', 'a-b', 'a-b-2']
    """
    parts: list[str] = []
    for name in classes:
        part = re.sub(r"[^\w-]+", "-", name).strip("-")[:40] or "class"
        wanted, number = part, 1
        while part.casefold() in {other.casefold() for other in parts}:
            number += 1
            part = f"{wanted}-{number}"
        parts.append(part)
    return parts
