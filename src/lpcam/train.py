"""Fine-tuning a classifier on image-level labels (specification of IRN, section 1)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from lpcam import engine
from lpcam.classifier import Classifier, Preprocessing
from lpcam.data.images import read_image, resize_long_side
from lpcam.data.items import Item
from lpcam.errors import ClassifierError
from lpcam.metrics import mean_average_precision
from lpcam.presets import FinetuneSettings
from lpcam.probe import multi_hot
from lpcam.processes import Processes

# -- Augmentation ------------------------------------------------------------------------------


class Sizes(Protocol):
    """Settings of the sizes of training images, in pixels."""

    @property
    def long_side(self) -> tuple[int, int]: ...
    @property
    def crop(self) -> int: ...


def augment(
    image: NDArray[np.uint8],
    preprocessing: Preprocessing,
    settings: Sizes,
    generator: np.random.Generator,
    *,
    change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None,
) -> Tensor:
    """Augment one image (specification of IRN, section 1).

    The long side is resized to a random length in ``settings.long_side`` (PIL bicubic), RGB is
    normalised, and the image is mirrored with probability one half. Then a random square crop is
    taken; a smaller image is placed at random on a canvas of the mean colour.

    Args:
        image: (H, W, 3) uint8 RGB.
        preprocessing: normalisation.
        settings: range of long sides and side of the crop.
        generator: source of all random choices.
        change: function applied to the resized image, to change its colours.

    Returns:
        (3, crop, crop) float32.

    Example:
        >>> settings = FinetuneSettings.from_preset("official", long_side=[40, 64], crop=48)
        >>> plain = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        >>> image, generator = np.zeros((20, 30, 3), np.uint8), np.random.default_rng(0)
        >>> augment(image, plain, settings, generator).shape
        torch.Size([3, 48, 48])
    """
    low, high = settings.long_side
    resized = resize_long_side(image, int(generator.integers(low, high + 1)))
    tensor = preprocessing(resized if change is None else change(resized))
    # zero is the mean colour after normalisation
    return engine.mirror_and_crop([(tensor, 0)], settings.crop, generator)[0]


class _Augmented(Dataset[tuple[Tensor, int]]):
    """Augmented images by (epoch, index)."""

    def __init__(
        self,
        items: Sequence[Item],
        preprocessing: Preprocessing,
        settings: FinetuneSettings,
        seed: int,
    ) -> None:
        self.items = items
        self.preprocessing = preprocessing
        self.settings = settings
        self.seed = seed

    def __getitem__(self, place: engine.Place) -> tuple[Tensor, int]:
        epoch, index, _ = place
        generator = np.random.default_rng([self.seed, epoch, index])
        image = read_image(self.items[index].image)
        return augment(image, self.preprocessing, self.settings, generator), index


# -- Freezing ----------------------------------------------------------------------------------


def freeze(backbone: nn.Module, prefixes: Sequence[str], *, norms: bool = False) -> None:
    """Freeze the parameters of a backbone whose names begin with a prefix; the others train.

    Args:
        backbone: changed in place.
        prefixes: dotted names of stages or layers.
        norms: freeze the parameters of its batch norms too.

    Raises:
        ClassifierError: if a prefix matches nothing; the message lists the stages.

    Example:
        >>> backbone = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> freeze(backbone, ["0"])
        >>> [name for name, p in backbone.named_parameters() if p.requires_grad]
        ['1.weight', '1.bias']
    """
    named = dict(backbone.named_parameters())
    frozen = names_below(named, prefixes)
    for name, parameter in named.items():
        parameter.requires_grad_(name not in frozen)
    for module in backbone.modules() if norms else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)


def names_below(names: Collection[str], prefixes: Sequence[str]) -> set[str]:
    """The dotted names that are, or are below, one of the prefixes.

    Raises:
        ClassifierError: if a prefix matches nothing; the message lists the stages.

    Example:
        >>> names_below(["layer1.0.weight", "layer10.0.weight"], ["layer1"])
        {'layer1.0.weight'}
    """
    found: set[str] = set()
    for prefix in prefixes:
        below = {name for name in names if name == prefix or name.startswith(f"{prefix}.")}
        if not below:
            stages = sorted({".".join(n.split(".")[:2]) for n in names if "." in n})
            raise ClassifierError(
                f"freeze: no parameter of the backbone is below {prefix!r}; there are "
                f"{', '.join(stages[:40])}"
            )
        found |= below
    return found


# -- Training ----------------------------------------------------------------------------------


def finetune(
    classifier: Classifier,
    items: Sequence[Item],
    validation: Sequence[Item],
    settings: FinetuneSettings,
    *,
    seed: int,
    folder: Path,
    workers: int = 0,
    processes: Processes | None = None,
) -> list[dict[str, Any]]:
    """Fine-tune in place, with checkpoints in ``folder`` from which a stopped run resumes.

    SGD on the multi-label soft margin loss, poly schedule per step, head learning rate
    ``head_multiplier`` times the backbone's, batch-norm statistics frozen.

    Args:
        classifier: the classifier, on the device to train on.
        items: training images.
        validation: images whose mAP is measured after each epoch.
        settings: schedule, rates and sizes.
        seed: seed of the order of the images and of their augmentation.
        folder: folder of the checkpoint.
        workers: processes that read and augment images.
        processes: processes that share each batch; default: only this one. The result does not
            depend on their number, up to rounding.

    Returns:
        one record per epoch: ``epoch``, ``step``, mean ``loss``, ``validation_map``.

    Raises:
        ClassifierError: if ``freeze`` matches nothing, a batch has fewer images than there are
            processes, or the loss is no longer finite.
        ArtefactError: if a checkpoint is damaged or of other weights.
    """
    processes = processes or Processes()
    freeze(classifier.backbone, settings.freeze)
    groups = [
        {
            "params": [p for p in classifier.backbone.parameters() if p.requires_grad],
            "lr": settings.learning_rate,
        },
        {
            "params": list(classifier.head.parameters()),
            "lr": settings.learning_rate * settings.head_multiplier,
        },
    ]
    size = min(settings.batch_size, len(items))
    labels = multi_hot(items, len(classifier.classes))
    model = processes.replicate(classifier)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, indices = batch
        classifier.train()
        mean = F.multilabel_soft_margin_loss(
            model(images.to(classifier.device)), labels[indices].to(classifier.device)
        )
        return mean * (len(indices) / size)  # this process's share of the batch

    history = engine.run(
        classifier,
        engine.sgd(groups, settings),
        _Augmented(items, classifier.preprocessing, settings, seed),
        len(items),
        loss,
        engine.Plan.of_epochs(settings, len(items)),
        label="fine-tuning",
        section="classifier.finetune",
        seed=seed,
        folder=folder,
        workers=workers,
        processes=processes,
        at_record=lambda _: {
            "validation_map": validation_map(classifier, validation, settings, processes)
        },
    )
    classifier.eval()
    return history


@torch.inference_mode()
def validation_map(
    classifier: Classifier,
    items: Sequence[Item],
    settings: FinetuneSettings,
    processes: Processes | None = None,
) -> float | None:
    """Mean average precision on whole images at the middle training size; None without images."""
    processes = processes or Processes()
    classifier.eval()
    side = sum(settings.long_side) // 2
    if not items:
        return None
    logits = torch.zeros(len(items), len(classifier.classes))
    for row in range(processes.rank, len(items), processes.count):
        image = resize_long_side(read_image(items[row].image), side)
        tensor = classifier.preprocessing(image)
        logits[row] = classifier(tensor[None].to(classifier.device))[0].float().cpu()
    return mean_average_precision(processes.sum(logits), multi_hot(items, len(classifier.classes)))
