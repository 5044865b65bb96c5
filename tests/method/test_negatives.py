"""Fire rates, margins and rejections: hand-made features whose right rejection is known."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lpcam.method.choices import Choice
from lpcam.method.extractors import LPCAM
from lpcam.method.negatives import Seen, best_cosines, compare, fire_rates, margins
from lpcam.method.prototypes import Centers, Prototypes
from lpcam.method.settings import LpcamSettings, NegativeSettings
from lpcam.runtime.errors import ClassifierError

COW, HORN, WALL, GRASS = torch.eye(4)
BOTH = NegativeSettings(reject_by="all")
FOLDER = NegativeSettings(reject_by="folder")


def centers(*rows: Tensor, kept: int | None = None) -> Centers:
    """Centres of one class, of which the first ``kept`` are prototypes."""
    number = len(rows)
    keep = torch.arange(number)[None] < (number if kept is None else kept)
    sizes = torch.full((1, number), 5)
    return Centers(torch.stack(rows)[None], torch.full((1, number), 0.9), sizes, keep)


@pytest.fixture
def prototypes() -> Prototypes:
    """A cow whose second prototype is a wall, and whose fourth centre is no prototype."""
    foreground = centers(COW, WALL, 2 * HORN, GRASS, kept=3)
    return Prototypes(("cow",), foreground, centers(GRASS), "f" * 32, {})


def see(prototypes: Prototypes, labels: list[int] | None, *places: Tensor) -> Seen:
    best = best_cosines(torch.stack(places, dim=1)[:, None], prototypes.foreground.centers[0])
    return labels, {0: best}


@pytest.fixture
def own(prototypes: Prototypes) -> list[Seen]:
    """Two images of the cow: before the wall, and on grass."""
    return [
        see(prototypes, [0], COW + 0.1 * HORN, HORN, WALL, WALL),
        see(prototypes, [0], COW, HORN, GRASS, 0.2 * COW + WALL),
    ]


def dropped(prototypes: Prototypes) -> list[int]:
    assert all(one.action == "drop" and one.by == "negatives" for one in prototypes.choices)
    return [one.index for one in prototypes.choices]


def test_best_place_is_compared_without_regard_to_length() -> None:
    features = torch.stack([5 * COW + 5 * WALL, 0.1 * HORN], dim=1)[:, None]
    best = best_cosines(features, torch.stack([COW, HORN, 3 * WALL, GRASS]))
    torch.testing.assert_close(best, torch.tensor([0.5**0.5, 1, 0.5**0.5, 0]))


def test_fire_rates_count_pairs_of_images() -> None:
    generator = torch.Generator().manual_seed(0)
    without, having = (torch.rand(n, 3, generator=generator).mul(9).round() for n in (7, 5))
    pairs = without[:, None] - having[None]
    expected = ((pairs > 0).float() + (pairs == 0).float() / 2).mean((0, 1))
    torch.testing.assert_close(fire_rates(without, having), expected)


def test_margins_look_at_the_hardest_images() -> None:
    without, having = torch.tensor([[0.9], *[[0.1]] * 9]), torch.tensor([[0.9], [0.7]])
    assert margins(without, having, 0.1).item() == pytest.approx(-0.1)
    assert margins(without, having, 1.0).item() == pytest.approx(0.62)
    assert margins(without[:3], having, 0.1).item() == pytest.approx(-0.1)  # one at least


def test_walls_without_a_cow_reject_the_wall(prototypes: Prototypes, own: list[Seen]) -> None:
    walls = [see(prototypes, None, WALL, GRASS), *[see(prototypes, None, GRASS)] * 9]
    made = compare(prototypes, [*own, *walls], FOLDER)
    assert dropped(made) == [1]
    assert not compare(prototypes, [*own, *walls], NegativeSettings()).choices
    assert made.foreground.keep.tolist() == [[True, False, True, False]]
    assert made.foreground.fire is not None
    rates = made.foreground.fire[0]
    assert rates[0] == 0 and rates[1] > 0 and rates[3] > 0.5
    assert made.vectors()[0].tolist() == [0.5, 0.5, 0, -1]
    assert prototypes.foreground.fire is None and not prototypes.choices


def test_images_of_the_data_set_measure_and_reject_if_asked(
    prototypes: Prototypes, own: list[Seen]
) -> None:
    others = [see(prototypes, [1], WALL), see(prototypes, [], WALL, GRASS)]
    measured = compare(prototypes, [*own, *others], FOLDER)
    assert not measured.choices and measured.foreground.fire is not None
    assert measured.foreground.fire[0, 1] > 0.5
    assert dropped(compare(prototypes, [*own, *others], BOTH)) == [1]


@pytest.mark.parametrize(("keep", "left"), [(0.0, 1), (0.5, 2), (0.7, 3), (1.0, 3)])
def test_the_best_prototypes_stay(
    prototypes: Prototypes, own: list[Seen], keep: float, left: int
) -> None:
    # the data set rejects all but the horn, the folder the horn
    others = [see(prototypes, [1], 9 * COW + HORN, WALL)]
    folder = [see(prototypes, None, HORN, WALL)]
    settings = NegativeSettings(reject_by="all", keep=keep, margin=1.0)
    made = compare(prototypes, [*own, *others, *folder], settings)
    assert made.foreground.keep.sum() == left


def test_negatives_that_show_everything_reject_nothing(
    prototypes: Prototypes, own: list[Seen]
) -> None:
    everything = see(prototypes, None, COW, HORN, WALL, GRASS)
    made = compare(prototypes, [*own, everything], FOLDER)
    assert not made.choices and "cow" in made.events[-1]


def test_nothing_to_compare_with(prototypes: Prototypes, own: list[Seen]) -> None:
    made = compare(prototypes, own, BOTH)
    assert not made.choices and made.foreground.fire is not None
    assert made.foreground.fire.isnan().all()


def test_a_person_wins(prototypes: Prototypes, own: list[Seen]) -> None:
    made = compare(prototypes, [*own, see(prototypes, None, WALL)], FOLDER)
    kept = made.with_choices([Choice("cow", "foreground", 1, "keep")])
    assert kept.foreground.keep[0, 1] and kept.choices[0].by == "person"


def test_fire_rates_are_saved(prototypes: Prototypes, own: list[Seen], tmp_path: Path) -> None:
    made = compare(prototypes, [*own, see(prototypes, None, WALL)], FOLDER)
    more = replace(
        made,
        classes=("dog", "cow"),
        foreground=made.foreground.spread(2, [1]),
        context=made.context.spread(2, [1]),
    )
    more.save(tmp_path / "p.safetensors")  # only the class that has centres
    rates = Prototypes.load(tmp_path / "p.safetensors").foreground.fire
    assert rates is not None and made.foreground.fire is not None
    assert rates[0].isnan().all() and torch.equal(rates[1], made.foreground.fire[0])


def picture(*colours: Tensor) -> Tensor:
    """An image (3, 64, 64) whose columns have these colours, an equal share each."""
    columns = torch.stack(colours, dim=1).repeat_interleave(64 // len(colours), dim=1)
    return columns[:, None].expand(3, 64, 64)


@pytest.mark.parametrize("labelled", [False, True])
def test_fit_with_negatives(labelled: bool) -> None:
    red, green, blue = torch.eye(3)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3).repeat(2, 1)[:, :, None, None])
        model[3].weight.copy_(torch.tensor([[9.0, 9.0, -9.0], [-9.0, -9.0, 9.0]]).repeat(1, 2))
    images = torch.stack([picture(red, green), picture(red, red, green, green), picture(blue)])
    settings = LpcamSettings.from_preset("frozen", clusters=2, restarts=1, scales=(1.0,))
    lpcam = LPCAM(model, settings, target_layer="0")
    loader = [(images, torch.tensor([0, 0, 1]))]
    plain = lpcam.fit(loader)(images[:1], present=False)[0, 0]
    assert plain[0, 0] > 0.5 and plain[0, -1] > 0.5  # cow before a green wall
    walls = torch.stack([picture(green), picture(green)])
    lpcam.fit(loader, negatives=[(walls, [0, 0])] if labelled else [walls])
    assert [one.by for one in lpcam.prototypes_.choices] == ["negatives"]
    maps = lpcam(images[:1])[0, 0]
    assert maps[0, 0] > 0.5 and maps[0, -1] == 0
    assert lpcam.fit(loader).prototypes_.foreground.fire is None
    with pytest.raises(ClassifierError, match="iterator"):
        lpcam.fit(loader, negatives=iter([walls]))


def test_negatives_train_a_new_head() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loader = [(images, torch.tensor([0, 1, 0, 1]))]
    heads = [
        LPCAM(backbone, "frozen", classes=("a", "b"), target_layer="1")
        .fit(loader, more)
        .source_.weight
        for more in (None, [images.flip(0) * 0.5])
    ]
    assert not torch.equal(*heads)
