"""The training loop's order, schedule and windows; the loop itself is tested by what it trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lpcam.runtime.distributed import Processes
from lpcam.training import loop as engine
from lpcam.training.augmentation import mirror_and_crop, random_window
from lpcam.training.optim import parameter_groups, poly


def plan(batch: int, steps: int, accumulation: int = 1) -> engine.Plan:
    return engine.Plan(steps, batch, 1, lambda _: 1.0, accumulation)


def test_order_of_an_epoch() -> None:
    def batches(first_step: int, seed: int = 0) -> list[list[engine.Place]]:
        return list(engine.Order(11, plan(3, 6), seed, first_step, Processes()))

    whole = batches(0)
    assert [len(batch) for batch in whole] == [3] * 6  # the incomplete fourth batch is dropped
    assert [{place.step for place in batch} for batch in whole] == [{step} for step in range(6)]
    for epoch in (0, 1):
        part = [place for batch in whole[3 * epoch : 3 * epoch + 3] for place in batch]
        assert {place.epoch for place in part} == {epoch}
        assert len({place.sample for place in part}) == 9
    assert [p.sample for b in whole[:3] for p in b] != [p.sample for b in whole[3:] for p in b]
    assert whole != batches(0, seed=1)
    for step in range(7):
        assert batches(step) == whole[step:]
    few = list(engine.Order(2, plan(16, 1), 0, 0, Processes()))
    assert sorted(few[0]) == [(0, 0, 0), (0, 1, 0)]


def test_sub_batches_make_up_the_batches() -> None:
    whole = list(engine.Order(11, plan(4, 5), 3, 1, Processes()))
    parts = list(engine.Order(11, plan(4, 5, accumulation=2), 3, 1, Processes()))
    assert [len(part) for part in parts] == [2] * 8
    assert [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)] == whole


def test_poly_by_hand() -> None:
    assert poly(50, 100, 0.9) == pytest.approx(0.5358867313)
    assert poly(25, 100, 1.0) == 0.75


@pytest.mark.parametrize("first_step", [0, 2, 5])
@pytest.mark.parametrize("count", [2, 3])
def test_shares_of_the_processes_make_up_the_batches(count: int, first_step: int) -> None:
    whole = list(engine.Order(11, plan(4, 6), 7, first_step, Processes()))
    shares = [
        list(engine.Order(11, plan(4, 6), 7, first_step, Processes(rank, count)))
        for rank in range(count)
    ]
    assert len(whole) == 6 - first_step
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(place for part in parts for place in part) == sorted(batch)
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        assert min(lengths) > 0


@pytest.mark.parametrize(("length", "crop"), [(9, 4), (4, 9), (5, 5)])
def test_random_window(length: int, crop: int) -> None:
    """Every place occurs, and the shorter axis is taken or filled whole."""
    generator = np.random.default_rng(0)
    starts = set()
    for _ in range(100):
        source, target = random_window(length, crop, generator)
        assert source.stop - source.start == target.stop - target.start == min(length, crop)
        assert 0 <= source.start <= source.stop <= length
        assert 0 <= target.start <= target.stop <= crop
        starts.add(source.start + target.start)
    assert starts == set(range(abs(length - crop) + 1))


@pytest.mark.parametrize("size", [(7, 12), (3, 4), (9, 2)])
def test_mirror_and_crop_moves_all_planes_alike(size: tuple[int, int]) -> None:
    numbers = torch.arange(1, 1 + size[0] * size[1]).reshape(size)
    planes = [(torch.stack([numbers, -numbers]).float(), 0), (numbers.to(torch.uint8), 255)]
    mirrored = set()
    for seed in range(40):
        image, label = mirror_and_crop(planes, 5, np.random.default_rng(seed))
        assert image.dtype == torch.float32 and label.dtype == torch.uint8
        assert image.shape == (2, 5, 5) and label.shape == (5, 5)
        inside = label != 255
        assert torch.equal(image[0][inside], label[inside].float())
        assert torch.equal(image[0], -image[1])
        assert not image[:, ~inside].any()
        assert int(inside.sum()) == min(size[0], 5) * min(size[1], 5)
        steps = label.int().diff(dim=1)[inside[:, 1:] & inside[:, :-1]].unique().tolist()
        assert steps in ([1], [-1])
        mirrored.add(steps[0])
    assert mirrored == {1, -1}


def test_groups_of_one_rate_and_decay() -> None:
    network = nn.ModuleDict(
        {"old": nn.Linear(2, 3), "new": nn.Linear(3, 4), "still": nn.Linear(1, 1)}
    )
    network["still"].requires_grad_(False)
    found = {
        tuple(p.shape for p in group["params"]): (group["lr"], group["weight_decay"])
        for group in parameter_groups(
            network, lambda name, p: (1.0 if name.startswith("new.") else 0.1, p.ndim / 4)
        )
    }
    assert found == {
        ((3, 2),): (0.1, 0.5),
        ((3,),): (0.1, 0.25),
        ((4, 3),): (1.0, 0.5),
        ((4,),): (1.0, 0.25),
    }
