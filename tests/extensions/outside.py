"""A distribution outside this package, which registers one method through an entry point."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"


def install(folder: Path, module: str, group: str, name: str, attribute: str) -> dict[str, str]:
    """Install a module of this folder as a distribution of its own.

    Args:
        folder: where it is installed.
        module: name of the file beside this one, such as ``toy_format``.
        group: of the entry point, such as ``lpcam.formats``.
        name: under which the method is registered.
        attribute: of the module.

    Returns:
        environment of a process in which it is installed.
    """
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{attribute}\n")
    shutil.copy(Path(__file__).with_name(f"{module}.py"), folder)
    paths = (str(folder), str(SOURCE), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def lpcam(environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    """Run a command of lpcam in an environment of `install`."""
    return subprocess.run(
        [sys.executable, "-m", "lpcam", *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
