"""The classifier: a linear probe on a frozen backbone, or fine-tuning."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from lpcam.classifiers.classifier import RANDOM, Classifier
from lpcam.classifiers.finetuning import finetune
from lpcam.classifiers.probe import fit_probe, pooled_features
from lpcam.data.dataset import Item
from lpcam.data.survey import label_findings
from lpcam.pipeline.cache import Task
from lpcam.pipeline.context import Context
from lpcam.runtime.errors import DataError
from lpcam.training.loop import History

logger = logging.getLogger(__name__)
HELD_OUT = 10  #: One image in so many is held out for the validation mAP where no list is named.


def classify(context: Context) -> Iterator[Task]:
    """Train the classifier."""
    recipe, section = context.recipe, context.recipe.classifier
    names = list(context.dataset.classes.names)

    def first() -> Classifier:
        return context.untrained(section.trained and RANDOM)

    path = context.folder.classifier
    if section.trained is not None:
        network = {"classes": names, "backbone": section.described()}
        yield context.given_task("classifier", network, path, first, section.trained)
        return
    probed = context.training_method == "probe"
    training, held_out = validation(context)
    parts = {
        "revision": 3,
        "classes": names,
        **section.backbone_key(),
        "method": context.training_method,
        "settings": (section.probe if probed else section.finetune).model_dump(
            mode="json", exclude={"preset"}
        ),
        "maps": context.features_key if probed else recipe.maps.features_key(),
        "scales": list(context.lpcam.scales) if probed and section.probe.long_side else None,
        "seed": recipe.run.seed,
        "training": context.digest(training),
        "validation": context.digest(held_out),
    }

    def train(classifier: Classifier, folder: Path) -> History:
        if not probed:
            options = context.training_options(folder)
            return finetune(classifier, training, held_out, section.finetune, **options)
        items, store = [*training, *held_out], context.store(classifier)
        shared = context.sharing, context.lpcam.scales
        pooled = pooled_features(items, section.probe, store, folder, *shared)
        if pooled is None:
            return []  # the first process fits the head, the others read it
        refit = recipe.data.lists.validate_ is None
        return fit_probe(classifier, training, held_out, section.probe, pooled=pooled, refit=refit)

    yield context.training_task("classifier", parts, path, first, train)


def check_labels(context: Context) -> None:
    """Add what the labels cannot teach to the run's warnings and notices."""
    training, held_out = validation(context)
    if not any(item.labels for item in training):
        name = context.recipe.data.list_of("classify")
        raise DataError(f"no image of the list {name!r} has a label; label some to train on them")
    found = [*label_findings(context.dataset.classes, [*training, *held_out], held_out)]
    context.warnings = tuple(str(one) for one in found if one.attention)
    notices = (*context.dataset.notices, *(str(one) for one in found if not one.attention))
    context.dataset = replace(context.dataset, notices=notices)
    for text in context.warnings if context.processes.first else ():
        logger.warning("%s", text)


def validation(context: Context) -> tuple[list[Item], list[Item]]:
    """Images that train the classifier, and images on which it is measured."""
    items = context.items("classify")
    name = context.recipe.data.lists.validate_
    if name is not None:
        return items, context.dataset.select(name)
    order = np.random.default_rng([context.recipe.run.seed, HELD_OUT]).permutation(len(items))
    left = Counter(label for item in items for label in item.labels)
    held = set()
    for place in order[: len(items) // HELD_OUT].tolist():
        labels = items[place].labels
        if all(left[label] > 1 for label in labels):  # the last image of a class trains it
            left.subtract(labels)
            held.add(place)
    training = [item for place, item in enumerate(items) if place not in held]
    return training, [items[place] for place in sorted(held)]
