"""Pickled arrays of other programs (``.npy`` files of dictionaries), read without running code.

A pickle is a program, and ``np.load(allow_pickle=True)`` runs it. `read_pickled_arrays` runs
Python's own unpickler with almost everything taken out:

- **Instructions**: those that plain containers and calls need. State is set only on stand-ins.
- **Names** are looked up in a table of this module and never imported. NumPy's own functions that
  rebuild arrays trust the file: with a forged dtype they take bytes for pointers.
- **Keys** are text or integers. Hashing tuples of tuples could take for ever.
- **Size**: what is made of a file may claim `_GROWTH` times its size; containers are at most
  `_DEEPEST` deep; integers have 64 bits.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpcam.runtime.errors import ArtefactError

_GROWTH = 4
_DEEPEST = 16
_DTYPES = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")
_OBJECTS = ("O", "O4", "O8")
_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG "
    "LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE "
    "BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_LIST EMPTY_TUPLE EMPTY_DICT "
    "LIST TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET "
    "LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BINPERSID"
)


def read_pickled_arrays(data: bytes, *, what: str) -> Any:
    """Read a ``.npy`` file or a plain pickle of numbers, text, containers and arrays.

    A torch tensor becomes an array (bfloat16 becomes float32), a NumPy scalar a number, an object
    array of shape () its element, an OrderedDict a dict. Arrays may be read-only and share memory.
    ArtefactError, which names the file as ``what``, if it is damaged, holds anything else, or
    claims too much memory.
    """
    try:
        return _read(data)
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArtefactError(
            f"{what} is refused: {reason:.160}; expected undamaged arrays in plain containers "
            "(nothing was run)"
        ) from error


def _read(data: bytes) -> Any:
    if data.startswith(b"PK\x03\x04"):
        raise ValueError("it is an archive (.npz or torch.save); expected a .npy file")
    stream = io.BytesIO(data)
    reader = _Reader(stream, len(data))
    if data.startswith(b"\x93NUMPY"):
        formats = np.lib.format
        one = formats.read_magic(stream) == (1, 0)
        header = formats.read_array_header_1_0 if one else formats.read_array_header_2_0
        shape, by_columns, dtype = header(stream)
        if not dtype.hasobject:
            known = _Dtype(f"{dtype.kind}{dtype.itemsize}", order=dtype.str[0])
            order = "F" if by_columns else "C"
            return reader.tree(_array(data[stream.tell() :], known, shape, order))
    found = reader.load()
    if stream.tell() != len(data):
        raise ValueError(f"{len(data) - stream.tell()} bytes follow its end")
    return reader.tree(found)


class _Dtype:
    """Stand-in for ``numpy.dtype``: the name of a known dtype and its byte order."""

    __slots__ = ("name", "order")

    def __init__(self, name: str, *_: Any, order: str = "<") -> None:
        if type(name) is not str or name not in (*_DTYPES, *_OBJECTS):
            raise ValueError("it has arrays of something other than numbers")
        self.name = name
        self.order = order

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise ValueError("a byte order is unknown")
        self.order = state[1]


class ArrayStandIn:
    """Stand-in for ``numpy.ndarray``: ``value`` is a view of bytes of the file, or an object."""

    __slots__ = ("value",)

    def __init__(self, *_: Any) -> None:
        self.value: Any = object()  # before a state is set

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, content = state
        if type(dtype) is _Dtype and dtype.name in _OBJECTS:
            if shape != () or type(content) is not list:
                raise ValueError("it has an array of several objects")
            (self.value,) = content
        else:
            self.value = _array(content, dtype, shape, "F" if by_columns else "C")


def _array(content: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> NDArray[Any]:
    """A view of ``content``, as NumPy's ``_frombuffer`` makes it."""
    if type(dtype) is not _Dtype or dtype.name in _OBJECTS:
        raise ValueError("an array is not made of numbers")
    flat: NDArray[Any] = np.frombuffer(content, dtype.order + dtype.name)
    lengths = len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**48 for n in shape)
    if not lengths or flat.size != math.prod(shape):
        raise ValueError("an array has another size than its shape")
    return flat.reshape(shape, order=order) if axes is None else flat.reshape(shape).transpose(axes)


NUMPY_STAND_INS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _Dtype,
    "numpy.ndarray": ArrayStandIn,
}
for _core in ("core", "_core"):  # NumPy 1 and 2 write different modules
    NUMPY_STAND_INS[f"numpy.{_core}.multiarray._reconstruct"] = ArrayStandIn
    NUMPY_STAND_INS[f"numpy.{_core}.multiarray.scalar"] = lambda dtype, content: _array(
        content, dtype, (), "C"
    ).item()


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *grad_and_hooks: Any) -> Tensor:
    """A view of a storage; torch checks that it stays within."""
    if len(grad_and_hooks) > 2:
        raise ValueError("a tensor has metadata")  # such as a conjugate view
    return torch.as_strided(storage, size, stride, offset)


_STORAGES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16},
    **{"BFloat16": torch.bfloat16, "Bool": torch.bool, "Long": torch.int64, "Int": torch.int32},
    **{"Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
}
_NAMES: dict[str, Any] = {
    **NUMPY_STAND_INS,
    **{f"numpy.{core}.numeric._frombuffer": _array for core in ("core", "_core")},
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    "collections.OrderedDict": lambda: {},
    "builtins.bytes": lambda: b"",  # protocols 0 to 2 write empty bytes so
    "__builtin__.bytes": lambda: b"",
}


class _Reader(pickle._Unpickler):
    # Python's unpickler written in Python: unlike the one in C, it looks instructions up in a table

    dispatch: ClassVar[dict[int, Any]] = {}
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: io.BytesIO, size: int) -> None:
        super().__init__(stream, encoding="latin1")
        self.left = _GROWTH * size
        self.arrays: dict[int, NDArray[Any]] = {}

    def claim(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise ValueError(f"it claims more than {_GROWTH} times its size in memory")

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up; nothing is imported."""
        own = {"_codecs.encode": self.encode, "torch.storage._load_from_bytes": self.storage}
        found = (own | _NAMES).get(f"{module}.{name}")
        if found is None:
            raise ValueError(
                f"it asks for '{module}.{name}', which is neither an array nor a plain container"
            )
        return found

    def persistent_load(self, identity: Any) -> Any:
        _, dtype, _, _device, count, view = identity
        if view is not None:
            raise ValueError("a tensor is a view of another storage")
        return dtype, count

    def encode(self, text: Any, encoding: Any) -> bytes:
        """Bytes, as protocols 0 to 2 write them."""
        if type(text) is not str or encoding != "latin1":
            raise ValueError("it encodes something other than bytes")
        self.claim(len(text))
        return text.encode("latin1")

    def storage(self, content: bytes) -> Tensor:
        """A tensor's values in torch.save's older layout: five pickles, a length, the values."""
        self.claim(len(content))
        stream = io.BytesIO(content)
        *_, (dtype, count), _ = [_Reader(stream, len(content)).load() for _ in range(5)]
        values = bytearray(content[stream.tell() + 8 :])
        if len(values) != count * dtype.itemsize:
            raise ValueError("a storage has another number of values than it claims")
        return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)

    def load_build(self) -> None:
        """Set the state of an array or dtype."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) not in (ArrayStandIn, _Dtype):
            raise ValueError("it sets the state of something other than an array")
        if type(target) is ArrayStandIn and type(state[-1]) is str:  # bytes of Python 2
            state = (*state[:-1], self.encode(state[-1], "latin1"))
        target.__setstate__(state)

    def fill(self, items: list[Any]) -> None:
        """Put keys and values, one after the other, into the dictionary on the stack."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int) or type(self.stack[-1]) is not dict:
                raise ValueError("it has a key that is neither text nor an integer")
            self.stack[-1][key] = value

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.fill(items)

    def load_setitem(self) -> None:
        self.fill([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self) -> None:
        self.fill(self.pop_mark())

    def refuse(self) -> None:
        raise ValueError("it has an instruction that arrays and plain containers do not need")

    def tree(self, value: Any, depth: int = 0) -> Any:
        """The value with arrays in place of stand-ins and a new container at every place."""
        self.claim(1)
        if depth > _DEEPEST:
            raise ValueError(f"it has containers more than {_DEEPEST} deep, or in themselves")
        small = type(value) is int and -(2**63) <= value < 2**64
        if small or value is None or type(value) in (bool, float, str):
            return value
        if type(value) is ArrayStandIn:
            return self.tree(value.value, depth + 1)
        if isinstance(value, np.ndarray | Tensor):
            if id(value) not in self.arrays:
                self.claim(value.nbytes)
                if isinstance(value, Tensor):  # NumPy has no bfloat16
                    native = value.float() if value.dtype == torch.bfloat16 else value
                    self.arrays[id(value)] = native.numpy()
                else:
                    own = value.dtype.newbyteorder("=")
                    self.arrays[id(value)] = value.astype(own, copy=False)
            return self.arrays[id(value)]
        if type(value) is dict:
            return {self.tree(k, depth): self.tree(v, depth + 1) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self.tree(entry, depth + 1) for entry in value])
        raise ValueError("it holds something other than numbers, text, containers and arrays")


_Reader.dispatch.update(dict.fromkeys(pickle._Unpickler.dispatch, _Reader.refuse))
for _name in _INSTRUCTIONS.split():
    _code = getattr(pickle, _name)[0]
    _Reader.dispatch[_code] = pickle._Unpickler.dispatch[_code]
for _name in ("BUILD", "DICT", "SETITEM", "SETITEMS"):
    _Reader.dispatch[getattr(pickle, _name)[0]] = getattr(_Reader, f"load_{_name.lower()}")
# The unpickler's own allocates what the file claims before it reads.
_Reader.dispatch[pickle.BYTEARRAY8[0]] = pickle._Unpickler.dispatch[pickle.BINBYTES8[0]]


def dictionary_file(values: Mapping[str, NDArray[Any]] | Mapping[int, NDArray[Any]]) -> bytes:
    """A ``.npy`` file for ``np.load(path, allow_pickle=True).item()``, the same for same values."""
    whole = np.empty((), dtype=object)
    whole[()] = {key: np.asarray(array, order="C") for key, array in values.items()}
    buffer = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": ()}
    np.lib.format.write_array_header_1_0(buffer, header)
    pickler = pickle.Pickler(buffer, protocol=3)
    pickler.fast = True  # without a memo the bytes depend on the values alone
    pickler.dump(whole)
    # NumPy 1 does not know the names that NumPy 2 writes; NumPy 2 knows both.
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
