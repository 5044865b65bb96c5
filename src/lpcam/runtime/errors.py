"""The errors of the package: each names what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any


class LpcamError(Exception):
    """Base class of the errors of this package."""


class DataError(LpcamError):
    """Images, labels, lists or masks that do not fit together."""


class BatchError(DataError, ValueError):
    """A batch of images and labels that cannot be used, or has more than one reading."""


class ImageError(DataError):
    """One image file that cannot be read; a run skips the image and lists it."""


class RecipeError(LpcamError):
    """A recipe with an unknown key, a wrong value or a newer version."""


class ClassifierError(LpcamError):
    """A backbone, its weights or its features that cannot serve as a classifier here."""


class PrototypeError(LpcamError):
    """Prototypes that cannot be made, or that belong to another classifier."""


class ArtefactError(LpcamError):
    """A file written by an earlier step that is damaged or was made from something else."""


class NotFittedError(LpcamError, ValueError, AttributeError):
    """An extractor that is called before ``fit`` or ``load``; bases as in scikit-learn."""


def shortened(entries: Sequence[str], most: int = 5) -> str:
    """The first of some entries, and the number of the others, for a message."""
    more = f" and {len(entries) - most} more" if len(entries) > most else ""
    return ", ".join(entries[:most]) + more


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Error text that suggests the most similar known name; empty if none is similar."""
    folded = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f" (did you mean {folded[near[0]]!r}?)" if near else ""


def import_extra(module: str, extra: str, need: str) -> Any:
    """Import a module of an extra; LpcamError with ``need`` if it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise LpcamError(f"{need} ({error}): pip install 'lpcam[{extra}]'") from error
