"""Search for the feature map and the linear head of a model in a recorded pass."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
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


class Finder:
    """Searches a recorded pass of images for the map and the head, as ``wrap`` asks for them."""

    def __init__(
        self,
        model: nn.Module,
        record: Record,
        images: Tensor,
        layer: nn.Module | Callable[[Tensor], Any] | None,
        head: nn.Module | Rows | None,
        pool: Pool | None,
        classes: Sequence[str] | None,
    ) -> None:
        self.model, self.record = model, record
        self.layer, self.given, self.pool = layer, head, pool
        self.classes = None if classes is None else tuple(classes)
        self.logits = logits_of(record.output)
        self.candidates = self._candidates(images)

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
        named = None if self.classes is None else len(self.classes)
        own = [head for head in heads if named in (None, head.after.shape[1])]
        if heads and not own and (self.given is not None or self.pool == "token"):
            raise ClassifierError(
                f"the head {heads[0].linear} has {heads[0].after.shape[1]} classes, but {named} "
                "names were given; give one name per class, in the order of its logits"
            )
        for head in own:
            match = self._trace(head.before, token=self.pool == "token")
            if match is not None:
                layer, norms, raw = match
                reading = Reading(layer, head.linear, norms)
                if self.record.same(reading.logits_of(raw), head.after, 1.0):
                    return reading, self._names(head.after.shape[1]), head.output
        if self.classes is None or self.pool == "token":
            raise self._failure(heads)
        if heads:
            logger.warning(
                "the model's own head (%d classes) cannot serve for the %d given classes; a new "
                "linear head is fitted",
                heads[0].after.shape[1],
                named,
            )
        return Reading(self._features_layer(heads), None, ()), self.classes, "features"

    def _names(self, count: int) -> Sequence[str]:
        return class_names(self.model, count) if self.classes is None else self.classes

    def _candidates(self, images: Tensor) -> list[Candidate]:
        """Layers that may give the map, the last first."""
        if self.layer is not None and not isinstance(self.layer, nn.Module):
            with evaluation_mode(self.model):
                raw = first_tensor(self.layer(images))
            name = getattr(self.layer, "__name__", type(self.layer).__name__)
            return _layouts(self.layer, name, 0, raw)
        calls = [c for c in self.record.calls[::-1] if self.layer in (None, c.module)]
        if self.layer is not None and not calls:
            raise ClassifierError("the target_layer gave no tensor when the model ran")
        return [one for c in calls for one in _layouts(c.module, c.name, c.number, c.after)]

    def _with_stride(self, layer: MapLayer, raw: Tensor) -> MapLayer:
        """The layer with the stride of its tokens, which gives the grid for other sizes."""
        if layer.layout != "tokens":
            return layer
        return replace(layer, stride=self.record.token_stride(raw.shape[1] - layer.prefix))

    def _mean_match(self, target: Tensor, *, length: bool = False) -> Candidate | None:
        """The last map whose mean (with ``length``: normalised mean) is the target (B, C)."""
        for layer, raw in self.candidates:
            if _channels(layer, raw) != target.shape[1]:
                continue
            for relu in (False, True):
                for prefix in _prefixes(layer, raw):
                    tried = replace(layer, relu=relu, prefix=prefix)
                    mean = tried.vector(raw)
                    if self.record.same(F.normalize(mean, dim=1) if length else mean, target):
                        return self._with_stride(tried, raw), raw
        return None

    def _token_match(self, target: Tensor) -> Candidate | None:
        """The last tokens of which one is the target (B, C)."""
        for layer, raw in self.candidates:
            if layer.layout != "tokens" or raw.shape[2] != target.shape[1]:
                continue
            for token in range(min(MOST_PREFIX_TOKENS, raw.shape[1] - 1)):
                if self.record.same(raw[:, token], target):
                    prefix = self._prefix(raw.shape[1], token + 1)
                    return self._with_stride(replace(layer, token=token, prefix=prefix), raw), raw
        return None

    def _prefix(self, count: int, least: int) -> int:
        """Number of tokens before the patches, of ``count`` tokens."""
        said = getattr(self.model, "num_prefix_tokens", None)
        if isinstance(said, int) and said >= least:
            return said
        cells = {h * w for h, w in self.record.grids if h * w > 1}
        tried = range(least, min(MOST_PREFIX_TOKENS, count - 1) + 1)
        return next((prefix for prefix in tried if count - prefix in cells), least)

    def _heads(self) -> Iterator[Head]:
        """The given head, or linear layers whose output is the logits, the last first."""
        for call in reversed(self.record.calls):
            linear = Linear.of(call, self.record)
            before, after = flat(call.before, pooled=True), flat(call.after, pooled=True)
            if linear is None or before is None or after is None:
                continue
            if self.given is None:
                output = self._output(after)
            else:
                output = "logits" if call.module is self.given else None
            if output is not None:
                yield Head(linear, before, after, output)

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
            match = self._token_match(target) if token else self._mean_match(target)
            if match is not None:
                return match[0], norms, match[1]
            if not token and all(norm.kind == "affine" for norm in norms):
                match = self._mean_match(target, length=True)
                if match is not None:
                    return match[0], (*norms, Norm("length")), match[1]
        return None

    def _find_for_tensors(self, weight: Tensor, bias: Tensor | None) -> Found:
        """The last map on which given rows give the model's logits; else the given layer."""
        if not isinstance(weight, Tensor) or weight.ndim not in (2, 4):
            raise ClassifierError("head=(weight, bias) needs a weight (N, C)")
        weight = weight.detach().flatten(1)
        head, count = Linear(tensors=(weight, bias)), weight.shape[0]
        if self.classes is not None and len(self.classes) != count:
            raise ClassifierError(
                f"the given weight has {count} rows, but {len(self.classes)} class names were given"
            )
        names = self._names(count)
        comparable = self.logits is not None and self.logits.shape[1] == count
        fitting = [
            (layer, raw)
            for first, raw in self.candidates
            if _channels(first, raw) == weight.shape[1]
            for layer in self._readings(first, raw)
        ]
        for norms in ((), (Norm("length"),)) if comparable else ():
            for layer, raw in fitting:
                output = self._output(Reading(layer, head, norms).logits_of(raw), 1.0)
                if output is not None:
                    return Reading(self._with_stride(layer, raw), head, norms), names, output
        if self.layer is not None and fitting:
            if comparable:
                logger.warning(
                    "the given weight on the mean of the given layer does not give the model's own "
                    "%d logits; it is used as a head beside the model's",
                    count,
                )
            return Reading(self._with_stride(*fitting[0]), head, ()), names, "features"
        raise ClassifierError(
            f"the given weight {tuple(weight.shape)} does not fit the given layer: none of its "
            f"axes has {weight.shape[1]} channels"
            if self.layer is not None
            else f"the given weight {tuple(weight.shape)} does not give the model's logits on the "
            "mean of any feature map; give target_layer= too"
        )

    def _readings(self, layer: MapLayer, raw: Tensor) -> Iterator[MapLayer]:
        """Ways to read a layer's output for a given weight, the likeliest first."""
        if layer.layout != "tokens":
            yield from (layer, replace(layer, relu=True))
            return
        least = self._prefix(raw.shape[1], 0)
        if self.pool == "token":
            yield replace(layer, token=0, prefix=max(1, least))
        else:
            yield from (replace(layer, prefix=n) for n in (least, *_prefixes(layer, raw)))

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
                return self._with_stride(replace(layer, prefix=self._prefix(raw.shape[1], 0)), raw)
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
        if self.pool == "token":
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
        if layers := self._layers_before(heads[0].linear):
            return ClassifierError(
                f"the head of {name} is a network of several layers "
                f"({', '.join([*layers, str(heads[0].linear)])}), so its logits are not linear in "
                f"the mean of a feature map. Pass {new}"
            )
        where = "the given target_layer" if self.layer is not None else "any feature map"
        return ClassifierError(
            f"the vector ({vector.shape[1]} channels) that {start} reads is not the mean of "
            f"{where} (as it is, after ReLU, or before a batch, layer, RMS or L2 norm); it may be "
            f"a maximum, or two vectors joined. Images were {self.record.size[0]} x "
            f"{self.record.size[1]}. Pass {new}, or {own}"
        )

    def _layers_before(self, head: Linear) -> list[str]:
        """Layers with weights on one vector per image, after the last map and before the head."""
        names: list[str] = []
        for call in self.record.calls:
            if call.module is head.module:
                break
            if call.after is None or call.after.ndim not in (2, 3, 4):
                continue
            if flat(call.after) is None:
                names = []  # vectors before a map are not part of the head
            elif getattr(getattr(call.module, "weight", None), "ndim", 0) in (2, 4):
                names.append(str(call))
        return names


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


def _prefixes(layer: MapLayer, raw: Tensor) -> range:
    """Possible numbers of tokens before the patches; at least two patches remain."""
    most = min(MOST_PREFIX_TOKENS, raw.shape[1] - 2) if layer.layout == "tokens" else 0
    return range(most + 1)


def class_names(model: nn.Module, count: int) -> list[str]:
    """Short, distinct names of a model's classes.

    They come from its configuration (``id2label``), or from ImageNet if timm knows the model's
    classes; otherwise they are numbers.
    """
    labels: Any = getattr(getattr(model, "config", None), "id2label", None)
    of_timm = getattr(model, "pretrained_cfg", None) is not None
    subset = imagenet_info.infer_imagenet_subset(model) if of_timm else None
    info: Any = imagenet_info.ImageNetInfo(subset) if subset else None
    if isinstance(labels, Mapping) and set(labels) == set(range(count)):
        name_of: Callable[[int], Any] = labels.__getitem__
    elif info is not None and info.num_classes() == count:
        name_of = info.index_to_description
    else:
        return [f"class {index}" for index in range(count)]
    names = [str(name_of(index)).split(",")[0].strip() for index in range(count)]
    uses = Counter(names)
    return [f"{n} ({index})" if uses[n] > 1 else n for index, n in enumerate(names)]
