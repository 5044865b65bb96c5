"""Size and channels of the images that a model takes, found by trying, and why it takes none."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.classifiers.tracing import Record, device_of, dtype_of
from lpcam.runtime.errors import ClassifierError

PROBE_SIZES = ((97, 131), (104, 136), (112, 144), (98, 126), (96, 160), (128, 192), (224, 448))
"""Sizes (H, W) tried in turn. The common divisor (1, 8, 16, 14, 32, 64, 224) of the first one that
the model takes is the number that its sides must be multiples of."""
FALLBACK_SIDES = (224, 256, 384, 32, 64, 128, 28, 96, 192, 299, 336, 448, 512)
"""Sides tried last, for models that take one size and do not state it."""
SIZE_NAMES = ("img_size", "image_size", "input_size", "input_resolution")
PACKED = {"flattened_patches", "spatial_shapes", "grid_thw", "image_grid_thw", "patch_coord"}
TEXT = {"input_ids", "text", "texts", "tokens", "captions"}


@dataclass(frozen=True)
class Probed:
    """A recorded pass of two random images, and which others the model takes."""

    record: Record
    fixed_size: tuple[int, int] | None  #: The only size (H, W); None if it takes others
    multiple: int  #: Number that sides must be multiples of


def probe(
    model: nn.Module, example: Tensor | tuple[int, int] | None, always: Sequence[nn.Module]
) -> Probed:
    """Try images, of stated and of common sizes and channels, or as ``example`` says."""
    channels = _channels(model)
    if isinstance(example, Tensor):
        if example.ndim not in (3, 4):
            raise ClassifierError(
                f"expected example images (B, c, H, W), got {tuple(example.shape)}"
            )
        channels, example = [example.shape[-3]], (example.shape[-2], example.shape[-1])
    stated = list(dict.fromkeys(_stated_sizes(model)))
    sizes = [*PROBE_SIZES, *stated] if example is None else [example]
    failures: list[Exception] = []
    for size in sizes:
        for count in channels:
            generator = torch.Generator().manual_seed(0)
            images = torch.randn(2, count, *size, generator=generator)
            images = images.to(device_of(model), dtype_of(model))
            record = attempt(model, images, always)
            if isinstance(record, Exception):
                failures.append(record)
                continue
            if example is None:
                fixed, multiple = (None, math.gcd(*size)) if size in PROBE_SIZES else (size, 1)
                return Probed(record, fixed, multiple)
            for other in (*PROBE_SIZES, (2 * size[0], 2 * size[1])):
                resized = F.interpolate(images.float(), size=other).to(images)
                if isinstance(attempt(model, resized), Record):
                    multiple = math.gcd(*(other if other in PROBE_SIZES else size))
                    return Probed(record, None, multiple)
            return Probed(record, size, 1)
    tried, error = ", ".join(f"{h} x {w}" for h, w in sizes), failures[0]
    advice = other_inputs(model) or "Give example= images that it takes, or their size (H, W)"
    raise ClassifierError(
        f"the model {type(model).__name__} took no image of {' or '.join(map(str, channels))} "
        f"channels; tried were {tried}. The first error was {type(error).__name__}: "
        f"{' '.join(str(error).split()):.300}. {advice}"
    ) from error


def attempt(
    model: nn.Module, images: Tensor, always: Sequence[nn.Module] = ()
) -> Record | Exception:
    """A recorded pass; the error of a model that does not take such images."""
    try:
        return Record.of(model, images, always)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model may refuse images in any way
        return error


def _channels(model: nn.Module) -> list[int]:
    """Numbers of channels to try: of the first convolution, stated, before a rearrangement."""
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 0)
    stated = [_get(c, "num_channels") for m in model.modules() for c in _configurations(m)]
    tried = (first, *stated, 3, 1, 4, first // 4, first // 16)
    return [n for n in dict.fromkeys(tried) if isinstance(n, int) and n > 0]


def _configurations(module: nn.Module) -> list[Any]:
    config = getattr(module, "config", None)
    return [config, _get(config, "vision_config")]


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _stated_sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Sizes (H, W) that the model or a part of it states, then FALLBACK_SIDES."""
    stated: list[Any] = []
    for module in model.modules():
        stated += [_get(getattr(module, "pretrained_cfg", None), "input_size")]
        stated += [_get(one, n) for one in (module, *_configurations(module)) for n in SIZE_NAMES]
    for one in (*stated, *FALLBACK_SIDES):
        pair = (one, one) if isinstance(one, int) else one
        if isinstance(pair, (list, tuple)) and len(pair) >= 2:
            height, width = pair[-2:]
            if isinstance(height, int) and isinstance(width, int) and min(height, width) >= 8:
                yield height, width


def _compiled_form(model: Any) -> str:
    """The name of a form of model in whose parts nothing can be seen, or nothing."""
    nodes = model.graph.nodes if isinstance(model, torch.fx.GraphModule) else ()
    lowered = any(isinstance(node.target, torch._ops.OpOverload) for node in nodes)
    if lowered or isinstance(model, torch.export.ExportedProgram):
        return "an exported program"
    return "a ScriptModule" if isinstance(model, torch.jit.ScriptModule) else ""


def refuse_compiled_form(model: Any) -> None:
    """Refuse a model in whose parts nothing can be seen, or that has no weights."""
    form = _compiled_form(model)
    if form or not isinstance(model, nn.Module):
        advice = ", whose layers cannot be observed; pass the model it was made of" if form else ""
        what = form or type(model).__name__
        raise ClassifierError(f"expected a torch.nn.Module, got {what}{advice}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ClassifierError("the model is on the meta device, without weights; load them first")


def quantised(model: nn.Module) -> str:
    """A sentence that a model is quantised, or nothing."""
    for name, module in model.named_modules():
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        integer = any(t.is_quantized or t.dtype in (torch.int8, torch.uint8) for t in tensors)
        if integer or "quantized" in type(module).__module__:
            return (
                f"The model is quantised ({name}: {type(module).__name__}), and quantised layers "
                "give no maps or rows: pass the model in floating point"
            )
    return ""


def other_inputs(model: nn.Module) -> str:
    """A sentence that a model takes something else than images alone, or nothing."""
    for name, part in model.named_modules():
        if form := _compiled_form(part):
            return f"Its part {name} is {form}, which cannot be observed; pass the original model"
    parameters = inspect.signature(model.forward).parameters
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [n for n, p in parameters.items() if p.kind not in several and p.default is p.empty]
    alone = "Pass a module that takes images (B, c, H, W) alone"
    if PACKED & parameters.keys():
        return (
            f"The model takes images as packed patches ({', '.join(parameters):.60}), which have "
            f"no grid. {alone} and packs them, with target_layer= a function that gives the grid"
        )
    if TEXT & parameters.keys():
        parts = [n for n, _ in model.named_children() if "vis" in n or "image" in n]
        part = f", such as its {' or '.join(parts)}" if parts else ""
        return f"The model takes text beside images ({', '.join(parameters):.60}). {alone}{part}"
    if len(needed) > 1:
        return f"The model needs {len(needed)} inputs ({', '.join(needed)}). {alone}"
    is_volume = any(isinstance(module, nn.Conv3d) for module in model.modules())
    if is_volume or any(_get(c, "num_frames") for c in _configurations(model)):
        return "The model takes videos or volumes (B, c, T, H, W); only images are supported"
    return quantised(model)
