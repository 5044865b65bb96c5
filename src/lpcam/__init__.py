"""LPCAM: class activation maps that show the whole object, from a classifier as it is.

The names below are imported when first used, so that ``import lpcam`` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lpcam.version import __version__

if TYPE_CHECKING:
    from lpcam import functional
    from lpcam.classifier import Classifier
    from lpcam.explain.explainer import Explainer
    from lpcam.explain.maps import ImageMaps
    from lpcam.extract import CAM, LPCAM
    from lpcam.presets import LpcamSettings
    from lpcam.prototypes import Prototypes
    from lpcam.wrap import WrappedModel

__all__ = [
    "CAM",
    "LPCAM",
    "Classifier",
    "Explainer",
    "ImageMaps",
    "LpcamSettings",
    "Prototypes",
    "WrappedModel",
    "__version__",
    "functional",
]

_HOMES = {
    "CAM": "lpcam.extract",
    "LPCAM": "lpcam.extract",
    "Classifier": "lpcam.classifier",
    "Explainer": "lpcam.explain.explainer",
    "ImageMaps": "lpcam.explain.maps",
    "LpcamSettings": "lpcam.presets",
    "Prototypes": "lpcam.prototypes",
    "WrappedModel": "lpcam.wrap",
}


def __getattr__(name: str) -> Any:
    if name == "functional":
        return import_module("lpcam.functional")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lpcam' has no attribute {name!r}")
