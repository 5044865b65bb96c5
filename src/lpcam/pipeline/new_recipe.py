"""``lpcam init``: inspect a folder of images and labels, and write a recipe for it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lpcam.classifiers.classifier import (
    PRETRAINED,
    RANDOM,
    check_backbone,
    check_download,
    read_weights,
)
from lpcam.data.dataset import Dataset, Item, skip_lines
from lpcam.data.inspection import FEW_IMAGES
from lpcam.data.open_dataset import kind_of, open_dataset
from lpcam.data.pixels import look_at_pixels, refuse_ruin
from lpcam.data.reader import READERS, Reader
from lpcam.data.survey import Finding, label_findings
from lpcam.data.validation import check_images
from lpcam.method.settings import LpcamSettings
from lpcam.pipeline.recipe import bundled_text, parse_recipe
from lpcam.runtime.errors import DataError
from lpcam.runtime.files import write_bytes
from lpcam.runtime.progress import progress

BUNDLED = "bundled"  #: Name of the backbone that comes with the package.
DRAWINGS = """
warning: the bundled backbone was trained on drawings. It shows that the steps work; for masks of
photographs use weights that were trained on photographs"""
OWN = ["labels", "separator", "no_class", "masks", "range", "orientation", "palette", "anyway"]
"""Keys of values that a recipe gets as they were given, or measured."""
_TAKES_STRIDE = "resne[xt](?!38)|mobilenetv[12]|efficientnet|regnet|convnext"
"""Families of timm that take output_stride; that of wideresnet38 is the only one it has."""
TEMPLATE = """\
# A recipe for the images of this folder. Run it with
#   lpcam run {path}
# Any value can also be given on the command line, e.g. --lpcam.tau 0.25
version: 1
name: {name}

data:
  kind: {kind:<15} # {kind_means}
  root: {root:<15} # from the folder of this file
{own}  classes: {classes}  # labels and mask ids of other classes are left out

classifier:
  # backbone: any timm model with a spatial feature map
  # weights: "pretrained" (fetched once), or the path of a safetensors file
  # output_stride: 16 gives maps twice as fine as the usual 32; not every model has it
{classifier}  # probe: a linear probe on the frozen backbone, in minutes; finetune needs a GPU
  method: probe

lpcam:
  # One of {presets}; any value of it can be replaced here, e.g. "clusters: 20".
  # adaptive chooses thresholds and more by itself, without true masks; a value given here is fixed.
  preset: adaptive

seeds:
  threshold: null         # map values above it are foreground; null takes the preset's
  ignore_threshold: null  # from here to the threshold pixels are ignored (255); null: none

run:
  folder: null          # null: runs/{name} below the folder where lpcam is run
  seed: 0
"""


def write_recipe(
    source: Path,
    backbone: str,
    weights: str,
    *,
    kind: str | None = None,
    anyway: bool = False,
    **reading: Any,
) -> tuple[Path, str]:
    """Check every image of a data set and write ``recipe.yaml`` beside it; its path, and a summary.

    ``kind`` and ``reading`` as in :func:`lpcam.data.open_dataset.open_dataset`; given values are
    written to the recipe. The run uses the first list and tests on the last; without ``lists`` it
    uses lists named like ``train`` and ``val``, if any. The backbone ``bundled`` is the demo's.
    """
    folder = source.parent if source.is_file() else source
    path = folder / "recipe.yaml"
    if path.exists():
        raise DataError(f"{path} exists already; run it, or delete it to have a new one")
    network = _network(backbone, weights)
    kind = kind or kind_of(source)
    reader = READERS[kind]
    opened = open_dataset(source, kind, **reading)
    dataset, truth = opened.dataset, opened.true_masks
    dataset, findings = look_at_pixels(dataset, truth)
    refuse_ruin(findings, anyway=anyway)
    reading |= {"range": dataset.reading.as_json().get("range"), "anyway": anyway or None}
    try:
        with progress("looking at the images", len(dataset.items)) as advance:
            dataset, _ = check_images(dataset, advance=advance)
    except DataError as error:
        raise DataError(
            f"{error}. All that is wrong is listed by: lpcam data check {shlex.quote(str(source))}"
        ) from error
    chosen = _lists(reader, dataset, reading.get("lists"))
    learnt = dataset.select(chosen[0]) if chosen else [*dataset.items.values()]
    shown = {index for item in learnt for index in item.labels}
    if not shown:
        raise DataError(f"no readable image of {source} has a label; {reader.how_to_label}")
    own = {**{k: reading.get(k) for k in OWN}, kind: reading.get("settings")}
    if chosen is not None:
        stages = dict.fromkeys(("classify", "prototypes", "maps", "evaluate"), chosen[0])
        own["lists"] = {**stages, "test": chosen[1]}
    for key, value in own.items():
        if isinstance(value, Path):  # as the recipe takes it
            given, base = value.expanduser().absolute(), folder.absolute()
            own[key] = str(given.relative_to(base) if given.is_relative_to(base) else given)
    title = source.stem if source.is_file() else source.resolve().name
    name = "".join(c if c.isalnum() or c in " .-_" else "-" for c in title)
    text = TEMPLATE.format(
        path=path,
        kind=kind,
        kind_means=reader.means,
        root=_flow(source.name if source.is_file() else "."),
        own="".join(f"  {k}: {_flow(value)}\n" for k, value in own.items() if value is not None),
        name=_flow(name.lstrip(" .-")[:100] or "run"),
        # a class that no image shows cannot be learnt
        classes=_flow([name for index, name in enumerate(dataset.classes.names) if index in shown]),
        classifier="".join(f"  {key}: {_flow(value)}\n" for key, value in network.items()),
        presets=", ".join(LpcamSettings.preset_names()),
    )
    parse_recipe(yaml.safe_load(text), base=folder, where=str(path))
    write_bytes(path, text.encode())
    masked = sum(i.mask is not None or i.id in truth for i in dataset.items.values())
    summary = _summary(dataset, learnt, chosen, masked, findings)
    return path, summary + (DRAWINGS if backbone == BUNDLED else "")


def _network(backbone: str, weights: str) -> dict[str, Any]:
    """Values of a recipe's classifier, whose weights are there or can be downloaded."""
    if backbone == BUNDLED:
        demo = yaml.safe_load(bundled_text("demo"))["classifier"]
        return {key: value for key, value in demo.items() if key not in ("method", "probe")}
    check_backbone(backbone)
    if weights == PRETRAINED:
        check_download(backbone)
    elif weights != RANDOM:
        weights = str(Path(weights).expanduser().absolute())
        read_weights(Path(weights))
    stride = 16 if re.search(_TAKES_STRIDE, backbone) else None
    return {"backbone": backbone, "output_stride": stride, "weights": weights}


def _lists(reader: Reader, dataset: Dataset, given: Sequence[str] | None) -> tuple[str, str] | None:
    """The list to work on and the one to test on; None: those that are usual for the reader."""
    usual = set(reader.usual_lists.values())
    if not reader.chooses_lists or (len(usual) > 1 and usual <= dataset.lists.keys()):
        return None
    if given:
        return given[0], given[-1]
    for name in dataset.lists:  # such as train2014, and that of the same year to test on
        tests = (name.replace("train", other) for other in ("val", "valid", "test"))
        test = next((one for one in tests if one in dataset.lists), None)
        if test and re.fullmatch(r"train\d*", name):
            return name, test
    if usual <= dataset.lists.keys():
        return None
    name = "train" if "train" in dataset.lists else next(iter(dataset.lists))
    return name, name


def _flow(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return str(text).removesuffix("\n...\n").strip()


def _summary(
    dataset: Dataset,
    learnt: Sequence[Item],
    chosen: tuple[str, str] | None,
    masks: int,
    pixels: Sequence[Finding],
) -> str:
    lines = [f"{len(dataset.items)} images with labels, {masks} of them with masks"]
    if chosen is not None:
        lines.append(f"lists: {chosen[0]} to learn from, to map and to score; {chosen[1]} to test")
    lines.append(f"images per class{'' if chosen is None else f', of {chosen[0]}'}:")
    for index, name in enumerate(dataset.classes.names):
        count = sum(index in item.labels for item in learnt)
        note = "   few: expect weak maps" if count < FEW_IMAGES else ""
        note = note if count else "   none: left out of the recipe"
        lines.append(f"  {name}: {count}{note}")
    found = [*label_findings(dataset.classes, learnt), *pixels]
    lines += [f"{'warning' if one.attention else 'note'}: {one}" for one in found]
    lines += [f"note: {notice}" for notice in dataset.notices]
    return "\n".join([*lines, *skip_lines(dataset.skipped)])
