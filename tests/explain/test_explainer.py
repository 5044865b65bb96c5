"""From an image to its maps: parity with a run and with the extractors, labels, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tiny import BACKBONE, COLOURS, draw_folder, draw_image, recipe_values, write_weights
from torch import nn

from lpcam import CAM, LPCAM
from lpcam.classifiers.classifier import (
    BackboneSpec,
    Classifier,
    Preprocessing,
    build,
    timm_classifier,
)
from lpcam.data.map_files import read_maps
from lpcam.explain.explainer import Explainer
from lpcam.method.prototypes import Prototypes
from lpcam.method.settings import EarlySettings, LpcamSettings
from lpcam.pipeline.recipe import load_recipe, parse_recipe
from lpcam.pipeline.run import run as go_on
from lpcam.pipeline.run_folder import RunFolder
from lpcam.runtime.errors import (
    ArtefactError,
    DataError,
    ImageError,
    NotFittedError,
    PrototypeError,
    RecipeError,
)


@pytest.fixture
def image() -> np.ndarray:
    return draw_image(["blue", "red"], (70, 90), np.random.default_rng(1))[0]


def loaded(run: Path) -> tuple[Classifier, Prototypes]:
    return (
        Classifier.load(run / "classifier" / "classifier.safetensors"),
        Prototypes.load(run / "prototypes" / "prototypes.safetensors"),
    )


def test_maps_are_those_of_the_extractors(run: Path, image: np.ndarray) -> None:
    """The classifier is left as it was, and the maps are ordinary arrays of the caller's own."""
    classifier, prototypes = loaded(run)
    settings = LpcamSettings.from_preset("voc12.official", scales=[1.0])
    before = classifier.fingerprint()
    maps = Explainer(classifier, prototypes, settings)(image, labels=["red", "blue"])
    assert classifier.fingerprint() == before
    assert not torch.is_inference_mode_enabled() and maps.lpcam.flags.writeable
    tensor = classifier.preprocessing(image)[None]
    lpcam = LPCAM(classifier, settings).load(run / "prototypes" / "prototypes.safetensors")
    for found, extractor in ((maps.cam, CAM(classifier, settings)), (maps.lpcam, lpcam)):
        expected = extractor(tensor)[0, [2, 0]].numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)
    logits = classifier(tensor)[0].sigmoid().detach()
    assert maps.scores == pytest.approx((float(logits[2]), float(logits[0])), abs=1e-5)
    assert maps.classes == ("red", "blue")
    assert maps.mask_ids == (3, 1)


def test_fast_is_scale_1_without_the_mirror_image(
    run: Path, explainer: Explainer, image: np.ndarray
) -> None:
    """Its maps are those of such settings; nothing else of its provenance differs."""
    assert explainer.settings.flip and len(explainer.settings.scales) > 1
    settings = explainer.settings.fixed(scales=(1.0,), flip=False)
    labels = {"labels": ["red", "blue"]}
    maps, full = explainer.fast()(image, **labels), explainer(image, **labels)
    np.testing.assert_array_equal(
        maps.lpcam, Explainer(*loaded(run), settings)(image, **labels).lpcam
    )
    assert np.abs(maps.lpcam - full.lpcam).max() > 0.01
    assert maps.scores == pytest.approx(full.scores) and maps.threshold == full.threshold
    differ = {key for key in full.made_by if maps.made_by[key] != full.made_by[key]}
    assert differ == {"scales", "flip", "changed_from_preset"}
    assert maps.made_by["scales"] == [1.0] and not maps.made_by["flip"]


def test_discriminative_parts_have_the_size_of_the_image(run: Path, image: np.ndarray) -> None:
    classifier, prototypes = loaded(run)
    small = Explainer(classifier, prototypes, "voc12.official", maximum_side=64)
    whole = Explainer(classifier, prototypes, "voc12.official")
    for explainer in (small, whole):
        plane = explainer.discriminative(image, "red")
        assert plane.shape == image.shape[:2] and plane.dtype == np.float32
        assert np.isfinite(plane).all() and plane.min() >= 0
    with pytest.raises(DataError, match="green"):
        whole.discriminative(image, "no green")


def test_a_runs_own_image_gets_the_runs_own_maps(run: Path, explainer: Explainer) -> None:
    """But for the run's rounding of features to half precision and of maps to 8 bits."""
    recipe = load_recipe(run / "recipe.yaml")
    go_on(recipe, until="lpcam")
    kept = read_maps(run / "lpcam" / "i00.npz")
    labels = [explainer.classes[key] for key in kept.keys]
    maps = explainer(recipe.data.root / "images" / "i00.png", labels=labels)
    np.testing.assert_allclose(maps.lpcam, kept.high_res, atol=0.01)
    assert maps.name == "i00"
    assert maps.made_by["run"] == "tiny"
    assert maps.made_by["labels"] == "given"


def test_labels_are_predicted_above_a_score(explainer: Explainer, image: np.ndarray) -> None:
    ranking = explainer(image).ranking
    assert sorted(name for name, _ in ranking) == sorted(COLOURS)
    values = [score for _, score in ranking]
    assert values == sorted(values, reverse=True)
    between = (values[0] + values[1]) / 2
    assert explainer(image, minimum_score=between).classes == (ranking[0][0],)
    assert explainer(image, minimum_score=0).classes == tuple(name for name, _ in ranking)
    none = explainer(image, minimum_score=values[0])
    assert none.classes == ()
    assert not none.mask().any()
    assert f"no class scores above {values[0]:g}" in none.notes[0]
    assert ranking[0][0] in none.notes[0]
    one = explainer(image, minimum_score=values[0], at_least_one=True)
    assert one.classes == (ranking[0][0],)
    assert one.notes == ()
    assert explainer.highest(image, 2).classes == tuple(name for name, _ in ranking[:2])


def test_every_way_to_give_an_image(
    explainer: Explainer, image: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(image).save(path)
    expected = explainer(image)
    for source in (path, str(path), Image.fromarray(image)):
        np.testing.assert_array_equal(explainer(source).lpcam, expected.lpcam)
    turned = Image.fromarray(np.rot90(image).copy())
    turned.getexif()[0x0112] = 6
    np.testing.assert_array_equal(explainer(turned).image, image)
    with pytest.raises(ImageError, match="32-bit float"):
        explainer(Image.fromarray(np.zeros((5, 5), np.float32)))


def test_any_size_and_any_class_name(explainer: Explainer, image: np.ndarray) -> None:
    for size in ((1, 1), (1, 50), (3, 200)):
        maps = explainer(np.full((*size, 3), 90, np.uint8), labels=["blue"])
        assert maps.mask().shape == size
        assert np.isfinite(maps.lpcam).all()
    for shape in ((5, 5), (5, 5, 4), (0, 5, 3)):
        with pytest.raises(DataError, match="expected uint8"):
            explainer(np.zeros(shape, np.uint8))
    assert explainer.indices(["red", "blue", "red"]) == [2, 0]
    with pytest.raises(DataError, match=r"'gren'.*green"):
        explainer(image, labels=["red", "gren"])


def test_images_are_scored_as_the_classifier_was_trained(run: Path, image: np.ndarray) -> None:
    classifier, prototypes = loaded(run)
    explainer = RunFolder(run).explainer(device="cpu")
    assert explainer.score_side == 64  # of the recipe's probe
    alone = Explainer(classifier, prototypes)(image).ranking
    at_side = explainer(image).ranking
    assert dict(alone) != pytest.approx(dict(at_side), abs=1e-4)
    softmax = Explainer(classifier, prototypes, scoring="softmax")(image).ranking
    assert sum(score for _, score in softmax) == pytest.approx(1)


def test_a_class_without_prototypes_has_a_note(run: Path, image: np.ndarray) -> None:
    classifier, prototypes = loaded(run)
    prototypes.foreground.keep[1] = False
    maps = Explainer(classifier, prototypes)(image, labels=["green", "red"])
    assert maps.notes == ("green has no prototypes, so its LPCAM is empty",)
    assert not maps.lpcam[0].any()
    assert maps.cam[0].any()


def test_prototypes_of_another_classifier_and_none(run: Path, weights: Path) -> None:
    _, prototypes = loaded(run)
    other = build(BackboneSpec(BACKBONE, {}, 16), tuple(COLOURS), weights=weights)
    with pytest.raises(PrototypeError, match="features of classifier"):
        Explainer(other, prototypes)
    with pytest.raises(PrototypeError, match="prototypes"):
        Explainer(small_model())
    with pytest.raises(NotFittedError):
        Explainer(LPCAM(small_model()))


def test_runs_that_cannot_explain(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"recipe\.yaml"):
        RunFolder(tmp_path).explainer()
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "prototypes" / "prototypes.safetensors").unlink()
    with pytest.raises(ArtefactError, match="until prototypes"):
        RunFolder(copy).explainer()
    (copy / "classifier" / "classifier.safetensors").unlink()
    with pytest.raises(ArtefactError, match="until classify"):
        RunFolder(copy).explainer()
    with pytest.raises(RecipeError, match="abacus"):
        RunFolder(run).explainer(device="abacus")


@pytest.mark.parametrize(
    ("what", "given"),
    [
        ("mask_ids", [1, 2]),
        ("mask_ids", [0, 1, 2]),
        ("mask_ids", [1, 2, 255]),
        ("scoring", "relu"),
        ("precision", "fp8"),
    ],
)
def test_options_that_are_none_are_refused(run: Path, what: str, given: Any) -> None:
    options: dict[str, Any] = {what: given}
    with pytest.raises(DataError, match=what):
        Explainer(*loaded(run), **options)


def test_a_run_keeps_its_mask_values(run: Path, tmp_path: Path) -> None:
    """From its seeds or its data, else by the order of classes."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())

    def mask_ids(**data: Any) -> tuple[int, ...] | None:
        recipe["data"].update(data)
        (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return RunFolder(copy).explainer(device="cpu").mask_ids

    assert mask_ids() == (1, 2, 3)
    assert mask_ids(root=str(tmp_path / "gone")) is None
    (copy / "seeds").mkdir(exist_ok=True)
    (copy / "seeds" / "stage.json").write_text('{"parts": {"mask_ids": [9, 4, 2]}}')
    assert mask_ids() == (9, 4, 2)


def small_model(*end: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *end, nn.Linear(8, 3))


@pytest.mark.parametrize("new_head", [False, True])
def test_any_model_that_lpcam_takes(image: np.ndarray, new_head: bool) -> None:
    """Maps and scores are those of the fitted LPCAM and of the model itself."""
    model = small_model(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    names = ["cat", "dog"] if new_head else ["cat", "dog", "cow"]
    lpcam = LPCAM(model, "small", classes=names, target_layer="1" if new_head else None)
    labels = torch.eye(len(names))
    explainer = Explainer(lpcam.fit([(torch.rand(len(names), 3, 40, 48), labels)]))
    assert explainer.scoring == ("sigmoid" if new_head else "softmax")
    tensor = explainer.preprocessing(image)[None]
    maps = explainer(image, labels=names)
    np.testing.assert_allclose(maps.lpcam, lpcam(tensor)[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(maps.cam, CAM(lpcam.source_, "small")(tensor)[0].numpy(), atol=1e-5)
    logits = lpcam.source_.logits(tensor)[0].double()  # type: ignore[union-attr]
    if not new_head:
        torch.testing.assert_close(logits, model(tensor)[0].detach().double(), atol=1e-4, rtol=0)
    expected = logits.sigmoid() if new_head else logits.softmax(0)
    assert maps.scores == pytest.approx(expected.tolist(), abs=1e-6)
    again = Explainer(lpcam.source_, lpcam.prototypes_)  # settings are stored with prototypes
    np.testing.assert_array_equal(again(image, labels=names).lpcam, maps.lpcam)


def test_a_model_of_one_image_size(image: np.ndarray) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = small_model(nn.AdaptiveAvgPool2d(1), nn.Flatten())

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert images.shape[-2:] == (32, 32)
            return self.layers(images)  # type: ignore[no-any-return]

    lpcam = LPCAM(Fixed(), example=(32, 32), classes=["cat", "dog", "cow"])
    explainer = Explainer(lpcam.fit([(torch.rand(3, 3, 32, 32), torch.eye(3))]))
    maps = explainer(image, labels=["dog"])
    assert maps.lpcam.shape == (1, 70, 90)
    assert np.isfinite(maps.scores).all()


def test_files_of_save(run: Path, image: np.ndarray, tmp_path: Path) -> None:
    """A classifier's file with prototypes that know their settings, and with those that do not."""
    classifier, _ = loaded(run)
    settings = LpcamSettings.from_preset("small", clusters=2, scales=[0.5, 1.5], threshold=0.4)
    lpcam = LPCAM(classifier, settings)
    lpcam.fit([(classifier.preprocessing(image)[None], torch.ones(1, 3))])
    lpcam.save(tmp_path / "p.safetensors")
    model = run / "classifier" / "classifier.safetensors"
    explainer = Explainer.from_files(model, tmp_path / "p.safetensors", device="cpu")
    assert explainer.settings == settings
    assert explainer.scoring == "sigmoid"
    maps = explainer(image, labels=["blue"])  # no scale 1: a pass of its own for the scores
    assert maps.threshold == 0.4
    other = Explainer.from_files(
        model, tmp_path / "p.safetensors", preset="frozen", scoring="softmax", device="cpu"
    )
    assert other.settings.preset == "frozen"
    assert other.scoring == "softmax"
    of_run = run / "prototypes" / "prototypes.safetensors"
    assert Explainer.from_files(model, of_run).settings.preset == "voc12.official"
    with pytest.raises(ArtefactError, match=r"none\.safetensors"):
        Explainer.from_files(model, tmp_path / "none.safetensors")


def test_a_timm_model_with_its_own_head(image: np.ndarray, tmp_path: Path) -> None:
    import timm  # noqa: PLC0415

    torch.manual_seed(0)
    model = timm.create_model(BACKBONE, zero_init_last=False)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    classifier = timm_classifier(BACKBONE, weights=tmp_path / "w.safetensors")
    labels = torch.zeros(1, 1000)
    labels[0, [3, 5]] = 1
    lpcam = LPCAM(classifier, LpcamSettings.from_preset("small", clusters=2, scales=[1.0]))
    lpcam.fit([(classifier.preprocessing(image)[None], labels)])
    lpcam.save(tmp_path / "p.safetensors")
    explainer = Explainer.from_files(
        BACKBONE,
        tmp_path / "p.safetensors",
        weights=tmp_path / "w.safetensors",
        device="cpu",
    )
    maps = explainer(image, at_least_one=True)
    with torch.no_grad():
        expected = model.eval()(classifier.preprocessing(image)[None])[0].softmax(0)
    assert maps.scores[0] == pytest.approx(float(expected.max()), abs=1e-4)
    assert maps.classes[0] == classifier.classes[int(expected.argmax())]
    assert maps.mask_ids == (1,)
    assert explainer(image, labels=[classifier.classes[3]]).lpcam.any()


def test_precision_size_and_foreground_only(run: Path, image: np.ndarray) -> None:
    classifier, prototypes = loaded(run)
    options = {"precision": "bfloat16", "maximum_side": 40, "foreground_only": True}
    only = Explainer(classifier, prototypes, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(only.vectors, prototypes.vectors(with_context=False))
    rough = only(image, labels=["red"])
    assert rough.lpcam.shape == (1, 31, 40)
    assert rough.mask().shape == (70, 90)
    assert rough.made_by["method"] == "LPCAM-F"
    assert rough.made_by["precision"] == "bfloat16"


def test_a_run_whose_seeds_are_lpcam_f_gives_its_own_threshold(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text("utf-8"))
    recipe["seeds"] = {**recipe["seeds"], "method": "LPCAM-F", "threshold": 0.68}
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    assert RunFolder(copy).explainer(device="cpu").settings.threshold == 0.68
    recipe["seeds"]["method"] = "CAM"
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    explainer = RunFolder(copy).explainer(device="cpu")
    assert explainer.settings.cam_threshold == 0.68
    assert explainer.settings.threshold != 0.68


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose scales and thresholds are chosen, as far as its seeds."""
    folder = tmp_path_factory.mktemp("adaptive")
    data, weights = draw_folder(folder / "boxes"), write_weights(folder / "tiny.safetensors")
    values = recipe_values(data, folder / "run", weights)
    chosen = {"preset": "adaptive", "clusters": 3, "max_features": 60, "context_lower": 0.0}
    early = {"clusters": 4, "nearest": 2}
    values["lpcam"] = {**chosen, "early": {**early, "base": "CAM", "fusion": "alone"}}
    values["maps"]["dtype"] = "float16"
    go_on(parse_recipe(values, where="tiny"), until="evaluate")
    return folder / "run"


def test_a_run_with_early_layers_gives_its_own_maps_and_thresholds(adaptive: Path) -> None:
    explain = RunFolder(adaptive).explainer(device="cpu")
    scales = json.loads((adaptive / "cam" / "stage.json").read_text())["parts"]["scales"]
    assert list(explain.settings.scales) == scales
    assert scales != list(LpcamSettings.from_preset("adaptive").scales)
    verdicts = json.loads((adaptive / "metrics.json").read_text())["verdicts"]
    assert explain.settings.threshold == verdicts["LPCAM-E"]["threshold"]
    assert explain.settings.cam_threshold == verdicts["CAM"]["threshold"]
    recipe = load_recipe(adaptive / "recipe.yaml")
    for name in ("i00", "i01"):
        kept = {way: read_maps(adaptive / way / f"{name}.npz") for way in ("cam", "lpcam_e")}
        labels = [explain.classes[key] for key in kept["cam"].keys]
        maps = explain(recipe.data.root / "images" / f"{name}.png", labels=labels)
        np.testing.assert_allclose(maps.cam, kept["cam"].high_res, atol=0.01)
        np.testing.assert_allclose(maps.lpcam, kept["lpcam_e"].high_res, atol=0.01)
        assert maps.made_by["method"] == "LPCAM-E"
        assert not np.allclose(maps.lpcam, maps.cam, atol=0.1)


def test_a_run_explains_by_the_method_and_the_thresholds_of_its_recipe(
    adaptive: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(adaptive, tmp_path / "run")
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    values["seeds"]["method"] = "LPCAM"
    values["lpcam"]["cam_threshold"] = 0.123
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    explain = RunFolder(run).explainer(device="cpu")
    assert explain.early is None
    assert explain.made_by["method"] == "LPCAM"
    verdicts = json.loads((run / "metrics.json").read_text())["verdicts"]
    assert explain.settings.threshold == verdicts["LPCAM"]["threshold"]
    assert explain.settings.cam_threshold == 0.123
    values["seeds"]["method"] = "LPCAM-E"
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    RunFolder(run).early.unlink()
    with pytest.raises(ArtefactError, match="early"):
        RunFolder(run).explainer(device="cpu")


@pytest.mark.parametrize("of_timm", [False, True])
def test_a_fitted_lpcam_brings_its_early_layers(
    image: np.ndarray, of_timm: bool, tmp_path: Path
) -> None:
    count = 2 if of_timm else 0
    backbone = timm.create_model(BACKBONE, num_classes=count, zero_init_last=False)
    plain = Preprocessing((0.5,) * 3, (0.5,) * 3)
    own = Classifier(backbone, ("a", "b"), plain, BackboneSpec(BACKBONE, {}))
    model = backbone.eval() if of_timm else own
    settings = LpcamSettings.from_preset("voc12.official", scales=[0.5], mu_f=0.3)
    batches = [(torch.rand(4, 3, 64, 96), torch.eye(2).repeat(2, 1))]
    early = EarlySettings(clusters=3, nearest=2)
    lpcam = LPCAM(model, settings, early=early).fit(batches)
    explain = Explainer(lpcam, preprocessing=plain)
    maps = explain(image, labels=[explain.classes[1]])
    expected = lpcam(plain(image)[None])[0, 1].numpy()
    np.testing.assert_allclose(maps.lpcam[0], expected, atol=0.02)  # of resized images
    assert maps.made_by["method"] == "LPCAM-E"
    assert not any(module._forward_hooks for module in backbone.modules())
    if not of_timm:
        files = tmp_path / "c.safetensors", tmp_path / "p.safetensors"
        model.save(files[0])
        lpcam.save(files[1])
        again = Explainer.from_files(*files, device="cpu")(image, labels=["b"])
        np.testing.assert_allclose(again.lpcam, maps.lpcam, atol=1e-5)
    other = dataclasses.replace(lpcam.early_, fingerprint="other")
    with pytest.raises(PrototypeError, match="other"):
        Explainer(model, lpcam.prototypes_, early=other)
