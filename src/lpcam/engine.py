"""The training loop that all networks here share: order, schedule, checkpoints, processes.

What happens to each image depends on the seed, the epoch and the image alone, and each epoch's
order on the seed and the epoch, so that a run that was stopped in the middle of an epoch goes on to
the very same weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lpcam.errors import ArtefactError, ClassifierError
from lpcam.processes import Processes
from lpcam.progress import progress
from lpcam.storage import read_tensors, write_tensors

logger = logging.getLogger(__name__)
CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_STEPS = 50
"""Steps between checkpoints; beside them, one stands at the end of every epoch."""

Sample = TypeVar("Sample")


class Schedule(Protocol):
    """What the loop must know of a network's settings."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def power(self) -> float: ...


# -- Order and schedule ------------------------------------------------------------------------


class Order:
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


def poly(step: int, steps: int, power: float) -> float:
    """Factor (1 - t/T)^power of the learning rate at step t of T."""
    return math.pow(1.0 - step / steps, power)


def random_window(length: int, crop: int, generator: np.random.Generator) -> tuple[slice, slice]:
    """Where along one axis a crop is taken from, and where in the crop it goes.

    A longer axis is cut at random, a shorter one is placed at random in the crop.

    Returns:
        the part of the image's axis and that of the crop's, equally long.
    """
    offset = int(generator.integers(0, abs(length - crop) + 1))
    taken = min(length, crop)
    moved, first = slice(offset, offset + taken), slice(0, taken)
    return (moved, first) if length > crop else (first, moved)


# -- Training ----------------------------------------------------------------------------------


def run(
    module: nn.Module,
    groups: Sequence[dict[str, Any]],
    samples: Dataset[Sample],
    count: int,
    loss: Callable[[Any], Tensor],
    settings: Schedule,
    *,
    label: str,
    section: str,
    seed: int,
    folder: Path,
    workers: int,
    processes: Processes,
    after_epoch: Callable[[], dict[str, Any]] = dict,
) -> list[dict[str, Any]]:
    """SGD with a poly schedule, with checkpoints in ``folder`` from which a stopped run goes on.

    Args:
        module: whose state a checkpoint holds.
        groups: of the optimiser: ``params`` and ``lr``. Groups without parameters are left out.
        samples: by (epoch, index), index below ``count``.
        loss: of a batch of this process: its part of the loss of the whole batch, so that the
            processes' parts add up to it. It sets the training mode.
        label: of the progress, as "fine-tuning".
        section: of the recipe, where the settings are, for messages.
        workers: processes that make samples; 0 makes them in this one.
        after_epoch: what else an epoch's record holds.

    Returns:
        one record an epoch: ``epoch``, mean ``loss``, and those of ``after_epoch``.

    Raises:
        ClassifierError: if a batch has fewer images than there are processes, or the loss is no
            longer finite.
        ArtefactError: if a checkpoint is damaged or of other weights.
    """
    size = min(settings.batch_size, count)
    if size < processes.count:
        raise ClassifierError(
            f"a batch of {size} images cannot be shared out among {processes.count} processes; "
            f"start fewer, or raise {section}.batch_size"
        )
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    base = [float(group["lr"]) for group in optimizer.param_groups]
    checkpoint = folder / CHECKPOINT
    step, running, history = _resume(checkpoint, module, optimizer, label)
    order = Order(count, settings.batch_size, settings.epochs, seed, step, processes)
    steps = order.steps_an_epoch * settings.epochs
    loader = DataLoader(samples, batch_sampler=order, num_workers=workers, persistent_workers=False)
    with progress(label, steps, done=step) as advance:
        for batch in loader:
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * poly(step, steps, settings.power)
            part = loss(batch)
            value = float(processes.sum(part.detach().cpu()))
            if not math.isfinite(value):
                raise ClassifierError(
                    f"the loss is {value} at step {step} of {steps}; lower "
                    f"{section}.learning_rate and run again"
                )
            optimizer.zero_grad()
            # The gradients of the processes are averaged; the loss is their sum.
            (part * processes.count).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            running += value
            advance(1, f"loss {value:.4f}")
            if step % order.steps_an_epoch == 0:
                epoch, mean = step // order.steps_an_epoch, running / order.steps_an_epoch
                history.append({"epoch": epoch, "loss": mean, **after_epoch()})
                running = 0.0
                record = ", ".join(f"{k} {_shown(v)}" for k, v in history[-1].items())
                logger.info("%s: %s", label, record)
            due = step % order.steps_an_epoch == 0 or step % CHECKPOINT_STEPS == 0
            if due and processes.first:
                _save(checkpoint, module, optimizer, step, running, history)
    return history


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _save(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    running: float,
    history: list[dict[str, Any]],
) -> None:
    tensors = {f"model.{k}": v for k, v in module.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        if state.get("momentum_buffer") is not None:
            tensors[f"momentum.{number}"] = state["momentum_buffer"]
    write_tensors(
        path,
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
        {"kind": "checkpoint", "step": step, "running": running, "history": history},
    )


def _resume(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, label: str
) -> tuple[int, float, list[dict[str, Any]]]:
    if not path.is_file():
        return 0, 0.0, []
    tensors, metadata = read_tensors(path)
    try:
        module.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        )
    except RuntimeError as error:
        raise ArtefactError(
            f"the checkpoint {path} does not fit this {type(module).__name__.lower()} "
            f"({' '.join(str(error).split()):.200}...); delete it to start anew"
        ) from None
    state = optimizer.state_dict()
    state["state"] = {
        int(k.removeprefix("momentum.")): {"momentum_buffer": v}
        for k, v in tensors.items()
        if k.startswith("momentum.")
    }
    optimizer.load_state_dict(state)
    logger.info("%s goes on at step %d", label, metadata["step"])
    return metadata["step"], metadata["running"], metadata["history"]
