"""Work on several images at a time: shared out among processes, threads and batches.

A convolution of one image hardly fills two processors; two images on two processors do. Each thread
has one thread of numerics for itself, so a result does not depend on how many there are.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from lpcam.runtime.distributed import Processes

T = TypeVar("T")


R = TypeVar("R")


class Identified(Protocol):
    """Something that is known by an id, such as an image."""

    @property
    def id(self) -> str:
        """Name of it in every list."""


Identity = TypeVar("Identity", bound=Identified)


AHEAD = 2
"""Results that may wait, for each worker; more would only hold memory."""


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """``function`` of every item, on ``workers`` threads, yielded in the order of the items.

    Every call runs with one thread of numerics, whatever ``workers`` is, and the caller's number of
    threads is set again at the end. At most ``AHEAD * workers`` results wait for the caller, so
    ``items`` may be endless. PyTorch's inference mode belongs to a thread: ``function`` must enter
    it itself.

    Raises:
        ValueError: if ``workers`` is less than 1.
        Exception: that of the first item, in order, whose call failed; no further call is begun,
            and those under way are waited for.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    return _ordered_map(function, items, workers)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of numerics, so that rounding does not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    if workers == 1:
        with one_thread():
            yield from map(function, items)
        return
    threads = torch.get_num_threads()
    source = iter(items)
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers, "lpcam", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item in itertools.islice(source, AHEAD * workers):
            waiting.append(pool.submit(function, item))
        while waiting:
            result = waiting.popleft().result()
            for item in itertools.islice(source, 1):
                waiting.append(pool.submit(function, item))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        # A worker's setting reaches some libraries of the whole process.
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Sharing:
    """How the images of a run are shared out.

    An image belongs to the same process in every stage, so that the features that a process keeps
    are those that it needs again.
    """

    processes: Processes = field(default_factory=Processes)
    workers: int = 1
    """Threads of this process, a batch each."""
    batch: int = 1
    """Most images of equal size that pass the backbone together."""
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """(height, width) of each image by id; those that are not in it count as of one size."""
    owner: Mapping[str, int] = field(default_factory=dict)
    """Rank of the process that does an image, by id; those that are not in it are the first's."""

    def mine(self, items: Iterable[Identity]) -> list[Identity]:
        """The images that this process does."""
        return [item for item in items if self.owner.get(item.id, 0) == self.processes.rank]

    def batches(self, items: Sequence[Identity]) -> list[list[Identity]]:
        """Batches of images of exactly equal size; with ``batch`` 1 in the order of the items."""
        batches: list[list[Identity]] = []
        latest: dict[tuple[int, int] | None, list[Identity]] = {}
        for item in items:
            size = self.sizes.get(item.id)
            if size not in latest or len(latest[size]) == self.batch:
                latest[size] = []
                batches.append(latest[size])
            latest[size].append(item)
        return batches

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """:func:`ordered_map` on the threads of this process."""
        return ordered_map(function, items, self.workers)
