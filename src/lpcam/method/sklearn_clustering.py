"""Clusterings of scikit-learn, to compare the paper's with. All but k-means learn from a sample."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpcam.method.clustering import Clusters
from lpcam.method.functional import NORM_EPSILON, unit
from lpcam.runtime.errors import PrototypeError, import_extra
from lpcam.runtime.parallel import one_thread

SAMPLE = 4000  #: Maximum number of points that a method other than k-means learns from.
SHARES = (
    0.25,
    0.5,
    0.75,
    1.0,
)  #: Numbers of clusters that silhouettes choose from, as shares of K.
Rows = NDArray[Any]
Learnt = tuple[Rows, Rows | None, int]
"""The cluster of each point, centres if they are not the means of members, and iterations."""
Learn = Callable[[Rows, int, int, int], Learnt]
"""Learns from points (M, C), K clusters, a random seed and a maximum number of iterations."""
_LOCK = threading.Lock()  # the number of threads of the libraries belongs to the whole process


@dataclass(frozen=True)
class SklearnClustering:
    """A method of scikit-learn, as a :class:`~lpcam.method.clustering.Clustering`.

    It learns from at most ``sample`` points (None: all); the others join the centre with the
    largest cosine. One thread computes, so the number of threads changes nothing.
    """

    learn: Learn
    max_iterations: int
    sample: int | None = None

    @torch.no_grad()
    def fit(self, points: Tensor, k: int, generators: Sequence[torch.Generator]) -> list[Clusters]:
        """See :meth:`Clustering.fit`; ValueError for points that are too few, NaN or Inf."""
        if points.ndim != 2 or not 1 <= k <= len(points) or not bool(points.isfinite().all()):
            raise ValueError(
                f"points have shape {tuple(points.shape)} and k is {k}; expected (M, C) "
                "without NaN or Inf, and k from 1 to M; check the features that were collected"
            )
        wide = points.to(torch.promote_types(points.dtype, torch.float32))
        limits = import_extra("threadpoolctl", "sklearn", "one thread needs threadpoolctl")
        with _LOCK, one_thread(), limits.threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run says what has not converged
            return [self._fit(wide, k, one) for one in generators]

    def _fit(self, points: Tensor, k: int, generator: torch.Generator) -> Clusters:
        seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
        drawn = torch.randperm(len(points), generator=generator)[: self.sample].sort().values
        drawn = drawn.to(points.device)
        rows, iterations = points[drawn], 1
        labels, given = torch.arange(len(rows), device=points.device), None
        if len(rows) > k:  # else each point is a cluster, which scikit-learn refuses in part
            found = self.learn(rows.cpu().numpy(), k, seed, self.max_iterations)
            numbers, centers, iterations = found
            present, numbers = np.unique(numbers, return_inverse=True)
            labels = torch.from_numpy(numbers).to(points.device)
            given = None if centers is None else torch.from_numpy(centers[present]).to(points)
        assignments = labels
        if len(rows) < len(points):
            near = _means(rows, labels) if given is None else given
            assignments = (points @ unit(near, dim=1).T).argmax(1)
            assignments[drawn] = labels
        means, sizes = _means(points, assignments), torch.bincount(assignments)
        own = means if given is None else given
        cosine = (unit(points, dim=1) * unit(own, dim=1)[assignments]).sum(1)
        done = iterations < self.max_iterations
        return Clusters(own, means, assignments, sizes, iterations, done, float(cosine.mean()))


def _means(points: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([points[labels == one].mean(0) for one in range(int(labels.max()) + 1)])


def _sklearn(module: str) -> Any:
    return import_extra(f"sklearn.{module}", "sklearn", "this lpcam.clustering needs scikit-learn")


def _kmeans(rows: Rows, k: int, seed: int, most: int) -> Learnt:
    """K-means by Euclidean distance, from first centres of k-means++."""
    method = _sklearn("cluster").KMeans
    made = method(k, n_init=1, max_iter=most, random_state=seed).fit(rows)
    return made.labels_, None, made.n_iter_


def _kmeans_silhouette(rows: Rows, k: int, seed: int, most: int) -> Learnt:
    """Euclidean k-means with the K of `SHARES` that has the best mean silhouette."""
    counts = sorted({min(k, max(2, round(share * k))) for share in SHARES})

    def quality(one: Learnt) -> float:
        several = 1 < len(np.unique(one[0])) < len(rows)
        return float(_sklearn("metrics").silhouette_score(rows, one[0])) if several else -1.0

    return max((_kmeans(rows, count, seed, most) for count in counts), key=quality)


def _agglomerative(rows: Rows, k: int, seed: int, most: int) -> Learnt:
    """Agglomerative clustering with Ward's linkage."""
    return _sklearn("cluster").AgglomerativeClustering(k).fit(rows).labels_, None, 1


def _nmf(rows: Rows, k: int, seed: int, most: int) -> Learnt:
    """Non-negative matrix factorisation: a point belongs to the component that gives it most."""
    if rows.min() < 0:
        raise PrototypeError(
            f"lpcam.clustering nmf got features down to {rows.min():.3g}; expected none below 0, "
            "as after a ReLU. Choose another clustering for this backbone"
        )
    made = _sklearn("decomposition").NMF(k, max_iter=most, random_state=seed)
    parts = made.fit_transform(rows) * np.linalg.norm(made.components_, axis=1)
    return parts.argmax(1), made.components_, made.n_iter_


def _spherical_mixture(rows: Rows, k: int, seed: int, most: int) -> Learnt:
    """Spherical Gaussians of unit features; centres get the mean length of their members."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    units = rows / np.maximum(norms, NORM_EPSILON)[:, None]
    method = _sklearn("mixture").GaussianMixture
    made = method(k, covariance_type="spherical", max_iter=most, random_state=seed).fit(units)
    labels = made.predict(units)
    lengths = np.bincount(labels, norms, k) / np.maximum(np.bincount(labels, minlength=k), 1)
    return labels, made.means_ * lengths[:, None], made.n_iter_


def _make(learn: Learn, sample: int | None, settings: Any) -> SklearnClustering:
    _sklearn("base")  # before anything runs
    return SklearnClustering(learn, settings.max_iterations, sample)


kmeans = partial(_make, _kmeans, None)
kmeans_silhouette = partial(_make, _kmeans_silhouette, SAMPLE)
agglomerative = partial(_make, _agglomerative, SAMPLE)
nmf = partial(_make, _nmf, SAMPLE)
spherical_mixture = partial(_make, _spherical_mixture, SAMPLE)
