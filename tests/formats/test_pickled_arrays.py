"""Foreign pickles of arrays: every way of writing them is read, and no code of a file runs."""

from __future__ import annotations

import collections
import io
import os
import pickle
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import PAYLOADS, Call, reduce_of, text
from torch import Tensor

from lpcam.formats.pickled_arrays import dictionary_file, read_pickled_arrays
from lpcam.runtime.errors import ArtefactError


def read(data: bytes) -> Any:
    return read_pickled_arrays(data, what="map file")


def saved(value: Any) -> bytes:
    """As np.save writes it."""
    buffer = io.BytesIO()
    whole = np.empty((), dtype=object)
    whole[()] = value
    np.save(buffer, whole, allow_pickle=True)
    return buffer.getvalue()


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        expected = (expected.float() if expected.dtype == torch.bfloat16 else expected).numpy()
    if isinstance(expected, np.ndarray):
        native = expected.astype(expected.dtype.newbyteorder("="))
        return type(found) is np.ndarray and (
            (found.dtype, found.shape, found.tobytes())
            == (native.dtype, native.shape, native.tobytes())
        )
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[k], expected[k]) for k in found)
    if type(found) is not type(expected):
        return False
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


PLAIN: dict[str, Any] = {
    "keys": np.array([3, 14]),
    "cam": np.random.default_rng(0).random((2, 3, 4), dtype=np.float32),
    "text": "Kühe 牛",
    "numbers": [0, -1, 255, 256, 70_000, 2**62, -(2**63), 1.5, -0.0, True, False, None],
    "nested": {1: (), 2: (1,), 3: (1, 2), 4: (1, 2, 3), 5: (1, 2, 3, 4), 6: [], 7: {}},
    "none": np.zeros((0, 5, 6), np.float32),
}
DTYPES = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_gives_what_was_written(protocol: int) -> None:
    assert same(read(pickle.dumps(PLAIN, protocol)), PLAIN)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("name", DTYPES)
def test_arrays_of_every_kind(name: str, order: str, protocol: int) -> None:
    whole = (np.arange(24).reshape(2, 3, 4) % 5).astype(order + name)
    turned = np.asfortranarray(whole), whole.transpose(1, 0, 2)
    for array in (whole, *turned, whole[:, ::2], whole[0, 0, :1], whole[:0], np.ones((), name)):
        assert same(read(pickle.dumps(array, protocol)), array)
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        assert same(read(buffer.getvalue()), array)
    assert same(read(pickle.dumps(whole[0, 0, 0], protocol)), whole[0, 0, 0].item())


def test_files_of_numpy_1_and_python_2_are_read() -> None:
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
        "truth": torch.tensor([True, False]),
        "twice": whole,
    }
    for dtype in ("float64", "int64", "int32", "int16", "int8", "uint8"):
        tensors[dtype] = whole.to(getattr(torch, dtype))
    expected = {name: tensor.detach() for name, tensor in tensors.items()}
    assert same(read(pickle.dumps(tensors, protocol)), expected)
    assert same(read(saved(collections.OrderedDict(tensors))), expected)


def storage(
    change: Callable[[bytes], bytes] = lambda inner: inner, view: tuple[Any, ...] = (0, (2,), (1,))
) -> bytes:
    """A pickled tensor of two floats whose inner file is changed."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.save(torch.ones(2).storage(), buffer, _use_new_zipfile_serialization=False)  # type: ignore[no-untyped-call]
    inner = Call(torch.storage._load_from_bytes, change(buffer.getvalue()))
    return pickle.dumps(Call(torch._utils._rebuild_tensor_v2, inner, *view, False, None), 4)


def test_tensors_of_a_gpu_are_read_without_one() -> None:
    cpu = b"X\x03\x00\x00\x00cpu"
    moved = storage(lambda inner: inner.replace(cpu, b"X\x06\x00\x00\x00cuda:0"))
    assert same(read(moved), np.ones(2, np.float32))


def test_shared_values_are_read_at_every_place() -> None:
    array, row = np.arange(3), ["cow"]
    found = read(pickle.dumps({"a": array, "b": array, "c": row, "d": row}))
    assert same(found, {"a": array, "b": array, "c": row, "d": row})
    assert found["c"] is not found["d"]


CANARIES: dict[str, Callable[[str], bytes]] = {
    **PAYLOADS,
    "within an array of objects": lambda command: saved(Call(os.system, command)),
    "within a tensor": lambda command: storage(lambda _: reduce_of(os.system)(command)),
    "in a tensor's header": lambda command: storage(
        lambda inner: inner[:20] + reduce_of(os.system)(command) + inner[20:]
    ),
}


@pytest.mark.parametrize("name", CANARIES)
def test_a_file_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    payload = CANARIES[name](f"echo > {marker}")
    with pytest.raises(ArtefactError, match="refused"):
        read(payload)
    assert not marker.exists()
    try:
        pickle.loads(payload[payload.index(b"\n") + 1 :] if payload[0] == 0x93 else payload)
    except Exception:
        pass  # after the command has run
    assert marker.exists(), "the payload does not work, so its refusal proves nothing"


F4 = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4\x89\x88tR"
O8 = b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8tR"
NEW = b"cnumpy.core.multiarray\n_reconstruct\n(tR"
BUFFER = b"cnumpy._core.numeric\n_frombuffer\n(C\x041234"


@pytest.mark.parametrize(
    "program",
    [
        # names
        b"cos\nsystem\n.",
        b"\x80\x04" + text("os") + text("system.__call__") + b"\x93.",
        b"cnumpy\nload\n.",
        # instructions
        b"(ios\nsystem\n.",
        b"(cnumpy\nndarray\no.",
        b"\x80\x04cnumpy\nndarray\n)\x81.",
        b"\x80\x04cnumpy\nndarray\n)}\x92.",
        b"\x82\x01.",
        b"Pname\n.",
        b"X\x01\x00\x00\x00aQ.",
        b"\x80\x05\x97.",
        b"\x80\x04\x8f(K\x01\x90.",
        b"\x80\x06N.",
        # state of something other than an array
        b"}}b.",
        b"cnumpy\nndarray\n}b.",
        b"ctorch._utils\n_rebuild_parameter\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",
        # keys
        b"}))s.",
        b"}cnumpy\nndarray\nNs.",
        b"ccollections\nOrderedDict\n]))\x86a\x85R.",
        # calls of something else, with other arguments, and results that are no arrays
        b"X\x01\x00\x00\x00a)R.",
        b"cbuiltins\nbytes\n\x8a\x06\x00\x00\x00\x00\x00\x7f\x85R.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.",
        b"cnumpy\nndarray\n.",
        b"cnumpy\nndarray\nK\x05\x85R.",
        b"C\x01a.",
        # damage
        b"",
        b"N.N",
        b"h\x07.",
        b"0.",
        b"PK\x03\x04" + bytes(90),
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (9,), }\n1234",
        b"\x93NUMPY\x01\x00v\x00{'descr': __import__('os'), 'fortran_order': False, }\n1234",
        # a dtype of objects over bytes: NumPy would take the eight bytes for a pointer
        NEW + b"(K\x01K\x01\x85" + O8 + b"\x89C\x0812345678tb.",
        b"cnumpy.core.multiarray\nscalar\n(" + O8 + b"C\x0812345678tR.",
        b"cnumpy\ndtype\n(" + O8 + b"tR.",
        # arrays that do not fit their bytes
        NEW + b"(K\x01K\x02\x85" + F4 + b"\x89C\x041234tb.",
        NEW + b"(K\x01J\xff\xff\xff\xff\x85" + F4 + b"\x89C\x041234tb.",
        NEW + b"(K\x01(" + b"K\x01" * 9 + b"t" + F4 + b"\x89C\x041234tb.",
        NEW + b"(K\x01K\x01\x85" + F4 + b"\x89]tb.",
        NEW + b"(K\x01K\x01\x85N\x89C\x041234tb.",
        NEW + b"Nb.",
        F4 + b"(K\x03X\x01\x00\x00\x00!tb.",
        BUFFER + F4 + b"K\x02\x85X\x01\x00\x00\x00CtR.",
        BUFFER + F4 + b"K\x01\x85X\x01\x00\x00\x00KK\x01K\x00\x86tR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00K\x01\x85K\x01\x85\x89NtR.",
        b"ctorch.storage\n_load_from_bytes\n(NtR.",
    ],
)
def test_programs_that_are_not_arrays_are_refused(program: bytes) -> None:
    with pytest.raises(ArtefactError, match="map file is refused"):
        read(program)


@pytest.mark.parametrize(
    "view",
    [
        (2, (1,), (1,)),
        (0, (3,), (1,)),
        (0, (2,), (2,)),
        (-1, (1,), (1,)),
        (0, (-2,), (1,)),
        (1, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (2**50,), (0,)),
        (0, (2**40,), (2**40,)),  # 2^80 elements away, which is 0 in 64 bits
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(view: tuple[Any, ...]) -> None:
    with pytest.raises(ArtefactError, match="map file is refused"):
        read(storage(view=view))


def test_a_damaged_tensor_is_refused() -> None:
    changes: list[Callable[[bytes], bytes]] = [
        lambda inner: inner[:-1],
        lambda inner: inner + b"\x00",
        lambda inner: inner.replace(b"K\x02N", b"K\x03N"),
        lambda inner: inner.replace(b"FloatStorage", b"OtherStorage"),
        lambda inner: b"",
    ]
    for change in changes:
        with pytest.raises(ArtefactError, match="map file is refused"):
            read(storage(change))


@pytest.mark.filterwarnings("ignore")
def test_other_arrays_and_tensors_are_refused() -> None:
    for value in (
        np.array([{}, {}]),
        np.array(["text"]),
        np.ones(1, complex),
        torch.eye(2).to_sparse(),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        torch.ones(2, dtype=torch.complex64).conj(),
    ):
        with pytest.raises(ArtefactError, match="map file is refused"):
            read(pickle.dumps(value))


BOMBS: dict[str, bytes] = {
    # lists of lists of lists, each ten times the one before
    "laughs": b"]q\x00" + b"".join(b"](" + b"h\x00" * 10 + b"eq\x00" for _ in range(12)) + b".",
    "a hash of tuples": b"})q\x00" + b"0h\x00h\x00\x86q\x00" * 60 + b"Ns.",
    "a name of tuples": b"cnumpy\ndtype\n)q\x00" + b"0h\x00h\x00\x86q\x00" * 60 + b"\x85R.",
    "deep": b"]" * 50_000 + b"a" * 49_999 + b".",
    "deep tuples": b")" + b"\x85" * 50_000 + b".",
    "itself": b"}q\x00K\x01h\x00s.",
    "bytes over and over": text("a" * 100_000)
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
    "a long key": b"}\x8b\x00\x00\x10\x00" + b"\x7f" * 2**20 + b"Ns.",
    "a long decimal": b"L" + b"9" * 100_000 + b"L\n.",
    "a length": b"\x8e" + (1 << 50).to_bytes(8, "little") + b"a.",
    "a bytearray": b"\x80\x05\x96" + (1 << 36).to_bytes(8, "little") + b"a.",
    "a place": b"Nr\xff\xff\xff\x7f0h\x01.",
    "a wide tensor": pickle.dumps(torch.ones(1).expand(10**5, 10**6)),
    "a shape without values": NEW
    + b"(K\x01(K\x00"
    + b"\x8a\x06\xff\xff\xff\xff\xff\x7f" * 3
    + b"t"
    + F4
    + b"\x89C\x00tb.",
    "a header": b"\x93NUMPY\x01\x00F\x00"
    + b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999,), }".ljust(69)
    + b"\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_cannot_claim_much_memory(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ArtefactError) as caught:
            read(BOMBS[name])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**20 + 150 * len(BOMBS[name])
    assert len(str(caught.value)) < 400


def mutated(random: np.random.Generator, sources: list[bytes]) -> bytes:
    """A file with bytes changed, cut out, or put in from another."""
    data = bytearray(sources[random.integers(len(sources))])
    for _ in range(random.integers(1, 3)):
        place, length = int(random.integers(len(data))), int(random.integers(0, 12))
        other = sources[random.integers(len(sources))]
        start = int(random.integers(len(other)))
        if random.integers(3):
            data[place] = int(random.integers(256))
        else:
            data[place : place + length] = other[start : start + int(random.integers(60))]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
def test_no_mutated_file_runs_anything_or_raises_anything_else(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    good = [pickle.dumps({k: PLAIN[k] for k in ("keys", "cam", "nested")}, p) for p in range(6)]
    good += [saved({"keys": torch.tensor([1]), "cam": np.ones((1, 2, 2), np.float32)})]
    sources = good + [payload(f"echo > {marker}") for payload in CANARIES.values()]
    random = np.random.default_rng(0)
    files = [mutated(random, sources) for _ in range(4_000)]
    # of consistent length, so that the reader of tensors is reached
    files += [storage(lambda inner: mutated(random, [inner])) for _ in range(1_000)]
    for data in good:
        read(data)  # Python imports the codecs of text when it first needs them
    modules, refused = set(sys.modules), 0
    for data in files:
        try:
            read(data)
        except ArtefactError:
            refused += 1
    assert not marker.exists() and set(sys.modules) == modules
    assert 20 < refused < len(files) - 20


def test_a_written_dictionary_is_read_by_numpy() -> None:
    values = {
        "keys": np.array([3, 14]),
        "cam": np.arange(12, dtype=np.float32).reshape(2, 3, 2),
        "turned": np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3)),
        "none": np.zeros((0, 5), np.float16),
        "truth": np.array([True, False]),
        "Kuh": np.array(7, np.uint8),
    }
    numbered = {0: np.ones(2), 254: np.zeros(1), 2007000032: np.ones(1)}
    for given in (values, numbered, {}):
        data = dictionary_file(given)
        with warnings.catch_warnings(action="error"):
            found = np.load(io.BytesIO(data), allow_pickle=True).item()
        assert same(found, given) and same(read(data), given)
        assert all(array.flags.writeable for array in found.values())
        assert b"numpy._core" not in data, "NumPy 1 has no such module"
    assert dictionary_file(values) == dictionary_file({k: v.copy() for k, v in values.items()})
