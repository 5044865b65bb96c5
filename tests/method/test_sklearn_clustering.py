"""The contract of clusterings, for each of them, and what those of scikit-learn find by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lpcam.method import clustering
from lpcam.method.clustering import CLUSTERINGS, Clusters
from lpcam.method.settings import LpcamSettings
from lpcam.method.sklearn_clustering import SklearnClustering
from lpcam.runtime import errors
from lpcam.runtime.errors import LpcamError, PrototypeError

pytest.importorskip("sklearn")
SETTINGS = LpcamSettings.from_preset("voc12.official", tolerance=0.01)
NAMES = sorted(CLUSTERINGS)


def fit(name: str, points: torch.Tensor, k: int, *seeds: int, sample: int = 0) -> list[Clusters]:
    """Cluster points once for each seed, learning from ``sample`` of them where that is wanted."""
    method: Any = CLUSTERINGS[name](SETTINGS)
    if sample and isinstance(method, SklearnClustering):
        method = replace(method, sample=sample)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or (0,)]
    found: list[Clusters] = method.fit(points, k, generators)
    return found


def blobs(each: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around three directions, and the truth."""
    truth = torch.arange(3).repeat_interleave(each)
    noise = torch.rand(3 * each, 6, generator=torch.Generator().manual_seed(5))
    return 4 * torch.eye(3, 6)[truth] + 0.2 * noise, truth


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sample", [0, 60])
def test_contract(name: str, dtype: torch.dtype, sample: int) -> None:
    points = blobs()[0].to(dtype)
    first, second = fit(name, points, 5, 1, 2, sample=sample)
    for found in (first, second):
        count = len(found.sizes)
        assert 1 <= count <= 5 and int(found.sizes.min()) >= 1
        assert found.centers.shape == found.means.shape == (count, 6)
        assert found.centers.dtype == torch.promote_types(dtype, torch.float32)
        assert found.assignments.shape == (120,) and found.assignments.dtype == torch.int64
        assert found.sizes.tolist() == torch.bincount(found.assignments, minlength=count).tolist()
        wide = points.to(found.means.dtype)
        for one in range(count):
            torch.testing.assert_close(found.means[one], wide[found.assignments == one].mean(0))
        cosine = torch.cosine_similarity(wide, found.centers[found.assignments], dim=1)
        assert found.objective == pytest.approx(float(cosine.mean()), abs=1e-5)
        assert found.iterations >= 1
    # a restart does not depend on the others
    (alone,) = fit(name, points, 5, 2, sample=sample)
    assert torch.equal(alone.assignments, second.assignments)


@pytest.mark.parametrize("name", NAMES)
def test_neither_the_run_nor_the_number_of_threads_matters(name: str) -> None:
    points = torch.rand(3000, 24, generator=torch.Generator().manual_seed(3))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 4):
            torch.set_num_threads(count)
            found += fit(name, points, 6, 7)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].assignments, found[1].assignments)
    torch.testing.assert_close(found[0].centers, found[1].centers)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("count", "k"), [(1, 1), (3, 3), (4, 1), (4, 3)])
def test_few_points(name: str, count: int, k: int) -> None:
    (found,) = fit(name, blobs(each=2)[0][:count], k)
    assert 1 <= len(found.sizes) <= k and int(found.sizes.sum()) == count
    (same,) = fit(name, torch.ones(count, 4), k)
    assert bool(torch.isfinite(same.centers).all()) and int(same.sizes.min()) >= 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("points", "k"), [(torch.ones(3, 2), 4), (torch.tensor([[torch.nan]]), 1)])
def test_bad_points(name: str, points: torch.Tensor, k: int) -> None:
    with pytest.raises(ValueError, match=r"k is 4|NaN"):
        fit(name, points, k)


@pytest.mark.parametrize("name", sorted({*NAMES} - {"kmeans_silhouette"}))
def test_blobs_are_found_by_a_part_of_them(name: str) -> None:
    points, truth = blobs()
    best = max(fit(name, points, 3, *range(4), sample=50), key=lambda one: one.objective)
    for label in range(3):
        assert len(set(best.assignments[truth == label].tolist())) == 1
    assert sorted(best.sizes.tolist()) == [40, 40, 40]


def test_silhouettes_choose_the_number_of_blobs() -> None:
    """Of K = 3, 6, 9 and 12, three clusters fit three blobs."""
    points, _ = blobs()
    assert len(fit("kmeans_silhouette", points, 12)[0].sizes) == 3


def test_kmeans_goes_by_distance_and_not_by_angle() -> None:
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 0.0], [0.0, 9.0], [9.0, 1.0]])
    (found,) = fit("kmeans", points, 3)
    assert sorted(found.centers.tolist()) == [[0.0, 9.0], [0.5, 0.5], [9.0, 0.5]]


def test_components_are_the_centres_of_nmf() -> None:
    """Features made of two parts: components show the parts, means of members the mixtures."""
    shares = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.5], [0.5, 2.0]]).repeat(5, 1)
    (found,) = fit("nmf", shares @ torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]), 2)
    directions = found.centers / found.centers.norm(dim=1, keepdim=True)
    parts = sorted([[round(v, 1) for v in row] for row in directions.abs().tolist()])
    assert parts == [[0.0, 0.0, 0.7, 0.7], [0.7, 0.7, 0.0, 0.0]]
    assert sorted(found.means.tolist()) == [[0.25, 0.25, 1.5, 1.5], [1.5, 1.5, 0.25, 0.25]]
    with pytest.raises(PrototypeError, match="-1"):
        fit("nmf", -torch.ones(4, 2), 2)


def test_a_mixture_goes_by_angle_and_its_centres_have_the_length_of_members() -> None:
    points = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 2.0], [0.0, 8.0]])
    (found,) = fit("spherical_mixture", points, 2)
    torch.testing.assert_close(found.centers.sort(0).values, torch.tensor([[0.0, 0.0], [3.0, 5.0]]))


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> Any:
        raise ImportError(module)

    monkeypatch.setattr(errors, "import_module", missing)
    for name in set(NAMES) - {"cosine_kmeans"}:
        with pytest.raises(LpcamError, match=r"lpcam\[sklearn\]"):
            CLUSTERINGS[name](SETTINGS)
    assert isinstance(CLUSTERINGS["cosine_kmeans"](SETTINGS), clustering.CosineKMeans)
