"""No refinement, and the one that a run chooses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lpcam.pipeline.recipe import RefineSection
from lpcam.refine.auto import NONE
from lpcam.refine.base import REFINEMENTS, Source


def test_none_leaves_the_maps_and_the_threshold_of_the_seeds() -> None:
    source, section = Source("LPCAM", "lpcam", Path(), "key", 0.37), RefineSection(method="none")
    assert section.refinement is NONE
    assert section.title("LPCAM") == "LPCAM + nothing"
    assert NONE.threshold(section, source) == 0.37
    job: Any = SimpleNamespace(section=section, source=source)
    assert NONE.key(job) == {}
    assert NONE.crf_use(section) is False
    picture: Any = SimpleNamespace(planes=torch.rand(2, 5, 6))
    assert NONE.refiner(job, Path(), Path())(picture) is picture.planes


def test_auto_is_told_with_the_settings_of_its_crf() -> None:
    section = RefineSection(method="auto")
    told = REFINEMENTS["auto"].described(section, SimpleNamespace())  # type: ignore[arg-type]
    assert told.keys() == {"method", "crf"} and told["method"] == "auto"
