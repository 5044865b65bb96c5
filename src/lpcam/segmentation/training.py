"""Training a segmenter on pseudo masks (specification of segmentation, sections 1 to 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack, cast

import torch
from torch import Tensor, nn

from lpcam.data.dataset import Item
from lpcam.data.images import limit_long_side
from lpcam.data.masks import enlarge_labels
from lpcam.evaluation.segmentation import confusion, scores, truth_labels
from lpcam.runtime.distributed import Processes
from lpcam.runtime.errors import ClassifierError
from lpcam.runtime.files import read_tensors
from lpcam.segmentation import inference as predict
from lpcam.segmentation.augmentation import make_sample
from lpcam.segmentation.losses import segmentation_loss
from lpcam.segmentation.networks.base import Network
from lpcam.segmentation.segmenter import Segmenter
from lpcam.segmentation.settings import SegmenterSettings, SegmentTestSettings
from lpcam.training import loop as engine
from lpcam.training.optim import names_below, poly

Precision = Literal["float32", "bfloat16"]
RECORDS = 100  #: Number of history records in a whole training.
CHECKPOINTS = 40  #: Number of checkpoints in a whole training, besides those at the records.
BETA2 = 0.999  #: Second beta of AdamW (section 3).


@dataclass(frozen=True)
class Validation:
    """Images with true masks that measure the mIoU during a training."""

    items: Sequence[Item]
    settings: SegmentTestSettings
    times: int  #: Over the whole training, evenly spread; the last is at its end.
    best: Path  #: Where the weights with the highest mIoU are kept, beside the last ones.
    maximum_side: int  #: Long side, in pixels, at which a longer image is segmented.


def plan_of(settings: SegmenterSettings, count: int, validations: int = 0) -> engine.Plan:
    """Training plan for a list of ``count`` images."""
    batch = min(settings.batch_size, count)
    steps = settings.iterations or (settings.epochs or 0) * (count // batch)

    def rate(step: int) -> float:
        factor = poly(step - step % settings.refresh, steps, settings.power)
        if step < settings.warmup:
            low = settings.warmup_factor
            factor *= low + (1.0 - low) * step / settings.warmup
        return factor

    record, save = max(1, steps // max(RECORDS, validations)), max(1, steps // CHECKPOINTS)
    return engine.Plan(steps, batch, record, rate, settings.accumulation, save)


def optimizer_of(
    groups: Mapping[str, Sequence[nn.Parameter]], settings: SegmenterSettings
) -> torch.optim.Optimizer:
    """The optimiser of a network's parameter groups, each with its rate and decay."""
    rate, decay = settings.learning_rate, settings.weight_decay
    values = {
        "backbone": (rate, decay),
        "head": (rate * settings.head_multiplier, decay),
        "head_bias": (rate * settings.head_bias_multiplier, settings.head_bias_weight_decay),
        "no_decay": (rate, 0.0),
    }
    wanted = [
        {"params": list(parameters), "lr": values[name][0], "weight_decay": values[name][1]}
        for name, parameters in groups.items()
        if parameters
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(wanted, lr=rate, betas=(settings.momentum, BETA2))
    return torch.optim.SGD(wanted, lr=rate, momentum=settings.momentum)


class _Outputs(nn.Module):
    """A network's training outputs as a forward pass, for replication."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, images: Tensor) -> Any:
        return self.network.outputs(images)


def train_segmenter(
    segmenter: Segmenter,
    pairs: Sequence[tuple[Item, Path]],
    settings: SegmenterSettings,
    *,
    precision: Precision = "float32",
    validation: Validation | None = None,
    **options: Unpack[engine.TrainingOptions],
) -> engine.History:
    """Train in place, with checkpoints from which a stopped training resumes.

    Args:
        pairs: images and masks of :func:`lpcam.segmentation.augmentation.check_masks`.
        precision: that of the network's passes; weights, loss and optimiser are in float32.
        validation: when to measure the mIoU; None: never.

    Returns:
        some hundred records: ``epoch``, ``step``, mean ``loss``, and ``validation_miou`` of some.

    Raises:
        ClassifierError: if ``freeze`` matches nothing, the loss is no longer finite, or a batch
            cannot be shared out.
        ArtefactError: if a checkpoint is damaged or of another network.
    """
    processes = options.get("processes") or Processes()
    network = segmenter.network
    check_batch(segmenter, settings, len(pairs), processes)
    if processes.count > 1 and _trains_batch_norms(network):
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        segmenter.network = network
    named = {
        name.removeprefix("backbone.").removeprefix("classifier.backbone."): parameter
        for name, parameter in network.named_parameters()
    }
    for name in names_below(named, settings.freeze):
        named[name].requires_grad_(False)
    times = 0 if validation is None else validation.times
    plan = plan_of(settings, len(pairs), times)
    due = validation_steps(plan, times)
    about = segmenter.classes, segmenter.preprocessing

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            outputs = model(images)
        kind, meet = settings.loss, settings.labels
        return segmentation_loss(outputs, labels, kind=kind, meet=meet, total=processes.sum)

    def at_record(step: int) -> dict[str, Any]:
        if validation is None or step not in due:
            return {}
        found = validate(segmenter, validation, processes)
        best = -1.0
        if validation.best.is_file():
            best = read_tensors(validation.best)[1]["made_by"]["validation_miou"]
        if processes.first and found > best:
            segmenter.save(validation.best, {"validation_miou": found, "step": step})
        return {"validation_miou": found}

    history = engine.run(
        network,
        optimizer_of(cast(Network, network).parameter_groups(), settings),
        lambda place: make_sample(pairs, *about, settings, options["seed"], place),
        len(pairs),
        loss,
        plan,
        label="training a segmenter",
        section="segment.training",
        outputs=_Outputs(network),
        at_record=at_record,
        **options,
    )
    segmenter.eval()
    return history


def check_batch(
    segmenter: Segmenter, settings: SegmenterSettings, count: int, processes: Processes
) -> None:
    """Refuse batches of ``count`` images that the network or the processes cannot take."""
    part = engine.smallest_part(plan_of(settings, count), count, processes, "segment.training")
    if not _trains_batch_norms(segmenter.network):
        return
    name = type(segmenter.network).__name__
    if processes.count > 1 and segmenter.device.type != "cuda":
        raise ClassifierError(
            f"{name} trains batch norms, whose statistics several processes can share on GPUs "
            "alone; train it in one process on a CPU"
        )
    if part < 2:
        raise ClassifierError(
            f"{name} trains batch norms, which need two images at a time, but a forward pass has "
            f"{part}; raise segment.training.batch_size or give more images"
        )


def _trains_batch_norms(network: nn.Module) -> bool:
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    return any(p.requires_grad for norm in norms for p in norm.parameters())


def validation_steps(plan: engine.Plan, times: int) -> set[int]:
    """The steps, among those of a plan's records, after which the mIoU is measured."""
    records = -(-plan.steps // plan.record)
    count = min(times, records)
    steps = {round((k + 1) * records / count) * plan.record for k in range(count)}
    return {min(step, plan.steps) for step in steps}


@torch.inference_mode()
def validate(
    segmenter: Segmenter, validation: Validation, processes: Processes | None = None
) -> float:
    """mIoU over background and classes, of images with true masks; without a CRF."""
    processes = processes or Processes()
    segmenter.eval()
    labels = len(segmenter.classes) + 1
    counts = torch.zeros(labels, labels, dtype=torch.int64)
    for item in validation.items[processes.rank :: processes.count]:
        assert item.mask is not None
        truth = truth_labels(item.read_mask(), segmenter.classes)
        image = limit_long_side(item.read(), validation.maximum_side)
        found = predict.labels(predict.probabilities(segmenter, image, validation.settings))
        counts += confusion(truth, enlarge_labels(found.cpu(), truth.shape), labels)
    return scores(processes.sum(counts), segmenter.classes.names).miou
