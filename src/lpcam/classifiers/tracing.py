"""Parts of a model seen in one forward pass, recognised by their numbers, not by class names."""

from __future__ import annotations

import copy
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from threading import get_ident
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.runtime.errors import ClassifierError

Layout = Literal["NCHW", "NHWC", "tokens"]
NormKind = Literal["affine", "layer", "rms", "length"]
Rows = tuple[Tensor, Tensor | None]  #: Weight (N, C) and bias (N,) of a linear head.
TOLERANCE = 1e-4
"""Largest difference that counts as rounding, relative to the largest number (of logits: or 1)."""
COARSE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}  #: ``TOLERANCE`` of models in half precision.
KEPT_MAPS = 64  #: Number of last maps that a record keeps, to bound its memory.


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel or torch.compile."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(model.module)
    inner = getattr(model, "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores flags, weights and random state on exit.

    Attributes and buffers that a pass replaces are restored too: some models keep the size of the
    smallest image they have seen (the windows of Hugging Face's Swin).
    """
    flags = {module: module.training for module in model.modules()}
    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    kept = [(part, dict(part)) for m in flags for part in (vars(m), m._buffers)]
    plain = nn.Module.train
    overriding = [m for m in flags if m.training and getattr(m.train, "__func__", None) != plain]
    # Merging weights and undoing it changes them by rounding.
    saved = [
        (tensor, tensor.detach().clone())
        for module in overriding
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]

    def restore() -> None:
        for part, before in kept:
            for name, value in before.items():
                if part.get(name) is not value and name != "training":
                    part[name] = value
        for module, flag in flags.items():
            module.training = flag
        for parameter, need in needed.items():
            parameter.requires_grad_(need)
        for tensor, value in saved:
            if not torch.equal(tensor, value):
                tensor.copy_(value)

    devices = {p.device.index for p in needed if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(sorted(d for d in devices if d is not None)))
        marks = ("_orig_mod", "_compiled_call_impl", "_torchdynamo_orig_callable")
        if any(getattr(o, m, None) for f in flags for o in (f, f.forward) for m in marks):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(restore)
        for module in overriding:
            stack.callback(module.train, True)
            module.train(False)
        for module in flags:  # a class may override eval() to leave some modules in training mode
            module.training = False
        yield


@contextmanager
def without_grad_and_autocast(device: torch.device) -> Iterator[None]:
    """Ordinary tensors without gradients, inside inference mode and autocast too."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def without_tf32() -> Iterator[None]:
    """Products and convolutions on a GPU in full float32; the setting applies to all threads."""
    # Reading the older allow_tf32 raises if a caller has set these to different values.
    cudnn: Any = torch.backends.cudnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first tensor."""
    return next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """Dtype of the model's first floating-point tensor."""
    floats = (t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point())
    return next((t.dtype for t in floats), torch.float32)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensor that a module gave, or those of a list, tuple or mapping in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_of(one)


def first_tensor(value: Any) -> Tensor | None:
    """The first of :func:`tensors_of`."""
    return next(tensors_of(value), None)


def replaced(value: Any, index: int, function: Callable[[Tensor], Tensor]) -> Any:
    """The value with ``function`` of the ``index``-th of its tensors in that tensor's place."""
    if isinstance(value, Tensor):
        return function(value) if index == 0 else value
    if not isinstance(value, (list, tuple, Mapping)):
        return value
    twin: Any = copy.copy(value) if isinstance(value, Mapping) else list(value)
    for key in list(value) if isinstance(value, Mapping) else range(len(value)):
        twin[key] = replaced(value[key], index, function)
        index -= len(list(tensors_of(value[key])))
    if isinstance(value, Mapping):
        return twin
    return type(value)(*twin) if hasattr(value, "_fields") else type(value)(twin)


def logits_of(output: Any) -> Tensor | None:
    """Logits (B, N) of an output: its ``logits``, or the first tensor; (B,) becomes (B, 1)."""
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None:
        logits = first_tensor(output)
    return flat(logits[:, None] if isinstance(logits, Tensor) and logits.ndim == 1 else logits)


def flat(tensor: Tensor | None, *, pooled: bool = False) -> Tensor | None:
    """(B, C) and any axes of 1 as (B, C) float; with ``pooled`` the mean of a map; else None."""
    if tensor is None or tensor.ndim < 2 or not tensor.is_floating_point():
        return None
    longest = max(tensor.shape[1:])
    if tensor.shape[1:].numel() == longest:
        return tensor.reshape(tensor.shape[0], longest).float()
    return tensor.float().mean((-2, -1)) if pooled and tensor.ndim == 4 else None


@dataclass(frozen=True)
class Call:
    """One call of a module: its ``number``-th in the pass, from 0, with input and output."""

    name: str
    module: nn.Module
    number: int
    before: Tensor | None
    after: Tensor | None
    part: int = 0  #: Which of the tensors that the module gave ``after`` is


@dataclass(frozen=True)
class Record:
    """Calls of one pass in the order in which they ended, and the model's output."""

    calls: tuple[Call, ...]
    output: Any
    images: Tensor
    grids: tuple[tuple[int, int], ...]  #: (h, w) of every map, the last first
    tolerance: float

    @classmethod
    def of(cls, model: nn.Module, images: Tensor, always: Sequence[nn.Module] = ()) -> Record:
        """Pass images (B, c, H, W) through a model; outputs of ``always`` are kept in any case."""
        calls: list[Call] = []
        maps: deque[int] = deque()
        grids: list[tuple[int, int]] = []
        counts: Counter[nn.Module] = Counter()
        tolerance = TOLERANCE

        def hook(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal tolerance
            before = first_tensor((args, list(kwargs.values())))
            number = counts[module]
            counts[module] += 1
            for part, after in enumerate(tensors_of(output)):
                tolerance = max(tolerance, COARSE.get(after.dtype, 0.0))
                if after.ndim == 4:
                    _, a, b, c = after.shape
                    grids.extend(((b, c), (a, b)))
                elif part and after.ndim != 3:
                    continue
                calls.append(Call(name, module, number, before, after, part))
                if module in always or (flat(after) is not None and after.ndim != 3):
                    continue
                maps.append(len(calls) - 1)
                if len(maps) > KEPT_MAPS:
                    old = maps.popleft()
                    calls[old] = replace(calls[old], before=None, after=None)

        with evaluation_mode(model), ExitStack() as hooks:
            for name, module in model.named_modules():
                called = partial(hook, name)
                hooks.enter_context(module.register_forward_hook(called, with_kwargs=True))
            with torch.autocast(images.device.type, enabled=False):
                output = model(images)
        return cls(tuple(calls), output, images, tuple(grids[::-1]), tolerance)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return self.images.shape[-2], self.images.shape[-1]

    def same(self, one: Tensor | None, other: Tensor | None, least: float = 0.0) -> bool:
        """Whether tensors agree up to rounding, relative to their maximum (at least ``least``)."""
        if one is None or other is None or one.shape != other.shape or not other.numel():
            return False
        largest = max(least, float(other.abs().max()))
        return float((one - other).abs().max()) <= self.tolerance * largest

    def token_stride(self, count: int) -> tuple[float, float]:
        """Pixels per patch of ``count`` patches, vertical and horizontal; whole if that fits."""
        fitting = [grid for grid in self.grids if grid[0] * grid[1] == count]
        grid = min([*fitting, grid_of(count, self.size)], key=lambda g: misshape(g, self.size))
        exact = [s / g for s, g in zip(self.size, grid, strict=True)]
        for whole in (math.floor(min(exact)), math.ceil(max(exact))):
            for rounding in (math.floor, math.ceil):
                if whole and tuple(rounding(s / whole) for s in self.size) == grid:
                    return float(whole), float(whole)
        return exact[0], exact[1]


def misshape(grid: Sequence[int], size: tuple[int, int]) -> float:
    """Difference between the aspect ratios of a grid and of an image, as a logarithm."""
    return abs(math.log(grid[0] / grid[1]) - math.log(size[0] / size[1]))


@dataclass(frozen=True)
class MapLayer:
    """The layer that gives the feature map, and how to read its output as (B, C, h, w)."""

    layer: nn.Module | Callable[[Tensor], Any]
    name: str
    number: int  #: Which call of the layer in a pass, from 0
    layout: Layout
    prefix: int = 0  #: Tokens before the patches
    stride: tuple[float, float] = (1.0, 1.0)
    relu: bool = False
    token: int | None = None  #: Prefix token that the head reads; None: it reads the mean
    part: int = 0  #: Which of the tensors that the layer gives
    batch_axis: int = 0  #: 1 for tokens that come before the images

    def batch_first(self, output: Any) -> Tensor:
        """The tensor of the map in what the layer gave, with the images first."""
        found = next(islice(tensors_of(output), self.part, None), None)
        if found is None:
            raise ClassifierError(
                f"the layer {self.name!r} of the feature map gave no tensor in this pass; the "
                "model has changed since it was wrapped, wrap it again"
            )
        return found.transpose(0, self.batch_axis)

    def raw(self, model: nn.Module, images: Tensor) -> Tensor:
        """Output of the layer for images, float32 or float64; the model runs in evaluation mode."""
        outputs: list[Any] = []
        thread = get_ident()

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if get_ident() == thread:
                outputs.append(output if len(outputs) == self.number else None)

        with evaluation_mode(model):
            if isinstance(self.layer, nn.Module):
                with self.layer.register_forward_hook(hook):
                    model(images)
            else:
                outputs.append(self.layer(images))
        found = self.batch_first(outputs[self.number :][:1])
        return found if found.dtype == torch.float64 else found.float()

    def vector(self, raw: Tensor) -> Tensor:
        """(B, C): the token that the head reads, or the mean of the map."""
        return self.map(raw).mean((-2, -1)) if self.token is None else raw[:, self.token]

    def map(self, raw: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, h, w) from the layer's output for images (H, W); without a size one token row."""
        if self.layout == "NHWC":
            raw = raw.movedim(-1, 1)
        elif self.layout == "tokens":
            patches = raw[:, self.prefix :].transpose(1, 2)
            count = patches.shape[-1]
            grid = (1, count) if size is None else grid_of(count, size, self.stride)
            raw = patches.reshape(*patches.shape[:-1], *grid)
        return raw.relu() if self.relu else raw

    def __str__(self) -> str:
        how = {"NCHW": "", "NHWC": ", channels last", "tokens": ", tokens on their grid"}
        after = " after ReLU" if self.relu else ""
        dropped = f" without {self.prefix} prefix tokens" if self.prefix else ""
        part = f"[{self.part}]" if self.part else ""
        first = ", tokens before images" if self.batch_axis else how[self.layout]
        return f"{self.name or 'the output of the model'}{part}{after}{first}{dropped}"


def grid_of(
    count: int, size: tuple[int, int], stride: tuple[float, float] | None = None
) -> tuple[int, int]:
    """Rows and columns of patches by their stride; else factors nearest to the image's ratio."""
    if stride is not None:
        for rounding in (math.floor, math.ceil, round):
            rows, columns = (rounding(n / s) for n, s in zip(size, stride, strict=True))
            if rows * columns == count:
                return rows, columns
    factors = ((n, count // n) for n in range(1, count + 1) if count % n == 0)
    return min(factors, key=lambda grid: misshape(grid, size))


@dataclass(frozen=True)
class Norm:
    """A norm: ``affine`` is batch norm in evaluation; the others divide a vector by its size."""

    kind: NormKind
    module: nn.Module | None = None
    epsilon: float = 0.0
    name: str = ""

    def divide(self, vectors: Tensor) -> Tensor:
        """Positive divisors (..., 1) of vectors (..., C)."""
        if self.kind == "layer":
            return (vectors.var(-1, correction=0, keepdim=True) + self.epsilon).sqrt()
        if self.kind == "rms":
            return (vectors.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
        if self.kind == "length":
            return vectors.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
        return vectors.new_ones(*vectors.shape[:-1], 1)

    def fold(self, weight: Tensor, bias: Tensor | None) -> Rows:
        """Rows and bias for divided vectors: W(norm(v)) + b = W'(v / size) + b'."""
        state: dict[str, Tensor] = {}
        for name in ("weight", "bias", "running_mean", "running_var"):
            if isinstance(value := getattr(self.module, name, None), Tensor):
                state[name] = value.detach().to(weight.dtype)
        gamma, beta = state.get("weight"), state.get("bias")
        if self.kind == "affine":
            mean, scale = state["running_mean"], (state["running_var"] + self.epsilon).rsqrt()
            gamma = scale if gamma is None else gamma * scale
            beta = -mean * gamma if beta is None else beta - mean * gamma
        if beta is not None:
            bias = weight @ beta if bias is None else bias + weight @ beta
        if gamma is not None:
            weight = weight * gamma
        if self.kind == "layer":  # W(v - mean(v)) = (W(I - 11'/C)) v
            weight = weight - weight.mean(1, keepdim=True)
        return weight, bias

    @classmethod
    def of(cls, call: Call, record: Record) -> Norm | None:
        """The norm that a call computes, if the numbers agree."""
        before, after, module = flat(call.before), flat(call.after), call.module
        if call.before is None or before is None or after is None or before.shape != after.shape:
            return None
        if record.same(after, before):  # dropout and the like
            return None
        channels = before.shape[1]
        given = [getattr(module, name, None) for name in ("weight", "bias")]
        if any(isinstance(p, Tensor) and p.shape != (channels,) for p in given):
            return None
        # an epsilon of None stands for the rounding unit of the input
        said = [getattr(module, n) for n in ("eps", "variance_epsilon") if hasattr(module, n)]
        default = torch.finfo(call.before.dtype).eps if None in said else 1e-6
        epsilon = next((float(n) for n in said if isinstance(n, (int, float))), default)
        is_batch_norm = isinstance(getattr(module, "running_mean", None), Tensor)
        kinds: tuple[NormKind, ...] = ("affine",) if is_batch_norm else ("layer", "rms")
        for kind in kinds:
            norm = cls(kind, module, epsilon, call.name)
            weight, bias = norm.fold(torch.eye(channels, device=before.device), None)
            if record.same(F.linear(before / norm.divide(before), weight, bias), after):
                return norm
        return None

    def __str__(self) -> str:
        kind = type(self.module).__name__
        return "L2 normalisation" if self.module is None else f"{self.name} ({kind})"


@dataclass(frozen=True)
class Linear:
    """A linear layer, or its tensors."""

    module: nn.Module | None = None
    tensors: Rows | None = None
    name: str = ""

    @classmethod
    def of(cls, call: Call, record: Record) -> tuple[Linear, Tensor, Tensor] | None:
        """A matrix or 1 x 1 convolution with its input and output, if the numbers agree."""
        before, after = flat(call.before, pooled=True), flat(call.after, pooled=True)
        if before is None or after is None or not hasattr(call.module, "bias"):
            return None
        shape = (after.shape[1], before.shape[1])
        own = getattr(getattr(call.module, "weight", None), "shape", ())
        if own not in (shape, (*shape, 1, 1)):
            return None
        linear = cls(call.module, None, call.name)
        same = record.same(_apply_rows(linear.rows(), before), after)
        return (linear, before, after) if same else None

    def rows(self) -> Rows:
        """Current weight (N, C) and bias (N,), detached, float32 or float64."""
        module: Any = self.module
        weight, bias = self.tensors or (module.weight, module.bias)
        dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
        bias = bias.detach().to(dtype) if isinstance(bias, Tensor) else None
        return weight.detach().flatten(1).to(dtype), bias

    def __str__(self) -> str:
        kind = type(self.module).__name__
        return "the given weight" if self.module is None else f"{self.name} ({kind})"


def _apply_rows(rows: Rows, vectors: Tensor) -> Tensor:
    weight, bias = rows
    return F.linear(vectors, weight.to(vectors), None if bias is None else bias.to(vectors))


@dataclass(eq=False)
class Reading:
    """How logits are read from a layer's output: the map layer, norms and the linear head."""

    map_layer: MapLayer
    head: Linear | None  #: None while a head is still to be fitted
    norms: tuple[Norm, ...]
    """Norms between the pooled vector and the head, the head's neighbour first"""

    def rows(self, device: torch.device) -> Rows:
        """Rows of the head with the norms folded in: for vectors that :meth:`divided` gives."""
        assert self.head is not None
        weight, bias = self.head.rows()
        weight, bias = weight.to(device), None if bias is None else bias.to(device)
        for norm in self.norms:
            weight, bias = norm.fold(weight, bias)
        return weight, bias

    def divided(self, vectors: Tensor) -> Tensor:
        """Vectors (..., C) divided by the size that each norm gives them."""
        for norm in self.norms:
            vectors = vectors / norm.divide(vectors)
        return vectors

    def logits_of(self, raw: Tensor) -> Tensor:
        """Logits (B, N) from the output of the map layer."""
        return _apply_rows(self.rows(raw.device), self.divided(self.map_layer.vector(raw)))
