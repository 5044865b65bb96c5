"""WideResNet-38, registered with timm: ``timm.create_model("wideresnet38")``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import register_model
from torch import Tensor, nn

CHANNELS = (64, 128, 256, 512, 1024, 2048, 4096)  #: Channels of conv1a, b2, b3, b4, b5, b6 and b7.
DEPTHS = (3, 3, 6, 3)  #: Number of blocks of b2, b3, b4 and b5.
STRIDE = 8  #: Pixels per cell of the features.
HEADS = ("fc8", "fc1", "fc2")
"""Layers after the backbone that weight files may hold, of a classifier or of a segmenter."""


class _Block(nn.Module):
    """Pre-activation block of convolutions (channels, kernel, stride, dilation) and a shortcut."""

    def __init__(
        self, before: int, layers: Sequence[tuple[int, int, int, int]], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.names = ("2a", "2b1", "2b2")[: len(layers)]
        stride, own = layers[0][2], before
        for name, (after, *shape) in zip(self.names, layers, strict=True):
            self.add_module(f"bn_branch{name}", nn.BatchNorm2d(own))
            if dropout and name != "2a":
                self.add_module(f"dropout_{name}", nn.Dropout2d(dropout))
            self.add_module(f"conv_branch{name}", _convolution(own, after, *shape))
            own = after
        same = before == own and stride == 1 and len(layers) == 2
        self.conv_branch1 = None if same else _convolution(before, own, 1, stride)

    def activated(self, features: Tensor) -> Tensor:
        """The input after batch norm and ReLU, which affinity networks read."""
        return self._modules["bn_branch2a"](features).relu()  # type: ignore[no-any-return, misc]

    def forward(self, features: Tensor, activated: Tensor | None = None) -> Tensor:
        """(B, C, h, w) to (B, C', h', w'); ``activated`` may be given if already computed."""
        found = self.activated(features) if activated is None else activated
        shortcut = features if self.conv_branch1 is None else self.conv_branch1(found)
        for name in self.names:
            if name != "2a":
                found = getattr(self, f"bn_branch{name}")(found).relu()
                found = getattr(self, f"dropout_{name}", nn.Identity())(found)
            found = getattr(self, f"conv_branch{name}")(found)
        return shortcut + found


def _convolution(
    before: int, after: int, kernel: int, stride: int = 1, dilation: int = 1
) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    made = nn.Conv2d(before, after, kernel, stride, padding, dilation, bias=False)
    # Keeps random features at about the scale of the images over all blocks.
    nn.init.kaiming_normal_(made.weight, nonlinearity="linear")
    return made


class WideResNet38(nn.Module):
    """WideResNet-38 at stride 8 (specification of EDAM, section 1), for images of any size."""

    output_fmt = "NCHW"
    num_classes = 0

    def __init__(
        self,
        channels: Sequence[int] = CHANNELS,
        depths: Sequence[int] = DEPTHS,
        *,
        final_relu: bool = True,
    ) -> None:
        super().__init__()
        whole = all(isinstance(n, int) and n > 0 for n in (*channels, *depths))
        fits = whole and (len(channels), len(depths)) == (7, 4)
        if not fits or channels[4] % 2 or channels[5] % 4 or channels[6] % 4:
            raise ValueError(
                f"channels {list(channels)} and depths {list(depths)} must be 7 and 4 positive "
                "integers, the fifth channel even and the last two multiples of 4"
            )
        stem, *wide = channels
        self.final_relu = final_relu
        self.num_features = channels[-1]
        self.conv1a = _convolution(3, stem, 3)
        self.stages: list[list[str]] = []
        # Only b5 has a narrower middle and dilation, from its second convolution on.
        before, middles = stem, (wide[0], wide[1], wide[2], wide[3] // 2)
        for number, (after, middle, depth) in enumerate(zip(wide, middles, depths, strict=False)):
            dilation = 1 if number < 3 else 2
            names = [f"b{number + 2}", *(f"b{number + 2}_{n}" for n in range(1, depth))]
            self.stages.append(names)
            for name in names:
                first = name == names[0]
                stride = 2 if first and number < 3 else 1
                inner = (middle, 3, stride, 1 if first else dilation)
                self.add_module(name, _Block(before, [inner, (after, 3, 1, dilation)]))
                before = after
        for name, after, dropout in (("b6", wide[4], 0.3), ("b7", wide[5], 0.5)):
            layers = [(after // 4, 1, 1, 1), (after // 2, 3, 1, 4), (after, 1, 1, 1)]
            self.add_module(name, _Block(before, layers, dropout))
            before = after
        self.stages.append(["b6", "b7"])
        self.bn7 = nn.BatchNorm2d(wide[5])
        places = ((0, 2, "b3"), (1, 4, "b4"), (2, 8, "b5"), (3, 8, "b6"), (5, 8, "bn7"))
        self.feature_info = [
            {"num_chs": wide[index], "reduction": reduction, "module": name}
            for index, reduction, name in places
        ]
        self.pretrained_cfg: dict[str, Any] = {"classifier": HEADS}

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images to (B, 4096, ceil(H / 8), ceil(W / 8))."""
        return self._maps(images)[-1]

    forward = forward_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        *,
        intermediates_only: bool = False,
        **_: Any,
    ) -> Any:
        """The activations that enter b3 to b6, and the features, with timm's arguments."""
        maps = self._maps(x)
        if isinstance(indices, int):
            chosen = maps[-indices:]
        else:
            chosen = maps if indices is None else [maps[index] for index in indices]
        return chosen if intermediates_only else (maps[-1], chosen)

    def get_classifier(self) -> nn.Module:
        """An identity, as for timm's models without a head."""
        return nn.Identity()

    def _maps(self, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        features = self.conv1a(images)
        for number, names in enumerate(self.stages):
            first, *blocks = (self.get_submodule(name) for name in names)
            active = first.activated(features)  # type: ignore[operator]
            if number:
                maps.append(active)
            features = first(features, active)
            for block in blocks:
                features = block(features)
        features = self.bn7(features)
        maps.append(features.relu() if self.final_relu else features)
        return maps


@register_model  # type: ignore[untyped-decorator, unused-ignore]
def wideresnet38(
    pretrained: bool = False, *, num_classes: int = 0, output_stride: int = STRIDE, **arguments: Any
) -> nn.Module:
    """WideResNet-38 for ``timm.create_model``, with the arguments of :class:`WideResNet38`."""
    if pretrained:
        raise ValueError(
            "WideResNet-38's weights cannot be downloaded: convert the released file by "
            "lpcam convert FILE FILE.safetensors and give its path as weights"
        )
    if num_classes or output_stride != STRIDE:
        raise ValueError(
            f"num_classes {num_classes} and output_stride {output_stride}: WideResNet-38 has no "
            f"classification head here and works at output stride {STRIDE} alone"
        )
    of_timm = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    return WideResNet38(**{k: v for k, v in arguments.items() if k not in of_timm})
