"""The forms of the walk agree, and the table is printed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import walk


def test_forms_walk_alike() -> None:
    maps, edge = walk.inputs(14, 17, 2, "cpu")
    expected = walk.dense(maps.double(), edge.double()).float()
    assert float((expected - maps).abs().max()) > 0.1
    for name, make in walk.contenders(maps, edge).items():
        torch.testing.assert_close(make(), expected, atol=walk.TOLERANCE, rtol=0, msg=name)


def test_dense_matrix_has_columns_of_sum_one() -> None:
    matrix = walk.dense_matrix(walk.inputs(9, 11, 1, "cpu")[1])
    torch.testing.assert_close(matrix.sum(0), torch.ones(99))
    assert int((matrix > 0).sum(0).max()) == 69


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert walk.main(["--quick", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("## Walk")
    for name in (*walk.contenders(*walk.inputs(8, 8, 1, "cpu")), walk.DENSE):
        assert f"| {name} |" in printed
    assert "**" not in printed  # a quick run judges nothing
