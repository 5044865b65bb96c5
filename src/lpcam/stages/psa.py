"""PSA: scores of two CRFs of each kind of maps, and the affinities that are learnt from them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lpcam.data.items import Item
from lpcam.ledger import Stage
from lpcam.presets import CrfSettings
from lpcam.stages.classify import build_classifier
from lpcam.stages.context import Run
from lpcam.stages.refine import (
    PSA,
    Source,
    crf_memory,
    each,
    network_path,
    refine_section,
    refined_at,
    sources,
)
from lpcam.stages.training import backbone_parts, train_network, training_options
from lpcam.storage import map_path, read_maps

PSA_LABELS = "psa-labels"


def write_psa_labels(run: Run) -> bool:
    """Scores of two CRFs an image, from which PSA takes its labels; whether any were made."""
    items, worked = run.items("maps"), False
    settings, crf_settings = refine_section(run).psa, CrfSettings.from_preset("psa")
    for source in sources(run):
        stage = run.stages[f"{PSA_LABELS}/{source.name}"] = Stage(
            run.folder / PSA_LABELS / source.name,
            {
                "revision": 1,
                "maps": source.key,
                "alphas": [settings.low_alpha, settings.high_alpha],
                "crf": crf_settings.model_dump(mode="json", exclude={"preset"}),
                "maximum_side": run.recipe.maps.maximum_side,
                "images": run.digest(items),
            },
        )
        if stage.done([map_path(stage.folder, item.id) for item in items]):
            continue
        worked = True
        run.begin(stage)
        _score(run, source, stage, items, crf_settings)
        run.finish(stage)
    return worked


def _score(
    run: Run, source: Source, stage: Stage, items: Sequence[Item], crf_settings: CrfSettings
) -> None:
    from lpcam.refine.crf import DenseCrf  # noqa: PLC0415
    from lpcam.refine.psa import crf_scores, write_scores  # noqa: PLC0415

    settings = refine_section(run).psa
    crf = DenseCrf(crf_settings, memory=crf_memory(run))

    @torch.inference_mode()
    def make(item: Item) -> None:
        path = map_path(stage.folder, item.id)
        if path.is_file():
            return
        maps = read_maps(map_path(source.folder, item.id))
        image, planes = refined_at(run, item, maps)
        alphas = (settings.low_alpha, settings.high_alpha)
        low, high = crf_scores(crf, image, planes, alphas)
        write_scores(path, low, high)

    each(run, f"PSA labels of {source.method}", items, make)


def train_affinities(run: Run) -> bool:
    """PSA's network of each source's labels; whether there was anything to do."""
    items, worked = run.items("maps"), False
    settings = refine_section(run).psa
    for source in sources(run):
        labels = run.stages[f"{PSA_LABELS}/{source.name}"]
        stage = run.stages[f"{PSA}/{source.name}"] = Stage(
            run.folder / PSA / source.name,
            {
                "revision": 1,
                "labels": labels.key,
                **_classifier_parts(run),
                "settings": settings.model_dump(
                    mode="json",
                    exclude={"preset", "beta", "exponent", "tolerance", "threshold"},
                ),
                "seed": run.recipe.run.seed,
            },
        )
        labelled = [(item, map_path(labels.folder, item.id)) for item in items]
        build, train = partial(_build_psa, run), partial(_train_psa, run, stage, labelled)
        worked |= train_network(run, stage, network_path(stage), build, train)
    return worked


def _classifier_parts(run: Run) -> dict[str, Any]:
    if "classify" in run.stages:
        return {"classifier": run.stages["classify"].output["digest"]}
    return backbone_parts(run.recipe.classifier)


def rehearse_psa(run: Run) -> None:
    """Refuse, before the stages that come first, a backbone of which PSA cannot be made.

    Nothing is done where there are networks: their stage knows whether they still hold.

    Raises:
        ClassifierError: if the backbone has not the feature maps that PSA needs, or a prefix to
            freeze matches nothing.
    """
    section = run.recipe.refine
    if section is None or section.method != "psa" or any(run.folder.glob(f"{PSA}/*/{PSA}.*")):
        return
    from lpcam.refine.psa import build_psa  # noqa: PLC0415
    from lpcam.train import names_below  # noqa: PLC0415

    network = build_psa(build_classifier(run, weights="random"))
    names_below(dict(network.backbone.named_parameters()), section.psa.freeze)


def _build_psa(run: Run) -> Any:
    """From the classifier's own weights, as the specification starts from those of one.

    For maps of another program there is none, and its backbone's first weights serve.
    """
    from lpcam.refine.psa import build_psa  # noqa: PLC0415

    classifier = run.classifier if "classify" in run.stages else build_classifier(run)
    return build_psa(classifier, seed=run.recipe.run.seed)


def _train_psa(
    run: Run, stage: Stage, labelled: Sequence[tuple[Item, Path]], network: Any
) -> list[dict[str, Any]]:
    from lpcam.refine.psa import train_psa  # noqa: PLC0415

    return train_psa(network, labelled, refine_section(run).psa, **training_options(run, stage))
