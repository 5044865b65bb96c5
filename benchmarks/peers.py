"""The relatives of CAM that need no training, from pytorch-grad-cam (extra ``peers``).

One thin adapter, so that they stand in one table with CAM and LPCAM: the same classifier, the same
feature map, maps as tensors. What each method computes is that package's own; see its documentation
and the articles it cites.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lpcam.runtime.errors import ClassifierError, DataError, LpcamError

PACKAGE = "pytorch_grad_cam"


PEERS: dict[str, str] = {
    "GradCAM": "GradCAM",
    "GradCAM++": "GradCAMPlusPlus",
    "LayerCAM": "LayerCAM",
    "XGradCAM": "XGradCAM",
    "HiResCAM": "HiResCAM",
    "EigenCAM": "EigenCAM",
    "EigenGradCAM": "EigenGradCAM",
    "ScoreCAM": "ScoreCAM",
}
"""Each name, and what pytorch-grad-cam calls the class. On the feature map before global average
pooling and a linear head, GradCAM and HiResCAM give CAM's own map. EigenCAM asks for no class.
ScoreCAM passes the network once for every channel and shows a progress bar of its own."""


Reshape = Callable[[Tensor], Tensor]


class Features(Protocol):
    """What has a feature map, a mean over it and linear rows: a Classifier, a WrappedModel."""

    @property
    def weight(self) -> Tensor: ...

    def features(self, images: Tensor, /) -> Tensor:
        """(B, c, H, W) to (B, C, h, w)."""
        ...


def peer_maps(
    name: str,
    model: nn.Module | Features,
    layer: nn.Module | str | None,
    images: Tensor,
    classes: Sequence[int],
    *,
    reshape: Reshape | None = None,
) -> Tensor:
    """Maps of one of :data:`PEERS`.

    The gradient reaches from the class score back to the layer and no further, which changes no map
    and saves the way through the backbone. The model comes back as it was: modes, gradients, hooks.

    Args:
        name: of :data:`PEERS`.
        model: a module that gives logits (B, N), with ``layer``; or, with ``layer`` None, a
            :class:`~lpcam.classifiers.classifier.Classifier` or anything that has its ``features``
            and
            ``weight``: the methods then work on that feature map, from one pass for all classes.
        layer: the module of ``model`` whose output is the feature map, or its dotted name.
        images: (B, c, H, W), as the model expects them.
        classes: the K classes (0-based) whose maps are wanted, of every image.
        reshape: of the layer's output to (B, C, h, w), where it is another, such as tokens.

    Returns:
        float32 (B, K, H, W) in [0, 1], on the device of ``images``, each map stretched to [0, 1] by
        pytorch-grad-cam and resized to the images. A map that is 0 everywhere stays 0.

    Raises:
        DataError: if the name is unknown, or images or classes do not fit.
        ClassifierError: if the layer is not in the model, or its output is no feature map.
        LpcamError: if pytorch-grad-cam is not installed.
    """
    if name not in PEERS:
        raise DataError(f"unknown method {name!r}; expected {', '.join(PEERS)}")
    if images.ndim != 4 or not len(images):
        raise DataError(f"images are {tuple(images.shape)}; expected (B, c, H, W), B >= 1")
    peer, targets = _package()
    # inference tensors could not be saved for a backward pass
    with torch.inference_mode(False), torch.enable_grad():
        given = images.clone() if images.is_inference() else images.detach()
        module, target = _place(model, layer)
        with _unchanged(module), _leaf(target, reshape):
            extractor = getattr(peer, PEERS[name])(
                model=module, target_layers=[target], reshape_transform=reshape
            )
            try:
                maps = [
                    torch.from_numpy(
                        extractor(given, [targets.ClassifierOutputTarget(index)] * len(images))
                    )
                    for index in map(int, classes)
                ]
            except (IndexError, ValueError) as error:
                raise ClassifierError(
                    f"{name} failed on {type(module).__name__} for classes {list(classes)}: "
                    f"{error}; the classes must be columns of its logits (B, N)"
                ) from error
            finally:
                extractor.activations_and_grads.release()
    if not maps:
        return images.new_zeros(len(images), 0, *images.shape[-2:], dtype=torch.float32)
    return torch.stack(maps, dim=1).float().nan_to_num(0.0).clamp(0, 1).to(images.device)


class _Tapped(nn.Module):
    """Feature map, mean and linear rows, with a place where the feature map can be tapped."""

    def __init__(self, source: Features) -> None:
        super().__init__()
        self.tap = nn.Identity()
        # A copy: pytorch-grad-cam clears the gradients of what it is given.
        self.rows = nn.Parameter(source.weight.detach().clone(), requires_grad=False)
        bias = getattr(source, "bias", None)
        self.bias = None if bias is None else bias.detach().clone()
        # Not as submodules, for the same reason.
        self._source = (source,)
        self._passed: tuple[Tensor, Tensor] | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, N)."""
        if self._passed is None or self._passed[0] is not images:
            with torch.no_grad():
                features = self._source[0].features(images)
            self._passed = (images, features)
        features = self.tap(self._passed[1])
        logits: Tensor = nn.functional.linear(features.mean((-2, -1)), self.rows, self.bias)
        return logits


def _place(
    model: nn.Module | Features, layer: nn.Module | str | None
) -> tuple[nn.Module, nn.Module]:
    """The module that gives logits, and the one whose output is tapped."""
    if layer is None:
        if not hasattr(model, "features") or not isinstance(getattr(model, "weight", None), Tensor):
            raise ClassifierError(
                f"{type(model).__name__} has no features(images) and weight (N, C) of its own; "
                "give the layer whose output is the feature map"
            )
        if getattr(model, "pool", "mean") != "mean":
            raise ClassifierError(
                f"the logits of this {type(model).__name__} are not of the mean of its feature "
                "map; give the module itself and the layer"
            )
        tapped = _Tapped(model)  # type: ignore[arg-type]  # as just looked up
        return tapped, tapped.tap
    if not isinstance(model, nn.Module):
        raise ClassifierError(
            f"a layer was given with a {type(model).__name__}, which is no module; give the module "
            "that the layer belongs to"
        )
    if isinstance(layer, str):
        try:
            layer = model.get_submodule(layer)
        except AttributeError as error:
            raise ClassifierError(
                f"{type(model).__name__} has no layer {layer!r} ({error}); "
                "dict(model.named_modules()) lists all"
            ) from error
    if all(layer is not module for module in model.modules()):
        raise ClassifierError(
            f"the layer {type(layer).__name__} is no part of the {type(model).__name__}; give one "
            "of model.modules() or its dotted name"
        )
    return model, layer


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Modes, gradients and what needs them come back as they were; inside nothing needs any."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient, needed in parameters:
            parameter.requires_grad_(needed)
            parameter.grad = gradient


@contextmanager
def _leaf(layer: nn.Module, reshape: Reshape | None) -> Iterator[None]:
    """Gradients begin at this layer's output, which must be a feature map."""

    def begin(_: nn.Module, __: Any, output: Any) -> Any:
        is_tensor = isinstance(output, Tensor)
        shaped = reshape(output) if is_tensor and reshape is not None else output
        if not is_tensor or shaped.ndim != 4:
            what = tuple(shaped.shape) if is_tensor else type(output).__name__
            raise ClassifierError(
                f"the layer {type(layer).__name__} gives {what}, not a feature map (B, C, h, w); "
                "choose another layer, or give reshape, which turns its output into one"
            )
        if not torch.is_grad_enabled():
            return output
        normal = output.clone() if output.is_inference() else output.detach()
        # The copy may be changed in place by what follows, a leaf may not.
        return normal.requires_grad_().clone()

    handle = layer.register_forward_hook(begin)
    try:
        yield
    finally:
        handle.remove()


def _package() -> tuple[Any, Any]:
    try:
        return (
            importlib.import_module(PACKAGE),
            importlib.import_module(f"{PACKAGE}.utils.model_targets"),
        )
    except ImportError as error:
        raise LpcamError(
            f"these methods are pytorch-grad-cam's ({error}): pip install 'lpcam[peers]'"
        ) from error
