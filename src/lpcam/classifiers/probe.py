"""A linear probe: a linear head fitted to the pooled features of a frozen backbone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lpcam.classifiers.classifier import Classifier
from lpcam.classifiers.features import FeatureStore, image_pyramid
from lpcam.data.dataset import Item
from lpcam.data.images import read_image, resize_long_side
from lpcam.runtime.errors import ClassifierError, PrototypeError
from lpcam.runtime.files import read_tensors, write_tensors
from lpcam.runtime.parallel import Sharing, one_thread
from lpcam.runtime.progress import progress
from lpcam.runtime.settings import PresetModel


def mean_average_precision(logits: Tensor, labels: Tensor) -> float | None:
    """Mean over classes of the average precision of image-level predictions.

    The average precision of a class is the mean, over its positive images, of the precision among
    the images that score at least as high.

    Args:
        logits: (M, N).
        labels: (M, N), positive if > 0. A class without a positive image is not counted.

    Returns:
        A fraction, or None if no class has a positive image.

    Example:
        >>> mean_average_precision(torch.tensor([[2.0], [1.0]]), torch.tensor([[0], [1]]))
        0.5
    """
    values = []
    for scored, present in zip(logits.T, labels.T > 0, strict=True):
        if not present.any():
            continue
        positive = scored[present]
        at_least = scored[None, :] >= positive[:, None]
        hits = (at_least & present[None, :]).sum(1)
        values.append((hits / at_least.sum(1)).mean().item())
    return float(np.mean(values)) if values else None


class ProbeSettings(PresetModel):
    """How a linear head is fitted to the pooled features of a frozen backbone."""

    table: ClassVar[str] = "probe"
    preset: str = "default"

    long_side: Annotated[int, Field(ge=16)] | None
    """Long side, in pixels, at which features are pooled; smaller images are enlarged to it. Null
    pools at the image's own size, so that the maps need no second pass at scale 1."""
    mirror: bool
    """Whether the mirrored image is a second sample."""
    weight_decay: Annotated[float, Field(ge=0.0)]
    """L2 penalty: weight_decay / 2 times the squared norm of each row, beside its mean loss."""
    max_iterations: Annotated[int, Field(ge=1)]
    """Of L-BFGS on the whole set at once."""


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


logger = logging.getLogger(__name__)


SHARD = 128
"""Images whose pooled features share a file; a resumed run skips complete files."""


@one_thread()
def fit_probe(
    classifier: Classifier,
    training: Sequence[Item],
    validation: Sequence[Item],
    settings: ProbeSettings,
    *,
    pooled: Tensor,
    refit: bool,
) -> list[dict[str, Any]]:
    """Fit the classifier's head in place; its backbone does not change.

    Args:
        classifier: whose head is fitted.
        training: images to fit the head to.
        validation: images whose mAP is measured with the head fitted to ``training``.
        settings: penalty and iterations of the solver.
        pooled: (M, V, C) of training and then validation images, from :func:`pooled_features`.
        refit: after the measurement, fit again to training and validation images together.

    Returns:
        one record: ``epoch`` 1, ``loss`` on the training images without the penalty,
        ``validation_map``.

    Raises:
        ClassifierError: if a class has no training image.

    Example:
        >>> from lpcam.classifiers.classifier import Preprocessing
        >>> plain = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        >>> classifier = Classifier(torch.nn.AvgPool2d(8), ["cat", "dog"], plain)
        >>> items = [Item("a", Path("a.png"), (0,)), Item("b", Path("b.png"), (1,))]
        >>> settings = ProbeSettings.from_preset("default")
        >>> pooled = torch.eye(3)[:2, None]
        >>> [record] = fit_probe(classifier, items, [], settings, pooled=pooled, refit=False)
        >>> record["validation_map"], (classifier.weight[:, 0] > 0).tolist()
        (None, [True, False])
    """
    labels = multi_hot([*training, *validation], len(classifier.classes))
    count = len(training)
    weight = fit_head(pooled[:count], labels[:count], settings, classifier.classes)
    validation_map = None
    if validation:
        logits = pooled[count:, 0] @ weight.T
        validation_map = mean_average_precision(logits, labels[count:])
    loss = float(F.multilabel_soft_margin_loss(pooled[:count, 0] @ weight.T, labels[:count]))
    shown = "unknown" if validation_map is None else f"{validation_map:.3f}"
    logger.info("linear probe: loss %.4f, validation mAP %s", loss, shown)
    if refit and validation:
        weight = fit_head(pooled, labels, settings, classifier.classes)
    with torch.no_grad():
        classifier.head.weight.copy_(weight)
    return [{"epoch": 1, "loss": loss, "validation_map": validation_map}]


def multi_hot(items: Sequence[Item], classes: int) -> Tensor:
    """Image-level labels (len(items), classes) float32, 1 for present classes.

    Example:
        >>> multi_hot([Item("a", Path("a.png"), (0, 2))], 3)
        tensor([[1., 0., 1.]])
    """
    labels = torch.zeros(len(items), classes)
    for row, item in enumerate(items):
        labels[row, list(item.labels)] = 1.0
    return labels


def pooled_features(
    items: Sequence[Item],
    settings: ProbeSettings,
    store: FeatureStore,
    folder: Path,
    sharing: Sharing,
) -> Tensor | None:
    """Globally pooled features of each image and, with ``settings.mirror``, of its mirror image.

    Complete shards in ``folder`` are read instead of computed again.

    Args:
        items: the images.
        settings: ``long_side`` (pixels) that images are resized to, and ``mirror``.
        store: gives the features if ``settings.long_side`` is None (with its flip if
            ``settings.mirror``); otherwise its classifier does.
        folder: folder of the shards, used for this classifier, list and settings only, by all
            processes.
        sharing: how images are shared among processes, threads and batches.

    Returns:
        (len(items), 1 or 2, C) float32 in the first process, None in the others.

    Raises:
        ClassifierError, PrototypeError: if features hold NaN or Inf.
    """
    mine = sharing.mine(items)
    processes = sharing.processes
    shards = f"of-{processes.count}-by-{sharing.batch}"  # shards of other shares do not fit

    @torch.inference_mode()
    def pool(batch: list[Item]) -> Tensor:
        return _pooled(batch, settings, store)

    with progress("pooled features", len(mine)) as advance:
        for start in range(0, len(mine), SHARD):
            part = mine[start : start + SHARD]
            path = folder / f"pooled-{processes.rank}-{shards}-{start:07d}.safetensors"
            if path.is_file():
                advance(len(part), "")
                continue
            rows: dict[str, Tensor] = {}
            batches = sharing.batches(part)
            for batch, pooled in zip(batches, sharing.map(pool, batches), strict=True):
                for item, row in zip(batch, pooled, strict=True):
                    rows[f"image {item.id}"] = row  # a bare id may be a reserved name
                advance(len(batch), "")
            write_tensors(path, rows, {"kind": "pooled features"})
    processes.wait()
    if not processes.first:
        return None
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"pooled-*-{shards}-*.safetensors")):
        found.update(read_tensors(path)[0])
    return torch.stack([found[f"image {item.id}"] for item in items])


def _pooled(batch: Sequence[Item], settings: ProbeSettings, store: FeatureStore) -> Tensor:
    if settings.long_side is None:
        (pair,) = store.pairs(batch, (1.0,))
    else:
        images = [resize_long_side(read_image(item.image), settings.long_side) for item in batch]
        try:
            (pair,) = image_pyramid(
                store.classifier,
                np.stack(images),
                (1.0,),
                flip=settings.mirror,
                precision=store.precision,
            )
        except PrototypeError as error:
            names = ", ".join(repr(item.id) for item in batch)
            raise ClassifierError(f"image {names}: {error}") from None
    views = [pair.features]
    if settings.mirror and pair.mirrored is not None:
        views.append(pair.mirrored)
    return torch.stack([view.mean((-2, -1)) for view in views], dim=1).cpu()
