"""Early layers of a backbone: which they are, and their maps from a pass that is made anyway."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lpcam.classifiers.tracing import Layout, MapLayer, evaluation_mode, misshape
from lpcam.runtime.errors import ClassifierError

COUNT = 2  #: Early layers: the last of the usual strides 8 and 16.
SIDE = 224  #: Side, in pixels, of the image that shows the outputs of a model's layers.
MOST_PREFIX = 16  #: Largest number of tokens, of class and registers, before those of places.


def early_layers(
    model: nn.Module, size: tuple[int, int] = (SIDE, SIDE), channels: int = 3
) -> tuple[str, ...]:
    """Names of the two layers before the last level of a backbone: usually of strides 8 and 16.

    timm models list the last layer of each level themselves. Of others, a level ends where a map
    becomes smaller. A transformer whose levels all have one size gives the blocks at a third and
    at two thirds of its depth.

    Args:
        model: a timm backbone, or any image classifier.
        size: (H, W) of the image on which layers of other models are looked at.
        channels: channels of that image.

    Raises:
        ClassifierError: if the model has no two such layers.

    Example:
        >>> import timm
        >>> early_layers(timm.create_model("resnet18", num_classes=0))
        ('layer2', 'layer3')
    """
    modules = dict(model.named_modules())
    info = getattr(model, "feature_info", ())
    levels = [(str(one["module"]), int(one["reduction"])) for one in getattr(info, "info", info)]
    if len({name for name, _ in levels} & modules.keys()) <= COUNT:
        levels = _levels(model, size, channels)
    names, strides = [name for name, _ in levels], {stride for _, stride in levels}
    if len(strides) == 1 and len(names) > COUNT:  # a transformer of one size
        found = [names[len(names) * part // (COUNT + 1) - 1] for part in range(1, COUNT + 1)]
    else:
        found = names[:-1][-COUNT:]
    if len({*found} & modules.keys()) < COUNT:
        raise ClassifierError(
            f"the model {type(model).__name__} has no two early layers that can be found "
            f"({', '.join(found) or 'none'}); use it without early layers (lpcam.early null)"
        )
    return tuple(found)


def _levels(model: nn.Module, size: tuple[int, int], channels: int) -> list[tuple[str, int]]:
    """The shallowest, then last layer of each size of map, and the stride of that size."""
    seen: list[tuple[str, int]] = []
    tokens: list[tuple[str, tuple[str, type[nn.Module]]]] = []

    def note(name: str, module: nn.Module, _: Any, output: Any) -> None:
        with suppress(ClassifierError):
            (layer,) = readings([name], [output], size)
            rows, columns = layer.map(_first(output), size).shape[-2:]
            if len(_first(output)) != len(images):  # a window, or of no image
                return
            if rows * columns > 1:  # else it is pooled
                seen.append((name, round(size[0] / rows)))
            if layer.layout == "tokens":
                tokens.append((name, (name.rpartition(".")[0], type(module))))

    first = next(model.parameters(), torch.zeros(()))
    images = first.new_zeros(2, channels, *size)
    with evaluation_mode(model), ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(partial(note, name)))
        try:
            model(images)
        except (RuntimeError, ValueError, AssertionError, TypeError):
            return []
    if tokens:  # blocks of a transformer are of one kind, beside each other
        ((most, _),) = Counter(kind for _, kind in tokens).most_common(1)
        return [(name, 1) for name, kind in tokens if kind == most]
    levels = []
    for stride in sorted({stride for _, stride in seen}):
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


def readings(names: Sequence[str], outputs: Sequence[Any], size: tuple[int, int]) -> list[MapLayer]:
    """How outputs of layers for images (H, W) are read as maps: also channels last, or tokens.

    All maps of a model have one layout. ClassifierError if an output is no map.
    """
    shapes = [tuple(_first(output).shape) for output in outputs]
    off = [sum(misshape(s[n : n + 2], size) for s in shapes if len(s) == 4) for n in (2, 1)]
    layout: Layout = "NCHW" if off[0] <= off[1] else "NHWC"
    found = []
    for name, shape in zip(names, shapes, strict=True):
        if len(shape) == 4:
            found.append(MapLayer(nn.Identity(), name, 0, layout))
        elif len(shape) == 3 and (fitting := _token_strides(shape[1], size)):
            prefix, stride = min(fitting)  # tokens of the class and registers come first
            layer = MapLayer(nn.Identity(), name, 0, "tokens", prefix, (stride, stride))
            found.append(layer)
        else:
            raise ClassifierError(f"the early layer {name!r} gives {shape}, not a map of {size}")
    return found


def _token_strides(count: int, size: tuple[int, int]) -> list[tuple[int, float]]:
    """Number of tokens before those of places, and pixels of a place, that fit ``count`` tokens."""
    return [
        (prefix, float(stride))
        for stride in range(1, min(size) + 1)
        for rounding in (math.floor, math.ceil)
        for grid in [[rounding(side / stride) for side in size]]
        if 0 <= (prefix := count - grid[0] * grid[1]) <= MOST_PREFIX and max(grid) > 1
    ]


class _Kept(threading.local):
    """Outputs of layers, each thread its own; copies are empty."""

    def __reduce__(self) -> Any:
        return _Kept, ()


class Tap:
    """Keeps the outputs of named layers of a model, each thread its own, until they are taken.

    Copied together with the model it belongs to the copy.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        if missing := [name for name in layers if name not in modules]:
            raise ClassifierError(f"the model {type(model).__name__} has no layer {missing[0]!r}")
        self.layers, self._kept = tuple(layers), _Kept()
        self._readings: list[MapLayer] = []
        hooks = [(modules[name], partial(self._keep, name)) for name in self.layers]
        self._handles = [module.register_forward_hook(hook) for module, hook in hooks]

    def _keep(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        self._kept.__dict__[name] = output

    def take(self, size: tuple[int, int]) -> list[Tensor]:
        """Maps (B, C, h, w) of the last pass of this thread, of images (H, W); then none are kept.

        In the precision of the pass. How they are read is found in the first pass. Raises
        ClassifierError if a layer gave no map.
        """
        outputs = [self._kept.__dict__.get(name) for name in self.layers]
        self._kept.__dict__.clear()
        if not self._readings:
            self._readings = readings(self.layers, outputs, size)
        pairs = zip(self._readings, outputs, strict=True)
        return [layer.map(_first(output), size) for layer, output in pairs]

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
