"""Choices about prototypes: those that a person or negative images keep, drop, move or name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from lpcam.method.reservoir import SideName
from lpcam.runtime.errors import PrototypeError
from lpcam.runtime.files import read_bytes

Action = Literal["keep", "drop", "context"]
"""Use a centre as a prototype, leave it out, or count a foreground centre as context."""
Author = Literal["person", "negatives"]
FORMAT = 1  #: Of a file of choices.
LONGEST_NAME = 60  #: Characters of a prototype's name.
Place = tuple[str, SideName, int]  #: A centre: the name of its class, its side and its number.


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Choice:
    """What someone chose about one centre; None leaves what was fitted or chosen before."""

    class_name: str
    side: SideName  #: Side on which the centre was fitted.
    index: Annotated[int, Field(ge=0)]  #: Row of the centre in :class:`Centers`.
    action: Action | None = None
    name: Annotated[str, Field(max_length=LONGEST_NAME)] | None = None
    """Name of the part that it shows, such as "head"; an empty one takes the name away."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Factor of its weight among the prototypes of its class and side."""
    by: Author = "person"
    reason: str = ""

    @property
    def place(self) -> Place:
        """The centre that it is about."""
        return self.class_name, self.side, self.index

    @property
    def told(self) -> str:
        """What was chosen, by whom and why, in words."""
        said = {"keep": "kept", "drop": "dropped", "context": "moved to the context"}
        words = [said[self.action]] if self.action else []
        words += [f"named {self.name}"] if self.name else []
        words += [f"weighted {self.weight:g}"] if self.weight else []
        who = "a person" if self.by == "person" else "negatives"
        return f"{', '.join(words)} by {who}" + (f": {self.reason}" if self.reason else "")

    def as_json(self) -> dict[str, Any]:
        """The values that say something, as a file has them."""
        values = {"class": self.class_name, **asdict(self)}
        return {k: v for k, v in values.items() if k != "class_name" and v not in (None, "")}

    @classmethod
    def of_json(cls, values: Any) -> Choice:
        """The choice that :meth:`as_json` wrote; ValidationError if it is none."""
        if isinstance(values, dict):
            values = {"class_name" if k == "class" else k: v for k, v in values.items()}
        return _ADAPTER.validate_python(values)


_ADAPTER = TypeAdapter(Choice)


def settled(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """One choice for each centre, sorted: later ones win, and a person's over those by negatives.

    Action, name and weight are settled apart; author and reason are those of the action.

    Example:
        >>> dropped = Choice("cow", "foreground", 3, "drop", reason="grass")
        >>> rejected = Choice("cow", "foreground", 3, "context", by="negatives")
        >>> settled([dropped, Choice("cow", "foreground", 3, name="leg"), rejected])[0].action
        'drop'
    """
    found: dict[Place, Choice] = {}
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
    values = {"format": FORMAT, "prototypes": digest}
    rows = [one.as_json() for one in choices]
    return (
        "# Choices about the prototypes of LPCAM: action is keep, drop or context; see the guide\n"
        '# "Correct what the classifier believes".\n'
        + yaml.safe_dump(values, sort_keys=False)
        + yaml.safe_dump({"choices": rows}, sort_keys=False, allow_unicode=True, width=1000)
    )


def parse_choices(text: str | bytes, digest: str, where: str) -> tuple[Choice, ...]:
    """The choices of a file's text, in its order.

    Raises PrototypeError if it is damaged, or was made for other prototypes than those of
    ``digest``, the :attr:`Prototypes.digest`: after another fit the same number is another centre.
    """
    try:
        values = yaml.safe_load(text)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"it has no 'format: {FORMAT}'")
        if unknown := values.keys() - {"format", "prototypes", "choices"}:
            raise ValueError(f"unknown key {min(unknown, key=str)!r}")
        rows: Sequence[Any] = values.get("choices") or []
        choices = tuple(Choice.of_json(row) for row in rows)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r:.60}"
        raise PrototypeError(f"{where} has a wrong choice: {wrong}") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise PrototypeError(
            f"{where} is not a file of choices: {error}; write it with 'lpcam prototypes RUN "
            "--drop CLASS:NUMBER', or save it in the report"
        ) from None
    if values.get("prototypes") != digest:
        raise PrototypeError(
            f"the choices in {where} are about prototypes {values.get('prototypes')}, but these "
            f"are {digest}: they were fitted anew, so the numbers mean other centres; look at them "
            "again ('lpcam prototypes RUN', or the report) and write a new file"
        )
    return choices


def read_choices(path: Path, digest: str) -> tuple[Choice, ...]:
    """Read a file of choices; raises as :func:`parse_choices`, ArtefactError if it is missing."""
    return parse_choices(read_bytes(path), digest, str(path))
