"""Released files that the methods of this package recognise."""

from __future__ import annotations

from lpcam.classifiers.settings import RELEASED
from lpcam.hosts.base import HOSTS
from lpcam.refine.base import REFINEMENTS, LearnedRefinement
from lpcam.segmentation import segmenter
from lpcam.training.released import Released


def released_kinds() -> list[Released]:
    """All kinds of released files, each declared beside the settings of its method."""
    found = [*RELEASED, *segmenter.RELEASED]
    for host in HOSTS.values():
        found += host.released()
    for refinement in REFINEMENTS.values():
        if isinstance(refinement, LearnedRefinement):
            found += refinement.released()
    return found
