"""Registries: methods of one kind, found by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from lpcam.runtime.errors import LpcamError

T = TypeVar("T")


class RegistryError(LpcamError, KeyError):
    """A name is not registered, or is registered twice."""

    # KeyError would put the message in quotes.
    __str__ = Exception.__str__


class Registry(Mapping[str, T], Generic[T]):
    """Methods of one kind by name: those of the package, then those of entry points.

    Entry points are read when the registry is first used, and a method is imported when it is
    first looked up, so a registry of heavy modules is cheap.

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
        self._own = own
        self._loaded: dict[str, T] = {}

    @cached_property
    def _sources(self) -> dict[str, str]:
        found = dict(self._own)
        for name, value in sorted((p.name, p.value) for p in entry_points(group=self.group)):
            if name in found:
                raise RegistryError(
                    f"the {self.kind} {name!r} is registered twice: {found[name]} and {value}; "
                    "uninstall one of them or rename it"
                )
            found[name] = value
        return found

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
