"""Search for the feature map and the linear head of a model in a recorded pass, by numbers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, product
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import imagenet_info
from torch import Tensor, nn

from lpcam.classifiers.map_check import ASPECT, PLACED, Figures, MapCheck
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
    grid_of,
    logits_of,
    misshape,
)
from lpcam.runtime.errors import ClassifierError

logger = logging.getLogger(__name__)
Pool = Literal["mean", "token"]
NEW = "classes=[...] to fit a new linear head on the mean of its feature map"
EARLIEST = 0.15  #: Least share of the layers with weights before the map of a new head.
MOST_LISTED = 5  #: Number of layers that a message lists.
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
Traced = tuple[MapLayer, tuple[Norm, ...], Tensor]
"""A layer of the map, the norms after its pooling, and its output"""


class Found(NamedTuple):
    """What the search found."""

    reading: Reading  #: The map and the head
    classes: Sequence[str]
    output: str  #: Which of OUTPUTS the model gives
    figures: Figures  #: Of the check of the map


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
    layer: nn.Module | Callable[[Tensor], Any] | None
    given: nn.Module | Rows | None
    token: bool
    classes: Sequence[str] | None
    check: MapCheck
    failed: dict[str, str] = field(default_factory=dict)
    """Layers that behave unlike a feature map, with their shapes: why"""

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
            for layer, norms, raw in self._trace(head.before, token=self.token):
                reading = Reading(layer, head.linear, norms)
                if not self.record.same(reading.logits_of(raw), head.after, 1.0):
                    break
                if (figures := self._figures(layer, raw)) is not None:
                    return Found(reading, self._names(head.after.shape[1]), head.output, figures)
        if self.classes is None or self.token:
            raise self._failure(heads)
        if heads:
            logger.warning(
                "the model's own head (%d classes) cannot serve for the %d given classes; a new "
                "linear head is fitted",
                heads[0].after.shape[1],
                len(self.classes),
            )
        layer, figures = self._features_layer(heads)
        return Found(Reading(layer, None, ()), self.classes, "features", figures)

    def _figures(self, layer: MapLayer, raw: Tensor) -> Figures | None:
        """Figures of a map or a given layer; None for another, whose failure is kept."""
        figures = self.check.figures(layer, raw)
        if figures.failure and self.layer is None:
            self._fail(layer, raw, figures.failure)
            return None
        if figures.failure:
            logger.warning("the given target_layer is no feature map: %s", figures)
        elif not figures.is_local:
            logger.warning("%s: %s", layer, figures)
        return figures

    def _fail(self, layer: MapLayer, raw: Tensor, why: str) -> None:
        shape = raw.transpose(0, 1).shape if layer.batch_axis else raw.shape
        self.failed.setdefault(f"{layer.name or 'its output'} {tuple(shape)}", why)

    def _names(self, count: int) -> Sequence[str]:
        return class_names(self.model, count) if self.classes is None else self.classes

    def _candidates(self) -> list[Candidate]:
        """Layers that may give the map, the last first."""
        if self.layer is not None and not isinstance(self.layer, nn.Module):
            with evaluation_mode(self.model):
                raw = first_tensor(self.layer(self.record.images))
            name = getattr(self.layer, "__name__", type(self.layer).__name__)
            return _layouts(self.layer, name, 0, raw, len(self.record.images))
        calls = [c for c in self.record.calls[::-1] if self.layer in (None, c.module)]
        if self.layer is not None and not calls:
            raise ClassifierError("the target_layer gave no tensor when the model ran")
        count = len(self.record.images)
        return [
            (replace(layer, part=c.part), raw)
            for _, parts in groupby(calls, key=lambda c: (id(c.module), c.number))
            # of several maps that a module gives, the smallest is the deepest
            for c in sorted(parts, key=lambda c: 0 if c.after is None else c.after.numel())
            for layer, raw in _layouts(c.module, c.name, c.number, c.after, count)
        ]

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
            for relu, prefix in product((False, True), dict.fromkeys((likeliest, *prefixes))):
                yield replace(layer, relu=relu, prefix=prefix)

    def _prefix(self, count: int, least: int) -> int:
        """Number of tokens before the patches, of ``count`` tokens."""
        said = getattr(self.model, "num_prefix_tokens", None)
        if isinstance(said, int) and said >= least:
            return said
        return next(iter(self._prefixes(count, least)), least)

    def _prefixes(self, count: int, least: int = 0) -> list[int]:
        """Numbers of prefix tokens that leave a grid of the image's shape, the likeliest first."""
        size = self.record.size
        cells = {h * w for h, w in self.record.grids if misshape((h, w), size) < ASPECT}
        tried = range(least, min(MOST_PREFIX_TOKENS, count - 2) + 1)
        seen = [prefix for prefix in tried if count - prefix in cells - {1}]
        close = [p for p in tried if misshape(grid_of(count - p, size), size) < ASPECT / 4]
        return seen or close

    def _with_stride(self, layer: MapLayer, raw: Tensor) -> MapLayer:
        """The layer with the stride of its tokens, which gives the grid for other sizes."""
        if layer.layout != "tokens":
            return layer
        return replace(layer, stride=self.record.token_stride(raw.shape[1] - layer.prefix))

    def _matches(self, target: Tensor, *, token: bool, length: bool = False) -> Iterator[Candidate]:
        """Maps whose mean (or token; with ``length`` normalised) is the target, the last first."""
        for layer, raw in self.candidates:
            if _channels(layer, raw) != target.shape[1]:
                continue
            for way in self._ways(layer, raw, token=token):
                vector = way.vector(raw)
                if self.record.same(F.normalize(vector, dim=1) if length else vector, target):
                    yield self._with_stride(way, raw), raw
                    break

    def _heads(self) -> Iterator[Head]:
        """The given head, or linear layers whose output is the logits, the last first."""
        for call in reversed(self.record.calls):
            found = Linear.of(call, self.record) if self.given in (None, call.module) else None
            output = self._output(found[2]) if found and self.given is None else "logits"
            if found and output:
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

    def _trace(self, vector: Tensor, *, token: bool) -> Iterator[Traced]:
        """Maps whose mean (or token) the vector is, the last first."""
        for target, norms in self._back(vector):
            for layer, raw in self._matches(target, token=token):
                yield layer, norms, raw
            if not token and all(norm.kind == "affine" for norm in norms):
                for layer, raw in self._matches(target, token=False, length=True):
                    yield layer, (*norms, Norm("length")), raw

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
                way = self._with_stride(layer, raw)
                if output is not None and (figures := self._figures(way, raw)) is not None:
                    return Found(Reading(way, head, norms), names, output, figures)
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
        ways = [(self._with_stride(layer, raw), raw) for layer, raw in fitting]
        checked = [(way, self.check.figures(way, raw)) for way, raw in ways]
        layer, figures = max(checked, key=lambda one: not one[1].failure)
        return Found(Reading(layer, head, ()), names, "features", figures)

    def _features_layer(self, heads: Sequence[Head]) -> tuple[MapLayer, Figures]:
        """The map for a new head: that of a head's input or of the output; else the deepest."""
        vectors = [*(head.before for head in heads), flat(first_tensor(self.record.output))]
        for vector in (one for one in vectors if one is not None):
            for token in (False, True):
                for layer, _, raw in self._trace(vector, token=token):
                    figures = self._figures(layer, raw)
                    # a mean is one of places; a token, or tokens all like it, need not be a map
                    doubtful = token or layer.prefix > 0
                    if figures is not None and not (doubtful and figures.locality < PLACED):
                        return replace(layer, token=None), figures
        if self.layer is None and not self.check.answers:
            raise self._no_map("its output is not one for each image, as of a detector")
        mixed = None if self.layer is None else self._best(self.candidates)
        self.check.together = True
        # A head on a linear function of each cell is one on the cells, which tell more.
        for linear in (False, True) if self.layer is None else ():
            for layer, raw in self.candidates:
                if self._is_linear(layer) != linear or (best := self._best([(layer, raw)])) is None:
                    continue
                if self._share_before(layer) < EARLIEST:
                    self._fail(layer, raw, "it is one of the first layers")
                elif best[1].locality < PLACED:
                    # tokens of a model of one size need not belong to places at all
                    if not self.check.follows_size and layer.layout == "tokens":
                        self._fail(layer, raw, "its tokens mix the whole image")
                    elif mixed is None and self.check.carries(best[0]):
                        mixed = best
                elif self.check.carries(best[0]):
                    return best
                else:
                    self._fail(layer, raw, "the model's output does not depend on it alone")
        if mixed is None:
            raise self._no_map()
        return mixed

    def _share_before(self, layer: MapLayer) -> float:
        """Share of the calls with weights that end before a layer's call does."""
        calls = [c for c in self.record.calls if next(c.module.parameters(False), None) is not None]
        order = {id(call): index for index, call in enumerate(self.record.calls)}
        own = [c for c in self.record.calls if (c.module, c.number) == (layer.layer, layer.number)]
        before = sum(order[id(c)] <= order[id(own[0])] for c in calls)
        return before / len(calls) if calls else 1.0

    def _is_linear(self, layer: MapLayer) -> bool:
        weight = getattr(layer.layer, "weight", None)
        return isinstance(weight, Tensor) and weight.ndim >= 2 and weight[0, 0].numel() == 1

    def _readings(self, layer: MapLayer, raw: Tensor) -> list[MapLayer]:
        """Ways to read a layer's output as a map, whatever reads it."""
        if layer.layout != "tokens":
            return [layer]
        prefixes = self._prefixes(raw.shape[1])[:3] or [0] * (self.layer is not None)
        return [self._with_stride(replace(layer, prefix=p), raw) for p in prefixes]

    def _best(self, candidates: Sequence[Candidate]) -> tuple[MapLayer, Figures] | None:
        """The way to read layers that behaves most like a map; of a given layer in any case."""
        ways = [
            (way, raw, self.check.figures(way, raw))
            for layer, raw in candidates
            for way in self._readings(layer, raw)
        ]
        if not ways:
            for layer, raw in candidates:
                self._fail(layer, raw, "its tokens fill no grid of the image's shape")
            return None
        way, raw, found = max(ways, key=lambda one: (not one[2].failure, one[2].locality))
        told = found.failure or self.layer is not None
        figures = self._figures(way, raw) if told else found
        return None if figures is None else (way, figures)

    def _no_map(self, why: str = "no layer gives a tensor of 3 or 4 axes") -> ClassifierError:
        name = type(self.model).__name__
        seen = [f"{layer}: {failure}" for layer, failure in self.failed.items()]
        listed = "; ".join(seen[:MOST_LISTED]) or why
        return ClassifierError(
            f"no feature map was found in {name}: {listed}. Pass target_layer= (the name of one of "
            "these or an earlier layer, or a function from images to the map) if you know it"
        )

    def _failure(self, heads: Sequence[Head]) -> ClassifierError:
        name, way = type(self.model).__name__, "target_layer= and head= where they are known"
        if not heads:
            shape = None if self.logits is None else tuple(self.logits.shape)
            return ClassifierError(
                f"no linear layer was found in {name} whose output is what the model gives: it "
                f"gives {f'logits {shape}' if shape else 'no logits (B, N)'}. Pass {way}, or {NEW}"
            )
        vector, start = heads[0].before, f"the head {heads[0].linear} of {name}"
        if self.token:
            why, way = "does not read a class token", 'pool="mean"'
        elif (token := next(self._trace(vector, token=True), None)) is not None:
            why = (
                f"reads the class token (token {token[0].token} of {token[0].name}), so its logits "
                "are not linear in the mean of a feature map"
            )
            way = 'pool="token" to take its rows on the patch tokens'
        elif self.failed:
            layer, failure = next(iter(self.failed.items()))
            why = f"reads the mean of {layer}, which is no feature map: {failure}"
            way = "target_layer= to use it nevertheless"
        else:
            where = "the given target_layer" if self.layer is not None else "any feature map"
            why = (
                f"reads a vector ({vector.shape[1]} channels) that is not the mean of {where} (as "
                "it is, after ReLU, or before a batch, layer, RMS or L2 norm), but perhaps of "
                "another layer of the head, a maximum, or two vectors joined"
            )
        return ClassifierError(f"{start} {why}. Pass {way}, or {NEW}")


def _layouts(layer: Any, name: str, number: int, raw: Tensor | None, count: int) -> list[Candidate]:
    """Layouts in which a layer's output for ``count`` images can be a map of several cells."""
    if raw is None or not raw.is_floating_point() or raw.ndim not in (3, 4):
        return []
    if raw.shape[0] != count:
        swapped = raw.ndim == 3 and raw.shape[1] == count and raw.shape[0] > 1
        tokens = MapLayer(layer, name, number, "tokens", batch_axis=1)
        return [(tokens, raw.float().transpose(0, 1))] if swapped else []
    layouts: list[Layout] = []
    if raw.ndim == 4 and min(raw.shape[1:]) > 0:
        if raw.shape[2:].numel() > 1:
            layouts.append("NCHW")
        if raw.shape[1] * raw.shape[2] > 1 and raw.shape[3] > 1:
            layouts.append("NHWC")
    elif raw.ndim == 3 and raw.shape[1] > 1:
        layouts.append("tokens")
    return [(MapLayer(layer, name, number, layout), raw.float()) for layout in layouts]


def _channels(layer: MapLayer, raw: Tensor) -> int:
    return raw.shape[1 if layer.layout == "NCHW" else -1]


def class_names(model: nn.Module, count: int) -> list[str]:
    """Distinct names: those of a model's configuration, of ImageNet as in timm, or numbers."""
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
