"""Registries: methods of one kind, found by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast

from lpcam.runtime.errors import LpcamError

T = TypeVar("T")


class RegistryError(LpcamError):
    """A name is not registered, or is registered twice."""


class Registry(Mapping[str, T], Generic[T]):
    """Methods of one kind by name: those of the package, then those of entry points.

    A method is imported when it is first looked up, so a registry of heavy modules is cheap.

    Args:
        kind: what one entry is called in messages, such as ``host``.
        group: entry-point group in which other distributions announce their entries.
        own: entries of the package: name to ``module:attribute``.

    Example:
        >>> planets = Registry("planet", "example.planets", {"pi": "math:pi"})
        >>> planets["pi"] > 3, list(planets)
        (True, ['pi'])
    """

    def __init__(self, kind: str, group: str, own: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._sources: dict[str, str] = dict(own)
        self._loaded: dict[str, T] = {}
        for point in sorted(entry_points(group=group), key=_name):
            if point.name in self._sources:
                raise RegistryError(
                    f"the {kind} {point.name!r} is registered twice: {self._sources[point.name]} "
                    f"and {point.value}; uninstall one of them or rename it"
                )
            self._sources[point.name] = point.value

    def __getitem__(self, name: str) -> T:
        """The entry of a name.

        Raises:
            RegistryError: if there is none; the message lists those there are.
        """
        if name not in self._loaded:
            if name not in self._sources:
                raise RegistryError(
                    f"there is no {self.kind} {name!r}; there are {', '.join(self)}"
                )
            module, _, attribute = self._sources[name].partition(":")
            self._loaded[name] = cast(T, getattr(import_module(module), attribute))
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def _name(point: EntryPoint) -> Any:
    return point.name
