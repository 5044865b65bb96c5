"""Any classifier as a feature map and the rows of its head: tiny random models of each family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models as tv
from tiny import state_of
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

from lpcam import CAM, LPCAM
from lpcam.classifiers.tracing import unwrap, without_tf32
from lpcam.classifiers.wrapped import WrappedModel, wrap
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import ClassifierError

ONE_SCALE = LpcamSettings.from_preset("voc12.official", scales=(1.0,), flip=False, clusters=2)
TOKEN_ERROR = r'reads the class token .* Pass pool="token" .* or classes=\[\.\.\.\]'


def shaken(model: Any) -> Any:
    """Norms and zeros of a fresh model made random, so that none is the identity by chance."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            noise = torch.rand(tensor.shape, generator=generator)
            if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
                tensor.copy_(0.5 + noise)
            elif tensor.ndim == 1:
                tensor.copy_((noise - 0.5) * 0.4)
            elif not tensor.any():
                tensor.copy_((noise - 0.5) * 0.2)
    return model.eval()


def pictures(count: int = 2, channels: int = 3, size: tuple[int, int] = (70, 90)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, *size, generator=generator)


def own_logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        output: Any = model(images)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def check(wrapped: WrappedModel, model: nn.Module, size: tuple[int, int]) -> Tensor:
    """Rows on the pooled map, and the wrapper's logits, are the model's; the map is returned."""
    images = pictures(2, wrapped.channels_in, size)
    expected = own_logits(model, images)
    bound = 1e-4 * max(1.0, float(expected.abs().max()))
    assert float(expected.std()) > 1e-4  # else anything would agree
    assert (wrapped.logits(images) - expected).abs().max() < bound
    features = wrapped.features(images)
    assert features.dtype == torch.float32
    assert wrapped.weight.shape == (len(wrapped.classes), features.shape[1])
    if wrapped.pool == "mean":
        found = F.linear(features.mean((-2, -1)), wrapped.weight, wrapped.bias)
        assert (found - expected).abs().max() < bound
    alone = torch.cat([wrapped.features(image[None]) for image in images])
    torch.testing.assert_close(alone, features, atol=1e-3, rtol=1e-3)
    return features


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **{"num_classes": 5, **options})


def of(kind: Callable[..., nn.Module], *arguments: Any) -> Callable[[], nn.Module]:
    return lambda: kind(*arguments, num_classes=5)


BASIC = tv.resnet.BasicBlock
SWIN: Any = ([4, 4], 8, [1, 1], [1, 1], [2, 2])
SMALL_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64}
SMALL_SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
CONVNEXT = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
FIXED_SWIN = {**SMALL_SWIN, "img_size": 64, "window_size": 2}
MEAN: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int], tuple[int, int]]] = {
    # name: the model, the layer of its map, size of the images, grid of the map
    "timm ResNet": (of_timm("test_resnet"), "layer4", (70, 90), (3, 3)),
    "timm RegNet-like": (of_timm("test_byobnet"), "final_conv", (70, 90), (3, 3)),
    "timm ConvNeXt": (of_timm("test_convnext"), "norm_pre", (70, 90), (2, 2)),
    "timm EfficientNet": (of_timm("test_efficientnet"), "bn2", (70, 90), (3, 3)),
    "timm NFNet": (of_timm("test_nfnet"), "final_act", (70, 90), (3, 3)),
    "timm MaxViT": (of_timm("test_maxvit"), "norm", (160, 160), (5, 5)),
    "timm ViT, mean": (of_timm("test_vit2"), "norm", (64, 96), (4, 6)),
    "timm ViT, mean, RMS norm": (of_timm("test_vit4"), "norm", (64, 96), (4, 6)),
    "timm Swin": (of_timm("swin_tiny_patch4_window7_224", **FIXED_SWIN), "norm", (64, 64), (2, 2)),
    "timm DINOv3": (of_timm("vit_small_patch16_dinov3", **SMALL_VIT), "norm", (64, 96), (4, 6)),
    "torchvision ResNet": (of(tv.ResNet, BASIC, [1, 1, 1, 1]), "layer4", (70, 90), (3, 3)),
    "torchvision DenseNet": (of(tv.DenseNet, 4, (1, 2), 8), "features", (70, 90), (9, 11)),
    "torchvision ConvNeXt": (of(tv.ConvNeXt, CONVNEXT), "features", (70, 90), (8, 11)),
    "torchvision Swin": (of(tv.SwinTransformer, *SWIN), "permute", (70, 90), (9, 11)),
}


@pytest.mark.parametrize("family", MEAN)
def test_a_head_on_the_mean_of_a_map(family: str) -> None:
    make, layer, size, grid = MEAN[family]
    model = shaken(make())
    wrapped = wrap(model)
    features = check(wrapped, model, size)
    assert wrapped.pool == "mean"
    assert wrapped.found.startswith(f"map: {layer}")
    assert tuple(features.shape[2:]) == grid
    assert (wrapped.fixed_size is not None) == (size[0] == size[1])


REGISTERS = {**SMALL_VIT, "img_size": 56}
TOKEN: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], int]] = {
    # name: the model, size of the images, prefix tokens
    "timm ViT": (of_timm("test_vit"), (64, 96), 1),
    "timm DeiT": (of_timm("deit_tiny_patch16_224", **SMALL_VIT), (64, 64), 1),
    "timm DINOv2": (of_timm("vit_small_patch14_reg4_dinov2", **REGISTERS), (56, 56), 5),
    "torchvision ViT": (of(tv.VisionTransformer, 32, 8, 2, 2, 16, 32), (32, 32), 1),
}


@pytest.mark.parametrize("family", TOKEN)
def test_a_head_on_the_class_token(family: str) -> None:
    make, size, prefix = TOKEN[family]
    model = shaken(make())
    with pytest.raises(ClassifierError, match=TOKEN_ERROR):
        wrap(model)
    wrapped = wrap(model, pool="token")
    assert wrapped.pool == "token"
    assert f"without {prefix} prefix tokens" in wrapped.found
    features = check(wrapped, model, size)
    # the tokens that a hook on the last norm sees are the cells, row by row
    seen = []
    last = model.norm if hasattr(model, "norm") else model.encoder.ln
    with last.register_forward_hook(lambda *a: seen.append(a[-1])):
        own_logits(model, pictures(size=size))
    torch.testing.assert_close(features.flatten(2), seen[0][:, prefix:].transpose(1, 2))


def test_a_new_head_reads_the_mean_of_the_patch_tokens() -> None:
    model = shaken(timm.create_model("test_vit", num_classes=5))
    wrapped = wrap(model, classes=["a", "b"])
    assert wrapped.needs_head
    torch.testing.assert_close(
        wrapped.features(pictures(size=(64, 96))),
        wrap(model, pool="token").features(pictures(size=(64, 96))),
    )
    with pytest.raises(ClassifierError, match="no linear head for a, b"):
        wrapped.weight  # noqa: B018
    headed = wrapped.with_head(torch.ones(2, 64))
    assert (headed.needs_head, headed.pool, headed.bias) == (False, "mean", None)
    with pytest.raises(ValueError, match="a weight of 2 rows"):
        wrapped.with_head(torch.ones(3, 64))


WORDS = {0: "cat, house cat", 1: "dog", 2: "dog"}


HF_SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
HF_BEIT = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "patch_size": 8}
HUGGING_FACE: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "ResNet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, (9, 12)),
    "ConvNext": ({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, (8, 11)),
    "Swin": ({"image_size": 32, **HF_SWIN}, (9, 12)),
    "Beit": ({"image_size": 32, "num_attention_heads": 2, **HF_BEIT}, (8, 11)),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_transformers_classifiers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    options, grid = HUGGING_FACE[name]
    config = getattr(transformers, f"{name}Config")(id2label=WORDS, **options)
    model = shaken(getattr(transformers, f"{name}ForImageClassification")(config))
    wrapped = wrap(model)
    assert tuple(check(wrapped, model, (70, 90)).shape[2:]) == grid
    assert wrapped.classes == ("cat", "dog (1)", "dog (2)")


class Net(nn.Module):
    """Two convolutions, pooling, what is asked for between, a linear head."""

    def __init__(
        self,
        between: nn.Module | None = None,
        *,
        channels: int = 3,
        classes: int = 3,
        width: int = 8,
        after: Callable[[Tensor], Tensor] = lambda z: z,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 6, 5, 2, 2)
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.Conv2d(6, width, 3, 2, 1)
        self.between = nn.Identity() if between is None else between
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, classes)
        self.after = after

    def maps(self, images: Tensor) -> Tensor:
        return self.body(F.relu(self.norm(self.stem(images))))

    def pool(self, maps: Tensor) -> Tensor:
        return F.relu(maps).mean((-2, -1))

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.pool(self.maps(images))
        return self.after(self.head(self.drop(self.between(pooled))))


class Length(nn.Module):
    def forward(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1)


@pytest.mark.parametrize(
    "between",
    [
        nn.Identity(),
        nn.BatchNorm1d(8),
        nn.BatchNorm1d(8, affine=False),
        nn.LayerNorm(8),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.RMSNorm(8),
        nn.RMSNorm(8, eps=0.3),
        Length(),
        nn.Sequential(nn.LayerNorm(8), nn.BatchNorm1d(8)),
        nn.Sequential(Length(), nn.BatchNorm1d(8), nn.Dropout(0.5)),
    ],
    ids=lambda m: "-".join(type(c).__name__ for c in m.modules()),
)
def test_norms_between_pooling_and_head_are_folded(between: nn.Module) -> None:
    model = shaken(Net(between))
    wrapped = wrap(model)
    features = check(wrapped, model, (41, 67))
    raw = model.maps(pictures(size=(41, 67))).relu()
    torch.testing.assert_close(F.normalize(features, dim=1), F.normalize(raw, dim=1))
    assert "after ReLU" in wrapped.found


@pytest.mark.parametrize("output", ["sigmoid", "softmax", "log softmax"])
def test_what_models_give_of_their_logits(output: str) -> None:
    function = getattr(torch, output.replace(" ", "_"))
    model = shaken(Net(after=function if output == "sigmoid" else partial(function, dim=1)))
    wrapped = wrap(model)
    assert wrapped.output == output
    found = model.after(wrapped.logits(pictures()))
    torch.testing.assert_close(found, own_logits(model, pictures()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels: int) -> None:
    model = shaken(Net(channels=channels))
    check(wrapped := wrap(model), model, (41, 67))
    with pytest.raises(ClassifierError, match=rf"expected images \(B, {channels}, H, W\), got"):
        wrapped.features(pictures(channels=3))


def test_a_convolution_as_the_head() -> None:
    for turn in (1, -1):
        after = (nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 3, 1))[::turn]
        model = shaken(nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), *after, nn.Flatten()))
        check(wrap(model), model, (33, 47))


def test_channels_last_maps() -> None:
    class Last(Net):
        def pool(self, maps: Tensor) -> Tensor:
            return self.between(maps.relu().permute(0, 2, 3, 1)).mean((1, 2))

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.pool(self.maps(images)))  # type: ignore[no-any-return]

    model = shaken(Last())
    wrapped = wrap(model)
    assert "between, channels last" in wrapped.found
    assert check(wrapped, model, (41, 67)).shape == (2, 8, 11, 17)


@pytest.mark.parametrize(
    "after",
    [
        lambda z: (z, {"aux": z + 1}),
        lambda z: {"embedding": z.repeat(1, 5), "logits": z},
        lambda z: z[:, 0],  # no axis of classes
    ],
)
def test_outputs_of_other_types(after: Callable[[Tensor], Any]) -> None:
    wrapped = wrap(model := shaken(Net(after=after, classes=1)))
    model.after = lambda z: z
    torch.testing.assert_close(wrapped.logits(pictures()), own_logits(model, pictures()))


def test_a_layer_and_a_head_that_are_named() -> None:
    model = shaken(Net(nn.LayerNorm(8)))
    found = wrap(model)
    images = pictures()
    for layer, head in (("body", "head"), (model.body, model.head), ("body", None)):
        wrapped = wrap(model, target_layer=layer, head=head)
        assert torch.equal(wrapped.features(images), found.features(images))
        assert torch.equal(wrapped.weight, found.weight)
    with pytest.raises(ClassifierError, match="is not the mean of the given target_layer"):
        wrap(model, target_layer="stem")
    with pytest.raises(ClassifierError, match=r"layer 'boody' for target_layer.* body"):
        wrap(model, target_layer="boody")
    with pytest.raises(ClassifierError, match="head is not a part"):
        wrap(model, head=nn.Linear(8, 3))
    with pytest.raises(ClassifierError, match="head is not a linear"):
        wrap(model, head="norm")


def test_a_callable_and_tensors(caplog: pytest.LogCaptureFixture) -> None:
    model = shaken(Net())
    rows = (model.head.weight, model.head.bias)
    found = wrap(model)
    for options in (
        {"target_layer": model.maps},
        {"target_layer": model.maps, "head": rows},
        {"target_layer": lambda images: model.maps(images).relu(), "head": "head"},
        {"head": rows},
    ):
        wrapped = wrap(model, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(wrapped.features(pictures()), found.features(pictures()))
        check(wrapped, model, (41, 67))
    # tensors without logits to compare with, on a layer that is said to be the map
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    wrapped = wrap(backbone, target_layer="1", head=(torch.ones(2, 8), None))
    assert wrapped.classes == ("class 0", "class 1")
    with pytest.raises(ClassifierError, match=r"\(3, 8\) does not give the model's logits"):
        wrap(model, head=(torch.ones(3, 8), None))
    # rows of the user's own on a layer of the user's choice are believed, and it is said
    wrapped = wrap(model, target_layer="stem", head=(torch.ones(3, 6), None))
    assert "does not give the model's own 3 logits" in caplog.text
    assert wrapped.output == "features"
    expected = F.linear(model.stem(pictures()).mean((-2, -1)), torch.ones(3, 6))
    assert torch.equal(wrapped.logits(pictures()), expected)
    with pytest.raises(ClassifierError, match="axes has 9"):
        wrap(model, target_layer="stem", head=(torch.ones(3, 9), None))
    with pytest.raises(ClassifierError, match="has 3 rows, but 2 class names"):
        wrap(model, head=rows, classes=["a", "b"])


def test_a_head_of_its_own_class() -> None:
    """Cosine similarities to prototypes: no layer that can be found, but rows that can be given."""

    class Cosine(Net):
        def forward(self, images: Tensor) -> Tensor:
            pooled = F.normalize(self.pool(self.maps(images)), dim=1)
            return 20 * F.linear(pooled, F.normalize(self.head.weight, dim=1))

    model = shaken(Cosine())
    with pytest.raises(ClassifierError, match="no linear layer was found in Cosine"):
        wrap(model)
    rows = 20 * F.normalize(model.head.weight.detach(), dim=1)
    wrapped = wrap(model, head=(rows, None))
    assert "L2 normalisation" in wrapped.found
    check(wrapped, model, (41, 67))


def test_one_of_several_heads() -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(8, 5)

        def forward(self, images: Tensor) -> Tensor:
            pooled = self.pool(self.maps(images))
            return (self.head(pooled) + self.other(pooled)[:, :3]) / 2

    model = shaken(Two())
    with pytest.raises(ClassifierError, match="no linear layer was found"):
        wrap(model)
    assert len(wrap(model, head="other").classes) == 5
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=4, **SMALL_VIT)
    wrapped = wrap(shaken(distilled), head="head", pool="token")
    assert "token 0" in wrapped.found
    assert wrap(distilled, head="head_dist", pool="token").found.count("token 1") == 1


MAXVIT: Any = ((64, 64), 8, 2, [8, 16], [1, 1], 4, 0.0)


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (of(tv.mobilenet_v3_small), {}, r"classifier\.3 .* not the mean"),
        (lambda: tv.MaxVit(*MAXVIT, num_classes=3), {"example": (64, 64)}, "not the mean"),
        (of_timm("test_vit3"), {}, "not the mean"),  # attention pooling
        (of_timm("test_resnet", global_pool="max"), {}, "not the mean"),
        (of(tv.squeezenet1_1), {}, "SqueezeNet"),
        (of_timm("test_resnet"), {"pool": "token"}, "class token"),
        (lambda: Net(nn.Sequential(nn.BatchNorm1d(8), nn.LayerNorm(8))), {}, "8 channels"),
        (Net, {"head": "head", "classes": ["a", "b"]}, "3 classes, but 2 names"),
        (of_timm("test_vit"), {"pool": "token", "classes": ["a", "b"]}, "5 classes, but 2 names"),
        (Net, {"pool": "max"}, "'max'"),
        (Net, {"target_layer": 3}, "target_layer"),
        (Net, {"example": torch.ones(3, 4)}, r"\(3, 4\)"),
        (lambda: "resnet50", {}, "str"),
    ],
)
def test_what_cannot_be_wrapped(
    make: Callable[[], nn.Module], options: dict[str, Any], named: str
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    with pytest.raises(ClassifierError, match=named):
        wrap(model if isinstance(model, str) else shaken(model), **options)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Net, (8, 24, 40)),
        (lambda: tv.mobilenet_v3_small(num_classes=3), (576, 3, 5)),
        (lambda: tv.MaxVit(*MAXVIT), (16, 8, 8)),
        (of_timm("test_resnet", num_classes=0), (96, 3, 5)),
        (of_timm("test_resnet", num_classes=0, global_pool=""), (96, 3, 5)),
        (of_timm("test_vit", num_classes=0), (64, 6, 10)),
        (of_timm("vit_small_patch16_dinov3", **SMALL_VIT, num_classes=0), (32, 6, 10)),
        (of_timm("swin_tiny_patch4_window7_224", **SMALL_SWIN, strict_img_size=False), (128, 3, 5)),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_the_map_for_a_new_head(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    size = (64, 64) if shape[0] == 16 else (96, 160)
    wrapped = wrap(shaken(make()), classes=["a", "b"], example=size)
    assert wrapped.needs_head
    assert tuple(wrapped.features(pictures(size=size)).shape[1:]) == shape


@pytest.mark.parametrize("options", [{}, {"example": (64, 96)}])
def test_a_model_that_takes_multiples(options: dict[str, Any]) -> None:
    wrapped = wrap(shaken(timm.create_model("test_vit2", num_classes=3)), **options)
    assert (wrapped.fixed_size, wrapped.multiple) == (None, 16)
    assert CAM(wrapped)(pictures(size=(48, 80))).shape == (2, 3, 48, 80)  # scale 0.5: 24 x 40
    with pytest.raises(ClassifierError, match="50, 80"):
        wrapped.features(pictures(size=(50, 80)))


def test_a_model_of_one_size() -> None:
    model = shaken(tv.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=3))
    wrapped = wrap(model, pool="token")
    assert wrapped.fixed_size == (32, 32)
    with pytest.raises(ClassifierError, match=r"32 x 32 pixels, got 64 x 64"):
        wrapped.features(pictures(size=(64, 64)))
    cam = CAM(model, pool="token")
    assert cam(pictures(size=(32, 32))).shape == (2, 3, 32, 32)
    assert cam.settings_.scales == (1.0,)
    with pytest.raises(ClassifierError, match="32 x 32 pixels"):
        CAM(model, "small", pool="token")(pictures(size=(32, 32)))


def test_an_example_gives_size_and_channels() -> None:
    class Picky(Net):
        def forward(self, images: Tensor) -> Tensor:
            if tuple(images.shape[2:]) != (40, 60):
                raise ValueError("40 x 60")
            return super().forward(images)

    model = shaken(Picky())
    with pytest.raises(ClassifierError, match="Give example= images that it takes"):
        wrap(model)
    for example in ((40, 60), torch.zeros(1, 3, 40, 60)):
        wrapped = wrap(model, example=example)
        assert wrapped.fixed_size == (40, 60)
        check(wrapped, model, (40, 60))
    assert wrap(shaken(Net()), example=(40, 60)).fixed_size is None


def in_training(model: nn.Module) -> nn.Module:
    """Half of it trains, a part is frozen, a hook of the user's is on, a gradient is there."""
    model.train()
    model.norm.eval()
    model.stem.requires_grad_(False)
    model.body.register_forward_hook(lambda *a: None)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    return model


def batches(size: tuple[int, int] = (41, 67)) -> list[tuple[Tensor, Tensor]]:
    images = pictures(6, size=size)
    return [(images[:4], torch.eye(3)[[0, 1, 2, 0]]), (images[4:], torch.eye(3)[[1, 2]])]


def test_the_model_is_left_as_it_was() -> None:
    model = in_training(shaken(Net(nn.BatchNorm1d(8))))
    before = state_of(model)
    expected = wrap(model.eval()).features(pictures())
    in_training(model).body._forward_hooks.popitem()
    assert state_of(model) == before
    lpcam = LPCAM(model, ONE_SCALE).fit(batches())
    assert state_of(model) == before
    lpcam(*batches()[0])
    wrapped = wrap(model)
    torch.testing.assert_close(wrapped.features(pictures()), expected)  # no batch statistics
    wrapped.logits(pictures())
    assert state_of(model) == before


class Merging(nn.Module):
    """Changes its weights in ``train``, as some attentions and adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8, 1, 1), 0.1))
        self.modes: list[bool] = []

    def train(self, mode: bool = True) -> Merging:
        self.modes.append(mode)
        self.scale.requires_grad_(False)
        # what is taken off is not quite what was added
        self.scale.data += -0.3 if mode else 0.3
        return super().train(mode)

    def forward(self, features: Tensor) -> Tensor:
        assert not self.training
        return features * self.scale


def test_a_train_of_a_class_is_called() -> None:
    model, merging = shaken(Net()), Merging()
    model.body = nn.Sequential(model.body, merging)
    before = merging.scale.detach().clone()
    wrap(model)
    assert merging.modes[:2] == [False, True]
    assert merging.training
    assert merging.scale.requires_grad
    assert torch.equal(merging.scale, before)


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    class Breaks(Net):
        broken = False

        def maps(self, images: Tensor) -> Tensor:
            if self.broken:
                torch.rand(3)
                raise KeyError("broken")
            return super().maps(images)

    model = in_training(shaken(Breaks()))
    wrapped = wrap(model)
    lpcam = LPCAM(model, ONE_SCALE).fit(batches())
    Breaks.broken = True
    before = state_of(model)
    for call in (
        lambda: wrapped.features(pictures()),
        lambda: wrapped.logits(pictures()),
        lambda: lpcam(pictures()),
    ):
        with pytest.raises(KeyError, match="broken"):
            call()
        assert state_of(model) == before
    with pytest.raises(ClassifierError, match="took no image"):
        wrap(model)
    assert state_of(model) == before


def test_inference_mode_and_autocast_of_the_caller() -> None:
    model = shaken(Net(nn.LayerNorm(8)))
    expected = LPCAM(model, ONE_SCALE).fit(batches())(*batches()[0])
    with torch.inference_mode():
        lpcam = LPCAM(model, ONE_SCALE).fit(batches())
        torch.testing.assert_close(lpcam(*batches()[0]), expected)
        assert torch.is_inference_mode_enabled()
    torch.testing.assert_close(lpcam(*batches()[0]), expected)
    assert not lpcam.prototypes_.vectors().is_inference()
    assert not lpcam.source_.weight.is_inference()
    with torch.autocast("cpu", torch.bfloat16):
        maps = LPCAM(model, ONE_SCALE).fit(batches())(*batches()[0])
        assert torch.is_autocast_enabled("cpu")
        features = wrap(model).features(pictures())
    assert maps.dtype == features.dtype == torch.float32
    assert (maps - expected).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)]
)
def test_models_of_other_precision(dtype: torch.dtype, bound: float) -> None:
    model = shaken(Net(nn.LayerNorm(8)))
    expected = wrap(model).logits(pictures())
    wrapped = wrap(model.to(dtype))
    features = wrapped.features(pictures())
    assert features.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (wrapped.logits(pictures()) - expected).abs().max() < bound * expected.abs().max()


def test_a_model_that_takes_views_of_its_images() -> None:
    class Viewing(Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.view(-1).view(images.shape))

    model = shaken(Viewing())
    assert CAM(model, "small")(pictures()).shape == (2, 3, 70, 90)


def test_a_fingerprint_tells_the_place_and_not_its_description() -> None:
    model = shaken(Net())
    rows: Any = {"head": (model.head.weight, model.head.bias)}
    # of one name, and with maps of one shape
    flipped = wrap(model, target_layer=lambda x: model.body(model.stem(x)).flip(1), **rows)
    body = wrap(model, target_layer=lambda x: model.body(model.stem(x)), **rows)
    named = wrap(model, target_layer="body", **rows)
    prints = [one.fingerprint() for one in (flipped, body, named)]
    assert len(set(prints)) == 3
    again = wrap(model, target_layer=lambda x: model.body(model.stem(x)), **rows)
    assert [again.fingerprint(), named.fingerprint()] == prints[1:]


def test_tf32_is_off_while_heads_are_compared() -> None:
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), without_tf32():
        assert matmul.fp32_precision == "ieee"
        raise ZeroDivisionError
    assert matmul.fp32_precision == before


def test_compiled_and_parallel_models() -> None:
    model = shaken(Net(nn.LayerNorm(8)))
    expected = wrap(model).features(pictures())
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    compiled(pictures())
    parallel = nn.DataParallel(model)
    for other in (compiled, parallel, nn.DataParallel(compiled)):
        assert unwrap(other) is model
        wrapped = wrap(other)
        assert wrapped.model is other
        assert torch.equal(wrapped.features(pictures()), expected)
        assert wrapped.fingerprint() == wrap(model).fingerprint()
    model.compile(backend="eager")
    model(pictures())
    assert torch.equal(wrap(model).features(pictures()), expected)
    assert model._compiled_call_impl is not None


def test_maps_of_a_binary_head() -> None:
    model = shaken(Net(classes=1))
    images, labels = pictures(4, size=(41, 67)), torch.tensor([[1], [0], [1], [1]])
    lpcam = LPCAM(model, ONE_SCALE).fit([(images, labels)])
    maps = lpcam(images, labels)
    assert maps.shape == (4, 1, 41, 67)
    assert not maps[1].any()
    with pytest.raises(ValueError, match=r"shape \(4, 1\), got \(4,\)"):
        lpcam(images, labels[:, 0])
