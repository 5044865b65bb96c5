"""Early layers of a backbone: which they are, and their maps from a pass that is made anyway."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lpcam.runtime.errors import ClassifierError

COUNT = 2  #: Early layers: the last of the usual strides 8 and 16.
SIDE = 224  #: Side, in pixels, of the image that shows the outputs of a model's layers.


def early_layers(model: nn.Module, size: tuple[int, int] = (SIDE, SIDE)) -> tuple[str, ...]:
    """Names of the two layers before the last level of a backbone: usually of strides 8 and 16.

    timm models list the last layer of each level themselves. Of others, a level ends where a map
    becomes smaller. A transformer whose levels all have one size gives the blocks at a third and
    at two thirds of its depth.

    Args:
        model: a timm backbone, or any image classifier that takes RGB images.
        size: (H, W) of the image on which layers of other models are looked at.

    Raises:
        ClassifierError: if the model has no two such layers.

    Example:
        >>> import timm
        >>> early_layers(timm.create_model("resnet18", num_classes=0))
        ('layer2', 'layer3')
    """
    info = getattr(model, "feature_info", None)
    if info is not None:
        levels = [
            (str(one["module"]), int(one["reduction"])) for one in getattr(info, "info", info)
        ]
    else:
        levels = _levels(model, size)
    names, strides = [name for name, _ in levels], {stride for _, stride in levels}
    if len(strides) == 1 and len(names) > COUNT:  # a transformer of one size
        found = [names[len(names) * part // (COUNT + 1) - 1] for part in range(1, COUNT + 1)]
    else:
        found = names[:-1][-COUNT:]
    modules = dict(model.named_modules())
    if len({*found} & modules.keys()) < COUNT:
        raise ClassifierError(
            f"the model {type(model).__name__} has no two early layers that can be found "
            f"({', '.join(found) or 'none'}); use it without early layers (lpcam.early null)"
        )
    return tuple(found)


@torch.no_grad()
def _levels(model: nn.Module, size: tuple[int, int]) -> list[tuple[str, int]]:
    """The shallowest, then last layer of each size of map, and the stride of that size."""
    seen: list[tuple[str, int]] = []
    tokens: list[str] = []

    def note(name: str, output: Any) -> None:
        with suppress(ClassifierError):
            grid = as_map(output, size).shape[-2:]
            seen.append((name, max(1, round(size[0] / grid[0]))))
            tokens.extend([name] * (_first(output).ndim == 3))

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, module in model.named_modules()
        if name
    ]
    training = model.training
    try:
        first = next(model.parameters(), torch.zeros(()))
        model.eval()(torch.zeros(1, 3, *size, device=first.device, dtype=first.dtype))
    except (RuntimeError, ValueError, AssertionError, TypeError):
        return []
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if tokens:  # blocks of a transformer stand beside each other
        parents = [name.rpartition(".")[0] for name in tokens]
        most = max(parents, key=parents.count)
        return [(n, 1) for n, above in zip(tokens, parents, strict=True) if above == most]
    strides = dict.fromkeys(sorted(stride for _, stride in seen))
    levels = []
    for stride in strides:
        names = [name for name, one in seen if one == stride]
        depth = min(name.count(".") for name in names)
        levels.append(([name for name in names if name.count(".") == depth][-1], stride))
    return levels


def _first(output: Any) -> Tensor:
    """The first tensor of a layer's output."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ClassifierError(f"an early layer gives a {type(output).__name__}, not a map")
    return output


def as_map(output: Any, size: tuple[int, int]) -> Tensor:
    """The output of a layer for images (H, W) as maps (B, C, h, w): also channels last, or tokens.

    ClassifierError if it is no map.
    """
    found, (height, width) = _first(output), size
    shape = tuple(found.shape)
    if found.ndim == 4:
        if abs(shape[2] * width - shape[3] * height) <= max(height, width):
            return found
        if abs(shape[1] * width - shape[2] * height) <= max(height, width):
            return found.permute(0, 3, 1, 2)
    if found.ndim == 3:
        for rows in range(int((shape[1] * height / width) ** 0.5) + 1, 0, -1):
            columns = round(rows * width / height)
            # tokens of the class and registers come first
            if 0 <= shape[1] - rows * columns <= 16 and rows * columns > 1:
                places = found[:, shape[1] - rows * columns :].transpose(1, 2)
                return places.reshape(shape[0], shape[2], rows, columns)
    raise ClassifierError(f"an early layer gives {shape}, not a map of an image {height} x {width}")


class Tap:
    """Keeps the outputs of named layers of a model, each thread its own, until they are taken."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        if missing := [name for name in layers if name not in modules]:
            raise ClassifierError(f"the model {type(model).__name__} has no layer {missing[0]!r}")
        self.layers, self._kept = tuple(layers), threading.local()
        self._handles = [modules[n].register_forward_hook(self._hook(n)) for n in self.layers]

    def _hook(self, name: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self._kept.__dict__[name] = output

        return keep

    def take(self, size: tuple[int, int]) -> list[Tensor]:
        """Maps (B, C, h, w) of the last pass of this thread, of images (H, W); then none are kept.

        In the precision of the pass. Raises ClassifierError if a layer gave no map.
        """
        kept = self._kept.__dict__
        found = [as_map(kept.pop(name, None), size) for name in self.layers]
        kept.clear()
        return found

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def tapped(model: nn.Module, layers: Sequence[str]) -> Iterator[Tap]:
    """A :class:`Tap` until the block ends."""
    tap = Tap(model, layers)
    try:
        yield tap
    finally:
        tap.close()
