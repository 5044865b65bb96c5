"""The classifier: a linear head on a frozen backbone, or fine-tuning."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from lpcam.data.items import Item
from lpcam.ledger import Stage
from lpcam.stages.context import FEATURE_KEYS, STAGES, Run, remove_leftovers, weights_key
from lpcam.stages.prototypes import check_memory
from lpcam.storage import digest_file
from lpcam.version import versions

HELD_OUT = 10
"""Every how many-th image is held out for the validation mAP where no list is named."""


def classify(run: Run) -> bool:
    """Train the classifier; whether there was anything to do."""
    section = run.recipe.classifier
    settings = section.probe if run.training_method == "probe" else section.finetune
    training, held_out = validation(run)
    weights = weights_key(section.weights)
    run.stages["classify"] = Stage(
        run.folder / "classifier",
        {
            "revision": 3,
            "classes": list(run.dataset.classes.names),
            "backbone": section.model_dump(
                mode="json", exclude={"weights", "method", "probe", "finetune"}
            ),
            "weights": weights,
            "method": run.training_method,
            "settings": settings.model_dump(mode="json", exclude={"preset"}),
            "maps": run.recipe.maps.model_dump(include=set(FEATURE_KEYS)),
            "seed": run.recipe.run.seed,
            "training": run.digest(training),
            "validation": run.digest(held_out),
        },
    )
    path = run.stages["classify"].folder / "classifier.safetensors"
    if run.stages["classify"].done([path]):
        if run.processes.first:
            remove_leftovers(path.parent)  # of a run that was stopped at its very end
        return False
    run.refuse(run.stages["classify"])
    from lpcam.classifier import BackboneSpec, build  # noqa: PLC0415 - timm is slow to import

    classifier = build(
        BackboneSpec(section.backbone, section.arguments, section.output_stride, section.dilated),
        run.dataset.classes.names,
        weights=section.weights,
        mean=section.mean,
        std=section.std,
        seed=run.recipe.run.seed,
    ).to(run.device)
    if STAGES.index(run.until) >= STAGES.index("prototypes"):
        check_memory(run, run.recipe.lpcam, classifier.weight.shape)
    run.begin(run.stages["classify"])
    history = _train(run, classifier, training, held_out)
    output: dict[str, Any] = {}
    if run.processes.first:
        classifier.save(path, {"stage": run.stages["classify"].key, "versions": versions()})
        output = {
            "fingerprint": classifier.fingerprint(),
            "digest": digest_file(path),
            "history": history,
        }
    run.finish(run.stages["classify"], **output)
    if run.processes.first:
        run.__dict__["classifier"] = classifier
        remove_leftovers(path.parent)
    return True


def _train(
    run: Run, classifier: Any, training: list[Item], held_out: list[Item]
) -> list[dict[str, Any]]:
    folder = run.stages["classify"].folder
    if run.training_method == "finetune":
        from lpcam.train import finetune  # noqa: PLC0415

        return finetune(
            classifier,
            training,
            held_out,
            run.recipe.classifier.finetune,
            seed=run.recipe.run.seed,
            folder=folder,
            workers=run.threads if run.device.type == "cuda" else 0,
            processes=run.processes,
        )
    from lpcam.probe import fit_probe, pooled_features  # noqa: PLC0415

    settings = run.recipe.classifier.probe
    pooled = pooled_features(
        [*training, *held_out], settings, run.store(classifier), folder, run.sharing
    )
    if pooled is None:
        return []  # the first process fits the head, the others read it
    refit = run.recipe.data.lists.validate_ is None
    return fit_probe(classifier, training, held_out, settings, pooled=pooled, refit=refit)


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
