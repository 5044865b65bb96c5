"""Reading a large JSON file one array member at a time, in little memory.

The file holds one object whose large members are arrays. The standard library decodes each member
from a window that moves over the file. Every member comes with its byte offset, so that it can be
read again later (no library gives these).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lpcam.runtime.errors import DataError

WINDOW = 256 * 2**10
"""Bytes read at a time."""
_NOT_BLANK = re.compile(r"[^ \t\n\r]")

# A number cut after its point or exponent, such as "1e-", decodes as a shorter number.
_NUMBER_TAIL = 3
_BYTE_ORDER_MARK = codecs.BOM_UTF8.decode("latin-1")


class Member(NamedTuple):
    """A value of an array, its offset in the file and its length, both in bytes."""

    value: Any
    offset: int
    length: int


def stream_arrays(
    path: Path,
    keys: Iterable[str],
    *,
    window: int = WINDOW,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, Iterator[Member]]]:
    """Stream some arrays of the JSON object in a file.

    Args:
        path: UTF-8 file, with or without a byte order mark.
        keys: names of the arrays to stream; other members of the object are skipped.
        window: bytes read at a time. Values may be longer.
        progress: called after each read with the bytes read so far and the size of the file.

    Yields:
        A key and an iterator over its members, in the order of the file, for each key that the file
        has. Unread members are skipped when the next key is requested.

    Raises:
        DataError: naming the file and byte, if it is not UTF-8, not an object, broken or truncated,
            or if a key occurs twice or is not an array.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.json").write_text('{"info": {}, "a": [7, [2]]}')
        ...     for key, members in stream_arrays(Path(folder, "a.json"), ["a"]):
        ...         print(key, [tuple(member) for member in members])
        a [(7, 19, 1), ([2], 22, 3)]
    """
    wanted, seen = set(keys), set()
    try:
        with open(path, "rb") as file:
            scanner = _Scanner(path, file, window, progress)
            for _ in scanner.entries("{}"):
                if scanner.peek() != '"':
                    raise scanner.error("expected a key in double quotes")
                key = scanner.value().value
                scanner.take(":")
                is_array = scanner.peek() == "["
                if key in wanted and (key in seen or not is_array):
                    raise scanner.error(
                        f"{key!r} " + ("repeats" if is_array else "is not an array")
                    )
                if not is_array:
                    scanner.value()
                    continue
                members = scanner.members()
                if key in wanted:
                    seen.add(key)
                    yield key, members
                for _ in members:
                    pass
            if scanner.peek():
                raise scanner.error("expected the end of the file")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


class _Scanner:
    """A position in a file and the window of text around it.

    The text is decoded as Latin-1, so that one character is one byte of the file. JSON's own
    characters are ASCII; a value with others is decoded again as UTF-8.
    """

    def __init__(
        self,
        path: Path,
        file: BinaryIO,
        window: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._path, self._file, self._total = path, file, path.stat().st_size
        self._window, self._progress = window, progress
        self._decode = json.JSONDecoder().raw_decode
        self._text = ""
        self._start = 0  # of the text in the file
        self._position = 0  # in the text
        self._ended = False
        while len(self._text) < len(_BYTE_ORDER_MARK) and self._more():
            pass
        if self._text.startswith(_BYTE_ORDER_MARK):
            self._position = len(_BYTE_ORDER_MARK)

    def peek(self) -> str:
        """Move to the next character that is not blank, and return it; '' at the end."""
        while True:
            found = _NOT_BLANK.search(self._text, self._position)
            self._position = found.start() if found else len(self._text)
            if found or not self._more():
                return found[0] if found else ""

    def take(self, expected: str) -> str:
        """Step over the next character, which must be one of those expected."""
        found = self.peek()
        if not found or found not in expected:
            raise self.error(f"expected {' or '.join(map(repr, expected))}")
        self._position += 1
        return found

    def entries(self, brackets: str) -> Iterator[None]:
        """Stop at each entry of the object or array that begins here."""
        self.take(brackets[0])
        separators = "," + brackets[1]
        if self.peek() == brackets[1]:
            self._position += 1
            return
        while True:
            yield
            if self.take(separators) != ",":
                return

    def members(self) -> Iterator[Member]:
        for _ in self.entries("[]"):
            yield self.value()

    def value(self) -> Member:
        """Read the value that begins here, and step over it."""
        self.peek()
        while True:
            try:
                found, end = self._decode(self._text, self._position)
                if self._ended or len(self._text) - end > _NUMBER_TAIL:
                    break
            except (ValueError, RecursionError) as error:
                # the window may end within the value
                if self._ended or not isinstance(error, json.JSONDecodeError):
                    self._position = getattr(error, "pos", self._position)
                    raise self.error(getattr(error, "msg", str(error))) from error
            self._more()
        text = self._text[self._position : end]
        if not text.isascii():
            try:
                found = json.loads(text.encode("latin-1").decode())
            except UnicodeDecodeError as error:
                raise self.error("the value is not UTF-8") from error
        member = Member(found, self._start + self._position, len(text))
        self._position = end
        return member

    def error(self, problem: str) -> DataError:
        """The error to raise for a problem at the current position."""
        found = self._text[self._position : self._position + 1]
        return DataError(
            f"{self._path} cannot be read as JSON: {problem} (byte "
            f"{self._start + self._position:,}, {f'found {found!r}' if found else 'the file ends'})"
            "; download or write it again"
        )

    def _more(self) -> bool:
        """Move the window to the current position and extend it; False at the end of the file.

        A large value doubles the window each time, so that it is decoded a few times only.
        """
        rest = self._text[self._position :]
        block = self._file.read(max(self._window, len(rest)))
        self._text = rest + block.decode("latin-1")
        self._start += self._position
        self._position = 0
        self._ended = not block
        if self._progress is not None and block:
            self._progress(self._start + len(self._text), self._total)
        return not self._ended
