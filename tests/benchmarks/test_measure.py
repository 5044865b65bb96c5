"""The contract of measuring: order, spread, verdicts, tables, processes."""

from __future__ import annotations

import pytest

from benchmarks import measure


def test_contenders_take_turns_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    seconds = measure.interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repetitions=2, warm_up=1
    )
    assert [sorted(calls[i : i + 2]) for i in (0, 2, 4)] == [["a", "b"]] * 3
    assert calls[2:4] != calls[4:6]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_quick_contender_is_called_several_times() -> None:
    calls: list[int] = []
    measure.interleaved({"a": lambda: calls.append(1)}, repetitions=1, warm_up=0, at_least=0.01)
    assert len(calls) > 1


def test_spread_is_median_and_quartiles() -> None:
    spread = measure.Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (spread.low, spread.median, spread.high, spread.count) == (2.0, 3.0, 4.0, 5)
    assert measure.Spread.of([2.0]) == measure.Spread(2.0, 2.0, 2.0, 1)


def test_ratios_are_of_neighbours() -> None:
    # The machine became ten times as slow in between: the ratio stays.
    assert measure.ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]).median == 2.0


@pytest.mark.parametrize(
    ("value", "goal", "word"),
    [
        (2.0, {"at_least": 2.0}, "met"),
        (1.99, {"at_least": 2.0}, "missed"),
        (1.03, {"at_most": 1.03}, "met"),
        (1.04, {"at_most": 1.03}, "missed"),
    ],
)
def test_verdict(value: float, goal: dict[str, float], word: str) -> None:
    assert f"**{word}**" in measure.verdict(value, **goal)


def test_seconds_have_a_fitting_unit() -> None:
    assert measure.show_seconds(measure.Spread.of([0.0123])) == "12.3 ms"
    assert measure.show_seconds(measure.Spread.of([10.0])) == "10 s"
    assert measure.show_seconds(measure.Spread.of([1e-5])) == "10 µs"


def test_a_process_has_its_threads_and_a_failure_is_told() -> None:
    assert measure.in_process("torch:get_num_threads", 1) == 1
    with pytest.raises(measure.BenchmarkError, match=r"nothing_there"):
        measure.in_process("benchmarks.measure:nothing_there", 1)
