"""The stages of a run, in order."""

from __future__ import annotations

from lpcam.pipeline.stage import Stage
from lpcam.pipeline.stages import (
    classify,
    evaluate,
    host,
    maps,
    prototypes,
    refine,
    report,
    seeds,
    segment,
)

STAGES: tuple[Stage, ...] = (
    Stage("classify", "Train the classifier (linear probe or fine-tuning).", classify.classify),
    Stage("cam", "Compute class activation maps.", maps.map_cam),
    Stage("prototypes", "Cluster, score and select prototypes.", prototypes.cluster),
    Stage("lpcam", "Compute LPCAM-F and LPCAM maps.", maps.map_lpcam),
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
