"""Local features of the images of a list, and the prototypes of each class made from them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lpcam.classifiers.classifier import RANDOM, Classifier
from lpcam.classifiers.feature_store import DTYPES
from lpcam.data.dataset import Item
from lpcam.data.map_files import map_path
from lpcam.data.resize import scaled_size
from lpcam.method.clustering import CLUSTERINGS
from lpcam.method.early import IMAGES_PER_CLASS
from lpcam.method.negatives import Seen, best_cosines, compare
from lpcam.method.prototypes import FEWEST_CLUSTERS, MEMBERS, Prototypes, make_prototypes
from lpcam.method.reservoir import SIDES, Reservoir, collect, draw_images, read_selected, split_maps
from lpcam.method.settings import LpcamSettings
from lpcam.pipeline.cache import Output, Result, Task
from lpcam.pipeline.context import FEATURES_SHARE, Context
from lpcam.pipeline.stages.judge import sampled
from lpcam.runtime.errors import RecipeError
from lpcam.runtime.files import digest_file, read_bytes
from lpcam.runtime.parallel import one_thread
from lpcam.runtime.progress import progress
from lpcam.runtime.versions import versions

CHECKPOINT_SECONDS = 60.0  #: Minimum time between checkpoints of the reservoir of local features.
CHECKPOINT_SHARE = 10
"""Minimum ratio of that time to the duration of the last checkpoint, which may be large."""
BLANK = 96  #: Side, in pixels, of an image that shows how many features a network has.
COMPARED = 200
"""Images of the data set that prototypes are compared with, of many classes 25 for each."""
Local = Callable[[list[Item]], Sequence[tuple[Tensor, Tensor]]]
"""Gives the features (C, h, w) of each image of a batch, and the maps (K, H, W) that split them."""


def validate(context: Context) -> None:
    """Refuse, before any stage runs, missing choices, and local features too large for memory."""
    if context.lpcam.choices is not None:
        read_bytes(context.lpcam.choices)
    if not context.folder.prototypes().is_file():
        _check_memory(context, context.untrained(RANDOM))


def _check_memory(context: Context, classifier: Classifier) -> None:
    with torch.inference_mode():
        image = torch.zeros(1, 3, BLANK, BLANK, device=context.device)
        (blank,) = classifier.features(image)
    check_memory(context, context.lpcam, blank)


def cluster(context: Context) -> Iterator[Task]:
    """Collect, cluster, score and select (eqs. 2 to 4)."""
    recipe, items = context.recipe, context.items("prototypes")
    settings = context.lpcam.fixed(weights="equal")
    multi_scale = settings.split_maps == "multi_scale"
    classifier = context.results["classifier"].output
    parts = {
        "revision": 3,
        "classifier": classifier["digest"],
        "settings": settings.fitting,
        "cam_epsilon": settings.cam_epsilon,
        "split_maps": context.results["cam"].key if multi_scale else None,
        "maps": context.features_key,
        "seed": recipe.run.seed,
        "images": context.digest(items),
        **selected_key(context),
    }
    compared = _compared(context)
    if settings.negatives is not None:
        own = settings.negatives.model_dump(mode="json")
        parts["negatives"] = {"settings": own, "images": context.digest(compared)}

    def prepare() -> Tensor:
        _check_memory(context, context.classifier)
        return context.classifier.weight

    def work(weight: Tensor, result: Result) -> Output | None:
        store = context.store(context.classifier)

        @torch.inference_mode()
        def local(batch: list[Item]) -> list[tuple[Tensor, Tensor]]:
            (pair,) = store.pairs(batch, (1.0,))
            found = zip(batch, pair.features, strict=True)
            return [(features, split(item, features)) for item, features in found]

        scorer, label = (weight, None), "local features"
        finish = partial(_rejected, context, compared)
        return make(context, result, items, settings, local, scorer, classifier, label, finish)

    def split(item: Item, features: Tensor) -> Tensor:
        path, weight = map_path(context.folder / "cam", item.id), context.classifier.weight
        return split_maps(features, item.labels, weight, path, settings)

    yield context.task("prototypes", parts, [context.folder.prototypes()], work, prepare)
    if "clusters" in settings.automatic:
        reason = f"one for {MEMBERS} sampled features of a class and side"
        context.chose("lpcam.clusters", f"{FEWEST_CLUSTERS} to {settings.clusters}", reason)
    for name in sorted({"mu_f", "mu_b"} & settings.automatic):
        value = f"{getattr(settings, name):g} times the best score"
        context.chose(f"lpcam.{name}", value, "of the foreground centres of each class")
    if rejected := context.results["prototypes"].output.get("rejected"):
        reason = "images without their class show the same"
        context.chose("prototypes", f"{rejected} dropped by negatives", reason)
    if context.lpcam.corrected:
        yield _choose(context)


def _compared(context: Context) -> list[Item]:
    """Images that prototypes are compared with: some of the data set, and all negatives."""
    count = max(COMPARED, IMAGES_PER_CLASS * len(context.dataset.classes))
    unlabelled = [item for item in context.items("maps") if not item.labels]
    return [*sampled(context, count), *unlabelled[:COMPARED], *context.negatives]


def _rejected(context: Context, items: Sequence[Item], found: Prototypes) -> Prototypes:
    """Prototypes with fire rates, without those that images without their class reject."""
    settings, store = context.lpcam.negatives, context.store(context.classifier)
    if settings is None:
        return found
    centers, outside = found.foreground.centers, {item.id for item in context.negatives}
    fitted = set(torch.nonzero(found.foreground.sizes.any(1)).flatten().tolist())
    labelled = [item.id for item in items if item.labels]
    some = {*labelled[:: -(-len(labelled) // COMPARED) or 1]}  # at equal distances

    @torch.inference_mode()
    def see(item: Item) -> Seen:
        (pair,) = store.pairs([item], (1.0,))
        features, labels = pair.features[0].cpu(), None if item.id in outside else item.labels
        own = item.labels if item.labels and item.id not in some else fitted
        classes = sorted(fitted.intersection(own))
        with one_thread():
            best = best_cosines(features, centers[classes])
        return labels, dict(zip(classes, best, strict=True))

    return compare(found, context.sharing.map(see, items), settings)


def _choose(context: Context) -> Task:
    """A task that applies the recipe's choices and weights to the fitted prototypes."""
    fitted, settings = context.results["prototypes"], context.lpcam
    path = context.folder.prototypes("chosen")
    target = context.classifier.weight if settings.weights == "ridge" else None
    made = Prototypes.load(context.folder.prototypes())
    made = made.chosen(settings.choices, settings.weights, target)
    rows = [one.as_json() for one in made.choices]
    parts = {"prototypes": fitted.output["digest"], "choices": rows, "weights": settings.weights}

    def work(_: Result) -> Output | None:
        if not context.processes.first:
            return None
        made.save(path)
        return {"digest": digest_file(path), "choices": rows}

    return context.task("chosen", parts, [path], work)


def load_prototypes(context: Context) -> Prototypes:
    """The prototypes that the maps are made of."""
    fingerprint = context.results["classifier"].output["fingerprint"]
    return Prototypes.load(context.folder.used_prototypes(context.recipe), fingerprint=fingerprint)


def make(
    context: Context,
    result: Result,
    items: Sequence[Item],
    settings: LpcamSettings,
    local: Local,
    scorer: tuple[Tensor, Tensor | None],
    trained: Output,
    label: str,
    finish: Callable[[Prototypes], Prototypes] = lambda found: found,
) -> Output | None:
    """Collect local features and make prototypes of them, in the folder of a result.

    ``scorer`` is the weight (N, C) of the linear layer that scores centres (eqs. 3 and 4), and its
    bias (N,) where scores use it; ``trained`` the record of the network that the features are of;
    ``finish`` makes of them the prototypes that are written.
    """
    seed, names = context.recipe.run.seed, context.dataset.classes.names
    drawn = _drawn(context, items, settings)
    used = [item for item in items if item.id in drawn]
    reservoir = _gather(context, used, drawn, result, settings, local, label)
    if not context.processes.first:
        return None
    weight, bias = scorer
    prototypes = make_prototypes(
        reservoir,
        weight,
        names,
        settings,
        seed=seed,
        bias=bias,
        fingerprint=trained["fingerprint"],
        made_by={"stage": result.key, "versions": versions()},
        workers=context.sharing.workers,
    )
    (path,) = result.files
    prototypes = finish(prototypes)
    prototypes.save(path)
    told = {"events": [*prototypes.events], "images": len(used)}
    rejected = {"rejected": len(prototypes.choices)} if prototypes.choices else {}
    return {"digest": digest_file(path), **told, **rejected}


def _drawn(
    context: Context, items: Sequence[Item], settings: LpcamSettings
) -> Mapping[str, Mapping[int, int]]:
    """How often each image is clustered for each class, by the table of the data or drawn."""
    labels, classes = [(i.id, i.labels) for i in items], len(context.dataset.classes)
    if (path := context.recipe.data.selected) is not None:
        return read_selected(path, labels, classes)
    return draw_images(labels, classes, settings, seed=context.recipe.run.seed)


def selected_key(context: Context) -> dict[str, str]:
    """The table of images to cluster, for a cache key; empty where the data have none."""
    path = context.recipe.data.selected
    return {} if path is None else {"selected": digest_file(path)}


def _gather(
    context: Context,
    used: Sequence[Item],
    drawn: Mapping[str, Mapping[int, int]],
    result: Result,
    settings: LpcamSettings,
    local: Local,
    label: str,
) -> Reservoir:
    """Sample the local features of images; in the first process those of all processes."""
    batches = context.sharing.batches(context.sharing.mine(used))
    count = context.processes.count
    checkpoints = [
        # A checkpoint counts batches, so only the same sharing can resume from it.
        result.folder / f"reservoir-{rank}-of-{count}-by-{context.sharing.batch}.safetensors"
        for rank in range(count)
    ]
    checkpoint = checkpoints[context.processes.rank]

    def empty() -> Reservoir:
        dtype = DTYPES[context.recipe.maps.features]
        return Reservoir(settings.max_features, context.recipe.run.seed, dtype=dtype)

    reservoir = empty()
    done = reservoir.restore(checkpoint) if checkpoint.is_file() else 0
    next_save = time.monotonic() + CHECKPOINT_SECONDS
    todo = batches[done:]
    total, left = (sum(map(len, some)) for some in (batches, todo))
    with progress(label, total, done=total - left) as advance:
        for batch, found in zip(todo, context.sharing.map(local, todo), strict=True):
            for item, (features, split_map) in zip(batch, found, strict=True):
                times = drawn[item.id]
                collect(reservoir, features, item.labels, split_map, settings, item.id, times)
            done += 1
            advance(len(batch), "")
            if (started := time.monotonic()) > next_save:
                reservoir.checkpoint(checkpoint, done)
                saved = time.monotonic()
                next_save = saved + max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * (saved - started))
    if count > 1:
        reservoir.checkpoint(checkpoint, len(batches))
        context.processes.wait()
        for part in checkpoints[1:] if context.processes.first else ():
            theirs = empty()
            theirs.restore(part)
            reservoir.merge(theirs)
    return reservoir


def check_memory(context: Context, settings: LpcamSettings, blank: Tensor) -> None:
    """Refuse a clustering whose extra is missing, and local features too large for memory.

    An image of `BLANK` has features ``blank``.
    """
    CLUSTERINGS[settings.clustering](settings)
    precision, limit = context.recipe.maps.features, context.recipe.maps.maximum_side
    drawn = _drawn(context, context.items("prototypes"), settings)
    if (bound := settings.max_features) is not None:
        classes = len(context.dataset.classes)
        # Twice the bound: a reservoir is cut back when it holds so many.
        rows, what = 2 * bound * len(SIDES) * classes, f"max_features {bound} of {classes} classes"
    else:
        stride, rows = BLANK / blank.shape[-1], 0
        for name, times in drawn.items():
            size = (context.records[name]["height"], context.records[name]["width"])
            size = size if max(size) <= limit else scaled_size(*size, limit / max(size))
            # An image of two classes has a copy of its features for each.
            rows += math.prod(math.ceil(side / stride) for side in size) * sum(times.values())
        what = f"all {rows:,} features of {len(drawn):,} images (max_features null)"
    needed = rows * len(blank) * DTYPES[precision].itemsize
    allowed = context.memory() * (1 - FEATURES_SHARE)
    if needed > allowed:
        half = "" if precision == "float16" else "set maps.features to float16 (half of it), "
        raise RecipeError(
            f"{what}, each of {len(blank)} numbers in {precision}, need {needed / 2**30:.3g} GiB, "
            f"but {allowed / 2**30:.3g} GiB are available; {half}lower lpcam.max_features, or "
            "raise run.memory (--memory; half of it is for them) if the machine has more"
        )
