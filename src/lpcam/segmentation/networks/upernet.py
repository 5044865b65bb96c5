"""UperNet on a Swin transformer, of the library transformers (specification of segmentation, 3).

Added to transformers' Swin and heads, as in the official configuration: dropout before both
classifiers, stochastic depth on both paths of a block, and the initial weights of the heads.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from lpcam.classifiers.classifier import PRETRAINED, RANDOM, Preprocessing, read_weights
from lpcam.runtime.errors import ClassifierError
from lpcam.segmentation.networks import base

PREPROCESSING = Preprocessing(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
AUXILIARY_WEIGHT = 0.4  #: Weight of the auxiliary head's loss.
DROPOUT = 0.1  #: Rate of the dropout of whole channels before both classifiers.


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}
CHECKPOINT = "microsoft/swin-{}-patch4-window7-224"  #: ImageNet weights of a size on the hub.
SWIN_ARGUMENTS = ("depths", "drop_path", "embed_dim", "num_heads", "window_size")
ARGUMENTS = (*SWIN_ARGUMENTS, "auxiliary_channels", "channels", "checkpoint")


class UperNetSwin(base.Network):
    """UperNet on Swin, of the changed parts of transformers' ``UperNetForSemanticSegmentation``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone: Any = model.backbone
        self.decode_head: Any = model.decode_head
        self.auxiliary_head: Any = model.auxiliary_head
        # only pooled features pass through this norm
        self.backbone.swin.layernorm = nn.Identity()
        for stage in self.backbone.swin.encoder.layers:
            for block in stage.blocks:
                # transformers drops only the path of the attention, the official Swin both
                block.mlp.path = block.drop_path
                block.mlp.register_forward_hook(lambda mlp, inputs, output: mlp.path(output))
        for head in (self.decode_head, self.auxiliary_head):
            for module in head.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            head.classifier = _Classifier(head.classifier)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised RGB to logits (B, L, ceil(H / 4), ceil(W / 4))."""
        logits: Tensor = self.decode_head(self.backbone(images).feature_maps)
        return logits

    def outputs(self, images: Tensor) -> list[tuple[Tensor, float]]:
        """Logits of both heads, at strides 4 and 16, with the weights of their losses."""
        maps = self.backbone(images).feature_maps
        return [(self.decode_head(maps), 1.0), (self.auxiliary_head(maps), AUXILIARY_WEIGHT)]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters; ``no_decay`` are the Swin's norms and position tables."""
        names = [name for name, _ in self.named_parameters()]
        norms = {name for name, m in self.named_modules() if isinstance(m, nn.LayerNorm)}
        tables = {name for name in names if name.endswith("relative_position_bias_table")}
        return base.grouped(self, tables | {n for n in names if n.rpartition(".")[0] in norms})


class _Classifier(nn.Conv2d):
    """The last convolution of a head, after dropout of whole channels."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__(convolution.in_channels, convolution.out_channels, 1)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.dropout2d(input, DROPOUT, self.training))


class UperNetNetwork:
    """UperNet on a size of Swin: ``tiny``, ``small`` or ``base``.

    Arguments are ``embed_dim``, ``depths``, ``num_heads`` and ``window_size``, which replace those
    of the size, ``drop_path``, ``channels`` and ``auxiliary_channels`` of the heads, and
    ``checkpoint``: another model on the hub, or a folder. A file of weights has the names of
    transformers.
    """

    title = "UperNet"
    default_backbone = "tiny"
    options: frozenset[base.Option] = frozenset({"backbone"})
    one_size_export = True  # torch 2.15 exports its pooling for the traced size only

    def check(self, spec: base.SegmenterSpec, weights: str) -> None:
        """Raise ClassifierError if an option is not accepted or transformers is not installed."""
        if spec.backbone not in SIZES:
            raise ClassifierError(
                f"segment.backbone: there is no Swin {spec.backbone!r}; there are "
                f"{', '.join(SIZES)}"
            )
        if unknown := sorted(set(spec.arguments) - {*ARGUMENTS}):
            takes = ", ".join(ARGUMENTS)
            raise ClassifierError(f"UperNet has no argument {unknown[0]!r}; it takes {takes}")
        if find_spec("transformers") is None:
            raise ClassifierError(
                "UperNet needs transformers; install it with pip install 'lpcam[upernet]'"
            )

    def build(
        self, spec: base.SegmenterSpec, labels: int, **first: Unpack[base.First]
    ) -> tuple[UperNetSwin, Preprocessing]:
        """The network and its preprocessing."""
        weights = str(first["weights"])
        self.check(spec, weights)
        transformers = importlib.import_module("transformers")
        size, chosen = spec.backbone, dict(spec.arguments)
        checkpoint = str(chosen.pop("checkpoint", CHECKPOINT.format(size)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(first.get("seed", 0))
            try:
                config = _config(transformers, size, labels, chosen)
                network = UperNetSwin(transformers.UperNetForSemanticSegmentation(config))
            except Exception as error:  # whatever transformers or torch raises
                raise ClassifierError(
                    f"transformers could not make Swin {size!r} with arguments {chosen}: {error}"
                ) from error
            if weights == PRETRAINED:
                source: dict[str, Any] = {"pretrained_model_name_or_path": checkpoint}
                source["use_safetensors"] = True
                _load(network.backbone, transformers, checkpoint, **source)
            elif weights != RANDOM:
                source = {"pretrained_model_name_or_path": None, "config": config.backbone_config}
                source["state_dict"] = read_weights(Path(weights))
                _load(network.backbone, transformers, Path(weights).name, **source)
        return network, base.preprocessing_with(PREPROCESSING, first.get("mean"), first.get("std"))


def _config(transformers: Any, size: str, labels: int, chosen: Mapping[str, Any]) -> Any:
    swin = {**SIZES[size], **chosen}
    depths, heads = list(swin["depths"]), list(swin["num_heads"])
    if not len(depths) == len(heads) == 4:
        raise ValueError(f"depths {depths} and num_heads {heads} must have 4 numbers each")
    return transformers.UperNetConfig(
        backbone_config=transformers.SwinConfig(
            embed_dim=swin["embed_dim"],
            depths=depths,
            num_heads=heads,
            patch_size=4,
            window_size=chosen.get("window_size", 7),
            drop_path_rate=chosen.get("drop_path", 0.3),
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        hidden_size=chosen.get("channels", 512),
        pool_scales=(1, 2, 3, 6),
        use_auxiliary_head=True,
        auxiliary_channels=chosen.get("auxiliary_channels", 256),
        auxiliary_loss_weight=AUXILIARY_WEIGHT,
        num_labels=labels,
    )


_UNUSED = re.compile(r"relative_position_index$|^(classifier|layernorm)\.")
"""Tensors of files that no feature map depends on."""


def _load(backbone: Any, transformers: Any, name: str, **source: Any) -> None:
    """Load the weights of a Swin; transformers reads the names that its files have had."""
    try:
        model, report = transformers.SwinModel.from_pretrained(
            add_pooling_layer=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **source,
        )
    except Exception as error:  # whatever transformers or a hub client raises, one message serves
        raise ClassifierError(
            f"the weights {name!r} cannot be loaded: {error}. Without a network, give "
            "weights as the path of a safetensors file"
        ) from error
    shapes = [key for key, *_ in report["mismatched_keys"]]
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"], *shapes})
    if wrong := [key for key in wrong if not _UNUSED.search(key)]:
        raise ClassifierError(
            f"the weights {name!r} are not of this Swin: {wrong[0]!r} is missing, unknown or of "
            "another shape; give weights with the names of transformers, and check the size and "
            "the arguments"
        )
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("layernorm.")}
    base.load_fitting(backbone.swin, state, name, "this Swin", "check the size and the arguments")


NETWORK = UperNetNetwork()
