"""Cosine k-means: by hand, by its objective, and in the cases where the released program hangs."""

import logging

import pytest
import torch

from lpcam.clustering import cosine_kmeans


def blobs(seed: int = 0, each: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows around three directions, of very different lengths, and the truth."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(3).repeat_interleave(each)
    rows = torch.eye(3, 6)[truth] + 0.05 * torch.rand(3 * each, 6, generator=generator)
    return rows * (0.1 + 10 * torch.rand(3 * each, 1, generator=generator)), truth


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_step_by_hand() -> None:
    """Assignment is by angle; the centre is the plain mean, so that long rows weigh more."""
    rows = torch.tensor([[1.0, 0.0], [9.0, 3.0], [0.0, 1.0], [0.0, 5.0]])
    init = torch.tensor([[100.0, 0.0], [0.0, 0.01]])
    found = cosine_kmeans(rows, 2, init=init, max_iterations=1, tolerance_kind="relative")
    assert found.assignments.tolist() == [0, 0, 1, 1]
    assert found.centers.tolist() == [[5.0, 1.5], [0.0, 3.0]]
    assert found.sizes.tolist() == [2, 2]


def test_unit_centres_by_hand() -> None:
    rows = torch.tensor([[7.0, 0.0], [0.0, 2.0]])
    found = cosine_kmeans(rows, 1, init=torch.tensor([[1.0, 1.0]]), centers="unit")
    torch.testing.assert_close(found.centers, torch.full((1, 2), 0.5**0.5))
    assert found.means.tolist() == [[3.5, 1.0]]


@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("centers", ["mean", "unit"])
def test_blobs_are_found(init: str, centers: str) -> None:
    rows, truth = blobs()
    best = max(
        (
            cosine_kmeans(rows, 3, init=init, centers=centers, generator=generator(s))
            for s in range(5)
        ),
        key=lambda r: r.objective,
    )
    assert best.converged
    assert best.objective > 0.99
    for label in range(3):
        assert len(set(best.assignments[truth == label].tolist())) == 1


def test_objective_is_the_mean_cosine_to_the_centres() -> None:
    rows, _ = blobs()
    found = cosine_kmeans(rows, 3, generator=generator(), tolerance=1e-9)
    cosines = torch.cosine_similarity(rows, found.centers[found.assignments], dim=1)
    assert found.objective == pytest.approx(cosines.mean().item(), abs=1e-5)


def test_k_means_plus_plus_spreads_better_than_chance() -> None:
    rows, _ = blobs(each=30)

    def reached(init: str) -> float:
        found = [
            cosine_kmeans(rows, 3, init=init, generator=generator(s), max_iterations=1)
            for s in range(40)
        ]
        return sum(r.objective for r in found) / len(found)

    assert reached("k-means++") > reached("random") + 0.05


def test_chunks_do_not_matter() -> None:
    rows, _ = blobs()
    whole = cosine_kmeans(rows, 4, generator=generator())
    parts = cosine_kmeans(rows, 4, generator=generator(), chunk_bytes=64)
    assert torch.equal(whole.assignments, parts.assignments)
    torch.testing.assert_close(whole.centers, parts.centers)


def test_same_seed_same_bytes_other_seed_other_start() -> None:
    rows = torch.rand(200, 8, generator=generator(9))
    first, second, third = (cosine_kmeans(rows, 8, generator=generator(s)) for s in (1, 1, 2))
    assert torch.equal(first.centers, second.centers)
    assert not torch.equal(first.centers, third.centers)


def test_scale_of_all_rows_scales_the_centres() -> None:
    rows, _ = blobs()
    small = cosine_kmeans(rows, 3, generator=generator())
    large = cosine_kmeans(8 * rows, 3, generator=generator())
    assert torch.equal(small.assignments, large.assignments)
    torch.testing.assert_close(8 * small.centers, large.centers)


def test_permutation_of_rows_with_given_centres() -> None:
    rows, _ = blobs()
    order = torch.randperm(len(rows), generator=generator())
    plain = cosine_kmeans(rows, 3, init=rows[:3])
    shuffled = cosine_kmeans(rows[order], 3, init=rows[:3])
    assert torch.equal(plain.assignments[order], shuffled.assignments)
    torch.testing.assert_close(plain.centers, shuffled.centers)


def test_empty_clusters_are_repaired() -> None:
    """Equal first centres leave two clusters empty: the released program would never end."""
    rows, _ = blobs()
    found = cosine_kmeans(rows, 3, init=rows[:1].repeat(3, 1))
    assert found.sizes.min() >= 1
    assert found.sizes.sum() == len(rows)
    assert bool(torch.isfinite(found.centers).all())


def test_as_many_clusters_as_rows_and_equal_rows() -> None:
    rows = torch.ones(5, 3)
    for init in ("random", "k-means++"):
        found = cosine_kmeans(rows, 5, init=init)
        assert sorted(found.assignments.tolist()) == [0, 1, 2, 3, 4]
        assert torch.equal(found.centers, rows)


def test_zero_rows_do_not_make_nan() -> None:
    rows, _ = blobs()
    rows = torch.cat([rows, torch.zeros(4, 6)])
    for centers in ("mean", "unit"):
        found = cosine_kmeans(rows, 3, centers=centers)
        assert bool(torch.isfinite(found.centers).all())


def test_signed_rows() -> None:
    rows = torch.randn(100, 5, generator=generator())
    found = cosine_kmeans(rows, 4)
    cosines = torch.cosine_similarity(rows[:, None], found.centers[None], dim=2)
    assert torch.equal(cosines.argmax(1), found.assignments) or found.objective > 0.5


def test_no_convergence_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    rows = torch.rand(500, 16, generator=generator())
    with caplog.at_level(logging.WARNING):
        found = cosine_kmeans(rows, 12, max_iterations=1)
    assert not found.converged
    assert found.iterations == 1
    assert "stopped at max_iterations=1" in caplog.text


@pytest.mark.parametrize(
    ("rows", "clusters", "message"),
    [
        (torch.rand(3, 2), 4, "got 3 rows for 4"),
        (torch.rand(3, 2), 0, "got 3 rows for 0"),
        (torch.rand(3), 1, r"got torch.float32 of shape \(3,\)"),
        (torch.ones(3, 2, dtype=torch.int64), 1, "got torch.int64"),
        (torch.tensor([[1.0, float("nan")]]), 1, "NaN or Inf"),
        (torch.tensor([[1.0, float("inf")]]), 1, "NaN or Inf"),
    ],
)
def test_bad_rows(rows: torch.Tensor, clusters: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cosine_kmeans(rows, clusters)


def test_bad_choices() -> None:
    rows = torch.rand(5, 2)
    with pytest.raises(ValueError, match="unknown init 'middle'"):
        cosine_kmeans(rows, 2, init="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown centers 'median'"):
        cosine_kmeans(rows, 2, centers="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"first centres of shape \(2, 2\), got \(3, 2\)"):
        cosine_kmeans(rows, 2, init=rows[:3])
