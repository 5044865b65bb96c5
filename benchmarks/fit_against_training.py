"""Fit against training: making prototypes beside fine-tuning the classifier they belong to.

Fit, from cached features: splitting every image's features by its CAM, collecting, clustering,
scoring and selecting (equations 2-4), from half-precision features in memory, as a run does it.
Fit, with its backbone passes: the same from the image files, one pass an image.
Training: :func:`lpcam.classifiers.finetuning.finetune` from the image files, without validation,
on a part of the
steps; the whole is extrapolated in proportion to the steps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import (
    Spread,
    in_process,
    interleaved,
    parser,
    ratios,
    show_ratio,
    show_seconds,
    table,
    verdict,
)
from benchmarks.photographs import classifier, photographs
from lpcam.classifiers.classifier import Classifier
from lpcam.classifiers.feature_store import image_pyramid
from lpcam.classifiers.finetuning import FinetuneSettings, finetune
from lpcam.data.dataset import Item
from lpcam.data.images import read_image
from lpcam.method.multi_scale import single_scale_cam
from lpcam.method.prototypes import Prototypes, make_prototypes
from lpcam.method.reservoir import Reservoir, collect
from lpcam.method.settings import LpcamSettings

GOAL = 0.02
PRESET = "frozen"
EPOCHS = 3
TRAINING: dict[str, Any] = {
    "preset": "momentum",
    "epochs": EPOCHS,
    "long_side": (180, 300),
    "crop": 224,
    "freeze": ("conv_stem", "bn1", *(f"blocks.{number}" for number in range(4))),
}
"""The fine-tuning of docs/results.md."""
HELD_OUT = 10
"""A run holds out every so many-th image, so that many fewer are trained on."""


def settings(*, quick: bool = False) -> LpcamSettings:
    """The preset, with the split by the CAM of the very features (equation 2 as it is written)."""
    changes: dict[str, Any] = {"split_maps": "single_scale"}
    if quick:
        changes |= {"clusters": 3, "restarts": 1, "max_features": 100}
    return LpcamSettings.from_preset(PRESET).model_copy(update=changes)


def training_settings(*, quick: bool) -> FinetuneSettings:
    """One epoch: finetune is given as many images as the measured steps need."""
    changes = {**TRAINING, "epochs": 1}
    if quick:
        changes |= {"long_side": (40, 60), "crop": 48, "freeze": (), "batch_size": 2}
    return FinetuneSettings.model_validate(changes)


@torch.inference_mode()
def features_of(model: Classifier, item: Item) -> Tensor:
    """(C, h, w) at scale 1, rounded to half precision as a run rounds them."""
    (pair,) = image_pyramid(model, read_image(item.image)[None], (1.0,), flip=False)
    return pair.features[0].half()


@torch.inference_mode()
def fit(
    model: Classifier,
    items: Sequence[Item],
    chosen: LpcamSettings,
    cached: Sequence[Tensor] | None = None,
    passing: Classifier | None = None,
) -> Prototypes:
    """Prototypes of the items, from their features or, without, from their files.

    Args:
        cached: (C, h, w) of each item.
        passing: the classifier whose backbone gives the features where none are cached.
    """
    reservoir = Reservoir(chosen.max_features, 0)
    weight = model.weight
    for place, item in enumerate(items):
        half = features_of(passing or model, item) if cached is None else cached[place]
        features = half.to(weight)
        labels = list(item.labels)
        split_map = single_scale_cam(features, weight[labels], epsilon=chosen.cam_epsilon)
        collect(reservoir, features, labels, split_map, chosen, item.id)
    return make_prototypes(reservoir, weight, model.classes, chosen, seed=0)


def train(
    model: Classifier, items: Sequence[Item], steps: int, chosen: FinetuneSettings
) -> list[dict[str, Any]]:
    """So many steps of fine-tuning on the first images."""
    images = [items[place % len(items)] for place in range(steps * chosen.batch_size)]
    with TemporaryDirectory() as folder:
        return finetune(model, images, [], chosen, seed=0, folder=Path(folder))


def measured(
    data: str | None,
    weights: str | None,
    device: str,
    quick: bool,
    repetitions: int,
    steps: int,
) -> dict[str, Any]:
    """Seconds of fits and of a part of the training, and how many steps the whole has."""
    small = {"count": 6, "side": 100} if quick else {"count": None}
    with (
        photographs(data, "train", **small) as clustered,
        photographs(data, "train_aug", **small) as trained,
    ):
        model = classifier(weights, clustered.classes, quick=quick).to(device)
        # The twin is a copy: fine-tuning goes on with other weights and must not reach it.
        twin = model.folded()
        student = classifier(weights, clustered.classes, quick=quick).to(device)
        chosen, training = settings(quick=quick), training_settings(quick=quick)
        cached = [features_of(twin, item) for item in clustered.items]
        train(student, trained.items, 1, training)
        fit(model, clustered.items, chosen, cached)
        seconds = interleaved(
            {
                "cached": lambda: fit(model, clustered.items, chosen, cached),
                "passes": lambda: fit(model, clustered.items, chosen, passing=twin),
                "training": lambda: train(student, trained.items, steps, training),
            },
            repetitions=repetitions,
            warm_up=0,
            device=device,
        )
        images = len(trained.items) - len(trained.items) // HELD_OUT
        return {
            "seconds": seconds,
            "clustered": clustered.describe(),
            "trained": trained.describe(),
            "whole": EPOCHS * (images // training.batch_size),
            "batch": training.batch_size,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    options = parser("fit_against_training", __doc__).parse_args(argv)
    repetitions = options.repetitions or (1 if options.quick else 3)
    steps = 1 if options.quick else 6
    rows: list[list[str]] = []
    found: dict[str, Any] = {}
    for threads in options.threads:
        found = in_process(
            "benchmarks.fit_against_training:measured",
            threads,
            here=options.quick,
            data=str(options.data.resolve()) if options.data else None,
            weights=str(options.weights.resolve()) if options.weights else None,
            device=options.device,
            quick=options.quick,
            repetitions=repetitions,
            steps=steps,
        )
        seconds = found["seconds"]
        whole = [value * found["whole"] / steps for value in seconds["training"]]
        for key, name in (
            ("cached", "fit, from cached features"),
            ("passes", "fit, with its backbone passes"),
        ):
            ratio = ratios(seconds[key], whole)
            word = "" if options.quick else verdict(ratio.median, at_most=GOAL)
            cells = [str(threads), name, show_seconds(Spread.of(seconds[key]))]
            rows.append([*cells, show_ratio(ratio), word])
        label = f"fine-tuning, extrapolated from {steps} of {found['whole']} steps"
        rows.append([str(threads), label, show_seconds(Spread.of(whole)), "1", ""])
    print("## Fit against training\n")
    print(
        f"Fit: {found['clustered']}, preset `{PRESET}` with `split_maps: single_scale`. "
        f"Fine-tuning: {EPOCHS} epochs of {found['trained']} less a held-out tenth, batches of "
        f"{found['batch']}, crops of {48 if options.quick else TRAINING['crop']} pixels, stem to "
        "block 3 frozen, "
        f"without validation. {options.device}, {repetitions} repetitions.\n"
    )
    print(table(["threads", "what", "time", "÷ fine-tuning", "goal"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
