"""The engines that can run a frozen backbone, on your images: which one to choose.

Bare passes: normalised images and their mirrors in memory to features, at the preset's scales. A
run's passes: the image files to features in memory, by the run's own functions. Images are worked
on side by side, each with one thread.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import (
    MISSING,
    Spread,
    in_process,
    interleaved,
    parser,
    ratios,
    show_ratio,
    show_seconds,
    table,
)
from benchmarks.photographs import classifier, photographs
from lpcam.classifiers.engines import EXTRAS, accelerated
from lpcam.classifiers.feature_store import FeatureStore
from lpcam.data.resize import scaled_size
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import LpcamError
from lpcam.runtime.parallel import ordered_map
from lpcam.runtime.resources import native_bfloat16

PRESET = "frozen"
PASS_GOAL = 1.1  #: A run's passes in units of the bare ones.
CONTENDERS = (
    ("torch", "float32"),
    ("onnxruntime", "float32"),
    ("openvino", "float32"),
    ("torch", "bfloat16"),
    ("openvino", "bfloat16"),
)
SIDE = 1024  #: Of the square matrices whose product bounds what the processor can do.


def figures(
    data: str | None, weights: str | None, count: int, repetitions: int, quick: bool, compiled: bool
) -> dict[str, Any]:
    """Seconds of each contender, its error, and what the processor could do at most."""
    threads = torch.get_num_threads()
    settings = LpcamSettings.from_preset(PRESET)
    with (
        photographs(data, "train", count, 100 if quick else 500) as found,
        TemporaryDirectory() as f,
    ):
        model = classifier(weights, found.classes, quick=quick)
        inputs = []
        for item in found.items:
            image = model.preprocessing(item.read())[None]
            for scale in settings.scales:
                size = scaled_size(*image.shape[-2:], scale)
                resized = torch.nn.functional.interpolate(image, size, mode="bicubic")
                inputs.append(torch.cat([resized, resized.flip(-1)]))

        def bare(twin: Any, precision: str) -> None:
            for _ in ordered_map(partial(one_pass, twin, precision), inputs, threads):
                pass

        def whole(folded: Any) -> None:
            options: Any = {"flip": True, "maximum_side": 1024, "dtype": "float16"}
            store = FeatureStore(model, **options, budget=0, keep=(), folded=folded)
            work = partial(consume, store, settings.scales)
            for _ in ordered_map(work, [[item] for item in found.items], threads):
                pass

        calls, errors, told = {}, {}, {}
        for engine, precision in CONTENDERS + (("compile", "float32"),) * compiled:
            name = f"{engine}, {precision}"
            if precision == "bfloat16" and not native_bfloat16():
                told[name] = f"{MISSING}: this processor has no bfloat16"
                continue
            if (
                any(importlib.util.find_spec(p) is None for p in (EXTRAS.get(engine), engine) if p)
                and engine in EXTRAS
            ):
                told[name] = f"{MISSING}: pip install 'lpcam[{EXTRAS[engine]}]'"
                continue
            started = time.perf_counter()
            try:
                twin = accelerated(model, engine, Path(f, f"{name}.onnx"), precision=precision)
                expected = one_pass(model, "float32", inputs[0])
                given = one_pass(twin, precision, inputs[0])
            except LpcamError as error:
                told[name] = f"{MISSING}: {error}"
                continue
            told[name] = f"{time.perf_counter() - started:.1f} s"
            errors[name] = float((expected - given).abs().max() / expected.abs().max())
            calls[name] = partial(bare, twin, precision)
            if precision == "float32" and engine in ("torch", "onnxruntime"):
                calls[f"{name}, a run's"] = partial(whole, lambda _, twin=twin: twin)
        calls["matrix products"] = partial(products, threads)
        seconds = interleaved(calls, repetitions=repetitions)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            for batch in inputs:
                model.features(batch)
        rate = 8 * threads * 2 * SIDE**3 / Spread.of(seconds.pop("matrix products")).median
        return {
            "about": found.describe(),
            "images": len(found.items),
            "seconds": seconds,
            "errors": errors,
            "told": told,
            "bound": counter.get_total_flops() / rate,
            "rate": rate / 1e9,
        }


@torch.inference_mode()
def one_pass(model: Any, precision: str, batch: Tensor) -> Tensor:
    """Features of a batch, in the layout that suits the engine."""
    batch = batch.contiguous(memory_format=getattr(model.backbone, "layout", torch.channels_last))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        return model.features(batch).float()


def products(threads: int) -> None:
    """Eight products of square matrices for each thread, side by side."""
    left, right = torch.ones(2, SIDE, SIDE)
    for _ in ordered_map(lambda _: left @ right, range(8 * threads), threads):
        pass


@torch.inference_mode()
def consume(store: FeatureStore, scales: Sequence[float], items: Any) -> None:
    """Features of images at each scale, which are not kept."""
    for _ in store.pairs(items, scales):
        pass


def report(found: dict[str, Any], threads: int) -> str:
    """The table of one number of threads."""
    seconds, count, base = found["seconds"], found["images"], "torch, float32"
    rows, usable = [], {}
    for name, told in found["told"].items():
        if name not in seconds:
            rows.append([name, told, "", "", "", "", ""])
            continue
        own = Spread.of([value / count for value in seconds[name]])
        run = seconds.get(f"{name}, a run's")
        error = found["errors"][name]
        if name.endswith("float32"):
            usable[name] = own.median
        above = "" if run is None else show_ratio(ratios(run, seconds[name]))
        bound = f"{Spread.of(seconds[name]).median / found['bound']:.2f}"
        faster = show_ratio(ratios(seconds[base], seconds[name]))
        rows.append([name, show_seconds(own), faster, bound, above, f"{error:.1g}", told])
    best = min(usable, key=usable.__getitem__)
    headings = [
        "engine",
        "an image",
        "torch ÷ it",
        "it ÷ the matrix product's time",
        f"a run's passes ÷ bare ones (≤ {PASS_GOAL:g})",
        "largest error",
        "to prepare",
    ]
    return (
        f"{found['about']}, {threads} threads, preset `{PRESET}` (scales and mirrored image); "
        f"matrix products at {found['rate']:.0f} GFLOP/s.\n\n{table(headings, rows)}\n\n"
        f"Fastest in float32: `--run.engine {best.partition(',')[0]}`."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each number of threads."""
    arguments = parser("engines", __doc__)
    text = "torch.compile too, which may take many minutes on a CPU"
    arguments.add_argument("--compile", action="store_true", help=text)
    options = arguments.parse_args(argv)
    print("## Engines\n")
    for threads in options.threads:
        found = in_process(
            "benchmarks.engines:figures",
            threads,
            here=options.quick,
            data=None if options.data is None else str(options.data),
            weights=None if options.weights is None else str(options.weights),
            count=2 if options.quick else 8,
            repetitions=options.repetitions or (1 if options.quick else 5),
            quick=options.quick,
            compiled=options.compile,
        )
        print(report(found, threads), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
