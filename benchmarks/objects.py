"""Boxes of objects that touch: AP50 on drawings of herds, whose creatures are known.

    python -m benchmarks.objects [--seeds 0 1 2] [--images N] [--every N] [--folder FOLDER]

Each seed draws two sets: herds (two or three creatures of one class that touch) and the ordinary
drawings of ``lpcam demo``. On each the recipe of the demo is run, from image labels alone, and its
maps are cut at the thresholds that the run chose. FOLDER keeps the runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou

from benchmarks.measure import parser, table, verdict
from lpcam.data import creatures
from lpcam.data.map_files import map_path, read_maps
from lpcam.data.masks import read_index_mask
from lpcam.method.objects import Box, boxes, instances
from lpcam.pipeline.recipe import load_recipe
from lpcam.pipeline.run import run
from lpcam.pipeline.run_folder import RunFolder

HERD_SIZE, SIZE = 192, 128  # pixels; a herd of three creatures is wider than one
IOU = 0.5
Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """A label of an image."""

    label: int
    labels: int  #: Number of labels of the image.
    cam: Plane  #: The map where it is the highest and above the threshold, else 0.
    lpcam: Plane
    evidence: Plane
    truth: list[Box]


def drawn(
    folder: Path, seed: int, *, herds: bool, images: int, size: int, threads: int
) -> RunFolder:
    """A finished run on drawings, made unless it is there."""
    data = folder / "data"
    if not (data / "labels.csv").is_file():
        creatures.write(data, images=images, size=size, seed=seed, herds=herds)
    changes = {"data.root": str(data), "run.folder": str(folder), "run.threads": threads}
    run(load_recipe("demo", changes), command="python -m benchmarks.objects")
    return RunFolder(folder)


def pairs_of(of_run: RunFolder, herds: bool, every: int = 1) -> Iterator[Pair]:
    """Maps and true boxes of every label of every so many-th image."""
    explainer, maps = of_run.explainer(device="cpu"), of_run.maps("lpcam_e")
    data = of_run / "data"
    for name in maps.ids[::every]:
        file = f"{Path(name).stem}.png"
        found = read_maps(map_path(maps.folder, name))
        cams = read_maps(map_path(of_run / "cam", name)).high_res
        settings = explainer.settings
        names = [maps.classes.names[key] for key in found.keys]
        evidence = [explainer.discriminative(data / "images" / file, name) for name in names]
        classes = read_index_mask(data / "masks" / file)
        # the ordinary drawings have one creature of a class
        numbers = read_index_mask(data / "instances" / file) if herds else classes
        lpcams = seeds(found.high_res, settings.threshold)
        cams = seeds(cams, settings.cam_threshold)
        for place, key in enumerate(found.keys.tolist()):
            own = np.where(classes == maps.classes.mask_ids[key], numbers, 0)
            truth = [box for n in np.unique(own[own > 0]) for box in around(own == n)]
            yield Pair(key, len(names), cams[place], lpcams[place], evidence[place], truth)


def seeds(maps: Plane, threshold: float) -> Plane:
    """Maps (K, H, W) where they are the highest of the image and above a threshold, else 0."""
    highest = maps.argmax(0) == np.arange(len(maps))[:, None, None]
    return np.where(highest & (maps > threshold), maps, 0)


# -- Methods -----------------------------------------------------------------------------------


def around(mask: NDArray[np.bool_]) -> list[Box]:
    """One box around all pixels."""
    y, x = np.nonzero(mask)
    if not len(y):
        return []
    corners = int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1
    return [Box(*corners, 1.0, len(y))]


METHODS: dict[str, Callable[[Pair], list[Box]]] = {
    "whole image": lambda pair: around(np.ones(pair.cam.shape, dtype=bool)),
    "CAM, components": lambda pair: boxes(pair.cam),
    "LPCAM-E, one box": lambda pair: around(pair.lpcam > 0),
    "LPCAM-E, components": lambda pair: boxes(pair.lpcam),
    "LPCAM-E, separated by the map itself": lambda pair: [
        one.box for one in instances(pair.lpcam, 0.0)
    ],
    "LPCAM-E, separated": lambda pair: [
        one.box for one in instances(pair.lpcam, 0.0, evidence=pair.evidence)
    ],
}
BASE, OURS = "LPCAM-E, components", "LPCAM-E, separated"


# -- Measure -----------------------------------------------------------------------------------


def average_precision(
    found: Sequence[tuple[Sequence[Box], Sequence[Box]]], iou: float = IOU
) -> float:
    """Average precision of boxes, a fraction: the area below the precision's upper envelope.

    ``found`` holds boxes and true boxes of each pair. Boxes are ranked over all pairs by the area
    of their objects, the largest first; those of equal area count together. A box is right if its
    IoU with the nearest true box that no earlier box of the pair has found is at least ``iou``.
    """
    ranks: list[tuple[int, bool]] = []
    for given, truth in found:
        free = list(truth)
        for box in sorted(given, key=lambda box: -box.area):
            ious = box_iou(_corners([box]), _corners(free))[0].tolist()
            right = bool(ious) and max(ious) >= iou
            if right:
                free.pop(ious.index(max(ious)))
            ranks.append((box.area, right))
    if not ranks:
        return 0.0
    ranks.sort(key=lambda rank: -rank[0])
    areas, right_ones = (np.array(column) for column in zip(*ranks, strict=True))
    hits = right_ones.cumsum()
    last = np.append(areas[1:] != areas[:-1], True)  # of boxes of equal area
    recall = (hits / sum(len(truth) for _, truth in found))[last]
    precision = (hits / np.arange(1, len(hits) + 1))[last]
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * envelope).sum())


def _corners(found: Sequence[Box]) -> torch.Tensor:
    rows = [(box.x0, box.y0, box.x1, box.y1) for box in found]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def mean_ap(pairs: Sequence[Pair], method: Callable[[Pair], list[Box]]) -> float:
    """Mean of the average precision over the classes, in percent."""
    found = [(pair.label, method(pair), pair.truth) for pair in pairs]
    classes = sorted({label for label, _, truth in found if truth})
    return 100 * float(
        np.mean([average_precision([(g, t) for n, g, t in found if n == c]) for c in classes])
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    arguments = parser("objects", __doc__)
    arguments.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the drawings"
    )
    arguments.add_argument("--images", type=int, default=400, help="images of each set")
    arguments.add_argument("--every", type=int, default=1, help="score every so many-th image")
    arguments.add_argument("--folder", type=Path, help="keep the runs here")
    options = arguments.parse_args(argv)
    images = 24 if options.quick else options.images
    columns: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as temporary:
        for seed in options.seeds[: 1 if options.quick else None]:
            for herds in (True, False):
                kind = "herds" if herds else "ordinary"
                size = HERD_SIZE if herds else SIZE
                done = drawn(
                    (options.folder or Path(temporary)) / f"{kind}-{seed}",
                    seed,
                    herds=herds,
                    images=images,
                    size=size // 2 if options.quick else size,
                    threads=options.threads[0],
                )
                pairs = [pair for pair in pairs_of(done, herds, options.every) if pair.truth]
                chosen = {f"{kind}, seed {seed}": pairs}
                if not herds:
                    single = [pair for pair in pairs if pair.labels == 1]
                    chosen[f"ordinary, one creature, seed {seed}"] = single
                for title, part in chosen.items():
                    columns[title] = {name: mean_ap(part, of) for name, of in METHODS.items()}
    print("## Objects\n")
    print(
        f"AP50 of boxes in percent, mean over the classes. Drawings of creatures, {images} images "
        f"of each set: herds of two or three touching creatures of one class ({HERD_SIZE} x "
        f"{HERD_SIZE} pixels) and the drawings of `lpcam demo` ({SIZE} x {SIZE}), of which three "
        "in five show one creature, the others two of different classes. A run of the demo's "
        f"recipe on each set, from image labels alone; its maps of these images (one in "
        f"{options.every}), cut at its automatic thresholds, each class where its map is the "
        "highest. Boxes are ranked by the area of their objects; the truth are the tightest "
        "boxes of what is visible of each creature. Constants of the separation were chosen on "
        "seeds 0 and 1.\n"
    )
    rows = [[name, *(f"{column[name]:.1f}" for column in columns.values())] for name in METHODS]
    goals = [
        verdict(column[OURS] - column[BASE], at_least=5 if title.startswith("herds") else -1)
        for title, column in columns.items()
    ]
    print(table(["boxes", *columns], [*rows, ["separated minus components", *goals]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
