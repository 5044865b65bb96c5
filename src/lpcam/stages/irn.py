"""IRN: ternary labels of each kind of maps, and the network of boundaries that learns from them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lpcam.data.items import Item
from lpcam.ledger import Stage
from lpcam.stages.context import Run
from lpcam.stages.refine import (
    IRN,
    label_path,
    network_path,
    refine_section,
    sources,
    write_ternary,
)
from lpcam.stages.training import (
    backbone_parts,
    backbone_spec,
    first_weights,
    train_network,
    training_options,
)

IR_LABELS = "ir-labels"
TRAINING = {
    *("epochs", "batch_size", "learning_rate", "displacement_multiplier", "momentum"),
    *("weight_decay", "power", "crop", "scale", "radius", "displacement"),
}
"""What of IRN's settings the network hangs on; the others are of its labels or of the walk."""


def write_ir_labels(run: Run) -> bool:
    """Ternary labels of every image (specification of IRN, section 3)."""
    items, worked = run.items("maps"), False
    for source in sources(run):
        worked |= write_ternary(
            run,
            f"{IR_LABELS}/{source.name}",
            f"IRN labels of {source.method}",
            source.folder,
            source.key,
            (source.foreground_threshold, source.background_threshold),
            refine_section(run).crf,
            items,
        )
    return worked


def train_boundaries(run: Run) -> bool:
    """IRN's boundary branch (and displacement, where wanted) of each source's labels."""
    items, worked = run.items("maps"), False
    settings = refine_section(run).irn
    for source in sources(run):
        labels = run.stages[f"{IR_LABELS}/{source.name}"]
        stage = run.stages[f"{IRN}/{source.name}"] = Stage(
            run.folder / IRN / source.name,
            {
                "revision": 2,
                "labels": labels.key,
                **backbone_parts(run.recipe.classifier),
                "settings": settings.model_dump(mode="json", include=TRAINING),
                "seed": run.recipe.run.seed,
            },
        )
        labelled = [(item, label_path(labels.folder, item)) for item in items]
        build, train = partial(_build_irn, run), partial(_train_irn, run, stage, labelled)
        worked |= train_network(run, stage, network_path(stage), build, train)
    return worked


def _build_irn(run: Run) -> Any:
    from lpcam.refine.irn import build_irn  # noqa: PLC0415

    section, displacement = run.recipe.classifier, refine_section(run).irn.displacement
    first = first_weights(run, section)
    return build_irn(backbone_spec(section), displacement=displacement, **first).to(run.device)


def _train_irn(
    run: Run, stage: Stage, labelled: Sequence[tuple[Item, Path]], network: Any
) -> list[dict[str, Any]]:
    from lpcam.refine.irn import train_irn  # noqa: PLC0415

    return train_irn(network, labelled, refine_section(run).irn, **training_options(run, stage))
