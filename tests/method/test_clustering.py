"""Cosine k-means: by hand, by its objective, and where the released program does not end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lpcam.method import clustering
from lpcam.method.clustering import Clusters, CosineKMeans, cosine_kmeans


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(seed: int = 0, each: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around three directions, of very different lengths, and the truth."""
    source = generator(seed)
    truth = torch.arange(3).repeat_interleave(each)
    points = torch.eye(3, 6)[truth] + 0.05 * torch.rand(3 * each, 6, generator=source)
    return points * (0.1 + 10 * torch.rand(3 * each, 1, generator=source)), truth


def assert_same(first: Clusters, second: Clusters) -> None:
    assert torch.equal(first.assignments, second.assignments)
    assert torch.equal(first.sizes, second.sizes)
    assert (first.iterations, first.converged) == (second.iterations, second.converged)
    torch.testing.assert_close(first.centers, second.centers)
    torch.testing.assert_close(first.means, second.means)
    assert first.objective == pytest.approx(second.objective, abs=1e-6)


def test_one_step_by_hand() -> None:
    """Assignment is by angle; the centre is the plain mean, so that long points weigh more."""
    points = torch.tensor([[1.0, 0.0], [9.0, 3.0], [0.0, 1.0], [0.0, 5.0]])
    init = torch.tensor([[100.0, 0.0], [0.0, 0.01]])
    found = cosine_kmeans(points, 2, init=init, max_iterations=1)
    assert found.assignments.tolist() == [0, 0, 1, 1]
    assert found.centers.tolist() == [[5.0, 1.5], [0.0, 3.0]]
    assert found.sizes.tolist() == [2, 2]
    assert (found.iterations, found.converged) == (1, False)


def test_unit_centres_by_hand() -> None:
    points = torch.tensor([[7.0, 0.0], [0.0, 2.0]])
    found = cosine_kmeans(points, 1, init=torch.tensor([[1.0, 1.0]]), centers="unit")
    torch.testing.assert_close(found.centers, torch.full((1, 2), 0.5**0.5))
    assert found.means.tolist() == [[3.5, 1.0]]


@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("centers", ["mean", "unit"])
def test_blobs_are_found(init: Any, centers: Any) -> None:
    points, truth = blobs()
    found = CosineKMeans(init, centers).fit(points, 3, [generator(seed) for seed in range(5)])
    best = max(found, key=lambda one: one.objective)
    assert best.converged
    assert best.objective > 0.99
    for label in range(3):
        assert len(set(best.assignments[truth == label].tolist())) == 1


def test_objective_is_the_mean_cosine_to_the_centres() -> None:
    points, _ = blobs()
    found = cosine_kmeans(points, 3, generator=generator(), tolerance=1e-9)
    cosines = torch.cosine_similarity(points, found.centers[found.assignments], dim=1)
    assert found.objective == pytest.approx(cosines.mean().item(), abs=1e-5)


def test_k_means_plus_plus_spreads_better_than_chance() -> None:
    points, _ = blobs(each=30)
    seeds = range(40)
    spread, random = (
        CosineKMeans(init, max_iterations=1).fit(points, 3, [generator(s) for s in seeds])
        for init in ("k-means++", "random")
    )
    gains = [a.objective - b.objective for a, b in zip(spread, random, strict=True)]
    assert sum(gains) / len(gains) > 0.05


@pytest.mark.parametrize("centers", ["mean", "unit"])
def test_neither_chunks_nor_other_restarts_matter(
    centers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = torch.rand(200, 6, generator=generator(), dtype=torch.float64) - 0.2
    points[3] = 0.0
    alone = [
        CosineKMeans("random", centers, tolerance=1e-9).fit(points, 4, [generator(seed)])[0]
        for seed in range(3)
    ]
    for chunk_bytes in (2**20, 200):
        monkeypatch.setattr(clustering, "CPU_CHUNK_BYTES", chunk_bytes)
        method = CosineKMeans("random", centers, tolerance=1e-9)
        together = method.fit(points, 4, [generator(seed) for seed in range(3)])
        for one, other in zip(together, alone, strict=True):
            assert_same(one, other)


def test_same_seed_same_bytes_other_seed_other_start() -> None:
    points = torch.rand(200, 8, generator=generator(9))
    first, second, third = (cosine_kmeans(points, 8, generator=generator(s)) for s in (1, 1, 2))
    assert torch.equal(first.centers, second.centers)
    assert not torch.equal(first.centers, third.centers)


def test_empty_clusters_are_filled() -> None:
    """Equal first centres leave two clusters empty: the released program would never end."""
    points, _ = blobs()
    found = cosine_kmeans(points, 3, init=points[:1].repeat(3, 1))
    assert found.sizes.min() >= 1
    assert found.sizes.sum() == len(points)
    assert bool(torch.isfinite(found.centers).all())


@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_as_many_clusters_as_equal_points(init: Any) -> None:
    points = torch.ones(5, 3)
    found = cosine_kmeans(points, 5, init=init)
    assert sorted(found.assignments.tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(found.centers, points)


@pytest.mark.parametrize("centers", ["mean", "unit"])
def test_zero_points_do_not_make_nan(centers: Any) -> None:
    points = torch.cat([blobs()[0], torch.zeros(4, 6)])
    assert bool(torch.isfinite(cosine_kmeans(points, 3, centers=centers).centers).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    points, _ = blobs(each=400)
    half = cosine_kmeans(points.to(dtype), 3, generator=generator())
    assert half.centers.dtype == torch.float32
    assert_same(half, cosine_kmeans(points.to(dtype).float(), 3, generator=generator()))
    near = cosine_kmeans(points, 3, generator=generator())
    assert half.objective == pytest.approx(near.objective, abs=1e-3)


@pytest.mark.parametrize("centers", ["mean", "unit"])
def test_centres_are_the_means_of_their_members_after_many_iterations(
    centers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are updated by the points that move; in double precision no rounding hides an error."""
    monkeypatch.setattr(clustering, "CPU_CHUNK_BYTES", 4000)
    points = torch.rand(3000, 6, generator=generator(), dtype=torch.float64) - 0.2
    found = cosine_kmeans(points, 12, centers=centers, tolerance=1e-12)
    assert found.iterations > 10
    rows = points if centers == "mean" else torch.nn.functional.normalize(points, dim=1)
    for cluster in range(12):
        members = found.assignments == cluster
        assert int(members.sum()) == found.sizes[cluster]
        torch.testing.assert_close(found.means[cluster], points[members].mean(0))
        mean = rows[members].mean(0)
        expected = mean if centers == "mean" else mean / mean.norm()
        torch.testing.assert_close(found.centers[cluster], expected)


def test_the_rest_of_a_much_larger_sum_keeps_its_digits() -> None:
    values = torch.rand(2000, 2, generator=generator())
    values[10:] = 1e6 * values[10:].flip(1) + torch.tensor([0.0, 1e7])
    values[:10, 0] += 5.0
    points = clustering._Points(values, 2)
    whole = points.assign(torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]]), "mean")
    left = points.assign(torch.eye(2)[None], "mean", whole)
    assert (whole.sizes.tolist(), left.sizes.tolist()) == ([[2000, 0]], [[10, 1990]])
    torch.testing.assert_close(left.sums[0, 0], values[:10].sum(0))


@pytest.mark.parametrize(
    ("points", "k", "message"),
    [
        (torch.ones(3, 2), 4, "k is 4"),
        (torch.ones(3, 2), 0, "k is 0"),
        (torch.ones(3, 2, dtype=torch.int64), 1, "torch.int64"),
        (torch.tensor([[1.0, float("nan")]]), 1, "NaN or Inf"),
    ],
)
def test_bad_points(points: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cosine_kmeans(points, k)


@pytest.mark.parametrize(
    "option", [{"init": "middle"}, {"init": torch.ones(3, 2)}, {"max_iterations": 0}], ids=str
)
def test_bad_options(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        cosine_kmeans(torch.rand(5, 2), 2, **option)
