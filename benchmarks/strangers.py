"""Masks of folders that nobody tuned for: what a run chooses, beside the best by the truth.

    python -m benchmarks.strangers --data VOC_FOLDER --weights FILE --folders FOLDER ... --runs KEEP

Each data set (the demo's drawings, voc_animals train and val, every folder of images with labels
and masks) is run with a preset that was tuned on photographs and with ``adaptive``, the latter with
several seeds. Masks serve for scoring alone. Runs are kept in KEEP and go on from there.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import parser, table
from benchmarks.photographs import RECIPE
from lpcam.data.map_files import map_path, read_maps
from lpcam.evaluation.judge import THRESHOLDS, colour_bins, curves, last_of_plateau, step_of
from lpcam.evaluation.segmentation import confusion, scores, truth_labels
from lpcam.method.seeds import seeds
from lpcam.pipeline import demo
from lpcam.pipeline.datasets import read_dataset
from lpcam.pipeline.recipe import load_recipe
from lpcam.pipeline.run import run
from lpcam.pipeline.run_folder import RESULTS, RunFolder
from lpcam.runtime.files import read_json
from lpcam.runtime.parallel import ordered_map

DEVIATION = 0.1  #: Of an image's threshold from that of its data set.
TUNED, ADAPTIVE = "tuned", "adaptive"
DEMO = "drawings"
SAME_CLASSIFIER = {"held out": "photographs"}
PRESETS = {DEMO: "small"}  #: Tuned presets; that of photographs is `frozen`.
Rows = dict[str, dict[str, Any]]
"""By method: ``best`` and ``chosen`` mIoU in [0, 1], and what the judge said."""


@dataclass
class Figures:
    """The rows of each run of one data set."""

    name: str
    tuned: Rows = field(default_factory=dict)
    adaptive: list[Rows] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    choices: list[dict[str, str]] = field(default_factory=list)

    def values(self, method: str, key: str) -> list[float]:
        """Percent, for each seed."""
        return [100 * rows[method][key] for rows in self.adaptive if key in rows.get(method, {})]


def rows_of(folder: Path) -> Rows:
    """What a finished run says of each method."""
    found: Rows = {}
    metrics = read_json(RunFolder(folder).metrics)
    for row in metrics["rows"]:
        key = "best" if row["threshold_source"] == "ground truth" else "chosen"
        found.setdefault(row["method"], {})[key] = row["miou"]
    early = RunFolder(folder).early.parent / "stage.json"
    for way in read_json(early)["output"]["ways"] if early.is_file() else ():
        method = "LPCAM-E" if way["chosen"] else way["base"] if way["fusion"] == "none" else None
        if method is not None:
            found[method]["information"] = way["information"]
    return found


def per_image(folder: Path, method: str, threshold: float) -> float:
    """mIoU of masks at each image's own threshold near the data set's, by colours."""
    recipe = RunFolder(folder).load_recipe()
    dataset = read_dataset(recipe, ("maps", "evaluate"))
    names = dataset.classes.names
    maps_folder = folder / RESULTS[method]

    def count(item: Any) -> torch.Tensor:
        image, maps = item.read(), read_maps(map_path(maps_folder, item.id))
        step, planes = step_of(image.shape[:2]), torch.from_numpy(maps.high_res)
        found = curves(colour_bins(image[::step, ::step]), planes[:, ::step, ::step], None)
        seed = seeds(planes, around(found, threshold))
        labels = torch.tensor([0, *(int(key) + 1 for key in maps.keys)])[seed]
        truth = truth_labels(item.read_mask(), dataset.classes)
        return confusion(truth, labels, len(names) + 1)

    items = [i for i in dataset.select(recipe.data.list_of("evaluate")) if i.mask is not None]
    return scores(sum(ordered_map(count, items, torch.get_num_threads())), names).miou  # type: ignore[arg-type]


def around(found: Tensor, threshold: float) -> float:
    """Threshold of one image near that of its data set, by the colours of `curves` (2, T).

    The image's colour information is weighted by a Gaussian around ``threshold``.
    """
    grid = torch.tensor(THRESHOLDS, dtype=torch.float64)
    curve = found[0] * torch.exp(-((grid - threshold) ** 2) / (2 * DEVIATION**2))
    return last_of_plateau(curve) if bool(curve.max() > 0) else threshold


def measure(
    name: str, recipe: str | Path, changes: Mapping[str, Any], runs: Path, count: int
) -> Figures:
    """Run a data set with ``adaptive`` for each seed, and with its tuned preset once."""
    figures = Figures(name)
    kinds = [*((ADAPTIVE, seed) for seed in range(count)), (TUNED, 0)]
    for kind, seed in kinds:
        folder = runs / f"{name}-{kind}-{seed}"
        trained = runs / f"{SAME_CLASSIFIER.get(name, name)}-{ADAPTIVE}-{seed}" / "classifier"
        if trained.is_dir() and not folder.exists():  # it would be trained to the same bytes
            shutil.copytree(trained, folder / "classifier")
        preset = PRESETS.get(name, "frozen") if kind == TUNED else "adaptive"
        own = {"lpcam.preset": preset, "run.seed": seed, "run.folder": str(folder)}
        if kind == TUNED:
            own["refine"] = None
        print(f"{folder.name} ...", file=sys.stderr, flush=True)
        run(load_recipe(recipe, {**changes, **own, "report.images": 0}))
        rows = rows_of(folder)
        if kind == TUNED:
            figures.tuned = rows
            continue
        metrics = read_json(RunFolder(folder).metrics)
        for method, verdict in metrics["verdicts"].items():
            if method in RESULTS:
                rows[method]["image"] = per_image(folder, method, verdict["threshold"])
        figures.adaptive.append(rows)
        if not seed:
            use = read_json(RunFolder(folder).use)
            figures.seconds = {stage: one["seconds"] for stage, one in use.items()}
            figures.choices = metrics["choices"]
    return figures


def show(values: Sequence[float]) -> str:
    """Mean, and standard deviation of several, in percent."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def lines(figures: Sequence[Figures]) -> Iterator[list[str]]:
    """The rows of the table of all sets and methods."""
    for one in figures:
        for method in one.adaptive[0]:
            best, chosen = one.values(method, "best"), one.values(method, "chosen")
            gap = [own - top for own, top in zip(chosen, best, strict=True)]
            tuned = one.tuned.get(method, {})
            yield [
                one.name,
                method,
                *(f"{100 * tuned[k]:.1f}" if k in tuned else "-" for k in ("best", "chosen")),
                show(best),
                show(chosen),
                show(gap),
                show(one.values(method, "image")),
            ]


def correlation(figures: Sequence[Figures]) -> str:
    """How well the judge's information foretells mIoU, over all maps and within each set."""
    every: list[tuple[float, float]] = []
    within = []
    for one in figures:
        pairs = [
            (row["information"], row["chosen"])
            for rows in one.adaptive
            for row in rows.values()
            if "information" in row and "chosen" in row
        ]
        every += pairs
        if len(pairs) > 2:
            within.append(f"{one.name} {statistics.correlation(*zip(*pairs, strict=True)):.2f}")
    total = statistics.correlation(*zip(*every, strict=True)) if len(every) > 2 else float("nan")
    return f"{total:.2f} over all {len(every)} maps; within a set: {', '.join(within)}"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser("strangers", __doc__)
    arguments.add_argument("--folders", type=Path, nargs="*", default=[], help="folders of images")
    arguments.add_argument("--runs", type=Path, help="folder where runs are kept")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--refine", default=None, help="refinement of the adaptive runs")
    arguments.add_argument("--engine", default="auto", help="run.engine")
    arguments.add_argument("--precision", default="float32", help="maps.precision")
    arguments.add_argument("--sets", nargs="*", help="names of the sets, else all")
    options = arguments.parse_args(argv)
    count, threads = (1 if options.quick else options.seeds), options.threads[-1]
    with TemporaryDirectory() as temporary:
        runs = options.runs or Path(temporary)
        size = (40, 64) if options.quick else (demo.IMAGES, demo.SIZE)
        drawing = {"images": size[0], "size": size[1], "seed": demo.SEED, "revision": 1}
        demo.draw(runs / "drawings", drawing)
        shared = {"run.threads": threads, "run.engine": options.engine}
        shared["maps.precision"] = options.precision
        if options.refine:
            shared["refine.method"] = options.refine
        if options.refine == "irn":
            shared["refine.irn.preset"] = "adaptive"
        sets: list[tuple[str, str | Path, dict[str, Any]]] = [
            (DEMO, "demo", {"data.root": str(runs / "drawings")})
        ]
        photographs = {"data.root": options.data, "classifier.weights": options.weights}
        if options.data and options.weights:
            own = {key: str(value.resolve()) for key, value in photographs.items()}
            held_out = {"data.lists.maps": "val", "data.lists.evaluate": "val"}
            sets += [("photographs", RECIPE, own), ("held out", RECIPE, {**own, **held_out})]
        for folder in options.folders if options.weights else ():
            classifier = load_recipe(RECIPE).classifier.model_dump(mode="json", by_alias=True)
            classifier = {k: classifier[k] for k in ("backbone", "arguments", "output_stride")}
            own = {"data.root": str(folder.resolve())}
            if (folder / "labels.csv").is_file():
                own["data.labels"] = str((folder / "labels.csv").resolve())
            changes = {f"classifier.{k}": v for k, v in classifier.items()}
            changes["classifier.weights"] = str(options.weights.resolve())
            changes |= {"classifier.probe": {"preset": "default"}, "name": folder.name, **own}
            sets.append((folder.name, "demo", changes))
        figures = [
            measure(name, recipe, {**shared, **changes}, runs, count)
            for name, recipe, changes in sets
            if not options.sets or name in options.sets
        ]
    headings = [
        "set",
        "method",
        "tuned preset, best",
        "its threshold",
        "best threshold",
        "automatic",
    ]
    headings += ["automatic minus best", "per image"]
    gaps = [
        (own - top, one.name, method)
        for one in figures
        for method in one.adaptive[0]
        for own, top in zip(one.values(method, "chosen"), one.values(method, "best"), strict=True)
    ]
    worst = min(gaps)
    print(
        f"## Strangers\n\nmIoU in percent, mean ± standard deviation over {count} seed(s); "
        "'tuned preset' is `small` on drawings and `frozen` elsewhere, seed 0. The other columns "
        "are of `adaptive`; only 'best' columns look at masks.\n\n"
        + table(headings, list(lines(figures)))
        + f"\n\nWorst automatic minus best: {worst[0]:.1f} ({worst[1]}, {worst[2]}).\n\n"
        f"Correlation of the judge's information with mIoU: {correlation(figures)}.\n"
    )
    for one in figures:
        chosen = "; ".join(f"{c['key']} = {c['value']}" for c in one.choices)
        passes = one.seconds.get("classify", 0) + one.seconds.get("cam", 0)
        rest = sum(one.seconds.get(stage, 0) for stage in ("prototypes", "lpcam", "early", "seeds"))
        print(
            f"- {one.name}: {chosen}. Seconds of the stages with passes {passes:.0f}, of those "
            f"after them {rest:.0f}, of which early layers {one.seconds.get('early', 0):.0f}."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
