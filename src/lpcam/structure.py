"""What a forward pass of a model consists of: its modules' calls, maps, norms and linear layers.

A :class:`Record` holds what every module gave in one pass. A :class:`Place` says where in the model
a feature map comes from, a :class:`Norm` and a :class:`Linear` what follows its pooling. Each is
recognised by its numbers, whatever its class is called.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam.errors import ClassifierError

Layout = Literal["NCHW", "NHWC", "tokens"]

TOLERANCE = 1e-4
"""Largest difference, as a share of the largest number (of logits: and of 1), that is rounding."""
COARSE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""The same for a model that computes in half precision."""
KEPT_MAPS = 64
"""Outputs that a record keeps; the map before the pooling is among the last."""


# -- The model, undisturbed --------------------------------------------------------------------


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DataParallel, DistributedDataParallel or torch.compile."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; flags and random state come back, also after an error.

    What was compiled runs as it was written, for compiled code may ignore hooks. A class with a
    ``train`` of its own (one that keeps results for evaluation, or merges weights) has it called.
    """
    modules = list(model.modules())
    flags = [module.training for module in modules]
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    own = [module for module in modules if module.training and _has_own_train(module)]
    # Weights that are merged and parted again come back rounded.
    held = [
        (tensor, tensor.detach().clone())
        for module in own
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(sorted(d for d in devices if d is not None)))
        if any(_is_compiled(module) for module in modules):
            stance: Any = torch.compiler.set_stance("force_eager")
            stack.enter_context(stance)
        try:
            for module in own:
                module.train(False)
            for module in modules:
                # not eval() alone, which a class may have redefined to leave some as they are
                if module.training:
                    module.training = False
            yield
        finally:
            try:
                for module in own:
                    module.train(True)
            finally:
                for module, flag in zip(modules, flags, strict=True):
                    if module.training != flag:
                        module.training = flag
                for parameter, need in needed:
                    if parameter.requires_grad != need:
                        parameter.requires_grad_(need)
                for tensor, value in held:
                    if not torch.equal(tensor, value):
                        tensor.copy_(value)


def _has_own_train(module: nn.Module) -> bool:
    return getattr(module.train, "__func__", None) is not nn.Module.train


@contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Ordinary tensors without gradients, whatever the caller's inference mode and autocast."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


@contextmanager
def without_tf32() -> Iterator[None]:
    """Products and convolutions on a GPU in float32: TF32 keeps three digits of the numbers.

    The setting is one for all threads.
    """
    # The newer names: reading the older allow_tf32 raises where a caller has set these apart.
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


def _is_compiled(module: nn.Module) -> bool:
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module, "_orig_mod")
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )


def first_tensor(value: Any) -> Tensor | None:
    """The tensor that a module gave, or the first of several."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return next((found for one in value if (found := first_tensor(one)) is not None), None)
    return None


def logits_of(output: Any) -> Tensor | None:
    """What a model gave as (B, N), be it a tensor, an object or a mapping with logits.

    (B,) is (B, 1), of one class.
    """
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None:
        logits = first_tensor(output)
    if isinstance(logits, Tensor) and logits.ndim == 1:
        logits = logits[:, None]
    return flat(logits) if isinstance(logits, Tensor) else None


def flat(tensor: Tensor | None) -> Tensor | None:
    """(B, C), (B, C, 1, 1), (B, 1, 1, C) or (B, 1, C) as (B, C) float; None for other shapes."""
    if tensor is None or tensor.ndim < 2 or not tensor.is_floating_point():
        return None
    longest = max(tensor.shape[1:])
    if tensor.shape[1:].numel() != longest:
        return None
    return tensor.reshape(tensor.shape[0], longest).float()


def device_of(model: nn.Module) -> torch.device:
    """Where its first tensor is."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of its first floating-point tensor, hence of the images that it takes."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


# -- A forward pass, recorded ------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of one module: the ``number``-th in its forward pass."""

    name: str
    module: nn.Module
    number: int
    before: Tensor | None
    after: Tensor | None

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({type(self.module).__name__})"


@dataclass(frozen=True)
class Record:
    """What modules gave in one pass, in the order in which they ended."""

    model: nn.Module
    calls: tuple[Call, ...]
    output: Any
    size: tuple[int, int]
    grids: tuple[tuple[int, int], ...]
    """(h, w) of every map, the last first"""
    tolerance: float

    def same(self, one: Tensor | None, other: Tensor | None) -> bool:
        """Whether two tensors are equal but for rounding."""
        if one is None or other is None or one.shape != other.shape:
            return False
        largest = float(other.abs().max())
        return float((one - other).abs().max()) <= self.tolerance * largest  # never true of NaN

    def last(self, module: nn.Module) -> Call | None:
        """The last call of a module."""
        return next((call for call in reversed(self.calls) if call.module is module), None)


def record_pass(model: nn.Module, images: Tensor, always: Sequence[nn.Module] = ()) -> Record:
    """Pass images through a model and keep what its modules give, the model left as it was.

    Args:
        always: modules whose output is kept even if many others follow.
    """
    calls: list[Call] = []
    maps: deque[int] = deque()
    grids: list[tuple[int, int]] = []
    counts: Counter[nn.Module] = Counter()
    dtypes: set[torch.dtype] = set()
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = first_tensor((args, list(kwargs.values()))), first_tensor(output)
            call = Call(name, module, counts[module], before, after)
            counts[module] += 1
            if after is None:
                return
            if after.is_floating_point():
                dtypes.add(after.dtype)
            if after.ndim == 4:
                grids.extend((tuple(after.shape[2:]), tuple(after.shape[1:3])))  # type: ignore[arg-type]
            calls.append(call)
            if module in always or (flat(after) is not None and after.ndim != 3):
                return
            maps.append(len(calls) - 1)
            if len(maps) > KEPT_MAPS:
                old = maps.popleft()
                calls[old] = replace(calls[old], before=None, after=None)

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    with undisturbed(model):
        try:
            for name, module in model.named_modules():
                watch(name, module)
            with torch.autocast(images.device.type, enabled=False):
                output = model(images)
        finally:
            for handle in handles:
                handle.remove()
    tolerance = max([TOLERANCE, *(COARSE[dtype] for dtype in dtypes if dtype in COARSE)])
    height, width = images.shape[-2:]
    return Record(model, tuple(calls), output, (height, width), tuple(grids[::-1]), tolerance)


# -- From a module's output to a map -----------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where the feature map comes from, and how to read it as (B, C, h, w)."""

    layer: nn.Module | Callable[[Tensor], Any]
    name: str
    number: int
    layout: Layout
    prefix: int = 0
    stride: tuple[float, float] = (1.0, 1.0)
    relu: bool = False
    token: int | None = None
    """Which prefix token the head reads; None where it reads the mean."""

    def raw(self, model: nn.Module, images: Tensor) -> Tensor:
        """What the layer gives for images, read in evaluation mode without a trace."""
        kept: list[Tensor | None] = []
        count, thread = 0, threading.get_ident()

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal count
            if threading.get_ident() != thread:
                return
            if count == self.number:
                kept.append(first_tensor(output))
            count += 1

        with undisturbed(model):
            if not isinstance(self.layer, nn.Module):
                kept.append(first_tensor(self.layer(images)))
            else:
                handle = self.layer.register_forward_hook(hook)
                try:
                    model(images)
                finally:
                    handle.remove()
        if not kept or kept[0] is None:
            raise ClassifierError(
                f"the layer {self.name!r} of the feature map gave no tensor in this pass; the "
                "model has changed since it was looked at, wrap it again"
            )
        found = kept[0]
        return found if found.dtype == torch.float64 else found.float()

    def vector(self, raw: Tensor) -> Tensor:
        """(B, C): the token that the head reads, or the mean of the map."""
        if self.token is not None:
            return raw[:, self.token]
        return self.map(raw).mean((-2, -1))

    def map(self, raw: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, h, w) of what the layer gave for images of a size (H, W)."""
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
        return f"{self.name or 'the output of the model'}{after}{how[self.layout]}{dropped}"


def grid_of(
    count: int, size: tuple[int, int], stride: tuple[float, float] | None = None
) -> tuple[int, int]:
    """Rows and columns of ``count`` patches of an image (H, W).

    Those of the stride if it gives as many, whichever way a part of a patch is counted; else the
    two factors whose ratio is nearest to that of the image.
    """
    if stride is not None:
        for rounding in (math.floor, math.ceil, round):
            rows, columns = (rounding(n / s) for n, s in zip(size, stride, strict=True))
            if rows * columns == count:
                return rows, columns
    wanted = math.log(size[0] / size[1])
    rows = min(
        (n for n in range(1, count + 1) if count % n == 0),
        key=lambda n: abs(math.log(n * n / count) - wanted),
    )
    return rows, count // rows


def probe_grid(count: int, record: Record) -> tuple[int, int]:
    """The grid of patches in a probe: that of a map with as many cells, if there was one."""
    fitting = [grid for grid in record.grids if grid[0] * grid[1] == count]
    fitting.append(grid_of(count, record.size))
    wanted = math.log(record.size[0] / record.size[1])
    return min(fitting, key=lambda grid: abs(math.log(grid[0] / grid[1]) - wanted))


def stride_of(grid: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """Pixels a cell; a whole number where it is one but for a border."""
    exact = [s / g for s, g in zip(size, grid, strict=True)]
    for rounding in (math.floor, math.ceil):
        whole = rounding(min(exact) if rounding is math.floor else max(exact))
        for count in (math.floor, math.ceil):
            if whole and tuple(count(s / whole) for s in size) == grid:
                return float(whole), float(whole)
    return exact[0], exact[1]


# -- Norms between the pooled vector and the head ----------------------------------------------


@dataclass(frozen=True)
class Norm:
    """``affine``: batch norm in evaluation. ``layer``, ``rms``, ``length``: (v - mean?) / size."""

    kind: Literal["affine", "layer", "rms", "length"]
    module: nn.Module | None = None
    epsilon: float = 0.0
    name: str = ""

    def parameter(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """A parameter or statistic (C,) of the norm as it is now, or None."""
        value = getattr(self.module, name, None)
        return value.detach().to(dtype) if isinstance(value, Tensor) else None

    def divide(self, vectors: Tensor) -> Tensor:
        """The positive number that each vector (..., C) is divided by, (..., 1)."""
        if self.kind == "layer":
            return (vectors.var(-1, correction=0, keepdim=True) + self.epsilon).sqrt()
        if self.kind == "rms":
            return (vectors.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
        if self.kind == "length":
            return vectors.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
        return vectors.new_ones(*vectors.shape[:-1], 1)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows and bias for vectors that have been divided: W(norm(v)) + b = W'(v / size) + b'."""
        gamma, beta, mean, variance = (
            self.parameter(name, weight.dtype)
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        if self.kind == "affine":
            assert mean is not None and variance is not None  # noqa: PT018 - as found
            scale = (variance + self.epsilon).rsqrt()
            gamma = scale if gamma is None else gamma * scale
            beta = -mean * gamma if beta is None else beta - mean * gamma
        if beta is not None:
            bias = weight @ beta if bias is None else bias + weight @ beta
        if gamma is not None:
            weight = weight * gamma
        if self.kind == "layer":  # W(v - mean(v)) = (W(I - 11'/C)) v
            weight = weight - weight.mean(1, keepdim=True)
        return weight, bias

    def __str__(self) -> str:
        if self.module is None:
            return "L2 normalisation"
        return f"{self.name} ({type(self.module).__name__})"


def norm_of(call: Call, record: Record) -> Norm | None:
    """The norm that a call is, if numbers say that it is one."""
    before, after = flat(call.before), flat(call.after)
    module = call.module
    if before is None or after is None or before.shape != after.shape:
        return None
    if record.same(after, before):  # dropout and the like
        return None
    epsilon = _epsilon(module, call.before.dtype if call.before is not None else before.dtype)
    channels = before.shape[1]
    kinds: list[Literal["affine", "layer", "rms"]] = ["layer", "rms"]
    if isinstance(getattr(module, "running_mean", None), Tensor):
        kinds = ["affine"]
    for kind in kinds:
        norm = Norm(kind, module, epsilon, call.name)
        given = [getattr(module, name, None) for name in ("weight", "bias")]
        if any(isinstance(p, Tensor) and p.shape != (channels,) for p in given):
            return None
        eye = torch.eye(channels, device=before.device)
        weight, bias = norm.fold(eye, None)
        found = F.linear(before / norm.divide(before), weight, bias)
        if record.same(found, after):
            return norm
    return None


def _epsilon(module: nn.Module, dtype: torch.dtype) -> float:
    """What a norm adds to a variance: of one that says None the rounding unit of the input."""
    said = [getattr(module, n) for n in ("eps", "variance_epsilon") if hasattr(module, n)]
    numbers = [float(value) for value in said if isinstance(value, (int, float))]
    if numbers:
        return numbers[0]
    return torch.finfo(dtype).eps if None in said else 1e-6


# -- The head ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """A linear layer, or its tensors."""

    module: nn.Module | None = None
    tensors: tuple[Tensor, Tensor | None] | None = None
    name: str = ""

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """(N, C) and (N,) float32, detached, as they are now."""
        if self.module is not None:
            given: tuple[Any, Any] = self.module.weight, self.module.bias
        else:
            assert self.tensors is not None
            given = self.tensors
        weight, bias = (t.detach() if isinstance(t, Tensor) else None for t in given)
        assert weight is not None
        weight = weight.flatten(1)
        dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def __str__(self) -> str:
        if self.module is None:
            return "the given weight"
        return f"{self.name} ({type(self.module).__name__})"


def linear_of(call: Call, record: Record) -> Linear | None:
    """The linear layer that a call is: a matrix or a 1 x 1 convolution, if numbers agree."""
    weight = getattr(call.module, "weight", None)
    if not isinstance(weight, Tensor) or call.before is None or call.after is None:
        return None
    if weight.ndim not in (2, 4) or (weight.ndim == 4 and tuple(weight.shape[2:]) != (1, 1)):
        return None
    before, after = vector_of(call.before), vector_of(call.after)
    if before is None or after is None or before.shape[1] != weight.shape[1]:
        return None
    if after.shape[1] != weight.shape[0]:
        return None
    if not hasattr(call.module, "bias"):
        return None
    linear = Linear(call.module, None, call.name)
    return (
        linear if record.same(F.linear(before, *cast_rows(linear.rows(), before)), after) else None
    )


def cast_rows(rows: tuple[Tensor, Tensor | None], like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias on the device and in the dtype of a tensor."""
    weight, bias = rows
    return weight.to(like), None if bias is None else bias.to(like)


def vector_of(tensor: Tensor) -> Tensor | None:
    """(B, C) of a vector; of a map (B, C, h, w) its mean, as of a head that stands before it."""
    vector = flat(tensor)
    if vector is None and tensor.ndim == 4:
        vector = tensor.float().mean((-2, -1))
    return vector
