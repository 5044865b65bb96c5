"""A clustering method of another distribution: the points that lie far from each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lpcam.method.clustering import Clusters
from lpcam.method.functional import unit
from lpcam.method.settings import FittingSettings


class FarthestPoints:
    """Centres are points: a random one, then always the one with the smallest cosine to all."""

    def fit(self, points: Tensor, k: int, generators: Sequence[torch.Generator]) -> list[Clusters]:
        """Cluster the points once for each generator."""
        return [self._fit(points.float(), k, generator) for generator in generators]

    def _fit(self, points: Tensor, k: int, generator: torch.Generator) -> Clusters:
        directions = unit(points, 1)
        cosines = directions @ directions.T
        chosen = [int(torch.randint(len(points), (1,), generator=generator))]
        for _ in range(k - 1):
            chosen.append(int(cosines[:, chosen].amax(1).argmin()))
        best, assignments = cosines[:, chosen].max(1)
        members = [points[assignments == place].mean(0) for place in range(k)]
        sizes = torch.bincount(assignments, minlength=k)
        centers, means = points[chosen], torch.stack(members).nan_to_num()
        return Clusters(centers, means, assignments, sizes, 1, True, float(best.mean()))


def make(settings: FittingSettings) -> FarthestPoints:
    """The method; it has no settings of its own."""
    return FarthestPoints()
