"""Sharing out work: in order, bounded, stopped by an error, and every image exactly once."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lpcam.data.dataset import Item
from lpcam.runtime.distributed import Processes, Sharing
from lpcam.runtime.parallel import AHEAD, ordered_map, progress_map


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    def slow_first(number: int) -> int:
        time.sleep(0.01 * (number % 3 == 0))
        return number * number

    assert list(ordered_map(slow_first, range(20), workers)) == [n * n for n in range(20)]
    assert list(ordered_map(slow_first, [], workers)) == []
    assert list(progress_map("squares", slow_first, range(5), workers)) == [0, 1, 4, 9, 16]


def test_workers_work_at_the_same_time() -> None:
    """Three calls that wait for each other would never end on two threads."""
    barrier = threading.Barrier(3, timeout=300)
    assert len(list(ordered_map(lambda _: barrier.wait(), range(6), 3))) == 6


@pytest.mark.parametrize(("workers", "ahead"), [(1, 0), (2, 2 * AHEAD), (3, 3 * AHEAD)])
def test_an_endless_source_is_read_a_bounded_way_ahead(workers: int, ahead: int) -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in itertools.count(1):
            taken.append(number)
            yield number

    results = ordered_map(lambda number: number, source(), workers)
    for expected in range(1, 30):
        assert next(results) == expected
        assert len(taken) <= expected + ahead
    results.close()  # type: ignore[attr-defined]
    assert len(taken) <= 29 + ahead


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_error_in_order_ends_it(workers: int) -> None:
    failed = threading.Event()
    begun: list[int] = []
    ended: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        try:
            if number == 2:
                failed.set()
                raise ValueError("two")
            if number == 1:
                if workers > 1:
                    assert failed.wait(300)  # the later item fails first
                raise KeyError("one")
            time.sleep(0.05)
            return number
        finally:
            ended.append(number)

    results = ordered_map(work, itertools.count(), workers)
    assert next(results) == 0
    with pytest.raises(KeyError, match="one"):
        next(results)
    assert sorted(begun) == sorted(ended)  # those under way were waited for
    assert max(begun) <= 1 + AHEAD * workers
    assert begun == [0, 1] or workers > 1
    count = len(begun)
    time.sleep(0.1)
    assert len(begun) == count
    assert list(results) == []


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("end", ["whole", "closed", "error"])
def test_each_call_has_one_thread_of_numerics(workers: int, end: str) -> None:
    torch.set_num_threads(2)

    def threads(number: int) -> int:
        if end == "error" and number == 3:
            raise ValueError("three")
        return torch.get_num_threads()

    results = ordered_map(threads, range(6), workers)
    assert torch.get_num_threads() == 2  # nothing happens before the first result is wanted
    assert next(results) == 1
    if end == "whole":
        assert list(results) == [1] * 5
    elif end == "closed":
        results.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(ValueError, match="three"):
            list(results)
    assert torch.get_num_threads() == 2


def named(*names: str) -> list[Item]:
    return [Item(name, Path(name), ()) for name in names]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("batch", [1, 2, 4, 100])
def test_every_image_is_in_one_process_and_one_batch(seed: int, batch: int) -> None:
    rng, items = np.random.default_rng(seed), named(*(f"i{number}" for number in range(41)))
    every = [(5, 7), (7, 5), (6, 7), (5, 8)]
    sizes = {item.id: every[rng.integers(4)] for item in items}
    owner = {item.id: int(rng.integers(3)) for item in items}
    found = []
    for rank in range(3):
        sharing = Sharing(Processes(rank, 3), 1, batch, sizes, owner)
        mine = sharing.mine(items)
        assert mine == [item for item in items if item in mine]  # in order
        batches = sharing.batches(mine)
        for one in batches:
            assert 1 <= len(one) <= batch
            assert len({sizes[item.id] for item in one}) == 1
        of_size = [sum(sizes[item.id] == size for item in mine) for size in set(sizes.values())]
        assert len(batches) == sum(-(-count // batch) for count in of_size)  # as few as can be
        if batch == 1:
            assert batches == [[item] for item in mine]
        found += [item.id for one in batches for item in one]
    assert sorted(found) == sorted(item.id for item in items)


def test_what_nobody_owns_is_done_by_the_first() -> None:
    items = named(*"abc")
    assert Sharing().mine(items) == items
    assert Sharing(batch=2).batches(items) == [items[:2], items[2:]]  # unknown sizes are one size
    first, second = (Sharing(Processes(rank, 2), owner={"b": 1}).mine(items) for rank in (0, 1))
    assert (first, second) == ([items[0], items[2]], [items[1]])
