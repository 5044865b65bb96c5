"""Work on several images at a time, on threads that each compute with one CPU thread.

A result does not depend on the number of threads, and two images keep two processors busy.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from lpcam.runtime.progress import progress

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 2  #: Results that may wait for the caller, for each worker; more would only use memory.


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Call a function for every item on several threads; yield the results in order.

    The first error in order is raised once the calls under way have ended.
    """
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


def progress_map(
    label: str, function: Callable[[T], R], items: Collection[T], workers: int
) -> Iterator[R]:
    """As `ordered_map`, with the progress shown."""
    with progress(label, len(items)) as advance:
        for result in ordered_map(function, items, workers):
            advance(1, "")
            yield result


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one CPU thread; restore the caller's number afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
