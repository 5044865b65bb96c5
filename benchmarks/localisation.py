"""Where the object is and what the classifier looks at: CAM and LPCAM beside their relatives.

    python -m benchmarks.localisation --data VOC_FOLDER --run RUN_FOLDER [--images N]

One frozen classifier, the same feature map, images at their own size, one scale for every method:
CAM, LPCAM, and GradCAM, GradCAM++ and LayerCAM of pytorch-grad-cam; apart from them CAM and LPCAM
over the preset's scales with flip. Each method maps the labels of an image alone. RUN_FOLDER is a
finished run of recipe voc_animals, whose classifier and prototypes are used; without it a linear
probe on the backbone of --weights and its prototypes are fitted on the images that are scored.
Without --data small creatures are drawn and no figure means anything.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.faithfulness_measures import deletion, insertion
from benchmarks.fit_against_training import fit
from benchmarks.localisation_measures import (
    BoxAccuracy,
    PixelAveragePrecision,
    class_truth,
    truth_boxes,
)
from benchmarks.measure import (
    MISSING,
    Spread,
    in_process,
    interleaved,
    parser,
    show_number,
    table,
)
from benchmarks.peers import PACKAGE, peer_maps
from benchmarks.photographs import RECIPE, classifier
from lpcam.classifiers.classifier import Classifier
from lpcam.classifiers.features import FeaturePair, tensor_pyramid
from lpcam.classifiers.linear import ProbeSettings, fit_head
from lpcam.classifiers.probe import multi_hot
from lpcam.data.creatures import write as draw_creatures
from lpcam.data.dataset import ClassTable, Dataset, Item
from lpcam.data.folder import read_folder
from lpcam.data.images import read_image
from lpcam.data.masks import read_index_mask
from lpcam.data.resize import scaled_size
from lpcam.data.voc import read_voc
from lpcam.evaluation.segmentation import (
    DEFAULT_THRESHOLDS,
    ThresholdSweep,
    best_threshold,
    scores,
    truth_labels,
)
from lpcam.method.multi_scale import cam_maps, lpcam_maps
from lpcam.method.settings import LpcamSettings
from lpcam.pipeline.recipe import load_recipe
from lpcam.pipeline.run_folder import RunFolder

LIST = "train"
PEERS = ("GradCAM", "GradCAM++", "LayerCAM")
BOX_THRESHOLDS = tuple(step / 20 for step in range(20))
PIXEL_STEP = 2
"""mIoU and PxAP count every so many-th pixel of every so many-th row."""
FAITHFUL = 12
"""Images of insertion and deletion, evenly spread; the first label of each."""
SIDE = 224
"""Their long side in pixels."""
STEPS = 20
TIMED = 6
"""Images that are timed, evenly spread."""
PRESET = "frozen"
EXTRA = "pip install 'lpcam[peers]'"


# -- Data and classifier -----------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What is compared on what."""

    items: list[Item]
    classes: ClassTable
    classifier: Classifier
    """Folded: the same features in less time, for every method."""
    vectors: Tensor
    settings: LpcamSettings
    described: str


@contextmanager
def subject(
    data: str | None, weights: str | None, run: str | None, count: int | None, device: str
) -> Iterator[Subject]:
    """Images with masks, a classifier and LPCAM's vectors."""
    with TemporaryDirectory() as folder:
        if run is not None and data is not None:
            explainer = RunFolder(run).explainer(device=device)
            dataset = read_voc(Path(data), lists=[LIST], classes=explainer.classes)
            yield Subject(
                _with_masks(dataset, LIST, count),
                dataset.classes,
                explainer.classifier,
                explainer.vectors,
                explainer.settings,
                "classifier and prototypes of the given run",
            )
            return
        settings = LpcamSettings.from_preset(PRESET).model_copy(
            update={"split_maps": "single_scale"}
        )
        if data is not None:
            names = load_recipe(RECIPE).data.classes
            dataset = read_voc(Path(data), lists=[LIST], classes=names)
            items = _with_masks(dataset, LIST, count)
        else:
            draw_creatures(Path(folder), images=count or 12, size=96, seed=0)
            dataset = read_folder(Path(folder))
            items = [item for item in dataset.items.values() if item.labels and item.mask]
            shown = {index for item in items for index in item.labels}
            dataset, items = _only(dataset, items, sorted(shown))
            settings = settings.model_copy(
                update={"clusters": 3, "restarts": 1, "max_features": 100, "scales": (1.0, 0.5)}
            )
        names = dataset.classes.names
        model = classifier(weights, names, quick=data is None).to(device)
        twin = model.folded()
        weight = _probe(twin, items).to(device)
        for one in (model, twin):
            one.head.weight.data.copy_(weight)
        vectors = fit(model, items, settings, passing=twin).vectors().to(weight)
        what = "linear probe and prototypes, both fitted on these images"
        yield Subject(items, dataset.classes, twin, vectors, settings, what)


def _with_masks(dataset: Dataset, name: str, count: int | None) -> list[Item]:
    return spread([i for i in dataset.select(name) if i.labels and i.mask], count)


def _only(
    dataset: Dataset, items: Sequence[Item], kept: Sequence[int]
) -> tuple[Dataset, list[Item]]:
    """The classes that some image shows, for a probe needs an image of each."""
    classes = dataset.classes
    names = tuple(classes.names[n] for n in kept)
    few = ClassTable(names, tuple(classes.mask_ids[n] for n in kept))
    moved = [replace(item, labels=tuple(map(kept.index, item.labels))) for item in items]
    return replace(dataset, classes=few), moved


def spread(items: Sequence[Item], count: int | None) -> list[Item]:
    """So many items, evenly spread over the list; None: all."""
    if count is None or count >= len(items):
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]


@torch.inference_mode()
def _probe(model: Classifier, items: Sequence[Item]) -> Tensor:
    pooled = torch.stack([model.features(tensor(model, i)).mean((-2, -1)).cpu() for i in items])
    labels = multi_hot(items, len(model.classes))
    with torch.inference_mode(False):
        return fit_head(pooled.clone(), labels.clone(), ProbeSettings(), model.classes)


def tensor(model: Classifier, item: Item) -> Tensor:
    """(1, 3, H, W), normalised, on the classifier's device."""
    return model.preprocessing(read_image(item.image))[None].to(model.device)


# -- Methods -----------------------------------------------------------------------------------


def has_peer() -> bool:
    """Whether pytorch-grad-cam is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def several(settings: LpcamSettings) -> str:
    """Words for the preset's scales."""
    flip = " and flip" if settings.flip else ""
    return f", scales {', '.join(f'{scale:g}' for scale in settings.scales)}{flip}"


def ours(
    given: Subject,
    method: str,
    pairs: Sequence[FeaturePair],
    labels: Sequence[int],
    size: tuple[int, int],
) -> Tensor:
    """(K, H, W) of the labels from features of a batch of one."""
    if method == "CAM":
        rows = given.classifier.weight[list(labels)]
        return cam_maps(pairs, rows, size, epsilon=given.settings.cam_epsilon).high_res[0]
    return lpcam_maps(pairs, given.vectors[list(labels)], size).high_res[0]


@torch.inference_mode()
def all_maps(given: Subject, item: Item, image: Tensor) -> dict[str, Tensor]:
    """Maps (K, H, W) of every method, from as few passes as they need."""
    model, settings = given.classifier, given.settings
    labels, size = item.labels, (image.shape[-2], image.shape[-1])
    single = list(tensor_pyramid(model, image, (1.0,), flip=False))
    found = {method: ours(given, method, single, labels, size) for method in ("CAM", "LPCAM")}
    if has_peer():
        features = single[0].features
        known = SimpleNamespace(features=lambda _: features, weight=model.weight)
        for name in PEERS:
            found[name] = peer_maps(name, known, None, image, labels)[0]
    pairs = list(tensor_pyramid(model, image, settings.scales, flip=settings.flip))
    for method in ("CAM", "LPCAM"):
        found[method + several(settings)] = ours(given, method, pairs, labels, size)
    return found


def timed_calls(given: Subject, items: Sequence[Item]) -> dict[str, Callable[[], object]]:
    """For each method a call that maps all items, each with a pass of its own."""
    model, settings = given.classifier, given.settings
    images = [tensor(model, item) for item in items]

    @torch.inference_mode()
    def call_ours(method: str, scales: Sequence[float], flip: bool) -> None:
        for item, image in zip(items, images, strict=True):
            pairs = tensor_pyramid(model, image, scales, flip=flip)
            ours(given, method, list(pairs), item.labels, (image.shape[-2], image.shape[-1]))

    def call_peer(name: str) -> None:
        for item, image in zip(items, images, strict=True):
            peer_maps(name, model, None, image, item.labels)

    calls: dict[str, Callable[[], object]] = {
        method: partial(call_ours, method, (1.0,), False) for method in ("CAM", "LPCAM")
    }
    if has_peer():
        calls |= {name: partial(call_peer, name) for name in PEERS}
    for method in ("CAM", "LPCAM"):
        calls[method + several(settings)] = partial(
            call_ours, method, settings.scales, settings.flip
        )
    return calls


# -- Measures ----------------------------------------------------------------------------------


class Places:
    """The measures of one method that need masks."""

    def __init__(self, classes: ClassTable, fixed: float) -> None:
        self.names = classes.names
        self.fixed = fixed
        self.sweep = ThresholdSweep(len(classes), sorted({*DEFAULT_THRESHOLDS, fixed}))
        self.boxes = BoxAccuracy(BOX_THRESHOLDS)
        self.pixels = PixelAveragePrecision()

    def update(self, item: Item, maps: Tensor, truth: Tensor) -> None:
        """Count the maps (K, H, W) of an image's labels; truth (H, W) of the table's labels."""
        few = (slice(None, None, PIXEL_STEP),) * 2
        self.sweep.update(truth[few], maps[:, *few], torch.tensor(item.labels))
        for index, plane in zip(item.labels, maps, strict=True):
            own = class_truth(truth, index)
            if not bool((own == 1).any()):
                continue
            self.boxes.update(plane, truth_boxes(own))
            self.pixels.update(plane[few], own[few])

    def compute(self) -> dict[str, float]:
        """Fractions."""
        threshold, best = best_threshold(self.sweep, self.names)
        return {
            "best": best.miou,
            "best_at": threshold,
            "fixed": scores(self.sweep.confusion(self.fixed), self.names).miou,
            "fixed_at": self.fixed,
            "box": self.boxes.compute(),
            "pxap": self.pixels.compute(),
            "pairs": float(self.boxes.pairs),
        }


def faithful(
    given: Subject,
    image: Tensor,
    index: int,
    maps: Mapping[str, Tensor],
    *,
    side: int = SIDE,
    steps: int = STEPS,
    batch: int = 7,
) -> dict[str, dict[str, float]]:
    """Insertion and deletion of one class's maps (H, W), at a small long side."""
    size = scaled_size(*image.shape[-2:], side / max(image.shape[-2:]))
    options: dict[str, Any] = {"mode": "bilinear", "align_corners": False}
    small = F.interpolate(image, size=size, antialias=True, **options)

    def score(images: Tensor) -> Tensor:
        return given.classifier(images).sigmoid()

    planes = torch.stack(list(maps.values()))
    planes = F.interpolate(planes[None], size=size, **options)[0].clamp(0, 1)
    images = small.expand(len(planes), -1, -1, -1)
    classes = torch.full((len(planes),), index)
    inserted = insertion(score, images, planes, classes, steps=steps, batch=batch).auc
    deleted = deletion(score, images, planes, classes, steps=steps, batch=batch).auc
    columns = {"insertion": inserted, "deletion": deleted}
    return {
        name: {column: float(values[row]) for column, values in columns.items()}
        for row, name in enumerate(maps)
    }


def measured(
    data: str | None,
    weights: str | None,
    run: str | None,
    count: int | None,
    device: str,
    repetitions: int,
    quick: bool,
) -> dict[str, Any]:
    """Every figure of every method, and what they are of."""
    started = time.perf_counter()
    with subject(data, weights, run, count, device) as given:
        settings = given.settings
        places: dict[str, Places] = {}
        looks: dict[str, list[dict[str, float]]] = {}
        chosen = {item.id for item in spread(given.items, 2 if quick else FAITHFUL)}
        for item in given.items:
            assert item.mask is not None
            image = tensor(given.classifier, item)
            maps = {name: each.cpu() for name, each in all_maps(given, item, image).items()}
            truth = truth_labels(read_index_mask(item.mask), given.classes)
            for name, each in maps.items():
                is_lpcam = name.startswith("LPCAM")
                fixed = settings.threshold if is_lpcam else settings.cam_threshold
                place = places.setdefault(name, Places(given.classes, fixed))
                place.update(item, each, truth)
            if item.id in chosen:
                firsts = {name: each[0].to(image.device) for name, each in maps.items()}
                small = {"side": 48, "steps": 3} if quick else {}
                for name, row in faithful(given, image, item.labels[0], firsts, **small).items():
                    looks.setdefault(name, []).append(row)
        timed = spread(given.items, 2 if quick else TIMED)
        seconds = interleaved(timed_calls(given, timed), repetitions=repetitions, device=device)
        results = {}
        for name, place in places.items():
            rows = {key: torch.tensor([row[key] for row in looks[name]]) for key in looks[name][0]}
            speed = Spread.of([len(timed) / value for value in seconds[name]])
            results[name] = {
                **place.compute(),
                "insertion": float(rows["insertion"].mean()),
                "deletion": float(rows["deletion"].mean()),
                "speed": [speed.median, speed.low, speed.high],
            }
        return {
            "results": results,
            "described": given.described,
            "images": len(given.items),
            "classes": list(given.classes.names),
            "faithful": len(chosen),
            "timed": len(timed),
            "preset": settings.preset or "own settings",
            "took": time.perf_counter() - started,
        }


# -- The tables --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    arguments = parser("localisation", __doc__)
    arguments.add_argument("--run", type=Path, help="folder of a finished run on --data")
    arguments.add_argument("--images", type=int, help="so many images, evenly spread; else all")
    options = arguments.parse_args(argv)
    # A drawn data set of timm's smallest backbone has neither photographs nor their weights.
    data = None if options.quick else options.data
    threads = options.threads[0]
    repetitions = options.repetitions or (1 if options.quick else 3)
    found = in_process(
        "benchmarks.localisation:measured",
        threads,
        here=options.quick,
        data=str(data.resolve()) if data else None,
        weights=str(options.weights.resolve()) if data and options.weights else None,
        run=str(options.run.resolve()) if data and options.run else None,
        count=4 if options.quick else options.images,
        device=options.device,
        repetitions=repetitions,
        quick=options.quick,
    )
    print("## Localisation\n")
    print(_protocol(found, options, data is not None, threads, repetitions) + "\n")
    place_rows, look_rows = [], []
    for name, row in found["results"].items():
        percent = {key: f"{100 * row[key]:.1f}" for key in row if key != "speed"}
        place_rows.append(
            [
                name,
                f"{percent['best']} ({row['best_at']:.2f})",
                f"{percent['fixed']} ({row['fixed_at']:.2f})",
                *(percent[key] for key in ("box", "pxap")),
            ]
        )
        median, low, high = map(show_number, row["speed"])
        look_rows.append(
            [
                name,
                f"{row['insertion']:.3f}",
                f"{row['deletion']:.3f}",
                f"{median} ({low}–{high})" if repetitions > 1 else median,
            ]
        )
    if not has_peer():
        place_rows.append(["pytorch-grad-cam", f"{MISSING}: {EXTRA}", *[""] * 3])
    headings = ["method", "mIoU, best threshold", "mIoU, fixed threshold", "MaxBoxAccV2", "PxAP"]
    print(table(headings, place_rows))
    print()
    headings = ["method", "insertion ↑", "deletion ↓", "images/s"]
    print(table(headings, look_rows))
    return 0


def _protocol(
    found: dict[str, Any], options: Any, real: bool, threads: int, repetitions: int
) -> str:
    what = f"photographs of PASCAL VOC, list {LIST}" if real else "drawn images (no figures)"
    pairs = int(next(iter(found["results"].values()))["pairs"])
    return (
        f"{found['images']} {what}, at their own size, classes {', '.join(found['classes'])}; "
        f"{found['described']}; {options.device}, {threads} thread(s); {found['took']:.0f} s in "
        "all. Maps of each image's own labels, one scale without flip but where the row says "
        f"otherwise (preset {found['preset']}). GradCAM, GradCAM++ and LayerCAM are "
        "pytorch-grad-cam's, on the same feature map before pooling. In percent but for insertion "
        "and deletion.\n\n"
        "mIoU: seeds over background and classes; in brackets the threshold, the best one chosen "
        f"by these masks from 0.00 to 0.99, the fixed one the preset's of LPCAM or CAM. The rest "
        f"over {pairs} pairs of image and label that the mask shows. MaxBoxAccV2: best threshold "
        "of 0.00, 0.05, ..., 0.95, truth the tightest boxes of the mask's components, mean over "
        "IoU 0.3, 0.5 and 0.7. mIoU and PxAP count every "
        f"{PIXEL_STEP}nd pixel each way. Void and other classes' pixels are not counted.\n\n"
        f"Insertion (onto the blurred image) and deletion (to the mean colour): {found['faithful']}"
        f" images at {SIDE} pixels, first label, {STEPS} steps, mean area below the sigmoid score. "
        "Speed: "
        f"{found['timed']} images in memory to maps of full size, one by one, backbone included, "
        f"which no gradient passes; warm-up, median of {repetitions} repetitions and quartiles."
    )


if __name__ == "__main__":
    sys.exit(main())
