"""A backbone with global average pooling and a bias-free linear head.

The head's rows are the w_n of equation 1, and the feature block before pooling is its f(x).
"""

from __future__ import annotations

import copy
import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import lpcam.backbones  # noqa: F401 - registers with timm what it lacks
from lpcam.errors import ArtefactError, ClassifierError
from lpcam.network_files import load_weights
from lpcam.storage import digest_json, read_tensors, tensor_bytes, write_tensors

PRETRAINED = "pretrained"
RANDOM = "random"
NO_CLASSES = ("none",)
"""Of a classifier of which the backbone alone is wanted."""
PROBE_SIZE = (97, 131)
"""On which a backbone is tried; a multiple of nothing, as the sides of photographs are."""


@dataclass(frozen=True)
class Preprocessing:
    """Per-channel mean and standard deviation of RGB in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) uint8 RGB to (3, H, W) float32, normalised."""
        tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255.0
        mean = torch.tensor(self.mean)[:, None, None]
        return (tensor - mean) / torch.tensor(self.std)[:, None, None]


@dataclass(frozen=True)
class BackboneSpec:
    """What makes a backbone, apart from its weights.

    ``dilated=False`` sets every dilation back to 1 after ``output_stride`` has removed strides, as
    the released programs' ResNet-50 has it (specification of LPCAM, section 2). Without an
    ``output_stride`` a model's dilations are its own and stay.
    """

    name: str
    arguments: Mapping[str, Any]
    output_stride: int | None = None
    dilated: bool = True


class Classifier(nn.Module):
    """Backbone, global average pooling, linear head without bias.

    Args:
        backbone: a module that maps images (B, 3, H, W) to (B, C, h, w).
        classes: the N class names, in label order.
        preprocessing: what the backbone expects of RGB.
        spec: how to build the backbone again; None for a module of the caller's own, which can
            then not be saved.

    Raises:
        ClassifierError: if the backbone gives no spatial map, or NaN or Inf.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        spec: BackboneSpec | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classes = tuple(classes)
        self.preprocessing = preprocessing
        self.spec = spec
        self._tokens = False
        channels = self._probe_channels()
        self.head = nn.Linear(channels, len(self.classes), bias=False)
        self.eval()

    @property
    def weight(self) -> Tensor:
        """(N, C), the rows w_n, detached."""
        return self.head.weight.detach()

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def features(self, images: Tensor) -> Tensor:
        """f(x): (B, 3, H, W) normalised images to (B, C, h, w), before pooling."""
        if self._tokens:
            return _token_map(self.backbone, images)
        return _as_map(self.backbone, _forward(self.backbone, images))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, N)."""
        logits: Tensor = self.head(self.features(images).mean((-2, -1)))
        return logits

    def train(self, mode: bool = True) -> Classifier:
        """Training mode with the statistics of every batch norm frozen."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def folded(self) -> Classifier:
        """A copy for inference: batch norms folded into convolutions, no padding of its own.

        Its features are the same but for rounding, in two thirds of the time. It shares nothing
        with this classifier, is of no use for training, and cannot be saved.
        """
        twin = copy.deepcopy(self).eval()
        twin.spec = None
        _fold_batch_norms(twin.backbone)
        _pad_within(twin.backbone)
        image = next(self.backbone.parameters(), torch.zeros(())).new_zeros(1, 3, *PROBE_SIZE)
        image[..., ::2, ::3] = 1.0
        # TensorFloat-32, which cuDNN takes where it can, rounds more coarsely than this test.
        with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
            expected, found = self.features(image), twin.features(image)
        # Nothing says that a convolution's neighbour in the module tree is its neighbour in
        # forward, so the whole is tried.
        if not torch.allclose(expected, found, rtol=0.0, atol=1e-4 * float(expected.abs().max())):
            twin.backbone = copy.deepcopy(self.backbone).eval()
        return twin

    def fingerprint(self) -> str:
        """32 hex digits that change with any weight, the architecture or the preprocessing."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(digest_json(self._description()).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    def save(self, path: Path, made_by: dict[str, Any] | None = None) -> None:
        """Write weights, architecture and provenance to one safetensors file.

        Raises:
            ClassifierError: for a backbone of the caller's own, which no file can describe.
        """
        if self.spec is None:
            raise ClassifierError(
                "this classifier wraps a module that was passed in, so a file cannot describe it; "
                "build it with lpcam.classifier.build to save it"
            )
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        metadata = {
            "kind": "classifier",
            "fingerprint": self.fingerprint(),
            "made_by": made_by or {},
            **self._description(),
        }
        write_tensors(path, state, metadata)

    @classmethod
    def load(cls, path: Path) -> Classifier:
        """Read a file of :meth:`save`; needs no network.

        Raises:
            ArtefactError: if the file is missing, damaged, or not a classifier.
        """
        state, metadata = read_tensors(path)
        if metadata.get("kind") != "classifier":
            raise ArtefactError(
                f"{path} holds {metadata.get('kind')!r}, not a classifier; give the file that "
                "the classify stage wrote"
            )
        classifier = described(metadata, metadata["classes"])
        load_weights(classifier, state, path)
        return classifier

    def _description(self) -> dict[str, Any]:
        return {
            **description(self.backbone, self.spec, self.preprocessing),
            "classes": list(self.classes),
        }

    def _probe_channels(self) -> int:
        was_training = self.backbone.training
        self.backbone.eval()
        try:
            parameter = next(self.backbone.parameters(), torch.zeros(()))
            image = parameter.new_zeros(1, 3, *PROBE_SIZE)
            with torch.no_grad():
                features = _forward(self.backbone, image)
                self._tokens = _gives_tokens(self.backbone, features)
                features = (
                    _token_map(self.backbone, image)
                    if self._tokens
                    else _as_map(self.backbone, features)
                )
        except (AssertionError, RuntimeError) as error:
            raise ClassifierError(
                f"the backbone {type(self.backbone).__name__} cannot take an image of "
                f"{PROBE_SIZE[0]} x {PROBE_SIZE[1]} "
                f"pixels: {error}. LPCAM maps images of any size; some transformers do so with the "
                "arguments dynamic_img_size: true and dynamic_img_pad: true"
            ) from error
        finally:
            self.backbone.train(was_training)
        if not bool(torch.isfinite(features).all()):
            raise ClassifierError(
                "the backbone gives NaN or Inf on an all-zero image; its weights are damaged or "
                "belong to another architecture"
            )
        return features.shape[1]


def build(
    spec: BackboneSpec,
    classes: Sequence[str],
    *,
    weights: str | Path,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> Classifier:
    """Build a classifier on a timm backbone.

    Args:
        spec: timm name, its arguments, output stride.
        classes: N class names.
        weights: ``"pretrained"`` (timm's, over the network on first use), ``"random"``, or the path
            of a safetensors file of this architecture (with or without its classification head).
        mean, std: of RGB in [0, 1]; default: those of timm's pretrained cfg.
        seed: of a random backbone and of the head.

    Raises:
        ClassifierError: if timm does not know the name or refuses an argument, if the weights
            cannot be had, do not fit or hold NaN or Inf, or if the backbone has no spatial map.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = _create(spec, pretrained=str(weights) == PRETRAINED)
        if str(weights) not in (PRETRAINED, RANDOM):
            _load_weights(backbone, Path(weights), spec)
        for name, tensor in backbone.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ClassifierError(
                    f"the weights {str(weights)!r} hold NaN or Inf in {name!r}; "
                    "the file is damaged, fetch it again"
                )
        config: Mapping[str, Any] = getattr(backbone, "pretrained_cfg", None) or {}
        preprocessing = Preprocessing(
            tuple(mean if mean is not None else config.get("mean", (0.485, 0.456, 0.406))),
            tuple(std if std is not None else config.get("std", (0.229, 0.224, 0.225))),
        )
        return Classifier(backbone, classes, preprocessing, spec)


def described(metadata: Mapping[str, Any], classes: Sequence[str] = NO_CLASSES) -> Classifier:
    """A classifier with random weights, as :func:`description` of its backbone says."""
    preprocessing = Preprocessing(*(tuple(metadata["preprocessing"][k]) for k in ("mean", "std")))
    spec = BackboneSpec(**metadata["backbone"])
    with torch.random.fork_rng(devices=[]):  # the weights are going to be replaced
        return Classifier(_create(spec, pretrained=False), classes, preprocessing, spec)


def description(
    backbone: nn.Module, spec: BackboneSpec | None, preprocessing: Preprocessing
) -> dict[str, Any]:
    """Architecture and preprocessing as JSON, for files and fingerprints."""
    return {
        "backbone": asdict(spec) if spec else type(backbone).__name__,
        "preprocessing": asdict(preprocessing),
    }


def folded_backbone(backbone: nn.Module) -> nn.Module:
    """A copy of a backbone for inference, as :meth:`Classifier.folded`."""
    with torch.random.fork_rng(devices=[]):  # a head, of no use here, is drawn at random
        classifier = Classifier(backbone, NO_CLASSES, Preprocessing((), ()))
    return classifier.folded().backbone


def feature_maps(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """All maps (B, C, h, w) that a timm backbone makes of images (B, 3, H, W), in its order."""
    intermediates: Any = backbone.forward_intermediates
    found: list[Tensor] = intermediates(images, intermediates_only=True, output_fmt="NCHW")
    return found


def check_backbone(name: str) -> None:
    """Refuse a name that timm does not know.

    Raises:
        ClassifierError: with the nearest names that it knows.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        hint = f"near it are {', '.join(near)}" if near else "timm.list_models() lists all"
        raise ClassifierError(f"timm has no model {name!r}; {hint}")


def _create(spec: BackboneSpec, *, pretrained: bool) -> nn.Module:
    arguments = dict(spec.arguments)
    if spec.output_stride is not None:
        arguments["output_stride"] = spec.output_stride
    check_backbone(spec.name)
    try:
        # Only the part before pooling is used; num_classes=0 leaves the old head out.
        model: nn.Module = timm.create_model(
            spec.name, pretrained=pretrained, num_classes=0, **arguments
        )
    except Exception as error:  # whatever timm, torch or a hub client raises, one message serves
        what = "with its pretrained weights " if pretrained else ""
        raise ClassifierError(
            f"timm could not make {spec.name!r} {what}with arguments {arguments}: {error}. "
            "Check the arguments (not every model has output_stride); without a network, give "
            "weights as the path of a safetensors file"
        ) from error
    if spec.output_stride is not None and not spec.dilated:
        _remove_dilation(model)
    return model


def _remove_dilation(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and max(module.dilation) > 1:
            module.dilation = (1, 1)
            if isinstance(module.padding, tuple) and any(module.padding):
                module.padding = tuple((k - 1) // 2 for k in module.kernel_size)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ClassifierError: if it is missing, damaged or of another format.
    """
    if not path.is_file():
        raise ClassifierError(
            f"no weights file {str(path)!r}; give the path of a safetensors file, "
            f"{PRETRAINED!r} or {RANDOM!r}"
        )
    if path.suffix != ".safetensors":
        raise ClassifierError(
            f"weights must be a .safetensors file, got {path.name!r}; pickled checkpoints can run "
            "code and are not read: convert it first with lpcam convert FILE OUT.safetensors"
        )
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ClassifierError(
            f"the weights file {str(path)!r} cannot be read: {error}; fetch it again"
        ) from error


def misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """How a file's tensors differ from a network's in names and shapes, in words; or nothing."""
    found = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": sorted(
            k for k in own.keys() & state.keys() if own[k].shape != state[k].shape
        ),
    }
    return ", ".join(
        f"{len(names)} {what} (first: {names[0]})" for what, names in found.items() if names
    )


def refuse_not_finite(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a file whose tensors hold NaN or Inf.

    Raises:
        ClassifierError: naming the first such tensor.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ClassifierError(
                f"the weights {str(path)!r} hold NaN or Inf in {name!r}; "
                "the file is damaged, fetch it again"
            )


def _load_weights(backbone: nn.Module, path: Path, spec: BackboneSpec) -> None:
    state = read_weights(path)
    config: Mapping[str, Any] = getattr(backbone, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or ()
    for head in (heads,) if isinstance(heads, str) else heads:
        state = {k: v for k, v in state.items() if not k.startswith(f"{head}.")}
    own = backbone.state_dict()
    # Files of old programs lack the counters of batches, which a frozen norm never reads.
    counters = {k: v for k, v in own.items() if k.endswith(".num_batches_tracked")}
    state = {**counters, **state}
    if difference := misfit(own, state):
        raise ClassifierError(
            f"the weights {path.name!r} do not fit {spec.name!r} with arguments "
            f"{dict(spec.arguments)}: {difference}; check the backbone's name and arguments"
        )
    backbone.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()}, strict=True)


def _fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch norm that follows a convolution among a module's children (in place)."""
    before: tuple[str, nn.Conv2d] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and before is not None and child.track_running_stats:
            setattr(module, before[0], fuse_conv_bn_eval(before[1], child))
            # timm's batch norms drop and activate too
            rest = [getattr(child, part, nn.Identity()) for part in ("drop", "act")]
            setattr(module, name, nn.Sequential(*rest))
        before = None
        if isinstance(child, nn.Conv2d):
            before = (name, child)
        else:
            _fold_batch_norms(child)


def _pad_within(module: nn.Module) -> None:
    """Let timm's "same" convolutions of a module leave padding to the convolution (in place)."""
    for name, child in list(module.named_children()):
        if type(child) is Conv2dSame:
            setattr(module, name, _SameConvolution(child))
        else:
            _pad_within(child)


class _SameConvolution(nn.Module):
    """A convolution with "same" padding, without a padded copy of its input.

    Where "same" needs more zeros after an image than before it, it convolves with symmetric padding
    that is larger by whole strides and drops the first outputs. On a CPU the copy costs more than
    the convolution.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, images: Tensor) -> Tensor:
        conv = self.convolution
        padding, kept = [], []
        for axis, length in enumerate(images.shape[-2:]):
            stride, reach = conv.stride[axis], (conv.kernel_size[axis] - 1) * conv.dilation[axis]
            count = -(-length // stride)
            total = max((count - 1) * stride + reach + 1 - length, 0)
            before = total // 2
            dropped = -(-(total - 2 * before) // stride)
            padding.append(before + dropped * stride)
            kept.append(slice(dropped, dropped + count))
        return F.conv2d(
            images, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups
        )[:, :, kept[0], kept[1]]


def _forward(backbone: nn.Module, images: Tensor) -> Any:
    return getattr(backbone, "forward_features", backbone)(images)


def _gives_tokens(backbone: nn.Module, features: Any) -> bool:
    tokens_axes = 3
    is_tokens = isinstance(features, Tensor) and features.ndim == tokens_axes
    return is_tokens and hasattr(backbone, "forward_intermediates")


def _as_map(backbone: nn.Module, features: Any) -> Tensor:
    """What a convolutional backbone gave, as (B, C, h, w)."""
    map_axes = 4
    if not isinstance(features, Tensor) or features.ndim != map_axes:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ClassifierError(
            f"the backbone {type(backbone).__name__} gives {shape}, not a feature map "
            "(B, C, h, w); LPCAM needs the spatial map before pooling: choose a backbone that has "
            "one"
        )
    if str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC"):
        return features.permute(0, 3, 1, 2)
    return features


def _token_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """The last tokens of a transformer on their grid (B, C, h, w), without prefix tokens."""
    intermediates: Any = backbone.forward_intermediates
    maps = intermediates(images, indices=1, norm=True, intermediates_only=True)
    return _as_map(backbone, maps[-1])
