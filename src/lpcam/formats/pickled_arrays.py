"""Pickled arrays of other programs (``.npy`` files of dictionaries), read without running code.

A pickle is a program, and ``np.load(allow_pickle=True)`` runs it. `read_pickled_arrays` runs
Python's own unpickler with almost everything taken out:

- **Instructions**: those that numbers, text, lists, tuples, dictionaries and calls need. Any other
  (``INST``, ``OBJ``, ``NEWOBJ``, ``EXT``, sets, external buffers) ends the reading. State is set
  only on the stand-ins of arrays and dtypes.
- **Names**: a global is looked up in a table of this module and never imported. The table holds
  stand-ins, written here, for the few functions of NumPy and torch that rebuild arrays, for an
  empty ``OrderedDict`` and for bytes. NumPy's own functions are not called, because they trust the
  file: ``ndarray.__setstate__`` and ``scalar`` with a forged dtype take bytes for pointers.
- **Keys** are text or integers. Hashing tuples of tuples could take for ever.
- **Size**: everything that is made of a file's bytes may claim `GROWTH` times its size; containers
  are at most `DEEPEST` deep; integers have 64 bits.

:func:`dictionary_file` writes such files for programs that read nothing else. The package's own
files hold no pickle.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.files import read_bytes

GROWTH = 4
"""Largest size of all arrays and containers of a file together, in multiples of the file's size."""
DEEPEST = 16
"""Largest depth of nested containers."""
_DTYPES = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")
_OBJECTS = ("O", "O4", "O8")
_TORCH_MAGIC, _TORCH_LAYOUT = 0x1950A86A20F9469CFC6C, 1001


def read_pickled_arrays(source: Path | bytes, *, what: str) -> Any:
    """Read a ``.npy`` file or a plain pickle of numbers, text, containers and arrays.

    Reads protocols 0 to 5, of Python 2 and 3, NumPy 1 and 2, with arrays of booleans, integers and
    floats. A torch tensor becomes an array (bfloat16 becomes float32), a NumPy scalar a number, an
    object array its element (shape ()) or a list (shape (n,)), an OrderedDict a dict.

    Args:
        source: a file, or its contents.
        what: kind of file for error messages, such as ``"map file"``.

    Returns:
        None, a bool, int, float, str, an array in native byte order, or a list, tuple or dict of
        these. Arrays may be read-only and share memory.

    Raises:
        ArtefactError: if the file is missing or damaged, holds anything else, or claims more memory
            than it may.

    Example:
        >>> read_pickled_arrays(dictionary_file({"keys": np.array([3, 14])}), what="map file")
        {'keys': array([ 3, 14])}
    """
    name = what if isinstance(source, bytes) else f"{what} {source}"
    data = source if isinstance(source, bytes) else read_bytes(source)
    try:
        return _read(data)
    except _RefusedError as error:
        raise ArtefactError(f"{name} is refused: {error}") from error
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = " ".join(f"{type(error).__name__} {error!s:.120}".split())
        raise ArtefactError(
            f"{name} is refused: it is damaged or holds no pickled arrays ({reason}); fetch it "
            "again or create it again"
        ) from error


class _RefusedError(ValueError):
    """The reason why an undamaged file is not read."""


def _read(data: bytes) -> Any:
    if data.startswith(b"PK\x03\x04"):
        raise _RefusedError("it is an archive (.npz or torch.save); expected a .npy file")
    stream = io.BytesIO(data)
    if data.startswith(b"\x93NUMPY"):
        formats = np.lib.format
        one = formats.read_magic(stream) == (1, 0)
        read_header = formats.read_array_header_1_0 if one else formats.read_array_header_2_0
        shape, by_columns, dtype = read_header(stream)
        if not dtype.hasobject:
            stand_in = DtypeStandIn(f"{dtype.kind}{dtype.itemsize}")
            stand_in.order = dtype.str[0]
            content = data[stream.tell() :]
            return _filled(shape, stand_in, "F" if by_columns else "C", content).numpy()
    reader = _Reader(stream, len(data))
    found = reader.load()
    if stream.tell() != len(data):
        raise ValueError(f"{len(data) - stream.tell()} bytes follow its end")
    return reader.tree(found)


# -- Stand-ins for NumPy ------------------------------------------------------------------------


class DtypeStandIn:
    """Stand-in for ``numpy.dtype``: the name of a known dtype and its byte order."""

    __slots__ = ("name", "order")

    def __init__(self, name: str, *_: Any) -> None:
        if type(name) is not str or name not in (*_DTYPES, *_OBJECTS):
            shown = name if type(name) is str else type(name).__name__
            raise _RefusedError(f"it has arrays of dtype {shown!r:.40}; expected numbers")
        self.name = name
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        if type(state[1]) is not str or state[1] not in ("<", ">", "|", "="):
            raise ValueError("its byte order is unknown")
        self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        """The dtype of the stored values: uint8 for booleans, whose bytes may have any value."""
        if self.name in _OBJECTS:
            raise ValueError("numbers have the dtype of objects")
        return np.dtype("u1" if self.name == "b1" else self.order + self.name)


class ArrayStandIn:
    """Stand-in for ``numpy.ndarray``: a checked view of bytes of the file.

    ``values`` are a list for an array of objects, and None before a state is set.
    """

    __slots__ = ("name", "shape", "values")

    def __init__(self, *_: Any) -> None:
        self.values: NDArray[Any] | list[Any] | None = None
        self.name = ""
        self.shape: tuple[int, ...] = ()

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, content = state
        if type(dtype) is DtypeStandIn and dtype.name in _OBJECTS:
            _check_lengths(shape)
            if type(content) is not list or len(shape) > 1 or len(content) != math.prod(shape):
                raise ValueError("an array of objects is not a list (n,)")
            self.shape, self.values = shape, content
        else:
            found = _filled(shape, dtype, "F" if by_columns else "C", content)
            self.name, self.values = found.name, found.values

    @property
    def size_in_bytes(self) -> int:
        return self.values.nbytes if isinstance(self.values, np.ndarray) else 0

    def numpy(self) -> NDArray[Any]:
        """The array in native byte order; ValueError if it holds no numbers."""
        if not isinstance(self.values, np.ndarray):
            raise ValueError("an array has no numbers")
        if self.name == "b1":
            return np.asarray(self.values != 0)
        if self.name == "bfloat16":  # the upper half of a float32
            return np.asarray(self.values.astype(np.uint32) << 16).view(np.float32)
        return self.values.astype(self.values.dtype.newbyteorder("="), copy=False)


def _filled(shape: Any, dtype: Any, order: Any, content: Any, axes: Any = None) -> ArrayStandIn:
    """A view of ``content``; ValueError if its size is not that of the shape and dtype."""
    if (
        type(dtype) is not DtypeStandIn
        or type(content) is not bytes
        or order not in ("C", "F", "K")
    ):
        raise ValueError("an array is not made of numbers")
    _check_lengths(shape)
    flat: NDArray[Any] = np.frombuffer(content, dtype.numpy())
    if flat.size != math.prod(shape):
        raise ValueError(f"an array of shape {shape} has {flat.size} values")
    array = ArrayStandIn()
    array.name = dtype.name
    array.values = flat.reshape(shape, order="F" if order == "F" else "C")
    if order == "K":  # contiguous after a permutation of the axes
        _check_lengths(axes)
        array.values = array.values.transpose(axes)
    return array


def _check_lengths(numbers: Any) -> None:
    if (
        type(numbers) is not tuple
        or len(numbers) > 8
        or not all(type(n) is int and 0 <= n < 2**48 for n in numbers)
    ):
        raise ValueError("a shape is not a tuple of at most 8 lengths")


def _scalar(dtype: Any, content: Any) -> Any:
    return _filled((), dtype, "C", content).numpy().item()


NUMPY_STAND_INS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": DtypeStandIn,
    "numpy.ndarray": ArrayStandIn,
    # NumPy 1 and 2 write different modules
    **{f"numpy.{core}.multiarray._reconstruct": ArrayStandIn for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
}
"""Stand-ins for NumPy's functions, by the names that pickles give them."""


# -- Stand-ins for torch ------------------------------------------------------------------------


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> ArrayStandIn:
    """Stand-in for ``_rebuild_tensor`` and ``_rebuild_tensor_v2``: a view of a storage."""
    if type(storage) is not ArrayStandIn or not isinstance(storage.values, np.ndarray):
        raise ValueError("a tensor has no storage")
    if any(rest[2:]):  # such as a conjugate view
        raise ValueError("a tensor has metadata")
    for numbers in (size, stride, (offset,)):
        _check_lengths(numbers)
    # In Python's integers, which do not overflow as those of NumPy's own check do.
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    flat = storage.values
    tensor = ArrayStandIn()
    tensor.name = storage.name
    if not math.prod(size):
        tensor.values = np.zeros(size, flat.dtype)
    elif last >= flat.size:
        raise ValueError("a tensor reaches beyond its storage")
    else:
        steps = tuple(step * flat.itemsize for step in stride)
        tensor.values = np.ndarray(size, flat.dtype, flat, offset * flat.itemsize, steps)
    return tensor


_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        **{"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": "bfloat16", "Bool": "b1"},
        **{"Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1"},
    }.items()
}


# -- The unpickler ------------------------------------------------------------------------------


class _Dict(dict[Any, Any]):
    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) not in (str, int):
            raise _RefusedError("it has a key that is neither text nor an integer")
        super().__setitem__(key, value)


_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG "
    "LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE "
    "BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_LIST EMPTY_TUPLE LIST TUPLE "
    "TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET "
    "BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BINPERSID"
)


class _Reader(pickle._Unpickler):
    # Python's unpickler written in Python: unlike the one in C, it looks instructions up in a table

    dispatch: ClassVar[dict[int, Any]] = {}
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: io.BytesIO, size: int) -> None:
        super().__init__(stream, encoding="latin1")
        self.size = size
        self.left = GROWTH * size
        self.arrays: dict[int, NDArray[Any]] = {}
        self.names: dict[str, Any] = {
            **NUMPY_STAND_INS,
            **_STORAGES,
            **dict.fromkeys(
                ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"),
                lambda content, dtype, shape, order, axes=None: _filled(
                    shape, dtype, order, content, axes
                ),
            ),
            "collections.OrderedDict": lambda: _Dict(),  # noqa: PLW0108 - without arguments
            "builtins.bytes": lambda: b"",  # protocols 0 to 2 write empty bytes so
            "__builtin__.bytes": lambda: b"",
            "_codecs.encode": self.encode,
            "torch.storage._load_from_bytes": self.storage,
            "torch._utils._rebuild_tensor": _tensor,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        }

    def claim(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise _RefusedError(
                f"its {self.size:,} bytes claim more than {GROWTH} times as much memory; save "
                "arrays that own their memory"
            )

    def find_class(self, module: str, name: str) -> Any:
        """Nothing is imported."""
        if f"{module}.{name}" not in self.names:
            raise _RefusedError(
                f"it asks for '{module}.{name}', which is neither an array nor a plain container; "
                "nothing was run. Save a dictionary of arrays instead"
            )
        return self.names[f"{module}.{name}"]

    def persistent_load(self, identity: Any) -> Any:
        kind, dtype, key, _device, count, view = identity
        if kind != "storage" or type(dtype) is not str or type(key) is not str or view:
            raise ValueError("it refers to something outside the file")
        return dtype, key, count

    def encode(self, text: Any, encoding: Any) -> bytes:
        """Protocols 0 to 2 write bytes by ``_codecs.encode``."""
        if type(text) is not str or encoding != "latin1":
            raise ValueError("it encodes something other than bytes")
        self.claim(len(text))
        return text.encode("latin1")

    def storage(self, content: Any) -> ArrayStandIn:
        """A tensor's values in torch.save's older layout."""
        if type(content) is not bytes:
            raise ValueError("a tensor is not made of bytes")
        self.claim(len(content))
        stream = io.BytesIO(content)
        parts = [_Reader(stream, len(content)).load() for _ in range(5)]
        magic, layout, system, (dtype, key, count), keys = parts
        if magic != _TORCH_MAGIC or layout != _TORCH_LAYOUT or keys != [key]:
            raise ValueError("a tensor is not in the older layout of torch.save")
        if system["little_endian"] is not True:
            raise _RefusedError("its tensors have the byte order of another machine")
        found = ArrayStandIn()
        found.name = dtype
        stored = np.dtype("u2") if dtype == "bfloat16" else DtypeStandIn(dtype).numpy()
        length = int.from_bytes(stream.read(8), "little")
        found.values = np.frombuffer(content[stream.tell() :], stored)
        if not count == length == found.values.size:
            raise ValueError("a storage has another number of values than it claims")
        return found

    def load_build(self) -> None:
        """Set the state of an array or dtype; refused for anything else."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) not in (ArrayStandIn, DtypeStandIn):
            raise _RefusedError("it sets the state of something other than an array")
        if type(target) is ArrayStandIn and type(state[-1]) is str:  # bytes of Python 2
            state = (*state[:-1], self.encode(state[-1], "latin1"))
        target.__setstate__(state)

    def load_dict(self) -> None:
        items = self.pop_mark()
        found = _Dict()
        for key, value in zip(items[::2], items[1::2], strict=True):
            found[key] = value
        self.append(found)

    def load_empty_dict(self) -> None:
        self.append(_Dict())

    def refuse(self) -> None:
        raise _RefusedError(
            "it has an instruction that arrays and plain containers do not need; nothing was run. "
            "Save a dictionary of arrays instead"
        )

    def tree(self, value: Any, depth: int = 0) -> Any:
        """The value with arrays in place of stand-ins and a new container at every place."""
        self.claim(1)
        if depth > DEEPEST:
            raise _RefusedError(f"it has containers more than {DEEPEST} deep, or in themselves")
        if value is None or type(value) in (bool, float, str):
            return value
        if type(value) is int and -(2**63) <= value < 2**64:
            return value
        if type(value) is ArrayStandIn:
            if type(value.values) is list:
                return self.tree(value.values if value.shape else value.values[0], depth + 1)
            if id(value) not in self.arrays:
                self.claim(value.size_in_bytes)
                self.arrays[id(value)] = value.numpy()
            return self.arrays[id(value)]
        if type(value) is _Dict:
            return {self.tree(k, depth): self.tree(v, depth + 1) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self.tree(entry, depth + 1) for entry in value])
        raise _RefusedError("it holds something other than numbers, text, containers and arrays")


_Reader.dispatch.update(dict.fromkeys(pickle._Unpickler.dispatch, _Reader.refuse))
for _name in _INSTRUCTIONS.split():
    _code = getattr(pickle, _name)[0]
    _Reader.dispatch[_code] = pickle._Unpickler.dispatch[_code]
_Reader.dispatch[pickle.BUILD[0]] = _Reader.load_build
_Reader.dispatch[pickle.DICT[0]] = _Reader.load_dict
_Reader.dispatch[pickle.EMPTY_DICT[0]] = _Reader.load_empty_dict
# The unpickler's own allocates what the file claims before it reads.
_Reader.dispatch[pickle.BYTEARRAY8[0]] = pickle._Unpickler.dispatch[pickle.BINBYTES8[0]]


# -- Writing ------------------------------------------------------------------------------------


def dictionary_file(values: Mapping[str, NDArray[Any]] | Mapping[int, NDArray[Any]]) -> bytes:
    """Contents of a ``.npy`` file with a dictionary, for programs that read nothing else.

    They read it with ``np.load(path, allow_pickle=True).item()``, with NumPy 1 or 2 and without
    torch, as writable arrays. Equal values give equal bytes.

    Raises:
        ValueError: if a value is not an array of booleans, integers or floats.

    Example:
        >>> data = dictionary_file({3: np.zeros((4, 6), np.float32)})
        >>> np.load(io.BytesIO(data), allow_pickle=True).item()[3].shape
        (4, 6)
    """
    stored = {}
    for key, array in values.items():
        if f"{array.dtype.kind}{array.dtype.itemsize}" not in _DTYPES:
            raise ValueError(f"arrays of dtype {array.dtype} are not written; expected numbers")
        stored[key] = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    whole = np.empty((), dtype=object)
    whole[()] = stored
    buffer = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": ()}
    np.lib.format.write_array_header_1_0(buffer, header)
    pickler = pickle.Pickler(buffer, protocol=3)
    pickler.fast = True  # without a memo the bytes depend on the values alone
    pickler.dump(whole)
    # NumPy 1 does not know the names that NumPy 2 writes; NumPy 2 knows both.
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
