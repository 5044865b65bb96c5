"""Training samples of segmenters: scale, crop, padding, mirror image, colours; checked masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lpcam.classifiers.classifier import Preprocessing
from lpcam.data.dataset import ClassTable, Item
from lpcam.runtime.errors import DataError, ImageError
from lpcam.segmentation import augmentation
from lpcam.segmentation.augmentation import augment, check_masks, make_sample
from lpcam.segmentation.settings import SegmenterSettings
from lpcam.training.loop import Place

CLASSES = ClassTable(("cow", "sheep", "cat"), (10, 17, 8))
CAFFE = Preprocessing((122.675 / 255, 116.669 / 255, 104.008 / 255), (1 / 255,) * 3)
COLOURS = np.array([[20, 30, 40], [220, 40, 60], [60, 210, 50], [50, 70, 230]], np.uint8)
"""Of the labels 0 to 3."""
DEEPLAB = SegmenterSettings.from_preset("deeplabv2.voc12.official", crop=64)
WIDERESNET = SegmenterSettings.from_preset("wideresnet38.official", crop=64)
UPERNET = SegmenterSettings.from_preset("upernet.voc12.paper", crop=64, resize=(256, 64))


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def plain(**changes: Any) -> SegmenterSettings:
    """Nothing but the crop at the image's own size, unless told."""
    return SegmenterSettings.from_preset(
        "deeplabv2.voc12.official", **{"scales": (1.0,), "crop": 64, **changes}
    )


def patches(height: int, width: int, seed: int = 0, side: int = 16) -> tuple[Any, Any]:
    """An image whose colours encode its labels, in squares, and those labels."""
    blocks = rng(seed).integers(0, 4, (-(-height // side), -(-width // side)))
    labels = np.kron(blocks, np.ones((side, side), np.int64))[:height, :width].astype(np.uint8)
    return COLOURS[labels], labels


def colours_of(tensor: Tensor) -> np.ndarray:
    """RGB 0..255 (H, W, 3) of a normalised image."""
    rgb = tensor.permute(1, 2, 0) + torch.tensor(CAFFE.mean) * 255
    return rgb.numpy()


def inner(found: Tensor, labels: Tensor) -> Tensor:
    """Pixels two away from padding, the crop's frame and other labels: no colours are mixed."""
    values = torch.where(found.abs().sum(0) > 0, labels, 300)[None, None].float()
    around = F.pad(values, (2,) * 4, value=300)
    high, low = F.max_pool2d(around, 5, 1), -F.max_pool2d(-around, 5, 1)
    return ((high == low) & (high < 300))[0, 0]


def write(folder: Path, name: str, mask: np.ndarray, image: np.ndarray | None = None) -> Any:
    """A pair of an image and a mask."""
    shape = (*mask.shape, 3)
    folder.mkdir(exist_ok=True)
    pixels = np.full(shape, 90, np.uint8) if image is None else image
    Image.fromarray(pixels).save(folder / f"{name}.png")
    Image.fromarray(mask.astype(np.uint8)).save(folder / f"{name}.mask.png")
    return Item(name, folder / f"{name}.png", ()), folder / f"{name}.mask.png"


def sample(
    pairs: Any, place: Place, settings: SegmenterSettings = DEEPLAB, seed: int = 4
) -> tuple[Tensor, Tensor]:
    return make_sample(pairs, CLASSES, CAFFE, settings, seed, place)


def test_choices_are_drawn_equally_often() -> None:
    generator = rng(0)
    found = [augmentation._draw_scale(DEEPLAB, generator) for _ in range(5000)]
    values, counts = np.unique(found, return_counts=True)
    assert values.tolist() == [0.5, 0.75, 1.0, 1.25, 1.5]
    assert np.abs(counts - 1000).max() < 150


def test_a_batch_has_a_scale_of_seed_and_step() -> None:
    found = [augmentation._batch_scale(WIDERESNET, 3, step) for step in range(50)]
    assert found == [augmentation._batch_scale(WIDERESNET, 3, step) for step in range(50)]
    assert len(set(found)) == 50
    assert not set(found) & {augmentation._batch_scale(WIDERESNET, 4, step) for step in range(50)}
    spread = np.array([augmentation._batch_scale(WIDERESNET, 0, step) for step in range(1000)])
    assert abs(spread.mean() - 1.0) < 0.02 and spread.std() == pytest.approx(0.6 / 12**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("size", "box", "scale", "expected"),
    [
        ((375, 500), None, 0.75, (281, 375)),
        ((375, 500), (2048, 512), 1.0, (512, 683)),  # the short side decides
        ((500, 375), (2048, 512), 0.5, (341, 256)),
        ((100, 1000), (2048, 512), 1.0, (205, 2048)),  # the long side decides
        ((375, 500), (2048, 512), 0.9999, (511, 681)),  # 511.9 of the box is cut off
        ((1, 4000), (64, 32), 1.0, (1, 64)),
    ],
)
def test_size_before_the_crop(
    size: tuple[int, int],
    box: tuple[int, int] | None,
    scale: float,
    expected: tuple[int, int],
) -> None:
    assert augmentation._augmented_size(size, box, scale) == expected


def test_a_crop_is_a_part_of_the_image() -> None:
    image = rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    labels = np.arange(90 * 120).reshape(90, 120)
    found, numbers = augment(image, labels, CAFFE, plain(), rng(1))
    row, column = divmod(int(numbers[0].min()), 120)
    assert torch.equal(numbers[0].sort().values, torch.arange(64) + row * 120 + column)
    pixels = image.reshape(-1, 3)[numbers.numpy()]
    np.testing.assert_allclose(colours_of(found), pixels, atol=1e-3)


@pytest.mark.parametrize("settings", [DEEPLAB, WIDERESNET], ids=["ignored", "background"])
def test_a_small_image_is_padded_with_the_mean_colour(settings: SegmenterSettings) -> None:
    image, labels = np.full((30, 40, 3), 250, np.uint8), np.full((30, 40), 2, np.uint8)
    seen = set()
    for seed in range(20):
        found, truth = augment(image, labels, CAFFE, settings, rng(seed), scale=1.0)
        assert found.shape == (3, 64, 64) and found.dtype == torch.float32
        assert truth.shape == (64, 64) and truth.dtype == torch.int64
        mirrored = bool(truth[0, 0] != 2)
        seen.add(mirrored)
        covered = np.s_[:30, 24:] if mirrored else np.s_[:30, :40]
        outside = torch.ones(64, 64, dtype=torch.bool)
        outside[covered] = False
        assert (truth[covered] == 2).all()
        assert (truth[outside] == settings.padding_label).all()
        assert (found[:, outside] == 0).all(), "the mean colour"
        assert (found[(slice(None), *covered)] > 100).all()
    assert seen == {False, True}, "padding is to the right, or to the left of a mirror image"


def test_a_class_that_covers_too_much_has_the_crop_drawn_again() -> None:
    labels = np.zeros((16, 160), np.uint8)
    labels[:, 144:] = 1  # only the windows that begin between 132 and 140 share out well
    windows = [augmentation._draw_crop(labels, 16, 0.75, rng(seed)) for seed in range(600)]
    plain_windows = [augmentation._draw_crop(labels, 16, None, rng(seed)) for seed in range(600)]

    def good(window: tuple[slice, slice]) -> bool:
        return 0.25 <= labels[window].mean() <= 0.75

    share = 9 / 145
    assert np.mean([good(w) for w in plain_windows]) == pytest.approx(share, abs=0.03)
    assert np.mean([good(w) for w in windows]) == pytest.approx(1 - (1 - share) ** 11, abs=0.06)
    kept = [(a, b) for a, b in zip(windows, plain_windows, strict=True) if good(b)]
    assert kept and all(a == b for a, b in kept), "a good first crop stays"


def test_ignored_pixels_do_not_count_towards_the_class_limit() -> None:
    labels = np.full((16, 17), 255, np.uint8)
    labels[:, 0], labels[0, 1] = 1, 2  # the window at 0 has 16 to 1, that at 1 has class 2 alone
    labels[:8, 2] = 3  # with it, 16 : 1 : 8 and 1 : 8
    windows = [augmentation._draw_crop(labels, 16, 0.75, rng(seed))[1].start for seed in range(100)]
    assert set(windows) == {0}


def test_a_crop_without_a_label_is_drawn_again_and_ten_draws_are_the_limit() -> None:
    class Counted:
        draws = 0

        def integers(self, high: int) -> int:
            self.draws += 1
            return high - 1

    for value in (255, 3):
        generator, labels = Counted(), np.full((20, 20), value, np.uint8)
        rows, columns = augmentation._draw_crop(labels, 16, 0.75, generator)  # type: ignore[arg-type]
        assert (rows, columns) == (slice(4, 20), slice(4, 20))
        assert generator.draws == 2 * 11


@pytest.mark.parametrize(
    "settings",
    [DEEPLAB, WIDERESNET, UPERNET.model_copy(update={"distortion": False})],
    ids=["deeplab", "wideresnet", "upernet"],
)
def test_image_and_labels_stay_aligned(settings: SegmenterSettings) -> None:
    checked = 0
    for seed in range(60):
        size = (int(rng(seed).integers(40, 130)), int(rng(seed, 1).integers(40, 130)))
        image, labels = patches(*size, seed=seed)
        labels[labels == 3] = 255
        colours = COLOURS[[*range(3), *[3] * 253]].astype(np.float32)
        found, truth = augment(image, labels, CAFFE, settings, rng(seed))
        sure = inner(found, truth)
        error = np.abs(colours_of(found) - colours[truth.numpy()]).max(-1)
        assert error[sure.numpy()].max(initial=0) < 0.01
        checked += int(sure.sum())
    assert checked > 60 * 300


def test_half_of_the_images_are_mirrored_with_their_labels() -> None:
    image, labels = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    image[:, :32], labels[:, :32] = 255, 1
    mirrored = 0
    for seed in range(400):
        found, truth = augment(image, labels, CAFFE, plain(), rng(seed))
        assert torch.equal(found[0] > 0, truth == 1)
        mirrored += int(truth[0, 0] == 0)
    assert 160 < mirrored < 240


class Scripted:
    """A generator that gives what it is told: who is drawn, then the values."""

    def __init__(self, drawn: list[bool], values: list[float]) -> None:
        self.drawn, self.values = drawn, values

    def random(self, count: int) -> np.ndarray:
        assert count == len(self.drawn)
        return np.where(self.drawn, 0.1, 0.9)

    def uniform(self, low: float, high: float) -> float:
        value = self.values.pop(0)
        assert low <= value <= high
        return value


def distorted(image: np.ndarray, drawn: list[bool], values: list[float]) -> np.ndarray:
    generator = Scripted(drawn, values)
    found = augmentation._distort(image, generator)  # type: ignore[arg-type]
    assert not generator.values
    return found


# brightness, contrast first, contrast, saturation, hue
NOTHING = [False] * 5
PIXEL = np.array([[[200, 100, 50]]], np.uint8)


@pytest.mark.parametrize(
    ("drawn", "values", "expected"),
    [
        ([True, False, False, False, False], [32.0], [232, 132, 82]),
        ([True, False, False, False, False], [-32.0], [168, 68, 18]),
        ([False, False, True, False, False], [1.5], [255, 150, 75]),
        ([False, True, True, False, False], [0.5], [100, 50, 25]),
        # saturation 3/4 is halved, and then 1 at most
        ([False, False, False, True, False], [0.5], [200, 150, 125]),
        ([False, False, False, True, False], [1.5], [200, 67, 0]),
        # hue 20 degrees, turned to 50 and to 350
        ([False, False, False, False, True], [30.0], [200, 175, 50]),
        ([False, False, False, False, True], [-30.0], [200, 50, 75]),
        # clipped between the steps: contrast first makes red 255, last 232 * 1.5 as well
        ([True, True, True, True, False], [32.0, 1.5, 0.5], [255, 226, 189]),
        ([True, False, True, True, False], [32.0, 1.5, 0.5], [255, 255, 236]),
    ],
)
def test_changes_by_hand(drawn: list[bool], values: list[float], expected: list[int]) -> None:
    found = distorted(PIXEL, drawn, values)
    assert found.dtype == np.uint8
    rounding = 4 if drawn[3] or drawn[4] else 0  # HSV of 8 bits
    assert np.abs(found[0, 0].astype(int) - expected).max() <= rounding


def test_padding_is_not_distorted() -> None:
    image, labels = patches(30, 30)
    for seed in range(30):
        found, truth = augment(image, labels, CAFFE, UPERNET, rng(seed), scale=0.5)
        assert (truth == 255).any() and (found[:, truth == 255] == 0).all()


@pytest.fixture
def pairs(tmp_path: Path) -> list[tuple[Item, Path]]:
    found = []
    for number in range(3):
        image, labels = patches(70 + number, 90, seed=number)
        mask = np.array([0, *CLASSES.mask_ids], np.uint8)[labels]
        mask[:5] = 255
        mask[5:9] = 99  # of no class
        found.append(write(tmp_path / "data", f"i{number}", mask, image))
    return found


def test_a_sample_depends_on_seed_epoch_and_index_alone(pairs: list[tuple[Item, Path]]) -> None:
    found, same = sample(pairs, Place(2, 1, 77)), sample(pairs, Place(2, 1, 5))
    assert torch.equal(found[0], same[0]) and torch.equal(found[1], same[1])
    others = [sample(pairs, Place(3, 1, 77)), sample(pairs, Place(2, 2, 77))]
    others.append(sample(pairs, Place(2, 1, 77), seed=5))
    assert not any(torch.equal(found[0], other[0]) for other in others)


def test_mask_ids_become_labels(pairs: list[tuple[Item, Path]]) -> None:
    image, mask = np.array(Image.open(pairs[0][0].image)), np.array(Image.open(pairs[0][1]))
    expected = np.full(256, 255)
    expected[[0, 10, 17, 8]] = range(4)
    settings = plain(crop=90)
    found, truth = sample(pairs, Place(0, 0, 0), settings, seed=0)
    again = augment(image, expected[mask], CAFFE, settings, rng(0, 0, 0))
    assert torch.equal(found, again[0]) and torch.equal(truth, again[1])
    assert set(truth.unique().tolist()) == {0, 1, 2, 3, 255}


def test_a_batch_shares_its_scale(pairs: list[tuple[Item, Path]]) -> None:
    settings = WIDERESNET.model_copy(update={"crop": 128})
    for step in range(5):
        scale = augmentation._batch_scale(settings, 1, step)
        for index in range(3):
            found, _ = sample(pairs, Place(0, index, step), settings, seed=1)
            covered = found.abs().sum(0) > 0
            sides = int(covered.any(1).sum()), int(covered.any(0).sum())
            assert sides == (round((70 + index) * scale), round(90 * scale))


def test_a_mask_that_changed_its_size_is_named(pairs: list[tuple[Item, Path]]) -> None:
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(pairs[1][1])
    with pytest.raises(DataError, match=r"mask .*i1.mask.png of 'i1' is 20 x 30 .*71 x 90"):
        sample(pairs, Place(0, 1, 0))


@pytest.mark.parametrize("workers", [1, 3])
def test_pixels_are_counted_and_empty_masks_left_out(tmp_path: Path, workers: int) -> None:
    mask = np.array([[0, 0, 10, 8], [255, 99, 10, 0]])
    pairs = [
        write(tmp_path, "a", mask),
        write(tmp_path, "b", np.full((5, 4), 255)),
        write(tmp_path, "c", np.full((2, 2), 17)),
        write(tmp_path, "d", np.full((2, 3), 77)),
    ]
    found = check_masks(pairs, CLASSES, strict=False, workers=workers)
    assert found.pairs == (pairs[0], pairs[2])
    assert [skip.id for skip in found.dropped] == ["b", "d"]
    assert "all are ignored (255)" in found.dropped[0].reason
    assert "of no class ([77])" in found.dropped[1].reason
    assert found.pixels == (3, 2, 4, 1)
    assert found.ignored == 2
    assert found.unknown == (77, 99)


def test_unknown_mask_ids_are_an_error_where_they_must_not_be(tmp_path: Path) -> None:
    pairs = [write(tmp_path, "a", np.array([[0, 9, 255, 12]]))]
    expected = r"mask .*a.mask.png of 'a' has the values \[9, 12\].*mask ids \[10, 17, 8\]"
    with pytest.raises(DataError, match=expected):
        check_masks(pairs, CLASSES, strict=True)


def test_missing_masks_are_counted_and_three_are_named(tmp_path: Path) -> None:
    pairs = [write(tmp_path, f"i{n}", np.zeros((4, 4))) for n in range(6)]
    for _, path in pairs[1:]:
        path.unlink()
    with pytest.raises(DataError, match=r"5 of 6 images have no mask: i1 .*i2 .*i3 ") as error:
        check_masks(pairs, CLASSES, strict=True)
    assert "i4" not in str(error.value)
    with pytest.raises(DataError, match="0 of 0 images have no mask"):
        check_masks([], CLASSES, strict=True)


@pytest.mark.parametrize(("suffix", "orientation"), [("jpg", 6), ("png", 8), ("tif", 3)])
def test_the_upright_size_of_an_image_counts(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(path, exif=exif)
    size = (20, 30) if orientation == 3 else (30, 20)
    pairs = [write(tmp_path / "masks", "a", np.zeros(size))]
    pairs = [(Item("a", path, ()), pairs[0][1])]
    assert check_masks(pairs, CLASSES, strict=True).pairs == tuple(pairs)
    Image.fromarray(np.zeros(size[::-1], np.uint8)).save(pairs[0][1])
    with pytest.raises(DataError, match="upright image"):
        check_masks(pairs, CLASSES, strict=True)


def test_nothing_to_learn_from_is_an_error(tmp_path: Path) -> None:
    pairs = [write(tmp_path, name, np.full((4, 4), 255)) for name in "ab"]
    with pytest.raises(DataError, match=r"none of 2 masks can be trained on: .*a.mask.png"):
        check_masks(pairs, CLASSES, strict=True)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    item, path = write(tmp_path, "a", np.zeros((4, 4)))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    with pytest.raises(DataError, match=r"mask of 'a': .*colours \(mode RGB\)"):
        check_masks([(item, path)], CLASSES, strict=True)
    item, path = write(tmp_path, "b", np.zeros((4, 4)))
    item.image.write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"b\.png"):
        check_masks([(item, path)], CLASSES, strict=True)
