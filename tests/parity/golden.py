"""Where the reference figures are: LPCAM_GOLDEN, else ../shared/golden beside the checkout."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "golden"


def load(name: str) -> dict[str, torch.Tensor]:
    """Tensors of one reference file; skips the test, with the reason, where it is missing."""
    path = Path(os.environ.get("LPCAM_GOLDEN", DEFAULT)) / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"no reference figures at {path}; set LPCAM_GOLDEN to their folder")
    with np.load(path, allow_pickle=False) as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}
