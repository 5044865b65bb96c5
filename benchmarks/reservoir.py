"""What the size of the reservoir costs: seed mIoU and seconds of the fit, on real photographs.

    python benchmarks/reservoir.py --data VOC_FOLDER --run RUN_FOLDER

RUN_FOLDER is a finished run of recipe voc_animals; its classifier is used. The backbone passes over
every image once, at every scale of the preset, and its features stay in memory in half precision
(about 4 GB for 437 images). Prints a markdown table with its protocol.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.classifiers.classifier import Classifier
from lpcam.classifiers.feature_store import image_pyramid
from lpcam.classifiers.features import FeaturePair
from lpcam.data.dataset import Dataset, Item
from lpcam.data.images import read_image
from lpcam.data.masks import read_index_mask
from lpcam.data.voc import read_voc
from lpcam.evaluation.segmentation import ThresholdSweep, best_threshold, scores, truth_labels
from lpcam.method.clustering import cosine_kmeans
from lpcam.method.functional import cosine_activation, normalize, strided, unflip
from lpcam.method.multi_scale import cam_maps
from lpcam.method.prototypes import make_prototypes
from lpcam.method.reservoir import Reservoir, collect
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.parallel import ordered_map

PIXEL_STEP = 4
"""Seeds are scored at every PIXEL_STEP-th pixel of every PIXEL_STEP-th row."""
OFFICIAL_STOP: dict[str, Any] = {
    name: getattr(LpcamSettings.from_preset("voc12.official"), name)
    for name in ("centers", "tolerance", "tolerance_kind", "max_iterations")
}


@dataclass
class Photograph:
    """What is kept of an image."""

    name: str
    labels: tuple[int, ...]
    plain: Tensor
    """(C, h, w) at scale 1, half precision: what is clustered."""
    summed: list[Tensor]
    """(C, h, w) a scale, image and mirror together, half precision: what is mapped."""
    cam: Tensor
    """(K, h, w) the multi-scale CAM on the feature grid, which decides the split."""
    truth: Tensor
    """int64, labels at the pixels that are scored."""
    resizes: list[tuple[Tensor, Tensor]]
    """A scale: the matrices of the bilinear resize, rows and columns, at those pixels."""


def bilinear_matrix(source: int, length: int) -> Tensor:
    """(n, source): bilinear resize to the next multiple of 16, at every PIXEL_STEP-th pixel."""
    target = strided(length, 16) * 16
    whole = F.interpolate(torch.eye(source)[None], size=target, mode="linear", align_corners=False)[
        0
    ].T
    return whole[:length:PIXEL_STEP].contiguous()


@torch.inference_mode()
def photographs(
    classifier: Classifier, dataset: Dataset, name: str, settings: LpcamSettings
) -> list[Photograph]:
    """Pass every image of a list through the backbone once."""
    folded = classifier.folded()

    @torch.inference_mode()
    def features(item: Item) -> tuple[Item, tuple[int, int], list[FeaturePair]]:
        image = read_image(item.image)
        pairs = image_pyramid(folded, image[None], settings.scales, flip=True)
        halved = [[part[0].half().float() for part in pair if part is not None] for pair in pairs]
        return item, image.shape[:2], [FeaturePair(*parts) for parts in halved]

    found = []
    items = dataset.select(name)
    for item, (height, width), pairs in ordered_map(features, items, torch.get_num_threads()):
        assert item.mask is not None, f"{item.id} has no mask; give a list with truth"
        plain = pairs[settings.scales.index(1.0)].features
        rows = classifier.weight[list(item.labels)]
        cam = cam_maps(pairs, rows, (height, width), epsilon=settings.cam_epsilon).high_res
        cam = F.interpolate(cam[None], size=plain.shape[-2:], mode=settings.split_resize)[0]
        truth = truth_labels(read_index_mask(item.mask), dataset.classes)
        found.append(
            Photograph(
                item.id,
                item.labels,
                plain.half(),
                [(p.features + unflip(p.mirrored)).half() for p in pairs],
                cam,
                truth[::PIXEL_STEP, ::PIXEL_STEP],
                [
                    (
                        bilinear_matrix(p.features.shape[-2], height),
                        bilinear_matrix(p.features.shape[-1], width),
                    )
                    for p in pairs
                ],
            )
        )
    return found


@dataclass
class Fit:
    """One way to make prototypes, and what came of it."""

    label: str
    seed: int
    vectors: Tensor
    collect_seconds: float
    cluster_seconds: float
    rows: int
    best: float = 0.0
    best_at: float = 0.0
    fixed: float = 0.0


@torch.inference_mode()
def fit(
    images: Sequence[Photograph],
    weight: Tensor,
    names: Sequence[str],
    settings: LpcamSettings,
    label: str,
    seed: int,
) -> Fit:
    """Collect, cluster and select."""
    start = time.perf_counter()
    reservoir = Reservoir(settings.max_features, seed)
    for image in images:
        collect(reservoir, image.plain, image.labels, image.cam, settings, image.name)
    middle = time.perf_counter()
    made = make_prototypes(
        reservoir, weight, names, settings, seed=seed, workers=torch.get_num_threads()
    )
    end = time.perf_counter()
    kept = int(sum(min(n, settings.max_features or n) for n in reservoir.seen.values()))
    print(f"# {label}, seed {seed}: {end - middle:.1f} s", flush=True)
    return Fit(label, seed, made.vectors(), middle - start, end - middle, kept)


@torch.inference_mode()
def score_fits(
    images: Sequence[Photograph], fits: Sequence[Fit], names: Sequence[str], threshold: float
) -> None:
    """Fill in the mIoU of the seeds of every fit, from one reading of the features."""
    sweeps = [ThresholdSweep(len(names)) for _ in fits]
    vectors = torch.stack([one.vectors for one in fits])
    for image in images:
        rows = vectors[:, list(image.labels)]
        fused = torch.zeros(())
        for features, (down, across) in zip(image.summed, image.resizes, strict=True):
            maps = cosine_activation(features.float(), rows.flatten(0, 1)).relu()
            fused = fused + down @ maps @ across.T
        fused = normalize(fused, "max").unflatten(0, rows.shape[:2])
        keys = torch.tensor(image.labels)
        for sweep, maps in zip(sweeps, fused, strict=True):
            sweep.update(image.truth, maps, keys)
    for one, sweep in zip(fits, sweeps, strict=True):
        one.best_at, best = best_threshold(sweep, names)
        one.best = 100 * best.miou
        one.fixed = 100 * scores(sweep.confusion(threshold), names).miou


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and range."""
    mean = statistics.mean(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ways(settings: LpcamSettings, sizes: Sequence[int | None]) -> dict[str, LpcamSettings]:
    """The fits that are compared."""
    found = {}
    for centers in ("unit", "mean"):
        for size in sizes:
            label = f"{centers} centres, {'all' if size is None else f'{size:,}'} features"
            changes = {"centers": centers, "max_features": size}
            found[label] = settings.model_copy(update=changes)
    for size, restarts in ((1000, 1), (2000, 1), (2000, 2), (5000, 1)):
        if size in sizes and restarts != settings.restarts:
            label = f"unit centres, {size:,} features, {restarts} clustering(s)"
            changes = {"centers": "unit", "max_features": size, "restarts": restarts}
            found[label] = settings.model_copy(update=changes)
    official = {"max_features": None, "init": "random", "restarts": 1, **OFFICIAL_STOP}
    found["official procedure"] = settings.model_copy(update=official)
    return found


@torch.inference_mode()
def released_seconds(images: Sequence[Photograph], settings: LpcamSettings) -> str:
    """What the official procedure would take in the arithmetic of kmeans_pytorch, in words.

    Its rows x K x channels products of one class would not fit in memory here, so a few thousand
    rows are timed, for one iteration, and multiplied up to the iterations that the procedure needs.
    """
    try:
        import kmeans_pytorch as package  # type: ignore[import-untyped]  # noqa: PLC0415
    except ImportError:
        return 'kmeans_pytorch is not installed: pip install "lpcam[benchmarks]"'
    reservoir = Reservoir(None, 0)
    for image in images:
        collect(reservoir, image.plain, image.labels, image.cam, settings, image.name)
    products = iterations = 0
    seconds = 0.0
    for place in reservoir.seen:
        rows = reservoir.features(*place)
        if rows is None or len(rows) < settings.clusters:
            continue
        start = time.perf_counter()
        found = cosine_kmeans(rows, settings.clusters, **OFFICIAL_STOP)
        seconds += time.perf_counter() - start
        iterations += found.iterations
        products += found.iterations * rows.numel() * settings.clusters
        first = found.centers
    part = rows[:3000].float()
    package.initialize = lambda *_: first.clone()
    package.print = lambda *_: None
    timings = []
    for _ in range(3):  # the first is the warm-up
        start = time.perf_counter()
        package.kmeans(part, len(first), distance="cosine", tol=1e30, device=torch.device("cpu"))
        timings.append(time.perf_counter() - start)
    whole = min(timings[1:]) * products / (part.numel() * len(first))
    return (
        f"The official procedure, a class and side at a time: {iterations} iterations in all, "
        f"{seconds:.1f} s in this package's arithmetic; in that of the released program "
        f"(kmeans_pytorch 0.3), extrapolated from one iteration over {len(part):,} rows "
        f"({min(timings[1:]):.2f} s): {whole:,.0f} s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of VOC2012, or above it")
    parser.add_argument("--run", type=Path, required=True, help="a finished run's folder")
    parser.add_argument("--list", default="train", help="list of images that are fitted and scored")
    parser.add_argument("--preset", default="frozen")
    parser.add_argument("--sizes", default="1000,2000,5000,20000,all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, help="only so many, to try the script")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    settings = LpcamSettings.from_preset(options.preset)
    classifier = Classifier.load(options.run / "classifier" / "classifier.safetensors").eval()
    names = tuple(classifier.classes)
    dataset = read_voc(options.data, lists=[options.list], classes=names)

    start = time.perf_counter()
    images = photographs(classifier, dataset, options.list, settings)[: options.images]
    passes = time.perf_counter() - start
    weight = classifier.weight.detach().cpu()
    seeds = [int(text) for text in options.seeds.split(",")]
    sizes = [None if text == "all" else int(text) for text in options.sizes.split(",")]
    fits = []
    for label, changed in ways(settings, sizes).items():
        # All features and one clustering leave only the first centres to chance: one seed will do
        # where a fit takes minutes.
        for seed in seeds[:1] if changed.max_features is None else seeds:
            fits.append(fit(images, weight, names, changed, label, seed))
    score_fits(images, fits, names, settings.threshold)
    report(fits, settings)
    print(f"\n{released_seconds(images, settings)}.")
    print(
        f"\nProtocol: {len(images)} images of list {options.list}, image-level labels of the "
        f"annotations, classes {', '.join(names)}; scales {settings.scales} with flip, multi-scale "
        f"CAM split at tau {settings.tau:g}; preset {options.preset} (K {settings.clusters}, "
        f"{settings.restarts} clusterings) but for what the row says; features in half precision "
        f"({passes:.0f} s of backbone passes, not in the table). mIoU over background and classes "
        f"at every {PIXEL_STEP}th pixel each way, void and other classes ignored, against the "
        f"masks; best threshold chosen on these masks from 0.00 to 0.99. Seeds {options.seeds} of "
        f"reservoir and clustering (only the first with all features); mean and range. Seconds are "
        f"wall clock on {options.threads} thread(s). The official procedure: all features, mean "
        f"centres, one clustering, random first centres, stop at (sum of shifts)^2 < 5, at most "
        f"100 iterations, in this package's arithmetic. Python {platform.python_version()}, torch "
        f"{torch.__version__}, numpy {np.__version__}."
    )
    return 0


def report(fits: Sequence[Fit], settings: LpcamSettings) -> None:
    """Print the table."""
    print(
        "| fit | features | mIoU, best threshold | at | "
        f"mIoU at {settings.threshold:g} | collect s | cluster s | official ÷ this |"
    )
    print("|---|---|---|---|---|---|---|---|")
    slow = [one.cluster_seconds for one in fits if one.label == "official procedure"]
    for label in dict.fromkeys(one.label for one in fits):
        same = [one for one in fits if one.label == label]
        seconds = statistics.median(one.cluster_seconds for one in same)
        print(
            f"| {label} | {same[0].rows:,} | {spread([one.best for one in same], 1)} | "
            f"{', '.join(f'{one.best_at:.2f}' for one in same)} | "
            f"{spread([one.fixed for one in same], 1)} | "
            f"{statistics.median(one.collect_seconds for one in same):.1f} | "
            f"{seconds:.2f} | {slow[0] / seconds:.0f} |"
        )


if __name__ == "__main__":
    raise SystemExit(main())
