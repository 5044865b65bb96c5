"""Backbone, pooling, head: any timm name, weights of any origin, and what is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from lpcam.classifiers import classifier as module
from lpcam.classifiers.classifier import (
    BackboneSpec,
    Classifier,
    Preprocessing,
    SameConvolution,
    build,
    check_download,
)
from lpcam.runtime.errors import ClassifierError

CLASSES = ("blue", "green", "red")
VIT = BackboneSpec("test_vit", {"dynamic_img_pad": True})
PLAIN = Preprocessing((0.0,) * 3, (1.0,) * 3)


def make(name: str = "test_resnet", **options: object) -> Classifier:
    """A random classifier."""
    return build(BackboneSpec(name, {}, **options), CLASSES, weights="random")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_convnext", "test_mambaout"]
)
def test_features_of_convolutional_backbones(name: str) -> None:
    classifier = make(name)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = classifier.features(images)
        given: Tensor = classifier.backbone.forward_features(images)  # type: ignore[operator]
        channels_last = name == "test_mambaout"
        assert torch.equal(features, given.permute(0, 3, 1, 2) if channels_last else given)
        assert features.shape[0] == 2
        assert features.shape[-2:] == (2, 3)
        expected = torch.einsum("bchw,nc->bn", features, classifier.weight) / 6
        assert torch.allclose(classifier(images), expected, atol=1e-6)


def test_features_of_a_token_backbone() -> None:
    classifier = build(VIT, CLASSES, weights="random")
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = classifier.features(images)
        tokens: Tensor = classifier.backbone.forward_features(images)  # type: ignore[operator]
    assert features.shape == (2, tokens.shape[2], 4, 6)
    # token 1 + 6 y + x (0 is the class token) is the place (y, x)
    assert torch.allclose(features[1, :, 2, 5], tokens[1, 1 + 6 * 2 + 5], atol=1e-6)


def test_preprocessing_of_timm_and_its_override() -> None:
    config = timm.create_model("test_resnet").pretrained_cfg
    own = make().preprocessing
    assert own == Preprocessing(tuple(config["mean"]), tuple(config["std"]))
    spec = BackboneSpec("test_resnet", {})
    changed = build(spec, CLASSES, weights="random", mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    assert changed.preprocessing == Preprocessing((0.1, 0.2, 0.3), (1, 1, 1))


def test_output_stride_and_arguments() -> None:
    images = torch.zeros(1, 3, 64, 96)
    assert make(output_stride=8).features(images).shape[-2:] == (8, 12)
    assert make(output_stride=16).features(images).shape[-2:] == (4, 6)
    spec = BackboneSpec("resnet18", {"channels": [8, 8, 16, 24]})
    assert build(spec, CLASSES, weights="random").weight.shape == (3, 24)


def test_without_dilation_same_size_and_other_values() -> None:
    arguments = {"channels": [8, 8, 8, 8], "zero_init_last": False}
    dilated, plain = (
        build(BackboneSpec("resnet18", arguments, 8, dilated=kept), CLASSES, weights="random")
        for kept in (True, False)
    )

    def dilations(classifier: Classifier) -> set[int]:
        return {m.dilation[0] for m in classifier.modules() if isinstance(m, nn.Conv2d)}

    assert dilations(dilated) == {1, 2, 4}
    assert dilations(plain) == {1}
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    first, second = dilated.features(images), plain.features(images)
    assert first.shape == second.shape == (1, 8, 8, 12)
    assert not torch.allclose(first, second)
    states = [one.state_dict().values() for one in (dilated, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_batch_norm_stays_frozen_in_training() -> None:
    classifier = make()
    before = {name: buffer.clone() for name, buffer in classifier.named_buffers()}
    assert not classifier.training
    assert classifier.train().head.training
    classifier(torch.rand(2, 3, 64, 64)).sum().backward()
    assert before
    assert all(torch.equal(b, before[name]) for name, b in classifier.named_buffers())
    assert all(p.grad is not None for p in classifier.parameters())  # affine weights do learn


def test_random_weights_follow_the_seed_and_leave_the_global_state() -> None:
    state = torch.random.get_rng_state()
    one, same = make(), make()
    other = build(BackboneSpec("test_resnet", {}), CLASSES, weights="random", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("backbone", "named"),
    [
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), r"\(1, 3\)"),
        (nn.Threshold(1.0, float("nan")), "NaN"),
    ],
)
def test_unsuitable_backbones_are_refused(backbone: nn.Module, named: str) -> None:
    with pytest.raises(ClassifierError, match=named):
        Classifier(backbone, ("a",), PLAIN)


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("test_vit3", {}, "97 x 131"),
        ("test_vit3", {"dynamic_img_size": True}, "patch size"),
        ("resnet18x", {}, "'resnet18x'.*resnet18"),
        ("nothing of the kind", {}, "'nothing of the kind'"),
        ("test_resnet", {"blocks_of": 3}, "blocks_of"),
        ("test_vit", {"output_stride": 8}, "output_stride"),
    ],
)
def test_names_and_arguments_that_are_refused(
    name: str, arguments: dict[str, object], named: str
) -> None:
    with pytest.raises(ClassifierError, match=named):
        build(BackboneSpec(name, arguments), CLASSES, weights="random")


def weights_with(**changes: Tensor | None) -> dict[str, Tensor]:
    """Weights of the tiny backbone; a name with None is left out."""
    state = dict(timm.create_model("test_resnet", num_classes=0).state_dict())
    found = {**state, **{name.replace("__", "."): t for name, t in changes.items()}}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bn1__bias": None}, r"1 missing \(first: bn1.bias\)"),
        ({"odd": torch.ones(1)}, r"1 unexpected \(first: odd\)"),
        ({"bn1__bias": torch.ones(1)}, r"1 of another shape \(first: bn1.bias\)"),
        ({"bn1__bias": torch.full((32,), torch.nan)}, "NaN or Inf in 'bn1.bias'"),
    ],
)
def test_weights_that_do_not_fit(
    tmp_path: Path, changes: dict[str, Tensor | None], named: str
) -> None:
    save_file(weights_with(**changes), tmp_path / "w.safetensors")
    with pytest.raises(ClassifierError, match=named):
        build(BackboneSpec("test_resnet", {}), CLASSES, weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["none.safetensors", "w.pth", "w.safetensors"])
def test_weights_file_missing_pickled_or_damaged(tmp_path: Path, name: str) -> None:
    if name != "none.safetensors":
        (tmp_path / name).write_bytes(b"not tensors at all")
    with pytest.raises(ClassifierError, match=name):
        build(BackboneSpec("test_resnet", {}), CLASSES, weights=tmp_path / name)


@pytest.mark.parametrize("head", [0, 5])
def test_weights_from_a_file_with_and_without_a_head(tmp_path: Path, head: int) -> None:
    torch.manual_seed(3)
    source = timm.create_model("test_resnet", num_classes=head).eval()
    path = tmp_path / "w.safetensors"
    save_file(source.state_dict(), path)
    assert ("fc.weight" in load_file(path)) == bool(head)
    classifier = build(BackboneSpec("test_resnet", {}), CLASSES, weights=path)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(classifier.features(images), source.forward_features(images))


def test_fingerprint_changes_with_everything_that_matters() -> None:
    classifier = make()
    seen = {classifier.fingerprint()}
    state = classifier.state_dict()
    for name in ("head.weight", next(name for name in state if name.endswith("running_var"))):
        state[name].flatten()[2] += 1e-3
        seen.add(classifier.fingerprint())
    for name, value in (
        ("preprocessing", PLAIN),
        ("classes", ("blue", "green", "rouge")),
        ("spec", BackboneSpec("test_resnet", {}, dilated=False)),
    ):
        setattr(classifier, name, value)
        seen.add(classifier.fingerprint())
    assert len(seen) == 6
    assert all(len(digits) == 32 and int(digits, 16) for digits in seen)


def test_save_and_load(tmp_path: Path) -> None:
    spec = BackboneSpec("resnet18", {"channels": [8, 8, 8, 8]}, 16, dilated=False)
    classifier = build(spec, CLASSES, weights="random", mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    classifier.save(one, {"stage": "a"})
    loaded = Classifier.load(one)
    loaded.save(two, {"stage": "a"})
    assert one.read_bytes() == two.read_bytes()
    assert loaded.classes == CLASSES
    assert loaded.spec == spec


def with_statistics(classifier: Classifier) -> Classifier:
    """With batch norms that do something: no mean is 0, no variance or factor 1."""
    generator = torch.Generator().manual_seed(0)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    with torch.no_grad():
        for module in classifier.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(draw(module.running_mean, -0.3, 0.3))
                module.running_var.copy_(draw(module.running_var, 0.5, 1.5))
                module.weight.copy_(draw(module.weight, 0.7, 1.3))
                module.bias.copy_(draw(module.bias, -0.3, 0.3))
    return classifier


def norms(classifier: Classifier) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in classifier.modules())


def check_folded(classifier: Classifier) -> Classifier:
    """The copy has the features of the original, which stays as it was.

    Double precision shows that the difference is rounding, which 50 layers of single precision
    let grow; how far depends on the processor.
    """
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        classifier.to(dtype)
        before = classifier.fingerprint()
        twin = classifier.folded()
        assert not twin.training
        for size in ((33, 50), (64, 96), (97, 131)):
            generator = torch.Generator().manual_seed(1)
            images = torch.randn(2, 3, *size, generator=generator, dtype=dtype)
            with torch.no_grad():
                expected, found = classifier.features(images), twin.features(images)
                assert (found - expected).norm() <= bound * expected.norm()
                assert (found - expected).abs().max() <= bound * expected.abs().max()
                torch.testing.assert_close(twin(images), classifier(images), atol=1e-4, rtol=1e-4)
        assert classifier.fingerprint() == before
    return twin


RESIDUAL = {"channels": [8, 8, 16, 24], "zero_init_last": False}


@pytest.mark.parametrize(
    ("name", "arguments", "stride", "left"),
    [
        ("resnet18", RESIDUAL, None, 0),
        ("resnet18", RESIDUAL, 8, 0),
        # the last convolution of a stem of three is no neighbour of its norm
        ("test_resnet", {"zero_init_last": False}, 16, 1),
        ("test_efficientnet", {}, None, 0),
        ("test_efficientnet", {"pad_type": "same"}, 16, 0),
        ("test_byobnet", {}, None, 0),
        ("mobilenetv2_035", {"pad_type": "same"}, None, 0),
        ("mobilenetv2_035", {"pad_type": "same"}, 16, 0),
    ],
)
def test_folded_batch_norms(
    name: str, arguments: dict[str, object], stride: int | None, left: int
) -> None:
    classifier = with_statistics(
        build(BackboneSpec(name, arguments, stride), CLASSES, weights="random")
    )
    assert norms(classifier) > left
    twin = check_folded(classifier)
    assert norms(twin) == left
    padded = sum(isinstance(m, Conv2dSame) for m in classifier.modules())
    assert (padded > 0) == (arguments.get("pad_type") == "same")
    assert sum(isinstance(m, SameConvolution) for m in twin.modules()) == padded


class NormOfAnother(nn.Module):
    """The convolution's output is used without the norm as well."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        inner = self.convolution(images)
        return torch.cat([inner, self.norm(inner)], dim=1)


def test_folding_that_would_change_the_features_is_left() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = with_statistics(Classifier(NormOfAnother(), CLASSES, PLAIN))
    twin = check_folded(classifier)
    assert norms(twin) == 1
    images = torch.rand(1, 3, 20, 30)
    assert torch.equal(twin.features(images), classifier.features(images))


def test_folded_norms_without_affine_weights() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False))
    plain[1].running_mean.fill_(0.3)  # type: ignore[operator, union-attr]
    plain[1].running_var.fill_(2.0)  # type: ignore[operator, union-attr]
    assert norms(check_folded(Classifier(plain, CLASSES, PLAIN))) == 0
    current = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert norms(check_folded(Classifier(current, CLASSES, PLAIN))) == 1  # has nothing to fold


def test_folded_shares_nothing_and_cannot_be_saved(tmp_path: Path) -> None:
    classifier = with_statistics(make())
    twin = classifier.folded()
    pointers = {p.data_ptr() for p in classifier.state_dict().values()}
    assert not pointers & {p.data_ptr() for p in twin.state_dict().values()}
    with pytest.raises(ClassifierError):
        twin.save(tmp_path / "twin.safetensors")
    assert list(tmp_path.iterdir()) == []
    assert classifier.spec is not None
    classifier.train()
    classifier.folded()
    assert classifier.training


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_convolution_is_timms(
    kernel: int, stride: int | tuple[int, int], dilation: int
) -> None:
    """In whole numbers, whose sums have no rounding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        theirs = Conv2dSame(4, 4, kernel, stride, dilation=dilation, groups=2)
        for parameter in theirs.parameters():
            parameter.copy_(torch.randint(-5, 6, parameter.shape, generator=generator))
        ours = SameConvolution(theirs)
        for height in range(1, 21):
            width = 1 + 7 * height % 20
            images = torch.randint(-5, 6, (1, 4, height, width), generator=generator).float()
            assert torch.equal(ours(images), theirs(images)), (height, width)


# -- Weights to be downloaded --------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub that answers with the status in its list, and notes requests; nothing is cached."""
    asked = ["200"]

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            if asked[0] == "never":
                return time.sleep(1.0)
            self.send_response(int(asked[0]))
            if asked[0] == "404":
                self.send_header("X-Error-Code", "EntryNotFound")
            if asked[0] == "403":
                self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "10")
            return self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    template = (
        f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield asked
    server.shutdown()
    server.server_close()


WEIGHTS_FILE = "/timm/mobilenetv2_100.ra_in1k/resolve/main/model.safetensors"


@pytest.mark.parametrize("status", ["200", "404"])
def test_weights_that_can_be_downloaded(hub: list[str], status: str) -> None:
    hub[0] = status  # 404: the repository has its file under another name
    check_download("mobilenetv2_100")
    assert WEIGHTS_FILE in hub


@pytest.mark.parametrize("status", ["403", "503", "never"])
def test_weights_that_cannot_are_asked_for_once(
    hub: list[str], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub[0] = status
    monkeypatch.setattr(module, "HUB_SECONDS", 0.5 if status == "never" else 30.0)
    with pytest.raises(ClassifierError, match=WEIGHTS_FILE):
        check_download("mobilenetv2_100")
    assert hub.count(WEIGHTS_FILE) == 1
    with pytest.raises(ClassifierError, match="bundled"):  # before a model is made
        build(BackboneSpec("mobilenetv2_100", {}), ["a"], weights="pretrained")


def test_cached_weights_and_other_models_need_no_network(
    hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_download("test_no_such_model")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "model.safetensors")
    check_download("mobilenetv2_100")
    assert hub[1:] == []


def test_offline_mode_is_told(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ClassifierError, match="HF_HUB_OFFLINE"):
        check_download("mobilenetv2_100")
