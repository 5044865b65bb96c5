"""Registries: methods of one kind, found by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from lpcam.runtime.errors import LpcamError

T = TypeVar("T")


class RegistryError(LpcamError, KeyError):
    """A name is not registered, or is registered twice."""

    # KeyError would put the message in quotes.
    __str__ = Exception.__str__


class Registry(Mapping[str, T], Generic[T]):
    """Methods of one kind by name: the package's, then entry points; imported when needed."""

    def __init__(self, kind: str, group: str, own: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._own = own
        self._loaded: dict[str, T] = {}

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        found = {name: EntryPoint(name, value, self.group) for name, value in self._own.items()}
        for point in sorted(entry_points(group=self.group)):
            if point.name in found:
                raise RegistryError(
                    f"the {self.kind} {point.name!r} is registered twice: "
                    f"{found[point.name].value} and {point.value}; uninstall one of them or "
                    "rename it"
                )
            found[point.name] = point
        return found

    def __getitem__(self, name: str) -> T:
        if name not in self._points:
            raise RegistryError(f"there is no {self.kind} {name!r}; there are {', '.join(self)}")
        if name not in self._loaded:
            self._loaded[name] = self._points[name].load()
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._points

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)
