"""Pictures of an experiment, drawn from its first run: figures 1, 3 and 4 of the paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lpcam.pipeline.run_folder import RunFolder

PICTURES: dict[str, Callable[[RunFolder], Iterator[dict[str, Any]]]] = {}
