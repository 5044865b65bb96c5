"""A data set, weights and recipe values small enough for whole runs in a second."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from lpcam.runtime.distributed import Processes

R = TypeVar("R")
BACKBONE = "test_resnet"
COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 40, 40)}
"""In the order of labels.csv without classes.txt: sorted; mask ids 1, 2, 3."""


def draw_image(
    labels: list[str], size: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A coloured box for each label on grey noise, and its mask."""
    height, width = size
    image = rng.integers(100, 156, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    for place, label in enumerate(labels):
        top = int(rng.integers(4, height - 34))
        left = 4 if place == 0 else width - 30
        box = np.s_[top : top + 28, left : left + 24]
        noise = rng.integers(-15, 16, (28, 24, 3))
        image[box] = np.clip(np.array(COLOURS[label]) + noise, 0, 255)
        mask[box] = list(COLOURS).index(label) + 1
    return image, mask


def draw_folder(root: Path, *, count: int = 12, seed: int = 0, masks: bool = True) -> Path:
    """``count`` images of one or two coloured boxes; i03 shows nothing and has no label."""
    rng = np.random.default_rng(seed)
    names = list(COLOURS)
    (root / "images").mkdir(parents=True)
    if masks:
        (root / "masks").mkdir()
    lines = ["image,labels"]
    for number in range(count):
        labels = [names[number % 3]] + ([names[(number + 1) % 3]] if number % 4 == 0 else [])
        labels = [] if number == 3 else labels
        size = (int(rng.integers(56, 80)), int(rng.integers(64, 80)))
        image, mask = draw_image(labels, size, rng)
        Image.fromarray(image).save(root / "images" / f"i{number:02d}.png")
        if masks:
            Image.fromarray(mask).save(root / "masks" / f"i{number:02d}.png")
        lines.append(f"i{number:02d}.png,{';'.join(labels)}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def write_weights(path: Path) -> Path:
    """Random weights of the tiny backbone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = timm.create_model(BACKBONE, num_classes=0, zero_init_last=False)
    save_file(backbone.state_dict(), path)
    return path


def recipe_values(root: Path, folder: Path, weights: Path) -> dict[str, Any]:
    """A whole recipe on the tiny data set."""
    return {
        "version": 1,
        "name": "tiny",
        "data": {"kind": "folder", "root": str(root)},
        "classifier": {
            "backbone": BACKBONE,
            "output_stride": 16,
            "weights": str(weights),
            "method": "probe",
            "probe": {"long_side": 64, "weight_decay": 1e-5},
        },
        "lpcam": {
            "clusters": 3,
            "scales": [1.0, 0.5],
            "max_features": 60,
            "mu_f": 0.5,
            "context_lower": 0.0,
        },
        "maps": {"dtype": "uint8", "maximum_side": 128},
        "sheet": {"images": 2},
        "report": {"images": 0},
        "run": {"folder": str(folder), "threads": 1, "device": "cpu", "engine": "torch"},
    }


def files(folder: Path) -> dict[str, Path]:
    """All files below a run folder but its lock, and those that tell the time it took."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "use.json", "report.html")
    }


def digests(folder: Path) -> dict[str, str]:
    """Digest of the contents of each of :func:`files`."""
    return {k: hashlib.sha256(p.read_bytes()).hexdigest() for k, p in files(folder).items()}


def times(folder: Path) -> dict[str, int]:
    """When each file below a folder was last written."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


class Patches(nn.Module):
    """Mean RGB and its square of each 16-pixel patch: a backbone whose features are known."""

    def forward(self, images: Tensor) -> Tensor:
        pooled = nn.functional.avg_pool2d(images, 16, ceil_mode=True, count_include_pad=False)
        return torch.cat([pooled, pooled.square()], dim=1)


RED_AND_GREEN = torch.tensor([[9.0, -9.0, -9.0, 0, 0, 0], [-9.0, 9.0, -9.0, 0, 0, 0]])
"""Rows of two classes on :class:`Patches`."""


def picture(red: float, green: float) -> Tensor:
    """A square of one colour on a blue ground, (3, 64, 96)."""
    image = torch.zeros(3, 64, 96)
    image[2] = 0.6
    image[:, 16:48, 16:64] = torch.tensor([red, green, 0.1])[:, None, None]
    return image


def state_of(model: nn.Module) -> list[Any]:
    """All that a pass of a model might leave changed."""
    return [
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad.tolist() for p in model.parameters() if p.grad is not None],
        [dict(vars(m)[k]) for m in model.modules() for k in vars(m) if k.endswith("_hooks")],
        [sorted(vars(module)) for module in model.modules()],
        {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
    ]


class Meeting:
    """Where the threads that stand for the processes of a run exchange their tensors."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=600)
        self.brought: list[Tensor] = [torch.zeros(())] * count

    def sum(self, rank: int, tensor: Tensor) -> Tensor:
        self.brought[rank] = tensor.detach().clone()
        self.barrier.wait()
        total = torch.stack(self.brought).sum(0)
        self.barrier.wait()  # nobody brings the next before all have this one
        return total


class ThreadProcesses(Processes):
    """One process of several that are threads of this one."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        count = meeting.barrier.parties
        super().__init__(rank, count, count)
        self.meeting = meeting

    def wait(self) -> None:
        self.meeting.barrier.wait()

    def sum(self, tensor: Tensor) -> Tensor:
        return self.meeting.sum(self.rank, tensor)

    def replicate(self, module: nn.Module) -> nn.Module:
        """Gradients are averaged as they come, in the same order in every thread."""
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda g: self.meeting.sum(self.rank, g) / self.count)
        return module


def together(count: int, work: Callable[[Processes], R]) -> list[R]:
    """Results of ``work`` in each of ``count`` processes that work at the same time."""
    meeting = Meeting(count)

    def one(rank: int) -> R:
        torch.set_num_threads(1)
        try:
            return work(ThreadProcesses(rank, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def small_run(root: Path, folder: Path) -> dict[str, Any]:
    """What is cut of the stages before the segmenter: sizes and lengths only."""
    return {
        "data.root": str(root),
        "run.folder": str(folder),
        "run.threads": 1,
        "run.device": "cpu",
        "classifier.weights": "random",
        "classifier.finetune.epochs": 1,
        "classifier.finetune.batch_size": 4,
        "classifier.finetune.crop": 64,
        "classifier.finetune.long_side": [48, 64],
        "lpcam.max_features": 40,
        "lpcam.scales": [1.0, 0.5],
        "refine.irn.epochs": 1,
        "refine.irn.batch_size": 4,
        "refine.irn.crop": 80,
        "report.images": 4,
    }


def headed(classes: int = 2) -> nn.Sequential:
    """Patches with a head for red, green, and classes that are nowhere."""
    head = nn.Linear(6, classes)
    with torch.no_grad():
        head.weight.fill_(-99.0)
        head.bias.zero_()
        head.weight[:2] = RED_AND_GREEN
    return nn.Sequential(Patches(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
