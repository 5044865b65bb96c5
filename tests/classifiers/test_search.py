"""What is taken as the feature map: kinds of modules, each with what is no map beside its map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcam import CAM
from lpcam.classifiers.wrapped import wrap
from lpcam.method.settings import LpcamSettings
from lpcam.runtime.errors import ClassifierError

NEW = ["a", "b"]
SMALL = LpcamSettings.from_preset("voc12.official", scales=(0.5, 1.0), flip=False)


class Parts(nn.Module):
    """Two stages of convolutions of stride 4, then what a kind does with their maps."""

    def __init__(self, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, 8, 3, 4, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, width, 3, 4, 1), nn.GELU())
        self.attend = nn.Conv2d(width, 1, 1)
        self.query, self.key = nn.Parameter(torch.randn(4)), nn.Linear(width, 16)
        self.value = nn.Linear(width, 16)
        self.scores, self.aux = nn.Conv1d(width, 5, 1), nn.Conv2d(8, 5, 1)
        self.out = nn.Linear(width, 5)
        self.split = nn.Identity()

    def forward(self, images: Tensor) -> Any:
        return self.finish(self.second(self.first(images)))

    def finish(self, maps: Tensor) -> Any:
        raise NotImplementedError


class AttentionPool(Parts):
    """Keys as heads x tokens x width come last."""

    def finish(self, maps: Tensor) -> Tensor:
        tokens = maps.flatten(2).mT
        value = self.value(tokens)
        key = self.split(self.key(tokens).unflatten(2, (4, 4)).transpose(1, 2))
        weight = (key @ self.query).mean(1).softmax(1)
        return F.gelu((weight[..., None] * value).sum(1)) @ torch.ones(16, 5)


class Gate(Parts):
    """A map of attention of one channel comes last."""

    def finish(self, maps: Tensor) -> Tensor:
        pooled = (maps * self.attend(maps).sigmoid()).amax((2, 3))
        return F.gelu(self.out(pooled))


class Places(Parts):
    """The scores of a Conv1d head over flattened places come last."""

    def finish(self, maps: Tensor) -> Tensor:
        return F.softplus(self.scores(maps.flatten(2)).amax(2))


class Auxiliary(Parts):
    """Scores of an earlier stage come last."""

    def forward(self, images: Tensor) -> Tensor:
        early = self.first(images)
        logits = self.out(self.second(early).amax((2, 3)))
        return F.gelu(logits + 0.1 * self.aux(early).amax((2, 3)))


class Pyramid(Parts):
    """Several maps are given, the shallowest first or last."""

    def forward(self, images: Tensor) -> list[Tensor]:
        early = self.first(images)
        return [early, self.second(early)]


class Turned(Pyramid):
    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], None]:
        early, late = super().forward(images)
        return {"late": F.relu(late), "early": F.relu(early)}, None


class Fixed(Parts):
    """The maps are pooled to a fixed grid for a head of several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d((3, 3))
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 5))

    def finish(self, maps: Tensor) -> Tensor:
        logits: Tensor = self.mlp(self.pool(maps))
        return logits


class TokensFirst(Parts):
    """Tokens come before images, after a class token, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 1, 16))
        self.block = nn.Linear(16, 16)
        self.act = nn.GELU()

    def finish(self, maps: Tensor) -> Tensor:
        tokens = maps.flatten(2).permute(2, 0, 1)
        tokens = torch.cat([self.start.expand(-1, tokens.shape[1], -1), tokens])
        tokens = self.act(self.block(tokens + tokens.mean(0)))
        return F.gelu(self.out(tokens[0]))


class ChannelsLast(Parts):
    def finish(self, maps: Tensor) -> Tensor:
        return F.gelu(self.out(self.split(maps.movedim(1, -1)).amax((1, 2))))


class Wrapper(nn.Module):
    """A user's own module around a backbone, which gives a dictionary."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> dict[str, Any]:
        return {"scores": self.inner(images * 2), "meta": "text"}


def of_timm(name: str, features_only: bool = False) -> Callable[[], nn.Module]:
    options = {"features_only": True} if features_only else {}
    return lambda: timm.create_model(name, **options)


KINDS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int, int]]] = {
    "attention pool": (AttentionPool, "second", (16, 7, 9)),
    "gate": (Gate, "second", (16, 7, 9)),
    "places": (Places, "second", (16, 7, 9)),
    "auxiliary": (Auxiliary, "first", (8, 25, 33)),
    "pyramid": (Pyramid, "the output of the model[1]", (16, 7, 9)),
    "turned pyramid": (Turned, "the output of the model", (16, 7, 9)),
    "fixed grid": (Fixed, "second", (16, 7, 9)),
    "tokens first": (TokensFirst, "act", (16, 7, 9)),
    "channels last": (ChannelsLast, "split", (16, 7, 9)),
    "wrapper": (lambda: Wrapper(Gate()), "inner.second", (16, 7, 9)),
    "timm features": (of_timm("test_resnet", True), "the output of the model[4]", (96, 4, 5)),
    "timm features last": (of_timm("test_vit2", True), "the output of the model[2]", (64, 7, 9)),
    "timm attention pool": (of_timm("test_vit3"), "norm", (96, 10, 10)),
    "timm attention pool of a map": (of_timm("test_byobnet"), "final_conv", (256, 4, 5)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_of_a_kind(kind: str) -> None:
    make, layer, shape = KINDS[kind]
    torch.manual_seed(0)
    wrapped = wrap(make().eval(), classes=NEW)
    assert wrapped.found.startswith(f"map: {layer}")
    assert wrapped.figures.is_local
    assert tuple(wrapped.features(torch.randn(1, 3, *wrapped.probe_size)).shape[1:]) == shape


SHUFFLED = torch.randperm(1000, generator=torch.Generator().manual_seed(0))


def shuffled(maps: Tensor) -> Tensor:
    """The same permutation of the cells in every channel."""
    cells = maps.flatten(2)
    return cells[..., SHUFFLED[SHUFFLED.lt(cells.shape[2])]].view_as(maps)


class Pooled(Parts):
    """A head on the mean of what ``change`` makes of the maps."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def finish(self, maps: Tensor) -> Tensor:
        changed: Tensor = self.split(self.change(maps))
        return self.out(changed.flatten(2).mean(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda maps: maps.mean((2, 3))[..., None, None] * SHUFFLED[:63].view(7, 9), "size"),
        (lambda maps: F.adaptive_avg_pool2d(maps.square(), (7, 9)), "size of the image"),
        (lambda maps: maps * 0 + 1, "same for all images"),
        (lambda maps: maps - maps.mean(0), "other images of a batch"),
        (lambda maps: maps.square().flip(2), "order of the image"),
        (lambda maps: shuffled(maps.square()), "order of the image"),
    ],
    ids=["queries", "fixed grid", "constant", "batch", "flipped", "shuffled"],
)
def test_a_head_on_the_mean_of_no_map(change: Callable[[Tensor], Tensor], why: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ClassifierError, match=f"mean of split.*{why}.*target_layer="):
        wrap(Pooled(change).eval())


def test_an_edge_that_is_left_out_does_not_count() -> None:
    torch.manual_seed(0)
    wrapped = wrap(Pooled(lambda maps: F.pad(maps.square()[..., :-1, :-1], (0, 1, 0, 1))).eval())
    assert wrapped.found.startswith("map: split")
    assert wrapped.figures.is_local


def test_a_layer_that_is_given_is_used_and_its_failure_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    wrapped = wrap(Pooled(lambda maps: maps.flip(2)).eval(), target_layer="split")
    assert "order" in caplog.text
    assert "order" in wrapped.found


def test_a_global_mixer_is_told(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    wrapped = wrap(Pooled(lambda maps: maps + 40 * maps.mean((2, 3), keepdim=True)).eval())
    assert not wrapped.figures.is_local
    assert "mix the whole image" in wrapped.found
    assert "mix the whole image" in caplog.text


def test_nothing_is_taken_from_a_model_without_a_map() -> None:
    class Vectors(nn.Sequential):
        pass

    model = Vectors(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 8), nn.ReLU())
    with pytest.raises(ClassifierError, match=r"0 \(2, 3, 4, 4\).*target_layer="):
        wrap(model, classes=NEW)


def test_latent_vectors_of_a_model_of_one_size_are_not_its_map() -> None:
    class Latents(Parts):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(torch.randn(16, 16))

        def finish(self, maps: Tensor) -> Tensor:
            tokens = (maps + torch.zeros(16, 4, 4)).flatten(2).mT
            read = F.softmax(self.latents @ tokens.mT, 2) @ self.value(tokens)
            return F.gelu(self.out(self.split(read).amax(1)))

    torch.manual_seed(0)
    wrapped = wrap(Latents().eval(), classes=NEW)
    assert wrapped.fixed_size == (64, 64)
    assert wrapped.found.startswith("map: second")


def test_attributes_that_a_pass_replaces_are_restored() -> None:
    class Shrinks(Pooled):
        window = 100

        def forward(self, images: Tensor) -> Any:
            self.window = min(self.window, images.shape[2])
            return super().forward(images)

    torch.manual_seed(0)
    model = Shrinks(lambda maps: maps).eval()
    model.window = 100
    wrap(model).features(torch.randn(1, 3, 70, 90))
    assert model.window == 100


class Rearranged(Parts):
    """Takes pixels of 4 x 4 as channels."""

    def __init__(self) -> None:
        super().__init__(48)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.second(self.first(F.pixel_unshuffle(images, 4)))
        return self.out(maps.mean((2, 3)))  # type: ignore[no-any-return]


class OneSize(Parts):
    """Takes images of one size, which is stated nowhere or in a part's configuration."""

    def __init__(self, side: int, *, states: bool) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(16, side // 16, side // 16))
        if states:
            self.split.config = {"vision_config": {"image_size": side}}

    def finish(self, maps: Tensor) -> Tensor:
        return self.out(self.split(maps + self.positions).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "channels", "size"),
    [
        (Rearranged, 3, None),
        (lambda: OneSize(64, states=False), 3, (64, 64)),
        (lambda: Wrapper(OneSize(80, states=True)), 3, (80, 80)),
        (lambda: Pooled(lambda m: m), 3, None),
    ],
)
def test_sizes_and_channels_are_found_by_trying(
    make: Callable[[], nn.Module], channels: int, size: tuple[int, int] | None
) -> None:
    torch.manual_seed(0)
    wrapped = wrap(make().eval())
    assert (wrapped.channels_in, wrapped.fixed_size) == (channels, size)


def test_a_scale_that_a_model_cannot_take_is_named() -> None:
    class AtLeast(Pooled):
        def forward(self, images: Tensor) -> Any:
            if min(images.shape[2:]) < 60:
                raise ValueError("too small")
            return super().forward(images)

    cam = CAM(AtLeast(lambda maps: maps).eval(), SMALL)
    with pytest.raises(ClassifierError, match=r"at scale 0\.5 \(35 x 45\).*too small.*scales"):
        cam(torch.randn(1, 3, 70, 90))


class Takes(Parts):
    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.forward = forward  # type: ignore[method-assign]
        for name, part in parts.items():
            self.add_module(name, part)


def quantised() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3))), "ScriptModule"),
        (lambda: nn.Sequential(torch.jit.script(nn.Conv2d(3, 8, 3))), "part 0 is a ScriptModule"),
        (lambda: nn.Conv2d(3, 8, 3, device="meta"), "meta"),
        (lambda: torch.export.export(nn.Conv2d(3, 8, 3), (torch.ones(1, 3, 9, 9),)), "exported"),
        (
            lambda: torch.export.export(nn.Conv2d(3, 8, 3), (torch.ones(1, 3, 9, 9),)).module(),
            "exported",
        ),
        (lambda: Takes(lambda flattened_patches: flattened_patches.bad), "packed patches"),
        (lambda: Takes(lambda pixels, grid_thw: pixels, a=nn.Identity()), "packed patches"),
        (
            lambda: Takes(lambda input_ids, pixel_values=None: None.bad, vision_model=nn.ReLU()),
            "text beside images.*vision_model",
        ),
        (lambda: Takes(lambda image, metadata: image), r"2 inputs \(image, metadata\)"),
        (lambda: Takes(lambda image, *, mask: image), r"2 inputs \(image, mask\)"),
        (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.Flatten()), "videos"),
        (quantised, "quantised"),
    ],
)
def test_what_is_no_model_of_images_has_its_own_cause(make: Callable[[], Any], why: str) -> None:
    with pytest.raises(ClassifierError, match=why):
        wrap(make(), classes=NEW)


def test_tokens_of_an_attention_pool_are_no_map() -> None:
    torch.manual_seed(0)
    found = wrap(timm.create_model("resnet50_clip", pretrained=False), classes=["a", "b"])
    assert found.found.startswith("map: final_conv")
    assert found.figures.is_local
