"""Time and memory of the clustering, against its peers, and of a fit over more and more images.

    python -m benchmarks.fit            # the sizes of the documentation, some minutes
    python -m benchmarks.fit --quick    # seconds, only to see that it runs

Every contender runs in a process of its own, on the same rows from the same first centres. Prints
markdown tables. A peer that is not installed has a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.measure import environment, peak_memory
from lpcam.method.clustering import cosine_kmeans
from lpcam.method.prototypes import make_prototypes
from lpcam.method.reservoir import Reservoir
from lpcam.method.settings import LpcamSettings

EXTRA = 'pip install "lpcam[benchmarks]"'
MARGIN = 1e-3
"""Mean cosines this close count as equal."""
SAME_ITERATIONS = 3
SAMPLE = 5
"""*ours* clusters one row in this many first."""
MOST_ITERATIONS = 40
OWN_SETS = {"scikit-learn": 1, "kmeans_pytorch": 1}
"""Sets of first centres on which a slow contender's own rule is timed; the others: all sets."""
PEERS = {
    "kmeans_pytorch": "kmeans_pytorch",
    "scikit-learn": "sklearn",
    "faiss": "faiss",
    "faiss, subsampling": "faiss",
}


def clustered_rows(count: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Rows like the last features of a CNN: ReLU, 300 overlapping clusters, varying norms."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rank = 32
    mixing = normal(rank, channels) / rank**0.5
    clusters = normal(300, rank)
    members = clusters[torch.randint(300, (count,), generator=generator)]
    rows = (members + 0.6 * normal(count, rank)) @ mixing - 0.5
    for part in rows.split(4096):
        part.add_(0.7 * normal(*part.shape)).relu_().mul_(torch.exp(0.3 * normal(len(part), 1)))
    return rows


def mean_cosine(rows: torch.Tensor, centers: torch.Tensor) -> float:
    """Mean over rows of the cosine to the nearest centre."""
    directions = F.normalize(centers.float(), dim=1).T
    total = sum(
        float((F.normalize(part, dim=1) @ directions).amax(1).double().sum())
        for part in rows.split(4096)
    )
    return total / len(rows)


# -- Contenders: (rows, first centres, iterations or None for its own rule) to centres -----------

Contender = Callable[[torch.Tensor, torch.Tensor, int | None], torch.Tensor]


def ours(rows: torch.Tensor, first: torch.Tensor, limit: int | None) -> torch.Tensor:
    """Clusters a sample of the rows first, then all rows from the centres of the sample."""
    size = max(len(rows) // SAMPLE, len(first))
    generator = torch.Generator().manual_seed(size)
    sample = rows[torch.randint(len(rows), (size,), generator=generator)]
    for part, tolerance in ((sample[: max(size // 4, len(first))], 1e-3), (sample, 1e-4)):
        first = cosine_kmeans(
            part, len(first), init=first, centers="unit", tolerance=tolerance
        ).centers
    return ours_every_row(rows, first, limit)


def ours_every_row(rows: torch.Tensor, first: torch.Tensor, limit: int | None) -> torch.Tensor:
    """All rows from the start."""
    found = cosine_kmeans(rows, len(first), init=first, centers="unit", max_iterations=limit or 100)
    return found.centers


def ours_mean(rows: torch.Tensor, first: torch.Tensor, limit: int | None) -> torch.Tensor:
    """The arithmetic of kmeans_pytorch: mean centres, all rows, so many iterations."""
    found = cosine_kmeans(
        rows, len(first), init=first, tolerance=1e-30, max_iterations=limit or SAME_ITERATIONS
    )
    return found.centers


def kmeans_pytorch(rows: torch.Tensor, first: torch.Tensor, limit: int | None) -> torch.Tensor:
    """It has no limit of iterations, so its progress meter stops it."""
    import kmeans_pytorch as package  # type: ignore[import-untyped]  # noqa: PLC0415

    class Enough(Exception):  # noqa: N818
        pass

    class Meter:
        count = 0

        def __init__(self, **_: Any) -> None: ...

        def set_postfix(self, **_: Any) -> None: ...

        def update(self) -> None:
            self.count += 1
            if self.count == (limit or SAME_ITERATIONS):
                raise Enough

    state = first.clone()
    package.initialize = lambda *_: state  # it updates the first centres in place
    package.tqdm = Meter
    package.print = lambda *_: None
    with contextlib.suppress(Enough):
        package.kmeans(rows, len(first), distance="cosine", tol=0.0, device=torch.device("cpu"))
    return state


def scikit_learn(rows: torch.Tensor, first: torch.Tensor, limit: int | None) -> torch.Tensor:
    """KMeans (Lloyd) with its default tolerance."""
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]  # noqa: PLC0415

    stop = {} if limit is None else {"max_iter": limit, "tol": 0.0}
    model = KMeans(len(first), init=first.numpy(), n_init=1, copy_x=False, **stop)
    return torch.from_numpy(model.fit(rows.numpy()).cluster_centers_)


def faiss_kmeans(rows: torch.Tensor, first: torch.Tensor, limit: int | None) -> torch.Tensor:
    """Spherical, 25 iterations by default, subsampling switched off."""
    return _faiss(rows, first, niter=limit or 25, max_points_per_centroid=len(rows))


def faiss_subsampled(rows: torch.Tensor, first: torch.Tensor, limit: int | None) -> torch.Tensor:
    """Spherical with its default subsampling of 256 rows a cluster."""
    return _faiss(rows, first, niter=limit or 25)


def _faiss(rows: torch.Tensor, first: torch.Tensor, **options: int) -> torch.Tensor:
    import faiss  # type: ignore[import-untyped]  # noqa: PLC0415

    model = faiss.Kmeans(rows.shape[1], len(first), spherical=True, **options)
    model.train(rows.numpy(), init_centroids=first.numpy())
    return torch.from_numpy(model.centroids.copy())


CONTENDERS: dict[str, tuple[Contender, bool]] = {
    # name: function, whether it is given normalised rows
    "ours": (ours, False),
    "ours, all rows from the start": (ours_every_row, False),
    "ours, mean centres": (ours_mean, False),
    "kmeans_pytorch": (kmeans_pytorch, False),
    "scikit-learn": (scikit_learn, True),
    "faiss": (faiss_kmeans, True),
    "faiss, subsampling": (faiss_subsampled, True),
}


def memory_mib() -> float:
    """Peak resident memory of this process."""
    return peak_memory() / 2**20


def timed(
    function: Contender, rows: torch.Tensor, sets: torch.Tensor, limit: int | None
) -> tuple[list[float], list[float]]:
    """Seconds and mean cosine from each set of first centres."""
    seconds, cosines = [], []
    for first in sets:
        start = time.perf_counter()
        centers = function(rows, first, limit)
        seconds.append(time.perf_counter() - start)
        cosines.append(mean_cosine(rows, centers))
    return seconds, cosines


def contend(name: str, folder: Path, target: float | None, limit: int | None) -> dict[str, Any]:
    """In a process of its own: time a contender by its own rule, and to a mean cosine.

    With a target, the fewest iterations are looked for by halving, unless ``limit`` tells them
    (0: there are none).
    """
    function, normalised = CONTENDERS[name]
    rows = torch.from_numpy(np.load(folder / ("unit.npy" if normalised else "rows.npy")))
    sets = torch.from_numpy(np.load(folder / "first.npy"))
    sets = F.normalize(sets, dim=2) if normalised else sets
    function(rows[:1000], sets[0], 1)  # warm-up: imports, thread pools
    before = memory_mib()
    seconds, cosines = timed(function, rows, sets[: OWN_SETS.get(name)], None)
    found: dict[str, Any] = {"seconds": seconds, "cosines": cosines}
    found["memory"], found["rows"] = memory_mib(), before
    if limit:
        found["limit"], found["least"] = limit, timed(function, rows, sets, limit)[0]
    elif target is not None and limit is None:
        low, high, probe = 1, MOST_ITERATIONS + 1, MOST_ITERATIONS
        while low < high:
            seconds, cosines = timed(function, rows, sets, probe)
            if statistics.fmean(cosines) >= target:
                found["limit"], found["least"], high = probe, seconds, probe
            elif probe == MOST_ITERATIONS:
                break
            else:
                low = probe + 1
            probe = (low + high) // 2
    return found


def stream(images: int, locations: int, channels: int, keep: int) -> dict[str, Any]:
    """In a process of its own: a fit over so many images of 8 classes, both sides."""
    settings = LpcamSettings.from_preset("frozen", max_features=keep)
    pool = clustered_rows(4 * locations, channels)
    weight = torch.randn(8, channels, generator=torch.Generator().manual_seed(1)) / channels**0.5
    start = time.perf_counter()
    reservoir = Reservoir(settings.max_features, 0)
    for number in range(images):
        part = pool[number % 4 * locations :][:locations]
        for side in ("foreground", "context"):
            reservoir.add(number % 8, side, part, f"image {number}")  # type: ignore[arg-type]
    collected = time.perf_counter()
    make_prototypes(reservoir, weight, tuple("abcdefgh"), settings, seed=0)
    end = time.perf_counter()
    return {"collect": collected - start, "cluster": end - collected, "memory": memory_mib()}


# -- The parent ----------------------------------------------------------------------------------


def child(arguments: Sequence[str], threads: int, *, here: bool = False) -> dict[str, Any]:
    """Run this file in a process of its own (or ``here``) and read the JSON of its last line."""
    if here:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            main([*arguments, "--threads", str(torch.get_num_threads())])
        found: dict[str, Any] = json.loads(text.getvalue().strip().splitlines()[-1])
        return found
    command = [sys.executable, "-m", "benchmarks.fit", *arguments, "--threads", str(threads)]
    done = subprocess.run(
        command, env=environment(threads), capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr else "stopped"}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def shown(seconds: Sequence[float]) -> str:
    """Median and range."""
    middle = statistics.median(seconds)
    return f"{middle:.3g} ({min(seconds):.3g} to {max(seconds):.3g})"


def compare(folder: Path, threads: Sequence[int], *, here: bool) -> None:
    """Print the table of the contenders."""
    rows = torch.from_numpy(np.load(folder / "rows.npy"))
    sets = torch.from_numpy(np.load(folder / "first.npy"))
    best = statistics.fmean(
        cosine_kmeans(rows, len(first), init=first, centers="unit", tolerance=1e-6).objective
        for first in sets
    )
    target = best - MARGIN
    print(
        f"\nRows {len(rows):,} × {rows.shape[1]} float32, K = {sets.shape[1]}, the same "
        f"{len(sets)} sets of first centres (rows of the data) for all, after a warm-up; seconds "
        "are median (range) over the sets, ratios the median of the ratios set by set. Spherical "
        "k-means on all rows, run on and on, reaches a mean cosine "
        f"of {best:.4f}, averaged over the sets; equal means at least {target:.4f} on average. "
        "'Least': the fewest iterations over all rows that reach an equal mean cosine (of a "
        f"subsampling peer, over its sample), at most {MOST_ITERATIONS}. 'Own rule': each "
        "contender's default way to stop (scikit-learn: from the first set alone). scikit-learn "
        "and faiss are given rows that are normalised already.\n"
    )
    print(
        "| contender | threads | least, s | iterations | ÷ ours | own rule, s | mean cosine | "
        "÷ ours | peak MiB | of it, before |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    limits: dict[str, int] = {}
    for count in threads:
        ours_found: dict[str, Any] = {}
        for name in ("ours", "ours, all rows from the start", *list(PEERS)[1:]):
            if (row := missing(name, count)) is not None:
                print(row + " | | | |")
                continue
            arguments = ["--contender", name, "--folder", str(folder), "--target", str(target)]
            if name in limits:
                arguments += ["--limit", str(limits[name])]
            found = child(arguments, count, here=here)
            if "error" in found:
                print(f"| {name} | {count} | {found['error']} | | | | | | | |")
                continue
            limits[name] = found.get("limit", 0)
            ours_found = ours_found or found
            print(
                f"| {name} | {count} | {shown(found['least']) if 'least' in found else 'never'} | "
                f"{found.get('limit', '')} | {ratio(found, ours_found, 'least')} | "
                f"{shown(found['seconds'])} | {statistics.fmean(found['cosines']):.4f} | "
                f"{ratio(found, ours_found, 'seconds')} | {found['memory']:.0f} | "
                f"{found['rows']:.0f} |",
                flush=True,
            )
    compare_same_iterations(folder, threads, here=here)


def ratio(found: dict[str, Any], ours_found: dict[str, Any], name: str) -> str:
    """Median over the sets of first centres of the times by ours."""
    if name not in found or name not in ours_found:
        return ""
    pairs = zip(found[name], ours_found[name], strict=False)  # a slow one has fewer sets
    return f"{statistics.median(peer / own for peer, own in pairs):.1f}"


def compare_same_iterations(folder: Path, threads: Sequence[int], *, here: bool) -> None:
    """Print the table against kmeans_pytorch."""
    print(
        f"\nThe same {SAME_ITERATIONS} iterations over all rows from the same first centres, mean "
        "centres (kmeans_pytorch: from the first set alone):\n"
    )
    print("| contender | threads | seconds | mean cosine, first set | ÷ ours | peak MiB |")
    print("|---|---|---|---|---|---|")
    for count in threads:
        ours_found: dict[str, Any] = {}
        for name in ("ours, mean centres", "kmeans_pytorch"):
            if (row := missing(name, count)) is not None:
                print(row)
                continue
            found = child(["--contender", name, "--folder", str(folder)], count, here=here)
            if "error" in found:
                print(f"| {name} | {count} | {found['error']} | | | |")
                continue
            ours_found = ours_found or found
            print(
                f"| {name} | {count} | {shown(found['seconds'])} | {found['cosines'][0]:.4f} | "
                f"{ratio(found, ours_found, 'seconds')} | {found['memory']:.0f} |",
                flush=True,
            )


def missing(name: str, threads: int) -> str | None:
    """The row of a peer that is not installed."""
    if name not in PEERS or importlib.util.find_spec(PEERS[name]) is not None:
        return None
    return f"| {name} | {threads} | not installed: {EXTRA} | | | |"


def compare_streams(
    images: int, locations: int, channels: int, keep: int, threads: int, *, here: bool
) -> None:
    """Print the table of a fit over 1, 3 and 10 times the images."""
    print(
        f"\nA streaming fit: images of {locations} locations × {channels} channels, 8 classes, a "
        f"reservoir of {keep:,} a class and side in half precision, {threads} thread(s), "
        "preset frozen otherwise:\n"
    )
    print("| images | collect s | cluster s | peak MiB | ÷ 1× |\n|---|---|---|---|---|")
    first = float("nan")
    for times in (1, 3, 10):
        sizes = (times * images, locations, channels, keep)
        found = child(["--stream", ",".join(map(str, sizes))], threads, here=here)
        if "error" in found:
            print(f"| {times * images:,} | {found['error']} | | | |")
            continue
        first = found["memory"] if times == 1 else first
        print(
            f"| {times * images:,} | {found['collect']:.2f} | {found['cluster']:.2f} | "
            f"{found['memory']:.0f} | {found['memory'] / first:.3f} |",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; with --contender or --stream do one part and print its JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, one thread, one process")
    parser.add_argument("--sets", type=int, default=3, help="sets of first centres")
    parser.add_argument("--threads", type=str, default="1,2")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stream", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    logging.getLogger("lpcam").setLevel(logging.ERROR)  # a limit of iterations is meant here
    threads = [int(text) for text in options.threads.split(",")]
    if options.contender or options.stream:
        torch.set_num_threads(threads[0])
        if options.stream:
            print(json.dumps(stream(*map(int, options.stream.split(",")))))
        else:
            found = contend(options.contender, options.folder, options.target, options.limit)
            print(json.dumps(found))
        return 0
    if options.quick:
        threads = threads[:1]
    count, channels, clusters = (6000, 64, 8) if options.quick else (50_000, 2048, 12)
    versions = {name: _version(module) for name, module in PEERS.items() if "," not in name}
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, Python "
        f"{platform.python_version()}, torch {torch.__version__}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        rows = clustered_rows(count, channels)
        np.save(folder / "rows.npy", rows.numpy())
        np.save(folder / "unit.npy", F.normalize(rows, dim=1).numpy())
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randperm(count, generator=generator)[: options.sets * clusters]
        np.save(folder / "first.npy", rows[drawn].view(-1, clusters, channels).numpy())
        compare(folder, threads, here=options.quick)
    if options.quick:
        compare_streams(20, 50, 64, 200, threads[0], here=True)
    else:
        compare_streams(500, 700, 1280, 2000, threads[-1], here=False)
    return 0


def _version(module: str) -> str:
    from importlib import metadata  # noqa: PLC0415

    names = {"sklearn": "scikit-learn", "faiss": "faiss-cpu", "kmeans_pytorch": "kmeans-pytorch"}
    try:
        return metadata.version(names[module])
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    raise SystemExit(main())
