"""A linear head: fitted to pooled features, and its mean average precision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lpcam.runtime.errors import ClassifierError, shortened
from lpcam.runtime.parallel import one_thread
from lpcam.runtime.settings import PresetModel


class ProbeSettings(PresetModel):
    """How a linear head is fitted to the pooled features of a frozen backbone."""

    table: ClassVar[str] = "probe"
    preset: str = "default"

    long_side: Annotated[int, Field(ge=16)] | None
    """Long side, in pixels, at which features are pooled; smaller images are enlarged to it. Null
    pools at the image's own size, so that the maps need no second pass at scale 1."""
    mirror: bool
    """Whether the mirrored image is added as a second sample."""
    weight_decay: Annotated[float, Field(ge=0.0)]
    """L2 penalty on the rows of the head: half of this times the squared norm of each row."""
    max_iterations: Annotated[int, Field(ge=1)]
    """Maximum number of L-BFGS iterations, each on the whole set."""


def mean_average_precision(logits: Tensor, labels: Tensor) -> float | None:
    """Mean over classes of the average precision of logits (M, N); None without positive labels."""
    values = []
    for scored, present in zip(logits.T, labels.T > 0, strict=True):
        if not present.any():
            continue
        positive = scored[present]
        at_least = scored[None, :] >= positive[:, None]
        hits = (at_least & present[None, :]).sum(1)
        values.append((hits / at_least.sum(1)).mean().item())
    return float(np.mean(values)) if values else None


def checked_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Class names as a tuple; ClassifierError for one string, no name, or what is no string."""
    if isinstance(classes, str):
        raise ClassifierError(
            f"classes must be a list of names, got the string {classes!r}; give [{classes!r}]"
        )
    names = tuple(classes) if isinstance(classes, Iterable) and not isinstance(classes, Set) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ClassifierError(f"classes must be a list of names, got {classes!r:.60}")
    return names


def fit_head(
    pooled: Tensor, labels: Tensor, settings: ProbeSettings, classes: Sequence[str]
) -> Tensor:
    """Rows (N, C) for pooled features (M, V, C) of V views, and multi-hot labels (M, N)."""
    if absent := [name for name, own in zip(classes, labels.T, strict=True) if not own.any()]:
        raise ClassifierError(
            f"no training image is labelled {shortened(absent)}; label some, or leave these "
            "classes out"
        )
    rows = pooled.flatten(0, 1).double()
    targets = labels.repeat_interleave(pooled.shape[1], dim=0).double()
    weight = torch.zeros(labels.shape[1], rows.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=settings.max_iterations,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.multilabel_soft_margin_loss(rows @ weight.T, targets) * weight.shape[0]
        loss = loss + settings.weight_decay / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad(), one_thread():
        optimizer.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach().float()
