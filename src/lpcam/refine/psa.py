"""PSA: affinities of neighbouring cells, learnt from two CRFs (specification of MCTformer, 4).

Two dense CRFs of an image's maps, one of which favours the background, agree on the labels of some
cells of 8 x 8 pixels. A network learns features whose affinities a_ij = exp(-mean |f_i - f_j|) are
high for neighbours of one label, and maps and a constant background walk by them. B images of H x W
pixels, h = ceil(H / 8), w = ceil(W / 8); C channels; K + 1 scores, background first.
"""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpcam.classifiers import classifier as models
from lpcam.data.dataset import BACKGROUND, IGNORE, Item
from lpcam.data.images import limit_long_side
from lpcam.data.map_files import map_path, write_arrays
from lpcam.method.functional import strided
from lpcam.refine import base
from lpcam.refine import walk as stencil
from lpcam.refine.crf import CrfSettings, DenseCrf, crf_scores
from lpcam.refine.pair_network import (
    BackboneMaps,
    PairSettings,
    pad_sides,
    train_on_pairs,
)
from lpcam.runtime.errors import ArtefactError, ClassifierError
from lpcam.runtime.files import read_bytes
from lpcam.runtime.settings import Fraction, Positive
from lpcam.training.augmentation import jitter_colours, mirror_and_crop
from lpcam.training.loop import History
from lpcam.training.optim import FrozenStatistics, freeze, names_below
from lpcam.training.released import WIDERESNET38, Released
from lpcam.training.saved_network import SavedNetwork, shallow_copy

logger = logging.getLogger(__name__)
STRIDE = 8  #: Pixels per cell of the grid of features, labels and walks.


class PsaSettings(PairSettings):
    """PSA's affinities and random walk (specification of MCTformer, section 4)."""

    table: ClassVar[str] = "psa"
    cell: ClassVar[int] = STRIDE
    preset: str = "default"

    low_alpha: Positive
    """Exponent of the background score (1 - the highest map) for the sure foreground."""
    high_alpha: Positive
    """Exponent of the same score for the sure background; a larger one lowers it."""
    head_multiplier: Positive
    """Factor of the learning rate of new layers."""
    bias_multiplier: Positive
    """Further factor of the learning rate of biases, which have no weight decay."""
    freeze: tuple[str, ...]
    """Prefixes of the backbone's parameter names that are not trained."""
    crop: Annotated[int, Field(ge=16, multiple_of=8)]
    """Side of the square crop, in pixels."""
    jitter: tuple[Fraction, Fraction, Fraction, Annotated[float, Field(ge=0.0, le=0.5)]]
    """Largest random changes of brightness, contrast, saturation and hue."""
    threshold: Fraction
    """Constant score of the background in the walk; a higher one gives smaller objects."""


PADDING = 1e-5  #: A cell all of whose scores are below this lies beyond the image.
WIDTHS = (64, 128, 256)  #: Channels to which the last three feature maps of a backbone are reduced.
CHANNELS_A_TIME = 64  #: Channels whose differences are computed together, to bound the memory.
HEADS = ("reductions.", "last.")
"""Name prefixes of the new convolutions, which have a higher learning rate."""


def write_scores(path: Path, scores: Tensor) -> None:
    """Write scores (2, K + 1, H, W) in [0, 1], of the low and the high alpha, as uint8 in npz."""
    low, high = (scores * 255).round().to(torch.uint8).cpu().numpy()
    write_arrays(path, {"low": low, "high": high})


def read_scores(path: Path) -> NDArray[np.uint8]:
    """Read scores (2, K + 1, H, W) uint8 of :func:`write_scores`; ArtefactError if damaged."""
    data = read_bytes(path)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            scores = np.stack([archive[name] for name in ("low", "high")])
        if scores.ndim != 4 or scores.dtype != np.uint8:
            raise ValueError(f"its arrays are {scores.dtype} {scores.shape}")
    except Exception as error:  # a damaged archive makes zipfile, zlib and numpy raise anything
        raise ArtefactError(
            f"{path} does not hold the scores of two CRFs ({str(error) or type(error).__name__}); "
            "delete it and run the stage refine-labels again"
        ) from error
    return scores


def pooled(scores: Tensor) -> Tensor:
    """Means (..., n, h, w) of cells of 8 x 8 pixels of (..., n, H, W), zeros beyond the image."""
    return F.avg_pool2d(pad_sides(scores, STRIDE), STRIDE)


def label_pairs(low: Tensor, high: Tensor) -> Tensor:
    """Labels of cells (h, w) uint8 from the scores (K + 1, h, w) of two CRFs; unknown ones are 255.

    A class k + 1 is best where the background is favoured: ``low``; background, 0, is best where it
    is not: ``high``. Beyond the image a cell is unknown.
    """
    foreground, background = low.argmax(0), high.argmax(0) == 0
    labels = torch.where(foreground > 0, foreground, IGNORE).masked_fill(background, BACKGROUND)
    beyond = torch.maximum(low, high).amax(0) < PADDING
    return labels.masked_fill(beyond, IGNORE).to(torch.uint8)


class Psa(FrozenStatistics, BackboneMaps, SavedNetwork):
    """ELUs of 1 x 1 convolutions of a backbone's last three feature maps, enlarged to stride 8."""

    kind = "psa"

    def __init__(self, classifier: models.Classifier, *, seed: int = 0) -> None:
        super().__init__(classifier, "PSA")
        found = self.levels
        self.levels = [level for level in found if level.stride % STRIDE == 0][-len(WIDTHS) :]
        if not self.levels:
            raise ClassifierError(
                f"the backbone {type(self.backbone).__name__} gives feature maps at strides "
                f"{sorted({level.stride for level in found})}; PSA needs some at 8, 16 or 32: "
                "choose another backbone, or another output stride"
            )
        widths = WIDTHS[-len(self.levels) :]
        self.channels = sum(widths)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.reductions = nn.ModuleList(
                nn.Conv2d(level.channels, width, 1, bias=False)
                for level, width in zip(self.levels, widths, strict=True)
            )
            self.last = nn.Conv2d(self.channels, self.channels, 1, bias=False)
            for weight in self.reductions.parameters():
                nn.init.kaiming_normal_(weight)
            nn.init.xavier_uniform_(self.last.weight, gain=4.0)
        self.multiple = max(STRIDE, self.side_multiple((13 * STRIDE, 17 * STRIDE)))
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.last.weight.device

    def forward(self, images: Tensor) -> Tensor:
        """Features f (B, C, h, w) of (B, 3, H, W) normalised images, padded with zeros."""
        rows, columns = (strided(side, STRIDE) for side in images.shape[-2:])
        parts = []
        maps = zip(self.levels, self.reductions, self.maps(images), strict=True)
        for level, reduction, features in maps:
            found = reduction(features)
            if level.stride > STRIDE:
                factor = level.stride // STRIDE
                found = F.interpolate(found, scale_factor=factor, mode="bilinear")
            parts.append(F.elu(found[..., :rows, :columns]))
        return F.elu(self.last(torch.cat(parts, 1)))

    @classmethod
    def _described(cls, metadata: Mapping[str, Any]) -> Psa:
        return cls(models.described(metadata))


def build_psa(classifier: models.Classifier, *, seed: int = 0) -> Psa:
    """Build PSA's network on a copy of a trained classifier's backbone."""
    twin = shallow_copy(classifier)
    twin.backbone = copy.deepcopy(classifier.backbone)
    return Psa(twin, seed=seed).to(classifier.device)


def feature_distances(features: Tensor, radius: int) -> Iterator[tuple[stencil.Offset, Tensor]]:
    """Yield mean |f_i - f_j| (B, rows, columns) of pairs of a window, by offset; differentiable."""
    window = stencil.source_window(features.shape[-2], features.shape[-1], radius)
    if features[..., *window].numel():
        for offset in stencil.pair_offsets(radius):
            # the backward pass computes the differences again, to save memory
            partner = stencil.partner_window(window, offset)
            found = checkpoint(_distance, features, window, partner, use_reentrant=False)
            yield offset, found


def _distance(features: Tensor, own: stencil.Window, partner: stencil.Window) -> Tensor:
    parts = torch.split(features, CHANNELS_A_TIME, 1)
    total = (parts[0][:, :, *partner] - parts[0][:, :, *own]).abs_().sum(1)
    for part in parts[1:]:
        total += (part[:, :, *partner] - part[:, :, *own]).abs_().sum(1)
    return total.div_(features.shape[1])


def walk_affinities(features: Tensor, radius: int) -> Iterator[tuple[stencil.Offset, Tensor]]:
    """Yield affinities of all pairs for a walk; zero near the border, where no loss has pairs."""
    reach = radius - 1
    for (dy, dx), distance in feature_distances(features, radius):
        sides = reach + min(0, dx), reach - max(0, dx), 0, reach - dy
        yield (dy, dx), F.pad((-distance).exp(), sides)


def psa_loss(features: Tensor, labels: Tensor, radius: int, counts: Tensor | None = None) -> Tensor:
    """PSA's loss of features (B, C, h, w): means of -log a of equal pairs, -log(1 - a) of others.

    Pairs of background and of a class weigh a quarter each, different ones half. Labels are (B, h,
    w) uint8; ``counts`` are :func:`lpcam.refine.walk.pair_counts` of the whole batch.
    """
    counts = stencil.pair_counts(labels, radius) if counts is None else counts
    zero = features[:0].sum()  # so that there is a gradient, of zero, also without a pair
    distances = feature_distances(features, radius)
    pairs = ((offset, (-distance).exp()) for offset, distance in distances)
    background, foreground, different = stencil.likelihood_means(
        pairs, labels, counts, zero, radius
    )
    loss: Tensor = (background + foreground) / 4 + different / 2
    return loss


def augment(
    preprocessing: models.Preprocessing,
    settings: PsaSettings,
    image: NDArray[np.uint8],
    scores: NDArray[np.uint8],
    generator: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Jitter, mirror and crop an image and its scores (2, K + 1, H, W): image and cells' labels."""
    colours = torch.from_numpy(jitter_colours(image, settings.jitter, generator)).permute(2, 0, 1)
    planes = [(colours, 0), (torch.from_numpy(scores), 0)]
    canvas, cropped = mirror_and_crop(planes, settings.crop, generator)
    return preprocessing(canvas.permute(1, 2, 0).numpy()), label_pairs(*pooled(cropped / 255))


def _read(item: Item, path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    scores = read_scores(path)
    # The scores of an image that was shrunk to be refined have the smaller size.
    return limit_long_side(item.read(), max(scores.shape[2:])), scores


@torch.no_grad()
def walk(network: Psa, image: NDArray[np.uint8], planes: Tensor, settings: PsaSettings) -> Tensor:
    """Scores (K + 1, H, W) of an image after its maps (K, H, W) and a constant background walked.

    Where the grid is too small for any pair of the loss, they are those before the walk.
    """
    network.eval()
    height, width = image.shape[:2]
    scores = planes.to(network.device, base.compute_dtype(planes))
    scores = torch.cat([scores.new_full((1, height, width), settings.threshold), scores])
    features = network(network.preprocessing(image)[None].to(network.device))
    pairs = list(walk_affinities(features, settings.radius))
    if not pairs:
        logger.warning(
            "an image of %s x %s pixels is too small for PSA's walk; its maps stay as they are",
            height,
            width,
        )
        return scores
    walked = stencil.affinity_walk(
        pooled(scores)[None],
        pairs,
        beta=settings.beta,
        exponent=settings.exponent,
        tolerance=settings.tolerance,
    )
    full = F.interpolate(walked, scale_factor=STRIDE, mode="bilinear", align_corners=False)
    return full[0, :, :height, :width]


class _PsaRefinement(base.LearnedRefinement):
    """Affinities learned from two CRFs of the maps, and a random walk by them."""

    title = "PSA"
    settings = PsaSettings
    crf_place = "on the labels that PSA learns from"
    starts_from = "classifier"
    revision = 3
    map_settings = frozenset({"radius", "beta", "exponent", "tolerance", "threshold"})
    network_settings = frozenset(PsaSettings.model_fields) - {"preset", *map_settings} | {"radius"}

    def validate(self, section: base.RefineSection, tools: base.Tools) -> None:
        """Refuse a backbone that PSA cannot be built on, or a prefix that freezes nothing."""
        network = build_psa(tools.untrained())
        names_below(dict(network.backbone.named_parameters()), section.settings.freeze)

    def label_path(self, folder: Path, image_id: str) -> Path:
        return map_path(folder, image_id)

    def label_key(self, job: base.Job) -> Mapping[str, Any]:
        crf = CrfSettings.from_preset("psa").model_dump(mode="json", exclude={"preset"})
        return {"alphas": [job.settings.low_alpha, job.settings.high_alpha], "crf": crf}

    def labeller(self, jobs: Sequence[base.Job]) -> base.WriteLabels:
        crf = DenseCrf(CrfSettings.from_preset("psa"), memory=jobs[0].tools.memory)
        alphas = (jobs[0].settings.low_alpha, jobs[0].settings.high_alpha)

        def write(pictures: Sequence[base.Picture], paths: Sequence[Path]) -> None:
            for picture, path in zip(pictures, paths, strict=True):
                write_scores(path, crf_scores(crf, picture.image, picture.planes, alphas))

        return write

    def released(self) -> Sequence[Released]:
        """The file of PSA's affinity network, and of MCTformer's."""
        return [
            Released(
                "PSA's affinity network",
                "refine",
                ("f9.weight",),
                [
                    (WIDERESNET38, "backbone."),
                    *((rf"f8_{n + 3}\.", f"reductions.{n}.") for n in range(3)),
                    (r"f9\.", "last."),
                ],
                lambda names: build_psa(
                    models.build(
                        models.BackboneSpec("wideresnet38", {}),
                        models.NO_CLASSES,
                        weights=models.RANDOM,
                    )
                ),
            )
        ]

    def build(self, section: base.RefineSection, tools: base.Tools) -> Psa:
        return build_psa(tools.classifier(), seed=tools.seed)

    def train(
        self, network: Any, labelled: base.Labelled, section: base.RefineSection, **options: Any
    ) -> History:
        settings = section.settings
        freeze(network.backbone, settings.freeze, norms=True)

        def values(name: str, _: nn.Parameter) -> tuple[float, float]:
            rate = settings.learning_rate
            rate *= settings.head_multiplier if name.startswith(HEADS) else 1.0
            if name.endswith("bias"):
                return rate * settings.bias_multiplier, 0.0
            return rate, settings.weight_decay

        def loss(model: nn.Module, images: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
            return psa_loss(model(images), labels, settings.radius, counts)

        change = partial(augment, network.preprocessing, settings)
        return train_on_pairs(
            network, values, _read, change, loss, labelled, settings, title=self.title, **options
        )

    def refiner(self, job: base.Job, network: Path, folder: Path) -> base.Refine:
        trained = Psa.load(network).to(job.tools.device)
        trained.accelerate = job.tools.accelerate
        loaded = trained.folded()

        def refine(picture: base.Picture) -> Tensor:
            image = picture.image.cpu().numpy()
            return base.decided(walk(loaded, image, picture.planes, job.settings))

        return refine


REFINEMENT = _PsaRefinement()
