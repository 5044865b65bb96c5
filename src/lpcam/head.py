"""LPCAM as a layer: prototypes behind a backbone, logits and class maps in one pass, in one file.

Equations 5 and 6 are one vector a class (:meth:`lpcam.prototypes.Prototypes.vectors`), so the maps
of all classes are one L2 normalisation and one 1x1 convolution of the feature map. A
:class:`LPCAMHead` is that, and a :class:`LPCAMModel` a backbone with it: one scale, no mirror
image. Maps over several scales and flip are :class:`lpcam.extract.LPCAM`'s.

A model is written as ONNX, TorchScript or torch.export program, each of which gives ``logits``
(B, N) and ``maps`` (B, N, H, W) of images of any size with nothing of this package installed, or
as a folder that :meth:`LPCAMModel.from_pretrained` reads. With onnxruntime alone::

    session = onnxruntime.InferenceSession("animals.onnx")
    image = numpy.asarray(PIL.Image.open("cow.jpg").convert("RGB"))
    logits, maps = session.run(None, {"image": image[None]})
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import operator
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from lpcam.classifier import RANDOM, BackboneSpec, Classifier, Preprocessing, build
from lpcam.errors import ArtefactError, ClassifierError
from lpcam.explain.explainer import Explainer
from lpcam.extract import LPCAM
from lpcam.functional import NORM_EPSILON, strided
from lpcam.onnx_files import (
    OPSET,
    TRACED_SIZE,
    FromPixels,
    check_opset,
    check_size,
    describe_model,
    export_model,
    json_texts,
    model_bytes,
    open_session,
    photograph,
    quiet,
    refusal,
    sides,
    tried_sizes,
)
from lpcam.storage import (
    read_json,
    read_tensors,
    tensor_bytes,
    write_bytes,
    write_json,
    write_tensors,
)
from lpcam.structure import device_of, first_tensor
from lpcam.version import versions
from lpcam.wrap import WrappedModel, wrap

GRID = 16
"""Maps are enlarged to the next multiple of this and cropped, as :func:`fuse_scales` does."""
LOGIT_ERROR = 1e-4
"""Largest difference of a file's logits, over the largest logit."""
MAP_ERROR = 1e-4
"""Largest difference of a file's maps, which are at most 1 ..."""
COSINE_ERROR = 1e-5
"""... and what rounding may add to a cosine: much, where a map is divided by a tiny maximum."""
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
METADATA = "lpcam.json"
"""Name of the metadata within a TorchScript or torch.export file."""
_FORMAT = 1
_KIND = "LPCAMModel"

Normalize = Literal["max"]


class LPCAMHead(nn.Module):
    """Logits and LPCAM maps of a feature map.

    Args:
        weight: (N, C), rows of the linear layer on the mean of the feature map.
        vectors: (N, C) of :meth:`lpcam.prototypes.Prototypes.vectors`, used as they are.
        bias: (N,) of the linear layer, or None. It counts in the logits; no map has one.
        normalize: ``"max"`` divides each map by its maximum (a map that is zero stays so); None
            leaves the cosines' differences of equation 6, from 0 to 2.

    Raises:
        ValueError: if the shapes do not fit or the normalisation is unknown.
    """

    if TYPE_CHECKING:  # which torch.jit.script would read, and fail on
        weight: Tensor
        vectors: Tensor
        bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        vectors: Tensor,
        bias: Tensor | None = None,
        *,
        normalize: Normalize | None = "max",
    ) -> None:
        super().__init__()
        fits = weight.ndim == 2 and vectors.shape == weight.shape
        if not fits or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError(
                f"expected weight and vectors (N, C) and a bias (N,) or None, got "
                f"{tuple(weight.shape)}, {tuple(vectors.shape)} and "
                f"{None if bias is None else tuple(bias.shape)}"
            )
        if normalize not in ("max", None):
            raise ValueError(f"unknown normalisation {normalize!r}; use 'max' or None")
        self.normalize = normalize
        # attributes, because torch.jit.script knows no constants of a module
        self.epsilon, self.grid = NORM_EPSILON, GRID
        for name, values in (("weight", weight), ("vectors", vectors), ("bias", bias)):
            self.register_buffer(name, None if values is None else values.detach().clone())

    @classmethod
    def from_lpcam(cls, lpcam: LPCAM, *, normalize: Normalize | None = "max") -> Self:
        """The head of a fitted LPCAM, or of LPCAM-F if it leaves the context out.

        Raises:
            NotFittedError: if it has no prototypes yet.
            PrototypeError: if they belong to another classifier.
        """
        prototypes, source = lpcam.prototypes_, lpcam.source_
        prototypes.check_fingerprint(source.fingerprint(), "this LPCAM")
        vectors = prototypes.vectors(with_context=lpcam.with_context).to(source.weight)
        head = cls(source.weight, vectors, _bias(source), normalize=normalize)
        return head.to(source.dtype) if isinstance(source, WrappedModel) else head

    def forward(
        self,
        features: Tensor,
        size: tuple[int, int] | None = None,
        pooled: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits and maps.

        Args:
            features: (B, C, h, w), before pooling.
            size: (H, W) in pixels to which the maps are enlarged before they are normalised;
                None leaves them on the feature grid.
            pooled: (B, C), what the linear layer reads, e.g. class tokens; None: the mean of the
                features.

        Returns:
            logits (B, N), and maps (B, N, h, w) or (B, N, H, W), at least 0.

        Raises:
            ValueError: if the features are of another shape.
        """
        maps = self.activation(features, size)
        if self.normalize is not None:
            top = maps.amax((-2, -1), keepdim=True)
            maps = maps / torch.where(top > 0, top, torch.ones_like(top))
        if pooled is None:
            pooled = features.mean((-2, -1))
        return F.linear(pooled, self.weight, self.bias), maps

    def activation(self, features: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Equation 6 before its normalisation; arguments as those of :meth:`forward`."""
        if features.ndim != 4 or features.shape[1] != self.vectors.shape[1]:
            raise ValueError(
                f"expected features (B, {self.vectors.shape[1]}, h, w), got {features.shape}"
            )
        # In half precision the squares would overflow.
        wide = torch.promote_types(features.dtype, torch.float32)
        norm = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=wide)
        unit = (features / norm.clamp_min(self.epsilon)).to(features.dtype)
        maps = F.conv2d(unit, self.vectors[:, :, None, None]).relu()
        if size is None:
            return maps
        height, width = size
        whole = (strided(height, self.grid) * self.grid, strided(width, self.grid) * self.grid)
        maps = F.interpolate(maps, size=whole, mode="bilinear", align_corners=False)
        return maps[..., :height, :width]


class LPCAMModel(nn.Module):
    """A backbone with a :class:`LPCAMHead`: images to logits and maps, at one scale without flip.

    Args:
        backbone: normalised images (B, c, H, W) to features (B, C, h, w), or to a pair of those
            and of the vectors (B, C) that the head's linear layer reads in the place of their mean.
        head: of the backbone's features.
        classes: the N names; None: numbers.
        preprocessing: what the backbone expects of RGB. Only exported files apply it: they then
            take uint8 images, without it normalised ones. :meth:`forward` never does.
        enlarge: whether maps are of the images' size; False leaves them on the feature grid, a
            saving of memory where there are many classes.
        channels: c of the images.
        multiple: of which the sides of an image must be multiples.
        fixed_size: (H, W) of the only images that the backbone takes; None: it takes others too.
        spec: how to build a backbone that is a :class:`~lpcam.classifier.Classifier`'s again.
        made_by: provenance, JSON.

    Raises:
        ValueError: if the number of names is not N.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: LPCAMHead,
        *,
        classes: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        enlarge: bool = True,
        channels: int = 3,
        multiple: int = 1,
        fixed_size: tuple[int, int] | None = None,
        spec: BackboneSpec | None = None,
        made_by: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        count = head.weight.shape[0]
        self.backbone = backbone
        self.head = head
        self.classes = tuple(map(str, range(count) if classes is None else classes))
        self.preprocessing = preprocessing
        self.enlarge = enlarge
        self.channels = channels
        self.multiple = multiple
        self.fixed_size = fixed_size
        self.spec = spec
        self.made_by = dict(made_by or {})
        if len(self.classes) != count:
            raise ValueError(f"{len(self.classes)} names were given for {count} classes")
        self.eval()

    @classmethod
    def from_lpcam(
        cls,
        lpcam: LPCAM,
        *,
        preprocessing: Preprocessing | None = None,
        normalize: Normalize | None = "max",
        enlarge: bool = True,
    ) -> Self:
        """The model of a fitted LPCAM, with a copy of its backbone.

        Its maps are those of that LPCAM with ``scales=(1.0,)`` and ``flip=False``; logits are those
        of its classifier.

        Args:
            preprocessing: of RGB; None: that of the classifier, where it has one.

        Raises:
            NotFittedError: if it has no prototypes yet.
            PrototypeError: if they belong to another classifier.
            ClassifierError: if the feature map is given by a function, which cannot be copied.
        """
        head = LPCAMHead.from_lpcam(lpcam, normalize=normalize)
        source = lpcam.source_
        taken: dict[str, Any] = (
            {
                "channels": source.channels_in,
                "multiple": source.multiple,
                "fixed_size": source.fixed_size,
                "preprocessing": preprocessing,
            }
            if isinstance(source, WrappedModel)
            else {
                "spec": source.spec,
                "preprocessing": preprocessing or source.preprocessing,
            }
        )
        return cls(
            _backbone(source),
            head,
            classes=source.classes,
            enlarge=enlarge,
            **taken,
            made_by={
                "fingerprint": lpcam.prototypes_.fingerprint,
                "method": "LPCAM" if lpcam.with_context else "LPCAM-F",
                "settings": lpcam.prototypes_.made_by.get("settings"),
                "versions": versions(),
            },
        )

    @classmethod
    def from_run(cls, folder: Path | str) -> Self:
        """The classifier and prototypes of a run, which must have reached prototypes.

        Raises:
            ArtefactError: if something is missing or damaged; the message says what to run.
            PrototypeError: if the prototypes belong to another classifier.
        """
        explainer = Explainer.from_run(folder, device="cpu")
        classifier = Classifier.load(Path(folder) / "classifier" / "classifier.safetensors")
        return cls(
            _Features(classifier),
            LPCAMHead(classifier.weight, explainer.vectors, _bias(classifier)),
            classes=classifier.classes,
            preprocessing=classifier.preprocessing,
            spec=classifier.spec,
            made_by={
                **explainer.made_by,
                "settings": explainer.settings.model_dump(mode="json"),
            },
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, c, H, W) to logits (B, N) and maps (B, N, H, W)."""
        size = (images.shape[-2], images.shape[-1]) if self.enlarge else None
        features = self.backbone(images)
        pooled = None
        if isinstance(features, tuple):
            features, pooled = features
        found: tuple[Tensor, Tensor] = self.head(features, size, pooled)
        return found

    def save_pretrained(
        self,
        folder: Path | str,
        *,
        licence: str | None = None,
        training_data: str | None = None,
        name: str | None = None,
    ) -> None:
        """Write ``config.json``, ``model.safetensors`` and a model card, ``README.md``.

        The folder can be put on a model hub as it is. Files of those names are replaced, each whole
        or not at all.

        Args:
            licence: of the weights, as a hub spells it, e.g. ``"apache-2.0"``; None leaves it out.
            training_data: what the classifier and the prototypes were made from, in words.
            name: of the model; None: the folder's.

        Raises:
            ArtefactError: if a file cannot be written, or the provenance is no JSON.
        """
        folder = Path(folder)
        backbone = self.backbone
        wrapped = backbone.wrapped if isinstance(backbone, _WrappedFeatures) else None
        config = {
            "format": _FORMAT,
            "kind": _KIND,
            "library_name": "lpcam",
            "backbone": asdict(self.spec) if self.spec else None,
            "wrapped": wrapped is not None,
            "pool": wrapped.pool if wrapped else None,
            "new_head": wrapped.new_head if wrapped else False,
            "classes": list(self.classes),
            "preprocessing": asdict(self.preprocessing) if self.preprocessing else None,
            "normalize": self.head.normalize,
            "bias": self.head.bias is not None,
            "enlarge": self.enlarge,
            "channels": self.channels,
            "multiple": self.multiple,
            "fixed_size": self.fixed_size,
            "dtype": str(self.head.weight.dtype).removeprefix("torch."),
            "fingerprints": self._fingerprints(),
            "made_by": self.made_by,
            "versions": versions(),
        }
        card = self._card(name or folder.resolve().name, licence, training_data)
        write_tensors(folder / WEIGHTS, self.state_dict(), {"kind": _KIND})
        write_bytes(folder / CARD, card.encode())
        # last: a folder without it is none of a model
        write_json(folder / CONFIG, config)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        backbone: nn.Module | WrappedModel | None = None,
        revision: str | None = None,
    ) -> Self:
        """Read what :meth:`save_pretrained` wrote. Nothing in it is code, and none is run.

        Args:
            folder: or the id of a model on the Hugging Face hub, ``"owner/name"``, which is then
                fetched over the network.
            backbone: the architecture, if the folder does not describe it, with any weights; a copy
                takes those of the folder, and their dtype. The whole model is on its device. It is
                what LPCAM was given: a model, or what :func:`lpcam.wrap.wrap` makes of it, which is
                needed where layers were named. Of a model that was put together by hand: the module
                that gives the features.
            revision: of a model on the hub.

        Raises:
            ArtefactError: if a file is missing, damaged, of a newer version, or does not fit; if
                weights or prototypes are others than those that were written; if the hub cannot
                be reached.
            ClassifierError: if the folder does not describe its backbone and none is given, or the
                map is not found in the one that is.
        """
        paths = _pretrained_files(str(folder), revision)
        config = read_json(paths[CONFIG])
        if not isinstance(config, dict) or config.get("kind") != _KIND:
            raise ArtefactError(
                f"{paths[CONFIG]} is no configuration of a model with prototypes; give a folder "
                "that save_pretrained wrote"
            )
        if config.get("format") != _FORMAT:
            raise ArtefactError(
                f"{paths[CONFIG]} has format {config.get('format')!r}, this version reads "
                f"{_FORMAT}; install the version that wrote it"
            )
        state, _ = read_tensors(paths[WEIGHTS])
        try:
            model = cls._from_config(config, backbone, state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ArtefactError(
                f"{folder} does not fit its own description "
                f"({' '.join(str(error).split()):.300}); fetch or make it again"
            ) from error
        for what, found in model._fingerprints().items():
            expected = config["fingerprints"].get(what)
            if found != expected:
                raise ArtefactError(
                    f"the {what} in {folder} is {found}, but its {CONFIG} was written for "
                    f"{expected}; fetch or make it again"
                )
        return model

    @classmethod
    def _from_config(
        cls,
        config: Mapping[str, Any],
        given: nn.Module | WrappedModel | None,
        state: Mapping[str, Tensor],
    ) -> Self:
        normal = config["preprocessing"]
        preprocessing = (
            Preprocessing(tuple(normal["mean"]), tuple(normal["std"])) if normal else None
        )
        spec = BackboneSpec(**config["backbone"]) if config["backbone"] else None
        backbone: nn.Module
        device = torch.device("cpu")
        if given is not None:
            device = given.device if isinstance(given, WrappedModel) else device_of(given)
            backbone = _given_backbone(given, config, state)
        elif spec is None or preprocessing is None:
            raise ClassifierError(
                "this model's backbone was a module of its maker's own, which no file describes; "
                "build it and give it: from_pretrained(folder, backbone=module)"
            )
        else:
            classifier = build(
                spec,
                config["classes"],
                weights=RANDOM,
                mean=preprocessing.mean,
                std=preprocessing.std,
            )
            backbone = _Features(classifier)
        weight = state["head.weight"]
        head = LPCAMHead(
            weight,
            torch.zeros_like(weight),
            torch.zeros_like(weight[:, 0]) if config["bias"] else None,
            normalize=config["normalize"],
        )
        model = cls(
            backbone,
            head,
            classes=config["classes"],
            preprocessing=preprocessing,
            enlarge=config["enlarge"],
            channels=config["channels"],
            multiple=config["multiple"],
            fixed_size=tuple(config["fixed_size"]) if config["fixed_size"] else None,
            spec=spec,
            made_by=config["made_by"],
        ).to(device, getattr(torch, config["dtype"]))
        model.load_state_dict(state, strict=True)
        return model

    def _fingerprints(self) -> dict[str, str]:
        found = {"backbone": _digest(self.backbone), "head": _digest(self.head)}
        if isinstance(self.backbone, _WrappedFeatures):
            found["map"] = str(self.backbone)
        return found

    def _card(self, name: str, licence: str | None, training_data: str | None) -> str:
        """The model card, Markdown."""
        header: dict[str, Any] = {
            "library_name": "lpcam",
            "pipeline_tag": "image-classification",
            "tags": ["lpcam", "class-activation-map", "weakly-supervised-segmentation"],
        }
        if licence is not None:
            header["license"] = licence
        settings = json.dumps(self.made_by.get("settings"), indent=2, sort_keys=True)
        architecture = self.spec.name if self.spec else type(self.backbone).__name__
        given = "" if self.spec else ", backbone=your_backbone"
        expected = (
            f"RGB from 0 to 1, minus {list(self.preprocessing.mean)}, divided by "
            f"{list(self.preprocessing.std)}"
            if self.preprocessing
            else "as the backbone expects them"
        )
        return CARD_TEXT.format(
            header=yaml.safe_dump(header, sort_keys=True, allow_unicode=True),
            name=name,
            architecture=architecture,
            method=self.made_by.get("method", "LPCAM"),
            count=len(self.classes),
            channels=self.channels,
            classes="\n".join(f"- `{each.replace('`', ' ')}`" for each in self.classes),
            expected=expected,
            given=given,
            data=training_data or "Not stated.",
            licence=licence or "Not stated.",
            settings=settings,
        )


CARD_TEXT = """\
---
{header}---
# {name}

A classifier ({architecture}, {count} classes) that shows where in an image it sees each class:
beside the logits it gives class maps of {method} (Chen and Sun, *Extracting Class Activation Maps
from Non-Discriminative Features as well*, CVPR 2023), made at one scale without mirror images.

## Use
```python
from lpcam.head import LPCAMModel
model = LPCAMModel.from_pretrained("{name}"{given})
logits, maps = model(images)  # (B, N) and (B, N, height, width), maps from 0 to 1
```
Images are (B, {channels}, height, width): {expected}.

## Classes
{classes}

## Training data
{data}

## Licence
{licence}

## Settings
```json
{settings}
```
"""


# -- Backbones ----------------------------------------------------------------------------------


class _Features(nn.Module):
    """The feature map of a classifier, as a module."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)


class _WrappedFeatures(nn.Module):
    """The feature map of a wrapped model, and its class token, as a module that can be traced.

    :meth:`~lpcam.wrap.WrappedModel.features` guards a user's model, which no tracer follows; this
    is a copy of it that nobody else has.
    """

    def __init__(self, wrapped: WrappedModel) -> None:
        super().__init__()
        self.wrapped = copy.deepcopy(wrapped)
        self.model = self.wrapped.core
        self.source = self.wrapped.place
        self.kept: list[Tensor | None] = []
        layer = self.source.layer
        if isinstance(layer, nn.Module):
            layer.register_forward_hook(self._keep)  # a method, which a copy of this takes along
        elif all(getattr(layer, "__self__", None) is not module for module in self.model.modules()):
            raise ClassifierError(
                "the feature map of this model is given by a function, which cannot be copied; "
                "give the layer in its place: LPCAM(model, feature_layer='name of the layer')"
            )

    def __str__(self) -> str:
        """Where the map comes from, in words."""
        token = [] if self.source.token is None else [f"token {self.source.token} read"]
        return " / ".join(map(str, (self.source, *token, *self.wrapped.norms)))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        raw = self._raw(images)
        features = self.wrapped.features_of(raw, (images.shape[-2], images.shape[-1]))
        if self.source.token is None:
            return features
        return features, self.wrapped.divided(self.source.vector(raw))

    def _raw(self, images: Tensor) -> Tensor:
        layer = self.source.layer
        if isinstance(layer, nn.Module):
            self.kept.clear()
            self.model(images)
            found = self.kept[self.source.number]
            self.kept.clear()
        else:
            found = first_tensor(layer(images))
        assert found is not None  # it gave one when it was wrapped
        return found

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.kept.append(first_tensor(output))


def _backbone(source: Classifier | WrappedModel) -> nn.Module:
    if isinstance(source, WrappedModel):
        return _WrappedFeatures(source)
    return _Features(copy.deepcopy(source))


def _given_backbone(
    given: nn.Module | WrappedModel, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> nn.Module:
    """The backbone of a saved model, a copy of what is given for it, its map found as at first."""
    if isinstance(given, nn.Module):
        if not config["wrapped"] or isinstance(given, _WrappedFeatures):
            return copy.deepcopy(given)
        example = None
        if config["fixed_size"]:
            example = torch.zeros(1, config["channels"], *config["fixed_size"])
        given = wrap(given, classes=config["classes"], pool=config["pool"], example=example)
    if config["new_head"] and not given.new_head:
        # its rows read the mean of the bare map, whatever the model's own head reads
        given = given.with_head(state["head.weight"], state.get("head.bias"))
    return _WrappedFeatures(given)


# -- Files of one model --------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportParity:
    """How an exported file compares with its model.

    ``checked`` is False where onnxruntime is not installed; the numbers are then None.
    ``logit_error`` is the largest difference of logits over the largest logit, and ``map_error``
    the largest difference of maps, less what rounding does to a map that is hardly above zero
    (divided by 1 + 0.1 / its maximum before normalisation), of ``sizes`` (height, width).
    """

    path: Path
    dynamic: bool
    checked: bool
    sizes: tuple[tuple[int, int], ...]
    logit_error: float | None
    map_error: float | None


def export_onnx(
    model: LPCAMModel,
    path: Path,
    *,
    opset: int = OPSET,
    dynamic: bool = True,
    size: tuple[int, int] | None = None,
    made_by: Mapping[str, Any] | None = None,
) -> ExportParity:
    """Write a model as ONNX and compare the file with it, in onnxruntime where that is there.

    The input is ``image``, uint8 RGB (B, H, W, 3), if the model has a preprocessing, which is then
    in the file; else ``images``, normalised float32 (B, c, H, W). The outputs are ``logits`` (B, N)
    and ``maps`` (B, N, H, W), float32. The model itself is left as it is: a copy on the CPU, in
    float32 and evaluation mode, is exported.

    Args:
        path: of the file, which holds the weights too; replaced only when the check has passed.
        opset: version of ONNX's operators, 18 or newer.
        dynamic: whether the file takes images of any size from 32 pixels a side; otherwise of
            ``size`` alone. The batch is of any size in both. A model that takes one size alone
            gets a file of that one.
        size: height and width, in pixels, of the traced image; None chooses one.
        made_by: further provenance, JSON, for the metadata.

    Raises:
        ArtefactError: if onnx or onnxscript is not installed, the network cannot be exported so,
            the file differs (by more than 1e-4), would be larger than 2 GiB, or cannot be written.
            No file is left, and an earlier one stays.
    """
    size, dynamic = _size(model, size, dynamic)
    check_opset(opset)
    whole = _File(model)
    taken = sides(size, dynamic=dynamic, multiple=model.multiple)
    try:
        found = export_model(
            whole,
            whole.example(2, size),
            whole.dimensions(dynamic),
            input_name=whole.input_name,
            output_names=["logits", "maps"],
            opset=opset,
        )
    except ArtefactError:
        raise
    except Exception as error:  # the exporter raises what any of its passes meets
        raise refusal(error, size, dynamic=dynamic) from error
    describe_model(
        found, f"{whole.meaning}. Height and width: {taken}.", whole.described(taken, made_by)
    )
    data = model_bytes(found)

    def open_file() -> _Run | None:
        session = open_session(data)
        if session is None:
            return None

        def run(images: Tensor) -> tuple[Tensor, Tensor]:
            logits, maps = session.run(None, {whole.input_name: images.numpy()})
            return torch.from_numpy(logits), torch.from_numpy(maps)

        return run

    return _compare_and_write(whole, data, open_file, path, size, dynamic=dynamic)


def export_torchscript(
    model: LPCAMModel,
    path: Path,
    *,
    dynamic: bool = True,
    size: tuple[int, int] | None = None,
    made_by: Mapping[str, Any] | None = None,
) -> ExportParity:
    """Write a model as traced TorchScript, for ``torch.jit.load`` or LibTorch, and compare it.

    Torch 2.15 calls TorchScript deprecated; ONNX or :func:`export_program` will last longer. Its
    format keeps the names of parameters in a pickle, which ``torch.jit.load`` reads with a reader
    of its own that runs no Python; sample inputs and source paths are left out. The metadata are
    the archive's extra file ``lpcam.json``. Arguments, inputs, outputs and errors as those of
    :func:`export_onnx`.
    """
    size, dynamic = _size(model, size, dynamic)
    whole = _File(model)
    taken = sides(size, dynamic=dynamic, multiple=model.multiple)
    extra = whole.extra_file(taken, made_by, "TorchScript")
    try:
        with quiet(), torch.no_grad():
            trace: Any = torch.jit.trace
            traced = trace(whole, whole.example(2, size), check_trace=False)
            buffer = io.BytesIO()
            torch.jit.save(traced, buffer, _extra_files=extra)
    except Exception as error:  # tracing runs the whole network
        raise refusal(error, size, dynamic=dynamic) from error
    data = _without(buffer.getvalue(), (".debug_pkl", "/traced_inputs.pkl"), ("/traced_inputs/",))

    def open_file() -> _Run:
        load: Any = torch.jit.load
        loaded: _Run = load(io.BytesIO(data))
        return loaded

    return _compare_and_write(whole, data, open_file, path, size, dynamic=dynamic)


def export_program(
    model: LPCAMModel,
    path: Path,
    *,
    dynamic: bool = True,
    size: tuple[int, int] | None = None,
    made_by: Mapping[str, Any] | None = None,
) -> ExportParity:
    """Write a model as a torch.export program, .pt2, for ``torch.export.load``, and compare it.

    Of the format, sample inputs alone would be pickled; they are left out, and weights that torch
    would pickle are refused. The metadata are the archive's extra file ``lpcam.json``. Arguments,
    inputs, outputs and errors as those of :func:`export_onnx`.
    """
    size, dynamic = _size(model, size, dynamic)
    whole = _File(model)
    taken = sides(size, dynamic=dynamic, multiple=model.multiple)
    extra = whole.extra_file(taken, made_by, "torch.export")
    shapes = dict.fromkeys(whole.dimensions(dynamic), torch.export.Dim.AUTO)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(
                whole, (whole.example(2, size),), dynamic_shapes=(shapes,), strict=False
            )
            program._example_inputs = None
            _without_ceil(program.graph)
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
            buffer = io.BytesIO()
            torch.export.save(program, buffer, extra_files=extra)
    except Exception as error:  # as the exporter to ONNX
        raise refusal(error, size, dynamic=dynamic) from error
    data = buffer.getvalue()
    _refuse_pickles(data, path)

    def open_file() -> _Run:
        loaded: _Run = torch.export.load(io.BytesIO(data)).module()
        return loaded

    return _compare_and_write(whole, data, open_file, path, size, dynamic=dynamic)


_Run = Callable[[Tensor], tuple[Tensor, Tensor]]


class _File(nn.Module):
    """A model with the inputs that its files have."""

    def __init__(self, model: LPCAMModel) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        preprocessing = model.preprocessing
        self.pixels = FromPixels(preprocessing) if preprocessing else None
        self.channels = model.channels
        self.input_name = "image" if preprocessing else "images"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.model(self.normalised(images))
        return found

    def normalised(self, images: Tensor) -> Tensor:
        found: Tensor = images if self.pixels is None else self.pixels(images)
        return found

    def tops(self, images: Tensor) -> Tensor:
        """(B, N, 1, 1): the maxima by which maps are divided."""
        images = self.normalised(images)
        size = (images.shape[-2], images.shape[-1]) if self.model.enlarge else None
        features = self.model.backbone(images)
        maps = self.model.head.activation(
            features[0] if isinstance(features, tuple) else features, size
        )
        return maps.amax((-2, -1), keepdim=True)

    def example(self, count: int, size: tuple[int, int]) -> Tensor:
        images = torch.from_numpy(photograph(count, size, self.channels))
        if self.pixels is not None:
            return images
        return (images.permute(0, 3, 1, 2).float() / 127.5 - 1.0).contiguous()

    def dimensions(self, dynamic: bool) -> dict[int, str]:
        first = 1 if self.pixels is not None else 2
        return {0: "batch", **({first: "height", first + 1: "width"} if dynamic else {})}

    @property
    def meaning(self) -> str:
        """Inputs and outputs in words."""
        taken = (
            "image: uint8 RGB (batch, height, width, 3)"
            if self.pixels is not None
            else f"images: float32, normalised (batch, {self.channels}, height, width)"
        )
        grid = "height, width" if self.model.enlarge else "feature grid"
        return (
            f"{taken}. logits: float32 (batch, classes). maps: float32 (batch, classes, {grid}), "
            f"{'from 0 to 1' if self.model.head.normalize else 'at least 0'}"
        )

    def described(self, taken: str, made_by: Mapping[str, Any] | None) -> dict[str, Any]:
        preprocessing = self.model.preprocessing
        return {
            "classes": list(self.model.classes),
            "preprocessing": asdict(preprocessing) if preprocessing else None,
            "sides": taken,
            "normalize": self.model.head.normalize,
            "versions": versions(),
            "made_by": {**self.model.made_by, **(made_by or {})},
        }

    def extra_file(
        self, taken: str, made_by: Mapping[str, Any] | None, kind: str
    ) -> dict[str, str]:
        texts = json_texts({"meaning": self.meaning, **self.described(taken, made_by)}, kind)
        return {METADATA: "{" + ", ".join(f'"{key}": {text}' for key, text in texts.items()) + "}"}


def _size(
    model: LPCAMModel, size: tuple[int, int] | None, dynamic: bool
) -> tuple[tuple[int, int], bool]:
    """Of the traced image, and whether others are taken too."""
    fixed = model.fixed_size
    if size is None:
        size = fixed or _rounded(TRACED_SIZE, model.multiple)
    check_size(size)
    if (fixed is not None and size != fixed) or size != _rounded(size, model.multiple):
        wanted = (
            f"images of {fixed[0]} x {fixed[1]} pixels alone"
            if fixed
            else f"sides that are multiples of {model.multiple}"
        )
        raise ArtefactError(f"size {size[0]} x {size[1]} does not do: the model takes {wanted}")
    return size, dynamic and fixed is None


def _rounded(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


def _compare_and_write(
    whole: _File,
    data: bytes,
    open_file: Callable[[], _Run | None],
    path: Path,
    size: tuple[int, int],
    *,
    dynamic: bool,
) -> ExportParity:
    advice = "give dynamic=False and the size of your images" if dynamic else "try another export"
    sizes = tuple(
        _rounded(each, whole.model.multiple) for each in tried_sizes(size, dynamic=dynamic)
    )
    logit_errors, map_errors = [0.0], [0.0]
    try:
        run = open_file()
        for count, tried in enumerate(sizes if run is not None else (), start=1):
            assert run is not None
            images = whole.example(count, tried)
            with torch.no_grad():
                expected, tops = whole(images), whole.tops(images)
                found = run(images)
            shapes = [tuple(each.shape) for each in found]
            if shapes != [tuple(each.shape) for each in expected]:
                raise ArtefactError(
                    f"the file gives {shapes[0]} and {shapes[1]} for {tuple(images.shape)}, the "
                    f"model {tuple(expected[0].shape)} and {tuple(expected[1].shape)}; {path} is "
                    f"not written; {advice}"
                )
            logits, maps = ((f - e).abs() for f, e in zip(found, expected, strict=True))
            if whole.model.head.normalize is not None:
                maps = maps * (tops / (tops + COSINE_ERROR / MAP_ERROR))
            logit_error = float(logits.max() / expected[0].abs().max().clamp_min(NORM_EPSILON))
            map_error = float(maps.max())
            # of NaN every comparison is false
            if not (logit_error <= LOGIT_ERROR and map_error <= MAP_ERROR):
                raise ArtefactError(
                    f"the file differs from the model at {tried[0]} x {tried[1]} pixels: logits by "
                    f"{logit_error:.2g} of the largest, maps by {map_error:.2g} (at most "
                    f"{LOGIT_ERROR} and {MAP_ERROR} wanted); {path} is not written; {advice}"
                )
            logit_errors.append(logit_error)
            map_errors.append(map_error)
    except ArtefactError:
        raise
    except Exception as error:  # the runtimes' errors have no base class of their own
        raise ArtefactError(
            f"the exported model cannot be run ({' '.join(str(error).split()):.300}); {path} is "
            f"not written; {advice}"
        ) from error
    write_bytes(path, data)
    if run is None:
        return ExportParity(path, dynamic, False, (), None, None)
    return ExportParity(path, dynamic, True, sizes, max(logit_errors), max(map_errors))


def _without_ceil(graph: torch.fx.Graph) -> None:
    """Write ceil(a / b) of sizes, which timm's "same" padding has, as -(-a // b).

    Of the two, torch 2.15 can write the second alone.
    """
    for node in list(graph.nodes):
        quotient = node.args[0] if node.target is math.ceil else None
        if not isinstance(quotient, torch.fx.Node) or quotient.target is not operator.truediv:
            continue
        found: Any = quotient.args[0]
        steps: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...] = (
            (operator.neg, ()),
            (operator.floordiv, quotient.args[1:]),
            (operator.neg, ()),
        )
        with graph.inserting_before(node):
            for function, others in steps:
                values = [getattr(each, "meta", {}).get("val", each) for each in (found, *others)]
                found = graph.call_function(function, (found, *others))
                found.meta["val"] = function(*values)
        node.replace_all_uses_with(found)
        graph.erase_node(node)
        if not quotient.users:
            graph.erase_node(quotient)


def _without(data: bytes, endings: tuple[str, ...], folders: tuple[str, ...]) -> bytes:
    """An archive without some of its members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            if not name.endswith(endings) and not any(folder in name for folder in folders):
                new.writestr(zipfile.ZipInfo(name), old.read(name))
    return buffer.getvalue()


def _refuse_pickles(data: bytes, path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            pickled = name.endswith((".pkl", ".pt")) and bool(content)
            if name.endswith("_config.json"):
                entries = json.loads(content).get("config", {}).values()
                pickled = any(entry.get("use_pickle") for entry in entries)
            if pickled:
                raise ArtefactError(
                    f"torch would pickle a part of this model ({name}), which this package does "
                    f"not write; {path} is not written; export to ONNX instead"
                )


# -- Small things --------------------------------------------------------------------------------


def _bias(source: Classifier | WrappedModel) -> Tensor | None:
    return source.bias if isinstance(source, WrappedModel) else source.head.bias


def _digest(module: nn.Module) -> str:
    """32 hex digits that change with any tensor of a module."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _pretrained_files(folder: str, revision: str | None) -> dict[str, Path]:
    if Path(folder).is_dir():
        return {name: Path(folder) / name for name in (CONFIG, WEIGHTS)}
    if folder.count("/") != 1 or folder.startswith((".", "/", "~")):
        raise ArtefactError(
            f"there is no folder {folder!r}, and it is no id of a hub's model, 'owner/name'"
        )
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - slow, and only needed here

    try:
        return {
            name: Path(hf_hub_download(folder, name, revision=revision))
            for name in (CONFIG, WEIGHTS)
        }
    except Exception as error:  # whatever the client or the network raises, one message serves
        raise ArtefactError(
            f"there is no folder {folder!r}, and the Hugging Face hub does not give a model of "
            f"that name: {' '.join(str(error).split()):.300}"
        ) from error
