"""The training loop that all networks share: order, schedule, checkpoints, processes.

The augmentation of an image depends only on seed, epoch and image, and the order of an epoch only
on seed and epoch, so a run that is stopped within an epoch resumes to exactly the same weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Required, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lpcam.runtime.distributed import Processes
from lpcam.runtime.errors import ArtefactError, ClassifierError
from lpcam.runtime.files import read_tensors, write_tensors
from lpcam.runtime.progress import progress
from lpcam.training.optim import poly

logger = logging.getLogger(__name__)
CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_FORMAT = 2
CHECKPOINT_STEPS = 50  #: Steps between checkpoints; one is also written with every record.
Sample = TypeVar("Sample")
History = list[dict[str, Any]]  #: Records of a training, as JSON.


class Place(NamedTuple):
    """A sample of the list, in an epoch and a step; the key of a training data set."""

    epoch: int
    sample: int
    step: int


@dataclass(frozen=True)
class Plan:
    """Number and size of the training steps, and their learning rates."""

    steps: int
    batch: int  #: Samples per step over all processes, at most those of the list.
    record: int  #: Steps between records of the history.
    rate: Callable[[int], float]  #: Factor of the learning rates at a step, counted from 0.
    accumulation: int = 1  #: Forward passes per step, each with an equal part of its samples.
    checkpoint: int | None = None  #: Steps between checkpoints; None: CHECKPOINT_STEPS.

    @classmethod
    def of_epochs(
        cls, settings: Any, count: int, rate: Callable[[int], float] | None = None
    ) -> Plan:
        """Epochs over ``count`` samples, a record each; the rate is the poly schedule's if None."""
        batch = min(settings.batch_size, count)
        an_epoch = count // batch
        steps = settings.epochs * an_epoch
        rate = rate or (lambda step: poly(step, steps, settings.power))
        return cls(steps, batch, an_epoch, rate)


class TrainingOptions(TypedDict, total=False):
    """Arguments that every training takes and hands on to :func:`run`."""

    seed: Required[int]  #: Seed of order, augmentation and dropout.
    folder: Required[Path]  #: Folder of the checkpoint.
    workers: int  #: Processes that make samples; 0 (the default) makes them in this one.
    processes: Processes  #: Processes that share each step; the default is this one alone.


class _Samples(Dataset[Sample]):
    """Training samples made on demand by a function of their place, picklable if it is."""

    def __init__(self, make: Callable[[Place], Sample]) -> None:
        self.make = make

    def __getitem__(self, place: Place) -> Sample:
        return self.make(place)


@dataclass(frozen=True)
class Order:
    """This process's samples of each forward pass, from a given step to the end."""

    count: int
    plan: Plan
    seed: int
    first_step: int
    processes: Processes

    @property
    def steps_an_epoch(self) -> int:
        """Steps of one pass over the list; an incomplete last batch is dropped."""
        return self.count // min(self.plan.batch, self.count)

    def __iter__(self) -> Iterator[list[Place]]:
        batch, epoch, order = min(self.plan.batch, self.count), -1, np.arange(0)
        for step in range(self.first_step, self.plan.steps):
            if epoch != step // self.steps_an_epoch:
                epoch = step // self.steps_an_epoch
                order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            first = step % self.steps_an_epoch * batch
            for part in np.array_split(order[first : first + batch], self.plan.accumulation):
                mine = part[self.processes.rank :: self.processes.count].tolist()
                yield [Place(epoch, sample, step) for sample in mine]


def run(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    make: Callable[[Place], Sample],
    count: int,
    loss: Callable[[nn.Module, Any], Tensor],
    plan: Plan,
    *,
    label: str,
    section: str,
    seed: int,
    folder: Path,
    workers: int = 0,
    processes: Processes | None = None,
    outputs: nn.Module | None = None,
    at_record: Callable[[int], dict[str, Any]] | None = None,
) -> History:
    """Train, with checkpoints in ``folder`` from which a stopped run resumes.

    ``make`` makes the sample of a place, of ``count`` in the list; it is picklable if there are
    workers. ``loss`` is this process's part in the mean over all samples of a forward pass. It gets
    the module, or ``outputs``, a module around it, and a batch on its device.

    Returns ``epoch``, ``step``, mean ``loss`` and the values of ``at_record`` (from the number of
    steps done), every ``plan.record`` steps and at the end. ClassifierError if the loss is not
    finite, ArtefactError if a checkpoint is damaged or of other weights.
    """
    parts, processes = plan.accumulation, processes or Processes()
    smallest_part(plan, count, processes, section)
    base = [float(group["lr"]) for group in optimizer.param_groups]
    checkpoint = folder / CHECKPOINT
    step, running, history = _resume(checkpoint, module, optimizer, label)
    order = Order(count, plan, seed, step, processes)
    loader = DataLoader(_Samples(make), batch_sampler=order, num_workers=workers)
    value, model = 0.0, processes.replicate(outputs or module)
    device = next(module.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with progress(label, plan.steps, done=step) as advance, torch.random.fork_rng(devices=devices):
        for turn, batch in enumerate(loader):
            # Dropout depends only on the seed and the step, so that a resumed run repeats it.
            mixed = np.random.SeedSequence((seed, step, turn % parts, processes.rank))
            torch.manual_seed(int(mixed.generate_state(1)[0]))
            if turn % parts == 0:
                value = 0.0
                for group, rate in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = rate * plan.rate(step)
                optimizer.zero_grad()
            module.train()
            part = loss(model, [each.to(device) for each in batch]) / parts
            value += float(processes.sum(part.detach().cpu()))
            if not math.isfinite(value):
                raise ClassifierError(
                    f"the loss is {value} at step {step} of {plan.steps}; lower "
                    f"{section}.learning_rate and run again"
                )
            # The gradients of the processes are averaged; the loss is their sum.
            (part * processes.count).backward()  # type: ignore[no-untyped-call]
            if (turn + 1) % parts:
                continue
            optimizer.step()
            step += 1
            running += value
            advance(1, f"loss {value:.4f}")
            since = (step - 1) % plan.record + 1
            recorded = since == plan.record or step == plan.steps
            if recorded:
                more = {} if at_record is None else at_record(step)
                epoch = (step - 1) // order.steps_an_epoch + 1
                mean = running / since
                history.append({"epoch": epoch, "step": step, "loss": mean, **more})
                running = 0.0
                values = history[-1].items()
                shown = (f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values)
                logger.info("%s: %s", label, ", ".join(shown))
            due = recorded or step % (plan.checkpoint or CHECKPOINT_STEPS) == 0
            if due and processes.first:
                _save(checkpoint, module, optimizer, step, running, history)
    module.eval()
    return history


def smallest_part(plan: Plan, count: int, processes: Processes, section: str) -> int:
    """Images in the smallest forward pass; ClassifierError if there are more processes."""
    batch, parts = min(plan.batch, count), plan.accumulation
    size = batch // parts
    if size < processes.count:
        whole = f"a batch of {batch} images" + (f" in {parts} parts" if parts > 1 else "")
        raise ClassifierError(
            f"{whole} cannot be shared out among {processes.count} processes; start fewer, raise "
            f"{section}.batch_size, or have fewer parts (accumulation)"
        )
    return size


def _save(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    running: float,
    history: History,
) -> None:
    tensors = {f"model.{k}": v for k, v in module.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{k}": v for k, v in state.items() if v is not None}
    metadata = {
        "kind": "checkpoint",
        "format": CHECKPOINT_FORMAT,
        "step": step,
        "running": running,
        "history": history,
    }
    write_tensors(path, tensors, metadata)


def _resume(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, label: str
) -> tuple[int, float, History]:
    if not path.is_file():
        return 0, 0.0, []
    tensors, metadata = read_tensors(path)
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    try:
        if metadata.get("format") != CHECKPOINT_FORMAT:
            raise RuntimeError(f"format {metadata.get('format')}, not {CHECKPOINT_FORMAT}")
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ArtefactError(
            f"the checkpoint {path} does not fit this {type(module).__name__.lower()} "
            f"({' '.join(str(error).split()):.200}...); delete it to start again"
        ) from None
    state = optimizer.state_dict()
    state["state"] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            state["state"].setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict(state)
    logger.info("%s: resuming at step %d", label, metadata["step"])
    return metadata["step"], metadata["running"], metadata["history"]
