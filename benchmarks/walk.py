"""Random walk: x T^256 as a stencil, against squaring the dense matrix eight times.

Timed on either side: from the boundaries and the maps of one image, in memory, to the walked maps,
the making of the matrix or of the pairs' weights included. The dense form is written here from the
specification (float32, as the released program computes). At full size one squaring is timed, once,
and counted eight times: all of them take minutes. The product with a sparse matrix (CSR) is the
plain way in between.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import (
    Spread,
    in_process,
    interleaved,
    parser,
    peak_memory,
    reset_peak,
    show_bytes,
    show_number,
    show_seconds,
    synchronise,
    table,
    verdict,
)
from lpcam.refine.irn import IrnSettings
from lpcam.refine.walk import path_maxima, random_walk

GOAL = 100.0
SECONDS_GOAL = 0.3
MEMORY_GOAL = 50 * 2**20
TOLERANCE = 1e-3
"""Of the forms' results: the dense and the CSR form round more than ours."""
SETTINGS = IrnSettings.from_preset("official")
OURS = "lpcam"
DENSE = "dense, squared"


def inputs(height: int, width: int, classes: int, device: str) -> tuple[Tensor, Tensor]:
    """Seeded maps (K, h, w) and boundaries (h, w): blobs with edges between them, as in images."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 1 + classes, 9, 12, generator=generator)
    full = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1)
    edge = torch.exp(-60 * (full[0] - 0.5).abs())
    return full[1:].to(device), edge.to(device)


# -- The forms ---------------------------------------------------------------------------------


def pairs(edge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Source, destination and affinity to the power of beta of every pair, each direction."""
    height, width = edge.shape
    cells = torch.arange(height * width, device=edge.device).reshape(height, width)
    rows, columns, values = [cells.flatten()], [cells.flatten()], [torch.ones_like(edge).flatten()]
    for (dy, dx), maximum in path_maxima(edge, SETTINGS.walk_radius):
        first = cells[: height - dy, max(0, -dx) : width - max(0, dx)].flatten()
        second = cells[dy:, max(0, dx) : width - max(0, -dx)].flatten()
        value = (1 - maximum).pow(SETTINGS.beta).flatten()
        rows += [first, second]
        columns += [second, first]
        values += [value, value]
    return torch.cat(rows), torch.cat(columns), torch.cat(values)


def csr(maps: Tensor, edge: Tensor) -> Tensor:
    """256 products of a sparse matrix with the maps as columns: T is symmetric but for its norm."""
    count = edge.numel()
    rows, columns, values = pairs(edge)
    with torch.sparse.check_sparse_tensor_invariants(False):
        matrix = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (count, count))
        sparse = matrix.coalesce().to_sparse_csr()
    norm = values.new_zeros(count).index_add_(0, columns, values)[:, None]
    walked = maps.flatten(1).T.contiguous()
    for _ in range(2**SETTINGS.exponent):
        walked = (sparse @ walked) / norm
    return walked.T.reshape(maps.shape)


def dense_matrix(edge: Tensor) -> Tensor:
    """(n, n), columns normalised to sum 1."""
    count = edge.numel()
    rows, columns, values = pairs(edge)
    matrix = torch.zeros(count, count, dtype=edge.dtype, device=edge.device)
    matrix[rows, columns] = values
    return matrix.div_(matrix.sum(0, keepdim=True))


def dense(maps: Tensor, edge: Tensor) -> Tensor:
    """The released program's form."""
    matrix = dense_matrix(edge)
    for _ in range(SETTINGS.exponent):
        matrix = matrix @ matrix
    return (maps.flatten(1) @ matrix).reshape(maps.shape)


def stencil(maps: Tensor, edge: Tensor, tolerance: float) -> Tensor:
    """Ours."""
    return random_walk(
        maps,
        edge,
        radius=SETTINGS.walk_radius,
        beta=SETTINGS.beta,
        exponent=SETTINGS.exponent,
        tolerance=tolerance,
    )


def contenders(maps: Tensor, edge: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The forms that take less than a second."""
    return {
        OURS: lambda: stencil(maps, edge, IrnSettings.from_preset("default").tolerance),
        "lpcam, all 256 terms": lambda: stencil(maps, edge, 0.0),
        "CSR product, 256 times": lambda: csr(maps, edge),
    }


# -- In a process of its own -------------------------------------------------------------------


@torch.inference_mode()
def measured(shape: dict[str, int], device: str, repetitions: int) -> dict[str, Any]:
    """Seconds of every form, and how far its result is from that in float64."""
    maps, edge = inputs(**shape, device=device)
    forms = contenders(maps, edge)
    exact = stencil(maps.double(), edge.double(), 0.0)
    return {
        "differences": {n: float((make() - exact).abs().max()) for n, make in forms.items()},
        "seconds": interleaved(forms, repetitions=repetitions, device=device),
    }


@torch.inference_mode()
def squared(shape: dict[str, int], device: str) -> dict[str, float]:
    """Seconds of making the dense matrix and of one squaring, and the bytes both add."""
    edge = inputs(**shape, device=device)[1]
    dense(*inputs(8, 8, 1, device))  # warm-up
    reset_peak()
    before = peak_memory()
    started = time.perf_counter()
    matrix = dense_matrix(edge)
    synchronise(device)
    made = time.perf_counter()
    matrix = matrix @ matrix
    synchronise(device)
    done = time.perf_counter()
    return {"make": made - started, "squaring": done - made, "memory": peak_memory() - before}


@torch.inference_mode()
def memory(shape: dict[str, int], device: str, name: str) -> int:
    """Bytes that a form adds to the inputs at its peak, in a process that has walked before."""
    small = contenders(*inputs(8, 8, 1, device))[name]
    small()
    call = contenders(*inputs(**shape, device=device))[name]
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
    """Print the table; 1 if the forms' results differ."""
    options = parser("walk", __doc__).parse_args(argv)
    grid = {"height": 12, "width": 15} if options.quick else {"height": 94, "width": 125}
    repetitions = options.repetitions or (1 if options.quick else 9)
    here = {"here": options.quick, "device": options.device}
    print("## Walk\n")
    print(
        f"{grid['height']} × {grid['width']} cells (an image of {4 * grid['height']} × "
        f"{4 * grid['width']} pixels), radius {SETTINGS.walk_radius}, beta {SETTINGS.beta:g}, 256 "
        f"steps; float32, {options.device}; from boundaries and maps to walked maps, the matrix "
        f"made anew for each image; {repetitions} repetitions, of the dense form one squaring "
        "counted eight times.\n"
    )
    rows = []
    worst = 0.0
    used: dict[str, int] = {}
    for threads in options.threads:
        matrix = in_process(
            "benchmarks.walk:squared", threads, shape={**grid, "classes": 1}, **here
        )
        whole = matrix["make"] + SETTINGS.exponent * matrix["squaring"]
        for classes in (1, 3):
            shape = {**grid, "classes": classes}
            found = in_process(
                "benchmarks.walk:measured", threads, shape=shape, repetitions=repetitions, **here
            )
            for name, seconds in found["seconds"].items():
                if (known := f"{name} {classes}") not in used:  # it hardly depends on the threads
                    used[known] = in_process(
                        "benchmarks.walk:memory", 1, shape=shape, name=name, **here
                    )
                spread = Spread.of(seconds)
                worst = max(worst, found["differences"][name])
                goals = ""
                if name == OURS and not options.quick:
                    goals = "; ".join(
                        (
                            f"dense {verdict(whole / spread.median, at_least=GOAL)}",
                            f"s {verdict(spread.median, at_most=SECONDS_GOAL)}",
                            f"MiB {verdict(used[known] / 2**20, at_most=MEMORY_GOAL / 2**20)}",
                        )
                    )
                cells = [str(threads), str(classes), name, show_seconds(spread)]
                cells += [show_number(whole / spread.median), show_bytes(used[known])]
                rows.append([*cells, f"{found['differences'][name]:.0e}", goals])
        cells = [
            str(threads),
            "any",
            DENSE,
            f"{whole:.3g} s (one squaring {matrix['squaring']:.3g} s)",
        ]
        rows.append([*cells, "1", show_bytes(matrix["memory"]), "", ""])
    headings = ["threads", "classes", "form", "time", "dense is × slower", "memory added"]
    print(table([*headings, "difference from float64", "goals"], rows))
    if worst > TOLERANCE:
        print(f"\nThe forms' results differ by more than {TOLERANCE:g}: **missed**")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
