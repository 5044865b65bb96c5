"""Examples of the package's docstrings are tests; those that need a missing extra are skipped."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip an example that cannot import an optional dependency."""
    try:
        return (yield)
    except doctest.UnexpectedException as failure:
        error: Any = failure.exc_info[1]
        while error is not None:
            if isinstance(error, ImportError):
                pytest.skip(str(error))
            error = error.__context__
        raise
