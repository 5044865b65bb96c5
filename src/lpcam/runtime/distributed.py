"""Several processes or machines working on one run, over torch.distributed.

They are started by ``torchrun``; accelerate joins them and chooses each one's device. What they
make they write into the run folder, which all must see; the only things exchanged otherwise are
"I am ready" and small sums.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from lpcam.runtime.errors import RecipeError

PATIENCE = timedelta(days=1)
"""How long a process waits for slower ones. A process that dies is noticed at once: torchrun stops
the others of its machine, and their connections to other machines break. A machine that vanishes
without a word is noticed by torchrun's own heartbeat."""


class Processes:
    """This process among those of a run; alone, unless :func:`join` finds others.

    Attributes:
        rank: number of this process, from 0.
        count: of all processes.
        here: of those on this machine.
    """

    def __init__(self, rank: int = 0, count: int = 1, here: int = 1, group: Any = None) -> None:
        self.rank = rank
        self.count = count
        self.here = here
        self._group = group

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Go on when every process has come to this place."""
        if self.count > 1:
            torch.distributed.barrier(group=self._group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes of a tensor of equal shape, on the CPU; the same in all."""
        if self.count == 1:
            return tensor
        total = tensor.detach().cpu().clone()
        torch.distributed.all_reduce(total, group=self._group)
        return total

    def replicate(self, module: nn.Module) -> nn.Module:
        """The module, with gradients averaged over the processes at every backward pass."""
        if self.count == 1:
            return module
        from accelerate import Accelerator, DistributedDataParallelKwargs  # noqa: PLC0415

        on_cpu = next(module.parameters()).device.type == "cpu"
        # Some backbones have layers behind the features, which get no gradient.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[unused])
        replica: nn.Module = accelerator.prepare_model(module)
        return replica


def is_first() -> bool:
    """Whether this process is the one that speaks for a run, by what ``torchrun`` has set."""
    return not _among_others() or os.environ.get("RANK", "0") == "0"


def _among_others() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave() -> None:
    """Part from the other processes, when all runs of this one have gone well."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def join(device: str) -> tuple[Processes, torch.device | None]:
    """Join the processes that ``torchrun`` has started, if it has.

    Args:
        device: "auto", "cpu" or "cuda", as the recipe has it.

    Returns:
        this process among the others, and its device (None: it is alone and may choose).

    Raises:
        RecipeError: if accelerate is not installed, one certain GPU is given to all, or there are
            fewer GPUs than processes.
    """
    if not _among_others():
        return Processes(), None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device not in ("auto", "cpu", "cuda") and not device.startswith("cuda:"):
        raise RecipeError(f"the device {device!r} cannot be used here; use 'auto', 'cuda' or 'cpu'")
    if ":" in device:
        raise RecipeError(
            f"run.device {device!r} names one GPU for all processes; use 'auto' or 'cuda', and "
            "each takes its own"
        )
    try:
        from accelerate import PartialState  # noqa: PLC0415 - an extra
    except ImportError:
        raise RecipeError(
            "several processes need accelerate; install it with pip install 'lpcam[distributed]'"
        ) from None
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if not on_cpu and torch.cuda.device_count() < here:
        raise RecipeError(
            f"{here} processes on this machine need a GPU each, but there are "
            f"{torch.cuda.device_count()}; start fewer, or set run.device to 'cpu'"
        )
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    return (
        Processes(
            state.process_index,
            state.num_processes,
            here,
            # GPUs have a group of their own; waiting must not occupy them.
            torch.distributed.new_group(backend="gloo", timeout=PATIENCE),
        ),
        state.device,
    )
