"""Where text comes from: a source yields documents in a fixed order and has a cheap fingerprint.

Sources are named in ``data.sources``: ``stdlib``, ``files:GLOB`` or ``huggingface:NAME[/SUBSET]``. ``store:PATH`` names
a token store that has been prepared already; ``prepare`` opens it directly.
"""

import difflib
import hashlib
import importlib
import json
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

from mixcon_jax.data import files, paths
from mixcon_jax.data.documents import Document
from mixcon_jax.errors import UserError, first_line

KINDS = ('stdlib', 'files:GLOB', 'huggingface:NAME[/SUBSET]', 'store:PATH')

# Folders of the standard library that hold tests, tables or applications rather than library code.
STDLIB_SKIPPED = frozenset({
    'site-packages', 'dist-packages', 'test', 'tests', 'idlelib', '__pycache__', 'lib2to3', 'encodings', 'ensurepip',
    'turtledemo', 'lib-dynload', 'pydoc_data',
})  # fmt: skip
STDLIB_SHORTEST = 200  # characters; shorter modules are empty __init__ files and stubs


@runtime_checkable
class Source(Protocol):
    """What ``prepare`` needs of a source of text."""

    spec: str
    slug: str  # a short name that can be part of a file name

    def __iter__(self) -> Iterator[Document]:
        """Yields every document, in the same order each time."""

    def sample(self, num_bytes: int) -> Iterator[Document]:
        """Yields documents that stand for the source; the caller stops after about ``num_bytes``."""

    def fingerprint(self) -> str:
        """Hash of what the source would yield, found without reading the text; taken once, when first asked for."""

    # Of sources that leave out records which cannot be used: those of the newest reading from the beginning.
    skipped: files.Skipped | None


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


class StdlibSource:
    """Sources of Python's standard library and the topics of its built-in help: text that every installation has.

    Tests, encodings, applications and build-specific files are left out: about 8.7 MB in 450 documents, which differ
    from one Python version to the next.
    """

    spec = slug = 'stdlib'

    def __init__(self) -> None:
        self.skipped: files.Skipped | None = None
        self.root = Path(sysconfig.get_paths()['stdlib'])
        self.paths = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = sorted(name for name in folders if name not in STDLIB_SKIPPED)
            # _sysconfigdata_* records how this interpreter was built, paths of the builder's machine included.
            self.paths += [
                Path(folder, name) for name in names if name.endswith('.py') and not name.startswith('_sysconfigdata')
            ]
        self.paths.sort(key=lambda path: path.relative_to(self.root).as_posix())

    def __iter__(self) -> Iterator[Document]:
        for path in self.paths:
            try:
                text = path.read_text('utf-8')
            except (OSError, UnicodeDecodeError):
                continue
            if len(text) >= STDLIB_SHORTEST:
                yield Document(text, path.relative_to(self.root).as_posix())
        try:
            topics = importlib.import_module('pydoc_data.topics').topics
        except ImportError:  # some distributions package it separately
            topics = {}
        for name in sorted(topics):
            if len(topics[name]) >= STDLIB_SHORTEST:
                yield Document(topics[name], f'topics/{name}')

    def sample(self, num_bytes: int) -> Iterator[Document]:
        return iter(self)

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        sizes = [(path.relative_to(self.root).as_posix(), path.stat().st_size) for path in self.paths]
        return _digest(['stdlib', platform.python_implementation(), platform.python_version(), sizes])


class FilesSource:
    """Files that match a glob (``**`` descends into folders), in the order of their paths."""

    def __init__(self, spec: str, text_field: str = 'text', skip: bool = False) -> None:
        self.spec, self.text_field, self.skip = spec, text_field, skip
        self.skipped: files.Skipped | None = None
        self.paths = files.match(spec.removeprefix('files:'))
        parent = Path(os.path.commonpath(self.paths))
        self.slug = _slug(parent.name.split('.')[0] if len(self.paths) == 1 else parent.name)

    def __iter__(self) -> Iterator[Document]:
        self.skipped = files.Skipped() if self.skip else None
        for path in self.paths:
            yield from files.read(path, self.text_field, self.skipped)

    def sample(self, num_bytes: int) -> Iterator[Document]:
        """Visits the files in the order of a hash of their paths and takes a share of each."""
        share = max(num_bytes // len(self.paths), 1 << 20)
        skipped = files.Skipped() if self.skip else None
        for path in sorted(self.paths, key=lambda path: hashlib.sha256(os.fsencode(path)).digest()):
            taken = 0
            for document in files.read(path, self.text_field, skipped):
                yield document
                taken += len(document.text)
                if taken >= share:
                    break

    def fingerprint(self) -> str:
        """Of each file its absolute path, size and time of modification; the text field, and what is left out."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        stats = []
        for path in self.paths:
            try:
                status = os.stat(path)
            except OSError as error:
                raise UserError(f'{path}: {error.strerror}') from error
            stats.append((os.path.abspath(path), status.st_size, status.st_mtime_ns))
        return _digest(['files', self.text_field, stats, *(['skip'] if self.skip else [])])


class HuggingFaceSource:
    """The training split of a dataset of the Hugging Face hub, streamed; needs the ``datasets`` package."""

    def __init__(self, spec: str, text_field: str = 'text', skip: bool = False) -> None:
        self.spec, self.text_field, self.skip = spec, text_field, skip
        self.skipped: files.Skipped | None = None
        self.name = spec.removeprefix('huggingface:')
        self.slug = _slug(self.name)
        try:
            self.library = importlib.import_module('datasets')
        except ImportError as error:
            words = f"data.sources: '{spec}' needs the package datasets: pip install datasets"
            raise paths.NothingThereError(words) from error
        parts = self.name.split('/')
        if not all(parts) or len(parts) > 3:
            raise UserError(f"data.sources: '{spec}' is not huggingface:[ORG/]NAME[/SUBSET]")
        # Two parts may be an organisation and a name, or a name and a subset; the first that loads is meant.
        readings: list[tuple[str, str | None]] = [(self.name, None)] if len(parts) < 3 else []
        if len(parts) > 1:
            readings.append(('/'.join(parts[:-1]), parts[-1]))
        failures = []
        for name, subset in readings:
            try:
                self.dataset = self.library.load_dataset(name, subset, split='train', streaming=True)
                break
            except Exception as error:  # the package raises many kinds: of its own, of the network, of the file formats
                failures.append(' '.join(str(error).split())[:500] or type(error).__name__)
        else:
            raise paths.NothingThereError(f"data.sources: '{spec}' could not be opened: {failures[0]}")

    def __iter__(self) -> Iterator[Document]:
        self.skipped = files.Skipped() if self.skip else None
        records = iter(self.dataset)
        index = 0
        while True:
            try:
                record = next(records, None)
            except Exception as error:
                raise UserError(f'{self.spec}: reading record {index} failed: {first_line(error)}') from error
            if record is None:
                return
            where = f'{self.spec}: record {index}'
            index += 1
            try:
                text = files.text_of(record, self.text_field, where)
            except files.BadRecordError as error:
                if self.skipped is None:
                    raise
                self.skipped.add(error)
                continue
            yield Document(text, where)

    def sample(self, num_bytes: int) -> Iterator[Document]:
        return iter(self)

    def fingerprint(self) -> str:
        """Of the name, the text field, and the version and sizes that the hub states, where it does."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        info = getattr(self.dataset, 'info', None)
        stated = [str(getattr(info, key, None)) for key in ('version', 'dataset_size', 'download_checksums')]
        return _digest(['huggingface', self.name, self.text_field, stated, *(['skip'] if self.skip else [])])


def in_common(sources: Sequence[Source]) -> Iterator[str]:
    """A line on sources that have text in common: it counts in each of them, as weights may be meant to have it."""
    seen: dict[object, str] = {}  # what was read first by which source
    for source in sources if len(sources) > 1 else ():
        parts = list(map(paths.identity, source.paths)) if isinstance(source, FilesSource) else [source.spec]
        for other, count in Counter(seen[part] for part in parts if part in seen).items():
            if count == len(parts) and other == source.spec:
                yield f'{source.spec} is named twice: its text counts twice'
            else:
                yield f'{source.spec} and {other} have {count:,} files in common: they count in both'
        seen = dict.fromkeys(parts, source.spec) | seen


def _slug(name: str) -> str:
    """Letters, digits, dots and dashes of ``name``, short enough for a file name."""
    kept = ''.join(c if c.isascii() and (c.isalnum() or c in '._-') else '-' for c in name).strip('.-')
    return kept[:40] or 'text'


def open_source(spec: str, text_field: str = 'text', skip: bool = False) -> Source:
    """Opens the source of text that ``spec`` names.

    Args:
      spec: ``stdlib``, ``files:GLOB`` or ``huggingface:NAME[/SUBSET]``.
      text_field: Field of the text in JSONL, Parquet and Hugging Face records.
      skip: Leave out records that cannot be used, and count them.

    Raises:
      NothingThereError: No file matches, the hub does not have it or does not answer, or a package is missing.
      UserError: No such kind of source, or a file of unknown type.
    """
    kind = spec.split(':')[0]
    if spec == 'stdlib':
        return StdlibSource()
    if spec.startswith('files:') and spec != 'files:':
        return FilesSource(spec, text_field, skip)
    if spec.startswith('huggingface:') and spec != 'huggingface:':
        return HuggingFaceSource(spec, text_field, skip)
    names = [known.split(':')[0] for known in KINDS]
    close = difflib.get_close_matches(kind, names, n=1)
    if kind in names:
        hint = f'write {KINDS[names.index(kind)]}'
    elif close:
        hint = f'did you mean {KINDS[names.index(close[0])]}?'
    elif any(c in spec for c in '/*.'):
        hint = f"for files write 'files:{spec}'"
    else:
        hint = 'known: ' + ', '.join(KINDS)
    raise UserError(f"data.sources: '{spec}' is no source; {hint}")
