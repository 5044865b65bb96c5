"""Map head: equations 5-6 as one folded vector a class, against the loop over prototypes.

Timed on either side: from the features of an image and its mirror at every scale, in memory, to the
ReLU of FG - BG for every class and scale at the resolution of the features (and, in the second
table, on to the two fused and normalised maps). Both add the un-mirrored features of the mirror
first. Not timed: the backbone, and making the prototypes' folded vectors, which is done once and
not for each image (it has a row of its own).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import (
    Spread,
    in_process,
    interleaved,
    parser,
    peak_memory,
    ratios,
    reset_peak,
    show_bytes,
    show_number,
    show_ratio,
    show_seconds,
    table,
    verdict,
)
from lpcam.classifiers.features import FeaturePair
from lpcam.method.functional import (
    FusedMaps,
    foreground_minus_context,
    fuse_scales,
    lpcam_of_pair,
    unflip,
)
from lpcam.method.multi_scale import lpcam_maps

GOAL = 300.0
TOLERANCE = 1e-5
SCALES = (1.0, 0.5, 1.5, 2.0)
SECONDS = 0.2
"""That a repetition lasts at least; the quick forms are called several times in it."""
SIZE = (500, 500)
"""Of the image in pixels: its grid at stride 16 is 32 x 32."""

Prototypes = list[tuple[Tensor, Tensor]]
"""(K, C) class and (K, C) context prototypes of each class."""


# -- The loop form, from the equations ---------------------------------------------------------


def loop_of_pair(features: Tensor, mirrored: Tensor, prototypes: Prototypes) -> Tensor:
    """Equations 5-6 of one scale as they are written: a cosine map for every prototype.

    FG_n = mean over F'_n of cos(f, F'_i), BG_n = mean over B'_n of cos(f, B'_i), ReLU(FG_n - BG_n).
    """
    features = features + unflip(mirrored)
    maps = []
    for foreground, context in prototypes:
        sides = []
        for side in (foreground, context):
            total = features.new_zeros(features.shape[-2:])
            for prototype in side:
                total = total + F.cosine_similarity(features, prototype[:, None, None], dim=0)
            sides.append(total / side.shape[0])
        maps.append((sides[0] - sides[1]).relu())
    return torch.stack(maps)


def careful_loop_of_pair(features: Tensor, mirrored: Tensor, prototypes: Prototypes) -> Tensor:
    """The same loop with the features normalised once: a product for every prototype."""
    features = F.normalize(features + unflip(mirrored), dim=0).flatten(1)
    maps = []
    for foreground, context in prototypes:
        sides = []
        for side in (foreground, context):
            each = [F.normalize(prototype, dim=0) @ features for prototype in side]
            sides.append(torch.stack(each).mean(0))
        maps.append((sides[0] - sides[1]).relu())
    return torch.stack(maps).reshape(len(prototypes), *mirrored.shape[-2:])


def stacked_of_pair(features: Tensor, mirrored: Tensor, prototypes: Prototypes) -> Tensor:
    """Without a loop: all prototypes of all classes in one product, then their means."""
    features = features + unflip(mirrored)
    rows = F.normalize(torch.cat([torch.cat(pair) for pair in prototypes]), dim=1)
    cosines = rows @ F.normalize(features, dim=0).flatten(1)
    count = prototypes[0][0].shape[0]
    sides = cosines.reshape(len(prototypes), 2, count, -1).mean(2)
    return (sides[:, 0] - sides[:, 1]).relu().reshape(-1, *mirrored.shape[-2:])


# -- Contenders --------------------------------------------------------------------------------


def inputs(
    channels: int, grid: int, classes: int, clusters: int, device: str
) -> tuple[list[FeaturePair], Prototypes]:
    """Seeded features of every scale, not negative as a network's after its ReLU, and centres."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).relu().to(device)

    sides = [round(grid * scale) for scale in SCALES]
    pairs = [FeaturePair(draw(channels, s, s), draw(channels, s, s)) for s in sides]
    prototypes = [(draw(clusters, channels), draw(clusters, channels)) for _ in range(classes)]
    return pairs, prototypes


def contenders(
    pairs: Sequence[FeaturePair], prototypes: Prototypes
) -> dict[str, Callable[[], list[Tensor]]]:
    """The head alone: features in, maps of every scale out."""
    vectors = folded(prototypes)

    def looped(form: Callable[[Tensor, Tensor, Prototypes], Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [form(p.features, _present(p.mirrored), prototypes) for p in pairs]

    return {
        "lpcam": lambda: [lpcam_of_pair(p.features, p.mirrored, vectors) for p in pairs],
        "loop": looped(loop_of_pair),
        "loop, features normalised once": looped(careful_loop_of_pair),
        "no loop, prototypes not folded": looped(stacked_of_pair),
    }


def folded(prototypes: Prototypes) -> Tensor:
    """One vector a class, as :meth:`lpcam.method.prototypes.Prototypes.vectors` makes them."""
    return torch.stack([foreground_minus_context(*pair) for pair in prototypes])


def fused_contenders(
    pairs: Sequence[FeaturePair], prototypes: Prototypes, size: tuple[int, int]
) -> dict[str, Callable[[], FusedMaps]]:
    """The whole of lpcam_maps: features in, fused and normalised maps out."""
    vectors = folded(prototypes)

    def looped() -> FusedMaps:
        return fuse_scales(
            [loop_of_pair(p.features, _present(p.mirrored), prototypes) for p in pairs], size
        )

    return {"lpcam": lambda: lpcam_maps(pairs, vectors, size), "loop": looped}


def _present(mirrored: Tensor | None) -> Tensor:
    if mirrored is None:
        raise ValueError("this benchmark works on images and their mirrors")
    return mirrored


def largest_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Largest absolute difference between two lists of maps."""
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


# -- In a process of its own -------------------------------------------------------------------


@torch.inference_mode()
def measured(
    shape: dict[str, int], device: str, repetitions: int, quick: bool = False
) -> dict[str, Any]:
    """Seconds of every contender, and how far its maps are from ours."""
    pairs, prototypes = inputs(**shape, device=device)
    heads = contenders(pairs, prototypes)
    fused = fused_contenders(pairs, prototypes, SIZE)
    maps = {name: make() for name, make in heads.items()}  # and the loops' warm-up
    loop_fused = fuse_scales(maps["loop"], SIZE)
    timing: dict[str, Any] = {"device": device, "warm_up": 0}
    timing["at_least"] = 0.0 if quick else SECONDS
    return {
        "differences": {
            name: largest_difference(maps["lpcam"], each) for name, each in maps.items()
        },
        "fused_difference": largest_difference(fused["lpcam"](), loop_fused),
        "head": interleaved(heads, repetitions=repetitions, **timing),
        "fused": interleaved(fused, repetitions=max(1, repetitions // 3), **timing),
        "folding": interleaved(
            {"folding": lambda: folded(prototypes)}, repetitions=repetitions, **timing
        )["folding"],
    }


@torch.inference_mode()
def memory(shape: dict[str, int], device: str, name: str) -> int:
    """Bytes that a contender adds to the inputs at its peak."""
    pairs, prototypes = inputs(**shape, device=device)
    call = contenders(pairs, prototypes)[name]
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    reset_peak()  # drawing the inputs took more than they do
    before = peak_memory()
    call()
    return peak_memory() - before


# -- The table ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; 1 if the contenders' maps differ."""
    options = parser("map_head", __doc__).parse_args(argv)
    shape = {"channels": 2048, "grid": 32, "classes": 3, "clusters": 12}
    if options.quick:
        shape = {"channels": 64, "grid": 8, "classes": 2, "clusters": 3}
    repetitions = options.repetitions or (2 if options.quick else 3)
    print("## Map head\n")
    print(
        f"{shape['channels']} × {shape['grid']} × {shape['grid']} features, scales "
        f"{', '.join(f'{s:g}' for s in SCALES)} of it, image and mirror, {shape['classes']} "
        f"classes, K = {shape['clusters']} class and as many context prototypes; float32, "
        f"{options.device}; {repetitions} repetitions.\n"
    )
    rows, fused_rows = [], []
    different = False
    used: dict[str, int] = {}
    for threads in options.threads:
        found = in_process(
            "benchmarks.map_head:measured",
            threads,
            here=options.quick,
            shape=shape,
            device=options.device,
            repetitions=repetitions,
            quick=options.quick,
        )
        if not used:  # it does not depend on the threads
            used = {
                name: in_process(
                    "benchmarks.map_head:memory",
                    1,
                    here=options.quick,
                    shape=shape,
                    device=options.device,
                    name=name,
                )
                for name in found["head"]
            }
        worst = max(*found["differences"].values(), found["fused_difference"])
        different |= worst > TOLERANCE
        for name, seconds in found["head"].items():
            ratio = ratios(seconds, found["head"]["lpcam"])
            goal = verdict(ratio.median, at_least=GOAL) if name == "loop" else ""
            cells = [
                str(threads),
                name,
                show_seconds(Spread.of(seconds)),
                show_ratio(ratio),
                show_bytes(used[name]),
                f"{found['differences'][name]:.0e}",
            ]
            rows.append([*cells, "" if options.quick else goal])
        for name, seconds in found["fused"].items():
            ratio = ratios(seconds, found["fused"]["lpcam"])
            fused_rows.append(
                [str(threads), name, show_seconds(Spread.of(seconds)), show_ratio(ratio)]
            )
        folding = Spread.of(found["folding"])
        fused_rows.append([str(threads), "folding the vectors, once", show_seconds(folding), ""])
    print("Head alone, to the maps of every scale at the resolution of the features:\n")
    headings = ["threads", "form", "time", "× ours", "memory added", "largest difference", "goal"]
    print(table(headings, rows))
    print("\nWith resizing, sum over scales and normalisation (`extract.lpcam_maps`):\n")
    print(table(["threads", "form", "time", "× ours"], fused_rows))
    if different:
        print(f"\nThe forms' maps differ by more than {show_number(TOLERANCE)}: **missed**")
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
