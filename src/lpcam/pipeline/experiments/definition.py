"""What an experiment is: recipes, the changes that are compared, and what is shown of them."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from lpcam.pipeline.recipe import Recipe, bundled_recipes, load_recipe
from lpcam.runtime.errors import LpcamError, RecipeError
from lpcam.runtime.settings import Fraction, Section

SizeName = Literal["official", "light", "tiny"]
Changes = dict[str, Any]  #: Values of a recipe by dotted key.
MOST_ARMS = 200  #: Number of runs above which an experiment asks for a confirmation.


class Drawing(Section):
    """Drawings that an experiment makes for itself."""

    images: Annotated[int, Field(ge=4)]
    """Number of images."""
    size: Annotated[int, Field(ge=48)]
    """Side of an image, in pixels."""


class Size(Section):
    """What an experiment runs on."""

    recipe: str | None = None
    """Recipe of the arms that name none themselves."""
    changes: Changes = Field(default_factory=dict)
    """Values that are replaced in the recipe of every arm."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Random seeds with which every arm is run."""
    drawing: Drawing | None = None
    """Drawings that are the data; null: the recipe's data."""


class Drop(Section):
    """Prototypes that an arm drops from those of an earlier arm."""

    arm: str
    """Arm whose prototypes are ranked."""
    by: Literal["score", "size", "fire_rate", "purity"]
    """What ranks them: the prototypes with the worst values are dropped."""
    share: Fraction
    """Share of the prototypes of each class and side that is dropped."""


class Arm(Section):
    """One of the runs that are compared, for each seed."""

    name: str
    """Name in tables and plots."""
    changes: Changes = Field(default_factory=dict)
    """Values of the recipe that this arm replaces."""
    recipe: dict[SizeName, str] = Field(default_factory=dict)
    """Recipe of this arm at each size; else that of the size."""
    sizes: tuple[SizeName, ...] = ("official", "light", "tiny")
    """Sizes that have this arm."""
    methods: tuple[str, ...] | None = None
    """Rows of the run that are shown; null: those of the experiment."""
    drop: Drop | None = None
    """Prototypes that are dropped; null: none."""


class Plot(Section):
    """One plot of an experiment."""

    kind: Literal["sweep", "threshold", "confusing", "places", "sheet"]
    """A swept value, the threshold, or pictures (docs/how-to/experiments.md)."""
    title: str
    """Title of the plot."""
    x: str | None = None
    """Swept value, for a sweep."""
    methods: tuple[str, ...] | None = None
    """Methods that are drawn; null: those of the experiment."""


class Experiment(Section):
    """An experiment as its YAML file describes it."""

    title: str
    """What is measured, in a line."""
    source: str | None = None
    """Table or figure of the paper that it corresponds to."""
    about: str
    """What to look for in its result."""
    sizes: dict[SizeName, Size]
    """What it runs on, by size."""
    arms: tuple[Arm, ...] = ()
    """Runs that are compared."""
    sweeps: tuple[dict[str, list[Any]], ...] = ()
    """Grids of values by dotted key; each point is an arm."""
    until: str = "evaluate"
    """Last stage of every run."""
    methods: tuple[str, ...] | None = None
    """Rows of the runs that are shown; null: all."""
    swept: tuple[str, ...] | None = None
    """Rows of the runs of sweeps that are shown; null: as of all runs."""
    thresholds: Literal["ground truth", "own"] = "ground truth"
    """Scores at the best threshold by the truth, or at that of the recipe or the judge."""
    columns: tuple[str, ...] = ("fp", "fn", "miou", "precision", "recall")
    """Scores that are shown."""
    against: dict[str, str] = Field(default_factory=dict)
    """For a method, the one that it is compared with in the same run."""
    against_arm: str | None = None
    """Arm that the others are compared with, method by method."""
    published: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Figures of the paper, in percent, by "ARM / METHOD" and score."""
    plots: tuple[Plot, ...] = ()
    """Plots and pictures."""

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        if not self.arms and not self.sweeps:
            raise ValueError("has neither arms nor sweeps; give at least one")
        whole = {arm.name for arm in self.arms if arm.drop is None}
        for arm in self.arms:
            if arm.drop is not None and arm.drop.arm not in whole:
                raise ValueError(
                    f"the arm {arm.name!r} drops prototypes of {arm.drop.arm!r}; name one of "
                    f"{', '.join(sorted(whole))}"
                )
        swept = {key for grid in self.sweeps for key in grid}
        for plot in self.plots:
            if plot.kind == "sweep" and plot.x not in swept:
                raise ValueError(f"the plot {plot.title!r} has x {plot.x!r}, which no sweep has")
        return self

    def all_arms(self, size: SizeName) -> Iterator[Arm]:
        """The arms of a size: those that are listed, then the points of the sweeps."""
        yield from (arm for arm in self.arms if size in arm.sizes)
        for grid in self.sweeps:
            for values in itertools.product(*grid.values()):
                changes = dict(zip(grid, values, strict=True))
                name = ", ".join(f"{key} {_shown(value)}" for key, value in changes.items())
                yield Arm(name=name, changes=changes, methods=self.swept)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def bundled_experiments() -> list[str]:
    """Names of the experiments that ship with the package."""
    names = (file.name for file in resources.files(__package__).iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_experiment(source: str | Path) -> Experiment:
    """Read the file of an experiment, or a bundled one by name.

    Raises:
        RecipeError: naming the field, the value and what is allowed.

    Example:
        >>> load_experiment("table1").source
        'Table 1'
    """
    path = Path(source)
    if path.is_file():
        text = path.read_text("utf-8")
    elif str(source) in bundled_experiments():
        text = resources.files(__package__).joinpath(f"{source}.yaml").read_text("utf-8")
    else:
        raise RecipeError(
            f"no experiment {str(source)!r}: it is neither a file nor one of "
            f"{', '.join(bundled_experiments())}"
        )
    try:
        return Experiment.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError) as error:
        raise RecipeError(f"the experiment {source} cannot be used: {error}") from None


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment."""

    arm: Arm
    seed: int
    recipe: Recipe
    folder: Path


def plan(
    experiment: Experiment,
    size: SizeName,
    folder: Path,
    *,
    recipe: str | None = None,
    changes: Mapping[str, Any] | None = None,
    seeds: Collection[int] | None = None,
) -> list[PlannedRun]:
    """The runs of an experiment, with their recipes checked.

    Runs with equal recipes have one folder, so that they are run once.

    Args:
        recipe: replaces the recipe of the size.
        changes: values that are replaced in all recipes, but for those that an arm replaces itself.
        seeds: random seeds; None: those of the size.

    Raises:
        RecipeError: if the experiment lacks the size, or naming every arm that cannot be built.
    """
    if size not in experiment.sizes:
        known = ", ".join(experiment.sizes)
        raise RecipeError(f"the experiment has no size {size!r}; it has {known}; use --size")
    own, given = experiment.sizes[size], dict(changes or {})
    arms = list(experiment.all_arms(size))
    slugs = Counter(_slug(arm.name) for arm in arms)
    if repeated := [slug for slug, count in slugs.items() if count > 1]:
        raise RecipeError(f"two arms are called {repeated[0]!r}; give each a name of its own")
    if own.drawing is not None:
        given = {"data.root": str(folder / "drawings"), **given}
    if taken := sorted(given.keys() & set.intersection(*(set(one.changes) for one in arms))):
        raise RecipeError(f"every arm of the experiment sets {taken[0]} itself; leave it out")
    planned: list[PlannedRun] = []
    problems, folders = [], dict[str, Path]()
    for arm in arms:
        base = arm.recipe.get(size) or recipe or own.recipe
        if base is None:
            known = ", ".join(bundled_recipes())
            problems.append(f"{arm.name}: has no recipe; name one, such as {known}")
            continue
        for seed in own.seeds if seeds is None else seeds:
            values = {**own.changes, **given, **arm.changes, "run.seed": seed}
            values |= {"run.folder": str(folder), "name": f"{_slug(arm.name)}-seed{seed}"}
            try:
                made = load_recipe(base, values)
            except LpcamError as error:
                problems.append(f"{arm.name}: {error}")
                break
            # Runs are the same if their recipes differ in name only, and the same are dropped.
            content = made.model_dump_json(by_alias=True, exclude={"name"}) + str(arm.drop)
            place = folders.setdefault(content, folder / "runs" / made.name)
            own_run = made.run.model_copy(update={"folder": place})
            made = made.model_copy(update={"name": place.name, "run": own_run})
            planned.append(PlannedRun(arm, seed, made, place))
    if problems:
        raise RecipeError(
            f"{len(problems)} of {len(arms)} arms cannot be built, so none was started:\n  "
            + "\n  ".join(problems)
        )
    return planned


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("_.-")[:80] or "arm"
