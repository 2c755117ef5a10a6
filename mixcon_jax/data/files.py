"""Reads documents from text, JSONL and Parquet files, plain or compressed; errors name the file and the place in it."""

import difflib
import glob
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from mixcon_jax.data.documents import Document
from mixcon_jax.errors import UserError
from mixcon_jax.paths import expand

FORMATS = ('.txt', '.jsonl', '.parquet')
COMPRESSED = ('.gz', '.zst')
BLOCK = 1 << 20  # bytes read at once
ROWS = 256  # Parquet rows decoded at once


def match(pattern: str) -> list[str]:
    """Paths of the files that match a glob, sorted; ``~`` and ``**`` mean what they do in a shell.

    Raises:
      UserError: Nothing matches, or a match has a suffix that is not known.
    """
    expanded = expand(pattern)
    found = sorted(path for path in glob.glob(expanded, recursive=True) if os.path.isfile(path))
    if not found:
        if os.path.isdir(expanded):
            raise UserError(
                f"data.sources: '{pattern}' is a folder; name its files: files:{pattern.rstrip('/')}/**/*.txt"
            )
        raise UserError(
            f"data.sources: no file matches '{pattern}' (looked in {os.path.abspath(os.path.dirname(expanded) or '.')})"
        )
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


def read(path: str, text_field: str = 'text') -> Iterator[Document]:
    """Yields the documents of a file: the whole of a ``.txt``, a line of a ``.jsonl``, a row of a ``.parquet``.

    Raises:
      UserError: The file is unreadable, truncated, binary, or not of its format; the message names file and place.
    """
    form, _ = format_of(path)
    try:
        if form == '.txt':
            yield from _read_text(path)
        elif form == '.jsonl':
            yield from _read_jsonl(path, text_field)
        else:
            yield from _read_parquet(path, text_field)
    except OSError as error:
        raise UserError(f'{path}: {error.strerror or error}') from error


def _read_text(path: str) -> Iterator[Document]:
    with open_bytes(path) as file:
        data = file.read()
    yield Document(decode(data, path), path)


def _read_jsonl(path: str, text_field: str) -> Iterator[Document]:
    offset = 0
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            where = f'{path}:{number}'
            text = decode(line, path, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                record = json.loads(text.removeprefix('\ufeff') if number == 1 else text)
            except json.JSONDecodeError as error:
                end = '' if line.endswith(b'\n') else '; it has no line end: is the file truncated?'
                raise UserError(f'{where}: not valid JSON ({error.msg} at column {error.colno}){end}') from error
            except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
                raise UserError(f'{where}: not valid JSON (nested too deeply, or a number too long)') from error
            yield Document(text_of(record, text_field, where), where)


def _read_parquet(path: str, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f'{path}: reading Parquet needs the package pyarrow: pip install pyarrow') from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise UserError(_no_field(path, text_field, names))
            row = 0
            for batch in file.iter_batches(ROWS, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    where = f'{path}: row {row}'
                    yield Document(text_of({text_field: text}, text_field, where), where)
                    row += 1
    except pyarrow.ArrowException as error:
        raise UserError(f'{path}: not a readable Parquet file ({str(error).splitlines()[0]})') from error


def text_of(record: Any, text_field: str, where: str) -> str:
    """The text of a record; ``where`` (a file and line) begins the message of the error.

    Raises:
      UserError: Not a record, no such field, or its value is not valid text.
    """
    if not isinstance(record, Mapping):
        raise UserError(f'{where}: a {type(record).__name__}, expected an object with the field {text_field!r}')
    if text_field not in record:
        raise UserError(_no_field(where, text_field, list(record)))
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(f'{where}: field {text_field!r} is a {type(text).__name__}, expected a string')
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
            raise UserError(f'{where}: field {text_field!r} has a lone surrogate at character {error.start}') from error
    return text


def _no_field(where: str, text_field: str, fields: list[str]) -> str:
    shown = ', '.join(repr(str(name)) for name in fields[:20]) or 'no fields'
    return f'{where}: no field {text_field!r} (data.text_field); it has {shown}'


def decode(data: bytes, path: str, offset: int = 0) -> str:
    """Decodes UTF-8 strictly; ``offset`` is where ``data`` begins in the (decompressed) file.

    Raises:
      UserError: Bytes that are not UTF-8, or a NUL byte: the file is not text.
    """
    at = data.find(b'\0')
    if at >= 0:
        raise UserError(f'{path}: binary, not text: a NUL byte at byte offset {offset + at}')
    try:
        return data.decode('utf-8')
    except UnicodeDecodeError as error:
        place = f'byte 0x{data[error.start]:02x} at byte offset {offset + error.start}'
        raise UserError(f'{path}: not UTF-8 text: {place} ({error.reason})') from error


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
        self._produced = 0

    def _factory(self) -> Any:
        if self._compression == '.gz':
            return lambda: zlib.decompressobj(wbits=31)
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f'{self._path}: reading .zst needs the package zstandard: pip install zstandard') from error
        return zstandard.ZstdDecompressor().decompressobj

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            data = self._ahead or self._file.read(BLOCK >> 4)
            self._ahead = b''
            if not data:
                if self._frame is not None:
                    raise UserError(f'{self._path}: truncated after {self._produced} bytes of text')
                return 0
            if self._frame is None:
                if self._compression == '.gz' and self._produced and not data.strip(b'\0'):
                    continue  # gzip allows zero padding after the last member
                self._frame = self._new()
            try:
                output = self._frame.decompress(data)
            except Exception as error:  # zlib.error or zstandard.ZstdError, which exists only if zstandard does
                raise UserError(f'{self._path}: not a valid {self._compression} file ({error})') from error
            if self._frame.eof:
                self._ahead, self._frame = self._frame.unused_data, None
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
