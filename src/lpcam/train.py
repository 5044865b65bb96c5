"""Fine-tuning a classifier on image-level labels (specification of IRN, section 1).

Each image's augmentation depends on the seed, the epoch and the image alone, and each epoch's order
on the seed and the epoch, so that a run that was stopped in the middle of an epoch goes on to the
very same weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lpcam.classifier import Classifier, Preprocessing
from lpcam.data.images import read_image, resize_long_side
from lpcam.data.items import Item
from lpcam.errors import ArtefactError, ClassifierError
from lpcam.metrics import mean_average_precision
from lpcam.presets import FinetuneSettings
from lpcam.probe import multi_hot
from lpcam.processes import Processes
from lpcam.progress import progress
from lpcam.storage import read_tensors, write_tensors

logger = logging.getLogger(__name__)
CHECKPOINT_STEPS = 50
"""Steps between checkpoints; beside them, one stands at the end of every epoch."""


# -- Augmentation ------------------------------------------------------------------------------


def augment(
    image: NDArray[np.uint8],
    preprocessing: Preprocessing,
    settings: FinetuneSettings,
    generator: np.random.Generator,
) -> Tensor:
    """The augmentation of the specification, in its order.

    The long side goes to a random integer of ``settings.long_side`` (PIL bicubic), RGB is
    normalised, the image is mirrored in half of the cases, and a random square crop is taken, or
    the image is placed at random in a canvas of the mean colour where it is smaller.

    Args:
        image: (H, W, 3) uint8 RGB.

    Returns:
        (3, crop, crop) float32.
    """
    low, high = settings.long_side
    long_side = int(generator.integers(low, high + 1))
    tensor = preprocessing(resize_long_side(image, long_side))
    if generator.random() < 0.5:
        tensor = tensor.flip(-1)
    crop = settings.crop
    canvas = torch.zeros(3, crop, crop)  # zero is the mean colour after normalisation
    source, target = [], []
    for length in tensor.shape[-2:]:
        offset = int(generator.integers(0, abs(length - crop) + 1))
        taken = min(length, crop)
        source.append(slice(offset, offset + taken) if length > crop else slice(0, taken))
        target.append(slice(0, taken) if length > crop else slice(offset, offset + taken))
    canvas[:, target[0], target[1]] = tensor[:, source[0], source[1]]
    return canvas


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

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = place
        generator = np.random.default_rng([self.seed, epoch, index])
        image = read_image(self.items[index].image)
        return augment(image, self.preprocessing, self.settings, generator), index


class _Order:
    """Batches of (epoch, index) from a given step to the end, this process's share of each."""

    def __init__(
        self,
        count: int,
        batch: int,
        epochs: int,
        seed: int,
        first_step: int,
        processes: Processes,
    ) -> None:
        self.count = count
        self.batch = min(batch, count)
        self.steps_an_epoch = count // self.batch  # an incomplete last batch is dropped
        self.epochs = epochs
        self.seed = seed
        self.first_step = first_step
        self.processes = processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.first_step // self.steps_an_epoch, self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.count).tolist()
            skip = max(0, self.first_step - epoch * self.steps_an_epoch)
            for step in range(skip, self.steps_an_epoch):
                part = order[step * self.batch : (step + 1) * self.batch]
                mine = part[self.processes.rank :: self.processes.count]
                yield [(epoch, index) for index in mine]


# -- Optimiser and schedule --------------------------------------------------------------------


def poly(step: int, steps: int, power: float) -> float:
    """Factor (1 - t/T)^power of the learning rate at step t of T."""
    return math.pow(1.0 - step / steps, power)


def freeze(classifier: Classifier, prefixes: Sequence[str]) -> None:
    """Stop the gradient of backbone parameters whose names begin with a prefix.

    Raises:
        ClassifierError: if a prefix matches nothing; the message lists the stages there are.
    """
    names = [name for name, _ in classifier.backbone.named_parameters()]
    for prefix in prefixes:
        if not any(_below(name, prefix) for name in names):
            stages = sorted({".".join(n.split(".")[:2]) for n in names if "." in n})
            raise ClassifierError(
                f"freeze: no parameter of the backbone is below {prefix!r}; there are "
                f"{', '.join(stages[:40])}"
            )
    for name, parameter in classifier.backbone.named_parameters():
        parameter.requires_grad_(not any(_below(name, prefix) for prefix in prefixes))


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


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
    """Fine-tune in place, with checkpoints in ``folder`` from which a stopped run goes on.

    SGD on the multi-label soft margin loss, poly schedule every step, head learning rate
    ``head_multiplier`` times the backbone's, batch-norm statistics frozen.

    Args:
        validation: images whose mAP is measured after each epoch.
        workers: processes that read and augment images.
        processes: those that share each batch; default: this one alone. The step is that of the
            whole batch, whatever their number, but for rounding.

    Returns:
        one record an epoch: ``epoch``, mean ``loss``, ``validation_map``.

    Raises:
        ClassifierError: if ``freeze`` matches nothing, a batch has fewer images than there are
            processes, or the loss is no longer finite.
        ArtefactError: if a checkpoint is damaged or of other weights.
    """
    processes = processes or Processes()
    size = min(settings.batch_size, len(items))
    if size < processes.count:
        raise ClassifierError(
            f"a batch of {size} images cannot be shared out among {processes.count} processes; "
            "start fewer, or raise classifier.finetune.batch_size"
        )
    freeze(classifier, settings.freeze)
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
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.SGD(
        groups, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    base = [float(group["lr"]) for group in optimizer.param_groups]
    checkpoint = folder / "checkpoint.safetensors"
    step, running, history = _resume(checkpoint, classifier, optimizer)
    order = _Order(len(items), settings.batch_size, settings.epochs, seed, step, processes)
    steps = order.steps_an_epoch * settings.epochs
    labels = multi_hot(items, len(classifier.classes))
    loader = DataLoader(
        _Augmented(items, classifier.preprocessing, settings, seed),
        batch_sampler=order,
        num_workers=workers,
        persistent_workers=False,
    )
    model = processes.replicate(classifier)
    with progress("fine-tuning", steps, done=step) as advance:
        for images, indices in loader:
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * poly(step, steps, settings.power)
            classifier.train()
            loss = F.multilabel_soft_margin_loss(
                model(images.to(classifier.device)), labels[indices].to(classifier.device)
            )
            share = len(indices) / size  # of the batch
            value = float(processes.sum((loss.detach() * share).cpu()))
            if not math.isfinite(value):
                raise ClassifierError(
                    f"the loss is {value} at step {step} of {steps}; lower "
                    "classifier.finetune.learning_rate and run again"
                )
            optimizer.zero_grad()
            # The gradients of the processes are averaged; the loss is a mean over the batch.
            (loss * share * processes.count).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            running += value
            advance(1, f"loss {value:.4f}")
            if step % order.steps_an_epoch == 0:
                history.append(
                    {
                        "epoch": step // order.steps_an_epoch,
                        "loss": running / order.steps_an_epoch,
                        "validation_map": validation_map(
                            classifier, validation, settings, processes
                        ),
                    }
                )
                running = 0.0
                logger.info("epoch %d: loss %.4f, validation mAP %s", *history[-1].values())
            due = step % order.steps_an_epoch == 0 or step % CHECKPOINT_STEPS == 0
            if due and processes.first:
                _save(checkpoint, classifier, optimizer, step, running, history)
    classifier.eval()
    return history


@torch.inference_mode()
def validation_map(
    classifier: Classifier,
    items: Sequence[Item],
    settings: FinetuneSettings,
    processes: Processes | None = None,
) -> float | None:
    """Mean over classes of average precision, whole images at the middle training size."""
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


def _save(
    path: Path,
    classifier: Classifier,
    optimizer: torch.optim.Optimizer,
    step: int,
    running: float,
    history: list[dict[str, Any]],
) -> None:
    tensors = {f"model.{k}": v for k, v in classifier.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        if state.get("momentum_buffer") is not None:
            tensors[f"momentum.{number}"] = state["momentum_buffer"]
    write_tensors(
        path,
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
        {"kind": "checkpoint", "step": step, "running": running, "history": history},
    )


def _resume(
    path: Path, classifier: Classifier, optimizer: torch.optim.Optimizer
) -> tuple[int, float, list[dict[str, Any]]]:
    if not path.is_file():
        return 0, 0.0, []
    tensors, metadata = read_tensors(path)
    try:
        classifier.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        )
    except RuntimeError as error:
        raise ArtefactError(
            f"the checkpoint {path} does not fit this classifier "
            f"({' '.join(str(error).split()):.200}...); delete it to start anew"
        ) from None
    state = optimizer.state_dict()
    state["state"] = {
        int(k.removeprefix("momentum.")): {"momentum_buffer": v}
        for k, v in tensors.items()
        if k.startswith("momentum.")
    }
    optimizer.load_state_dict(state)
    logger.info("fine-tuning goes on at step %d", metadata["step"])
    return metadata["step"], metadata["running"], metadata["history"]
