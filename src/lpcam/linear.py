"""Solver of the linear probe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lpcam.errors import ClassifierError
from lpcam.parallel import one_thread
from lpcam.presets import ProbeSettings


def fit_head(
    pooled: Tensor, labels: Tensor, settings: ProbeSettings, classes: Sequence[str]
) -> Tensor:
    """Fit the rows that minimise the multi-label soft margin loss on pooled features.

    For each class, the mean over samples of the binary cross-entropy of its logit plus
    weight_decay / 2 times the squared norm of its row; so a row does not depend on the number of
    other classes. The problem is convex. L-BFGS in double precision, from zero.

    Args:
        pooled: (M, V, C), V views of each of M images.
        labels: (M, N) multi-hot.
        settings: weight decay and most iterations.
        classes: the N names, for the message.

    Returns:
        (N, C) float32, the rows w_n.

    Raises:
        ClassifierError: if a class has no image.

    Example:
        >>> settings = ProbeSettings.from_preset("default", weight_decay=0.1)
        >>> rows = fit_head(torch.eye(2)[:, None], torch.eye(2), settings, ["cat", "dog"])
        >>> (rows > 0).tolist()
        [[True, False], [False, True]]
    """
    rows = pooled.flatten(0, 1).double()
    targets = labels.repeat_interleave(pooled.shape[1], dim=0).double()
    counts = zip(classes, labels.sum(0).tolist(), strict=True)
    absent = [name for name, total in counts if total == 0]
    if absent:
        raise ClassifierError(
            f"no training image is labelled {', '.join(absent)}; label some, or leave them out of "
            "data.classes"
        )
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
