"""Any classifier: what becomes of models of timm, torchvision and transformers.

Each has random weights and is searched as it is and with ``classes=["a", "b"]``; timm's also as
``features_only=True``. A map that is found is measured again, on other noise: a corner of the image
is changed, and the cells under it are compared with those of the opposite corner. Its depth is the
share of the layers with weights that run before it.
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from benchmarks.measure import parser, table
from lpcam.classifiers.tracing import Record, without_grad_and_autocast
from lpcam.classifiers.wrapped import WrappedModel, wrap
from lpcam.runtime.errors import ClassifierError

TIMM = """
vit_tiny_patch16_224 mobileone_s1 mobileone_s0 beit_base_patch16_224 halonet_h1 eca_halonext26ts
poolformerv2_s12 poolformer_s12 cait_xxs24_224 coat_tiny coat_lite_tiny maxvit_pico_rw_256
maxvit_rmlp_pico_rw_256 coatnet_pico_rw_224 coatnext_nano_rw_224 convit_tiny convmixer_768_32
convnext_atto convnextv2_atto cpubone_nano crossvit_tiny_240 crossvit_9_240 cs3darknet_focus_s
cs3darknet_s csatv2 cspnext_tiny davit_tiny deit_tiny_patch16_224 deit_tiny_distilled_patch16_224
densenet121 densenetblur121d dla46x_c dla46_c nf_regnet_b0 nf_seresnet26 dpn48b dpn68
ese_vovnet19b_slim_dw ese_vovnet19b_slim resnet18 resnetblur18 edgenext_xx_small edgenext_x_small
efficientformer_l1 efficientformerv2_s0 efficientformerv2_s1 tinynet_e mnasnet_050 efficientnet_b0
efficientnetv2_rw_t mobilenetv2_035 efficientvim_m1 efficientvit_b0 efficientvit_b1 efficientvit_m0
efficientvit_m1 eva02_tiny_patch14_224 fasternet_t0 fasternet_t1 fastvit_t8 fastvit_t12
mobilenetv3_small_050 mobilenetv3_small_100 mobilenetv4_conv_small lcnet_035 focalnet_tiny_srf
gcvit_xxtiny ghostnet_050 ghostnetv2_100 ghostnetv3_050 gmlp_ti16_224 gmixer_12_224 resmlp_12_224
mixer_s32_224 hardcorenas_a hgnetv2_b0 hgnetv2_b1 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small
hrnet_w18_small_v2 iformer_t iformer_s inception_next_atto inception_resnet_v2 inception_v3
inception_v4 lcnetv2_small legacy_seresnet18 legacy_seresnext26_32x4d legacy_xception levit_128s
levit_128 lowformer_b0 mambaout_femto mambaout_kobe mobilevit_xxs mobilevitv2_050 mvitv2_tiny
naflexvit_base_patch16_gap nest_tiny nextvit_small pit_ti_224 pit_ti_distilled_224 pvt_v2_b0
pvt_v2_b1 qwen3_vit_88m rdnet_tiny regnetx_002 regnety_002 repghostnet_050 repghostnet_058 repvit_m1
repvit_m0_9 repvgg_a0 res2next50 resnest14d resnetv2_18 resnetv2_18d resnetv2_50d_gn resnet50_gn
seresnet50 ecaresnet26t gcresnet33ts rexnet_100 rexnetr_100 samvit_base_patch16_224 selecsls42
sequencer2d_s shvit_s1 shvit_s2 skresnet18 starnet_s050 starnet_s100 swiftformer_xs swiftformer_s
swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224
vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224 test_vit_relpos tiny_vit_5m_224
tnt_s_legacy_patch16_224 tnt_s_patch16_224 tresnet_m tresnet_v2_l twins_svt_small twins_pcpvt_small
vgg11 vgg11_bn visformer_tiny vit_tiny_r_s16_p8_224 vit_small_r26_s32_224 vitamin_small_224
volo_d1_224 xception41 xcit_nano_12_p16_224 xcit_tiny_12_p8_224 resnet50_clip botnet26t_256
lambda_resnet26t sehalonet33ts convformer_s18 vit_base_patch16_siglip_224 vit_base_patch16_clip_224
vit_base_patch16_siglip_gap_224 vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2
vit_small_patch16_dinov3 vit_medium_patch16_gap_240 test_vit test_vit2 test_vit3 test_vit4
pnasnet5large deepseek_vit_412m gemma4_vit_167m mobilenetv5_base
""".split()  # noqa: SIM905 - a list of one name a line would be 180 lines
SHALLOW = ("beit", "deepseek", "gemma4", "naflex", "qwen3", "samvit", "vit_base")
"""Beginnings of timm's names whose models get ``depth=4``."""
TORCHVISION = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_b1 efficientnet_v2_s googlenet
inception_v3 maxvit_t mnasnet0_5 mnasnet0_75 mnasnet1_0 mobilenet_v2 mobilenet_v3_large
mobilenet_v3_small regnet_x_400mf regnet_x_800mf regnet_y_400mf regnet_y_800mf resnet18 resnet34
resnet50 resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 squeezenet1_0 squeezenet1_1 swin_t
swin_v2_t vgg11 vgg11_bn vit_b_32 deeplabv3_mobilenet_v3_large fcn_resnet50
lraspp_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn
ssdlite320_mobilenet_v3_large resnext101_32x8d vgg13 r3d_18 mc3_18
swin3d_t quantized_resnet18 quantized_mobilenet_v2
""".split()  # noqa: SIM905
LEAST_LOCALITY, LEAST_DEPTH, TOLD = 3.0, 0.5, "mix the whole image"
Make = Callable[[], nn.Module]


class Case(NamedTuple):
    library: str
    family: str
    make: Make


class Outcome(NamedTuple):
    word: str  #: "map", "global, told", "refused: why", "WRONG: why" or "ERROR: why"
    told: str


def cases() -> Iterator[Case]:
    """All models, made when they are called."""
    families: set[str] = set()
    for name in TIMM:
        options: dict[str, Any] = {"depth": 4} if name.startswith(SHALLOW) else {}
        family = timm.models.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
        yield Case("timm", family, partial(timm.create_model, name, **options))
        if family not in families:
            yield Case("timm, features_only", family, partial(_features_only, name, options))
        families.add(family)
    for name in TORCHVISION:
        make = partial(torchvision.models.get_model, name)
        if "fpn" in name or "ssd" in name or "_resnet50" in name or "large" in name:
            make = partial(make, weights=None, weights_backbone=None)
        yield Case("torchvision", name.split("_")[0].rstrip("0123456789"), make)
    kinds = (
        ("transformers", modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        ("transformers, backbone", modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES),
    )
    for library, kind in kinds:
        for family, names in kind.items():
            if not family.startswith("timm") and family != "shieldgemma2":
                for name in (names,) if isinstance(names, str) else names:
                    yield Case(library, family, partial(_of_transformers, name))


def _features_only(name: str, options: dict[str, Any]) -> nn.Module:
    model: nn.Module = timm.create_model(name, features_only=True, **options)
    return model


def _of_transformers(name: str) -> nn.Module:
    """A model of its default configuration, with two blocks (in each stage)."""
    kind: Any = getattr(transformers, name)
    default = kind.config_class()
    options: dict[str, Any] = {}
    if isinstance(depths := getattr(default, "depths", None), (list, tuple)):
        options["depths"] = [min(depth, 2) for depth in depths]
    else:
        for key in ("num_hidden_layers", "n_layer", "num_self_attends_per_block"):
            if isinstance(getattr(default, key, None), int):
                options[key] = 2
    if hasattr(default, "width_coefficient"):  # EfficientNet B0: the maps of B7 vanish
        options.update(width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280)
    config = kind.config_class(**options)
    if (vision := getattr(config, "vision_config", None)) is not None:
        vision.num_hidden_layers = 2
    model: nn.Module = kind(config)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # else the maps of deep networks vanish
            nn.init.kaiming_normal_(module.weight)
    return model


def outcome(model: nn.Module, classes: list[str] | None) -> Outcome:
    """What becomes of a model, its map measured again."""
    try:
        wrapped = wrap(model, classes=classes)
    except ClassifierError as error:
        return Outcome(f"refused: {_cause(str(error))}", str(error))
    except Exception as error:
        return Outcome(f"ERROR: {type(error).__name__}", str(error))
    figure, deep = locality(wrapped), depth(wrapped)
    told = f"{wrapped.found}; measured again: locality {figure:.1f}, depth {deep:.2f}"
    if deep < LEAST_DEPTH:
        return Outcome("WRONG: shallow", told)
    if TOLD in wrapped.found:
        return Outcome("global, told", told)
    return Outcome("map" if figure >= LEAST_LOCALITY else "WRONG: not local", told)


CAUSES = {
    "detector": "not one output for each image",
    "no feature map": "no layer behaves like a map",
    "same for all images": "random weights give one map for all images",
    "class token": "class token",
    "text": "takes text beside images",
    "packed patches": "packed patches",
    "videos": "videos",
    "quantised": "quantised",
    "no logits": "no logits",
    "no linear layer": "no single linear layer gives the logits",
    "not the mean": "the head does not read a mean",
    "took no image": "takes no such images",
}
"""Parts of messages and their causes, the first that fits"""


def _cause(message: str) -> str:
    return next((cause for part, cause in CAUSES.items() if part in message), message[:40])


def locality(wrapped: WrappedModel) -> float:
    """The median ratio of changes under a corner and opposite, on images of other noise."""
    found = _locality(wrapped, wrapped.probe_size)
    if found < LEAST_LOCALITY and wrapped.fixed_size is None:
        height, width = wrapped.probe_size
        found = _locality(wrapped, (2 * height, 2 * width))
    return found


def _locality(wrapped: WrappedModel, size: tuple[int, int]) -> float:
    ratios = []
    generator = torch.Generator().manual_seed(100)
    plain, other = torch.randn(2, wrapped.channels_in, *size, generator=generator)
    corners = [(down, right) for down in (False, True) for right in (False, True)]
    images = plain.repeat(5, 1, 1, 1)
    for image, (down, right) in zip(images[1:], corners, strict=True):
        rows, columns = _corner(size, down=down, right=right)
        image[:, rows, columns] = other[:, rows, columns]
    features = wrapped.features(images)
    for changed, (down, right) in zip(features[1:], corners, strict=True):
        change = (changed - features[0]).norm(dim=0)
        own = _mean(change, down=down, right=right)
        far = _mean(change, down=not down, right=not right)
        ratios.append(own / far if far else (math.inf if own else 0.0))
    return statistics.median(ratios)


def _corner(size: Sequence[int], *, down: bool, right: bool) -> tuple[slice, slice]:
    height, width = (max(1, side // 4) for side in size)
    return (
        slice(size[0] - height, None) if down else slice(height),
        slice(size[1] - width, None) if right else slice(width),
    )


def _mean(change: Tensor, *, down: bool, right: bool) -> float:
    return float(change[_corner(change.shape, down=down, right=right)].mean())


def depth(wrapped: WrappedModel) -> float:
    """The share of the calls of layers with weights that end before the layer of the map."""
    model, layer = wrapped.core, wrapped.map_layer
    images = torch.randn(2, wrapped.channels_in, *wrapped.probe_size)
    with without_grad_and_autocast(torch.device("cpu")):
        calls = Record.of(model, images).calls
    ends = [
        index
        for index, call in enumerate(calls)
        if call.module is layer.layer and call.number == layer.number
    ]
    weighted = [
        index
        for index, call in enumerate(calls)
        if call.part == 0 and any(p.ndim > 1 for p in call.module.parameters(recurse=False))
    ]
    return sum(index <= ends[0] for index in weighted) / max(1, len(weighted))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of outcomes by family."""
    options = parser("any_classifier", __doc__).parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(options.threads[0])
    found = list(results(list(cases())[:: 40 if options.quick else 1]))
    print(report(found))
    return int(any(word.startswith(("WRONG", "ERROR")) for _, *words in found for word in words))


def results(chosen: Sequence[Case]) -> Iterator[tuple[Case, str, str]]:
    """Each case that can be made, with what becomes of it without and with ``classes``."""
    for case in chosen:
        torch.manual_seed(0)
        started = time.perf_counter()
        try:
            model = case.make().eval()
        except Exception as error:  # a family without features_only, or a missing package
            print("not made", case, error, file=sys.stderr)
            continue
        new = outcome(model, ["a", "b"])
        own = Outcome("", "") if "," in case.library else outcome(model, None)
        seconds = f"{time.perf_counter() - started:.1f} s"
        print(seconds, case, own, new, sep="\n    ", file=sys.stderr, flush=True)
        yield case, own.word, new.word


def report(found: Sequence[tuple[Case, str, str]]) -> str:
    """The table of outcomes, with the families of each."""
    families: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    totals: Counter[str] = Counter()
    for case, *words in found:
        families[(case.library, *words)][case.family] += 1
        totals.update(word.split(":")[0] for word in words if word)
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (timm, torchvision, transformers))
    rows = []
    for key, names in sorted(families.items()):
        listed = (f"{name} ({n})" if n > 1 else name for name, n in sorted(names.items()))
        rows.append([*key, ", ".join(listed)])
    counts = ", ".join(f"{count} {word}" for word, count in totals.items())
    head = ["library", "its own head", "with `classes=[...]`", "families (models)"]
    return (
        f"## Any classifier\n\n{len(found)} models of {versions}: {counts}.\n\n{table(head, rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
