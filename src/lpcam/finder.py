"""The feature map and the linear head of a model, looked for in a recorded pass."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data import imagenet_info
from torch import Tensor, nn

from lpcam.errors import ClassifierError
from lpcam.structure import (
    Linear,
    Norm,
    Place,
    Record,
    cast_rows,
    first_tensor,
    flat,
    linear_of,
    logits_of,
    norm_of,
    probe_grid,
    stride_of,
    undisturbed,
    vector_of,
)

logger = logging.getLogger(__name__)

Pool = Literal["mean", "token"]
MOST_PREFIX_TOKENS = 16
"""Class, distillation and register tokens before the patches."""
OUTPUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda z: z,
    "sigmoid": torch.sigmoid,
    "softmax": lambda z: z.softmax(1),
    "log softmax": lambda z: z.log_softmax(1),
}
"""What a model may give of its logits."""

Found = tuple[Place, Linear | None, tuple[Norm, ...], Sequence[str], str, str]


class Finder:
    """Looks through a recorded pass for the map and the head."""

    def __init__(
        self,
        model: nn.Module,
        record: Record,
        images: Tensor,
        layer: nn.Module | Callable[[Tensor], Any] | None,
        head: nn.Module | tuple[Tensor, Tensor | None] | None,
        pool: Pool | None,
        classes: Sequence[str] | None,
    ) -> None:
        self.model, self.record, self.images = model, record, images
        self.layer, self.given, self.pool = layer, head, pool
        self.classes = None if classes is None else tuple(classes)
        self.logits = logits_of(record.output)
        self.candidates = self._candidates()

    # .. what could be the map

    def _candidates(self) -> list[tuple[Place, Tensor]]:
        """Outputs that could be a map, the last first, each with what its layer gave."""
        if self.layer is not None and not isinstance(self.layer, nn.Module):
            with undisturbed(self.model):
                raw = first_tensor(self.layer(self.images))
            name = getattr(self.layer, "__name__", type(self.layer).__name__)
            return self._layouts(self.layer, name, 0, raw)
        calls = list(reversed(self.record.calls))
        if self.layer is not None:
            calls = [call for call in calls if call.module is self.layer]
            if not calls:
                raise ClassifierError(
                    "the layer given as feature_layer gave no tensor when the model ran"
                )
        return [
            found
            for call in calls
            for found in self._layouts(call.module, call.name, call.number, call.after)
        ]

    def _layouts(
        self, layer: Any, name: str, number: int, raw: Tensor | None
    ) -> list[tuple[Place, Tensor]]:
        if raw is None or not raw.is_floating_point():
            return []
        raw = raw.float()
        if raw.ndim == 4:
            if min(raw.shape[1:]) == 0:
                return []
            found = []
            if raw.shape[2] * raw.shape[3] > 1:
                found.append((Place(layer, name, number, "NCHW"), raw))
            if raw.shape[1] * raw.shape[2] > 1:
                found.append((Place(layer, name, number, "NHWC"), raw))
            return found
        if raw.ndim == 3 and raw.shape[1] > 1:
            return [(Place(layer, name, number, "tokens"), raw)]
        return []

    def _placed(self, source: Place, raw: Tensor) -> Place:
        """With the stride of its grid, by which the grid of other sizes is found."""
        if source.layout != "tokens":
            return source
        grid = probe_grid(raw.shape[1] - source.prefix, self.record)
        return replace(source, stride=stride_of(grid, self.record.size))

    def _mean_match(self, target: Tensor, *, length: bool = False) -> tuple[Place, Tensor] | None:
        """The last map whose mean is the target (or, with ``length``, the target's direction)."""
        for source, raw in self.candidates:
            axis = 1 if source.layout == "NCHW" else -1
            if raw.shape[axis] != target.shape[1]:
                continue
            prefixes = range(1)
            if source.layout == "tokens":
                prefixes = range(min(MOST_PREFIX_TOKENS, raw.shape[1] - 2) + 1)
            for relu in (False, True):
                for prefix in prefixes:
                    tried = replace(source, relu=relu, prefix=prefix)
                    mean = tried.vector(raw)
                    if length:
                        mean = F.normalize(mean, dim=1)
                    if self.record.same(mean, target):
                        return self._placed(tried, raw), raw
        return None

    def _token_match(self, target: Tensor) -> tuple[Place, Tensor] | None:
        """The last tokens of which one is the target."""
        for source, raw in self.candidates:
            if source.layout != "tokens" or raw.shape[2] != target.shape[1]:
                continue
            for token in range(min(MOST_PREFIX_TOKENS, raw.shape[1] - 1)):
                if self.record.same(raw[:, token], target):
                    prefix = self._prefix(raw.shape[1], token + 1)
                    found = replace(source, token=token, prefix=prefix)
                    return self._placed(found, raw), raw
        return None

    def _prefix(self, count: int, least: int) -> int:
        """How many of the tokens stand before the patches."""
        said = getattr(self.model, "num_prefix_tokens", None)
        if isinstance(said, int) and said >= least:
            return said
        for prefix in range(least, min(MOST_PREFIX_TOKENS, count - 1) + 1):
            if any(h * w == count - prefix > 1 for h, w in self.record.grids):
                return prefix
        return least

    # .. back from a vector

    def _back(self, vector: Tensor) -> Iterator[tuple[Tensor, tuple[Norm, ...]]]:
        """The vector, then what stood before each norm that gave it, with those norms."""
        norms: tuple[Norm, ...] = ()
        yield vector, norms
        while not norms or norms[-1].kind == "affine":
            for call in reversed(self.record.calls):
                if not self.record.same(flat(call.after), vector):
                    continue
                norm = norm_of(call, self.record)
                before = flat(call.before)
                if norm is not None and before is not None and norm not in norms:
                    break
            else:
                return
            norms, vector = (*norms, norm), before
            yield vector, norms

    def _map_of(self, vector: Tensor) -> tuple[Place, tuple[Norm, ...], Tensor] | None:
        """The map whose mean the vector is, and the norms between, the head's neighbour first."""
        for target, norms in self._back(vector):
            if (match := self._mean_match(target)) is not None:
                return match[0], norms, match[1]
            if all(norm.kind == "affine" for norm in norms):
                match = self._mean_match(target, length=True)
                if match is not None:
                    return match[0], (*norms, Norm("length")), match[1]
        return None

    def _token_of(self, vector: Tensor) -> tuple[Place, tuple[Norm, ...], Tensor] | None:
        for target, norms in self._back(vector):
            if (match := self._token_match(target)) is not None:
                return match[0], norms, match[1]
        return None

    # .. the head

    def _heads(self) -> Iterator[tuple[Linear, Tensor, str]]:
        """Linear layers whose output is the logits, the vector they read, what the model gives."""
        for call in reversed(self.record.calls):
            linear = linear_of(call, self.record)
            if linear is None or call.before is None or call.after is None:
                continue
            before, after = vector_of(call.before), vector_of(call.after)
            assert before is not None and after is not None  # noqa: PT018 - a linear has both
            if self.given is not None:
                if call.module is self.given:
                    yield linear, before, "logits"
                continue
            for name, function in OUTPUTS.items():
                if name == "softmax" and after.shape[1] == 1:
                    continue
                if self.logits is not None and self.record.same(function(after), self.logits):
                    yield linear, before, name
                    break

    def find(self) -> Found:
        """The map, the head, the norms between, the names and all of it in words."""
        if isinstance(self.given, tuple):
            return self._with_tensors(*self.given)
        heads = list(self._heads())
        if self.given is not None and not heads:
            raise ClassifierError(
                "the module given as classifier is no linear layer that the model ran (a matrix or "
                "a 1 x 1 convolution on one vector an image); give its last linear layer, or the "
                "pair (weight, bias)"
            )
        counts = [head.rows()[0].shape[0] for head, _, _ in heads]
        named = None if self.classes is None else len(self.classes)
        own = [h for h, n in zip(heads, counts, strict=True) if named in (None, n)]
        if heads and not own and (self.given is not None or self.pool == "token"):
            raise ClassifierError(
                f"the head {heads[0][0]} has {counts[0]} classes, but {named} names were given; "
                "give one name a class, in the order of its logits"
            )
        for head, vector, output in own:
            match = self._token_of(vector) if self.pool == "token" else self._map_of(vector)
            if match is not None:
                source, norms, raw = match
                if self._agrees(head, source, norms, raw):
                    names = self._named(head.rows()[0].shape[0])
                    words = self._words(source, norms, str(head), output)
                    return source, head, norms, names, words, output
        if self.classes is not None and self.pool != "token":
            return self._new_head(heads)
        raise self._nothing(heads)

    def _agrees(self, head: Linear, source: Place, norms: tuple[Norm, ...], raw: Tensor) -> bool:
        """Whether the folded rows on the map give the logits of the probe."""
        weight, bias = head.rows()
        expected = source.vector(raw)
        for norm in norms:
            expected = expected / norm.divide(expected)
            weight, bias = norm.fold(weight, bias)
        found = F.linear(expected, *cast_rows((weight, bias), expected))
        call = None if head.module is None else self.record.last(head.module)
        wanted = self.logits if call is None or call.after is None else vector_of(call.after)
        if wanted is None or wanted.shape != found.shape:
            return False
        largest = max(1.0, float(wanted.abs().max()))
        return float((found - wanted).abs().max()) <= self.record.tolerance * largest

    def _words(self, source: Place, norms: Sequence[Norm], head: str, output: str) -> str:
        read = "pooled by its mean" if source.token is None else f"token {source.token} of it read"
        between = "".join(f", then {norm}" for norm in reversed(norms))
        given = "" if output == "logits" else f"; the model gives the {output} of its logits"
        return f"map: {source}; {read}{between}; head: {head}{given}"

    def _named(self, count: int) -> Sequence[str]:
        return class_names(self.model, count) if self.classes is None else self.classes

    # .. where the model's own head does not serve

    def _with_tensors(self, weight: Tensor, bias: Tensor | None) -> Found:
        """The last map on which the given rows give the model's logits; else the given layer."""
        if not isinstance(weight, Tensor) or weight.ndim not in (2, 4):
            raise ClassifierError("classifier=(weight, bias) needs a weight (N, C)")
        weight = weight.detach().flatten(1)
        head = Linear(tensors=(weight, bias))
        count = weight.shape[0]
        if self.classes is not None and len(self.classes) != count:
            raise ClassifierError(
                f"the given weight has {count} rows, but {len(self.classes)} class names were given"
            )
        logits = self.logits if self.logits is not None and self.logits.shape[1] == count else None
        readings = [
            (source, raw)
            for first, raw in self.candidates
            if raw.shape[1 if first.layout == "NCHW" else -1] == weight.shape[1]
            for source in self._readings(first, raw)
        ]
        if logits is not None:
            for norms in ((), (Norm("length"),)):
                for source, raw in readings:
                    output = self._explains(head, source, norms, raw, logits)
                    if output is not None:
                        return self._given_rows(source, raw, head, norms, output)
        if self.layer is not None and readings:
            if logits is not None:
                logger.warning(
                    "the given weight on the mean of the given layer does not give the model's own "
                    "%d logits; it is taken as a head beside the model's",
                    count,
                )
            return self._given_rows(*readings[0], head, (), "features")
        raise ClassifierError(
            f"the given weight {tuple(weight.shape)} does not fit the given layer: none of its "
            f"axes has {weight.shape[1]} channels"
            if self.layer is not None
            else f"the given weight {tuple(weight.shape)} does not give the model's logits on the "
            "mean of any feature map; give feature_layer= too"
        )

    def _given_rows(
        self, source: Place, raw: Tensor, head: Linear, norms: tuple[Norm, ...], output: str
    ) -> Found:
        placed = self._placed(source, raw)
        words = self._words(placed, norms, str(head), "logits" if output == "features" else output)
        return placed, head, norms, self._named(head.rows()[0].shape[0]), words, output

    def _readings(self, source: Place, raw: Tensor) -> Iterator[Place]:
        if source.layout != "tokens":
            yield source
            yield replace(source, relu=True)
            return
        least = self._prefix(raw.shape[1], 0)
        if self.pool == "token":
            yield replace(source, token=0, prefix=max(1, least))
            return
        yield replace(source, prefix=least)
        for prefix in range(min(MOST_PREFIX_TOKENS, raw.shape[1] - 2) + 1):
            yield replace(source, prefix=prefix)

    def _explains(
        self,
        head: Linear,
        source: Place,
        norms: tuple[Norm, ...],
        raw: Tensor,
        logits: Tensor,
    ) -> str | None:
        """What the model gives of the logits of this reading; None: something else."""
        vectors = source.vector(raw)
        for norm in norms:
            vectors = vectors / norm.divide(vectors)
        found = F.linear(vectors, *cast_rows(head.rows(), vectors))
        largest = max(1.0, float(logits.abs().max()))
        for name, function in OUTPUTS.items():
            if name == "softmax" and found.shape[1] == 1:
                continue
            if float((function(found) - logits).abs().max()) <= self.record.tolerance * largest:
                return name
        return None

    def _new_head(self, heads: Sequence[tuple[Linear, Tensor, str]]) -> Found:
        """The map that a new head is to be fitted on."""
        assert self.classes is not None
        if heads:
            count = heads[0][0].rows()[0].shape[0]
            logger.warning(
                "the model's own head (%d classes) cannot serve for the %d given classes; a new "
                "linear head is fitted",
                count,
                len(self.classes),
            )
        source = self._features_map([vector for _, vector, _ in heads])
        if source is None:
            raise ClassifierError(
                f"no feature map was found in {type(self.model).__name__}: no layer gives one (B, "
                "C, h, w), with channels last or as tokens; pass feature_layer="
            )
        words = f"map: {source}; no head for the given classes yet"
        return source, None, (), self.classes, words, "features"

    def _features_map(self, vectors: Sequence[Tensor]) -> Place | None:
        """Of a head's vector or the model's output the map; else the last map there is."""
        output = flat(first_tensor(self.record.output))
        for vector in (*vectors, *([] if output is None else [output])):
            match = self._map_of(vector) or self._token_of(vector)
            if match is not None:
                return replace(match[0], token=None)
        said = str(getattr(self.model, "output_fmt", "NCHW"))
        for source, raw in self.candidates:
            module = source.layer
            if self.layer is None and "Adaptive" in type(module).__name__:
                continue  # its cells are as many for every image
            if source.layout == "tokens":
                prefix = self._prefix(raw.shape[1], 0)
                return self._placed(replace(source, prefix=prefix), raw)
            # of two readings the one whose grid has the shape of the image
            last = said.endswith("NHWC") or self._off(raw.shape[1:3]) < self._off(raw.shape[2:])
            if (source.layout == "NHWC") == last:
                return source
        return None

    def _off(self, grid: Sequence[int]) -> float:
        """How far the shape of a grid is from that of the image."""
        height, width = self.record.size
        return abs(math.log(grid[0] / grid[1]) - math.log(height / width))

    def _nothing(self, heads: Sequence[tuple[Linear, Tensor, str]]) -> ClassifierError:
        name = type(self.model).__name__
        new = "classes=[...] to fit a new linear head on the mean of its feature map"
        own = "feature_layer= and classifier= where they are known"
        if not heads:
            shape = None if self.logits is None else tuple(self.logits.shape)
            what = f"gives logits {shape}" if shape else "gives no logits (B, N)"
            return ClassifierError(
                f"no linear layer was found in {name} whose output is what the model gives: it "
                f"{what}. Pass {new}, or {own}"
            )
        head, vector, _ = heads[0]
        if self.pool == "token":
            return ClassifierError(
                f"the head {head} of {name} does not read a class token; leave pool= out, or pass "
                f"{new}"
            )
        if (token := self._token_of(vector)) is not None:
            return ClassifierError(
                f"the head {head} of {name} reads the class token (token {token[0].token} of "
                f"{token[0].name}), so its logits are not linear in the mean of a feature map. "
                'Pass pool="token" to take its rows on the patch tokens, or classes=[...] to fit a '
                "new linear head on the mean of the patch tokens"
            )
        if layers := self._layers_before(head):
            return ClassifierError(
                f"the head of {name} is a network of several layers ({', '.join(layers)}, {head}), "
                "so its logits are not linear in the mean of a feature map. Pass "
                f"{new}"
            )
        halves = vector.chunk(2, dim=1)
        if len(halves) == 2 and (token := self._token_of(halves[0])) is not None:
            return ClassifierError(
                f"the head {head} of {name} reads two vectors at once, the first of them the class "
                f"token (token {token[0].token} of {token[0].name}), so its logits are not linear "
                f"in the mean of a feature map. Pass {new}"
            )
        if maximum := self._maximum(vector):
            return ClassifierError(
                f"the head {head} of {name} reads the maximum of {maximum}, not its mean, so its "
                f"logits are not linear in it. Pass {new}"
            )
        where = "the given feature_layer" if self.layer is not None else "any feature map"
        return ClassifierError(
            f"the vector ({vector.shape[1]} channels) that the head {head} of {name} reads is not "
            f"the mean of {where} (as it is, after ReLU, or before a batch, layer, RMS or L2 norm; "
            f"images were {self.record.size[0]} x {self.record.size[1]}). Pass {new}, or {own}"
        )

    def _layers_before(self, head: Linear) -> list[str]:
        """Layers with weights on one vector an image, after the last map and before the head."""
        names: list[str] = []
        for call in self.record.calls:
            if call.module is head.module:
                break
            if call.after is None or call.after.ndim not in (2, 3, 4):
                continue
            if flat(call.after) is None:
                names = []  # what gave a vector before a map was no part of the head
            elif getattr(getattr(call.module, "weight", None), "ndim", 0) in (2, 4):
                names.append(str(call))
        return names

    def _maximum(self, vector: Tensor) -> str | None:
        for source, raw in self.candidates:
            if source.layout == "tokens":
                continue
            found = source.map(raw).amax((-2, -1))
            if found.shape == vector.shape and self.record.same(found, vector):
                return str(source)
        return None


# -- Names of classes --------------------------------------------------------------------------


def class_names(model: nn.Module, count: int) -> list[str]:
    """Short and distinct names of a model's classes.

    Those of its configuration (``id2label``), of ImageNet where timm knows the model, or numbers.
    """
    names = _configured_names(model, count) or _imagenet_names(model, count)
    if names is None:
        return [f"class {index}" for index in range(count)]
    uses = Counter(names)
    return [f"{n} ({index})" if uses[n] > 1 else n for index, n in enumerate(names)]


def _configured_names(model: nn.Module, count: int) -> list[str] | None:
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(labels, Mapping) or set(labels) != set(range(count)):
        return None
    return [str(labels[index]).split(",")[0].strip() for index in range(count)]


def _imagenet_names(model: nn.Module, count: int) -> list[str] | None:
    subset = imagenet_info.infer_imagenet_subset(model) if _of_timm(model) else None
    info: Any = imagenet_info.ImageNetInfo(subset) if subset else None
    if info is None or info.num_classes() != count:
        return None
    return [info.index_to_description(index).split(",")[0].strip() for index in range(count)]


def _of_timm(model: nn.Module) -> bool:
    return getattr(model, "pretrained_cfg", None) is not None
