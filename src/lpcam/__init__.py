"""LPCAM: class activation maps that show the whole object, from a classifier as it is.

The names below are imported when they are first used, so that ``import lpcam`` itself is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lpcam.runtime.errors import (
    ArtefactError,
    BatchError,
    ClassifierError,
    DataError,
    ImageError,
    LpcamError,
    NotFittedError,
    PrototypeError,
    RecipeError,
)
from lpcam.runtime.versions import __version__

if TYPE_CHECKING:
    from lpcam.classifiers.classifier import Classifier
    from lpcam.classifiers.wrapped import wrap
    from lpcam.data.drawing import overlay
    from lpcam.evaluation.scoring import evaluate_masks
    from lpcam.explain.explainer import Explainer
    from lpcam.method import functional
    from lpcam.method.extractors import CAM, LPCAM
    from lpcam.method.head import LPCAMHead
    from lpcam.method.image_maps import ImageMaps
    from lpcam.method.prototypes import Prototypes
    from lpcam.method.seeds import seeds
    from lpcam.pipeline.recipe import load_recipe
    from lpcam.pipeline.run import run
    from lpcam.pipeline.run_folder import RunFolder

_MODULES = {
    "CAM": "lpcam.method.extractors",
    "LPCAM": "lpcam.method.extractors",
    "LPCAMHead": "lpcam.method.head",
    "Classifier": "lpcam.classifiers.classifier",
    "Explainer": "lpcam.explain.explainer",
    "ImageMaps": "lpcam.method.image_maps",
    "Prototypes": "lpcam.method.prototypes",
    "RunFolder": "lpcam.pipeline.run_folder",
    "evaluate_masks": "lpcam.evaluation.scoring",
    "load_recipe": "lpcam.pipeline.recipe",
    "overlay": "lpcam.data.drawing",
    "run": "lpcam.pipeline.run",
    "seeds": "lpcam.method.seeds",
    "wrap": "lpcam.classifiers.wrapped",
}
"""The module of each public name."""
__all__ = [
    "CAM",
    "LPCAM",
    "ArtefactError",
    "BatchError",
    "Classifier",
    "ClassifierError",
    "DataError",
    "Explainer",
    "ImageError",
    "ImageMaps",
    "LPCAMHead",
    "LpcamError",
    "NotFittedError",
    "PrototypeError",
    "Prototypes",
    "RecipeError",
    "RunFolder",
    "__version__",
    "evaluate_masks",
    "functional",
    "load_recipe",
    "overlay",
    "run",
    "seeds",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name == "functional":
        return import_module("lpcam.method.functional")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'lpcam' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
