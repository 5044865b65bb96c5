"""The versions that every artefact records."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

__version__ = "0.2.0"


def versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on, read without importing any."""
    names = ("torch", "torchvision", "timm", "numpy", "pillow")
    return {
        "lpcam": __version__,
        "python": platform.python_version(),
        **{name: _installed(name) for name in names},
    }


@cache
def _installed(name: str) -> str:
    return metadata.version(name)
