"""IRN: class boundaries learned from ternary labels, and maps that walk within them.

Specification, sections 6 to 8. B images of H x W pixels, K classes, h = ceil(H / 4), w = ceil(W /
4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from lpcam.classifiers.classifier import RANDOM, Preprocessing
from lpcam.classifiers.settings import RELEASED_RESNET50
from lpcam.data.dataset import Item
from lpcam.data.masks import read_index_mask, write_plane
from lpcam.data.resize import quarter_size, resize
from lpcam.method.functional import unflip
from lpcam.refine import base
from lpcam.refine import walk as stencil
from lpcam.refine.crf import DenseCrf
from lpcam.refine.irn_network import Irn, build_irn
from lpcam.refine.pair_network import PairSettings, train_on_pairs
from lpcam.refine.ternary import TernarySettings, crf_labels, ternary_key, ternary_labeller
from lpcam.refine.walk import EPSILON, STRIDE
from lpcam.runtime.files import digest_tensors
from lpcam.runtime.settings import Fraction, Positive
from lpcam.training.augmentation import scale_mirror_crop
from lpcam.training.loop import History
from lpcam.training.released import RESNET50, RESNET50_COPIES, Released


class IrnSettings(PairSettings, TernarySettings):
    """How IRN's boundaries are learned and maps walked (specification of IRN, sections 3 to 8)."""

    table: ClassVar[str] = "irn"
    cell: ClassVar[int] = STRIDE
    preset: str = "default"

    displacement_multiplier: Positive
    """Factor of the learning rate of the displacement branch."""
    scale: tuple[Positive, Positive]
    """Range from which each image's scale is drawn."""
    displacement: bool
    """Whether the displacement branch is trained too; boundaries do not depend on it."""
    walk_radius: Annotated[int, Field(ge=2)]
    """Distance, in cells of 4 pixels, below which two cells are a pair in the walk."""
    sharpness: Positive
    """Exponent of the maps before the walk; a larger one favours high values."""
    walked: Literal["maps", "cleaned"]
    """What walks: the maps, or only their part within the seeds that the CRF has cleaned."""
    threshold: Fraction
    """Threshold of the pseudo masks, as a fraction of the maximum of an image's walked maps."""
    cam_threshold: Fraction
    """``threshold`` for CAM."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale {list(self.scale)} must be a range: the smaller first")
        return self


class IrnLoss(NamedTuple):
    """The four losses; those of the displacement are zero where there is none."""

    positive: Tensor
    negative: Tensor
    displacement_foreground: Tensor
    displacement_background: Tensor

    @property
    def total(self) -> Tensor:
        """(L_pos + L_neg) / 2 + (L_dfg + L_dbg) / 2."""
        boundary = self.positive + self.negative
        return boundary / 2 + (self.displacement_foreground + self.displacement_background) / 2


def irn_loss(
    logits: Tensor,
    labels: Tensor,
    radius: int,
    displacement: Tensor | None = None,
    counts: Tensor | None = None,
) -> IrnLoss:
    """IRN's losses (section 6) of boundary logits (B, h, w) and displacements (B, 2, h, w), if any.

    Labels are (B, h, w) uint8: 0 background, 255 ignored, otherwise classes; ``counts`` are
    :func:`lpcam.refine.walk.pair_counts` of the whole batch, where this is a part.
    """
    counts = stencil.pair_counts(labels, radius) if counts is None else counts
    zero = logits[:0].sum()  # so that there is a gradient, of zero, also without a pair
    pairs = stencil.affinities(logits.sigmoid(), radius)
    background, foreground, negative = stencil.likelihood_means(pairs, labels, counts, zero, radius)
    sums = [zero.expand(2)]
    if displacement is not None:
        window = stencil.source_window(labels.shape[-2], labels.shape[-1], radius)
        for offset, kinds in stencil.pair_kinds(labels, radius):
            still, moved, _ = kinds.flatten(1).to(logits.dtype)
            partner = displacement[:, :, *stencil.partner_window(window, offset)]
            delta = displacement[:, :, *window] - partner
            target = delta.new_tensor(offset)[:, None, None]
            apart = still @ delta.abs().sum(1).flatten()
            off_centre = moved @ (delta - target).abs().sum(1).flatten()
            sums.append(torch.stack([apart, off_centre]))
    # over both channels
    apart, off_centre = torch.stack(sums).sum(0) / (2 * counts[:2].to(logits.dtype) + EPSILON)
    return IrnLoss((background + foreground) / 2, negative, off_centre, apart)


def augment(
    preprocessing: Preprocessing,
    settings: IrnSettings,
    image: NDArray[np.uint8],
    label: NDArray[np.uint8],
    generator: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Scale, mirror and crop an image and its labels (section 7); a cell has pixel (2, 2)."""
    canvas, labels = scale_mirror_crop(
        image, label, preprocessing, settings.scale, settings.crop, generator
    )
    return canvas, labels[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]


def _read(item: Item, path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return item.read(), read_index_mask(path)


@torch.no_grad()
def boundary_map(
    network: Irn, image: NDArray[np.uint8], shared: dict[str, Any] | None = None, key: str = ""
) -> Tensor:
    """Boundaries (h, w): sigmoid of the mean logit of an image and its mirror image (8.1).

    ``shared`` keeps the image's features under a key that stands for the pyramid's weights.
    """
    network.eval()
    shared = {} if shared is None else shared
    if key not in shared:
        tensor = network.pyramid.preprocessing(image)[None].to(network.device)
        shared[key] = network.pyramid(tensor), network.pyramid(tensor.flip(-1))
    size = quarter_size(image.shape[:2])
    logits, mirrored = (network.branches.boundary(pyramid, size) for pyramid in shared[key])
    return torch.sigmoid((logits + unflip(mirrored)) / 2)[0]


def propagate(maps: Tensor, edge: Tensor, settings: IrnSettings) -> Tensor:
    """Walk maps (..., K, h, w)^sharpness (1 - e) within boundaries e (..., h, w) (8.2 to 8.4)."""
    sources = maps if settings.sharpness == 1 else maps.pow(settings.sharpness)
    return stencil.random_walk(
        sources * (1 - edge[..., None, :, :]).to(maps.dtype),
        edge,
        radius=settings.walk_radius,
        beta=settings.beta,
        exponent=settings.exponent,
        tolerance=settings.tolerance,
    )


def pseudo_maps(walked: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize walked maps (K, h, w) to the image and divide them by their common maximum."""
    if not len(walked):
        return walked.new_zeros(0, *size)
    full = F.interpolate(walked[None], scale_factor=STRIDE, mode="bilinear", align_corners=False)
    return _divided(full[0, :, : size[0], : size[1]])


def _divided(maps: Tensor) -> Tensor:
    """Maps divided by their common maximum, if it is above 0."""
    return maps / maps.max() if bool(maps.any()) else maps


class _IrnRefinement(base.LearnedRefinement):
    """Class boundaries learned from the maps, and a random walk within them."""

    title = "IRN"
    settings = IrnSettings
    crf_place = "on the labels that IRN learns from"
    judged = True
    every_image = True  # for their boundaries
    map_settings = frozenset(
        {"walk_radius", "beta", "exponent", "tolerance", "sharpness", "walked"}
    )
    network_settings = frozenset(
        name for name in IrnSettings.model_fields if not name.endswith("threshold")
    ) - {"preset", *map_settings}

    def check(self, section: base.RefineSection) -> None:
        base.check_label_crf(section)

    def threshold(self, section: base.RefineSection, source: base.Source) -> float:
        settings = section.settings
        masks: float = settings.cam_threshold if source.method == "CAM" else settings.threshold
        if not source.shift:
            return masks
        # the maps are walked to the power of the sharpness
        power = settings.sharpness
        return math.pow(base.shifted(math.pow(masks, 1 / power), source.shift), power)

    def described(self, section: base.RefineSection, tools: base.Tools) -> dict[str, Any]:
        return section.model_dump(mode="json", include={"method", "irn", "crf"})

    def key(self, job: base.Job) -> Mapping[str, Any]:
        own = super().key(job)
        if job.settings.walked == "maps":
            return own
        crf = job.section.label_crf.model_dump(mode="json", exclude={"preset"})
        return {**own, "crf": crf, "seed_threshold": job.source.seed_threshold}

    def label_key(self, job: base.Job) -> Mapping[str, Any]:
        thresholds = job.settings.ternary_thresholds(job.source.method, job.source.shift)
        return ternary_key(job.section.label_crf, thresholds, job.tools.classes)

    def labeller(self, jobs: Sequence[base.Job]) -> base.WriteLabels:
        thresholds = [
            job.settings.ternary_thresholds(job.source.method, job.source.shift) for job in jobs
        ]
        crf, tools = jobs[0].section.label_crf, jobs[0].tools
        return ternary_labeller(crf, tools.memory, tools.classes, thresholds)

    def released(self) -> Sequence[Released]:
        """The file ``res50_irn.pth`` of the network in training, with its paths of pairs."""
        units = [f"displacement.{part}" for part in ("units.0", "units.1", "units.2", "units.3")]
        units += ["displacement.units.4", "displacement.middle", "displacement.late"]
        blocks = {
            **{f"fc_edge{n + 1}": f"boundary.units.{n}" for n in range(5)},
            **{f"fc_dp{n + 1}": unit for n, unit in enumerate(units)},
        }
        return [
            Released(
                "IRN's network",
                "refine",
                ("fc_edge6.weight",),
                [
                    (RESNET50, "pyramid.backbone."),
                    *(
                        (rf"{theirs}\.{n}\.", f"branches.{ours}.{layer}.")
                        for theirs, ours in blocks.items()
                        for n, layer in enumerate(("convolution", "norm"))
                    ),
                    (r"fc_edge6\.", "branches.boundary.last."),
                    (r"fc_dp7\.3\.", "branches.displacement.last."),
                    (r"mean_shift\.running_mean", "branches.displacement.shift"),
                ],
                lambda names: build_irn(RELEASED_RESNET50, weights=RANDOM),
                left_out=rf"{RESNET50_COPIES}|path_indices|disp_target|edge_layers|dp_layers|fc_dp7\.4",
            )
        ]

    def build(self, section: base.RefineSection, tools: base.Tools) -> Irn:
        """The untrained network on the classifier's backbone, with the backbone's first weights."""
        first = tools.backbone.first_weights(tools.seed)
        displacement = section.settings.displacement
        network = build_irn(tools.backbone.spec(), displacement=displacement, **first)
        network.pyramid.accelerate = tools.accelerate
        return network.to(tools.device)

    def train(
        self, network: Any, labelled: base.Labelled, section: base.RefineSection, **options: Any
    ) -> History:
        settings, pyramid = section.settings, network.pyramid.folded()

        def values(name: str, _: nn.Parameter) -> tuple[float, float]:
            factor = settings.displacement_multiplier if name.startswith("displacement.") else 1.0
            return settings.learning_rate * factor, settings.weight_decay

        def loss(model: nn.Module, images: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
            logits, displacement = model(pyramid(images), labels.shape[-2:])
            return irn_loss(logits, labels, settings.radius, displacement, counts).total

        change = partial(augment, pyramid.preprocessing, settings)
        return train_on_pairs(
            *(network.branches, values, _read, change, loss, labelled, settings),
            title=self.title,
            **options,
        )

    def refiner(self, job: base.Job, network: Path, folder: Path) -> base.Refine:
        """Walks the maps; writes the boundaries beside the pseudo masks."""
        trained = Irn.load(network).to(job.tools.device)
        trained.pyramid.accelerate = job.tools.accelerate
        key = f"pyramid {digest_tensors(trained.pyramid.state_dict(), {})}"
        loaded = trained.folded()
        cleaned = job.settings.walked == "cleaned"
        crf = DenseCrf(job.section.label_crf, memory=job.tools.memory) if cleaned else None

        def refine(picture: base.Picture) -> tuple[Tensor, Tensor]:
            image = picture.image.cpu().numpy()
            boundary = boundary_map(loaded, image, picture.shared, key)
            write_plane(folder / "boundaries" / f"{picture.item.id}.png", boundary.cpu().numpy())
            quarter = resize(torch.from_numpy(picture.maps.cam), boundary.shape).to(boundary)
            if crf is not None and len(picture.planes):
                threshold = (job.source.seed_threshold,)
                (labels,) = crf_labels(crf, picture.image, picture.planes, threshold)
                inside = labels == torch.arange(1, len(quarter) + 1).to(labels)[:, None, None]
                quarter = resize((inside * picture.planes).to(boundary), boundary.shape)
            walked = propagate(quarter, boundary, job.settings)
            full = pseudo_maps(walked, (image.shape[0], image.shape[1]))
            return _divided(walked), full

        return refine


REFINEMENT = _IrnRefinement()
