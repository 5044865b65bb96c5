"""Cosine k-means: by hand, by its objective, and in the cases where the released program hangs."""

import logging

import pytest
import torch

from lpcam.clustering import (
    Group,
    _alike,
    _Batch,
    _Choices,
    _cluster,
    _iterate,
    cosine_kmeans,
)
from lpcam.clustering import cosine_kmeans_groups as cosine_groups


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


# -- many groups ---------------------------------------------------------------------------------


def same(first: object, second: object) -> None:
    for name in ("assignments", "sizes", "iterations", "converged"):
        a, b = getattr(first, name), getattr(second, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name
    for name in ("centers", "means"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name))
    assert first.objective == pytest.approx(second.objective, abs=1e-6)  # type: ignore[attr-defined]


def unequal_groups(restarts: int = 2) -> list[Group]:
    """Groups of many lengths, the least as long as K; one with zero rows."""
    groups = []
    for seed, length in enumerate((4, 90, 31, 200, 57)):
        rows = torch.rand(length, 6, generator=generator(seed)) - 0.2
        rows[3] = 0.0
        groups.append(Group(rows, 4, tuple(generator(10 * seed + r) for r in range(restarts))))
    return groups


@pytest.mark.parametrize("centers", ["mean", "unit"])
def test_groups_are_as_if_each_restart_were_alone(centers: str) -> None:
    pooled = cosine_groups(unequal_groups(), centers=centers, tolerance=1e-9)
    for group, found in zip(unequal_groups(), pooled, strict=True):
        assert len(found) == 2
        for start, result in zip(group.starts, found, strict=True):
            alone = cosine_kmeans(group.rows, 4, generator=start, centers=centers, tolerance=1e-9)
            same(result, alone)


@pytest.mark.parametrize("centers", ["mean", "unit"])
@pytest.mark.parametrize("chunk_bytes", [None, 200])
def test_padded_rows_never_count(centers: str, chunk_bytes: int | None) -> None:
    """The batches of a GPU, on the CPU: groups leave as they converge, and padding is no member."""
    choices = _Choices("random", centers, 100, 1e-9, "relative", None, chunk_bytes)
    groups = [
        Group(g.rows, 4, tuple(g.rows[r : r + 4] for r in (0, len(g.rows) - 4)))
        for g in unequal_groups()
    ]
    batched = _iterate(groups, choices, torch.device("cpu"))
    for group, found in zip(groups, batched, strict=True):
        for start, result in zip(group.starts, found, strict=True):
            same(result, cosine_kmeans(group.rows, 4, init=start, centers=centers, tolerance=1e-9))
            assert len(result.assignments) == len(group.rows)


def test_batches_are_alike_and_bounded() -> None:
    groups = [Group(torch.rand(m, 4), k, ()) for m, k in ((9, 2), (8, 2), (8, 3), (2, 2), (1, 1))]
    order = [0, 1, 2, 3, 4]
    assert _alike(groups, order, 10**9) == [[0, 1, 3], [2], [4]]
    assert _alike(groups, order, 2 * 9 * 16) == [[0, 1], [3], [2], [4]]
    assert _alike(groups, order, 1) == [[0], [1], [3], [2], [4]]  # a large group goes alone


def test_workers_do_not_matter() -> None:
    one, many = (cosine_groups(unequal_groups(), workers=workers) for workers in (1, 3))
    for first, second in zip(one, many, strict=True):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a.centers, b.centers)


def test_no_groups() -> None:
    assert cosine_groups([]) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    rows, _ = blobs(each=400)
    whole = cosine_kmeans(rows.to(dtype).float(), 3, generator=generator())
    half = cosine_kmeans(rows.to(dtype), 3, generator=generator())
    assert half.centers.dtype == torch.float32
    same(whole, half)
    near = cosine_kmeans(rows, 3, generator=generator())
    assert half.objective == pytest.approx(near.objective, abs=1e-3)


def test_length_of_each_row_does_not_matter_to_unit_centres() -> None:
    rows, _ = blobs()
    factors = 2.0 ** torch.randint(-3, 4, (len(rows), 1), generator=generator())
    first, second = (
        cosine_kmeans(r, 3, init=rows[:3], centers="unit") for r in (rows, rows * factors)
    )
    assert torch.equal(first.assignments, second.assignments)
    torch.testing.assert_close(first.centers, second.centers)


def test_warm_start_is_further_after_as_many_sweeps() -> None:
    mixing = torch.randn(8, 30, generator=generator(1))
    clusters = torch.randn(40, 8, generator=generator(2))
    members = torch.randint(40, (6000,), generator=generator(3))
    noise = torch.randn(6000, 30, generator=generator(4))
    rows = (clusters[members] @ mixing + noise).relu()
    cold, warm = (
        cosine_kmeans(
            rows, 12, init=rows[:12], centers="unit", max_iterations=2, warm_start=warm_start
        )
        for warm_start in (None, 1000)
    )
    assert cold.iterations == warm.iterations == 2
    assert warm.objective > cold.objective + 0.005
    assert len(warm.assignments) == 6000
    small = cosine_kmeans(rows[:900], 12, init=rows[:12], warm_start=1000)
    same(small, cosine_kmeans(rows[:900], 12, init=rows[:12]))


def test_a_warm_start_converges_on_its_sample_whatever_the_bound_of_sweeps() -> None:
    rows = torch.randn(2000, 8, generator=generator(1)).relu()
    found = [
        cosine_kmeans(
            rows, 12, init=rows[:12], centers="unit", max_iterations=sweeps, warm_start=warm_start
        )
        for sweeps, warm_start in ((6, None), (1, 1000))
    ]
    assert [result.iterations for result in found] == [6, 1]
    assert found[1].objective > found[0].objective


@pytest.mark.parametrize("centers", ["mean", "unit"])
@pytest.mark.parametrize("chunk_bytes", [None, 200])
def test_sums_of_moved_rows_equal_the_sums_of_all(centers: str, chunk_bytes: int | None) -> None:
    # In double precision, so that rounding hides nothing.
    groups = [Group(g.rows.double(), 4, g.starts) for g in unequal_groups()]
    for part in (groups, groups[3:4]):
        batch = _Batch.of(part, torch.device("cpu"), chunk_bytes)
        directions = torch.randn(2, len(part), 2, 4, 6, generator=generator()).double()
        first = batch.sweep(directions[0], members=centers)
        moved = batch.sweep(directions[1], members=centers, previous=first)
        fresh = batch.sweep(directions[1], members=centers)
        assert not torch.equal(first.sizes, fresh.sizes)
        assert torch.equal(moved.sizes, fresh.sizes)
        torch.testing.assert_close(moved.sums, fresh.sums, atol=1e-12, rtol=0)
        again = batch.sweep(directions[1], members=centers, previous=moved)
        assert torch.equal(again.sums, moved.sums)


def test_what_is_left_of_a_much_larger_sum_keeps_its_digits() -> None:
    rows = torch.rand(1, 2000, 2, generator=generator())
    rows[0, 10:] = 1e6 * rows[0, 10:].flip(1) + torch.tensor([0.0, 1e7])
    rows[0, :10, 0] += 5.0
    batch = _Batch(rows, torch.tensor([2000]), None)
    first, second = torch.tensor([[[[[1.0, 1.0], [-1.0, -1.0]]], [[[1.0, 0.0], [0.0, 1.0]]]]])[0]
    whole = batch.sweep(first[None], members="mean")
    left = batch.sweep(second[None], members="mean", previous=whole)
    assert whole.sizes.flatten().tolist() == [2000, 0]
    assert left.sizes.flatten().tolist() == [10, 1990]
    torch.testing.assert_close(left.sums[0, 0, 0], rows[0, :10].sum(0))


def test_empty_clusters_are_repaired_in_a_batch() -> None:
    groups = [Group(g.rows, 4, (g.rows[:1].repeat(4, 1),)) for g in unequal_groups()]
    choices = _Choices("random", "mean", 50, 1e-6, "relative", None, None)
    for group, (found,) in zip(groups, _iterate(groups, choices, torch.device("cpu")), strict=True):
        assert found.sizes.min() >= 1
        assert found.sizes.sum() == len(group.rows)
        same(found, cosine_kmeans(group.rows, 4, init=group.starts[0], tolerance=1e-6))


def test_half_precision_rows_are_never_whole_in_single_precision() -> None:
    batch = _Batch(torch.ones(1, 1000, 8, dtype=torch.float16), torch.tensor([1000]), 10 * 8 * 4)
    parts = [part.untyped_storage().nbytes() for _, _, part in batch.chunks()]
    assert len(parts) == 100
    assert max(parts) == 10 * 8 * 4


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
    with pytest.raises(ValueError, match="unknown tolerance_kind 'small'"):
        cosine_kmeans(rows, 2, tolerance_kind="small")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        cosine_kmeans(rows, 2, max_iterations=0)
    with pytest.raises(ValueError, match="got 5 rows for 6"):
        cosine_groups([Group(rows, 6, (generator(),))])
    with pytest.raises(ValueError, match=r"first centres of shape \(2, 2\), got \(3, 2\)"):
        cosine_kmeans(rows, 2, init=rows[:3])


def test_a_short_group_that_is_left_alone_has_no_padding() -> None:
    """The last group of a padded batch to converge may be a short one."""
    choices = _Choices("random", "unit", 60, 0.01, "relative", None, None)
    for trial in range(10):
        groups = [
            Group(torch.rand(count, 16, generator=generator(seed)), 4, (generator(seed),))
            for count, seed in ((400, trial), (60, trial + 1000))
        ]
        together = _cluster(groups, choices, torch.device("cpu"))
        for group, (found,) in zip(groups, together, strict=True):
            assert found.sizes.tolist() == torch.bincount(found.assignments, minlength=4).tolist()
            assert int(found.sizes.sum()) == group.rows.shape[0]
