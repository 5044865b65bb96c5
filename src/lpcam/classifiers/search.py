"""Search for the feature map and the linear head of a model in a recorded pass.

Each layer can be read in some ways. The last one whose numbers agree with the pass is chosen.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import imagenet_info
from torch import Tensor, nn

from lpcam.classifiers.tracing import (
    Layout,
    Linear,
    MapLayer,
    Norm,
    Reading,
    Record,
    Rows,
    evaluation_mode,
    first_tensor,
    flat,
    logits_of,
    misshape,
)
from lpcam.runtime.errors import ClassifierError

logger = logging.getLogger(__name__)
Pool = Literal["mean", "token"]
MOST_PREFIX_TOKENS = 16
"""Maximum number of class, distillation and register tokens before the patches."""
OUTPUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda z: z,
    "sigmoid": torch.sigmoid,
    "softmax": lambda z: z.softmax(1),
    "log softmax": lambda z: z.log_softmax(1),
}
"""Functions of its logits that a model may return."""
Candidate = tuple[MapLayer, Tensor]
"""A layer that may give the map, and its output in the recorded pass"""
Found = tuple[Reading, Sequence[str], str]
"""The map and the head, names of the classes, and which of OUTPUTS the model gives"""


class Head(NamedTuple):
    """A linear layer of the recorded pass whose output is, or leads to, the logits."""

    linear: Linear
    before: Tensor
    after: Tensor
    output: str


@dataclass
class Finder:
    """Searches a recorded pass of images for the map and the head, as ``wrap`` asks for them."""

    model: nn.Module
    record: Record
    images: Tensor
    layer: nn.Module | Callable[[Tensor], Any] | None
    given: nn.Module | Rows | None
    token: bool
    classes: Sequence[str] | None

    def __post_init__(self) -> None:
        self.logits = logits_of(self.record.output)
        self.candidates = self._candidates()

    def find(self) -> Found:
        """The map and the head; if nothing fits, a ClassifierError says what was found."""
        if isinstance(self.given, tuple):
            return self._find_for_tensors(*self.given)
        heads = list(self._heads())
        if not heads and self.given is not None:
            raise ClassifierError(
                "the module given as head is not a linear layer that the model ran (a matrix or a "
                "1 x 1 convolution on one vector per image); give its last linear layer, or the "
                "pair (weight, bias)"
            )
        own = [h for h in heads if self.classes is None or len(self.classes) == h.after.shape[1]]
        if heads and not own and (self.given is not None or self.token):
            raise ClassifierError(
                f"the head {heads[0].linear} has {heads[0].after.shape[1]} classes, but "
                f"{len(self.classes or ())} names were given; give one per class, in the order of "
                "its logits"
            )
        for head in own:
            if (match := self._trace(head.before, token=self.token)) is not None:
                layer, norms, raw = match
                reading = Reading(layer, head.linear, norms)
                if self.record.same(reading.logits_of(raw), head.after, 1.0):
                    return reading, self._names(head.after.shape[1]), head.output
        if self.classes is None or self.token:
            raise self._failure(heads)
        if heads:
            logger.warning(
                "the model's own head (%d classes) cannot serve for the %d given classes; a new "
                "linear head is fitted",
                heads[0].after.shape[1],
                len(self.classes),
            )
        return Reading(self._features_layer(heads), None, ()), self.classes, "features"

    def _names(self, count: int) -> Sequence[str]:
        return class_names(self.model, count) if self.classes is None else self.classes

    def _candidates(self) -> list[Candidate]:
        """Layers that may give the map, the last first."""
        if self.layer is not None and not isinstance(self.layer, nn.Module):
            with evaluation_mode(self.model):
                raw = first_tensor(self.layer(self.images))
            name = getattr(self.layer, "__name__", type(self.layer).__name__)
            return _layouts(self.layer, name, 0, raw)
        calls = [c for c in self.record.calls[::-1] if self.layer in (None, c.module)]
        if self.layer is not None and not calls:
            raise ClassifierError("the target_layer gave no tensor when the model ran")
        return [one for c in calls for one in _layouts(c.module, c.name, c.number, c.after)]

    def _ways(self, layer: MapLayer, raw: Tensor, *, token: bool) -> Iterator[MapLayer]:
        """Ways to read a layer's output as a vector and a map, the likeliest first."""
        count = raw.shape[1]
        if layer.layout != "tokens":
            yield from () if token else (replace(layer, relu=relu) for relu in (False, True))
        elif token:
            for n in range(min(MOST_PREFIX_TOKENS, count - 1)):
                yield replace(layer, token=n, prefix=self._prefix(count, n + 1))
        else:  # at least two patches remain
            prefixes = range(min(MOST_PREFIX_TOKENS, count - 2) + 1)
            likeliest = self._prefix(count, 0)
            for relu, prefix in product((False, True), (likeliest, *prefixes)):
                yield replace(layer, relu=relu, prefix=prefix)

    def _prefix(self, count: int, least: int) -> int:
        """Number of tokens before the patches, of ``count`` tokens."""
        said = getattr(self.model, "num_prefix_tokens", None)
        if isinstance(said, int) and said >= least:
            return said
        cells = {h * w for h, w in self.record.grids if h * w > 1}
        tried = range(least, min(MOST_PREFIX_TOKENS, count - 1) + 1)
        return next((prefix for prefix in tried if count - prefix in cells), least)

    def _with_stride(self, layer: MapLayer, raw: Tensor) -> MapLayer:
        """The layer with the stride of its tokens, which gives the grid for other sizes."""
        if layer.layout != "tokens":
            return layer
        return replace(layer, stride=self.record.token_stride(raw.shape[1] - layer.prefix))

    def _match(self, target: Tensor, *, token: bool, length: bool = False) -> Candidate | None:
        """The last map whose mean (or token; with ``length`` normalised) is the target (B, C)."""
        for layer, raw in self.candidates:
            if _channels(layer, raw) != target.shape[1]:
                continue
            for way in self._ways(layer, raw, token=token):
                vector = way.vector(raw)
                if self.record.same(F.normalize(vector, dim=1) if length else vector, target):
                    return self._with_stride(way, raw), raw
        return None

    def _heads(self) -> Iterator[Head]:
        """The given head, or linear layers whose output is the logits, the last first."""
        for call in reversed(self.record.calls):
            if (found := Linear.of(call, self.record)) is None:
                continue
            output = self._output(found[2]) if self.given is None else "logits"
            if output is not None and self.given in (None, call.module):
                yield Head(*found, output)

    def _output(self, logits: Tensor, least: float = 0.0) -> str | None:
        """Which of OUTPUTS of these logits the model gives."""
        for name, function in OUTPUTS.items():
            trivial = name == "softmax" and logits.shape[1] == 1
            if not trivial and self.record.same(function(logits), self.logits, least):
                return name
        return None

    def _back(self, vector: Tensor) -> Iterator[tuple[Tensor, tuple[Norm, ...]]]:
        """The vector, then the input of each norm that gave it, with those norms."""
        norms: tuple[Norm, ...] = ()
        yield vector, norms
        while not norms or norms[-1].kind == "affine":
            for call in reversed(self.record.calls):
                if not self.record.same(flat(call.after), vector):
                    continue
                norm, before = Norm.of(call, self.record), flat(call.before)
                if norm is not None and before is not None and norm not in norms:
                    break
            else:
                return
            norms, vector = (*norms, norm), before
            yield vector, norms

    def _trace(
        self, vector: Tensor, *, token: bool
    ) -> tuple[MapLayer, tuple[Norm, ...], Tensor] | None:
        """The map whose mean (or token) the vector is, the norms between, the layer's output."""
        for target, norms in self._back(vector):
            if (match := self._match(target, token=token)) is not None:
                return match[0], norms, match[1]
            if not token and all(norm.kind == "affine" for norm in norms):
                match = self._match(target, token=False, length=True)
                if match is not None:
                    return match[0], (*norms, Norm("length")), match[1]
        return None

    def _find_for_tensors(self, weight: Tensor, bias: Tensor | None) -> Found:
        """The last map on which given rows give the model's logits; else the given layer."""
        if not isinstance(weight, Tensor) or weight.ndim not in (2, 4):
            raise ClassifierError("head=(weight, bias) needs a weight (N, C)")
        weight = weight.detach().flatten(1)
        count, channels = weight.shape
        head, names = Linear(tensors=(weight, bias)), self._names(count)
        if len(names) != count:
            raise ClassifierError(
                f"the given weight has {count} rows, but {len(names)} class names were given"
            )
        comparable = self.logits is not None and self.logits.shape[1] == count
        fitting = [
            (way, raw)
            for layer, raw in self.candidates
            if _channels(layer, raw) == channels
            for way in self._ways(layer, raw, token=self.token)
        ]
        for norms in ((), (Norm("length"),)) if comparable else ():
            for layer, raw in fitting:
                output = self._output(Reading(layer, head, norms).logits_of(raw), 1.0)
                if output is not None:
                    return Reading(self._with_stride(layer, raw), head, norms), names, output
        if self.layer is None:
            raise ClassifierError(
                f"the given weight {tuple(weight.shape)} does not give the model's logits on the "
                "mean of any feature map; give target_layer= too"
            )
        if not fitting:
            raise ClassifierError(
                f"the given weight {tuple(weight.shape)} does not fit the given layer: none of its "
                f"axes has {channels} channels"
            )
        if comparable:
            logger.warning(
                "the given weight on the mean of the given layer does not give the model's own "
                "%d logits; it is used as a head beside the model's",
                count,
            )
        return Reading(self._with_stride(*fitting[0]), head, ()), names, "features"

    def _features_layer(self, heads: Sequence[Head]) -> MapLayer:
        """The map for a new head: that of a head's input or of the output; else the last map."""
        for vector in (*(head.before for head in heads), flat(first_tensor(self.record.output))):
            if vector is None:
                continue
            match = self._trace(vector, token=False) or self._trace(vector, token=True)
            if match is not None:
                return replace(match[0], token=None)
        said = str(getattr(self.model, "output_fmt", "NCHW"))
        for layer, raw in self.candidates:
            if self.layer is None and "Adaptive" in type(layer.layer).__name__:
                continue  # its grid is the same for every image
            if layer.layout == "tokens":
                return self._with_stride(next(self._ways(layer, raw, token=False)), raw)
            # of two layouts the one whose grid has the shape of the image
            last, first = (misshape(g, self.record.size) for g in (raw.shape[1:3], raw.shape[2:]))
            if (layer.layout == "NHWC") == (said.endswith("NHWC") or last < first):
                return layer
        raise ClassifierError(
            f"no feature map was found in {type(self.model).__name__}: no layer gives one (B, "
            "C, h, w), with channels last or as tokens; pass target_layer="
        )

    def _failure(self, heads: Sequence[Head]) -> ClassifierError:
        name = type(self.model).__name__
        new = "classes=[...] to fit a new linear head on the mean of its feature map"
        own = "target_layer= and head= where they are known"
        if not heads:
            shape = None if self.logits is None else tuple(self.logits.shape)
            return ClassifierError(
                f"no linear layer was found in {name} whose output is what the model gives: it "
                f"gives {f'logits {shape}' if shape else 'no logits (B, N)'}. Pass {new}, or {own}"
            )
        vector, start = heads[0].before, f"the head {heads[0].linear} of {name}"
        if self.token:
            return ClassifierError(
                f"{start} does not read a class token; leave pool= out, or pass {new}"
            )
        if (token := self._trace(vector, token=True)) is not None:
            return ClassifierError(
                f"{start} reads the class token (token {token[0].token} of {token[0].name}), so "
                "its logits are not linear in the mean of a feature map. "
                'Pass pool="token" to take its rows on the patch tokens, or classes=[...] to fit a '
                "new linear head on the mean of the patch tokens"
            )
        where = "the given target_layer" if self.layer is not None else "any feature map"
        return ClassifierError(
            f"the vector ({vector.shape[1]} channels) that {start} reads is not the mean of "
            f"{where} (as it is, after ReLU, or before a batch, layer, RMS or L2 norm); it may be "
            "what another layer of the head gives, a maximum, or two vectors joined. Images were "
            f"{self.record.size[0]} x {self.record.size[1]}. Pass {new}, or {own}"
        )


def _layouts(layer: Any, name: str, number: int, raw: Tensor | None) -> list[Candidate]:
    """Layouts in which a layer's output can be read as a map of more than one cell."""
    if raw is None or not raw.is_floating_point():
        return []
    layouts: list[Layout] = []
    if raw.ndim == 4 and min(raw.shape[1:]) > 0:
        if raw.shape[2:].numel() > 1:
            layouts.append("NCHW")
        if raw.shape[1] * raw.shape[2] > 1:
            layouts.append("NHWC")
    elif raw.ndim == 3 and raw.shape[1] > 1:
        layouts.append("tokens")
    return [(MapLayer(layer, name, number, layout), raw.float()) for layout in layouts]


def _channels(layer: MapLayer, raw: Tensor) -> int:
    return raw.shape[1 if layer.layout == "NCHW" else -1]


def class_names(model: nn.Module, count: int) -> list[str]:
    """Short, distinct names of a model's classes.

    They come from its configuration (``id2label``), or from ImageNet if timm knows the model's
    classes; otherwise they are numbers.
    """
    labels: Any = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(labels, Mapping) or set(labels) != set(range(count)):
        of_timm = getattr(model, "pretrained_cfg", None) is not None
        subset = imagenet_info.infer_imagenet_subset(model) if of_timm else None
        info: Any = imagenet_info.ImageNetInfo(subset) if subset else None
        if info is None or info.num_classes() != count:
            return [f"class {index}" for index in range(count)]
        labels = info.label_descriptions()
    names = [str(labels[index]).split(",")[0].strip() for index in range(count)]
    uses = Counter(names)
    return [f"{n} ({index})" if uses[n] > 1 else n for index, n in enumerate(names)]
