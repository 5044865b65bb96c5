"""Extraction end to end: LPCAM beside CAM, and this package beside pytorch-grad-cam.

LPCAM and CAM: from the image file (the run's own functions) or from a normalised image (the classes
CAM and LPCAM) to the maps of full size, over the preset's scales and flip; the backbone is in it.

One photograph of 375 x 500 pixels, from the file: maps of its label as ``lpcam explain`` asks for
them, and the page's answer with the maps of every class, both fast and in full quality.

pytorch-grad-cam: the same classifier, the same batch of normalised images in memory to maps of full
size, one class an image, one scale, no flip, both in the way their documentation shows.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.measure import (
    EXTRA,
    MISSING,
    Spread,
    in_process,
    interleaved,
    parser,
    peak_memory,
    ratios,
    show_bytes,
    show_number,
    show_ratio,
    show_seconds,
    table,
    verdict,
)
from benchmarks.photographs import classifier, equal_size, photographs
from lpcam.classifiers.classifier import Classifier
from lpcam.classifiers.engines import accelerated, choose_engine
from lpcam.classifiers.feature_store import image_pyramid
from lpcam.data.dataset import Item
from lpcam.data.images import read_image
from lpcam.explain.explainer import Explainer
from lpcam.explain.serve.app import answer_of
from lpcam.method.extractors import CAM, LPCAM
from lpcam.method.multi_scale import cam_maps, lpcam_maps
from lpcam.method.settings import LpcamSettings

CAM_GOAL = 1.03
LATENCY_GOAL = 0.12
"""Seconds of one photograph, fast, on two threads."""
FORMS = {"fit": 1.05, "present=True": 1.05, "call": 1.3, "CAM, call": 1.3}
"""What may cost how many times as much with 1,000 classes as with 20, in time and in memory."""
PEER_GOAL = 2.0
PEER = "pytorch_grad_cam"
PRESET = "frozen"
SIZE = (375, 500)
FITTED_ON = 12
"""Images from which the prototypes are made; their number changes no time here."""
COMPARABLE = ("GradCAM", "HiResCAM")
"""Methods that give CAM's own map on a classifier with pooling and a linear head."""
INFORMATION = ("LayerCAM", "EigenCAM")


# -- LPCAM beside CAM --------------------------------------------------------------------------


def extractors(
    model: Classifier, items: Sequence[Item], settings: LpcamSettings
) -> tuple[CAM, LPCAM]:
    """CAM and a fitted LPCAM."""

    def loader() -> Any:
        for item in items:
            labels = torch.zeros(1, len(model.classes))
            labels[0, list(item.labels)] = 1.0
            yield normalised(model, item), labels

    # Few images fill few clusters; neither number is seen in the maps' time.
    few = settings.model_copy(
        update={"split_maps": "single_scale", "clusters": 4, "restarts": 1, "max_features": 500}
    )
    fitted = LPCAM(model, few).fit(loader())
    fitted.settings = settings
    return CAM(model, settings), fitted


def normalised(model: Classifier, item: Item) -> Tensor:
    """(1, 3, H, W) on the classifier's device."""
    return model.preprocessing(read_image(item.image))[None].to(model.device)


@torch.inference_mode()
def against_cam(
    data: str | None, weights: str | None, device: str, quick: bool, repetitions: int, count: int
) -> dict[str, Any]:
    """Seconds an image of CAM and LPCAM, by the classes and by the run's functions."""
    with photographs(data, "train", max(count, FITTED_ON), 120 if quick else 500) as found:
        model = classifier(weights, found.classes, quick=quick).to(device)
        settings = LpcamSettings.from_preset(PRESET)
        cam, lpcam = extractors(model, found.items[:FITTED_ON], settings)
        vectors = lpcam.prototypes_.vectors().to(model.weight)
        tested = found.items[:count]
        twin = model.folded() if hasattr(model, "folded") else model

        def run_maps(item: Item, method: str) -> None:
            pairs = image_pyramid(
                twin, read_image(item.image)[None], settings.scales, flip=settings.flip
            )
            labels = list(item.labels)
            if method == "CAM":
                cam_maps(pairs, model.weight[labels], sizes[item.id], epsilon=settings.cam_epsilon)
            else:
                lpcam_maps(pairs, vectors[labels], sizes[item.id])

        sizes = {item.id: read_image(item.image).shape[:2] for item in tested}
        images = {item.id: normalised(model, item) for item in tested}
        seconds: dict[str, list[float]] = {}
        for item in tested:
            calls: dict[str, Callable[[], object]] = {
                "classes/CAM": partial(cam, images[item.id]),
                "classes/LPCAM": partial(lpcam, images[item.id]),
                "run/CAM": partial(run_maps, item, "CAM"),
                "run/LPCAM": partial(run_maps, item, "LPCAM"),
            }
            one = interleaved(calls, repetitions=repetitions, device=device)
            for name, values in one.items():
                seconds.setdefault(name, []).append(Spread.of(values).median)
        return {"seconds": seconds}


# -- One photograph ----------------------------------------------------------------------------


def latency(
    data: str | None, weights: str | None, device: str, quick: bool, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of one photograph, from its file, in ``explain`` and on the page, by quality."""
    with (
        photographs(data, "train", FITTED_ON, 120 if quick else 500) as found,
        TemporaryDirectory() as folder,
    ):
        model = classifier(weights, found.classes, quick=quick).to(device)
        settings = LpcamSettings.from_preset(PRESET)
        lpcam = extractors(model, found.items, settings)[1]
        item = found.items[0]
        size = (96, 128) if quick else SIZE
        path = Path(folder, "photograph.jpg")
        Image.fromarray(read_image(item.image)).resize(size[::-1]).save(path, quality=92)
        label = [found.classes[item.labels[0]]]

        def answer(explainer: Explainer) -> str:
            maps = explainer.highest(path, len(found.classes))
            return json.dumps(answer_of(maps, explainer))

        calls: dict[str, Callable[[], object]] = {}
        for engine in dict.fromkeys(("torch", choose_engine("auto", torch.device(device)))):
            folded = partial(accelerated, engine=engine)
            full = Explainer(lpcam, settings=settings, folded=folded)
            for quality, explainer in (("fast", full.fast()), ("full", full)):
                calls[f"explain, {engine}, {quality}"] = partial(explainer, path, labels=label)
                calls[f"serve, {engine}, {quality}"] = partial(answer, explainer)
        return interleaved(calls, repetitions=repetitions, device=device)


# -- A thousand classes ------------------------------------------------------------------------


def of_many(
    name: str, classes: int, batch: int, size: int
) -> tuple[dict[str, Callable[[], object]], Tensor, Tensor]:
    """Calls of a timm model with random weights, and a batch with one label for each image."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=classes)
    with torch.no_grad():
        model.get_classifier().weight.abs_()  # the CAM of each class is positive somewhere
    images = torch.randn(batch, 3, size, size, generator=generator)
    labels = torch.arange(batch) % classes
    pool = "token" if name.startswith("vit") else None
    lpcam = LPCAM(model, pool=pool).fit([(images, labels)])
    cam = CAM(lpcam.source_, lpcam.settings_)
    calls: dict[str, Callable[[], object]] = {
        "fit": lambda: LPCAM(model, pool=pool).fit([(images, labels)]),
        "present=True": lambda: lpcam(images, labels, present=True),
        "call": lambda: lpcam(images, labels),
        "CAM, call": lambda: cam(images, labels),
    }
    return calls, images, labels


def classes_seconds(
    name: str, counts: Sequence[int], batch: int, size: int, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each call at each number of classes."""
    calls = {
        f"{form}/{count}": call
        for count in counts
        for form, call in of_many(name, count, batch, size)[0].items()
    }
    return interleaved(calls, repetitions=repetitions)


def classes_memory(name: str, count: int, batch: int, size: int, form: str) -> int:
    """Peak bytes of a process that fits, and then makes another call if it is one."""
    calls = of_many(name, count, batch, size)[0]
    if form != "fit":
        calls[form]()
    return peak_memory()


def classes_rows(options: Any) -> list[list[str]]:
    """The table of a call at 20 and at 1,000 classes, one label for each image, one thread."""
    counts, size = ((3, 5), 96) if options.quick else ((20, 1000), 224)
    names = ("test_resnet",) if options.quick else ("resnet18", "vit_small_patch16_224")
    rows = []
    for name in names:
        for batch in (1,) if options.quick else (1, 8):
            shape = {"name": name, "batch": batch, "size": size}
            how = {"threads": 1, "here": options.quick}
            repetitions = 1 if options.quick else options.repetitions or 7
            seconds = in_process(
                "benchmarks.extraction:classes_seconds",
                **how,
                **shape,
                counts=counts,
                repetitions=repetitions,
            )
            for form, goal in FORMS.items():
                few, many = (seconds[f"{form}/{count}"] for count in counts)
                used = [
                    in_process(
                        "benchmarks.extraction:classes_memory",
                        **how,
                        **shape,
                        count=count,
                        form=form,
                    )
                    for count in counts
                ]
                ratio, memory = ratios(many, few), used[1] / used[0]
                worst = max(ratio.median, memory)
                rows.append(
                    [
                        f"{name}, batch {batch}",
                        form,
                        *(show_seconds(Spread.of(one)) for one in (few, many)),
                        show_ratio(ratio),
                        *(show_bytes(one) for one in used),
                        show_number(memory),
                        "" if options.quick else verdict(worst, at_most=goal),
                    ]
                )
    return rows


# -- Beside pytorch-grad-cam -------------------------------------------------------------------


class Pooled(nn.Module):
    """The classifier with a named place where its features can be tapped, as hooks need one."""

    def __init__(self, model: Classifier, *, frozen: bool) -> None:
        super().__init__()
        self.model = model
        self.frozen = frozen
        self.features = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, N)."""
        if self.frozen:
            with torch.no_grad():
                features = self.model.features(images)
            features = features.detach().requires_grad_()
        else:
            features = self.model.features(images)
        logits: Tensor = self.model.head(self.features(features).mean((-2, -1)))
        return logits


def has_peer() -> bool:
    """Whether pytorch-grad-cam is installed."""
    return importlib.util.find_spec(PEER) is not None


def peer_maps(
    method: str, model: Classifier, images: Tensor, classes: Sequence[int], *, frozen: bool = False
) -> Callable[[], Any]:
    """A call of pytorch-grad-cam: maps (B, H, W) of one class an image.

    Args:
        frozen: keep the backward pass out of the backbone, which its documentation does not do.
    """
    peer: Any = importlib.import_module(PEER)
    targets_module: Any = importlib.import_module(f"{PEER}.utils.model_targets")
    wrapped = Pooled(model, frozen=frozen)
    extractor = getattr(peer, method)(model=wrapped, target_layers=[wrapped.features])
    targets = [targets_module.ClassifierOutputTarget(index) for index in classes]
    return lambda: extractor(input_tensor=images, targets=targets)


def our_maps(extractor: CAM, images: Tensor, classes: Sequence[int]) -> Callable[[], Any]:
    """Maps (B, H, W) of one class an image, as an array, as the peer gives them."""
    rows = torch.arange(len(classes))
    index = torch.tensor(classes)
    return lambda: extractor(images)[rows, index].cpu().numpy()


def against_peer(
    data: str | None, weights: str | None, device: str, quick: bool, repetitions: int, batch: int
) -> dict[str, Any]:
    """Seconds of a batch of ours and of the peer's methods, and how far maps agree."""
    with photographs(data, "train", max(batch, FITTED_ON), 120 if quick else 500) as found:
        model = classifier(weights, found.classes, quick=quick).to(device)
        settings = LpcamSettings.from_preset(PRESET).model_copy(
            update={"scales": (1.0,), "flip": False}
        )
        cam, lpcam = extractors(model, found.items[:FITTED_ON], settings)
        tested = found.items[:batch]
        size = (96, 128) if quick else SIZE
        images = torch.from_numpy(equal_size(tested, model, size)).to(device)
        classes = [item.labels[0] for item in tested]
    calls = {
        "CAM, this package": our_maps(cam, images, classes),
        "LPCAM, this package": our_maps(lpcam, images, classes),
    }
    engine = choose_engine("auto", torch.device(device))
    if engine != "torch":
        fast = CAM(accelerated(model, engine), settings)
        calls[f"CAM, this package, {engine}"] = our_maps(fast, images, classes)
    agreement = {}
    if has_peer():
        for method in (*COMPARABLE, *INFORMATION):
            calls[method] = peer_maps(method, model, images, classes)
        calls["GradCAM, backbone without gradient"] = peer_maps(
            "GradCAM", model, images, classes, frozen=True
        )
        reference = calls["CAM, this package"]()
        agreement = {
            name: correlation(reference, calls[name]())
            for name in calls
            if name.split(",")[0] in COMPARABLE
        }
    seconds = interleaved(calls, repetitions=repetitions, device=device)
    return {"seconds": seconds, "agreement": agreement, "size": size}


def correlation(first: Any, second: Any) -> float:
    """Smallest correlation over the images of two stacks of maps; maps may be scaled otherwise."""
    values = []
    for a, b in zip(first, second, strict=True):
        if float(np.std(a)) > 0 and float(np.std(b)) > 0:
            values.append(float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]))
        else:
            values.append(1.0 if float(np.std(a)) == float(np.std(b)) else 0.0)
    return min(values)


# -- The tables --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    options = parser("extraction", __doc__).parse_args(argv)
    given = {
        "data": str(options.data.resolve()) if options.data else None,
        "weights": str(options.weights.resolve()) if options.weights else None,
        "device": options.device,
        "quick": options.quick,
    }
    count, batch, repetitions = (2, 2, 1) if options.quick else (12, 8, options.repetitions or 3)
    what = "photographs of PASCAL VOC" if options.data else "seeded images of VOC's sizes (no data)"
    backbone = "timm's test_resnet" if options.quick else "MobileNetV2 at output stride 16"
    how = "given weights" if options.weights else "random weights"
    print("## Extraction\n")
    print(
        f"{what}, {backbone} with {how}, {options.device}. LPCAM and CAM: {count} images one by "
        f"one, the median of {repetitions} repetitions each, scales and flip of `{PRESET}`. "
        f"Extractors: a batch of {batch}, one scale, no flip, {repetitions} repetitions.\n"
    )
    rows, waits, peers = [], [], []
    for threads in options.threads:
        found = in_process(
            "benchmarks.extraction:against_cam",
            threads,
            here=options.quick,
            **given,
            repetitions=repetitions,
            count=count,
        )
        for path, label in (("classes", "`CAM`, `LPCAM`"), ("run", "a run's functions, from file")):
            cam, lpcam = (found["seconds"][f"{path}/{method}"] for method in ("CAM", "LPCAM"))
            ratio = ratios(lpcam, cam)
            rows.append(
                [
                    str(threads),
                    label,
                    show_seconds(Spread.of(cam)),
                    show_seconds(Spread.of(lpcam)),
                    show_ratio(ratio),
                    "" if options.quick else verdict(ratio.median, at_most=CAM_GOAL),
                ]
            )
        found = in_process(
            "benchmarks.extraction:latency",
            threads,
            here=options.quick,
            **given,
            repetitions=1 if options.quick else options.repetitions or 15,
        )
        for name, seconds in found.items():
            time = Spread.of(seconds)
            scored = not options.quick and threads == 2 and name.endswith("fast")
            goal = verdict(time.median, at_most=LATENCY_GOAL) if scored else ""
            waits.append([str(threads), f"`{name}`", show_seconds(time), goal])
        found = in_process(
            "benchmarks.extraction:against_peer",
            threads,
            here=options.quick,
            **given,
            repetitions=repetitions,
            batch=batch,
        )
        peers += _peer_rows(found, threads, batch, quick=options.quick)
    print(
        table(["threads", "path", "CAM, an image", "LPCAM, an image", "LPCAM ÷ CAM", "goal"], rows)
    )
    print("\nOne photograph of 375 × 500 pixels, from its file; *fast* is scale 1 without flip:\n")
    print(table(["threads", "command, engine, quality", "time", "goal, s"], waits))
    print("\nOne label for each image among 20 and 1,000 classes, 224 pixels, random weights:\n")
    titles = ["model", "call", "20", "1,000", "÷", "peak, 20", "peak, 1,000", "÷", "goal"]
    print(table(titles, classes_rows(options)))
    print("\nImages per second, and how many times as fast each of ours is as each other method.")
    print("*Agreement*: smallest correlation of an image's map with this package's CAM.\n")
    headings = ["threads", "method", "images/s", "CAM is × as fast", "LPCAM is × as fast"]
    print(table([*headings, "agreement", "goal"], peers))
    return 0


def _peer_rows(found: dict[str, Any], threads: int, batch: int, *, quick: bool) -> list[list[str]]:
    seconds: dict[str, list[float]] = found["seconds"]
    ours = {name: seconds[f"{name}, this package"] for name in ("CAM", "LPCAM")}
    measured = [name for name in COMPARABLE if name in seconds]
    fastest = min(measured, key=lambda name: Spread.of(seconds[name]).median, default="")
    rows = []
    for name, values in seconds.items():
        speed = Spread.of([batch / value for value in values])
        gains = [ratios(values, own) for own in ours.values()]
        goal = ""
        if name == fastest and not quick:
            goal = verdict(min(gain.median for gain in gains), at_least=PEER_GOAL)
        same = found["agreement"].get(name)
        rows.append(
            [
                str(threads),
                name,
                show_number(speed.median),
                *(show_ratio(gain) for gain in gains),
                "" if same is None else f"{same:.3f}",
                goal,
            ]
        )
    if not measured:
        rows.append([str(threads), "pytorch-grad-cam", MISSING, EXTRA, "", "", ""])
    return rows


if __name__ == "__main__":
    sys.exit(main())
