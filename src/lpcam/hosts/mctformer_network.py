"""MCTformer: a vision transformer with a token for each class (specification of MCTformer).

The network of its section 1, and what its section 3 reads from it. Parameters have the names of the
released program: ``cls_token``, ``pos_embed``, ``patch_embed``, ``blocks``, ``norm`` and ``head``.

Shapes: B images, N classes, C channels of a token, h = H // 16 and w = W // 16 cells of a patch of
16 pixels, P = h w patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import timm
import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lpcam.classifiers import classifier as models
from lpcam.hosts.base import ScaledSettings
from lpcam.runtime.errors import ClassifierError
from lpcam.runtime.settings import Fraction, Positive
from lpcam.segmentation.networks.base import load_fitting, preprocessing_with
from lpcam.training.optim import EpochSettings
from lpcam.training.saved_network import SavedNetwork


class MctformerSettings(EpochSettings, ScaledSettings):
    """MCTformer: a vision transformer with a token for each class (specification of MCTformer)."""

    table: ClassVar[str] = "mctformer"
    preset: str = "default"

    version: Literal["v1", "v2"]
    """Model. ``v1``: class tokens only. ``v2``: also PatchCAM, a convolution on patch tokens."""
    learning_rate: Positive
    """AdamW's learning rate after the warm-up."""
    warmup_epochs: Annotated[int, Field(ge=0)]
    """Number of first epochs in which the learning rate rises linearly."""
    warmup_learning_rate: Annotated[float, Field(ge=0.0)]
    """Learning rate at the start of the warm-up."""
    floor_learning_rate: Annotated[float, Field(ge=0.0)]
    """Learning rate at the end of the half-cosine decay."""
    weight_decay: Annotated[float, Field(ge=0.0)]
    """Decay of weights with at least two dimensions, without tokens and positions."""
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Stochastic depth rate of the last block; rates rise linearly from 0 at the first."""
    crop: Annotated[int, Field(ge=16)]
    """Side, in pixels, of the training images."""
    augmentation: str | None
    """RandAugment policy, in timm's notation; null turns it off."""
    erasing: Fraction
    """Probability that a random rectangle is erased."""
    attention_blocks: Annotated[int, Field(ge=1)]
    """Number of last blocks whose class-to-patch attention is summed."""
    fusion: Literal["product", "square_root"]
    """Fusion of class attention with PatchCAM: their product, or its square root."""
    affinity: bool
    """Whether the attention between patches refines the map; it needs a well-trained network."""
    split_maps: Literal["refined", "patch"]
    """Map that splits foreground from context for the prototypes; ``patch`` is PatchCAM."""


STEM, STEM_ARGUMENTS = "stem", "stem_arguments"
"""Arguments of a network that timm's transformers do not have."""


class Scores(NamedTuple):
    """Logits (B, N) of the image's classes."""

    classes: Tensor  #: Scores by the class tokens; used at test.
    patches: Tensor | None  #: Scores by PatchCAM; None in V1.


class Attended(NamedTuple):
    """Outputs that maps are made of, for a batch of images."""

    scores: Scores
    class_attention: Tensor
    """(B, N, h, w), from class tokens to patches, summed over the last blocks."""
    patch_affinity: Tensor | None
    """(B, P, P), between patches, summed over all blocks; rows are the queries."""
    features: Tensor  #: (B, C, h, w), the last block's patch tokens, signed; the input of PatchCAM.
    patch_cam: Tensor | None  #: (B, N, h, w), signed; None in V1.


@dataclass(frozen=True)
class MctformerSpec:
    """Architecture of a network, apart from its classes and weights."""

    backbone: str
    arguments: Mapping[str, Any]
    """Arguments of the timm model, such as ``depth`` and ``num_heads``, and of a stem."""
    crop: int
    drop_path: float
    version: str


def scale_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions (1, g g, C) of a square grid scaled to another, (1, h w, C), bicubic (section 3).

    The factor (h + 0.1) / g avoids losing a row by rounding.
    """
    side = math.isqrt(table.shape[1])
    if grid == (side, side):
        return table
    planes = table.transpose(1, 2).reshape(1, -1, side, side)
    factors = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
    scaled = F.interpolate(planes, scale_factor=factors, mode="bicubic", align_corners=False)
    return scaled[..., : grid[0], : grid[1]].flatten(2).transpose(1, 2)


def attend_block(block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, T, C) of a block of timm and its attention (B, T, T), averaged over the heads.

    The rows of the attention are the queries; timm's blocks do not give it.
    """
    attention = block.attn
    batch, count, _ = tokens.shape
    joint = attention.qkv(block.norm1(tokens))
    joint = joint.reshape(batch, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    queries, keys, values = joint.unbind(0)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    weights = (queries * attention.scale @ keys.transpose(-2, -1)).softmax(-1)
    mixed = (attention.attn_drop(weights) @ values).transpose(1, 2).flatten(2)
    branch = attention.proj_drop(attention.proj(attention.norm(mixed)))
    tokens = tokens + block.drop_path1(block.ls1(branch))
    tokens = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
    return tokens, weights.mean(1)


class Stem(nn.Module):
    """A frozen convolutional backbone whose cells are the patches (a hybrid transformer)."""

    def __init__(self, classifier: models.Classifier, width: int) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False)
        self.proj = nn.Linear(classifier.weight.shape[1], width)

    def train(self, mode: bool = True) -> Stem:
        """Set training mode, but keep the backbone in evaluation mode."""
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Tokens (B, h, w, C) of (B, 3, H, W), sides multiples of the stride."""
        with torch.no_grad():
            features = self.classifier.features(images)
        tokens: Tensor = self.proj(features.permute(0, 2, 3, 1))
        return tokens


class Mctformer(SavedNetwork):
    """Class tokens on a vision transformer, V1 or V2, with random weights except the stem's.

    The score of a class is the mean over the channels of its token; V2 scores the classes by
    PatchCAM too, a 3 x 3 convolution of the patch tokens. The transformer's last norm is kept,
    because files of weights have it, but never applied.
    """

    kind = "mctformer"

    def __init__(
        self,
        spec: MctformerSpec,
        classes: Sequence[str],
        preprocessing: models.Preprocessing | None = None,
        stem_weights: str = models.RANDOM,
    ) -> None:
        super().__init__()
        plain = _plain(
            _transformer(
                spec, img_size=spec.crop, dynamic_img_size=True, drop_path_rate=spec.drop_path
            )
        )
        usual = models.Preprocessing.of_timm(plain)
        self.spec = spec
        self.classes = tuple(classes)
        self.cell = int(plain.patch_embed.feat_ratio())
        self.patch_embed: nn.Module = plain.patch_embed
        width, count = plain.embed_dim, len(self.classes)
        if STEM in spec.arguments:
            stem = _stem(spec, self.cell, stem_weights)
            self.patch_embed, usual = Stem(stem, width), stem.preprocessing
        self.preprocessing = preprocessing or usual
        self.cls_token = nn.Parameter(torch.empty(1, count, width))
        self.pos_embed = nn.Parameter(torch.empty(1, count + plain.patch_embed.num_patches, width))
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.pos_drop = plain.pos_drop
        self.blocks = plain.blocks
        self.norm = plain.norm.requires_grad_(False)  # not applied, so it gets no gradient
        v2 = spec.version == "v2"
        self.head = nn.Conv2d(width, count, 3, padding=1) if v2 else None
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.cls_token.device

    def forward(self, images: Tensor) -> Scores:
        """Scores of (B, 3, H, W) normalised images."""
        tokens, grid = self.embed(images)
        tokens = self.blocks(tokens)
        return self._scores(tokens, self._patch_cam(self._as_map(tokens, grid)))

    def attend(self, images: Tensor, blocks: int, *, affinity: bool = True) -> Attended:
        """Outputs of images (B, 3, H, W) that maps are made of (section 3, steps 1 to 3).

        Class-to-patch attention is summed over the last ``blocks`` blocks; ``affinity`` adds up the
        attention of patches to patches, P x P numbers.
        """
        tokens, grid = self.embed(images)
        count, depth = len(self.classes), len(self.blocks)
        batch, patches = tokens.shape[0], grid[0] * grid[1]
        class_attention = tokens.new_zeros(batch, count, patches)
        between = tokens.new_zeros(batch, patches, patches) if affinity else None
        for number, block in enumerate(self.blocks):
            tokens, attention = attend_block(block, tokens)
            if between is not None:
                between += attention[:, count:, count:]
            if number >= depth - blocks:
                class_attention += attention[:, :count, count:]
        features = self._as_map(tokens, grid)
        cam = self._patch_cam(features)
        class_attention = class_attention.reshape(batch, count, *grid)
        return Attended(self._scores(tokens, cam), class_attention, between, features, cam)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Class and patch tokens (B, N + P, C) before the first block, and the grid (h, w).

        The rest of a side that does not fill a cell is ignored; a side shorter than a cell is
        padded to one with zeros, the mean colour.
        """
        height, width = (max(1, side // self.cell) for side in images.shape[-2:])
        bottom, right = (max(0, self.cell - side) for side in images.shape[-2:])
        images = F.pad(images, (0, right, 0, bottom))
        images = images[..., : height * self.cell, : width * self.cell]
        patches = self.patch_embed(images).flatten(1, 2)
        count = len(self.classes)
        positions = scale_positions(self.pos_embed[:, count:], (height, width))
        classes = (self.cls_token + self.pos_embed[:, :count]).expand(len(images), -1, -1)
        tokens: Tensor = self.pos_drop(torch.cat([classes, patches + positions], 1))
        return tokens, (height, width)

    def _scores(self, tokens: Tensor, patch_cam: Tensor | None) -> Scores:
        """Scores from the last block's tokens (B, N + P, C) and PatchCAM (B, N, h, w)."""
        pooled = None if patch_cam is None else patch_cam.mean((-2, -1))
        return Scores(tokens[:, : len(self.classes)].mean(-1), pooled)

    @classmethod
    def _described(cls, metadata: Mapping[str, Any]) -> Mctformer:
        preprocessing = models.Preprocessing(
            *(tuple(metadata["preprocessing"][key]) for key in ("mean", "std"))
        )
        with torch.random.fork_rng(devices=[]):  # the first weights are random, and replaced
            return cls(MctformerSpec(**metadata["spec"]), metadata["classes"], preprocessing)

    def _description(self) -> dict[str, Any]:
        return {
            "spec": asdict(self.spec),
            "preprocessing": asdict(self.preprocessing),
            "classes": list(self.classes),
        }

    def _as_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        planes = tokens[:, len(self.classes) :].transpose(1, 2)
        return planes.reshape(*planes.shape[:2], *grid)

    def _patch_cam(self, features: Tensor) -> Tensor | None:
        return None if self.head is None else self.head(features)


def _plain(model: nn.Module) -> VisionTransformer:
    """The model, if it is a transformer all of whose parts the network knows."""
    name = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise ClassifierError(
            f"{name} is not a vision transformer of timm; MCTformer needs one with a class token, "
            "as deit_small_patch16_224"
        )
    blocks: list[Any] = list(model.blocks)
    problems = {
        "it has no class token": model.cls_token is None,
        "it has a distillation token": hasattr(model, "dist_token"),
        "it has register tokens": model.reg_token is not None,
        "it has no table of positions": model.pos_embed is None,
        "its class token has no position": model.no_embed_class,
        "it has a norm before the first block": not isinstance(model.norm_pre, nn.Identity),
        "it drops patches": not isinstance(model.patch_drop, nn.Identity),
        "its blocks are not plain ones": any(
            type(block) is not Block
            or type(block.attn).__name__ != "Attention"
            or getattr(block.attn, "gate", None) is not None
            for block in blocks
        ),
    }
    if found := [problem for problem, there in problems.items() if there]:
        raise ClassifierError(
            f"MCTformer cannot be built on this {name}: {', '.join(found)}; use a plain vision "
            "transformer, as deit_small_patch16_224"
        )
    return model


def build_mctformer(
    backbone: models.BackboneSpec,
    names: Sequence[str],
    settings: MctformerSettings,
    **first: Any,
) -> Mctformer:
    """Build MCTformer on a vision transformer of timm (section 1); see :meth:`Host.build`.

    The class token of a DeiT or ViT checkpoint and its position are copied for every class; the
    positions of patches are resized (bicubic) if the checkpoint has another grid. The backbone's
    arguments are timm's, and ``stem``, timm's name of a convolutional backbone that makes the patch
    tokens, with its ``stem_arguments``; the weights are then the stem's.
    """
    weights = str(first["weights"])
    options = (settings.crop, settings.drop_path, settings.version)
    spec = MctformerSpec(backbone.name, dict(backbone.arguments), *options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(first.get("seed", 0))
        if STEM in spec.arguments:
            network = Mctformer(spec, names, stem_weights=weights)
        else:
            network = Mctformer(spec, names)
            if weights == models.PRETRAINED:
                _load(network, _transformer(spec, pretrained=True).state_dict(), models.PRETRAINED)
            elif weights != models.RANDOM:
                _load(network, models.read_weights(Path(weights)), weights)
    network.preprocessing = preprocessing_with(
        network.preprocessing, first.get("mean"), first.get("std")
    )
    return network


def _stem(spec: MctformerSpec, cell: int, weights: str) -> models.Classifier:
    """A backbone whose output stride is the side of the transformer's patches."""
    backbone = models.BackboneSpec(
        spec.arguments[STEM], spec.arguments.get(STEM_ARGUMENTS, {}), cell
    )
    classifier = models.build(backbone, models.NO_CLASSES, weights=weights)
    side = classifier.features(torch.zeros(1, 3, cell, cell)).shape[-1]
    if side != 1:
        raise ClassifierError(
            f"the stem {spec.arguments[STEM]!r} makes {side} x {side} features of {cell} x {cell} "
            "pixels, the transformer's patch; expected one"
        )
    return classifier


def _transformer(spec: MctformerSpec, **options: Any) -> nn.Module:
    models.check_backbone(spec.backbone)
    if options.get("pretrained"):
        models.check_download(spec.backbone)
    arguments = {k: v for k, v in spec.arguments.items() if k not in (STEM, STEM_ARGUMENTS)}
    try:
        model: nn.Module = timm.create_model(spec.backbone, num_classes=0, **options, **arguments)
    except Exception as error:  # whatever timm, torch or a hub client raises, one message serves
        raise ClassifierError(
            f"timm could not make {spec.backbone!r} with arguments {arguments} and {options}: "
            f"{error}. MCTformer needs a vision transformer, as deit_small_patch16_224; the size "
            "of its images is mctformer.crop. Without a network, or for another width than the "
            "pretrained one, give weights as 'random' or a safetensors file"
        ) from error
    return model


def _load(network: Mctformer, state: Mapping[str, Tensor], name: str) -> None:
    what = f"{network.spec.backbone!r} with arguments {dict(network.spec.arguments)}"
    fitted = _with_class_tokens(state, network.state_dict())
    load_fitting(network, fitted, name, what, "check the backbone's name and arguments")


def _with_class_tokens(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a transformer, its tokens copied and its positions resized to fit ``own``.

    Those that cannot be fitted are left as they are.
    """
    fitted = dict(state)
    heads = {k for k in state if k.startswith("head.")}
    if not ("head.weight" in own and "head.weight" in heads and state["head.weight"].ndim == 4):
        # a checkpoint's linear head is replaced by the network's convolution, if it has one
        fitted = {k: v for k, v in state.items() if k not in heads}
        fitted |= {k: v for k, v in own.items() if k.startswith("head.")}
    count, width = own["cls_token"].shape[1:]
    token, table = (state.get(name, torch.empty(0)) for name in ("cls_token", "pos_embed"))
    given = token.shape[1] if token.ndim == 3 else 0
    square = table.shape[1] - given if table.ndim == 3 and table.shape[2] == width else 0
    side, wanted = math.isqrt(max(0, square)), math.isqrt(own["pos_embed"].shape[1] - count)
    if given not in (1, count) or side < 1 or side * side != square:
        return fitted
    copies, sides = count // given, ([wanted, wanted], [side, side])
    resized = resample_abs_pos_embed(table, *sides, num_prefix_tokens=given, antialias=False)
    positions = table[:, :given].repeat(1, copies, 1)
    fitted["cls_token"] = token.repeat(1, copies, 1)
    fitted["pos_embed"] = torch.cat([positions, resized[:, given:]], 1)
    return fitted
