"""Fits with and without cached features make the same prototypes, and the table is printed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import fit_against_training, photographs


def test_cached_and_passing_fits_agree() -> None:
    with photographs.photographs(None, "train", 4, 100) as found:
        model = photographs.classifier(None, found.classes, quick=True)
        settings = fit_against_training.settings(quick=True)
        cached = [fit_against_training.features_of(model, item) for item in found.items]
        first = fit_against_training.fit(model, found.items, settings, cached)
        second = fit_against_training.fit(model, found.items, settings)
    assert torch.equal(first.foreground.centers, second.foreground.centers)
    assert torch.equal(first.vectors(), second.vectors())


def test_training_takes_the_steps_that_are_measured() -> None:
    with photographs.photographs(None, "train", 3, 100) as found:
        model = photographs.classifier(None, found.classes, quick=True)
        before = model.weight.clone()
        training = fit_against_training.training_settings(quick=True)
        history = fit_against_training.train(model, found.items, 2, training)
    assert len(history) == 1
    assert history[0]["validation_map"] is None
    assert not torch.equal(before, model.weight)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit_against_training.main(["--quick", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "| 1 | fit, from cached features |" in printed
    assert "| 1 | fit, with its backbone passes |" in printed
    assert "| 1 | fine-tuning, extrapolated from 1 of" in printed
