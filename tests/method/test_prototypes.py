"""The reservoir, the making of prototypes, and prototypes on disk."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lpcam.method.functional import foreground_minus_context, unit_mean
from lpcam.method.prototypes import Prototypes, make_prototypes
from lpcam.method.reservoir import Reservoir, draw_images, read_selected
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import ArtefactError, DataError, PrototypeError
from lpcam.runtime.files import write_tensors

SETTINGS = LpcamSettings.from_preset("voc12.official", clusters=3)


def rows(count: int, channels: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, generator=torch.Generator().manual_seed(seed))


def fill(reservoir: Reservoir, images: list[int], place: tuple[int, str] = (0, "context")) -> None:
    index, side = place
    for image in images:
        values = torch.full((7, 2), float(image)) + torch.arange(7)[:, None] / 10
        reservoir.add(index, side, values, f"image {image}")  # type: ignore[arg-type]


def sample(reservoir: Reservoir) -> torch.Tensor:
    found = reservoir.features(0, "context")
    assert found is not None
    return found


def test_reservoir_is_bounded_and_does_not_depend_on_order() -> None:
    forth, back = Reservoir(10, 3), Reservoir(10, 3)
    fill(forth, list(range(40)))
    fill(back, list(range(39, -1, -1)))
    assert sample(forth).shape == (10, 2)
    assert torch.equal(sample(forth), sample(back))
    assert forth.seen[0, "context"] == 280
    assert sample(forth).dtype == torch.float16
    other = Reservoir(10, 4)
    fill(other, list(range(40)))
    assert not torch.equal(sample(forth), sample(other))


def test_reservoir_is_uniform() -> None:
    """Over many seeds every image serves about equally: 40 images, 280 rows, 28 kept, 60 seeds."""
    counts = torch.zeros(40)
    for seed in range(60):
        reservoir = Reservoir(28, seed)
        fill(reservoir, list(range(40)))
        counts += torch.bincount(sample(reservoir)[:, 0].long(), minlength=40)
    expected = 60 * 28 / 40
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 75  # 39 degrees of freedom: mean 39, 99.9 % below 73


def test_reservoir_refuses_nan_and_what_half_precision_cannot_hold() -> None:
    with pytest.raises(PrototypeError, match="'a' contain NaN or Inf"):
        Reservoir(None, 0).add(0, "context", torch.tensor([[float("nan")]]), "a")
    large = torch.tensor([[7e4, 1.0]])
    with pytest.raises(PrototypeError, match=r"7e\+04.*float16"):
        Reservoir(None, 0).add(0, "context", large, "a")
    for dtype in (torch.float32, torch.bfloat16):
        reservoir = Reservoir(None, 0, dtype)
        reservoir.add(0, "context", large, "a")
        assert sample(reservoir).dtype == dtype


@pytest.mark.parametrize("bound", [1, 10, 100, None])
def test_merged_reservoirs_are_one_reservoir(bound: int | None, tmp_path: Path) -> None:
    """Images shared out in any way, one share resumed from a checkpoint: the very same bytes."""
    whole, *shares = (Reservoir(bound, 3) for _ in range(4))
    fill(whole, list(range(40)))
    for place, share in enumerate(shares):
        fill(share, list(range(place, 40, 3)))
    fill(whole, [40], (1, "foreground"))  # a place that only one share has
    fill(shares[2], [40], (1, "foreground"))
    shares[1].checkpoint(tmp_path / "r.safetensors", 13)
    shares[1] = Reservoir(bound, 3)
    shares[1].restore(tmp_path / "r.safetensors")
    merged = Reservoir(bound, 3)
    for share in (shares[2], shares[0], shares[1]):
        merged.merge(share)
    assert merged.seen == whole.seen
    for place in whole.seen:
        assert torch.equal(merged.features(*place), whole.features(*place))
    fill(whole, [41])
    fill(merged, [41])  # and it goes on as one
    assert torch.equal(merged.features(0, "context"), whole.features(0, "context"))


def test_a_reservoir_takes_only_the_rows_that_are_pointed_at() -> None:
    rows = torch.rand(40, 5, generator=torch.Generator().manual_seed(0))
    where = rows[:, 0] > 0.4
    by_mask, by_rows = Reservoir(12, 0), Reservoir(12, 0)
    by_mask.add(0, "context", rows, "a", where=where)
    by_rows.add(0, "context", rows[where], "a")
    assert by_mask.seen == by_rows.seen == {(0, "context"): int(where.sum())}
    assert torch.equal(sample(by_mask), sample(by_rows))


LABELS = [("a", (0,)), ("b", (0, 1)), ("c", (1,)), ("d", ()), ("e", (0,))]


def test_all_images_serve_their_classes_once() -> None:
    found = draw_images(LABELS, 2, SETTINGS, seed=0)
    assert found == {"a": {0: 1}, "b": {0: 1, 1: 1}, "c": {1: 1}, "e": {0: 1}}


def test_images_are_drawn_with_and_without_replacement() -> None:
    without = SETTINGS.model_copy(update={"images_per_class": 2})
    found = draw_images(LABELS, 2, without, seed=0)
    for index in range(2):
        counts = [times[index] for times in found.values() if index in times]
        assert counts == [1, 1]
    replaced = without.model_copy(update={"images_per_class": 50, "images_with_replacement": True})
    found = draw_images(LABELS, 2, replaced, seed=0)
    assert sum(times.get(0, 0) for times in found.values()) == 50
    assert max(times.get(0, 0) for times in found.values()) > 1


def test_a_table_selects_the_images(tmp_path: Path) -> None:
    path = tmp_path / "selected_100.npy"
    np.save(path, [[0, 4, 4], [1, 2, 1]])
    found = read_selected(path, LABELS, 2)
    assert found == {"a": {0: 1}, "e": {0: 2}, "b": {1: 2}, "c": {1: 1}}
    for other in ([[0, 4], [1, 3]], [[0, 5], [1, 2]], [[0, 4]], [[0.5, 1], [1, 2]]):
        np.save(path, other)
        with pytest.raises(DataError, match=r"selected_100\.npy"):
            read_selected(path, LABELS, 2)
    with pytest.raises(DataError, match=r"none\.npy"):
        read_selected(tmp_path / "none.npy", LABELS, 2)


def reservoir_of(places: dict[tuple[int, str], torch.Tensor]) -> Reservoir:
    reservoir = Reservoir(None, 0, torch.float32)
    for (index, side), values in places.items():
        reservoir.add(index, side, values, "image")  # type: ignore[arg-type]
    return reservoir


def made(
    places: dict[tuple[int, str], torch.Tensor],
    settings: LpcamSettings = SETTINGS,
    weight: torch.Tensor = torch.eye(2, 4),  # noqa: B008 - never changed
    classes: tuple[str, ...] = ("a", "b"),
    **options: Any,
) -> Prototypes:
    return make_prototypes(reservoir_of(places), weight, classes, settings, seed=0, **options)


def test_make_prototypes_follows_the_rules() -> None:
    weight = 8 * torch.eye(2, 4)
    strong = torch.tensor([[1.0, 0.0, 0.0, 0.2]]).repeat(5, 1) + 0.01 * rows(5)
    shared = torch.tensor([[0.1, 0.1, 1.0, 0.0]]).repeat(5, 1) + 0.01 * rows(5, seed=1)
    settings = SETTINGS.model_copy(update={"clusters": 2})
    places = {
        (0, "foreground"): torch.cat([strong, shared]),
        (0, "context"): shared,
        (1, "foreground"): shared,
        (1, "context"): strong,
    }
    found = made(places, settings, weight, ("first", "second"))
    # class 0: the strong cluster scores near 1 and is kept, the shared one (0.5) is not
    kept = found.foreground.prototypes(0)
    assert kept.shape == (1, 4)
    torch.testing.assert_close(kept[0], strong.mean(0), atol=1e-5, rtol=0)
    assert found.foreground.sizes[0].sum() == 10
    # its context scores 0.5: between 0.05 and 0.9
    assert found.context.keep[0].all()
    # class 1: nothing passes mu_f, the best is kept and told of; its context scores near 0
    assert found.foreground.prototypes(1).shape[0] >= 1
    assert any("second: no foreground centre scores above mu_f=0.9" in e for e in found.events)
    assert any("second: no context centre scores between 0.05" in e for e in found.events)
    vectors = found.vectors()
    torch.testing.assert_close(
        vectors[0], foreground_minus_context(kept, found.context.prototypes(0))
    )
    torch.testing.assert_close(vectors[1], unit_mean(found.foreground.prototypes(1)))
    torch.testing.assert_close(found.vectors(with_context=False)[0], unit_mean(kept))


def test_unit_centres_are_scored_by_the_plain_means_of_their_members() -> None:
    """A unit centre has lost the length on which the score relies."""
    long = 50 * torch.tensor([[1.0, 0.1, 0.0, 0.0]]).repeat(4, 1)
    settings = SETTINGS.model_copy(update={"clusters": 1, "centers": "unit"})
    found = made({(0, "foreground"): long}, settings)
    assert found.foreground.centers[0, 0].norm() == pytest.approx(1.0)
    assert found.foreground.scores[0, 0] == pytest.approx(1 / (1 + math.exp(-45)), abs=1e-6)


def test_restarts_take_the_prototypes_of_all_clusterings() -> None:
    places = {(0, "foreground"): rows(40), (0, "context"): rows(40, seed=1)}
    settings = SETTINGS.model_copy(update={"clusters": 4, "mu_f": 0.0, "init": "random"})
    once, thrice = (
        made(places, settings.model_copy(update={"restarts": restarts})) for restarts in (1, 3)
    )
    assert thrice.foreground.centers.shape == (2, 12, 4)
    assert torch.equal(thrice.foreground.centers[0, :4], once.foreground.centers[0])
    assert not torch.equal(thrice.foreground.centers[0, 4:8], thrice.foreground.centers[0, 8:])
    assert thrice.foreground.prototypes(0).shape == (12, 4)
    assert thrice.foreground.sizes[0].sum() == 3 * 40


def test_fewer_features_than_clusters() -> None:
    places = {(0, "foreground"): rows(2), (0, "context"): rows(9, seed=1)}
    found = made(places, classes=("few", "absent"))
    assert any("few: only 2 foreground features, fewer than K=3" in e for e in found.events)
    assert found.foreground.sizes[0].tolist() == [1, 1, 0]
    assert math.isnan(found.foreground.scores[0, 2])
    assert not found.foreground.keep[0, 2]
    assert any("absent: no image" in e for e in found.events)
    assert torch.equal(found.vectors()[1], torch.zeros(4))


@pytest.mark.parametrize(("count", "clusters"), [(3, 3), (30, 4), (250, 10), (2000, 36)])
def test_an_automatic_number_of_clusters(count: int, clusters: int) -> None:
    """One for 25 features, from 4 to 36, and no more than there are features."""
    settings = LpcamSettings.from_preset("adaptive", restarts=1)
    found = made({(0, "foreground"): rows(count), (0, "context"): rows(60)}, settings)
    assert (found.foreground.sizes[0] > 0).sum() == clusters
    assert (found.context.sizes[0] > 0).sum() == 4
    assert not any("fewer than K" in event for event in found.events)
    fixed = made({(0, "foreground"): rows(count)}, settings.fixed(clusters=5))
    assert (fixed.foreground.sizes[0] > 0).sum() == min(5, count)


def test_automatic_score_thresholds_follow_the_best_score() -> None:
    """0.9 of a best score of 0.6 is 0.54; the fixed 0.9 would keep nothing but the best."""

    def of_scores(*scores: float) -> torch.Tensor:
        """Rows of which each is a cluster of its own; two classes, the second has the logit 0."""
        own = torch.eye(4)[1 : 1 + len(scores)]
        own[:, 0] = torch.tensor(scores).logit()
        return own

    places = {
        (0, "foreground"): of_scores(0.6, 0.5, 0.55),
        (0, "context"): of_scores(0.53, 0.56, 0.04),
    }
    settings = LpcamSettings.from_preset("adaptive", restarts=1, clusters=3)
    weight = torch.eye(2, 4) * torch.tensor([[1.0], [0.0]])

    def kept(settings: LpcamSettings, side: str) -> list[float]:
        part = getattr(made(places, settings, weight), side)
        return sorted(round(score, 4) for score in part.scores[0][part.keep[0]].tolist())

    assert kept(settings, "foreground") == [0.55, 0.6]
    assert kept(settings, "context") == [0.53]  # 0.04 is below context_lower
    fixed = settings.fixed(mu_f=0.9, mu_b=0.9)
    assert kept(fixed, "foreground") == [0.6]
    assert kept(fixed, "context") == [0.53, 0.56]


def test_prototypes_do_not_depend_on_other_classes() -> None:
    places = {(0, "foreground"): rows(30), (0, "context"): rows(30, seed=1)}
    alone = made(places)
    places[1, "foreground"] = rows(30, seed=2)
    both = made(places)
    assert torch.equal(alone.foreground.centers[0], both.foreground.centers[0])


def test_threads_do_not_change_prototypes() -> None:
    places = {(c, side): rows(60, seed=c) for c in range(3) for side in ("foreground", "context")}
    settings = SETTINGS.model_copy(update={"centers": "unit", "restarts": 2})
    one, many = (
        made(places, settings, torch.eye(3, 4), ("a", "b", "c"), workers=workers)
        for workers in (1, 4)
    )
    assert torch.equal(one.vectors(), many.vectors())
    assert torch.equal(one.context.centers, many.context.centers)


def test_no_convergence_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    settings = SETTINGS.model_copy(update={"clusters": 12, "max_iterations": 1, "tolerance": 1e-9})
    made({(0, "foreground"): rows(500, 16)}, settings, torch.eye(2, 16))
    assert "1 of 1 clusterings stopped at max_iterations=1" in caplog.text


def test_classes_without_images_are_one_line_and_no_rows_of_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    names = tuple(f"class {index}" for index in range(1000))
    places = {(7, side): rows(9, seed=i) for i, side in enumerate(("foreground", "context"))}
    settings = SETTINGS.model_copy(update={"mu_f": 0.0, "context_lower": None})
    found = made(places, settings, torch.zeros(1000, 4), names)
    assert caplog.messages == ["prototypes of 1 of 1,000 classes"]
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert len(found.events) == 1
    few = made({(0, s): v for (_, s), v in places.items()}, settings, torch.zeros(1, 4), ("a",))
    for name, one in (("many", found), ("few", few)):
        one.save(tmp_path / name)
    assert (tmp_path / "many").stat().st_size < (tmp_path / "few").stat().st_size + 30_000
    again = Prototypes.load(tmp_path / "many")
    for side in ("foreground", "context"):
        for part in ("centers", "scores", "sizes", "keep"):
            one, other = (getattr(getattr(each, side), part) for each in (found, again))
            assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))
    assert torch.equal(found.vectors(classes=[7]), found.vectors())
    assert not found.vectors(classes=[8]).any()


def test_nothing_collected() -> None:
    with pytest.raises(PrototypeError, match="no class has any foreground"):
        made({})


@pytest.fixture
def prototypes() -> Prototypes:
    places = {(0, "foreground"): rows(9), (0, "context"): rows(9, seed=1)}
    made_by = {"preset": "voc12.official"}
    return made(places, classes=("sheep", "grass"), fingerprint="f" * 32, made_by=made_by)


def test_save_and_load(tmp_path: Path, prototypes: Prototypes) -> None:
    path = tmp_path / "p.safetensors"
    prototypes.save(path)
    first = path.read_bytes()
    prototypes.save(path)
    assert path.read_bytes() == first
    found = Prototypes.load(path, fingerprint="f" * 32)
    assert torch.equal(found.vectors(), prototypes.vectors())
    assert (found.classes, found.events) == (prototypes.classes, prototypes.events)
    assert found.made_by == {"preset": "voc12.official"}


def test_load_refuses_what_does_not_fit(tmp_path: Path, prototypes: Prototypes) -> None:
    path = tmp_path / "p.safetensors"
    prototypes.save(path)
    with pytest.raises(PrototypeError, match=rf"classifier {'f' * 32}, but this classifier is 0"):
        Prototypes.load(path, fingerprint="0")
    with pytest.raises(ArtefactError, match="missing"):
        Prototypes.load(tmp_path / "missing.safetensors")
    write_tensors(path, {"x": torch.ones(1)}, {"kind": "classifier"})
    with pytest.raises(ArtefactError, match="'classifier'"):
        Prototypes.load(path)
    write_tensors(path, {"x": torch.ones(1)}, {"kind": "prototypes"})
    with pytest.raises(ArtefactError, match="fit again"):
        Prototypes.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ArtefactError, match="damaged"):
        Prototypes.load(path)
