"""Foreign pickles of arrays: read as their makers wrote them, and nothing of a file is ever run."""

from __future__ import annotations

import collections
import io
import os
import pickle
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lpcam import arrays
from lpcam.arrays import dictionary_file, read_pickled_arrays
from lpcam.errors import ArtefactError


def read(data: bytes) -> Any:
    return read_pickled_arrays(data, what="map file")


def saved(value: Any, **kwargs: Any) -> bytes:
    """As np.save writes it."""
    buffer = io.BytesIO()
    whole = np.empty((), dtype=object)
    whole[()] = value
    np.save(buffer, whole, allow_pickle=True, **kwargs)
    return buffer.getvalue()


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        expected = (expected.float() if expected.dtype == torch.bfloat16 else expected).numpy()
    if isinstance(expected, np.ndarray):
        native = expected.dtype.newbyteorder("=")
        return (
            type(found) is np.ndarray
            and found.dtype == native
            and found.shape == expected.shape
            and found.tobytes() == expected.astype(native).tobytes()
        )
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[k], expected[k]) for k in found)
    if isinstance(expected, list | tuple):
        return (
            type(found) is type(expected)
            and len(found) == len(expected)
            and all(same(a, b) for a, b in zip(found, expected, strict=True))
        )
    return bool(type(found) is type(expected) and found == expected)


RANDOM = np.random.default_rng(0)
PLAIN: dict[str, Any] = {
    "keys": np.array([3, 14]),
    "cam": RANDOM.random((2, 3, 4), dtype=np.float32),
    "text": "Kühe 牛",
    "numbers": [0, -1, 255, 256, 70_000, 2**62, -(2**63), 1.5, -0.0, True, False, None],
    "nested": {1: (), 2: (1,), 3: (1, 2), 4: (1, 2, 3), 5: (1, 2, 3, 4), 6: [], 7: {}},
    "pixels": np.arange(6, dtype=np.uint8).reshape(2, 3),
    "none": np.zeros((0, 5, 6), np.float32),
}
DTYPES = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")


# What is read


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_gives_what_was_written(protocol: int) -> None:
    assert same(read(pickle.dumps(PLAIN, protocol)), PLAIN)


def test_a_file_of_numpy_is_read_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, PLAIN, allow_pickle=True)  # type: ignore[arg-type]
    assert same(read_pickled_arrays(path, what="map file"), PLAIN)
    path.write_bytes(b"damaged")
    with pytest.raises(ArtefactError, match=r"^map file .*a.npy is refused: it is damaged"):
        read_pickled_arrays(path, what="map file")
    with pytest.raises(ArtefactError, match=r"cannot read .*b.npy"):
        read_pickled_arrays(tmp_path / "b.npy", what="map file")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("name", DTYPES)
def test_arrays_of_every_kind(name: str, order: str, protocol: int) -> None:
    whole = (np.arange(24).reshape(2, 3, 4) % 5).astype(order + name)
    for array in (
        whole,
        np.asfortranarray(whole),
        whole.transpose(1, 0, 2),
        whole[:, ::2],
        whole[0, 0, :1],
        whole[:0],
    ):
        assert same(read(pickle.dumps(array, protocol)), array)
    assert same(read(pickle.dumps(whole[0, 0, 0], protocol)), whole[0, 0, 0].item())


@pytest.mark.parametrize("name", DTYPES)
def test_plain_npy_files_are_read_without_a_pickle(name: str) -> None:
    for array in (np.arange(12).reshape(3, 4).astype(name), np.ones((), name), np.ones(3, name)):
        for one in (array, np.asfortranarray(array)):
            buffer = io.BytesIO()
            np.save(buffer, one, allow_pickle=False)
            assert same(read(buffer.getvalue()), one)


def test_numpy_1_and_python_2_name_things_otherwise() -> None:
    new = pickle.dumps(PLAIN, 2)
    old = new.replace(b"numpy._core", b"numpy.core")
    assert old != new and same(read(old), PLAIN)
    # Python 2 wrote bytes as text
    data = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b"
        b"\x87Rq\x03(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff"
        b"\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00\x00\xc0tb."
    )
    assert pickle.loads(data, encoding="latin1").tolist() == [1, -2]
    assert same(read(data), np.array([1, -2], np.float32))


@pytest.mark.parametrize("protocol", range(6))
def test_torch_tensors_become_arrays(protocol: int) -> None:
    whole = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "whole": whole,
        "turned": whole.permute(2, 0, 1),
        "part": whole[1:, ::2, 1:],
        "wide": whole[0, 0, :2].expand(3, 2),
        "none": torch.zeros(0, 3, 5),
        "scalar": torch.tensor(2.5),
        "weight": torch.nn.Parameter(whole.clone()),
        "half": whole.half(),
        "brain": torch.tensor([1.0, -2.5, 3e38, float("inf")]).bfloat16(),
        "one": torch.tensor(-2.5).bfloat16(),
        "truth": torch.tensor([True, False]),
        "true": torch.tensor(True),
        "twice": whole,
    }
    for dtype in ("float64", "int64", "int32", "int16", "int8", "uint8"):
        tensors[dtype] = whole.to(getattr(torch, dtype))
    expected = {name: tensor.detach() for name, tensor in tensors.items()}
    assert same(read(pickle.dumps(tensors, protocol)), expected)
    assert same(read(saved(collections.OrderedDict(tensors))), expected)


class Call:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def storage(change: Callable[[bytes], bytes]) -> bytes:
    """A pickled tensor of two floats whose inner file is changed."""
    inner = Call(torch.storage._load_from_bytes, change(_inner()))
    return pickle.dumps(Call(torch._utils._rebuild_tensor_v2, inner, 0, (2,), (1,), False, None), 4)


def _inner() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.save(torch.ones(2).storage(), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def test_tensors_of_a_graphics_card_need_none() -> None:
    def moved(inner: bytes) -> bytes:
        assert b"X\x03\x00\x00\x00cpu" in inner
        return inner.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")

    assert same(read(storage(lambda inner: inner)), np.ones(2, np.float32))
    assert same(read(storage(moved)), np.ones(2, np.float32))


def test_arrays_of_objects_are_their_elements() -> None:
    rows = np.empty(2, dtype=object)
    rows[:] = [{"a": 1}, np.arange(2)]
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=True)
    assert same(read(buffer.getvalue()), [{"a": 1}, np.arange(2)])
    with pytest.raises(ArtefactError, match="an array of objects has more than one side"):
        read(pickle.dumps(rows.reshape(2, 1)))


def test_what_is_shared_is_read_at_every_place() -> None:
    array, row = np.arange(3), ["cow"]
    found = read(pickle.dumps({"a": array, "b": array, "c": row, "d": row}))
    assert same(found, {"a": array, "b": array, "c": row, "d": row})
    assert found["c"] is not found["d"]


# What runs code


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def reduce_of(function: Any, protocol: int = 2) -> Callable[[str], bytes]:
    def payload(command: str) -> bytes:
        code = f"__import__('os').system({command!r})"
        argument = command if function is os.system else code
        return pickle.dumps({"a": Call(function, argument)}, protocol)

    return payload


PAYLOADS: dict[str, Callable[[str], bytes]] = {
    "os.system, protocol 0": reduce_of(os.system, 0),
    "os.system, protocol 2": reduce_of(os.system, 2),
    "os.system, protocol 4": reduce_of(os.system, 4),
    "eval": reduce_of(eval),
    "exec, protocol 5": reduce_of(exec, 5),
    "inst": lambda command: b"(S" + repr(command).encode() + b"\nios\nsystem\n.",
    "obj": lambda command: b"(cos\nsystem\n" + text(command) + b"o.",
    "subprocess": lambda command: (
        b"csubprocess\ncall\n(](" + text("sh") + text("-c") + text(command) + b"etR."
    ),
    "newobj": lambda command: (
        b"cbuiltins\nmap\n(cos\nsystem\n](" + text(command) + b"et\x81cbuiltins\nlist\nq\x000"
        b"cbuiltins\nmap\n(cos\nsystem\n](" + text(command) + b"et\x81q\x010h\x00h\x01\x85R."
    ),
    "newobj_ex": lambda command: (
        b"\x80\x04cbuiltins\nlist\n(cbuiltins\nmap\n(cos\nsystem\n]("
        + text(command)
        + b"et}\x92tR."
    ),
    "getattr": lambda command: (
        b"cbuiltins\ngetattr\ncos\nsystem\n"
        + text("__call__")
        + b"\x86R"
        + text(command)
        + b"\x85R."
    ),
    "a dotted name": lambda command: (
        b"\x80\x04" + text("os") + text("system.__call__") + b"\x93" + text(command) + b"\x85R."
    ),
    "build": lambda command: (
        b"ctypes\nSimpleNamespace\n)R}"
        + text("__setstate__")
        + b"cos\nsystem\nsb"
        + text(command)
        + b"b."
    ),
    "an allowed name first": lambda command: (
        b"ccollections\nOrderedDict\n)R0" + b"cos\nsystem\n" + text(command) + b"\x85R."
    ),
    "a name from the memo": lambda command: b"cos\nsystem\nq\x050h\x05" + text(command) + b"\x85R.",
    "within an array of numpy": lambda command: saved(Call(os.system, command)),
    "within a tensor": lambda command: storage(lambda _: reduce_of(os.system)(command)),
    "in a tensor's header": lambda command: storage(
        lambda inner: inner[:20] + reduce_of(os.system)(command) + inner[20:]
    ),
    "in a tensor's keys": lambda command: storage(
        lambda inner: inner[: inner.rindex(b"\x80\x02")] + reduce_of(os.system)(command)
    ),
}


def run_for_real(payload: bytes) -> None:
    """What a program does that trusts the file."""
    buffer = io.BytesIO(payload)
    try:
        if payload.startswith(b"\x93NUMPY"):
            np.load(buffer, allow_pickle=True)
        else:
            with warnings.catch_warnings(action="ignore"):
                pickle.load(buffer)
    except Exception:
        pass  # after the harm is done


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_file_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    payload = PAYLOADS[name](f"echo > {marker}")
    with pytest.raises(ArtefactError, match=r"map file is refused: (it|a tensor)"):
        read(payload)
    assert not marker.exists()
    run_for_real(payload)
    assert marker.exists(), "the payload is a dud, so its refusal proves nothing"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"cos\nsystem\n.", r"it asks for 'os.system', which is neither .* nothing was run"),
        (b"\x80\x04" + text("os") + text("system") + b"\x93.", r"asks for 'os.system'"),
        (b"(ios\nsystem\n.", r"it asks for 'os.system'"),
        (b"cnumpy\nload\n.", r"asks for 'numpy.load'"),
        (b"cnumpy\nfromfile\n.", r"asks for 'numpy.fromfile'"),
        (b"ctorch\nload\n.", r"asks for 'torch.load'"),
        (b"clpcam.arrays\nread_bytes\n.", r"asks for 'lpcam.arrays.read_bytes'"),
        (b"cargparse\nNamespace\n)\x81.", r"asks for 'argparse.Namespace'"),
        (b"\x80\x04cnumpy\nndarray\n)\x81.", "instruction NEWOBJ, which"),
        (b"\x80\x04cnumpy\nndarray\n)}\x92.", "instruction NEWOBJ_EX, which"),
        (b"(cnumpy\nndarray\no.", "instruction OBJ, which"),
        (b"\x82\x01.", "instruction EXT1, which"),
        (b"\x83\x01\x01.", "instruction EXT2, which"),
        (b"\x84\x01\x01\x01\x01.", "instruction EXT4, which"),
        (b"Pname\n.", "instruction PERSID, which"),
        (b"X\x01\x00\x00\x00aQ.", "refers to something outside of the file"),
        (b"\x80\x05\x97.", "instruction NEXT_BUFFER, which"),
        (b"\x80\x04\x8f(K\x01\x90.", "instruction EMPTY_SET, which"),
        (b"\x80\x04(K\x01\x91.", "instruction FROZENSET, which"),
        (b"\x80\x06N.", "pickle protocol 6"),
        (b"cnumpy\nndarray\n.", "holds something that is no number"),
        (b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4\x89\x88tR.", "holds something that is no number"),
        (b"C\x01a.", "holds something that is no number"),
        (b"X\x01\x00\x00\x00a)R.", "calls what is no function"),
        (b"cnumpy\nndarray\n]R.", "calls what is no function"),
        (b"}}b.", "sets the state of what is no array"),
        (b"cnumpy\nndarray\n}b.", "sets the state of what is no array"),
        (b"}))s.", "has a key of type 'tuple'"),
        (b"}G?\xf0\x00\x00\x00\x00\x00\x00Ns.", "has a key of type 'float'"),
        (b"}cnumpy\nndarray\nNs.", "has a key of type 'Name'"),
        (b")Na.", "appends to what is no list"),
        (b"]NNs.", "sets items of what is no dictionary"),
        (b"(]N.", "ends in the middle"),
        (b"NN.", "ends in the middle"),
        (b"N.N", "1 bytes follow its end"),
        (b"", "exhausted before seeing STOP"),
        (b"h\x07.", "refused: it is damaged"),
        (b"0.", "refused: it is damaged"),
        (b"t.", "refused: it is damaged"),
        (b"PK\x03\x04" + bytes(90), r"is an archive \(.npz or of torch.save\)"),
        (b"cnumpy\ndtype\n(X\x01\x00\x00\x00UtR.", "arrays of dtype 'U' are not read"),
        (b"cnumpy\ndtype\n(]tR.", "arrays of dtype of type list are not read"),
        (b"c_codecs\nencode\n(NX\x06\x00\x00\x00latin1tR.", "encodes what are no bytes"),
        (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.", "encodes what are no"),
        (b"ctorch\nFloatStorage\n.", "asks for 'torch.FloatStorage'"),
    ],
)
def test_other_instructions_are_refused_by_name(program: bytes, message: str) -> None:
    with pytest.raises(ArtefactError, match=message):
        read(program)


F4 = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4\x89\x88tR"
NEW = b"cnumpy.core.multiarray\n_reconstruct\n(tR"


@pytest.mark.parametrize(
    "program",
    [
        # a dtype of objects over bytes: NumPy would take the eight bytes for a pointer
        NEW + b"(K\x01K\x01\x85cnumpy\ndtype\n(X\x02\x00\x00\x00O8tR\x89C\x0812345678tb.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00O8tRC\x0812345678tR.",
        NEW + b"(K\x01K\x02\x85" + F4 + b"\x89C\x041234tb.",
        NEW + b"(K\x01J\xff\xff\xff\xff\x85" + F4 + b"\x89C\x041234tb.",
        NEW + b"(K\x01(K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01t" + F4 + b"\x89C\x041234tb.",
        NEW + b"(K\x01K\x01" + F4 + b"\x89C\x041234tb.",
        NEW + b"(K\x01K\x01\x85" + F4 + b"\x89C\x0312\x33tb.",
        NEW + b"(K\x01K\x01\x85" + F4 + b"\x89]tb.",
        NEW + b"(K\x01K\x01\x85N\x89C\x041234tb.",
        NEW + b"(tb.",
        NEW + b"Nb.",
        F4 + b"X\x02\x00\x00\x00abb.",
        F4 + b"(K\x03X\x01\x00\x00\x00!tb.",
        b"cnumpy\nndarray\nK\x05\x85R.",
        b"cnumpy._core.numeric\n_frombuffer\n(C\x041234" + F4 + b"K\x02\x85X\x01\x00\x00\x00CtR.",
        b"cnumpy._core.numeric\n_frombuffer\n(C\x041234" + F4 + b"K\x01\x85X\x01\x00\x00\x00AtR.",
        b"cnumpy._core.numeric\n_frombuffer\n(C\x041234"
        + F4
        + b"K\x01\x85X\x01\x00\x00\x00KK\x01K\x00\x86tR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00K\x01\x85K\x01\x85\x89NtR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n((C\x041234X\x02\x00\x00\x00f4tK\x00))\x89NtR.",
        b"ctorch._utils\n_rebuild_parameter\n(N\x89NtR.",
        b"ctorch.storage\n_load_from_bytes\n(NtR.",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (9,), }\n1234",
        b"\x93NUMPY\x01\x00v\x00{'descr': __import__('os'), 'fortran_order': False, }\n1234",
        b"\x93NUMPY",
    ],
)
def test_forged_arrays_are_refused(program: bytes) -> None:
    with pytest.raises(ArtefactError, match="map file is refused"):
        read(program)


@pytest.mark.parametrize(
    "numbers",
    [
        (2, (1,), (1,)),
        (0, (3,), (1,)),
        (0, (2,), (2,)),
        (-1, (1,), (1,)),
        (0, (-2,), (1,)),
        (1, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (2**50,), (0,)),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(numbers: tuple[Any, ...]) -> None:
    inner = Call(torch.storage._load_from_bytes, _inner())
    whole = Call(torch._utils._rebuild_tensor_v2, inner, *numbers, False, None)
    with pytest.raises(ArtefactError, match="map file is refused"):
        read(pickle.dumps(whole, 4))


@pytest.mark.parametrize(
    "change",
    [
        lambda inner: inner[:-1],
        lambda inner: inner + b"\x00",
        lambda inner: inner[:-16] + b"\x03" + inner[-15:],
        lambda inner: inner.replace(b"K\x02N", b"K\x03N"),
        lambda inner: inner.replace(b"FloatStorage", b"OtherStorage"),
        lambda inner: inner.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        lambda inner: b"PK\x03\x04" + inner,
        lambda inner: b"",
    ],
)
def test_a_damaged_tensor_is_refused(change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ArtefactError, match="map file is refused"):
        read(storage(change))


@pytest.mark.filterwarnings("ignore")
def test_other_tensors_are_refused() -> None:
    for tensor in (
        torch.eye(2).to_sparse(),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, dtype=torch.complex64).conj(),
    ):
        with pytest.raises(ArtefactError, match="map file is refused"):
            read(pickle.dumps(tensor))


# What claims too much


@contextmanager
def cheap(seconds: float, megabytes: float) -> Iterator[None]:
    tracemalloc.start()
    started = time.process_time()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < seconds
    assert peak < megabytes * 2**20, f"{peak / 2**20:.0f} MiB"


def long_text(size: int) -> bytes:
    return text("a" * size)


BOMBS: dict[str, bytes] = {
    # lists of lists of lists, each ten times the one before
    "laughs": b"]q\x00" + b"".join(b"](" + b"h\x00" * 10 + b"eq\x00" for _ in range(12)) + b".",
    "laughing tuples": b")q\x00" + b"".join(b"h\x00" * 3 + b"\x87q\x00" for _ in range(40)) + b".",
    "a hash of tuples": b"})q\x00" + b"0h\x00h\x00\x86q\x00" * 60 + b"Ns.",
    "a name of tuples": b"cnumpy\ndtype\n)q\x00" + b"0h\x00h\x00\x86q\x00" * 60 + b"\x85R.",
    "deep": b"]" * 50_000 + b"a" * 49_999 + b".",
    "deep tuples": b")" + b"\x85" * 50_000 + b".",
    "itself": b"]q\x00h\x00a.",
    "itself by way of a dictionary": b"}q\x00K\x01h\x00s.",
    "bytes over and over": long_text(100_000)
    + b"q\x000"
    + text("latin1")
    + b"q\x010c_codecs\nencode\nq\x02"
    + b"h\x02h\x00h\x01\x86R" * 20_000
    + b".",
    "arrays over and over": b"B\x00\x10\x00\x00"
    + bytes(4096)
    + b"q\x000]("
    + (NEW + b"(K\x01M\x00\x04\x85" + F4 + b"\x89h\x00tb") * 60
    + b"e.",
    "a long integer": b"\x8b\x00\x00\x10\x00" + b"\x7f" * 2**20 + b".",
    "a long decimal": b"L" + b"9" * 100_000 + b"L\n.",
    "a length": b"\x8e" + (1 << 50).to_bytes(8, "little") + b"a.",
    "a place": b"Nr\xff\xff\xff\x7f0h\x01.",
    "a wide tensor": pickle.dumps(torch.ones(1).expand(10**5, 10**6)),
    "wide tensors": pickle.dumps(
        [torch.ones(1).expand(2000)] * 2 + [torch.ones(1).expand(900)] * 9
    ),
    "a shape without values": NEW
    + b"(K\x01(K\x00"
    + b"\x8a\x06\xff\xff\xff\xff\xff\x7f" * 3
    + b"t"
    + F4
    + b"\x89C\x00tb.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_cannot_claim_much_time_or_memory(name: str) -> None:
    with cheap(60, 20 + 60 * len(BOMBS[name]) / 2**20), pytest.raises(ArtefactError) as caught:
        read(BOMBS[name])
    assert len(str(caught.value)) < 400


def test_instructions_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MOST_INSTRUCTIONS", 1000)
    assert read(b"](" + b"N" * 900 + b"e.") == [None] * 900
    with pytest.raises(ArtefactError, match="more than 1,000 instructions"):
        read(b"](" + b"N" * 1000 + b"e.")
    with pytest.raises(ArtefactError, match="holds its entries more than 1,000 times over"):
        read(b"](" + b"N" * 90 + b"eq\x000](" + b"h\x00" * 20 + b"e.")


def test_labels_of_a_large_data_set_are_within_the_bounds() -> None:
    labels = {f"COCO_train2014_{n:012d}": np.ones(80, np.float32) for n in range(3000)}
    assert len(read(saved(labels))) == 3000
    instructions = sum(1 for _ in arrays.pickletools.genops(saved(labels)[128:]))
    assert 123_287 / 3000 * instructions < arrays.MOST_INSTRUCTIONS / 1.5


# Fuzzing

_watching = False
_seen: list[str] = []
_HARMLESS = ("object.", "sys._getframe", "gc.", "builtins.id", "code.__new__", "cpython.", "time.")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and not event.startswith(_HARMLESS):
        _seen.append(f"{event} {arguments!r:.200}")


sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What the interpreter reports meanwhile: imports, files, programs, code that is compiled."""
    global _watching  # noqa: PLW0603 - a hook of the interpreter cannot be taken away
    _seen.clear()
    _watching = True
    try:
        yield _seen
    finally:
        _watching = False


def test_the_watch_sees_what_a_pickle_runs() -> None:
    with watched() as seen:
        pickle.loads(reduce_of(eval)("true"))
    assert any(event.startswith("pickle.find_class") for event in seen)
    assert any(event.startswith("os.system") for event in seen)


FRAGMENTS = [
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"cbuiltins\ngetattr\n",
    b"cnumpy\nndarray\n",
    b"ctorch.storage\n_load_from_bytes\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"c_codecs\nencode\n",
    b"ios\nsystem\n",
    text("os") + text("system") + b"\x93",
    text("echo") + b"\x85R",
    F4,
    NEW,
    *(
        bytes([code])
        for code in b"(.0122RbQostu]a}e)\x81\x82\x85\x86\x87\x88\x89\x8f\x90\x92\x93\x94\x97"
    ),
    *(bytes([code, place]) for code in b"hqK" for place in range(4)),
    b"J\xff\xff\xff\xff",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
]


def mutated(random: np.random.Generator, sources: list[bytes]) -> bytes:
    data = bytearray(sources[random.integers(len(sources))])
    for _ in range(random.integers(1, 5)):
        place = int(random.integers(len(data) + 1))
        kind = random.integers(6)
        if kind == 0 and place < len(data):
            data[place] = int(random.integers(256))
        elif kind == 1 and place < len(data):
            data[place] ^= 1 << int(random.integers(8))
        elif kind == 2:
            data[place:place] = FRAGMENTS[random.integers(len(FRAGMENTS))]
        elif kind == 3:
            del data[place : place + int(random.integers(1, 12))]
        elif kind == 4:
            other = sources[random.integers(len(sources))]
            start = int(random.integers(len(other)))
            data[place:place] = other[start : start + int(random.integers(1, 60))]
        else:
            end = place + int(random.integers(1, 30))
            data[place:place] = data[place:end]
    return bytes(data)


@pytest.mark.filterwarnings("ignore:invalid escape")
def test_no_mutated_file_runs_anything_or_raises_anything_else(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    command = f"echo > {marker}"
    good = [pickle.dumps({k: PLAIN[k] for k in ("keys", "cam", "nested")}, p) for p in range(6)]
    good += [saved({"keys": torch.tensor([1]), "cam": np.ones((1, 2, 2), np.float32)})]
    good += [storage(lambda inner: inner), pickle.dumps({"a": torch.ones(2)}, 2)]
    sources = good + [payload(command) for payload in PAYLOADS.values()]
    random = np.random.default_rng(0)
    # lengths kept, so that the reader of tensors is reached
    nested = [storage(lambda inner: mutated(random, [inner])) for _ in range(3_000)]
    for data in good:
        read(data)  # Python imports the codecs of text when it first needs them
    outcomes = collections.Counter[str]()
    with watched() as seen:
        for _ in range(12_000):
            data = mutated(random, sources)
            try:
                read(data)
                outcomes["read"] += 1
            except ArtefactError as error:
                kind = next(
                    (k for k in ("asks for", "instruction", "damaged") if k in str(error)), ""
                )
                outcomes[kind] += 1
        for data in nested:
            try:
                read(data)
                outcomes["nested"] += 1
            except ArtefactError:
                outcomes["nested, refused"] += 1
        for _ in range(4_000):  # programs of fragments alone
            picks = random.integers(len(FRAGMENTS), size=random.integers(1, 12))
            try:
                read(b"".join(FRAGMENTS[pick] for pick in picks) + b".")
            except ArtefactError:
                pass
    assert seen == []
    assert not marker.exists()
    # the mutations reach every way out
    assert min(outcomes.values()) > 50 and len(outcomes) >= 6


# The way out


def test_a_written_dictionary_is_read_by_numpy_as_its_own() -> None:
    values = {
        "keys": np.array([3, 14]),
        "cam": np.arange(12, dtype=np.float32).reshape(2, 3, 2),
        "turned": np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3)),
        "none": np.zeros((0, 5), np.float16),
        "truth": np.array([True, False]),
        "Kuh": np.array(7, np.uint8),
    }
    data = dictionary_file(values)
    with warnings.catch_warnings(action="error"):
        found = np.load(io.BytesIO(data), allow_pickle=True).item()
    assert same(found, values) and same(read(data), values)
    assert all(array.flags.writeable for array in found.values())
    assert dictionary_file(values) == data
    numbered = {0: np.ones(2), 254: np.zeros(1), 2007000032: np.ones(1)}
    data = dictionary_file(numbered)
    assert same(np.load(io.BytesIO(data), allow_pickle=True).item(), numbered)
    assert same(read(data), numbered)
    assert read(dictionary_file({})) == np.load(io.BytesIO(dictionary_file({})), allow_pickle=True)
    assert data.index(b"\n") % 64 == 63, "numpy aligns the values at 64 bytes"


def test_only_numbers_are_written() -> None:
    with pytest.raises(ValueError, match="dtype object are not written"):
        dictionary_file({"a": np.array([None])})
