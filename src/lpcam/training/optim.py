"""Learning-rate schedules, parameter groups and frozen parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any, Self

from pydantic import Field
from torch import nn

from lpcam.runtime.errors import ClassifierError
from lpcam.runtime.settings import PresetModel


class EpochSettings(PresetModel):
    """Length and step of a training."""

    epochs: Annotated[int, Field(ge=1)]
    """Passes over the list; more train longer."""
    batch_size: Annotated[int, Field(ge=1)]
    """Images per training step."""


class SgdRates(PresetModel):
    """Settings of SGD."""

    momentum: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Momentum of SGD; a larger one averages over more steps."""
    weight_decay: Annotated[float, Field(ge=0.0)]
    """L2 penalty on every trained weight; a larger one keeps weights smaller."""
    power: Annotated[float, Field(ge=0.0)]
    """Power p of the poly schedule lr (1 - t/T)^p; a larger one lowers the rate sooner."""


class SgdSettings(EpochSettings, SgdRates):
    """Settings of training by SGD for a number of epochs."""


def poly(step: int, steps: int, power: float) -> float:
    """Factor (1 - t/T)^power of the learning rate at step t of T."""
    return math.pow(1.0 - step / steps, power)


def parameter_groups(
    network: nn.Module, values: Callable[[str, nn.Parameter], tuple[float, float]]
) -> list[dict[str, Any]]:
    """The trained parameters by their learning rate and weight decay, ``values`` of their names."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(values(name, parameter), []).append(parameter)
    return [{"params": g, "lr": rate, "weight_decay": d} for (rate, d), g in groups.items()]


def freeze(backbone: nn.Module, prefixes: Sequence[str], *, norms: bool = False) -> None:
    """Freeze parameters :func:`names_below` a prefix, and with ``norms`` all batch norms."""
    named = dict(backbone.named_parameters())
    frozen = names_below(named, prefixes)
    for name, parameter in named.items():
        parameter.requires_grad_(name not in frozen)
    for norm in batch_norms(backbone) if norms else ():
        norm.requires_grad_(False)


def batch_norms(network: nn.Module) -> list[nn.Module]:
    """All batch norms of a network."""
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class FrozenStatistics(nn.Module):
    """A network whose batch norms keep their statistics."""

    def train(self, mode: bool = True) -> Self:
        """Set training mode, but keep every batch norm in evaluation mode."""
        super().train(mode)
        for norm in batch_norms(self):
            norm.eval()
        return self


def names_below(names: Collection[str], prefixes: Sequence[str]) -> set[str]:
    """The dotted names at or below a prefix; ClassifierError if a prefix matches nothing."""
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
