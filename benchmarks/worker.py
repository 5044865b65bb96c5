"""The other end of :func:`benchmarks.measure.in_process`: one function in a process of its own."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path


def main(argv: list[str]) -> None:
    """Run the order (JSON) and write what the function gave to the file it names."""
    order = json.loads(argv[0])
    import torch  # noqa: PLC0415 - after the environment is set

    torch.set_num_threads(order["threads"])
    module, name = order["target"].split(":")
    result = getattr(importlib.import_module(module), name)(**order["arguments"])
    Path(order["answer"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
