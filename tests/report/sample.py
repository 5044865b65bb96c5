"""Report data as the collector makes them, of noise and a few shapes."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lpcam.data.masks import voc_palette
from lpcam.evaluation.judge import THRESHOLDS as JUDGED
from lpcam.evaluation.segmentation import ThresholdSweep
from lpcam.explain.web import encode_array as array
from lpcam.explain.web import encode_picture as picture
from lpcam.explain.web import encode_unit as unit

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    '"quotes" and \'more\' onload="alert(3)"',
    "{{7*7}} {% raw %}",
    "<!-- & \u2028 -->",
    "قطة 🐈",
    "a very long name that goes on " * 8,
)
"""Names that a page must show as they are, and nothing else."""

THRESHOLDS = tuple(step / 100 for step in range(100))
METHODS = ("CAM", "LPCAM-F", "LPCAM")
DRAWN = ("CAM", "LPCAM")
FIXED = {"CAM": 0.25, "LPCAM-F": 0.45, "LPCAM": 0.45}
UNDEFINED = 65535
TEACHERS = {"cam": "CAM + IRN", "lpcam": "LPCAM + IRN", "truth": "true masks"}


def unpacked(packed: dict[str, Any]) -> NDArray[Any]:
    """An array of the page's data."""
    kind = np.dtype(packed["type"]).newbyteorder("<")
    data = zlib.decompress(base64.b64decode(packed["data"]))
    return np.frombuffer(data, kind).reshape(packed["shape"])


def blob(height: int, width: int, y: float, x: float, size: float) -> NDArray[np.float32]:
    """A bright spot, its largest value 1; place and size are fractions of the plane."""
    rows, columns = np.mgrid[0:height, 0:width]
    squares = ((rows + 0.5) / height - y) ** 2 + ((columns + 0.5) / width - x) ** 2
    plane = np.exp(-squares / size**2)
    return (plane / plane.max()).astype(np.float32)


def enlarged(planes: NDArray[np.uint8], height: int, width: int) -> torch.Tensor:
    """Planes (K, h, w) as maps (K, height, width) in [0, 1]: bilinear."""
    maps = torch.from_numpy(planes.copy()).float().unsqueeze(0) / 255
    return torch.nn.functional.interpolate(maps, size=(height, width), mode="bilinear")[0]


def _image(number: int, labels: list[int], generator: np.random.Generator) -> dict[str, Any]:
    height, width = ((60, 80), (80, 56))[number % 2]
    ground = generator.integers(60, 200, 3)
    pixels = np.clip(ground + generator.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
    truth = np.zeros((height, width), np.uint8)
    planes: dict[str, list[NDArray[np.float32]]] = {name: [] for name in DRAWN}
    for label in labels:
        y, x = generator.uniform(0.25, 0.75, 2)
        truth[blob(height, width, y, x, 0.3) > 0.5] = label + 1
        planes["CAM"].append(blob(height // 4, width // 4, y - 0.1, x, 0.18))
        planes["LPCAM"].append(blob(height // 4, width // 4, y, x + 0.03, 0.33))
    truth[:2] = 255
    pixels[truth > 0] = pixels[truth > 0] // 2 + 90
    small = {name: np.rint(255 * np.stack(planes[name])).astype(np.uint8) for name in DRAWN}
    tables, scores = {}, {}
    for name, values in small.items():
        sweep = ThresholdSweep(max(labels) + 1)
        real, keys = torch.from_numpy(truth.astype(np.int64)), torch.tensor(labels)
        sweep.update(real, enlarged(values, height, width), keys)
        table = (10000 * sweep.ious(labels)).round().nan_to_num(UNDEFINED)
        tables[name] = table.numpy().astype(np.uint16)
        own = table[:, round(100 * FIXED[name])]
        scores[name] = (own[own != UNDEFINED].mean() / 10000).item()
    return {
        "id": f"{number:04}",
        "picture": picture(pixels),
        "width": width,
        "height": height,
        "labels": labels,
        "planes": {name: array(values) for name, values in small.items()},
        "masks": {"truth": array(truth)},
        "extra": {},
        "iou": {name: array(table) for name, table in tables.items()},
        "score": scores,
    }


def _rows(names: list[str], refined: bool) -> list[dict[str, Any]]:
    rows = []
    for source in ("ground truth", "fixed"):
        for place, method in enumerate(METHODS):
            ious = [
                0.3 + 0.04 * place + 0.02 * ((n * (place + 1)) % 7) for n in range(len(names) + 1)
            ]
            row: dict[str, Any] = {
                "stage": "seed",
                "method": method,
                "threshold": 0.3 + 0.1 * place if source == "ground truth" else FIXED[method],
                "threshold_source": source,
                "miou": 0.403 + 0.0425 * place - 0.01 * (source == "fixed"),
                "fp": 0.35 - 0.01 * place,
                "fn": 0.25 + 0.02 * place,
                "precision": 0.51,
                "recall": 0.58,
                "per_class": {
                    name: {"iou": iou, "fp": 0.6 * (1 - iou), "fn": 0.4 * (1 - iou)}
                    for name, iou in zip(["background", *names], ious, strict=True)
                },
                "protocol": {"threshold_source": f"how {source} was chosen"},
                "images": 12,
                "part_coverage": {"head": 0.8 - 0.02 * place, "legs": 0.3 + 0.1 * place},
            }
            rows.append(row)
    further = []
    for row in rows if refined else ():
        if row["method"] in DRAWN:
            gain = 0.1 if row["method"] == "CAM" else 0.12
            better = {name: row[name] + gain for name in ("miou", "precision", "recall")}
            further.append({**row, "stage": "pseudo", "method": f"{row['method']} + IRN", **better})
    return rows + further[::-1]  # the page has an order of its own


def _segmenters(
    names: list[str], ids: list[str], truth: bool, generator: np.random.Generator
) -> dict[str, Any]:
    """Three segmenters: LPCAM's is better than CAM's by 5 points, that of the truth by 10."""
    rows = []
    for crf in (False, True):
        for place, teacher in enumerate(TEACHERS):
            iou = 0.5 + 0.05 * place + 0.02 * crf
            figures = {"fp": 0.2, "fn": 0.8 - iou, "precision": 0.7, "recall": 0.6}
            classes = {name: {**figures, "iou": iou} for name in ("background", *names)}
            # of the last class LPCAM's segmenter knows less
            classes[names[-1]] = {**figures, "iou": iou - 0.08 * (teacher == "lpcam")}
            row = {"teacher": teacher, "crf": crf, "images": 1449, "miou": iou}
            rows.append({**row, **figures, "per_class": classes})
    seen = picture(generator.integers(0, 255, (30, 40, 3)).astype(np.uint8))
    view = {"picture": seen, "classes": [0], "ignored": False}
    images = []
    for number, name in enumerate(ids[:6]):
        known = truth and number != 2
        lpcam = 0.4 + 0.1 * (1 - number % 3)
        images.append(
            {
                "id": name,
                "kind": ("gain", "loss", "even")[number % 3],
                "picture": seen,
                "width": 40,
                "height": 30,
                "truth": {**view, "ignored": True} if known else None,
                "masks": {"cam": {**view, "classes": []}, "lpcam": view, "truth": view},
                "miou": {"cam": 0.4, "lpcam": lpcam, "truth": 0.7} if known else {},
            }
        )
    history = [
        {"epoch": 1, "step": step, "loss": 1.8 - step / 1000}
        | ({"validation_miou": step / 3000} if truth and step % 500 == 0 else {})
        for step in range(25, 1501, 25)
    ]
    return {
        "network": "DeepLabV2",
        "split": "val",
        "list": names[0],
        "checkpoint": "last",
        "crf": "deeplab",
        "settings": {"backbone": "resnet18", "mean": None, "training": {"batch_size": 10}},
        "teachers": [{"name": n, "title": title, "images": 1464} for n, title in TEACHERS.items()],
        "rows": rows if truth else [],
        "history": dict.fromkeys(TEACHERS, history),
        "images": images,
        "images_total": 1449,
    }


def _prototype(number: int, side: str, generator: np.random.Generator) -> dict[str, Any]:
    kept = number % 3 != 2
    score = 0.95 if (side == "foreground") == kept else 0.5
    patch = generator.integers(0, 255, (8, 8, 3)).astype(np.uint8)
    large = patch.repeat(8, 0).repeat(8, 1)
    return {
        "number": number,
        "score": score,
        "size": 10 * number + 1,
        "kept": kept,
        "rule": f"score {score} decides by {'μ_f' if side == 'foreground' else 'μ_b'}",
        "range": [-0.054 + 0.1 * number, 0.62],
        "patches": [{"picture": picture(large), "image": "0000", "cosine": 0.87}] * 3,
        "map": unit(blob(15, 20, 0.2 * number, 0.5, 0.3)),
    }


def sample(
    images: int = 12,
    classes: int = 4,
    *,
    hostile: bool = False,
    masks: bool = True,
    meaning: bool = True,
    refined: bool = False,
    segmented: bool = False,
    adaptive: bool = False,
) -> dict[str, Any]:
    """Report data; equal arguments give equal data.

    ``hostile``: names, reasons and commands are those of `HOSTILE`; ``masks``: else there is
    nothing that needs truth; ``meaning``: there are prototypes, look-alikes, skipped images and
    times; ``refined``: there are scores of pseudo masks; ``segmented``: there are segmenters;
    ``adaptive``: the run chose thresholds and early layers itself.
    """
    generator = np.random.default_rng(0)
    names = [f"class {index}" for index in range(classes)]
    if hostile:
        names[: len(HOSTILE)] = HOSTILE[:classes]
    made = [
        _image(number, sorted({number % classes, number // 2 % classes}), generator)
        for number in range(min(images, 12))
    ]
    shown = [{**made[number % 12], "id": f"{number:04}"} for number in range(images)]
    for entry, name in zip(shown, HOSTILE if hostile else (), strict=False):
        entry["id"] = name
    if not masks:
        shown = [{**entry, "masks": {}, "iou": {}, "score": {}} for entry in shown]
    text = HOSTILE[1] if hostile else "plain words"
    ids = [entry["id"] for entry in shown]
    curves = {
        method: {
            "thresholds": list(THRESHOLDS),
            "miou": [0.45 - 0.7 * (t - FIXED[method]) ** 2 for t in THRESHOLDS],
            "precision": [0.3 + 0.5 * t for t in THRESHOLDS],
            "recall": [0.9 - 0.8 * t for t in THRESHOLDS],
        }
        for method in METHODS
    }
    example = {key: shown[0][key] for key in ("id", "picture", "width", "height")} if shown else {}
    prototypes = []
    for index in range(classes if meaning else 0):
        sides = {}
        for side in ("foreground", "context"):
            cards = [_prototype(number, side, generator) for number in range(5)]
            sides[side] = {"total": 36, "kept": 24, "prototypes": cards}
        prototypes.append({"class": index, "example": example or None, "sides": sides})
    pair = unit(np.stack([blob(15, 20, 0.4, 0.4, 0.2), blob(15, 20, 0.6, 0.6, 0.2)]))
    confusion = {"present": 0, "lookalike": classes - 1, "scores": [0.98, 0.41]}
    confusion |= {**example, "maps": dict.fromkeys(DRAWN, pair)}
    highlights = {
        "most improved": ids[1:4],
        "most worsened": ids[4:6],
        "best": ids[:3],
        "worst": [*ids[-2:], "not among the shown"],
    }
    told = {
        "skipped": [{"id": text, "reason": text}],
        "warnings": [text],
        "notices": [text],
        "events": [text],
        "history": [{"epoch": 1, "loss": 0.0174, "validation_map": 0.762}],
        "networks": [{"title": "the network of AMN", "history": [{"epoch": 2, "loss": 1.6893}]}],
        "stages": [
            {"name": "cam", "seconds": 70.1, "peak_memory": 3 * 2**30},
            {"name": "evaluate", "seconds": 3754.0, "peak_memory": None},
        ],
    }
    refinement = {"method": "irn", "irn": {"beta": 10}, "crf": {"steps": 10}}
    data = {
        "format": 1,
        **({"segmenters": _segmenters(names, ids, masks, generator)} if segmented else {}),
        "title": HOSTILE[0] if hostile else "creatures",
        "lpcam_version": "0.1.0",
        "methods": list(METHODS),
        "fixed": FIXED,
        "classes": [
            {"name": name, "color": f"#{bytes(colour).hex()}"}
            for name, colour in zip(names, voc_palette()[1:], strict=False)
        ],
        "rows": _rows(names, refined) if masks else [],
        "protocol": {
            "dataset": text,
            "split": "train",
            "labels": text,
            "preset": "small",
            "scales": [1.0, 0.5],
            "flip": True,
            "crf": False,
            "refine": refinement if refined else None,
            "void": "255 is not counted",
            "seed": 0,
            "classifier": {"backbone": "resnet18", "settings": {"weight_decay": 0.001}},
            "versions": {"torch": "2.15.0"},
        },
        "curves": curves if masks else {},
        "images": shown,
        "images_total": max(images, 400),
        "limited": False,
        "searched": 120,
        "highlights": highlights if masks else {},
        "prototypes": {
            "rule": {"k": 36, "restarts": 4}
            | {"tau": 0.1, "mu_f": 0.9, "mu_b": 0.9, "mu_b_lower": 0.05},
            "early": [],
            "classes": prototypes,
        },
        "confusions": [confusion] if meaning and shown else [],
        **(told if meaning else {name: [] for name in told}),
        "command": f"lpcam run {text}",
        **(_chosen(text) if adaptive else {"choices": [], "verdicts": {}, "ways": []}),
    }
    return _with_early_layers(data) if adaptive else data


def _chosen(text: str) -> dict[str, Any]:
    """What a run chose; the judge's curves are highest at 0.5, and it takes 0.56."""
    curve = [1 - abs(t - 0.5) for t in JUDGED]
    verdict = {"threshold": 0.56, "curve": curve, "disagree": False}
    ways = [("LPCAM", "none", None), ("LPCAM", "fused", 1), ("CAM", "alone", 2)]
    return {
        "choices": [{"key": "lpcam.tau", "value": "0.50", "reason": text}],
        "verdicts": dict.fromkeys((*METHODS, "LPCAM-E"), verdict),
        "ways": [
            {"base": base, "fusion": how, "round": turn, "chosen": turn == 2}
            | {"information": 0.04 * place, "threshold": 0.44}
            for place, (base, how, turn) in enumerate(ways, 1)
        ],
    }


def _with_early_layers(data: dict[str, Any]) -> dict[str, Any]:
    """The data with maps LPCAM-E, which are those of LPCAM, and cards of an early layer."""
    methods = [*data["methods"], "LPCAM-E"]
    images, known = [], ("planes", "iou", "score")
    for one in data["images"]:
        more = {k: {**one[k], "LPCAM-E": one[k]["LPCAM"]} for k in known if "LPCAM" in one[k]}
        images.append({**one, **more})
    rows = data["rows"] + [
        {**row, "method": "LPCAM-E"} for row in data["rows"] if row["method"] == "LPCAM"
    ]
    renamed = {"fixed": "automatic", "ground truth": "ground truth"}
    rows = [{**row, "threshold_source": renamed[row["threshold_source"]]} for row in rows]
    curves = data["curves"] and {**data["curves"], "LPCAM-E": data["curves"]["LPCAM"]}
    for one in data["prototypes"]["classes"]:
        for side in ("foreground", "context"):
            (first, *_) = one["sides"][side]["prototypes"]
            card = {**first, "number": "7 of blocks.2", "score": None, "rule": "nearest to 26%"}
            one["sides"][f"early {side}"] = {"total": 72, "kept": None, "prototypes": [card]}
    prototypes = {**data["prototypes"], "early": ["blocks.2"]}
    own = {"methods": methods, "fixed": dict.fromkeys(methods, 0.56), "rows": rows}
    return {**data, **own, "curves": curves, "images": images, "prototypes": prototypes}
