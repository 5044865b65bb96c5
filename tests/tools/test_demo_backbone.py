"""The demo's backbone: the task it is pre-trained on, the training, and the file that ships."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from lpcam.data import creatures
from lpcam.runtime.errors import ArtefactError, ClassifierError
from lpcam.runtime.files import read_tensors
from tools import demo_backbone as pretraining

SHIPPED = Path(str(resources.files("lpcam").joinpath("assets", "shapes_backbone.safetensors")))


def test_render_is_fixed_by_its_seed() -> None:
    first, labels = pretraining.render(5, seed=1, size=48)
    again, same = pretraining.render(5, seed=1, size=48)
    other, _ = pretraining.render(5, seed=2, size=48)
    assert first.shape == (5, 48, 48, 3)
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert (labels == same).all()
    assert (first != other).any()


def test_labels_answer_every_question() -> None:
    _, labels = pretraining.render(60, seed=0, size=48)
    assert labels.shape == (60, len(pretraining.LABELS))
    for name, columns in pretraining.QUESTIONS.items():
        count = labels[:, columns].sum(1)
        assert count.min() >= 1
        assert count.max() <= (1 if name == "ground" else 2)
    covered = sorted(i for c in pretraining.QUESTIONS.values() for i in range(c.start, c.stop))
    assert covered == list(range(len(pretraining.LABELS)))


@pytest.mark.parametrize("name", sorted(pretraining.SHAPES))
def test_shapes_are_closed_outlines_about_the_unit_disc(name: str) -> None:
    points = pretraining.SHAPES[name]
    assert points.ndim == 2
    assert points.shape[1] == 2
    assert np.isfinite(points).all()
    assert 0.8 < np.linalg.norm(points, axis=1).max() < 1.45


def test_a_seed_gives_the_same_file(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    for name in ("a", "b"):
        pretraining.pretrain(
            tmp_path / name / "x.safetensors", seed=5, steps=2, threads=1, pool=64, validation=8
        )
    assert (tmp_path / "a/x.safetensors").read_bytes() == (
        tmp_path / "b/x.safetensors"
    ).read_bytes()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.safetensors"]
    assert torch.get_num_threads() == threads
    _, metadata = read_tensors(tmp_path / "a/x.safetensors")
    assert (metadata["seed"], metadata["steps"], metadata["threads"]) == (5, 2, 1)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    lines: list[str] = []
    pretraining.pretrain(
        tmp_path / "x.safetensors",
        seed=0,
        steps=16,
        threads=1,
        pool=64,
        validation=8,
        report=lines.append,
    )
    chance = sum(np.log(c.stop - c.start) for c in pretraining.QUESTIONS.values())
    last = float(next(line for line in lines if line.startswith("step 16")).split()[5].rstrip(","))
    assert last < 0.9 * chance  # it can learn 64 images by heart


@pytest.mark.parametrize(
    ("argument", "value"), [("seed", -1), ("steps", 0), ("threads", 0), ("pool", 63)]
)
def test_bad_arguments_are_named(tmp_path: Path, argument: str, value: int) -> None:
    settings = {"seed": 0, "steps": 1, "threads": 1, "pool": 64, argument: value}
    with pytest.raises(ClassifierError, match=f"{argument} {value}.*must be at least"):
        pretraining.pretrain(tmp_path / "x.safetensors", **settings)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match=r"cannot write .*choose another output folder"):
        pretraining.pretrain(
            tmp_path / "file" / "x.safetensors", seed=0, steps=1, threads=1, pool=64
        )


def test_the_shipped_backbone_is_small_and_says_how_it_was_made() -> None:
    assert SHIPPED.stat().st_size <= 2_000_000
    _, metadata = read_tensors(SHIPPED)
    assert metadata["seed"] == pretraining.SEED
    assert metadata["steps"] == pretraining.STEPS
    assert metadata["threads"] == pretraining.THREADS
    assert metadata["timm_name"] == pretraining.BACKBONE
    assert metadata["timm_arguments"] == pretraining.ARGUMENTS
    assert not set(creatures.CLASSES) & set(pretraining.LABELS)


def test_the_shipped_backbone_loads_strictly_and_knows_its_task() -> None:
    model = timm.create_model(
        pretraining.BACKBONE,
        pretrained=False,
        num_classes=0,
        output_stride=pretraining.OUTPUT_STRIDE,
        **pretraining.ARGUMENTS,
    )
    model.load_state_dict(load_file(SHIPPED), strict=True)
    model.eval()
    images, labels = pretraining.render(400, seed=123_456)
    inputs = pretraining.normalise(torch.from_numpy(images))
    with torch.no_grad():
        block = model.forward_features(inputs[:2])
        pooled = torch.cat([model(batch) for batch in inputs.split(50)]).double().numpy()
    assert block.shape[-2:] == (pretraining.SIZE // 8, pretraining.SIZE // 8)
    assert block.min() >= 0  # after a ReLU, as CAM and LPCAM like it
    assert np.isfinite(pooled).all()
    # A ridge regression on 300 images must name the colours and textures of 100 others.
    pooled = np.concatenate(
        [(pooled - pooled.mean(0)) / (pooled.std(0) + 1e-6), np.ones((400, 1))], 1
    )
    gram = pooled[:300].T @ pooled[:300] + 100 * np.eye(pooled.shape[1])
    scores = pooled[300:] @ np.linalg.solve(gram, pooled[:300].T @ labels[:300])
    for name in ("colour", "texture"):
        columns = pretraining.QUESTIONS[name]
        truth = labels[300:, columns]
        reached = pretraining.average_precision(scores[:, columns], truth)
        assert reached > 2 * truth.mean()
