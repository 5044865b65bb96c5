"""Several processes or machines that work on one run, over torch.distributed.

``torchrun`` starts them; accelerate joins them and chooses each one's device. They write their
results into the run folder, which all must see, and exchange only barriers and small sums.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lpcam.runtime.errors import RecipeError, import_extra
from lpcam.runtime.parallel import ordered_map

PATIENCE = timedelta(days=1)
"""How long a process waits for slower ones; torchrun notices one that dies at once."""


@dataclass(eq=False)
class Processes:
    """This process among those of a run."""

    rank: int = 0  #: Number of this process, from 0.
    count: int = 1
    here: int = 1  #: Number of processes on this machine.
    group: Any = None  #: Process group in which they wait for each other.

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.count > 1:
            torch.distributed.barrier(group=self.group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of the processes' tensors of equal shape, on the CPU."""
        if self.count == 1:
            return tensor
        total = tensor.detach().cpu().clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def replicate(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over the processes at every backward pass."""
        if self.count == 1:
            return module
        from accelerate import Accelerator, DistributedDataParallelKwargs  # noqa: PLC0415

        on_cpu = next(module.parameters()).device.type == "cpu"
        # Some backbones have layers behind the features, which get no gradient.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        replica: nn.Module = Accelerator(cpu=on_cpu, kwargs_handlers=[unused]).prepare_model(module)
        return replica


def _among_others() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Tell whether this is the first process of a run, by the environment of ``torchrun``."""
    return not _among_others() or os.environ.get("RANK", "0") == "0"


def leave() -> None:
    """Destroy the process group after a successful run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def join(device: str) -> tuple[Processes, torch.device | None]:
    """Join the processes that ``torchrun`` started; the device is None for a process alone."""
    if not _among_others():
        return Processes(), None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.startswith("cuda:"):
        raise RecipeError(
            f"run.device {device!r} names one GPU for all processes; use 'auto' or 'cuda', and "
            "each takes its own"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"the device {device!r} cannot be used here; use 'auto', 'cuda' or 'cpu'")
    accelerate = import_extra("accelerate", "distributed", "several processes need accelerate")
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if not on_cpu and torch.cuda.device_count() < here:
        raise RecipeError(
            f"{here} processes on this machine need a GPU each, but there are "
            f"{torch.cuda.device_count()}; start fewer, or set run.device to 'cpu'"
        )
    state = accelerate.PartialState(cpu=on_cpu, timeout=PATIENCE)
    # GPUs have a group of their own; waiting must not occupy them.
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes, here, group), state.device


T = TypeVar("T")
R = TypeVar("R")


Identity = TypeVar("Identity", bound=Any)  #: Anything with an ``id``.


@dataclass(frozen=True)
class Sharing:
    """Assignment of images to processes; each image stays with one, which keeps its features."""

    processes: Processes = field(default_factory=Processes)
    workers: int = 1  #: Threads of this process, each with one batch.
    batch: int = 1  #: Maximum number of equally sized images in a backbone pass.
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """(height, width) of each image by id; all other images count as one size."""
    owner: Mapping[str, int] = field(default_factory=dict)
    """Rank of the process of each image by id; the first process does all other images."""

    def mine(self, items: Iterable[Identity]) -> list[Identity]:
        """The images of this process."""
        return [item for item in items if self.owner.get(item.id, 0) == self.processes.rank]

    def batches(self, items: Sequence[Identity]) -> list[list[Identity]]:
        """Batches of images of exactly equal size; in the order of the items if ``batch`` is 1."""
        batches: list[list[Identity]] = []
        latest: dict[tuple[int, int] | None, list[Identity]] = {}
        for item in items:
            size = self.sizes.get(item.id)
            if size not in latest or len(latest[size]) == self.batch:
                latest[size] = []
                batches.append(latest[size])
            latest[size].append(item)
        return batches

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """:func:`ordered_map` on the threads of this process."""
        return ordered_map(function, items, self.workers)
