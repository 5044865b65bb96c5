"""The classifier: a backbone with a spatial feature map and a linear head."""

from __future__ import annotations

import copy
import difflib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import EntryNotFoundError
from numpy.typing import NDArray
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lpcam.classifiers import wideresnet38  # noqa: F401 - registers itself with timm
from lpcam.classifiers.linear import checked_names
from lpcam.classifiers.search import class_names
from lpcam.runtime.errors import ClassifierError
from lpcam.training.optim import FrozenStatistics
from lpcam.training.saved_network import SavedNetwork

PRETRAINED = "pretrained"
RANDOM = "random"
HUB_SECONDS = 5.0  #: How long the hub may take to answer whether it has weights.
NO_CLASSES = ("none",)  #: Class names of a classifier whose backbone alone is used.
PROBE_SIZE = (97, 131)  #: (H, W) of the image that tests a backbone, not round numbers.
TOLERANCE = 1e-4  #: Largest relative difference of logits that counts as rounding.


@dataclass(frozen=True)
class Preprocessing:
    """Per-channel mean and standard deviation of RGB in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of_timm(
        cls, model: Any, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> Preprocessing:
        """Given values, else those of the model's pretrained cfg, else ImageNet's."""
        config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        return cls(
            tuple(mean or config.get("mean", IMAGENET_DEFAULT_MEAN)),
            tuple(std or config.get("std", IMAGENET_DEFAULT_STD)),
        )

    def __call__(self, image: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) uint8 RGB to (3, H, W) float32, normalised."""
        tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255.0
        mean = torch.tensor(self.mean)[:, None, None]
        return (tensor - mean) / torch.tensor(self.std)[:, None, None]


@dataclass(frozen=True)
class BackboneSpec:
    """Name and arguments of a timm backbone."""

    name: str
    arguments: Mapping[str, Any]  #: Arguments of ``timm.create_model``.
    output_stride: int | None = None
    """Pixels per cell of the features, for models that can remove strides."""
    dilated: bool = True
    """False: dilations that ``output_stride`` brings are 1 (specification of LPCAM, section 2)."""


class Classifier(FrozenStatistics, SavedNetwork):
    """Backbone, global average pooling, linear head without bias.

    Args:
        backbone: a module that maps images (B, 3, H, W) to (B, C, h, w).
        classes: the N class names, in label order.
        spec: how to build the backbone again; without one a classifier cannot be saved.

    Raises:
        ClassifierError: if the backbone gives no spatial map, or NaN or Inf.

    Example:
        >>> plain = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        >>> classifier = Classifier(nn.AvgPool2d(8), ["cat", "dog"], plain)
        >>> classifier.features(torch.ones(1, 3, 32, 48)).shape, classifier.weight.shape
        (torch.Size([1, 3, 4, 6]), torch.Size([2, 3]))
    """

    kind = "classifier"
    channels_in = 3  #: Channels of an image.

    def __init__(
        self,
        backbone: nn.Module,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        spec: BackboneSpec | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classes = checked_names(classes)
        self.preprocessing = preprocessing
        self.spec = spec
        self.dropout = 0.0
        self.gives_tokens = False  #: Whether the backbone gives tokens, which become a map.
        self.head = nn.Linear(self._probe_channels(), len(self.classes), bias=False)
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
        backbone: Any = self.backbone
        if self.gives_tokens:  # a transformer: its last tokens on their grid, without prefix
            (found,) = backbone.forward_intermediates(
                images, indices=1, norm=True, intermediates_only=True
            )
        else:
            found = getattr(backbone, "forward_features", backbone)(images)
        if not isinstance(found, Tensor) or found.ndim != 4:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ClassifierError(
                f"the backbone {type(backbone).__name__} gives {shape}, not a feature map "
                "(B, C, h, w) before pooling; choose a backbone that has one"
            )
        channels_last = str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC")
        return found.permute(0, 3, 1, 2) if channels_last else found

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, N)."""
        features = F.dropout2d(self.features(images), self.dropout, self.training)
        logits: Tensor = self.head(features.mean((-2, -1)))
        return logits

    def folded(self) -> Classifier:
        """A copy for inference, a third faster: batch norms are folded into convolutions."""
        twin = copy.deepcopy(self).eval()
        twin.spec = None
        _fold(twin.backbone)
        image = self._blank()
        image[..., ::2, ::3] = 1.0
        # TensorFloat-32, which cuDNN takes where it can, rounds more coarsely than this test.
        with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
            expected, found = self.features(image), twin.features(image)
        # Neighbours in the module tree need not be neighbours in forward, so the result is tested.
        if not torch.allclose(expected, found, rtol=0.0, atol=1e-4 * float(expected.abs().max())):
            twin.backbone = copy.deepcopy(self.backbone).eval()
        return twin

    def _blank(self) -> Tensor:
        """A black image (1, 3, *PROBE_SIZE) of the backbone's dtype and device."""
        return next(self.backbone.parameters(), torch.zeros(())).new_zeros(1, 3, *PROBE_SIZE)

    def _description(self) -> dict[str, Any]:
        described = description(self.backbone, self.spec, self.preprocessing)
        return {**described, "classes": list(self.classes)}

    @classmethod
    def _described(cls, metadata: Mapping[str, Any]) -> Classifier:
        return described(metadata, metadata["classes"])

    def _probe_channels(self) -> int:
        """Number of channels of the features; refuses a backbone that gives no map."""
        backbone: Any = self.backbone
        was_training = backbone.training
        backbone.eval()
        try:
            with torch.no_grad():
                if hasattr(backbone, "forward_intermediates"):
                    given = backbone.forward_features(self._blank())
                    self.gives_tokens = isinstance(given, Tensor) and given.ndim == 3
                features = self.features(self._blank())
        except (AssertionError, RuntimeError) as error:
            raise ClassifierError(
                f"the backbone {type(backbone).__name__} cannot take an image of "
                f"{PROBE_SIZE[0]} x {PROBE_SIZE[1]} pixels: {error}. LPCAM maps images of any "
                "size; some transformers do so with their arguments dynamic_img_size and "
                "dynamic_img_pad"
            ) from error
        finally:
            backbone.train(was_training)
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
    """Build a classifier on a timm backbone, with a random head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Only the part before pooling is used; num_classes=0 leaves the old head out.
        backbone = _create(spec, pretrained=str(weights) == PRETRAINED, num_classes=0)
        if str(weights) not in (PRETRAINED, RANDOM):
            _load_weights(backbone, Path(weights), spec)
        refuse_not_finite(backbone.state_dict(), weights)
        return Classifier(backbone, classes, Preprocessing.of_timm(backbone, mean, std), spec)


def timm_classifier(name: str, *, weights: str | Path = PRETRAINED) -> Classifier:
    """A timm model with the head that it was trained with; such a classifier cannot be saved."""
    spec = BackboneSpec(name, {})
    with torch.random.fork_rng(devices=[]):  # the first weights are random, and replaced
        model: Any = _create(spec, pretrained=str(weights) == PRETRAINED).eval()
        if str(weights) != PRETRAINED:
            _load_weights(model, Path(weights), spec, with_head=True)
        head = model.get_classifier()
        if isinstance(head, nn.Linear):
            names = class_names(model, head.out_features)
            classifier = Classifier(model, names, Preprocessing.of_timm(model))
            generator = torch.Generator().manual_seed(0)
            image = torch.randn(1, 3, *PROBE_SIZE, generator=generator).to(head.weight)
            if head.in_features == classifier.head.in_features:
                classifier.head = head
                with torch.no_grad():
                    expected = model(image)
                    difference = float((classifier(image) - expected).abs().max())
                if difference <= TOLERANCE * max(1.0, float(expected.abs().max())):  # not NaN
                    model.reset_classifier(0)  # else the head would be twice among the parameters
                    return classifier
    raise ClassifierError(
        f"the head of {name!r} is not one linear layer on the mean of the feature map, which "
        "CAM needs: ResNet, RegNet, EfficientNet and MobileNetV2 have one; or fit a linear "
        "head on its features, which LPCAM(model, classes=[...]).fit(loader) and a run do"
    )


def described(metadata: Mapping[str, Any], classes: Sequence[str] = NO_CLASSES) -> Classifier:
    """A classifier with random weights, from the :func:`description` of its backbone."""
    preprocessing = Preprocessing(*(tuple(metadata["preprocessing"][k]) for k in ("mean", "std")))
    spec = BackboneSpec(**metadata["backbone"])
    with torch.random.fork_rng(devices=[]):  # the weights will be replaced
        backbone = _create(spec, pretrained=False, num_classes=0)
        return Classifier(backbone, classes, preprocessing, spec)


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
    with torch.random.fork_rng(devices=[]):  # a random head is drawn, which is not used
        classifier = Classifier(backbone, NO_CLASSES, Preprocessing((), ()))
    return classifier.folded().backbone


def feature_maps(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """All intermediate maps (B, C, h, w) of a timm backbone for images (B, 3, H, W)."""
    intermediates: Any = backbone.forward_intermediates
    found: list[Tensor] = intermediates(images, intermediates_only=True, output_fmt="NCHW")
    return found


def check_backbone(name: str) -> None:
    """Refuse a name that timm does not know by a ClassifierError with similar names."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        hint = f"similar names are {', '.join(near)}" if near else "timm.list_models() lists all"
        raise ClassifierError(f"timm has no model {name!r}; {hint}")


def check_download(name: str) -> None:
    """Refuse a timm model whose pretrained weights are neither cached nor can be downloaded.

    The hub gets one request, without the retries of a download. Models that timm loads from
    elsewhere are not checked.

    Raises:
        ClassifierError: if the hub does not answer within seconds, or refuses; says what to do.
    """
    config, file = timm.get_pretrained_cfg(name), "model.safetensors"
    repository = config and config.hf_hub_id
    if not repository or isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str):
        return
    url = huggingface_hub.hf_hub_url(repository, file)
    answer: Future[object] = Future()

    def ask() -> None:
        try:
            answer.set_result(huggingface_hub.get_hf_file_metadata(url, timeout=HUB_SECONDS))
        except Exception as error:  # the hub client may raise anything
            answer.set_exception(error)

    # A thread, as a request's timeout does not bound how long the hub's address is looked up.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer.result(HUB_SECONDS)
    except EntryNotFoundError:
        return  # timm knows other names of the file
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or f"no answer within {HUB_SECONDS:g} s"
        raise ClassifierError(
            f"the weights of {name!r} cannot be downloaded ({reason}). Download {url} on a machine "
            "that can, and give the file: lpcam init --weights FILE, or the key 'weights' of the "
            "recipe. To try the steps without a download: lpcam init --backbone bundled (trained "
            "on drawings, not for photographs)"
        ) from error


def _create(spec: BackboneSpec, *, pretrained: bool, **options: Any) -> nn.Module:
    arguments = dict(spec.arguments)
    if spec.output_stride is not None:
        arguments["output_stride"] = spec.output_stride
    check_backbone(spec.name)
    if pretrained:
        check_download(spec.name)
    try:
        model: nn.Module = timm.create_model(
            spec.name, pretrained=pretrained, **options, **arguments
        )
    except Exception as error:  # timm, torch or the hub client may raise anything
        what = "with its pretrained weights " if pretrained else ""
        raise ClassifierError(
            f"timm could not make {spec.name!r} {what}with arguments {arguments}: {error}. "
            "Check the arguments (not every model has output_stride); without a network, give "
            "weights as the path of a safetensors file"
        ) from error
    if spec.output_stride is not None and not spec.dilated:
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and max(module.dilation) > 1:
                module.dilation = (1, 1)
                if isinstance(module.padding, tuple) and any(module.padding):
                    module.padding = tuple((k - 1) // 2 for k in module.kernel_size)
    return model


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ClassifierError if it is missing or damaged."""
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
    """Differences of a file's tensors from a network's in names and shapes; "" for none."""
    both = own.keys() & state.keys()
    found = {
        "missing": own.keys() - both,
        "unexpected": state.keys() - both,
        "of another shape": {k for k in both if own[k].shape != state[k].shape},
    }
    return ", ".join(
        f"{len(names)} {what} (first: {min(names)})" for what, names in found.items() if names
    )


def refuse_not_finite(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse weights with NaN or Inf by a ClassifierError that names ``path`` and the tensor."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ClassifierError(
                f"the weights {str(path)!r} hold NaN or Inf in {name!r}; "
                "the file is damaged, fetch it again"
            )


def _load_weights(
    model: nn.Module, path: Path, spec: BackboneSpec, *, with_head: bool = False
) -> None:
    state, own = read_weights(path), model.state_dict()
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or ()
    for head in () if with_head else (heads,) if isinstance(heads, str) else heads:
        state = {k: v for k, v in state.items() if not k.startswith(f"{head}.")}
    # Files of old programs lack the counters of batches, which a frozen norm never reads.
    counters = {k: v for k, v in own.items() if k.endswith(".num_batches_tracked")}
    state = {**counters, **state}
    if difference := misfit(own, state):
        raise ClassifierError(
            f"the weights {path.name!r} do not fit {spec.name!r} with arguments "
            f"{dict(spec.arguments)}: {difference}; check the backbone's name and arguments"
        )
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()}, strict=True)


def _fold(module: nn.Module) -> None:
    """Fold batch norms into convolutions that they follow, and padding into timm's "same" ones."""
    previous, before = "", nn.Module()
    for name, child in list(module.named_children()):
        if (
            isinstance(child, nn.BatchNorm2d)
            and isinstance(before, nn.Conv2d)
            and child.track_running_stats
        ):
            setattr(module, previous, fuse_conv_bn_eval(before, child))
            # timm's batch norms drop and activate too
            rest = [getattr(child, part, nn.Identity()) for part in ("drop", "act")]
            setattr(module, name, nn.Sequential(*rest))
        _fold(child)
        previous, before = name, child
    for name, child in list(module.named_children()):
        if type(child) is Conv2dSame:
            setattr(module, name, SameConvolution(child))


class SameConvolution(nn.Module):
    """A "same" convolution without timm's padded copy, which takes longer than it on a CPU."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride))."""
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
