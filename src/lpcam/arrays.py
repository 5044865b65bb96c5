"""Arrays in foreign pickles (``.npy`` files of dictionaries): read without running anything.

A pickle is a program, and ``np.load(allow_pickle=True)`` runs it. This module does not unpickle: it
walks over the instructions (``pickletools.genops`` names them and executes none) and obeys the few
that numbers, text, containers and arrays need, on a stack of its own. Two other ways were left:

- A subclass of ``pickle.Unpickler`` with a strict ``find_class`` still calls what it found, still
  runs ``__setstate__`` and ``__reduce__`` protocols, follows every instruction of every version of
  Python, and lets NumPy rebuild its arrays, which trusts a forged dtype. Here a global is a *name*
  that is compared with a list and never looked up, what is called is a function of this module, and
  an instruction that is not on the list ends the reading.
- ``torch.load(weights_only=True)`` for the tensors within would add torch's reader and its flaws
  (:mod:`lpcam.pickles` names two), and the list of allowed names that guards it belongs to the
  whole process, not to a thread. The layout in which tensors lie in such files is a header and the
  values in a row; it is read here.

What a file can claim is bounded: by `GROWTH` times its own size for everything that is made of its
bytes, by `MOST_INSTRUCTIONS` for the number of objects, by `DEEPEST` for nesting. Integers have 64
bits, keys are integers or text, so that neither arithmetic nor hashing takes long. The result is a
tree that holds nothing twice but arrays, so whoever walks over it comes to an end.

:func:`dictionary_file` is the way out, for the programs that read such files: the same few
instructions, written one by one. Nothing here imports ``pickle``.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpcam.errors import ArtefactError
from lpcam.storage import read_bytes

GROWTH = 4
"""Times a file's size: the most that all arrays and bytes made of it may claim together."""
MOST_INSTRUCTIONS = 8_000_000
"""Of one file. The label file of 123,287 images of MS COCO has about four million; the worst that
eight million can do is to fill 1.2 GB in half a minute (8 MB of empty dictionaries)."""
DEEPEST = 16
"""Containers within one another."""

_NPY = b"\x93NUMPY"
_HEADER = re.compile(
    r"\{'descr': '(?P<order>[<>|=]?)(?P<name>\w+)', 'fortran_order': (?P<by_columns>True|False), "
    r"'shape': \((?P<shape>(?:\d{1,15}L?, ?)*(?:\d{1,15}L?)?)\), \}\s*"
)
_DTYPES = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")
_OBJECTS = ("O", "O4", "O8")
_ORDERS = ("<", ">", "|", "=", "")
_DIMENSIONS = 8
_STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "b1",
    "BFloat16Storage": "bfloat16",
}
# What torch.save writes before all else in its older layout: a number, and the layout's version.
_TORCH_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."


def read_pickled_arrays(source: Path | bytes, *, what: str) -> Any:
    """Read a ``.npy`` file or a plain pickle of numbers, text, containers and arrays.

    Protocols 0 to 5 are read, of Python 2 and 3, NumPy 1 and 2. Arrays are of booleans, integers
    and floats. A torch tensor becomes an array (bfloat16 becomes float32), whichever device it was
    on; a NumPy scalar becomes a number, an object array its element (shape ()) or a list (shape
    (n,)), an OrderedDict a dict. Nothing else is read, and nothing of the file is run.

    Args:
        source: the file, or its bytes.
        what: the file is, for messages, such as ``"map file"``.

    Returns:
        None, a bool, int, float, str, an array in native byte order, or a list, tuple or dict (keys
        int or str) of these. Arrays may be read-only and share memory: copy before changing one.

    Raises:
        ArtefactError: naming the file and the reason, if it is missing or damaged, asks for
            anything else, or claims more than it may (module docstring).
    """
    name = what if isinstance(source, bytes) else f"{what} {source}"
    data = source if isinstance(source, bytes) else read_bytes(source)
    try:
        return _read(data)
    except _RefusedError as refusal:
        raise ArtefactError(f"{name} is refused: {refusal}") from refusal
    except MemoryError as error:
        raise ArtefactError(f"{name} is refused: it asks for more memory than there is") from error
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArtefactError(
            f"{name} is refused: it is damaged or holds no pickled arrays ({reason:.120}); fetch "
            "it again or make it anew"
        ) from error


class _RefusedError(ValueError):
    """What makes a file unreadable here although it may be whole."""


def _read(data: bytes) -> Any:
    if data.startswith(b"PK\x03\x04"):
        raise _RefusedError("it is an archive (.npz or of torch.save); give the .npy file")
    budget = _Budget(GROWTH * len(data))
    stream = io.BytesIO(data)
    if data.startswith(_NPY):
        header = _read_header(stream)
        if header["name"] not in _OBJECTS:
            return _plain_array(header, memoryview(data)[stream.tell() :])
    found = _Machine(_FUNCTIONS, budget).run(stream)
    if stream.tell() != len(data):
        raise ValueError(f"{len(data) - stream.tell()} bytes follow its end")
    return _finished(found, 0, budget, {})


class _Budget:
    """What a file may still ask for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.left = size
        self.instructions = MOST_INSTRUCTIONS
        self.places = MOST_INSTRUCTIONS

    def claim(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise _RefusedError(
                f"its {self.size // GROWTH:,} bytes claim arrays of more than {GROWTH} times as "
                "many; save arrays that own their memory"
            )

    def place(self) -> None:
        self.places -= 1
        if self.places < 0:
            raise _RefusedError(f"it holds its entries more than {MOST_INSTRUCTIONS:,} times over")


# -- The header of .npy ------------------------------------------------------------------------


def _read_header(stream: io.BytesIO) -> dict[str, str]:
    major = stream.read(len(_NPY) + 2)[-2]
    length = int.from_bytes(stream.read(2 if major == 1 else 4), "little")
    text = stream.read(min(length, 10_000)).decode("latin-1")
    match = _HEADER.fullmatch(text)
    if match is None:
        raise _RefusedError(
            f"its header reads {text.strip()!r:.120}; expected an array of numbers or objects"
        )
    return match.groupdict()


def _plain_array(header: Mapping[str, str], content: memoryview) -> NDArray[Any]:
    shape = tuple(int(n.rstrip("L")) for n in header["shape"].replace(" ", "").split(",") if n)
    array = ArrayStandIn()
    dtype = DtypeStandIn(header["name"])
    dtype.order = header["order"]
    array.fill(shape, dtype, header["by_columns"] == "True", content)
    return array.numpy()


# -- In the place of NumPy's own -----------------------------------------------------------------


class DtypeStandIn:
    """In the place of numpy.dtype: one of few names, and nothing more that a file says of it."""

    __slots__ = ("name", "order")

    def __init__(self, name: str, *_: Any) -> None:
        if name not in _DTYPES:
            raise _RefusedError(f"arrays of dtype {_shown(name)} are not read; save numbers")
        self.name = name
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        if state[1] not in _ORDERS:
            raise ValueError(f"byte order {_shown(state[1])} is unknown")
        self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        """The dtype; bytes for booleans, which a file may give any value."""
        return np.dtype("u1" if self.name == "b1" else self.order + self.name)


class ArrayStandIn:
    """In the place of numpy.ndarray: a view of the file's bytes, checked against its shape."""

    __slots__ = ("elements", "logical", "values")

    def __init__(self) -> None:
        self.values: NDArray[Any] = np.zeros(0, np.uint8)
        self.logical = False
        self.elements: tuple[tuple[int, ...], list[Any]] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, content = state
        if type(dtype) is not DtypeStandIn or type(content) is not bytes:
            raise ValueError("an array is not made of numbers")
        self.fill(shape, dtype, bool(by_columns), content)

    def fill(
        self,
        shape: Any,
        dtype: DtypeStandIn,
        by_columns: bool,
        content: bytes | bytearray | memoryview,
    ) -> None:
        """View ``content`` as an array; ValueError if the shape needs another number of bytes."""
        _check_shape(shape)
        flat: NDArray[Any] = np.frombuffer(content, dtype.numpy())
        if flat.size != math.prod(shape):
            raise ValueError(f"cannot reshape array of size {flat.size} into {shape}")
        self.values = flat.reshape(shape, order="F" if by_columns else "C")
        self.logical = dtype.name == "b1"

    @property
    def claimed(self) -> int:
        """Bytes."""
        return self.values.nbytes

    def numpy(self) -> NDArray[Any]:
        """The array in native byte order."""
        if self.logical:
            return _truth(self.values)
        return self.values.astype(self.values.dtype.newbyteorder("="), copy=False)


def new_array(*_: Any) -> ArrayStandIn:
    """In the place of numpy's _reconstruct, whose arguments say nothing yet."""
    return ArrayStandIn()


def new_scalar(dtype: Any, content: Any) -> bool | int | float:
    """In the place of numpy's scalar, as a plain number."""
    if type(dtype) is not DtypeStandIn or type(content) is not bytes:
        raise ValueError("a scalar is not a number")
    (value,) = np.frombuffer(content, dtype.numpy()).tolist()
    number: bool | int | float = bool(value) if dtype.name == "b1" else value
    return number


NUMPY_STAND_INS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": DtypeStandIn,
    "numpy.ndarray": ArrayStandIn,
    # NumPy 1 and 2 write different modules
    **{
        f"numpy.{core}.multiarray.{name}": stand_in
        for core in ("core", "_core")
        for name, stand_in in (("_reconstruct", new_array), ("scalar", new_scalar))
    },
}
"""By the names under which pickles ask for NumPy's own."""


def _truth(values: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(values != 0)  # of a shape () it would be a scalar


class _ObjectDtype:
    """In the place of numpy.dtype("O")."""


def _shown(value: Any) -> str:
    """For messages: what a file nests could take for ever to write out."""
    return f"{value!r:.40}" if type(value) in (str, int) else f"of type {type(value).__name__}"


def _check_shape(shape: Any) -> None:
    if (
        type(shape) is not tuple
        or len(shape) > _DIMENSIONS
        or not all(type(n) is int and 0 <= n < 2**48 for n in shape)
    ):
        raise ValueError(f"an array has no shape of at most {_DIMENSIONS} lengths")


def _dtype(name: Any, *_: Any) -> DtypeStandIn | _ObjectDtype:
    return _ObjectDtype() if name in _OBJECTS else DtypeStandIn(name)


def _from_buffer(
    content: Any, dtype: Any, shape: Any, order: Any, axes: Any = None
) -> ArrayStandIn:
    """In the place of numpy's _frombuffer, with which protocol 5 rebuilds arrays."""
    if type(dtype) is not DtypeStandIn or type(content) not in (bytes, bytearray):
        raise ValueError("an array is not made of numbers")
    if order not in ("C", "F") and (order != "K" or axes is None):
        raise ValueError(f"order {_shown(order)} is unknown")
    array = ArrayStandIn()
    array.fill(shape, dtype, order == "F", content)
    if order == "K":
        _check_shape(axes)
        array.values = array.values.transpose(axes)
    return array


# -- In the place of torch's own -----------------------------------------------------------------


class _Storage:
    """The values of tensors, in a row."""

    __slots__ = ("content", "count", "dtype", "kind")

    def __init__(self, kind: str, count: Any) -> None:
        self.kind = kind
        self.dtype = np.dtype("u2") if kind == "bfloat16" else DtypeStandIn(kind).numpy()
        if type(count) is not int or not 0 <= count < 2**48:
            raise ValueError("a storage has no size")
        self.count = count
        self.content = memoryview(b"")


class _Tensor:
    """A tensor, checked to lie within its storage, and not yet copied."""

    __slots__ = ("kind", "values")

    def __init__(self, values: NDArray[Any], kind: str) -> None:
        self.values = values
        self.kind = kind

    def numpy(self) -> NDArray[Any]:
        if self.kind == "b1":
            return _truth(self.values)
        if self.kind == "bfloat16":  # the upper half of a float32
            return np.asarray(self.values.astype(np.uint32) << 16).view(np.float32)
        return self.values

    @property
    def claimed(self) -> int:
        return self.values.nbytes * (2 if self.kind == "bfloat16" else 1)


def _read_storage(content: Any, budget: _Budget) -> _Storage:
    """In the place of torch.storage._load_from_bytes: the older layout of torch.save.

    It is a fixed start, a dictionary of the machine's sizes, a pickle that names one storage, a
    list of its name, the number of values, and the values.
    """
    if type(content) is not bytes:
        raise ValueError("a tensor is not made of bytes")
    budget.claim(len(content))
    if not content.startswith(_TORCH_START):
        raise _RefusedError(
            "a tensor in it is in no layout that torch.save writes into other files"
        )
    stream = io.BytesIO(content)
    stream.seek(len(_TORCH_START))
    named: list[tuple[str, _Storage]] = []

    def load(identity: Any) -> _Storage:
        kind, dtype, key, _device, count, view = identity
        if kind != "storage" or type(dtype) is not _Name or type(key) is not str or view:
            raise ValueError("a tensor has no plain storage")
        named.append((key, _Storage(_STORAGES[dtype.text.removeprefix("torch.")], count)))
        return named[-1][1]

    system = _Machine({}, budget).run(stream)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise _RefusedError("its tensors come from a machine of the other byte order")
    storage = _Machine(_STORAGE_NAMES, budget, load).run(stream)
    keys = _Machine({}, budget).run(stream)
    if type(storage) is not _Storage or len(named) != 1 or keys != [named[0][0]]:
        raise ValueError("a tensor has not one storage")
    length = int.from_bytes(stream.read(8), "little")
    values = memoryview(content)[stream.tell() :]
    if length != storage.count or len(values) != length * storage.dtype.itemsize:
        raise ValueError(f"a storage of {storage.count} values has {len(values)} bytes")
    storage.content = values
    return storage


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _Tensor:
    """In the place of torch's _rebuild_tensor and _rebuild_tensor_v2."""
    if type(storage) is not _Storage or len(rest) not in (0, 2, 3) or any(rest[2:]):
        raise ValueError("a tensor is not plain")
    for numbers in (size, stride, (offset,)):
        _check_shape(numbers)
    if len(size) != len(stride):
        raise ValueError("a tensor has not one stride a side")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.count:
        raise ValueError("a tensor reaches beyond its storage")
    if not math.prod(size):
        return _Tensor(np.zeros(size, storage.dtype), storage.kind)
    width = storage.dtype.itemsize
    # NumPy checks the bounds once more
    values: NDArray[Any] = np.ndarray(
        size, storage.dtype, storage.content, offset * width, tuple(step * width for step in stride)
    )
    return _Tensor(values, storage.kind)


def _rebuild_parameter(tensor: Any, *_: Any) -> _Tensor:
    if type(tensor) is not _Tensor:
        raise ValueError("a parameter is no tensor")
    return tensor


# -- The instructions ----------------------------------------------------------------------------


class _Name:
    """A global that a pickle asks for: its name, never the thing itself."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def _refused_name(name: str) -> _RefusedError:
    return _RefusedError(
        f"it asks for {name!r:.80}, which is neither an array nor a plain container, and nothing "
        "was run; save a dictionary of arrays where the file comes from"
    )


class _Machine:
    """Obeys the instructions of one pickle.

    Args:
        functions: what may be called, by the name that the pickle gives it.
        budget: of the file.
        load: gives a storage for its persistent identity; None: there are none.
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        budget: _Budget,
        load: Callable[[Any], Any] | None = None,
    ) -> None:
        self.functions = functions
        self.budget = budget
        self.load = load
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: io.BytesIO) -> Any:
        """Obey them up to the first STOP, after which the stream then stands."""
        for opcode, argument, _ in pickletools.genops(stream):
            self.budget.instructions -= 1
            if self.budget.instructions < 0:
                raise _RefusedError(f"it has more than {MOST_INSTRUCTIONS:,} instructions")
            if opcode.name == "STOP":
                break
            method = _METHODS.get(opcode.name)
            if method is None:
                self._refuse(opcode.name, argument)
            else:
                method(self, argument)
        if len(self.stack) != 1 or self.below:
            raise ValueError("it ends in the middle of a value")
        return self.stack.pop()

    def _refuse(self, instruction: str, argument: Any) -> None:
        if instruction == "INST":
            raise _refused_name(str(argument).replace(" ", ".", 1))
        raise _RefusedError(
            f"it has the instruction {instruction}, which arrays and plain containers do not need, "
            "and nothing was run; save a dictionary of arrays where the file comes from"
        )

    def _protocol(self, version: int) -> None:
        if version > 5:
            raise _RefusedError(f"it has the pickle protocol {version}; protocols 0 to 5 are read")

    def _nothing(self, _: Any) -> None:
        pass

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _push_integer(self, value: int) -> None:
        if not -(2**63) <= value < 2**64:
            raise _RefusedError("it has an integer of more than 64 bits")
        self.stack.append(value)

    def _push_none(self, _: Any) -> None:
        self.stack.append(None)

    def _push_true(self, _: Any) -> None:
        self.stack.append(True)

    def _push_false(self, _: Any) -> None:
        self.stack.append(False)

    def _push_list(self, _: Any) -> None:
        self.stack.append([])

    def _push_dict(self, _: Any) -> None:
        self.stack.append({})

    def _push_tuple(self, _: Any) -> None:
        self.stack.append(())

    def _mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _marked(self) -> list[Any]:
        """What was pushed since the last mark, which is taken away."""
        found, self.stack = self.stack, self.below.pop()
        return found

    def _pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._marked()

    def _pop_mark(self, _: Any) -> None:
        self._marked()

    def _duplicate(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _get(self, place: int) -> None:
        self.stack.append(self.memo[place])

    def _tuple(self, _: Any) -> None:
        found = tuple(self._marked())
        self.stack.append(found)

    def _tuple_1(self, _: Any) -> None:
        self.stack[-1] = (self.stack[-1],)

    def _tuple_2(self, _: Any) -> None:
        last = self.stack.pop()
        self.stack[-1] = (self.stack[-1], last)

    def _tuple_3(self, _: Any) -> None:
        last = self.stack.pop()
        middle = self.stack.pop()
        self.stack[-1] = (self.stack[-1], middle, last)

    def _list(self, _: Any) -> None:
        found = self._marked()
        self.stack.append(found)

    def _append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._marked())

    def _extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("it appends to what is no list")
        self.stack[-1].extend(values)

    def _dict(self, _: Any) -> None:
        values = self._marked()
        self.stack.append({})
        self._update(values)

    def _setitem(self, _: Any) -> None:
        value = self.stack.pop()
        self._update([self.stack.pop(), value])

    def _setitems(self, _: Any) -> None:
        self._update(self._marked())

    def _update(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(values) % 2:
            raise ValueError("it sets items of what is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # tuples within tuples could take for ever to hash
            if type(key) not in (str, int):
                raise _RefusedError(
                    f"it has a key of type {type(key).__name__.lstrip('_')!r}; keys are text or "
                    "whole numbers"
                )
            target[key] = value

    def _global(self, argument: Any) -> None:
        self._name(str(argument).replace(" ", ".", 1))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("it asks for a name that is no text")
        self._name(f"{module}.{name}")

    def _name(self, name: str) -> None:
        if name not in self.functions:
            raise _refused_name(name)
        self.stack.append(_Name(name))

    def _reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Name or type(arguments) is not tuple:
            raise _RefusedError("it calls what is no function, and nothing was run")
        if function.text == _LOAD:
            (content,) = arguments
            self.stack.append(_read_storage(content, self.budget))
        elif function.text == _ENCODE:
            text, encoding = arguments
            self.stack.append(_encoded(text, encoding, self.budget))
        else:
            self.stack.append(self.functions[function.text](*arguments))

    def _build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is ArrayStandIn:
            version, shape, dtype, by_columns, content = state
            if type(dtype) is _ObjectDtype:
                _check_shape(shape)
                if type(content) is not list or len(shape) > 1:
                    raise ValueError("an array of objects has more than one side")
                target.elements = shape, content
                return
            if type(content) is str:  # bytes of Python 2
                content = _encoded(content, "latin1", self.budget)
            target.__setstate__((version, shape, dtype, by_columns, content))
        elif type(target) is DtypeStandIn:
            target.__setstate__(state)
        elif type(target) is not _ObjectDtype:
            raise _RefusedError("it sets the state of what is no array, and nothing was run")

    def _persistent(self, _: Any) -> None:
        if self.load is None:
            raise _RefusedError("it refers to something outside of the file")
        self.stack.append(self.load(self.stack.pop()))


def _encoded(text: Any, encoding: Any, budget: _Budget) -> bytes:
    """In the place of _codecs.encode, by which the protocols 0 to 2 write bytes."""
    if type(text) is not str or encoding != "latin1":
        raise ValueError("it encodes what are no bytes")
    budget.claim(len(text))
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    """In the place of bytes(), by which the protocols 0 to 2 write none."""
    return b""


def _ordered_dict() -> dict[Any, Any]:
    """In the place of an empty collections.OrderedDict."""
    return {}


def _never(*_: Any) -> Any:
    raise ValueError("it calls what is only a name")


_LOAD = "torch.storage._load_from_bytes"
_ENCODE = "_codecs.encode"
_STORAGE_NAMES: dict[str, Callable[..., Any]] = {f"torch.{name}": _never for name in _STORAGES}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **NUMPY_STAND_INS,
    "numpy.dtype": _dtype,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy._core.numeric._frombuffer": _from_buffer,
    "collections.OrderedDict": _ordered_dict,
    "builtins.bytes": _no_bytes,
    "__builtin__.bytes": _no_bytes,
    _ENCODE: _never,  # these two are called with the budget
    _LOAD: _never,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}
_GROUPS: list[tuple[Callable[[_Machine, Any], None], str]] = [
    (_Machine._protocol, "PROTO"),
    (_Machine._nothing, "FRAME"),
    (_Machine._push_none, "NONE"),
    (_Machine._push_true, "NEWTRUE"),
    (_Machine._push_false, "NEWFALSE"),
    (_Machine._push_integer, "INT BININT BININT1 BININT2 LONG LONG1 LONG4"),
    (_Machine._push, "FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING"),
    (_Machine._push, "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8"),
    (_Machine._push, "SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8"),
    (_Machine._push_list, "EMPTY_LIST"),
    (_Machine._push_dict, "EMPTY_DICT"),
    (_Machine._push_tuple, "EMPTY_TUPLE"),
    (_Machine._mark, "MARK"),
    (_Machine._pop, "POP"),
    (_Machine._pop_mark, "POP_MARK"),
    (_Machine._duplicate, "DUP"),
    (_Machine._put, "PUT BINPUT LONG_BINPUT"),
    (_Machine._memoize, "MEMOIZE"),
    (_Machine._get, "GET BINGET LONG_BINGET"),
    (_Machine._tuple, "TUPLE"),
    (_Machine._tuple_1, "TUPLE1"),
    (_Machine._tuple_2, "TUPLE2"),
    (_Machine._tuple_3, "TUPLE3"),
    (_Machine._list, "LIST"),
    (_Machine._append, "APPEND"),
    (_Machine._appends, "APPENDS"),
    (_Machine._dict, "DICT"),
    (_Machine._setitem, "SETITEM"),
    (_Machine._setitems, "SETITEMS"),
    (_Machine._global, "GLOBAL"),
    (_Machine._stack_global, "STACK_GLOBAL"),
    (_Machine._reduce, "REDUCE"),
    (_Machine._build, "BUILD"),
    (_Machine._persistent, "BINPERSID"),
]
_METHODS = {name: method for method, names in _GROUPS for name in names.split()}


def _finished(value: Any, depth: int, budget: _Budget, arrays: dict[int, NDArray[Any]]) -> Any:
    """The value with arrays for their stand-ins, as a tree of new containers.

    Args:
        arrays: those made so far, by the identity of their stand-in.
    """
    budget.place()
    if depth > DEEPEST:
        raise _RefusedError(
            f"it holds containers more than {DEEPEST} deep, or one that holds itself"
        )
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is ArrayStandIn and value.elements is not None:
        shape, elements = value.elements
        if len(elements) != math.prod(shape):
            raise ValueError(f"an array {shape} of objects has {len(elements)}")
        return _finished(elements if shape else elements[0], depth + 1, budget, arrays)
    if type(value) in (ArrayStandIn, _Tensor):
        if id(value) not in arrays:
            budget.claim(value.claimed)
            arrays[id(value)] = value.numpy()
        return arrays[id(value)]
    if type(value) is dict:
        return {k: _finished(v, depth + 1, budget, arrays) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)([_finished(entry, depth + 1, budget, arrays) for entry in value])
    raise _RefusedError("it holds something that is no number, text, container or array")


# -- The way out -------------------------------------------------------------------------------


def dictionary_file(values: Mapping[str, NDArray[Any]] | Mapping[int, NDArray[Any]]) -> bytes:
    """The bytes of a ``.npy`` file with a dictionary, as other programs expect it.

    They read it with ``np.load(path, allow_pickle=True).item()``, by any NumPy and without torch,
    as writable arrays. Equal values give equal bytes. The form is that of ``np.save`` in NumPy 1
    (protocol 4), whose names NumPy 2 still knows.

    Raises:
        ValueError: if a value is no array of booleans, integers or floats.
    """
    items = b"".join(_text_or_integer(key) + _array(array) for key, array in values.items())
    state = b"(K\x01)" + _dtype_of("O8", "|", 63) + b"\x89](}(" + items + b"uetb"
    head = "{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    head = head.ljust(-(len(_NPY) + 4 + 1 + len(head)) % 64 + len(head)) + "\n"
    start = _NPY + b"\x01\x00" + len(head).to_bytes(2, "little") + head.encode()
    return start + b"\x80\x04" + _EMPTY_ARRAY + state + b"."


_EMPTY_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def _integer(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def _text_or_integer(value: str | int) -> bytes:
    return _text(value) if isinstance(value, str) else _integer(int(value))


def _dtype_of(name: str, order: str, flags: int) -> bytes:
    state = (
        b"(K\x03" + _text(order) + b"NNN" + b"J\xff\xff\xff\xff" * 2 + bytes([75, flags]) + b"tb"
    )
    return b"cnumpy\ndtype\n(" + _text(name) + b"\x89\x88tR" + state


def _array(values: NDArray[Any]) -> bytes:
    name = f"{values.dtype.kind}{values.dtype.itemsize}"
    if name not in _DTYPES:
        raise ValueError(f"arrays of dtype {values.dtype} are not written; give numbers")
    order = "|" if values.dtype.itemsize == 1 else "<"
    content = values.astype(np.dtype(order + name), copy=False).tobytes()
    shape = b"(" + b"".join(_integer(n) for n in values.shape) + b"t"
    stored = b"\x8e" + len(content).to_bytes(8, "little") + content
    return _EMPTY_ARRAY + b"(K\x01" + shape + _dtype_of(name, order, 0) + b"\x89" + stored + b"tb"
