"""Networks saved in one file with architecture, weights and provenance."""

from __future__ import annotations

import copy
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor, nn

from lpcam.runtime.errors import ArtefactError, ClassifierError
from lpcam.runtime.files import digest_tensors, read_tensors, write_tensors

Module = TypeVar("Module", bound=nn.Module)


def shallow_copy(module: Module) -> Module:
    """Return a copy of a module whose submodules can be replaced, but are shared at first."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def load_weights(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load all tensors of a file into a network; ArtefactError if one does not fit."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ArtefactError(
            f"{path} does not fit its own description "
            f"({' '.join(str(error).split()):.200}...); make it again"
        ) from None


class SavedNetwork(nn.Module):
    """A network that is saved in one self-contained safetensors file."""

    kind: ClassVar[str]  #: Kind of the file, in its metadata.

    @property
    def stored(self) -> nn.Module:
        """The module whose weights are in the file."""
        return self

    def fingerprint(self, classes: Sequence[str] | None = None) -> str:
        """32 hex digits that change with weights, architecture, preprocessing and class names."""
        own = {} if classes is None else {"classes": list(classes)}
        return digest_tensors(self.stored.state_dict(), {**self._description(), **own})

    def save(self, path: Path, made_by: Mapping[str, Any] | None = None) -> None:
        """Write weights, architecture and provenance; ClassifierError without a description."""
        description = self._description()
        if isinstance(description.get("backbone"), str):  # the name of its type alone
            raise ClassifierError(
                "this network's backbone was passed in or folded, so a file cannot describe it; "
                "give lpcam.classifiers.classifier.build the name of a timm model instead"
            )
        own = {"kind": self.kind, "fingerprint": self.fingerprint(), "made_by": dict(made_by or {})}
        write_tensors(path, self.stored.state_dict(), {**own, **description})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file of :meth:`save`; an ArtefactError if it is damaged or not of this method."""
        state, metadata = read_tensors(path)
        if metadata.get("kind") != cls.kind:
            raise ArtefactError(
                f"{path} holds {metadata.get('kind')!r}, not a network of the kind {cls.kind!r}; "
                "give the file that its save method or a run wrote"
            )
        network = cls._described(metadata)
        load_weights(network.stored, state, path)
        return network

    def take(self, path: Path) -> None:
        """Load a file of ``lpcam convert``; ArtefactError names what differs from this network."""
        state, metadata = read_tensors(path)
        expected = json.dumps({"kind": self.kind, **self._description()})
        for key, wanted in json.loads(expected).items():
            if (found := metadata.get(key)) != wanted:
                raise ArtefactError(
                    f"{path} holds a network whose {key} is {found!r:.200}; the recipe has "
                    f"{wanted!r:.200}: change the recipe, or convert the file with its classes"
                )
        load_weights(self.stored, state, path)

    def folded(self) -> SavedNetwork:
        """A copy for inference with folded batch norms; the network itself if it has none."""
        return self

    @abstractmethod
    def _description(self) -> dict[str, Any]:
        """Arguments of :meth:`_described`, as JSON; a ``backbone`` of text cannot be saved."""

    @classmethod
    @abstractmethod
    def _described(cls, metadata: Mapping[str, Any]) -> Self:
        """A network with initial weights, built from the metadata of a file."""
