"""Dense CRF: ours, on lattices made by torch, against the compiled program pydensecrf.

Timed on either side: from an RGB image and unary energies in memory to the marginals, with IRN's
parameters: both kernels' lattices, their normalisation, and ten iterations. The kernel of the
positions alone hangs on the image's size; ours keeps it from image to image, and a row of its own
shows the time with it made anew. IRN's labels are four problems of an image, two of CAM and two of
LPCAM: rows show them together, as a run solves them, and one by one. The compiled program has one
thread whatever it is given.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import (
    MISSING,
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
from benchmarks.photographs import photographs
from lpcam.data.images import read_image
from lpcam.refine.crf import CrfSettings, DenseCrf, unary_from_labels

GOALS = {1: 1.0, 2: 1.5}
"""Least ratio of the compiled program's time to ours, by the number of threads."""
TOLERANCE = 1e-3
SAME_LABELS = 0.9999
LABELS = (3, 21)
PEER = "pydensecrf"
OURS = "lpcam"
SETTINGS = CrfSettings.from_preset("irn")


def problem(name: str | None, labels: int, quick: bool) -> tuple[Tensor, Tensor]:
    """An image (H, W, 3) and hard labels (H, W) on it: blocks, some pixels of them wrong."""
    height, width = (24, 32) if quick else (375, 500)
    image = None
    with photographs(name, "train", 40 if name else 1) as found:
        for item in found.items:
            each = read_image(item.image)
            if each.shape[:2] == (375, 500):
                image = each
                break
    if image is None:
        raise ValueError("the data hold no photograph of 375 x 500 pixels")
    picture = torch.from_numpy(image)[:height, :width].contiguous()
    generator = torch.Generator().manual_seed(labels)
    coarse = torch.randint(labels, (1, 1, 5, 7), generator=generator).float()
    blocks = torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")
    given = blocks[0, 0].long()
    wrong = torch.rand(given.shape, generator=generator) < 0.05
    return picture, torch.where(
        wrong, torch.randint(labels, given.shape, generator=generator), given
    )


def peer() -> Any | None:
    """The compiled program's module, or None where it is not installed."""
    try:
        return importlib.import_module("pydensecrf.densecrf")
    except ImportError:
        return None


def by_peer(image: Tensor, unary: Tensor) -> Tensor:
    """Marginals (n, H, W) of the compiled program."""
    module = peer()
    if module is None:
        raise ValueError("pydensecrf is not installed")
    count, height, width = unary.shape
    field = module.DenseCRF2D(width, height, count)
    field.setUnaryEnergy(unary.reshape(count, -1).numpy())
    field.addPairwiseGaussian(sxy=SETTINGS.gaussian_sxy, compat=SETTINGS.gaussian_weight)
    field.addPairwiseBilateral(
        sxy=SETTINGS.bilateral_sxy,
        srgb=SETTINGS.bilateral_srgb,
        rgbim=image.numpy(),
        compat=SETTINGS.bilateral_weight,
    )
    found = np.array(field.inference(SETTINGS.iterations), dtype=np.float32)
    return torch.from_numpy(found).view(count, height, width)


def contenders(image: Tensor, labels: Tensor, count: int) -> dict[str, Callable[[], Any]]:
    """Calls that make the marginals."""
    unary = unary_from_labels(labels, count, SETTINGS.gt_prob)
    kept = DenseCrf(SETTINGS)
    calls: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: kept(image, unary),
        f"{OURS}, first image of a size": lambda: DenseCrf(SETTINGS)(image, unary),
        f"{OURS}, four problems at once": lambda: kept(image, unary.expand(4, -1, -1, -1)),
        f"{OURS}, four problems one by one": lambda: [kept(image, unary) for _ in range(4)],
    }
    if peer() is not None and image.device.type == "cpu":
        calls[PEER] = lambda: by_peer(image, unary)
    return calls


# -- In a process of its own -------------------------------------------------------------------


@torch.inference_mode()
def measured(
    data: str | None, labels: int, device: str, repetitions: int, quick: bool
) -> dict[str, Any]:
    """Seconds of every contender, and how far our marginals are from the peer's."""
    image, given = problem(data, labels, quick)
    calls = contenders(image.to(device), given.to(device), labels)
    result: dict[str, Any] = {"size": list(image.shape[:2])}
    if PEER in calls:
        ours, theirs = calls[OURS](), calls[PEER]()
        result["difference"] = float((ours - theirs).abs().max())
        result["same"] = float((ours.argmax(0) == theirs.argmax(0)).double().mean())
    result["seconds"] = interleaved(calls, repetitions=repetitions, device=device)
    return result


@torch.inference_mode()
def memory(data: str | None, labels: int, device: str, name: str, quick: bool) -> int:
    """Bytes that a contender's first call adds at its peak to the inputs and the code."""
    image, given = problem(data, labels, quick)
    # The libraries' code and tables, on a corner.
    contenders(*(x[:20, :20].contiguous().to(device) for x in (image, given)), labels)[name]()
    call = contenders(image.to(device), given.to(device), labels)[name]
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    reset_peak()
    before = peak_memory()
    call()
    return peak_memory() - before


# -- The table ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if our marginals are not the compiled program's."""
    options = parser("crf", __doc__).parse_args(argv)
    repetitions = options.repetitions or (2 if options.quick else 9)
    data = str(options.data) if options.data else None
    common = {"data": data, "device": options.device, "quick": options.quick}
    rows, notes = [], []
    different = False
    size = [0, 0]
    for labels in (3,) if options.quick else LABELS:
        used: dict[str, int] = {}
        for threads in options.threads:
            found = in_process(
                "benchmarks.crf:measured",
                threads,
                here=options.quick,
                labels=labels,
                repetitions=repetitions,
                **common,
            )
            size = found["size"]
            seconds = found["seconds"]
            if not used:  # it does not depend on the threads
                used = {
                    name: in_process(
                        "benchmarks.crf:memory",
                        1,
                        here=options.quick,
                        labels=labels,
                        name=name,
                        **common,
                    )
                    for name in seconds
                }
            for name, each in seconds.items():
                ratio = ratios(seconds[PEER], each) if PEER in seconds else None
                judged = name == OURS and threads in GOALS and not options.quick
                rows.append(
                    [
                        str(threads),
                        str(labels),
                        name,
                        show_seconds(Spread.of(each)),
                        show_ratio(ratio) if ratio else MISSING,
                        show_number(1.0 / Spread.of(each).median),
                        show_bytes(used[name]),
                        verdict(ratio.median, at_least=GOALS[threads]) if ratio and judged else "",
                    ]
                )
            if "same" in found and threads == options.threads[0]:
                bad = found["same"] < SAME_LABELS or found["difference"] > TOLERANCE
                different |= bad
                notes.append(
                    f"{labels} labels: the same label on {found['same']:.4%} of pixels, marginals "
                    f"within {found['difference']:.0e}{' **missed**' if bad else ''}."
                )
    source = "a photograph" if data else "a seeded image (no `--data` was given)"
    print("## Crf\n")
    print(
        f"{source[0].upper()}{source[1:]} of {size[0]} × {size[1]} pixels, IRN's parameters, hard "
        f"labels; float32, {options.device}; {repetitions} repetitions.\n"
    )
    print(
        table(
            [
                "threads",
                "labels",
                "form",
                "time",
                f"times as fast as {PEER}",
                "images a second",
                "memory added",
                "goal",
            ],
            rows,
        )
    )
    if not notes:
        reason = "it runs on a CPU alone" if options.device != "cpu" else "it is not installed"
        notes.append(f"{PEER} {MISSING}: {reason}.")
    print("\n" + "\n".join(notes))
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
