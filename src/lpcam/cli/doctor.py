"""Command that describes the installation for a bug report: doctor."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import get_args

from packaging.requirements import Requirement

from lpcam.cli.command import Invocation, Lazy, command, resources
from lpcam.runtime.versions import __version__

engines = Lazy("lpcam.classifiers.engines")
IMPORTED = ("torch", "torchvision", "timm")  #: Packages that can be installed and yet not work.


@command("doctor", group="about")
def doctor(call: Invocation) -> int:
    """Describe the installation for a bug report, without paths, and what is wrong with it."""
    extras = metadata.metadata("lpcam").get_all("Provides-Extra") or []
    there = [extra for extra in extras if all(version for _, version in _required("lpcam", extra))]
    checked = [pair for name in ("lpcam", *IMPORTED) for pair in _required(name)]
    checked += [pair for extra in extras for pair in _required("lpcam", extra) if pair[1]]
    problems = [
        f"{one.name} is {version or 'missing'}; pip install '{one.name}{one.specifier}'"
        for one, version in checked
        if not (version and one.specifier.contains(version, prereleases=True))
    ]
    print(f"lpcam {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("packages:", ", ".join(f"{one.name} {version}" for one, version in _required("lpcam")))
    print("extras:", ", ".join(there), "| absent:", ", ".join(e for e in extras if e not in there))
    try:
        torch, *_ = map(import_module, IMPORTED)
        device = resources.choose_device("auto")
        gpu = f" ({torch.cuda.get_device_name()})" if device.type == "cuda" else ""
        bfloat16 = "native" if resources.native_bfloat16() else "slow"
        print(f"device: {device}{gpu}, torch {torch.__version__}, bfloat16 on the CPU: {bfloat16}")
        if device.type == "cpu" and torch.version.cuda and Path("/proc", "driver/nvidia").exists():
            problems.append("there is an NVIDIA driver, but torch cannot use it; update the driver")
        found = [e for e in get_args(engines.Engine) if engines.EXTRAS.get(e) in (None, *there)]
        print(f"engines: {', '.join(found)}; auto is {engines.choose_engine('auto', device)}")
        memory = resources.available_memory() / 2**30
        print(f"threads: {call.threads} of {os.cpu_count()}, memory: {memory:.1f} GiB")
    except Exception as error:  # a broken package may raise anything
        text = re.sub(r"\S*[/\\]\S*", "...", f"{type(error).__name__}: {error}")
        problems.append(f"torch, torchvision and timm cannot be used together ({text})")
    for text in dict.fromkeys(problems):
        print(f"problem: {text}")
    return 0


def _required(package: str, extra: str = "") -> Iterator[tuple[Requirement, str]]:
    """What a package requires, or what its extra does; each with the installed version, or ""."""
    for one in map(Requirement, (_version(package) and metadata.requires(package)) or ()):
        if one.marker.evaluate({"extra": extra}) if one.marker else not extra:
            yield one, _version(one.name)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
