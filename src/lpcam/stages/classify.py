"""The classifier: a linear head on a frozen backbone, or fine-tuning."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from lpcam.data.items import Item
from lpcam.ledger import Stage
from lpcam.stages.context import FEATURE_KEYS, STAGES, Run
from lpcam.stages.prototypes import check_memory
from lpcam.stages.training import (
    backbone_parts,
    backbone_spec,
    first_weights,
    train_network,
    training_options,
)

HELD_OUT = 10
"""Every how many-th image is held out for the validation mAP where no list is named."""


def classify(run: Run) -> bool:
    """Train the classifier; whether there was anything to do."""
    section = run.recipe.classifier
    settings = section.probe if run.training_method == "probe" else section.finetune
    training, held_out = validation(run)
    stage = run.stages["classify"] = Stage(
        run.folder / "classifier",
        {
            "revision": 3,
            "classes": list(run.dataset.classes.names),
            **backbone_parts(section),
            "method": run.training_method,
            "settings": settings.model_dump(mode="json", exclude={"preset"}),
            "maps": run.recipe.maps.model_dump(include=set(FEATURE_KEYS)),
            "seed": run.recipe.run.seed,
            "training": run.digest(training),
            "validation": run.digest(held_out),
        },
    )

    def train(classifier: Any) -> list[dict[str, Any]]:
        history = _train(run, classifier, stage, training, held_out)
        if run.processes.first:
            run.__dict__["classifier"] = classifier
        return history

    path = stage.folder / "classifier.safetensors"
    return train_network(run, stage, path, lambda: _build(run), train)


def _build(run: Run) -> Any:
    """The untrained classifier, on the run's device."""
    classifier = build_classifier(run)
    if STAGES.index(run.until) >= STAGES.index("prototypes"):
        check_memory(run, run.recipe.lpcam, classifier.weight.shape)
    return classifier


def build_classifier(run: Run, *, weights: str | None = None) -> Any:
    """A classifier with its first weights, the recipe's or others, on the run's device."""
    from lpcam.classifier import build  # noqa: PLC0415 - timm is slow to import

    section, names = run.recipe.classifier, run.dataset.classes.names
    first = first_weights(run, section)
    first["weights"] = weights or first["weights"]
    return build(backbone_spec(section), names, **first).to(run.device)


def _train(
    run: Run, classifier: Any, stage: Stage, training: list[Item], held_out: list[Item]
) -> list[dict[str, Any]]:
    if run.training_method == "finetune":
        from lpcam.train import finetune  # noqa: PLC0415

        settings = run.recipe.classifier.finetune
        return finetune(classifier, training, held_out, settings, **training_options(run, stage))
    from lpcam.probe import fit_probe, pooled_features  # noqa: PLC0415

    probe = run.recipe.classifier.probe
    pooled = pooled_features(
        [*training, *held_out], probe, run.store(classifier), stage.folder, run.sharing
    )
    if pooled is None:
        return []  # the first process fits the head, the others read it
    refit = run.recipe.data.lists.validate_ is None
    return fit_probe(classifier, training, held_out, probe, pooled=pooled, refit=refit)


def validation(run: Run) -> tuple[list[Item], list[Item]]:
    """Training and validation items of the classifier."""
    items = run.items("classify")
    name = run.recipe.data.lists.validate_
    if name is not None:
        return items, run.dataset.select(name)
    order = np.random.default_rng([run.recipe.run.seed, HELD_OUT]).permutation(len(items))
    left = Counter(label for item in items for label in item.labels)
    held = set()
    for place in order[: len(items) // HELD_OUT].tolist():
        labels = items[place].labels
        if all(left[label] > 1 for label in labels):  # the last image of a class trains it
            left.subtract(labels)
            held.add(place)
    return (
        [item for place, item in enumerate(items) if place not in held],
        [items[place] for place in sorted(held)],
    )
