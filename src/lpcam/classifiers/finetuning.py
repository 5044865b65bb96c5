"""Fine-tuning a classifier on image-level labels (specification of IRN, section 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from lpcam.classifiers.classifier import Classifier, Preprocessing
from lpcam.classifiers.linear import mean_average_precision
from lpcam.classifiers.probe import multi_hot
from lpcam.data.dataset import Item
from lpcam.data.images import resize_long_side
from lpcam.runtime.distributed import Processes
from lpcam.runtime.settings import Fraction, Positive
from lpcam.training import loop as engine
from lpcam.training.augmentation import jitter_colours, mirror_and_crop
from lpcam.training.optim import SgdSettings, freeze, parameter_groups


class FinetuneSettings(SgdSettings):
    """How a classifier is fine-tuned (specification of IRN, section 1)."""

    table: ClassVar[str] = "finetune"
    preset: str = "momentum"

    learning_rate: Positive
    """Learning rate of the backbone; larger steps train faster but less stably."""
    head_multiplier: Positive
    """Factor of the learning rate of the head."""
    long_side: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    """Inclusive range, in pixels, from which each image's long side is drawn."""
    crop: Annotated[int, Field(ge=1)]
    """Side of the square crop, in pixels; a larger one needs more memory."""
    freeze: tuple[str, ...]
    """Prefixes of the backbone's parameter names that are not trained."""
    freeze_norms: bool
    """Whether the weights and biases of batch norms are frozen too."""
    jitter: tuple[Fraction, Fraction, Fraction, Annotated[float, Field(ge=0.0, le=0.5)]] | None
    """Largest random changes of brightness, contrast, saturation and hue; null: none."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Probability that a channel of the feature map is set to zero before pooling."""
    head_init: Literal["linear", "xavier"]
    """First weights of the head: those of torch's linear layer, or Xavier's uniform ones."""


def augment(
    image: NDArray[np.uint8],
    preprocessing: Preprocessing,
    settings: Any,
    generator: np.random.Generator,
) -> Tensor:
    """Augment an RGB image to a tensor (3, crop, crop) (specification of IRN, section 1)."""
    low, high = settings.long_side
    resized = resize_long_side(image, int(generator.integers(low, high + 1)))
    if settings.jitter is not None:
        resized = jitter_colours(resized, settings.jitter, generator)
    tensor = preprocessing(resized)
    # zero is the mean colour after normalisation
    return mirror_and_crop([(tensor, 0)], settings.crop, generator)[0]


def _sample(
    items: Sequence[Item],
    preprocessing: Preprocessing,
    settings: FinetuneSettings,
    seed: int,
    place: engine.Place,
) -> tuple[Tensor, int]:
    """The augmented image of a place and its index."""
    generator = np.random.default_rng([seed, place.epoch, place.sample])
    image = items[place.sample].read()
    return augment(image, preprocessing, settings, generator), place.sample


def finetune(
    classifier: Classifier,
    items: Sequence[Item],
    validation: Sequence[Item],
    settings: FinetuneSettings,
    **options: Unpack[engine.TrainingOptions],
) -> engine.History:
    """Fine-tune in place, with the options of ``loop.run``, and return one record per epoch."""
    processes = options.get("processes") or Processes()
    freeze(classifier.backbone, settings.freeze, norms=settings.freeze_norms)
    classifier.dropout = settings.dropout
    if settings.head_init == "xavier":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options["seed"])
            first = nn.init.xavier_uniform_(torch.empty_like(classifier.weight, device="cpu"))
        classifier.head.weight.data.copy_(first)
    size, side = min(settings.batch_size, len(items)), sum(settings.long_side) // 2
    labels = multi_hot(items, len(classifier.classes)).to(classifier.device)

    def values(name: str, _: nn.Parameter) -> tuple[float, float]:
        factor = settings.head_multiplier if name.startswith("head.") else 1.0
        return settings.learning_rate * factor, settings.weight_decay

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, indices = batch
        mean = F.multilabel_soft_margin_loss(model(images), labels[indices])
        return mean * (len(indices) / size)  # this process's share of the batch

    def at_record(_: int) -> dict[str, Any]:
        return {"validation_map": validation_map(classifier, validation, side, processes)}

    return engine.run(
        classifier,
        torch.optim.SGD(parameter_groups(classifier, values), momentum=settings.momentum),
        partial(_sample, items, classifier.preprocessing, settings, options["seed"]),
        len(items),
        loss,
        engine.Plan.of_epochs(settings, len(items)),
        label="fine-tuning",
        section="classifier.finetune",
        at_record=at_record,
        **options,
    )


@torch.inference_mode()
def validation_map(
    network: Any,
    items: Sequence[Item],
    side: int,
    processes: Processes,
    scores: Callable[[Any], Tensor] = lambda found: found,
) -> float | None:
    """Mean average precision of ``scores`` on whole images of a long side; None without images."""
    network.eval()
    logits = torch.zeros(len(items), len(network.classes))
    for row in range(processes.rank, len(items), processes.count):
        image = resize_long_side(items[row].read(), side)
        tensor = network.preprocessing(image)[None].to(network.device)
        logits[row] = scores(network(tensor))[0].float().cpu()
    return mean_average_precision(processes.sum(logits), multi_hot(items, len(network.classes)))
