"""LPCAM as a layer: a backbone and a head that gives logits and class maps in one pass."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from lpcam.classifiers.classifier import RANDOM, BackboneSpec, Classifier, Preprocessing, build
from lpcam.classifiers.early_layers import Tap
from lpcam.classifiers.tracing import device_of, evaluation_mode
from lpcam.classifiers.wrapped import WrappedModel, wrap
from lpcam.explain.explainer import Explainer
from lpcam.formats.models.onnx import (
    TRACED_SIZE,
    ExportModule,
    ExportParity,
    Outputs,
    rounded_up,
    write_onnx,
)
from lpcam.method.early import EarlyPrototypes
from lpcam.method.extractors import LPCAM
from lpcam.method.head import LPCAMHead, Normalize
from lpcam.runtime.errors import ArtefactError, ClassifierError
from lpcam.runtime.files import (
    read_json,
    read_tensors,
    tensor_bytes,
    write_bytes,
    write_json,
    write_tensors,
)
from lpcam.runtime.versions import versions

_MAP_ERROR = 1e-4  # accepted difference of an exported file's maps, whose values are at most 1
_COSINE_ERROR = 1e-5  # accepted rounding error, which a division by a tiny maximum magnifies
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_FORMAT, _KIND = 1, "LPCAMModel"
_OPTIONS = ("classes", "enlarge", "channels", "multiple", "made_by")  # as a folder keeps them


class LPCAMModel(nn.Module):
    """A backbone with an LPCAM head: images to logits and maps, at one scale without flip.

    Args:
        backbone: normalised images (B, c, H, W) to features (B, C, h, w), or to those features
            and the vectors (B, C) that the head's linear layer reads instead of their mean.
        head: the head for these features.
        classes: N class names; None: "0", "1", ...
        preprocessing: normalisation of RGB for exported files, which then take uint8 images;
            :meth:`forward` never applies it.
        enlarge: False leaves maps on the feature grid instead of enlarging them to the images.
        channels: c, the channels of the images.
        multiple: number that both sides of an image must be multiples of.
        fixed_size: the only (H, W) that the backbone takes, or None if it takes several.
        spec: how to build the backbone of a classifier again.
        made_by: provenance, as JSON values.
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
        self.channels, self.multiple, self.fixed_size = channels, multiple, fixed_size
        self.spec = spec
        self.made_by = dict(made_by or {})
        early = head.early
        root = backbone.model if isinstance(backbone, _WrappedFeatures) else backbone
        root = backbone.classifier.backbone if isinstance(backbone, _Features) else root
        self._tap = None if early is None else Tap(root, early.layers)
        if len(self.classes) != count:
            raise ValueError(f"got {len(self.classes)} names for {count} classes")
        self.eval()
        if self._tap is not None:  # sees how the layers are read, before sizes become symbols
            like = next(backbone.parameters(), head.weight)
            with torch.no_grad():
                size = fixed_size or rounded_up(TRACED_SIZE, multiple)
                self.features(like.new_zeros(1, channels, *size))

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

        Its maps equal those of that LPCAM with ``scales=(1.0,)`` and ``flip=False``; its logits
        equal those of its classifier. Without a preprocessing it takes that of the classifier.

        Raises NotFittedError if it has no prototypes, PrototypeError if they belong to another
        classifier, and ClassifierError if a function, which cannot be copied, gives the map.
        """
        head = LPCAMHead.from_lpcam(lpcam, normalize=normalize)
        source = lpcam.source_
        options: dict[str, Any]
        if isinstance(source, WrappedModel):
            backbone: nn.Module = _WrappedFeatures(source)
            options = {"channels": source.channels_in, "multiple": source.multiple}
            options["fixed_size"] = source.fixed_size
        else:
            backbone = _Features(copy.deepcopy(source))
            options = {"spec": source.spec}
            preprocessing = preprocessing or source.preprocessing
        made_by = {
            "fingerprint": lpcam.prototypes_.fingerprint,
            "method": "LPCAM-E" if lpcam.early_ else "LPCAM" if lpcam.with_context else "LPCAM-F",
            "settings": lpcam.prototypes_.made_by.get("settings"),
            "versions": versions(),
        }
        options |= {"classes": source.classes, "enlarge": enlarge, "made_by": made_by}
        return cls(backbone, head, preprocessing=preprocessing, **options)

    @classmethod
    def of_explainer(cls, explainer: Explainer, classifier: Classifier) -> Self:
        """A classifier with the prototypes of its explainer."""
        settings = explainer.settings.model_dump(mode="json")
        return cls(
            _Features(classifier),
            LPCAMHead(
                classifier.weight, explainer.vectors, classifier.head.bias, early=explainer.early
            ),
            classes=classifier.classes,
            preprocessing=classifier.preprocessing,
            spec=classifier.spec,
            made_by={**explainer.made_by, "settings": settings},
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, c, H, W) to logits (B, N) and maps (B, N, H, W)."""
        size = (images.shape[-2], images.shape[-1]) if self.enlarge else None
        features, pooled, layers = self.features(images)
        found: tuple[Tensor, Tensor] = self.head(features, size, pooled, layers)
        return found

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """The feature map, the vectors of the linear layer where they are not its mean, and the
        maps of early layers where there are some."""
        found = self.backbone(images)
        size = images.shape[-2], images.shape[-1]
        layers = [] if self._tap is None else self._tap.take(size)
        return (*(found if isinstance(found, tuple) else (found, None)), layers)

    def save_pretrained(
        self, folder: Path | str, *, licence: str | None = None, training_data: str | None = None
    ) -> None:
        """Write ``config.json``, ``model.safetensors`` and a model card; files are replaced.

        Args:
            licence: licence of the weights, in the hub's spelling, e.g. ``"apache-2.0"``.
            training_data: description of the images behind the classifier and the prototypes.
        """
        folder = Path(folder)
        wrapped = self.backbone.wrapped if isinstance(self.backbone, _WrappedFeatures) else None
        config = {
            "format": _FORMAT,
            "kind": _KIND,
            "library_name": "lpcam",
            "backbone": asdict(self.spec) if self.spec else None,
            "wrapped": wrapped is not None,
            "pool": wrapped.pool if wrapped else None,
            "new_head": wrapped.new_head if wrapped else False,
            "preprocessing": asdict(self.preprocessing) if self.preprocessing else None,
            "normalize": self.head.normalize,
            "bias": self.head.bias is not None,
            "early": early.described() if (early := self.head.early) else None,
            "fixed_size": self.fixed_size,
            "dtype": str(self.head.weight.dtype).removeprefix("torch."),
            "fingerprints": self._fingerprints(),
            "versions": versions(),
            **{name: getattr(self, name) for name in _OPTIONS},
        }
        card = _card(self, folder.resolve().name, licence, training_data)
        write_tensors(folder / WEIGHTS, self.state_dict(), {"kind": _KIND})
        write_bytes(folder / CARD, card.encode())
        write_json(folder / CONFIG, config)  # last: only a complete folder has it

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        backbone: nn.Module | WrappedModel | None = None,
        revision: str | None = None,
    ) -> Self:
        """Read what :meth:`save_pretrained` wrote, without executing any code of the folder.

        Args:
            folder: a folder, or the id ``"owner/name"`` of a model on the Hugging Face hub, which
                is downloaded.
            backbone: the architecture, with any weights, if the folder does not describe it: the
                model that LPCAM was given (or ``wrap`` of it, if layers were named), or the module
                that gives the features. A copy takes the weights and dtype of the folder; the
                result is on the device of ``backbone``.
            revision: branch, tag or commit of a model on the hub.

        Raises ArtefactError if a file is missing, damaged, changed, of a newer version, or does not
        fit, or the hub cannot be reached, and ClassifierError if the folder does not describe its
        backbone and none is given, or the feature map is not found in the given one.
        """
        path = Path(folder)
        if not path.is_dir():
            try:
                files = [CONFIG, WEIGHTS]
                path = Path(snapshot_download(str(folder), revision=revision, allow_patterns=files))
            except Exception as error:  # the client and the network raise errors of many kinds
                raise ArtefactError(
                    f"there is no folder {str(folder)!r}, and the Hugging Face hub does not give a "
                    f"model of that name ('owner/name'): {' '.join(str(error).split()):.300}"
                ) from error
        config = read_json(path / CONFIG)
        written = (config.get("kind"), config.get("format")) if isinstance(config, dict) else ()
        if written != (_KIND, _FORMAT):
            raise ArtefactError(
                f"{path / CONFIG} describes {written}, this version reads {(_KIND, _FORMAT)}; give "
                "a folder that save_pretrained wrote, or install the version that wrote it"
            )
        state, _ = read_tensors(path / WEIGHTS)
        try:
            model = cls._from_config(config, backbone, state)
            found, expected = model._fingerprints(), dict(config["fingerprints"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ArtefactError(
                f"{folder} does not fit its own description "
                f"({' '.join(str(error).split()):.300}); download or make it again"
            ) from error
        for what, value in found.items():
            if value != expected.get(what):
                raise ArtefactError(
                    f"the {what} in {folder} is {value}, but its {CONFIG} was written for "
                    f"{expected.get(what)}; download or make it again"
                )
        return model

    @classmethod
    def _from_config(
        cls,
        config: Mapping[str, Any],
        given: nn.Module | WrappedModel | None,
        state: Mapping[str, Tensor],
    ) -> Self:
        normal: dict[str, Any] = {
            key: tuple(value) for key, value in (config["preprocessing"] or {}).items()
        }
        spec = BackboneSpec(**config["backbone"]) if config["backbone"] else None
        device = torch.device("cpu")
        if given is not None:
            device = given.device if isinstance(given, WrappedModel) else device_of(given)
            backbone = _given_backbone(given, config, state)
        elif spec is None or not normal:
            raise ClassifierError(
                "the folder does not describe this model's backbone; build it and give it: "
                "from_pretrained(folder, backbone=module)"
            )
        else:
            backbone = _Features(build(spec, config["classes"], weights=RANDOM, **normal))
        named = {n.removeprefix("head.").replace("_", "."): values for n, values in state.items()}
        early = config.get("early")
        head = LPCAMHead(
            state["head.weight"],
            state["head.vectors"],
            state.get("head.bias"),
            normalize=config["normalize"],
            early=None if early is None else EarlyPrototypes.of_file(named, early),
        )
        model = cls(
            backbone,
            head,
            preprocessing=Preprocessing(**normal) if normal else None,
            fixed_size=tuple(config["fixed_size"]) if config["fixed_size"] else None,
            spec=spec,
            **{name: config[name] for name in _OPTIONS},
        ).to(device, getattr(torch, config["dtype"]))
        model.load_state_dict(state, strict=True)
        return model

    def _fingerprints(self) -> dict[str, str]:
        found = {"backbone": _digest(self.backbone), "head": _digest(self.head)}
        if isinstance(self.backbone, _WrappedFeatures):
            found["map"] = str(self.backbone)
        return found


def _digest(module: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _card(model: LPCAMModel, name: str, licence: str | None, training_data: str | None) -> str:
    header = {
        "library_name": "lpcam",
        "pipeline_tag": "image-classification",
        "tags": ["lpcam", "class-activation-map", "weakly-supervised-segmentation"],
        **({} if licence is None else {"license": licence}),
    }
    expected = "as the backbone expects them"
    if normal := model.preprocessing:
        expected = f"RGB from 0 to 1, minus {list(normal.mean)}, divided by {list(normal.std)}"
    text = (resources.files("lpcam.formats.models") / "card.md").read_text("utf-8")
    return text.format(
        header=yaml.safe_dump(header, allow_unicode=True),
        name=name,
        architecture=model.spec.name if model.spec else type(model.backbone).__name__,
        method=model.made_by.get("method", "LPCAM"),
        count=len(model.classes),
        channels=model.channels,
        classes="\n".join(f"- `{each.replace('`', ' ')}`" for each in model.classes),
        expected=expected,
        given="" if model.spec else ", backbone=your_backbone",
        data=training_data or "Not stated.",
        licence=licence or "Not stated.",
        settings=json.dumps(model.made_by.get("settings"), indent=2, sort_keys=True),
    )


class _Features(nn.Module):
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)


class _WrappedFeatures(nn.Module):
    """The feature map of a copy of a wrapped model, and its class token, as a traceable module.

    What the map does not need is removed, except for modules whose weights are in ``state``.
    """

    def __init__(self, wrapped: WrappedModel, state: Collection[str] = ()) -> None:
        super().__init__()
        self.wrapped = copy.deepcopy(wrapped)
        self.model = self.wrapped.core
        self.source = self.wrapped.map_layer
        self.kept: list[Any] = []
        layer = self.source.layer
        if isinstance(layer, nn.Module):
            layer.register_forward_hook(self._keep)  # a method: copies of this module copy it too
        elif all(getattr(layer, "__self__", None) is not module for module in self.model.modules()):
            raise ClassifierError(
                "the feature map of this model is given by a function, which cannot be copied; "
                "give the layer instead: LPCAM(model, target_layer='name of the layer')"
            )
        with evaluation_mode(self.model):
            self._remove_unused(state)

    def __str__(self) -> str:
        """Where the map comes from, in words; part of a saved model's fingerprints."""
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
        self.kept.clear()
        if not isinstance(layer, nn.Module):
            return self.source.batch_first(layer(images))
        self.model(images)
        raw = self.source.batch_first(self.kept[self.source.number])
        self.kept.clear()
        return raw

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.kept.append(output)

    def _remove_unused(self, state: Collection[str]) -> None:
        """Remove modules that are not called before the map, if it stays the same without them."""
        size, generator = self.wrapped.probe_size, torch.Generator().manual_seed(0)
        images = torch.randn(1, self.wrapped.channels_in, *size, generator=generator)
        images, called = images.to(self.wrapped.device, self.wrapped.dtype), set[nn.Module]()

        def note(module: nn.Module, _: Any) -> None:
            if len(self.kept) <= self.source.number:
                called.add(module)

        with ExitStack() as hooks:
            for module in self.model.modules():
                hooks.enter_context(module.register_forward_pre_hook(note))
            expected = self._raw(images)
        modules = dict(self.model.named_modules())
        for name, module in modules.items():
            place, _, own = name.rpartition(".")
            saved = any(key.startswith(f"backbone.model.{name}.") for key in state)
            if saved or not module.state_dict() or not called.isdisjoint(module.modules()):
                continue
            setattr(modules[place], own, nn.Identity())
            with suppress(Exception):  # its weights may be read without a call of it
                if torch.equal(self._raw(images), expected):
                    continue
            setattr(modules[place], own, module)


def _given_backbone(
    given: nn.Module | WrappedModel, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> nn.Module:
    """The backbone of a saved model: a copy of the given module, with the same feature map."""
    if isinstance(given, nn.Module):
        if not config["wrapped"] or isinstance(given, _WrappedFeatures):
            return copy.deepcopy(given)
        example = None
        if config["fixed_size"]:
            example = torch.zeros(1, config["channels"], *config["fixed_size"])
        given = wrap(given, classes=config["classes"], pool=config["pool"], example=example)
    if config["new_head"] and not given.new_head:
        # a new head reads the mean of the map, whatever the model's own head reads
        given = given.with_head(state["head.weight"], state.get("head.bias"))
    return _WrappedFeatures(given, state)


def export_onnx(
    model: LPCAMModel,
    path: Path | str,
    *,
    dynamic: bool = True,
    size: tuple[int, int] | None = None,
) -> ExportParity:
    """Write a model as ONNX, after comparing the file with it in onnxruntime if installed.

    The input is ``image``, uint8 RGB (B, H, W, 3), if the model has a preprocessing, which is then
    part of the file; else ``images``, normalised float32 (B, c, H, W). The outputs are ``logits``
    (B, N) and ``maps`` (B, N, H, W), float32. An earlier file is replaced only if the comparison
    succeeds.

    Args:
        dynamic: whether the file takes images of any size from 32 pixels a side; otherwise only of
            ``size``. The batch has any size in both cases. Ignored for a model of one image size.
        size: height and width of the traced image, in pixels; None chooses one.

    Raises LpcamError without onnx or onnxscript, and ArtefactError if the network cannot be
    exported, or the file differs by more than 1e-4, is larger than 2 GiB, or cannot be written.
    """
    fixed = model.fixed_size
    if size is None:
        size = fixed or rounded_up(TRACED_SIZE, model.multiple)
    if (fixed is not None and size != fixed) or size != rounded_up(size, model.multiple):
        wanted = f"multiples of {model.multiple}" if fixed is None else f"{fixed[0]} x {fixed[1]}"
        raise ArtefactError(f"size {size[0]} x {size[1]} does not fit: the model takes {wanted}")
    return write_onnx(_LPCAMFile(model), path, dynamic=dynamic and fixed is None, size=size)


class _LPCAMFile(ExportModule):
    output = "maps"
    limit = _MAP_ERROR

    def __init__(self, model: LPCAMModel) -> None:
        super().__init__(model.preprocessing, model.channels, model.multiple)
        self.grid = "" if model.enlarge else "grid_"
        self.model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Outputs:
        found: Outputs = self.model(self.normalised(images))
        return found

    def error(self, images: Tensor, expected: Tensor, found: Tensor) -> float:
        # Rounding of a map that is hardly above zero before its normalisation counts less.
        difference = (found - expected).abs()
        if self.model.head.normalize is not None:
            images = self.normalised(images)
            size = (images.shape[-2], images.shape[-1]) if self.model.enlarge else None
            with torch.no_grad():
                features, *_ = self.model.features(images)
                top = self.model.head.activation(features, size).amax((-2, -1), keepdim=True)
            difference = difference * (top / (top + _COSINE_ERROR / _MAP_ERROR))
        return float(difference.max())

    def meaning(self) -> str:
        taken = "image: uint8 RGB (batch, height, width, 3)"
        if not self.takes_pixels:
            taken = f"images: float32, normalised (batch, {self.channels}, height, width)"
        grid = "height, width" if self.model.enlarge else "feature grid"
        return (
            f"{taken}. logits: float32 (batch, classes). maps: float32 (batch, classes, {grid}), "
            f"{'from 0 to 1' if self.model.head.normalize else 'at least 0'}"
        )

    def metadata(self) -> dict[str, Any]:
        preprocessing = self.model.preprocessing
        return {
            "classes": list(self.model.classes),
            "preprocessing": asdict(preprocessing) if preprocessing else None,
            "normalize": self.model.head.normalize,
            "versions": versions(),
            "made_by": self.model.made_by,
        }
