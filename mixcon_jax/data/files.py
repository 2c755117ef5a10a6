"""Reads documents from text, JSONL and Parquet files, plain or compressed; errors name the file and the place in it."""

import difflib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from mixcon_jax.data import paths
from mixcon_jax.data.documents import Document
from mixcon_jax.errors import UserError, first_line

FORMATS = ('.txt', '.jsonl', '.parquet')
COMPRESSED = ('.gz', '.zst')
MARK = '\ufeff'  # at the head of some files, no text
UTF16 = (b'\xff\xfe', b'\xfe\xff')  # the same in UTF-16
BLOCK = 1 << 20  # bytes read at once
ROWS = 256  # Parquet rows decoded at once


class BadRecordError(UserError):
    """A record of a file that cannot be used, though those after it can be."""


class Skipped:
    """Counts the records that are left out, and keeps the first complaint."""

    def __init__(self) -> None:
        self.count, self.first = 0, ''

    def add(self, error: UserError) -> None:
        self.first = self.first or str(error)
        self.count += 1

    def __str__(self) -> str:
        """What is left out, in words; empty if nothing is."""
        return f'{self.count:,} records are left out; the first: {self.first}' if self.count else ''


def match(pattern: str) -> list[str]:
    """``paths.match`` of a source; every file must be of a known format.

    Raises:
      UserError: Nothing matches, or a match has a suffix that is not known.
    """
    return _known(paths.match(pattern))


def given(arguments: Sequence[str]) -> list[str]:
    """``paths.given`` of each argument, each file once, in their order; every file must be of a known format.

    Raises:
      UserError: An argument matches nothing, or a match has a suffix that is not known.
    """
    return _known(paths.once([path for argument in arguments for path in paths.given(argument)]))


def _known(found: list[str]) -> list[str]:
    for path in found:
        format_of(path)
    return found


def format_of(path: str) -> tuple[str, str]:
    """The format and compression of a file by its name: ``'a.jsonl.gz'`` gives ``('.jsonl', '.gz')``."""
    stem, suffix = os.path.splitext(path)
    compression = suffix if suffix in COMPRESSED else ''
    if compression:
        suffix = os.path.splitext(stem)[1]
    if suffix in FORMATS and not (suffix == '.parquet' and compression):
        return suffix, compression
    if suffix == '.parquet':
        raise UserError(f'{path}: Parquet files compress their own columns; decompress it to .parquet')
    close = difflib.get_close_matches(suffix.lower(), FORMATS, n=1, cutoff=0.5)
    hint = f'did you mean {close[0]}?' if close else f'known: {" ".join(FORMATS)}, and .txt or .jsonl with .gz or .zst'
    raise UserError(f"{path}: unknown suffix '{suffix}{compression}'; {hint}")


def read(path: str, text_field: str = 'text', skipped: Skipped | None = None) -> Iterator[Document]:
    """Yields the documents of a file: the whole of a ``.txt``, a line of a ``.jsonl``, a row of a ``.parquet``.

    Args:
      path: The file.
      text_field: Field of the text in a record.
      skipped: Takes the records that cannot be used; None refuses them.

    Raises:
      UserError: The file is unreadable, truncated, binary, or not of its format; the message names file and place.
    """
    form, _ = format_of(path)
    readers = {'.txt': _read_text, '.jsonl': _read_jsonl, '.parquet': _read_parquet}
    try:
        for make in readers[form](path, text_field):
            try:
                document = make()
            except BadRecordError as error:
                if skipped is None:
                    raise
                skipped.add(error)
                continue
            if document is not None:
                yield document
    except OSError as error:
        raise UserError(f'{path}: {error.strerror or first_line(error)}') from error


# Each reader yields functions, which make a document of a record or raise BadRecordError: reading goes on after that.
Make = Callable[[], Document | None]


def _read_text(path: str, text_field: str) -> Iterator[Make]:
    with open_bytes(path) as file:
        data = file.read()
    yield lambda: Document(decode(data, path).removeprefix(MARK), path)


def _read_jsonl(path: str, text_field: str) -> Iterator[Make]:
    offset = 0
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            yield partial(_parse_line, line, f'{path}:{number}', text_field, offset)
            offset += len(line)


def _parse_line(line: bytes, where: str, text_field: str, offset: int) -> Document | None:
    """The document of a line of JSONL that begins at byte ``offset``; None if it is blank."""
    try:
        record = _parse_json(line, where, offset)
    except BadRecordError as error:
        if line.endswith(b'\n'):
            raise
        # No bad record, but a file that is cut off: nobody knows what else is missing.
        raise UserError(f'{error}; it has no line end: is the file truncated?') from error
    return None if record is _BLANK else Document(text_of(record, text_field, where), where)


_BLANK = object()


def _parse_json(line: bytes, where: str, offset: int) -> Any:
    """What a line of JSONL holds, or ``_BLANK``."""
    text = decode(line, where, offset)
    if not offset:
        text = text.removeprefix(MARK)
    if not text.strip():
        return _BLANK
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRecordError(f'{where}: not valid JSON ({error.msg} at column {error.colno})') from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise BadRecordError(f'{where}: not valid JSON (nested too deeply, or a number too long)') from error


def _read_parquet(path: str, text_field: str) -> Iterator[Make]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f'{path}: reading Parquet needs the package pyarrow: pip install pyarrow') from error
    try:
        # Opened here, for the library wants names that are UTF-8. With a type of text of our own it casts no column to
        # the type that was written, such as a dictionary: casting checks whole batches, and rows are checked below.
        wide = pyarrow.large_binary()
        with open(path, 'rb') as raw, pyarrow.parquet.ParquetFile(raw, binary_type=wide) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise UserError(_no_field(path, text_field, names))
            row = 0
            for batch in file.iter_batches(ROWS, columns=[text_field]):
                for value in batch.column(0):
                    yield partial(_parse_value, value, f'{path}: row {row}', text_field)
                    row += 1
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: the names of its columns are not UTF-8') from error
    except pyarrow.ArrowException as error:
        raise UserError(f'{path}: not a readable Parquet file ({first_line(error)})') from error


def _parse_value(value: Any, where: str, text_field: str) -> Document:
    """The document of a value of a column of text."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        place = f'byte 0x{error.object[error.start]:02x} at byte offset {error.start}'
        raise BadRecordError(f'{where}: field {text_field!r} is not UTF-8 text: {place} ({error.reason})') from error
    return Document(text_of({text_field: text}, text_field, where), where)


def text_of(record: Any, text_field: str, where: str) -> str:
    """The text of a record; ``where`` (a file and line) begins the message of the error.

    Raises:
      BadRecordError: Not a record, no such field, or its value is not valid text.
    """
    if not isinstance(record, Mapping):
        raise BadRecordError(f'{where}: a {type(record).__name__}, expected an object with the field {text_field!r}')
    if text_field not in record:
        raise BadRecordError(_no_field(where, text_field, list(record)))
    text = record[text_field]
    if not isinstance(text, str):
        raise BadRecordError(f'{where}: field {text_field!r} is a {type(text).__name__}, expected a string')
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
            raise BadRecordError(
                f'{where}: field {text_field!r} has a lone surrogate at character {error.start}'
            ) from error
    return text


def _no_field(where: str, text_field: str, fields: list[str]) -> str:
    shown = ', '.join(repr(str(name)) for name in fields[:20]) or 'no fields'
    return f'{where}: no field {text_field!r} (data.text_field); it has {shown}'


def decode(data: bytes, path: str, offset: int = 0) -> str:
    """Decodes UTF-8 strictly; ``offset`` is where ``data`` begins in the (decompressed) file.

    Raises:
      BadRecordError: UTF-16, bytes that are not UTF-8, or a NUL byte: the file is not text.
    """
    if not offset and data.startswith(UTF16):
        raise BadRecordError(f'{path}: UTF-16, not UTF-8 text; write it anew: iconv -f UTF-16 -t UTF-8')
    at = data.find(b'\0')
    if at >= 0:
        raise BadRecordError(f'{path}: binary, not text: a NUL byte at byte offset {offset + at}')
    try:
        return data.decode('utf-8')
    except UnicodeDecodeError as error:
        place = f'byte 0x{data[error.start]:02x} at byte offset {offset + error.start}'
        raise BadRecordError(f'{path}: not UTF-8 text: {place} ({error.reason})') from error


def open_bytes(path: str) -> io.BufferedIOBase:
    """Opens a file for reading its decompressed bytes; truncation and damage raise UserError while reading."""
    _, compression = format_of(path)
    if not compression:
        return open(path, 'rb')
    return io.BufferedReader(_Decompressed(path, compression), BLOCK)


class _Decompressed(io.RawIOBase):
    """The bytes of a .gz or .zst file of any number of frames.

    Written on the incremental decompressors, for they tell whether the last frame was complete; the file-like readers
    of zstandard end silently on a truncated file.
    """

    def __init__(self, path: str, compression: str) -> None:
        self._path, self._compression = path, compression
        self._new = self._factory()
        self._file = open(path, 'rb')  # noqa: SIM115 (closed by close)
        self._frame: Any = None  # the decompressor of the current frame; None between frames
        self._ahead = b''  # compressed bytes that belong to the next frame
        self._pending = memoryview(b'')
        self._frames = self._produced = 0  # complete ones, and bytes of text

    def _factory(self) -> Any:
        if self._compression == '.gz':
            return lambda: zlib.decompressobj(wbits=31)
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f'{self._path}: reading .zst needs the package zstandard: pip install zstandard') from error
        # Frames compressed with long windows need as much memory to decompress: up to 2 GiB.
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            data = self._ahead or self._file.read(BLOCK >> 4)
            self._ahead = b''
            if not data:
                if self._frame is not None or not self._frames:
                    raise UserError(f'{self._path}: truncated after {self._produced} bytes of text')
                return 0
            if self._frame is None:
                if self._compression == '.gz' and self._frames and not data.strip(b'\0'):
                    continue  # gzip allows zero padding after the last member
                self._frame = self._new()
            try:
                output = self._frame.decompress(data)
            except Exception as error:  # zlib.error or zstandard.ZstdError, which exists only if zstandard does
                raise UserError(f'{self._path}: not a valid {self._compression} file ({error})') from error
            if self._frame.eof:
                self._ahead, self._frame = self._frame.unused_data, None
                self._frames += 1
            self._produced += len(output)
            self._pending = memoryview(output)
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
