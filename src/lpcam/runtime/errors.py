"""The errors of the package: each names what was given, what was expected and what to do."""

from __future__ import annotations


class LpcamError(Exception):
    """Base of every error that a user of the package is expected to meet."""


class DataError(LpcamError):
    """Images, labels, lists or masks that do not fit together."""


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


class NotFittedError(LpcamError):
    """An extractor that is called before ``fit`` or ``load``."""
