"""EDAM: a network that learns class masks from pairs of images (specification of EDAM, 1 to 3).

From a backbone's features f it computes a mask for each class

    M = |g / |g||,  g = a 3 x 3 convolution of f to N + 1 channels,

the last channel being an implicit background. Each class's masked features of *both* images of a
pair that share a class go through a transformer block of that class, which must tell whether each
image shows the class. The fusion with saliency is :mod:`lpcam.refine.saliency_fusion`.

Shapes: B images of H x W pixels, each two consecutive ones a pair; C channels of the backbone on a
grid of h x w cells; D the width of a token; N classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Self, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from lpcam.classifiers import classifier as models
from lpcam.classifiers.feature_store import image_pyramid
from lpcam.classifiers.finetuning import augment
from lpcam.classifiers.probe import multi_hot
from lpcam.data.dataset import Item
from lpcam.hosts import base as hosts
from lpcam.method.functional import FusedMaps, fuse_scales, unflip
from lpcam.runtime.errors import DataError
from lpcam.runtime.settings import Fraction, Positive
from lpcam.training import loop as engine
from lpcam.training.optim import SgdRates, freeze, names_below, parameter_groups, poly
from lpcam.training.released import WIDERESNET38, Released


class EdamSettings(hosts.ScaledSettings, SgdRates):
    """EDAM's network: class masks, and attention over pairs of images (specification of EDAM)."""

    table: ClassVar[str] = "edam"
    preset: str = "default"

    iterations: Annotated[int, Field(ge=1)]
    """Number of SGD steps."""
    pairs: Annotated[int, Field(ge=1)]
    """Pairs of images with a common class in each step."""
    learning_rate: Positive
    """Learning rate of the backbone and the transformers."""
    head_multiplier: Positive
    """Factor of the learning rate of the new convolutions."""
    warmup: Annotated[int, Field(ge=0)]
    """Number of first steps in which the learning rate rises linearly; 0 turns it off."""
    warmup_factor: Fraction
    """Factor of the learning rate at the first step of the warm-up."""
    freeze: tuple[str, ...]
    """Prefixes of the backbone's parameter names that are not trained."""
    long_side: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    """Inclusive range, in pixels, from which each image's long side is drawn."""
    crop: Annotated[int, Field(ge=16)]
    """Side of the square crop, in pixels; it determines the size of the table of positions."""
    jitter: tuple[Fraction, Fraction, Fraction, Annotated[float, Field(ge=0.0, le=0.5)]]
    """Largest random changes of brightness, contrast, saturation and hue."""
    width: Annotated[int, Field(ge=2)]
    """Number of channels of the tokens."""
    heads: Annotated[int, Field(ge=1)]
    """Number of attention heads; it divides ``width``."""
    hidden: Annotated[int, Field(ge=1)]
    """Number of hidden channels in the transformers' feed-forward part."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Probability that an activation in a transformer is set to zero in training."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.long_side[0] > self.long_side[1]:
            raise ValueError(f"long_side {list(self.long_side)} must be a range: the smaller first")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self


RELEASED = (
    *(
        (rf"attention\.linear_layers\.{n}\.", f"{o}.")
        for n, o in enumerate(("query", "key", "value"))
    ),
    (r"attention\.output_linear\.", "joined."),
    (r"feed_forward\.w_1\.", "inner."),
    (r"feed_forward\.w_2\.", "outer."),
    *(
        (rf"{part}_sublayer\.norm\.{theirs}", f"norms.{n}.{ours}")
        for n, part in enumerate(("input", "output"))
        for theirs, ours in (("a_2", "weight"), ("b_2", "bias"))
    ),
)
"""Names in the transformers of released files, as patterns, and ours."""
SEGMENTS = 5  #: Rows of the released table of segments, of which two are used.
PAIR = 2  #: Images from which a class is learnt together.
HEADS = ("activation.", "reduction.", "logits.")
"""Name prefixes of the new convolutions, which have a higher learning rate."""
RECORDS = 25
"""Records in the history of a training, about one per epoch of the released list (section 2)."""


def _positions(count: int, width: int) -> Tensor:
    """Sinusoidal code (count, width) of positions 0, 1, ... (Vaswani et al. 2017)."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(count)[:, None] * rates
    code = torch.empty(count, width)
    code[:, 0::2] = angles.sin()
    code[:, 1::2] = angles.cos()[:, : width // 2]
    return code


class _Norm(nn.Module):
    """Layer norm with the unbiased standard deviation plus a constant (section 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: Tensor) -> Tensor:
        centred = tokens - tokens.mean(-1, keepdim=True)
        return self.weight * centred / (tokens.std(-1, keepdim=True) + 1e-6) + self.bias


def _xavier(weight: Tensor, fans: int) -> None:
    """Draw the uniform first weights of a tensor whose fans, in and out, have this sum."""
    bound = math.sqrt(6 / fans)
    nn.init.uniform_(weight, -bound, bound)


def groups_of(network: Edam, settings: EdamSettings) -> list[dict[str, Any]]:
    """The trained parameters of the backbone and transformers, and of the new convolutions.

    All have weight decay, as in the released program, where the groups of biases are empty.
    """
    rate, decay = settings.learning_rate, settings.weight_decay
    rates = {False: rate, True: rate * settings.head_multiplier}
    return parameter_groups(network, lambda name, _: (rates[name.startswith(HEADS)], decay))


class Encoder(nn.Module):
    """A transformer's encoder block that normalises first: attention, then a feed-forward part.

    The GELU is the tanh approximation. Attention, the outputs of both parts, the hidden layer and
    the result have dropout.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norms = nn.ModuleList(_Norm(width) for _ in range(2))
        self.query, self.key, self.value, self.joined = (nn.Linear(width, width) for _ in range(4))
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(P, T, D) to the same shape; the T tokens of each row attend to one another."""
        tokens = tokens + self._drop(self._attend(self.norms[0](tokens)))
        hidden = F.gelu(self.inner(self.norms[1](tokens)), approximate="tanh")
        tokens = tokens + self._drop(self.outer(self._drop(hidden)))
        return self._drop(tokens)

    def _attend(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        joined: Tensor = self.joined(found.transpose(1, 2).flatten(-2))
        return joined

    def _drop(self, tokens: Tensor) -> Tensor:
        return F.dropout(tokens, self.dropout, self.training)


class Edam(hosts.HostNetwork):
    """A classifier's backbone, the discriminative activation layer and collaborative attention.

    ``sizes`` are the width, heads, hidden width and dropout of each class's :class:`Encoder`.
    """

    kind = "edam"

    def __init__(
        self,
        classifier: models.Classifier,
        classes: Sequence[str],
        sizes: Mapping[str, Any],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False)
        self.classes = tuple(classes)
        self.sizes = dict(sizes)
        channels, count = classifier.head.in_features, len(self.classes)
        width = self.sizes["width"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.activation = nn.Conv2d(channels, count + 1, 3, padding=1, bias=False)
            self.reduction = nn.Conv2d(channels, width, 1, bias=False)
            self.segments = nn.Embedding(PAIR, width)
            self.encoders = nn.ModuleList(Encoder(**self.sizes) for _ in self.classes)
            # the row of a class is its convolution of 1 x 1 to one channel
            self.logits = nn.Linear(width, count, bias=False)
            layers: list[nn.Conv2d | nn.Linear] = [self.activation, self.reduction]
            layers += [m for m in self.encoders.modules() if isinstance(m, nn.Linear)]
            for layer in layers:
                nn.init.xavier_uniform_(layer.weight)
            _xavier(self.segments.weight, SEGMENTS + width)
            _xavier(self.logits.weight, 1 + width)
        self.eval()

    def masks(self, features: Tensor) -> Tensor:
        """M: (B, C, h, w) to (B, N + 1, h, w) in [0, 1], the implicit background last."""
        return F.normalize(self.activation(features), dim=1).abs()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, N) of (B, 3, H, W) normalised images, each two of which are a pair."""
        features = self.classifier.features(images)
        masks = self.masks(features)[:, :-1]
        reduced = self.reduction(features)
        cells = reduced.shape[-2] * reduced.shape[-1]
        code = _positions(cells, reduced.shape[1]).to(reduced)
        places = self.segments.weight[:, None] + code  # of an image of a pair, and in it
        pooled = []
        for row, encoder in enumerate(self.encoders):
            masked = (reduced * masks[:, row : row + 1]).flatten(2).transpose(1, 2)
            tokens = masked.unflatten(0, (-1, PAIR)) + places
            tokens = F.dropout(tokens, self.sizes["dropout"], self.training)
            seen = encoder(tokens.flatten(1, 2))  # all cells of both images of a pair
            pooled.append(seen.unflatten(1, (PAIR, cells)).mean(2).flatten(0, 1))
        return (torch.stack(pooled, 1) * self.logits.weight).sum(-1)

    @classmethod
    def _described(cls, metadata: Mapping[str, Any]) -> Edam:
        return cls(models.described(metadata), metadata["classes"], metadata["sizes"])

    def _description(self) -> dict[str, Any]:
        own = {"classes": list(self.classes), "sizes": self.sizes}
        return {**self.classifier._description(), **own}


class Partners:
    """Draws another image that shares a class with an image; DataError if no two images do."""

    def __init__(self, items: Sequence[Item]) -> None:
        of_class: dict[int, list[int]] = {}
        for number, item in enumerate(items):
            for label in item.labels:
                of_class.setdefault(label, []).append(number)
        self.of_class = {label: found for label, found in of_class.items() if len(found) > 1}
        self.labels = [[k for k in item.labels if k in self.of_class] for item in items]
        self.firsts = [number for number, labels in enumerate(self.labels) if labels]
        """Images that have a partner."""
        if not self.firsts:
            raise DataError(
                f"no two of {len(items)} images share a class, so there are no pairs to train EDAM "
                "on; give at least two images of a class"
            )

    def draw(self, first: int, generator: np.random.Generator) -> int:
        """Draw a class of an image of ``firsts`` and another image of that class, uniformly."""
        label = self.labels[first][int(generator.integers(len(self.labels[first])))]
        others = self.of_class[label]
        # a cyclic step between 1 and len - 1 never returns to the image itself
        step = int(generator.integers(1, len(others)))
        return others[(others.index(first) + step) % len(others)]


def _sample(
    items: Sequence[Item],
    partners: Partners,
    preprocessing: models.Preprocessing,
    settings: EdamSettings,
    seed: int,
    place: engine.Place,
) -> tuple[Tensor, Tensor]:
    """Augmented images (2, 3, crop, crop) of a pair and their numbers (2,)."""
    generator = np.random.default_rng([seed, place.epoch, place.sample])
    first = partners.firsts[place.sample]
    pair = (first, partners.draw(first, generator))
    images = [augment(items[n].read(), preprocessing, settings, generator) for n in pair]
    return torch.stack(images), torch.tensor(pair)


def _rate(step: int, settings: EdamSettings) -> float:
    """Factor of the learning rates at a step: a linear warm-up, then the poly schedule."""
    if step < settings.warmup:
        low = settings.warmup_factor
        return low + (1.0 - low) * step / settings.warmup
    return poly(step - settings.warmup, settings.iterations - settings.warmup, settings.power)


def _adapted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The convolutions to logits as rows of one layer, and the two segments that are used."""
    count = sum(name.startswith("logits.") for name in state)
    rows = [state.pop(f"logits.{n}.weight").flatten(1) for n in range(count)]
    return {
        **state,
        "logits.weight": torch.cat(rows),
        "segments.weight": state["segments.weight"][:PAIR],
    }


class _EdamHost(hosts.Host[EdamSettings, Edam]):
    """Class masks learned with attention over pairs of images."""

    title = "EDAM"
    settings = EdamSettings
    network = Edam
    states_threshold = False
    map_fields = frozenset({"scales", "flip"})

    def check(self, section: hosts.HostSection) -> None:
        if section.maps is not None:
            raise ValueError(
                "edam builds on neither CAM nor LPCAM: leave host.maps out; LPCAM takes CAM's "
                "place in its refinement: refine.method saliency, refine.maps [LPCAM]"
            )

    def arms(self, section: hosts.HostSection) -> list[hosts.Arm]:
        return [hosts.Arm(self.title, "CAM", section.method)]

    def build(
        self,
        backbone: models.BackboneSpec,
        names: Sequence[str],
        settings: EdamSettings,
        **first: Any,
    ) -> Edam:
        """WideResNet-38 is used without its last ReLU, unless the arguments say otherwise."""
        if backbone.name == "wideresnet38":
            arguments = {"final_relu": False, **backbone.arguments}
            backbone = replace(backbone, arguments=arguments)
        classifier = models.build(backbone, models.NO_CLASSES, **first)
        sizes = settings.model_dump(include={"width", "heads", "hidden", "dropout"})
        return Edam(classifier, names, sizes, first.get("seed", 0))

    def released(self) -> Sequence[Released]:
        """The file of the released training."""
        return [
            Released(
                "EDAM's network",
                "host",
                ("mask_layer.weight",),
                [
                    (WIDERESNET38, "classifier.backbone."),
                    (r"mask_layer\.", "activation."),
                    (r"d_d\.", "reduction."),
                    (r"embedding\.segment\.", "segments."),
                    (r"fc_list\.(\d+)\.", r"logits.\1."),
                    *((rf"trans_list\.(\d+)\.0\.{n}", rf"encoders.\1.{o}") for n, o in RELEASED),
                ],
                self.official(models.BackboneSpec("wideresnet38", {})),
                classes=lambda state: len(state["mask_layer.weight"]) - 1,
                left_out=r"embedding\.position\.",
                adapt=_adapted,
                ours=("classifier.head.",),
            )
        ]

    def images_per_step(
        self, network: Edam, data: hosts.HostData, settings: EdamSettings
    ) -> tuple[int, str]:
        names_below(dict(network.classifier.backbone.named_parameters()), settings.freeze)
        return min(settings.pairs, len(Partners(data.images).firsts)), "pairs"

    def train(
        self,
        network: Edam,
        data: hosts.HostData,
        settings: EdamSettings,
        **options: Unpack[engine.TrainingOptions],
    ) -> engine.History:
        """SGD on the binary cross-entropy of every class and image of pairs (section 2)."""
        items, partners = data.images, Partners(data.images)  # others are left out
        freeze(network.classifier.backbone, settings.freeze, norms=True)
        labels = multi_hot(items, len(network.classes)).to(network.device)
        size = min(settings.pairs, len(partners.firsts))
        steps = settings.iterations

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            images, numbers = batch
            logits = model(images.flatten(0, 1))
            mean = F.binary_cross_entropy_with_logits(logits, labels[numbers.flatten()])
            return mean * (len(numbers) / size)  # this process's share of the pairs

        return engine.run(
            network,
            torch.optim.SGD(groups_of(network, settings), momentum=settings.momentum),
            partial(_sample, items, partners, network.preprocessing, settings, options["seed"]),
            len(partners.firsts),
            loss,
            engine.Plan(
                steps, settings.pairs, max(1, steps // RECORDS), partial(_rate, settings=settings)
            ),
            label="training EDAM",
            section="host.edam",
            **options,
        )

    @torch.no_grad()
    def maps(
        self, network: Edam, view: hosts.View, settings: EdamSettings, vectors: Tensor | None
    ) -> FusedMaps:
        """The masks M, summed over scales and mirror images, over their maximum (section 3)."""
        network.eval()
        maps, chosen, scales = [], list(view.labels), settings.scales
        for pair in image_pyramid(network.classifier, view.image[None], scales, flip=settings.flip):
            found = network.masks(pair.features)[0, chosen]
            if pair.mirrored is not None:
                found = found + unflip(network.masks(pair.mirrored)[0, chosen])
            hosts.check_finite(found, "EDAM's activation layer")
            maps.append(found)
        # At stride 1 the sizes are the image's, to which the released program resizes.
        return fuse_scales(maps, view.size, stride=1)


HOST = _EdamHost()
