"""The versions that every artefact records."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

__version__ = "0.2.0"


@cache
def versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on, read without importing any."""
    names = ("torch", "torchvision", "timm", "numpy", "pillow")
    return {
        "lpcam": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }
