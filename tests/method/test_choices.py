"""Choices about prototypes: hand-made prototypes whose vectors are known."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lpcam.method.choices import Choice, format_choices, parse_choices, settled
from lpcam.method.prototypes import Centers, Prototypes, purities, worst
from lpcam.runtime.errors import ArtefactError, PrototypeError

HEAD, LEG, GRASS, SKY, RAIL = torch.eye(5)


def side(rows: list[torch.Tensor], kept: list[bool], scores: list[float]) -> Centers:
    """Centres of one class and of a second that has only the first of them."""
    centers = torch.stack(rows)
    sizes = torch.arange(1, len(rows) + 1)
    second = torch.zeros_like(centers)
    second[0] = 3 * centers[0]
    keep = torch.tensor([kept, [True] + [False] * (len(rows) - 1)])
    sizes = torch.stack([sizes, torch.tensor([5] + [0] * (len(rows) - 1))])
    z = torch.tensor([scores, [0.5] + [float("nan")] * (len(rows) - 1)])
    return Centers(torch.stack([centers, second]), z, sizes, keep)


@pytest.fixture
def prototypes() -> Prototypes:
    """A cow with three foreground prototypes and a rejected one, and two of the context."""
    foreground = side([HEAD, 2 * LEG, GRASS, SKY], [True, True, True, False], [1.0, 0.9, 1.0, 0.2])
    context = side([SKY, RAIL, GRASS, HEAD], [True, False, False, False], [0.2, 0.0, 0.1, 0.95])
    return Prototypes(("cow", "dog"), foreground, context, "f" * 32, {})


def vector(prototypes: Prototypes) -> list[float]:
    return [round(value, 4) for value in prototypes.vectors()[0].tolist()]


def test_drop_move_and_keep(prototypes: Prototypes) -> None:
    before = prototypes.vectors()
    assert vector(prototypes) == [0.3333, 0.3333, 0.3333, -1, 0]
    assert vector(prototypes.drop("cow", [2])) == [0.5, 0.5, 0, -1, 0]
    assert vector(prototypes.move("cow", [2])) == [0.5, 0.5, -0.5, -0.5, 0]
    assert vector(prototypes.keep("cow", [1], "context")) == [0.5, 0.5, -0.3333, -0.3333, -0.3333]
    assert vector(prototypes.drop("cow", [0], "context")) == [0.5, 0.5, -0.5, 0, -0.5]
    without = prototypes.vectors(with_context=False)[0]
    assert without.tolist() == [0.5, 0.5, 0, 0, 0]
    assert torch.equal(prototypes.vectors()[1], before[1])  # the dog is as it was
    assert vector(prototypes.keep("cow", [2, 3])) == [0.25, 0.25, 0.25, 0.25, -1]


def test_names(prototypes: Prototypes) -> None:
    before = prototypes.vectors()
    prototypes.name("cow", [0, 2], "head").name("cow", [1], "leg")
    assert prototypes.names == {"cow": {0: "head", 1: "leg", 2: "head"}}
    prototypes.name("cow", [2], "")
    assert prototypes.names == {"cow": {0: "head", 1: "leg"}}
    assert torch.equal(prototypes.vectors(), before)


def test_the_last_foreground_prototype_stays(prototypes: Prototypes) -> None:
    for last in range(3):
        others = [number for number in range(3) if number != last]
        made = prototypes.with_choices([Choice("cow", "foreground", n, "drop") for n in others])
        expected = prototypes.foreground.centers[0, last] / (2 if last == 1 else 1) - SKY
        assert torch.equal(made.vectors()[0], expected)
        for action in ("drop", "context"):
            with pytest.raises(PrototypeError, match="cow"):
                made.with_choices([Choice("cow", "foreground", last, action)])  # type: ignore[arg-type]
    assert prototypes.choices == ()  # they are others, and a refusal changes nothing
    with pytest.raises(PrototypeError, match="dog"):
        prototypes.drop("dog", [0])
    assert prototypes.choices == ()


def test_order_of_choices(prototypes: Prototypes) -> None:
    choices = [
        Choice("cow", "foreground", 2, "context", by="negatives", reason="fires without it"),
        Choice("cow", "foreground", 2, name="udder"),
        Choice("cow", "foreground", 3, "drop", by="negatives"),
        Choice("cow", "foreground", 3, "keep", reason="it is the horn"),
        Choice("cow", "context", 0, "drop"),
    ]
    made = {
        vector_of: None
        for order in itertools.permutations(choices)
        for vector_of in [tuple(vector(prototypes.with_choices(order)))]
    }
    assert list(made) == [(0.3333, 0.3333, -1, 0.3333, 0)]
    # one after the other, and all again
    step = prototypes
    for choice in choices:
        step = step.with_choices([choice])
    assert vector(step) == list(*made)
    assert step.with_choices(choices).choices == step.choices == settled(choices)
    kept = next(one for one in step.choices if one.index == 3)
    assert (kept.by, kept.reason) == ("person", "it is the horn")
    moved = next(one for one in step.choices if one.name == "udder")
    assert (moved.action, moved.by) == ("context", "negatives")
    later = step.with_choices([Choice("cow", "foreground", 3, "drop", by="negatives")])
    assert vector(later) == vector(step)  # a person's choice wins
    assert vector(step.with_choices([Choice("cow", "foreground", 3, "drop")])) != vector(step)


def test_wrong_choices(prototypes: Prototypes) -> None:
    with pytest.raises(PrototypeError, match="horse"):
        prototypes.drop("horse", [0])
    with pytest.raises(PrototypeError, match="foreground prototype 4"):
        prototypes.drop("cow", [4])
    with pytest.raises(PrototypeError, match="foreground prototype 1 of 'dog'"):
        prototypes.keep("dog", [1])
    with pytest.raises(PrototypeError, match="context prototype already"):
        prototypes.with_choices([Choice("cow", "context", 0, "context")])


def test_weights(prototypes: Prototypes) -> None:
    by_size = replace(prototypes, weights="size")
    assert vector(by_size) == [round(1 / 6, 4), round(2 / 6, 4), 0.5, -1, 0]
    by_score = replace(prototypes, weights="score")
    assert vector(by_score) == [0.3448, 0.3103, 0.3448, -1, 0]
    given = prototypes.with_choices([Choice("cow", "foreground", 0, weight=2.0)])
    assert vector(given) == [0.5, 0.25, 0.25, -1, 0]
    # a moved one counts as surely in the context as it did in the foreground
    moved = by_score.with_choices([Choice("cow", "foreground", 2, "context")])
    assert vector(moved) == [0.5263, 0.4737, -0.5556, -0.4444, 0]
    assert torch.equal(by_size.vectors()[1], prototypes.vectors()[1])


def test_save_and_load(tmp_path: Path, prototypes: Prototypes) -> None:
    path, digest = tmp_path / "p.safetensors", prototypes.digest
    prototypes.save(path)
    plain = path.read_bytes()
    assert b"choices" not in plain
    assert Prototypes.load(path).digest == digest
    prototypes.move("cow", [2]).name("cow", [0], "head")
    prototypes.weights = "size"
    prototypes.save(path)
    found = Prototypes.load(path)
    assert torch.equal(found.vectors(), prototypes.vectors())
    assert (found.choices, found.names, found.weights, found.digest) == (
        prototypes.choices,
        {"cow": {0: "head"}},
        "size",
        digest,
    )


def test_a_file_of_choices(tmp_path: Path, prototypes: Prototypes) -> None:
    choices = (
        Choice("cow", "foreground", 2, "context", by="negatives", reason="fires: without it"),
        Choice("cow", "foreground", 0, name="Kopf & Hals – 头", weight=0.5),
    )
    path = tmp_path / "prototypes.yaml"
    path.write_text(format_choices(choices, prototypes.digest), "utf-8")
    assert parse_choices(path.read_bytes(), prototypes.digest, "x") == choices
    made = prototypes.chosen(path, "equal")
    assert made.choices == settled(choices)
    assert prototypes.choices == ()
    other = Prototypes(
        prototypes.classes, prototypes.context, prototypes.foreground, prototypes.fingerprint, {}
    )
    with pytest.raises(PrototypeError, match="fitted anew"):
        other.chosen(path, "equal")
    with pytest.raises(ArtefactError, match="missing"):
        prototypes.chosen(tmp_path / "missing.yaml", "equal")


CENTRE = "class: cow, side: foreground, index: 1"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "x.yaml"),
        ("- 1", "x.yaml"),
        ("{format: 2}", "format"),
        ("{format: 1, prototypes: a, wrong: 3}", "wrong"),
        ("{prototypes: a, choices: 3}", "x.yaml"),
        ("{prototypes: a, choices: [3]}", "3"),
        ("{prototypes: a, choices: [{class: cow, side: foreground, index: -1}]}", "index"),
        ("{prototypes: a, choices: [{class: cow, side: front, index: 1}]}", "front"),
        (f"{{prototypes: a, choices: [{{{CENTRE}, action: go}}]}}", "go"),
        (f"{{prototypes: a, choices: [{{{CENTRE}, colour: red}}]}}", "colour"),
        (f"{{prototypes: a, choices: [{{{CENTRE}, weight: 0}}]}}", "weight"),
        ("!!python/object/apply:os.system ['true']", "x.yaml"),
    ],
)
def test_a_damaged_file_of_choices(text: str, named: str) -> None:
    with pytest.raises(PrototypeError, match=named):
        parse_choices(text, "0", "x.yaml")


def test_the_top_third_counts_alike(prototypes: Prototypes) -> None:
    """One of three counts, and where three of four are kept, one too; the first of equals."""
    assert vector(replace(prototypes, weights="top")) == [1, 0, 0, -1, 0]
    four = replace(prototypes.with_choices([Choice("cow", "foreground", 3, "keep")]), weights="top")
    assert vector(four) == [1, 0, 0, -1, 0]
    # in the context the sureness is 1 - z: RAIL (0.0) before GRASS (0.1) and SKY (0.2)
    context = [Choice("cow", "context", number, "keep") for number in (1, 2)]
    assert vector(replace(prototypes.with_choices(context), weights="top")) == [1, 0, 0, 0, -1]


def test_ridge_weights_give_what_of_cam_prototypes_can_give(
    prototypes: Prototypes, tmp_path: Path
) -> None:
    """Orthogonal prototypes: a_i is w_i / (1 + 0.01 K), for K of them; RAIL is none."""
    target = torch.tensor([[3.0, 0.0, 0.0, -4.0, 0.0], [0.0, 0.0, 2.0, 0.0, 0.0]])
    made = prototypes.chosen(None, "ridge", target)
    four = 1 + 0.01 * 4  # HEAD, LEG, GRASS and, of the context, SKY
    assert vector(made) == [round(0.6 / four, 4), 0, 0, round(-0.8 / four, 4), 0]
    without = made.vectors(with_context=False)[0].tolist()
    assert without == pytest.approx([0.6 / 1.03, 0, 0, 0, 0])
    assert made.vectors()[1].tolist() == [0] * 5  # a dog's rows have nothing of its prototypes
    # a factor of a choice makes the penalty of its prototype smaller
    heavy = made.with_choices([Choice("cow", "foreground", 0, weight=4.0)])
    assert vector(heavy)[0] == round(0.6 * 4 / (4 + 0.04), 4)
    none = made.with_choices([Choice("cow", "context", 0, "drop")])
    assert vector(none) == [round(0.6 / 1.03, 4), 0, 0, 0, 0]
    made.save(tmp_path / "ridge.safetensors")
    assert torch.equal(Prototypes.load(tmp_path / "ridge.safetensors").vectors(), made.vectors())
    assert made.chosen(None, "equal").target is None


def test_rows_of_other_similarities(prototypes: Prototypes) -> None:
    """Raw means: 2 LEG counts twice as much; the bias is the mean square of lengths."""
    assert prototypes.vectors(similarity="dot")[0].tolist() == pytest.approx(
        [1 / 3, 2 / 3, 1 / 3, -1, 0, 0]
    )
    assert prototypes.vectors(similarity="euclidean")[0].tolist() == pytest.approx(
        [2 / 3, 4 / 3, 2 / 3, -2, 0, -(2 - 1)]
    )
    alone = prototypes.vectors(similarity="euclidean", with_context=False, classes=[0])
    assert alone[0].tolist() == pytest.approx([2 / 3, 4 / 3, 2 / 3, 0, 0, -2])
    assert not alone[1].any()
    by_size = replace(prototypes, weights="size").vectors(similarity="dot")[0].tolist()
    assert by_size == pytest.approx([1 / 6, 4 / 6, 3 / 6, -1, 0, 0])


def numbers(choices: list[Choice], class_name: str = "cow") -> list[int]:
    assert all((one.side, one.action) == ("foreground", "drop") for one in choices)
    return [one.index for one in choices if one.class_name == class_name]


def test_the_worst_prototypes(prototypes: Prototypes) -> None:
    fire = torch.tensor([[0.5, 0.1, float("nan"), 0.9], [0.3] + 3 * [float("nan")]])
    measured = replace(prototypes, foreground=replace(prototypes.foreground, fire=fire))
    assert numbers(worst(prototypes, "score", 1 / 3)) == [1]
    assert numbers(worst(prototypes, "size", 1 / 3)) == [0]
    assert numbers(worst(measured, "fire_rate", 1 / 3)) == [0]  # the rejected one is not asked
    assert numbers(worst(measured, "fire_rate", 1.0)) == [0, 1]  # one stays, unmeasured ones first
    assert worst(prototypes, "size", 0.1) == []
    assert numbers(worst(prototypes, "size", 1.0), "dog") == []
    assert vector(prototypes.with_choices(worst(prototypes, "size", 2 / 3))) == [0, 0, 1, -1, 0]
    with pytest.raises(PrototypeError, match="fire"):
        worst(prototypes, "fire_rate", 0.5)


def test_purity_by_hand(prototypes: Prototypes, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two clusters each: HEAD is as near to the cow's head as to the dog's, 1 against 5."""
    monkeypatch.setattr("lpcam.method.prototypes.NEAREST", 3)
    # cow's head 1, dog's head 5, cow's rejected context of HEAD 4
    head = purities(prototypes, 0)[0]
    assert float(head) == pytest.approx((1 + 4) / (1 + 4 + 5))
    monkeypatch.setattr("lpcam.method.prototypes.NEAREST", 1)
    assert purities(prototypes, 0)[1:3].tolist() == [1.0, 1.0]
    monkeypatch.setattr("lpcam.method.prototypes.NEAREST", 3)
    assert numbers(worst(prototypes, "purity", 1 / 3)) == [0]
