"""Alone among no others: nothing to wait for; what several need is said. No real groups here."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lpcam.runtime import distributed as processes
from lpcam.runtime.distributed import Processes, is_first, join, leave
from lpcam.runtime.errors import LpcamError, RecipeError


@pytest.fixture
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_torchrun")
def test_alone() -> None:
    alone, device = join("auto")
    assert (alone.rank, alone.count, alone.here, alone.first) == (0, 1, 1, True)
    assert device is None  # it may choose
    assert join("cuda:1")[1] is None
    assert is_first()
    alone.wait()
    tensor = torch.arange(3)
    assert alone.sum(tensor) is tensor
    module = nn.Linear(2, 2)
    assert alone.replicate(module) is module
    leave()
    assert not torch.distributed.is_initialized()


def test_the_first_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert is_first()  # what is left in the environment of a process alone means nothing
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_first()
    monkeypatch.setenv("RANK", "0")
    assert is_first()


def test_several_processes_need_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)  # as if it were not installed
    with pytest.raises(LpcamError, match=r"need accelerate .*pip install 'lpcam\[distributed\]'"):
        join("auto")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "need a GPU each, but there are 1; start fewer"),
        ("cuda:1", "'cuda:1' names one GPU for all .*use 'auto' or 'cuda'"),
        ("banana", "'banana' cannot be"),
    ],
)
def test_devices_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, device: str, message: str
) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=message):
        join(device)


@pytest.mark.parametrize(("device", "on_cpu"), [("cpu", True), ("auto", False), ("cuda", False)])
def test_each_process_gets_its_place_and_device(
    monkeypatch: pytest.MonkeyPatch, device: str, *, on_cpu: bool
) -> None:
    """What accelerate and torch.distributed are asked for, with stand-ins for both."""
    accelerate = pytest.importorskip("accelerate")
    asked = []

    class State:
        process_index, num_processes, device = 1, 4, torch.device("meta")

        def __init__(self, **options: object) -> None:
            asked.append(options)

    monkeypatch.setattr(accelerate, "PartialState", State)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **options: options)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found, own = join(device)
    assert (found.rank, found.count, found.here) == (1, 4, 2)
    assert own == State.device
    assert asked == [{"cpu": on_cpu, "timeout": processes.PATIENCE}]
    assert found.group["backend"] == "gloo"  # waiting must not occupy a GPU


def test_a_sum_leaves_its_own_share_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(tensor: torch.Tensor, group: object) -> None:
        assert group == "all"
        tensor.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", double)
    share = torch.arange(3)
    assert Processes(0, 2, group="all").sum(share).tolist() == [0, 2, 4]
    assert share.tolist() == [0, 1, 2]
