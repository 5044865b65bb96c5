"""Learning-rate schedules, parameter groups and frozen parameters."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from lpcam.runtime.errors import ClassifierError


class Schedule(Protocol):
    """Settings of training by SGD for a number of epochs."""

    epochs: int
    batch_size: int
    momentum: float
    weight_decay: float
    power: float


class Rates(Protocol):
    """Settings of the learning rates of new layers and biases."""

    learning_rate: float
    head_multiplier: float
    bias_multiplier: float
    weight_decay: float


def poly(step: int, steps: int, power: float) -> float:
    """Factor (1 - t/T)^power of the learning rate at step t of T."""
    return math.pow(1.0 - step / steps, power)


def sgd(groups: Sequence[dict[str, Any]], settings: Schedule) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay; groups without parameters are left out."""
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def parameter_groups(
    network: nn.Module, heads: Sequence[str], settings: Rates
) -> list[dict[str, Any]]:
    """Trainable parameters in groups: weights and biases of new layers, and of the others.

    Names of the new layers' parameters begin with one of ``heads``. Biases have no weight decay.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith(tuple(heads)), name.endswith("bias"))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": settings.learning_rate
            * (settings.head_multiplier if head else 1.0)
            * (settings.bias_multiplier if bias else 1.0),
            "weight_decay": 0.0 if bias else settings.weight_decay,
        }
        for (head, bias), parameters in groups.items()
    ]


def freeze(backbone: nn.Module, prefixes: Sequence[str], *, norms: bool = False) -> None:
    """Freeze the parameters of a backbone :func:`names_below` a prefix; the others train.

    With ``norms`` the parameters of its batch norms are frozen too.
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

    A prefix that matches nothing is a ClassifierError, which lists the stages.

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
