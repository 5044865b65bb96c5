"""What the stages that train a network share: its backbone, first weights and file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lpcam.ledger import Stage
from lpcam.recipe import ClassifierSection, HostSection
from lpcam.stages.context import Run, remove_leftovers, weights_key
from lpcam.storage import digest_file
from lpcam.version import versions

BACKBONE = {"backbone", "arguments", "output_stride", "dilated", "mean", "std"}
"""What a section says of a backbone, beside its weights."""
Network = TypeVar("Network")


def backbone_parts(section: ClassifierSection | HostSection) -> dict[str, Any]:
    """What a network's first weights hang on, for the key of a stage."""
    backbone = section.model_dump(mode="json", include=BACKBONE)
    # Without an output stride no dilation is removed, whatever the section says.
    backbone["dilated"] |= section.output_stride is None
    return {"backbone": backbone, "weights": weights_key(section.weights)}


def backbone_spec(section: ClassifierSection | HostSection) -> Any:
    """The :class:`lpcam.classifier.BackboneSpec` of a section that names a backbone."""
    from lpcam.classifier import BackboneSpec  # noqa: PLC0415 - timm is slow to import

    assert section.backbone is not None
    dilated = section.dilated or section.output_stride is None
    return BackboneSpec(section.backbone, section.arguments, section.output_stride, dilated)


def first_weights(run: Run, section: ClassifierSection | HostSection) -> dict[str, Any]:
    """Arguments of what builds a network: its weights, its mean and deviation of RGB, the seed."""
    return {
        "weights": section.weights,
        "mean": section.mean,
        "std": section.std,
        "seed": run.recipe.run.seed,
    }


def training_options(run: Run, stage: Stage) -> dict[str, Any]:
    """Arguments of every training: seed, folder of checkpoints, workers and processes."""
    return {
        "seed": run.recipe.run.seed,
        "folder": stage.folder,
        "workers": run.threads if run.device.type == "cuda" else 0,
        "processes": run.processes,
    }


def train_network(
    run: Run,
    stage: Stage,
    path: Path,
    build: Callable[[], Network],
    train: Callable[[Network], list[dict[str, Any]]],
) -> bool:
    """Train a network as a stage, unless its file holds; whether there was anything to do.

    Args:
        path: the file of the trained network.
        build: makes the untrained one, before anything is removed.
        train: in place; it returns the history.
    """
    done = stage.done([path])
    if not done:
        run.refuse(stage)
        network: Any = build()
        run.begin(stage)
        history = train(network)
        output: dict[str, Any] = {}
        if run.processes.first:
            network.save(path, {"stage": stage.key, "versions": versions()})
            output = {
                "history": history,
                "digest": digest_file(path),
                "fingerprint": network.fingerprint(),
            }
        run.finish(stage, **output)
    if run.processes.first:
        remove_leftovers(stage.folder)  # here too where a run was stopped at its very end
    return not done
