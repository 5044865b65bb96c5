"""The call of pytorch-grad-cam: its scripts, its targets, its models, answered by LPCAM."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from tiny import RED_AND_GREEN, Patches, picture, state_of
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from lpcam.explain.gradcam import LPCAM, principal_component
from lpcam.method import extractors as extract
from lpcam.method.functional import cosine_activation, normalize
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import ClassifierError, NotFittedError, PrototypeError

SETTINGS = LpcamSettings.from_preset(
    "voc12.official",
    clusters=2,
    mu_f=0.5,
    tau=0.3,
    scales=[1.0],
    flip=False,
    split_maps="single_scale",
)


@dataclass
class Target:
    """As pytorch-grad-cam's ClassifierOutputTarget."""

    category: int

    def __call__(self, output: Tensor) -> Tensor:
        return output[..., self.category]


class Squares(nn.Module):
    """A classifier of two classes, red and green, whose maps are known."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches()
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 2)
        with torch.no_grad():
            self.fc.weight.copy_(RED_AND_GREEN)
            self.fc.bias.copy_(torch.tensor([0.1, -0.1]))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.dropout(self.patches(images).mean((-2, -1))))
        return logits


@pytest.fixture
def images() -> Tensor:
    return torch.stack([picture(0.9, 0.1), picture(0.1, 0.9), picture(0.8, 0.2)])


LABELS = torch.tensor([0, 1, 0])


@pytest.fixture
def cam(images: Tensor) -> LPCAM:
    model = Squares()
    return LPCAM(model, [model.patches], settings=SETTINGS).fit([(images, LABELS)])


@pytest.fixture
def peer() -> Any:
    """The library whose call this is, where it is installed."""
    return pytest.importorskip("pytorch_grad_cam")


def test_the_map_is_that_of_lpcam(cam: LPCAM, images: Tensor) -> None:
    found = cam(input_tensor=images, targets=[Target(0), Target(1), Target(1)])
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    assert found.shape == (3, 64, 96)
    features = cam.model.patches(images)
    vectors = cam.prototypes_.vectors()
    whole = nn.functional.interpolate(
        cosine_activation(features, vectors).relu(), size=(64, 96), mode="bilinear"
    )
    expected = normalize(whole)[torch.arange(3), torch.tensor([0, 1, 1])]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert found[0, 32, 40] == pytest.approx(1.0, abs=1e-3)  # the square
    assert found[0, 60, 90] == 0  # the blue ground is context


def test_outputs_are_the_logits_and_targets_come_in_every_form(cam: LPCAM, images: Tensor) -> None:
    assert cam.outputs is None
    best = cam(images)
    assert cam.outputs is not None and not cam.outputs.requires_grad
    torch.testing.assert_close(cam.outputs, cam.source.model.eval()(images))
    assert cam.outputs.argmax(1).tolist() == LABELS.tolist()
    for targets in (
        [0, 1, 0],
        (Target(0), 1, Target(0)),
        LABELS,
        LABELS.numpy(),
        [Target(np.int64(0)), 1, 0],  # type: ignore[arg-type]
    ):
        np.testing.assert_array_equal(cam(images, targets), best)  # type: ignore[arg-type]


def test_images_and_targets_that_do_not_fit(cam: LPCAM, images: Tensor) -> None:
    class Pixels(Target):
        mask = np.ones((4, 4))

    for given in (torch.ones(3, 32, 32), torch.ones(0, 3, 32, 32), [1]):
        with pytest.raises(ValueError, match="input_tensor"):
            cam(given)
    with pytest.raises(ValueError, match="uint8"):
        cam(torch.ones(3, 3, 32, 32, dtype=torch.uint8), [0, 1, 0])
    for targets, message in (
        ([0], "3 targets"),
        (torch.tensor(0), "3 targets"),
        (Target(0), "3 targets"),
        ([0, 1, 2], "class 2"),
        ([0, 1, -3], "class -3"),
        ([0, 1, lambda output: output], "names no class"),
        ([0, 1, Pixels(0)], "names no class"),
    ):
        with pytest.raises(ValueError, match=message):
            cam(images, targets)


def test_aug_smooth_is_the_mean_of_six_views(cam: LPCAM, images: Tensor) -> None:
    images = images + 0.3 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    targets = [0, 1, 1]
    for eigen in (False, True):
        views = [cam(images * by, targets, eigen_smooth=eigen) for by in (0.9, 1.0, 1.1)]
        views += [
            cam(images.flip(-1) * by, targets, eigen_smooth=eigen)[..., ::-1]
            for by in (0.9, 1.0, 1.1)
        ]
        smooth = cam(images, targets, aug_smooth=True, eigen_smooth=eigen)
        np.testing.assert_allclose(smooth, np.mean(views, axis=0), atol=1e-6)
        assert smooth[0, 32, 40] > 0.8
    torch.testing.assert_close(cam.outputs, cam.source.model.eval()(images))


def test_the_principal_component_by_hand() -> None:
    """Products (a, b) at four places on one line: projection on it, centred."""
    features = torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.6, 0.8], [8.0, 6.0]]).T.reshape(2, 1, 4)
    found = principal_component(features, None, torch.tensor([[2.0, 1.0]]))
    # unit features (0.6, 0.8) and (0.8, 0.6); products (1.2, 0.8) and (1.6, 0.6), whose sums are
    # 2.0 and 2.2: the second kind is the positive side, at half their distance, the first is cut
    half = 0.5 * float(np.hypot(0.4, 0.2))
    torch.testing.assert_close(found, torch.tensor([[[0.0, half, 0.0, half]]]))


def test_the_sign_of_the_principal_component_agrees_with_lpcam() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 8, 5, 7, generator=generator)
    vectors = torch.randn(6, 8, generator=generator)
    for row in range(6):
        (found,) = principal_component(features[row], None, vectors[row : row + 1])
        signed = cosine_activation(features[row], vectors[row : row + 1])[0]
        assert float((found * (signed - signed.mean())).sum()) > 0


def test_settings_with_scales_and_flip(images: Tensor) -> None:
    settings = SETTINGS.model_copy(update={"scales": (1.0, 2.0), "flip": True})
    model = Squares()
    # whose patches are others in the mirror
    images = nn.functional.pad(images, (0, 7)) + 0.3 * torch.rand(3, 3, 64, 103)
    cam = LPCAM(model, settings=settings).fit([(images, LABELS)])
    found = cam(images, [0, 1, 0])
    expected = extract.LPCAM(cam.source, settings)
    expected.fit([(images, torch.eye(2)[LABELS])])
    maps = expected(images)[torch.arange(3), LABELS]
    np.testing.assert_allclose(found, maps.numpy(), atol=1e-5)
    assert cam(images, eigen_smooth=True).shape == (3, 64, 103)
    assert LPCAM(model).settings.scales == (1.0,)
    assert LPCAM(model, settings="voc12.paper").settings.preset == "voc12.paper"


def test_what_has_no_prototypes_is_named(images: Tensor) -> None:
    cam = LPCAM(Squares(), settings=SETTINGS, classes=("red", "green"))
    for call in (lambda: cam(images), lambda: cam.save("never")):
        with pytest.raises(NotFittedError, match=r"fit\(loader\)"):
            call()
    assert cam.outputs is None  # refused before any work
    cam.fit([(images[:1], LABELS[:1])])
    assert cam(images[:1]).any()
    with pytest.raises(PrototypeError, match=r"'green' \(1\)"):
        cam(images)


def test_prototypes_from_a_file_and_from_an_object(
    cam: LPCAM, images: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "p.safetensors"
    cam.save(path)
    model = Squares()
    for given in (path, str(path), cam.prototypes_):
        again = LPCAM(model, [model.patches], prototypes=given, settings=SETTINGS)
        np.testing.assert_array_equal(again(images), cam(images))
    again.fit([(images[:2], LABELS[:2])])  # takes the place of the file
    assert not np.array_equal(again.prototypes_.vectors(), cam.prototypes_.vectors())
    with torch.no_grad():
        model.fc.weight.add_(1.0)
    for given in (path, cam.prototypes_):
        with pytest.raises(PrototypeError, match="but this classifier is"):
            LPCAM(model, [model.patches], prototypes=given)


def test_self_fit_takes_the_images_themselves(images: Tensor) -> None:
    model = Squares()
    cam = LPCAM(model, self_fit=True, settings=SETTINGS)
    fitted = LPCAM(model, settings=SETTINGS).fit([(images, LABELS)])
    np.testing.assert_allclose(cam(images), fitted(images), atol=1e-6)
    # anew at each call, and the targets are the labels
    mixed = torch.cat([images, picture(0.9, 0.1)[None]])
    mixed[3, :, :16, 64:] = torch.tensor([0.1, 0.9, 0.1])[:, None, None]
    turned = torch.tensor([0, 1, 0, 1])
    first = LPCAM(model, settings=SETTINGS).fit([(mixed[3:], turned[3:])])
    assert model.eval()(mixed[3:]).argmax() == 0
    np.testing.assert_allclose(cam(mixed[3:], [1]), first(mixed[3:], [1]), atol=1e-6)
    first.fit([(mixed, turned)])
    np.testing.assert_allclose(cam(mixed, turned), first(mixed, turned), atol=1e-6)
    cam.fit([(images, LABELS)])  # from now on these serve
    np.testing.assert_allclose(cam(images[1:2]), fitted(images[1:2]), atol=1e-6)


def test_self_fit_of_a_class_that_is_nowhere_gives_an_empty_map(images: Tensor) -> None:
    cam = LPCAM(Squares(), self_fit=True, settings=SETTINGS)
    assert not cam(images[1:2], [0]).any()  # CAM of red is negative all over the green image
    assert cam(images[:2], [0, 0])[0].any()


def test_self_fit_warns_of_the_classes_that_are_there(
    images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    for clusters, warned in ((2, 0), (500, 1)):
        settings = SETTINGS.model_copy(update={"clusters": clusters})
        LPCAM(Squares(), self_fit=True, settings=settings, classes=("red", "green"))(
            images[:1], [0]
        )
        assert len(caplog.messages) == warned
    assert "red: only" in caplog.text and "green" not in caplog.text


def test_the_layer_that_the_head_reads_is_taken_silently() -> None:
    model = torchvision.models.resnet18(num_classes=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layers in ([model.layer4[-1]], [model.layer4], None, []):
            assert LPCAM(model=model, target_layers=layers).source.channels_in == 3
    with pytest.warns(UserWarning, match=r"LPCAM maps that one alone, without 'layer4\.0'"):
        both = LPCAM(model=model, target_layers=[model.layer4[-1], model.layer4[-2]])
    with pytest.warns(UserWarning, match=r"does not read the pooled map of 'layer3', so LPCAM"):
        other = LPCAM(model=model, target_layers=[model.layer3])
    image = torch.rand(1, 3, 64, 64)
    for cam in (both, other):
        torch.testing.assert_close(cam.source.features(image), layer4(model, image))


def test_prototypes_serve_every_name_of_the_map(tmp_path: Path) -> None:
    model = torchvision.models.ResNet(Bottleneck, [1, 1, 1, 1], 3, width_per_group=8)
    model.fc.weight.data.abs_()  # so that every class is somewhere
    images, path = torch.rand(3, 3, 64, 64), tmp_path / "p.safetensors"
    plain = extract.LPCAM(model, SETTINGS).fit([(images, torch.arange(3))])
    plain.save(path)
    maps = [
        LPCAM(model, layers, prototypes=path, settings=SETTINGS)(images, range(3))
        for layers in ([model.layer4], [model.layer4[-1]], [model.layer4[-1].relu], None)
    ]
    expected = plain(images)[torch.arange(3), torch.arange(3)].numpy()
    for found in maps:
        np.testing.assert_allclose(found, expected, atol=1e-6)


def layer4(model: Any, image: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.layer4.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        model.eval()(image)
    handle.remove()
    return seen[0]


class Tokens(nn.Module):
    """A classifier of the mean token, whose tokens stand column by column, as nobody can guess."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 16, stride=16)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.embed(images).mT.flatten(2).mT)
        logits: Tensor = self.fc(tokens.mean(1))
        return logits


def test_reshape_transform_makes_the_map() -> None:
    torch.manual_seed(0)
    model = Tokens()

    def reshape(tokens: Tensor) -> Tensor:
        return tokens.mT.unflatten(2, (6, 4)).mT

    images = torch.rand(2, 3, 64, 96)
    cam = LPCAM(model, [model.norm], reshape, self_fit=True, example=images[:1])
    assert cam.reshape_transform is reshape
    found = cam(images)
    assert found.shape == (2, 64, 96)
    expected = model.norm(model.embed(images).movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(cam.source.features(images), expected.detach())
    assert hooks(model) == 0
    with pytest.raises(ClassifierError, match="reshape_transform cannot take"):
        cam(torch.rand(1, 3, 64, 64))
    assert hooks(model) == 0


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_the_state_of_the_model_is_untouched(*, training: bool) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    model.train(training)
    model.layer1.eval()
    model.fc.weight.data.abs_()  # so that every class is somewhere
    model.fc.weight.requires_grad_(False)
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    model(images).sum().backward()
    model.train(training)
    model.layer1.eval()
    before = state_of(model)
    with LPCAM(model=model, target_layers=[model.layer4[-1]], self_fit=True) as cam:
        cam(images, aug_smooth=True, eigen_smooth=True)
        cam.fit([(images, torch.tensor([0, 2]))])
        cam(images, [0, 2])
        with pytest.raises(ValueError, match="none of the classifier's"):
            cam(images, [0, 7])
        with pytest.raises(PrototypeError, match="NaN or Inf"):
            cam(images * float("nan"), [0, 2])
    assert state_of(model) == before


def test_inference_mode_and_autocast(cam: LPCAM, images: Tensor) -> None:
    expected = cam(images)
    with torch.inference_mode():
        np.testing.assert_allclose(cam(images), expected, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_allclose(cam(images, LABELS), expected, atol=1e-6)


def vit_reshape(side: int) -> Callable[[Tensor], Tensor]:
    """As in the examples for transformers with a class token."""
    return lambda t: t[:, 1:].reshape(t.shape[0], side, side, -1).permute(0, 3, 1, 2)


def vit(name: str = "deit_tiny_patch16_224", **arguments: Any) -> nn.Module:
    return timm.create_model(
        name, num_classes=5, img_size=64, depth=2, embed_dim=24, num_heads=2, **arguments
    )


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], list[nn.Module]], Any]] = {
    "resnet18": (
        lambda: torchvision.models.resnet18(num_classes=5),
        lambda m: [m.layer4[-1], m.layer4[-2]],
        None,
    ),
    "convnext": (
        lambda: timm.create_model("test_convnext", num_classes=5),
        lambda m: [m.stages[-1]],
        None,
    ),
    "vit": (vit, lambda m: [m.blocks[-1].norm1], vit_reshape(4)),
}


@pytest.mark.filterwarnings("ignore:the classifier")
@pytest.mark.parametrize("name", MODELS)
def test_a_script_of_theirs_runs_with_the_other_import(name: str) -> None:
    """Their models and target layers; shapes, type and range are those of their methods."""
    torch.manual_seed(0)
    make, layers, reshape = MODELS[name]
    model = make().eval()
    images, targets = torch.randn(2, 3, 64, 64), [Target(3), Target(1)]
    with LPCAM(
        model=model, target_layers=layers(model), reshape_transform=reshape, self_fit=True
    ) as cam:
        found = [cam(input_tensor=images, targets=targets), cam(images, None)]
        found.append(cam(images, targets, eigen_smooth=True))
    for maps in found:
        assert (maps.shape, maps.dtype) == ((2, 64, 64), np.float32)
        assert maps.min() >= 0 and maps.max() <= 1  # False of NaN
    torch.testing.assert_close(cam.outputs, model(images).detach())
    assert hooks(model) == 0


def test_models_and_layers_that_cannot_be_mapped_are_refused() -> None:
    """VGG's form, small."""
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, 16, 1), nn.ReLU()),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)),
    )
    with pytest.raises(ClassifierError, match="Patches"):  # a layer of another model
        LPCAM(model, [Squares().patches])
    with pytest.raises(ClassifierError, match=r"not the mean .*classes=\[\.\.\.\]"):
        LPCAM(model=model, target_layers=[model[0][-1]])
    with pytest.raises(ClassifierError, match=r"gives no logits of the 2 classes.*fit\(loader\)"):
        LPCAM(model=model, classes=["cat", "dog"], self_fit=True)


def test_fit_of_a_new_head(images: Tensor) -> None:
    """VGG's form again: one fit gives the head and the prototypes."""
    patches = Patches()
    model = nn.Sequential(patches, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5))
    cam = LPCAM(model, [patches], settings=SETTINGS, classes=["red", "green"])
    with pytest.raises(NotFittedError):
        cam(images)
    cam.fit([(images, LABELS)])
    found = cam(images, [Target(0), Target(1), Target(-2)])
    expected = extract.LPCAM(model, SETTINGS, classes=["red", "green"], target_layer=patches)
    expected.fit([(images, LABELS)])
    np.testing.assert_allclose(found, expected(images)[torch.arange(3), LABELS], atol=1e-6)
    torch.testing.assert_close(cam.outputs, expected.source_.logits(images))


def count_passes(model: nn.Module, call: Callable[[], Any]) -> int:
    seen: list[int] = []
    with model.register_forward_hook(lambda *_: seen.append(1)):
        call()
    return len(seen)


def test_each_image_passes_the_model_once(cam: LPCAM, images: Tensor) -> None:
    own = LPCAM(cam.model, self_fit=True, settings=SETTINGS)
    for one in (cam, own):
        assert count_passes(cam.model, lambda one=one: one(images)) == 1
        assert count_passes(cam.model, lambda one=one: one(images, [0, 1, 0])) == 1
        assert count_passes(cam.model, lambda one=one: one(images, aug_smooth=True)) == 6
    settings = SETTINGS.model_copy(update={"scales": (0.5, 2.0), "flip": True})
    other = LPCAM(cam.model, prototypes=cam.prototypes_, settings=settings)
    assert count_passes(cam.model, lambda: other(images)) == 3  # and scale 1 for the logits
    torch.testing.assert_close(other.outputs, cam.model.eval()(images))


def test_a_single_module_is_a_layer_and_errors_leave_the_block(cam: LPCAM, images: Tensor) -> None:
    again = LPCAM(cam.model, cam.model.patches, prototypes=cam.prototypes_, settings=SETTINGS)
    with pytest.raises(IndexError), again:
        raise IndexError
    targets = [Target(0), Target(1), Target(-2)]
    np.testing.assert_array_equal(again(images, targets), cam(images, targets))
