"""Where the reference figures are: LPCAM_GOLDEN, else ../shared/golden beside the checkout."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "golden"


def load(name: str) -> dict[str, torch.Tensor]:
    """Tensors of one reference file; skips the test, with the reason, where it is missing."""
    with np.load(_path(name), allow_pickle=False) as archive:
        return {
            key: torch.from_numpy(archive[key]) for key in archive.files if _numeric(archive, key)
        }


def load_words(name: str) -> dict[str, list[str]]:
    """What is text in a reference file, a list of words each."""
    with np.load(_path(name), allow_pickle=False) as archive:
        return {
            key: archive[key].reshape(-1).tolist()
            for key in archive.files
            if not _numeric(archive, key)
        }


def load_json(name: str) -> Any:
    """Contents of one reference file of names, shapes or settings."""
    return json.loads(_path(name, "json").read_text("utf-8"))


def _numeric(archive: Mapping[str, np.ndarray], key: str) -> bool:
    return archive[key].dtype.kind != "U"


def _path(name: str, ending: str = "npz") -> Path:
    path = Path(os.environ.get("LPCAM_GOLDEN", DEFAULT)) / f"{name}.{ending}"
    if not path.is_file():
        pytest.skip(f"no reference figures at {path}; set LPCAM_GOLDEN to their folder")
    return path
