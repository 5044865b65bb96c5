"""``lpcam doctor``: what a bug report needs, without paths, also where packages are broken."""

from __future__ import annotations

import re
import sys
from importlib import metadata

import pytest

from lpcam.cli import doctor as module
from lpcam.cli.main import main
from lpcam.runtime.versions import __version__


def test_it_describes_this_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"lpcam {__version__}," in out
    for name in ("torch", "torchvision", "timm", "numpy"):
        assert f"{name} {metadata.version(name)}" in out
    assert re.search(r"^engines: torch.*; auto is \w+$", out, re.MULTILINE)
    assert re.search(r"^threads: \d+ of \d+, memory: [\d.]+ GiB$", out, re.MULTILINE)
    assert not re.search(r"(^|[\s('\"])[/~]\w", out)  # no path


def test_packages_that_do_not_fit_are_problems(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("onnx", "safetensors"):
            raise metadata.PackageNotFoundError(name)
        return {"torch": "1.13.0", "openvino": "2020.1"}.get(name) or real(name)

    monkeypatch.setattr(module.metadata, "version", version)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert any("torch is 1.13.0" in line and "'torch<2.16,>=2.11'" in line for line in problems)
    assert any("safetensors is missing" in line for line in problems)
    assert any("openvino is 2020.1" in line for line in problems)
    assert not any("onnx is" in line for line in problems)  # an extra may be absent
    (extras,) = re.findall(r"^extras: (.*) \| absent: (.*)$", out, re.MULTILINE)
    assert "onnx" in extras[1].split(", ")
    assert "onnx" not in extras[0].split(", ")


def test_packages_that_cannot_be_imported_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> object:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist (/home/me/lib/ops.so)")
        return sys.modules[name]

    monkeypatch.setattr(module, "import_module", broken)
    assert main(["doctor"]) == 0
    (line,) = re.findall(r"^problem: (.*nms.*)$", capsys.readouterr().out, re.MULTILINE)
    assert "home" not in line
