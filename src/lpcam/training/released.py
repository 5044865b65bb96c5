"""Files of released programs: recognised by the names of their tensors, which get our names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lpcam.runtime.errors import ArtefactError, shortened

PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that parallel training and compilation put before every name, in any nesting."""
COUNTER = "num_batches_tracked"
"""Counters of batch norms, which files of old torch versions lack and nothing reads."""
WIDERESNET38 = r"(?=(?:conv1a|b\d(?:_\d)?|bn7)\.)"
"""Pattern of the names of the backbone WideResNet-38, which are ours too."""
RESNET50 = r"resnet50\."  #: Pattern of the names of the backbone ResNet-50, which are timm's too.
RESNET50_COPIES = r"stage\d\.|backbone\.|newly_added\."
"""Pattern of the names under which files of that backbone hold the same tensors again."""


@dataclass(frozen=True)
class Released:
    """A kind of file that a released program writes."""

    title: str  #: Its contents, for messages.
    section: str  #: Section of a recipe whose key ``trained`` takes the converted file.
    marks: tuple[str, ...]  #: Names in all files of this kind; other kinds lack at least one.
    names: Sequence[tuple[str, str]]  #: Patterns of name prefixes, and what replaces them.
    build: Callable[[Sequence[str]], Any]
    """Makes the untrained network, whose ``save`` writes the file, from class names."""
    classes: Callable[[Mapping[str, Tensor]], int] | None = None  #: Number of classes of a file.
    dimensions: Mapping[str, int] = field(default_factory=dict)
    """Number of axes of tensors that tell kinds of the same names apart."""
    left_out: str | None = None  #: Pattern of name prefixes to ignore, such as copies.
    adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict  #: Changes values after names.
    ours: tuple[str, ...] = ()  #: Name prefixes of our network that no released file has.

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state dict is of this kind."""
        return all(name in state for name in self.marks) and all(
            name in state and state[name].ndim == count for name, count in self.dimensions.items()
        )

    def load(self, network: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Load a state dict of this kind into our network; ArtefactError lists misfits."""
        ignored = self.left_out
        kept = {k: t for k, t in state.items() if ignored is None or not re.match(ignored, k)}
        found = self.adapt({self._renamed(name): tensor for name, tensor in kept.items()})
        own = network.state_dict()
        needed = [name for name in own if not name.startswith(self.ours)]
        problems = {
            "missing": [n for n in needed if n not in found and not n.endswith(COUNTER)],
            "unknown": [name for name in found if name not in own],
            "of another shape": [
                f"{name} {tuple(t.shape)}, expected {tuple(own[name].shape)}"
                for name, t in found.items()
                if name in own and own[name].shape != t.shape
            ],
            "not float32": [
                f"{name} {t.dtype}"
                for name, t in found.items()
                if t.dtype != torch.float32 and not name.endswith(COUNTER)
            ],
        }
        if any(problems.values()):
            raise ArtefactError(
                f"it looks like {self.title}, but tensors do not fit: "
                + "; ".join(
                    f"{kind}: {shortened(names)}" for kind, names in problems.items() if names
                )
            )
        network.load_state_dict({**own, **found})

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.names:
            renamed, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                return renamed
        return name


def without_prefixes(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A state dict without the `PREFIXES` that all its names share, and what was removed."""
    found, removed = dict(state), ""
    while found and (
        prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in found)), None)
    ):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        removed += prefix
    return found, removed


def recognised(state: Mapping[str, Tensor], kinds: Iterable[Released]) -> Released | None:
    """The kind of a state dict; None if it is none of them, ArtefactError if two fit."""
    found = [kind for kind in kinds if kind.fits(state)]
    if len(found) > 1:
        raise ArtefactError(
            f"its names are those of {' and of '.join(kind.title for kind in found)}; convert a "
            "file of one network, or choose one by --prefix"
        )
    return found[0] if found else None
