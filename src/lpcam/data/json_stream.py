"""Reading a JSON file that is larger than memory should be, one member of its arrays at a time.

The file is one object whose large members are arrays, as annotation files are. Each member of an
array is decoded by the standard library's own scanner from a window that moves over the file, so
that memory does not grow with the file, and comes with its place in the file, from which it can be
read again.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lpcam.errors import DataError

WINDOW = 256 * 2**10
"""Bytes read at a time."""
LARGEST_VALUE = 256 * 2**20
"""Largest value, in bytes, that is decoded in one piece: a member of an array, or a member of the
object that is no array. A window grows to twice that at most."""

_NOT_BLANK = re.compile(r"[^ \t\n\r]")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*(?=[^ \t\n\r])")
# An error so near the end of the window may come from where the window was cut: the longest word
# that cannot be cut without one is a pair of escapes, \ud83d\ude00.
_NEAR_END = 16
# A number that is cut behind its point or exponent, as in "1e-", still reads as a shorter number.
_NUMBER_TAIL = 3


class Member(NamedTuple):
    """A value of an array and its place in the file, in bytes."""

    value: Any
    offset: int
    length: int


def stream_arrays(
    path: Path,
    keys: Iterable[str],
    *,
    window: int = WINDOW,
    largest: int = LARGEST_VALUE,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, Iterator[Member]]]:
    """Stream arrays of the JSON object in a file.

    Args:
        path: of a UTF-8 file, with or without a byte order mark, that holds one object.
        keys: of the object's arrays that are wanted; other members are passed over.
        window: bytes read at a time, at least 1.
        largest: bytes of the largest value that is decoded; see `LARGEST_VALUE`.
        progress: called after each read with the bytes read so far and those of the file.

    Yields:
        A key and its members, in the order of the file; a key that the file lacks is not yielded.
        Members that are left are passed over when the next key is asked for.

    Raises:
        DataError: naming the file, byte and line, if it is no UTF-8 text, no object, broken or cut
            off, if a wanted key stands twice or is no array, or if a value is larger than
            ``largest``.
    """
    wanted, seen = set(keys), set()
    try:
        with open(path, "rb") as file:
            scanner = _Scanner(path, file, path.stat().st_size, window, largest, progress)
            scanner.begin()
            ended = scanner.peek() == "}"
            while not ended:
                if scanner.peek() != '"':
                    raise scanner.unexpected("a key in double quotes")
                key = scanner.value().value
                scanner.take(":")
                if key in wanted:
                    if key in seen:
                        raise scanner.error(f"{key!r} stands twice", scanner.position)
                    seen.add(key)
                    if scanner.peek() != "[":
                        raise scanner.error(f"{key!r} is no array", scanner.position)
                    members = scanner.members()
                    yield key, members
                    for _ in members:
                        pass
                elif scanner.peek() == "[":
                    for _ in scanner.members():
                        pass
                else:
                    scanner.value()
                ended = scanner.peek() == "}"
                if not ended:
                    scanner.take(",")
            scanner.take("}")
            if scanner.peek():
                raise scanner.error("the object is followed by something else", scanner.position)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


class _Scanner:
    """A place in a file, and the window of its text that begins before that place.

    ``position`` counts characters of the window, ``_byte`` is that place in the file.
    """

    def __init__(
        self,
        path: Path,
        file: BinaryIO,
        total: int,
        window: int,
        largest: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.position = 0
        self._path, self._file, self._total = path, file, total
        self._window, self._largest, self._progress = window, largest, progress
        self._decode = json.JSONDecoder().raw_decode
        self._text = ""
        self._rest = b""  # of a character that the last read cut
        self._byte = 0
        self._line = 1
        self._read = 0
        self._ended = False

    def begin(self) -> None:
        """Step over a byte order mark and the object's opening brace."""
        while not self._text and self._more():
            pass
        if not self._read:
            raise DataError(f"{self._path} is empty; fetch or write it again")
        if self._text.startswith("\ufeff"):
            self.position, self._byte = 1, len(codecs.BOM_UTF8)
        if self.peek() != "{":
            raise self.unexpected("an object, {...},")
        self._step(1)

    def peek(self) -> str:
        """The next character that is no blank, which becomes the place; '' at the file's end."""
        while True:
            found = _NOT_BLANK.search(self._text, self.position)
            place = found.start() if found else len(self._text)
            self._step(place - self.position)
            if found:
                return found[0]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Step over a character that must come next, blanks aside."""
        if self.peek() != character:
            raise self.unexpected(repr(character))
        self._step(1)

    def members(self) -> Iterator[Member]:
        """The members of the array that begins here."""
        self.take("[")
        ended = self.peek() == "]"
        while not ended:
            yield self.value()
            comma = _COMMA.match(self._text, self.position)
            if comma:  # as almost always: one step instead of three
                self._step(comma.end() - self.position)
                continue
            ended = self.peek() == "]"
            if not ended:
                if self.peek() != ",":
                    raise self.unexpected("',' or ']'")
                self._step(1)
                self.peek()
        self.take("]")

    def value(self) -> Member:
        """The value that begins here, whole; the place is then behind it."""
        while True:
            try:
                found, end = self._decode(self._text, self.position)
                if self._ended or len(self._text) - end > _NUMBER_TAIL:
                    break
            except json.JSONDecodeError as error:
                cut = (
                    error.pos > len(self._text) - _NEAR_END
                    # its position is that of the string's beginning
                    or error.msg.startswith("Unterminated string")
                )
                if self._ended or not cut:
                    raise self.error(error.msg, error.pos) from error
            except RecursionError as error:
                raise self.error("it is nested too deeply", self.position) from error
            except ValueError as error:  # of integers with thousands of digits
                raise self.error(str(error), self.position) from error
            if len(self._text) - self.position > self._largest:
                raise self.error(
                    f"the value that begins there is larger than {self._largest:,} bytes, or a "
                    "quote or bracket that closes it is missing",
                    self.position,
                )
            self._more()
        offset = self._byte
        length = end - self.position
        if not self._text.isascii():
            length = len(self._text[self.position : end].encode())
        self.position = end
        self._byte += length
        return Member(found, offset, length)

    def unexpected(self, expected: str) -> DataError:
        """The error that something else stands at the place, or nothing."""
        found = self._text[self.position : self.position + 1]
        got = f", not {found!r}" if found else ""
        return self.error(f"{expected} was expected{got}", self.position)

    def error(self, problem: str, place: int) -> DataError:
        """The error at a place of the window, in the bytes and lines of the file."""
        byte = self._byte + len(self._text[self.position : place].encode())
        line = self._line + self._text.count("\n", 0, place)
        where = ", where the file ends" if place >= len(self._text) else ""
        return DataError(
            f"{self._path} cannot be read as JSON: {problem} (byte {byte:,}, line {line:,}"
            f"{where}); fetch or write it again"
        )

    def _step(self, blanks: int) -> None:
        """Move on over characters of one byte each."""
        self.position += blanks
        self._byte += blanks

    def _more(self) -> bool:
        """Move the window on and lengthen it; False at the file's end.

        What is kept of it is doubled, so that a large value costs no more than a constant times its
        size.
        """
        if self._ended:
            return False
        block = self._file.read(max(self._window, len(self._text) - self.position))
        self._ended = not block
        try:
            text, used = codecs.utf_8_decode(self._rest + block, "strict", self._ended)
        except UnicodeDecodeError as error:
            byte = self._read - len(self._rest) + error.start
            raise DataError(
                f"{self._path} is no UTF-8 text ({error.reason} at byte {byte:,}); save it as UTF-8"
            ) from error
        self._rest = (self._rest + block)[used:]
        self._read += len(block)
        self._line += self._text.count("\n", 0, self.position)
        self._text = self._text[self.position :] + text
        self.position = 0
        if self._progress is not None and block:
            self._progress(self._read, max(self._total, self._read))
        return not self._ended
