"""Choices about prototypes: those that a person or negative images keep, drop, move or name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import AliasChoices, ConfigDict, Field, TypeAdapter, ValidationError

from lpcam.method.reservoir import SideName
from lpcam.runtime.errors import PrototypeError
from lpcam.runtime.files import read_bytes
from lpcam.runtime.settings import Section

Action = Literal["keep", "drop", "context"]
"""Use a centre as a prototype, leave it out, or count a foreground centre as context."""
TOLD = {"keep": "kept", "drop": "dropped", "context": "moved to the context"}
HEADER = (
    "# Choices about prototypes (keep, drop, context, name, weight); lpcam.choices names them.\n"
)


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Choice:
    """What someone chose about one centre; None leaves what was fitted or chosen before."""

    class_name: Annotated[
        str,
        Field(validation_alias=AliasChoices("class", "class_name"), serialization_alias="class"),
    ]
    side: SideName  #: Side on which the centre was fitted.
    index: Annotated[int, Field(ge=0)]  #: Row of the centre in :class:`Centers`.
    action: Action | None = None
    name: Annotated[str, Field(max_length=60)] | None = None
    """Name of the part that it shows, such as "head"; an empty one takes the name away."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Factor of its weight among the prototypes of its class and side."""
    by: Literal["person", "negatives"] = "person"
    reason: str = ""

    @property
    def place(self) -> tuple[str, SideName, int]:
        """The centre that it is about."""
        return self.class_name, self.side, self.index

    @property
    def told(self) -> str:
        """What was chosen, by whom and why, in words."""
        words = [TOLD[self.action]] if self.action else []
        words += [f"named {self.name}"] if self.name else []
        words += [f"weighted {self.weight:g}"] if self.weight else []
        who = "a person" if self.by == "person" else "negatives"
        return f"{', '.join(words)} by {who}" + (f": {self.reason}" if self.reason else "")

    def as_json(self) -> dict[str, Any]:
        """The values that say something, as a file has them."""
        values: dict[str, Any] = _CHOICE.dump_python(self, by_alias=True, exclude_none=True)
        return values

    @classmethod
    def of_json(cls, values: Any) -> Choice:
        """The choice that :meth:`as_json` wrote; ValidationError if it is none."""
        return _CHOICE.validate_python(values)


_CHOICE = TypeAdapter(Choice)


class _File(Section):
    """A file of choices."""

    format: Literal[1] = 1
    prototypes: str  #: :attr:`Prototypes.digest` of those that the choices are about.
    choices: tuple[Choice, ...] = ()


def settled(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """One choice for each centre, sorted: later ones win, and a person's over those by negatives.

    Action, name and weight are settled apart; author and reason are those of the action.

    Example:
        >>> dropped = Choice("cow", "foreground", 3, "drop", reason="grass")
        >>> rejected = Choice("cow", "foreground", 3, "context", by="negatives")
        >>> settled([dropped, Choice("cow", "foreground", 3, name="leg"), rejected])[0].action
        'drop'
    """
    found: dict[tuple[str, SideName, int], Choice] = {}
    for choice in sorted(choices, key=lambda one: one.by == "person"):
        before = found.get(choice.place, choice)
        given = {
            n: v for n in ("action", "name", "weight") if (v := getattr(choice, n)) is not None
        }
        if choice.action is not None or before.action is None:
            given |= {"by": choice.by, "reason": choice.reason}
        found[choice.place] = replace(before, **given)
    return tuple(found[place] for place in sorted(found))


def format_choices(choices: Iterable[Choice], digest: str) -> str:
    """Text of a file of choices (YAML) about prototypes of a :attr:`Prototypes.digest`."""
    values = _File(prototypes=digest, choices=tuple(choices))
    made = values.model_dump(mode="json", by_alias=True, exclude_none=True)
    return HEADER + yaml.safe_dump(made, sort_keys=False, allow_unicode=True)


def parse_choices(text: str | bytes, digest: str, where: str) -> tuple[Choice, ...]:
    """The choices of a file's text, in its order.

    Raises PrototypeError if it is damaged, or was made for other prototypes than those of
    ``digest``, the :attr:`Prototypes.digest`: after another fit the same number is another centre.
    """
    try:
        file = _File.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError) as error:
        wrong = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            at = ".".join(map(str, first["loc"]))
            wrong = f"{at}: {first['msg']}, got {first['input']!r:.60}"
        raise PrototypeError(
            f"{where} is not a file of choices ({wrong}); write it with 'lpcam prototypes RUN "
            "--drop CLASS:NUMBER', or save it in the report"
        ) from None
    if file.prototypes != digest:
        raise PrototypeError(
            f"the choices in {where} are about prototypes {file.prototypes}, but these are "
            f"{digest}: they were fitted anew, so the numbers mean other centres; look at them "
            "again ('lpcam prototypes RUN', or the report) and write a new file"
        )
    return file.choices


def read_choices(path: Path, digest: str) -> tuple[Choice, ...]:
    """Read a file of choices; raises as :func:`parse_choices`, ArtefactError if it is missing."""
    return parse_choices(read_bytes(path), digest, str(path))
