"""Plans and optimisers by hand; training that learns, goes on, and is the same in processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import draw_folder, together
from torch import nn

from lpcam.data.dataset import IGNORE, Item
from lpcam.data.folder import read_folder
from lpcam.runtime.distributed import Processes
from lpcam.runtime.errors import ClassifierError
from lpcam.runtime.files import read_tensors
from lpcam.segmentation import training as train
from lpcam.segmentation.networks.base import SegmenterSpec
from lpcam.segmentation.segmenter import Segmenter, build_segmenter
from lpcam.segmentation.settings import SegmenterSettings, SegmentTestSettings
from lpcam.training import loop as engine

Pairs = list[tuple[Item, Path]]
SETTINGS = SegmenterSettings.from_preset(
    "deeplabv2.voc12.official",
    iterations=8,
    batch_size=4,
    crop=49,
    learning_rate=1e-3,
    pyramid=(0.5,),
    scales=(0.75, 1.0),
)
TEST = SegmentTestSettings.from_preset("deeplabv2.official", crf=None)
SPEC = SegmenterSpec("deeplabv2", "test_resnet", {}, None, (0.5,))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    dataset = read_folder(draw_folder(tmp_path_factory.mktemp("data") / "boxes"))
    return [(item, item.mask) for item in dataset.select("all") if item.mask is not None]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Segmenter]:
    root = draw_folder(tmp_path_factory.mktemp("classes") / "boxes", count=3)
    classes = read_folder(root).classes
    return lambda: build_segmenter(SPEC, classes, weights="random", seed=1)


def test_the_rate_of_deeplabv2_is_renewed_every_ten_steps() -> None:
    plan = train.plan_of(SegmenterSettings.from_preset("deeplabv2.voc12.official"), 10_582)
    assert (plan.steps, plan.batch, plan.accumulation) == (20_000, 10, 2)
    assert {plan.rate(step) for step in range(10)} == {1.0}
    assert plan.rate(10) == plan.rate(19) == pytest.approx((1 - 10 / 20_000) ** 0.9)
    assert plan.rate(19_999) == pytest.approx((10 / 20_000) ** 0.9)
    assert plan.steps % plan.record == 0


def test_epochs_are_counted_in_whole_batches() -> None:
    plan = train.plan_of(SegmenterSettings.from_preset("wideresnet38.official"), 10_582)
    assert plan.steps == 30 * (10_582 // 4)


def test_warm_up_by_hand() -> None:
    plan = train.plan_of(SegmenterSettings.from_preset("upernet.voc12.paper"), 10_582)
    assert plan.rate(0) == pytest.approx(1e-6)
    assert plan.rate(750) == pytest.approx((1e-6 + (1 - 1e-6) / 2) * (1 - 750 / 40_000))
    assert plan.rate(1500) == pytest.approx(1 - 1500 / 40_000)
    assert plan.rate(39_999) == pytest.approx(1 / 40_000)


def test_rates_and_decays_of_the_groups() -> None:
    groups = {
        name: [nn.Parameter(torch.zeros(1))] for name in ("backbone", "head", "head_bias")
    } | {"no_decay": []}
    sgd = train.optimizer_of(groups, SegmenterSettings.from_preset("deeplabv2.voc12.official"))
    assert isinstance(sgd, torch.optim.SGD)
    assert [(g["lr"], g["weight_decay"], g["momentum"]) for g in sgd.param_groups] == [
        (2.5e-4, 5e-4, 0.9),
        (2.5e-3, 5e-4, 0.9),
        (5e-3, 0.0, 0.9),
    ]
    wide = train.optimizer_of(groups, SegmenterSettings.from_preset("wideresnet38.official"))
    assert [(g["lr"], g["weight_decay"], g["momentum"]) for g in wide.param_groups] == [
        (7e-4, 0.0, 1e-5),
        (pytest.approx(7e-3), 0.0, 1e-5),
        (pytest.approx(7e-3), 0.0, 1e-5),
    ]
    groups["no_decay"] = [nn.Parameter(torch.zeros(1))]
    adamw = train.optimizer_of(groups, SegmenterSettings.from_preset("upernet.voc12.paper"))
    assert isinstance(adamw, torch.optim.AdamW)
    assert [(g["lr"], g["weight_decay"], g["betas"]) for g in adamw.param_groups] == [
        *[(6e-5, 0.01, (0.9, 0.999))] * 3,
        (6e-5, 0.0, (0.9, 0.999)),
    ]


def test_validations_are_spread_evenly_and_the_last_is_at_the_end() -> None:
    plan = engine.Plan(1000, 4, 10, lambda _: 1.0)
    assert train.validation_steps(plan, 4) == {250, 500, 750, 1000}
    assert train.validation_steps(plan, 0) == set()
    assert train.validation_steps(engine.Plan(3, 4, 1, lambda _: 1.0), 9) == {1, 2, 3}


def test_training_learns_the_boxes(
    fresh: Callable[[], Segmenter], pairs: Pairs, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(
        update={"iterations": 45, "learning_rate": 5e-3, "pyramid": (), "accumulation": 1}
    )
    segmenter = fresh()
    items = [item for item, _ in pairs]
    validation = train.Validation(items, TEST, 3, tmp_path / "best.safetensors", 1024)
    before = train.validate(segmenter, validation)
    history = train.train_segmenter(
        segmenter, pairs, settings, seed=0, folder=tmp_path, validation=validation
    )
    assert [record["step"] for record in history] == list(range(1, 46))
    losses = [record["loss"] for record in history]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    measured = {r["step"]: r["validation_miou"] for r in history if "validation_miou" in r}
    assert list(measured) == [15, 30, 45]
    assert max(measured.values()) > before + 0.1
    best = Segmenter.load(tmp_path / "best.safetensors")
    assert train.validate(best, validation) == pytest.approx(max(measured.values()))
    made_by = read_tensors(tmp_path / "best.safetensors")[1]["made_by"]
    assert measured[made_by["step"]] == made_by["validation_miou"] == max(measured.values())


@pytest.mark.parametrize(("stopped_at", "optimizer"), [(1, "sgd"), (3, "adamw")])
def test_going_on_gives_the_same_bytes(
    fresh: Callable[[], Segmenter],
    pairs: Pairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped_at: int,
    optimizer: str,
) -> None:
    settings = SETTINGS.model_copy(update={"iterations": 4, "optimizer": optimizer})
    whole = fresh()
    expected = train.train_segmenter(whole, pairs, settings, seed=5, folder=tmp_path / "whole")
    save, saved = engine._save, []

    def stop(*arguments: Any) -> None:
        save(*arguments)
        saved.append(arguments[3])
        if len(saved) == stopped_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train_segmenter(fresh(), pairs, settings, seed=5, folder=tmp_path / "stopped")
    resumed = fresh()
    history = train.train_segmenter(resumed, pairs, settings, seed=5, folder=tmp_path / "stopped")
    assert saved == [1, 2, 3, 4]  # nothing was done twice
    assert history == expected
    bytes_of = [(tmp_path / n / engine.CHECKPOINT).read_bytes() for n in ("whole", "stopped")]
    assert bytes_of[0] == bytes_of[1]


def test_what_is_dropped_hangs_on_the_seed_and_the_step_alone(
    pairs: Pairs, fresh: Callable[[], Segmenter], tmp_path: Path
) -> None:
    def trained(name: str, seed: int, before: int) -> list[float]:
        segmenter = fresh()
        head = segmenter.network.get_submodule("aspp")
        segmenter.network.register_module("aspp", nn.Sequential(nn.Dropout(0.5), head))
        torch.manual_seed(before)
        history = train.train_segmenter(
            segmenter, pairs, SETTINGS, seed=seed, folder=tmp_path / name
        )
        return [record["loss"] for record in history]

    assert trained("a", 0, before=1) == trained("b", 0, before=2) != trained("c", 1, before=1)


def test_what_is_frozen_stays(fresh: Callable[[], Segmenter], pairs: Pairs, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"iterations": 2, "freeze": ("conv1", "layer1")})
    segmenter = fresh()
    train.train_segmenter(segmenter, pairs, settings, seed=0, folder=tmp_path / "run")
    changed = {
        name.removeprefix("backbone.classifier.backbone.").split(".")[0]
        for (name, found), start in zip(
            segmenter.network.named_parameters(), fresh().parameters(), strict=True
        )
        if not torch.equal(found, start)
    }
    assert {"layer2", "aspp"} <= changed
    assert not {"conv1", "layer1"} & changed
    lost = settings.model_copy(update={"freeze": ("layer9",)})
    with pytest.raises(ClassifierError, match="no parameter of the backbone is below 'layer9'"):
        train.train_segmenter(fresh(), pairs, lost, seed=0, folder=tmp_path / "lost")


@pytest.mark.parametrize("loss", ["cross_entropy", "balanced"])
def test_processes_take_the_steps_of_one(
    fresh: Callable[[], Segmenter], pairs: Pairs, tmp_path: Path, loss: str
) -> None:
    """The pixels that count differ between the processes' images; the mean is over all."""
    settings = SETTINGS.model_copy(update={"iterations": 4, "loss": loss})
    whole = fresh()
    expected = train.train_segmenter(whole, pairs, settings, seed=5, folder=tmp_path / "one")
    own = [fresh(), fresh()]

    def work(processes: Processes) -> list[dict[str, Any]]:
        return train.train_segmenter(
            own[processes.rank],
            pairs,
            settings,
            seed=5,
            folder=tmp_path / f"of {processes.rank}",
            processes=processes,
        )

    histories = together(2, work)
    for segmenter, history in zip(own, histories, strict=True):
        for found, wanted in zip(segmenter.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
        for record, other in zip(history, expected, strict=True):
            assert record == pytest.approx(other, abs=1e-4)
    start = [p.clone() for p in fresh().parameters()]
    moved = [(p - q).abs().max() for p, q in zip(whole.parameters(), start, strict=True)]
    assert max(moved) > 1e-3  # more than the tolerance above


def test_mixed_precision_trains_much_the_same(
    fresh: Callable[[], Segmenter], pairs: Pairs, tmp_path: Path
) -> None:
    def losses(name: train.Precision) -> list[float]:
        segmenter, settings = fresh(), SETTINGS.model_copy(update={"iterations": 8})
        history = train.train_segmenter(
            segmenter, pairs, settings, seed=0, folder=tmp_path / name, precision=name
        )
        assert all(p.dtype == torch.float32 for p in segmenter.parameters())
        assert all(bool(torch.isfinite(p).all()) for p in segmenter.parameters())
        return [record["loss"] for record in history]

    full = losses("float32")
    assert losses("bfloat16") == pytest.approx(full, rel=0.05)


def test_images_without_a_pixel_that_counts(
    fresh: Callable[[], Segmenter], pairs: Pairs, tmp_path: Path
) -> None:
    """They take no part in a step, and nothing becomes NaN."""
    void = []
    for item, mask in pairs[:4]:
        size = np.asarray(Image.open(mask)).shape
        void.append((item, tmp_path / mask.name))
        Image.fromarray(np.full(size, IGNORE, np.uint8)).save(void[-1][1])
    settings = SETTINGS.model_copy(update={"weight_decay": 0.0, "iterations": 2})
    segmenter = fresh()
    history = train.train_segmenter(segmenter, void, settings, seed=0, folder=tmp_path / "run")
    assert [record["loss"] for record in history] == [0.0, 0.0]
    for found, start in zip(segmenter.parameters(), fresh().parameters(), strict=True):
        assert torch.equal(found, start)


def test_bad_input(fresh: Callable[[], Segmenter], pairs: Pairs, tmp_path: Path) -> None:
    wild = SETTINGS.model_copy(update={"learning_rate": 1e9, "iterations": 20})
    with pytest.raises(ClassifierError, match=r"lower segment.training.learning_rate"):
        train.train_segmenter(fresh(), pairs, wild, seed=0, folder=tmp_path / "wild")
