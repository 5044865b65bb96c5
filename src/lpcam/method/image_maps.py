"""The maps of one image: masks, pictures, findings, and files of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lpcam.classifiers.features import FeaturePair
from lpcam.data.drawing import CELL, SheetRow, overlay, overlay_mask, sheet
from lpcam.data.images import png_bytes, resize_image
from lpcam.data.masks import write_mask
from lpcam.data.resize import resize, scaled_size
from lpcam.method.early import EarlyPrototypes
from lpcam.method.functional import GRID, cosine_activation, strided
from lpcam.method.multi_scale import cam_maps, lpcam_maps
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import DataError, import_extra
from lpcam.runtime.files import write_bytes, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MethodName = Literal["CAM", "LPCAM"]
METHOD_NAMES: tuple[MethodName, MethodName] = ("CAM", "LPCAM")
Scoring = Literal["sigmoid", "softmax"]
KIND = "lpcam explain"
RANKING_LENGTH = 20  #: Classes whose scores are listed in the findings.
MOST_MASK_VALUES = 254  #: Values of a mask between background (0) and ignored (255).
CLASSES_TOGETHER = 4
"""Classes whose maps are computed in one step; more are faster and need more memory."""


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

    image: NDArray[np.uint8]  #: (H, W, 3) upright RGB
    classes: tuple[str, ...]
    mask_ids: tuple[int, ...]  #: Value of each class in a mask, 1 to 254.
    scores: tuple[float, ...]  #: The classifier's scores, in [0, 1].
    cam: NDArray[np.float32]  #: (K, h, w) in [0, 1]
    lpcam: NDArray[np.float32]  #: (K, h, w) in [0, 1]; LPCAM-E where early layers are used.
    threshold: float
    """Threshold of LPCAM masks: foreground is above it. Masks shrink when it grows."""
    cam_threshold: float  #: Threshold of CAM masks.
    ranking: tuple[tuple[str, float], ...] = ()
    """Every class of the classifier and its score, the highest first."""
    notes: tuple[str, ...] = ()  #: Remarks for the reader, such as classes without prototypes.
    name: str = "image"
    made_by: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, tuple[tuple[str, ...], NDArray[np.uint8]]] = field(default_factory=dict)
    """For each class whose prototypes have names, these and which is nearest where, (h, w)."""

    @classmethod
    def of_features(
        cls,
        pairs: Sequence[FeaturePair],
        size: tuple[int, int],
        chosen: Sequence[int],
        weight: Tensor,
        vectors: Tensor,
        names: Sequence[str],
        scores: NDArray[np.float64],
        settings: LpcamSettings,
        mask_ids: Sequence[int] | None = None,
        early: EarlyPrototypes | None = None,
        layers: Sequence[FeaturePair] = (),
        parts: Mapping[int, Mapping[str, Tensor]] | None = None,
        **values: Any,
    ) -> Self:
        """The maps of the ``chosen`` of all classes from features of one image of a size (h, w).

        ``parts`` are the :meth:`Prototypes.parts` of the classes that have some.
        """
        # NumPy arrays, because inference tensors cannot be used everywhere.
        cam, lpcam = (np.zeros((len(chosen), *size), np.float32) for _ in METHOD_NAMES)
        for start in range(0, len(chosen), CLASSES_TOGETHER):
            part = list(chosen[start : start + CLASSES_TOGETHER])
            to = slice(start, start + len(part))
            base = cam_maps(pairs, weight[part], size, epsilon=settings.cam_epsilon).high_res
            cam[to] = base.float().cpu()
            if early is None or early.base == "LPCAM":
                base = lpcam_maps(pairs, vectors[part], size).high_res
            found = base if early is None else early.maps(base, layers, part)
            lpcam[to] = found.float().cpu()
        from_cam = early is not None and early.base == "CAM"
        empty = [names[n] for n in chosen if not from_cam and not bool(vectors[n].any())]
        return cls(
            classes=tuple(names[n] for n in chosen),
            mask_ids=_mask_ids(len(names), chosen, mask_ids),
            scores=tuple(float(scores[n]) for n in chosen),
            cam=cam,
            lpcam=lpcam,
            ranking=tuple((names[n], float(scores[n])) for n in descending(scores)),
            notes=tuple(f"{name} has no prototypes, so its LPCAM is empty" for name in empty),
            parts={
                names[n]: (tuple(own), _nearest(pairs, own, size))
                for n, own in (parts or {}).items()
                if n in chosen
            },
            **{"threshold": settings.threshold, "cam_threshold": settings.cam_threshold, **values},
        )

    def __repr__(self) -> str:
        height, width = self.size
        found = ", ".join(f"{n} {s:.2f}" for n, s in zip(self.classes, self.scores, strict=True))
        return f"ImageMaps({self.name!r}, {width} x {height} pixels: {found or 'no class'})"

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image."""
        return self.image.shape[0], self.image.shape[1]

    def overlay(
        self, name: str | None = None, *, method: MethodName = "LPCAM", opacity: float = 0.7
    ) -> NDArray[np.uint8]:
        """The map of a class (None: of the highest score) in colours over the image, (H, W, 3)."""
        return overlay(self.image, self._plane(self._place(name), method), opacity=opacity)

    def mask(
        self,
        threshold: float | None = None,
        *,
        method: MethodName = "LPCAM",
        classes: Sequence[str] | None = None,
    ) -> NDArray[np.uint8]:
        """Mask values, uint8 (H, W): the best class where its map is above the threshold, else 0.

        The threshold is that of the method if none is given. Only the given ``classes`` compete.
        """
        if threshold is None:
            threshold = self.threshold if method == "LPCAM" else self.cam_threshold
        places = range(len(self.classes)) if classes is None else [self._place(n) for n in classes]
        # As lpcam.method.seeds.seeds, one class at a time: a map of 20 megapixels takes 80 MB.
        best = np.full(self.size, threshold, np.float32)
        mask = np.zeros(self.size, np.uint8)
        for place in places:
            plane = self._plane(place, method)
            mask[plane > best] = self.mask_ids[place]
            np.maximum(best, plane, out=best)
        return mask

    def shares(self, name: str) -> dict[str, float]:
        """Share of each named part in the LPCAM map of a class above the threshold, the sum is 1.

        It is empty for a class without named prototypes, or whose map is nowhere above it.
        """
        names, nearest = self.parts.get(name, ((), None))
        plane = self.lpcam[self._place(name)]
        plane = np.where(plane > self.threshold, plane, 0)
        whole = float(plane.sum())
        found = {part: float(plane[nearest == k].sum()) for k, part in enumerate(names) if whole}
        return {part: value / whole for part, value in found.items()}

    def part_mask(self, name: str) -> NDArray[np.uint8]:
        """Parts in the mask of a class, uint8 (H, W): 1, 2, ... in the order of its names."""
        _, nearest = self.parts[name]
        placed = resize_mask(nearest + 1, self.size)
        return np.where(self.mask() == self.mask_ids[self._place(name)], placed, 0)

    def found(self) -> dict[str, Any]:
        """Classes, scores, areas and boxes of the LPCAM mask, and provenance, as JSON.

        ``area`` is the share of the image's pixels. ``box`` is [left, top, right, bottom] in pixels
        from the upper left corner, the last two exclusive, or None if there is no pixel.
        """
        mask, classes = self.mask(), []
        for name, value, score in zip(self.classes, self.mask_ids, self.scores, strict=True):
            box = Image.fromarray(mask == value).getbbox()
            found = {"name": name, "score": round(score, 6), "mask_value": value}
            found["area"] = round(float((mask == value).mean()), 6)
            if shares := self.shares(name):
                found["parts"] = {part: round(share, 4) for part, share in shares.items()}
            classes.append({**found, "box": box and list(box)})
        return {
            "format": 1,
            "kind": KIND,
            "image": self.name,
            "width": self.size[1],
            "height": self.size[0],
            "mapped_width": self.cam.shape[2],
            "mapped_height": self.cam.shape[1],
            "threshold": self.threshold,
            "classes": classes,
            "highest_scores": [
                {"name": name, "score": round(score, 6)}
                for name, score in self.ranking[:RANKING_LENGTH]
            ],
            "notes": list(self.notes),
            "made_by": self.made_by,
        }

    def sheet_rows(self, *, long_side: int | None = None) -> list[SheetRow]:
        """Rows of a sheet, one for each class (or one for none), at most ``long_side`` long."""
        mask, size, image = self.mask(), self.size, self.image
        if long_side is not None and max(size) > long_side:
            size = scaled_size(*size, long_side / max(size))
            image = resize_image(image, size)
            mask = resize_mask(mask, size)
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
        plt = import_extra("matplotlib.pyplot", "plot", "plot needs matplotlib")
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
                axis.set(xticks=[], yticks=[])
            line[0].set_ylabel(row.name.replace("$", r"\$"))  # a dollar sign begins a formula
        return cast("Figure", figure)

    def _repr_png_(self) -> bytes:
        return sheet(self.sheet_rows(long_side=2 * CELL), mask_title="mask")

    def save(self, folder: Path | str) -> dict[str, Any]:
        """Write heat maps, overlays, mask and findings below a folder; returns the findings.

        ``masks/NAME.png`` has the VOC palette. ``heatmaps/NAME.CLASS.cam.png`` and ``.lpcam.png``
        are 8-bit grey, round(255 * map). ``overlays/`` has the maps and ``NAME.mask.png`` over the
        image, at the size at which it was mapped. ``parts/NAME.CLASS.png`` has the values of
        :meth:`part_mask` where prototypes have names. ``found/NAME.json`` names these files.
        """
        folder, name, mask, found = Path(folder), self.name, self.mask(), self.found()
        size = self.cam.shape[1:]
        picture = resize_image(self.image, size)
        files = {"mask": f"masks/{name}.png", "mask_overlay": f"overlays/{name}.mask.png"}
        write_mask(folder / files["mask"], mask)
        shown = resize_image(overlay_mask(self.image, mask), size)
        write_bytes(folder / files["mask_overlay"], png_bytes(shown))
        for place, part in enumerate(file_parts(self.classes)):
            own = found["classes"][place]["files"] = {}
            for method in METHOD_NAMES:
                end = f"{name}.{part}.{method.lower()}.png"
                heat = np.rint(255 * self._plane(place, method).clip(0, 1)).astype(np.uint8)
                drawn = overlay(picture, self._maps(method)[place])
                for kind, values in (("heatmap", heat), ("overlay", drawn)):
                    own[f"{method.lower()}_{kind}"] = f"{kind}s/{end}"
                    write_bytes(folder / f"{kind}s/{end}", png_bytes(values))
            if self.classes[place] in self.parts:
                own["part_mask"] = f"parts/{name}.{part}.png"
                write_mask(folder / own["part_mask"], self.part_mask(self.classes[place]))
        found["files"] = files
        write_json(folder / "found" / f"{name}.json", found)  # last: the others are complete
        return found

    def _maps(self, method: MethodName) -> NDArray[np.float32]:
        if method not in METHOD_NAMES:
            raise DataError(f"unknown method {method!r}; choose one of {', '.join(METHOD_NAMES)}")
        return self.cam if method == "CAM" else self.lpcam

    def _plane(self, place: int, method: MethodName) -> NDArray[np.float32]:
        """One map at the size of the image, enlarged as a run enlarges its maps."""
        (plane,) = resize_maps(self._maps(method)[place : place + 1], self.size)
        return np.asarray(plane)

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


def _nearest(
    pairs: Sequence[FeaturePair], parts: Mapping[str, Tensor], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """The number of the part whose best cosine, summed over scales, is the largest, (h, w)."""
    rows, counts = torch.cat(list(parts.values())), [len(one) for one in parts.values()]
    height, width = (strided(side, GRID) * GRID for side in size)  # as fuse_scales
    total = torch.zeros(len(counts), height, width)
    for pair in pairs:
        cosines = cosine_activation(pair.features, rows.to(pair.features), pair.mirrored)
        best = [one.amax(-3) for one in torch.split(cosines, counts, dim=-3)]
        planes = torch.cat(best).reshape(len(best), *best[0].shape[-2:])
        total += resize(planes, (height, width)).cpu()
    return np.asarray(total[:, : size[0], : size[1]].argmax(0).byte())


def _mask_ids(count: int, chosen: Sequence[int], given: Sequence[int] | None) -> tuple[int, ...]:
    """Mask values of the chosen of ``count`` classes: 1, 2, ... in the order chosen if too many."""
    if given is not None:
        return tuple(given[n] for n in chosen)
    if len(chosen) > MOST_MASK_VALUES:
        raise DataError(
            f"{len(chosen)} classes were chosen, but a mask can hold {MOST_MASK_VALUES}; raise the "
            "minimum score or name fewer labels"
        )
    return tuple(n + 1 for n in (chosen if count <= MOST_MASK_VALUES else range(len(chosen))))


def class_scores(logits: Tensor, scoring: Scoring) -> NDArray[np.float64]:
    """Scores (N,) in [0, 1] of one image from its logits (N,)."""
    logits = logits.double().cpu()
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(0)
    return np.asarray(scores)


def descending(scores: NDArray[np.float64]) -> list[int]:
    """Indices of scores from the highest to the lowest; of equal ones the first comes first."""
    return list(np.argsort(-scores, kind="stable").tolist())


def resize_maps(
    maps: NDArray[np.float32], size: tuple[int, int], *, antialias: bool = False
) -> NDArray[np.float32]:
    """Maps (K, h, w) at another size (height, width), bilinear; smooth if shrunk with antialias."""
    if maps.shape[1:] == size or not len(maps):
        return maps
    how: dict[str, Any] = {"mode": "bilinear", "align_corners": False, "antialias": antialias}
    return np.asarray(F.interpolate(torch.from_numpy(maps)[None], size, **how)[0])


def resize_mask(mask: NDArray[Any], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A mask of values below 256 at another size (height, width), to the nearest pixel."""
    image = Image.fromarray(mask.astype(np.uint8))
    return np.array(image.resize(size[::-1], Image.Resampling.NEAREST))


def file_parts(classes: Sequence[str]) -> list[str]:
    """Class names as parts of file names: without dots, and all different."""
    parts: list[str] = []
    for name in classes:
        part = wanted = re.sub(r"[^\w-]+", "-", name).strip("-")[:40] or "class"
        number = 1
        while part.casefold() in map(str.casefold, parts):
            number += 1
            part = f"{wanted}-{number}"
        parts.append(part)
    return parts
