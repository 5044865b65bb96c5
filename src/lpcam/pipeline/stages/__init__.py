"""The stages of a run, in order: each names one step and yields the tasks that it consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from lpcam.pipeline.cache import Task
from lpcam.pipeline.context import Context
from lpcam.pipeline.recipe import Recipe
from lpcam.pipeline.stages import (
    classify,
    early,
    evaluate,
    host,
    maps,
    prototypes,
    refine,
    report,
    seeds,
    segment,
)

REMEDIES = {
    None: "",
    "host": "a section host, e.g. --host.method amn",
    "refine": "a section refine, e.g. --refine.method irn",
    "segment": "a section segment, e.g. --segment.network deeplabv2",
}
"""What adds the stages of a section to a recipe."""


@dataclass(frozen=True)
class Stage:
    """One step of a run."""

    name: str
    help: str  #: Description of the step, one sentence.
    tasks: Callable[[Context], Iterable[Task]]
    """Its tasks in order. A task may use the results of those before it."""
    section: Literal["host", "refine", "segment"] | None = None
    """The section that a recipe must have for it."""
    validate: Callable[[Context], None] | None = None
    """Refuse, before any stage runs, what this one could not work with."""

    def present(self, recipe: Recipe) -> bool:
        """Tell whether a recipe has this stage."""
        return self.section is None or getattr(recipe, self.section) is not None


STAGES: tuple[Stage, ...] = (
    Stage("classify", "Train the classifier (linear probe or fine-tuning).", classify.classify),
    Stage("cam", "Compute class activation maps.", maps.map_cam),
    Stage(
        "prototypes",
        "Cluster, score and select prototypes.",
        prototypes.cluster,
        validate=prototypes.validate,
    ),
    Stage("lpcam", "Compute LPCAM-F and LPCAM maps.", maps.map_lpcam),
    Stage("early", "Sharpen the maps by early layers of the backbone.", early.sharpen),
    Stage("seeds", "Write seed masks.", seeds.write_seeds),
    Stage(
        "host-labels",
        "Write the masks that the host learns from, if it learns from masks.",
        host.write_masks,
        "host",
        host.validate,
    ),
    Stage("host", "Train the host's networks.", host.train_networks, "host"),
    Stage("host-prototypes", "Cluster the host's own features.", host.cluster, "host"),
    Stage("host-maps", "Compute the host's maps and their seeds.", host.write_maps, "host"),
    Stage(
        "refine-labels",
        "Write the labels that the refinement learns from, if it learns.",
        refine.write_labels,
        "refine",
        refine.validate,
    ),
    Stage("refine-network", "Train the refinement's network.", refine.train_networks, "refine"),
    Stage("pseudo", "Write refined maps and pseudo masks.", refine.write_pseudo_masks, "refine"),
    Stage(
        "segment",
        "Train segmenters on the pseudo masks.",
        segment.train_segmenters,
        "segment",
        segment.validate,
    ),
    Stage("test", "Segment the list to test.", segment.test, "segment"),
    Stage("evaluate", "Score maps and masks where there are true masks.", evaluate.evaluate),
    Stage("report", "Write the HTML report.", report.write_report),
)
"""All stages. Order, ``--until``, help and documentation read this list."""
